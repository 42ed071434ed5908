//! PUBACK means stored, and a resend is the same message: across `kill -9`, reconnects, restarts and devices.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use end_to_end::packet::{self, Packet, Properties, Publish, Version};
use end_to_end::{Chatd, Connect, Dice};
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::chat::{assert_well, listener, number, texts};

const SENDERS: usize = 20;
/// Sends that one sender has unacknowledged at a time.
const WINDOW: usize = 8;

fn kills() -> usize {
    if std::env::var_os("CHATD_TEST_LONG").is_some_and(|long| long == "1") { 100 } else { 20 }
}

/// What a sender knows: its messages' seqs as far as it was told (MQTT 3.1.1 is not told).
type Acknowledged = BTreeMap<u64, Option<u64>>;

struct Sender {
    me: String,
    version: Version,
    address: watch::Receiver<std::net::SocketAddr>,
    stop: Arc<AtomicBool>,
    acknowledged: Acknowledged,
    next: u64,
}

impl Sender {
    /// Sends until told to stop, over as many connections as it takes; ends when everything that it ever sent is acknowledged.
    async fn run(mut self) -> Result<(String, Acknowledged)> {
        let mut unacknowledged: Vec<u64> = Vec::new();
        loop {
            let address = *self.address.borrow_and_update();
            let done = match TcpStream::connect(address).await {
                Ok(stream) => self.connection(stream, &mut unacknowledged).await?,
                Err(_) => false,
            };
            if done {
                return Ok((self.me, self.acknowledged));
            }
            // The server was killed: its address changes when it is back.
            let came_back = tokio::time::timeout(end_to_end::PATIENCE, async {
                while *self.address.borrow_and_update() == address {
                    self.address.changed().await?;
                }
                anyhow::Ok(())
            });
            came_back.await.with_context(|| format!("{} was disconnected from a server that lives", self.me))??;
        }
    }

    /// `true` when everything is done, `false` when the connection broke.
    async fn connection(&mut self, stream: TcpStream, unacknowledged: &mut Vec<u64>) -> Result<bool> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut reading, mut writing) = stream.into_split();
        let mut received = Vec::new();
        let mut under_way: BTreeMap<u16, u64> = BTreeMap::new();
        let mut resend: Vec<u64> = std::mem::take(unacknowledged);
        resend.reverse();
        let mut packet_id = 0;
        let connect = Connect::new(self.version, &self.me, "sender");
        if writing.write_all(&connect.bytes()).await.is_err() {
            *unacknowledged = resend.into_iter().rev().collect();
            return Ok(false);
        }
        let mut connected = false;
        let end = 'connection: loop {
            let mut bytes = Vec::new();
            while connected && under_way.len() < WINDOW {
                let message = match resend.pop() {
                    Some(message) => message,
                    None if self.stop.load(Ordering::Relaxed) => break,
                    None => {
                        self.next += 1;
                        self.next
                    }
                };
                packet_id = if packet_id == u16::MAX { 1 } else { packet_id + 1 };
                let mut publish =
                    Publish::new(format!("chat/{}/out/bob/m-{message}", self.me), format!("text {message}"), 1);
                publish.packet_id = packet_id;
                bytes.extend(packet::publish(self.version, &publish));
                under_way.insert(packet_id, message);
            }
            if connected && under_way.is_empty() {
                break true;
            }
            if writing.write_all(&bytes).await.is_err() {
                break false;
            }
            match tokio::time::timeout(end_to_end::PATIENCE, reading.read_buf(&mut received)).await {
                Ok(Ok(n)) if n > 0 => {}
                Ok(_) => break false,
                Err(_) => bail!("{}: no answer, with {under_way:?} under way", self.me),
            }
            let mut at = 0;
            while let Some((packet, length)) = packet::decode(self.version, &received[at..])? {
                at += length;
                match packet {
                    Packet::Connack { code: 0, .. } => connected = true,
                    Packet::Puback { packet_id, code: 0 | 0x10, properties } => {
                        let message = under_way.remove(&packet_id).context("a PUBACK for nothing")?;
                        let seq = properties.user("seq").map(str::parse).transpose()?;
                        ensure!(self.version == Version::V4 || seq.is_some(), "a PUBACK without seq");
                        let before = self.acknowledged.insert(message, seq);
                        ensure!(before.is_none(), "{message} was acknowledged twice");
                    }
                    Packet::Disconnect { .. } => break 'connection false,
                    other => bail!("{}: {other:?}", self.me),
                }
            }
            received.drain(..at);
        };
        unacknowledged.extend(under_way.into_values());
        unacknowledged.extend(resend.into_iter().rev());
        // Packet identifiers say nothing about the order once they have begun anew.
        unacknowledged.sort_unstable();
        Ok(end)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_was_acknowledged_survives_kill_9_under_load() {
    let mut dice = Dice::thrown("kill -9 under load");
    let mut chatd = Chatd::start().await.unwrap();
    let (announce, address) = watch::channel(chatd.mqtt_addr());
    let stop = Arc::new(AtomicBool::new(false));
    let senders: Vec<_> = (0..SENDERS)
        .map(|number| {
            let sender = Sender {
                me: format!("sender-{number}"),
                version: if number % 2 == 0 { Version::V4 } else { Version::V5 },
                address: address.clone(),
                stop: Arc::clone(&stop),
                acknowledged: BTreeMap::new(),
                next: 0,
            };
            tokio::spawn(sender.run())
        })
        .collect();
    for _ in 0..kills() {
        // The moment is what is random here; nothing is waited for.
        tokio::time::sleep(Duration::from_millis(u64::try_from(20 + dice.below(300)).unwrap())).await;
        chatd.kill9().await.unwrap();
        chatd.restart().await.unwrap();
        announce.send(chatd.mqtt_addr()).unwrap();
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    stop.store(true, Ordering::Relaxed);
    let mut told = BTreeMap::new();
    for sender in senders {
        let (me, acknowledged) = sender.await.unwrap().unwrap();
        told.insert(me, acknowledged);
    }
    chatd.kill9().await.unwrap();
    chatd.restart().await.unwrap();

    let total: usize = told.values().map(BTreeMap::len).sum();
    println!("{total} messages acknowledged over {} kills", kills());
    assert!(total > SENDERS * kills(), "hardly anything was sent: {total}");
    let mut stored: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
    let mut bob = listener(&chatd, Connect::v5("bob", "fresh").receive_maximum(500)).await.unwrap();
    for message in bob.acked_messages(total).await.unwrap() {
        assert!(message.retain);
        let envelope = message.json();
        let id: u64 = envelope["id"].as_str().unwrap().strip_prefix("m-").unwrap().parse().unwrap();
        assert_eq!(envelope["text"], format!("text {id}"));
        stored.entry(envelope["from"].as_str().unwrap().to_owned()).or_default().push((number(&envelope, "seq"), id));
    }
    assert_eq!(bob.ping().await.unwrap(), [], "a message that is there twice, or that nobody sent");
    for (me, acknowledged) in &told {
        let stored = &stored[me];
        let seqs: Vec<u64> = stored.iter().map(|(seq, _)| *seq).collect();
        assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>(), "{me}: no seq is missing or twice");
        let by_id: BTreeMap<u64, u64> = stored.iter().map(|(seq, id)| (*id, *seq)).collect();
        assert_eq!(by_id.len(), stored.len(), "{me}: a message is there twice");
        for (id, seq) in acknowledged {
            assert_eq!(Some(&seq.unwrap_or(by_id[id])), by_id.get(id), "{me}: m-{id} was acknowledged as {seq:?}");
        }
    }
    assert_well(&chatd).await;
    chatd.kill9().await.unwrap();
    let (code, problems, said) = chatd.tool(&["verify"]).await.unwrap();
    assert_eq!((code, problems.as_str()), (Some(0), ""), "{said}");
}

/// Nobody resends here: what was acknowledged is there, what was not may be.
#[tokio::test]
async fn the_last_puback_before_a_crash_was_true() {
    let mut dice = Dice::thrown("last puback");
    let mut chatd = Chatd::start().await.unwrap();
    let mut last = 0;
    for round in 0..10 {
        let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
        let mut acknowledged = last;
        for text in 0..=dice.below(20) {
            acknowledged = alice.say("alice", "bob", &format!("{round}/{text}")).await.unwrap().seq.unwrap();
        }
        // One more is under way.
        alice.start_publish(Publish::new("chat/alice/out/bob", "maybe", 1)).await.unwrap();
        chatd.kill9().await.unwrap();
        chatd.restart().await.unwrap();
        let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
        last = alice.say("alice", "bob", "after").await.unwrap().seq.unwrap();
        assert!(
            [acknowledged + 1, acknowledged + 2].contains(&last),
            "{acknowledged} was acknowledged, {last} followed"
        );
    }
    let mut bob = listener(&chatd, Connect::v4("bob", "bob-phone")).await.unwrap();
    let got = bob.acked_messages(usize::try_from(last).unwrap()).await.unwrap();
    assert_eq!(crate::chat::seqs(&got), (1..=last).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_resend_is_the_same_message() {
    let mut chatd = Chatd::start().await.unwrap();
    let as_property = |id: &str, text: &str| {
        let mut publish = Publish::new("chat/alice/out/bob", text, 1);
        publish.properties = Properties::none().with_user("id", id);
        publish
    };
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    let first = alice.say_as("alice", "bob", "m-1", "hello").await.unwrap();
    assert_eq!(first.seq, Some(1));
    alice.say("alice", "bob", "between").await.unwrap();
    let answer = |ack: &end_to_end::raw::Ack| (ack.seq, ack.at);

    let again = alice.say_as("alice", "bob", "m-1", "hello").await.unwrap();
    assert_eq!(answer(&again), answer(&first), "another packet identifier");
    let again = alice.publish(as_property("m-1", "hello")).await.unwrap();
    assert_eq!(answer(&again), answer(&first), "the id as user property");
    let again = alice.publish(Publish::new("chat/alice/out/bob/m-1", "hello", 2)).await.unwrap();
    assert_eq!(answer(&again), answer(&first), "another QoS");
    alice.leave().await.unwrap();

    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    let again = alice.say_as("alice", "bob", "m-1", "hello").await.unwrap();
    assert_eq!(answer(&again), answer(&first), "after a reconnect");
    let mut laptop = Connect::v5("alice", "alice-laptop").over_web_socket().to(&chatd).await.unwrap();
    let again = laptop.say_as("alice", "bob", "m-1", "hello").await.unwrap();
    assert_eq!(answer(&again), answer(&first), "from another device");

    for graceful in [true, false] {
        if graceful {
            assert!(chatd.terminate().await.unwrap().success());
        } else {
            chatd.kill9().await.unwrap();
        }
        chatd.restart().await.unwrap();
        let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
        let again = alice.say_as("alice", "bob", "m-1", "hello").await.unwrap();
        assert_eq!(answer(&again), answer(&first), "after a restart");
        let mut old = Connect::v4("alice", "alice-old").to(&chatd).await.unwrap();
        old.say_as("alice", "bob", "m-1", "hello").await.unwrap();
    }

    // The same id is another message in another conversation, and from the other side.
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    assert_eq!(alice.say_as("alice", "carol", "m-1", "hello").await.unwrap().seq, Some(1));
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    assert_eq!(bob.say_as("bob", "alice", "m-1", "hello").await.unwrap().seq, Some(3));
    assert_eq!(texts(&bob.acked_messages(2).await.unwrap()), ["hello", "between"]);
    assert_eq!(bob.ping().await.unwrap(), [], "stored once");
}

/// Two devices send the same id at the same moment, again and again.
#[tokio::test]
async fn simultaneous_resends_are_one_message() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let mut devices = Vec::new();
    for device in ["alice-phone", "alice-laptop", "alice-web"] {
        devices.push(Connect::v5("alice", device).to(&chatd).await.unwrap());
    }
    for round in 1..=50 {
        let mut packet_ids = Vec::new();
        for device in &mut devices {
            let publish = Publish::new(format!("chat/alice/out/bob/m-{round}"), "the same", 1);
            // Twice from each, without waiting.
            packet_ids.push([
                device.start_publish(publish.clone()).await.unwrap(),
                device.start_publish(publish).await.unwrap(),
            ]);
        }
        for (device, packet_ids) in devices.iter_mut().zip(packet_ids) {
            for packet_id in packet_ids {
                assert_eq!(device.puback(packet_id).await.unwrap().seq, Some(round));
            }
        }
        assert_eq!(number(&bob.acked_message().await.unwrap().json(), "seq"), round);
    }
    assert_eq!(bob.ping().await.unwrap(), []);
}

#[tokio::test]
async fn the_same_id_with_another_text_is_refused() {
    let mut chatd = Chatd::start().await.unwrap();
    let mut phone = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    phone.say_as("alice", "bob", "m-1", "hello").await.unwrap();
    for restart in [false, true] {
        if restart {
            chatd.kill9().await.unwrap();
            chatd.restart().await.unwrap();
            phone = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
        }
        let refused = phone.say_as("alice", "bob", "m-1", "good bye").await.unwrap();
        assert_eq!((refused.code, refused.seq), (0x83, None));
        assert!(refused.reason.unwrap().contains("id_conflict"));

        let mut old = Connect::v4("alice", "alice-old").to(&chatd).await.unwrap();
        old.subscribe("chat/alice/event/error", 1).await.unwrap();
        old.say_as("alice", "bob", "m-1", "good bye").await.unwrap();
        let event = old.acked_message_on("chat/alice/event/error").await.unwrap().json();
        assert_eq!((&event["code"], &event["id"]), (&"id_conflict".into(), &"m-1".into()));
        assert_eq!(event["topic"], "chat/alice/out/bob/m-1");
        // The connection is kept, and the first text is the message.
        assert_eq!(phone.say_as("alice", "bob", "m-1", "hello").await.unwrap().seq, Some(1));
    }
    let mut bob = listener(&chatd, Connect::v4("bob", "bob-phone")).await.unwrap();
    assert_eq!(texts(&bob.acked_messages(1).await.unwrap()), ["hello"]);
    assert_eq!(bob.ping().await.unwrap(), []);
}

/// Without an id two equal texts are two messages.
#[tokio::test]
async fn without_an_id_there_is_no_such_promise() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    assert_eq!(alice.say("alice", "bob", "yes").await.unwrap().seq, Some(1));
    assert_eq!(alice.say("alice", "bob", "yes").await.unwrap().seq, Some(2));
}

/// A client whose connection breaks within the handshake of QoS 2 goes on with it: its message is there once. It connects again at once,
/// before the server can have seen the break.
#[tokio::test]
async fn a_qos_2_handshake_survives_its_connection() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    for round in 1..=20 {
        let version = if round % 2 == 0 { Version::V4 } else { Version::V5 };
        let connect = Connect::new(version, "alice", "alice-phone").persistent();
        let mut alice = connect.to(&chatd).await.unwrap();
        let mut publish = Publish::new("chat/alice/out/bob", format!("text {round}"), 2);
        publish.packet_id = 77;
        alice.start_publish(publish.clone()).await.unwrap();
        alice.pubrec(77).await.unwrap();
        drop(alice);
        let mut alice = connect.to(&chatd).await.unwrap();
        publish.dup = true;
        alice.publish(publish).await.unwrap();
        alice.leave().await.unwrap();
        let got = bob.acked_message().await.unwrap();
        assert_eq!((number(&got.json(), "seq"), got.json()["text"].clone()), (round, format!("text {round}").into()));
    }
    assert_eq!(bob.ping().await.unwrap(), []);
}

#[tokio::test]
async fn a_data_folder_serves_one_chatd_at_a_time() {
    let chatd = Chatd::start().await.unwrap();
    let mut second = end_to_end::chatd::command().await.unwrap();
    let data = chatd.data();
    second.args(["--mqtt-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--data", data.to_str().unwrap()]);
    let output = tokio::time::timeout(end_to_end::PATIENCE, second.output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains(data.to_str().unwrap()), "{output:?}");
    assert_well(&chatd).await;
}
