import { describe, expect, it } from 'vitest';

import type { Parameter } from '../src/lib/api';
import { mergeOf, query } from '../src/lib/api';
import { describe as say } from '../src/lib/events';
import { bytes, compact, duration, number, relative, value, valueUnit } from '../src/lib/format';
import { renamed, skeleton, tokens } from '../src/lib/highlight';
import { columns, indexAt, thin, trackOf } from '../src/lib/history';
import { hint, messagesOf, summary, tone } from '../src/lib/log';
import { href, parse } from '../src/lib/router.svelte';
import { crc16, teltonikaFrame } from '../src/lib/samples';
import { chord } from '../src/lib/shortcuts';
import { bytesOf, unitsOf } from '../src/lib/storage';
import { brokersOf, find, rows } from '../src/lib/system';

const speed: Parameter = { name: 'position.speed', kind: 'decimal', bits: 0, decimals: 3, unit: 'km/h', title: 'Speed', description: '' };

describe('format', () => {
  it('writes values by their declaration', () => {
    expect(valueUnit(72.5, speed)).toBe('72.5\u202fkm/h');
    expect(valueUnit(119.5, { ...speed, unit: 'deg' })).toBe('119.5°');
    expect(value(true)).toBe('yes');
    expect(value(null)).toBe('');
    expect(value({ a: 1 })).toBe('{"a":1}');
    expect(value(26_201, { ...speed, kind: 'int', unit: '' })).toBe('26201');
    expect(number(1_234_567.891, 2)).toBe('1\u202f234\u202f567.89');
  });
  it('tells times', () => {
    const now = Date.UTC(2026, 0, 2);
    expect(relative(now - 400, now)).toBe('now');
    expect(relative(now - 59_000, now)).toBe('59 s ago');
    expect(relative(now + 300_000, now)).toBe('in 5 min');
    expect(relative(now - 40 * 86_400_000, now)).toBe('2025-11-23');
    expect(duration(93_784)).toBe('1 d 2 h');
  });
  it('shortens', () => {
    expect(bytes(999)).toBe('999 B');
    expect(bytes(48_200_000)).toBe('48.2 MB');
    expect(compact(12_400)).toBe('12.4k');
  });
});

describe('log', () => {
  const line = (more: Record<string, string>) => ({ timestamp: '2026-01-01T00:00:00Z', ...more });
  it('says what happened and what to do', () => {
    const refused = line({ 'log.kind': 'refused', ident: 'x1', 'close.name': 'unknown_device' });
    expect(summary(refused)).toBe('Refused x1: unknown device');
    expect(hint(refused)).toContain('registered');
    expect(tone(refused)).toBe('bad');
    expect(tone(line({ 'log.kind': 'closed', 'close.name': 'device_closed' }))).toBe('');
  });
  it('reads messages stored as text', () => {
    expect(messagesOf({ ...line({}), messages: '[{"a":1}]' })).toEqual([{ a: 1 }]);
    expect(messagesOf({ ...line({}), messages: 'broken' })).toEqual([]);
    expect(summary({ ...line({ 'log.kind': 'frame', 'frame.hex': '0011' }), messages: [{}] })).toBe('2 bytes, 1 message');
  });
  it('puts events into words', () => {
    const base = { id: '', object: '', timestamp: '' };
    expect(say({ ...base, kind: 'offline', params: { 'close.name': 'idle_timeout' } })).toBe('went offline: idle timeout');
  });
});

describe('addresses', () => {
  it('reads fragments, also broken ones', () => {
    expect(parse('#/devices/a%20b?tab=track').parts).toEqual(['devices', 'a b']);
    expect(parse('#/devices/x?tab=track').query.get('tab')).toBe('track');
    expect(parse('#/%zz').parts).toEqual(['%zz']);
    expect(parse('').parts).toEqual([]);
  });
  it('writes them', () => {
    expect(href('devices', { q: 'a&b', label: undefined })).toBe('#/devices?q=a%26b');
    expect(query({ limit: 5, cursor: null, q: '' })).toBe('?limit=5');
  });
});

describe('source', () => {
  it('loses no character', () => {
    for (const text of ['    #position.latitude: s32 * 1e-7  // degrees', 'reply x"01"', 'x = @2007-01-01', 'a "unfinished', '']) {
      expect(tokens(text).map((t) => t.text).join('')).toBe(text);
    }
    expect(tokens('rule data() {')[0]).toEqual({ kind: 'keyword', text: 'rule' });
    expect(tokens('#speed: u16').map((t) => t.kind)).toEqual(['param', 'plain', 'type']);
  });
  it('renames a protocol', () => {
    expect(renamed('// a\nprotocol old "x"\n', 'new_one')).toBe('// a\nprotocol new_one "x"\n');
    expect(renamed('transport tcp', 'n')).toMatch(/^protocol n /);
    expect(skeleton('mine')).toMatch(/^protocol mine /);
  });
});

describe('history', () => {
  const at = (s: number, more: Record<string, number | boolean> = {}) => ({ timestamp: new Date(s * 1000).toISOString(), received: '', ...more });
  it('breaks lines at silences and carries values over messages without them', () => {
    const { xs, ys } = columns([at(0, { a: 1 }), at(10), at(2000, { a: 3 })], ['a'], 900);
    expect(xs).toEqual([0, 10, 11, 2000]);
    expect(ys['a']).toEqual([1, 1, null, 3]);
  });
  it('keeps peaks when thinning', () => {
    const xs = Array.from({ length: 10_000 }, (_, i) => i);
    const values = xs.map((i) => (i === 5003 ? 99 : Math.sin(i / 50)));
    const out = thin(xs, [values], 500);
    expect(out.xs.length).toBeLessThan(1100);
    expect(Math.max(...(out.series[0] as number[]))).toBe(99);
  });
  it('makes a track of valid positions', () => {
    const track = trackOf([at(0, { 'position.latitude': 1, 'position.longitude': 2 }), at(1), at(2, { 'position.latitude': 1, 'position.longitude': 2, 'position.valid': false })]);
    expect(track.messages).toHaveLength(1);
    expect(indexAt([10, 20, 30], 25)).toBe(1);
    expect(indexAt([10, 20, 30], 5)).toBe(0);
    expect(indexAt([10, 20, 30], 99)).toBe(2);
  });
});

it('computes the checksum of its example', () => {
  expect(crc16(new TextEncoder().encode('123456789'))).toBe(0xbb3d);
  const frame = teltonikaFrame(0, 1, -1, 5, 6);
  expect(Number.parseInt(frame.slice(8, 16), 16) * 2 + 24).toBe(frame.length);
});

it('takes members out of a map by null', () => {
  expect(mergeOf({ a: '1', b: '2' }, { a: '1', c: '3' })).toEqual({ a: '1', b: null, c: '3' });
  expect(mergeOf(undefined, {})).toEqual({});
});

it('reads key chords', () => {
  expect(chord('', 'g')).toBe('pending');
  expect(chord('g', 'd')).toEqual({ path: '/devices' });
  expect(chord('g', 'x')).toBeNull();
  expect(chord('', 'x')).toBeNull();
});

it('shows figures that it does not know by name', () => {
  const system = { version: '1', uptime_s: 5, history: { bytes: 2048, messages: 3 }, extra: { wait_ms: 1.25 } };
  expect(rows(system)).toEqual([['history.bytes', '2.0 kB'], ['history.messages', '3'], ['extra.wait_ms', '1.3 ms']]);
  expect(find(system, 'bytes')).toBe(2048);
});

describe('storage', () => {
  it('goes between bytes and what people type', () => {
    expect(bytesOf(1.5, 'GB')).toBe(1_500_000_000);
    expect(unitsOf(1_500_000_000)).toEqual({ amount: 1.5, unit: 'GB' });
    expect(unitsOf(1_500_000_000_000).unit).toBe('TB');
    expect(unitsOf(0)).toEqual({ amount: 0, unit: 'GB' });
    expect(unitsOf(250_000_000)).toEqual({ amount: 250, unit: 'MB' });
    expect(bytesOf(-3, 'GB')).toBe(0);
  });
});

describe('brokers', () => {
  it('are found among the listeners', () => {
    const listeners = [{ name: 'http', address: '0.0.0.0:8080' }, { name: 'mqtt', address: '127.0.0.1:18683' }, { name: 'mqtts', address: '[::]:8883' }];
    expect(brokersOf(listeners, 'fleet.example.org')).toEqual([
      { name: 'mqtt', host: '127.0.0.1', port: 18683, tls: false },
      { name: 'mqtts', host: 'fleet.example.org', port: 8883, tls: true },
    ]);
  });
});

describe('keys by scope', () => {
  it('go to accounts only for who may', () => {
    expect(chord('g', 'a', () => true)).toEqual({ path: '/accounts' });
    expect(chord('g', 'a', () => false)).toBeNull();
    expect(chord('g', 'd', () => false)).toEqual({ path: '/devices' });
  });
});
