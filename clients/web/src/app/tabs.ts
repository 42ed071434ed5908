//! The tabs of a user in this browser: whether somebody looks at one of them, which of them tells of a message, and that the user has logged out in one.
//!
//! Invariants: of the tabs that hear of the same thing at most one tells of it, and none while somebody looks at any of them; what a tab says of itself is over
//! when it is gone, however that came. Where there are no Web Locks (a page that is not secure, which may not notify either) each tab is on its own.

import type { Clock } from '../sdk/api';

/** Of Web Locks what is used here. */
export interface TabLocks {
  request(name: string, options: { mode?: 'exclusive' | 'shared'; ifAvailable?: boolean }, whileHeld: (lock: unknown) => Promise<void> | undefined): Promise<unknown>;
  query(): Promise<{ held?: { name?: string }[] }>;
}

/** Of a BroadcastChannel. */
export interface TabChannel {
  postMessage(said: unknown): void;
  onmessage: ((event: MessageEvent) => void) | null;
  close(): void;
}

export interface Tabs {
  /** Whether this tab is the one to tell of it. */
  claim(what: string): Promise<boolean>;
  /** The user has logged out here. */
  logOut(): void;
  close(): void;
}

/** Another tab has heard of the same by then, if it hears of it at all. */
const CLAIMED_MS = 10_000;
const CLAIMS_MAX = 64;
const LOGGED_OUT = 'logged out';

export class UserTabs implements Tabs {
  readonly #user: string;
  readonly #clock: Clock;
  readonly #locks: TabLocks | undefined;
  readonly #channel: TabChannel | undefined;
  #looked: Held | undefined;
  #claims: Held[] = [];

  constructor(user: string, clock: Clock, locks: TabLocks | undefined, channel: TabChannel | undefined, onLogOut: () => void) {
    this.#user = user;
    this.#clock = clock;
    this.#locks = locks;
    this.#channel = channel;
    if (channel) channel.onmessage = ({ data }) => data === LOGGED_OUT && onLogOut();
  }

  /** Whether somebody looks at this one now. */
  look(isLooking: boolean): void {
    if (!this.#locks || isLooking === (this.#looked !== undefined)) return;
    if (this.#looked) this.#looked.letGo();
    this.#looked = undefined;
    if (!isLooking) return;
    const looked = (this.#looked = new Held());
    this.#locks.request(this.#lookedAt(), { mode: 'shared' }, () => looked.over).catch(() => {});
  }

  async claim(what: string): Promise<boolean> {
    const locks = this.#locks;
    if (!locks) return true;
    try {
      const { held = [] } = await locks.query();
      if (held.some(({ name }) => name === this.#lookedAt())) return false;
      return await new Promise<boolean>((resolve, reject) => {
        const take = (lock: unknown) => {
          resolve(lock !== null);
          return lock === null ? undefined : this.#hold();
        };
        locks.request(`told ${this.#user} ${what}`, { ifAvailable: true }, take).catch(reject);
      });
    } catch {
      // Rather twice than never.
      return true;
    }
  }

  #hold(): Promise<void> {
    const claim = new Held();
    this.#claims.push(claim);
    if (this.#claims.length > CLAIMS_MAX) this.#claims.shift()?.letGo();
    const cancel = this.#clock.after(CLAIMED_MS, () => {
      this.#claims = this.#claims.filter((one) => one !== claim);
      claim.letGo();
    });
    return claim.over.finally(cancel);
  }

  logOut(): void {
    this.#channel?.postMessage(LOGGED_OUT);
  }

  close(): void {
    this.look(false);
    for (const claim of this.#claims) claim.letGo();
    this.#claims = [];
    if (this.#channel) this.#channel.onmessage = null;
    this.#channel?.close();
  }

  #lookedAt(): string {
    return `looked at by ${this.#user}`;
  }
}

/** What is held until it is let go. */
class Held {
  letGo!: () => void;
  readonly over = new Promise<void>((resolve) => {
    this.letGo = resolve;
  });
}
