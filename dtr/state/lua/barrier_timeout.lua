-- The first member whose wait timed out ends the round for all; a timeout that meets a release is a pass.
-- KEYS
--   1 run_key     hash    the round's run
--   2 round       hash    this round
--   3 arrived     set     who is there
--   4 round_wake  stream  its verdict
--   5 events      stream  for people
-- ARGV
--   1 worker      string  worker_id
--   2 subset      string  JSON array of the expected workers, sorted; empty for the whole roster
--   3 timeout_s   string  how long the member waited, for the message
-- RETURNS {'RELEASED', wanted}
-- ERRORS BARRIER_BROKEN BARRIER_TIMEOUT BARRIER_UNKNOWN
-- WRITES round arrived round_wake events
-- IDEMPOTENT a final round only repeats its verdict
-- INCLUDE event barrier_verdict barrier_end
local run_key, round, arrived, round_wake, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local worker, subset, timeout_s = ARGV[1], ARGV[2], ARGV[3]

local held = redis.call('HMGET', round, 'state', 'expected')
if not held[1] then return redis.error_reply('BARRIER_UNKNOWN there is no such round: Redis lost it, or it never was') end
if held[1] == 'OPEN' then
  local reason = redis.call('SCARD', arrived) .. ' of ' .. held[2] .. ' arrived within the ' .. timeout_s .. ' s of ' .. worker
  barrier_end('TIMEDOUT', reason, run_key, round, arrived, round_wake, events, subset)
end
return barrier_verdict(round)
