//! Nothing that a client sends reaches a panic, another client, or the buses.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use end_to_end::packet::{self, Packet, Properties, Publish, Value, Version, Will, frame, id};
use end_to_end::{Chatd, Client, Connect, Dice, Options, PATIENCE};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::chat::{Bystanders, assert_well, listener, seqs};

/// What the server may do with something hostile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It violates MQTT: the connection ends.
    Closed,
    /// It is refused or goes nowhere: the connection is kept.
    Kept,
    /// MQTT leaves it open.
    Either,
}

fn string(text: &[u8]) -> Vec<u8> {
    let mut bytes = u16::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(text);
    bytes
}

/// A PUBLISH with any bytes as topic.
fn publish_to(version: Version, topic: &[u8], qos: u8) -> Vec<u8> {
    let mut body = string(topic);
    if qos > 0 {
        body.extend([0, 9]);
    }
    if version == Version::V5 {
        body.push(0);
    }
    body.extend(b"boo");
    frame(0x30 | (qos << 1), &body)
}

/// A SUBSCRIBE or UNSUBSCRIBE with any bytes as filter.
fn subscribe_to(version: Version, first: u8, filter: &[u8]) -> Vec<u8> {
    let mut body = vec![0, 9];
    if version == Version::V5 {
        body.push(0);
    }
    body.extend(string(filter));
    if first == 0x82 {
        body.push(1);
    }
    frame(first, &body)
}

/// Topics and filters that no decent client uses, and what may become of a connection that does.
fn names() -> Vec<(Vec<u8>, Fate, Fate)> {
    let levels = vec![b'/'; 65_535];
    let long = vec![b'x'; 65_535];
    let mut long_chat = b"chat/alice/out/".to_vec();
    long_chat.resize(65_535, b'x');
    let mut many_wildcards = b"+/".repeat(32_767);
    many_wildcards.push(b'#');
    vec![
        // name, as a topic, as a filter
        ("é".into(), Fate::Kept, Fate::Kept),
        ("ümlaut/topic".into(), Fate::Kept, Fate::Kept),
        ("日本/語".into(), Fate::Kept, Fate::Kept),
        ("\u{10ffff}".into(), Fate::Either, Fate::Either),
        ("👋/#".into(), Fate::Either, Fate::Kept),
        ("/é".into(), Fate::Kept, Fate::Kept),
        (b"".into(), Fate::Either, Fate::Either),
        (b"/".into(), Fate::Kept, Fate::Kept),
        (b"//".into(), Fate::Kept, Fate::Kept),
        (levels, Fate::Either, Fate::Either),
        (b"a/".repeat(5_000), Fate::Either, Fate::Either),
        (many_wildcards, Fate::Either, Fate::Either),
        (long, Fate::Kept, Fate::Kept),
        (long_chat, Fate::Kept, Fate::Kept),
        (b"#".into(), Fate::Either, Fate::Kept),
        (b"+".into(), Fate::Either, Fate::Kept),
        (b"a/+/b".into(), Fate::Either, Fate::Kept),
        (b"a/#/b".into(), Fate::Either, Fate::Either),
        (b"a#".into(), Fate::Either, Fate::Either),
        (b"a+/b".into(), Fate::Either, Fate::Either),
        (b"chat/alice/out/+".into(), Fate::Either, Fate::Kept),
        (b"chat/+/inbox".into(), Fate::Either, Fate::Kept),
        (b"nul\0nul".into(), Fate::Either, Fate::Either),
        (b"\0".into(), Fate::Either, Fate::Either),
        (b"\xff\xfe".into(), Fate::Closed, Fate::Closed),
        (b"\xed\xa0\x80".into(), Fate::Closed, Fate::Closed),
        (b"$SYS/broker/uptime".into(), Fate::Kept, Fate::Kept),
        (b"$SYS/#".into(), Fate::Kept, Fate::Kept),
        (b"$".into(), Fate::Kept, Fate::Kept),
        (b"$share".into(), Fate::Kept, Fate::Either),
        (b"$share/".into(), Fate::Kept, Fate::Either),
        (b"$share/g".into(), Fate::Kept, Fate::Either),
        (b"$share//a".into(), Fate::Kept, Fate::Either),
        (b"$share/g/".into(), Fate::Kept, Fate::Either),
        (b"$share/+/a".into(), Fate::Either, Fate::Either),
        (b"ordinary".into(), Fate::Kept, Fate::Kept),
        (b"chat/".into(), Fate::Kept, Fate::Kept),
        (b"chat//inbox".into(), Fate::Kept, Fate::Kept),
    ]
}

/// Packets that violate MQTT after a proper CONNECT, or come close to it.
fn packets(version: Version) -> Vec<(&'static str, Vec<u8>, Fate)> {
    let v5 = version == Version::V5;
    let mut packets = vec![
        ("type 0", frame(0x00, &[]), Fate::Closed),
        ("type 0 with a body", frame(0x0f, &[1, 2, 3]), Fate::Closed),
        ("a second CONNECT", Connect::new(version, "alice", "hostile").bytes(), Fate::Closed),
        ("CONNACK", if v5 { frame(0x20, &[0, 0, 0]) } else { frame(0x20, &[0, 0]) }, Fate::Closed),
        ("SUBACK", if v5 { frame(0x90, &[0, 1, 0, 0]) } else { frame(0x90, &[0, 1, 0]) }, Fate::Closed),
        ("UNSUBACK", if v5 { frame(0xb0, &[0, 1, 0, 0]) } else { frame(0xb0, &[0, 1]) }, Fate::Closed),
        ("PINGRESP", frame(0xd0, &[]), Fate::Closed),
        ("AUTH", frame(0xf0, &[]), Fate::Closed),
        ("AUTH with a reason", frame(0xf0, &[0x18, 0]), Fate::Closed),
        ("PUBLISH at QoS 3", frame(0x36, b"\0\x01a\0\x01\0x"), Fate::Closed),
        ("PUBLISH with packet identifier 0", frame(0x32, b"\0\x01a\0\0\0x"), Fate::Closed),
        ("PUBLISH that ends in its topic", frame(0x30, b"\0\x09abc"), Fate::Closed),
        ("PUBLISH without a body", frame(0x30, &[]), Fate::Closed),
        ("PUBLISH without a packet identifier", frame(0x32, b"\0\x01a"), Fate::Closed),
        ("SUBSCRIBE without filters", frame(0x82, if v5 { &[0, 1, 0] } else { &[0, 1] }), Fate::Closed),
        ("SUBSCRIBE with wrong flags", with_first(0x80, subscribe_with_options(version, 0)), Fate::Closed),
        ("SUBSCRIBE with packet identifier 0", subscribe_with_id_0(version), Fate::Closed),
        ("SUBSCRIBE at QoS 3", subscribe_with_options(version, 3), Fate::Closed),
        ("SUBSCRIBE with reserved options", subscribe_with_options(version, 0xc0), Fate::Closed),
        ("UNSUBSCRIBE without filters", frame(0xa2, if v5 { &[0, 1, 0] } else { &[0, 1] }), Fate::Closed),
        ("UNSUBSCRIBE with wrong flags", with_first(0xa0, subscribe_to(version, 0xa2, b"a")), Fate::Closed),
        ("PUBACK without a body", frame(0x40, &[]), Fate::Closed),
        ("PUBREL with wrong flags", frame(0x60, &[0, 1]), Fate::Closed),
        ("PINGREQ with a body", frame(0xc0, &[1]), Fate::Either),
        ("PINGREQ with flags", frame(0xc1, &[]), Fate::Closed),
        ("DISCONNECT with flags", frame(0xe1, &[]), Fate::Closed),
        ("DISCONNECT with rubbish", frame(0xe0, &[0xff; 20]), Fate::Closed),
        ("a length of five bytes", vec![0x30, 0xff, 0xff, 0xff, 0xff, 0x01], Fate::Closed),
        ("256 MB announced", vec![0x30, 0xff, 0xff, 0xff, 0x7f, 0, 1, b'a'], Fate::Closed),
        ("HTTP", http_request(), Fate::Closed),
        ("TLS", [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[0x42; 64]].concat(), Fate::Closed),
        // What is acknowledged was never sent.
        ("PUBACK of nothing", packet::puback(4_711), Fate::Either),
        ("PUBREC of nothing", packet::pubrec(4_711), Fate::Either),
        ("PUBREL of nothing", packet::pubrel(4_711), Fate::Either),
        ("PUBCOMP of nothing", packet::pubcomp(4_711), Fate::Either),
    ];
    if v5 {
        let publish = |properties: Properties| {
            packet::publish(version, &Publish { properties, ..Publish::new("ordinary", "x", 0) })
        };
        let aliased = |alias| publish(Properties::none().with(id::TOPIC_ALIAS, Value::U16(alias)));
        packets.extend([
            ("topic alias 0", aliased(0), Fate::Closed),
            ("topic alias 65535", aliased(u16::MAX), Fate::Closed),
            ("an alias that stands for nothing", frame(0x30, &[0, 0, 3, id::TOPIC_ALIAS, 0, 1, b'x']), Fate::Closed),
            ("a property that does not exist", frame(0x30, b"\0\x01a\x02\x7f\0x"), Fate::Closed),
            (
                "a property of another packet",
                publish(Properties::none().with(id::SESSION_EXPIRY, Value::U32(1))),
                Fate::Closed,
            ),
            (
                "a property twice",
                publish(
                    Properties::none().with(id::MESSAGE_EXPIRY, Value::U32(1)).with(id::MESSAGE_EXPIRY, Value::U32(2)),
                ),
                Fate::Closed,
            ),
            ("payload format 2", publish(Properties::none().with(id::PAYLOAD_FORMAT, Value::Byte(2))), Fate::Closed),
            (
                "subscription identifier in a PUBLISH",
                publish(Properties::none().with(id::SUBSCRIPTION_IDENTIFIER, Value::Variable(1))),
                Fate::Closed,
            ),
            (
                "a wildcard as response topic",
                publish(Properties::none().with(id::RESPONSE_TOPIC, Value::Text("a/#".into()))),
                Fate::Either,
            ),
            ("properties longer than the packet", frame(0x30, b"\0\x01a\x7fx"), Fate::Closed),
            ("a property length of five bytes", frame(0x30, b"\0\x01a\xff\xff\xff\xff\x01x"), Fate::Closed),
            ("subscription identifier 0", subscribe_with_identifier(0), Fate::Closed),
            (
                "NoLocal on a shared subscription",
                packet::subscribe(version, 3, &Properties::none(), &[("$share/g/a", 0x05)]),
                Fate::Either,
            ),
            ("retain handling 3", packet::subscribe(version, 3, &Properties::none(), &[("a", 0x30)]), Fate::Closed),
            (
                "a thousand user properties",
                publish((0..1_000).fold(Properties::none(), |p, n| p.with_user(&format!("key {n}"), "value"))),
                Fate::Kept,
            ),
            (
                "a user property of 65,535 bytes",
                publish(Properties::none().with_user("k", &"v".repeat(65_535))),
                Fate::Kept,
            ),
            (
                "DISCONNECT that adds an expiry",
                packet::disconnect(version, 0, &Properties::none().with(id::SESSION_EXPIRY, Value::U32(9))),
                Fate::Closed,
            ),
        ]);
    }
    packets
}

/// To an MQTT server it looks like a PUBACK of 69 bytes with wrong flags, so it has to be longer than that.
fn http_request() -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nhost: chatd\r\nuser-agent: {}\r\n\r\n", "x".repeat(200)).into_bytes()
}

fn with_first(first: u8, mut packet: Vec<u8>) -> Vec<u8> {
    packet[0] = first;
    packet
}

fn subscribe_with_options(version: Version, options: u8) -> Vec<u8> {
    packet::subscribe(version, 3, &Properties::none(), &[("a", options)])
}

fn subscribe_with_id_0(version: Version) -> Vec<u8> {
    packet::subscribe(version, 0, &Properties::none(), &[("a", 0)])
}

fn subscribe_with_identifier(identifier: u32) -> Vec<u8> {
    let properties = Properties::none().with(id::SUBSCRIPTION_IDENTIFIER, Value::Variable(identifier));
    packet::subscribe(Version::V5, 3, &properties, &[("a", 0)])
}

/// Sends it on a connection of its own after CONNECT, and looks what becomes of the connection.
async fn suffer(chatd: &Chatd, connect: &Connect, what: &str, bytes: &[u8], fate: Fate) -> Result<()> {
    let mut client = connect.to(chatd).await.context("connecting")?;
    // It may be closed while we still write. A PINGREQ that came together with the violation may still be answered, a later one not.
    let mut pings_answered = 0;
    let mut open = client.send_bytes(bytes).await.is_ok() && client.send_bytes(&packet::pingreq()).await.is_ok();
    while open && pings_answered < 2 {
        match client.receive().await.with_context(|| format!("after {what}"))? {
            Some(Packet::Pingresp) => {
                pings_answered += 1;
                open = pings_answered == 2 || client.send_bytes(&packet::pingreq()).await.is_ok();
            }
            Some(Packet::Disconnect { code, .. }) => ensure!(code >= 0x80, "{what}: DISCONNECT {code:#x}"),
            Some(_) => {}
            None => open = false,
        }
    }
    let kept = open;
    match (fate, kept) {
        (Fate::Closed, true) => bail!("{what}: the connection should be closed ({:?})", connect.version),
        (Fate::Kept, false) => bail!("{what}: the connection should be kept ({:?})", connect.version),
        _ => Ok(()),
    }
}

#[tokio::test]
async fn names_that_no_decent_client_uses() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    // Somebody has to be matched against all of them.
    let mut everything = Connect::v5("watcher", "watcher").to(&chatd).await.unwrap();
    everything.subscribe("#", 0).await.unwrap();
    everything.subscribe("+/+", 1).await.unwrap();
    let mut failures = Vec::new();
    for version in [Version::V4, Version::V5] {
        for web_socket in [false, true] {
            let connect = Connect { web_socket, ..Connect::new(version, "alice", "hostile") };
            for (name, as_topic, as_filter) in names() {
                let shown = String::from_utf8_lossy(&name[..name.len().min(20)]).into_owned();
                for qos in 0..=2 {
                    let what = format!("PUBLISH to {shown:?} ({} bytes) at QoS {qos}", name.len());
                    failures.extend(
                        suffer(&chatd, &connect, &what, &publish_to(version, &name, qos), as_topic).await.err(),
                    );
                }
                for (first, verb) in [(0x82, "SUBSCRIBE"), (0xa2, "UNSUBSCRIBE")] {
                    let what = format!("{verb} {shown:?} ({} bytes)", name.len());
                    let fate = if first == 0xa2 && as_filter != Fate::Closed { Fate::Either } else { as_filter };
                    failures.extend(
                        suffer(&chatd, &connect, &what, &subscribe_to(version, first, &name), fate).await.err(),
                    );
                }
                // As a will, which is published when the connection breaks.
                if let Ok(topic) = String::from_utf8(name) {
                    let will = Will { topic, payload: b"boo".to_vec(), ..Will::default() };
                    let mut client = connect.clone().will(will).open(&chatd).await.unwrap();
                    client.receive().await.expect("an answer to CONNECT with a strange will");
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    bystanders.were_not_disturbed().await.unwrap();
    everything.ping().await.unwrap();
    assert_well(&chatd).await;
}

#[tokio::test]
async fn packets_that_no_decent_client_sends() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let mut failures = Vec::new();
    for version in [Version::V4, Version::V5] {
        for web_socket in [false, true] {
            let connect = Connect { web_socket, ..Connect::new(version, "alice", "hostile") };
            for (what, bytes, fate) in packets(version) {
                failures.extend(suffer(&chatd, &connect, what, &bytes, fate).await.err());
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// Whatever comes instead of a CONNECT, or as a bad one, is answered by a refusal or a closed connection, soon.
#[tokio::test]
async fn first_packets_that_are_no_connect() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let good = Connect::v5("alice", "hostile").bytes();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    let wills = [Will { topic: "a/#".into(), ..Will::default() }, Will { topic: String::new(), ..Will::default() }];
    let mut openings: Vec<(String, Vec<u8>)> = vec![
        ("a protocol name of its own".into(), with(5, b'X')),
        ("version 0".into(), with(8, 0)),
        ("version 3".into(), with(8, 3)),
        ("version 6".into(), with(8, 6)),
        ("version 255".into(), with(8, 255)),
        ("the reserved flag".into(), with(9, 0x83)),
        ("a will QoS without will".into(), with(9, 0x8a)),
        ("will QoS 3".into(), with(9, 0x9e)),
        ("wrong fixed flags".into(), with(0, 0x11)),
        ("receive maximum 0".into(), Connect::v5("alice", "hostile").receive_maximum(0).bytes()),
        (
            "a maximum packet size of 0".into(),
            Connect {
                properties: Properties::none().with(id::MAXIMUM_PACKET_SIZE, Value::U32(0)),
                ..Connect::v5("alice", "h")
            }
            .bytes(),
        ),
        (
            "an unknown authentication method".into(),
            Connect {
                properties: Properties::none().with(id::AUTHENTICATION_METHOD, Value::Text("magic".into())),
                ..Connect::v5("alice", "h")
            }
            .bytes(),
        ),
        ("a client identifier of 65,535 bytes".into(), Connect::v5("alice", &"x".repeat(65_535)).bytes()),
        ("a user name of 65,535 bytes".into(), Connect::v4(&"x".repeat(65_535), "hostile").bytes()),
        ("256 MB announced".into(), vec![0x10, 0xff, 0xff, 0xff, 0x7f, 0, 4, b'M']),
        ("a length of five bytes".into(), vec![0x10, 0x80, 0x80, 0x80, 0x80, 0x80]),
        ("PINGREQ".into(), packet::pingreq()),
        ("PUBLISH".into(), publish_to(Version::V5, b"a", 0)),
        ("SUBSCRIBE".into(), subscribe_to(Version::V4, 0x82, b"#")),
        ("DISCONNECT".into(), frame(0xe0, &[])),
        ("HTTP".into(), http_request()),
        ("zeros".into(), vec![0; 100]),
        ("ones".into(), vec![0xff; 100]),
    ];
    openings
        .extend(wills.map(|will| (format!("will to {:?}", will.topic), Connect::v5("alice", "h").will(will).bytes())));
    let mut failures = Vec::new();
    for (what, bytes) in openings {
        for web_socket in [false, true] {
            let address = if web_socket { chatd.http_addr() } else { chatd.mqtt_addr() };
            let mut client = match web_socket {
                true => Client::web_socket(address, Version::V5).await.unwrap(),
                false => Client::tcp(address, Version::V5).await.unwrap(),
            };
            client.set_patience(Duration::from_secs(8));
            client.send_bytes(&bytes).await.unwrap();
            loop {
                match client.receive().await {
                    Ok(Some(Packet::Connack { code: 0, .. })) => {
                        failures.push(format!("{what}: accepted"));
                        break;
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    // A CONNACK of MQTT 3.1.1 is no packet of MQTT 5.
                    Err(error) if format!("{error:#}").contains("packet ends") => break,
                    Err(error) => {
                        failures.push(format!("{what}: {error:#}"));
                        break;
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// A conversation of one of each packet that a client may send.
fn decent_packets(version: Version) -> Vec<Vec<u8>> {
    let v5 = version == Version::V5;
    let with = |properties: Properties| if v5 { properties } else { Properties::none() };
    let will = Will { topic: "wills/alice".into(), payload: b"gone".to_vec(), qos: 1, retain: true, ..Will::default() };
    let mut connect = Connect::new(version, "alice", "hostile").persistent().will(will).keep_alive(60);
    connect.password = Some(b"pw".to_vec());
    let message = |topic: &str, qos, packet_id, properties| {
        let publish = Publish { packet_id, properties, ..Publish::new(topic, "some text", qos) };
        packet::publish(version, &publish)
    };
    let properties = Properties::none()
        .with(id::PAYLOAD_FORMAT, Value::Byte(1))
        .with(id::MESSAGE_EXPIRY, Value::U32(60))
        .with(id::RESPONSE_TOPIC, Value::Text("answers".into()))
        .with(id::CORRELATION_DATA, Value::Binary(vec![1, 2, 3]))
        .with_user("id", "m-1");
    vec![
        connect.bytes(),
        packet::subscribe(version, 1, &Properties::none(), &[("chat/alice/#", 1), ("ordinary/+", 2), ("#", 0)]),
        message("chat/alice/out/bob", 1, 2, with(properties.clone())),
        message("chat/alice/out/bob/m-2", 2, 3, Properties::none()),
        message("ordinary/topic", 2, 4, with(properties)),
        message("ordinary/topic", 0, 0, Properties::none()),
        packet::pubrel(3),
        packet::puback(1),
        packet::pubrec(2),
        packet::pubcomp(2),
        packet::unsubscribe(version, 5, &["ordinary/+", "nothing"]),
        packet::pingreq(),
        packet::disconnect(version, 0, &with(Properties::none().with_user("why", "done"))),
    ]
}

/// The connection breaks after every byte of a conversation, by half a close and by a reset.
#[tokio::test]
async fn packets_cut_at_every_byte() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    for version in [Version::V4, Version::V5] {
        let bytes = decent_packets(version).concat();
        for end in 0..=bytes.len() {
            let mut stream = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
            stream.write_all(&bytes[..end]).await.unwrap();
            if end % 2 == 0 {
                stream.shutdown().await.unwrap();
                let mut answers = Vec::new();
                let reading = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answers)).await;
                // A reset is fine, too: it is the end that counts.
                let _ended = reading.unwrap_or_else(|_| panic!("cut after byte {end}: the connection was not closed"));
            } else {
                reset(stream);
            }
        }
    }
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// Ends a connection with RST, as a client does that vanishes.
fn reset(stream: TcpStream) {
    stream.set_zero_linger().expect("a TCP socket can linger");
    drop(stream);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_mutated_packets() {
    const PACKETS: usize = 20_000;
    const PER_CONNECTION: usize = 8;
    let mut dice = Dice::thrown("mutated packets");
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let decent = [decent_packets(Version::V4), decent_packets(Version::V5)];
    for connection in 0..PACKETS / PER_CONNECTION {
        let decent = &decent[dice.below(2)];
        // Most begin decently: what comes before a CONNECT does not get far.
        let mut bytes = if dice.below(8) == 0 { mutated(&mut dice, &decent[0]) } else { decent[0].clone() };
        for _ in 0..PER_CONNECTION {
            let one = &decent[1 + dice.below(decent.len() - 1)];
            bytes.extend(mutated(&mut dice, one));
        }
        let mut stream = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
        // The server may close before it has read everything.
        if stream.write_all(&bytes).await.is_err() {
            continue;
        }
        match dice.below(3) {
            0 => reset(stream),
            _ => {
                if stream.shutdown().await.is_ok() {
                    let mut answers = Vec::new();
                    let reading = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answers)).await;
                    let _ended =
                        reading.unwrap_or_else(|_| panic!("connection {connection} was not closed: {bytes:02x?}"));
                }
            }
        }
    }
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

fn mutated(dice: &mut Dice, packet: &[u8]) -> Vec<u8> {
    let mut bytes = packet.to_vec();
    for _ in 0..=dice.below(3) {
        let at = dice.below(bytes.len().max(1));
        match dice.below(7) {
            _ if bytes.is_empty() => bytes.push(dice.byte()),
            0 => bytes[at] = dice.byte(),
            1 => bytes[at] ^= 1 << dice.below(8),
            2 => bytes.insert(at, dice.byte()),
            3 => drop(bytes.remove(at)),
            4 => bytes.truncate(at),
            5 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.below(5)],
            _ => {
                // A part again, with the length of the packet left as it was.
                let end = at + dice.below(bytes.len() - at + 1);
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
        }
    }
    // Half of them with a length that is right, so that the mistake is inside.
    if dice.below(2) == 0 && bytes.len() >= 2 && bytes.len() < 120 {
        bytes[1] = u8::try_from(bytes.len() - 2).unwrap();
    }
    bytes
}

/// Shared subscriptions are left while messages are in flight.
#[tokio::test]
async fn shared_subscriptions_left_with_messages_in_flight() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let mut publisher = Connect::v5("alice", "publisher").to(&chatd).await.unwrap();
    for round in 0..50 {
        let version = if round % 2 == 0 { Version::V4 } else { Version::V5 };
        let mut worker =
            Connect::new(version, "worker", &format!("worker-{}", round % 5)).persistent().to(&chatd).await.unwrap();
        // Refused or granted, both will do; so will both kinds of leaving.
        worker.subscribe_codes(&[("$share/workers/jobs/#", 1), ("jobs/+", 2)]).await.unwrap();
        publisher.publish_all((0..20).map(|job| Publish::new(format!("jobs/{job}"), "do it", 1))).await.unwrap();
        if round % 3 == 0 {
            worker.unsubscribe("$share/workers/jobs/#").await.unwrap();
        }
        if round % 3 != 1 {
            drop(worker);
        } else {
            worker.leave().await.unwrap();
        }
    }
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// Two thousand clients come, subscribe, and vanish at once, with messages on their way to them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_clients_that_vanish() {
    let chatd = std::sync::Arc::new(Chatd::start().await.unwrap());
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let mut flood = tokio::task::JoinSet::new();
    for wave in 0..4 {
        let chatd = std::sync::Arc::clone(&chatd);
        flood.spawn(async move {
            let mut streams = Vec::new();
            for number in 0..500 {
                let mut bytes = Connect::v5(&format!("flood-{wave}"), &format!("device-{number}")).bytes();
                let filters = [("chat/flood-0/#", 1), ("flood/#", 1), ("chat/flood-1/inbox", 0)];
                bytes.extend(packet::subscribe(Version::V5, 1, &Properties::none(), &filters));
                let said = Publish::new(format!("chat/flood-{wave}/out/flood-{}", (wave + 1) % 4), "hello", 0);
                bytes.extend(packet::publish(Version::V5, &said));
                bytes.extend(packet::publish(Version::V5, &Publish::new("flood/all", "to all", 0)));
                let mut stream = TcpStream::connect(chatd.mqtt_addr()).await?;
                stream.write_all(&bytes).await?;
                streams.push(stream);
                if streams.len() == 100 {
                    streams.drain(..).for_each(reset);
                }
            }
            anyhow::Ok(())
        });
    }
    while let Some(wave) = flood.join_next().await {
        wave.unwrap().unwrap();
    }
    bystanders.were_not_disturbed().await.unwrap();
    let quiet = async || chatd.metric("chatd_connections").await.unwrap() == 0.0;
    end_to_end::eventually("everybody is gone", PATIENCE, quiet).await;
    assert_well(&chatd).await;
}

/// A client that sends faster than anything can be stored, and reads no answers.
#[tokio::test]
async fn a_client_that_only_writes() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let memory_before = chatd.memory_kb().unwrap();
    let mut stream = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
    stream.write_all(&Connect::v4("alice", "firehose").bytes()).await.unwrap();
    let mut publish = Publish::new("chat/alice/out/bob", "x".repeat(1_000), 1);
    let end = Instant::now() + Duration::from_secs(2);
    let mut sent = 0_u64;
    while Instant::now() < end {
        publish.packet_id = if publish.packet_id == u16::MAX { 1 } else { publish.packet_id + 1 };
        let bytes = packet::publish(Version::V4, &publish);
        // Not writable: the server has stopped reading, which is its right.
        match tokio::time::timeout(Duration::from_millis(500), stream.write_all(&bytes)).await {
            Ok(Ok(())) => sent += 1,
            _ => break,
        }
    }
    let memory_after = chatd.memory_kb().unwrap();
    println!("{sent} publishes; memory {memory_before} to {memory_after} KB");
    // The store's cache and the bus's segments fill up to their bounds, whoever writes; what this client has under way is less.
    assert!(memory_after < memory_before + 128 * 1024, "{memory_before} to {memory_after} KB");
    reset(stream);
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// The head of an upgrade request to `path` with these headers more.
fn upgrade(chatd: &Chatd, path: &str, headers: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n",
        chatd.http_addr()
    )
}

/// Sends bytes to the HTTP port and returns the status of the answer.
async fn status_of(chatd: &Chatd, request: &[u8]) -> Option<u16> {
    let mut stream = TcpStream::connect(chatd.http_addr()).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = vec![0; 12];
    let reading = tokio::time::timeout(PATIENCE, stream.read_exact(&mut answer)).await.expect("an answer or an end");
    reading.ok()?;
    String::from_utf8_lossy(&answer).strip_prefix("HTTP/1.1 ")?.parse().ok()
}

#[tokio::test]
async fn upgrades_that_are_none() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let mqtt = "sec-websocket-protocol: mqtt\r\n";
    assert_eq!(status_of(&chatd, upgrade(&chatd, "/mqtt", mqtt).as_bytes()).await, Some(101));
    let several = "sec-websocket-protocol: chat, mqtt\r\n";
    assert_eq!(status_of(&chatd, upgrade(&chatd, "/mqtt", several).as_bytes()).await, Some(101));
    for (path, headers, status) in [
        ("/mqtt", "", 400),
        ("/mqtt", "sec-websocket-protocol: chat\r\n", 400),
        ("/other", mqtt, 404),
        ("/healthz/../mqtt/%00", mqtt, 404),
        // A page of a stranger's, which would chat in the name of whoever looks at it.
        ("/mqtt", "sec-websocket-protocol: mqtt\r\norigin: https://evil.example\r\n", 403),
        ("/mqtt", "sec-websocket-protocol: mqtt\r\norigin: null\r\n", 403),
    ] {
        let found = status_of(&chatd, upgrade(&chatd, path, headers).as_bytes()).await;
        assert_eq!(found, Some(status), "{path} {headers:?}");
    }
    let no_upgrade = format!("GET /mqtt HTTP/1.1\r\nhost: {}\r\n\r\n", chatd.http_addr());
    assert!(status_of(&chatd, no_upgrade.as_bytes()).await.is_some_and(|status| (400..500).contains(&status)));
    for rubbish in [&b"\0\0\0\0\r\n\r\n"[..], b"GET / HTTP/9.9\r\n\r\n", b"GET \xff HTTP/1.1\r\n\r\n", &[b'x'; 100_000]]
    {
        let mut stream = TcpStream::connect(chatd.http_addr()).await.unwrap();
        let mut answer = Vec::new();
        // Whether it is written in full or not, the server ends it.
        let ending = async {
            if stream.write_all(rubbish).await.is_ok() {
                stream.read_to_end(&mut answer).await.ok();
            }
        };
        tokio::time::timeout(PATIENCE, ending).await.expect("the connection ends");
    }
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// A frame of a WebSocket client, masked as it has to be.
fn web_socket_frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        length @ 0..126 => bytes.push(0x80 | u8::try_from(length).unwrap()),
        length => {
            bytes.push(0x80 | 126);
            bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
        }
    }
    let mask = [7, 13, 99, 200];
    bytes.extend(mask);
    bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

#[tokio::test]
async fn web_socket_frames_that_no_decent_client_sends() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let connect = Connect::v4("alice", "hostile").bytes();
    let ping = packet::pingreq();
    const BINARY: u8 = 0x82;
    let cases: Vec<(&str, Vec<u8>, bool)> = vec![
        ("a text frame", web_socket_frame(0x81, b"hello"), false),
        ("a text frame that holds a packet", web_socket_frame(0x81, &ping), false),
        ("a reserved opcode", web_socket_frame(0x83, &ping), false),
        ("reserved bits", web_socket_frame(0xc2, &ping), false),
        ("a continuation of nothing", web_socket_frame(0x80, &ping), false),
        ("no mask", [&[BINARY, 2][..], &ping].concat(), false),
        ("a frame of 2^63 bytes", [&[BINARY, 0xff][..], &[0x80, 0, 0, 0, 0, 0, 0, 0], &[0; 4]].concat(), false),
        ("a frame of 1 GB", [&[BINARY, 0xff][..], &(1_u64 << 30).to_be_bytes(), &[0; 4]].concat(), false),
        ("a ping of 126 bytes", web_socket_frame(0x89, &[0; 126]), false),
        ("a fragmented ping", web_socket_frame(0x09, b"x"), false),
        ("a close with one byte", web_socket_frame(0x88, b"x"), false),
        ("a close", web_socket_frame(0x88, &1000_u16.to_be_bytes()), false),
        ("an empty frame", web_socket_frame(BINARY, b""), true),
        ("a ping", web_socket_frame(0x89, b"are you there?"), true),
        ("an unasked pong", web_socket_frame(0x8a, b"here"), true),
        (
            "a packet in three fragments with a ping between",
            [
                web_socket_frame(0x02, &ping[..1]),
                web_socket_frame(0x89, b"?"),
                web_socket_frame(0x00, b""),
                web_socket_frame(0x80, &ping[1..]),
            ]
            .concat(),
            true,
        ),
    ];
    for (what, frames, lives) in cases {
        let mut stream = TcpStream::connect(chatd.http_addr()).await.unwrap();
        let head = upgrade(&chatd, "/mqtt", "sec-websocket-protocol: mqtt\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&web_socket_frame(BINARY, &connect)).await.unwrap();
        stream.write_all(&frames).await.unwrap();
        // A publish of 3 KB afterwards tells whether it lives: its PUBACK comes back.
        let after = Publish { packet_id: 0x4567, ..Publish::new("ordinary", vec![b'x'; 3_000], 1) };
        stream.write_all(&web_socket_frame(BINARY, &packet::publish(Version::V4, &after))).await.ok();
        let mut answer = Vec::new();
        let living = loop {
            if answer.ends_with(&packet::puback(0x4567)) {
                break true;
            }
            match tokio::time::timeout(PATIENCE, stream.read_buf(&mut answer)).await.expect(what) {
                Ok(n) if n > 0 => {}
                _ => break false,
            }
        };
        assert_eq!(living, lives, "{what}");
    }
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// Connections that never finish their handshake: nothing sent, half a CONNECT, half a request, an upgrade and then nothing.
async fn idlers(chatd: &Chatd, of_each: usize) -> Vec<TcpStream> {
    let connect = Connect::v5("idler", "idler").bytes();
    let request = upgrade(chatd, "/mqtt", "sec-websocket-protocol: mqtt\r\n");
    let openings = [
        (chatd.mqtt_addr(), &[][..]),
        (chatd.mqtt_addr(), &connect[..connect.len() / 2]),
        (chatd.http_addr(), &[][..]),
        (chatd.http_addr(), &request.as_bytes()[..request.len() / 2]),
        (chatd.http_addr(), request.as_bytes()),
    ];
    let mut streams = Vec::new();
    for _ in 0..of_each {
        for (address, opening) in openings {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(opening).await.unwrap();
            streams.push(stream);
        }
    }
    streams
}

#[tokio::test]
async fn five_hundred_unfinished_handshakes_delay_nobody() {
    let chatd = Chatd::start().await.unwrap();
    let idle = idlers(&chatd, 100).await;
    assert_eq!(idle.len(), 500);
    for round in 0..10 {
        let web_socket = round % 2 == 0;
        let began = Instant::now();
        let connect = Connect { web_socket, ..Connect::v5("bob", &format!("device-{round}")) };
        let mut bob = listener(&chatd, connect).await.unwrap();
        let took = began.elapsed();
        assert!(took < Duration::from_secs(1), "connecting took {took:?}");
        bob.say("bob", "alice", "hello").await.unwrap();
    }
    drop(idle);
    assert_well(&chatd).await;
}

#[tokio::test]
async fn unfinished_handshakes_end_at_their_deadline() {
    let options = Options::default().set("limits.connect_timeout_ms", 300);
    let chatd = Chatd::start_with(options).await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    for mut stream in idlers(&chatd, 4).await {
        let mut answers = Vec::new();
        let closed = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answers)).await;
        closed.expect("closed at the deadline").expect("closed in order");
    }
    // One that sends a byte now and then is not heard, either.
    let mut slow = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
    let bytes = Connect::v5("idler", "idler").bytes();
    let began = Instant::now();
    for byte in bytes.iter().cycle() {
        if slow.write_all(&[*byte]).await.is_err() {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "still connected");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// What was stored amid all this is in order.
#[tokio::test]
async fn a_client_that_vanishes_in_the_middle_of_sending_leaves_no_gap() {
    let chatd = Chatd::start().await.unwrap();
    for round in 0..30 {
        let mut stream = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
        let mut bytes = Connect::v4("alice", "alice-phone").bytes();
        for packet_id in 1..=20 {
            let publish =
                Publish { packet_id, ..Publish::new("chat/alice/out/bob", format!("{round}/{packet_id}"), 1) };
            bytes.extend(packet::publish(Version::V4, &publish));
        }
        bytes.truncate(bytes.len() - 3);
        stream.write_all(&bytes).await.unwrap();
        reset(stream);
    }
    let mut alice = Connect::v5("alice", "alice-laptop").to(&chatd).await.unwrap();
    let last = alice.say("alice", "bob", "the end").await.unwrap().seq.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let got = bob.acked_messages(usize::try_from(last).unwrap()).await.unwrap();
    assert_eq!(seqs(&got), (1..=last).collect::<Vec<_>>());
}
