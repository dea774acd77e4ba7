-- fence_error(held_run, run, place, rank, incarnation, meta): an error reply unless the run is open and this incarnation is in it.
local function fence_error(held_run, run, place, rank, incarnation, meta)
  if held_run == run and place == rank .. ' ' .. incarnation then return nil end
  if held_run == run then
    return redis.error_reply('STALE_INCARNATION another process has taken this member\'s place in run ' .. run)
  end
  local why = redis.call('HMGET', meta, 'ended_run', 'ended_worker', 'ended_rank', 'ended_reason')
  if why[1] == run then
    return redis.error_reply('ROSTER_CHANGED run ' .. run .. ' ended: rank ' .. why[3] .. ' (' .. why[2] .. ') departed: ' .. why[4])
  end
  return redis.error_reply('ROSTER_CHANGED run ' .. run .. ' ended: the job goes on as run ' .. (held_run or '?'))
end
