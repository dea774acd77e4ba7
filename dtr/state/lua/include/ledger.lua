-- ledger_have(fields, rank, have, held, most): what HSET is to set when a rank has samples for so many batches; it never has fewer
-- afterwards. held and most are what 'have/RANK' and ':most' hold.
local function ledger_have(fields, rank, have, held, most)
  if have > tonumber(held or -1) then
    fields[#fields + 1] = 'have/' .. rank
    fields[#fields + 1] = have
  end
  if have > tonumber(most or 0) then
    fields[#fields + 1] = ':most'
    fields[#fields + 1] = have
  end
end
