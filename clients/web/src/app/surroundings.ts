//! The browser as the session needs it.

import type { Clock } from '../sdk/api';
import { openCache } from './cache';
import { isVisible, oneLine } from './model/words';
import type { Sdk, Surroundings } from './session';
import { notifying } from './settings';

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
    isLooking: () => document.visibilityState === 'visible' && document.hasFocus(),
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

/** One for each sender; of several tabs that tell of the same, the last is shown. */
function notify(from: string, text: string): void {
  if (!notifying.peek() || Notification.permission !== 'granted') return;
  const options = { body: isVisible(text) ? oneLine(text) : '…', tag: `chat-${from}`, icon: '/icon.svg', data: from };
  // Phones have it only from the service worker.
  navigator.serviceWorker?.getRegistration().then(
    (registration) => {
      if (registration?.active) return registration.showNotification(from, options);
      const notification = new Notification(from, options);
      notification.onclick = () => {
        focus();
        location.hash = from;
        notification.close();
      };
      return undefined;
    },
    () => {},
  );
}

function withdraw(): void {
  navigator.serviceWorker?.getRegistration().then(
    async (registration) => {
      for (const notification of (await registration?.getNotifications()) ?? []) notification.close();
    },
    () => {},
  );
}
