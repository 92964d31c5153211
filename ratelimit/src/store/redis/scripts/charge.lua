#!lua
-- Debits and credits that are final: no reservation, no leases. For callers that come back with nothing.
-- KEYS   one record per charge; the same record may come again
-- ARGV   numbers, as doubles: charges; per charge: rule (0 all or nothing, 1 always, 2 note), kind 1-5, capacity,
--        needed, added, num, den. Amounts in micro-units, added may be negative, rates as num/den per us
-- reply  doubles: outcome (0 charged, 1 limited), wait us or -1 never, now us;
--        per charge: verdict (0 fits, 1 wait, 2 never), wait us, remaining, reset us or -1 never
-- Atomic because an all-or-nothing charge that does not fit must leave everything as it was. Where only an always
-- charge does not fit, the others of all or nothing are left out, and it is written all the same. Charges of one
-- record see each other, in order. What a record holds of other kinds is kept.
local numbers = ARGV[1]
local n, at = get('<d', numbers)
local now = clock()
local charges, raws, before, judged = {}, {}, {}, {}

for i = 1, n do
  local key = KEYS[i]
  if not before[key] then
    raws[key] = read_record(key, redis.call('GET', key))
    before[key], judged[key] = {}, {}
    for f = 1, 10 do
      local figure = raws[key] and get('<d', raws[key], 8 * f - 6) or 0
      before[key][f], judged[key][f] = figure, figure
    end
  end
  local c = { key = key }
  c.rule, c.kind, c.cap, c.needed, c.added, c.num, c.den, at = get('<ddddddd', numbers, at)
  charges[i] = c
end

local function load(c, record)
  c.level, c.ts = record[2 * c.kind - 1], record[2 * c.kind]
  -- Lost with an older data set for all we know, as in meter().
  if not raws[c.key] and c.ts == 0 and BIRTH > 0 and c.num > 0 then c.level, c.ts = c.cap, BIRTH end
  c.now = c.level
  if c.level > 0 then c.now = max(c.level - drained(now - c.ts, c.num, c.den), 0) end
end
local function store(c, record) record[2 * c.kind - 1], record[2 * c.kind] = c.level, c.ts end

local refused, over, never, wait = false, false, false, 0
for _, c in ipairs(charges) do
  local record = judged[c.key]
  load(c, record)
  c.verdict, c.wait = judge(c, c.needed, now)
  if c.verdict ~= 0 and c.rule < 2 then
    if c.rule == 0 then refused = true else over = true end
    if c.verdict == 2 then never = true end
    wait = max(wait, c.wait)
  end
  apply(c, c.added, now)
  store(c, record)
end

-- Long before the largest number there is.
local ALWAYS = FOREVER - 1000000000
local written = {}
for _, c in ipairs(charges) do
  if c.added ~= 0 and not refused and not (over and c.rule == 0) then
    local record = before[c.key]
    load(c, record)
    apply(c, c.added, now)
    store(c, record)
    written[c.key] = written[c.key] or {}
    written[c.key][c.kind] = c
  end
end

-- How long a record lives yet, without the margin.
local function had(key)
  local raw = raws[key]
  if raw and #raw == 89 then return get('<d', raw, 82) - now - 10000000 end
  local ms = redis.call('PTTL', key)
  if ms == -1 then return ALWAYS - now end
  return max(ms, 0) * 1000
end

-- The life of the kinds that are not charged is not known here: theirs is what the record had.
for key, kinds in pairs(written) do
  local record, life, others = before[key], 0, false
  for kind = 1, 5 do
    local c = kinds[kind]
    if c then
      load(c, record)
      standing(c, now)
      if c.left < 0 then life = ALWAYS - now else life = max(life, c.left) end
    elseif record[2 * kind - 1] > 0 then
      others = true
    end
  end
  if others then life = max(life, had(key)) end
  write_figures(key, raws[key], put(FIGURES, unpack(record)), life, now)
end

local out, size = { (refused or over) and 1 or 0, never and -1 or wait, now }, 3
for _, c in ipairs(charges) do
  load(c, before[c.key])
  out[size + 1], out[size + 2] = c.verdict, c.wait
  out[size + 3], out[size + 4] = standing(c, now)
  size = size + 4
end
return put('<' .. ('d'):rep(size), unpack(out))
