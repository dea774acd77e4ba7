-- part_place(parts, state, rank, worker, incarnation, host, size_bytes, save, metrics, now): note that a rank's part is complete in a slot, while
-- the checkpoint takes parts (state WRITING).
-- Returns {part state, the save that counts}; the first save of a rank is the part, another of the same size is for its sender to compare.
local function part_place(parts, state, rank, worker, incarnation, host, size_bytes, save, metrics, now)
  local held = redis.call('HMGET', parts, rank .. '/state', rank .. '/save', rank .. '/size_bytes', rank .. '/incarnation')
  if held[1] then
    if held[4] ~= incarnation then
      return redis.error_reply('CKPT_CONFLICT rank ' .. rank .. ' of this checkpoint belongs to incarnation ' .. tostring(held[4]))
    end
    if held[2] ~= save and held[3] ~= size_bytes then
      return redis.error_reply('CKPT_CONFLICT rank ' .. rank .. ' saved this step with ' .. held[3] .. ' bytes before, now with ' .. size_bytes)
    end
    return {held[1], held[2]}
  end
  if state ~= 'WRITING' then return {'', ''} end
  redis.call('HSET', parts, rank .. '/state', 'staged', rank .. '/worker', worker, rank .. '/incarnation', incarnation, rank .. '/host', host,
    rank .. '/size_bytes', size_bytes, rank .. '/save', save, rank .. '/staged_at', integer(now), rank .. '/attempts', 0,
    rank .. '/metrics', metrics)
  return {'staged', save}
end
