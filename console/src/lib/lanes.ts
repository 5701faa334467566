// Who was there when, as this page has seen it: a lane for each node, cut to the last minutes. Pure: the page draws it.

import type { ClusterNode } from './nodes';
import { compareNames } from './nodes';

/** How far back lanes go. */
export const LANES_MS = 10 * 60_000;
/** Longer than this between two looks, and what lies between is not known. */
const GAP_MS = 6000;

export type Being = 'ready' | 'drains' | 'unsure';

export interface Span {
  from: number;
  to: number;
  /** `unsure`: there as last known, while nobody could tell. */
  being: Being;
  epoch: number;
}

export interface Lane {
  node: string;
  spans: Span[];
}

/** The lanes after a look at `at`. `sure` is whether the cluster's store answered. */
export function look(lanes: readonly Lane[], nodes: readonly ClusterNode[], sure: boolean, at: number): Lane[] {
  const since = at - LANES_MS;
  const there = new Map(nodes.map((n) => [n.name, n]));
  const all = new Map(lanes.map((l) => [l.node, l.spans]));
  for (const name of there.keys()) if (!all.has(name)) all.set(name, []);
  const out: Lane[] = [];
  for (const [name, before] of all) {
    const spans = before.filter((s) => s.to >= since).map((s) => (s.from < since ? { ...s, from: since } : s));
    const node = there.get(name);
    if (node) {
      const being: Being = !sure ? 'unsure' : node.ready ? 'ready' : 'drains';
      const last = spans[spans.length - 1];
      const close = last !== undefined && at - last.to <= GAP_MS && last.epoch === node.epoch;
      if (close && last.being === being) spans[spans.length - 1] = { ...last, to: at };
      // What was seen once only and is otherwise now was so for no time: no two spans begin at once.
      else if (close && last.from === last.to) spans[spans.length - 1] = { ...last, to: at, being };
      else spans.push({ from: close ? last.to : at, to: at, being, epoch: node.epoch });
    }
    if (spans.length) out.push({ node: name, spans });
  }
  return out.sort((a, b) => compareNames(a.node, b.node));
}

/** Where a time stands in the picture that ends at `at`, in percent from the left. */
export const placeOf = (time: number, at: number, width_ms: number): number => Math.min(100, Math.max(0, 100 - ((at - time) / width_ms) * 100));

/** How wide the picture is: as long as was looked, a minute at least. */
export const widthOf = (lanes: readonly Lane[], at: number): number => Math.min(LANES_MS, Math.max(60_000, at - Math.min(at, ...lanes.map((l) => l.spans[0]!.from))));

/** A lane in words, for who does not see it. */
export function tellLane(lane: Lane, at: number): string {
  const last = lane.spans[lane.spans.length - 1]!;
  const restarts = new Set(lane.spans.map((s) => s.epoch)).size - 1;
  const now = last.to < at ? 'is gone' : last.being === 'ready' ? 'is ready' : last.being === 'drains' ? 'is there and takes no work' : 'is there as last known';
  return `${lane.node} ${now}${restarts ? `, started again ${restarts === 1 ? 'once' : `${restarts} times`}` : ''}`;
}
