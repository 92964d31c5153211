#!lua
-- Decides requests that are under the same limits, one after the other: every limit of each, and a slot at its first
-- candidate that has one.
-- KEYS   n scope records; a reservation per request; n scope lease sets; m candidates' lease sets
-- ARGV   numbers, as doubles: lease ttl us, n, m, requests; per scope: shadow 0|1, concurrency (-1 none), touch 0|1,
--        buckets, then per bucket kind 1-5, capacity, num, den; per candidate's lease set: touch 0|1;
--        per request: cost of every bucket, candidates, then per candidate: lease set from 1, maximum, largest part
--        of what all candidates and others have in millionths (0 unbounded), what others have.
--        Amounts in micro-units, rates as num/den per us;
--        reservation life ms (0 judges and writes nothing); per request: id
-- reply  doubles, per request: outcome (0 granted, 1 limited, 2 no slot, 3 granted before), candidate from 0 or -1,
--        wait us or -1 never, now us; per limit: verdict (0 fits, 1 wait, 2 never), wait us, remaining, reset us or
--        -1 never
-- Atomic because a refusal by any limit must leave all of them as they were: nothing is written before every
-- read is done. A granted id seen again gets the stored grant and pays nothing.
local numbers, keep, first_id = ARGV[1], ARGV[2], 2
local ttl, n, m, requests, at = get('<dddd', numbers)
local now = clock()
local got = redis.call('MGET', unpack(KEYS, 1, n + requests))
local leases, slots = n + requests, 2 * n + requests

local scopes, meters, count = {}, {}, 0
for s = 1, n do
  local shadow, limit, touch, buckets
  shadow, limit, touch, buckets, at = get('<dddd', numbers, at)
  local raw
  if buckets > 0 then raw = read_record(KEYS[s], got[s]) end
  local from = count + 1
  for _ = 1, buckets do
    local kind, cap, num, den
    kind, cap, num, den, at = get('<dddd', numbers, at)
    count = count + 1
    meters[count] = meter(raw, kind, cap, num, den, now)
  end
  local scope = { from = from, to = count, enforced = shadow == 0, limit = limit, touch = touch == 1, raw = raw }
  if limit >= 0 then
    scope.live, scope.taken = live(KEYS[leases + s], now), {}
    scope.before = scope.live
  end
  scopes[s] = scope
end
local touched = m > 0 and { get('<' .. ('d'):rep(m), numbers, at) } or {}
at = at + 8 * m

-- The leases of a candidate, counted when first asked for. Without what has expired only where that matters.
local places = {}
local function room(c, limit)
  local place = places[c]
  if not place then
    place = { live = redis.call('ZCARD', KEYS[slots + c]), all = true, taken = {} }
    place.before, places[c] = place.live, place
  end
  if place.all and place.live >= limit then
    local counted = live(KEYS[slots + c], now)
    place.live, place.before, place.all = counted + place.live - place.before, counted, false
  end
  return place, place.live < limit
end

-- What the candidates of a request have in flight, each counted once.
local function present(candidates, at)
  local sum, seen = 0, {}
  for c = 1, candidates do
    local which = get('<d', numbers, at + 32 * (c - 1))
    if not seen[which] then
      seen[which], sum = true, sum + room(which, 0).live
    end
  end
  return sum
end

-- Time until there is one place more under `limit`; nil when it is closed. Places taken by this call are in no set yet.
local function opens(key, before, count, limit)
  if limit == 0 then return nil end
  local nth = count - limit
  local after = before > 0 and lease_wait(key, min(nth, before - 1) + limit, limit, now) or 1
  return nth < before and after or max(after, ttl)
end

local score = int(now + ttl)
local shape = '<' .. ('d'):rep(count + 1)
local replies, reservations, changed = {}, {}, {}
for r = 1, requests do
  local id, held = ARGV[first_id + r], read_reservation(got[n + r])
  local costs = { get(shape, numbers, at) }
  local candidates = costs[count + 1]
  at = costs[count + 2]
  local verdicts, waits, refused, never, wait = {}, {}, false, false, 0
  for s = 1, n do
    local scope = scopes[s]
    for i = scope.from, scope.to do
      local verdict, after = 0, 0
      if not held then
        verdict, after = judge(meters[i], costs[i], now)
        if verdict ~= 0 and scope.enforced then
          refused, never, wait = true, never or verdict == 2, max(wait, after)
        end
      end
      verdicts[i], waits[i] = verdict, after
    end
    if scope.limit >= 0 then
      scope.verdict, scope.wait = 0, 0
      if not held and scope.live >= scope.limit then
        local after = opens(KEYS[leases + s], scope.before, scope.live, scope.limit)
        scope.verdict, scope.wait = after and 1 or 2, after or 0
        if scope.enforced then
          refused, never, wait = true, never or not after, max(wait, scope.wait)
        end
      end
    end
  end

  local slot, outcome, taken = -1, 0
  if held then
    wait = 0
    outcome = 3
    if held[2] == 2 then outcome, wait = 1, -1 end
    for c = 1, candidates do
      if KEYS[slots + get('<d', numbers, at + 32 * (c - 1))] == held[3] then slot = c - 1 end
    end
  elseif refused then
    outcome = 1
    if never then wait = -1 end
  elseif candidates > 0 then
    local soonest, all
    for c = 1, candidates do
      local which, limit, part, elsewhere = get('<dddd', numbers, at + 32 * (c - 1))
      if part > 0 then
        all = all or present(candidates, at)
        limit = min(limit, max(1, ceil(part * (all + elsewhere + 1) / 1000000)))
      end
      local place, free = room(which, limit)
      if free then
        slot, taken = c - 1, which
        break
      end
      local after = opens(KEYS[slots + which], place.before, place.live, limit)
      if after then soonest = min(soonest or after, after) end
    end
    if slot < 0 then outcome, wait = 2, soonest or ttl end
  end
  at = at + 32 * candidates

  if outcome == 0 and keep ~= '0' then
    local reservation = { 2, 0, taken and KEYS[slots + taken] or '' }
    local size = 3
    for s = 1, n do
      local scope, kinds = scopes[s], 0
      local head = size
      size = size + 3
      for i = scope.from, scope.to do
        if costs[i] > 0 then
          local b = meters[i]
          local before = b.now
          apply(b, costs[i], now)
          reservation[size + 1], reservation[size + 2] = b.kind, b.level - before
          kinds, size = kinds + 1, size + 2
        end
      end
      reservation[head + 1], reservation[head + 2], reservation[head + 3] = KEYS[s], scope.limit >= 0 and 1 or 0, kinds
      if kinds > 0 then changed[s] = true end
      if scope.limit >= 0 then
        local ids = scope.taken
        ids[#ids + 1], ids[#ids + 2] = score, id
        scope.live = scope.live + 1
      end
    end
    if taken then
      local place = places[taken]
      local ids = place.taken
      ids[#ids + 1], ids[#ids + 2] = score, id
      place.live = place.live + 1
    end
    reservations[r] = cmsgpack.pack(reservation)
  end

  local out, size = { outcome, slot, wait, now }, 4
  for s = 1, n do
    local scope = scopes[s]
    for i = scope.from, scope.to do
      local left, empty = standing(meters[i], now)
      out[size + 1], out[size + 2], out[size + 3], out[size + 4] = verdicts[i], waits[i], left, empty
      size = size + 4
    end
    if scope.limit >= 0 then
      out[size + 1], out[size + 2], out[size + 3] = scope.verdict, scope.wait, max(scope.limit - scope.live, 0)
      out[size + 4] = 0
      size = size + 4
    end
  end
  replies[r] = put('<' .. ('d'):rep(size), unpack(out))
end

for s = 1, n do
  local scope = scopes[s]
  if changed[s] then write_record(KEYS[s], scope.raw, meters, scope.from, scope.to, now) end
  if scope.taken and scope.taken[1] then
    take_leases(KEYS[leases + s], scope.taken, scope.before, scope.touch, ttl, now)
  end
end
for c, place in pairs(places) do
  if place.taken[1] then
    take_leases(KEYS[slots + c], place.taken, place.before, touched[c] == 1, ttl, now)
  end
end
for r, reservation in pairs(reservations) do redis.call('SET', KEYS[n + r], reservation, 'PX', keep) end
return table.concat(replies)
