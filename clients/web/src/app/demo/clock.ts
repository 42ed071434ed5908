//! Time for tests: it goes on when it is told to.

import type { Clock } from '../../sdk/api';

export class TestClock implements Clock {
  #now = Date.UTC(2026, 10, 26, 12);
  #timers: { at: number; call: () => void }[] = [];

  now(): number {
    return this.#now;
  }

  after(ms: number, call: () => void): () => void {
    const timer = { at: this.#now + ms, call };
    this.#timers.push(timer);
    return () => {
      this.#timers = this.#timers.filter((one) => one !== timer);
    };
  }

  random(): number {
    return 0.5;
  }

  /** Lets time pass, and what it brings happen. */
  async pass(ms: number): Promise<void> {
    const until = this.#now + ms;
    for (;;) {
      await settle();
      const next = this.#timers.filter(({ at }) => at <= until).sort((a, b) => a.at - b.at)[0];
      if (!next) break;
      this.#timers = this.#timers.filter((one) => one !== next);
      this.#now = Math.max(this.#now, next.at);
      next.call();
    }
    this.#now = until;
    await settle();
  }
}

/** Until nothing is to be done any more but to wait for the clock. IndexedDB answers in its own time. */
export async function settle(): Promise<void> {
  for (let turn = 0; turn < 25; turn += 1) await new Promise<void>((resolve) => setImmediate(resolve));
}

/** Waits until it is so. */
export async function eventually(is: () => boolean, what = 'it'): Promise<void> {
  for (let turn = 0; turn < 400; turn += 1) {
    if (is()) return;
    await settle();
  }
  throw new Error(`waited in vain until ${what} is so`);
}
