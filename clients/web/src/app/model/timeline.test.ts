import { describe, expect, it } from 'vitest';

import type { Envelope, Text } from '../../sdk/api';
import { withDice, type Dice } from './dice';
import { arrive, earlier, entryOf, find, later, newest, place, remove, trim, type Entry, type Timeline } from './timeline';

/** A conversation at a server, as long as it has become. */
class Log {
  readonly entries: Envelope[] = [];

  add(dice: Dice): Envelope {
    const seq = this.entries.length + 1;
    const from = dice.pick(['alice', 'bob']);
    const to = from === 'alice' ? 'bob' : 'alice';
    const entry = { v: 1, conversation: 'alice:bob', seq, from, to, at: 1_000 + seq } as const;
    const target = this.entries.length > 0 && dice.roll(3) === 0 ? dice.pick(this.entries) : undefined;
    const made: Envelope =
      target?.kind !== 'text'
        ? { ...entry, kind: 'text', text: `text ${seq}` }
        : dice.roll(2) === 0
          ? { ...entry, kind: 'edit', target: target.seq, text: `edit ${seq}` }
          : { ...entry, kind: 'unsend', target: target.seq };
    this.entries.push(made);
    return made;
  }

  texts(): Text[] {
    const texts = new Map<number, Text>();
    for (const entry of this.entries) {
      if (entry.kind === 'text') texts.set(entry.seq, { ...entry });
      if (entry.kind === 'edit') {
        const target = texts.get(entry.target) as Text;
        if (!target.unsent) Object.assign(target, { text: entry.text, edited_at: entry.at });
      }
      if (entry.kind === 'unsend') {
        const { text: _text, edited_at: _edited, ...rest } = texts.get(entry.target) as Text;
        texts.set(entry.target, { ...rest, unsent: true });
      }
    }
    return [...texts.values()];
  }

  page(range: { before?: number } | { after: number }, limit: number): { entries: Entry[]; more: boolean } {
    const all = this.texts();
    if ('after' in range) {
      const after = all.filter(({ seq }) => seq > range.after);
      return { entries: after.slice(0, limit).map(entryOf), more: after.length > limit };
    }
    const before = all.filter(({ seq }) => range.before === undefined || seq < range.before);
    return { entries: before.slice(-limit).map(entryOf), more: before.length > limit };
  }
}

describe('a timeline', () => {
  it('is one piece of the conversation as it stands, whatever comes in whichever order', () => {
    withDice(150, (dice) => {
      const log = new Log();
      for (let count = dice.roll(60); count > 0; count -= 1) log.add(dice);
      let timeline: Timeline | undefined;
      let top = 0;
      for (let step = 0; step < 120; step += 1) {
        switch (dice.roll(6)) {
          case 0:
          case 1: {
            // It arrives, or it is lost with a connection.
            const entry = log.add(dice);
            if (dice.roll(4) === 0) break;
            top = entry.seq;
            if (timeline) timeline = arrive(timeline, entry);
            break;
          }
          case 2: {
            const { entries, more } = log.page({}, 10);
            timeline = newest(timeline, entries, more);
            break;
          }
          case 3:
            if (timeline?.earlier && timeline.entries[0]) {
              const { entries, more } = log.page({ before: timeline.entries[0].seq }, 10);
              timeline = earlier(timeline, entries, more);
            }
            break;
          case 4:
            if (timeline && top > timeline.to) {
              const { entries, more } = log.page({ after: timeline.to }, 10);
              timeline = later(timeline, entries, more, top);
            }
            break;
          case 5:
            if (timeline && dice.roll(5) === 0) timeline = trim(timeline, 15);
            break;
        }
        if (!timeline) continue;
        const first = timeline.entries[0]?.seq ?? 0;
        const { to } = timeline;
        const seqs = timeline.entries.map(({ seq }) => seq);
        const there = log.texts().filter(({ seq }) => seq >= first && seq <= to);
        expect(seqs, 'no holes, nothing twice, in order').toEqual(there.map(({ seq }) => seq));
      }
      // When all is told it is as the server has it.
      const { entries, more } = log.page({}, 1_000);
      expect(newest(undefined, entries, more).entries).toEqual(log.texts().map(entryOf));
      while (timeline?.earlier && timeline.entries[0]) {
        const page = log.page({ before: timeline.entries[0].seq }, 7);
        timeline = earlier(timeline, page.entries, page.more);
      }
      if (timeline) {
        const { to } = timeline;
        expect(timeline.entries.map(({ seq }) => seq)).toEqual(log.texts().filter(({ seq }) => seq <= to).map(({ seq }) => seq));
      }
    });
  });

  const text = (seq: number): Envelope => ({ v: 1, kind: 'text', conversation: 'alice:bob', seq, from: 'bob', to: 'alice', at: seq, text: `text ${seq}` });
  const whole: Timeline = { entries: [1, 2, 3].map((seq) => entryOf({ ...text(seq), kind: 'text', text: `text ${seq}` })), to: 3, earlier: false };

  it('leaves out what does not follow', () => {
    expect(arrive(whole, text(5))).toEqual(whole);
    expect(arrive(whole, text(2))).toEqual(whole);
    expect(arrive(whole, text(4)).entries).toHaveLength(4);
  });

  it('never gives words back to what was taken back', () => {
    const base = { v: 1, conversation: 'alice:bob', from: 'bob', to: 'alice', at: 9, target: 2 } as const;
    const gone = arrive(whole, { ...base, kind: 'unsend', seq: 4 });
    expect(find(gone.entries, 2)).toEqual({ seq: 2, from: 'bob', at: 2 });
    const edited = arrive(gone, { ...base, kind: 'edit', seq: 5, text: 'again' });
    expect(find(edited.entries, 2)).toEqual({ seq: 2, from: 'bob', at: 2 });
    expect(edited.to).toBe(5);
  });

  it('takes an older edit for what it is', () => {
    const base = { v: 1, conversation: 'alice:bob', from: 'bob', to: 'alice', target: 1 } as const;
    const newer = arrive(whole, { ...base, kind: 'edit', seq: 5, at: 50, text: 'newer' });
    expect(find(arrive(newer, { ...base, kind: 'edit', seq: 4, at: 40, text: 'older' }).entries, 1)?.text).toBe('newer');
  });

  it('is another piece when there may be a hole', () => {
    const page = [10, 11].map((seq) => entryOf({ ...text(seq), kind: 'text', text: '' }));
    expect(newest(whole, page, true)).toEqual({ entries: page, to: 11, earlier: true });
  });

  it('forgets what was deleted', () => {
    expect(remove(whole, [2, 99]).entries.map(({ seq }) => seq)).toEqual([1, 3]);
    expect(remove(whole, [99])).toBe(whole);
    expect(place(whole.entries, 3)).toBe(2);
  });
});
