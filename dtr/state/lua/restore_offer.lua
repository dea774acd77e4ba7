-- One rank offers the checkpoints that it can read; the last offer fixes the newest one that all can. Collective: every rank of the
-- run offers once per attempt, and asks again until the answer is final.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run
--   3 run_key     hash    the run
--   4 restore     hash    the run's collective restore
--   5 wake        stream  interrupts waits
--   6 restores    hash    how often each checkpoint was tried
--   7 events      stream  for people
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the run
--   3 worker      string  worker_id
--   4 rank        integer of the member
--   5 incarnation string  of the member
--   6 attempt     integer of this restore in the run, from 0; the next one begins when the last ended without a checkpoint
--   7 fresh       integer 1: this rank goes on without a checkpoint if there is none at all
--   8 offer       string  candidates RUN/STEP, newest first, blanks between
--   9 limit       integer tried so often without success, a checkpoint is quarantined; 0: never
--  10+ rejected   string  candidates that this rank does not offer, each followed by the reason
-- RETURNS {state, choice, base_state, reasons}: OFFERING, VOTING, AGREED, FRESH (all go on without one), NONE, FAILED, or BASED (the run
--   continues something already); reasons alternate candidate and why it was dropped. NONE and FAILED are told after the run's end, too
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED
-- WRITES restore wake restores events
-- IDEMPOTENT by the rank: its first offer of an attempt counts; when the run has ended, nothing is written
-- INCLUDE state fence restore event
local meta, roster, run_key, restore, wake, restores, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local state_id, run, worker, rank, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local attempt, fresh, offer, limit = tonumber(ARGV[6]), ARGV[7], ARGV[8], tonumber(ARGV[9])

local known = redis.call('HMGET', meta, 'state_id', 'phase', 'run')
local lost = state_error(known[1], known[2], state_id)
if lost then return lost end
local refused = fence_error(known[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if refused then return restore_ended(restore, run_key, worker, rank, incarnation, attempt) or refused end
local held = redis.call('HMGET', restore, 'attempt', 'state')
local agreed = held[2] == 'AGREED' or held[2] == 'FRESH'
local base = redis.call('HMGET', run_key, 'base_state', 'world_size')
if base[1] ~= 'NONE' and (not agreed or attempt > tonumber(held[1])) then return {'BASED', '', base[1], {}} end
if held[1] and attempt > tonumber(held[1]) and held[2] ~= 'OFFERING' and held[2] ~= 'VOTING' and not agreed then
  for _, field in ipairs(redis.call('HKEYS', restore)) do
    if not string.match(field, '^verdict:') then redis.call('HDEL', restore, field) end
  end
  held = {nil, nil}
end
if not held[1] then
  redis.call('HSET', restore, 'attempt', attempt, 'state', 'OFFERING', 'choice', '', 'offers', 0, 'fresh', 0, 'seen', 0)
  redis.call('EXPIRE', restore, 86400)
  held = {attempt, 'OFFERING'}
end
if tonumber(held[1]) ~= attempt or held[2] ~= 'OFFERING' or redis.call('HSETNX', restore, 'offer:' .. rank, offer) == 0 then
  return restore_answer(restore, run_key, attempt)
end

for candidate in string.gmatch(offer, '%S+') do
  redis.call('HINCRBY', restore, 'count:' .. candidate, 1)
end
for i = 10, #ARGV - 1, 2 do
  local dropped = restore_drop(restore, ARGV[i], 'rank ' .. rank .. ': ' .. ARGV[i + 1])
  local begun = tonumber(redis.call('HGET', restores, ARGV[i] .. '/begun') or 0)
  if dropped and limit > 0 and begun >= limit then
    local base_run, step = string.match(ARGV[i], '^(.*)/(%d+)$')
    emit(events, 'ckpt_quarantined', 'run', base_run, 'step', step, 'begun', begun, 'reason', ARGV[i + 1])
  end
end
if offer ~= '' or #ARGV > 9 then redis.call('HSET', restore, 'seen', 1) end
redis.call('HINCRBY', restore, 'fresh', fresh)
if redis.call('HINCRBY', restore, 'offers', 1) == tonumber(base[2]) then
  local order = {}
  for candidate in string.gmatch(offer, '%S+') do
    if redis.call('HGET', restore, 'count:' .. candidate) == base[2] then order[#order + 1] = candidate end
  end
  redis.call('HSET', restore, 'order', table.concat(order, ' '))
  restore_settle(restore, restores, wake, attempt, run)
end
return restore_answer(restore, run_key, attempt)
