//! One connection: its socket, its session, its window.
//!
//! One task owns all of it. It wakes for bytes, for mail, for a page from the log or for a deadline, does everything that is to do, and writes
//! once. It never waits for one thing while another is due, except for answers that MQTT orders (CONNECT, SUBSCRIBE). Invariants:
//! acknowledgements leave in the order of the publishes; nothing is acknowledged that the service did not store; what is kept
//! for a client is bounded by its window and the mailbox, whatever waits for it.

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use mqtt_protocol_core::mqtt::result_code::DisconnectReasonCode;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::Sleep;

use crate::absent::{AbsentSession, DelayedWill};
use crate::broker::Shared;
use crate::completion::Reply;
use crate::engine::{
    Accepted, Ack, Connect, Engine, Filter, Granted, Incoming, NotSent, Outgoing, Overfull, Publish, UserProperties,
    Will,
};
use crate::escaped::Escaped;
use crate::filters::FiltersFull;
use crate::mailbox::{Ending, LIVE_MESSAGES_MAX, Mail, Mailbox, Ordinary};
use crate::ordinary::{OrdinarySubscription, Receiver};
use crate::rate::{Pace, Verdict};
use crate::registry::{ConnectionNumber, NotAttached};
use crate::service::{
    Authentication, BoundPublish, ConnectRefusal, ConnectRefusalCode, ConnectRequest, Identity, Keeping, NotCreated,
    Observation, Page, Peer, Position, PublishOutcome, PublishRoute, ReadLimit, Refusal, RefusalCode, Service,
    ServiceError, SessionKey, SubscribeRoute, Subscriber, SubscriptionRecord,
};
use crate::session::{
    LiveTopic, Queued, RetainedWanted, Session, Slot, Subscribed, Subscription, Target, UnderWay, Wanted,
};
use crate::stream::{DurableStream, Ready};
use crate::topics::filter;
use crate::topics::message::{Expiry, Message};
use crate::topics::retained::RetainedFull;

/// Bytes read at once, into one buffer a thread.
const READ_BYTES: usize = 64 * 1024;
/// Deliveries stop while so many bytes wait for the socket.
const OUT_DELIVERIES_MAX: usize = 64 * 1024;
/// Reading stops while so many bytes wait for the socket.
const OUT_READING_MAX: usize = 256 * 1024;
/// Reading stops while so many publishes wait for their answers. Only MQTT 3.1.1 gets there, which knows no receive maximum.
const PENDING_READING_MAX: usize = 1_024;
/// Parts of what is retained that are looked through before others have their turn.
const RETAINED_PARTS_MAX: usize = 16;
/// An empty output buffer larger than this is given back.
const OUT_KEPT: usize = 1_024;
/// Messages read from the log at once.
const PAGE_MESSAGES: usize = 64;
/// Payload bytes of them.
const PAGE_BYTES: usize = 128 * 1024;
/// The most messages in flight to a client that names a larger receive maximum.
const WINDOW_MAX: u16 = 1_024;
/// How long a connection that ends may take to send its last bytes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long, and how many bytes, a connection that was closed for a reason is still read from.
const HEARD_OUT_TIMEOUT: Duration = Duration::from_millis(500);
const HEARD_OUT_BYTES_MAX: usize = 1024 * 1024;
/// How long a session's new connection waits for the old one to give back what is under way.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection whose session was taken over reads what its client had sent before.
const TAKEOVER_READ_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a connection that is gone waits to learn what became of what it was sent exactly once.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(1);
/// How long publishes wait when the bus of ordinary messages is full.
const BUS_RETRY: Duration = Duration::from_millis(2);
/// How often a client is told at most that its QoS 0 publishes go nowhere.
const TOLD_INTERVAL: Duration = Duration::from_secs(1);
/// How long a failed read of the log waits before the next.
const READ_RETRY: Duration = Duration::from_millis(500);

thread_local! {
    static READ_BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

type Reading = Pin<Box<dyn Future<Output = Result<Page, ServiceError>> + Send>>;
type Waiting = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A publish that was not answered yet, in the order of arrival.
struct Pending {
    packet_id: u16,
    qos: u8,
    received_at: Instant,
    outcome: Option<PublishOutcome>,
}

/// Why the task stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client said DISCONNECT.
    Client,
    /// The client said DISCONNECT and wants its will published.
    ClientWithWill,
    /// The socket closed or failed.
    Socket,
    /// We close: a fault, a deadline, a takeover.
    Closed,
    /// The server stops.
    Shutdown,
}

impl End {
    fn publishes_will(self) -> bool {
        matches!(self, Self::ClientWithWill | Self::Socket | Self::Closed)
    }
}

struct Connection<S: Service, T> {
    shared: Arc<Shared<S>>,
    number: ConnectionNumber,
    io: T,
    peer: Peer,
    engine: Engine,
    packets: VecDeque<Incoming>,
    /// Bytes that came after a CONNECT that is not answered yet.
    early: Vec<u8>,
    out_at: usize,
    needs_flush: bool,
    mailbox: Arc<Mailbox>,
    session: Option<Session>,
    pending: VecDeque<Pending>,
    /// Token of the first in `pending`.
    first_token: u64,
    unsent: Vec<BoundPublish>,
    /// Publishes that wait for room on the bus of ordinary messages, and those behind them.
    held: VecDeque<Publish>,
    waiting: Option<Waiting>,
    reading: Option<(Arc<str>, Reading)>,
    page: Option<(Arc<str>, Result<Page, ServiceError>)>,
    /// QoS 0 deliveries that count as delivered once they are written.
    unwritten: Vec<(Arc<str>, Position)>,
    heard_at: Instant,
    deadline: Option<Instant>,
    retry_at: Option<Instant>,
    bus_retry_at: Option<Instant>,
    /// Rights have changed.
    recheck: bool,
    timer: Pin<Box<Sleep>>,
    timer_at: Instant,
    /// The session's next connection is there, and waits until then for what this one has read and done.
    taken_over: Option<Instant>,
    /// There is more to do at once than was done.
    busy: bool,
    /// The socket had nothing more to read.
    dry: bool,
    /// Read since others had their turn.
    read_in_turn: usize,
    /// How fast it may go; known when its user is.
    pace: Option<Pace>,
    /// Until then the first of `packets` waits, which was paid for.
    paused_until: Option<Instant>,
    told_at: Option<Instant>,
    /// Bytes that may still be read before a CONNECT was accepted.
    connect_bytes_left: usize,
    /// The server stops: what was published is still answered, nothing more is read.
    stopping: bool,
    end: Option<End>,
}

/// Serves one connection until it ends.
pub(crate) async fn run<S, T>(shared: Arc<Shared<S>>, number: ConnectionNumber, io: T, peer: Peer)
where
    S: Service,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let now = Instant::now();
    let deadline = now + shared.limits.connect_timeout;
    let mut connection = Connection {
        engine: Engine::new(&shared.limits),
        mailbox: Arc::new(shared.mailbox()),
        connect_bytes_left: usize::try_from(shared.limits.connect_bytes).unwrap_or(usize::MAX),
        shared,
        number,
        io,
        peer,
        packets: VecDeque::new(),
        early: Vec::new(),
        out_at: 0,
        needs_flush: false,
        session: None,
        pending: VecDeque::new(),
        first_token: 0,
        unsent: Vec::new(),
        held: VecDeque::new(),
        waiting: None,
        reading: None,
        page: None,
        unwritten: Vec::new(),
        heard_at: now,
        deadline: Some(deadline),
        retry_at: None,
        bus_retry_at: None,
        recheck: false,
        timer: Box::pin(tokio::time::sleep_until(deadline.into())),
        timer_at: deadline,
        taken_over: None,
        busy: false,
        dry: false,
        read_in_turn: 0,
        pace: None,
        paused_until: None,
        told_at: None,
        stopping: false,
        end: None,
    };
    // The guard leaves no trace of the connection behind, even if a bug makes the task panic.
    let mut departure = Departure {
        shared: Arc::clone(&connection.shared),
        number,
        mailbox: Arc::clone(&connection.mailbox),
        key: None,
        ordinary: Vec::new(),
        bound: Vec::new(),
    };
    let end = connection.serve(&mut departure).await;
    connection.depart(end, &mut departure).await;
}

/// What has to be undone when a connection goes.
struct Departure<S: Service> {
    shared: Arc<Shared<S>>,
    number: ConnectionNumber,
    mailbox: Arc<Mailbox>,
    key: Option<SessionKey>,
    ordinary: Vec<String>,
    bound: Vec<Arc<str>>,
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
    async fn serve(&mut self, departure: &mut Departure<S>) -> End {
        loop {
            if self.busy {
                // Others first.
                tokio::task::yield_now().await;
            }
            std::future::poll_fn(|cx| self.poll_step(cx)).await;
            if self.end == Some(End::Socket) {
                self.await_outcomes().await;
                self.settle(End::Socket, departure);
                return End::Socket;
            }
            self.take_page();
            if std::mem::take(&mut self.recheck) {
                self.look_at_rights(departure).await;
            }
            self.publish_held();
            self.handle_packets(departure).await;
            self.submit();
            self.answer_pending();
            self.deliver();
            self.on_time();
            if self.taken_over.is_some_and(|until| self.dry || Instant::now() >= until) && self.end.is_none() {
                self.engine.disconnect(
                    DisconnectReasonCode::SessionTakenOver,
                    "another connection of this user has the same client identifier",
                );
                self.end = Some(End::Closed);
            }
            if self.stopping && self.pending.is_empty() && self.unsent.is_empty() && self.held.is_empty() {
                self.engine.disconnect(DisconnectReasonCode::ServerShuttingDown, "the server is shutting down");
                self.end.get_or_insert(End::Shutdown);
            }
            if self.engine.fault.is_some() && !self.engine.closing {
                tracing::debug!(peer = %self.peer, fault = ?self.engine.fault, "protocol violation");
                self.engine.disconnect_for_fault();
            }
            if self.end.is_none() && self.engine.closing {
                self.end = Some(End::Closed);
            }
            if let Some(end) = self.end {
                self.await_outcomes().await;
                self.settle(end, departure);
                self.write_last_bytes().await;
                if end == End::Closed {
                    self.hear_out().await;
                }
                return end;
            }
            if self.read_in_turn >= READ_BYTES {
                // A client that sends faster than it is worked off must not keep a thread for itself.
                self.read_in_turn = 0;
                tokio::task::yield_now().await;
            }
        }
    }

    // ---- waiting -------------------------------------------------------------------------------------------------------

    /// Waits for anything, and takes in whatever is there.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut progress = std::mem::take(&mut self.busy);
        let take_ordinary = self.session.as_ref().is_some_and(|session| session.queue.is_empty());
        if let Poll::Ready(mail) = self.mailbox.poll(cx, take_ordinary) {
            self.on_mail(mail);
            progress = true;
        }
        if let Some((topic, reading)) = &mut self.reading
            && let Poll::Ready(page) = reading.as_mut().poll(cx)
        {
            self.page = Some((Arc::clone(topic), page));
            self.reading = None;
            progress = true;
        }
        if let Some(waiting) = &mut self.waiting
            && waiting.as_mut().poll(cx).is_ready()
        {
            self.waiting = None;
            progress = true;
        }
        match self.poll_write(cx) {
            Poll::Ready(Ok(true)) => progress = true,
            Poll::Ready(Ok(false)) | Poll::Pending => {}
            Poll::Ready(Err(())) => {
                self.end = Some(End::Socket);
                return Poll::Ready(());
            }
        }
        self.dry = false;
        if self.may_read() {
            match self.poll_read(cx) {
                Poll::Ready(Ok(())) => progress = true,
                Poll::Ready(Err(())) => {
                    self.end = Some(End::Socket);
                    return Poll::Ready(());
                }
                Poll::Pending => {
                    self.dry = true;
                    self.read_in_turn = 0;
                }
            }
        }
        if self.timer.as_mut().poll(cx).is_ready() {
            progress = true;
        }
        if progress { Poll::Ready(()) } else { Poll::Pending }
    }

    fn may_read(&self) -> bool {
        self.unsent.is_empty()
            && self.held.is_empty()
            && self.packets.is_empty()
            && self.pending.len() < PENDING_READING_MAX
            && self.end.is_none()
            && !self.stopping
            && self.engine.fault.is_none()
            && self.engine.out.len() - self.out_at < OUT_READING_MAX
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ()>> {
        if !self.early.is_empty() {
            let bytes = std::mem::take(&mut self.early);
            self.feed(&bytes);
            return Poll::Ready(Ok(()));
        }
        READ_BUFFER.with_borrow_mut(|buffer| {
            let connecting = self.session.is_none();
            let most = if connecting { buffer.len().min(self.connect_bytes_left) } else { buffer.len() };
            if most == 0 {
                self.shared.service.observe(Observation::Limited("connect_bytes"));
                return Poll::Ready(Err(()));
            }
            let mut read = ReadBuf::new(&mut buffer[..most]);
            if ready!(Pin::new(&mut self.io).poll_read(cx, &mut read)).is_err() || read.filled().is_empty() {
                return Poll::Ready(Err(()));
            }
            self.read_in_turn += read.filled().len();
            if connecting {
                self.connect_bytes_left -= read.filled().len();
            }
            self.feed(read.filled());
            Poll::Ready(Ok(()))
        })
    }

    fn feed(&mut self, bytes: &[u8]) {
        let taken = self.engine.feed(bytes, &mut self.packets);
        if let Some(limit) = self.engine.overstepped.take() {
            self.limited(limit);
        }
        if taken < bytes.len() && self.engine.fault.is_none() {
            self.early.extend_from_slice(&bytes[taken..]);
        }
        // Only whole packets show that a client is there; a byte now and then does not.
        if !self.packets.is_empty() {
            self.heard_at = Instant::now();
        }
    }

    /// `true` if anything was written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, ()>> {
        let mut written = false;
        while self.out_at < self.engine.out.len() {
            match Pin::new(&mut self.io).poll_write(cx, &self.engine.out[self.out_at..]) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    self.out_at += n;
                    self.needs_flush = true;
                    written = true;
                }
                Poll::Ready(_) => return Poll::Ready(Err(())),
                Poll::Pending => return Poll::Ready(Ok(written)),
            }
        }
        if self.out_at > 0 {
            self.out_at = 0;
            self.engine.out.clear();
            self.engine.out.shrink_to(OUT_KEPT);
            self.on_all_written();
        }
        if self.needs_flush {
            match Pin::new(&mut self.io).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.needs_flush = false,
                Poll::Ready(Err(_)) => return Poll::Ready(Err(())),
                Poll::Pending => {}
            }
        }
        Poll::Ready(Ok(written))
    }

    async fn write_last_bytes(&mut self) {
        let last = async {
            self.io.write_all(&self.engine.out[self.out_at..]).await?;
            self.io.flush().await?;
            self.io.shutdown().await
        };
        match tokio::time::timeout(CLOSE_TIMEOUT, last).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(peer = %self.peer, %error, "closing failed"),
            Err(_) => tracing::debug!(peer = %self.peer, "the client did not take its last bytes"),
        }
    }

    /// Reads what the client has still sent, and forgets it: with unread bytes a closed socket is reset, and a reset takes the DISCONNECT that
    /// says why with it.
    async fn hear_out(&mut self) {
        let ended = async {
            // On the heap: as part of the future every connection would carry it all along.
            let mut bytes = vec![0; 4 * 1024];
            let mut left = HEARD_OUT_BYTES_MAX;
            while left > 0 {
                match self.io.read(&mut bytes).await {
                    Ok(read) if read > 0 => left = left.saturating_sub(read),
                    _ => return,
                }
            }
        };
        if tokio::time::timeout(HEARD_OUT_TIMEOUT, ended).await.is_err() {
            tracing::trace!(peer = %self.peer, "the client does not close its side");
        }
    }

    // ---- deadlines -----------------------------------------------------------------------------------------------------

    fn on_time(&mut self) {
        let now = Instant::now();
        if let Some(retry_at) = self.retry_at
            && now >= retry_at
        {
            self.retry_at = None;
            self.deliver();
        }
        if self.session.is_none() && self.deadline.is_some_and(|deadline| now >= deadline) {
            tracing::debug!(peer = %self.peer, "no CONNECT in time");
            self.limited("connect_timeout_ms");
            self.end.get_or_insert(End::Closed);
            return;
        }
        let silent_until = self.silent_until();
        if silent_until.is_some_and(|until| now >= until) {
            let silence_max = self.session.as_ref().and_then(|session| session.silence_max);
            if silence_max == Some(self.shared.limits.idle_timeout) {
                self.limited("idle_timeout_ms");
            }
            self.engine
                .disconnect(DisconnectReasonCode::KeepAliveTimeout, "nothing was heard for 1.5 times the keep alive");
            return;
        }
        let expires_at = self.session.as_ref().and_then(|session| session.identity.expires_at);
        if expires_at.is_some_and(|at| now >= at) {
            self.engine.disconnect(DisconnectReasonCode::NotAuthorized, "what proved who you are has expired");
            return;
        }
        let connect_by = if self.session.is_none() { self.deadline } else { None };
        let waits = [
            connect_by,
            silent_until,
            expires_at,
            self.retry_at,
            self.bus_retry_at,
            self.taken_over,
            self.paused_until,
        ];
        let next = waits.into_iter().flatten().min();
        match next {
            // Hearing from a client moves its deadline on: the timer is only set anew when it fires, or for something earlier.
            Some(next) if self.timer_at <= now || next < self.timer_at => {
                self.timer_at = next;
                self.timer.as_mut().reset(next.into());
            }
            Some(_) => {}
            None if self.timer_at <= now => {
                self.timer_at = now + Duration::from_secs(86_400);
                self.timer.as_mut().reset(self.timer_at.into());
            }
            None => {}
        }
    }

    fn silent_until(&self) -> Option<Instant> {
        let silence_max = self.session.as_ref()?.silence_max?;
        // While we do not read, it cannot be heard.
        let takes_no_bytes = self.engine.out.len() - self.out_at >= OUT_READING_MAX;
        if takes_no_bytes
            || !self.unsent.is_empty()
            || !self.held.is_empty()
            || self.paused_until.is_some()
            || self.pending.len() >= PENDING_READING_MAX
        {
            return Some(Instant::now() + silence_max);
        }
        Some(self.heard_at + silence_max)
    }

    // ---- mail ----------------------------------------------------------------------------------------------------------

    fn on_mail(&mut self, mail: Mail) {
        self.recheck |= mail.recheck;
        for (token, outcome) in mail.outcomes {
            let index = token.checked_sub(self.first_token).and_then(|index| usize::try_from(index).ok());
            if let Some(pending) = index.and_then(|index| self.pending.get_mut(index)) {
                pending.outcome = Some(outcome);
            }
        }
        if let Some(session) = &mut self.session {
            // Before the live ones: what came after a gap must not be taken for what follows.
            if mail.missed {
                for slot in &mut session.slots {
                    slot.stream.on_missed();
                }
                if !session.live_topics.is_empty() {
                    tracing::debug!(user = %session.key.user, "live messages that no log has were perhaps lost");
                }
            }
            for message in mail.live {
                match message.keeping() {
                    Keeping::Durable => {
                        session.bus_seen = session.bus_seen.max(message.position);
                        if let Some(slot) = session.slot(message.bound_topic()) {
                            slot.stream.on_live(message);
                        }
                    }
                    Keeping::Live => {
                        let Some(topic) = session.live_topic(message.bound_topic()) else { continue };
                        let qos = if message.is_at_most_once() { 0 } else { topic.qos };
                        if session.queue.len() < LIVE_MESSAGES_MAX {
                            session.queue.push_back(Queued::Live(message, qos));
                        } else {
                            self.shared.service.observe(Observation::QueueFull);
                        }
                    }
                }
            }
            session.queue.extend(mail.ordinary.into_iter().map(Queued::Ordinary));
        }
        match mail.ending {
            Some(Ending::TakenOver) => {
                self.taken_over.get_or_insert(Instant::now() + TAKEOVER_READ_TIMEOUT);
            }
            Some(Ending::Shutdown) => self.stopping = true,
            None => {}
        }
    }

    // ---- packets -------------------------------------------------------------------------------------------------------

    async fn handle_packets(&mut self, departure: &mut Departure<S>) {
        let mut advanced = false;
        let mut delivered = 0;
        while let Some(packet) = self.take_packet() {
            match packet {
                Incoming::Connect(connect) => self.connect(*connect, departure).await,
                Incoming::Publish(publish) => self.publish(publish),
                Incoming::Puback(packet_id) | Incoming::Pubcomp(packet_id) => {
                    advanced |= self.acknowledged(packet_id, &mut delivered);
                }
                Incoming::Pubrec(packet_id, true) => {
                    if let Some(session) = &mut self.session {
                        session.released(packet_id);
                    }
                    self.engine.pubrel(packet_id);
                }
                Incoming::Pubrec(packet_id, false) => {
                    advanced |= self.acknowledged(packet_id, &mut delivered);
                }
                Incoming::Pubrel(packet_id) => self.engine.pubcomp(packet_id, true),
                Incoming::Subscribe { packet_id, filters, identifier } => {
                    let shared_without_own = |one: &Filter| one.no_local && filter::shared(&one.filter).is_some();
                    if identifier == Some(0) {
                        // [MQTT-3.8.2.1.2]
                        self.engine
                            .disconnect(DisconnectReasonCode::ProtocolError, "a subscription identifier is not 0");
                    } else if filters.iter().any(shared_without_own) {
                        // [MQTT-3.8.3-4]
                        let sentence = "a shared subscription cannot be no-local";
                        self.engine.disconnect(DisconnectReasonCode::ProtocolError, sentence);
                    } else {
                        self.subscribe(packet_id, filters, identifier, departure).await;
                    }
                }
                Incoming::Unsubscribe { packet_id, filters } => self.unsubscribe(packet_id, &filters, departure).await,
                Incoming::Pingreq => self.engine.pingresp(),
                Incoming::Disconnect { with_will, session_expiry_s } => {
                    self.disconnect(session_expiry_s).await;
                    self.end.get_or_insert(if with_will { End::ClientWithWill } else { End::Client });
                }
                Incoming::Auth(authentication) => self.authenticate_again(&authentication, departure).await,
                Incoming::Overfull(overfull) => self.refuse_overfull(overfull),
            }
        }
        if advanced {
            self.report_acknowledged();
        }
        if delivered > 0 {
            self.shared.service.observe(Observation::Delivered(delivered));
        }
    }

    /// The next packet, unless the client went too fast: then the packet waits, and with it what comes after and reading. What can be refused
    /// is refused here.
    fn take_packet(&mut self) -> Option<Incoming> {
        loop {
            if self.end.is_some() {
                self.packets.clear();
            }
            let packet = self.packets.front()?;
            if let Some(until) = self.paused_until {
                if Instant::now() < until {
                    return None;
                }
                self.paused_until = None;
                return self.packets.pop_front();
            }
            let (Some(pace), Some(cost)) = (&mut self.pace, packet.cost()) else { return self.packets.pop_front() };
            let may_refuse = packet.is_publish() && self.engine.is_v5();
            match pace.judge(cost, may_refuse, Instant::now()) {
                Verdict::Pass => return self.packets.pop_front(),
                Verdict::Wait { until, limit } => {
                    self.limited(limit);
                    self.paused_until = Some(until);
                    return None;
                }
                Verdict::Refuse { limit } => {
                    self.limited(limit);
                    if let Some(packet) = self.packets.pop_front() {
                        self.refuse_too_fast(packet, limit);
                    }
                }
            }
        }
    }

    fn refuse_too_fast(&mut self, packet: Incoming, limit: &'static str) {
        let (topic, qos, packet_id) = match packet {
            Incoming::Publish(publish) => (publish.topic, publish.qos, publish.packet_id),
            Incoming::Overfull(Overfull::Publish { topic, qos, packet_id, .. }) => (topic, qos, packet_id),
            _ => return,
        };
        self.refuse_publish(&topic, qos, packet_id, &format!("you publish too fast: limits.{limit} is reached"));
    }

    fn refuse_overfull(&mut self, overfull: Overfull) {
        self.limited("user_properties");
        let sentence = format!("a packet has at most {} user properties", self.shared.limits.user_properties);
        match overfull {
            Overfull::Connect => {
                self.refuse_connect(&ConnectRefusal { code: ConnectRefusalCode::QuotaExceeded, reason: sentence })
            }
            Overfull::Publish { topic, qos, packet_id, .. } => self.refuse_publish(&topic, qos, packet_id, &sentence),
            Overfull::Subscribe { packet_id, filters } => {
                self.shared.service.observe(Observation::Refused(RefusalCode::QuotaExceeded));
                let refusal = self.refusal(RefusalCode::QuotaExceeded, &sentence);
                self.engine.suback(packet_id, &vec![Granted::Refused(refusal.code); filters], Some(&refusal.reason));
            }
            Overfull::Other => self.engine.disconnect(DisconnectReasonCode::QuotaExceeded, &sentence),
        }
    }

    /// Refuses a publish because there is too much of something.
    fn refuse_publish(&mut self, topic: &str, qos: u8, packet_id: Option<u16>, sentence: &str) {
        let Some(session) = &self.session else { return };
        let (user, now) = (Arc::clone(&session.key.user), Instant::now());
        let refusal = self.refusal(RefusalCode::QuotaExceeded, sentence);
        if let Some(packet_id) = packet_id {
            self.tell_refusal(&user, topic, Some(packet_id), &refusal);
            self.push_pending(packet_id, qos, now, Some(PublishOutcome::Refused(refusal)));
        } else if self.told_at.is_none_or(|at| now >= at + TOLD_INTERVAL) {
            self.told_at = Some(now);
            self.tell_refusal(&user, topic, None, &refusal);
        } else {
            self.shared.service.observe(Observation::Refused(refusal.code));
        }
    }

    fn limited(&self, limit: &'static str) {
        self.shared.service.observe(Observation::Limited(limit));
    }

    async fn authenticate_again(&mut self, authentication: &Authentication, departure: &mut Departure<S>) {
        let Some(session) = &mut self.session else { return };
        match &session.authentication_method {
            Some(method) if *method == authentication.method => {}
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
        match self.shared.service.authenticate_again(&self.peer, &session.identity, authentication).await {
            Ok(identity) => {
                self.engine.authenticated_again(&authentication.method);
                self.take_identity(identity, departure).await;
            }
            Err(refusal) => {
                tracing::info!(peer = %self.peer, reason = %Escaped(&refusal.reason), "refused to authenticate again");
                self.engine.disconnect(DisconnectReasonCode::NotAuthorized, &refusal.reason);
            }
        }
    }

    async fn connect(&mut self, connect: Connect, departure: &mut Departure<S>) {
        match self.open_session(connect, departure).await {
            Ok(()) => {}
            Err(refusal) => self.refuse_connect(&refusal),
        }
    }

    fn refuse_connect(&mut self, refusal: &ConnectRefusal) {
        tracing::info!(peer = %self.peer, reason = %refusal.reason, "refused a connect");
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
        let identity = self.shared.service.connect(asked).await?;
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
        departure.key = Some(key.clone());
        if let Some(previous) = previous
            && tokio::time::timeout(SETTLE_TIMEOUT, previous.settled()).await.is_err()
        {
            tracing::warn!(user = %Escaped(&key.user), "the session's last connection has not let go of it in time");
        }
        self.shared.service.observe(Observation::Connected);
        self.shared.service.arrived(&key.user);

        let expiry_s = connect.session_expiry_s.min(self.shared.limits.session_expiry_max_s);
        let window = match connect.receive_maximum {
            Some(named) => named.min(WINDOW_MAX),
            None => self.shared.limits.window,
        };
        let unavailable = |error: ServiceError| {
            tracing::error!(%error, "session not available");
            refuse(ConnectRefusalCode::ServerUnavailable, "the session store cannot be read or written now")
        };
        let stored = self.shared.service.load_session(&key).await.map_err(unavailable)?;
        let receiver = Receiver::new(Arc::clone(&self.mailbox), Arc::new(identity), true);
        let mut session = Session::new(key, receiver, expiry_s, usize::from(window.max(1)));
        session.authentication_method = connect.authentication.map(|authentication| authentication.method);
        let stored_expiry_s = stored.as_ref().map(|record| record.expiry_s);
        if stored.is_some() && (connect.clean_start || expiry_s == 0) {
            // A session that ends with this connection needs no record any more: what it restores is in memory now.
            self.shared.service.delete_session(&session.key).await.map_err(unavailable)?;
        }
        let resumed = stored.filter(|_| !connect.clean_start);
        let session_present = resumed.is_some();
        let mut absent = self.shared.absent.take(&session.key);
        if !session_present && let Some(absent) = absent.take() {
            // That session is over.
            self.shared.end_absent(absent).await;
        }
        session.will = connect.will;
        let keep_alive_told = self.keep_alive_told(connect.keep_alive_s);
        let keep_alive_s = keep_alive_told.unwrap_or(connect.keep_alive_s);
        let keep_alive = Duration::from_secs(u64::from(keep_alive_s)) * 3 / 2;
        let silence_max = if keep_alive.is_zero() { self.shared.limits.idle_timeout } else { keep_alive };
        session.silence_max = (!silence_max.is_zero()).then_some(silence_max);

        if let Some(record) = resumed {
            for subscription in record.subscriptions {
                // What was allowed once may not be any more.
                let Ok(to) = self.route_filter(&session.identity, &subscription.filter) else { continue };
                session.subscriptions.push(Subscription { record: subscription, to });
            }
            self.session = Some(session);
            self.take_up(absent, departure);
            self.apply_bound(&record.cursors, departure).await.map_err(unavailable)?;
        } else {
            self.session = Some(session);
        }
        if let Some(session) = &self.session
            && session.is_persistent()
            && (!session_present || stored_expiry_s != Some(expiry_s))
        {
            if session_present {
                self.shared.service.save_session(&session.key, session.record()).await.map_err(unavailable)?;
            } else {
                let created = self.shared.service.create_session(&session.key, session.record()).await;
                created.map_err(|reason| match reason {
                    NotCreated::TooMany(sentence) => {
                        self.limited("sessions_per_user");
                        refuse(ConnectRefusalCode::QuotaExceeded, &sentence)
                    }
                    NotCreated::Unavailable(error) => unavailable(error),
                })?;
            }
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
        });
        self.deadline = None;
        self.timer_at = Instant::now();
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

    fn refusal(&self, code: RefusalCode, sentence: &str) -> Refusal {
        self.shared.refusal(code, sentence)
    }

    fn judge_will(&self, who: &Identity, will: &Will) -> Result<(), Refusal> {
        self.shared.route(who, &will.topic)?;
        self.shared.service.judge_will(who, &will.as_publish(who))
    }

    /// Where a publish goes. Whoever answers to a response topic does so with rights of their own: it has to be one that the publisher may
    /// listen to.
    fn route(&self, who: &Identity, publish: &Publish) -> Result<PublishRoute, Refusal> {
        let route = self.shared.route(who, &publish.topic)?;
        if let (PublishRoute::Ordinary, Some(topic)) = (&route, &publish.properties.response_topic) {
            filter::validate_topic_name(topic, self.shared.limits.topic_levels).map_err(|error| {
                self.refusal(RefusalCode::TopicNameInvalid, &format!("the response topic: {error}"))
            })?;
            if let SubscribeRoute::Refused(refusal) = self.shared.service.route_subscribe(who, topic) {
                return Err(refusal);
            }
        }
        Ok(route)
    }

    /// Publishes what had no room on the bus, as far as there is some now.
    fn publish_held(&mut self) {
        self.bus_retry_at = None;
        while let Some(publish) = self.held.front() {
            if !self.shared.has_room_for(publish.payload.len()) {
                self.bus_retry_at = Some(Instant::now() + BUS_RETRY);
                return;
            }
            if let Some(publish) = self.held.pop_front() {
                self.publish_now(publish);
            }
        }
    }

    fn publish(&mut self, publish: Publish) {
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
        let received_at = Instant::now();
        match self.route(&session.identity, &publish) {
            Ok(PublishRoute::Bound) => {
                let reply = match publish.packet_id {
                    Some(packet_id) => {
                        let token = self.push_pending(packet_id, publish.qos, received_at, None);
                        Reply::new(Arc::clone(&self.mailbox), token)
                    }
                    None => Reply::nobody(),
                };
                self.unsent.push(BoundPublish {
                    user,
                    roles,
                    topic: publish.topic,
                    payload: publish.payload,
                    response_topic: publish.properties.response_topic,
                    correlation: publish.properties.correlation_data.unwrap_or_default(),
                    id_property: publish
                        .properties
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
                let message = Message {
                    topic: topic.as_str().into(),
                    payload: publish.payload,
                    qos: publish.qos,
                    retain: publish.retain,
                    publisher: self.number.0,
                    number: 0,
                    properties: publish.properties,
                };
                let source = Some(Arc::clone(&session.identity));
                let outcome = match self.shared.publish_ordinary(message, source) {
                    Ok(()) => PublishOutcome::Stored { subscribers: true, properties: Vec::new() },
                    Err(full) => {
                        self.limited(match full {
                            RetainedFull::Messages { .. } => "retained_messages",
                            RetainedFull::Bytes { .. } => "retained_bytes",
                        });
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

    fn submit(&mut self) {
        if self.unsent.is_empty() || self.waiting.is_some() {
            return;
        }
        if let Err(unsent) = self.shared.service.submit(std::mem::take(&mut self.unsent)) {
            self.unsent = unsent;
            let shared = Arc::clone(&self.shared);
            self.waiting = Some(Box::pin(async move { shared.service.ready().await }));
        }
    }

    fn answer_pending(&mut self) {
        while let Some(pending) = self.pending.front_mut() {
            let Some(outcome) = pending.outcome.take() else { break };
            let (packet_id, qos, received_at) = (pending.packet_id, pending.qos, pending.received_at);
            self.pending.pop_front();
            self.first_token += 1;
            match outcome {
                PublishOutcome::Stored { subscribers, properties } => {
                    self.engine.acknowledge(packet_id, qos, &Ack::Stored { subscribers, properties: &properties });
                    self.shared.service.observe(Observation::PublishToPuback(received_at.elapsed()));
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

    // ---- subscriptions -------------------------------------------------------------------------------------------------

    async fn subscribe(
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
            self.limited("filters_per_user");
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
                session.subscriptions.push(subscription);
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
    fn route_filter(&self, who: &Identity, subscribed: &str) -> Result<Subscribed, Refusal> {
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
            departure.ordinary.push(record.filter.clone());
        }
        Ok(())
    }

    /// Goes on where the session's last connection ended: its ordinary subscriptions are this connection's now, and what waited comes first.
    fn take_up(&mut self, absent: Option<AbsentSession>, departure: &mut Departure<S>) {
        let Some(session) = &mut self.session else { return };
        let records: Vec<&SubscriptionRecord> = session.ordinary().collect();
        departure.ordinary.extend(records.iter().map(|record| record.filter.clone()));
        let (old, filters) = match &absent {
            Some(absent) => (absent.number, absent.filters().collect()),
            None => (self.number.0, Vec::new()),
        };
        self.shared.subscriptions.replace(filters, old, records, self.number.0, &session.receiver);
        let Some(AbsentSession { receiver, under_way, .. }) = absent else { return };
        let UnderWay { received, resend, queue } = under_way;
        self.engine.restore_qos2_received(received);
        session.resend = resend;
        session.resend.retain(|one| self.engine.reserve(one.packet_id));
        session.queue = queue;
        session.queue.retain(|queued| match queued {
            Queued::Again(_, packet_id) | Queued::Release(packet_id) => self.engine.reserve(*packet_id),
            Queued::Ordinary(_) | Queued::Live(..) | Queued::Retained(_) => true,
        });
        let waited = receiver.mailbox.take_ordinary().into_iter().filter(|ordinary| ordinary.qos > 0);
        session.queue.extend(waited.map(Queued::Ordinary));
    }

    /// Rights have changed: who is this now, and what may it still do?
    async fn look_at_rights(&mut self, departure: &mut Departure<S>) {
        let Some(session) = &mut self.session else { return };
        match self.shared.service.recheck(&session.identity) {
            Some(identity) => self.take_identity(identity, departure).await,
            None => {
                session.will = None;
                self.engine
                    .disconnect(DisconnectReasonCode::NotAuthorized, "you may not be here any more: log in again");
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

    async fn unsubscribe(&mut self, packet_id: u16, filters: &[String], departure: &mut Departure<S>) {
        let Some(session) = &mut self.session else {
            self.engine.fault.get_or_insert(mqtt_protocol_core::mqtt::result_code::MqttError::ProtocolError);
            return;
        };
        let mut existed = Vec::with_capacity(filters.len());
        for filter in filters {
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

    fn end_unavailable(&mut self, error: &ServiceError) {
        tracing::error!(%error, "subscriptions could not be stored");
        self.engine.disconnect(DisconnectReasonCode::ServerBusy, "the session store cannot be read or written now");
    }

    async fn after_subscriptions(&mut self, changed: bool, departure: &mut Departure<S>) -> Result<(), ServiceError> {
        if !changed {
            return Ok(());
        }
        self.apply_bound(&[], departure).await?;
        if let Some(session) = &self.session
            && session.is_persistent()
        {
            self.shared.service.save_session(&session.key, session.record()).await?;
        }
        Ok(())
    }

    /// Brings streams and registrations in line with the subscriptions. Whoever is registered before the log is read misses nothing.
    async fn apply_bound(
        &mut self,
        cursors: &[(Arc<str>, Position)],
        departure: &mut Departure<S>,
    ) -> Result<(), ServiceError> {
        // Streams may go now; what they were told last must not go with them.
        self.report_acknowledged();
        let Some(session) = &mut self.session else { return Ok(()) };
        let wanted = session.wanted();
        session.slots.retain(|slot| wanted.iter().any(|wanted| wanted.topic.name == slot.topic));
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
                departure.bound.push(Arc::clone(&topic.name));
                if topic.keeping == Keeping::Live {
                    let subscriber = Subscriber { mailbox: Arc::clone(&self.mailbox) };
                    self.shared.service.subscribed(&session.key.user, &topic.name, subscriber);
                }
            }
            if topic.keeping == Keeping::Live {
                session.live_topics.push(LiveTopic { name: topic.name, qos, identifiers });
            } else if session.is_new_stream(&topic) {
                let stored = cursors.iter().find(|(name, _)| *name == topic.name).map(|(_, position)| *position);
                let after = match stored {
                    Some(position) => position,
                    None => self.shared.service.start(&session.key.user, &topic.name).await?,
                };
                let stream = DurableStream::new(after, self.shared.service.head());
                session.slots.push(Slot { topic: topic.name, qos, identifiers, stream });
            } else if let Some(slot) = session.slot(&topic.name) {
                slot.qos = qos;
                slot.identifiers = identifiers;
            }
        }
        Ok(())
    }

    async fn disconnect(&mut self, session_expiry_s: Option<u32>) {
        let holds = self.holds_session();
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

    // ---- deliveries ----------------------------------------------------------------------------------------------------

    fn take_page(&mut self) {
        let Some((topic, page)) = self.page.take() else { return };
        let Some(slot) = self.session.as_mut().and_then(|session| session.slot(&topic)) else { return };
        match page {
            Ok(page) => slot.stream.on_page(page),
            Err(error) => {
                tracing::error!(%error, topic = %slot.topic, "the log could not be read; trying again");
                slot.stream.on_read_failed();
                self.retry_at = Some(Instant::now() + READ_RETRY);
            }
        }
    }

    /// Sends whatever the client has room for, and reads the log for more.
    fn deliver(&mut self) {
        let Some(session) = &mut self.session else { return };
        if self.end.is_some() || self.engine.closing {
            return;
        }
        let mut has_room = true;
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
            let identifiers = &session.slots[index].identifiers;
            let sent = send_ready(&mut self.engine, &topic, &ready, slot_qos, retain, again, identifiers);
            if let Ready::Live(message) = &ready
                && message.received_us != 0
            {
                let age = self.shared.since_micros(message.received_us);
                self.shared.service.observe(Observation::PublishToDelivery(age));
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
        if has_room && self.reading.is_none() && self.retry_at.is_none() {
            let window_has_room = session.has_room();
            for slot in &mut session.slots {
                if slot.qos > 0 && !window_has_room {
                    continue;
                }
                let Some(after) = slot.stream.begin_read(self.shared.service.head()) else { continue };
                let shared = Arc::clone(&self.shared);
                let (user, topic) = (Arc::clone(&session.key.user), Arc::clone(&slot.topic));
                let reading = async move {
                    let limit = ReadLimit { messages: PAGE_MESSAGES, bytes: PAGE_BYTES };
                    shared.service.read(&user, &topic, after, limit).await
                };
                self.reading = Some((Arc::clone(&slot.topic), Box::pin(reading)));
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
            self.shared.service.observe(Observation::MessagesSent(messages_sent));
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
                            message: found.message,
                        }));
                    }
                    continue;
                }
                Queued::Live(message, qos) => {
                    let topic = session.live_topic(message.bound_topic());
                    let sent = self.engine.publish(Outgoing {
                        topic: &message.topic,
                        payload: &message.payload,
                        qos,
                        retain: message.is_retained(),
                        user_properties: UserProperties::Live(&message),
                        properties: None,
                        expiry_s: None,
                        identifiers: topic.map_or(&[], |topic| &topic.identifiers),
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
    fn acknowledged(&mut self, packet_id: u16, delivered: &mut u64) -> bool {
        let Some(session) = &mut self.session else { return false };
        let Some(Target::Stream(topic, position)) = session.acknowledged(packet_id) else { return false };
        *delivered += 1;
        session.slot(&topic).is_some_and(|slot| slot.stream.on_acknowledged(position))
    }

    fn on_all_written(&mut self) {
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

    fn report_acknowledged(&mut self) {
        let Some(session) = &mut self.session else { return };
        let persistent = session.is_persistent();
        for slot in &mut session.slots {
            if let Some((after, position)) = slot.stream.take_advance() {
                self.shared.service.acknowledged(&session.key, persistent, &slot.topic, after, position);
            }
        }
    }

    // ---- the end -------------------------------------------------------------------------------------------------------

    /// Nobody else works on the session: the next connection, if there is one, waits for this one to settle, though not for ever.
    fn holds_session(&self) -> bool {
        self.taken_over.is_none_or(|until| Instant::now() < until + TAKEOVER_READ_TIMEOUT)
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
        let holds = self.holds_session();
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
                DelayedWill { will, due: due.unwrap_or(now) }
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
            self.shared.park(session.key.clone(), absent);
            // Before the next connection loads it.
            self.shared.service.session_ended(&session.key, session.expiry_s);
        }
        self.mailbox.settle();
    }

    async fn depart(mut self, end: End, departure: &mut Departure<S>) {
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
            self.shared.publish_will(&session.identity, will).await;
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
