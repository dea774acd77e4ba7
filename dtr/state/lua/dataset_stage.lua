-- Write facts of some files of a spec that is about to be registered. They expire unless it is; once it is, they stay as they are.
-- KEYS
--   1 files       hash    file -> facts; without a TTL once registered
-- ARGV
--   1 ttl_s       integer time until the registration
--   2+ facts      string  file and its facts, alternating
-- RETURNS 'staged' | 'kept': they are registered already
-- ERRORS none
-- WRITES files
-- IDEMPOTENT sets only
local files = KEYS[1]
local ttl_s = ARGV[1]

if redis.call('TTL', files) == -1 then return 'kept' end
redis.call('HSET', files, unpack(ARGV, 2))
redis.call('EXPIRE', files, ttl_s)
return 'staged'
