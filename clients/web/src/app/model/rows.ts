//! What the timeline shows, row by row: messages in groups, a line for each day and one above what is new.
//!
//! Pure. A row's key stays the same as long as it is the same thing to the user: a message keeps it while it is stored.

import type { Conversation, Outgoing } from './conversation';
import type { Entry } from './timeline';

/** Messages of one sender that are closer than this are one group. */
const GROUP_MS = 5 * 60_000;

export type Tick = 'waiting' | 'failed' | 'stored' | 'delivered' | 'read';

export interface MessageRow {
  readonly kind: 'message';
  readonly key: string;
  readonly mine: boolean;
  readonly from: string;
  readonly at: number;
  readonly text?: string;
  readonly entry?: Entry;
  readonly outgoing?: Outgoing;
  /** The first and the last of its group. */
  readonly first: boolean;
  readonly last: boolean;
}

export type Row =
  | MessageRow
  | { readonly kind: 'day'; readonly key: string; readonly at: number }
  | { readonly kind: 'unread'; readonly key: 'unread' };

/** `day` names the day that a time is in. */
export function rowsOf(of: Conversation, me: string, day: (at: number) => string): Row[] {
  const rows: Row[] = [];
  const entries = of.timeline?.entries ?? [];
  const lineBefore = lineOf(of, me);
  let lastDay: string | undefined;
  let previous: MessageRow | undefined;

  const put = (row: MessageRow, dayOfRow: string): void => {
    let joins = previous !== undefined && previous.from === row.from && row.at - previous.at < GROUP_MS;
    if (dayOfRow !== lastDay) {
      rows.push({ kind: 'day', key: `d${dayOfRow}`, at: row.at });
      lastDay = dayOfRow;
      joins = false;
    }
    if (row.entry && row.entry.seq === lineBefore) {
      rows.push({ kind: 'unread', key: 'unread' });
      joins = false;
    }
    if (joins && previous) rows[rows.length - 1] = previous = { ...previous, last: false };
    previous = { ...row, first: !joins };
    rows.push(previous);
  };

  for (const entry of entries) {
    const { seq, from, at, id, text } = entry;
    const mine = from === me;
    const key = mine && id !== undefined ? `i${id}` : `m${seq}`;
    put({ kind: 'message', key, mine, from, at, entry, first: true, last: true, ...(text === undefined ? {} : { text }) }, day(at));
  }
  for (const outgoing of of.outgoing) {
    const { id, text, queuedAt } = outgoing;
    // This machine's clock may be behind the server's.
    const at = Math.max(queuedAt, previous?.at ?? 0);
    put({ kind: 'message', key: `i${id}`, mine: true, from: me, at, text, outgoing, first: true, last: true }, day(at));
  }
  return rows;
}

/** The seq of the entry that the line is above. */
function lineOf(of: Conversation, me: string): number | undefined {
  if (of.unreadAfter === undefined || !of.timeline) return undefined;
  const { entries, earlier } = of.timeline;
  let first: number | undefined;
  for (let at = entries.length - 1; at >= 0; at -= 1) {
    const entry = entries[at] as Entry;
    // Who wrote has read what was before.
    if (entry.from === me || entry.seq <= of.unreadAfter) return first;
    first = entry.seq;
  }
  // It is above what is loaded.
  return earlier ? undefined : first;
}

export function tickOf(row: MessageRow, of: Conversation): Tick | undefined {
  if (!row.mine) return undefined;
  const seq = row.entry?.seq ?? row.outgoing?.seq;
  if (seq === undefined) return row.outgoing?.failure === undefined ? 'waiting' : 'failed';
  if (seq <= of.read) return 'read';
  return seq <= of.delivered ? 'delivered' : 'stored';
}
