//! What several topics' tests say about chat.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use chat_protocol::{ConversationId, Seq, Timestamp, UserId};
use chat_service::log::{Log, NewEntry, RedbLog, RedbOptions};
use end_to_end::packet::{Packet, Publish};
use end_to_end::{Chatd, Client, Connect};
use serde_json::Value;
use tokio::task::JoinHandle;

/// A member of an envelope that is a number.
pub(crate) fn number(envelope: &Value, member: &str) -> u64 {
    envelope[member].as_u64().unwrap_or_else(|| panic!("{member} in {envelope}"))
}

/// The seqs of envelopes.
pub(crate) fn seqs(messages: &[Publish]) -> Vec<u64> {
    messages.iter().map(|message| number(&message.json(), "seq")).collect()
}

/// What came, but for who is there: that may be told at any moment.
pub(crate) fn without_presence(packets: Vec<Packet>) -> Vec<Packet> {
    let tells_presence =
        |packet: &Packet| matches!(packet, Packet::Publish(event) if event.topic.ends_with("/event/presence"));
    packets.into_iter().filter(|packet| !tells_presence(packet)).collect()
}

/// The texts of envelopes.
pub(crate) fn texts(messages: &[Publish]) -> Vec<String> {
    messages.iter().map(|message| message.json()["text"].as_str().expect("a text").to_owned()).collect()
}

/// Texts to be sent from `me` to `peer` at QoS 1.
pub(crate) fn sends<T: Iterator<Item = String>>(
    me: &str,
    peer: &str,
    texts: T,
) -> impl Iterator<Item = Publish> + use<T> {
    let topic = format!("chat/{me}/out/{peer}");
    texts.map(move |text| Publish::new(topic.clone(), text, 1))
}

/// `prefix 1` to `prefix n`.
pub(crate) fn numbered(prefix: &str, numbers: std::ops::RangeInclusive<u64>) -> impl Iterator<Item = String> {
    let prefix = prefix.to_owned();
    numbers.map(move |number| format!("{prefix} {number}"))
}

/// A subscribed client of bob's inbox with a session that ends with the connection.
pub(crate) async fn listener(chatd: &Chatd, connect: Connect) -> Result<Client> {
    let inbox = format!("chat/{}/inbox", connect.user_name.as_deref().context("who?")?);
    let mut client = connect.to(chatd).await?;
    client.subscribe(&inbox, 1).await?;
    Ok(client)
}

/// Two who chat all the time, over TCP with MQTT 5 and over WebSocket with MQTT 3.1.1, and whom nothing may disturb.
pub(crate) struct Bystanders {
    stop: Arc<AtomicBool>,
    chatting: JoinHandle<Result<u64>>,
}

impl Bystanders {
    pub(crate) async fn of(chatd: &Chatd) -> Result<Self> {
        let mut ada = listener(chatd, Connect::v5("ada", "ada-phone")).await?;
        let mut max = listener(chatd, Connect::v4("max", "max-laptop").over_web_socket()).await?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let chatting = tokio::spawn(async move {
            let mut round = 0;
            loop {
                round += 1;
                exchange(&mut ada, &mut max, round).await.with_context(|| format!("bystanders, round {round}"))?;
                if told.load(Ordering::Relaxed) {
                    ada.leave().await?;
                    max.leave().await?;
                    return Ok(round);
                }
                // They chat; they are no load test.
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        });
        Ok(Self { stop, chatting })
    }

    /// They still chat, on the connections that they had from the beginning. Returns how often they wrote to each other.
    pub(crate) async fn were_not_disturbed(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.chatting.await.context("the bystanders")?
    }
}

async fn exchange(ada: &mut Client, max: &mut Client, round: u64) -> Result<()> {
    let ack = ada.say("ada", "max", &format!("to max {round}")).await?;
    ensure!(ack.code == 0, "ada's PUBACK: {ack:?}");
    let got = max.acked_message().await?;
    ensure!(got.json()["text"] == format!("to max {round}"), "max got {got:?}");
    max.say("max", "ada", &format!("to ada {round}")).await?;
    let got = ada.acked_message().await?;
    ensure!(got.json()["text"] == format!("to ada {round}"), "ada got {got:?}");
    ensure!(got.json()["seq"] == 2 * round, "two messages a round: {got:?}");
    Ok(())
}

/// A message that was sent some time ago.
pub(crate) struct Told {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) text: String,
    pub(crate) days_ago: u64,
}

/// Puts messages into a data folder that no chatd has open, as the first ones of their conversations.
pub(crate) async fn put_messages(folder: &Path, messages: impl IntoIterator<Item = Told>) {
    let log = RedbLog::open(folder, RedbOptions::default()).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut seqs: BTreeMap<ConversationId, u64> = BTreeMap::new();
    let entry = |Told { from, to, text, days_ago }| {
        let (from, to) = (UserId::parse(&from).unwrap(), UserId::parse(&to).unwrap());
        let conversation = ConversationId::between(&from, &to).unwrap();
        let seq = seqs.entry(conversation.clone()).or_default();
        *seq += 1;
        let at = now - Duration::from_secs(days_ago * 86_400);
        NewEntry {
            conversation,
            seq: Seq::new(*seq).unwrap(),
            from,
            to,
            id: None,
            at: Timestamp::from_ms(u64::try_from(at.as_millis()).unwrap()),
            body: text.into(),
            withheld: false,
        }
    };
    log.append(messages.into_iter().map(entry).collect::<Vec<_>>()).await.unwrap();
}

/// Healthy, no task panicked, and neither bus had to be replaced.
pub(crate) async fn assert_well(chatd: &Chatd) {
    let (status, body) = chatd.healthz().await.unwrap();
    assert_eq!(status, 200, "{body}");
    assert_eq!(chatd.metric("chatd_bus_restarts_total").await.unwrap(), 0.0);
    let log = chatd.log().unwrap();
    let panic = log.lines().find(|line| line.contains("panicked"));
    assert_eq!(panic, None);
}

/// Waits until so many deliveries were acknowledged.
pub(crate) async fn until_delivered(chatd: &Chatd, messages: u32) {
    end_to_end::eventually(&format!("{messages} delivered"), end_to_end::PATIENCE, async || {
        chatd.metric("chatd_messages_delivered_total").await.unwrap() >= f64::from(messages)
    })
    .await;
}
