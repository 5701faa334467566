// How values, times and sizes are written for people.
import type { Json, Parameter } from './api';

const UNITS: Record<string, string> = {
  deg: '°', Cel: '°C', '/min': 'rpm', '[g]': 'g', 'kW.h': 'kWh', m3: 'm³', 'm3/h': 'm³/h', '[degF]': '°F',
};

/** The unit as people write it; UCUM inside. */
export function unitText(unit: string | undefined): string {
  return unit ? (UNITS[unit] ?? unit) : '';
}

const numbers = new Map<number, Intl.NumberFormat>();

/** A number with at most `decimals` decimals and thin grouping. */
export function number(value: number, decimals = 0): string {
  const digits = Math.max(0, Math.min(decimals, 20));
  let format = numbers.get(digits);
  if (!format) {
    format = new Intl.NumberFormat('en-US', { maximumFractionDigits: digits });
    numbers.set(digits, format);
  }
  return format.format(value).replaceAll(',', '\u202f');
}

/** Decimals shown in tables: more than needed to read is noise there; the exact value is on the device's page. */
export function displayDecimals(spec: Parameter | undefined): number {
  if (!spec) return 6;
  if (spec.kind === 'int') return 0;
  if (spec.name === 'position.latitude' || spec.name === 'position.longitude') return 5;
  return spec.kind === 'float' ? 4 : spec.decimals;
}

/** A value as text, without its unit. */
export function value(json: Json | undefined, spec?: Parameter): string {
  if (json === undefined || json === null) return '';
  if (typeof json === 'boolean') return json ? 'yes' : 'no';
  if (typeof json === 'number') {
    if (spec?.kind === 'int' && spec.unit === '') return String(json);
    return number(json, displayDecimals(spec));
  }
  if (typeof json === 'string') return json;
  return JSON.stringify(json);
}

/** A value with its unit. */
export function valueUnit(json: Json | undefined, spec?: Parameter): string {
  const text = value(json, spec);
  const unit = unitText(spec?.unit);
  if (!text || !unit || typeof json !== 'number') return text;
  return unit === '°' ? `${text}${unit}` : `${text}\u202f${unit}`;
}

/** "now", "12 s ago", "3 min ago", "in 5 min"; beyond 30 days the date. */
export function relative(then_ms: number, now_ms: number): string {
  const seconds = Math.round((now_ms - then_ms) / 1000);
  const ahead = seconds < -1;
  const s = Math.abs(seconds);
  if (s <= 1) return 'now';
  const say = (n: number, unit: string) => (ahead ? `in ${n} ${unit}` : `${n} ${unit} ago`);
  if (s < 60) return say(s, 's');
  if (s < 3600) return say(Math.floor(s / 60), 'min');
  if (s < 86_400) return say(Math.floor(s / 3600), 'h');
  if (s < 30 * 86_400) return say(Math.floor(s / 86_400), 'd');
  return new Date(then_ms).toISOString().slice(0, 10);
}

const pad = (n: number, width = 2) => String(n).padStart(width, '0');

/** Local date and time to the second, in an order that sorts. */
export function dateTime(at: number | string): string {
  const d = new Date(at);
  if (Number.isNaN(d.getTime())) return String(at);
  return `${d.getFullYear()}-${pad(d.getMonth() + 1)}-${pad(d.getDate())} ${timeOfDay(d)}`;
}

export function timeOfDay(at: number | string | Date, millis = false): string {
  const d = new Date(at);
  const text = `${pad(d.getHours())}:${pad(d.getMinutes())}:${pad(d.getSeconds())}`;
  return millis ? `${text}.${pad(d.getMilliseconds(), 3)}` : text;
}

/** "3 d 4 h", "2 h 5 min", "12 s". */
export function duration(seconds: number): string {
  const s = Math.max(0, Math.floor(seconds));
  const days = Math.floor(s / 86_400);
  const hours = Math.floor(s / 3600) % 24;
  const minutes = Math.floor(s / 60) % 60;
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  if (minutes) return `${minutes} min ${s % 60} s`;
  return `${s} s`;
}

/** "1.4 MB": decimal units, as disks are sold. */
export function bytes(count: number): string {
  if (count < 1000) return `${count} B`;
  const units = ['kB', 'MB', 'GB', 'TB', 'PB'];
  let scaled = count;
  let at = -1;
  while (scaled >= 999.5 && at < units.length - 1) {
    scaled /= 1000;
    at++;
  }
  return `${scaled >= 100 ? Math.round(scaled) : scaled.toFixed(1)} ${units[at]}`;
}

/** "12 400" → "12.4 k" where room is short. */
export function compact(count: number): string {
  if (count < 10_000) return number(count);
  if (count < 1_000_000) return `${(count / 1000).toFixed(count < 100_000 ? 1 : 0)}k`;
  return `${(count / 1_000_000).toFixed(1)}M`;
}

/** A title for a parameter that no dictionary knows: its name in words. */
export function titleOf(name: string, spec?: Parameter): string {
  return spec?.title || name;
}

export function plural(count: number, one: string, many = `${one}s`): string {
  return `${number(count)} ${count === 1 ? one : many}`;
}
