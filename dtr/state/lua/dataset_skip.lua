-- Samples of a data set are left out from now on, because a person says so. Loaders look here; each save puts it into the manifest.
-- KEYS
--   1 skips       hash    FILE:START-STOP -> why, since when, and the file as it was, JSON
--   2 events      stream  for people
-- ARGV
--   1 name        string  of the data set
--   2 target      string  FILE:START-STOP
--   3 record      string  what the hash holds of it
--   4 reason      string  of it, one line
-- RETURNS 'new', or 'same' if it was there
-- ERRORS none
-- WRITES skips events
-- IDEMPOTENT by comparison: what is there stays as it is
-- INCLUDE event
local skips, events = KEYS[1], KEYS[2]
local name, target, record, reason = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

if redis.call('HSETNX', skips, target, record) == 0 then return 'same' end
emit(events, 'samples_skipped', 'dataset', name, 'samples', target, 'reason', reason)
return 'new'
