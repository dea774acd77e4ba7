-- A shard that its leaseholder cannot read is nobody's from now on, until a person lets it go (ledger_release); on record with the error.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run
--   3 ledger      hash    of the data set in this epoch and run
--   4 quarantine  hash    shard -> why it cannot be read
--   5 events      stream  for people
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the run
--   3 worker      string  worker_id
--   4 rank        integer of the member
--   5 incarnation string  of the member
--   6 name        string  of the data set
--   7 shard       integer its number
--   8 fence       integer of its lease
--   9 where       string  its file and range, for people
--  10 reason      string  the error, one line
-- RETURNS 1 if it is in quarantine now, 0 if the caller's lease of it does not stand
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED
-- WRITES ledger quarantine events
-- IDEMPOTENT by comparison: one that is there already stays as it is
-- INCLUDE state fence event
local meta, roster, ledger, quarantine, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local state_id, run, worker, rank, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local name, shard, fence, where, reason = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]

local known = redis.call('HMGET', meta, 'state_id', 'phase', 'run')
local lost = state_error(known[1], known[2], state_id)
if lost then return lost end
local refused = fence_error(known[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if refused then return refused end
if redis.call('HEXISTS', quarantine, shard) == 1 then return 1 end
if redis.call('HGET', ledger, 'lease/' .. shard) ~= worker .. ' ' .. incarnation .. ' ' .. fence then return 0 end

redis.call('HSET', quarantine, shard, reason)
redis.call('HDEL', ledger, 'lease/' .. shard)
emit(events, 'shard_quarantined', 'dataset', name, 'shard', shard, 'where', where, 'worker', worker, 'reason', reason)
return 1
