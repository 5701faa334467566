// The live fleet: every device with its last values, kept current by the WebSocket. Not reactive by itself: 100,000
// rows are plain objects, changes are gathered and handed on once per animation frame.
import { api, type Device, type DeviceState, type Json, type Labels, type Sample } from './api';
import { type Push, eventOf, type Socket } from './socket';
import { xOf, yOf } from './map/mercator';

export interface Row {
  /** Place in `Fleet.rows` and in the point arrays; never changes. */
  i: number;
  id: string;
  name: string;
  ident: string;
  protocol: string;
  kind: string;
  labels: Labels;
  online: boolean;
  seen_ms: number;
  values: Record<string, Json>;
  /** Name, ident, kind and labels in lower case, to search in. */
  hay: string;
  /** Place when sorted by name; set after loading. */
  rank: number;
  deleted: boolean;
}

export const POSITION = ['position.latitude', 'position.longitude', 'position.direction', 'position.speed'] as const;

/** Moving from this speed on, in km/h: below it a tracker that stands may drift. */
export const MOVING_KMH = 3;

/** Most parameters that the server gives for a whole fleet at once. */
export const WANTED_MAX = 32;

const LAGGED_RELOAD_MS = 10_000;

export type Changes = { rows: Set<Row>; structure: boolean };
type Listener = (changes: Changes) => void;

function hayOf(d: Pick<Device, 'name' | 'ident' | 'type' | 'labels'>): string {
  const labels = Object.entries(d.labels ?? {}).map(([k, v]) => `${k}:${v}`);
  return [d.name, d.ident, d.type, ...labels].join('\n').toLowerCase();
}

const ms = (time: string | null | undefined): number => (time ? Date.parse(time) : 0) || 0;

export class Fleet {
  rows: Row[] = [];
  byId = new Map<string, Row>();
  xs: Float64Array<ArrayBuffer> = new Float64Array(1024).fill(Number.NaN);
  ys: Float64Array<ArrayBuffer> = new Float64Array(1024).fill(Number.NaN);
  /** Parameters that are kept per row. */
  wanted = new Set<string>(POSITION);
  loading = false;
  loaded = false;
  error: unknown = null;
  /** State pushes since start, to show a rate. */
  pushes = 0;
  online = 0;
  /** Devices that are there, without deleted rows. */
  count = 0;
  private pending = new Set<Row>();
  private structure = false;
  private frame = 0;
  private readonly listeners = new Set<Listener>();
  private users = 0;
  private unsubscribe: (() => void) | undefined;
  private generation = 0;
  private statusOff: (() => void) | undefined;
  private lost = false;
  private again: ReturnType<typeof setTimeout> | undefined;

  constructor(
    private readonly socket: Socket,
    private readonly schedule: (run: () => void) => number = (run) => requestAnimationFrame(run),
  ) {}

  /** Starts keeping the fleet current; the returned function ends it. Several parts may use it at once. */
  use(listener: Listener): () => void {
    this.listeners.add(listener);
    if (this.users++ === 0) {
      this.unsubscribe = this.socket.subscribe({ feeds: ['state', 'event'] }, (push) => this.push(push));
      this.statusOff = this.socket.onStatus((status) => {
        if (status === 'lost') this.lost = true;
        // What was pushed while the socket was away is missing: read it again.
        if (status === 'open' && this.lost) {
          this.lost = false;
          void this.load();
        }
      });
      void this.load();
    } else if (this.loaded) {
      listener({ rows: new Set(), structure: true });
    }
    return () => {
      this.listeners.delete(listener);
      if (--this.users === 0) {
        this.unsubscribe?.();
        this.statusOff?.();
        this.generation++;
        this.loading = false;
      }
    };
  }

  reset(): void {
    this.generation++;
    this.rows = [];
    this.byId.clear();
    this.loaded = false;
    this.online = 0;
    this.count = 0;
    this.xs.fill(Number.NaN);
  }

  /** Keeps these parameters too; reads them for all rows if one is new. */
  want(params: Iterable<string>): void {
    let fresh = false;
    for (const param of params) {
      if (!this.wanted.has(param) && this.wanted.size < WANTED_MAX) {
        this.wanted.add(param);
        fresh = true;
      }
    }
    if (fresh && (this.loaded || this.loading)) void this.load();
  }

  /** Reads all devices and their wanted values, page by page, showing each as it comes. */
  async load(): Promise<void> {
    const generation = ++this.generation;
    this.loading = true;
    this.error = null;
    const seen = new Set<string>();
    try {
      let cursor: string | null = null;
      do {
        const page = await api.devices.list({ limit: 5000, cursor });
        if (generation !== this.generation) return;
        for (const device of page.items) {
          seen.add(device.id);
          this.putDevice(device);
        }
        cursor = page.next;
        this.touchAll();
      } while (cursor);
      const params = [...this.wanted].slice(0, WANTED_MAX).join(',');
      do {
        const page = await api.state({ params, limit: 5000, cursor });
        if (generation !== this.generation) return;
        for (const state of page.items) this.putState(state);
        cursor = page.next;
        this.touchAll();
      } while (cursor);
      for (const row of this.rows) if (!row.deleted && !seen.has(row.id)) this.drop(row);
      this.rank();
      this.loaded = true;
    } catch (error) {
      if (generation === this.generation) this.error = error;
    } finally {
      if (generation === this.generation) {
        this.loading = false;
        this.touchAll();
      }
    }
  }

  private rank(): void {
    const order = [...this.rows].sort((a, b) => compareNames(a.name, b.name));
    order.forEach((row, at) => {
      row.rank = at;
    });
  }

  putDevice(device: Device): Row {
    let row = this.byId.get(device.id);
    if (!row) {
      const i = this.rows.length;
      row = {
        i, id: device.id, name: '', ident: '', protocol: '', kind: '', labels: {}, online: false, seen_ms: 0, values: {}, hay: '',
        rank: i, deleted: false,
      };
      this.rows.push(row);
      this.byId.set(device.id, row);
      this.count++;
      if (i >= this.xs.length) {
        this.xs = grown(this.xs);
        this.ys = grown(this.ys);
      }
    }
    row.name = device.name || device.ident;
    row.ident = device.ident;
    row.protocol = device.protocol;
    row.kind = device.type;
    row.labels = device.labels ?? {};
    row.hay = hayOf({ ...device, name: row.name });
    // Null while it is not known: what is shown stays.
    if (device.online !== null) this.setOnline(row, device.online);
    row.seen_ms = Math.max(row.seen_ms, ms(device.seen_at));
    return row;
  }

  private putState(state: DeviceState): void {
    const row = this.byId.get(state.device);
    if (!row) return;
    this.setOnline(row, state.online);
    row.seen_ms = Math.max(row.seen_ms, ms(state.seen_at));
    this.apply(row, state.values);
  }

  private setOnline(row: Row, online: boolean): void {
    if (row.online === online) return;
    row.online = online;
    this.online += online ? 1 : -1;
  }

  private apply(row: Row, values: Record<string, Sample | Json>): void {
    let moved = false;
    for (const name in values) {
      if (!this.wanted.has(name)) continue;
      const sample = values[name];
      const isSample = typeof sample === 'object' && sample !== null && 'value' in sample;
      row.values[name] = isSample ? (sample as Sample).value : (sample as Json);
      if (name === 'position.latitude' || name === 'position.longitude') moved = true;
    }
    if (moved) {
      const lat = row.values['position.latitude'];
      const lon = row.values['position.longitude'];
      if (typeof lat === 'number' && typeof lon === 'number') {
        this.xs[row.i] = xOf(lon);
        this.ys[row.i] = yOf(lat);
      }
    }
  }

  private drop(row: Row): void {
    if (row.deleted) return;
    row.deleted = true;
    this.setOnline(row, false);
    this.count--;
    this.byId.delete(row.id);
    this.xs[row.i] = Number.NaN;
    this.structure = true;
  }

  push(push: Push): void {
    if (push.type === 'lagged') {
      // What was dropped is read again, once the rush is over.
      this.again ??= setTimeout(() => {
        this.again = undefined;
        if (this.users > 0 && !this.loading) void this.load();
      }, LAGGED_RELOAD_MS);
      return;
    }
    if (push.type === 'state') {
      this.pushes++;
      const row = this.byId.get(push.device);
      if (!row) return;
      row.seen_ms = Date.now();
      if (push.online !== undefined) this.setOnline(row, push.online);
      this.apply(row, push.values ?? {});
      this.touch(row);
      return;
    }
    const event = eventOf(push);
    if (!event) return;
    const row = this.byId.get(event.object);
    if (row && (event.kind === 'online' || event.kind === 'offline')) {
      this.setOnline(row, event.kind === 'online');
      this.touch(row);
    } else if (event.kind === 'registered' && !row) {
      void api.devices.get(event.object).then((device) => {
        this.putDevice(device).rank = this.rows.length;
        this.structure = true;
        this.touchAll();
      }, () => {});
    } else if (event.kind === 'audit' && event.params?.['action'] === 'delete' && row) {
      this.drop(row);
      this.touchAll();
    }
  }

  private touch(row: Row): void {
    this.pending.add(row);
    this.plan();
  }

  private touchAll(): void {
    this.structure = true;
    this.plan();
  }

  private plan(): void {
    if (this.frame) return;
    this.frame = 1;
    this.frame = this.schedule(() => {
      this.frame = 0;
      const changes = { rows: this.pending, structure: this.structure };
      this.pending = new Set();
      this.structure = false;
      for (const listener of this.listeners) listener(changes);
    }) || 1;
  }
}

function grown(from: Float64Array): Float64Array<ArrayBuffer> {
  const to = new Float64Array(from.length * 2).fill(Number.NaN);
  to.set(from);
  return to;
}

/** Names with numbers in them sort by number: "Van 9" before "Van 10". */
export const compareNames = new Intl.Collator('en', { numeric: true, sensitivity: 'base' }).compare;

export interface Filter {
  text: string;
  status: 'all' | 'online' | 'offline' | 'moving';
  label: string;
}

/** Whether a row passes: every word of the text is found, and the label and status hold. */
export function matcher(filter: Filter): (row: Row) => boolean {
  const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean);
  const [key, wantedValue] = filter.label.split(':', 2);
  return (row) => {
    if (row.deleted) return false;
    if (filter.status === 'online' && !row.online) return false;
    if (filter.status === 'offline' && row.online) return false;
    if (filter.status === 'moving' && !isMoving(row)) return false;
    if (key && (wantedValue === undefined ? !(key in row.labels) : row.labels[key] !== wantedValue)) return false;
    for (const word of words) if (!row.hay.includes(word)) return false;
    return true;
  };
}

export function isMoving(row: Row): boolean {
  const speed = row.values['position.speed'];
  return row.online && typeof speed === 'number' && speed >= MOVING_KMH;
}

export interface Sort {
  key: string;
  descending: boolean;
}

/** A number per row to sort by: missing values come last whichever the direction. */
export function sortKey(key: string, descending: boolean): (row: Row) => number {
  const missing = descending ? Number.NEGATIVE_INFINITY : Number.POSITIVE_INFINITY;
  if (key === 'name') return (row) => row.rank;
  if (key === 'seen') return (row) => row.seen_ms;
  if (key === 'status') return (row) => (row.online ? (isMoving(row) ? 0 : 1) : 2);
  return (row) => {
    const value = row.values[key];
    if (typeof value === 'number') return value;
    if (typeof value === 'boolean') return value ? 1 : 0;
    return missing;
  };
}

/** Indices of the rows that pass, in order. */
export function select(rows: readonly Row[], filter: Filter, sort: Sort): Int32Array {
  const passes = matcher(filter);
  const chosen = new Int32Array(rows.length);
  let count = 0;
  for (const row of rows) if (passes(row)) chosen[count++] = row.i;
  const order = chosen.subarray(0, count);
  if (sort.key === 'ident' || sort.key === 'kind' || sort.key === 'protocol') {
    const field = sort.key;
    const sign = sort.descending ? -1 : 1;
    return order.sort((a, b) => {
      const [x, y] = [rows[a]![field], rows[b]![field]];
      return x < y ? -sign : x > y ? sign : a - b;
    });
  }
  const keyOf = sortKey(sort.key, sort.descending);
  const keys = new Float64Array(rows.length);
  for (let n = 0; n < count; n++) keys[order[n]!] = keyOf(rows[order[n]!]!);
  const sign = sort.descending ? -1 : 1;
  return order.sort((a, b) => {
    const [x, y] = [keys[a]!, keys[b]!];
    return x < y ? -sign : x > y ? sign : rows[a]!.rank - rows[b]!.rank;
  });
}
