//! An outbox that forgets everything when the program ends.

import type { Outbox } from './api.js';

export function memoryOutbox(): Outbox {
  return {
    load: async () => [],
    add: async () => {},
    remove: async () => {},
  };
}
