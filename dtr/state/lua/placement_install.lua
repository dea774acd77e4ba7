-- Install the placement of this run's generation, if the one it was computed from is still the installed one. It and its parent are
-- kept; the one before goes.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run
--   3 pointer     hash    which placement of the data set is installed, and who computes the next
--   4 placement   hash    worker -> its shards, of this run's generation, and the weights that they follow from
--   5 oldest      hash    the installed placement's parent
--   6 events      stream  for people
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the run
--   3 worker      string  worker_id of the caller
--   4 rank        integer of the caller
--   5 incarnation string  of the caller
--   6 name        string  of the data set
--   7 parent      integer generation of the installed placement as the caller knows it, empty for none
--   8 grandparent integer generation of oldest, empty for none
--   9 generation  integer of the run
--  10 version     integer of the data set
--  11 members     string  digest of the roster's worker ids
--  12 moved       integer shards that change hands, for people
--  13+ shards     string  worker and its shards, alternating; then :weight/WORKER and its weight
-- RETURNS 'installed' | 'changed': another placement came between
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED
-- WRITES pointer placement oldest events
-- IDEMPOTENT by (generation, version, members): what is installed already stays as it is
-- INCLUDE state fence event
local meta, roster, pointer, placement, oldest, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local state_id, run, worker, rank, incarnation, name = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local parent, grandparent, generation = ARGV[7], ARGV[8], ARGV[9]
local version, members, moved = ARGV[10], ARGV[11], ARGV[12]

local job = redis.call('HMGET', meta, 'state_id', 'phase', 'run')
local lost = state_error(job[1], job[2], state_id)
if lost then return lost end
local refused = fence_error(job[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if refused then return refused end

local held = redis.call('HMGET', pointer, 'generation', 'version', 'members', 'parent')
local whole = redis.call('HLEN', placement) == (#ARGV - 12) / 2
if held[1] == generation and held[2] == version and held[3] == members and whole then return 'installed' end
if (held[1] or '') ~= parent or (held[4] or '') ~= grandparent then return 'changed' end

if parent ~= generation then
  if grandparent ~= '' and grandparent ~= generation then redis.call('DEL', oldest) end
  redis.call('HSET', pointer, 'parent', parent)
end
redis.call('DEL', placement)
for i = 13, #ARGV, 1000 do
  redis.call('HSET', placement, unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
redis.call('HSET', pointer, 'generation', generation, 'version', version, 'members', members)
redis.call('HDEL', pointer, 'computing', 'computing_for', 'computing_at')
emit(events, 'placed', 'dataset', name, 'generation', generation, 'version', version, 'moved', moved)
return 'installed'
