-- The holder of a claim records that its part is in the store. The first facts of a rank win; the part that completes the set seals the
-- checkpoint, and from then on its facts never change.
-- KEYS
--   1 meta       hash    the job's state
--   2 ckpt       hash    the checkpoint
--   3 parts      hash    its parts
--   4 transfer   hash    what was sent of the part: of no use any more
--   5 run_key    hash    the run: whether its ranks load data
--   6 data       hash    rank -> its share of the data state
--   7 events     stream  for people and handles
-- ARGV
--   1 run        string  of the checkpoint
--   2 step       integer of the checkpoint
--   3 rank       integer of the part
--   4 nonce      string  of the claim
--   5 object     string  key in the store
--   6 object_bytes integer of the object
--   7 checksum   string  of the object
--   8 piece_bytes integer of each of its pieces, 0 if they are not known
--   9 pieces     string  their checksums
--  10 kind       string  file | chunks
--  11 state_bytes integer that were staged
--  12 state_checksum string  of what was staged
-- RETURNS {state}: of the checkpoint, with this object among its parts; {'LOST', why}: another object is, or the claim does not stand
-- ERRORS STATE_LOST RECOVERING CKPT_CONFLICT
-- WRITES ckpt parts transfer events
-- IDEMPOTENT by comparison: the same facts again change nothing
-- INCLUDE now integer state event seal
local meta, ckpt, parts, transfer = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local run_key, data, events = KEYS[5], KEYS[6], KEYS[7]
local run, step, rank, nonce, object, object_bytes, checksum = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local piece_bytes, pieces, kind, state_bytes, state_checksum = ARGV[8], ARGV[9], ARGV[10], ARGV[11], ARGV[12]

local known = redis.call('HMGET', meta, 'state_id', 'phase')
local lost = state_error(known[1], known[2], known[1])
if lost then return lost end
local held = redis.call('HMGET', ckpt, 'state', 'reason', 'done')
local part = redis.call('HMGET', parts, rank .. '/state', rank .. '/nonce', rank .. '/object', rank .. '/state_checksum',
  rank .. '/size_bytes', rank .. '/checksum')
if part[1] == 'done' then
  if part[3] == object and part[6] == checksum then return {held[1]} end
  if part[4] ~= state_checksum then
    return redis.error_reply('CKPT_CONFLICT rank ' .. rank .. ' has checksum ' .. tostring(part[4]) .. ' in this checkpoint, this upload has '
      .. state_checksum)
  end
  return {'LOST', 'another upload of this part was first'}
end
if held[1] ~= 'WRITING' then return {'LOST', 'the checkpoint is ' .. (held[1] or 'unknown') .. ': ' .. (held[2] or '')} end
if part[2] ~= nonce then return {'LOST', 'another uploader has claimed this part since'} end
if part[5] ~= state_bytes then
  return redis.error_reply('CKPT_CONFLICT rank ' .. rank .. ' staged ' .. part[5] .. ' bytes, this upload has ' .. state_bytes)
end

redis.call('HSET', parts, rank .. '/state', 'done', rank .. '/object', object, rank .. '/checksum', checksum, rank .. '/uploader', '',
  rank .. '/lease_until', 0, rank .. '/progress_bytes', state_bytes, rank .. '/error', '',
  rank .. '/piece_bytes', piece_bytes, rank .. '/pieces', pieces, rank .. '/kind', kind,
  rank .. '/object_bytes', object_bytes, rank .. '/state_checksum', state_checksum)
redis.call('DEL', transfer)
redis.call('HSET', ckpt, 'done', tonumber(held[3]) + 1)
return {ckpt_seal(ckpt, run_key, data, events, run, step, now_ms())}
