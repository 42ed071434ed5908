//! The client: it owns the connection, the outbox and whatever waits. Everything that happens (a call, something from the link, the outbox, a deadline)
//! is taken in, and then {@link Driver.work} does all that can be done now and sets one timer. Decisions are made by {@link Sending},
//! {@link Deliveries}, {@link Requests} and {@link Reads}; it carries them out.

import {
  ChatError,
  type Client,
  type Clock,
  type Closed,
  type ConnectionState,
  type Listener,
  type Options,
  type Outbox,
  type Queued,
  RequestError,
  SendError,
  type Start,
  type Stored,
  type Unsent,
} from './api.js';
import { systemClock } from './clock.js';
import { Deliveries } from './deliveries.js';
import { mqttTransport } from './mqtt.js';
import { newId, randomName } from './names.js';
import { memoryOutbox } from './outbox.js';
import {
  isId,
  isUser,
  readAnswerTo,
  readBlocked,
  readConversations,
  readDone,
  readEnvelope,
  readEvent,
  readHistory,
  readJson,
  readSync,
  readWhoami,
} from './payloads.js';
import { Reads, Requests } from './requests.js';
import { Sending } from './sending.js';
import { Teller } from './teller.js';
import { type Answer, type Ended, isPassing, type Link, type LinkEvent, type Login, type Published, type Transport } from './transport.js';

/** Servers remember ids for seven days at least; an hour is left for clocks that differ. */
const ID_MEMORY_MS = (7 * 24 - 1) * 3_600_000;
/** A connection that lived so long was a good one: the next failure begins with the shortest wait again. */
const GOOD_CONNECTION_MS = 20_000;
/** Tokens that are refused one after the other before the login is. */
const TOKENS_MAX = 3;
/** How long requests wait that the server could not take. */
const REQUESTS_PAUSE_MS = 500;
/** How long a server may take to answer when somebody doubts that it is there. */
const DOUBT_MS = 5_000;
/** Browsers let the timers of a hidden page go once a minute: what the server is told must be longer. */
const KEEP_ALIVE_TOLD_MIN_S = 60;

export const start: Start = async (options) => {
  check(options);
  const outbox = options.outbox ?? memoryOutbox();
  const driver = new Driver(options, outbox);
  await driver.begin();
  return driver;
};

function check({ server, user, device }: Options): void {
  if (!isUser(user)) throw new ChatError('a user name has 1 to 64 of a-z, 0-9, _ and -, and begins with a letter or a digit');
  if (device === '' || new TextEncoder().encode(device).length > 256 || /[\u0000-\u001f\u007f]/.test(device)) {
    throw new ChatError('a device has a name of 1 to 256 bytes, without control characters');
  }
  let url: URL;
  try {
    url = new URL(server);
  } catch {
    throw new ChatError(`the server is like wss://host/mqtt, and not ${JSON.stringify(server)}`);
  }
  if (url.protocol !== 'ws:' && url.protocol !== 'wss:') throw new ChatError(`the server is like wss://host/mqtt, and not ${url.protocol}…`);
  if (url.username || url.password) throw new ChatError('user and password do not belong in the address of the server');
}

type Connection =
  /** To be made then. */
  | { is: 'none'; retryAt: number }
  /** It is being made: the token is asked for, then the server, then the subscriptions. */
  | { is: 'opening'; link: Link | undefined; deadline: number; publishesPerS: number | undefined; keepAliveS: number | undefined }
  | { is: 'open'; link: Link; since: number; pingEveryMs: number; pingAt: number; pongBy: number | undefined }
  | { is: 'over'; error: Closed };

interface Waiter {
  resolve(stored: Stored): void;
  reject(error: SendError): void;
}

class Driver implements Client {
  readonly user: string;
  readonly #options: Options;
  readonly #clock: Clock;
  readonly #transport: Transport;
  readonly #outbox: Outbox;
  readonly #requestTimeoutMs: number;
  readonly #connectTimeoutMs: number;
  readonly #retry: { minMs: number; maxMs: number };
  readonly #keepAliveS: number;
  /** Where answers to this client come. */
  readonly #responseTopic: string;

  #connection: Connection = { is: 'none', retryAt: 0 };
  #state: ConnectionState = { state: 'connecting' };
  /** Of the current link; what earlier ones tell is late. */
  #linkNumber = 0;
  #failures = 0;
  #loginsRefused = 0;

  readonly #sending = new Sending();
  /** On their way into the outbox. */
  readonly #queuing = new Set<string>();
  #queued: Promise<unknown> = Promise.resolve();
  /** The outbox's own work that nobody else waits for. */
  readonly #tidying = new Set<Promise<unknown>>();
  readonly #waiters = new Map<string, Waiter>();
  #endAdopting: (() => void) | undefined;

  readonly #deliveries = new Deliveries();
  readonly #requests = new Requests();
  readonly #reads = new Reads();
  /** Neither is published before then. */
  #requestsPausedUntil: number | undefined;
  readonly #teller = new Teller();

  #latest = 0;
  #timer: { at: number; cancel: () => void } | undefined;

  constructor(options: Options, outbox: Outbox) {
    this.user = options.user;
    this.#options = options;
    this.#outbox = outbox;
    this.#clock = options.clock ?? systemClock;
    this.#transport = options.transport ?? mqttTransport();
    this.#requestTimeoutMs = options.requestTimeoutMs ?? 30_000;
    this.#connectTimeoutMs = options.connectTimeoutMs ?? 15_000;
    this.#retry = options.retry ?? { minMs: 250, maxMs: 30_000 };
    this.#keepAliveS = options.keepAliveS ?? 30;
    this.#responseTopic = `chat/${options.user}/res/${randomName()}`;
  }

  async begin(): Promise<void> {
    for (const unsent of await this.#outbox.load()) this.#sending.push(unsent);
    this.#endAdopting = this.#outbox.adopt?.((unsent) => this.#adopted(unsent));
    this.#work();
  }

  // ---- what a program asks

  get connection(): ConnectionState {
    return this.#state;
  }

  listen(listener: Listener): () => void {
    return this.#teller.listen(listener);
  }

  async send(to: string, text: string): Promise<Stored> {
    return (await this.queue(to, text)).stored;
  }

  async queue(to: string, text: string, id = newId(this.#clock.now())): Promise<Queued> {
    if (this.#connection.is === 'over') throw notSent(this.#connection.error);
    if (!isUser(to)) throw new SendError('invalid_peer', 'that is no user name');
    if (!isId(id)) throw new SendError('invalid_id', 'an id has 1 to 64 of A-Z, a-z, 0-9, _ and -');
    if (this.#queuing.has(id) || this.#sending.has(id)) throw new SendError('same_id', `a message with the id ${id} waits already`);
    const unsent: Unsent = { id, to, text, queuedAt: this.#clock.now() };
    this.#queuing.add(id);
    const added = this.#add(unsent);
    // In the order in which they were asked for, whichever is in the outbox first.
    const inTurn = this.#queued.then(() => added);
    this.#queued = inTurn;
    const problem = await inTurn;
    this.#queuing.delete(id);
    if (problem !== undefined) throw new SendError('outbox', `the outbox does not take it: ${problem}`);
    const stored = new Promise<Stored>((resolve, reject) => this.#waiters.set(id, { resolve, reject }));
    // Nobody has to listen: there is an event, too.
    stored.catch(() => {});
    const connection = this.#over();
    if (connection) {
      this.#settle(id, notSent(connection));
    } else {
      this.#sending.push(unsent);
      this.#work();
    }
    return { ...unsent, stored };
  }

  /** Why it is not in the outbox. */
  async #add(unsent: Unsent): Promise<string | undefined> {
    try {
      await this.#outbox.add(unsent);
      return undefined;
    } catch (error) {
      return sentence(error);
    }
  }

  waiting(): Unsent[] {
    return [...this.#sending.waiting];
  }

  async discard(id: string): Promise<void> {
    await this.#queued;
    this.#sending.take(id);
    this.#settle(id, new SendError('discarded', 'it was discarded'));
    await this.#outbox.remove(id);
  }

  markRead(to: string, seq: number): Promise<void> {
    const problem = this.#problem(to);
    if (problem) return Promise.reject(problem);
    if (!Number.isSafeInteger(seq) || seq < 1) return Promise.reject(new RequestError('invalid_seq', 'a seq is a whole number from 1'));
    const read = this.#reads.mark(to, seq);
    this.#work();
    return read;
  }

  typing(to: string, on: boolean): void {
    if (this.#connection.is === 'open' && isUser(to)) this.#connection.link.publishUnanswered(`chat/${this.user}/typing/${to}`, on ? 'on' : 'off');
  }

  history(peer: string, range: { before?: number } | { after: number }, limit?: number) {
    return this.#ask('history', { with: peer, ...range, limit }, readHistory, peer);
  }

  conversations(before?: string, limit?: number) {
    return this.#ask('conversations', { before, limit }, readConversations);
  }

  sync(since?: string, limit?: number) {
    return this.#ask('sync', { since, limit }, readSync);
  }

  whoami() {
    return this.#ask('whoami', {}, readWhoami);
  }

  async edit(peer: string, seq: number, text: string): Promise<void> {
    await this.#ask('edit', { with: peer, seq, text, id: newId(this.#clock.now()) }, readDone, peer);
  }

  async unsend(peer: string, seq: number): Promise<void> {
    await this.#ask('unsend', { with: peer, seq, id: newId(this.#clock.now()) }, readDone, peer);
  }

  async delete(peer: string, seq: number): Promise<void> {
    await this.#ask('delete', { with: peer, seq }, readDone, peer);
  }

  async block(user: string): Promise<void> {
    await this.#ask('block', { with: user }, readDone, user);
  }

  async unblock(user: string): Promise<void> {
    await this.#ask('unblock', { with: user }, readDone, user);
  }

  blocked() {
    return this.#ask('blocked', {}, readBlocked);
  }

  retryNow(): void {
    const now = this.#now();
    if (this.#connection.is === 'none') this.#connection.retryAt = now;
    if (this.#connection.is === 'open') this.#ping(this.#connection, now + DOUBT_MS);
    this.#work();
  }

  async close(): Promise<void> {
    await this.#queued;
    await this.#end({ code: 'by_us', message: 'closed' });
  }

  async #ask<T>(method: string, members: object, read: (ok: unknown) => T | undefined, peer?: string): Promise<T> {
    const problem = this.#problem(peer);
    if (problem) throw problem;
    const asked = this.#requests.ask(method, members, this.#now() + this.#requestTimeoutMs);
    this.#work();
    const answer = read(await asked);
    if (answer === undefined) throw new RequestError('answer', 'the answer makes no sense');
    return answer;
  }

  #problem(peer: string | undefined): RequestError | undefined {
    if (this.#connection.is === 'over') return notAsked(this.#connection.error);
    return peer === undefined || isUser(peer) ? undefined : new RequestError('invalid_peer', 'that is no user name');
  }

  // ---- the work

  /** A clock that is set back makes nothing wait longer. */
  #now(): number {
    this.#latest = Math.max(this.#latest, this.#clock.now());
    return this.#latest;
  }

  /** Everything that can be done now. */
  #work(): void {
    const now = this.#now();
    if (this.#connection.is === 'over') return;
    this.#requests.timeOut(now);
    if (this.#connection.is === 'none' && now >= this.#connection.retryAt) this.#open(now);
    if (this.#connection.is === 'opening' && now >= this.#connection.deadline) this.#lost('the server does not answer');
    if (this.#connection.is === 'open') {
      const { pongBy, pingAt } = this.#connection;
      if (pongBy !== undefined && now >= pongBy) {
        this.#lost('the server does not answer');
      } else {
        if (now >= pingAt) this.#ping(this.#connection, now + this.#connectTimeoutMs);
        this.#publish(this.#connection.link, now);
      }
    }
    this.#sleep(now);
  }

  #sleep(now: number): void {
    const at = this.#wakeAt();
    if (this.#timer?.at === at) return;
    this.#timer?.cancel();
    this.#timer = undefined;
    if (at === Infinity) return;
    const cancel = this.#clock.after(Math.max(0, at - now), () => {
      this.#timer = undefined;
      this.#latest = Math.max(this.#latest, at);
      this.#work();
    });
    this.#timer = { at, cancel };
  }

  #wakeAt(): number {
    const connection = this.#connection;
    const times = [this.#requests.deadline];
    if (connection.is === 'none') times.push(connection.retryAt);
    if (connection.is === 'opening') times.push(connection.deadline);
    if (connection.is === 'open') {
      times.push(connection.pingAt, connection.pongBy, this.#sending.wakeAt);
      if (this.#requests.size + this.#reads.size > 0) times.push(this.#requestsPausedUntil);
    }
    return Math.min(...times.map((time) => time ?? Infinity));
  }

  #publish(link: Link, now: number): void {
    for (let packet = this.#deliveries.nextAcknowledged(); packet !== undefined; packet = this.#deliveries.nextAcknowledged()) {
      link.acknowledge(packet);
    }
    const number = this.#linkNumber;
    /** What an earlier link answered is late. */
    const answered = (take: (answer: Answer) => void) => (answer: Answer) => {
      if (number !== this.#linkNumber) return;
      take(answer);
      this.#work();
    };
    for (let unsent = this.#sending.next(now); unsent; unsent = this.#sending.next(now)) {
      const { id, to, text } = unsent;
      link.publish(`chat/${this.user}/out/${to}/${id}`, text, undefined, answered((answer) => this.#messageAnswered(id, answer)));
    }
    if (this.#requestsPausedUntil !== undefined && now < this.#requestsPausedUntil) return;
    this.#requestsPausedUntil = undefined;
    for (let read = this.#reads.next(); read; read = this.#reads.next()) {
      const { peer, seq } = read;
      link.publish(`chat/${this.user}/read/${peer}`, String(seq), undefined, answered((answer) => this.#readAnswered(peer, seq, answer)));
    }
    for (let asked = this.#requests.next(); asked; asked = this.#requests.next()) {
      const { number, method, members } = asked;
      const text = JSON.stringify({ ref: number, ...members });
      link.publish(`chat/${this.user}/req/${method}`, text, this.#responseTopic, answered((answer) => this.#requestAnswered(number, answer)));
    }
  }

  // ---- messages of the outbox

  #messageAnswered(id: string, answer: Answer): void {
    const unsent = this.#sending.answered(id, answer, this.#now());
    if (!unsent) return;
    if (answer.is === 'stored') {
      const { seq, at, receiverAway } = answer;
      const stored: Stored = { id, seq, at, receiverAway };
      // What cannot be taken out is sent again in the next run, under the same id.
      this.#tidy(async () => this.#outbox.remove(id));
      this.#waiters.get(id)?.resolve(stored);
      this.#waiters.delete(id);
      this.#teller.tell({ type: 'stored', unsent, stored });
    } else if (answer.is === 'refused') {
      this.#notSent(unsent, new SendError(answer.code, answer.message));
    } else {
      this.#notSent(unsent, new SendError('refused', 'the server acknowledged it without saying what number it has'));
    }
  }

  /** It stays in the outbox. */
  #notSent(unsent: Unsent, error: SendError): void {
    this.#settle(unsent.id, error);
    this.#teller.tell({ type: 'not_sent', unsent, error });
  }

  #settle(id: string, error: SendError): void {
    this.#waiters.get(id)?.reject(error);
    this.#waiters.delete(id);
  }

  #giveUpOld(): void {
    for (const unsent of this.#sending.takeOlder(this.#clock.now() - ID_MEMORY_MS)) {
      this.#notSent(unsent, new SendError('too_old', 'it waited longer than the server remembers ids, and may have been stored already'));
    }
  }

  #adopted(all: Unsent[]): void {
    for (const unsent of all) {
      if (!this.#queuing.has(unsent.id) && !this.#sending.has(unsent.id)) this.#sending.push(unsent);
    }
    this.#work();
  }

  #tidy(work: () => Promise<void>): void {
    const done = work().catch(() => {}).finally(() => this.#tidying.delete(done));
    this.#tidying.add(done);
  }

  // ---- answers

  #readAnswered(peer: string, seq: number, answer: Answer): void {
    if (answer.is === 'refused' && isPassing(answer)) {
      this.#reads.again(peer);
      this.#requestsPausedUntil = this.#now() + REQUESTS_PAUSE_MS;
    } else {
      this.#reads.answered(peer, seq, answer.is === 'refused' ? answer : undefined);
    }
  }

  #requestAnswered(number: number, answer: Answer): void {
    // Otherwise the answer itself comes on the response topic.
    if (answer.is !== 'refused') return;
    if (isPassing(answer)) {
      this.#requests.again(number);
      this.#requestsPausedUntil = this.#now() + REQUESTS_PAUSE_MS;
    } else {
      this.#requests.answered(number, new RequestError(answer.code, answer.message));
    }
  }

  #answer(text: string | undefined): void {
    const answer = readAnswerTo(text);
    if (!answer || typeof answer.ref !== 'number') return;
    const { ref, ok, error } = answer;
    this.#requests.answered(ref, error ? new RequestError(error.code, error.message) : { ok });
  }

  // ---- the link

  #open(now: number): void {
    const number = ++this.#linkNumber;
    const opening = { is: 'opening', link: undefined, deadline: now + this.#connectTimeoutMs, publishesPerS: undefined, keepAliveS: undefined } as const;
    this.#connection = opening;
    this.#tellState({ state: 'connecting' });
    const connect = (password: string | undefined) => {
      if (number !== this.#linkNumber || this.#connection.is !== 'opening') return;
      const { server, user, device } = this.#options;
      const keepAliveS = Math.min(65_535, Math.max(KEEP_ALIVE_TOLD_MIN_S, 2 * this.#keepAliveS));
      const login: Login = { server, user, device, keepAliveS, ...(password === undefined ? {} : { password }) };
      this.#connection.link = this.#transport.open(login, (event) => {
        if (number !== this.#linkNumber) return;
        this.#heard(event);
        this.#work();
      });
    };
    this.#secret().then(connect).catch((error: unknown) => {
      if (number !== this.#linkNumber) return;
      this.#lost(sentence(error));
      this.#work();
    });
  }

  async #secret(): Promise<string | undefined> {
    if (!this.#options.token) return this.#options.password;
    try {
      return await this.#options.token();
    } catch (error) {
      throw new ChatError(`no token: ${sentence(error)}`);
    }
  }

  #heard(event: LinkEvent): void {
    const connection = this.#connection;
    switch (event.is) {
      case 'connected':
        this.#loginsRefused = 0;
        if (connection.is !== 'opening') return;
        connection.publishesPerS = event.publishesPerS;
        connection.keepAliveS = event.keepAliveS;
        connection.link?.subscribe([
          { topic: this.#responseTopic, qos: 0 },
          { topic: `chat/${this.user}/inbox`, qos: 1 },
          { topic: `chat/${this.user}/sent`, qos: 1 },
          { topic: `chat/${this.user}/event/+`, qos: 0 },
        ]);
        return;
      case 'subscribed':
        return this.#subscribed();
      case 'published':
        return this.#published(event.published);
      case 'ponged':
        if (connection.is === 'open') connection.pongBy = undefined;
        return;
      case 'ended':
        return this.#ended(event.ended);
    }
  }

  #subscribed(): void {
    const now = this.#now();
    if (this.#connection.is !== 'opening' || !this.#connection.link) return;
    const { link, publishesPerS, keepAliveS } = this.#connection;
    const pingEveryMs = 1_000 * Math.max(1, Math.min(this.#keepAliveS, keepAliveS ?? Infinity));
    this.#connection = { is: 'open', link, since: now, pingEveryMs, pingAt: now + pingEveryMs, pongBy: undefined };
    this.#giveUpOld();
    this.#sending.connected(publishesPerS, now);
    this.#requests.disconnected();
    this.#reads.disconnected();
    this.#requestsPausedUntil = undefined;
    this.#tellState({ state: 'connected' });
  }

  #published(published: Published): void {
    const { topic, text, waited, packet } = published;
    const below = topic.startsWith(`chat/${this.user}/`) ? topic.slice(`chat/${this.user}/`.length) : '';
    if (packet !== undefined && (below === 'inbox' || below === 'sent')) return this.#message(text, waited, packet);
    if (packet !== undefined) this.#deliveries.passed(packet);
    if (topic === this.#responseTopic) return this.#answer(text);
    const event = below.startsWith('event/') ? readEvent(below.slice('event/'.length), text) : undefined;
    if (event) this.#teller.tell(event);
  }

  #message(text: string | undefined, waited: boolean, packet: number): void {
    const message = readEnvelope(readJson(text));
    if (!message || (message.from !== this.user && message.to !== this.user)) return this.#deliveries.passed(packet);
    if (!this.#deliveries.arrived(message, packet)) return;
    this.#teller.tell({ type: 'message', message, waited }, (taken) => {
      if (taken) this.#deliveries.taken(message);
      // They are acknowledged in their order: nothing that came later could be.
      else if (this.#deliveries.dropped(message)) this.#lost('the program did not take a message');
      this.#work();
    });
  }

  #ping(connection: Connection & { is: 'open' }, pongBy: number): void {
    connection.pingAt = this.#now() + connection.pingEveryMs;
    connection.pongBy = Math.min(connection.pongBy ?? Infinity, pongBy);
    connection.link.ping();
  }

  /** The link is gone; whether it is tried again. */
  #ended({ why, message }: Ended): void {
    if (why === 'login_refused') {
      this.#loginsRefused += 1;
      if (this.#options.token && this.#loginsRefused < TOKENS_MAX) return this.#lost(message);
    }
    if (why === 'lost') return this.#lost(message);
    void this.#end({ code: why, message });
  }

  #lost(reason: string): void {
    const now = this.#now();
    const connection = this.#connection;
    if (connection.is === 'open' && now - connection.since >= GOOD_CONNECTION_MS) this.#failures = 0;
    const limitMs = Math.min(this.#retry.minMs * 2 ** Math.min(this.#failures, 16), this.#retry.maxMs);
    this.#failures += 1;
    const retryAt = Math.round(now + limitMs * this.#clock.random());
    this.#drop();
    this.#connection = { is: 'none', retryAt };
    this.#tellState({ state: 'lost', reason, retryAt });
  }

  /** The link is of no use any more. */
  #drop(): void {
    this.#linkNumber += 1;
    if (this.#connection.is === 'opening' || this.#connection.is === 'open') this.#connection.link?.end();
    this.#deliveries.disconnected();
    this.#sending.disconnected();
  }

  #tellState(state: ConnectionState): void {
    this.#state = state;
    this.#teller.tell({ type: 'connection', connection: state });
  }

  // ---- the end

  #over(): Closed | undefined {
    return this.#connection.is === 'over' ? this.#connection.error : undefined;
  }

  async #end(error: Closed): Promise<void> {
    if (this.#connection.is === 'over') return;
    if (error.code === 'by_us' && this.#connection.is === 'open') {
      this.#linkNumber += 1;
      this.#connection.link.close();
    } else {
      this.#drop();
    }
    this.#connection = { is: 'over', error };
    this.#timer?.cancel();
    this.#timer = undefined;
    this.#endAdopting?.();
    this.#requests.end(notAsked(error));
    this.#reads.end(notAsked(error));
    for (const id of [...this.#waiters.keys()]) this.#settle(id, notSent(error));
    this.#tellState({ state: 'closed', why: error });
    await Promise.all(this.#tidying);
    this.#outbox.close?.();
  }
}

function notSent({ message }: Closed): SendError {
  return new SendError('closed', `not sent yet: ${message}`);
}

function notAsked({ message }: Closed): RequestError {
  return new RequestError('closed', `no answer: ${message}`);
}

function sentence(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
