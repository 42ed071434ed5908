//! What waits to be stored on the server: in which order it is published, how much at once, and what is tried again.
//!
//! Pure: time comes in. Invariants: a conversation's messages are stored in the order in which they were queued, so one is published when the one before it is
//! answered: of several on their way the server could be too busy for the first and take the second. None is forgotten before the server has stored or
//! refused it, or the program discards it; none is published twice on one connection, but after a pause.

import type { Unsent } from './api.js';
import { type Answer, isPassing } from './transport.js';

/** Conversations of which a message is on its way. */
export const WINDOW = 16;
/** How long nothing is published after the server could not answer, at first and at most. */
export const PAUSE_MIN_MS = 500;
const PAUSE_MAX_MS = 30_000;
/** Of the rate that the server names; the rest is for requests, and for what else a program does. */
const RATE_SHARE = 0.8;
/** As a second is the server's own measure, half of one leaves room for what other devices do. */
const BURST_MS = 500;

export class Sending {
  /** In the order in which they were queued. */
  #waiting: Unsent[] = [];
  /** How many of them are for whom. */
  #peers = new Map<string, number>();
  /** Published and not answered: whose message of which id. */
  #flying = new Map<string, string>();
  #pausedUntil: number | undefined;
  #pauseMs: number | undefined;
  #pace: Pace | undefined;

  get waiting(): readonly Unsent[] {
    return this.#waiting;
  }

  push(unsent: Unsent): void {
    this.#waiting.push(unsent);
    this.#peers.set(unsent.to, (this.#peers.get(unsent.to) ?? 0) + 1);
  }

  has(id: string): boolean {
    return this.#waiting.some((unsent) => unsent.id === id);
  }

  /** Takes it out, wherever it is. */
  take(id: string): Unsent | undefined {
    const at = this.#waiting.findIndex((unsent) => unsent.id === id);
    const [unsent] = at < 0 ? [] : this.#waiting.splice(at, 1);
    if (!unsent) return undefined;
    const left = (this.#peers.get(unsent.to) ?? 1) - 1;
    if (left > 0) this.#peers.set(unsent.to, left);
    else this.#peers.delete(unsent.to);
    this.#landed(unsent);
    return unsent;
  }

  /** Takes out what was queued before then. */
  takeOlder(than: number): Unsent[] {
    const old = this.#waiting.filter((unsent) => unsent.queuedAt < than);
    for (const unsent of old) this.take(unsent.id);
    return old;
  }

  /** A connection is there. It takes so many publishes a second, if it said so. */
  connected(publishesPerS: number | undefined, now: number): void {
    this.disconnected();
    this.#pace = publishesPerS ? new Pace(publishesPerS, now) : undefined;
  }

  disconnected(): void {
    this.#flying.clear();
    this.#pausedUntil = undefined;
  }

  /** The next to publish, if one may be now. */
  next(now: number): Unsent | undefined {
    if (this.#pausedUntil !== undefined && now < this.#pausedUntil) return undefined;
    this.#pausedUntil = undefined;
    const unsent = this.#first();
    if (!unsent || (this.#pace && !this.#pace.take(now))) return undefined;
    this.#flying.set(unsent.to, unsent.id);
    return unsent;
  }

  /** When {@link next} should be asked again, if nothing else happens before. */
  get wakeAt(): number | undefined {
    return this.#first() && Math.max(this.#pausedUntil ?? 0, this.#pace?.freeAt ?? 0);
  }

  /** The message that was answered for good; `undefined` if it is to be tried again, or is long known. */
  answered(id: string, answer: Answer, now: number): Unsent | undefined {
    if (answer.is !== 'refused' || !isPassing(answer)) {
      this.#pauseMs = undefined;
      return this.take(id);
    }
    const unsent = this.#waiting.find((unsent) => unsent.id === id);
    if (unsent) this.#landed(unsent);
    if (unsent && this.#pausedUntil === undefined) {
      this.#pauseMs = this.#pauseMs === undefined ? PAUSE_MIN_MS : Math.min(this.#pauseMs * 2, PAUSE_MAX_MS);
      this.#pausedUntil = now + this.#pauseMs;
    }
    return undefined;
  }

  #landed({ to, id }: Unsent): void {
    if (this.#flying.get(to) === id) this.#flying.delete(to);
  }

  /** The first for a peer to whom none is on its way. */
  #first(): Unsent | undefined {
    if (this.#flying.size >= WINDOW || this.#flying.size === this.#peers.size) return undefined;
    return this.#waiting.find(({ to }) => !this.#flying.has(to));
  }
}

/** Publishes no faster than a server allows: half a second's worth at once, and then one after the other. */
class Pace {
  readonly #intervalMs: number;
  #busyUntil: number;
  freeAt: number;

  constructor(publishesPerS: number, now: number) {
    this.#intervalMs = 1_000 / RATE_SHARE / publishesPerS;
    this.#busyUntil = now;
    this.freeAt = now;
  }

  take(now: number): boolean {
    if (now < this.freeAt) return false;
    this.#busyUntil = Math.max(this.#busyUntil, now) + this.#intervalMs;
    this.freeAt = Math.max(this.#busyUntil - BURST_MS, now);
    return true;
  }
}
