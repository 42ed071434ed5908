import { defineConfig } from 'vitest/config';

export default defineConfig({
  esbuild: { jsx: 'automatic', jsxImportSource: 'preact' },
  test: { exclude: ['node_modules', 'tests'], include: ['**/*.test.{ts,tsx}'] },
});
