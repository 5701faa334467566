import { describe, expect, it } from 'vitest';

import { amount, record } from '../src/lib/lags';
import { type Lane, LANES_MS, look, placeOf, tellLane, widthOf } from '../src/lib/lanes';
import type { ClusterNode, Lag } from '../src/lib/nodes';

const node = (name: string, more: Partial<ClusterNode> = {}): ClusterNode => ({ name, address: '', roles: [], zone: null, version: '1', ready: true, epoch: 1, ...more });
const after = (...looks: [number, ClusterNode[], boolean?][]): Lane[] => looks.reduce((lanes: Lane[], [at, nodes, sure]) => look(lanes, nodes, sure ?? true, at), []);
const spans = (lanes: Lane[], name: string) => lanes.find((l) => l.node === name)!.spans.map((s) => [s.being, s.from, s.to]);

describe('lanes', () => {
  it('grow while a node is as it was', () => {
    expect(spans(after([1000, [node('a')]], [2000, [node('a')]], [3000, [node('a')]]), 'a')).toEqual([['ready', 1000, 3000]]);
  });
  it('end where a node left, and begin anew where it joined again', () => {
    const lanes = after([1000, [node('a'), node('b')]], [2000, [node('a')]], [3000, [node('a'), node('b', { epoch: 2 })]], [4000, [node('a'), node('b', { epoch: 2 })]]);
    expect(spans(lanes, 'b')).toEqual([['ready', 1000, 1000], ['ready', 3000, 4000]]);
    expect(tellLane(lanes[1]!, 4000)).toBe('b is ready, started again once');
  });
  it('tell what drains, and what is known from before only', () => {
    const lanes = after([1000, [node('a')]], [2000, [node('a')]], [3000, [node('a', { ready: false })]], [4000, [node('a', { ready: false })], false]);
    expect(spans(lanes, 'a')).toEqual([['ready', 1000, 2000], ['drains', 2000, 3000], ['unsure', 3000, 4000]]);
    expect(tellLane(lanes[0]!, 4000)).toBe('a is there as last known');
    expect(tellLane(lanes[0]!, 60_000)).toBe('a is gone');
  });
  it('have no two spans that begin at once', () => {
    const lanes = after([1000, [node('a')]], [2000, [node('a', { ready: false })]], [3000, [node('a')]]);
    expect(spans(lanes, 'a')).toEqual([['drains', 1000, 2000], ['ready', 2000, 3000]]);
  });
  it('do not tell of a time in which nobody looked', () => {
    expect(spans(after([1000, [node('a')]], [61_000, [node('a')]]), 'a')).toEqual([['ready', 1000, 1000], ['ready', 61_000, 61_000]]);
  });
  it('are cut to the last minutes, and gone with the last of them', () => {
    const lanes = after([0, [node('a'), node('b')]], [4000, [node('a'), node('b')]], [LANES_MS + 2000, [node('a')]]);
    expect(spans(lanes, 'b')).toEqual([['ready', 2000, 4000]]);
    expect(look(lanes, [node('a')], true, LANES_MS + 5000).map((l) => l.node)).toEqual(['a']);
  });
  it('stand in a picture that is a minute wide at least', () => {
    expect(widthOf([], 5)).toBe(60_000);
    const lanes = after([0, [node('a')]], [120_000, [node('a')]]);
    expect(widthOf(lanes, 120_000)).toBe(120_000);
    expect(placeOf(60_000, 120_000, 120_000)).toBe(50);
    expect(placeOf(-5, 120_000, 120_000)).toBe(0);
  });
});

describe('lags', () => {
  const lag = (value: number | null, more: Partial<Lag> = {}): Lag => ({ name: 'database', value, unit: 'ms', note: null, ...more });
  it('keep their figures, and say what is wrong', () => {
    const rows = [lag(2), lag(null, { note: 'it is away' }), lag(700)].reduce((rows, one) => record(rows, [one]), record([], []));
    expect(rows).toMatchObject([{ values: [2, 700], text: '700 ms', tone: 'warn', note: null }]);
    expect(record(rows, [lag(null, { note: 'it is away' })])).toMatchObject([{ text: 'no answer', tone: 'bad', note: 'it is away' }]);
    expect(record([], [lag(null, { name: 'append' })])).toMatchObject([{ text: '–', tone: '', note: 'none stored by this node yet' }]);
    expect(record([], [lag(1, { name: 'newer' })])).toMatchObject([{ title: 'newer', text: '1.0 ms', tone: 'ok' }]);
  });
  it('keep no more than are drawn', () => {
    let rows = record([], []);
    for (let n = 0; n < 200; n++) rows = record(rows, [lag(n)]);
    expect(rows[0]!.values.length).toBe(90);
    expect(rows[0]!.values[89]).toBe(199);
  });
  it('read as people do', () => {
    expect([amount(0.83, 'ms'), amount(140.4, 'ms'), amount(2345, 'ms'), amount(1200, 'items')]).toEqual(['0.8 ms', '140 ms', '2.3 s', '1,200']);
  });
});
