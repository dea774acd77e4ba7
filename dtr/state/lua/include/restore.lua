-- restore_settle(restore, restores, wake, attempt, run): choose the newest common candidate that nobody dropped, and count that it is
-- tried; none left ends the attempt.
local function restore_settle(restore, restores, wake, attempt, run)
  local held = redis.call('HMGET', restore, 'order', 'fresh', 'offers', 'seen')
  for candidate in string.gmatch(held[1], '%S+') do
    if redis.call('HEXISTS', restore, 'dropped:' .. candidate) == 0 then
      redis.call('HSET', restore, 'state', 'VOTING', 'choice', candidate, 'votes', 0)
      redis.call('HINCRBY', restores, candidate .. '/begun', 1)
      redis.call('EXPIRE', restores, 7776000)
      redis.call('XADD', wake, 'MAXLEN', '~', 1000, '*', 'news', 'restore', 'run', run)
      return
    end
  end
  local state = 'FAILED'
  if held[4] == '0' then state = held[2] == held[3] and 'FRESH' or 'NONE' end
  redis.call('HSET', restore, 'state', state, 'choice', '', 'verdict:' .. attempt, state)
  redis.call('XADD', wake, 'MAXLEN', '~', 1000, '*', 'news', 'restore', 'run', run)
end

-- restore_drop(restore, candidate, reason): nobody may choose this one; the first reason counts, and is answered with true.
local function restore_drop(restore, candidate, reason)
  local first = redis.call('HSETNX', restore, 'dropped:' .. candidate, reason) == 1
  if first then redis.call('HSET', restore, 'dropped', (redis.call('HGET', restore, 'dropped') or '') .. ' ' .. candidate) end
  return first
end

-- restore_answer(restore, run_key, attempt): {state, choice, base_state, reasons}; reasons alternate candidate and why it was dropped.
local function restore_answer(restore, run_key, attempt)
  local held = redis.call('HMGET', restore, 'attempt', 'state', 'choice', 'verdict:' .. attempt, 'dropped')
  local base_state = redis.call('HGET', run_key, 'base_state') or 'NONE'
  local state, choice = held[2], held[3]
  if tonumber(held[1]) > tonumber(attempt) then state, choice = held[4] or 'FAILED', '' end
  local reasons = {}
  for candidate in string.gmatch(held[5] or '', '%S+') do
    reasons[#reasons + 1], reasons[#reasons + 2] = candidate, redis.call('HGET', restore, 'dropped:' .. candidate)
  end
  return {state, choice, base_state, reasons}
end

-- restore_ended(restore, run_key, worker, rank, incarnation, attempt): the answer that the attempt ended with, if it ended without a
-- checkpoint: for a rank of the run that asks when the run has ended meanwhile. Reads only.
local function restore_ended(restore, run_key, worker, rank, incarnation, attempt)
  local seat = redis.call('HGET', run_key, 'member:' .. worker)
  if not seat or string.match(seat, '^%d+ %S+') ~= rank .. ' ' .. incarnation then return nil end
  local verdict = redis.call('HGET', restore, 'verdict:' .. attempt)
  if verdict ~= 'NONE' and verdict ~= 'FAILED' then return nil end
  return restore_answer(restore, run_key, attempt)
end
