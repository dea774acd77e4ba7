-- One rank says whether it has read and verified its part of the chosen checkpoint. The first no drops the choice, with its reason, and
-- the next is chosen; when all said yes the ranks have agreed. Asking again with the same vote is how a rank waits.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run
--   3 run_key     hash    the run
--   4 restore     hash    the run's collective restore
--   5 wake        stream  interrupts waits
--   6 restores    hash    how often each checkpoint was tried, and found damaged
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the run
--   3 worker      string  worker_id
--   4 rank        integer of the member
--   5 incarnation string  of the member
--   6 attempt     integer of this restore in the run
--   7 choice      string  RUN/STEP that the vote is about
--   8 no          string  why it cannot be restored; empty: it was read and verified
--   9 damaged     integer 1: because its bytes are not what was committed
-- RETURNS {state, choice, base_state, reasons}, as restore_offer does
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED CKPT_STATE
-- WRITES restore wake restores
-- IDEMPOTENT by the rank and the choice; a vote about an earlier choice changes nothing, nor does any when the run has ended
-- INCLUDE state fence restore
local meta, roster, run_key, restore, wake, restores = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local state_id, run, worker, rank, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local attempt, choice, no, damaged = tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[9]

local known = redis.call('HMGET', meta, 'state_id', 'phase', 'run')
local lost = state_error(known[1], known[2], state_id)
if lost then return lost end
local refused = fence_error(known[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if refused then return restore_ended(restore, run_key, worker, rank, incarnation, attempt) or refused end
local held = redis.call('HMGET', restore, 'attempt', 'state', 'choice', 'vote:' .. rank)
if not held[1] then return redis.error_reply('CKPT_STATE run ' .. run .. ' has no restore under way: Redis lost it') end
if tonumber(held[1]) ~= attempt or held[2] ~= 'VOTING' or held[3] ~= choice then return restore_answer(restore, run_key, attempt) end

if no ~= '' then
  restore_drop(restore, choice, 'rank ' .. rank .. ' (' .. worker .. '): ' .. no)
  redis.call('HSET', restores, choice .. '/reason', no)
  if damaged == '1' then redis.call('HINCRBY', restores, choice .. '/damaged', 1) end
  restore_settle(restore, restores, wake, attempt, run)
elseif held[4] ~= choice then
  redis.call('HSET', restore, 'vote:' .. rank, choice)
  if redis.call('HINCRBY', restore, 'votes', 1) == tonumber(redis.call('HGET', run_key, 'world_size')) then
    redis.call('HSET', restore, 'state', 'AGREED')
    redis.call('HDEL', restores, choice .. '/begun', choice .. '/damaged', choice .. '/reason')
    redis.call('XADD', wake, 'MAXLEN', '~', 1000, '*', 'news', 'restore', 'run', run)
  end
end
return restore_answer(restore, run_key, attempt)
