-- Fix what a run continues, in two steps around the run's record in the store. CUT replaces the lineage, so that from now on a late
-- commit of a branch that the job left is ABANDONED. SET says that the record is in the store: only now may restore return and the
-- first part be published. The first facts win.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run
--   3 run_key     hash    the run
--   4 restore     hash    the run's collective restore
--   5 base_ckpt   hash    the checkpoint that the run continues; of its own step 0 if there is none
--   6 lineage     hash    run -> last step
--   7 wake        stream  interrupts waits
--   8 events      stream  for people
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the run
--   3 worker      string  worker_id
--   4 rank        integer of the member
--   5 incarnation string  of the member
--   6 phase       string  CUT or SET
--   7 base_run    string  the run that it continues; empty: none
--   8 base_step   string  the last step taken from it; empty: none
--   9 store       string  URL without secrets
--  10 after_ms    integer base_at is later than this: than every record in the store
--  11 keep_last   integer commits that retention keeps
--  12 grace_ms    integer how long objects outlive their manifest
--  13 keep_every  integer one commit of each so many steps is kept; 0: no such rule
--  14 keep_best   string  METRIC:min|max:COUNT, several separated by commas; empty: no such rule
--  15 keep_for_ms integer commits that are younger are kept; 0: no such rule
--  16+ ancestors  string  run and last step taken from it, inclusive, alternating
-- RETURNS {base_state, base_run, base_step, base_at, did}: did is 1 if this call changed something
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED CKPT_CONFLICT CKPT_STATE
-- WRITES meta run_key lineage wake events
-- IDEMPOTENT by comparison: the same facts again change nothing
-- INCLUDE now integer state fence event
local meta, roster, run_key, restore = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local base_ckpt, lineage, wake, events = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local state_id, run, worker, rank, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local phase, base_run, base_step, store, after_ms = ARGV[6], ARGV[7], ARGV[8], ARGV[9], tonumber(ARGV[10])
local keep_last, grace_ms, keep_every, keep_best, keep_for_ms = ARGV[11], ARGV[12], ARGV[13], ARGV[14], ARGV[15]

local known = redis.call('HMGET', meta, 'state_id', 'phase', 'run', 'base_at')
local lost = state_error(known[1], known[2], state_id)
if lost then return lost end
local refused = fence_error(known[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if refused then return refused end
local held = redis.call('HMGET', run_key, 'base_state', 'base_run', 'base_step', 'store', 'base_at')
local name = base_run == '' and 'nothing' or base_run .. '/' .. base_step
if held[1] ~= 'NONE' then
  if held[2] ~= base_run or held[3] ~= base_step or held[4] ~= store then
    return redis.error_reply('CKPT_CONFLICT run ' .. run .. ' continues ' .. (held[2] == '' and 'nothing' or held[2] .. '/' .. held[3])
      .. ' in ' .. held[4] .. ', this rank would continue ' .. name .. ' in ' .. store .. ': every rank must restore the same')
  end
  if held[1] == 'SET' or phase == 'CUT' then return {held[1], held[2], held[3], held[5], 0} end
  redis.call('HSET', run_key, 'base_state', 'SET')
  redis.call('XADD', wake, 'MAXLEN', '~', 1000, '*', 'news', 'based', 'run', run)
  emit(events, 'run_based', 'run', run, 'base', name, 'store', store)
  return {'SET', held[2], held[3], held[5], 1}
end
if phase ~= 'CUT' then return redis.error_reply('CKPT_STATE run ' .. run .. ' was not cut: Redis lost it') end
local restoring = redis.call('HMGET', restore, 'state', 'choice')
local under_way = restoring[1] == 'OFFERING' or restoring[1] == 'VOTING'
if under_way or (restoring[1] == 'AGREED' and restoring[2] ~= name) or (restoring[1] == 'FRESH' and base_run ~= '') then
  return redis.error_reply('CKPT_CONFLICT the ranks of run ' .. run .. ' are restoring: each must call restore() before its first save')
end
if base_run ~= '' and redis.call('HEXISTS', base_ckpt, 'retired_at') == 1 then
  return redis.error_reply('CKPT_STATE checkpoint ' .. name .. ' was retired by retention')
end

local base_at = integer(math.max(now_ms(), after_ms + 1, tonumber(known[4] or 0) + 1))
redis.call('HSET', run_key, 'base_state', 'CUT', 'base_run', base_run, 'base_step', base_step, 'store', store, 'base_at', base_at,
  'keep_last', keep_last, 'grace_ms', grace_ms, 'keep_every', keep_every, 'keep_best', keep_best, 'keep_for_ms', keep_for_ms)
redis.call('DEL', lineage)
redis.call('HSET', lineage, run, '')
for i = 16, #ARGV - 1, 2 do redis.call('HSET', lineage, ARGV[i], ARGV[i + 1]) end
redis.call('HSET', meta, 'latest', base_run == '' and '' or name, 'base_at', base_at)
return {'CUT', base_run, base_step, base_at, 1}
