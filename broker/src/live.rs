//! A live message of a bound topic as it crosses the bus.
//!
//! The bus carries bytes only, all under one topic, because rumqttd never forgets one; the topic that subscribers see, the position in the
//! log, the sender's clock and the user properties travel in front of the payload. Malformed bytes are an error here, never a panic: one day the bus is a network.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

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
        let mut encoded = BytesMut::with_capacity(properties.iter().map(|(k, v)| 4 + k.len() + v.len()).sum());
        for (key, value) in properties {
            // A property longer than MQTT can carry is left out; the payload says the same.
            let (Ok(key_len), Ok(value_len)) = (u16::try_from(key.len()), u16::try_from(value.len())) else { continue };
            encoded.put_u16(key_len);
            encoded.put_slice(key.as_bytes());
            encoded.put_u16(value_len);
            encoded.put_slice(value.as_bytes());
        }
        Self {
            topic,
            gathered_by: None,
            position,
            received_us,
            payload,
            properties: encoded.freeze(),
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

    pub(crate) fn encode(&self) -> Bytes {
        let parts = [self.topic.as_bytes(), &self.properties, &self.correlation];
        let parts = parts.map(|part| if u32::try_from(part.len()).is_ok() { part } else { &[] });
        let length = HEADER_BYTES + parts.iter().map(|part| part.len()).sum::<usize>() + self.payload.len();
        let mut bytes = BytesMut::with_capacity(length);
        bytes.put_u64(self.position.0);
        bytes.put_u64(self.received_us);
        bytes.put_u8(self.flags);
        for part in parts {
            bytes.put_u32(u32::try_from(part.len()).unwrap_or(0));
        }
        parts.into_iter().for_each(|part| bytes.put_slice(part));
        bytes.put_slice(&self.payload);
        bytes.freeze()
    }

    pub(crate) fn decode(bytes: &Bytes) -> Option<Self> {
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
        Some(Self {
            topic: std::str::from_utf8(&bytes[HEADER_BYTES..properties_at]).ok()?.into(),
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
        let decoded = LiveMessage::decode(&message.encode()).expect("own encoding");
        assert_eq!(decoded, message);
        assert_eq!(decoded.properties().collect::<Vec<_>>(), [("seq", "1"), ("from", "alice")]);
        assert!(decoded.is_retained() && !decoded.is_at_most_once());
    }

    #[test]
    fn cut_bytes_are_no_message() {
        let whole = LiveMessage::new("t".into(), Position(1), 0, Bytes::from_static(b"x"), &[("a", "b")]).encode();
        for len in 0..HEADER_BYTES {
            assert!(LiveMessage::decode(&whole.slice(..len)).is_none());
        }
        for at in [17, 21, 25] {
            let mut lying = whole.to_vec();
            lying[at..at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
            assert!(LiveMessage::decode(&Bytes::from(lying)).is_none());
        }
        let mut not_text = whole.to_vec();
        not_text[HEADER_BYTES] = 0xff;
        assert!(LiveMessage::decode(&Bytes::from(not_text)).is_none());
    }
}
