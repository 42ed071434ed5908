//! A chat server in memory, of the SDK's contract: for tests, and to work on the web chat without a server.
//!
//! It keeps what the protocol promises as far as a client can tell: seqs without gaps, cumulative receipts, texts as they stand, what was missed with `sync`.

import type { ChatEvent, Client, Clock, ConnectionState, Envelope, Listener, Outbox, Queued, Standing, Start, Stored, Text, Unsent } from '../../sdk/api';
import type { Sdk } from '../session';

interface Record {
  users: [string, string];
  entries: Envelope[];
  delivered: Map<string, number>;
  read: Map<string, number>;
  deleted: Map<string, Set<number>>;
  hidden: Map<string, Set<number>>;
}

/** Refused as the server would, or as the SDK does. */
export class Refusal extends Error {
  constructor(readonly code: string, message: string) {
    super(message);
  }
}

export class DemoServer {
  readonly records = new Map<string, Record>();
  readonly #log: Envelope[] = [];
  readonly #clients = new Set<DemoClient>();
  readonly #blocked = new Map<string, Set<string>>();
  readonly #outboxes = new Map<string, Unsent[]>();
  /** Requests that were asked, newest last. */
  readonly asked: string[] = [];
  isUp = true;
  /** Names that may come in; all if it is absent. */
  users?: Set<string>;
  passwords?: Map<string, string>;
  messageBytes = 16_384;
  /** The list comes with a token; servers before that did not tell one. */
  listsToken = true;
  /** A sync token that is not of this server. */
  refusesToken?: string;

  constructor(readonly clock: Clock, readonly latencyMs = 0) {}

  get sdk(): Sdk {
    return { start: this.start, openOutbox: async (user) => this.outbox(user) };
  }

  readonly start: Start = async (options) => {
    const client = new DemoClient(this, options.user, options.outbox ?? this.outbox(options.user), options.password);
    await client.begin();
    this.#clients.add(client);
    this.later(() => client.connect());
    return client;
  };

  outbox(user: string): Outbox {
    const waiting = this.#outboxes.get(user) ?? [];
    this.#outboxes.set(user, waiting);
    return {
      load: async () => [...waiting],
      add: async (unsent) => void waiting.push(unsent),
      remove: async (id) => {
        const at = waiting.findIndex((unsent) => unsent.id === id);
        if (at >= 0) waiting.splice(at, 1);
      },
    };
  }

  later(call: () => void): void {
    if (this.latencyMs === 0) queueMicrotask(call);
    else this.clock.after(this.latencyMs * (0.5 + this.clock.random()), call);
  }

  goDown(): void {
    this.isUp = false;
    for (const client of this.#clients) client.lose('the server is gone', this.clock.now() + 4_000);
  }

  comeBack(): void {
    this.isUp = true;
    for (const client of this.#clients) this.later(() => client.connect());
  }

  /** As if another's store were put in the place of its own. */
  becomes(other: DemoServer): void {
    this.records.clear();
    for (const [name, record] of other.records) this.records.set(name, record);
    this.#log.splice(0, Infinity, ...other.log());
  }

  forget(client: DemoClient): void {
    this.#clients.delete(client);
    this.presence(client.user);
  }

  record(one: string, other: string): Record {
    const users = [one, other].sort() as [string, string];
    const name = users.join(':');
    let record = this.records.get(name);
    if (!record) {
      record = { users, entries: [], delivered: new Map(), read: new Map(), deleted: new Map(), hidden: new Map() };
      this.records.set(name, record);
    }
    return record;
  }

  /** Stores and delivers. */
  append(from: string, to: string, what: { kind: 'text'; text: string } | { kind: 'edit'; target: number; text: string } | { kind: 'unsend'; target: number }, id?: string, at = this.clock.now()): Envelope {
    const record = this.record(from, to);
    const known = id !== undefined && record.entries.find((entry) => entry.id === id && entry.from === from);
    if (known) return known;
    const envelope = { v: 1, conversation: record.users.join(':'), seq: record.entries.length + 1, from, to, at, ...(id === undefined ? {} : { id }), ...what } as Envelope;
    record.entries.push(envelope);
    this.#log.push(envelope);
    if (this.#blocked.get(to)?.has(from)) {
      const hidden = record.hidden.get(to) ?? new Set();
      record.hidden.set(to, hidden.add(envelope.seq));
    }
    this.tell(from, { type: 'message', message: envelope, waited: false });
    if (!this.#blocked.get(to)?.has(from) && this.tell(to, { type: 'message', message: envelope, waited: false })) this.deliver(to, from, envelope.seq);
    return envelope;
  }

  /** Whether any device is there. */
  tell(user: string, event: ChatEvent): boolean {
    let isThere = false;
    for (const client of this.#clients) {
      if (client.user !== user || client.connection.state !== 'connected') continue;
      isThere = true;
      this.later(() => client.hear(event));
    }
    return isThere;
  }

  deliver(to: string, from: string, seq: number): void {
    const record = this.record(to, from);
    record.delivered.set(to, Math.max(seq, record.delivered.get(to) ?? 0));
    this.tell(from, this.receipt(to, record));
  }

  read(user: string, peer: string, seq: number): void {
    const record = this.record(user, peer);
    if (seq <= (record.read.get(user) ?? 0)) return;
    record.read.set(user, seq);
    record.delivered.set(user, Math.max(seq, record.delivered.get(user) ?? 0));
    this.tell(user, { type: 'read', with: peer, seq });
    this.tell(peer, this.receipt(user, record));
  }

  receipt(of: string, record: Record): ChatEvent {
    return { type: 'receipt', with: of, delivered: record.delivered.get(of) ?? 0, read: record.read.get(of) ?? 0 };
  }

  isOnline(user: string): boolean {
    return [...this.#clients].some((client) => client.user === user && client.connection.state === 'connected');
  }

  presence(user: string): void {
    const status = this.isOnline(user) ? 'online' : 'offline';
    for (const peer of this.peers(user)) {
      this.tell(peer, { type: 'presence', user, status, ...(status === 'online' ? {} : { last_seen: this.clock.now() }) });
    }
  }

  peers(user: string): string[] {
    return [...this.records.values()].filter(({ users }) => users.includes(user)).map(({ users }) => (users[0] === user ? users[1] : users[0]));
  }

  block(user: string, peer: string, isBlocked: boolean): void {
    const blocked = this.#blocked.get(user) ?? new Set();
    this.#blocked.set(user, blocked);
    if (isBlocked) blocked.add(peer);
    else blocked.delete(peer);
  }

  blocked(user: string): Set<string> {
    return this.#blocked.get(user) ?? new Set();
  }

  log(): readonly Envelope[] {
    return this.#log;
  }

  standing(user: string, peer: string): Standing {
    const record = this.record(user, peer);
    return {
      with: peer,
      delivered: record.delivered.get(peer) ?? 0,
      read: record.read.get(peer) ?? 0,
      my_read: record.read.get(user) ?? 0,
      blocked: this.blocked(user).has(peer),
    };
  }

  /** As they stand for the user. */
  texts(user: string, peer: string): Text[] {
    const record = this.record(user, peer);
    const texts = new Map<number, Text>();
    for (const entry of record.entries) {
      const target = entry.kind === 'text' || entry.kind === 'erased' ? undefined : texts.get(entry.target);
      if (entry.kind === 'text') texts.set(entry.seq, { ...entry });
      else if (entry.kind === 'edit' && target && !target.unsent) {
        target.text = entry.text;
        target.edited_at = entry.at;
      } else if (entry.kind === 'unsend' && target) {
        delete target.text;
        delete target.edited_at;
        target.unsent = true;
      }
    }
    return [...texts.values()].filter(({ seq }) => !record.deleted.get(user)?.has(seq) && !record.hidden.get(user)?.has(seq));
  }
}

class DemoClient implements Client {
  connection: ConnectionState = { state: 'connecting' };
  readonly #listeners = new Set<Listener>();
  readonly #waiting: Unsent[] = [];
  readonly #settle = new Map<string, { resolve(stored: Stored): void; reject(error: Error): void }>();

  constructor(readonly server: DemoServer, readonly user: string, readonly outbox: Outbox, readonly password?: string) {}

  async begin(): Promise<void> {
    this.#waiting.push(...(await this.outbox.load()));
  }

  connect(): void {
    if (this.connection.state === 'closed') return;
    if (!this.server.isUp) return this.lose('the server cannot be reached', this.server.clock.now() + 4_000);
    const { passwords } = this.server;
    if (passwords && passwords.get(this.user) !== this.password) {
      return this.#become({ state: 'closed', why: { code: 'login_refused', message: 'the name or the password is wrong' } });
    }
    this.#become({ state: 'connected' });
    this.server.presence(this.user);
    for (const peer of this.server.peers(this.user)) {
      const record = this.server.record(this.user, peer);
      const isOnline = this.server.isOnline(peer);
      this.hear({ type: 'presence', user: peer, status: isOnline ? 'online' : 'offline', ...(isOnline ? {} : { last_seen: record.entries.at(-1)?.at ?? 0 }) });
      const from = record.delivered.get(this.user) ?? 0;
      for (const message of record.entries.slice(from)) {
        if (message.from === peer && !record.hidden.get(this.user)?.has(message.seq)) this.hear({ type: 'message', message, waited: true });
      }
      if (record.entries.length > from) this.server.deliver(this.user, peer, record.entries.length);
    }
    for (const unsent of [...this.#waiting]) this.#publish(unsent);
  }

  lose(reason: string, retryAt: number): void {
    if (this.connection.state !== 'closed') this.#become({ state: 'lost', reason, retryAt });
  }

  #become(connection: ConnectionState): void {
    this.connection = connection;
    this.hear({ type: 'connection', connection });
  }

  hear(event: ChatEvent): void {
    for (const listener of this.#listeners) void listener(event);
  }

  listen(listener: Listener): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  async send(to: string, text: string): Promise<Stored> {
    return (await this.queue(to, text)).stored;
  }

  async queue(to: string, text: string, id = `d${Math.floor(this.server.clock.random() * 1e12)}`): Promise<Queued> {
    const unsent = { id, to, text, queuedAt: this.server.clock.now() };
    await this.outbox.add(unsent);
    const stored = new Promise<Stored>((resolve, reject) => this.#settle.set(id, { resolve, reject }));
    stored.catch(() => {});
    this.#waiting.push(unsent);
    if (this.connection.state === 'connected') this.server.later(() => this.#publish(unsent));
    return { ...unsent, stored };
  }

  #publish(unsent: Unsent): void {
    if (this.connection.state !== 'connected' || !this.#waiting.includes(unsent)) return;
    this.#waiting.splice(this.#waiting.indexOf(unsent), 1);
    void this.outbox.remove(unsent.id);
    const refusal = this.#refusal(unsent);
    if (refusal) {
      this.hear({ type: 'not_sent', unsent, error: refusal });
      this.#settle.get(unsent.id)?.reject(refusal);
      return;
    }
    const { seq, at } = this.server.append(this.user, unsent.to, { kind: 'text', text: unsent.text }, unsent.id);
    const stored = { id: unsent.id, seq, at, receiverAway: !this.server.isOnline(unsent.to) };
    this.hear({ type: 'stored', unsent, stored });
    this.#settle.get(unsent.id)?.resolve(stored);
  }

  #refusal({ to, text }: Unsent): Refusal | undefined {
    if (to === this.user) return new Refusal('self_message', 'nobody can write to themselves');
    if (this.server.users && !this.server.users.has(to)) return new Refusal('unknown_user', `there is no user ${to}`);
    if (new TextEncoder().encode(text).length > this.server.messageBytes) return new Refusal('text_too_long', 'the text is too long');
    return undefined;
  }

  waiting(): Unsent[] {
    return [...this.#waiting];
  }

  async discard(id: string): Promise<void> {
    const at = this.#waiting.findIndex((unsent) => unsent.id === id);
    if (at >= 0) this.#waiting.splice(at, 1);
    await this.outbox.remove(id);
  }

  async markRead(to: string, seq: number): Promise<void> {
    if (this.connection.state === 'connected') this.server.read(this.user, to, seq);
  }

  typing(to: string, on: boolean): void {
    this.server.tell(to, { type: 'typing', from: this.user, on });
  }

  history(peer: string, range: { before?: number } | { after: number }, limit = 50) {
    return this.#ask(`history ${peer} ${JSON.stringify(range)}`, () => {
      if (!this.server.records.has([this.user, peer].sort().join(':'))) throw new Refusal('unknown_conversation', `you have no conversation with ${peer}`);
      const texts = this.server.texts(this.user, peer);
      if ('after' in range) {
        const after = texts.filter(({ seq }) => seq > range.after);
        return { with: peer, entries: after.slice(0, limit), more: after.length > limit };
      }
      const before = texts.filter(({ seq }) => range.before === undefined || seq < range.before);
      return { with: peer, entries: before.slice(-limit), more: before.length > limit };
    });
  }

  conversations(before?: string, limit = 50) {
    return this.#ask('conversations', () => {
      const sync = before === undefined && this.server.listsToken ? { sync: String(this.server.log().length) } : {};
      const all = this.server.peers(this.user).map((peer) => {
        const texts = this.server.texts(this.user, peer);
        const standing = this.server.standing(this.user, peer);
        const mine = texts.findLast(({ from }) => from === this.user)?.seq ?? 0;
        const unread = texts.filter(({ from, seq }) => from === peer && seq > Math.max(standing.my_read, mine)).length;
        const last = texts.at(-1);
        return { ...standing, unread, ...(last ? { last } : {}) };
      });
      all.sort((a, b) => (b.last?.at ?? 0) - (a.last?.at ?? 0));
      const first = before === undefined ? 0 : Number(before);
      const next = first + limit < all.length ? { next: String(first + limit) } : {};
      return { conversations: all.slice(first, first + limit), ...next, ...sync };
    });
  }

  sync(since = '0', limit = 50) {
    return this.#ask(`sync ${since}`, () => {
      if (since === this.server.refusesToken) {
        delete this.server.refusesToken;
        throw new Refusal('invalid_token', 'start over');
      }
      const log = this.server.log();
      const from = Number(since);
      const page = log.slice(from, from + limit);
      const more = from + limit < log.length;
      const entries = page.filter((entry) => {
        if (entry.from !== this.user && entry.to !== this.user) return false;
        const peer = entry.from === this.user ? entry.to : entry.from;
        return !this.server.record(this.user, peer).hidden.get(this.user)?.has(entry.seq);
      });
      const conversations = more
        ? []
        : this.server.peers(this.user).map((peer) => {
            const deleted = this.server.record(this.user, peer).deleted.get(this.user);
            return { ...this.server.standing(this.user, peer), ...(deleted ? { deleted: [...deleted] } : {}) };
          });
      return { entries, conversations, next: String(from + page.length), more };
    });
  }

  whoami() {
    return this.#ask('whoami', () => ({ user: this.user, at: this.server.clock.now(), version: 'demo', message_bytes: this.server.messageBytes }));
  }

  edit(peer: string, seq: number, text: string) {
    return this.#ask('edit', () => void this.server.append(this.user, peer, { kind: 'edit', target: seq, text }));
  }

  unsend(peer: string, seq: number) {
    return this.#ask('unsend', () => void this.server.append(this.user, peer, { kind: 'unsend', target: seq }));
  }

  delete(peer: string, seq: number) {
    return this.#ask('delete', () => {
      const { deleted } = this.server.record(this.user, peer);
      deleted.set(this.user, (deleted.get(this.user) ?? new Set()).add(seq));
    });
  }

  block(user: string) {
    return this.#ask('block', () => this.server.block(this.user, user, true));
  }

  unblock(user: string) {
    return this.#ask('unblock', () => this.server.block(this.user, user, false));
  }

  blocked() {
    return this.#ask('blocked', () => [...this.server.blocked(this.user)].map((user) => ({ user, at: 0 })));
  }

  retryNow(): void {
    if (this.connection.state === 'lost') this.server.later(() => this.connect());
  }

  async close(): Promise<void> {
    this.#become({ state: 'closed', why: { code: 'by_us', message: 'closed' } });
    this.#listeners.clear();
    this.server.forget(this);
  }

  #ask<T>(what: string, how: () => T): Promise<T> {
    this.server.asked.push(what);
    return new Promise((resolve, reject) => {
      if (this.connection.state !== 'connected') return reject(new Refusal('closed', 'there is no connection'));
      this.server.later(() => {
        try {
          resolve(how());
        } catch (error) {
          reject(error as Error);
        }
      });
    });
  }
}
