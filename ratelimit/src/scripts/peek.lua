#!lua flags=no-writes
-- How every limit stands.
-- KEYS   n scope records; n scope lease sets
-- ARGV   n; per scope: concurrency (-1 none), buckets, then per bucket kind 1-5, capacity, 0, num, den
-- reply  now us; per limit: verdict, wait us, remaining, reset us (see acquire) for a cost of zero
-- Atomic so that all limits are seen at one moment.
local n, at = tonumber(ARGV[1]), 1
local now = clock()
local out = { now }
for s = 1, n do
  local limit, count = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  for _, b in ipairs(read_meters(KEYS[s], count, at + 2)) do
    local verdict, wait = judge(b, 0, now)
    report(out, verdict, wait, remaining(b, now), reset(b, now))
  end
  at = at + 2 + 5 * count
  if limit >= 0 then
    local count = live(KEYS[n + s], now)
    local after = count >= limit and lease_wait(KEYS[n + s], count, limit, now)
    report(out, count >= limit and (after and 1 or 2) or 0, after or 0, max(limit - count, 0), 0)
  end
end
return out
