-- ckpt_abort(ckpt, events, run, step, rank, reason): a checkpoint that will not become complete; the store's record decides the rest.
local function ckpt_abort(ckpt, events, run, step, rank, reason)
  redis.call('HSET', ckpt, 'state', 'ABORTING', 'reason', reason)
  emit(events, 'ckpt_aborting', 'run', run, 'step', step, 'rank', rank, 'reason', reason)
end
