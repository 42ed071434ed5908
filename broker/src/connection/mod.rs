//! One connection: its socket, its session, its window.
//!
//! One task owns all of it. It wakes for bytes, for mail, for a page from the log or for a deadline, does everything that is to do, and writes
//! once. It never waits for one thing while another is due, except for answers that MQTT orders (CONNECT, SUBSCRIBE). Invariants:
//! acknowledgements leave in the order of the publishes; nothing is acknowledged that the service did not store; what is kept
//! for a client is bounded by its window and the mailbox, whatever waits for it.

mod delivering;
mod ending;
mod opening;
mod publishing;
mod subscribing;
mod transport;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mqtt_protocol_core::mqtt::result_code::DisconnectReasonCode;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Sleep;

use self::ending::Departure;
use crate::broker::Shared;
use crate::engine::{Engine, Incoming, Publish};
use crate::mailbox::{Ending, Mail, Mailbox};
use crate::rate::{Pace, Verdict};
use crate::registry::ConnectionNumber;
use crate::service::{
    BoundPublish, Observation, Page, Peer, Position, PublishOutcome, Refusal, RefusalCode, Service, ServiceError,
};
use crate::session::{Queued, Session};
use crate::turns::{Turn, Turns};

/// Bytes read at once, into one buffer a thread.
const READ_BYTES: usize = 64 * 1024;
/// Bytes read before others have their turn.
const READ_IN_TURN_MAX: u32 = 64 * 1024;
/// Reading stops while so many bytes wait for the socket.
const OUT_READING_MAX: usize = 256 * 1024;
/// Reading stops while so many publishes wait for their answers. Only MQTT 3.1.1 gets there, which knows no receive maximum.
const PENDING_READING_MAX: usize = 1_024;
/// How long a connection whose session was taken over reads what its client had sent before.
const TAKEOVER_READ_TIMEOUT: Duration = Duration::from_millis(500);

thread_local! {
    /// For the packets of a turn: nearly always they are worked off when it ends.
    static PACKETS: Cell<VecDeque<Incoming>> = const { Cell::new(VecDeque::new()) };
    static READ_BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// What was read from the log, for a topic.
type Read = (Arc<str>, Result<Page, ServiceError>);
type Reading = Pin<Box<dyn Future<Output = Read> + Send>>;
type Waiting<P> = Pin<Box<dyn Future<Output = Option<P>> + Send>>;
/// Work on a packet that takes time.
type Working<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

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

pub(crate) struct Connection<S: Service, T> {
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
    /// Nothing that is written arrives any more. What the client sent before is still read and worked off, a DISCONNECT with it.
    cut: bool,
    mailbox: Arc<Mailbox>,
    session: Option<Session>,
    pending: VecDeque<Pending>,
    /// Token of the first in `pending`.
    first_token: u64,
    unsent: Vec<BoundPublish>,
    /// Publishes that wait for room on the bus of ordinary messages, and those behind them.
    held: VecDeque<Publish>,
    /// For room for `unsent`.
    waiting: Option<Waiting<S::Place>>,
    reading: Option<Reading>,
    page: Option<Box<Read>>,
    /// QoS 0 deliveries that count as delivered once they are written.
    unwritten: Vec<(Arc<str>, Position)>,
    heard_at: Instant,
    /// When the client took bytes last.
    wrote_at: Instant,
    /// Nothing was read from it when that was looked at last.
    deaf: bool,
    moments: Option<Box<Moments>>,
    /// Rights have changed.
    recheck: bool,
    /// How often they had when this connection was looked at last.
    rights_seen: u64,
    timer: Pin<Box<Sleep>>,
    timer_at: Instant,
    /// There is more to do at once than was done.
    busy: bool,
    /// The socket had nothing more to read.
    dry: bool,
    /// Read since others had their turn.
    read_in_turn: u32,
    /// How fast it may go; known when its user is.
    pace: Option<Pace>,
    /// The server stops: what was published is still answered, nothing more is read.
    stopping: bool,
    end: Option<End>,
    /// It has no session yet, or is still sent what it missed first: it is served in turns, after those who are there.
    coming: Option<Box<Coming>>,
}

/// What matters to somebody who comes.
struct Coming {
    turn: Turn,
    /// When there has to be a session.
    connect_by: Instant,
    /// Bytes that may still be read before that.
    bytes_left: u32,
}

/// Moments that matter to few.
#[derive(Default)]
struct Moments {
    /// When the log is read again.
    retry_at: Option<Instant>,
    /// When there may be room on the bus of ordinary messages.
    bus_retry_at: Option<Instant>,
    /// The session's next connection is there, and waits until then for what this one has read and done.
    taken_over: Option<Instant>,
    /// Until then the first of `packets` waits, which was paid for.
    paused_until: Option<Instant>,
    /// When the client was last told that its QoS 0 publishes go nowhere.
    told_at: Option<Instant>,
}

impl Moments {
    const NONE: Self = Self { retry_at: None, bus_retry_at: None, taken_over: None, paused_until: None, told_at: None };
}

impl<S, T> Connection<S, T>
where
    S: Service,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    pub(crate) fn new(shared: Arc<Shared<S>>, number: ConnectionNumber, io: T, peer: Peer) -> Box<Self> {
        let now = Instant::now();
        let deadline = now + shared.limits.connect_timeout;
        // On the heap: the task's future would have it, and what it is made of, several times over.
        Box::new(Self {
            engine: Engine::new(&shared.limits),
            mailbox: Arc::new(shared.mailbox()),
            rights_seen: shared.rights(),
            coming: Some(Box::new(Coming {
                turn: Turn::None,
                connect_by: deadline,
                bytes_left: shared.limits.connect_bytes,
            })),
            shared,
            number,
            io,
            peer,
            packets: VecDeque::new(),
            early: Vec::new(),
            out_at: 0,
            needs_flush: false,
            cut: false,
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
            wrote_at: now,
            deaf: false,
            moments: None,
            recheck: false,
            timer: Box::pin(tokio::time::sleep_until(deadline.into())),
            timer_at: deadline,
            busy: false,
            dry: false,
            read_in_turn: 0,
            pace: None,
            stopping: false,
            end: None,
        })
    }

    /// Serves it until it ends.
    pub(crate) async fn live(mut self: Box<Self>) {
        // The guard leaves no trace of the connection behind, even if a bug makes the task panic.
        let mut departure = Departure {
            shared: Arc::clone(&self.shared),
            number: self.number,
            mailbox: Arc::clone(&self.mailbox),
            key: None,
            ordinary: Vec::new(),
            bound: Vec::new(),
        };
        let end = self.serve(&mut departure).await;
        Box::pin(self.depart(end, &mut departure)).await;
    }

    async fn serve(&mut self, departure: &mut Departure<S>) -> End {
        loop {
            if self.busy {
                // Others first.
                tokio::task::yield_now().await;
            }
            std::future::poll_fn(|cx| self.poll_step(cx)).await;
            if self.end == Some(End::Socket) {
                let (turns, turn) = self.take_turn();
                drop(Box::pin(turns.work(turn, self.finish(End::Socket, departure))).await);
                return End::Socket;
            }
            self.take_page();
            if std::mem::take(&mut self.recheck) {
                let (turns, turn) = self.take_turn();
                let (_, turn) = Box::pin(turns.work(turn, self.look_at_rights(departure))).await;
                self.give_turn(turn);
            }
            self.publish_held();
            loop {
                let Some(working) = self.handle_packets(departure) else { break };
                let (_, turn) = working.await;
                self.give_turn(turn);
            }
            if self.packets.is_empty() && self.packets.capacity() > 0 {
                PACKETS.set(std::mem::take(&mut self.packets));
            }
            self.submit(None);
            self.answer_pending();
            self.deliver();
            self.on_time();
            if self.moments().taken_over.is_some_and(|until| self.dry || Instant::now() >= until) && self.end.is_none()
            {
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
                let (turns, turn) = self.take_turn();
                drop(Box::pin(turns.work(turn, self.finish(end, departure))).await);
                return end;
            }
            if self.read_in_turn >= READ_IN_TURN_MAX {
                // A client that sends faster than it is worked off must not keep a thread for itself.
                self.read_in_turn = 0;
                tokio::task::yield_now().await;
            }
        }
    }

    fn take_turn(&mut self) -> (Turns, Turn) {
        // What follows takes time, and others wait for the place that this may have been given: it is asked for again afterwards.
        self.waiting = None;
        let own = self.coming.as_deref_mut().map(|coming| std::mem::take(&mut coming.turn));
        (self.shared.turns.clone(), own.unwrap_or_default())
    }

    /// Whoever comes goes on in this turn; for others it is over.
    fn give_turn(&mut self, turn: Turn) {
        if let Some(coming) = self.coming.as_deref_mut() {
            coming.turn = turn;
        }
    }

    fn moments(&self) -> &Moments {
        self.moments.as_deref().unwrap_or(&Moments::NONE)
    }

    fn moments_mut(&mut self) -> &mut Moments {
        self.moments.get_or_insert_default()
    }

    // ---- deadlines -----------------------------------------------------------------------------------------------------

    fn on_time(&mut self) {
        let now = Instant::now();
        let (paused, was_deaf) = (self.is_paused(), self.deaf);
        self.deaf = paused || self.takes_no_bytes();
        if paused || (was_deaf && !self.deaf) {
            // It could not be heard, and that was not its doing; or it is only now that it can be.
            self.heard_at = now;
        }
        if self.moments().retry_at.is_some_and(|retry_at| now >= retry_at) {
            self.moments_mut().retry_at = None;
            self.deliver();
        }
        let connect_by = self.coming.as_deref().filter(|_| self.session.is_none()).map(|coming| coming.connect_by);
        if connect_by.is_some_and(|connect_by| now >= connect_by) {
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
        let Moments { retry_at, bus_retry_at, taken_over, paused_until, told_at: _ } = *self.moments();
        let waits = [connect_by, silent_until, expires_at, retry_at, bus_retry_at, taken_over, paused_until];
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
        // It is not read from as long as it takes nothing: taking something is then what shows that it is there.
        let alive_at = if self.takes_no_bytes() { self.heard_at.max(self.wrote_at) } else { self.heard_at };
        Some(alive_at + silence_max)
    }

    fn takes_no_bytes(&self) -> bool {
        self.engine.out.len() - self.out_at >= OUT_READING_MAX
    }

    /// Nothing is read from the client, for a reason of the server's.
    fn is_paused(&self) -> bool {
        !self.unsent.is_empty()
            || !self.held.is_empty()
            || self.moments().paused_until.is_some()
            || self.pending.len() >= PENDING_READING_MAX
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
            for message in mail.durable {
                session.bus_seen = session.bus_seen.max(message.position);
                if let Some(slot) = session.slot(message.bound_topic()) {
                    slot.stream.on_live(message);
                }
            }
            for event in mail.events {
                let Some(topic) = session.live_topic(event.message.bound_topic()) else { continue };
                let qos = if event.message.is_at_most_once() { 0 } else { topic.qos };
                session.queue.push_back(Queued::Live(event, qos));
            }
            for _ in 0..mail.events_dropped {
                self.shared.service.observe(Observation::QueueFull);
            }
            session.queue.extend(mail.ordinary.into_iter().map(Queued::Ordinary));
        }
        match mail.ending {
            Some(Ending::TakenOver) => {
                self.moments_mut().taken_over.get_or_insert(Instant::now() + TAKEOVER_READ_TIMEOUT);
            }
            Some(Ending::Shutdown) => self.stopping = true,
            None => {}
        }
    }

    // ---- packets -------------------------------------------------------------------------------------------------------

    /// Works off the packets, up to one that takes time: the work on that is given back. It lies on the heap, for every connection would have
    /// room for it all along, and it is rare.
    fn handle_packets<'a>(
        &'a mut self,
        departure: &'a mut Departure<S>,
    ) -> Option<Pin<Box<impl Future<Output = ((), Turn)> + Send + 'a>>> {
        let mut advanced = false;
        let mut delivered = 0;
        let mut slow = None;
        while let Some(packet) = self.take_packet() {
            match packet {
                Incoming::Publish(publish) => self.publish(publish),
                Incoming::Puback(packet_id) | Incoming::Pubcomp(packet_id) | Incoming::Pubrec(packet_id, false) => {
                    advanced |= self.acknowledged(packet_id, &mut delivered);
                }
                Incoming::Pubrec(packet_id, true) => {
                    if let Some(session) = &mut self.session {
                        session.released(packet_id);
                    }
                    self.engine.pubrel(packet_id);
                }
                Incoming::Pubrel(packet_id, known) => self.engine.pubcomp(packet_id, known),
                Incoming::Repeated { .. } => {}
                Incoming::Pingreq => self.engine.pingresp(),
                Incoming::Overfull(overfull) => self.refuse_overfull(overfull),
                Incoming::Connect(_)
                | Incoming::Subscribe { .. }
                | Incoming::Unsubscribe { .. }
                | Incoming::Disconnect { .. }
                | Incoming::Auth(_) => {
                    slow = Some(packet);
                    break;
                }
            }
        }
        if advanced {
            self.report_acknowledged();
        }
        if delivered > 0 {
            self.shared.service.observe(Observation::Delivered(delivered));
        }
        let packet = slow?;
        let (turns, turn) = self.take_turn();
        // Each has as much room as it needs: that of a CONNECT is many times that of the others.
        let work: Working<'a> = match packet {
            Incoming::Connect(connect) => Box::pin(self.connect(*connect, departure)),
            Incoming::Subscribe { packet_id, filters, identifier } => {
                Box::pin(self.subscribe(packet_id, filters, identifier, departure))
            }
            Incoming::Unsubscribe { packet_id, filters } => Box::pin(self.unsubscribe(packet_id, filters, departure)),
            Incoming::Auth(authentication) => Box::pin(self.authenticate_again(authentication, departure)),
            Incoming::Disconnect { with_will, session_expiry_s } => {
                Box::pin(self.disconnect(with_will, session_expiry_s))
            }
            _ => return None,
        };
        Some(Box::pin(turns.work(turn, work)))
    }

    /// The next packet, unless the client went too fast: then the packet waits, and with it what comes after and reading. What can be refused
    /// is refused here.
    fn take_packet(&mut self) -> Option<Incoming> {
        loop {
            if self.end.is_some() {
                self.packets.clear();
            }
            let packet = self.packets.front()?;
            if let Some(moments) = &mut self.moments
                && let Some(until) = moments.paused_until
            {
                if Instant::now() < until {
                    return None;
                }
                moments.paused_until = None;
                return self.packets.pop_front();
            }
            let (Some(pace), Some(cost)) = (&mut self.pace, packet.cost()) else { return self.packets.pop_front() };
            let may_refuse = packet.is_publish() && self.engine.is_v5();
            match pace.judge(cost, may_refuse, Instant::now()) {
                Verdict::Pass => return self.packets.pop_front(),
                Verdict::Wait { until, limit } => {
                    self.limited(limit);
                    self.moments_mut().paused_until = Some(until);
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

    fn limited(&self, limit: &'static str) {
        self.shared.service.observe(Observation::Limited(limit));
    }

    fn refusal(&self, code: RefusalCode, sentence: &str) -> Refusal {
        self.shared.refusal(code, sentence)
    }
}
