-- The arithmetic of meters and the form of records. Twin of budget.rs: same operations, same order, so both give the
-- same bits. Change both or neither. math.fmod, not %: Lua's % divides and multiplies, fmod is exact.
-- Every call makes these functions anew, so the scripts that decide requests work with levels they have computed once
-- and not with a function per question.
local floor, ceil, fmod, max, min, fmt = math.floor, math.ceil, math.fmod, math.max, math.min, string.format
local get, put = struct.unpack, struct.pack
local MICRO, LEVEL_MAX = 1e6, 9e15
local FOREVER, EXACT = 9007199254740991, 4503599627370496
-- The birth of the data set in us, last of every script's arguments; 0 when missing meters are empty.
local BIRTH = tonumber(ARGV[#ARGV]) or 0

local function int(x) return fmt('%.0f', x) end

local function clock()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

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
  -- Where nothing was rounded, the time is enough by itself.
  if (num * den > EXACT or time > EXACT) and drained(time, num, den) < need then
    time = time + ceil(8 * den / num) + 1
  end
  return min(time, FOREVER)
end

-- A record is one string: a version byte, level and moment of each of five kinds, and when it expires, us. One of
-- version 1 has no expiry. Absent is empty.
local FIGURES = '<dddddddddd'

local function read_record(key, raw)
  if not raw then
    -- A list of keys shows a value of another type as absent; this fails then.
    raw = redis.call('GET', key)
    if not raw then return nil end
  end
  local version = raw:byte(1)
  if not (version == 2 and #raw == 89 or version == 1 and #raw == 81) then
    error({ err = 'WRONGTYPE record of another version' })
  end
  return raw
end

-- One bucket as the call describes it and the record knows it; `now` in it is its level at this moment, `left` the
-- time until it is empty (-1 never).
local function meter(raw, kind, cap, num, den, now)
  local level, ts
  if raw then
    level, ts = get('<dd', raw, 16 * kind - 14)
  elseif BIRTH > 0 and num > 0 then
    -- Lost with an older data set for all we know: as if full when this one was born. One that does not drain
    -- would stay full, so it starts empty.
    level, ts = cap, BIRTH
  else
    level, ts = 0, 0
  end
  local at = level
  if level > 0 then at = max(level - drained(now - ts, num, den), 0) end
  return { kind = kind, cap = cap, num = num, den = den, level = level, ts = ts, now = at, left = 0 }
end

-- 0 fits; 1, wait; 2 never.
local function judge(m, cost, now)
  if cost > m.cap then return 2, 0 end
  local room = m.cap - cost
  if m.now <= room then return 0, 0 end
  local time = time_to_drain(m.level - room, m.num, m.den)
  if not time then return 2, 0 end
  return 1, min(max(m.ts + time - now, 1), FOREVER)
end

-- A delta of zero leaves even the moment alone.
local function apply(m, delta, now)
  if delta == 0 then return end
  local level = m.now
  if delta > 0 then
    m.level = min(level + delta, max(min(2 * m.cap, LEVEL_MAX), level))
  else
    m.level = max(level + delta, 0)
  end
  m.ts, m.now = max(m.ts, now), m.level
end

-- The last two figures of a limit in a reply: whole units left (money, kind 5, comes in millionths already), and the
-- time until empty, which is kept for the record's life.
local function standing(m, now)
  local left = 0
  if m.now > 0 then
    left = time_to_drain(m.level, m.num, m.den)
    left = left and min(max(m.ts + left - now, 0), FOREVER) or -1
  end
  m.left = left
  return floor(max(m.cap - m.now, 0) / (m.kind == 5 and 1 or MICRO)), left
end

-- Puts the figures of a record in place. Its life reaches `life` us from now and ten seconds; it is prolonged by a
-- minute at once, since that costs as much as the write.
local function write_figures(key, raw, figures, life, now)
  local needed = now + life + 10000000
  if raw and #raw == 89 and get('<d', raw, 82) >= needed then
    redis.call('SETRANGE', key, '1', figures)
  else
    local expires = min(needed + 60000000, FOREVER)
    redis.call('SET', key, '\2' .. figures .. put('<d', expires), 'PX', int(ceil((expires - now) / 1000)))
  end
end

-- Kinds that are not limited are stored as zero. The record lives until its last meter is empty; for a meter that
-- never drains, for its period, which is what its den then is.
local function write_record(key, raw, meters, from, to, now)
  local r, life = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, 0
  for i = from, to do
    local m = meters[i]
    local k = 2 * m.kind
    r[k - 1], r[k] = m.level, m.ts
    local left = m.left < 0 and m.den or m.left
    if left > life then life = left end
  end
  write_figures(key, raw, put(FIGURES, r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10]), life, now)
end
