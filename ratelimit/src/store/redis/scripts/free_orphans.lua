#!lua flags=allow-oom
-- Frees every lease of a holder that is gone.
-- KEYS   the roll if it is looked at; lease sets
-- ARGV   nothing; the holder's mark (the last digits of its ids), its entry on the roll ('' when the roll is not looked at)
-- reply  how many were freed, or -1 when it is on the roll: then it lives and nothing is freed
-- Atomic so that a holder that says it lives is seen. Runs under memory pressure: it only removes.
local mark, first, now = ARGV[2], 1, clock()
if ARGV[3] ~= '' then
  first = 2
  local until_then = redis.call('ZSCORE', KEYS[1], ARGV[3])
  if until_then and tonumber(until_then) > now then return { -1 } end
end
local gone, freed = {}, 0
for k = first, #KEYS do
  for _, id in ipairs(redis.call('ZRANGE', KEYS[k], 0, -1)) do
    if id:sub(-#mark) == mark then gone[#gone + 1] = { KEYS[k], id } end
  end
end
for _, lease in ipairs(gone) do freed = freed + redis.call('ZREM', lease[1], lease[2]) end
return { freed }
