-- One member arrives at a round, or looks at it again while it waits. The last arrival releases the round for all.
-- This is the hot path: what is rare (the run has ended, somebody must break the round) is barrier_break's.
-- KEYS
--   1 roster      hash    of the current run, with its fence
--   2 round       hash    this round
--   3 arrived     set     who is there
--   4 round_wake  stream  its verdict
-- ARGV
--   1 fence       string  state id and run
--   2 worker      string  worker_id
--   3 place       string  rank and incarnation
--   4 name        string  of the barrier
--   5 seq         integer of the round
--   6 subset      string  JSON array of the expected workers, sorted; empty for the whole roster
-- RETURNS 0 while it is open | {'RELEASED', wanted}: wanted is form when a newcomer waits for the next run
-- ERRORS ROSTER_CHANGED BARRIER_BROKEN BARRIER_TIMEOUT BARRIER_MEMBERS
-- WRITES roster round arrived round_wake
-- IDEMPOTENT members are counted as a set, and a final round only repeats its verdict
-- INCLUDE now integer barrier_verdict
local roster, round, arrived, round_wake = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local fence, worker, place, name, seq, subset = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]

local function members_error(mine, theirs)
  return redis.error_reply('BARRIER_MEMBERS barrier ' .. name .. ' is for ' .. (theirs == '' and 'the whole roster' or theirs)
    .. ' in this run, and this member expects ' .. (mine == '' and 'the whole roster' or mine) .. ': give each set a name of its own')
end

local held = redis.call('HMGET', round, 'state', 'expected', 'members')
local state, expected = held[1], tonumber(held[2])
if state and held[3] ~= subset then return members_error(subset, held[3]) end
if state and state ~= 'OPEN' then return barrier_verdict(round) end
local run = redis.call('HMGET', roster, ':fence', ':world', ':wanted', worker)
if run[1] ~= fence or run[4] ~= place then return redis.error_reply('ROSTER_CHANGED this member is not in an open run') end
-- A final round expires; a member that slept through its release must pass, not open it anew.
if not state then
  local last = redis.call('HGET', roster, ':released/' .. name)
  if last then
    local released, asked, whom = string.match(last, '^(%d+) (%a*) (.*)$')
    if whom ~= subset then return members_error(subset, whom) end
    if tonumber(released) == seq then return {'RELEASED', asked} end
    if tonumber(released) > seq then return {'RELEASED', ''} end
  end
end

local size, max = string.match(run[2], '^(%d+) (%d+)$')
local newly = redis.call('SADD', arrived, worker)
local count = redis.call('SCARD', arrived)
-- For people the hash shows the count too: written when a waiter looks again, at least once a second, and at the end.
if newly == 0 then redis.call('HSET', round, 'arrived', count) end
if not state then
  expected = subset == '' and tonumber(size) or #cjson.decode(subset)
  redis.call('HSET', round, 'state', 'OPEN', 'expected', expected, 'arrived', count, 'members', subset, 'opened_at', integer(now_ms()))
  redis.call('EXPIRE', round, 86400)
  redis.call('EXPIRE', arrived, 86400)
end
if count < expected then return 0 end

local wanted = ''
if subset == '' and tonumber(size) < tonumber(max) and run[3] then wanted = 'form' end
redis.call('HSET', round, 'state', 'RELEASED', 'arrived', count, 'wanted', wanted)
redis.call('HSET', roster, ':released/' .. name, seq .. ' ' .. wanted .. ' ' .. subset)
redis.call('XADD', round_wake, '*', 'state', 'RELEASED', 'wanted', wanted)
redis.call('EXPIRE', round, 60)
redis.call('EXPIRE', arrived, 60)
redis.call('EXPIRE', round_wake, 60)
return {'RELEASED', wanted}
