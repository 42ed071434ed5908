import { expect, test } from 'vitest';

import { newDevice, newId } from './names.js';
import { isId } from './payloads.js';

test('ids are UUIDs of version 7, sort by time, and are never the same', () => {
  const ids = Array.from({ length: 1_000 }, (_, at) => newId(1_795_456_800_000 + at));
  for (const id of ids) {
    expect(id).toMatch(/^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
    expect(isId(id)).toBe(true);
  }
  expect(ids.toSorted()).toEqual(ids);
  expect(new Set(Array.from({ length: 1_000 }, () => newId(1)))).toHaveProperty('size', 1_000);
});

test('a device of its own for each page', () => {
  expect(newDevice()).toMatch(/^web-[A-Za-z0-9_-]{22}$/);
  expect(newDevice()).not.toBe(newDevice());
});
