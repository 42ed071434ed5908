//! What MQTT 5 adds to ordinary topics: each test says which clause of the specification it holds the server to.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use end_to_end::packet::{self, Packet, Properties, Publish, Value, Version, Will, id};
use end_to_end::{Chatd, Client, Connect, Options, PATIENCE, eventually};

use crate::chat::assert_well;
use crate::ordinary::{assert_next, connected, nothing_more, retained};

const NO_LOCAL: u8 = 0x04;
const RETAIN_AS_PUBLISHED: u8 = 0x08;
const RETAINED_IF_NEW: u8 = 0x10;
const RETAINED_NEVER: u8 = 0x20;

async fn five(chatd: &Chatd, name: &str) -> Client {
    connected(chatd, Version::V5, name).await
}

/// With a session that lasts so many seconds, taken up if it is there.
fn lasting(name: &str, seconds: u32) -> Connect {
    Connect { clean_start: false, ..Connect::v5(name, name).session_expiry(seconds) }
}

/// What expires has no event to be waited for.
async fn time_passes(time: Duration) {
    let end = Instant::now() + time;
    eventually("time passes", time + PATIENCE, async || Instant::now() >= end).await;
}

fn expiring(topic: &str, text: &str, seconds: u32) -> Publish {
    Publish {
        properties: Properties::none().with(id::MESSAGE_EXPIRY, Value::U32(seconds)),
        ..Publish::new(topic, text, 1)
    }
}

/// The code of the DISCONNECT with which the server closes.
async fn disconnected(mut client: Client) -> Option<u8> {
    disconnect_code(&client.until_closed().await.unwrap())
}

fn disconnect_code(packets: &[Packet]) -> Option<u8> {
    packets.iter().find_map(|packet| match packet {
        Packet::Disconnect { code, .. } => Some(*code),
        _ => None,
    })
}

/// A connection that the server has to close; it says why (4.13: it should).
async fn assert_violation(mut client: Client, what: &str) {
    let last = client.until_closed().await.unwrap_or_else(|error| panic!("{what}: {error:#}"));
    let code = disconnect_code(&last);
    assert!(code.is_some_and(|code| code >= 0x80), "{what}: {last:?}");
}

// ---- retained --------------------------------------------------------------------------------------------------------------

/// [MQTT-3.3.1-9], [MQTT-3.3.1-10], [MQTT-3.3.1-11]: retain handling 0 sends retained messages at each SUBSCRIBE, 1 if the subscription is
/// new, 2 never; 3.3.1.3: with RETAIN=1, whatever retain as published says.
#[tokio::test]
async fn retain_handling() {
    let chatd = Chatd::start().await.unwrap();
    five(&chatd, "sensor").await.publish(retained("handled", "kept", 1)).await.unwrap();
    for retain_as_published in [0, RETAIN_AS_PUBLISHED] {
        for (handling, when_new, when_there) in
            [(0, true, true), (RETAINED_IF_NEW, true, false), (RETAINED_NEVER, false, false)]
        {
            let options = 1 | handling | retain_as_published;
            let connect = lasting("screen", 600);
            let mut screen = connect.clone().clean().to(&chatd).await.unwrap();
            for expected in [when_new, when_there] {
                screen.subscribe_codes(&[("handled", options)]).await.unwrap();
                if expected {
                    assert_next(&mut screen, "handled", "kept", 1, true).await;
                }
                nothing_more(&mut screen).await;
            }
            screen.leave().await.unwrap();
            // A subscription that a session has kept is there already.
            let mut screen = connect.to(&chatd).await.unwrap();
            nothing_more(&mut screen).await;
            screen.subscribe_codes(&[("handled", options)]).await.unwrap();
            if when_there {
                assert_next(&mut screen, "handled", "kept", 1, true).await;
            }
            nothing_more(&mut screen).await;
            // And it is new again when it has been ended.
            screen.unsubscribe("handled").await.unwrap();
            screen.subscribe_codes(&[("handled", options)]).await.unwrap();
            if when_new {
                assert_next(&mut screen, "handled", "kept", 1, true).await;
            }
            nothing_more(&mut screen).await;
        }
    }
    // 3.8.3.1: retain handling 3 is a protocol error, and so are the reserved bits [MQTT-3.8.3-5].
    for options in [0x30, 0x40, 0x80, 0x03] {
        let mut client = five(&chatd, "client").await;
        let bytes = packet::subscribe(Version::V5, 9, &Properties::none(), &[("handled", options)]);
        client.send_bytes(&bytes).await.unwrap();
        assert_violation(client, &format!("options {options:#x}")).await;
    }
}

/// [MQTT-3.3.1-12], [MQTT-3.3.1-13]: retain as published.
#[tokio::test]
async fn retain_as_published() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    for (option, passed_on) in [(0, false), (RETAIN_AS_PUBLISHED, true)] {
        let connect = lasting("screen", 600);
        let mut screen = connect.clone().clean().to(&chatd).await.unwrap();
        screen.subscribe_codes(&[("published/+", 1 | option)]).await.unwrap();
        publisher.publish(retained("published/x", "retained", 1)).await.unwrap();
        assert_next(&mut screen, "published/x", "retained", 1, passed_on).await;
        publisher.publish(Publish::new("published/x", "live", 1)).await.unwrap();
        assert_next(&mut screen, "published/x", "live", 1, false).await;
        publisher.publish(retained("published/x", "", 1)).await.unwrap();
        assert_next(&mut screen, "published/x", "", 1, passed_on).await;
        // The same for what waits for an absent session.
        screen.leave().await.unwrap();
        publisher.publish(retained("published/x", "retained", 1)).await.unwrap();
        publisher.publish(Publish::new("published/x", "live", 1)).await.unwrap();
        let mut screen = connect.to(&chatd).await.unwrap();
        assert_next(&mut screen, "published/x", "retained", 1, passed_on).await;
        assert_next(&mut screen, "published/x", "live", 1, false).await;
        publisher.publish(retained("published/x", "", 1)).await.unwrap();
        screen.leave().await.unwrap();
    }
}

/// 3.8.4: a subscription is for what is published after it. A client that publishes and then subscribes does not get its own message as a
/// live one, which it had asked not to get as a retained one.
#[tokio::test]
async fn a_subscription_does_not_see_what_the_same_client_published_before() {
    let chatd = Chatd::start().await.unwrap();
    let mut client = five(&chatd, "client").await;
    for round in 0..50 {
        let topic = format!("before/{round}");
        let mut bytes = packet::publish(Version::V5, &retained(&topic, "before", 0));
        let filter = [(topic.as_str(), RETAINED_NEVER)];
        bytes.extend(packet::subscribe(Version::V5, 1_000 + round, &Properties::none(), &filter));
        let marker = format!("{topic}/end");
        bytes.extend(packet::subscribe(Version::V5, 2_000 + round, &Properties::none(), &[(marker.as_str(), 0)]));
        client.send_bytes(&bytes).await.unwrap();
        client.publish(Publish::new(marker.as_str(), "after", 1)).await.unwrap();
        assert_next(&mut client, &marker, "after", 0, false).await;
    }
}

// ---- wills -----------------------------------------------------------------------------------------------------------------

fn delayed_will(topic: &str, seconds: u32) -> Will {
    Will {
        topic: topic.to_owned(),
        payload: b"gone".to_vec(),
        qos: 1,
        retain: false,
        properties: Properties::none().with(id::WILL_DELAY, Value::U32(seconds)),
    }
}

/// [MQTT-3.1.2-8], 3.1.3.2.2: a will waits for its delay, or for the end of its session if that comes first.
#[tokio::test]
async fn a_will_waits_for_its_delay_or_for_the_end_of_its_session() {
    let chatd = Chatd::start().await.unwrap();
    let mut watching = five(&chatd, "watching").await;
    watching.subscribe("wills/#", 1).await.unwrap();
    // Session expiry, will delay, the least that has to pass.
    for (expiry_s, delay_s, least_s) in [(600, 2, 2), (2, 600, 2), (0, 600, 0), (600, 0, 0)] {
        let topic = format!("wills/{expiry_s}/{delay_s}");
        let client = lasting("mortal", expiry_s).clean().will(delayed_will(&topic, delay_s)).to(&chatd).await.unwrap();
        let began = Instant::now();
        drop(client);
        assert_next(&mut watching, &topic, "gone", 1, false).await;
        // Clocks tick: a little earlier is no matter.
        let least = Duration::from_secs(least_s).saturating_sub(Duration::from_millis(100));
        assert!(began.elapsed() >= least, "{topic} after {:?}", began.elapsed());
    }
    nothing_more(&mut watching).await;
}

/// [MQTT-3.1.3-9]: no will if the session goes on before the delay is over. Another will, with a longer delay, says when it would be.
#[tokio::test]
async fn a_will_is_not_published_when_the_session_goes_on_before_its_delay() {
    let chatd = Chatd::start().await.unwrap();
    let mut watching = five(&chatd, "watching").await;
    watching.subscribe("wills/#", 1).await.unwrap();
    let lucky = lasting("lucky", 600);
    drop(lucky.clone().will(delayed_will("wills/lucky", 1)).to(&chatd).await.unwrap());
    let back = lucky.to(&chatd).await.unwrap();
    assert!(back.session_present());
    drop(lasting("later", 600).will(delayed_will("wills/later", 2)).to(&chatd).await.unwrap());
    assert_next(&mut watching, "wills/later", "gone", 1, false).await;
    nothing_more(&mut watching).await;
}

/// 3.1.3.2.2: at a takeover the will of the connection that was there is sent, unless its delay is greater than zero and the new one goes on
/// with the session. With clean start 1 the session ends, and the delay with it.
#[tokio::test]
async fn a_takeover_and_a_delayed_will() {
    let chatd = Chatd::start().await.unwrap();
    let mut watching = five(&chatd, "watching").await;
    watching.subscribe("wills/#", 1).await.unwrap();
    let connect = lasting("mortal", 600);

    let first = connect.clone().will(delayed_will("wills/one", 600)).to(&chatd).await.unwrap();
    let second = connect.clone().will(delayed_will("wills/two", 600)).to(&chatd).await.unwrap();
    assert!(second.session_present());
    assert_eq!(disconnected(first).await, Some(0x8e));
    let third = connect.clone().clean().to(&chatd).await.unwrap();
    assert!(!third.session_present());
    assert_next(&mut watching, "wills/two", "gone", 1, false).await;
    assert_eq!(disconnected(second).await, Some(0x8e));
    nothing_more(&mut watching).await;

    // The same when the one that was there has gone already: a clean start ends the session that the will waits with.
    third.leave().await.unwrap();
    drop(connect.clone().will(delayed_will("wills/three", 600)).to(&chatd).await.unwrap());
    let fresh = connect.clean().to(&chatd).await.unwrap();
    assert!(!fresh.session_present());
    assert_next(&mut watching, "wills/three", "gone", 1, false).await;
    nothing_more(&mut watching).await;
}

/// [MQTT-3.14.4-3]: DISCONNECT 0x00 deletes the will, 3.14.2.1: 0x04 asks for it, and so does any error.
#[tokio::test]
async fn disconnecting_with_and_without_the_will() {
    let chatd = Chatd::start().await.unwrap();
    let mut watching = five(&chatd, "watching").await;
    watching.subscribe("wills/#", 1).await.unwrap();
    for (code, published) in [(0x00, false), (0x04, true), (0x80, true)] {
        for expiry_s in [0, 600] {
            let topic = format!("wills/{code}/{expiry_s}");
            let mut client =
                lasting("mortal", expiry_s).clean().will(delayed_will(&topic, 0)).to(&chatd).await.unwrap();
            client.disconnect(code, &Properties::none()).await.unwrap();
            if published {
                assert_next(&mut watching, &topic, "gone", 1, false).await;
            }
        }
    }
    nothing_more(&mut watching).await;
}

/// 3.1.3.2: the properties of a will are those of the message that it becomes, and the delay is not.
#[tokio::test]
async fn a_will_has_its_properties() {
    let chatd = Chatd::start().await.unwrap();
    let mut watching = five(&chatd, "watching").await;
    watching.subscribe("wills/#", 2).await.unwrap();
    let properties = Properties::none()
        .with(id::PAYLOAD_FORMAT, Value::Byte(1))
        .with(id::CONTENT_TYPE, Value::Text("text/plain".into()))
        .with(id::RESPONSE_TOPIC, Value::Text("condolences".into()))
        .with(id::CORRELATION_DATA, Value::Binary(vec![0, 255, 7]))
        .with_user("b", "2")
        .with_user("a", "1")
        .with_user("b", "3");
    let will = Will {
        properties: properties.clone().with(id::WILL_DELAY, Value::U32(0)).with(id::MESSAGE_EXPIRY, Value::U32(600)),
        retain: true,
        ..delayed_will("wills/rich", 0)
    };
    drop(Connect::v5("rich", "rich").will(will).to(&chatd).await.unwrap());
    let live = watching.acked_message().await.unwrap();
    let mut late = five(&chatd, "late").await;
    late.subscribe("wills/rich", 1).await.unwrap();
    for got in [live, late.acked_message().await.unwrap()] {
        assert_eq!(got.text(), "gone");
        assert_same_properties(&got.properties, &properties);
        assert_eq!(got.properties.get(id::WILL_DELAY), None);
        assert!(got.properties.number(id::MESSAGE_EXPIRY).is_some_and(|left| left <= 600), "{got:?}");
    }
}

/// 3.1.3.2.4: the expiry of a will begins when it is published, and then holds as for any message.
#[tokio::test]
async fn a_will_expires_as_a_message_does() {
    let chatd = Chatd::start().await.unwrap();
    let away = lasting("away", 600);
    let mut leaving = away.to(&chatd).await.unwrap();
    leaving.subscribe("wills/#", 1).await.unwrap();
    leaving.leave().await.unwrap();
    let mut watching = five(&chatd, "watching").await;
    watching.subscribe("wills/#", 1).await.unwrap();
    // The first is published later than it would last if that began with the connection.
    for (name, delay_s, expiry_s) in [("brief", 2, 1), ("long", 0, 600)] {
        let delayed = delayed_will(&format!("wills/{name}"), delay_s);
        let properties = delayed.properties.clone().with(id::MESSAGE_EXPIRY, Value::U32(expiry_s));
        let will = Will { retain: true, qos: 1, properties, ..delayed };
        drop(lasting(name, 600).clean().will(will).to(&chatd).await.unwrap());
        let got = watching.acked_message().await.unwrap();
        assert_eq!(got.topic, format!("wills/{name}"));
        let left = got.properties.number(id::MESSAGE_EXPIRY);
        assert!(left.is_some_and(|left| left <= expiry_s && left + 60 > expiry_s), "{left:?}");
    }
    time_passes(Duration::from_millis(1_500)).await;
    // Neither what waits for an absent session nor what is retained outlasts it.
    let mut back = away.to(&chatd).await.unwrap();
    let mut late = five(&chatd, "late").await;
    late.subscribe("wills/#", 1).await.unwrap();
    for client in [&mut back, &mut late] {
        let got = client.acked_message().await.unwrap();
        assert_eq!(got.topic, "wills/long");
        let left = got.properties.number(id::MESSAGE_EXPIRY);
        assert!(left.is_some_and(|left| (540..=599).contains(&left)), "{left:?}");
        nothing_more(client).await;
    }
}

/// What is handed on unaltered: [MQTT-3.3.2-4], -15, -16, -17, -18, -20.
fn assert_same_properties(got: &Properties, sent: &Properties) {
    for identifier in [id::PAYLOAD_FORMAT, id::CONTENT_TYPE, id::RESPONSE_TOPIC, id::CORRELATION_DATA] {
        assert_eq!(got.get(identifier), sent.get(identifier), "{identifier:#x}");
    }
    let users = |properties: &Properties| -> Vec<Value> {
        properties.0.iter().filter(|(found, _)| *found == id::USER_PROPERTY).map(|(_, value)| value.clone()).collect()
    };
    assert_eq!(users(got), users(sent), "in their order");
}

// ---- sessions --------------------------------------------------------------------------------------------------------------

/// [MQTT-3.1.2-4], [MQTT-3.1.2-5], [MQTT-3.2.2-2], [MQTT-3.2.2-3]: clean start and session present; 3.1.2.11.2: no session expiry is zero.
#[tokio::test]
async fn clean_start_and_session_expiry() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let connect = lasting("screen", 600);
    let ending = Connect { clean_start: false, ..Connect::v5("screen", "screen") };
    // How it came before, how it comes now, whether a session is there.
    let mut there = false;
    for (how, clean, kept) in [
        (&connect, false, true),
        (&connect, false, true),
        (&connect, true, true),
        (&connect, false, true),
        // Without an expiry it ends with this connection, though it began with one.
        (&ending, false, false),
        (&ending, false, false),
        (&connect, false, true),
    ] {
        let how = if clean { how.clone().clean() } else { how.clone() };
        let mut screen = how.to(&chatd).await.unwrap();
        assert_eq!(screen.session_present(), there && !clean, "{how:?}");
        let subscribed = screen.session_present();
        publisher.publish(Publish::new("home/x", "x", 1)).await.unwrap();
        if subscribed {
            assert_next(&mut screen, "home/x", "x", 1, false).await;
        }
        screen.subscribe("home/+", 1).await.unwrap();
        publisher.publish(Publish::new("home/y", "y", 1)).await.unwrap();
        assert_next(&mut screen, "home/y", "y", 1, false).await;
        nothing_more(&mut screen).await;
        screen.leave().await.unwrap();
        there = kept;
    }
}

/// 3.1.2.11.2: a session ends when its expiry has passed since the connection was closed. Its will, which waits for that, says when.
#[tokio::test]
async fn a_session_ends_at_its_expiry() {
    let chatd = Chatd::start().await.unwrap();
    let mut watching = five(&chatd, "watching").await;
    watching.subscribe("wills/#", 1).await.unwrap();
    let connect = lasting("brief", 1);
    let mut brief = connect.clone().will(delayed_will("wills/brief", 600)).to(&chatd).await.unwrap();
    brief.subscribe("home/+", 1).await.unwrap();
    drop(brief);
    watching.publish(Publish::new("home/x", "nobody's", 1)).await.unwrap();
    assert_next(&mut watching, "wills/brief", "gone", 1, false).await;
    let mut brief = connect.to(&chatd).await.unwrap();
    assert!(!brief.session_present());
    nothing_more(&mut brief).await;

    // While it is connected it does not end.
    time_passes(Duration::from_millis(1_500)).await;
    nothing_more(&mut brief).await;
    brief.leave().await.unwrap();
    assert!(connect.to(&chatd).await.unwrap().session_present());
}

/// 3.14.2.2.2: DISCONNECT may set another session expiry, unless it was zero: then that is a protocol error (0x82).
#[tokio::test]
async fn disconnect_changes_the_session_expiry() {
    let chatd = Chatd::start().await.unwrap();
    let expiry = |seconds| Properties::none().with(id::SESSION_EXPIRY, Value::U32(seconds));

    let mut ended = lasting("ended", 600).to(&chatd).await.unwrap();
    ended.disconnect(0, &expiry(0)).await.unwrap();
    assert!(!lasting("ended", 600).to(&chatd).await.unwrap().session_present());

    let mut prolonged = lasting("prolonged", 1).to(&chatd).await.unwrap();
    prolonged.disconnect(0, &expiry(600)).await.unwrap();
    time_passes(Duration::from_secs(2)).await;
    assert!(lasting("prolonged", 1).to(&chatd).await.unwrap().session_present());

    let mut greedy = lasting("greedy", 0).to(&chatd).await.unwrap();
    greedy.send_bytes(&packet::disconnect(Version::V5, 0, &expiry(600))).await.unwrap();
    assert_eq!(disconnected(greedy).await, Some(0x82));
    assert!(!lasting("greedy", 600).to(&chatd).await.unwrap().session_present());
}

/// 3.2.2.3.2: a server that uses another session expiry than the client asked for says so.
#[tokio::test]
async fn a_shorter_session_expiry_is_told() {
    let chatd = Chatd::start_with(Options::default().set("limits.session_expiry_max_s", 60)).await.unwrap();
    for (asked, told) in [(600, 60), (u32::MAX, 60)] {
        let client = lasting("client", asked).to(&chatd).await.unwrap();
        assert_eq!(client.connack_properties().number(id::SESSION_EXPIRY), Some(told));
    }
    let client = lasting("client", 30).to(&chatd).await.unwrap();
    let told = client.connack_properties().number(id::SESSION_EXPIRY);
    assert!(told.is_none_or(|told| told == 30), "{told:?}");
}

/// [MQTT-4.3.3-4] and 4.4: a PUBREC with an error ends the delivery: no PUBREL, and the message is not sent again.
#[tokio::test]
async fn a_receiver_that_refuses_is_not_asked_again() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let connect = lasting("picky", 600).receive_maximum(1);
    let mut picky = connect.to(&chatd).await.unwrap();
    picky.subscribe("refused", 2).await.unwrap();
    for qos in [2, 1] {
        for text in ["one", "two"] {
            publisher.publish(Publish::new("refused", text, qos)).await.unwrap();
        }
        let one = picky.message().await.unwrap();
        assert_eq!((one.text(), one.qos), ("one", qos));
        let refusal = if qos == 2 { packet::pubrec_with } else { packet::puback_with };
        picky.send_bytes(&refusal(one.packet_id, 0x80)).await.unwrap();
        // It takes part of the receive maximum no more [MQTT-4.9.0-1].
        assert_next(&mut picky, "refused", "two", qos, false).await;
        nothing_more(&mut picky).await;
        drop(picky);
        picky = connect.to(&chatd).await.unwrap();
        nothing_more(&mut picky).await;
    }
}

// ---- subscriptions ---------------------------------------------------------------------------------------------------------

/// [MQTT-3.3.4-2], [MQTT-3.3.4-4]: one copy at the highest QoS granted, with the identifiers of all that match.
#[tokio::test]
async fn overlapping_subscriptions_send_one_copy_with_all_identifiers() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let mut subscriber = five(&chatd, "subscriber").await;
    for (filter, qos, identifier) in [("a/+", 0, 1), ("a/b", 2, 268_435_455), ("#", 1, 300), ("c/#", 2, 4)] {
        subscriber.subscribe_identified(filter, qos, identifier).await.unwrap();
    }
    subscriber.subscribe("+/b", 2).await.unwrap();
    for (topic, qos, identifiers) in [
        ("a/b", 2, &[1, 300, 268_435_455][..]),
        ("a/c", 1, &[1, 300]),
        ("x/b", 2, &[300]),
        ("c", 2, &[4, 300]),
        ("d", 1, &[300]),
    ] {
        publisher.publish(Publish::new(topic, "x", 2)).await.unwrap();
        let got = subscriber.acked_message().await.unwrap();
        assert_eq!((got.topic.as_str(), got.qos), (topic, qos));
        assert_eq!(got.properties.subscription_identifiers(), identifiers, "{topic}");
    }
    nothing_more(&mut subscriber).await;
    // Only subscriptions that have one [MQTT-3.3.4-3].
    subscriber.unsubscribe("#").await.unwrap();
    publisher.publish(Publish::new("x/b", "x", 2)).await.unwrap();
    assert_eq!(subscriber.acked_message().await.unwrap().properties.subscription_identifiers(), Vec::<u32>::new());
}

/// 3.8.2.1.2, 3.8.4: an identifier is the subscription's, which another SUBSCRIBE replaces; retained messages have it; a session keeps it.
#[tokio::test]
async fn a_subscription_identifier_lasts_as_long_as_its_subscription() {
    let mut chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    publisher.publish(retained("kept/x", "x", 1)).await.unwrap();
    let connect = lasting("subscriber", 600);
    let mut subscriber = connect.to(&chatd).await.unwrap();
    assert_ne!(subscriber.connack_properties().number(id::SUBSCRIPTION_IDENTIFIERS_AVAILABLE), Some(0));
    let identifiers = async |client: &mut Client| {
        let got = client.acked_message().await.unwrap();
        assert_eq!(got.topic, "kept/x");
        got.properties.subscription_identifiers()
    };
    for identifier in [7, 8] {
        subscriber.subscribe_identified("kept/+", 1, identifier).await.unwrap();
        assert_eq!(identifiers(&mut subscriber).await, [identifier]);
    }
    publisher.publish(Publish::new("kept/x", "y", 1)).await.unwrap();
    assert_eq!(identifiers(&mut subscriber).await, [8]);
    // What waits for it has it, too.
    subscriber.leave().await.unwrap();
    publisher.publish(Publish::new("kept/x", "z", 1)).await.unwrap();
    let mut subscriber = connect.to(&chatd).await.unwrap();
    assert_eq!(identifiers(&mut subscriber).await, [8]);
    subscriber.leave().await.unwrap();
    chatd.kill9().await.unwrap();
    chatd.restart().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let mut subscriber = connect.to(&chatd).await.unwrap();
    publisher.publish(Publish::new("kept/x", "w", 1)).await.unwrap();
    assert_eq!(identifiers(&mut subscriber).await, [8]);
    // Replaced by one without.
    subscriber.subscribe("kept/+", 1).await.unwrap();
    publisher.publish(Publish::new("kept/x", "v", 1)).await.unwrap();
    assert_eq!(identifiers(&mut subscriber).await, Vec::<u32>::new());
}

/// The same for what is bound to a log: waiting messages and live ones, over a reconnect and over a restart.
#[tokio::test]
async fn chat_has_subscription_identifiers() {
    let mut chatd = Chatd::start().await.unwrap();
    let connect = Connect::v5("bob", "phone").persistent();
    let mut bob = connect.to(&chatd).await.unwrap();
    bob.subscribe_identified("chat/bob/inbox", 1, 9).await.unwrap();
    let mut said = 0;
    for restart in [false, true] {
        for away in [false, true] {
            if away {
                bob.disconnect(0, &Properties::none()).await.unwrap();
                if restart {
                    // Not killed: then what was acknowledged last might come again.
                    chatd.terminate().await.unwrap();
                    chatd.restart().await.unwrap();
                }
            }
            let mut alice = five(&chatd, "alice").await;
            said += 1;
            alice.say("alice", "bob", &format!("message {said}")).await.unwrap();
            if away {
                bob = connect.to(&chatd).await.unwrap();
            }
            let got = bob.acked_message_on("chat/bob/inbox").await.unwrap();
            assert_eq!(got.json()["text"], format!("message {said}"));
            assert_eq!(got.properties.subscription_identifiers(), [9], "restart {restart}, away {away}");
        }
    }
    // Several filters may stand for one topic.
    bob.subscribe_identified("chat/bob/#", 1, 10).await.unwrap();
    let mut alice = five(&chatd, "alice").await;
    alice.say("alice", "bob", "both").await.unwrap();
    let got = bob.acked_message_on("chat/bob/inbox").await.unwrap();
    assert_eq!((got.json()["text"].as_str(), got.properties.subscription_identifiers()), (Some("both"), vec![9, 10]));
}

/// 3.8.2.1.2: zero is a protocol error, and so are two of them; [MQTT-3.3.4-6]: a client's PUBLISH has none.
#[tokio::test]
async fn subscription_identifiers_that_are_protocol_errors() {
    let chatd = Chatd::start().await.unwrap();
    let one = |identifier| Properties::none().with(id::SUBSCRIPTION_IDENTIFIER, Value::Variable(identifier));
    let subscribe = |properties: &Properties| packet::subscribe(Version::V5, 9, properties, &[("a", 1)]);
    let publish = Publish { properties: one(1), packet_id: 9, ..Publish::new("a", "x", 1) };
    for bytes in [
        subscribe(&one(0)),
        subscribe(&one(1).with(id::SUBSCRIPTION_IDENTIFIER, Value::Variable(2))),
        packet::publish(Version::V5, &publish),
    ] {
        let mut client = five(&chatd, "client").await;
        client.send_bytes(&bytes).await.unwrap();
        assert_violation(client, &format!("{bytes:02x?}")).await;
    }
    assert_well(&chatd).await;
}

/// [MQTT-3.8.3-3]: no-local keeps a connection's own messages from it, and only those; by that subscription, and not by others.
#[tokio::test]
async fn no_local() {
    let chatd = Chatd::start().await.unwrap();
    let connect = lasting("client", 600);
    let mut client = connect.to(&chatd).await.unwrap();
    client.subscribe_codes(&[("local/+", 1 | NO_LOCAL)]).await.unwrap();
    // Of the same user, another client.
    let mut sibling = Connect::v5("client", "sibling").to(&chatd).await.unwrap();
    for resumed in [false, true] {
        if resumed {
            client.leave().await.unwrap();
            client = connect.to(&chatd).await.unwrap();
        }
        client.publish(Publish::new("local/x", "mine", 1)).await.unwrap();
        sibling.publish(Publish::new("local/x", "my sibling's", 1)).await.unwrap();
        assert_next(&mut client, "local/x", "my sibling's", 1, false).await;
    }
    client.subscribe_identified("#", 1, 5).await.unwrap();
    client.publish(Publish::new("local/x", "mine, by the other", 1)).await.unwrap();
    assert_next(&mut client, "local/x", "mine, by the other", 1, false).await;
    nothing_more(&mut client).await;
}

// ---- message expiry --------------------------------------------------------------------------------------------------------

/// [MQTT-3.3.2-5], [MQTT-3.3.2-6]: what has expired is not delivered any more; what has not says how much is left.
#[tokio::test]
async fn messages_expire_while_they_wait() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let five_away = lasting("five", 600);
    let four_away = Connect::v4("four", "four").persistent();
    for connect in [&five_away, &four_away] {
        let mut away = connect.to(&chatd).await.unwrap();
        away.subscribe("expiring/#", 2).await.unwrap();
        away.leave().await.unwrap();
    }
    let retaining = |publish: Publish| Publish { retain: true, ..publish };
    for publish in [
        expiring("expiring/a", "brief", 1),
        expiring("expiring/a", "long", 600),
        Publish::new("expiring/a", "for ever", 1),
        retaining(expiring("expiring/brief", "brief", 1)),
        retaining(expiring("expiring/long", "long", 600)),
        Publish { qos: 2, ..expiring("expiring/a", "brief", 1) },
    ] {
        publisher.publish(publish).await.unwrap();
    }
    // Whoever is there gets it with what is left, which is all or a second less.
    let mut there = five(&chatd, "there").await;
    there.subscribe("live", 1).await.unwrap();
    publisher.publish(expiring("live", "now", 600)).await.unwrap();
    let left = there.acked_message().await.unwrap().properties.number(id::MESSAGE_EXPIRY).unwrap();
    assert!((560..=600).contains(&left), "{left}");

    time_passes(Duration::from_millis(2_500)).await;
    for connect in [&five_away, &four_away] {
        let mut back = connect.to(&chatd).await.unwrap();
        assert!(back.session_present());
        for (topic, text) in [("expiring/a", "long"), ("expiring/a", "for ever"), ("expiring/long", "long")] {
            let got = back.acked_message().await.unwrap();
            assert_eq!((got.topic.as_str(), got.text()), (topic, text));
            let left = got.properties.number(id::MESSAGE_EXPIRY);
            if connect.version == Version::V5 && text == "long" {
                assert!(left.is_some_and(|left| (500..=598).contains(&left)), "{left:?}");
            } else {
                assert_eq!(left, None);
            }
        }
        nothing_more(&mut back).await;
    }
    let mut late = five(&chatd, "late").await;
    late.subscribe("expiring/brief", 1).await.unwrap();
    nothing_more(&mut late).await;
    late.subscribe("expiring/+", 1).await.unwrap();
    let got = late.acked_message().await.unwrap();
    assert_eq!((got.text(), got.retain), ("long", true));
    assert!(got.properties.number(id::MESSAGE_EXPIRY).is_some_and(|left| (500..=598).contains(&left)), "{got:?}");
    nothing_more(&mut late).await;
}

/// The same for a client that is there but does not acknowledge: what it was sent stays sent, what waits behind it expires.
#[tokio::test]
async fn messages_expire_behind_a_full_window() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let mut slow = Connect::v5("slow", "slow").receive_maximum(1).to(&chatd).await.unwrap();
    slow.subscribe("expiring", 1).await.unwrap();
    for (text, seconds) in [("sent", 1), ("brief", 1), ("long", 600)] {
        publisher.publish(expiring("expiring", text, seconds)).await.unwrap();
    }
    let sent = slow.message().await.unwrap();
    assert_eq!(sent.text(), "sent");
    time_passes(Duration::from_millis(2_500)).await;
    slow.acknowledge(&sent).await.unwrap();
    let got = slow.acked_message().await.unwrap();
    assert_eq!(got.text(), "long");
    assert!(got.properties.number(id::MESSAGE_EXPIRY).is_some_and(|left| left <= 598), "{got:?}");
    nothing_more(&mut slow).await;
}

// ---- topic aliases ---------------------------------------------------------------------------------------------------------

/// Reads a topic as a client does that keeps the server's aliases.
struct Aliases {
    maximum: u32,
    topics: BTreeMap<u32, String>,
    /// Messages that came with an alias and without a topic.
    spared: usize,
}

impl Aliases {
    fn new(maximum: u32) -> Self {
        Self { maximum, topics: BTreeMap::new(), spared: 0 }
    }

    fn topic_of(&mut self, message: &Publish) -> String {
        let Some(alias) = message.properties.number(id::TOPIC_ALIAS) else {
            assert!(!message.topic.is_empty(), "[MQTT-3.3.2-8]: a topic or an alias");
            return message.topic.clone();
        };
        assert!((1..=self.maximum).contains(&alias), "[MQTT-3.3.2-8], [MQTT-3.3.2-9]: alias {alias}");
        if message.topic.is_empty() {
            self.spared += 1;
            self.topics.get(&alias).unwrap_or_else(|| panic!("alias {alias} was never set")).clone()
        } else {
            self.topics.insert(alias, message.topic.clone());
            message.topic.clone()
        }
    }
}

/// [MQTT-3.1.2-26], [MQTT-3.1.2-27]: no alias beyond the client's maximum, none at all without one; [MQTT-3.3.2-7]: they end with the
/// connection. And they are made use of: a topic that comes often comes once.
#[tokio::test]
async fn topic_aliases_of_the_server() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let topics = ["aliased/one", "aliased/two", "aliased/three", "aliased/four"];
    for maximum in [None, Some(0), Some(1), Some(2), Some(u16::MAX)] {
        let mut connect = lasting("subscriber", 600);
        if let Some(maximum) = maximum {
            connect = connect.with(id::TOPIC_ALIAS_MAXIMUM, Value::U16(maximum));
        }
        let mut subscriber = connect.clone().clean().to(&chatd).await.unwrap();
        subscriber.subscribe("aliased/+", 1).await.unwrap();
        for connection in 0..2 {
            if connection > 0 {
                subscriber.leave().await.unwrap();
                subscriber = connect.to(&chatd).await.unwrap();
                assert!(subscriber.session_present());
            }
            let mut aliases = Aliases::new(u32::from(maximum.unwrap_or(0)));
            for round in 0..4 {
                for (nth, topic) in topics.into_iter().enumerate() {
                    // QoS 0 and 1 alternate: an alias is of the connection, not of a session's message.
                    let qos = u8::from((round + nth) % 2 == 0);
                    publisher.publish(Publish::new(topic, topic, qos)).await.unwrap();
                    let got = subscriber.acked_message().await.unwrap();
                    assert_eq!((aliases.topic_of(&got).as_str(), got.qos), (topic, qos), "maximum {maximum:?}");
                    assert_eq!(got.text(), topic);
                }
                // One topic over and over, which is worth an alias whatever the maximum.
                publisher.publish(Publish::new("aliased/one", "aliased/one", 1)).await.unwrap();
                publisher.publish(Publish::new("aliased/one", "aliased/one", 1)).await.unwrap();
                for _ in 0..2 {
                    let got = subscriber.acked_message().await.unwrap();
                    assert_eq!(aliases.topic_of(&got), "aliased/one");
                }
            }
            if maximum.is_some_and(|maximum| maximum > 0) {
                assert!(aliases.spared > 0, "maximum {maximum:?}: no topic was spared");
            }
        }
        subscriber.leave().await.unwrap();
    }
}

/// [MQTT-4.4.0-1] and [MQTT-3.3.2-7] together: a message that was sent by an alias and comes again on the next connection has its topic.
#[tokio::test]
async fn what_is_sent_again_does_not_use_an_alias_of_the_connection_before() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let connect = lasting("subscriber", 600).with(id::TOPIC_ALIAS_MAXIMUM, Value::U16(10));
    let mut subscriber = connect.to(&chatd).await.unwrap();
    subscriber.subscribe("aliased/+", 2).await.unwrap();
    for text in ["one", "two", "three"] {
        publisher.publish(Publish::new("aliased/x", text, 1)).await.unwrap();
    }
    for _ in 0..3 {
        subscriber.message().await.unwrap();
    }
    drop(subscriber);
    let mut subscriber = connect.to(&chatd).await.unwrap();
    let mut aliases = Aliases::new(10);
    for text in ["one", "two", "three"] {
        let got = subscriber.acked_message().await.unwrap();
        assert_eq!((aliases.topic_of(&got).as_str(), got.text(), got.dup), ("aliased/x", text, true));
    }
}

/// 3.3.2.3.4: a client's alias ends with its connection: without a topic it is a protocol error on the next one. So is alias 0, and one
/// beyond the server's maximum [MQTT-3.3.2-9].
#[tokio::test]
async fn aliases_of_a_publisher_that_are_protocol_errors() {
    let chatd = Chatd::start().await.unwrap();
    let mut subscriber = five(&chatd, "subscriber").await;
    subscriber.subscribe("aliased/#", 1).await.unwrap();
    let aliased = |topic: &str, alias| Publish {
        properties: Properties::none().with(id::TOPIC_ALIAS, Value::U16(alias)),
        ..Publish::new(topic, "x", 1)
    };
    let connect = lasting("publisher", 600);
    let mut publisher = connect.to(&chatd).await.unwrap();
    let maximum = publisher.connack_properties().number(id::TOPIC_ALIAS_MAXIMUM).unwrap_or(0);
    assert!(maximum > 0);
    publisher.publish(aliased("aliased/x", 1)).await.unwrap();
    assert_next(&mut subscriber, "aliased/x", "x", 1, false).await;
    publisher.leave().await.unwrap();
    let beyond = u16::try_from(maximum + 1).unwrap();
    for publish in [aliased("", 1), aliased("aliased/x", 0), aliased("aliased/x", beyond), Publish::new("", "x", 1)] {
        let mut publisher = connect.to(&chatd).await.unwrap();
        publisher.start_publish(publish.clone()).await.unwrap();
        assert_violation(publisher, &format!("{publish:?}")).await;
    }
    nothing_more(&mut subscriber).await;
}

// ---- what the client can take ----------------------------------------------------------------------------------------------

/// [MQTT-3.1.2-24], [MQTT-3.1.2-25]: a packet that is larger than the client takes is not sent, and it is as if it had been; live, retained,
/// or from the queue.
#[tokio::test]
async fn packets_that_are_too_large_for_the_client_are_left_out() {
    const LARGEST: u32 = 200;
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let large = "x".repeat(1_000);
    let connect = lasting("small", 600).with(id::MAXIMUM_PACKET_SIZE, Value::U32(LARGEST)).receive_maximum(2);
    let mut small = connect.to(&chatd).await.unwrap();
    small.subscribe("sized/#", 2).await.unwrap();
    for away in [false, true] {
        if away {
            small.disconnect(0, &Properties::none()).await.unwrap();
        }
        // More of them than the receive maximum: they take none of it.
        for qos in [0, 1, 2, 1, 2, 1, 2] {
            publisher.publish(Publish::new("sized/x", large.as_str(), qos)).await.unwrap();
        }
        publisher.publish(Publish::new("sized/x", "small", 1)).await.unwrap();
        if away {
            small = connect.to(&chatd).await.unwrap();
        }
        assert_next(&mut small, "sized/x", "small", 1, false).await;
        nothing_more(&mut small).await;
    }
    publisher.publish(retained("sized/large", &large, 1)).await.unwrap();
    publisher.publish(retained("sized/small", "small", 1)).await.unwrap();
    assert_next(&mut small, "sized/small", "small", 1, false).await;
    small.subscribe("sized/#", 2).await.unwrap();
    assert_next(&mut small, "sized/small", "small", 1, true).await;
    nothing_more(&mut small).await;
    // To the byte: the largest that is sent has exactly that length.
    let frame = packet::publish(Version::V5, &Publish { packet_id: 1, ..Publish::new("sized/x", "", 1) }).len() + 1;
    let fits = usize::try_from(LARGEST).unwrap() - frame;
    for length in [fits + 1, fits] {
        publisher.publish(Publish::new("sized/x", "y".repeat(length), 1)).await.unwrap();
    }
    assert_eq!(small.acked_message().await.unwrap().payload.len(), fits);
    nothing_more(&mut small).await;
    assert_well(&chatd).await;
}

/// [MQTT-3.1.2-25] for whatever else has to fit: reason strings and user properties are left out where they do not ([MQTT-3.4.2-2], -3).
#[tokio::test]
async fn acknowledgements_fit_into_what_the_client_takes() {
    let chatd = Chatd::start().await.unwrap();
    let connect = Connect::v5("alice", "phone").with(id::MAXIMUM_PACKET_SIZE, Value::U32(64));
    let mut alice = connect.to(&chatd).await.unwrap();
    let ack = alice.publish(Publish::new("$data/x", "x", 1)).await.unwrap();
    assert!(ack.code >= 0x80, "{ack:?}");
    let (codes, _) = alice.subscribe_codes(&[("chat/bob/inbox", 1)]).await.unwrap();
    assert_eq!(codes, [0x87]);
    assert!(alice.say("alice", "bob", "hello").await.unwrap().code < 0x80);
}

/// [MQTT-3.3.4-9], [MQTT-3.3.4-7]: never more unacknowledged QoS 1 and 2 messages than the receive maximum, live and from the queue; QoS 2 counts until its
/// PUBCOMP (4.9).
#[tokio::test]
async fn the_receive_maximum_of_a_client_holds_for_ordinary_topics() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    for maximum in [1, 3] {
        for qos in [1, 2] {
            for away in [false, true] {
                let connect = lasting("slow", 600).receive_maximum(maximum);
                let mut slow = connect.clone().clean().to(&chatd).await.unwrap();
                slow.subscribe("flow", 2).await.unwrap();
                if away {
                    slow.disconnect(0, &Properties::none()).await.unwrap();
                }
                for n in 0..6 {
                    publisher.publish(Publish::new("flow", n.to_string(), qos)).await.unwrap();
                }
                if away {
                    slow = connect.to(&chatd).await.unwrap();
                }
                let mut flight = std::collections::VecDeque::new();
                for n in 0..6 {
                    while flight.len() < usize::from(maximum).min(6 - n) {
                        flight.push_back(slow.message().await.unwrap());
                    }
                    nothing_more(&mut slow).await;
                    let oldest: Publish = flight.pop_front().unwrap();
                    assert_eq!((oldest.text(), oldest.qos), (n.to_string().as_str(), qos));
                    if qos == 2 {
                        slow.send_bytes(&packet::pubrec(oldest.packet_id)).await.unwrap();
                        slow.pubrel(oldest.packet_id).await.unwrap();
                        nothing_more(&mut slow).await;
                        slow.send_bytes(&packet::pubcomp(oldest.packet_id)).await.unwrap();
                    } else {
                        slow.acknowledge(&oldest).await.unwrap();
                    }
                }
                nothing_more(&mut slow).await;
            }
        }
    }
    // 3.1.2.11.3: zero is a protocol error.
    let mut client = Connect::v5("zero", "zero").receive_maximum(0).open(&chatd).await.unwrap();
    let first = client.receive().await.unwrap();
    assert!(!matches!(first, Some(Packet::Connack { code: 0, .. })), "{first:?}");
}

// ---- what is told ----------------------------------------------------------------------------------------------------------

/// [MQTT-3.1.2-28]: response information only for who asks for it; here it is the topic for responses.
#[tokio::test]
async fn response_information_is_told_on_request() {
    let chatd = Chatd::start().await.unwrap();
    for (asked, told) in [(None, None), (Some(0), None), (Some(1), Some("chat/alice/res"))] {
        let mut connect = Connect::v5("alice", "phone");
        if let Some(asked) = asked {
            connect = connect.with(id::REQUEST_RESPONSE_INFORMATION, Value::Byte(asked));
        }
        let client = connect.to(&chatd).await.unwrap();
        assert_eq!(client.connack_properties().text(id::RESPONSE_INFORMATION), told, "{asked:?}");
    }
    // 3.1.2.11.6: any other value is a protocol error.
    let mut client = Connect::v5("alice", "phone")
        .with(id::REQUEST_RESPONSE_INFORMATION, Value::Byte(2))
        .open(&chatd)
        .await
        .unwrap();
    let first = client.receive().await.unwrap();
    assert!(!matches!(first, Some(Packet::Connack { code: 0, .. })), "{first:?}");
}

/// [MQTT-3.1.2-29]: who asks for no problem information gets no reason string and no user property but in CONNACK, DISCONNECT and PUBLISH.
/// Who does not ask gets sentences.
#[tokio::test]
async fn problem_information_is_left_out_on_request() {
    let chatd = Chatd::start().await.unwrap();
    for (asked, told) in [(None, true), (Some(1), true), (Some(0), false)] {
        let mut connect = Connect::v5("alice", "phone");
        if let Some(asked) = asked {
            connect = connect.with(id::REQUEST_PROBLEM_INFORMATION, Value::Byte(asked));
        }
        let mut alice = connect.to(&chatd).await.unwrap();
        let (codes, properties) = alice.subscribe_codes(&[("chat/bob/inbox", 1), ("open/+", 1)]).await.unwrap();
        assert_eq!(codes, [0x87, 1]);
        assert_eq!(properties.reason().is_some(), told, "{properties:?}");
        assert!(told || properties == Properties::none(), "{properties:?}");
        for (topic, qos) in [("$data", 1), ("$data", 2), ("chat/carol/out/bob", 1), ("chat/alice/out/bob", 1)] {
            let publish = Publish { packet_id: 700, ..Publish::new(topic, "x", qos) };
            alice.start_publish(publish).await.unwrap();
            let properties = alice
                .take("the acknowledgement", |packet| match packet {
                    Packet::Puback { packet_id: 700, properties, .. }
                    | Packet::Pubrec { packet_id: 700, properties, .. } => Some(properties.clone()),
                    _ => None,
                })
                .await
                .unwrap();
            assert_eq!(properties != Properties::none(), told, "{topic}: {properties:?}");
        }
        // A PUBLISH keeps its user properties.
        let publish = Publish { properties: Properties::none().with_user("a", "b"), ..Publish::new("open/x", "x", 1) };
        alice.publish(publish).await.unwrap();
        assert_eq!(alice.acked_message().await.unwrap().properties.user("a"), Some("b"));
        // And a DISCONNECT may say why.
        alice.send_bytes(&[0, 0]).await.unwrap();
        assert_violation(alice, "packet type 0").await;
    }
}

/// [MQTT-3.2.2-16], 3.1.3.1: who has no client identifier is assigned one of its own, told once, and can come back with it.
#[tokio::test]
async fn client_identifiers_are_assigned() {
    let chatd = Chatd::start().await.unwrap();
    let mut assigned = Vec::new();
    for clean_start in [true, false] {
        for _ in 0..2 {
            let nameless = Connect { clean_start, ..Connect::v5("alice", "").session_expiry(600) };
            let mut client = nameless.to(&chatd).await.unwrap();
            assert!(!client.session_present());
            client.subscribe("home/+", 1).await.unwrap();
            let told = client.connack_properties().text(id::ASSIGNED_CLIENT_ID).unwrap().to_owned();
            assert!(!told.is_empty() && !assigned.contains(&told), "{told}");
            client.leave().await.unwrap();
            assigned.push(told);
        }
    }
    for told in assigned {
        let back = Connect { clean_start: false, ..Connect::v5("alice", &told).session_expiry(600) };
        let client = back.to(&chatd).await.unwrap();
        assert!(client.session_present(), "{told}");
        assert_eq!(client.connack_properties().text(id::ASSIGNED_CLIENT_ID), None);
    }
}

/// 3.2.2.3.14, [MQTT-3.1.2-21]: a server that wants another keep alive says so, and then it is this one that counts.
#[tokio::test]
async fn the_servers_keep_alive_is_told_and_holds() {
    let chatd = Chatd::start_with(Options::default().set("limits.keep_alive_max_s", 1)).await.unwrap();
    for asked in [600, 0] {
        let connect = Connect::v5("client", "client").keep_alive(asked);
        let mut client = connect.to(&chatd).await.unwrap();
        assert_eq!(client.connack_properties().number(id::SERVER_KEEP_ALIVE), Some(1), "asked for {asked}");
        // [MQTT-3.1.2-22]: silent for one and a half times as long, it is closed.
        let code = client.until_closed().await.unwrap();
        assert!(matches!(code[..], [Packet::Disconnect { code: 0x8d, .. }]), "{code:?}");
    }
    let modest = Connect::v5("client", "client").keep_alive(1).to(&chatd).await.unwrap();
    let told = modest.connack_properties().number(id::SERVER_KEEP_ALIVE);
    assert!(told.is_none_or(|told| told == 1), "{told:?}");
}

/// What CONNACK says is available, is.
#[tokio::test]
async fn connack_promises_everything() {
    let chatd = Chatd::start().await.unwrap();
    let client = five(&chatd, "client").await;
    let told = client.connack_properties();
    for identifier in [
        id::RETAIN_AVAILABLE,
        id::WILDCARD_SUBSCRIPTION_AVAILABLE,
        id::SUBSCRIPTION_IDENTIFIERS_AVAILABLE,
        id::SHARED_SUBSCRIPTION_AVAILABLE,
    ] {
        assert!(told.number(identifier).is_none_or(|available| available == 1), "{identifier:#x}: {told:?}");
    }
    // 3.2.2.3.4: QoS 2 is said by leaving it out.
    assert_eq!(told.number(id::MAXIMUM_QOS), None);
}

/// Reason strings on what is refused outside chat, too.
#[tokio::test]
async fn a_refusal_says_why() {
    let chatd = Chatd::start().await.unwrap();
    let mut client = five(&chatd, "client").await;
    for filter in ["chat/bob/inbox", "chat/#", "$share/g/chat/client/inbox"] {
        let (codes, properties) = client.subscribe_codes(&[(filter, 1)]).await.unwrap();
        assert!(codes.len() == 1 && codes[0] >= 0x80, "{filter}: {codes:02x?}");
        assert!(properties.reason().is_some_and(|reason| !reason.is_empty()), "{filter}: {properties:?}");
    }
    let ack = client.publish(Publish::new("$data", "x", 2)).await.unwrap();
    assert!(ack.code >= 0x80 && ack.reason.is_some(), "{ack:?}");
    assert_eq!(client.unsubscribe("never/was").await.unwrap(), 0x11);

    // [MQTT-4.7.1-1], [MQTT-4.7.1-2], [MQTT-4.7.3-1], [MQTT-4.8.2-1], [MQTT-4.8.2-2]: what is no filter is refused or closes the connection.
    for filter in ["a/#/b", "a+", "a/#b", "", "$share/g", "$share//a", "$share/+/a", "$share/g/", "$share/g/a/#/b"] {
        let mut client = five(&chatd, "client").await;
        client.send_bytes(&packet::subscribe(Version::V5, 9, &Properties::none(), &[(filter, 1)])).await.unwrap();
        match client.receive().await.unwrap() {
            Some(Packet::Suback { packet_id: 9, codes, properties }) => {
                assert!(codes.len() == 1 && codes[0] >= 0x80, "{filter}: {codes:02x?}");
                assert!(properties.reason().is_some(), "{filter}");
            }
            Some(Packet::Disconnect { code, .. }) => assert!(code >= 0x80, "{filter}: {code:#x}"),
            other => panic!("{filter}: {other:?}"),
        }
    }
}

// ---- what is handed on -----------------------------------------------------------------------------------------------------

/// Properties are the message's: live, retained, from the queue, and sent again.
#[tokio::test]
async fn properties_travel_every_way() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let connect = lasting("subscriber", 600);
    let mut subscriber = connect.to(&chatd).await.unwrap();
    subscriber.subscribe("rich", 2).await.unwrap();
    let properties = Properties::none()
        .with(id::PAYLOAD_FORMAT, Value::Byte(1))
        .with(id::CONTENT_TYPE, Value::Text("text/plain; charset=utf-8".into()))
        .with(id::RESPONSE_TOPIC, Value::Text("answers/π".into()))
        .with(id::CORRELATION_DATA, Value::Binary((0..=255).collect()))
        .with_user("b", "2")
        .with_user("", "")
        .with_user("a", "1")
        .with_user("b", "2");
    let rich = |qos| Publish { retain: true, properties: properties.clone(), ..Publish::new("rich", "why?", qos) };
    for qos in 0..=2 {
        publisher.publish(rich(qos)).await.unwrap();
        assert_same_properties(&subscriber.acked_message().await.unwrap().properties, &properties);
    }
    subscriber.leave().await.unwrap();
    publisher.publish(rich(2)).await.unwrap();
    let mut subscriber = connect.to(&chatd).await.unwrap();
    assert_same_properties(&subscriber.message().await.unwrap().properties, &properties);
    drop(subscriber);
    let mut subscriber = connect.to(&chatd).await.unwrap();
    let again = subscriber.acked_message().await.unwrap();
    assert!(again.dup);
    assert_same_properties(&again.properties, &properties);
    subscriber.subscribe("rich", 2).await.unwrap();
    let kept = subscriber.acked_message().await.unwrap();
    assert!(kept.retain);
    assert_same_properties(&kept.properties, &properties);
}
