//! The broker: what its connections share, and the way of a message between them.
//!
//! Two buses, two routers: one carries what the service announces on bound topics, the other the ordinary messages. Both end in the
//! mailboxes of the connections that want them.

use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use crate::bus::{Bus, BusCounters, BusError, BusMessage, BusOptions, BusSink};
use crate::connection;
use crate::limits::Limits;
use crate::live::LiveMessage;
use crate::mailbox::{Mailbox, Ordinary};
use crate::registry::{ConnectionNumber, Registry};
use crate::service::{Observation, Peer, Service, SessionKey};
use crate::session::Resend;
use crate::topics::message::{Message, MessageProperties};
use crate::topics::retained::{Retained, RetainedFull};
use crate::topics::trie::SubscriptionTrie;

/// The one topic under which messages cross their router: rumqttd never forgets a topic it has seen, and clients choose some of theirs.
const LIVE_BUS_TOPIC: &str = "chat";
const ORDINARY_BUS_TOPIC: &str = "ordinary";
/// Absent sessions whose packets under way are remembered; those of further ones come again under new packet identifiers.
const UNDER_WAY_SESSIONS_MAX: usize = 20_000;

/// Packets that were under way when a session's connection ended.
#[derive(Debug, Default)]
pub(crate) struct UnderWay {
    /// QoS 2 publishes of the client that got PUBREC and were not released: they must not be taken twice.
    pub(crate) received: HashSet<u16>,
    /// Deliveries that were not acknowledged.
    pub(crate) resend: Vec<Resend>,
}

/// How one session subscribes to an ordinary filter.
#[derive(Clone, Debug)]
pub(crate) struct OrdinarySubscription {
    pub(crate) qos: u8,
    pub(crate) no_local: bool,
    pub(crate) retain_as_published: bool,
    pub(crate) mailbox: Arc<Mailbox>,
}

pub(crate) type OrdinaryTrie = SubscriptionTrie<u64, OrdinarySubscription>;

/// What connections share.
pub(crate) struct Shared<S> {
    pub(crate) service: Arc<S>,
    pub(crate) limits: Limits,
    pub(crate) registry: Registry,
    pub(crate) ordinary: RwLock<OrdinaryTrie>,
    pub(crate) retained: Mutex<Retained>,
    /// What absent sessions had under way. Kept in memory: after a restart a message may come again under another packet identifier.
    pub(crate) under_way: Mutex<FxHashMap<SessionKey, UnderWay>>,
    ordinary_bus: OnceBus,
    live_bus: OnceBus,
    next_connection: AtomicU64,
    tasks: TaskTracker,
    permits: Arc<Semaphore>,
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
    fn announce(&self, messages: Vec<LiveMessage>);
    fn has_subscribers(&self, topic: &str) -> bool;
    fn is_connected(&self, user: &str) -> bool;
    fn now_us(&self, at: Instant) -> u64;
}

impl Announcer {
    /// Publishes on bound topics. What is on disk must be committed before; messages of a topic in the order of their positions.
    pub fn announce(&self, messages: Vec<LiveMessage>) {
        if let Some(inner) = self.inner.get() {
            inner.announce(messages);
        }
    }

    /// Whether any connection subscribes to this bound topic. Whoever subscribes later reads the log.
    pub fn has_subscribers(&self, topic: &str) -> bool {
        self.inner.get().is_some_and(|inner| inner.has_subscribers(topic))
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
    fn announce(&self, messages: Vec<LiveMessage>) {
        let Some(bus) = self.live_bus.get() else { return };
        let topic: Arc<str> = Arc::from(LIVE_BUS_TOPIC);
        let carried =
            messages.iter().map(|message| BusMessage { topic: Arc::clone(&topic), payload: message.encode() });
        bus.publish(carried.collect());
    }

    fn has_subscribers(&self, topic: &str) -> bool {
        self.registry.has_subscribers(topic)
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
        for message in batch.drain(..) {
            match LiveMessage::decode(&message.payload) {
                Some(live) => self.shared.registry.deliver(&Arc::new(live)),
                None => tracing::error!("a message on the chat bus was not ours"),
            }
        }
    }

    fn gap(&mut self) {
        self.shared.registry.deliver_missed();
    }
}

struct OrdinarySink<S> {
    shared: Arc<Shared<S>>,
    matched: Vec<(u64, OrdinarySubscription)>,
}

impl<S: Service> BusSink for OrdinarySink<S> {
    fn messages(&mut self, batch: &mut Vec<BusMessage>) {
        for message in batch.drain(..) {
            match Message::decode(message.payload) {
                Ok(message) => self.deliver(Arc::new(message)),
                Err(error) => tracing::error!(%error, "a message on the ordinary bus was not ours"),
            }
        }
    }

    fn gap(&mut self) {
        // Ordinary messages have no log. QoS 1 publishers were told "accepted", not "delivered"; the operator is told here.
        tracing::warn!("ordinary messages were lost between publisher and subscribers");
    }
}

impl<S: Service> OrdinarySink<S> {
    fn deliver(&mut self, message: Arc<Message>) {
        let matched = &mut self.matched;
        matched.clear();
        self.shared.ordinary.read().matching(
            &message.topic,
            &mut |number: &u64, subscription: &OrdinarySubscription| {
                if !(subscription.no_local && *number == message.publisher) {
                    matched.push((*number, subscription.clone()));
                }
            },
        );
        // Overlapping filters of one session deliver once, at the highest QoS [MQTT-3.3.4-2].
        matched.sort_unstable_by_key(|(number, subscription)| (*number, std::cmp::Reverse(subscription.qos)));
        matched.dedup_by_key(|(number, _)| *number);
        for (_, subscription) in matched.drain(..) {
            let delivered = subscription.mailbox.push_ordinary(Ordinary {
                qos: subscription.qos.min(message.qos),
                retain: subscription.retain_as_published && message.retain,
                message: Arc::clone(&message),
            });
            if !delivered {
                self.shared.service.observe(Observation::QueueFull);
            }
        }
    }
}

impl<S: Service> Broker<S> {
    /// Starts both buses. From then on `announcer` reaches this broker's connections.
    pub fn start(service: Arc<S>, announcer: &Announcer, limits: Limits) -> Result<Self, BusError> {
        let permits = Arc::new(Semaphore::new(limits.connections));
        let shared = Arc::new(Shared {
            service,
            registry: Registry::new(),
            ordinary: RwLock::new(SubscriptionTrie::new()),
            retained: Mutex::new(Retained::new(limits.retained_messages, limits.retained_bytes)),
            under_way: Mutex::new(FxHashMap::default()),
            ordinary_bus: OnceBus::new(),
            live_bus: OnceBus::new(),
            next_connection: AtomicU64::new(1),
            tasks: TaskTracker::new(),
            permits,
            began: Instant::now(),
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

    /// Serves one byte stream until it ends. Returns at once; the connection has a task of its own.
    pub fn serve<T>(&self, io: T, peer: Peer)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Ok(permit) = Arc::clone(&self.shared.permits).try_acquire_owned() else {
            tracing::warn!(%peer, "refused a connection: limits.connections is reached");
            return;
        };
        self.serve_with(permit, io, peer);
    }

    fn serve_with<T>(&self, permit: OwnedSemaphorePermit, io: T, peer: Peer)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let number = ConnectionNumber(self.shared.next_connection.fetch_add(1, Ordering::Relaxed));
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move {
            let service = Arc::clone(&shared.service);
            let run = std::panic::AssertUnwindSafe(connection::run(shared, number, io, peer.clone()));
            if run.catch_unwind().await.is_err() {
                service.observe(Observation::Panicked);
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
        opening: impl Future<Output = io::Result<(T, Option<Arc<str>>)>> + Send + 'static,
    ) where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Ok(permit) = Arc::clone(&self.shared.permits).try_acquire_owned() else {
            tracing::warn!(peer = %address, "refused a connection: limits.connections is reached");
            return;
        };
        let broker = self.clone();
        self.shared.tasks.spawn(async move {
            match opening.await {
                Ok((io, certificate_name)) => {
                    broker.serve_with(permit, io, Peer { address: Some(address), certificate_name });
                }
                Err(error) => tracing::debug!(peer = %address, %error, "a connection could not be opened"),
            }
        });
    }

    /// Publishes an ordinary message of the server's own, at QoS 0. No client can publish a topic that begins with `$`, so those are the server's.
    ///
    /// # Errors
    /// There is no room for another retained message.
    pub fn publish(&self, topic: Arc<str>, payload: Bytes, retain: bool) -> Result<(), RetainedFull> {
        let properties = MessageProperties::default();
        self.shared.publish_ordinary(Message { topic, payload, qos: 0, retain, publisher: 0, properties })
    }

    /// Rights have changed: every session is looked at again (see [`Service::recheck`]).
    pub fn rights_changed(&self) {
        self.shared.registry.recheck();
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

impl<S: Service> Shared<S> {
    /// Microseconds since the process began, never 0.
    pub(crate) fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX).max(1)
    }

    /// How long ago that was.
    pub(crate) fn since_micros(&self, received_us: u64) -> Duration {
        Duration::from_micros(self.micros(Instant::now()).saturating_sub(received_us))
    }

    /// A client identifier for a client that brought none.
    pub(crate) fn assigned_client_id(&self, number: ConnectionNumber) -> Arc<str> {
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        format!("auto-{:x}-{}", since_epoch.as_micros(), number.0).into()
    }

    /// Retains and publishes an ordinary message.
    pub(crate) fn publish_ordinary(&self, message: Message) -> Result<(), RetainedFull> {
        if message.retain {
            self.retained.lock().set(Arc::new(message.clone()))?;
        }
        if let Some(bus) = self.ordinary_bus.get() {
            bus.publish(vec![BusMessage { topic: Arc::from(ORDINARY_BUS_TOPIC), payload: message.encode() }]);
        }
        Ok(())
    }

    pub(crate) fn keep_under_way(&self, key: &SessionKey, under_way: UnderWay) {
        let mut sessions = self.under_way.lock();
        if under_way.received.is_empty() && under_way.resend.is_empty() {
            sessions.remove(key);
        } else if sessions.len() < UNDER_WAY_SESSIONS_MAX || sessions.contains_key(key) {
            sessions.insert(key.clone(), under_way);
        }
    }
}
