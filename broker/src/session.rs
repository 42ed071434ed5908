//! What a connection knows of its session: subscriptions, streams, what is in flight.
//!
//! Pure bookkeeping; the connection does the talking. Invariant: a packet identifier in flight has exactly one target.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::Will;
use crate::live::LiveMessage;
use crate::mailbox::Ordinary;
use crate::service::{BoundTopic, Keeping, Position, SessionKey, SessionRecord, SubscriptionRecord};
use crate::stream::DurableStream;

/// What a filter subscribes to.
#[derive(Debug)]
pub(crate) enum Subscribed {
    Bound(Vec<BoundTopic>),
    Ordinary,
}

#[derive(Debug)]
pub(crate) struct Subscription {
    pub(crate) record: SubscriptionRecord,
    pub(crate) to: Subscribed,
}

/// A durable bound topic that the session reads.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) topic: Arc<str>,
    pub(crate) qos: u8,
    pub(crate) stream: DurableStream,
}

/// A message without a log, waiting for the window.
#[derive(Debug)]
pub(crate) enum Queued {
    Ordinary(Ordinary),
    Live(Arc<LiveMessage>, u8),
}

#[derive(Debug, Clone)]
pub(crate) enum Target {
    Stream(Arc<str>, Position),
    Queued,
}

/// A message of a durable topic that was sent and not acknowledged when its connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resend {
    pub(crate) topic: Arc<str>,
    pub(crate) position: Position,
    pub(crate) packet_id: u16,
}

#[derive(Debug)]
struct InFlight {
    packet_id: u16,
    target: Target,
    bytes: usize,
}

pub(crate) struct Session {
    pub(crate) key: SessionKey,
    pub(crate) expiry_s: u32,
    pub(crate) silence_max: Option<Duration>,
    pub(crate) will: Option<Will>,
    pub(crate) subscriptions: Vec<Subscription>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) live_topics: Vec<(Arc<str>, u8)>,
    pub(crate) queue: VecDeque<Queued>,
    /// What the last connection had in flight: the same messages go out under the same packet identifiers [MQTT-4.4.0-1].
    pub(crate) resend: Vec<Resend>,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: usize,
    window: usize,
}

/// Payload bytes that may be in flight to one client.
const IN_FLIGHT_BYTES_MAX: usize = 256 * 1024;

impl Session {
    pub(crate) fn new(key: SessionKey, expiry_s: u32, window: usize) -> Self {
        Self {
            key,
            expiry_s,
            silence_max: None,
            will: None,
            subscriptions: Vec::new(),
            slots: Vec::new(),
            live_topics: Vec::new(),
            queue: VecDeque::new(),
            resend: Vec::new(),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            window,
        }
    }

    pub(crate) fn is_persistent(&self) -> bool {
        self.expiry_s > 0
    }

    pub(crate) fn has_room(&self) -> bool {
        self.in_flight.len() < self.window && self.in_flight_bytes < IN_FLIGHT_BYTES_MAX
    }

    pub(crate) fn sent(&mut self, packet_id: u16, target: Target, bytes: usize) {
        self.in_flight_bytes += bytes;
        self.in_flight.push_back(InFlight { packet_id, target, bytes });
    }

    /// What this packet identifier carried; it is free now. Clients acknowledge in order, so it is nearly always the first.
    pub(crate) fn acknowledged(&mut self, packet_id: u16) -> Option<Target> {
        let at = self.in_flight.iter().position(|sent| sent.packet_id == packet_id)?;
        let sent = self.in_flight.remove(at)?;
        self.in_flight_bytes -= sent.bytes;
        if self.in_flight.is_empty() {
            self.in_flight.shrink_to(0);
        }
        Some(sent.target)
    }

    /// The packet identifier under which this message was sent before.
    pub(crate) fn take_resend(&mut self, topic: &str, position: Position) -> Option<u16> {
        let at = self.resend.iter().position(|one| one.position == position && *one.topic == *topic)?;
        Some(self.resend.swap_remove(at).packet_id)
    }

    /// What the session's next connection has to send again.
    pub(crate) fn unacknowledged(&mut self) -> Vec<Resend> {
        let mut resend = std::mem::take(&mut self.resend);
        resend.extend(self.in_flight.drain(..).filter_map(|sent| match sent.target {
            Target::Stream(topic, position) => Some(Resend { topic, position, packet_id: sent.packet_id }),
            Target::Queued => None,
        }));
        resend
    }

    pub(crate) fn slot(&mut self, topic: &str) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| *slot.topic == *topic)
    }

    pub(crate) fn live_qos(&self, topic: &str) -> Option<u8> {
        self.live_topics.iter().find(|(name, _)| **name == *topic).map(|(_, qos)| *qos)
    }

    /// The bound topics that the subscriptions ask for together, each with its highest QoS.
    pub(crate) fn wanted(&self) -> Vec<(BoundTopic, u8)> {
        let mut wanted: Vec<(BoundTopic, u8)> = Vec::new();
        for subscription in &self.subscriptions {
            let Subscribed::Bound(topics) = &subscription.to else { continue };
            for topic in topics {
                match wanted.iter_mut().find(|(other, _)| other.name == topic.name) {
                    Some((_, qos)) => *qos = subscription.record.qos.max(*qos),
                    None => wanted.push((topic.clone(), subscription.record.qos)),
                }
            }
        }
        wanted
    }

    pub(crate) fn record(&self) -> SessionRecord {
        SessionRecord {
            subscriptions: self.subscriptions.iter().map(|subscription| subscription.record.clone()).collect(),
            expiry_s: self.expiry_s,
            cursors: self.slots.iter().map(|slot| (Arc::clone(&slot.topic), slot.stream.acknowledged())).collect(),
        }
    }

    /// Whether a bound topic is durable and not yet read.
    pub(crate) fn is_new_stream(&self, topic: &BoundTopic) -> bool {
        topic.keeping == Keeping::Durable && !self.slots.iter().any(|slot| slot.topic == topic.name)
    }
}
