//! Times as people write them, in the language of the texts.

import { signal } from '@preact/signals';

import { texts } from './texts';

const DAY_MS = 86_400_000;

/** The time, as exactly as it is shown: moves on every half minute. */
export const now = signal(Date.now());

export function keepTime(): void {
  setInterval(() => (now.value = Date.now()), 30_000);
}

const languages = [...(navigator.languages ?? []), texts.lang];
const language = languages.find((one) => one.startsWith(texts.lang)) ?? texts.lang;
const clock = new Intl.DateTimeFormat(language, { hour: '2-digit', minute: '2-digit' });
const weekday = new Intl.DateTimeFormat(language, { weekday: 'short' });
const longWeekday = new Intl.DateTimeFormat(language, { weekday: 'long', day: 'numeric', month: 'long' });
const date = new Intl.DateTimeFormat(language, { day: 'numeric', month: 'short' });
const fullDate = new Intl.DateTimeFormat(language, { day: 'numeric', month: 'long', year: 'numeric' });
const exact = new Intl.DateTimeFormat(language, { dateStyle: 'full', timeStyle: 'medium' });

export const timeOf = (at: number): string => clock.format(at);
export const exactly = (at: number): string => exact.format(at);

/** Names the day, for comparison. */
export function dayOf(at: number): string {
  const day = new Date(at);
  return `${day.getFullYear()}-${day.getMonth()}-${day.getDate()}`;
}

/** Days have 23 to 25 hours. */
function dayBefore(today: number): number {
  const day = new Date(today);
  return new Date(day.getFullYear(), day.getMonth(), day.getDate() - 1, 12).getTime();
}

export function dayName(at: number, today: number): string {
  if (dayOf(at) === dayOf(today)) return texts.timeline.today;
  if (dayOf(at) === dayOf(dayBefore(today))) return texts.timeline.yesterday;
  return today - at < 300 * DAY_MS ? longWeekday.format(at) : fullDate.format(at);
}

/** As short as it can be understood. */
export function shortTime(at: number, today: number): string {
  if (dayOf(at) === dayOf(today)) return clock.format(at);
  if (today - at < 6 * DAY_MS) return weekday.format(at);
  return date.format(at);
}

export function lastSeen(at: number, today: number): string {
  return dayOf(at) === dayOf(today) ? clock.format(at) : `${dayName(at, today)}, ${clock.format(at)}`;
}
