-- Token buckets for several routers: the same arithmetic as router/admission/buckets.py, in one step.
-- KEYS: the buckets. ARGV[1]: "take" (all or nothing) or "settle" (whatever the level); then for each bucket its limit
-- for each minute and the amount. Returns the server's time, the number of the bucket that refused (0: none) and the
-- seconds until it would not, as text, because Redis cuts numbers to integers.
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local levels, ats, refused, longest = {}, {}, 0, 0
for i, key in ipairs(KEYS) do
  local limit, amount = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  local kept = redis.call('HMGET', key, 'level', 'at')
  local level, at = limit, now
  if kept[1] then
    at = tonumber(kept[2])
    level = math.min(limit, tonumber(kept[1]) + math.max(0, now - at) * (limit / 60))
  end
  levels[i], ats[i] = level, math.max(at, now) -- a clock that was set back gives nothing twice
  if ARGV[1] == 'take' and level < amount then
    local wait = (amount - level) / (limit / 60)
    if refused == 0 or wait > longest then refused, longest = i, wait end
  end
end
if refused == 0 then
  for i, key in ipairs(KEYS) do
    local limit, amount = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
    local level = math.min(limit, levels[i] - amount)
    redis.call('HSET', key, 'level', string.format('%.17g', level), 'at', string.format('%.17g', ats[i]))
    redis.call('PEXPIRE', key, math.ceil((limit - level) / (limit / 60) * 1000) + 1000)
  end
end
return {string.format('%.17g', now), refused, string.format('%.17g', longest)}
