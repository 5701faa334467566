import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

import { describe, expect, it, vi } from 'vitest';

// @ts-expect-error a build script without types
import { encode } from '../build/outline.mjs';

vi.mock('virtual:outline', () => ({ coarse: '', fine: '' }));
const { decode } = await import('../src/lib/map/outline');

const atlas = JSON.parse(readFileSync(createRequire(import.meta.url).resolve('world-atlas/countries-110m.json'), 'utf8'));

describe('outline file', () => {
  const bytes = encode(atlas, 16);
  const lines = decode(bytes);
  it('is small and whole', () => {
    expect(bytes.length).toBeLessThan(60_000);
    expect(lines.land.length).toBeGreaterThan(100);
    expect(lines.borders.length).toBeGreaterThan(100);
    expect(lines.names.length).toBeGreaterThan(150);
  });
  it('keeps every point in the square, or in the one beside it', () => {
    for (const line of [...lines.land, ...lines.lakes, ...lines.borders]) expect(line.every((v, i) => (i % 2 ? v >= 0 && v <= 1 : v >= -1 && v <= 2))).toBe(true);
  });
  it('draws no line across the map', () => {
    for (const line of [...lines.land, ...lines.lakes, ...lines.borders]) {
      for (let i = 2; i < line.length; i += 2) {
        const step = Math.abs(line[i]! - line[i - 2]!);
        expect(step < 0.5 || line[i + 1] === 1).toBe(true);
      }
    }
  });
  it('puts names where their countries are', () => {
    const russia = lines.names.find((n) => n.text === 'Russia');
    expect(russia?.x).toBeGreaterThan(0.65);
    expect(russia?.x).toBeLessThan(0.9);
    const brazil = lines.names.find((n) => n.text === 'Brazil');
    expect(brazil?.x).toBeGreaterThan(0.3);
    expect(brazil?.x).toBeLessThan(0.41);
    expect(brazil?.y).toBeGreaterThan(0.49);
  });
  it('says so when the file is cut', () => {
    expect(() => decode(bytes.subarray(0, 1000))).toThrow(/ends early/);
  });
});
