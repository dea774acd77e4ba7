-- A trainer begins or joins a checkpoint, and says that its part is complete in a slot. The first caller creates the checkpoint with
-- the roster as its expected parts; of replicated state one rank, the writer, is expected.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run: worker -> rank incarnation
--   3 run_key     hash    the run
--   4 ckpt        hash    the checkpoint
--   5 parts       hash    its parts
--   6 ckpts       zset    the index
--   7 open_ckpts  zset    those without a decision
--   8 events      stream  for people and handles
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the member's run
--   3 step        integer of the trainer
--   4 rank        integer of the caller
--   5 worker      string  worker_id
--   6 incarnation string  of the member
--   7 host        string  host id
--   8 world_size  integer of the run
--   9 replicated  string  none | some STRUCTURE | all: of all, one part holds everything
--  10 writer      string  rank that writes a replicated state, else empty
--  11 store       string  URL without secrets
--  12 size_bytes  integer of the part
--  13 save        string  id of this save; empty: the caller has no part
--  14 metrics     string  JSON object of numbers that the caller said of it, or empty
-- RETURNS {state, part_state, save}: the checkpoint's state; the caller's part and the save that it counts, or two empty strings
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED CKPT_CONFLICT CKPT_ABORTED CKPT_ABANDONED CKPT_STATE
-- WRITES ckpt parts ckpts open_ckpts events
-- IDEMPOTENT by comparison: the same facts again change nothing
-- INCLUDE now integer state fence event ckpt conflict part verdict
local meta, roster, run_key, ckpt, parts = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local ckpts, open_ckpts, events = KEYS[6], KEYS[7], KEYS[8]
local state_id, run, step, rank, worker, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local host, world_size, replicated, writer, store = ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11]
local size_bytes, save, metrics = ARGV[12], ARGV[13], ARGV[14]

local known = redis.call('HMGET', meta, 'state_id', 'phase', 'run')
local lost = state_error(known[1], known[2], state_id)
if lost then return lost end
local fenced = fence_error(known[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if fenced then return fenced end
if redis.call('HGET', run_key, 'base_state') ~= 'SET' then
  return redis.error_reply('CKPT_STATE run ' .. run .. ' has no base yet: what it continues must be recorded before its first part')
end
local held = redis.call('HMGET', ckpt, 'world_size', 'replicated', 'writer', 'store', 'state', 'reason')
if held[5] then
  local conflict = ckpt_conflict(held, world_size, replicated, writer, store)
  if conflict then return conflict end
  local over = ckpt_verdict(held[5], held[6], run, step)
  if over then return over end
else
  ckpt_create(ckpt, ckpts, open_ckpts, events, now_ms(), run, step, world_size, replicated, writer, store)
end
if save == '' then return {held[5] or 'WRITING', '', ''} end
local placed = part_place(parts, held[5] or 'WRITING', rank, worker, incarnation, host, size_bytes, save, metrics, now_ms())
if placed.err then return placed end
return {held[5] or 'WRITING', placed[1], placed[2]}
