//! What other tasks hand to a connection: outcomes, live messages, and the order to end.
//!
//! A mailbox never makes its senders wait. Each part has a capacity and an answer when full: live messages of durable topics are
//! dropped and the connection is told to read the log again; ordinary messages are dropped and counted; outcomes are bounded
//! by the client's own publishes in flight.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::live::LiveMessage;
use crate::service::PublishOutcome;
use crate::topics::message::Message;

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
    settled: AtomicBool,
    on_settled: Notify,
}

impl Mailbox {
    pub(crate) fn new(ordinary_messages_max: usize, ordinary_bytes_max: usize) -> Self {
        Self {
            mail: Mutex::new(Mail::default()),
            waker: AtomicWaker::new(),
            ordinary_messages_max,
            ordinary_bytes_max,
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
            let bytes = message_bytes(&ordinary.message.payload, &ordinary.message.topic);
            if mail.ordinary.len() >= self.ordinary_messages_max
                || (mail.ordinary_bytes + bytes > self.ordinary_bytes_max && !mail.ordinary.is_empty())
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

    /// Returns once [`Mailbox::settle`] was called.
    pub(crate) async fn settled(&self) {
        let mut told = std::pin::pin!(self.on_settled.notified());
        // Listening first: a call between the look and the wait is not missed.
        told.as_mut().enable();
        if !self.settled.load(Ordering::Acquire) {
            told.await;
        }
    }

    /// Takes what waits. Ordinary messages stay while the connection has no room for them (`take_ordinary` false): the queue is theirs.
    pub(crate) fn poll(&self, cx: &mut Context<'_>, take_ordinary: bool) -> Poll<Mail> {
        self.waker.register(cx.waker());
        let mut mail = self.mail.lock();
        if take_ordinary {
            return if mail.is_empty() { Poll::Pending } else { Poll::Ready(std::mem::take(&mut *mail)) };
        }
        let ordinary = std::mem::take(&mut mail.ordinary);
        let ordinary_bytes = mail.ordinary_bytes;
        let taken = if mail.is_empty() { Poll::Pending } else { Poll::Ready(std::mem::take(&mut *mail)) };
        mail.ordinary = ordinary;
        mail.ordinary_bytes = ordinary_bytes;
        taken
    }
}

fn message_bytes(payload: &Bytes, topic: &str) -> usize {
    payload.len() + topic.len() + 64
}
