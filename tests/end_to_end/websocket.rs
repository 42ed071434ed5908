//! WebSocket as attackers use it: pages of other sites, requests that are none, frames that lie, flood and claim to be compressed.

use std::time::{Duration, Instant};

use end_to_end::packet::{self, Properties, Publish, Version, Will};
use end_to_end::tls::{Files, connect, port};
use end_to_end::{Chatd, Connect, Options, PATIENCE};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The headers of a handshake that is as it should be, without host and origin.
const HEADERS: &str = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                       sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: mqtt\r\n";

/// Sends a request; the head of the answer.
async fn ask(mut io: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
    io.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.windows(4).any(|end| end == b"\r\n\r\n") {
        let read = timeout(PATIENCE, io.read_buf(&mut answer)).await.expect("it answers").unwrap();
        assert!(read > 0, "closed after {:?}", String::from_utf8_lossy(&answer));
    }
    String::from_utf8_lossy(&answer).to_ascii_lowercase()
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_default()
}

async fn page(chatd: &Chatd, origin: &str, host: &str) -> String {
    let socket = TcpStream::connect(chatd.http_addr()).await.unwrap();
    let answer = ask(socket, &format!("GET /mqtt HTTP/1.1\r\nhost: {host}\r\norigin: {origin}\r\n{HEADERS}\r\n")).await;
    status(&answer).to_owned()
}

/// Cross-site WebSocket hijacking, also by a site whose name leads to this machine for a moment (DNS rebinding).
#[tokio::test]
async fn pages_of_other_sites_do_not_connect() {
    let chatd = Chatd::start().await.unwrap();
    for (origin, host, expected) in [
        ("http://localhost:5173", "localhost:8080", "101"),
        ("http://127.0.0.1:8080", "127.0.0.1:8080", "101"),
        ("https://evil.example.org", "localhost:8080", "403"),
        ("null", "localhost:8080", "403"),
        ("http://localhost.evil.example.org", "localhost:8080", "403"),
        ("http://evil.example.org:8080", "evil.example.org:8080", "403"),
    ] {
        assert_eq!(page(&chatd, origin, host).await, expected, "in development: {origin} to {host}");
    }

    let files = Files::new().unwrap();
    let required = files
        .options()
        .set("auth.mode", "required")
        .set("tls.client_ca", files.text("ca.pem"))
        .set("http.origins", "https://app.example.org, capacitor://localhost");
    let chatd = Chatd::start_with(required.clone()).await.unwrap();
    for (origin, host, expected) in [
        ("http://chat.example.org", "chat.example.org", "101"),
        ("http://chat.example.org:8080", "chat.example.org:8080", "101"),
        ("https://app.example.org", "chat.example.org", "101"),
        ("capacitor://localhost", "chat.example.org", "101"),
        ("https://chat.example.org", "chat.example.org", "403"),
        ("http://chat.example.org:81", "chat.example.org", "403"),
        ("http://app.example.org", "chat.example.org", "403"),
        ("http://localhost:5173", "chat.example.org", "403"),
        ("http://localhost:5173", "localhost:8080", "403"),
        ("null", "chat.example.org", "403"),
    ] {
        assert_eq!(page(&chatd, origin, host).await, expected, "{origin} to {host}");
    }
    // Over TLS the pages that are of the same origin came over TLS.
    let connector = files.connector(&["http/1.1"]).unwrap();
    let port = port(&chatd, "http").await;
    for (scheme, expected) in [("https", "101"), ("http", "403")] {
        let request = format!(
            "GET /mqtt HTTP/1.1\r\nhost: localhost:{port}\r\norigin: {scheme}://localhost:{port}\r\n{HEADERS}\r\n"
        );
        let answer = ask(connect(&connector, port, "localhost").await.unwrap(), &request).await;
        assert_eq!(status(&answer), expected, "{scheme}");
    }
    let chatd = Chatd::start_with(required.set("http.origins", "*")).await.unwrap();
    assert_eq!(page(&chatd, "https://anybody.example.org", "chat.example.org").await, "101");
}

#[tokio::test]
async fn only_a_handshake_is_a_handshake() {
    let chatd = Chatd::start().await.unwrap();
    let without =
        |name: &str| -> String { HEADERS.split_inclusive("\r\n").filter(|line| !line.starts_with(name)).collect() };
    for (begin, headers, expected) in [
        ("GET /mqtt HTTP/1.1", HEADERS.to_owned(), "101"),
        ("POST /mqtt HTTP/1.1", HEADERS.to_owned(), "405"),
        ("GET /mqtt HTTP/1.0", HEADERS.to_owned(), "426"),
        ("GET /mqtt HTTP/1.1", without("upgrade"), "426"),
        ("GET /mqtt HTTP/1.1", HEADERS.replace("13", "8"), "426"),
        ("GET /mqtt HTTP/1.1", without("sec-websocket-key"), "400"),
        ("GET /mqtt HTTP/1.1", without("sec-websocket-protocol"), "400"),
        ("GET /mqtt HTTP/1.1", HEADERS.replace(": mqtt", ": wamp, soap"), "400"),
        ("GET /mqtt HTTP/1.1", HEADERS.replace(": mqtt", ": wamp, mqtt, mqttv3.1"), "101"),
        ("GET /mqtt HTTP/1.1", format!("{HEADERS}content-length: 3\r\n"), "400"),
    ] {
        let socket = TcpStream::connect(chatd.http_addr()).await.unwrap();
        let answer = ask(socket, &format!("{begin}\r\nhost: localhost\r\n{headers}\r\n")).await;
        assert_eq!(status(&answer), expected, "{begin} {headers}: {answer}");
        if expected == "101" {
            assert!(answer.contains("\r\nsec-websocket-protocol: mqtt\r\n"), "{answer}");
        }
    }
}

/// A WebSocket after its handshake, without a client library's manners.
async fn open(chatd: &Chatd) -> TcpStream {
    let mut socket = TcpStream::connect(chatd.http_addr()).await.unwrap();
    let offer = "sec-websocket-extensions: permessage-deflate; client_max_window_bits\r\n";
    let request = format!("GET /mqtt HTTP/1.1\r\nhost: localhost\r\n{HEADERS}{offer}\r\n");
    let answer = ask(&mut socket, &request).await;
    assert!(status(&answer) == "101" && !answer.contains("extensions"), "{answer}");
    socket
}

/// A header that announces so much, masked with zeros.
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
    bytes.extend([0; 4]);
    bytes
}

fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    [header(first, payload.len().try_into().unwrap()), payload.to_vec()].concat()
}

/// The code of the Close frame, behind whatever pongs came before it.
async fn closed_with(socket: &mut TcpStream) -> Option<u16> {
    let mut rest = Vec::new();
    let end = timeout(PATIENCE, socket.read_to_end(&mut rest)).await.expect("it is closed");
    end.unwrap_or_default();
    let mut rest = rest.as_slice();
    while let [0x8a, length, more @ ..] = rest {
        rest = &more[usize::from(*length)..];
    }
    match rest {
        [0x88, _, high, low, ..] => Some(u16::from_be_bytes([*high, *low])),
        other => {
            println!("no Close frame in {other:02x?}");
            None
        }
    }
}

#[tokio::test]
async fn hostile_frames_are_told_why_they_end() {
    let chatd = Chatd::start().await.unwrap();
    // 10 MiB of zeros, compressed twice over: RSV1 says so.
    let bomb = frame(0xc2, &[0xec, 0xc1, 0x01, 0x01, 0x00, 0x00, 0x00, 0x80, 0x90, 0xfe, 0xaf, 0xee, 0x08, 0x0a]);
    let pings = frame(0x89, &[7; 125]).repeat(20_000);
    let crumbs = [frame(0x02, b"\x10"), frame(0x00, b"").repeat(20_000)].concat();
    let pieces = [frame(0x02, b"\x10"), frame(0x00, b"\xff").repeat(20_000)].concat();
    let interleaved =
        [frame(0x02, b"\x10"), [frame(0x00, b""), frame(0x89, b""), frame(0x8a, b"")].concat().repeat(5_000)];
    for (what, bytes, code) in [
        ("a compression bomb (CVE-2026-27571)", bomb, 1002),
        ("text", frame(0x81, b"hello"), 1003),
        ("a frame without a mask", vec![0x82, 1, 7], 1002),
        ("a reserved bit", frame(0x92, b""), 1002),
        ("a kind that does not exist", frame(0x83, b""), 1002),
        ("a length above the limit (CVE-2026-27889)", header(0x82, 1 << 40), 1009),
        ("the longest length", header(0x82, u64::MAX >> 1), 1009),
        ("the highest bit of a length", header(0x82, u64::MAX), 1002),
        ("a short length in a long way", [&[0x82, 0x80 | 126, 0, 1, 0, 0, 0, 0, 7][..]].concat(), 1002),
        ("a control frame that is too long", header(0x89, 126), 1002),
        ("a control frame in pieces", frame(0x09, b""), 1002),
        ("a Close of one byte", frame(0x88, &[3]), 1002),
        ("a message within another", [frame(0x02, b"\x10"), frame(0x82, b"x")].concat(), 1002),
        ("a flood of pings", pings, 1008),
        ("a flood of empty fragments", crumbs, 1008),
        ("a flood of fragments", pieces, 1008),
        ("a flood of all kinds", interleaved.concat(), 1008),
    ] {
        let mut socket = open(&chatd).await;
        // Before it is all sent it may be closed.
        socket.write_all(&bytes).await.unwrap_or_default();
        let code_told = closed_with(&mut socket).await;
        // A flood may find the socket gone before it reads why.
        assert!(code_told == Some(code) || (code_told.is_none() && bytes.len() > 100_000), "{what}: {code_told:?}");
    }
    Connect::v5("alice", "phone").over_web_socket().to(&chatd).await.unwrap().leave().await.unwrap();
}

/// A frame takes what has come of it, and not what it announces.
#[tokio::test]
async fn what_is_announced_takes_no_memory() {
    const LIARS: usize = 300;
    let chatd = Chatd::start().await.unwrap();
    // Whatever is made once is made before.
    Connect::v5("alice", "phone").over_web_socket().to(&chatd).await.unwrap().leave().await.unwrap();
    let before = chatd.memory_kb().unwrap();
    let mut liars = Vec::new();
    for _ in 0..LIARS {
        let mut socket = open(&chatd).await;
        // As long as a message may be, and the beginning of a CONNECT.
        socket.write_all(&header(0x82, 2 * 1024 * 1024)).await.unwrap();
        socket.write_all(&[0x10, 0xff, 0x7f, 0, 4]).await.unwrap();
        liars.push(socket);
    }
    // Whoever comes after them is served after they were read.
    Connect::v5("alice", "phone").over_web_socket().to(&chatd).await.unwrap().leave().await.unwrap();
    let taken = chatd.memory_kb().unwrap().saturating_sub(before);
    println!("{LIARS} announcements of 2 MiB took {taken} KiB");
    assert!(taken < 40 * 1024, "{taken} KiB");
}

/// What a connection sends before its DISCONNECT counts, however soon it closes behind it: a Close in the same bytes is what a FIN is over TCP.
#[tokio::test]
async fn what_came_before_a_close_counts() {
    // Further than the server reads ahead of its acknowledgements, slower than it would read, and in one piece with the CONNECT.
    const PUBLISHES: u16 = 3_000;
    let options = Options::default().set("limits.publishes_per_s", 1_500).set("limits.queue_messages", 10_000);
    let chatd = Chatd::start_with(options).await.unwrap();
    let mut watching = Connect::v5("watching", "watching").to(&chatd).await.unwrap();
    watching.subscribe("before/#", 0).await.unwrap();
    watching.subscribe("wills/#", 0).await.unwrap();
    for (version, qos) in [(Version::V4, 1), (Version::V4, 0), (Version::V5, 0), (Version::V5, 1)] {
        let publishes = match version {
            Version::V4 => PUBLISHES,
            // More would be refused: too fast, or over the receive maximum.
            Version::V5 => 60,
        };
        let will = Will { topic: "wills/hasty".to_owned(), payload: b"gone".to_vec(), ..Will::default() };
        let mut packets = Connect::new(version, "hasty", "hasty").will(will).bytes();
        for number in 1..=publishes {
            let packet_id = if qos == 0 { 0 } else { number };
            let publish = Publish { packet_id, ..Publish::new("before/close", number.to_string(), qos) };
            packets.extend(packet::publish(version, &publish));
        }
        packets.extend(packet::disconnect(version, 0, &Properties::none()));
        let mut socket = open(&chatd).await;
        socket.write_all(&[frame(0x82, &packets), frame(0x88, &[0x03, 0xe8])].concat()).await.unwrap();
        for number in 1..=publishes {
            let got = watching.message().await.unwrap();
            let what = format!("{version:?}, QoS {qos}");
            assert_eq!((got.topic.as_str(), got.text()), ("before/close", number.to_string().as_str()), "{what}");
        }
        let mut rest = Vec::new();
        timeout(PATIENCE, socket.read_to_end(&mut rest)).await.expect("it is closed").unwrap();
        assert!(rest.ends_with(&[0x88, 2, 0x03, 0xe8]), "no Close: {rest:02x?}");
        // A will would have come before this.
        watching.publish(Publish::new("before/end", "end", 1)).await.unwrap();
        assert_eq!(watching.message().await.unwrap().topic, "before/end", "{version:?}, QoS {qos}");
    }
}

/// The headers of a request take no more than they may have, and are refused beyond that.
#[tokio::test]
async fn unfinished_headers_take_little_memory() {
    const STRANGERS: usize = 500;
    let chatd = Chatd::start().await.unwrap();
    assert_eq!(chatd.get("/healthz").await.unwrap().0, 200);
    let before = chatd.memory_kb().unwrap();
    let begin = b"GET /mqtt HTTP/1.1\r\nhost: localhost\r\nx: ";
    let mut strangers = Vec::new();
    for _ in 0..STRANGERS {
        let mut socket = TcpStream::connect(chatd.http_addr()).await.unwrap();
        socket.write_all(begin).await.unwrap();
        socket.write_all(&[b'y'; 15_000]).await.unwrap();
        strangers.push(socket);
    }
    let mut refused = 0;
    for _ in 0..STRANGERS {
        let mut socket = TcpStream::connect(chatd.http_addr()).await.unwrap();
        socket.write_all(begin).await.unwrap();
        // Before it is all sent it may be closed, and the answer lost.
        socket.write_all(&[b'y'; 400_000]).await.unwrap_or_default();
        let mut answer = [0; 12];
        if timeout(PATIENCE, socket.read_exact(&mut answer)).await.expect("it is answered").is_ok() {
            assert_eq!(&answer, b"HTTP/1.1 431");
            refused += 1;
        }
        strangers.push(socket);
    }
    assert_eq!(chatd.get("/healthz").await.unwrap().0, 200);
    let taken = chatd.memory_kb().unwrap().saturating_sub(before);
    println!("{STRANGERS} unfinished requests took {taken} KiB; {refused} of as many that were too long were told");
    assert!(taken < 30 * 1024, "{taken} KiB");
}

/// Floods by many at once cost the innocent nothing they would notice, and leave nothing behind.
#[tokio::test]
async fn floods_disturb_nobody() {
    let chatd = Chatd::start_with(Options::default()).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").over_web_socket().to(&chatd).await.unwrap();
    let before = chatd.memory_kb().unwrap();
    let floods = [
        frame(0x89, &[7; 125]).repeat(10_000),
        [frame(0x02, b"\x10"), frame(0x00, b"").repeat(50_000)].concat(),
        [frame(0x02, b"\x10"), frame(0x00, b"\xff").repeat(50_000)].concat(),
    ];
    let address = chatd.http_addr();
    let flooding = floods.map(|flood| {
        tokio::spawn(async move {
            let request = format!("GET /mqtt HTTP/1.1\r\nhost: localhost\r\n{HEADERS}\r\n");
            for _ in 0..50 {
                let mut socket = TcpStream::connect(address).await.unwrap();
                socket.write_all(request.as_bytes()).await.unwrap();
                socket.write_all(&flood).await.unwrap_or_default();
                // What it says is not read: it waits in the socket, and nowhere else.
            }
        })
    });
    let mut longest = Duration::ZERO;
    while flooding.iter().any(|flood| !flood.is_finished()) {
        let asked = Instant::now();
        alice.say("alice", "bob", "hello").await.unwrap();
        longest = longest.max(asked.elapsed());
    }
    for flood in flooding {
        flood.await.unwrap();
    }
    let taken = chatd.memory_kb().unwrap().saturating_sub(before);
    println!("PUBACK after {longest:?} at most; {taken} KiB more");
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    assert!(taken < 40 * 1024, "{taken} KiB");
}
