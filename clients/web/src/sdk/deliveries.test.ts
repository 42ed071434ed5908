import { expect, test } from 'vitest';

import { Deliveries } from './deliveries.js';

const entry = (seq: number, at = seq) => ({ conversation: 'alice:bob', seq, at });

function acknowledged(deliveries: Deliveries): number[] {
  const packets = [];
  for (let next = deliveries.nextAcknowledged(); next !== undefined; next = deliveries.nextAcknowledged()) packets.push(next);
  return packets;
}

test('acknowledgements keep the order of arrival', () => {
  const deliveries = new Deliveries();
  for (const seq of [1, 2, 3]) expect(deliveries.arrived(entry(seq), seq * 10)).toBe(true);
  deliveries.passed(40);
  deliveries.taken(entry(2));
  expect(acknowledged(deliveries)).toEqual([]);
  deliveries.taken(entry(1));
  expect(acknowledged(deliveries)).toEqual([10, 20]);
  deliveries.taken(entry(3));
  expect(acknowledged(deliveries)).toEqual([30, 40]);
});

test('what comes again is known, and acknowledged by its new packet', () => {
  const deliveries = new Deliveries();
  deliveries.arrived(entry(1), 1);
  deliveries.arrived(entry(2), 2);
  deliveries.taken(entry(1));
  deliveries.disconnected();
  expect(deliveries.arrived(entry(1), 7)).toBe(false);
  expect(deliveries.arrived(entry(2), 8)).toBe(false);
  expect(acknowledged(deliveries)).toEqual([7]);
  deliveries.taken(entry(2));
  expect(acknowledged(deliveries)).toEqual([8]);
});

test('what the program let go of comes again, and is not acknowledged', () => {
  const deliveries = new Deliveries();
  deliveries.arrived(entry(1), 1);
  expect(deliveries.dropped(entry(1))).toBe(true);
  expect(acknowledged(deliveries)).toEqual([]);
  deliveries.disconnected();
  expect(deliveries.dropped(entry(1))).toBe(false);
  expect(deliveries.arrived(entry(1), 2)).toBe(true);
  deliveries.taken(entry(1));
  expect(acknowledged(deliveries)).toEqual([2]);
});

test('a server that counts anew has new entries', () => {
  const deliveries = new Deliveries();
  deliveries.arrived(entry(5, 500), 1);
  deliveries.taken(entry(5, 500));
  expect(deliveries.arrived(entry(4, 400), 2)).toBe(false);
  expect(deliveries.arrived(entry(4, 600), 3)).toBe(true);
});
