//! The browser as the session needs it.

import type { Clock } from '../sdk/api';
import { openCache } from './cache';
import { isVisible, oneLine } from './model/words';
import type { News, Sdk, Surroundings } from './session';
import { notifying } from './settings';
import { UserTabs, type Tabs } from './tabs';

export const clock: Clock = {
  now: () => Date.now(),
  after: (ms, call) => {
    const timer = setTimeout(call, ms);
    return () => clearTimeout(timer);
  },
  random: () => Math.random(),
};

export function browser(loadSdk: () => Promise<Sdk>): Surroundings {
  return {
    server: new URL('/mqtt', location.href.replace(/^http/, 'ws')).href,
    clock,
    loadSdk,
    openCache: (user) => openCache(user),
    storage: storageOr(() => localStorage),
    isLooking,
    tabs,
    notify,
    withdraw,
  };
}

/** Where the browser keeps nothing for the page, it is kept as long as the page is. */
export function storageOr(get: () => Storage): Storage {
  try {
    return get();
  } catch {
    const held = new Map<string, string>();
    return {
      get length() {
        return held.size;
      },
      clear: () => held.clear(),
      getItem: (name) => held.get(name) ?? null,
      key: (at) => [...held.keys()][at] ?? null,
      removeItem: (name) => void held.delete(name),
      setItem: (name, value) => void held.set(name, value),
    };
  }
}

function isLooking(): boolean {
  return document.visibilityState === 'visible' && document.hasFocus();
}

/** That somebody looks at this page is told to the others as it changes. */
function tabs(user: string, onLogOut: () => void): Tabs {
  const channel = 'BroadcastChannel' in globalThis ? new BroadcastChannel(`chat ${user}`) : undefined;
  const all = new UserTabs(user, clock, navigator.locks, channel, onLogOut);
  const look = () => all.look(isLooking());
  look();
  for (const name of ['focus', 'blur', 'pageshow', 'visibilitychange']) addEventListener(name, look, true);
  return {
    claim: (what) => all.claim(what),
    logOut: () => all.logOut(),
    close: () => {
      for (const name of ['focus', 'blur', 'pageshow', 'visibilitychange']) removeEventListener(name, look, true);
      all.close();
    },
  };
}

const tagOf = (user: string, peer: string): string => `chat ${user} ${peer}`;

/** Those that this page has shown itself. */
const shown = new Map<string, Notification>();

const mayNotify = (): boolean => notifying.peek() && 'Notification' in globalThis && Notification.permission === 'granted';

/** One for each sender, the newest. */
async function notify({ user, from, text, seq }: News): Promise<void> {
  if (!mayNotify()) return;
  const tag = tagOf(user, from);
  const options = { body: isVisible(text) ? oneLine(text) : '…', tag, icon: '/icon.svg', data: { user, peer: from, seq }, renotify: true };
  try {
    // Phones have it only from the service worker.
    const registration = await navigator.serviceWorker?.getRegistration();
    if (registration?.active) {
      const isOlder = (await registration.getNotifications({ tag })).some(({ data }) => (data as { seq: number }).seq > seq);
      return isOlder ? undefined : await registration.showNotification(from, options);
    }
    const notification = new Notification(from, options);
    shown.set(tag, notification);
    notification.onclick = () => {
      focus();
      location.hash = from;
      notification.close();
    };
  } catch {
    // A browser that shows none has nothing to say.
  }
}

async function withdraw(user: string, peer?: string): Promise<void> {
  if (!mayNotify()) return;
  const isMeant = (tag: string) => (peer === undefined ? tag.startsWith(tagOf(user, '')) : tag === tagOf(user, peer));
  for (const [tag, notification] of shown) {
    if (!isMeant(tag)) continue;
    notification.close();
    shown.delete(tag);
  }
  try {
    const registration = await navigator.serviceWorker?.getRegistration();
    for (const notification of (await registration?.getNotifications()) ?? []) if (isMeant(notification.tag)) notification.close();
  } catch {
    // As above.
  }
}
