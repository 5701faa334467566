import { describe, expect, it } from 'vitest';

import { boxOf, clampView, distance, fit, latitudeOf, longitudeOf, metresPerPx, scaleBar, toScreen, toWorld, wrapNear, xOf, yOf, zoomAround } from '../src/lib/map/mercator';

describe('projection', () => {
  it('goes there and back', () => {
    for (const [lat, lon] of [[0, 0], [52.5163, 13.3777], [-33.9, 151.2], [84.9, -179.9], [-84.9, 179.9]] as const) {
      expect(latitudeOf(yOf(lat))).toBeCloseTo(lat, 9);
      expect(longitudeOf(xOf(lon))).toBeCloseTo(lon, 9);
    }
  });
  it('holds the poles in the square', () => {
    expect(yOf(90)).toBeCloseTo(0, 6);
    expect(yOf(-90)).toBeCloseTo(1, 6);
  });
});

describe('view', () => {
  const view = { x: xOf(13.4), y: yOf(52.5), zoom: 11.3 };
  it('maps screen to world and back', () => {
    const [x, y] = toWorld(view, 800, 600, 123, 456);
    const [px, py] = toScreen(view, 800, 600, x, y);
    expect(px).toBeCloseTo(123, 6);
    expect(py).toBeCloseTo(456, 6);
  });
  it('keeps the point under the pointer while zooming', () => {
    const before = toWorld(view, 800, 600, 700, 50);
    const after = toWorld(zoomAround(view, 800, 600, 700, 50, 13), 800, 600, 700, 50);
    expect(after[0]).toBeCloseTo(before[0], 12);
    expect(after[1]).toBeCloseTo(before[1], 12);
  });
  it('shows what lies beyond the date line beside it', () => {
    const pacific = { x: xOf(179), y: 0.5, zoom: 5 };
    const [px] = toScreen(pacific, 800, 600, xOf(-179), 0.5);
    expect(px).toBeGreaterThan(400);
    expect(px).toBeLessThan(800);
    expect(wrapNear(0.01, 0.99)).toBeCloseTo(1.01);
  });
  it('stays in bounds', () => {
    const clamped = clampView({ x: -0.25, y: 3, zoom: 40 }, 600);
    expect(clamped).toEqual({ x: 0.75, y: 1, zoom: 19 });
  });
  it('fits a box with padding', () => {
    const box = { x0: 0.5, y0: 0.3, x1: 0.51, y1: 0.302 };
    const fitted = fit(box, 800, 600, 40, 19);
    const [left] = toScreen(fitted, 800, 600, box.x0, box.y0);
    const [right] = toScreen(fitted, 800, 600, box.x1, box.y1);
    expect(left).toBeCloseTo(40, 6);
    expect(right).toBeCloseTo(760, 6);
  });
  it('does not zoom beyond the limit for a single point', () => {
    expect(fit({ x0: 0.5, y0: 0.5, x1: 0.5, y1: 0.5 }, 800, 600, 40, 15).zoom).toBe(15);
  });
});

it('leaves outliers out of the box', () => {
  const xs = Array.from({ length: 100 }, (_, i) => 0.5 + i / 1e5);
  xs[0] = 0.01;
  const box = boxOf(xs, xs, 100, 0.02);
  expect(box?.x0).toBeGreaterThan(0.4);
  expect(boxOf([], [], 0)).toBeNull();
});

it('measures', () => {
  expect(distance(52.52, 13.405, 48.137, 11.575) / 1000).toBeCloseTo(504.2, 0);
  expect(metresPerPx(0, 0)).toBeCloseTo(156_543, 0);
  const bar = scaleBar(3.2, 90);
  expect(bar.metres).toBe(200);
  expect(bar.px).toBeLessThanOrEqual(90);
});
