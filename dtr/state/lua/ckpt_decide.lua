-- Record what the store's decision record says, after it was read back: the store is the truth, this is its index. A commit on the
-- job's lineage is COMMITTED and moves latest, never back; one that the job has left behind is ABANDONED.
-- KEYS
--   1 meta        hash    the job's state
--   2 lineage     hash    run -> last step
--   3 ckpt        hash    the checkpoint
--   4 open_ckpts  zset    those without a decision
--   5 events      stream  for people and handles
--   6 failed_saves stream for status
-- ARGV
--   1 run         string  of the checkpoint
--   2 step        integer of the checkpoint
--   3 decision    string  commit or abort
--   4 reason      string  of an abort
--   5 size_bytes  integer of all parts
--   6 metrics     string  JSON object of numbers, or empty
-- RETURNS the state of the checkpoint after the call; UNKNOWN if Redis has none: it was forgotten, or retired while the caller slept
-- ERRORS STATE_LOST RECOVERING CKPT_STATE
-- WRITES meta ckpt open_ckpts events failed_saves
-- IDEMPOTENT a decided checkpoint does not change
-- INCLUDE now integer state event lineage failed
local meta, lineage, ckpt, open_ckpts, events, failed_saves = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local run, step, decision, reason, size_bytes, metrics = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]

local known = redis.call('HMGET', meta, 'state_id', 'phase', 'last_run', 'latest')
local lost = state_error(known[1], known[2], known[1])
if lost then return lost end
local state = redis.call('HGET', ckpt, 'state')
if not state then return 'UNKNOWN' end
if state == 'COMMITTED' or state == 'ABANDONED' or state == 'ABORTED' then
  if (state == 'ABORTED') ~= (decision == 'abort') then
    return redis.error_reply('CKPT_STATE run ' .. run .. ' step ' .. step .. ' is ' .. state .. ', its record in the store says ' .. decision)
  end
  redis.call('ZREM', open_ckpts, run .. '/' .. step)
  return state
end

local verdict = 'ABORTED'
if decision == 'commit' then
  local bound = redis.call('HGET', lineage, run)
  verdict = 'COMMITTED'
  if not on_lineage(bound, known[3], run, tonumber(step)) then verdict, reason = 'ABANDONED', left_behind(bound) end
end
redis.call('HSET', ckpt, 'state', verdict, 'reason', reason, 'decided_at', integer(now_ms()), 'size_bytes', size_bytes,
  'metrics', metrics)
redis.call('ZREM', open_ckpts, run .. '/' .. step)
if verdict == 'COMMITTED' then
  local latest_run, latest_step = string.match(known[4] or '', '^(.+)/(%d+)$')
  local behind = not latest_run or not on_lineage(redis.call('HGET', lineage, latest_run), known[3], latest_run, tonumber(latest_step))
    or tonumber(latest_step) < tonumber(step)
    or (tonumber(latest_step) == tonumber(step) and (redis.call('HGET', lineage, run) or '') == '')
  if behind then redis.call('HSET', meta, 'latest', run .. '/' .. step) end
end
if verdict ~= 'COMMITTED' then failed_save(failed_saves, 'run', run, 'step', step, 'state', verdict, 'reason', reason) end
emit(events, 'ckpt_' .. string.lower(verdict), 'run', run, 'step', step, 'size_bytes', size_bytes, 'reason', reason)
return verdict
