// Raster tiles from an address that the account's settings name. Nothing is asked for unless someone set it.
import { type View, worldPx } from './mercator';

const KEPT_MAX = 256;

export class TileLayer {
  private readonly images = new Map<string, HTMLImageElement>();

  constructor(
    private readonly url: string,
    private readonly loaded: () => void,
  ) {}

  draw(ctx: CanvasRenderingContext2D, view: View, width: number, height: number): void {
    const zoom = Math.max(0, Math.min(19, Math.round(view.zoom)));
    const count = 2 ** zoom;
    const size = worldPx(view.zoom) / count;
    const left = view.x * count - width / 2 / size;
    const top = view.y * count - height / 2 / size;
    for (let y = Math.max(0, Math.floor(top)); y <= Math.min(count - 1, Math.floor(top + height / size)); y++) {
      for (let x = Math.floor(left); x <= Math.floor(left + width / size); x++) {
        const image = this.image(zoom, ((x % count) + count) % count, y);
        // Half a pixel more hides the seams of fractional zooms.
        if (image) ctx.drawImage(image, (x - left) * size, (y - top) * size, size + 0.5, size + 0.5);
      }
    }
  }

  private image(zoom: number, x: number, y: number): HTMLImageElement | null {
    const address = this.url.replace('{z}', String(zoom)).replace('{x}', String(x)).replace('{y}', String(y));
    let image = this.images.get(address);
    if (image) {
      // Moves to the end: the least recently used is dropped first.
      this.images.delete(address);
    } else {
      image = new Image();
      image.referrerPolicy = 'no-referrer';
      image.onload = this.loaded;
      image.src = address;
    }
    this.images.set(address, image);
    if (this.images.size > KEPT_MAX) {
      const oldest = this.images.keys().next().value;
      if (oldest !== undefined) this.images.delete(oldest);
    }
    return image.complete && image.naturalWidth > 0 ? image : null;
  }
}
