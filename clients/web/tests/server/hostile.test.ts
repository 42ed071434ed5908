//! Servers that are none: mqtt.js and the SDK above it take whatever comes. What is thrown and not caught fails the test.

import { type AddressInfo, createServer, type Server, type Socket } from 'node:net';

import { afterEach, expect, test, vi } from 'vitest';
import { WebSocketServer } from 'ws';

import { type ChatEvent, type Client, type Options, start } from '../../src/sdk/index.js';

const closing: (() => Promise<unknown> | unknown)[] = [];

afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

async function login(server: string, options: Partial<Options> = {}): Promise<{ client: Client; events: ChatEvent[] }> {
  const client = await start({ server, user: 'alice', device: 'web-1', retry: { minMs: 1, maxMs: 1 }, ...options });
  closing.push(() => client.close());
  const events: ChatEvent[] = [];
  client.listen((event) => void events.push(event));
  return { client, events };
}

const lost = (events: ChatEvent[]) =>
  events.flatMap((event) => (event.type === 'connection' && event.connection.state === 'lost' ? [event.connection.reason] : []));

function until(is: () => boolean): Promise<unknown> {
  return vi.waitUntil(is, { timeout: 30_000, interval: 5 });
}

async function listening(server: Server): Promise<string> {
  const sockets = new Set<Socket>();
  server.on('connection', (socket) => {
    sockets.add(socket);
    socket.on('error', () => {}).on('close', () => sockets.delete(socket));
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  closing.push(() => {
    for (const socket of sockets) socket.destroy();
    server.close();
  });
  return `ws://127.0.0.1:${(server.address() as AddressInfo).port}/mqtt`;
}

/** Dice that fall the same way again. */
function dice(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

/** Speaks WebSocket, and says these packets when it is logged in to; then it stays, or goes. */
async function speaking(packets: () => Uint8Array[], stays = true): Promise<string> {
  const server = new WebSocketServer({ host: '127.0.0.1', port: 0, handleProtocols: () => 'mqtt' });
  server.on('connection', (socket) => {
    socket.on('error', () => {});
    socket.once('message', () => {
      for (const packet of packets()) socket.send(packet);
      if (!stays) socket.close();
    });
  });
  await new Promise((resolve) => server.once('listening', resolve));
  closing.push(() => {
    for (const socket of server.clients) socket.terminate();
    server.close();
  });
  return `ws://127.0.0.1:${(server.address() as AddressInfo).port}/mqtt`;
}

const CONNACK = Uint8Array.of(0x20, 3, 0, 0, 0);
const SUBACK = Uint8Array.of(0x90, 7, 0, 1, 0, 0, 1, 1, 0);

function publish(topic: string, payload: string | Uint8Array, qos = 1, retain = 0): Uint8Array {
  const [name, body] = [Buffer.from(topic), Buffer.from(payload)];
  const rest = Buffer.concat([Uint8Array.of(name.length >> 8, name.length & 255), name, qos > 0 ? Uint8Array.of(0, 9, 0) : Uint8Array.of(0), body]);
  const length = [];
  for (let left = rest.length; ; left >>= 7) {
    length.push(left > 127 ? (left & 127) | 128 : left);
    if (left <= 127) break;
  }
  return Buffer.concat([Uint8Array.of(0x30 | (qos << 1) | retain, ...length), rest]);
}

test('nobody is there', async () => {
  const { events } = await login('ws://127.0.0.1:1/mqtt');
  await until(() => lost(events).length >= 3);
});

test('somebody is there who says nothing', async () => {
  const { events } = await login(await listening(createServer()), { connectTimeoutMs: 50 });
  await until(() => lost(events).length >= 3);
  expect(new Set(lost(events))).toEqual(new Set(['the server does not answer']));
});

test('somebody is there who speaks something else', async () => {
  for (const words of ['HTTP/1.1 404 Not Found\r\n\r\n', 'SSH-2.0-none\r\n', '\0\0\0\0']) {
    const { events } = await login(await listening(createServer((socket) => socket.once('data', () => socket.end(words)))));
    await until(() => lost(events).length >= 3);
  }
});

test('a server that answers a login in its own way', async () => {
  const answers = [[0x20, 3, 0, 0x87, 0], [0x20, 3, 0, 0x85, 0], [0x20, 3, 0, 0x84, 0], [0x20, 3, 0, 0x88, 0], [0x20, 2, 0, 0], [0x20, 0], [0x40, 2, 0, 1], [0xd0, 0], [0x90, 4, 0, 1, 0, 0x87]];
  const became: string[] = [];
  for (const bytes of answers) {
    const { client } = await login(await speaking(() => [Uint8Array.from(bytes)]), { connectTimeoutMs: 100 });
    await until(() => client.connection.state !== 'connecting');
    const { connection } = client;
    became.push(connection.state === 'closed' ? connection.why.code : connection.state);
  }
  expect(became.slice(0, 4)).toEqual(['login_refused', 'refused', 'refused', 'lost']);
  expect(became.slice(4).filter((state) => state === 'closed')).toEqual([]);
});

test('a subscription that is refused is for good, unless it may pass', async () => {
  const refused = (code: number) => speaking(() => [CONNACK, Uint8Array.of(0x90, 7, 0, 1, 0, 0, code, 1, 0)]);
  const [never, later] = [await login(await refused(0x87)), await login(await refused(0x97))];
  await until(() => never.client.connection.state === 'closed' && lost(later.events).length > 0);
  expect(never.client.connection).toMatchObject({ why: { code: 'refused' } });
});

test('payloads that are not what they should be', async () => {
  const payloads = ['', '{', 'null', Uint8Array.of(0xff, 0xfe), '{"v":1,"kind":"text","seq":1}', `{"v":1,"x":"${'y'.repeat(100_000)}"}`];
  const topics = ['chat/alice/inbox', 'chat/alice/sent', 'chat/alice/event/receipt', 'chat/alice/event/presence', 'chat/alice/res/x', 'chat/bob/inbox', '$SYS/x', '/'];
  const packets = topics.flatMap((topic) => payloads.flatMap((payload) => [publish(topic, payload), publish(topic, payload, 0, 1)]));
  const good = publish('chat/alice/inbox', '{"v":1,"kind":"text","conversation":"alice:bob","seq":1,"from":"bob","to":"alice","at":1,"text":"\\u202ehello"}', 1, 1);
  const { events } = await login(await speaking(() => [CONNACK, SUBACK, ...packets, good]));
  await until(() => events.some(({ type }) => type === 'message'));
  expect(events.filter(({ type }) => type !== 'connection')).toMatchObject([{ type: 'message', waited: true, message: { text: '\u202ehello' } }]);
  expect(lost(events)).toEqual([]);
});

test('what was not asked for ends the connection', async () => {
  const { events } = await login(await speaking(() => [CONNACK, SUBACK, publish('chat/alice/inbox', '{}', 2)]));
  await until(() => lost(events).length > 0);
  expect(lost(events)[0]).toBe('the server sends what was not asked for');
});

test('bytes from a die', { timeout: 60_000 }, async () => {
  const seed = Number(process.env.SEED ?? Date.now() % 1_000_000);
  console.log(`SEED=${seed}`);
  const roll = dice(seed);
  const bytes = (count: number) => Uint8Array.from({ length: count }, () => roll(256));
  const good = [CONNACK, SUBACK, publish('chat/alice/inbox', '{"v":1}'), Uint8Array.of(0x40, 2, 0, 1), Uint8Array.of(0xd0, 0), Uint8Array.of(0xe0, 1, 0x8b)];
  let times = 0;
  const server = await speaking(() => {
    times += 1;
    if (times % 3 === 0) return [bytes(1 + roll(60))];
    return [CONNACK, SUBACK, ...Array.from({ length: 6 }, () => {
      const packet = Uint8Array.from(good[roll(good.length)] as Uint8Array);
      for (let changes = roll(4); changes > 0; changes--) packet[roll(packet.length)] = roll(256);
      return packet;
    }), bytes(1 + roll(20))];
  }, false);
  // Whatever it is told, it goes on; a new one begins where the server has sent it away for good.
  for (let logins = 0; times < 500 && logins < 300; logins++) {
    const { client, events } = await login(server, { connectTimeoutMs: 30 });
    void client.queue('bob', 'hello');
    client.whoami().catch(() => {});
    await until(() => times >= 500 || client.connection.state === 'closed');
    expect(events.every(({ type }) => type !== 'message')).toBe(true);
    await client.close();
  }
});
