//! SUBSCRIBE and UNSUBSCRIBE.

use std::sync::Arc;
use std::time::Instant;

use mqtt_protocol_core::mqtt::result_code::DisconnectReasonCode;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Connection;
use super::ending::Departure;
use crate::engine::{Filter, Granted};
use crate::filters::FiltersFull;
use crate::ordinary::OrdinarySubscription;
use crate::service::{
    Identity, Keeping, Observation, Position, Refusal, RefusalCode, Service, ServiceError, SubscribeRoute, Subscriber,
    SubscriptionRecord,
};
use crate::session::{LiveTopic, Queued, RetainedWanted, Slot, Subscribed, Subscription, Wanted, push_few};
use crate::stream::DurableStream;
use crate::topics::filter;

impl<S, T> Connection<S, T>
where
    S: Service,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    pub(super) async fn subscribe(
        &mut self,
        packet_id: u16,
        filters: Vec<Filter>,
        identifier: Option<u32>,
        departure: &mut Departure<S>,
    ) {
        let Some(session) = &self.session else {
            self.engine.fault.get_or_insert(mqtt_protocol_core::mqtt::result_code::MqttError::ProtocolError);
            return;
        };
        if identifier == Some(0) {
            // [MQTT-3.8.2.1.2]
            self.engine.disconnect(DisconnectReasonCode::ProtocolError, "a subscription identifier is not 0");
            return;
        }
        if filters.iter().any(|one| one.no_local && filter::shared(&one.filter).is_some()) {
            // [MQTT-3.8.3-4]
            let sentence = "a shared subscription cannot be no-local";
            self.engine.disconnect(DisconnectReasonCode::ProtocolError, sentence);
            return;
        }
        if filters.len() > self.shared.limits.filters_per_packet() {
            self.refuse_too_many(packet_id, filters.len());
            return;
        }
        let who = Arc::clone(&session.identity);
        let mut granted = Vec::with_capacity(filters.len());
        let mut first_reason: Option<String> = None;
        let mut retained: Vec<RetainedWanted> = Vec::new();
        let mut changed = false;
        for wanted in filters {
            match self.add_subscription(&who, wanted, identifier, &mut retained, &mut changed, departure) {
                Ok(qos) => granted.push(Granted::Qos(qos)),
                Err(refusal) => {
                    self.shared.service.observe(Observation::Refused(refusal.code));
                    granted.push(Granted::Refused(refusal.code));
                    first_reason.get_or_insert(refusal.reason);
                }
            }
        }
        if let Err(error) = self.after_subscriptions(changed, departure).await {
            self.end_unavailable(&error);
            return;
        }
        self.engine.suback(packet_id, &granted, first_reason.as_deref());
        if let Some(session) = &mut self.session {
            for wanted in retained {
                session.forget_retained(&wanted.filter);
                session.queue.push_back(Queued::Retained(wanted));
            }
        }
    }

    /// So many more filters than a session may have are not looked at one by one.
    fn refuse_too_many(&mut self, packet_id: u16, filters: usize) {
        self.limited("subscriptions_per_session");
        self.shared.service.observe(Observation::Refused(RefusalCode::QuotaExceeded));
        let most = self.shared.limits.filters_per_packet();
        let sentence = format!("a SUBSCRIBE has at most {most} filters");
        let refusal = self.refusal(RefusalCode::QuotaExceeded, &sentence);
        self.engine.suback(packet_id, &vec![Granted::Refused(refusal.code); filters], Some(&refusal.reason));
    }

    fn add_subscription(
        &mut self,
        who: &Identity,
        wanted: Filter,
        identifier: Option<u32>,
        retained: &mut Vec<RetainedWanted>,
        changed: &mut bool,
        departure: &mut Departure<S>,
    ) -> Result<u8, Refusal> {
        self.shared.judge_topic_bytes(&wanted.filter, RefusalCode::TopicFilterInvalid)?;
        let shared = filter::validate_topic_filter(&wanted.filter, self.shared.limits.topic_levels)
            .map_err(|error| self.shared.refuse_topic(RefusalCode::TopicFilterInvalid, error))?
            .is_some();
        let to = self.route_filter(who, &wanted.filter)?;
        let Some(session) = &self.session else { return Ok(0) };
        let existing = session.subscriptions.iter().position(|one| one.record.filter == wanted.filter);
        if existing.is_none() && session.subscriptions.len() >= self.shared.limits.subscriptions_per_session {
            let max = self.shared.limits.subscriptions_per_session;
            self.shared.service.observe(Observation::Limited("subscriptions_per_session"));
            return Err(self.refusal(RefusalCode::QuotaExceeded, &format!("a session may have {max} subscriptions")));
        }
        let mut record = SubscriptionRecord {
            filter: wanted.filter,
            qos: wanted.qos,
            no_local: wanted.no_local,
            retain_as_published: wanted.retain_as_published,
            identifier,
        };
        let ordinary = matches!(to, Subscribed::Ordinary);
        if !ordinary {
            // The log makes QoS 1 exact by position; a second handshake would add nothing.
            record.qos = record.qos.min(1);
        }
        if ordinary && let Err(full) = self.insert_ordinary(&record, departure) {
            self.limited(full.limit());
            return Err(self.refusal(RefusalCode::QuotaExceeded, &full.to_string()));
        }
        let Some(session) = &mut self.session else { return Ok(0) };
        let qos = record.qos;
        let subscription = Subscription { record: record.clone(), to };
        match existing {
            Some(at) => {
                *changed |= session.subscriptions[at].record != record;
                session.subscriptions[at] = subscription;
            }
            None => {
                *changed = true;
                push_few(&mut session.subscriptions, subscription);
            }
        }
        if ordinary {
            let send_retained = match wanted.retain_handling {
                0 => true,
                1 => existing.is_none(),
                _ => false,
            };
            // Nobody in a group is sent what was there before [MQTT-4.8.2].
            if send_retained && !shared {
                retained.retain(|other| other.filter != record.filter);
                retained.push(RetainedWanted { filter: record.filter, qos, identifier, after: None });
            }
        }
        Ok(qos)
    }

    /// What a valid filter subscribes to. A shared one is looked at as what is shared.
    pub(super) fn route_filter(&self, who: &Identity, subscribed: &str) -> Result<Subscribed, Refusal> {
        let shared = filter::shared(subscribed);
        match self.shared.service.route_subscribe(who, shared.map_or(subscribed, |shared| shared.filter)) {
            SubscribeRoute::Refused(refusal) => Err(refusal),
            SubscribeRoute::Bound(_) if shared.is_some() => {
                let code = RefusalCode::SharedSubscriptionsNotSupported;
                Err(self.refusal(code, "these topics have one reader, and are not shared"))
            }
            SubscribeRoute::Bound(topics) => Ok(Subscribed::Bound(topics)),
            SubscribeRoute::Ordinary => Ok(Subscribed::Ordinary),
        }
    }

    fn insert_ordinary(&self, record: &SubscriptionRecord, departure: &mut Departure<S>) -> Result<(), FiltersFull> {
        let Some(session) = &self.session else { return Ok(()) };
        let after = self.shared.last_ordinary();
        let subscription = OrdinarySubscription::new(record, after, &session.receiver);
        if self.shared.subscriptions.subscribe(&record.filter, self.number.0, subscription)? {
            push_few(&mut departure.ordinary, record.filter.clone());
        }
        Ok(())
    }

    pub(super) async fn unsubscribe(&mut self, packet_id: u16, filters: Vec<String>, departure: &mut Departure<S>) {
        let Some(session) = &mut self.session else {
            self.engine.fault.get_or_insert(mqtt_protocol_core::mqtt::result_code::MqttError::ProtocolError);
            return;
        };
        let most = self.shared.limits.filters_per_packet();
        if filters.len() > most {
            // UNSUBACK has no code for it, and nobody has so many subscriptions to end.
            self.limited("subscriptions_per_session");
            let sentence = format!("an UNSUBSCRIBE has at most {most} filters");
            self.engine.disconnect(DisconnectReasonCode::QuotaExceeded, &sentence);
            return;
        }
        let mut existed = Vec::with_capacity(filters.len());
        for filter in &filters {
            let at = session.subscriptions.iter().position(|one| one.record.filter == *filter);
            existed.push(at.is_some());
            let Some(at) = at else { continue };
            let removed = session.subscriptions.remove(at);
            if matches!(removed.to, Subscribed::Ordinary) {
                session.forget_retained(filter);
                self.shared.subscriptions.unsubscribe([filter.as_str()], self.number.0);
                departure.ordinary.retain(|other| other != filter);
            }
        }
        if let Err(error) = self.after_subscriptions(existed.contains(&true), departure).await {
            self.end_unavailable(&error);
            return;
        }
        self.engine.unsuback(packet_id, &existed);
    }

    pub(super) fn end_unavailable(&mut self, error: &ServiceError) {
        tracing::error!(%error, "subscriptions could not be stored");
        self.engine.disconnect(DisconnectReasonCode::ServerBusy, "the session store cannot be read or written now");
    }

    pub(super) async fn after_subscriptions(
        &mut self,
        changed: bool,
        departure: &mut Departure<S>,
    ) -> Result<(), ServiceError> {
        if !changed {
            return Ok(());
        }
        self.apply_bound(&[], departure).await?;
        if let Some(session) = &self.session
            && session.is_persistent()
        {
            let record = session.record();
            // The whole record is stored anew, however little has changed.
            let bytes: usize = record.subscriptions.iter().map(SubscriptionRecord::bytes).sum();
            if let Some(pace) = &mut self.pace {
                pace.charge_bytes(u64::try_from(bytes).unwrap_or(u64::MAX), Instant::now());
            }
            self.shared.service.save_session(&session.key, record).await?;
        }
        Ok(())
    }

    /// Brings streams and registrations in line with the subscriptions. Whoever is registered before the log is read misses nothing.
    pub(super) async fn apply_bound(
        &mut self,
        cursors: &[(Arc<str>, Position)],
        departure: &mut Departure<S>,
    ) -> Result<(), ServiceError> {
        // Streams may go now; what they were told last must not go with them.
        self.report_acknowledged();
        let Some(session) = &mut self.session else { return Ok(()) };
        let wanted = session.wanted();
        session.slots.retain(|slot| wanted.iter().any(|wanted| wanted.topic.name == slot.topic));
        session.take_unread().for_each(|packet_id| self.engine.release(packet_id));
        session.live_topics.clear();
        departure.bound.retain(|name| {
            let keep = wanted.iter().any(|wanted| wanted.topic.name == *name);
            if !keep {
                self.shared.registry.unsubscribe(name, self.number);
            }
            keep
        });
        for Wanted { topic, qos, identifiers } in wanted {
            if !departure.bound.contains(&topic.name) {
                self.shared.registry.subscribe(&topic.name, self.number, &self.mailbox);
                push_few(&mut departure.bound, Arc::clone(&topic.name));
                if topic.keeping == Keeping::Live {
                    let subscriber = Subscriber { mailbox: Arc::clone(&self.mailbox) };
                    self.shared.service.subscribed(&session.key.user, &topic.name, subscriber);
                }
            }
            if topic.keeping == Keeping::Live {
                let identifiers = identifiers.into();
                push_few(&mut session.live_topics, LiveTopic { name: topic.name, qos, identifiers });
            } else if session.is_new_stream(&topic) {
                let stored = cursors.iter().find(|(name, _)| *name == topic.name).map(|(_, position)| *position);
                let after = match stored {
                    Some(position) => position,
                    None => self.shared.service.start(&session.key.user, &topic.name).await?,
                };
                let stream = DurableStream::new(after, self.shared.service.head());
                let identifiers = identifiers.into();
                push_few(&mut session.slots, Slot { topic: topic.name, qos, identifiers, stream });
            } else if let Some(slot) = session.slot(&topic.name) {
                slot.qos = qos;
                slot.identifiers = identifiers.into();
            }
        }
        Ok(())
    }
}
