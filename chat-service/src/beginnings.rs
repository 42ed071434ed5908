//! How many conversations users began lately.
//!
//! Pure: time comes in. A user may begin an hour's worth at once, and then one every so often. Whoever owes nothing is not remembered; when
//! too many are, all are forgotten, which lets somebody begin more, never fewer.

use std::num::NonZeroU32;

use chat_protocol::{Timestamp, UserId};
use rustc_hash::FxHashMap;

const HOUR_US: u64 = 3_600_000_000;
/// Users who are remembered.
const USERS_MAX: usize = 200_000;

/// Who began how many.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beginnings {
    /// `None`: no limit.
    per_hour: Option<NonZeroU32>,
    /// Until when what a user began counts, in microseconds since the Unix epoch.
    until_us: FxHashMap<UserId, u64>,
}

impl Beginnings {
    /// `per_hour` 0: no limit.
    pub fn new(per_hour: u32) -> Self {
        Self { per_hour: NonZeroU32::new(per_hour), until_us: FxHashMap::default() }
    }

    /// How many more the user may begin now.
    pub fn room(&self, user: &UserId, now: Timestamp) -> u32 {
        let Some(per_hour) = self.per_hour else { return u32::MAX };
        let Some(until_us) = self.until_us.get(user) else { return per_hour.get() };
        let owed_us = until_us.saturating_sub(micros(now));
        let left_us = HOUR_US.saturating_sub(owed_us);
        u32::try_from(left_us / cost_us(per_hour)).unwrap_or(u32::MAX).min(per_hour.get())
    }

    /// The user began one.
    pub fn note(&mut self, user: &UserId, now: Timestamp) {
        let Some(per_hour) = self.per_hour else { return };
        let now_us = micros(now);
        if self.until_us.len() >= USERS_MAX && !self.until_us.contains_key(user) {
            self.until_us.retain(|_, until_us| *until_us > now_us);
            if self.until_us.len() >= USERS_MAX {
                self.until_us.clear();
            }
        }
        let until_us = self.until_us.entry(user.clone()).or_default();
        // A clock that was set back must not keep anybody waiting for longer than an hour.
        *until_us = (*until_us).clamp(now_us, now_us + HOUR_US) + cost_us(per_hour);
    }
}

fn micros(at: Timestamp) -> u64 {
    at.as_ms().saturating_mul(1_000)
}

fn cost_us(per_hour: NonZeroU32) -> u64 {
    HOUR_US / u64::from(per_hour.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> UserId {
        UserId::parse(name).expect("a valid name")
    }

    fn at_s(seconds: u64) -> Timestamp {
        Timestamp::from_ms(seconds * 1_000)
    }

    #[test]
    fn an_hours_worth_at_once_and_then_one_by_one() {
        let (alice, bob) = (user("alice"), user("bob"));
        let mut beginnings = Beginnings::new(60);
        let now = at_s(1_000_000);
        for left in (0..60).rev() {
            beginnings.note(&alice, now);
            assert_eq!(beginnings.room(&alice, now), left);
        }
        assert_eq!(beginnings.room(&bob, now), 60);
        assert_eq!(beginnings.room(&alice, at_s(1_000_059)), 0);
        assert_eq!(beginnings.room(&alice, at_s(1_000_060)), 1);
        assert_eq!(beginnings.room(&alice, at_s(1_000_000 + 3_600)), 60);
        assert_eq!(beginnings.room(&alice, at_s(9_000_000)), 60, "it does not add up");
    }

    #[test]
    fn a_clock_set_back_costs_no_more_than_an_hour() {
        let alice = user("alice");
        let mut beginnings = Beginnings::new(2);
        beginnings.note(&alice, at_s(1_000_000));
        beginnings.note(&alice, at_s(10));
        assert_eq!(beginnings.room(&alice, at_s(10)), 0);
        assert_eq!(beginnings.room(&alice, at_s(10 + 3_600)), 1);
    }

    #[test]
    fn zero_is_no_limit_and_remembers_nobody() {
        let alice = user("alice");
        let mut beginnings = Beginnings::new(0);
        beginnings.note(&alice, at_s(1));
        assert_eq!(beginnings.room(&alice, at_s(1)), u32::MAX);
        assert_eq!(beginnings, Beginnings::new(0));
    }

    #[test]
    fn so_many_users_are_remembered() {
        let mut beginnings = Beginnings::new(1);
        for number in 0..USERS_MAX + 10 {
            beginnings.note(&user(&format!("user-{number}")), at_s(1));
        }
        assert!(beginnings.until_us.len() <= USERS_MAX);
        let first = user("first");
        beginnings.note(&first, at_s(10_000));
        assert_eq!(beginnings.room(&first, at_s(10_000)), 0, "the last is remembered");
    }
}
