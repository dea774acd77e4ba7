-- The holder of a claim renews its lease and reports how far it is.
-- KEYS
--   1 ckpt           hash    the checkpoint
--   2 parts          hash    its parts
-- ARGV
--   1 rank           integer of the part
--   2 token          string  of the claim
--   3 lease_ms       integer from now
--   4 progress_bytes integer stored so far under this claim
-- RETURNS 1 if the claim stands and is still wanted, 0 if its holder must stop
-- ERRORS none
-- WRITES parts
-- IDEMPOTENT the lease is a set, the progress a maximum
-- INCLUDE now integer
local ckpt, parts = KEYS[1], KEYS[2]
local rank, token, lease_ms, progress_bytes = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local part = redis.call('HMGET', parts, rank .. '/uploader', rank .. '/state', rank .. '/progress_bytes')
if part[1] ~= token or part[2] ~= 'staged' or redis.call('HGET', ckpt, 'state') ~= 'WRITING' then return 0 end
redis.call('HSET', parts, rank .. '/lease_until', integer(now_ms() + lease_ms),
  rank .. '/progress_bytes', integer(math.max(progress_bytes, tonumber(part[3] or 0))))
return 1
