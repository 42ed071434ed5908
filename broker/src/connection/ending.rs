//! DISCONNECT, and what a connection leaves to those after it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mqtt_protocol_core::mqtt::result_code::DisconnectReasonCode;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Connection, End, Pending};
use crate::absent::{AbsentSession, DelayedWill};
use crate::broker::Shared;
use crate::mailbox::Mailbox;
use crate::registry::ConnectionNumber;
use crate::service::{Observation, PublishOutcome, Service, SessionKey};
use crate::session::{Queued, Session};

/// How long a connection that is gone waits to learn what became of what it was sent exactly once.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(1);

/// What has to be undone when a connection goes.
pub(super) struct Departure<S: Service> {
    pub(super) shared: Arc<Shared<S>>,
    pub(super) number: ConnectionNumber,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) key: Option<SessionKey>,
    pub(super) ordinary: Vec<String>,
    pub(super) bound: Vec<Arc<str>>,
}

impl<S: Service> Departure<S> {
    fn forget_ordinary(&mut self) {
        if !self.ordinary.is_empty() {
            let filters = std::mem::take(&mut self.ordinary);
            self.shared.subscriptions.unsubscribe(filters.iter().map(String::as_str), self.number.0);
        }
    }
}

impl<S: Service> Drop for Departure<S> {
    fn drop(&mut self) {
        self.mailbox.settle();
        for topic in &self.bound {
            self.shared.registry.unsubscribe(topic, self.number);
        }
        self.forget_ordinary();
        if let Some(key) = &self.key {
            self.shared.registry.detach(key, self.number);
            self.shared.service.observe(Observation::Disconnected);
            self.shared.service.left(&key.user);
        }
    }
}

impl<S, T> Connection<S, T>
where
    S: Service,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    /// The client says DISCONNECT.
    pub(super) async fn disconnect(&mut self, with_will: bool, session_expiry_s: Option<u32>) {
        self.change_expiry(session_expiry_s).await;
        self.end.get_or_insert(if with_will { End::ClientWithWill } else { End::Client });
    }

    async fn change_expiry(&mut self, session_expiry_s: Option<u32>) {
        let holds = self.mailbox.holds();
        let Some(session) = &mut self.session else { return };
        let Some(expiry_s) = session_expiry_s else { return };
        if session.expiry_s == 0 && expiry_s != 0 {
            // [MQTT-3.14.2.2.2]: a session without expiry cannot be given one when it ends.
            self.engine.disconnect(DisconnectReasonCode::ProtocolError, "the session had no expiry to change");
            return;
        }
        let before = session.is_persistent();
        session.expiry_s = expiry_s.min(self.shared.limits.session_expiry_max_s);
        if before && !session.is_persistent() && holds {
            let deleted = self.shared.service.delete_session(&session.key).await;
            if let Err(error) = deleted {
                tracing::error!(%error, "session could not be deleted");
            }
        }
    }

    /// All that is still to be done with the client itself.
    pub(super) async fn finish(&mut self, end: End, departure: &mut Departure<S>) {
        self.await_outcomes().await;
        self.settle(end, departure);
        if end == End::Socket {
            return;
        }
        self.write_last_bytes().await;
        if end == End::Closed {
            self.hear_out().await;
        }
    }

    /// What a persistent session was sent with QoS 2 is known as received to its next connection, or a resend would be stored again.
    async fn await_outcomes(&mut self) {
        let persistent = self.session.as_ref().is_some_and(Session::is_persistent);
        let until = tokio::time::Instant::now() + OUTCOME_TIMEOUT;
        loop {
            let submitted = self.pending.len().saturating_sub(self.unsent.len());
            let waits = |pending: &Pending| pending.outcome.is_none();
            if !persistent
                || !self.pending.iter().any(|pending| pending.qos == 2 && waits(pending))
                || !self.pending.iter().take(submitted).any(waits)
            {
                break;
            }
            let mail = std::future::poll_fn(|cx| self.mailbox.poll(cx, false));
            match tokio::time::timeout_at(until, mail).await {
                Ok(mail) => self.on_mail(mail),
                Err(_) => break,
            }
        }
        if persistent {
            self.answer_pending();
        }
    }

    /// Gives back what the session's next connection has to know. Nothing that takes time comes before it.
    fn settle(&mut self, end: End, departure: &mut Departure<S>) {
        self.reading = None;
        let holds = self.mailbox.begin_to_settle();
        // Its answer may have to wait for others in front of it; that it was taken is certain.
        let is_taken =
            |pending: &&Pending| pending.qos == 2 && matches!(pending.outcome, Some(PublishOutcome::Stored { .. }));
        self.pending.iter().filter(is_taken).for_each(|pending| self.engine.on_qos2_taken(pending.packet_id));
        if let Some(session) = &mut self.session
            && session.is_persistent()
            && holds
        {
            session.receiver.set_absent();
            let now = Instant::now();
            let expires_at = (session.expiry_s != u32::MAX)
                .then(|| now.checked_add(Duration::from_secs(u64::from(session.expiry_s))))
                .flatten();
            let delayed = session.will.take_if(|will| end.publishes_will() && will.delay_s > 0);
            let will = delayed.map(|will| {
                let due = now.checked_add(Duration::from_secs(u64::from(will.delay_s)));
                DelayedWill { will: *will, due: due.unwrap_or(now) }
            });
            let absent = AbsentSession {
                number: self.number.0,
                receiver: Arc::clone(&session.receiver),
                subscriptions: session.ordinary().cloned().collect(),
                under_way: session.take_under_way(self.engine.qos2_received()),
                will,
                expires_at,
            };
            // They are the absent session's now.
            departure.ordinary.clear();
            self.shared.park(session.key.clone(), absent, self.rights_seen);
            // Before the next connection loads it.
            self.shared.service.session_ended(&session.key, session.expiry_s);
        }
        self.mailbox.settle();
    }

    pub(super) async fn depart(mut self: Box<Self>, end: End, departure: &mut Departure<S>) {
        tracing::debug!(peer = %self.peer, ?end, "connection ended");
        // Before its messages go to others: it is none of them.
        departure.forget_ordinary();
        let Some(mut session) = self.session.take() else { return };
        if !session.is_persistent() {
            let waited = self.mailbox.take_ordinary().into_iter().map(Queued::Ordinary);
            let under_way = session.take_under_way(HashSet::new());
            self.shared.give_to_others(under_way.queue.into_iter().chain(waited));
        }
        if let Some(will) = session.will.take()
            && end.publishes_will()
        {
            Box::pin(self.shared.publish_will(&session.identity, *will)).await;
        }
    }
}
