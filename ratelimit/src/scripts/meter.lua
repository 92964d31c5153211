-- The arithmetic of meters and the form of records; inserted below the first line of every script.
-- Twin of budget.rs: same operations, same order, so both give the same bits. Change both or neither.
-- math.fmod, not %: Lua's % divides and multiplies, fmod is exact.
local floor, ceil, fmod, max, min, fmt = math.floor, math.ceil, math.fmod, math.max, math.min, string.format
local MICRO, LEVEL_MAX = 1e6, 9e15
local FOREVER, EXACT = 9007199254740991, 4503599627370496
local VERSION, SHAPE = 1, '<Bdddddddddd'
-- The birth of the data set in us, last of every script's arguments; 0 when missing meters are empty.
local BIRTH = tonumber(ARGV[#ARGV]) or 0

local function int(x) return fmt('%.0f', x) end

local function drained(elapsed, num, den)
  if num == 0 or elapsed <= 0 then return 0 end
  local rest = fmod(elapsed, den)
  local whole = (elapsed - rest) / den * num
  local product = rest * num
  local part = (product - fmod(product, den)) / den
  if product > EXACT then part = max(part - 4, 0) end
  return whole + part
end

-- Shortest time that drains `need`; nil when no time does.
local function time_to_drain(need, num, den)
  if need <= 0 then return 0 end
  if num == 0 then return nil end
  local rest = fmod(need, num)
  local product = rest * den
  local over = fmod(product, num)
  local time = (need - rest) / num * den + (product - over) / num
  if over > 0 then time = time + 1 end
  if drained(time, num, den) < need then time = time + ceil(8 * den / num) + 1 end
  return min(time, FOREVER)
end

local function level_at(m, now) return max(m.level - drained(now - m.ts, m.num, m.den), 0) end

-- 0 fits; 1, wait; 2 never.
local function judge(m, cost, now)
  if cost > m.cap then return 2, 0 end
  local room = m.cap - cost
  if level_at(m, now) <= room then return 0, 0 end
  local time = time_to_drain(m.level - room, m.num, m.den)
  if not time then return 2, 0 end
  return 1, min(max(m.ts + time - now, 1), FOREVER)
end

local function apply(m, delta, now)
  if delta == 0 then return end
  local level = level_at(m, now)
  if delta > 0 then
    m.level = min(level + delta, max(min(2 * m.cap, LEVEL_MAX), level))
  else
    m.level = max(level + delta, 0)
  end
  m.ts = max(m.ts, now)
end

-- Until empty; -1 when never.
local function reset(m, now)
  if level_at(m, now) == 0 then return 0 end
  local time = time_to_drain(m.level, m.num, m.den)
  if not time then return -1 end
  return min(max(m.ts + time - now, 0), FOREVER)
end

-- Whole units left. Money (kind 5) comes in millionths already.
local function remaining(m, now)
  return floor(max(m.cap - level_at(m, now), 0) / (m.kind == 5 and 1 or MICRO))
end

-- A record is one string: a version byte, then level and moment of each kind. Absent (the second value) is empty.
local function read_record(key)
  local raw = redis.call('GET', key)
  if not raw then return { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, true end
  if #raw ~= 81 or raw:byte(1) ~= VERSION then error({ err = 'WRONGTYPE record of another version' }) end
  local version, a, b, c, d, e, f, g, h, i, j = struct.unpack(SHAPE, raw)
  return { a, b, c, d, e, f, g, h, i, j }
end

-- Kinds that are not limited are stored as zero. The record lives until its last meter is empty, and a margin; for a
-- meter that never drains, for its period, which is what its den then is.
local function write_record(key, meters, now)
  local r, life = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, 0
  for _, m in ipairs(meters) do
    r[2 * m.kind - 1], r[2 * m.kind] = m.level, m.ts
    local left = reset(m, now)
    life = max(life, left < 0 and m.den or left)
  end
  local raw = struct.pack(SHAPE, VERSION, r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10])
  redis.call('SET', key, raw, 'PX', int(ceil(life / 1000) + 10000))
end

local function clock()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

-- A lease counts while its score is in the future.
local function live(key, now) return redis.call('ZCOUNT', key, '(' .. int(now), '+inf') end

-- Time until enough leases have expired for one more under `limit`; nil when it is closed.
local function lease_wait(key, count, limit, now)
  if limit == 0 then return nil end
  local first = redis.call('ZRANGEBYSCORE', key, '(' .. int(now), '+inf', 'WITHSCORES', 'LIMIT', count - limit, 1)
  return first[2] and max(tonumber(first[2]) - now, 1) or 1
end

local function take_lease(key, id, now, ttl)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now))
  redis.call('ZADD', key, int(now + ttl), id)
  local life = ceil(ttl / 1000) + 10000
  if redis.call('PTTL', key) < life then redis.call('PEXPIRE', key, int(life)) end
end

-- A reservation: { version, state, lease key of the slot or '', { record key, reserved x 5 }, ... }.
-- State 0 is open, 1 settled, 2 ended before it was ever granted.
local function read_reservation(key)
  local raw = redis.call('GET', key)
  if not raw then return nil end
  local held = cmsgpack.unpack(raw)
  if type(held) ~= 'table' or held[1] ~= VERSION then error({ err = 'WRONGTYPE reservation of another version' }) end
  return held
end

-- One limit in a reply: verdict, wait, remaining, reset (-1 never). Whole numbers only; replies truncate.
local function report(out, verdict, wait, left, empty)
  local n = #out
  out[n + 1], out[n + 2], out[n + 3], out[n + 4] = verdict, wait, left, empty
end

-- Reads `count` buckets of a scope from ARGV after position `at`: kind, capacity, amount, num, den.
local function read_meters(key, count, at)
  if count == 0 then return {} end
  local record, absent = read_record(key)
  local meters = {}
  for b = 1, count do
    local k = tonumber(ARGV[at + 1])
    meters[b] = { kind = k, cap = tonumber(ARGV[at + 2]), amount = tonumber(ARGV[at + 3]),
      num = tonumber(ARGV[at + 4]), den = tonumber(ARGV[at + 5]), level = record[2 * k - 1], ts = record[2 * k] }
    -- Lost with an older data set for all we know: as if full when this one was born. One that does not drain
    -- would stay full, so it starts empty.
    if absent and BIRTH > 0 and meters[b].num > 0 then meters[b].level, meters[b].ts = meters[b].cap, BIRTH end
    at = at + 5
  end
  return meters
end
