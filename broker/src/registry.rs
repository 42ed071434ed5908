//! Who is connected, and which connections want which bound topic.
//!
//! A session belongs to one connection at a time: a new one takes over and the old one is told. Subscribers of bound topics are found by the
//! topic's exact name; whoever registers before reading the log misses nothing.

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::live::LiveMessage;
use crate::mailbox::{Ending, Mailbox};
use crate::service::SessionKey;
use crate::session::push_few;
use crate::topics::filter;

const SHARDS: usize = 64;

/// A connection's number: never used twice in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ConnectionNumber(pub(crate) u64);

/// Why a connection does not get its session.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotAttached {
    /// The server admits no new connections.
    Stopping,
    /// The user has as many as may be.
    TooMany,
}

#[derive(Debug)]
struct Holder {
    number: ConnectionNumber,
    mailbox: Arc<Mailbox>,
    /// A connection; otherwise somebody who has something to do with the session while it has none.
    counts: bool,
}

#[derive(Debug, Default)]
struct Sessions {
    holders: FxHashMap<SessionKey, Holder>,
    /// Those that hold a session: one that was taken over and has not ended yet does not count.
    connections_by_user: FxHashMap<Arc<str>, usize>,
    closed: bool,
}

type Subscribers = FxHashMap<Arc<str>, Vec<(ConnectionNumber, Arc<Mailbox>)>>;

#[derive(Debug)]
pub(crate) struct Registry {
    sessions: Mutex<Sessions>,
    topics: Vec<RwLock<Subscribers>>,
    /// Bound topics with subscribers that gather the messages of many: few. Empty in nearly every server, so that is looked at first.
    gathering: RwLock<Vec<Arc<str>>>,
    gathers: AtomicBool,
}

impl Registry {
    pub(crate) fn new() -> Self {
        Self {
            sessions: Mutex::new(Sessions::default()),
            topics: (0..SHARDS).map(|_| RwLock::new(Subscribers::default())).collect(),
            gathering: RwLock::new(Vec::new()),
            gathers: AtomicBool::new(false),
        }
    }

    /// Makes this connection the holder of its session; gives the mailbox of the one that held it and is ended now. Refused if its user has
    /// `user_max` others (0: no limit).
    pub(crate) fn attach(
        &self,
        key: &SessionKey,
        number: ConnectionNumber,
        mailbox: &Arc<Mailbox>,
        user_max: usize,
    ) -> Result<Option<Arc<Mailbox>>, NotAttached> {
        let mut sessions = self.sessions.lock();
        if sessions.closed {
            return Err(NotAttached::Stopping);
        }
        if !sessions.holders.get(key).is_some_and(|holder| holder.counts) {
            let count = sessions.connections_by_user.get(&key.user).copied().unwrap_or_default();
            if user_max > 0 && count >= user_max {
                return Err(NotAttached::TooMany);
            }
            sessions.connections_by_user.insert(Arc::clone(&key.user), count + 1);
        }
        let holder = Holder { number, mailbox: Arc::clone(mailbox), counts: true };
        let previous = sessions.holders.insert(key.clone(), holder);
        drop(sessions);
        Ok(previous.map(|previous| {
            previous.mailbox.end(Ending::TakenOver);
            previous.mailbox
        }))
    }

    /// The connection has ended. `true` if the session was still its own.
    pub(crate) fn detach(&self, key: &SessionKey, number: ConnectionNumber) -> bool {
        let mut sessions = self.sessions.lock();
        let own = sessions.holders.get(key).is_some_and(|holder| holder.number == number);
        if own {
            sessions.holders.remove(key);
            if let Some(count) = sessions.connections_by_user.get_mut(&key.user) {
                *count -= 1;
                if *count == 0 {
                    sessions.connections_by_user.remove(&key.user);
                }
            }
        }
        own
    }

    /// Holds a session that no connection has, without being one: whoever comes waits until [`Mailbox::settle`]. `false` if there is a connection.
    pub(crate) fn hold(&self, key: &SessionKey, number: ConnectionNumber, mailbox: &Arc<Mailbox>) -> bool {
        let mut sessions = self.sessions.lock();
        if sessions.closed || sessions.holders.contains_key(key) {
            return false;
        }
        sessions.holders.insert(key.clone(), Holder { number, mailbox: Arc::clone(mailbox), counts: false });
        true
    }

    /// The end of [`Registry::hold`].
    pub(crate) fn let_go(&self, key: &SessionKey, number: ConnectionNumber) {
        let mut sessions = self.sessions.lock();
        if sessions.holders.get(key).is_some_and(|holder| holder.number == number) {
            sessions.holders.remove(key);
        }
    }

    pub(crate) fn is_connected(&self, user: &str) -> bool {
        self.sessions.lock().connections_by_user.contains_key(user)
    }

    /// Ends every connection and admits no new one.
    pub(crate) fn close(&self) {
        let mut sessions = self.sessions.lock();
        sessions.closed = true;
        for holder in sessions.holders.values() {
            holder.mailbox.end(Ending::Shutdown);
        }
    }

    fn shard(&self, topic: &str) -> &RwLock<Subscribers> {
        let hash = FxBuildHasher.hash_one(topic);
        // The upper bits: the map inside the shard uses the lower ones.
        let index = usize::try_from(hash >> 58).unwrap_or(0) % SHARDS;
        &self.topics[index]
    }

    /// Every connection looks again at who it is and what it may do.
    pub(crate) fn recheck(&self) {
        for holder in self.sessions.lock().holders.values() {
            holder.mailbox.push_recheck();
        }
    }

    pub(crate) fn subscribe(&self, topic: &Arc<str>, number: ConnectionNumber, mailbox: &Arc<Mailbox>) {
        let mut shard = self.shard(topic).write();
        let subscribers = shard.entry(Arc::clone(topic)).or_default();
        if !subscribers.iter().any(|(other, _)| *other == number) {
            push_few(subscribers, (number, Arc::clone(mailbox)));
        }
        if filter::has_wildcard(topic) {
            let mut gathering = self.gathering.write();
            if !gathering.contains(topic) {
                gathering.push(Arc::clone(topic));
            }
            self.gathers.store(true, Ordering::Release);
        }
    }

    pub(crate) fn unsubscribe(&self, topic: &str, number: ConnectionNumber) {
        let mut shard = self.shard(topic).write();
        if let Some(subscribers) = shard.get_mut(topic) {
            subscribers.retain(|(other, _)| *other != number);
            if subscribers.is_empty() {
                shard.remove(topic);
                if filter::has_wildcard(topic) {
                    let mut gathering = self.gathering.write();
                    gathering.retain(|other| **other != *topic);
                    self.gathers.store(!gathering.is_empty(), Ordering::Release);
                }
            }
        }
    }

    /// Entries of each map, by its name.
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 4] {
        let (sessions, users) = {
            let sessions = self.sessions.lock();
            (sessions.holders.len(), sessions.connections_by_user.len())
        };
        let bound_topics = self.topics.iter().map(|shard| shard.read().len()).sum();
        let gathering = self.gathering.read().len();
        [("sessions", sessions), ("users", users), ("bound_topics", bound_topics), ("gathering_topics", gathering)]
    }

    /// Whether answers on this topic will have room with somebody who subscribes to it, or nobody does.
    pub(crate) fn takes_answers(&self, topic: &str) -> bool {
        let shard = self.shard(topic).read();
        shard.get(topic).is_none_or(|subscribers| subscribers.iter().any(|(_, mailbox)| mailbox.takes_answers()))
    }

    pub(crate) fn has_subscribers(&self, topic: &str) -> bool {
        self.shard(topic).read().contains_key(topic)
    }

    /// Delivers messages of one topic, in their order.
    pub(crate) fn deliver(&self, messages: &[Arc<LiveMessage>]) {
        let Some(first) = messages.first() else { return };
        self.deliver_to(&first.topic, messages);
        if self.gathers.load(Ordering::Acquire) {
            let gathering = self.gathering.read().clone();
            for bound in gathering.iter().filter(|bound| filter::matches(bound, &first.topic)) {
                let gathered: Vec<_> = messages.iter().map(|message| Arc::new(message.gathered(bound))).collect();
                self.deliver_to(bound, &gathered);
            }
        }
    }

    fn deliver_to(&self, bound: &str, messages: &[Arc<LiveMessage>]) {
        if let Some(subscribers) = self.shard(bound).read().get(bound) {
            for (_, mailbox) in subscribers {
                mailbox.push_live(messages);
            }
        }
    }

    /// Live messages were lost, nobody knows whose: every subscriber reads its log.
    pub(crate) fn deliver_missed(&self) {
        for shard in &self.topics {
            for (_, mailbox) in shard.read().values().flatten() {
                mailbox.push_missed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(user: &str) -> SessionKey {
        SessionKey { user: user.into(), client_id: "phone".into() }
    }

    fn mailbox() -> Arc<Mailbox> {
        let mailbox = Arc::new(Mailbox::new(crate::queues::tests::queues()));
        mailbox.belong_to(&"bob".into());
        mailbox
    }

    #[test]
    fn takeover_happens_within_one_user_only() {
        let registry = Registry::new();
        let (bob, other_bob, alice) = (mailbox(), mailbox(), mailbox());
        registry.attach(&key("bob"), ConnectionNumber(1), &bob, 0).expect("not stopping");
        registry.attach(&key("alice"), ConnectionNumber(2), &alice, 0).expect("not stopping");
        registry.attach(&key("bob"), ConnectionNumber(3), &other_bob, 0).expect("not stopping");
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(
            matches!(bob.poll(&mut cx, true), std::task::Poll::Ready(mail) if mail.ending == Some(Ending::TakenOver))
        );
        assert!(alice.poll(&mut cx, true).is_pending());
        assert!(!registry.detach(&key("bob"), ConnectionNumber(1)), "the session is no longer the old connection's");
        assert!(registry.is_connected("bob"));
        assert!(registry.detach(&key("bob"), ConnectionNumber(3)));
        assert!(!registry.is_connected("bob"));
    }

    #[test]
    fn a_user_has_so_many_connections_and_may_take_over_their_own() {
        let registry = Registry::new();
        let attach = |user: &str, client_id: &str, number| {
            let key = SessionKey { user: user.into(), client_id: client_id.into() };
            registry.attach(&key, ConnectionNumber(number), &mailbox(), 2).map(|previous| previous.is_some())
        };
        assert_eq!(attach("bob", "phone", 1), Ok(false));
        assert_eq!(attach("bob", "laptop", 2), Ok(false));
        assert_eq!(attach("bob", "tablet", 3), Err(NotAttached::TooMany));
        assert_eq!(attach("alice", "phone", 4), Ok(false));
        assert_eq!(attach("bob", "phone", 5), Ok(true));
        registry.detach(&key("bob"), ConnectionNumber(1));
        assert_eq!(attach("bob", "tablet", 6), Err(NotAttached::TooMany), "what was taken over had left already");
        registry.detach(&key("bob"), ConnectionNumber(5));
        assert_eq!(attach("bob", "tablet", 7), Ok(false));
    }

    /// Somebody holds a session whose client comes back meanwhile: that is a connection as any other.
    #[test]
    fn who_takes_over_from_no_connection_is_counted() {
        let registry = Registry::new();
        let attach = |client_id: &str, number| {
            let key = SessionKey { user: "bob".into(), client_id: client_id.into() };
            registry.attach(&key, ConnectionNumber(number), &mailbox(), 2).map(|previous| previous.is_some())
        };
        assert_eq!(attach("laptop", 1), Ok(false));
        assert!(registry.hold(&key("bob"), ConnectionNumber(2), &mailbox()));
        assert_eq!(attach("phone", 3), Ok(true), "it waits for who holds the session");
        registry.let_go(&key("bob"), ConnectionNumber(2));
        assert_eq!(attach("tablet", 4), Err(NotAttached::TooMany));
        assert!(registry.detach(&key("bob"), ConnectionNumber(3)));
        assert!(registry.is_connected("bob"), "the laptop is");
        assert!(registry.hold(&key("bob"), ConnectionNumber(5), &mailbox()));
        assert_eq!(attach("tablet", 6), Ok(false));
        assert_eq!(attach("phone", 7), Err(NotAttached::TooMany), "a hold is no way round the limit");
        registry.let_go(&key("bob"), ConnectionNumber(5));
        assert_eq!(attach("phone", 8), Err(NotAttached::TooMany));
    }

    #[test]
    fn a_topic_may_gather_the_messages_of_many() {
        let registry = Registry::new();
        let (every, exact, box_, own) = (Arc::from("chat/+/inbox"), Arc::from("chat/bob/inbox"), mailbox(), mailbox());
        registry.subscribe(&every, ConnectionNumber(1), &box_);
        registry.subscribe(&exact, ConnectionNumber(2), &own);
        assert!(registry.has_subscribers("chat/+/inbox") && !registry.has_subscribers("chat/carol/inbox"));
        for topic in ["chat/bob/inbox", "chat/carol/inbox", "chat/bob/sent"] {
            registry.deliver(&[Arc::new(LiveMessage::event(topic.into(), "x"))]);
        }
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        let mut got = |mailbox: &Mailbox| match mailbox.poll(&mut cx, true) {
            std::task::Poll::Ready(mail) => {
                let of = |one: &Arc<LiveMessage>| format!("{} for {}", one.topic, one.bound_topic());
                mail.events.iter().map(|event| of(&event.message)).collect::<Vec<_>>()
            }
            std::task::Poll::Pending => Vec::new(),
        };
        assert_eq!(got(&box_), ["chat/bob/inbox for chat/+/inbox", "chat/carol/inbox for chat/+/inbox"]);
        assert_eq!(got(&own), ["chat/bob/inbox for chat/bob/inbox"]);
        registry.unsubscribe("chat/+/inbox", ConnectionNumber(1));
        registry.deliver(&[Arc::new(LiveMessage::event("chat/bob/inbox".into(), "x"))]);
        assert!(got(&box_).is_empty() && !registry.gathers.load(Ordering::Acquire));
    }

    #[test]
    fn subscribers_come_and_go_without_a_trace() {
        let registry = Registry::new();
        let (topic, box_) = (Arc::from("chat/bob/inbox"), mailbox());
        registry.subscribe(&topic, ConnectionNumber(1), &box_);
        registry.subscribe(&topic, ConnectionNumber(1), &box_);
        assert!(registry.has_subscribers("chat/bob/inbox"));
        registry.unsubscribe("chat/bob/inbox", ConnectionNumber(1));
        assert!(registry.topics.iter().all(|shard| shard.read().is_empty()));
    }
}
