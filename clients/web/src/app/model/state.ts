//! What the chat knows. [`reduce`] is the only way to know more.
//!
//! Pure: no clock, no socket, no storage. What has to be done about it is up to session.ts.

import type { ChatEvent, ConnectionState, Conversations, Sync, Text, Unsent } from '../../sdk/api';
import * as conversations from './conversation';
import type { Conversation } from './conversation';
import * as timelines from './timeline';

/** Entries that stay loaded of a conversation that is left. */
const RESTING_ENTRIES_MAX = 300;

export interface Presence {
  readonly status: 'online' | 'offline';
  readonly lastSeen?: number;
}

export interface Notice {
  readonly key: number;
  readonly text: string;
  readonly tone: 'info' | 'error';
}

export interface State {
  readonly me: string;
  readonly connection: ConnectionState;
  /** It was connected once since the page was loaded. */
  readonly wasConnected: boolean;
  /** What a message may have. */
  readonly messageBytes: number;
  readonly conversations: ReadonlyMap<string, Conversation>;
  /** The list is there: from the server or the cache. */
  readonly listed: boolean;
  /** Where the next page of the list begins. */
  readonly listNext?: string;
  readonly open?: string;
  readonly presence: ReadonlyMap<string, Presence>;
  /** What is written and not sent, by peer. */
  readonly drafts: ReadonlyMap<string, string>;
  readonly notice?: Notice;
}

/** A conversation out of the cache. */
export interface Kept {
  peer: string;
  delivered: number;
  read: number;
  myRead: number;
  blocked: boolean;
  last?: conversations.Last;
  activeAt: number;
  unread: number;
}

export type Event =
  | ChatEvent
  | { type: 'restored'; conversations: readonly Kept[]; drafts: ReadonlyMap<string, string>; edits: ReadonlyMap<string, conversations.Editing> }
  | { type: 'listed'; page: Conversations }
  | { type: 'greeted'; messageBytes: number }
  | { type: 'opened'; peer: string }
  | { type: 'left' }
  /** The newest of a conversation, from the server or the cache (`to`: it has everything up to there). */
  | { type: 'newest'; peer: string; entries: readonly Text[]; more: boolean; to?: number }
  | { type: 'earlier'; peer: string; entries: readonly Text[]; more: boolean }
  | { type: 'later'; peer: string; entries: readonly Text[]; more: boolean; upTo: number }
  /** Timelines that may have holes: all but the open one. */
  | { type: 'doubted' }
  /** The past is another one: of what was known only what was written here still holds. */
  | { type: 'forgotten' }
  /** `initial`: it is the whole past, of which the list knows what matters. */
  | { type: 'synced'; sync: Sync; initial: boolean }
  | { type: 'queued'; unsent: Unsent }
  | { type: 'discarded'; peer: string; id: string }
  | { type: 'drafted'; peer: string; text: string }
  | { type: 'editing'; peer: string; seq: number; text: string }
  | { type: 'edit_ended'; peer: string }
  | { type: 'edited'; peer: string; seq: number; text: string }
  | { type: 'unsent'; peer: string; seq: number }
  | { type: 'deleted'; peer: string; seq: number }
  | { type: 'blocked'; peer: string; blocked: boolean }
  /** Messages came that nobody looked at: the line is above them. */
  | { type: 'unseen'; peer: string; after: number }
  | { type: 'noticed'; notice: Notice | undefined };

export function initial(me: string): State {
  return {
    me,
    connection: { state: 'connecting' },
    wasConnected: false,
    messageBytes: 16_384,
    conversations: new Map(),
    listed: false,
    presence: new Map(),
    drafts: new Map(),
  };
}

export function reduce(state: State, event: Event): State {
  switch (event.type) {
    case 'connection': {
      const isConnected = event.connection.state === 'connected';
      const next = { ...state, connection: event.connection, wasConnected: state.wasConnected || isConnected };
      // Nobody is known to type, or to be there, who cannot be heard.
      return isConnected ? next : { ...next, presence: new Map(), conversations: quiet(state.conversations) };
    }
    case 'message': {
      const peer = event.message.from === state.me ? event.message.to : event.message.from;
      const next = peer === event.message.from && !event.waited ? isThere(state, peer) : state;
      return change(next, peer, (old) => conversations.arrive(old, event.message, state.me));
    }
    case 'receipt':
      return change(state, event.with, (old) => conversations.receipt(old, event.delivered, event.read));
    case 'read':
      return change(state, event.with, (old) => conversations.readTo(old, event.seq));
    case 'typing':
      return changeKnown(isThere(state, event.from), event.from, (old) => (old.typing === event.on ? old : { ...old, typing: event.on }));
    case 'presence': {
      const { user, status, last_seen } = event;
      const presence = new Map(state.presence);
      presence.set(user, { status, ...(last_seen === undefined ? {} : { lastSeen: last_seen }) });
      const next = { ...state, presence };
      return status === 'online' ? next : changeKnown(next, user, (old) => (old.typing ? { ...old, typing: false } : old));
    }
    case 'stored':
      return change(event.stored.receiverAway ? state : isThere(state, event.unsent.to), event.unsent.to, (old) => conversations.stored(old, event.unsent, event.stored, state.me));
    case 'not_sent':
      return change(state, event.unsent.to, (old) => conversations.notSent(old, event.unsent, event.error.message));
    case 'queued':
      return change(state, event.unsent.to, (old) => {
        const { unreadAfter: _unreadAfter, ...next } = conversations.queue(old, event.unsent);
        return next;
      });
    case 'discarded':
      return changeKnown(state, event.peer, (old) => conversations.discard(old, event.id));

    case 'restored': {
      let next: State = { ...state, drafts: event.drafts };
      for (const kept of event.conversations) {
        next = change(next, kept.peer, (old) => {
          const { unread, ...standing } = kept;
          const countedTo = kept.last?.seq ?? 0;
          return { ...old, ...standing, top: Math.max(old.top, countedTo), unread: { counted: unread, countedTo, since: [] } };
        });
      }
      for (const [peer, editing] of event.edits) next = change(next, peer, (old) => ({ ...old, editing }));
      return { ...next, listed: state.listed || event.conversations.length > 0 };
    }
    case 'listed': {
      let next = state;
      for (const told of event.page.conversations) {
        next = change(next, told.with, (old) => {
          const listed = conversations.list(old, told);
          return told.with === state.open ? conversations.withLine(listed) : listed;
        });
      }
      const { listNext: _listNext, ...rest } = next;
      return { ...rest, listed: true, ...(event.page.next === undefined ? {} : { listNext: event.page.next }) };
    }
    case 'greeted':
      return { ...state, messageBytes: event.messageBytes };
    case 'opened': {
      const next = state.open === event.peer ? state : { ...leave(state), open: event.peer };
      return change(next, event.peer, conversations.withLine);
    }
    case 'left':
      return leave(state);

    case 'newest':
      return change(state, event.peer, (old) => {
        const entries = event.entries.map(timelines.entryOf);
        return conversations.withTimeline(old, timelines.newest(old.timeline, entries, event.more, event.to));
      });
    case 'earlier':
      return changeLoaded(state, event.peer, (old) => timelines.earlier(old, event.entries.map(timelines.entryOf), event.more));
    case 'later':
      return changeLoaded(state, event.peer, (old) =>
        timelines.later(old, event.entries.map(timelines.entryOf), event.more, event.upTo),
      );
    case 'doubted': {
      const next = new Map<string, Conversation>();
      for (const [peer, old] of state.conversations) next.set(peer, peer === state.open ? old : conversations.forget(old));
      return { ...state, conversations: next };
    }
    case 'forgotten': {
      const next = new Map<string, Conversation>();
      const drafts = new Map(state.drafts);
      for (const [peer, old] of state.conversations) {
        // The message that was to have these words is another one now.
        if (old.editing && !drafts.has(peer)) drafts.set(peer, old.editing.text);
        const outgoing = old.outgoing.filter(({ seq }) => seq === undefined);
        if (outgoing.length > 0 || peer === state.open) next.set(peer, { ...conversations.conversation(peer), outgoing, activeAt: outgoing.at(-1)?.queuedAt ?? 0 });
      }
      const { listNext: _listNext, ...rest } = state;
      return { ...rest, conversations: next, drafts };
    }
    case 'synced': {
      let next = state;
      for (const entry of event.sync.entries) {
        const peer = entry.from === state.me ? entry.to : entry.from;
        // Long ago: nothing of it is shown, and the list knows better.
        const known = next.conversations.get(peer);
        if (known ? entry.kind === 'text' && entry.seq <= known.top && !known.timeline : event.initial) continue;
        next = change(next, peer, (old) => conversations.arrive(old, entry, state.me));
      }
      for (const standing of event.sync.conversations) {
        if (event.initial && !next.conversations.has(standing.with)) continue;
        next = change(next, standing.with, (old) => conversations.remove(conversations.stand(old, standing), standing.deleted ?? []));
      }
      return next;
    }

    case 'drafted': {
      if ((state.drafts.get(event.peer) ?? '') === event.text) return state;
      const drafts = new Map(state.drafts);
      if (event.text === '') drafts.delete(event.peer);
      else drafts.set(event.peer, event.text);
      return { ...state, drafts };
    }
    case 'editing':
      return changeKnown(state, event.peer, (old) => ({ ...old, editing: { seq: event.seq, text: event.text } }));
    case 'edit_ended':
      return changeKnown(state, event.peer, ({ editing: _editing, ...old }) => old);
    case 'edited':
      return changeKnown(state, event.peer, (old) => {
        const last = old.last?.seq === event.seq ? { ...old.last, text: event.text } : old.last;
        const next = conversations.withTimeline(old, old.timeline && timelines.edit(old.timeline, event.seq, event.text));
        return { ...next, ...(last ? { last } : {}) };
      });
    case 'unsent':
      return changeKnown(state, event.peer, (old) =>
        conversations.withTimeline(
          conversations.wordless(old, event.seq),
          old.timeline && timelines.unsend(old.timeline, event.seq),
        ),
      );
    case 'deleted':
      return changeKnown(state, event.peer, (old) => conversations.remove(old, [event.seq]));
    case 'blocked':
      return change(state, event.peer, (old) => ({ ...old, blocked: event.blocked }));
    case 'unseen':
      return changeKnown(state, event.peer, (old) => (old.unreadAfter === undefined ? { ...old, unreadAfter: event.after } : old));
    case 'noticed': {
      const { notice: _notice, ...rest } = state;
      return event.notice ? { ...rest, notice: event.notice } : rest;
    }
  }
}

/** The conversations, those first in which something happened last. */
export function listOf(state: State): Conversation[] {
  return [...state.conversations.values()]
    .filter((of) => of.last || of.outgoing.length > 0 || of.activeAt > 0 || state.drafts.has(of.peer) || of.peer === state.open)
    .sort((a, b) => b.activeAt - a.activeAt || (a.peer < b.peer ? -1 : 1));
}

export function unreadOf(state: State): number {
  let unread = 0;
  for (const of of state.conversations.values()) if (!of.blocked) unread += conversations.unreadCount(of);
  return unread;
}

export function waitingOf(state: State): number {
  let waiting = 0;
  for (const of of state.conversations.values()) waiting += of.outgoing.filter((outgoing) => outgoing.failure === undefined && outgoing.seq === undefined).length;
  return waiting;
}

/** The server tells the presence of those with whom there is a conversation as it changes: of a new one it is known by what they do. */
function isThere(state: State, user: string): State {
  if (state.presence.has(user)) return state;
  return { ...state, presence: new Map(state.presence).set(user, { status: 'online' }) };
}

function leave(state: State): State {
  const { open, ...rest } = state;
  if (open === undefined) return state;
  return changeKnown(rest, open, ({ unreadAfter: _unreadAfter, ...old }) =>
    old.timeline ? { ...old, timeline: timelines.trim(old.timeline, RESTING_ENTRIES_MAX) } : old,
  );
}

function quiet(old: ReadonlyMap<string, Conversation>): ReadonlyMap<string, Conversation> {
  const next = new Map<string, Conversation>();
  for (const [peer, of] of old) next.set(peer, of.typing ? { ...of, typing: false } : of);
  return next;
}

function change(state: State, peer: string, by: (old: Conversation) => Conversation): State {
  const old = state.conversations.get(peer);
  const next = by(old ?? conversations.conversation(peer));
  if (next === old) return state;
  const all = new Map(state.conversations);
  all.set(peer, next);
  return { ...state, conversations: all };
}

function changeKnown(state: State, peer: string, by: (old: Conversation) => Conversation): State {
  return state.conversations.has(peer) ? change(state, peer, by) : state;
}

function changeLoaded(state: State, peer: string, by: (old: timelines.Timeline) => timelines.Timeline): State {
  return changeKnown(state, peer, (old) => conversations.withTimeline(old, old.timeline && by(old.timeline)));
}
