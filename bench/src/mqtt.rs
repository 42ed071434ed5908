//! The few MQTT packets that a load generator writes and reads, for MQTT 3.1.1 and 5. Knows bytes, not sockets.
//!
//! Our own, because a client library does more per packet than a server under measurement does, on the same processors.

use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Version {
    /// MQTT 3.1.1.
    #[value(name = "4")]
    V4,
    /// MQTT 5.
    #[value(name = "5")]
    V5,
}

impl Version {
    pub(crate) fn level(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V5 => 5,
        }
    }
}

/// What a broker sends, as far as anybody here wants to know.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Packet<'a> {
    /// `receive_maximum`: how many QoS 1 publishes the broker takes unacknowledged, where it says so.
    ConnAck {
        code: u8,
        receive_maximum: Option<u16>,
    },
    SubAck {
        id: u16,
        code: u8,
    },
    /// `id` is there from QoS 1 on.
    Publish {
        id: Option<u16>,
        topic: &'a [u8],
        payload: &'a [u8],
    },
    PubAck {
        id: u16,
        code: u8,
    },
    PingResp,
    Disconnect {
        code: u8,
    },
}

/// Bytes that are no packet of these.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(&'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the broker sent what cannot be read: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

/// Longest text that MQTT can carry in a string, and longest packet.
pub(crate) const STRING_BYTES_MAX: usize = 65_535;
const REMAINING_BYTES_MAX: usize = 268_435_455;

/// CONNECT of a clean session without keep alive: runs are short, and an idle pair is not worth a timer.
pub(crate) fn connect(out: &mut Vec<u8>, version: Version, client: &str, user: &str) {
    const USER_NAME: u8 = 0x80;
    const CLEAN: u8 = 0x02;
    let properties: &[u8] = if version == Version::V5 { &[0] } else { &[] };
    header(out, 0x10, 10 + properties.len() + 2 + client.len() + 2 + user.len());
    string(out, "MQTT");
    out.extend_from_slice(&[version.level(), USER_NAME | CLEAN, 0, 0]);
    out.extend_from_slice(properties);
    string(out, client);
    string(out, user);
}

pub(crate) fn subscribe(out: &mut Vec<u8>, version: Version, id: u16, filter: &str, qos: u8) {
    let properties: &[u8] = if version == Version::V5 { &[0] } else { &[] };
    header(out, 0x82, 2 + properties.len() + 2 + filter.len() + 1);
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(properties);
    string(out, filter);
    out.push(qos);
}

/// Where in a PUBLISH its packet identifier and its payload begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PublishOffsets {
    /// From QoS 1 on.
    pub(crate) id: Option<usize>,
    pub(crate) payload: usize,
}

/// Says where what changes from message to message was put, so that one packet can be copied and stamped again and again.
pub(crate) fn publish(
    out: &mut Vec<u8>,
    version: Version,
    topic: &str,
    id: Option<u16>,
    payload: &[u8],
) -> PublishOffsets {
    let properties: &[u8] = if version == Version::V5 { &[0] } else { &[] };
    let begins = out.len();
    let first = if id.is_some() { 0x32 } else { 0x30 };
    header(out, first, 2 + topic.len() + id.map_or(0, |_| 2) + properties.len() + payload.len());
    string(out, topic);
    let id_at = id.map(|id| {
        let at = out.len() - begins;
        out.extend_from_slice(&id.to_be_bytes());
        at
    });
    out.extend_from_slice(properties);
    let offsets = PublishOffsets { id: id_at, payload: out.len() - begins };
    out.extend_from_slice(payload);
    offsets
}

pub(crate) fn puback(out: &mut Vec<u8>, id: u16) {
    let [high, low] = id.to_be_bytes();
    out.extend_from_slice(&[0x40, 2, high, low]);
}

pub(crate) fn disconnect(out: &mut Vec<u8>) {
    out.extend_from_slice(&[0xE0, 0]);
}

/// The first packet in `bytes` and how many bytes it has; nothing as long as it is not all there.
pub(crate) fn decode(bytes: &[u8], version: Version) -> Result<Option<(Packet<'_>, usize)>, Malformed> {
    let Some((&first, rest)) = bytes.split_first() else { return Ok(None) };
    let Some((remaining, length_bytes)) = variable(rest)? else { return Ok(None) };
    let begins = 1 + length_bytes;
    let Some(body) = bytes.get(begins..begins + remaining) else { return Ok(None) };
    Ok(Some((packet(first, Reader(body), version)?, begins + remaining)))
}

fn packet(first: u8, mut body: Reader<'_>, version: Version) -> Result<Packet<'_>, Malformed> {
    let v5 = version == Version::V5;
    match first >> 4 {
        2 => {
            body.byte()?;
            let code = body.byte()?;
            let receive_maximum = if v5 { receive_maximum(body.properties()?)? } else { None };
            Ok(Packet::ConnAck { code, receive_maximum })
        }
        3 => {
            let topic = body.binary()?;
            let id = if first & 0x06 == 0 { None } else { Some(body.u16()?) };
            if v5 {
                body.properties()?;
            }
            Ok(Packet::Publish { id, topic, payload: body.0 })
        }
        4 => {
            let id = body.u16()?;
            // MQTT 5 leaves out a reason of 0.
            let code = if v5 && !body.0.is_empty() { body.byte()? } else { 0 };
            Ok(Packet::PubAck { id, code })
        }
        9 => {
            let id = body.u16()?;
            if v5 {
                body.properties()?;
            }
            Ok(Packet::SubAck { id, code: body.byte()? })
        }
        13 => Ok(Packet::PingResp),
        14 => Ok(Packet::Disconnect { code: if body.0.is_empty() { 0 } else { body.byte()? } }),
        _ => Err(Malformed("a packet that no broker sends to such a client")),
    }
}

fn receive_maximum(properties: &[u8]) -> Result<Option<u16>, Malformed> {
    let mut properties = Reader(properties);
    while !properties.0.is_empty() {
        match properties.byte()? {
            0x21 => return properties.u16().map(Some),
            0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28 | 0x29 | 0x2A => _ = properties.take(1)?,
            0x13 | 0x22 | 0x23 => _ = properties.take(2)?,
            0x02 | 0x11 | 0x18 | 0x27 => _ = properties.take(4)?,
            0x03 | 0x08 | 0x09 | 0x12 | 0x15 | 0x16 | 0x1A | 0x1C | 0x1F => _ = properties.binary()?,
            0x26 => {
                properties.binary()?;
                properties.binary()?;
            }
            _ => return Err(Malformed("an unknown property")),
        }
    }
    Ok(None)
}

fn header(out: &mut Vec<u8>, first: u8, remaining: usize) {
    assert!(remaining <= REMAINING_BYTES_MAX, "a packet of {remaining} bytes");
    out.push(first);
    let mut rest = remaining;
    loop {
        let seven = rest.to_le_bytes()[0] & 0x7F;
        rest >>= 7;
        if rest == 0 {
            out.push(seven);
            return;
        }
        out.push(seven | 0x80);
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    // Callers check what people can choose; nothing else here comes near.
    let length = u16::try_from(text.len()).unwrap_or_else(|_| panic!("a string of {} bytes", text.len()));
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// A variable byte integer and how many bytes it has.
fn variable(bytes: &[u8]) -> Result<Option<(usize, usize)>, Malformed> {
    let mut value = 0;
    for (nth, byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7F) << (7 * nth);
        if byte & 0x80 == 0 {
            return Ok(Some((value, nth + 1)));
        }
    }
    if bytes.len() >= 4 { Err(Malformed("a length of more than four bytes")) } else { Ok(None) }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(Malformed("a packet is too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Malformed> {
        let (&byte, rest) = self.0.split_first().ok_or(Malformed("a packet is too short"))?;
        self.0 = rest;
        Ok(byte)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes([self.byte()?, self.byte()?]))
    }

    fn binary(&mut self) -> Result<&'a [u8], Malformed> {
        let bytes = self.u16()?;
        self.take(bytes.into())
    }

    fn properties(&mut self) -> Result<&'a [u8], Malformed> {
        let (bytes, length_bytes) = variable(self.0)?.ok_or(Malformed("a packet is too short"))?;
        self.take(length_bytes)?;
        self.take(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSIONS: [Version; 2] = [Version::V4, Version::V5];

    #[test]
    fn a_publish_comes_back_as_it_was_written() {
        for version in VERSIONS {
            // Lengths around the steps of the variable byte integer.
            for bytes in [0, 1, 100, 127, 128, 129, 16_383, 16_384, 70_000] {
                for id in [None, Some(1), Some(65_535)] {
                    let payload = vec![b'x'; bytes];
                    let mut out = Vec::new();
                    let offsets = publish(&mut out, version, "a/b", id, &payload);
                    assert_eq!(&out[offsets.payload..], payload);
                    if let (Some(at), Some(id)) = (offsets.id, id) {
                        assert_eq!(out[at..at + 2], id.to_be_bytes());
                    }
                    let (packet, used) = decode(&out, version).unwrap().unwrap();
                    assert_eq!(packet, Packet::Publish { id, topic: b"a/b", payload: &payload });
                    assert_eq!(used, out.len());
                }
            }
        }
    }

    #[test]
    fn a_puback_comes_back_as_it_was_written() {
        for version in VERSIONS {
            let mut out = Vec::new();
            puback(&mut out, 4_711);
            assert_eq!(decode(&out, version), Ok(Some((Packet::PubAck { id: 4_711, code: 0 }, 4))));
        }
    }

    #[test]
    fn offsets_count_from_the_packet_and_not_from_the_buffer() {
        let mut out = b"before".to_vec();
        let offsets = publish(&mut out, Version::V4, "t", Some(258), b"payload");
        let packet = &out[6..];
        assert_eq!(&packet[offsets.payload..], b"payload");
        assert_eq!(offsets.id.map(|at| &packet[at..at + 2]), Some(&[1, 2][..]));
    }

    #[test]
    fn a_connect_is_as_the_standards_have_it() {
        let mut out = Vec::new();
        connect(&mut out, Version::V4, "c", "u");
        assert_eq!(out, [0x10, 16, 0, 4, b'M', b'Q', b'T', b'T', 4, 0x82, 0, 0, 0, 1, b'c', 0, 1, b'u']);
        out.clear();
        connect(&mut out, Version::V5, "c", "u");
        assert_eq!(out, [0x10, 17, 0, 4, b'M', b'Q', b'T', b'T', 5, 0x82, 0, 0, 0, 0, 1, b'c', 0, 1, b'u']);
    }

    #[test]
    fn a_subscribe_is_as_the_standards_have_it() {
        let mut out = Vec::new();
        subscribe(&mut out, Version::V4, 7, "a/#", 1);
        assert_eq!(out, [0x82, 8, 0, 7, 0, 3, b'a', b'/', b'#', 1]);
        out.clear();
        subscribe(&mut out, Version::V5, 7, "a/#", 1);
        assert_eq!(out, [0x82, 9, 0, 7, 0, 0, 3, b'a', b'/', b'#', 1]);
    }

    #[test]
    fn answers_are_read() {
        let read = |bytes: &[u8], version| match decode(bytes, version).unwrap().unwrap() {
            (Packet::ConnAck { code, receive_maximum }, _) => (2, u16::from(code), receive_maximum.unwrap_or(0)),
            (Packet::SubAck { id, code }, _) => (9, id, code.into()),
            (Packet::PubAck { id, code }, _) => (4, id, code.into()),
            (Packet::Disconnect { code }, _) => (14, code.into(), 0),
            (Packet::PingResp, _) => (13, 0, 0),
            (Packet::Publish { .. }, _) => (3, 0, 0),
        };
        assert_eq!(read(&[0x20, 2, 0, 5], Version::V4), (2, 5, 0));
        assert_eq!(read(&[0x20, 3, 0, 0, 0], Version::V5), (2, 0, 0));
        // A session expiry and a user property before the Receive Maximum, and a flag behind it.
        let connack = [0x20, 20, 0, 0, 17, 0x11, 0, 0, 0, 9, 0x26, 0, 1, b'k', 0, 1, b'v', 0x21, 0, 64, 0x25, 1];
        assert_eq!(read(&connack, Version::V5), (2, 0, 64));
        assert_eq!(read(&[0x90, 3, 0, 7, 0x80], Version::V4), (9, 7, 0x80));
        assert_eq!(read(&[0x90, 4, 0, 7, 0, 1], Version::V5), (9, 7, 1));
        assert_eq!(read(&[0x40, 3, 0, 7, 0x10], Version::V5), (4, 7, 0x10));
        assert_eq!(read(&[0x40, 4, 0, 7, 0x87, 0], Version::V5), (4, 7, 0x87));
        assert_eq!(read(&[0xE0, 1, 0x8E], Version::V5), (14, 0x8E, 0));
        assert_eq!(read(&[0xE0, 0], Version::V5), (14, 0, 0));
        assert_eq!(read(&[0xD0, 0], Version::V4), (13, 0, 0));
    }

    #[test]
    fn properties_of_a_publish_are_no_payload() {
        let bytes = [0x32, 13, 0, 1, b't', 0, 9, 5, 0x02, 0, 0, 0, 1, b'h', b'i'];
        let packet = Packet::Publish { id: Some(9), topic: b"t", payload: b"hi" };
        assert_eq!(decode(&bytes, Version::V5), Ok(Some((packet, 15))));
    }

    #[test]
    fn a_cut_packet_is_waited_for_wherever_it_is_cut() {
        for version in VERSIONS {
            let mut out = Vec::new();
            publish(&mut out, version, "a/topic", Some(3), &[b'x'; 300]);
            let whole = out.len();
            puback(&mut out, 4);
            for cut in 0..whole {
                assert_eq!(decode(&out[..cut], version), Ok(None), "cut at {cut}");
            }
            let (_, used) = decode(&out, version).unwrap().unwrap();
            assert_eq!(used, whole);
            assert_eq!(decode(&out[used..], version), Ok(Some((Packet::PubAck { id: 4, code: 0 }, 4))));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(decode(&[0x32, 0x80, 0x80, 0x80, 0x80, 1], Version::V4).is_err());
        assert!(decode(&[0x32, 2, 0, 9], Version::V4).is_err());
        assert!(decode(&[0x10, 0], Version::V4).is_err());
        assert!(decode(&[0x40, 1, 0], Version::V4).is_err());
        assert!(decode(&[0x32, 6, 0, 1, b't', 0, 9, 5], Version::V5).is_err());
    }
}
