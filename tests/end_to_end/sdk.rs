//! The Rust client: nothing sent twice, nothing lost, in order, whatever the network, the server and the program itself do.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chat_client::{
    Change, Client, Closed, ConnectError, ConnectionState, ErrorCode, Event, Events, FileOutbox, Kind, Listen, Options,
    Outbox, Range, RequestError, SendError, Seq, Session, Timestamp, TypingState, Unsent, UserId,
};
use end_to_end::{Chatd, PATIENCE, eventually};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::auth;

pub(crate) fn user(name: &str) -> UserId {
    name.parse().unwrap()
}

pub(crate) fn options(server: std::net::SocketAddr, name: &str, device: &str) -> Options {
    Options::new(&format!("mqtt://{server}"), name, device).unwrap()
}

async fn connect(chatd: &Chatd, name: &str, device: &str) -> (Client, Events) {
    Client::connect(options(chatd.mqtt_addr(), name, device)).await.unwrap()
}

async fn next(events: &mut Events) -> Event {
    timeout(PATIENCE, events.next()).await.expect("an event in time").expect("the client goes on")
}

/// The next that `pick` wants; others are acknowledged and passed over.
async fn next_where<T>(events: &mut Events, mut pick: impl FnMut(&Event) -> Option<T>) -> T {
    loop {
        let event = next(events).await;
        let picked = pick(&event);
        if let Event::Message(delivery) = event {
            delivery.acknowledge();
        }
        if let Some(picked) = picked {
            return picked;
        }
    }
}

fn text_of(event: &Event) -> Option<String> {
    match event {
        Event::Message(delivery) => match &delivery.message.kind {
            Kind::Text(text) => Some(text.clone()),
            _ => None,
        },
        _ => None,
    }
}

fn not_sent(event: &Event) -> Option<(String, SendError)> {
    match event {
        Event::NotSent { text, error, .. } => Some((text.clone(), error.clone())),
        _ => None,
    }
}

fn state_of(event: &Event) -> Option<ConnectionState> {
    match event {
        Event::Connection(state) => Some(state.clone()),
        _ => None,
    }
}

#[tokio::test]
async fn a_conversation() {
    let chatd = Chatd::start().await.unwrap();
    let (alice, mut to_alice) = connect(&chatd, "alice", "laptop").await;
    let bob = user("bob");
    let stored = alice.send(&bob, "are you there?").await.unwrap();
    assert_eq!((stored.seq.get(), stored.receiver_away), (1, true));

    // Bob comes later: it waited.
    let (bob_client, mut to_bob) = connect(&chatd, "bob", "phone").await;
    next_where(&mut to_alice, |event| match event {
        Event::Presence(presence) => (presence.user == bob).then_some(()),
        _ => None,
    })
    .await;
    let Event::Message(delivery) = next_where_message(&mut to_bob).await else { panic!("a message") };
    assert!(delivery.waited);
    assert_eq!(delivery.message.kind, Kind::Text("are you there?".into()));
    assert_eq!((delivery.message.seq, delivery.message.id.as_ref()), (stored.seq, Some(&stored.id)));
    delivery.acknowledge();

    // It is live now, both ways, with receipts, typing and presence.
    next_where(&mut to_alice, |event| matches!(event, Event::Receipt(receipt) if receipt.delivered == 1).then_some(()))
        .await;
    bob_client.mark_read(&user("alice"), stored.seq).await.unwrap();
    next_where(&mut to_alice, |event| matches!(event, Event::Receipt(receipt) if receipt.read == 1).then_some(()))
        .await;
    bob_client.typing(&user("alice"), TypingState::On).await;
    next_where(&mut to_alice, |event| matches!(event, Event::Typing(typing) if typing.from == bob).then_some(())).await;
    let answer = bob_client.send(&user("alice"), "yes").await.unwrap();
    assert_eq!((answer.seq.get(), answer.receiver_away), (2, false));
    assert_eq!(next_where(&mut to_alice, text_of).await, "yes");
    // Bob's own, as it was stored, for his other devices.
    assert_eq!(next_where(&mut to_bob, text_of).await, "yes");

    // Every request.
    assert_eq!(alice.whoami().await.unwrap().user, user("alice"));
    alice.edit(&bob, stored.seq, "are you here?").await.unwrap();
    let second = alice.send(&bob, "a mistake").await.unwrap();
    alice.unsend(&bob, second.seq).await.unwrap();
    let history = alice.history(&bob, Range::Before(None), 50).await.unwrap();
    let texts: Vec<Option<&str>> = history.entries.iter().map(|entry| entry.text.as_deref()).collect();
    assert_eq!(texts, [Some("are you here?"), Some("yes"), None]);
    let later = alice.history(&bob, Range::After(Some(stored.seq)), 1).await.unwrap();
    assert_eq!(later.entries[0].text.as_deref(), Some("yes"));
    assert!(later.more);
    let conversations = bob_client.conversations(None, 10).await.unwrap();
    assert_eq!(conversations.conversations[0].standing.with, user("alice"));
    let synced = bob_client.sync(None, 200).await.unwrap();
    assert!(!synced.more && !synced.entries.is_empty());
    assert!(bob_client.sync(Some(&synced.next), 200).await.unwrap().entries.is_empty());
    bob_client.delete(&user("alice"), answer.seq).await.unwrap();
    bob_client.block(&user("alice")).await.unwrap();
    assert_eq!(bob_client.blocked().await.unwrap().blocked[0].user, user("alice"));
    bob_client.unblock(&user("alice")).await.unwrap();

    alice.close().await;
    assert_eq!(next_where(&mut to_alice, state_of).await, ConnectionState::Closed(Closed::ByUs));
    assert!(to_alice.next().await.is_none());
}

async fn next_where_message(events: &mut Events) -> Event {
    loop {
        let event = next(events).await;
        if matches!(event, Event::Message(_)) {
            return event;
        }
    }
}

#[tokio::test]
async fn refusals_are_typed() {
    let chatd = Chatd::start().await.unwrap();
    let (alice, _events) = connect(&chatd, "alice", "laptop").await;
    for (to, text, code) in [
        ("alice", "to myself".to_owned(), ErrorCode::SelfMessage),
        ("bob", String::new(), ErrorCode::EmptyText),
        ("bob", "x".repeat(16 * 1024 + 1), ErrorCode::TextTooLong),
    ] {
        match alice.send(&user(to), text).await.unwrap_err() {
            SendError::Refused(refusal) => {
                assert_eq!(refusal.code, Some(code));
                assert!(refusal.reason_code >= 0x80 && refusal.message.starts_with(code.as_str()), "{refusal:?}");
            }
            other => panic!("{other:?}"),
        }
    }
    // What would end every connection by which it went out is not sent, and keeps nothing else back.
    let huge = "x".repeat(2 * 1024 * 1024);
    let refused = alice.send(&user("bob"), huge.as_str()).await.unwrap_err();
    assert!(
        matches!(&refused, SendError::Refused(refusal) if refusal.code == Some(ErrorCode::TextTooLong)),
        "{refused:?}"
    );
    alice.send(&user("bob"), "x".repeat(16 * 1024)).await.unwrap();
    let refused = alice.edit(&user("bob"), Seq::FIRST, &huge).await.unwrap_err();
    assert!(matches!(refused, RequestError::Refused { code: Some(ErrorCode::TextTooLong), .. }), "{refused:?}");
    let unknown = alice.history(&user("carol"), Range::Before(None), 10).await.unwrap_err();
    let RequestError::Refused { code, message } = unknown else { panic!("{unknown:?}") };
    assert_eq!(code, Some(ErrorCode::UnknownConversation));
    assert!(message.contains("carol"), "{message}");
    let beyond = alice.mark_read(&user("bob"), Seq::new(7).unwrap()).await.unwrap_err();
    assert!(matches!(beyond, RequestError::Refused { code: Some(ErrorCode::InvalidSeq), .. }), "{beyond:?}");
    // It goes on.
    assert_eq!(alice.send(&user("bob"), "still there").await.unwrap().seq.get(), 2);
}

#[tokio::test]
async fn logins() {
    let (_folder, file) = auth::users().await;
    let chatd = Chatd::start_with(auth::required().set("auth.password_file", file.display())).await.unwrap();
    let with = |password: &str| options(chatd.mqtt_addr(), "alice", "laptop").password(password);
    let (alice, _events) = Client::connect(with("alice-pw")).await.unwrap();
    assert_eq!(alice.whoami().await.unwrap().user, user("alice"));
    let refused = Client::connect(with("wrong")).await.unwrap_err();
    assert!(matches!(refused, ConnectError::Closed(Closed::LoginRefused(_))), "{refused:?}");
    let token = Client::connect(options(chatd.mqtt_addr(), "alice", "laptop").token(async || Ok("wrong".into()))).await;
    assert!(matches!(token.unwrap_err(), ConnectError::Closed(Closed::LoginRefused(_))));
    // A program that begins offline hears of it by an event.
    let (client, mut events) = Client::start(with("wrong")).await.unwrap();
    assert!(matches!(next_where(&mut events, state_of).await, ConnectionState::Closed(Closed::LoginRefused(_))));
    assert!(matches!(client.whoami().await, Err(RequestError::Closed(Closed::LoginRefused(_)))));
    assert!(matches!(client.send(&user("bob"), "x").await, Err(SendError::Closed(Closed::LoginRefused(_)))));
}

#[tokio::test]
async fn nobody_is_there() {
    let address = TcpListener::bind(("127.0.0.1", 0)).await.unwrap().local_addr().unwrap();
    let refused = Client::connect(options(address, "alice", "laptop")).await.unwrap_err();
    assert!(matches!(refused, ConnectError::Unreachable(_)), "{refused:?}");
}

/// Whatever keeps silent, an attempt to connect ends, and the next one is made.
#[tokio::test]
async fn an_attempt_ends_in_time() {
    let chatd = Chatd::start().await.unwrap();
    let tries = |server| options(server, "alice", "laptop").connect_timeout(Duration::from_secs(1));
    let asked = Arc::new(AtomicUsize::new(0));
    let token = {
        let asked = Arc::clone(&asked);
        move || {
            let is_first = asked.fetch_add(1, Ordering::SeqCst) == 0;
            async move { if is_first { std::future::pending().await } else { Ok("token".to_owned()) } }
        }
    };
    let (alice, mut events) = Client::start(tries(chatd.mqtt_addr()).token(token)).await.unwrap();
    let lost = next_where(&mut events, state_of).await;
    assert!(matches!(&lost, ConnectionState::Lost { reason, .. } if reason.contains("no token")), "{lost:?}");
    assert_eq!(alice.whoami().await.unwrap().user, user("alice"));

    let silent = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let server = silent.local_addr().unwrap();
    // CONNECT is not answered; then it is, and SUBSCRIBE is not.
    for answer in [&[][..], &[0x20, 3, 0, 0, 0]] {
        let (connected, taken) = tokio::join!(Client::connect(tries(server)), async {
            let mut client = silent.accept().await.unwrap().0;
            client.write_all(answer).await.unwrap();
            client
        });
        assert!(matches!(connected.unwrap_err(), ConnectError::Unreachable(_)), "{answer:?}");
        drop(taken);
    }
}

#[tokio::test]
async fn one_device_at_a_time() {
    let chatd = Chatd::start().await.unwrap();
    let (_first, mut to_first) = connect(&chatd, "alice", "laptop").await;
    let (second, _to_second) = connect(&chatd, "alice", "laptop").await;
    let closed = next_where(&mut to_first, |event| match state_of(event) {
        Some(ConnectionState::Closed(closed)) => Some(closed),
        _ => None,
    });
    assert_eq!(closed.await, Closed::TakenOver);
    assert_eq!(second.whoami().await.unwrap().user, user("alice"));
}

/// A program that crashes before it has taken a message gets it again; what it has taken it does not.
#[tokio::test]
async fn what_was_not_taken_comes_again() {
    let chatd = Chatd::start().await.unwrap();
    let (alice, _events) = connect(&chatd, "alice", "laptop").await;
    let (bob, mut to_bob) = connect(&chatd, "bob", "phone").await;
    for number in 0..5 {
        alice.send(&user("bob"), format!("{number}")).await.unwrap();
    }
    let mut held = Vec::new();
    for number in 0..5 {
        let Event::Message(delivery) = next_where_message(&mut to_bob).await else { panic!("a message") };
        if number < 2 {
            delivery.acknowledge();
        } else {
            held.push(delivery);
        }
    }
    // The third is dropped, the fourth taken after it, the fifth still held: none of them may be acknowledged before the third.
    let fourth = held.remove(1);
    drop(held.remove(0));
    fourth.acknowledge();
    bob.close().await;
    drop((held, to_bob));

    let (_bob, mut to_bob) = connect(&chatd, "bob", "phone").await;
    for number in 2..5 {
        assert_eq!(next_where(&mut to_bob, text_of).await, format!("{number}"));
    }
}

/// An older backup is put back under a program that runs: numbers are given again, and what has them now is not taken for what had them before.
#[tokio::test]
async fn a_server_goes_back_in_time() {
    let mut chatd = Chatd::start().await.unwrap();
    let alice_options = options(chatd.mqtt_addr(), "alice", "laptop").listen(Listen::Nothing);
    let (alice, _events) = Client::connect(alice_options).await.unwrap();
    let (_bob, mut to_bob) = connect(&chatd, "bob", "phone").await;
    let say = async |text: &str| alice.send(&user("bob"), text).await.unwrap().seq.get();
    assert_eq!(say("before the backup").await, 1);
    let folder = tempfile::tempdir().unwrap();
    let backup = folder.path().join("backup");
    let (code, _, said) = chatd.tool(&["backup", backup.to_str().unwrap()]).await.unwrap();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(say("two").await, 2);
    assert_eq!(say("three").await, 3);
    for text in ["before the backup", "two", "three"] {
        assert_eq!(next_where(&mut to_bob, text_of).await, text);
    }
    chatd.kill9().await.unwrap();
    std::fs::remove_dir_all(chatd.data()).unwrap();
    let (code, _, said) = chatd.tool(&["restore", backup.to_str().unwrap()]).await.unwrap();
    assert_eq!(code, Some(0), "{said}");
    chatd.restart_on_same_ports().await.unwrap();
    assert_eq!(say("another two").await, 2);
    assert_eq!(next_where(&mut to_bob, text_of).await, "another two");
}

#[tokio::test]
async fn listeners_of_all_kinds() {
    let chatd = Chatd::start_with(end_to_end::Options::default().set("auth.observers", "archive")).await;
    let chatd = chatd.unwrap();
    let only_sends = options(chatd.mqtt_addr(), "alice", "cron").listen(Listen::Nothing).session(Session::Temporary);
    let (alice, mut to_alice) = Client::connect(only_sends).await.unwrap();
    let observes = options(chatd.mqtt_addr(), "archive", "one").listen(Listen::Observe);
    let (_archive, mut to_archive) = Client::connect(observes).await.unwrap();
    let (bob, _to_bob) = connect(&chatd, "bob", "phone").await;
    bob.send(&user("alice"), "one").await.unwrap();
    alice.send(&user("bob"), "two").await.unwrap();
    assert_eq!(next_where(&mut to_archive, text_of).await, "one");
    assert_eq!(next_where(&mut to_archive, text_of).await, "two");
    assert_eq!(alice.conversations(None, 10).await.unwrap().conversations.len(), 1);
    alice.close().await;
    let mut told = Vec::new();
    while let Some(event) = to_alice.next().await {
        told.push(event);
    }
    assert!(told.iter().all(|event| matches!(event, Event::Connection(_))), "{told:?}");
}

/// Messages that were queued without a server, by a program that then crashed, are sent by the next run, once.
#[tokio::test]
async fn an_outbox_survives() {
    let mut chatd = Chatd::start().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("outbox");
    let start = async |chatd: &Chatd| {
        let outbox = FileOutbox::open(&path).unwrap();
        Client::start(options(chatd.mqtt_addr(), "alice", "laptop").outbox(outbox)).await.unwrap()
    };
    chatd.kill9().await.unwrap();
    let (alice, events) = start(&chatd).await;
    for number in 0..10 {
        // Nobody waits for what becomes of it.
        drop(alice.queue(&user("bob"), format!("{number}")).await.unwrap());
    }
    // As if the program were killed: nothing is said or written any more.
    let copy = std::fs::read(&path).unwrap();
    alice.close().await;
    drop(events);
    std::fs::write(&path, &copy).unwrap();

    chatd.restart_on_same_ports().await.unwrap();
    let (alice, mut events) = start(&chatd).await;
    for number in 0..10 {
        assert_eq!(next_where(&mut events, text_of).await, format!("{number}"));
    }
    // As if it had been killed before the outbox forgot them: they are sent again, and stored already.
    alice.close().await;
    drop(events);
    std::fs::write(&path, &copy).unwrap();
    let (alice, _events) = start(&chatd).await;
    assert_eq!(alice.send(&user("bob"), "last").await.unwrap().seq.get(), 11);
    let history = alice.history(&user("bob"), Range::Before(None), 50).await.unwrap();
    assert_eq!(history.entries.len(), 11);
    alice.close().await;
    assert!(read_outbox(&path).is_empty());
}

/// What an earlier run may have sent so long ago that the server does not know it again is given back, and not sent twice.
#[tokio::test]
async fn what_is_too_old_is_given_back() {
    let chatd = Chatd::start().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("outbox");
    let now_ms = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
    let days_ago = |id: &str, days: u64| {
        let queued_at = Timestamp::from_ms(now_ms - days * 24 * 3_600_000);
        Change::Add(Unsent { id: id.parse().unwrap(), to: user("bob"), text: id.to_owned(), queued_at })
    };
    FileOutbox::open(&path).unwrap().apply(&[days_ago("eight", 8), days_ago("six", 6)]).unwrap();
    let outbox = FileOutbox::open(&path).unwrap();
    let (alice, mut events) =
        Client::connect(options(chatd.mqtt_addr(), "alice", "laptop").outbox(outbox)).await.unwrap();
    let (text, error) = next_where(&mut events, not_sent).await;
    assert_eq!((text.as_str(), error), ("eight", SendError::TooOld));
    assert_eq!(next_where(&mut events, text_of).await, "six");
    alice.close().await;
    assert!(read_outbox(&path).is_empty());
}

/// Who hears that a client has ended may open its outbox again at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_lets_the_outbox_go() {
    let nowhere = TcpListener::bind(("127.0.0.1", 0)).await.unwrap().local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let alice = || {
        let outbox = FileOutbox::open(folder.path().join("outbox")).expect("nobody has it open");
        options(nowhere, "alice", "laptop").outbox(outbox)
    };
    for _ in 0..100 {
        Client::connect(alice()).await.unwrap_err();
        let (client, _events) = Client::start(alice()).await.unwrap();
        client.close().await;
    }
}

fn read_outbox(path: &Path) -> Vec<Unsent> {
    FileOutbox::open(path).unwrap().load().unwrap()
}

/// Work that may be done again sends under ids of its own: once is enough for the server, and in the outbox there is room for one.
#[tokio::test]
async fn ids_of_the_callers_making() {
    let mut chatd = Chatd::start().await.unwrap();
    let (alice, _events) = connect(&chatd, "alice", "laptop").await;
    let (_bob, mut to_bob) = connect(&chatd, "bob", "phone").await;
    let (bob, id) = (user("bob"), chat_client::MessageId::parse("invoice-17").unwrap());
    for _ in 0..2 {
        let stored = alice.queue_as(id.clone(), &bob, "paid").await.unwrap().await.unwrap();
        assert_eq!((stored.id, stored.seq.get()), (id.clone(), 1));
    }
    let Event::Message(delivery) = next_where_message(&mut to_bob).await else { panic!("a message") };
    let payload: serde_json::Value = serde_json::from_slice(delivery.payload()).unwrap();
    assert_eq!((payload["id"].as_str(), payload["text"].as_str()), (Some("invoice-17"), Some("paid")));
    delivery.acknowledge();

    chatd.kill9().await.unwrap();
    let waits = alice.queue_as(id.clone(), &bob, "paid").await.unwrap();
    assert_eq!(alice.queue_as(id.clone(), &bob, "paid").await.unwrap_err(), SendError::SameId(id.clone()));
    // To somebody else it is another message.
    let to_carol = alice.queue_as(id.clone(), &user("carol"), "paid too").await.unwrap();
    chatd.restart_on_same_ports().await.unwrap();
    assert_eq!(waits.await.unwrap().seq.get(), 1);
    to_carol.await.unwrap();
    let with_carol = alice.history(&user("carol"), Range::Before(None), 10).await.unwrap();
    assert_eq!(with_carol.entries[0].text.as_deref(), Some("paid too"));
    let other = alice.queue_as(id, &bob, "not paid").await.unwrap().await.unwrap_err();
    assert!(matches!(other, SendError::Refused(refusal) if refusal.code == Some(ErrorCode::IdConflict)));
}

/// A disk that is full has room again one day: what waits in an outbox can wait for that.
#[tokio::test]
async fn a_full_disk_is_waited_for() {
    let chatd = Chatd::start().await.unwrap();
    let (alice, _events) = connect(&chatd, "alice", "laptop").await;
    let bob = user("bob");
    alice.send(&bob, "first").await.unwrap();
    let size = std::fs::metadata(chatd.data().join("log.redb")).unwrap().len();
    chatd.limit_file_bytes(Some(size)).unwrap();
    let mut sent = 1;
    // What the file has room for inside is still taken.
    let waits = loop {
        let mut sending = alice.queue(&bob, format!("{sent} {}", "x".repeat(15_000))).await.unwrap();
        tokio::select! {
            stored = &mut sending => drop(stored.unwrap()),
            () = refused(&chatd) => break sending,
        }
        sent += 1;
    };
    chatd.limit_file_bytes(None).unwrap();
    assert_eq!(timeout(PATIENCE, waits).await.expect("it is sent in time").unwrap().seq.get(), sent + 1);
}

/// Waits until the server has refused something for want of room.
async fn refused(chatd: &Chatd) {
    let refused = async || chatd.metric("chatd_refused_total").await.unwrap() > 0.0;
    eventually("the disk is full", PATIENCE, refused).await;
}

/// To be answered takes no longer than is allowed; what was read is said all the same, when the server is there again.
#[tokio::test]
async fn questions_end_in_time() {
    let mut chatd = Chatd::start().await.unwrap();
    let (bob, _to_bob) = connect(&chatd, "bob", "phone").await;
    let hurried = options(chatd.mqtt_addr(), "alice", "laptop").request_timeout(Duration::from_millis(200));
    let (alice, mut to_alice) = Client::connect(hurried).await.unwrap();
    let seq = bob.send(&user("alice"), "hello").await.unwrap().seq;
    assert_eq!(next_where(&mut to_alice, text_of).await, "hello");
    chatd.kill9().await.unwrap();
    assert_eq!(alice.whoami().await.unwrap_err(), RequestError::TimedOut);
    assert_eq!(alice.mark_read(&user("bob"), seq).await.unwrap_err(), RequestError::TimedOut);
    chatd.restart_on_same_ports().await.unwrap();
    let is_read = async || {
        let listed = bob.conversations(None, 1).await.unwrap();
        listed.conversations[0].standing.read == seq.get()
    };
    eventually("it is read", PATIENCE, is_read).await;
}

/// What the server will never take is given back to somebody, once.
#[tokio::test]
async fn a_refusal_finds_somebody() {
    let mut chatd = Chatd::start().await.unwrap();
    let (alice, mut events) = connect(&chatd, "alice", "laptop").await;
    chatd.kill9().await.unwrap();
    let waits = alice.queue(&user("alice"), "somebody waits").await.unwrap();
    drop(alice.queue(&user("alice"), "nobody waits").await.unwrap());
    chatd.restart_on_same_ports().await.unwrap();
    assert!(matches!(waits.await, Err(SendError::Refused(_))));
    let (text, error) = next_where(&mut events, not_sent).await;
    assert_eq!(text, "nobody waits");
    assert!(matches!(error, SendError::Refused(_)));
}
