//! A conversation as the chat knows it: how it stands, what is loaded, what is on its way, what is being written.
//!
//! Pure. Invariants: every cursor only advances; a message that was sent here is shown once: as on its way, or in the timeline.

import type { Conversations, Envelope, Standing, Stored, Unsent } from '../../sdk/api';
import * as timelines from './timeline';
import type { Entry, Timeline } from './timeline';

/** Unread messages that are counted one by one. */
const COUNTED_MAX = 1_000;
/** Of a last message that much is kept for the list. */
const LAST_LENGTH_MAX = 300;

/** A message that is not in the timeline yet. */
export interface Outgoing {
  readonly id: string;
  readonly text: string;
  readonly queuedAt: number;
  /** It is stored, and what comes before it is not here yet. */
  readonly seq?: number;
  /** Why it was not sent. */
  readonly failure?: string;
}

/** The last text, for the list. */
export interface Last {
  readonly seq: number;
  readonly from: string;
  readonly at: number;
  /** Absent if it was taken back. */
  readonly text?: string;
}

/** What the user has not read: as the server counted it up to some entry, and what came since. */
interface Unread {
  readonly counted: number;
  readonly countedTo: number;
  readonly since: readonly number[];
}

/** The message that is given other words, and those. */
export interface Editing {
  readonly seq: number;
  readonly text: string;
}

export interface Conversation {
  readonly peer: string;
  readonly delivered: number;
  readonly read: number;
  readonly myRead: number;
  readonly blocked: boolean;
  readonly last?: Last;
  /** When anything happened here. */
  readonly activeAt: number;
  readonly unread: Unread;
  /** The highest seq that was heard of. */
  readonly top: number;
  /** Absent until it is opened. */
  readonly timeline?: Timeline;
  readonly outgoing: readonly Outgoing[];
  readonly typing: boolean;
  /** The line that says what is new is above the first of the peer's after this seq. */
  readonly unreadAfter?: number;
  readonly editing?: Editing;
}

export function conversation(peer: string): Conversation {
  return {
    peer,
    delivered: 0,
    read: 0,
    myRead: 0,
    blocked: false,
    activeAt: 0,
    unread: { counted: 0, countedTo: 0, since: [] },
    top: 0,
    outgoing: [],
    typing: false,
  };
}

export const unreadCount = (of: Conversation): number => of.unread.counted + of.unread.since.length;

/** Entries that are there and not loaded follow after this seq. */
export function missingAfter(of: Conversation): number | undefined {
  return of.timeline && of.top > of.timeline.to ? of.timeline.to : undefined;
}

export function receipt(old: Conversation, delivered: number, read: number): Conversation {
  return { ...old, delivered: Math.max(old.delivered, delivered, read), read: Math.max(old.read, read) };
}

/** The user has read up to here, on whichever device. */
export function readTo(old: Conversation, seq: number): Conversation {
  const myRead = Math.max(old.myRead, seq);
  const { counted, countedTo, since } = old.unread;
  return {
    ...old,
    myRead,
    unread: {
      counted: myRead >= countedTo ? 0 : Math.min(counted, loadedBetween(old, myRead, countedTo) ?? counted),
      countedTo,
      since: since.filter((unread) => unread > myRead),
    },
  };
}

/** The peer's messages after one seq and up to another, if all of them are loaded. */
function loadedBetween({ peer, timeline }: Conversation, after: number, to: number): number | undefined {
  if (!timeline || timeline.to < to || (timeline.earlier && (timeline.entries[0]?.seq ?? Infinity) > after + 1)) return undefined;
  return timeline.entries.filter(({ from, seq, text }) => from === peer && seq > after && seq <= to && text !== undefined).length;
}

/** As the server says. */
export function stand(old: Conversation, standing: Standing): Conversation {
  const next = readTo(receipt(old, standing.delivered, standing.read), standing.my_read);
  return { ...next, blocked: standing.blocked };
}

/** As the server lists it. */
export function list(old: Conversation, told: Conversations['conversations'][number]): Conversation {
  let next = stand(old, told);
  const toldTo = told.last?.seq ?? 0;
  // What was read here meanwhile is not unread because the answer is older.
  const isOlder = told.my_read < next.myRead && next.myRead >= toldTo;
  next = {
    ...next,
    unread: {
      counted: isOlder ? 0 : told.unread,
      countedTo: toldTo,
      since: next.unread.since.filter((seq) => seq > toldTo),
    },
  };
  if (!told.last) return next;
  const { last } = told;
  return noteLast({ ...next, top: Math.max(next.top, last.seq) }, timelines.entryOf(last));
}

/** Something has arrived, or was stored. */
export function arrive(old: Conversation, envelope: Envelope, me: string): Conversation {
  let next: Conversation = { ...old, top: Math.max(old.top, envelope.seq) };
  switch (envelope.kind) {
    case 'text':
      next = noteLast(envelope.from === me ? mine(next, envelope) : theirs(next, envelope), envelope);
      break;
    case 'edit':
      if (next.last?.seq === envelope.target && next.last.text !== undefined) {
        next = { ...next, last: { ...next.last, text: beginning(envelope.text) } };
      }
      break;
    case 'unsend':
    case 'erased':
      next = wordless(next, envelope.kind === 'unsend' ? envelope.target : envelope.seq);
      break;
  }
  return withTimeline(next, next.timeline && timelines.arrive(next.timeline, envelope));
}

function mine(old: Conversation, { seq, id }: Envelope): Conversation {
  const { counted, countedTo, since } = old.unread;
  // Who answers has read.
  const unread = { counted: seq > countedTo ? 0 : counted, countedTo, since: since.filter((unread) => unread > seq) };
  const outgoing =
    !old.timeline && id !== undefined && old.outgoing.some((outgoing) => outgoing.id === id)
      ? old.outgoing.filter((outgoing) => outgoing.id !== id)
      : old.outgoing;
  return { ...old, unread, outgoing };
}

function theirs(old: Conversation, { seq }: Envelope): Conversation {
  const { since, countedTo } = old.unread;
  const isUnread = seq > old.myRead && seq > countedTo && since.length < COUNTED_MAX && !since.includes(seq);
  return { ...old, typing: false, unread: isUnread ? { ...old.unread, since: [...since, seq] } : old.unread };
}

/** A message that was on its way is stored. */
export function stored(old: Conversation, unsent: Unsent, { seq, at }: Stored, me: string): Conversation {
  const next = noteLast(old, { seq, at, from: me, text: unsent.text });
  const isKnown = !old.timeline || old.timeline.to >= seq;
  if (isKnown) return { ...next, outgoing: old.outgoing.filter(({ id }) => id !== unsent.id) };
  if (old.timeline?.to === seq - 1) {
    const conversation = [me, old.peer].sort().join(':');
    const envelope = { v: 1, kind: 'text', conversation, seq, at, from: me, to: old.peer, id: unsent.id } as const;
    return arrive(old, { ...envelope, text: unsent.text }, me);
  }
  return { ...next, outgoing: old.outgoing.map((outgoing) => (outgoing.id === unsent.id ? { ...outgoing, seq } : outgoing)) };
}

/** A message is on its way; one that was not sent is tried again. */
export function queue(old: Conversation, { id, text, queuedAt }: Unsent): Conversation {
  if (old.timeline?.entries.some((entry) => entry.id === id)) return old;
  const next = { id, text, queuedAt };
  if (!old.outgoing.some((outgoing) => outgoing.id === id)) {
    return { ...old, outgoing: [...old.outgoing, next], activeAt: Math.max(old.activeAt, queuedAt) };
  }
  return { ...old, outgoing: old.outgoing.map((outgoing) => (outgoing.id === id ? next : outgoing)) };
}

export function notSent(old: Conversation, { id, text, queuedAt }: Unsent, failure: string): Conversation {
  const next = queue(old, { id, to: old.peer, text, queuedAt });
  return { ...next, outgoing: next.outgoing.map((outgoing) => (outgoing.id === id ? { ...outgoing, failure } : outgoing)) };
}

export function discard(old: Conversation, id: string): Conversation {
  return { ...old, outgoing: old.outgoing.filter((outgoing) => outgoing.id !== id) };
}

/** What is loaded is another part; what it has is not on its way. */
export function withTimeline(old: Conversation, timeline: Timeline | undefined): Conversation {
  if (!timeline || timeline === old.timeline) return old;
  const next = { ...old, timeline, top: Math.max(old.top, timeline.to) };
  if (old.outgoing.length === 0) return next;
  const stored = new Set(timeline.entries.slice(-400).map((entry) => entry.id));
  return { ...next, outgoing: old.outgoing.filter(({ id, seq }) => !stored.has(id) && !(seq !== undefined && seq <= timeline.to)) };
}

export function forget(old: Conversation): Conversation {
  const { timeline: _timeline, ...next } = old;
  return next;
}

export function wordless(old: Conversation, seq: number): Conversation {
  if (old.last?.seq !== seq) return old;
  const { text: _text, ...last } = old.last;
  return { ...old, last };
}

/** Of the entries that are gone for the user, the last may be the one in the list. */
export function remove(old: Conversation, seqs: readonly number[]): Conversation {
  const next = withTimeline(old, old.timeline && timelines.remove(old.timeline, seqs));
  if (!next.last || !seqs.includes(next.last.seq)) return next;
  const { last: _last, ...without } = next;
  const entry = next.timeline?.entries.at(-1);
  return entry ? noteLast(without, entry) : without;
}

/** With the line above what is new, if there is anything new and no line yet. */
export function withLine(old: Conversation): Conversation {
  return old.unreadAfter === undefined && unreadCount(old) > 0 ? { ...old, unreadAfter: old.myRead } : old;
}

function noteLast(old: Conversation, { seq, from, at, text }: Omit<Entry, 'id'>): Conversation {
  const next = { ...old, activeAt: Math.max(old.activeAt, at) };
  if (old.last && old.last.seq > seq) return next;
  // An entry of which more is known than comes from the wire.
  if (old.last?.seq === seq && old.last.text === undefined) return next;
  return { ...next, last: { seq, from, at, ...(text === undefined ? {} : { text: beginning(text) }) } };
}

const beginning = (text: string): string => (text.length > LAST_LENGTH_MAX ? text.slice(0, LAST_LENGTH_MAX) : text);
