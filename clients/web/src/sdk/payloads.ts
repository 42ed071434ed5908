//! What the server says, read: anything may come, and what is not as docs/schemas say is `undefined` or left out. Members that this version does
//! not know are dropped.

import type { ChatEvent, Conversations, Entry, Envelope, History, Standing, Sync, Text, Whoami } from './api.js';

type Members = Record<string, unknown>;

const USER = /^[a-z0-9][a-z0-9_-]{0,63}$/;
const ID = /^[A-Za-z0-9_-]{1,64}$/;

export function isUser(value: unknown): value is string {
  return typeof value === 'string' && USER.test(value);
}

export function isId(value: unknown): value is string {
  return typeof value === 'string' && ID.test(value);
}

/** The members of a JSON object. */
export function readJson(text: string | undefined): Members | undefined {
  try {
    return members(JSON.parse(text ?? ''));
  } catch {
    return undefined;
  }
}

function members(value: unknown): Members | undefined {
  return typeof value === 'object' && value !== null && !Array.isArray(value) ? (value as Members) : undefined;
}

function isCursor(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

function isSeq(value: unknown): value is number {
  return isCursor(value) && value > 0;
}

/** Later than that no clock can be. */
const TIME_MAX_MS = 8_640_000_000_000_000;

function isTime(value: unknown): value is number {
  return isCursor(value) && value <= TIME_MAX_MS;
}

/** What all entries have. */
function readEntry(read: Members): Entry | undefined {
  const { v, conversation, seq, from, to, id, at } = read;
  if (v !== 1 || !isUser(from) || !isUser(to) || from === to || !isSeq(seq) || !isTime(at)) return undefined;
  if (conversation !== (from < to ? `${from}:${to}` : `${to}:${from}`)) return undefined;
  if (id === undefined) return { v, conversation, seq, from, to, at };
  return isId(id) ? { v, conversation, seq, from, to, id, at } : undefined;
}

/** An entry as it is stored. */
export function readEnvelope(value: unknown): Envelope | undefined {
  const read = members(value);
  const entry = read && readEntry(read);
  if (!entry) return undefined;
  const { kind, text, target } = read;
  switch (kind) {
    case 'text':
      return isText(text) ? { ...entry, kind, text } : undefined;
    case 'edit':
      return isText(text) && isSeq(target) ? { ...entry, kind, target, text } : undefined;
    case 'unsend':
      return isSeq(target) ? { ...entry, kind, target } : undefined;
    case 'erased':
      return { ...entry, kind };
    default:
      return undefined;
  }
}

function isText(value: unknown): value is string {
  return typeof value === 'string' && value !== '';
}

/** A text with what changed it laid over it. */
function readText(value: unknown): Text | undefined {
  const read = members(value);
  const entry = read && readEntry(read);
  if (!entry || read.kind !== 'text') return undefined;
  const { text, edited_at, unsent } = read;
  if (unsent === true) return { ...entry, kind: 'text', unsent };
  if (!isText(text)) return undefined;
  return isTime(edited_at) ? { ...entry, kind: 'text', text, edited_at } : { ...entry, kind: 'text', text };
}

/** A live event, by the last level of its topic. */
export function readEvent(name: string, text: string | undefined): ChatEvent | undefined {
  const read = readJson(text);
  if (!read) return undefined;
  switch (name) {
    case 'receipt': {
      const { with: peer, delivered, read: seq } = read;
      return isUser(peer) && isCursor(delivered) && isCursor(seq) ? { type: 'receipt', with: peer, delivered, read: seq } : undefined;
    }
    case 'read':
      return isUser(read.with) && isCursor(read.read) ? { type: 'read', with: read.with, seq: read.read } : undefined;
    case 'typing':
      if (!isUser(read.from) || (read.state !== 'on' && read.state !== 'off')) return undefined;
      return { type: 'typing', from: read.from, on: read.state === 'on' };
    case 'presence': {
      const { user, status, last_seen } = read;
      if (!isUser(user) || (status !== 'online' && status !== 'offline')) return undefined;
      return isTime(last_seen) ? { type: 'presence', user, status, last_seen } : { type: 'presence', user, status };
    }
    default:
      return undefined;
  }
}

/** An answer to a request: its number, and what it says. */
export function readAnswerTo(text: string | undefined): { ref: unknown; ok?: unknown; error?: { code: string; message: string } } | undefined {
  const read = readJson(text);
  if (!read) return undefined;
  const error = members(read.error);
  if (!error) return { ref: read.ref, ok: read.ok };
  const { code, message } = error;
  if (typeof code !== 'string' || typeof message !== 'string') return { ref: read.ref };
  return { ref: read.ref, error: { code, message } };
}

/** Elements that can be read; `undefined` if it is no list. */
function list<T>(value: unknown, read: (element: unknown) => T | undefined): T[] | undefined {
  return Array.isArray(value) ? value.map(read).filter((element) => element !== undefined) : undefined;
}

function readStanding(value: unknown): Standing | undefined {
  const read = members(value);
  if (!read) return undefined;
  const { with: peer, delivered, read: seq, my_read, blocked } = read;
  if (!isUser(peer) || !isCursor(delivered) || !isCursor(seq) || !isCursor(my_read) || typeof blocked !== 'boolean') return undefined;
  return { with: peer, delivered, read: seq, my_read, blocked };
}

export function readConversations(ok: unknown): Conversations | undefined {
  const read = members(ok);
  const conversations = list(read?.conversations, (value) => {
    const [standing, unread] = [readStanding(value), members(value)?.unread];
    if (!standing || !isCursor(unread)) return undefined;
    const last = readText(members(value)?.last);
    return last ? { ...standing, last, unread } : { ...standing, unread };
  });
  if (!conversations) return undefined;
  const { next, sync } = read ?? {};
  return { conversations, ...(typeof next === 'string' ? { next } : {}), ...(typeof sync === 'string' ? { sync } : {}) };
}

export function readHistory(ok: unknown): History | undefined {
  const read = members(ok);
  const entries = list(read?.entries, readText);
  return read && entries && isUser(read.with) && typeof read.more === 'boolean' ? { with: read.with, entries, more: read.more } : undefined;
}

export function readSync(ok: unknown): Sync | undefined {
  const read = members(ok);
  const entries = list(read?.entries, readEnvelope);
  const conversations = list(read?.conversations, (value) => {
    const standing = readStanding(value);
    const deleted = list(members(value)?.deleted, (seq) => (isSeq(seq) ? seq : undefined));
    return standing && deleted ? { ...standing, deleted } : standing;
  });
  if (!read || !entries || !conversations || typeof read.next !== 'string' || typeof read.more !== 'boolean') return undefined;
  return { entries, conversations, next: read.next, more: read.more };
}

export function readWhoami(ok: unknown): Whoami | undefined {
  const read = members(ok);
  if (!read) return undefined;
  const { user, at, version, message_bytes } = read;
  if (!isUser(user) || !isTime(at) || typeof version !== 'string' || !isSeq(message_bytes)) return undefined;
  return { user, at, version, message_bytes };
}

export function readBlocked(ok: unknown): { user: string; at: number }[] | undefined {
  return list(members(ok)?.blocked, (value) => {
    const { user, at } = members(value) ?? {};
    return isUser(user) && isTime(at) ? { user, at } : undefined;
  });
}

/** Of answers that say nothing. */
export function readDone(ok: unknown): true | undefined {
  return members(ok) && true;
}
