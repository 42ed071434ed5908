// @vitest-environment happy-dom
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { dayName } from './format';
import { texts } from './texts';

describe('days', () => {
  const zone = process.env['TZ'];
  beforeAll(() => void (process.env['TZ'] = 'Europe/Berlin'));
  afterAll(() => {
    if (zone === undefined) delete process.env['TZ'];
    else process.env['TZ'] = zone;
  });

  it('have their names when the clocks are changed, too', () => {
    const { today, yesterday } = texts.timeline;
    // On 29 March 2026 the day has 23 hours, on 25 October 25.
    for (const [now, at, name] of [
      ['2026-03-30T00:30+02:00', '2026-03-29T12:00+02:00', yesterday],
      ['2026-10-25T23:30+01:00', '2026-10-24T12:00+02:00', yesterday],
      ['2026-10-25T23:30+01:00', '2026-10-25T00:10+02:00', today],
      ['2026-11-26T12:00+01:00', '2026-11-25T00:10+01:00', yesterday],
    ] as const) {
      expect(dayName(Date.parse(at), Date.parse(now)), `${at} at ${now}`).toBe(name);
    }
    expect(dayName(Date.parse('2026-03-28T23:45+01:00'), Date.parse('2026-03-30T00:30+02:00'))).not.toBe(yesterday);
  });
});
