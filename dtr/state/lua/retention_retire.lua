-- Retire a checkpoint, before its manifest is replaced: never the newest one, never a pinned one, never what the newest run continues
-- or is about to. Asked again right before the manifest is replaced, since the caller may have slept for an hour in between.
-- KEYS
--   1 meta        hash    the job's state
--   2 run_key     hash    the newest run
--   3 restore     hash    its collective restore
--   4 ckpt        hash    the checkpoint
--   5 events      stream  for people
-- ARGV
--   1 state_id    string  of the state in which the caller decided; a Redis that was emptied since has another
--   2 last_run    string  the newest run, as the caller saw it
--   3 run         string  of the checkpoint
--   4 step        integer of the checkpoint
--   5 reason      string  why, for people
-- RETURNS {'RETIRED'}; or {'KEPT', why}: it must stay, or things have changed
-- ERRORS none
-- WRITES ckpt events
-- IDEMPOTENT what is retired stays so
-- INCLUDE now integer event
local meta, run_key, restore, ckpt, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local state_id, last_run, run, step, reason = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local name = run .. '/' .. step

local known = redis.call('HMGET', meta, 'state_id', 'phase', 'last_run', 'latest')
if known[1] ~= state_id or known[2] ~= 'READY' then return {'KEPT', 'Redis lost its state meanwhile, or is being filled'} end
local held = redis.call('HMGET', ckpt, 'state', 'retired_at', 'pinned')
if held[2] then return {'RETIRED'} end
if held[1] ~= 'COMMITTED' and held[1] ~= 'ABANDONED' then return {'KEPT', 'it is no commit that Redis knows'} end
if held[3] then return {'KEPT', 'it is pinned'} end
if known[4] == name then return {'KEPT', 'it is the newest commit'} end
if known[3] ~= last_run then return {'KEPT', 'run ' .. (known[3] or '?') .. ' has formed meanwhile'} end
local base = redis.call('HMGET', run_key, 'base_state', 'base_run', 'base_step')
if base[1] ~= 'SET' then return {'KEPT', 'run ' .. last_run .. ' has not yet fixed what it continues'} end
if base[2] .. '/' .. base[3] == name then return {'KEPT', 'run ' .. last_run .. ' continues it'} end
if redis.call('HGET', restore, 'choice') == name then return {'KEPT', 'run ' .. last_run .. ' restores it'} end
redis.call('HSET', ckpt, 'retired_at', integer(now_ms()))
emit(events, 'ckpt_retired', 'run', run, 'step', step, 'reason', reason)
return {'RETIRED'}
