import { describe, expect, it } from 'vitest';

import type { Envelope, Stored, Unsent } from '../../sdk/api';
import { unreadCount } from './conversation';
import { withDice } from './dice';
import { initial, listOf, reduce, unreadOf, waitingOf, type Event, type State } from './state';

const text = (seq: number, from: string, to: string, more: { id?: string; at?: number; text?: string } = {}): Envelope => ({
  v: 1,
  kind: 'text',
  conversation: [from, to].sort().join(':'),
  seq,
  from,
  to,
  at: more.at ?? 1_000 + seq,
  text: more.text ?? `text ${seq}`,
  ...(more.id === undefined ? {} : { id: more.id }),
});

const message = (envelope: Envelope): Event => ({ type: 'message', message: envelope, waited: false });
const run = (events: readonly Event[], from: State = initial('alice')): State => events.reduce(reduce, from);
const bobOf = (state: State) => state.conversations.get('bob')!;
const empty: Event = { type: 'newest', peer: 'bob', entries: [], more: false };

describe('a message that is sent', () => {
  const unsent: Unsent = { id: 'm1', to: 'bob', text: 'hello', queuedAt: 500 };
  const stored: Event = { type: 'stored', unsent, stored: { id: 'm1', seq: 1, at: 1_001, receiverAway: false } satisfies Stored };
  const sent = message(text(1, 'alice', 'bob', { id: 'm1', text: 'hello' }));

  it('is shown once, in whichever order its news comes', () => {
    for (const news of [[stored, sent], [sent, stored], [stored], [sent], [stored, sent, sent, stored]]) {
      const state = run([{ type: 'opened', peer: 'bob' }, empty, { type: 'queued', unsent }, ...news]);
      const { timeline, outgoing } = bobOf(state);
      expect(timeline?.entries.map(({ id }) => id)).toEqual(['m1']);
      expect(outgoing).toEqual([]);
    }
  });

  it('is shown once, too, if the page has it first', () => {
    const page: Event = { type: 'newest', peer: 'bob', more: false, entries: [{ ...text(1, 'alice', 'bob', { id: 'm1' }), kind: 'text', text: 'hello' }] };
    const state = run([{ type: 'opened', peer: 'bob' }, { type: 'queued', unsent }, page, stored]);
    expect(bobOf(state).timeline?.entries).toHaveLength(1);
    expect(bobOf(state).outgoing).toEqual([]);
    // It is in the outbox of an earlier run, and was stored.
    expect(bobOf(reduce(state, { type: 'queued', unsent })).outgoing).toEqual([]);
  });

  it('stays where it is as long as what comes before it is not here', () => {
    const ahead: Event = { type: 'stored', unsent, stored: { id: 'm1', seq: 2, at: 1_002, receiverAway: false } };
    const state = run([{ type: 'opened', peer: 'bob' }, empty, { type: 'queued', unsent }, ahead]);
    expect(bobOf(state).outgoing).toMatchObject([{ id: 'm1', seq: 2 }]);
    expect(waitingOf(state)).toBe(0);
    const both = run([message(text(1, 'bob', 'alice')), message(text(2, 'alice', 'bob', { id: 'm1' }))], state);
    expect(bobOf(both).outgoing).toEqual([]);
    expect(bobOf(both).timeline?.entries.map(({ seq }) => seq)).toEqual([1, 2]);
  });

  it('says why it was not sent, and is sent again', () => {
    const refused: Event = { type: 'not_sent', unsent, error: Object.assign(new Error('no'), { code: 'unknown_user' }) };
    const state = run([{ type: 'queued', unsent }, refused]);
    expect(bobOf(state).outgoing).toMatchObject([{ id: 'm1', failure: 'no' }]);
    expect(listOf(state).map(({ peer }) => peer)).toEqual(['bob']);
    expect(bobOf(reduce(state, { type: 'queued', unsent })).outgoing[0]?.failure).toBeUndefined();
    expect(bobOf(reduce(state, { type: 'discarded', peer: 'bob', id: 'm1' })).outgoing).toEqual([]);
  });
});

describe('what is unread', () => {
  it('counts what came since, and nothing that was read', () => {
    let state = run([message(text(1, 'bob', 'alice')), message(text(2, 'bob', 'alice')), message(text(2, 'bob', 'alice'))]);
    expect(unreadOf(state)).toBe(2);
    state = run([{ type: 'read', with: 'bob', seq: 1 }], state);
    expect(unreadOf(state)).toBe(1);
    state = run([{ type: 'read', with: 'bob', seq: 0 }], state);
    expect(unreadOf(state)).toBe(1);
    expect(unreadOf(run([message(text(3, 'alice', 'bob'))], state))).toBe(0);
  });

  it('is never more than there is, and only goes down by reading, answering and the server', () => {
    withDice(200, (dice) => {
      let state = run([empty]);
      let seq = 0;
      let read = 0;
      let theirs: number[] = [];
      for (let step = 0; step < 60; step += 1) {
        const roll = dice.roll(4);
        if (roll < 2) {
          seq += 1;
          theirs.push(seq);
          state = reduce(state, message(text(seq, 'bob', 'alice')));
        } else if (roll === 2) {
          seq += 1;
          theirs = [];
          state = reduce(state, message(text(seq, 'alice', 'bob')));
        } else {
          read = Math.max(read, dice.roll(seq + 1));
          state = reduce(state, { type: 'read', with: 'bob', seq: read });
        }
        theirs = theirs.filter((one) => one > read);
        expect(unreadOf(state)).toBe(theirs.length);
        if (dice.roll(5) === 0 && seq > 0) {
          const last = state.conversations.get('bob')?.last;
          if (!last) continue;
          const listed = { with: 'bob', delivered: 0, read: 0, my_read: read, blocked: false, unread: theirs.length, last: { ...text(last.seq, last.from, last.from === 'bob' ? 'alice' : 'bob'), kind: 'text' as const } };
          state = reduce(state, { type: 'listed', page: { conversations: [listed] } });
          expect(unreadOf(state)).toBe(theirs.length);
        }
      }
    });
  });

  it('has its line where the conversation was read up to, until it is left', () => {
    let state = run([message(text(1, 'bob', 'alice')), { type: 'read', with: 'bob', seq: 1 }, message(text(2, 'bob', 'alice')), { type: 'opened', peer: 'bob' }]);
    expect(bobOf(state).unreadAfter).toBe(1);
    state = run([{ type: 'read', with: 'bob', seq: 2 }], state);
    expect(bobOf(state).unreadAfter).toBe(1);
    expect(unreadCount(bobOf(state))).toBe(0);
    expect(bobOf(run([{ type: 'left' }], state)).unreadAfter).toBeUndefined();
  });
});

describe('cursors', () => {
  it('only advance', () => {
    withDice(50, (dice) => {
      let state = initial('alice');
      let before = { delivered: 0, read: 0, myRead: 0 };
      for (let step = 0; step < 40; step += 1) {
        state = reduce(state, dice.roll(2) === 0 ? { type: 'receipt', with: 'bob', delivered: dice.roll(50), read: dice.roll(50) } : { type: 'read', with: 'bob', seq: dice.roll(50) });
        const { delivered, read, myRead } = bobOf(state);
        expect(delivered).toBeGreaterThanOrEqual(Math.max(before.delivered, read));
        expect(read).toBeGreaterThanOrEqual(before.read);
        expect(myRead).toBeGreaterThanOrEqual(before.myRead);
        before = { delivered, read, myRead };
      }
    });
  });
});

describe('the list', () => {
  it('has those first in which something happened last', () => {
    const state = run([message(text(1, 'bob', 'alice', { at: 5 })), message(text(1, 'zoe', 'alice', { at: 9 })), message(text(1, 'eve', 'alice', { at: 7 }))]);
    expect(listOf(state).map(({ peer }) => peer)).toEqual(['zoe', 'eve', 'bob']);
    expect(listOf(reduce(state, { type: 'queued', unsent: { id: 'x', to: 'bob', text: 'x', queuedAt: 10 } }))[0]?.peer).toBe('bob');
  });

  it('shows edits, and not what was taken back', () => {
    const base = { v: 1, conversation: 'alice:bob', from: 'bob', to: 'alice', at: 9, target: 1 } as const;
    let state = run([message(text(1, 'bob', 'alice')), message({ ...base, kind: 'edit', seq: 2, text: 'other words' })]);
    expect(bobOf(state).last?.text).toBe('other words');
    state = run([message({ ...base, kind: 'unsend', seq: 3 })], state);
    expect(bobOf(state).last).toEqual({ seq: 1, from: 'bob', at: 1_001 });
    // It comes again from an older answer.
    expect(bobOf(run([message(text(1, 'bob', 'alice'))], state)).last?.text).toBeUndefined();
  });
});

describe('a first sync of everything', () => {
  it('counts nothing as news, and leaves what is shown alone', () => {
    const listed = { with: 'bob', delivered: 0, read: 0, my_read: 9, blocked: false, unread: 1, last: { ...text(10, 'bob', 'alice'), kind: 'text' as const } };
    const state = run([
      { type: 'listed', page: { conversations: [listed] } },
      { type: 'synced', initial: true, sync: { entries: [text(1, 'bob', 'alice'), text(1, 'zoe', 'alice')], conversations: [], next: '1', more: true } },
    ]);
    expect(unreadOf(state)).toBe(1);
    expect(bobOf(state).last?.seq).toBe(10);
    expect(state.conversations.has('zoe')).toBe(false);
  });
});

describe('those who cannot be heard', () => {
  it('do not type and are not there', () => {
    const state = run([
      message(text(1, 'bob', 'alice')),
      { type: 'typing', from: 'bob', on: true },
      { type: 'presence', user: 'bob', status: 'online' },
      { type: 'connection', connection: { state: 'lost', reason: '', retryAt: 0 } },
    ]);
    expect(bobOf(state).typing).toBe(false);
    expect(state.presence.size).toBe(0);
  });
});
