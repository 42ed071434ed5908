//! Who guesses passwords: counted for each address and for each address and user, and made to wait.
//!
//! A user's name alone counts for nothing, or anybody could lock anybody out. Where many share an address, as behind a proxy, name and address
//! together are hardly more than the name: there nobody is made to wait, only to take turns. Pure: the caller brings the clock.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

/// Failures of one address and user, and of one address, until it has to wait.
const USER_FAILURES_MAX: u32 = 10;
const ADDRESS_FAILURES_MAX: u32 = 100;
/// The first wait; it doubles with each failure after it.
const FIRST_WAIT: Duration = Duration::from_secs(60);
const WAIT_MAX: Duration = Duration::from_secs(3_600);
/// Failures are forgotten so long after the last.
const MEMORY: Duration = Duration::from_secs(3_600);
/// Whoever has failed so often may be guessing.
const SUSPECT_FAILURES: u32 = 5;
/// Guessers that are remembered; the oldest are forgotten.
const GUESSERS_MAX: usize = 100_000;

/// An address, and perhaps the user whose password was tried. Of IPv6 the network counts: whoever has one has all of its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Guesser {
    address: IpAddr,
    user: Option<Arc<str>>,
}

impl Guesser {
    /// Whoever comes from there.
    pub(super) fn of_address(address: IpAddr) -> Self {
        Self { address: network(address), user: None }
    }

    /// Whoever tries this user from there.
    pub(super) fn of_user(address: IpAddr, user: &Arc<str>) -> Self {
        Self { address: network(address), user: Some(Arc::clone(user)) }
    }
}

/// Where somebody comes from, and who they say they are.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) address: IpAddr,
    /// Empty if it is no name that a user could have.
    pub(super) user: Arc<str>,
    /// Whether the address alone counts: not if many share it, as behind a proxy.
    pub(super) counts_address: bool,
}

impl Caller {
    /// Whose places they take when they wait.
    pub(super) fn guest(&self) -> Guesser {
        if self.counts_address { Guesser::of_address(self.address) } else { Guesser::of_user(self.address, &self.user) }
    }

    /// The address, if its places are shared by many.
    pub(super) fn shared(&self) -> Option<Guesser> {
        (!self.counts_address).then(|| Guesser::of_address(self.address))
    }

    /// Each with the failures that it may have.
    fn guessers(&self) -> impl Iterator<Item = (Guesser, u32)> {
        let of_user = (Guesser::of_user(self.address, &self.user), USER_FAILURES_MAX);
        let of_address = self.counts_address.then(|| (Guesser::of_address(self.address), ADDRESS_FAILURES_MAX));
        std::iter::once(of_user).chain(of_address)
    }
}

#[derive(Clone, Copy, Debug)]
struct Failures {
    count: u32,
    last: Instant,
}

/// Failed logins.
#[derive(Debug, Default)]
pub(super) struct Guesses {
    failures: FxHashMap<Guesser, Failures>,
    /// By their last failure when they were put here, the oldest first.
    order: VecDeque<(Instant, Guesser)>,
}

fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

impl Guesses {
    /// How long they still have to wait before anything is looked at.
    pub(super) fn wait(&self, caller: &Caller, now: Instant) -> Option<Duration> {
        let wait = |(guesser, max): (Guesser, u32)| {
            let failures = self.failures.get(&guesser).filter(|failures| now < failures.last + MEMORY)?;
            let beyond = failures.count.checked_sub(max)?;
            let wait = FIRST_WAIT.saturating_mul(1 << beyond.min(10)).min(WAIT_MAX);
            (failures.last + wait).checked_duration_since(now).filter(|left| !left.is_zero())
        };
        caller.guessers().filter_map(wait).max()
    }

    /// Whether whoever would take the places has failed more than now and then.
    pub(super) fn is_suspect(&self, caller: &Caller, now: Instant) -> bool {
        let failures = self.failures.get(&caller.guest()).filter(|failures| now < failures.last + MEMORY);
        failures.is_some_and(|failures| failures.count >= SUSPECT_FAILURES)
    }

    pub(super) fn failed(&mut self, caller: &Caller, now: Instant) {
        self.forget_old(now);
        for (guesser, _) in caller.guessers() {
            let failures = self.failures.entry(guesser.clone()).or_insert(Failures { count: 0, last: now });
            if failures.count == 0 || now >= failures.last + MEMORY {
                failures.count = 0;
                self.order.push_back((now, guesser));
            }
            failures.count = failures.count.saturating_add(1);
            failures.last = now;
        }
    }

    /// Whoever knows the password is no guesser. The address is not forgiven: it may have one account and guess at others.
    pub(super) fn succeeded(&mut self, caller: &Caller) {
        self.failures.remove(&Guesser::of_user(caller.address, &caller.user));
    }

    fn forget_old(&mut self, now: Instant) {
        while let Some((since, guesser)) = self.order.front() {
            let last = self.failures.get(guesser).map(|failures| failures.last);
            match last {
                // It failed again since: its place is further back.
                Some(last) if last > *since && now < last + MEMORY && self.order.len() <= GUESSERS_MAX => {
                    let guesser = guesser.clone();
                    self.order.pop_front();
                    self.order.push_back((last, guesser));
                }
                Some(last) if now < last + MEMORY && self.order.len() <= GUESSERS_MAX => return,
                _ => {
                    self.failures.remove(guesser);
                    self.order.pop_front();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const ELSEWHERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    fn at(address: IpAddr, user: &str) -> Caller {
        Caller { address, user: Arc::from(user), counts_address: true }
    }

    fn bob(address: IpAddr) -> Caller {
        at(address, "bob")
    }

    #[test]
    fn a_guesser_waits_longer_each_time_and_nobody_else_does() {
        let (mut guesses, begin) = (Guesses::default(), Instant::now());
        for _ in 0..USER_FAILURES_MAX {
            assert_eq!(guesses.wait(&bob(HOME), begin), None);
            guesses.failed(&bob(HOME), begin);
        }
        assert_eq!(guesses.wait(&bob(HOME), begin), Some(FIRST_WAIT));
        assert_eq!(guesses.wait(&bob(HOME), begin + FIRST_WAIT), None, "it may try again");
        guesses.failed(&bob(HOME), begin + FIRST_WAIT);
        assert_eq!(guesses.wait(&bob(HOME), begin + FIRST_WAIT), Some(FIRST_WAIT * 2));
        assert_eq!(guesses.wait(&bob(ELSEWHERE), begin), None, "bob himself is somewhere else");
        assert_eq!(guesses.wait(&at(HOME, "alice"), begin), None);
        for _ in 0..20 {
            guesses.failed(&bob(HOME), begin);
        }
        assert_eq!(guesses.wait(&bob(HOME), begin), Some(WAIT_MAX));
        assert_eq!(guesses.wait(&bob(HOME), begin + MEMORY), None);
    }

    #[test]
    fn an_address_that_tries_many_names_waits_for_all() {
        let (mut guesses, now) = (Guesses::default(), Instant::now());
        for nth in 0..ADDRESS_FAILURES_MAX {
            guesses.failed(&at(HOME, &format!("user-{nth}")), now);
        }
        assert!(guesses.wait(&bob(HOME), now).is_some());
        assert!(guesses.wait(&bob(ELSEWHERE), now).is_none());
        assert!(guesses.is_suspect(&bob(HOME), now) && !guesses.is_suspect(&bob(ELSEWHERE), now));
        assert!(!guesses.is_suspect(&bob(HOME), now + MEMORY));
    }

    #[test]
    fn an_address_that_many_share_counts_only_with_a_user() {
        let (mut guesses, now) = (Guesses::default(), Instant::now());
        let shared = |user: &str| Caller { counts_address: false, ..at(HOME, user) };
        for nth in 0..ADDRESS_FAILURES_MAX * 2 {
            guesses.failed(&shared(&format!("user-{nth}")), now);
        }
        assert!(guesses.wait(&shared("bob"), now).is_none());
        for _ in 0..USER_FAILURES_MAX {
            guesses.failed(&shared("bob"), now);
        }
        assert!(guesses.wait(&shared("bob"), now).is_some());
        assert_ne!(shared("bob").guest(), shared("alice").guest());
        assert_eq!(shared("bob").shared(), shared("alice").shared());
        assert_eq!(at(HOME, "bob").guest(), at(HOME, "alice").guest());
        assert_eq!(at(HOME, "bob").shared(), None);
        assert!(guesses.is_suspect(&shared("bob"), now) && !guesses.is_suspect(&shared("alice"), now));
    }

    #[test]
    fn an_ipv6_network_counts_as_one() {
        let (mut guesses, now) = (Guesses::default(), Instant::now());
        for nth in 0..USER_FAILURES_MAX {
            guesses.failed(&bob(format!("2001:db8::{nth}").parse().unwrap()), now);
        }
        assert!(guesses.wait(&bob("2001:db8::ffff".parse().unwrap()), now).is_some());
        assert!(guesses.wait(&bob("2001:db8:0:1::1".parse().unwrap()), now).is_none());
    }

    #[test]
    fn who_knows_the_password_is_forgiven() {
        let (mut guesses, now) = (Guesses::default(), Instant::now());
        for _ in 0..USER_FAILURES_MAX - 1 {
            guesses.failed(&bob(HOME), now);
        }
        guesses.succeeded(&bob(HOME));
        guesses.failed(&bob(HOME), now);
        assert_eq!(guesses.wait(&bob(HOME), now), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut guesses, mut now) = (Guesses::default(), Instant::now());
        for nth in 0..150_000_u32 {
            now += Duration::from_micros(1);
            guesses.failed(&bob(IpAddr::V4(nth.into())), now);
        }
        assert!(guesses.failures.len() <= GUESSERS_MAX + 2 && guesses.order.len() <= GUESSERS_MAX + 2);
        guesses.failed(&bob(HOME), now + MEMORY);
        assert!(guesses.failures.len() <= 2 && guesses.order.len() <= 2);
    }
}
