-- An uploader saw that a part can never be uploaded (its member is gone without a complete slot, or its host is): the checkpoint is
-- aborted, if the part is still as it was seen.
-- KEYS
--   1 ckpt    hash    the checkpoint
--   2 parts   hash    its parts
--   3 events  stream  for people and handles
-- ARGV
--   1 run     string  of the checkpoint
--   2 step    integer of the checkpoint
--   3 rank    integer of the part
--   4 seen    string  state of the part as it was seen; empty: nobody has staged it
--   5 reason  string  for people
-- RETURNS the state of the checkpoint after the call, empty if Redis has none
-- ERRORS none
-- WRITES ckpt events
-- IDEMPOTENT only a checkpoint that is WRITING changes
-- INCLUDE event abort
local ckpt, parts, events = KEYS[1], KEYS[2], KEYS[3]
local run, step, rank, seen, reason = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local state = redis.call('HGET', ckpt, 'state')
if state == 'WRITING' and (redis.call('HGET', parts, rank .. '/state') or '') == seen then
  ckpt_abort(ckpt, events, run, step, rank, reason)
  return 'ABORTING'
end
return state or ''
