//! Desktop notifications: one for each sender, the newest; by the service worker where there is one.

import { isVisible, oneLine } from './model/words';
import type { News } from './session';

const tagOf = (user: string, peer: string): string => `chat ${user} ${peer}`;

/** Those that this page has shown itself. */
const shown = new Map<string, Notification>();

/** One for each sender, the newest. */
export async function notify({ user, from, text, seq }: News): Promise<void> {
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

export async function withdraw(user: string, peer?: string): Promise<void> {
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
