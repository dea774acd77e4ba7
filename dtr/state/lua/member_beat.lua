-- Renew one member's deadline and report its progress: the most frequent script of all, so it does only that. Ten times an interval
-- one of them notes that beats get through, and tells its caller when somebody's deadline has passed (see member_reap).
-- KEYS
--   1 meta        hash    the job's state
--   2 members     zset    worker -> deadline
--   3 fences      hash    worker -> incarnation, and the numbers of its channels
--   4 departed    hash    who left and why
--   5 worker_key  hash    this member, with TTL
-- ARGV
--   1 state_id    string  that the member joined
--   2 worker      string  worker_id
--   3 incarnation string  of the member
--   4 number      integer of this beat in channel beat, from 1
--   5 ttl_ms      integer time to live without a beat
--   6 interval_ms integer between two beats of a member
--   7 step        string  the last step, or empty
--   8+ progress   string  fields and values for worker_key that changed since the last answered beat: phase, late_ms, ...
-- RETURNS {generation, run, how, lapsed}: how is revived when worker_key had gone and needs every field again, else renewed;
--   lapsed is a member to reap, or empty
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION
-- WRITES meta members worker_key
-- IDEMPOTENT sets only
-- INCLUDE now integer state
local meta, members, fences, departed, worker_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
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
if mine[1] ~= incarnation or redis.call('ZADD', members, 'XX', 'CH', integer(now + ttl_ms), worker) == 0 then
  if redis.call('HGET', fences, worker) ~= incarnation then
    local gone = redis.call('HGET', departed, worker)
    return redis.error_reply('STALE_INCARNATION ' .. worker .. ' is no longer registered as ' .. incarnation .. ': '
      .. (gone and string.match(gone, '^%S+ %S+ (.*)$') or 'Redis does not know why'))
  end
  redis.call('ZADD', members, now + ttl_ms, worker)
  redis.call('HSET', worker_key, 'incarnation', incarnation)
  if mine[1] ~= incarnation then how = 'revived' end
end
if number >= last then redis.call('HSET', worker_key, 'beat', ARGV[4], 'beat_at', now_text, 'step', step, unpack(ARGV, 8)) end
-- The hash outlives the deadline a little, so that whoever learns of the death can still say what the last step was.
-- Every fourth beat will do: between two renewals it loses four intervals of the five.
if number % 4 == 1 or how == 'revived' then redis.call('PEXPIRE', worker_key, integer(ttl_ms + 5 * interval_ms)) end

-- Ten times an interval somebody notes that beats get through, and records who lapsed.
local since = now - tonumber(held[5])
if since >= 0 and since <= interval_ms / 10 then return {held[3], held[4], how, ''} end
redis.call('HSET', meta, 'beat_at', now_text)
if since < 0 or since > 2 * interval_ms then
  -- A pause; or the server's clock went back, and with it every deadline is too far away.
  if since < 0 then
    for _, other in ipairs(redis.call('ZRANGE', members, integer(now + 2 * ttl_ms), '+inf', 'BYSCORE', 'LIMIT', 0, 1000)) do
      redis.call('ZADD', members, 'XX', now + ttl_ms, other)
    end
  end
  redis.call('HSET', meta, 'grace_until', integer(now + ttl_ms))
  return {held[3], held[4], how, ''}
end
if now < tonumber(redis.call('HGET', meta, 'grace_until')) then return {held[3], held[4], how, ''} end
local lapsed = redis.call('ZRANGE', members, '-inf', '(' .. now_text, 'BYSCORE', 'LIMIT', 0, 1)
return {held[3], held[4], how, lapsed[1] or ''}
