//! PUBLISH at QoS 0 and 1 and PUBACK, straight out of and into a connection's buffers: nearly all that a broker reads and writes.
//!
//! Pure: bytes and values, no state; which packet identifiers are under way is [`crate::engine`]'s to know. What is unusual in an incoming
//! packet (properties, a packet that is cut or malformed) is not judged here but left to the protocol engine, so that there is one judge.
//! Invariant: what is written here is byte for byte what the protocol engine would write (the tests hold one against the other).

use crate::engine::{Outgoing, UserProperties};
use crate::topics::message::MessageProperties;

/// A remaining length takes at most so many bytes.
const LENGTH_BYTES_MAX: usize = 4;

/// What a plain packet says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Plain<'a> {
    Publish { topic: &'a str, payload: &'a [u8], retain: bool, packet_id: Option<u16> },
    Puback(u16),
}

/// The property identifiers of MQTT 5, section 2.2.2.2, as far as they are written here.
mod property {
    pub(super) const PAYLOAD_FORMAT_INDICATOR: u8 = 0x01;
    pub(super) const MESSAGE_EXPIRY_INTERVAL: u8 = 0x02;
    pub(super) const CONTENT_TYPE: u8 = 0x03;
    pub(super) const RESPONSE_TOPIC: u8 = 0x08;
    pub(super) const CORRELATION_DATA: u8 = 0x09;
    pub(super) const SUBSCRIPTION_IDENTIFIER: u8 = 0x0b;
    pub(super) const REASON_STRING: u8 = 0x1f;
    pub(super) const TOPIC_ALIAS: u8 = 0x23;
    pub(super) const USER_PROPERTY: u8 = 0x26;
}

/// Reads one whole packet, in the form that nearly all have; `None` if it is another, or not as it should be.
pub(crate) fn read(packet: &[u8], is_v5: bool) -> Option<Plain<'_>> {
    let (&first, rest) = packet.split_first()?;
    let body = &rest[length_bytes(rest)?..];
    match first {
        0x40 => match body {
            [0, 0] => None,
            [high, low] => Some(Plain::Puback(u16::from_be_bytes([*high, *low]))),
            _ => None,
        },
        // QoS 0 or 1, with or without RETAIN and DUP.
        _ if first >> 4 == 3 && first & 0b0100 == 0 => {
            let (length, rest) = body.split_first_chunk()?;
            let (topic, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
            if topic.is_empty() || topic.contains(&0) {
                return None;
            }
            let topic = std::str::from_utf8(topic).ok()?;
            let (packet_id, rest) = if first & 0b0010 == 0 {
                (None, rest)
            } else {
                let (id, rest) = rest.split_first_chunk()?;
                let id = u16::from_be_bytes(*id);
                if id == 0 {
                    return None;
                }
                (Some(id), rest)
            };
            let payload = match rest.split_first() {
                _ if !is_v5 => rest,
                Some((0, payload)) => payload,
                // With properties, or cut.
                _ => return None,
            };
            Some(Plain::Publish { topic, payload, retain: first & 1 != 0, packet_id })
        }
        _ => None,
    }
}

/// Bytes that the remaining length takes.
fn length_bytes(bytes: &[u8]) -> Option<usize> {
    bytes.iter().take(LENGTH_BYTES_MAX).position(|byte| byte & 0x80 == 0).map(|last| last + 1)
}

/// The body of one whole packet.
pub(crate) fn body(packet: &[u8]) -> &[u8] {
    let rest = packet.get(1..).unwrap_or_default();
    length_bytes(rest).and_then(|length| rest.get(length..)).unwrap_or_default()
}

fn put_number(out: &mut Vec<u8>, mut number: usize) {
    loop {
        let low = number.to_le_bytes()[0] & 0x7f;
        number >>= 7;
        if number == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

fn number_bytes(number: usize) -> usize {
    match number {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

/// `None`: longer than MQTT can carry.
fn length(text: &[u8]) -> Option<[u8; 2]> {
    u16::try_from(text.len()).ok().map(u16::to_be_bytes)
}

/// A property that MQTT cannot carry because it is too long is left out.
fn put_bytes(out: &mut Vec<u8>, property: u8, value: &[u8]) {
    let Some(length) = length(value) else { return };
    out.push(property);
    out.extend_from_slice(&length);
    out.extend_from_slice(value);
}

fn put_pair(out: &mut Vec<u8>, key: &str, value: &str) {
    let (Some(key_length), Some(value_length)) = (length(key.as_bytes()), length(value.as_bytes())) else { return };
    out.push(property::USER_PROPERTY);
    out.extend_from_slice(&key_length);
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(&value_length);
    out.extend_from_slice(value.as_bytes());
}

/// The properties of a PUBLISH.
pub(crate) fn put_publish_properties(out: &mut Vec<u8>, message: &Outgoing<'_>, alias: Option<u16>) {
    match message.user_properties {
        UserProperties::None => {}
        UserProperties::Live(live) => {
            live.properties().for_each(|(key, value)| put_pair(out, key, value));
            if !live.correlation().is_empty() {
                put_bytes(out, property::CORRELATION_DATA, live.correlation());
            }
        }
        UserProperties::Stored(stored) => stored.iter().for_each(|(key, value)| put_pair(out, key, value)),
    }
    if let Some(own) = message.properties {
        put_message_properties(out, own, message.expiry_s);
    }
    for identifier in message.identifiers {
        out.push(property::SUBSCRIPTION_IDENTIFIER);
        put_number(out, usize::try_from(*identifier).unwrap_or_default());
    }
    if let Some(alias) = alias {
        out.push(property::TOPIC_ALIAS);
        out.extend_from_slice(&alias.to_be_bytes());
    }
}

fn put_message_properties(out: &mut Vec<u8>, message: &MessageProperties, expiry_s: Option<u32>) {
    if message.payload_format_utf8 == Some(true) {
        out.extend_from_slice(&[property::PAYLOAD_FORMAT_INDICATOR, 1]);
    }
    if let Some(expiry_s) = expiry_s {
        out.push(property::MESSAGE_EXPIRY_INTERVAL);
        out.extend_from_slice(&expiry_s.to_be_bytes());
    }
    let texts = [(property::CONTENT_TYPE, &message.content_type), (property::RESPONSE_TOPIC, &message.response_topic)];
    for (property, text) in texts {
        if let Some(text) = text {
            put_bytes(out, property, text.as_bytes());
        }
    }
    if let Some(correlation) = &message.correlation_data {
        put_bytes(out, property::CORRELATION_DATA, correlation);
    }
    message.user_properties.iter().for_each(|(key, value)| put_pair(out, key, value));
}

/// A PUBLISH at QoS 0 or 1. `topic` is empty where the client knows its alias; `properties` are `None` in MQTT 3.1.1. `Err` is the packet's
/// length where it is longer than `bytes_max`.
pub(crate) fn put_publish(
    out: &mut Vec<u8>,
    topic: &str,
    message: &Outgoing<'_>,
    packet_id: Option<u16>,
    properties: Option<&[u8]>,
    bytes_max: usize,
) -> Result<(), usize> {
    let topic_length = length(topic.as_bytes()).ok_or(usize::MAX)?;
    let properties_bytes = properties.map_or(0, |properties| number_bytes(properties.len()) + properties.len());
    let id_bytes = if packet_id.is_some() { 2 } else { 0 };
    let remaining = 2 + topic.len() + id_bytes + properties_bytes + message.payload.len();
    let packet_bytes = 1 + number_bytes(remaining) + remaining;
    if packet_bytes > bytes_max || remaining >= 1 << 28 {
        return Err(packet_bytes);
    }
    let dup = message.again.is_some() && packet_id.is_some();
    out.reserve(packet_bytes);
    out.push(0x30 | u8::from(dup) << 3 | u8::from(packet_id.is_some()) << 1 | u8::from(message.retain));
    put_number(out, remaining);
    out.extend_from_slice(&topic_length);
    out.extend_from_slice(topic.as_bytes());
    if let Some(packet_id) = packet_id {
        out.extend_from_slice(&packet_id.to_be_bytes());
    }
    if let Some(properties) = properties {
        put_number(out, properties.len());
        out.extend_from_slice(properties);
    }
    out.extend_from_slice(message.payload);
    Ok(())
}

/// What a PUBACK of MQTT 5 may tell beside its reason.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Told<'a> {
    Nothing,
    Properties(&'a [(&'static str, String)]),
    Reason(&'a str),
}

/// PUBACK. `reason`: none in MQTT 3.1.1, and where it is success and nothing else is told. What makes it longer than `bytes_max` is left out
/// [MQTT-3.4.2-2], [MQTT-3.4.2-3]; `false` if it is too long all the same.
pub(crate) fn put_puback(
    out: &mut Vec<u8>,
    packet_id: u16,
    reason: Option<u8>,
    told: Told<'_>,
    bytes_max: usize,
) -> bool {
    let begin = out.len();
    let [high, low] = packet_id.to_be_bytes();
    let Some(reason) = reason else {
        out.extend_from_slice(&[0x40, 2, high, low]);
        return out.len() - begin <= bytes_max;
    };
    let string_bytes = |text: &str| if length(text.as_bytes()).is_some() { Some(2 + text.len()) } else { None };
    let mut properties_bytes = match told {
        Told::Nothing => 0,
        Told::Properties(pairs) => {
            pairs.iter().filter_map(|(key, value)| Some(1 + string_bytes(key)? + string_bytes(value)?)).sum()
        }
        Told::Reason(text) => string_bytes(text).map_or(0, |bytes| 1 + bytes),
    };
    let remaining = |properties_bytes| match properties_bytes {
        0 => 3,
        _ => 3 + number_bytes(properties_bytes) + properties_bytes,
    };
    let whole = remaining(properties_bytes);
    if 1 + number_bytes(whole) + whole > bytes_max {
        properties_bytes = 0;
    }
    out.push(0x40);
    put_number(out, remaining(properties_bytes));
    out.extend_from_slice(&[high, low, reason]);
    if properties_bytes > 0 {
        put_number(out, properties_bytes);
        match told {
            Told::Nothing => {}
            Told::Properties(pairs) => pairs.iter().for_each(|(key, value)| put_pair(out, key, value)),
            Told::Reason(text) => put_bytes(out, property::REASON_STRING, text.as_bytes()),
        }
    }
    out.len() - begin <= bytes_max
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use mqtt_protocol_core::mqtt::packet::{
        ContentType, CorrelationData, GenericPacketTrait, MessageExpiryInterval, PayloadFormat, PayloadFormatIndicator,
        Property, Qos, ReasonString, ResponseTopic, SubscriptionIdentifier, TopicAlias, UserProperty, v3_1_1, v5_0,
    };
    use mqtt_protocol_core::mqtt::result_code::PubackReasonCode;
    use proptest::prelude::*;

    use super::*;
    use crate::live::LiveMessage;
    use crate::service::Position;

    fn bytes_of(packet: &impl GenericPacketTrait) -> Vec<u8> {
        packet.to_buffers().iter().flat_map(|buffer| buffer.to_vec()).collect()
    }

    fn qos(packet_id: Option<u16>) -> Qos {
        if packet_id.is_some() { Qos::AtLeastOnce } else { Qos::AtMostOnce }
    }

    fn v3(topic: &str, packet_id: Option<u16>, retain: bool, dup: bool, payload: &[u8]) -> Vec<u8> {
        let builder = v3_1_1::Publish::builder().topic_name(topic).expect("a topic");
        let builder = builder.qos(qos(packet_id)).retain(retain).dup(dup).payload(payload);
        let builder = packet_id.into_iter().fold(builder, |builder, packet_id| builder.packet_id(packet_id));
        bytes_of(&builder.build().expect("a packet"))
    }

    fn v5(topic: &str, packet_id: Option<u16>, message: &Outgoing<'_>, properties: Vec<Property>) -> Vec<u8> {
        let builder = v5_0::Publish::builder().topic_name(topic).expect("a topic");
        let dup = message.again.is_some() && packet_id.is_some();
        let builder = builder.qos(qos(packet_id)).retain(message.retain).dup(dup).payload(message.payload);
        let builder = packet_id.into_iter().fold(builder, |builder, packet_id| builder.packet_id(packet_id));
        let builder = if properties.is_empty() { builder } else { builder.props(properties) };
        bytes_of(&builder.build().expect("a packet"))
    }

    fn outgoing<'a>(topic: &'a str, payload: &'a [u8]) -> Outgoing<'a> {
        Outgoing {
            topic,
            payload,
            qos: 1,
            retain: false,
            user_properties: UserProperties::None,
            properties: None,
            expiry_s: None,
            identifiers: &[],
            again: None,
        }
    }

    fn packet_id() -> impl Strategy<Value = Option<u16>> {
        prop::option::of(1_u16..)
    }

    fn pairs() -> impl Strategy<Value = Vec<(String, String)>> {
        prop::collection::vec(("\\PC{0,12}", "\\PC{0,200}"), 0..4)
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written(
            topic in "[^\0]{1,200}", payload in prop::collection::vec(any::<u8>(), 0..300), packet_id in packet_id(),
            retain: bool, dup: bool,
        ) {
            prop_assume!(!topic.contains(['+', '#']));
            let expected = Plain::Publish { topic: &topic, payload: &payload, retain, packet_id };
            let packet = v3(&topic, packet_id, retain, dup && packet_id.is_some(), &payload);
            prop_assert_eq!(read(&packet, false), Some(expected));
            let message = Outgoing { retain, again: dup.then_some(1), ..outgoing(&topic, &payload) };
            let packet = v5(&topic, packet_id, &message, Vec::new());
            let expected = Plain::Publish { topic: &topic, payload: &payload, retain, packet_id };
            prop_assert_eq!(read(&packet, true), Some(expected));
        }

        /// Whatever the bytes are: no panic, and nothing is taken that the protocol engine would refuse.
        #[test]
        fn odd_packets_are_left_to_the_protocol_engine(
            first in prop_oneof![Just(0x30_u8), Just(0x32), Just(0x33), Just(0x3a), Just(0x34), Just(0x40), any::<u8>()],
            mut body in prop::collection::vec(prop_oneof![3 => 0_u8..5, 1 => any::<u8>()], 0..40),
            is_v5: bool,
        ) {
            let mut packet = vec![first];
            put_number(&mut packet, body.len());
            packet.append(&mut body);
            let data: Arc<[u8]> = super::body(&packet).into();
            match read(&packet, is_v5) {
                Some(Plain::Publish { topic, payload, packet_id, .. }) => {
                    let (read_topic, read_payload, read_id) = if is_v5 {
                        let (publish, _) = v5_0::Publish::parse(first & 15, data).expect("a packet");
                        prop_assert!(publish.props().is_empty());
                        (publish.topic_name().to_owned(), publish.payload().as_slice().to_vec(), publish.packet_id())
                    } else {
                        let (publish, _) = v3_1_1::Publish::parse(first & 15, data).expect("a packet");
                        (publish.topic_name().to_owned(), publish.payload().as_slice().to_vec(), publish.packet_id())
                    };
                    prop_assert_eq!((topic, payload, packet_id), (&*read_topic, &*read_payload, read_id));
                }
                Some(Plain::Puback(id)) => {
                    prop_assert_eq!(v3_1_1::Puback::parse(&data).expect("a packet").0.packet_id(), id);
                }
                None => {}
            }
        }

        #[test]
        fn a_publish_is_written_as_the_protocol_engine_writes_it(
            topic in "[a-z/]{1,150}", payload in prop::collection::vec(any::<u8>(), 0..300), packet_id in packet_id(),
            retain: bool, again in prop::option::of(1_u16..), pairs in pairs(), own_pairs in pairs(), correlation in "[a-z]{0,9}",
            (content_type, response_topic, expiry_s) in (prop::option::of("[a-z]{0,9}"), prop::option::of("[a-z]{1,9}"), prop::option::of(any::<u32>())),
            utf8 in prop::option::of(any::<bool>()), own_correlation in prop::option::of("[a-z]{1,9}"),
            identifiers in prop::collection::vec(1_u32..268_435_455, 0..3), alias in prop::option::of(1_u16..), is_live: bool,
        ) {
            let borrowed: Vec<(&str, &str)> = pairs.iter().map(|(key, value)| (&**key, &**value)).collect();
            let live = LiveMessage::new("t".into(), Position(1), 0, Bytes::new(), &borrowed);
            let live = live.with_correlation(Bytes::from(correlation.clone()));
            let own = MessageProperties {
                payload_format_utf8: utf8,
                message_expiry_interval_s: None,
                content_type: content_type.clone(),
                response_topic: response_topic.clone(),
                // A packet has it once: a live message has no properties of its own.
                correlation_data: own_correlation.clone().filter(|_| !is_live).map(Bytes::from),
                user_properties: own_pairs.clone(),
            };
            let stored: Vec<(&'static str, String)> = pairs.iter().map(|(_, value)| ("key", value.clone())).collect();
            let message = Outgoing {
                retain,
                again,
                user_properties: if is_live { UserProperties::Live(&live) } else { UserProperties::Stored(&stored) },
                properties: Some(&own),
                expiry_s,
                identifiers: &identifiers,
                ..outgoing(&topic, &payload)
            };
            let mut properties: Vec<Property> = Vec::new();
            let pair = |key: &str, value: &str| UserProperty::new(key, value).expect("a pair").into();
            if is_live {
                properties.extend(pairs.iter().map(|(key, value)| pair(key, value)));
                if !correlation.is_empty() {
                    properties.push(CorrelationData::new(correlation.clone().into_bytes()).expect("bytes").into());
                }
            } else {
                properties.extend(pairs.iter().map(|(_, value)| pair("key", value)));
            }
            if utf8 == Some(true) {
                properties.push(PayloadFormatIndicator::new(PayloadFormat::String).expect("a format").into());
            }
            properties.extend(expiry_s.map(|expiry_s| MessageExpiryInterval::new(expiry_s).expect("seconds").into()));
            properties.extend(content_type.as_ref().map(|text| ContentType::new(text).expect("a text").into()));
            properties.extend(response_topic.as_ref().map(|topic| ResponseTopic::new(topic).expect("a topic").into()));
            properties.extend(own_correlation.filter(|_| !is_live).map(|bytes| CorrelationData::new(bytes.into_bytes()).expect("bytes").into()));
            properties.extend(own_pairs.iter().map(|(key, value)| pair(key, value)));
            properties.extend(identifiers.iter().map(|one| SubscriptionIdentifier::new(*one).expect("a number").into()));
            properties.extend(alias.map(|alias| TopicAlias::new(alias).expect("an alias").into()));

            let mut own_properties = Vec::new();
            put_publish_properties(&mut own_properties, &message, alias);
            let mut out = b"before".to_vec();
            let expected = v5(&topic, packet_id, &message, properties);
            let put = put_publish(&mut out, &topic, &message, packet_id, Some(&own_properties), expected.len());
            prop_assert_eq!(put, Ok(()));
            prop_assert_eq!(&out[6..], &expected[..]);
            let too_long = put_publish(&mut out, &topic, &message, packet_id, Some(&own_properties), expected.len() - 1);
            prop_assert_eq!(too_long, Err(expected.len()));
            prop_assert_eq!(out.len(), 6 + expected.len(), "nothing of it is left behind");

            out.clear();
            let expected = v3(&topic, packet_id, retain, again.is_some() && packet_id.is_some(), &payload);
            prop_assert_eq!(put_publish(&mut out, &topic, &message, packet_id, None, usize::MAX), Ok(()));
            prop_assert_eq!(out, expected);
        }

        #[test]
        fn a_puback_is_written_as_the_protocol_engine_writes_it(
            packet_id in 1_u16.., values in prop::collection::vec("\\PC{0,90}", 0..3), reason in prop::option::of("\\PC{0,200}"),
        ) {
            let mut out = Vec::new();
            prop_assert!(put_puback(&mut out, packet_id, None, Told::Nothing, 4));
            let plain = v3_1_1::Puback::builder().packet_id(packet_id).build().expect("a packet");
            prop_assert_eq!(&out, &bytes_of(&plain));
            let plain = v5_0::Puback::builder().packet_id(packet_id).build().expect("a packet");
            prop_assert_eq!(&out, &bytes_of(&plain));

            let pairs: Vec<(&'static str, String)> = values.into_iter().map(|value| ("seq", value)).collect();
            let (code, told, properties): (_, _, Vec<Property>) = match &reason {
                Some(reason) => {
                    let property = ReasonString::new(reason).expect("a text").into();
                    (PubackReasonCode::QuotaExceeded, Told::Reason(reason), vec![property])
                }
                None => {
                    let properties = pairs.iter().map(|(key, value)| UserProperty::new(*key, value).expect("a pair").into());
                    (PubackReasonCode::NoMatchingSubscribers, Told::Properties(&pairs), properties.collect())
                }
            };
            let builder = || v5_0::Puback::builder().packet_id(packet_id).reason_code(code);
            let without = bytes_of(&builder().build().expect("a packet"));
            let builder = if properties.is_empty() { builder() } else { builder().props(properties) };
            let expected = bytes_of(&builder.build().expect("a packet"));
            for (bytes_max, expected, fits) in
                [(expected.len(), &expected, true), (expected.len() - 1, &without, expected.len() > without.len()), (4, &without, false)]
            {
                out.clear();
                prop_assert_eq!(put_puback(&mut out, packet_id, Some(code as u8), told, bytes_max), fits);
                prop_assert_eq!(&out, expected);
            }
        }
    }

    #[test]
    fn what_is_too_long_for_mqtt_is_left_out() {
        let long = "x".repeat(65_536);
        let own = MessageProperties {
            content_type: Some(long.clone()),
            user_properties: vec![(long.clone(), "a".to_owned()), ("b".to_owned(), long.clone())],
            ..MessageProperties::default()
        };
        let mut out = Vec::new();
        put_publish_properties(&mut out, &Outgoing { properties: Some(&own), ..outgoing("t", b"") }, None);
        assert!(out.is_empty());
        assert_eq!(put_publish(&mut out, &long, &outgoing(&long, b""), None, None, usize::MAX), Err(usize::MAX));
        assert!(put_puback(&mut out, 1, Some(0x97), Told::Reason(&long), usize::MAX));
        assert_eq!(out, [0x40, 3, 0, 1, 0x97]);
    }
}
