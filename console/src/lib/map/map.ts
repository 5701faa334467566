// The canvas map: outlines or tiles below, tracks and markers above. Draws only when something changed.
import { Clusterer, radiusOf, type Clusters, type Points } from './cluster';
import {
  type Box, type View, clampView, fit, latitudeOf, metresPerPx, scaleBar, toScreen, toWorld, worldPx, wrapNear, zoomAround,
} from './mercator';
import { type Palette, drawGrid, drawNames, nearestCity } from './ground';
import { type Outline, type Shape, UNIT, outline } from './outline';
import { TileLayer } from './tiles';

export const enum Look {
  Offline = 0,
  Standing = 1,
  Moving = 2,
  Selected = 3,
}

/** What the markers are. Read at every draw; nothing is copied. */
export interface Markers {
  points: Points;
  look(i: number): Look;
  /** Degrees clockwise from north; negative for none. */
  heading(i: number): number;
  label(i: number): string;
  selected: number;
}

export interface Track {
  /** World coordinates in turn, oldest first. */
  xs: Float64Array;
  ys: Float64Array;
  /** 0..1 per point: how the line is tinted. */
  tint?: Float32Array;
  /** Index of the point where the playback stands. */
  at: number;
  heading: number;
}

export interface Handlers {
  pick?: (i: number) => void;
  hover?: (i: number, x: number, y: number) => void;
  moved?: (view: View) => void;
}

const HEADINGS = 36;
const PINGS_MAX = 24;
const PING_MS = 1100;
/** From this zoom on, motion itself can be seen. */
const PING_ZOOM_MAX = 9;
const MARGIN_PX = 160;
const SPRITE_PX = 26;

export class FieldMap {
  view: View = { x: 0.5, y: 0.4, zoom: 2 };
  markers: Markers | null = null;
  track: Track | null = null;
  readonly top: HTMLCanvasElement;
  private readonly base: HTMLCanvasElement;
  private readonly cache = document.createElement('canvas');
  private cacheView: View | null = null;
  private cacheAt = 0;
  private width = 1;
  private height = 1;
  private dpr = 1;
  private frame = 0;
  private baseDirty = true;
  private lastFrame = 0;
  private drawnAt = 0;
  private pings: { x: number; y: number; at: number }[] = [];
  private later: ReturnType<typeof setTimeout> | undefined;
  /** Whether someone has moved or zoomed the map. */
  touched = false;
  /** Milliseconds between pictures of moving markers; a page that needs the time raises it. */
  motion_ms = 40;
  private target: View | null = null;
  private velocity: [number, number] = [0, 0];
  private readonly clusterer = new Clusterer();
  private clusters: Clusters | null = null;
  private shownX = new Float64Array(0);
  private shownY = new Float64Array(0);
  private shownAt = new Int32Array(0);
  private frameNumber = 1;
  private sprites = new Map<number, HTMLCanvasElement>();
  private palette!: Palette;
  private coarse: Outline | null = null;
  private fine: Outline | null = null;
  private tiles: TileLayer | null = null;
  private readonly observer: ResizeObserver;
  private readonly media = matchMedia('(prefers-color-scheme: dark)');
  private readonly themeObserver: MutationObserver;
  private readonly stillMotion = matchMedia('(prefers-reduced-motion: reduce)').matches;
  private pointers = new Map<number, { x: number; y: number }>();
  private gesture: { x: number; y: number; distance: number; moved: boolean; at: number } | null = null;
  private destroyed = false;
  private hovered = -1;
  /** Called once the first size is known. */
  private whenSized: (() => void)[] = [];
  private sized = false;

  constructor(
    private readonly host: HTMLElement,
    private readonly handlers: Handlers = {},
    private readonly interactive = true,
  ) {
    this.base = document.createElement('canvas');
    this.top = document.createElement('canvas');
    for (const canvas of [this.base, this.top]) {
      canvas.style.position = 'absolute';
      canvas.style.inset = '0';
      canvas.style.width = '100%';
      canvas.style.height = '100%';
      canvas.style.display = 'block';
      canvas.setAttribute('aria-hidden', 'true');
      host.append(canvas);
    }
    this.readPalette();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(host);
    this.themeObserver = new MutationObserver(() => this.readPalette());
    this.themeObserver.observe(document.documentElement, { attributes: true, attributeFilter: ['data-theme'] });
    this.media.addEventListener('change', this.readPalette);
    if (interactive) this.listen();
    void outline('coarse').then((loaded) => {
      this.coarse = loaded;
      this.invalidateBase();
    });
  }

  destroy(): void {
    this.destroyed = true;
    cancelAnimationFrame(this.frame);
    clearTimeout(this.later);
    this.observer.disconnect();
    this.themeObserver.disconnect();
    this.media.removeEventListener('change', this.readPalette);
    this.base.remove();
    this.top.remove();
  }

  /** Tiles instead of outlines, from an address with {z}, {x} and {y}; null for the built-in outlines. */
  setTiles(url: string | null): void {
    this.tiles = url ? new TileLayer(url, () => this.invalidateBase()) : null;
    this.invalidateBase();
  }

  get attributionNeeded(): boolean {
    return this.tiles !== null;
  }

  setView(view: View): void {
    this.view = clampView(view, this.height);
    this.target = null;
    this.changed();
  }

  /** Shows `box`, gliding there unless that is far. */
  fitBox(box: Box, padding = 48, zoomMax = 15, glide = true): void {
    this.ready(() => {
      const pad = Math.min(padding, this.width / 5, this.height / 5);
      const next = clampView(fit(box, this.width, this.height, pad, zoomMax), this.height);
      if (glide && !this.stillMotion) this.glide(next);
      else this.setView(next);
    });
  }

  ready(run: () => void): void {
    if (this.sized) run();
    else this.whenSized.push(run);
  }

  zoomBy(step: number, px = this.width / 2, py = this.height / 2): void {
    this.touched = true;
    const from = this.target ?? this.view;
    this.glide(clampView(zoomAround(from, this.width, this.height, px, py, from.zoom + step), this.height));
  }

  panBy(dx: number, dy: number): void {
    this.touched = true;
    const scale = worldPx(this.view.zoom);
    this.setView({ ...this.view, x: this.view.x + dx / scale, y: this.view.y + dy / scale });
  }

  /** Something that is drawn on top has changed. */
  invalidate(): void {
    if (this.frame || this.destroyed) return;
    this.frame = requestAnimationFrame(this.draw);
  }

  /** A device was heard at this place: seen from afar, where its motion is too small to see, a ring tells that it lives. */
  ping(x: number, y: number): void {
    if (this.stillMotion || this.view.zoom > PING_ZOOM_MAX || this.pings.length >= PINGS_MAX || Number.isNaN(x)) return;
    this.pings.push({ x, y, at: performance.now() });
    this.invalidateSoon();
  }

  /** Values have changed: drawn soon, not at once. A fleet changes in every frame, and the eye needs no more than this. */
  invalidateSoon(): void {
    if (this.frame || this.later || this.destroyed) return;
    const wait = Math.max(0, this.motion_ms - (performance.now() - this.drawnAt));
    this.later = setTimeout(() => {
      this.later = undefined;
      this.invalidate();
    }, wait);
  }

  private invalidateBase(): void {
    this.cacheView = null;
    this.baseDirty = true;
    this.invalidate();
  }

  private changed(): void {
    this.baseDirty = true;
    this.handlers.moved?.(this.view);
    this.invalidate();
  }

  private glide(view: View): void {
    if (this.stillMotion) {
      this.setView(view);
      return;
    }
    this.target = view;
    this.invalidate();
  }

  private readonly readPalette = (): void => {
    const css = getComputedStyle(document.documentElement);
    const color = (name: string) => css.getPropertyValue(name).trim();
    this.palette = {
      water: color('--map-water'), land: color('--map-land'), coast: color('--map-coast'), border: color('--map-border'),
      grid: color('--map-grid'), name: color('--map-name'), halo: color('--map-halo'), group: color('--map-group'),
      track: color('--map-track'), ink: color('--ink'), panel: color('--panel'), ok: color('--ok-dot'), off: color('--off-dot'),
      warn: color('--warn-dot'), accent: color('--accent'),
    };
    this.sprites.clear();
    this.invalidateBase();
  };

  private resize(): void {
    const { width, height } = this.host.getBoundingClientRect();
    if (width < 1 || height < 1) return;
    this.width = width;
    this.height = height;
    this.dpr = Math.min(2, window.devicePixelRatio || 1);
    for (const canvas of [this.base, this.top]) {
      canvas.width = Math.round(width * this.dpr);
      canvas.height = Math.round(height * this.dpr);
    }
    this.sprites.clear();
    if (!this.sized) {
      this.sized = true;
      this.setView(this.view);
      for (const run of this.whenSized) run();
      this.whenSized = [];
    }
    this.invalidateBase();
  }

  private readonly draw = (now: number): void => {
    this.frame = 0;
    if (this.destroyed || !this.sized) return;
    const elapsed = Math.min(120, this.lastFrame ? now - this.lastFrame : 16);
    this.lastFrame = now;
    this.animateView(elapsed);
    if (this.baseDirty) this.drawBase(now);
    const unsettled = this.drawTop(elapsed);
    this.drawnAt = performance.now();
    if (this.target || this.velocity[0] || this.velocity[1] || this.baseDirty) {
      this.frame = requestAnimationFrame(this.draw);
    } else if (unsettled) {
      this.invalidateSoon();
    } else {
      this.lastFrame = 0;
    }
  };

  private animateView(elapsed: number): void {
    if (this.target) {
      const step = 1 - Math.exp(-elapsed / 70);
      const { target, view } = this;
      const zoom = view.zoom + (target.zoom - view.zoom) * step;
      // The middle follows so that a zoom around a point keeps that point where it is.
      const span = 1 / worldPx(view.zoom) - 1 / worldPx(target.zoom);
      const share = Math.abs(span) < 1e-15 ? step : (1 / worldPx(view.zoom) - 1 / worldPx(zoom)) / span;
      const toX = wrapNear(target.x, view.x);
      this.view = { x: view.x + (toX - view.x) * share, y: view.y + (target.y - view.y) * share, zoom };
      const near = Math.abs(target.zoom - zoom) < 0.002;
      const still = Math.abs(toX - this.view.x) * worldPx(zoom) < 0.5 && Math.abs(target.y - this.view.y) * worldPx(zoom) < 0.5;
      if (near && still) {
        this.view = target;
        this.target = null;
      }
      this.baseDirty = true;
      this.handlers.moved?.(this.view);
    } else if (!this.gesture && (this.velocity[0] || this.velocity[1])) {
      const [vx, vy] = this.velocity;
      const scale = worldPx(this.view.zoom);
      this.view = clampView({ ...this.view, x: this.view.x - (vx * elapsed) / scale, y: this.view.y - (vy * elapsed) / scale }, this.height);
      const slow = Math.exp(-elapsed / 160);
      this.velocity = Math.hypot(vx, vy) < 0.02 ? [0, 0] : [vx * slow, vy * slow];
      this.baseDirty = true;
      this.handlers.moved?.(this.view);
    }
  }

  // ---- base

  private drawBase(now: number): void {
    const ctx = this.base.getContext('2d', { alpha: false });
    if (!ctx) return;
    const moving = this.target !== null || this.gesture !== null || this.velocity[0] !== 0 || this.velocity[1] !== 0;
    const same = this.cacheView && this.cacheView.zoom === this.view.zoom && this.covers(this.cacheView);
    // While moving, the picture taken before is shifted and scaled; a new one is taken at most every 90 ms.
    if (!same && (!moving || !this.cacheView || now - this.cacheAt > 90)) this.renderCache(now);
    this.baseDirty = !same && moving;
    const from = this.cacheView ?? this.view;
    const ratio = 2 ** (this.view.zoom - from.zoom);
    const [px, py] = toScreen(this.view, this.width, this.height, from.x, from.y);
    ctx.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    ctx.fillStyle = this.palette.water;
    ctx.fillRect(0, 0, this.width, this.height);
    const w = (this.width + 2 * MARGIN_PX) * ratio;
    const h = (this.height + 2 * MARGIN_PX) * ratio;
    ctx.drawImage(this.cache, px - w / 2, py - h / 2, w, h);
    this.drawScale(ctx);
  }

  private covers(from: View): boolean {
    const scale = worldPx(this.view.zoom);
    const dx = Math.abs(wrapNear(from.x, this.view.x) - this.view.x) * scale;
    return dx <= MARGIN_PX && Math.abs(from.y - this.view.y) * scale <= MARGIN_PX;
  }

  private renderCache(now: number): void {
    const { cache, view, dpr, palette } = this;
    const width = this.width + 2 * MARGIN_PX;
    const height = this.height + 2 * MARGIN_PX;
    if (cache.width !== Math.round(width * dpr) || cache.height !== Math.round(height * dpr)) {
      cache.width = Math.round(width * dpr);
      cache.height = Math.round(height * dpr);
    }
    const ctx = cache.getContext('2d', { alpha: false });
    if (!ctx) return;
    this.cacheView = { ...view };
    this.cacheAt = now;
    ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
    ctx.fillStyle = palette.water;
    ctx.fillRect(0, 0, width, height);
    if (this.tiles) {
      this.tiles.draw(ctx, view, width, height);
      return;
    }
    if (view.zoom > 4 && !this.fine) {
      void outline('fine').then((loaded) => {
        const first = !this.fine;
        this.fine = loaded;
        if (first) this.invalidateBase();
      });
    }
    const shapes = view.zoom > 4 && this.fine ? this.fine : this.coarse;
    const scale = worldPx(view.zoom);
    drawGrid(ctx, this.palette, view, width, height);
    if (!shapes) return;
    const seen: Box = {
      x0: view.x - width / 2 / scale, x1: view.x + width / 2 / scale, y0: view.y - height / 2 / scale, y1: view.y + height / 2 / scale,
    };
    // Shapes on the date line reach into the world beside: one more on each side, of which only those are drawn.
    for (let world = Math.floor(seen.x0) - 1; world <= Math.floor(seen.x1) + 1; world++) {
      const k = scale / UNIT;
      ctx.setTransform(dpr * k, 0, 0, dpr * k, dpr * (width / 2 + (world - view.x) * scale), dpr * (height / 2 - view.y * scale));
      const inSight = ({ box }: Shape) =>
        box.x1 + world >= seen.x0 && box.x0 + world <= seen.x1 && box.y1 >= seen.y0 && box.y0 <= seen.y1;
      const land = shapes.land.filter(inSight);
      ctx.fillStyle = palette.land;
      for (const { path } of land) ctx.fill(path);
      const lakes = shapes.lakes.filter(inSight);
      ctx.fillStyle = palette.water;
      for (const { path } of lakes) ctx.fill(path);
      ctx.lineJoin = 'round';
      ctx.lineWidth = 1 / k;
      ctx.strokeStyle = palette.border;
      for (const border of shapes.borders) if (inSight(border)) ctx.stroke(border.path);
      ctx.lineWidth = 1.1 / k;
      ctx.strokeStyle = palette.coast;
      for (const { path } of land) ctx.stroke(path);
      for (const { path } of lakes) ctx.stroke(path);
    }
    ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
    if (view.zoom > 6) drawGrid(ctx, this.palette, view, width, height);
    drawNames(ctx, this.palette, shapes, view, width, height);
  }

  private drawScale(ctx: CanvasRenderingContext2D): void {
    if (!this.interactive) return;
    const bar = scaleBar(metresPerPx(latitudeOf(this.view.y), this.view.zoom), 90);
    const text = bar.metres >= 1000 ? `${bar.metres / 1000} km` : `${bar.metres} m`;
    const x = 12;
    const y = this.height - 12;
    ctx.strokeStyle = this.palette.name;
    ctx.fillStyle = this.palette.name;
    ctx.lineWidth = 1.5;
    ctx.beginPath();
    ctx.moveTo(x, y - 5);
    ctx.lineTo(x, y);
    ctx.lineTo(x + bar.px, y);
    ctx.lineTo(x + bar.px, y - 5);
    ctx.stroke();
    ctx.font = '11px ui-sans-serif, system-ui, sans-serif';
    ctx.textAlign = 'left';
    ctx.textBaseline = 'alphabetic';
    ctx.fillText(text, x + 4, y - 5);
    // Zoomed in, outlines alone say little: where the middle lies, from the nearest city.
    const near = !this.tiles && this.view.zoom > 7.5 ? nearestCity(this.view) : '';
    if (near) ctx.fillText(near, x + bar.px + 14, y);
  }

  // ---- top

  private drawTop(elapsed: number): boolean {
    const ctx = this.top.getContext('2d');
    if (!ctx) return false;
    ctx.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    ctx.clearRect(0, 0, this.width, this.height);
    if (this.track) this.drawTrack(ctx, this.track);
    const pinging = this.drawPings(ctx);
    const unsettled = this.markers ? this.drawMarkers(ctx, this.markers, elapsed) : false;
    return pinging || unsettled;
  }

  private drawPings(ctx: CanvasRenderingContext2D): boolean {
    if (this.pings.length === 0) return false;
    const now = performance.now();
    this.pings = this.pings.filter((ping) => now - ping.at < PING_MS);
    ctx.lineWidth = 1.5;
    ctx.strokeStyle = this.palette.ok;
    for (const ping of this.pings) {
      const age = (now - ping.at) / PING_MS;
      const [px, py] = toScreen(this.view, this.width, this.height, ping.x, ping.y);
      ctx.globalAlpha = 0.8 * (1 - age);
      ctx.beginPath();
      ctx.arc(px, py, 6 + 26 * age, 0, 2 * Math.PI);
      ctx.stroke();
    }
    ctx.globalAlpha = 1;
    return this.pings.length > 0;
  }

  private drawTrack(ctx: CanvasRenderingContext2D, track: Track): void {
    const count = track.xs.length;
    if (count === 0) return;
    const scale = worldPx(this.view.zoom);
    const sx = (i: number) => (wrapNear(track.xs[i]!, this.view.x) - this.view.x) * scale + this.width / 2;
    const sy = (i: number) => (track.ys[i]! - this.view.y) * scale + this.height / 2;
    ctx.lineJoin = 'round';
    ctx.lineCap = 'round';
    const line = (from: number, to: number) => {
      ctx.beginPath();
      let [px, py] = [sx(from), sy(from)];
      ctx.moveTo(px, py);
      for (let i = from + 1; i <= to; i++) {
        const [x, y] = [sx(i), sy(i)];
        // Points closer than a pixel add nothing that can be seen.
        if (i < to && Math.abs(x - px) + Math.abs(y - py) < 1) continue;
        ctx.lineTo(x, y);
        [px, py] = [x, y];
      }
      ctx.stroke();
    };
    ctx.strokeStyle = this.palette.halo;
    ctx.lineWidth = 6;
    line(0, count - 1);
    ctx.strokeStyle = this.palette.track;
    ctx.lineWidth = 3;
    ctx.globalAlpha = 0.35;
    if (track.at < count - 1) line(track.at, count - 1);
    ctx.globalAlpha = 1;
    if (track.at > 0) line(0, track.at);
    const end = (i: number, color: string) => {
      ctx.beginPath();
      ctx.arc(sx(i), sy(i), 5, 0, 2 * Math.PI);
      ctx.fillStyle = color;
      ctx.fill();
      ctx.lineWidth = 2;
      ctx.strokeStyle = this.palette.panel;
      ctx.stroke();
    };
    end(0, this.palette.ok);
    end(count - 1, this.palette.off);
    const sprite = this.sprite(Look.Selected, track.heading);
    ctx.drawImage(sprite, sx(track.at) - SPRITE_PX / 2, sy(track.at) - SPRITE_PX / 2, SPRITE_PX, SPRITE_PX);
  }

  private drawMarkers(ctx: CanvasRenderingContext2D, markers: Markers, elapsed: number): boolean {
    const { points } = markers;
    if (this.shownX.length < points.count) {
      const room = Math.max(1024, points.count * 2);
      this.shownX = grow(this.shownX, room);
      this.shownY = grow(this.shownY, room);
      const at = new Int32Array(room);
      at.set(this.shownAt);
      this.shownAt = at;
    }
    const clusters = this.clusterer.run(points, this.view, this.width, this.height, 72, markers.selected);
    this.clusters = clusters;
    const scale = worldPx(this.view.zoom);
    const ease = this.stillMotion ? 1 : 1 - Math.exp(-elapsed / 220);
    const before = this.frameNumber++;
    const half = SPRITE_PX / 2;
    let unsettled = false;
    let labels: number[] | null = null;
    if (this.view.zoom >= 11 && clusters.singleCount <= 160) labels = [];
    for (let n = 0; n < clusters.singleCount; n++) {
      const i = clusters.singles[n]!;
      const x = points.xs[i]!;
      const y = points.ys[i]!;
      // A marker that was in sight glides to where it is now; one that comes into sight, or jumps far, is there at once.
      if (this.shownAt[i] !== before || Math.abs(x - this.shownX[i]!) * scale > 300) {
        this.shownX[i] = x;
        this.shownY[i] = y;
      } else {
        this.shownX[i]! += (x - this.shownX[i]!) * ease;
        this.shownY[i]! += (y - this.shownY[i]!) * ease;
        if (Math.abs(x - this.shownX[i]!) * scale > 0.3 || Math.abs(y - this.shownY[i]!) * scale > 0.3) unsettled = true;
      }
      this.shownAt[i] = this.frameNumber;
      if (i === markers.selected) continue;
      const px = (wrapNear(this.shownX[i]!, this.view.x) - this.view.x) * scale + this.width / 2;
      const py = (this.shownY[i]! - this.view.y) * scale + this.height / 2;
      ctx.drawImage(this.sprite(markers.look(i), markers.heading(i)), px - half, py - half, SPRITE_PX, SPRITE_PX);
      labels?.push(i);
    }
    ctx.textAlign = 'center';
    ctx.textBaseline = 'middle';
    ctx.font = '600 11px ui-sans-serif, system-ui, sans-serif';
    for (let g = 0; g < clusters.groupCount; g++) {
      const size = clusters.groupSize[g]!;
      const radius = radiusOf(size);
      const [x, y] = [clusters.groupX[g]!, clusters.groupY[g]!];
      ctx.beginPath();
      ctx.arc(x, y, radius + 3, 0, 2 * Math.PI);
      ctx.fillStyle = this.palette.group;
      ctx.globalAlpha = 0.25;
      ctx.fill();
      ctx.globalAlpha = 1;
      ctx.beginPath();
      ctx.arc(x, y, radius, 0, 2 * Math.PI);
      ctx.fill();
      ctx.fillStyle = '#fff';
      ctx.fillText(size < 1000 ? String(size) : `${(size / 1000).toFixed(size < 10_000 ? 1 : 0)}k`, x, y + 0.5);
    }
    if (labels) this.drawLabels(ctx, markers, labels, scale);
    const chosen = markers.selected;
    if (chosen >= 0 && this.shownAt[chosen] === this.frameNumber) {
      const px = (wrapNear(this.shownX[chosen]!, this.view.x) - this.view.x) * scale + this.width / 2;
      const py = (this.shownY[chosen]! - this.view.y) * scale + this.height / 2;
      ctx.beginPath();
      ctx.arc(px, py, 16, 0, 2 * Math.PI);
      ctx.strokeStyle = this.palette.accent;
      ctx.lineWidth = 2;
      ctx.stroke();
      ctx.drawImage(this.sprite(markers.look(chosen), markers.heading(chosen)), px - half, py - half, SPRITE_PX, SPRITE_PX);
      this.drawLabels(ctx, markers, [chosen], scale);
    }
    return unsettled;
  }

  private drawLabels(ctx: CanvasRenderingContext2D, markers: Markers, indices: number[], scale: number): void {
    ctx.font = '11px ui-sans-serif, system-ui, sans-serif';
    ctx.textAlign = 'left';
    ctx.textBaseline = 'middle';
    ctx.lineJoin = 'round';
    ctx.lineWidth = 3;
    ctx.strokeStyle = this.palette.halo;
    ctx.fillStyle = this.palette.ink;
    // A name is left out where it would cover another.
    const cells = new Set<number>();
    for (const i of indices) {
      const px = (wrapNear(this.shownX[i]!, this.view.x) - this.view.x) * scale + this.width / 2;
      const py = (this.shownY[i]! - this.view.y) * scale + this.height / 2;
      const text = markers.label(i);
      const span = Math.ceil((text.length * 6.4 + 10) / 24);
      const row = Math.round(py / 14) * 4096;
      const from = Math.floor((px + 10) / 24);
      let free = true;
      for (let k = 0; k <= span && free; k++) free = !cells.has(row + from + k);
      if (!free) continue;
      for (let k = 0; k <= span; k++) cells.add(row + from + k).add(row - 4096 + from + k).add(row + 4096 + from + k);
      ctx.strokeText(text, px + 13, py);
      ctx.fillText(text, px + 13, py);
    }
  }

  /** A marker drawn once per look and direction. */
  private sprite(look: Look, heading: number): HTMLCanvasElement {
    const turned = heading >= 0 && look !== Look.Offline && look !== Look.Standing;
    const turn = turned ? Math.round((heading / 360) * HEADINGS) % HEADINGS : HEADINGS;
    const key = look * (HEADINGS + 1) + turn;
    let canvas = this.sprites.get(key);
    if (canvas) return canvas;
    canvas = document.createElement('canvas');
    canvas.width = canvas.height = Math.round(SPRITE_PX * this.dpr);
    const ctx = canvas.getContext('2d');
    if (ctx) {
      ctx.scale(this.dpr, this.dpr);
      ctx.translate(SPRITE_PX / 2, SPRITE_PX / 2);
      const { palette } = this;
      ctx.lineJoin = 'round';
      ctx.strokeStyle = palette.panel;
      ctx.lineWidth = 2;
      ctx.fillStyle = look === Look.Offline ? palette.off : look === Look.Selected ? palette.accent : palette.ok;
      ctx.beginPath();
      if (turned) {
        ctx.rotate((turn / HEADINGS) * 2 * Math.PI);
        ctx.moveTo(0, -9);
        ctx.lineTo(6.5, 7.5);
        ctx.lineTo(0, 4);
        ctx.lineTo(-6.5, 7.5);
        ctx.closePath();
      } else {
        ctx.arc(0, 0, look === Look.Offline ? 4.5 : 5.5, 0, 2 * Math.PI);
      }
      ctx.stroke();
      ctx.fill();
    }
    this.sprites.set(key, canvas);
    return canvas;
  }

  // ---- pointing

  private hit(px: number, py: number): { single: number } | { group: number } | null {
    const { clusters, markers } = this;
    if (!clusters || !markers) return null;
    const scale = worldPx(this.view.zoom);
    let best = -1;
    let bestDistance = 14 * 14;
    for (let n = 0; n < clusters.singleCount; n++) {
      const i = clusters.singles[n]!;
      const x = (wrapNear(this.shownX[i]!, this.view.x) - this.view.x) * scale + this.width / 2;
      const y = (this.shownY[i]! - this.view.y) * scale + this.height / 2;
      const d = (x - px) ** 2 + (y - py) ** 2;
      if (d < bestDistance) {
        bestDistance = d;
        best = i;
      }
    }
    if (best >= 0) return { single: best };
    for (let g = 0; g < clusters.groupCount; g++) {
      const radius = radiusOf(clusters.groupSize[g]!) + 2;
      if ((clusters.groupX[g]! - px) ** 2 + (clusters.groupY[g]! - py) ** 2 <= radius * radius) return { group: g };
    }
    return null;
  }

  private click(px: number, py: number): void {
    const hit = this.hit(px, py);
    if (!hit) return;
    if ('single' in hit) {
      this.handlers.pick?.(hit.single);
      return;
    }
    const box = this.clusters?.groupBox.subarray(4 * hit.group, 4 * hit.group + 4);
    if (!box) return;
    const view = fit({ x0: box[0]!, y0: box[1]!, x1: box[2]!, y1: box[3]! }, this.width, this.height, 80, 17);
    this.glide(clampView({ ...view, zoom: Math.max(view.zoom, this.view.zoom + 1) }, this.height));
  }

  private listen(): void {
    const { host } = this;
    const at = (event: MouseEvent): { x: number; y: number } => {
      const box = host.getBoundingClientRect();
      return { x: event.clientX - box.left, y: event.clientY - box.top };
    };
    host.style.touchAction = 'none';
    host.style.cursor = 'grab';
    this.top.addEventListener('pointerdown', (event) => {
      if (event.button !== 0) return;
      this.top.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, at(event));
      this.target = null;
      this.velocity = [0, 0];
      this.begin(event.timeStamp);
    });
    this.top.addEventListener('pointermove', (event) => {
      const point = at(event);
      if (!this.pointers.has(event.pointerId)) {
        if (event.pointerType === 'mouse') this.hoverAt(point.x, point.y);
        return;
      }
      this.pointers.set(event.pointerId, point);
      this.drag(event.timeStamp);
    });
    const up = (event: PointerEvent) => {
      if (!this.pointers.delete(event.pointerId)) return;
      const { gesture } = this;
      if (this.pointers.size > 0) {
        this.begin(event.timeStamp, true);
        return;
      }
      this.gesture = null;
      host.style.cursor = 'grab';
      if (gesture && !gesture.moved && event.type === 'pointerup') {
        const point = at(event);
        this.click(point.x, point.y);
      }
      if (event.timeStamp - (gesture?.at ?? 0) > 60 || this.stillMotion) this.velocity = [0, 0];
      this.baseDirty = true;
      this.invalidate();
    };
    this.top.addEventListener('pointerup', up);
    this.top.addEventListener('pointercancel', up);
    this.top.addEventListener('pointerleave', () => this.hoverAt(-1, -1));
    this.top.addEventListener('dblclick', (event) => {
      const point = at(event);
      if (!this.hit(point.x, point.y)) this.zoomBy(1, point.x, point.y);
    });
    this.top.addEventListener(
      'wheel',
      (event) => {
        event.preventDefault();
        const point = at(event);
        const lines = event.deltaMode === 1 ? 16 : 1;
        const step = Math.max(-1, Math.min(1, (-event.deltaY * lines) / (event.ctrlKey ? 60 : 260)));
        this.zoomBy(step, point.x, point.y);
      },
      { passive: false },
    );
    host.addEventListener('keydown', (event) => {
      const pan: Record<string, [number, number]> = { ArrowLeft: [-80, 0], ArrowRight: [80, 0], ArrowUp: [0, -80], ArrowDown: [0, 80] };
      const step = pan[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey || event.target !== host) return;
      if (step) this.panBy(...step);
      else if (event.key === '+' || event.key === '=') this.zoomBy(1);
      else if (event.key === '-') this.zoomBy(-1);
      else return;
      event.preventDefault();
    });
  }

  private begin(time: number, moved = false): void {
    const points = [...this.pointers.values()];
    const [a, b] = points;
    if (!a) return;
    const x = b ? (a.x + b.x) / 2 : a.x;
    const y = b ? (a.y + b.y) / 2 : a.y;
    this.gesture = { x, y, distance: b ? Math.hypot(a.x - b.x, a.y - b.y) : 0, moved, at: time };
  }

  private drag(time: number): void {
    const { gesture } = this;
    const [a, b] = [...this.pointers.values()];
    if (!gesture || !a) return;
    const x = b ? (a.x + b.x) / 2 : a.x;
    const y = b ? (a.y + b.y) / 2 : a.y;
    const [dx, dy] = [x - gesture.x, y - gesture.y];
    if (!gesture.moved && Math.hypot(dx, dy) < 4 && !b) return;
    if (!gesture.moved) this.host.style.cursor = 'grabbing';
    const scale = worldPx(this.view.zoom);
    let view: View = { ...this.view, x: this.view.x - dx / scale, y: this.view.y - dy / scale };
    const distance = b ? Math.hypot(a.x - b.x, a.y - b.y) : 0;
    if (b && gesture.distance > 0 && distance > 0) {
      view = zoomAround(view, this.width, this.height, x, y, view.zoom + Math.log2(distance / gesture.distance));
    }
    this.touched = true;
    const span = Math.max(1, time - gesture.at);
    this.velocity = b ? [0, 0] : [0.6 * (dx / span) + 0.4 * this.velocity[0], 0.6 * (dy / span) + 0.4 * this.velocity[1]];
    this.gesture = { x, y, distance, moved: true, at: time };
    this.view = clampView(view, this.height);
    this.changed();
  }

  private hoverAt(px: number, py: number): void {
    const hit = px < 0 ? null : this.hit(px, py);
    this.host.style.cursor = hit ? 'pointer' : 'grab';
    const single = hit && 'single' in hit ? hit.single : -1;
    if (single !== this.hovered || single >= 0) {
      this.hovered = single;
      this.handlers.hover?.(single, px, py);
    }
  }

  /** World coordinates of a point of the screen. */
  worldAt(px: number, py: number): [number, number] {
    return toWorld(this.view, this.width, this.height, px, py);
  }
}

function grow(from: Float64Array, room: number): Float64Array<ArrayBuffer> {
  const to = new Float64Array(room);
  to.set(from);
  return to;
}
