-- Set what was consumed of a data set before this run, once per epoch of the run. Every rank calls it before it leases; the first sets it
-- and the others must mean the same. From now on checkpoints of this run need the data state of every rank.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run
--   3 run_key     hash    the run
--   4 ledger      hash    of the data set in this epoch and run
--   5 taken       string  one bit a shard: not free
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the run
--   3 worker      string  worker_id
--   4 rank        integer of the member
--   5 incarnation string  of the member
--   6 version     integer of the data set
--   7 digest      string  of the data set
--   8 mode        string  dynamic | deterministic
--   9 seed        integer of the epoch's order
--  10 shards      integer of the data set
--  11 base        string  digest of what was consumed before
--  12 bits        string  the bitmap taken as it is then, its last byte filled up with ones; empty: no shard will be leased
--  13 keep_ms     integer the ledger outlives its last write by this
-- RETURNS 'set' | 'same'
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED LEDGER_CONFLICT
-- WRITES run_key ledger taken
-- IDEMPOTENT by comparison: the same base again changes nothing
-- INCLUDE state fence
local meta, roster, run_key, ledger, taken = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local state_id, run, worker, rank, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local version, digest, mode, seed, shards = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local base, bits, keep_ms = ARGV[11], ARGV[12], ARGV[13]

local known = redis.call('HMGET', meta, 'state_id', 'phase', 'run')
local lost = state_error(known[1], known[2], state_id)
if lost then return lost end
local refused = fence_error(known[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if refused then return refused end
local held = redis.call('HMGET', ledger, ':version', ':digest', ':mode', ':seed', ':base')
if held[5] then
  local given, names = {version, digest, mode, seed, base}, {'version', 'digest', 'mode', 'seed', 'consumption before this run'}
  for i = 1, 5 do
    if held[i] ~= given[i] then
      return redis.error_reply('LEDGER_CONFLICT another rank loads this data set with another ' .. names[i] .. ': ' .. held[i]
        .. ', here it is ' .. given[i])
    end
  end
  return 'same'
end

redis.call('HSET', ledger, ':version', version, ':digest', digest, ':mode', mode, ':seed', seed, ':shards', shards, ':base', base,
  ':fence', 0, ':most', 0, ':dry', 0)
redis.call('PEXPIRE', ledger, keep_ms)
if bits ~= '' then redis.call('SET', taken, bits, 'PX', keep_ms) end
redis.call('HSET', run_key, 'data', 1)
return 'set'
