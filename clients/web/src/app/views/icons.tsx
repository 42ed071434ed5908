//! Our own icons: lines of one weight in a square of 24.

import type { JSX } from 'preact';

const paths = {
  back: 'M15 5l-7 7 7 7',
  compose: 'M4 20h4l11-11-4-4L4 16v4zM13.5 6.5l4 4',
  dots: 'M5.5 12h.01M12 12h.01M18.5 12h.01',
  search: 'M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13zM15.5 15.5L20 20',
  close: 'M6 6l12 12M18 6L6 18',
  up: 'M6 14l6-6 6 6',
  down: 'M6 10l6 6 6-6',
  send: 'M5 12l14-7-5 14-3-6-6-1z',
  check: 'M5 12.5l4.5 4.5L19 7.5',
  smile: 'M12 20.5a8.5 8.5 0 1 0 0-17 8.5 8.5 0 0 0 0 17zM8.5 14.5c.8 1.2 2 1.8 3.5 1.8s2.7-.6 3.5-1.8M9 10h.01M15 10h.01',
  menu: 'M4 7h16M4 12h16M4 17h16',
  warn: 'M12 7.5v5.5M12 16.5h.01M12 20.5a8.5 8.5 0 1 0 0-17 8.5 8.5 0 0 0 0 17z',
  bubble: 'M5 5h14a1.5 1.5 0 0 1 1.5 1.5v9A1.5 1.5 0 0 1 19 17h-7l-4.5 3.5V17H5a1.5 1.5 0 0 1-1.5-1.5v-9A1.5 1.5 0 0 1 5 5z',
} as const;

export type IconName = keyof typeof paths;

export function Icon({ name }: { name: IconName }): JSX.Element {
  return (
    <svg class={`icon icon-${name}`} viewBox="0 0 24 24" aria-hidden="true">
      <path d={paths[name]} />
    </svg>
  );
}

/** How far a message has come: a clock, one tick, two. */
export function TickIcon({ tick }: { tick: 'waiting' | 'failed' | 'stored' | 'delivered' | 'read' }): JSX.Element {
  return (
    <svg class={`tick tick-${tick}`} viewBox="0 0 18 12" aria-hidden="true">
      {tick === 'waiting' && <path d="M9 10.5a4.5 4.5 0 1 0 0-9 4.5 4.5 0 0 0 0 9zM9 3.5V6l1.7 1.2" />}
      {tick === 'failed' && <path d="M9 10.5a4.5 4.5 0 1 0 0-9 4.5 4.5 0 0 0 0 9zM9 3.5v3M9 8.4v.01" />}
      {tick === 'stored' && <path d="M5 6.5L8 9.5 14 2.5" />}
      {(tick === 'delivered' || tick === 'read') && <path d="M1.5 6.5L4.5 9.5 10.5 2.5M8 9l.6.5 6-7" />}
    </svg>
  );
}
