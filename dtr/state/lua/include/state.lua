-- state_error(held, phase, state_id): an error reply when Redis holds another state than the caller's, or is being rebuilt.
local function state_error(held, phase, state_id)
  if not held then
    return redis.error_reply('STATE_LOST Redis holds no state for this job: it was emptied')
  elseif held ~= state_id then
    return redis.error_reply('STATE_LOST Redis holds another state than this member joined: it was emptied or failed over')
  elseif phase ~= 'READY' then
    return redis.error_reply('RECOVERING the state is being rebuilt from the store')
  end
end
