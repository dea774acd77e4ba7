-- failed_save(failed_saves, ...): one entry in the capped stream of saves that came to nothing; fields and values alternate.
local function failed_save(failed_saves, ...)
  redis.call('XADD', failed_saves, 'MAXLEN', '~', 100, '*', ...)
end
