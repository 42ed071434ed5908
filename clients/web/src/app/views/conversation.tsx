//! The open conversation: with whom, what was said, what is being written.

import type { JSX } from 'preact';
import { useLayoutEffect, useMemo, useRef, useState } from 'preact/hooks';

import { lastSeen, now } from '../format';
import type { State } from '../model/state';
import { oneLine } from '../model/words';
import type { Chat } from '../session';
import { texts } from '../texts';
import { Avatar } from './avatar';
import { copy } from './clipboard';
import { Compose } from './compose';
import { Sure } from './dialog';
import { Icon } from './icons';
import { Menu } from './menu';
import { SearchBar, matchesOf } from './search';
import { Timeline } from './timeline';

interface Props {
  chat: Chat;
  state: State;
  peer: string;
  /** Counts the times that the search was asked for by key. */
  searchAsked: number;
  canLeave: boolean;
}

type Asked = { what: 'unsend' | 'remove'; seq: number } | { what: 'block' };

export function ConversationView({ chat, state, peer, searchAsked, canLeave }: Props): JSX.Element | null {
  const of = state.conversations.get(peer);
  const [asked, ask] = useState<Asked>();
  const [isSearching, setSearching] = useState(false);
  const [needle, setNeedle] = useState('');
  const [match, setMatch] = useState(0);

  const searchSeen = useRef(searchAsked);
  useLayoutEffect(() => {
    if (searchAsked !== searchSeen.current) setSearching(true);
    searchSeen.current = searchAsked;
  }, [searchAsked]);

  const matches = useMemo(() => matchesOf(of?.timeline?.entries ?? [], isSearching ? needle : ''), [of?.timeline, needle, isSearching]);
  if (!of) return null;

  // Of who is blocked nothing is told any more.
  const presence = of.blocked ? undefined : state.presence.get(peer);
  const isConnected = state.connection.state === 'connected';
  const stopSearching = () => {
    setSearching(false);
    setNeedle('');
    document.querySelector<HTMLElement>('.compose textarea')?.focus();
  };

  const deeds = {
    copy: (text: string) =>
      void copy(text).then(
        () => chat.tell(texts.notice.copied),
        (error: Error) => chat.tell(texts.notice.notDone(error.message), 'error'),
      ),
    quote: (text: string) => {
      const quoted = text.split('\n').map((line) => `> ${line}`).join('\n');
      chat.draft(peer, `${quoted}\n\n${state.drafts.get(peer) ?? ''}`);
      requestAnimationFrame(() => {
        const field = document.querySelector<HTMLTextAreaElement>('.compose textarea');
        field?.focus();
        field?.setSelectionRange(field.value.length, field.value.length);
      });
    },
    edit: (seq: number) => chat.startEditing(peer, seq),
    unsend: (seq: number) => ask({ what: 'unsend', seq }),
    remove: (seq: number) => ask({ what: 'remove', seq }),
    retry: (id: string) => chat.retry(peer, id),
    discard: (id: string) => chat.discard(peer, id),
  };

  return (
    <main class="conversation" aria-label={texts.timeline.label(peer)}>
      <header class="conversation-header">
        {canLeave && (
          <a class="round back" href="#" aria-label={texts.header.back}>
            <Icon name="back" />
          </a>
        )}
        <Avatar user={peer} online={presence?.status === 'online'} />
        <div class="conversation-who">
          <h1>{peer}</h1>
          <p class={of.typing ? 'conversation-how is-typing' : 'conversation-how'}>
            {of.typing
              ? texts.header.typing
              : presence?.status === 'online'
                ? texts.header.online
                : presence?.lastSeen !== undefined
                  ? texts.header.lastSeen(lastSeen(presence.lastSeen, now.value))
                  : presence
                    ? texts.header.offline
                    : '\u00a0'}
          </p>
        </div>
        <button type="button" class="round" aria-label={texts.header.search} aria-expanded={isSearching} onClick={() => (isSearching ? stopSearching() : setSearching(true))}>
          <Icon name="search" />
        </button>
        <Menu
          label={texts.header.menu}
          items={() => [
            of.blocked
              ? { text: texts.header.unblock(peer), onPick: () => void chat.block(peer, false) }
              : { text: texts.header.block(peer), danger: true, onPick: () => ask({ what: 'block' }) },
          ]}
        >
          <Icon name="dots" />
        </Menu>
      </header>
      {isSearching && (
        <SearchBar
          needle={needle}
          matches={matches}
          at={Math.min(match, matches.length - 1)}
          onNeedle={(words) => {
            setNeedle(words);
            setMatch(0);
          }}
          onStep={(by) => matches.length > 0 && setMatch((match + by + matches.length) % matches.length)}
          onClose={stopSearching}
        />
      )}
      <Timeline
        key={peer}
        chat={chat}
        of={of}
        me={state.me}
        isConnected={isConnected}
        needle={isSearching ? needle : ''}
        found={isSearching ? matches[Math.min(match, matches.length - 1)] : undefined}
        deeds={deeds}
      />
      <Heard state={state} peer={peer} />
      {of.blocked && (
        <p class="blocked-bar">
          <span>{texts.header.blocked(peer)}</span>
          <button type="button" class="link-button" onClick={() => void chat.block(peer, false)}>
            {texts.header.unblock(peer)}
          </button>
        </p>
      )}
      <Compose chat={chat} of={of} me={state.me} draft={state.drafts.get(peer) ?? ''} messageBytes={state.messageBytes} />
      {asked?.what === 'unsend' && (
        <Sure title={texts.message.unsend} text={texts.message.unsendSure} yes={texts.message.unsend} onYes={() => void chat.unsend(peer, asked.seq)} onClose={() => ask(undefined)} />
      )}
      {asked?.what === 'remove' && (
        <Sure title={texts.message.remove} text={texts.message.removeSure} yes={texts.message.remove} onYes={() => void chat.remove(peer, asked.seq)} onClose={() => ask(undefined)} />
      )}
      {asked?.what === 'block' && (
        <Sure title={texts.header.block(peer)} text={texts.header.blockSure(peer)} yes={texts.header.block(peer)} onYes={() => void chat.block(peer, true)} onClose={() => ask(undefined)} />
      )}
    </main>
  );
}

/** Says to those who do not see what has come since the conversation was opened. */
function Heard({ state, peer }: { state: State; peer: string }): JSX.Element {
  const last = state.conversations.get(peer)?.timeline?.entries.at(-1);
  const from = useRef<{ peer: string; seq: number }>();
  if (from.current?.peer !== peer && last) from.current = { peer, seq: last.seq };
  const isNew = last !== undefined && from.current !== undefined && last.seq > from.current.seq;
  return (
    <div class="for-ears" role="log" aria-live="polite">
      {isNew && last.from !== state.me && last.text !== undefined && <p key={last.seq}>{texts.notice.newMessage(last.from, oneLine(last.text))}</p>}
    </div>
  );
}
