//! The web chat without a server: whoever logs in has some conversations, and bob answers. `?messages=10000` in the address makes the one with bob as long.

import { clock } from '../surroundings';
import type { Sdk } from '../session';
import { DemoServer } from './server';

const HOUR_MS = 3_600_000;

const TALK: readonly (readonly [0 | 1, string])[] = [
  [1, 'Morning! Did the new release go out?'],
  [0, 'Last night, around eleven.'],
  [0, 'No complaints so far, the dashboards look calm.'],
  [1, 'Great. I read the notes: https://example.com/releases/2.4?from=chat#notes'],
  [0, '> Did the new release go out?\n\nOne thing: the old clients have to log in once more.'],
  [1, 'That is fine.\nI will write to the others, so that nobody is surprised:\n – log in again\n – nothing else changes'],
  [1, '🎉'],
  [0, 'Thank you!'],
  [1, 'שלום, נתראה מחר ב־10:00?'],
  [0, 'Yes, see you at ten ☕'],
];

function fill(server: DemoServer, me: string, count: number): void {
  const start = clock.now() - 40 * HOUR_MS;
  const step = (39 * HOUR_MS) / Math.max(count, TALK.length);
  for (let at = 0; at < count - TALK.length; at += 1) {
    const mine = at % 7 < 3;
    const words = `${at + 1}: ${'a word and another '.repeat(at % 5 === 0 ? 6 : 1 + (at % 3))}`.trim();
    server.append(mine ? me : 'bob', mine ? 'bob' : me, { kind: 'text', text: words }, mine ? `f${at}` : undefined, start + at * step);
  }
  TALK.forEach(([who, text], at) => {
    const mine = who === 0;
    const when = clock.now() - (TALK.length - at) * (at < 5 ? 9 : 2) * 60_000;
    server.append(mine ? me : 'bob', mine ? 'bob' : me, { kind: 'text', text }, mine ? `t${at}` : undefined, when);
  });
  const record = server.record(me, 'bob');
  for (const user of [me, 'bob']) for (const cursor of [record.delivered, record.read]) cursor.set(user, record.entries.length - (user === me ? 0 : 1));

  server.append(me, 'zoe', { kind: 'text', text: 'Shall we have lunch on Thursday?' }, 'z1', clock.now() - 3 * HOUR_MS);
  server.append('zoe', me, { kind: 'text', text: 'I would love to.' }, undefined, clock.now() - 2.4 * HOUR_MS);
  server.append('zoe', me, { kind: 'text', text: 'The place at the corner?' }, undefined, clock.now() - 2.3 * HOUR_MS);
  server.append('eve', me, { kind: 'text', text: '<img src=x onerror=alert(1)>' }, undefined, clock.now() - 26 * HOUR_MS);
  server.append('eve', me, { kind: 'text', text: '\u202eevil\u202c \u200b\u200d and so on' }, undefined, clock.now() - 26 * HOUR_MS);
  server.record(me, 'eve').read.set(me, 2);
  for (const peer of ['zoe', 'eve']) server.record(me, peer).delivered.set(me, 9).set(peer, 9);
}

/** Bob reads at once, thinks, and says something. */
async function answer(server: DemoServer, me: string): Promise<void> {
  const bob = await server.start({ server: '', user: 'bob', device: 'demo' });
  bob.listen((event) => {
    if (event.type !== 'message' || event.waited || event.message.from !== me || event.message.kind !== 'text') return;
    const { seq, text } = event.message;
    clock.after(900, () => void bob.markRead(me, seq));
    clock.after(1_400, () => bob.typing(me, true));
    clock.after(3_400, () => {
      bob.typing(me, false);
      void bob.send(me, `You said “${text.slice(0, 80)}”.`);
    });
  });
}

const server = new DemoServer(clock, 120);
let isFilled = false;

export const demo: Sdk = {
  openOutbox: async (user) => server.outbox(user),
  start: async (options) => {
    if (!isFilled) {
      isFilled = true;
      fill(server, options.user, Number(new URLSearchParams(location.search).get('messages') ?? 300));
      await answer(server, options.user);
    }
    return server.start(options);
  },
};

Object.assign(globalThis, { demoServer: server });
