//! MQTT control packets as bytes, written for the tests from the OASIS specifications: encodes what clients send, decodes what servers
//! send. Encoding checks nothing, so that tests can say what no decent client says; decoding checks what a client may rely on.

use anyhow::{Context, Result, bail, ensure};

/// The MQTT version of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 3.1.1
    V4,
    /// 5
    V5,
}

/// A property's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Byte(u8),
    U16(u16),
    U32(u32),
    Variable(u32),
    Text(String),
    Binary(Vec<u8>),
    Pair(String, String),
}

impl Value {
    fn number(&self) -> Option<u32> {
        match self {
            Value::Byte(value) => Some(u32::from(*value)),
            Value::U16(value) => Some(u32::from(*value)),
            Value::U32(value) | Value::Variable(value) => Some(*value),
            Value::Text(_) | Value::Binary(_) | Value::Pair(..) => None,
        }
    }
}

/// Property identifiers that the tests name.
pub mod id {
    pub const PAYLOAD_FORMAT: u8 = 0x01;
    pub const MESSAGE_EXPIRY: u8 = 0x02;
    pub const CONTENT_TYPE: u8 = 0x03;
    pub const RESPONSE_TOPIC: u8 = 0x08;
    pub const CORRELATION_DATA: u8 = 0x09;
    pub const SUBSCRIPTION_IDENTIFIER: u8 = 0x0b;
    pub const SESSION_EXPIRY: u8 = 0x11;
    pub const ASSIGNED_CLIENT_ID: u8 = 0x12;
    pub const SERVER_KEEP_ALIVE: u8 = 0x13;
    pub const AUTHENTICATION_METHOD: u8 = 0x15;
    pub const AUTHENTICATION_DATA: u8 = 0x16;
    pub const REQUEST_PROBLEM_INFORMATION: u8 = 0x17;
    pub const WILL_DELAY: u8 = 0x18;
    pub const REQUEST_RESPONSE_INFORMATION: u8 = 0x19;
    pub const RESPONSE_INFORMATION: u8 = 0x1a;
    pub const REASON_STRING: u8 = 0x1f;
    pub const RECEIVE_MAXIMUM: u8 = 0x21;
    pub const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
    pub const TOPIC_ALIAS: u8 = 0x23;
    pub const MAXIMUM_QOS: u8 = 0x24;
    pub const RETAIN_AVAILABLE: u8 = 0x25;
    pub const USER_PROPERTY: u8 = 0x26;
    pub const MAXIMUM_PACKET_SIZE: u8 = 0x27;
    pub const WILDCARD_SUBSCRIPTION_AVAILABLE: u8 = 0x28;
    pub const SUBSCRIPTION_IDENTIFIERS_AVAILABLE: u8 = 0x29;
    pub const SHARED_SUBSCRIPTION_AVAILABLE: u8 = 0x2a;
}

/// The properties of a packet, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Properties(pub Vec<(u8, Value)>);

impl Properties {
    /// None.
    pub fn none() -> Self {
        Self::default()
    }

    /// These and one more.
    #[must_use]
    pub fn with(mut self, identifier: u8, value: Value) -> Self {
        self.0.push((identifier, value));
        self
    }

    /// These and one more user property.
    #[must_use]
    pub fn with_user(self, key: &str, value: &str) -> Self {
        self.with(id::USER_PROPERTY, Value::Pair(key.to_owned(), value.to_owned()))
    }

    /// The first of that identifier.
    pub fn get(&self, identifier: u8) -> Option<&Value> {
        self.0.iter().find_map(|(found, value)| (*found == identifier).then_some(value))
    }

    /// The first user property of that name.
    pub fn user(&self, key: &str) -> Option<&str> {
        self.0.iter().find_map(|(_, value)| match value {
            Value::Pair(found, value) if found == key => Some(value.as_str()),
            _ => None,
        })
    }

    /// The reason string.
    pub fn reason(&self) -> Option<&str> {
        match self.get(id::REASON_STRING) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A property that is text.
    pub fn text(&self, identifier: u8) -> Option<&str> {
        match self.get(identifier)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A property that is a number of any width.
    pub fn number(&self, identifier: u8) -> Option<u32> {
        self.get(identifier)?.number()
    }

    /// The subscription identifiers, in ascending order: theirs says nothing.
    pub fn subscription_identifiers(&self) -> Vec<u32> {
        let found = self.0.iter().filter(|(found, _)| *found == id::SUBSCRIPTION_IDENTIFIER);
        let mut identifiers: Vec<u32> = found.filter_map(|(_, value)| value.number()).collect();
        identifiers.sort_unstable();
        identifiers
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let mut bytes = Vec::new();
        for (identifier, value) in &self.0 {
            bytes.push(*identifier);
            match value {
                Value::Byte(value) => bytes.push(*value),
                Value::U16(value) => bytes.extend(value.to_be_bytes()),
                Value::U32(value) => bytes.extend(value.to_be_bytes()),
                Value::Variable(value) => variable(&mut bytes, *value),
                Value::Text(text) => string(&mut bytes, text.as_bytes()),
                Value::Binary(binary) => string(&mut bytes, binary),
                Value::Pair(key, value) => {
                    string(&mut bytes, key.as_bytes());
                    string(&mut bytes, value.as_bytes());
                }
            }
        }
        variable(out, u32::try_from(bytes.len()).expect("properties of a test are short"));
        out.extend(bytes);
    }
}

/// A PUBLISH, of either direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Publish {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: u8,
    pub retain: bool,
    pub dup: bool,
    /// 0: none.
    pub packet_id: u16,
    pub properties: Properties,
}

impl Publish {
    /// With this QoS, nothing else set.
    pub fn new(topic: impl Into<String>, payload: impl Into<Vec<u8>>, qos: u8) -> Self {
        Self { topic: topic.into(), payload: payload.into(), qos, ..Self::default() }
    }

    /// The payload, which has to be text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.payload).expect("the server sends text here")
    }

    /// The payload, which has to be JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.payload).expect("the server sends JSON here")
    }
}

/// A will.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Will {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: u8,
    pub retain: bool,
    pub properties: Properties,
}

/// What a server sends. `properties` are empty and reason codes 0 where MQTT 3.1.1 has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    Connack { session_present: bool, code: u8, properties: Properties },
    Publish(Publish),
    Puback { packet_id: u16, code: u8, properties: Properties },
    Pubrec { packet_id: u16, code: u8, properties: Properties },
    Pubrel { packet_id: u16, code: u8 },
    Pubcomp { packet_id: u16, code: u8 },
    Suback { packet_id: u16, codes: Vec<u8>, properties: Properties },
    Unsuback { packet_id: u16, codes: Vec<u8>, properties: Properties },
    Pingresp,
    Disconnect { code: u8, properties: Properties },
    Auth { code: u8, properties: Properties },
}

/// The fields of a CONNECT.
#[derive(Clone, Debug)]
pub struct ConnectFields<'a> {
    pub version: Version,
    pub client_id: &'a str,
    pub user_name: Option<&'a str>,
    pub password: Option<&'a [u8]>,
    pub clean_start: bool,
    pub keep_alive_s: u16,
    pub will: Option<&'a Will>,
    pub properties: &'a Properties,
}

fn variable(out: &mut Vec<u8>, mut value: u32) {
    loop {
        let byte = u8::try_from(value % 128).expect("below 128");
        value /= 128;
        out.push(if value > 0 { byte | 0x80 } else { byte });
        if value == 0 {
            return;
        }
    }
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(u16::try_from(bytes.len()).expect("MQTT strings have at most 65,535 bytes").to_be_bytes());
    out.extend(bytes);
}

/// A packet of any first byte and body, with the right remaining length.
pub fn frame(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + 5);
    out.push(first);
    variable(&mut out, u32::try_from(body.len()).expect("packets of a test fit"));
    out.extend(body);
    out
}

pub fn connect(fields: &ConnectFields<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    string(&mut body, b"MQTT");
    body.push(if fields.version == Version::V5 { 5 } else { 4 });
    let mut flags = 0;
    if fields.clean_start {
        flags |= 0x02;
    }
    if let Some(will) = fields.will {
        flags |= 0x04 | (will.qos << 3) | (u8::from(will.retain) << 5);
    }
    if fields.password.is_some() {
        flags |= 0x40;
    }
    if fields.user_name.is_some() {
        flags |= 0x80;
    }
    body.push(flags);
    body.extend(fields.keep_alive_s.to_be_bytes());
    if fields.version == Version::V5 {
        fields.properties.encode(&mut body);
    }
    string(&mut body, fields.client_id.as_bytes());
    if let Some(will) = fields.will {
        if fields.version == Version::V5 {
            will.properties.encode(&mut body);
        }
        string(&mut body, will.topic.as_bytes());
        string(&mut body, &will.payload);
    }
    if let Some(user_name) = fields.user_name {
        string(&mut body, user_name.as_bytes());
    }
    if let Some(password) = fields.password {
        string(&mut body, password);
    }
    frame(0x10, &body)
}

pub fn publish(version: Version, publish: &Publish) -> Vec<u8> {
    let mut body = Vec::with_capacity(publish.topic.len() + publish.payload.len() + 16);
    string(&mut body, publish.topic.as_bytes());
    if publish.qos > 0 {
        body.extend(publish.packet_id.to_be_bytes());
    }
    if version == Version::V5 {
        publish.properties.encode(&mut body);
    }
    body.extend(&publish.payload);
    frame(0x30 | (u8::from(publish.dup) << 3) | (publish.qos << 1) | u8::from(publish.retain), &body)
}

pub fn puback(packet_id: u16) -> Vec<u8> {
    frame(0x40, &packet_id.to_be_bytes())
}

pub fn pubrec(packet_id: u16) -> Vec<u8> {
    frame(0x50, &packet_id.to_be_bytes())
}

pub fn pubrel(packet_id: u16) -> Vec<u8> {
    frame(0x62, &packet_id.to_be_bytes())
}

pub fn pubcomp(packet_id: u16) -> Vec<u8> {
    frame(0x70, &packet_id.to_be_bytes())
}

/// PUBREC of MQTT 5 with a reason code.
pub fn pubrec_with(packet_id: u16, code: u8) -> Vec<u8> {
    let [high, low] = packet_id.to_be_bytes();
    frame(0x50, &[high, low, code])
}

/// PUBACK of MQTT 5 with a reason code.
pub fn puback_with(packet_id: u16, code: u8) -> Vec<u8> {
    let [high, low] = packet_id.to_be_bytes();
    frame(0x40, &[high, low, code])
}

/// `filters`: with their options byte, which for MQTT 3.1.1 is the QoS.
pub fn subscribe(version: Version, packet_id: u16, properties: &Properties, filters: &[(&str, u8)]) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == Version::V5 {
        properties.encode(&mut body);
    }
    for (filter, options) in filters {
        string(&mut body, filter.as_bytes());
        body.push(*options);
    }
    frame(0x82, &body)
}

pub fn unsubscribe(version: Version, packet_id: u16, filters: &[&str]) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == Version::V5 {
        body.push(0);
    }
    for filter in filters {
        string(&mut body, filter.as_bytes());
    }
    frame(0xa2, &body)
}

/// AUTH, which proves again who the client is.
pub fn authenticate_again(method: &str, data: &[u8]) -> Vec<u8> {
    let mut body = vec![0x19];
    let properties = Properties::none().with(id::AUTHENTICATION_METHOD, Value::Text(method.to_owned()));
    properties.with(id::AUTHENTICATION_DATA, Value::Binary(data.to_vec())).encode(&mut body);
    frame(0xf0, &body)
}

pub fn pingreq() -> Vec<u8> {
    vec![0xc0, 0]
}

/// Reason code and properties go to MQTT 5 only.
pub fn disconnect(version: Version, code: u8, properties: &Properties) -> Vec<u8> {
    let mut body = Vec::new();
    if version == Version::V5 && (code != 0 || !properties.0.is_empty()) {
        body.push(code);
        properties.encode(&mut body);
    }
    frame(0xe0, &body)
}

/// Reads the fields of one packet.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        ensure!(self.bytes.len() >= n, "packet ends too early");
        let (taken, rest) = self.bytes.split_at(n);
        self.bytes = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.take(2)?.try_into().context("two bytes")?))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.take(4)?.try_into().context("four bytes")?))
    }

    fn variable(&mut self) -> Result<u32> {
        let (value, used) = read_variable(self.bytes)?.context("packet ends in a variable byte integer")?;
        self.take(used)?;
        Ok(value)
    }

    fn binary(&mut self) -> Result<Vec<u8>> {
        let length = self.u16()?;
        Ok(self.take(usize::from(length))?.to_vec())
    }

    fn text(&mut self) -> Result<String> {
        String::from_utf8(self.binary()?).context("a string is not UTF-8")
    }

    fn properties(&mut self) -> Result<Properties> {
        let length = usize::try_from(self.variable()?)?;
        let mut inner = Reader { bytes: self.take(length)? };
        let mut properties = Properties::none();
        while !inner.bytes.is_empty() {
            let identifier = inner.u8()?;
            let value = match identifier {
                0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28 | 0x29 | 0x2a => Value::Byte(inner.u8()?),
                0x13 | 0x21 | 0x22 | 0x23 => Value::U16(inner.u16()?),
                0x02 | 0x11 | 0x18 | 0x27 => Value::U32(inner.u32()?),
                0x0b => Value::Variable(inner.variable()?),
                0x03 | 0x08 | 0x12 | 0x15 | 0x1a | 0x1c | 0x1f => Value::Text(inner.text()?),
                0x09 | 0x16 => Value::Binary(inner.binary()?),
                0x26 => Value::Pair(inner.text()?, inner.text()?),
                other => bail!("property {other:#04x} does not exist"),
            };
            properties.0.push((identifier, value));
        }
        Ok(properties)
    }

    /// An acknowledgement's reason code and properties, either of which may be left out.
    fn reason(&mut self, version: Version) -> Result<(u8, Properties)> {
        if version == Version::V4 || self.bytes.is_empty() {
            return Ok((0, Properties::none()));
        }
        let code = self.u8()?;
        let properties = if self.bytes.is_empty() { Properties::none() } else { self.properties()? };
        Ok((code, properties))
    }
}

fn read_variable(bytes: &[u8]) -> Result<Option<(u32, usize)>> {
    let mut value = 0;
    for (at, byte) in bytes.iter().take(4).enumerate() {
        value |= u32::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some((value, at + 1)));
        }
    }
    ensure!(bytes.len() < 4, "a variable byte integer has more than four bytes");
    Ok(None)
}

/// The first packet in these bytes and how many bytes it has; `None` if it is not all there yet.
pub fn decode(version: Version, bytes: &[u8]) -> Result<Option<(Packet, usize)>> {
    let Some((first, rest)) = bytes.split_first() else { return Ok(None) };
    let Some((remaining, used)) = read_variable(rest)? else { return Ok(None) };
    let length = 1 + used + usize::try_from(remaining)?;
    let Some(body) = bytes.get(1 + used..length) else { return Ok(None) };
    let mut reader = Reader { bytes: body };
    let packet =
        decode_body(version, *first, &mut reader).with_context(|| format!("packet {first:#04x} {body:02x?}"))?;
    ensure!(reader.bytes.is_empty(), "packet {first:#04x} has {} bytes too many", reader.bytes.len());
    Ok(Some((packet, length)))
}

fn decode_body(version: Version, first: u8, reader: &mut Reader<'_>) -> Result<Packet> {
    let flags = first & 0x0f;
    let v5 = version == Version::V5;
    if first >> 4 != 3 {
        ensure!(flags == if first >> 4 == 6 { 2 } else { 0 }, "reserved flags are {flags:#x}");
    }
    Ok(match first >> 4 {
        2 => {
            let present = reader.u8()?;
            ensure!(present <= 1, "CONNACK flags are {present:#x}");
            let code = reader.u8()?;
            let properties = if v5 { reader.properties()? } else { Properties::none() };
            Packet::Connack { session_present: present == 1, code, properties }
        }
        3 => {
            let qos = (flags >> 1) & 3;
            ensure!(qos < 3, "QoS 3");
            let topic = reader.text()?;
            let packet_id = if qos > 0 { reader.u16()? } else { 0 };
            ensure!(qos == 0 || packet_id != 0, "packet identifier 0");
            let properties = if v5 { reader.properties()? } else { Properties::none() };
            let payload = reader.take(reader.bytes.len())?.to_vec();
            Packet::Publish(Publish {
                topic,
                payload,
                qos,
                retain: flags & 1 == 1,
                dup: flags & 8 == 8,
                packet_id,
                properties,
            })
        }
        4 => {
            let packet_id = reader.u16()?;
            let (code, properties) = reader.reason(version)?;
            Packet::Puback { packet_id, code, properties }
        }
        5 => {
            let packet_id = reader.u16()?;
            let (code, properties) = reader.reason(version)?;
            Packet::Pubrec { packet_id, code, properties }
        }
        6 => {
            let packet_id = reader.u16()?;
            let (code, _) = reader.reason(version)?;
            Packet::Pubrel { packet_id, code }
        }
        7 => {
            let packet_id = reader.u16()?;
            let (code, _) = reader.reason(version)?;
            Packet::Pubcomp { packet_id, code }
        }
        9 | 11 => {
            let packet_id = reader.u16()?;
            let properties = if v5 { reader.properties()? } else { Properties::none() };
            let codes = reader.take(reader.bytes.len())?.to_vec();
            if first >> 4 == 9 {
                Packet::Suback { packet_id, codes, properties }
            } else {
                Packet::Unsuback { packet_id, codes, properties }
            }
        }
        13 => Packet::Pingresp,
        14 => {
            ensure!(v5, "a server may not send DISCONNECT in MQTT 3.1.1");
            let (code, properties) = reader.reason(version)?;
            Packet::Disconnect { code, properties }
        }
        15 => {
            ensure!(v5, "there is no AUTH in MQTT 3.1.1");
            let (code, properties) = reader.reason(version)?;
            Packet::Auth { code, properties }
        }
        other => bail!("a server may not send packet type {other}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_written_as_in_the_specification() {
        for (value, bytes) in [
            (0, &[0][..]),
            (127, &[0x7f]),
            (128, &[0x80, 1]),
            (16_383, &[0xff, 0x7f]),
            (16_384, &[0x80, 0x80, 1]),
            (268_435_455, &[0xff, 0xff, 0xff, 0x7f]),
        ] {
            let mut out = Vec::new();
            variable(&mut out, value);
            assert_eq!(out, bytes);
            assert_eq!(read_variable(bytes).unwrap(), Some((value, bytes.len())));
        }
        assert_eq!(read_variable(&[0x80, 0x80]).unwrap(), None);
        assert!(read_variable(&[0x80, 0x80, 0x80, 0x80]).is_err());
    }

    #[test]
    fn a_publish_comes_back_as_it_went() {
        for version in [Version::V4, Version::V5] {
            for qos in 0..=2 {
                let mut sent = Publish::new("chat/bob/inbox", "hello".as_bytes(), qos);
                sent.packet_id = if qos > 0 { 7 } else { 0 };
                sent.retain = true;
                if version == Version::V5 {
                    sent.properties = Properties::none().with_user("seq", "1").with(id::TOPIC_ALIAS, Value::U16(3));
                }
                let bytes = publish(version, &sent);
                assert_eq!(decode(version, &bytes[..bytes.len() - 1]).unwrap(), None);
                assert_eq!(decode(version, &bytes).unwrap(), Some((Packet::Publish(sent), bytes.len())));
            }
        }
    }
}
