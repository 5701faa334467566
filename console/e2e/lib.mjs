// What the browser tests share: Chromium, watching for trouble, and reporting.
import { mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

import { chromium } from 'playwright-core';

export const OUT = fileURLToPath(new URL('./out/', import.meta.url));
mkdirSync(OUT, { recursive: true });

export function launch() {
  return chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run'],
  });
}

/** Answers that a test provokes on purpose; the browser writes them to its console as errors. */
const EXPECTED = [
  { status: 401, path: '/api/v1/auth/me' },
  { status: 401, path: '/api/v1/auth/sign-in' },
  { status: 401, path: '/api/v1/auth/link' },
  { status: 422, path: '/check' },
  { status: 422, path: '/decode' },
];

/** Collects console errors, page errors and requests to other hosts of a context. */
export function watch(context, base) {
  const trouble = [];
  const host = new URL(base).host;
  context.on('request', (request) => {
    const url = new URL(request.url());
    if (url.protocol !== 'data:' && url.protocol !== 'blob:' && url.host !== host) trouble.push(`request to another host: ${url.href}`);
  });
  context.on('page', (page) => {
    page.on('websocket', (ws) => {
      if (new URL(ws.url()).host !== host) trouble.push(`socket to another host: ${ws.url()}`);
    });
    page.on('pageerror', (error) => trouble.push(`page error: ${error.message}`));
    page.on('console', (message) => {
      if (message.type() !== 'error' && message.type() !== 'warning') return;
      const where = message.location().url;
      const expected = EXPECTED.some((e) => message.text().includes(`status of ${e.status}`) && where.includes(e.path));
      if (!expected) trouble.push(`console ${message.type()}: ${message.text()} (${where})`);
    });
  });
  return trouble;
}

/** Runs steps in turn; a failed one leaves a picture. Returns how many failed. */
export async function run(steps, context) {
  let failed = 0;
  for (const [name, step] of steps) {
    const began = performance.now();
    try {
      const note = await step();
      console.log(`ok    ${name}${note ? `: ${note}` : ''} (${Math.round(performance.now() - began)} ms)`);
    } catch (error) {
      failed++;
      console.log(`FAIL  ${name}\n      ${String(error.stack ?? error).split('\n').slice(0, 6).join('\n      ')}`);
      const page = context.pages().at(-1);
      await page?.screenshot({ path: `${OUT}failed-${name.replace(/\W+/g, '-')}.png` }).catch(() => {});
    }
  }
  return failed;
}

export function assert(condition, text) {
  if (!condition) throw new Error(text);
}

/** Waits until `read` gives something true. */
export async function until(read, what, timeout_ms = 10_000) {
  const end = Date.now() + timeout_ms;
  for (;;) {
    const value = await read();
    if (value) return value;
    if (Date.now() > end) throw new Error(`waited ${timeout_ms} ms in vain for: ${what}`);
    await new Promise((done) => setTimeout(done, 100));
  }
}
