// Just enough of two protocols for the stand-in's playground: Teltonika codec 8 and Wialon IPS short packets.

export function crc16(bytes) {
  let crc = 0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let i = 0; i < 8; i++) crc = crc & 1 ? (crc >>> 1) ^ 0xa001 : crc >>> 1;
  }
  return crc;
}

const hex = (n, bytes) => (n < 0 ? n + 2 ** (8 * bytes) : n).toString(16).padStart(2 * bytes, '0');

export const teltonikaLogin = (ident) => hex(ident.length, 2) + Buffer.from(ident).toString('hex');

export function teltonikaPacket(time_ms, m) {
  const record = time_ms.toString(16).padStart(16, '0') + '00' + hex(Math.round(m['position.longitude'] * 1e7), 4) + hex(Math.round(m['position.latitude'] * 1e7), 4)
    + hex(m['position.altitude'], 2) + hex(m['position.direction'], 2) + hex(m['position.satellites'], 1) + hex(m['position.speed'], 2)
    + `000402ef${m['engine.ignition'] ? '01' : '00'}f0${m.movement ? '01' : '00'}0242${hex(Math.round(m['external.voltage'] * 1000), 2)}43${hex(Math.round(m['battery.voltage'] * 1000), 2)}0000`;
  const data = Buffer.from(`0801${record}01`, 'hex');
  return `00000000${hex(data.length, 4)}${data.toString('hex')}${hex(crc16(data), 4)}`;
}

export function decode(protocol, text) {
  const bytes = Buffer.from(text.replace(/\s+/g, ''), 'hex');
  return protocol.includes('teltonika') ? teltonika(bytes) : ips(bytes);
}

function frame(bytes, start, end, fields, more) {
  return { hex: bytes.subarray(start, end).toString('hex'), start, end, ident: null, messages: [], replies: [], error: null, close: null, ...more, fields: fields.map(([name, from, to, value, note]) => ({ name, start: from - start, end: to - start, value, ...(note ? { note } : {}) })) };
}

function teltonika(bytes) {
  if (bytes.length >= 2 && bytes.readUInt16BE(0) === 15 && bytes.length >= 17) {
    const ident = bytes.subarray(2, 17).toString();
    return { frames: [frame(bytes, 0, 17, [['length', 0, 2, 15], ['imei', 2, 17, ident]], { ident, replies: ['01'] })], remaining: bytes.subarray(17).toString('hex') };
  }
  if (bytes.length < 12 || bytes.length < 12 + bytes.readUInt32BE(4)) return { frames: [], remaining: bytes.toString('hex') };
  const length = bytes.readUInt32BE(4);
  const end = 12 + length;
  const fields = [['preamble', 0, 4, 0], ['data.length', 4, 8, length], ['codec', 8, 9, bytes[8]], ['records', 9, 10, bytes[9]]];
  let at = 10;
  const take = (name, size, read, note) => {
    const value = read(at);
    fields.push([name, at, at + size, value, note]);
    at += size;
    return value;
  };
  const messages = [];
  const u = (size) => (p) => bytes.readUIntBE(p, size);
  for (let n = 0; n < bytes[9]; n++) {
    const p = `record.${n + 1}.`;
    const time = take(`${p}timestamp`, 8, (o) => new Date(Number(bytes.readBigUInt64BE(o))).toISOString());
    const m = { timestamp: time };
    m.priority = take(`${p}priority`, 1, u(1));
    m['position.longitude'] = take(`${p}longitude`, 4, (o) => bytes.readInt32BE(o) / 1e7);
    m['position.latitude'] = take(`${p}latitude`, 4, (o) => bytes.readInt32BE(o) / 1e7);
    m['position.altitude'] = take(`${p}altitude`, 2, u(2));
    m['position.direction'] = take(`${p}direction`, 2, u(2));
    m['position.satellites'] = take(`${p}satellites`, 1, u(1));
    m['position.speed'] = take(`${p}speed`, 2, u(2));
    m['event.id'] = take(`${p}event`, 1, u(1));
    take(`${p}elements`, 1, u(1));
    for (const size of [1, 2, 4, 8]) {
      const count = take(`${p}elements.of.${size}`, 1, u(1));
      for (let i = 0; i < count; i++) {
        const id = take(`${p}element.id`, 1, u(1));
        const name = { 239: 'engine.ignition', 240: 'movement', 66: 'external.voltage', 67: 'battery.voltage' }[id] ?? `io.${id}`;
        const raw = take(`${p}${name}`, size, size === 8 ? (o) => String(bytes.readBigUInt64BE(o)) : u(size), size === 2 ? 'mV' : '');
        m[name] = id === 239 || id === 240 ? raw === 1 : id === 66 || id === 67 ? raw / 1000 : raw;
      }
    }
    messages.push(m);
  }
  take('records.again', 1, u(1));
  const crc = take('crc', 4, u(4));
  const right = crc16(bytes.subarray(8, 8 + length));
  const error = crc === right ? null : { class: 'bad_crc', message: `checksum is ${hex(crc, 2)}, the bytes give ${hex(right, 2)}`, offset: end - 4, rule: 'packet', line: 12 };
  return { frames: [frame(bytes, 0, end, fields, error ? { error, close: 'protocol_error' } : { messages, replies: [hex(messages.length, 4)] })], remaining: bytes.subarray(end).toString('hex') };
}

function ips(bytes) {
  const frames = [];
  let start = 0;
  for (;;) {
    const end = bytes.indexOf('\r\n', start);
    if (end < 0) break;
    const line = bytes.subarray(start, end).toString('latin1');
    const found = /^#(\w+)#(.*)$/.exec(line);
    if (!found) {
      frames.push(frame(bytes, start, end + 2, [], { error: { class: 'bad_start', message: 'a packet begins with #', offset: 0 } }));
    } else {
      const [, type, rest] = found;
      const fields = [['type', start + 1, start + 1 + type.length, type]];
      const names = type === 'L' ? ['ident', 'password'] : ['date', 'time', 'latitude', 'hemisphere.ns', 'longitude', 'hemisphere.ew', 'speed', 'course', 'altitude', 'satellites', 'hdop', 'inputs', 'outputs', 'adc', 'ibutton', 'params'];
      let at = start + type.length + 2;
      const parts = rest.split(';');
      parts.forEach((part, i) => {
        fields.push([names[i] ?? `part.${i}`, at, at + part.length, part]);
        at += part.length + 1;
      });
      const degrees = (text, side) => {
        const dot = text.indexOf('.');
        const value = Number(text.slice(0, dot - 2)) + Number(text.slice(dot - 2)) / 60;
        return Math.round((side === 'S' || side === 'W' ? -value : value) * 1e7) / 1e7;
      };
      if (type === 'L') frames.push(frame(bytes, start, end + 2, fields, { ident: parts[0], replies: [Buffer.from('#AL#1\r\n').toString('hex')] }));
      else frames.push(frame(bytes, start, end + 2, fields, { messages: [{ timestamp: new Date().toISOString(), 'position.latitude': degrees(parts[2], parts[3]), 'position.longitude': degrees(parts[4], parts[5]), 'position.speed': Number(parts[6]), 'position.direction': Number(parts[7]), 'position.altitude': Number(parts[8]), 'position.satellites': Number(parts[9]), 'position.valid': true }], replies: [Buffer.from(`#A${type}#1\r\n`).toString('hex')] }));
    }
    start = end + 2;
  }
  return { frames, remaining: bytes.subarray(start).toString('hex') };
}
