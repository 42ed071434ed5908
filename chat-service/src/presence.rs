//! Presence: who has a device connected, told to those they share a conversation with.
//!
//! A user is online while any device is connected, and a grace period longer, so that a reconnect is not seen. Only changes are told, and
//! only to those who listen, in small portions; and two who begin a conversation are told of each other. After a restart nobody is online
//! until they connect; when they were last seen is in the log.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use broker::Announcer;
use broker::live::LiveMessage;
use broker::service::Subscriber;
use chat_protocol::event::{PresenceEvent, PresenceStatus, encode_event};
use chat_protocol::topic::Down;
use chat_protocol::{Timestamp, UserId};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use crate::log::{Log, LogError};
use crate::views::Views;
use crate::webhooks::PresenceFeed;

/// Events that are announced together; the next portion comes after a pause.
const PORTION: usize = 256;
const PAUSE: Duration = Duration::from_millis(10);
/// States that a new listener is told at first.
const FIRST_STATES_MAX: usize = 2_000;
/// Users whose new listeners are told at a time.
const TELLING_MAX: usize = 4;
/// From when a user's listeners were told until those are who came meanwhile: whoever subscribes again and again makes nobody wait.
const TELL_INTERVAL: Duration = Duration::from_millis(100);
/// Pairs who began to see each other and are to be told; of further ones each learns of the other with the next change.
const MET_MAX: usize = 4_096;

/// A user who has or had a device connected.
#[derive(Debug, Default)]
struct Online {
    /// Connections.
    devices: usize,
    /// Others were told that the user is online.
    told: bool,
    /// When the grace after the last device's going is over.
    gone_at: Option<Instant>,
}

#[derive(Debug, Default)]
struct State {
    online: FxHashMap<UserId, Online>,
    /// Users whose last device went, in that order, and when their grace is over.
    leaving: VecDeque<(Instant, UserId)>,
    /// Users who came, to be told.
    arrived: VecDeque<UserId>,
    /// Those who from now on see each other, to be told.
    met: VecDeque<[UserId; 2]>,
}

/// What is to be told next.
#[derive(Debug)]
enum Change {
    /// A user came or went.
    Of(UserId),
    /// These see each other from now on.
    Met([UserId; 2]),
}

/// Who is there.
pub struct Presence<L> {
    log: Arc<L>,
    views: Views<L>,
    announcer: Announcer,
    grace: Duration,
    state: Mutex<State>,
    /// Those who began to listen and are to be told the states, of each connection one. A user who is in here has one task, and no more.
    listeners: Mutex<FxHashMap<UserId, Vec<Subscriber>>>,
    telling: Semaphore,
    wake: Notify,
    /// Also told there.
    webhook: Option<Arc<PresenceFeed>>,
}

impl<L: Log> Presence<L> {
    pub fn new(log: Arc<L>, announcer: Announcer, grace: Duration, webhook: Option<Arc<PresenceFeed>>) -> Self {
        Self {
            views: Views::new(Arc::clone(&log)),
            log,
            announcer,
            grace,
            state: Mutex::default(),
            listeners: Mutex::default(),
            telling: Semaphore::new(TELLING_MAX),
            wake: Notify::new(),
            webhook,
        }
    }

    /// A device of this user is there.
    pub fn arrived(&self, user: &UserId) {
        let mut state = self.state.lock();
        let online = state.online.entry(user.clone()).or_default();
        online.devices += 1;
        online.gone_at = None;
        if !online.told {
            online.told = true;
            state.arrived.push_back(user.clone());
            drop(state);
            self.wake.notify_one();
        }
    }

    /// A device of this user has gone.
    pub fn left(&self, user: &UserId) {
        let mut state = self.state.lock();
        let Some(online) = state.online.get_mut(user) else { return };
        online.devices = online.devices.saturating_sub(1);
        if online.devices == 0 {
            let gone_at = Instant::now() + self.grace;
            online.gone_at = Some(gone_at);
            state.leaving.push_back((gone_at, user.clone()));
            drop(state);
            self.log.note_seen(user, now_ms());
            self.wake.notify_one();
        }
    }

    fn is_online(&self, user: &UserId) -> bool {
        self.state.lock().online.contains_key(user)
    }

    /// These began a conversation, or one unblocked the other: each sees from now on whether the other is there.
    pub fn met(&self, one: &UserId, other: &UserId) {
        if !self.is_listened_to(one) && !self.is_listened_to(other) {
            return;
        }
        let mut state = self.state.lock();
        if state.met.len() < MET_MAX {
            state.met.push_back([one.clone(), other.clone()]);
            drop(state);
            self.wake.notify_one();
        }
    }

    /// Whether a device of this user wants to know who is there.
    fn is_listened_to(&self, user: &UserId) -> bool {
        self.announcer.has_subscribers(&Down::Presence.topic(user))
    }

    /// A connection of this user listens from now on: it is told the states as they are.
    pub fn listens(self: &Arc<Self>, user: UserId, subscriber: Subscriber) {
        {
            let mut listeners = self.listeners.lock();
            if let Some(waiting) = listeners.get_mut(&user) {
                waiting.retain(|other| !other.is_same(&subscriber) && !other.is_gone());
                waiting.push(subscriber);
                return;
            }
            listeners.insert(user.clone(), vec![subscriber]);
        }
        let presence = Arc::clone(self);
        tokio::spawn(async move { presence.tell_listeners(&user).await });
    }

    /// Tells a user's listeners, until nobody is left to be told.
    async fn tell_listeners(&self, user: &UserId) {
        while let Ok(turn) = self.telling.acquire().await {
            let Some(listeners) = self.next_listeners(user) else { return };
            if let Err(error) = self.tell_states(user, &listeners).await {
                tracing::error!(%error, "who is there could not be told");
            }
            drop(turn);
            tokio::time::sleep(TELL_INTERVAL).await;
        }
    }

    /// `None`: there are none, and the user is forgotten.
    fn next_listeners(&self, user: &UserId) -> Option<Vec<Subscriber>> {
        let mut listeners = self.listeners.lock();
        let waiting = std::mem::take(listeners.get_mut(user)?);
        if waiting.is_empty() {
            listeners.remove(user);
            return None;
        }
        Some(waiting)
    }

    async fn tell_states(&self, user: &UserId, listeners: &[Subscriber]) -> Result<(), LogError> {
        let topic: Arc<str> = Down::Presence.topic(user).into();
        let peers = self.views.peers(user).await?;
        let (online, offline): (Vec<UserId>, Vec<UserId>) = peers.into_iter().partition(|peer| self.is_online(peer));
        for (told, peer) in online.into_iter().chain(offline).take(FIRST_STATES_MAX).enumerate() {
            if !self.views.blocks(&peer, user).await?
                && let Some(event) = self.event(&peer).await?
            {
                let event: bytes::Bytes = encode_event(&event).into();
                for listener in listeners {
                    listener.send(LiveMessage::event(Arc::clone(&topic), event.clone()).retained());
                }
            }
            if told % PORTION == PORTION - 1 {
                if listeners.iter().all(Subscriber::is_gone) {
                    break;
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
        Ok(())
    }

    /// The state of a user; `None` if they were never there.
    async fn event(&self, user: &UserId) -> Result<Option<PresenceEvent>, LogError> {
        if self.is_online(user) {
            return Ok(Some(PresenceEvent { user: user.clone(), status: PresenceStatus::Online, last_seen: None }));
        }
        let last_seen = self.log.last_seen(user).await?.map(Timestamp::from_ms);
        Ok(last_seen.map(|at| PresenceEvent {
            user: user.clone(),
            status: PresenceStatus::Offline,
            last_seen: Some(at),
        }))
    }

    /// Tells changes until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: impl Future<Output = ()>) {
        let telling = async {
            loop {
                while let Some(change) = self.next_change() {
                    let told = match &change {
                        Change::Of(user) => self.tell(user).await,
                        Change::Met(pair) => self.tell_pair(pair).await,
                    };
                    if let Err(error) = told {
                        tracing::error!(%error, ?change, "who is there could not be told");
                    }
                }
                let due = self.state.lock().leaving.front().map(|(due, _)| *due);
                match due {
                    Some(due) => drop(tokio::time::timeout_at(due, self.wake.notified()).await),
                    None => self.wake.notified().await,
                }
            }
        };
        tokio::select! {
            () = shutdown => {}
            () = telling => {}
        }
    }

    /// What is to be told next.
    fn next_change(&self) -> Option<Change> {
        let mut state = self.state.lock();
        let state = &mut *state;
        if let Some(user) = state.arrived.pop_front() {
            return Some(Change::Of(user));
        }
        if let Some(pair) = state.met.pop_front() {
            return Some(Change::Met(pair));
        }
        let now = Instant::now();
        while let Some((gone_at, user)) = state.leaving.pop_front_if(|(gone_at, _)| *gone_at <= now) {
            // Who came back meanwhile is still there; who left again has a later place in the queue.
            if state.online.get(&user).is_some_and(|online| online.gone_at == Some(gone_at)) {
                state.online.remove(&user);
                return Some(Change::Of(user));
            }
        }
        // A crowd that is gone leaves no room behind.
        if state.leaving.len() < state.leaving.capacity() / 4 {
            state.leaving.shrink_to_fit();
        }
        if state.online.len() < state.online.capacity() / 4 {
            state.online.shrink_to_fit();
        }
        None
    }

    async fn tell_pair(&self, [one, other]: &[UserId; 2]) -> Result<(), LogError> {
        let blocked = self.views.blocks(one, other).await? || self.views.blocks(other, one).await?;
        if blocked || !self.views.share_a_conversation(one, other).await? {
            return Ok(());
        }
        let mut messages = Vec::with_capacity(2);
        for (listener, peer) in [(one, other), (other, one)] {
            if let Some(event) = self.event(peer).await? {
                let event: bytes::Bytes = encode_event(&event).into();
                messages.push(LiveMessage::event(Down::Presence.topic(listener).into(), event));
            }
        }
        self.announcer.announce(messages);
        Ok(())
    }

    async fn tell(&self, user: &UserId) -> Result<(), LogError> {
        let Some(event) = self.event(user).await? else { return Ok(()) };
        if let Some(webhook) = &self.webhook {
            webhook.tell(event.clone());
        }
        let event: bytes::Bytes = encode_event(&event).into();
        let peers = self.views.peers(user).await?.into_iter();
        let listening: Vec<(UserId, String)> = peers
            .map(|peer| (Down::Presence.topic(&peer), peer))
            .filter(|(topic, _)| self.announcer.has_subscribers(topic))
            .map(|(topic, peer)| (peer, topic))
            .collect();
        for (nth, portion) in listening.chunks(PORTION).enumerate() {
            if nth > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            let mut messages = Vec::with_capacity(portion.len());
            for (peer, topic) in portion {
                if !self.views.blocks(peer, user).await? {
                    messages.push(LiveMessage::event(topic.as_str().into(), event.clone()));
                }
            }
            self.announcer.announce(messages);
        }
        Ok(())
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
