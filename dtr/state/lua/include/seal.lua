-- ckpt_seal(ckpt, run_key, data, events, run, step, now): seal a checkpoint that is WRITING if all of its parts are there and, in a run
-- that loads data, every rank's share of the data state. Returns its state.
local function ckpt_seal(ckpt, run_key, data, events, run, step, now)
  local held = redis.call('HMGET', ckpt, 'done', 'expected', 'world_size')
  if tonumber(held[1]) < tonumber(held[2]) then return 'WRITING' end
  if redis.call('HEXISTS', run_key, 'data') == 1 and redis.call('HLEN', data) < tonumber(held[3]) then return 'WRITING' end
  redis.call('HSET', ckpt, 'state', 'SEALED', 'sealed_at', integer(now))
  emit(events, 'ckpt_sealed', 'run', run, 'step', step)
  return 'SEALED'
end
