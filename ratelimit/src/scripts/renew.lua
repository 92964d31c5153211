#!lua flags=allow-oom
-- Extends leases that are still live, many reservations at once.
-- KEYS   per reservation: its lease sets, then the records it may have
-- ARGV   lease ttl us, reservation life ms, how many; per reservation: id, lease sets, records
-- reply  per reservation 1 when it has lost a lease, else 0
-- Atomic because a lease may expire between look and extension; an expired lease may have been given away, so it
-- is never revived. Runs under memory pressure: it adds nothing.
local ttl, many, at, k = tonumber(ARGV[1]), tonumber(ARGV[3]), 3, 0
local now = clock()
local out, leases, records = {}, {}, {}
for r = 1, many do
  local id = ARGV[at + 1]
  out[r] = 0
  for _ = 1, tonumber(ARGV[at + 2]) do
    k = k + 1
    local score = redis.call('ZSCORE', KEYS[k], id)
    if score and tonumber(score) > now then
      leases[#leases + 1] = { KEYS[k], id }
    else
      out[r] = 1
    end
  end
  for _ = 1, tonumber(ARGV[at + 3]) do
    k = k + 1
    local held = read_reservation(KEYS[k])
    if held and held[2] == 0 then records[#records + 1] = KEYS[k] end
  end
  at = at + 3
end
for _, lease in ipairs(leases) do take_lease(lease[1], lease[2], now, ttl) end
for _, key in ipairs(records) do redis.call('PEXPIRE', key, ARGV[2]) end
return out
