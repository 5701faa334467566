// Small reactive parts that pages share.
import type { Page } from './api';
import { socket, type Push, type Want } from './socket';

/** Something read from the server, with its error and a way to read it again. */
export class Loaded<T> {
  value = $state.raw<T | undefined>(undefined);
  error = $state.raw<unknown>(null);
  busy = $state(false);
  private turn = 0;

  constructor(private readonly read: () => Promise<T>) {}

  reload = async (): Promise<void> => {
    const turn = ++this.turn;
    this.busy = true;
    try {
      const value = await this.read();
      if (turn !== this.turn) return;
      this.value = value;
      this.error = null;
    } catch (error) {
      if (turn === this.turn && !(error instanceof DOMException)) this.error = error;
    } finally {
      if (turn === this.turn) this.busy = false;
    }
  };
}

/** Reads now and every `every_ms` while the page is in sight. Returns the end. */
export function poll(run: () => void, every_ms: number): () => void {
  run();
  const timer = setInterval(() => {
    if (!document.hidden) run();
  }, every_ms);
  return () => clearInterval(timer);
}

export function listen(want: Want, listener: (push: Push) => void): () => void {
  return socket.subscribe(want, listener);
}

/** Every item of a list, page by page, up to `max`. */
export async function all<T>(read: (cursor: string | null) => Promise<Page<T>>, max = 10_000): Promise<T[]> {
  const items: T[] = [];
  let cursor: string | null = null;
  do {
    const page: Page<T> = await read(cursor);
    items.push(...page.items);
    cursor = page.next;
  } while (cursor && items.length < max);
  return items;
}
