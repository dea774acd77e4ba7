-- ckpt_conflict(held, world_size, replicated, writer, store): an error reply unless a second caller means the same checkpoint.
-- held: HMGET of world_size, replicated, writer, store. ``some`` alone (a rank that has nothing, an index from the store) agrees with
-- ``some STRUCTURE``; two structures do not.
local function ckpt_conflict(held, world_size, replicated, writer, store)
  local given, names = {world_size, replicated, writer, store}, {'world_size', 'replicated', 'writer', 'store'}
  for i = 1, 4 do
    local bare = i == 2 and (held[i] == 'some' or given[i] == 'some')
    if held[i] ~= given[i] and not (bare and string.sub(held[i], 1, 4) == string.sub(given[i], 1, 4)) then
      return redis.error_reply('CKPT_CONFLICT this step was begun with ' .. names[i] .. ' ' .. tostring(held[i]) .. ', now it is ' .. given[i])
    end
  end
end
