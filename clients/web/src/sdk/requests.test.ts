import { expect, test } from 'vitest';

import { RequestError } from './api.js';
import { Reads, Requests, REQUESTS_MAX } from './requests.js';

test('each is asked once on a connection, and again on the next', async () => {
  const requests = new Requests();
  const first = requests.ask('whoami', {}, 10);
  const second = requests.ask('sync', { limit: 1 }, 10);
  expect([requests.next()?.number, requests.next()?.number, requests.next()]).toEqual([1, 2, undefined]);
  requests.answered(2, { ok: 'two' });
  requests.answered(2, { ok: 'once more' });
  requests.answered(77, { ok: 'of nobody' });
  requests.disconnected();
  expect([requests.next()?.method, requests.next()]).toEqual(['whoami', undefined]);
  requests.again(1);
  expect(requests.next()?.number).toBe(1);
  requests.answered(1, new RequestError('unavailable', 'not now'));
  await expect(first).rejects.toMatchObject({ code: 'unavailable' });
  await expect(second).resolves.toBe('two');
});

test('no answer in time', async () => {
  const requests = new Requests();
  const [late, later] = [requests.ask('whoami', {}, 20), requests.ask('whoami', {}, 30)];
  expect(requests.deadline).toBe(20);
  requests.timeOut(20);
  await expect(late).rejects.toMatchObject({ code: 'timed_out' });
  expect(requests.deadline).toBe(30);
  requests.end(new RequestError('closed', 'closed'));
  await expect(later).rejects.toMatchObject({ code: 'closed' });
});

test('no more than so many', async () => {
  const requests = new Requests();
  for (let number = 0; number < REQUESTS_MAX; number++) requests.ask('whoami', {}, 1).catch(() => {});
  await expect(requests.ask('whoami', {}, 1)).rejects.toMatchObject({ code: 'too_many' });
  requests.end(new RequestError('closed', 'closed'));
});

test('of what was read the furthest counts', async () => {
  const reads = new Reads();
  const first = reads.mark('bob', 3);
  expect(reads.next()).toEqual({ peer: 'bob', seq: 3 });
  const second = reads.mark('bob', 5);
  const third = reads.mark('bob', 4);
  expect(reads.next()).toEqual({ peer: 'bob', seq: 5 });
  expect(reads.next()).toBeUndefined();
  reads.answered('bob', 3, undefined);
  expect(reads.size).toBe(1);
  reads.disconnected();
  expect(reads.next()).toEqual({ peer: 'bob', seq: 5 });
  reads.answered('bob', 5, undefined);
  await Promise.all([first, second, third]);
  const fourth = reads.mark('bob', 9);
  reads.answered('bob', 9, { is: 'refused', code: 'invalid_seq', message: 'no such entry' });
  await expect(fourth).rejects.toMatchObject({ code: 'invalid_seq' });
});
