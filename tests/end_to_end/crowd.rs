//! Presence in a crowd: somebody with 10,000 conversations comes and goes, and only those who look are told, and nobody else is disturbed.

use std::time::{Duration, Instant};

use end_to_end::packet::Packet;
use end_to_end::{Chatd, Client, Connect, Options};
use serde_json::json;

use crate::chat::{Told, assert_well, put_messages};

const CONVERSATIONS: usize = 10_000;
const WATCHERS: usize = 300;
const ROUNDS: usize = 5;

fn watcher(nth: usize) -> String {
    format!("watcher-{nth}")
}

/// The next change of the star's, which has to be to this state. RETAIN=1 tells how it is when the subscription begins, and no change.
async fn told(client: &mut Client, me: &str, status: &str) {
    let topic = format!("chat/{me}/event/presence");
    let mut event = client.acked_message_on(&topic).await.unwrap();
    while event.retain {
        event = client.acked_message_on(&topic).await.unwrap();
    }
    let event = event.json();
    assert_eq!((&event["user"], &event["status"]), (&json!("star"), &json!(status)), "{event}");
}

#[tokio::test]
async fn somebody_with_10_000_conversations_comes_and_goes() {
    let mut chatd = Chatd::start_with(Options::default().set("limits.presence_grace_ms", 50)).await.unwrap();
    assert!(chatd.terminate().await.unwrap().success());
    let hello = |nth| Told { from: "star".to_owned(), to: watcher(nth), text: "hello".to_owned(), days_ago: 0 };
    put_messages(&chatd.data(), (0..CONVERSATIONS).map(hello)).await;
    chatd.restart().await.unwrap();

    // Of the 10,000 some look, all over the list; and two others chat, who have nothing to do with any of it.
    let mut watchers = Vec::new();
    for nth in (0..CONVERSATIONS).step_by(CONVERSATIONS / WATCHERS) {
        let me = watcher(nth);
        let mut client = Connect::v5(&me, "phone").to(&chatd).await.unwrap();
        client.subscribe(&format!("chat/{me}/event/presence"), 1).await.unwrap();
        watchers.push((me, client));
    }
    let mut innocent = Connect::v5("innocent", "phone").to(&chatd).await.unwrap();
    let mut longest = Duration::ZERO;
    let mut slowest = Duration::ZERO;
    for round in 0..ROUNDS {
        let began = Instant::now();
        let star = Connect::v5("star", "phone").to(&chatd).await.unwrap();
        let asked = Instant::now();
        innocent.say("innocent", "friend", "hello").await.unwrap();
        slowest = slowest.max(asked.elapsed());
        for (me, client) in &mut watchers {
            told(client, me, "online").await;
        }
        longest = longest.max(began.elapsed());
        star.leave().await.unwrap();
        for (me, client) in &mut watchers {
            told(client, me, "offline").await;
        }
        println!("round {round}: told after {longest:?} at most; another's PUBACK after {slowest:?} at most");
    }
    // Nobody was told anything twice.
    for (me, client) in &mut watchers {
        let rest: Vec<Packet> = client.ping().await.unwrap();
        assert!(rest.is_empty(), "{me}: {rest:?}");
    }
    assert_well(&chatd).await;
}
