//! The page: log in, or the conversations and the open one.

import type { JSX } from 'preact';
import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';

import type { Entrance } from '../entrance';
import { now } from '../format';
import { listOf, unreadOf, waitingOf, type State } from '../model/state';
import { isName, nameOf } from '../model/words';
import type { Chat, Session } from '../session';
import { askToNotify, notifying, theme, type Theme } from '../settings';
import { texts } from '../texts';
import { Avatar } from './avatar';
import { Banner, Notices } from './banner';
import { ConversationView } from './conversation';
import { Dialog, Sure } from './dialog';
import { Icon } from './icons';
import { List } from './list';
import { Login, Refused } from './login';
import { Menu } from './menu';

interface Props {
  entrance: Entrance;
  /** On another site's page: nothing to log out of, and perhaps one conversation only. */
  embedded?: { peer?: string };
}

export function App({ entrance, embedded }: Props): JSX.Element {
  const phase = entrance.phase.value;
  const logOut = () => {
    entrance.logOut();
    // Whoever comes next does not begin where this one was.
    location.hash = '';
  };
  const isLeft = phase.at === 'login' && phase.isLeft === true;
  useEffect(() => {
    if (isLeft) location.hash = '';
  }, [isLeft]);
  if (phase.at === 'in') {
    return <Inside key={phase.session.user} session={phase.session} onLogOut={logOut} {...(embedded ? { embedded } : {})} />;
  }
  if (phase.at === 'refused') return <Refused problem={phase.problem} />;
  return (
    <Login
      phase={phase}
      onEnter={(who, stay) => entrance.enter(who, embedded ? { remember: false } : { stay })}
      onCancel={() => entrance.cancel()}
    />
  );
}

type Asked = 'begin' | 'keys' | 'log out';

function Inside({ session, onLogOut, embedded }: { session: Session; onLogOut: () => void; embedded?: { peer?: string } }): JSX.Element {
  const state = session.state.value;
  const [asked, ask] = useState<Asked>();
  const [searchAsked, setSearchAsked] = useState(0);
  const unread = unreadOf(state);
  const onlyPeer = embedded?.peer;

  // The address says which conversation is open: the browser's own buttons go back and forth.
  useEffect(() => {
    const go = () => {
      // Names need no encoding: what has one is no name.
      const peer = onlyPeer ?? location.hash.slice(1);
      if (isName(peer) && peer !== session.user) session.open(peer);
      else session.leave();
    };
    go();
    addEventListener('hashchange', go);
    return () => removeEventListener('hashchange', go);
  }, [session, onlyPeer]);

  // Whoever goes back is at the conversation in the list, and not at the beginning of the page.
  const wasOpen = useRef(state.open);
  useEffect(() => {
    const was = wasOpen.current;
    wasOpen.current = state.open;
    if (state.open !== undefined || was === undefined || (document.activeElement ?? document.body) !== document.body) return;
    document.querySelector<HTMLElement>(`.list-row[href="#${was}"]`)?.focus({ preventScroll: true });
  }, [state.open]);

  useEffect(() => {
    document.title = unread > 0 ? `(${unread}) ${texts.title}` : texts.title;
    return () => {
      document.title = texts.title;
    };
  }, [unread]);

  useLayoutEffect(() => {
    const onKeyDown = (event: KeyboardEvent) => {
      if (document.querySelector('dialog[open]')) return;
      const isControl = event.ctrlKey || event.metaKey;
      const { open } = session.state.peek();
      if (isControl && event.key === 'k') ask('begin');
      else if (isControl && event.key === 'f' && open !== undefined && !document.activeElement?.closest('.search')) setSearchAsked((count) => count + 1);
      else if (event.altKey && (event.key === 'ArrowUp' || event.key === 'ArrowDown')) step(session.state.peek(), event.key === 'ArrowUp' ? -1 : 1);
      else return;
      event.preventDefault();
    };
    addEventListener('keydown', onKeyDown);
    return () => removeEventListener('keydown', onKeyDown);
  }, [session]);

  return (
    <div class={['app', state.open !== undefined && 'is-open', onlyPeer !== undefined && 'is-single'].filter(Boolean).join(' ')}>
      {onlyPeer === undefined && (
        <nav class="side" aria-label={texts.list.title}>
          <header class="side-header">
            <Avatar user={state.me} />
            <span class="side-me">{state.me}</span>
            <button type="button" class="round" aria-label={texts.list.begin} title={texts.list.begin} onClick={() => ask('begin')}>
              <Icon name="compose" />
            </button>
            <MainMenu session={session} onKeys={() => ask('keys')} {...(embedded ? {} : { onLogOut: () => ask('log out') })} />
          </header>
          <List chat={session} state={state} />
        </nav>
      )}
      <div class="stage">
        <Banner chat={session} state={state} minute={now.value} />
        {state.open !== undefined ? (
          <ConversationView chat={session} state={state} peer={state.open} key={state.open} searchAsked={searchAsked} canLeave={onlyPeer === undefined} />
        ) : (
          <main class="nothing">
            <Icon name="bubble" />
            <h1 class="for-ears">{texts.title}</h1>
            <p>{texts.timeline.nothingOpen}</p>
          </main>
        )}
      </div>
      <Notices chat={session} state={state} />
      {asked === 'begin' && <Begin me={state.me} onClose={() => ask(undefined)} />}
      {asked === 'keys' && <Keys onClose={() => ask(undefined)} />}
      {asked === 'log out' && (
        <Sure
          title={texts.menu.logOut}
          text={waitingOf(state) > 0 ? texts.menu.logOutWaiting(waitingOf(state)) : texts.menu.logOutSure}
          yes={texts.menu.logOut}
          onYes={onLogOut}
          onClose={() => ask(undefined)}
        />
      )}
    </div>
  );
}

/** To the previous or the next conversation of the list. */
function step(state: State, by: number): void {
  const all = listOf(state);
  const at = all.findIndex(({ peer }) => peer === state.open);
  const next = all[at < 0 ? 0 : Math.min(Math.max(at + by, 0), all.length - 1)];
  if (next) location.hash = next.peer;
}

function MainMenu({ session, onKeys, onLogOut }: { session: Chat; onKeys: () => void; onLogOut?: () => void }): JSX.Element {
  const set = (to: Theme) => ({
    text: `${texts.menu.theme}: ${texts.menu[to]}`,
    checked: theme.value === to,
    onPick: () => void (theme.value = to),
  });
  const notify = async () => {
    if (notifying.value) notifying.value = false;
    else session.tell((await askToNotify()) ? texts.menu.notifying : texts.menu.notifyBlocked);
  };
  return (
    <Menu
      label={texts.list.menu}
      items={() => [
        set('auto'),
        set('light'),
        set('dark'),
        'line',
        // Browsers ask for it in pages of their own only.
        ...(onLogOut ? [{ text: notifying.value ? texts.menu.silent : texts.menu.notify, onPick: () => void notify() }] : []),
        { text: texts.menu.keys, onPick: onKeys },
        ...(onLogOut ? (['line', { text: texts.menu.logOut, danger: true, onPick: onLogOut }] as const) : []),
      ]}
    >
      <Icon name="menu" />
    </Menu>
  );
}

function Begin({ me, onClose }: { me: string; onClose: () => void }): JSX.Element {
  const [typed, setTyped] = useState('');
  const [problem, setProblem] = useState<string>();
  return (
    <Dialog title={texts.begin.title} onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          const name = nameOf(typed);
          if (name === me) return setProblem(texts.begin.self);
          if (!isName(name)) return setProblem(texts.begin.bad);
          onClose();
          location.hash = name;
        }}
      >
        <label class="field">
          <span class="field-label">{texts.begin.label}</span>
          <input
            value={typed}
            autoFocus
            autocomplete="off"
            autocapitalize="none"
            spellcheck={false}
            maxLength={80}
            dir="ltr"
            placeholder={texts.begin.hint}
            aria-invalid={problem !== undefined}
            aria-describedby="begin-problem"
            onInput={(event) => {
              setTyped(event.currentTarget.value);
              setProblem(undefined);
            }}
          />
        </label>
        <p id="begin-problem" class="login-told" role="alert">
          {problem}
        </p>
        <div class="dialog-buttons">
          <button type="button" class="button" onClick={onClose}>
            {texts.cancel}
          </button>
          <button type="submit" class="button button-main">
            {texts.begin.start}
          </button>
        </div>
      </form>
    </Dialog>
  );
}

function Keys({ onClose }: { onClose: () => void }): JSX.Element {
  return (
    <Dialog title={texts.keys.title} onClose={onClose}>
      <dl class="keys">
        {texts.keys.rows.map(([key, what]) => (
          <div key={key}>
            <dt>
              <kbd>{key}</kbd>
            </dt>
            <dd>{what}</dd>
          </div>
        ))}
      </dl>
    </Dialog>
  );
}
