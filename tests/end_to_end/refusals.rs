//! A refused publish is never silent, and never ends a connection.

use end_to_end::packet::{Packet, Properties, Publish, Version};
use end_to_end::{Chatd, Client, Connect, Options};

use crate::chat::{assert_well, listener, texts};

/// A publish of alice's that has to be refused.
struct Refused {
    topic: String,
    payload: Vec<u8>,
    /// As user property.
    id: Option<String>,
    code: &'static str,
    reason_code: u8,
    /// The id that the event has to name.
    told_id: Option<&'static str>,
}

fn refused(code: &'static str, reason_code: u8, topic: impl Into<String>, payload: impl Into<Vec<u8>>) -> Refused {
    Refused { topic: topic.into(), payload: payload.into(), id: None, code, reason_code, told_id: None }
}

fn every_refusal() -> Vec<Refused> {
    let peer = |peer: &str| refused("invalid_peer", 0x90, format!("chat/alice/out/{peer}"), "hello");
    let id = |id: &str| refused("invalid_id", 0x90, format!("chat/alice/out/bob/{id}"), "hello");
    let topic = |topic: &str| refused("invalid_topic", 0x90, topic, "hello");
    let to_bob = |code, reason_code, payload: &[u8]| refused(code, reason_code, "chat/alice/out/bob", payload);
    vec![
        peer("Bob"),
        peer("-bob"),
        peer("bob smith"),
        peer("bøb"),
        peer(""),
        peer("x".repeat(65).as_str()),
        id("has space"),
        id("ümlaut"),
        id(""),
        id("x".repeat(65).as_str()),
        Refused { id: Some("has space".into()), ..refused("invalid_id", 0x90, "chat/alice/out/bob", "hello") },
        Refused { id: Some(String::new()), ..refused("invalid_id", 0x90, "chat/alice/out/bob", "hello") },
        topic("chat/alice/out"),
        topic("chat/alice/out/bob/m-1/more"),
        topic("chat/alice/nonsense/bob"),
        topic("chat/alice/inbox"),
        topic("chat/alice/sent"),
        topic("chat/alice/event/error"),
        topic("chat/alice"),
        topic("chat"),
        topic("chat/"),
        refused("not_authorized", 0x87, "chat/carol/out/bob", "hello"),
        refused("not_authorized", 0x87, "chat/bob/out/alice", "hello"),
        refused("not_authorized", 0x87, "chat/carol/read/bob", "1"),
        refused("unknown_conversation", 0x83, "chat/alice/read/carol", "1"),
        refused("invalid_payload", 0x99, "chat/alice/read/bob", "one"),
        refused("invalid_payload", 0x99, "chat/alice/read/bob", "0"),
        refused("invalid_payload", 0x99, "chat/alice/read/bob", ""),
        refused("invalid_payload", 0x99, "chat/alice/typing/bob", "perhaps"),
        refused("invalid_topic", 0x90, "chat/alice/req/", "{}"),
        refused("self_message", 0x90, "chat/alice/out/alice", "hello"),
        to_bob("empty_text", 0x99, b""),
        // MQTT 5 has no 0x95 for a PUBACK; "quota exceeded" is its code for a limit of ours.
        to_bob("text_too_long", 0x97, &[b'x'; 16 * 1024 + 1]),
        to_bob("text_too_long", 0x97, &[b'x'; 256 * 1024]),
        to_bob("not_utf8", 0x99, b"caf\xe9"),
        to_bob("not_utf8", 0x99, b"\xff\xfe"),
        to_bob("not_utf8", 0x99, b"\xed\xa0\x80"),
        to_bob("not_utf8", 0x99, b"\xc0\x80"),
        Refused { told_id: Some("m-9"), ..refused("empty_text", 0x99, "chat/alice/out/bob/m-9", "") },
        Refused { told_id: Some("m-9"), ..refused("not_utf8", 0x99, "chat/alice/out/bob/m-9", [0xff]) },
        Refused { told_id: Some("m-9"), ..refused("self_message", 0x90, "chat/alice/out/alice/m-9", "x") },
    ]
}

async fn assert_event(client: &mut Client, case: &Refused) {
    let event = client.acked_message_on("chat/alice/event/error").await.unwrap();
    let event = event.json();
    assert_eq!(event["code"], case.code, "{event}");
    assert_eq!(event["topic"], case.topic.as_str(), "{event}");
    assert!(event["message"].as_str().is_some_and(|message| message.len() > 10), "a sentence that helps: {event}");
    if let Some(id) = case.told_id {
        assert_eq!(event["id"], id, "{event}");
    }
}

async fn every_refusal_is_told(version: Version) {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let mut alice = Connect::new(version, "alice", "alice-phone").to(&chatd).await.unwrap();
    alice.subscribe("chat/alice/event/error", 1).await.unwrap();
    for case in every_refusal().iter().filter(|case| version == Version::V5 || case.id.is_none()) {
        for qos in 0..=2 {
            let mut publish = Publish::new(case.topic.clone(), case.payload.clone(), qos);
            if let Some(id) = &case.id {
                publish.properties = Properties::none().with_user("id", id);
            }
            let packet_id = alice.start_publish(publish).await.unwrap();
            let what = format!("{} at QoS {qos}, {version:?}", case.topic);
            let ack = match qos {
                0 => None,
                1 => Some(alice.puback(packet_id).await.expect(&what)),
                _ => Some(alice.pubrec(packet_id).await.expect(&what)),
            };
            match (version, ack) {
                (Version::V5, Some(ack)) => {
                    assert_eq!((ack.code, ack.seq), (case.reason_code, None), "{what}: {ack:?}");
                    let reason = ack.reason.unwrap_or_default();
                    assert!(reason.starts_with(case.code), "{what}: {reason}");
                }
                // An acknowledgement that cannot say it, or none at all: the event does.
                (_, ack) => {
                    if qos == 2 && ack.is_some() {
                        alice.send_bytes(&end_to_end::packet::pubrel(packet_id)).await.unwrap();
                        alice.pubcomp(packet_id).await.expect(&what);
                    }
                    assert_event(&mut alice, case).await;
                }
            }
        }
    }
    // Told once, on the connection on which it all happened, which still serves.
    assert_eq!(alice.ping().await.unwrap(), []);
    alice.say("alice", "bob", "after all that").await.unwrap();
    assert_eq!(texts(&[bob.acked_message().await.unwrap()]), ["after all that"]);
    assert!(chatd.metric("chatd_refused_total").await.unwrap() >= 100.0);
    assert_well(&chatd).await;
}

#[tokio::test]
async fn every_refusal_in_mqtt_3_1_1_is_an_event() {
    every_refusal_is_told(Version::V4).await;
}

#[tokio::test]
async fn every_refusal_in_mqtt_5_is_a_reason() {
    every_refusal_is_told(Version::V5).await;
}

/// Publishes are acknowledged in their order, the refused ones among the stored ones.
#[tokio::test]
async fn acknowledgements_keep_the_order_of_the_publishes() {
    let chatd = Chatd::start().await.unwrap();
    for version in [Version::V4, Version::V5] {
        let mut alice = Connect::new(version, "alice", "alice-phone").to(&chatd).await.unwrap();
        let publishes = (0..300).map(|number| match number % 3 {
            0 => Publish::new("chat/alice/out/bob", "stored", 1),
            1 => Publish::new("chat/alice/out/bob", "", 1),
            _ => Publish::new("elsewhere", "ordinary", 1),
        });
        // Fails unless the PUBACKs come in order.
        let acks = alice.publish_all(publishes).await.unwrap();
        if version == Version::V5 {
            assert!(acks.iter().enumerate().all(|(number, ack)| (ack.code >= 0x80) == (number % 3 == 1)), "{acks:?}");
        }
    }
}

/// MQTT 3.1.1 has no Receive Maximum: a client may send as much as it likes before it reads an answer.
#[tokio::test]
async fn a_thousand_sends_in_one_write() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v4("alice", "alice-phone").to(&chatd).await.unwrap();
    let mut bytes = Vec::new();
    for packet_id in 1..=1_000 {
        let publish = Publish { packet_id, ..Publish::new("chat/alice/out/bob", format!("text {packet_id}"), 1) };
        bytes.extend(end_to_end::packet::publish(Version::V4, &publish));
    }
    alice.send_bytes(&bytes).await.unwrap();
    for expected in 1..=1_000 {
        let found = alice.take("PUBACK", |packet| match packet {
            Packet::Puback { packet_id, .. } => Some(*packet_id),
            _ => None,
        });
        assert_eq!(found.await.unwrap(), expected);
    }
    let mut bob = listener(&chatd, Connect::v4("bob", "bob-phone")).await.unwrap();
    let got = bob.acked_messages(1_000).await.unwrap();
    assert_eq!(texts(&got), (1..=1_000).map(|n| format!("text {n}")).collect::<Vec<_>>());
}

/// MQTT 5 has: whoever ignores it is told so [MQTT-3.3.4-9].
#[tokio::test]
async fn more_than_the_receive_maximum_is_a_violation() {
    let chatd = Chatd::start_with(Options::default().set("limits.receive_maximum", 5)).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    assert_eq!(alice.connack_properties().number(end_to_end::packet::id::RECEIVE_MAXIMUM), Some(5));
    // QoS 2 is under way until PUBREL and PUBCOMP, however fast the server is.
    for _ in 0..6 {
        alice.start_publish(Publish::new("chat/alice/out/bob", "hello", 2)).await.unwrap();
    }
    let answers = alice.until_closed().await.unwrap();
    assert!(matches!(answers.last(), Some(Packet::Disconnect { code: 0x93, .. })), "{answers:?}");
}

#[tokio::test]
async fn the_longest_text_is_a_setting() {
    let chatd = Chatd::start_with(Options::default().set("limits.message_bytes", 100)).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    assert!(alice.say("alice", "bob", &"x".repeat(100)).await.unwrap().code < 0x80);
    assert_eq!(alice.say("alice", "bob", &"x".repeat(101)).await.unwrap().code, 0x97);
    // Bytes are counted, not characters.
    assert_eq!(alice.say("alice", "bob", &"ü".repeat(51)).await.unwrap().code, 0x97);
    assert!(alice.say("alice", "bob", &"ü".repeat(50)).await.unwrap().code < 0x80);
}

#[tokio::test]
async fn foreign_filters_are_refused() {
    let chatd = Chatd::start().await.unwrap();
    let foreign = [
        "chat/#",
        "chat/+/inbox",
        "chat/bob/inbox",
        "chat/bob/#",
        "chat/+/#",
        "chat",
        "chat/alice",
        "chat/alice/out/bob",
        "chat/alice/+/error",
        "chat/alice/nonsense",
        "chat/alicex/inbox",
        "chat/ALICE/inbox",
    ];
    for version in [Version::V4, Version::V5] {
        let mut alice = Connect::new(version, "alice", "alice-phone").to(&chatd).await.unwrap();
        for filter in foreign {
            let (codes, properties) = alice.subscribe_codes(&[(filter, 1)]).await.unwrap();
            assert_eq!(codes, [if version == Version::V5 { 0x87 } else { 0x80 }], "{filter} in {version:?}");
            assert_eq!(properties.reason().is_some(), version == Version::V5, "{filter}: {properties:?}");
        }
        // Each filter of one SUBSCRIBE is judged by itself, in its place.
        let (codes, _) =
            alice.subscribe_codes(&[("chat/alice/inbox", 1), ("chat/bob/inbox", 1), ("weather", 0)]).await.unwrap();
        assert_eq!(codes, [1, if version == Version::V5 { 0x87 } else { 0x80 }, 0]);
        let mut bob = Connect::v5("bob", "bob-phone").to(&chatd).await.unwrap();
        bob.say("bob", "alice", "hello").await.unwrap();
        bob.say("bob", "carol", "not for alice").await.unwrap();
        assert_eq!(texts(&[alice.acked_message().await.unwrap()]), ["hello"]);
        assert_eq!(alice.ping().await.unwrap(), []);
        alice.leave().await.unwrap();
    }
}

#[tokio::test]
async fn shared_subscriptions_of_chat_are_refused() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    for filter in ["$share/g/chat/alice/inbox", "$share/g/chat/#", "$share/g/chat/bob/inbox"] {
        let (codes, _) = alice.subscribe_codes(&[(filter, 1)]).await.unwrap();
        assert!([0x87, 0x9e].contains(&codes[0]), "{filter}: {codes:02x?}");
    }
}

#[tokio::test]
async fn a_bad_user_name_is_refused_at_connect() {
    let chatd = Chatd::start().await.unwrap();
    let long = "x".repeat(65);
    for name in ["Alice", "-alice", "a b", "ålice", "", "alice/inbox", "+", "#", long.as_str()] {
        for version in [Version::V4, Version::V5] {
            for web_socket in [false, true] {
                let connect = Connect { web_socket, ..Connect::new(version, name, "device") };
                let mut client = connect.open(&chatd).await.unwrap();
                let answers = client.until_closed().await.unwrap();
                let [Packet::Connack { session_present: false, code, properties }] = &answers[..] else {
                    panic!("{name:?}: {answers:?}");
                };
                match version {
                    Version::V4 => assert!([4, 5].contains(code), "{name:?}: {code}"),
                    Version::V5 => {
                        assert!([0x86, 0x87].contains(code), "{name:?}: {code:#x}");
                        assert!(properties.reason().unwrap().contains("user"), "{name:?}: {properties:?}");
                    }
                }
            }
        }
    }
    // Neither a name nor a client identifier that could be one: a guest.
    for (version, client_id) in [(Version::V5, ""), (Version::V5, "Not A Name"), (Version::V4, "Not A Name")] {
        let mut guest = Connect { user_name: None, ..Connect::new(version, "", client_id) }.to(&chatd).await.unwrap();
        // Of everybody else's topics they get none.
        assert_eq!(guest.subscribe_codes(&[("chat/alice/inbox", 1)]).await.unwrap().0[0] & 0x80, 0x80);
    }
    // MQTT-3.1.3-8: no client identifier and a session that is to be kept.
    let nobody = Connect { clean_start: false, ..Connect::v4("alice", "") };
    let answers = nobody.open(&chatd).await.unwrap().until_closed().await.unwrap();
    assert!(matches!(answers[..], [Packet::Connack { code: 2, .. }]), "{answers:?}");
    assert_well(&chatd).await;
}

#[tokio::test]
async fn every_good_user_name_is_taken() {
    let chatd = Chatd::start().await.unwrap();
    let long = "x".repeat(64);
    for name in ["a", "0", "a-b_c", "9-", long.as_str()] {
        let mut client = listener(&chatd, Connect::v5(name, "device")).await.unwrap();
        assert!(client.say(name, "somebody", "hello").await.unwrap().code < 0x80);
    }
}

/// [MQTT-3.1.3-6], [MQTT-3.2.2-16]: who brings no client identifier is given one.
#[tokio::test]
async fn a_client_identifier_is_assigned() {
    let chatd = Chatd::start().await.unwrap();
    let client = Connect::v5("alice", "").to(&chatd).await.unwrap();
    let assigned = client.connack_properties().get(end_to_end::packet::id::ASSIGNED_CLIENT_ID);
    assert!(assigned.is_some(), "{:?}", client.connack_properties());
    Connect::v4("alice", "").to(&chatd).await.unwrap();
}
