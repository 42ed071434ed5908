import { expect, test, vi } from 'vitest';

import type { ChatEvent } from './api.js';
import { Teller } from './teller.js';

const typing = (from: string, on: boolean): ChatEvent => ({ type: 'typing', from, on });
const lost = (reason: string): ChatEvent => ({ type: 'connection', connection: { state: 'lost', reason, retryAt: 0 } });
const reasons = (events: ChatEvent[]) => events.map((event) => (event.type === 'connection' && event.connection.state === 'lost' ? event.connection.reason : event.type));

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
  teller.tell(lost('a'), told);
  teller.tell(lost('b'), told);
  await vi.waitFor(() => expect(gates).toHaveLength(1));
  expect(reasons(quick ?? [])).toEqual(['a']);
  expect(told).not.toHaveBeenCalled();
  gates[0]?.();
  await vi.waitFor(() => expect(gates).toHaveLength(2));
  expect(told.mock.calls).toEqual([[true]]);
  expect(reasons(slow ?? [])).toEqual(['a', 'b']);
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
  teller.tell(lost('a'), told);
  teller.tell(lost('b'), told);
  await vi.waitFor(() => expect(told.mock.calls).toEqual([[false], [false]]));
  expect(reasons(heard)).toEqual(['a', 'b']);
  expect(complaint).toHaveBeenCalledTimes(2);
  complaint.mockRestore();
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
