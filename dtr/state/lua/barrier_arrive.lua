-- One member arrives at a round, or looks at it again while it waits. The last arrival releases the round for all; an expected member
-- that departed breaks it for all.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run
--   3 run_key     hash    the round's run, also after it ended
--   4 forming     hash    newcomers that wait for the next run
--   5 round       hash    this round
--   6 arrived     set     who is there
--   7 round_wake  stream  its verdict
--   8 events      stream  for people
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the run
--   3 worker      string  worker_id
--   4 rank        integer of the member
--   5 incarnation string  of the member
--   6 name        string  of the barrier
--   7 seq         integer of the round
--   8 subset      string  JSON array of the expected workers, sorted; empty for the whole roster
-- RETURNS {state, arrived, expected, wanted}: state is RELEASED or OPEN
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED BARRIER_BROKEN BARRIER_TIMEOUT BARRIER_MEMBERS
-- WRITES run_key round arrived round_wake events
-- IDEMPOTENT members are counted as a set, and a final round only repeats its verdict
-- INCLUDE now integer state fence event barrier
local meta, roster, run_key, forming = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local round, arrived, round_wake, events = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local state_id, run, worker, rank, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local name, seq, subset = ARGV[6], tonumber(ARGV[7]), ARGV[8]

local held = redis.call('HMGET', round, 'state', 'expected', 'members', 'missing', 'reason', 'wanted', 'arrived')
if held[1] == 'RELEASED' then return {'RELEASED', held[7], held[2], held[6]} end
if held[1] == 'BROKEN' or held[1] == 'TIMEDOUT' then return barrier_verdict(held[1], held[5], held[4]) end

local job = redis.call('HMGET', meta, 'state_id', 'phase', 'run', 'world_size', 'world_max')
local lost = state_error(job[1], job[2], state_id)
if lost then return lost end
local refused = fence_error(job[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if refused then
  if held[1] ~= 'OPEN' or job[3] == run then return refused end
  local why = redis.call('HMGET', meta, 'ended_run', 'ended_worker', 'ended_rank', 'ended_reason')
  local reason = 'the run ended'
  if why[1] == run then reason = 'rank ' .. why[3] .. ' (' .. why[2] .. ') departed: ' .. why[4] end
  return barrier_end('BROKEN', reason, run_key, round, arrived, round_wake, events, subset)
end
if held[1] and held[3] ~= subset then
  return redis.error_reply('BARRIER_MEMBERS this member expects ' .. (subset == '' and 'the whole roster' or subset)
    .. ', the first arrival expects ' .. (held[3] == '' and 'the whole roster' or held[3]))
end

local expected = tonumber(held[2])
local count
if not held[1] then
  -- A final round expires; a member that slept through its release must pass, not open it anew.
  if tonumber(redis.call('HGET', run_key, 'released:' .. name) or -1) >= seq then return {'RELEASED', '', '', ''} end
  expected = tonumber(job[4])
  if subset ~= '' then expected = #cjson.decode(subset) end
  redis.call('SADD', arrived, worker)
  count = 1
  redis.call('HSET', round, 'state', 'OPEN', 'expected', expected, 'arrived', count, 'members', subset, 'opened_at', integer(now_ms()))
  redis.call('EXPIRE', round, 86400)
  redis.call('EXPIRE', arrived, 86400)
else
  redis.call('SADD', arrived, worker)
  count = redis.call('SCARD', arrived)
  redis.call('HSET', round, 'arrived', count)
end
if count < expected then return {'OPEN', count, expected, ''} end

local wanted = ''
if subset == '' and expected < tonumber(job[5]) and redis.call('HLEN', forming) > 0 then wanted = 'form' end
redis.call('HSET', round, 'state', 'RELEASED', 'wanted', wanted)
redis.call('HSET', run_key, 'released:' .. name, seq)
redis.call('XADD', round_wake, '*', 'state', 'RELEASED', 'wanted', wanted)
redis.call('EXPIRE', round, 60)
redis.call('EXPIRE', arrived, 60)
redis.call('EXPIRE', round_wake, 60)
return {'RELEASED', count, expected, wanted}
