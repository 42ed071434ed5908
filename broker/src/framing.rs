//! Where one packet ends and the next begins, and what a fixed header must look like.
//!
//! The protocol engine takes bytes as they come and does not look at reserved bits; MQTT asks a server to [MQTT-2.1.3-1], [MQTT-3.1.2-3].
//! Looking at the first byte also ends a connection that speaks something else (HTTP, TLS) at once, rather than at a deadline.

/// Why bytes are not read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// The fixed header, or CONNECT's flags, are not MQTT.
    NotMqtt,
    /// It is MQTT, but neither 3.1.1 nor 5.
    ProtocolLevel,
    /// It announces more than [`Framing::bound`] allows.
    TooLong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Header,
    Length { kind: u8, shift: u32, length: u32 },
    Body { kind: u8, at: u32, length: u32 },
}

/// Follows the packets of one connection.
#[derive(Debug)]
pub(crate) struct Framing {
    state: State,
    body_bytes_max: u32,
}

const CONNECT: u8 = 1;
/// Index of the protocol's level in CONNECT: behind the length of its name and the name.
const CONNECT_LEVEL_AT: u32 = 6;
/// Index of the flags in CONNECT.
const CONNECT_FLAGS_AT: u32 = 7;
/// MQTT 3.1.1 and 5.
const LEVELS: [u8; 2] = [4, 5];

impl Framing {
    pub(crate) fn new() -> Self {
        Self { state: State::Header, body_bytes_max: u32::MAX }
    }

    /// From the next packet on none may be longer, its fixed header not counted.
    pub(crate) fn bound(&mut self, body_bytes_max: u32) {
        self.body_bytes_max = body_bytes_max;
    }

    /// Whether the last packet is complete, and nothing of the next one is here.
    pub(crate) fn is_between_packets(&self) -> bool {
        self.state == State::Header
    }

    /// How many of these bytes belong to the packet that is under way, at least one of at least one.
    pub(crate) fn advance(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        let mut taken = 0;
        while taken < bytes.len() {
            match self.state {
                State::Header => {
                    let first = bytes[taken];
                    if !is_valid_header(first) {
                        return Err(Malformed::NotMqtt);
                    }
                    self.state = State::Length { kind: first >> 4, shift: 0, length: 0 };
                    taken += 1;
                }
                State::Length { kind, shift, length } => {
                    let byte = bytes[taken];
                    taken += 1;
                    let length = length | (u32::from(byte & 0x7f) << shift);
                    if byte & 0x80 == 0 {
                        if length == 0 {
                            self.state = State::Header;
                            return Ok(taken);
                        }
                        if length > self.body_bytes_max {
                            return Err(Malformed::TooLong);
                        }
                        self.state = State::Body { kind, at: 0, length };
                    } else if shift == 21 {
                        return Err(Malformed::NotMqtt);
                    } else {
                        self.state = State::Length { kind, shift: shift + 7, length };
                    }
                }
                State::Body { kind, at, length } => {
                    let here = u32::try_from(bytes.len() - taken).unwrap_or(u32::MAX).min(length - at);
                    if kind == CONNECT {
                        let byte_at = |wanted: u32| {
                            let index = usize::try_from(wanted.checked_sub(at)?).ok()?;
                            (wanted < at + here).then(|| bytes[taken + index])
                        };
                        // MQTT 3.1 has a name of six characters: what stands here is one of them.
                        if byte_at(CONNECT_LEVEL_AT).is_some_and(|level| !LEVELS.contains(&level)) {
                            return Err(Malformed::ProtocolLevel);
                        }
                        if byte_at(CONNECT_FLAGS_AT).is_some_and(|flags| !are_valid_connect_flags(flags)) {
                            return Err(Malformed::NotMqtt);
                        }
                    }
                    taken += usize::try_from(here).unwrap_or(0);
                    if at + here == length {
                        self.state = State::Header;
                        return Ok(taken);
                    }
                    self.state = State::Body { kind, at: at + here, length };
                }
            }
        }
        Ok(taken)
    }
}

fn is_valid_header(first: u8) -> bool {
    let flags = first & 0x0f;
    match first >> 4 {
        0 => false,
        // PUBLISH: QoS 3 does not exist.
        3 => flags & 0b0110 != 0b0110,
        // PUBREL, SUBSCRIBE, UNSUBSCRIBE.
        6 | 8 | 10 => flags == 0b0010,
        _ => flags == 0,
    }
}

fn are_valid_connect_flags(flags: u8) -> bool {
    let will = flags & 0b0000_0100 != 0;
    let will_qos = (flags >> 3) & 0b11;
    let will_retain = flags & 0b0010_0000 != 0;
    flags & 1 == 0 && will_qos != 3 && (will || (will_qos == 0 && !will_retain))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONNECT_PACKET: [u8; 15] = [0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 60, 0, 1, b'a'];

    fn packets(bytes: &[u8], cuts: &[usize]) -> Result<Vec<usize>, Malformed> {
        let mut framing = Framing::new();
        let mut lengths = vec![0];
        let mut at = 0;
        let mut cuts = cuts.iter().copied().cycle();
        while at < bytes.len() {
            let chunk_end = (at + cuts.next().unwrap_or(bytes.len()).max(1)).min(bytes.len());
            while at < chunk_end {
                let taken = framing.advance(&bytes[at..chunk_end])?;
                at += taken;
                *lengths.last_mut().expect("never empty") += taken;
                if framing.is_between_packets() {
                    lengths.push(0);
                }
            }
        }
        Ok(lengths)
    }

    #[test]
    fn reserved_bits_are_looked_at() {
        for first in [0x00, 0x11, 0x36, 0x3e, 0x41, 0x60, 0x63, 0x80, 0xa0, 0xc1, 0xe2, b'G'] {
            assert_eq!(Framing::new().advance(&[first, 0]), Err(Malformed::NotMqtt), "{first:#x}");
        }
        for first in [0x10, 0x30, 0x32, 0x34, 0x3d, 0x40, 0x62, 0x82, 0xa2, 0xc0, 0xe0, 0xf0] {
            assert_eq!(Framing::new().advance(&[first, 0]), Ok(2), "{first:#x}");
        }
        for flags in [0x03, 0x1e, 0x0a, 0x22] {
            let mut connect = CONNECT_PACKET;
            connect[9] = flags;
            assert_eq!(Framing::new().advance(&connect), Err(Malformed::NotMqtt), "{flags:#x}");
        }
    }

    #[test]
    fn a_length_has_at_most_four_bytes() {
        assert_eq!(Framing::new().advance(&[0x30, 0x80, 0x80, 0x80, 0x80]), Err(Malformed::NotMqtt));
        assert_eq!(Framing::new().advance(&[0x30, 0xff, 0xff, 0xff, 0x7f, 0]), Ok(6));
    }

    #[test]
    fn an_announced_length_is_judged_before_its_bytes_come() {
        let mut framing = Framing::new();
        framing.bound(300);
        assert_eq!(framing.advance(&[0x10, 0xad, 0x02]), Err(Malformed::TooLong));
        let mut framing = Framing::new();
        framing.bound(300);
        assert_eq!(framing.advance(&[0x10, 0xac, 0x02]), Ok(3));
        assert!(!framing.is_between_packets());
    }

    proptest! {
        #[test]
        fn packets_are_found_however_the_stream_is_cut(cuts in prop::collection::vec(1usize..9, 1..9)) {
            let stream = [&CONNECT_PACKET[..], &[0xc0, 0], &[0x30, 5, 0, 1, b'a', b'x', b'y'], &[0xe0, 0]].concat();
            prop_assert_eq!(packets(&stream, &cuts), Ok(vec![15, 2, 7, 2, 0]));
            let mut hostile = CONNECT_PACKET;
            hostile[9] |= 1;
            prop_assert_eq!(packets(&hostile, &cuts), Err(Malformed::NotMqtt));
        }

        #[test]
        fn any_bytes_move_on_or_end(bytes: Vec<u8>) {
            drop(packets(&bytes, &[3, 1, 7]));
        }
    }
}
