// What the whole console shares: who is signed in, the theme, the connection, the clock, toasts, the dictionary.
import { api, ApiError, hooks, type Json, type Me, type Parameter, type Scope } from './api';
import { Fleet } from './fleet';
import { router } from './router.svelte';
import { socket, type Status } from './socket';

export type Theme = 'system' | 'light' | 'dark';

export interface Toast {
  key: number;
  kind: 'ok' | 'bad' | 'info';
  text: string;
  detail?: string;
}

function stored(name: string): string | null {
  try {
    return localStorage.getItem(`fieldline.${name}`);
  } catch {
    return null;
  }
}

export function remember(name: string, value: string): void {
  try {
    localStorage.setItem(`fieldline.${name}`, value);
  } catch {
    // Private windows may refuse storage: the choice then lasts until the page is closed.
  }
}

export function recall<T>(name: string, fallback: T): T {
  const text = stored(name);
  if (text === null) return fallback;
  try {
    return JSON.parse(text) as T;
  } catch {
    return fallback;
  }
}

/**
 * Loads the page anew. Which hosts images may come from is said by the page's own headers, which a browser that finds the
 * page unchanged would keep: so the copy it holds is replaced first.
 */
export async function reloadPage(): Promise<void> {
  try {
    await fetch('/', { cache: 'reload', credentials: 'same-origin' });
  } finally {
    location.reload();
  }
}

class App {
  me = $state.raw<Me | null>(null);
  /** Whether it is known if someone is signed in. */
  ready = $state(false);
  mustSetPassword = $state(false);
  theme = $state<Theme>((stored('theme') as Theme | null) ?? 'system');
  link = $state<Status>('idle');
  reached = $state(true);
  /** Seconds tick, for relative times. */
  now = $state(Date.now());
  toasts = $state<Toast[]>([]);
  parameters = $state.raw<Map<string, Parameter>>(new Map());
  settings = $state.raw<Record<string, Json>>({});
  /** A dialogue that any page may open. */
  help = $state(false);
  private nextToast = 1;

  constructor() {
    hooks.unauthorized = () => {
      if (this.me) this.signedOut();
    };
    hooks.reached = (ok) => {
      this.reached = ok;
      if (ok) socket.retry();
    };
  }

  start(): void {
    setInterval(() => {
      this.now = Date.now();
    }, 1000);
    let losses = 0;
    socket.onStatus((status) => {
      this.link = status;
      if (status === 'open') losses = 0;
      // A feed that is refused again and again may mean that the session has ended: that is asked by HTTP, which can say so.
      if (status === 'lost' && ++losses % 3 === 2) {
        api.auth.me().catch((error: unknown) => {
          if (error instanceof ApiError && error.status === 401 && this.me) this.signedOut();
        });
      }
    });
    // A server that restarted asks to sign in again with 401; one that is away is tried by the socket.
    void this.load();
  }

  async load(): Promise<void> {
    try {
      void this.signedIn(await api.auth.me());
    } catch (error) {
      if (error instanceof ApiError && error.status === 0) {
        setTimeout(() => void this.load(), 2000);
        return;
      }
      this.me = null;
    }
    this.ready = true;
  }

  private async signedIn(me: Me, mustSetPassword = false): Promise<void> {
    this.me = me;
    this.mustSetPassword = mustSetPassword || (me.must_set_password ?? false);
    socket.start();
    await this.loadShared();
  }

  async loadShared(): Promise<void> {
    const [parameters, settings] = await Promise.allSettled([api.parameters(), api.settings.get()]);
    if (parameters.status === 'fulfilled') this.parameters = new Map(parameters.value.items.map((p) => [p.name, p]));
    if (settings.status === 'fulfilled') this.settings = settings.value;
  }

  async afterSignIn(mustSetPassword: boolean): Promise<void> {
    const me = await api.auth.me();
    await this.signedIn(me, mustSetPassword);
    this.ready = true;
  }

  signedOut(): void {
    this.me = null;
    socket.stop();
    fleet.reset();
    router.go('/sign-in');
  }

  async signOut(): Promise<void> {
    try {
      await api.auth.signOut();
    } finally {
      this.signedOut();
    }
  }

  setTheme(theme: Theme): void {
    this.theme = theme;
    remember('theme', theme);
    if (theme === 'system') delete document.documentElement.dataset['theme'];
    else document.documentElement.dataset['theme'] = theme;
  }

  /** From what is seen now to the other one. */
  toggleTheme(): void {
    const dark = this.theme === 'dark' || (this.theme === 'system' && matchMedia('(prefers-color-scheme: dark)').matches);
    this.setTheme(dark ? 'light' : 'dark');
  }

  may(scope: Scope): boolean {
    return this.me?.scopes.includes(scope) ?? false;
  }

  spec(name: string): Parameter | undefined {
    return this.parameters.get(name);
  }

  get tilesUrl(): string | null {
    const url = this.settings['map.tiles_url'];
    return typeof url === 'string' && url ? url : null;
  }

  toast(kind: Toast['kind'], text: string, detail?: string): void {
    const toast: Toast = { key: this.nextToast++, kind, text, ...(detail ? { detail } : {}) };
    this.toasts = [...this.toasts.slice(-3), toast];
    setTimeout(() => this.dismiss(toast.key), kind === 'bad' ? 9000 : 3500);
  }

  /** Shows an error that has no better place. */
  fail(error: unknown): void {
    if (error instanceof ApiError) {
      if (error.status === 0) return;
      this.toast('bad', error.problem.title ?? 'That did not work', [error.problem.detail, error.problem.remedy].filter(Boolean).join(' '));
    } else {
      this.toast('bad', 'That did not work', String(error));
    }
  }

  dismiss(key: number): void {
    this.toasts = this.toasts.filter((t) => t.key !== key);
  }
}

export const fleet = new Fleet(socket);
export const app = new App();
