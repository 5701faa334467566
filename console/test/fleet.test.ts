import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import { api, type Device, type DeviceState } from '../src/lib/api';
import { Fleet, isMoving, matcher, select, type Changes } from '../src/lib/fleet';
import { xOf } from '../src/lib/map/mercator';
import type { Push, Socket } from '../src/lib/socket';

const device = (n: number, more: Partial<Device> = {}): Device => ({
  id: `d${n}`, account: 'a', name: `Van ${n}`, ident: `ident-${n}`, protocol: '', type: 'FMB', enabled: true, settings: {}, labels: { group: n % 2 ? 'odd' : 'even' },
  created_at: '2026-01-01T00:00:00Z', revision: 1, online: n % 3 !== 0, seen_at: '2026-01-01T00:00:00Z', ...more,
});
const state = (n: number): DeviceState => ({
  device: `d${n}`, online: n % 3 !== 0, seen_at: '2026-01-01T00:00:00Z',
  values: { 'position.latitude': { value: 50 + n / 100, timestamp: '' }, 'position.longitude': { value: 10, timestamp: '' }, 'position.speed': { value: n * 2, timestamp: '' }, secret: { value: 1, timestamp: '' } },
});

describe('fleet', () => {
  let push: (p: Push) => void = () => {};
  let status: (s: string) => void = () => {};
  let frames: (() => void)[] = [];
  let fleet: Fleet;
  let changes: Changes[] = [];
  let devices: Device[];
  let end: () => void;
  const flush = () => frames.splice(0).forEach((run) => run());

  beforeEach(async () => {
    devices = Array.from({ length: 12 }, (_, n) => device(n));
    vi.spyOn(api.devices, 'list').mockImplementation(async ({ cursor }) => {
      const from = Number(cursor ?? 0);
      return { items: devices.slice(from, from + 5), next: from + 5 < devices.length ? String(from + 5) : null };
    });
    vi.spyOn(api, 'state').mockImplementation(async () => ({ items: devices.map((d) => state(Number(d.id.slice(1)))), next: null }));
    const socket = {
      subscribe: (_want: unknown, listener: (p: Push) => void) => { push = listener; return () => {}; },
      onStatus: (listener: (s: string) => void) => { status = listener; listener('open'); return () => {}; },
    } as unknown as Socket;
    frames = [];
    changes = [];
    fleet = new Fleet(socket, (run) => frames.push(run));
    end = fleet.use((c) => changes.push(c));
    await vi.waitFor(() => expect(fleet.loaded).toBe(true));
    flush();
    changes = [];
  });
  afterEach(() => {
    end();
    vi.restoreAllMocks();
  });

  it('reads all pages and keeps the wanted values only', () => {
    expect(fleet.rows).toHaveLength(12);
    expect(fleet.count).toBe(12);
    expect(fleet.online).toBe(8);
    expect(fleet.rows[3]?.values['position.speed']).toBe(6);
    expect(fleet.rows[3]?.values['secret']).toBeUndefined();
    expect(fleet.xs[3]).toBeCloseTo(xOf(10));
  });
  it('gathers pushes into one change per frame', () => {
    for (let i = 0; i < 100; i++) push({ type: 'state', device: 'd1', values: { 'position.speed': { value: i, timestamp: '' } } });
    push({ type: 'state', device: 'd2', values: { 'position.longitude': { value: 11, timestamp: '' } } });
    expect(changes).toHaveLength(0);
    expect(frames).toHaveLength(1);
    flush();
    expect(changes).toHaveLength(1);
    expect([...changes[0]!.rows].map((r) => r.id)).toEqual(['d1', 'd2']);
    expect(changes[0]!.structure).toBe(false);
    expect(fleet.rows[1]?.values['position.speed']).toBe(99);
    expect(fleet.xs[2]).toBeCloseTo(xOf(11));
  });
  it('follows presence', () => {
    push({ type: 'event', id: 'e', kind: 'online', object: 'd0', timestamp: '', params: {} });
    expect(fleet.byId.get('d0')?.online).toBe(true);
    expect(fleet.online).toBe(9);
    push({ type: 'event', event: { id: 'f', kind: 'offline', object: 'd0', timestamp: '', params: {} } });
    expect(fleet.online).toBe(8);
  });
  it('takes up a registered device and ignores unknown ones', async () => {
    vi.spyOn(api.devices, 'get').mockResolvedValue(device(99));
    push({ type: 'state', device: 'd99', values: {} });
    push({ type: 'event', id: 'e', kind: 'registered', object: 'd99', timestamp: '', params: {} });
    await vi.waitFor(() => expect(fleet.count).toBe(13));
  });
  it('reads again after a lost connection, and drops who is gone', async () => {
    devices = devices.slice(1);
    status('lost');
    status('open');
    await vi.waitFor(() => expect(fleet.count).toBe(11));
    expect(fleet.byId.has('d0')).toBe(false);
    expect(Number.isNaN(fleet.xs[0])).toBe(true);
    expect(select(fleet.rows, { text: '', status: 'all', label: '' }, { key: 'name', descending: false })).toHaveLength(11);
  });
  it('filters by every word, label and status', () => {
    const names = (text: string, more = {}) => fleet.rows.filter(matcher({ text, status: 'all', label: '', ...more })).map((r) => r.name);
    expect(names('van 11')).toEqual(['Van 11']);
    expect(names('IDENT-3')).toEqual(['Van 3']);
    expect(names('group:odd van 1')).toEqual(['Van 1', 'Van 11']);
    expect(names('', { label: 'group:even', status: 'offline' })).toEqual(['Van 0', 'Van 6']);
    expect(fleet.rows.filter(matcher({ text: '', status: 'moving', label: '' })).every(isMoving)).toBe(true);
  });
  it('sorts names by their numbers, and values with those missing last', () => {
    const order = (key: string, descending = false) => [...select(fleet.rows, { text: '', status: 'all', label: '' }, { key, descending })].map((i) => fleet.rows[i]!.id);
    expect(order('name').slice(0, 3)).toEqual(['d0', 'd1', 'd2']);
    expect(order('position.speed', true)[0]).toBe('d11');
    delete fleet.rows[5]!.values['position.speed'];
    expect(order('position.speed', true).at(-1)).toBe('d5');
    expect(order('position.speed').at(-1)).toBe('d5');
    expect(order('ident')[1]).toBe('d1');
  });
  it('reads new columns for all rows', async () => {
    fleet.want(['secret']);
    await vi.waitFor(() => expect(fleet.rows[3]?.values['secret']).toBe(1));
  });
});
