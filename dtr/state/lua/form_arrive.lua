-- One member arrives to form the next run; the arrival that completes it writes the run. Collective: every member calls it until it
-- answers formed. It closes when max members are there, or min and nobody new came for settle_ms, and, in either case, every living
-- member of the previous roster is there. Members of the previous roster come first; asked-for ranks are kept and gaps filled.
-- KEYS
--   1 meta        hash    the job's state
--   2 members     zset    worker -> deadline
--   3 fences      hash    worker -> incarnation
--   4 roster      hash    of the last run: worker -> rank incarnation
--   5 forming     hash    who has arrived: worker -> incarnation asked_rank host
--   6 wake        stream  interrupts waits
--   7 events      stream  for people
--   8 run_key     hash    the run that this call may create
-- ARGV
--   1 state_id    string  that the member joined
--   2 worker      string  worker_id
--   3 incarnation string  of the member
--   4 asked_rank  integer or -1
--   5 host        string  host id
--   6 min         integer of members
--   7 max         integer of members
--   8 settle_ms   integer an elastic run waits this long after the last newcomer
--   9 new_run     string  name of the run that this call may create: NUMBER-SUFFIX
--  10 after_run   string  the run that the caller was in and left, or empty
-- RETURNS {'formed', run, wake_id} | {'wait', arrived, settle_left_ms} | {'again', counter}: propose a NUMBER above counter
-- ERRORS STATE_LOST RECOVERING STALE_INCARNATION INVALID
-- WRITES meta roster forming wake events run_key
-- IDEMPOTENT an arrival is a set; once formed, the answer is the run that the member is in
-- INCLUDE now integer state event
local meta, members, fences, roster, forming = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local wake, events, run_key = KEYS[6], KEYS[7], KEYS[8]
local state_id, worker, incarnation, asked_rank, host = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local min, max, settle_ms, new_run, after_run = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9], ARGV[10]

local held = redis.call('HMGET', meta, 'state_id', 'phase', 'generation', 'run', 'last_run', 'run_counter', 'forming_at', 'forming_world',
  'wake_id')
local lost = state_error(held[1], held[2], state_id)
if lost then return lost end
if redis.call('HGET', fences, worker) ~= incarnation then
  return redis.error_reply('STALE_INCARNATION ' .. worker .. ' is no longer registered as ' .. incarnation)
end
local run, last_run, counter = held[4], held[5] or '', tonumber(held[6])
local number = tonumber(string.match(new_run, '^%d+'))
local place = redis.call('HGET', roster, worker)
if run ~= '' and run ~= after_run and place and string.match(place, ' (%S+)$') == incarnation then
  return {'formed', run, held[9] or '0-0'}
end

-- Who is there, without those who were replaced or died.
local now = now_ms()
local arrived, ranks, hosts, stale, count = {}, {}, {}, {}, 0
local known = redis.call('HGETALL', fences)
local alive = {}
for i = 1, #known, 2 do alive[known[i]] = known[i + 1] end
local entries = redis.call('HGETALL', forming)
for i = 1, #entries, 2 do
  local inc, asked, where = string.match(entries[i + 1], '^(%S+) (%S+) (%S*)$')
  if alive[entries[i]] == inc then
    arrived[entries[i]], ranks[entries[i]], hosts[entries[i]], count = inc, tonumber(asked), where, count + 1
  else
    stale[#stale + 1] = entries[i]
  end
end
local world = min .. ' ' .. max
if count > 0 and held[8] and held[8] ~= world then
  return redis.error_reply('INVALID world_size: this member asks for ' .. min .. ' to ' .. max .. ', the members that are forming for '
    .. string.gsub(held[8], ' ', ' to '))
end
local forming_at = tonumber(held[7] or 0)
local newcomer = arrived[worker] ~= incarnation
if newcomer then
  arrived[worker], ranks[worker], hosts[worker], count, forming_at = incarnation, tonumber(asked_rank), host, count + 1, now
end

-- May it close?
local previous = redis.call('HGETALL', roster)
local was, missing_previous = {}, 0
for i = 1, #previous, 2 do
  local rank, inc = string.match(previous[i + 1], '^(%d+) (%S+)$')
  if string.sub(previous[i], 1, 1) ~= ':' and alive[previous[i]] == inc then
    was[previous[i]] = tonumber(rank)
    if not arrived[previous[i]] then missing_previous = missing_previous + 1 end
  end
end
local settle_left = count >= max and 0 or math.min(settle_ms, math.max(0, forming_at + settle_ms - now))
local closes = missing_previous == 0 and count >= min and settle_left == 0
if closes and number <= counter then return {'again', counter} end

for _, gone in ipairs(stale) do redis.call('HDEL', forming, gone) end
if newcomer then
  redis.call('HSET', forming, worker, incarnation .. ' ' .. asked_rank .. ' ' .. host)
  redis.call('HSET', meta, 'forming_at', integer(now), 'forming_world', world)
end
if not closes and run ~= '' and not place then redis.call('HSET', roster, ':wanted', 'form') end
if not closes then return {'wait', count, settle_left} end

-- Seats: members of the previous roster first, then by the rank they ask for, then by name.
local names = {}
for name in pairs(arrived) do names[#names + 1] = name end
local function before(a, b)
  if (was[a] ~= nil) ~= (was[b] ~= nil) then return was[a] ~= nil end
  local x, y = ranks[a] < 0 and 2 ^ 31 or ranks[a], ranks[b] < 0 and 2 ^ 31 or ranks[b]
  if x ~= y then return x < y end
  return a < b
end
table.sort(names, before)
local size = math.min(count, max)
local seat, taken = {}, {}
for i = 1, size do
  local wish = ranks[names[i]] >= 0 and ranks[names[i]] or was[names[i]] or -1
  if wish >= 0 and wish < size and not taken[wish] then seat[names[i]], taken[wish] = wish, true end
end
local free = 0
local places, record = {}, {}
for i = 1, size do
  local name = names[i]
  if not seat[name] then
    while taken[free] do free = free + 1 end
    seat[name], taken[free] = free, true
  end
  places[#places + 1], places[#places + 2] = name, seat[name] .. ' ' .. arrived[name]
  record[#record + 1], record[#record + 2] = 'member:' .. name, seat[name] .. ' ' .. arrived[name] .. ' ' .. hosts[name]
end

redis.call('DEL', roster)
redis.call('HSET', roster, ':fence', state_id .. ' ' .. new_run, ':world', size .. ' ' .. max)
for i = 1, #places, 1000 do
  redis.call('HSET', roster, unpack(places, i, math.min(i + 999, #places)))
  redis.call('HSET', run_key, unpack(record, i, math.min(i + 999, #record)))
end
for i = 1, size do redis.call('HDEL', forming, names[i]) end
redis.call('HSET', run_key, 'world_size', size, 'generation', held[3], 'previous', last_run, 'base_state', 'NONE', 'formed_at', integer(now))
redis.call('HSET', meta, 'run', new_run, 'last_run', new_run, 'run_counter', number, 'world_size', size, 'world_max', max)
emit(events, 'run_formed', 'run', new_run, 'world_size', size, 'previous', last_run)
local wake_id = redis.call('XADD', wake, 'MAXLEN', '~', 1000, '*', 'news', 'formed', 'run', new_run)
redis.call('HSET', meta, 'wake_id', wake_id)
if not seat[worker] then return {'wait', count - size, settle_ms} end
return {'formed', new_run, wake_id}
