// Measures frame times while scrolling a live table, against the stand-in server: 10,000 and 100,000 devices.
// Fails if the 95th percentile with 10,000 rows is above 50 ms; on a machine busy with other work, if the page itself is to blame.
import { spawn } from 'node:child_process';
import { cpus, loadavg } from 'node:os';
import { fileURLToPath } from 'node:url';

import { launch, OUT } from './lib.mjs';

const BOUND_MS = 50;
/** What the page may work for one frame, in processor time, where other work makes frames late. */
const WORK_MS_MAX = 25;
const SECONDS = Number(process.env.SECONDS ?? 8);
const sizes = (process.env.SIZES ?? '10000,100000').split(',').map(Number);
const view = process.env.VIEW ?? 'table';

function stand(devices, rate, port) {
  const child = spawn(process.execPath, [fileURLToPath(new URL('../dev/fake.mjs', import.meta.url))], {
    env: { ...process.env, DEVICES: String(devices), RATE: String(rate), PORT: String(port), OPEN: '1' }, stdio: ['ignore', 'pipe', 'inherit'],
  });
  return new Promise((resolve, reject) => {
    child.stdout.on('data', (data) => String(data).includes('http://') && resolve(child));
    child.on('exit', (code) => reject(new Error(`the stand-in ended with ${code}`)));
  });
}

const percentile = (sorted, p) => sorted[Math.min(sorted.length - 1, Math.floor((sorted.length * p) / 100))] ?? 0;

let failed = false;
for (const [n, devices] of sizes.entries()) {
  const port = 8190 + n;
  const rate = Number(process.env.RATE ?? 2000);
  const server = await stand(devices, rate, port);
  const browser = await launch();
  try {
    const page = await browser.newPage({ viewport: { width: 1440, height: 900 } });
    await page.goto(`http://127.0.0.1:${port}/#/devices?view=${view}`);
    await page.waitForSelector('.grid-row');
    await page.waitForFunction(() => !document.querySelector('.head [role=status]')?.textContent?.includes('Loading'), null, { timeout: 60_000 });
    const shown = await page.textContent('.head [role=status]');
    await page.waitForTimeout(1000);
    // How long the page's own thread worked: on a busy machine frames are late through no fault of the page.
    const cdp = await page.context().newCDPSession(page);
    await cdp.send('Performance.enable', { timeDomain: 'threadTicks' });
    const worked_s = async () => (await cdp.send('Performance.getMetrics')).metrics.find((m) => m.name === 'TaskDuration').value;
    const before_s = await worked_s();
    const measured = await page.evaluate(async (seconds) => {
      const grid = document.querySelector('.grid');
      const times = [];
      let blank = 0;
      const live = new Set();
      const end = performance.now() + seconds * 1000;
      let before = performance.now();
      let speed = 12;
      await new Promise((done) => {
        const step = (now) => {
          times.push(now - before);
          before = now;
          // Calm scrolling, faster and faster; at times a jump, as when the bar is dragged.
          speed = times.length % 120 === 0 ? 12 : Math.min(400, speed * 1.03);
          if (times.length % 150 === 0) grid.scrollTop = Math.random() * grid.scrollHeight;
          else if (grid.scrollTop + grid.clientHeight >= grid.scrollHeight - 1) grid.scrollTop = 0;
          else grid.scrollTop += speed;
          const middle = grid.getBoundingClientRect();
          const row = document.elementFromPoint(middle.left + 80, middle.top + middle.height / 2)?.closest('.grid-row');
          if (!row) blank++;
          else live.add(row.textContent);
          if (now < end) requestAnimationFrame(step);
          else done();
        };
        requestAnimationFrame(step);
      });
      return { times: times.slice(2), blank, distinct: live.size };
    }, SECONDS);
    const work_ms = ((await worked_s()) - before_s) * 1000;
    const sorted = [...measured.times].sort((a, b) => a - b);
    const [p50, p95, p99, max] = [percentile(sorted, 50), percentile(sorted, 95), percentile(sorted, 99), sorted.at(-1)];
    const longest = measured.times.filter((t) => t > 100).length;
    console.log(
      `${devices} rows (${shown?.trim()}), ${rate} messages/s, ${view}: ${sorted.length} frames, p50 ${p50.toFixed(1)} ms, p95 ${p95.toFixed(1)} ms, p99 ${p99.toFixed(1)} ms, `
        + `longest ${max.toFixed(0)} ms, ${longest} over 100 ms, ${measured.blank} blank, ${measured.distinct} different rows seen in the middle; the page worked ${(work_ms / sorted.length).toFixed(1)} ms a frame; load ${loadavg()[0].toFixed(1)} on ${cpus().length} processors`,
    );
    const busy = loadavg()[0] > 1.5 * cpus().length;
    if (devices <= 10_000 && p95 > BOUND_MS) {
      if (busy && work_ms / sorted.length < WORK_MS_MAX) console.log('the machine is busy with other work: judged by the page\'s own work instead');
      else failed = true;
    }
    await page.screenshot({ path: `${OUT}perf-${devices}.png` });
  } finally {
    await browser.close();
    server.kill();
  }
}
if (failed) {
  console.log(`the 95th percentile is above ${BOUND_MS} ms`);
  process.exit(1);
}
