-- integer(x): a number as decimal digits; tostring() would lose digits or write an exponent.
local function integer(x)
  return string.format('%d', x)
end
