-- Read one worker's shards in the placement of this run, or become the one member that computes it, or learn that another does.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run
--   3 pointer     hash    which placement of the data set is installed, and who computes the next
--   4 placement   hash    worker -> its shards, of this run's generation
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the run
--   3 worker      string  worker_id of the caller
--   4 rank        integer of the caller
--   5 incarnation string  of the caller
--   6 generation  integer of the run
--   7 version     integer of the data set
--   8 members     string  digest of the roster's worker ids
--   9 asked       string  the worker whose shards are asked for
--  10 lease_ms    integer how long the caller may compute before another may
-- RETURNS {'installed', shards} | {'compute', installed generation, its version, its parent} | {'wait', ms since the claim}
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED
-- WRITES pointer
-- IDEMPOTENT by the claimant: who holds the claim gets it again
-- INCLUDE now integer state fence
local meta, roster, pointer, placement = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local state_id, run, worker, rank, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local generation, version, members, asked, lease_ms = ARGV[6], ARGV[7], ARGV[8], ARGV[9], tonumber(ARGV[10])

local job = redis.call('HMGET', meta, 'state_id', 'phase', 'run')
local lost = state_error(job[1], job[2], state_id)
if lost then return lost end
local refused = fence_error(job[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if refused then return refused end

local held = redis.call('HMGET', pointer, 'generation', 'version', 'members', 'parent', 'computing', 'computing_for', 'computing_at')
if held[1] == generation and held[2] == version and held[3] == members then
  local shards = redis.call('HGET', placement, asked)
  if shards then return {'installed', shards} end
end
local me, target, now = worker .. ' ' .. incarnation, generation .. ' ' .. version .. ' ' .. members, now_ms()
if held[6] == target and held[5] ~= me and now < tonumber(held[7]) + lease_ms then
  return {'wait', now - tonumber(held[7])}
end
redis.call('HSET', pointer, 'computing', me, 'computing_for', target, 'computing_at', integer(now))
return {'compute', held[1] or '', held[2] or '', held[4] or ''}
