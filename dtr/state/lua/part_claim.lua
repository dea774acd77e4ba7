-- An uploader claims a part for lease_ms. An attempt counts unless more bytes than ever before were stored since the last claim; one
-- too many aborts the checkpoint. The nonce goes into the object's key. A claim gets a new one, unless the last one's upload can be gone
-- on with: then it gets that nonce, so that only uploads of the same bytes ever write to one key.
-- KEYS
--   1 meta         hash    the job's state
--   2 ckpt         hash    the checkpoint
--   3 parts        hash    its parts
--   4 transfer     hash    what the last claim had sent of the part
--   5 events       stream  for people and handles
-- ARGV
--   1 run          string  of the checkpoint
--   2 step         integer of the checkpoint
--   3 rank         integer of the part
--   4 host         string  host id of the uploader
--   5 token        string  of this attempt, never used before
--   6 nonce        string  to put into the object's key
--   7 lease_ms     integer until another may claim
--   8 max_attempts integer without progress
-- RETURNS {'CLAIMED', nonce, attempts, failures, save} | {'BUSY', left_ms, uploader} | {'LATER', left_ms, error} | {'DONE', state, save}
--   | {'ELSEWHERE', host} | {'NONE', state, reason}: there is nothing to upload
-- ERRORS STATE_LOST RECOVERING
-- WRITES ckpt parts events
-- IDEMPOTENT by the token: a claim that stands is answered again, and only its lease renewed
-- INCLUDE now integer state event abort
local meta, ckpt, parts, transfer, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local run, step, rank, host, token, nonce = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local lease_ms, max_attempts = tonumber(ARGV[7]), tonumber(ARGV[8])

local known = redis.call('HMGET', meta, 'state_id', 'phase')
local lost = state_error(known[1], known[2], known[1])
if lost then return lost end
local held = redis.call('HMGET', ckpt, 'state', 'reason')
local function field(name) return rank .. '/' .. name end
local part = redis.call('HMGET', parts, field('state'), field('host'), field('uploader'), field('lease_until'), field('nonce'),
  field('attempts'), field('progress_bytes'), field('claimed_bytes'), field('retry_at'), field('failures'), field('save'), field('error'),
  field('claims'))
if part[1] == 'done' then return {'DONE', held[1] or '', part[11] or ''} end
if held[1] ~= 'WRITING' or not part[1] then return {'NONE', held[1] or '', held[2] or ''} end
if part[2] ~= host then return {'ELSEWHERE', part[2]} end

local now = now_ms()
local lease_until = tonumber(part[4] or 0)
if part[3] == token then
  redis.call('HSET', parts, field('lease_until'), integer(now + lease_ms))
  return {'CLAIMED', part[5], tonumber(part[6]), tonumber(part[10] or 0), part[11]}
end
if lease_until > now then return {'BUSY', lease_until - now, part[3] or ''} end
local retry_at = tonumber(part[9] or 0)
if retry_at > now then return {'LATER', retry_at - now, part[12] or ''} end

local progress, claimed = tonumber(part[7] or 0), tonumber(part[8] or 0)
local attempts = progress > claimed and 1 or tonumber(part[6] or 0) + 1
if attempts > max_attempts then
  local reason = 'rank ' .. rank .. ': ' .. (attempts - 1) .. ' attempts to upload its part ended without progress'
  if part[12] and part[12] ~= '' then reason = reason .. ': ' .. part[12] end
  ckpt_abort(ckpt, events, run, step, rank, reason)
  return {'NONE', 'ABORTING', reason}
end
if part[5] and redis.call('HGET', transfer, 'nonce') == part[5] then nonce = part[5] end
redis.call('HSET', parts, field('claims'), tonumber(part[13] or 0) + 1, field('claimed_at'), integer(now), field('uploader'), token,
  field('lease_until'), integer(now + lease_ms), field('nonce'), nonce, field('attempts'), attempts, field('claimed_bytes'), integer(math.max(progress, claimed)))
return {'CLAIMED', nonce, attempts, tonumber(part[10] or 0), part[11]}
