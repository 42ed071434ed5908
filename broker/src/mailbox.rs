//! What other tasks hand to a connection: outcomes, live messages, and the order to end.
//!
//! A mailbox never makes its senders wait. Each part has a capacity and an answer when full: live messages of durable topics are
//! dropped and the connection is told to read the log again; ordinary messages and those of live topics are dropped and counted, and the
//! count goes on where they lie when they were taken from here ([`crate::queues`]); outcomes are bounded by the client's own publishes in flight.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::escaped::Escaped;
use crate::live::LiveMessage;
use crate::ordinary::Group;
use crate::queues::{Charge, Queues, SessionQueue};
use crate::service::{Keeping, PublishOutcome};
use crate::topics::message::{Expiry, Message};

/// Messages of durable topics that may wait here for a busy connection: the log has those that find no room.
const DURABLE_MESSAGES_MAX: usize = 4_096;
/// Bytes of them.
const DURABLE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What a message that waits takes beside its content, about.
const ORDINARY_BYTES: usize = 192;
const EVENT_BYTES: usize = 128;

/// Why a connection has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Another connection of the same user has the same client identifier.
    TakenOver,
    /// The server stops.
    Shutdown,
}

/// An ordinary message on its way to one session.
#[derive(Debug)]
pub(crate) struct Ordinary {
    pub(crate) message: Arc<Message>,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    /// Of the subscriptions that it is for.
    pub(crate) identifiers: Vec<u32>,
    /// When it was published: its expiry interval counts from then.
    pub(crate) since: Instant,
    /// The group that it came by: should this session end, another member gets it.
    pub(crate) share: Option<Arc<Group>>,
    /// What it counts for while it waits. A retained message lies where it is retained, and is taken as the client has room.
    pub(crate) charge: Option<Charge>,
}

impl Ordinary {
    pub(crate) fn expiry(&self, now: Instant) -> Expiry {
        self.message.expiry(self.since, now)
    }

    /// The client was sent it.
    pub(crate) fn on_sent(&mut self) {
        self.charge.iter_mut().for_each(Charge::on_sent);
    }

    /// It has to be sent again.
    pub(crate) fn on_returned(&mut self) {
        self.charge.iter_mut().for_each(Charge::on_returned);
    }

    fn bytes(&self) -> usize {
        let Self { message, identifiers, .. } = self;
        let own = identifiers.capacity() * size_of::<u32>() + ORDINARY_BYTES;
        message.payload.len() + message.topic.len() + message.properties.bytes() + own
    }
}

/// A message of a live topic on its way to one connection.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) message: Arc<LiveMessage>,
    _charge: Charge,
}

/// Everything that waited.
#[derive(Debug, Default)]
pub(crate) struct Mail {
    pub(crate) outcomes: Vec<(u64, PublishOutcome)>,
    /// Messages of durable topics.
    pub(crate) durable: Vec<Arc<LiveMessage>>,
    pub(crate) missed: bool,
    /// Messages of live topics.
    pub(crate) events: Vec<Event>,
    /// So many more found no room.
    pub(crate) events_dropped: usize,
    pub(crate) ordinary: VecDeque<Ordinary>,
    pub(crate) ending: Option<Ending>,
    /// Rights have changed.
    pub(crate) recheck: bool,
    durable_bytes: usize,
}

/// What waits, and on whose account.
#[derive(Debug, Default)]
struct Inner {
    mail: Mail,
    user: Option<Arc<str>>,
    /// From the first message on that has to be counted: few connections have any.
    queue: Option<Arc<SessionQueue>>,
    hold: Hold,
    /// From the moment on that somebody waits for [`Mailbox::settle`].
    on_settled: Option<Arc<Notify>>,
}

impl Inner {
    fn queue(&mut self, queues: &Arc<Queues>) -> Option<&Arc<SessionQueue>> {
        if self.queue.is_none() {
            self.queue = self.user.as_ref().map(|user| queues.session(user));
        }
        self.queue.as_ref()
    }
}

impl Inner {
    fn push_event(&mut self, message: &Arc<LiveMessage>, queues: &Arc<Queues>) {
        let bytes = message.payload.len() + message.topic.len() + EVENT_BYTES;
        match self.queue(queues).and_then(|queue| queue.admit_live(bytes, message.is_answer())) {
            Some(charge) => self.mail.events.push(Event { message: Arc::clone(message), _charge: charge }),
            None => {
                self.mail.events_dropped += 1;
                if message.is_answer() {
                    tracing::warn!(topic = %Escaped(&message.topic), "an answer to a request found no room");
                }
            }
        }
    }
}

/// Who works on a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Hold {
    /// The connection whose mailbox it is.
    #[default]
    Own,
    /// It is giving back what it knew.
    Settling,
    /// It has.
    Settled,
    /// The next connection waited too long for it.
    GivenUp,
}

impl Mail {
    fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
            && self.durable.is_empty()
            && !self.missed
            && self.events.is_empty()
            && self.events_dropped == 0
            && self.ordinary.is_empty()
            && self.ending.is_none()
            && !self.recheck
    }
}

/// One connection's mailbox.
#[derive(Debug)]
pub(crate) struct Mailbox {
    inner: Mutex<Inner>,
    waker: AtomicWaker,
    queues: Arc<Queues>,
}

impl Mailbox {
    pub(crate) fn new(queues: Arc<Queues>) -> Self {
        Self { inner: Mutex::default(), waker: AtomicWaker::new(), queues }
    }

    /// Whose it is: before anything comes that waits on their account.
    pub(crate) fn belong_to(&self, user: &Arc<str>) {
        self.inner.lock().user = Some(Arc::clone(user));
    }

    /// The session has come over from that mailbox: what waits is counted on as it was there.
    pub(crate) fn succeed(&self, old: &Self) {
        let queue = old.inner.lock().queue.clone();
        if queue.is_some() {
            self.inner.lock().queue = queue;
        }
    }

    pub(crate) fn push_outcomes(&self, outcomes: impl Iterator<Item = (u64, PublishOutcome)>) {
        self.inner.lock().mail.outcomes.extend(outcomes);
        self.waker.wake();
    }

    /// Messages of a bound topic that this connection subscribes to.
    pub(crate) fn push_live(&self, messages: &[Arc<LiveMessage>]) {
        {
            let mut inner = self.inner.lock();
            for message in messages {
                match message.keeping() {
                    Keeping::Durable => inner.mail.push_durable(message),
                    Keeping::Live => inner.push_event(message, &self.queues),
                }
            }
        }
        self.waker.wake();
    }

    /// Whether the answer to a request will have room.
    pub(crate) fn takes_answers(&self) -> bool {
        self.inner.lock().queue.as_ref().is_none_or(|queue| queue.takes_answers())
    }

    /// Live messages were lost on their way: the log has to be read.
    pub(crate) fn push_missed(&self) {
        self.inner.lock().mail.missed = true;
        self.waker.wake();
    }

    /// An ordinary message. `false` if it was dropped because the queue is full.
    pub(crate) fn push_ordinary(&self, mut ordinary: Ordinary) -> bool {
        {
            let mut inner = self.inner.lock();
            let Some(queue) = inner.queue(&self.queues) else { return false };
            let Some(charge) = queue.admit(ordinary.bytes()) else { return false };
            ordinary.charge = Some(charge);
            inner.mail.ordinary.push_back(ordinary);
        }
        self.waker.wake();
        true
    }

    /// Rights have changed: who it is and what it may do is looked at again.
    pub(crate) fn push_recheck(&self) {
        self.inner.lock().mail.recheck = true;
        self.waker.wake();
    }

    /// Ends the connection. The first reason stands.
    pub(crate) fn end(&self, ending: Ending) {
        self.inner.lock().mail.ending.get_or_insert(ending);
        self.waker.wake();
    }

    /// Why the connection has to end, if it has to.
    pub(crate) fn ending(&self) -> Option<Ending> {
        self.inner.lock().mail.ending
    }

    /// Whether nobody else works on the session: its next connection waits for this one, though not for ever.
    pub(crate) fn holds(&self) -> bool {
        self.inner.lock().hold != Hold::GivenUp
    }

    /// The connection begins to give back what it knows of its session, which takes no time. `false` if the next one has not waited for that.
    pub(crate) fn begin_to_settle(&self) -> bool {
        let hold = &mut self.inner.lock().hold;
        if *hold == Hold::Own {
            *hold = Hold::Settling;
        }
        *hold == Hold::Settling
    }

    /// The connection has given back what it knew of its session.
    pub(crate) fn settle(&self) {
        let on_settled = {
            let mut inner = self.inner.lock();
            inner.hold = Hold::Settled;
            inner.on_settled.take()
        };
        if let Some(on_settled) = on_settled {
            on_settled.notify_waiters();
        }
    }

    /// Whether it has.
    pub(crate) fn is_settled(&self) -> bool {
        self.inner.lock().hold == Hold::Settled
    }

    /// Returns once [`Mailbox::settle`] was called.
    async fn settled(&self) {
        let on_settled = Arc::clone(self.inner.lock().on_settled.get_or_insert_default());
        let mut told = std::pin::pin!(on_settled.notified());
        // Listening first: a call between the look and the wait is not missed.
        told.as_mut().enable();
        if !self.is_settled() {
            told.await;
        }
    }

    /// Waits until the connection has settled; `false` if it takes too long, and from then on the session is not its own.
    pub(crate) async fn settled_within(&self, time: Duration) -> bool {
        if tokio::time::timeout(time, self.settled()).await.is_ok() {
            return true;
        }
        {
            let hold = &mut self.inner.lock().hold;
            if *hold == Hold::Own {
                *hold = Hold::GivenUp;
                return false;
            }
        }
        self.settled().await;
        true
    }

    /// Takes the ordinary messages alone.
    pub(crate) fn take_ordinary(&self) -> VecDeque<Ordinary> {
        std::mem::take(&mut self.inner.lock().mail.ordinary)
    }

    /// Drops ordinary messages that wait.
    pub(crate) fn retain_ordinary(&self, keep: impl Fn(&Ordinary) -> bool) {
        self.inner.lock().mail.ordinary.retain(keep);
    }

    /// Takes what waits. Ordinary messages stay while the connection has no room for them (`take_ordinary` false): the queue is theirs.
    pub(crate) fn poll(&self, cx: &mut Context<'_>, take_ordinary: bool) -> Poll<Mail> {
        self.waker.register(cx.waker());
        let mut inner = self.inner.lock();
        let mail = &mut inner.mail;
        let ordinary = if take_ordinary { VecDeque::new() } else { std::mem::take(&mut mail.ordinary) };
        let taken = if mail.is_empty() { Poll::Pending } else { Poll::Ready(std::mem::take(mail)) };
        if !take_ordinary {
            mail.ordinary = ordinary;
        }
        taken
    }
}

impl Mail {
    fn push_durable(&mut self, message: &Arc<LiveMessage>) {
        let bytes = message.payload.len();
        let has_no_bytes = self.durable_bytes + bytes > DURABLE_BYTES_MAX && !self.durable.is_empty();
        if self.durable.len() >= DURABLE_MESSAGES_MAX || has_no_bytes {
            self.missed = true;
        } else {
            self.durable_bytes += bytes;
            self.durable.push(Arc::clone(message));
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::queues;
    use crate::topics::message::MessageProperties;

    fn mailbox(queues: &Arc<Queues>) -> Mailbox {
        let mailbox = Mailbox::new(Arc::clone(queues));
        mailbox.belong_to(&"bob".into());
        mailbox
    }

    fn ordinary(payload_bytes: usize, identifiers: usize) -> Ordinary {
        Ordinary {
            message: Arc::new(Message {
                topic: "t".into(),
                payload: vec![0; payload_bytes].into(),
                qos: 1,
                retain: false,
                publisher: 1,
                number: 1,
                properties: MessageProperties::default(),
            }),
            qos: 1,
            retain: false,
            identifiers: vec![1; identifiers],
            since: Instant::now(),
            share: None,
            charge: None,
        }
    }

    /// There is room for 10 messages and 10,000 bytes.
    #[test]
    fn what_was_taken_from_a_mailbox_goes_on_counting() {
        let queues = queues::tests::queues();
        let first = mailbox(&queues);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!((0..10).all(|_| first.push_ordinary(ordinary(1, 0))));
        let Poll::Ready(mail) = first.poll(&mut cx, true) else { panic!("there is mail") };
        assert!(!first.push_ordinary(ordinary(1, 0)), "they lie elsewhere now, and wait as before");
        let second = mailbox(&queues);
        second.succeed(&first);
        assert!(!second.push_ordinary(ordinary(1, 0)), "the session's next connection has no queue of its own");
        drop((first, mail));
        assert!(second.push_ordinary(ordinary(1, 0)));
        drop(second);
        assert_eq!((queues.bytes(), queues.users()), ((0, 0), 0));
    }

    #[test]
    fn subscription_identifiers_count() {
        let mailbox = mailbox(&queues::tests::queues());
        assert!((0..2).all(|_| mailbox.push_ordinary(ordinary(1, 1_000))));
        assert!(!mailbox.push_ordinary(ordinary(1, 1_000)), "a thousand take 4,000 bytes");
        assert!(mailbox.push_ordinary(ordinary(1, 10)));
    }

    #[test]
    fn events_that_find_no_room_are_counted_and_the_log_is_not_read_for_them() {
        let mailbox = mailbox(&queues::tests::queues());
        let event = [Arc::new(LiveMessage::event("presence".into(), Bytes::from_static(b"x")))];
        for _ in 0..queues::LIVE_MESSAGES_MAX + 3 {
            mailbox.push_live(&event);
        }
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let Poll::Ready(mail) = mailbox.poll(&mut cx, false) else { panic!("there is mail") };
        assert_eq!((mail.events.len(), mail.events_dropped, mail.missed), (queues::LIVE_MESSAGES_MAX, 3, false));
        mailbox.push_live(&event);
        let Poll::Ready(more) = mailbox.poll(&mut cx, false) else { panic!("there is mail") };
        assert_eq!((more.events.len(), more.events_dropped), (0, 1), "those that were taken wait as before");
        drop(mail);
        mailbox.push_live(&event);
        assert!(matches!(mailbox.poll(&mut cx, false), Poll::Ready(mail) if mail.events.len() == 1));
    }

    #[tokio::test]
    async fn who_is_waited_for_too_long_has_the_session_no_more() {
        let wait = Duration::from_millis(10);
        let queues = queues::tests::queues();
        let slow = mailbox(&queues);
        assert!(slow.holds());
        assert!(!slow.settled_within(wait).await);
        assert!(!slow.holds() && !slow.begin_to_settle());
        let quick = mailbox(&queues);
        assert!(quick.begin_to_settle());
        // It has begun in time, so it is waited for.
        let settle = async {
            tokio::time::sleep(2 * wait).await;
            quick.settle();
        };
        assert!(tokio::join!(quick.settled_within(wait), settle).0);
        assert!(quick.settled_within(wait).await, "it has settled before");
    }
}
