-- A trainer reports a save of its rank that came to nothing without a decision about the checkpoint that would tell it: the step was
-- saved before with other bytes, or the run may not save.
-- KEYS
--   1 meta         hash    the job's state
--   2 run_key      hash    the run
--   3 failed_saves stream  for status
--   4 events       stream  for people
-- ARGV
--   1 state_id     string  that the member joined
--   2 run          string  of the save
--   3 step         integer of the save
--   4 rank         integer of the caller
--   5 worker       string  worker_id
--   6 incarnation  string  of the member
--   7 save         string  id of the save
--   8 state        string  of its handle
--   9 reason       string  for people
-- RETURNS 1
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION
-- WRITES failed_saves events
-- IDEMPOTENT by the save's id: one that is among the entries kept is not written again
-- INCLUDE state event failed
local meta, run_key, failed_saves, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local state_id, run, step, rank, worker, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local save, state, reason = ARGV[7], ARGV[8], ARGV[9]

local known = redis.call('HMGET', meta, 'state_id', 'phase')
local lost = state_error(known[1], known[2], state_id)
if lost then return lost end
local seat = redis.call('HGET', run_key, 'member:' .. worker)
if not seat or string.match(seat, '^%d+ %S+') ~= rank .. ' ' .. incarnation then
  return redis.error_reply('STALE_INCARNATION ' .. worker .. ' was not rank ' .. rank .. ' of run ' .. run .. ' as ' .. incarnation)
end
for _, entry in ipairs(redis.call('XREVRANGE', failed_saves, '+', '-', 'COUNT', 200)) do
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'save' and entry[2][i + 1] == save then return 1 end
  end
end
failed_save(failed_saves, 'run', run, 'step', step, 'state', state, 'reason', reason, 'rank', rank, 'worker', worker, 'save', save)
emit(events, 'save_failed', 'run', run, 'step', step, 'rank', rank, 'worker', worker, 'state', state, 'reason', reason)
return 1
