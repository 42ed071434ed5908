//! The text of a message: which message of which pair of which run it is, and when it was to be sent.
//!
//! `{counter:016x}{micros:016x}{pair:08x}{run:08x}` and then `x` up to the wanted size. Fixed places, so that a packet is stamped
//! and read without building or parsing anything.

pub(crate) const STAMP_BYTES: usize = 48;
const COUNTER_AT: usize = 0;
const MICROS_AT: usize = 16;
const PAIR_AT: usize = 32;
const RUN_AT: usize = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) counter: u64,
    /// When it was sent, or in an open run when it was due: on the generator's clock.
    pub(crate) micros: u64,
    pub(crate) pair: u32,
    pub(crate) run: u32,
}

/// A text of `bytes` bytes that is yet to be stamped with counter and time.
pub(crate) fn blank(pair: u32, run: u32, bytes: usize) -> Vec<u8> {
    let mut text = vec![b'x'; bytes.max(STAMP_BYTES)];
    stamp(&mut text, 0, 0);
    write_hex(&mut text[PAIR_AT..RUN_AT], pair.into());
    write_hex(&mut text[RUN_AT..STAMP_BYTES], run.into());
    text
}

pub(crate) fn stamp(text: &mut [u8], counter: u64, micros: u64) {
    write_hex(&mut text[COUNTER_AT..MICROS_AT], counter);
    write_hex(&mut text[MICROS_AT..PAIR_AT], micros);
}

pub(crate) fn read(text: &[u8]) -> Option<Stamp> {
    Some(Stamp {
        counter: read_hex(text.get(COUNTER_AT..MICROS_AT)?)?,
        micros: read_hex(text.get(MICROS_AT..PAIR_AT)?)?,
        pair: read_hex(text.get(PAIR_AT..RUN_AT)?)?.try_into().ok()?,
        run: read_hex(text.get(RUN_AT..STAMP_BYTES)?)?.try_into().ok()?,
    })
}

fn write_hex(place: &mut [u8], value: u64) {
    let mut rest = value;
    for digit in place.iter_mut().rev() {
        *digit = b"0123456789abcdef"[usize::from(rest.to_le_bytes()[0] & 0xF)];
        rest >>= 4;
    }
}

fn read_hex(digits: &[u8]) -> Option<u64> {
    let mut value = 0;
    for digit in digits {
        let four = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        value = value << 4 | u64::from(four);
    }
    Some(value)
}

/// What a delivery carries: the text itself, or chatd's envelope around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Form {
    /// `{"v":1,…,"seq":17,…,"text":"<the text>"}`
    Envelope,
    /// The bytes as they were published.
    Raw,
}

/// Finds text and seq in deliveries of one stream.
///
/// JSON is not parsed: our text has nothing to escape, and members of an envelope stay where they were in the one before, so the
/// place of the last time is tried first.
#[derive(Debug)]
pub(crate) struct Opener {
    form: Form,
    text_bytes: usize,
    seq_at: usize,
    text_at: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Opened<'a> {
    pub(crate) text: &'a [u8],
    /// In an envelope.
    pub(crate) seq: Option<u64>,
}

impl Opener {
    pub(crate) fn new(form: Form, text_bytes: usize) -> Self {
        Self { form, text_bytes, seq_at: 0, text_at: 0 }
    }

    pub(crate) fn open<'a>(&mut self, delivery: &'a [u8]) -> Option<Opened<'a>> {
        if self.form == Form::Raw {
            return (delivery.len() == self.text_bytes).then_some(Opened { text: delivery, seq: None });
        }
        let seq = find(delivery, b"\"seq\":", &mut self.seq_at)?;
        let digits = delivery[seq..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let seq = std::str::from_utf8(&delivery[seq..seq + digits]).ok()?.parse().ok()?;
        let begins = find(delivery, b"\"text\":\"", &mut self.text_at)?;
        let text = delivery.get(begins..begins + self.text_bytes)?;
        (delivery.get(begins + self.text_bytes) == Some(&b'"')).then_some(Opened { text, seq: Some(seq) })
    }
}

/// Where what follows `needle` begins.
fn find(bytes: &[u8], needle: &[u8], hint: &mut usize) -> Option<usize> {
    if !bytes.get(*hint..).is_some_and(|rest| rest.starts_with(needle)) {
        *hint = bytes.windows(needle.len()).position(|window| window == needle)?;
    }
    Some(*hint + needle.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(seq: u64, text: &str) -> Vec<u8> {
        format!(r#"{{"v":1,"kind":"text","conversation":"a:b","seq":{seq},"from":"a","to":"b","at":1,"text":"{text}"}}"#)
            .into_bytes()
    }

    #[test]
    fn a_stamp_is_read_as_it_was_written() {
        for (counter, micros, pair, run) in [(1, 2, 3, 4), (u64::MAX, u64::MAX, u32::MAX, u32::MAX), (0, 0, 0, 0)] {
            let mut text = blank(pair, run, 128);
            stamp(&mut text, counter, micros);
            assert_eq!(text.len(), 128);
            assert!(text.is_ascii());
            assert_eq!(read(&text), Some(Stamp { counter, micros, pair, run }));
        }
        assert_eq!(read(&[b'x'; 128]), None);
        assert_eq!(read(&[b'0'; 47]), None);
    }

    #[test]
    fn a_raw_delivery_is_the_text() {
        let mut opener = Opener::new(Form::Raw, 4);
        assert_eq!(opener.open(b"text"), Some(Opened { text: b"text", seq: None }));
        assert_eq!(opener.open(b"tex"), None);
    }

    #[test]
    fn an_envelope_is_opened_wherever_its_members_are() {
        let mut opener = Opener::new(Form::Envelope, 4);
        for seq in [9, 10, 7, 1_000_000] {
            assert_eq!(opener.open(&envelope(seq, "text")), Some(Opened { text: b"text", seq: Some(seq) }));
        }
        assert_eq!(opener.open(br#"{"text":"text","seq":5}"#), Some(Opened { text: b"text", seq: Some(5) }));
    }

    #[test]
    fn what_is_no_envelope_of_ours_is_not_opened() {
        let mut opener = Opener::new(Form::Envelope, 4);
        for wrong in [&b"text"[..], b"", br#"{"seq":1}"#, br#"{"seq":x,"text":"text"}"#, br#"{"seq":1,"text":"text"#] {
            assert_eq!(opener.open(wrong), None);
        }
        assert_eq!(opener.open(&envelope(1, "longer")), None);
        assert_eq!(opener.open(&envelope(1, "tex")), None);
    }
}
