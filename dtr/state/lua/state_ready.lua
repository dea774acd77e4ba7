-- A rebuild is complete: open the job's state to its members. Whoever completed one may say so: it is the same from the same store.
-- KEYS
--   1 meta       hash    the job's state
--   2 wake       stream  interrupts waits
--   3 events     stream  for people
-- ARGV
--   1 state_id   string  of the state that was rebuilt
--   2 counter    integer the highest number of a run that the store, the slots or the caller know
-- RETURNS phase
-- ERRORS STATE_LOST
-- WRITES meta wake events
-- IDEMPOTENT a state that is READY stays so
-- INCLUDE event
local meta, wake, events = KEYS[1], KEYS[2], KEYS[3]
local state_id, counter = ARGV[1], tonumber(ARGV[2])

local held = redis.call('HMGET', meta, 'state_id', 'phase', 'run_counter')
if held[1] ~= state_id then return redis.error_reply('STATE_LOST Redis lost the state while it was rebuilt') end
if held[2] == 'READY' then return 'READY' end
redis.call('HSET', meta, 'phase', 'READY', 'run_counter', math.max(counter, tonumber(held[3] or 0)))
redis.call('HDEL', meta, 'recover_by', 'recover_until')
redis.call('XADD', wake, 'MAXLEN', '~', 1000, '*', 'news', 'ready')
emit(events, 'state_ready', 'state_id', state_id)
return 'READY'
