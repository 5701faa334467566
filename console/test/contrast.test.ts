import { readFileSync } from 'node:fs';

import { describe, expect, it } from 'vitest';

// Text must stand out by 4.5 to 1 and marks by 3 to 1 (WCAG 2.2, AA), in both themes.
const css = readFileSync(new URL('../src/styles/tokens.css', import.meta.url), 'utf8');
const light = css.slice(0, css.indexOf('@media'));
const dark = css.slice(css.indexOf("data-theme='dark'"));
const system = css.slice(css.indexOf('@media'), css.indexOf(":root[data-theme='dark']"));

const colors = (text: string) => new Map([...text.matchAll(/(--[\w-]+):\s*(#[0-9a-f]{6})/g)].map((m) => [m[1]!, m[2]!]));

function luminance(hex: string): number {
  const [r, g, b] = [1, 3, 5].map((at) => {
    const c = Number.parseInt(hex.slice(at, at + 2), 16) / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  }) as [number, number, number];
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(a: string, b: string): number {
  const [x, y] = [luminance(a), luminance(b)];
  return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
}

const TEXT: [string, string[]][] = [
  ['--ink', ['--bg', '--panel', '--panel-2', '--hover', '--accent-soft', '--flash', '--bad-soft', '--f0', '--f1', '--f2', '--f3', '--f4', '--f5', '--f6', '--f7']],
  ['--ink-2', ['--bg', '--panel', '--panel-2', '--hover', '--f0', '--f2', '--f5', '--f6']],
  ['--ink-3', ['--bg', '--panel', '--panel-2', '--hover']],
  ['--accent', ['--bg', '--panel', '--accent-soft']],
  ['--accent-ink', ['--accent', '--accent-hover']],
  ['--ok', ['--panel', '--ok-soft']],
  ['--warn', ['--panel', '--warn-soft']],
  ['--bad', ['--panel', '--bad-soft', '--panel-2']],
  ['--syntax-keyword', ['--panel']], ['--syntax-string', ['--panel']], ['--syntax-number', ['--panel']], ['--syntax-comment', ['--panel']], ['--syntax-type', ['--panel']],
];
const MARKS: [string, string[]][] = [['--focus', ['--bg', '--panel']], ['--ok-dot', ['--panel']], ['--bad-dot', ['--panel']], ...[0, 1, 2, 3, 4, 5].map((n): [string, string[]] => [`--bar-${n}`, ['--panel', '--hover']]), ['--map-track', ['--map-land', '--map-water']]];

for (const [theme, text] of [['light', light], ['dark', dark], ['dark by the system', system]] as const) {
  describe(theme, () => {
    const found = colors(text);
    it('white on --map-group', () => expect(contrast('#ffffff', found.get('--map-group')!)).toBeGreaterThanOrEqual(4.5));
    for (const [least, pairs] of [[4.5, TEXT], [3, MARKS]] as const) {
      for (const [ink, grounds] of pairs) {
        for (const ground of grounds) {
          it(`${ink} on ${ground}`, () => {
            expect(contrast(found.get(ink)!, found.get(ground)!)).toBeGreaterThanOrEqual(least);
          });
        }
      }
    }
  });
}

it('has the same dark colours by choice and by the system', () => {
  expect(colors(system)).toEqual(colors(dark));
});
