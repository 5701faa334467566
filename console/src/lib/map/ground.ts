// What is drawn on the ground of the map: grid, names, and where the middle lies.
import { cities } from './cities';
import { type View, distance, latitudeOf, longitudeOf, worldPx } from './mercator';
import type { Outline } from './outline';

/** The colours of the present theme. */
export interface Palette {
  water: string; land: string; coast: string; border: string; grid: string; name: string; halo: string; group: string; track: string;
  ink: string; panel: string; ok: string; off: string; warn: string; accent: string;
}

/** Meridians and parallels, closer the nearer one looks. */
export function drawGrid(ctx: CanvasRenderingContext2D, palette: Palette, view: View, width: number, height: number): void {
  const scale = worldPx(view.zoom);
  const steps = [30, 15, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001];
  const step = steps.find((s) => (s / 360) * scale < 220) ?? 0.001;
  const west = longitudeOf(view.x - width / 2 / scale);
  const east = longitudeOf(view.x + width / 2 / scale);
  const north = Math.min(85, latitudeOf(Math.max(0, view.y - height / 2 / scale)));
  const south = Math.max(-85, latitudeOf(Math.min(1, view.y + height / 2 / scale)));
  // Over land, when zoomed in, the grid is all there is to see motion by.
  ctx.strokeStyle = view.zoom > 6 ? palette.border : palette.grid;
  ctx.globalAlpha = view.zoom > 6 ? 0.7 : 1;
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (let lon = Math.ceil(west / step) * step; lon <= east; lon += step) {
    const x = Math.round((lon / 360 + 0.5 - view.x) * scale + width / 2) + 0.5;
    ctx.moveTo(x, 0);
    ctx.lineTo(x, height);
  }
  for (let lat = Math.ceil(south / step) * step; lat <= north; lat += step) {
    const sine = Math.sin((lat * Math.PI) / 180);
    const world = 0.5 - Math.log((1 + sine) / (1 - sine)) / (4 * Math.PI);
    const y = Math.round((world - view.y) * scale + height / 2) + 0.5;
    ctx.moveTo(0, y);
    ctx.lineTo(width, y);
  }
  ctx.stroke();
  ctx.globalAlpha = 1;
}

/** Cities and countries, none over another. */
export function drawNames(ctx: CanvasRenderingContext2D, palette: Palette, shapes: Outline, view: View, width: number, height: number): void {
  const taken: [number, number, number, number][] = [];
  ctx.textAlign = 'center';
  ctx.textBaseline = 'middle';
  ctx.lineJoin = 'round';
  ctx.strokeStyle = palette.halo;
  const scale = worldPx(view.zoom);
  const place = (text: string, x: number, y: number, dot: boolean, size: number, fill: string): void => {
    // In each copy of the world that is in sight, as the land is: a name belongs to the land under it.
    const first = Math.floor(view.x - width / 2 / scale);
    for (let world = first; world <= view.x + width / 2 / scale; world++) {
      placeAt(text, (x + world - view.x) * scale + width / 2, (y - view.y) * scale + height / 2, dot, size, fill);
    }
  };
  const placeAt = (text: string, px: number, py: number, dot: boolean, size: number, fill: string): void => {
    if (px < -80 || py < -20 || px > width + 80 || py > height + 20) return;
    const half = (text.length * size) / 3.4;
    const ty = dot ? py - 10 : py;
    if (taken.some(([l, t, r, b]) => px + half > l && px - half < r && ty + 9 > t && ty - 9 < b)) return;
    taken.push([px - half, ty - 9, px + half, ty + (dot ? 14 : 9)]);
    ctx.fillStyle = fill;
    if (dot) {
      ctx.beginPath();
      ctx.arc(px, py, 2.2, 0, 2 * Math.PI);
      ctx.fill();
    }
    ctx.lineWidth = 3;
    ctx.strokeText(text, px, ty);
    ctx.fillText(text, px, ty);
  };
  ctx.font = '11px ui-sans-serif, system-ui, sans-serif';
  for (const city of cities()) {
    if (view.zoom >= city.zoom) place(city.text, city.x, city.y, true, 11, palette.name);
  }
  ctx.font = '600 11px ui-sans-serif, system-ui, sans-serif';
  ctx.globalAlpha = 0.85;
  for (const name of shapes.names) {
    if (view.zoom >= name.zoom + 0.6 && view.zoom < name.zoom + 6) place(name.text.toUpperCase(), name.x, name.y, false, 14, palette.name);
  }
  ctx.globalAlpha = 1;
}

/** Where the middle of the view lies, from the nearest city; empty where none is near. */
export function nearestCity(view: View): string {
  const [lat, lon] = [latitudeOf(view.y), longitudeOf(view.x)];
  let best = { metres: Number.POSITIVE_INFINITY, text: '', lat: 0, lon: 0 };
  for (const city of cities()) {
    const [cityLat, cityLon] = [latitudeOf(city.y), longitudeOf(city.x)];
    const metres = distance(lat, lon, cityLat, cityLon);
    if (metres < best.metres) best = { metres, text: city.text, lat: cityLat, lon: cityLon };
  }
  if (best.metres > 400_000) return '';
  if (best.metres < 4000) return best.text;
  const east = (lon - best.lon) * Math.cos((lat * Math.PI) / 180);
  const turn = Math.round(Math.atan2(east, lat - best.lat) / (Math.PI / 4));
  const side = ['N', 'NE', 'E', 'SE', 'S', 'SW', 'W', 'NW'][(turn + 8) % 8] ?? '';
  return `${Math.round(best.metres / 1000)} km ${side} of ${best.text}`;
}
