//! What the client publishes: where it goes, and its acknowledgement.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mqtt_protocol_core::mqtt::result_code::DisconnectReasonCode;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Connection, End, Pending};
use crate::completion::Reply;
use crate::engine::{Ack, Granted, Incoming, Overfull, Publish};
use crate::rate::Cost;
use crate::service::{
    BoundPublish, ConnectRefusal, ConnectRefusalCode, Observation, PublishOutcome, PublishRoute, Refusal, RefusalCode,
    Service,
};
use crate::topics::message::Message;

/// How long publishes wait when the bus of ordinary messages is full.
const BUS_RETRY: Duration = Duration::from_millis(2);
/// Subscriptions that are looked at for one publish, for what a publish costs.
const SUBSCRIPTIONS_PER_PUBLISH: usize = 32;
/// How often a client is told at most that its QoS 0 publishes go nowhere.
const TOLD_INTERVAL: Duration = Duration::from_secs(1);

impl<S, T> Connection<S, T>
where
    S: Service,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    pub(super) fn refuse_too_fast(&mut self, packet: Incoming, limit: &'static str) {
        let (topic, qos, packet_id) = match packet {
            Incoming::Publish(publish) => (publish.topic, publish.qos, publish.packet_id),
            Incoming::Overfull(Overfull::Publish { topic, qos, packet_id, .. }) => (topic, qos, packet_id),
            _ => return,
        };
        let sentence = format!("limits.{limit} is reached: send it again a little later");
        self.refuse_publish(&topic, qos, packet_id, RefusalCode::TooFast, &sentence);
    }

    pub(super) fn refuse_overfull(&mut self, overfull: Overfull) {
        self.limited("user_properties");
        let sentence = format!("a packet has at most {} user properties", self.shared.limits.user_properties);
        match overfull {
            Overfull::Connect => {
                self.refuse_connect(&ConnectRefusal { code: ConnectRefusalCode::QuotaExceeded, reason: sentence })
            }
            Overfull::Publish { topic, qos, packet_id, .. } => {
                self.refuse_publish(&topic, qos, packet_id, RefusalCode::QuotaExceeded, &sentence);
            }
            Overfull::Subscribe { packet_id, filters } => {
                self.shared.service.observe(Observation::Refused(RefusalCode::QuotaExceeded));
                let refusal = self.refusal(RefusalCode::QuotaExceeded, &sentence);
                self.engine.suback(packet_id, &vec![Granted::Refused(refusal.code); filters], Some(&refusal.reason));
            }
            Overfull::Other => self.engine.disconnect(DisconnectReasonCode::QuotaExceeded, &sentence),
        }
    }

    /// Refuses a publish because there is too much of something.
    fn refuse_publish(&mut self, topic: &str, qos: u8, packet_id: Option<u16>, code: RefusalCode, sentence: &str) {
        let Some(session) = &self.session else { return };
        let (user, now) = (Arc::clone(&session.key.user), Instant::now());
        let refusal = self.refusal(code, sentence);
        if let Some(packet_id) = packet_id {
            self.tell_refusal(&user, topic, Some(packet_id), &refusal);
            self.push_pending(packet_id, qos, now, Some(PublishOutcome::Refused(refusal)));
        } else if self.moments().told_at.is_none_or(|at| now >= at + TOLD_INTERVAL) {
            self.moments_mut().told_at = Some(now);
            self.tell_refusal(&user, topic, None, &refusal);
        } else {
            self.shared.service.observe(Observation::Refused(refusal.code));
        }
    }

    /// Publishes what had no room on the bus, as far as there is some now.
    pub(super) fn publish_held(&mut self) {
        if let Some(moments) = &mut self.moments {
            moments.bus_retry_at = None;
        }
        while let Some(publish) = self.held.front() {
            if !self.shared.has_room_for(publish.payload.len()) {
                self.moments_mut().bus_retry_at = Some(Instant::now() + BUS_RETRY);
                return;
            }
            if let Some(publish) = self.held.pop_front() {
                self.publish_now(publish);
            }
        }
    }

    pub(super) fn publish(&mut self, publish: Publish) {
        // One behind the other, whatever their topics are.
        self.held.push_back(publish);
        self.publish_held();
    }

    fn publish_now(&mut self, publish: Publish) {
        let Some(session) = &self.session else {
            self.engine.fault.get_or_insert(mqtt_protocol_core::mqtt::result_code::MqttError::ProtocolError);
            return;
        };
        self.shared.service.observe(Observation::MessageReceived);
        let (user, roles) = (Arc::clone(&session.key.user), session.identity.roles);
        // When it was read, though it may have waited since.
        let received_at = self.heard_at;
        let response_topic = publish.properties.as_ref().and_then(|properties| properties.response_topic.as_deref());
        match self.shared.route(&session.identity, &publish.topic, response_topic) {
            Ok(PublishRoute::Bound) => {
                let reply = match publish.packet_id {
                    Some(packet_id) => {
                        let token = self.push_pending(packet_id, publish.qos, received_at, None);
                        Reply::new(Arc::clone(&self.mailbox), token)
                    }
                    None => Reply::nobody(),
                };
                let properties = publish.properties.map(|properties| *properties).unwrap_or_default();
                self.unsent.push(BoundPublish {
                    user,
                    roles,
                    topic: publish.topic,
                    payload: publish.payload,
                    response_topic: properties.response_topic,
                    correlation: properties.correlation_data.unwrap_or_default(),
                    id_property: properties
                        .user_properties
                        .into_iter()
                        .find_map(|(key, value)| (key == "id").then_some(value)),
                    can_answer: publish.packet_id.is_some() && self.engine.is_v5(),
                    received_at,
                    reply,
                });
            }
            Ok(_) => {
                let topic = publish.topic;
                self.pay_for_work(self.shared.subscriptions.work(&topic));
                let message = Message {
                    topic: topic.as_str().into(),
                    payload: publish.payload,
                    qos: publish.qos,
                    retain: publish.retain,
                    publisher: self.number.0,
                    number: 0,
                    properties: publish.properties.map(|properties| *properties).unwrap_or_default(),
                };
                let source = self.session.as_ref().map(|session| Arc::clone(&session.identity));
                let outcome = match self.shared.publish_ordinary(message, source) {
                    Ok(()) => PublishOutcome::Stored { subscribers: true, properties: Vec::new() },
                    Err(full) => {
                        self.limited(full.limit());
                        let refusal = self.refusal(RefusalCode::QuotaExceeded, &full.to_string());
                        self.tell_refusal(&user, &topic, publish.packet_id, &refusal);
                        PublishOutcome::Refused(refusal)
                    }
                };
                if let Some(packet_id) = publish.packet_id {
                    self.push_pending(packet_id, publish.qos, received_at, Some(outcome));
                }
            }
            Err(refusal) => {
                self.tell_refusal(&user, &publish.topic, publish.packet_id, &refusal);
                if let Some(packet_id) = publish.packet_id {
                    self.push_pending(packet_id, publish.qos, received_at, Some(PublishOutcome::Refused(refusal)));
                }
            }
        }
    }

    /// A publish that many subscriptions match is as much work for everybody as several.
    fn pay_for_work(&mut self, subscriptions: usize) {
        let publishes = subscriptions / SUBSCRIPTIONS_PER_PUBLISH;
        if publishes > 0
            && let Some(pace) = &mut self.pace
        {
            pace.charge(Cost { publishes: publishes as u64, bytes: 0 }, Instant::now());
        }
    }

    /// A refusal is never silent: where no acknowledgement can carry it, the service tells it its own way.
    fn tell_refusal(&self, user: &str, topic: &str, packet_id: Option<u16>, refusal: &Refusal) {
        self.shared.service.observe(Observation::Refused(refusal.code));
        if packet_id.is_none() || !self.engine.is_v5() {
            self.shared.service.refused(user, topic, refusal);
        }
    }

    fn push_pending(&mut self, packet_id: u16, qos: u8, received_at: Instant, outcome: Option<PublishOutcome>) -> u64 {
        let token = self.first_token + self.pending.len() as u64;
        self.pending.push_back(Pending { packet_id, qos, received_at, outcome });
        token
    }

    /// `place`: what was waited for.
    pub(super) fn submit(&mut self, place: Option<S::Place>) {
        if self.unsent.is_empty() || self.waiting.is_some() {
            return;
        }
        if let Err(unsent) = self.shared.service.submit(std::mem::take(&mut self.unsent), place) {
            self.unsent = unsent;
            let shared = Arc::clone(&self.shared);
            self.waiting = Some(Box::pin(async move { shared.service.place().await }));
        }
    }

    pub(super) fn answer_pending(&mut self) {
        let mut answered_at = None;
        while let Some(pending) = self.pending.front_mut() {
            let Some(outcome) = pending.outcome.take() else { break };
            let (packet_id, qos, received_at) = (pending.packet_id, pending.qos, pending.received_at);
            self.pending.pop_front();
            self.first_token += 1;
            match outcome {
                PublishOutcome::Stored { subscribers, properties } => {
                    self.engine.acknowledge(packet_id, qos, &Ack::Stored { subscribers, properties: &properties });
                    let answered_at = *answered_at.get_or_insert_with(Instant::now);
                    let took = answered_at.saturating_duration_since(received_at);
                    self.shared.service.observe(Observation::PublishToPuback(took));
                }
                PublishOutcome::Refused(refusal) => {
                    self.engine.acknowledge(
                        packet_id,
                        qos,
                        &Ack::Refused { code: refusal.code, reason: &refusal.reason },
                    );
                }
                PublishOutcome::Unknown => {
                    self.engine.disconnect(
                        DisconnectReasonCode::ServerBusy,
                        "the outcome of a publish is unknown: send it again after reconnecting",
                    );
                    self.end.get_or_insert(End::Closed);
                    return;
                }
            }
        }
        if self.pending.is_empty() {
            self.pending.shrink_to(0);
        }
    }
}
