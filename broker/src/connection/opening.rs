//! CONNECT, and who this is from then on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mqtt_protocol_core::mqtt::result_code::DisconnectReasonCode;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Connection;
use super::ending::Departure;
use crate::absent::AbsentSession;
use crate::engine::{Accepted, Connect, Will};
use crate::escaped::Escaped;
use crate::mailbox::Ending;
use crate::ordinary::Receiver;
use crate::rate::Verdict;
use crate::registry::NotAttached;
use crate::service::{
    Authentication, ConnectRefusal, ConnectRefusalCode, ConnectRequest, Identity, NotCreated, Observation, Position,
    Refusal, Service, ServiceError, SessionKey, SubscriptionRecord,
};
use crate::session::{Queued, Session, Subscription, UnderWay, push_few};
use crate::sparing::REFUSALS;

/// The most messages in flight to a client that names a larger receive maximum.
const WINDOW_MAX: u16 = 1_024;
/// What whoever is nobody any more is told.
const NOT_ANY_MORE: &str = "you may not be here any more: log in again";
/// How long a session's new connection waits for the old one to give back what is under way: longer than that takes.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

fn unavailable(error: ServiceError) -> ConnectRefusal {
    tracing::error!(%error, "session not available");
    ConnectRefusal {
        code: ConnectRefusalCode::ServerUnavailable,
        reason: "the session store cannot be read or written now".to_owned(),
    }
}

impl<S, T> Connection<S, T>
where
    S: Service,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    pub(super) async fn authenticate_again(&mut self, authentication: Authentication, departure: &mut Departure<S>) {
        let Some(session) = &mut self.session else { return };
        match &session.authentication_method {
            Some(method) if **method == *authentication.method => {}
            Some(_) => {
                // [MQTT-4.12.1-1]
                let sentence = "the authentication method is that of CONNECT";
                self.engine.disconnect(DisconnectReasonCode::ProtocolError, sentence);
                return;
            }
            None => {
                let sentence = "no authentication method was agreed on";
                self.engine.disconnect(DisconnectReasonCode::ProtocolError, sentence);
                return;
            }
        }
        match self.shared.service.authenticate_again(&self.peer, &session.identity, &authentication).await {
            Ok(identity) => {
                self.engine.authenticated_again(&authentication.method);
                self.take_identity(identity, departure).await;
            }
            Err(refusal) => {
                if REFUSALS.may_say() {
                    let reason = Escaped(&refusal.reason);
                    tracing::info!(peer = %self.peer, %reason, "refused to authenticate again");
                }
                self.engine.disconnect(DisconnectReasonCode::NotAuthorized, &refusal.reason);
            }
        }
    }

    pub(super) async fn connect(&mut self, connect: Connect, departure: &mut Departure<S>) {
        match self.open_session(connect, departure).await {
            Ok(()) => {}
            Err(refusal) => self.refuse_connect(&refusal),
        }
    }

    pub(super) fn refuse_connect(&mut self, refusal: &ConnectRefusal) {
        use ConnectRefusalCode::{ConnectionRateExceeded, QuotaExceeded, ServerUnavailable};
        // Limits are counted when they bite; whoever comes too often must not fill the log as well.
        let is_limit = matches!(refusal.code, ConnectionRateExceeded | QuotaExceeded | ServerUnavailable);
        let reason = Escaped(&refusal.reason);
        if !is_limit && REFUSALS.may_say() {
            tracing::info!(peer = %self.peer, %reason, "refused a connect");
        } else {
            tracing::debug!(peer = %self.peer, %reason, "refused a connect");
        }
        self.shared.service.observe(Observation::ConnectRefused);
        self.engine.refuse(refusal.code, &refusal.reason);
    }

    async fn open_session(&mut self, connect: Connect, departure: &mut Departure<S>) -> Result<(), ConnectRefusal> {
        let refuse = |code, reason: &str| ConnectRefusal { code, reason: reason.to_owned() };
        let assigned = connect.client_id.is_empty();
        if assigned && !self.engine.is_v5() && !connect.clean_start {
            return Err(refuse(
                ConnectRefusalCode::ClientIdentifierNotValid,
                "a session that is to be kept needs a client identifier",
            ));
        }
        let client_id: Arc<str> =
            if assigned { self.shared.assigned_client_id(self.number) } else { connect.client_id.into() };
        let asked = ConnectRequest {
            peer: &self.peer,
            client_id: &client_id,
            client_id_assigned: assigned,
            user_name: connect.user_name.as_deref(),
            password: connect.password.as_deref(),
            authentication: connect.authentication.as_ref(),
        };
        // The same name is kept once.
        let identity = Identity { client_id: Arc::clone(&client_id), ..self.shared.service.connect(asked).await? };
        if let Some(will) = &connect.will
            && let Err(refusal) = self.judge_will(&identity, will)
        {
            return Err(refuse(
                ConnectRefusalCode::NotAuthorized,
                &format!("the will cannot be published: {}", refusal.reason),
            ));
        }
        let mut pace = self.shared.pacing.connection(&identity.user, Instant::now());
        match pace.judge_connect(Instant::now()) {
            Verdict::Pass => {}
            Verdict::Wait { until, limit } => {
                self.limited(limit);
                tokio::time::sleep_until(until.into()).await;
            }
            Verdict::Refuse { limit } => {
                self.limited(limit);
                return Err(refuse(ConnectRefusalCode::ConnectionRateExceeded, "you connect too often: wait a little"));
            }
        }
        let key = SessionKey { user: Arc::clone(&identity.user), client_id };
        let previous = self
            .shared
            .registry
            .attach(&key, self.number, &self.mailbox, self.shared.limits.connections_per_user)
            .map_err(|reason| match reason {
                NotAttached::Stopping => refuse(ConnectRefusalCode::ServerUnavailable, "the server is shutting down"),
                NotAttached::TooMany => {
                    self.limited("connections_per_user");
                    let max = self.shared.limits.connections_per_user;
                    refuse(ConnectRefusalCode::QuotaExceeded, &format!("you have {max} connections, which is the most"))
                }
            })?;
        // Rights may have changed since the service was asked, while nobody could find this connection. From here on it is found.
        let Some(identity) = self.shared.service.recheck(&identity) else {
            self.shared.registry.detach(&key, self.number);
            return Err(refuse(ConnectRefusalCode::NotAuthorized, NOT_ANY_MORE));
        };
        departure.key = Some(key.clone());
        if let Some(previous) = previous
            && !previous.settled_within(SETTLE_TIMEOUT).await
        {
            tracing::warn!(user = %Escaped(&key.user), "the session's last connection has not let go of it in time");
        }
        // Whoever came in the meantime waits for this connection in turn: it must not take what it would only have to give back.
        match self.mailbox.ending() {
            None => {}
            Some(Ending::TakenOver) => {
                let sentence = "another connection of this user with the same client identifier came at the same time";
                return Err(refuse(ConnectRefusalCode::ServerUnavailable, sentence));
            }
            Some(Ending::Shutdown) => {
                return Err(refuse(ConnectRefusalCode::ServerUnavailable, "the server is shutting down"));
            }
        }
        self.shared.service.observe(Observation::Connected);
        self.shared.service.arrived(&key.user);

        let expiry_s = connect.session_expiry_s.min(self.shared.limits.session_expiry_max_s);
        let window = match connect.receive_maximum {
            Some(named) => named.min(WINDOW_MAX),
            None => self.shared.limits.window,
        };
        let stored = self.shared.service.load_session(&key).await.map_err(unavailable)?;
        let receiver = Receiver::new(Arc::clone(&self.mailbox), Arc::new(identity), true);
        let mut session = Session::new(key.clone(), receiver, expiry_s, window.max(1));
        session.authentication_method = connect.authentication.map(|authentication| authentication.method.into());
        let stored_expiry_s = stored.as_ref().map(|record| record.expiry_s);
        if stored.is_some() && connect.clean_start {
            self.shared.service.delete_session(&session.key).await.map_err(unavailable)?;
        }
        let resumed = stored.filter(|_| !connect.clean_start);
        let session_present = resumed.is_some();
        if !session_present && let Some(absent) = self.shared.absent.take(&session.key) {
            // That session is over.
            self.shared.end_absent(absent).await;
        }
        let keep_alive_told = self.keep_alive_told(connect.keep_alive_s);
        let keep_alive_s = keep_alive_told.unwrap_or(connect.keep_alive_s);
        let keep_alive = Duration::from_secs(u64::from(keep_alive_s)) * 3 / 2;
        let silence_max = if keep_alive.is_zero() { self.shared.limits.idle_timeout } else { keep_alive };
        session.silence_max = (!silence_max.is_zero()).then_some(silence_max);

        let cursors = match resumed {
            Some(record) => {
                for subscription in record.subscriptions {
                    // What was allowed once may not be any more.
                    let Ok(to) = self.route_filter(&session.identity, &subscription.filter) else { continue };
                    push_few(&mut session.subscriptions, Subscription { record: subscription, to });
                }
                record.cursors
            }
            None => Vec::new(),
        };
        self.session = Some(session);
        if let Err(refusal) = self.store_session(&cursors, stored_expiry_s, session_present, departure).await {
            // It never was a session of this connection: nothing is left behind, and what an absent one has stays there.
            self.session = None;
            return Err(refusal);
        }
        if let Some(session) = &mut self.session {
            session.will = connect.will.map(Box::new);
        }
        if session_present {
            let absent = self.shared.absent.take(&key);
            self.take_up(absent, departure);
        }
        self.pace = Some(pace);
        let assigned_client_id =
            self.session.as_ref().filter(|_| assigned).map(|session| Arc::clone(&session.key.client_id));
        let expiry_told = (expiry_s != connect.session_expiry_s).then_some(expiry_s);
        if expiry_told.is_some() {
            self.limited("session_expiry_max_s");
        }
        let method = self.session.as_ref().and_then(|session| session.authentication_method.as_deref());
        let identity = self.session.as_ref().filter(|_| connect.request_response_information);
        let response = identity.and_then(|session| self.shared.service.response_information(&session.identity));
        self.engine.accept(&Accepted {
            session_present,
            assigned_client_id: assigned_client_id.as_deref(),
            session_expiry_s: expiry_told,
            keep_alive_s: keep_alive_told,
            authentication_method: method,
            response_information: response.as_deref(),
            publishes_per_s: self.shared.limits.publishes_told(),
        });
        self.timer_at = Instant::now();
        Ok(())
    }

    /// Brings the store in line with the session, and the streams with its subscriptions.
    async fn store_session(
        &mut self,
        cursors: &[(Arc<str>, Position)],
        stored_expiry_s: Option<u32>,
        session_present: bool,
        departure: &mut Departure<S>,
    ) -> Result<(), ConnectRefusal> {
        if session_present {
            self.apply_bound(cursors, departure).await.map_err(unavailable)?;
        }
        let Some(session) = &self.session else { return Ok(()) };
        let (key, service) = (&session.key, &self.shared.service);
        match (session_present, session.is_persistent()) {
            (false, false) => {}
            (false, true) => match service.create_session(key, session.record()).await {
                Ok(()) => {}
                Err(NotCreated::TooMany(reason)) => {
                    self.limited("sessions_per_user");
                    return Err(ConnectRefusal { code: ConnectRefusalCode::QuotaExceeded, reason });
                }
                Err(NotCreated::Unavailable(error)) => return Err(unavailable(error)),
            },
            // A session that ends with this connection needs no record any more: what it restores is in memory now.
            (true, false) => service.delete_session(key).await.map_err(unavailable)?,
            (true, true) if stored_expiry_s == Some(session.expiry_s) => {}
            (true, true) => service.save_session(key, session.record()).await.map_err(unavailable)?,
        }
        Ok(())
    }

    /// The keep alive that an MQTT 5 client has to use in place of its own. MQTT 3.1.1 cannot be told, and keeps its own.
    fn keep_alive_told(&self, asked_s: u16) -> Option<u16> {
        let max_s = self.shared.limits.keep_alive_max_s;
        let told = self.engine.is_v5() && max_s > 0 && (asked_s == 0 || asked_s > max_s);
        if told {
            self.limited("keep_alive_max_s");
        }
        told.then_some(max_s)
    }

    fn judge_will(&self, who: &Identity, will: &Will) -> Result<(), Refusal> {
        self.shared.route(who, &will.topic, will.properties.response_topic.as_deref())?;
        self.shared.service.judge_will(who, &will.as_publish(who))
    }

    /// Goes on where the session's last connection ended: its ordinary subscriptions are this connection's now, and what waited comes first.
    fn take_up(&mut self, absent: Option<AbsentSession>, departure: &mut Departure<S>) {
        let Some(session) = &mut self.session else { return };
        let records: Vec<&SubscriptionRecord> = session.ordinary().collect();
        departure.ordinary.extend(records.iter().map(|record| record.filter.clone()));
        if let Some(absent) = &absent {
            self.mailbox.succeed(&absent.receiver.mailbox);
        }
        let (old, filters) = match &absent {
            Some(absent) => (absent.number, absent.filters().collect()),
            None => (self.number.0, Vec::new()),
        };
        self.shared.subscriptions.replace(filters, old, records, self.number.0, &session.receiver);
        let Some(AbsentSession { receiver, under_way, .. }) = absent else { return };
        let UnderWay { received, resend, queue } = under_way;
        self.engine.restore_qos2_received(received);
        session.resend = resend;
        session.take_unread().for_each(drop);
        session.resend.retain(|one| self.engine.reserve(one.packet_id));
        session.queue.extend(queue.into_iter().filter_map(|queued| match queued {
            Queued::Again(ordinary, packet_id) if !self.engine.reserve(packet_id) => Some(Queued::Ordinary(ordinary)),
            Queued::Release(packet_id) if !self.engine.reserve(packet_id) => None,
            queued => Some(queued),
        }));
        let waited = receiver.mailbox.take_ordinary().into_iter().filter(|ordinary| ordinary.qos > 0);
        session.queue.extend(waited.map(Queued::Ordinary));
    }

    /// Rights have changed: who is this now, and what may it still do?
    pub(super) async fn look_at_rights(&mut self, departure: &mut Departure<S>) {
        let Some(session) = &mut self.session else { return };
        self.rights_seen = self.shared.rights();
        match self.shared.service.recheck(&session.identity) {
            Some(identity) => self.take_identity(identity, departure).await,
            None => {
                session.will = None;
                self.engine.disconnect(DisconnectReasonCode::NotAuthorized, NOT_ANY_MORE);
            }
        }
    }

    /// From now on it is this. Subscriptions that it may not have any more end, and the client is told.
    async fn take_identity(&mut self, identity: Identity, departure: &mut Departure<S>) {
        let Some(session) = &mut self.session else { return };
        let identity = Arc::new(identity);
        session.identity = Arc::clone(&identity);
        session.receiver.set_identity(Arc::clone(&identity));
        // Its expiry may be earlier or later than the timer is set for.
        self.timer_at = Instant::now();
        let subscriptions = std::mem::take(&mut session.subscriptions);
        let mut kept = Vec::with_capacity(subscriptions.len());
        let mut ended = Vec::new();
        for Subscription { record, .. } in subscriptions {
            match self.route_filter(&identity, &record.filter) {
                Ok(to) => kept.push(Subscription { record, to }),
                Err(refusal) => ended.push((record.filter, refusal)),
            }
        }
        let Some(session) = &mut self.session else { return };
        session.subscriptions = kept;
        let is_ended = |filter: &String| ended.iter().any(|(other, _)| other == filter);
        let ordinary: Vec<String> = departure.ordinary.extract_if(.., |filter| is_ended(filter)).collect();
        self.shared.subscriptions.unsubscribe(ordinary.iter().map(String::as_str), self.number.0);
        for (filter, refusal) in &ended {
            self.shared.service.observe(Observation::Refused(refusal.code));
            self.shared.service.refused(&identity.user, filter, refusal);
        }
        if let Err(error) = self.after_subscriptions(!ended.is_empty(), departure).await {
            self.end_unavailable(&error);
        }
    }
}
