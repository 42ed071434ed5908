//! A client against a server and a network of chance: connections break at any moment, answers are lost, the server is too busy, pages die.

import { expect, test } from 'vitest';

import type { Client, Envelope, Outbox, Unsent } from './api.js';
import { start } from './client.js';
import { FakeClock, type FakeLink, FakeTransport, settled, text } from './fakes.js';

const ROUNDS = 40;
const STEPS = 250;

/** Dice that fall the same way again. */
function dice(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

/** Stores an id once, delivers from the cursor of what was acknowledged, and answers what it was asked when it likes. */
class Server {
  /** What alice sent, as it is stored. */
  log: { id: string; text: string; seq: number }[] = [];
  /** What bob sends her. */
  inbox: Envelope[] = [];
  acknowledged = 0;
  #links = new Map<FakeLink, { taken: number; delivered: Envelope[]; acknowledged: number; from: number }>();

  /** One thing on this link, or none if there is nothing to do. */
  step(link: FakeLink, roll: (below: number) => number): void {
    let standing = this.#links.get(link);
    if (!standing) {
      link.accept(roll(2) ? { publishesPerS: 50 } : {});
      standing = { taken: 0, delivered: [], acknowledged: 0, from: this.acknowledged };
      this.#links.set(link, standing);
      return;
    }
    // Acknowledgements come in order, each once.
    const packets = link.acknowledged.slice(standing.acknowledged);
    for (const packet of packets) {
      expect(packet).toBe(++standing.acknowledged);
      const message = standing.delivered[packet - 1];
      if (message) this.acknowledged = Math.max(this.acknowledged, this.inbox.indexOf(message) + 1);
    }
    const next = this.inbox[standing.from + standing.delivered.length];
    if (next && roll(2)) {
      standing.delivered.push(next);
      link.deliver('chat/alice/inbox', next);
      return;
    }
    const publish = link.published[standing.taken];
    if (!publish) return;
    standing.taken += 1;
    if (roll(10) === 0) return publish.answer({ is: 'refused', code: roll(2) ? 'too_fast' : 'unavailable', message: 'later' });
    if (publish.topic.includes('/req/')) return link.reply(publish, { ok: { user: 'alice', at: 1, version: '1', message_bytes: 1 } });
    const id = publish.topic.split('/').at(-1) ?? '';
    const known = this.log.find((stored) => stored.id === id) ?? { id, text: publish.text, seq: this.log.length + 1 };
    if (!this.log.includes(known)) this.log.push(known);
    // The answer may be lost on the way: then it breaks.
    if (roll(12) === 0) link.break();
    else publish.answer({ is: 'stored', seq: known.seq, at: known.seq, receiverAway: false });
  }
}

async function round(seed: number): Promise<void> {
  const roll = dice(seed);
  const clock = new FakeClock();
  const transport = new FakeTransport();
  const server = new Server();
  const inside = new Map<string, Unsent>();
  const outbox: Outbox = {
    load: async () => [...inside.values()],
    add: async (unsent) => void inside.set(unsent.id, unsent),
    remove: async (id) => void inside.delete(id),
  };
  const written: string[] = [];
  /** What this page was told. */
  let told: number[] = [];
  const answers: Promise<unknown>[] = [];

  const open = async () => {
    const mine: number[] = [];
    told = mine;
    clock.dice = roll(100) / 100;
    const client = await start({ server: 'wss://chat.example.org', user: 'alice', device: 'web-1', clock, transport, outbox, requestTimeoutMs: 3_600_000 });
    client.listen(async (event) => {
      if (event.type !== 'message') return;
      for (let turns = roll(4); turns > 0; turns--) await null;
      mine.push(event.message.seq);
    });
    await settled();
    return client;
  };

  let client: Client = await open();
  for (let step = 0; step < STEPS; step++) {
    const what = roll(20);
    const link = transport.links.at(-1);
    if (what < 4) {
      const words = `m-${written.length}`;
      written.push(words);
      await client.queue('bob', words);
    } else if (what < 6) {
      server.inbox.push(text('bob', 'alice', server.inbox.length + 1));
    } else if (what === 6 && link && !link.ended) {
      link.break();
    } else if (what === 7) {
      await clock.pass(roll(3_000));
    } else if (what === 8 && roll(4) === 0) {
      answers.push(client.whoami());
    } else if (what === 9 && roll(10) === 0) {
      // The page dies; the next one has the same outbox.
      link?.end();
      clock.forget();
      client = await open();
      answers.length = 0;
    } else if (link && !link.ended) {
      server.step(link, roll);
    }
    if (roll(3) === 0) await settled();
    expect(told, `in order, each once`).toEqual([...new Set(told)].sort((a, b) => a - b));
  }

  for (let steps = 0; client.waiting().length > 0 || server.acknowledged < server.inbox.length; steps++) {
    expect(steps, 'it comes to an end').toBeLessThan(5_000);
    const link = transport.links.at(-1);
    if (link && !link.ended) server.step(link, roll);
    await (roll(2) ? clock.pass(500) : settled());
  }
  for (let steps = 0, asked = Promise.all(answers), done = false; !done; steps++) {
    expect(steps, 'every request is answered').toBeLessThan(5_000);
    void asked.then(() => (done = true));
    const link = transport.links.at(-1);
    if (link && !link.ended) server.step(link, roll);
    await clock.pass(100);
  }
  await settled();
  expect(server.log.map((stored) => stored.text)).toEqual(written);
  expect(inside.size).toBe(0);
  await client.close();
}

test('nothing is lost, doubled or out of order, whatever happens', { timeout: 60_000 }, async () => {
  const first = Number(import.meta.env.SEED ?? Date.now() % 1_000_000);
  for (let seed = first; seed < first + ROUNDS; seed++) {
    await round(seed).catch((error: unknown) => {
      throw new Error(`SEED=${seed}`, { cause: error });
    });
  }
});
