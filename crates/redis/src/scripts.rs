//! What Redis itself decides, atomically: which value is newer, which epoch may write.
//!
//! Numbers that are compared as text have twenty digits, so that every locale of a server sorts
//! them as numbers; Lua's own numbers are exact to 2^53 only.

use redis::Script;

/// Fields of hashes that are no parameters: a name has no control characters. The scripts have two
/// more, `\0s` for when a device was last heard and `\0b` for the bytes that are counted.
pub(crate) mod field {
    /// The generation of the memory that it is whole in.
    pub(crate) const GENERATION: &str = "\0g";
    /// The newest epoch of a module's status.
    pub(crate) const EPOCH: &str = "\0e";
}

/// Milliseconds for which the end of a module's status refuses older epochs: a day.
pub(crate) const END_MS: u64 = 86_400_000;

/// A number as text that sorts as it does.
pub(crate) fn digits(number: u64) -> String {
    format!("{number:020}")
}

/// All scripts of one installation. They are loaded at each connection and called by their hash.
pub(crate) struct Scripts {
    pub(crate) apply: Script,
    pub(crate) connected: Script,
    pub(crate) disconnected: Script,
    pub(crate) presence: Script,
    pub(crate) status_set: Script,
    pub(crate) status_clear: Script,
    pub(crate) ticket: Script,
    pub(crate) beat: Script,
    pub(crate) leave: Script,
    pub(crate) distrust: Script,
    pub(crate) lost: Script,
    pub(crate) lock: Script,
    pub(crate) wipe: Script,
    pub(crate) finish: Script,
    pub(crate) lost_look: Script,
    pub(crate) lost_mark: Script,
    pub(crate) lost_end: Script,
}

/// KEYS: device, marker. ARGV: generation (empty: the marker's, `-`: leave it), seen, bytes_max,
/// params_max, then name and record of each value. Returns the places of those that count.
const APPLY: &str = r"
local function older(a, b)
  if string.sub(a, 1, 16) == string.sub(b, 1, 16) then return false end
  local a1, a2, a3, a4 = struct.unpack('>I4I4I4I4', a)
  local b1, b2, b3, b4 = struct.unpack('>I4I4I4I4', b)
  if a1 ~= b1 then return a1 < b1 end
  if a2 ~= b2 then return a2 < b2 end
  if a3 ~= b3 then return a3 < b3 end
  return a4 < b4
end
local key = KEYS[1]
local bytes_max, params_max = tonumber(ARGV[3]), tonumber(ARGV[4])
local names = {}
for i = 5, #ARGV, 2 do names[#names + 1] = ARGV[i] end
local now = redis.call('HMGET', key, '\0s', '\0g', '\0b', unpack(names))
local bytes = tonumber(now[3] or '0')
local count
local put, gone, changed = {}, {}, {}
for i = 1, #names do
  local record, old = ARGV[4 + 2 * i], now[3 + i]
  if not (old and older(record, old)) then
    local before = 0
    if old then before = struct.unpack('>I4', old, 17) end
    local after = bytes - before + struct.unpack('>I4', record, 17)
    local fits = after <= bytes_max
    if fits and not old then
      if not count then
        count = redis.call('HLEN', key)
        for j = 1, 3 do if now[j] then count = count - 1 end end
      end
      fits = count < params_max
      if fits then count = count + 1 end
    end
    if fits then
      bytes = after
      put[#put + 1] = names[i]
      put[#put + 1] = record
      changed[#changed + 1] = i - 1
    elseif old then
      bytes = bytes - before
      gone[#gone + 1] = names[i]
      if count then count = count - 1 end
    end
  end
end
put[#put + 1] = '\0b'
put[#put + 1] = tostring(bytes)
if not now[1] or older(ARGV[2] .. '00000000', now[1] .. '00000000') == false then
  put[#put + 1] = '\0s'
  put[#put + 1] = ARGV[2]
end
local generation = ARGV[1]
if generation == '' then generation = redis.call('GET', KEYS[2]) end
if generation and generation ~= '-' and generation ~= now[2] then
  put[#put + 1] = '\0g'
  put[#put + 1] = generation
end
redis.call('HSET', key, unpack(put))
if #gone > 0 then redis.call('HDEL', key, unpack(gone)) end
return changed
";

/// KEYS: presence. ARGV: connection, epoch, node, incarnation, peer, at. 1 if it counts.
const CONNECTED: &str = r"
local now = redis.call('HMGET', KEYS[1], 'e', 'c')
if now[1] and (now[1] > ARGV[2] or (now[1] == ARGV[2] and now[2] ~= ARGV[1])) then return 0 end
redis.call('HSET', KEYS[1], 'c', ARGV[1], 'e', ARGV[2], 'n', ARGV[3], 'i', ARGV[4], 'p', ARGV[5], 't', ARGV[6])
redis.call('HDEL', KEYS[1], 'l')
return 1
";

/// KEYS: presence. ARGV: connection, epoch, at. 1 if the device is offline by it.
const DISCONNECTED: &str = r"
local now = redis.call('HMGET', KEYS[1], 'e', 'c')
if now[1] and (now[1] > ARGV[2] or (now[1] == ARGV[2] and now[2] ~= ARGV[1])) then return 0 end
redis.call('HDEL', KEYS[1], 'c')
redis.call('HSET', KEYS[1], 'e', ARGV[2], 't', ARGV[3])
return 1
";

/// KEYS: presence, device, since. ARGV: prefix of nodes' keys. A connection counts while the node
/// that holds it is alive, as the very process that took it.
const PRESENCE: &str = r"
local now = redis.call('HMGET', KEYS[1], 'c', 'e', 'n', 'p', 't', 'i')
if now[1] and (not now[3] or redis.call('GET', ARGV[1] .. now[3]) ~= now[6]) then now[1] = false end
return {redis.call('GET', KEYS[3]), redis.call('HGET', KEYS[2], '\0s'), now[1], now[2], now[3], now[4], now[5]}
";

/// KEYS: presence. ARGV: prefix of nodes' keys. What is known of a session whose process does not speak up, and whether
/// another has its name; nothing of one that lives.
const LOST_LOOK: &str = r"
local now = redis.call('HMGET', KEYS[1], 'c', 'e', 'n', 'i', 'p')
if not (now[1] and now[2] and now[3] and now[4]) then return {} end
local process = redis.call('GET', ARGV[1] .. now[3])
if process == now[4] then return {} end
return {now[1], now[2], now[3], now[4], now[5] or '', process and '1' or '0'}
";

/// Whether the session ARGV[2] of epoch ARGV[3] is still the device's, and lost, in Lua.
const LOST_STILL: &str = r"
local now = redis.call('HMGET', KEYS[1], 'c', 'e', 'n', 'i', 'l')
local still = now[1] == ARGV[2] and now[2] == ARGV[3] and now[3] and redis.call('GET', ARGV[1] .. now[3]) ~= now[4]
";

/// KEYS: presence. ARGV: prefix of nodes' keys, connection, epoch, at. When it was first found lost; empty if it is not.
const LOST_MARK: &str = r"
if not still then return '' end
if now[5] then return now[5] end
redis.call('HSET', KEYS[1], 'l', ARGV[4])
return ARGV[4]
";

/// KEYS: presence. ARGV: prefix of nodes' keys, connection, epoch, the next epoch, at. 1 if it ended by this.
const LOST_END: &str = r"
if not still then return 0 end
redis.call('HDEL', KEYS[1], 'c', 'l')
redis.call('HSET', KEYS[1], 'e', ARGV[4], 't', ARGV[5])
return 1
";

/// The next version of a status, in Lua: it starts at the server's microseconds, so that it is
/// above all that were given before the server lost its memory.
const NEXT_VERSION: &str = r"
local function next_version(key)
  if redis.call('EXISTS', key) == 0 then
    local t = redis.call('TIME')
    redis.call('SET', key, t[1] .. string.format('%06d', tonumber(t[2])))
  end
  return string.format('%020.0f', redis.call('INCR', key))
end
";

/// KEYS: status, keys, version, channel. ARGV: epoch, key, name, cost, value, bytes_max, keys_max.
/// A record is version, epoch, cost, value.
const STATUS_SET: &str = r"
local now = redis.call('HMGET', KEYS[1], '\0e', '\0b', ARGV[3])
local old = now[3]
if now[1] and now[1] > ARGV[1] then return {'superseded', now[1]} end
if old and string.sub(old, 21, 40) == ARGV[1] and string.sub(old, 45) == ARGV[5] then return {'same'} end
local cost = tonumber(ARGV[4])
local bytes = tonumber(now[2] or '0') + cost
if old then bytes = bytes - struct.unpack('>I4', old, 41) end
if bytes > tonumber(ARGV[6]) then return {'bytes'} end
if redis.call('SISMEMBER', KEYS[2], ARGV[2]) == 0 then
  if redis.call('SCARD', KEYS[2]) >= tonumber(ARGV[7]) then return {'keys'} end
  redis.call('SADD', KEYS[2], ARGV[2])
end
local version = next_version(KEYS[3])
redis.call('HSET', KEYS[1], '\0e', ARGV[1], '\0b', tostring(bytes), ARGV[3], version .. ARGV[1] .. struct.pack('>I4', cost) .. ARGV[5])
redis.call('PERSIST', KEYS[1])
redis.call('PUBLISH', KEYS[4], version .. ARGV[1] .. struct.pack('B', #ARGV[2]) .. ARGV[2] .. struct.pack('B', #ARGV[3]) .. ARGV[3] .. ARGV[5])
return {'set'}
";

/// KEYS: status, keys, version, channel. ARGV: epoch, key, milliseconds that its end is known.
const STATUS_CLEAR: &str = r"
local epoch = redis.call('HGET', KEYS[1], '\0e')
if not epoch then return {'same'} end
if epoch > ARGV[1] then return {'superseded', epoch} end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[2])
redis.call('HSET', KEYS[1], '\0e', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local version = next_version(KEYS[3])
redis.call('PUBLISH', KEYS[4], version .. ARGV[1] .. struct.pack('B', #ARGV[2]) .. ARGV[2])
return {'set'}
";

/// KEYS: ticket. ARGV: floor. Lua's numbers are exact far beyond the microseconds of our days.
const TICKET: &str = r"
local last = tonumber(redis.call('GET', KEYS[1]) or '0')
local ticket = string.format('%.0f', math.max(last, tonumber(ARGV[1])) + 1)
redis.call('SET', KEYS[1], ticket)
return ticket
";

/// KEYS: node, nodes, since, marker, stale, mended, lock, version. ARGV: node, incarnation, ttl_ms, prefix
/// of nodes' keys, the memory that was told all of the node, the server's process. A process that has the
/// memory of another, by a file or as its replica, may lack the last of it: it is a memory of its own. A
/// node that is gone without a word may have taken with it what it had not told. Says also how many other
/// living nodes have not told all.
const BEAT: &str = r"
local t = redis.call('TIME')
local now = t[1] .. string.format('%03d', math.floor(tonumber(t[2]) / 1000))
local since = redis.call('GET', KEYS[3])
if not since or string.sub(since, -#ARGV[6]) ~= ARGV[6] then
  since = now .. ':' .. ARGV[2] .. ':' .. ARGV[6]
  redis.call('SET', KEYS[3], since)
  redis.call('DEL', KEYS[8])
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
local nodes = redis.call('HGETALL', KEYS[2])
local untold = 0
for i = 1, #nodes, 2 do
  if nodes[i] == ARGV[1] then
    if string.sub(nodes[i + 1], 1, 16) ~= ARGV[2] then redis.call('INCR', KEYS[5]) end
  elseif redis.call('EXISTS', ARGV[4] .. nodes[i]) == 0 then
    redis.call('HDEL', KEYS[2], nodes[i])
    redis.call('INCR', KEYS[5])
  elseif string.sub(nodes[i + 1], 18) ~= since then
    untold = untold + 1
  end
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2] .. ' ' .. ARGV[5])
return {now, since, redis.call('GET', KEYS[4]), redis.call('GET', KEYS[5]) or '0', redis.call('GET', KEYS[6]) or '0', redis.call('EXISTS', KEYS[7]), untold}
";

/// KEYS: node, nodes. ARGV: node, incarnation. A node leaves with nothing untold.
const LEAVE: &str = r"
if redis.call('GET', KEYS[1]) == ARGV[2] then redis.call('DEL', KEYS[1]) end
local process = redis.call('HGET', KEYS[2], ARGV[1])
if process and string.sub(process, 1, 16) == ARGV[2] then redis.call('HDEL', KEYS[2], ARGV[1]) end
return 1
";

/// KEYS: marker. ARGV: marker. Takes away the marker of another server's memory.
const DISTRUST: &str = r"
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
";

/// KEYS: marker, lost. Something was not written: all is to be read anew, from after now on.
const LOST: &str = r"
redis.call('INCR', KEYS[2])
return redis.call('DEL', KEYS[1])
";

/// KEYS: lock, marker, stale, mended, lost. ARGV: token, ttl_ms. Takes the lock if there is work.
const LOCK: &str = r"
local marker = redis.call('GET', KEYS[2])
local stale = redis.call('GET', KEYS[3]) or '0'
if marker and stale == (redis.call('GET', KEYS[4]) or '0') then return {'none'} end
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return {'held'} end
return {marker and 'mend' or 'fill', stale, redis.call('GET', KEYS[5]) or '0'}
";

/// KEYS: lock, then keys to remove. ARGV: token, ttl_ms. 0 if the lock is another's.
const WIPE: &str = r"
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
for i = 2, #KEYS do redis.call('UNLINK', KEYS[i]) end
return 1
";

/// KEYS: lock, marker, mended, lost. ARGV: token, generation (empty: leave the marker), stale, lost.
const FINISH: &str = r"
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'lock' end
redis.call('DEL', KEYS[1])
if ARGV[2] ~= '' then
  if (redis.call('GET', KEYS[4]) or '0') ~= ARGV[4] then return 'again' end
  redis.call('SET', KEYS[2], ARGV[2])
end
redis.call('SET', KEYS[3], ARGV[3])
return 'done'
";

impl Scripts {
    pub(crate) fn new() -> Self {
        let versioned = |code: &str| Script::new(&format!("{NEXT_VERSION}{code}"));
        Self {
            apply: Script::new(APPLY),
            connected: Script::new(CONNECTED),
            disconnected: Script::new(DISCONNECTED),
            presence: Script::new(PRESENCE),
            status_set: versioned(STATUS_SET),
            status_clear: versioned(STATUS_CLEAR),
            ticket: Script::new(TICKET),
            beat: Script::new(BEAT),
            leave: Script::new(LEAVE),
            distrust: Script::new(DISTRUST),
            lost: Script::new(LOST),
            lock: Script::new(LOCK),
            wipe: Script::new(WIPE),
            finish: Script::new(FINISH),
            lost_look: Script::new(LOST_LOOK),
            lost_mark: Script::new(&format!("{LOST_STILL}{LOST_MARK}")),
            lost_end: Script::new(&format!("{LOST_STILL}{LOST_END}")),
        }
    }

    pub(crate) fn all(&self) -> [&Script; 17] {
        [
            &self.apply,
            &self.connected,
            &self.disconnected,
            &self.presence,
            &self.status_set,
            &self.status_clear,
            &self.ticket,
            &self.beat,
            &self.leave,
            &self.distrust,
            &self.lost,
            &self.lock,
            &self.wipe,
            &self.finish,
            &self.lost_look,
            &self.lost_mark,
            &self.lost_end,
        ]
    }
}
