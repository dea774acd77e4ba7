-- barrier_verdict(round): the answer of a final round: {'RELEASED', wanted}, or the error that names who is missing.
local function barrier_verdict(round)
  local held = redis.call('HMGET', round, 'state', 'wanted', 'reason', 'missing')
  if held[1] == 'RELEASED' then return {'RELEASED', held[2]} end
  local code = held[1] == 'BROKEN' and 'BARRIER_BROKEN ' or 'BARRIER_TIMEOUT '
  return redis.error_reply(code .. (held[3] or '') .. ' | ' .. (held[4] or ''))
end
