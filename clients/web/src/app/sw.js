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
  const { user, peer } = event.notification.data;
  event.notification.close();
  event.waitUntil(show(user, peer));
});

/** Opens the conversation in a page of that user, or in a new one. */
async function show(user, peer) {
  const pages = (await self.clients.matchAll({ type: 'window' })).filter(({ url }) => new URL(url).pathname === '/');
  const are = await Promise.all(pages.map((page) => isOf(page, user)));
  const page = pages.find((_, at) => are[at]);
  if (!page) return self.clients.openWindow(`/#${peer}`);
  page.postMessage({ open: peer });
  // Browsers bring a page to the front only just after the click.
  return page.focus().catch(() => {});
}

/** A page that does not answer is nobody's. */
const ANSWER_MS = 500;

function isOf(page, user) {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = ({ data }) => resolve(data === true);
    setTimeout(() => resolve(false), ANSWER_MS);
    page.postMessage({ whose: user }, [port2]);
  });
}
