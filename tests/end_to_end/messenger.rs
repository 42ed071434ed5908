//! What makes a messenger of it: receipts, requests, edits, blocks, typing and presence.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use end_to_end::packet::{Packet, Properties, Publish, Value as Property};
use end_to_end::programs::{self, Dialogue};
use end_to_end::{Chatd, Client, Connect, Dice, Options, PATIENCE, contract, eventually};
use serde_json::{Value, json};

use crate::chat::{assert_well, listener, number, numbered, sends, seqs, texts, without_presence};

/// MQTT 5 property identifiers.
const RESPONSE_TOPIC: u8 = 0x08;
const CORRELATION_DATA: u8 = 0x09;

/// A client that hears answers and events.
async fn device(chatd: &Chatd, connect: Connect) -> Client {
    let me = connect.user_name.clone().unwrap();
    let mut client = connect.to(chatd).await.unwrap();
    client.subscribe(&format!("chat/{me}/res"), 1).await.unwrap();
    client.subscribe(&format!("chat/{me}/event/+"), 1).await.unwrap();
    client
}

/// Asks, and returns the whole answer.
async fn ask(client: &mut Client, me: &str, method: &str, mut members: Value) -> Value {
    let reference = client.packet_id();
    members["ref"] = json!(reference);
    client.publish(Publish::new(format!("chat/{me}/req/{method}"), members.to_string(), 1)).await.unwrap();
    loop {
        let answer = client.acked_message_on(&format!("chat/{me}/res")).await.unwrap().json();
        if answer["ref"] == reference {
            contract::check(&format!("response-{method}"), &answer).unwrap();
            return answer;
        }
    }
}

/// Asks for what can be answered.
async fn ok(client: &mut Client, me: &str, method: &str, members: Value) -> Value {
    let answer = ask(client, me, method, members.clone()).await;
    assert!(answer["ok"].is_object(), "{method} {members}: {answer}");
    contract::check(&format!("request-{method}"), &members).unwrap();
    answer["ok"].clone()
}

/// Asks for what is refused; with which code.
async fn refused(client: &mut Client, me: &str, method: &str, members: Value) -> String {
    let answer = ask(client, me, method, members.clone()).await;
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert!(message.len() > 10, "{method} {members}: {answer}");
    answer["error"]["code"].as_str().unwrap().to_owned()
}

/// The next event of a kind that says this.
async fn event(client: &mut Client, me: &str, kind: &str, wanted: Value) {
    loop {
        let event = client.acked_message_on(&format!("chat/{me}/event/{kind}")).await.unwrap().json();
        if event == wanted {
            return;
        }
    }
}

async fn read(client: &mut Client, me: &str, peer: &str, seq: u64) -> u8 {
    client.publish(Publish::new(format!("chat/{me}/read/{peer}"), seq.to_string(), 1)).await.unwrap().code
}

#[tokio::test]
async fn receipts_are_the_receivers_pubacks() {
    let mut chatd = Chatd::start().await.unwrap();
    let bob_phone = Connect::v5("bob", "bob-phone").persistent();
    listener(&chatd, bob_phone.clone()).await.unwrap().leave().await.unwrap();
    let mut alice = device(&chatd, Connect::v5("alice", "alice-phone")).await;
    alice.publish_all(sends("alice", "bob", numbered("text", 1..=5))).await.unwrap();
    let mut bob = bob_phone.to(&chatd).await.unwrap();
    let mut messages = Vec::new();
    for _ in 0..5 {
        messages.push(bob.message().await.unwrap());
    }
    for message in &messages[..3] {
        bob.acknowledge(message).await.unwrap();
    }
    event(&mut alice, "alice", "receipt", json!({"with": "bob", "delivered": 3, "read": 0})).await;
    // Read is delivered, whatever was acknowledged.
    let mut laptop = device(&chatd, Connect::v4("bob", "bob-laptop")).await;
    assert_eq!(read(&mut bob, "bob", "alice", 4).await, 0);
    event(&mut alice, "alice", "receipt", json!({"with": "bob", "delivered": 4, "read": 4})).await;
    event(&mut laptop, "bob", "read", json!({"with": "alice", "read": 4})).await;
    // Only forward, and not beyond the end.
    assert_eq!(read(&mut bob, "bob", "alice", 2).await, 0);
    assert_eq!(read(&mut bob, "bob", "alice", 6).await, 0x83);
    assert_eq!(read(&mut bob, "bob", "carol", 1).await, 0x83);
    for message in &messages[3..] {
        bob.acknowledge(message).await.unwrap();
    }
    event(&mut alice, "alice", "receipt", json!({"with": "bob", "delivered": 5, "read": 4})).await;
    // The cursors are there for whoever missed the events, and after a crash: written, or said again.
    bob.leave().await.unwrap();
    assert!(chatd.terminate().await.unwrap().success());
    chatd.restart().await.unwrap();
    let mut alice = device(&chatd, Connect::v4("alice", "alice-phone")).await;
    let list = ok(&mut alice, "alice", "conversations", json!({})).await;
    let conversation = &list["conversations"][0];
    assert_eq!((number(conversation, "delivered"), number(conversation, "read")), (5, 4));
    assert_well(&chatd).await;
}

/// As JSON a text may be six times as long.
#[tokio::test]
async fn answers_arrive_however_long_the_texts_are() {
    const TEXTS: usize = 40;
    let chatd = Chatd::start().await.unwrap();
    let text = "\u{1}".repeat(16_300);
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.publish_all(sends("alice", "bob", vec![text.clone(); TEXTS].into_iter())).await.unwrap();
    for peer in 1..TEXTS {
        alice.say("alice", &format!("peer-{peer}"), &text).await.unwrap();
    }
    let mut bob = device(&chatd, Connect::v5("bob", "phone")).await;
    let (mut since, mut synced) = (json!({}), Vec::new());
    loop {
        let page = ok(&mut bob, "bob", "sync", since).await;
        synced.extend(page["entries"].as_array().unwrap().iter().map(|entry| number(entry, "seq")));
        since = json!({"since": page["next"]});
        if page["more"] == false {
            break;
        }
    }
    assert_eq!(synced, (1..=TEXTS as u64).collect::<Vec<_>>());
    let (mut range, mut seen) = (json!({"with": "alice", "limit": 200}), Vec::new());
    loop {
        let page = ok(&mut bob, "bob", "history", range).await;
        let entries = page["entries"].as_array().unwrap();
        assert!(entries.len() > 1 && entries.len() < 10, "{} entries", entries.len());
        seen.extend(entries.iter().rev().map(|entry| number(entry, "seq")));
        range = json!({"with": "alice", "limit": 200, "before": seen.last()});
        if page["more"] == false {
            break;
        }
    }
    assert_eq!(seen, (1..=TEXTS as u64).rev().collect::<Vec<_>>());
    let mut alice = device(&chatd, Connect::v4("alice", "laptop")).await;
    let (mut before, mut peers) = (json!({"limit": 200}), Vec::new());
    loop {
        let page = ok(&mut alice, "alice", "conversations", before).await;
        let conversations = page["conversations"].as_array().unwrap();
        assert!(conversations.len() < 10, "{} conversations", conversations.len());
        peers.extend(conversations.iter().map(|conversation| conversation["with"].as_str().unwrap().to_owned()));
        if page["next"].is_null() {
            break;
        }
        before = json!({"limit": 200, "before": page["next"]});
    }
    peers.sort_unstable();
    peers.dedup();
    assert_eq!(peers.len(), TEXTS);
}

/// rumqttd notes every topic for ever, and a client chooses the topic of an answer.
#[tokio::test]
async fn a_topic_for_each_answer_leaves_no_trace() {
    const REQUESTS: u64 = 15_000;
    /// The allocator's own growth comes to an end. A trace of each topic, 60 bytes long, never lets four rounds pass with less than 3.6 MB.
    const ROUNDS_MAX: usize = 60;
    const GROWTH_MAX_KB: u64 = 1_536;
    let chatd = Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap();
    let mut alice = device(&chatd, Connect::v5("alice", "phone")).await;
    let mut memory = Vec::new();
    let has_settled = |memory: &[u64]| match memory {
        [.., before, _, _, _, now] => *now < before + GROWTH_MAX_KB,
        _ => false,
    };
    while !has_settled(&memory) {
        let round = memory.len();
        assert!(round < ROUNDS_MAX, "it grows and grows: {memory:?} KB");
        let asks = (0..REQUESTS).map(|n| {
            let token = format!("chat/alice/res/{round}-{n:-<50}");
            let properties = Properties::none().with(RESPONSE_TOPIC, Property::Text(token));
            Publish { properties, ..Publish::new("chat/alice/req/whoami", "{}", 1) }
        });
        alice.publish_all(asks).await.unwrap();
        memory.push(chatd.memory_kb().unwrap());
    }
}

#[tokio::test]
async fn ten_thousand_messages_make_few_receipts() {
    const MESSAGES: u64 = 10_000;
    let chatd = Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap();
    let mut alice = device(&chatd, Connect::v5("alice", "alice-phone")).await;
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone").receive_maximum(20)).await.unwrap();
    let receiving = tokio::spawn(async move {
        bob.acked_messages(usize::try_from(MESSAGES).unwrap()).await.unwrap();
        bob
    });
    alice.publish_all(sends("alice", "bob", numbered("text", 1..=MESSAGES))).await.unwrap();
    let mut receipts: Vec<u64> = Vec::new();
    while receipts.last() != Some(&MESSAGES) {
        let receipt = alice.acked_message_on("chat/alice/event/receipt").await.unwrap().json();
        receipts.push(number(&receipt, "delivered"));
    }
    assert!(receipts.is_sorted_by(|a, b| a < b), "{receipts:?}");
    assert!(receipts.len() as u64 <= MESSAGES / 10, "{} receipts", receipts.len());
    receiving.await.unwrap().leave().await.unwrap();
}

#[tokio::test]
async fn edits_and_unsends_are_entries_and_unsent_words_are_gone() {
    let mut chatd = Chatd::start_with(Options::default().set("storage.erase_interval_ms", 200)).await.unwrap();
    let mut alice = device(&chatd, Connect::v5("alice", "alice-phone")).await;
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone").persistent()).await.unwrap();
    for text in ["first", "secret words", "third"] {
        alice.say("alice", "bob", text).await.unwrap();
    }
    bob.acked_messages(3).await.unwrap();
    let edit = json!({"with": "bob", "seq": 1, "text": "first, better", "id": "e-1"});
    let edited = ok(&mut alice, "alice", "edit", edit.clone()).await;
    assert_eq!(number(&edited, "seq"), 4);
    assert_eq!(number(&ok(&mut alice, "alice", "edit", edit).await, "seq"), 4, "a resend");
    let live = bob.acked_message().await.unwrap().json();
    assert_eq!((&live["kind"], &live["target"], &live["text"]), (&json!("edit"), &json!(1), &json!("first, better")));
    bob.leave().await.unwrap();
    let edit = json!({"with": "bob", "seq": 2, "text": "secret too", "id": "e-2"});
    ok(&mut alice, "alice", "edit", edit.clone()).await;
    let unsend = json!({"with": "bob", "seq": 2, "id": "u-1"});
    assert_eq!(number(&ok(&mut alice, "alice", "unsend", unsend.clone()).await, "seq"), 6);
    assert_eq!(number(&ok(&mut alice, "alice", "unsend", unsend.clone()).await, "seq"), 6, "a resend");

    assert_eq!(number(&ok(&mut alice, "alice", "edit", edit).await, "seq"), 5, "a resend, though it is taken back");

    eventually("the words are not in the files any more", PATIENCE, async || {
        ["log.redb", "log.journal", "index.redb"].iter().all(|file| {
            let bytes = std::fs::read(chatd.data().join(file)).unwrap();
            let has = |words: &[u8]| bytes.windows(words.len()).any(|window| window == words);
            !has(b"secret words") && !has(b"secret too")
        })
    })
    .await;

    // What cannot be.
    for (method, members, code) in [
        ("edit", json!({"with": "bob", "seq": 2, "text": "again"}), "invalid_seq"),
        ("unsend", json!({"with": "bob", "seq": 2}), "invalid_seq"),
        ("edit", json!({"with": "bob", "seq": 4, "text": "an edit of an edit"}), "invalid_seq"),
        ("edit", json!({"with": "bob", "seq": 99, "text": "x"}), "invalid_seq"),
        ("edit", json!({"with": "bob", "seq": 1, "text": ""}), "empty_text"),
        ("edit", json!({"with": "bob", "seq": 1, "text": "x".repeat(20_000)}), "text_too_long"),
        ("edit", json!({"with": "carol", "seq": 1, "text": "x"}), "unknown_conversation"),
        ("edit", json!({"with": "alice", "seq": 1, "text": "x"}), "self_message"),
        ("edit", json!({"with": "bob", "seq": 3, "text": "other", "id": "e-1"}), "id_conflict"),
    ] {
        assert_eq!(refused(&mut alice, "alice", method, members.clone()).await, code, "{method} {members}");
    }
    let mut laptop = device(&chatd, Connect::v4("bob", "bob-laptop")).await;
    assert_eq!(
        refused(&mut laptop, "bob", "edit", json!({"with": "alice", "seq": 1, "text": "x"})).await,
        "not_authorized"
    );

    for round in 0..2 {
        let history = ok(&mut alice, "alice", "history", json!({"with": "bob"})).await;
        let entries = history["entries"].as_array().unwrap();
        let seen: Vec<(u64, Option<&str>, bool)> = entries
            .iter()
            .map(|entry| (number(entry, "seq"), entry["text"].as_str(), entry["unsent"] == json!(true)))
            .collect();
        assert_eq!(seen, [(1, Some("first, better"), false), (2, None, true), (3, Some("third"), false)]);
        assert_eq!(entries[0]["edited_at"], edited["at"]);
        let raw = ok(&mut alice, "alice", "history", json!({"with": "bob", "raw": true})).await;
        let kinds: Vec<&str> =
            raw["entries"].as_array().unwrap().iter().map(|entry| entry["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["text", "erased", "text", "edit", "erased", "unsend"]);
        if round == 0 {
            chatd.kill9().await.unwrap();
            chatd.restart().await.unwrap();
            alice = device(&chatd, Connect::v5("alice", "alice-phone")).await;
        }
    }
    // Whoever was away learns that there was something, and not what.
    let mut bob = Connect::v5("bob", "bob-phone").persistent().to(&chatd).await.unwrap();
    let kinds: Vec<Value> =
        bob.acked_messages(2).await.unwrap().iter().map(|message| message.json()["kind"].clone()).collect();
    assert_eq!(kinds, [json!("erased"), json!("unsend")]);
    assert!(chatd.terminate().await.unwrap().success());
    let (code, problems, said) = chatd.tool(&["verify"]).await.unwrap();
    assert_eq!((code, problems.as_str()), (Some(0), ""), "{said}");
    let (_, exported, _) = chatd.tool(&["export"]).await.unwrap();
    assert!(!exported.contains("secret"), "{exported}");
}

#[tokio::test]
async fn history_is_exact_while_messages_arrive() {
    let chatd = Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    let mut bob = device(&chatd, Connect::v4("bob", "bob-phone")).await;
    alice.publish_all(sends("alice", "bob", numbered("text", 1..=1_000))).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let sending = tokio::spawn(async move {
        let mut sent = 1_000;
        while !told.load(Ordering::Relaxed) {
            alice.publish_all(sends("alice", "bob", numbered("text", sent + 1..=sent + 20))).await.unwrap();
            sent += 20;
        }
        sent
    });
    for limit in [7, 50, 200] {
        let mut page = ok(&mut bob, "bob", "history", json!({"with": "alice", "limit": limit})).await;
        let mut backwards: Vec<u64> = Vec::new();
        loop {
            let seqs: Vec<u64> = page["entries"].as_array().unwrap().iter().map(|entry| number(entry, "seq")).collect();
            assert!(seqs.len() <= limit && seqs.is_sorted());
            backwards.extend(seqs.iter().rev());
            if page["more"] == json!(false) {
                break;
            }
            let before = backwards.last().unwrap();
            page = ok(&mut bob, "bob", "history", json!({"with": "alice", "limit": limit, "before": before})).await;
        }
        backwards.reverse();
        assert!(backwards.len() >= 1_000);
        assert_eq!(backwards, (1..=backwards.len() as u64).collect::<Vec<_>>(), "backwards by {limit}");
        let mut forwards: Vec<u64> = Vec::new();
        while forwards.len() < backwards.len() {
            let after = forwards.last().copied().unwrap_or(0);
            let page = ok(&mut bob, "bob", "history", json!({"with": "alice", "limit": limit, "after": after})).await;
            forwards.extend(page["entries"].as_array().unwrap().iter().map(|entry| number(entry, "seq")));
        }
        assert_eq!(forwards, (1..=forwards.len() as u64).collect::<Vec<_>>(), "forwards by {limit}");
    }
    stop.store(true, Ordering::Relaxed);
    let sent = sending.await.unwrap();
    let last = ok(&mut bob, "bob", "history", json!({"with": "alice", "limit": 1})).await;
    assert_eq!(number(&last["entries"][0], "seq"), sent);
}

#[tokio::test]
async fn conversations_are_listed_with_what_is_unread() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = device(&chatd, Connect::v4("bob", "bob-phone")).await;
    for peer in ["carol", "dave", "eve"] {
        let mut peer_phone = Connect::v5(peer, "phone").to(&chatd).await.unwrap();
        for text in ["one", "two", "three"] {
            peer_phone.say(peer, "bob", text).await.unwrap();
        }
        peer_phone.leave().await.unwrap();
    }
    // Later than what came before, by the server's clock.
    let last = ok(&mut bob, "bob", "history", json!({"with": "eve", "limit": 1})).await;
    while ok(&mut bob, "bob", "whoami", json!({})).await["at"] == last["entries"][0]["at"] {}
    bob.say("bob", "carol", "an answer").await.unwrap();
    assert_eq!(read(&mut bob, "bob", "dave", 1).await, 0);
    let list = ok(&mut bob, "bob", "conversations", json!({})).await;
    let seen: Vec<(&str, u64, &str, u64)> = list["conversations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            let last = one["last"]["text"].as_str().unwrap();
            (one["with"].as_str().unwrap(), number(one, "unread"), last, number(one, "my_read"))
        })
        .collect();
    assert_eq!(seen, [("carol", 0, "an answer", 0), ("eve", 3, "three", 0), ("dave", 2, "three", 1)]);
    // Page by page it is the same.
    let mut paged = Vec::new();
    let mut members = json!({"limit": 1});
    loop {
        let page = ok(&mut bob, "bob", "conversations", members.clone()).await;
        paged.extend(page["conversations"].as_array().unwrap().clone());
        let Some(next) = page["next"].as_str() else { break };
        members["before"] = json!(next);
    }
    assert_eq!(json!(paged), list["conversations"]);
    // What one deletes for oneself is not unread, and is there for the other.
    ok(&mut bob, "bob", "delete", json!({"with": "eve", "seq": 3})).await;
    assert_eq!(refused(&mut bob, "bob", "delete", json!({"with": "eve", "seq": 4})).await, "invalid_seq");
    let list = ok(&mut bob, "bob", "conversations", json!({})).await;
    let of_eve = &list["conversations"][1];
    assert_eq!((number(of_eve, "unread"), &of_eve["last"]["text"]), (2, &json!("two")));
    let mut eve = device(&chatd, Connect::v5("eve", "eve-phone")).await;
    let history = ok(&mut eve, "eve", "history", json!({"with": "bob"})).await;
    assert_eq!(history["entries"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn whoever_is_blocked_notices_nothing() {
    let mut chatd = Chatd::start().await.unwrap();
    let mut bob = device(&chatd, Connect::v5("bob", "bob-phone")).await;
    bob.subscribe("chat/bob/inbox", 1).await.unwrap();
    let mut alice = device(&chatd, Connect::v5("alice", "alice-phone")).await;
    assert_eq!(alice.say("alice", "bob", "before").await.unwrap().seq, Some(1));
    bob.acked_message_on("chat/bob/inbox").await.unwrap();
    event(&mut alice, "alice", "receipt", json!({"with": "bob", "delivered": 1, "read": 0})).await;
    ok(&mut bob, "bob", "block", json!({"with": "alice"})).await;
    for round in 0..2 {
        let ack = alice.say("alice", "bob", "withheld").await.unwrap();
        assert_eq!((ack.code, ack.seq), (0, Some(2 + round)));
        alice.publish(Publish::new("chat/alice/typing/bob", "on", 0)).await.unwrap();
        let history = ok(&mut bob, "bob", "history", json!({"with": "alice"})).await;
        assert_eq!(history["entries"].as_array().unwrap().len(), 1);
        let list = ok(&mut alice, "alice", "conversations", json!({})).await;
        assert_eq!(number(&list["conversations"][0], "delivered"), 1);
        // Nothing came meanwhile, on any topic but the one of the answers and of the presence of others.
        assert_eq!(without_presence(bob.ping().await.unwrap()), []);
        if round == 0 {
            // It holds across a restart.
            assert!(chatd.terminate().await.unwrap().success());
            chatd.restart().await.unwrap();
            bob = device(&chatd, Connect::v5("bob", "bob-phone")).await;
            bob.subscribe("chat/bob/inbox", 1).await.unwrap();
            alice = device(&chatd, Connect::v5("alice", "alice-phone")).await;
        }
    }
    let blocked = ok(&mut bob, "bob", "blocked", json!({})).await;
    assert_eq!(blocked["blocked"][0]["user"], json!("alice"));
    ok(&mut bob, "bob", "unblock", json!({"with": "alice"})).await;
    assert_eq!(ok(&mut bob, "bob", "blocked", json!({})).await, json!({"blocked": []}));
    assert_eq!(alice.say("alice", "bob", "after").await.unwrap().seq, Some(4));
    let message = bob.acked_message_on("chat/bob/inbox").await.unwrap();
    let messages = [message];
    assert_eq!((texts(&messages), seqs(&messages)), (vec!["after".to_owned()], vec![4]));
    assert_eq!(refused(&mut bob, "bob", "block", json!({"with": "bob"})).await, "self_message");
    assert_well(&chatd).await;
}

#[tokio::test]
async fn requests_are_answered_where_they_want_it() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = device(&chatd, Connect::v5("alice", "alice-phone")).await;
    let whoami = ok(&mut alice, "alice", "whoami", json!({})).await;
    assert_eq!((&whoami["user"], &whoami["message_bytes"]), (&json!("alice"), &json!(16_384)));
    // A response topic of one's own, with correlation data.
    alice.subscribe("chat/alice/res/app-1", 1).await.unwrap();
    let properties = Properties::none()
        .with(RESPONSE_TOPIC, Property::Text("chat/alice/res/app-1".to_owned()))
        .with(CORRELATION_DATA, Property::Binary(vec![0, 255, 7]));
    let request = Publish { properties, ..Publish::new("chat/alice/req/blocked", "", 1) };
    alice.publish(request).await.unwrap();
    let answer = alice.acked_message_on("chat/alice/res/app-1").await.unwrap();
    assert_eq!(answer.json(), json!({"ok": {"blocked": []}}));
    assert_eq!(answer.properties.get(CORRELATION_DATA), Some(&Property::Binary(vec![0, 255, 7])));
    // Somebody else's is none.
    for topic in ["chat/bob/res", "chat/alice/inbox", "elsewhere", "chat/alice/res/a/b"] {
        let properties = Properties::none().with(RESPONSE_TOPIC, Property::Text(topic.to_owned()));
        let request = Publish { properties, ..Publish::new("chat/alice/req/whoami", "{}", 1) };
        assert_eq!(alice.publish(request).await.unwrap().code, 0x87, "{topic}");
    }
    for (method, payload, code) in [
        ("nonsense", "{}", "unknown_method"),
        ("whoami", "[]", "invalid_request"),
        ("whoami", "\u{0}", "invalid_request"),
        ("history", "{}", "invalid_request"),
        ("history", r#"{"with":"Bob"}"#, "invalid_peer"),
        ("history", r#"{"with":"bob"}"#, "unknown_conversation"),
        ("sync", r#"{"since":"nonsense"}"#, "invalid_token"),
        ("sync", r#"{"since":"1.0.0.0"}"#, "invalid_token"),
    ] {
        alice.publish(Publish::new(format!("chat/alice/req/{method}"), payload, 1)).await.unwrap();
        let answer = alice.acked_message_on("chat/alice/res").await.unwrap().json();
        assert_eq!(answer["error"]["code"], json!(code), "{method} {payload}: {answer}");
    }
    // MQTT 3.1.1, at QoS 0, with nothing but a topic.
    let mut old = device(&chatd, Connect::v4("bob", "bob-phone")).await;
    old.start_publish(Publish::new("chat/bob/req/whoami", "", 0)).await.unwrap();
    assert_eq!(old.acked_message_on("chat/bob/res").await.unwrap().json()["ok"]["user"], json!("bob"));
    assert_well(&chatd).await;
}

/// What a client knows that keeps itself up by `sync`.
#[derive(Clone, Debug, Default, PartialEq)]
struct Known {
    /// Texts as they stand, by peer and seq; `None`: unsent.
    texts: BTreeMap<(String, u64), Option<String>>,
    deleted: Vec<(String, u64)>,
    conversations: BTreeMap<String, Value>,
}

impl Known {
    fn apply(&mut self, me: &str, answer: &Value) {
        for entry in answer["entries"].as_array().unwrap() {
            let (from, to) = (entry["from"].as_str().unwrap(), entry["to"].as_str().unwrap());
            let peer = if from == me { to } else { from }.to_owned();
            let text = entry["text"].as_str().map(str::to_owned);
            match entry["kind"].as_str().unwrap() {
                "text" => _ = self.texts.insert((peer, number(entry, "seq")), text),
                // An erased edit says nothing; an erased text is one that was unsent.
                "erased" => {}
                "edit" => _ = self.texts.insert((peer, number(entry, "target")), text),
                "unsend" => _ = self.texts.insert((peer, number(entry, "target")), None),
                other => panic!("a kind {other}"),
            }
        }
        for conversation in answer["conversations"].as_array().unwrap() {
            let with = conversation["with"].as_str().unwrap().to_owned();
            let deleted = conversation["deleted"].as_array().cloned().unwrap_or_default();
            self.deleted.extend(deleted.iter().map(|seq| (with.clone(), seq.as_u64().unwrap())));
            let mut conversation = conversation.clone();
            conversation.as_object_mut().unwrap().remove("deleted");
            self.conversations.insert(with, conversation);
        }
        self.deleted.sort();
        self.deleted.dedup();
    }
}

/// Asks until there is no more; the next token.
async fn sync(client: &mut Client, me: &str, known: &mut Known, since: Option<&str>) -> String {
    let mut since = since.map(str::to_owned);
    for _ in 0..1_000 {
        let answer = ok(client, me, "sync", json!({"since": since, "limit": 7})).await;
        known.apply(me, &answer);
        let next = answer["next"].as_str().unwrap().to_owned();
        if answer["more"] == json!(false) {
            return next;
        }
        since = Some(next);
    }
    panic!("a sync that does not end");
}

#[tokio::test]
async fn a_sync_from_any_moment_gives_what_a_fresh_one_gives() {
    const STEPS: usize = 100;
    let mut dice = Dice::thrown("sync");
    let mut chatd = Chatd::start().await.unwrap();
    let users = ["alice", "bob", "carol"];
    let mut clients = Vec::new();
    for user in users {
        let mut client = device(&chatd, Connect::v5(user, "phone")).await;
        client.subscribe(&format!("chat/{user}/inbox"), 1).await.unwrap();
        clients.push(client);
    }
    let mut moments: Vec<(Known, String)> = Vec::new();
    for step in 0..STEPS {
        let from = dice.below(3);
        let to = (from + 1 + dice.below(2)) % 3;
        let (me, peer) = (users[from], users[to]);
        let seq = 1 + dice.below(step + 1);
        match dice.below(10) {
            0..=3 => drop(clients[from].say(me, peer, &format!("text {step}")).await.unwrap()),
            4 => drop(ask(&mut clients[from], me, "edit", json!({"with": peer, "seq": seq, "text": "edited"})).await),
            5 => drop(ask(&mut clients[from], me, "unsend", json!({"with": peer, "seq": seq})).await),
            6 => drop(ask(&mut clients[from], me, "delete", json!({"with": peer, "seq": seq})).await),
            7 => drop(read(&mut clients[from], me, peer, seq as u64).await),
            8 => {
                let method = ["block", "unblock"][dice.below(2)];
                drop(ok(&mut clients[from], me, method, json!({"with": peer})).await);
            }
            _ => drop(clients[to].ping().await.unwrap()),
        }
        let mut known = Known::default();
        let token = sync(&mut clients[0], "alice", &mut known, None).await;
        moments.push((known, token));
        if step == STEPS / 2 {
            clients.clear();
            assert!(chatd.terminate().await.unwrap().success());
            chatd.restart().await.unwrap();
            for user in users {
                clients.push(device(&chatd, Connect::v5(user, "phone")).await);
            }
        }
    }
    let mut fresh = Known::default();
    sync(&mut clients[0], "alice", &mut fresh, None).await;
    assert!(fresh.texts.len() > 5 && !fresh.conversations.is_empty(), "{fresh:?}");
    for (nth, (mut known, token)) in moments.into_iter().enumerate() {
        sync(&mut clients[0], "alice", &mut known, Some(&token)).await;
        assert_eq!(known, fresh, "from moment {nth}");
    }
    assert_well(&chatd).await;
}

#[tokio::test]
async fn typing_is_told_live_and_ends() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v4("alice", "alice-phone").to(&chatd).await.unwrap();
    alice.say("alice", "bob", "hello").await.unwrap();
    let mut bob = device(&chatd, Connect::v5("bob", "bob-phone")).await;
    let said_at = std::time::Instant::now();
    // Told once, however often it is said.
    for _ in 0..20 {
        alice.publish(Publish::new("chat/alice/typing/bob", "on", 1)).await.unwrap();
    }
    let on = bob.acked_message_on("chat/bob/event/typing").await.unwrap();
    assert_eq!((on.qos, on.retain), (0, false));
    assert_eq!(on.json(), json!({"from": "alice", "state": "on"}));
    // Over by itself.
    let off = bob.acked_message_on("chat/bob/event/typing").await.unwrap().json();
    assert_eq!(off, json!({"from": "alice", "state": "off"}));
    assert!(said_at.elapsed().as_secs() >= 5, "{:?}", said_at.elapsed());
    alice.publish(Publish::new("chat/alice/typing/bob", "on", 1)).await.unwrap();
    alice.publish(Publish::new("chat/alice/typing/bob", "off", 1)).await.unwrap();
    event(&mut bob, "bob", "typing", json!({"from": "alice", "state": "off"})).await;
    // Not for whoever comes later, and nothing but on and off.
    alice.publish(Publish::new("chat/alice/typing/bob", "on", 1)).await.unwrap();
    event(&mut bob, "bob", "typing", json!({"from": "alice", "state": "on"})).await;
    let mut laptop = device(&chatd, Connect::v5("bob", "bob-laptop")).await;
    assert_eq!(without_presence(laptop.ping().await.unwrap()), []);
    let mut new = Connect::v5("alice", "alice-laptop").to(&chatd).await.unwrap();
    assert_eq!(new.publish(Publish::new("chat/alice/typing/bob", "perhaps", 1)).await.unwrap().code, 0x99);
    assert_well(&chatd).await;
}

#[tokio::test]
async fn presence_is_told_to_those_who_share_a_conversation() {
    let mut chatd = Chatd::start_with(Options::default().set("limits.presence_grace_ms", 300)).await.unwrap();
    let mut alice = device(&chatd, Connect::v5("alice", "alice-phone")).await;
    alice.say("alice", "bob", "hello").await.unwrap();
    let mut stranger = device(&chatd, Connect::v5("eve", "eve-phone")).await;
    let bob = device(&chatd, Connect::v4("bob", "bob-phone")).await;
    event(&mut alice, "alice", "presence", json!({"user": "bob", "status": "online"})).await;
    // A second device, and a reconnect within the grace, are no news.
    let laptop = device(&chatd, Connect::v4("bob", "bob-laptop")).await;
    bob.leave().await.unwrap();
    laptop.leave().await.unwrap();
    let mut bob = device(&chatd, Connect::v4("bob", "bob-phone")).await;
    // The state that is there comes first.
    assert_eq!(first_state(&mut bob, "bob").await, json!({"user": "alice", "status": "online"}));
    bob.leave().await.unwrap();
    let offline = event_with(&mut alice, "alice", "bob", "offline").await;
    let last_seen = number(&offline, "last_seen");
    let at = number(&ok(&mut alice, "alice", "whoami", json!({})).await, "at");
    assert!(last_seen <= at && at - last_seen < 60_000, "{last_seen}, now {at}");
    // Whoever shares nothing hears nothing; nor does whoever is blocked.
    assert_eq!(stranger.ping().await.unwrap(), []);
    let mut bob = device(&chatd, Connect::v4("bob", "bob-phone")).await;
    event(&mut alice, "alice", "presence", json!({"user": "bob", "status": "online"})).await;
    ok(&mut bob, "bob", "block", json!({"with": "alice"})).await;
    bob.leave().await.unwrap();
    let mut alice_laptop = device(&chatd, Connect::v5("alice", "alice-laptop")).await;
    alice_laptop.ping().await.unwrap();
    // No ghosts: after a crash nobody is there, but when they were is known to those who may.
    let mut bob = device(&chatd, Connect::v4("bob", "bob-phone")).await;
    ok(&mut bob, "bob", "unblock", json!({"with": "alice"})).await;
    bob.leave().await.unwrap();
    event_with(&mut alice, "alice", "bob", "offline").await;
    chatd.kill9().await.unwrap();
    chatd.restart().await.unwrap();
    let mut alice = device(&chatd, Connect::v5("alice", "alice-phone")).await;
    assert_eq!(first_state(&mut alice, "alice").await["status"], json!("offline"));
    assert_well(&chatd).await;
}

/// Neither has to come again to be seen.
#[tokio::test]
async fn two_who_begin_a_conversation_see_each_other() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = device(&chatd, Connect::v5("alice", "alice-phone")).await;
    let mut bob = device(&chatd, Connect::v4("bob", "bob-phone")).await;
    let mut eve = device(&chatd, Connect::v5("eve", "eve-phone")).await;
    alice.say("alice", "bob", "hello").await.unwrap();
    for (me, peer, client) in [("alice", "bob", &mut alice), ("bob", "alice", &mut bob)] {
        let state = client.acked_message_on(&format!("chat/{me}/event/presence")).await.unwrap();
        assert!(!state.retain, "it is news");
        assert_eq!(state.json(), json!({"user": peer, "status": "online"}));
    }
    // Only the first message makes a difference.
    bob.say("bob", "alice", "hi").await.unwrap();
    ok(&mut alice, "alice", "whoami", json!({})).await;
    for client in [&mut alice, &mut bob] {
        let rest = client.ping().await.unwrap();
        assert!(!rest.iter().any(is_presence), "{rest:?}");
    }
    // Whoever is blocked does not see who blocked them, until that is taken back.
    ok(&mut bob, "bob", "block", json!({"with": "eve"})).await;
    eve.say("eve", "bob", "psst").await.unwrap();
    ok(&mut eve, "eve", "whoami", json!({})).await;
    ok(&mut bob, "bob", "unblock", json!({"with": "eve"})).await;
    event(&mut eve, "eve", "presence", json!({"user": "bob", "status": "online"})).await;
    event(&mut bob, "bob", "presence", json!({"user": "eve", "status": "online"})).await;
    assert_well(&chatd).await;
}

/// A block is on record after it was taken back, and shows nothing of whom it was about.
#[tokio::test]
async fn blocking_somebody_does_not_show_whether_they_are_there() {
    let chatd = Chatd::start().await.unwrap();
    let bob = device(&chatd, Connect::v4("bob", "bob-phone")).await;
    let mut eve = device(&chatd, Connect::v5("eve", "eve-phone")).await;
    ok(&mut eve, "eve", "block", json!({"with": "bob"})).await;
    ok(&mut eve, "eve", "unblock", json!({"with": "bob"})).await;
    // A conversation with a third: when its state has come, all first states have.
    let mut zoe = device(&chatd, Connect::v5("zoe", "zoe-phone")).await;
    zoe.say("zoe", "eve", "hello").await.unwrap();
    event(&mut eve, "eve", "presence", json!({"user": "zoe", "status": "online"})).await;
    let mut laptop = device(&chatd, Connect::v5("eve", "eve-laptop")).await;
    assert_eq!(first_state(&mut laptop, "eve").await["user"], json!("zoe"), "peers come in the order of their names");
    bob.leave().await.unwrap();
    assert_well(&chatd).await;
}

/// Each command of docs/mosquitto.md is taken, and each request answered.
#[tokio::test]
async fn everything_can_be_done_from_a_shell() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = Connect::v4("bob", "bob-phone").to(&chatd).await.unwrap();
    let mut alice = Connect::v4("alice", "alice-phone").to(&chatd).await.unwrap();
    bob.subscribe("chat/bob/#", 1).await.unwrap();
    alice.subscribe("chat/alice/#", 1).await.unwrap();
    let docs = include_str!("../../docs/mosquitto.md");
    let port = chatd.mqtt_addr().port();
    let mut commands = 0;
    for row in docs.lines().filter(|line| line.starts_with("| ")) {
        for command in row.split('`').filter(|part| part.starts_with("mosquitto_")) {
            if command.contains("lines.txt") || command.contains('…') {
                continue;
            }
            commands += 1;
            let line = command.replacen(" -u ", &format!(" -p {port} -u "), 1);
            let output = programs::shell(&line).await.unwrap();
            assert!(output.status.success(), "{command}: {output:?}");
            if command.contains("/req/") {
                let (client, me) =
                    if command.contains("chat/bob/") { (&mut bob, "bob") } else { (&mut alice, "alice") };
                let answer = client.acked_message_on(&format!("chat/{me}/res")).await.unwrap().json();
                assert!(answer["ok"].is_object(), "{command}: {answer}");
            }
        }
    }
    assert!(commands >= 12, "{commands} commands");
    // Nothing was refused.
    for client in [&mut alice, &mut bob] {
        let rest = client.ping().await.unwrap();
        let is_error = |packet: &Packet| matches!(packet, Packet::Publish(event) if event.topic.ends_with("error"));
        assert!(!rest.iter().any(is_error), "{rest:?}");
    }
}

/// The two examples of the documentation, in Python with MQTT 3.1.1 and in JavaScript with MQTT 5 over WebSocket, talk to each other.
#[tokio::test]
async fn the_examples_are_messengers() {
    let chatd = Chatd::start_with(Options::default().set("limits.presence_grace_ms", 100)).await.unwrap();
    let port = chatd.mqtt_addr().port().to_string();
    let url = format!("ws://{}/mqtt", chatd.http_addr());
    let mut alice = Dialogue::python(&["alice", "127.0.0.1", &port]).await.unwrap();
    alice.says("connected").await.unwrap();
    let mut bob = Dialogue::node(&["bob", &url]).await.unwrap();
    bob.says("connected").await.unwrap();
    alice.tell("bob hello there").await.unwrap();
    alice.says("✓ stored: hello there").await.unwrap();
    bob.says("alice #1: hello there").await.unwrap();
    alice.says("✓✓ bob: delivered up to #1, read up to #0").await.unwrap();
    bob.tell("/read alice 1").await.unwrap();
    alice.says("✓✓ bob: delivered up to #1, read up to #1").await.unwrap();
    bob.tell("/typing alice").await.unwrap();
    alice.says("bob is typing").await.unwrap();
    bob.tell("alice hello yourself").await.unwrap();
    bob.says("✓ stored: hello yourself").await.unwrap();
    alice.says("bob #2: hello yourself").await.unwrap();
    bob.tell("nobody-here! x").await.unwrap();
    bob.says("refused: Publish error: Topic Name invalid").await.unwrap();
    bob.quit().await.unwrap();
    alice.says("bob is offline").await.unwrap();
    alice.tell("bob come back").await.unwrap();
    alice.says("✓ stored: come back").await.unwrap();

    let mut bob = Dialogue::node(&["bob", &url]).await.unwrap();
    bob.says("alice #3 (waited): come back").await.unwrap();
    bob.says("alice is online").await.unwrap();
    bob.says("conversation with alice: 1 unread, last: come back").await.unwrap();
    bob.tell("/history alice").await.unwrap();
    for line in ["history #1 alice: hello there", "history #2 bob: hello yourself", "history #3 alice: come back"] {
        bob.says(line).await.unwrap();
    }
    alice.tell("/history bob").await.unwrap();
    alice.says("history #2 bob: hello yourself").await.unwrap();
    alice.tell("/read nobody 7").await.unwrap();
    alice.says("refused: `with`: you have no conversation with nobody").await.unwrap();
    alice.quit().await.unwrap();
    bob.quit().await.unwrap();
    assert_well(&chatd).await;
}

fn is_presence(packet: &Packet) -> bool {
    matches!(packet, Packet::Publish(event) if event.topic.ends_with("/presence"))
}

/// The next presence of somebody with this status.
async fn event_with(client: &mut Client, me: &str, user: &str, status: &str) -> Value {
    loop {
        let event = client.acked_message_on(&format!("chat/{me}/event/presence")).await.unwrap().json();
        if event["user"] == json!(user) && event["status"] == json!(status) {
            return event;
        }
    }
}

/// The first of the states that are there when somebody subscribes.
async fn first_state(client: &mut Client, me: &str) -> Value {
    loop {
        let event = client.acked_message_on(&format!("chat/{me}/event/presence")).await.unwrap();
        if event.retain {
            return event.json();
        }
    }
}
