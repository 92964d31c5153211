#!lua
-- Moves a reservation's lease from one backend to the first free candidate.
-- KEYS   m candidate lease sets; the set to leave if there is one
-- ARGV   id, lease ttl us, m; per candidate: maximum
-- reply  the candidate from 0, or -1 when all are full; the old slot is freed either way
-- Atomic so that the reservation never counts twice and the place it moves to is not taken in between. A repeated
-- call finds its own lease and keeps it.
local id, ttl, m = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now, from = clock(), KEYS[m + 1]
local slot, free = -1, -1
local leaving = from and redis.call('ZSCORE', from, id)
for c = 1, m do
  local score = redis.call('ZSCORE', KEYS[c], id)
  local mine = score and tonumber(score) > now
  if mine and KEYS[c] ~= from then
    slot = c - 1
    break
  end
  if free < 0 and live(KEYS[c], now) - (mine and 1 or 0) < tonumber(ARGV[3 + c]) then free = c - 1 end
end
if slot < 0 then slot = free end
if leaving then redis.call('ZREM', from, id) end
if slot >= 0 then take_lease(KEYS[slot + 1], id, now, ttl) end
return { slot }
