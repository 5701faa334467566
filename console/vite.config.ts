import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vite';

import { licenses } from './build/licenses.mjs';
import { outline } from './build/outline.mjs';
import { packed } from './build/packed.mjs';

// Where `npm run dev` finds a server: a real one, or `npm run dev:fake`.
const server = process.env.FIELDLINE_URL ?? 'http://127.0.0.1:8090';

export default defineConfig({
  plugins: [outline(), svelte(), licenses(), packed()],
  build: {
    target: 'es2022',
    // Everything is served by the same program: no inlined assets, so that the content policy stays strict.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 400,
  },
  server: { proxy: { '/api': { target: server, ws: true } } },
});
