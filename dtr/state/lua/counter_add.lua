-- Add to one counter of the job. Adding is not idempotent by nature, so the write is numbered.
-- KEYS
--   1 meta        hash    the job's state
--   2 fences      hash    worker -> incarnation, and the numbers of its channels
--   3 counters    hash    counter -> value
-- ARGV
--   1 state_id    string  that the member joined
--   2 worker      string  worker_id
--   3 incarnation string  of the member
--   4 counter     string  name
--   5 amount      integer to add
--   6 number      integer of this write in channel trainer
-- RETURNS the new value
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION INVALID
-- WRITES fences counters
-- IDEMPOTENT by the number: a repeated write answers what the first did
-- INCLUDE state channel
local meta, fences, counters = KEYS[1], KEYS[2], KEYS[3]
local state_id, worker, incarnation, counter = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local amount, number = tonumber(ARGV[5]), tonumber(ARGV[6])

local held = redis.call('HMGET', meta, 'state_id', 'phase')
local lost = state_error(held[1], held[2], state_id)
if lost then return lost end
if redis.call('HGET', fences, worker) ~= incarnation then
  return redis.error_reply('STALE_INCARNATION ' .. worker .. ' is no longer registered as ' .. incarnation)
end
local known, answer = channel_state(fences, worker, 'trainer', number)
if known == 'repeat' then return tonumber(answer) end
if known ~= 'new' then return known end

local value = redis.call('HINCRBY', counters, counter, amount)
channel_record(fences, worker, 'trainer', number, value)
return value
