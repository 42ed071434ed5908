//! What waits in memory for clients, counted: for a session, for a user's sessions together, and for all.
//!
//! Whatever waits carries its [`Charge`] with it, from its mailbox on until it is acknowledged (written, at QoS 0) or dropped, so it counts
//! wherever it lies and no path can forget to give it back. Who has nothing waiting gets its next message whatever the others have:
//! nobody's full queues make another one miss what it keeps up with.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

/// Messages of live topics that may wait for one connection: more than a client can cause with what is read from it at once.
pub(crate) const LIVE_MESSAGES_MAX: usize = 4_096;
/// Bytes of them.
pub(crate) const LIVE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes of them for all connections of one user, the answers to requests included.
const LIVE_BYTES_OF_USER_MAX: usize = 32 * 1024 * 1024;
/// While so many bytes wait for whoever asks, further requests are refused: there is always room for the answers to those that were taken.
const ANSWERING_BYTES_MAX: usize = 2 * 1024 * 1024;
/// While so many bytes wait for all connections of who asks.
const ANSWERING_BYTES_OF_USER_MAX: usize = 8 * 1024 * 1024;

/// How much may wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLimits {
    /// Ordinary messages of one session. At least one.
    pub(crate) session_messages: usize,
    /// Bytes of them.
    pub(crate) session_bytes: usize,
    /// Of all sessions of one user.
    pub(crate) user_bytes: usize,
    /// Of all sessions.
    pub(crate) all_bytes: usize,
}

/// What waits for everybody.
#[derive(Debug)]
pub(crate) struct Queues {
    limits: QueueLimits,
    bytes: AtomicUsize,
    live_bytes: AtomicUsize,
    /// Those for whom something has waited lately.
    users: Mutex<FxHashMap<Arc<str>, Weak<UserQueues>>>,
}

#[derive(Debug)]
struct UserQueues {
    of_all: Arc<Queues>,
    user: Arc<str>,
    bytes: AtomicUsize,
    live_bytes: AtomicUsize,
}

/// What waits for one session.
#[derive(Debug)]
pub(crate) struct SessionQueue {
    of_user: Arc<UserQueues>,
    /// Ordinary messages that were not sent yet.
    messages: AtomicUsize,
    /// Bytes of ordinary messages, of those in flight too.
    bytes: AtomicUsize,
    live_messages: AtomicUsize,
    live_bytes: AtomicUsize,
}

/// What one message counts for. Given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    queue: Arc<SessionQueue>,
    bytes: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Waiting,
    /// The client has been sent it: it takes no place in the queue any more, only memory.
    InFlight,
    Live,
}

impl Queues {
    pub(crate) fn new(limits: QueueLimits) -> Arc<Self> {
        Arc::new(Self { limits, bytes: AtomicUsize::new(0), live_bytes: AtomicUsize::new(0), users: Mutex::default() })
    }

    /// Bytes of ordinary messages that wait now, and of messages of live topics.
    pub(crate) fn bytes(&self) -> (usize, usize) {
        (self.bytes.load(Ordering::Relaxed), self.live_bytes.load(Ordering::Relaxed))
    }

    /// Users who are remembered.
    pub(crate) fn users(&self) -> usize {
        self.users.lock().len()
    }

    /// The queue of a session of this user.
    pub(crate) fn session(self: &Arc<Self>, user: &Arc<str>) -> Arc<SessionQueue> {
        let of_user = {
            let mut users = self.users.lock();
            match users.get(user).and_then(Weak::upgrade) {
                Some(of_user) => of_user,
                None => {
                    let of_user = Arc::new(UserQueues {
                        of_all: Arc::clone(self),
                        user: Arc::clone(user),
                        bytes: AtomicUsize::new(0),
                        live_bytes: AtomicUsize::new(0),
                    });
                    users.insert(Arc::clone(user), Arc::downgrade(&of_user));
                    of_user
                }
            }
        };
        Arc::new(SessionQueue {
            of_user,
            messages: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            live_messages: AtomicUsize::new(0),
            live_bytes: AtomicUsize::new(0),
        })
    }
}

impl Drop for UserQueues {
    fn drop(&mut self) {
        let mut users = self.of_all.users.lock();
        // Another may have come in its place already.
        if users.get(&self.user).is_some_and(|other| other.strong_count() == 0) {
            users.remove(&self.user);
            if users.len() < users.capacity() / 4 {
                users.shrink_to_fit();
            }
        }
    }
}

fn fits(count: &AtomicUsize, more: usize, max: usize) -> bool {
    let fits = |now: usize| now.checked_add(more).filter(|all| *all <= max);
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
}

impl SessionQueue {
    /// A place for an ordinary message of so many bytes. Calls for one session come one after another.
    pub(crate) fn admit(self: &Arc<Self>, bytes: usize) -> Option<Charge> {
        let (of_user, of_all) = (&self.of_user, &self.of_user.of_all);
        let waiting = self.messages.load(Ordering::Relaxed);
        if waiting == 0 {
            of_user.bytes.fetch_add(bytes, Ordering::Relaxed);
            of_all.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            let limits = &of_all.limits;
            let is_full = waiting >= limits.session_messages
                || self.bytes.load(Ordering::Relaxed).saturating_add(bytes) > limits.session_bytes;
            if is_full || !fits(&of_user.bytes, bytes, limits.user_bytes) {
                return None;
            }
            if !fits(&of_all.bytes, bytes, limits.all_bytes) {
                of_user.bytes.fetch_sub(bytes, Ordering::Relaxed);
                return None;
            }
        }
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Some(Charge { queue: Arc::clone(self), bytes, kind: Kind::Waiting })
    }

    /// A place for a message of a live topic. The answer to a request was granted its place when the request was taken.
    pub(crate) fn admit_live(self: &Arc<Self>, bytes: usize, is_answer: bool) -> Option<Charge> {
        let of_user = &self.of_user;
        let waiting = self.live_messages.load(Ordering::Relaxed);
        if waiting == 0 {
            of_user.live_bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            let all = self.live_bytes.load(Ordering::Relaxed).saturating_add(bytes);
            let is_full = waiting >= LIVE_MESSAGES_MAX || (all > LIVE_BYTES_MAX && !is_answer);
            if is_full || !fits(&of_user.live_bytes, bytes, LIVE_BYTES_OF_USER_MAX) {
                return None;
            }
        }
        of_user.of_all.live_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.live_messages.fetch_add(1, Ordering::Relaxed);
        self.live_bytes.fetch_add(bytes, Ordering::Relaxed);
        Some(Charge { queue: Arc::clone(self), bytes, kind: Kind::Live })
    }

    /// Whether a request of this connection may be taken: its answer will have room.
    pub(crate) fn takes_answers(&self) -> bool {
        self.live_bytes.load(Ordering::Relaxed) < ANSWERING_BYTES_MAX
            && self.live_messages.load(Ordering::Relaxed) < LIVE_MESSAGES_MAX / 2
            && self.of_user.live_bytes.load(Ordering::Relaxed) < ANSWERING_BYTES_OF_USER_MAX
    }
}

impl Charge {
    /// The client was sent the message.
    pub(crate) fn on_sent(&mut self) {
        if self.kind == Kind::Waiting {
            self.kind = Kind::InFlight;
            self.queue.messages.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// It has to be sent again.
    pub(crate) fn on_returned(&mut self) {
        if self.kind == Kind::InFlight {
            self.kind = Kind::Waiting;
            self.queue.messages.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let Self { queue, bytes, kind } = self;
        let (of_user, of_all) = (&queue.of_user, &queue.of_user.of_all);
        if *kind == Kind::Live {
            queue.live_messages.fetch_sub(1, Ordering::Relaxed);
            for count in [&queue.live_bytes, &of_user.live_bytes, &of_all.live_bytes] {
                count.fetch_sub(*bytes, Ordering::Relaxed);
            }
        } else {
            if *kind == Kind::Waiting {
                queue.messages.fetch_sub(1, Ordering::Relaxed);
            }
            for count in [&queue.bytes, &of_user.bytes, &of_all.bytes] {
                count.fetch_sub(*bytes, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Room for little.
    pub(crate) fn queues() -> Arc<Queues> {
        Queues::new(QueueLimits {
            session_messages: 10,
            session_bytes: 10_000,
            user_bytes: 100_000,
            all_bytes: 100_000,
        })
    }

    const LIMITS: QueueLimits =
        QueueLimits { session_messages: 3, session_bytes: 100, user_bytes: 150, all_bytes: 200 };

    #[test]
    fn a_charge_counts_until_it_is_dropped() {
        let queues = Queues::new(LIMITS);
        let queue = queues.session(&"alice".into());
        let mut charges: Vec<Charge> = (0..3).map(|_| queue.admit(10).expect("room")).collect();
        assert!(queue.admit(10).is_none(), "three wait");
        charges[0].on_sent();
        charges.push(queue.admit(10).expect("one has left the queue"));
        assert_eq!(queues.bytes().0, 40, "what is in flight takes memory");
        charges[0].on_returned();
        assert!(queue.admit(1).is_none());
        charges.truncate(1);
        assert!(queue.admit(91).is_none(), "100 bytes are the most");
        drop(queue.admit(90).expect("room"));
        charges.clear();
        assert_eq!(queues.bytes(), (0, 0));
        drop((charges, queue));
        assert_eq!(queues.users(), 0, "nobody is remembered");
    }

    #[test]
    fn who_has_nothing_waiting_gets_the_next_message_whatever_others_have() {
        let queues = Queues::new(LIMITS);
        let (alice, bob): (Arc<str>, Arc<str>) = ("alice".into(), "bob".into());
        let fill = |user: &Arc<str>, bytes: &[usize]| {
            let queue = queues.session(user);
            let charges: Vec<Option<Charge>> = bytes.iter().map(|bytes| queue.admit(*bytes)).collect();
            (queue, charges)
        };
        let (_one, first) = fill(&alice, &[50, 50]);
        let (_two, second) = fill(&alice, &[30, 21, 20]);
        assert!(first.iter().all(Option::is_some));
        assert_eq!(
            second.iter().map(Option::is_some).collect::<Vec<_>>(),
            [true, false, true],
            "150 bytes are her share"
        );
        let (three, third) = fill(&alice, &[90, 1]);
        assert_eq!(third.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false]);
        let (_phone, of_bob) = fill(&bob, &[5, 5]);
        assert_eq!(of_bob.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false], "the pot is empty");
        drop((third, three));
        let (_laptop, of_bob) = fill(&bob, &[5, 5]);
        assert!(of_bob.iter().all(Option::is_some), "there is room again");
    }

    #[test]
    fn answers_have_the_room_that_their_requests_were_granted() {
        let queues = Queues::new(LIMITS);
        let queue = queues.session(&"alice".into());
        let mut waiting = Vec::new();
        let answer_bytes = 280 * 1024;
        while queue.takes_answers() {
            waiting.push(queue.admit_live(answer_bytes, true).expect("room for an answer"));
        }
        while let Some(charge) = queue.admit_live(answer_bytes, false) {
            waiting.push(charge);
        }
        let bytes = queues.bytes().1;
        assert!((ANSWERING_BYTES_MAX..=LIVE_BYTES_MAX).contains(&bytes), "{bytes}");
        // So many requests may have been taken before the first answer came.
        waiting.extend((0..64).map(|_| queue.admit_live(answer_bytes, true).expect("room for an answer")));
        let other = queues.session(&"alice".into());
        assert!(!other.takes_answers(), "all connections of a user together");
        assert!(queues.session(&"bob".into()).takes_answers());
        drop(waiting);
        assert!(queue.takes_answers());
    }
}
