//! How fast clients may publish.
//!
//! Pure but for the lock around what a user's connections share: time comes in. A [`Bucket`] knows only until when it is busy (the generic
//! cell rate algorithm), so four of them are looked at before any is charged, a client can be made to wait for its turn instead of trying
//! again, and a publish larger than a whole second's worth passes once nothing is owed. What an idle bucket knows is nothing, so users who
//! are gone are forgotten without giving anybody more.
//!
//! Over the rate MQTT 5 is refused, as often as it may publish; beyond that, and for MQTT 3.1.1 and packets that cannot be refused, reading
//! pauses. Nothing that was read is lost, and a client cannot make the server work faster than twice its rate. Connecting costs as much as
//! some ten publishes, so a user may do that a tenth as often; who is faster waits, and is refused when that would take too long.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::limits::Limits;

const SECOND_NS: u64 = 1_000_000_000;
/// A user may publish so many times as often as connect, though not less than [`CONNECTS_PER_S_MIN`].
const PUBLISHES_PER_CONNECT: u32 = 10;
const CONNECTS_PER_S_MIN: u32 = 10;
/// How long a CONNECT waits at most.
const CONNECT_WAIT_NS_MAX: u64 = SECOND_NS;
/// Users in the map before those are looked for who can be forgotten.
const SWEEP_AT_LEAST: usize = 1_024;

/// How often the same thing may happen: so many a second, and a second's worth at once. Zero: as often as one likes.
#[derive(Clone, Copy, Debug)]
struct Rate {
    per_s: u32,
    /// The setting that says so.
    limit: &'static str,
}

impl Rate {
    fn cost_ns(self, amount: u64) -> u64 {
        let cost = u128::from(amount) * u128::from(SECOND_NS) / u128::from(self.per_s.max(1));
        u64::try_from(cost).unwrap_or(u64::MAX)
    }
}

/// What was taken lately: times in nanoseconds since the broker began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bucket {
    busy_until_ns: u64,
}

impl Bucket {
    /// When so much may be taken; not after `now_ns` if it may be now.
    fn free_at_ns(self, rate: Rate, amount: u64, now_ns: u64) -> u64 {
        if rate.per_s == 0 {
            return now_ns;
        }
        let begin = self.busy_until_ns.max(now_ns);
        // More than a second's worth passes when nothing is owed.
        begin.saturating_add(rate.cost_ns(amount)).saturating_sub(SECOND_NS).min(begin)
    }

    fn take(&mut self, rate: Rate, amount: u64, now_ns: u64) {
        if rate.per_s > 0 {
            self.busy_until_ns = self.busy_until_ns.max(now_ns).saturating_add(rate.cost_ns(amount));
        }
    }
}

/// What a packet takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) publishes: u64,
    pub(crate) bytes: u64,
}

/// Rates of publishes and of their bytes.
#[derive(Clone, Copy, Debug)]
struct Rates {
    publishes: Rate,
    bytes: Rate,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Buckets {
    publishes: Bucket,
    bytes: Bucket,
}

impl Buckets {
    /// When there is room for it, and which limit says so.
    fn free_at_ns(self, rates: Rates, cost: Cost, now_ns: u64) -> (u64, &'static str) {
        let publishes = self.publishes.free_at_ns(rates.publishes, cost.publishes, now_ns);
        let bytes = self.bytes.free_at_ns(rates.bytes, cost.bytes, now_ns);
        if bytes > publishes { (bytes, rates.bytes.limit) } else { (publishes, rates.publishes.limit) }
    }

    fn take(&mut self, rates: Rates, cost: Cost, now_ns: u64) {
        self.publishes.take(rates.publishes, cost.publishes, now_ns);
        self.bytes.take(rates.bytes, cost.bytes, now_ns);
    }

    fn is_idle(self, now_ns: u64) -> bool {
        self.publishes.busy_until_ns <= now_ns && self.bytes.busy_until_ns <= now_ns
    }
}

/// Of one connection, or of all of one user's: what passed, and what was refused. Only a user connects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Account {
    passed: Buckets,
    refused: Buckets,
    connects: Bucket,
}

impl Account {
    fn is_idle(self, now_ns: u64) -> bool {
        self.passed.is_idle(now_ns) && self.refused.is_idle(now_ns) && self.connects.busy_until_ns <= now_ns
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is worked on now.
    Pass,
    /// It is worked on then, and nothing after it before that.
    Wait { until: Instant, limit: &'static str },
    /// It is refused.
    Refuse { limit: &'static str },
}

#[derive(Debug, Default)]
struct Accounts {
    users: HashMap<Arc<str>, Arc<Mutex<Account>>>,
    sweep_at: usize,
}

#[derive(Debug)]
struct Shared {
    began: Instant,
    connection: Rates,
    user: Rates,
    connects: Rate,
    accounts: Mutex<Accounts>,
}

impl Shared {
    fn ns(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The rates of all connections; clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Pacing {
    shared: Arc<Shared>,
}

impl Pacing {
    pub(crate) fn new(limits: &Limits, now: Instant) -> Self {
        let rate = |per_s, limit| Rate { per_s, limit };
        let connection = Rates {
            publishes: rate(limits.publishes_per_s, "publishes_per_s"),
            bytes: rate(limits.publish_bytes_per_s, "publish_bytes_per_s"),
        };
        let user = Rates {
            publishes: rate(limits.user_publishes_per_s, "user_publishes_per_s"),
            bytes: rate(limits.user_publish_bytes_per_s, "user_publish_bytes_per_s"),
        };
        let connects_per_s = match limits.user_publishes_per_s {
            0 => 0,
            publishes => (publishes / PUBLISHES_PER_CONNECT).max(CONNECTS_PER_S_MIN),
        };
        let connects = rate(connects_per_s, "user_publishes_per_s");
        Self { shared: Arc::new(Shared { began: now, connection, user, connects, accounts: Mutex::default() }) }
    }

    /// A connection of this user.
    pub(crate) fn connection(&self, user: &Arc<str>, now: Instant) -> Pace {
        let mut accounts = self.shared.accounts.lock();
        if accounts.users.len() >= accounts.sweep_at.max(SWEEP_AT_LEAST) {
            let now_ns = self.shared.ns(now);
            accounts.users.retain(|_, account| Arc::strong_count(account) > 1 || !account.lock().is_idle(now_ns));
            let sweep_at = accounts.users.len() * 2;
            accounts.users.shrink_to(sweep_at);
            accounts.sweep_at = sweep_at;
        }
        let of_user = Arc::clone(accounts.users.entry(Arc::clone(user)).or_default());
        Pace { shared: Arc::clone(&self.shared), user: Arc::clone(user), own: Account::default(), of_user }
    }

    /// Users who are remembered.
    #[cfg(test)]
    fn users(&self) -> usize {
        self.shared.accounts.lock().users.len()
    }
}

/// How fast one connection goes.
#[derive(Debug)]
pub(crate) struct Pace {
    shared: Arc<Shared>,
    user: Arc<str>,
    own: Account,
    of_user: Arc<Mutex<Account>>,
}

impl Pace {
    /// Whether its user may connect once more. Charged already, unless it is refused.
    pub(crate) fn judge_connect(&mut self, now: Instant) -> Verdict {
        let (connects, now_ns) = (self.shared.connects, self.shared.ns(now));
        let mut of_user = self.of_user.lock();
        let free_ns = of_user.connects.free_at_ns(connects, 1, now_ns);
        let (wait_ns, limit) = (free_ns.saturating_sub(now_ns), connects.limit);
        if wait_ns > CONNECT_WAIT_NS_MAX {
            return Verdict::Refuse { limit };
        }
        of_user.connects.take(connects, 1, now_ns);
        if wait_ns == 0 { Verdict::Pass } else { Verdict::Wait { until: now + Duration::from_nanos(wait_ns), limit } }
    }

    /// What was worked on took more than could be known before: what comes after waits for it.
    pub(crate) fn charge(&mut self, cost: Cost, now: Instant) {
        let now_ns = self.shared.ns(now);
        self.own.passed.take(self.shared.connection, cost, now_ns);
        self.of_user.lock().passed.take(self.shared.user, cost, now_ns);
    }

    /// Whether it may be worked on. Charged already, unless it is refused: who was told to wait does not ask again.
    pub(crate) fn judge(&mut self, cost: Cost, may_refuse: bool, now: Instant) -> Verdict {
        let (connection, user, now_ns) = (self.shared.connection, self.shared.user, self.shared.ns(now));
        let mut of_user = self.of_user.lock();
        let own = self.own.passed.free_at_ns(connection, cost, now_ns);
        let (free_ns, limit) = own.max(of_user.passed.free_at_ns(user, cost, now_ns));
        if free_ns > now_ns && may_refuse {
            let own_ns = self.own.refused.free_at_ns(connection, cost, now_ns).0;
            if own_ns <= now_ns && of_user.refused.free_at_ns(user, cost, now_ns).0 <= now_ns {
                self.own.refused.take(connection, cost, now_ns);
                of_user.refused.take(user, cost, now_ns);
                return Verdict::Refuse { limit };
            }
        }
        self.own.passed.take(connection, cost, now_ns);
        of_user.passed.take(user, cost, now_ns);
        if free_ns > now_ns {
            let until = now + Duration::from_nanos(free_ns - now_ns);
            return Verdict::Wait { until, limit };
        }
        Verdict::Pass
    }

    /// For work that turned out to be more than what was asked for: what comes next waits for it.
    pub(crate) fn charge_bytes(&mut self, bytes: u64, now: Instant) {
        let (cost, now_ns) = (Cost { publishes: 0, bytes }, self.shared.ns(now));
        self.own.passed.take(self.shared.connection, cost, now_ns);
        self.of_user.lock().passed.take(self.shared.user, cost, now_ns);
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        let mut accounts = self.shared.accounts.lock();
        let now_ns = self.shared.ns(Instant::now());
        // The map's and this one: nobody else, and nothing is owed.
        if Arc::strong_count(&self.of_user) == 2 && self.of_user.lock().is_idle(now_ns) {
            accounts.users.remove(&self.user);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_charged_later_is_waited_for() {
        let (pacing, now) =
            (Pacing::new(&Limits { publish_bytes_per_s: 1_000, ..limits() }, Instant::now()), Instant::now());
        let mut pace = pacing.connection(&Arc::from("alice"), now);
        let cost = Cost { publishes: 1, bytes: 1 };
        assert_eq!(pace.judge(cost, false, now), Verdict::Pass);
        pace.charge_bytes(10_000, now);
        let Verdict::Wait { until, limit: "publish_bytes_per_s" } = pace.judge(cost, false, now) else {
            panic!("it is free")
        };
        let waits = until - now;
        assert!(waits > Duration::from_secs(8) && waits < Duration::from_secs(11), "{waits:?}");
    }

    fn limits() -> Limits {
        Limits {
            publishes_per_s: 10,
            publish_bytes_per_s: 1_000,
            user_publishes_per_s: 20,
            user_publish_bytes_per_s: 0,
            ..Limits::default()
        }
    }

    fn one(bytes: u64) -> Cost {
        Cost { publishes: 1, bytes }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_seconds_worth_at_once_and_then_the_rate() {
        let now = Instant::now();
        let mut pace = Pacing::new(&limits(), now).connection(&"alice".into(), now);
        for _ in 0..10 {
            assert_eq!(pace.judge(one(1), true, now), Verdict::Pass);
        }
        let refused = Verdict::Refuse { limit: "publishes_per_s" };
        assert_eq!(pace.judge(one(1), true, now), refused);
        assert_eq!(pace.judge(one(1), true, now + ms(99)), refused);
        assert_eq!(pace.judge(one(1), true, now + ms(100)), Verdict::Pass);
        assert_eq!(pace.judge(one(1), true, now + ms(100)), refused);
    }

    #[test]
    fn who_is_refused_too_often_waits() {
        let now = Instant::now();
        let mut pace = Pacing::new(&limits(), now).connection(&"alice".into(), now);
        let verdicts: Vec<_> = (0..22).map(|_| pace.judge(one(1), true, now)).collect();
        assert!(verdicts[..10].iter().all(|verdict| *verdict == Verdict::Pass));
        assert!(verdicts[10..20].iter().all(|verdict| matches!(verdict, Verdict::Refuse { .. })));
        for (verdict, wait) in verdicts[20..].iter().zip([100, 200]) {
            assert_eq!(*verdict, Verdict::Wait { until: now + ms(wait), limit: "publishes_per_s" });
        }
    }

    #[test]
    fn waiting_is_in_turn_and_paid_once() {
        let now = Instant::now();
        let pacing = Pacing::new(&Limits { publishes_per_s: 0, ..limits() }, now);
        let mut paces = [0, 1].map(|_| pacing.connection(&"alice".into(), now));
        for turn in 0..20 {
            assert_eq!(paces[turn % 2].judge(one(1), false, now), Verdict::Pass);
        }
        for (turn, wait) in [(0, 50), (1, 100), (0, 150), (1, 200)] {
            let Verdict::Wait { until, limit } = paces[turn].judge(one(1), false, now) else { panic!("it waits") };
            assert_eq!((until - now).as_millis(), wait);
            assert_eq!(limit, "user_publishes_per_s");
        }
        let mut other = pacing.connection(&"bob".into(), now);
        assert_eq!(other.judge(one(1), false, now), Verdict::Pass, "another user's rate is their own");
    }

    #[test]
    fn connects_wait_in_turn_and_are_refused_when_too_many_wait() {
        let now = Instant::now();
        let pacing = Pacing::new(&limits(), now);
        let connect = |user: &str| pacing.connection(&user.into(), now).judge_connect(now);
        let verdicts: Vec<_> = (0..21).map(|_| connect("alice")).collect();
        assert!(verdicts[..10].iter().all(|verdict| *verdict == Verdict::Pass), "the least is 10 a second");
        for (verdict, wait) in verdicts[10..20].iter().zip(1..) {
            assert_eq!(*verdict, Verdict::Wait { until: now + ms(wait * 100), limit: "user_publishes_per_s" });
        }
        assert_eq!(verdicts[20], Verdict::Refuse { limit: "user_publishes_per_s" });
        assert_eq!(connect("bob"), Verdict::Pass);
    }

    #[test]
    fn larger_than_a_seconds_worth_passes_when_nothing_is_owed() {
        let now = Instant::now();
        let mut pace = Pacing::new(&limits(), now).connection(&"alice".into(), now);
        assert_eq!(pace.judge(one(3_000), true, now), Verdict::Pass);
        assert_eq!(pace.judge(one(3_000), true, now), Verdict::Refuse { limit: "publish_bytes_per_s" });
        let until = now + ms(3_000);
        assert_eq!(pace.judge(one(3_000), false, now), Verdict::Wait { until, limit: "publish_bytes_per_s" });
        assert_eq!(pace.judge(one(3_000), true, until + ms(3_000)), Verdict::Pass);
    }

    #[test]
    fn what_took_more_is_paid_for_later() {
        let now = Instant::now();
        let mut pace = Pacing::new(&limits(), now).connection(&"alice".into(), now);
        assert_eq!(pace.judge(one(1), true, now), Verdict::Pass);
        pace.charge(Cost { publishes: 29, bytes: 0 }, now);
        assert_eq!(pace.judge(one(1), true, now + ms(2_099)), Verdict::Refuse { limit: "publishes_per_s" });
        assert_eq!(pace.judge(one(1), true, now + ms(2_100)), Verdict::Pass);
    }

    #[test]
    fn users_are_forgotten_when_nothing_is_owed() {
        let now = Instant::now();
        let pacing = Pacing::new(&limits(), now);
        let mut pace = pacing.connection(&"alice".into(), now);
        assert_eq!(pace.judge(one(1), true, now + Duration::from_secs(3_600)), Verdict::Pass);
        drop(pace);
        assert_eq!(pacing.users(), 1, "who comes back at once owes what they owed");
        for user in 0..10_000 {
            drop(pacing.connection(&format!("user-{user}").into(), now));
        }
        let later = now + Duration::from_secs(7_200);
        let held: Vec<_> = (0..2_000).map(|user| pacing.connection(&format!("user-{user}").into(), later)).collect();
        assert_eq!(pacing.users(), 2_000, "alice owes nothing any more");
        drop(held);
        assert_eq!(pacing.users(), 0);
    }

    proptest! {
        #[test]
        fn no_second_has_more_than_two_seconds_worth(
            steps in prop::collection::vec((0u64..400, 0u64..900, any::<bool>()), 1..200),
        ) {
            let now = Instant::now();
            let mut pace = Pacing::new(&limits(), now).connection(&"alice".into(), now);
            let mut at = now;
            let mut passed: Vec<(Instant, u64)> = Vec::new();
            for (gap, bytes, may_refuse) in steps {
                at += ms(gap);
                match pace.judge(one(bytes), may_refuse, at) {
                    Verdict::Pass => passed.push((at, bytes)),
                    Verdict::Wait { until, .. } => {
                        prop_assert!(until > at);
                        at = until;
                        passed.push((at, bytes));
                    }
                    Verdict::Refuse { .. } => prop_assert!(may_refuse),
                }
            }
            for (begin, _) in &passed {
                let second = passed.iter().filter(|(at, _)| at >= begin && *at < *begin + ms(1_000));
                let (count, bytes) = second.fold((0, 0), |(count, sum), (_, bytes)| (count + 1, sum + bytes));
                prop_assert!(count <= 20, "{count} publishes");
                prop_assert!(bytes <= 2_000, "{bytes} bytes");
            }
        }
    }
}
