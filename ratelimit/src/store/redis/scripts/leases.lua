-- Leases: sorted sets of reservations by expiry. One counts while its score is in the future; what has expired is
-- removed now and then.
local function live(key, now) return redis.call('ZCOUNT', key, '(' .. int(now), '+inf') end

-- Time until enough leases have expired for one more under `limit`; nil when it is closed.
local function lease_wait(key, count, limit, now)
  if limit == 0 then return nil end
  local nth = int(count - limit)
  local first = redis.call('ZRANGEBYSCORE', key, '(' .. int(now), '+inf', 'WITHSCORES', 'LIMIT', nth, '1')
  return first[2] and max(tonumber(first[2]) - now, 1) or 1
end

-- `members` is score, id, score, id, ... The set must outlive them: it lives two minutes at least from when it was
-- empty (`count` 0), and from when a caller says `touch`, which each does before half a minute is over, and always
-- for leases of more than a minute.
local function take_leases(key, members, count, touch, ttl, now)
  if touch then redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now)) end
  redis.call('ZADD', key, unpack(members))
  if touch or count == 0 then
    local life = int(ceil(max(ttl, 60000000) / 1000) + 60000)
    if count == 0 then redis.call('PEXPIRE', key, life) else redis.call('PEXPIRE', key, life, 'GT') end
  end
end
