//! Outside `chat/` it is ordinary MQTT.

use end_to_end::packet::{self, Packet, Properties, Publish, Value, Version, Will, frame, id, subscribe};
use end_to_end::programs::{self, Subscriber};
use end_to_end::{Chatd, Client, Connect, Options, PATIENCE, eventually};

use crate::chat::assert_well;

const VERSIONS: [Version; 2] = [Version::V4, Version::V5];

pub(crate) async fn connected(chatd: &Chatd, version: Version, name: &str) -> Client {
    Connect::new(version, name, name).to(chatd).await.unwrap()
}

/// The next message has this topic, text, QoS and RETAIN.
pub(crate) async fn assert_next(client: &mut Client, topic: &str, text: &str, qos: u8, retain: bool) {
    let got = client.acked_message().await.unwrap();
    assert_eq!((got.topic.as_str(), got.text(), got.qos, got.retain), (topic, text, qos, retain));
}

pub(crate) async fn nothing_more(client: &mut Client) {
    assert_eq!(client.ping().await.unwrap(), []);
}

pub(crate) fn retained(topic: &str, text: &str, qos: u8) -> Publish {
    Publish { retain: true, ..Publish::new(topic, text, qos) }
}

#[tokio::test]
async fn every_qos_to_every_qos() {
    let chatd = Chatd::start().await.unwrap();
    for publisher_version in [Version::V4, Version::V5] {
        for subscriber_version in [Version::V4, Version::V5] {
            let mut publisher = connected(&chatd, publisher_version, "sensor").await;
            for granted in 0..=2 {
                let mut subscriber = connected(&chatd, subscriber_version, "screen").await;
                subscriber.subscribe("home/kitchen", granted).await.unwrap();
                for sent in 0..=2 {
                    let ack = publisher.publish(Publish::new("home/kitchen", "21.5", sent)).await.unwrap();
                    assert!(ack.code < 0x80);
                    assert_next(&mut subscriber, "home/kitchen", "21.5", sent.min(granted), false).await;
                }
                nothing_more(&mut subscriber).await;
            }
        }
    }
    assert_well(&chatd).await;
}

#[tokio::test]
async fn mosquitto_publishes_to_mosquitto() {
    let chatd = Chatd::start().await.unwrap();
    for version in ["mqttv311", "mqttv5"] {
        let listen = ["-V", version, "-u", "screen", "-q", "2", "-t", "home/#", "-F", "%t %q %r %p", "-d"];
        let mut screen = Subscriber::mosquitto(&chatd, &listen).unwrap();
        screen.subscribed().await.unwrap();
        for qos in ["0", "1", "2"] {
            let publish = ["-V", version, "-u", "sensor", "-q", qos, "-t", "home/kitchen", "-m", "21.5"];
            programs::mosquitto_pub(&chatd, &publish).await.unwrap();
            assert_eq!(screen.line().await.unwrap(), format!("home/kitchen {qos} 0 21.5"));
        }
    }
}

#[tokio::test]
async fn wildcards_match_what_the_specification_says() {
    let chatd = Chatd::start().await.unwrap();
    let topics = ["a", "a/b", "a/b/c", "a/", "/a", "/", "b/b", "ä/b", "$data"];
    let cases: [(&str, &[&str]); 12] = [
        ("#", &["a", "a/b", "a/b/c", "a/", "/a", "/", "b/b", "ä/b"]),
        ("+", &["a"]),
        ("+/+", &["a/b", "a/", "/a", "/", "b/b", "ä/b"]),
        ("a/#", &["a", "a/b", "a/b/c", "a/"]),
        ("a/+", &["a/b", "a/"]),
        ("+/b", &["a/b", "b/b", "ä/b"]),
        ("/+", &["/a", "/"]),
        ("+/b/#", &["a/b", "a/b/c", "b/b", "ä/b"]),
        ("a/b", &["a/b"]),
        ("a/+/c", &["a/b/c"]),
        ("ä/+", &["ä/b"]),
        ("A", &[]),
    ];
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    for (filter, expected) in cases {
        let mut subscriber = connected(&chatd, Version::V4, "subscriber").await;
        subscriber.subscribe(filter, 0).await.unwrap();
        subscriber.subscribe("the/end", 0).await.unwrap();
        for topic in topics.into_iter().chain(["the/end"]) {
            publisher.publish(Publish::new(topic, "x", 1)).await.unwrap();
        }
        let mut got = Vec::new();
        loop {
            let topic = subscriber.acked_message().await.unwrap().topic;
            if topic == "the/end" {
                break;
            }
            got.push(topic);
        }
        assert_eq!(got, expected, "{filter}");
    }
}

/// Filters outside `chat/` never see what is inside, wherever their wildcards are.
#[tokio::test]
async fn no_wildcard_sees_chat() {
    let chatd = Chatd::start().await.unwrap();
    let mut spy = connected(&chatd, Version::V5, "bob").await;
    for filter in ["#", "+/#", "+/+/inbox", "+/bob/inbox", "+/bob/#", "/#", "+/+/out/+", "+/+/event/+", "+/+/sent"] {
        spy.subscribe(filter, 1).await.unwrap();
    }
    let mut alice = connected(&chatd, Version::V4, "alice").await;
    alice.say("alice", "bob", "psst").await.unwrap();
    alice.publish(Publish::new("chat/alice/out/bob", "", 1)).await.unwrap();
    alice.publish(retained("chat/alice/out/bob", "retained?", 1)).await.unwrap();
    alice.publish(Publish::new("chats/alice/out/bob", "marker", 1)).await.unwrap();
    assert_next(&mut spy, "chats/alice/out/bob", "marker", 1, false).await;
    nothing_more(&mut spy).await;
    let mut late = connected(&chatd, Version::V4, "late").await;
    late.subscribe("#", 1).await.unwrap();
    nothing_more(&mut late).await;
}

#[tokio::test]
async fn retained_messages_wait_for_whoever_subscribes() {
    let chatd = Chatd::start().await.unwrap();
    let mut sensor = connected(&chatd, Version::V4, "sensor").await;
    let mut watching = connected(&chatd, Version::V5, "watching").await;
    watching.subscribe("home/+", 1).await.unwrap();
    for (topic, text, qos) in [("home/kitchen", "20", 0), ("home/kitchen", "21", 1), ("home/attic", "15", 2)] {
        sensor.publish(retained(topic, text, qos)).await.unwrap();
        // Who was there before gets it as a live message.
        assert_next(&mut watching, topic, text, qos.min(1), false).await;
    }
    sensor.publish(Publish::new("home/kitchen", "not retained", 1)).await.unwrap();
    for version in [Version::V4, Version::V5] {
        let mut screen = connected(&chatd, version, "screen").await;
        screen.subscribe("home/kitchen", 2).await.unwrap();
        assert_next(&mut screen, "home/kitchen", "21", 1, true).await;
        screen.subscribe("home/#", 0).await.unwrap();
        let mut got = [screen.acked_message().await.unwrap(), screen.acked_message().await.unwrap()]
            .map(|message| (message.topic.clone(), message.text().to_owned(), message.qos, message.retain));
        got.sort();
        let expected =
            [("home/attic", "15"), ("home/kitchen", "21")].map(|(t, p)| (t.to_owned(), p.to_owned(), 0, true));
        assert_eq!(got, expected);
        // [MQTT-3.3.1-10]: subscribing again sends them again.
        screen.subscribe("home/kitchen", 2).await.unwrap();
        assert_next(&mut screen, "home/kitchen", "21", 1, true).await;
        nothing_more(&mut screen).await;
    }
    // An empty one erases it [MQTT-3.3.1-6].
    sensor.publish(retained("home/kitchen", "", 1)).await.unwrap();
    let mut screen = connected(&chatd, Version::V5, "screen").await;
    screen.subscribe("home/+", 1).await.unwrap();
    assert_next(&mut screen, "home/attic", "15", 1, true).await;
    nothing_more(&mut screen).await;
}

#[tokio::test]
async fn thousands_of_retained_messages_all_come() {
    const TOPICS: usize = 2_000;
    let chatd = Chatd::start().await.unwrap();
    let mut sensor = connected(&chatd, Version::V5, "sensor").await;
    sensor.publish_all((0..TOPICS).map(|n| retained(&format!("many/{n}"), &n.to_string(), 1))).await.unwrap();
    let mut screen = connected(&chatd, Version::V4, "screen").await;
    screen.subscribe("many/+", 1).await.unwrap();
    let mut seen: Vec<usize> = Vec::new();
    for message in screen.acked_messages(TOPICS).await.unwrap() {
        assert!(message.retain);
        assert_eq!(message.topic, format!("many/{}", message.text()));
        seen.push(message.text().parse().unwrap());
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..TOPICS).collect::<Vec<_>>());
}

#[tokio::test]
async fn mqtt_5_subscription_options() {
    let chatd = Chatd::start().await.unwrap();
    let mut client = connected(&chatd, Version::V5, "client").await;
    client.publish(retained("options/old", "old", 1)).await.unwrap();
    const NO_LOCAL: u8 = 0x04;
    const RETAIN_AS_PUBLISHED: u8 = 0x08;
    const RETAINED_IF_NEW: u8 = 0x10;
    const RETAINED_NEVER: u8 = 0x20;

    let options = |qos: u8, options: u8| qos | options;
    client.subscribe_codes(&[("options/#", options(1, NO_LOCAL | RETAINED_NEVER))]).await.unwrap();
    client.publish(Publish::new("options/mine", "mine", 1)).await.unwrap();
    let mut other = connected(&chatd, Version::V4, "other").await;
    other.publish(Publish::new("options/other", "other", 1)).await.unwrap();
    assert_next(&mut client, "options/other", "other", 1, false).await;

    client.subscribe_codes(&[("options/#", options(1, RETAINED_IF_NEW | RETAIN_AS_PUBLISHED))]).await.unwrap();
    nothing_more(&mut client).await;
    other.publish(retained("options/other", "kept", 1)).await.unwrap();
    assert_next(&mut client, "options/other", "kept", 1, true).await;
    let mut fresh = connected(&chatd, Version::V5, "fresh").await;
    fresh.subscribe_codes(&[("options/old", options(1, RETAINED_IF_NEW))]).await.unwrap();
    assert_next(&mut fresh, "options/old", "old", 1, true).await;
}

#[tokio::test]
async fn mqtt_5_properties_travel_with_the_message() {
    let chatd = Chatd::start().await.unwrap();
    let mut asking = connected(&chatd, Version::V5, "asking").await;
    let mut answering = connected(&chatd, Version::V5, "answering").await;
    answering.subscribe("questions", 1).await.unwrap();
    let properties = Properties::none()
        .with(id::PAYLOAD_FORMAT, Value::Byte(1))
        .with(id::CONTENT_TYPE, Value::Text("text/plain".into()))
        .with(id::RESPONSE_TOPIC, Value::Text("answers".into()))
        .with(id::CORRELATION_DATA, Value::Binary(vec![0, 255, 7]))
        .with_user("b", "2")
        .with_user("a", "1")
        .with_user("b", "3");
    let question = Publish { properties: properties.clone(), ..Publish::new("questions", "why?", 1) };
    asking.publish(question).await.unwrap();
    let got = answering.acked_message().await.unwrap();
    for identifier in [id::PAYLOAD_FORMAT, id::CONTENT_TYPE, id::RESPONSE_TOPIC, id::CORRELATION_DATA] {
        assert_eq!(got.properties.get(identifier), properties.get(identifier), "{identifier:#x}");
    }
    let users = |properties: &Properties| -> Vec<Value> {
        properties.0.iter().filter(|(found, _)| *found == id::USER_PROPERTY).map(|(_, value)| value.clone()).collect()
    };
    assert_eq!(users(&got.properties), users(&properties), "in their order [MQTT-3.3.2-18]");
}

/// A topic alias of the client's is its own affair.
#[tokio::test]
async fn topic_aliases_of_a_publisher() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    let maximum = publisher.connack_properties().number(id::TOPIC_ALIAS_MAXIMUM).unwrap_or(0);
    if maximum == 0 {
        // The server allows none: then one is a violation, which hostile.rs looks at.
        return;
    }
    let mut subscriber = connected(&chatd, Version::V4, "subscriber").await;
    subscriber.subscribe("aliased/#", 1).await.unwrap();
    let aliased = |topic: &str, text: &str| Publish {
        properties: Properties::none().with(id::TOPIC_ALIAS, Value::U16(1)),
        ..Publish::new(topic, text, 1)
    };
    publisher.publish(aliased("aliased/one", "first")).await.unwrap();
    publisher.publish(aliased("", "second")).await.unwrap();
    publisher.publish(aliased("aliased/two", "third")).await.unwrap();
    publisher.publish(aliased("", "fourth")).await.unwrap();
    for (topic, text) in
        [("aliased/one", "first"), ("aliased/one", "second"), ("aliased/two", "third"), ("aliased/two", "fourth")]
    {
        assert_next(&mut subscriber, topic, text, 1, false).await;
    }
}

#[tokio::test]
async fn unsubscribing_ends_it() {
    let chatd = Chatd::start().await.unwrap();
    for version in [Version::V4, Version::V5] {
        let mut publisher = connected(&chatd, Version::V4, "publisher").await;
        let mut subscriber = connected(&chatd, version, "subscriber").await;
        for filter in ["one", "two", "wild/+"] {
            subscriber.subscribe(filter, 1).await.unwrap();
        }
        subscriber.unsubscribe("one").await.unwrap();
        subscriber.unsubscribe("wild/+").await.unwrap();
        let nothing = subscriber.unsubscribe("never/was").await.unwrap();
        assert_eq!(nothing, if version == Version::V5 { 0x11 } else { 0 });
        for topic in ["one", "wild/x", "two"] {
            publisher.publish(Publish::new(topic, topic, 1)).await.unwrap();
        }
        assert_next(&mut subscriber, "two", "two", 1, false).await;
        nothing_more(&mut subscriber).await;
    }
}

/// The same for my own branch of chat: what came meanwhile waits until I subscribe again.
#[tokio::test]
async fn unsubscribing_from_an_inbox_loses_nothing() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = connected(&chatd, Version::V5, "alice").await;
    let mut bob = Connect::v5("bob", "bob-phone").persistent().to(&chatd).await.unwrap();
    bob.subscribe("chat/bob/inbox", 1).await.unwrap();
    alice.say("alice", "bob", "one").await.unwrap();
    bob.acked_message().await.unwrap();
    assert_eq!(bob.unsubscribe("chat/bob/inbox").await.unwrap(), 0);
    alice.say("alice", "bob", "two").await.unwrap();
    nothing_more(&mut bob).await;
    bob.subscribe("chat/bob/inbox", 1).await.unwrap();
    assert_eq!(crate::chat::texts(&[bob.acked_message().await.unwrap()]), ["two"]);
    nothing_more(&mut bob).await;
}

#[tokio::test]
async fn overlapping_filters_deliver_once_at_the_highest_qos() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = connected(&chatd, Version::V4, "publisher").await;
    let mut subscriber = connected(&chatd, Version::V5, "subscriber").await;
    for (filter, qos) in [("a/+", 0), ("a/b", 2), ("#", 1)] {
        subscriber.subscribe(filter, qos).await.unwrap();
    }
    publisher.publish(Publish::new("a/b", "x", 2)).await.unwrap();
    assert_next(&mut subscriber, "a/b", "x", 2, false).await;
    nothing_more(&mut subscriber).await;
}

#[tokio::test]
async fn one_publishers_messages_keep_their_order() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    let mut subscriber = connected(&chatd, Version::V4, "subscriber").await;
    subscriber.subscribe("ordered/#", 1).await.unwrap();
    let publishes = (0..500).map(|n| Publish::new(format!("ordered/{}", n % 7), n.to_string(), 1));
    publisher.publish_all(publishes).await.unwrap();
    for n in 0..500 {
        assert_eq!(subscriber.acked_message().await.unwrap().text(), n.to_string());
    }
}

#[tokio::test]
async fn a_session_keeps_its_ordinary_subscriptions() {
    let mut chatd = Chatd::start().await.unwrap();
    let connect = Connect::v4("screen", "screen").persistent();
    let mut screen = connect.to(&chatd).await.unwrap();
    screen.subscribe("home/+", 1).await.unwrap();
    screen.leave().await.unwrap();
    for restart in [false, true] {
        if restart {
            chatd.kill9().await.unwrap();
            chatd.restart().await.unwrap();
        }
        let mut screen = connect.to(&chatd).await.unwrap();
        assert!(screen.session_present());
        let mut sensor = connected(&chatd, Version::V5, "sensor").await;
        sensor.publish(Publish::new("home/kitchen", "21", 1)).await.unwrap();
        assert_next(&mut screen, "home/kitchen", "21", 1, false).await;
        screen.leave().await.unwrap();
    }
}

fn will(topic: &str, qos: u8) -> Will {
    Will { topic: topic.to_owned(), payload: b"gone".to_vec(), qos, retain: true, ..Will::default() }
}

#[tokio::test]
async fn a_will_is_published_when_the_connection_breaks() {
    let chatd = Chatd::start().await.unwrap();
    let mut watching = connected(&chatd, Version::V5, "watching").await;
    watching.subscribe("wills/#", 2).await.unwrap();
    for version in [Version::V4, Version::V5] {
        for web_socket in [false, true] {
            for qos in 0..=2 {
                let connect = Connect { web_socket, ..Connect::new(version, "mortal", "mortal") };
                drop(connect.will(will("wills/mortal", qos)).to(&chatd).await.unwrap());
                assert_next(&mut watching, "wills/mortal", "gone", qos, false).await;
            }
        }
    }
    // It was to be retained, too.
    let mut late = connected(&chatd, Version::V4, "late").await;
    late.subscribe("wills/mortal", 2).await.unwrap();
    assert_next(&mut late, "wills/mortal", "gone", 2, true).await;

    // A violation, and a keep alive that was not kept, are no DISCONNECT either.
    let mut violating = Connect::v5("mortal", "mortal").will(will("wills/violating", 1)).to(&chatd).await.unwrap();
    violating.send_bytes(&[0, 0]).await.unwrap();
    assert_next(&mut watching, "wills/violating", "gone", 1, false).await;
    let silent = Connect::v4("mortal", "silent").keep_alive(1).will(will("wills/silent", 1)).to(&chatd).await.unwrap();
    assert_next(&mut watching, "wills/silent", "gone", 1, false).await;
    drop(silent);
}

#[tokio::test]
async fn a_will_is_not_published_when_the_client_says_goodbye() {
    let chatd = Chatd::start().await.unwrap();
    let mut watching = connected(&chatd, Version::V4, "watching").await;
    watching.subscribe("wills/#", 1).await.unwrap();
    for version in [Version::V4, Version::V5] {
        let polite = Connect::new(version, "polite", "polite").will(will("wills/polite", 1)).to(&chatd).await.unwrap();
        polite.leave().await.unwrap();
    }
    // [MQTT-3.14.4-3] and its exception: DISCONNECT with will.
    let mut dramatic = Connect::v5("dramatic", "dramatic").will(will("wills/dramatic", 1)).to(&chatd).await.unwrap();
    dramatic.send_bytes(&end_to_end::packet::disconnect(Version::V5, 0x04, &Properties::none())).await.unwrap();
    assert_next(&mut watching, "wills/dramatic", "gone", 1, false).await;
    nothing_more(&mut watching).await;
}

#[tokio::test]
async fn a_will_may_be_a_chat_message_of_ones_own() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = crate::chat::listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let mut last_words = will("chat/alice/out/bob", 1);
    last_words.retain = false;
    drop(Connect::v4("alice", "alice-phone").will(last_words).to(&chatd).await.unwrap());
    assert_eq!(crate::chat::texts(&[bob.acked_message().await.unwrap()]), ["gone"]);
    // Not of somebody else.
    let forged = Connect::v5("mallory", "m").will(will("chat/alice/out/bob", 1));
    if let Ok(client) = forged.to(&chatd).await {
        drop(client);
    }
    let mut alice = connected(&chatd, Version::V5, "alice").await;
    alice.say("alice", "bob", "it was me").await.unwrap();
    assert_eq!(crate::chat::texts(&[bob.acked_message().await.unwrap()]), ["it was me"]);
}

/// [MQTT-3.8.4-4]: the answer to SUBSCRIBE may come after the first message, but has one code a filter.
#[tokio::test]
async fn many_filters_in_one_subscribe() {
    let chatd = Chatd::start().await.unwrap();
    let mut client = connected(&chatd, Version::V5, "client").await;
    let filters: Vec<String> = (0..200).map(|n| format!("many/{n}/+")).collect();
    let filters: Vec<(&str, u8)> = filters.iter().map(|filter| (filter.as_str(), 2)).collect();
    assert_eq!(client.subscribe_codes(&filters).await.unwrap().0, [2; 200]);
    client.publish(Publish::new("many/137/x", "hello", 2)).await.unwrap();
    assert_next(&mut client, "many/137/x", "hello", 2, false).await;
    // The same filter twice in one packet counts as two subscriptions, of which the last stands.
    let twice = subscribe(Version::V5, 900, &Properties::none(), &[("twice", 0), ("twice", 1)]);
    client.send_bytes(&twice).await.unwrap();
    let codes = client.take("SUBACK", |packet| match packet {
        Packet::Suback { packet_id: 900, codes, .. } => Some(codes.clone()),
        _ => None,
    });
    assert_eq!(codes.await.unwrap(), [0, 1]);
    client.publish(Publish::new("twice", "once", 2)).await.unwrap();
    assert_next(&mut client, "twice", "once", 1, false).await;
    nothing_more(&mut client).await;
}

/// A subscriber that never reads holds up neither the publisher nor another subscriber.
#[tokio::test]
async fn a_subscriber_that_never_reads_holds_nobody_up() {
    let chatd = Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap();
    let mut stuck = connected(&chatd, Version::V4, "stuck").await;
    stuck.subscribe("flow/#", 0).await.unwrap();
    let mut reading = connected(&chatd, Version::V5, "reading").await;
    reading.subscribe("flow/#", 1).await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    let text = "x".repeat(10_000);
    // 20 MB: more than any buffer on the way to the one who is stuck.
    for n in 0..40 {
        publisher.publish_all((0..50).map(|m| Publish::new(format!("flow/{n}/{m}"), text.as_str(), 1))).await.unwrap();
        for m in 0..50 {
            assert_eq!(reading.acked_message().await.unwrap().topic, format!("flow/{n}/{m}"));
        }
    }
    eventually("what does not fit is counted", PATIENCE, async || {
        chatd
            .metrics()
            .await
            .unwrap()
            .get("chatd_refused_total{reason=\"queue_full\"}")
            .is_some_and(|count| *count > 0.0)
    })
    .await;
    assert_well(&chatd).await;
}

/// A connection with a session that outlives it and has nothing of an earlier one. In MQTT 3.1.1 a clean session is not kept: it takes two.
async fn begun(connect: &Connect, chatd: &Chatd) -> Client {
    connect.clone().clean().to(chatd).await.unwrap().leave().await.unwrap();
    connect.to(chatd).await.unwrap()
}

/// A PUBLISH at QoS 2 with this packet identifier, and DUP or not.
fn exactly_once(topic: &str, text: &str, packet_id: u16, dup: bool) -> Publish {
    Publish { packet_id, dup, ..Publish::new(topic, text, 2) }
}

/// [MQTT-4.4.0-1] (3.1.1 and 5): a client that comes back sends again what was not acknowledged, with its packet identifier; and
/// [MQTT-4.3.3-2] (5: [MQTT-4.3.3-10]): until it has seen the PUBREL the receiver acknowledges the same identifier with a PUBREC and does not
/// deliver the message again, across connections of one session.
#[tokio::test]
async fn qos_2_of_a_publisher_is_exactly_once_across_reconnects() {
    let chatd = Chatd::start().await.unwrap();
    for version in VERSIONS {
        let mut subscriber = connected(&chatd, Version::V5, "subscriber").await;
        subscriber.subscribe("exactly/once", 2).await.unwrap();
        let connect = Connect::new(version, "publisher", "publisher").persistent();
        let topic = "exactly/once";

        // The PUBREC is lost.
        let mut publisher = begun(&connect, &chatd).await;
        publisher.start_publish(exactly_once(topic, "one", 7, false)).await.unwrap();
        drop(publisher);
        let mut publisher = connect.to(&chatd).await.unwrap();
        assert!(publisher.session_present());
        for _ in 0..2 {
            publisher.start_publish(exactly_once(topic, "one", 7, true)).await.unwrap();
            assert!(publisher.pubrec(7).await.unwrap().code < 0x80);
        }
        drop(publisher);

        // It was seen, but the PUBREL is lost.
        let mut publisher = connect.to(&chatd).await.unwrap();
        publisher.start_publish(exactly_once(topic, "one", 7, true)).await.unwrap();
        assert!(publisher.pubrec(7).await.unwrap().code < 0x80);
        publisher.send_bytes(&packet::pubrel(7)).await.unwrap();
        drop(publisher);

        // The PUBCOMP is lost: 0x92 says that the receiver is done with it, too (3.7.2.1).
        let mut publisher = connect.to(&chatd).await.unwrap();
        publisher.send_bytes(&packet::pubrel(7)).await.unwrap();
        let code = publisher.pubcomp(7).await.unwrap();
        assert!(code == 0 || code == 0x92, "{code:#x}");

        // After PUBCOMP the identifier is free: with it goes a new message.
        publisher.publish(exactly_once(topic, "two", 7, false)).await.unwrap();
        assert_next(&mut subscriber, topic, "one", 2, false).await;
        assert_next(&mut subscriber, topic, "two", 2, false).await;
        nothing_more(&mut subscriber).await;
        publisher.leave().await.unwrap();
    }
    assert_well(&chatd).await;
}

/// [MQTT-3.1.2-6] (5: [MQTT-3.1.2-4]): a clean start forgets which identifiers wait for a PUBREL.
#[tokio::test]
async fn a_clean_start_forgets_what_was_not_released() {
    let chatd = Chatd::start().await.unwrap();
    for version in VERSIONS {
        let mut subscriber = connected(&chatd, Version::V4, "subscriber").await;
        subscriber.subscribe("forgotten", 2).await.unwrap();
        let connect = Connect::new(version, "publisher", "publisher").persistent();
        let mut publisher = begun(&connect, &chatd).await;
        publisher.start_publish(exactly_once("forgotten", "one", 7, false)).await.unwrap();
        publisher.pubrec(7).await.unwrap();
        drop(publisher);
        let mut publisher = connect.clean().to(&chatd).await.unwrap();
        assert!(!publisher.session_present());
        publisher.publish(exactly_once("forgotten", "two", 7, false)).await.unwrap();
        // Whether the first one is delivered before it is released is the server's choice (4.3.3, figure 4.3).
        let mut got = subscriber.acked_message().await.unwrap();
        if got.text() == "one" {
            got = subscriber.acked_message().await.unwrap();
        }
        assert_eq!(got.text(), "two");
        nothing_more(&mut subscriber).await;
    }
}

/// [MQTT-4.4.0-1]: the server sends unacknowledged PUBLISH and PUBREL again with their packet identifiers when a session goes on;
/// [MQTT-3.3.1-1]: with DUP=1; [MQTT-4.3.3-1] (5: [MQTT-4.3.3-5]): after PUBREC a PUBREL and no PUBLISH.
#[tokio::test]
async fn qos_2_to_a_subscriber_is_exactly_once_across_reconnects() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    for version in VERSIONS {
        let connect = Connect::new(version, "subscriber", "subscriber").persistent();
        let mut subscriber = begun(&connect, &chatd).await;
        subscriber.subscribe("exactly/once", 2).await.unwrap();
        publisher.publish(Publish::new("exactly/once", "one", 2)).await.unwrap();
        let first = subscriber.message().await.unwrap();
        assert_eq!((first.text(), first.qos, first.dup), ("one", 2, false));
        drop(subscriber);

        // It came, but no PUBREC did.
        let mut subscriber = connect.to(&chatd).await.unwrap();
        assert!(subscriber.session_present());
        let again = subscriber.message().await.unwrap();
        assert_eq!((again.text(), again.qos, again.dup), ("one", 2, true));
        assert_eq!(again.packet_id, first.packet_id);
        subscriber.send_bytes(&packet::pubrec(first.packet_id)).await.unwrap();
        subscriber.pubrel(first.packet_id).await.unwrap();
        drop(subscriber);

        // The PUBCOMP did not come.
        let mut subscriber = connect.to(&chatd).await.unwrap();
        subscriber.pubrel(first.packet_id).await.unwrap();
        nothing_more(&mut subscriber).await;
        subscriber.send_bytes(&packet::pubcomp(first.packet_id)).await.unwrap();
        nothing_more(&mut subscriber).await;
        drop(subscriber);

        let mut subscriber = connect.to(&chatd).await.unwrap();
        nothing_more(&mut subscriber).await;
        publisher.publish(Publish::new("exactly/once", "two", 2)).await.unwrap();
        assert_next(&mut subscriber, "exactly/once", "two", 2, false).await;
        subscriber.leave().await.unwrap();
    }
}

/// [MQTT-4.4.0-1], [MQTT-4.6.0-1]: what was not acknowledged comes again in its order; what was acknowledged does not.
#[tokio::test]
async fn qos_1_to_a_subscriber_comes_again_until_it_is_acknowledged() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    for version in VERSIONS {
        let connect = Connect::new(version, "subscriber", "subscriber").persistent();
        let mut subscriber = begun(&connect, &chatd).await;
        subscriber.subscribe("at/least/once", 1).await.unwrap();
        for text in ["a", "b", "c"] {
            publisher.publish(Publish::new("at/least/once", text, 1)).await.unwrap();
        }
        let mut first = Vec::new();
        for _ in 0..3 {
            first.push(subscriber.message().await.unwrap());
        }
        subscriber.acknowledge(&first[0]).await.unwrap();
        // The PUBACK is not lost: what follows it on the same connection is answered.
        nothing_more(&mut subscriber).await;
        drop(subscriber);
        let mut subscriber = connect.to(&chatd).await.unwrap();
        for (text, first) in ["b", "c"].into_iter().zip(&first[1..]) {
            let again = subscriber.acked_message().await.unwrap();
            assert_eq!((again.text(), again.dup, again.packet_id), (text, true, first.packet_id));
        }
        nothing_more(&mut subscriber).await;
        subscriber.leave().await.unwrap();
    }
}

/// [MQTT-3.3.1-3]: DUP is of each hop's own: what a publisher sends again reaches a subscriber with DUP=0.
#[tokio::test]
async fn dup_is_not_passed_on() {
    let chatd = Chatd::start().await.unwrap();
    for version in VERSIONS {
        let mut subscriber = connected(&chatd, version, "subscriber").await;
        subscriber.subscribe("again", 2).await.unwrap();
        let mut publisher = connected(&chatd, version, "publisher").await;
        for qos in [1, 2] {
            publisher.publish(Publish { dup: true, ..Publish::new("again", "x", qos) }).await.unwrap();
            let got = subscriber.acked_message().await.unwrap();
            assert_eq!((got.qos, got.dup), (qos, false));
        }
    }
}

/// 3.1.2.4 (5: 4.1.0-1): a session keeps the QoS 1 and 2 messages for a client that is away; in their order (4.6), with DUP=0 as they are
/// sent for the first time [MQTT-3.3.1-2], and RETAIN=0 as they match a subscription that was there [MQTT-3.3.1-9] (5: [MQTT-3.3.1-12]).
/// What the subscription makes QoS 0 is not kept here, which 4.1 leaves to the server.
#[tokio::test]
async fn an_absent_session_gets_what_came_meanwhile() {
    let chatd = Chatd::start().await.unwrap();
    for (version, prefix) in [(Version::V4, "four"), (Version::V5, "five")] {
        let [two, one, zero, end] = ["two", "one/x", "zero", "end"].map(|topic| format!("{prefix}/{topic}"));
        let connect = Connect::new(version, "absent", "absent").persistent();
        let mut absent = begun(&connect, &chatd).await;
        for (filter, qos) in [(&two, 2), (&format!("{prefix}/one/+"), 1), (&zero, 0)] {
            absent.subscribe(filter, qos).await.unwrap();
        }
        absent.leave().await.unwrap();
        // Somebody who is there: what they have got has passed by the one who is away.
        let mut there = connected(&chatd, Version::V5, "there").await;
        there.subscribe(&format!("{prefix}/#"), 2).await.unwrap();
        let mut publisher = connected(&chatd, version, "publisher").await;
        let mut expected = Vec::new();
        for round in 0..3 {
            for (topic, granted) in [(&two, 2), (&one, 1), (&zero, 0)] {
                for qos in 0..=2 {
                    let text = format!("{round} {topic} {qos}");
                    publisher
                        .publish(Publish { retain: round == 1, ..Publish::new(topic.as_str(), text.as_str(), qos) })
                        .await
                        .unwrap();
                    if qos.min(granted) > 0 {
                        expected.push((topic.clone(), text, qos.min(granted), false, false));
                    }
                }
            }
        }
        there.acked_messages(27).await.unwrap();
        let mut absent = connect.to(&chatd).await.unwrap();
        assert!(absent.session_present());
        let mut got = Vec::new();
        for message in absent.acked_messages(expected.len()).await.unwrap() {
            let text = message.text().to_owned();
            got.push((message.topic, text, message.qos, message.dup, message.retain));
        }
        assert_eq!(got, expected);
        nothing_more(&mut absent).await;
        // And it is there now.
        publisher.publish(Publish::new(two.as_str(), "live", 2)).await.unwrap();
        assert_next(&mut absent, &two, "live", 2, false).await;
        absent.leave().await.unwrap();

        // [MQTT-3.1.2-6] (5: [MQTT-3.1.2-4]): a clean start discards what waited, and the subscriptions.
        publisher.publish(Publish::new(two.as_str(), "nobody's", 2)).await.unwrap();
        let mut fresh = connect.clone().clean().to(&chatd).await.unwrap();
        assert!(!fresh.session_present());
        publisher.publish(Publish::new(two.as_str(), "nor this", 2)).await.unwrap();
        fresh.subscribe(&end, 1).await.unwrap();
        publisher.publish(Publish::new(end.as_str(), "end", 1)).await.unwrap();
        assert_next(&mut fresh, &end, "end", 1, false).await;
        nothing_more(&mut fresh).await;
        fresh.leave().await.unwrap();
    }
    assert_well(&chatd).await;
}

/// [MQTT-3.1.2-6]: a session of MQTT 3.1.1 with clean session 1 ends with its connection.
#[tokio::test]
async fn a_clean_session_leaves_nothing_behind() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = connected(&chatd, Version::V4, "publisher").await;
    let mut screen = Connect::v4("screen", "screen").to(&chatd).await.unwrap();
    screen.subscribe("home/+", 2).await.unwrap();
    screen.leave().await.unwrap();
    publisher.publish(Publish::new("home/attic", "15", 2)).await.unwrap();
    let mut screen = Connect::v4("screen", "screen").persistent().to(&chatd).await.unwrap();
    assert!(!screen.session_present());
    publisher.publish(Publish::new("home/attic", "16", 2)).await.unwrap();
    screen.subscribe("end", 1).await.unwrap();
    publisher.publish(Publish::new("end", "end", 1)).await.unwrap();
    assert_next(&mut screen, "end", "end", 1, false).await;
    nothing_more(&mut screen).await;
}

/// `limits.queue_messages`: when it is full, what comes is dropped and counted; what waits stays.
#[tokio::test]
async fn the_queue_of_an_absent_session_is_bounded() {
    const KEPT: usize = 10;
    let chatd = Chatd::start_with(Options::default().set("limits.queue_messages", KEPT)).await.unwrap();
    let dropped = async || {
        let metrics = chatd.metrics().await.unwrap();
        metrics.get("chatd_refused_total{reason=\"queue_full\"}").copied().unwrap_or(0.0)
    };
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    for version in VERSIONS {
        let before = dropped().await;
        let connect = Connect::new(version, "absent", "absent").persistent();
        let mut absent = begun(&connect, &chatd).await;
        absent.subscribe("full/#", 1).await.unwrap();
        absent.leave().await.unwrap();
        publisher.publish_all((0..KEPT + 5).map(|n| Publish::new("full/x", n.to_string(), 1))).await.unwrap();
        eventually("what is dropped is counted", PATIENCE, async || dropped().await - before >= 5.0).await;
        let mut absent = connect.to(&chatd).await.unwrap();
        for n in 0..KEPT {
            assert_next(&mut absent, "full/x", &n.to_string(), 1, false).await;
        }
        // There is room again.
        publisher.publish(Publish::new("full/x", "live", 1)).await.unwrap();
        assert_next(&mut absent, "full/x", "live", 1, false).await;
        assert!((dropped().await - before - 5.0).abs() < 0.5);
        absent.leave().await.unwrap();
    }
}

/// The subscriptions of a session are on disk, and what they match waits from the restart on; what waited before is in memory only.
#[tokio::test]
async fn a_session_that_was_absent_over_a_restart_misses_nothing_after_it() {
    let mut chatd = Chatd::start().await.unwrap();
    let connects = VERSIONS.map(|version| {
        let name = if version == Version::V5 { "five" } else { "four" };
        Connect::new(version, name, name).persistent()
    });
    for connect in &connects {
        let mut absent = connect.to(&chatd).await.unwrap();
        absent.subscribe("home/+", 1).await.unwrap();
        absent.leave().await.unwrap();
    }
    chatd.kill9().await.unwrap();
    chatd.restart().await.unwrap();
    let mut sensor = connected(&chatd, Version::V5, "sensor").await;
    for text in ["20", "21"] {
        sensor.publish(Publish::new("home/kitchen", text, 1)).await.unwrap();
    }
    for connect in &connects {
        let mut back = connect.to(&chatd).await.unwrap();
        assert!(back.session_present());
        assert_next(&mut back, "home/kitchen", "20", 1, false).await;
        assert_next(&mut back, "home/kitchen", "21", 1, false).await;
        nothing_more(&mut back).await;
    }
}

/// [MQTT-3.1.4-2] (5: [MQTT-3.1.4-3]): the server closes the connection that was there; that is no DISCONNECT, so its will is published
/// (3.1.2.5). The will of the new one is its own.
#[tokio::test]
async fn a_takeover_publishes_the_will_of_the_one_that_was_there() {
    let chatd = Chatd::start().await.unwrap();
    let mut watching = connected(&chatd, Version::V5, "watching").await;
    watching.subscribe("wills/#", 1).await.unwrap();
    for version in VERSIONS {
        for clean in [true, false] {
            let connect = |topic: &str| {
                let connect = Connect::new(version, "mortal", "mortal").will(will(topic, 1));
                if clean { connect } else { connect.persistent() }
            };
            let mut old = connect("wills/old").to(&chatd).await.unwrap();
            let new = connect("wills/new").to(&chatd).await.unwrap();
            assert_next(&mut watching, "wills/old", "gone", 1, false).await;
            let last = old.until_closed().await.unwrap();
            match version {
                Version::V4 => assert_eq!(last, []),
                Version::V5 => {
                    assert!(matches!(last[..], [Packet::Disconnect { code: 0x8e, .. }]), "{last:?}");
                }
            }
            new.leave().await.unwrap();
        }
    }
    nothing_more(&mut watching).await;
}

/// [MQTT-3.3.1-10], [MQTT-3.3.1-11] (5: [MQTT-3.3.1-6], [MQTT-3.3.1-7]): an empty retained message erases and is not kept itself, but goes to
/// whoever is there; [MQTT-3.3.1-12] (5: [MQTT-3.3.1-8]): a message that is not retained, empty or not, leaves the retained one alone.
#[tokio::test]
async fn only_an_empty_retained_message_erases() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = connected(&chatd, Version::V4, "publisher").await;
    for version in VERSIONS {
        publisher.publish(retained("kept", "value", 1)).await.unwrap();
        let mut there = connected(&chatd, version, "there").await;
        there.subscribe("kept", 1).await.unwrap();
        assert_next(&mut there, "kept", "value", 1, true).await;
        for text in ["", "other"] {
            publisher.publish(Publish::new("kept", text, 1)).await.unwrap();
            assert_next(&mut there, "kept", text, 1, false).await;
            let mut late = connected(&chatd, version, "late").await;
            late.subscribe("#", 1).await.unwrap();
            assert_next(&mut late, "kept", "value", 1, true).await;
            late.leave().await.unwrap();
        }
        for qos in 0..=2 {
            publisher.publish(retained("kept", "value", 1)).await.unwrap();
            assert_next(&mut there, "kept", "value", 1, false).await;
            publisher.publish(retained("kept", "", qos)).await.unwrap();
            assert_next(&mut there, "kept", "", qos.min(1), false).await;
            let mut late = connected(&chatd, version, "late").await;
            late.subscribe("kept", 1).await.unwrap();
            late.subscribe("#", 1).await.unwrap();
            nothing_more(&mut late).await;
            late.leave().await.unwrap();
        }
        there.leave().await.unwrap();
    }
}

/// [MQTT-3.10.4-3] (5: [MQTT-3.10.4-4]): a server that stops delivering completes what it has started to deliver.
#[tokio::test]
async fn unsubscribing_completes_what_was_begun() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    for version in VERSIONS {
        let connect = Connect::new(version, "subscriber", "subscriber").persistent();
        let mut subscriber = begun(&connect, &chatd).await;
        subscriber.subscribe("begun", 2).await.unwrap();
        publisher.publish(Publish::new("begun", "one", 1)).await.unwrap();
        publisher.publish(Publish::new("begun", "two", 2)).await.unwrap();
        let begun = [subscriber.message().await.unwrap(), subscriber.message().await.unwrap()];
        subscriber.unsubscribe("begun").await.unwrap();
        publisher.publish(Publish::new("begun", "three", 2)).await.unwrap();
        nothing_more(&mut subscriber).await;
        drop(subscriber);
        let mut subscriber = connect.to(&chatd).await.unwrap();
        for first in begun {
            let again = subscriber.acked_message().await.unwrap();
            assert_eq!((again.packet_id, again.text(), again.dup), (first.packet_id, first.text(), true));
        }
        nothing_more(&mut subscriber).await;
        subscriber.leave().await.unwrap();
    }
}

/// [MQTT-3.8.4-3]: subscribing again with the same filter replaces the subscription, and no message is lost by it.
#[tokio::test]
async fn subscribing_again_replaces_and_loses_nothing() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    for version in VERSIONS {
        let mut subscriber = connected(&chatd, version, "subscriber").await;
        for qos in [2, 0, 1] {
            subscriber.subscribe("replaced/+", qos).await.unwrap();
            publisher.publish(Publish::new("replaced/x", "x", 2)).await.unwrap();
            assert_next(&mut subscriber, "replaced/x", "x", qos, false).await;
        }
        subscriber.unsubscribe("replaced/+").await.unwrap();
        publisher.publish(Publish::new("replaced/x", "x", 2)).await.unwrap();
        nothing_more(&mut subscriber).await;
    }
}

/// [MQTT-4.7.2-1], and 4.7.2: a server should keep clients from topics of the form $…; a refusal is told (README).
#[tokio::test]
async fn dollar_topics_are_the_servers_own() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = connected(&chatd, Version::V5, "alice").await;
    for (topic, qos) in [("$SYS/broker/version", 1), ("$data", 2), ("$share/g/topic", 1)] {
        let ack = alice.publish(Publish::new(topic, "mine", qos)).await.unwrap();
        assert!(ack.code >= 0x80 && ack.reason.is_some(), "{topic}: {ack:?}");
    }
    let mut bob = connected(&chatd, Version::V4, "bob").await;
    bob.subscribe("chat/bob/event/error", 1).await.unwrap();
    bob.publish(Publish::new("$data", "mine", 1)).await.unwrap();
    let event = bob.acked_message_on("chat/bob/event/error").await.unwrap();
    assert_eq!(event.json()["topic"], "$data");
}

/// What no decent client sends in MQTT 3.1.1, and that a server answers by closing, without a word.
#[tokio::test]
async fn mqtt_3_1_1_malformed_packets_close_the_connection() {
    let chatd = Chatd::start().await.unwrap();
    let text = |text: &str| {
        let mut bytes = u16::try_from(text.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes
    };
    // [MQTT-1.5.3-2]: U+0000 in a string of any packet.
    let mut subscribe = vec![0, 9];
    subscribe.extend(text("nul\0/filter"));
    subscribe.push(0);
    let mut unsubscribe = vec![0, 9];
    unsubscribe.extend(text("nul\0/filter"));
    let mut publish = text("nul\0/topic");
    publish.extend([0, 9]);
    publish.extend(b"payload");
    for bytes in [frame(0x82, &subscribe), frame(0xa2, &unsubscribe), frame(0x32, &publish)] {
        let mut client = connected(&chatd, Version::V4, "client").await;
        client.send_bytes(&bytes).await.unwrap();
        let last = client.until_closed().await.unwrap_or_else(|error| panic!("{bytes:02x?}: {error:#}"));
        assert_eq!(last, [], "{bytes:02x?}");
    }
    // [MQTT-3.1.4-1]: a CONNECT that does not conform is answered by closing, and by no CONNACK.
    let connect = |flags: u8, parts: &[Vec<u8>]| {
        let mut body = text("MQTT");
        body.extend([4, flags, 0, 60]);
        body.extend(parts.concat());
        frame(0x10, &body)
    };
    for bytes in [
        // A will topic with U+0000, and one of no characters [MQTT-4.7.3-1].
        connect(0x06, &[text("client"), text("wills\0"), text("gone")]),
        connect(0x06, &[text("client"), text(""), text("gone")]),
        // The will flag without a will message [MQTT-3.1.2-9].
        connect(0x06, &[text("client"), text("wills/client")]),
        // A password without a user name [MQTT-3.1.2-22], the reserved flag [MQTT-3.1.2-3], will QoS 3 [MQTT-3.1.2-14].
        connect(0x42, &[text("client"), text("secret")]),
        connect(0x03, &[text("client")]),
        connect(0x1e, &[text("client"), text("wills/client"), text("gone")]),
        // Will QoS and retain without a will [MQTT-3.1.2-13], [MQTT-3.1.2-15].
        connect(0x0a, &[text("client")]),
        connect(0x22, &[text("client")]),
    ] {
        let mut client = Client::tcp(chatd.mqtt_addr(), Version::V4).await.unwrap();
        client.send_bytes(&bytes).await.unwrap();
        let last = client.until_closed().await.unwrap_or_else(|error| panic!("{bytes:02x?}: {error:#}"));
        assert_eq!(last, [], "{bytes:02x?}");
    }
    assert_well(&chatd).await;
}

/// [MQTT-3.1.3-5]: a server allows client identifiers of 1 to 23 characters from 0-9, a-z, A-Z, also of clients that name no user.
#[tokio::test]
async fn client_identifiers_of_letters_and_digits_are_let_in() {
    let chatd = Chatd::start().await.unwrap();
    for version in VERSIONS {
        for client_id in ["Z", "0", "ABCDEFGHIJKLMNOPQRSTUVW", "XYZabcdefghijklmnopqrst", "uvwxyz0123456789"] {
            let connect = Connect { user_name: None, ..Connect::new(version, "", client_id) };
            let mut client = connect.to(&chatd).await.unwrap();
            client.subscribe("hello/+", 0).await.unwrap();
            client.publish(Publish::new("hello/x", client_id, 0)).await.unwrap();
            assert_next(&mut client, "hello/x", client_id, 0, false).await;
        }
    }
}
