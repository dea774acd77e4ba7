-- An uploader registers a complete slot that Redis never heard of (its trainer died, its run ended, Redis forgot). Valid for whoever
-- was in the run's roster, alive or not, while the checkpoint takes parts and the lineage has not left it behind.
-- KEYS
--   1 meta        hash    the job's state
--   2 run_key     hash    the run
--   3 lineage     hash    run -> last step
--   4 ckpt        hash    the checkpoint
--   5 parts       hash    its parts
--   6 ckpts       zset    the index
--   7 open_ckpts  zset    those without a decision
--   8 events      stream  for people and handles
-- ARGV
--   1 run         string  of the slot
--   2 step        integer of the slot
--   3 rank        integer of the slot
--   4 worker      string  worker_id
--   5 incarnation string  of the member that staged it
--   6 host        string  host id
--   7 world_size  integer of the run
--   8 replicated  string  none | some STRUCTURE | all: of all, one part holds everything
--   9 writer      string  rank that writes a replicated state, else empty
--  10 store       string  URL without secrets
--  11 size_bytes  integer of the part
--  12 save        string  id of this save
--  13 metrics     string  JSON object of numbers that its trainer said of it, or empty
-- RETURNS {state, part_state, save}: the checkpoint's state; this rank's part and the save that counts
-- ERRORS STATE_LOST RECOVERING RUN_UNKNOWN PART_UNKNOWN CKPT_CONFLICT CKPT_ABORTED CKPT_ABANDONED CKPT_STATE
-- WRITES ckpt parts ckpts open_ckpts events
-- IDEMPOTENT by comparison: the same facts again change nothing
-- INCLUDE now integer state event lineage ckpt conflict part verdict
local meta, run_key, lineage, ckpt, parts = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local ckpts, open_ckpts, events = KEYS[6], KEYS[7], KEYS[8]
local run, step, rank, worker, incarnation, host = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local world_size, replicated, writer, store = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local size_bytes, save, metrics = ARGV[11], ARGV[12], ARGV[13]

local known = redis.call('HMGET', meta, 'state_id', 'phase', 'last_run')
local lost = state_error(known[1], known[2], known[1])
if lost then return lost end
local seat = redis.call('HMGET', run_key, 'member:' .. worker, 'base_state', 'world_size')
if not seat[3] then return redis.error_reply('RUN_UNKNOWN Redis does not know run ' .. run) end
if not seat[1] or string.match(seat[1], '^%d+ %S+') ~= rank .. ' ' .. incarnation then
  return redis.error_reply('PART_UNKNOWN ' .. worker .. ' was not rank ' .. rank .. ' of run ' .. run .. ' as ' .. incarnation)
end
local held = redis.call('HMGET', ckpt, 'world_size', 'replicated', 'writer', 'store', 'state', 'reason')
if held[5] then
  local conflict = ckpt_conflict(held, world_size, replicated, writer, store)
  if conflict then return conflict end
  local over = ckpt_verdict(held[5], held[6], run, step)
  if over then return over end
else
  if seat[2] ~= 'SET' then return redis.error_reply('CKPT_STATE run ' .. run .. ' has no base yet') end
  local bound = redis.call('HGET', lineage, run)
  if not on_lineage(bound, known[3], run, tonumber(step)) then
    return redis.error_reply('CKPT_ABANDONED run ' .. run .. ' step ' .. step .. ': ' .. left_behind(bound))
  end
  ckpt_create(ckpt, ckpts, open_ckpts, events, now_ms(), run, step, world_size, replicated, writer, store)
end
local placed = part_place(parts, held[5] or 'WRITING', rank, worker, incarnation, host, size_bytes, save, metrics, now_ms())
if placed.err then return placed end
return {held[5] or 'WRITING', placed[1], placed[2]}
