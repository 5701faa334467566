// Joins the fleet to a map: which devices are drawn, how, and when to draw again.
import { isMoving, type Changes, type Fleet, type Row } from './fleet';
import { boxOf } from './map/mercator';
import { type FieldMap, Look, type Markers } from './map/map';

/** Larger fleets would ring all the time. */
const PING_COUNT_MAX = 2000;

export class FleetMarkers implements Markers {
  selected = -1;
  points = { count: 0, xs: new Float64Array(0), ys: new Float64Array(0) };
  private mask: ((row: Row) => boolean) | null = null;
  private fitted = false;
  private fittedWhole = false;

  constructor(
    private readonly fleet: Fleet,
    private readonly map: FieldMap,
  ) {
    map.markers = this;
    this.update({ rows: new Set(), structure: true });
  }

  /** Draws only the rows that pass; all when `null`. */
  filter(passes: ((row: Row) => boolean) | null): void {
    this.mask = passes;
    this.update({ rows: new Set(), structure: true });
  }

  update(changes: Changes): void {
    const { fleet, points } = this;
    points.count = fleet.rows.length;
    if (!this.mask) {
      points.xs = fleet.xs;
      points.ys = fleet.ys;
    } else {
      if (points.xs === fleet.xs || points.xs.length < fleet.xs.length) {
        points.xs = new Float64Array(fleet.xs.length).fill(Number.NaN);
        changes = { rows: changes.rows, structure: true };
      }
      points.ys = fleet.ys;
      const rows = changes.structure ? fleet.rows : changes.rows;
      for (const row of rows) points.xs[row.i] = this.mask(row) ? fleet.xs[row.i]! : Number.NaN;
    }
    // Shown at once with what is there, and again when all is there, unless someone has moved the map by then.
    if (!this.fitted && fleet.rows.length > 0) this.fitted = this.fit(false);
    if (!this.fittedWhole && fleet.loaded) this.fittedWhole = this.map.touched || this.fit(false);
    // A large fleet needs fewer pictures a second: its groups hardly move.
    this.map.motion_ms = points.count > 20_000 ? 250 : points.count > 3000 ? 100 : 40;
    if (points.count <= PING_COUNT_MAX) for (const row of changes.rows) this.map.ping(points.xs[row.i]!, points.ys[row.i]!);
    if (changes.structure) this.map.invalidate();
    else this.map.invalidateSoon();
  }

  /** Shows most of the fleet; a share of outliers is left out. */
  fit(glide = true): boolean {
    const { points } = this;
    const xs: number[] = [];
    const ys: number[] = [];
    for (let i = 0; i < points.count; i++) {
      const x = points.xs[i]!;
      if (Number.isNaN(x)) continue;
      xs.push(x);
      ys.push(points.ys[i]!);
    }
    const box = boxOf(xs, ys, xs.length, xs.length > 20 ? 0.02 : 0);
    if (!box) return false;
    this.map.fitBox(box, 56, 14, glide);
    return true;
  }

  look(i: number): Look {
    const row = this.fleet.rows[i];
    if (!row?.online) return Look.Offline;
    return isMoving(row) ? Look.Moving : Look.Standing;
  }

  heading(i: number): number {
    const direction = this.fleet.rows[i]?.values['position.direction'];
    return typeof direction === 'number' ? direction : -1;
  }

  label(i: number): string {
    return this.fleet.rows[i]?.name ?? '';
  }
}
