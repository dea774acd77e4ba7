-- Let policies decide about a checkpoint again, after its pin is gone from the store.
-- KEYS
--   1 ckpt        hash    the checkpoint
-- RETURNS 1 if it was pinned, else 0
-- ERRORS none
-- WRITES ckpt
-- IDEMPOTENT what is not pinned stays so
local ckpt = KEYS[1]

return redis.call('HDEL', ckpt, 'pinned')
