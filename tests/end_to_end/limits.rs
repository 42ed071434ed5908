//! Each limit at its edge: what is within it passes, what is beyond is answered as docs/limits.md says and counted, and then there is room
//! again. And one user's flood, which others do not feel.

use std::future::Future;
use std::time::{Duration, Instant};

use end_to_end::packet::{self, Packet, Properties, Publish, Version, Will, id};
use end_to_end::{Chatd, Client, Connect, Options, PATIENCE, eventually};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::chat::{assert_well, listener};

const QUOTA_EXCEEDED: u8 = 0x97;
/// CONNACK's code in MQTT 3.1.1.
const SERVER_UNAVAILABLE: u8 = 3;
const VERSIONS: [Version; 2] = [Version::V4, Version::V5];

async fn with(limit: &str, value: impl ToString) -> Chatd {
    Chatd::start_with(Options::default().set(&format!("limits.{limit}"), value)).await.unwrap()
}

/// A CONNECT that has to be refused because there are too many of something.
async fn assert_refused(chatd: &Chatd, connect: &Connect, setting: &str) {
    let mut client = connect.open(chatd).await.unwrap();
    let Some(Packet::Connack { code, properties, .. }) = client.receive().await.unwrap() else {
        panic!("{connect:?} was not answered with CONNACK");
    };
    match connect.version {
        Version::V4 => assert_eq!(code, SERVER_UNAVAILABLE),
        Version::V5 => {
            assert_eq!(code, QUOTA_EXCEEDED);
            assert!(properties.reason().is_some_and(|reason| !reason.is_empty()), "{setting}: no sentence");
        }
    }
    assert_eq!(client.until_closed().await.unwrap(), [], "a refused CONNECT is the end");
}

async fn assert_limited(chatd: &Chatd, limit: &str, times: f64) {
    assert_eq!(chatd.limited(limit).await.unwrap(), times, "{limit}");
}

/// Tries until there is room again.
async fn until<T>(mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(done) = attempt().await {
            return done;
        }
        assert!(Instant::now() < end, "there is no room again");
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
}

/// Until this connects.
async fn connected(chatd: &Chatd, connect: &Connect) -> Client {
    until(async || connect.to(chatd).await.ok()).await
}

/// A PUBACK's or PUBREC's code, or 0 for success with nobody there to receive it.
fn outcome(code: u8) -> u8 {
    if code == 0x10 { 0 } else { code }
}

fn padded(bytes: usize) -> Properties {
    let value = |bytes: usize| "x".repeat(bytes);
    Properties::none().with_user("k", &value(bytes))
}

fn many_properties(count: usize) -> Properties {
    (0..count).fold(Properties::none(), |properties, nth| properties.with_user("key", &nth.to_string()))
}

#[tokio::test]
async fn connections_of_one_address_over_tcp_and_websocket() {
    // The test asks for metrics from 127.0.0.1.
    let options = Options::default().set("limits.connections_per_address", 3);
    let chatd = Chatd::start_with(options.set("limits.uncounted_addresses", "127.0.0.1")).await.unwrap();
    let from = |address: &str, device: &str| Connect::v5("alice", device).coming_from(address);
    let _first = from("127.0.0.2", "first").to(&chatd).await.unwrap();
    let second = from("127.0.0.2", "second").to(&chatd).await.unwrap();
    let _web = from("127.0.0.2", "web").over_web_socket().to(&chatd).await.unwrap();
    let mut more = from("127.0.0.2", "more").open(&chatd).await.unwrap();
    assert_eq!(more.until_closed().await.unwrap(), [], "it is closed without an answer");
    assert!(from("127.0.0.2", "more").over_web_socket().open(&chatd).await.is_err());
    assert_limited(&chatd, "connections_per_address", 2.0).await;

    let _other = from("127.0.0.3", "other").to(&chatd).await.unwrap();
    let mut uncounted = Vec::new();
    for nth in 0..5 {
        uncounted.push(Connect::v4("bob", &format!("uncounted-{nth}")).to(&chatd).await.unwrap());
    }
    drop(second);
    let _again = connected(&chatd, &from("127.0.0.2", "again").over_web_socket()).await;
    assert!(
        from("127.0.0.2", "more").over_web_socket().open(&chatd).await.is_err(),
        "a WebSocket counts once, but it counts"
    );
}

#[tokio::test]
async fn connections_of_one_user() {
    let chatd = with("connections_per_user", 2).await;
    for version in VERSIONS {
        let before = chatd.limited("connections_per_user").await.unwrap();
        let alice = |device: &str| Connect::new(version, "alice", device);
        let first = alice("first").to(&chatd).await.unwrap();
        let _second = alice("second").over_web_socket().to(&chatd).await.unwrap();
        assert_refused(&chatd, &alice("third"), "connections_per_user").await;
        let taking_over = alice("first").to(&chatd).await.unwrap();
        drop(first);
        let _bob = Connect::new(version, "bob", "third").to(&chatd).await.unwrap();
        assert_refused(&chatd, &alice("third"), "connections_per_user").await;
        assert_limited(&chatd, "connections_per_user", before + 2.0).await;
        taking_over.leave().await.unwrap();
        connected(&chatd, &alice("third")).await.leave().await.unwrap();
        eventually("all have gone", PATIENCE, async || chatd.metric("chatd_connections").await.unwrap() <= 2.0).await;
    }
}

/// A CONNECT of exactly so many bytes.
fn connect_of(bytes: usize) -> Vec<u8> {
    let connect = |padding: usize| {
        let mut connect = Connect::v5("alice", "phone");
        connect.properties = padded(padding);
        connect.bytes()
    };
    let padding = bytes - connect(500).len() + 500;
    let bytes_of = connect(padding);
    assert_eq!(bytes_of.len(), bytes, "the lengths' own bytes changed");
    bytes_of
}

#[tokio::test]
async fn bytes_before_a_connect_is_accepted() {
    const MAX: usize = 2_000;
    let chatd = with("connect_bytes", MAX).await;
    let mut within = Client::tcp(chatd.mqtt_addr(), Version::V5).await.unwrap();
    let connect = connect_of(MAX);
    within.send_bytes(&connect[..MAX / 2]).await.unwrap();
    within.send_bytes(&connect[MAX / 2..]).await.unwrap();
    within.connack().await.unwrap();
    assert_limited(&chatd, "connect_bytes", 0.0).await;

    let mut beyond = Client::tcp(chatd.mqtt_addr(), Version::V5).await.unwrap();
    beyond.send_bytes(&connect_of(MAX + 1)).await.unwrap();
    assert_eq!(beyond.until_closed().await.unwrap(), []);
    // What is announced is enough: nothing of it has to come.
    let mut announced = Client::tcp(chatd.mqtt_addr(), Version::V5).await.unwrap();
    announced.send_bytes(&[0x10, 0xff, 0xff, 0xff, 0x7f]).await.unwrap();
    assert_eq!(announced.until_closed().await.unwrap(), []);
    assert_limited(&chatd, "connect_bytes", 2.0).await;

    // Whoever sends on without waiting for the answer loses nothing.
    let mut eager = Client::tcp(chatd.mqtt_addr(), Version::V4).await.unwrap();
    let mut bytes = Connect::v4("alice", "eager").bytes();
    for packet_id in 1..=100 {
        let publish = Publish::new("chat/alice/out/bob", "x".repeat(100), 1);
        bytes.extend(packet::publish(Version::V4, &Publish { packet_id, ..publish }));
    }
    assert!(bytes.len() > 5 * MAX);
    eager.send_bytes(&bytes).await.unwrap();
    eager.connack().await.unwrap();
    for packet_id in 1..=100 {
        assert_eq!(eager.puback(packet_id).await.unwrap().code, 0);
    }
    assert_limited(&chatd, "connect_bytes", 2.0).await;
}

#[tokio::test]
async fn user_properties_of_one_packet() {
    const MAX: usize = 64;
    let chatd = Chatd::start().await.unwrap();
    let connect = |count| {
        let mut connect = Connect::v5("alice", "phone");
        connect.properties = many_properties(count);
        connect
    };
    assert_refused(&chatd, &connect(MAX + 1), "user_properties").await;
    let mut alice = connect(MAX).to(&chatd).await.unwrap();
    alice.subscribe("chat/alice/event/error", 1).await.unwrap();
    for (topic, taken) in [("chat/alice/out/bob", "chat"), ("some/topic", "ordinary")] {
        for qos in [1, 2] {
            let publish = |count| {
                let publish = Publish::new(topic, "hello", qos);
                Publish { properties: many_properties(count), ..publish }
            };
            assert_eq!(outcome(alice.publish(publish(MAX)).await.unwrap().code), 0, "{taken}");
            let refused = alice.publish(publish(MAX + 1)).await.unwrap();
            assert_eq!(refused.code, QUOTA_EXCEEDED, "{taken}");
            assert!(refused.reason.unwrap().contains("64 user properties"));
        }
    }
    let silent = Publish { properties: many_properties(MAX + 1), ..Publish::new("chat/alice/out/bob", "hello", 0) };
    alice.publish(silent).await.unwrap();
    let event = alice.acked_message_on("chat/alice/event/error").await.unwrap().json();
    assert_eq!(event["code"], "quota_exceeded");
    for (count, code) in [(MAX, 1), (MAX + 1, QUOTA_EXCEEDED)] {
        let packet_id = alice.packet_id();
        let filters = [("chat/alice/inbox", 1)];
        alice.send_bytes(&packet::subscribe(Version::V5, packet_id, &many_properties(count), &filters)).await.unwrap();
        let codes = alice
            .take("SUBACK", |packet| match packet {
                Packet::Suback { codes, .. } => Some(codes.clone()),
                _ => None,
            })
            .await
            .unwrap();
        assert_eq!(codes, [code]);
    }
    assert_limited(&chatd, "user_properties", 7.0).await;
    // Nothing answers these with a refusal.
    alice.send_bytes(&packet::disconnect(Version::V5, 0, &many_properties(MAX + 1))).await.unwrap();
    let last = alice.until_closed().await.unwrap();
    assert!(matches!(last.last(), Some(Packet::Disconnect { code: QUOTA_EXCEEDED, .. })), "{last:?}");
    assert_limited(&chatd, "user_properties", 8.0).await;
    connect(MAX).to(&chatd).await.unwrap();
}

#[tokio::test]
async fn bytes_of_a_topic() {
    const MAX: usize = 1_024;
    let chatd = Chatd::start().await.unwrap();
    let topic = |bytes: usize| format!("t/{}", "x".repeat(bytes - 2));
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.subscribe(&topic(MAX), 1).await.unwrap();
    let (codes, properties) = alice.subscribe_codes(&[(&topic(MAX + 1), 1)]).await.unwrap();
    assert_eq!(codes, [0x8f], "{properties:?}");
    assert_eq!(outcome(alice.publish(Publish::new(topic(MAX), "hello", 1)).await.unwrap().code), 0);
    assert_eq!(alice.acked_message().await.unwrap().topic, topic(MAX));
    for qos in [1, 2] {
        assert_eq!(alice.publish(Publish::new(topic(MAX + 1), "hello", qos)).await.unwrap().code, 0x90);
    }
    let will = |bytes| Will { topic: topic(bytes), payload: b"gone".to_vec(), ..Will::default() };
    Connect::v4("alice", "mortal").will(will(MAX)).to(&chatd).await.unwrap().leave().await.unwrap();
    let mut refused = Connect::v5("alice", "mortal").will(will(MAX + 1)).open(&chatd).await.unwrap();
    assert!(matches!(refused.receive().await.unwrap(), Some(Packet::Connack { code, .. }) if code >= 0x80));
    assert_limited(&chatd, "topic_bytes", 4.0).await;

    let mut old = Connect::v4("bob", "phone").to(&chatd).await.unwrap();
    old.subscribe("chat/bob/event/error", 1).await.unwrap();
    assert_eq!(old.subscribe_codes(&[(&topic(MAX + 1), 1), ("fine", 0)]).await.unwrap().0, [0x80, 0]);
    old.publish(Publish::new(topic(MAX + 1), "hello", 1)).await.unwrap();
    assert_eq!(old.acked_message().await.unwrap().json()["code"], "invalid_topic");
}

#[tokio::test]
async fn different_filters_of_one_user() {
    let chatd = with("filters_per_user", 3).await;
    let mut phone = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    let mut laptop = Connect::v4("alice", "laptop").to(&chatd).await.unwrap();
    let granted = phone.subscribe_codes(&[("a/#", 1), ("b", 1), ("chat/alice/inbox", 1), ("a/#", 0)]).await.unwrap().0;
    assert_eq!(granted, [1, 1, 1, 0]);
    assert_eq!(laptop.subscribe_codes(&[("a/#", 1), ("c", 1), ("d", 1)]).await.unwrap().0, [1, 1, 0x80]);
    let (codes, properties) = phone.subscribe_codes(&[("d", 1), ("c", 1)]).await.unwrap();
    assert_eq!(codes, [QUOTA_EXCEEDED, 1]);
    assert!(properties.reason().unwrap().contains("3 different filters"), "{properties:?}");
    assert_limited(&chatd, "filters_per_user", 2.0).await;
    let mut bob = Connect::v5("bob", "phone").to(&chatd).await.unwrap();
    bob.subscribe("e", 1).await.unwrap();

    assert_eq!(phone.unsubscribe("c").await.unwrap(), 0);
    assert_eq!(phone.subscribe_codes(&[("d", 1)]).await.unwrap().0, [QUOTA_EXCEEDED], "the laptop still has c");
    laptop.leave().await.unwrap();
    until(async || phone.subscribe("d", 1).await.ok()).await;
    assert_eq!(phone.subscribe_codes(&[("e", 1)]).await.unwrap().0, [QUOTA_EXCEEDED]);
    assert_eq!(phone.unsubscribe("b").await.unwrap(), 0);
    phone.subscribe("e", 1).await.unwrap();
}

#[tokio::test]
async fn sessions_of_one_user() {
    let mut chatd = with("sessions_per_user", 2).await;
    let alice = |version, device: &str| Connect::new(version, "alice", device).persistent();
    let first = alice(Version::V5, "first").to(&chatd).await.unwrap();
    alice(Version::V4, "second").to(&chatd).await.unwrap().leave().await.unwrap();
    for version in VERSIONS {
        assert_refused(&chatd, &alice(version, "third"), "sessions_per_user").await;
    }
    assert_limited(&chatd, "sessions_per_user", 2.0).await;
    let second = alice(Version::V4, "second").to(&chatd).await.unwrap();
    assert!(second.session_present(), "what is there is resumed");
    second.leave().await.unwrap();
    Connect::v5("alice", "third").to(&chatd).await.unwrap().leave().await.unwrap();
    Connect::v5("bob", "third").persistent().to(&chatd).await.unwrap().leave().await.unwrap();
    // A clean start replaces its session, which is not one more.
    let mut clean = alice(Version::V5, "second");
    clean.clean_start = true;
    clean.to(&chatd).await.unwrap().leave().await.unwrap();
    first.leave().await.unwrap();

    // Sessions that were stored before count.
    assert!(chatd.terminate().await.unwrap().success());
    chatd.restart().await.unwrap();
    assert_refused(&chatd, &alice(Version::V5, "third"), "sessions_per_user").await;
    Connect::v4("alice", "second").to(&chatd).await.unwrap().leave().await.unwrap();
    connected(&chatd, &alice(Version::V5, "third")).await;
    assert_refused(&chatd, &alice(Version::V5, "fourth"), "sessions_per_user").await;

    // Nor do those count that have expired.
    let short = |device: &str| {
        let mut connect = Connect::v5("carol", device).session_expiry(1);
        connect.clean_start = false;
        connect
    };
    for device in ["first", "second"] {
        short(device).to(&chatd).await.unwrap().leave().await.unwrap();
    }
    assert_refused(&chatd, &short("third"), "sessions_per_user").await;
    // When they have expired.
    connected(&chatd, &short("third")).await;
}

async fn until_silence_ends_it(connect: Connect, chatd: &Chatd) -> (Duration, Vec<Packet>) {
    let mut client = connect.to(chatd).await.unwrap();
    let began = Instant::now();
    let packets = client.until_closed().await.unwrap();
    (began.elapsed(), packets)
}

#[tokio::test]
async fn keep_alive_and_silence() {
    let chatd = with("keep_alive_max_s", 60).await;
    for (asked, told) in [(0, Some(60)), (61, Some(60)), (u16::MAX, Some(60)), (60, None), (1, None)] {
        let client = Connect::v5("alice", "phone").keep_alive(asked).to(&chatd).await.unwrap();
        assert_eq!(client.connack_properties().number(id::SERVER_KEEP_ALIVE), told, "asked for {asked}");
        drop(client);
    }
    assert_limited(&chatd, "keep_alive_max_s", 3.0).await;

    let options = Options::default().set("limits.keep_alive_max_s", 1).set("limits.idle_timeout_ms", 400);
    let chatd = Chatd::start_with(options).await.unwrap();
    let (v5, v4) = tokio::join!(
        until_silence_ends_it(Connect::v5("alice", "phone"), &chatd),
        until_silence_ends_it(Connect::v4("alice", "old"), &chatd),
    );
    assert!(v5.0 >= Duration::from_millis(1_500), "one and a half times the keep alive that it was told: {v5:?}");
    assert!(matches!(v5.1.last(), Some(Packet::Disconnect { code: 0x8d, .. })), "{v5:?}");
    assert!(v4.0 >= Duration::from_millis(400) && v4.1.is_empty(), "{v4:?}");
    assert_limited(&chatd, "idle_timeout_ms", 1.0).await;
    // MQTT 3.1.1 keeps what it asked for.
    let mut asked = Connect::v4("alice", "old").keep_alive(600).to(&chatd).await.unwrap();
    asked.set_patience(Duration::from_millis(2_500));
    assert!(asked.receive().await.is_err(), "it is not closed");
}

/// So many QoS 1 publishes in one go; the codes of their PUBACKs.
async fn burst(client: &mut Client, version: Version, publishes: Vec<Publish>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut packet_ids = Vec::new();
    for mut publish in publishes {
        publish.packet_id = client.packet_id();
        packet_ids.push(publish.packet_id);
        bytes.extend(packet::publish(version, &publish));
    }
    client.send_bytes(&bytes).await.unwrap();
    let mut codes = Vec::new();
    for packet_id in packet_ids {
        codes.push(outcome(client.puback(packet_id).await.unwrap().code));
    }
    codes
}

fn texts(from: &str, to: &str, count: usize, bytes: usize) -> Vec<Publish> {
    let text = |nth: usize| format!("{nth:0>bytes$}");
    (0..count).map(|nth| Publish::new(format!("chat/{from}/out/{to}"), text(nth), 1)).collect()
}

#[tokio::test]
async fn publishes_a_second_of_mqtt_5() {
    let chatd = with("publishes_per_s", 20).await;
    let mut bob = listener(&chatd, Connect::v5("bob", "phone")).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    assert_eq!(alice.connack_properties().user("publishes_per_s"), Some("20"), "it can know before");
    let codes = burst(&mut alice, Version::V5, texts("alice", "bob", 35, 5)).await;
    let passed = codes.iter().filter(|code| **code == 0).count();
    assert!(codes[..20].iter().all(|code| *code == 0), "a second's worth may come at once: {codes:?}");
    assert!(codes[20..].contains(&QUOTA_EXCEEDED), "{codes:?}");
    assert_limited(&chatd, "publishes_per_s", (codes.len() - passed) as f64).await;
    let mut other = Connect::v5("alice", "laptop").to(&chatd).await.unwrap();
    assert_eq!(burst(&mut other, Version::V5, texts("alice", "bob", 1, 5)).await, [0], "another connection's rate");

    until(async || (alice.say("alice", "bob", "last").await.unwrap().code == 0).then_some(())).await;
    // What was refused was not stored: these are all.
    let mut got = 0;
    while bob.acked_message().await.unwrap().json()["text"] != "last" {
        got += 1;
    }
    assert_eq!(got, passed + 1);

    // QoS 0 cannot be refused in an answer: the user is told, but not every time.
    other.subscribe("chat/alice/event/error", 0).await.unwrap();
    let mut bytes = Vec::new();
    for publish in texts("alice", "bob", 35, 5) {
        bytes.extend(packet::publish(Version::V5, &Publish { qos: 0, ..publish }));
    }
    let began = Instant::now();
    alice.send_bytes(&bytes).await.unwrap();
    let event = other.acked_message().await.unwrap().json();
    assert_eq!(event["code"], "too_fast");
    assert!(event["message"].as_str().unwrap().contains("limits.publishes_per_s"), "{event}");
    alice.ping().await.unwrap();
    let events = 1 + other.ping().await.unwrap().len();
    assert!(events <= 1 + usize::try_from(began.elapsed().as_secs()).unwrap(), "{events} in {:?}", began.elapsed());
}

#[tokio::test]
async fn publishes_a_second_of_mqtt_3_1_1_wait_and_nothing_is_lost() {
    let chatd = with("publishes_per_s", 40).await;
    let mut bob = listener(&chatd, Connect::v4("bob", "phone")).await.unwrap();
    let mut alice = Connect::v4("alice", "phone").to(&chatd).await.unwrap();
    let began = Instant::now();
    let codes = burst(&mut alice, Version::V4, texts("alice", "bob", 100, 5)).await;
    let took = began.elapsed();
    assert_eq!(codes.len(), 100);
    assert!(took >= Duration::from_millis(1_450), "60 beyond the first 40 take a second and a half, and took {took:?}");
    for nth in 0..100 {
        assert_eq!(bob.acked_message().await.unwrap().json()["text"], format!("{nth:0>5}"));
    }
    // Each that waited.
    assert!(chatd.limited("publishes_per_s").await.unwrap() >= 30.0);
    assert_eq!(chatd.metric("chatd_refused_total").await.unwrap(), 0.0);

    // QoS 0 as well, although nobody waits for an answer.
    let mut bytes = Vec::new();
    for publish in texts("alice", "bob", 100, 5) {
        bytes.extend(packet::publish(Version::V4, &Publish { qos: 0, ..publish }));
    }
    alice.send_bytes(&bytes).await.unwrap();
    for nth in 0..100 {
        assert_eq!(bob.acked_message().await.unwrap().json()["text"], format!("{nth:0>5}"));
    }
}

#[tokio::test]
async fn bytes_a_second() {
    let chatd = with("publish_bytes_per_s", 10_000).await;
    let mut bob = listener(&chatd, Connect::v5("bob", "phone")).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    // More than a second's worth passes, though alone.
    assert_eq!(burst(&mut alice, Version::V5, texts("alice", "bob", 2, 16_000)).await, [0, QUOTA_EXCEEDED]);
    assert_limited(&chatd, "publish_bytes_per_s", 1.0).await;
    let third = texts("alice", "bob", 1, 3_000);
    until(async || (burst(&mut alice, Version::V5, third.clone()).await == [0]).then_some(())).await;
    assert_eq!(bob.acked_messages(2).await.unwrap().len(), 2);

    let mut old = Connect::v4("carol", "phone").to(&chatd).await.unwrap();
    let began = Instant::now();
    burst(&mut old, Version::V4, texts("carol", "bob", 5, 4_000)).await;
    assert!(began.elapsed() >= Duration::from_millis(950), "{:?}", began.elapsed());
    assert_eq!(bob.acked_messages(5).await.unwrap().len(), 5);
}

#[tokio::test]
async fn rates_of_one_user_over_all_connections() {
    let chatd = with("user_publishes_per_s", 20).await;
    let mut codes = Vec::new();
    for device in ["phone", "laptop", "tablet"] {
        let mut client = Connect::v5("alice", device).to(&chatd).await.unwrap();
        codes.extend(burst(&mut client, Version::V5, texts("alice", "bob", 12, 5)).await);
    }
    assert!(codes[..20].iter().all(|code| *code == 0), "{codes:?}");
    assert!(codes[20..].contains(&QUOTA_EXCEEDED), "{codes:?}");
    assert!(chatd.limited("user_publishes_per_s").await.unwrap() >= 1.0);
    let mut carol = Connect::v5("carol", "phone").to(&chatd).await.unwrap();
    assert_eq!(burst(&mut carol, Version::V5, texts("carol", "bob", 20, 5)).await, [0; 20]);

    let chatd = with("user_publish_bytes_per_s", 10_000).await;
    let mut codes = Vec::new();
    for device in ["phone", "laptop"] {
        let mut client = Connect::v5("alice", device).to(&chatd).await.unwrap();
        codes.extend(burst(&mut client, Version::V5, texts("alice", "bob", 1, 9_000)).await);
    }
    assert_eq!(codes, [0, QUOTA_EXCEEDED]);
    assert_limited(&chatd, "user_publish_bytes_per_s", 1.0).await;
}

#[tokio::test]
async fn connects_of_one_user_wait_for_their_turn() {
    // A tenth of it: 10 a second.
    let chatd = with("user_publishes_per_s", 100).await;
    let began = Instant::now();
    for version in [Version::V4, Version::V5].repeat(10) {
        Connect::new(version, "alice", "phone").to(&chatd).await.unwrap();
    }
    assert!(
        began.elapsed() >= Duration::from_millis(950),
        "10 beyond the first 10 take a second: {:?}",
        began.elapsed()
    );
    assert!(chatd.limited("user_publishes_per_s").await.unwrap() >= 5.0);
    let before = Instant::now();
    Connect::v5("bob", "phone").to(&chatd).await.unwrap();
    println!("another user connected after {:?}", before.elapsed());

    // Who would have to wait for longer than a second is refused.
    let mut many = Vec::new();
    for nth in 0..40 {
        many.push(Connect::v5("alice", &format!("device-{nth}")).open(&chatd).await.unwrap());
    }
    let mut codes = Vec::new();
    for mut client in many {
        match client.receive().await.unwrap() {
            Some(Packet::Connack { code, .. }) => codes.push(code),
            other => panic!("{other:?}"),
        }
    }
    assert!(codes.contains(&0) && codes.contains(&0x9f), "{codes:?}");
    assert!(codes.iter().all(|code| [0, 0x9f].contains(code)), "{codes:?}");
}

#[tokio::test]
async fn new_conversations_an_hour() {
    let chatd = with("new_conversations_per_hour", 3).await;
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    for peer in ["b", "c", "d"] {
        assert_eq!(outcome(alice.say("alice", peer, "hello").await.unwrap().code), 0);
    }
    let refused = alice.say_as("alice", "e", "one", "hello").await.unwrap();
    assert_eq!(refused.code, QUOTA_EXCEEDED);
    assert!(refused.reason.unwrap().starts_with("quota_exceeded: "));
    assert_limited(&chatd, "new_conversations_per_hour", 1.0).await;
    // Conversations that are there go on, answers never count, and others may begin.
    assert_eq!(outcome(alice.say("alice", "b", "again").await.unwrap().code), 0);
    let mut eve = Connect::v5("e", "phone").to(&chatd).await.unwrap();
    assert_eq!(eve.say("e", "alice", "hello").await.unwrap().code, 0);
    assert_eq!(alice.say_as("alice", "e", "one", "hello").await.unwrap().code, 0, "it is an answer now");

    let mut old = Connect::v4("old", "phone").to(&chatd).await.unwrap();
    old.subscribe("chat/old/event/error", 1).await.unwrap();
    for peer in ["b", "c", "d", "e"] {
        old.say("old", peer, "hello").await.unwrap();
    }
    let event = old.acked_message().await.unwrap().json();
    assert_eq!((&event["code"], &event["topic"]), (&"quota_exceeded".into(), &"chat/old/out/e".into()));
}

#[tokio::test]
async fn what_was_limited_before_is_counted_as_well() {
    let options = Options::default()
        .set("limits.subscriptions_per_session", 1)
        .set("limits.topic_levels", 5)
        .set("limits.session_expiry_max_s", 100)
        .set("limits.message_bytes", 10)
        .set("limits.packet_bytes", 70_000)
        .set("limits.retained_messages", 50)
        .set("limits.connect_timeout_ms", 300)
        .set("limits.receive_maximum", 2);
    let chatd = Chatd::start_with(options).await.unwrap();
    let mut silent = Client::tcp(chatd.mqtt_addr(), Version::V5).await.unwrap();
    assert_eq!(silent.until_closed().await.unwrap(), []);
    let mut alice = Connect::v5("alice", "phone").persistent().to(&chatd).await.unwrap();
    assert_eq!(alice.connack_properties().number(id::SESSION_EXPIRY), Some(100));
    let codes = alice.subscribe_codes(&[("a/b/c/d/e", 0), ("b", 0), ("a/b/c/d/e/f", 0)]).await.unwrap().0;
    assert_eq!(codes, [0, QUOTA_EXCEEDED, 0x8f]);
    assert_eq!(outcome(alice.say("alice", "bob", "0123456789").await.unwrap().code), 0);
    assert_eq!(alice.say("alice", "bob", "0123456789a").await.unwrap().code, QUOTA_EXCEEDED);
    // The server's own below $SYS take some of the room.
    let mut codes = Vec::new();
    while codes.last() != Some(&QUOTA_EXCEEDED) {
        let retained = Publish { retain: true, ..Publish::new(format!("topic/{}", codes.len()), "x", 1) };
        codes.push(outcome(alice.publish(retained).await.unwrap().code));
    }
    assert!(codes.len() > 1 && codes.len() <= 51, "{codes:?}");
    alice.send_bytes(&packet::frame(0x30, &[0; 70_000])).await.unwrap();
    assert!(matches!(alice.until_closed().await.unwrap().last(), Some(Packet::Disconnect { code: 0x95, .. })));
    for limit in [
        "connect_timeout_ms",
        "session_expiry_max_s",
        "subscriptions_per_session",
        "topic_levels",
        "message_bytes",
        "retained_messages",
        "packet_bytes",
    ] {
        assert_limited(&chatd, limit, 1.0).await;
    }
    let mut eager = Connect::v5("eager", "phone").to(&chatd).await.unwrap();
    let mut bytes = Vec::new();
    for packet_id in 1..=3 {
        let publish = Publish::new("some/topic", "x", 2);
        bytes.extend(packet::publish(Version::V5, &Publish { packet_id, ..publish }));
    }
    eager.send_bytes(&bytes).await.unwrap();
    assert!(matches!(eager.until_closed().await.unwrap().last(), Some(Packet::Disconnect { code: 0x93, .. })));
    assert_limited(&chatd, "receive_maximum", 1.0).await;
}

/// One user who does whatever costs a server most, as fast as the sockets take it, until told to stop.
struct Flood {
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Flood {
    async fn begin(chatd: &Chatd) -> Self {
        let (stop, stopping) = watch::channel(false);
        let mut flood = Self { stop, tasks: JoinSet::new() };
        for version in VERSIONS {
            for qos in [0, 1] {
                for (topic, bytes) in
                    [("chat/mallory/out/sink", 1), ("chat/mallory/out/sink", 16_000), ("flood", 1), ("flood", 500_000)]
                {
                    // What cannot be acknowledged in time is sent again and again under the same identifiers: nobody waits for anything.
                    let publishes = (1..=u16::try_from(1 + 20_000 / bytes).unwrap().min(60)).flat_map(|packet_id| {
                        let publish = Publish::new(topic, "x".repeat(bytes), qos);
                        packet::publish(version, &Publish { packet_id, ..publish })
                    });
                    flood.pour(chatd, version, publishes.collect(), &stopping).await;
                }
            }
            let subscribe = |packet_id| {
                let filters = ["flood/#", "flood/+/b", "+/c", "d"].map(|filter| (filter, 0));
                packet::subscribe(version, packet_id, &Properties::none(), &filters)
            };
            flood.pour(chatd, version, (1..=1_000).flat_map(subscribe).collect(), &stopping).await;
            flood.pour(chatd, version, packet::pingreq().repeat(10_000), &stopping).await;
            for _ in 0..2 {
                flood.come_and_go(chatd, version, &stopping);
            }
        }
        flood
    }

    /// Sends the same bytes over and over, and throws away what comes back. Connects again when it is closed.
    async fn pour(&mut self, chatd: &Chatd, version: Version, bytes: Vec<u8>, stopping: &watch::Receiver<bool>) {
        let connect = Connect::new(version, "mallory", &format!("pours-{}", self.tasks.len())).bytes();
        let address = chatd.mqtt_addr();
        self.until_stopped(stopping, async move {
            loop {
                let Ok(stream) = TcpStream::connect(address).await else { continue };
                let (mut read, mut write) = stream.into_split();
                let reading = async {
                    let mut buffer = vec![0; 64 * 1024];
                    while read.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
                };
                let writing = async {
                    let mut sent = write.write_all(&connect).await;
                    while sent.is_ok() {
                        sent = write.write_all(&bytes).await;
                    }
                };
                tokio::select! {
                    () = reading => {}
                    () = writing => {}
                }
            }
        });
    }

    fn come_and_go(&mut self, chatd: &Chatd, version: Version, stopping: &watch::Receiver<bool>) {
        let connect = Connect::new(version, "mallory", &format!("comes-{}", self.tasks.len())).bytes();
        let address = chatd.mqtt_addr();
        self.until_stopped(stopping, async move {
            loop {
                let Ok(mut stream) = TcpStream::connect(address).await else { continue };
                if stream.write_all(&connect).await.is_ok() {
                    drop(stream.read(&mut [0; 64]).await);
                }
            }
        });
    }

    fn until_stopped(&mut self, stopping: &watch::Receiver<bool>, doing: impl Future<Output = ()> + Send + 'static) {
        let mut stopping = stopping.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = doing => {}
                _ = stopping.wait_for(|stop| *stop) => {}
            }
        });
    }

    async fn end(mut self) {
        self.stop.send_replace(true);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
    }
}

/// From PUBLISH to delivery between two who have nothing to do with it, message after message; sorted.
async fn latencies(carol: &mut Client, dave: &mut Client, duration: Duration, sent: &mut usize) -> Vec<Duration> {
    let mut times = Vec::new();
    let began = Instant::now();
    while began.elapsed() < duration || times.len() < 200 {
        let text = sent.to_string();
        *sent += 1;
        let at = Instant::now();
        let packet_id = carol.start_publish(Publish::new("chat/carol/out/dave", text.as_str(), 1)).await.unwrap();
        let message = dave.acked_message().await.unwrap();
        times.push(at.elapsed());
        assert_eq!(message.json()["text"], text, "nothing is lost and nothing comes twice");
        assert_eq!(carol.puback(packet_id).await.unwrap().code, 0);
    }
    times.sort_unstable();
    times
}

fn p99(times: &[Duration]) -> Duration {
    times[times.len() * 99 / 100]
}

/// The flood has a runtime of its own: it is the server that has to be fair, not the test.
#[test]
fn one_users_flood_is_not_felt_by_others() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let chatd = runtime().block_on(Chatd::start()).unwrap();
    let chatd = &chatd;
    let (begin, begins) = watch::channel(None::<bool>);
    std::thread::scope(|scope| {
        let mut begins = begins.clone();
        scope.spawn(move || {
            runtime().block_on(async {
                begins.wait_for(Option::is_some).await.unwrap();
                let flood = Flood::begin(chatd).await;
                begins.wait_for(|begun| *begun == Some(false)).await.unwrap();
                flood.end().await;
            });
        });
        runtime().block_on(async {
            let mut carol = Connect::v5("carol", "phone").to(chatd).await.unwrap();
            let mut dave = listener(chatd, Connect::v4("dave", "phone")).await.unwrap();
            let mut sent = 0;
            let quiet = latencies(&mut carol, &mut dave, Duration::from_secs(2), &mut sent).await;
            begin.send_replace(Some(true));
            // Not until it is there, and everything bites that has to.
            eventually("the flood is held back", PATIENCE, async || {
                let metrics = chatd.metrics().await.unwrap();
                let bites = |limit| metrics.contains_key(&format!("chatd_limited_total{{limit=\"{limit}\"}}"));
                bites("user_publishes_per_s") && bites("user_publish_bytes_per_s") || bites("publishes_per_s")
            })
            .await;
            let flooded = latencies(&mut carol, &mut dave, Duration::from_secs(6), &mut sent).await;
            begin.send_replace(Some(false));
            println!(
                "p99 {:?} in quiet ({} messages), {:?} in the flood ({}); median {:?} and {:?}, slowest {:?}",
                p99(&quiet),
                quiet.len(),
                p99(&flooded),
                flooded.len(),
                quiet[quiet.len() / 2],
                flooded[flooded.len() / 2],
                flooded.last(),
            );
            // Two busy cores carry the flood's client as well.
            let bound = (p99(&quiet) * 10).max(Duration::from_millis(150));
            assert!(p99(&flooded) <= bound, "{:?} instead of {:?}", p99(&flooded), p99(&quiet));
            assert_well(chatd).await;
        });
    });
}

/// Whoever is refused again and again does not fill the log: a few lines a second and how many there were besides, and nothing for limits, which are counted.
#[tokio::test]
async fn refusals_do_not_fill_the_log() {
    const REFUSED: usize = 3_000;
    let chatd = with("connections_per_user", 1).await;
    let _first = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    let began = Instant::now();
    let refuse = async |connect: &Connect| {
        let mut client = connect.open(&chatd).await.unwrap();
        assert!(matches!(client.receive().await.unwrap(), Some(Packet::Connack { code: 0x80.., .. })));
    };
    let nobody = Connect::v5("No+Body", "phone");
    for _ in 0..REFUSED {
        refuse(&nobody).await;
    }
    let lines_of = |what: &str| -> Vec<Value> {
        let log = chatd.log().unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["message"].as_str().is_some_and(|text| text.contains(what))).collect()
    };
    // All of them are told in the end, when there is another line.
    let told = || {
        let left_out = lines_of("more refusals").iter().map(|line| line["left_out"].as_u64().unwrap()).sum::<u64>();
        usize::try_from(left_out).unwrap() + lines_of("refused a connect").len()
    };
    let until = Instant::now() + PATIENCE;
    let mut refused = REFUSED;
    loop {
        refuse(&nobody).await;
        refused += 1;
        if told() == refused {
            break;
        }
        assert!(Instant::now() < until, "{} told of {refused}", told());
    }
    let lines = lines_of("refused a connect").len();
    let lines_max = 5 * (usize::try_from(began.elapsed().as_secs()).unwrap() + 2);
    println!("{lines} lines for {refused} refusals in {:?}", began.elapsed());
    assert!(lines <= lines_max && lines_max < REFUSED / 2, "{lines} lines in {:?}", began.elapsed());
    assert_refused(&chatd, &Connect::v5("alice", "laptop"), "connections_per_user").await;
    assert_eq!(chatd.limited("connections_per_user").await.unwrap(), 1.0);
    let about_limits = lines_of("refused a connect").into_iter().filter(|line| line.to_string().contains("the most"));
    assert_eq!(about_limits.count(), 0);
}

/// Each SUBSCRIBE to presence is told how everybody is: whoever asks again and again is told as often as others have time for, and they notice nothing.
#[tokio::test]
async fn asking_for_presence_again_and_again_holds_nobody_up() {
    const PEERS: usize = 195;
    const TIMES: usize = 15_000;
    let chatd = Chatd::start().await.unwrap();
    let mut eve = Connect::v4("eve", "phone").to(&chatd).await.unwrap();
    let sends = (0..PEERS).map(|peer| Publish::new(format!("chat/eve/out/peer-{peer}"), "hi", 1));
    eve.publish_all(sends).await.unwrap();
    for peer in 0..PEERS {
        Connect::v4(&format!("peer-{peer}"), "phone").to(&chatd).await.unwrap().leave().await.unwrap();
    }
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.say("alice", "bob", "hello").await.unwrap();
    let filter = "chat/eve/event/presence";
    let again = [
        packet::subscribe(Version::V4, 1, &Properties::none(), &[(filter, 0)]),
        packet::unsubscribe(Version::V4, 2, &[filter]),
    ]
    .concat();
    let mut flood = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
    flood.write_all(&Connect::v4("eve", "laptop").bytes()).await.unwrap();
    let (mut answers, mut asks) = flood.into_split();
    // Whatever it is told is read and forgotten.
    let hearing = tokio::spawn(async move { tokio::io::copy(&mut answers, &mut tokio::io::sink()).await });
    let flooding = tokio::spawn(async move {
        for _ in 0..TIMES / 50 {
            asks.write_all(&again.repeat(50)).await.unwrap();
        }
        asks.write_all(&packet::disconnect(Version::V4, 0, &Properties::none())).await.unwrap();
        asks
    });
    let (mut longest, mut asked) = (Duration::ZERO, 0);
    while !hearing.is_finished() {
        let began = Instant::now();
        alice.say("alice", "bob", "hello").await.unwrap();
        longest = longest.max(began.elapsed());
        asked += 1;
    }
    drop(flooding.await.unwrap());
    println!("PUBACK after {longest:?} at most, of {asked}");
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    // And nothing of it is left to do: whoever asks now is told of everybody.
    eve.subscribe(filter, 0).await.unwrap();
    let mut told = std::collections::BTreeSet::new();
    while told.len() < PEERS {
        told.insert(eve.message().await.unwrap().json()["user"].to_string());
    }
}

/// A SUBSCRIBE with far more filters than a session may have is refused whole; with a few more, only those.
#[tokio::test]
async fn a_subscribe_has_an_end() {
    let chatd = with("subscriptions_per_session", 3).await;
    for version in VERSIONS {
        let refused = if version == Version::V5 { QUOTA_EXCEEDED } else { 0x80 };
        let mut alice = Connect::new(version, "alice", "phone").to(&chatd).await.unwrap();
        let names: Vec<String> = (0..1_001).map(|n| format!("f/{n}")).collect();
        let filters: Vec<(&str, u8)> = names.iter().map(|name| (name.as_str(), 0)).collect();
        let (codes, properties) = alice.subscribe_codes(&filters).await.unwrap();
        assert_eq!(codes, [refused; 1_001]);
        if version == Version::V5 {
            let reason = properties.reason().unwrap_or_default();
            assert!(reason.contains("at most 1000 filters"), "{reason}");
        }
        let mut expected = [refused; 1_000];
        expected[..3].fill(0);
        assert_eq!(alice.subscribe_codes(&filters[..1_000]).await.unwrap().0, expected);
        alice.leave().await.unwrap();
    }
}

/// Nobody has more to end than a session may have, and each filter is looked for among all of them.
#[tokio::test]
async fn an_unsubscribe_has_an_end() {
    let chatd = with("subscriptions_per_session", 3).await;
    let names: Vec<String> = (0..1_001).map(|n| format!("f/{n}")).collect();
    let filters: Vec<&str> = names.iter().map(String::as_str).collect();
    for version in VERSIONS {
        let mut alice = Connect::new(version, "alice", "phone").to(&chatd).await.unwrap();
        alice.subscribe("f/7", 0).await.unwrap();
        alice.send_bytes(&packet::unsubscribe(version, 7, &filters[..1_000])).await.unwrap();
        let ended = |packet: &Packet| matches!(packet, Packet::Unsuback { packet_id: 7, .. }).then_some(());
        alice.take("the UNSUBACK", ended).await.unwrap();
        alice.send_bytes(&packet::unsubscribe(version, 8, &filters)).await.unwrap();
        let packets = alice.until_closed().await.unwrap();
        match (version, packets.as_slice()) {
            (Version::V4, []) => {}
            (Version::V5, [Packet::Disconnect { code: QUOTA_EXCEEDED, properties }]) => {
                let reason = properties.reason().unwrap_or_default();
                assert!(reason.contains("at most 1000 filters"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
}
