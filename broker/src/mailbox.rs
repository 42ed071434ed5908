//! What other tasks hand to a connection: outcomes, live messages, and the order to end.
//!
//! A mailbox never makes its senders wait. Each part has a capacity and an answer when full: live messages of durable topics are
//! dropped and the connection is told to read the log again; ordinary messages are dropped and counted; outcomes are bounded
//! by the client's own publishes in flight.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::live::LiveMessage;
use crate::ordinary::Group;
use crate::service::PublishOutcome;
use crate::topics::message::{Expiry, Message};

/// Live messages that may wait here for a busy connection: more than a client can cause with what is read from it at once.
pub(crate) const LIVE_MESSAGES_MAX: usize = 4_096;
/// Bytes of them.
const LIVE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Why a connection has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Another connection of the same user has the same client identifier.
    TakenOver,
    /// The server stops.
    Shutdown,
}

/// An ordinary message on its way to one session.
#[derive(Clone, Debug)]
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
}

impl Ordinary {
    pub(crate) fn expiry(&self, now: Instant) -> Expiry {
        self.message.expiry(self.since, now)
    }
}

/// What may wait in all mailboxes together.
#[derive(Debug)]
pub(crate) struct QueueBudget {
    bytes: AtomicUsize,
    bytes_max: usize,
}

impl QueueBudget {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes: AtomicUsize::new(0), bytes_max }
    }

    /// Bytes that wait now.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = |now: usize| now.checked_add(bytes).filter(|all| *all <= self.bytes_max);
        self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Everything that waited.
#[derive(Debug, Default)]
pub(crate) struct Mail {
    pub(crate) outcomes: Vec<(u64, PublishOutcome)>,
    pub(crate) live: Vec<Arc<LiveMessage>>,
    pub(crate) missed: bool,
    pub(crate) ordinary: VecDeque<Ordinary>,
    pub(crate) ending: Option<Ending>,
    /// Rights have changed.
    pub(crate) recheck: bool,
    live_bytes: usize,
    ordinary_bytes: usize,
}

impl Mail {
    fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
            && self.live.is_empty()
            && !self.missed
            && self.ordinary.is_empty()
            && self.ending.is_none()
            && !self.recheck
    }
}

/// One connection's mailbox.
#[derive(Debug)]
pub(crate) struct Mailbox {
    mail: Mutex<Mail>,
    waker: AtomicWaker,
    ordinary_messages_max: usize,
    ordinary_bytes_max: usize,
    budget: Arc<QueueBudget>,
    settled: AtomicBool,
    on_settled: Notify,
}

impl Mailbox {
    pub(crate) fn new(ordinary_messages_max: usize, ordinary_bytes_max: usize, budget: Arc<QueueBudget>) -> Self {
        Self {
            mail: Mutex::new(Mail::default()),
            waker: AtomicWaker::new(),
            ordinary_messages_max,
            ordinary_bytes_max,
            budget,
            settled: AtomicBool::new(false),
            on_settled: Notify::new(),
        }
    }

    pub(crate) fn push_outcomes(&self, outcomes: impl Iterator<Item = (u64, PublishOutcome)>) {
        self.mail.lock().outcomes.extend(outcomes);
        self.waker.wake();
    }

    /// A message of a bound topic that this connection subscribes to.
    pub(crate) fn push_live(&self, message: &Arc<LiveMessage>) {
        {
            let mut mail = self.mail.lock();
            let bytes = message.payload.len();
            // The first is let in whatever its size: it may be the answer that the client waits for, and nobody has a log of that.
            let has_no_bytes = mail.live_bytes + bytes > LIVE_BYTES_MAX && !mail.live.is_empty();
            if mail.live.len() >= LIVE_MESSAGES_MAX || has_no_bytes {
                mail.missed = true;
            } else {
                mail.live_bytes += bytes;
                mail.live.push(Arc::clone(message));
            }
        }
        self.waker.wake();
    }

    /// Live messages were lost on their way: the log has to be read.
    pub(crate) fn push_missed(&self) {
        self.mail.lock().missed = true;
        self.waker.wake();
    }

    /// An ordinary message. `false` if it was dropped because the queue is full.
    pub(crate) fn push_ordinary(&self, ordinary: Ordinary) -> bool {
        {
            let mut mail = self.mail.lock();
            let bytes = message_bytes(&ordinary.message);
            if mail.ordinary.len() >= self.ordinary_messages_max
                || (mail.ordinary_bytes + bytes > self.ordinary_bytes_max && !mail.ordinary.is_empty())
                || !self.budget.take(bytes)
            {
                return false;
            }
            mail.ordinary_bytes += bytes;
            mail.ordinary.push_back(ordinary);
        }
        self.waker.wake();
        true
    }

    /// Rights have changed: who it is and what it may do is looked at again.
    pub(crate) fn push_recheck(&self) {
        self.mail.lock().recheck = true;
        self.waker.wake();
    }

    /// Ends the connection. The first reason stands.
    pub(crate) fn end(&self, ending: Ending) {
        self.mail.lock().ending.get_or_insert(ending);
        self.waker.wake();
    }

    /// The connection has given back what it knew of its session.
    pub(crate) fn settle(&self) {
        self.settled.store(true, Ordering::Release);
        self.on_settled.notify_waiters();
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    /// Returns once [`Mailbox::settle`] was called.
    pub(crate) async fn settled(&self) {
        let mut told = std::pin::pin!(self.on_settled.notified());
        // Listening first: a call between the look and the wait is not missed.
        told.as_mut().enable();
        if !self.settled.load(Ordering::Acquire) {
            told.await;
        }
    }

    /// Takes the ordinary messages alone.
    pub(crate) fn take_ordinary(&self) -> VecDeque<Ordinary> {
        let mut mail = self.mail.lock();
        self.budget.give_back(std::mem::take(&mut mail.ordinary_bytes));
        std::mem::take(&mut mail.ordinary)
    }

    /// Drops ordinary messages that wait.
    pub(crate) fn retain_ordinary(&self, keep: impl Fn(&Ordinary) -> bool) {
        let mut mail = self.mail.lock();
        let mail = &mut *mail;
        let bytes = &mut mail.ordinary_bytes;
        mail.ordinary.retain(|ordinary| {
            let kept = keep(ordinary);
            if !kept {
                let freed = message_bytes(&ordinary.message);
                *bytes -= freed;
                self.budget.give_back(freed);
            }
            kept
        });
    }

    /// Takes what waits. Ordinary messages stay while the connection has no room for them (`take_ordinary` false): the queue is theirs.
    pub(crate) fn poll(&self, cx: &mut Context<'_>, take_ordinary: bool) -> Poll<Mail> {
        self.waker.register(cx.waker());
        let mut mail = self.mail.lock();
        if take_ordinary {
            if mail.is_empty() {
                return Poll::Pending;
            }
            self.budget.give_back(mail.ordinary_bytes);
            return Poll::Ready(std::mem::take(&mut *mail));
        }
        let ordinary = std::mem::take(&mut mail.ordinary);
        let ordinary_bytes = mail.ordinary_bytes;
        let taken = if mail.is_empty() { Poll::Pending } else { Poll::Ready(std::mem::take(&mut *mail)) };
        mail.ordinary = ordinary;
        mail.ordinary_bytes = ordinary_bytes;
        taken
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        self.budget.give_back(self.mail.get_mut().ordinary_bytes);
    }
}

fn message_bytes(message: &Message) -> usize {
    message.payload.len() + message.topic.len() + message.properties.bytes() + 128
}
