//! What waits in memory is bounded: of a session that comes and goes, of a user, and of whoever asks without listening. And none of it takes
//! anything from others.

use std::time::Instant;

use end_to_end::packet::{self, Packet, Publish, Version, id};
use end_to_end::{Chatd, Client, Connect, Options, PATIENCE, eventually};
use serde_json::{Value, json};

use crate::chat::assert_well;
use crate::ordinary::{assert_next, connected, nothing_more, retained};

const QUOTA_EXCEEDED: u8 = 0x97;

/// Tries until it succeeds.
async fn until(what: &str, mut attempt: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !attempt().await {
        assert!(Instant::now() < end, "did not happen: {what}");
        tokio::task::yield_now().await;
    }
}

async fn waiting(chatd: &Chatd, map: &str) -> f64 {
    chatd.metrics().await.unwrap()[&format!("chatd_edge_entries{{map=\"{map}\"}}")]
}

fn texts(packets: &[Packet]) -> impl Iterator<Item = &Publish> {
    packets.iter().filter_map(|packet| match packet {
        Packet::Publish(publish) => Some(publish),
        _ => None,
    })
}

/// Everything that comes until nothing is under way any more, acknowledged.
async fn all_that_waits(client: &mut Client) -> Vec<Publish> {
    let mut all = Vec::new();
    loop {
        let packets = client.ping().await.unwrap();
        let before = all.len();
        for publish in texts(&packets) {
            client.acknowledge(publish).await.unwrap();
            all.push(publish.clone());
        }
        if all.len() == before {
            return all;
        }
    }
}

/// A client that connects again and again, and acknowledges nothing, has one queue and not one for each connection.
#[tokio::test]
async fn a_session_that_comes_and_goes_has_one_queue() {
    const KEPT: usize = 20;
    const ROUNDS: usize = 5;
    let chatd = Chatd::start_with(Options::default().set("limits.queue_messages", KEPT)).await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    publisher.subscribe("the/end", 1).await.unwrap();
    let connect = |window| Connect::v5("screen", "screen").persistent().receive_maximum(window);
    let mut screen = connect(1).to(&chatd).await.unwrap();
    screen.subscribe("news", 1).await.unwrap();
    let mut published = 0;
    for _ in 0..ROUNDS {
        drop(screen);
        let first = published;
        published += KEPT + 10;
        publisher.publish_all((first..published).map(|n| Publish::new("news", n.to_string(), 1))).await.unwrap();
        // What comes to one has come to all.
        publisher.publish(Publish::new("the/end", "x", 1)).await.unwrap();
        publisher.acked_message().await.unwrap();
        screen = connect(1).to(&chatd).await.unwrap();
        assert_eq!(screen.message().await.unwrap().text(), "0", "what waits longest comes first");
        assert!(waiting(&chatd, "queue_bytes").await > 0.0, "what waits is counted wherever it lies");
    }
    drop(screen);
    let mut screen = connect(60).to(&chatd).await.unwrap();
    let got: Vec<usize> = all_that_waits(&mut screen).await.iter().map(|one| one.text().parse().unwrap()).collect();
    // The one in flight takes no place in the queue.
    assert!((KEPT..=KEPT + ROUNDS).contains(&got.len()), "{got:?}");
    assert_eq!(got[..KEPT], (0..KEPT).collect::<Vec<_>>());
    assert!(got.is_sorted());
    eventually("nothing waits", PATIENCE, async || waiting(&chatd, "queue_bytes").await == 0.0).await;
    publisher.publish(Publish::new("news", "there is room", 1)).await.unwrap();
    assert_next(&mut screen, "news", "there is room", 1, false).await;
}

/// What one user leaves waiting is bounded by a share, so there is room for what waits for others.
#[tokio::test]
async fn a_user_has_a_share_of_what_may_wait() {
    let options = Options::default().set("limits.queues_bytes", 256 * 1024);
    let chatd = Chatd::start_with(options.set("limits.user_queues_bytes", 64 * 1024)).await.unwrap();
    let away = |user: &str, device: String| Connect::v5(user, &device).persistent();
    let mut eves = Vec::new();
    for nth in 0..10 {
        let eve = away("eve", format!("device-{nth}"));
        let mut client = eve.to(&chatd).await.unwrap();
        client.subscribe("own/eve", 1).await.unwrap();
        client.leave().await.unwrap();
        eves.push(eve);
    }
    let bob = away("bob", "phone".to_owned());
    let mut client = bob.to(&chatd).await.unwrap();
    client.subscribe("home/#", 1).await.unwrap();
    client.leave().await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    let large = "x".repeat(10 * 1024);
    publisher.publish_all((0..20).map(|_| Publish::new("own/eve", large.clone(), 1))).await.unwrap();
    publisher.publish_all((0..5).map(|n| Publish::new("home/x", format!("{n}{large}"), 1))).await.unwrap();
    let mut client = bob.to(&chatd).await.unwrap();
    for n in 0..5 {
        let got = client.acked_message().await.unwrap();
        assert!(got.text().starts_with(&n.to_string()), "{}", &got.text()[..5]);
    }
    // None of eve's devices has been left out: who has nothing waiting gets the next one.
    for eve in eves {
        let got = all_that_waits(&mut eve.to(&chatd).await.unwrap()).await;
        assert!((1..20).contains(&got.len()), "{}", got.len());
    }
}

/// Where one user has taken all there is, who keeps up does not feel it.
#[tokio::test]
async fn who_keeps_up_needs_no_room() {
    let options = Options::default().set("limits.queues_bytes", 64 * 1024);
    let chatd = Chatd::start_with(options.set("limits.user_queues_bytes", 0)).await.unwrap();
    let mut eve = Connect::v5("eve", "away").persistent().to(&chatd).await.unwrap();
    eve.subscribe("own/eve", 1).await.unwrap();
    eve.leave().await.unwrap();
    let mut publisher = connected(&chatd, Version::V5, "publisher").await;
    let dropped = async || chatd.limited("queue_messages").await.unwrap();
    let large = "x".repeat(10 * 1024);
    publisher.publish_all((0..10).map(|_| Publish::new("own/eve", large.clone(), 1))).await.unwrap();
    // Six of them have room.
    eventually("the pot is full", PATIENCE, async || dropped().await == 4.0).await;
    let mut bob = connected(&chatd, Version::V4, "bob").await;
    bob.subscribe("home/x", 1).await.unwrap();
    for n in 0..20 {
        publisher.publish(Publish::new("home/x", format!("{n}{large}"), 1)).await.unwrap();
        assert!(bob.acked_message().await.unwrap().text().starts_with(&n.to_string()));
    }
    assert_eq!(dropped().await, 4.0);
}

/// Alice has so many messages of bob's that the answer to a request for them has some 270,000 bytes.
async fn with_a_long_history() -> Chatd {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = connected(&chatd, Version::V5, "bob").await;
    // Each of them takes two in JSON.
    let text = "\"".repeat(1_300);
    bob.publish_all((0..200).map(|_| Publish::new("chat/bob/out/alice", text.clone(), 1))).await.unwrap();
    chatd
}

fn request(reference: usize) -> Publish {
    let asked = json!({ "ref": reference, "with": "bob", "limit": 200 });
    Publish::new("chat/alice/req/history", asked.to_string(), 1)
}

fn reference(answer: &Publish) -> usize {
    let answer = answer.json();
    assert!(answer["ok"]["entries"].is_array(), "{answer}");
    answer["ref"].as_u64().and_then(|reference| reference.try_into().ok()).expect("the reference comes back")
}

#[tokio::test]
async fn every_request_that_is_taken_is_answered() {
    const REQUESTS: usize = 60;
    let chatd = with_a_long_history().await;
    for qos in [0, 1] {
        let mut alice = connected(&chatd, Version::V5, "alice").await;
        alice.subscribe("chat/alice/res", qos).await.unwrap();
        let mut taken = Vec::new();
        let mut packet_ids = Vec::new();
        for nth in 0..REQUESTS {
            packet_ids.push(alice.start_publish(request(nth)).await.unwrap());
        }
        for (nth, packet_id) in packet_ids.into_iter().enumerate() {
            if alice.puback(packet_id).await.unwrap().code < 0x80 {
                taken.push(nth);
            }
        }
        // So many there are before 2 MiB wait, at least.
        assert!(taken.len() >= 8, "{taken:?}");
        let mut answered = Vec::new();
        while answered.len() < taken.len() {
            answered.push(reference(&alice.acked_message().await.unwrap()));
        }
        answered.sort_unstable();
        assert_eq!(answered, taken);
        nothing_more(&mut alice).await;
    }
    eventually("nothing waits", PATIENCE, async || waiting(&chatd, "live_queue_bytes").await == 0.0).await;
    assert_well(&chatd).await;
}

/// Who asks on and on and does not acknowledge the answers is told to wait, on all connections together, until there is room again.
#[tokio::test]
async fn who_does_not_take_the_answers_is_not_answered_on_and_on() {
    const MOST_BYTES: f64 = 32.0 * 1024.0 * 1024.0;
    let chatd = with_a_long_history().await;
    let mut alices = Vec::new();
    for device in 0..8 {
        let connect = Connect::v5("alice", &format!("device-{device}")).receive_maximum(1);
        let mut alice = connect.to(&chatd).await.unwrap();
        let topic = format!("chat/alice/res/{device}");
        alice.subscribe(&topic, 1).await.unwrap();
        let ask = move |nth| {
            let mut asked = request(nth);
            asked.properties = asked.properties.with(id::RESPONSE_TOPIC, packet::Value::Text(topic.clone()));
            asked
        };
        let mut taken = 0;
        until("it is refused", async || {
            let ack = alice.publish(ask(taken)).await.unwrap();
            taken += usize::from(ack.code < 0x80);
            ack.code >= 0x80 && ack.reason.unwrap().starts_with("unavailable: ")
        })
        .await;
        assert!(waiting(&chatd, "live_queue_bytes").await < MOST_BYTES);
        alices.push((alice, ask, taken));
    }
    // Others are answered.
    let mut bob = connected(&chatd, Version::V5, "bob").await;
    bob.subscribe("chat/bob/res", 1).await.unwrap();
    assert_eq!(bob.publish(Publish::new("chat/bob/req/whoami", "{}", 1)).await.unwrap().code, 0);
    assert_eq!(bob.acked_message().await.unwrap().json()["ok"]["user"], "bob");
    assert_eq!(chatd.limited("queue_messages").await.unwrap(), 0.0, "nothing was dropped");
    for (alice, _, taken) in &mut alices {
        let mut answered: Vec<usize> = alice.acked_messages(*taken).await.unwrap().iter().map(reference).collect();
        answered.sort_unstable();
        assert_eq!(answered, (0..*taken).collect::<Vec<_>>(), "none was lost");
    }
    let Some((mut alice, ask, taken)) = alices.pop() else { panic!("there are eight") };
    until("there is room again", async || alice.publish(ask(taken)).await.unwrap().code < 0x80).await;
    assert_eq!(reference(&alice.acked_message().await.unwrap()), taken);
}

/// What waits of a topic that the client has left since is not sent.
#[tokio::test]
async fn what_waits_of_a_topic_that_was_left_does_not_come() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v5("alice", "phone").receive_maximum(1).to(&chatd).await.unwrap();
    alice.subscribe("chat/alice/res", 1).await.unwrap();
    let ask = |reference| Publish::new("chat/alice/req/whoami", json!({ "ref": reference }).to_string(), 1);
    alice.publish(ask(1)).await.unwrap();
    let first = alice.message().await.unwrap();
    assert_eq!(first.json()["ref"], Value::from(1));
    alice.publish(ask(2)).await.unwrap();
    eventually("the second waits", PATIENCE, async || waiting(&chatd, "live_queue_bytes").await > 0.0).await;
    alice.unsubscribe("chat/alice/res").await.unwrap();
    alice.acknowledge(&first).await.unwrap();
    nothing_more(&mut alice).await;
    assert_eq!(waiting(&chatd, "live_queue_bytes").await, 0.0);
}

#[tokio::test]
async fn subscriptions_of_one_user() {
    let chatd = Chatd::start_with(Options::default().set("limits.subscriptions_per_user", 3)).await.unwrap();
    let mut phone = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    let mut laptop = Connect::v4("alice", "laptop").to(&chatd).await.unwrap();
    assert_eq!(phone.subscribe_codes(&[("a", 1), ("b", 1), ("chat/alice/inbox", 1)]).await.unwrap().0, [1, 1, 1]);
    // The same filter in another session is one more.
    assert_eq!(laptop.subscribe_codes(&[("a", 1), ("b", 1)]).await.unwrap().0, [1, 0x80]);
    assert_eq!(phone.subscribe_codes(&[("a", 0)]).await.unwrap().0, [0], "it is there already");
    let (codes, properties) = phone.subscribe_codes(&[("c", 1)]).await.unwrap();
    assert_eq!(codes, [QUOTA_EXCEEDED]);
    assert!(properties.reason().unwrap().contains("3 subscriptions"), "{properties:?}");
    assert_eq!(chatd.limited("subscriptions_per_user").await.unwrap(), 2.0);
    let mut bob = Connect::v5("bob", "phone").to(&chatd).await.unwrap();
    bob.subscribe("c", 1).await.unwrap();
    laptop.leave().await.unwrap();
    until("there is room again", async || phone.subscribe("c", 1).await.is_ok()).await;
}

/// A publish that very many subscriptions match costs as much as many: it is the server that looks at them, for everybody.
#[tokio::test]
async fn a_publish_costs_what_its_subscriptions_cost() {
    const LEVELS: usize = 7;
    let mut chatd = Chatd::start().await.unwrap();
    let deep = ["x"; LEVELS].join("/");
    let filters: Vec<String> = (0..1_usize << LEVELS)
        .map(|bits| {
            let level = |at: usize| if bits >> at & 1 == 1 { "+" } else { "x" };
            (0..LEVELS).map(level).collect::<Vec<_>>().join("/")
        })
        .collect();
    let filters: Vec<(&str, u8)> = filters.iter().map(|filter| (filter.as_str(), 0)).collect();
    for nth in 0..8 {
        let mut away = Connect::v5("eve", &format!("away-{nth}")).persistent().to(&chatd).await.unwrap();
        assert!(away.subscribe_codes(&filters).await.unwrap().0.iter().all(|code| *code == 0));
        away.leave().await.unwrap();
    }
    assert!(chatd.terminate().await.unwrap().success());
    chatd.restart_with(Options::default().set("limits.publishes_per_s", 10)).await.unwrap();
    // A thousand subscriptions are more than 30 publishes: three seconds' worth.
    let mut eve = Connect::v5("eve", "publisher").to(&chatd).await.unwrap();
    assert!(eve.publish(Publish::new(deep.as_str(), "x", 1)).await.unwrap().code < 0x80);
    let refused = eve.publish(Publish::new(deep.as_str(), "x", 1)).await.unwrap();
    assert_eq!(refused.code, QUOTA_EXCEEDED);
    assert!(refused.reason.unwrap().starts_with("too_fast: "));
    let mut alice = Connect::v5("alice", "publisher").to(&chatd).await.unwrap();
    for _ in 0..10 {
        assert!(alice.publish(Publish::new("x/y", "x", 1)).await.unwrap().code < 0x80);
    }
}

#[tokio::test]
async fn retained_messages_of_one_user() {
    let options = Options::default().set("limits.user_retained_messages", 2);
    let chatd = Chatd::start_with(options.set("limits.user_retained_bytes", 2_000)).await.unwrap();
    let mut alice = connected(&chatd, Version::V5, "alice").await;
    let mut bob = connected(&chatd, Version::V5, "bob").await;
    for topic in ["a/1", "a/2"] {
        assert!(alice.publish(retained(topic, "x", 1)).await.unwrap().code < 0x80);
    }
    let refused = alice.publish(retained("a/3", "x", 1)).await.unwrap();
    assert_eq!(refused.code, QUOTA_EXCEEDED);
    assert!(refused.reason.unwrap().contains("2 retained messages of one user"));
    assert_eq!(alice.publish(retained("a/1", &"x".repeat(2_000), 1)).await.unwrap().code, QUOTA_EXCEEDED);
    assert!(bob.publish(retained("b/1", "x", 1)).await.unwrap().code < 0x80, "bob has his own share");
    assert_eq!(chatd.limited("user_retained_messages").await.unwrap(), 1.0);
    assert_eq!(chatd.limited("user_retained_bytes").await.unwrap(), 1.0);
    assert!(alice.publish(retained("a/2", "", 1)).await.unwrap().code < 0x80);
    assert!(alice.publish(retained("a/3", "x", 1)).await.unwrap().code < 0x80);
}
