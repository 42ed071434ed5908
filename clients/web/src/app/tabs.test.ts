import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { TestClock, eventually, settle } from './demo/clock';
import { UserTabs, type TabChannel, type TabLocks } from './tabs';

/** The locks of one browser, as far as they are used here; those of one name wait for nobody who shares. */
class BrowserLocks implements TabLocks {
  readonly held: { name: string; mode: string }[] = [];

  async request(name: string, { mode = 'exclusive', ifAvailable = false }: { mode?: string; ifAvailable?: boolean }, whileHeld: (lock: unknown) => Promise<void> | undefined): Promise<unknown> {
    await Promise.resolve();
    const isFree = () => !this.held.some((one) => one.name === name && (mode === 'exclusive' || one.mode === 'exclusive'));
    if (!isFree() && ifAvailable) return whileHeld(null);
    while (!isFree()) await new Promise(setImmediate);
    const lock = { name, mode };
    this.held.push(lock);
    await Promise.resolve(whileHeld(lock)).finally(() => this.held.splice(this.held.indexOf(lock), 1));
    return undefined;
  }

  async query(): Promise<{ held: { name: string }[] }> {
    return { held: this.held.map(({ name }) => ({ name })) };
  }
}

const open: UserTabs[] = [];
let clock: TestClock;
let locks: BrowserLocks;

function tab(user = 'alice', onLogOut = () => {}): UserTabs {
  const one = new UserTabs(user, clock, locks, new BroadcastChannel(`chat ${user}`) as unknown as TabChannel, onLogOut);
  open.push(one);
  return one;
}

beforeEach(() => {
  clock = new TestClock();
  locks = new BrowserLocks();
});

afterEach(() => {
  for (const one of open.splice(0)) one.close();
});

describe('the tabs of a user', () => {
  it('tell of a message once', async () => {
    const tabs = [tab(), tab(), tab()];
    const claimed = await Promise.all(tabs.map((one) => one.claim('bob 1')));
    expect(claimed.filter(Boolean)).toHaveLength(1);
    // Later, too, and also after the one that told is gone for good.
    expect(await tabs[2]!.claim('bob 1')).toBe(false);
    expect(await tabs[0]!.claim('bob 2')).toBe(true);
    expect(await tab('zoe').claim('bob 1')).toBe(true);
  });

  it('tell of nothing while somebody looks at one of them', async () => {
    const [seen, hidden, other] = [tab(), tab(), tab('zoe')];
    seen.look(true);
    await settle();
    expect(await hidden.claim('bob 1')).toBe(false);
    expect(await other.claim('bob 1')).toBe(true);
    seen.look(false);
    await settle();
    expect(await hidden.claim('bob 2')).toBe(true);
  });

  it('are not looked at any more when they are gone, or however fast somebody looks away', async () => {
    const [first, second, hidden] = [tab(), tab(), tab()];
    first.look(true);
    second.look(true);
    for (let time = 0; time < 5; time += 1) {
      second.look(false);
      second.look(true);
    }
    second.look(false);
    await settle();
    expect(await hidden.claim('bob 1')).toBe(false);
    first.close();
    await settle();
    expect(locks.held).toEqual([]);
    expect(await hidden.claim('bob 2')).toBe(true);
  });

  it('hold what they told of for a while, and not without end', async () => {
    const one = tab();
    for (let seq = 1; seq <= 200; seq += 1) expect(await one.claim(`bob ${seq}`)).toBe(true);
    await settle();
    expect(locks.held).toHaveLength(64);
    await clock.pass(10_000);
    expect(locks.held).toEqual([]);
    expect(await one.claim('bob 200')).toBe(true);
    one.close();
    await settle();
    expect(locks.held).toEqual([]);
  });

  it('are each on its own without locks', async () => {
    const alone = new UserTabs('alice', clock, undefined, undefined, () => {});
    alone.look(true);
    expect(await alone.claim('bob 1')).toBe(true);
    alone.logOut();
    alone.close();
  });

  it('hear that the user has logged out, and other users’ do not', async () => {
    const heard: string[] = [];
    const first = tab('alice', () => heard.push('first'));
    tab('alice', () => heard.push('second'));
    tab('zoe', () => heard.push('zoe'));
    first.logOut();
    await eventually(() => heard.length > 0, 'the other tab has heard');
    await settle();
    expect(heard).toEqual(['second']);
  });
});
