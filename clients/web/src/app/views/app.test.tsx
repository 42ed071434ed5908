// @vitest-environment happy-dom
import { IDBFactory } from 'fake-indexeddb';
import 'fake-indexeddb/auto';
import { render } from 'preact';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { openCache } from '../cache';
import { TestClock, eventually, settle } from '../demo/clock';
import { DemoServer } from '../demo/server';
import { Entrance } from '../entrance';
import { storageOr } from '../surroundings';
import { App } from './app';

let clock: TestClock;
let server: DemoServer;
let root: HTMLElement;
let entrance: Entrance;
let isLooking: boolean;

const inMemory = () =>
  storageOr(() => {
    throw new Error('none but in memory');
  });

function show(): void {
  const databases = new IDBFactory();
  entrance = new Entrance(
    {
      server: '',
      clock,
      loadSdk: async () => server.sdk,
      openCache: (user) => openCache(user, databases),
      storage: inMemory(),
      isLooking: () => isLooking,
      notify: () => {},
    },
    inMemory(),
  );
  render(<App entrance={entrance} />, root);
}

const all = (selector: string) => [...root.querySelectorAll<HTMLElement>(selector)];
const one = (selector: string): HTMLElement => {
  const found = root.querySelector<HTMLElement>(selector);
  if (!found) throw new Error(`there is no ${selector} in ${root.innerHTML.slice(0, 400)}`);
  return found;
};
const textsOf = () => all('.message').map((message) => [...message.querySelectorAll('.words')].map(({ textContent }) => textContent).join('\n'));

function type(field: HTMLElement, text: string): void {
  (field as HTMLInputElement).value = text;
  field.dispatchEvent(new Event('input', { bubbles: true }));
}
const press = (element: HTMLElement, key: string, more: KeyboardEventInit = {}) => element.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true, ...more }));

async function enter(user: string, password?: string): Promise<void> {
  type(one('input[name=username]'), user);
  if (password !== undefined) type(one('input[name=password]'), password);
  await settle();
  one('form').dispatchEvent(new Event('submit', { bubbles: true, cancelable: true }));
  await clock.pass(50);
}

async function open(peer: string): Promise<void> {
  location.hash = peer;
  dispatchEvent(new Event('hashchange'));
  await clock.pass(50);
  await eventually(() => root.querySelector('.conversation h1')?.textContent === peer, 'the conversation is open');
  const phase = entrance.phase.peek();
  await eventually(() => phase.at === 'in' && phase.session.state.peek().conversations.get(peer)?.timeline !== undefined, 'its messages are loaded');
  await settle();
}

beforeEach(() => {
  isLooking = true;
  clock = new TestClock();
  server = new DemoServer(clock);
  root = document.createElement('div');
  document.body.append(root);
  location.hash = '';
  show();
});

afterEach(() => {
  entrance.logOut();
  render(null, root);
  root.remove();
});

describe('log in', () => {
  it('takes a name, and refuses what is none with a sentence', async () => {
    await enter('Not a name');
    expect(one('[role=alert]').textContent).toContain('small letters');
    await enter(' @Alice ');
    expect(one('.side-me').textContent).toBe('alice');
  });

  it('asks for a password where there is one', async () => {
    server.passwords = new Map([['alice', 'secret']]);
    await enter('alice');
    await eventually(() => root.querySelector('input[name=password]') !== null, 'it asks for a password');
    await enter('alice', 'wrong');
    await eventually(() => one('[role=alert]').textContent !== '', 'it is refused');
    await enter('alice', 'secret');
    expect(one('.side-me').textContent).toBe('alice');
  });
});

describe('the chat', () => {
  it('lists conversations with what is unread, and opens them', async () => {
    server.append('bob', 'alice', { kind: 'text', text: 'hello' });
    server.append('bob', 'alice', { kind: 'text', text: 'are you there?' });
    await enter('alice');
    expect(one('.list-row').textContent).toContain('are you there?');
    expect(one('.badge').textContent).toContain('2');
    expect(document.title).toBe('(2) Chat');
    await open('bob');
    expect(textsOf()).toEqual(['hello', 'are you there?']);
    expect(one('.unread').textContent).toBe('New messages');
    // Nothing is laid out here, so that nothing is seen: a real browser marks it as read.
  });

  it('sends with Enter, shows how far it has come, and edits with the arrow key', async () => {
    await enter('alice');
    await open('bob');
    const field = one('.compose textarea');
    type(field, 'hello');
    press(field, 'Enter', { shiftKey: true });
    expect(textsOf()).toEqual([]);
    press(field, 'Enter');
    await settle();
    expect(textsOf()).toEqual(['hello']);
    await clock.pass(50);
    expect(one('.message-tick').textContent).toBe('stored');
    expect((field as HTMLTextAreaElement).value).toBe('');

    press(field, 'ArrowUp');
    await settle();
    expect((field as HTMLTextAreaElement).value).toBe('hello');
    type(field, 'hello!');
    await settle();
    press(field, 'Enter');
    await clock.pass(50);
    expect(textsOf()).toEqual(['hello!']);
    expect(one('.message-edited').textContent).toBe('edited');
  });

  it('shows why a message was not sent', async () => {
    server.users = new Set(['alice']);
    await enter('alice');
    await open('bob');
    const field = one('.compose textarea');
    type(field, 'hello');
    press(field, 'Enter');
    await clock.pass(50);
    await eventually(() => root.querySelector('.message-failure') !== null, 'it was not sent');
    expect(one('.message-failure').textContent).toContain('there is no user bob');
  });

  it('takes what others write for words', async () => {
    const hostile = '<img src=x onerror="alert(1)"><script>alert(1)</script> javascript:alert(1) https://example.com/';
    server.append('eve', 'alice', { kind: 'text', text: hostile });
    await enter('alice');
    await open('eve');
    expect(textsOf()).toEqual([hostile]);
    expect(all('.message img, .message script')).toEqual([]);
    const links = all('.words a');
    expect(links.map((link) => link.getAttribute('href'))).toEqual(['https://example.com/']);
    expect(links[0]?.getAttribute('rel')).toContain('noopener');
    expect(one('.words').getAttribute('dir')).toBe('auto');
  });

  it('draws a bounded number of elements, however long the conversation is', async () => {
    for (let at = 1; at <= 10_000; at += 1) server.append('bob', 'alice', { kind: 'text', text: `text ${at}` });
    await enter('alice');
    await open('bob');
    const session = entrance.phase.peek();
    if (session.at !== 'in') throw new Error('not in');
    await eventually(() => all('.message').length > 0, 'messages are there');
    while (session.session.state.peek().conversations.get('bob')?.timeline?.earlier) {
      const loaded = session.session.loadEarlier('bob');
      await clock.pass(1);
      await loaded;
    }
    await settle();
    expect(session.session.state.peek().conversations.get('bob')?.timeline?.entries).toHaveLength(10_000);
    expect(textsOf().at(-1)).toBe('text 10000');
    expect(all('*').length).toBeLessThan(1_500);
  }, 60_000);

  it('says how the connection is', async () => {
    await enter('alice');
    server.goDown();
    await settle();
    expect(one('.banner').textContent).toContain('No connection');
    server.comeBack();
    await clock.pass(50);
    expect(root.querySelector('.banner')).toBeNull();
  });

  it('has read what came meanwhile when the user comes back to the window', async () => {
    await enter('alice');
    server.append('bob', 'alice', { kind: 'text', text: 'first' });
    await clock.pass(50);
    await open('bob');
    await clock.pass(1_000);
    expect(server.standing('alice', 'bob').my_read).toBe(1);
    isLooking = false;
    server.append('bob', 'alice', { kind: 'text', text: 'second' });
    await clock.pass(1_000);
    expect(textsOf()).toEqual(['first', 'second']);
    expect(server.standing('alice', 'bob').my_read).toBe(1);
    isLooking = true;
    dispatchEvent(new Event('focus'));
    await clock.pass(1_000);
    expect(server.standing('alice', 'bob').my_read).toBe(2);
  });

  it('leaves whoever goes back at the conversation in the list', async () => {
    server.append('bob', 'alice', { kind: 'text', text: 'hello' });
    await enter('alice');
    await open('bob');
    one('.compose textarea').focus();
    location.hash = '';
    dispatchEvent(new Event('hashchange'));
    await eventually(() => root.querySelector('.conversation') === null, 'the conversation is left');
    await eventually(() => document.activeElement?.getAttribute('href') === '#bob', 'the focus is on bob');
  });

  it('goes where the address says, after one that makes no sense, too', async () => {
    location.hash = '%';
    await enter('alice');
    await open('bob');
    expect(one('.conversation h1').textContent).toBe('bob');
  });
});
