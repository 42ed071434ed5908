import { IDBFactory } from 'fake-indexeddb';
import 'fake-indexeddb/auto';
import { beforeEach, describe, expect, it } from 'vitest';

import type { Envelope, Text } from '../sdk/api';
import { openCache, type Cache } from './cache';

const text = (seq: number, more: Partial<Text> = {}): Text => ({ v: 1, kind: 'text', conversation: 'alice:bob', seq, from: 'bob', to: 'alice', at: seq, text: `text ${seq}`, ...more });
const texts = (from: number, to: number): Text[] => Array.from({ length: to - from + 1 }, (_, at) => text(from + at));
const seqs = ({ entries }: { entries: readonly { seq: number }[] }): number[] => entries.map(({ seq }) => seq);

describe('the cache', () => {
  let databases: IDBFactory;
  let cache: Cache;

  beforeEach(async () => {
    databases = new IDBFactory();
    cache = await openCache('alice', databases);
  });

  it('knows nothing at first', async () => {
    expect(await cache.load()).toEqual({ conversations: [], failed: [] });
    expect(await cache.page('bob', undefined, 10)).toEqual({ entries: [], more: true });
  });

  it('tells pages from the newest on', async () => {
    await cache.put('bob', texts(11, 20), false, false);
    await cache.put('bob', texts(1, 10), true, true);
    const newest = await cache.page('bob', undefined, 8);
    expect([seqs(newest), newest.more]).toEqual([[13, 14, 15, 16, 17, 18, 19, 20], true]);
    const before = await cache.page('bob', 13, 100);
    expect([seqs(before), before.more]).toEqual([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], false]);
    expect(seqs(await cache.page('zoe', undefined, 8))).toEqual([]);
  });

  it('never tells across a hole', async () => {
    await cache.put('bob', texts(1, 5), true, false);
    await cache.put('bob', texts(50, 60), false, false);
    const page = await cache.page('bob', undefined, 100);
    expect([seqs(page)[0], page.entries.length, page.more]).toEqual([50, 11, true]);
    expect(await cache.page('bob', 50, 100)).toEqual({ entries: [], more: true });
    // Pages that overlap leave none.
    await cache.put('bob', texts(55, 65), false, false);
    expect(seqs(await cache.page('bob', undefined, 100))[0]).toBe(50);
  });

  it('is complete when everything was synced', async () => {
    const entries = texts(1, 3) as Envelope[];
    await cache.synced('alice', undefined, { entries, conversations: [], next: 't1', more: true });
    expect((await cache.load()).token).toBe('t1');
    expect(seqs(await cache.page('bob', undefined, 10))).toEqual([]);
    const standing = { with: 'bob', delivered: 0, read: 0, my_read: 0, blocked: false };
    await cache.synced('alice', 't1', { entries: texts(4, 5) as Envelope[], conversations: [{ ...standing, deleted: [2] }], next: 't2', more: false });
    const page = await cache.page('bob', undefined, 10);
    expect([seqs(page), page.more]).toEqual([[1, 3, 4, 5], false]);
  });

  it('keeps everything from a token on', async () => {
    expect(await cache.begin('t1')).toBe('t1');
    // Another tab was first.
    expect(await cache.begin('t2')).toBe('t1');
    await cache.synced('alice', 't1', { entries: texts(301, 302) as Envelope[], conversations: [], next: 't3', more: false });
    await cache.arrived('bob', text(303) as Envelope);
    expect(await cache.page('bob', undefined, 10)).toEqual({ entries: texts(301, 303), more: true });
    expect(await cache.page('bob', 301, 10)).toEqual({ entries: [], more: true });
    await cache.put('bob', texts(203, 303), false, false);
    await cache.arrived('bob', text(304) as Envelope);
    const page = await cache.page('bob', undefined, 1_000);
    expect([seqs(page)[0], page.entries.length, page.more]).toEqual([203, 102, true]);
    // What comes of what is not here, is not the beginning of anything.
    await cache.arrived('zoe', { ...text(7), from: 'zoe', conversation: 'alice:zoe', kind: 'unsend', target: 5 } as Envelope);
    expect(await cache.page('zoe', undefined, 10)).toEqual({ entries: [], more: true });
    await cache.clear();
    await cache.arrived('bob', text(305) as Envelope);
    expect(await cache.page('bob', undefined, 10)).toEqual({ entries: [], more: true });
  });

  it('keeps no token for what it has not', async () => {
    const page = (from: number, to: number, next: string, more: boolean) => ({ entries: texts(from, to) as Envelope[], conversations: [], next, more });
    await cache.synced('alice', undefined, page(1, 2, 't1', true));
    // The page after t1 found no place.
    await cache.synced('alice', 't2', page(5, 6, 't3', false));
    expect((await cache.load()).token).toBe('t1');
    expect(await cache.page('bob', undefined, 10)).toEqual({ entries: [], more: true });
    // Another tab logs out while this one goes on.
    await cache.clear();
    await cache.synced('alice', 't1', page(3, 6, 't3', false));
    expect(await cache.load()).toEqual({ conversations: [], failed: [] });
    expect(await cache.page('bob', undefined, 10)).toEqual({ entries: [], more: true });
  });

  it('keeps texts as they stand', async () => {
    const base = { v: 1, conversation: 'alice:bob', from: 'bob', to: 'alice' } as const;
    await cache.put('bob', texts(1, 3), true, false);
    await cache.arrived('bob', { ...base, kind: 'edit', seq: 4, at: 40, target: 1, text: 'other' });
    await cache.arrived('bob', { ...base, kind: 'edit', seq: 4, at: 30, target: 1, text: 'older' });
    await cache.arrived('bob', { ...base, kind: 'unsend', seq: 5, at: 50, target: 2 });
    await cache.arrived('bob', text(2) as Envelope);
    await cache.arrived('bob', { ...base, kind: 'erased', seq: 3, at: 3 });
    const { entries } = await cache.page('bob', undefined, 10);
    expect(entries[0]).toEqual(text(1, { text: 'other', edited_at: 40 }));
    expect(entries.slice(1).map(({ seq, text, unsent }) => [seq, text, unsent])).toEqual([[2, undefined, true], [3, undefined, true]]);
    await cache.remove('bob', [1]);
    expect(seqs(await cache.page('bob', undefined, 10))).toEqual([2, 3]);
  });

  it('forgets everything but what was not sent', async () => {
    const unsent = { id: 'x', to: 'bob', text: 'hi', queuedAt: 1 };
    await cache.put('bob', texts(1, 3), true, false);
    await cache.keepFailed({ unsent, failure: 'no' });
    await cache.clear();
    const again = await openCache('alice', databases);
    expect(await again.load()).toEqual({ conversations: [], failed: [{ unsent, failure: 'no' }] });
    expect(seqs(await again.page('bob', undefined, 10))).toEqual([]);
    await again.dropFailed('x');
    expect((await again.load()).failed).toEqual([]);
  });
});
