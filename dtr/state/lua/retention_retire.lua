-- Retire a checkpoint, before its manifest is replaced: never the newest one, never what the newest run continues or is about to.
-- KEYS
--   1 meta        hash    the job's state
--   2 run_key     hash    the newest run
--   3 restore     hash    its collective restore
--   4 ckpt        hash    the checkpoint
-- ARGV
--   1 last_run    string  the newest run, as the caller saw it
--   2 name        string  RUN/STEP of the checkpoint
-- RETURNS 1 if it is retired, 0 if it must stay or things have changed
-- ERRORS none
-- WRITES ckpt
-- IDEMPOTENT what is retired stays so
-- INCLUDE now integer
local meta, run_key, restore, ckpt = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local last_run, name = ARGV[1], ARGV[2]

local held = redis.call('HMGET', ckpt, 'state', 'retired_at')
if held[2] then return 1 end
if held[1] ~= 'COMMITTED' and held[1] ~= 'ABANDONED' then return 0 end
local known = redis.call('HMGET', meta, 'phase', 'last_run', 'latest')
if known[1] ~= 'READY' or known[2] ~= last_run or known[3] == name then return 0 end
local base = redis.call('HMGET', run_key, 'base_state', 'base_run', 'base_step')
if base[1] ~= 'SET' or base[2] .. '/' .. base[3] == name then return 0 end
if redis.call('HGET', restore, 'choice') == name then return 0 end
redis.call('HSET', ckpt, 'retired_at', integer(now_ms()))
return 1
