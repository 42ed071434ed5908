//! The SDK as the session takes it; loaded after the first paint.

import * as chat from '../sdk/index';
import type { Sdk } from './session';

export const sdk: Sdk = {
  start: chat.start,
  // Where the browser keeps nothing, what waits is lost with the page.
  openOutbox: async (user) => ('indexedDB' in globalThis ? chat.indexedDbOutbox({ name: `outbox-${user}` }) : chat.memoryOutbox()),
};
