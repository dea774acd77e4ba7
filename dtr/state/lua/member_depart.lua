-- Record that a member is gone: it left, its launcher saw it exit, or it was asked to go.
-- KEYS
--   1 meta        hash    the job's state
--   2 members     zset    worker -> deadline
--   3 fences      hash    worker -> incarnation, and the numbers of its channels
--   4 departed    hash    who left and why
--   5 roster      hash    of the current run
--   6 ring        zset    virtual nodes, for people
--   7 wake        stream  interrupts waits
--   8 events      stream  for people
-- ARGV
--   1 state_id    string  that the member joined
--   2 worker      string  worker_id
--   3 incarnation string  that departs; another one is not touched
--   4 reason      string  for people: left, signal 9, exit 1, ...
-- RETURNS 1 if it departed now, 0 if this incarnation was gone already
-- ERRORS STATE_LOST RECOVERING
-- WRITES meta members fences departed roster ring wake events
-- IDEMPOTENT by the incarnation
-- INCLUDE now state event depart
local meta, members, fences, departed, roster, ring = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local wake, events = KEYS[7], KEYS[8]
local state_id, worker, incarnation, reason = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local held = redis.call('HMGET', meta, 'state_id', 'phase')
local lost = state_error(held[1], held[2], state_id)
if lost then return lost end
if redis.call('HGET', fences, worker) ~= incarnation then return 0 end
depart(now_ms(), meta, members, fences, departed, roster, ring, wake, events, worker, incarnation, reason)
return 1
