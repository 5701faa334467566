import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import { backoff_ms, eventOf, Socket, union, wanted, type Push } from '../src/lib/socket';

class FakeSocket {
  static readonly OPEN = 1;
  static all: FakeSocket[] = [];
  readyState = 0;
  sent: string[] = [];
  onopen: () => void = () => {};
  onmessage: (m: { data: string }) => void = () => {};
  onclose: () => void = () => {};
  constructor(readonly url: string) {
    FakeSocket.all.push(this);
  }
  send(text: string): void {
    this.sent.push(text);
  }
  close(): void {
    this.onclose();
  }
  open(): void {
    this.readyState = 1;
    this.onopen();
  }
}

describe('union', () => {
  it('joins feeds, and devices unless someone wants all', () => {
    expect(union([{ feeds: ['state'], devices: ['b'] }, { feeds: ['log', 'state'], devices: ['a'] }])).toEqual({ subscribe: ['log', 'state'], devices: ['a', 'b'] });
    expect(union([{ feeds: ['state'], devices: ['b'] }, { feeds: ['event'] }])).toEqual({ subscribe: ['event', 'state'] });
    expect(union([])).toEqual({ subscribe: [] });
  });
});

it('hands a push only to who wants it', () => {
  const push: Push = { type: 'log', object: 'c', items: [] };
  expect(wanted({ feeds: ['log'] }, push)).toBe(true);
  expect(wanted({ feeds: ['log'], devices: ['d'] }, push)).toBe(false);
  expect(wanted({ feeds: ['state'] }, push)).toBe(false);
  expect(wanted({ feeds: ['event'], devices: ['x'] }, { type: 'event', id: '1', kind: 'online', object: 'x', timestamp: '', params: {} })).toBe(true);
  expect(eventOf({ type: 'event', event: { id: '1', kind: 'online', object: 'x', timestamp: '', params: {} } })?.object).toBe('x');
});

it('waits longer each time, up to a bound', () => {
  expect(backoff_ms(0, 0)).toBe(400);
  expect(backoff_ms(1, 0)).toBe(800);
  expect(backoff_ms(50, 1)).toBeLessThanOrEqual(18_750);
});

describe('socket', () => {
  beforeEach(() => {
    FakeSocket.all = [];
    vi.useFakeTimers();
    vi.stubGlobal('WebSocket', FakeSocket);
  });
  afterEach(() => {
    vi.useRealTimers();
    vi.unstubAllGlobals();
  });

  it('sends one subscription for many wants, and again after a lost connection', async () => {
    const socket = new Socket(() => 'ws://test');
    const got: Push[] = [];
    socket.subscribe({ feeds: ['state'] }, (p) => got.push(p));
    const end = socket.subscribe({ feeds: ['log'], devices: ['x'] }, () => {});
    socket.start();
    const first = FakeSocket.all[0]!;
    first.open();
    await vi.advanceTimersByTimeAsync(0);
    expect(first.sent.map((s) => JSON.parse(s))).toEqual([{ subscribe: ['log', 'state'], id: 1 }]);
    first.onmessage({ data: JSON.stringify({ type: 'state', device: 'x', values: {} }) });
    first.onmessage({ data: 'not json' });
    expect(got).toHaveLength(1);

    end();
    await vi.advanceTimersByTimeAsync(0);
    expect(JSON.parse(first.sent[1]!)).toMatchObject({ subscribe: ['state'] });

    first.close();
    expect(socket.status).toBe('lost');
    await vi.advanceTimersByTimeAsync(600);
    const second = FakeSocket.all[1]!;
    second.open();
    await vi.advanceTimersByTimeAsync(0);
    expect(JSON.parse(second.sent[0]!)).toMatchObject({ subscribe: ['state'] });
    socket.stop();
    await vi.advanceTimersByTimeAsync(60_000);
    expect(FakeSocket.all).toHaveLength(2);
  });
});
