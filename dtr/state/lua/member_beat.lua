-- Renew one member's deadline, report its progress, and record the death of a bounded number of members whose deadline passed.
-- Nobody is reaped within a grace after a time in which nobody could beat (a pause of Redis makes every deadline lapse at once).
-- KEYS
--   1 meta        hash    the job's state
--   2 members     zset    worker -> deadline
--   3 fences      hash    worker -> incarnation, and the numbers of its channels
--   4 departed    hash    who left and why
--   5 roster      hash    of the current run
--   6 ring        zset    virtual nodes, for people
--   7 wake        stream  interrupts waits
--   8 events      stream  for people
--   9 worker_key  hash    this member, with TTL
-- ARGV
--   1 state_id    string  that the member joined
--   2 worker      string  worker_id
--   3 incarnation string  of the member
--   4 number      integer of this beat in channel beat, from 1
--   5 ttl_ms      integer time to live without a beat
--   6 interval_ms integer between two beats of a member
--   7 step        string  the last step, or empty
--   8+ progress   string  fields and values for worker_key that changed since the last answered beat: phase, late_ms, ...
-- RETURNS {generation, run, how}: how is revived when worker_key had gone and needs every field again, else renewed
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION
-- WRITES meta members fences departed roster ring wake events worker_key
-- IDEMPOTENT sets only; a member that was reaped is not reaped again
-- INCLUDE now integer state event depart
local meta, members, fences, departed, roster, ring = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local wake, events, worker_key = KEYS[7], KEYS[8], KEYS[9]
local state_id, worker, incarnation, number = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local ttl_ms, interval_ms, step = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]

local held = redis.call('HMGET', meta, 'state_id', 'phase', 'generation', 'run', 'beat_at')
local lost = state_error(held[1], held[2], state_id)
if lost then return lost end
local mine = redis.call('HMGET', worker_key, 'incarnation', 'beat')
local last = tonumber(mine[2] or number - 1)
if mine[1] == incarnation and number > last + 1 then
  return redis.error_reply('STATE_LOST beat ' .. (number - 1) .. ' was acknowledged and is gone: Redis lost writes')
end

-- The usual beat renews in one call. Only when nothing was renewed is the registration itself looked at: a member that was reaped
-- or replaced is in fences no more, while its hash may still be there for people.
local now = now_ms()
local now_text, how = integer(now), 'renewed'
if mine[1] ~= incarnation or redis.call('ZADD', members, 'XX', 'CH', now + ttl_ms, worker) == 0 then
  if redis.call('HGET', fences, worker) ~= incarnation then
    local gone = redis.call('HGET', departed, worker)
    return redis.error_reply('STALE_INCARNATION ' .. worker .. ' is no longer registered as ' .. incarnation .. ': '
      .. (gone and string.match(gone, '^%S+ %S+ (.*)$') or 'Redis does not know why'))
  end
  redis.call('ZADD', members, now + ttl_ms, worker)
  redis.call('HSET', worker_key, 'incarnation', incarnation)
  if mine[1] ~= incarnation then how = 'revived' end
end
if number >= last then redis.call('HSET', worker_key, 'beat', number, 'beat_at', now_text, 'step', step, unpack(ARGV, 8)) end
-- The hash outlives the deadline a little, so that whoever learns of the death can still say what the last step was.
redis.call('PEXPIRE', worker_key, ttl_ms + 2 * interval_ms)

-- Ten times an interval somebody notes that beats get through, and records who lapsed.
local since = now - tonumber(held[5])
if since >= 0 and since <= interval_ms / 10 then return {held[3], held[4], how} end
redis.call('HSET', meta, 'beat_at', now_text)
if since < 0 or since > 2 * interval_ms then
  -- A pause; or the server's clock went back, and with it every deadline is too far away.
  if since < 0 then
    for _, other in ipairs(redis.call('ZRANGE', members, integer(now + 2 * ttl_ms), '+inf', 'BYSCORE', 'LIMIT', 0, 1000)) do
      redis.call('ZADD', members, 'XX', now + ttl_ms, other)
    end
  end
  redis.call('HSET', meta, 'grace_until', integer(now + ttl_ms))
  return {held[3], held[4], how}
end
if now < tonumber(redis.call('HGET', meta, 'grace_until')) then return {held[3], held[4], how} end
local lapsed = redis.call('ZRANGE', members, '-inf', '(' .. now_text, 'BYSCORE', 'LIMIT', 0, 8)
for _, other in ipairs(lapsed) do
  depart(now, meta, members, fences, departed, roster, ring, wake, events, other,
    redis.call('HGET', fences, other) or '?', 'no beat within its ttl')
end
held = redis.call('HMGET', meta, 'generation', 'run')
return {held[1], held[2], how}
