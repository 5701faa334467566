// The arithmetic of a virtual list: which rows to keep in the page for a scroll position.

export interface Window {
  /** First row that is kept. */
  first: number;
  /** One past the last row that is kept. */
  end: number;
}

/** Rows to render: those in view and `overscan` more on both sides. */
export function visible(scrollTop: number, height: number, rowHeight: number, count: number, overscan: number): Window {
  if (count === 0 || height <= 0) return { first: 0, end: 0 };
  const first = Math.floor(Math.max(0, scrollTop) / rowHeight);
  const end = Math.ceil((Math.max(0, scrollTop) + height) / rowHeight);
  return { first: Math.max(0, Math.min(first, count - 1) - overscan), end: Math.min(count, end + overscan) };
}

/** The scroll position nearest to `scrollTop` at which row `index` is wholly in view below a header of `inset`. */
export function reveal(index: number, scrollTop: number, height: number, rowHeight: number, inset = 0): number {
  const top = index * rowHeight;
  if (top < scrollTop) return top;
  const bottom = top + rowHeight + inset;
  return bottom > scrollTop + height ? bottom - height : scrollTop;
}

/** Chromium lays out nothing beyond about 33 million pixels: with rows of 34 pixels that is 880,000 rows. */
export const HEIGHT_MAX = 30_000_000;
