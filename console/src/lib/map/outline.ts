// The built-in map: outlines of land and countries from a compact file (see build/outline.mjs), drawn as paths.
import { coarse, fine } from 'virtual:outline';

import type { Box } from './mercator';

export interface Shape {
  box: Box;
  path: Path2D;
}

export interface Name {
  text: string;
  x: number;
  y: number;
  /** Zoom from which it has room. */
  zoom: number;
}

export interface Outline {
  land: Shape[];
  lakes: Shape[];
  borders: Shape[];
  names: Name[];
}

/** Lines of points (x, y, x, y …) in 0..1, as the file has them. */
export interface Lines {
  land: Float32Array[];
  lakes: Float32Array[];
  borders: Float32Array[];
  names: Name[];
}

/** Reads an outline file. Throws on a file that ends early. */
export function decode(bytes: Uint8Array): Lines {
  let at = 0;
  const unsigned = (): number => {
    let result = 0;
    let factor = 1;
    for (;;) {
      const byte = bytes[at++];
      if (byte === undefined) throw new Error('the outline file ends early');
      result += (byte & 0x7f) * factor;
      if (byte < 0x80) return result;
      factor *= 128;
    }
  };
  const signed = (): number => {
    const n = unsigned();
    return n % 2 === 0 ? n / 2 : -(n + 1) / 2;
  };
  const scale = 2 ** unsigned() - 1;
  const lines = (): Float32Array[] => {
    const all: Float32Array[] = [];
    for (let left = unsigned(); left > 0; left--) {
      const count = unsigned();
      const points = new Float32Array(2 * count);
      let [x, y] = [0, 0];
      for (let i = 0; i < count; i++) {
        x += signed();
        y += signed();
        points[2 * i] = x / scale;
        points[2 * i + 1] = y / scale;
      }
      all.push(points);
    }
    return all;
  };
  const land = lines();
  const lakes = lines();
  const borders = lines();
  const names: Name[] = [];
  const text = new TextDecoder();
  for (let left = unsigned(); left > 0; left--) {
    const [x, y, zoom, length] = [unsigned() / scale, unsigned() / scale, unsigned(), unsigned()];
    names.push({ text: text.decode(bytes.subarray(at, at + length)), x, y, zoom });
    at += length;
  }
  return { land, lakes, borders, names };
}

/** Paths are drawn in units of 1/UNIT of the world, since curves in tiny units lose precision. */
export const UNIT = 4096;

function shape(points: Float32Array, closed: boolean): Shape {
  const path = new Path2D();
  const box = { x0: 2, y0: 2, x1: -1, y1: -1 };
  for (let i = 0; i < points.length; i += 2) {
    const [x, y] = [points[i]!, points[i + 1]!];
    if (i === 0) path.moveTo(x * UNIT, y * UNIT);
    else path.lineTo(x * UNIT, y * UNIT);
    box.x0 = Math.min(box.x0, x);
    box.x1 = Math.max(box.x1, x);
    box.y0 = Math.min(box.y0, y);
    box.y1 = Math.max(box.y1, y);
  }
  if (closed) path.closePath();
  return { box, path };
}

const loaded: Partial<Record<'coarse' | 'fine', Promise<Outline>>> = {};

/** The outline, loaded once. */
export function outline(kind: 'coarse' | 'fine'): Promise<Outline> {
  loaded[kind] ??= (async () => {
    const response = await fetch(kind === 'coarse' ? coarse : fine);
    const { land, lakes, borders, names } = decode(new Uint8Array(await response.arrayBuffer()));
    return {
      land: land.map((points) => shape(points, true)),
      lakes: lakes.map((points) => shape(points, true)),
      borders: borders.map((points) => shape(points, false)),
      names,
    };
  })();
  return loaded[kind];
}
