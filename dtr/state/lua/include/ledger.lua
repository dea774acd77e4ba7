-- ledger_have(ledger, rank, have): a rank has samples for so many batches; it never has fewer afterwards.
local function ledger_have(ledger, rank, have)
  local held = redis.call('HMGET', ledger, 'have/' .. rank, ':most')
  if have > tonumber(held[1] or -1) then redis.call('HSET', ledger, 'have/' .. rank, have) end
  if have > tonumber(held[2] or 0) then redis.call('HSET', ledger, ':most', have) end
end
