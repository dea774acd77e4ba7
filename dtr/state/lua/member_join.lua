-- Register one process as a member. The newest registration of a worker_id wins: an older one departs with reason takeover.
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
--   1 state_id    string  that the caller found
--   2 worker      string  worker_id
--   3 incarnation string  token of this registration
--   4 ttl_ms      integer time to live without a beat
--   5 host        string  host id
--   6 pid         integer of the trainer
--   7 address     string  ip:port or empty
--   8+ points     integer mmh3 points of virtual nodes 0, 1, ...
-- RETURNS generation
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION
-- WRITES meta members fences departed roster ring wake events worker_key
-- IDEMPOTENT by the incarnation: a registration that stands only has its deadline renewed
-- INCLUDE now integer state event depart
local meta, members, fences, departed, roster, ring = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local wake, events, worker_key = KEYS[7], KEYS[8], KEYS[9]
local state_id, worker, incarnation, ttl_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local host, pid, address = ARGV[5], ARGV[6], ARGV[7]

local held = redis.call('HMGET', meta, 'state_id', 'phase', 'generation')
local lost = state_error(held[1], held[2], state_id)
if lost then return lost end
local now = now_ms()
local before = redis.call('HGET', fences, worker)
local generation = tonumber(held[3])

if before ~= incarnation then
  -- An echo of a registration that has departed meanwhile must not come back over its successor.
  local gone = redis.call('HGET', departed, worker)
  if gone and string.match(gone, '^%S+') == incarnation then
    return redis.error_reply('STALE_INCARNATION ' .. worker .. ' has departed as ' .. incarnation .. ' already')
  end
  if before then
    depart(now, meta, members, fences, departed, roster, ring, wake, events, worker, before, 'takeover by ' .. incarnation)
  end
  redis.call('HSET', fences, worker, incarnation)
  local vnodes = {}
  for n = 8, #ARGV do
    vnodes[#vnodes + 1] = ARGV[n]
    vnodes[#vnodes + 1] = worker .. '#' .. (n - 8)
  end
  if #vnodes > 0 then redis.call('ZADD', ring, unpack(vnodes)) end
  redis.call('DEL', worker_key)
  generation = redis.call('HINCRBY', meta, 'generation', 1)
  emit(events, 'joined', 'worker', worker, 'incarnation', incarnation, 'host', host, 'pid', pid, 'generation', generation)
end
redis.call('ZADD', members, now + ttl_ms, worker)
redis.call('HSET', worker_key, 'incarnation', incarnation, 'host', host, 'pid', pid, 'address', address,
  'phase', 'joined', 'beat', 0, 'beat_at', integer(now), 'ttl_ms', ttl_ms)
redis.call('PEXPIRE', worker_key, ttl_ms * 2)
return generation
