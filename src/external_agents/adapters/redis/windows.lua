-- The three windows of one agent: the rule of external_agents.domain.rate_limit, carried out where the counts are.
--
-- KEYS[1] holds 156 numbers: the heads of the minute, the hour and the day, then 51 counts of each. Every number of a
-- bucket is its own since the epoch; the count of bucket b stands at b % 51.
--
-- take n MINUTE HOUR DAY: takes up to n places, as many as the limits admit (-1: no limit); n = 0 looks.
--   Returns integers of 4 bytes, little-endian: how many were taken, the time (seconds, microseconds), and for each
--   window its head, what it has counted, the oldest bucket in that (0: none). Where fewer than n were taken or n is 0,
--   the 153 counts follow.
-- give n MINUTE HOUR DAY: gives n places back that were taken when the heads were these, where they still count.
--
-- A call writes once or not at all, so that it cannot be cut in half: not by an error, not by a crash.

local BUCKETS = 51
local BUCKET_S = {60 / 50, 3600 / 50, 86400 / 50}

local operation, n = ARGV[1], tonumber(ARGV[2])
local stored = redis.call('GET', KEYS[1])

-- Where the count of a bucket stands.
local function at(window, bucket)
    return 4 + (window - 1) * BUCKETS + bucket % BUCKETS
end

if operation == 'give' then
    if not stored then
        return 0
    end
    local state = cmsgpack.unpack(stored)
    for window = 1, 3 do
        local bucket, head = tonumber(ARGV[2 + window]), state[window]
        if bucket > head - BUCKETS and bucket <= head then
            state[at(window, bucket)] = math.max(0, state[at(window, bucket)] - n)
        end
    end
    redis.call('SET', KEYS[1], cmsgpack.pack(state), 'KEEPTTL')
    return n
end

local time = redis.call('TIME')
local now_s = tonumber(time[1]) + tonumber(time[2]) / 1000000
local state = {}
if stored then
    state = cmsgpack.unpack(stored)
else
    for i = 1, 3 + 3 * BUCKETS do
        state[i] = 0
    end
end

local used, oldest, taken = {}, {}, n
for window = 1, 3 do
    local head = math.floor(now_s / BUCKET_S[window])
    if head > state[window] then
        for bucket = math.max(state[window] + 1, head - BUCKETS + 1), head do
            state[at(window, bucket)] = 0
        end
        state[window] = head
    end
    head = state[window]
    local sum, first = 0, 0
    for bucket = head - BUCKETS + 1, head do
        local count = state[4 + (window - 1) * BUCKETS + bucket % BUCKETS]
        if count > 0 then
            sum = sum + count
            if first == 0 then
                first = bucket
            end
        end
    end
    used[window], oldest[window] = sum, first
    local limit = tonumber(ARGV[2 + window])
    if limit >= 0 then
        taken = math.min(taken, math.max(0, limit - sum))
    end
end

if taken > 0 then
    for window = 1, 3 do
        local i = at(window, state[window])
        state[i] = state[i] + taken
        used[window] = used[window] + taken
        if oldest[window] == 0 then
            oldest[window] = state[window]
        end
    end
    -- The day's current bucket counts for 51 more at the most; one more than that lets clocks differ.
    local expires_s = (state[3] + BUCKETS + 1) * BUCKET_S[3]
    redis.call('SET', KEYS[1], cmsgpack.pack(state), 'EXAT', expires_s)
end

local answer = struct.pack(
    '<I4I4I4I4I4I4I4I4I4I4I4I4', taken, time[1], time[2],
    state[1], used[1], oldest[1], state[2], used[2], oldest[2], state[3], used[3], oldest[3]
)
if taken < n or n == 0 then
    answer = answer .. struct.pack('<' .. string.rep('I4', 3 * BUCKETS), unpack(state, 4))
end
return answer
