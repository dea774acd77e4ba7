-- A launcher reports that a member that it beats for does not move any more, or moves again: for people, nothing else follows from it.
-- KEYS
--   1 meta        hash    the job's state
--   2 fences      hash    worker -> incarnation
--   3 worker_key  hash    this member, with TTL
--   4 events      stream  for people
-- ARGV
--   1 state_id    string  that the member joined
--   2 worker      string  worker_id
--   3 incarnation string  of the member
--   4 step        string  the last step, or empty
--   5 reason      string  why it counts as stalled; empty: it goes on
-- RETURNS 1 if that was news, else 0
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION
-- WRITES worker_key events
-- IDEMPOTENT a reason that the member has already is not written again
-- INCLUDE now integer state event
local meta, fences, worker_key, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local state_id, worker, incarnation, step, reason = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local known = redis.call('HMGET', meta, 'state_id', 'phase')
local lost = state_error(known[1], known[2], state_id)
if lost then return lost end
if redis.call('HGET', fences, worker) ~= incarnation then
  return redis.error_reply('STALE_INCARNATION ' .. worker .. ' is no longer registered as ' .. incarnation)
end
local held = redis.call('HMGET', worker_key, 'incarnation', 'stalled', 'stalled_at')
local before = held[1] == incarnation and held[2] or ''
-- A hash that has just expired comes back, with its time to live, with the next beat; made here it would have none.
if held[1] ~= incarnation or before == reason then return 0 end
local now = now_ms()
redis.call('HSET', worker_key, 'stalled', reason)
if before == '' then redis.call('HSET', worker_key, 'stalled_at', integer(now)) end
if reason ~= '' then
  emit(events, 'stalled', 'worker', worker, 'step', step, 'reason', reason)
else
  emit(events, 'resumed', 'worker', worker, 'step', step, 'after_ms', integer(now - tonumber(held[3] or now)))
end
return 1
