//! The first message: what alice writes is what bob sees, with whatever client they have.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use end_to_end::packet::{Properties, Publish, Version};
use end_to_end::programs::{self, Subscriber};
use end_to_end::{Chatd, Client, Connect, PATIENCE, eventually};
use serde_json::Value;

use crate::chat::{listener, number, seqs, without_presence};

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis().try_into().unwrap()
}

/// The envelope of the protocol, byte for byte; only `at` is not known before.
fn assert_envelope(line: &str, seq: u64, id: Option<&str>, text: &str) {
    let at = number(&serde_json::from_str(line).expect(line), "at");
    assert!(at.abs_diff(now_ms()) < 60_000, "at is the server's clock in milliseconds: {line}");
    let id = id.map(|id| format!(r#""id":"{id}","#)).unwrap_or_default();
    assert_eq!(
        line,
        format!(
            r#"{{"v":1,"kind":"text","conversation":"alice:bob","seq":{seq},"from":"alice","to":"bob",{id}"at":{at},"text":"{text}"}}"#
        )
    );
}

/// A line of the greeting from this word on.
async fn printed(chatd: &Chatd, from: &str) -> String {
    eventually(&format!("{from} is printed"), PATIENCE, async || chatd.greeting().contains(from)).await;
    let greeting = chatd.greeting();
    let line = greeting.lines().find(|line| line.contains(from)).unwrap();
    line[line.find(from).unwrap()..].to_owned()
}

#[tokio::test]
async fn the_two_printed_lines_are_all_it_takes() {
    let chatd = Chatd::start().await.unwrap();
    assert!(chatd.greeting().contains(&format!("mqtt listening on {}", chatd.mqtt_addr())));
    assert!(chatd.greeting().contains(&format!("http listening on {}", chatd.http_addr())));
    let bob = printed(&chatd, "mosquitto_sub").await;
    let alice = printed(&chatd, "mosquitto_pub").await;
    let data = std::fs::canonicalize(chatd.data()).unwrap();
    assert!(chatd.greeting().contains(data.to_str().unwrap()), "where the messages lie: {}", chatd.greeting());

    let mut bob = Subscriber::shell(&bob).unwrap();
    for seq in 1..=2 {
        let output = programs::shell(&alice).await.unwrap();
        assert!(output.status.success(), "{alice}: {output:?}");
        assert_envelope(&bob.line().await.unwrap(), seq, None, "hello");
    }
}

#[tokio::test]
async fn mosquitto_as_in_the_protocol_in_both_versions() {
    let chatd = Chatd::start().await.unwrap();
    let mut seq = 0;
    for version in ["mqttv311", "mqttv5"] {
        let device = format!("bob-{version}");
        let bob = ["-V", version, "-u", "bob", "-P", "pw", "-i", &device, "-q", "1", "-t", "chat/bob/inbox"];
        let mut bob = Subscriber::mosquitto(&chatd, &bob).unwrap();
        for (id, text) in [(None, "hello"), (Some("m-001"), "grüße 👋")] {
            let id = id.map(|id| format!("{id}-{version}"));
            let topic = id.as_ref().map_or("chat/alice/out/bob".to_owned(), |id| format!("chat/alice/out/bob/{id}"));
            let alice = ["-V", version, "-u", "alice", "-P", "pw", "-q", "1", "-t", &topic, "-m", text];
            programs::mosquitto_pub(&chatd, &alice).await.unwrap();
            seq += 1;
            assert_envelope(&bob.line().await.unwrap(), seq, id.as_deref(), text);
        }
        bob.kill().await.unwrap();
    }
}

#[tokio::test]
async fn without_a_user_name_the_client_id_is_the_user() {
    let chatd = Chatd::start().await.unwrap();
    let nameless = |id: &str| Connect { user_name: None, ..Connect::v4("nobody", id) };
    let mut bob = nameless("bob").to(&chatd).await.unwrap();
    bob.subscribe("chat/bob/inbox", 1).await.unwrap();
    let mut alice = nameless("alice").to(&chatd).await.unwrap();
    alice.say("alice", "bob", "hello").await.unwrap();
    assert_envelope(bob.acked_message().await.unwrap().text(), 1, None, "hello");
}

async fn one_conversation(version: Version, web_socket: bool) {
    let chatd = Chatd::start().await.unwrap();
    let connect = |user: &str, device: &str| Connect { web_socket, ..Connect::new(version, user, device) };
    let mut bob = listener(&chatd, connect("bob", "bob-phone")).await.unwrap();
    let mut alice = connect("alice", "alice-phone").to(&chatd).await.unwrap();
    for (seq, qos) in [(1, 0), (2, 1), (3, 2)] {
        let id = format!("m-{qos}");
        let publish = Publish::new(format!("chat/alice/out/bob/{id}"), "hello", qos);
        let ack = alice.publish(publish).await.unwrap();
        let got = bob.acked_message().await.unwrap();
        assert_envelope(got.text(), seq, Some(&id), "hello");
        assert_eq!((got.topic.as_str(), got.qos, got.retain, got.dup), ("chat/bob/inbox", 1, false, false));
        if version == Version::V5 {
            for (key, value) in [("kind", "text"), ("seq", &seq.to_string()), ("from", "alice"), ("id", &id)] {
                assert_eq!(got.properties.user(key), Some(value));
            }
            if qos > 0 {
                assert_eq!((ack.code, ack.seq, ack.at), (0, Some(seq), Some(number(&got.json(), "at"))));
            }
        } else {
            assert_eq!(ack.code, 0);
        }
    }
    alice.leave().await.unwrap();
    bob.leave().await.unwrap();
}

#[tokio::test]
async fn raw_mqtt_3_1_1_over_tcp() {
    one_conversation(Version::V4, false).await;
}

#[tokio::test]
async fn raw_mqtt_5_over_tcp() {
    one_conversation(Version::V5, false).await;
}

#[tokio::test]
async fn raw_mqtt_3_1_1_over_web_socket() {
    one_conversation(Version::V4, true).await;
}

#[tokio::test]
async fn raw_mqtt_5_over_web_socket() {
    one_conversation(Version::V5, true).await;
}

/// MQTT-6.0.0-3: packets need not begin where WebSocket frames begin.
#[tokio::test]
async fn packets_may_be_spread_over_web_socket_frames() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let mut alice = Client::web_socket(chatd.http_addr(), Version::V5).await.unwrap();
    let mut bytes = Connect::v5("alice", "alice-web").bytes();
    for text in ["one", "two"] {
        bytes.extend(end_to_end::packet::publish(Version::V5, &Publish::new("chat/alice/out/bob", text, 0)));
    }
    for chunk in bytes.chunks(3) {
        alice.send_bytes(chunk).await.unwrap();
    }
    alice.connack().await.unwrap();
    assert_eq!(seqs(&bob.acked_messages(2).await.unwrap()), [1, 2]);
}

#[tokio::test]
async fn the_puback_says_whether_somebody_was_there() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    assert_eq!(alice.say("alice", "bob", "nobody there").await.unwrap().code, 0x10);
    let bob = listener(&chatd, Connect::v4("bob", "bob-phone")).await.unwrap();
    assert_eq!(alice.say("alice", "bob", "now he is").await.unwrap().code, 0x00);
    bob.leave().await.unwrap();
    assert_eq!(alice.say("alice", "bob", "gone again").await.unwrap().code, 0x10);
}

#[tokio::test]
async fn one_sequence_over_both_directions_and_one_for_each_conversation() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = listener(&chatd, Connect::v5("alice", "alice-phone")).await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let mut carol = Connect::v5("carol", "carol-phone").to(&chatd).await.unwrap();
    let mut before = 0;
    for seq in [1, 3, 5] {
        let ack = alice.say("alice", "bob", "from alice").await.unwrap();
        assert_eq!(ack.seq, Some(seq));
        let ack_bob = bob.say("bob", "alice", "from bob").await.unwrap();
        assert_eq!(ack_bob.seq, Some(seq + 1));
        assert!(before <= ack.at.unwrap() && ack.at <= ack_bob.at, "at never runs backwards");
        before = ack_bob.at.unwrap();
    }
    assert_eq!(carol.say("carol", "bob", "another conversation").await.unwrap().seq, Some(1));
    assert_eq!(seqs(&alice.acked_messages(3).await.unwrap()), [2, 4, 6]);
    let bobs = bob.acked_messages(4).await.unwrap();
    assert_eq!(seqs(&bobs), [1, 3, 5, 1]);
    assert_eq!(bobs[3].json()["conversation"], "bob:carol", "both names, in the order of the alphabet");
}

#[tokio::test]
async fn any_text_arrives_as_it_was_written() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let mut alice = Connect::v4("alice", "alice-phone").to(&chatd).await.unwrap();
    let long = "x".repeat(16 * 1024);
    let nasty = "\u{0}\u{1f}\"\\/\r\n\t\u{7f}\u{2028}\u{feff}\u{10ffff}".to_owned();
    let json = r#"{"v":1,"kind":"unsend","seq":1}"#.to_owned();
    for text in [nasty, json, "\u{1F468}\u{200D}\u{1F469}\u{200D}\u{1F467}".to_owned(), " ".to_owned(), long] {
        alice.say("alice", "bob", &text).await.unwrap();
        let got = bob.acked_message().await.unwrap();
        assert_eq!(got.json()["text"], text);
        assert!(!got.text().contains('\n'), "an envelope is one line, for those who read line by line");
    }
}

#[tokio::test]
async fn my_other_devices_see_what_i_sent() {
    let chatd = Chatd::start().await.unwrap();
    let mut laptop = Connect::v5("alice", "alice-laptop").to(&chatd).await.unwrap();
    laptop.subscribe("chat/alice/sent", 1).await.unwrap();
    let mut phone = Connect::v4("alice", "alice-phone").to(&chatd).await.unwrap();
    phone.subscribe("chat/alice/sent", 1).await.unwrap();
    for seq in 1..=3 {
        phone.say_as("alice", "bob", &format!("m-{seq}"), "hello").await.unwrap();
        for device in [&mut laptop, &mut phone] {
            let got = device.acked_message().await.unwrap();
            assert_eq!(got.topic, "chat/alice/sent");
            assert_envelope(got.text(), seq, Some(&format!("m-{seq}")), "hello");
        }
    }
}

#[tokio::test]
async fn the_wildcards_of_my_own_branch_mean_exactly_its_topics() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = Connect::v5("bob", "bob-phone").to(&chatd).await.unwrap();
    let mut all = Connect::v4("bob", "bob-all").to(&chatd).await.unwrap();
    all.subscribe("chat/bob/#", 1).await.unwrap();
    let mut one_level = Connect::v5("bob", "bob-plus").to(&chatd).await.unwrap();
    one_level.subscribe("chat/bob/+", 1).await.unwrap();
    let mut events = Connect::v5("bob", "bob-events").to(&chatd).await.unwrap();
    events.subscribe("chat/bob/event/+", 1).await.unwrap();

    let mut alice = Connect::v4("alice", "alice-phone").to(&chatd).await.unwrap();
    alice.say("alice", "bob", "to bob").await.unwrap();
    bob.say("bob", "alice", "from bob").await.unwrap();
    bob.publish(Publish::new("chat/bob/out/alice", "", 0)).await.unwrap();

    for device in [&mut all, &mut one_level] {
        device.acked_message_on("chat/bob/inbox").await.unwrap();
        device.acked_message_on("chat/bob/sent").await.unwrap();
    }
    for device in [&mut all, &mut events] {
        let event = device.acked_message_on("chat/bob/event/error").await.unwrap();
        assert_eq!(event.json()["code"], "empty_text");
    }
    for device in [&mut all, &mut one_level, &mut events] {
        assert_eq!(without_presence(device.ping().await.unwrap()), [], "and nothing else");
    }
}

#[tokio::test]
async fn overlapping_filters_deliver_once() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = Connect::v5("bob", "bob-phone").to(&chatd).await.unwrap();
    for filter in ["chat/bob/inbox", "chat/bob/#", "chat/bob/+", "chat/bob/inbox"] {
        bob.subscribe(filter, 1).await.unwrap();
    }
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    for text in ["one", "two", "three"] {
        alice.say("alice", "bob", text).await.unwrap();
    }
    for seq in 1..=3 {
        assert_eq!(seqs(&[bob.acked_message_on("chat/bob/inbox").await.unwrap()]), [seq]);
    }
    assert_eq!(without_presence(bob.ping().await.unwrap()), []);
}

/// QoS 2 is exactly once up to the server even if the client repeats its PUBLISH or its PUBREL.
#[tokio::test]
async fn a_repeated_qos_2_publish_is_one_message() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    for version in [Version::V4, Version::V5] {
        let mut alice = Connect::new(version, "alice", "alice-phone").to(&chatd).await.unwrap();
        let mut publish = Publish::new("chat/alice/out/bob", "once", 2);
        publish.packet_id = 900;
        alice.start_publish(publish.clone()).await.unwrap();
        assert!(alice.pubrec(900).await.unwrap().code < 0x80);
        publish.dup = true;
        alice.start_publish(publish).await.unwrap();
        assert!(alice.pubrec(900).await.unwrap().code < 0x80);
        for _ in 0..2 {
            alice.send_bytes(&end_to_end::packet::pubrel(900)).await.unwrap();
            alice.pubcomp(900).await.unwrap();
        }
        alice.say("alice", "bob", "the next").await.unwrap();
        let got = bob.acked_messages(2).await.unwrap();
        assert_eq!(crate::chat::texts(&got), ["once", "the next"]);
    }
}

fn assert_converse(printed: &str, version: u8) {
    let seen: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    assert_eq!(seen.len(), 3, "{printed}");
    let expected = [(None, "hello"), (Some("js-2"), "grüße 👋"), (Some("js-3"), "at QoS 2")];
    for ((message, (id, text)), seq) in seen.iter().zip(expected).zip(1..) {
        assert_eq!(
            (&message["topic"], &message["qos"], &message["retain"]),
            (&"chat/bob/inbox".into(), &1.into(), &false.into())
        );
        assert_envelope(message["envelope"].as_str().unwrap(), seq, id, text);
        match version {
            5 => assert_eq!(message["properties"]["seq"], seq.to_string()),
            _ => assert_eq!(message["properties"], Value::Null),
        }
    }
}

fn web_socket_url(chatd: &Chatd) -> String {
    format!("ws://{}/mqtt", chatd.http_addr())
}

#[tokio::test]
async fn mqtt_js_in_node() {
    for version in [4, 5] {
        let chatd = Chatd::start().await.unwrap();
        let printed = programs::node("chat.mjs", &[&web_socket_url(&chatd), &version.to_string()]).await.unwrap();
        assert_converse(&printed, version);
    }
}

#[tokio::test]
async fn mqtt_js_in_chromium() {
    let chromium = programs::chromium().unwrap();
    for version in [4, 5] {
        let chatd = Chatd::start().await.unwrap();
        let arguments = [chromium.to_str().unwrap(), &web_socket_url(&chatd), &version.to_string()];
        let printed = programs::node("browser.mjs", &arguments).await.unwrap();
        assert_converse(&printed, version);
    }
}

/// An id may be given as MQTT 5 user property, which leaves it out of the topic.
#[tokio::test]
async fn an_id_as_user_property() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = listener(&chatd, Connect::v4("bob", "bob-phone")).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    let mut publish = Publish::new("chat/alice/out/bob", "hello", 1);
    publish.properties = Properties::none().with_user("other", "thing").with_user("id", "m-77");
    assert_eq!(alice.publish(publish).await.unwrap().seq, Some(1));
    assert_envelope(bob.acked_message().await.unwrap().text(), 1, Some("m-77"), "hello");
}

/// Nothing is read from /metrics that the page did not have before: the time is not part of any assertion.
#[tokio::test]
async fn what_happened_is_counted() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    for text in ["one", "two"] {
        alice.say("alice", "bob", text).await.unwrap();
        bob.acked_message().await.unwrap();
    }
    alice.say("alice", "bob", "").await.unwrap();
    bob.ping().await.unwrap();
    let deadline = Duration::from_secs(10);
    for (name, value) in [
        ("chatd_connections", 2.0),
        ("chatd_messages_accepted_total", 2.0),
        ("chatd_messages_delivered_total", 2.0),
        ("chatd_refused_total", 1.0),
        ("chatd_publish_to_puback_seconds_count", 2.0),
        ("chatd_publish_to_delivery_seconds_count", 2.0),
    ] {
        eventually(&format!("{name} is {value}"), deadline, async || chatd.metric(name).await.unwrap() == value).await;
    }
    assert!(chatd.metric("chatd_commit_seconds_count").await.unwrap() >= 1.0);
    assert!(chatd.metrics().await.unwrap().contains_key("chatd_refused_total{reason=\"empty_text\"}"));
    bob.leave().await.unwrap();
    alice.leave().await.unwrap();
    eventually("nobody is connected", deadline, async || chatd.metric("chatd_connections").await.unwrap() == 0.0).await;
}
