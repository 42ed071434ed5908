//! An outbox in IndexedDB, which the tabs of a user share.
//!
//! Each message belongs to a tab, and each tab holds a Web Lock of its name for as long as it lives. A message whose tab holds none is an orphan: whoever
//! sees it first makes it its own, under a lock that only one has at a time. Without Web Locks (a page that is not secure) nobody can tell who
//! lives: a program takes everything when it starts. What two tabs send all the same has one id, and is stored once.

import type { Clock, Outbox, Unsent } from './api.js';
import { systemClock } from './clock.js';
import { isId, isUser } from './payloads.js';
import { randomName } from './names.js';

/** Of Web Locks what is used here. */
export interface Locks {
  request<T>(name: string, whileHeld: () => Promise<T>): Promise<T>;
  query(): Promise<{ held?: { name?: string }[] }>;
}

export interface IndexedDbOutboxOptions {
  /** Of the database: one for each user of a server. */
  name: string;
  indexedDB?: IDBFactory;
  /** `null` for none. */
  locks?: Locks | null;
  clock?: Clock;
  /** How often orphans are looked for. */
  watchMs?: number;
}

const STORE = 'unsent';

interface Row extends Unsent {
  /** Its place in the order. */
  place?: number;
  tab: string;
}

export function indexedDbOutbox(options: IndexedDbOutboxOptions): Outbox {
  return new IndexedDbOutbox(options);
}

class IndexedDbOutbox implements Outbox {
  readonly #name: string;
  readonly #factory: IDBFactory;
  readonly #locks: Locks | null;
  readonly #clock: Clock;
  readonly #watchMs: number;
  readonly #tab = randomName();
  #database: Promise<IDBDatabase> | undefined;
  #letGo: (() => void) | undefined;

  constructor({ name, indexedDB = globalThis.indexedDB, locks = navigatorLocks(), clock = systemClock, watchMs = 5_000 }: IndexedDbOutboxOptions) {
    this.#name = name;
    this.#factory = indexedDB;
    this.#locks = locks;
    this.#clock = clock;
    this.#watchMs = watchMs;
  }

  async load(): Promise<Unsent[]> {
    await this.#live();
    return this.#takeOrphans();
  }

  async add(unsent: Unsent): Promise<void> {
    await this.#change(async (store) => {
      const place = await done(store.index('id').getKey(unsent.id));
      const row: Row = { ...unsent, tab: this.#tab, ...(place === undefined ? {} : { place: place as number }) };
      store.put(row);
    });
  }

  async remove(id: string): Promise<void> {
    await this.#change(async (store) => {
      const place = await done(store.index('id').getKey(id));
      if (place !== undefined) store.delete(place);
    });
  }

  adopt(taken: (unsent: Unsent[]) => void): () => void {
    if (!this.#locks) return () => {};
    let ended = false;
    let cancel = () => {};
    const look = async () => {
      // Whatever goes wrong now may go right the next time.
      const orphans = await this.#takeOrphans().catch(() => []);
      if (ended) return;
      if (orphans.length > 0) taken(orphans);
      wait();
    };
    const wait = () => {
      cancel = this.#clock.after(this.#watchMs, () => void look());
    };
    wait();
    return () => {
      ended = true;
      cancel();
    };
  }

  close(): void {
    this.#letGo?.();
    void this.#database?.then((database) => database.close(), () => {});
    this.#database = undefined;
  }

  /** Shows that this tab lives. */
  async #live(): Promise<void> {
    const locks = this.#locks;
    if (!locks) return;
    await new Promise<void>((resolve, reject) => {
      const held = () => {
        resolve();
        return new Promise<void>((letGo) => {
          this.#letGo = letGo;
        });
      };
      locks.request(this.#lockOf(this.#tab), held).catch(reject);
    });
  }

  #lockOf(tab: string): string {
    return `${this.#name} ${tab}`;
  }

  async #takeOrphans(): Promise<Unsent[]> {
    if (!this.#locks) return this.#take(() => true);
    // Mostly there is nothing of others, and nothing to wait for.
    if ((await this.#rows()).every(({ tab }) => tab === this.#tab)) return [];
    const locks = this.#locks;
    return locks.request(`${this.#name} orphans`, async () => {
      const { held = [] } = await locks.query();
      const names = new Set(held.map(({ name }) => name));
      return this.#take((tab) => !names.has(this.#lockOf(tab)));
    });
  }

  async #rows(): Promise<Row[]> {
    const database = await this.#open();
    const rows = await done(database.transaction(STORE, 'readonly').objectStore(STORE).getAll());
    return rows.filter(isRow);
  }

  /** Makes messages of such tabs this one's. */
  async #take(isGone: (tab: string) => boolean): Promise<Unsent[]> {
    let taken: Row[] = [];
    await this.#change(async (store) => {
      const rows = (await done(store.getAll())).filter(isRow);
      taken = rows.filter(({ tab }) => tab !== this.#tab && isGone(tab));
      for (const row of taken) store.put({ ...row, tab: this.#tab });
    });
    return taken.map(({ id, to, text, queuedAt }) => ({ id, to, text, queuedAt }));
  }

  /** Resolves when the change is on disk. */
  async #change(work: (store: IDBObjectStore) => Promise<void>): Promise<void> {
    const database = await this.#open();
    const transaction = database.transaction(STORE, 'readwrite', { durability: 'strict' });
    const complete = new Promise<void>((resolve, reject) => {
      transaction.oncomplete = () => resolve();
      transaction.onabort = () => reject(transaction.error ?? new Error('the database did not take it'));
    });
    const worked = work(transaction.objectStore(STORE));
    await Promise.all([worked, complete]);
  }

  #open(): Promise<IDBDatabase> {
    if (this.#database) return this.#database;
    const opening = this.#factory.open(this.#name, 1);
    opening.onupgradeneeded = () => {
      const store = opening.result.createObjectStore(STORE, { keyPath: 'place', autoIncrement: true });
      store.createIndex('id', 'id', { unique: true });
    };
    const forget = () => {
      if (this.#database === database) this.#database = undefined;
    };
    const database = done(opening).then((opened) => {
      opened.onclose = forget;
      opened.onversionchange = () => {
        opened.close();
        forget();
      };
      return opened;
    });
    database.catch(forget);
    this.#database = database;
    return database;
  }
}

/** A page that is not secure has none, and one in a sandbox may not ask for them. */
function navigatorLocks(): Locks | null {
  return globalThis.navigator?.locks ?? null;
}

function done<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** What another version, or somebody at the console, left there is no message. */
function isRow(value: unknown): value is Row {
  const { id, to, text, queuedAt, tab, place } = value as Record<keyof Row, unknown>;
  return isId(id) && isUser(to) && typeof text === 'string' && typeof queuedAt === 'number' && typeof tab === 'string' && typeof place === 'number';
}
