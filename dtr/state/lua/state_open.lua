-- Find the job's state, or create it as RECOVERING: the creator rebuilds the index from the store and then opens it.
-- The caller that rebuilds renews its lease by calling again; one that died is succeeded by the next caller after its lease.
-- KEYS
--   1 meta       hash    the job's state
--   2 events     stream  for people
-- ARGV
--   1 proposed   string  state id to use if there is none
--   2 who        string  token of this caller
--   3 lease_ms   integer how long a rebuild is left to its caller without a word from it; 0: give it up
-- RETURNS {state_id, phase, recover_by, run_counter}; the caller rebuilds iff phase is RECOVERING and recover_by is its token
-- ERRORS STATE_CORRUPT
-- WRITES meta events
-- IDEMPOTENT by the token: the same caller finds itself as the one that recovers
-- INCLUDE now integer event
local meta, events = KEYS[1], KEYS[2]
local proposed, who, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])

local held = redis.call('HMGET', meta, 'state_id', 'phase', 'recover_by', 'recover_until', 'run_counter')
local state_id, phase, recover_by, recover_until = held[1], held[2], held[3], held[4]
local now = now_ms()

if not state_id then
  if redis.call('EXISTS', meta) == 1 then return redis.error_reply('STATE_CORRUPT key meta of this job has no state_id') end
  redis.call('HSET', meta, 'schema', '1', 'state_id', proposed, 'phase', 'RECOVERING', 'recover_by', who,
    'recover_until', integer(now + lease_ms), 'revision', 0, 'generation', 0, 'run', '', 'run_counter', 0,
    'beat_at', integer(now), 'grace_until', 0)
  emit(events, 'state_created', 'state_id', proposed)
  return {proposed, 'RECOVERING', who, '0'}
end
if phase ~= 'READY' and (recover_by == who or tonumber(recover_until) < now) then
  redis.call('HSET', meta, 'recover_by', who, 'recover_until', integer(now + lease_ms))
  recover_by = who
end
return {state_id, phase, recover_by or '', held[5] or '0'}
