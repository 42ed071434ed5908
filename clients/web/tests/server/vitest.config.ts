//! Tests against a real chatd: CHATD_BIN=…/chatd npm run test:server

import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vitest/config';

export default defineConfig({
  root: fileURLToPath(new URL('../..', import.meta.url)),
  test: { include: ['tests/server/*.test.ts'], testTimeout: 60_000, hookTimeout: 30_000 },
});
