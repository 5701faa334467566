import { describe, expect, it } from 'vitest';

import { CHANGES_MAX, type Change, type ClusterNode, compareVersions, diff, type Held, HELD_MAX, knowsHeld, type Nodes, type View, remembered, say, settle, sharesOf, sift, versionsOf, zonesOf } from '../src/lib/nodes';

const node = (name: string, more: Partial<ClusterNode> = {}): ClusterNode => ({ name, address: `http://${name}:7080`, roles: ['gateway'], zone: 'a', version: '0.2.0', ready: true, epoch: 1, ...more });
const held = (...list: [string, string, number][]): Held[] => list.map(([key, owner, epoch]) => ({ key, node: owner, epoch }));
const answer = (more: Partial<View> = {}): View => ({ knows: true, node: 'n1', fresh: true, items: [node('n1'), node('n2')], held: held(['modules/1', 'n1', 3], ['modules/2', 'n2', 4]), led: [], spread: [], lags: [], problems: [], ...more });
const AWAY = 'what is owned is not known: no member of etcd answers';

/** As the page does it. */
const told = (before: View, after: Nodes) => diff(before, settle(before, after)).map(say);

describe('what changed', () => {
  it('is nothing between equal answers, whose lists are kept', () => {
    const [a, b] = [answer(), answer()];
    expect(settle(a, b)).toBe(a);
    expect(told(a, b)).toEqual([]);
    const drained = settle(a, answer({ items: [node('n1'), node('n2', { ready: false })] }));
    expect(drained.held).toBe(a.held);
    expect(drained.problems).toBe(a.problems);
  });
  it('tells who joined, left, drains and is ready', () => {
    const after = answer({ items: [node('n2', { ready: false }), node('n3', { zone: 'b', ready: false })] });
    expect(told(answer(), after)).toEqual(['n1 left; it owned 1 key', 'n2 drains: it takes no more work', 'n3 joined in zone b, version 0.2.0, not ready yet']);
    expect(told(after, answer({ items: [node('n2'), node('n3', { zone: 'b' })] }))).toEqual(['n2 is ready and takes work', 'n3 is ready and takes work']);
  });
  it('tells a restart between two answers by the epoch', () => {
    expect(told(answer(), answer({ items: [node('n1'), node('n2', { epoch: 2, version: '0.3.0' })] }))).toEqual(['n2 started again, epoch 2: version 0.2.0 became 0.3.0']);
  });
  it('tells of a key its old and new owner and the epoch', () => {
    const after = answer({ held: held(['modules/1', 'n2', 4], ['modules/2', 'n2', 6], ['retention', 'n1', 1]) });
    expect(told(answer(), after)).toEqual(['modules/1: n1 → n2, epoch 4', 'modules/2: n2 took anew, epoch 6', 'retention: n1 took, epoch 1']);
    expect(told(after, answer({ held: held(['modules/1', 'n2', 4], ['retention', 'n1', 1]) }))).toEqual(['modules/2: n2 let go, nobody owns it']);
  });
  it('remembers who had a key that was free in between', () => {
    const free = new Map<string, string>();
    const freed = answer({ held: held(['modules/2', 'n2', 4]) });
    expect(diff(answer(), freed, free).map(say)).toEqual(['modules/1: n1 let go, nobody owns it']);
    expect(diff(freed, answer({ held: held(['modules/1', 'n2', 5], ['modules/2', 'n2', 4]) }), free).map(say)).toEqual(['modules/1: n1 → nobody → n2, epoch 5']);
    expect(free.size).toBe(0);
  });
  it('is one line for many keys that change hands together', () => {
    const many = (owner: string, epoch: number) => Array.from({ length: 1000 }, (_, i) => ({ key: `partitions/${i}`, node: owner, epoch: epoch + (i % 3) }));
    const changes = diff(answer({ held: many('n1', 1) }), answer({ held: many('n2', 5) }));
    expect(changes.map(say)).toEqual(['1000 keys of partitions/: n1 → n2, epochs 5 to 7']);
    expect(changes[0]).toMatchObject({ count: 1000 });
    const mixed = diff(answer({ held: [] }), answer({ held: [...many('n1', 5).slice(0, 4), ...held(['modules/1', 'n1', 9])] }));
    expect(mixed.map(say)).toEqual(['5 keys (4 partitions/, 1 modules/): n1 took, epochs 5 to 9']);
    const large = diff(answer({ held: many('n1', 1) }), answer({ held: many('n2', 250_286_211_203_073) }));
    expect(large.map(say)).toEqual(['1000 keys of partitions/: n1 → n2, epochs 250286211203073 to …075']);
    expect((changes[0] as { keys: unknown[] }).keys.length).toBe(100);
  });
});

describe('while the cluster does not answer', () => {
  it('keys that are not known have not been let go', () => {
    const before = answer();
    const away = settle(before, answer({ fresh: false, held: [], problems: [AWAY] }));
    expect(diff(before, away).map(say)).toEqual(['etcd does not answer: nothing is placed anew']);
    expect(away.held).toBe(before.held);
    expect(told(away, answer({ held: held(['modules/1', 'n2', 5], ['modules/2', 'n2', 4]) }))).toEqual(['etcd answers again', 'modules/1: n1 → n2, epoch 5']);
  });
  it('nor in the moment before the node has noticed', () => {
    expect(knowsHeld(answer({ held: [], problems: [AWAY] }))).toBe(false);
    expect(told(answer(), answer({ held: [], problems: [AWAY] }))).toEqual([]);
  });
  it('nor taken, once they are told for the first time', () => {
    const first = settle(null, answer({ fresh: false, held: [], problems: [AWAY] }));
    expect(first.knows).toBe(false);
    expect(settle(first, answer()).knows).toBe(true);
    expect(told(first, answer())).toEqual(['etcd answers again']);
  });
  it('but a cluster that owns nothing is known to', () => {
    expect(told(answer(), answer({ held: [] }))).toHaveLength(2);
  });
});

it('does not take keys beyond a cut answer for free', () => {
  const keys = Array.from({ length: HELD_MAX + 1 }, (_, i) => ({ key: `k/${String(i).padStart(6, '0')}`, node: 'n1', epoch: 1 }));
  // One more at the front pushes the last one out of the answer.
  expect(diff(answer({ held: keys.slice(1) }), answer({ held: keys.slice(0, HELD_MAX) })).map(say)).toEqual(['k/000000: n1 took, epoch 1']);
});

it('keeps a bounded number of lines, newest first', () => {
  let lines: Change[] = [];
  for (let i = 0; i < 400; i++) lines = remembered(lines, [{ kind: 'ready', node: `a${i}` }, { kind: 'drains', node: `b${i}` }], i);
  expect(lines).toHaveLength(CHANGES_MAX);
  expect(lines[0]).toMatchObject({ kind: 'drains', node: 'b399', at: 399 });
  expect(new Set(lines.map((l) => l.id)).size).toBe(CHANGES_MAX);
});

describe('the picture', () => {
  it('has zones in order, nodes without one last', () => {
    const zones = zonesOf([node('n10', { zone: 'b' }), node('n2', { zone: 'b' }), node('x', { zone: null }), node('n1')]);
    expect(zones.map((z) => [z.name, z.nodes.map((n) => n.name)])).toEqual([['a', ['n1']], ['b', ['n2', 'n10']], [null, ['x']]]);
  });
  it('counts keys by owner and prefix, also of owners that left', () => {
    const { shares, prefixes, most } = sharesOf([node('n2'), node('n1')], held(['modules/1', 'n1', 1], ['partitions/1', 'n1', 1], ['partitions/2', 'gone', 1], ['retention', 'n1', 1]));
    expect(prefixes).toEqual(['partitions/', 'modules/', 'retention']);
    expect(shares.map((s) => [s.node, s.member, s.total])).toEqual([['n1', true, 3], ['n2', true, 0], ['gone', false, 1]]);
    expect(most).toBe(3);
  });
  it('knows which version is newer', () => {
    expect(['0.10.0', '0.9.2', '1.0.0-rc.1', '1.0.0'].sort(compareVersions)).toEqual(['0.9.2', '0.10.0', '1.0.0-rc.1', '1.0.0']);
    expect(versionsOf([node('a'), node('b', { version: '0.10.0' }), node('c')])).toEqual([{ version: '0.10.0', count: 1 }, { version: '0.2.0', count: 2 }]);
  });
  it('searches keys and owners', () => {
    const list = held(['modules/1', 'n1', 1], ['modules/2', 'n2', 1]);
    expect(sift(list, 'MOD n2', '').map((h) => h.key)).toEqual(['modules/2']);
    expect(sift(list, '', 'n1').map((h) => h.key)).toEqual(['modules/1']);
    expect(sift(list, '', '')).toHaveLength(2);
  });
});
