//! Receipts: what has reached a peer, and what the peer has read, told to the sender's devices.
//!
//! A receipt is cumulative: one that is lost or replaced by a later one is no loss. What moved is gathered, and told at most once in a
//! while for each conversation, with the cursors as the log has them then. Work is done only for senders who listen.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use broker::Announcer;
use broker::live::LiveMessage;
use chat_protocol::UserId;
use chat_protocol::event::{ReadEvent, ReceiptEvent, encode_event};
use chat_protocol::topic::Down;
use parking_lot::Mutex;
use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::log::{Log, LogError, Position, ReadLimit, Side, Stream};
use crate::views::Views;

/// From one receipt of a conversation to the next.
const INTERVAL: Duration = Duration::from_millis(100);
/// Entries of an inbox that are looked at together for their senders.
const PAGE: ReadLimit = ReadLimit { entries: 1_000, bytes: usize::MAX };
/// Conversations whose last receipt is remembered, so that it is not told twice; when it is full all are forgotten.
const TOLD_MAX: usize = 100_000;
/// Users who may have listened once, before it is looked who still does; and how often it is looked, where much is told.
const SWEEP_AT_LEAST: usize = 1_024;
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// What moved since the last look.
#[derive(Debug, Default)]
struct Moved {
    /// A user's inbox was acknowledged, from somewhere to somewhere.
    delivered: FxHashMap<UserId, (Position, Position)>,
    /// Reader and sender.
    read: FxHashSet<(UserId, UserId)>,
}

/// Users who listened to receipts once; those who do not any more are forgotten when they may be the half, and now and then.
#[derive(Debug, Default)]
struct Listeners {
    users: FxHashSet<UserId>,
    sweep_at: usize,
    swept_at: Option<Instant>,
}

impl Listeners {
    fn sweep(&mut self, announcer: &Announcer) {
        self.users.retain(|user| announcer.has_subscribers(&Down::Receipt.topic(user)));
        self.sweep_at = (self.users.len() * 2).max(SWEEP_AT_LEAST);
        self.users.shrink_to(self.sweep_at);
        self.swept_at = Some(Instant::now());
    }
}

/// Gathers what moved.
pub struct Receipts<L> {
    log: Arc<L>,
    views: Views<L>,
    announcer: Announcer,
    moved: Mutex<Moved>,
    listeners: Mutex<Listeners>,
    wake: Notify,
}

impl<L: Log> Receipts<L> {
    pub fn new(log: Arc<L>, announcer: Announcer) -> Self {
        Self {
            views: Views::new(Arc::clone(&log)),
            log,
            announcer,
            moved: Mutex::default(),
            listeners: Mutex::default(),
            wake: Notify::new(),
        }
    }

    /// A user begins to listen.
    pub fn listens(&self, user: &UserId) {
        let mut listeners = self.listeners.lock();
        if listeners.users.len() >= listeners.sweep_at.max(SWEEP_AT_LEAST) {
            listeners.sweep(&self.announcer);
        }
        listeners.users.insert(user.clone());
    }

    /// A user's inbox was acknowledged from one position to another.
    pub fn delivered(&self, user: &UserId, after: Position, position: Position) {
        if self.listeners.lock().users.is_empty() {
            return;
        }
        let mut moved = self.moved.lock();
        let range = moved.delivered.entry(user.clone()).or_insert((after, position));
        *range = (range.0.min(after), range.1.max(position));
        drop(moved);
        self.wake.notify_one();
    }

    /// A user has read more of what a peer sent, or said so on one of their devices.
    pub fn read(&self, reader: &UserId, sender: &UserId) {
        self.moved.lock().read.insert((reader.clone(), sender.clone()));
        self.wake.notify_one();
    }

    /// Tells receipts until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: impl Future<Output = ()>) {
        let telling = async {
            let mut told = FxHashMap::default();
            loop {
                self.wake.notified().await;
                let began = Instant::now();
                let moved = std::mem::take(&mut *self.moved.lock());
                if let Err(error) = self.tell(moved, &mut told).await {
                    tracing::error!(%error, "receipts could not be told");
                }
                // The first is told at once, what comes meanwhile together.
                tokio::time::sleep_until(began + INTERVAL).await;
            }
        };
        tokio::select! {
            () = shutdown => {}
            () = telling => {}
        }
    }

    async fn tell(&self, moved: Moved, told: &mut FxHashMap<(UserId, UserId), ReceiptEvent>) -> Result<(), LogError> {
        let mut pairs: BTreeSet<(UserId, UserId)> = BTreeSet::new();
        for (reader, sender) in moved.read {
            if let Some(record) = self.log.peer(&reader, &sender).await? {
                let event = encode_event(&ReadEvent { with: sender.clone(), read: record.read });
                self.announce(Down::Read, &reader, event);
            }
            pairs.insert((sender, reader));
        }
        {
            let mut listeners = self.listeners.lock();
            if listeners.swept_at.is_none_or(|at| at.elapsed() >= SWEEP_INTERVAL) {
                listeners.sweep(&self.announcer);
            }
        }
        for (receiver, (after, position)) in moved.delivered {
            for sender in self.senders(&receiver, after, position).await? {
                pairs.insert((sender, receiver.clone()));
            }
        }
        if told.len() > TOLD_MAX {
            told.clear();
        }
        for (sender, receiver) in pairs {
            if !self.announcer.has_subscribers(&Down::Receipt.topic(&sender)) {
                continue;
            }
            let read = self.log.peer(&receiver, &sender).await?.map_or(0, |record| record.read);
            let delivered = self.views.delivered(&sender, &receiver).await?;
            let event = ReceiptEvent { with: receiver.clone(), delivered, read };
            let key = (sender, receiver);
            if told.get(&key) != Some(&event) {
                self.announce(Down::Receipt, &key.0, encode_event(&event));
                told.insert(key, event);
            }
        }
        Ok(())
    }

    /// Who listens, of those who sent what a user's inbox has between two positions.
    async fn senders(
        &self,
        receiver: &UserId,
        after: Position,
        position: Position,
    ) -> Result<BTreeSet<UserId>, LogError> {
        let mut senders = BTreeSet::new();
        let inbox = Stream { user: receiver.clone(), side: Side::Inbox };
        let mut after = after;
        while after < position {
            let page = self.log.read(&inbox, after, PAGE).await?;
            let Some(last) = page.entries.last() else { break };
            after = last.position;
            let listeners = self.listeners.lock();
            let heard = page.entries.into_iter().filter(|entry| entry.position <= position);
            senders.extend(heard.map(|entry| entry.from).filter(|sender| listeners.users.contains(sender)));
            if page.end {
                break;
            }
        }
        Ok(senders)
    }

    fn announce(&self, down: Down, user: &UserId, event: Vec<u8>) {
        let topic = down.topic(user);
        if self.announcer.has_subscribers(&topic) {
            self.announcer.announce(vec![LiveMessage::event(topic.into(), event)]);
        }
    }
}
