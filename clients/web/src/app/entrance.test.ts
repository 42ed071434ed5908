import { IDBFactory } from 'fake-indexeddb';
import 'fake-indexeddb/auto';
import { beforeEach, expect, it } from 'vitest';

import { openCache } from './cache';
import { TestClock } from './demo/clock';
import { DemoServer } from './demo/server';
import { Entrance } from './entrance';
import { storageOr } from './surroundings';
import type { Tabs } from './tabs';

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
  const around = { server: '', clock, loadSdk: async () => server.sdk, openCache: (user: string) => openCache(user, databases), storage, isLooking: () => true, tabs, notify: () => {} };
  return new Entrance(around, tab);
}

/** Pages of one browser, for what they say to each other. */
const pages: { user: string; onLogOut: () => void }[] = [];

function tabs(user: string, onLogOut: () => void): Tabs {
  const page = { user, onLogOut };
  pages.push(page);
  return {
    claim: async () => true,
    logOut: () => pages.filter((other) => other !== page && other.user === user).forEach((other) => other.onLogOut()),
    close: () => void pages.splice(pages.indexOf(page), 1),
  };
}

const kept = (store: Storage) => Object.fromEntries(Array.from({ length: store.length }, (_, at) => [store.key(at), store.getItem(store.key(at)!)]));

beforeEach(() => {
  clock = new TestClock();
  server = new DemoServer(clock);
  [storage, tab, databases] = [inMemory(), inMemory(), new IDBFactory()];
  pages.length = 0;
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
  expect(frame.phase.peek()).toMatchObject({ at: 'refused', user: 'alice', why: { code: 'login_refused' } });
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

it('logs out in all tabs of the user, and in no others', async () => {
  server.passwords = new Map([['alice', 'a'], ['bob', 'b']]);
  const first = entrance();
  const second = entrance();
  const bob = entrance();
  const frame = entrance();
  first.enter({ user: 'alice', password: 'a' }, { stay: true });
  second.enter({ user: 'alice', password: 'a' });
  bob.enter({ user: 'bob', password: 'b' });
  frame.enter({ user: 'alice', password: 'a' }, { isKnown: true, remember: false });
  await clock.pass(50);
  expect([first, second, bob, frame].map((one) => one.phase.peek().at)).toEqual(['in', 'in', 'in', 'in']);

  second.logOut();
  await clock.pass(50);
  expect(second.phase.peek()).toMatchObject({ at: 'login', user: '' });
  expect(first.phase.peek()).toEqual({ at: 'login', user: '', withPassword: true, problem: 'You have logged out in another tab.', isLeft: true });
  expect([bob, frame].map((one) => one.phase.peek().at)).toEqual(['in', 'in']);
  expect(kept(tab)).toEqual({});

  // Whoever comes back stays.
  second.enter({ user: 'alice', password: 'a' });
  await clock.pass(50);
  expect([first, second].map((one) => one.phase.peek().at)).toEqual(['login', 'in']);
});
