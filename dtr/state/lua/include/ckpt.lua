-- ckpt_create(ckpt, ckpts, open_ckpts, events, now, run, step, world_size, replicated, writer, store): a checkpoint in state WRITING.
local function ckpt_create(ckpt, ckpts, open_ckpts, events, now, run, step, world_size, replicated, writer, store)
  local expected = replicated == 'all' and 1 or tonumber(world_size)
  redis.call('HSET', ckpt, 'state', 'WRITING', 'reason', '', 'world_size', world_size, 'expected', expected, 'done', 0,
    'replicated', replicated, 'writer', writer, 'store', store, 'created_at', integer(now))
  redis.call('ZADD', ckpts, step, run .. '/' .. step)
  redis.call('ZADD', open_ckpts, now, run .. '/' .. step)
  emit(events, 'ckpt_begun', 'run', run, 'step', step, 'world_size', world_size)
end
