import { expect, test, vi } from 'vitest';

import type { ChatEvent } from './api.js';
import { text } from './fakes.js';
import { Teller } from './teller.js';

const typing = (from: string, on: boolean): ChatEvent => ({ type: 'typing', from, on });
const lost = (reason: string): ChatEvent => ({ type: 'connection', connection: { state: 'lost', reason, retryAt: 0 } });
const message = (seq: number): ChatEvent => ({ type: 'message', message: text('bob', 'alice', seq), waited: false });

test('one after another, to all', async () => {
  const teller = new Teller();
  const [slow, quick]: ChatEvent[][] = [[], []];
  const gates: (() => void)[] = [];
  teller.listen((event) => {
    slow?.push(event);
    return new Promise((resolve) => gates.push(resolve));
  });
  teller.listen((event) => void quick?.push(event));
  const told = vi.fn();
  teller.tell(message(1), told);
  teller.tell(message(2), told);
  await vi.waitFor(() => expect(gates).toHaveLength(1));
  expect(quick).toEqual([message(1)]);
  expect(told).not.toHaveBeenCalled();
  gates[0]?.();
  await vi.waitFor(() => expect(gates).toHaveLength(2));
  expect(told.mock.calls).toEqual([[true]]);
  expect(slow).toEqual([message(1), message(2)]);
});

test('a listener that fails is heard of, and the others and the next events are not hurt', async () => {
  const complaint = vi.spyOn(console, 'error').mockImplementation(() => {});
  const teller = new Teller();
  const heard: ChatEvent[] = [];
  teller.listen(() => {
    throw new Error('at once');
  });
  teller.listen((event) => void heard.push(event));
  const told = vi.fn();
  teller.tell(message(1), told);
  teller.tell(message(2), told);
  await vi.waitFor(() => expect(told.mock.calls).toEqual([[false], [false]]));
  expect(heard).toEqual([message(1), message(2)]);
  expect(complaint).toHaveBeenCalledTimes(2);
  complaint.mockRestore();
});

test('of the connection what counts is how it stands', async () => {
  const teller = new Teller();
  const heard: ChatEvent[] = [];
  for (const event of [lost('a'), lost('b'), message(1), lost('c'), lost('d')]) teller.tell(event);
  teller.listen((event) => void heard.push(event));
  await vi.waitFor(() => expect(heard).toEqual([lost('b'), message(1), lost('d')]));
});

test('events wait for a listener, and of live ones the newest', async () => {
  const teller = new Teller();
  teller.tell(typing('bob', true));
  teller.tell(lost('a'));
  teller.tell(typing('zoe', true));
  teller.tell(typing('bob', false));
  const heard: ChatEvent[] = [];
  const end = teller.listen((event) => void heard.push(event));
  await vi.waitFor(() => expect(heard).toEqual([typing('bob', false), lost('a'), typing('zoe', true)]));
  end();
  teller.tell(typing('bob', true));
  teller.listen((event) => void heard.push(event));
  await vi.waitFor(() => expect(heard.at(-1)).toEqual(typing('bob', true)));
});
