//! What waits to be stored on the server: in which order it is published, how much at once, and what is tried again.
//!
//! Pure: time comes in. Invariants: messages are published in the order in which they were queued; none is forgotten before the server has
//! stored or refused it; none is published twice at once on one connection, but after a pause.
//!
//! They are stored in that order too, but for one case: when the server puts one off, those that are under way behind it may be stored before it. So no
//! more are under way than the server's rate asks for, and one at a time after it has put off any.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use chat_protocol::{ErrorCode, Timestamp};

use crate::answer::Answer;
use crate::error::Refusal;
use crate::event::Stored;
use crate::outbox::{Key, Unsent};

/// Published and not answered, at most.
const WINDOW: usize = 16;
/// How long an answer may take before the window makes publishing slower than the server's rate: 20 ms.
const WINDOWS_PER_S: u32 = 50;
/// For so long after the server has put one off, the next is published when the one before is answered.
const CAUTION: Duration = Duration::from_secs(60);
/// How long nothing is published after the server could not answer, at first and at most.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Of the rate that the server names; the rest is for requests, and for what else a program does.
const RATE_PERCENT: u32 = 80;

/// What the server said of a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Stored(Stored),
    Refused(Refusal),
}

#[derive(Debug)]
struct Waiting {
    unsent: Unsent,
    /// It was published before, or may have been in an earlier run: the server may have it.
    may_be_stored: bool,
}

#[derive(Debug)]
pub(crate) struct Sending {
    /// In order; the first `published` of them are on their way.
    waiting: VecDeque<Waiting>,
    published: usize,
    /// How many may be.
    window: usize,
    /// How many may be if the server puts none off.
    window_max: usize,
    put_off_at: Option<Instant>,
    paused_until: Option<Instant>,
    pause: Option<Duration>,
    pace: Option<Pace>,
}

impl Default for Sending {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            published: 0,
            window: WINDOW,
            window_max: WINDOW,
            put_off_at: None,
            paused_until: None,
            pause: None,
            pace: None,
        }
    }
}

impl Sending {
    pub(crate) fn push(&mut self, unsent: Unsent) {
        self.waiting.push_back(Waiting { unsent, may_be_stored: false });
    }

    /// From an earlier run.
    pub(crate) fn take_up(&mut self, unsent: Unsent) {
        self.waiting.push_back(Waiting { unsent, may_be_stored: true });
    }

    /// Takes out what the server may have stored and forgotten the id of: it must not be published again. For before a connection is used.
    pub(crate) fn too_old(&mut self, oldest: Timestamp) -> Vec<Unsent> {
        let is_old = |waiting: &Waiting| waiting.may_be_stored && waiting.unsent.queued_at < oldest;
        let (old, rest): (VecDeque<_>, _) = std::mem::take(&mut self.waiting).into_iter().partition(is_old);
        self.waiting = rest;
        old.into_iter().map(|waiting| waiting.unsent).collect()
    }

    /// Whether it waits.
    pub(crate) fn has(&self, key: &Key) -> bool {
        self.position(key).is_some()
    }

    fn position(&self, (to, id): &Key) -> Option<usize> {
        self.waiting.iter().position(|Waiting { unsent, .. }| unsent.id == *id && unsent.to == *to)
    }

    /// A connection is there. It takes so many publishes a second, if it said so.
    pub(crate) fn connected(&mut self, publishes_per_s: Option<u32>, now: Instant) {
        self.disconnected();
        let rate = publishes_per_s.filter(|rate| *rate > 0);
        self.pace = rate.map(|rate| Pace::new(rate, now));
        self.window_max = rate.map_or(WINDOW, |rate| ((rate / WINDOWS_PER_S) as usize).clamp(1, WINDOW));
        self.window = if self.put_off_at.is_some() { 1 } else { self.window_max };
    }

    pub(crate) fn disconnected(&mut self) {
        self.published = 0;
        self.paused_until = None;
    }

    /// The next to publish, if one may be now.
    pub(crate) fn next(&mut self, now: Instant) -> Option<&Unsent> {
        if self.paused_until.is_some_and(|until| now < until) || self.published >= self.window {
            return None;
        }
        self.paused_until = None;
        if self.published == self.waiting.len() || self.pace.as_mut().is_some_and(|pace| !pace.take(now)) {
            return None;
        }
        let waiting = self.waiting.get_mut(self.published)?;
        self.published += 1;
        waiting.may_be_stored = true;
        Some(&waiting.unsent)
    }

    /// When [`next`](Self::next) should be asked again, if nothing else happens before.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        if self.published == self.waiting.len() || self.published >= self.window {
            return None;
        }
        self.paused_until.max(self.pace.as_ref().map(|pace| pace.free_at))
    }

    /// What became of it, with the message; `None` if it is to be tried again, or is long known.
    pub(crate) fn answered(&mut self, key: &Key, answer: &Answer, now: Instant) -> Option<(Unsent, Outcome)> {
        let at = self.position(key)?;
        let outcome = match answer {
            Answer::Stored { seq, at, receiver_away } => {
                Outcome::Stored(Stored { id: key.1.clone(), seq: *seq, at: *at, receiver_away: *receiver_away })
            }
            Answer::Refused(refusal) if is_passing(refusal) => {
                // It and all after it are published again, in this order.
                self.published = self.published.min(at);
                self.window = 1;
                self.put_off_at = Some(now);
                if self.paused_until.is_none() {
                    let pause = self.pause.map_or(PAUSE_MIN, |pause| (pause * 2).min(PAUSE_MAX));
                    self.pause = Some(pause);
                    self.paused_until = Some(now + pause);
                }
                return None;
            }
            Answer::Refused(refusal) => Outcome::Refused(refusal.clone()),
            Answer::Done => {
                let message = "the server acknowledged a message without saying what number it has".to_owned();
                Outcome::Refused(Refusal { code: None, reason_code: 0, message })
            }
        };
        self.pause = None;
        if self.put_off_at.is_some_and(|put_off_at| now >= put_off_at + CAUTION) {
            self.put_off_at = None;
            self.window = self.window_max;
        }
        if at < self.published {
            self.published -= 1;
        }
        Some((self.waiting.remove(at)?.unsent, outcome))
    }
}

/// It may succeed later, as it is.
pub(crate) fn is_passing(refusal: &Refusal) -> bool {
    matches!(refusal.code, Some(ErrorCode::Unavailable | ErrorCode::TooFast | ErrorCode::StorageFull))
}

/// Publishes no faster than a server allows: a second's worth at once, and then one after the other.
#[derive(Debug)]
struct Pace {
    interval: Duration,
    free_at: Instant,
    burst: Duration,
    busy_until: Instant,
}

impl Pace {
    fn new(publishes_per_s: u32, now: Instant) -> Self {
        let interval = Duration::from_secs(1) * 100 / RATE_PERCENT / publishes_per_s;
        // As a second is the server's own measure, half of one leaves room for what other devices do.
        Self { interval, free_at: now, burst: Duration::from_millis(500), busy_until: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        if now < self.free_at {
            return false;
        }
        self.busy_until = self.busy_until.max(now) + self.interval;
        self.free_at = self.busy_until.checked_sub(self.burst).map_or(now, |free_at| free_at.max(now));
        true
    }
}

#[cfg(test)]
mod tests {
    use chat_protocol::{MessageId, Seq, UserId};

    use super::*;

    fn unsent(id: &str) -> Unsent {
        let (id, to) = (MessageId::parse(id).unwrap(), UserId::parse("bob").unwrap());
        Unsent { id, to, text: "hello".into(), queued_at: Timestamp::from_ms(1) }
    }

    fn stored(seq: u64) -> Answer {
        Answer::Stored { seq: Seq::new(seq).unwrap(), at: Timestamp::from_ms(2), receiver_away: false }
    }

    fn refused(code: ErrorCode) -> Answer {
        Answer::Refused(Refusal { code: Some(code), reason_code: 0x97, message: code.as_str().into() })
    }

    fn published(sending: &mut Sending, now: Instant) -> Vec<String> {
        std::iter::from_fn(|| sending.next(now).map(|unsent| unsent.id.to_string())).collect()
    }

    fn three() -> (Sending, Instant) {
        let (mut sending, now) = (Sending::default(), Instant::now());
        for id in ["a", "b", "c"] {
            sending.push(unsent(id));
        }
        sending.connected(None, now);
        (sending, now)
    }

    fn key(id: &str) -> Key {
        unsent(id).key()
    }

    #[test]
    fn in_order_and_again_after_a_reconnect() {
        let (mut sending, now) = three();
        assert_eq!(published(&mut sending, now), ["a", "b", "c"]);
        let (unsent, outcome) = sending.answered(&key("a"), &stored(1), now).unwrap();
        assert!(matches!(outcome, Outcome::Stored(Stored { receiver_away: false, .. })));
        assert_eq!(unsent.key(), key("a"));
        sending.disconnected();
        sending.connected(None, now);
        assert_eq!(published(&mut sending, now), ["b", "c"]);
        assert_eq!(sending.answered(&key("a"), &stored(1), now), None, "known already");
    }

    #[test]
    fn no_more_than_the_window() {
        let (mut sending, now) = (Sending::default(), Instant::now());
        for number in 0..40 {
            sending.push(unsent(&format!("m-{number}")));
        }
        assert_eq!(published(&mut sending, now).len(), WINDOW);
        sending.answered(&key("m-0"), &stored(1), now).unwrap();
        sending.answered(&key("m-1"), &stored(2), now).unwrap();
        assert_eq!(published(&mut sending, now), ["m-16", "m-17"]);
    }

    #[test]
    fn what_passes_is_tried_again_in_order() {
        let (mut sending, now) = three();
        assert_eq!(published(&mut sending, now).len(), 3);
        assert!(sending.answered(&key("a"), &stored(1), now).is_some());
        assert_eq!(sending.answered(&key("b"), &refused(ErrorCode::TooFast), now), None);
        assert_eq!(sending.answered(&key("c"), &refused(ErrorCode::TooFast), now), None);
        assert_eq!(published(&mut sending, now), [""; 0]);
        let later = sending.wake_at().unwrap();
        assert_eq!(later, now + PAUSE_MIN);
        assert_eq!(published(&mut sending, later), ["b"], "nothing may overtake it");
        assert_eq!(sending.answered(&key("b"), &refused(ErrorCode::Unavailable), later), None);
        let later = later + PAUSE_MIN * 2;
        assert_eq!(sending.wake_at(), Some(later), "longer each time");
        assert_eq!(published(&mut sending, later), ["b"]);
        assert!(sending.answered(&key("b"), &stored(2), later).is_some());
        for id in ["d", "e", "f"] {
            sending.push(unsent(id));
        }
        assert_eq!(published(&mut sending, later), ["c"]);
        let later = later + CAUTION;
        assert!(sending.answered(&key("c"), &stored(3), later).is_some());
        assert_eq!(published(&mut sending, later), ["d", "e", "f"]);
    }

    #[test]
    fn a_slow_server_has_no_more_under_way_than_its_rate_asks_for() {
        for (rate, count) in [(None, 16), (Some(0), 16), (Some(4_000), 16), (Some(200), 4), (Some(10), 1)] {
            let (mut sending, now) = (Sending::default(), Instant::now());
            for number in 0..40 {
                sending.push(unsent(&format!("m-{number}")));
            }
            sending.connected(rate, now);
            assert_eq!(published(&mut sending, now).len(), count, "{rate:?}");
        }
    }

    #[test]
    fn what_is_refused_is_given_back() {
        let (mut sending, now) = three();
        assert_eq!(published(&mut sending, now).len(), 3);
        let (unsent, outcome) = sending.answered(&key("b"), &refused(ErrorCode::UnknownUser), now).unwrap();
        assert_eq!(unsent.key(), key("b"));
        assert!(matches!(outcome, Outcome::Refused(Refusal { code: Some(ErrorCode::UnknownUser), .. })));
        sending.disconnected();
        assert_eq!(published(&mut sending, now), ["a", "c"]);
    }

    /// A laptop may sleep for longer than the server remembers ids.
    #[test]
    fn what_may_be_stored_and_forgotten_is_not_published_again() {
        let (mut sending, now) = (Sending::default(), Instant::now());
        sending.take_up(unsent("of-an-earlier-run"));
        for id in ["published", "never-published"] {
            sending.push(unsent(id));
        }
        sending.connected(None, now);
        assert!(sending.next(now).is_some() && sending.next(now).is_some());
        sending.disconnected();
        assert_eq!(sending.too_old(Timestamp::from_ms(1)), []);
        let old = sending.too_old(Timestamp::from_ms(2));
        assert_eq!(old, [unsent("of-an-earlier-run"), unsent("published")]);
        sending.connected(None, now);
        assert_eq!(published(&mut sending, now), ["never-published"]);
    }

    #[test]
    fn no_faster_than_the_server_says() {
        let (mut sending, mut now) = (Sending::default(), Instant::now());
        let begun = now;
        for number in 0..300 {
            sending.push(unsent(&format!("m-{number}")));
        }
        sending.connected(Some(100), now);
        let mut at = Vec::new();
        while let Some(wake_at) = sending.wake_at() {
            now = now.max(wake_at);
            for id in published(&mut sending, now) {
                at.push(now - begun);
                sending.answered(&key(&id), &stored(1), now).unwrap();
            }
        }
        assert_eq!(at.len(), 300);
        // As the server counts: never more than a second's worth ahead of 100/s.
        for (number, at) in at.iter().enumerate() {
            assert!(
                Duration::from_millis(10) * u32::try_from(number).unwrap() <= *at + Duration::from_secs(1),
                "{number} {at:?}"
            );
        }
        assert!(at[299] < Duration::from_secs(4), "{:?}", at[299]);
    }
}
