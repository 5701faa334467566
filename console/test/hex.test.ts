import { describe, expect, it } from 'vitest';

import { depths, hexOf, hues, owners, parseHex, printable, rebase, toHex } from '../src/lib/hex';

describe('hex text', () => {
  it('reads what people paste', () => {
    for (const text of ['0f1A', '0f 1a', '0x0f, 0x1a', '0F:1A', '0f\n1a\n']) expect([...(parseHex(text) ?? [])]).toEqual([0x0f, 0x1a]);
    expect(parseHex('0f1')).toBeNull();
    expect(parseHex('hello')).toBeNull();
    expect(hexOf(Uint8Array.of(0, 255))).toBe('00ff');
  });
  it('takes text for its bytes', () => {
    expect(toHex('#L#1;NA\\r\\n')).toEqual({ hex: '234c23313b4e410d0a', from: 'text' });
    expect(toHex('#P#\n').hex).toBe('2350230d0a');
    expect(toHex('DEAD').from).toBe('hex');
  });
  it('shows only what can be printed', () => {
    expect([0x41, 0x0a, 0x7f, 0xff].map(printable).join('')).toBe('A···');
  });
});

describe('fields', () => {
  const fields = [
    { name: 'record', start: 2, end: 10, value: null },
    { name: 'time', start: 2, end: 6, value: 1 },
    { name: 'speed', start: 6, end: 8, value: 2 },
    { name: 'nothing', start: 8, end: 8, value: null },
  ];
  it('gives each byte to its innermost field', () => {
    expect([...owners(fields, 12)]).toEqual([-1, -1, 1, 1, 1, 1, 2, 2, 0, 0, -1, -1]);
  });
  it('knows what lies within what', () => {
    expect(depths(fields)).toEqual([0, 1, 1, 1]);
    expect(depths([{ start: 0, end: 4 }, { start: 4, end: 8 }, { start: 4, end: 6 }, { start: 8, end: 9 }])).toEqual([0, 0, 1, 0]);
  });
  it('does not run over the frame', () => {
    expect([...owners([{ start: -3, end: 99 }], 3)]).toEqual([0, 0, 0]);
  });
  it('colours neighbours differently and fields without bytes not at all', () => {
    const hue = hues(fields, 12);
    expect(hue[1]).not.toBe(hue[2]);
    expect(hue[2]).not.toBe(hue[0]);
    expect(hue[3]).toBe(-1);
  });
  it('counts from the frame where fields were counted from the input', () => {
    expect(rebase([{ name: 'a', start: 20, end: 24, value: 0 }], 17, 10)[0]).toMatchObject({ start: 3, end: 7 });
    expect(rebase([{ name: 'a', start: 2, end: 4, value: 0 }], 17, 10)[0]).toMatchObject({ start: 2, end: 4 });
  });
});
