//! The bus: an embedded rumqttd router that carries messages from whoever publishes to one sink, in order.
//!
//! Everything of rumqttd lives in this file. A bus is one router with two links, one publishing and one reading; a thread of ours
//! reads, keeps the heartbeat and replaces the router when it is dead. Invariant: whatever reaches the sink comes in the order in
//! which it was published, each message at most once, and where one is missing the sink hears `gap()` before the one that follows.
//!
//! How that is kept: messages are numbered under the publisher's lock (eight bytes before the payload, taken off by the reader).
//! Whatever is not let in uses up its number all the same, so the reader sees every loss in the numbers, whoever lost it. A
//! heartbeat carries the latest number, so that a lost tail is seen too.
//!
//! rumqttd 0.20's oddities and what guards against them here:
//! - It keeps one log per *filter* and reads them one after the other: two filters lose the order between topics, and overlapping
//!   ones deliver twice. The reading link subscribes to `#` alone; the bus's own filters are applied before a message is let in.
//! - A topic whose first character is not ASCII panics the router's thread, one that begins with `$` is silently dropped, an
//!   empty payload erases a retained message. Such topics are refused at the door; the number makes every payload non-empty.
//! - A reader that falls behind by more than the segments is moved on silently. The publisher counts what is under way
//!   and drops before that can happen ([`BusOptions::segment_bytes`] times the segments less two).
//! - It notes every distinct topic for ever, in two maps (measured: 280 bytes for one of 21). Replacing the router is the only way
//!   to make it forget. So publish under few topics, and none that a client chooses: the broker uses one for each bus.
//! - A stale `ready` panics, a stale number disconnects a stranger: only the reading thread calls `ready`, links live as long as
//!   their router, client identifiers come from a process-wide counter and are never used again.
//! - Its log keeps what was read until newer messages push it out, and it counts bytes, so the smaller messages are the more memory they take: 300
//!   bytes each besides. An idle bus would be full of heartbeats after three days. So the log of a bus on which little happens is emptied: by
//!   heartbeats that are as long as a segment, all with the same bytes, which nobody ever wrote to.
//! - The router holds a sender to itself, so its thread never ends but by a panic. A stopped bus leaves it parked with its last
//!   segments; a bus is meant to live as long as the process.
//! - `LinkTx::send` blocks when 1,000 events wait. A batch is put into the link's buffer, and the router is told only if the buffer
//!   was empty: else an earlier event is still unread, and the router takes the whole buffer when it reads that. So at most
//!   a handful of events ever wait, and `try_publish` never finds the channel full.
//! - It opens tracing spans of level ERROR for every publish: with `rumqttd=warn` or `error` in the log filter a message costs 3 µs of
//!   CPU, with `rumqttd=off` 1.3. Set it to off: what matters is logged here.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use parking_lot::Mutex;
use rumqttd::local::{LinkBuilder, LinkError, LinkRx, LinkTx};
use rumqttd::protocol::{Disconnect, DisconnectReasonCode, Packet, Publish};
use rumqttd::{Forward, Notification, Router, RouterConfig, Strategy};

use crate::topics::filter::{self, TopicError};

/// Carries the latest number. Nobody else may publish on it.
const HEARTBEAT_TOPIC: &str = "bus/heartbeat";
/// The number before each payload.
const NUMBER_BYTES: usize = 8;
/// Messages handed to the sink at once.
const BATCH_MESSAGES_MAX: usize = 1_024;
/// Messages that rumqttd puts into the reader's buffer at once; the buffer holds up to 199 more.
const READ_MESSAGES_MAX: u64 = 1_000;
/// Two links; rumqttd reserves this many slots.
const LINKS_MAX: usize = 2;
/// The log is emptied when it may have so many messages, heartbeats among them (150 KB)...
const EMPTIED_MESSAGES_MIN: u64 = 512;
/// ...and no more than so many came between two heartbeats.
const QUIET_MESSAGES_MAX: u64 = 64;
/// Levels in a bus topic or filter.
const LEVELS_MAX: usize = 128;

/// Never used twice in a process: rumqttd mistakes who had an identifier before for who has it now.
static NEXT_ROUTER: AtomicUsize = AtomicUsize::new(0);

/// A message on the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusMessage {
    /// ASCII only, built by us; not the client's choice.
    pub topic: Arc<str>,
    /// Anything, also nothing.
    pub payload: Bytes,
}

/// Where a bus ends. Called on the bus's own thread: what it does there, every later message waits for.
pub trait BusSink: Send + 'static {
    /// Messages in the order in which they were published, at least one. May take them out of the vector.
    fn messages(&mut self, batch: &mut Vec<BusMessage>);
    /// Messages were lost (the reader fell behind, the router died and was replaced): whoever reads from this bus must read the log
    /// again. What is published after this call comes through.
    fn gap(&mut self);
}

/// How to start a bus. [`BusOptions::new`] has the defaults.
#[derive(Clone, Debug)]
pub struct BusOptions {
    /// For logs, the thread and client identifiers: no `+`, `$`, `#` or `/`.
    pub name: &'static str,
    /// What the sink wants. Messages on other topics are refused.
    pub filters: Vec<String>,
    /// From one heartbeat to the next.
    pub heartbeat_interval: Duration,
    /// Without any answer for so long (counted in unanswered heartbeats), the router is taken for dead and replaced.
    pub heartbeat_timeout: Duration,
    /// Size of a log segment in rumqttd, at least 1 KiB. The log keeps read messages too, until newer ones push them out or the bus is quiet.
    pub segment_bytes: usize,
    /// Segments that rumqttd keeps, at least 3. Two less of them bound the bytes under way between `publish` and the sink.
    pub segments: usize,
    /// Bounds the messages under way between `publish` and the sink. Further ones are dropped, and the sink hears of a gap.
    pub messages_under_way_max: u64,
}

impl BusOptions {
    /// 6 segments of 1 MiB: 4 MiB and 65,536 messages may be under way, some 15 ms at the fastest measured. Full, such a router
    /// takes 15 MB of memory with messages of 1,000 bytes, 18 MB with 250, 29 MB with 60: about 300 bytes are rumqttd's own for each. They are
    /// given back, within some seconds, when there is next to nothing to carry.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            filters: Vec::new(),
            heartbeat_interval: Duration::from_secs(1),
            heartbeat_timeout: Duration::from_secs(5),
            segment_bytes: 1024 * 1024,
            segments: 6,
            messages_under_way_max: 65_536,
        }
    }

    fn bytes_under_way_max(&self) -> u64 {
        // One segment is dropped as soon as a new one begins; another is left to heartbeats and to the last message's excess.
        u64::try_from(self.segments.saturating_sub(2).saturating_mul(self.segment_bytes)).unwrap_or(u64::MAX)
    }
}

/// Why a bus did not start.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// One of [`BusOptions::filters`] is no topic filter.
    #[error("bus filter {filter:?}: {source}")]
    Filter {
        /// The filter as given.
        filter: String,
        /// What is wrong with it.
        source: TopicError,
    },
    /// A capacity is too small to work with.
    #[error("a bus needs at least 3 segments of 1 KiB and room for one message")]
    Capacity,
    /// rumqttd could not start its thread, or panicked while it tried.
    #[error("the router did not start")]
    Router,
    /// The router refused a link, or ended.
    #[error("the router refused a link: {0}")]
    Link(Box<LinkError>),
    /// The first heartbeat did not come back in time.
    #[error("the router did not answer")]
    NoAnswer,
    /// The operating system refused a thread.
    #[error("no thread for the bus: {0}")]
    Thread(#[from] std::io::Error),
}

impl From<LinkError> for BusError {
    fn from(error: LinkError) -> Self {
        // 800 bytes: it may hold a whole event.
        Self::Link(Box::new(error))
    }
}

/// Totals since the bus started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusCounters {
    /// Messages let in.
    pub published: u64,
    /// Messages handed to the sink.
    pub delivered: u64,
    /// Messages not let in because too many were under way or the router was dead. The sink hears of a gap.
    pub dropped: u64,
    /// Messages with a topic that may not reach the router or that no filter matches: a mistake in our own code.
    pub refused: u64,
    /// Calls of [`BusSink::gap`].
    pub gaps: u64,
    /// Routers that were replaced.
    pub restarts: u64,
}

#[derive(Default)]
struct Counters {
    published: AtomicU64,
    delivered: AtomicU64,
    dropped: AtomicU64,
    refused: AtomicU64,
    gaps: AtomicU64,
    restarts: AtomicU64,
}

/// A handle on a bus; clones are the same bus. When the last one is gone, the bus stops.
#[derive(Clone)]
pub struct Bus {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the handles and the reading thread share.
struct Shared {
    options: BusOptions,
    publisher: Mutex<Publisher>,
    /// Zeros that are a segment long. They were never written to, so they take no memory.
    segment: Bytes,
    /// Of those let in to this router, handed to the sink. Written by the reading thread only.
    read_messages: AtomicU64,
    read_bytes: AtomicU64,
    counters: Counters,
    began: Instant,
    /// Since `began`.
    heartbeat_us: AtomicU64,
    stopping: AtomicBool,
}

struct Publisher {
    /// `None` while the router is being replaced, and after the end.
    link: Option<LinkTx>,
    last_number: u64,
    /// Let in to this router.
    let_in_messages: u64,
    let_in_bytes: u64,
    dropping: bool,
    emptying: Emptying,
}

/// How far the log is from being empty. Counted for one router.
#[derive(Debug, Default)]
struct Emptying {
    /// What the log may have, at most.
    kept_messages: u64,
    /// At the last heartbeat.
    let_in_messages: u64,
    /// Heartbeats of a segment's length that are still to be sent.
    segments_left: usize,
}

impl Emptying {
    /// Once for each heartbeat: whether it is to be one that pushes a segment out.
    fn pushes_out(&mut self, let_in_messages: u64, under_way: u64, segments: usize) -> bool {
        let came = let_in_messages.saturating_sub(std::mem::replace(&mut self.let_in_messages, let_in_messages));
        self.kept_messages = self.kept_messages.saturating_add(came).saturating_add(1);
        if under_way != 0 || came > QUIET_MESSAGES_MAX {
            return false;
        }
        if self.segments_left == 0 {
            if self.kept_messages < EMPTIED_MESSAGES_MIN {
                return false;
            }
            // One more ends the segment that others are still in. What comes in between is counted for the next time.
            self.segments_left = segments + 1;
            self.kept_messages = 0;
        }
        self.segments_left -= 1;
        true
    }
}

/// A payload that leaves room for its number, so that it is written once.
#[derive(Debug)]
pub struct Frame {
    payload: Vec<u8>,
}

impl Frame {
    /// With room for a payload of so many bytes, which grows if that is not enough.
    pub fn with_capacity(payload_bytes: usize) -> Self {
        let mut payload = Vec::with_capacity(NUMBER_BYTES + payload_bytes);
        payload.extend_from_slice(&[0; NUMBER_BYTES]);
        Self { payload }
    }

    /// Where the payload is written: what is there already stays.
    pub fn payload(&mut self) -> &mut Vec<u8> {
        &mut self.payload
    }

    #[cfg(test)]
    pub(crate) fn into_payload(self) -> Bytes {
        Bytes::from(self.payload).slice(NUMBER_BYTES..)
    }

    fn numbered(mut self, number: u64) -> Bytes {
        if let Some(prefix) = self.payload.first_chunk_mut::<NUMBER_BYTES>() {
            *prefix = number.to_be_bytes();
        }
        self.payload.into()
    }
}

impl From<&[u8]> for Frame {
    fn from(payload: &[u8]) -> Self {
        let mut frame = Self::with_capacity(payload.len());
        frame.payload.extend_from_slice(payload);
        frame
    }
}

fn kept_bytes(topic: &[u8], payload_bytes: usize) -> u64 {
    u64::try_from(topic.len() + payload_bytes + 4).unwrap_or(u64::MAX)
}

impl Bus {
    /// Starts a router and the thread that feeds `sink`. When this returns, the subscription is active: a heartbeat came through.
    /// Blocks for a few milliseconds.
    pub fn start(options: BusOptions, sink: impl BusSink) -> Result<Self, BusError> {
        for filter in &options.filters {
            filter::validate_topic_filter(filter, LEVELS_MAX)
                .map_err(|source| BusError::Filter { filter: filter.clone(), source })?;
        }
        if options.segments < 3 || options.segment_bytes < 1024 || options.messages_under_way_max == 0 {
            return Err(BusError::Capacity);
        }
        let router = OpenRouter::open(&options)?;
        let name = format!("bus-{}", options.name);
        let segment = Bytes::from(vec![0; options.segment_bytes]);
        let shared = Arc::new(Shared {
            options,
            publisher: Mutex::new(Publisher {
                link: Some(router.publishing),
                last_number: 0,
                let_in_messages: 0,
                let_in_bytes: 0,
                dropping: false,
                emptying: Emptying::default(),
            }),
            segment,
            read_messages: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            counters: Counters::default(),
            began: Instant::now(),
            heartbeat_us: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        });
        let reader = Reader {
            shared: Arc::clone(&shared),
            sink,
            link: router.reading,
            link_tx: router.reading_tx,
            expected: 1,
            unanswered: 0,
            batch: Vec::with_capacity(BATCH_MESSAGES_MAX),
            batch_bytes: 0,
            topic: Arc::from(""),
        };
        let thread = std::thread::Builder::new().name(name).spawn(move || reader.run())?;
        Ok(Self { handle: Arc::new(Handle { shared, thread: Mutex::new(Some(thread)) }) })
    }

    /// Queues a batch and wakes the router once. Never waits on a slow reader: what goes over the bounds of [`BusOptions`] is dropped,
    /// and the sink hears of a gap. A topic that may not reach the router is refused, and all of the batch with it.
    pub fn publish(&self, topic: &'static str, frames: Vec<Frame>) {
        let shared = &self.handle.shared;
        if frames.is_empty() {
            return;
        }
        if shared.admits(topic) {
            shared.publish(&Bytes::from_static(topic.as_bytes()), frames);
        } else {
            shared.refuse(topic, u64::try_from(frames.len()).unwrap_or(u64::MAX));
        }
    }

    /// Whether a message of so many bytes is sure to be let in, if only a few others come at the same moment: half of the bounds are left to those.
    pub fn has_room(&self, message_bytes: usize) -> bool {
        let shared = &self.handle.shared;
        let publisher = shared.publisher.lock();
        if publisher.link.is_none() {
            return false;
        }
        let messages = publisher.let_in_messages.saturating_sub(shared.read_messages.load(Ordering::Acquire));
        let bytes = publisher.let_in_bytes.saturating_sub(shared.read_bytes.load(Ordering::Acquire));
        let message_bytes = u64::try_from(message_bytes).unwrap_or(u64::MAX);
        messages < shared.options.messages_under_way_max / 2
            && (messages == 0 || bytes.saturating_add(message_bytes) <= shared.options.bytes_under_way_max() / 2)
    }

    /// How long ago the last heartbeat came through. Grows while the sink is busy, too.
    pub fn heartbeat_age(&self) -> Duration {
        let shared = &self.handle.shared;
        let heartbeat = Duration::from_micros(shared.heartbeat_us.load(Ordering::Relaxed));
        shared.began.elapsed().saturating_sub(heartbeat)
    }

    /// Totals so far.
    pub fn counters(&self) -> BusCounters {
        let counters = &self.handle.shared.counters;
        BusCounters {
            published: counters.published.load(Ordering::Relaxed),
            delivered: counters.delivered.load(Ordering::Relaxed),
            dropped: counters.dropped.load(Ordering::Relaxed),
            refused: counters.refused.load(Ordering::Relaxed),
            gaps: counters.gaps.load(Ordering::Relaxed),
            restarts: counters.restarts.load(Ordering::Relaxed),
        }
    }

    /// Ends the bus and waits for its thread, so for the sink. What is still under way is not delivered. A second call does nothing.
    pub fn stop(&self) {
        self.handle.begin_stop();
        let Some(thread) = self.handle.thread.lock().take() else { return };
        if thread.thread().id() == std::thread::current().id() {
            return; // The sink itself stops the bus: the thread ends when the sink returns.
        }
        if thread.join().is_err() {
            tracing::error!(bus = self.handle.shared.options.name, "the thread of the bus had panicked");
        }
    }

    /// Publishes messages of any topics, one run of the same topic after the other.
    #[cfg(test)]
    fn send(&self, messages: Vec<BusMessage>) {
        for run in messages.chunk_by(|one, next| one.topic == next.topic) {
            let topic = String::leak(run[0].topic.to_string());
            self.publish(topic, run.iter().map(|message| Frame::from(&*message.payload)).collect());
        }
    }

    /// Breaks rumqttd's thread the way that it breaks by itself.
    #[cfg(test)]
    fn break_router(&self) {
        if let Some(link) = &mut self.handle.shared.publisher.lock().link {
            link.try_publish("é", "x").expect("the router lives");
        }
    }

    /// Makes the router silent: it lives, but nothing published reaches it any more.
    #[cfg(test)]
    fn mute_router(&self) {
        if let Some(link) = &mut self.handle.shared.publisher.lock().link {
            disconnect(link);
        }
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bus").field("name", &self.handle.shared.options.name).finish_non_exhaustive()
    }
}

impl Handle {
    fn begin_stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        // The reader wakes by a message, or from its pause while it replaces the router.
        self.shared.send_heartbeat();
        if let Some(thread) = &*self.thread.lock() {
            thread.thread().unpark();
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.begin_stop();
    }
}

impl Shared {
    fn admits(&self, topic: &str) -> bool {
        topic.is_ascii()
            && topic != HEARTBEAT_TOPIC
            && filter::validate_topic_name(topic, LEVELS_MAX).is_ok()
            && self.options.filters.iter().any(|filter| filter::matches(filter, topic))
    }

    fn refuse(&self, topic: &str, messages: u64) {
        let before = self.counters.refused.fetch_add(messages, Ordering::Relaxed);
        let refused = before + messages;
        if before == 0 || before.ilog2() < refused.ilog2() {
            tracing::error!(
                bus = self.options.name,
                topic,
                refused,
                "a topic that may not reach the router was refused"
            );
        }
        debug_assert!(topic.is_ascii() && !topic.is_empty(), "bus topics are ours, and ASCII: {topic:?}");
    }

    fn publish(&self, topic: &Bytes, frames: Vec<Frame>) {
        let frames_len = u64::try_from(frames.len()).unwrap_or(u64::MAX);
        let mut publisher = self.publisher.lock();
        let mut messages = publisher.let_in_messages.saturating_sub(self.read_messages.load(Ordering::Acquire));
        let mut bytes = publisher.let_in_bytes.saturating_sub(self.read_bytes.load(Ordering::Acquire));
        let bytes_max = self.options.bytes_under_way_max();
        let mut packets = Vec::with_capacity(frames.len());
        let (messages_before, bytes_before) = (messages, bytes);
        for frame in frames {
            publisher.last_number += 1;
            // As rumqttd counts a message for its segments.
            let frame_bytes = kept_bytes(topic, frame.payload.len());
            // A message larger than the bound passes alone: rumqttd keeps the last segment whatever its size.
            if messages >= self.options.messages_under_way_max || (bytes + frame_bytes > bytes_max && messages != 0) {
                continue;
            }
            messages += 1;
            bytes += frame_bytes;
            packets.push((topic.clone(), frame.numbered(publisher.last_number)));
        }
        let mut let_in = messages - messages_before;
        if publisher.send(packets) {
            publisher.let_in_messages += let_in;
            publisher.let_in_bytes += bytes - bytes_before;
        } else {
            let_in = 0;
        }
        let dropped = frames_len - let_in;
        if dropped != 0 && !publisher.dropping {
            tracing::warn!(
                bus = self.options.name,
                dropped,
                "the reader of the bus is behind or dead: messages are dropped"
            );
        }
        publisher.dropping = dropped != 0;
        drop(publisher);
        self.counters.published.fetch_add(let_in, Ordering::Relaxed);
        self.counters.dropped.fetch_add(dropped, Ordering::Relaxed);
    }

    fn send_heartbeat(&self) {
        let mut publisher = self.publisher.lock();
        let packet = heartbeat(publisher.last_number);
        if publisher.link.is_some() && !publisher.send(vec![packet]) {
            tracing::debug!(bus = self.options.name, "the router was dead when it should have got a heartbeat");
        }
    }

    /// A heartbeat, and what it may be used for.
    fn beat(&self) {
        self.send_heartbeat();
        let mut publisher = self.publisher.lock();
        let let_in = publisher.let_in_messages;
        let under_way = let_in.saturating_sub(self.read_messages.load(Ordering::Acquire));
        if publisher.link.is_none() || !publisher.emptying.pushes_out(let_in, under_way, self.options.segments) {
            return;
        }
        let topic = Bytes::from_static(HEARTBEAT_TOPIC.as_bytes());
        // The reader must not fall behind by it.
        publisher.let_in_bytes += kept_bytes(&topic, self.segment.len());
        if !publisher.send(vec![(topic, self.segment.clone())]) {
            tracing::debug!(bus = self.options.name, "the router was dead when its log should have been emptied");
        }
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

fn heartbeat(last_number: u64) -> (Bytes, Bytes) {
    (Bytes::from_static(HEARTBEAT_TOPIC.as_bytes()), Bytes::copy_from_slice(&last_number.to_be_bytes()))
}

impl Publisher {
    /// `false` if the router is dead; then the link is gone too, with all that waited in it.
    fn send(&mut self, mut packets: Vec<(Bytes, Bytes)>) -> bool {
        let Some(link) = &mut self.link else { return false };
        let Some(last) = packets.pop() else { return true };
        let publish = |(topic, payload): (Bytes, Bytes)| Packet::Publish(Publish::new(topic, payload, false), None);
        {
            let mut buffer = link.buffer();
            let told_already = !buffer.is_empty();
            buffer.extend(packets.into_iter().map(publish));
            if told_already {
                buffer.push_back(publish(last));
                return true;
            }
        }
        match link.try_publish(last.0, last.1) {
            Ok(_) => true,
            Err(error) => {
                // Only a dead router: the channel cannot be full, see above. Were it full, starting anew would still be right.
                tracing::debug!(%error, "the router does not take messages");
                self.link = None;
                false
            }
        }
    }
}

/// Ends a link in the only way that frees its slot.
fn disconnect(link: &mut LinkTx) {
    let disconnect = Disconnect { reason_code: DisconnectReasonCode::NormalDisconnection };
    link.buffer().push_back(Packet::Disconnect(disconnect, None));
    // What follows Disconnect is ignored; it only carries the event. A router that is dead has no slots to free.
    link.try_publish(HEARTBEAT_TOPIC, "").ok();
}

/// A router that answers, with its two links.
struct OpenRouter {
    publishing: LinkTx,
    reading: LinkRx,
    reading_tx: LinkTx,
}

impl OpenRouter {
    fn open(options: &BusOptions) -> Result<Self, BusError> {
        let number = NEXT_ROUTER.fetch_add(1, Ordering::Relaxed);
        let config = RouterConfig {
            max_connections: LINKS_MAX,
            max_outgoing_packet_count: READ_MESSAGES_MAX,
            max_segment_size: options.segment_bytes,
            max_segment_count: options.segments,
            custom_segment: None,
            initialized_filters: None,
            shared_subscriptions_strategy: Strategy::default(),
        };
        // rumqttd unwraps what the operating system says to a new thread.
        let events = catch_unwind(|| Router::new(number, config).spawn()).map_err(|_panic| BusError::Router)?;
        let name = options.name;
        let (mut reading_tx, mut reading, _) =
            LinkBuilder::new(&format!("{name}-reader-{number}"), events.clone()).build()?;
        reading_tx.try_subscribe("#")?;
        // Nothing is ever sent to the publishing link; its receiving half may go.
        let (mut publishing, _, _) = LinkBuilder::new(&format!("{name}-publisher-{number}"), events).build()?;
        let (topic, payload) = heartbeat(0);
        publishing.try_publish(topic, payload)?;
        let deadline = Instant::now() + options.heartbeat_timeout;
        loop {
            match reading.recv_deadline(deadline) {
                Ok(Some(Notification::Forward(_))) => return Ok(Self { publishing, reading, reading_tx }),
                Ok(_) => {}
                Err(_) => return Err(BusError::NoAnswer),
            }
        }
    }
}

/// What waiting for the router brought.
enum Received {
    /// Messages, or nothing in particular.
    Something,
    /// Nothing until the deadline.
    Silence,
    /// The router is dead or has thrown us out.
    Ended,
}

/// The reading thread.
struct Reader<S> {
    shared: Arc<Shared>,
    sink: S,
    link: LinkRx,
    link_tx: LinkTx,
    /// The number that comes next if nothing is lost.
    expected: u64,
    /// Heartbeats since the last sign of life. Time would not do: it also passes while the sink or the whole process stands still.
    unanswered: u32,
    batch: Vec<BusMessage>,
    batch_bytes: u64,
    /// The last one, to share when the next is the same.
    topic: Arc<str>,
}

impl<S: BusSink> Reader<S> {
    fn run(mut self) {
        let interval = self.shared.options.heartbeat_interval;
        let mut next_heartbeat = Instant::now() + interval;
        while !self.shared.stopping() {
            let received = self.receive(next_heartbeat);
            self.flush();
            let dead = match received {
                Received::Ended => Some("it ended"),
                Received::Silence if interval * self.unanswered >= self.shared.options.heartbeat_timeout => {
                    Some("it does not answer")
                }
                Received::Silence | Received::Something => None,
            };
            if let Some(reason) = dead {
                tracing::error!(bus = self.shared.options.name, reason, "the router is dead and is replaced");
                self.replace_router();
            }
            if Instant::now() >= next_heartbeat {
                self.shared.beat();
                self.unanswered = self.unanswered.saturating_add(1);
                next_heartbeat = Instant::now() + interval;
            }
        }
        self.leave_router();
    }

    /// Waits for notifications and takes those that are there.
    fn receive(&mut self, deadline: Instant) -> Received {
        let first = match self.link.recv_deadline(deadline) {
            Ok(first) => first,
            // flume, whose error says which it was, is rumqttd's dependency and not ours; the clock says it as well.
            Err(_) if Instant::now() >= deadline => return Received::Silence,
            Err(_) => return Received::Ended,
        };
        let mut next = first;
        let past = Instant::now();
        loop {
            match next {
                Some(Notification::Forward(forward)) => self.take(forward),
                Some(Notification::Unschedule) => {
                    // The router waits for us; it may refill while the sink works.
                    if self.link.ready().is_err() {
                        return Received::Ended;
                    }
                }
                Some(Notification::Disconnect(..)) => return Received::Ended,
                // Acknowledgements, and events whose notifications came with an earlier one.
                Some(_) | None => {}
            }
            if self.batch.len() >= BATCH_MESSAGES_MAX {
                return Received::Something;
            }
            next = match self.link.recv_deadline(past) {
                Ok(next) => next,
                // Nothing more now. If the router has died, waiting will tell.
                Err(_) => return Received::Something,
            };
        }
    }

    fn take(&mut self, forward: Forward) {
        let Publish { topic, mut payload, .. } = forward.publish;
        let kept_bytes = kept_bytes(&topic, payload.len());
        if payload.len() < NUMBER_BYTES {
            tracing::error!(bus = self.shared.options.name, "a message on the bus has no number");
            return;
        }
        self.unanswered = 0;
        // What pushes a segment out is 0, which says nothing, and is the only heartbeat whose bytes were let in.
        let number = payload.get_u64();
        if topic == HEARTBEAT_TOPIC {
            if !payload.is_empty() {
                self.shared.read_bytes.fetch_add(kept_bytes, Ordering::Release);
            }
            if number >= self.expected {
                self.gap();
                self.expected = number + 1;
            }
            let heartbeat_us = u64::try_from(self.shared.began.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.shared.heartbeat_us.store(heartbeat_us, Ordering::Relaxed);
            return;
        }
        self.batch_bytes += kept_bytes;
        if number < self.expected {
            tracing::error!(bus = self.shared.options.name, number, "a message came twice on the bus");
            return;
        }
        if number > self.expected {
            self.gap();
        }
        self.expected = number + 1;
        if self.topic.as_bytes() != topic {
            match std::str::from_utf8(&topic) {
                Ok(topic) => self.topic = Arc::from(topic),
                Err(error) => {
                    tracing::error!(bus = self.shared.options.name, %error, "a topic on the bus is not ours");
                    return;
                }
            }
        }
        self.batch.push(BusMessage { topic: Arc::clone(&self.topic), payload });
    }

    /// Hands the batch over. Only then is it no longer under way.
    fn flush(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let messages = u64::try_from(self.batch.len()).unwrap_or(u64::MAX);
        let delivered = catch_unwind(AssertUnwindSafe(|| self.sink.messages(&mut self.batch))).is_ok();
        self.batch.clear();
        self.shared.counters.delivered.fetch_add(messages, Ordering::Relaxed);
        self.shared.read_messages.fetch_add(messages, Ordering::Release);
        self.shared.read_bytes.fetch_add(std::mem::take(&mut self.batch_bytes), Ordering::Release);
        if !delivered {
            tracing::error!(
                bus = self.shared.options.name,
                messages,
                "the sink of the bus panicked; please report this"
            );
            self.gap();
        }
    }

    fn gap(&mut self) {
        self.flush();
        self.shared.counters.gaps.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(bus = self.shared.options.name, after = self.expected - 1, "messages were lost on the bus");
        if catch_unwind(AssertUnwindSafe(|| self.sink.gap())).is_err() {
            tracing::error!(bus = self.shared.options.name, "the sink of the bus panicked; please report this");
        }
    }

    fn leave_router(&mut self) {
        if let Some(mut publishing) = self.shared.publisher.lock().link.take() {
            disconnect(&mut publishing);
        }
        // From here on nobody may call `ready` on this link.
        disconnect(&mut self.link_tx);
    }

    fn replace_router(&mut self) {
        self.leave_router();
        let router = loop {
            if self.shared.stopping() {
                return;
            }
            match OpenRouter::open(&self.shared.options) {
                Ok(router) => break router,
                Err(error) => {
                    tracing::error!(bus = self.shared.options.name, %error, "no new router; trying again");
                    std::thread::park_timeout(self.shared.options.heartbeat_interval);
                }
            }
        };
        self.link = router.reading;
        self.link_tx = router.reading_tx;
        self.unanswered = 0;
        {
            let mut publisher = self.shared.publisher.lock();
            self.shared.read_messages.store(0, Ordering::Release);
            self.shared.read_bytes.store(0, Ordering::Release);
            publisher.let_in_messages = 0;
            publisher.let_in_bytes = 0;
            publisher.emptying = Emptying::default();
            publisher.link = Some(router.publishing);
            self.expected = publisher.last_number + 1;
        }
        self.shared.counters.restarts.fetch_add(1, Ordering::Relaxed);
        tracing::info!(bus = self.shared.options.name, "the router was replaced");
        self.gap();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// What a sink has heard.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Heard {
        Message(BusMessage),
        Gap,
    }

    /// Tells what it hears, and waits whenever the test holds the gate.
    struct Listener {
        heard: SyncSender<Heard>,
        gate: Arc<Mutex<()>>,
    }

    impl BusSink for Listener {
        fn messages(&mut self, batch: &mut Vec<BusMessage>) {
            assert!(!batch.is_empty());
            let _open = self.gate.lock();
            for message in batch.drain(..) {
                assert_ne!(message.payload, "panic", "as the test wants it");
                self.heard.send(Heard::Message(message)).ok();
            }
        }

        fn gap(&mut self) {
            self.heard.send(Heard::Gap).ok();
        }
    }

    fn options(filters: &[&str]) -> BusOptions {
        BusOptions {
            filters: filters.iter().map(ToString::to_string).collect(),
            heartbeat_interval: Duration::from_millis(20),
            // Tests run on loaded machines; only one wants to see it pass.
            heartbeat_timeout: PATIENCE,
            ..BusOptions::new("test")
        }
    }

    fn start(options: BusOptions) -> (Bus, Receiver<Heard>, Arc<Mutex<()>>) {
        let (heard, hears) = sync_channel(1_000_000);
        let gate = Arc::new(Mutex::new(()));
        let bus = Bus::start(options, Listener { heard, gate: Arc::clone(&gate) }).expect("a bus");
        (bus, hears, gate)
    }

    fn message(topic: &str, payload: impl ToString) -> BusMessage {
        BusMessage { topic: topic.into(), payload: payload.to_string().into() }
    }

    fn numbers(topic: &str, numbers: std::ops::Range<u64>) -> Vec<BusMessage> {
        numbers.map(|number| message(topic, number)).collect()
    }

    /// Messages until the next gap, which has to come.
    fn until_gap(hears: &Receiver<Heard>) -> Vec<BusMessage> {
        let mut messages = Vec::new();
        loop {
            match hears.recv_timeout(PATIENCE).expect("a gap") {
                Heard::Message(message) => messages.push(message),
                Heard::Gap => return messages,
            }
        }
    }

    fn expect_messages(hears: &Receiver<Heard>, expected: impl IntoIterator<Item = BusMessage>) {
        for expected in expected {
            assert_eq!(hears.recv_timeout(PATIENCE), Ok(Heard::Message(expected)));
        }
    }

    fn eventually(what: &str, mut is: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is() {
            assert!(Instant::now() < deadline, "never: {what}");
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }

    #[test]
    fn messages_come_in_the_order_of_publishing_whatever_their_topics() {
        let (bus, hears, _gate) = start(options(&["chat/+/inbox", "chat/+/sent", "chat/#"]));
        let messages: Vec<BusMessage> = (0..3_000)
            .map(|n| message(&format!("chat/{}/{}", n % 11, ["inbox", "sent"][n % 2]), "x".repeat(n % 5)))
            .collect();
        for batch in messages.chunks(7) {
            bus.send(batch.to_vec());
        }
        expect_messages(&hears, messages);
        assert_eq!(hears.try_recv().ok(), None, "overlapping filters deliver once");
        let counters = bus.counters();
        assert_eq!((counters.published, counters.dropped, counters.gaps, counters.restarts), (3_000, 0, 0, 0));
        bus.stop();
        assert_eq!(bus.counters().delivered, 3_000);
    }

    #[test]
    fn nothing_is_lost_while_the_sink_keeps_up() {
        let (bus, hears, _gate) = start(options(&["+"]));
        let total = 100_000;
        let mut heard = 0;
        for first in (0..total).step_by(100) {
            bus.send(numbers("t", first..first + 100));
            while first - heard > 5_000 {
                expect_messages(&hears, [message("t", heard)]);
                heard += 1;
            }
        }
        expect_messages(&hears, numbers("t", heard..total));
        let counters = bus.counters();
        assert_eq!((counters.published, counters.dropped, counters.gaps), (total, 0, 0));
        bus.stop();
    }

    #[test]
    fn the_log_of_a_quiet_bus_is_emptied() {
        let (bus, hears, _gate) = start(options(&["+"]));
        let topic: Arc<str> = Arc::from("t");
        let of = |n: u64| BusMessage { topic: Arc::clone(&topic), payload: n.to_string().into() };
        let messages: Vec<BusMessage> = (0..EMPTIED_MESSAGES_MIN).map(of).collect();
        for _ in 0..3 {
            bus.send(messages.clone());
            expect_messages(&hears, messages.iter().cloned());
            // Whatever rumqttd keeps of them holds their topic.
            eventually("they are let go", || Arc::strong_count(&topic) == 1 + messages.len());
        }
        let counters = bus.counters();
        assert_eq!((counters.delivered, counters.dropped, counters.gaps), (3 * EMPTIED_MESSAGES_MIN, 0, 0));
        bus.stop();
    }

    #[test]
    fn only_a_quiet_bus_is_emptied() {
        let mut emptying = Emptying::default();
        // As many as there are, all the time, and then some under way.
        for tick in 1..100 {
            assert!(!emptying.pushes_out(tick * (QUIET_MESSAGES_MAX + 1), 0, 6));
        }
        assert!(!emptying.pushes_out(99 * (QUIET_MESSAGES_MAX + 1), 1, 6));
        let pushed = (0..600).map(|_| emptying.pushes_out(99 * (QUIET_MESSAGES_MAX + 1), 0, 6));
        let pushed: Vec<bool> = pushed.collect();
        // At once, and again when there are only heartbeats.
        assert_eq!(pushed[..8], [true, true, true, true, true, true, true, false]);
        assert_eq!(pushed.iter().filter(|pushed| **pushed).count(), 14);
    }

    #[test]
    fn publishers_do_not_disturb_each_other() {
        let (bus, hears, _gate) = start(options(&["+"]));
        let publishers: Vec<_> = (0..4)
            .map(|publisher| {
                let bus = bus.clone();
                std::thread::spawn(move || {
                    for first in (0..5_000).step_by(10) {
                        bus.send(numbers(&publisher.to_string(), first..first + 10));
                    }
                })
            })
            .collect();
        let mut next = [0u64; 4];
        for _ in 0..20_000 {
            let Ok(Heard::Message(heard)) = hears.recv_timeout(PATIENCE) else { panic!("a loss") };
            let publisher: usize = heard.topic.parse().expect("a number");
            assert_eq!(heard, message(&heard.topic, next[publisher]));
            next[publisher] += 1;
        }
        for publisher in publishers {
            publisher.join().expect("no panic");
        }
        bus.stop();
    }

    #[test]
    fn a_slow_sink_loses_the_newest_and_hears_of_it() {
        let (bus, hears, gate) = start(BusOptions { messages_under_way_max: 1_000, ..options(&["+"]) });
        let closed = gate.lock();
        let began = Instant::now();
        for first in (0..10_000).step_by(100) {
            bus.send(numbers("t", first..first + 100));
        }
        assert!(began.elapsed() < PATIENCE, "publishing does not wait");
        assert_eq!((bus.counters().published, bus.counters().dropped), (1_000, 9_000));
        drop(closed);
        // Nothing is published after the loss: the heartbeat tells.
        assert_eq!(until_gap(&hears), numbers("t", 0..1_000));
        bus.send(numbers("t", 10_000..10_010));
        expect_messages(&hears, numbers("t", 10_000..10_010));
        assert_eq!((bus.counters().gaps, bus.counters().restarts), (1, 0));
        bus.stop();
    }

    #[test]
    fn bytes_under_way_are_bounded_below_what_rumqttd_keeps() {
        let (bus, hears, gate) = start(BusOptions { segment_bytes: 16 * 1024, segments: 4, ..options(&["+"]) });
        let closed = gate.lock();
        for n in 0..1_000 {
            bus.send(vec![message("t", format!("{n:0>1000}"))]);
        }
        assert_eq!(bus.counters().published, 2 * 16 * 1024 / 1_013);
        drop(closed);
        let heard = until_gap(&hears);
        assert_eq!(heard.len(), 2 * 16 * 1024 / 1_013);
        // One that is larger than everything passes when nothing else is under way.
        let large = message("t", "x".repeat(1_000_000));
        eventually("all is read", || {
            bus.send(vec![large.clone()]);
            hears.try_recv() == Ok(Heard::Message(large.clone()))
        });
        bus.stop();
    }

    #[test]
    fn a_gap_is_heard_exactly_where_messages_are_missing() {
        let (bus, hears, gate) = start(BusOptions { messages_under_way_max: 300, ..options(&["+"]) });
        for round in 0..200u64 {
            let closed = (round % 3 == 0).then(|| gate.lock());
            for first in (round * 200..round * 200 + 200).step_by(40) {
                bus.send(numbers("t", first..first + 40));
            }
            drop(closed);
        }
        let counters = bus.counters();
        assert_eq!(counters.published + counters.dropped, 40_000);
        eventually("all that was let in is delivered", || bus.counters().delivered == counters.published);
        // Whatever is lost at the end is told by the next heartbeat, whatever else by the next message.
        bus.send(vec![message("t", 40_000)]);
        let (mut expected, mut gap) = (0, false);
        while expected != 40_001 {
            match hears.recv_timeout(PATIENCE).expect("messages to the last") {
                Heard::Gap => gap = true,
                Heard::Message(message) => {
                    let number: u64 = std::str::from_utf8(&message.payload).expect("text").parse().expect("a number");
                    assert!(number == expected || (number > expected && gap), "{number} came, not {expected}");
                    (expected, gap) = (number + 1, false);
                }
            }
        }
        bus.stop();
    }

    #[test]
    fn a_dead_router_is_replaced_and_others_do_not_notice() {
        let (bus, hears, _gate) = start(options(&["+"]));
        let (bystander, bystander_hears, _gate) = start(options(&["+"]));
        for death in 1..=5 {
            bus.send(numbers("t", 0..10));
            expect_messages(&hears, numbers("t", 0..10));
            bus.break_router();
            assert_eq!(until_gap(&hears), []);
            assert_eq!(bus.counters().restarts, death);
            assert_eq!(bus.counters().gaps, death);
        }
        bus.send(numbers("t", 0..2_000));
        expect_messages(&hears, numbers("t", 0..2_000));
        bystander.send(numbers("t", 0..10));
        expect_messages(&bystander_hears, numbers("t", 0..10));
        assert_eq!((bystander.counters().gaps, bystander.counters().restarts), (0, 0));
        bus.stop();
        bystander.stop();
    }

    #[test]
    fn a_router_that_dies_under_load_costs_a_gap_and_no_order() {
        let (bus, hears, _gate) = start(options(&["+"]));
        for round in 0..50 {
            if round == 25 {
                bus.break_router();
            }
            bus.send(numbers("t", round * 100..round * 100 + 100));
        }
        let before = until_gap(&hears);
        assert_eq!(before, numbers("t", 0..u64::try_from(before.len()).expect("few")));
        bus.send(vec![message("t", "end")]);
        let mut last = None;
        loop {
            match hears.recv_timeout(PATIENCE).expect("the end") {
                Heard::Gap => {}
                Heard::Message(heard) if heard.payload == "end" => break,
                Heard::Message(heard) => {
                    let number: u64 = std::str::from_utf8(&heard.payload).expect("text").parse().expect("a number");
                    assert!(last < Some(number));
                    last = Some(number);
                }
            }
        }
        assert_eq!(bus.counters().restarts, 1);
        bus.stop();
    }

    #[test]
    fn a_silent_router_is_replaced() {
        let (bus, hears, _gate) =
            start(BusOptions { heartbeat_timeout: Duration::from_millis(500), ..options(&["+"]) });
        bus.mute_router();
        bus.send(vec![message("t", "lost")]);
        assert_eq!(until_gap(&hears), []);
        assert!(bus.counters().restarts >= 1);
        bus.send(vec![message("t", "found")]);
        expect_messages(&hears, [message("t", "found")]);
        bus.stop();
    }

    #[test]
    fn the_heartbeat_ages_while_the_sink_is_busy_and_the_router_is_not_blamed() {
        let (bus, hears, gate) = start(BusOptions { heartbeat_timeout: Duration::from_millis(500), ..options(&["+"]) });
        let closed = gate.lock();
        bus.send(vec![message("t", 1)]);
        eventually("an old heartbeat", || bus.heartbeat_age() > Duration::from_millis(700));
        drop(closed);
        eventually("a fresh heartbeat", || bus.heartbeat_age() < Duration::from_millis(300));
        expect_messages(&hears, [message("t", 1)]);
        assert_eq!((bus.counters().gaps, bus.counters().restarts), (0, 0));
        bus.stop();
    }

    #[test]
    fn a_panic_in_the_sink_is_a_gap() {
        let (bus, hears, _gate) = start(options(&["+"]));
        bus.send(vec![message("t", "panic")]);
        assert_eq!(until_gap(&hears), []);
        bus.send(vec![message("t", 2)]);
        expect_messages(&hears, [message("t", 2)]);
        bus.stop();
    }

    #[test]
    fn stopping_ends_the_thread_and_can_be_repeated() {
        let (bus, hears, _gate) = start(options(&["+"]));
        let clone = bus.clone();
        bus.stop();
        assert_eq!(hears.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Disconnected), "the sink is gone");
        bus.stop();
        clone.stop();
        clone.send(vec![message("t", 1)]);
        assert_eq!(clone.counters().dropped, 1);
    }

    #[test]
    fn the_last_handle_stops_the_bus() {
        let (bus, hears, _gate) = start(options(&["+"]));
        drop(bus.clone());
        bus.send(vec![message("t", 1)]);
        expect_messages(&hears, [message("t", 1)]);
        drop(bus);
        assert_eq!(hears.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected), "the sink is gone");
    }

    #[test]
    fn topics_that_may_not_reach_the_router_do_not() {
        let (bus, hears, _gate) = start(options(&["a/+", "#"]));
        for topic in ["$a/b", "a/#", "a\0", HEARTBEAT_TOPIC, &"a".repeat(70_000)] {
            bus.send(vec![message(topic, 1)]);
        }
        assert_eq!(bus.counters().refused, 5);
        bus.stop();
        let (bus, _hears, _gate) = start(options(&["a/+"]));
        bus.send(vec![message("b", 1), message("a/b", 2)]);
        assert_eq!((bus.counters().refused, bus.counters().published), (1, 1));
        bus.stop();
        assert_eq!(hears.try_recv().ok(), None);
    }

    #[test]
    #[should_panic(expected = "bus topics are ours")]
    fn a_topic_that_would_kill_the_router_is_caught() {
        let (bus, hears, _gate) = start(options(&["#"]));
        bus.send(vec![message("é", 1)]);
        bus.send(vec![message("t", 2)]);
        expect_messages(&hears, [message("t", 2)]);
        assert_eq!((bus.counters().refused, bus.counters().restarts), (1, 0));
        panic!("bus topics are ours: in a release build the server goes on");
    }

    #[test]
    fn options_are_checked() {
        let (heard, _hears) = sync_channel(1);
        let gate = Arc::new(Mutex::new(()));
        let start = |options| Bus::start(options, Listener { heard: heard.clone(), gate: Arc::clone(&gate) });
        assert!(matches!(start(options(&["a#"])), Err(BusError::Filter { .. })));
        assert!(matches!(start(BusOptions { segments: 2, ..options(&[]) }), Err(BusError::Capacity)));
        assert!(matches!(start(BusOptions { segment_bytes: 9, ..options(&[]) }), Err(BusError::Capacity)));
        assert!(matches!(start(BusOptions { name: "a/b", ..options(&[]) }), Err(BusError::Link(_))));
    }
}
