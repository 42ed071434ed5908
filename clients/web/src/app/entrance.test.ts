import { IDBFactory } from 'fake-indexeddb';
import 'fake-indexeddb/auto';
import { beforeEach, expect, it } from 'vitest';

import { openCache } from './cache';
import { TestClock } from './demo/clock';
import { DemoServer } from './demo/server';
import { Entrance } from './entrance';
import { storageOr } from './surroundings';

const inMemory = () =>
  storageOr(() => {
    throw new Error('none but in memory');
  });

let clock: TestClock;
let server: DemoServer;
let storage: Storage;
let tab: Storage;
let databases: IDBFactory;

function entrance(): Entrance {
  const around = { server: '', clock, loadSdk: async () => server.sdk, openCache: (user: string) => openCache(user, databases), storage, isLooking: () => true, notify: () => {} };
  return new Entrance(around, tab);
}

const kept = (store: Storage) => Object.fromEntries(Array.from({ length: store.length }, (_, at) => [store.key(at), store.getItem(store.key(at)!)]));

beforeEach(() => {
  clock = new TestClock();
  server = new DemoServer(clock);
  [storage, tab, databases] = [inMemory(), inMemory(), new IDBFactory()];
});

it('remembers a name, and a password only for the tab and if that is wanted', async () => {
  entrance().enter({ user: 'alice' });
  await clock.pass(50);
  expect([kept(storage), kept(tab)]).toEqual([{ 'chat user': 'alice' }, {}]);
  storage.clear();
  server.passwords = new Map([['bob', 'secret']]);
  entrance().enter({ user: 'bob', password: 'secret' });
  await clock.pass(50);
  expect([kept(storage), kept(tab)]).toEqual([{}, {}]);
  const staying = entrance();
  staying.enter({ user: 'bob', password: 'secret' }, { stay: true });
  await clock.pass(50);
  expect([kept(storage), kept(tab)]).toEqual([{}, { 'chat secret': '{"user":"bob","password":"secret"}' }]);
  staying.logOut();
  expect(kept(tab)).toEqual({});
});

it('does not log out others who use this browser', async () => {
  storage.setItem('chat user', 'alice');
  tab.setItem('chat secret', '{"user":"alice","password":"a"}');
  server.passwords = new Map([['alice', 'a'], ['bob', 'secret']]);
  // A frame, whose site remembers who is there.
  const frame = entrance();
  frame.enter({ user: 'alice', token: () => 'refused' }, { isKnown: true, remember: false });
  await clock.pass(50);
  expect(frame.phase.peek().at).toBe('login');
  expect([storage.length, tab.length]).toEqual([1, 1]);
  tab.clear();
  // Another tab, another user.
  const other = entrance();
  other.enter({ user: 'bob', password: 'wrong' });
  await clock.pass(50);
  expect(other.phase.peek()).toMatchObject({ at: 'login', user: 'bob' });
  expect(kept(storage)).toEqual({ 'chat user': 'alice' });
});

it('shows nothing of what is kept before the server has let the user in', async () => {
  server.isUp = false;
  const address = entrance();
  address.enter({ user: 'alice' }, { remember: false });
  await clock.pass(50);
  expect(address.phase.peek()).toMatchObject({ at: 'entering', user: 'alice' });
});
