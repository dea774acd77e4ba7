-- The holder of a claim says which pieces the store has acknowledged.
-- KEYS
--   1 parts     hash    the checkpoint's parts
--   2 transfer  hash    what was sent of the part
-- ARGV
--   1 rank      integer of the part
--   2 token     string  of the claim
--   3 upload    string  that they were sent to
--   4 ttl_ms    integer until what is sent is not worth keeping
--   5+ pieces   string  number of a piece, and its checksum and tag, alternating
-- RETURNS 1 if they are on record, 0 if the claim or the upload is another's by now
-- ERRORS none
-- WRITES transfer
-- IDEMPOTENT sets only
local parts, transfer = KEYS[1], KEYS[2]
local rank, token, upload, ttl_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

if redis.call('HGET', parts, rank .. '/uploader') ~= token or redis.call('HGET', transfer, 'upload') ~= upload then return 0 end
redis.call('HSET', transfer, unpack(ARGV, 5))
redis.call('PEXPIRE', transfer, ttl_ms)
return 1
