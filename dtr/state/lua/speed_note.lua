-- Show how fast one member consumes a data set: for people, and for who places the shards of the next run. Nobody waits for the answer.
-- KEYS
--   1 roster      hash    of the current run, with its fence
--   2 worker_key  hash    this member, with TTL
-- ARGV
--   1 fence       string  state id and run
--   2 worker      string  worker_id
--   3 rank        integer of the member
--   4 incarnation string  of the member
--   5 field       string  which one of worker_key: samples_per_s/NAME
--   6 samples_per_s string over its newest batches
-- RETURNS 1 | 0: worker_key is not this member's, or had expired, so nothing was written: without a beat it would stay for good
-- ERRORS ROSTER_CHANGED
-- WRITES worker_key
-- IDEMPOTENT sets only
local roster, worker_key = KEYS[1], KEYS[2]
local fence, worker, rank, incarnation, field, samples_per_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]

local run = redis.call('HMGET', roster, ':fence', worker)
if run[1] ~= fence or run[2] ~= rank .. ' ' .. incarnation then
  return redis.error_reply('ROSTER_CHANGED this member is not in an open run')
end
if redis.call('HGET', worker_key, 'incarnation') ~= incarnation then return 0 end
redis.call('HSET', worker_key, field, samples_per_s)
return 1
