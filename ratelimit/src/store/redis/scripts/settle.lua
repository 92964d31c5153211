#!lua flags=allow-oom
-- Ends reservations that are under the same limits, one after the other: applies actual - reserved once and frees
-- their leases.
-- KEYS   n scope records; a reservation per request; n scope lease sets; m lease sets of slots; a usage record if
--        there is something to note
-- ARGV   numbers, as doubles: n, m, requests, most models of usage (0 notes nothing); per scope: concurrency (-1 none),
--        buckets, then per bucket kind 1-5, capacity, num, den; per request: actual of every bucket, lease set of its
--        slot from 1 or 0, and if there is something to note requests, input, output, money;
--        tombstone life ms (0 undoes without a trace: no tombstone); per request: id; then for usage: model, name of the
--        models beyond the most, life ms
-- reply  doubles, per request: applied 0|1, now us; per limit: verdict, wait us, remaining, reset us (see acquire)
--        for a cost of zero
-- Atomic because a reservation must be used up in the same step that applies it. A tombstone stays behind so
-- that a second settle, or an acquire that arrives late, is recognised. Without a record (expired, or lost with
-- the data set) what was reserved is unknown: the actual is debited, nothing is credited. Usage is noted exactly
-- when the actual is charged. Runs under memory
-- pressure: freeing and crediting is what relieves it. Leases go first: removing is harmless to repeat, and whatever
-- could fail has failed then.
local numbers, keep, first_id = ARGV[1], ARGV[2], 2
local n, m, requests, models_max, at = get('<dddd', numbers)
local now = clock()
local got = redis.call('MGET', unpack(KEYS, 1, n + requests))
local leases = n + requests

-- The line of usage: a version byte, then requests, input, output, money.
local usage
if models_max > 0 then
  usage = { key = KEYS[#KEYS], model = ARGV[first_id + requests + 1], changed = false }
  local raw = redis.call('HGET', usage.key, usage.model)
  if not raw then
    local models = redis.call('HLEN', usage.key)
    usage.begins = models == 0
    if models >= models_max then
      usage.model = ARGV[first_id + requests + 2]
      raw = redis.call('HGET', usage.key, usage.model)
    end
  end
  local version, line = 1, { 0, 0, 0, 0 }
  if raw then version, line[1], line[2], line[3], line[4] = get('<Bdddd', raw) end
  if version ~= 1 then error({ err = 'WRONGTYPE usage of another version' }) end
  usage.line = line
end

local scopes, meters, count = {}, {}, 0
for s = 1, n do
  local limit, buckets
  limit, buckets, at = get('<dd', numbers, at)
  local raw
  if buckets > 0 then raw = read_record(KEYS[s], got[s]) end
  local from = count + 1
  for _ = 1, buckets do
    local kind, cap, num, den
    kind, cap, num, den, at = get('<dddd', numbers, at)
    count = count + 1
    meters[count] = meter(raw, kind, cap, num, den, now)
  end
  scopes[s] = { from = from, to = count, limit = limit, raw = raw, changed = false }
end

-- Of each lease set, who leaves it. A reservation knows where it holds a lease; without one each set is asked.
local leaving = {}
local function leave(k, id)
  local ids = leaving[k]
  if ids then ids[#ids + 1] = id else leaving[k] = { id } end
end

local shape = '<' .. ('d'):rep(count + (usage and 5 or 1))
local all_reserved, all_actual, all_held = {}, {}, {}
for r = 1, requests do
  local id, held, reserved = ARGV[first_id + r], read_reservation(got[n + r]), {}
  local actual = { get(shape, numbers, at) }
  at = actual[#actual]
  local known = held and held[2] == 0 and held[1] == 2
  if known then
    local i = 4
    while held[i] do
      reserved[held[i]] = i
      i = i + 3 + 2 * held[i + 2]
    end
  elseif held and held[2] == 0 then
    for i = 4, #held do reserved[held[i][1]] = held[i] end
  end
  for s = 1, n do
    local place = reserved[KEYS[s]]
    if scopes[s].limit >= 0 or not known or place and held[place + 1] == 1 then leave(leases + s, id) end
  end
  local slot = actual[count + 1]
  if slot > 0 then leave(leases + n + slot, id) end
  all_reserved[r], all_actual[r], all_held[r] = reserved, actual, held
  if usage and (not held or held[2] == 0) then
    local line = usage.line
    for i = 1, 4 do line[i] = max(min(line[i] + actual[count + 1 + i], LEVEL_MAX), -LEVEL_MAX) end
    usage.changed = true
  end
end
for k, ids in pairs(leaving) do redis.call('ZREM', KEYS[k], unpack(ids)) end

local applied = {}
for s = 1, n do
  local scope = scopes[s]
  if scope.limit >= 0 then
    local key = KEYS[leases + s]
    scope.live = live(key, now)
    if scope.live >= scope.limit then scope.wait = lease_wait(key, scope.live, scope.limit, now) end
  end
end
local replies = {}
for r = 1, requests do
  local held, reserved, actual = all_held[r], all_reserved[r], all_actual[r]
  local open = held and held[2] == 0
  applied[r] = open
  for s = 1, n do
    local scope, place = scopes[s], reserved[KEYS[s]]
    if open or not held then
      for i = scope.from, scope.to do
        local b, before = meters[i], 0
        if type(place) == 'table' then
          before = place[1 + b.kind]
        elseif place then
          for k = place + 3, place + 1 + 2 * held[place + 2], 2 do
            if held[k] == b.kind then before = held[k + 1] end
          end
        end
        local delta = actual[i] - before
        if delta ~= 0 then
          apply(b, delta, now)
          scope.changed = true
        end
      end
    end
  end
  local out, size = { open and 1 or 0, now }, 2
  for s = 1, n do
    local scope = scopes[s]
    for i = scope.from, scope.to do
      local b = meters[i]
      local verdict, wait = judge(b, 0, now)
      local left, empty = standing(b, now)
      out[size + 1], out[size + 2], out[size + 3], out[size + 4] = verdict, wait, left, empty
      size = size + 4
    end
    if scope.limit >= 0 then
      local full = scope.live >= scope.limit
      out[size + 1], out[size + 2] = full and (scope.wait and 1 or 2) or 0, scope.wait or 0
      out[size + 3], out[size + 4] = max(scope.limit - scope.live, 0), 0
      size = size + 4
    end
  end
  replies[r] = put('<' .. ('d'):rep(size), unpack(out))
end

for s = 1, n do
  local scope = scopes[s]
  if scope.changed then write_record(KEYS[s], scope.raw, meters, scope.from, scope.to, now) end
end
if usage and usage.changed then
  redis.call('HSET', usage.key, usage.model, put('<Bdddd', 1, unpack(usage.line)))
  if usage.begins then redis.call('PEXPIRE', usage.key, ARGV[first_id + requests + 3]) end
end
for r = 1, requests do
  local held, key = all_held[r], KEYS[n + r]
  if keep == '0' then
    if applied[r] then redis.call('DEL', key) end
  elseif applied[r] then
    redis.call('SET', key, cmsgpack.pack({ 2, 1, held[3] }), 'PX', keep)
  elseif not held then
    redis.call('SET', key, cmsgpack.pack({ 2, 2, '' }), 'PX', keep)
  end
end
return table.concat(replies)
