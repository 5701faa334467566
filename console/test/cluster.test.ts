import { describe, expect, it } from 'vitest';

import { Clusterer, CLUSTER_ZOOM_MAX, GROUP_MIN, radiusOf } from '../src/lib/map/cluster';
import { xOf, yOf } from '../src/lib/map/mercator';

const points = (coordinates: [number, number][]) => ({
  count: coordinates.length,
  xs: Float64Array.from(coordinates, ([, lon]) => xOf(lon)),
  ys: Float64Array.from(coordinates, ([lat]) => yOf(lat)),
});
const berlin = Array.from({ length: 50 }, (_, i): [number, number] => [52.5 + (i % 7) / 100, 13.4 + i / 1000]);
const view = { x: xOf(13.4), y: yOf(52.5), zoom: 5 };

describe('clusters', () => {
  it('loses nobody in view', () => {
    const out = new Clusterer().run(points([...berlin, [48.1, 11.6], [52.4, 13.1]]), view, 800, 600);
    let sum = out.singleCount;
    for (let g = 0; g < out.groupCount; g++) sum += out.groupSize[g]!;
    expect(sum).toBe(52);
    expect(out.inView).toBe(52);
    expect(out.groupCount).toBeGreaterThan(0);
  });
  it('leaves out what has no position or is out of sight', () => {
    const set = points([...berlin, [-33, 151]]);
    set.xs[0] = Number.NaN;
    expect(new Clusterer().run(set, { ...view, zoom: 9 }, 800, 600).inView).toBe(49);
  });
  it('groups nothing when zoomed in, nor the chosen one', () => {
    const near = new Clusterer().run(points(berlin), { ...view, zoom: CLUSTER_ZOOM_MAX }, 8000, 8000);
    expect(near.groupCount).toBe(0);
    const kept = new Clusterer().run(points(berlin), view, 800, 600, 64, 7);
    expect([...kept.singles.subarray(0, kept.singleCount)]).toContain(7);
  });
  it('keeps few neighbours single', () => {
    const out = new Clusterer().run(points(berlin.slice(0, GROUP_MIN - 1)), view, 800, 600);
    expect(out.groupCount).toBe(0);
    expect(out.singleCount).toBe(GROUP_MIN - 1);
  });
  it('does not regroup while panning', () => {
    const clusterer = new Clusterer();
    const sizes = (x: number) => {
      const out = clusterer.run(points(berlin), { ...view, x }, 800, 600);
      return [...out.groupSize.subarray(0, out.groupCount)].sort();
    };
    expect(sizes(view.x + 1e-3)).toEqual(sizes(view.x));
  });
  it('leaves no disc over another', () => {
    const spread = points(Array.from({ length: 3000 }, (_, i): [number, number] => [45 + ((i * 7919) % 1000) / 100, 5 + ((i * 104_729) % 1500) / 100]));
    const out = new Clusterer().run(spread, { ...view, zoom: 5.4 }, 1200, 800);
    let sum = out.singleCount;
    for (let a = 0; a < out.groupCount; a++) {
      sum += out.groupSize[a]!;
      for (let b = 0; b < a; b++) {
        const apart = Math.hypot(out.groupX[a]! - out.groupX[b]!, out.groupY[a]! - out.groupY[b]!);
        // Joining moves a disc a little: a slight touch remains possible.
        expect(apart).toBeGreaterThan(0.5 * (radiusOf(out.groupSize[a]!) + radiusOf(out.groupSize[b]!)));
      }
    }
    expect(sum).toBe(out.inView);
  });
  it('gives the box of a group', () => {
    const out = new Clusterer().run(points(berlin), { ...view, zoom: 3 }, 800, 600);
    expect(out.groupBox[0]).toBeCloseTo(xOf(13.4), 9);
    expect(out.groupBox[2]).toBeCloseTo(xOf(13.449), 9);
  });
  it('manages 100,000 points in well under a frame or two', () => {
    const many = points(Array.from({ length: 100_000 }, (_, i): [number, number] => [(i * 7919) % 80, (i * 104_729) % 170]));
    const clusterer = new Clusterer();
    clusterer.run(many, { x: 0.7, y: 0.4, zoom: 2 }, 1600, 1000);
    const start = performance.now();
    for (let n = 0; n < 5; n++) clusterer.run(many, { x: 0.7, y: 0.4, zoom: 2 }, 1600, 1000);
    expect((performance.now() - start) / 5).toBeLessThan(100);
  });
});
