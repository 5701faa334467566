// What can be behind at the node that answers: figures as they come, and what they mean. Pure: the page polls and draws.

import type { Lag } from './nodes';

/** Figures that are kept of each. */
export const LAGS_MAX = 90;

export interface Row {
  name: string;
  title: string;
  hint: string;
  /** The newest, with its unit; a dash where there is none. */
  text: string;
  tone: 'ok' | 'warn' | 'bad' | '';
  note: string | null;
  values: number[];
}

const MEANS: Record<string, { title: string; hint: string; high: number; none?: string }> = {
  append: { title: 'Messages are durable after', hint: 'How long the newest batch took to be stored, with the standby that a commit waits for', high: 500, none: 'none stored by this node yet' },
  database: { title: 'The database answers in', hint: 'A small read of objects, measured as this page asks', high: 250 },
  cluster: { title: 'etcd answers in', hint: 'A read that a majority of etcd confirms, measured as this page asks', high: 250 },
  live_items: { title: 'Live items that wait', hint: 'Not yet acknowledged by the broker that carries them to other nodes', high: 10_000 },
  last_values: { title: 'Messages that wait for Redis', hint: 'Stored already; their last values are not yet in Redis', high: 1000 },
};

/** The rows after an answer; figures of those before stay, an answer without one leaves a gap of nothing. */
export function record(rows: readonly Row[], lags: readonly Lag[]): Row[] {
  return lags.map((lag) => {
    const means = MEANS[lag.name] ?? { title: lag.name, hint: '', high: Number.POSITIVE_INFINITY };
    const before = rows.find((r) => r.name === lag.name)?.values ?? [];
    const values = lag.value === null ? before : [...before, lag.value].slice(-LAGS_MAX);
    const unknown = lag.value === null;
    return {
      name: lag.name,
      title: means.title,
      hint: means.hint,
      text: lag.value === null ? (lag.note === null && means.none ? '–' : 'no answer') : amount(lag.value, lag.unit),
      tone: unknown ? (lag.note === null ? '' : 'bad') : lag.value! > means.high || lag.note !== null ? 'warn' : 'ok',
      note: lag.note ?? (unknown ? (means.none ?? null) : null),
      values,
    };
  });
}

/** A figure as it is read: `0.8 ms`, `140 ms`, `2.3 s`, `1,200`. */
export function amount(value: number, unit: Lag['unit']): string {
  if (unit === 'items') return Math.round(value).toLocaleString('en');
  if (value >= 1000) return `${(value / 1000).toFixed(1)} s`;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}
