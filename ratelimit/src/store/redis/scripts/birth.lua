#!lua flags=allow-oom
-- When this data set was born.
-- KEYS   the birth
-- ARGV   (none)
-- reply  us
-- Atomic so that gateways that connect to a new data set at once agree on its birth. Runs under memory
-- pressure: it adds one small key to an empty data set.
local now = clock()
local born = redis.call('GET', KEYS[1])
if not born then
  born = int(now)
  redis.call('SET', KEYS[1], born)
end
return { tonumber(born) }
