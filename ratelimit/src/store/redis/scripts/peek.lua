#!lua flags=no-writes
-- How every limit stands.
-- KEYS   n scope records; n scope lease sets
-- ARGV   numbers, as doubles: n; per scope: concurrency (-1 none), buckets, then per bucket kind 1-5, capacity, num, den
-- reply  doubles: now us; per limit: verdict, wait us, remaining, reset us (see acquire) for a cost of zero
-- Atomic so that all limits are seen at one moment.
local numbers = ARGV[1]
local n, at = get('<d', numbers)
local now = clock()
local out, size = { now }, 1
local function report(verdict, wait, left, empty)
  out[size + 1], out[size + 2], out[size + 3], out[size + 4] = verdict, wait, left, empty
  size = size + 4
end
for s = 1, n do
  local limit, buckets
  limit, buckets, at = get('<dd', numbers, at)
  local raw
  if buckets > 0 then raw = read_record(KEYS[s], redis.call('GET', KEYS[s])) end
  for _ = 1, buckets do
    local kind, cap, num, den
    kind, cap, num, den, at = get('<dddd', numbers, at)
    local b = meter(raw, kind, cap, num, den, now)
    local verdict, wait = judge(b, 0, now)
    report(verdict, wait, standing(b, now))
  end
  if limit >= 0 then
    local count = live(KEYS[n + s], now)
    local after = count >= limit and lease_wait(KEYS[n + s], count, limit, now)
    report(count >= limit and (after and 1 or 2) or 0, after or 0, max(limit - count, 0), 0)
  end
end
return put('<' .. ('d'):rep(size), unpack(out))
