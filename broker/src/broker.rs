//! The broker: what its connections share, and the way of a message between them.
//!
//! Two buses, two routers: one carries what the service announces on bound topics, the other the ordinary messages. Both end in the
//! mailboxes of the connections that want them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::absent::{Absent, AbsentSession, DelayedWill, Due};
use crate::admission::{Admission, Place};
use crate::bus::{Bus, BusCounters, BusError, BusMessage, BusOptions, BusSink, Frame};
use crate::connection::Connection;
use crate::engine::Will;
use crate::escaped::Escaped;
use crate::limits::Limits;
use crate::live::LiveMessage;
use crate::mailbox::Mailbox;
use crate::ordinary::{Matched, Receiver, Subscriptions};
use crate::queues::{QueueLimits, Queues};
use crate::rate::Pacing;
use crate::registry::{ConnectionNumber, Registry};
use crate::service::{
    Identity, Observation, Peer, PublishRoute, Refusal, RefusalCode, Service, ServiceError, SessionKey, SessionRecord,
    ShownCertificate, StoredSession, SubscribeRoute, SubscriptionRecord,
};
use crate::session::{Queued, UnderWay};
use crate::sparing::{CLOSED, WILLS};
use crate::topics::filter::{self, TopicError};
use crate::topics::message::{Message, MessageProperties};
use crate::topics::retained::{Retained, RetainedFull, RetainedLimits, RetainedMessage};
use crate::turns::Turns;

/// The one topic under which messages cross their router: rumqttd never forgets a topic it has seen, and clients choose some of theirs.
const LIVE_BUS_TOPIC: &str = "chat";
const ORDINARY_BUS_TOPIC: &str = "ordinary";
/// Absent sessions with neither subscriptions nor a will whose packets under way are remembered; those of further ones come again under
/// new packet identifiers.
const UNDER_WAY_SESSIONS_MAX: usize = 20_000;
/// Connections that read from the log at the same time. Others wait here, and not before the log, where those who write wait for their reads.
const READS_MAX: usize = 16;
/// Retained messages that are looked at together, for one subscription.
const RETAINED_LOOKS: usize = 256;

/// What connections share.
pub(crate) struct Shared<S> {
    pub(crate) service: Arc<S>,
    pub(crate) limits: Limits,
    pub(crate) pacing: Pacing,
    admission: Admission,
    pub(crate) registry: Registry,
    pub(crate) subscriptions: Subscriptions,
    pub(crate) retained: Mutex<Retained>,
    /// In memory: after a restart a message may come again under another packet identifier.
    pub(crate) absent: Absent,
    queues: Arc<Queues>,
    ordinary_bus: OnceBus,
    live_bus: OnceBus,
    next_connection: AtomicU64,
    last_ordinary: AtomicU64,
    tasks: TaskTracker,
    permits: Arc<Semaphore>,
    /// Of those who come and go.
    pub(crate) turns: Turns,
    /// Of those who read from the log.
    pub(crate) reads: Semaphore,
    stopping: CancellationToken,
    /// How often rights have changed.
    rights: AtomicU64,
    began: Instant,
}

type OnceBus = std::sync::OnceLock<Bus>;

/// A handle on the broker; clones are the same broker.
pub struct Broker<S> {
    shared: Arc<Shared<S>>,
}

impl<S> Clone for Broker<S> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

/// How the buses fare: names and counters, with the age of the last heartbeat.
#[derive(Clone, Debug)]
pub struct BusStatus {
    /// `chat` or `ordinary`.
    pub name: &'static str,
    /// Since the last heartbeat came through.
    pub heartbeat_age: Duration,
    /// Totals.
    pub counters: BusCounters,
}

/// Hands the service's announcements to the edge. Separate from [`Broker`] so that the service can exist before the broker does.
#[derive(Clone, Default)]
pub struct Announcer {
    inner: Arc<std::sync::OnceLock<Box<dyn AnnounceTo>>>,
}

trait AnnounceTo: Send + Sync {
    fn announce(&self, frames: Vec<Frame>);
    fn has_subscribers(&self, topic: &str) -> bool;
    fn takes_answers(&self, topic: &str) -> bool;
    fn has_room(&self, bytes: usize) -> bool;
    fn is_connected(&self, user: &str) -> bool;
    fn now_us(&self, at: Instant) -> u64;
}

impl Announcer {
    /// Publishes on bound topics. What is on disk must be committed before; messages of a topic in the order of their positions.
    pub fn announce(&self, messages: Vec<LiveMessage>) {
        self.announce_encoded(messages.iter().map(LiveMessage::encode).collect());
    }

    /// The same for messages that were written by [`crate::live::encode`].
    pub fn announce_encoded(&self, messages: Vec<Frame>) {
        if let Some(inner) = self.inner.get() {
            inner.announce(messages);
        }
    }

    /// Whether any connection subscribes to this bound topic. Whoever subscribes later reads the log.
    pub fn has_subscribers(&self, topic: &str) -> bool {
        self.inner.get().is_some_and(|inner| inner.has_subscribers(topic))
    }

    /// Whether the answer to a request will have room with somebody who subscribes to this bound topic. Asked before a request is taken:
    /// answers wait in memory, and one that finds no room is lost.
    pub fn takes_answers(&self, topic: &str) -> bool {
        self.inner.get().is_none_or(|inner| inner.takes_answers(topic))
    }

    /// Whether an announcement of so many bytes is sure to reach who subscribes, and leaves room to others: for those that no log has.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.inner.get().is_none_or(|inner| inner.has_room(bytes))
    }

    /// Whether any device of this user is connected.
    pub fn is_connected(&self, user: &str) -> bool {
        self.inner.get().is_some_and(|inner| inner.is_connected(user))
    }

    /// Microseconds since the process began, never 0: for [`LiveMessage::received_us`].
    pub fn micros(&self, at: Instant) -> u64 {
        self.inner.get().map_or(0, |inner| inner.now_us(at))
    }
}

impl<S: Service> AnnounceTo for Arc<Shared<S>> {
    fn announce(&self, frames: Vec<Frame>) {
        if let Some(bus) = self.live_bus.get() {
            bus.publish(LIVE_BUS_TOPIC, frames);
        }
    }

    fn has_subscribers(&self, topic: &str) -> bool {
        self.registry.has_subscribers(topic)
    }

    fn takes_answers(&self, topic: &str) -> bool {
        self.registry.takes_answers(topic)
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.live_bus.get().is_none_or(|bus| bus.has_room(bytes))
    }

    fn is_connected(&self, user: &str) -> bool {
        self.registry.is_connected(user)
    }

    fn now_us(&self, at: Instant) -> u64 {
        self.micros(at)
    }
}

struct LiveSink<S> {
    shared: Arc<Shared<S>>,
}

impl<S: Service> BusSink for LiveSink<S> {
    fn messages(&mut self, batch: &mut Vec<BusMessage>) {
        // A sender's messages to one receiver often come one behind the other: they are handed over together, under one topic.
        let mut run: Vec<Arc<LiveMessage>> = Vec::new();
        for message in batch.drain(..) {
            let before = run.last().map(|before| &before.topic);
            match LiveMessage::decode(&message.payload, before) {
                Some(live) => {
                    if before.is_some_and(|before| !Arc::ptr_eq(before, &live.topic)) {
                        self.shared.registry.deliver(&run);
                        run.clear();
                    }
                    run.push(Arc::new(live));
                }
                None => tracing::error!("a message on the chat bus was not ours"),
            }
        }
        self.shared.registry.deliver(&run);
    }

    fn gap(&mut self) {
        self.shared.registry.deliver_missed();
    }
}

struct OrdinarySink<S> {
    shared: Arc<Shared<S>>,
    matched: Matched,
}

impl<S: Service> BusSink for OrdinarySink<S> {
    fn messages(&mut self, batch: &mut Vec<BusMessage>) {
        for message in batch.drain(..) {
            match Message::decode(message.payload) {
                Ok(message) => {
                    self.shared.subscriptions.deliver(&Arc::new(message), &*self.shared.service, &mut self.matched);
                }
                Err(error) => tracing::error!(%error, "a message on the ordinary bus was not ours"),
            }
        }
    }

    fn gap(&mut self) {
        // Ordinary messages have no log. QoS 1 publishers were told "accepted", not "delivered"; the operator is told here.
        tracing::warn!("ordinary messages were lost between publisher and subscribers");
    }
}

impl<S: Service> Broker<S> {
    /// Starts both buses. From then on `announcer` reaches this broker's connections.
    pub fn start(service: Arc<S>, announcer: &Announcer, limits: Limits) -> Result<Self, BusError> {
        let permits = Arc::new(Semaphore::new(limits.connections));
        let began = Instant::now();
        let shared = Arc::new(Shared {
            service,
            pacing: Pacing::new(&limits, began),
            admission: Admission::new(limits.connections_per_address, limits.uncounted_addresses.clone()),
            registry: Registry::new(),
            subscriptions: Subscriptions::new(limits.filters_per_user, limits.subscriptions_per_user),
            retained: Mutex::new(Retained::new(RetainedLimits {
                messages: limits.retained_messages,
                bytes: limits.retained_bytes,
                user_messages: if limits.user_retained_messages == 0 {
                    usize::MAX
                } else {
                    limits.user_retained_messages
                },
                user_bytes: if limits.user_retained_bytes == 0 { usize::MAX } else { limits.user_retained_bytes },
            })),
            absent: Absent::default(),
            queues: Queues::new(QueueLimits {
                session_messages: limits.queue_messages,
                session_bytes: limits.queue_bytes,
                user_bytes: if limits.user_queues_bytes == 0 { usize::MAX } else { limits.user_queues_bytes },
                all_bytes: limits.queues_bytes,
            }),
            ordinary_bus: OnceBus::new(),
            live_bus: OnceBus::new(),
            next_connection: AtomicU64::new(1),
            last_ordinary: AtomicU64::new(0),
            tasks: TaskTracker::new(),
            permits,
            turns: Turns::default(),
            reads: Semaphore::new(READS_MAX),
            stopping: CancellationToken::new(),
            rights: AtomicU64::new(0),
            began,
            limits,
        });
        let live = Bus::start(
            BusOptions { filters: vec![LIVE_BUS_TOPIC.to_owned()], ..BusOptions::new("chat") },
            LiveSink { shared: Arc::clone(&shared) },
        )?;
        let ordinary = Bus::start(
            BusOptions { filters: vec![ORDINARY_BUS_TOPIC.to_owned()], ..BusOptions::new("ordinary") },
            OrdinarySink { shared: Arc::clone(&shared), matched: Vec::new() },
        )?;
        // Both cells are fresh: nobody else has set them.
        shared.live_bus.get_or_init(|| live);
        shared.ordinary_bus.get_or_init(|| ordinary);
        announcer.inner.get_or_init(|| {
            let announce_to: Box<dyn AnnounceTo> = Box::new(Arc::clone(&shared));
            announce_to
        });
        Ok(Self { shared })
    }

    /// Takes up the sessions that the service has stored: messages wait for them from now on. Before clients are let in.
    ///
    /// # Errors
    /// The service cannot tell them.
    pub async fn resume_sessions(&self) -> Result<(), ServiceError> {
        for StoredSession { identity, record, expires_in } in self.shared.service.stored_sessions().await? {
            self.shared.park_stored(identity, record, expires_in);
        }
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move {
            let stopping = shared.stopping.clone();
            stopping.run_until_cancelled(shared.attend_absent()).await.unwrap_or(());
        });
        Ok(())
    }

    /// A place for a connection from there, before anything is read from it; `None` if there are too many already.
    pub fn admit(&self, address: SocketAddr) -> Option<Place> {
        let admitted = self.shared.admission.admit(address.ip());
        if let Err(reason) = admitted {
            // Somebody who floods must not fill the log as well.
            tracing::debug!(peer = %address, %reason, "refused a connection");
            self.shared.service.observe(Observation::Limited("connections_per_address"));
        }
        admitted.ok()
    }

    /// Who may connect, for listeners of others whose connections count too.
    pub fn admission(&self) -> Admission {
        self.shared.admission.clone()
    }

    /// In which order those are served who come, for listeners of others whose handshakes take time too.
    pub fn turns(&self) -> Turns {
        self.shared.turns.clone()
    }

    /// Serves one byte stream until it ends. Returns at once; the connection has a task of its own.
    pub fn serve<T>(&self, io: T, peer: Peer)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Ok(permit) = Arc::clone(&self.shared.permits).try_acquire_owned() else {
            self.shared.service.observe(Observation::Limited("connections"));
            warn_no_room(&peer);
            return;
        };
        self.serve_with(permit, io, peer);
    }

    fn serve_with<T>(&self, permit: OwnedSemaphorePermit, io: T, peer: Peer)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let number = ConnectionNumber(self.shared.next_connection.fetch_add(1, Ordering::Relaxed));
        let (shared, address) = (Arc::clone(&self.shared), peer.address);
        // On the heap, and before there is a task: that would have room for it several times over.
        let connection = Connection::new(Arc::clone(&self.shared), number, io, peer);
        self.shared.tasks.spawn(async move {
            let live = std::panic::AssertUnwindSafe(connection.live());
            if live.catch_unwind().await.is_err() {
                shared.service.observe(Observation::Panicked);
                let peer = Peer { address, certificate: None };
                tracing::error!(%peer, "a connection's task panicked; the connection is closed, please report this");
            }
            drop(permit);
        });
    }

    /// Serves a byte stream that has to be opened first, as after a TLS handshake. That counts as a connection from now on; it bounds itself how long
    /// it takes. The time for CONNECT begins when it is done.
    pub fn serve_opened<T>(
        &self,
        address: SocketAddr,
        opening: impl Future<Output = io::Result<(T, Option<ShownCertificate>)>> + Send + 'static,
    ) where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Some(place) = self.admit(address) else { return };
        let Ok(permit) = Arc::clone(&self.shared.permits).try_acquire_owned() else {
            self.shared.service.observe(Observation::Limited("connections"));
            warn_no_room(&address);
            return;
        };
        let broker = self.clone();
        self.shared.tasks.spawn(async move {
            match broker.shared.turns.take(Box::pin(opening)).await {
                Ok((io, certificate)) => {
                    broker.serve_with(permit, place.hold(io), Peer { address: Some(address), certificate });
                }
                Err(error) => {
                    if error.kind() == io::ErrorKind::TimedOut {
                        broker.shared.service.observe(Observation::Limited("tls_timeout_ms"));
                    }
                    tracing::debug!(peer = %address, %error, "a connection could not be opened");
                }
            }
        });
    }

    /// Publishes an ordinary message of the server's own, at QoS 0. No client can publish a topic that begins with `$`, so those are the server's.
    ///
    /// # Errors
    /// There is no room for another retained message.
    pub fn publish(&self, topic: Arc<str>, payload: Bytes, retain: bool) -> Result<(), RetainedFull> {
        let properties = MessageProperties::default();
        let message = Message { topic, payload, qos: 0, retain, publisher: 0, number: 0, properties };
        self.shared.publish_ordinary(message, None)
    }

    /// How many retained messages there are, the server's own among them.
    pub fn retained_messages(&self) -> usize {
        self.shared.retained.lock().len()
    }

    /// Rights have changed: every session is looked at again (see [`Service::recheck`]).
    pub fn rights_changed(&self) {
        // A connection that just ends is with neither, and looks at this when it gives back its session.
        self.shared.rights.fetch_add(1, Ordering::AcqRel);
        self.shared.registry.recheck();
        for (number, filters) in self.shared.absent.recheck(&*self.shared.service) {
            self.shared.subscriptions.unsubscribe(filters.iter().map(String::as_str), number);
        }
    }

    /// How many entries each map of the edge has, by its name: what is there only while clients are must go with them.
    pub fn sizes(&self) -> Vec<(&'static str, usize)> {
        let shared = &self.shared;
        let mut sizes = shared.registry.sizes().to_vec();
        sizes.extend(shared.subscriptions.sizes());
        {
            let retained = shared.retained.lock();
            sizes.extend([("retained", retained.len()), ("retained_bytes", retained.bytes())]);
        }
        let (queue_bytes, live_queue_bytes) = shared.queues.bytes();
        sizes.extend([("queue_bytes", queue_bytes), ("live_queue_bytes", live_queue_bytes)]);
        sizes.extend([("absent", shared.absent.len()), ("user_queues", shared.queues.users())]);
        sizes.push(("tasks", shared.tasks.len()));
        sizes
    }

    /// How both buses fare.
    pub fn buses(&self) -> Vec<BusStatus> {
        [("chat", &self.shared.live_bus), ("ordinary", &self.shared.ordinary_bus)]
            .into_iter()
            .filter_map(|(name, bus)| {
                let bus = bus.get()?;
                Some(BusStatus { name, heartbeat_age: bus.heartbeat_age(), counters: bus.counters() })
            })
            .collect()
    }

    /// Ends every connection (MQTT 5: DISCONNECT 0x8B), waits for them until the deadline, stops the buses.
    /// `false` if connections were still there at the deadline.
    pub async fn stop(&self, deadline: Duration) -> bool {
        self.shared.stopping.cancel();
        self.shared.registry.close();
        self.shared.tasks.close();
        let drained = tokio::time::timeout(deadline, self.shared.tasks.wait()).await.is_ok();
        for bus in [&self.shared.live_bus, &self.shared.ordinary_bus].into_iter().filter_map(|bus| bus.get()) {
            let bus = bus.clone();
            if tokio::task::spawn_blocking(move || bus.stop()).await.is_err() {
                tracing::error!("a bus did not stop cleanly");
            }
        }
        drained
    }
}

fn warn_no_room(peer: &dyn std::fmt::Display) {
    if CLOSED.may_say() {
        tracing::warn!(%peer, "refused a connection: limits.connections is reached");
    }
}

impl<S: Service> Shared<S> {
    /// Microseconds since the process began, never 0.
    pub(crate) fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX).max(1)
    }

    /// A client identifier for a client that brought none.
    pub(crate) fn assigned_client_id(&self, number: ConnectionNumber) -> Arc<str> {
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        format!("auto-{:x}-{}", since_epoch.as_micros(), number.0).into()
    }

    /// Retains and publishes an ordinary message. `source`: who must have the right to publish it for as long as it is retained.
    pub(crate) fn publish_ordinary(
        &self,
        mut message: Message,
        source: Option<Arc<Identity>>,
    ) -> Result<(), RetainedFull> {
        if message.retain {
            self.retained.lock().set(Arc::new(message.clone()), source, Instant::now())?;
        }
        // After it is retained: whoever subscribes from now on finds it there.
        message.number = self.last_ordinary.fetch_add(1, Ordering::AcqRel) + 1;
        if let Some(bus) = self.ordinary_bus.get() {
            bus.publish(ORDINARY_BUS_TOPIC, vec![Frame::from(&*message.encode())]);
        }
        Ok(())
    }

    /// The number of the last ordinary message that was taken.
    pub(crate) fn last_ordinary(&self) -> u64 {
        self.last_ordinary.load(Ordering::Acquire)
    }

    /// Whether the bus has room for another ordinary message: without it the message would be lost.
    pub(crate) fn has_room_for(&self, message_bytes: usize) -> bool {
        self.ordinary_bus.get().is_none_or(|bus| bus.has_room(message_bytes))
    }

    /// Tells whether rights have changed since it was something else.
    pub(crate) fn rights(&self) -> u64 {
        self.rights.load(Ordering::Acquire)
    }

    /// A session's connection has ended and the session goes on. `rights_seen`: when it was looked at last.
    pub(crate) fn park(&self, key: SessionKey, session: AbsentSession, rights_seen: u64) {
        let only_under_way = session.subscriptions.is_empty() && session.will.is_none() && session.expires_at.is_none();
        if !session.matters() || (only_under_way && self.absent.len() >= UNDER_WAY_SESSIONS_MAX) {
            return;
        }
        let (number, mut ended) = (session.number, Vec::new());
        let older = self.absent.put(key, session, |session| {
            if self.rights() != rights_seen {
                ended = session.recheck(&*self.service);
            }
        });
        self.subscriptions.unsubscribe(ended.iter().map(String::as_str), number);
        if let Some((number, filters)) = older {
            tracing::error!("a session was without connection twice");
            self.subscriptions.unsubscribe(filters.iter().map(String::as_str), number);
        }
    }

    fn park_stored(&self, identity: Identity, record: SessionRecord, expires_in: Option<Duration>) {
        let number = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let ordinary = |subscription: &SubscriptionRecord| {
            let filter = filter::shared(&subscription.filter).map_or(&*subscription.filter, |shared| shared.filter);
            let valid = filter::validate_topic_filter(&subscription.filter, self.limits.topic_levels).is_ok();
            valid && matches!(self.service.route_subscribe(&identity, filter), SubscribeRoute::Ordinary)
        };
        let subscriptions: Vec<SubscriptionRecord> = record.subscriptions.into_iter().filter(ordinary).collect();
        let key = SessionKey { user: Arc::clone(&identity.user), client_id: Arc::clone(&identity.client_id) };
        let receiver = Receiver::new(Arc::new(self.mailbox()), Arc::new(identity), false);
        let session = AbsentSession {
            number,
            receiver: Arc::clone(&receiver),
            subscriptions,
            under_way: UnderWay::default(),
            will: None,
            expires_at: expires_in.and_then(|left| Instant::now().checked_add(left)),
        };
        self.subscriptions.replace([], number, &session.subscriptions, number, &receiver);
        self.park(key, session, self.rights());
    }

    pub(crate) fn mailbox(&self) -> Mailbox {
        Mailbox::new(Arc::clone(&self.queues))
    }

    /// Publishes wills when their delay is over, and ends sessions that expire.
    async fn attend_absent(&self) {
        loop {
            match self.absent.due().await {
                Due::Will(identity, will) => self.publish_will(&identity, will).await,
                Due::Expired(key, session) => {
                    self.end_absent(session).await;
                    self.forget_expired(&key).await;
                }
            }
        }
    }

    /// A session without a connection is over: its will is published now, and what waited for it as a member of a group goes to another.
    pub(crate) async fn end_absent(&self, session: AbsentSession) {
        self.subscriptions.unsubscribe(session.filters(), session.number);
        let identity = session.receiver.identity();
        let waited = session.receiver.mailbox.take_ordinary().into_iter().map(Queued::Ordinary);
        self.give_to_others(session.under_way.queue.into_iter().chain(waited));
        if let Some(DelayedWill { will, .. }) = session.will {
            self.publish_will(&identity, will).await;
        }
    }

    /// What a session was given as a member of a group, and has not acknowledged. Its subscriptions have to be gone.
    pub(crate) fn give_to_others(&self, queued: impl Iterator<Item = Queued>) {
        for queued in queued {
            let ordinary = match queued {
                Queued::Ordinary(ordinary) => ordinary,
                // One that was sent with QoS 2 goes to nobody else [MQTT-4.8.2-5].
                Queued::Again(ordinary, _) if ordinary.qos < 2 => ordinary,
                _ => continue,
            };
            if let Some(group) = &ordinary.share
                && ordinary.message.qos > 0
            {
                self.subscriptions.deliver_again(group, &ordinary.message, ordinary.since, &*self.service);
            }
        }
    }

    /// Removes an expired session from the store, unless its client is back.
    async fn forget_expired(&self, key: &SessionKey) {
        let number = ConnectionNumber(self.next_connection.fetch_add(1, Ordering::Relaxed));
        let mailbox = Arc::new(self.mailbox());
        // Whoever connects meanwhile waits until it is done.
        if !self.registry.hold(key, number, &mailbox) {
            return;
        }
        if let Err(error) = self.service.forget_expired(key).await {
            tracing::warn!(%error, "an expired session could not be removed");
        }
        self.registry.let_go(key, number);
        mailbox.settle();
    }

    /// A refusal of our own, in the service's form.
    pub(crate) fn refusal(&self, code: RefusalCode, sentence: &str) -> Refusal {
        Refusal { code, reason: self.service.reason(code, sentence) }
    }

    pub(crate) fn judge_topic_bytes(&self, topic: &str, code: RefusalCode) -> Result<(), Refusal> {
        let max = self.limits.topic_bytes;
        if max == 0 || topic.len() <= max {
            return Ok(());
        }
        self.service.observe(Observation::Limited("topic_bytes"));
        Err(self.refusal(code, &format!("a topic has at most {max} bytes here")))
    }

    /// A topic name or filter that cannot be one.
    pub(crate) fn refuse_topic(&self, code: RefusalCode, error: TopicError) -> Refusal {
        if matches!(error, TopicError::TooManyLevels { .. }) {
            self.service.observe(Observation::Limited("topic_levels"));
        }
        self.refusal(code, &error.to_string())
    }

    /// Where a publish goes, a will too; wildcards, `$` topics and unreasonable names go nowhere. Whoever answers to a response topic does so
    /// with rights of their own: it has to be one that the publisher may listen to.
    pub(crate) fn route(
        &self,
        who: &Identity,
        topic: &str,
        response_topic: Option<&str>,
    ) -> Result<PublishRoute, Refusal> {
        self.judge_topic_bytes(topic, RefusalCode::TopicNameInvalid)?;
        filter::validate_topic_name(topic, self.limits.topic_levels)
            .map_err(|error| self.refuse_topic(RefusalCode::TopicNameInvalid, error))?;
        if topic.starts_with('$') {
            return Err(self.refusal(RefusalCode::NotAuthorized, "topics that begin with $ belong to the server"));
        }
        match self.service.route_publish(who, topic) {
            PublishRoute::Refused(refusal) => Err(refusal),
            PublishRoute::Ordinary => {
                response_topic.map_or(Ok(()), |topic| self.judge_response_topic(who, topic))?;
                Ok(PublishRoute::Ordinary)
            }
            PublishRoute::Bound => Ok(PublishRoute::Bound),
        }
    }

    fn judge_response_topic(&self, who: &Identity, topic: &str) -> Result<(), Refusal> {
        filter::validate_topic_name(topic, self.limits.topic_levels)
            .map_err(|error| self.refusal(RefusalCode::TopicNameInvalid, &format!("the response topic: {error}")))?;
        match self.service.route_subscribe(who, topic) {
            SubscribeRoute::Refused(refusal) => Err(refusal),
            SubscribeRoute::Bound(_) | SubscribeRoute::Ordinary => Ok(()),
        }
    }

    /// Publishes a will, if whose it is may still do so.
    pub(crate) async fn publish_will(&self, identity: &Arc<Identity>, will: Will) {
        match self.route(identity, &will.topic, will.properties.response_topic.as_deref()) {
            Ok(PublishRoute::Bound) => {
                let mut publishes = vec![will.as_publish(identity)];
                let mut place = None;
                while let Err(unsent) = self.service.submit(publishes, place) {
                    publishes = unsent;
                    place = self.service.place().await;
                }
            }
            Ok(_) => {
                let message = Message {
                    topic: will.topic.as_str().into(),
                    payload: will.payload,
                    qos: will.qos,
                    retain: will.retain,
                    publisher: 0,
                    number: 0,
                    properties: will.properties,
                };
                if let Err(full) = self.publish_ordinary(message, Some(Arc::clone(identity)))
                    && WILLS.may_say()
                {
                    tracing::warn!(reason = %full, "a will was not published");
                }
            }
            Err(refusal) if WILLS.may_say() => {
                tracing::warn!(reason = %Escaped(&refusal.reason), "a will was not published");
            }
            Err(_) => {}
        }
    }

    /// The next retained messages that a filter matches and this receiver may see, if those who published them still may; and behind which
    /// topic to look on.
    pub(crate) fn retained_for(
        &self,
        who: &Identity,
        filter: &str,
        after: Option<&str>,
    ) -> (Vec<RetainedMessage>, Option<Arc<str>>) {
        let (mut found, after) = self.retained.lock().matching_after(filter, after, RETAINED_LOOKS, Instant::now());
        found.retain(|retained| {
            let topic = &retained.message.topic;
            let may_stand = |source: &Arc<Identity>| self.service.may_stand(source, topic);
            self.service.may_receive(who, topic) && retained.source.as_ref().is_none_or(may_stand)
        });
        (found, after)
    }
}
