-- A rank's step consumed batches: kept for people who ask what a recent step saw. Sent without waiting for the answer.
-- KEYS
--   1 roster      hash    of the current run, with its fence
--   2 journal     stream  the newest steps of this rank in this run
-- ARGV
--   1 fence       string  state id and run
--   2 worker      string  worker_id
--   3 rank        integer of the member
--   4 incarnation string  of the member
--   5 step        integer that consumed them
--   6 keep        integer how many steps are kept
--   7 keep_ms     integer the journal outlives its last write by this
--   8+ accounts   string  data set and what was consumed of it, JSON, alternating
-- RETURNS 1 if it is on record now, 0 if this step or a later one was there already
-- ERRORS ROSTER_CHANGED
-- WRITES journal
-- IDEMPOTENT by the step: it is the entry's id, and ids only grow
-- INCLUDE now integer
local roster, journal = KEYS[1], KEYS[2]
local fence, worker, rank, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local step, keep, keep_ms = ARGV[5], ARGV[6], ARGV[7]

local run = redis.call('HMGET', roster, ':fence', worker)
if run[1] ~= fence or run[2] ~= rank .. ' ' .. incarnation then
  return redis.error_reply('ROSTER_CHANGED this member is not in an open run')
end
local newest = redis.call('XREVRANGE', journal, '+', '-', 'COUNT', 1)[1]
if newest and tonumber(string.match(newest[1], '^%d+')) >= tonumber(step) then return 0 end
redis.call('XADD', journal, 'MAXLEN', keep, step .. '-1', ':at', integer(now_ms()), unpack(ARGV, 8))
redis.call('PEXPIRE', journal, keep_ms)
return 1
