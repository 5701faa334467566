// What `/system` tells, flattened so that the console shows also what it does not know by name.
import type { Json, System } from './api';
import { bytes, duration, number } from './format';

const HIDDEN = new Set(['version', 'uptime_s', 'listeners', 'close_codes']);

/** Rows of name and text: nested members joined by dots; names that end in a unit are written with it. */
export function rows(system: System): [string, string][] {
  const out: [string, string][] = [];
  const walk = (prefix: string, json: unknown): void => {
    if (json === null || json === undefined) return;
    if (Array.isArray(json)) {
      out.push([prefix, String(json.length)]);
    } else if (typeof json === 'object') {
      for (const [name, value] of Object.entries(json)) walk(prefix ? `${prefix}.${name}` : name, value);
    } else {
      out.push([prefix, unitOf(prefix, json as Json)]);
    }
  };
  for (const [name, value] of Object.entries(system)) if (!HIDDEN.has(name)) walk(name, value);
  return out;
}

export function unitOf(name: string, json: Json): string {
  if (typeof json !== 'number') return String(json);
  if (/bytes(_total|_max|_used|_free)?$|_bytes$|^memory/.test(name)) return bytes(json);
  if (/_s$|seconds$/.test(name)) return duration(json);
  if (/_ms$/.test(name)) return `${number(json, 1)} ms`;
  return number(json, 2);
}

/** The first number found under one of these names, anywhere in the tree. */
export function find(json: unknown, ...names: string[]): number | undefined {
  if (json === null || typeof json !== 'object') return undefined;
  for (const name of names) {
    const direct = (json as Record<string, unknown>)[name];
    if (typeof direct === 'number') return direct;
  }
  for (const value of Object.values(json)) {
    const deep = find(value, ...names);
    if (deep !== undefined) return deep;
  }
  return undefined;
}

export interface Broker {
  name: string;
  host: string;
  port: number;
  tls: boolean;
}

/** Where MQTT clients connect. A listener on every address is reached by the name that this page was. */
export function brokersOf(listeners: readonly { name: string; address: string }[], here: string): Broker[] {
  return listeners.flatMap(({ name, address }) => {
    const at = address.lastIndexOf(':');
    const port = Number(address.slice(at + 1));
    if (!/^mqtts?\b/.test(name) || at < 0 || !port) return [];
    const host = address.slice(0, at).replace(/^\[|\]$/g, '');
    const everywhere = host === '0.0.0.0' || host === '::' || host === '';
    return [{ name, host: (everywhere ? here : host).replace(/^\[|\]$/g, ''), port, tls: /tls|mqtts/.test(name) }];
  });
}
