//! Slow receivers cost only themselves: neither others' time nor the server's memory.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use end_to_end::packet::{self, Packet, Properties, Publish, Version};
use end_to_end::{Chatd, Client, Connect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::chat::{assert_well, listener, number, numbered, sends, seqs};

const WAITING: u64 = 50_000;
/// What the server may keep for the two slow ones.
const MEMORY_GROWTH_MAX_KB: u64 = 10 * 1024;

/// Sends that many messages to a user from several senders at once.
async fn fill(chatd: &Chatd, to: &str, messages: u64) {
    const SENDERS: u64 = 4;
    let mut sending = tokio::task::JoinSet::new();
    for sender in 0..SENDERS {
        let me = format!("sender-{sender}");
        let publishes: Vec<Publish> = sends(&me, to, numbered("text", 1..=messages / SENDERS)).collect();
        let mut client = Connect::v4(&me, &format!("to-{to}")).to(chatd).await.unwrap();
        sending.spawn(async move { client.publish_all(publishes).await });
    }
    while let Some(sent) = sending.join_next().await {
        sent.unwrap().unwrap();
    }
}

/// Reads everything and never acknowledges anything.
async fn never_acknowledges(chatd: &Chatd) -> Result<Client> {
    let mut client = Connect::v5("mute", "mute-phone").persistent().receive_maximum(u16::MAX).to(chatd).await?;
    client.subscribe("chat/mute/inbox", 1).await?;
    Ok(client)
}

/// Reads a byte a second, from a socket that the kernel buffers as little as it can; at QoS 0, where no window holds the server back.
async fn reads_a_byte_a_second(chatd: &Chatd) -> Result<tokio::task::JoinHandle<()>> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4 * 1024)?;
    let mut stream: TcpStream = socket.connect(chatd.mqtt_addr()).await?;
    let mut bytes = Connect::v4("lazy", "lazy-phone").persistent().bytes();
    bytes.extend(packet::subscribe(Version::V4, 1, &Properties::none(), &[("chat/lazy/inbox", 0)]));
    stream.write_all(&bytes).await?;
    // CONNACK and SUBACK in full, then a byte a second.
    let mut answers = [0; 9];
    stream.read_exact(&mut answers).await?;
    Ok(tokio::spawn(async move {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        loop {
            second.tick().await;
            if stream.read_u8().await.is_err() {
                return;
            }
        }
    }))
}

struct Latency {
    median: Duration,
    p99: Duration,
}

/// From PUBLISH to delivery, between two who have nothing to do with the slow ones.
async fn latency(carol: &mut Client, dave: &mut Client) -> Result<Latency> {
    const ROUNDS: usize = 300;
    let mut times = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS {
        let began = Instant::now();
        carol.start_publish(Publish::new("chat/carol/out/dave", format!("round {round}"), 1)).await?;
        dave.acked_message().await.context("dave")?;
        times.push(began.elapsed());
        carol.take("PUBACK", |packet| matches!(packet, Packet::Puback { .. }).then_some(())).await?;
    }
    times.sort_unstable();
    Ok(Latency { median: times[ROUNDS / 2], p99: times[ROUNDS * 99 / 100] })
}

async fn best_latency(carol: &mut Client, dave: &mut Client) -> Latency {
    let mut best: Option<Latency> = None;
    for _ in 0..4 {
        let next = latency(carol, dave).await.unwrap();
        best = Some(match best {
            Some(best) => Latency { median: best.median.min(next.median), p99: best.p99.min(next.p99) },
            None => next,
        });
    }
    best.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_slow_receivers_with_50_000_waiting_cost_nobody_else_anything() {
    let chatd = Chatd::start_with(end_to_end::Options::default().as_fast_as_it_can()).await.unwrap();
    for user in ["mute", "lazy", "warm"] {
        listener(&chatd, Connect::v4(user, &format!("{user}-phone")).persistent())
            .await
            .unwrap()
            .leave()
            .await
            .unwrap();
    }
    fill(&chatd, "warm", 20_000).await;
    fill(&chatd, "mute", WAITING).await;
    fill(&chatd, "lazy", WAITING).await;

    // A good reader warms up whatever the server keeps for readers at all: pages of the log, and segments of the bus.
    let mut warm = Connect::v5("warm", "warm-phone").persistent().to(&chatd).await.unwrap();
    let reading = tokio::spawn(async move {
        let read = warm.acked_messages(40_000).await;
        read.map(|_| warm)
    });
    fill(&chatd, "warm", 20_000).await;
    let warm = reading.await.unwrap().unwrap();
    let mut carol = Connect::v5("carol", "carol-phone").to(&chatd).await.unwrap();
    let mut dave = listener(&chatd, Connect::v5("dave", "dave-phone")).await.unwrap();
    let without = best_latency(&mut carol, &mut dave).await;
    let memory_before = chatd.memory_kb().unwrap();

    let mut mute = never_acknowledges(&chatd).await.unwrap();
    // It gets what its window holds, in order, and then nothing more.
    let mut held = Vec::new();
    while held.len() < 20 {
        held.push(mute.message().await.unwrap());
    }
    assert!(held.iter().all(|message| message.retain));
    let lazy = reads_a_byte_a_second(&chatd).await.unwrap();
    let with = best_latency(&mut carol, &mut dave).await;
    // Live messages on top of the backlog change nothing.
    fill(&chatd, "mute", 4_000).await;
    fill(&chatd, "lazy", 4_000).await;
    let with_live = best_latency(&mut carol, &mut dave).await;
    let memory_after = chatd.memory_kb().unwrap();

    println!(
        "median/p99 without {:?}/{:?}, with {:?}/{:?}, and after live messages {:?}/{:?}; memory {memory_before} to {memory_after} KB",
        without.median, without.p99, with.median, with.p99, with_live.median, with_live.p99
    );
    drop(warm);
    let growth = memory_after.saturating_sub(memory_before);
    assert!(growth < MEMORY_GROWTH_MAX_KB, "memory grew by {growth} KB for two slow receivers");
    // Generous: other tests run beside this one. A receiver that holds up others holds them up for as long as it is slow.
    for slow in [with, with_live] {
        assert!(
            slow.median < without.median * 4 + Duration::from_millis(10),
            "{:?} > {:?}",
            slow.median,
            without.median
        );
        assert!(slow.p99 < without.p99 * 5 + Duration::from_millis(150), "{:?} > {:?}", slow.p99, without.p99);
    }
    assert!(!lazy.is_finished(), "the lazy one is still served");
    lazy.abort();

    // Once it acknowledges, the mute one gets everything, each once and in order for each sender.
    let mut after = std::collections::BTreeMap::new();
    let mut take = |message: &Publish| {
        let envelope = message.json();
        let seq = after.entry(envelope["from"].as_str().unwrap().to_owned()).or_insert(0);
        *seq += 1;
        assert_eq!(number(&envelope, "seq"), *seq);
    };
    for message in &held {
        take(message);
        mute.acknowledge(message).await.unwrap();
    }
    for _ in held.len()..usize::try_from(WAITING + 4_000).unwrap() {
        take(&mute.acked_message().await.unwrap());
    }
    assert_eq!(mute.ping().await.unwrap(), []);
    assert_well(&chatd).await;
}

/// MQTT 5's Receive Maximum is kept to the packet.
#[tokio::test]
async fn the_receivers_window_is_respected() {
    let chatd = Chatd::start().await.unwrap();
    let connect = Connect::v5("bob", "bob-phone").persistent().receive_maximum(3);
    let mut bob = listener(&chatd, connect).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    alice.publish_all(sends("alice", "bob", numbered("text", 1..=40))).await.unwrap();
    let mut under_way = Vec::new();
    for _ in 0..3 {
        under_way.push(bob.message().await.unwrap());
    }
    assert_eq!(bob.ping().await.unwrap(), [], "not a fourth one");
    // As many as he acknowledges come after.
    for acknowledged in [1, 2, 3, 1] {
        for message in under_way.drain(..acknowledged) {
            bob.acknowledge(&message).await.unwrap();
        }
        for _ in 0..acknowledged {
            under_way.push(bob.message().await.unwrap());
        }
        assert_eq!(bob.ping().await.unwrap(), []);
    }
    assert_eq!(seqs(&under_way), [8, 9, 10]);
}

/// MQTT 3.1.1 has no Receive Maximum: the server's own holds.
#[tokio::test]
async fn the_servers_window_holds_for_mqtt_3_1_1() {
    let options = end_to_end::Options::default().set("limits.window", 5);
    let chatd = Chatd::start_with(options).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    alice.publish_all(sends("alice", "bob", numbered("text", 1..=40))).await.unwrap();
    let mut bob = listener(&chatd, Connect::v4("bob", "bob-phone")).await.unwrap();
    let mut under_way = Vec::new();
    for _ in 0..5 {
        under_way.push(bob.message().await.unwrap());
    }
    assert_eq!(bob.ping().await.unwrap(), []);
    for message in &under_way {
        bob.acknowledge(message).await.unwrap();
    }
    assert_eq!(seqs(&bob.acked_messages(35).await.unwrap()), (6..=40).collect::<Vec<_>>());
}

/// A client whose Maximum Packet Size is too small for a message does not get it, and what follows is not held up [MQTT-3.1.2-24].
#[tokio::test]
async fn a_message_too_large_for_its_receiver_holds_nothing_up() {
    let chatd = Chatd::start().await.unwrap();
    let mut connect = Connect::v5("bob", "bob-phone").persistent();
    connect.properties = connect.properties.with(packet::id::MAXIMUM_PACKET_SIZE, packet::Value::U32(500)).clone();
    let mut bob = listener(&chatd, connect).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    for text in ["first", &"x".repeat(1_000), "last"] {
        alice.say("alice", "bob", text).await.unwrap();
    }
    assert_eq!(seqs(&bob.acked_messages(2).await.unwrap()), [1, 3]);
}
