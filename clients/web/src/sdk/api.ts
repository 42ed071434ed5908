//! The contract of the SDK: what a program says to it and what it hears. Shapes are those of docs/protocol.md; seqs count from 1, times are
//! milliseconds since the Unix epoch.

import type { Transport } from './transport.js';

export type { Transport };

export interface Entry {
  v: 1;
  /** `alice:bob`. */
  conversation: string;
  seq: number;
  from: string;
  to: string;
  id?: string;
  /** The server's clock when it was stored. */
  at: number;
}

/** An entry as it is stored (docs/schemas/envelope.json). Entries of kinds that this version does not know are not handed out. */
export type Envelope = Entry &
  (
    | { kind: 'text'; text: string }
    | { kind: 'edit'; target: number; text: string }
    | { kind: 'unsend'; target: number }
    /** What is left of a text, or of an edit, that was unsent. */
    | { kind: 'erased' }
  );

/** A text in an answer, with what changed it laid over it (docs/schemas/text-as-it-stands.json). */
export type Text = Entry & { kind: 'text'; text?: string; edited_at?: number; unsent?: true };

export interface Stored {
  id: string;
  seq: number;
  at: number;
  /** No device of the receiver was connected: it is waiting. */
  receiverAway: boolean;
}

/** A message in the outbox. */
export interface Unsent {
  id: string;
  to: string;
  text: string;
  /** When it was put in, by this machine's clock. */
  queuedAt: number;
}

export interface Queued extends Unsent {
  /** Settles when it is stored, or will not be (with a {@link SendError}). Nobody has to listen. */
  stored: Promise<Stored>;
}

export type ConnectionState =
  | { state: 'connecting' }
  | { state: 'connected' }
  | { state: 'lost'; reason: string; retryAt: number }
  | { state: 'closed'; why: Closed };

/** It is not tried again by itself. */
export interface Closed {
  code: 'by_us' | 'taken_over' | 'login_refused' | 'refused' | 'outbox';
  message: string;
}

export type ChatEvent =
  /** An entry of a conversation: of others, and your own as they are stored, from whichever device. */
  | { type: 'message'; message: Envelope; /** It waited, and is not live. */ waited: boolean }
  /** What has reached a peer, and what the peer has read. Both only advance; 0 is nothing yet. */
  | { type: 'receipt'; with: string; delivered: number; read: number }
  /** What you have read, on whichever device. */
  | { type: 'read'; with: string; seq: number }
  | { type: 'typing'; from: string; on: boolean }
  | { type: 'presence'; user: string; status: 'online' | 'offline'; last_seen?: number }
  /** A message of the outbox (of this run or an earlier one, of this tab or one that is gone) is stored. */
  | { type: 'stored'; unsent: Unsent; stored: Stored }
  /** It will not be. It stays in the outbox, and the next run tries it again, until it is queued again under its id or discarded. */
  | { type: 'not_sent'; unsent: Unsent; error: SendError }
  | { type: 'connection'; connection: ConnectionState };

/**
 * Hears events, one after another in their order. A message is acknowledged to the server when every listener's promise has resolved. If one rejects it is not: the
 * connection is made anew, and what has reached no device of the user comes again. Of receipts, read, typing and presence that wait for a slow listener only the
 * newest about a peer is told.
 */
export type Listener = (event: ChatEvent) => void | Promise<void>;

export class ChatError extends Error {}
/**
 * The server said no, or nothing can be sent any more. `code` is the protocol's (`text_too_long`, `unknown_user`, …; `refused` if the server named none), or
 * `too_old`, `same_id`, `discarded`, `closed`, `outbox`.
 */
export class SendError extends ChatError {
  constructor(readonly code: string, message: string) {
    super(message);
  }
}
/** A request was refused (`code` is the protocol's), or `timed_out`, `too_many`, `closed`, `answer`. */
export class RequestError extends ChatError {
  constructor(readonly code: string, message: string) {
    super(message);
  }
}

// Answers to requests have the shapes of docs/schemas/response-*.json, members under their names there.

export interface Standing {
  with: string;
  delivered: number;
  read: number;
  my_read: number;
  blocked: boolean;
}
export interface Conversations {
  conversations: (Standing & { last?: Text; unread: number })[];
  next?: string;
  /** With the first page: {@link Client.sync} since this token gives what changes after the list, for those who need nothing of what was before. */
  sync?: string;
}
export interface History {
  with: string;
  entries: Text[];
  more: boolean;
}
export interface Sync {
  entries: Envelope[];
  conversations: (Standing & { deleted?: number[] })[];
  next: string;
  more: boolean;
}
export interface Whoami {
  user: string;
  at: number;
  version: string;
  message_bytes: number;
}

export interface Options {
  /** `wss://host/mqtt`. */
  server: string;
  user: string;
  device: string;
  password?: string;
  /** Asked before each connection. */
  token?: () => string | Promise<string>;
  outbox?: Outbox;
  keepAliveS?: number;
  connectTimeoutMs?: number;
  requestTimeoutMs?: number;
  retry?: { minMs: number; maxMs: number };
  clock?: Clock;
  /** Opens MQTT connections; with mqtt.js unless a test brings its own. */
  transport?: Transport;
}

export interface Clock {
  now(): number;
  /** Returns what cancels it. */
  after(ms: number, call: () => void): () => void;
  random(): number;
}

/** Where messages wait until they are stored. */
export interface Outbox {
  /** All that waits and is this program's to send, in order. Called once. */
  load(): Promise<Unsent[]>;
  /** Safe when it resolves. Takes the place of one of the same id. */
  add(unsent: Unsent): Promise<void>;
  remove(id: string): Promise<void>;
  /** Tells of messages whose program is gone, which are this one's to send now. Returns what ends the watch. */
  adopt?(taken: (unsent: Unsent[]) => void): () => void;
  close?(): void;
}

export interface Client {
  readonly user: string;
  readonly connection: ConnectionState;
  /** Returns what ends listening. Events wait until somebody listens. */
  listen(listener: Listener): () => void;
  /** Resolves when the message is on the server's disk. */
  send(to: string, text: string): Promise<Stored>;
  /** Resolves when the message is safe in the outbox; `id` if the caller made one. */
  queue(to: string, text: string, id?: string): Promise<Queued>;
  /** What waits to be stored and is this program's to send, in order: of earlier runs, too. */
  waiting(): Unsent[];
  /** Takes a message that was not sent out of the outbox, or one that waits: if that is on its way already, it may be stored all the same. */
  discard(id: string): Promise<void>;
  markRead(to: string, seq: number): Promise<void>;
  typing(to: string, on: boolean): void;
  history(peer: string, range: { before?: number } | { after: number }, limit?: number): Promise<History>;
  conversations(before?: string, limit?: number): Promise<Conversations>;
  sync(since?: string, limit?: number): Promise<Sync>;
  whoami(): Promise<Whoami>;
  edit(peer: string, seq: number, text: string): Promise<void>;
  unsend(peer: string, seq: number): Promise<void>;
  /** For me. */
  delete(peer: string, seq: number): Promise<void>;
  block(user: string): Promise<void>;
  unblock(user: string): Promise<void>;
  blocked(): Promise<{ user: string; at: number }[]>;
  /** Tries at once instead of waiting for the next attempt (the browser says it is online again, the user asks for it); a connection that is there is tested. */
  retryNow(): void;
  close(): Promise<void>;
}

/** Returns at once and connects when the server can be reached. Rejects if the outbox cannot be read, or the options make no sense. */
export type Start = (options: Options) => Promise<Client>;
