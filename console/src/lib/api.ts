// The HTTP interface, typed by hand. One function a route; errors are `ApiError` with the server's problem document.

import type { Nodes } from './nodes';

export type Json = null | boolean | number | string | Json[] | { [name: string]: Json };
export type Labels = Record<string, string>;
export type Scope = 'read' | 'write' | 'command' | 'publish' | 'admin' | 'root';
export const SCOPES: readonly { scope: Scope; says: string }[] = [
  { scope: 'read', says: 'Read devices, messages, state and logs' },
  { scope: 'write', says: 'Create, change and delete devices, channels and protocols' },
  { scope: 'command', says: 'Send commands to devices' },
  { scope: 'publish', says: 'Publish messages into the pipeline' },
  { scope: 'admin', says: 'Manage users, tokens and settings' },
  { scope: 'root', says: 'Manage accounts and the installation' },
];
export type Transport = 'tcp' | 'tls' | 'udp';

export interface Page<T> {
  items: T[];
  next: string | null;
}

export interface Me {
  kind: 'user' | 'token';
  name: string;
  account: { id: string; name: string };
  scopes: Scope[];
  must_set_password?: boolean;
}

export interface Device {
  id: string;
  account: string;
  name: string;
  ident: string;
  protocol: string;
  type: string;
  enabled: boolean;
  settings: Record<string, Json>;
  labels: Labels;
  created_at: string;
  revision: number;
  /** Null while it is not known. */
  online: boolean | null;
  seen_at: string | null;
}

export interface Sample {
  value: Json;
  timestamp: string;
}

export interface DeviceState {
  device: string;
  name?: string;
  online: boolean;
  seen_at: string | null;
  peer?: string | null;
  values: Record<string, Sample>;
}

/** A message: `timestamp`, `received` and its parameters. */
export type Message = { timestamp: string; received: string } & Record<string, Json>;

/** A log line: what kind it is says `log.kind`. */
export type LogLine = { timestamp: string } & Record<string, Json>;

export type CommandStatus = 'queued' | 'sent' | 'answered' | 'failed' | 'expired' | 'cancelled';

export interface Command {
  id: string;
  device: string;
  name: string;
  params: Record<string, Json>;
  status: CommandStatus;
  created_at: string;
  expires_at: string;
  sent_at: string | null;
  finished_at: string | null;
  attempts: number;
  answer: string | null;
  error: string | null;
  created_by: string;
}

export interface ChannelStatus {
  listening: boolean;
  error?: string | null;
  address?: string | null;
  connections?: number;
}

export interface Channel {
  id: string;
  account: string;
  name: string;
  protocol: string;
  transport: Transport;
  listen: string;
  enabled: boolean;
  auto_register: boolean;
  idle_timeout_s: number;
  connections_max: number;
  frame_bytes_max: number;
  connection_bytes_per_s_max: number;
  tls_certificate?: string | null;
  tls_key?: string | null;
  labels: Labels;
  created_at: string;
  revision: number;
  status?: ChannelStatus;
}

export interface Connection {
  id: string;
  peer?: string;
  ident?: string | null;
  device?: string | null;
  since?: string;
  [other: string]: Json | undefined;
}

export interface SettingDecl {
  name: string;
  kind?: string;
  type?: string;
  default?: Json;
  description?: string;
}

export interface CommandDecl {
  name: string;
  title?: string;
  params?: Json;
}

export interface Protocol {
  name: string;
  description: string;
  built_in: boolean;
  version: number | null;
  transports: Transport[];
  settings: SettingDecl[];
  commands: CommandDecl[];
  source?: string;
}

export interface Diagnostic {
  line: number;
  column: number;
  end?: number;
  message: string;
  expected?: string | string[] | null;
  hint?: string | null;
}

export interface Field {
  name: string;
  start: number;
  end: number;
  value: Json;
  note?: string | null;
  /** Which message of the frame it belongs to. */
  message?: number | null;
}

export interface Frame {
  hex: string;
  start: number;
  end: number;
  ident: string | null;
  messages: Record<string, Json>[];
  replies: string[];
  error: { class: string; message: string; offset?: number | null; rule?: string; line?: number } | null;
  close: Json;
  command_answer?: Json;
  fields: Field[];
}

export interface Decoded {
  frames: Frame[];
  remaining: string;
  /** Why it ended before the bytes did. */
  stopped?: string;
}

export interface Parameter {
  id?: string;
  name: string;
  kind: 'bool' | 'int' | 'decimal' | 'float' | 'text' | 'bytes' | 'json';
  bits: number;
  decimals: number;
  unit: string;
  title: string;
  description: string;
}

export interface Event {
  id: string;
  kind: 'online' | 'offline' | 'registered' | 'rejected' | 'command' | 'audit';
  object: string;
  timestamp: string;
  params: Record<string, Json>;
}

export interface Audit {
  sequence: number;
  at: string;
  actor: { name: string; address: string | null };
  action: 'create' | 'update' | 'delete';
  kind: string;
  object: string;
  changed: string[];
}

export interface Token {
  id: string;
  name: string;
  prefix: string;
  scopes: Scope[];
  devices: string[];
  networks: string[];
  expires_at: string | null;
  created_at: string;
  created_by: string;
  revision: number;
  secret?: string;
}

export interface User {
  id: string;
  name: string;
  scopes: Scope[];
  enabled: boolean;
  created_at: string;
  revision: number;
}

export interface Account {
  id: string;
  name: string;
  enabled: boolean;
  /** 0: until space runs out. */
  retention_days: number;
  /** 0: no limit. */
  storage_bytes_max: number;
  labels: Labels;
  created_at: string;
  revision: number;
}

export interface ConnectPoint {
  id: string;
  name: string;
  protocol: string;
  transport: Transport;
  host: string;
  port: number;
  test_command: string;
}

export interface CloseCodeRow {
  number?: number;
  code?: number;
  name: string;
  description: string;
}

export interface System {
  version: string;
  uptime_s: number;
  listeners?: { name: string; address: string }[];
  history?: Record<string, Json>;
  memory?: Json;
  close_codes?: CloseCodeRow[];
  [other: string]: unknown;
}

export interface Problem {
  type?: string;
  title?: string;
  status?: number;
  detail?: string;
  remedy?: string;
  code?: string;
  errors?: Diagnostic[];
}

/** An answer that is not a success, or no answer at all (`status` 0). */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly problem: Problem,
  ) {
    super(problem.detail ?? problem.title ?? `the server answered ${status}`);
  }
}

const BASE = '/api/v1';

/** Called when the session has ended, so that the console can ask to sign in again. */
export const hooks: { unauthorized: () => void; reached: (ok: boolean) => void } = {
  unauthorized: () => {},
  reached: () => {},
};

/** Members to change; in maps null takes a member away. */
export type Patch<T> = { [K in keyof T]?: T[K] extends Record<string, string> ? Record<string, Json> : T[K] };

export interface Options {
  query?: Record<string, string | number | boolean | undefined | null>;
  body?: unknown;
  revision?: number;
  signal?: AbortSignal;
  /** How often it was tried before. */
  attempt?: number;
}

/** A read that the server puts off is tried again so often. */
const RETRIES_MAX = 4;

/** What a merge patch says of a map that is now `after`: members that went are null (RFC 7396), or they would stay. */
export function mergeOf(before: Record<string, Json> | undefined, after: Record<string, Json>): Record<string, Json> {
  const gone = Object.keys(before ?? {}).filter((name) => !(name in after));
  return { ...after, ...Object.fromEntries(gone.map((name) => [name, null])) };
}

export function query(params: Options['query']): string {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(params ?? {})) {
    if (value !== undefined && value !== null && value !== '') search.set(name, String(value));
  }
  const text = search.toString();
  return text ? `?${text}` : '';
}

export async function request<T>(method: string, path: string, options: Options = {}): Promise<T> {
  const headers: Record<string, string> = { Accept: 'application/json' };
  if (method !== 'GET') headers['X-Fieldline-Csrf'] = '1';
  if (options.body !== undefined) headers['Content-Type'] = 'application/json';
  if (options.revision !== undefined) headers['If-Match'] = `"${options.revision}"`;
  let response: Response;
  try {
    const init: RequestInit = { method, headers, credentials: 'same-origin', cache: 'no-store' };
    if (options.body !== undefined) init.body = JSON.stringify(options.body);
    if (options.signal) init.signal = options.signal;
    response = await fetch(`${BASE}${path}${query(options.query)}`, init);
  } catch (error) {
    if (error instanceof DOMException && error.name === 'AbortError') throw error;
    hooks.reached(false);
    throw new ApiError(0, {
      title: 'The server cannot be reached',
      detail: 'No answer came back. The console keeps trying to reconnect; check that Fieldline is running.',
    });
  }
  hooks.reached(true);
  if (response.status === 429 && method === 'GET' && (options.attempt ?? 0) < RETRIES_MAX) {
    const wait_s = Math.min(10, Number(response.headers.get('Retry-After')) || 1);
    await new Promise((done) => setTimeout(done, wait_s * 1000));
    return request<T>(method, path, { ...options, attempt: (options.attempt ?? 0) + 1 });
  }
  const text = await response.text();
  let body: unknown;
  try {
    body = text ? JSON.parse(text) : undefined;
  } catch {
    body = undefined;
  }
  if (!response.ok) {
    if (response.status === 401 && !path.startsWith('/auth/')) hooks.unauthorized();
    const problem = (body ?? { title: response.statusText || `Status ${response.status}` }) as Problem;
    throw new ApiError(response.status, problem);
  }
  return body as T;
}

const get = <T>(path: string, q?: Options['query'], signal?: AbortSignal) =>
  request<T>('GET', path, { ...(q ? { query: q } : {}), ...(signal ? { signal } : {}) });
const post = <T>(path: string, body?: unknown, q?: Options['query']) =>
  request<T>('POST', path, { body: body ?? {}, ...(q ? { query: q } : {}) });
const patch = <T>(path: string, body: unknown, revision?: number) =>
  request<T>('PATCH', path, { body, ...(revision === undefined ? {} : { revision }) });
const remove = (path: string) => request<void>('DELETE', path);
const id = encodeURIComponent;

export interface Range {
  from?: string;
  to?: string;
  limit?: number;
  reverse?: boolean;
  cursor?: string | null;
}

export const api = {
  auth: {
    link: (secret: string) => post<{ user?: Json; must_set_password?: boolean }>('/auth/link', { secret }),
    signIn: (name: string, password: string) => post<unknown>('/auth/sign-in', { name, password }),
    signOut: () => post<unknown>('/auth/sign-out'),
    me: () => get<Me>('/auth/me'),
    password: (next: string, current?: string) =>
      post<unknown>('/auth/password', current === undefined ? { new: next } : { current, new: next }),
  },
  devices: {
    list: (q: { q?: string; ident?: string; label?: string; online?: boolean; limit?: number; cursor?: string | null }, signal?: AbortSignal) =>
      get<Page<Device>>('/devices', q, signal),
    get: (device: string) => get<Device>(`/devices/${id(device)}`),
    create: (body: Partial<Device>) => post<Device>('/devices', body),
    patch: (device: string, body: Patch<Device>, revision?: number) => patch<Device>(`/devices/${id(device)}`, body, revision),
    remove: (device: string) => remove(`/devices/${id(device)}`),
    state: (device: string) => get<DeviceState>(`/devices/${id(device)}/state`),
    messages: (device: string, q: Range & { fields?: string }, signal?: AbortSignal) =>
      get<Page<Message>>(`/devices/${id(device)}/messages`, { ...q }, signal),
    log: (device: string, q: Range) => get<Page<LogLine>>(`/devices/${id(device)}/log`, { ...q }),
    /** Newest first. */
    commands: (device: string, limit: number) => get<Page<Command>>(`/devices/${id(device)}/commands`, { limit }),
    send: (device: string, name: string, params: Record<string, Json>, ttl_s: number) =>
      post<Command>(`/devices/${id(device)}/commands`, { name, params, ttl_s }),
  },
  commands: {
    get: (command: string) => get<Command>(`/commands/${id(command)}`),
    cancel: (command: string) => remove(`/commands/${id(command)}`),
  },
  state: (q: { params?: string; limit?: number; cursor?: string | null }, signal?: AbortSignal) =>
    get<Page<DeviceState>>('/state', q, signal),
  channels: {
    list: (q: { limit?: number; cursor?: string | null } = {}) => get<Page<Channel>>('/channels', q),
    get: (channel: string) => get<Channel>(`/channels/${id(channel)}`),
    create: (body: Partial<Channel>) => post<Channel>('/channels', body),
    patch: (channel: string, body: Patch<Channel>, revision?: number) => patch<Channel>(`/channels/${id(channel)}`, body, revision),
    remove: (channel: string) => remove(`/channels/${id(channel)}`),
    connections: (channel: string) => get<Page<Connection>>(`/channels/${id(channel)}/connections`),
    close: (channel: string, connection: string) => remove(`/channels/${id(channel)}/connections/${id(connection)}`),
    log: (channel: string, q: Range) => get<Page<LogLine>>(`/channels/${id(channel)}/log`, { ...q }),
  },
  protocols: {
    list: () => get<Page<Protocol>>('/protocols', { limit: 1000 }),
    get: (name: string) => get<Protocol>(`/protocols/${id(name)}`),
    put: (name: string, source: string) => request<Protocol>('PUT', `/protocols/${id(name)}`, { body: { source } }),
    remove: (name: string) => remove(`/protocols/${id(name)}`),
    check: (name: string, source: string) => post<Json>(`/protocols/${id(name)}/check`, { source }),
    decode: (
      name: string,
      body: { hex: string; source?: string; transport?: Transport; identified?: boolean; settings?: Record<string, Json> },
    ) => post<Decoded>(`/protocols/${id(name)}/decode`, body),
  },
  parameters: () => get<Page<Parameter>>('/parameters', { limit: 10_000 }),
  events: (q: { limit?: number; cursor?: string | null }) => get<Page<Event>>('/events', q),
  audit: (q: { limit?: number; before?: number | null }) => get<Page<Audit>>('/audit', q),
  tokens: {
    list: () => get<Page<Token>>('/tokens', { limit: 1000 }),
    create: (body: Partial<Token> & { account?: string }) => post<Token>('/tokens', body),
    remove: (token: string) => remove(`/tokens/${id(token)}`),
  },
  accounts: {
    list: (cursor: string | null = null) => get<Page<Account>>('/accounts', { limit: 1000, cursor }),
    get: (account: string) => get<Account>(`/accounts/${id(account)}`),
    create: (body: Partial<Account>) => post<Account>('/accounts', body),
    patch: (account: string, body: Patch<Account>, revision?: number) => patch<Account>(`/accounts/${id(account)}`, body, revision),
    remove: (account: string) => remove(`/accounts/${id(account)}`),
  },
  users: {
    list: () => get<Page<User>>('/users', { limit: 1000 }),
    create: (body: { name: string; scopes: Scope[]; password?: string; account?: string }) => post<User & { link?: string }>('/users', body),
    patch: (user: string, body: Partial<User>, revision?: number) => patch<User>(`/users/${id(user)}`, body, revision),
    remove: (user: string) => remove(`/users/${id(user)}`),
    link: (user: string) => post<{ link: string; expires_at?: string }>(`/users/${id(user)}/link`),
  },
  settings: {
    get: () => get<Record<string, Json>>('/settings'),
    patch: (body: Record<string, Json>) => patch<Record<string, Json>>('/settings', body),
  },
  system: () => get<System>('/system'),
  nodes: (signal?: AbortSignal) => get<Nodes>('/nodes', undefined, signal),
  connect: () => get<{ channels: ConnectPoint[] }>('/connect'),
};
