import { describe, expect, it } from 'vitest';

import { conversation, type Conversation } from './conversation';
import { rowsOf, tickOf, type MessageRow } from './rows';
import type { Entry } from './timeline';

const MINUTE = 60_000;
const day = (at: number) => String(Math.floor(at / 86_400_000));
const with_ = (entries: readonly Entry[], more: Partial<Conversation> = {}): Conversation => ({
  ...conversation('bob'),
  timeline: { entries, to: entries.at(-1)?.seq ?? 0, earlier: false },
  ...more,
});
const entry = (seq: number, from: string, at: number, id?: string): Entry => ({ seq, from, at, text: `text ${seq}`, ...(id === undefined ? {} : { id }) });

describe('rows', () => {
  it('have a line for each day, and groups of one sender', () => {
    const rows = rowsOf(with_([entry(1, 'bob', 0), entry(2, 'bob', MINUTE), entry(3, 'alice', 2 * MINUTE), entry(4, 'alice', 20 * MINUTE), entry(5, 'alice', 86_400_000)]), 'alice', day);
    expect(rows.map((row) => (row.kind === 'message' ? `${row.from} ${row.first ? 'first' : ''} ${row.last ? 'last' : ''}` : row.kind))).toEqual([
      'day',
      'bob first ',
      'bob  last',
      'alice first last',
      'alice first last',
      'day',
      'alice first last',
    ]);
  });

  it('have keys of their own, which a message keeps while it is stored', () => {
    const waiting = rowsOf(with_([entry(1, 'bob', 0)], { outgoing: [{ id: 'x', text: 'hi', queuedAt: MINUTE }] }), 'alice', day);
    const stored = rowsOf(with_([entry(1, 'bob', 0), entry(2, 'alice', MINUTE, 'x')]), 'alice', day);
    expect(waiting.map(({ key }) => key)).toEqual(stored.map(({ key }) => key));
    expect(new Set(stored.map(({ key }) => key)).size).toBe(stored.length);
  });

  it('have the line above the first that is new', () => {
    const of = with_([entry(1, 'bob', 0), entry(2, 'alice', 1), entry(3, 'bob', 2), entry(4, 'bob', 3)], { unreadAfter: 1 });
    expect(rowsOf(of, 'alice', day).map(({ key }) => key)).toEqual(['d0', 'm1', 'm2', 'unread', 'm3', 'm4']);
    expect(rowsOf({ ...of, unreadAfter: 3 }, 'alice', day).map(({ key }) => key)).toEqual(['d0', 'm1', 'm2', 'm3', 'unread', 'm4']);
    expect(rowsOf({ ...of, unreadAfter: 4 }, 'alice', day).some(({ kind }) => kind === 'unread')).toBe(false);
  });

  it('have ticks', () => {
    const of = with_([1, 2, 3].map((seq) => entry(seq, 'alice', seq)), { read: 1, delivered: 2, outgoing: [{ id: 'a', text: '', queuedAt: 9 }, { id: 'b', text: '', queuedAt: 9, failure: 'no' }, { id: 'c', text: '', queuedAt: 9, seq: 9 }] });
    const rows = rowsOf(of, 'alice', day).filter((row): row is MessageRow => row.kind === 'message');
    expect(rows.map((row) => tickOf(row, of))).toEqual(['read', 'delivered', 'stored', 'waiting', 'failed', 'stored']);
  });
});
