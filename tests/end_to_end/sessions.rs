//! Sessions at their seams: refused before they began, taken over by many at once, ended in the middle of a handshake; and when a client counts
//! as gone.

use end_to_end::packet::{self, Packet, Properties, Publish, Value, Version, Will, id};
use end_to_end::{Chatd, Connect, Options, PATIENCE, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::ordinary::{assert_next, connected, nothing_more};

const NOT_AUTHORIZED: u8 = 0x87;
const PACKET_IDENTIFIER_NOT_FOUND: u8 = 0x92;
const QUOTA_EXCEEDED: u8 = 0x97;

async fn edge_entries(chatd: &Chatd, map: &str) -> f64 {
    chatd.metrics().await.unwrap()[&format!("chatd_edge_entries{{map=\"{map}\"}}")]
}

async fn refused_with(connect: &Connect, chatd: &Chatd) -> u8 {
    let mut client = connect.open(chatd).await.unwrap();
    let Some(Packet::Connack { code, .. }) = client.receive().await.unwrap() else { panic!("no CONNACK") };
    assert_eq!(client.until_closed().await.unwrap(), []);
    code
}

fn will(topic: &str, text: &str) -> Will {
    Will { topic: topic.to_owned(), payload: text.into(), qos: 1, ..Will::default() }
}

/// There was no session, so there is no will, and nothing is remembered.
#[tokio::test]
async fn a_refused_connect_leaves_nothing_behind() {
    let chatd = Chatd::start_with(Options::default().set("limits.sessions_per_user", 1)).await.unwrap();
    let mut watcher = connected(&chatd, Version::V5, "watcher").await;
    watcher.subscribe("gone/#", 1).await.unwrap();
    let _first = Connect::v5("eve", "first").session_expiry(100).to(&chatd).await.unwrap();
    for delay_s in [0, 100] {
        let properties = Properties::none().with(id::WILL_DELAY, Value::U32(delay_s));
        let will = Will { properties, ..will("gone/eve", "she never was here") };
        let refused = Connect::v5("eve", "second").session_expiry(100).will(will);
        assert_eq!(refused_with(&refused, &chatd).await, QUOTA_EXCEEDED);
    }
    eventually("they have gone", PATIENCE, async || edge_entries(&chatd, "sessions").await == 2.0).await;
    assert_eq!(edge_entries(&chatd, "absent").await, 0.0);
    watcher.publish(Publish::new("gone/marker", "marker", 1)).await.unwrap();
    assert_next(&mut watcher, "gone/marker", "marker", 1, false).await;
    nothing_more(&mut watcher).await;
}

#[tokio::test]
async fn the_response_topic_of_a_will_is_judged() {
    let chatd = Chatd::start().await.unwrap();
    let mut watcher = connected(&chatd, Version::V5, "watcher").await;
    watcher.subscribe("gone", 1).await.unwrap();
    let mortal = |response_topic: &str| {
        let properties = Properties::none().with(id::RESPONSE_TOPIC, Value::Text(response_topic.to_owned()));
        Connect::v5("eve", "mortal").will(Will { properties, ..will("gone", response_topic) })
    };
    for not_hers in ["chat/bob/inbox", "#", "a/+/#"] {
        assert_eq!(refused_with(&mortal(not_hers), &chatd).await, NOT_AUTHORIZED, "{not_hers}");
    }
    drop(mortal("chat/eve/res").to(&chatd).await.unwrap());
    let got = watcher.acked_message().await.unwrap();
    assert_eq!((got.text(), got.properties.text(id::RESPONSE_TOPIC)), ("chat/eve/res", Some("chat/eve/res")));
}

/// A QoS 2 publish that was taken is known to the next connection, though its PUBREC had to wait for an answer in front of it.
#[tokio::test]
async fn what_was_taken_behind_something_else_is_taken_once() {
    let chatd = Chatd::start().await.unwrap();
    let mut receiver = connected(&chatd, Version::V5, "receiver").await;
    receiver.subscribe("exactly/once", 2).await.unwrap();
    for version in [Version::V4, Version::V5] {
        for round in 0..5 {
            let connect = Connect::new(version, "alice", &format!("device-{version:?}-{round}")).persistent();
            let mut alice = connect.to(&chatd).await.unwrap();
            let stored = Publish { packet_id: 1, ..Publish::new("chat/alice/out/bob", "hello", 1) };
            let text = format!("{version:?} {round}");
            let once = Publish { packet_id: 2, ..Publish::new("exactly/once", text.as_str(), 2) };
            let bytes = [packet::publish(version, &stored), packet::publish(version, &once)].concat();
            alice.send_bytes(&bytes).await.unwrap();
            drop(alice);
            let mut alice = connect.to(&chatd).await.unwrap();
            assert!(alice.session_present());
            alice.publish(Publish { dup: true, ..once }).await.unwrap();
            alice.publish(Publish::new("exactly/once", "marker", 2)).await.unwrap();
            assert_next(&mut receiver, "exactly/once", &text, 2, false).await;
            assert_next(&mut receiver, "exactly/once", "marker", 2, false).await;
        }
    }
}

/// Sends pings and reads answers until it is closed.
async fn flood(stream: TcpStream, mut first: Vec<u8>) {
    let (mut from, mut to) = stream.into_split();
    let reading = tokio::spawn(async move {
        let mut bytes = vec![0; 64 * 1024];
        while matches!(from.read(&mut bytes).await, Ok(read) if read > 0) {}
    });
    let pings = packet::pingreq().repeat(1_000);
    first.extend(&pings);
    let mut sent = to.write_all(&first).await;
    while sent.is_ok() && !reading.is_finished() {
        sent = to.write_all(&pings).await;
    }
    reading.await.unwrap();
}

/// However many connections of one session come at once and however much they send: the last one has it, with all that waited.
#[tokio::test]
async fn a_session_that_many_take_over_at_once_loses_nothing() {
    const WAITING: usize = 5;
    let chatd = Chatd::start().await.unwrap();
    let connect = Connect::v5("eve", "chain").persistent();
    let mut eve = connect.to(&chatd).await.unwrap();
    eve.subscribe("own", 1).await.unwrap();
    eve.leave().await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    publisher.publish_all((0..WAITING).map(|n| Publish::new("own", n.to_string(), 1))).await.unwrap();
    let mut floods = tokio::task::JoinSet::new();
    for _ in 0..10 {
        let stream = TcpStream::connect(chatd.mqtt_addr()).await.unwrap();
        floods.spawn(flood(stream, connect.bytes()));
    }
    // All but one have been taken over.
    while floods.len() > 1 {
        floods.join_next().await.expect("there are more").unwrap();
    }
    let mut last = connect.to(&chatd).await.unwrap();
    assert!(last.session_present());
    for n in 0..WAITING {
        assert_next(&mut last, "own", &n.to_string(), 1, false).await;
    }
    publisher.publish(Publish::new("own", "live", 1)).await.unwrap();
    assert_next(&mut last, "own", "live", 1, false).await;
    while let Some(ended) = floods.join_next().await {
        ended.unwrap();
    }
    nothing_more(&mut last).await;
}

/// A client is not closed for a silence in which the server did not listen.
#[tokio::test]
async fn who_is_made_to_wait_is_not_silent() {
    let chatd = Chatd::start_with(Options::default().set("limits.publishes_per_s", 5)).await.unwrap();
    let mut client = Connect::v4("alice", "phone").keep_alive(1).to(&chatd).await.unwrap();
    let publishes: Vec<u8> = (1..=20)
        .flat_map(|packet_id| packet::publish(Version::V4, &Publish { packet_id, ..Publish::new("news", "x", 1) }))
        .collect();
    client.send_bytes(&publishes).await.unwrap();
    for packet_id in 1..=20 {
        client.puback(packet_id).await.unwrap();
    }
    nothing_more(&mut client).await;
}

/// A client that says good-bye and closes while there is something for it to read resets the connection. What it sent before counts all the
/// same, and so does the good-bye, however long the server makes it wait.
#[tokio::test]
async fn what_was_sent_before_a_reset_counts() {
    const PUBLISHES: u16 = 30;
    let chatd = Chatd::start_with(Options::default().set("limits.publishes_per_s", 20)).await.unwrap();
    let mut watching = connected(&chatd, Version::V5, "watching").await;
    watching.subscribe("last/#", 1).await.unwrap();
    let leaving = Connect::v4("alice", "phone").will(will("last/will", "gone"));
    for connect in [leaving.clone(), leaving.over_web_socket()] {
        let mut client = connect.to(&chatd).await.unwrap();
        let publish = |packet_id| Publish { packet_id, ..Publish::new("last/words", packet_id.to_string(), 1) };
        let mut bytes: Vec<u8> = (1..=PUBLISHES).flat_map(|n| packet::publish(Version::V4, &publish(n))).collect();
        bytes.extend(packet::disconnect(Version::V4, 0, &Properties::none()));
        client.send_bytes(&bytes).await.unwrap();
        assert_next(&mut watching, "last/words", "1", 1, false).await;
        // The first PUBACK is on its way, and nobody reads it.
        drop(client);
        for n in 2..=PUBLISHES {
            assert_next(&mut watching, "last/words", &n.to_string(), 1, false).await;
        }
        eventually("the client is gone", PATIENCE, async || chatd.metric("chatd_connections").await.unwrap() == 1.0)
            .await;
        nothing_more(&mut watching).await;
    }
}

/// Keep alive ends a client that takes nothing of what it is sent, too: that nothing is read from it then is its own doing.
#[tokio::test]
async fn who_takes_no_bytes_is_gone_after_the_keep_alive() {
    const CLIENTS: usize = 4;
    const BYTES: usize = 1_000_000;
    let chatd = Chatd::start().await.unwrap();
    let mut watcher = connected(&chatd, Version::V5, "watcher").await;
    watcher.subscribe("gone", 1).await.unwrap();
    let mut deaf = Vec::new();
    for nth in 0..CLIENTS {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4 * 1024).unwrap();
        let mut stream = socket.connect(chatd.mqtt_addr()).await.unwrap();
        let name = nth.to_string();
        let mut bytes = Connect::v4("eve", &name).keep_alive(2).will(will("gone", &name)).bytes();
        let own = format!("own/{nth}");
        bytes.extend(packet::subscribe(Version::V4, 1, &Properties::none(), &[("large", 0), (&own, 0)]));
        stream.write_all(&bytes).await.unwrap();
        deaf.push(stream);
    }
    eventually("they have subscribed", PATIENCE, async || edge_entries(&chatd, "filters").await >= 9.0).await;
    let mut publisher = connected(&chatd, Version::V4, "publisher").await;
    // Nobody knows how much the system takes for them; of one or the other more is left with the server than it reads on for.
    for nth in 0..CLIENTS {
        publisher.publish(Publish::new(format!("own/{nth}"), vec![0; 1 + nth * BYTES / CLIENTS], 1)).await.unwrap();
    }
    for _ in 0..12 {
        publisher.publish(Publish::new("large", vec![0; BYTES], 1)).await.unwrap();
    }
    let mut gone: Vec<String> = Vec::new();
    while gone.len() < CLIENTS {
        gone.push(watcher.acked_message().await.unwrap().text().to_owned());
    }
    gone.sort_unstable();
    assert_eq!(gone, ["0", "1", "2", "3"]);
}

/// PUBREL for what is not there and QoS 2 publishes that repeat what is there cost as much as publishes; the rest of a handshake is free.
#[tokio::test]
async fn packets_that_do_nothing_are_not_free() {
    const AT_ONCE: u16 = 5;
    let chatd = Chatd::start_with(Options::default().set("limits.publishes_per_s", AT_ONCE)).await.unwrap();
    let limited = async || chatd.limited("publishes_per_s").await.unwrap();
    for version in [Version::V4, Version::V5] {
        let before = limited().await;
        let mut decent = connected(&chatd, version, "decent").await;
        for _ in 0..AT_ONCE {
            decent.publish(Publish::new("news", "x", 2)).await.unwrap();
        }
        assert_eq!(limited().await, before, "{version:?}");

        let mut unknown = connected(&chatd, version, "unknown").await;
        unknown.send_bytes(&packet::pubrel(7).repeat(usize::from(AT_ONCE) + 1)).await.unwrap();
        for _ in 0..=AT_ONCE {
            let code = if version == Version::V5 { PACKET_IDENTIFIER_NOT_FOUND } else { 0 };
            assert_eq!(unknown.pubcomp(7).await.unwrap(), code);
        }
        assert_eq!(limited().await, before + 1.0, "{version:?}");

        let mut repeating = connected(&chatd, version, "repeating").await;
        let publish = Publish { packet_id: 9, ..Publish::new("news", "x", 2) };
        repeating.start_publish(publish.clone()).await.unwrap();
        repeating.pubrec(9).await.unwrap();
        let again = packet::publish(version, &Publish { dup: true, ..publish });
        repeating.send_bytes(&again.repeat(usize::from(AT_ONCE))).await.unwrap();
        for _ in 0..AT_ONCE {
            repeating.pubrec(9).await.unwrap();
        }
        eventually("it is counted", PATIENCE, async || limited().await == before + 2.0).await;
    }
}

/// All members of a group have gone and others have come: what the last had in hand goes to them.
#[tokio::test]
async fn a_group_that_begins_anew_is_the_same_group() {
    const SHARED: &str = "$share/team/jobs/#";
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    let mut first = Connect::v5("first", "first").receive_maximum(1).to(&chatd).await.unwrap();
    first.subscribe(SHARED, 1).await.unwrap();
    for n in 0..4 {
        publisher.publish(Publish::new("jobs/1", n.to_string(), 1)).await.unwrap();
    }
    assert_eq!(first.message().await.unwrap().text(), "0");
    eventually("all are with the first", PATIENCE, async || edge_entries(&chatd, "queue_bytes").await > 4.0 * 192.0)
        .await;
    first.unsubscribe(SHARED).await.unwrap();
    let mut second = connected(&chatd, Version::V5, "second").await;
    second.subscribe(SHARED, 1).await.unwrap();
    nothing_more(&mut second).await;
    drop(first);
    for n in 0..4 {
        assert_next(&mut second, "jobs/1", &n.to_string(), 1, false).await;
    }
}
