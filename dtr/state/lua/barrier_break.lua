-- Say why a member could not arrive: the round is final, the run has ended (then an open round is broken for all), another process
-- has taken the member's place, or Redis lost the state.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run, with its fence
--   3 run_key     hash    the round's run, also after it ended
--   4 round       hash    this round
--   5 arrived     set     who is there
--   6 round_wake  stream  its verdict
--   7 events      stream  for people
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the round's run
--   3 worker      string  worker_id
--   4 rank        integer of the member
--   5 incarnation string  of the member
--   6 subset      string  JSON array of the expected workers, sorted; empty for the whole roster
-- RETURNS {'RELEASED', wanted} | 0: the run is open after all, so arrive again
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED BARRIER_BROKEN BARRIER_TIMEOUT
-- WRITES round arrived round_wake events
-- IDEMPOTENT a final round only repeats its verdict
-- INCLUDE state fence event barrier_verdict barrier_end
local meta, roster, run_key, round = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local arrived, round_wake, events = KEYS[5], KEYS[6], KEYS[7]
local state_id, run, worker, rank, incarnation, subset = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]

local state = redis.call('HGET', round, 'state')
if state and state ~= 'OPEN' then return barrier_verdict(round) end
local job = redis.call('HMGET', meta, 'state_id', 'phase', 'run', 'ended_run', 'ended_worker', 'ended_rank', 'ended_reason')
local lost = state_error(job[1], job[2], state_id)
if lost then return lost end
local refused = fence_error(job[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if not refused then return 0 end
if not state or job[3] == run then return refused end
local reason = 'the run ended'
if job[4] == run then reason = 'rank ' .. job[6] .. ' (' .. job[5] .. ') departed: ' .. job[7] end
barrier_end('BROKEN', reason, run_key, round, arrived, round_wake, events, subset)
return barrier_verdict(round)
