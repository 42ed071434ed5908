//! TLS: the same over an encrypted socket, with certificates that are read again, and clients that show their own.

use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use end_to_end::packet::Version;
use end_to_end::programs::{self, Subscriber};
use end_to_end::tls::{Files, connect, port};
use end_to_end::{Chatd, Client, Connect, Options, PATIENCE, eventually};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::HandshakeKind;
use tokio_rustls::rustls::version::{TLS12, TLS13};

use crate::auth::disconnected;

#[tokio::test]
async fn mosquitto_chats_over_tls() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(files.options()).await.unwrap();
    let port = port(&chatd, "mqtt").await;
    let ca = files.text("ca.pem");
    let over_tls = format!("-h localhost -p {port} --cafile {ca}");
    let mut bob =
        Subscriber::shell(&format!("stdbuf -oL mosquitto_sub {over_tls} -u bob -i phone -q 1 -t chat/bob/inbox -d"))
            .unwrap();
    bob.subscribed().await.unwrap();
    let line = format!("mosquitto_pub {over_tls} -u alice -q 1 -t chat/alice/out/bob -m 'in secret'");
    assert!(programs::shell(&line).await.unwrap().status.success());
    assert!(bob.line().await.unwrap().contains("in secret"));

    for version in ["tlsv1.2", "tlsv1.3"] {
        let line = format!("mosquitto_pub {over_tls} --tls-version {version} -u alice -t chat/alice/out/bob -q 1 -m x");
        assert!(programs::shell(&line).await.unwrap().status.success(), "{version}");
    }
}

#[tokio::test]
async fn the_certificate_is_read_again() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(files.options()).await.unwrap();
    let url = format!("https://localhost:{}/healthz", port(&chatd, "http").await);
    let curl = format!("curl -sf --cacert {} {url}", files.text("ca.pem"));
    assert!(programs::shell(&curl).await.unwrap().status.success());

    // New files of another authority: clients that trust the first one trust it no more.
    let others = Files::new().unwrap();
    std::fs::copy(others.path("server.pem"), files.path("server.pem")).unwrap();
    chatd.signal_hangup().unwrap();
    eventually("a pair that does not fit is refused", PATIENCE, async || {
        chatd.log().unwrap().contains("the certificate stays as it was")
    })
    .await;
    assert!(programs::shell(&curl).await.unwrap().status.success());
    std::fs::copy(others.path("server.key"), files.path("server.key")).unwrap();
    chatd.signal_hangup().unwrap();
    let other = format!("curl -sf --cacert {} {url}", others.text("ca.pem"));
    eventually("the new one is shown", PATIENCE, async || programs::shell(&other).await.unwrap().status.success())
        .await;
    assert!(!programs::shell(&curl).await.unwrap().status.success());
}

#[tokio::test]
async fn a_certificate_is_who_one_is() {
    let files = Files::new().unwrap();
    files.issue("bob", "bob").unwrap();
    files.issue("nobody", "No Body").unwrap();
    let strangers = Files::new().unwrap();
    strangers.issue("bob", "bob").unwrap();
    let options = files.options().set("tls.client_ca", files.text("ca.pem")).set("auth.mode", "required");
    let chatd = Chatd::start_with(options).await.unwrap();
    let port = port(&chatd, "mqtt").await;
    let publish = |shown: String, user: &str| {
        let ca = files.text("ca.pem");
        let topic = "chat/bob/out/alice";
        format!("mosquitto_pub -h localhost -p {port} --cafile {ca} {shown} {user} -i phone -q 1 -t {topic} -m hello")
    };
    let shows = |files: &Files, name: &str| {
        format!("--cert {} --key {}", files.text(&format!("{name}.pem")), files.text(&format!("{name}.key")))
    };
    for (shown, user, works) in [
        (shows(&files, "bob"), "", true),
        (shows(&files, "bob"), "-u bob", true),
        (shows(&files, "bob"), "-u alice", false),
        (shows(&files, "nobody"), "", false),
        (shows(&strangers, "bob"), "", false),
        (String::new(), "-u bob", false),
    ] {
        let line = publish(shown, user);
        let output = programs::shell(&line).await.unwrap();
        assert_eq!(output.status.success(), works, "{line}: {output:?}");
    }
    // Whoever comes in clear text shows no certificate.
    assert!(Connect::v5("bob", "phone").to(&chatd).await.is_err());
}

/// Alice's connection with what she shows, after her CONNECT.
async fn certified(
    connector: &TlsConnector,
    port: u16,
    device: &str,
) -> anyhow::Result<(Client, Option<HandshakeKind>)> {
    let stream = connect(connector, port, "localhost").await?;
    let handshake = stream.get_ref().1.handshake_kind();
    let mut client = Client::on(stream, Version::V5);
    let unnamed = Connect { user_name: None, ..Connect::v5("alice", device) };
    client.send_bytes(&unnamed.bytes()).await?;
    client.connack().await?;
    Ok((client, handshake))
}

/// Neither a connection nor a session of TLS outlives the certificate that it began with.
#[tokio::test]
async fn what_a_certificate_opened_ends_with_it() {
    let files = Files::new().unwrap();
    let options = files.options().set("tls.client_ca", files.text("ca.pem")).set("auth.mode", "required");
    let chatd = Chatd::start_with(options).await.unwrap();
    let port = port(&chatd, "mqtt").await;
    for version in [&TLS12, &TLS13] {
        files.issue_for("short", "alice", Some(SystemTime::now() + Duration::from_secs(8))).unwrap();
        let connector = files.connector_showing("short", version).unwrap();
        let (mut open, handshake) = certified(&connector, port, "open").await.unwrap();
        assert_ne!(handshake, Some(HandshakeKind::Resumed));
        open.say("alice", "bob", "hello").await.unwrap();
        let (again, handshake) = certified(&connector, port, "again").await.unwrap();
        assert_eq!(handshake, Some(HandshakeKind::Resumed), "it is resumed while the certificate lasts");
        again.leave().await.unwrap();
        assert_eq!(disconnected(&mut open).await, 0x87);
        let late =
            certified(&connector, port, "late").await.err().expect("a session that is resumed proves nothing any more");
        let fresh = files.connector_showing("short", version).unwrap();
        assert!(certified(&fresh, port, "late").await.is_err(), "{late:?}");
    }
}

/// Whose certificates are not taken any more has to go at once, and whoever comes with one that is taken stays.
#[tokio::test]
async fn authorities_that_are_removed_take_their_clients_along() {
    let (files, others) = (Files::new().unwrap(), Files::new().unwrap());
    files.issue("alice", "alice").unwrap();
    let authorities = files.path("authorities.pem");
    let trust = |each: &[&Files]| {
        let pem: String = each.iter().map(|files| std::fs::read_to_string(files.path("ca.pem")).unwrap()).collect();
        std::fs::write(&authorities, pem).unwrap();
    };
    trust(&[&files]);
    let options = files.options().set("tls.client_ca", authorities.display()).set("auth.mode", "required");
    let chatd = Chatd::start_with(options).await.unwrap();
    let port = port(&chatd, "mqtt").await;
    let connector = files.connector_showing("alice", &TLS13).unwrap();
    let (mut alice, _) = certified(&connector, port, "phone").await.unwrap();
    let read_again = async |times: usize| {
        chatd.signal_hangup().unwrap();
        let count = || chatd.log().unwrap().matches("read the users").count();
        eventually("it is read again", PATIENCE, async || count() >= times).await;
    };
    trust(&[&others, &files]);
    read_again(1).await;
    alice.say("alice", "bob", "still here").await.unwrap();
    trust(&[&others]);
    read_again(2).await;
    assert_eq!(disconnected(&mut alice).await, 0x87);
    assert!(certified(&connector, port, "phone").await.is_err());
}

/// Reads what comes until the server closes.
async fn rest(mut io: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut rest = Vec::new();
    let end = tokio::time::timeout(PATIENCE, io.read_to_end(&mut rest)).await.expect("it is closed");
    // Closed, or reset: what was said was not read.
    end.unwrap_or_default();
    rest
}

/// Sends a byte now and then until the server closes; how long that took.
async fn drip(io: impl AsyncRead + AsyncWrite, bytes: &[u8]) -> Duration {
    let began = Instant::now();
    let (reading, mut writing) = tokio::io::split(io);
    let dripping = async {
        for byte in bytes.iter().cycle() {
            if writing.write_all(&[*byte]).await.is_err() || writing.flush().await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        std::future::pending().await
    };
    tokio::select! {
        _ = rest(reading) => began.elapsed(),
        () = dripping => unreachable!("it never ends"),
    }
}

const SHORT: Duration = Duration::from_millis(700);
const UPGRADE: &str = "GET /mqtt HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                       sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: mqtt\r\n\r\n";

#[track_caller]
fn assert_closed_in_time(what: &str, took: Duration) {
    // No earlier than it should, and not when another deadline ends.
    assert!(took >= SHORT / 2 && took < Duration::from_secs(20), "{what}: closed after {took:?}");
}

/// Only this limit is short: whatever closes a client that takes its time, it is this.
fn short(files: &Files, limit: &str) -> Options {
    let mut options = files.options();
    for each in ["tls", "websocket", "connect"] {
        options = options.set(&format!("limits.{each}_timeout_ms"), 600_000);
    }
    options.set(&format!("limits.{limit}_timeout_ms"), SHORT.as_millis())
}

/// A client that says nothing, or a byte now and then, costs its place for as long as there is for the handshake, and delays nobody.
#[tokio::test]
async fn slowness_in_the_tls_handshake_ends_at_its_deadline() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(short(&files, "tls")).await.unwrap();
    // The beginning of a ClientHello that would be 4 KiB long.
    let hello = [&[22, 3, 1, 0x10, 4, 1, 0, 0x10, 0, 3, 3][..], &[7; 4_000]].concat();
    for protocol in ["mqtt", "http"] {
        let port = port(&chatd, protocol).await;
        let mut silent = Vec::new();
        for _ in 0..50 {
            silent.push(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
        }
        let socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_closed_in_time(protocol, drip(socket, &hello).await);
        for socket in silent {
            assert_eq!(rest(socket).await, b"");
        }
    }
    let counted = async || chatd.limited("tls_timeout_ms").await.unwrap() >= 102.0;
    eventually("each of them is counted", PATIENCE, counted).await;
}

#[tokio::test]
async fn slowness_in_a_request_ends_at_its_deadline() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(short(&files, "websocket")).await.unwrap();
    let connector = files.connector(&["http/1.1"]).unwrap();
    let port = port(&chatd, "http").await;
    let request = UPGRADE.trim_end().as_bytes();
    let clear = TcpStream::connect(chatd.http_addr()).await.unwrap();
    assert_closed_in_time("in clear", drip(clear, request).await);
    assert_closed_in_time("over TLS", drip(connect(&connector, port, "localhost").await.unwrap(), request).await);
    // Between requests it has as long.
    let mut kept_alive = connect(&connector, port, "localhost").await.unwrap();
    let began = Instant::now();
    kept_alive.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let answer = rest(kept_alive).await;
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    assert_closed_in_time("between requests", began.elapsed());
    let counted = async || chatd.limited("websocket_timeout_ms").await.unwrap() >= 2.0;
    eventually("those that began a request are counted", PATIENCE, counted).await;
}

#[tokio::test]
async fn slowness_in_connect_ends_at_its_deadline() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(short(&files, "connect")).await.unwrap();
    let connect_packet = Connect::v5("alice", &"x".repeat(1_000)).bytes();
    let clear = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
    assert_closed_in_time("in clear", drip(clear, &connect_packet).await);
    let mqtt = files.connector(&["mqtt"]).unwrap();
    let over_tls = connect(&mqtt, port(&chatd, "mqtt").await, "localhost").await.unwrap();
    assert_closed_in_time("over TLS", drip(over_tls, &connect_packet).await);
    let http = files.connector(&["http/1.1"]).unwrap();
    let mut upgraded = connect(&http, port(&chatd, "http").await, "localhost").await.unwrap();
    upgraded.write_all(UPGRADE.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    upgraded.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 101");
    // A mask of zeros, and two bytes of the packet a frame.
    let frames: Vec<u8> =
        connect_packet.chunks(2).flat_map(|bytes| [&[0x82, 0x82, 0, 0, 0, 0], bytes].concat()).collect();
    assert_closed_in_time("over WebSocket over TLS", drip(upgraded, &frames).await);
}

/// Each has its time from when the one before is done.
#[tokio::test]
async fn deadlines_are_counted_anew() {
    let files = Files::new().unwrap();
    let mut options = files.options();
    for each in ["tls", "websocket", "connect"] {
        options = options.set(&format!("limits.{each}_timeout_ms"), 4_000);
    }
    let chatd = Chatd::start_with(options).await.unwrap();
    let connector = files.connector(&["http/1.1"]).unwrap();
    let taking_time = || tokio::time::sleep(Duration::from_millis(1_600));
    let port = port(&chatd, "http").await;
    let socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    taking_time().await;
    let name = "localhost".to_owned().try_into().unwrap();
    let mut client = connector.connect(name, socket).await.unwrap();
    taking_time().await;
    client.write_all(UPGRADE.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    client.read_exact(&mut status).await.unwrap();
    taking_time().await;
    let packet = Connect::v4("alice", "phone").bytes();
    let frame = [&[0x82, 0x80 | u8::try_from(packet.len()).unwrap(), 0, 0, 0, 0], packet.as_slice()].concat();
    client.write_all(&frame).await.unwrap();
    let connack = [0x82, 4, 0x20, 2, 0, 0];
    let mut answer = Vec::new();
    while !answer.ends_with(&connack) {
        assert!(client.read_buf(&mut answer).await.unwrap() > 0, "{}", String::from_utf8_lossy(&answer));
    }
}

/// A ClientHello of this version, in the way of TLS 1.2 and before.
fn client_hello(minor: u8) -> Vec<u8> {
    let mut body = vec![3, minor];
    body.extend([7; 32]);
    // No session; ECDHE with AES in CBC mode, as TLS 1.0 has it; no compression; a curve, and points in the usual form.
    body.extend([0, 0, 4, 0xc0, 0x13, 0xc0, 0x09, 1, 0, 0, 14, 0, 10, 0, 4, 0, 2, 0, 23, 0, 11, 0, 2, 1, 0]);
    let length = u8::try_from(body.len()).unwrap();
    [&[22, 3, 1, 0, length + 4, 1, 0, 0, length], body.as_slice()].concat()
}

#[tokio::test]
async fn old_versions_of_tls_are_refused() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(files.options()).await.unwrap();
    for protocol in ["mqtt", "http"] {
        let port = port(&chatd, protocol).await;
        // SSL 3, TLS 1.0 and 1.1.
        for minor in 0..=2 {
            let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            socket.write_all(&client_hello(minor)).await.unwrap();
            let answer = rest(socket).await;
            // A fatal alert, and no ServerHello.
            assert!(answer.len() == 7 && answer[0] == 21 && answer[5] == 2, "3.{minor}: {answer:02x?}");
        }
    }
}

/// Nobody can be talked into speaking one protocol to the port of another.
#[tokio::test]
async fn what_is_asked_for_by_alpn_is_what_is_spoken() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(files.options()).await.unwrap();
    for (protocol, alpn, spoken) in [
        ("mqtt", &["mqtt"][..], Some(Some(&b"mqtt"[..]))),
        ("mqtt", &[], Some(None)),
        ("mqtt", &["http/1.1"], None),
        ("mqtt", &["h2", "http/1.1"], None),
        ("http", &["h2", "http/1.1"], Some(Some(b"http/1.1"))),
        ("http", &[], Some(None)),
        ("http", &["mqtt"], None),
        ("http", &["acme-tls/1"], None),
    ] {
        let connector = files.connector(alpn).unwrap();
        let stream = connect(&connector, port(&chatd, protocol).await, "localhost").await.ok();
        let agreed = stream.as_ref().map(|stream| stream.get_ref().1.alpn_protocol());
        assert_eq!(agreed, spoken, "{protocol}: {alpn:?}");
    }
}

#[tokio::test]
async fn a_certificate_is_read_again_when_its_file_changes() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(files.options()).await.unwrap();
    let port = port(&chatd, "http").await;
    let others = Files::new().unwrap();
    let connector = others.connector(&[]).unwrap();
    assert!(connect(&connector, port, "localhost").await.is_err());
    for name in ["server.pem", "server.key"] {
        std::fs::copy(others.path(name), files.path(name)).unwrap();
    }
    eventually("the new one is shown", PATIENCE, async || connect(&connector, port, "localhost").await.is_ok()).await;
}

/// A crowd that begins handshakes all at once takes turns: those who are in go on.
#[tokio::test]
async fn five_hundred_handshakes_at_once_do_not_delay_others() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(files.options()).await.unwrap();
    let port = port(&chatd, "mqtt").await;
    let connector = files.connector(&["mqtt"]).unwrap();
    let mut innocent = Connect::v5("innocent", "phone").to(&chatd).await.unwrap();
    let mut shaking = JoinSet::new();
    for _ in 0..500 {
        let connector = connector.clone();
        shaking.spawn(async move { connect(&connector, port, "localhost").await });
    }
    let began = Instant::now();
    let mut waits = Vec::new();
    let mut shaken = Vec::new();
    while !shaking.is_empty() {
        let asked = Instant::now();
        innocent.say("innocent", "friend", "hello").await.unwrap();
        waits.push(asked.elapsed());
        while let Some(done) = shaking.try_join_next() {
            shaken.push(done.unwrap().unwrap());
        }
    }
    waits.sort_unstable();
    let (middle, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    println!(
        "{} handshakes in {:?}; {} PUBACKs meanwhile, {middle:?} in the middle, {longest:?} at most",
        shaken.len(),
        began.elapsed(),
        waits.len()
    );
    assert_eq!(shaken.len(), 500);
    assert!(longest < Duration::from_secs(2), "{longest:?}");
}

#[tokio::test]
async fn settings_that_do_not_fit_are_told() {
    let files = Files::new().unwrap();
    let key = files.text("server.key");
    for (options, part) in [
        (Options::default().set("tls.key", &key), "tls.certificate"),
        (Options::default().set("mqtt.tls_listen", "127.0.0.1:0"), "tls.certificate"),
        (files.options().set("tls.certificate", &key), "no certificate"),
        (files.options().set("tls.key", files.text("server.pem")), "no private key"),
        (files.options().set("tls.certificate", files.text("ca.pem")), "tls.key"),
        (files.options().set("tls.certificate", "/does/not/exist"), "/does/not/exist"),
        (files.options().set("mqtt.tls_listen", "0.0.0.0:0"), "loopback"),
        (files.options().set("acme.domains", "chat.example.org"), "acme.domains"),
        (files.options().set("tls.client_ca", files.text("ca.pem")), "development mode"),
        (Options::default().set("tls.client_ca", files.text("ca.pem")).set("auth.mode", "required"), "tls_listen"),
    ] {
        let mut command = end_to_end::chatd::command().await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        command.args(["--mqtt-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--data"]).arg(folder.path());
        command.envs(options.environment.clone()).stdout(Stdio::null());
        let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends").unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(part), "{part}: {said}");
    }
}
