//! Webhooks: signed, in order, at least once, whatever happens to either side; and no sender waits for them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use end_to_end::receiver::{Receiver, Reply};
use end_to_end::{Chatd, Connect, PATIENCE, eventually};
use serde_json::json;

use crate::chat::{listener, numbered, sends};

#[tokio::test]
async fn every_message_is_posted_in_order_though_posts_fail() {
    let replies = [Reply::Status(500), Reply::Status(302), Reply::Status(200)];
    let counter = std::sync::atomic::AtomicUsize::new(0);
    // The first attempts at the first few events fail, each in its way.
    let mut receiver = Receiver::start(move |attempt| match (counter.fetch_add(1, Ordering::Relaxed), attempt) {
        (..8, 1) => replies[0],
        (..8, 2) => replies[1],
        _ => replies[2],
    })
    .await
    .unwrap();
    let chatd = Chatd::start_with(receiver.options("message.stored")).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    for peer in ["bob", "carol"] {
        alice.publish_all(sends("alice", peer, numbered("text", 1..=50))).await.unwrap();
    }
    let events = receiver.events(100).await.unwrap();
    for conversation in ["alice:bob", "alice:carol"] {
        let of = events.iter().filter(|event| event.body["data"]["conversation"] == conversation);
        let (seqs, texts): (Vec<_>, Vec<_>) =
            of.map(|event| (event.seq(), event.body["data"]["text"].as_str().unwrap().to_owned())).unzip();
        assert_eq!(seqs, (1..=50).collect::<Vec<_>>());
        assert_eq!(texts, numbered("text", 1..=50).collect::<Vec<_>>());
    }
    assert!(events.iter().all(|event| event.kind() == "message.stored"));
    assert_eq!(events.iter().map(|event| &event.id).collect::<BTreeSet<_>>().len(), 100);
    assert!(receiver.attempts() > 100);
    // Both are counted when the answer has come back.
    eventually("the metrics say so", PATIENCE, async || {
        let metrics = chatd.metrics().await.unwrap();
        metrics.get("chatd_webhook_posts_total{event=\"message.stored\"}") == Some(&100.0)
            && metrics.get("chatd_webhook_lag_messages{event=\"message.stored\"}") == Some(&0.0)
            && metrics["chatd_webhook_failures_total{event=\"message.stored\"}"] >= 2.0
    })
    .await;
}

#[tokio::test]
async fn a_status_is_an_answer_though_its_body_never_ends() {
    let mut receiver = Receiver::start(|_| Reply::Endless).await.unwrap();
    let chatd = Chatd::start_with(receiver.options("message.stored")).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.publish_all(sends("alice", "bob", numbered("text", 1..=3))).await.unwrap();
    let events = receiver.events(3).await.unwrap();
    assert_eq!(events.iter().map(|event| event.seq()).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(receiver.attempts(), 3);
}

#[tokio::test]
async fn nothing_is_left_out_when_chatd_is_killed() {
    let open = Arc::new(AtomicBool::new(true));
    let is_open = Arc::clone(&open);
    let mut receiver =
        Receiver::start(move |_| if is_open.load(Ordering::Relaxed) { Reply::Status(200) } else { Reply::Status(503) })
            .await
            .unwrap();
    let mut chatd = Chatd::start_with(receiver.options("message.stored")).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.publish_all(sends("alice", "bob", numbered("text", 1..=20))).await.unwrap();
    let before = receiver.events(20).await.unwrap();
    open.store(false, Ordering::Relaxed);
    alice.publish_all(sends("alice", "bob", numbered("text", 21..=40))).await.unwrap();
    chatd.kill9().await.unwrap();
    open.store(true, Ordering::Relaxed);
    chatd.restart().await.unwrap();

    let mut seen: Vec<(u64, String)> = before.iter().map(|event| (event.seq(), event.id.clone())).collect();
    let mut after = 0;
    while after < 40 {
        let event = receiver.event().await.unwrap();
        assert!(event.seq() <= after + 1 || after == 0, "{} after {after}", event.seq());
        after = event.seq();
        seen.push((event.seq(), event.id));
    }
    // What comes again has the id that it had.
    let ids: BTreeSet<&(u64, String)> = seen.iter().collect();
    assert_eq!(ids.iter().map(|(seq, _)| *seq).collect::<Vec<_>>(), (1..=40).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_receiver_that_never_answers_slows_no_sender() {
    let receiver = Receiver::start(|_| Reply::Nothing).await.unwrap();
    let chatd = Chatd::start_with(receiver.options("message.stored, message.waiting, presence")).await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "phone")).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    let began = std::time::Instant::now();
    alice.publish_all(sends("alice", "bob", numbered("text", 1..=2_000))).await.unwrap();
    bob.acked_messages(2_000).await.unwrap();
    // One post alone takes a second to fail, and there are 2,000.
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    eventually("posts are tried", PATIENCE, async || receiver.attempts() > 0).await;
}

#[tokio::test]
async fn waiting_is_told_only_of_those_who_are_away() {
    let mut receiver = Receiver::start(|_| Reply::Status(200)).await.unwrap();
    let chatd = Chatd::start_with(receiver.options("message.waiting")).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.say("alice", "bob", "you are not there").await.unwrap();
    let event = receiver.event().await.unwrap();
    assert_eq!((event.kind(), event.seq()), ("message.waiting", 1));
    assert_eq!(event.body["data"]["text"], "you are not there");
    let mut bob = listener(&chatd, Connect::v5("bob", "phone").persistent()).await.unwrap();
    bob.acked_message().await.unwrap();
    alice.say("alice", "bob", "you have it").await.unwrap();
    bob.acked_message().await.unwrap();
    alice.say("alice", "bob", "you are there, but do not take it").await.unwrap();
    bob.message().await.unwrap();
    bob.leave().await.unwrap();
    alice.say("alice", "bob", "you are not there again").await.unwrap();
    let events = receiver.events(2).await.unwrap();
    assert_eq!(events.iter().map(|event| event.seq()).collect::<Vec<_>>(), [3, 4]);
}

#[tokio::test]
async fn presence_is_posted_after_a_reset() {
    let mut receiver = Receiver::start(|_| Reply::Status(200)).await.unwrap();
    let options = receiver.options("presence").set("limits.presence_grace_ms", 0);
    let chatd = Chatd::start_with(options).await.unwrap();
    let reset = receiver.event().await.unwrap();
    assert_eq!(reset.kind(), "presence.reset");
    assert!(reset.body["data"]["at"].as_u64().is_some());
    let alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    let online = receiver.event().await.unwrap();
    assert_eq!(online.body, json!({"type": "presence", "data": {"user": "alice", "status": "online"}}));
    alice.leave().await.unwrap();
    let offline = receiver.event().await.unwrap();
    assert_eq!(offline.body["data"]["status"], "offline");
    assert!(offline.body["data"]["last_seen"].as_u64().is_some());
}
