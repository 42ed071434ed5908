//! What the user has set in this browser: how it looks, and whether it notifies.

import { effect, signal } from '@preact/signals';

export type Theme = 'auto' | 'light' | 'dark';

const read = (name: string): string | null => {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
};

const write = (name: string, value: string): void => {
  try {
    localStorage.setItem(name, value);
  } catch {
    // It holds until the page is closed.
  }
};

const isTheme = (name: string | null): name is Theme => name === 'light' || name === 'dark' || name === 'auto';

const told = read('chat theme');
export const theme = signal<Theme>(isTheme(told) ? told : 'auto');
const isAllowed = (): boolean => 'Notification' in globalThis && Notification.permission === 'granted';
export const notifying = signal(read('chat notify') === 'on' && isAllowed());

/** The user wants it, and the browser lets it be. */
export const mayNotify = (): boolean => notifying.peek() && isAllowed();

/** Keeps the page and the storage as it is set. */
export function applySettings(): void {
  effect(() => {
    document.documentElement.dataset['theme'] = theme.value;
    write('chat theme', theme.value);
  });
  effect(() => write('chat notify', notifying.value ? 'on' : 'off'));
  addEventListener('storage', ({ key, newValue }) => {
    if (key === 'chat theme' && isTheme(newValue)) theme.value = newValue;
    if (key === 'chat notify') notifying.value = newValue === 'on' && isAllowed();
  });
}

/** Only at the user's click: browsers ask no other way. Whether it is on now. */
export async function askToNotify(): Promise<boolean> {
  if (!('Notification' in globalThis)) return false;
  notifying.value = (await Notification.requestPermission()) === 'granted';
  return notifying.value;
}
