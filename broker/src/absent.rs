//! Sessions without a connection: the ordinary messages that wait for them, what was under way, their wills, and when they end.
//!
//! Chat needs none of this: its messages lie in the log, and a cursor is enough. Here is what MQTT promises for all other topics, in
//! memory, bounded by the limits of the mailbox. A session is here or with its connection, never both.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::Notify;

use crate::engine::Will;
use crate::ordinary::Receiver;
use crate::service::{Identity, Service, SessionKey, SubscribeRoute, SubscriptionRecord};
use crate::session::{Queued, UnderWay};
use crate::topics::filter;

/// A will that waits for its delay interval.
#[derive(Debug)]
pub(crate) struct DelayedWill {
    pub(crate) will: Will,
    pub(crate) due: Instant,
}

/// A session without a connection.
#[derive(Debug)]
pub(crate) struct AbsentSession {
    /// Of its last connection: under this its subscriptions are known.
    pub(crate) number: u64,
    pub(crate) receiver: Arc<Receiver>,
    /// To ordinary topics.
    pub(crate) subscriptions: Vec<SubscriptionRecord>,
    pub(crate) under_way: UnderWay,
    pub(crate) will: Option<DelayedWill>,
    /// `None`: never.
    pub(crate) expires_at: Option<Instant>,
}

impl AbsentSession {
    /// Whether anything would be missed if nobody remembered it.
    pub(crate) fn matters(&self) -> bool {
        !self.subscriptions.is_empty() || !self.under_way.is_empty() || self.will.is_some() || self.expires_at.is_some()
    }

    pub(crate) fn filters(&self) -> impl Iterator<Item = &str> {
        self.subscriptions.iter().map(|record| record.filter.as_str())
    }

    /// Goes on with what waited for an older one of the same name, under packet identifiers of its own.
    fn absorb(&mut self, older: Self) {
        let UnderWay { received, queue, .. } = older.under_way;
        self.under_way.received.extend(received);
        let again = queue.into_iter().filter_map(|queued| match queued {
            Queued::Ordinary(ordinary) | Queued::Again(ordinary, _) => Some(ordinary),
            Queued::Release(_) | Queued::Retained(_) | Queued::Live(..) => None,
        });
        let waited = again.chain(older.receiver.mailbox.take_ordinary()).map(Queued::Ordinary);
        let newer = std::mem::take(&mut self.under_way.queue);
        self.under_way.queue = waited.chain(newer).collect();
    }

    fn next(&self) -> Option<Instant> {
        [self.expires_at, self.will.as_ref().map(|will| will.due)].into_iter().flatten().min()
    }

    /// Rights have changed: the filters that it may subscribe to no longer.
    pub(crate) fn recheck(&mut self, service: &impl Service) -> Vec<String> {
        let identity = service.recheck(&self.receiver.identity()).map(Arc::new);
        match &identity {
            Some(identity) => self.receiver.set_identity(Arc::clone(identity)),
            None => self.will = None,
        }
        let may_subscribe = |record: &SubscriptionRecord| {
            let filter = filter::shared(&record.filter).map_or(record.filter.as_str(), |shared| shared.filter);
            let route = identity.as_ref().map(|identity| service.route_subscribe(identity, filter));
            matches!(route, Some(SubscribeRoute::Ordinary))
        };
        let (kept, ended) = std::mem::take(&mut self.subscriptions).into_iter().partition(may_subscribe);
        self.subscriptions = kept;
        let may_receive = |topic: &str| identity.as_ref().is_some_and(|identity| service.may_receive(identity, topic));
        self.receiver.mailbox.retain_ordinary(|ordinary| may_receive(&ordinary.message.topic));
        self.under_way.queue.retain(|queued| match queued {
            Queued::Ordinary(ordinary) | Queued::Again(ordinary, _) => may_receive(&ordinary.message.topic),
            // Asked again for each message when it is delivered.
            Queued::Release(_) | Queued::Retained(_) => true,
            Queued::Live(..) => false,
        });
        let ended: Vec<SubscriptionRecord> = ended;
        ended.into_iter().map(|record| record.filter).collect()
    }
}

/// What time has brought.
#[derive(Debug)]
pub(crate) enum Due {
    /// The delay of a will is over.
    Will(Arc<Identity>, Will),
    /// A session has ended.
    Expired(SessionKey, AbsentSession),
}

#[derive(Debug, Default)]
struct Sessions {
    sessions: FxHashMap<SessionKey, AbsentSession>,
    /// By the next thing that happens to them, and their number.
    timers: BTreeMap<(Instant, u64), SessionKey>,
}

impl Sessions {
    fn put(&mut self, key: SessionKey, session: AbsentSession) {
        if let Some(next) = session.next() {
            self.timers.insert((next, session.number), key.clone());
        }
        self.sessions.insert(key, session);
    }

    fn remove(&mut self, key: &SessionKey) -> Option<AbsentSession> {
        let session = self.sessions.remove(key)?;
        if let Some(next) = session.next() {
            self.timers.remove(&(next, session.number));
        }
        Some(session)
    }
}

/// All sessions without a connection that matter.
#[derive(Debug, Default)]
pub(crate) struct Absent {
    sessions: Mutex<Sessions>,
    changed: Notify,
}

impl Absent {
    /// `look` looks at it while nothing else is done to sessions without a connection. Goes on with what waited for the one that was here
    /// under the same key, which a bug alone can cause, and gives its number and its filters.
    pub(crate) fn put(
        &self,
        key: SessionKey,
        mut session: AbsentSession,
        look: impl FnOnce(&mut AbsentSession),
    ) -> Option<(u64, Vec<String>)> {
        let mut sessions = self.sessions.lock();
        let older = sessions.remove(&key).map(|older| {
            let subscriptions = (older.number, older.filters().map(str::to_owned).collect());
            session.absorb(older);
            subscriptions
        });
        look(&mut session);
        if session.matters() {
            sessions.put(key, session);
        }
        drop(sessions);
        self.changed.notify_one();
        older
    }

    /// The session's next connection is there.
    pub(crate) fn take(&self, key: &SessionKey) -> Option<AbsentSession> {
        self.sessions.lock().remove(key)
    }

    pub(crate) fn len(&self) -> usize {
        self.sessions.lock().sessions.len()
    }

    /// Rights have changed: gives subscriptions that have ended, each with its number.
    pub(crate) fn recheck(&self, service: &impl Service) -> Vec<(u64, Vec<String>)> {
        let mut sessions = self.sessions.lock();
        let keys: Vec<SessionKey> = sessions.sessions.keys().cloned().collect();
        let mut ended = Vec::new();
        for key in keys {
            // Out and in again, because a will that goes moves its timer.
            let Some(mut session) = sessions.remove(&key) else { continue };
            let filters = session.recheck(service);
            if !filters.is_empty() {
                ended.push((session.number, filters));
            }
            if session.matters() {
                sessions.put(key, session);
            }
        }
        ended
    }

    /// Waits until something is due.
    pub(crate) async fn due(&self) -> Due {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // Listening first: what changes between the look and the wait is not missed.
            changed.as_mut().enable();
            let next = match self.take_due(Instant::now()) {
                Ok(due) => return due,
                Err(next) => next,
            };
            match next {
                Some(next) => drop(tokio::time::timeout_at(next.into(), changed).await),
                None => changed.await,
            }
        }
    }

    /// `Err`: when the next thing is due, if ever.
    fn take_due(&self, now: Instant) -> Result<Due, Option<Instant>> {
        let mut sessions = self.sessions.lock();
        let Some((&(next, _), key)) = sessions.timers.first_key_value() else { return Err(None) };
        if next > now {
            return Err(Some(next));
        }
        let key = key.clone();
        let Some(mut session) = sessions.remove(&key) else { return Err(None) };
        if session.expires_at.is_some_and(|at| at <= now) {
            return Ok(Due::Expired(key, session));
        }
        let Some(DelayedWill { will, .. }) = session.will.take() else { return Err(None) };
        let identity = session.receiver.identity();
        if session.matters() {
            sessions.put(key, session);
        }
        Ok(Due::Will(identity, will))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::mailbox::{Mailbox, Ordinary};
    use crate::queues;
    use crate::topics::message::{Message, MessageProperties};

    fn key(client_id: &str) -> SessionKey {
        SessionKey { user: "bob".into(), client_id: client_id.into() }
    }

    fn session(number: u64, will_due: Option<Instant>, expires_at: Option<Instant>) -> AbsentSession {
        let identity = Identity {
            user: "bob".into(),
            client_id: "phone".into(),
            roles: crate::service::Roles(0),
            credential: crate::service::Credential(0),
            expires_at: None,
        };
        let mailbox = Arc::new(Mailbox::new(queues::tests::queues()));
        mailbox.belong_to(&identity.user);
        let will = |due| DelayedWill {
            will: Will {
                topic: "will".to_owned(),
                payload: Bytes::new(),
                qos: 0,
                retain: false,
                delay_s: 1,
                properties: MessageProperties::default(),
            },
            due,
        };
        AbsentSession {
            number,
            receiver: Receiver::new(mailbox, Arc::new(identity), false),
            subscriptions: Vec::new(),
            under_way: UnderWay::default(),
            will: will_due.map(will),
            expires_at,
        }
    }

    fn put(absent: &Absent, client_id: &str, session: AbsentSession) -> Option<(u64, Vec<String>)> {
        absent.put(key(client_id), session, |_| {})
    }

    #[test]
    fn wills_and_ends_come_in_the_order_of_their_times() {
        let (absent, begin) = (Absent::default(), Instant::now());
        let after = |seconds| begin + Duration::from_secs(seconds);
        put(&absent, "a", session(1, Some(after(2)), Some(after(3))));
        put(&absent, "b", session(2, None, Some(after(1))));
        put(&absent, "c", session(3, Some(after(9)), None));
        assert!(absent.take(&key("c")).is_some() && absent.take(&key("c")).is_none());
        assert!(matches!(absent.take_due(begin), Err(Some(next)) if next == after(1)));
        assert!(matches!(absent.take_due(after(2)), Ok(Due::Expired(of, _)) if of == key("b")));
        assert!(matches!(absent.take_due(after(2)), Ok(Due::Will(_, will)) if will.topic == "will"));
        assert!(matches!(absent.take_due(after(2)), Err(Some(next)) if next == after(3)));
        assert!(
            matches!(absent.take_due(after(3)), Ok(Due::Expired(of, session)) if of == key("a") && session.will.is_none())
        );
        assert!(matches!(absent.take_due(after(99)), Err(None)) && absent.len() == 0);
    }

    #[test]
    fn a_session_that_ends_with_its_will_has_it_still() {
        let (absent, now) = (Absent::default(), Instant::now());
        put(&absent, "a", session(1, Some(now), Some(now)));
        assert!(matches!(absent.take_due(now), Ok(Due::Expired(_, session)) if session.will.is_some()));
        assert!(put(&absent, "a", session(2, None, Some(now))).is_none());
        let mut without_end = session(3, None, None);
        without_end.under_way.received.insert(1);
        assert!(put(&absent, "a", without_end).is_some(), "there is one session of a name");
        assert!(matches!(absent.take_due(now), Err(None)), "the timer went with the session");
    }

    #[test]
    fn what_waited_for_an_older_one_of_the_same_name_still_comes() {
        let absent = Absent::default();
        let ordinary = |text: &str| Ordinary {
            message: Arc::new(Message {
                topic: "t".into(),
                payload: Bytes::copy_from_slice(text.as_bytes()),
                qos: 1,
                retain: false,
                publisher: 1,
                number: 1,
                properties: MessageProperties::default(),
            }),
            qos: 1,
            retain: false,
            identifiers: Vec::new(),
            since: Instant::now(),
            share: None,
            charge: None,
        };
        let mut older = session(1, None, None);
        older.under_way.received.insert(7);
        older.under_way.queue.extend([
            Queued::Again(ordinary("1"), 1),
            Queued::Release(2),
            Queued::Ordinary(ordinary("2")),
        ]);
        assert!(older.receiver.mailbox.push_ordinary(ordinary("3")));
        put(&absent, "a", older);
        let mut newer = session(2, None, None);
        newer.under_way.queue.push_back(Queued::Again(ordinary("4"), 1));
        assert_eq!(put(&absent, "a", newer), Some((1, Vec::new())));
        let merged = absent.take(&key("a")).expect("it is there");
        assert!(merged.under_way.received.contains(&7));
        let texts = merged.under_way.queue.iter().map(|queued| match queued {
            Queued::Ordinary(ordinary) | Queued::Again(ordinary, _) => ordinary.message.payload.clone(),
            other => panic!("{other:?}"),
        });
        assert_eq!(texts.collect::<Vec<_>>(), ["1", "2", "3", "4"]);
    }

    /// Rights that change while a connection ends are looked at under the same lock as those of all who are absent.
    #[test]
    fn what_does_not_matter_after_a_look_is_not_kept() {
        let absent = Absent::default();
        absent.put(key("a"), session(1, Some(Instant::now()), None), |session| session.will = None);
        assert_eq!(absent.len(), 0);
    }
}
