//! Log lines that strangers cause: a few a second, so that nobody can fill a disk with them, and how many there would have been more.
//!
//! What is left out here is counted in `/metrics` all the same.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lines of one kind in a period.
const LINES_MAX: u32 = 5;
const PERIOD: Duration = Duration::from_secs(1);

/// Clients that were refused, and logins that failed.
pub static REFUSALS: Sparing = Sparing::new("refusals");
/// Connections that were closed because there are too many.
pub static CLOSED: Sparing = Sparing::new("closed connections");
/// Wills that could not be published.
pub static WILLS: Sparing = Sparing::new("unpublished wills");

/// One kind of lines.
#[derive(Debug)]
pub struct Sparing {
    what: &'static str,
    said: Mutex<Said>,
}

#[derive(Debug)]
struct Said {
    /// When the period began.
    since: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Sparing {
    const fn new(what: &'static str) -> Self {
        Self { what, said: Mutex::new(Said { since: None, lines: 0, left_out: 0 }) }
    }

    /// Whether the line may be written now. Says how many were left out, when it is the first after those.
    pub fn may_say(&self) -> bool {
        let (may_say, left_out) = self.ask(Instant::now());
        if left_out > 0 {
            tracing::info!(left_out, "more {} were not logged one by one", self.what);
        }
        may_say
    }

    /// Also how many were left out, as far as that was not told yet.
    fn ask(&self, now: Instant) -> (bool, u64) {
        let mut said = self.said.lock();
        let mut left_out = 0;
        if said.since.is_none_or(|since| now.saturating_duration_since(since) >= PERIOD) {
            left_out = said.left_out;
            *said = Said { since: Some(now), lines: 0, left_out: 0 };
        }
        if said.lines < LINES_MAX {
            said.lines += 1;
            (true, left_out)
        } else {
            said.left_out += 1;
            (false, left_out)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_number() {
        let (sparing, began) = (Sparing::new("tests"), Instant::now());
        let said: Vec<_> = (0..10_000).map(|_| sparing.ask(began)).filter(|(may_say, _)| *may_say).collect();
        assert_eq!(said, [(true, 0); 5]);
        let later = began + PERIOD;
        assert_eq!(sparing.ask(later), (true, 9_995));
        assert_eq!(sparing.ask(later), (true, 0), "told once");
    }

    #[test]
    fn who_comes_now_and_then_is_always_told() {
        let (sparing, began) = (Sparing::new("tests"), Instant::now());
        for second in 0..100 {
            let now = began + Duration::from_secs(second);
            assert_eq!([sparing.ask(now), sparing.ask(now)], [(true, 0); 2]);
        }
    }
}
