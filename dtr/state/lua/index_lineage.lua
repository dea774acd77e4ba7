-- Fill in the lineage that the store's records tell, if it is still what the caller saw; and latest likewise.
-- KEYS
--   1 meta        hash    the job's state
--   2 lineage     hash    run -> last step
--   3 events      stream  for people
-- ARGV
--   1 state_id    string  of the state that is filled
--   2 seen_head   string  the run that goes on, as the caller saw it; empty: there was no lineage
--   3 head        string  the run that goes on, as the store's records tell
--   4 latest      string  RUN/STEP of its newest commit; empty: none
--   5+ ancestors  string  run and last step taken from it, inclusive, alternating
-- RETURNS 1 if the lineage is now the store's, 0 if it changed meanwhile
-- ERRORS STATE_LOST
-- WRITES meta lineage events
-- IDEMPOTENT by comparison with what was seen
-- INCLUDE event
local meta, lineage, events = KEYS[1], KEYS[2], KEYS[3]
local state_id, seen_head, head, latest = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

if redis.call('HGET', meta, 'state_id') ~= state_id then
  return redis.error_reply('STATE_LOST Redis lost the state while it was filled')
end
local now_head = ''
local fields = redis.call('HGETALL', lineage)
for i = 1, #fields, 2 do
  if fields[i + 1] == '' then now_head = fields[i] end
end
if now_head == head then return 1 end
if now_head ~= seen_head then return 0 end
redis.call('DEL', lineage)
redis.call('HSET', lineage, head, '')
for i = 5, #ARGV - 1, 2 do redis.call('HSET', lineage, ARGV[i], ARGV[i + 1]) end
redis.call('HSET', meta, 'latest', latest)
emit(events, 'lineage_rebuilt', 'head', head, 'latest', latest)
return 1
