-- The holder of a claim gives it back because of an error that may pass (the store throttles, the worker stops): another may claim it
-- after retry_ms.
-- KEYS
--   1 parts     hash    the checkpoint's parts
-- ARGV
--   1 rank      integer of the part
--   2 token     string  of the claim
--   3 error     string  for people
--   4 retry_ms  integer until the next claim is granted
--   5 counts    integer 1: this attempt counts towards max_attempts; 0: it failed through no fault of the part
-- RETURNS 1 if the claim was held, 0 if not
-- ERRORS none
-- WRITES parts
-- IDEMPOTENT by the token: a claim that was given back is not held
-- INCLUDE now integer
local parts = KEYS[1]
local rank, token, error, retry_ms, counts = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]

local part = redis.call('HMGET', parts, rank .. '/uploader', rank .. '/state', rank .. '/attempts', rank .. '/failures')
if part[1] ~= token or part[2] ~= 'staged' then return 0 end
redis.call('HSET', parts, rank .. '/uploader', '', rank .. '/lease_until', 0, rank .. '/error', error,
  rank .. '/retry_at', integer(now_ms() + retry_ms), rank .. '/failures', tonumber(part[4] or 0) + 1,
  rank .. '/attempts', counts == '1' and part[3] or math.max(tonumber(part[3]) - 1, 0))
return 1
