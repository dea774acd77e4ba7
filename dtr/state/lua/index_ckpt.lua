-- Tell Redis of a checkpoint whose decision record is in the store, if it has not decided it. Call it after index_lineage.
-- KEYS
--   1 meta        hash    the job's state
--   2 lineage     hash    run -> last step
--   3 ckpt        hash    the checkpoint
--   4 parts       hash    its parts
--   5 ckpts       zset    the index
--   6 open_ckpts  zset    those without a decision
--   7 events      stream  for people and handles
-- ARGV
--   1 state_id    string  of the state that is filled
--   2 run         string  of the checkpoint
--   3 step        integer of the checkpoint
--   4 decision    string  commit or abort
--   5 reason      string  of an abort
--   6 world_size  integer of the run
--   7 replicated  string  none | some | all: of all, one part holds everything
--   8 store       string  URL without secrets
--   9 created_at  integer ms
--  10 size_bytes  integer of all parts
--  11 metrics     string  JSON object of numbers, or empty
--  12 pinned      string  why retention must keep it: the note of its pin, `-` for none; empty: it is not pinned
--  13 retired     string  1: retention has chosen it, though its manifest still stands; else empty
--  14+ facts      string  fields and values of parts
-- RETURNS the state of the checkpoint after the call
-- ERRORS STATE_LOST
-- WRITES meta ckpt parts ckpts open_ckpts events
-- IDEMPOTENT a decided checkpoint does not change
-- INCLUDE integer now lineage event
local meta, lineage, ckpt, parts = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ckpts, open_ckpts, events = KEYS[5], KEYS[6], KEYS[7]
local state_id, run, step, decision, reason, world_size = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local replicated, store, created_at, size_bytes = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local metrics, pinned, retired = ARGV[11], ARGV[12], ARGV[13]

local known = redis.call('HMGET', meta, 'state_id', 'last_run', 'latest', 'phase')
if known[1] ~= state_id then return redis.error_reply('STATE_LOST Redis lost the state while it was filled') end
local state = redis.call('HGET', ckpt, 'state')
if state == 'COMMITTED' or state == 'ABANDONED' or state == 'ABORTED' then return state end
local verdict = 'ABORTED'
if decision == 'commit' then
  local bound = redis.call('HGET', lineage, run)
  verdict = 'COMMITTED'
  if not on_lineage(bound, known[2], run, tonumber(step)) then verdict, reason = 'ABANDONED', left_behind(bound) end
end
local expected = replicated == 'all' and 1 or world_size
local done = decision == 'commit' and expected or 0
redis.call('HSET', ckpt, 'state', verdict, 'reason', reason, 'world_size', world_size, 'expected', expected, 'done', done,
  'replicated', replicated, 'writer', replicated == 'all' and '0' or '', 'store', store, 'created_at', created_at, 'size_bytes', size_bytes,
  'decided_at', integer(now_ms()), 'metrics', metrics)
if pinned ~= '' then redis.call('HSET', ckpt, 'pinned', pinned) end
if retired ~= '' then redis.call('HSET', ckpt, 'retired_at', created_at) end
for i = 14, #ARGV - 1, 2 do redis.call('HSET', parts, ARGV[i], ARGV[i + 1]) end
redis.call('ZADD', ckpts, step, run .. '/' .. step)
redis.call('ZREM', open_ckpts, run .. '/' .. step)
if verdict == 'COMMITTED' then
  local latest_run, latest_step = string.match(known[3] or '', '^(.+)/(%d+)$')
  local bound = latest_run and redis.call('HGET', lineage, latest_run)
  if not latest_run or not on_lineage(bound, known[2], latest_run, tonumber(latest_step)) or tonumber(latest_step) < tonumber(step)
    or (tonumber(latest_step) == tonumber(step) and (redis.call('HGET', lineage, run) or '') == '') then
    redis.call('HSET', meta, 'latest', run .. '/' .. step)
  end
end
if state or known[4] == 'READY' then
  emit(events, 'ckpt_' .. string.lower(verdict), 'run', run, 'step', step, 'size_bytes', size_bytes, 'reason', reason)
end
return verdict
