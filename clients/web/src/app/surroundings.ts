//! The browser as the session needs it.

import type { Clock } from '../sdk/api';
import { openCache } from './cache';
import type { Sdk, Surroundings } from './session';
import { mayNotify } from './settings';
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
    // Loaded when there is something to tell.
    notify: (news) => mayNotify() && void import('./notify').then(({ notify }) => notify(news), () => {}),
    withdraw: (user, peer) => mayNotify() && void import('./notify').then(({ withdraw }) => withdraw(user, peer), () => {}),
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
