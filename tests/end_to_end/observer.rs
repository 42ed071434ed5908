//! An observer reads what everybody writes, and nobody notices.

use end_to_end::chatd::Options;
use end_to_end::packet::{Publish, Version};
use end_to_end::programs::Subscriber;
use end_to_end::{Chatd, Client, Connect};

use crate::chat::{listener, number, numbered, sends};

async fn observed() -> Chatd {
    Chatd::start_with(Options::default().set("auth.observers", "eve")).await.unwrap()
}

/// Topic, sender and seq of a message.
fn seen(message: &Publish) -> (String, String, u64) {
    let envelope = message.json();
    (message.topic.clone(), envelope["from"].as_str().unwrap().to_owned(), number(&envelope, "seq"))
}

/// What an observer of `chat/#` gets of this text: the receiver's copy and the sender's, on their own topics.
fn both(from: &str, to: &str, seq: u64) -> [(String, String, u64); 2] {
    [format!("chat/{to}/inbox"), format!("chat/{from}/sent")].map(|topic| (topic, from.to_owned(), seq))
}

/// The next so many stored messages; events in between are left out.
async fn stored(client: &mut Client, n: usize) -> Vec<(String, String, u64)> {
    let mut all = Vec::new();
    while all.len() < n {
        let message = client.acked_message().await.unwrap();
        if !message.topic.contains("/event/") {
            all.push(seen(&message));
        }
    }
    all.sort();
    all
}

fn sorted(expected: impl IntoIterator<Item = [(String, String, u64); 2]>) -> Vec<(String, String, u64)> {
    let mut expected: Vec<_> = expected.into_iter().flatten().collect();
    expected.sort();
    expected
}

#[tokio::test]
async fn an_observer_gets_everything_wherever_it_was() {
    let mut chatd = observed().await;
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.say("alice", "bob", "before").await.unwrap();
    let tail = Connect::v5("eve", "tail").persistent();
    let mut eve = tail.to(&chatd).await.unwrap();
    eve.subscribe("chat/#", 1).await.unwrap();

    // Live, from now on.
    alice.say("alice", "bob", "live").await.unwrap();
    let mut carol = Connect::v4("carol", "phone").to(&chatd).await.unwrap();
    carol.say("carol", "dave", "live").await.unwrap();
    assert_eq!(stored(&mut eve, 4).await, sorted([both("alice", "bob", 2), both("carol", "dave", 1)]));

    // Missed while away, across a crash.
    eve.leave().await.unwrap();
    alice.publish_all(sends("alice", "bob", numbered("away", 3..=150))).await.unwrap();
    carol.say("carol", "dave", "away").await.unwrap();
    chatd.kill9().await.unwrap();
    chatd.restart().await.unwrap();
    let mut eve = tail.to(&chatd).await.unwrap();
    assert!(eve.session_present());
    let expected = (3..=150).map(|seq| both("alice", "bob", seq)).chain([both("carol", "dave", 2)]);
    assert_eq!(stored(&mut eve, 298).await, sorted(expected));

    // And live again behind it.
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.say("alice", "bob", "live").await.unwrap();
    assert_eq!(stored(&mut eve, 2).await, sorted([both("alice", "bob", 151)]));
}

#[tokio::test]
async fn what_an_observer_reads_is_not_delivered() {
    let chatd = observed().await;
    let mut eve = Connect::v5("eve", "tail").to(&chatd).await.unwrap();
    eve.subscribe("chat/+/inbox", 1).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.subscribe("chat/alice/event/receipt", 1).await.unwrap();
    alice.say("alice", "bob", "one").await.unwrap();
    assert_eq!(stored(&mut eve, 1).await, [("chat/bob/inbox".to_owned(), "alice".to_owned(), 1)]);
    eve.ping().await.unwrap();

    // Bob's first device still gets it, and only that makes it delivered.
    let mut bob = listener(&chatd, Connect::v4("bob", "phone")).await.unwrap();
    let message = bob.message().await.unwrap();
    assert!(alice.ping().await.unwrap().is_empty(), "nothing was delivered yet");
    bob.acknowledge(&message).await.unwrap();
    let receipt = alice.acked_message().await.unwrap().json();
    assert_eq!((receipt["with"].as_str(), number(&receipt, "delivered")), (Some("bob"), 1));
}

#[tokio::test]
async fn an_observer_sees_events_that_are_told() {
    let chatd = observed().await;
    let mut eve = Connect::v5("eve", "tail").to(&chatd).await.unwrap();
    eve.subscribe("chat/+/event/+", 1).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.subscribe("chat/alice/event/receipt", 1).await.unwrap();
    let mut bob = listener(&chatd, Connect::v4("bob", "phone")).await.unwrap();
    alice.say("alice", "bob", "one").await.unwrap();
    bob.acked_message().await.unwrap();
    let event = eve.acked_message_on("chat/alice/event/receipt").await.unwrap().json();
    assert_eq!(number(&event, "delivered"), 1);
}

#[tokio::test]
async fn only_an_observer_may() {
    let chatd = observed().await;
    for version in [Version::V4, Version::V5] {
        let mut alice = Connect::new(version, "alice", "phone").to(&chatd).await.unwrap();
        let filters =
            [("chat/#", 1), ("chat/+/inbox", 1), ("chat/+/event/+", 1), ("chat/bob/inbox", 1), ("chat/alice/#", 1)];
        let (codes, _) = alice.subscribe_codes(&filters).await.unwrap();
        let refused = if version == Version::V5 { 0x87 } else { 0x80 };
        assert_eq!(codes, [refused, refused, refused, refused, 1]);
        let mut eve = Connect::new(version, "eve", "tail").to(&chatd).await.unwrap();
        let filters = [("chat/#", 2), ("chat/+/sent", 0), ("chat/+/res", 1), ("chat/bob/out/#", 1), ("chat/eve/#", 1)];
        let (codes, properties) = eve.subscribe_codes(&filters).await.unwrap();
        assert_eq!(codes, [1, 0, refused, refused, 1]);
        if version == Version::V5 {
            assert!(properties.reason().unwrap().contains("as an observer also to chat/#"));
        }
    }
}

#[tokio::test]
async fn mosquitto_sub_observes() {
    let chatd = observed().await;
    let arguments = ["-u", "eve", "-i", "tail", "-q", "1", "-t", "chat/+/inbox", "-F", "%t %p", "-d"];
    let mut eve = Subscriber::mosquitto(&chatd, &arguments).unwrap();
    eve.subscribed().await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.say("alice", "bob", "seen by eve").await.unwrap();
    let line = eve.line().await.unwrap();
    assert!(line.starts_with("chat/bob/inbox {") && line.contains("seen by eve"), "{line}");
}
