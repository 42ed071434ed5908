import { createHash } from 'node:crypto';
import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { gzipSync } from 'node:zlib';

import { defineConfig, type Plugin } from 'vite';

/** What the server sends with the pages: they have to work under it. */
const CSP =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; manifest-src 'self'; " +
  "worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'";

/** A chatd for `npm run dev` and `npm run preview`. */
const proxy = { '/mqtt': { target: process.env['CHATD'] ?? 'http://127.0.0.1:8080', ws: true } };

/** Puts the names of all files, and a version made of them, into the service worker. */
function serviceWorker(): Plugin {
  return {
    name: 'service-worker',
    apply: 'build',
    enforce: 'post',
    generateBundle(_options, bundle) {
      const built = Object.keys(bundle).filter((name) => name.startsWith('assets/') && !name.endsWith('.map'));
      const kept = readdirSync('public').map((name) => ({ name, hash: createHash('sha256').update(readFileSync(`public/${name}`)).digest('hex') }));
      const files = ['/', ...[...built, ...kept.map(({ name }) => name)].sort().map((name) => `/${name}`)];
      const pages = ['index.html', 'embed.html'].map((name) => String((bundle[name] as { source?: unknown } | undefined)?.source));
      const version = createHash('sha256').update(JSON.stringify([files, kept, pages])).digest('hex').slice(0, 16);
      const source = readFileSync('src/app/sw.js', 'utf8').replace('__VERSION__', version).replace("['__FILES__']", JSON.stringify(files));
      this.emitFile({ type: 'asset', fileName: 'sw.js', source });
    },
  };
}

/** Puts the compressed form of each file beside it, for chatd to serve. */
function compressed(): Plugin {
  return {
    name: 'compressed',
    apply: 'build',
    enforce: 'post',
    closeBundle() {
      for (const file of readdirSync('dist', { recursive: true, withFileTypes: true })) {
        if (!file.isFile() || file.name.endsWith('.gz')) continue;
        const path = join(file.parentPath, file.name);
        writeFileSync(`${path}.gz`, gzipSync(readFileSync(path), { level: 9 }));
      }
    },
  };
}

export default defineConfig({
  appType: 'mpa',
  esbuild: { jsx: 'automatic', jsxImportSource: 'preact', legalComments: 'none' },
  plugins: [serviceWorker(), compressed()],
  server: { proxy },
  preview: { proxy, headers: { 'Content-Security-Policy': CSP, 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer' } },
  build: {
    target: 'es2022',
    // A twelfth smaller than with esbuild, mostly mqtt.js.
    minify: 'terser',
    terserOptions: { ecma: 2020, module: true, compress: { passes: 3, pure_getters: true } },
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    rollupOptions: { input: ['index.html', 'embed.html'] },
  },
});
