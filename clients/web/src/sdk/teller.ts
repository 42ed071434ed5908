//! Events on their way to whoever listens: one after another, in their order, each when all listeners are done with the one before.
//!
//! Bounded: of live events only the newest about a peer waits, and of the connection's one after the other only how it stands; messages are bounded by
//! the receive maximum, the others by what the program did.

import type { ChatEvent, Listener } from './api.js';

interface Waiting {
  event: ChatEvent;
  told: ((taken: boolean) => void) | undefined;
}

export class Teller {
  #listeners = new Set<{ listener: Listener }>();
  #waiting: Waiting[] = [];
  #live = new Map<string, Waiting>();
  #telling = false;

  listen(listener: Listener): () => void {
    const place = { listener };
    this.#listeners.add(place);
    this.#begin();
    return () => void this.#listeners.delete(place);
  }

  /** `told` hears whether every listener took it. */
  tell(event: ChatEvent, told?: (taken: boolean) => void): void {
    const about = aboutWhat(event);
    const earlier = about === undefined ? this.#stateBefore(event) : this.#live.get(about);
    if (earlier) {
      earlier.event = event;
      return;
    }
    const waiting = { event, told };
    if (about !== undefined) this.#live.set(about, waiting);
    this.#waiting.push(waiting);
    this.#begin();
  }

  #begin(): void {
    if (this.#telling) return;
    this.#telling = true;
    queueMicrotask(() => void this.#run());
  }

  async #run(): Promise<void> {
    for (let next = this.#next(); next; next = this.#next()) {
      const { event, told } = next;
      const outcomes = await Promise.allSettled([...this.#listeners].map(async ({ listener }) => listener(event)));
      const failed = outcomes.filter((outcome) => outcome.status === 'rejected');
      for (const { reason } of failed) console.error('a listener failed:', reason);
      told?.(failed.length === 0);
    }
    this.#telling = false;
  }

  #stateBefore(event: ChatEvent): Waiting | undefined {
    const last = this.#waiting.at(-1);
    return event.type === 'connection' && last?.event.type === 'connection' ? last : undefined;
  }

  #next(): Waiting | undefined {
    if (this.#listeners.size === 0) return undefined;
    const next = this.#waiting.shift();
    const about = next && aboutWhat(next.event);
    if (about !== undefined) this.#live.delete(about);
    return next;
  }
}

/** Of events with the same name only the newest counts. */
function aboutWhat(event: ChatEvent): string | undefined {
  switch (event.type) {
    case 'receipt':
    case 'read':
      return `${event.type} ${event.with}`;
    case 'typing':
      return `typing ${event.from}`;
    case 'presence':
      return `presence ${event.user}`;
    default:
      return undefined;
  }
}
