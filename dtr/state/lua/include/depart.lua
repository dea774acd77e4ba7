-- depart(now, meta, members, fences, departed, roster, ring, wake, events, worker, incarnation, reason): record that a member is gone.
-- Writes fixed keys only. A member of the open run's roster ends that run: its fence goes,
-- the seats stay, so that forming knows who must come.
local function depart(now, meta, members, fences, departed, roster, ring, wake, events, worker, incarnation, reason)
  redis.call('ZREM', members, worker)
  redis.call('HDEL', fences, worker, worker .. '/trainer', worker .. '/loader', worker .. '/uploader')
  redis.call('HSET', departed, worker, incarnation .. ' ' .. string.format('%.0f', now) .. ' ' .. reason)
  local points = {}
  for n = 0, 149 do points[n + 1] = worker .. '#' .. n end
  redis.call('ZREM', ring, unpack(points))
  redis.call('HINCRBY', meta, 'generation', 1)
  emit(events, 'departed', 'worker', worker, 'incarnation', incarnation, 'reason', reason)
  local run = redis.call('HGET', meta, 'run')
  local place = redis.call('HGET', roster, worker)
  if run and run ~= '' and place then
    local rank, held = string.match(place, '^(%d+) (%S+)$')
    if held == incarnation then
      redis.call('HDEL', roster, ':fence')
      redis.call('HSET', meta, 'run', '', 'ended_run', run, 'ended_worker', worker, 'ended_rank', rank, 'ended_reason', reason)
      redis.call('XADD', wake, 'MAXLEN', '~', 1000, '*', 'news', 'departed', 'run', run, 'worker', worker, 'rank', rank, 'reason', reason)
      emit(events, 'run_ended', 'run', run, 'worker', worker, 'rank', rank, 'reason', reason)
    end
  end
end
