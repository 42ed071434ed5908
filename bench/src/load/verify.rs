//! What a receiver has to get: every message of its pair, once, in order. And how a message says which it is.

use anyhow::{Context, Result};
use serde::Serialize;

/// Bytes of a text's counter and time, in hexadecimal digits.
pub(crate) const STAMP_BYTES: usize = 32;

/// Which message of a pair this is, counted from 1, and when it was due, in microseconds since the run began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) counter: u64,
    pub(crate) due_us: u64,
}

impl Stamp {
    /// Writes a text of so many bytes, at least [`STAMP_BYTES`].
    pub(crate) fn write(self, text: &mut Vec<u8>, bytes: usize) {
        text.clear();
        text.extend_from_slice(format!("{:016x}{:016x}", self.counter, self.due_us).as_bytes());
        text.resize(bytes.max(STAMP_BYTES), b'x');
    }

    fn read(text: &[u8]) -> Result<Self> {
        let digits = std::str::from_utf8(text.get(..STAMP_BYTES).context("a text is cut short")?)?;
        let (counter, due_us) = digits.split_at(STAMP_BYTES / 2);
        Ok(Self { counter: u64::from_str_radix(counter, 16)?, due_us: u64::from_str_radix(due_us, 16)? })
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

/// What went wrong in all pairs together; all zero if nothing did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Faults {
    /// Messages that were skipped when a later one came.
    pub(crate) gaps: u64,
    /// Messages that came again, or after a later one.
    pub(crate) repeats: u64,
    /// Envelopes whose seq does not follow the one before.
    pub(crate) seq_gaps: u64,
    /// Payloads that are none of ours.
    pub(crate) unreadable: u64,
    /// Sent and never delivered.
    pub(crate) lost: u64,
    /// Sent and never acknowledged.
    pub(crate) unacknowledged: u64,
}

impl Faults {
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// What one receiver has had.
#[derive(Debug, Default)]
pub(crate) struct Received {
    last: u64,
    last_seq: Option<u64>,
}

impl Received {
    /// Judges a message; its stamp if it is a new one.
    pub(crate) fn take(&mut self, payload: &[u8], kind: Payload, faults: &mut Faults) -> Option<Stamp> {
        let Ok((stamp, seq)) = read(payload, kind) else {
            faults.unreadable += 1;
            return None;
        };
        if let Some(seq) = seq {
            faults.seq_gaps += u64::from(self.last_seq.is_some_and(|last| seq != last + 1));
            self.last_seq = Some(seq);
        }
        if stamp.counter <= self.last {
            faults.repeats += 1;
            return None;
        }
        faults.gaps += stamp.counter - self.last - 1;
        self.last = stamp.counter;
        Some(stamp)
    }
}

fn read(payload: &[u8], kind: Payload) -> Result<(Stamp, Option<u64>)> {
    match kind {
        Payload::Raw => Ok((Stamp::read(payload)?, None)),
        // Looked for, not parsed: the generator shares the machine with what it measures. Names contain no quotes.
        Payload::Envelope => {
            let seq = behind(payload, b"\"seq\":")?;
            let digits = seq.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let seq = std::str::from_utf8(&seq[..digits])?.parse()?;
            Ok((Stamp::read(behind(payload, b"\"text\":\"")?)?, Some(seq)))
        }
    }
}

fn behind<'a>(payload: &'a [u8], begin: &[u8]) -> Result<&'a [u8]> {
    let at = payload.windows(begin.len()).position(|window| window == begin);
    let at = at.with_context(|| format!("no {}", begin.escape_ascii()))?;
    Ok(&payload[at + begin.len()..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(counter: u64) -> Vec<u8> {
        let mut text = Vec::new();
        Stamp { counter, due_us: 9 }.write(&mut text, 128);
        assert_eq!(text.len(), 128);
        text
    }

    fn faults(counters: &[u64]) -> Faults {
        let (mut received, mut faults) = (Received::default(), Faults::default());
        for counter in counters {
            received.take(&text(*counter), Payload::Raw, &mut faults);
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
    fn envelopes_are_read_and_their_seqs_judged() {
        let (mut received, mut faults) = (Received::default(), Faults::default());
        for (counter, seq) in [(1, 7), (2, 8), (3, 10)] {
            let text = String::from_utf8(text(counter)).unwrap();
            let envelope = format!(r#"{{"v":1,"kind":"text","seq":{seq},"from":"a","text":"{text}"}}"#);
            let stamp = received.take(envelope.as_bytes(), Payload::Envelope, &mut faults);
            assert_eq!(stamp, Some(Stamp { counter, due_us: 9 }));
        }
        assert_eq!(faults, Faults { seq_gaps: 1, ..Faults::default() });
        received.take(b"{}", Payload::Envelope, &mut faults);
        assert_eq!(faults.unreadable, 1);
    }
}
