-- Tell Redis of a run whose record is in the store, if it does not know it. Used while the state is being rebuilt, and afterwards.
-- KEYS
--   1 meta        hash    the job's state
--   2 run_key     hash    the run
-- ARGV
--   1 state_id    string  of the state that is filled
--   2 world_size  integer of the run
--   3 base_run    string  the run that it continues; empty: none
--   4 base_step   string  the last step taken from it; empty: none
--   5 store       string  URL without secrets
--   6 base_at     integer ms, when its base was fixed
--   7 counter     integer the number in its name
--   8+ members    string  worker and `rank incarnation host`, alternating
-- RETURNS 1 if Redis learned something, else 0
-- ERRORS STATE_LOST
-- WRITES meta run_key
-- IDEMPOTENT a run whose base is SET does not change
local meta, run_key = KEYS[1], KEYS[2]
local state_id, world_size, base_run, base_step, store = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local base_at, counter = ARGV[6], tonumber(ARGV[7])

local known = redis.call('HMGET', meta, 'state_id', 'run_counter', 'base_at')
if known[1] ~= state_id then return redis.error_reply('STATE_LOST Redis lost the state while it was filled') end
if counter > tonumber(known[2] or 0) then redis.call('HSET', meta, 'run_counter', counter) end
if tonumber(base_at) > tonumber(known[3] or 0) then redis.call('HSET', meta, 'base_at', base_at) end
local base_state = redis.call('HGET', run_key, 'base_state')
if base_state == 'SET' then return 0 end
if not base_state then
  redis.call('HSET', run_key, 'world_size', world_size, 'generation', 0, 'previous', base_run, 'formed_at', base_at)
  for i = 8, #ARGV - 1, 2 do redis.call('HSET', run_key, 'member:' .. ARGV[i], ARGV[i + 1]) end
end
redis.call('HSET', run_key, 'base_state', 'SET', 'base_run', base_run, 'base_step', base_step, 'store', store, 'base_at', base_at)
return 1
