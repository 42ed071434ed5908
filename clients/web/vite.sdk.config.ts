//! The SDK as others use it: one ES module, with mqtt.js left outside and loaded when it is needed. The web chat has vite.config.ts.

import { defineConfig } from 'vite';

export default defineConfig({
  publicDir: false,
  build: {
    outDir: 'dist-sdk',
    target: 'es2022',
    minify: false,
    lib: { entry: 'src/sdk/index.ts', formats: ['es'], fileName: 'index' },
    rollupOptions: { external: ['mqtt'] },
  },
});
