// Groups of markers that would cover each other. A grid in world pixels, so that panning does not regroup them.
import { worldPx, wrapNear, type View } from './mercator';

export interface Points {
  count: number;
  xs: Float64Array;
  ys: Float64Array;
}

/** What is to be drawn: single points by index, and groups. Arrays are reused between calls. */
export interface Clusters {
  /** Indices of points that stand alone. */
  singles: Int32Array;
  singleCount: number;
  /** Middle of each group on the screen, how many are in it, and one of them. */
  groupX: Float64Array;
  groupY: Float64Array;
  groupSize: Int32Array;
  groupFirst: Int32Array;
  groupCount: number;
  /** World box of each group, four numbers each: what a click zooms to. */
  groupBox: Float64Array;
  /** Points that are in view, grouped or not. */
  inView: number;
}

/** From this zoom on, every point stands alone. */
export const CLUSTER_ZOOM_MAX = 14;

/** Fewer than this in a cell stay single: two arrows side by side say more than a "2". */
export const GROUP_MIN = 4;

/** Radius of a group's disc, in pixels. */
export const radiusOf = (size: number): number => 12 + Math.min(16, 4 * Math.log10(size));

export class Clusterer {
  private cells = new Map<number, number>();
  private cellOf = new Int32Array(0);
  private heads = { count: new Int32Array(0), x: new Float64Array(0), y: new Float64Array(0), first: new Int32Array(0), box: new Float64Array(0), group: new Int32Array(0) };
  private out: Clusters = {
    singles: new Int32Array(0), singleCount: 0,
    groupX: new Float64Array(0), groupY: new Float64Array(0), groupSize: new Int32Array(0), groupFirst: new Int32Array(0),
    groupCount: 0, groupBox: new Float64Array(0), inView: 0,
  };

  private reserve(count: number): void {
    if (this.cellOf.length >= count) return;
    const room = Math.max(1024, count * 2);
    this.cellOf = new Int32Array(room);
    this.heads = {
      count: new Int32Array(room), x: new Float64Array(room), y: new Float64Array(room), first: new Int32Array(room),
      box: new Float64Array(4 * room), group: new Int32Array(room),
    };
    const { out } = this;
    out.singles = new Int32Array(room);
    out.groupX = new Float64Array(room);
    out.groupY = new Float64Array(room);
    out.groupSize = new Int32Array(room);
    out.groupFirst = new Int32Array(room);
    out.groupBox = new Float64Array(4 * room);
  }

  /** Joins groups whose discs would cover each other, into the earlier one. Returns how many are left. */
  private join(count: number): number {
    const { out } = this;
    let kept = 0;
    for (let g = 0; g < count; g++) {
      let into = -1;
      for (let k = 0; k < kept && into < 0; k++) {
        const reach = (radiusOf(out.groupSize[g]!) + radiusOf(out.groupSize[k]!)) * 0.95;
        if ((out.groupX[g]! - out.groupX[k]!) ** 2 + (out.groupY[g]! - out.groupY[k]!) ** 2 < reach * reach) into = k;
      }
      if (into < 0) {
        out.groupX[kept] = out.groupX[g]!;
        out.groupY[kept] = out.groupY[g]!;
        out.groupSize[kept] = out.groupSize[g]!;
        out.groupFirst[kept] = out.groupFirst[g]!;
        out.groupBox.copyWithin(4 * kept, 4 * g, 4 * g + 4);
        kept++;
        continue;
      }
      const [a, b] = [out.groupSize[into]!, out.groupSize[g]!];
      out.groupX[into] = (out.groupX[into]! * a + out.groupX[g]! * b) / (a + b);
      out.groupY[into] = (out.groupY[into]! * a + out.groupY[g]! * b) / (a + b);
      out.groupSize[into] = a + b;
      const [k, n] = [4 * into, 4 * g];
      out.groupBox[k] = Math.min(out.groupBox[k]!, out.groupBox[n]!);
      out.groupBox[k + 1] = Math.min(out.groupBox[k + 1]!, out.groupBox[n + 1]!);
      out.groupBox[k + 2] = Math.max(out.groupBox[k + 2]!, out.groupBox[n + 2]!);
      out.groupBox[k + 3] = Math.max(out.groupBox[k + 3]!, out.groupBox[n + 3]!);
    }
    return kept;
  }

  /** Groups the points in view. A point with x of NaN has no position. `keep` is never grouped (the selected one). */
  run(points: Points, view: View, width: number, height: number, cellPx = 64, keep = -1): Clusters {
    this.reserve(points.count);
    const { cells, cellOf, heads, out } = this;
    cells.clear();
    const scale = worldPx(view.zoom);
    // Whole zooms only: the grid stays while zooming within one step.
    const gridScale = worldPx(Math.floor(view.zoom)) / cellPx;
    const columns = Math.ceil(gridScale) + 1;
    const marginX = (width / 2 + cellPx) / scale;
    const marginY = (height / 2 + cellPx) / scale;
    const grouped = view.zoom < CLUSTER_ZOOM_MAX;
    let cellCount = 0;
    let singleCount = 0;
    let inView = 0;
    for (let i = 0; i < points.count; i++) {
      const x = points.xs[i]!;
      const y = points.ys[i]!;
      const near = wrapNear(x, view.x);
      // NaN compares false, so points without a position fall out here.
      if (!(Math.abs(near - view.x) <= marginX && Math.abs(y - view.y) <= marginY)) {
        cellOf[i] = -1;
        continue;
      }
      inView++;
      if (!grouped || i === keep) {
        cellOf[i] = -1;
        out.singles[singleCount++] = i;
        continue;
      }
      const key = Math.floor(y * gridScale) * columns + Math.floor(x * gridScale);
      let cell = cells.get(key);
      if (cell === undefined) {
        cell = cellCount++;
        cells.set(key, cell);
        heads.count[cell] = 0;
        heads.x[cell] = 0;
        heads.y[cell] = 0;
        heads.first[cell] = i;
        heads.box.set([near, y, near, y], 4 * cell);
      }
      cellOf[i] = cell;
      heads.count[cell]!++;
      heads.x[cell]! += near;
      heads.y[cell]! += y;
      const b = 4 * cell;
      if (near < heads.box[b]!) heads.box[b] = near;
      if (y < heads.box[b + 1]!) heads.box[b + 1] = y;
      if (near > heads.box[b + 2]!) heads.box[b + 2] = near;
      if (y > heads.box[b + 3]!) heads.box[b + 3] = y;
    }
    let groupCount = 0;
    for (let cell = 0; cell < cellCount; cell++) {
      const count = heads.count[cell]!;
      if (count < GROUP_MIN) {
        heads.group[cell] = -1;
        continue;
      }
      const g = groupCount++;
      heads.group[cell] = g;
      out.groupX[g] = (heads.x[cell]! / count - view.x) * scale + width / 2;
      out.groupY[g] = (heads.y[cell]! / count - view.y) * scale + height / 2;
      out.groupSize[g] = count;
      out.groupFirst[g] = heads.first[cell]!;
      out.groupBox.set(heads.box.subarray(4 * cell, 4 * cell + 4), 4 * g);
    }
    groupCount = this.join(groupCount);
    if (cellCount > 0) {
      for (let i = 0; i < points.count; i++) {
        const cell = cellOf[i]!;
        if (cell >= 0 && heads.group[cell] === -1) out.singles[singleCount++] = i;
      }
    }
    out.singleCount = singleCount;
    out.groupCount = groupCount;
    out.inView = inView;
    return out;
  }
}
