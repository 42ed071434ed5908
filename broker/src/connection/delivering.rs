//! What the client is sent, and what it acknowledges.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};

use super::Connection;
use crate::engine::{Engine, NotSent, Outgoing, UserProperties};
use crate::mailbox::{Event, Ordinary};
use crate::service::{Observation, ReadLimit, Service};
use crate::session::{Queued, RetainedWanted, Target};
use crate::stream::Ready;
use crate::topics::message::Expiry;

/// Deliveries stop while so many bytes wait for the socket.
const OUT_DELIVERIES_MAX: usize = 64 * 1024;
/// Parts of what is retained that are looked through before others have their turn.
const RETAINED_PARTS_MAX: usize = 16;
/// Messages read from the log at once.
const PAGE_MESSAGES: usize = 64;
/// Payload bytes of them.
const PAGE_BYTES: usize = 128 * 1024;
/// How long a failed read of the log waits before the next.
const READ_RETRY: Duration = Duration::from_millis(500);

impl<S, T> Connection<S, T>
where
    S: Service,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    pub(super) fn take_page(&mut self) {
        let Some((topic, page)) = self.page.take().map(|page| *page) else { return };
        let Some(slot) = self.session.as_mut().and_then(|session| session.slot(&topic)) else { return };
        match page {
            Ok(page) => slot.stream.on_page(page),
            Err(error) => {
                tracing::error!(%error, topic = %slot.topic, "the log could not be read; trying again");
                slot.stream.on_read_failed();
                self.moments_mut().retry_at = Some(Instant::now() + READ_RETRY);
            }
        }
    }

    /// Sends whatever the client has room for, and reads the log for more.
    pub(super) fn deliver(&mut self) {
        let Some(session) = &mut self.session else { return };
        if self.end.is_some() || self.engine.closing || self.cut {
            return;
        }
        let mut has_room = true;
        let mut sent_us = None;
        while let Some(index) = session.next_slot() {
            let slot_qos = session.slots[index].qos;
            has_room =
                self.engine.out.len() - self.out_at < OUT_DELIVERIES_MAX && (slot_qos == 0 || session.has_room());
            if !has_room {
                break;
            }
            let slot = &mut session.slots[index];
            let Some(ready) = slot.stream.next() else { break };
            let position = ready.position();
            let retain = slot.stream.is_backlog(position);
            let topic = Arc::clone(&slot.topic);
            let again = session.take_resend(&topic, position);
            if !session.resend.is_empty() {
                session.take_passed(&topic, position).for_each(|packet_id| self.engine.release(packet_id));
            }
            let identifiers = &session.slots[index].identifiers;
            let sent = send_ready(&mut self.engine, &topic, &ready, slot_qos, retain, again, identifiers);
            if let Ready::Live(message) = &ready
                && message.received_us != 0
            {
                let sent_us = *sent_us.get_or_insert_with(|| self.shared.micros(Instant::now()));
                let took = Duration::from_micros(sent_us.saturating_sub(message.received_us));
                self.shared.service.observe(Observation::PublishToDelivery(took));
            }
            match sent {
                Ok(Some(packet_id)) => {
                    session.sent(packet_id, Target::Stream(topic, position), ready.payload().len());
                }
                // QoS 0, or too large for this client: delivered when the bytes before it are written.
                Ok(None) | Err(NotSent::TooLarge) => self.unwritten.push((topic, position)),
                Err(NotSent::Closed) => return,
            }
        }
        let waits = self.reading.is_some() || self.moments.as_ref().is_some_and(|moments| moments.retry_at.is_some());
        if has_room && !waits {
            let window_has_room = session.has_room();
            for slot in &mut session.slots {
                if slot.qos > 0 && !window_has_room {
                    continue;
                }
                let Some(after) = slot.stream.begin_read(self.shared.service.head()) else { continue };
                let shared = Arc::clone(&self.shared);
                let (user, topic) = (Arc::clone(&session.key.user), Arc::clone(&slot.topic));
                let reading = async move {
                    let _turn = shared.reads.acquire().await;
                    let limit = ReadLimit { messages: PAGE_MESSAGES, bytes: PAGE_BYTES };
                    let page = shared.service.read(&user, &topic, after, limit).await;
                    (topic, page)
                };
                self.reading = Some(Box::pin(reading));
                break;
            }
        }
        self.deliver_queued();
        let Some(session) = &mut self.session else { return };
        if session.queue.is_empty() {
            session.queue.shrink_to(0);
        }
        let messages_sent = std::mem::take(&mut self.engine.messages_sent);
        if messages_sent > 0 {
            self.shared.service.observe(Observation::MessagesSent(u64::from(messages_sent)));
        }
        if self.engine.out.is_empty() && !self.unwritten.is_empty() {
            self.on_all_written();
        }
    }

    /// Sends what waits in the session's own queue, as far as the client has room.
    fn deliver_queued(&mut self) {
        let Some(session) = &mut self.session else { return };
        let mut retained_parts = 0;
        while self.engine.out.len() - self.out_at < OUT_DELIVERIES_MAX {
            let needs_room = match session.queue.front() {
                Some(Queued::Ordinary(ordinary)) => ordinary.qos > 0,
                Some(Queued::Again(..) | Queued::Release(_)) => true,
                Some(Queued::Live(_, qos)) => *qos > 0,
                Some(Queued::Retained(wanted)) => wanted.qos > 0,
                None => break,
            };
            if needs_room && !session.has_room() {
                break;
            }
            let Some(queued) = session.queue.pop_front() else { break };
            let (ordinary, again) = match queued {
                Queued::Ordinary(ordinary) => (ordinary, None),
                Queued::Again(ordinary, packet_id) => (ordinary, Some(packet_id)),
                Queued::Release(packet_id) => {
                    if !self.engine.release_again(packet_id) {
                        session.queue.push_front(Queued::Release(packet_id));
                        break;
                    }
                    session.sent(packet_id, Target::Released, 0);
                    continue;
                }
                Queued::Retained(wanted) if retained_parts == RETAINED_PARTS_MAX => {
                    session.queue.push_front(Queued::Retained(wanted));
                    self.busy = true;
                    break;
                }
                Queued::Retained(mut wanted) => {
                    retained_parts += 1;
                    let after = wanted.after.take();
                    let (found, after) = self.shared.retained_for(&session.identity, &wanted.filter, after.as_deref());
                    let (qos, identifier) = (wanted.qos, wanted.identifier);
                    if after.is_some() {
                        session.queue.push_front(Queued::Retained(RetainedWanted { after, ..wanted }));
                    }
                    for found in found.into_iter().rev() {
                        session.queue.push_front(Queued::Ordinary(Ordinary {
                            qos: qos.min(found.message.qos),
                            retain: true,
                            identifiers: identifier.into_iter().collect(),
                            since: found.since,
                            share: None,
                            charge: None,
                            message: found.message,
                        }));
                    }
                    continue;
                }
                Queued::Live(Event { message, .. }, qos) => {
                    // Its topic may have been left since, or closed to this client.
                    let Some(topic) = session.live_topic(message.bound_topic()) else { continue };
                    let sent = self.engine.publish(Outgoing {
                        topic: &message.topic,
                        payload: &message.payload,
                        qos,
                        retain: message.is_retained(),
                        user_properties: UserProperties::Live(&message),
                        properties: None,
                        expiry_s: None,
                        identifiers: &topic.identifiers,
                        again: None,
                    });
                    if let Ok(Some(packet_id)) = sent {
                        session.sent(packet_id, Target::Live, message.payload.len());
                    }
                    continue;
                }
            };
            let expiry_s = match ordinary.expiry(Instant::now()) {
                Expiry::Never => None,
                Expiry::Left(left_s) => Some(left_s),
                // One that was sent before is under way, and is not taken back.
                Expiry::Over if again.is_some() => Some(0),
                Expiry::Over => continue,
            };
            // Rights may have changed since it was queued.
            if !self.shared.service.may_receive(&session.identity, &ordinary.message.topic) {
                if let Some(packet_id) = again {
                    self.engine.release(packet_id);
                }
                continue;
            }
            let sent = self.engine.publish(Outgoing {
                topic: &ordinary.message.topic,
                payload: &ordinary.message.payload,
                qos: ordinary.qos,
                retain: ordinary.retain,
                user_properties: UserProperties::None,
                properties: Some(&ordinary.message.properties),
                expiry_s,
                identifiers: &ordinary.identifiers,
                again,
            });
            match sent {
                Ok(Some(packet_id)) => {
                    let bytes = ordinary.message.payload.len();
                    session.sent(packet_id, Target::Ordinary(ordinary), bytes);
                }
                Ok(None) | Err(NotSent::TooLarge) => {}
                Err(NotSent::Closed) => {
                    session.queue.push_front(match again {
                        Some(packet_id) => Queued::Again(ordinary, packet_id),
                        None => Queued::Ordinary(ordinary),
                    });
                    break;
                }
            }
        }
    }

    /// `true` if a cursor moved.
    pub(super) fn acknowledged(&mut self, packet_id: u16, delivered: &mut u64) -> bool {
        let Some(session) = &mut self.session else { return false };
        let Some(Target::Stream(topic, position)) = session.acknowledged(packet_id) else { return false };
        *delivered += 1;
        session.slot(&topic).is_some_and(|slot| slot.stream.on_acknowledged(position))
    }

    pub(super) fn on_all_written(&mut self) {
        if self.unwritten.is_empty() {
            return;
        }
        let Some(session) = &mut self.session else { return };
        let count = self.unwritten.len() as u64;
        for (topic, position) in self.unwritten.drain(..) {
            if let Some(slot) = session.slot(&topic) {
                slot.stream.on_acknowledged(position);
            }
        }
        self.shared.service.observe(Observation::Delivered(count));
        self.report_acknowledged();
    }

    pub(super) fn report_acknowledged(&mut self) {
        let Some(session) = &mut self.session else { return };
        let persistent = session.is_persistent();
        for slot in &mut session.slots {
            if let Some((after, position)) = slot.stream.take_advance() {
                self.shared.service.acknowledged(&session.key, persistent, &slot.topic, after, position);
            }
        }
    }
}

fn send_ready(
    engine: &mut Engine,
    topic: &str,
    ready: &Ready,
    qos: u8,
    retain: bool,
    again: Option<u16>,
    identifiers: &[u32],
) -> Result<Option<u16>, NotSent> {
    match ready {
        Ready::Live(message) => engine.publish(Outgoing {
            topic: &message.topic,
            payload: &message.payload,
            qos,
            retain,
            user_properties: UserProperties::Live(message),
            properties: None,
            expiry_s: None,
            identifiers,
            again,
        }),
        Ready::Stored(delivery) => engine.publish(Outgoing {
            topic: delivery.topic.as_deref().unwrap_or(topic),
            payload: &delivery.payload,
            qos,
            retain,
            user_properties: UserProperties::Stored(&delivery.properties),
            properties: None,
            expiry_s: None,
            identifiers,
            again,
        }),
    }
}
