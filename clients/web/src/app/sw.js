// The service worker: the page itself is there without a network. It keeps the files of one build and nothing else; messages are the page's own affair.
// A newer version waits until the user takes it or all tabs are closed, so that an open page finds the files that it was built with.

const VERSION = '__VERSION__';
const FILES = ['__FILES__'];
const CACHE = `chat-${VERSION}`;

self.addEventListener('install', (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES.map((file) => new Request(file, { cache: 'reload' })))));
});

self.addEventListener('activate', (event) => {
  const sweep = async () => {
    for (const name of await caches.keys()) if (name.startsWith('chat-') && name !== CACHE) await caches.delete(name);
    await self.clients.claim();
  };
  event.waitUntil(sweep());
});

self.addEventListener('message', (event) => {
  if (event.data === 'take over') self.skipWaiting();
});

self.addEventListener('fetch', (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== 'GET' || url.origin !== self.location.origin) return;
  const file = url.pathname === '/index.html' ? '/' : url.pathname;
  if (!FILES.includes(file)) return;
  event.respondWith(caches.open(CACHE).then(async (cache) => (await cache.match(file)) ?? fetch(request)));
});

self.addEventListener('notificationclick', (event) => {
  event.notification.close();
  const show = async () => {
    const pages = await self.clients.matchAll({ type: 'window' });
    const page = pages.find((page) => new URL(page.url).pathname === '/');
    if (!page) return self.clients.openWindow(`/#${event.notification.data}`);
    await page.focus();
    page.postMessage({ open: event.notification.data });
  };
  event.waitUntil(show());
});
