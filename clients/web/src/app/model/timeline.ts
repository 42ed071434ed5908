//! The part of a conversation that is loaded.
//!
//! Pure. Invariants: it is one piece of the conversation without holes; each seq is there once, in order; what is taken back never gets its words again.
//! `to` counts entries of every kind: an edit is an entry, though it is not shown as one.

import type { Envelope, Text } from '../../sdk/api';

export interface Entry {
  readonly seq: number;
  readonly from: string;
  readonly id?: string;
  readonly at: number;
  /** Absent if it was taken back. */
  readonly text?: string;
  readonly editedAt?: number;
}

export interface Timeline {
  readonly entries: readonly Entry[];
  /** Everything from the first entry up to this seq is known. */
  readonly to: number;
  /** There is more before the first entry. */
  readonly earlier: boolean;
}

export function entryOf(text: Text): Entry {
  return {
    seq: text.seq,
    from: text.from,
    at: text.at,
    ...(text.id === undefined ? {} : { id: text.id }),
    ...(text.unsent || text.text === undefined ? {} : { text: text.text }),
    ...(text.edited_at === undefined ? {} : { editedAt: text.edited_at }),
  };
}

/** Where `seq` is, or would be. */
export function place(entries: readonly Entry[], seq: number): number {
  let low = 0;
  let high = entries.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((entries[middle] as Entry).seq < seq) low = middle + 1;
    else high = middle;
  }
  return low;
}

export function find(entries: readonly Entry[], seq: number): Entry | undefined {
  const entry = entries[place(entries, seq)];
  return entry?.seq === seq ? entry : undefined;
}

/** The newest page has come: it is laid over what is there, or takes its place if there may be a hole between the two. */
export function newest(old: Timeline | undefined, page: readonly Entry[], more: boolean, to = 0): Timeline {
  const first = page[0]?.seq ?? 0;
  const last = Math.max(page.at(-1)?.seq ?? 0, to);
  const joins = old !== undefined && page.length > 0 && more && first <= old.to + 1 && old.entries.length > 0;
  if (!joins) return { entries: page, to: last, earlier: more };
  const before = old.entries.slice(0, place(old.entries, first));
  const after = old.entries.slice(place(old.entries, (page.at(-1) as Entry).seq + 1));
  return {
    entries: [...before, ...page, ...after],
    to: Math.max(old.to, last),
    earlier: before.length > 0 ? old.earlier : more,
  };
}

/** A page that ends before the first entry. */
export function earlier(old: Timeline, page: readonly Entry[], more: boolean): Timeline {
  const first = old.entries[0]?.seq ?? Infinity;
  const new_ = page.filter((entry) => entry.seq < first);
  return { ...old, entries: [...new_, ...old.entries], earlier: more };
}

/** A page that begins after `to`; if there is no more, all is known up to `upTo`. */
export function later(old: Timeline, page: readonly Entry[], more: boolean, upTo: number): Timeline {
  const added = page.filter((entry) => entry.seq > old.to);
  const last = added.at(-1)?.seq ?? 0;
  return { ...old, entries: [...old.entries, ...added], to: Math.max(old.to, last, more ? 0 : upTo) };
}

/** An entry has arrived. What does not follow on what is known is left out: there is a hole, to be asked for. */
export function arrive(old: Timeline, envelope: Envelope): Timeline {
  const follows = envelope.seq === old.to + 1;
  const to = follows ? envelope.seq : old.to;
  switch (envelope.kind) {
    case 'text': {
      if (!follows) return old;
      const { seq, from, at, text, id } = envelope;
      const entry: Entry = { seq, from, at, text, ...(id === undefined ? {} : { id }) };
      return { ...old, to, entries: [...old.entries, entry] };
    }
    case 'edit':
      return { ...edit(old, envelope.target, envelope.text, envelope.at), to };
    case 'unsend':
      return { ...unsend(old, envelope.target), to };
    case 'erased': {
      // It may have been an edit: only of what is known as a text is it known that it was one.
      return { ...unsend(old, envelope.seq), to };
    }
  }
}

export function edit(old: Timeline, seq: number, text: string, at?: number): Timeline {
  return change(old, seq, (entry) => {
    if (entry.text === undefined || (at !== undefined && at < (entry.editedAt ?? 0))) return entry;
    return { ...entry, text, editedAt: at ?? entry.editedAt ?? entry.at };
  });
}

export function unsend(old: Timeline, seq: number): Timeline {
  return change(old, seq, ({ text: _text, editedAt: _editedAt, ...entry }) => entry);
}

export function remove(old: Timeline, seqs: readonly number[]): Timeline {
  if (seqs.length === 0) return old;
  const gone = new Set(seqs);
  const entries = old.entries.filter((entry) => !gone.has(entry.seq));
  return entries.length === old.entries.length ? old : { ...old, entries };
}

/** Keeps the newest. */
export function trim(old: Timeline, entriesMax: number): Timeline {
  if (old.entries.length <= entriesMax) return old;
  return { ...old, entries: old.entries.slice(-entriesMax), earlier: true };
}

function change(old: Timeline, seq: number, by: (entry: Entry) => Entry): Timeline {
  const at = place(old.entries, seq);
  const entry = old.entries[at];
  if (entry?.seq !== seq) return old;
  const entries = old.entries.slice();
  entries[at] = by(entry);
  return { ...old, entries };
}
