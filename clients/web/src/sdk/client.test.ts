import { afterEach, beforeEach, expect, test, vi } from 'vitest';

import { ChatError, type ChatEvent, type Client, type Options, type Outbox, RequestError, type SendError, type Unsent } from './api.js';
import { start } from './client.js';
import { FakeClock, FakeTransport, settled, text } from './fakes.js';
import type { Answer } from './transport.js';

const stored = (seq: number): Answer => ({ is: 'stored', seq, at: 1_795_456_800_000 + seq, receiverAway: false });
const refused = (code: string): Answer => ({ is: 'refused', code, message: `${code}, says the server` });
const id = (topic: string) => topic.split('/').at(-1);

let clock: FakeClock;
let transport: FakeTransport;
let events: ChatEvent[];

beforeEach(() => {
  clock = new FakeClock();
  transport = new FakeTransport();
  events = [];
});

afterEach(() => vi.restoreAllMocks());

async function begin(options: Partial<Options> = {}): Promise<Client> {
  const client = await start({ server: 'wss://chat.example.org/mqtt', user: 'alice', device: 'web-1', clock, transport, ...options });
  client.listen((event) => void events.push(event));
  await settled();
  return client;
}

async function connected(options: Partial<Options> = {}, allows = {}): Promise<Client> {
  const client = await begin(options);
  transport.link.accept(allows);
  await settled();
  return client;
}

/** Waits until it is tried again. */
async function nextAttempt(): Promise<void> {
  for (const { length } = transport.links; transport.links.length === length; ) await clock.pass(100);
}

async function again(): Promise<void> {
  await nextAttempt();
  transport.link.accept();
  await settled();
}

const states = () => events.flatMap((event) => (event.type === 'connection' ? [event.connection.state] : []));
/** Stores what is published on this connection, from this one on, as long as there is more. */
function storeAll(from = 0): string[] {
  for (let at = from; at < sent().length; at++) sent()[at]?.answer(stored(at + 1));
  return sent().slice(from).map(({ text }) => text);
}

const messages = () => events.flatMap((event) => (event.type === 'message' ? [event.message.seq] : []));
const sent = () => transport.link.published.filter(({ topic }) => topic.includes('/out/'));
const code = (promise: Promise<unknown>) => promise.then(() => 'fine', (error: SendError | RequestError) => error.code);

/** An outbox that shows what is in it. */
function shelf(...unsent: Unsent[]) {
  const inside = new Map(unsent.map((one) => [one.id, one]));
  const outbox: Outbox = {
    load: async () => [...inside.values()],
    add: async (one) => void inside.set(one.id, one),
    remove: async (id) => void inside.delete(id),
  };
  return { outbox, inside };
}

// ---- connecting

test('it logs in and listens to what is its own', async () => {
  const client = await begin({ password: 'correct horse' });
  expect(client.connection).toEqual({ state: 'connecting' });
  expect(transport.link.login).toEqual({ server: 'wss://chat.example.org/mqtt', user: 'alice', device: 'web-1', password: 'correct horse', keepAliveS: 60 });
  transport.link.tell({ is: 'connected' });
  expect(transport.link.filters).toEqual([
    { topic: expect.stringMatching(/^chat\/alice\/res\/[A-Za-z0-9_-]{22}$/), qos: 0 },
    { topic: 'chat/alice/inbox', qos: 1 },
    { topic: 'chat/alice/sent', qos: 1 },
    { topic: 'chat/alice/event/+', qos: 0 },
  ]);
  expect(client.connection.state).toBe('connecting');
  transport.link.tell({ is: 'subscribed' });
  expect(client.connection).toEqual({ state: 'connected' });
  await settled();
  expect(states()).toEqual(['connecting', 'connected']);
});

test('options that make no sense are refused at once', async () => {
  for (const options of [
    { server: 'chat.example.org' }, { server: 'https://chat.example.org' }, { server: 'wss://alice:horse@chat.example.org' }, { user: 'Alice' }, { user: 'a/b' },
    { device: '' }, { device: 'a\nb' }, { device: 'x'.repeat(257) },
  ]) await expect(begin(options), JSON.stringify(options)).rejects.toThrow(ChatError);
  expect(transport.links).toEqual([]);
});

test('an outbox that cannot be read is told at once', async () => {
  const outbox = { ...shelf().outbox, load: () => Promise.reject(new Error('the disk is gone')) };
  await expect(begin({ outbox })).rejects.toThrow('the disk is gone');
});

test('a lost connection is made again, after a random time that doubles', async () => {
  const client = await begin({ retry: { minMs: 100, maxMs: 1_000 } });
  const waits: number[] = [];
  for (let attempt = 1; attempt <= 6; attempt++) {
    transport.link.break();
    const { connection } = client;
    if (connection.state !== 'lost') throw new Error(`it is ${connection.state}`);
    expect(connection.reason).toBe('the connection broke');
    waits.push(connection.retryAt - clock.now());
    await clock.pass(connection.retryAt - clock.now() - 1);
    expect(transport.links).toHaveLength(attempt);
    await clock.pass(1);
    expect(transport.links).toHaveLength(attempt + 1);
  }
  expect(waits).toEqual([50, 100, 200, 400, 500, 500]);
  clock.dice = 0;
  transport.link.break();
  await clock.pass(0);
  expect(transport.links).toHaveLength(8);
  expect(transport.links.slice(0, -1).every(({ ended }) => ended === 'at once')).toBe(true);
});

test('after a good connection the first wait is the shortest again', async () => {
  const client = await begin({ retry: { minMs: 100, maxMs: 10_000 } });
  for (let attempt = 0; attempt < 5; attempt++) {
    transport.link.break();
    await clock.pass(10_000);
  }
  transport.link.accept();
  await clock.pass(20_000);
  transport.link.break();
  expect(client.connection).toMatchObject({ retryAt: clock.now() + 50 });
});

test('an attempt that is not answered is given up, and what it says later is not heard', async () => {
  const client = await begin({ connectTimeoutMs: 5_000 });
  const [first] = transport.links;
  await clock.pass(4_999);
  expect(client.connection.state).toBe('connecting');
  await clock.pass(1);
  expect(client.connection).toMatchObject({ state: 'lost', reason: 'the server does not answer' });
  first?.accept();
  expect(client.connection.state).toBe('lost');
});

test('trying at once', async () => {
  const client = await begin({ retry: { minMs: 100_000, maxMs: 100_000 } });
  transport.link.break();
  client.retryNow();
  await settled();
  expect(transport.links).toHaveLength(2);
  transport.link.accept();
  client.retryNow();
  expect(transport.link.pings).toBe(1);
  await clock.pass(4_999);
  expect(client.connection.state).toBe('connected');
  await clock.pass(1);
  expect(client.connection).toMatchObject({ state: 'lost', reason: 'the server does not answer' });
});

test('a silent server is noticed, one that answers is not', async () => {
  const client = await connected({ keepAliveS: 30 });
  await clock.pass(30_000);
  expect(transport.link.pings).toBe(1);
  transport.link.tell({ is: 'ponged' });
  await clock.pass(29_999);
  expect(client.connection.state).toBe('connected');
  await clock.pass(1);
  expect(transport.link.pings).toBe(2);
  await clock.pass(15_000);
  expect(client.connection.state).toBe('lost');
});

test('it pings as often as the server asks for', async () => {
  await connected({ keepAliveS: 30 }, { keepAliveS: 10 });
  await clock.pass(10_000);
  expect(transport.link.pings).toBe(1);
});

test('a clock that is set back makes nothing wait longer', async () => {
  const client = await begin({ retry: { minMs: 1_000, maxMs: 1_000 } });
  transport.link.break();
  clock.setMs -= 3_600_000;
  client.retryNow();
  await clock.pass(0);
  transport.link.accept();
  const late = code(client.whoami());
  clock.setMs -= 3_600_000;
  await clock.pass(30_000);
  expect(await late).toBe('timed_out');
});

// ---- logging in

test('the token is asked for before each connection', async () => {
  const token = vi.fn<() => Promise<string>>().mockResolvedValueOnce('one').mockRejectedValueOnce(new Error('the shop is closed')).mockResolvedValueOnce('three');
  const client = await begin({ token });
  expect(transport.link.login.password).toBe('one');
  transport.link.break();
  await clock.pass(125);
  expect(client.connection).toMatchObject({ state: 'lost', reason: 'no token: the shop is closed' });
  expect(transport.links).toHaveLength(1);
  await nextAttempt();
  expect(token).toHaveBeenCalledTimes(3);
  expect(transport.link.login.password).toBe('three');
});

test('a token that never comes is waited for no longer than for a server', async () => {
  const client = await begin({ token: () => new Promise(() => {}), connectTimeoutMs: 1_000 });
  await clock.pass(1_000);
  expect(client.connection.state).toBe('lost');
});

test('a token may be refused, but not three times', async () => {
  const client = await begin({ token: () => 'old' });
  const refuse = () => transport.link.tell({ is: 'ended', ended: { why: 'login_refused', message: 'not this token' } });
  refuse();
  expect(client.connection.state).toBe('lost');
  await again();
  transport.link.break();
  for (let times = 0; times < 3; times++) {
    await nextAttempt();
    refuse();
  }
  expect(client.connection).toEqual({ state: 'closed', why: { code: 'login_refused', message: 'not this token' } });
});

test('some ends are for good', async () => {
  for (const why of ['login_refused', 'refused', 'taken_over'] as const) {
    const client = await begin({ password: 'wrong' });
    const waits = client.queue('bob', 'hello');
    const { stored } = await waits;
    const answer = code(client.whoami());
    const read = code(client.markRead('bob', 1));
    transport.link.tell({ is: 'ended', ended: { why, message: 'a sentence' } });
    expect(client.connection).toEqual({ state: 'closed', why: { code: why, message: 'a sentence' } });
    expect(await Promise.all([code(stored), answer, read, code(client.send('bob', 'x')), code(client.whoami()), code(client.markRead('bob', 1))])).toEqual(
      Array(6).fill('closed'),
    );
    const { length } = transport.links;
    client.retryNow();
    await clock.pass(600_000);
    expect(transport.links).toHaveLength(length);
    expect(clock.timers).toBe(0);
    expect(states().at(-1)).toBe('closed');
  }
});

test('closing says goodbye once', async () => {
  const close = vi.fn();
  const client = await connected({ outbox: { ...shelf().outbox, close } });
  await Promise.all([client.close(), client.close()]);
  expect(transport.link.ended).toBe('said goodbye');
  expect(close).toHaveBeenCalledTimes(1);
  await settled();
  expect(events.at(-1)).toEqual({ type: 'connection', connection: { state: 'closed', why: { code: 'by_us', message: 'closed' } } });
  expect(clock.timers).toBe(0);
});

// ---- sending

test('a message is stored', async () => {
  const { outbox, inside } = shelf();
  const client = await connected({ outbox });
  const sending = client.send('bob', 'hello');
  await settled();
  const [publish] = sent();
  expect(publish).toMatchObject({ topic: expect.stringMatching(/^chat\/alice\/out\/bob\/[0-9a-f-]{36}$/), text: 'hello', responseTopic: undefined });
  expect([...inside.keys()]).toEqual([id(publish?.topic ?? '')]);
  expect(client.waiting()).toMatchObject([{ to: 'bob', text: 'hello', queuedAt: clock.now() }]);
  publish?.answer({ is: 'stored', seq: 7, at: 5, receiverAway: true });
  expect(await sending).toEqual({ id: id(publish?.topic ?? ''), seq: 7, at: 5, receiverAway: true });
  await settled();
  expect(inside.size).toBe(0);
  expect(client.waiting()).toEqual([]);
  expect(events.at(-1)).toMatchObject({ type: 'stored', unsent: { to: 'bob', text: 'hello' }, stored: { seq: 7 } });
});

test('what is written offline is sent in its order, and again under the same ids until it is stored', async () => {
  const client = await begin();
  for (let number = 0; number < 20; number++) await client.queue('bob', `${number}`);
  transport.link.accept();
  for (const at of [0, 1, 2]) sent()[at]?.answer(stored(at + 1));
  expect(sent().map(({ text }) => text)).toEqual(['0', '1', '2', '3']);
  const lost = sent()[3];
  transport.link.break();
  // Too late: that link is gone.
  lost?.answer(stored(4));
  await again();
  expect(sent().map(({ topic }) => topic)).toEqual([lost?.topic]);
  expect(storeAll()).toEqual(Array.from({ length: 17 }, (_, at) => `${at + 3}`));
  expect(client.waiting()).toEqual([]);
});

test('the order is that of the calls, however long the outbox takes for each', async () => {
  const gates: (() => void)[] = [];
  const client = await connected({ outbox: { ...shelf().outbox, add: () => new Promise((resolve) => gates.push(resolve)) } });
  const queued = ['a', 'b', 'c'].map((text) => client.queue('bob', text));
  gates[2]?.();
  gates[1]?.();
  await settled();
  expect(sent()).toEqual([]);
  gates[0]?.();
  await Promise.all(queued);
  expect(storeAll()).toEqual(['a', 'b', 'c']);
});

test('what the outbox does not take is not sent', async () => {
  const client = await connected({ outbox: { ...shelf().outbox, add: () => Promise.reject(new Error('it is full')) } });
  await expect(client.send('bob', 'hello')).rejects.toMatchObject({ code: 'outbox', message: expect.stringContaining('it is full') });
  expect(sent()).toEqual([]);
});

test('an id is of one message', async () => {
  const client = await connected();
  const first = client.queue('bob', 'hello', 'm-1');
  expect(await code(client.queue('bob', 'hello', 'm-1'))).toBe('same_id');
  await first;
  expect(await code(client.queue('bob', 'hello', 'm-1'))).toBe('same_id');
  expect(await code(client.queue('bob', 'hello', 'm 1'))).toBe('invalid_id');
  expect(sent()).toHaveLength(1);
});

test('no name can lead to another topic', async () => {
  const client = await connected();
  for (const peer of ['', 'Bob', 'bob/../eve', 'bob/#', '+', 'bob\0']) {
    expect(await code(client.send(peer, 'x'))).toBe('invalid_peer');
    expect(await code(client.markRead(peer, 1))).toBe('invalid_peer');
    expect(await code(client.history(peer, {}))).toBe('invalid_peer');
    client.typing(peer, true);
  }
  expect(await code(client.markRead('bob', 0))).toBe('invalid_seq');
  expect(transport.link.published).toEqual([]);
  expect(transport.link.unanswered).toEqual([]);
});

test('a refused message stays in the outbox until it is queued again or discarded', async () => {
  const { outbox, inside } = shelf();
  const client = await connected({ outbox });
  const { stored: outcome } = await client.queue('bob', 'hello', 'm-1');
  sent()[0]?.answer(refused('quota_exceeded'));
  await expect(outcome).rejects.toMatchObject({ code: 'quota_exceeded', message: 'quota_exceeded, says the server' });
  await settled();
  expect(events.at(-1)).toMatchObject({ type: 'not_sent', unsent: { id: 'm-1' }, error: { code: 'quota_exceeded' } });
  expect([...inside.keys()]).toEqual(['m-1']);
  expect(client.waiting()).toEqual([]);
  transport.link.break();
  await again();
  expect(sent()).toEqual([]);
  const second = await client.queue('bob', 'hello', 'm-1');
  sent().at(-1)?.answer(stored(1));
  expect(await second.stored).toMatchObject({ seq: 1 });
  await settled();
  expect(inside.size).toBe(0);

  await client.queue('bob', 'never mind', 'm-2');
  sent().at(-1)?.answer(refused('unknown_user'));
  await client.discard('m-2');
  expect(inside.size).toBe(0);
});

test('a message that waits can be discarded', async () => {
  const { outbox, inside } = shelf();
  const client = await begin({ outbox });
  const { stored: outcome } = await client.queue('bob', 'never mind', 'm-1');
  await client.queue('bob', 'hello', 'm-2');
  await client.discard('m-1');
  expect(await code(outcome)).toBe('discarded');
  transport.link.accept();
  expect(sent().map(({ text }) => text)).toEqual(['hello']);
  expect([...inside.keys()]).toEqual(['m-2']);
});

test('an acknowledgement without a number is no promise', async () => {
  const { outbox, inside } = shelf();
  const client = await connected({ outbox });
  const { stored: outcome } = await client.queue('bob', 'hello');
  sent()[0]?.answer({ is: 'done' });
  expect(await code(outcome)).toBe('refused');
  expect(inside.size).toBe(1);
});

test('what is too fast is tried again a little later, in order', async () => {
  const client = await connected();
  for (const text of ['a', 'b', 'c']) await client.queue('bob', text);
  sent()[0]?.answer(stored(1));
  sent()[1]?.answer(refused('too_fast'));
  await clock.pass(499);
  expect(sent().map(({ text }) => text)).toEqual(['a', 'b']);
  await clock.pass(1);
  expect(client.waiting()).toHaveLength(2);
  expect(storeAll(2)).toEqual(['b', 'c']);
});

test('it keeps to the rate that the server names', async () => {
  const client = await begin();
  for (let number = 0; number < 30; number++) await client.queue('bob', `${number}`);
  transport.link.accept({ publishesPerS: 10 });
  storeAll();
  expect(sent().length).toBeLessThanOrEqual(10);
  for (let tenths = 1; client.waiting().length > 0 && tenths < 100; tenths++) {
    await clock.pass(100);
    storeAll();
    expect(sent().length).toBeLessThanOrEqual(tenths + 10);
  }
  expect(sent()).toHaveLength(30);
});

test('an earlier run left messages', async () => {
  const week = 7 * 24 * 3_600_000;
  const unsent = (id: string, queuedAt: number) => ({ id, to: 'bob', text: id, queuedAt });
  const { outbox, inside } = shelf(unsent('old', clock.now() - week), unsent('a', clock.now() - 1_000), unsent('b', clock.now()));
  await connected({ outbox });
  storeAll();
  expect(sent().map(({ topic }) => topic)).toEqual(['chat/alice/out/bob/a', 'chat/alice/out/bob/b']);
  await settled();
  expect(events.slice(-3)).toMatchObject([
    { type: 'connection' },
    { type: 'stored', unsent: { id: 'a' } },
    { type: 'stored', unsent: { id: 'b' }, stored: { seq: 2 } },
  ]);
  expect(events.find(({ type }) => type === 'not_sent')).toMatchObject({ unsent: { id: 'old' }, error: { code: 'too_old' } });
  expect([...inside.keys()]).toEqual(['old']);
});

test('messages of a tab that is gone are sent by this one', async () => {
  let adopt: ((unsent: Unsent[]) => void) | undefined;
  const endAdopting = vi.fn();
  const client = await connected({
    outbox: {
      ...shelf().outbox,
      adopt(taken) {
        adopt = taken;
        return endAdopting;
      },
    },
  });
  const unsent = { id: 'm-1', to: 'bob', text: 'hello', queuedAt: clock.now() };
  adopt?.([unsent]);
  adopt?.([unsent]);
  expect(sent().map(({ topic }) => topic)).toEqual(['chat/alice/out/bob/m-1']);
  sent()[0]?.answer(stored(1));
  await settled();
  expect(events.at(-1)).toMatchObject({ type: 'stored', unsent });
  await client.close();
  expect(endAdopting).toHaveBeenCalledTimes(1);
});

// ---- receiving

test('a message is acknowledged when every listener is done with it, in the order of arrival', async () => {
  const client = await connected();
  const gates: (() => void)[] = [];
  client.listen((event) => (event.type === 'message' ? new Promise<void>((resolve) => gates.push(resolve)) : undefined));
  const packets = [transport.link.deliver('chat/alice/inbox', text('bob', 'alice', 1), true), transport.link.deliver('chat/alice/sent', text('alice', 'bob', 2))];
  await settled();
  expect(events.slice(-1)).toEqual([{ type: 'message', message: text('bob', 'alice', 1), waited: true }]);
  expect(transport.link.acknowledged).toEqual([]);
  gates[0]?.();
  await settled();
  expect(transport.link.acknowledged).toEqual(packets.slice(0, 1));
  gates[1]?.();
  await settled();
  expect(transport.link.acknowledged).toEqual(packets);
  expect(messages()).toEqual([1, 2]);
});

test('a program may ask and send while it is told of a message', async () => {
  const client = await connected();
  client.listen(async (event) => {
    if (event.type !== 'message') return;
    await Promise.all([client.whoami(), client.send('bob', 'got it')]);
  });
  const packet = transport.link.deliver('chat/alice/inbox', text('bob', 'alice', 1));
  await settled();
  const [message, request] = [...transport.link.published].sort((a, b) => a.topic.localeCompare(b.topic));
  message?.answer(stored(2));
  transport.link.reply(request, { ok: { user: 'alice', at: 1, version: '1', message_bytes: 1 } });
  await settled();
  expect(transport.link.acknowledged).toEqual([packet]);
});

test('what comes again after a reconnect is told once, and acknowledged', async () => {
  const client = await connected();
  let gate = () => {};
  client.listen((event) => (event.type === 'message' ? new Promise<void>((resolve) => (gate = resolve)) : undefined));
  transport.link.deliver('chat/alice/inbox', text('bob', 'alice', 1));
  await settled();
  transport.link.break();
  await again();
  const packet = transport.link.deliver('chat/alice/inbox', text('bob', 'alice', 1));
  await settled();
  expect(transport.link.acknowledged).toEqual([]);
  gate();
  await settled();
  expect(transport.link.acknowledged).toEqual([packet]);
  expect(messages()).toEqual([1]);
});

test('what a listener does not take is not acknowledged, and comes again on a new connection', async () => {
  vi.spyOn(console, 'error').mockImplementation(() => {});
  const client = await connected();
  let fails = true;
  client.listen((event) => {
    if (event.type === 'message' && fails) throw new Error('the disk is full');
  });
  transport.link.deliver('chat/alice/inbox', text('bob', 'alice', 1));
  transport.link.deliver('chat/alice/inbox', text('bob', 'alice', 2));
  await settled();
  expect(transport.links[0]?.acknowledged).toEqual([]);
  expect(events.filter(({ type }) => type === 'connection').at(-1)).toMatchObject({ connection: { state: 'lost', reason: 'the program did not take a message' } });
  fails = false;
  await again();
  const packets = [1, 2].map((seq) => transport.link.deliver('chat/alice/inbox', text('bob', 'alice', seq), true));
  await settled();
  expect(transport.link.acknowledged).toEqual(packets);
  expect(messages()).toEqual([1, 2, 1, 2]);
});

test('live events', async () => {
  await connected();
  const { link } = transport;
  link.inform('chat/alice/event/receipt', { with: 'bob', delivered: 5, read: 3 });
  link.inform('chat/alice/event/read', { with: 'bob', read: 4 });
  link.inform('chat/alice/event/typing', { from: 'bob', state: 'on' });
  link.inform('chat/alice/event/presence', { user: 'bob', status: 'offline', last_seen: 9 });
  await settled();
  expect(events.slice(2)).toEqual([
    { type: 'receipt', with: 'bob', delivered: 5, read: 3 },
    { type: 'read', with: 'bob', seq: 4 },
    { type: 'typing', from: 'bob', on: true },
    { type: 'presence', user: 'bob', status: 'offline', last_seen: 9 },
  ]);
});

test('typing is told while there is a connection', async () => {
  const client = await begin();
  client.typing('bob', true);
  transport.link.accept();
  client.typing('bob', true);
  client.typing('bob', false);
  expect(transport.link.unanswered).toEqual([{ topic: 'chat/alice/typing/bob', text: 'on' }, { topic: 'chat/alice/typing/bob', text: 'off' }]);
});

// ---- asking

test('answers find their requests, in whichever order they come', async () => {
  const client = await connected();
  const whoami = { user: 'alice', at: 1, version: '1', message_bytes: 16_384 };
  const [first, second, third] = [client.history('bob', { before: 9 }, 10), client.whoami(), client.block('eve')];
  const [history, who, block] = transport.link.published;
  expect([history, who, block].map((publish) => publish?.topic)).toEqual(['chat/alice/req/history', 'chat/alice/req/whoami', 'chat/alice/req/block']);
  expect(JSON.parse(history?.text ?? '')).toEqual({ ref: 1, with: 'bob', before: 9, limit: 10 });
  expect(history?.responseTopic).toBe(transport.link.filters[0]?.topic);
  history?.answer({ is: 'done' });
  transport.link.reply(block, { error: { code: 'unknown_user', message: 'there is no eve' } });
  transport.link.reply(who, { ok: whoami });
  transport.link.reply(who, { error: { code: 'unavailable', message: 'too late' } });
  transport.link.reply(history, { ok: { with: 'bob', entries: [text('bob', 'alice', 8)], more: false } });
  expect(await second).toEqual(whoami);
  expect(await first).toEqual({ with: 'bob', entries: [text('bob', 'alice', 8)], more: false });
  await expect(third).rejects.toMatchObject({ code: 'unknown_user', message: 'there is no eve' });
});

test('each request says what it asks', async () => {
  const client = await connected();
  const asked = [
    client.conversations('17.bob', 5), client.conversations(), client.sync('1.2', 200), client.sync(), client.history('bob', { after: 0 }), client.history('bob', {}),
    client.edit('bob', 3, 'hello!'), client.unsend('bob', 3), client.delete('bob', 3), client.unblock('eve'), client.blocked(),
  ];
  const id = expect.stringMatching(/^[0-9a-f-]{36}$/);
  expect(transport.link.published.map(({ topic, text }) => [topic.slice('chat/alice/req/'.length), JSON.parse(text)])).toEqual([
    ['conversations', { ref: 1, before: '17.bob', limit: 5 }], ['conversations', { ref: 2 }], ['sync', { ref: 3, since: '1.2', limit: 200 }], ['sync', { ref: 4 }],
    ['history', { ref: 5, with: 'bob', after: 0 }], ['history', { ref: 6, with: 'bob' }], ['edit', { ref: 7, with: 'bob', seq: 3, text: 'hello!', id }],
    ['unsend', { ref: 8, with: 'bob', seq: 3, id }], ['delete', { ref: 9, with: 'bob', seq: 3 }], ['unblock', { ref: 10, with: 'eve' }], ['blocked', { ref: 11 }],
  ]);
  void client.close();
  for (const request of asked) expect(await code(request as Promise<unknown>)).toBe('closed');
});

test('a request is asked again after a reconnect, and not for longer than it may take', async () => {
  const client = await connected({ requestTimeoutMs: 10_000, retry: { minMs: 100, maxMs: 100 } });
  const edit = client.edit('bob', 3, 'hello!');
  const first = transport.link.published[0];
  await clock.pass(5_000);
  transport.link.break();
  await clock.pass(100);
  transport.link.accept();
  expect(transport.link.published).toMatchObject([{ topic: 'chat/alice/req/edit', text: first?.text }]);
  const late = code(edit);
  await clock.pass(4_900);
  expect(await late).toBe('timed_out');
  transport.link.reply(first, { ok: { seq: 1, at: 1 } });
});

test('a request that cannot be read or taken is refused, one that the server is too busy for is asked again', async () => {
  const client = await connected();
  const refusedOne = code(client.whoami());
  transport.link.published[0]?.answer(refused('invalid_request'));
  expect(await refusedOne).toBe('invalid_request');
  const busy = client.blocked();
  transport.link.published[1]?.answer(refused('too_fast'));
  await clock.pass(500);
  expect(transport.link.published).toHaveLength(3);
  transport.link.reply(transport.link.published[2], { ok: { blocked: [] } });
  expect(await busy).toEqual([]);
});

test('an answer that makes no sense is an error, and no more', async () => {
  const client = await connected();
  for (const answer of [{}, { ok: null }, { ok: 7 }, { ok: { entries: 'x' } }, { error: 'no' }]) {
    const asked = code(client.history('bob', {}));
    transport.link.reply(transport.link.published.at(-1), answer);
    expect(await asked).toBe('answer');
  }
});

test('how far was read is said again until the server has it', async () => {
  const client = await begin();
  const [first, second] = [client.markRead('bob', 3), client.markRead('bob', 5)];
  transport.link.accept();
  expect(transport.link.published).toMatchObject([{ topic: 'chat/alice/read/bob', text: '5' }]);
  transport.link.published[0]?.answer(refused('unavailable'));
  await clock.pass(500);
  expect(transport.link.published).toHaveLength(2);
  transport.link.break();
  await again();
  transport.link.published[0]?.answer({ is: 'done' });
  await Promise.all([first, second]);
  const wrong = code(client.markRead('bob', 99));
  transport.link.published[1]?.answer(refused('invalid_seq'));
  expect(await wrong).toBe('invalid_seq');
});

// ---- a hostile server

test('nothing that a server says makes it throw, or call out what is not so', async () => {
  const client = await connected();
  const waits = client.queue('bob', 'hello');
  const { stored: outcome } = await waits;
  const asked = client.whoami();
  const { link } = transport;
  const own = link.filters[0]?.topic ?? '';
  const payloads: unknown[] = [
    '', 'null', '[]', '{', '\u0000', '"text"', '{"__proto__":{"polluted":true}}', '{"constructor":1,"v":1}', '['.repeat(50_000), { ref: '1', ok: {} }, { ref: 1.5 }, { ref: null, ok: {} },
    text('eve', 'zoe', 1), { ...text('bob', 'alice', 1), from: '../alice' }, { ...text('bob', 'alice', 1), kind: 'toString' }, { ...text('bob', 'alice', 1), seq: 2 ** 60 },
  ];
  const topics = ['chat/alice/inbox', 'chat/alice/sent', 'chat/alice/event/receipt', 'chat/alice/event/typing', 'chat/alice/event/', 'chat/alice/event/__proto__', 'chat/bob/inbox', '', '/', own];
  const packets: number[] = [];
  for (const topic of topics) {
    for (const payload of payloads) {
      packets.push(link.deliver(topic, payload));
      link.inform(topic, payload);
    }
    link.tell({ is: 'published', published: { topic, text: undefined, waited: false } });
  }
  link.tell({ is: 'connected', publishesPerS: 0 });
  link.tell({ is: 'subscribed' });
  link.tell({ is: 'ponged' });
  await settled();
  expect(events.map(({ type }) => type).filter((type) => type !== 'connection')).toEqual([]);
  expect(link.acknowledged).toEqual(packets);
  expect(({} as { polluted?: boolean }).polluted).toBeUndefined();
  sent()[0]?.answer(stored(1));
  link.reply(link.published.find(({ topic }) => topic.endsWith('whoami')), { ok: { user: 'alice', at: 1, version: '1', message_bytes: 1 } });
  expect(await outcome).toMatchObject({ seq: 1 });
  expect(await asked).toMatchObject({ user: 'alice' });
});
