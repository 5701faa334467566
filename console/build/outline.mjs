// Turns the public-domain Natural Earth outlines of `world-atlas` into two small binary assets at build time:
// a coarse one for the whole world, and a finer one that the map loads when someone zooms in.
//
// Layout, all integers as LEB128 varints, signed ones zigzag: count of rings of land, then per ring its count of points and
// the points as differences; rings of lakes and border lines, the same way; then names: count, and per name x, y, rank and length with UTF-8 bytes.
// A coordinate is Web Mercator scaled to 0..65535 (coarse) or 0..1048575 (fine); the first varint is that scale's bits.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

import { feature, mesh } from 'topojson-client';

const require = createRequire(import.meta.url);
const LATITUDE_MAX = 85.0511;

function project([longitude, latitude]) {
  const clamped = Math.max(-LATITUDE_MAX, Math.min(LATITUDE_MAX, latitude));
  const sine = Math.sin((clamped * Math.PI) / 180);
  return [longitude / 360 + 0.5, 0.5 - Math.log((1 + sine) / (1 - sine)) / (4 * Math.PI)];
}

// Islands on the date line have points at both edges of the map: each point is put beside the one before it, so that x may
// lie outside 0..1. The map draws the world several times side by side anyway.
function unwrap(points) {
  const out = [];
  for (const [x, y] of points) {
    const before = out.length ? out[out.length - 1][0] : x;
    out.push([x - Math.round(x - before), y]);
  }
  return out;
}

const unwrapDegrees = (ring) => unwrap(ring.map(([lon, lat]) => [lon / 360, lat])).map(([x, lat]) => [x * 360, lat]);

// Antarctica runs once around the world: its ring is closed along the lower edge.
function closeAtPole(points) {
  const [first, last] = [points[0], points[points.length - 1]];
  if (Math.abs(first[0] - last[0]) < 0.5) return points;
  return [...points, [last[0], 1], [first[0], 1]];
}

class Writer {
  bytes = [];

  unsigned(n) {
    while (n >= 0x80) {
      this.bytes.push((n & 0x7f) | 0x80);
      n = Math.floor(n / 128);
    }
    this.bytes.push(n);
  }

  signed(n) {
    this.unsigned(n < 0 ? -2 * n - 1 : 2 * n);
  }

  text(text) {
    const bytes = Buffer.from(text, 'utf8');
    this.unsigned(bytes.length);
    this.bytes.push(...bytes);
  }

  line(points, scale, closed) {
    const grid = [];
    for (const [wx, wy] of closed ? closeAtPole(unwrap(points.map(project))) : unwrap(points.map(project))) {
      const [x, y] = [Math.round(wx * scale), Math.round(wy * scale)];
      const last = grid[grid.length - 1];
      if (!last || last[0] !== x || last[1] !== y) grid.push([x, y]);
    }
    if (grid.length < (closed ? 3 : 2)) return false;
    this.unsigned(grid.length);
    let [px, py] = [0, 0];
    for (const [x, y] of grid) {
      this.signed(x - px);
      this.signed(y - py);
      [px, py] = [x, y];
    }
    return true;
  }

  lines(all, scale, closed) {
    const body = new Writer();
    const count = all.filter((points) => body.line(points, scale, closed)).length;
    this.unsigned(count);
    for (const byte of body.bytes) this.bytes.push(byte);
  }
}

function ringArea(ring) {
  let sum = 0;
  for (let i = 0, j = ring.length - 1; i < ring.length; j = i++) {
    sum += (ring[j][0] - ring[i][0]) * (ring[j][1] + ring[i][1]);
  }
  return Math.abs(sum / 2);
}

function polygons(geometry) {
  if (geometry.type === 'Polygon') return [geometry.coordinates];
  if (geometry.type === 'MultiPolygon') return geometry.coordinates;
  if (geometry.type === 'GeometryCollection') return geometry.geometries.flatMap(polygons);
  return [];
}

export function encode(atlas, bits) {
  const scale = 2 ** bits - 1;
  const out = new Writer();
  out.unsigned(bits);
  const land = feature(atlas, atlas.objects.land);
  const shapes = land.type === 'FeatureCollection' ? land.features.map((f) => f.geometry) : [land.geometry];
  const areas = shapes.flatMap(polygons);
  out.lines(areas.map((rings) => rings[0]), scale, true);
  out.lines(areas.flatMap((rings) => rings.slice(1)), scale, true);
  const borders = mesh(atlas, atlas.objects.countries, (a, b) => a !== b);
  out.lines(borders.coordinates, scale, false);
  const names = [];
  for (const country of feature(atlas, atlas.objects.countries).features) {
    const rings = polygons(country.geometry).map((p) => unwrapDegrees(p[0]));
    const biggest = rings.sort((a, b) => ringArea(b) - ringArea(a))[0];
    if (!biggest || !country.properties?.name) continue;
    const area = ringArea(biggest);
    // The middle of the widest horizontal slice lies inside even where a country bends.
    const ys = biggest.map((p) => p[1]);
    const [low, high] = [Math.min(...ys), Math.max(...ys)];
    let best = [0, biggest[0][0], biggest[0][1]];
    for (let step = 1; step < 16; step++) {
      const y = low + ((high - low) * step) / 16;
      const crossings = [];
      for (let i = 0, j = biggest.length - 1; i < biggest.length; j = i++) {
        const [a, b] = [biggest[i], biggest[j]];
        if (a[1] > y !== b[1] > y) crossings.push(a[0] + ((y - a[1]) / (b[1] - a[1])) * (b[0] - a[0]));
      }
      crossings.sort((a, b) => a - b);
      for (let i = 0; i + 1 < crossings.length; i += 2) {
        const width = crossings[i + 1] - crossings[i];
        if (width > best[0]) best = [width, (crossings[i] + crossings[i + 1]) / 2, y];
      }
    }
    names.push({ name: country.properties.name, at: [best[1], best[2]], area });
  }
  names.sort((a, b) => b.area - a.area);
  out.unsigned(names.length);
  for (const { name, at, area } of names) {
    const [x, y] = project(at).map((v) => Math.round((v - Math.floor(v)) * scale));
    out.unsigned(x);
    out.unsigned(y);
    // Rank: the zoom from which the name has room.
    out.unsigned(Math.max(1, Math.min(8, Math.round(6.5 - Math.log2(Math.sqrt(area))))));
    out.text(name);
  }
  return Uint8Array.from(out.bytes);
}

const SOURCES = {
  coarse: { file: 'world-atlas/countries-110m.json', bits: 16 },
  fine: { file: 'world-atlas/countries-50m.json', bits: 20 },
};

/** Vite plugin: `virtual:outline` exports the addresses of the two assets. */
export function outline() {
  const cache = new Map();
  const bytes = (kind) => {
    if (!cache.has(kind)) {
      const { file, bits } = SOURCES[kind];
      cache.set(kind, encode(JSON.parse(readFileSync(require.resolve(file), 'utf8')), bits));
    }
    return cache.get(kind);
  };
  let building = false;
  return {
    name: 'fieldline-outline',
    configResolved(config) {
      building = config.command === 'build';
    },
    resolveId: (id) => (id === 'virtual:outline' ? '\0outline' : undefined),
    load(id) {
      if (id !== '\0outline') return undefined;
      const address = (kind) => {
        if (!building) return JSON.stringify(`/@outline/${kind}`);
        const ref = this.emitFile({ type: 'asset', name: `outline-${kind}.bin`, source: bytes(kind) });
        return `import.meta.ROLLUP_FILE_URL_${ref}`;
      };
      return `export const coarse = ${address('coarse')};\nexport const fine = ${address('fine')};\n`;
    },
    configureServer(server) {
      server.middlewares.use('/@outline/', (request, response) => {
        const kind = request.url.slice(1);
        if (!(kind in SOURCES)) return response.writeHead(404).end();
        response.setHeader('Content-Type', 'application/octet-stream');
        response.end(bytes(kind));
      });
    },
  };
}
