//! The system's clock and dice. The only place where the SDK looks at them.

import type { Clock } from './api.js';

export const systemClock: Clock = {
  now: () => Date.now(),
  after(ms, call) {
    // Beyond 24 days browsers wait not at all.
    const timer = setTimeout(call, Math.min(ms, 0x7fff_ffff));
    return () => clearTimeout(timer);
  },
  random: () => Math.random(),
};
