//! What a receiver has to get: every message of its streams, once, in order. And how a message says which it is. Pure.
//!
//! A stream is what one sender says to one receiver. What comes again after a reconnect and says so (DUP) is the price of at least once,
//! and counted apart; anything else that is not as it was sent is a fault.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Bytes of a text's stream, counter and time, in hexadecimal digits.
pub(crate) const STAMP_BYTES: usize = 32;

/// Which message this is: of which stream, which in it, counted from 1, and when it was due, in microseconds since the run began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) stream: u32,
    pub(crate) counter: u64,
    pub(crate) due_us: u64,
}

const DIGITS: &[u8; 16] = b"0123456789abcdef";

impl Stamp {
    /// Writes a text of so many bytes, at least [`STAMP_BYTES`]. Counters and times have 48 bits.
    pub(crate) fn write(self, text: &mut Vec<u8>, bytes: usize) {
        text.clear();
        text.resize(bytes.max(STAMP_BYTES), b'x');
        let number = u128::from(self.stream) << 96 | u128::from(self.counter) << 48 | u128::from(self.due_us);
        for (digit, nth) in text[..STAMP_BYTES].iter_mut().zip((0..32_u32).rev()) {
            *digit = DIGITS[((number >> (4 * nth)) & 0xf) as usize];
        }
    }

    fn read(text: &[u8]) -> Result<Self> {
        let mut number: u128 = 0;
        for digit in text.get(..STAMP_BYTES).context("a text is cut short")? {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => anyhow::bail!("a text is none of ours"),
            };
            number = number << 4 | u128::from(value);
        }
        let low = |bits: u128| u64::try_from(bits & 0xffff_ffff_ffff);
        Ok(Self { stream: u32::try_from(number >> 96)?, counter: low(number >> 48)?, due_us: low(number)? })
    }
}

/// What receivers are handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Payload {
    /// The bytes that were sent.
    Raw,
    /// chatd's JSON envelope around them, with its seq.
    Envelope,
}

/// What went wrong in all streams together; all zero if nothing did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Faults {
    /// Messages that were skipped when a later one came.
    pub(crate) gaps: u64,
    /// Messages that came again, or after a later one, and not as what comes again after a reconnect.
    pub(crate) repeats: u64,
    /// Envelopes whose seq does not follow the one before.
    pub(crate) seq_gaps: u64,
    /// Payloads that are none of ours.
    pub(crate) unreadable: u64,
    /// Messages that are somebody else's.
    pub(crate) strays: u64,
    /// Acknowledgements of what was not under way.
    pub(crate) stray_acknowledgements: u64,
    /// Sent and never delivered.
    pub(crate) lost: u64,
    /// Sent and never acknowledged.
    pub(crate) unacknowledged: u64,
    /// Sessions that a broker should have remembered and did not.
    pub(crate) sessions_lost: u64,
    /// Connections that the broker ended, or could not be had.
    pub(crate) connections_lost: u64,
    /// Receipts that went back, or never came.
    pub(crate) receipts: u64,
}

impl Faults {
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Those of others, too.
    pub(crate) fn add(&mut self, others: &Self) {
        self.gaps += others.gaps;
        self.repeats += others.repeats;
        self.seq_gaps += others.seq_gaps;
        self.unreadable += others.unreadable;
        self.strays += others.strays;
        self.stray_acknowledgements += others.stray_acknowledgements;
        self.lost += others.lost;
        self.unacknowledged += others.unacknowledged;
        self.sessions_lost += others.sessions_lost;
        self.connections_lost += others.connections_lost;
        self.receipts += others.receipts;
    }

    /// A sentence, of what is not zero.
    pub(crate) fn sentence(&self) -> String {
        let Ok(serde_json::Value::Object(all)) = serde_json::to_value(self) else { return format!("{self:?}") };
        let some: Vec<String> = all
            .iter()
            .filter(|(_, count)| **count != 0)
            .map(|(name, count)| format!("{count} {}", name.replace('_', " ")))
            .collect();
        if some.is_empty() { "nothing lost, repeated or out of order".to_owned() } else { some.join(", ") }
    }
}

/// What a message turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judged {
    New(Stamp),
    /// It came again, as it may after a reconnect.
    Redelivered,
    Fault,
}

/// What may be expected of the seqs in a stream's envelopes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seqs {
    /// One after the other: nobody else writes in the conversation.
    Consecutive,
    /// They grow: there is another direction.
    Growing,
}

/// What one receiver has had of one stream.
#[derive(Debug)]
pub(crate) struct Received {
    seqs: Seqs,
    last: u64,
    last_seq: u64,
    /// Whether its connection is not its first: what was under way may come again.
    reconnected: bool,
}

impl Received {
    pub(crate) fn new(seqs: Seqs) -> Self {
        Self { seqs, last: 0, last_seq: 0, reconnected: false }
    }

    /// From now on messages may come that have come before.
    pub(crate) fn reconnected(&mut self) {
        self.reconnected = true;
    }

    /// The last message that came.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// The seq of the last message that came; 0 where there are none.
    pub(crate) fn last_seq(&self) -> u64 {
        self.last_seq
    }

    /// Judges a message of this stream.
    pub(crate) fn take(&mut self, message: &Message, again: bool, faults: &mut Faults) -> Judged {
        let Message { stamp, seq } = message;
        if stamp.counter <= self.last {
            if again && self.reconnected {
                return Judged::Redelivered;
            }
            faults.repeats += 1;
            return Judged::Fault;
        }
        if let Some(seq) = seq {
            let follows = match self.seqs {
                Seqs::Consecutive => self.last_seq == 0 || *seq == self.last_seq + 1,
                Seqs::Growing => *seq > self.last_seq,
            };
            faults.seq_gaps += u64::from(!follows);
            self.last_seq = *seq;
        }
        faults.gaps += stamp.counter - self.last - 1;
        self.last = stamp.counter;
        Judged::New(*stamp)
    }
}

/// A message as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) stamp: Stamp,
    pub(crate) seq: Option<u64>,
}

impl Message {
    pub(crate) fn read(payload: &[u8], kind: Payload) -> Result<Self> {
        match kind {
            Payload::Raw => Ok(Self { stamp: Stamp::read(payload)?, seq: None }),
            // Looked for, not parsed: the generator shares the machine with what it measures. Names contain no quotes.
            Payload::Envelope => {
                let seq = behind(payload, b"\"seq\":")?;
                let digits = seq.iter().take_while(|byte| byte.is_ascii_digit()).count();
                let seq_number = std::str::from_utf8(&seq[..digits])?.parse()?;
                Ok(Self { stamp: Stamp::read(behind(seq, b"\"text\":\"")?)?, seq: Some(seq_number) })
            }
        }
    }
}

/// What stands behind the first of these.
pub(crate) fn behind<'a>(payload: &'a [u8], begin: &[u8]) -> Result<&'a [u8]> {
    let first = begin[0];
    let mut at = 0;
    while let Some(found) = payload.get(at..).and_then(|rest| rest.iter().position(|byte| *byte == first)) {
        at += found;
        if payload[at..].starts_with(begin) {
            return Ok(&payload[at + begin.len()..]);
        }
        at += 1;
    }
    anyhow::bail!("no {}", begin.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(counter: u64) -> Vec<u8> {
        let mut text = Vec::new();
        Stamp { stream: 3, counter, due_us: 9 }.write(&mut text, 128);
        assert_eq!(text.len(), 128);
        text
    }

    fn take(received: &mut Received, counter: u64, again: bool, faults: &mut Faults) -> Judged {
        let message = Message::read(&text(counter), Payload::Raw).unwrap();
        received.take(&message, again, faults)
    }

    fn faults(counters: &[u64]) -> Faults {
        let (mut received, mut faults) = (Received::new(Seqs::Consecutive), Faults::default());
        for counter in counters {
            take(&mut received, *counter, false, &mut faults);
        }
        faults
    }

    #[test]
    fn gaps_repeats_and_swaps_are_found() {
        assert!(faults(&[1, 2, 3]).is_none());
        assert_eq!(faults(&[1, 4]), Faults { gaps: 2, ..Faults::default() });
        assert_eq!(faults(&[1, 1]), Faults { repeats: 1, ..Faults::default() });
        assert_eq!(faults(&[2, 1]), Faults { gaps: 1, repeats: 1, ..Faults::default() });
        assert_eq!(faults(&[2]), Faults { gaps: 1, ..Faults::default() });
    }

    #[test]
    fn what_comes_again_after_a_reconnect_is_no_fault_if_it_says_so() {
        let (mut received, mut faults) = (Received::new(Seqs::Consecutive), Faults::default());
        let mut take = |received: &mut Received, counter, again| take(received, counter, again, &mut faults);
        assert!(matches!(take(&mut received, 1, false), Judged::New(_)));
        assert!(matches!(take(&mut received, 2, false), Judged::New(_)));
        assert_eq!(take(&mut received, 2, true), Judged::Fault, "there was no reconnect");
        received.reconnected();
        assert_eq!(take(&mut received, 1, true), Judged::Redelivered);
        assert_eq!(take(&mut received, 2, true), Judged::Redelivered);
        // Sent before, and not received: new, whatever it says.
        assert!(matches!(take(&mut received, 3, true), Judged::New(_)));
        assert_eq!(take(&mut received, 3, false), Judged::Fault);
        assert_eq!(faults, Faults { repeats: 2, ..Faults::default() });
        assert_eq!(faults.sentence(), "2 repeats");
    }

    #[test]
    fn envelopes_are_read_and_their_seqs_judged() {
        let envelope = |counter, seq: u64| {
            let text = String::from_utf8(text(counter)).unwrap();
            format!(r#"{{"v":1,"kind":"text","seq":{seq},"from":"a","text":"{text}"}}"#)
        };
        for (seqs, expected) in [(Seqs::Consecutive, 2), (Seqs::Growing, 1)] {
            let (mut received, mut faults) = (Received::new(seqs), Faults::default());
            for (counter, seq) in [(1, 7), (2, 8), (3, 10), (4, 10)] {
                let message = Message::read(envelope(counter, seq).as_bytes(), Payload::Envelope).unwrap();
                let stamp = Stamp { stream: 3, counter, due_us: 9 };
                assert_eq!(received.take(&message, false, &mut faults), Judged::New(stamp));
            }
            assert_eq!(faults, Faults { seq_gaps: expected, ..Faults::default() }, "{seqs:?}");
            assert_eq!((received.last(), received.last_seq()), (4, 10));
        }
        assert!(Message::read(b"{}", Payload::Envelope).is_err());
        assert!(Message::read(b"hello", Payload::Raw).is_err());
    }

    #[test]
    fn stamps_come_back() {
        for stamp in [
            Stamp { stream: 0, counter: 1, due_us: 0 },
            Stamp { stream: u32::MAX, counter: (1 << 48) - 1, due_us: (1 << 48) - 1 },
            Stamp { stream: 19_999, counter: 1_234_567, due_us: 300_000_000 },
        ] {
            let mut text = Vec::new();
            stamp.write(&mut text, 0);
            assert_eq!(text.len(), STAMP_BYTES);
            assert_eq!(Stamp::read(&text).unwrap(), stamp);
        }
    }
}
