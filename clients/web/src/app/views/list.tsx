//! The conversations: who, what was last, when, how much is new.

import type { JSX } from 'preact';

import { now, shortTime } from '../format';
import { unreadCount, type Conversation } from '../model/conversation';
import { listOf, type State } from '../model/state';
import { oneLine } from '../model/words';
import type { Chat } from '../session';
import { texts } from '../texts';
import { Avatar } from './avatar';
import { TickIcon } from './icons';
import { memo } from './memo';

export function List({ chat, state }: { chat: Chat; state: State }): JSX.Element {
  const all = listOf(state);
  if (all.length === 0) {
    return (
      <div class="list-none">
        {state.listed ? (
          <>
            <p class="list-none-title">{texts.list.none}</p>
            <p>{texts.list.noneLead}</p>
          </>
        ) : (
          <p>{texts.list.loading}</p>
        )}
      </div>
    );
  }
  return (
    <ul class="list" onKeyDown={walk}>
      {all.map((of) => (
        <Row
          key={of.peer}
          of={of}
          me={state.me}
          draft={of.peer === state.open ? '' : (state.drafts.get(of.peer) ?? '')}
          isOpen={of.peer === state.open}
          isOnline={!of.blocked && state.presence.get(of.peer)?.status === 'online'}
          minute={now.value}
        />
      ))}
      {state.listNext !== undefined && (
        <li>
          <button type="button" class="link-button list-more" onClick={() => void chat.moreConversations()}>
            {texts.list.more}
          </button>
        </li>
      )}
    </ul>
  );
}

/** Arrow keys go from one to the next. */
function walk(event: KeyboardEvent & { currentTarget: HTMLElement }): void {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const all = [...event.currentTarget.querySelectorAll<HTMLElement>('.list-row')];
  const at = all.indexOf(document.activeElement as HTMLElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  all[Math.min(Math.max(to, 0), all.length - 1)]?.focus();
}

interface RowProps {
  of: Conversation;
  me: string;
  draft: string;
  isOpen: boolean;
  isOnline: boolean;
  minute: number;
}

const Row = memo(({ of, me, draft, isOpen, isOnline, minute }: RowProps) => {
  const unread = of.blocked ? 0 : unreadCount(of);
  return (
    <li>
      <a class={unread > 0 ? 'list-row is-unread' : 'list-row'} href={`#${of.peer}`} aria-current={isOpen ? 'page' : undefined}>
        <Avatar user={of.peer} online={isOnline} />
        <span class="list-who">{of.peer}</span>
        <span class="list-when">{of.activeAt > 0 && shortTime(of.activeAt, minute)}</span>
        <span class="list-last">
          <Last of={of} me={me} draft={draft} />
        </span>
        {unread > 0 && (
          <span class="badge">
            <span aria-hidden="true">{unread > 999 ? '999+' : unread}</span>
            <span class="for-ears">{texts.list.unread(unread)}</span>
          </span>
        )}
      </a>
    </li>
  );
});

function Last({ of, me, draft }: { of: Conversation; me: string; draft: string }): JSX.Element | null {
  if (of.typing) return <em class="list-typing">{texts.list.typing}</em>;
  if (draft !== '') {
    return (
      <>
        <span class="list-draft">{texts.list.draft}</span>
        <bdi>{oneLine(draft)}</bdi>
      </>
    );
  }
  if (of.blocked) return <em>{texts.list.blocked}</em>;
  const waiting = of.outgoing.at(-1);
  if (waiting) {
    return (
      <>
        <Tick tick={waiting.failure === undefined ? (waiting.seq === undefined ? 'waiting' : 'stored') : 'failed'} />
        <bdi>{oneLine(waiting.text)}</bdi>
      </>
    );
  }
  if (!of.last) return null;
  const { seq, from, text } = of.last;
  return (
    <>
      {from === me && text !== undefined && <Tick tick={seq <= of.read ? 'read' : seq <= of.delivered ? 'delivered' : 'stored'} />}
      {text === undefined ? <em>{texts.list.unsent}</em> : <bdi>{oneLine(text)}</bdi>}
    </>
  );
}

function Tick({ tick }: { tick: 'waiting' | 'failed' | 'stored' | 'delivered' | 'read' }): JSX.Element {
  return (
    <>
      <TickIcon tick={tick} />
      <span class="for-ears">{texts.list.you + texts.message.ticks[tick]}, </span>
    </>
  );
}
