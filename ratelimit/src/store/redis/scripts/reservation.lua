-- A reservation: { version, state, lease key of the slot or '', then per scope: record key, whether it holds a lease
-- (0|1), how many kinds, and kind and amount of each }. State 0 is open, 1 settled, 2 ended before it was ever
-- granted. Of version 1 each scope is a table: { record key, amount x 5 }.
local function read_reservation(raw)
  if not raw then return nil end
  local held = cmsgpack.unpack(raw)
  if type(held) ~= 'table' or held[1] ~= 2 and held[1] ~= 1 then
    error({ err = 'WRONGTYPE reservation of another version' })
  end
  return held
end
