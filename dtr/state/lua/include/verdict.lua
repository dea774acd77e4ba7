-- ckpt_verdict(state, reason, run, step): an error reply if the checkpoint is over without a commit.
local function ckpt_verdict(state, reason, run, step)
  if state == 'ABORTING' or state == 'ABORTED' then
    return redis.error_reply('CKPT_ABORTED run ' .. run .. ' step ' .. step .. ': ' .. (reason or ''))
  elseif state == 'ABANDONED' then
    return redis.error_reply('CKPT_ABANDONED run ' .. run .. ' step ' .. step .. ': ' .. (reason or ''))
  end
end
