//! What a user has seen of the conversations, kept in this browser: to be read offline, and to ask the server only for what is new. Shared by the user's tabs.
//!
//! Invariants: a sync token is kept in the same transaction as what came with it, and only if what came since the one before is here, too (it may have found no place, or
//! another tab may have forgotten everything); unless everything was synced from the beginning, a conversation is told only from where it
//! has no holes. Nothing here is the only copy of anything, but for messages that were not sent.

import type { Envelope, Sync, Text, Unsent } from '../sdk/api';
import type { Kept } from './model/state';

export interface Page {
  entries: Text[];
  more: boolean;
}

export interface Failed {
  unsent: Unsent;
  failure: string;
}

export interface Cache {
  load(): Promise<{ conversations: Kept[]; failed: Failed[]; token?: string }>;
  /** The last before `before`, or the last of all. */
  page(peer: string, before: number | undefined, limit: number): Promise<Page>;
  /** A page of the server: `whole` if it begins with the first entry of the conversation; `joins` if it ends before what is here. */
  put(peer: string, entries: readonly Text[], whole: boolean, joins: boolean): Promise<void>;
  /** After everything was synced: before that it would leave holes. */
  arrived(peer: string, envelope: Envelope): Promise<void>;
  /** From this token on everything is kept; the one that holds, if another tab has begun earlier. */
  begin(token: string): Promise<string>;
  /** What came since a token. */
  synced(me: string, since: string | undefined, sync: Sync): Promise<void>;
  remove(peer: string, seqs: readonly number[]): Promise<void>;
  keep(conversations: readonly Kept[]): Promise<void>;
  keepFailed(failed: Failed): Promise<void>;
  dropFailed(id: string): Promise<void>;
  /** The past is another one, or nobody's any more. */
  clear(): Promise<void>;
  close(): void;
}

/** Where nothing can be kept. */
export const noCache: Cache = {
  load: async () => ({ conversations: [], failed: [] }),
  page: async () => ({ entries: [], more: true }),
  put: async () => {},
  arrived: async () => {},
  begin: async (token) => token,
  synced: async () => {},
  remove: async () => {},
  keep: async () => {},
  keepFailed: async () => {},
  dropFailed: async () => {},
  clear: async () => {},
  close: () => {},
};

const STORES = ['entries', 'conversations', 'failed', 'state'] as const;

export async function openCache(user: string, databases: IDBFactory = indexedDB): Promise<Cache> {
  const opening = databases.open(`chat-${user}`, 1);
  opening.onupgradeneeded = () => {
    const database = opening.result;
    database.createObjectStore('entries', { keyPath: ['peer', 'seq'] });
    database.createObjectStore('conversations', { keyPath: 'peer' });
    database.createObjectStore('failed', { keyPath: 'unsent.id' });
    database.createObjectStore('state');
  };
  return new IndexedCache(await answer(opening));
}

type Row = Text & { peer: string };

class IndexedCache implements Cache {
  readonly #database: IDBDatabase;

  constructor(database: IDBDatabase) {
    this.#database = database;
    // A later version wants to open it.
    database.onversionchange = () => database.close();
  }

  async load(): ReturnType<Cache['load']> {
    const stores = this.#stores('readonly');
    const [conversations, failed, token] = await Promise.all([
      answer<Kept[]>(stores.conversations.getAll()),
      answer<Failed[]>(stores.failed.getAll()),
      answer<string | undefined>(stores.state.get('token')),
    ]);
    return { conversations, failed, ...(token === undefined ? {} : { token }) };
  }

  async page(peer: string, before: number | undefined, limit: number): Promise<Page> {
    const { entries, state } = this.#stores('readonly');
    const [isComplete, from] = await Promise.all([
      answer<boolean | undefined>(state.get('complete')),
      answer<number | undefined>(state.get(`from ${peer}`)),
    ]);
    const first = isComplete ? 0 : from;
    if (first === undefined || (before !== undefined && before <= first)) return { entries: [], more: first !== 0 };
    const range = IDBKeyRange.bound([peer, first], [peer, before ?? Infinity], false, before !== undefined);
    const found: Text[] = [];
    let more = first > 1;
    await each(entries.openCursor(range, 'prev'), (cursor) => {
      if (found.length === limit) {
        more = true;
        return false;
      }
      const { peer: _peer, ...text } = cursor.value as Row;
      found.push(text);
      return true;
    });
    return { entries: found.reverse(), more };
  }

  async put(peer: string, page: readonly Text[], whole: boolean, joins: boolean): Promise<void> {
    const { entries, state, done } = this.#stores('readwrite');
    const first = page[0]?.seq;
    const from = await answer<number | undefined>(state.get(`from ${peer}`));
    if (whole) state.put(0, `from ${peer}`);
    else if (first !== undefined) {
      const overlaps = from !== undefined && from <= first && (await answer(entries.count([peer, first]))) > 0;
      if (joins && from !== undefined) state.put(Math.min(from, first), `from ${peer}`);
      else if (!overlaps) state.put(first, `from ${peer}`);
    }
    for (const entry of page) entries.put({ ...entry, peer } satisfies Row);
    await done;
  }

  async arrived(peer: string, envelope: Envelope): Promise<void> {
    const { entries, state, done } = this.#stores('readwrite');
    await apply(entries, peer, envelope);
    if (envelope.kind === 'text') await this.#beginsWith(state, peer, envelope.seq);
    await done;
  }

  async begin(token: string): Promise<string> {
    const { state, done } = this.#stores('readwrite');
    const held = await answer<string | undefined>(state.get('token'));
    if (held === undefined) {
      state.put(token, 'token');
      state.put(true, 'begun');
    }
    await done;
    return held ?? token;
  }

  /** Of a conversation of which nothing is kept, everything is from now on: the token sees to it. */
  async #beginsWith(state: IDBObjectStore, peer: string, seq: number): Promise<void> {
    const [token, from] = await Promise.all([answer<string | undefined>(state.get('token')), answer<number | undefined>(state.get(`from ${peer}`))]);
    if (token !== undefined && from === undefined) state.put(seq, `from ${peer}`);
  }

  async synced(me: string, since: string | undefined, sync: Sync): Promise<void> {
    const { entries, state, done } = this.#stores('readwrite');
    const [held, hasBegun] = await Promise.all([answer<string | undefined>(state.get('token')), answer<boolean | undefined>(state.get('begun'))]);
    const follows = held === since;
    for (const entry of sync.entries) {
      // Without what came before, a text would be beyond a hole; what is taken back is so in any case.
      const peer = entry.from === me ? entry.to : entry.from;
      if (follows || entry.kind !== 'text') await apply(entries, peer, entry);
      if (follows && since !== undefined && entry.kind === 'text') await this.#beginsWith(state, peer, entry.seq);
    }
    for (const { with: peer, deleted } of sync.conversations) for (const seq of deleted ?? []) entries.delete([peer, seq]);
    if (follows) {
      state.put(sync.next, 'token');
      // Not if it began in the middle.
      if (!sync.more && !hasBegun) state.put(true, 'complete');
    }
    await done;
  }

  async remove(peer: string, seqs: readonly number[]): Promise<void> {
    const { entries, done } = this.#stores('readwrite');
    for (const seq of seqs) entries.delete([peer, seq]);
    await done;
  }

  async keep(kept: readonly Kept[]): Promise<void> {
    const { conversations, done } = this.#stores('readwrite');
    for (const one of kept) conversations.put(one);
    await done;
  }

  async keepFailed(failed: Failed): Promise<void> {
    const stores = this.#stores('readwrite');
    stores.failed.put(failed);
    await stores.done;
  }

  async dropFailed(id: string): Promise<void> {
    const { failed, done } = this.#stores('readwrite');
    failed.delete(id);
    await done;
  }

  async clear(): Promise<void> {
    const stores = this.#stores('readwrite');
    for (const name of STORES) if (name !== 'failed') stores[name].clear();
    await stores.done;
  }

  close(): void {
    this.#database.close();
  }

  #stores(mode: IDBTransactionMode): Record<(typeof STORES)[number], IDBObjectStore> & { done: Promise<void> } {
    const transaction = this.#database.transaction(STORES, mode);
    const done = new Promise<void>((resolve, reject) => {
      transaction.oncomplete = () => resolve();
      transaction.onabort = () => reject(transaction.error ?? new Error('the browser keeps nothing more'));
    });
    // It is heard by whoever wrote; reading has its own answers.
    done.catch(() => {});
    const [entries, conversations, failed, state] = STORES.map((name) => transaction.objectStore(name)) as [IDBObjectStore, IDBObjectStore, IDBObjectStore, IDBObjectStore];
    return { entries, conversations, failed, state, done };
  }
}

/** Lays an entry over what is there. What was taken back stays so. */
async function apply(entries: IDBObjectStore, peer: string, envelope: Envelope): Promise<void> {
  const target = envelope.kind === 'edit' || envelope.kind === 'unsend' ? envelope.target : envelope.seq;
  const known = await answer<Row | undefined>(entries.get([peer, target]));
  switch (envelope.kind) {
    case 'text':
      if (!known) entries.put({ ...envelope, peer } satisfies Row);
      return;
    case 'edit':
      if (known && !known.unsent && envelope.at >= (known.edited_at ?? 0)) {
        entries.put({ ...known, text: envelope.text, edited_at: envelope.at } satisfies Row);
      }
      return;
    case 'unsend':
    case 'erased':
      if (known) {
        const { text: _text, edited_at: _edited, ...rest } = known;
        entries.put({ ...rest, unsent: true } satisfies Row);
      }
  }
}

function answer<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function each(request: IDBRequest<IDBCursorWithValue | null>, take: (cursor: IDBCursorWithValue) => boolean): Promise<void> {
  return new Promise((resolve, reject) => {
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (cursor && take(cursor)) cursor.continue();
      else resolve();
    };
  });
}
