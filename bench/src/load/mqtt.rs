//! As much of MQTT 3.1.1 and 5 as a load generator needs, written straight into and read straight out of buffers.
//!
//! Quality of service 1 throughout; packet identifiers are the caller's. Pure: no socket.

use anyhow::{Context, Result, bail, ensure};

/// Seconds of silence that clients promise not to exceed: longer than a run lasts, as nobody pings.
const KEEP_ALIVE_S: u16 = 3_600;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    V4,
    V5,
}

impl std::str::FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "4" | "3.1.1" => Ok(Self::V4),
            "5" => Ok(Self::V5),
            _ => Err("it is 4 (for MQTT 3.1.1) or 5".to_owned()),
        }
    }
}

/// A packet from the broker; payloads lie in the buffer that was read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Packet<'a> {
    Connack { session_present: bool },
    Suback,
    Puback { packet_id: u16 },
    Publish { qos: u8, again: bool, packet_id: u16, topic: &'a [u8], payload: &'a [u8] },
    Other,
}

/// Whether the broker is to remember a client that is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Session {
    /// It begins anew and ends with the connection.
    Clean,
    /// It goes on, and outlives the connection.
    Persistent,
}

/// As whom a client comes.
#[derive(Clone, Debug)]
pub(crate) struct Login {
    pub(crate) client_id: String,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<String>,
}

pub(crate) fn connect(out: &mut Vec<u8>, version: Version, login: &Login, session: Session) -> Result<()> {
    const USER_NAME: u8 = 0b1000_0000;
    const PASSWORD: u8 = 0b0100_0000;
    const CLEAN_START: u8 = 0b0000_0010;
    let mut flags = 0;
    flags |= if login.user.is_some() { USER_NAME } else { 0 };
    flags |= if login.password.is_some() { PASSWORD } else { 0 };
    flags |= if session == Session::Clean { CLEAN_START } else { 0 };
    let level = if version == Version::V5 { 5 } else { 4 };
    let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', level, flags];
    body.extend_from_slice(&KEEP_ALIVE_S.to_be_bytes());
    match (version, session) {
        // An hour: as long as nobody ends it.
        (Version::V5, Session::Persistent) => body.extend_from_slice(&[5, 0x11, 0, 0, 0x0e, 0x10]),
        _ => no_properties(&mut body, version),
    }
    string(&mut body, &login.client_id)?;
    for text in login.user.iter().chain(&login.password) {
        string(&mut body, text)?;
    }
    packet(out, 0x10, &body)
}

pub(crate) fn subscribe(out: &mut Vec<u8>, version: Version, filters: &[&str]) -> Result<()> {
    let mut body = vec![0, 1];
    no_properties(&mut body, version);
    for filter in filters {
        string(&mut body, filter)?;
        body.push(1);
    }
    packet(out, 0x82, &body)
}

pub(crate) fn publish(out: &mut Vec<u8>, version: Version, topic: &str, packet_id: u16, payload: &[u8]) -> Result<()> {
    out.push(0x32);
    let properties = usize::from(version == Version::V5);
    length(out, 2 + topic.len() + 2 + properties + payload.len())?;
    string(out, topic)?;
    out.extend_from_slice(&packet_id.to_be_bytes());
    no_properties(out, version);
    out.extend_from_slice(payload);
    Ok(())
}

pub(crate) fn puback(out: &mut Vec<u8>, packet_id: u16) {
    out.extend_from_slice(&[0x40, 2]);
    out.extend_from_slice(&packet_id.to_be_bytes());
}

pub(crate) fn disconnect(out: &mut Vec<u8>) {
    out.extend_from_slice(&[0xe0, 0]);
}

/// The first packet of a buffer and its length; `None` if it is not whole yet. A refusal is an error.
pub(crate) fn read(buffer: &[u8], version: Version) -> Result<Option<(Packet<'_>, usize)>> {
    let Some((first, rest)) = buffer.split_first() else { return Ok(None) };
    let Some((remaining, length_bytes)) = read_length(rest)? else { return Ok(None) };
    let Some(body) = rest.get(length_bytes..length_bytes + remaining) else { return Ok(None) };
    let taken = 1 + length_bytes + remaining;
    let packet = match first >> 4 {
        2 => {
            ensure!(body.get(1) == Some(&0), "the broker refused a connection: {body:02x?}");
            Packet::Connack { session_present: body[0] & 1 == 1 }
        }
        3 => read_publish(*first, body, version)?,
        4 => {
            // Only MQTT 5 has a reason, and only if it is not success.
            if let Some(reason @ 0x80..) = body.get(2) {
                bail!("the broker refused a publish: reason 0x{reason:02x}");
            }
            Packet::Puback { packet_id: u16_at(body, 0)? }
        }
        9 => {
            // Behind the packet identifier, and in MQTT 5 properties, is a code for each filter.
            let properties = if version == Version::V5 {
                let (length, bytes) =
                    read_length(body.get(2..).unwrap_or_default())?.context("a SUBACK is cut short")?;
                length + bytes
            } else {
                0
            };
            let codes = body.get(2 + properties..).context("a SUBACK is cut short")?;
            let granted = !codes.is_empty() && codes.iter().all(|code| *code == 1);
            ensure!(granted, "the broker refused a subscription: {body:02x?}");
            Packet::Suback
        }
        14 => bail!("the broker ended a connection: {body:02x?}"),
        _ => Packet::Other,
    };
    Ok(Some((packet, taken)))
}

fn read_publish(first: u8, body: &[u8], version: Version) -> Result<Packet<'_>> {
    let qos = (first >> 1) & 3;
    let again = first & 0b1000 != 0;
    let mut at = 2 + usize::from(u16_at(body, 0)?);
    let topic = body.get(2..at).context("a publish is cut short")?;
    let packet_id = if qos > 0 {
        at += 2;
        u16_at(body, at - 2)?
    } else {
        0
    };
    if version == Version::V5 {
        let rest = body.get(at..).context("a publish is cut short")?;
        let (properties, bytes) = read_length(rest)?.context("a publish is cut short")?;
        at += properties + bytes;
    }
    Ok(Packet::Publish { qos, again, packet_id, topic, payload: body.get(at..).context("a publish is cut short")? })
}

/// Bytes of the first packet of a buffer that holds whole packets.
pub(crate) fn first_packet_bytes(buffer: &[u8]) -> Result<usize> {
    let (remaining, length_bytes) = read_length(buffer.get(1..).unwrap_or_default())?.context("no whole packet")?;
    Ok(1 + length_bytes + remaining)
}

/// A variable byte integer and how many bytes it took; `None` if it is not whole yet.
fn read_length(bytes: &[u8]) -> Result<Option<(usize, usize)>> {
    let mut length = 0;
    for (nth, byte) in bytes.iter().take(4).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * nth);
        if byte & 0x80 == 0 {
            return Ok(Some((length, nth + 1)));
        }
    }
    ensure!(bytes.len() < 4, "a length of more than four bytes");
    Ok(None)
}

fn u16_at(body: &[u8], at: usize) -> Result<u16> {
    let bytes = body.get(at..at + 2).context("a packet is cut short")?;
    Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
}

fn packet(out: &mut Vec<u8>, first: u8, body: &[u8]) -> Result<()> {
    out.push(first);
    length(out, body.len())?;
    out.extend_from_slice(body);
    Ok(())
}

fn length(out: &mut Vec<u8>, mut length: usize) -> Result<()> {
    ensure!(length < 1 << 28, "a packet of {length} bytes");
    loop {
        let low = length.to_le_bytes()[0] & 0x7f;
        length >>= 7;
        if length == 0 {
            out.push(low);
            return Ok(());
        }
        out.push(low | 0x80);
    }
}

fn string(out: &mut Vec<u8>, text: &str) -> Result<()> {
    out.extend_from_slice(&u16::try_from(text.len()).context("a string is too long")?.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

fn no_properties(out: &mut Vec<u8>, version: Version) {
    if version == Version::V5 {
        out.push(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publish_comes_back_however_it_is_cut() {
        for (version, payload) in [(Version::V4, vec![b'x'; 300]), (Version::V5, b"hello".to_vec())] {
            let mut bytes = Vec::new();
            publish(&mut bytes, version, "chat/bob/inbox", 77, &payload).unwrap();
            for cut in 0..bytes.len() {
                assert_eq!(read(&bytes[..cut], version).unwrap(), None, "cut at {cut}");
            }
            let whole = bytes.len();
            puback(&mut bytes, 5);
            let topic = b"chat/bob/inbox";
            let expected = Packet::Publish { qos: 1, again: false, packet_id: 77, topic, payload: &payload };
            assert_eq!(first_packet_bytes(&bytes).unwrap(), whole);
            assert_eq!(read(&bytes, version).unwrap(), Some((expected, whole)));
            assert_eq!(read(&bytes[whole..], version).unwrap(), Some((Packet::Puback { packet_id: 5 }, 4)));
        }
    }

    #[test]
    fn refusals_are_errors() {
        for refusal in [&[0x20, 2, 0, 5][..], &[0x90, 3, 0, 1, 0x80], &[0x40, 3, 0, 1, 0x97], &[0xe0, 1, 0x8b]] {
            assert!(read(refusal, Version::V5).is_err(), "{refusal:02x?}");
        }
        assert_eq!(read(&[0x40, 3, 0, 1, 0x10], Version::V5).unwrap(), Some((Packet::Puback { packet_id: 1 }, 5)));
    }

    #[test]
    fn what_comes_again_says_so() {
        let mut bytes = Vec::new();
        publish(&mut bytes, Version::V4, "t", 1, b"x").unwrap();
        bytes[0] |= 0b1000;
        let (packet, _) = read(&bytes, Version::V4).unwrap().unwrap();
        assert!(matches!(packet, Packet::Publish { again: true, .. }), "{packet:?}");
    }

    #[test]
    fn connects_and_subscribes_are_as_specified() {
        let login = |user: Option<&str>, password: Option<&str>| Login {
            client_id: "c".to_owned(),
            user: user.map(str::to_owned),
            password: password.map(str::to_owned),
        };
        let mut bytes = Vec::new();
        connect(&mut bytes, Version::V5, &login(Some("u"), None), Session::Clean).unwrap();
        assert_eq!(bytes, [0x10, 17, 0, 4, b'M', b'Q', b'T', b'T', 5, 0x82, 0x0e, 0x10, 0, 0, 1, b'c', 0, 1, b'u']);
        bytes.clear();
        connect(&mut bytes, Version::V4, &login(Some("u"), Some("p")), Session::Persistent).unwrap();
        let expected = [0, 4, b'M', b'Q', b'T', b'T', 4, 0xc0, 0x0e, 0x10, 0, 1, b'c', 0, 1, b'u', 0, 1, b'p'];
        assert_eq!(bytes, [&[0x10, 19][..], &expected].concat());
        bytes.clear();
        connect(&mut bytes, Version::V5, &login(None, None), Session::Persistent).unwrap();
        let expected = [0, 4, b'M', b'Q', b'T', b'T', 5, 0, 0x0e, 0x10, 5, 0x11, 0, 0, 0x0e, 0x10, 0, 1, b'c'];
        assert_eq!(bytes, [&[0x10, 19][..], &expected].concat());
        bytes.clear();
        subscribe(&mut bytes, Version::V4, &["a/#", "b"]).unwrap();
        assert_eq!(bytes, [0x82, 12, 0, 1, 0, 3, b'a', b'/', b'#', 1, 0, 1, b'b', 1]);
    }

    #[test]
    fn each_filter_has_to_be_granted() {
        assert_eq!(read(&[0x90, 4, 0, 1, 1, 1], Version::V4).unwrap(), Some((Packet::Suback, 6)));
        assert!(read(&[0x90, 4, 0, 1, 0x80, 1], Version::V4).is_err());
        assert_eq!(read(&[0x90, 4, 0, 1, 0, 1], Version::V5).unwrap(), Some((Packet::Suback, 6)));
    }
}
