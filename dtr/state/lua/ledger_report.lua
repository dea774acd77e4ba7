-- What one rank hands out and has consumed: sent with every batch, before its trainer gets it, and nobody waits for the answer. So what
-- a dead rank gave to a collective that its peers completed is on record here, whether or not it came to report the step.
-- KEYS
--   1 roster      hash    of the current run, with its fence
--   2 ledger      hash    of the data set in this epoch and run
--   3 done        string  one bit a shard: consumed whole in this run
-- ARGV
--   1 fence       string  state id and run
--   2 worker      string  worker_id
--   3 rank        integer of the member
--   4 incarnation string  of the member
--   5 have        integer batches of this epoch that this rank has samples for, those yielded included
--   6 step        integer the last that consumed something, or empty
--   7 samples     integer consumed in this epoch and run
--   8 batch       integer of the one that is handed out, or empty
--   9 out         string  its sample ranges, SHARD:START-STOP with blanks between
--  10 old         integer a batch that is long consumed: from now on part of the sums below
--  11 keep_ms     integer the ledger outlives its last write by this
--  12+ sums       string  shard, fence of its lease, its consumed ranges (empty: all of it), alternating
-- RETURNS how many of the sums counted: those under a lease that stands
-- ERRORS ROSTER_CHANGED LEDGER_UNSET
-- WRITES ledger done
-- IDEMPOTENT by nature: it sets what is so, and says the same when repeated; an older report after a newer one changes nothing for good
-- INCLUDE ledger
local roster, ledger, done = KEYS[1], KEYS[2], KEYS[3]
local fence, worker, rank, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local have, step, samples, batch, out, old = tonumber(ARGV[5]), ARGV[6], ARGV[7], ARGV[8], ARGV[9], tonumber(ARGV[10])
local keep_ms = ARGV[11]

local run = redis.call('HMGET', roster, ':fence', worker)
if run[1] ~= fence or run[2] ~= rank .. ' ' .. incarnation then
  return redis.error_reply('ROSTER_CHANGED this member is not in an open run')
end
local held = redis.call('HMGET', ledger, ':base', 'have/' .. rank, ':most')
if not held[1] then return redis.error_reply('LEDGER_UNSET this run has no ledger of that data set and epoch') end

local fields, counted, whole = {'samples/' .. rank, samples}, 0, false
ledger_have(fields, rank, have, held[2], held[3])
local function set(name, value)
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end
if step ~= '' then set('step/' .. rank, step) end
if batch ~= '' then set('out/' .. rank .. '/' .. batch, out) end
for i = 12, #ARGV - 2, 3 do
  if redis.call('HGET', ledger, 'lease/' .. ARGV[i]) == worker .. ' ' .. incarnation .. ' ' .. ARGV[i + 1] then
    counted = counted + 1
    if ARGV[i + 2] == '' then
      whole = true
      redis.call('HDEL', ledger, 'lease/' .. ARGV[i], 'part/' .. ARGV[i])
      redis.call('SETBIT', done, ARGV[i], 1)
    elseif #fields < 1000 then
      set('part/' .. ARGV[i], ARGV[i + 2])
    else
      redis.call('HSET', ledger, 'part/' .. ARGV[i], ARGV[i + 2])
    end
  end
end
redis.call('HSET', ledger, unpack(fields))
if old >= 0 then redis.call('HDEL', ledger, 'out/' .. rank .. '/' .. ARGV[10]) end
-- Every sixteenth batch will do: keep_ms is days.
if whole or batch == '' or tonumber(batch) % 16 == 0 then
  redis.call('PEXPIRE', ledger, keep_ms)
  redis.call('PEXPIRE', done, keep_ms)
end
return counted
