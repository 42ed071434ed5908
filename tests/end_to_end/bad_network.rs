//! The Rust client on a bad network, for two minutes. A module of its own because tests begin in the order of their names, and this one takes longest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use chat_client::{Client, Event, Events, FileOutbox, Kind, Seq};
use end_to_end::proxy::Proxy;
use end_to_end::{Chatd, Dice, PATIENCE};
use tokio::time::timeout;

use crate::sdk::{options, user};

/// Everything that one side has seen, by seq.
#[derive(Debug, Default)]
struct Seen(BTreeMap<u64, String>);

impl Seen {
    /// Once and in order.
    fn note(&mut self, seq: Seq, text: String) {
        let last = self.0.last_key_value().map_or(0, |(seq, _)| *seq);
        assert_eq!(seq.get(), last + 1, "{text} came after number {last}");
        self.0.insert(seq.get(), text);
    }
}

/// Takes everything until `count` messages were seen.
async fn watch(mut events: Events, seen: Arc<AtomicUsize>, count: Arc<AtomicUsize>) -> (Seen, Events) {
    let mut all = Seen::default();
    loop {
        let count = count.load(Ordering::SeqCst);
        if count > 0 && all.0.len() >= count {
            return (all, events);
        }
        // The count may become known while nothing comes.
        let Ok(event) = timeout(Duration::from_millis(100), events.next()).await else { continue };
        if let Event::Message(delivery) = event.expect("the client goes on") {
            let Kind::Text(text) = &delivery.message.kind else { panic!("{delivery:?}") };
            all.note(delivery.message.seq, text.clone());
            seen.fetch_add(1, Ordering::SeqCst);
            delivery.acknowledge();
        }
    }
}

/// Two people write to each other for two minutes over a network that delays, repeats, half-closes and cuts, and the server is killed twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_minutes_of_bad_network() {
    const MINUTES: Duration = Duration::from_secs(120);
    let mut dice = Dice::thrown("two_minutes_of_bad_network");
    let mut chatd = Chatd::start().await.unwrap();
    let proxy = Proxy::start(chatd.mqtt_addr(), dice.number()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let start = async |name: &str| {
        let outbox = FileOutbox::open(folder.path().join(name)).unwrap();
        let options = options(proxy.address(), name, "one")
            .outbox(outbox)
            .keep_alive(Duration::from_secs(5))
            .retry(Duration::from_millis(50), Duration::from_secs(1));
        Client::start(options).await.unwrap()
    };
    let began = Instant::now();
    let count = Arc::new(AtomicUsize::new(0));
    let (mut writing, mut watching, mut clients) = (Vec::new(), Vec::new(), Vec::new());
    for (name, peer) in [("alice", "bob"), ("bob", "alice")] {
        let (client, events) = start(name).await;
        watching.push(tokio::spawn(watch(events, Arc::default(), Arc::clone(&count))));
        let mut dice = Dice::new(dice.number());
        writing.push(tokio::spawn({
            let client = client.clone();
            async move {
                let mut queued = Vec::new();
                while began.elapsed() < MINUTES {
                    queued.push(client.queue(&user(peer), format!("{name} {}", queued.len())).await.unwrap());
                    tokio::time::sleep(Duration::from_millis(dice.below(40) as u64)).await;
                }
                queued
            }
        }));
        clients.push(client);
    }
    for third in 1..=2 {
        tokio::time::sleep_until((began + MINUTES / 3 * third).into()).await;
        chatd.kill9().await.unwrap();
        chatd.restart_on_same_ports().await.unwrap();
    }
    let mut written = Vec::new();
    for task in writing {
        written.push(task.await.unwrap());
    }
    proxy.calm_down();
    let total: usize = written.iter().map(Vec::len).sum();
    let mut stored = BTreeMap::new();
    for (name, queued) in ["alice", "bob"].into_iter().zip(written) {
        let mut last = 0;
        for (number, queued) in queued.into_iter().enumerate() {
            let seq = timeout(PATIENCE, queued).await.expect("stored in time").unwrap().seq.get();
            assert!(seq > last, "in the order in which they were queued");
            last = seq;
            stored.insert(seq, format!("{name} {number}"));
        }
    }
    assert_eq!(stored.len(), total);
    count.store(total, Ordering::SeqCst);
    for task in watching {
        let (seen, _) = timeout(PATIENCE, task).await.expect("everything arrives").unwrap();
        assert_eq!(seen.0, stored);
    }
    let deeds = proxy.deeds();
    println!("{total} messages; the network: {deeds:?}");
    assert!(total > 1_000, "{total}");
    for (what, deed) in
        [("cut", &deeds.cuts), ("half-closed", &deeds.half_closes), ("repeated", &deeds.twice), ("late", &deeds.late)]
    {
        assert!(deed.load(Ordering::Relaxed) >= 10, "{what}: {deeds:?}");
    }
    for client in clients {
        client.close().await;
    }
}
