-- Ask for the job's turn to collect: one collector a job and interval, however many hosts upload for it. It only spares work; what
-- keeps two collectors apart is that every step of theirs may be done twice.
-- KEYS
--   1 retention   hash    who collected last
-- ARGV
--   1 token       string  of the caller's attempt
--   2 interval_ms integer least time between two collectors
-- RETURNS 1 if it is the caller's turn, else 0
-- ERRORS none
-- WRITES retention
-- IDEMPOTENT the same token gets the same answer
-- INCLUDE now integer
local retention = KEYS[1]
local token, interval_ms = ARGV[1], tonumber(ARGV[2])

local held = redis.call('HMGET', retention, 'token', 'collected_at')
if held[1] == token then return 1 end
local now = now_ms()
local last = tonumber(held[2] or 0)
if last <= now and now < last + interval_ms then return 0 end
redis.call('HSET', retention, 'token', token, 'collected_at', integer(now))
return 1
