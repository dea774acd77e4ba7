-- Record the death of a bounded number of members whose deadline has passed. Nobody is reaped within the grace after a time in which
-- nobody could beat: a pause of Redis makes every deadline lapse at once.
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
--   1 state_id    string  that the caller joined
--   2 limit       integer how many at most
-- RETURNS how many
-- ERRORS STATE_LOST RECOVERING
-- WRITES meta members fences departed roster ring wake events
-- IDEMPOTENT who was reaped is a member no more
-- INCLUDE now integer state event depart
local meta, members, fences, departed, roster, ring = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local wake, events = KEYS[7], KEYS[8]
local state_id, limit = ARGV[1], tonumber(ARGV[2])

local held = redis.call('HMGET', meta, 'state_id', 'phase', 'grace_until')
local lost = state_error(held[1], held[2], state_id)
if lost then return lost end
local now = now_ms()
if now < tonumber(held[3]) then return 0 end
local lapsed = redis.call('ZRANGE', members, '-inf', '(' .. integer(now), 'BYSCORE', 'LIMIT', 0, limit)
for _, worker in ipairs(lapsed) do
  depart(now, meta, members, fences, departed, roster, ring, wake, events, worker,
    redis.call('HGET', fences, worker) or '?', 'no beat within its ttl')
end
return #lapsed
