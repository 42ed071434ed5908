//! The page of the web chat: settings, who is remembered, the views; and after the first paint the SDK and the service worker.

import { render } from 'preact';

import { Entrance } from './entrance';
import { keepTime } from './format';
import type { Sdk } from './session';
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
import { update } from './views/banner';

/** With `--mode demo` there is no server but the one in memory. */
const loadSdk = (): Promise<Sdk> => (import.meta.env.MODE === 'demo' ? import('./demo/scene').then(({ demo }) => demo) : import('./wire').then(({ sdk }) => sdk));

document.documentElement.lang = texts.lang;
document.documentElement.dir = texts.dir;
applySettings();
keepTime();

const entrance = new Entrance(browser(loadSdk), storageOr(() => sessionStorage));
render(<App entrance={entrance} />, document.getElementById('app') as HTMLElement);
entrance.begin();

addEventListener('storage', ({ key, newValue }) => {
  const phase = entrance.phase.peek();
  if (key !== null && phase.at === 'in') phase.session.writtenElsewhere(key, newValue);
});

for (const event of ['online', 'visibilitychange'] as const) {
  (event === 'online' ? globalThis : document).addEventListener(event, () => {
    const phase = entrance.phase.peek();
    if (phase.at === 'in' && document.visibilityState === 'visible') phase.session.retryNow();
  });
}

if ('serviceWorker' in navigator && import.meta.env.PROD) {
  void navigator.serviceWorker.register('/sw.js').then(watchForUpdates, () => {});
  // A notification was clicked: whose page is this, and the conversation to open.
  navigator.serviceWorker.addEventListener('message', ({ data, ports }: MessageEvent<{ whose?: string; open?: string }>) => {
    const phase = entrance.phase.peek();
    if (data.whose !== undefined) ports[0]?.postMessage(phase.at === 'in' && phase.session.user === data.whose);
    if (data.open !== undefined) location.hash = data.open;
  });
}

/** Long-lived pages load nothing by which the browser would find a newer version. */
const UPDATE_MS = 3_600_000;

function watchForUpdates(registration: ServiceWorkerRegistration | undefined): void {
  if (!registration) return;
  const offer = (worker: ServiceWorker | null) => {
    if (!worker || !navigator.serviceWorker.controller) return;
    update.value = () => {
      navigator.serviceWorker.addEventListener('controllerchange', () => location.reload());
      worker.postMessage('take over');
    };
  };
  offer(registration.waiting);
  setInterval(() => void registration.update().catch(() => {}), UPDATE_MS);
  let isFirst = !navigator.serviceWorker.controller;
  navigator.serviceWorker.addEventListener('controllerchange', () => {
    // Another tab has taken the newer version: what this page has not loaded yet is gone.
    if (!isFirst) update.value = () => location.reload();
    isFirst = false;
  });
  registration.addEventListener('updatefound', () => {
    const worker = registration.installing;
    worker?.addEventListener('statechange', () => worker.state === 'installed' && offer(worker));
  });
}
