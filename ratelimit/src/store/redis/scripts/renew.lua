#!lua flags=allow-oom
-- Extends leases that are still live, many reservations at once.
-- KEYS   per reservation: its lease sets, then the records it may have
-- ARGV   numbers, as doubles: lease ttl us, how many; per reservation: lease sets, records;
--        reservation life ms; per reservation: id
-- reply  per reservation 1 when it has lost a lease, else 0
-- Atomic because a lease may expire between look and extension; an expired lease may have been given away, so it
-- is never revived. Runs under memory pressure: it adds nothing.
local numbers, keep, first_id, k = ARGV[1], ARGV[2], 2, 0
local ttl, many, at = get('<dd', numbers)
local now = clock()
local score = int(now + ttl)
local out, leases, records = {}, {}, {}
for r = 1, many do
  local id, sets, held_in = ARGV[first_id + r]
  sets, held_in, at = get('<dd', numbers, at)
  out[r] = 0
  for _ = 1, sets do
    k = k + 1
    local expiry = redis.call('ZSCORE', KEYS[k], id)
    if expiry and tonumber(expiry) > now then
      local members = leases[KEYS[k]] or {}
      leases[KEYS[k]] = members
      members[#members + 1], members[#members + 2] = score, id
    else
      out[r] = 1
    end
  end
  for _ = 1, held_in do
    k = k + 1
    local held = read_reservation(redis.call('GET', KEYS[k]))
    if held and held[2] == 0 then records[#records + 1] = KEYS[k] end
  end
end
for key, members in pairs(leases) do take_leases(key, members, 1, true, ttl, now) end
for _, key in ipairs(records) do redis.call('PEXPIRE', key, keep) end
return out
