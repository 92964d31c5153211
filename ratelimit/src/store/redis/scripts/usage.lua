#!lua flags=no-writes
-- What was used, by model.
-- KEYS   usage records
-- ARGV   (none)
-- reply  per record: lines; per line: bytes of the model's name, each of them, requests, input, output, money
-- Atomic so that a line is never half of one.
local out = {}
local function put(value) out[#out + 1] = value end
for _, key in ipairs(KEYS) do
  local lines = redis.call('HGETALL', key)
  put(#lines / 2)
  for l = 1, #lines, 2 do
    local name = lines[l]
    put(#name)
    for b = 1, #name do put(name:byte(b)) end
    local version, requests, input, output, money = struct.unpack('<Bdddd', lines[l + 1])
    if version ~= 1 then error({ err = 'WRONGTYPE usage of another version' }) end
    put(requests)
    put(input)
    put(output)
    put(money)
  end
end
return out
