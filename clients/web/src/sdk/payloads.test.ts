import { expect, test } from 'vitest';

import {
  readAnswerTo,
  readBlocked,
  readConversations,
  readDone,
  readEnvelope,
  readEvent,
  readHistory,
  readJson,
  readSync,
  readWhoami,
} from './payloads.js';

/** What the server's own tests take and make. */
const fixtures = import.meta.glob<string>('../../../../protocol/fixtures/*.json', { eager: true, query: '?raw', import: 'default' });
const fixture = (name: string) => fixtures[`../../../../protocol/fixtures/${name}.json`] as string;

const text = JSON.parse(fixture('text'));
const { text: _words, ...wordless } = text;
const standing = { with: 'bob', delivered: 17, read: 12, my_read: 17, blocked: false };

test('envelopes of every kind', () => {
  for (const name of ['text', 'text-without-id', 'edit', 'unsend', 'erased']) {
    expect(readEnvelope(readJson(fixture(name))), name).toEqual(JSON.parse(fixture(name)));
  }
  expect(readEnvelope(readJson(fixture('unknown-kind')))).toBeUndefined();
  expect(Object.keys(readEnvelope(readJson(fixture('unknown-member'))) ?? {})).not.toEqual(Object.keys(JSON.parse(fixture('unknown-member'))));
});

test('what is no envelope', () => {
  const wrong = [
    { v: 2 }, { from: 'Alice' }, { from: 'a'.repeat(65) }, { to: 'alice' }, { conversation: 'alice' }, { conversation: 'bob:alice' }, { seq: 0 }, { seq: 1.5 },
    { seq: '1' }, { seq: 2 ** 53 }, { at: -1 }, { at: 8_640_000_000_000_001 }, { id: 'a b' }, { id: null }, { text: '' }, { text: 7 }, { kind: 'edit' }, { kind: '__proto__' },
  ];
  for (const members of wrong) expect(readEnvelope({ ...text, ...members }), JSON.stringify(members)).toBeUndefined();
  for (const value of [undefined, null, 7, 'text', [], [text]]) expect(readEnvelope(value)).toBeUndefined();
});

test('a payload that is no object of JSON', () => {
  for (const payload of [undefined, '', '{', 'null', '7', '[]', '"x"', '['.repeat(100_000)]) expect(readJson(payload)).toBeUndefined();
});

test('events', () => {
  expect(readEvent('receipt', fixture('receipt'))).toMatchObject({ type: 'receipt' });
  expect(readEvent('read', fixture('read'))).toMatchObject({ type: 'read' });
  expect(readEvent('typing', fixture('typing'))).toMatchObject({ type: 'typing' });
  expect(readEvent('presence', fixture('presence'))).toEqual({ type: 'presence', user: 'bob', status: 'offline', last_seen: 1795456800123 });
  expect(readEvent('presence', '{"user":"bob","status":"online"}')).toEqual({ type: 'presence', user: 'bob', status: 'online' });
  expect(readEvent('error', fixture('error'))).toBeUndefined();
  for (const [name, payload] of [
    ['receipt', '{"with":"bob","delivered":-1,"read":0}'], ['read', '{"with":"bob"}'], ['read', '{"with":"B","read":1}'],
    ['typing', '{"from":"bob","state":true}'], ['presence', '{"user":"bob","status":"away"}'],
  ] as const) expect(readEvent(name, payload), payload).toBeUndefined();
});

test('answers', () => {
  expect(readAnswerTo('{"ref":"a","ok":{}}')).toEqual({ ref: 'a', ok: {} });
  expect(readAnswerTo('{"ref":"a","error":{"code":"c","message":"m"}}')).toEqual({ ref: 'a', error: { code: 'c', message: 'm' } });
  expect(readAnswerTo('{"ref":"a","error":{"code":7}}')).toEqual({ ref: 'a' });

  const conversations = { conversations: [{ ...standing, last: text, unread: 1 }, { ...standing, unread: 0 }], next: '17.bob', sync: '1.2.3.4' };
  expect(readConversations(conversations)).toEqual(conversations);
  expect(readConversations({ conversations: [{ with: 'bob' }, 7, { ...standing, unread: 1, last: 7 }], next: 7, sync: {} })).toEqual({ conversations: [{ ...standing, unread: 1 }] });
  const history = { with: 'bob', entries: [{ ...text, edited_at: 5 }, { ...wordless, unsent: true }], more: true };
  expect(readHistory(history)).toEqual(history);
  expect(readHistory({ ...history, entries: [{ ...wordless, kind: 'erased' }, wordless] })).toEqual({ ...history, entries: [] });
  const sync = { entries: [text, JSON.parse(fixture('unsend'))], conversations: [{ ...standing, deleted: [3] }, standing], next: '1.2.3.4', more: false };
  expect(readSync(sync)).toEqual(sync);
  expect(readSync({ ...sync, entries: [JSON.parse(fixture('unknown-kind')), null] })).toEqual({ ...sync, entries: [] });
  const whoami = { user: 'alice', at: 1, version: '0.1.0', message_bytes: 16384 };
  expect(readWhoami(whoami)).toEqual(whoami);
  expect(readBlocked({ blocked: [{ user: 'bob', at: 1 }, {}, null] })).toEqual([{ user: 'bob', at: 1 }]);
  expect(readDone({})).toBe(true);

  for (const ok of [undefined, null, 7, [], {}, { entries: {} }, { conversations: 'x' }]) {
    for (const read of [readConversations, readHistory, readSync, readWhoami, readBlocked]) expect(read(ok)).toBeUndefined();
  }
  expect(readDone(undefined)).toBeUndefined();
});
