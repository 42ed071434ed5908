//! Classes of holes that MQTT brokers have had, one test each: whatever the peer says, it costs the server little and others nothing.
//!
//! What a class is and whose it was stands at each test. Tests of the same classes with other means are in `hostile` (names, packets,
//! WebSocket frames, handshakes) and `slow`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use end_to_end::packet::{self, Packet, Properties, Publish, Value, Version, Will, frame, id};
use end_to_end::{Chatd, Client, Connect, Dice, Options, PATIENCE, eventually};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

use crate::chat::{Bystanders, assert_well, listener, texts};

const BOTH: [Version; 2] = [Version::V4, Version::V5];

/// MQTT's string or binary data.
fn string(bytes: &[u8]) -> Vec<u8> {
    [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

/// A packet with properties as they stand there, length included, behind `before`, and with `after` behind them.
fn with_properties(first: u8, before: &[u8], properties: &[u8], after: &[u8]) -> Vec<u8> {
    frame(first, &[before, properties, after].concat())
}

/// A variable byte integer.
fn variable(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let byte = u8::try_from(value % 128).unwrap();
        value /= 128;
        bytes.push(if value > 0 { byte | 0x80 } else { byte });
        if value == 0 {
            return bytes;
        }
    }
}

/// CONNECT of MQTT 5 up to its properties: clean start, a user name, no keep alive.
const CONNECT_BEFORE_PROPERTIES: &[u8] = b"\0\x04MQTT\x05\x82\0\0";

/// Everything after CONNECT's properties: client identifier and user name.
fn connect_after_properties(user: &str) -> Vec<u8> {
    [string(b"hostile"), string(user.as_bytes())].concat()
}

/// As fast as it can: what a rate would hold back is not what these tests look at.
fn unpaced() -> Options {
    let rates = ["publishes_per_s", "publish_bytes_per_s", "user_publishes_per_s", "user_publish_bytes_per_s"];
    rates.into_iter().fold(Options::default(), |options, rate| options.set(&format!("limits.{rate}"), 0))
}

/// Whether the server ends the connection by itself; what it had sent until then does not matter.
async fn is_closed(client: &mut Client) -> Result<bool> {
    // A PINGREQ that came with the violation may still be answered; a second one not.
    for _ in 0..2 {
        if client.send_bytes(&packet::pingreq()).await.is_err() {
            return Ok(true);
        }
        loop {
            match client.receive().await? {
                None => return Ok(true),
                Some(Packet::Pingresp) => break,
                Some(_) => {}
            }
        }
    }
    Ok(false)
}

/// What the server says until it has answered a PINGREQ, or has closed.
async fn answers(client: &mut Client) -> Result<Vec<Packet>> {
    if client.send_bytes(&packet::pingreq()).await.is_err() {
        return client.until_closed().await;
    }
    let mut answers = Vec::new();
    while let Some(packet) = client.receive().await? {
        if packet == Packet::Pingresp {
            break;
        }
        answers.push(packet);
    }
    Ok(answers)
}

/// Waits until the server has nothing more of those who have gone than it had `before`.
async fn until_gone(chatd: &Chatd, before: &BTreeMap<String, f64>) {
    eventually(&format!("the edge is as it was: {before:#?}"), PATIENCE, async || {
        let now = chatd.traces().await.unwrap();
        now.iter().all(|(name, entries)| before.get(name).is_some_and(|before| entries <= before))
    })
    .await;
}

// ---- memory ------------------------------------------------------------------------------------------------------------

/// Memory on the word of a peer who has not said who it is (CVE-2017-7651, CVE-2023-0809): 500 announce as much as MQTT can say, and 500 as
/// much as may be sent here, and send a little of it.
#[tokio::test]
async fn announced_lengths_take_no_memory() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let (memory, reserved) = (chatd.memory_kb().unwrap(), chatd.reserved_kb().unwrap());
    let connect = Connect::v5("alice", "hostile").bytes();
    let mut peers = Vec::new();
    for announced in [268_435_455, 1024 * 1024 - 5] {
        for _ in 0..500 {
            let mut stream = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
            let opening = [&[0x10][..], &variable(announced), &connect[2..], &[b'x'; 1_000]].concat();
            stream.write_all(&opening).await.unwrap();
            peers.push(stream);
        }
    }
    // The server has read all of it when it has answered somebody who came later.
    Connect::v5("alice", "late").to(&chatd).await.unwrap().ping().await.unwrap();
    let (memory_now, reserved_now) = (chatd.memory_kb().unwrap(), chatd.reserved_kb().unwrap());
    println!("memory {memory} to {memory_now} KB, reserved {reserved} to {reserved_now} KB");
    assert!(memory_now < memory + 32 * 1024, "{memory} to {memory_now} KB for 1,000 peers who have sent 1 MB together");
    assert!(reserved_now < reserved + 256 * 1024, "{reserved} to {reserved_now} KB reserved on their word");
    drop(peers);
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// Aliases as a memory store: 1,000 topic names of 60 KB on each of ten connections.
#[tokio::test]
async fn aliases_are_no_memory_store() {
    const CONNECTIONS: usize = 10;
    let chatd = Chatd::start().await.unwrap();
    let memory = chatd.memory_kb().unwrap();
    let mut peers = Vec::new();
    for number in 0..CONNECTIONS {
        let mut client = Connect::v5("alice", &format!("hostile-{number}")).to(&chatd).await.unwrap();
        let aliases = client.connack_properties().number(id::TOPIC_ALIAS_MAXIMUM).unwrap_or(0);
        assert!(aliases <= 64, "{aliases} aliases are offered");
        for alias in 1..=1_000 {
            let topic = format!("{alias}/{}", "x".repeat(60_000));
            let properties = Properties::none().with(id::TOPIC_ALIAS, Value::U16(alias));
            let bytes = packet::publish(Version::V5, &Publish { properties, ..Publish::new(topic, "", 0) });
            // Beyond the maximum, or earlier if such names are too long here, it is over.
            if client.send_bytes(&bytes).await.is_err() {
                break;
            }
        }
        assert!(client.until_closed().await.is_ok(), "1,000 aliases were taken");
        // Those that are allowed, and the connection stays.
        let mut client = Connect::v5("alice", &format!("hostile-{number}")).to(&chatd).await.unwrap();
        for alias in 1..=u16::try_from(aliases).unwrap() {
            let topic = format!("{alias}/{}", "x".repeat(60_000));
            let properties = Properties::none().with(id::TOPIC_ALIAS, Value::U16(alias));
            client.start_publish(Publish { properties, ..Publish::new(topic, "", 0) }).await.unwrap();
        }
        client.ping().await.unwrap();
        peers.push(client);
    }
    let memory_now = chatd.memory_kb().unwrap();
    println!("memory {memory} to {memory_now} KB");
    assert!(memory_now < memory + 96 * 1024, "{memory} to {memory_now} KB");
    assert_well(&chatd).await;
}

/// QoS 2 never released (CVE-2023-28366): sessions send as many as there are packet identifiers, release none, and leave; also the same
/// identifiers again, which are no new messages.
#[tokio::test]
async fn qos_2_that_is_never_released() {
    const SESSIONS: usize = 4;
    let chatd = Chatd::start_with(unpaced()).await.unwrap();
    let before = chatd.traces().await.unwrap();
    // What any traffic of that kind leaves behind in pools and buffers.
    let mut memory = 0;
    for round in 0..3 {
        for number in 0..SESSIONS {
            let device = format!("hostile-{number}");
            let mut client = Connect::v4("alice", &device).persistent().to(&chatd).await.unwrap();
            for part in (1..=u16::MAX).collect::<Vec<_>>().chunks(2_000) {
                let mut bytes = Vec::new();
                for packet_id in part {
                    let publish = Publish { packet_id: *packet_id, ..Publish::new("ordinary", "x", 2) };
                    bytes.extend(packet::publish(Version::V4, &publish));
                }
                client.send_bytes(&bytes).await.unwrap();
                for packet_id in part {
                    client.pubrec(*packet_id).await.unwrap();
                }
            }
            drop(client);
        }
        let memory_now = chatd.memory_kb().unwrap();
        println!("round {round}: {memory_now} KB");
        if round == 0 {
            memory = memory_now;
        } else {
            assert!(memory_now < memory + 16 * 1024, "{memory} to {memory_now} KB in round {round}");
        }
    }
    for number in 0..SESSIONS {
        Connect::v4("alice", &format!("hostile-{number}")).to(&chatd).await.unwrap().leave().await.unwrap();
    }
    until_gone(&chatd, &before).await;
    // In MQTT 5 the receive maximum counts them.
    let mut client = Connect::v5("alice", "hostile").to(&chatd).await.unwrap();
    let most = client.connack_properties().number(id::RECEIVE_MAXIMUM).unwrap_or(65_535);
    for packet_id in 1..=u16::try_from(most).unwrap() + 1 {
        // The server may close while we still write.
        let publish = Publish { packet_id, ..Publish::new("ordinary", "x", 2) };
        client.send_bytes(&packet::publish(Version::V5, &publish)).await.ok();
    }
    let last = client.until_closed().await.unwrap().pop();
    assert!(matches!(last, Some(Packet::Disconnect { code: 0x93, .. })), "{last:?}");
    assert_well(&chatd).await;
}

/// A client that asks for all retained messages again and again and reads none: what waits for it is bounded.
#[tokio::test]
async fn retained_messages_asked_for_again_and_again() {
    const RETAINED: usize = 2_000;
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let mut publisher = Connect::v5("alice", "publisher").to(&chatd).await.unwrap();
    let mut watcher = Connect::v5("watcher", "watcher").to(&chatd).await.unwrap();
    watcher.subscribe("read/all", 0).await.unwrap();
    let retained = (0..RETAINED).map(|n| Publish { retain: true, ..Publish::new(format!("state/{n}"), "x", 1) });
    publisher.publish_all(retained).await.unwrap();
    let memory = chatd.memory_kb().unwrap();
    let mut peers = Vec::new();
    for version in BOTH {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4 * 1024).unwrap();
        let mut stream = socket.connect(chatd.mqtt_addr()).await.unwrap();
        stream.write_all(&Connect::new(version, "bob", "hostile").bytes()).await.unwrap();
        let every_way = [("state/#", 1), ("state/+", 1), ("+/+", 1), ("#", 1), ("+/#", 1)];
        let subscribe = packet::subscribe(version, 1, &Properties::none(), &every_way);
        for _ in 0..2_000 {
            // Not writable: the server has stopped reading, which is its right.
            let writing = tokio::time::timeout(Duration::from_millis(500), stream.write_all(&subscribe));
            if !matches!(writing.await, Ok(Ok(()))) {
                break;
            }
        }
        let read_all = packet::publish(version, &Publish::new("read/all", "x", 0));
        tokio::time::timeout(Duration::from_millis(500), stream.write_all(&read_all)).await.ok();
        peers.push(stream);
    }
    // Until the server has read what it will; it may stop for ever.
    watcher.set_patience(Duration::from_secs(8));
    for _ in &peers {
        if watcher.message().await.is_err() {
            break;
        }
    }
    let memory_now = chatd.memory_kb().unwrap();
    println!("memory {memory} to {memory_now} KB");
    assert!(memory_now < memory + 64 * 1024, "{memory} to {memory_now} KB");
    drop(peers);
    // Whoever reads gets each of them once for a filter.
    let mut late = Connect::v5("carol", "late").to(&chatd).await.unwrap();
    late.subscribe("state/#", 1).await.unwrap();
    late.acked_messages(RETAINED).await.unwrap();
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// Slow readers: ten subscribe to everything and never read while others publish; those are served as ever, and memory is bounded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_who_want_everything_and_read_nothing() {
    const READERS: usize = 10;
    let options = Options::default().set("limits.queue_bytes", 1024 * 1024);
    let chatd = Chatd::start_with(options).await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let memory = chatd.memory_kb().unwrap();
    let mut readers = Vec::new();
    for number in 0..READERS {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4 * 1024).unwrap();
        let mut stream = socket.connect(chatd.mqtt_addr()).await.unwrap();
        let user = format!("reader-{number}");
        let mut bytes = Connect::v4(&user, "hostile").bytes();
        let own = format!("chat/{user}/#");
        bytes.extend(packet::subscribe(Version::V4, 1, &Properties::none(), &[("#", 0), ("+/#", 2), (&own, 1)]));
        stream.write_all(&bytes).await.unwrap();
        readers.push(stream);
    }
    let mut publisher = Connect::v5("alice", "publisher").to(&chatd).await.unwrap();
    let mut watcher = Connect::v5("watcher", "watcher").to(&chatd).await.unwrap();
    watcher.subscribe("the/end", 1).await.unwrap();
    let payload = "x".repeat(32 * 1024);
    for round in 0..20 {
        publisher.publish_all((0..50).map(|n| Publish::new(format!("news/{n}"), payload.clone(), 1))).await.unwrap();
        let said = (0..READERS).map(|n| Publish::new(format!("chat/alice/out/reader-{n}"), format!("{round}"), 1));
        publisher.publish_all(said).await.unwrap();
    }
    // What comes to one has come to all.
    publisher.publish(Publish::new("the/end", "x", 1)).await.unwrap();
    watcher.acked_message().await.unwrap();
    let memory_now = chatd.memory_kb().unwrap();
    println!("memory {memory} to {memory_now} KB");
    // A megabyte waits for each, shared between them; what the kernel took is not ours. The rest are the bus's segments and the store's cache.
    assert!(memory_now < memory + 128 * 1024, "{memory} to {memory_now} KB");
    drop(readers);
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

// ---- time --------------------------------------------------------------------------------------------------------------

/// One megabyte at most of user properties, the smallest there are, as many as asked for.
fn user_properties(count: usize) -> Vec<u8> {
    let properties = [id::USER_PROPERTY, 0, 0, 0, 0].repeat(count);
    [variable(properties.len()), properties].concat()
}

/// How long the server takes for a packet, until it has answered a PINGREQ behind it or has closed.
async fn time_taken(chatd: &Chatd, connect_first: bool, bytes: &[u8]) -> Duration {
    let mut client = match connect_first {
        true => Connect::v5("alice", "hostile").to(chatd).await.unwrap(),
        false => Client::tcp(chatd.mqtt_addr(), Version::V5).await.unwrap(),
    };
    let began = Instant::now();
    // It may close before it has read everything.
    if client.send_bytes(bytes).await.is_ok() && client.send_bytes(&packet::pingreq()).await.is_ok() {
        while let Some(packet) = client.receive().await.expect("an answer or an end") {
            if packet == Packet::Pingresp {
                break;
            }
        }
    }
    began.elapsed()
}

/// Work quadratic in user properties (CVE-2021-41039), in every packet that may carry them: four times as many take four times as long or so.
#[tokio::test]
async fn user_properties_take_linear_time() {
    const MOST: usize = 200_000;
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let topic = string(b"ordinary");
    let packets = |count: usize| {
        let properties = user_properties(count);
        let reason = [&[0][..], &properties].concat();
        vec![
            (
                "CONNECT",
                false,
                with_properties(0x10, CONNECT_BEFORE_PROPERTIES, &properties, &connect_after_properties("alice")),
            ),
            ("PUBLISH", true, with_properties(0x30, &topic, &properties, b"x")),
            ("SUBSCRIBE", true, with_properties(0x82, &[0, 1], &properties, &[&topic[..], &[1]].concat())),
            ("UNSUBSCRIBE", true, with_properties(0xa2, &[0, 1], &properties, &topic)),
            ("PUBACK", true, with_properties(0x40, &[0, 1], &reason, &[])),
            ("DISCONNECT", true, with_properties(0xe0, &[], &reason, &[])),
            ("AUTH", true, with_properties(0xf0, &[], &[&[0x19][..], &properties].concat(), &[])),
        ]
    };
    for (few, many) in packets(MOST / 4).into_iter().zip(packets(MOST)) {
        let (name, connect_first, _) = many;
        let (mut least_few, mut least_many) = (Duration::MAX, Duration::MAX);
        for _ in 0..3 {
            least_few = least_few.min(time_taken(&chatd, connect_first, &few.2).await);
            least_many = least_many.min(time_taken(&chatd, connect_first, &many.2).await);
        }
        println!("{name}: {least_few:?} for {}, {least_many:?} for {MOST}", MOST / 4);
        let most = least_few * 12 + Duration::from_millis(500);
        assert!(least_many < most, "{name}: {least_few:?} for {}, {least_many:?} for {MOST}", MOST / 4);
    }
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// As many filters as a packet holds, in one SUBSCRIBE and one UNSUBSCRIBE: four times as many take four times as long or so.
#[tokio::test]
async fn filters_take_linear_time() {
    const MOST: usize = 100_000;
    let chatd = Chatd::start_with(unpaced()).await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let filters = |count: usize, options: &[u8]| {
        let mut bytes = Vec::new();
        for number in 0..count {
            bytes.extend(string(format!("{number:x}").as_bytes()));
            bytes.extend(options);
        }
        bytes
    };
    for (name, first, options) in [("SUBSCRIBE", 0x82, &[1][..]), ("UNSUBSCRIBE", 0xa2, &[])] {
        let packet = |count| with_properties(first, &[0, 1], &[0], &filters(count, options));
        let few = time_taken(&chatd, true, &packet(MOST / 4)).await;
        let many = time_taken(&chatd, true, &packet(MOST)).await;
        println!("{name}: {few:?} for {}, {many:?} for {MOST}", MOST / 4);
        assert!(many < few * 12 + Duration::from_secs(1), "{name}: {few:?} for {}, {many:?} for {MOST}", MOST / 4);
    }
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// Stack or time exploding on thousands of topic levels (CVE-2019-11779): published, subscribed, willed, retained and matched, even where the
/// operator allows them all.
#[tokio::test]
async fn thousands_of_topic_levels() {
    for options in [Options::default(), Options::default().set("limits.topic_levels", 65_535)] {
        let chatd = Chatd::start_with(options).await.unwrap();
        let bystanders = Bystanders::of(&chatd).await.unwrap();
        let mut watcher = Connect::v5("watcher", "watcher").to(&chatd).await.unwrap();
        watcher.subscribe("#", 0).await.unwrap();
        let slashes = "/".repeat(65_535);
        let letters = format!("{}a", "a/".repeat(32_767));
        let plusses = format!("{}+", "+/".repeat(32_766));
        let any = format!("{}#", "+/".repeat(32_766));
        let began = Instant::now();
        for version in BOTH {
            let connect = Connect::new(version, "alice", "hostile");
            for filter in [&slashes, &letters, &plusses, &any] {
                for topic in [&slashes, &letters] {
                    let retained = Publish { retain: true, ..Publish::new(topic.clone(), "x", 0) };
                    let bytes = [
                        packet::publish(version, &retained),
                        packet::subscribe(version, 1, &Properties::none(), &[(filter, 1)]),
                        packet::publish(version, &Publish::new(topic.clone(), "x", 0)),
                        packet::unsubscribe(version, 2, &[filter]),
                    ];
                    // Granted, refused or closed: it is answered.
                    let mut client = connect.to(&chatd).await.unwrap();
                    client.set_patience(Duration::from_secs(20));
                    client.send_bytes(&bytes.concat()).await.ok();
                    is_closed(&mut client).await.unwrap();
                }
            }
            let will = Will { topic: letters.clone(), payload: b"gone".to_vec(), retain: true, ..Will::default() };
            let mut client = connect.clone().will(will).open(&chatd).await.unwrap();
            client.receive().await.expect("an answer to CONNECT with a will of many levels");
        }
        let took = began.elapsed();
        println!("{took:?}");
        assert!(took < Duration::from_secs(20), "{took:?}");
        watcher.ping().await.unwrap();
        bystanders.were_not_disturbed().await.unwrap();
        assert_well(&chatd).await;
    }
}

// ---- what is no packet of a client, or not now ---------------------------------------------------------------------------

/// Zero-length topics (CVE-2021-34432): published, with and without an alias that stands for nothing, willed, subscribed and unsubscribed. None
/// reaches anybody.
#[tokio::test]
async fn topics_without_a_character() {
    let chatd = Chatd::start().await.unwrap();
    let mut watcher = Connect::v5("watcher", "watcher").to(&chatd).await.unwrap();
    watcher.subscribe("#", 1).await.unwrap();
    for version in BOTH {
        let connect = Connect::new(version, "alice", "hostile");
        let none: &[u8] = if version == Version::V5 { &[0] } else { &[] };
        for (first, packet_id) in [(0x30, &[][..]), (0x31, &[]), (0x32, &[0, 7]), (0x34, &[0, 7])] {
            for payload in [&b""[..], b"x"] {
                let mut client = connect.to(&chatd).await.unwrap();
                client
                    .send_bytes(&with_properties(first, &[&[0, 0], packet_id].concat(), none, payload))
                    .await
                    .unwrap();
                // Refused or closed; and never taken.
                for answer in answers(&mut client).await.unwrap() {
                    match answer {
                        Packet::Puback { code, .. } | Packet::Pubrec { code, .. } if version == Version::V5 => {
                            assert!(code >= 0x80, "{code:#x}");
                        }
                        Packet::Disconnect { code, .. } => assert!(code >= 0x80, "{code:#x}"),
                        Packet::Puback { .. } | Packet::Pubrec { .. } | Packet::Publish(_) => {}
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
        let subscribe = packet::subscribe(version, 1, &Properties::none(), &[("", 1)]);
        for bytes in [subscribe, packet::unsubscribe(version, 1, &[""])] {
            let mut client = connect.to(&chatd).await.unwrap();
            client.send_bytes(&bytes).await.unwrap();
            match client.receive().await.unwrap() {
                None => {}
                Some(Packet::Suback { codes, .. }) => assert!(codes[0] >= 0x80, "{codes:x?}"),
                Some(Packet::Unsuback { codes, .. }) if version == Version::V5 => assert_ne!(codes[0], 0),
                Some(Packet::Unsuback { .. }) => {}
                Some(Packet::Disconnect { code, .. }) => assert!(code >= 0x80, "{code:#x}"),
                other => panic!("{other:?}"),
            }
        }
        let will = Will { payload: b"gone".to_vec(), ..Will::default() };
        let mut client = connect.will(will).open(&chatd).await.unwrap();
        let refused = matches!(client.receive().await.unwrap(), None | Some(Packet::Connack { code: 1.., .. }));
        assert!(refused, "a will to nowhere was taken");
    }
    let mut alice = Connect::v5("alice", "decent").to(&chatd).await.unwrap();
    alice.publish(Publish::new("the/end", "x", 1)).await.unwrap();
    assert_eq!(watcher.acked_message().await.unwrap().topic, "the/end", "nothing had come before");
    assert_well(&chatd).await;
}

/// Packets that only servers send (CVE-2021-28166), in every state of a connection: each ends it.
#[tokio::test]
async fn packets_of_a_server_in_every_state() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let before = chatd.traces().await.unwrap();
    let mut publisher = Connect::v5("bob", "publisher").to(&chatd).await.unwrap();
    for version in BOTH {
        for web_socket in [false, true] {
            let v5 = version == Version::V5;
            let connect = Connect { web_socket, ..Connect::new(version, "alice", "hostile") };
            let packets = [
                ("CONNACK", frame(0x20, if v5 { &[0, 0, 0] } else { &[0, 0] })),
                ("SUBACK", frame(0x90, if v5 { &[0, 1, 0, 0] } else { &[0, 1, 0] })),
                ("UNSUBACK", frame(0xb0, if v5 { &[0, 1, 0, 0] } else { &[0, 1] })),
                ("PINGRESP", frame(0xd0, &[])),
                ("DISCONNECT as of a server", frame(0xe0, &[0x8b, 0])),
            ];
            let subscribe = packet::subscribe(version, 1, &Properties::none(), &[("news", 2)]);
            let hello = Publish { packet_id: 7, ..Publish::new("ordinary", "hello", 2) };
            for (name, bytes) in packets {
                // The first is the state before CONNECT.
                for (state, opening) in [
                    ("before CONNECT", vec![]),
                    ("connected", vec![connect.bytes()]),
                    ("subscribed", vec![connect.bytes(), subscribe.clone()]),
                    ("in the middle of QoS 2", vec![connect.bytes(), packet::publish(version, &hello)]),
                    ("with a message in flight", vec![connect.bytes(), subscribe.clone(), vec![]]),
                ] {
                    let mut client = match web_socket {
                        true => Client::web_socket(chatd.http_addr(), version).await.unwrap(),
                        false => Client::tcp(chatd.mqtt_addr(), version).await.unwrap(),
                    };
                    for part in opening.iter().filter(|part| !part.is_empty()) {
                        client.send_bytes(part).await.unwrap();
                        client.receive().await.unwrap().expect("an answer to a decent packet");
                    }
                    if opening.len() == 3 {
                        publisher.publish(Publish::new("news", "x", 1)).await.unwrap();
                        client.message().await.unwrap();
                    }
                    client.send_bytes(&bytes).await.unwrap();
                    assert!(is_closed(&mut client).await.unwrap(), "{name} {state} ({version:?})");
                }
            }
        }
    }
    publisher.leave().await.unwrap();
    until_gone(&chatd, &before).await;
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// A refused CONNECT that lives on (CVE-2025-56352): the server closes by itself, and whatever came behind it, in the same segment or later, is
/// not heard.
#[tokio::test]
async fn a_refused_connect_is_the_end() {
    let chatd = Chatd::start().await.unwrap();
    let mut watcher = Connect::v5("watcher", "watcher").to(&chatd).await.unwrap();
    watcher.subscribe("#", 1).await.unwrap();
    let before = chatd.traces().await.unwrap();
    for version in BOTH {
        let decent = Connect::new(version, "alice", "hostile");
        let wild = Will { topic: "a/#".into(), payload: b"gone".to_vec(), ..Will::default() };
        let refused = [
            ("a bad user name", Connect { user_name: Some("Alice Cooper".into()), ..decent.clone() }.bytes()),
            ("a will with wildcards", decent.clone().will(wild).bytes()),
            ("an unknown version", {
                let mut bytes = decent.bytes();
                bytes[8] = 9;
                bytes
            }),
        ];
        for (what, connect) in refused {
            let late = packet::publish(version, &Publish::new("from/the/dead", "boo", 0));
            let later =
                [packet::subscribe(version, 1, &Properties::none(), &[("#", 0)]), late, decent.bytes()].concat();
            for at_once in [true, false] {
                let mut client = Client::tcp(chatd.mqtt_addr(), version).await.unwrap();
                let bytes = if at_once { [connect.clone(), later.clone()].concat() } else { connect.clone() };
                client.send_bytes(&bytes).await.unwrap();
                let mut accepted = false;
                loop {
                    match client.receive().await {
                        Ok(Some(Packet::Connack { code, .. })) => accepted |= code == 0,
                        Ok(Some(other)) => panic!("{what}: {other:?}"),
                        Ok(None) => break,
                        // Refused in the form that every version understands, which is no packet of MQTT 5.
                        Err(error) if format!("{error:#}").contains("packet ends") => {
                            client = Client::tcp(chatd.mqtt_addr(), Version::V4).await.unwrap();
                            client.send_bytes(&bytes).await.unwrap();
                        }
                        Err(error) => panic!("{what}: not closed: {error:#}"),
                    }
                    if !at_once {
                        // Nobody has closed yet for all that we know.
                        client.send_bytes(&later).await.ok();
                    }
                }
                assert!(!accepted, "{what}");
            }
        }
    }
    until_gone(&chatd, &before).await;
    let mut alice = Connect::v5("alice", "decent").to(&chatd).await.unwrap();
    alice.publish(Publish::new("the/end", "x", 1)).await.unwrap();
    assert_eq!(watcher.acked_message().await.unwrap().topic, "the/end", "nothing had come before");
    assert_well(&chatd).await;
}

/// Leaks by CONNECT, SUBSCRIBE, UNSUBSCRIBE and DISCONNECT in odd orders (CVE-2024-8376): any of them, twice, after DISCONNECT, in one segment
/// or byte by byte. What the server keeps for connections is as before when they have gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_in_odd_orders_leave_nothing() {
    const CONNECTIONS: usize = 1_500;
    let mut dice = Dice::thrown("odd orders");
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let before = chatd.traces().await.unwrap();
    let mut memory = 0;
    for round in 0..3 {
        for number in 0..CONNECTIONS {
            let version = BOTH[dice.below(2)];
            let (user, device) = (format!("user-{}", dice.below(20)), format!("device-{}", dice.below(5)));
            let will = Will { topic: "wills/x".into(), payload: b"gone".to_vec(), ..Will::default() };
            let connect = Connect::new(version, &user, &device).will(will).bytes();
            let (own, filters) = (format!("chat/{user}/#"), ["a/+", "#", "b", "$SYS/#", "a/b/c/d/#"]);
            let mut bytes = if dice.below(8) > 0 { connect.clone() } else { Vec::new() };
            for _ in 0..=dice.below(8) {
                let filter = match dice.below(3) {
                    0 => own.as_str(),
                    _ => filters[dice.below(filters.len())],
                };
                bytes.extend(match dice.below(9) {
                    0 => connect.clone(),
                    1..=4 => packet::subscribe(version, 1, &Properties::none(), &[(filter, 1), ("x", 0)]),
                    5 | 6 => packet::unsubscribe(version, 2, &[filter, "x"]),
                    7 => packet::publish(version, &Publish::new("a/b", "x", 0)),
                    _ => packet::disconnect(version, [0, 4][dice.below(2)], &Properties::none()),
                });
            }
            let mut stream = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
            stream.set_nodelay(true).unwrap();
            // The server may close before it has read everything.
            if number % 10 == 0 {
                for byte in &bytes {
                    if stream.write_all(&[*byte]).await.is_err() {
                        break;
                    }
                }
            } else {
                stream.write_all(&bytes).await.ok();
            }
            if dice.below(2) == 0 {
                stream.set_zero_linger().unwrap();
            }
        }
        until_gone(&chatd, &before).await;
        let memory_now = chatd.memory_kb().unwrap();
        println!("round {round}: {memory_now} KB");
        if round == 0 {
            memory = memory_now;
        } else {
            assert!(memory_now < memory + 8 * 1024, "{memory} to {memory_now} KB in round {round}");
        }
    }
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

/// Variable byte integers of five bytes, and longer than they need to be (CVE-2026-21888), wherever one stands: the first end the connection;
/// the others, too, or they are understood as the number that they say.
#[tokio::test]
async fn variable_byte_integers() {
    let chatd = Chatd::start().await.unwrap();
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let topic = string(b"ordinary");
    let filter = [&topic[..], &[1]].concat();
    let connect_end = connect_after_properties("alice");
    let will_before = b"\0\x04MQTT\x05\x86\0\0\0\0\x07hostile";
    let will_after = [topic.clone(), string(b"gone"), string(b"alice")].concat();
    // Name, first byte, what stands before the length of the properties, what stands behind them.
    let places: Vec<(&str, u8, Vec<u8>, Vec<u8>)> = vec![
        ("CONNECT", 0x10, CONNECT_BEFORE_PROPERTIES.to_vec(), connect_end),
        ("a will", 0x10, will_before.to_vec(), will_after),
        ("PUBLISH", 0x32, [&topic[..], &[0, 7]].concat(), b"x".to_vec()),
        ("SUBSCRIBE", 0x82, vec![0, 7], filter.clone()),
        ("UNSUBSCRIBE", 0xa2, vec![0, 7], topic.clone()),
        ("PUBREL", 0x62, vec![0, 7, 0], vec![]),
        ("DISCONNECT", 0xe0, vec![0], vec![]),
        ("AUTH", 0xf0, vec![0x19], vec![]),
    ];
    let zeros: [&[u8]; 5] =
        [&[0x80; 5], &[0x80, 0x80, 0x80, 0x80, 0], &[0x80, 0], &[0x80, 0x80, 0], &[0x80, 0x80, 0x80, 0]];
    for (name, first, before, after) in &places {
        for zero in zeros {
            let is_connect = *first == 0x10;
            let mut client = match is_connect {
                true => Client::tcp(chatd.mqtt_addr(), Version::V5).await.unwrap(),
                false => Connect::v5("alice", "hostile").to(&chatd).await.unwrap(),
            };
            client.send_bytes(&with_properties(*first, before, zero, after)).await.unwrap();
            let ends = matches!(*name, "DISCONNECT" | "AUTH");
            let closed = is_closed(&mut client).await.unwrap();
            assert!(closed || (zero.len() < 5 && !ends), "{name} with {zero:x?}");
        }
    }
    // Of the whole packet, for both versions, and behind it a packet that has to be found where it begins.
    for version in BOTH {
        let none: &[u8] = if version == Version::V5 { &[0] } else { &[] };
        let body = [&topic[..], &[0, 9], none, b"x"].concat();
        let length = u8::try_from(body.len()).unwrap();
        for padding in 0..=4 {
            let mut remaining = vec![length | if padding > 0 { 0x80 } else { 0 }];
            remaining.extend((1..=padding).map(|at| if at < padding { 0x80 } else { 0 }));
            let mut client = Connect::new(version, "alice", "hostile").to(&chatd).await.unwrap();
            client.send_bytes(&[&[0x32][..], &remaining, &body].concat()).await.unwrap();
            let answered = client.puback(9).await.is_ok();
            let closed = !answered || is_closed(&mut client).await.unwrap();
            assert!(if padding == 4 { closed } else { closed != answered }, "{remaining:x?}: {answered} {closed}");
        }
    }
    // A subscription identifier.
    for (identifier, is_fine) in [
        (&[0x80, 0x80, 0x80, 0x80, 1][..], false),
        (&[0xff, 0xff, 0xff, 0xff, 0x7f], false),
        (&[0x80, 0x80, 0x80, 0x80], false),
        (&[0], false),
        (&[0x80, 0], false),
        (&[0xff, 0xff, 0xff, 0x7f], true),
    ] {
        let properties = [&[id::SUBSCRIPTION_IDENTIFIER], identifier].concat();
        let properties = [variable(properties.len()), properties].concat();
        let mut client = Connect::v5("alice", "hostile").to(&chatd).await.unwrap();
        client.send_bytes(&with_properties(0x82, &[0, 7], &properties, &filter)).await.unwrap();
        let closed = is_closed(&mut client).await.unwrap();
        assert!(closed || is_fine, "subscription identifier {identifier:x?}");
    }
    bystanders.were_not_disturbed().await.unwrap();
    assert_well(&chatd).await;
}

// ---- packet identifiers and windows ----------------------------------------------------------------------------------------

/// Packet identifier 0 in every packet that has one: it is never answered as if it were one.
#[tokio::test]
async fn packet_identifier_0() {
    let chatd = Chatd::start().await.unwrap();
    for version in BOTH {
        let hello = |qos| packet::publish(version, &Publish::new("ordinary", "x", qos));
        for (name, bytes) in [
            ("PUBLISH at QoS 1", hello(1)),
            ("PUBLISH at QoS 2", hello(2)),
            ("SUBSCRIBE", packet::subscribe(version, 0, &Properties::none(), &[("a", 0)])),
            ("UNSUBSCRIBE", packet::unsubscribe(version, 0, &["a"])),
            ("PUBACK", packet::puback(0)),
            ("PUBREC", packet::pubrec(0)),
            ("PUBREL", packet::pubrel(0)),
            ("PUBCOMP", packet::pubcomp(0)),
        ] {
            let mut client = Connect::new(version, "alice", "hostile").to(&chatd).await.unwrap();
            client.send_bytes(&bytes).await.unwrap();
            assert!(is_closed(&mut client).await.unwrap(), "{name} ({version:?})");
        }
    }
    assert_well(&chatd).await;
}

/// One packet identifier for a burst of publishes: at QoS 2 they are one message, at QoS 1 each is answered once, and the conversation has no gap.
#[tokio::test]
async fn a_packet_identifier_used_in_a_burst() {
    const BURST: usize = 50;
    let chatd = Chatd::start().await.unwrap();
    for (version, peer) in [(Version::V4, "bob"), (Version::V5, "carol")] {
        for qos in [2, 1] {
            let mut client = Connect::new(version, "alice", "hostile").to(&chatd).await.unwrap();
            let topic = format!("chat/alice/out/{peer}");
            let one = Publish { packet_id: 7, ..Publish::new(topic, format!("at {qos}"), qos) };
            client.send_bytes(&packet::publish(version, &one).repeat(BURST)).await.unwrap();
            let answers = client.ping().await.unwrap().len();
            assert!(answers <= BURST, "{answers} answers to {BURST} publishes");
            // Answers to what the disk had to take first may come after the PINGRESP.
            if qos == 2 {
                client.send_bytes(&packet::pubrel(7)).await.unwrap();
                client.pubcomp(7).await.unwrap();
            }
            client.leave().await.unwrap();
        }
        let mut alice = Connect::new(version, "alice", "decent").to(&chatd).await.unwrap();
        alice.say("alice", peer, "the end").await.unwrap();
        let mut peer = listener(&chatd, Connect::v5(peer, "phone")).await.unwrap();
        let mut got = Vec::new();
        while got.last().is_none_or(|text| text != "the end") {
            let message = peer.acked_message().await.unwrap();
            assert_eq!(message.json()["seq"], got.len() + 1);
            got.extend(texts(&[message]));
        }
        let at = |text: &str| got.iter().filter(|found| *found == text).count();
        assert_eq!(at("at 2"), 1, "a QoS 2 publish under one packet identifier is one message");
        assert!((1..=BURST).contains(&at("at 1")), "{got:?}");
    }
    assert_well(&chatd).await;
}

/// Acknowledgements of packet identifiers that were never sent move nothing: what was sent comes again.
#[tokio::test]
async fn acknowledgements_of_what_was_never_sent() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    for version in BOTH {
        let bob = format!("bob-{version:?}").to_lowercase();
        let connect = Connect::new(version, &bob, "phone").persistent();
        connect.to(&chatd).await.unwrap().subscribe(&format!("chat/{bob}/inbox"), 1).await.unwrap();
        alice.say("alice", &bob, "hello").await.unwrap();
        for acknowledge in [packet::puback, packet::pubrec, packet::pubrel, packet::pubcomp] {
            let mut client = connect.to(&chatd).await.unwrap();
            let sent = client.message().await.unwrap();
            assert_eq!(texts(std::slice::from_ref(&sent)), ["hello"]);
            for packet_id in (1..=u16::MAX).step_by(97).filter(|packet_id| *packet_id != sent.packet_id) {
                // The server may close at the first one.
                if client.send_bytes(&acknowledge(packet_id)).await.is_err() {
                    break;
                }
            }
            is_closed(&mut client).await.unwrap();
        }
        let mut client = connect.to(&chatd).await.unwrap();
        assert_eq!(texts(&[client.acked_message().await.unwrap()]), ["hello"]);
        client.leave().await.unwrap();
    }
    assert_well(&chatd).await;
}

/// Receive maximum of 1 and of 65,535, by clients that acknowledge nothing: the first gets one message, the second a bounded number, of chat
/// and of ordinary topics together.
#[tokio::test]
async fn a_receive_maximum_that_is_never_acknowledged() {
    const MESSAGES: usize = 3_000;
    let chatd = Chatd::start().await.unwrap();
    let mut peers = Vec::new();
    for (name, receive_maximum) in [("one", 1), ("many", u16::MAX)] {
        let mut peer = Connect::v5(name, "phone").receive_maximum(receive_maximum).to(&chatd).await.unwrap();
        peer.subscribe(&format!("chat/{name}/inbox"), 1).await.unwrap();
        peer.subscribe("news", 2).await.unwrap();
        peers.push((peer, usize::from(receive_maximum)));
    }
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    for name in ["one", "many"] {
        let said = (0..MESSAGES).map(|n| Publish::new(format!("chat/alice/out/{name}"), format!("{n}"), 1));
        alice.publish_all(said).await.unwrap();
    }
    alice.publish_all((0..MESSAGES).map(|n| Publish::new("news", format!("{n}"), 1))).await.unwrap();
    for (peer, most) in &mut peers {
        let mut found = 0;
        // All that had come before the answer to a second PINGREQ: nothing more follows without acknowledgements.
        for _ in 0..2 {
            let publishes = peer.ping().await.unwrap();
            found +=
                publishes.iter().filter(|packet| matches!(packet, Packet::Publish(publish) if publish.qos > 0)).count();
        }
        assert!((1..=(*most).min(2_048)).contains(&found), "{found} of at most {most}");
    }
    assert_well(&chatd).await;
}

// ---- sessions and wills ------------------------------------------------------------------------------------------------------

/// Wildcards and separators in a user name or client identifier (CVE-2017-7650): no such user exists, and no such client identifier widens
/// anything.
#[tokio::test]
async fn names_with_wildcards_widen_nothing() {
    let chatd = Chatd::start().await.unwrap();
    for version in BOTH {
        for user in ["+", "#", "bob/#", "+/inbox", "b+b", "$share", "%u", "alice\0", "alice/../bob"] {
            let mut client = Connect::new(version, user, "hostile").open(&chatd).await.unwrap();
            let answer = client.receive().await.unwrap();
            assert!(matches!(answer, None | Some(Packet::Connack { code: 1.., .. })), "{user:?}: {answer:?}");
        }
    }
    let mut listeners = Vec::new();
    for (version, device) in BOTH.into_iter().flat_map(|version| {
        ["+", "#", "bob", "bob/#", "+/+", "../bob", "chat/bob/inbox", "%u"].map(|device| (version, device))
    }) {
        let connect =
            Connect::new(version, "alice", &format!("{device}{}", if version == Version::V4 { "" } else { "!" }));
        let mut client = connect.to(&chatd).await.unwrap();
        for filter in
            ["chat/bob/inbox", "chat/+/inbox", "chat/#", "chat/%u/inbox", "chat/%c/inbox", "$share/g/chat/bob/inbox"]
        {
            let (codes, _) = client.subscribe_codes(&[(filter, 1)]).await.unwrap();
            assert!(codes[0] >= 0x80, "{device}: {filter} was granted");
        }
        client.subscribe("chat/alice/inbox", 1).await.unwrap();
        client.subscribe("#", 1).await.unwrap();
        listeners.push(client);
    }
    let mut carol = Connect::v5("carol", "phone").to(&chatd).await.unwrap();
    carol.say("carol", "bob", "for bob alone").await.unwrap();
    carol.say("carol", "alice", "for alice").await.unwrap();
    for client in &mut listeners {
        assert_eq!(texts(&[client.acked_message().await.unwrap()]), ["for alice"]);
        assert_eq!(client.ping().await.unwrap(), []);
    }
    assert_well(&chatd).await;
}

/// Session takeover across users: two users with one client identifier have two sessions, and neither ends or reads the other's.
#[tokio::test]
async fn a_client_identifier_belongs_to_its_user() {
    let chatd = Chatd::start().await.unwrap();
    for version in BOTH {
        let connect =
            |user: &str| Connect::new(version, &format!("{user}-{version:?}").to_lowercase(), "same").persistent();
        let (alice, bob) = (connect("alice"), connect("bob"));
        let name = |connect: &Connect| connect.user_name.clone().unwrap();
        let mut alices = alice.to(&chatd).await.unwrap();
        alices.subscribe(&format!("chat/{}/inbox", name(&alice)), 1).await.unwrap();
        alices.subscribe("news", 1).await.unwrap();
        let mut carol = Connect::v5("carol", "same").to(&chatd).await.unwrap();
        // The same client identifier, again and again, also where the session is not connected.
        for _ in 0..3 {
            let mut bobs = bob.to(&chatd).await.unwrap();
            assert_eq!(bobs.ping().await.unwrap(), [], "bob gets nothing of alice's session");
            alices.ping().await.unwrap();
            bobs.leave().await.unwrap();
        }
        alices.leave().await.unwrap();
        carol.say("carol", &name(&alice), "for alice").await.unwrap();
        let mut bobs = bob.clone();
        bobs.clean_start = true;
        // Bob's clean start throws his own session away.
        bobs.to(&chatd).await.unwrap().leave().await.unwrap();
        let mut alices = alice.to(&chatd).await.unwrap();
        assert!(alices.session_present(), "alice's session went with bob's");
        assert_eq!(texts(&[alices.acked_message().await.unwrap()]), ["for alice"]);
        alices.leave().await.unwrap();
    }
    assert_well(&chatd).await;
}

/// A takeover that fires the new session's will: the old connection's will is published, the new one's only when that breaks.
#[tokio::test]
async fn a_takeover_fires_the_old_will() {
    let chatd = Chatd::start().await.unwrap();
    let mut watcher = Connect::v5("watcher", "watcher").to(&chatd).await.unwrap();
    watcher.subscribe("wills/#", 1).await.unwrap();
    for version in BOTH {
        let with_will = |n: usize| {
            let will =
                Will { topic: "wills/alice".into(), payload: format!("will {n}").into(), qos: 1, ..Will::default() };
            Connect::new(version, "alice", "phone").will(will)
        };
        let mut old = with_will(0).to(&chatd).await.unwrap();
        for n in 0..5 {
            let new = with_will(n + 1).to(&chatd).await.unwrap();
            old.until_closed().await.unwrap();
            assert_eq!(watcher.acked_message().await.unwrap().text(), format!("will {n}"));
            old = new;
        }
        old.ping().await.unwrap();
        assert_eq!(watcher.ping().await.unwrap(), [], "the connection that lives has its will still");
        old.leave().await.unwrap();
        assert_eq!(watcher.ping().await.unwrap(), [], "a goodbye fires no will");
    }
    assert_well(&chatd).await;
}

/// Keep alive: 0 is allowed and bounded by the idle limit; what is not kept ends the connection, and bytes that never become a packet, one now
/// and then, do not keep it.
#[tokio::test]
async fn keep_alive_is_kept_by_packets_alone() {
    // MQTT 5 is told a keep alive if it asks for none; MQTT 3.1.1 cannot be.
    let options = Options::default().set("limits.idle_timeout_ms", 1_500).set("limits.keep_alive_max_s", 1);
    let chatd = Chatd::start_with(options).await.unwrap();
    for version in BOTH {
        for keep_alive_s in [0, 1] {
            let began = Instant::now();
            let mut client = Connect::new(version, "alice", "phone").keep_alive(keep_alive_s).to(&chatd).await.unwrap();
            let endless = packet::publish(version, &Publish::new("ordinary", vec![b'x'; 100_000], 0));
            let mut sent = 0;
            // A byte every tenth of a second; the server closes in the midst.
            while client.send_bytes(&endless[sent..=sent]).await.is_ok() {
                sent += 1;
                assert!(began.elapsed() < PATIENCE, "still connected");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let packets = client.until_closed().await.unwrap();
            let timed_out = packets.iter().any(|packet| matches!(packet, Packet::Disconnect { code: 0x8d, .. }));
            assert!(timed_out || version == Version::V4 || packets.is_empty(), "{packets:?}");
        }
        // Whoever is heard stays.
        let mut client = Connect::new(version, "alice", "phone").to(&chatd).await.unwrap();
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            client.ping().await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    assert_well(&chatd).await;
}

/// A publish without RETAIN, empty or not, at any QoS, by anybody, clears no retained message.
#[tokio::test]
async fn only_retain_clears_what_is_retained() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.publish(Publish { retain: true, ..Publish::new("state", "kept", 1) }).await.unwrap();
    for version in BOTH {
        for payload in ["", "other"] {
            for qos in 0..=2 {
                let mut bob = Connect::new(version, "bob", "hostile").to(&chatd).await.unwrap();
                bob.publish(Publish::new("state", payload, qos)).await.unwrap();
                bob.ping().await.unwrap();
                let will = Will { topic: "state".into(), payload: payload.into(), qos, ..Will::default() };
                let dying = Connect::new(version, "bob", "hostile").will(will).to(&chatd).await.unwrap();
                drop(dying);
                let mut late = Connect::new(version, "carol", "late").to(&chatd).await.unwrap();
                late.subscribe("state", 0).await.unwrap();
                let kept = late.message().await.unwrap();
                assert!(kept.retain && kept.payload == b"kept", "{kept:?}");
            }
        }
    }
    assert_well(&chatd).await;
}
