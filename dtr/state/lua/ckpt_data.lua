-- One rank hands over its share of the data state of a step that it saves: each rank does, also one that has no part, or nothing to say.
-- A run of which any rank loads data has no checkpoint without the shares of all. Valid for whoever was in the run's roster, alive or not.
-- KEYS
--   1 meta        hash    the job's state
--   2 run_key     hash    the run
--   3 ckpt        hash    the checkpoint, if it was begun
--   4 data        hash    rank -> its share
--   5 events      stream  for people and handles
-- ARGV
--   1 run         string  of the save
--   2 step        integer of the save
--   3 rank        integer of the save
--   4 worker      string  worker_id
--   5 incarnation string  of the member
--   6 share       string  JSON object: per data set the state of what it consumed itself and, of rank 0, before the run; empty: nothing
--   7 keep_ms     integer the shares are kept after the last one came
-- RETURNS the state of the checkpoint after the call, empty if it was not begun
-- ERRORS STATE_LOST RECOVERING RUN_UNKNOWN PART_UNKNOWN
-- WRITES run_key ckpt data events
-- IDEMPOTENT by the rank: its first share of a step counts
-- INCLUDE now integer state event seal
local meta, run_key, ckpt, data, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local run, step, rank, worker, incarnation, share, keep_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]

local known = redis.call('HMGET', meta, 'state_id', 'phase')
local lost = state_error(known[1], known[2], known[1])
if lost then return lost end
local seat = redis.call('HMGET', run_key, 'member:' .. worker, 'world_size')
if not seat[2] then return redis.error_reply('RUN_UNKNOWN Redis does not know run ' .. run) end
if not seat[1] or string.match(seat[1], '^%d+ %S+') ~= rank .. ' ' .. incarnation then
  return redis.error_reply('PART_UNKNOWN ' .. worker .. ' was not rank ' .. rank .. ' of run ' .. run .. ' as ' .. incarnation)
end
local state = redis.call('HGET', ckpt, 'state')
if state and state ~= 'WRITING' then return state end

redis.call('HSETNX', data, rank, share)
redis.call('PEXPIRE', data, keep_ms)
if share ~= '' then redis.call('HSET', run_key, 'data', 1) end
if not state then return '' end
return ckpt_seal(ckpt, run_key, data, events, run, step, now_ms())
