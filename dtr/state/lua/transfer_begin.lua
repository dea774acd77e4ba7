-- The holder of a claim says what the store calls its upload of the part, before the first byte: whoever claims the part next can go on
-- with it. Another upload than the one on record makes what was sent to that one worthless.
-- KEYS
--   1 ckpt      hash    the checkpoint
--   2 parts     hash    its parts
--   3 transfer  hash    nonce, upload, and for each piece that the store has its number -> checksum and the store's tag
-- ARGV
--   1 rank      integer of the part
--   2 token     string  of the claim
--   3 nonce     string  of the claim
--   4 upload    string  the store's name for it
--   5 ttl_ms    integer until what is sent is not worth keeping
-- RETURNS 1 if the claim stands and is still wanted, 0 if its holder must stop and discard that upload
-- ERRORS none
-- WRITES transfer
-- IDEMPOTENT sets only
local ckpt, parts, transfer = KEYS[1], KEYS[2], KEYS[3]
local rank, token, nonce, upload, ttl_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local part = redis.call('HMGET', parts, rank .. '/uploader', rank .. '/state')
if part[1] ~= token or part[2] ~= 'staged' or redis.call('HGET', ckpt, 'state') ~= 'WRITING' then return 0 end
local held = redis.call('HMGET', transfer, 'nonce', 'upload')
if held[1] ~= nonce or held[2] ~= upload then redis.call('DEL', transfer) end
redis.call('HSET', transfer, 'nonce', nonce, 'upload', upload)
redis.call('PEXPIRE', transfer, ttl_ms)
return 1
