//! For tests: a clock that goes when it is told to, a server at the other end of a link, and locks of several tabs.

import type { Clock, Envelope } from './api.js';
import type { Locks } from './indexed-db.js';
import type { Answer, Link, LinkEvent, Login, Transport } from './transport.js';

export class FakeClock implements Clock {
  time = 1_795_456_800_000;
  /** By how much somebody set it. What waits does not care. */
  setMs = 0;
  /** What {@link random} gives. */
  dice = 0.5;
  #timers = new Set<{ at: number; call: () => void }>();

  now(): number {
    return this.time + this.setMs;
  }

  random(): number {
    return this.dice;
  }

  after(ms: number, call: () => void): () => void {
    const timer = { at: this.time + ms, call };
    this.#timers.add(timer);
    return () => void this.#timers.delete(timer);
  }

  get timers(): number {
    return this.#timers.size;
  }

  /** As for a page that is gone. */
  forget(): void {
    this.#timers.clear();
  }

  /** Lets so much time pass, and everything happen in its order. */
  async pass(ms: number): Promise<void> {
    const until = this.time + ms;
    await settled();
    for (;;) {
      const [next] = [...this.#timers].filter(({ at }) => at <= until).sort((a, b) => a.at - b.at);
      if (!next) break;
      this.#timers.delete(next);
      this.time = Math.max(this.time, next.at);
      next.call();
      await settled();
    }
    this.time = until;
  }
}

/** Everything that needs no time has happened. */
export async function settled(): Promise<void> {
  for (let turn = 0; turn < 5; turn++) await new Promise((resolve) => setImmediate(resolve));
}

export interface FakePublish {
  topic: string;
  text: string;
  responseTopic: string | undefined;
  answer: (answer: Answer) => void;
}

export class FakeLink implements Link {
  filters: { topic: string; qos: 0 | 1 }[] = [];
  published: FakePublish[] = [];
  unanswered: { topic: string; text: string }[] = [];
  acknowledged: number[] = [];
  pings = 0;
  ended: 'said goodbye' | 'at once' | undefined;
  #packet = 0;

  constructor(
    readonly login: Login,
    readonly tell: (event: LinkEvent) => void,
  ) {}

  subscribe(filters: { topic: string; qos: 0 | 1 }[]): void {
    this.filters = filters;
  }

  publish(topic: string, text: string, responseTopic: string | undefined, answer: (answer: Answer) => void): void {
    this.published.push({ topic, text, responseTopic, answer });
  }

  publishUnanswered(topic: string, text: string): void {
    this.unanswered.push({ topic, text });
  }

  acknowledge(packet: number): void {
    this.acknowledged.push(packet);
  }

  ping(): void {
    this.pings += 1;
  }

  close(): void {
    this.ended = 'said goodbye';
  }

  end(): void {
    this.ended = 'at once';
  }

  // ---- the server's side

  accept(allows: { publishesPerS?: number; keepAliveS?: number } = {}): void {
    this.tell({ is: 'connected', ...allows });
    this.tell({ is: 'subscribed' });
  }

  break(message = 'the connection broke'): void {
    this.tell({ is: 'ended', ended: { why: 'lost', message } });
  }

  /** At QoS 1; gives the packet identifier. */
  deliver(topic: string, payload: unknown, waited = false): number {
    const packet = ++this.#packet;
    this.tell({ is: 'published', published: { topic, text: asText(payload), waited, packet } });
    return packet;
  }

  /** At QoS 0. */
  inform(topic: string, payload: unknown): void {
    this.tell({ is: 'published', published: { topic, text: asText(payload), waited: false } });
  }

  /** Answers a request. */
  reply(publish: FakePublish | undefined, answer: object): void {
    const { ref } = JSON.parse(publish?.text ?? '{}') as { ref?: unknown };
    this.inform(publish?.responseTopic ?? '', { ref, ...answer });
  }
}

function asText(payload: unknown): string {
  return typeof payload === 'string' ? payload : JSON.stringify(payload);
}

export class FakeTransport implements Transport {
  links: FakeLink[] = [];

  open(login: Login, tell: (event: LinkEvent) => void): FakeLink {
    const link = new FakeLink(login, tell);
    this.links.push(link);
    return link;
  }

  get link(): FakeLink {
    const last = this.links.at(-1);
    if (!last) throw new Error('there was no attempt to connect');
    return last;
  }
}

export function text(from: string, to: string, seq: number, words = `${seq}`): Envelope {
  const conversation = [from, to].sort().join(':');
  return { v: 1, kind: 'text', conversation, seq, from, to, at: 1_795_456_800_000 + seq, text: words };
}

/** The locks of one machine; each tab has its own view of them, with which it dies. */
export class FakeLocks {
  #held = new Map<string, { tab: FakeTab; letGo: () => void }>();
  #waiting: { name: string; begin: () => void }[] = [];

  tab(): FakeTab {
    return new FakeTab(this);
  }

  get names(): string[] {
    return [...this.#held.keys()];
  }

  async hold<T>(tab: FakeTab, name: string, whileHeld: () => Promise<T>): Promise<T> {
    while (this.#held.has(name)) await new Promise<void>((begin) => this.#waiting.push({ name, begin }));
    return new Promise<T>((resolve, reject) => {
      const letGo = () => {
        if (this.#held.get(name)?.letGo !== letGo) return;
        this.#held.delete(name);
        const next = this.#waiting.findIndex((waiting) => waiting.name === name);
        if (next >= 0) this.#waiting.splice(next, 1)[0]?.begin();
      };
      this.#held.set(name, { tab, letGo });
      whileHeld().then(resolve, reject).finally(letGo);
    });
  }

  die(tab: FakeTab): void {
    for (const lock of [...this.#held.values()]) if (lock.tab === tab) lock.letGo();
  }
}

export class FakeTab implements Locks {
  constructor(readonly locks: FakeLocks) {}

  request<T>(name: string, whileHeld: () => Promise<T>): Promise<T> {
    return this.locks.hold(this, name, whileHeld);
  }

  async query(): Promise<{ held: { name: string }[] }> {
    return { held: this.locks.names.map((name) => ({ name })) };
  }

  die(): void {
    this.locks.die(this);
  }
}
