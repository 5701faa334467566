// Messages of a range, read page by page, and made into columns for charts and tracks.
import { api, type Message } from './api';
import { xOf, yOf } from './map/mercator';

export interface Read {
  messages: Message[];
  /** Whether there are more than were read. */
  cut: boolean;
}

export async function messagesOf(device: string, from_ms: number, to_ms: number, fields: string[], max = 20_000, signal?: AbortSignal): Promise<Read> {
  const messages: Message[] = [];
  let cursor: string | null = null;
  do {
    const page = await api.devices.messages(
      device,
      { from: new Date(from_ms).toISOString(), to: new Date(to_ms).toISOString(), limit: 5000, cursor, ...(fields.length ? { fields: fields.join(',') } : {}) },
      signal,
    );
    messages.push(...page.items);
    cursor = page.next;
  } while (cursor && messages.length < max);
  messages.sort((a, b) => (a.timestamp < b.timestamp ? -1 : a.timestamp > b.timestamp ? 1 : 0));
  return { messages, cut: cursor !== null };
}

export interface Columns {
  xs: number[];
  ys: Record<string, (number | null)[]>;
}

/** Seconds and values per parameter. Longer silences than `gap_s` break the line; messages without a value do not. */
export function columns(messages: readonly Message[], names: readonly string[], gap_s = 900): Columns {
  const xs: number[] = [];
  const ys: Record<string, (number | null)[]> = Object.fromEntries(names.map((n) => [n, []]));
  const last: Record<string, number | null> = {};
  for (const message of messages) {
    const t = Date.parse(message.timestamp) / 1000;
    const before = xs[xs.length - 1];
    if (before !== undefined && t - before > gap_s) {
      xs.push(before + 1);
      for (const name of names) {
        ys[name]!.push(null);
        last[name] = null;
      }
    }
    xs.push(t);
    for (const name of names) {
      const v = message[name];
      const number = typeof v === 'number' ? v : typeof v === 'boolean' ? Number(v) : null;
      if (number !== null) last[name] = number;
      ys[name]!.push(number ?? last[name] ?? null);
    }
  }
  return { xs, ys };
}

/** At most `max` points: of each stretch the lowest and the highest are kept, so that peaks stay. */
export function thin(xs: readonly number[], series: readonly (readonly (number | null)[])[], max: number): { xs: number[]; series: (number | null)[][] } {
  if (xs.length <= max || series.length === 0) return { xs: [...xs], series: series.map((s) => [...s]) };
  const stretch = Math.ceil((xs.length * 2) / max);
  const keep = new Set<number>([0, xs.length - 1]);
  for (let start = 0; start < xs.length; start += stretch) {
    const end = Math.min(xs.length, start + stretch);
    for (const s of series) {
      let [low, high] = [-1, -1];
      for (let i = start; i < end; i++) {
        const v = s[i];
        if (v === null || v === undefined) {
          keep.add(i);
          break;
        }
        if (low < 0 || v < s[low]!) low = i;
        if (high < 0 || v > s[high]!) high = i;
      }
      if (low >= 0) keep.add(low);
      if (high >= 0) keep.add(high);
    }
  }
  const order = [...keep].sort((a, b) => a - b);
  return { xs: order.map((i) => xs[i]!), series: series.map((s) => order.map((i) => s[i] ?? null)) };
}

export interface TrackPoints {
  xs: Float64Array;
  ys: Float64Array;
  times_ms: Float64Array;
  messages: Message[];
}

/** Messages that have a valid position, as a track. */
export function trackOf(messages: readonly Message[]): TrackPoints {
  const kept = messages.filter((m) => {
    const [lat, lon] = [m['position.latitude'], m['position.longitude']];
    return typeof lat === 'number' && typeof lon === 'number' && m['position.valid'] !== false && !(lat === 0 && lon === 0);
  });
  return {
    xs: Float64Array.from(kept, (m) => xOf(m['position.longitude'] as number)),
    ys: Float64Array.from(kept, (m) => yOf(m['position.latitude'] as number)),
    times_ms: Float64Array.from(kept, (m) => Date.parse(m.timestamp)),
    messages: kept,
  };
}

/** Index of the last point at or before `time_ms`; 0 before the first. */
export function indexAt(times_ms: ArrayLike<number>, time_ms: number): number {
  let [low, high] = [0, times_ms.length - 1];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (times_ms[middle]! <= time_ms) low = middle;
    else high = middle - 1;
  }
  return Math.max(0, low);
}
