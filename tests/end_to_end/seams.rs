//! Where one thing meets the next: two topics of one conversation, a connection and the one that follows it, an acknowledgement that got lost.

use std::collections::BTreeMap;

use end_to_end::packet::{self, Packet, Publish, Version, Will};
use end_to_end::{Chatd, Client, Connect, PATIENCE, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::chat::{listener, seqs, texts};

/// A device that sees both sides of a conversation sees them in one order: what waited, a burst, and again after a restart.
#[tokio::test]
async fn both_sides_of_a_conversation_come_in_one_order() {
    let mut chatd = Chatd::start().await.unwrap();
    let tablet = Connect::v5("alice", "alice-tablet").persistent();
    let mut device = tablet.to(&chatd).await.unwrap();
    device.subscribe("chat/alice/inbox", 1).await.unwrap();
    device.subscribe("chat/alice/sent", 1).await.unwrap();
    device.leave().await.unwrap();
    let mut said = 0;
    for round in 0..3 {
        let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
        let mut bob = Connect::v4("bob", "bob-phone").to(&chatd).await.unwrap();
        for _ in 0..100 {
            alice.say("alice", "bob", "from alice").await.unwrap();
            bob.say("bob", "alice", "from bob").await.unwrap();
        }
        if round == 1 {
            chatd.kill9().await.unwrap();
            chatd.restart().await.unwrap();
        }
        let mut device = tablet.to(&chatd).await.unwrap();
        if round == 2 {
            // Both write as fast as they can while the device catches up.
            let mut bob = Connect::v4("bob", "bob-phone").to(&chatd).await.unwrap();
            let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
            let burst = |from: &'static str, to: &'static str| {
                (0..300).map(move |_| Publish::new(format!("chat/{from}/out/{to}"), "burst", 1))
            };
            let (alices, bobs) =
                tokio::join!(alice.publish_all(burst("alice", "bob")), bob.publish_all(burst("bob", "alice")));
            assert_eq!(alices.unwrap().len() + bobs.unwrap().len(), 600);
        }
        let count = if round == 2 { 800 } else { 200 };
        let got = device.acked_messages(count).await.unwrap();
        assert_eq!(seqs(&got), (said + 1..=said + count as u64).collect::<Vec<_>>(), "round {round}");
        said += count as u64;
        device.leave().await.unwrap();
    }
}

/// Sends bytes on a new connection and leaves without a look back.
async fn hit_and_run(chatd: &Chatd, bytes: &[u8]) {
    let mut stream = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut connack = [0; 4];
    stream.read_exact(&mut connack).await.unwrap();
    assert_eq!((connack[0], connack[3]), (0x20, 0));
}

/// What a client said before it came back counts, however soon it comes back.
#[tokio::test]
async fn what_was_said_before_a_fast_return_counts() {
    let chatd = Chatd::start().await.unwrap();
    let mut watcher = Connect::v5("eve", "eve-phone").to(&chatd).await.unwrap();
    watcher.subscribe("wills/#", 1).await.unwrap();
    let will = Will { topic: "wills/alice".to_owned(), payload: b"died".to_vec(), qos: 1, ..Will::default() };
    let device = Connect::v4("alice", "alice-phone").will(will);
    for number in 0..60 {
        let mut bytes = device.bytes();
        let said = Publish::new("chat/alice/out/bob", format!("text {number}"), 0);
        bytes.extend(packet::publish(Version::V4, &said));
        bytes.extend([0xe0, 0]);
        hit_and_run(&chatd, &bytes).await;
    }
    let mut bob = listener(&chatd, Connect::v4("bob", "bob-phone")).await.unwrap();
    let got = bob.acked_messages(60).await.unwrap();
    assert_eq!(texts(&got), (0..60).map(|number| format!("text {number}")).collect::<Vec<_>>());
    watcher.publish(Publish::new("wills/none", "the end", 1)).await.unwrap();
    assert_eq!(watcher.message().await.unwrap().payload, b"the end", "no will came before");
}

#[tokio::test]
async fn an_acknowledgement_before_a_fast_return_counts() {
    let chatd = Chatd::start().await.unwrap();
    let device = Connect::v5("bob", "bob-phone").persistent();
    listener(&chatd, device.clone()).await.unwrap().leave().await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    let mut seen: BTreeMap<u64, usize> = BTreeMap::new();
    for seq in 1..=40 {
        alice.say("alice", "bob", "hello").await.unwrap();
        let mut bob = device.to(&chatd).await.unwrap();
        let got = bob.acked_message().await.unwrap();
        *seen.entry(seqs(&[got])[0]).or_default() += 1;
        bob.leave().await.unwrap();
        assert_eq!(seen, (1..=seq).map(|seq| (seq, 1)).collect());
    }
}

#[tokio::test]
async fn a_session_that_was_ended_is_not_there_for_a_fast_return() {
    let chatd = Chatd::start().await.unwrap();
    for _ in 0..40 {
        let mut client = Connect::v5("alice", "alice-phone").persistent().to(&chatd).await.unwrap();
        assert!(!client.session_present());
        client.subscribe("chat/alice/inbox", 1).await.unwrap();
        // DISCONNECT with Session Expiry Interval 0.
        client.send_bytes(&[0xe0, 7, 0, 5, 0x11, 0, 0, 0, 0]).await.unwrap();
        let mut again = Connect::v5("alice", "alice-phone");
        again.clean_start = false;
        let again: Client = again.to(&chatd).await.unwrap();
        assert!(!again.session_present());
        again.leave().await.unwrap();
    }
}

/// QoS 2: the connection is cut before PUBREC; the resend under the same packet identifier is the same message.
#[tokio::test]
async fn a_qos_2_publish_that_was_cut_off_is_stored_once() {
    let chatd = Chatd::start().await.unwrap();
    for version in [Version::V4, Version::V5] {
        let device = Connect::new(version, "alice", "alice-phone").persistent();
        for number in 0..20 {
            let publish = Publish { packet_id: 7, ..Publish::new("chat/alice/out/bob", format!("text {number}"), 2) };
            let mut bytes = device.bytes();
            bytes.extend(packet::publish(version, &publish));
            let mut stream = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            // Or the next connection might be the first.
            stream.read_exact(&mut [0; 4]).await.unwrap();
            let before = f64::from(number + if version == Version::V5 { 20 } else { 0 });
            if number % 2 == 0 {
                let stored = async || chatd.metric("chatd_messages_accepted_total").await.unwrap() > before;
                eventually("the message is stored", PATIENCE, stored).await;
            }
            drop(stream);
            let mut alice = device.to(&chatd).await.unwrap();
            let again = Publish { dup: true, ..publish };
            alice.start_publish(again).await.unwrap();
            assert!(alice.pubrec(7).await.unwrap().code < 0x80);
            alice.send_bytes(&packet::pubrel(7)).await.unwrap();
            alice.pubcomp(7).await.unwrap();
            alice.leave().await.unwrap();
        }
    }
    assert_eq!(chatd.metric("chatd_messages_accepted_total").await.unwrap(), 40.0);
}

/// MQTT 3.1 and whatever comes after 5 are told that they are not spoken [MQTT-3.1.2-2].
#[tokio::test]
async fn other_versions_are_told_so() {
    let chatd = Chatd::start().await.unwrap();
    let mqisdp = [0x10, 15, 0, 6, b'M', b'Q', b'I', b's', b'd', b'p', 3, 2, 0, 60, 0, 1, b'a'];
    let six = [0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 6, 2, 0, 60, 0, 1, b'a'];
    for connect in [&mqisdp[..], &six] {
        let mut stream = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
        stream.write_all(connect).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, [0x20, 2, 0, 1]);
    }
}

/// The edge's own refusals have the form of all others.
#[tokio::test]
async fn reason_strings_begin_with_the_code() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    for (topic, code) in [("a/+/b", "invalid_topic: "), ("$SYS/x", "not_authorized: "), ("chat/x", "invalid_topic: ")] {
        let ack = alice.publish(Publish::new(topic, "x", 1)).await.unwrap();
        assert!(ack.reason.as_deref().unwrap_or_default().starts_with(code), "{topic}: {ack:?}");
    }
}

/// MQTT 3.1.1 is told of every refusal by an event, of many at once too.
#[tokio::test]
async fn a_burst_of_refusals_is_told_in_full() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v4("alice", "alice-phone").to(&chatd).await.unwrap();
    alice.subscribe("chat/alice/event/error", 1).await.unwrap();
    let mut bytes = Vec::new();
    for packet_id in 1..=1_000 {
        let publish = Publish { packet_id, ..Publish::new("chat/alice/out/alice", "to myself", 1) };
        bytes.extend(packet::publish(Version::V4, &publish));
    }
    alice.send_bytes(&bytes).await.unwrap();
    for number in 1..=1_000 {
        let event = alice.acked_message_on("chat/alice/event/error").await;
        assert!(event.is_ok(), "event {number}: {event:?}");
    }
    for expected in 1..=1_000 {
        let found = alice.take("PUBACK", |packet| match packet {
            Packet::Puback { packet_id, .. } => Some(*packet_id),
            _ => None,
        });
        assert_eq!(found.await.unwrap(), expected);
    }
}
