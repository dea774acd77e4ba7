-- ckpt_conflict(held, world_size, replicated, writer, store): an error reply unless a second caller means the same checkpoint.
-- held: HMGET of world_size, replicated, writer, store.
local function ckpt_conflict(held, world_size, replicated, writer, store)
  local given, names = {world_size, replicated, writer, store}, {'world_size', 'replicated', 'writer', 'store'}
  for i = 1, 4 do
    if held[i] ~= given[i] then
      return redis.error_reply('CKPT_CONFLICT this step was begun with ' .. names[i] .. ' ' .. tostring(held[i]) .. ', now it is ' .. given[i])
    end
  end
end
