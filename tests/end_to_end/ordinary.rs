//! Outside `chat/` it is ordinary MQTT.

use end_to_end::packet::{Packet, Properties, Publish, Value, Version, Will, id, subscribe};
use end_to_end::programs::{self, Subscriber};
use end_to_end::{Chatd, Client, Connect, PATIENCE, eventually};

use crate::chat::assert_well;

async fn connected(chatd: &Chatd, version: Version, name: &str) -> Client {
    Connect::new(version, name, name).to(chatd).await.unwrap()
}

/// The next message has this topic, text, QoS and RETAIN.
async fn assert_next(client: &mut Client, topic: &str, text: &str, qos: u8, retain: bool) {
    let got = client.acked_message().await.unwrap();
    assert_eq!((got.topic.as_str(), got.text(), got.qos, got.retain), (topic, text, qos, retain));
}

async fn nothing_more(client: &mut Client) {
    assert_eq!(client.ping().await.unwrap(), []);
}

fn retained(topic: &str, text: &str, qos: u8) -> Publish {
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
    let chatd = Chatd::start().await.unwrap();
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
