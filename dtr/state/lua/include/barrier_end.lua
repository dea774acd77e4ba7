-- barrier_end(state, reason, run_key, round, arrived, round_wake, events, subset): make an open round final, for everyone alike.
-- missing is written as `rank:worker` words, in order of rank.
local function barrier_end(state, reason, run_key, round, arrived, round_wake, events, subset)
  local wanted = nil
  if subset ~= '' then
    wanted = {}
    for _, name in ipairs(cjson.decode(subset)) do wanted[name] = true end
  end
  local fields = redis.call('HGETALL', run_key)
  local missing, order = {}, {}
  for i = 1, #fields, 2 do
    local name = string.match(fields[i], '^member:(.+)$')
    if name and (not wanted or wanted[name]) and redis.call('SISMEMBER', arrived, name) == 0 then
      local rank = tonumber(string.match(fields[i + 1], '^%d+'))
      missing[rank], order[#order + 1] = string.match(fields[i + 1], '^%d+') .. ':' .. name, rank
    end
  end
  table.sort(order)
  local words = {}
  for i, rank in ipairs(order) do words[i] = missing[rank] end
  local text = table.concat(words, ' ')
  redis.call('HSET', round, 'state', state, 'arrived', redis.call('SCARD', arrived), 'reason', reason, 'missing', text)
  redis.call('XADD', round_wake, '*', 'state', state)
  redis.call('EXPIRE', round, 3600)
  redis.call('EXPIRE', arrived, 3600)
  redis.call('EXPIRE', round_wake, 3600)
  emit(events, state == 'BROKEN' and 'barrier_broken' or 'barrier_timeout', 'round', round, 'reason', reason, 'missing', text)
end
