// Writes the licences of what the built files contain to `licenses.txt`, as those licences ask.
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const MODULES = fileURLToPath(new URL('../node_modules/', import.meta.url));

/** Packages whose data is in the bundle without being imported. */
const DATA = ['world-atlas'];

function text(name) {
  const folder = `${MODULES}${name}/`;
  const about = JSON.parse(readFileSync(`${folder}package.json`, 'utf8'));
  const file = readdirSync(folder).find((f) => /^licen[cs]e/i.test(f));
  const body = file ? readFileSync(folder + file, 'utf8').trim() : `Licence: ${about.license}`;
  return `${name} ${about.version} (${about.license})\n\n${body}\n`;
}

/** Vite plugin: `licenses.txt` for every package that has code in the bundle. */
export function licenses() {
  return {
    name: 'fieldline-licenses',
    apply: 'build',
    generateBundle(_options, bundle) {
      const names = new Set(DATA);
      for (const file of Object.values(bundle)) {
        for (const id of Object.keys(file.modules ?? {})) {
          const found = /node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(id);
          if (found && existsSync(`${MODULES}${found[1]}/package.json`)) names.add(found[1]);
        }
      }
      const source = [...names].sort().map(text).join(`\n${'-'.repeat(72)}\n\n`);
      this.emitFile({ type: 'asset', fileName: 'licenses.txt', source });
    },
  };
}
