import { describe, expect, it } from 'vitest';

import { withDice } from './dice';
import { Heights, distanceOf, indexAt, spanOf } from './span';

describe('a span', () => {
  it('fills the view and the margin wherever it stands, and no more', () => {
    withDice(300, (dice) => {
      const heights = new Heights(40);
      const keys = Array.from({ length: 1 + dice.roll(2_000) }, (_, at) => `k${at}`);
      for (const key of keys) if (dice.roll(2) === 0) heights.set(key, 20 + dice.roll(200));
      const all = keys.reduce((sum, key) => sum + heights.get(key), 0);
      const view = 100 + dice.roll(900);
      const distance = dice.roll(Math.max(1, Math.ceil(all - view)));
      const margin = dice.roll(700);
      const { first, end, above, below } = spanOf(keys, heights, distance, view, margin);
      const drawn = keys.slice(first, end).reduce((sum, key) => sum + heights.get(key), 0);
      expect(above + drawn + below).toBeCloseTo(all, 3);
      expect(below).toBeLessThanOrEqual(distance);
      expect(below + drawn).toBeGreaterThanOrEqual(Math.min(all, distance + view) - 0.001);
      expect(drawn).toBeLessThanOrEqual(view + 2 * margin + 2 * 220);
    });
  });

  it('finds the row at a distance', () => {
    withDice(100, (dice) => {
      const heights = new Heights(40);
      const keys = Array.from({ length: 50 }, (_, at) => `k${at}`);
      for (const key of keys) heights.set(key, 10 + dice.roll(90));
      const index = dice.roll(50);
      expect(indexAt(keys, heights, distanceOf(keys, heights, index))).toBe(index);
    });
  });
});
