import { describe, expect, it } from 'vitest';

import { reveal, visible } from '../src/lib/virtual';

describe('visible', () => {
  it('covers the window and more on both sides', () => {
    expect(visible(340, 100, 34, 1000, 2)).toEqual({ first: 8, end: 15 });
  });
  it('stays within the list', () => {
    expect(visible(0, 500, 34, 3, 8)).toEqual({ first: 0, end: 3 });
    expect(visible(1e9, 500, 34, 100, 8).end).toBe(100);
    expect(visible(-50, 500, 34, 100, 8).first).toBe(0);
    expect(visible(0, 500, 34, 0, 8)).toEqual({ first: 0, end: 0 });
    expect(visible(0, 0, 34, 10, 8)).toEqual({ first: 0, end: 0 });
  });
  it('shows every row at some scroll position', () => {
    const seen = new Set<number>();
    for (let top = 0; top <= 100 * 34 - 200; top += 17) {
      const { first, end } = visible(top, 200, 34, 100, 0);
      for (let i = first; i < end; i++) seen.add(i);
    }
    expect(seen.size).toBe(100);
  });
});

describe('reveal', () => {
  it('moves only as far as it must', () => {
    expect(reveal(5, 0, 340, 34)).toBe(0);
    expect(reveal(2, 340, 340, 34)).toBe(68);
    expect(reveal(20, 0, 340, 34)).toBe(21 * 34 - 340);
  });
});
