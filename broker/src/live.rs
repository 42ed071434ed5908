//! A live message of a bound topic as it crosses the bus.
//!
//! The bus carries topic and bytes only; the position in the log, the sender's clock and the user properties travel in front of
//! the payload. Malformed bytes are an error here, never a panic: one day the bus is a network.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use crate::service::{Keeping, Position};

/// A message of a bound topic, live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveMessage {
    /// The bound topic.
    pub topic: Arc<str>,
    /// Where it stands in the log, or 0 for a topic that is not kept.
    pub position: Position,
    /// When the sender's PUBLISH was read, in microseconds since the process began; 0 if unknown.
    pub received_us: u64,
    /// The application message.
    pub payload: Bytes,
    /// Encoded MQTT 5 user properties; see [`LiveMessage::properties`].
    properties: Bytes,
}

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
        Self { topic, position, received_us, payload, properties: encoded.freeze() }
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
        let mut bytes = BytesMut::with_capacity(20 + self.properties.len() + self.payload.len());
        bytes.put_u64(self.position.0);
        bytes.put_u64(self.received_us);
        let properties = u32::try_from(self.properties.len()).unwrap_or(0);
        bytes.put_u32(properties);
        if properties != 0 {
            bytes.put_slice(&self.properties);
        }
        bytes.put_slice(&self.payload);
        bytes.freeze()
    }

    pub(crate) fn decode(topic: Arc<str>, bytes: &Bytes) -> Option<Self> {
        let position = u64::from_be_bytes(bytes.get(0..8)?.try_into().ok()?);
        let received_us = u64::from_be_bytes(bytes.get(8..16)?.try_into().ok()?);
        let properties_len = usize::try_from(u32::from_be_bytes(bytes.get(16..20)?.try_into().ok()?)).ok()?;
        let payload_at = 20usize.checked_add(properties_len)?;
        if payload_at > bytes.len() {
            return None;
        }
        Some(Self {
            topic,
            position: Position(position),
            received_us,
            payload: bytes.slice(payload_at..),
            properties: bytes.slice(20..payload_at),
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
        );
        let decoded = LiveMessage::decode("chat/bob/inbox".into(), &message.encode()).expect("own encoding");
        assert_eq!(decoded, message);
        assert_eq!(decoded.properties().collect::<Vec<_>>(), [("seq", "1"), ("from", "alice")]);
    }

    #[test]
    fn cut_bytes_are_no_message() {
        let whole = LiveMessage::new("t".into(), Position(1), 0, Bytes::from_static(b"x"), &[("a", "b")]).encode();
        for len in 0..20 {
            assert!(LiveMessage::decode("t".into(), &whole.slice(..len)).is_none());
        }
        let mut lying = whole.to_vec();
        lying[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(LiveMessage::decode("t".into(), &Bytes::from(lying)).is_none());
    }
}
