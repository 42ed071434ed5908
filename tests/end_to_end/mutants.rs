//! A hundred thousand mutated packets against one server, while two innocent users chat.
//!
//! Packets of every type a client may send, with every property, are made valid and then bent: bits, lengths, order, parts of each other, the
//! other version's. Whatever the server makes of them, it lives, says nothing in its log above a warning, and is as it was when they have gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use end_to_end::packet::{self, Properties, Publish, Value, Version, Will, id};
use end_to_end::{Chatd, Client, Connect, Dice, Options, PATIENCE, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::chat::{Bystanders, assert_well};

const MUTANTS: usize = 100_000;
const MUTANTS_PER_CONNECTION: usize = 25;
const ATTACKERS: usize = 4;
/// Memory that is not given back but used again: the allocator's, the store's cache, the bus's segments.
const MEMORY_KEPT_KB: u64 = 16 * 1024;

const TOPICS: [&str; 10] = [
    "a",
    "a/b",
    "/",
    "ü/é",
    "chat/alice/out/bob",
    "chat/alice/typing/bob",
    "chat/alice/read/bob",
    "chat/bob/out/x",
    "$x",
    "a/b/c",
];
const REQUESTS: [&str; 4] = ["whoami", "history", "sync", "nothing"];
const FILTERS: [&str; 12] = [
    "#",
    "+",
    "a/+",
    "a/#",
    "+/b/#",
    "ü/é",
    "chat/alice/#",
    "chat/alice/inbox",
    "chat/#",
    "$share/g/a/#",
    "$SYS/#",
    "a/b",
];
const PAYLOADS: [&str; 5] = ["", "x", "hello", r#"{"id":1,"method":"whoami"}"#, r#"{"upto":3,"limit":-1}"#];

/// One of these.
fn one<'a>(dice: &mut Dice, of: &[&'a str]) -> &'a str {
    of[dice.below(of.len())]
}

/// Properties that packets of this kind may have, each or not; some twice, which most must not.
fn properties(dice: &mut Dice, version: Version, allowed: &[u8]) -> Properties {
    let mut properties = Properties::none();
    if version == Version::V4 {
        return properties;
    }
    for identifier in allowed {
        if dice.below(3) > 0 {
            continue;
        }
        let (short, long) = (u16::from(dice.byte()), u32::from(dice.byte()));
        let value = match *identifier {
            id::PAYLOAD_FORMAT | 0x17 | 0x19 => Value::Byte(dice.byte() & 1),
            id::RECEIVE_MAXIMUM | id::TOPIC_ALIAS_MAXIMUM => Value::U16(short + 1),
            id::TOPIC_ALIAS => Value::U16(short % 18),
            id::MESSAGE_EXPIRY | id::SESSION_EXPIRY | id::WILL_DELAY => Value::U32(long % 3),
            id::MAXIMUM_PACKET_SIZE => Value::U32(long + 20),
            id::SUBSCRIPTION_IDENTIFIER => Value::Variable(long + 1),
            id::CORRELATION_DATA | id::AUTHENTICATION_DATA => Value::Binary(vec![dice.byte(); dice.below(20)]),
            id::USER_PROPERTY => Value::Pair("id".into(), format!("m-{short}")),
            id::RESPONSE_TOPIC => Value::Text("chat/alice/res/1".into()),
            _ => Value::Text("text".into()),
        };
        properties = properties.with(*identifier, value);
    }
    properties
}

const OF_A_MESSAGE: [u8; 6] = [
    id::PAYLOAD_FORMAT,
    id::MESSAGE_EXPIRY,
    id::CONTENT_TYPE,
    id::RESPONSE_TOPIC,
    id::CORRELATION_DATA,
    id::USER_PROPERTY,
];

fn connect(dice: &mut Dice, version: Version) -> Vec<u8> {
    let mut connect =
        Connect::new(version, one(dice, &["alice", "bob", "carol"]), &format!("device-{}", dice.below(12)));
    connect.clean_start = dice.below(3) > 0;
    connect.keep_alive_s = u16::from(dice.byte());
    if dice.below(3) == 0 {
        let of_a_will = [&[id::WILL_DELAY][..], &OF_A_MESSAGE].concat();
        connect = connect.will(Will {
            topic: one(dice, &TOPICS).to_owned(),
            payload: one(dice, &PAYLOADS).into(),
            qos: dice.byte() % 3,
            retain: dice.below(4) == 0,
            properties: properties(dice, version, &of_a_will),
        });
    }
    if dice.below(4) == 0 {
        connect = connect.password("a password");
    }
    let of_connect = [
        id::SESSION_EXPIRY,
        id::RECEIVE_MAXIMUM,
        id::MAXIMUM_PACKET_SIZE,
        id::TOPIC_ALIAS_MAXIMUM,
        0x17,
        0x19,
        id::USER_PROPERTY,
    ];
    connect.properties = properties(dice, version, &of_connect);
    connect.bytes()
}

/// A valid packet after CONNECT, or one that is only wrong now.
fn decent(dice: &mut Dice, version: Version) -> Vec<u8> {
    let packet_id = 1 + u16::from(dice.byte() % 20);
    match dice.below(20) {
        0..=7 => {
            let topic = match dice.below(4) {
                0 => format!("chat/alice/req/{}", one(dice, &REQUESTS)),
                _ => one(dice, &TOPICS).to_owned(),
            };
            let of_publish = [&[id::TOPIC_ALIAS][..], &OF_A_MESSAGE].concat();
            let (qos, retain, dup) = (dice.byte() % 3, dice.below(6) == 0, dice.below(6) == 0);
            let properties = properties(dice, version, &of_publish);
            let payload = one(dice, &PAYLOADS).into();
            packet::publish(
                version,
                &Publish { topic, payload, qos, retain, dup: dup && qos > 0, packet_id, properties },
            )
        }
        8..=11 => {
            let filters: Vec<(&str, u8)> = (0..=dice.below(3))
                .map(|_| {
                    let options = if version == Version::V5 { dice.byte() & 0x1e } else { 0 };
                    (one(dice, &FILTERS), (options & 0xfc) | (dice.byte() % 3))
                })
                .collect();
            let properties = properties(dice, version, &[id::SUBSCRIPTION_IDENTIFIER, id::USER_PROPERTY]);
            packet::subscribe(version, packet_id, &properties, &filters)
        }
        12 => packet::unsubscribe(version, packet_id, &[one(dice, &FILTERS), one(dice, &FILTERS)]),
        13 => packet::puback(packet_id),
        14 => packet::pubrec(packet_id),
        15 => packet::pubrel(packet_id),
        16 => packet::pubcomp(packet_id),
        17 => packet::pingreq(),
        18 if version == Version::V5 => packet::authenticate_again("JWT", b"a token"),
        18 => packet::pingreq(),
        _ => {
            let of_disconnect = [id::SESSION_EXPIRY, id::REASON_STRING, id::USER_PROPERTY];
            let properties = properties(dice, version, &of_disconnect);
            packet::disconnect(version, [0, 4][dice.below(2)], &properties)
        }
    }
}

/// A packet bent in one way or a few.
fn mutated(dice: &mut Dice, packet: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = packet.to_vec();
    for _ in 0..=dice.below(2) {
        let at = dice.below(bytes.len().max(1));
        match dice.below(11) {
            _ if bytes.is_empty() => bytes.push(dice.byte()),
            0 => bytes[at] ^= 1 << dice.below(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'#', b'+', b'/', b'$'][dice.below(9)],
            2 => bytes.truncate(at),
            // A lie about the length of the whole, or of something inside.
            3 if bytes.len() > 1 => bytes[1] = dice.byte(),
            4 => bytes[at] = bytes[at].wrapping_add([1, 2, 0xff, 0xfe][dice.below(4)]),
            5 => bytes.insert(at, dice.byte()),
            6 => drop(bytes.remove(at)),
            7 => {
                let end = at + dice.below(bytes.len() - at + 1);
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            8 => {
                let end = at + dice.below(bytes.len() - at + 1);
                bytes.drain(at..end);
            }
            // The head of one and the tail of another.
            9 => {
                bytes.truncate(at);
                bytes.extend(&other[dice.below(other.len())..]);
            }
            _ => bytes.extend(other),
        }
    }
    // Half of them with a length that is right, so that the mistake is inside.
    if dice.below(2) == 0
        && bytes.len() >= 2
        && let Ok(length) = u8::try_from(bytes.len() - 2)
        && length < 128
    {
        bytes[1] = length;
    }
    bytes
}

/// What one connection sends: valid packets and mutants, all mixed up.
fn conversation(dice: &mut Dice, mutants: usize) -> Vec<Vec<u8>> {
    let version = [Version::V4, Version::V5][dice.below(2)];
    let opening = connect(dice, version);
    let mut packets = Vec::with_capacity(2 * mutants);
    packets.push(match dice.below(10) {
        0 => mutated(dice, &opening, &packet::pingreq()),
        _ => opening,
    });
    for _ in 0..mutants {
        let (packet, other) = (decent(dice, version), decent(dice, version));
        packets.push(match dice.below(12) {
            // Whole, but of the other version, or twice, or CONNECT again.
            0 => decent(dice, if version == Version::V4 { Version::V5 } else { Version::V4 }),
            1 => packet.repeat(2),
            2 if dice.below(8) == 0 => connect(dice, version),
            _ => mutated(dice, &packet, &other),
        });
        if dice.below(2) == 0 {
            packets.push(other);
        }
    }
    if dice.below(4) == 0 {
        let (one, other) = (1 + dice.below(packets.len() - 1), 1 + dice.below(packets.len() - 1));
        packets.swap(one, other);
    }
    packets
}

/// Sends it in pieces that are not the packets', over TCP or WebSocket, and ends in one way or another.
async fn attack(chatd: &Chatd, dice: &mut Dice, bytes: &[u8]) -> Result<()> {
    let piece = [1_000_000, 1_000, 100, 7][dice.below(4)];
    if dice.below(8) == 0 {
        let mut client = Client::web_socket(chatd.http_addr(), Version::V5).await?;
        for piece in bytes.chunks(piece) {
            // The server may close before it has read everything.
            if client.send_bytes(piece).await.is_err() {
                break;
            }
        }
        return Ok(());
    }
    let mut stream = TcpStream::connect(chatd.mqtt_addr()).await?;
    stream.set_nodelay(true)?;
    for piece in bytes.chunks(piece) {
        if stream.write_all(piece).await.is_err() {
            return Ok(());
        }
    }
    if dice.below(3) == 0 {
        stream.set_zero_linger()?;
    } else if stream.shutdown().await.is_ok() {
        let mut answers = Vec::new();
        let reading = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answers)).await;
        // A reset is an end, too.
        drop(reading.with_context(|| format!("not closed after {bytes:02x?}"))?);
    }
    Ok(())
}

/// So many mutants by several at once.
async fn attack_by_all(chatd: &Arc<Chatd>, dice: &mut Dice, mutants: usize) {
    let mut attackers = JoinSet::new();
    for _ in 0..ATTACKERS {
        let (chatd, mut dice) = (Arc::clone(chatd), Dice::new(dice.number()));
        attackers.spawn(async move {
            for _ in 0..mutants / ATTACKERS / MUTANTS_PER_CONNECTION {
                let bytes = conversation(&mut dice, MUTANTS_PER_CONNECTION).concat();
                attack(&chatd, &mut dice, &bytes).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(attacker) = attackers.join_next().await {
        attacker.unwrap().unwrap();
    }
}

/// Clears every retained message that the mutants left.
async fn clear_retained(chatd: &Chatd) {
    let mut cleaner = Connect::v5("cleaner", "cleaner").to(chatd).await.unwrap();
    let end = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < end, "messages are still retained");
        // What begins with $ is the server's own, and is not matched.
        cleaner.subscribe("#", 0).await.unwrap();
        let mut found = cleaner.ping().await.unwrap();
        found.extend(cleaner.ping().await.unwrap());
        let mut is_clear = true;
        for packet in found {
            if let packet::Packet::Publish(Publish { topic, retain: true, .. }) = packet {
                is_clear = false;
                cleaner.publish(Publish { retain: true, ..Publish::new(topic, "", 1) }).await.unwrap();
            }
        }
        if is_clear {
            break;
        }
    }
    cleaner.leave().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_mutants() {
    let mut dice = Dice::thrown("mutants");
    // Whatever sessions a mutant asks for are over soon.
    let chatd = Arc::new(Chatd::start_with(Options::default().set("limits.session_expiry_max_s", 1)).await.unwrap());
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let before = chatd.traces().await.unwrap();
    // What any such traffic fills once: caches, pools, segments.
    attack_by_all(&chatd, &mut dice, MUTANTS / 5).await;
    let (memory, descriptors) = (chatd.memory_kb().unwrap(), chatd.descriptors().unwrap());
    attack_by_all(&chatd, &mut dice, MUTANTS).await;
    clear_retained(&chatd).await;
    let is_back = |now: &BTreeMap<String, f64>| now.iter().all(|(name, entries)| *entries <= before[name]);
    let mut now = BTreeMap::new();
    for _ in 0..100 {
        now = chatd.traces().await.unwrap();
        if is_back(&now) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert!(is_back(&now), "what the edge keeps: {before:#?}\n{now:#?}");
    eventually("descriptors are closed", PATIENCE, async || chatd.descriptors().unwrap() <= descriptors).await;
    let memory_now = chatd.memory_kb().unwrap();
    println!("memory {memory} to {memory_now} KB");
    assert!(memory_now < memory + MEMORY_KEPT_KB, "{memory} to {memory_now} KB");
    let rounds = bystanders.were_not_disturbed().await.unwrap();
    println!("the bystanders wrote {rounds} rounds");
    assert_well(&chatd).await;
    let log = chatd.log().unwrap();
    let error = log.lines().find(|line| line.contains("\"level\":\"ERROR\""));
    assert_eq!(error, None);
}
