-- Forget a checkpoint whose objects are gone from the store. Its record stays there, so that nothing late can revive it.
-- KEYS
--   1 ckpts       zset    the index
--   2 ckpt        hash    the checkpoint
--   3 parts       hash    its parts
-- ARGV
--   1 name        string  RUN/STEP of the checkpoint
-- RETURNS 1 if it was retired or aborted and is forgotten, 0 if it stays
-- ERRORS none
-- WRITES ckpts ckpt parts
-- IDEMPOTENT what is gone stays so
local ckpts, ckpt, parts = KEYS[1], KEYS[2], KEYS[3]
local name = ARGV[1]

local held = redis.call('HMGET', ckpt, 'state', 'retired_at')
if not held[2] and held[1] ~= 'ABORTED' then return 0 end
redis.call('ZREM', ckpts, name)
redis.call('DEL', ckpt)
redis.call('DEL', parts)
return 1
