import { untrack } from 'svelte';

// Addresses live in the fragment (`#/devices/ID?tab=track`): the server serves one page, and secrets in a link are not logged.

export interface Route {
  /** Path parts, decoded: `['devices', 'ID']`. */
  parts: string[];
  query: URLSearchParams;
}

export function parse(hash: string): Route {
  const [path = '', search = ''] = hash.replace(/^#\/?/, '').split('?', 2);
  const parts = path.split('/').filter(Boolean).map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  return { parts, query: new URLSearchParams(search) };
}

export function href(path: string, query?: Record<string, string | undefined>): string {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(query ?? {})) if (value) search.set(name, value);
  const text = search.toString();
  return `#/${path.replace(/^\//, '')}${text ? `?${text}` : ''}`;
}

class Router {
  route = $state.raw<Route>(parse(typeof location === 'undefined' ? '' : location.hash));

  constructor() {
    if (typeof window !== 'undefined') {
      window.addEventListener('hashchange', () => {
        this.route = parse(location.hash);
      });
    }
  }

  go(path: string, query?: Record<string, string | undefined>): void {
    location.hash = href(path, query).slice(1);
  }

  /** Changes the query without a new step in the browser's history. */
  replaceQuery(query: Record<string, string | undefined>): void {
    // Callers are often effects: they must not run again because of what they set here.
    untrack(() => {
      const next = href(this.route.parts.map(encodeURIComponent).join('/'), query);
      if (next === location.hash || (next === '#/' && location.hash === '')) return;
      history.replaceState(null, '', next);
      this.route = parse(next);
    });
  }
}

export const router = new Router();
