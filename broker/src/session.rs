//! What a connection knows of its session: subscriptions, streams, what is in flight.
//!
//! Pure bookkeeping; the connection does the talking. Invariant: a packet identifier in flight has exactly one target.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::engine::Will;
use crate::mailbox::{Event, Ordinary};
use crate::ordinary::Receiver;
use crate::service::{BoundTopic, Identity, Keeping, Position, SessionKey, SessionRecord, SubscriptionRecord};
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
    /// Of the subscriptions that it is read for.
    pub(crate) identifiers: Box<[u32]>,
    pub(crate) stream: DurableStream,
}

/// A live bound topic that the session listens to.
#[derive(Debug)]
pub(crate) struct LiveTopic {
    pub(crate) name: Arc<str>,
    pub(crate) qos: u8,
    pub(crate) identifiers: Box<[u32]>,
}

/// A bound topic that the subscriptions ask for.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) topic: BoundTopic,
    /// The highest of them.
    pub(crate) qos: u8,
    pub(crate) identifiers: Vec<u32>,
}

/// A message without a log, waiting for the window.
#[derive(Debug)]
pub(crate) enum Queued {
    Ordinary(Ordinary),
    /// As before, under this packet identifier, because the session's last connection had sent it.
    Again(Ordinary, u16),
    /// The receiver has it, and is still to hear PUBREL.
    Release(u16),
    Live(Event, u8),
    /// What is retained for a new subscription, taken part by part as the client has room.
    Retained(RetainedWanted),
}

/// Retained messages that a subscription is still to be sent.
#[derive(Debug)]
pub(crate) struct RetainedWanted {
    pub(crate) filter: String,
    pub(crate) qos: u8,
    pub(crate) identifier: Option<u32>,
    /// Of topics up to here it was sent what there is.
    pub(crate) after: Option<Arc<str>>,
}

#[derive(Debug)]
pub(crate) enum Target {
    Stream(Arc<str>, Position),
    Ordinary(Ordinary),
    /// Its receiver has it (PUBREC): only PUBREL and PUBCOMP are left.
    Released,
    Live,
}

/// A message of a durable topic that was sent and not acknowledged when its connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resend {
    pub(crate) topic: Arc<str>,
    pub(crate) position: Position,
    pub(crate) packet_id: u16,
}

/// What was under way when a session's connection ended.
#[derive(Debug, Default)]
pub(crate) struct UnderWay {
    /// QoS 2 publishes of the client that got PUBREC and were not released: they must not be taken twice.
    pub(crate) received: HashSet<u16>,
    /// Deliveries from durable topics that were not acknowledged.
    pub(crate) resend: Vec<Resend>,
    /// Ordinary messages: those sent and not acknowledged first, then those that waited.
    pub(crate) queue: VecDeque<Queued>,
}

impl UnderWay {
    pub(crate) fn is_empty(&self) -> bool {
        self.received.is_empty() && self.resend.is_empty() && self.queue.is_empty()
    }
}

#[derive(Debug)]
struct InFlight {
    packet_id: u16,
    target: Target,
    bytes: u32,
}

pub(crate) struct Session {
    pub(crate) key: SessionKey,
    pub(crate) identity: Arc<Identity>,
    /// The session as ordinary messages see it.
    pub(crate) receiver: Arc<Receiver>,
    /// What CONNECT agreed on, if it asked for extended authentication.
    pub(crate) authentication_method: Option<Box<str>>,
    pub(crate) expiry_s: u32,
    pub(crate) silence_max: Option<Duration>,
    /// Few have one.
    pub(crate) will: Option<Box<Will>>,
    pub(crate) subscriptions: Vec<Subscription>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) live_topics: Vec<LiveTopic>,
    /// The last position that the bus has brought, on any durable topic.
    pub(crate) bus_seen: Position,
    pub(crate) queue: VecDeque<Queued>,
    /// What the last connection had in flight: the same messages go out under the same packet identifiers [MQTT-4.4.0-1].
    pub(crate) resend: Vec<Resend>,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: u32,
    window: u16,
}

/// Payload bytes that may be in flight to one client.
const IN_FLIGHT_BYTES_MAX: u32 = 256 * 1024;

impl Session {
    pub(crate) fn new(key: SessionKey, receiver: Arc<Receiver>, expiry_s: u32, window: u16) -> Self {
        Self {
            key,
            identity: receiver.identity(),
            receiver,
            authentication_method: None,
            expiry_s,
            silence_max: None,
            will: None,
            subscriptions: Vec::new(),
            slots: Vec::new(),
            live_topics: Vec::new(),
            bus_seen: Position::default(),
            queue: VecDeque::new(),
            resend: Vec::new(),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            window,
        }
    }

    /// What is retained for this filter is not to be sent any more.
    pub(crate) fn forget_retained(&mut self, filter: &str) {
        self.queue.retain(|queued| !matches!(queued, Queued::Retained(wanted) if wanted.filter == filter));
    }

    pub(crate) fn is_persistent(&self) -> bool {
        self.expiry_s > 0
    }

    pub(crate) fn has_room(&self) -> bool {
        self.in_flight.len() < usize::from(self.window) && self.in_flight_bytes < IN_FLIGHT_BYTES_MAX
    }

    pub(crate) fn sent(&mut self, packet_id: u16, mut target: Target, bytes: usize) {
        if let Target::Ordinary(ordinary) = &mut target {
            ordinary.on_sent();
        }
        // One message is at most 256 MiB, and none is sent while there are more bytes than may be.
        let bytes = u32::try_from(bytes).unwrap_or(IN_FLIGHT_BYTES_MAX);
        self.in_flight_bytes = self.in_flight_bytes.saturating_add(bytes);
        self.in_flight.push_back(InFlight { packet_id, target, bytes });
    }

    /// What this packet identifier carried; it is free now. Clients acknowledge in order, so it is nearly always the first.
    pub(crate) fn acknowledged(&mut self, packet_id: u16) -> Option<Target> {
        let at = self.in_flight.iter().position(|sent| sent.packet_id == packet_id)?;
        let sent = self.in_flight.remove(at)?;
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(sent.bytes);
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

    /// Messages of this topic before this one will not come again: the log has them no more. Gives their packet identifiers.
    pub(crate) fn take_passed(&mut self, topic: &str, position: Position) -> impl Iterator<Item = u16> {
        let has_passed = |one: &mut Resend| one.position < position && *one.topic == *topic;
        let passed: Vec<Resend> = self.resend.extract_if(.., has_passed).collect();
        passed.into_iter().map(|one| one.packet_id)
    }

    /// The same for messages of topics that are not read any more.
    pub(crate) fn take_unread(&mut self) -> impl Iterator<Item = u16> {
        let slots = &self.slots;
        let is_unread = |one: &mut Resend| !slots.iter().any(|slot| slot.topic == one.topic);
        let unread: Vec<Resend> = self.resend.extract_if(.., is_unread).collect();
        unread.into_iter().map(|one| one.packet_id)
    }

    /// The receiver has what this packet identifier carried. `false` if it carried nothing.
    pub(crate) fn released(&mut self, packet_id: u16) -> bool {
        let Some(sent) = self.in_flight.iter_mut().find(|sent| sent.packet_id == packet_id) else { return false };
        sent.target = Target::Released;
        true
    }

    /// Takes what the session's next connection has to know of deliveries. Live messages are for this connection alone, and QoS 0 waits for nobody.
    pub(crate) fn take_under_way(&mut self, received: HashSet<u16>) -> UnderWay {
        let mut resend = std::mem::take(&mut self.resend);
        let mut queue = VecDeque::new();
        for InFlight { packet_id, target, .. } in self.in_flight.drain(..) {
            match target {
                Target::Stream(topic, position) => resend.push(Resend { topic, position, packet_id }),
                Target::Ordinary(mut ordinary) => {
                    ordinary.on_returned();
                    queue.push_back(Queued::Again(ordinary, packet_id));
                }
                Target::Released => queue.push_back(Queued::Release(packet_id)),
                Target::Live => {}
            }
        }
        queue.extend(self.queue.drain(..).filter(|queued| match queued {
            Queued::Ordinary(ordinary) => ordinary.qos > 0,
            Queued::Again(..) | Queued::Release(_) => true,
            Queued::Retained(wanted) => wanted.qos > 0,
            Queued::Live(..) => false,
        }));
        UnderWay { received, resend, queue }
    }

    pub(crate) fn slot(&mut self, topic: &str) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| *slot.topic == *topic)
    }

    /// The slot whose message comes next, over all of them: what has to be in order may be spread over topics.
    pub(crate) fn next_slot(&mut self) -> Option<usize> {
        next_slot(&mut self.slots, self.bus_seen)
    }

    pub(crate) fn live_topic(&self, topic: &str) -> Option<&LiveTopic> {
        self.live_topics.iter().find(|live| *live.name == *topic)
    }

    /// The bound topics that the subscriptions ask for together.
    pub(crate) fn wanted(&self) -> Vec<Wanted> {
        let mut wanted: Vec<Wanted> = Vec::new();
        for Subscription { record, to } in &self.subscriptions {
            let Subscribed::Bound(topics) = to else { continue };
            for topic in topics {
                match wanted.iter_mut().find(|other| other.topic.name == topic.name) {
                    Some(same) => {
                        same.qos = record.qos.max(same.qos);
                        same.identifiers.extend(record.identifier);
                    }
                    None => wanted.push(Wanted {
                        topic: topic.clone(),
                        qos: record.qos,
                        identifiers: record.identifier.into_iter().collect(),
                    }),
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

    /// The subscriptions to ordinary topics.
    pub(crate) fn ordinary(&self) -> impl Iterator<Item = &SubscriptionRecord> {
        self.subscriptions.iter().filter(|one| matches!(one.to, Subscribed::Ordinary)).map(|one| &one.record)
    }

    /// Whether a bound topic is durable and not yet read.
    pub(crate) fn is_new_stream(&self, topic: &BoundTopic) -> bool {
        topic.keeping == Keeping::Durable && !self.slots.iter().any(|slot| slot.topic == topic.name)
    }
}

/// Most sessions have one of each: the first gets no room for others.
pub(crate) fn push_few<T>(few: &mut Vec<T>, one: T) {
    if few.is_empty() {
        few.reserve_exact(1);
    }
    few.push(one);
}

/// The slot with the smallest position, once no other can still have a smaller one.
fn next_slot(slots: &mut [Slot], bus_seen: Position) -> Option<usize> {
    let fronts = slots.iter().enumerate().filter_map(|(index, slot)| Some((slot.stream.front()?, index)));
    let (position, index) = fronts.min()?;
    let mut complete = true;
    for slot in slots.iter_mut().filter(|slot| slot.stream.front().is_none()) {
        complete &= slot.stream.is_complete_to(position, bus_seen);
    }
    complete.then_some(index)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::live::LiveMessage;
    use crate::service::{Delivery, Page};

    #[derive(Clone, Debug)]
    enum Step {
        /// Commit a message to one of two topics and announce it; `lost`: on its way it is dropped and a gap told.
        Commit {
            topic: usize,
            lost: bool,
        },
        /// The announcement that waits longest arrives.
        Arrive,
        BeginRead,
        /// The page that was asked for arrives, with at most so many messages.
        PageArrives(usize),
        Send(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0_usize..2, prop::bool::weighted(0.2)).prop_map(|(topic, lost)| Step::Commit { topic, lost }),
            4 => Just(Step::Arrive),
            3 => Just(Step::BeginRead),
            3 => (1_usize..6).prop_map(Step::PageArrives),
            3 => (1_usize..8).prop_map(Step::Send),
        ];
        prop::collection::vec(step, 1..200)
    }

    #[test]
    fn packet_identifiers_of_what_does_not_come_again_are_free() {
        let identity = Identity {
            user: "bob".into(),
            client_id: "phone".into(),
            roles: Default::default(),
            credential: Default::default(),
            expires_at: None,
        };
        let key = SessionKey { user: "bob".into(), client_id: "phone".into() };
        let mailbox = Arc::new(crate::mailbox::Mailbox::new(crate::queues::tests::queues()));
        let mut session = Session::new(key, Receiver::new(mailbox, Arc::new(identity), true), 0, 10);
        let resend =
            |topic: &str, position, packet_id| Resend { topic: topic.into(), position: Position(position), packet_id };
        session.resend =
            vec![resend("inbox", 1, 11), resend("sent", 2, 12), resend("inbox", 3, 13), resend("inbox", 5, 15)];
        assert_eq!(session.take_resend("inbox", Position(3)), Some(13));
        assert_eq!(session.take_passed("inbox", Position(3)).collect::<Vec<_>>(), [11]);
        let stream = DurableStream::new(Position(0), Position(0));
        session.slots.push(Slot { topic: "inbox".into(), qos: 1, identifiers: Box::default(), stream });
        assert_eq!(session.take_unread().collect::<Vec<_>>(), [12]);
        assert_eq!(session.resend, [resend("inbox", 5, 15)]);
    }

    proptest! {
        #[test]
        fn messages_of_two_topics_come_in_one_order(steps in steps(), before in prop::collection::vec(0_usize..2, 0..20)) {
            // The topic of each committed position, from 1 on.
            let mut log = before;
            let mut wire: VecDeque<Option<u64>> = VecDeque::new();
            let mut slots: Vec<Slot> = ["inbox", "sent"]
                .map(|topic| Slot { topic: topic.into(), qos: 1, identifiers: Box::default(), stream: DurableStream::new(Position(0), Position(0)) })
                .into();
            let mut bus_seen = Position(0);
            let mut read: Option<(usize, u64, usize)> = None;
            let mut sent: Vec<u64> = Vec::new();
            let finish = [Step::Arrive, Step::BeginRead, Step::PageArrives(1_000), Step::Send(1_000)];
            let endless = std::iter::repeat_n(finish, 300).flatten();
            for step in steps.into_iter().chain(endless) {
                match step {
                    Step::Commit { topic, lost } => {
                        log.push(topic);
                        wire.push_back((!lost).then_some(log.len() as u64));
                    }
                    Step::Arrive => match wire.pop_front() {
                        Some(Some(position)) => {
                            let topic = log[usize::try_from(position).unwrap() - 1];
                            let payload = Bytes::from_static(b"x");
                            let name = Arc::clone(&slots[topic].topic);
                            let live = LiveMessage::new(name, Position(position), 0, payload, &[]);
                            slots[topic].stream.on_live(Arc::new(live));
                            bus_seen = Position(position);
                        }
                        Some(None) => slots.iter_mut().for_each(|slot| slot.stream.on_missed()),
                        None => {}
                    },
                    Step::BeginRead => {
                        for (topic, slot) in slots.iter_mut().enumerate() {
                            if read.is_none()
                                && let Some(after) = slot.stream.begin_read(Position(log.len() as u64))
                            {
                                // The read sees what was committed when it began.
                                read = Some((topic, after.0, log.len()));
                            }
                        }
                    }
                    Step::PageArrives(most) => {
                        if let Some((topic, after, seen)) = read.take() {
                            let mut rest = (1_u64..).zip(&log[..seen]).filter(|(at, of)| **of == topic && *at > after);
                            let deliveries = rest
                                .by_ref()
                                .take(most)
                                .map(|(at, _)| Delivery {
                                    position: Position(at),
                                    topic: None,
                                    payload: Bytes::from_static(b"x"),
                                    properties: Arc::new([]),
                                })
                                .collect();
                            let end = rest.next().is_none();
                            slots[topic].stream.on_page(Page { deliveries, end });
                        }
                    }
                    Step::Send(most) => {
                        for _ in 0..most {
                            let Some(index) = next_slot(&mut slots, bus_seen) else { break };
                            sent.push(slots[index].stream.next().unwrap().position().0);
                        }
                        prop_assert_eq!(&sent, &(1..=sent.len() as u64).collect::<Vec<_>>());
                    }
                }
            }
            prop_assert_eq!(sent.len(), log.len());
        }
    }
}
