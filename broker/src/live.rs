//! A live message of a bound topic as it crosses the bus.
//!
//! The bus carries bytes only, all under one topic, because rumqttd never forgets one; the topic that subscribers see, the position in the
//! log, the sender's clock and the user properties travel in front of the payload. Malformed bytes are an error here, never a panic: one day the bus is a network.

use std::sync::Arc;

use bytes::{BufMut, Bytes};

use crate::bus::Frame;
use crate::service::{Keeping, Position};

/// A message of a bound topic, live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveMessage {
    /// The topic that subscribers see.
    pub topic: Arc<str>,
    /// The bound topic, if it is another: one that gathers the messages of many.
    gathered_by: Option<Arc<str>>,
    /// Where it stands in the log, or 0 for a topic that is not kept.
    pub position: Position,
    /// When the sender's PUBLISH was read, in microseconds since the process began; 0 if unknown.
    pub received_us: u64,
    /// The application message.
    pub payload: Bytes,
    /// Encoded MQTT 5 user properties; see [`LiveMessage::properties`].
    properties: Bytes,
    /// MQTT 5 correlation data.
    correlation: Bytes,
    flags: u8,
}

/// It tells a state that was there before: RETAIN=1.
const RETAIN: u8 = 1;
/// At QoS 0, whatever was granted.
const AT_MOST_ONCE: u8 = 2;
/// Earlier messages of its topic are not what they were.
const CHANGES_EARLIER: u8 = 4;
/// It answers a request.
const ANSWER: u8 = 8;
/// Bytes of what comes before the topic, the properties and the correlation data.
const HEADER_BYTES: usize = 8 + 8 + 1 + 4 + 4 + 4;

impl LiveMessage {
    /// A message with user properties.
    pub fn new(
        topic: Arc<str>,
        position: Position,
        received_us: u64,
        payload: Bytes,
        properties: &[(&str, &str)],
    ) -> Self {
        let mut encoded = Vec::with_capacity(properties.iter().map(|(k, v)| 4 + k.len() + v.len()).sum());
        properties.iter().for_each(|property| put_property(&mut encoded, property));
        Self {
            topic,
            gathered_by: None,
            position,
            received_us,
            payload,
            properties: encoded.into(),
            correlation: Bytes::new(),
            flags: 0,
        }
    }

    /// A message that no log has, without user properties.
    pub fn event(topic: Arc<str>, payload: impl Into<Bytes>) -> Self {
        Self::new(topic, Position(0), 0, payload.into(), &[])
    }

    /// With MQTT 5 correlation data, which may be empty: then there is none.
    #[must_use]
    pub fn with_correlation(mut self, correlation: Bytes) -> Self {
        self.correlation = correlation;
        self
    }

    /// It tells a state that was there before whoever gets it: RETAIN=1.
    #[must_use]
    pub fn retained(mut self) -> Self {
        self.flags |= RETAIN;
        self
    }

    /// Sent at QoS 0, whatever was granted.
    #[must_use]
    pub fn at_most_once(mut self) -> Self {
        self.flags |= AT_MOST_ONCE;
        self
    }

    /// It answers a request that was taken while [`crate::Announcer::takes_answers`]: there is room for it.
    #[must_use]
    pub fn answering(mut self) -> Self {
        self.flags |= ANSWER;
        self
    }

    pub(crate) fn is_answer(&self) -> bool {
        self.flags & ANSWER != 0
    }

    /// With it earlier messages of its topic have changed in the log: whoever was not sent them yet gets them as they are now.
    #[must_use]
    pub fn changing_earlier(mut self) -> Self {
        self.flags |= CHANGES_EARLIER;
        self
    }

    pub(crate) fn changes_earlier(&self) -> bool {
        self.flags & CHANGES_EARLIER != 0
    }

    /// The same for the subscribers of a bound topic that gathers it.
    pub(crate) fn gathered(&self, by: &Arc<str>) -> Self {
        Self { gathered_by: Some(Arc::clone(by)), ..self.clone() }
    }

    /// The name of the bound topic that it is delivered for.
    pub(crate) fn bound_topic(&self) -> &str {
        self.gathered_by.as_deref().unwrap_or(&self.topic)
    }

    pub(crate) fn correlation(&self) -> &Bytes {
        &self.correlation
    }

    pub(crate) fn is_retained(&self) -> bool {
        self.flags & RETAIN != 0
    }

    pub(crate) fn is_at_most_once(&self) -> bool {
        self.flags & AT_MOST_ONCE != 0
    }

    /// Whether a log stands behind it.
    pub fn keeping(&self) -> Keeping {
        if self.position == Position(0) { Keeping::Live } else { Keeping::Durable }
    }

    /// The user properties, in order.
    pub fn properties(&self) -> impl Iterator<Item = (&str, &str)> {
        PropertyIter { rest: &self.properties }
    }

    pub(crate) fn encode(&self) -> Frame {
        let Self { topic, position, received_us, payload, properties, correlation, flags, .. } = self;
        frame(topic, *position, *received_us, *flags, properties.len(), correlation, payload, |out| {
            out.extend_from_slice(properties);
        })
    }

    /// Its topic is the one of the message `before` itself, if it is the same.
    pub(crate) fn decode(bytes: &Bytes, before: Option<&Arc<str>>) -> Option<Self> {
        let position = u64::from_be_bytes(bytes.get(0..8)?.try_into().ok()?);
        let received_us = u64::from_be_bytes(bytes.get(8..16)?.try_into().ok()?);
        let flags = *bytes.get(16)?;
        let length =
            |at: std::ops::Range<usize>| usize::try_from(u32::from_be_bytes(bytes.get(at)?.try_into().ok()?)).ok();
        let properties_at = HEADER_BYTES.checked_add(length(17..21)?)?;
        let correlation_at = properties_at.checked_add(length(21..25)?)?;
        let payload_at = correlation_at.checked_add(length(25..29)?)?;
        if payload_at > bytes.len() {
            return None;
        }
        let topic = &bytes[HEADER_BYTES..properties_at];
        Some(Self {
            topic: match before {
                Some(before) if before.as_bytes() == topic => Arc::clone(before),
                _ => std::str::from_utf8(topic).ok()?.into(),
            },
            gathered_by: None,
            position: Position(position),
            received_us,
            payload: bytes.slice(payload_at..),
            properties: bytes.slice(properties_at..correlation_at),
            correlation: bytes.slice(correlation_at..payload_at),
            flags,
        })
    }
}

/// A message of a durable topic, written once: what [`LiveMessage::new`] makes, and [`LiveMessage::changing_earlier`] where it does.
pub fn encode(
    topic: &str,
    position: Position,
    received_us: u64,
    payload: &[u8],
    properties: &[(&str, &str)],
    changes_earlier: bool,
) -> Frame {
    let flags = if changes_earlier { CHANGES_EARLIER } else { 0 };
    let properties_bytes = properties.iter().filter_map(property_lengths).map(|(key, value)| 4 + key.1 + value.1).sum();
    frame(topic, position, received_us, flags, properties_bytes, &[], payload, |out| {
        properties.iter().for_each(|property| put_property(out, property));
    })
}

/// Lengths of key and value, as they are written and as numbers. `None` for one that is longer than MQTT can carry: it is left out, the
/// payload says the same.
fn property_lengths((key, value): &(&str, &str)) -> Option<((u16, usize), (u16, usize))> {
    let length = |text: &str| u16::try_from(text.len()).ok().map(|length| (length, text.len()));
    Some((length(key)?, length(value)?))
}

fn put_property(out: &mut Vec<u8>, property: &(&str, &str)) {
    let Some(((key_length, _), (value_length, _))) = property_lengths(property) else { return };
    out.put_u16(key_length);
    out.put_slice(property.0.as_bytes());
    out.put_u16(value_length);
    out.put_slice(property.1.as_bytes());
}

#[expect(clippy::too_many_arguments, reason = "the parts of a message, each written once")]
fn frame(
    topic: &str,
    position: Position,
    received_us: u64,
    flags: u8,
    properties_bytes: usize,
    correlation: &[u8],
    payload: &[u8],
    put_properties: impl FnOnce(&mut Vec<u8>),
) -> Frame {
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    let mut frame =
        Frame::with_capacity(HEADER_BYTES + topic.len() + properties_bytes + correlation.len() + payload.len());
    let out = frame.payload();
    out.put_u64(position.0);
    out.put_u64(received_us);
    out.put_u8(flags);
    for bytes in [topic.len(), properties_bytes, correlation.len()] {
        // What is as long as that cannot come from a packet; the reader finds that it is malformed.
        out.put_u32(length(bytes));
    }
    out.put_slice(topic.as_bytes());
    put_properties(out);
    out.put_slice(correlation);
    out.put_slice(payload);
    frame
}

struct PropertyIter<'a> {
    rest: &'a [u8],
}

impl<'a> PropertyIter<'a> {
    fn string(&mut self) -> Option<&'a str> {
        let (len, rest) = self.rest.split_first_chunk::<2>()?;
        let len = usize::from(u16::from_be_bytes(*len));
        let (string, rest) = rest.split_at_checked(len)?;
        self.rest = rest;
        std::str::from_utf8(string).ok()
    }
}

impl<'a> Iterator for PropertyIter<'a> {
    type Item = (&'a str, &'a str);

    fn next(&mut self) -> Option<Self::Item> {
        Some((self.string()?, self.string()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the bus hands it over.
    fn carried(frame: Frame) -> Bytes {
        frame.into_payload()
    }

    #[test]
    fn what_is_written_at_once_is_the_same_message() {
        let long = "x".repeat(65_536);
        let properties = [("seq", "1"), ("too long", &*long), ("from", "alice")];
        for changes_earlier in [false, true] {
            let payload = Bytes::from_static(b"{}");
            let message = LiveMessage::new("chat/bob/inbox".into(), Position(7), 42, payload.clone(), &properties);
            let message = if changes_earlier { message.changing_earlier() } else { message };
            let encoded = carried(encode("chat/bob/inbox", Position(7), 42, &payload, &properties, changes_earlier));
            assert_eq!(encoded, carried(message.encode()));
            assert_eq!(LiveMessage::decode(&encoded, None), Some(message));
        }
    }

    #[test]
    fn a_message_survives_the_bus() {
        let message = LiveMessage::new(
            "chat/bob/inbox".into(),
            Position(7),
            42,
            Bytes::from_static(b"{}"),
            &[("seq", "1"), ("from", "alice")],
        )
        .with_correlation(Bytes::from_static(&[0, 255]))
        .retained();
        let decoded = LiveMessage::decode(&carried(message.encode()), None).expect("own encoding");
        assert_eq!(decoded, message);
        assert_eq!(decoded.properties().collect::<Vec<_>>(), [("seq", "1"), ("from", "alice")]);
        assert!(decoded.is_retained() && !decoded.is_at_most_once());
    }

    #[test]
    fn cut_bytes_are_no_message() {
        let whole = LiveMessage::new("t".into(), Position(1), 0, Bytes::from_static(b"x"), &[("a", "b")]);
        let whole = carried(whole.encode());
        for len in 0..HEADER_BYTES {
            assert!(LiveMessage::decode(&whole.slice(..len), None).is_none());
        }
        for at in [17, 21, 25] {
            let mut lying = whole.to_vec();
            lying[at..at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
            assert!(LiveMessage::decode(&Bytes::from(lying), None).is_none());
        }
        let mut not_text = whole.to_vec();
        not_text[HEADER_BYTES] = 0xff;
        assert!(LiveMessage::decode(&Bytes::from(not_text), None).is_none());
    }
}
