//! How the connection is, if it is not; and notices, which go by themselves.

import { signal } from '@preact/signals';
import type { JSX } from 'preact';
import { useEffect, useState } from 'preact/hooks';

import type { State } from '../model/state';
import type { Chat } from '../session';
import { texts } from '../texts';
import { Icon } from './icons';

/** A newer version of the page waits to be used; calling it does. */
export const update = signal<(() => void) | undefined>(undefined);

/** A first connection may take so long before it is worth a word. */
const PATIENCE_MS = 1_500;

export function Banner({ chat, state }: { chat: Chat; state: State; minute: number }): JSX.Element {
  const { connection } = state;
  const [isLong, setLong] = useState(false);
  const retryAt = connection.state === 'lost' ? connection.retryAt : 0;
  const [, setSecond] = useState(0);

  useEffect(() => {
    setLong(false);
    if (connection.state !== 'connecting') return;
    const timer = setTimeout(() => setLong(true), PATIENCE_MS);
    return () => clearTimeout(timer);
  }, [connection.state]);

  useEffect(() => {
    if (retryAt === 0) return;
    const timer = setInterval(() => setSecond((second) => second + 1), 1_000);
    return () => clearInterval(timer);
  }, [retryAt]);

  const isShown = connection.state === 'lost' || connection.state === 'closed' || (connection.state === 'connecting' && (isLong || state.wasConnected));
  return (
    <div class="banner-place" role="status">
      {isShown && (
        <div class={`banner banner-${connection.state}`}>
          <Icon name="warn" />
          <span class="banner-text">
            {connection.state === 'closed'
              ? texts.connection.closed(connection.why.message)
              : !navigator.onLine
                ? texts.connection.offline
                : connection.state === 'lost'
                  ? texts.connection.lost(Math.max(0, Math.ceil((connection.retryAt - Date.now()) / 1_000)))
                  : texts.connection.connecting}
          </span>
          {connection.state === 'lost' && (
            <button type="button" class="link-button" onClick={() => chat.retryNow()}>
              {texts.connection.now}
            </button>
          )}
          {connection.state === 'closed' && (
            <button type="button" class="link-button" onClick={() => location.reload()}>
              {texts.connection.again}
            </button>
          )}
        </div>
      )}
      {update.value && (
        <div class="banner banner-update">
          <span class="banner-text">{texts.connection.update}</span>
          <button type="button" class="link-button" onClick={update.value}>
            {texts.connection.reload}
          </button>
        </div>
      )}
    </div>
  );
}

export function Notices({ chat, state }: { chat: Chat; state: State }): JSX.Element {
  const { notice } = state;
  return (
    <div class="notices" role={notice?.tone === 'error' ? 'alert' : 'status'}>
      {notice && (
        <div key={notice.key} class={`notice notice-${notice.tone}`}>
          <span>{notice.text}</span>
          <button type="button" class="round round-small" aria-label={texts.dismiss} onClick={() => chat.dismiss()}>
            <Icon name="close" />
          </button>
        </div>
      )}
    </div>
  );
}
