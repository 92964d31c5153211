#!lua flags=allow-oom
-- Applies actual - reserved once per reservation and frees its leases.
-- KEYS   reservation; n scope records; n scope lease sets; the slot's lease set if one is held; a usage record if
--        there is something to note
-- ARGV   id, tombstone life ms (0 undoes without a trace: no tombstone), n, slot held 0|1, usage life ms (0 notes
--        nothing); if it is not 0 model, most models, the name of the others, requests, input, output, money;
--        per scope: concurrency (-1 none), buckets, then per bucket kind 1-5, capacity, actual, num, den
-- reply  applied 0|1, now us; per limit: verdict, wait us, remaining, reset us (see acquire) for a cost of zero
-- Atomic because the reservation must be used up in the same step that applies it. A tombstone stays behind so
-- that a second settle, or an acquire that arrives late, is recognised. Without a record (expired, or lost with
-- the data set) what was reserved is unknown: the actual is debited, nothing is credited. Usage is noted exactly
-- when the actual is charged. Runs under memory
-- pressure: freeing and crediting is what relieves it.
local id, n, at, leases_end = ARGV[1], tonumber(ARGV[3]), 5, #KEYS
local now = clock()
local held = read_reservation(KEYS[1])
local open = held and held[2] == 0
local reserved = {}
if open then
  for i = 4, #held do reserved[held[i][1]] = held[i] end
end

-- A line of usage: a version byte, then requests, input, output, money.
local LINE = '<Bdddd'
local usage
if ARGV[5] ~= '0' then
  at, leases_end = 12, #KEYS - 1
  if open or not held then
    usage = { key = KEYS[#KEYS], model = ARGV[6] }
    local raw = redis.call('HGET', usage.key, usage.model)
    if not raw then
      local models = redis.call('HLEN', usage.key)
      usage.begins = models == 0
      if models >= tonumber(ARGV[7]) then
        usage.model = ARGV[8]
        raw = redis.call('HGET', usage.key, usage.model)
      end
    end
    local version, line = VERSION, { 0, 0, 0, 0 }
    if raw then version, line[1], line[2], line[3], line[4] = struct.unpack(LINE, raw) end
    if version ~= VERSION then error({ err = 'WRONGTYPE usage of another version' }) end
    for i = 1, 4 do line[i] = max(min(line[i] + tonumber(ARGV[8 + i]), LEVEL_MAX), -LEVEL_MAX) end
    usage.raw = struct.pack(LINE, VERSION, line[1], line[2], line[3], line[4])
  end
end

local scopes, mine = {}, {}
for s = 1, n do
  local scope = { limit = tonumber(ARGV[at + 1]) }
  local count = tonumber(ARGV[at + 2])
  scope.meters = read_meters(KEYS[1 + s], count, at + 2)
  at = at + 2 + 5 * count
  scopes[s] = scope
end
for k = 2 + n, leases_end do mine[k] = redis.call('ZSCORE', KEYS[k], id) end
for s, scope in ipairs(scopes) do
  local before, changed = reserved[KEYS[1 + s]], false
  for _, b in ipairs(scope.meters) do
    local delta = 0
    if open then
      delta = b.amount - (before and before[1 + b.kind] or 0)
    elseif not held then
      delta = b.amount
    end
    apply(b, delta, now)
    changed = changed or delta ~= 0
  end
  if changed then write_record(KEYS[1 + s], scope.meters, now) end
end
for k = 2 + n, leases_end do
  if mine[k] then redis.call('ZREM', KEYS[k], id) end
end
if usage then
  redis.call('HSET', usage.key, usage.model, usage.raw)
  if usage.begins then redis.call('PEXPIRE', usage.key, ARGV[5]) end
end
if ARGV[2] == '0' then
  if open then redis.call('DEL', KEYS[1]) end
elseif open then
  redis.call('SET', KEYS[1], cmsgpack.pack({ VERSION, 1, held[3] }), 'PX', ARGV[2])
elseif not held then
  redis.call('SET', KEYS[1], cmsgpack.pack({ VERSION, 2, '' }), 'PX', ARGV[2])
end

local out = { open and 1 or 0, now }
for s, scope in ipairs(scopes) do
  for _, b in ipairs(scope.meters) do
    local verdict, wait = judge(b, 0, now)
    report(out, verdict, wait, remaining(b, now), reset(b, now))
  end
  if scope.limit >= 0 then
    local key = KEYS[1 + n + s]
    local count = live(key, now)
    local after = count >= scope.limit and lease_wait(key, count, scope.limit, now)
    report(out, count >= scope.limit and (after and 1 or 2) or 0, after or 0, max(scope.limit - count, 0), 0)
  end
end
return out
