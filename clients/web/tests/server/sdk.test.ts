//! The SDK over mqtt.js and WebSocket against a real chatd.

import { execFileSync } from 'node:child_process';
import { createHmac, randomBytes } from 'node:crypto';
import { mkdtemp, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { IDBFactory } from 'fake-indexeddb';
import { afterEach, expect, test, vi } from 'vitest';

import { type ChatEvent, type Client, type Envelope, indexedDbOutbox, newDevice, type Options, start } from '../../src/sdk/index.js';
import page from '../../../../docs/web-sdk.md?raw';
import { Chatd, program } from './chatd.js';

const AsyncFunction = (async () => {}).constructor as new (...text: string[]) => (...values: unknown[]) => Promise<void>;

const closing: (() => Promise<void>)[] = [];

afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

async function chatd(settings?: Record<string, string | number>, folder?: string): Promise<Chatd> {
  const server = await Chatd.start(settings, folder);
  closing.push(() => server.end());
  return server;
}

interface User {
  client: Client;
  events: ChatEvent[];
}

async function login(server: Chatd, user: string, options: Partial<Options> = {}): Promise<User> {
  const client = await start({ server: server.server, user, device: newDevice(), retry: { minMs: 20, maxMs: 200 }, ...options });
  closing.push(() => client.close());
  const events: ChatEvent[] = [];
  client.listen((event) => void events.push(event));
  return { client, events };
}

async function connected(server: Chatd, user: string, options?: Partial<Options>): Promise<User> {
  const logged = await login(server, user, options);
  await until(() => logged.client.connection.state === 'connected');
  return logged;
}

function until(is: () => boolean, timeout = 30_000): Promise<void> {
  return vi.waitUntil(is, { timeout, interval: 10 }).then(() => {});
}

function messages({ events }: User): Envelope[] {
  return events.flatMap((event) => (event.type === 'message' ? [event.message] : []));
}

const words = (message: { kind: string; text?: string }) => message.text;

test('two users talk, and see what became of it', async () => {
  const server = await chatd();
  const alice = await connected(server, 'alice');
  const first = await alice.client.send('bob', 'are you there?');
  expect(first).toMatchObject({ seq: 1, receiverAway: true });
  expect(Math.abs(first.at - Date.now())).toBeLessThan(60_000);
  const bob = await connected(server, 'bob');
  const second = await alice.client.send('bob', 'hello, 世界 🙂');
  expect(second).toMatchObject({ seq: 2, receiverAway: false });
  await until(() => messages(bob).length === 2 && messages(alice).length === 2);
  const message = { v: 1, kind: 'text', conversation: 'alice:bob', from: 'alice', to: 'bob' };
  expect(bob.events.filter(({ type }) => type === 'message')).toEqual([
    { type: 'message', waited: true, message: { ...message, seq: 1, id: first.id, at: first.at, text: 'are you there?' } },
    { type: 'message', waited: false, message: { ...message, seq: 2, id: second.id, at: second.at, text: 'hello, 世界 🙂' } },
  ]);
  expect(messages(alice)).toEqual(messages(bob));

  bob.client.typing('alice', true);
  await until(() => alice.events.some((event) => event.type === 'typing' && event.from === 'bob' && event.on));
  await until(() => alice.events.some((event) => event.type === 'presence' && event.user === 'bob' && event.status === 'online'));
  await until(() => alice.events.some((event) => event.type === 'receipt' && event.with === 'bob' && event.delivered === 2));
  await bob.client.markRead('alice', 2);
  await until(() => alice.events.some((event) => event.type === 'receipt' && event.read === 2));
  await until(() => bob.events.some((event) => event.type === 'read' && event.with === 'alice' && event.seq === 2));
});

test('every request is answered as it is read', async () => {
  const server = await chatd();
  const [alice, bob] = [await connected(server, 'alice'), await connected(server, 'bob')];
  for (const text of ['one', 'two', 'three', 'four']) await alice.client.send('bob', text);
  await alice.client.edit('bob', 1, 'eins');
  await alice.client.unsend('bob', 2);
  await alice.client.delete('bob', 3);

  expect(await alice.client.whoami()).toMatchObject({ user: 'alice', message_bytes: 16_384 });
  const history = await alice.client.history('bob', {});
  expect(history.entries).toMatchObject([{ seq: 1, text: 'eins', edited_at: expect.any(Number) }, { seq: 2, unsent: true }, { seq: 4, text: 'four' }]);
  expect((await bob.client.history('alice', { before: 4 }, 2)).entries).toMatchObject([{ seq: 2 }, { seq: 3 }]);
  expect(await bob.client.history('alice', { after: 2 }, 1)).toMatchObject({ entries: [{ seq: 3 }], more: true });
  const { conversations } = await bob.client.conversations();
  expect(conversations).toMatchObject([{ with: 'alice', unread: 3, my_read: 0, blocked: false, last: { text: 'four' } }]);
  const sync = await alice.client.sync(undefined, 3);
  expect(sync).toMatchObject({ more: true });
  const rest = await alice.client.sync(sync.next);
  expect(rest).toMatchObject({ more: false, conversations: [{ with: 'bob', deleted: [3] }] });
  expect([...sync.entries, ...rest.entries].map(({ seq, kind }) => [seq, kind])).toEqual([
    [1, 'text'], [2, 'erased'], [3, 'text'], [4, 'text'], [5, 'edit'], [6, 'unsend'],
  ]);
  await until(() => messages(bob).some(({ kind }) => kind === 'unsend'));
  await bob.client.block('alice');
  expect(await bob.client.blocked()).toMatchObject([{ user: 'alice' }]);
  await bob.client.unblock('alice');
  expect(await bob.client.blocked()).toEqual([]);
  await expect(alice.client.edit('bob', 99, 'x')).rejects.toMatchObject({ code: 'invalid_seq' });
  await expect(alice.client.history('zoe', {})).rejects.toMatchObject({ code: 'unknown_conversation', message: expect.stringContaining('zoe') });
  await expect(alice.client.markRead('bob', 99)).rejects.toMatchObject({ code: 'invalid_seq' });
  await expect(alice.client.sync('nonsense')).rejects.toMatchObject({ code: 'invalid_token' });
});

test('a refusal has its code, however large the message is', async () => {
  const server = await chatd();
  const { client, events } = await connected(server, 'alice');
  await expect(client.send('bob', 'x'.repeat(16_385))).rejects.toMatchObject({ code: 'text_too_long' });
  await expect(client.send('bob', 'x'.repeat(3_000_000))).rejects.toMatchObject({ code: 'text_too_long' });
  await expect(client.send('alice', 'hello')).rejects.toMatchObject({ code: 'self_message' });
  await expect(client.send('bob', '')).rejects.toMatchObject({ code: 'empty_text' });
  await client.queue('bob', 'hello', 'm-1').then(({ stored }) => stored);
  await expect(client.queue('bob', 'other words', 'm-1').then(({ stored }) => stored)).rejects.toMatchObject({ code: 'id_conflict' });
  expect(await client.queue('bob', 'hello', 'm-1').then(({ stored }) => stored)).toMatchObject({ seq: 1 });
  expect(await client.send('bob', 'x'.repeat(16_384))).toMatchObject({ seq: 2 });
  expect(events.filter((event) => event.type === 'connection' && event.connection.state === 'lost')).toEqual([]);
});

test('a message is delivered when the program has taken it, and a slow program stands in nobody’s way', async () => {
  const server = await chatd();
  const [alice, bob] = [await connected(server, 'alice'), await connected(server, 'bob')];
  let take = () => {};
  const answers: string[] = [];
  bob.client.listen(async (event) => {
    if (event.type !== 'message') return;
    // What it asks meanwhile is answered.
    answers.push((await bob.client.whoami()).user);
    if (event.message.seq === 1) await new Promise<void>((resolve) => (take = resolve));
  });
  for (const text of ['one', 'two']) await alice.client.send('bob', text);
  await until(() => answers.length === 1);
  await bob.client.send('zoe', 'while I wait');
  expect((await alice.client.conversations()).conversations).toMatchObject([{ with: 'bob', delivered: 0 }]);
  take();
  await until(() => alice.events.some((event) => event.type === 'receipt' && event.delivered === 2));
});

test('what a program did not take comes again', async () => {
  const complaint = vi.spyOn(console, 'error').mockImplementation(() => {});
  const server = await chatd();
  const [alice, bob] = [await connected(server, 'alice'), await connected(server, 'bob')];
  let fails = 2;
  bob.client.listen((event) => {
    if (event.type === 'message' && event.message.seq === 2 && fails-- > 0) throw new Error('the disk is full');
  });
  for (const text of ['one', 'two', 'three']) await alice.client.send('bob', text);
  await until(() => alice.events.some((event) => event.type === 'receipt' && event.delivered === 3));
  expect(messages(bob).filter(({ seq }) => seq === 2)).toHaveLength(3);
  expect(messages(bob).filter(({ seq }) => seq === 1)).toHaveLength(1);
  complaint.mockRestore();
});

test('more requests than the server takes at once', async () => {
  const server = await chatd({ 'limits.receive_maximum': 4 });
  const { client, events } = await connected(server, 'alice');
  await client.send('bob', 'hello');
  const asked = await Promise.all(Array.from({ length: 200 }, () => client.history('bob', {})));
  expect(asked.every(({ entries }) => entries.length === 1)).toBe(true);
  expect(events.filter((event) => event.type === 'connection' && event.connection.state === 'lost')).toEqual([]);
});

test('it is no faster than the server allows', async () => {
  const server = await chatd({ 'limits.publishes_per_s': 40 });
  const [alice, bob] = [await login(server, 'alice'), await connected(server, 'bob')];
  const begun = Date.now();
  const sending = Array.from({ length: 100 }, (_, number) => alice.client.send('bob', `${number}`));
  expect((await Promise.all(sending)).map(({ seq }) => seq)).toEqual(Array.from({ length: 100 }, (_, at) => at + 1));
  expect(Date.now() - begun).toBeGreaterThan(1_500);
  await until(() => messages(bob).length === 100);
  expect(messages(bob).map(words)).toEqual(Array.from({ length: 100 }, (_, number) => `${number}`));
});

test('a device is of one program', async () => {
  const server = await chatd();
  const first = await connected(server, 'alice', { device: 'web-1' });
  const second = await connected(server, 'alice', { device: 'web-1' });
  await until(() => first.client.connection.state === 'closed');
  expect(first.client.connection).toMatchObject({ why: { code: 'taken_over' } });
  expect(second.client.connection).toEqual({ state: 'connected' });
  await connected(server, 'alice');
  expect(second.client.connection).toEqual({ state: 'connected' });
});

test('passwords and tokens', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'chatd-web-'));
  const [users, key] = [join(folder, 'users'), join(folder, 'key')];
  execFileSync(program(), ['passwd', 'add', 'alice', '--file', users], { input: 'correct horse\n' });
  const secret = randomBytes(48).toString('base64');
  await writeFile(key, secret, { mode: 0o600 });
  const server = await chatd({ 'auth.mode': 'required', 'auth.password_file': users, 'auth.jwt_key_file': key }, folder);

  await connected(server, 'alice', { password: 'correct horse' });
  const wrong = await login(server, 'alice', { password: 'battery staple' });
  await until(() => wrong.client.connection.state === 'closed');
  expect(wrong.client.connection).toMatchObject({ why: { code: 'login_refused' } });

  const part = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url');
  const token = vi.fn(async () => {
    const claims = `${part({ alg: 'HS256', typ: 'JWT' })}.${part({ sub: 'bob', exp: Math.floor(Date.now() / 1_000) + 600 })}`;
    return `${claims}.${createHmac('sha256', secret).update(claims).digest('base64url')}`;
  });
  const bob = await connected(server, 'bob', { token });
  await server.kill();
  await until(() => bob.client.connection.state === 'lost');
  await server.run();
  await until(() => bob.client.connection.state === 'connected');
  expect(token.mock.calls.length).toBeGreaterThanOrEqual(2);
  const stale = vi.fn(async () => 'no.token.atall');
  const eve = await login(server, 'eve', { token: stale });
  await until(() => eve.client.connection.state === 'closed');
  expect(stale).toHaveBeenCalledTimes(3);
});

test('the server is killed again and again: nothing is lost, doubled or out of order', { timeout: 120_000 }, async () => {
  const COUNT = 400;
  const server = await chatd({ 'limits.user_publishes_per_s': 0 });
  const outbox = indexedDbOutbox({ name: 'outbox of alice', indexedDB: new IDBFactory(), locks: null });
  const [alice, bob] = [await login(server, 'alice', { outbox }), await login(server, 'bob')];
  /** As a program that keeps a copy: what comes live, and what it missed after each reconnect. */
  const copy = new Map<number, Envelope>();
  const took = new Map<number, number>();
  let since: string | undefined;
  let synced = Promise.resolve();
  const sync = async () => {
    for (let more = true; more; ) {
      const page = await bob.client.sync(since);
      for (const entry of page.entries) copy.set(entry.seq, entry);
      ({ next: since, more } = page);
    }
  };
  bob.client.listen((event) => {
    if (event.type === 'connection' && event.connection.state === 'connected') synced = synced.then(sync).catch(() => {});
    if (event.type !== 'message') return;
    copy.set(event.message.seq, event.message);
    took.set(event.message.seq, (took.get(event.message.seq) ?? 0) + 1);
  });

  const sending: Promise<unknown>[] = [];
  for (let number = 0; number < COUNT; number++) {
    if (number % 80 === 40) await until(() => alice.client.connection.state === 'connected' && bob.client.connection.state === 'connected');
    const queued = await alice.client.queue('bob', `m-${number}`);
    sending.push(queued.stored);
    if (number % 80 === 50) {
      // In the midst of what is on its way.
      expect(alice.client.waiting().length).toBeGreaterThan(0);
      await server.kill();
      await server.run();
    }
  }
  await Promise.all(sending);
  expect(alice.client.waiting()).toEqual([]);
  expect(alice.events.filter((event) => event.type === 'connection' && event.connection.state === 'connected')).toHaveLength(6);

  const expected = Array.from({ length: COUNT }, (_, number) => `m-${number}`);
  const history: (string | undefined)[] = [];
  for (let after = 0, more = true; more; ) {
    const page = await alice.client.history('bob', { after }, 200);
    history.push(...page.entries.map(words));
    after = page.entries.at(-1)?.seq ?? after;
    ({ more } = page);
  }
  expect(history).toEqual(expected);

  await until(() => copy.size === COUNT);
  await synced;
  expect([...copy].sort(([a], [b]) => a - b).map(([, entry]) => words(entry as { kind: string; text?: string }))).toEqual(expected);
  expect([...took.values()].every((times) => times === 1)).toBe(true);
  expect([...took.keys()]).toEqual([...took.keys()].sort((a, b) => a - b));
});

test('a page that dies leaves its messages to the next, and each is stored once', async () => {
  const server = await chatd();
  const bob = await connected(server, 'bob');
  const indexedDB = new IDBFactory();
  const outbox = () => indexedDbOutbox({ name: 'outbox of alice', indexedDB, locks: null });
  const first = await connected(server, 'alice', { outbox: outbox() });
  await first.client.send('bob', 'm-0');
  await server.kill();
  for (let number = 1; number <= 30; number++) await first.client.queue('bob', `m-${number}`);
  // Both have all of them, as if neither could tell that the other lives.
  const second = await login(server, 'alice', { outbox: outbox() });
  expect(second.client.waiting()).toHaveLength(30);
  await server.run();
  await until(() => first.client.waiting().length === 0 && second.client.waiting().length === 0);
  await until(() => messages(bob).length === 31);
  expect(messages(bob).map(words)).toEqual(Array.from({ length: 31 }, (_, number) => `m-${number}`));
  expect(second.events.filter(({ type }) => type === 'stored')).toHaveLength(30);
  expect(await outbox().load()).toEqual([]);
});

test('the example of docs/web-sdk.md', async () => {
  const server = await chatd();
  const bob = await connected(server, 'bob');
  bob.client.listen(async (event) => {
    if (event.type === 'message' && event.message.from === 'alice') await bob.client.send('alice', 'hello, too');
  });
  const [, example = ''] = /```js\n(.*?)```/s.exec(page) ?? [];
  const body = example.replace(/^import .*$/m, '').replace('ws://127.0.0.1:8080/mqtt', server.server);
  const sdk = { start: async (options: Options) => (alice = await start(options)), newDevice, indexedDbOutbox };
  let alice: Client | undefined;
  const said: string[] = [];
  vi.stubGlobal('indexedDB', new IDBFactory());
  try {
    await new AsyncFunction(...Object.keys(sdk), 'console', body)(...Object.values(sdk), { log: (line: string) => said.push(line) });
    await until(() => said.length >= 3);
  } finally {
    await alice?.close();
    vi.unstubAllGlobals();
  }
  expect(said.toSorted()).toEqual(['alice: hello', 'bob: hello, too', "on the server's disk as number 1"]);
});
