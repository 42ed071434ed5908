//! The SDK as the session takes it; loaded after the first paint.

import * as chat from '../sdk/index';
import type { Sdk } from './session';

export const sdk: Sdk = { start: chat.start, openOutbox: async (user) => chat.indexedDbOutbox({ name: `outbox-${user}` }) };
