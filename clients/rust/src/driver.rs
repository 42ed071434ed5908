//! The client's task: it owns the connection, the outbox and whatever waits, and wakes for a command, for what the link tells, for what the
//! program gives back, for the outbox or for a deadline. Decisions are made by [`Sending`] and [`Deliveries`]; it carries them out.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hasher;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use chat_protocol::Envelope;
use chat_protocol::event::TypingState;
use chat_protocol::request::Method;
use chat_protocol::topic::Down;
use chat_protocol::{ErrorCode, MessageId, Seq, Timestamp, UserId};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::answer::Answer;
use crate::deliveries::{Arrived, Deliveries, Returns, Ticket};
use crate::error::{Closed, ConnectError, OutboxError, Refusal, RequestError, SendError};
use crate::event::{ConnectionState, Delivery, Event, Stored};
use crate::events::{Events, Teller, events};
use crate::link::{Ended, Incoming, Link, LinkEvent, Outgoing, QueueFull, Token, UnackedPacket};
use crate::options::{Credential, Options, Session};
use crate::outbox::{Change, Key, Outbox, Unsent};
use crate::sending::{Outcome, Sending, is_passing};

/// Requests that wait for an answer, at most.
pub const REQUESTS_MAX: usize = 256;
/// Link events between the two tasks.
const LINK_EVENTS_MAX: usize = 256;
/// Servers remember ids for seven days at least; an hour is left for clocks that differ.
const ID_MEMORY: Duration = Duration::from_secs((7 * 24 - 1) * 3_600);
/// A connection that lived so long was a good one: the next failure begins with the shortest wait again.
const GOOD_CONNECTION: Duration = Duration::from_secs(20);
/// Tokens that are refused one after the other before the login is.
const TOKENS_MAX: u32 = 3;
/// How long requests wait that the server could not take.
const REQUESTS_PAUSE: Duration = Duration::from_millis(500);
/// How long goodbye may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

type Waiter = oneshot::Sender<Result<Stored, SendError>>;
type Outcomes = oneshot::Receiver<Result<Stored, SendError>>;

/// What a handle asks.
pub(crate) enum Command {
    Queue { id: MessageId, to: UserId, text: String, reply: oneshot::Sender<Result<(MessageId, Outcomes), SendError>> },
    Read { with: UserId, seq: Seq, reply: oneshot::Sender<Result<(), RequestError>> },
    Typing { to: UserId, state: TypingState },
    Ask { method: Method, members: Value, reply: oneshot::Sender<Result<Value, RequestError>> },
    Close { reply: oneshot::Sender<()> },
}

/// Why the client has ended, for those who ask later.
#[derive(Debug, Default)]
pub(crate) struct ClosedSlot(Mutex<Option<Closed>>);

impl ClosedSlot {
    pub(crate) fn get(&self) -> Closed {
        self.0.lock().clone().unwrap_or(Closed::ByUs)
    }
}

pub(crate) fn new_id() -> MessageId {
    MessageId::parse(&uuid::Uuid::now_v7().to_string()).expect("a UUID is hexadecimal digits and hyphens")
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A request that waits.
struct Asked {
    method: Method,
    members: Value,
    deadline: Instant,
    /// On this connection.
    published: bool,
    reply: oneshot::Sender<Result<Value, RequestError>>,
}

/// A message that is on its way into the outbox.
struct Queuing {
    reply: oneshot::Sender<Result<(MessageId, Outcomes), SendError>>,
    waiter: Waiter,
    outcome: Outcomes,
}

/// How far a conversation was read, as long as the server has not confirmed it, whether anybody waits for that or not.
struct Reading {
    seq: Seq,
    published: Option<Seq>,
    readers: Vec<Reader>,
}

/// Somebody who waits for that.
struct Reader {
    deadline: Instant,
    reply: oneshot::Sender<Result<(), RequestError>>,
}

/// The end, and who waits for it.
struct Ending {
    why: Closed,
    reply: Option<oneshot::Sender<()>>,
    /// What the first attempt met, for whoever waits for that.
    unreachable: Option<String>,
}

impl From<Closed> for Ending {
    fn from(why: Closed) -> Self {
        Self { why, reply: None, unreachable: None }
    }
}

/// The outbox, or the thread that has it now.
enum Desk {
    Idle(Box<dyn Outbox>),
    Busy(JoinHandle<Written>),
    /// It is closed, or a thread that panicked took it along.
    Gone,
}

struct Written {
    outbox: Box<dyn Outbox>,
    changes: Vec<Change>,
    outcome: Result<(), OutboxError>,
}

/// The connection.
enum Connection {
    /// To be made then.
    None {
        retry_at: Instant,
    },
    /// It is being made.
    Opening(Link),
    /// Accepted, and the subscriptions are asked for.
    Subscribing {
        link: Link,
        resumed: bool,
        publishes_per_s: Option<u32>,
        packet_bytes_max: usize,
    },
    Open {
        link: Link,
        since: Instant,
        packet_bytes_max: usize,
    },
}

struct Driver {
    options: Options,
    tls: Option<Arc<rustls::ClientConfig>>,
    /// Where answers to this device come.
    response_topic: String,
    /// Other devices' answers, and those of an earlier run, are none of ours.
    asker: u64,
    commands: mpsc::Receiver<Command>,
    link_events: mpsc::Receiver<(u64, LinkEvent)>,
    link_events_sender: mpsc::Sender<(u64, LinkEvent)>,
    first: Option<oneshot::Sender<Result<(), ConnectError>>>,
    closed: Arc<ClosedSlot>,
    connection: Connection,
    /// Of the current link; events of earlier ones are late.
    link_number: u64,
    failures: u32,
    logins_refused: u32,
    connected_before: bool,
    desk: Desk,
    changes: Vec<Change>,
    queuing: HashMap<Key, Queuing>,
    sending: Sending,
    waiters: HashMap<Key, Waiter>,
    deliveries: Deliveries<UnackedPacket>,
    returns: Arc<Returns>,
    asked: BTreeMap<u64, Asked>,
    next_request: u64,
    /// Not to be published before then.
    requests_paused_until: Option<Instant>,
    reading: HashMap<UserId, Reading>,
    /// Dropped last: whoever hears of the end may open the outbox again.
    events: Teller,
}

pub(crate) async fn start(
    options: Options,
    commands: mpsc::Receiver<Command>,
    first: Option<oneshot::Sender<Result<(), ConnectError>>>,
) -> Result<(Events, Arc<ClosedSlot>), ConnectError> {
    let tls = if options.transport.is_tls() { Some(options.tls()?) } else { None };
    let mut outbox = std::mem::replace(&mut *options.outbox.lock(), Box::new(crate::outbox::MemoryOutbox));
    let (outbox, loaded) = tokio::task::spawn_blocking(move || {
        let loaded = outbox.load();
        (outbox, loaded)
    })
    .await
    .map_err(|error| OutboxError::Other(format!("reading it failed: {error}")))?;
    let (teller, events) = events();
    let (link_events_sender, link_events) = mpsc::channel(LINK_EVENTS_MAX);
    // Stable for a device: with a durable session the subscription is stored.
    let mut hasher = siphasher::sip128::SipHasher13::new();
    hasher.write(options.device.as_bytes());
    let token = siphasher::sip128::Hasher128::finish128(&hasher).as_u128();
    let closed = Arc::new(ClosedSlot::default());
    let mut driver = Driver {
        response_topic: format!("chat/{}/res/{token:032x}", options.user),
        options,
        tls,
        asker: fastrand::u64(..),
        commands,
        link_events,
        link_events_sender,
        events: teller,
        first,
        closed: Arc::clone(&closed),
        connection: Connection::None { retry_at: Instant::now() },
        link_number: 0,
        failures: 0,
        logins_refused: 0,
        connected_before: false,
        desk: Desk::Idle(outbox),
        changes: Vec::new(),
        queuing: HashMap::new(),
        sending: Sending::default(),
        waiters: HashMap::new(),
        deliveries: Deliveries::default(),
        returns: Arc::new(Returns::default()),
        asked: BTreeMap::new(),
        next_request: 0,
        requests_paused_until: None,
        reading: HashMap::new(),
    };
    for unsent in loaded? {
        driver.sending.take_up(unsent);
    }
    tokio::spawn(driver.run());
    Ok((events, closed))
}

impl Driver {
    /// Gives back what must not be published again.
    fn give_up_the_too_old(&mut self) {
        let memory_ms = u64::try_from(ID_MEMORY.as_millis()).unwrap_or(u64::MAX);
        for unsent in self.sending.too_old(Timestamp::from_ms(now_ms().saturating_sub(memory_ms))) {
            self.forget(&unsent);
            self.not_sent(unsent, SendError::TooOld);
        }
    }

    async fn run(mut self) {
        let closing = loop {
            self.work();
            match self.wait().await {
                Ok(()) => {}
                Err(closing) => break closing,
            }
        };
        self.end(closing).await;
    }

    /// Waits for anything, and takes it in. An error is the end.
    async fn wait(&mut self) -> Result<(), Ending> {
        let wake_at = self.wake_at();
        let timer = async {
            match wake_at {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let written = async {
            match &mut self.desk {
                Desk::Busy(writing) => writing.await,
                Desk::Idle(_) | Desk::Gone => std::future::pending().await,
            }
        };
        let returned = self.returns.changed.notified();
        tokio::select! {
            command = self.commands.recv() => match command {
                Some(Command::Close { reply }) => return Err(Ending { reply: Some(reply), ..Closed::ByUs.into() }),
                Some(command) => self.command(command),
                None => return Err(Closed::ByUs.into()),
            },
            Some((number, event)) = self.link_events.recv() => {
                if number == self.link_number {
                    self.link_event(event)?;
                }
            }
            written = written => self.written(written)?,
            () = returned => {}
            () = timer => {}
        }
        Ok(())
    }

    fn wake_at(&self) -> Option<Instant> {
        let retry_at = match &self.connection {
            Connection::None { retry_at } => Some(*retry_at),
            _ => None,
        };
        let is_open = matches!(self.connection, Connection::Open { .. });
        let sending = if is_open { self.sending.wake_at() } else { None };
        let asks = !self.asked.is_empty() || !self.reading.is_empty();
        let requests = if is_open && asks { self.requests_paused_until } else { None };
        let asked = self.asked.values().map(|asked| asked.deadline).min();
        let readers = self.reading.values().flat_map(|reading| &reading.readers).map(|reader| reader.deadline).min();
        [retry_at, sending, requests, asked, readers].into_iter().flatten().min()
    }

    /// Everything that can be done now.
    fn work(&mut self) {
        let now = Instant::now();
        for (key, fate) in self.returns.take() {
            self.deliveries.returned(&key, fate);
        }
        self.time_out(now);
        if matches!(&self.connection, Connection::None { retry_at } if now >= *retry_at) {
            self.link_number += 1;
            let sender = self.link_events_sender.clone();
            let link = Link::open(&self.options, self.tls.as_ref(), self.link_number, sender);
            self.connection = Connection::Opening(link);
        }
        if self.publish(now).is_err() {
            self.lost("the server does not take what is sent to it".to_owned());
        }
        self.write_outbox();
    }

    fn publish(&mut self, now: Instant) -> Result<(), QueueFull> {
        self.publish_messages(now)?;
        let Connection::Open { link, packet_bytes_max, .. } = &self.connection else { return Ok(()) };
        while let Some(packet) = self.deliveries.next_acknowledged() {
            link.acknowledge(&packet)?;
        }
        let me = &self.options.user;
        if self.requests_paused_until.is_some_and(|until| now < until) {
            return Ok(());
        }
        self.requests_paused_until = None;
        for (with, reading) in &mut self.reading {
            if reading.published < Some(reading.seq) {
                reading.published = Some(reading.seq);
                let topic = format!("chat/{me}/read/{with}");
                let payload = reading.seq.to_string().into_bytes();
                let outgoing = Outgoing { topic, payload, answer_to: None };
                link.publish(Token::Read(with.clone(), reading.seq), outgoing)?;
            }
        }
        let mut refused = Vec::new();
        for (number, asked) in self.asked.iter_mut().filter(|(_, asked)| !asked.published) {
            asked.published = true;
            let topic = format!("chat/{me}/req/{}", asked.method.as_str());
            let payload = asked.members.to_string().into_bytes();
            let correlation = [self.asker.to_be_bytes(), number.to_be_bytes()].concat();
            let outgoing = Outgoing { topic, payload, answer_to: Some((&self.response_topic, correlation)) };
            match too_large(&outgoing, *packet_bytes_max) {
                Some(refusal) => refused.push((*number, Answer::Refused(refusal))),
                None => link.publish(Token::Request(*number), outgoing)?,
            }
        }
        for (number, refusal) in refused {
            self.answered(Token::Request(number), &refusal);
        }
        Ok(())
    }

    /// As many as may be under way now.
    fn publish_messages(&mut self, now: Instant) -> Result<(), QueueFull> {
        while let Connection::Open { link, packet_bytes_max, .. } = &self.connection
            && let Some(unsent) = self.sending.next(now)
        {
            let topic = format!("chat/{}/out/{}/{}", self.options.user, unsent.to, unsent.id);
            let outgoing = Outgoing { topic, payload: unsent.text.clone().into_bytes(), answer_to: None };
            let token = Token::Message(unsent.key());
            match too_large(&outgoing, *packet_bytes_max) {
                Some(refusal) => self.answered(token, &Answer::Refused(refusal)),
                None => link.publish(token, outgoing)?,
            }
        }
        Ok(())
    }

    fn time_out(&mut self, now: Instant) {
        let late: Vec<u64> =
            self.asked.iter().filter(|(_, asked)| now >= asked.deadline).map(|(number, _)| *number).collect();
        for number in late {
            self.reply(number, Err(RequestError::TimedOut));
        }
        for reading in self.reading.values_mut() {
            for late in reading.readers.extract_if(.., |reader| now >= reader.deadline) {
                // Whoever does not wait any more does not care.
                drop(late.reply.send(Err(RequestError::TimedOut)));
            }
        }
    }

    // ---- commands ------------------------------------------------------------------------------------------------------

    fn command(&mut self, command: Command) {
        match command {
            Command::Queue { id, to, text, reply } => {
                let key = (to.clone(), id.clone());
                if self.queuing.contains_key(&key) || self.sending.has(&key) {
                    // Whoever does not wait any more does not care.
                    drop(reply.send(Err(SendError::SameId(id))));
                    return;
                }
                let (waiter, outcome) = oneshot::channel();
                let queued_at = Timestamp::from_ms(now_ms());
                self.changes.push(Change::Add(Unsent { id, to, text, queued_at }));
                self.queuing.insert(key, Queuing { reply, waiter, outcome });
            }
            Command::Read { with, seq, reply } => {
                let reading = self.reading.entry(with).or_insert(Reading { seq, published: None, readers: Vec::new() });
                reading.seq = reading.seq.max(seq);
                reading.readers.retain(|reader| !reader.reply.is_closed());
                reading.readers.push(Reader { deadline: Instant::now() + self.options.request_timeout, reply });
            }
            Command::Typing { to, state } => {
                if let Connection::Open { link, .. } = &self.connection {
                    let topic = format!("chat/{}/typing/{to}", self.options.user);
                    let payload = match state {
                        TypingState::On => "on",
                        TypingState::Off => "off",
                    };
                    if link.publish_unanswered(topic, payload).is_err() {
                        tracing::debug!("typing was not told: too much waits for the server");
                    }
                }
            }
            Command::Ask { method, members, reply } => {
                if self.asked.len() >= REQUESTS_MAX {
                    // What nobody waits for any more makes room.
                    self.asked.retain(|_, asked| !asked.reply.is_closed());
                }
                if self.asked.len() >= REQUESTS_MAX {
                    // Whoever does not wait any more does not care.
                    drop(reply.send(Err(RequestError::TooMany)));
                    return;
                }
                let deadline = Instant::now() + self.options.request_timeout;
                self.asked.insert(self.next_request, Asked { method, members, deadline, published: false, reply });
                self.next_request += 1;
            }
            Command::Close { reply } => drop(reply),
        }
    }

    fn reply(&mut self, number: u64, outcome: Result<Value, RequestError>) {
        if let Some(asked) = self.asked.remove(&number) {
            // Whoever does not wait any more does not care.
            drop(asked.reply.send(outcome));
        }
    }

    // ---- the outbox ----------------------------------------------------------------------------------------------------

    fn write_outbox(&mut self) {
        if self.changes.is_empty() || !matches!(self.desk, Desk::Idle(_)) {
            return;
        }
        if let Desk::Idle(mut outbox) = std::mem::replace(&mut self.desk, Desk::Gone) {
            let changes = std::mem::take(&mut self.changes);
            self.desk = Desk::Busy(tokio::task::spawn_blocking(move || {
                let outcome = outbox.apply(&changes);
                Written { outbox, changes, outcome }
            }));
        }
    }

    fn written(&mut self, written: Result<Written, tokio::task::JoinError>) -> Result<(), Ending> {
        let Written { outbox, changes, outcome } = match written {
            Ok(written) => written,
            Err(error) => {
                self.desk = Desk::Gone;
                return Err(Closed::Outbox(format!("its thread ended: {error}")).into());
            }
        };
        self.desk = Desk::Idle(outbox);
        if let Err(error) = &outcome {
            tracing::error!(%error, "the outbox could not be written");
        }
        for change in changes {
            // What could not be removed is sent again in the next run, under the same id.
            let Change::Add(unsent) = change else { continue };
            let Some(Queuing { reply, waiter, outcome: outcomes }) = self.queuing.remove(&unsent.key()) else {
                continue;
            };
            match &outcome {
                Ok(()) => {
                    self.waiters.insert(unsent.key(), waiter);
                    // Whoever does not wait any more does not care: it is sent all the same.
                    drop(reply.send(Ok((unsent.id.clone(), outcomes))));
                    self.sending.push(unsent);
                }
                Err(error) => drop(reply.send(Err(SendError::Outbox(error.to_string())))),
            }
        }
        Ok(())
    }

    /// It does not wait any more.
    fn forget(&mut self, unsent: &Unsent) {
        self.changes.push(Change::Remove { to: unsent.to.clone(), id: unsent.id.clone() });
    }

    fn not_sent(&mut self, unsent: Unsent, error: SendError) {
        if let Some(waiter) = self.waiters.remove(&unsent.key())
            && waiter.send(Err(error.clone())).is_ok()
        {
            return;
        }
        self.events.tell(Event::NotSent { id: unsent.id, to: unsent.to, text: unsent.text, error });
    }

    // ---- the link ------------------------------------------------------------------------------------------------------

    fn link_event(&mut self, event: LinkEvent) -> Result<(), Ending> {
        match event {
            LinkEvent::Connected { resumed, publishes_per_s, packet_bytes_max } => {
                self.logins_refused = 0;
                self.connection = match std::mem::replace(&mut self.connection, Connection::gone()) {
                    Connection::Opening(link) => {
                        let Options { user, listen, .. } = &self.options;
                        if link.subscribe(user, *listen, &self.response_topic).is_err() {
                            return self.ended(Ended::Lost("the first packet found no room".to_owned()));
                        }
                        let packet_bytes_max = packet_bytes_max.map_or(usize::MAX, |bytes| bytes as usize);
                        Connection::Subscribing { link, resumed, publishes_per_s, packet_bytes_max }
                    }
                    other => other,
                };
            }
            LinkEvent::Subscribed(Ok(())) => self.subscribed(),
            LinkEvent::Subscribed(Err(reason)) => {
                return Err(Closed::Refused(format!("a subscription: {reason}")).into());
            }
            LinkEvent::Published(incoming) => self.incoming(incoming),
            LinkEvent::Answered(token, answer) => self.answered(token, &answer),
            LinkEvent::Ended(ended) => return self.ended(ended),
        }
        Ok(())
    }

    fn subscribed(&mut self) {
        let now = Instant::now();
        let (resumed, publishes_per_s);
        self.connection = match std::mem::replace(&mut self.connection, Connection::gone()) {
            Connection::Subscribing { link, resumed: is_resumed, publishes_per_s: rate, packet_bytes_max } => {
                (resumed, publishes_per_s) = (is_resumed, rate);
                Connection::Open { link, since: now, packet_bytes_max }
            }
            other => {
                self.connection = other;
                return;
            }
        };
        if self.connected_before && !resumed && self.options.session == Session::Durable {
            tracing::warn!("the server has forgotten this device: it is a new one to it");
        }
        self.connected_before = true;
        self.give_up_the_too_old();
        self.sending.connected(publishes_per_s, now);
        for asked in self.asked.values_mut() {
            asked.published = false;
        }
        self.requests_paused_until = None;
        for reading in self.reading.values_mut() {
            reading.published = None;
        }
        self.events.tell(Event::Connection(ConnectionState::Connected { resumed }));
        if let Some(first) = self.first.take() {
            // Whoever does not wait any more drops the handle too, which is the end.
            drop(first.send(Ok(())));
        }
    }

    fn answered(&mut self, token: Token, answer: &Answer) {
        let now = Instant::now();
        match token {
            Token::Message(key) => {
                let Some((unsent, outcome)) = self.sending.answered(&key, answer, now) else { return };
                self.forget(&unsent);
                match outcome {
                    Outcome::Stored(stored) => {
                        if let Some(waiter) = self.waiters.remove(&key) {
                            // Whoever does not wait any more does not care.
                            drop(waiter.send(Ok(stored)));
                        }
                    }
                    Outcome::Refused(refusal) => self.not_sent(unsent, SendError::Refused(refusal)),
                }
            }
            Token::Read(with, seq) => {
                let Some(reading) = self.reading.get_mut(&with) else { return };
                let outcome = match answer {
                    Answer::Refused(refusal) if is_passing(refusal) => {
                        reading.published = None;
                        self.requests_paused_until = Some(now + REQUESTS_PAUSE);
                        return;
                    }
                    Answer::Refused(refusal) => {
                        Err(RequestError::Refused { code: refusal.code, message: refusal.message.clone() })
                    }
                    Answer::Stored { .. } | Answer::Done => Ok(()),
                };
                if reading.seq > seq {
                    // More was read meanwhile: that is answered too.
                    return;
                }
                if let Some(reading) = self.reading.remove(&with) {
                    for reader in reading.readers {
                        // Whoever does not wait any more does not care.
                        drop(reader.reply.send(outcome.clone()));
                    }
                }
            }
            Token::Request(number) => match answer {
                Answer::Refused(refusal) if is_passing(refusal) => {
                    if let Some(asked) = self.asked.get_mut(&number) {
                        asked.published = false;
                    }
                    self.requests_paused_until = Some(now + REQUESTS_PAUSE);
                }
                Answer::Refused(refusal) => {
                    let (code, message) = (refusal.code, refusal.message.clone());
                    self.reply(number, Err(RequestError::Refused { code, message }));
                }
                // The answer itself comes on the response topic.
                Answer::Stored { .. } | Answer::Done => {}
            },
        }
    }

    fn incoming(&mut self, incoming: Incoming) {
        if incoming.topic == self.response_topic {
            self.answer(&incoming);
        } else if incoming.wants_acknowledgement() {
            self.message(incoming);
        } else {
            match live(&incoming) {
                Some(event) => self.events.tell(event),
                None => tracing::debug!(topic = %incoming.topic, "something came that this version does not know"),
            }
        }
    }

    fn message(&mut self, incoming: Incoming) {
        let message = match Envelope::decode(&incoming.payload) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(topic = %incoming.topic, %error, "a message that cannot be read");
                self.deliveries.passed(incoming.packet);
                return;
            }
        };
        let key = (message.conversation.clone(), message.seq, message.at);
        match self.deliveries.arrived(key.clone(), incoming.packet) {
            Arrived::New => {
                let ticket = Ticket::new(key, &self.returns);
                let (payload, waited) = (incoming.payload, incoming.waited);
                self.events.tell(Event::Message(Delivery { message, waited, payload, ticket }));
            }
            Arrived::Known => {}
        }
    }

    fn answer(&mut self, incoming: &Incoming) {
        let numbers = incoming.correlation.as_deref().and_then(|bytes| bytes.split_first_chunk::<8>());
        let Some((asker, number)) = numbers else { return };
        let Ok(number) = number.try_into().map(u64::from_be_bytes) else { return };
        if u64::from_be_bytes(*asker) != self.asker {
            return;
        }
        #[derive(Deserialize)]
        struct Refused {
            code: String,
            message: String,
        }
        #[derive(Deserialize)]
        struct Answered {
            ok: Option<Value>,
            error: Option<Refused>,
        }
        let outcome = match serde_json::from_slice::<Answered>(&incoming.payload) {
            Ok(Answered { ok: Some(ok), .. }) => Ok(ok),
            Ok(Answered { error: Some(Refused { code, message }), .. }) => {
                let code = ErrorCode::ALL.into_iter().find(|known| known.as_str() == code);
                Err(RequestError::Refused { code, message })
            }
            Ok(_) => Err(RequestError::Answer("neither `ok` nor `error`".to_owned())),
            Err(error) => Err(RequestError::Answer(error.to_string())),
        };
        self.reply(number, outcome);
    }

    /// The link is gone; whether it is tried again.
    fn ended(&mut self, ended: Ended) -> Result<(), Ending> {
        let reason = match ended {
            Ended::Lost(reason) => reason,
            Ended::LoginRefused(reason) => {
                self.logins_refused += 1;
                let may_be_renewed = matches!(self.options.credential, Credential::Token(_)) && self.first.is_none();
                if !may_be_renewed || self.logins_refused >= TOKENS_MAX {
                    return Err(Closed::LoginRefused(reason).into());
                }
                reason
            }
            Ended::Refused(reason) => return Err(Closed::Refused(reason).into()),
            Ended::TakenOver => return Err(Closed::TakenOver.into()),
        };
        if self.first.is_some() {
            return Err(Ending { unreachable: Some(reason), ..Closed::ByUs.into() });
        }
        self.lost(reason);
        Ok(())
    }

    fn lost(&mut self, reason: String) {
        if let Connection::Open { since, .. } = &self.connection
            && since.elapsed() >= GOOD_CONNECTION
        {
            self.failures = 0;
        }
        let limit = self.options.retry_min.saturating_mul(1 << self.failures.min(16)).min(self.options.retry_max);
        self.failures += 1;
        let retry_in = limit.mul_f64(fastrand::f64());
        tracing::debug!(reason, ?retry_in, "no connection");
        self.connection = Connection::None { retry_at: Instant::now() + retry_in };
        // What it still tells is late.
        self.link_number += 1;
        self.deliveries.disconnected();
        self.sending.disconnected();
        self.events.tell(Event::Connection(ConnectionState::Lost { reason, retry_in }));
    }

    // ---- the end -------------------------------------------------------------------------------------------------------

    async fn end(mut self, ending: Ending) {
        *self.closed.0.lock() = Some(ending.why.clone());
        self.commands.close();
        if ending.why == Closed::ByUs {
            self.say_goodbye().await;
        }
        self.connection = Connection::gone();
        while let Ok(command) = self.commands.try_recv() {
            self.command(command);
        }
        // What was promised to be in the outbox is in it.
        self.write_outbox();
        while let Desk::Busy(writing) = &mut self.desk {
            let written = writing.await;
            if self.written(written).is_err() {
                break;
            }
            self.write_outbox();
        }
        // Whoever hears that it is over may open it again.
        self.desk = Desk::Gone;
        for number in self.asked.keys().copied().collect::<Vec<_>>() {
            self.reply(number, Err(RequestError::Closed(ending.why.clone())));
        }
        for (_, reading) in std::mem::take(&mut self.reading) {
            for reader in reading.readers {
                // Whoever does not wait any more does not care.
                drop(reader.reply.send(Err(RequestError::Closed(ending.why.clone()))));
            }
        }
        for (_, waiter) in std::mem::take(&mut self.waiters) {
            drop(waiter.send(Err(SendError::Closed(ending.why.clone()))));
        }
        if let Some(first) = self.first.take() {
            let why = match ending.unreachable {
                Some(reason) => ConnectError::Unreachable(reason),
                None => ConnectError::Closed(ending.why.clone()),
            };
            // Whoever does not wait any more has nothing to close.
            drop(first.send(Err(why)));
        }
        self.events.tell(Event::Connection(ConnectionState::Closed(ending.why)));
        if let Some(reply) = ending.reply {
            // Whoever does not wait any more does not care.
            reply.send(()).ok();
        }
    }

    /// Acknowledgements that the program gave, and DISCONNECT behind them.
    async fn say_goodbye(&mut self) {
        for (key, fate) in self.returns.take() {
            self.deliveries.returned(&key, fate);
        }
        let Connection::Open { link, .. } = &self.connection else { return };
        while let Some(packet) = self.deliveries.next_acknowledged() {
            if link.acknowledge(&packet).is_err() {
                return;
            }
        }
        if link.disconnect().is_err() {
            return;
        }
        let until = tokio::time::Instant::now() + CLOSE_TIMEOUT;
        loop {
            match tokio::time::timeout_at(until, self.link_events.recv()).await {
                Ok(Some((number, event))) if number == self.link_number => match event {
                    LinkEvent::Ended(_) => return,
                    LinkEvent::Answered(token, answer) => self.answered(token, &answer),
                    _ => {}
                },
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(_) => {
                    tracing::debug!("the server did not close the connection in time");
                    return;
                }
            }
        }
    }
}

impl Connection {
    /// Only while the next one is put in its place, or at the end.
    fn gone() -> Self {
        Self::None { retry_at: Instant::now() }
    }
}

/// A packet that the server does not take would end every connection by which it went out.
fn too_large(outgoing: &Outgoing<'_>, packet_bytes_max: usize) -> Option<Refusal> {
    (outgoing.packet_bytes() > packet_bytes_max).then(|| Refusal {
        code: Some(ErrorCode::TextTooLong),
        reason_code: 0x95,
        message: format!("text_too_long: the server takes packets of {packet_bytes_max} bytes at most"),
    })
}

/// An event that is told once.
fn live(incoming: &Incoming) -> Option<Event> {
    let payload = &incoming.payload;
    let (_, suffix) = incoming.topic.strip_prefix("chat/")?.split_once('/')?;
    let read = |down: Down| suffix == down.suffix();
    if read(Down::Receipt) {
        serde_json::from_slice(payload).ok().map(Event::Receipt)
    } else if read(Down::Read) {
        serde_json::from_slice(payload).ok().map(Event::Read)
    } else if read(Down::Typing) {
        serde_json::from_slice(payload).ok().map(Event::Typing)
    } else if read(Down::Presence) {
        serde_json::from_slice(payload).ok().map(Event::Presence)
    } else {
        None
    }
}
