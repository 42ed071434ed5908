import { IDBFactory } from 'fake-indexeddb';
import { beforeEach, expect, test } from 'vitest';

import type { Outbox, Unsent } from './api.js';
import { FakeClock, FakeLocks, type FakeTab, settled } from './fakes.js';
import { indexedDbOutbox } from './indexed-db.js';

let indexedDB: IDBFactory;
let locks: FakeLocks;
let clock: FakeClock;

beforeEach(() => {
  indexedDB = new IDBFactory();
  locks = new FakeLocks();
  clock = new FakeClock();
});

function open(tab: FakeTab | null = locks.tab(), name = 'outbox of alice'): Outbox {
  return indexedDbOutbox({ name, indexedDB, locks: tab, clock, watchMs: 5_000 });
}

const unsent = (id: string, text = id): Unsent => ({ id, to: 'bob', text, queuedAt: 1 });
const ids = (all: Unsent[]) => all.map(({ id }) => id);

/** What a page finds that comes when all others are gone. */
async function left(): Promise<string[]> {
  const outbox = indexedDbOutbox({ name: 'outbox of alice', indexedDB, locks: null });
  const all = ids(await outbox.load());
  outbox.close?.();
  return all;
}

test('what waits survives, in its order', async () => {
  const tab = locks.tab();
  const outbox = open(tab);
  expect(await outbox.load()).toEqual([]);
  await Promise.all(['c', 'a', 'b', 'd'].map((id) => outbox.add(unsent(id))));
  await outbox.remove('a');
  await outbox.remove('never there');
  tab.die();
  const next = open();
  expect(await next.load()).toEqual([unsent('c'), unsent('b'), unsent('d')]);
});

test('one of the same id takes the place of the other', async () => {
  const tab = locks.tab();
  const outbox = open(tab);
  await outbox.load();
  for (const id of ['a', 'b']) await outbox.add(unsent(id));
  await outbox.add(unsent('a', 'other words'));
  tab.die();
  expect(await open().load()).toEqual([unsent('a', 'other words'), unsent('b')]);
});

test('what a living tab sends is no business of others', async () => {
  const [first, second] = [open(), open()];
  await first.load();
  await first.add(unsent('a'));
  expect(await second.load()).toEqual([]);
  await second.add(unsent('b'));
  expect(await open(locks.tab(), 'outbox of zoe').load()).toEqual([]);
});

test('a tab that goes leaves its messages to one of the others, once', async () => {
  const tab = locks.tab();
  const gone = open(tab);
  await gone.load();
  for (const id of ['a', 'b']) await gone.add(unsent(id));
  const taken: string[] = [];
  const others = [open(), open()];
  for (const other of others) {
    expect(await other.load()).toEqual([]);
    other.adopt?.((all) => taken.push(...ids(all)));
  }
  await clock.pass(20_000);
  expect(taken).toEqual([]);
  tab.die();
  await clock.pass(5_000);
  await settled();
  expect(taken).toEqual(['a', 'b']);
  await clock.pass(20_000);
  expect(taken).toEqual(['a', 'b']);
});

test('closing leaves the messages to others, and ends the watch', async () => {
  const [first, second] = [open(), open()];
  await first.load();
  await second.load();
  await first.add(unsent('a'));
  const taken: string[] = [];
  const end = second.adopt?.((all) => taken.push(...ids(all)));
  first.close?.();
  await clock.pass(5_000);
  await settled();
  expect(taken).toEqual(['a']);
  end?.();
  expect(clock.timers).toBe(0);
});

test('of two that come at once each message goes to one', async () => {
  const tab = locks.tab();
  const gone = open(tab);
  await gone.load();
  for (let number = 0; number < 20; number++) await gone.add(unsent(`m-${number}`));
  tab.die();
  const loaded = await Promise.all([open().load(), open().load(), open().load()]);
  expect(ids(loaded.flat())).toHaveLength(20);
  expect(new Set(ids(loaded.flat())).size).toBe(20);
});

test('without locks everything is taken at the start, and nothing later', async () => {
  const first = open(null);
  await first.load();
  await first.add(unsent('a'));
  const second = open(null);
  expect(ids(await second.load())).toEqual(['a']);
  second.adopt?.(() => expect.unreachable());
  await first.add(unsent('b'));
  await clock.pass(60_000);
  expect(clock.timers).toBe(0);
});

test('what is no message is left alone', async () => {
  const outbox = open();
  await outbox.load();
  const opening = indexedDB.open('outbox of alice');
  const database = await new Promise<IDBDatabase>((resolve) => (opening.onsuccess = () => resolve(opening.result)));
  const transaction = database.transaction('unsent', 'readwrite');
  for (const row of [{ id: 'x y', to: 'bob', text: 'x', queuedAt: 1, tab: 't' }, { id: 'x' }, { id: 'y', to: 'bob/#', text: 'y', queuedAt: 1, tab: 't' }]) {
    transaction.objectStore('unsent').add(row);
  }
  await new Promise((resolve) => (transaction.oncomplete = resolve));
  await outbox.add(unsent('a'));
  expect(await left()).toEqual(['a']);
});

test('a database that cannot be opened is told of, and tried again', async () => {
  let fails = true;
  const factory = new Proxy(indexedDB, {
    get(target, name) {
      if (name === 'open' && fails) return () => target.open('x', -1);
      return Reflect.get(target, name).bind(target);
    },
  });
  const outbox = indexedDbOutbox({ name: 'outbox of alice', indexedDB: factory, locks: null });
  await expect(outbox.load()).rejects.toThrow();
  await expect(outbox.add(unsent('a'))).rejects.toThrow();
  fails = false;
  await outbox.add(unsent('a'));
  expect(await left()).toEqual(['a']);
});

test('a page that deletes the database is not stood in the way of', async () => {
  const outbox = open(null);
  await outbox.load();
  const deleting = indexedDB.deleteDatabase('outbox of alice');
  await new Promise((resolve) => (deleting.onsuccess = resolve));
  await outbox.add(unsent('a'));
  expect(await left()).toEqual(['a']);
});
