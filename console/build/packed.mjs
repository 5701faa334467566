// Puts a gzip copy beside each asset, which the server sends to browsers that take it.
import { gzipSync } from 'node:zlib';

const BYTES_MIN = 1024;

/** Vite plugin: `NAME.gz` for every asset worth packing. */
export function packed() {
  return {
    name: 'fieldline-packed',
    apply: 'build',
    generateBundle: {
      order: 'post',
      handler(_options, bundle) {
        for (const [fileName, file] of Object.entries(bundle)) {
          if (!/\.(js|css|bin|svg)$/.test(fileName)) continue;
          const source = Buffer.from(file.type === 'chunk' ? file.code : file.source);
          if (source.length < BYTES_MIN) continue;
          const small = gzipSync(source, { level: 9 });
          if (small.length < source.length * 0.9) this.emitFile({ type: 'asset', fileName: `${fileName}.gz`, source: small });
        }
      },
    },
  };
}
