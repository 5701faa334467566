// A stand-in for the server, for work on the console alone: the HTTP interface and the live feed over a fleet that is made up.
//
//   npm run build && npm run dev:fake            serves dist at http://127.0.0.1:8090
//   npm run dev:fake & npm run dev               the same behind Vite, with hot reload
//
// DEVICES=100000 sets the size of the fleet, RATE=2000 the messages a second, PORT the port, EMPTY=1 an installation without
// devices, CONNECT=1 lets a new device call every 15 seconds, SCOPES=read,admin takes scopes away. The cluster is made
// up in `cluster.mjs`, with settings of its own. What it holds is gone when it ends.
import { createHash, randomBytes, randomUUID } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { extname, join, normalize } from 'node:path';
import { fileURLToPath } from 'node:url';

import { WebSocketServer } from 'ws';

import { answer as nodes } from './cluster.mjs';
import { decode, teltonikaLogin, teltonikaPacket } from './decode.mjs';

const EMPTY = process.env.EMPTY === '1';
const DEVICES = EMPTY ? 0 : Number(process.env.DEVICES ?? 10_000);
const RATE = Number(process.env.RATE ?? Math.min(2000, Math.max(5, DEVICES / 5)));
const PORT = Number(process.env.PORT ?? 8090);
const LINK = process.env.LINK ?? 'dev-link';
const DIST = fileURLToPath(new URL('../dist/', import.meta.url));
const STARTED = Date.now();

// ---- a small random source, the same at every start
let seed = 42;
const random = () => {
  seed = (seed * 1_664_525 + 1_013_904_223) % 4_294_967_296;
  return seed / 4_294_967_296;
};
const pick = (list) => list[Math.floor(random() * list.length)];
const now = () => new Date().toISOString();
let counter = 0;
const uuid = (at = Date.now()) => {
  const time = Math.floor(at).toString(16).padStart(12, '0');
  const low = (counter++).toString(16).padStart(12, '0');
  return `${time.slice(0, 8)}-${time.slice(8)}-7${low.slice(0, 3)}-8${low.slice(3, 6)}-${low.slice(6)}${randomBytes(3).toString('hex')}`;
};
let revision = 1;

// ---- objects
const account = { id: uuid(), name: 'default', enabled: true, retention_days: 0, storage_bytes_max: 0, labels: {}, created_at: now(), revision: revision++ };
const accounts = new Map([[account.id, account]]);
const user = { id: uuid(), name: 'admin', scopes: (process.env.SCOPES ?? 'read,write,command,publish,admin,root').split(','), enabled: true, created_at: now(), revision: revision++ };
let password = null;
const users = [user];
const sessions = new Set();
const tokens = EMPTY ? [] : [{ id: uuid(), name: 'MQTT bridge', prefix: 'flt_8fKq', scopes: ['read', 'publish'], devices: [], networks: [], expires_at: new Date(Date.now() + 8e9).toISOString(), created_at: now(), created_by: 'user:admin', revision: revision++ }];
const settings = { 'map.tiles_url': null };
const audit = [];
const events = [];
const channels = new Map();
const devices = new Map();
const commands = new Map();
const logs = new Map();

const CITIES = [[52.52, 13.4, 0.25], [48.14, 11.58, 0.2], [53.55, 9.99, 0.18], [50.94, 6.96, 0.2], [52.23, 21.01, 0.2], [48.21, 16.37, 0.15], [50.08, 14.44, 0.15], [48.86, 2.35, 0.25], [51.51, -0.13, 0.25], [45.46, 9.19, 0.15], [41.39, 2.17, 0.12], [54.69, 25.28, 0.12], [59.33, 18.07, 0.12], [40.42, -3.7, 0.2]];
const KINDS = ['FMB920', 'FMC130', 'FMM003', 'WL-200', 'FMB125'];
const NAMES = ['Van', 'Truck', 'Trailer', 'Excavator', 'Courier', 'Bus'];
const GROUPS = ['north', 'south', 'rental', 'service'];

function channel(name, protocol, transport, port, more = {}) {
  const made = {
    id: uuid(), account: account.id, name, protocol, transport, listen: `0.0.0.0:${port}`, enabled: true, auto_register: true, idle_timeout_s: 600,
    connections_max: 15_000, frame_bytes_max: 1 << 20, connection_bytes_per_s_max: 1 << 20, labels: {}, created_at: now(), revision: revision++, ...more,
  };
  channels.set(made.id, made);
  return made;
}
if (!EMPTY) {
  channel('Teltonika', 'teltonika', 'tcp', 5027);
  channel('Teltonika UDP', 'teltonika', 'udp', 5027);
  channel('Wialon IPS', 'wialon_ips', 'tcp', 5039);
  channel('Broken', 'wialon_ips', 'tcp', 80, { auto_register: false });
}

const sims = [];
function device(index, created = Date.now() - random() * 3e9) {
  const [lat, lon, spread] = pick(CITIES);
  const name = `${pick(NAMES)} ${index + 1}`;
  const teltonika = random() < 0.7;
  const made = {
    id: uuid(created), account: account.id, name, ident: teltonika ? `35630704${String(2_441_013 + index).padStart(7, '0')}` : `WL-${100_000 + index}`,
    protocol: teltonika ? 'teltonika' : 'wialon_ips', type: teltonika ? pick(KINDS) : 'WL-200', enabled: true, settings: {}, labels: { group: pick(GROUPS) },
    created_at: new Date(created).toISOString(), revision: revision++, online: random() < 0.93, seen_at: new Date(Date.now() - random() * 60_000).toISOString(),
  };
  const moving = random() < 0.6;
  made.sim = {
    lat: lat + (random() - 0.5) * spread * 2, lon: lon + (random() - 0.5) * spread * 3, speed: moving ? 20 + random() * 80 : 0, direction: random() * 360, moving,
    voltage: 12.2 + random() * 2, battery: 3.9 + random() * 0.3, odometer: random() * 200_000, satellites: 7 + Math.floor(random() * 9), last: Date.now(), values: {},
  };
  if (!made.online) made.seen_at = new Date(Date.now() - random() * 9e6).toISOString();
  step(made, Date.now());
  devices.set(made.id, made);
  sims.push(made);
  return made;
}

const round = (x, d) => Math.round(x * 10 ** d) / 10 ** d;
function step(d, at) {
  const s = d.sim;
  const seconds = Math.min(120, (at - s.last) / 1000);
  s.last = at;
  if (random() < 0.02) s.moving = !s.moving;
  s.speed = s.moving ? Math.max(4, Math.min(120, s.speed + (random() - 0.5) * 12)) : 0;
  s.direction = (s.direction + (random() - 0.5) * (s.moving ? 30 : 0) + 360) % 360;
  const km = (s.speed * seconds) / 3600;
  s.odometer += km;
  s.lat += (Math.cos((s.direction * Math.PI) / 180) * km) / 111.2;
  s.lon += (Math.sin((s.direction * Math.PI) / 180) * km) / (111.2 * Math.cos((s.lat * Math.PI) / 180));
  const message = {
    'position.latitude': round(s.lat, 7), 'position.longitude': round(s.lon, 7), 'position.altitude': round(60 + 30 * Math.sin(s.odometer), 0),
    'position.speed': round(s.speed, 0), 'position.direction': round(s.direction, 0), 'position.satellites': s.satellites, 'position.valid': true,
    'engine.ignition': s.moving, movement: s.moving, 'external.voltage': round(s.voltage + (s.moving ? 1.4 : 0) + random() * 0.05, 3), 'battery.voltage': round(s.battery, 3),
    odometer: round(s.odometer, 3), 'gsm.signal': 2 + Math.floor(random() * 4), 'event.id': 0, 'fuel.level': round(20 + 60 * Math.abs(Math.sin(s.odometer / 90)), 1),
  };
  const timestamp = new Date(at).toISOString();
  for (const name in message) s.values[name] = { value: message[name], timestamp };
  return { timestamp, received: new Date(at + 180).toISOString(), ...message };
}
for (let i = 0; i < DEVICES; i++) device(i);

function publicDevice(d) {
  const { sim: _sim, ...rest } = d;
  return rest;
}
const stateOf = (d, params) => ({
  device: d.id, name: d.name, online: d.online, seen_at: d.seen_at,
  values: params ? Object.fromEntries(params.filter((p) => d.sim.values[p]).map((p) => [p, d.sim.values[p]])) : d.sim.values,
});

// ---- live feed
const clients = new Set();
function send(feed, object, text) {
  for (const client of clients) {
    if (!client.feeds.has(feed) || (client.devices && object && !client.devices.has(object))) continue;
    if (client.socket.bufferedAmount > 4_000_000) client.dropped++;
    else client.socket.send(text());
  }
}
function lazy(make) {
  let text;
  return () => (text ??= JSON.stringify(make()));
}
function event(kind, object, params = {}) {
  const made = { id: uuid(), account: account.id, kind, object, timestamp: now(), params };
  events.unshift(made);
  events.length = Math.min(events.length, 500);
  send('event', object, lazy(() => ({ type: 'event', ...made })));
}
function log(object, params) {
  const line = { timestamp: now(), received: now(), ...params };
  const list = logs.get(object) ?? [];
  list.unshift(line);
  list.length = Math.min(list.length, 300);
  logs.set(object, list);
  send('log', object, lazy(() => ({ type: 'log', object, items: [line] })));
}
function heard(d, logged) {
  const message = step(d, Date.now());
  d.seen_at = now();
  if (!d.online) {
    d.online = true;
    event('online', d.id, { peer: '10.1.2.3:40112' });
  }
  send('message', d.id, lazy(() => ({ type: 'message', device: d.id, items: [message] })));
  const values = Object.fromEntries(Object.keys(message).filter((k) => d.sim.values[k]).map((k) => [k, d.sim.values[k]]));
  send('state', d.id, lazy(() => ({ type: 'state', device: d.id, values })));
  if (logged) {
    const { timestamp, received: _r, ...params } = message;
    const frame = d.protocol === 'teltonika'
      ? teltonikaPacket(Date.now(), message)
      : Buffer.from(`#SD#${ips(message)}\r\n`).toString('hex');
    log(d.id, { 'log.kind': 'frame', 'connection.id': d.id, peer: '10.1.2.3:40112', ident: d.ident, protocol: d.protocol, 'frame.hex': frame, messages: [{ timestamp, ...params }] });
    log(d.id, { 'log.kind': 'reply', 'connection.id': d.id, 'frame.hex': d.protocol === 'teltonika' ? '00000001' : Buffer.from('#ASD#1\r\n').toString('hex') });
  }
  return message;
}
function ips(m) {
  const d = new Date();
  const two = (n) => String(n).padStart(2, '0');
  const dm = (x, width) => `${String(Math.floor(Math.abs(x))).padStart(width, '0')}${((Math.abs(x) % 1) * 60).toFixed(4).padStart(7, '0')}`;
  return `${two(d.getUTCDate())}${two(d.getUTCMonth() + 1)}${two(d.getUTCFullYear() % 100)};${two(d.getUTCHours())}${two(d.getUTCMinutes())}${two(d.getUTCSeconds())};${dm(m['position.latitude'], 2)};${m['position.latitude'] < 0 ? 'S' : 'N'};${dm(m['position.longitude'], 3)};${m['position.longitude'] < 0 ? 'W' : 'E'};${m['position.speed']};${m['position.direction']};${m['position.altitude']};${m['position.satellites']}`;
}
let turn = 0;
let owed = 0;
let lastTick = Date.now();
const FRAMES_PER_S = 20;
setInterval(() => {
  const at = Date.now();
  owed = Math.min(RATE, owed + (RATE * (at - lastTick)) / 1000);
  lastTick = at;
  for (; owed >= 1 && sims.length; owed--) {
    const d = sims[turn++ % sims.length];
    if (d.online || random() < 0.002) heard(d, turn % Math.max(1, Math.round(RATE / FRAMES_PER_S)) === 0 || [...clients].some((c) => c.devices?.has(d.id)));
    if (random() < 0.00004 * Math.min(1, 2000 / RATE)) {
      d.online = false;
      event('offline', d.id, { 'close.name': pick(['idle_timeout', 'device_closed', 'replaced']) });
      log(d.id, { 'log.kind': 'closed', 'close.name': 'idle_timeout', 'close.code': 2 });
    }
  }
}, 50);
// A device whose page is open talks once a second, so that the page can be seen at work.
setInterval(() => {
  const watched = new Set([...clients].flatMap((c) => [...(c.devices ?? [])]));
  for (const id of watched) {
    const d = devices.get(id);
    if (d?.online) heard(d, true);
    const own = channels.get(id);
    if (own && sims.length) {
      const sim = pick(sims);
      log(id, { 'log.kind': 'connected', peer: '10.9.8.7:51000', 'connection.id': randomUUID() });
      log(id, { 'log.kind': 'login', ident: sim.ident, peer: '10.9.8.7:51000', 'frame.hex': teltonikaLogin(sim.ident), protocol: own.protocol });
    }
  }
}, 1000);
if (process.env.CONNECT === '1') {
  setInterval(() => {
    const own = [...channels.values()].find((c) => c.protocol === 'wialon_ips');
    if (!own) return;
    log(own.id, { 'log.kind': 'connected', peer: '127.0.0.1:51021', 'connection.id': randomUUID() });
    log(own.id, { 'log.kind': 'refused', peer: '127.0.0.1:51021', ident: 'demo-0001', 'close.name': 'unknown_device', 'close.code': 7, 'connection.id': randomUUID() });
    setTimeout(() => {
      const d = device(sims.length);
      event('registered', d.id, { ident: d.ident });
      d.online = true;
      heard(d, true);
    }, 6000);
  }, 15_000);
}
setInterval(() => {
  for (const client of clients) {
    if (client.dropped) client.socket.send(JSON.stringify({ type: 'lagged', dropped: client.dropped }));
    client.dropped = 0;
  }
}, 1000);
for (let i = 0; i < Math.min(20, DEVICES); i++) events.push({ id: uuid(), account: account.id, kind: pick(['online', 'offline', 'registered', 'online']), object: pick(sims).id, timestamp: new Date(Date.now() - i * 47_000).toISOString(), params: {} });

// ---- protocols
const SOURCE = `# Wialon IPS: lines of text, one packet each.
protocol wialon_ips
  description "Wialon IPS 1.1 and 2.0, plain and compressed"
  transports tcp, udp

  frame delimited by "\\r\\n" limit 64 KiB
    text until "#" as head
    match head
      "L" => login ident, password
      "SD" => short_data
      otherwise => fail unsupported "packet type {head}"

rule short_data
  let date = text until ";"
  let time = text until ";"
  emit
    timestamp = ddmmyy(date) + hhmmss(time)
    position.latitude = ddmm_mmmm(text until ";", hemisphere)
    position.speed = decimal until ";"
  reply "#ASD#1\\r\\n"
`;
const protocols = new Map([
  ['teltonika', { name: 'teltonika', description: 'Teltonika trackers: codecs 8, 8 extended, 16, 7, and commands in 12 to 14', built_in: true, version: 1, transports: ['tcp', 'udp'], settings: [{ name: 'io16', kind: 'bool', default: false, description: 'Whether element ids have two bytes' }], commands: [{ name: 'text', title: 'Text command', params: {} }], source: SOURCE.replaceAll('wialon_ips', 'teltonika') }],
  ['wialon_ips', { name: 'wialon_ips', description: 'Wialon IPS 1.1, 2.0 and compressed', built_in: true, version: 1, transports: ['tcp', 'udp'], settings: [], commands: [{ name: 'text', title: 'Text message to the driver', params: {} }], source: SOURCE }],
]);
const problem = (status, title, detail, more = {}) => Object.assign(new Error(detail), { status, body: { type: 'about:blank', title, status, detail, ...more } });
function compile(source) {
  const at = source.split('\n').findIndex((line) => /\boops\b/.test(line));
  if (at < 0) return;
  const column = source.split('\n')[at].indexOf('oops') + 1;
  throw problem(422, 'The protocol does not compile', `line ${at + 1}, column ${column}: unknown word \`oops\``, {
    code: 'protocol_invalid', errors: [{ line: at + 1, column, end: column + 4, message: 'unknown word `oops`', expected: ['a field', 'a rule'], hint: 'did you mean `loop`?' }],
  });
}

// ---- dictionary: those that the fleet uses
const P = (name, kind, decimals, unit, title, description = '') => ({ name, kind, bits: 0, decimals, unit, title, description });
const parameters = [
  P('position.latitude', 'decimal', 7, 'deg', 'Latitude'), P('position.longitude', 'decimal', 7, 'deg', 'Longitude'), P('position.altitude', 'decimal', 3, 'm', 'Altitude'),
  P('position.speed', 'decimal', 3, 'km/h', 'Speed', 'Speed over ground by satellite navigation'), P('position.direction', 'decimal', 3, 'deg', 'Direction'),
  P('position.satellites', 'int', 0, '', 'Satellites', 'Satellites used for the fix'), P('position.valid', 'bool', 0, '', 'Position valid'), P('engine.ignition', 'bool', 0, '', 'Ignition', 'Whether the ignition is on'),
  P('movement', 'bool', 0, '', 'Movement'), P('external.voltage', 'decimal', 3, 'V', 'External voltage', 'Of the vehicle or supply'), P('battery.voltage', 'decimal', 3, 'V', 'Battery voltage'),
  P('odometer', 'decimal', 3, 'km', 'Odometer'), P('gsm.signal', 'int', 0, '', 'GSM signal'), P('event.id', 'int', 0, '', 'Event'), P('fuel.level', 'decimal', 1, '%', 'Fuel level'),
];

// ---- routes
function merge(target, patch) {
  for (const [name, value] of Object.entries(patch)) {
    if (value === null) delete target[name];
    else if (typeof value === 'object' && !Array.isArray(value)) target[name] = merge({ ...target[name] }, value);
    else target[name] = value;
  }
  return target;
}
const page = (items, q, limitMax = 10_000) => {
  const limit = Math.min(Number(q.get('limit') ?? 100), limitMax);
  const from = Number(q.get('cursor') ?? 0);
  const next = from + limit < items.length ? String(from + limit) : null;
  return { items: items.slice(from, from + limit), next };
};
const found = (map, id) => {
  const object = map.get(id);
  if (!object) throw problem(404, 'Not found', `there is no object ${id} in this account`, { code: 'not_found' });
  return object;
};
const audited = (action, kind, object, changed = []) => audit.unshift({ sequence: audit.length + 1, at: now(), account: account.id, actor: { name: 'user:admin', address: '127.0.0.1' }, action, kind, object, changed });
const withStatus = (c) => {
  const port = Number(c.listen.split(':').pop());
  const error = c.enabled && port < 1024 ? `${c.listen}: permission denied; ports below 1024 need rights this process does not have: choose another port` : null;
  return { ...c, status: { listening: c.enabled && !error, error, address: c.listen, connections: c.enabled && !error ? Math.round(sims.filter((d) => d.online && d.protocol === c.protocol).length / 2) : 0 } };
};
function messagesOf(d, q) {
  const from = Date.parse(q.get('from') ?? '') || Date.now() - 3_600_000;
  const to = Math.min(Date.now(), Date.parse(q.get('to') ?? '') || Date.now());
  const fields = q.get('fields')?.split(',');
  const every = Math.max(10_000, (to - from) / 4000);
  const items = [];
  let [lat, lon, direction] = [d.sim.lat, d.sim.lon, d.sim.direction];
  for (let at = to, n = 0; at > from; at -= every, n++) {
    const speed = Math.max(0, 50 + 40 * Math.sin(at / 400_000) + 12 * Math.sin(at / 61_000));
    direction = (direction + 9 * Math.sin(at / 97_000) + 360) % 360;
    const km = (speed * every) / 3_600_000;
    lat -= (Math.cos((direction * Math.PI) / 180) * km) / 111.2;
    lon -= (Math.sin((direction * Math.PI) / 180) * km) / 68;
    const all = {
      'position.latitude': round(lat, 7), 'position.longitude': round(lon, 7), 'position.speed': round(speed, 0), 'position.direction': round(direction, 0), 'position.valid': true, 'position.altitude': 64,
      'external.voltage': round(13.4 + Math.sin(at / 9e5) * 0.6, 3), 'battery.voltage': 4.05, 'engine.ignition': speed > 20, 'fuel.level': round(50 + 30 * Math.sin(at / 4e6), 1), 'position.satellites': 9 + Math.round(3 * Math.sin(at / 2e5)), odometer: round(d.sim.odometer - n * km, 3),
    };
    const timestamp = new Date(at).toISOString();
    items.push({ timestamp, received: timestamp, ...Object.fromEntries(Object.entries(all).filter(([k]) => !fields || fields.includes(k))) });
  }
  return q.get('reverse') === 'true' ? items : items.reverse();
}
function token() {
  return `flt_${randomBytes(40).toString('base64').replace(/[^A-Za-z0-9]/g, 'x').slice(0, 40)}`;
}

const routes = [
  ['POST', '/auth/link', ({ body, response }) => {
    if (body.secret !== LINK) throw problem(401, 'This link does not work', 'It was used before, or is older than 15 minutes. Restart Fieldline to get another, or sign in with your password.', { code: 'link_invalid' });
    startSession(response);
    return { user: user.name, must_set_password: password === null };
  }],
  ['POST', '/auth/sign-in', ({ body, response }) => {
    if (body.name !== user.name || password === null || body.password !== password) throw problem(401, 'Name or password is wrong', 'Check both; after several failures sign-in pauses for a while.', { code: 'credentials' });
    startSession(response);
    return {};
  }],
  ['POST', '/auth/sign-out', ({ request }) => { sessions.delete(cookie(request)); return {}; }],
  ['GET', '/auth/me', () => ({ kind: 'user', name: user.name, account, scopes: user.scopes, must_set_password: password === null && process.env.OPEN !== '1' })],
  ['POST', '/auth/password', ({ body }) => {
    if (password !== null && body.current !== password) throw problem(401, 'The present password is wrong', 'Type the password you signed in with.', { code: 'credentials' });
    password = body.new;
    return {};
  }],
  ['GET', '/devices', ({ q }) => {
    const text = (q.get('q') ?? '').toLowerCase();
    const [key, value] = (q.get('label') ?? '').split(':');
    let list = [...devices.values()];
    if (text) list = list.filter((d) => d.name.toLowerCase().includes(text) || d.ident.toLowerCase().includes(text));
    if (key) list = list.filter((d) => d.labels[key] === value);
    if (q.get('online')) list = list.filter((d) => String(d.online) === q.get('online'));
    const { items, next } = page(list, q);
    return { items: items.map(publicDevice), next };
  }],
  ['POST', '/devices', ({ body }) => {
    if (!body.ident) throw problem(422, 'The device has no ident', 'ident: give the IMEI or serial number it sends', { code: 'invalid' });
    if ([...devices.values()].some((d) => d.ident === body.ident)) throw problem(409, 'Another device has this ident', `another device has the ident \`${body.ident}\``, { code: 'taken' });
    const d = device(sims.length);
    Object.assign(d, body, { online: false, seen_at: null });
    d.sim.values = {};
    sims.splice(sims.indexOf(d), 1);
    audited('create', 'device', d.id);
    return [201, publicDevice(d)];
  }],
  ['GET', '/devices/:id', ({ id }) => publicDevice(found(devices, id))],
  ['PATCH', '/devices/:id', ({ id, body }) => { const d = merge(found(devices, id), { ...body, revision: revision++ }); audited('update', 'device', id, Object.keys(body)); return publicDevice(d); }],
  ['DELETE', '/devices/:id', ({ id }) => { const d = found(devices, id); devices.delete(id); sims.splice(sims.indexOf(d), 1); audited('delete', 'device', id); return [204]; }],
  ['GET', '/devices/:id/state', ({ id }) => ({ ...stateOf(found(devices, id)), peer: '10.1.2.3:40112' })],
  ['GET', '/devices/:id/messages', ({ id, q }) => page(messagesOf(found(devices, id), q), q)],
  ['GET', '/devices/:id/log', ({ id, q }) => page(logs.get(id) ?? [], q)],
  ['GET', '/devices/:id/commands', ({ id, q }) => page([...commands.values()].filter((c) => c.device === id).reverse(), q)],
  ['POST', '/devices/:id/commands', ({ id, body }) => {
    const d = found(devices, id);
    const c = { id: uuid(), account: account.id, device: id, name: body.name, params: body.params, status: 'queued', created_at: now(), expires_at: new Date(Date.now() + body.ttl_s * 1000).toISOString(), sent_at: null, finished_at: null, attempts: 0, answer: null, error: null, created_by: 'user:admin' };
    commands.set(c.id, c);
    const later = (ms, change) => setTimeout(() => {
      if (c.status === 'cancelled') return;
      Object.assign(c, change);
      event('command', id, { status: c.status, name: c.name, device: id });
    }, ms);
    if (d.online) {
      later(700, { status: 'sent', sent_at: now(), attempts: 1 });
      later(2200, { status: 'answered', finished_at: now(), answer: `INI:2026/11/20 7:22 RTC:2026/11/20 10:53 RST:2 ERR:1 SR:679 BR:0 CF:0 FG:0 FL:0 SMS:0 REC:0 MD:2 DB:0 (${body.params.text})` });
    }
    return [201, c];
  }],
  ['GET', '/commands/:id', ({ id }) => found(commands, id)],
  ['DELETE', '/commands/:id', ({ id }) => { found(commands, id).status = 'cancelled'; return [204]; }],
  ['GET', '/state', ({ q }) => {
    const params = q.get('params')?.split(',');
    const { items, next } = page([...devices.values()], q);
    return { items: items.map((d) => stateOf(d, params)), next };
  }],
  ['GET', '/channels', ({ q }) => page([...channels.values()].map(withStatus), q)],
  ['POST', '/channels', ({ body }) => { const c = channel(body.name, body.protocol, body.transport, 0, body); audited('create', 'channel', c.id); return [201, withStatus(c)]; }],
  ['GET', '/channels/:id', ({ id }) => withStatus(found(channels, id))],
  ['PATCH', '/channels/:id', ({ id, body }) => { const c = merge(found(channels, id), { ...body, revision: revision++ }); audited('update', 'channel', id, Object.keys(body)); return withStatus(c); }],
  ['DELETE', '/channels/:id', ({ id }) => { found(channels, id); channels.delete(id); audited('delete', 'channel', id); return [204]; }],
  ['GET', '/channels/:id/connections', ({ id, q }) => {
    const c = found(channels, id);
    return page(sims.filter((d) => d.online && d.protocol === c.protocol).slice(0, 300).map((d, i) => ({ id: d.id, peer: `10.0.${i >> 8}.${i & 255}:4${1000 + i}`, ident: d.ident, device: d.id, since: new Date(Date.now() - 6e5 - i * 1000).toISOString(), frames: 120 + i, messages: 340 + i })), q);
  }],
  ['DELETE', '/channels/:id/connections/:sub', () => [204]],
  ['GET', '/channels/:id/log', ({ id, q }) => page((logs.get(id) ?? []).filter((l) => !q.get('from') || l.timestamp >= q.get('from')), q)],
  ['GET', '/protocols', () => ({ items: [...protocols.values()].map(({ source: _s, ...p }) => p), next: null })],
  ['GET', '/protocols/:id', ({ id }) => found(protocols, id)],
  ['PUT', '/protocols/:id', ({ id, body }) => { compile(body.source); const before = protocols.get(id); const p = { ...(before ?? protocols.get('wialon_ips')), name: id, built_in: false, version: (before?.version ?? 0) + 1, source: body.source }; protocols.set(id, p); audited('create', 'protocol', account.id); return p; }],
  ['DELETE', '/protocols/:id', ({ id }) => { protocols.delete(id); return [204]; }],
  ['POST', '/protocols/:id/check', ({ body }) => { compile(body.source); return { ok: true }; }],
  ['POST', '/protocols/:id/decode', ({ id, body }) => { if (body.source) compile(body.source); return decode(id, body.hex); }],
  ['GET', '/parameters', () => ({ items: parameters, next: null })],
  ['GET', '/events', ({ q }) => page(events, q)],
  ['GET', '/audit', ({ q }) => { const before = Number(q.get('before') ?? Infinity); return { items: audit.filter((a) => a.sequence < before).slice(0, Number(q.get('limit') ?? 100)), next: null }; }],
  ['GET', '/tokens', ({ q }) => page(tokens, q)],
  ['POST', '/tokens', ({ body }) => { const secret = token(); const t = { id: uuid(), ...body, prefix: secret.slice(0, 8), created_at: now(), created_by: 'user:admin', revision: revision++ }; tokens.unshift(t); audited('create', 'token', t.id); return [201, { ...t, secret }]; }],
  ['DELETE', '/tokens/:id', ({ id }) => { tokens.splice(tokens.findIndex((t) => t.id === id), 1); audited('delete', 'token', id); return [204]; }],
  ['GET', '/accounts', ({ q }) => page([...accounts.values()], q)],
  ['POST', '/accounts', ({ body }) => { const a = { id: uuid(), enabled: true, retention_days: 0, storage_bytes_max: 0, labels: {}, ...body, created_at: now(), revision: revision++ }; accounts.set(a.id, a); audited('create', 'account', a.id); return [201, a]; }],
  ['GET', '/accounts/:id', ({ id }) => found(accounts, id)],
  ['PATCH', '/accounts/:id', ({ id, body }) => { const a = merge(found(accounts, id), { ...body, revision: revision++ }); audited('update', 'account', id, Object.keys(body)); return a; }],
  ['DELETE', '/accounts/:id', ({ id }) => { found(accounts, id); accounts.delete(id); audited('delete', 'account', id); return [204]; }],
  ['GET', '/users', ({ q }) => page(users, q)],
  ['POST', '/users', ({ body }) => { const u = { id: uuid(), name: body.name, scopes: body.scopes, enabled: true, created_at: now(), revision: revision++ }; users.push(u); return [201, u]; }],
  ['PATCH', '/users/:id', ({ id, body }) => Object.assign(users.find((u) => u.id === id), body)],
  ['DELETE', '/users/:id', ({ id }) => { users.splice(users.findIndex((u) => u.id === id), 1); return [204]; }],
  ['GET', '/settings', () => settings],
  ['PATCH', '/settings', ({ body }) => Object.assign(settings, body)],
  ['GET', '/nodes', () => {
    if (!user.scopes.includes('root')) throw problem(403, 'This needs the scope root', 'Ask for a token or user with it.', { code: 'forbidden' });
    return nodes();
  }],
  ['GET', '/system', () => ({ version: '0.1.0', uptime_s: Math.floor((Date.now() - STARTED) / 1000), listeners: [{ name: 'http', address: `127.0.0.1:${PORT}` }, { name: 'mqtt', address: '127.0.0.1:1883' }], history: { messages: turn + 1_240_000, disk_bytes: 48_200_000 + turn * 31, segments: 14, wal_bytes: 2_400_000 }, memory: { resident_bytes: process.memoryUsage().rss }, close_codes: [{ number: 1, name: 'device_closed', description: 'The device closed the connection.' }, { number: 7, name: 'unknown_device', description: 'The device is not registered and the channel registers none by itself.' }] })],
  ['GET', '/connect', () => ({ channels: [...channels.values()].map(withStatus).filter((c) => c.enabled).map((c) => ({ id: c.id, name: c.name, protocol: c.protocol, transport: c.transport, host: '127.0.0.1', port: Number(c.listen.split(':').pop()), test_command: c.protocol === 'wialon_ips' ? `bash -c 'exec 3<>/dev/tcp/127.0.0.1/${c.listen.split(':').pop()}; printf "#L#demo-0001;NA\\x0d\\x0a#SD#NA;NA;5230.9780;N;01322.6620;E;42;270;35;11\\x0d\\x0a" >&3; timeout 2 cat <&3 | od -An -c'` : `bash -c 'exec 3<>/dev/tcp/127.0.0.1/${c.listen.split(':').pop()}; cat frame.bin >&3; timeout 2 cat <&3 | od -An -tx1'` })) })],
].map(([method, path, run]) => ({ method, run, pattern: new RegExp(`^${path.replace(/:(\w+)/g, '(?<$1>[^/]+)')}$`) }));

function startSession(response) {
  const secret = randomBytes(16).toString('hex');
  sessions.add(secret);
  response.setHeader('Set-Cookie', `fieldline_session=${secret}; Path=/; HttpOnly; SameSite=Strict`);
}
const cookie = (request) => /fieldline_session=([0-9a-f]+)/.exec(request.headers.cookie ?? '')?.[1] ?? '';

const TYPES = { '.html': 'text/html; charset=utf-8', '.js': 'text/javascript', '.css': 'text/css', '.svg': 'image/svg+xml', '.bin': 'application/octet-stream' };
const POLICY = "default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'";

const server = createServer(async (request, response) => {
  const url = new URL(request.url, 'http://localhost');
  if (!url.pathname.startsWith('/api/v1/')) {
    let file = join(DIST, normalize(url.pathname));
    if (!file.startsWith(DIST) || !existsSync(file) || url.pathname.endsWith('/')) file = join(DIST, 'index.html');
    if (!existsSync(file)) return response.writeHead(404).end('Run npm run build first.');
    response.writeHead(200, { 'Content-Type': TYPES[extname(file)] ?? 'text/plain', 'Content-Security-Policy': POLICY, 'X-Content-Type-Options': 'nosniff' });
    return response.end(readFileSync(file));
  }
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const path = url.pathname.slice('/api/v1'.length);
  try {
    if (process.env.OPEN !== '1' && !path.startsWith('/auth/link') && !path.startsWith('/auth/sign-in') && !sessions.has(cookie(request))) throw problem(401, 'Not signed in', 'Sign in first.', { code: 'unauthorized' });
    if (request.method !== 'GET' && request.headers['x-fieldline-csrf'] !== '1') throw problem(403, 'Header missing', 'Writes with a cookie need the header X-Fieldline-Csrf.', { code: 'csrf' });
    const route = routes.find((r) => r.method === request.method && r.pattern.test(path));
    if (!route) throw problem(404, 'Not found', `there is no ${request.method} ${path}`);
    const groups = route.pattern.exec(path)?.groups ?? {};
    const text = Buffer.concat(chunks).toString();
    const answer = route.run({ id: decodeURIComponent(groups.id ?? ''), sub: groups.sub, q: url.searchParams, body: text ? JSON.parse(text) : {}, request, response });
    const [status, body] = Array.isArray(answer) ? answer : [200, answer];
    response.writeHead(status, { 'Content-Type': 'application/json' });
    response.end(body === undefined ? undefined : JSON.stringify(body));
  } catch (error) {
    const status = error.status ?? 500;
    response.writeHead(status, { 'Content-Type': 'application/problem+json' });
    response.end(JSON.stringify(error.body ?? { title: 'The stand-in failed', detail: String(error.stack) }));
  }
});

const sockets = new WebSocketServer({ noServer: true });
server.on('upgrade', (request, socket, head) => {
  if (!request.url.startsWith('/api/v1/ws') || (process.env.OPEN !== '1' && !sessions.has(cookie(request)))) return socket.destroy();
  sockets.handleUpgrade(request, socket, head, (ws) => {
    const client = { socket: ws, feeds: new Set(), devices: null, dropped: 0 };
    clients.add(client);
    ws.on('close', () => clients.delete(client));
    ws.on('error', () => clients.delete(client));
    ws.on('message', (data) => {
      const wanted = JSON.parse(String(data));
      client.feeds = new Set(wanted.subscribe ?? []);
      client.devices = wanted.devices ? new Set(wanted.devices) : null;
    });
  });
});
server.listen(PORT, '127.0.0.1', () => {
  const id = createHash('sha256').update(String(STARTED)).digest('hex').slice(0, 6);
  console.log(`stand-in ${id}: ${DEVICES} devices, ${RATE} messages a second\nhttp://127.0.0.1:${PORT}/#/sign-in?link=${LINK}`);
});
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(0));
