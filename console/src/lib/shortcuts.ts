// Keys that work everywhere: `g` and a letter go to a page, `/` searches, `?` explains, Escape leaves.

import type { Scope } from './api';

export interface Shortcut {
  keys: string;
  says: string;
  path?: string;
  /** Only for those who have it. */
  scope?: Scope;
}

export const SHORTCUTS: readonly Shortcut[] = [
  { keys: 'g h', says: 'Home', path: '/' },
  { keys: 'g d', says: 'Devices', path: '/devices' },
  { keys: 'g m', says: 'Map', path: '/devices?view=map' },
  { keys: 'g c', says: 'Channels', path: '/channels' },
  { keys: 'g n', says: 'Connect a device', path: '/connect' },
  { keys: 'g p', says: 'Protocols', path: '/protocols' },
  { keys: 'g e', says: 'Events', path: '/events' },
  { keys: 'g t', says: 'Tokens', path: '/tokens', scope: 'admin' },
  { keys: 'g u', says: 'Users', path: '/users', scope: 'admin' },
  { keys: 'g a', says: 'Accounts', path: '/accounts', scope: 'root' },
  { keys: 'g l', says: 'Cluster', path: '/cluster', scope: 'root' },
  { keys: 'g s', says: 'Settings', path: '/settings' },
  { keys: '/', says: 'Search on this page' },
  { keys: '↑ ↓', says: 'Move in a list' },
  { keys: 'Enter', says: 'Open what is chosen' },
  { keys: 'Esc', says: 'Close, or leave a field' },
  { keys: 'Shift T', says: 'Dark or light' },
  { keys: '?', says: 'This help' },
];

/** Reads a key after those before it: the path to go to, `'pending'` in the middle of a chord, or `null`. */
export function chord(pending: string, key: string, may: (scope: Scope) => boolean = () => true): { path: string } | 'pending' | null {
  if (pending === 'g') {
    const found = SHORTCUTS.find((s) => s.path !== undefined && (s.scope === undefined || may(s.scope)) && s.keys === `g ${key}`);
    return found?.path !== undefined ? { path: found.path } : null;
  }
  return key === 'g' ? 'pending' : null;
}

export function typing(target: EventTarget | null): boolean {
  if (!(target instanceof HTMLElement)) return false;
  return target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName);
}
