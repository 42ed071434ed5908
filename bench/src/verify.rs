//! Whether what arrives is what was sent: each message once, in order, of the right pair. Pure.

use std::collections::{BTreeSet, VecDeque};

use serde::Serialize;

use crate::payload::Stamp;

/// What was found wrong. All zero is right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Faults {
    /// Sent, but not delivered when waiting ended.
    pub(crate) lost: u64,
    /// Sent, but not acknowledged when waiting ended.
    pub(crate) unacknowledged: u64,
    /// Times that a message came before another that was sent earlier.
    pub(crate) gaps: u64,
    /// Messages that came after one that was sent later.
    pub(crate) out_of_order: u64,
    pub(crate) repeats: u64,
    /// Messages of another pair or run, or with a counter that was never sent.
    pub(crate) foreign: u64,
    pub(crate) unparsable: u64,
    /// Envelopes whose seq was not the one before plus one.
    pub(crate) wrong_seq: u64,
    /// Publishes acknowledged with an error.
    pub(crate) refused: u64,
    /// Acknowledgements of what was not waiting for one.
    pub(crate) wrong_acknowledgements: u64,
    /// Connections that ended before the run.
    pub(crate) disconnected: u64,
}

impl Faults {
    fn named(&self) -> [(u64, &'static str); 11] {
        [
            (self.lost, "lost"),
            (self.unacknowledged, "never acknowledged"),
            (self.gaps, "gaps"),
            (self.out_of_order, "out of order"),
            (self.repeats, "repeated"),
            (self.foreign, "foreign"),
            (self.unparsable, "unparsable"),
            (self.wrong_seq, "with a wrong seq"),
            (self.refused, "refused"),
            (self.wrong_acknowledgements, "wrong acknowledgements"),
            (self.disconnected, "pairs disconnected"),
        ]
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.lost += other.lost;
        self.unacknowledged += other.unacknowledged;
        self.gaps += other.gaps;
        self.out_of_order += other.out_of_order;
        self.repeats += other.repeats;
        self.foreign += other.foreign;
        self.unparsable += other.unparsable;
        self.wrong_seq += other.wrong_seq;
        self.refused += other.refused;
        self.wrong_acknowledgements += other.wrong_acknowledgements;
        self.disconnected += other.disconnected;
    }

    /// Nothing, or what is wrong.
    pub(crate) fn sentence(&self) -> Option<String> {
        let wrong: Vec<String> = self
            .named()
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        (!wrong.is_empty()).then(|| wrong.join(", "))
    }
}

/// One pair's deliveries.
#[derive(Debug)]
pub(crate) struct Deliveries {
    pair: u32,
    run: u32,
    expected: u64,
    /// Passed over so far. No more than are in flight, as what was never sent is foreign.
    missing: BTreeSet<u64>,
    last_seq: u64,
    /// Different messages that arrived.
    pub(crate) delivered: u64,
}

impl Deliveries {
    pub(crate) fn new(pair: u32, run: u32) -> Self {
        Self { pair, run, expected: 1, missing: BTreeSet::new(), last_seq: 0, delivered: 0 }
    }

    /// Whether it is one of the pair's messages, for the first time.
    pub(crate) fn arrive(&mut self, stamp: Stamp, sent: u64, faults: &mut Faults) -> bool {
        let counter = stamp.counter;
        if stamp.pair != self.pair || stamp.run != self.run || counter == 0 || counter > sent {
            faults.foreign += 1;
            return false;
        }
        if counter < self.expected {
            if !self.missing.remove(&counter) {
                faults.repeats += 1;
                return false;
            }
            faults.out_of_order += 1;
        } else {
            if counter > self.expected {
                faults.gaps += 1;
                self.missing.extend(self.expected..counter);
            }
            self.expected = counter + 1;
        }
        self.delivered += 1;
        true
    }

    /// A conversation of ours is new, and only one side writes: its seq begins with 1.
    pub(crate) fn number(&mut self, seq: u64, faults: &mut Faults) {
        if seq != self.last_seq + 1 {
            faults.wrong_seq += 1;
        }
        self.last_seq = seq;
    }
}

/// One sender's publishes that wait for their PUBACK, by packet identifier.
#[derive(Debug, Default)]
pub(crate) struct Acknowledgements {
    /// When they were sent, from the oldest; nothing where the PUBACK came before that of an older one.
    waiting: VecDeque<Option<u64>>,
    /// The message that `waiting` begins after.
    settled: u64,
    pub(crate) acknowledged: u64,
}

/// 1 to 65535: 0 is no packet identifier.
const IDS: u64 = 65_535;

impl Acknowledgements {
    /// Counts up and around: a publish cannot have the identifier of another in flight as long as there are fewer than 65535.
    pub(crate) fn id(counter: u64) -> u16 {
        u16::try_from((counter - 1) % IDS + 1).unwrap_or_default()
    }

    pub(crate) fn room(&self, limit: u16) -> bool {
        self.waiting.len() < limit.into()
    }

    pub(crate) fn sent(&mut self, micros: u64) {
        self.waiting.push_back(Some(micros));
    }

    /// When it was sent, unless nothing waits for this acknowledgement.
    pub(crate) fn arrive(&mut self, id: u16, faults: &mut Faults) -> Option<u64> {
        let oldest = u64::from(Self::id(self.settled + 1));
        let ahead = (u64::from(id) + IDS - oldest) % IDS;
        let waiting = usize::try_from(ahead).ok().and_then(|ahead| self.waiting.get_mut(ahead)).and_then(Option::take);
        let Some(micros) = waiting.filter(|_| id != 0) else {
            faults.wrong_acknowledgements += 1;
            return None;
        };
        while let Some(None) = self.waiting.front() {
            self.waiting.pop_front();
            self.settled += 1;
        }
        self.acknowledged += 1;
        Some(micros)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SENT: u64 = 9;

    fn deliver(counters: &[u64]) -> (Faults, u64) {
        let mut faults = Faults::default();
        let mut deliveries = Deliveries::new(3, 4);
        for &counter in counters {
            deliveries.arrive(Stamp { counter, micros: 0, pair: 3, run: 4 }, SENT, &mut faults);
        }
        (faults, deliveries.delivered)
    }

    #[test]
    fn each_once_and_in_order_is_right() {
        assert_eq!(deliver(&[1, 2, 3, 4]), (Faults::default(), 4));
        assert_eq!(Faults::default().sentence(), None);
    }

    #[test]
    fn a_gap_is_found() {
        assert_eq!(deliver(&[1, 2, 4]), (Faults { gaps: 1, ..Faults::default() }, 3));
        assert_eq!(deliver(&[2]), (Faults { gaps: 1, ..Faults::default() }, 1));
    }

    #[test]
    fn a_repeat_is_found() {
        assert_eq!(deliver(&[1, 2, 2, 3, 1]), (Faults { repeats: 2, ..Faults::default() }, 3));
        // Also of one that came late.
        assert_eq!(deliver(&[2, 1, 1, 3]), (Faults { gaps: 1, out_of_order: 1, repeats: 1, ..Faults::default() }, 3));
    }

    #[test]
    fn a_swap_is_found() {
        assert_eq!(deliver(&[1, 3, 2, 4]), (Faults { gaps: 1, out_of_order: 1, ..Faults::default() }, 4));
    }

    #[test]
    fn the_foreign_is_found() {
        let mut faults = Faults::default();
        let mut deliveries = Deliveries::new(3, 4);
        let right = Stamp { counter: 1, micros: 0, pair: 3, run: 4 };
        for wrong in [
            Stamp { pair: 2, ..right },
            Stamp { run: 3, ..right },
            Stamp { counter: SENT + 1, ..right },
            Stamp { counter: 0, ..right },
        ] {
            assert!(!deliveries.arrive(wrong, SENT, &mut faults));
        }
        assert!(deliveries.arrive(right, SENT, &mut faults));
        assert_eq!(faults, Faults { foreign: 4, ..Faults::default() });
        assert_eq!(faults.sentence().as_deref(), Some("4 foreign"));
    }

    #[test]
    fn a_wrong_seq_is_found() {
        let mut faults = Faults::default();
        let mut deliveries = Deliveries::new(3, 4);
        for seq in [1, 2, 4, 5, 5] {
            deliveries.number(seq, &mut faults);
        }
        assert_eq!(faults, Faults { wrong_seq: 2, ..Faults::default() });
    }

    #[test]
    fn acknowledgements_find_their_publish_across_the_wrap_of_identifiers() {
        let (mut faults, mut acknowledgements) = (Faults::default(), Acknowledgements::default());
        for counter in 1..=IDS * 2 + 10 {
            acknowledgements.sent(counter);
            if counter % 3 == 0 {
                // The second one first.
                for which in [counter - 1, counter - 2, counter] {
                    assert_eq!(acknowledgements.arrive(Acknowledgements::id(which), &mut faults), Some(which));
                }
            }
        }
        assert_eq!(faults, Faults::default());
        assert_eq!(acknowledgements.acknowledged, IDS * 2 + 10 - 1);
    }

    #[test]
    fn an_acknowledgement_of_nothing_is_found() {
        let (mut faults, mut acknowledgements) = (Faults::default(), Acknowledgements::default());
        assert_eq!(acknowledgements.arrive(1, &mut faults), None);
        acknowledgements.sent(7);
        acknowledgements.sent(8);
        assert_eq!(acknowledgements.arrive(2, &mut faults), Some(8));
        assert_eq!(acknowledgements.arrive(2, &mut faults), None);
        assert_eq!(acknowledgements.arrive(3, &mut faults), None);
        assert_eq!(acknowledgements.arrive(0, &mut faults), None);
        assert_eq!(acknowledgements.arrive(1, &mut faults), Some(7));
        assert_eq!(faults, Faults { wrong_acknowledgements: 4, ..Faults::default() });
        assert!(acknowledgements.room(1));
    }
}
