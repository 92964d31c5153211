#!lua flags=allow-oom
-- Frees the leases of one reservation.
-- KEYS   lease sets
-- ARGV   nothing; id
-- reply  how many were freed
-- Atomic so that no other call sees half of it. Removing by id makes a second or late release harmless. Runs
-- under memory pressure: it only removes.
local freed, mine = 0, {}
for k, key in ipairs(KEYS) do mine[k] = redis.call('ZSCORE', key, ARGV[2]) end
for k, key in ipairs(KEYS) do
  if mine[k] then freed = freed + redis.call('ZREM', key, ARGV[2]) end
end
return { freed }
