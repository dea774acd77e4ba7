-- Pin a commit: no policy retires it from now on.
-- KEYS
--   1 ckpt        hash    the checkpoint
-- ARGV
--   1 note        string  why, for people; `-` for none
--   2 spare       integer 1: take a retirement back as well; only for a caller that saw its pin and its manifest in the store
-- RETURNS PINNED, RETIRED (too late), or its state if it is no commit: empty if Redis does not know it
-- ERRORS none
-- WRITES ckpt
-- IDEMPOTENT the same note again changes nothing
local ckpt = KEYS[1]
local note, spare = ARGV[1], ARGV[2]

local held = redis.call('HMGET', ckpt, 'state', 'retired_at')
if held[1] ~= 'COMMITTED' and held[1] ~= 'ABANDONED' then return held[1] or '' end
if held[2] then
  if spare ~= '1' then return 'RETIRED' end
  redis.call('HDEL', ckpt, 'retired_at')
end
redis.call('HSET', ckpt, 'pinned', note)
return 'PINNED'
