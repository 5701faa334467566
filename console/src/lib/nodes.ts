// The cluster as its nodes tell it, and what changed between two answers. Pure: the page polls and draws.

export interface ClusterNode {
  name: string;
  address: string;
  roles: string[];
  zone: string | null;
  version: string;
  ready: boolean;
  /** Grows each time that a node of this name joins. */
  epoch: number;
}

export interface Held {
  key: string;
  node: string;
  /** Grows with every change of hands. */
  epoch: number;
}

/** Work that one node at a time does for all. */
export interface Led {
  key: string;
  what: string;
  /** Null while nobody does it, or where that is not known. */
  node: string | null;
  epoch: number | null;
}

/** A role whose keys are spread over the nodes, as the node that answers sees it. */
export interface Spread {
  role: string;
  prefix: string;
  keys: number;
  /** At the node that answers. */
  held: number;
  orphans: number;
  misplaced: number;
  frozen: boolean;
}

/** Something that can be behind at the node that answers. */
export interface Lag {
  name: string;
  value: number | null;
  unit: 'ms' | 'items';
  note: string | null;
}

/** `GET /nodes`. */
export interface Nodes {
  /** The node that answers. */
  node: string;
  /** Whether the cluster's store answers; while it does not, members are those last known. */
  fresh: boolean;
  items: ClusterNode[];
  held: Held[];
  led: Led[];
  spread: Spread[];
  lags: Lag[];
  problems: string[];
}

/** What is shown: the last answer, and what is known from those before. */
export interface View extends Nodes {
  /** Whether any answer told who owns what; `held` means nothing until then. */
  knows: boolean;
}

/** Most keys that one answer names. */
export const HELD_MAX = 10_000;
/** Most lines that are kept of what changed. */
export const CHANGES_MAX = 500;
/** Keys that change hands together, between the same two, are one line from this number on. */
export const TOGETHER_MIN = 4;
/** Most keys that such a line names. */
export const NAMED_MAX = 100;
/** How the server begins the sentence that it could not ask who owns what. */
const HELD_UNKNOWN = 'what is owned is not known';

export interface Moved {
  key: string;
  /** Who had it; null where nobody did. */
  from: string | null;
  /** Who has it; null where nobody does. */
  to: string | null;
  epoch: number;
}

export type What =
  | { kind: 'joined'; node: string; zone: string | null; version: string; ready: boolean }
  /** A node of this name joined anew between two answers: its process was started again. */
  | { kind: 'rejoined'; node: string; epoch: number; before: string; version: string }
  | { kind: 'left'; node: string; keys: number }
  | { kind: 'ready'; node: string }
  | { kind: 'drains'; node: string }
  /** `last` had it before nobody did. */
  | { kind: 'moved'; from: string | null; last: string | null; to: string | null; count: number; prefixes: { prefix: string; count: number }[]; keys: Moved[] }
  | { kind: 'away' }
  | { kind: 'back' }
  /** The server itself gave no answer, and gives one again. */
  | { kind: 'silent' }
  | { kind: 'heard' };

/** A line of what changed. */
export type Change = What & { id: number; at: number };

/** What stands before the name in a key, `modules/` of `modules/7`; the key itself where nothing does. */
export function prefixOf(key: string): string {
  const slash = key.indexOf('/');
  return slash < 0 ? key : key.slice(0, slash + 1);
}

/** Whether an answer says who owns what. */
export function knowsHeld(answer: Nodes): boolean {
  return answer.held.length > 0 || (answer.fresh && !answer.problems.some((text) => text.startsWith(HELD_UNKNOWN)));
}

/**
 * What is to be shown after `answer`: ownership that it does not know stays as it was, and lists that did not change are
 * those of `before`, so that nothing is drawn anew. Figures of lag change with every answer: they are not compared.
 */
export function settle(before: View | null, answer: Nodes): View {
  const told = knowsHeld(answer);
  if (!before) return { ...answer, knows: told };
  const held = told ? (sameHeld(before.held, answer.held) ? before.held : answer.held) : before.held;
  const items = JSON.stringify(before.items) === JSON.stringify(answer.items) ? before.items : answer.items;
  const problems = before.problems.join('\n') === answer.problems.join('\n') ? before.problems : answer.problems;
  const led = told ? (JSON.stringify(answer.led) === JSON.stringify(before.led) ? before.led : answer.led) : before.led;
  const spread = JSON.stringify(answer.spread) === JSON.stringify(before.spread) ? before.spread : answer.spread;
  const same = led === before.led && spread === before.spread && held === before.held && items === before.items && problems === before.problems && before.node === answer.node && before.fresh === answer.fresh;
  const knows = before.knows || told;
  return same && knows === before.knows ? before : { ...answer, held, led, spread, items, problems, knows };
}

function sameHeld(a: readonly Held[], b: readonly Held[]): boolean {
  return a === b || (a.length === b.length && a.every((x, i) => x.key === b[i]!.key && x.node === b[i]!.node && x.epoch === b[i]!.epoch));
}

/**
 * What changed between two settled answers, in the order in which to tell it. `free` remembers from call to call who had
 * the keys that nobody has now: a key whose owner died is free for a while, and yet goes from one to another.
 */
export function diff(before: View, after: View, free: Map<string, string> = new Map()): What[] {
  const out: What[] = [];
  if (before.fresh && !after.fresh) out.push({ kind: 'away' });
  if (!before.fresh && after.fresh) out.push({ kind: 'back' });
  if (before.items !== after.items) members(before, after, out);
  if (before.knows && before.held !== after.held) hands(before.held, after.held, free, out);
  return out;
}

function members(before: View, after: View, out: What[]): void {
  const was = new Map(before.items.map((n) => [n.name, n]));
  const is = new Map(after.items.map((n) => [n.name, n]));
  for (const node of before.items) {
    if (!is.has(node.name)) out.push({ kind: 'left', node: node.name, keys: before.held.filter((h) => h.node === node.name).length });
  }
  for (const node of after.items) {
    const old = was.get(node.name);
    if (!old) {
      out.push({ kind: 'joined', node: node.name, zone: node.zone, version: node.version, ready: node.ready });
      continue;
    }
    if (node.epoch !== old.epoch) out.push({ kind: 'rejoined', node: node.name, epoch: node.epoch, before: old.version, version: node.version });
    if (node.ready !== old.ready) out.push({ kind: node.ready ? 'ready' : 'drains', node: node.name });
  }
}

function hands(before: readonly Held[], after: readonly Held[], free: Map<string, string>, out: What[]): void {
  const was = new Map(before.map((h) => [h.key, h]));
  const moved: Moved[] = [];
  for (const h of after) {
    const old = was.get(h.key);
    was.delete(h.key);
    if (!old || old.node !== h.node || old.epoch !== h.epoch) moved.push({ key: h.key, from: old?.node ?? null, to: h.node, epoch: h.epoch });
  }
  // A full answer is cut after the last key that it names: those beyond are not known to be free.
  const last = after.length >= HELD_MAX ? after[after.length - 1]!.key : null;
  for (const h of was.values()) {
    if (last === null || h.key <= last) moved.push({ key: h.key, from: h.node, to: null, epoch: h.epoch });
  }
  const together = new Map<string, { last: string | null; list: Moved[] }>();
  for (const m of moved) {
    const last = m.from === null ? (free.get(m.key) ?? null) : null;
    if (m.to === null && m.from !== null) {
      if (free.size < HELD_MAX) free.set(m.key, m.from);
    } else free.delete(m.key);
    const way = JSON.stringify([m.from, last, m.to]);
    const group = together.get(way);
    if (group) group.list.push(m);
    else together.set(way, { last, list: [m] });
  }
  for (const { last, list } of together.values()) {
    const lines = list.length < TOGETHER_MIN ? list.map((m) => [m]) : [list];
    for (const keys of lines) {
      const { from, to } = keys[0]!;
      out.push({ kind: 'moved', from, last, to, count: keys.length, prefixes: counted(keys), keys: keys.slice(0, NAMED_MAX) });
    }
  }
}

/** How many keys there are of each prefix, the commonest first. */
function counted(keys: readonly { key: string }[]): { prefix: string; count: number }[] {
  const counts = new Map<string, number>();
  for (const { key } of keys) counts.set(prefixOf(key), (counts.get(prefixOf(key)) ?? 0) + 1);
  return [...counts].map(([prefix, count]) => ({ prefix, count })).sort((a, b) => b.count - a.count || compareNames(a.prefix, b.prefix));
}

/** The lines with new ones before them, newest first, at most `CHANGES_MAX`. */
export function remembered(lines: readonly Change[], news: readonly What[], at: number): Change[] {
  const next = (lines[0]?.id ?? 0) + 1;
  const made = news.map((what, i) => ({ ...what, id: next + i, at }));
  return [...made.reverse(), ...lines].slice(0, CHANGES_MAX);
}

export interface Zone {
  /** Null: nodes that name none. */
  name: string | null;
  nodes: ClusterNode[];
}

/** Nodes by zone, in order of names; those without one come last. */
export function zonesOf(nodes: readonly ClusterNode[]): Zone[] {
  const zones = new Map<string | null, ClusterNode[]>();
  for (const node of nodes) zones.set(node.zone, [...(zones.get(node.zone) ?? []), node]);
  return [...zones]
    .map(([name, list]) => ({ name, nodes: [...list].sort((a, b) => compareNames(a.name, b.name)) }))
    .sort((a, b) => (a.name === null ? 1 : 0) - (b.name === null ? 1 : 0) || compareNames(a.name ?? '', b.name ?? ''));
}

const collator = new Intl.Collator('en', { numeric: true });
/** `node-9` before `node-10`. */
export const compareNames = (a: string, b: string): number => collator.compare(a, b);

/** Versions in use and on how many nodes, newest first. */
export function versionsOf(nodes: readonly ClusterNode[]): { version: string; count: number }[] {
  const counts = new Map<string, number>();
  for (const node of nodes) counts.set(node.version, (counts.get(node.version) ?? 0) + 1);
  return [...counts].map(([version, count]) => ({ version, count })).sort((a, b) => -compareVersions(a.version, b.version));
}

/** As semantic versions are ordered: `0.10.0` after `0.9.2`, `1.0.0-rc.1` before `1.0.0`. */
export function compareVersions(a: string, b: string): number {
  const cut = (text: string): [string, string] => {
    const plain = text.split('+', 1)[0]!;
    const dash = plain.indexOf('-');
    return dash < 0 ? [plain, ''] : [plain.slice(0, dash), plain.slice(dash + 1)];
  };
  const [[numbers, pre], [others, prior]] = [cut(a), cut(b)];
  if (numbers !== others) return compareNames(numbers, others);
  if (pre === prior) return 0;
  if (pre === '' || prior === '') return pre === '' ? 1 : -1;
  return compareNames(pre, prior);
}

export interface Share {
  node: string;
  /** Whether it is a member; one that left owns its keys until its leases end. */
  member: boolean;
  total: number;
  parts: { prefix: string; count: number }[];
}

/** How many keys each node owns, by prefix; members in order of names, then owners that are none. */
export function sharesOf(nodes: readonly ClusterNode[], held: readonly Held[]): { shares: Share[]; prefixes: string[]; most: number } {
  const owners = new Map<string, Held[]>();
  for (const h of held) {
    const own = owners.get(h.node);
    if (own) own.push(h);
    else owners.set(h.node, [h]);
  }
  // The commonest first, so that it has the first colour and all bars begin with it.
  const prefixes = counted(held).map((p) => p.prefix);
  const share = (node: string, member: boolean): Share => {
    const own = new Map(counted(owners.get(node) ?? []).map((p) => [p.prefix, p.count]));
    const parts = prefixes.flatMap((prefix) => (own.has(prefix) ? [{ prefix, count: own.get(prefix)! }] : []));
    return { node, member, total: parts.reduce((sum, p) => sum + p.count, 0), parts };
  };
  const members = nodes.map((n) => n.name).sort(compareNames);
  const others = [...owners.keys()].filter((name) => !members.includes(name)).sort(compareNames);
  const shares = [...members.map((name) => share(name, true)), ...others.map((name) => share(name, false))];
  return { shares, prefixes, most: Math.max(0, ...shares.map((s) => s.total)) };
}

/** Which keys to show: every word of `text` is in the key or the owner's name. */
export function sift(held: readonly Held[], text: string, owner: string): Held[] {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0 && owner === '') return [...held];
  return held.filter((h) => {
    if (owner !== '' && h.node !== owner) return false;
    const all = `${h.key} ${h.node}`.toLowerCase();
    return words.every((word) => all.includes(word));
  });
}

/** A change as a sentence without its subject's mark. */
export function say(change: What): string {
  switch (change.kind) {
    case 'joined': return `${change.node} joined${change.zone === null ? '' : ` in zone ${change.zone}`}, version ${change.version}${change.ready ? '' : ', not ready yet'}`;
    case 'rejoined': return `${change.node} started again, epoch ${change.epoch}${change.before === change.version ? '' : `: version ${change.before} became ${change.version}`}`;
    case 'left': return `${change.node} left${change.keys ? `; it owned ${change.keys} ${change.keys === 1 ? 'key' : 'keys'}` : ''}`;
    case 'ready': return `${change.node} is ready and takes work`;
    case 'drains': return `${change.node} drains: it takes no more work`;
    case 'away': return 'etcd does not answer: nothing is placed anew';
    case 'back': return 'etcd answers again';
    case 'silent': return 'This server does not answer';
    case 'heard': return 'This server answers again';
    case 'moved': {
      const [one] = change.keys;
      const of = change.prefixes.length > 3 ? '' : change.prefixes.length === 1 ? ` of ${change.prefixes[0]!.prefix}` : ` (${change.prefixes.map((p) => `${p.count} ${p.prefix}`).join(', ')})`;
      const what = change.count === 1 && one ? one.key : `${change.count} keys${of}`;
      const epochs = change.keys.map((k) => k.epoch);
      const epoch = span(Math.min(...epochs), Math.max(...epochs));
      if (change.to === null) return `${what}: ${change.from} let go, nobody owns ${change.count === 1 ? 'it' : 'them'}`;
      if (change.from === null && change.last === null) return `${what}: ${change.to} took, ${epoch}`;
      if (change.from === null) return change.last === change.to ? `${what}: ${change.to} took back, ${epoch}` : `${what}: ${change.last} → nobody → ${change.to}, ${epoch}`;
      if (change.from === change.to) return `${what}: ${change.to} took anew, ${epoch}`;
      return `${what}: ${change.from} → ${change.to}, ${epoch}`;
    }
  }
}

/** Epochs from `least` to `most`: they are long numbers that differ at their ends only. */
function span(least: number, most: number): string {
  if (least === most) return `epoch ${least}`;
  const [a, b] = [String(least), String(most)];
  let same = 0;
  while (a.length === b.length && a[same] === b[same]) same++;
  const from = Math.min(same, Math.max(0, b.length - 3));
  return `epochs ${a}${a.length === b.length && from > 0 ? ` to …${b.slice(from)}` : ` to ${b}`}`;
}

export function toneOf(change: What): 'ok' | 'warn' | 'bad' | 'accent' | '' {
  switch (change.kind) {
    case 'joined': case 'ready': case 'back': case 'heard': return 'ok';
    case 'drains': case 'rejoined': return 'warn';
    case 'left': case 'away': case 'silent': return 'bad';
    case 'moved': return change.to === null ? 'warn' : 'accent';
  }
}

/** The word that marks a line. */
export const WORDS: Record<What['kind'], string> = {
  joined: 'joined', rejoined: 'restart', left: 'left', ready: 'ready', drains: 'drains', moved: 'keys', away: 'etcd', back: 'etcd', silent: 'server', heard: 'server',
};
