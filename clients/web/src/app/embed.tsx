//! The chat on another site's page, in a frame. The site says who the user is:
//!
//!     frame.contentWindow.postMessage({ chat: 'login', user: 'alice', token: '…', with: 'bob' }, chatOrigin)
//!
//! after the frame has said `{ chat: 'ready' }`, and again whenever it says `{ chat: 'token' }`. `{ chat: 'closed', code, message }` says that the server has ended it: who
//! is there then is up to the site. Nothing is remembered. For a server in development mode
//! `embed.html#user=alice&with=bob` is enough. Who may frame the page is up to the server's `frame-ancestors`.

import { effect } from '@preact/signals';
import { render } from 'preact';

import type { Closed } from '../sdk/api';
import { Entrance } from './entrance';
import { keepTime } from './format';
import { isName } from './model/words';
import { applySettings } from './settings';
import './styles/tokens.css';
import './styles/base.css';
import './styles/login.css';
import './styles/list.css';
import './styles/conversation.css';
import './styles/parts.css';
import { browser, storageOr } from './surroundings';
import { texts } from './texts';
import { App } from './views/app';

/** The site has that long to bring a new token. */
const TOKEN_MS = 10_000;

interface Told {
  chat: 'login';
  user?: unknown;
  token?: unknown;
  with?: unknown;
}

document.documentElement.lang = texts.lang;
document.documentElement.dir = texts.dir;
applySettings();
keepTime();

const entrance = new Entrance(
  browser(() => import('./wire').then(({ sdk }) => sdk)),
  storageOr(() => sessionStorage),
);
let user: string | undefined;
/** Of the site, once it has said something. */
let origin = '*';
let given: string | undefined;
let waiting: ((token: string) => void) | undefined;

function show(who: string, peer: string | undefined, token?: () => Promise<string>): void {
  const embedded = peer === undefined ? {} : { peer };
  user = who;
  waiting = undefined;
  // The site knows its users. An address is anybody's: until the server has let that user in, nothing is shown of what is kept here.
  if (token) entrance.enter({ user, token }, { isKnown: true, remember: false });
  else entrance.enter({ user }, { remember: false });
  render(<App entrance={entrance} embedded={embedded} />, document.getElementById('app') as HTMLElement);
}

/** The one that was given, and then a new one for each connection. */
function token(): Promise<string> {
  if (given !== undefined) {
    const once = given;
    given = undefined;
    return Promise.resolve(once);
  }
  return new Promise((resolve, reject) => {
    waiting = resolve;
    setTimeout(() => reject(new Error('the site gave no token')), TOKEN_MS);
    parent.postMessage({ chat: 'token' }, '*');
  });
}

addEventListener('message', (event: MessageEvent<unknown>) => {
  const told = event.data as Partial<Told> | null;
  if (event.source !== parent || told?.chat !== 'login') return;
  origin = event.origin;
  // Another user's is none for this one's connection.
  if (typeof told.token === 'string' && waiting && (told.user === undefined || told.user === user)) {
    waiting(told.token);
    waiting = undefined;
    return;
  }
  if (typeof told.user !== 'string' || !isName(told.user) || typeof told.token !== 'string') return;
  given = told.token;
  show(told.user, typeof told.with === 'string' && isName(told.with) ? told.with : undefined, token);
});

let told: Closed | undefined;
effect(() => {
  const phase = entrance.phase.value;
  const connection = phase.at === 'in' ? phase.session.state.value.connection : undefined;
  const why = connection?.state === 'closed' ? connection.why : phase.at === 'login' || phase.at === 'refused' ? phase.why : undefined;
  if (why && why !== told && why.code !== 'by_us') parent.postMessage({ chat: 'closed', code: why.code, message: why.message }, origin);
  told = why;
});

const address = new URLSearchParams(location.hash.slice(1));
const named = address.get('user');
const peer = address.get('with');
if (named !== null && isName(named)) {
  history.replaceState(null, '', location.pathname);
  show(named, peer !== null && isName(peer) ? peer : undefined);
} else parent.postMessage({ chat: 'ready' }, '*');
