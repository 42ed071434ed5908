import { IDBFactory } from 'fake-indexeddb';
import { afterEach, expect, it, vi } from 'vitest';

import { sdk } from './wire';

afterEach(() => vi.unstubAllGlobals());

const unsent = { id: 'm1', to: 'bob', text: 'hello', queuedAt: 1 };

it('keeps what waits in the browser', async () => {
  vi.stubGlobal('indexedDB', new IDBFactory());
  const outbox = await sdk.openOutbox('alice');
  await outbox.add(unsent);
  outbox.close?.();
  const again = await sdk.openOutbox('alice');
  expect(await again.load()).toEqual([unsent]);
  again.close?.();
});

it('sends from a browser that keeps nothing, too', async () => {
  const refusal = () => {
    throw new DOMException('access is denied for this document', 'SecurityError');
  };
  for (const indexedDB of [{ open: refusal }, null, undefined]) {
    vi.stubGlobal('indexedDB', indexedDB);
    const outbox = await sdk.openOutbox('alice');
    expect(await outbox.load()).toEqual([]);
    await outbox.add(unsent);
    await outbox.remove('m1');
  }
});
