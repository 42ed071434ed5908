//! A user's chat from log in to log out: the one place where the SDK, the cache and the model meet.
//!
//! It decides when the server is asked, and for what. Invariants: a request is under way once at a time; a message is marked as read only while somebody looks;
//! what the user wrote is in the drafts, in the outbox or among what was not sent, and nowhere else is it lost.

import { signal, type ReadonlySignal } from '@preact/signals';

import type { ChatEvent, Client, Clock, Envelope, History, Options, Outbox, Start, Text, Unsent } from '../sdk/api';
import { noCache, type Cache } from './cache';
import { missingAfter, unreadCount, type Conversation, type Editing } from './model/conversation';
import { initial, reduce, type Event, type Kept, type State } from './model/state';
import { bytesOf, isVisible } from './model/words';
import type { Tabs } from './tabs';
import { texts } from './texts';

/** Entries that are asked for at once. */
const PAGE = 100;
const LIST_PAGE = 100;
const SYNC_PAGE = 200;
/** What could not be asked for is asked for again after so long. */
const ASK_AGAIN_MS = 5_000;
/** The server forgets `on` after six seconds; it is said again in time. */
const TYPING_SAID_AGAIN_MS = 3_000;
/** Nobody types who has not for so long. */
const TYPING_IDLE_MS = 5_000;
/** If the server's `off` is missed. */
const TYPING_SHOWN_MS = 8_000;
/** Cursors of what is read are told together. */
const READ_TOLD_MS = 200;
const KEPT_MS = 500;
const NOTICE_MS = 6_000;
/** Messages that wait for the cache; more are synced the next time. */
const AHEAD_MAX = 2_000;

export interface Sdk {
  start: Start;
  /** Where the user's messages wait in this browser. */
  openOutbox(user: string): Promise<Outbox>;
}

export interface Login {
  user: string;
  password?: string;
  token?: () => string | Promise<string>;
}

/** A message that nobody saw come. */
export interface News {
  user: string;
  from: string;
  text: string;
  seq: number;
}

/** What the session needs of the world. */
export interface Surroundings {
  server: string;
  clock: Clock;
  loadSdk(): Promise<Sdk>;
  openCache(user: string): Promise<Cache>;
  /** Texts by name that outlive the page and are shared by its tabs. */
  storage: Pick<Storage, 'getItem' | 'setItem' | 'removeItem' | 'key' | 'length'>;
  /** Somebody looks at the page. */
  isLooking(): boolean;
  /** The user's pages in this browser, with this one; it is called when the user has logged out in another. */
  tabs?(user: string, onLogOut: () => void): Tabs;
  notify(news: News): void;
  /** Takes back what was notified and is still shown: of a peer, or all. */
  withdraw?(user: string, peer?: string): void;
}

/** What the views can do. */
export interface Chat {
  readonly state: ReadonlySignal<State>;
  open(peer: string): void;
  leave(): void;
  moreConversations(): Promise<void>;
  /** Resolves when they are there; rejects with a reason. */
  loadEarlier(peer: string): Promise<void>;
  draft(peer: string, text: string): void;
  /** Whether it is on its way; if not, the user is told why. */
  send(peer: string, text: string): boolean;
  retry(peer: string, id: string): void;
  discard(peer: string, id: string): void;
  /** Somebody looks at the page, and sees what comes as it comes: it is not all that was missed. */
  isFollowing(): boolean;
  /** So far the user has seen the conversation. */
  seen(peer: string, seq: number): void;
  startEditing(peer: string, seq: number): void;
  editDraft(peer: string, text: string): void;
  stopEditing(peer: string): void;
  saveEdit(peer: string): Promise<void>;
  unsend(peer: string, seq: number): Promise<void>;
  remove(peer: string, seq: number): Promise<void>;
  block(peer: string, blocked: boolean): Promise<void>;
  retryNow(): void;
  tell(text: string, tone?: 'info' | 'error'): void;
  dismiss(): void;
}

export class Session implements Chat {
  readonly #state;
  readonly #around: Surroundings;
  readonly #login: Login;
  #cache: Cache = noCache;
  #client: Client | undefined;
  /** Written before the SDK was there. */
  #early: Unsent[] | undefined = [];
  /** Counts connections: what was asked on an earlier one is not waited for. */
  #connected = 0;
  #token: string | undefined;
  /** What came before everything was synced on this connection: the cache takes it afterwards, so that it has no holes. */
  #ahead: { peer: string; message: Envelope }[] | undefined = [];
  /** Under way: `newest bob`, `earlier bob`, … */
  readonly #asking = new Map<string, Promise<void>>();
  readonly #typingOut = new Map<string, { saidAt: number; idle: () => void }>();
  readonly #typingIn = new Map<string, () => void>();
  readonly #toRead = new Map<string, number>();
  #readTimer: (() => void) | undefined;
  #keepTimer: (() => void) | undefined;
  readonly #toKeep = new Set<string>();
  #noticeTimer: (() => void) | undefined;
  #noticeKey = 0;
  #isOver = false;
  readonly #isLoggedOut = signal(false);
  readonly #tabs: Tabs | undefined;

  constructor(login: Login, around: Surroundings) {
    this.#login = login;
    this.#around = around;
    this.#state = signal(initial(login.user));
    this.#tabs = around.tabs?.(login.user, () => (this.#isLoggedOut.value = true));
  }

  /** The user has logged out in another page of this browser. */
  get isLoggedOut(): ReadonlySignal<boolean> {
    return this.#isLoggedOut;
  }

  /** To be said before the end. */
  logOutElsewhere(): void {
    this.#tabs?.logOut();
  }

  get state(): ReadonlySignal<State> {
    return this.#state;
  }

  get user(): string {
    return this.#login.user;
  }

  /** Somebody else says who the user is. */
  get hasToken(): boolean {
    return this.#login.token !== undefined;
  }

  /** Shows what is kept, and then connects. */
  async begin(): Promise<void> {
    const { user, password, token } = this.#login;
    try {
      this.#cache = await this.#around.openCache(user);
    } catch {
      this.tell(texts.notice.noCache);
    }
    if (this.#isOver) return this.#cache.close();
    const kept = await this.#cache.load().catch(() => ({ conversations: [], failed: [], token: undefined }));
    this.#token = kept.token;
    const edits = new Map<string, Editing>();
    for (const [peer, held] of this.#readWritten(this.#editName(''))) {
      const editing = readEditing(held);
      if (editing) edits.set(peer, editing);
    }
    this.#dispatch({ type: 'restored', conversations: kept.conversations, drafts: this.#readWritten(this.#draftName('')), edits });
    for (const { unsent, failure } of kept.failed) {
      this.#dispatch({ type: 'not_sent', unsent, error: Object.assign(new Error(failure), { code: '' }) });
    }
    if (this.#state.value.open !== undefined) void this.#loadNewest(this.#state.value.open);
    try {
      const sdk = await this.#around.loadSdk();
      const options: Options = {
        server: this.#around.server,
        user,
        device: `web-${randomName()}`,
        outbox: this.#watched(await sdk.openOutbox(user)),
        ...(password === undefined ? {} : { password }),
        ...(token === undefined ? {} : { token }),
      };
      if (this.#isOver) return;
      const client = await sdk.start(options);
      if (this.#isOver) return void client.close();
      this.#client = client;
      client.listen((event) => this.#hear(event));
      if (client.connection.state !== 'connecting') await this.#hear({ type: 'connection', connection: client.connection });
      const early = this.#early ?? [];
      this.#early = undefined;
      for (const unsent of early) {
        void this.#queue(client, unsent).then(
          () => this.#cache.dropFailed(unsent.id).catch(() => {}),
          (error: unknown) => this.#failed(unsent, error),
        );
      }
    } catch (error) {
      this.#dispatch({ type: 'connection', connection: { state: 'closed', why: { code: 'outbox', message: sentence(error) } } });
      for (const unsent of this.#early ?? []) this.#failed(unsent, error);
      this.#early = undefined;
    }
  }

  async end(forget: boolean): Promise<void> {
    this.#isOver = true;
    this.#tabs?.close();
    this.#keepTimer?.();
    const cache = this.#cache;
    // What still comes is not kept.
    if (forget) this.#cache = noCache;
    else await this.#keep();
    await this.#client?.close().catch(() => {});
    if (forget) {
      await cache.clear().catch(() => {});
      for (const prefix of [this.#draftName(''), this.#editName('')]) {
        for (const peer of this.#readWritten(prefix).keys()) this.#around.storage.removeItem(prefix + peer);
      }
      this.#around.withdraw?.(this.user);
    }
    cache.close();
    for (const cancel of this.#typingIn.values()) cancel();
    for (const { idle } of this.#typingOut.values()) idle();
    this.#noticeTimer?.();
    this.#readTimer?.();
  }

  // ---- what is heard

  async #hear(event: ChatEvent): Promise<void> {
    const before = this.#state.value;
    this.#dispatch(event);
    switch (event.type) {
      case 'connection':
        if (event.connection.state === 'connected') void this.#catchUp();
        else this.#connected += 1;
        return;
      case 'message': {
        const { message } = event;
        const isMine = message.from === before.me;
        const peer = isMine ? message.to : message.from;
        if (message.kind === 'text' && !isMine) this.#news(peer, message.text, message.seq, event.waited, before.conversations.get(peer));
        void this.#fill(peer);
        if (!this.#ahead) await this.#cache.arrived(peer, message).catch(() => {});
        else if (this.#ahead.length < AHEAD_MAX) this.#ahead.push({ peer, message });
        return;
      }
      case 'typing': {
        this.#typingIn.get(event.from)?.();
        this.#typingIn.delete(event.from);
        if (!event.on) return;
        const over = () => this.#dispatch({ type: 'typing', from: event.from, on: false });
        this.#typingIn.set(event.from, this.#around.clock.after(TYPING_SHOWN_MS, over));
        return;
      }
      case 'not_sent':
        await this.#cache.keepFailed({ unsent: event.unsent, failure: event.error.message }).catch(() => {});
        return;
      case 'stored':
        await this.#cache.dropFailed(event.unsent.id).catch(() => {});
        return;
      default:
    }
  }

  #news(peer: string, text: string, seq: number, waited: boolean, before: Conversation | undefined): void {
    const after = this.#state.value.conversations.get(peer);
    if (!after || after.blocked || unreadCount(after) <= (before ? unreadCount(before) : 0)) return;
    const isOpen = this.#state.value.open === peer;
    if (isOpen && this.#around.isLooking() && !waited) return;
    if (isOpen) this.#dispatch({ type: 'unseen', peer, after: seq - 1 });
    if (!this.#around.isLooking()) void this.#notify({ user: this.user, from: peer, text, seq });
  }

  /** Of several pages that hear of it, one does, and none if somebody looks at one of them. */
  async #notify(news: News): Promise<void> {
    if (this.#tabs && !(await this.#tabs.claim(`${news.from} ${news.seq}`))) return;
    if (!this.#isOver && !this.#around.isLooking()) this.#around.notify(news);
  }

  /** Everything that happened while there was no connection. */
  async #catchUp(): Promise<void> {
    this.#connected += 1;
    const connection = this.#connected;
    const client = this.#client;
    const isOn = () => this.#connected === connection && !this.#isOver;
    const open = this.#state.value.open;
    this.#ahead = [];
    this.#dispatch({ type: 'doubted' });
    if (open !== undefined) void this.#loadNewest(open);
    while (isOn() && client) {
      try {
        const listed = await client.conversations(undefined, LIST_PAGE);
        if (!isOn()) return;
        this.#dispatch({ type: 'listed', page: listed });
        // Whoever comes for the first time needs nothing of what was before the list but what is asked for.
        if (this.#token === undefined && listed.sync !== undefined) {
          const begin = listed.sync;
          this.#token = await this.#cache.begin(begin).catch(() => begin);
          if (!isOn()) return;
        }
        const { message_bytes: messageBytes } = await client.whoami();
        this.#dispatch({ type: 'greeted', messageBytes });
        await this.#sync(client, isOn);
        if (!isOn()) return;
        // What was read here and not told; now it is known that it is still the same past.
        for (const { with: peer, my_read } of listed.conversations) {
          const myRead = this.#conversation(peer)?.myRead ?? 0;
          if (myRead > my_read) this.#markRead(peer, myRead);
        }
        const ahead = this.#ahead ?? [];
        this.#ahead = undefined;
        for (const { peer, message } of ahead) await this.#cache.arrived(peer, message).catch(() => {});
        return;
      } catch (error) {
        if (isOn() && codeOf(error) === 'invalid_token' && this.#token !== undefined) await this.#startOver();
        else await new Promise<void>((resolve) => this.#around.clock.after(ASK_AGAIN_MS, resolve));
      }
    }
  }

  /** It is another server, or an older one: under the numbers that are known here it has other entries, and they are not read yet. */
  async #startOver(): Promise<void> {
    const { open } = this.#state.value;
    this.#token = undefined;
    this.#toRead.clear();
    this.#dispatch({ type: 'forgotten' });
    // What was to be other words is a draft now.
    for (const peer of this.#readWritten(this.#editName('')).keys()) this.#hold(this.#editName(peer), '');
    for (const [peer, text] of this.#state.value.drafts) this.#hold(this.#draftName(peer), text);
    await this.#cache.clear().catch(() => {
      // What cannot be forgotten is not asked any more.
      this.#cache = noCache;
    });
    if (open !== undefined) void this.#loadNewest(open);
  }

  async #sync(client: Client, isOn: () => boolean): Promise<void> {
    const initial = this.#token === undefined;
    for (;;) {
      const since = this.#token;
      const sync = await client.sync(since, SYNC_PAGE);
      if (!isOn()) return;
      this.#dispatch({ type: 'synced', sync, initial });
      await this.#cache.synced(this.user, since, sync).catch(() => {});
      this.#token = sync.next;
      if (this.#state.value.open !== undefined) void this.#fill(this.#state.value.open);
      if (!sync.more) return;
    }
  }

  // ---- what is loaded

  open(peer: string): void {
    if (peer === this.user) return;
    this.#dispatch({ type: 'opened', peer });
    void this.#loadNewest(peer);
  }

  leave(): void {
    this.#dispatch({ type: 'left' });
  }

  async moreConversations(): Promise<void> {
    const { listNext } = this.#state.value;
    if (listNext === undefined || !this.#client) return;
    const client = this.#client;
    await this.#once('list', async () => {
      this.#dispatch({ type: 'listed', page: await client.conversations(listNext, LIST_PAGE) });
    }).catch((error: unknown) => this.#notDone(error));
  }

  async #loadNewest(peer: string): Promise<void> {
    if (!this.#conversation(peer)?.timeline) {
      const kept = await this.#cache.page(peer, undefined, PAGE).catch(() => ({ entries: [], more: true }));
      const of = this.#conversation(peer);
      // What is long past is no beginning if the server can be asked.
      const isFar = this.#isConnected() && (kept.entries.at(-1)?.seq ?? 0) + PAGE < (of?.top ?? 0);
      if (kept.entries.length > 0 && !isFar && !of?.timeline) this.#dispatch({ type: 'newest', peer, ...kept });
    }
    if (!this.#isConnected()) return;
    await this.#once(`newest ${peer}`, async () => {
      const to = this.#conversation(peer)?.timeline?.to ?? 0;
      const { entries, more } = await this.#history(peer, {});
      this.#dispatch({ type: 'newest', peer, entries, more });
      // An edit after the last text is an entry, too, and is not on the page.
      if (entries.length === 0 || (entries.at(-1)?.seq ?? 0) < to) return;
      await this.#cache.put(peer, entries, !more, false).catch(() => {});
    }).catch(() => this.#later(() => this.#state.value.open === peer && this.#loadNewest(peer)));
    await this.#fill(peer);
  }

  /** Asks for what came between what is loaded and what was heard of. */
  async #fill(peer: string): Promise<void> {
    if (this.#state.value.open !== peer || this.#asking.has(`newest ${peer}`)) return;
    await this.#once(`later ${peer}`, async () => {
      for (;;) {
        const of = this.#conversation(peer);
        const after = of && missingAfter(of);
        if (!of || after === undefined || !this.#isConnected()) return;
        const upTo = of.top;
        const { entries, more } = await this.#history(peer, { after });
        this.#dispatch({ type: 'later', peer, entries, more, upTo });
        await this.#cache.put(peer, entries, false, true).catch(() => {});
      }
    }).catch(() => {});
  }

  loadEarlier(peer: string): Promise<void> {
    return this.#once(`earlier ${peer}`, async () => {
      const timeline = this.#conversation(peer)?.timeline;
      const first = timeline?.entries[0]?.seq;
      if (!timeline?.earlier || first === undefined) return;
      if (this.#isConnected()) {
        const { entries, more } = await this.#history(peer, { before: first });
        this.#dispatch({ type: 'earlier', peer, entries, more });
        await this.#cache.put(peer, entries, !more, true).catch(() => {});
        return;
      }
      const { entries, more } = await this.#cache.page(peer, first, PAGE);
      if (entries.length === 0 && more) throw new Error(texts.timeline.offlineEnd);
      this.#dispatch({ type: 'earlier', peer, entries, more });
    });
  }

  async #history(peer: string, range: { before?: number } | { after: number }): Promise<Omit<History, 'with'>> {
    if (!this.#client) throw new Error(texts.connection.connecting);
    try {
      return await this.#client.history(peer, range, PAGE);
    } catch (error) {
      // Nobody has written yet.
      if (codeOf(error) === 'unknown_conversation') return { entries: [] as Text[], more: false };
      throw error;
    }
  }

  // ---- what is written

  draft(peer: string, text: string): void {
    this.#dispatch({ type: 'drafted', peer, text });
    this.#hold(this.#draftName(peer), text);
    this.#typed(peer, text !== '');
  }

  /** Another tab has written. */
  writtenElsewhere(name: string, held: string | null): void {
    const [drafts, edits] = [this.#draftName(''), this.#editName('')];
    if (name.startsWith(drafts)) this.#dispatch({ type: 'drafted', peer: name.slice(drafts.length), text: held ?? '' });
    if (!name.startsWith(edits)) return;
    const peer = name.slice(edits.length);
    const editing = held === null ? undefined : readEditing(held);
    this.#dispatch(editing ? { type: 'editing', peer, ...editing } : { type: 'edit_ended', peer });
  }

  send(peer: string, text: string): boolean {
    const { messageBytes } = this.#state.value;
    if (text === '' || (text.trim() === '' && !isVisible(text))) return false;
    const bytes = bytesOf(text);
    if (bytes > messageBytes) {
      this.tell(texts.compose.tooLong(bytes, messageBytes), 'error');
      return false;
    }
    const unsent: Unsent = { id: randomName(), to: peer, text, queuedAt: this.#around.clock.now() };
    this.#dispatch({ type: 'queued', unsent });
    if (this.#client) this.#queue(this.#client, unsent).catch((error: unknown) => this.#failed(unsent, error));
    else if (this.#early) {
      this.#early.push(unsent);
      // There is no outbox yet, and the page may be gone before there is one.
      void this.#cache.keepFailed({ unsent, failure: texts.notice.closedBefore }).catch(() => {});
    } else this.#failed(unsent, new Error(this.#whyClosed()));
    return true;
  }

  /** Resolves when it is in the outbox. */
  async #queue(client: Client, unsent: Unsent): Promise<void> {
    const { stored } = await client.queue(unsent.to, unsent.text, unsent.id);
    stored.catch(() => {});
  }

  #failed(unsent: Unsent, error: unknown): void {
    const failure = sentence(error);
    this.#dispatch({ type: 'not_sent', unsent, error: Object.assign(new Error(failure), { code: codeOf(error) ?? '' }) });
    void this.#cache.keepFailed({ unsent, failure }).catch(() => {});
  }

  retry(peer: string, id: string): void {
    const outgoing = this.#conversation(peer)?.outgoing.find((outgoing) => outgoing.id === id);
    if (!outgoing || outgoing.failure === undefined) return;
    // Under an id of its own: the old one may be what was wrong.
    if (this.send(peer, outgoing.text)) this.discard(peer, id);
  }

  discard(peer: string, id: string): void {
    this.#dispatch({ type: 'discarded', peer, id });
    void this.#cache.dropFailed(id).catch(() => {});
    void this.#client?.discard(id).catch(() => {});
  }

  startEditing(peer: string, seq: number): void {
    const entry = this.#conversation(peer)?.timeline?.entries.find((entry) => entry.seq === seq);
    if (entry?.text !== undefined) this.#edit(peer, { seq, text: entry.text });
  }

  editDraft(peer: string, text: string): void {
    const editing = this.#conversation(peer)?.editing;
    if (editing) this.#edit(peer, { seq: editing.seq, text });
  }

  stopEditing(peer: string): void {
    this.#dispatch({ type: 'edit_ended', peer });
    this.#hold(this.#editName(peer), '');
  }

  #edit(peer: string, editing: Editing): void {
    this.#dispatch({ type: 'editing', peer, ...editing });
    this.#hold(this.#editName(peer), JSON.stringify(editing));
  }

  /** In this browser, for its other tabs and for later. */
  #hold(name: string, written: string): void {
    try {
      if (written === '') this.#around.storage.removeItem(name);
      else this.#around.storage.setItem(name, written);
    } catch {
      // It is there as long as the page is.
    }
  }

  async saveEdit(peer: string): Promise<void> {
    const editing = this.#conversation(peer)?.editing;
    if (!editing || editing.text === '') return;
    const { seq, text } = editing;
    const save = async (client: Client) => {
      await client.edit(peer, seq, text);
      this.#dispatch({ type: 'edited', peer, seq, text });
      // Who has written on meanwhile, or edits another message, is not done.
      const now = this.#conversation(peer)?.editing;
      if (now?.seq === seq && now.text === text) this.stopEditing(peer);
    };
    await this.#once(`edit ${peer} ${seq} ${text}`, () => this.#do(save));
  }

  unsend(peer: string, seq: number): Promise<void> {
    return this.#do(async (client) => {
      await client.unsend(peer, seq);
      this.#dispatch({ type: 'unsent', peer, seq });
    });
  }

  remove(peer: string, seq: number): Promise<void> {
    return this.#do(async (client) => {
      await client.delete(peer, seq);
      this.#dispatch({ type: 'deleted', peer, seq });
      await this.#cache.remove(peer, [seq]).catch(() => {});
    });
  }

  block(peer: string, blocked: boolean): Promise<void> {
    return this.#do(async (client) => {
      await (blocked ? client.block(peer) : client.unblock(peer));
      this.#dispatch({ type: 'blocked', peer, blocked });
    });
  }

  /** Asked for by the user, who is told if it does not work. */
  async #do(what: (client: Client) => Promise<void>): Promise<void> {
    try {
      if (!this.#client) throw new Error(this.#whyClosed());
      await what(this.#client);
    } catch (error) {
      this.#notDone(error);
    }
  }

  // ---- read and typing

  isFollowing(): boolean {
    return this.#ahead === undefined && this.#around.isLooking();
  }

  seen(peer: string, seq: number): void {
    const of = this.#conversation(peer);
    if (!of || seq <= of.myRead || !this.#around.isLooking()) return;
    this.#dispatch({ type: 'read', with: peer, seq });
    this.#markRead(peer, seq);
  }

  #markRead(peer: string, seq: number): void {
    this.#toRead.set(peer, Math.max(seq, this.#toRead.get(peer) ?? 0));
    this.#readTimer ??= this.#around.clock.after(READ_TOLD_MS, () => {
      this.#readTimer = undefined;
      const all = [...this.#toRead];
      this.#toRead.clear();
      // If it is not told now, it is after the next connection.
      for (const [with_, seq] of all) void this.#client?.markRead(with_, seq).catch(() => {});
    });
  }

  #typed(peer: string, isTyping: boolean): void {
    const { clock } = this.#around;
    const out = this.#typingOut.get(peer);
    out?.idle();
    if (!isTyping) {
      this.#typingOut.delete(peer);
      if (out) this.#client?.typing(peer, false);
      return;
    }
    const saidAt = out && clock.now() - out.saidAt < TYPING_SAID_AGAIN_MS ? out.saidAt : clock.now();
    if (saidAt !== out?.saidAt && this.#isConnected()) this.#client?.typing(peer, true);
    this.#typingOut.set(peer, { saidAt, idle: clock.after(TYPING_IDLE_MS, () => this.#typed(peer, false)) });
  }

  // ---- the rest

  retryNow(): void {
    this.#client?.retryNow();
  }

  tell(text: string, tone: 'info' | 'error' = 'info'): void {
    this.#noticeTimer?.();
    this.#noticeKey += 1;
    this.#dispatch({ type: 'noticed', notice: { key: this.#noticeKey, text, tone } });
    this.#noticeTimer = this.#around.clock.after(NOTICE_MS, () => this.dismiss());
  }

  dismiss(): void {
    this.#dispatch({ type: 'noticed', notice: undefined });
  }

  #notDone(error: unknown): void {
    this.tell(texts.notice.notDone(sentence(error)), 'error');
  }

  #dispatch(event: Event): void {
    const before = this.#state.value;
    const after = reduce(before, event);
    if (after === before) return;
    this.#state.value = after;
    if (after.conversations === before.conversations || event.type === 'restored') return;
    for (const [peer, of] of after.conversations) {
      const old = before.conversations.get(peer);
      if (old === of) continue;
      this.#toKeep.add(peer);
      // What was read, on whichever device, is no news any more.
      if (old && unreadCount(old) > 0 && unreadCount(of) === 0) this.#around.withdraw?.(this.user, peer);
    }
    this.#keepTimer ??= this.#around.clock.after(KEPT_MS, () => void this.#keep());
  }

  async #keep(): Promise<void> {
    this.#keepTimer = undefined;
    const kept = [...this.#toKeep].flatMap((peer): Kept[] => {
      const of = this.#conversation(peer);
      if (!of || of.activeAt === 0) return [];
      const { delivered, read, myRead, blocked, last, activeAt } = of;
      return [{ peer, delivered, read, myRead, blocked, activeAt, unread: unreadCount(of), ...(last ? { last } : {}) }];
    });
    this.#toKeep.clear();
    await this.#cache.keep(kept).catch(() => {});
  }

  /** Whoever comes while it is under way gets the same outcome. */
  #once(name: string, what: () => Promise<void>): Promise<void> {
    const underWay = this.#asking.get(name);
    if (underWay) return underWay;
    const asked = what().finally(() => this.#asking.delete(name));
    this.#asking.set(name, asked);
    return asked;
  }

  #later(what: () => unknown): void {
    this.#around.clock.after(ASK_AGAIN_MS, () => {
      if (!this.#isOver && this.#isConnected()) what();
    });
  }

  /** The outbox, of which is seen what waits in it from earlier. */
  #watched(outbox: Outbox): Outbox {
    const show = (all: readonly Unsent[]) => {
      for (const unsent of all) this.#dispatch({ type: 'queued', unsent });
    };
    return {
      load: async () => {
        const waiting = await outbox.load();
        show(waiting);
        return waiting;
      },
      add: (unsent) => outbox.add(unsent),
      remove: (id) => outbox.remove(id),
      ...(outbox.adopt
        ? {
            adopt: (taken: (unsent: Unsent[]) => void) =>
              outbox.adopt!((all) => {
                show(all);
                taken(all);
              }),
          }
        : {}),
      ...(outbox.close ? { close: () => outbox.close!() } : {}),
    };
  }

  /** What is kept under names that begin so, by how they end. */
  #readWritten(prefix: string): Map<string, string> {
    const { storage } = this.#around;
    const written = new Map<string, string>();
    for (let at = 0; at < storage.length; at += 1) {
      const name = storage.key(at);
      if (name?.startsWith(prefix)) written.set(name.slice(prefix.length), storage.getItem(name) ?? '');
    }
    return written;
  }

  #draftName(peer: string): string {
    return `chat draft ${this.user} ${peer}`;
  }

  #editName(peer: string): string {
    return `chat edit ${this.user} ${peer}`;
  }

  #conversation(peer: string): Conversation | undefined {
    return this.#state.value.conversations.get(peer);
  }

  #isConnected(): boolean {
    return this.#state.value.connection.state === 'connected';
  }

  #whyClosed(): string {
    const { connection } = this.#state.value;
    return connection.state === 'closed' ? connection.why.message : texts.connection.connecting;
  }
}

/** An edit that was begun, as it was kept. */
function readEditing(held: string): Editing | undefined {
  try {
    const { seq, text } = JSON.parse(held) as Partial<Editing>;
    return typeof seq === 'number' && typeof text === 'string' ? { seq, text } : undefined;
  } catch {
    return undefined;
  }
}

/** 22 characters, 128 bits. */
export function randomName(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return btoa(String.fromCharCode(...bytes)).replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '');
}

function sentence(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

function codeOf(error: unknown): string | undefined {
  return typeof error === 'object' && error !== null && 'code' in error && typeof error.code === 'string' ? error.code : undefined;
}
