// A made-up cluster for the stand-in: three zones where nodes join, drain and leave, keys change hands, and etcd is away at times.
//
// CLUSTER=alone is one process, CLUSTER=away an etcd that does not answer, CLUSTER=still a cluster in which nothing happens;
// KEYS=10000 sets how many keys are owned, STEP_MS=4000 how often something happens.
const MODE = process.env.CLUSTER ?? 'live';
const KEYS = Number(process.env.KEYS ?? 1300);
const STEP_MS = Number(process.env.STEP_MS ?? 4000);
// As large as those of etcd.
let epoch = 250_286_211_203_000;

const ROLES = [['gateway'], ['rest', 'mqtt'], ['gateway', 'rest', 'mqtt']];
const make = (n, zone, version = '0.2.0') => ({ name: `node-${n}`, address: `http://10.0.${zone.charCodeAt(0) - 96}.${n}:7080`, roles: ROLES[n % 3], zone: `eu-${zone}`, version, ready: true, epoch: ++epoch });
let nodes = [make(1, 'a'), make(2, 'b'), make(3, 'c'), make(4, 'a'), make(5, 'b'), make(6, 'c')];
let next = 7;
const held = new Map();
let fresh = true;

const pick = (list) => list[Math.floor(Math.random() * list.length)];
const ready = () => nodes.filter((n) => n.ready);
const take = (key, node) => held.set(key, { key, node: node.name, epoch: ++epoch });
const place = () => {
  for (const key of KEY_NAMES) if (!held.has(key) && ready().length) take(key, pick(ready()));
};
const KEY_NAMES = ['retention', 'router/upkeep', 'schema'];
for (let i = 0; KEY_NAMES.length < KEYS; i++) KEY_NAMES.push(i % 4 === 3 ? `modules/${i % 8 === 3 ? 'geofence' : 'webhook'}-${(i >> 2).toString(16).padStart(4, '0')}` : `partitions/${String(i).padStart(5, '0')}`);
KEY_NAMES.sort();
place();

/** What a node had is free for a while, as after its death, or goes to others at once. */
function hand(name, wait_ms) {
  const keys = [...held.values()].filter((h) => h.node === name).map((h) => h.key);
  for (const key of keys) held.delete(key);
  if (wait_ms) setTimeout(place, wait_ms);
  else place();
}
const STORY = [
  () => { for (let i = 0; i < 2; i++) { const key = pick(KEY_NAMES); const to = pick(ready().filter((n) => n.name !== held.get(key)?.node)); if (to) take(key, to); } },
  () => { const node = pick(ready()); node.ready = false; hand(node.name, 0); },
  () => { const gone = nodes.find((n) => !n.ready); nodes = nodes.filter((n) => n !== gone); },
  () => { const made = make(next++, pick(['a', 'b', 'c']), '0.3.0'); made.ready = false; nodes.push(made); setTimeout(() => { made.ready = true; }, 2500); },
  () => { for (const key of KEY_NAMES.filter((_, i) => i % 9 === 0)) { const to = nodes.at(-1); if (to.ready && held.get(key)?.node !== to.name) take(key, to); } },
  () => { fresh = false; },
  () => {},
  () => { fresh = true; },
  () => { const dead = pick(ready().slice(1)); nodes = nodes.filter((n) => n !== dead); hand(dead.name, 2200); },
  () => { const made = make(next++, pick(['a', 'b', 'c'])); nodes.push(made); },
];
if (MODE === 'live') {
  let turn = 0;
  setInterval(() => STORY[turn++ % STORY.length](), STEP_MS);
}
if (MODE === 'away') fresh = false;

const LED = { retention: 'lets go of messages beyond retention', 'router/upkeep': 'looks after commands that wait' };
const led = (all) => Object.entries(LED).map(([key, what]) => { const h = all?.find((one) => one.key === key); return { key, what, node: h?.node ?? null, epoch: h?.epoch ?? null }; });
const wave = (least, most, period_ms) => least + ((most - least) * (1 + Math.sin(Date.now() / period_ms))) / 2 + Math.random() * least;
const ms = (name, value) => ({ name, value, unit: 'ms', note: null });
const items = (name, value, note = null) => ({ name, value, unit: 'items', note });

function spread() {
  return ['modules/', 'partitions/'].map((prefix) => {
    const names = KEY_NAMES.filter((key) => key.startsWith(prefix));
    const own = names.map((key) => held.get(key)).filter(Boolean);
    const newest = nodes.at(-1);
    const misplaced = newest?.ready && !own.some((h) => h.node === newest.name) ? Math.round(names.length / nodes.length) : 0;
    return { role: prefix === 'modules/' ? 'drivers' : 'mqtt', prefix, keys: names.length, held: own.filter((h) => h.node === nodes[0].name).length, orphans: names.length - own.length, misplaced, frozen: !fresh };
  });
}
function lags() {
  const cluster = fresh ? ms('cluster', wave(1, 6, 6000)) : { name: 'cluster', value: null, unit: 'ms', note: 'the cluster cannot be reached: no answer in 2000 ms' };
  return [ms('database', wave(1, 4, 9000)), cluster, ms('append', wave(4, 18, 7000)), items('live_items', Math.round(wave(2, 90, 5000))), items('last_values', 0)];
}

/** What `GET /nodes` answers. */
export function answer() {
  if (MODE === 'alone') {
    return { node: 'fieldline', fresh: true, items: [{ name: 'fieldline', address: '', roles: ['gateway', 'rest', 'mqtt'], zone: null, version: '0.2.0', ready: true, epoch: 1 }], held: [{ key: 'retention', node: 'fieldline', epoch: 2 }, { key: 'router/upkeep', node: 'fieldline', epoch: 3 }], led: led([{ key: 'retention', node: 'fieldline', epoch: 2 }, { key: 'router/upkeep', node: 'fieldline', epoch: 3 }]), spread: [], lags: [ms('database', wave(0.1, 0.3, 9000)), ms('append', wave(2, 6, 7000))], problems: [] };
  }
  const problems = fresh ? [] : ['etcd does not answer: nothing is placed anew until it does', 'what is owned is not known: the cluster cannot be reached: no answer in 2000 ms'];
  const all = [...held.values()].sort((a, b) => (a.key < b.key ? -1 : 1)).slice(0, 10_000);
  return { node: nodes[0].name, fresh, items: [...nodes].sort((a, b) => (a.name < b.name ? -1 : 1)), held: fresh ? all : [], led: led(fresh ? all : null), spread: spread(), lags: lags(), problems };
}
