//! WebSocket as a client speaks it (RFC 6455), as much as a load generator needs. Pure: no socket.
//!
//! A frame for each MQTT packet, as MQTT clients in browsers send them, masked with a key of its own kind: the broker's work is the same.

use std::io;

use anyhow::{Context, Result, ensure};

const BINARY_AND_LAST: u8 = 0x82;
const PONG_AND_LAST: u8 = 0x8a;
const MASKED: u8 = 0x80;
/// What proxies may make of it does not matter here, and to draw a key for each frame would cost the generator more than it is worth.
const MASK: [u8; 4] = [0x5a, 0xc3, 0x96, 0x3c];

/// The request that opens a WebSocket.
pub(crate) fn request(host: &str, path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
    )
}

/// Judges the answer to [`request`]: its bytes, with nothing behind them.
pub(crate) fn judge(answer: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(answer);
    let first = text.lines().next().unwrap_or_default();
    ensure!(first.starts_with("HTTP/1.1 101"), "no WebSocket: {first}");
    // The answer to the key above, as in the standard's own example.
    ensure!(text.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "no WebSocket: {text}");
    Ok(())
}

/// Appends a frame around an MQTT packet.
pub(crate) fn wrap(out: &mut Vec<u8>, packet: &[u8]) {
    frame(out, BINARY_AND_LAST, packet);
}

fn frame(out: &mut Vec<u8>, first: u8, payload: &[u8]) {
    out.push(first);
    match payload.len() {
        length @ 0..126 => out.push(MASKED | length.to_le_bytes()[0]),
        length => match u16::try_from(length) {
            Ok(short) => {
                out.push(MASKED | 126);
                out.extend_from_slice(&short.to_be_bytes());
            }
            Err(_) => {
                out.push(MASKED | 127);
                out.extend_from_slice(&(length as u64).to_be_bytes());
            }
        },
    }
    out.extend_from_slice(&MASK);
    let at = out.len();
    out.extend_from_slice(payload);
    for (byte, mask) in out[at..].iter_mut().zip(MASK.iter().cycle()) {
        *byte ^= mask;
    }
}

/// Takes frames from the broker apart.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    /// Of a frame whose header is not whole yet.
    header: Vec<u8>,
    /// What is still to come of the frame.
    remaining: u64,
    /// Whether the frame is one of those that are no data, and what has come of it.
    control: Option<(u8, Vec<u8>)>,
}

const PING: u8 = 9;
const CLOSE: u8 = 8;

impl Frames {
    /// Moves the payloads in what was read to its beginning; how many bytes they are. What has to be answered is appended to `out`.
    pub(crate) fn unwrap(&mut self, buffer: &mut [u8], out: &mut Vec<u8>) -> io::Result<usize> {
        let (mut at, mut kept) = (0, 0);
        while at < buffer.len() {
            if self.remaining == 0 {
                self.header.push(buffer[at]);
                at += 1;
                if let Some((opcode, length)) = parse(&self.header)? {
                    self.header.clear();
                    self.remaining = length;
                    self.control = (opcode >= CLOSE).then(|| (opcode, Vec::new()));
                    if length == 0 {
                        self.end(out)?;
                    }
                }
                continue;
            }
            let here = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len() - at);
            match &mut self.control {
                Some((_, payload)) => payload.extend_from_slice(&buffer[at..at + here]),
                None => {
                    buffer.copy_within(at..at + here, kept);
                    kept += here;
                }
            }
            at += here;
            self.remaining -= here as u64;
            if self.remaining == 0 {
                self.end(out)?;
            }
        }
        Ok(kept)
    }

    fn end(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        match self.control.take() {
            Some((PING, payload)) => frame(out, PONG_AND_LAST, &payload),
            Some((CLOSE, _)) => return Err(io::Error::other("the broker closed a WebSocket")),
            _ => {}
        }
        Ok(())
    }
}

/// Opcode and length of a header; `None` if it is not whole yet.
fn parse(header: &[u8]) -> io::Result<Option<(u8, u64)>> {
    let [first, second, rest @ ..] = header else { return Ok(None) };
    if second & MASKED != 0 {
        return Err(io::Error::other("a frame from the broker is masked"));
    }
    let length_bytes = match second {
        127 => 8,
        126 => 2,
        _ => 0,
    };
    if rest.len() < length_bytes {
        return Ok(None);
    }
    let long = rest.iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
    Ok(Some((first & 0x0f, if length_bytes == 0 { u64::from(*second) } else { long })))
}

/// Whether the head of the answer to [`request`] is whole.
pub(crate) fn is_whole(answer: &[u8]) -> bool {
    answer.ends_with(b"\r\n\r\n")
}

/// What a broker is called in a request.
pub(crate) fn host(addr: std::net::SocketAddr, server_name: &str) -> Result<String> {
    ensure!(server_name.is_ascii(), "a server name in ASCII");
    let port = addr.port();
    server_name.split_whitespace().next().map(|name| format!("{name}:{port}")).context("no server name")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a broker sends it: the same without a mask.
    fn from_broker(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![first];
        match payload.len() {
            length @ 0..126 => bytes.push(u8::try_from(length).unwrap()),
            length @ 126..=0xffff => {
                bytes.push(126);
                bytes.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
            }
            length => {
                bytes.push(127);
                bytes.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn frames_come_apart_however_they_are_cut() {
        let payloads = [vec![b'a'; 5], vec![b'b'; 125], vec![b'c'; 126], vec![], vec![b'd'; 70_000]];
        let mut bytes = Vec::new();
        for payload in &payloads {
            bytes.extend(from_broker(BINARY_AND_LAST, payload));
            bytes.extend(from_broker(0x80 | PING, b"hi"));
        }
        for step in [1, 2, 3, 7, 1_000, bytes.len()] {
            let (mut frames, mut out, mut got) = (Frames::default(), Vec::new(), Vec::new());
            for part in bytes.chunks(step) {
                let mut part = part.to_vec();
                let kept = frames.unwrap(&mut part, &mut out).unwrap();
                got.extend_from_slice(&part[..kept]);
            }
            assert_eq!(got, payloads.concat(), "in steps of {step}");
            let mut pongs = Vec::new();
            (0..payloads.len()).for_each(|_| frame(&mut pongs, PONG_AND_LAST, b"hi"));
            assert_eq!(out, pongs);
        }
    }

    #[test]
    fn what_is_sent_is_masked_and_has_its_length() {
        for length in [0, 1, 125, 126, 0xffff, 0x1_0000] {
            let payload: Vec<u8> = (0..length).map(|nth: usize| nth.to_le_bytes()[0]).collect();
            let mut bytes = Vec::new();
            wrap(&mut bytes, &payload);
            assert_eq!(bytes[0], BINARY_AND_LAST);
            assert_eq!(bytes[1] & MASKED, MASKED);
            let header = bytes.len() - length;
            let (mask, masked) = (bytes[header - 4..header].to_vec(), &bytes[header..]);
            let unmasked: Vec<u8> = masked.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
            assert_eq!(unmasked, payload);
            bytes[1] &= !MASKED;
            assert_eq!(parse(&bytes[..header - 4]).unwrap(), Some((2, length as u64)));
        }
    }

    #[test]
    fn the_end_and_what_is_no_websocket_are_errors() {
        let (mut frames, mut out) = (Frames::default(), Vec::new());
        assert!(frames.unwrap(&mut from_broker(0x80 | CLOSE, &[3, 0xe8]), &mut out).is_err());
        assert!(Frames::default().unwrap(&mut [0x82, 0x81, 0, 0, 0, 0, 1], &mut out).is_err());
        assert!(judge(b"HTTP/1.1 404 Not Found\r\n\r\n").is_err());
        assert!(judge(b"HTTP/1.1 101 x\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n").is_ok());
    }
}
