// Hex text, and which bytes of a frame belong to which field.
import type { Field } from './api';

/** Bytes of hex digits; spaces, line breaks, colons, commas, dashes and `0x` between them are allowed. `null` if it is not hex. */
export function parseHex(text: string): Uint8Array | null {
  const digits = text.replace(/0x/gi, '').replace(/[\s:,-]+/g, '');
  if (digits.length % 2 !== 0 || /[^0-9a-f]/i.test(digits)) return null;
  const bytes = new Uint8Array(digits.length / 2);
  for (let i = 0; i < bytes.length; i++) bytes[i] = Number.parseInt(digits.slice(2 * i, 2 * i + 2), 16);
  return bytes;
}

/** What someone pasted, as hex: hex stays, text (such as a Wialon IPS line) becomes its bytes with `\r\n` understood. */
export function toHex(input: string): { hex: string; from: 'hex' | 'text' } {
  const bytes = parseHex(input);
  if (bytes) return { hex: hexOf(bytes), from: 'hex' };
  const text = input.replaceAll('\\r', '\r').replaceAll('\\n', '\n').replace(/\r?\n/g, '\r\n');
  return { hex: hexOf(new TextEncoder().encode(text)), from: 'text' };
}

export function hexOf(bytes: Uint8Array): string {
  let text = '';
  for (const byte of bytes) text += byte.toString(16).padStart(2, '0');
  return text;
}

/** The byte as text beside hex: itself if printable, else a middle dot. */
export function printable(byte: number): string {
  return byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : '·';
}

/**
 * For each byte the index of its innermost field, or -1. The shortest field that covers a byte wins, so that a
 * record's own fields show inside the record; of equal ones the later.
 */
export function owners(fields: readonly Pick<Field, 'start' | 'end'>[], length: number): Int32Array {
  const owner = new Int32Array(length).fill(-1);
  const order = fields.map((_, at) => at).sort((a, b) => size(fields[b]!) - size(fields[a]!) || a - b);
  for (const at of order) {
    const { start, end } = fields[at]!;
    for (let i = Math.max(0, start); i < Math.min(length, end); i++) owner[i] = at;
  }
  return owner;
}

const size = (f: Pick<Field, 'start' | 'end'>) => f.end - f.start;

/** How many other fields hold each field; fields are sorted by start, the longer first. */
export function depths(fields: readonly Pick<Field, 'start' | 'end'>[]): number[] {
  const open: number[] = [];
  return fields.map(({ start, end }) => {
    while (open.length && (open[open.length - 1]! <= start || open[open.length - 1]! < end)) open.pop();
    const depth = open.length;
    if (end > start) open.push(end);
    return depth;
  });
}

export const HUES = 8;

/** A colour number per field: neighbours in the frame differ, and the same field keeps its colour. */
export function hues(fields: readonly Pick<Field, 'start' | 'end'>[], length: number): Int32Array {
  const owner = owners(fields, length);
  const hue = new Int32Array(fields.length).fill(-1);
  let next = 0;
  for (const at of owner) {
    if (at >= 0 && hue[at] === -1) hue[at] = next++ % HUES;
  }
  return hue;
}

/** Fields whose bytes lie outside a frame that starts at `base` in the input are counted from there. */
export function rebase(fields: readonly Field[], base: number, length: number): Field[] {
  const shifted = base > 0 && fields.some((f) => f.end > length);
  return shifted ? fields.map((f) => ({ ...f, start: f.start - base, end: f.end - base })) : [...fields];
}
