//! A CONNECT packet as bytes, before the protocol engine sees it.
//!
//! The engine panics at a Topic Alias Maximum of 0, which says the same as none. Pure, and takes any bytes.

const V5: u8 = 5;
/// Of the protocol's level, behind its name.
const LEVEL_AT: usize = 6;
/// Of the properties' length, behind level, flags and keep alive.
const PROPERTIES_AT: usize = 10;
const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;

/// Makes a Topic Alias Maximum of 0 one of 1; `true` if it did, and then none may be used. `packet` is whole, with its fixed header.
pub(crate) fn raise_topic_alias_maximum(packet: &mut [u8]) -> bool {
    let Some(at) = topic_alias_maximum_at(packet) else { return false };
    let Some(value) = packet.get_mut(at..at + 2) else { return false };
    let is_zero = value == [0, 0];
    if is_zero {
        value.copy_from_slice(&[0, 1]);
    }
    is_zero
}

/// Where its value stands, if every property before it can be understood.
fn topic_alias_maximum_at(packet: &[u8]) -> Option<usize> {
    let (_, begin) = variable_byte_integer(packet, 1)?;
    if *packet.get(begin + LEVEL_AT)? != V5 {
        return None;
    }
    let (length, mut at) = variable_byte_integer(packet, begin + PROPERTIES_AT)?;
    let end = at.checked_add(length)?.min(packet.len());
    while at < end {
        let property = packet[at];
        at += 1;
        at += match property {
            TOPIC_ALIAS_MAXIMUM => return Some(at),
            0x17 | 0x19 => 1,
            0x21 => 2,
            0x11 | 0x27 => 4,
            0x15 | 0x16 => string_bytes(packet, at)?,
            0x26 => {
                let key = string_bytes(packet, at)?;
                key + string_bytes(packet, at + key)?
            }
            _ => return None,
        };
    }
    None
}

/// With its length.
fn string_bytes(packet: &[u8], at: usize) -> Option<usize> {
    let length = packet.get(at..at + 2)?;
    Some(2 + usize::from(u16::from_be_bytes(length.try_into().ok()?)))
}

/// Its value, and where it ends.
fn variable_byte_integer(packet: &[u8], begin: usize) -> Option<(usize, usize)> {
    let mut value = 0;
    for (index, byte) in packet.get(begin..)?.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, begin + index + 1));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// CONNECT of MQTT 5 with these properties.
    fn connect(properties: &[u8]) -> Vec<u8> {
        let mut body = [&[0, 4][..], b"MQTT", &[5, 2, 0, 60]].concat();
        body.push(u8::try_from(properties.len()).unwrap());
        body.extend(properties);
        body.extend([0, 1, b'a']);
        [&[0x10, u8::try_from(body.len()).unwrap()], &body[..]].concat()
    }

    #[test]
    fn a_maximum_of_0_is_raised_wherever_it_stands() {
        let others = [0x11, 0, 0, 0, 9, 0x26, 0, 1, 0x22, 0, 1, 0, 0x21, 0, 5, 0x15, 0, 1, b'J', 0x16, 0, 0, 0x17, 1];
        for (before, after) in [(&[][..], &others[..]), (&others, &[]), (&others, &others)] {
            let properties = |value: u8| [before, &[0x22, 0, value], after].concat();
            let mut packet = connect(&properties(0));
            assert!(raise_topic_alias_maximum(&mut packet));
            assert_eq!(packet, connect(&properties(1)));
            assert!(!raise_topic_alias_maximum(&mut packet));
        }
        for untouched in [&[][..], &[0x22, 1, 0], &others, &[0x22, 0], &[0x99, 0x22, 0, 0]] {
            let mut packet = connect(untouched);
            raise_topic_alias_maximum(&mut packet[..]);
            let before = connect(untouched);
            assert!(packet == before || untouched == [0x22, 0], "{untouched:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_will_do(bytes: Vec<u8>, properties in prop::collection::vec(any::<u8>(), 0..60)) {
            raise_topic_alias_maximum(&mut bytes.clone());
            let mut packet = connect(&properties);
            let before = packet.clone();
            let raised = raise_topic_alias_maximum(&mut packet);
            let changed = packet.iter().zip(&before).filter(|(one, other)| one != other).count();
            prop_assert_eq!(changed, usize::from(raised));
        }
    }
}
