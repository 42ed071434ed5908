import { expect, test } from 'vitest';

import { readAnswer } from './answer.js';

const properties = (all: Record<string, string>) => (name: string) => all[name];
const numbered = properties({ seq: '17', at: '1795456800123' });

test('a message is stored', () => {
  expect(readAnswer(0, undefined, numbered)).toEqual({ is: 'stored', seq: 17, at: 1795456800123, receiverAway: false });
  expect(readAnswer(0x10, undefined, numbered)).toMatchObject({ receiverAway: true });
});

test('something else is done', () => {
  for (const all of [{}, { seq: '17' }, { seq: '0', at: '1' }, { seq: '1e3', at: '1' }, { seq: '-1', at: '1' }, { seq: '9999999999999999', at: '1' }]) {
    expect(readAnswer(0, undefined, properties(all as Record<string, string>))).toEqual({ is: 'done' });
  }
});

test('a refusal has a code and a sentence', () => {
  expect(readAnswer(0x97, 'quota_exceeded: too much\nof it', numbered)).toEqual({ is: 'refused', code: 'quota_exceeded', message: 'too much\nof it' });
  expect(readAnswer(0x80, 'something_new', numbered)).toEqual({ is: 'refused', code: 'something_new', message: 'something_new' });
  expect(readAnswer(0x80, 'No, never: not you', numbered)).toEqual({ is: 'refused', code: 'refused', message: 'No, never: not you' });
  expect(readAnswer(0x87, undefined, numbered)).toEqual({ is: 'refused', code: 'refused', message: 'the server refused it with reason code 0x87' });
});
