-- Make a spec the current version of a data set, if the caller knew the version before it. Its files' facts were written already,
-- under a key of their own with a TTL, so that this stays short however many files there are.
-- KEYS
--   1 dataset     hash    the current spec
--   2 version_key hash    the spec as this version, kept
--   3 files       hash    file -> facts of the new version, which expires unless it is registered
--   4 names       hash    data set -> current version
--   5 events      stream  for people
-- ARGV
--   1 name        string  of the data set
--   2 digest      string  of the new spec
--   3 known       integer the current version as the caller knows it, 0 for none
--   4 version     integer of the new spec
--   5 file_count  integer of the new spec
--   6+ spec       string  fields and values of the new spec
-- RETURNS {'same' | 'registered' | 'again' | 'stage', the current version}: again if another version came between, stage if the
--   files' facts have expired
-- ERRORS none
-- WRITES dataset version_key files names events
-- IDEMPOTENT by the digest: what is current already stays as it is
-- INCLUDE event
local dataset, version_key, files, names, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local name, digest, known, version, file_count = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])

local held = redis.call('HMGET', dataset, 'version', 'digest')
local current = held[1] or '0'
if held[2] == digest then return {'same', current} end
if current ~= known then return {'again', current} end
if redis.call('HLEN', files) ~= file_count then return {'stage', current} end

redis.call('PERSIST', files)
redis.call('DEL', dataset)
redis.call('HSET', dataset, unpack(ARGV, 6))
redis.call('HSET', version_key, unpack(ARGV, 6))
redis.call('HSET', names, name, version)
emit(events, 'dataset_registered', 'dataset', name, 'version', version)
return {'registered', version}
