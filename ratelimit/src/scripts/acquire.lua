#!lua
-- Decides every limit of a request and takes a slot at the first candidate that has one.
-- KEYS   reservation; n scope records; n scope lease sets; m candidate lease sets
-- ARGV   id, lease ttl us, reservation life ms (0 judges and writes nothing), n, m;
--        per scope: shadow 0|1, concurrency (-1 none), buckets, then per bucket kind 1-5, capacity, cost,
--        num, den; per candidate: maximum. Amounts in micro-units, rates as num/den per us.
-- reply  outcome (0 granted, 1 limited, 2 no slot, 3 granted before), slot from 0 or -1, wait us or -1 never, now us;
--        per limit: verdict (0 fits, 1 wait, 2 never), wait us, remaining, reset us or -1 never
-- Atomic because a refusal by any limit must leave all of them as they were: nothing is written before every
-- read is done. A granted id seen again gets the stored grant and pays nothing.
local id, ttl, keep = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local n, m, at = tonumber(ARGV[4]), tonumber(ARGV[5]), 5
local now = clock()
local held = read_reservation(KEYS[1])
local scopes, refused, never, wait = {}, false, false, 0

local function refuse(verdict, after)
  refused = true
  if verdict == 2 then never = true end
  wait = max(wait, after)
end

for s = 1, n do
  local scope = { shadow = ARGV[at + 1] == '1', limit = tonumber(ARGV[at + 2]), leases = KEYS[1 + n + s] }
  local count = tonumber(ARGV[at + 3])
  scope.meters = read_meters(KEYS[1 + s], count, at + 3)
  at = at + 3 + 5 * count
  for _, b in ipairs(scope.meters) do
    if held then
      b.amount, b.verdict, b.wait = 0, 0, 0
    else
      b.verdict, b.wait = judge(b, b.amount, now)
      if b.verdict ~= 0 and not scope.shadow then refuse(b.verdict, b.wait) end
    end
  end
  if scope.limit >= 0 then
    scope.live, scope.verdict, scope.wait = live(scope.leases, now), 0, 0
    if not held and scope.live >= scope.limit then
      local after = lease_wait(scope.leases, scope.live, scope.limit, now)
      scope.verdict, scope.wait = after and 1 or 2, after or 0
      if not scope.shadow then refuse(scope.verdict, scope.wait) end
    end
  end
  scopes[s] = scope
end

local first, slot, outcome = 1 + 2 * n, -1, 0
if held then
  wait = 0
  outcome = 3
  if held[2] == 2 then outcome, wait = 1, -1 end
  for c = 1, m do
    if KEYS[first + c] == held[3] then slot = c - 1 end
  end
elseif refused then
  outcome = 1
  if never then wait = -1 end
elseif m > 0 then
  local soonest
  for c = 1, m do
    local limit = tonumber(ARGV[at + c])
    local count = live(KEYS[first + c], now)
    if count < limit then
      slot = c - 1
      break
    end
    local after = lease_wait(KEYS[first + c], count, limit, now)
    if after then soonest = min(soonest or after, after) end
  end
  if slot < 0 then outcome, wait = 2, soonest or ttl end
end

if outcome == 0 and keep ~= '0' then
  local reservation = { VERSION, 0, slot >= 0 and KEYS[first + 1 + slot] or '' }
  for s, scope in ipairs(scopes) do
    local reserved, changed = { KEYS[1 + s], 0, 0, 0, 0, 0 }, false
    for _, b in ipairs(scope.meters) do
      local before = level_at(b, now)
      apply(b, b.amount, now)
      if b.amount > 0 then
        reserved[1 + b.kind], changed = b.level - before, true
      end
    end
    if changed then write_record(KEYS[1 + s], scope.meters, now) end
    if scope.limit >= 0 then
      take_lease(scope.leases, id, now, ttl)
      scope.live = scope.live + 1
    end
    reservation[3 + s] = reserved
  end
  if slot >= 0 then take_lease(KEYS[first + 1 + slot], id, now, ttl) end
  redis.call('SET', KEYS[1], cmsgpack.pack(reservation), 'PX', keep)
end

local out = { outcome, slot, wait, now }
for _, scope in ipairs(scopes) do
  for _, b in ipairs(scope.meters) do
    report(out, b.verdict, b.wait, remaining(b, now), reset(b, now))
  end
  if scope.limit >= 0 then
    report(out, scope.verdict, scope.wait, max(scope.limit - scope.live, 0), 0)
  end
end
return out
