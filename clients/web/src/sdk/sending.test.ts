import { expect, test } from 'vitest';

import type { Unsent } from './api.js';
import { PAUSE_MIN_MS, Sending, WINDOW } from './sending.js';
import type { Answer } from './transport.js';

const unsent = (id: string, to = 'bob', queuedAt = 1): Unsent => ({ id, to, text: 'hello', queuedAt });
const stored: Answer = { is: 'stored', seq: 1, at: 2, receiverAway: false };
const refused = (code: string): Answer => ({ is: 'refused', code, message: code });

function published(sending: Sending, now: number): string[] {
  const ids = [];
  for (let next = sending.next(now); next; next = sending.next(now)) ids.push(next.id);
  return ids;
}

function three(): Sending {
  const sending = new Sending();
  for (const id of ['a', 'b', 'c']) sending.push(unsent(id));
  sending.push(unsent('z', 'zoe'));
  sending.connected(undefined, 0);
  return sending;
}

test('one of a conversation after the other, and again after a reconnect', () => {
  const sending = three();
  expect(published(sending, 0)).toEqual(['a', 'z']);
  expect(sending.answered('a', stored, 0)?.id).toBe('a');
  expect(published(sending, 0)).toEqual(['b']);
  sending.disconnected();
  sending.connected(undefined, 0);
  expect(published(sending, 0)).toEqual(['b', 'z']);
  expect(sending.answered('a', stored, 0)).toBeUndefined();
  expect(published(sending, 0)).toEqual([]);
});

test('no more conversations than the window', () => {
  const sending = new Sending();
  for (let number = 0; number < 40; number++) sending.push(unsent(`m-${number}`, `user-${number}`));
  expect(published(sending, 0)).toHaveLength(WINDOW);
  expect(sending.wakeAt).toBeUndefined();
  sending.answered('m-0', stored, 0);
  sending.answered('m-1', stored, 0);
  expect(published(sending, 0)).toEqual(['m-16', 'm-17']);
});

test('what passes is tried again in order, later each time', () => {
  const sending = three();
  published(sending, 0);
  sending.answered('a', stored, 0);
  expect(published(sending, 0)).toEqual(['b']);
  expect(sending.answered('b', refused('too_fast'), 0)).toBeUndefined();
  expect(sending.answered('z', refused('too_fast'), 0)).toBeUndefined();
  expect(published(sending, 0)).toEqual([]);
  expect(sending.wakeAt).toBe(PAUSE_MIN_MS);
  expect(published(sending, PAUSE_MIN_MS)).toEqual(['b', 'z']);
  sending.answered('b', refused('unavailable'), PAUSE_MIN_MS);
  expect(sending.wakeAt).toBe(3 * PAUSE_MIN_MS);
});

test('what is refused is given back, and what is discarded is not published', () => {
  const sending = three();
  published(sending, 0);
  expect(sending.answered('a', refused('unknown_user'), 0)?.id).toBe('a');
  expect(sending.take('b')?.id).toBe('b');
  sending.push(unsent('d'));
  expect(published(sending, 0)).toEqual(['c']);
  expect(sending.take('c')?.id).toBe('c');
  expect(published(sending, 0)).toEqual(['d']);
  expect(sending.waiting.map(({ id }) => id)).toEqual(['z', 'd']);
});

test('what is too old is taken out', () => {
  const sending = new Sending();
  for (const [id, at] of [['a', 10], ['b', 30], ['c', 20]] as const) sending.push(unsent(id, 'bob', at));
  expect(sending.takeOlder(25).map(({ id }) => id)).toEqual(['a', 'c']);
  expect(sending.waiting.map(({ id }) => id)).toEqual(['b']);
});

test('no faster than the server says', () => {
  const sending = new Sending();
  for (let number = 0; number < 300; number++) sending.push(unsent(`m-${number}`));
  sending.connected(100, 0);
  const times: number[] = [];
  for (let now = 0, wakeAt = sending.wakeAt; wakeAt !== undefined; wakeAt = sending.wakeAt) {
    now = Math.max(now, wakeAt);
    for (const id of published(sending, now)) {
      times.push(now);
      sending.answered(id, stored, now);
    }
  }
  expect(times).toHaveLength(300);
  // As the server counts: never more than a second's worth ahead of 100/s.
  for (const [number, at] of times.entries()) expect(number * 10).toBeLessThanOrEqual(at + 1_000);
  expect(times.at(-1)).toBeLessThan(4_000);
});
