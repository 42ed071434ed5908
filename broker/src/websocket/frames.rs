//! The frames of one WebSocket client (RFC 6455), followed as they come: a pure state machine that keeps a header, and no payload but a ping's.
//!
//! MQTT asks for the bytes of messages in order and for nothing else [MQTT-6.0.0-2], so a payload is unmasked where it lies. A frame may announce
//! what it likes: no memory is taken on its word, and whoever announces too much is told at once. Nothing is ever decompressed: no extension
//! is negotiated, so the bits that would say "compressed" are a protocol error.

use std::time::{Duration, Instant};

/// Frames that one message may be cut into. Small devices send 1 KiB a frame.
const FRAGMENTS_MAX: u32 = 4_096;
/// Frames that carry nothing for MQTT (pings, pongs, empty ones), and may come in [`IDLE_FRAMES_PERIOD`].
const IDLE_FRAMES_MAX: u32 = 100;
const IDLE_FRAMES_PERIOD: Duration = Duration::from_secs(1);
/// The most that a control frame carries [RFC 6455, 5.5].
const CONTROL_BYTES_MAX: usize = 125;
/// Two bytes, eight of a long length, four of the mask.
const HEADER_BYTES_MAX: usize = 14;

const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xA;

/// The server's side is done.
pub(crate) const NORMAL_CLOSURE: u16 = 1000;

/// Why a client is not listened to any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It does not speak the protocol.
    Protocol(&'static str),
    /// It sends text [MQTT-6.0.0-1].
    Text,
    /// It sends more frames than anybody needs.
    Flood(&'static str),
    /// Its message is too long.
    TooLong,
}

impl Fault {
    /// The code for the Close frame.
    pub(crate) fn code(self) -> u16 {
        match self {
            Self::Protocol(_) => 1002,
            Self::Text => 1003,
            Self::Flood(_) => 1008,
            Self::TooLong => 1009,
        }
    }

    /// A sentence for it, shorter than a control frame.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Protocol(reason) | Self::Flood(reason) => reason,
            Self::Text => "MQTT over WebSocket uses binary messages [MQTT-6.0.0-1]",
            Self::TooLong => "the message is longer than the server takes",
        }
    }
}

/// How a client's frames end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It closes, for this reason if it gave one.
    Closed(Option<u16>),
    /// It has to be closed.
    Fault(Fault),
}

/// What a piece of the stream held.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Decoded {
    /// So many bytes of payload, now at the beginning of the piece.
    pub(crate) bytes: usize,
    /// The last ping; earlier ones need no answer any more [RFC 6455, 5.5.3].
    pub(crate) ping: Option<Vec<u8>>,
    /// Nothing behind it is looked at.
    pub(crate) ending: Option<Ending>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Message,
    Close,
    Ping,
    Pong,
}

#[derive(Debug)]
enum State {
    Header,
    Payload { kind: Kind, mask: [u8; 4], left: u64 },
    Ended,
}

/// A message whose last frame has not begun.
#[derive(Clone, Copy, Debug)]
struct Message {
    bytes: u64,
    frames: u32,
}

/// Follows the frames of one client.
#[derive(Debug)]
pub(crate) struct Frames {
    state: State,
    /// The header under way.
    header: [u8; HEADER_BYTES_MAX],
    header_bytes: usize,
    message: Option<Message>,
    message_bytes_max: u64,
    /// Payload of the control frame under way.
    control: Vec<u8>,
    idle_frames: u32,
    idle_since: Option<Instant>,
}

impl Frames {
    /// `message_bytes_max`: of one message, in however many frames.
    pub(crate) fn new(message_bytes_max: u64) -> Self {
        Self {
            state: State::Header,
            header: [0; HEADER_BYTES_MAX],
            header_bytes: 0,
            message: None,
            message_bytes_max,
            control: Vec::new(),
            idle_frames: 0,
            idle_since: None,
        }
    }

    /// Takes the next piece of the stream in, and moves the payload in it to its beginning.
    pub(crate) fn decode(&mut self, piece: &mut [u8], now: Instant) -> Decoded {
        let mut decoded = Decoded::default();
        let ended = self.decode_into(piece, now, &mut decoded);
        if let Err(ending) = ended {
            self.state = State::Ended;
            decoded.ending = Some(ending);
        }
        decoded
    }

    fn decode_into(&mut self, piece: &mut [u8], now: Instant, decoded: &mut Decoded) -> Result<(), Ending> {
        let mut at = 0;
        loop {
            match &mut self.state {
                State::Ended => return Ok(()),
                State::Header => {
                    let Some(byte) = piece.get(at) else { return Ok(()) };
                    at += 1;
                    self.header[self.header_bytes] = *byte;
                    self.header_bytes += 1;
                    if let Some(state) = self.on_header_byte(now).map_err(Ending::Fault)? {
                        self.header_bytes = 0;
                        self.state = state;
                    }
                }
                State::Payload { kind, mask, left } => {
                    let here = usize::try_from(*left).unwrap_or(usize::MAX).min(piece.len() - at);
                    unmask(&mut piece[at..at + here], *mask);
                    mask.rotate_left(here % 4);
                    *left -= u64::try_from(here).unwrap_or(*left);
                    if *kind == Kind::Message {
                        piece.copy_within(at..at + here, decoded.bytes);
                        decoded.bytes += here;
                    } else {
                        self.control.extend_from_slice(&piece[at..at + here]);
                    }
                    at += here;
                    if *left > 0 {
                        return Ok(());
                    }
                    let kind = *kind;
                    self.state = State::Header;
                    match kind {
                        Kind::Message => {}
                        Kind::Ping => decoded.ping = Some(std::mem::take(&mut self.control)),
                        Kind::Pong => self.control.clear(),
                        Kind::Close => return Err(closed(&self.control)),
                    }
                }
            }
        }
    }

    /// Judges a header as soon as it can be; what follows it, once it is whole.
    fn on_header_byte(&mut self, now: Instant) -> Result<Option<State>, Fault> {
        let [first, second, ..] = self.header;
        match self.header_bytes {
            1 => self.check_first(first).map(|()| None),
            2 => check_second(first, second).map(|()| None),
            have if have == header_bytes(second) => self.on_header(now).map(Some),
            _ => Ok(None),
        }
    }

    fn check_first(&self, first: u8) -> Result<(), Fault> {
        if first & 0b0111_0000 != 0 {
            return Err(Fault::Protocol("reserved bits are set: no extension was agreed on, nor compression"));
        }
        match (first & 0x0f, self.message) {
            (TEXT, _) => Err(Fault::Text),
            (BINARY, Some(_)) => Err(Fault::Protocol("a message begins within another")),
            (CONTINUATION, None) => Err(Fault::Protocol("a message goes on that did not begin")),
            (CLOSE | PING | PONG, _) if first & 0x80 == 0 => Err(Fault::Protocol("a control frame is in pieces")),
            (CONTINUATION | BINARY | CLOSE | PING | PONG, _) => Ok(()),
            _ => Err(Fault::Protocol("there is no such kind of frame")),
        }
    }

    fn on_header(&mut self, now: Instant) -> Result<State, Fault> {
        let [first, second, ..] = self.header;
        let extended = &self.header[2..self.header_bytes - 4];
        let length = match extended.len() {
            0 => u64::from(second & 0x7f),
            _ => extended.iter().fold(0, |length, byte| length << 8 | u64::from(*byte)),
        };
        if (extended.len() == 2 && length < 126) || (extended.len() == 8 && length <= u64::from(u16::MAX)) {
            return Err(Fault::Protocol("a length is not written in the shortest way"));
        }
        if length >> 63 != 0 {
            return Err(Fault::Protocol("a length has its highest bit set"));
        }
        let mut mask = [0; 4];
        mask.copy_from_slice(&self.header[self.header_bytes - 4..self.header_bytes]);
        let kind = match first & 0x0f {
            CLOSE => Kind::Close,
            PING => Kind::Ping,
            PONG => Kind::Pong,
            _ => Kind::Message,
        };
        if kind != Kind::Message || length == 0 {
            self.count_idle_frame(now)?;
        }
        if kind == Kind::Message {
            let before = self.message.unwrap_or(Message { bytes: 0, frames: 0 });
            let message = Message { bytes: before.bytes.saturating_add(length), frames: before.frames + 1 };
            if message.bytes > self.message_bytes_max {
                return Err(Fault::TooLong);
            }
            if message.frames > FRAGMENTS_MAX {
                return Err(Fault::Flood("a message is in too many pieces"));
            }
            let is_last = first & 0x80 != 0;
            self.message = (!is_last).then_some(message);
        }
        Ok(State::Payload { kind, mask, left: length })
    }

    fn count_idle_frame(&mut self, now: Instant) -> Result<(), Fault> {
        let in_period = self.idle_since.is_some_and(|since| now.saturating_duration_since(since) < IDLE_FRAMES_PERIOD);
        if !in_period {
            self.idle_since = Some(now);
            self.idle_frames = 0;
        }
        self.idle_frames += 1;
        if self.idle_frames > IDLE_FRAMES_MAX {
            return Err(Fault::Flood("too many pings, pongs or empty frames in a second"));
        }
        Ok(())
    }
}

fn check_second(first: u8, second: u8) -> Result<(), Fault> {
    if second & 0x80 == 0 {
        return Err(Fault::Protocol("a client's frames are masked"));
    }
    if first & 0x08 != 0 && usize::from(second & 0x7f) > CONTROL_BYTES_MAX {
        return Err(Fault::Protocol("a control frame is too long"));
    }
    Ok(())
}

/// Bytes of a client's header whose second byte is this.
fn header_bytes(second: u8) -> usize {
    match second & 0x7f {
        126 => 8,
        127 => 14,
        _ => 6,
    }
}

fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    for piece in payload.chunks_mut(4) {
        for (byte, key) in piece.iter_mut().zip(mask) {
            *byte ^= key;
        }
    }
}

/// What a Close frame says [RFC 6455, 5.5.1 and 7.4].
fn closed(payload: &[u8]) -> Ending {
    match payload {
        [] => Ending::Closed(None),
        [high, low, reason @ ..] => {
            let code = u16::from_be_bytes([*high, *low]);
            let may_be_sent = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
            if may_be_sent && std::str::from_utf8(reason).is_ok() {
                Ending::Closed(Some(code))
            } else {
                Ending::Fault(Fault::Protocol("a Close frame says what none may say"))
            }
        }
        [_] => Ending::Fault(Fault::Protocol("a Close frame has half a code")),
    }
}

/// Writes a binary message in one frame.
pub(crate) fn put_message(out: &mut Vec<u8>, payload: &[u8]) {
    put_frame(out, BINARY, payload);
}

/// Writes the answer to a ping.
pub(crate) fn put_pong(out: &mut Vec<u8>, payload: &[u8]) {
    put_frame(out, PONG, payload);
}

/// Writes a Close frame.
pub(crate) fn put_close(out: &mut Vec<u8>, code: Option<u16>, reason: &str) {
    let mut payload = Vec::new();
    if let Some(code) = code {
        payload.extend(code.to_be_bytes());
        payload.extend(reason.bytes());
    }
    debug_assert!(payload.len() <= CONTROL_BYTES_MAX);
    put_frame(out, CLOSE, &payload);
}

fn put_frame(out: &mut Vec<u8>, opcode: u8, payload: &[u8]) {
    out.reserve(payload.len() + HEADER_BYTES_MAX);
    out.push(0x80 | opcode);
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length @ 0..=125), _) => out.push(length),
        (_, Ok(length)) => {
            out.push(126);
            out.extend(length.to_be_bytes());
        }
        _ => {
            out.push(127);
            out.extend(u64::try_from(payload.len()).unwrap_or(u64::MAX).to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MASK: [u8; 4] = [0x12, 0x00, 0xff, 0x7e];
    const MESSAGE_BYTES_MAX: u64 = 200_000;

    /// A client's frame.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = header(first, payload.len().try_into().unwrap());
        bytes.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, key)| byte ^ key));
        bytes
    }

    /// A header that announces so much.
    fn header(first: u8, length: u64) -> Vec<u8> {
        let mut bytes = vec![first];
        match length {
            0..=125 => bytes.push(0x80 | u8::try_from(length).unwrap()),
            126..=0xffff => {
                bytes.push(0x80 | 126);
                bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
            _ => {
                bytes.push(0x80 | 127);
                bytes.extend(length.to_be_bytes());
            }
        }
        bytes.extend(MASK);
        bytes
    }

    #[derive(Debug, Default, PartialEq, Eq)]
    struct Followed {
        payload: Vec<u8>,
        pings: Vec<Vec<u8>>,
        ending: Option<Ending>,
    }

    /// Everything that these bytes hold, cut into pieces of these lengths.
    fn follow_at(frames: &mut Frames, bytes: &[u8], cuts: &[usize], now: Instant) -> Followed {
        let mut followed = Followed::default();
        let mut rest = bytes.to_vec();
        let mut cuts = cuts.iter().copied().cycle();
        while !rest.is_empty() && followed.ending.is_none() {
            let cut = cuts.next().unwrap_or(usize::MAX).clamp(1, rest.len());
            let mut piece: Vec<u8> = rest.drain(..cut).collect();
            let decoded = frames.decode(&mut piece, now);
            followed.payload.extend(&piece[..decoded.bytes]);
            followed.pings.extend(decoded.ping);
            followed.ending = decoded.ending;
        }
        followed
    }

    fn follow(bytes: &[u8]) -> Followed {
        follow_at(&mut Frames::new(MESSAGE_BYTES_MAX), bytes, &[], Instant::now())
    }

    #[track_caller]
    fn assert_closes(bytes: &[u8], code: u16) {
        match follow(bytes).ending {
            Some(Ending::Fault(fault)) => {
                assert_eq!(fault.code(), code, "{fault:?}");
                assert!(fault.reason().len() + 2 <= CONTROL_BYTES_MAX, "{fault:?} does not fit");
            }
            other => panic!("{other:?} instead of {code}, after {bytes:02x?}"),
        }
    }

    #[test]
    fn reserved_bits_are_refused_on_the_first_byte() {
        // 0x40 says that the message is compressed: whatever it would unpack to, nothing is unpacked.
        for bit in [0x40, 0x20, 0x10] {
            for opcode in [BINARY, CONTINUATION, PING, CLOSE] {
                assert_closes(&[0x80 | bit | opcode], 1002);
            }
        }
        for opcode in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
            assert_closes(&[0x80 | opcode], 1002);
        }
    }

    #[test]
    fn text_is_refused() {
        assert_closes(&frame(0x80 | TEXT, b"hello"), 1003);
    }

    #[test]
    fn frames_without_a_mask_are_refused() {
        assert_closes(&[0x80 | BINARY, 2], 1002);
        assert_closes(&[0x80 | PING, 0], 1002);
    }

    #[test]
    fn lengths_that_lie_are_refused_before_their_payload() {
        for length in [MESSAGE_BYTES_MAX + 1, u64::from(u32::MAX), u64::MAX >> 1] {
            assert_closes(&header(0x80 | BINARY, length), 1009);
        }
        assert_closes(&header(0x80 | BINARY, 1 << 63), 1002);
        assert_closes(&header(0x80 | BINARY, u64::MAX), 1002);
        let short_as_16 = [&[0x80 | BINARY, 0x80 | 126, 0, 125], &MASK[..]].concat();
        assert_closes(&short_as_16, 1002);
        let medium_as_64 = [&[0x80 | BINARY, 0x80 | 127, 0, 0, 0, 0, 0, 0, 0xff, 0xff], &MASK[..]].concat();
        assert_closes(&medium_as_64, 1002);
        // The pieces of a message are one message.
        let pieces = [frame(BINARY, &vec![0; 150_000]), header(CONTINUATION, 50_001)].concat();
        assert_closes(&pieces, 1009);
        let overflow = [frame(BINARY, b"x"), header(CONTINUATION, u64::MAX >> 1)].concat();
        assert_closes(&overflow, 1009);
    }

    #[test]
    fn control_frames_are_short_and_whole() {
        for opcode in [PING, PONG, CLOSE] {
            assert_closes(&header(0x80 | opcode, 126), 1002);
            assert_closes(&header(0x80 | opcode, 70_000), 1002);
            assert_closes(&[opcode], 1002);
        }
        assert_eq!(follow(&frame(0x80 | PING, &[7; 125])).pings, [vec![7; 125]]);
    }

    #[test]
    fn messages_are_in_order() {
        assert_closes(&frame(0x80 | CONTINUATION, b"x"), 1002);
        assert_closes(&[frame(BINARY, b"x"), frame(0x80 | BINARY, b"y")].concat(), 1002);
        assert_closes(
            &[frame(BINARY, b"x"), frame(0x80 | CONTINUATION, b"y"), frame(CONTINUATION, b"z")].concat(),
            1002,
        );
    }

    #[test]
    fn fragments_are_bounded() {
        let most = usize::try_from(FRAGMENTS_MAX).unwrap();
        let flood = |fragments: usize| [frame(BINARY, b"x"), frame(CONTINUATION, b"x").repeat(fragments - 1)].concat();
        assert_eq!(follow(&flood(most)), Followed { payload: vec![b'x'; most], ..Followed::default() });
        assert_closes(&flood(most + 1), 1008);
    }

    #[test]
    fn frames_that_carry_nothing_are_bounded() {
        let most = usize::try_from(IDLE_FRAMES_MAX).unwrap();
        let floods = [
            frame(0x80 | PING, b"x"),
            frame(0x80 | PONG, b""),
            frame(0x80 | BINARY, b""),
            [frame(0x80 | PING, b""), frame(0x80 | BINARY, b"carries something")].concat(),
        ];
        for flood in floods {
            assert_eq!(follow(&flood.repeat(most)).ending, None);
            assert_closes(&flood.repeat(most + 1), 1008);
            let mut frames = Frames::new(MESSAGE_BYTES_MAX);
            let now = Instant::now();
            for second in 0..5 {
                let now = now + Duration::from_secs(second);
                assert_eq!(follow_at(&mut frames, &flood.repeat(most), &[], now).ending, None, "second {second}");
            }
        }
        assert_closes(&[frame(BINARY, b""), frame(CONTINUATION, b"").repeat(most)].concat(), 1008);
    }

    #[test]
    fn only_the_last_of_several_pings_is_answered() {
        let mut pings = [frame(0x80 | PING, b"first"), frame(0x80 | PING, b"second")].concat();
        let decoded = Frames::new(MESSAGE_BYTES_MAX).decode(&mut pings, Instant::now());
        assert_eq!(decoded.ping.as_deref(), Some(&b"second"[..]));
    }

    #[test]
    fn closing_is_understood() {
        for (payload, ending) in [
            (&b""[..], Ending::Closed(None)),
            (&[0x03, 0xe8], Ending::Closed(Some(1000))),
            (&[0x03, 0xe9, b'b', b'y', b'e'], Ending::Closed(Some(1001))),
        ] {
            let bytes =
                [frame(0x80 | BINARY, b"last"), frame(0x80 | CLOSE, payload), frame(0x80 | TEXT, b"x")].concat();
            let followed = follow(&bytes);
            assert_eq!((followed.payload.as_slice(), followed.ending), (&b"last"[..], Some(ending)));
        }
        // Half a code, codes that nobody sends, and a reason that is no text.
        for payload in [&[3][..], &[0, 0], &[0x03, 0xed], &[0x03, 0xee], &[0x13, 0x88], &[0x03, 0xe8, 0xff]] {
            assert_closes(&frame(0x80 | CLOSE, payload), 1002);
        }
    }

    #[test]
    fn what_comes_before_a_fault_is_handed_on() {
        let followed = follow(&[frame(0x80 | BINARY, b"good"), frame(0x80 | TEXT, b"bad")].concat());
        assert_eq!((followed.payload.as_slice(), followed.ending), (&b"good"[..], Some(Ending::Fault(Fault::Text))));
    }

    #[test]
    fn nothing_is_looked_at_after_the_end() {
        let mut frames = Frames::new(MESSAGE_BYTES_MAX);
        assert!(frames.decode(&mut frame(0x80 | CLOSE, b""), Instant::now()).ending.is_some());
        assert_eq!(frames.decode(&mut frame(0x80 | BINARY, b"more"), Instant::now()), Decoded::default());
    }

    #[test]
    fn what_is_written_has_the_shortest_length() {
        for (length, begin) in [
            (0, &[0x82, 0][..]),
            (125, &[0x82, 125]),
            (126, &[0x82, 126, 0, 126]),
            (65_535, &[0x82, 126, 0xff, 0xff]),
            (65_536, &[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            let mut out = Vec::new();
            put_message(&mut out, &vec![7; length]);
            assert!(out.starts_with(begin) && out.len() == begin.len() + length, "{length}");
        }
    }

    proptest! {
        #[test]
        fn payloads_are_found_however_they_are_framed_and_cut(
            messages in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..4), 0..8),
            pings in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..10)), 0..8),
            cuts in prop::collection::vec(1usize..40, 1..9),
        ) {
            let mut bytes = Vec::new();
            let mut expected = Followed::default();
            let mut pings = pings.into_iter();
            for message in &messages {
                for (nth, piece) in message.iter().enumerate() {
                    let last = if nth + 1 == message.len() { 0x80 } else { 0 };
                    bytes.extend(frame(last | if nth == 0 { BINARY } else { CONTINUATION }, piece));
                    expected.payload.extend(piece);
                    // Control frames may come between the pieces of a message.
                    if let Some(Some(ping)) = pings.next() {
                        bytes.extend(frame(0x80 | PING, &ping));
                    }
                }
            }
            let found = follow_at(&mut Frames::new(MESSAGE_BYTES_MAX), &bytes, &cuts, Instant::now());
            prop_assert_eq!(found.payload, expected.payload);
            prop_assert_eq!(found.ending, None);
        }

        #[test]
        fn any_bytes_move_on_or_end_alike_however_they_are_cut(bytes: Vec<u8>, cuts in prop::collection::vec(1usize..9, 1..9)) {
            let now = Instant::now();
            let whole = follow_at(&mut Frames::new(1_000), &bytes, &[], now);
            let cut = follow_at(&mut Frames::new(1_000), &bytes, &cuts, now);
            prop_assert_eq!((&whole.payload, whole.ending), (&cut.payload, cut.ending));
            prop_assert!(whole.payload.len() <= bytes.len());
        }
    }
}
