//! An ordinary message, and its bytes on the bus.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// MQTT 5 properties that travel with a message to its receivers, unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MessageProperties {
    /// Payload format indicator: UTF-8 or not.
    pub payload_format_utf8: Option<bool>,
    /// In seconds.
    pub message_expiry_interval_s: Option<u32>,
    /// Content type.
    pub content_type: Option<String>,
    /// Response topic.
    pub response_topic: Option<String>,
    /// Correlation data.
    pub correlation_data: Option<Bytes>,
    /// User properties, in order.
    pub user_properties: Vec<(String, String)>,
}

/// A message outside the bound topics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its topic name, any valid one.
    pub topic: Arc<str>,
    /// The application message.
    pub payload: Bytes,
    /// 0 to 2, as published.
    pub qos: u8,
    /// RETAIN, as published.
    pub retain: bool,
    /// The publisher's connection number, for no local.
    pub publisher: u64,
    /// What travels with it.
    pub properties: MessageProperties,
}

/// Bytes that no [`Message::encode`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an encoded message")]
pub struct NotAMessage;

const RETAIN: u8 = 0b100;
const FORMAT_UTF8: u8 = 1;
const FORMAT_BYTES: u8 = 2;

fn put_bytes(buffer: &mut BytesMut, bytes: &[u8]) {
    // A packet's remaining length bounds every part to 256 MiB.
    buffer.put_u32(u32::try_from(bytes.len()).unwrap_or(0));
    buffer.put_slice(bytes.get(..bytes.len().min(u32::MAX as usize)).unwrap_or_default());
}

fn put_option(buffer: &mut BytesMut, bytes: Option<&[u8]>) {
    buffer.put_u8(u8::from(bytes.is_some()));
    if let Some(bytes) = bytes {
        put_bytes(buffer, bytes);
    }
}

fn byte(bytes: &mut Bytes) -> Result<u8, NotAMessage> {
    bytes.try_get_u8().map_err(|_| NotAMessage)
}

fn number(bytes: &mut Bytes) -> Result<u32, NotAMessage> {
    bytes.try_get_u32().map_err(|_| NotAMessage)
}

fn part(bytes: &mut Bytes) -> Result<Bytes, NotAMessage> {
    let len = usize::try_from(number(bytes)?).map_err(|_| NotAMessage)?;
    if len > bytes.len() { Err(NotAMessage) } else { Ok(bytes.split_to(len)) }
}

fn option(bytes: &mut Bytes) -> Result<Option<Bytes>, NotAMessage> {
    if byte(bytes)? == 0 { Ok(None) } else { part(bytes).map(Some) }
}

fn string(bytes: Bytes) -> Result<String, NotAMessage> {
    String::from_utf8(bytes.into()).map_err(|_| NotAMessage)
}

impl Message {
    /// Its bytes on the bus.
    pub fn encode(&self) -> Bytes {
        let mut buffer = BytesMut::with_capacity(48 + self.topic.len() + self.payload.len());
        buffer.put_u8(self.qos | if self.retain { RETAIN } else { 0 });
        buffer.put_u64(self.publisher);
        put_bytes(&mut buffer, self.topic.as_bytes());
        let properties = &self.properties;
        buffer.put_u8(match properties.payload_format_utf8 {
            None => 0,
            Some(true) => FORMAT_UTF8,
            Some(false) => FORMAT_BYTES,
        });
        buffer.put_u8(u8::from(properties.message_expiry_interval_s.is_some()));
        buffer.put_u32(properties.message_expiry_interval_s.unwrap_or(0));
        put_option(&mut buffer, properties.content_type.as_deref().map(str::as_bytes));
        put_option(&mut buffer, properties.response_topic.as_deref().map(str::as_bytes));
        put_option(&mut buffer, properties.correlation_data.as_deref());
        buffer.put_u32(u32::try_from(properties.user_properties.len()).unwrap_or(0));
        for (key, value) in &properties.user_properties {
            put_bytes(&mut buffer, key.as_bytes());
            put_bytes(&mut buffer, value.as_bytes());
        }
        buffer.put_slice(&self.payload);
        buffer.freeze()
    }

    /// Reads what [`Message::encode`] wrote.
    pub fn decode(mut bytes: Bytes) -> Result<Self, NotAMessage> {
        let flags = byte(&mut bytes)?;
        let qos = flags & 0b11;
        if flags > (RETAIN | 2) || qos > 2 {
            return Err(NotAMessage);
        }
        let publisher = bytes.try_get_u64().map_err(|_| NotAMessage)?;
        let topic = string(part(&mut bytes)?)?;
        let payload_format_utf8 = match byte(&mut bytes)? {
            0 => None,
            FORMAT_UTF8 => Some(true),
            FORMAT_BYTES => Some(false),
            _ => return Err(NotAMessage),
        };
        let has_expiry = byte(&mut bytes)? != 0;
        let expiry = number(&mut bytes)?;
        let content_type = option(&mut bytes)?.map(string).transpose()?;
        let response_topic = option(&mut bytes)?.map(string).transpose()?;
        let correlation_data = option(&mut bytes)?;
        let mut user_properties = Vec::new();
        for _ in 0..number(&mut bytes)? {
            user_properties.push((string(part(&mut bytes)?)?, string(part(&mut bytes)?)?));
        }
        Ok(Self {
            topic: topic.into(),
            payload: bytes,
            qos,
            retain: flags & RETAIN != 0,
            publisher,
            properties: MessageProperties {
                payload_format_utf8,
                message_expiry_interval_s: has_expiry.then_some(expiry),
                content_type,
                response_topic,
                correlation_data,
                user_properties,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_message_survives_the_bus(
            topic in "\\PC{1,20}", payload in any::<Vec<u8>>(), qos in 0u8..3, retain: bool, publisher: u64,
            format: Option<bool>, expiry: Option<u32>, content: Option<String>, response: Option<String>,
            correlation: Option<Vec<u8>>, user: Vec<(String, String)>,
        ) {
            let message = Message {
                topic: topic.into(), payload: payload.into(), qos, retain, publisher,
                properties: MessageProperties {
                    payload_format_utf8: format, message_expiry_interval_s: expiry, content_type: content,
                    response_topic: response, correlation_data: correlation.map(Into::into), user_properties: user,
                },
            };
            prop_assert_eq!(Message::decode(message.encode()), Ok(message));
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            drop(Message::decode(bytes.into()));
        }
    }
}
