//! Who is at the page: nobody yet, somebody on the way in, or a user in a session.
//!
//! Invariants: a password is never stored but for this tab, if the user ticks that; of a user without a password the name is remembered, so that a reload is
//! logged in.

import { effect, signal, type ReadonlySignal } from '@preact/signals';

import type { Closed, ConnectionState } from '../sdk/api';
import { Session, type Login, type Surroundings } from './session';
import { texts } from './texts';

export type Phase =
  /** `why`: the server has ended it. `isLeft`: in another tab. */
  | { at: 'login'; user: string; withPassword: boolean; problem?: string; why?: Closed; isLeft?: true }
  | { at: 'entering'; user: string; problem?: string }
  /** Who the user is says the page around this one, and the server does not believe it. */
  | { at: 'refused'; user: string; problem: string; why: Closed }
  | { at: 'in'; session: Session };

const USER = 'chat user';
const SECRET = 'chat secret';

export class Entrance {
  readonly #phase = signal<Phase>({ at: 'login', user: '', withPassword: false });
  readonly #around: Surroundings;
  readonly #tab: Pick<Storage, 'getItem' | 'setItem' | 'removeItem'>;
  #watching: (() => void) | undefined;
  #session: Session | undefined;

  constructor(around: Surroundings, tab: Pick<Storage, 'getItem' | 'setItem' | 'removeItem'>) {
    this.#around = around;
    this.#tab = tab;
  }

  get phase(): ReadonlySignal<Phase> {
    return this.#phase;
  }

  /** Whoever is remembered is in at once, and sees what is kept while it connects. */
  begin(): void {
    const secret = this.#tab.getItem(SECRET);
    if (secret !== null) {
      const { user, password } = JSON.parse(secret) as { user: string; password: string };
      return this.enter({ user, password }, { stay: true, isKnown: true });
    }
    const user = this.#around.storage.getItem(USER);
    if (user !== null) this.enter({ user }, { isKnown: true });
  }

  enter(login: Login, { stay = false, isKnown = false, remember = true } = {}): void {
    this.#leave(false);
    const { user, password } = login;
    const session = new Session(login, this.#around);
    this.#session = session;
    this.#phase.value = isKnown ? { at: 'in', session } : { at: 'entering', user };
    let wasConnected = false;
    this.#watching = effect(() => {
      const { connection } = session.state.value;
      // What a page around this one has begun, it ends.
      if (session.isLoggedOut.value && remember) return this.#leftElsewhere(session, password !== undefined);
      if (connection.state === 'connected') {
        if (!wasConnected && remember) this.#remember(login, stay);
        wasConnected = true;
      }
      this.#step(session, connection, password !== undefined, remember);
    });
    void session.begin();
  }

  #step(session: Session, connection: ConnectionState, withPassword: boolean, isRemembered: boolean): void {
    const phase = this.#phase.peek();
    if (connection.state === 'closed' && connection.why.code === 'login_refused') {
      const { why } = connection;
      if (isRemembered) this.#forget(session.user);
      this.#leave(false);
      const problem = texts.login.refused(why.message);
      if (session.hasToken) this.#phase.value = { at: 'refused', user: session.user, problem, why };
      else this.#phase.value = { at: 'login', user: session.user, withPassword: true, problem: withPassword || phase.at === 'entering' ? problem : texts.login.again, why };
      return;
    }
    if (phase.at !== 'entering') return;
    if (connection.state === 'connected') this.#phase.value = { at: 'in', session };
    else if (connection.state === 'lost') this.#phase.value = { ...phase, problem: texts.login.noServer };
    else if (connection.state === 'closed') {
      this.#leave(false);
      this.#phase.value = { at: 'login', user: session.user, withPassword, problem: connection.why.message, why: connection.why };
    }
  }

  #leftElsewhere(session: Session, withPassword: boolean): void {
    this.#forget(session.user);
    this.#leave(true);
    this.#phase.value = { at: 'login', user: '', withPassword, problem: texts.login.leftElsewhere, isLeft: true };
  }

  cancel(): void {
    const user = this.#session?.user ?? '';
    this.#leave(false);
    this.#phase.value = { at: 'login', user, withPassword: false };
  }

  /** With everything that this browser keeps of the user, but for what waits to be sent. */
  logOut(): void {
    this.#forget(this.#session?.user);
    this.#session?.logOutElsewhere();
    this.#leave(true);
    this.#phase.value = { at: 'login', user: '', withPassword: false };
  }

  #leave(forget: boolean): void {
    this.#watching?.();
    this.#watching = undefined;
    void this.#session?.end(forget);
    this.#session = undefined;
  }

  #remember({ user, password, token }: Login, stay: boolean): void {
    if (token) return;
    try {
      if (password === undefined) this.#around.storage.setItem(USER, user);
      else if (stay) this.#tab.setItem(SECRET, JSON.stringify({ user, password }));
    } catch {
      // The page asks again after a reload.
    }
  }

  /** Other tabs may be another user's. */
  #forget(user: string | undefined): void {
    this.#tab.removeItem(SECRET);
    if (this.#around.storage.getItem(USER) === user) this.#around.storage.removeItem(USER);
  }
}
