//! The SDK as the session takes it; loaded after the first paint.

import * as chat from '../sdk/index';
import type { Outbox } from '../sdk/api';
import type { Sdk } from './session';

export const sdk: Sdk = {
  start: chat.start,
  openOutbox: async (user) => {
    try {
      return await loaded(chat.indexedDbOutbox({ name: `outbox-${user}` }));
    } catch {
      // Where the browser keeps nothing (there are settings for that), what waits is lost with the page.
      return chat.memoryOutbox();
    }
  },
};

/** The outbox, if it can be read. */
async function loaded(outbox: Outbox): Promise<Outbox> {
  const waiting = await outbox.load();
  outbox.load = async () => waiting;
  return outbox;
}
