//! An ordinary message, and how it is packed to cross its router under one topic.
//!
//! Packing is ours alone: nothing of it is stored or leaves the process. Unpacking takes any bytes without a panic and without
//! allocating more than they could fill, because one day the bus is a network. Invariant: `decode(encode(m)) == m`.

use std::sync::Arc;
use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};

const QOS: u8 = 0b0000_0011;
const RETAIN: u8 = 0b0000_0100;
const PAYLOAD_FORMAT: u8 = 0b0000_1000;
const PAYLOAD_FORMAT_UTF8: u8 = 0b0001_0000;
const MESSAGE_EXPIRY: u8 = 0b0010_0000;
const CONTENT_TYPE: u8 = 0b0100_0000;
const RESPONSE_TOPIC: u8 = 0b1000_0000;

const CORRELATION: u8 = 0b0000_0001;

/// A user property is two lengths at least; bounds what is allocated for a number of them that is a lie.
const USER_PROPERTY_BYTES_MIN: usize = 2;

/// A message on a topic that the service gives no meaning to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Topic name, any characters.
    pub topic: Arc<str>,
    /// Application message.
    pub payload: Bytes,
    /// 0, 1 or 2, as published.
    pub qos: u8,
    /// Whether it was published with RETAIN.
    pub retain: bool,
    /// Number of the connection that published it, for No Local.
    pub publisher: u64,
    /// Counts ordinary messages in the order in which they were taken: a subscription gets those taken after it.
    pub number: u64,
    /// What MQTT 5 hands on to receivers unchanged.
    pub properties: MessageProperties,
}

/// PUBLISH properties of MQTT 5 that belong to the message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MessageProperties {
    /// Payload format indicator: `Some(true)` for UTF-8, `Some(false)` for unspecified bytes.
    pub payload_format_utf8: Option<bool>,
    /// Message expiry interval in seconds, as published.
    pub message_expiry_interval_s: Option<u32>,
    /// Content type.
    pub content_type: Option<String>,
    /// Response topic.
    pub response_topic: Option<String>,
    /// Correlation data.
    pub correlation_data: Option<Bytes>,
    /// User properties in their order, with repetitions.
    pub user_properties: Vec<(String, String)>,
}

/// These bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// They end too early.
    #[error("the message is cut off")]
    Cut,
    /// A length is larger than what follows could be.
    #[error("a length in the message is out of bounds")]
    Length,
    /// A text is not UTF-8.
    #[error("a text in the message is not UTF-8")]
    NotUtf8,
    /// Bits that this version does not know, or QoS 3.
    #[error("the message has unknown flags")]
    Flags,
}

/// What is left of a message's expiry interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// It has none.
    Never,
    /// So many seconds.
    Left(u32),
    /// Nothing: it is not delivered any more [MQTT-3.3.2-5].
    Over,
}

impl MessageProperties {
    /// Bytes of their content.
    pub fn bytes(&self) -> usize {
        self.content_type.as_ref().map_or(0, String::len)
            + self.response_topic.as_ref().map_or(0, String::len)
            + self.correlation_data.as_ref().map_or(0, Bytes::len)
            + self.user_properties.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>()
    }
}

impl Message {
    /// What is left now, if it was published at `since`.
    pub fn expiry(&self, since: Instant, now: Instant) -> Expiry {
        let Some(interval_s) = self.properties.message_expiry_interval_s else { return Expiry::Never };
        let waited_s = now.saturating_duration_since(since).as_secs();
        let left_s = u64::from(interval_s).saturating_sub(waited_s);
        match u32::try_from(left_s) {
            Ok(left_s) if left_s > 0 => Expiry::Left(left_s),
            _ => Expiry::Over,
        }
    }

    /// Packs it: flags, publisher, topic, properties, then the payload to the end. QoS above 2 becomes 2.
    pub fn encode(&self) -> Bytes {
        let properties = &self.properties;
        let mut flags = self.qos.min(2);
        if self.retain {
            flags |= RETAIN;
        }
        if let Some(utf8) = properties.payload_format_utf8 {
            flags |= PAYLOAD_FORMAT;
            if utf8 {
                flags |= PAYLOAD_FORMAT_UTF8;
            }
        }
        if properties.message_expiry_interval_s.is_some() {
            flags |= MESSAGE_EXPIRY;
        }
        if properties.content_type.is_some() {
            flags |= CONTENT_TYPE;
        }
        if properties.response_topic.is_some() {
            flags |= RESPONSE_TOPIC;
        }
        let more_flags = if properties.correlation_data.is_some() { CORRELATION } else { 0 };

        let lengths = 3 * (5 + 2 * properties.user_properties.len());
        let mut bytes =
            BytesMut::with_capacity(22 + lengths + self.topic.len() + properties.bytes() + self.payload.len());
        bytes.put_u8(flags);
        bytes.put_u8(more_flags);
        bytes.put_u64(self.publisher);
        bytes.put_u64(self.number);
        put_bytes(&mut bytes, self.topic.as_bytes());
        if let Some(expiry_s) = properties.message_expiry_interval_s {
            bytes.put_u32(expiry_s);
        }
        if let Some(content_type) = &properties.content_type {
            put_bytes(&mut bytes, content_type.as_bytes());
        }
        if let Some(response_topic) = &properties.response_topic {
            put_bytes(&mut bytes, response_topic.as_bytes());
        }
        if let Some(correlation) = &properties.correlation_data {
            put_bytes(&mut bytes, correlation);
        }
        put_length(&mut bytes, properties.user_properties.len());
        for (key, value) in &properties.user_properties {
            put_bytes(&mut bytes, key.as_bytes());
            put_bytes(&mut bytes, value.as_bytes());
        }
        bytes.put_slice(&self.payload);
        bytes.freeze()
    }

    /// Unpacks it. Payload and correlation data share the given bytes.
    pub fn decode(bytes: Bytes) -> Result<Self, MessageError> {
        let mut rest = Unpacking(bytes);
        let [flags, more_flags] = rest.array::<2>()?;
        let publisher = u64::from_be_bytes(rest.array()?);
        let number = u64::from_be_bytes(rest.array()?);
        let qos = flags & QOS;
        let format = (flags & PAYLOAD_FORMAT != 0).then_some(flags & PAYLOAD_FORMAT_UTF8 != 0);
        if qos > 2 || more_flags & !CORRELATION != 0 || (format.is_none() && flags & PAYLOAD_FORMAT_UTF8 != 0) {
            return Err(MessageError::Flags);
        }
        let topic = Arc::from(rest.text()?.as_ref());
        let mut properties = MessageProperties { payload_format_utf8: format, ..MessageProperties::default() };
        if flags & MESSAGE_EXPIRY != 0 {
            properties.message_expiry_interval_s = Some(u32::from_be_bytes(rest.array()?));
        }
        if flags & CONTENT_TYPE != 0 {
            properties.content_type = Some(rest.text()?.into());
        }
        if flags & RESPONSE_TOPIC != 0 {
            properties.response_topic = Some(rest.text()?.into());
        }
        if more_flags & CORRELATION != 0 {
            properties.correlation_data = Some(rest.bytes()?);
        }
        let user_properties = rest.length()?;
        if user_properties > rest.0.len() / USER_PROPERTY_BYTES_MIN {
            return Err(MessageError::Length);
        }
        for _ in 0..user_properties {
            properties.user_properties.push((rest.text()?.into(), rest.text()?.into()));
        }
        Ok(Self { topic, payload: rest.0, qos, retain: flags & RETAIN != 0, publisher, number, properties })
    }
}

fn put_bytes(to: &mut BytesMut, bytes: &[u8]) {
    put_length(to, bytes.len());
    to.put_slice(bytes);
}

/// Seven bits a byte, lowest first, the top bit set where another follows.
fn put_length(to: &mut BytesMut, mut length: usize) {
    while length >= 0x80 {
        to.put_u8(length.to_le_bytes()[0] | 0x80);
        length >>= 7;
    }
    to.put_u8(length.to_le_bytes()[0]);
}

struct Unpacking(Bytes);

impl Unpacking {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let array = *self.0.first_chunk::<N>().ok_or(MessageError::Cut)?;
        self.0 = self.0.slice(N..);
        Ok(array)
    }

    fn length(&mut self) -> Result<usize, MessageError> {
        let mut length = 0usize;
        // Four bytes say 256 MiB, more than an MQTT packet holds; five are taken to be generous and cannot overflow 64 bits.
        for shift in [0, 7, 14, 21, 28] {
            let [byte] = self.array::<1>()?;
            let part = usize::from(byte & 0x7f).checked_shl(shift).ok_or(MessageError::Length)?;
            length |= part;
            if byte & 0x80 == 0 {
                return Ok(length);
            }
        }
        Err(MessageError::Length)
    }

    fn bytes(&mut self) -> Result<Bytes, MessageError> {
        let length = self.length()?;
        if length > self.0.len() {
            return Err(MessageError::Length);
        }
        Ok(self.0.split_to(length))
    }

    fn text(&mut self) -> Result<Box<str>, MessageError> {
        let bytes = self.bytes()?;
        std::str::from_utf8(&bytes).map(Box::from).map_err(|_error| MessageError::NotUtf8)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    fn properties() -> impl Strategy<Value = MessageProperties> {
        (
            option::of(any::<bool>()),
            option::of(any::<u32>()),
            option::of(".{0,200}"),
            option::of(".{0,20}"),
            option::of(vec(any::<u8>(), 0..40)),
            vec((".{0,20}", ".{0,20}"), 0..4),
        )
            .prop_map(|(format, expiry, content_type, response_topic, correlation, user_properties)| {
                MessageProperties {
                    payload_format_utf8: format,
                    message_expiry_interval_s: expiry,
                    content_type,
                    response_topic,
                    correlation_data: correlation.map(Bytes::from),
                    user_properties,
                }
            })
    }

    fn message() -> impl Strategy<Value = Message> {
        (".{0,300}", vec(any::<u8>(), 0..300), 0u8..=2, any::<bool>(), any::<u64>(), properties()).prop_map(
            |(topic, payload, qos, retain, publisher, properties)| Message {
                number: publisher.rotate_left(7),
                topic: topic.into(),
                payload: payload.into(),
                qos,
                retain,
                publisher,
                properties,
            },
        )
    }

    #[test]
    fn the_largest_strings_pass() {
        let long = "ä".repeat(32_767);
        let message = Message {
            topic: long.as_str().into(),
            payload: Bytes::from(vec![7; 1 << 20]),
            qos: 2,
            retain: true,
            publisher: u64::MAX,
            number: u64::MAX,
            properties: MessageProperties {
                response_topic: Some(long.clone()),
                user_properties: vec![(long.clone(), long)],
                ..MessageProperties::default()
            },
        };
        assert_eq!(Message::decode(message.encode()), Ok(message));
    }

    #[test]
    fn lies_about_lengths_are_refused() {
        let mut bytes = vec![0; 18];
        bytes.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0x01]);
        assert_eq!(Message::decode(bytes.into()), Err(MessageError::Length));
        let mut bytes = vec![0; 19];
        bytes.extend([0xff, 0xff, 0xff, 0xff, 0x7f]);
        assert_eq!(Message::decode(bytes.into()), Err(MessageError::Length), "user properties without end");
    }

    proptest! {
        #[test]
        fn a_message_survives(message in message()) {
            prop_assert_eq!(Message::decode(message.encode()), Ok(message));
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in vec(any::<u8>(), 0..200)) {
            if let Ok(message) = Message::decode(bytes.into()) {
                prop_assert_eq!(Message::decode(message.encode()), Ok(message));
            }
        }

        #[test]
        fn a_damaged_message_never_panics(message in message(), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
            let mut bytes = message.encode().to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(cut.index(bytes.len() + 1));
            if let Ok(message) = Message::decode(bytes.into()) {
                prop_assert_eq!(Message::decode(message.encode()), Ok(message));
            }
        }
    }
}
