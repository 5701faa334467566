// Web Mercator: the world is the unit square, x from west to east, y from north to south.

export const TILE_PX = 256;
export const LATITUDE_MAX = 85.0511287798066;
export const ZOOM_MIN = 0;
export const ZOOM_MAX = 19;

export const xOf = (longitude: number): number => longitude / 360 + 0.5;

export function yOf(latitude: number): number {
  const clamped = Math.max(-LATITUDE_MAX, Math.min(LATITUDE_MAX, latitude));
  const sine = Math.sin((clamped * Math.PI) / 180);
  return 0.5 - Math.log((1 + sine) / (1 - sine)) / (4 * Math.PI);
}

export const longitudeOf = (x: number): number => (x - 0.5) * 360;

export function latitudeOf(y: number): number {
  return (Math.atan(Math.sinh(Math.PI * (1 - 2 * y))) * 180) / Math.PI;
}

/** What the map shows: the world point in the middle, and a zoom at which the world is `256 × 2^zoom` pixels wide. */
export interface View {
  x: number;
  y: number;
  zoom: number;
}

export const worldPx = (zoom: number): number => TILE_PX * 2 ** zoom;

/** Nearest equal of `x` to `around`, since the world repeats every 1. */
export const wrapNear = (x: number, around: number): number => x - Math.round(x - around);

export function toScreen(view: View, width: number, height: number, x: number, y: number): [number, number] {
  const scale = worldPx(view.zoom);
  return [(wrapNear(x, view.x) - view.x) * scale + width / 2, (y - view.y) * scale + height / 2];
}

export function toWorld(view: View, width: number, height: number, px: number, py: number): [number, number] {
  const scale = worldPx(view.zoom);
  return [view.x + (px - width / 2) / scale, view.y + (py - height / 2) / scale];
}

/** The view with its zoom in bounds, its middle within the world, and x brought to 0..1. */
export function clampView(view: View, height: number): View {
  const zoomMin = Math.max(ZOOM_MIN, Math.log2(Math.max(1, height) / TILE_PX) - 1);
  const zoom = Math.max(zoomMin, Math.min(ZOOM_MAX, view.zoom));
  return { x: view.x - Math.floor(view.x), y: Math.max(0, Math.min(1, view.y)), zoom };
}

/** Zooms to `zoom` so that the world point under (px, py) stays there. */
export function zoomAround(view: View, width: number, height: number, px: number, py: number, zoom: number): View {
  const bounded = Math.max(ZOOM_MIN, Math.min(ZOOM_MAX, zoom));
  const [x, y] = toWorld(view, width, height, px, py);
  const scale = worldPx(bounded);
  return { x: x - (px - width / 2) / scale, y: y - (py - height / 2) / scale, zoom: bounded };
}

export interface Box {
  x0: number;
  y0: number;
  x1: number;
  y1: number;
}

/** The view that shows `box` whole with `padding` pixels around it. */
export function fit(box: Box, width: number, height: number, padding: number, zoomMax = 15): View {
  const spanX = Math.max(box.x1 - box.x0, 1e-12);
  const spanY = Math.max(box.y1 - box.y0, 1e-12);
  const zoomX = Math.log2(Math.max(1, width - 2 * padding) / (TILE_PX * spanX));
  const zoomY = Math.log2(Math.max(1, height - 2 * padding) / (TILE_PX * spanY));
  return { x: (box.x0 + box.x1) / 2, y: (box.y0 + box.y1) / 2, zoom: Math.min(zoomX, zoomY, zoomMax) };
}

/**
 * The box of most points: the outermost `share` of each side is left out, so that a few trackers without a fix
 * or on another continent do not shrink the fleet to a dot.
 */
export function boxOf(xs: ArrayLike<number>, ys: ArrayLike<number>, count: number, share = 0): Box | null {
  if (count === 0) return null;
  const sorted = (a: ArrayLike<number>) => Float64Array.from({ length: count }, (_, i) => a[i] ?? 0).sort();
  const [sx, sy] = [sorted(xs), sorted(ys)];
  const cut = Math.floor(count * share);
  return { x0: sx[cut]!, x1: sx[count - 1 - cut]!, y0: sy[cut]!, y1: sy[count - 1 - cut]! };
}

/** Metres on the ground of one pixel at latitude `latitude`. */
export function metresPerPx(latitude: number, zoom: number): number {
  return (40_075_016.686 * Math.cos((latitude * Math.PI) / 180)) / worldPx(zoom);
}

/** A round length that takes at most `px` pixels, and how many it takes. */
export function scaleBar(metresPx: number, px: number): { metres: number; px: number } {
  const room = metresPx * px;
  const power = 10 ** Math.floor(Math.log10(room));
  const step = [5, 2, 1].find((n) => n * power <= room) ?? 1;
  return { metres: step * power, px: (step * power) / metresPx };
}

/** Distance in metres along the sphere. */
export function distance(lat1: number, lon1: number, lat2: number, lon2: number): number {
  const rad = Math.PI / 180;
  const a =
    Math.sin(((lat2 - lat1) * rad) / 2) ** 2 +
    Math.cos(lat1 * rad) * Math.cos(lat2 * rad) * Math.sin(((lon2 - lon1) * rad) / 2) ** 2;
  return 2 * 6_371_008.8 * Math.asin(Math.min(1, Math.sqrt(a)));
}
