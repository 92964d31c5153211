#!lua
-- Moves a reservation's lease from one backend to the first free candidate.
-- KEYS   m candidate lease sets; the set to leave if there is one
-- ARGV   numbers, as doubles: lease ttl us, m; per candidate: maximum; id
-- reply  the candidate from 0, or -1 when all are full; the old slot is freed either way
-- Atomic so that the reservation never counts twice and the place it moves to is not taken in between. A repeated
-- call finds its own lease and keeps it.
local ttl, m, at = get('<dd', ARGV[1])
local id, now, from = ARGV[2], clock(), KEYS[m + 1]
local slot, free = -1, -1
local leaving = from and redis.call('ZSCORE', from, id)
for c = 1, m do
  local score = redis.call('ZSCORE', KEYS[c], id)
  local mine = score and tonumber(score) > now
  if mine and KEYS[c] ~= from then
    slot = c - 1
    break
  end
  if free < 0 and live(KEYS[c], now) - (mine and 1 or 0) < get('<d', ARGV[1], at + 8 * (c - 1)) then free = c - 1 end
end
if slot < 0 then slot = free end
if leaving then redis.call('ZREM', from, id) end
if slot >= 0 then
  local key = KEYS[slot + 1]
  take_leases(key, { int(now + ttl), id }, live(key, now), true, ttl, now)
end
return { slot }
