import { IDBFactory } from 'fake-indexeddb';
import 'fake-indexeddb/auto';
import { beforeEach, describe, expect, it } from 'vitest';

import { openCache } from './cache';
import { TestClock, eventually, settle } from './demo/clock';
import { DemoServer } from './demo/server';
import { listOf, unreadOf, type State } from './model/state';
import { Session, type Surroundings } from './session';
import { storageOr } from './surroundings';

let clock: TestClock;
let server: DemoServer;

/** A browser: what it keeps outlives its pages. */
class Browser {
  readonly databases = new IDBFactory();
  readonly storage = storageOr(() => {
    throw new Error('none but in memory');
  });
  isLooking = true;
  readonly notified: string[] = [];
  readonly withdrawn: (string | undefined)[] = [];
  /** What one of its pages has told of. */
  readonly claimed = new Set<string>();

  async page(user: string, open?: string): Promise<Session> {
    const around: Surroundings = {
      server: '',
      clock,
      loadSdk: async () => server.sdk,
      openCache: (user) => openCache(user, this.databases),
      storage: this.storage,
      isLooking: () => this.isLooking,
      notify: ({ from, text }) => void this.notified.push(`${from}: ${text}`),
      tabs: () => ({
        claim: async (what) => this.claimed.size < this.claimed.add(what).size,
        logOut: () => {},
        close: () => {},
      }),
      withdraw: (_user, peer) => void this.withdrawn.push(peer),
    };
    const session = new Session({ user }, around);
    void session.begin();
    if (open !== undefined) session.open(open);
    await clock.pass(100);
    return session;
  }
}

const stateOf = (session: Session): State => session.state.value;
const textsOf = (session: Session, peer: string) => stateOf(session).conversations.get(peer)?.timeline?.entries.map(({ text }) => text);
const bobOf = (session: Session) => stateOf(session).conversations.get('bob')!;

beforeEach(() => {
  clock = new TestClock();
  server = new DemoServer(clock);
});

describe('a session', () => {
  it('talks: stored, delivered, read, typing', async () => {
    const alice = await new Browser().page('alice', 'bob');
    const bob = await new Browser().page('bob');
    expect(alice.send('bob', 'hello')).toBe(true);
    expect(bobOf(alice).outgoing).toHaveLength(1);
    await clock.pass(10);
    expect(textsOf(alice, 'bob')).toEqual(['hello']);
    expect(bobOf(alice)).toMatchObject({ delivered: 1, read: 0, outgoing: [] });
    expect(unreadOf(stateOf(bob))).toBe(1);

    bob.open('alice');
    await clock.pass(10);
    expect(stateOf(bob).conversations.get('alice')?.unreadAfter).toBe(0);
    bob.seen('alice', 1);
    await clock.pass(500);
    expect(bobOf(alice).read).toBe(1);
    expect(unreadOf(stateOf(bob))).toBe(0);

    bob.draft('alice', 'h');
    await clock.pass(10);
    expect(bobOf(alice).typing).toBe(true);
    await clock.pass(6_000);
    expect(bobOf(alice).typing).toBe(false);
  });

  it('waits for the server, over a reload, and sends each message once', async () => {
    const browser = new Browser();
    const first = await browser.page('alice', 'bob');
    first.send('bob', 'zero');
    await clock.pass(1_000);
    server.goDown();
    first.send('bob', 'one');
    first.send('bob', 'two');
    await clock.pass(1_000);
    expect(bobOf(first).outgoing.map(({ text }) => text)).toEqual(['one', 'two']);
    await first.end(false);

    const second = await browser.page('alice', 'bob');
    expect(textsOf(second, 'bob')).toEqual(['zero']);
    expect(bobOf(second).outgoing.map(({ text }) => text)).toEqual(['one', 'two']);
    expect(listOf(stateOf(second)).map(({ peer }) => peer)).toEqual(['bob']);
    server.comeBack();
    await clock.pass(1_000);
    expect(textsOf(second, 'bob')).toEqual(['zero', 'one', 'two']);
    expect(bobOf(second).outgoing).toEqual([]);
    expect(server.texts('bob', 'alice').map(({ text }) => text)).toEqual(['zero', 'one', 'two']);
  });

  it('catches up with what it missed: texts, edits, what was taken back and deleted', async () => {
    const browser = new Browser();
    const alice = await browser.page('alice', 'bob');
    for (let at = 0; at < 5; at += 1) server.append('bob', 'alice', { kind: 'text', text: `text ${at}` });
    await clock.pass(1_000);
    server.goDown();
    server.append('bob', 'alice', { kind: 'edit', target: 1, text: 'edited' });
    server.append('bob', 'alice', { kind: 'unsend', target: 2 });
    server.append('bob', 'alice', { kind: 'text', text: 'news' });
    server.record('alice', 'bob').deleted.set('alice', new Set([3]));
    server.comeBack();
    await clock.pass(1_000);
    expect(textsOf(alice, 'bob')).toEqual(['edited', undefined, 'text 3', 'text 4', 'news']);
    await alice.end(false);
    // And so does the cache.
    server.isUp = false;
    const offline = await browser.page('alice', 'bob');
    expect(textsOf(offline, 'bob')).toEqual(['edited', undefined, 'text 3', 'text 4', 'news']);
  });

  it('loads a history page by page, and reads it again without a server', async () => {
    for (let at = 1; at <= 350; at += 1) server.append(at % 3 === 0 ? 'alice' : 'bob', at % 3 === 0 ? 'bob' : 'alice', { kind: 'text', text: `text ${at}` });
    const browser = new Browser();
    const alice = await browser.page('alice', 'bob');
    expect(textsOf(alice, 'bob')).toHaveLength(100);
    while (bobOf(alice).timeline?.earlier) {
      const both = [alice.loadEarlier('bob'), alice.loadEarlier('bob')];
      await clock.pass(10);
      await Promise.all(both);
    }
    expect(textsOf(alice, 'bob')).toEqual(Array.from({ length: 350 }, (_, at) => `text ${at + 1}`));
    expect(server.asked.filter((what) => what.startsWith('history'))).toHaveLength(4);
    await clock.pass(1_000);
    await alice.end(false);

    server.isUp = false;
    const offline = await browser.page('alice', 'bob');
    await eventually(() => bobOf(offline).timeline !== undefined, 'the cache has told');
    while (bobOf(offline).timeline?.earlier) await offline.loadEarlier('bob');
    expect(textsOf(offline, 'bob')).toHaveLength(350);
  });

  it('asks only for what is new', async () => {
    for (let at = 0; at < 500; at += 1) server.append('bob', 'alice', { kind: 'text', text: `text ${at}` });
    const browser = new Browser();
    const first = await browser.page('alice');
    await clock.pass(1_000);
    expect(server.asked).toEqual(['conversations', 'whoami', 'sync 500']);
    await first.end(false);
    server.asked.length = 0;
    await browser.page('alice');
    expect(server.asked).toEqual(['conversations', 'whoami', 'sync 500']);
  });

  it('asks a server that tells no token with its list for everything, once', async () => {
    server.listsToken = false;
    for (let at = 0; at < 500; at += 1) server.append('bob', 'alice', { kind: 'text', text: `text ${at}` });
    const browser = new Browser();
    const first = await browser.page('alice');
    await eventually(() => server.asked.includes('sync 400'), 'everything is synced');
    await clock.pass(1_000);
    await first.end(false);
    server.asked.length = 0;
    await browser.page('alice');
    expect(server.asked).toEqual(['conversations', 'whoami', 'sync 500']);
  });

  it('has after the first login what it has looked at and what has come since, without holes, and the rest when it is asked for', async () => {
    for (const peer of ['bob', 'zoe', 'eve']) for (let at = 1; at <= 300; at += 1) server.append(peer, 'alice', { kind: 'text', text: `${peer} ${at}` });
    const browser = new Browser();
    const first = await browser.page('alice', 'bob');
    server.append('zoe', 'alice', { kind: 'text', text: 'zoe 301' });
    await clock.pass(1_000);
    server.goDown();
    for (const peer of ['bob', 'zoe']) server.append(peer, 'alice', { kind: 'text', text: `${peer} again` });
    server.append('bob', 'alice', { kind: 'edit', target: 250, text: 'other words' });
    server.append('bob', 'alice', { kind: 'edit', target: 3, text: 'of what is not here' });
    server.comeBack();
    await clock.pass(1_000);
    await first.end(false);

    server.isUp = false;
    const offline = await browser.page('alice', 'bob');
    await eventually(() => bobOf(offline).timeline !== undefined, 'the cache has told');
    const had = Array.from({ length: 100 }, (_, at) => (at + 201 === 250 ? 'other words' : `bob ${at + 201}`));
    expect(textsOf(offline, 'bob')).toEqual([...had, 'bob again'].slice(-100));
    await offline.loadEarlier('bob');
    expect(textsOf(offline, 'bob')).toEqual([...had, 'bob again']);
    await expect(offline.loadEarlier('bob')).rejects.toThrow('when you are connected');
    offline.open('zoe');
    await eventually(() => stateOf(offline).conversations.get('zoe')?.timeline !== undefined, 'the cache has told');
    expect(textsOf(offline, 'zoe')).toEqual(['zoe 301', 'zoe again']);
    await expect(offline.loadEarlier('zoe')).rejects.toThrow('when you are connected');
    offline.open('eve');
    await settle();
    expect(textsOf(offline, 'eve')).toBeUndefined();
    expect(listOf(stateOf(offline)).map(({ peer, last }) => [peer, last?.text])).toEqual(expect.arrayContaining([['eve', 'eve 300'], ['zoe', 'zoe again'], ['bob', 'bob again']]));

    server.comeBack();
    await clock.pass(5_000);
    const all = {
      zoe: [...Array.from({ length: 301 }, (_, at) => `zoe ${at + 1}`), 'zoe again'],
      bob: [...Array.from({ length: 300 }, (_, at) => (at === 2 ? 'of what is not here' : at === 249 ? 'other words' : `bob ${at + 1}`)), 'bob again'],
    };
    for (const peer of ['zoe', 'bob'] as const) {
      offline.open(peer);
      await eventually(() => textsOf(offline, peer)?.at(-1) === all[peer].at(-1), 'its newest messages are there');
      await clock.pass(100);
      while (stateOf(offline).conversations.get(peer)?.timeline?.earlier) {
        const loaded = offline.loadEarlier(peer);
        await clock.pass(10);
        await loaded;
      }
      expect(textsOf(offline, peer)).toEqual(all[peer]);
    }
  });

  it('shows a refusal, keeps it over a reload, and tries it under another id', async () => {
    server.users = new Set(['alice', 'bob']);
    const browser = new Browser();
    const alice = await browser.page('alice', 'nobody');
    alice.send('nobody', 'hello?');
    await clock.pass(1_000);
    const failed = stateOf(alice).conversations.get('nobody')?.outgoing[0];
    expect(failed).toMatchObject({ text: 'hello?', failure: 'there is no user nobody' });
    await alice.end(false);

    const again = await browser.page('alice', 'nobody');
    expect(stateOf(again).conversations.get('nobody')?.outgoing).toMatchObject([{ text: 'hello?', failure: 'there is no user nobody' }]);
    server.users.add('nobody');
    again.retry('nobody', failed!.id);
    await clock.pass(1_000);
    expect(textsOf(again, 'nobody')).toEqual(['hello?']);
    expect(server.record('alice', 'nobody').entries[0]?.id).not.toBe(failed!.id);
    await again.end(false);
    expect(stateOf(await browser.page('alice', 'nobody')).conversations.get('nobody')?.outgoing).toEqual([]);
  });

  it('says at once what is too long, and keeps it', async () => {
    const alice = await new Browser().page('alice', 'bob');
    const long = 'ü'.repeat(9_000);
    alice.draft('bob', long);
    expect(alice.send('bob', long)).toBe(false);
    expect(stateOf(alice).notice).toMatchObject({ tone: 'error' });
    expect(stateOf(alice).drafts.get('bob')).toBe(long);
    expect(alice.send('bob', '  \n')).toBe(false);
  });

  it('keeps drafts over a reload, and hears of those of other tabs', async () => {
    const browser = new Browser();
    const alice = await browser.page('alice', 'bob');
    alice.draft('bob', 'a draft');
    await alice.end(false);
    const again = await browser.page('alice');
    expect(stateOf(again).drafts.get('bob')).toBe('a draft');
    again.writtenElsewhere('chat draft alice zoe', 'another');
    again.writtenElsewhere('chat draft eve zoe', 'not mine');
    again.writtenElsewhere('chat draft alice bob', null);
    expect([...stateOf(again).drafts]).toEqual([['zoe', 'another']]);
  });

  it('keeps the words of an edit over a reload and in another conversation, and shares them with other tabs', async () => {
    const browser = new Browser();
    const alice = await browser.page('alice', 'bob');
    for (const text of ['one', 'two']) alice.send('bob', text);
    await clock.pass(10);
    alice.startEditing('bob', 1);
    alice.editDraft('bob', 'one, but');
    alice.open('zoe');
    alice.open('bob');
    expect(bobOf(alice).editing).toEqual({ seq: 1, text: 'one, but' });
    await alice.end(false);

    const again = await browser.page('alice', 'bob');
    expect(bobOf(again).editing).toEqual({ seq: 1, text: 'one, but' });
    again.writtenElsewhere('chat edit alice bob', '{"seq":2,"text":"two, but"}');
    expect(bobOf(again).editing).toEqual({ seq: 2, text: 'two, but' });
    for (const nonsense of ['', '7', '{"seq":"2","text":1}', 'null', '{']) {
      again.writtenElsewhere('chat edit alice bob', nonsense);
      expect(bobOf(again).editing).toBeUndefined();
    }
    again.startEditing('bob', 2);
    again.editDraft('bob', 'zwei');
    const saved = again.saveEdit('bob');
    await clock.pass(10);
    await saved;
    expect(textsOf(again, 'bob')).toEqual(['one', 'zwei']);
    expect(browser.storage.length).toBe(0);
    again.startEditing('bob', 1);
    again.stopEditing('bob');
    expect(browser.storage.length).toBe(0);
    await again.end(false);
    expect(bobOf(await browser.page('alice', 'bob')).editing).toBeUndefined();
  });

  it('keeps the words of an edit as a draft when the message is gone with the past', async () => {
    const browser = new Browser();
    const alice = await browser.page('alice', 'bob');
    alice.send('bob', 'old');
    await clock.pass(1_000);
    alice.startEditing('bob', 1);
    alice.editDraft('bob', 'old, but');
    server.goDown();
    const older = new DemoServer(clock);
    older.append('bob', 'alice', { kind: 'text', text: 'another' });
    server.becomes(older);
    server.refusesToken = '0';
    server.comeBack();
    await clock.pass(1_000);
    expect(bobOf(alice).editing).toBeUndefined();
    await alice.end(false);
    const again = await browser.page('alice', 'bob');
    expect(bobOf(again).editing).toBeUndefined();
    expect(stateOf(again).drafts.get('bob')).toBe('old, but');
  });

  it('reads only while somebody looks, and tells of what nobody saw', async () => {
    const browser = new Browser();
    const alice = await browser.page('alice', 'bob');
    browser.isLooking = false;
    server.append('bob', 'alice', { kind: 'text', text: 'psst' });
    await clock.pass(10);
    alice.seen('bob', 1);
    await clock.pass(500);
    expect(unreadOf(stateOf(alice))).toBe(1);
    expect(browser.notified).toEqual(['bob: psst']);
    expect(bobOf(alice).unreadAfter).toBe(0);
    browser.isLooking = true;
    alice.seen('bob', 1);
    await clock.pass(500);
    expect(unreadOf(stateOf(alice))).toBe(0);
    expect(server.standing('alice', 'bob').my_read).toBe(1);
  });

  it('tells of a message once, in whichever of its tabs, and takes it back when it is read elsewhere', async () => {
    const browser = new Browser();
    browser.isLooking = false;
    const [first, second] = [await browser.page('alice', 'bob'), await browser.page('alice')];
    server.append('bob', 'alice', { kind: 'text', text: 'psst' });
    server.append('alice', 'bob', { kind: 'text', text: 'from another device' });
    await clock.pass(10);
    server.append('bob', 'alice', { kind: 'text', text: 'and?' });
    await clock.pass(10);
    expect(browser.notified).toEqual(['bob: psst', 'bob: and?']);
    browser.withdrawn.length = 0;
    server.read('alice', 'bob', 3);
    await clock.pass(10);
    expect(browser.withdrawn).toEqual(['bob', 'bob']);

    const late = new Promise<void>((resolve) => (browser.claimed.add = () => (resolve(), browser.claimed)));
    server.append('bob', 'alice', { kind: 'text', text: 'late' });
    await late;
    // Somebody is back before anything is shown.
    browser.isLooking = true;
    await clock.pass(10);
    expect(browser.notified).toHaveLength(2);
    await Promise.all([first.end(false), second.end(false)]);
  });

  it('tells after a reconnect what was read without a connection', async () => {
    const alice = await new Browser().page('alice', 'bob');
    server.append('bob', 'alice', { kind: 'text', text: 'hello' });
    await clock.pass(10);
    server.goDown();
    alice.seen('bob', 1);
    await clock.pass(1_000);
    expect(server.standing('alice', 'bob').my_read).toBe(0);
    server.comeBack();
    await clock.pass(1_000);
    expect(server.standing('alice', 'bob').my_read).toBe(1);
    expect(unreadOf(stateOf(alice))).toBe(0);
  });

  it('edits, takes back, deletes, blocks, and says what does not work', async () => {
    const alice = await new Browser().page('alice', 'bob');
    for (const text of ['one', 'two', 'three']) alice.send('bob', text);
    await clock.pass(10);
    alice.startEditing('bob', 1);
    alice.editDraft('bob', 'uno');
    const done = [alice.saveEdit('bob'), alice.unsend('bob', 2), alice.remove('bob', 3), alice.block('bob', true)];
    await clock.pass(10);
    await Promise.all(done);
    expect(textsOf(alice, 'bob')).toEqual(['uno', undefined]);
    expect(bobOf(alice)).toMatchObject({ blocked: true });
    expect(bobOf(alice).editing).toBeUndefined();

    server.goDown();
    alice.startEditing('bob', 1);
    alice.editDraft('bob', 'eins');
    await alice.saveEdit('bob');
    expect(stateOf(alice).notice).toMatchObject({ tone: 'error' });
    expect(bobOf(alice).editing?.text).toBe('eins');
    await clock.pass(10_000);
    expect(stateOf(alice).notice).toBeUndefined();
  });

  it('starts over when the token is of another server', async () => {
    const browser = new Browser();
    server.append('bob', 'alice', { kind: 'text', text: 'old' });
    const first = await browser.page('alice');
    await clock.pass(1_000);
    await first.end(false);
    server = new DemoServer(clock);
    server.append('zoe', 'alice', { kind: 'text', text: 'new' });
    server.refusesToken = '1';
    const second = await browser.page('alice', 'zoe');
    await clock.pass(1_000);
    expect(textsOf(second, 'zoe')).toEqual(['new']);
    expect(server.asked.filter((what) => what.startsWith('sync'))).toEqual(['sync 1', 'sync 1']);
  });

  it('forgets how far it had come when the server was put back to an older day', async () => {
    const browser = new Browser();
    for (let at = 1; at <= 5; at += 1) server.append('bob', 'alice', { kind: 'text', text: `lost ${at}` });
    const alice = await browser.page('alice', 'bob');
    alice.seen('bob', 5);
    await clock.pass(1_000);
    server.goDown();
    alice.send('bob', 'written meanwhile');
    await clock.pass(1_000);

    const older = new DemoServer(clock);
    for (let at = 1; at <= 6; at += 1) older.append('bob', 'alice', { kind: 'text', text: `new ${at}` });
    server.becomes(older);
    server.refusesToken = '5';
    browser.isLooking = false;
    server.comeBack();
    await clock.pass(1_000);
    expect(textsOf(alice, 'bob')).toEqual([...Array.from({ length: 6 }, (_, at) => `new ${at + 1}`), 'written meanwhile']);
    // Nobody has seen these: what was read is another past.
    expect(server.standing('alice', 'bob').my_read).toBe(0);
    expect(bobOf(alice)).toMatchObject({ myRead: 0, read: 0, top: 7 });

    server.append('bob', 'alice', { kind: 'text', text: 'news' });
    await clock.pass(1_000);
    expect(textsOf(alice, 'bob')?.at(-1)).toBe('news');
    await alice.end(false);
    const again = await browser.page('alice', 'bob');
    expect(bobOf(again).myRead).toBe(0);
  });

  it('lets whoever is editing write on while an edit is saved', async () => {
    server = new DemoServer(clock, 1_000);
    const alice = await new Browser().page('alice', 'bob');
    await clock.pass(5_000);
    alice.send('bob', 'one');
    alice.send('bob', 'two');
    await clock.pass(5_000);
    alice.startEditing('bob', 1);
    alice.editDraft('bob', 'uno');
    const saved = [alice.saveEdit('bob'), alice.saveEdit('bob')];
    alice.editDraft('bob', 'uno, and more');
    await clock.pass(5_000);
    await Promise.all(saved);
    expect(textsOf(alice, 'bob')).toEqual(['uno', 'two']);
    expect(server.asked.filter((what) => what === 'edit')).toHaveLength(1);
    expect(bobOf(alice).editing).toEqual({ seq: 1, text: 'uno, and more' });
    const again = alice.saveEdit('bob');
    alice.startEditing('bob', 2);
    await clock.pass(5_000);
    await again;
    expect(bobOf(alice).editing).toEqual({ seq: 2, text: 'two' });
  });

  it('keeps what was written before the program was there, should the page be closed', async () => {
    const browser = new Browser();
    const sdk = Object.getOwnPropertyDescriptor(DemoServer.prototype, 'sdk')!;
    Object.defineProperty(server, 'sdk', { get: () => new Promise(() => {}), configurable: true });
    const first = await browser.page('alice', 'bob');
    first.send('bob', 'in haste');
    await clock.pass(1_000);
    await first.end(false);
    Object.defineProperty(server, 'sdk', sdk);
    const second = await browser.page('alice', 'bob');
    expect(bobOf(second).outgoing).toMatchObject([{ text: 'in haste', failure: 'the page was closed too early' }]);
    second.retry('bob', bobOf(second).outgoing[0]!.id);
    await clock.pass(1_000);
    expect(textsOf(second, 'bob')).toEqual(['in haste']);
    await second.end(false);
    expect(bobOf(await browser.page('alice', 'bob')).outgoing).toEqual([]);
  });

  it('leaves nothing behind when the user logs out, whatever still comes', async () => {
    const browser = new Browser();
    for (let at = 1; at <= 5; at += 1) server.append('bob', 'alice', { kind: 'text', text: `text ${at}` });
    const alice = await browser.page('alice', 'bob');
    await clock.pass(1_000);
    alice.draft('bob', 'a draft');
    alice.send('bob', 'mine');
    await clock.pass(10);
    alice.startEditing('bob', 6);
    alice.seen('bob', 5);
    const ended = alice.end(true);
    server.append('bob', 'alice', { kind: 'text', text: 'late' });
    await clock.pass(1_000);
    await ended;
    const cache = await openCache('alice', browser.databases);
    expect(await cache.load()).toEqual({ conversations: [], failed: [] });
    expect((await cache.page('bob', undefined, 10)).entries).toEqual([]);
    expect(browser.storage.length).toBe(0);
  });
});
