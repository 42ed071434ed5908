//! Requests until they are answered, and how far conversations were read until the server has confirmed it.
//!
//! Pure: time comes in. Invariants: everything that is asked is answered, refused, or timed out, once; after a reconnect it is asked again.

import { RequestError } from './api.js';
import type { Refused } from './transport.js';

/** Requests that wait for an answer. */
export const REQUESTS_MAX = 256;

interface Waiter<T> {
  resolve(outcome: T): void;
  reject(error: RequestError): void;
}

export interface Asked {
  number: number;
  method: string;
  members: object;
}

export class Requests {
  #asked = new Map<number, Asked & Waiter<unknown> & { deadline: number; published: boolean }>();
  #next = 1;

  ask(method: string, members: object, deadline: number): Promise<unknown> {
    if (this.#asked.size >= REQUESTS_MAX) return Promise.reject(new RequestError('too_many', 'too many requests wait for an answer'));
    const number = this.#next++;
    return new Promise((resolve, reject) => {
      this.#asked.set(number, { number, method, members, deadline, published: false, resolve, reject });
    });
  }

  get size(): number {
    return this.#asked.size;
  }

  /** The next to publish on this connection. */
  next(): Asked | undefined {
    for (const asked of this.#asked.values()) {
      if (!asked.published) {
        asked.published = true;
        return asked;
      }
    }
    return undefined;
  }

  /** It has to be published again. */
  again(number: number): void {
    const asked = this.#asked.get(number);
    if (asked) asked.published = false;
  }

  answered(number: number, outcome: { ok: unknown } | RequestError): void {
    const asked = this.#asked.get(number);
    this.#asked.delete(number);
    if (outcome instanceof RequestError) asked?.reject(outcome);
    else asked?.resolve(outcome.ok);
  }

  disconnected(): void {
    for (const asked of this.#asked.values()) asked.published = false;
  }

  get deadline(): number | undefined {
    let first: number | undefined;
    for (const { deadline } of this.#asked.values()) first = Math.min(first ?? deadline, deadline);
    return first;
  }

  timeOut(now: number): void {
    for (const { number, deadline } of [...this.#asked.values()]) {
      if (now >= deadline) this.answered(number, new RequestError('timed_out', 'no answer from the server in time'));
    }
  }

  end(error: RequestError): void {
    for (const number of [...this.#asked.keys()]) this.answered(number, error);
  }
}

/** Of a conversation only the furthest place counts. */
export class Reads {
  #reads = new Map<string, { seq: number; published: number; waiters: Waiter<void>[] }>();

  mark(peer: string, seq: number): Promise<void> {
    const read = this.#reads.get(peer) ?? { seq, published: 0, waiters: [] };
    read.seq = Math.max(read.seq, seq);
    this.#reads.set(peer, read);
    return new Promise((resolve, reject) => read.waiters.push({ resolve, reject }));
  }

  get size(): number {
    return this.#reads.size;
  }

  /** The next to publish on this connection. */
  next(): { peer: string; seq: number } | undefined {
    for (const [peer, read] of this.#reads) {
      if (read.published < read.seq) {
        read.published = read.seq;
        return { peer, seq: read.seq };
      }
    }
    return undefined;
  }

  /** It has to be published again. */
  again(peer: string): void {
    const read = this.#reads.get(peer);
    if (read) read.published = 0;
  }

  answered(peer: string, seq: number, refused: Refused | undefined): void {
    const read = this.#reads.get(peer);
    // If more was read meanwhile, that is answered too.
    if (!read || read.seq > seq) return;
    this.#reads.delete(peer);
    for (const waiter of read.waiters) {
      if (refused) waiter.reject(new RequestError(refused.code, refused.message));
      else waiter.resolve();
    }
  }

  disconnected(): void {
    for (const read of this.#reads.values()) read.published = 0;
  }

  end(error: RequestError): void {
    const reads = [...this.#reads.values()];
    this.#reads.clear();
    for (const waiter of reads.flatMap(({ waiters }) => waiters)) waiter.reject(error);
  }
}
