-- An uploader counts a save of one rank: how much of it the store had already, and what follows for the next ones.
-- KEYS
--   1 delta       hash    how delta pays, by rank
--   2 events      stream  for people
-- ARGV
--   1 rank        integer of the part
--   2 last        string  RUN/STEP of the save
--   3 event       string  off: delta rests from now on; on: it pays again; else empty
--   4 reason      string  for people, with an event
--   5 state_bytes integer of the part
--   6 sent_bytes  integer that had to be stored
--   7 poor        integer saves in a row that did not pay
--   8 rest        integer saves that are to be stored whole
--   9 next_rest   integer how many, should it not pay again
-- RETURNS 1 if the save was counted, 0 if it was before
-- ERRORS none
-- WRITES delta events
-- IDEMPOTENT by the save's name: one that was counted last is not counted again
-- INCLUDE event
local delta, events = KEYS[1], KEYS[2]
local rank, last, event, reason = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local state_bytes, sent_bytes, poor, rest, next_rest = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]

if redis.call('HGET', delta, rank .. '/last') == last then return 0 end
redis.call('HSET', delta, rank .. '/last', last, rank .. '/state_bytes', state_bytes, rank .. '/sent_bytes', sent_bytes,
  rank .. '/poor', poor, rank .. '/rest', rest, rank .. '/next_rest', next_rest)
if event ~= '' then emit(events, 'delta_' .. event, 'rank', rank, 'save', last, 'reason', reason) end
return 1
