//! Who is there, posted: the latest state of each user, one post at a time for each.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use chat_protocol::UserId;
use chat_protocol::event::PresenceEvent;
use parking_lot::Mutex;
use rustc_hash::{FxHashMap, FxHashSet};
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::{FAILURES_MAX, IN_FLIGHT_MAX, Pace, Post};
use crate::metrics::Metrics;

/// Users whose state waits to be posted; the oldest are left out when it is full.
const WAITING_MAX: usize = 100_000;
const EVENT: &str = "presence";

#[derive(Debug, Default)]
struct Waiting {
    /// Newest state, with the number of its post.
    latest: FxHashMap<UserId, (u64, PresenceEvent)>,
    order: VecDeque<UserId>,
    told: u64,
}

impl Waiting {
    /// The first user whose last state is not under way, and this state.
    fn next(&mut self, under_way: &FxHashSet<UserId>) -> Option<(UserId, u64, PresenceEvent)> {
        let at = self.order.iter().position(|user| !under_way.contains(user))?;
        let user = self.order.remove(at)?;
        let (number, event) = self.latest.remove(&user)?;
        Some((user, number, event))
    }
}

/// States on their way to the receiver.
#[derive(Debug)]
pub struct PresenceFeed {
    waiting: Mutex<Waiting>,
    wake: Notify,
    /// Begins the ids of this run's posts.
    prefix: String,
    started_ms: u64,
    pace: Pace,
}

/// What a finished post was about.
struct Done {
    user: UserId,
    number: u64,
    event: PresenceEvent,
    outcome: Result<(), String>,
}

impl PresenceFeed {
    pub(super) fn new(identity: u64, started_ms: u64, pace: Pace) -> Self {
        Self {
            waiting: Mutex::default(),
            wake: Notify::new(),
            prefix: format!("{EVENT}-{identity:x}-{started_ms}"),
            started_ms,
            pace,
        }
    }

    /// A user's state has changed. Replaces what was not posted yet.
    pub fn tell(&self, event: PresenceEvent) {
        let mut waiting = self.waiting.lock();
        waiting.told += 1;
        let (number, user) = (waiting.told, event.user.clone());
        if waiting.latest.insert(user.clone(), (number, event)).is_none() {
            waiting.order.push_back(user);
            if waiting.order.len() > WAITING_MAX
                && let Some(oldest) = waiting.order.pop_front()
            {
                waiting.latest.remove(&oldest);
            }
        }
        drop(waiting);
        self.wake.notify_one();
    }

    /// It has to be tried again, unless there is news of this user.
    fn put_back(&self, user: UserId, number: u64, event: PresenceEvent) {
        let mut waiting = self.waiting.lock();
        if !waiting.latest.contains_key(&user) {
            waiting.order.push_front(user.clone());
            waiting.latest.insert(user, (number, event));
        }
    }

    pub(super) async fn run<P: Post>(
        self: Arc<Self>,
        poster: Arc<P>,
        metrics: Arc<Metrics>,
        stopped: impl Future<Output = ()>,
    ) {
        tokio::select! {
            () = stopped => {}
            () = self.serve(&poster, &metrics) => {}
        }
    }

    async fn serve<P: Post>(&self, poster: &Arc<P>, metrics: &Metrics) {
        let mut failures = 0;
        // Whoever was online before is not any more, and nobody said so.
        let reset = json!({"type": "presence.reset", "data": {"at": self.started_ms}}).to_string();
        while let Err(reason) = poster.post(format!("{}-0", self.prefix), reset.clone().into()).await {
            failures += 1;
            self.wait_after(failures, &reason, metrics).await;
        }
        metrics.webhook_posted(EVENT);
        failures = 0;
        let mut posts = JoinSet::new();
        let mut under_way = FxHashSet::default();
        loop {
            let limit = if failures < FAILURES_MAX { IN_FLIGHT_MAX } else { 1 };
            while posts.len() < limit
                && let Some((user, number, event)) = self.waiting.lock().next(&under_way)
            {
                under_way.insert(user.clone());
                let (poster, id) = (Arc::clone(poster), format!("{}-{number}", self.prefix));
                let body = Bytes::from(json!({"type": EVENT, "data": event}).to_string());
                posts.spawn(async move { Done { user, number, event, outcome: poster.post(id, body).await } });
            }
            let done = tokio::select! {
                Some(done) = posts.join_next() => done,
                () = self.wake.notified() => continue,
            };
            let Ok(Done { user, number, event, outcome }) = done else { continue };
            under_way.remove(&user);
            match outcome {
                Ok(()) => {
                    failures = 0;
                    metrics.webhook_posted(EVENT);
                }
                Err(reason) => {
                    self.put_back(user, number, event);
                    failures += 1;
                    self.wait_after(failures, &reason, metrics).await;
                }
            }
        }
    }

    async fn wait_after(&self, failures: u32, reason: &str, metrics: &Metrics) {
        metrics.webhook_failed(EVENT);
        let wait = self.pace.back_off(failures);
        tracing::warn!(event = EVENT, %reason, failures, wait_ms = wait.as_millis(), "a webhook was not taken");
        tokio::time::sleep(wait).await;
    }
}

#[cfg(test)]
mod tests {
    use chat_protocol::event::PresenceStatus;

    use std::time::Duration;

    use super::*;

    const FAST: Pace = Pace { first_wait: Duration::from_micros(100), look_interval: Duration::from_millis(1) };

    /// Remembers what it took; refuses the first so many.
    #[derive(Default)]
    struct Receiver {
        taken: Mutex<Vec<(String, serde_json::Value)>>,
        refuse: Mutex<usize>,
        got: Notify,
    }

    impl Post for Receiver {
        async fn post(&self, id: String, body: Bytes) -> Result<(), String> {
            let refuses = {
                let mut refuse = self.refuse.lock();
                *refuse = refuse.saturating_sub(1);
                *refuse > 0
            };
            if refuses {
                return Err("not now".to_owned());
            }
            self.taken.lock().push((id, serde_json::from_slice(&body).expect("JSON")));
            self.got.notify_one();
            Ok(())
        }
    }

    fn event(name: &str, status: PresenceStatus) -> PresenceEvent {
        PresenceEvent { user: UserId::parse(name).expect("a name"), status, last_seen: None }
    }

    #[tokio::test]
    async fn the_latest_state_of_each_user_arrives_after_the_reset() {
        let feed = Arc::new(PresenceFeed::new(10, 1_000, FAST));
        let receiver = Arc::new(Receiver { refuse: Mutex::new(4), ..Receiver::default() });
        feed.tell(event("bob", PresenceStatus::Online));
        feed.tell(event("bob", PresenceStatus::Offline));
        feed.tell(event("alice", PresenceStatus::Online));
        let running = Arc::clone(&feed).run(Arc::clone(&receiver), Arc::new(Metrics::new()), std::future::pending());
        let running = tokio::spawn(running);
        while receiver.taken.lock().len() < 3 {
            receiver.got.notified().await;
        }
        running.abort();
        let taken = receiver.taken.lock();
        let told = |at: usize| (taken[at].0.as_str(), taken[at].1["type"].as_str(), &taken[at].1["data"]);
        assert_eq!(told(0), ("presence-a-1000-0", Some("presence.reset"), &json!({"at": 1_000})));
        assert_eq!(told(1), ("presence-a-1000-2", Some("presence"), &json!({"user": "bob", "status": "offline"})));
        assert_eq!(told(2), ("presence-a-1000-3", Some("presence"), &json!({"user": "alice", "status": "online"})));
    }

    #[test]
    fn what_waits_is_bounded() {
        let feed = PresenceFeed::new(1, 1, FAST);
        for nth in 0..=WAITING_MAX {
            feed.tell(event(&format!("user-{nth}"), PresenceStatus::Online));
        }
        let mut waiting = feed.waiting.lock();
        assert_eq!((waiting.order.len(), waiting.latest.len()), (WAITING_MAX, WAITING_MAX));
        assert_eq!(waiting.next(&FxHashSet::default()).map(|(user, ..)| user.to_string()), Some("user-1".to_owned()));
    }
}
