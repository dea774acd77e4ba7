-- A trainer says that its rank skipped or failed this save: the checkpoint is aborted at once, and begun first if nobody has, so that
-- the others learn it when they come.
-- KEYS
--   1 meta        hash    the job's state
--   2 run_key     hash    the run
--   3 ckpt        hash    the checkpoint
--   4 ckpts       zset    the index
--   5 open_ckpts  zset    those without a decision
--   6 events      stream  for people and handles
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  of the checkpoint
--   3 step        integer of the checkpoint
--   4 rank        integer of the caller
--   5 worker      string  worker_id
--   6 incarnation string  of the member
--   7 world_size  integer of the run
--   8 replicated  string  none | some STRUCTURE | all: of all, one part holds everything
--   9 writer      string  rank that writes a replicated state, else empty
--  10 store       string  URL without secrets
--  11 reason      string  for people
-- RETURNS the state of the checkpoint after the call: too late once it is SEALED
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION
-- WRITES ckpt ckpts open_ckpts events
-- IDEMPOTENT only a checkpoint that is WRITING changes
-- INCLUDE now integer state event ckpt abort
local meta, run_key, ckpt, ckpts, open_ckpts, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local state_id, run, step, rank, worker, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local world_size, replicated, writer, store, reason = ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11]

local known = redis.call('HMGET', meta, 'state_id', 'phase')
local lost = state_error(known[1], known[2], state_id)
if lost then return lost end
local seat = redis.call('HGET', run_key, 'member:' .. worker)
if not seat or string.match(seat, '^%d+ %S+') ~= rank .. ' ' .. incarnation then
  return redis.error_reply('STALE_INCARNATION ' .. worker .. ' was not rank ' .. rank .. ' of run ' .. run .. ' as ' .. incarnation)
end
local state = redis.call('HGET', ckpt, 'state')
if not state then
  ckpt_create(ckpt, ckpts, open_ckpts, events, now_ms(), run, step, world_size, replicated, writer, store)
elseif state ~= 'WRITING' then
  return state
end
ckpt_abort(ckpt, events, run, step, rank, reason)
return 'ABORTING'
