// One WebSocket for the whole console. Parts subscribe to feeds; the socket carries the union of what they want,
// and subscribes again by itself after a lost connection.
import type { Event, Json, LogLine, Message, Sample } from './api';

export type Feed = 'message' | 'state' | 'event' | 'log';

export type Push =
  | { type: 'message'; device: string; items: Message[] }
  | { type: 'state'; device: string; values: Record<string, Sample>; online?: boolean; seen_at?: string }
  | ({ type: 'event' } & { event?: Event } & Partial<Omit<Event, 'kind'>> & { kind?: Event['kind'] })
  | { type: 'log'; object: string; items: LogLine[] }
  | { type: 'lagged'; dropped: number }
  | { type: 'subscribed' | 'error' | 'ping' | 'pong'; [other: string]: Json | undefined };

export interface Want {
  feeds: Feed[];
  /** The only devices that are wanted; all when absent. */
  devices?: string[];
}

/** The smallest subscription that covers every want: feeds joined; devices joined unless someone wants all. */
export function union(wants: Iterable<Want>): { subscribe: Feed[]; devices?: string[] } {
  const feeds = new Set<Feed>();
  const devices = new Set<string>();
  let all = false;
  for (const want of wants) {
    for (const feed of want.feeds) feeds.add(feed);
    if (want.devices) for (const device of want.devices) devices.add(device);
    else all = true;
  }
  const subscribe = [...feeds].sort();
  return all || subscribe.length === 0 ? { subscribe } : { subscribe, devices: [...devices].sort() };
}

/** Waiting time before attempt `attempt` (from 0): doubles up to 15 s, with up to a quarter of jitter. */
export function backoff_ms(attempt: number, random = Math.random()): number {
  return Math.min(15_000, 400 * 2 ** Math.min(attempt, 10)) * (1 + random / 4);
}

type Listener = (push: Push) => void;
export type Status = 'idle' | 'connecting' | 'open' | 'lost';

export class Socket {
  status: Status = 'idle';
  retryAt = 0;
  private socket: WebSocket | null = null;
  private wants = new Map<number, { want: Want; listener: Listener }>();
  private statusListeners = new Set<(status: Status) => void>();
  private nextKey = 1;
  private nextId = 1;
  private attempt = 0;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private sent = '';
  private stopped = true;
  /** Set while a subscription change is being gathered, so that one page switch sends one message. */
  private syncing = false;

  constructor(private readonly address: () => string) {}

  start(): void {
    if (!this.stopped) return;
    this.stopped = false;
    this.connect();
  }

  stop(): void {
    this.stopped = true;
    clearTimeout(this.timer);
    this.socket?.close();
    this.socket = null;
    this.set('idle');
  }

  /** Tries at once instead of waiting for the back-off. */
  retry(): void {
    if (this.stopped || this.status === 'open' || this.status === 'connecting') return;
    clearTimeout(this.timer);
    this.connect();
  }

  onStatus(listener: (status: Status) => void): () => void {
    this.statusListeners.add(listener);
    listener(this.status);
    return () => this.statusListeners.delete(listener);
  }

  subscribe(want: Want, listener: Listener): () => void {
    const key = this.nextKey++;
    this.wants.set(key, { want, listener });
    this.sync();
    return () => {
      this.wants.delete(key);
      this.sync();
    };
  }

  private set(status: Status): void {
    if (this.status === status) return;
    this.status = status;
    for (const listener of this.statusListeners) listener(status);
  }

  private connect(): void {
    this.set('connecting');
    const socket = new WebSocket(this.address());
    this.socket = socket;
    socket.onopen = () => {
      this.attempt = 0;
      this.sent = '';
      this.set('open');
      this.sync();
    };
    socket.onmessage = (message) => {
      if (typeof message.data !== 'string') return;
      let push: Push;
      try {
        push = JSON.parse(message.data) as Push;
      } catch {
        return;
      }
      for (const { want, listener } of this.wants.values()) {
        if (wanted(want, push)) listener(push);
      }
    };
    socket.onclose = () => {
      if (this.socket !== socket) return;
      this.socket = null;
      if (this.stopped) return;
      const wait = backoff_ms(this.attempt++);
      this.retryAt = Date.now() + wait;
      this.set('lost');
      this.timer = setTimeout(() => this.connect(), wait);
    };
  }

  private sync(): void {
    if (this.syncing) return;
    this.syncing = true;
    queueMicrotask(() => {
      this.syncing = false;
      if (this.socket?.readyState !== WebSocket.OPEN) return;
      const subscription = union([...this.wants.values()].map(({ want }) => want));
      const text = JSON.stringify(subscription);
      if (text === this.sent) return;
      this.sent = text;
      this.socket.send(JSON.stringify({ ...subscription, id: this.nextId++ }));
    });
  }
}

export function wanted(want: Want, push: Push): boolean {
  if (push.type === 'lagged') return true;
  if (push.type !== 'message' && push.type !== 'state' && push.type !== 'event' && push.type !== 'log') return false;
  if (!want.feeds.includes(push.type)) return false;
  if (!want.devices) return true;
  if (push.type === 'message' || push.type === 'state') return want.devices.includes(push.device);
  if (push.type === 'log') return want.devices.includes(push.object);
  const object = eventOf(push)?.object;
  return object === undefined || want.devices.includes(object);
}

/** The event of a push, whether it comes flat or under `event`. */
export function eventOf(push: Push): Event | undefined {
  if (push.type !== 'event') return undefined;
  if (push.event) return push.event;
  return push.id && push.kind ? (push as unknown as Event) : undefined;
}

export const socket = new Socket(() => {
  const { protocol, host } = window.location;
  return `${protocol === 'https:' ? 'wss:' : 'ws:'}//${host}/api/v1/ws`;
});
