-- emit(events, kind, ...): one entry for people in the capped stream of events; fields and values alternate.
local function emit(events, kind, ...)
  redis.call('XADD', events, 'MAXLEN', '~', 10000, '*', 'event', kind, ...)
end
