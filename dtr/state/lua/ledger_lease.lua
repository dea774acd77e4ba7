-- Lease free shards: of the candidates the first that are free, then, if asked, any. A rank that gets none because none is free is dry:
-- it has no batch beyond those that it has. A lease ends with the run; nobody takes it from a living member.
-- KEYS
--   1 meta        hash    the job's state
--   2 roster      hash    of the current run
--   3 fences      hash    worker -> incarnation, and the numbers of its channels
--   4 ledger      hash    of the data set in this epoch and run
--   5 taken       string  one bit a shard: not free
--   6 quarantine  hash    shard -> why it cannot be read
-- ARGV
--   1 state_id    string  that the member joined
--   2 run         string  the run
--   3 worker      string  worker_id
--   4 rank        integer of the member
--   5 incarnation string  of the member
--   6 have        integer batches of this epoch that this rank has samples for, those yielded included
--   7 want        integer shards, at most
--   8 known_leases     integer shards that this rank knows it was given in this ledger; one that does not know all is not dry
--   9 from_byte   integer any free shard will do, looked for from this byte of the bitmap on; -1: only candidates
--  10 keep_ms     integer the ledger outlives its last write by this
--  11 candidates  string  shards that the caller would like, the best first, blanks between
--  12 number      integer of this write in channel loader
-- RETURNS 'DRY|SHARD:FENCE ...|SHARD ...': 1 if this rank is dry, what was leased, and what was met in quarantine and is nobody's now
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION ROSTER_CHANGED LEDGER_UNSET INVALID
-- WRITES fences ledger taken
-- IDEMPOTENT by the number and the ledger: a repeated write answers what the first did
-- INCLUDE state fence channel ledger
local meta, roster, fences, ledger, taken, quarantine = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local state_id, run, worker, rank, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local have, want, known_leases, from_byte = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local keep_ms, candidates, number = ARGV[10], ARGV[11], tonumber(ARGV[12])

local known = redis.call('HMGET', meta, 'state_id', 'phase', 'run')
local lost = state_error(known[1], known[2], state_id)
if lost then return lost end
local refused = fence_error(known[3], run, redis.call('HGET', roster, worker), rank, incarnation, meta)
if refused then return refused end
local echo, answer = channel_state(fences, worker, 'loader', number)
if echo ~= 'new' and echo ~= 'repeat' then return echo end
-- A write that took effect in a run that ended before its sender knew is refused when it is repeated, so its number comes again.
if echo == 'repeat' and string.sub(answer, 1, #ledger + 1) == ledger .. ' ' then return string.sub(answer, #ledger + 2) end
local held = redis.call('HMGET', ledger, ':fence', ':mode', 'leases/' .. rank, 'dry/' .. rank, 'have/' .. rank, ':most')
if held[2] ~= 'dynamic' then return redis.error_reply('LEDGER_UNSET this run has no ledger of that data set and epoch') end

local fence, leased, bad, words = tonumber(held[1]), 0, {}, {}
local function take(shard)
  redis.call('SETBIT', taken, shard, 1)
  if redis.call('HEXISTS', quarantine, shard) == 1 then
    bad[#bad + 1] = shard
    return
  end
  fence, leased = fence + 1, leased + 1
  redis.call('HSET', ledger, 'lease/' .. shard, worker .. ' ' .. incarnation .. ' ' .. fence)
  words[#words + 1] = shard .. ':' .. fence
end
for shard in string.gmatch(candidates, '%d+') do
  if leased == want then break end
  if redis.call('GETBIT', taken, shard) == 0 then take(shard) end
end
while from_byte >= 0 and leased < want and #bad < 1000 do
  local shard = redis.call('BITPOS', taken, 0, from_byte, -1)
  if shard < 0 then shard = redis.call('BITPOS', taken, 0, 0, -1) end
  if shard < 0 then break end
  take(string.format('%d', shard))
end
-- Whoever got something need not be told whether it was the last: counting every time is what would cost most here.
local dry = leased == 0 and #bad == 0 and known_leases == tonumber(held[3] or 0)
  and redis.call('BITCOUNT', taken) == 8 * redis.call('STRLEN', taken)
local fields = {':fence', fence, 'leases/' .. rank, tonumber(held[3] or 0) + leased}
ledger_have(fields, rank, have, held[5], held[6])
if dry then
  if redis.call('HSETNX', ledger, 'dry/' .. rank, have) == 1 then redis.call('HINCRBY', ledger, ':dry', 1) end
elseif held[4] then
  redis.call('HDEL', ledger, 'dry/' .. rank)
  redis.call('HINCRBY', ledger, ':dry', -1)
end
redis.call('HSET', ledger, unpack(fields))
redis.call('PEXPIRE', ledger, keep_ms)
redis.call('PEXPIRE', taken, keep_ms)
answer = (dry and 1 or 0) .. '|' .. table.concat(words, ' ') .. '|' .. table.concat(bad, ' ')
channel_record(fences, worker, 'loader', number, ledger .. ' ' .. answer)
return answer
