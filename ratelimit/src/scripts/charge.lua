#!lua
-- Debits and credits that are final: no reservation, no leases. For callers that come back with nothing.
-- KEYS   one record per charge; the same record may come again
-- ARGV   charges; per charge: rule (0 all or nothing, 1 always, 2 note), kind 1-5, capacity, needed, added, num, den.
--        Amounts in micro-units, added may be negative, rates as num/den per us
-- reply  outcome (0 charged, 1 limited), wait us or -1 never, now us;
--        per charge: verdict (0 fits, 1 wait, 2 never), wait us, remaining, reset us or -1 never
-- Atomic because an all-or-nothing charge that does not fit must leave everything as it was. Where only an always
-- charge does not fit, the others of all or nothing are left out, and it is written all the same. Charges of one
-- record see each other, in order. What a record holds of other kinds is kept.
local n, at = tonumber(ARGV[1]), 1
local now = clock()
local charges, before, judged = {}, {}, {}

local function copy(record)
  local twin = {}
  for i = 1, 10 do twin[i] = record[i] end
  return twin
end

local function load(c, record) c.level, c.ts = record[2 * c.kind - 1], record[2 * c.kind] end
local function store(c, record) record[2 * c.kind - 1], record[2 * c.kind] = c.level, c.ts end

for i = 1, n do
  local key = KEYS[i]
  if not before[key] then
    before[key] = read_record(key)
    judged[key] = copy(before[key])
  end
  charges[i] = { key = key, rule = tonumber(ARGV[at + 1]), kind = tonumber(ARGV[at + 2]), cap = tonumber(ARGV[at + 3]),
    needed = tonumber(ARGV[at + 4]), added = tonumber(ARGV[at + 5]), num = tonumber(ARGV[at + 6]),
    den = tonumber(ARGV[at + 7]) }
  at = at + 7
end

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

-- The life of the kinds that are not charged is not known here: theirs is what the record had.
for key, kinds in pairs(written) do
  local record, life, others = before[key], 0, false
  for kind = 1, 5 do
    local c = kinds[kind]
    if c then
      load(c, record)
      local left = reset(c, now)
      if left < 0 or life < 0 then life = -1 else life = max(life, ceil(left / 1000) + 10000) end
    elseif record[2 * kind - 1] > 0 then
      others = true
    end
  end
  local had = others and redis.call('PTTL', key) or -2
  if had == -1 then life = -1 elseif life >= 0 then life = max(life, had) end
  local r = record
  local raw = struct.pack(SHAPE, VERSION, r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10])
  if life < 0 then
    redis.call('SET', key, raw)
  else
    redis.call('SET', key, raw, 'PX', int(life))
  end
end

local out = { (refused or over) and 1 or 0, never and -1 or wait, now }
for _, c in ipairs(charges) do
  load(c, before[c.key])
  report(out, c.verdict, c.wait, remaining(c, now), reset(c, now))
end
return out
