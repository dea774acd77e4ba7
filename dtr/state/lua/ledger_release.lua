-- A person lets shards out of quarantine: they are leased again from the next epoch or run on, whichever comes first.
-- KEYS
--   1 quarantine  hash    shard -> why it cannot be read
--   2 events      stream  for people
-- ARGV
--   1 name        string  of the data set
--   2 shards      string  their numbers, blanks between
-- RETURNS 'SHARD ...': those of them that were in quarantine
-- ERRORS none
-- WRITES quarantine events
-- IDEMPOTENT by comparison: one that is not there is not let out again
-- INCLUDE event
local quarantine, events = KEYS[1], KEYS[2]
local name, shards = ARGV[1], ARGV[2]

local released = {}
for shard in string.gmatch(shards, '%d+') do
  if redis.call('HDEL', quarantine, shard) == 1 then released[#released + 1] = shard end
end
local told = table.concat(released, ' ')
if told ~= '' then emit(events, 'shards_released', 'dataset', name, 'shards', told) end
return told
