-- channel_state(fences, worker, channel, number): what Redis remembers of a member's numbered writes.
-- Returns 'new' (do it), 'repeat' with the stored answer (it was done), or an error reply: an earlier write is missing, so Redis
-- lost what it had acknowledged; or a later one is there, so this is an echo.
local function channel_state(fences, worker, channel, number)
  local stored = redis.call('HGET', fences, worker .. '/' .. channel)
  local last, answer = 0, ''
  if stored then
    last, answer = string.match(stored, '^(%d+) ?(.*)$')
    last = tonumber(last)
  end
  if number == last then return 'repeat', answer end
  if number == last + 1 then return 'new' end
  if number < last then
    return redis.error_reply('INVALID write ' .. number .. ' of channel ' .. channel .. ' came after write ' .. last)
  end
  return redis.error_reply('STATE_LOST write ' .. (number - 1) .. ' of channel ' .. channel .. ' was acknowledged and is gone')
end

-- channel_record(fences, worker, channel, number, answer): remember the answer until the next number.
local function channel_record(fences, worker, channel, number, answer)
  redis.call('HSET', fences, worker .. '/' .. channel, number .. ' ' .. answer)
end
