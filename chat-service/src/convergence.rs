//! Whatever users do, and whenever the server crashes, their devices come to the same conversations.
//!
//! Random steps go through the real parts of the service over a log in memory, one after another, and through a model that says in a few
//! lines what has to come of them. Cursors are looked at after every step; at the end every device receives what is left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use broker::Announcer;
use broker::completion::Reply;
use broker::service::{BoundPublish, Position, ReadLimit, Roles, Service, SessionKey, SessionRecord};
use bytes::Bytes;
use chat_protocol::request::{
    AnsweredEntry, ChangedOk, ConversationsOk, DoneOk, HistoryOk, RequestError, Standing, SyncOk,
};
use chat_protocol::topic::Down;
use chat_protocol::{ConversationId, Envelope, ErrorCode, Kind, MessageId, Seq, UserId};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::auth::Auth;
use crate::core::{Quotas, Send};
use crate::log::{Body, ConversationHead, Device, Log, MemoryLog, Side, Stream};
use crate::metrics::Metrics;
use crate::presence::Presence;
use crate::receipts::Receipts;
use crate::requests::{Asked, Blocks, Parts, Requests};
use crate::sequencer::{self, Answer, Submission};
use crate::service::ChatService;
use crate::sessions::Sessions;
use crate::typing::TypingRelay;

const NAMES: [&str; 4] = ["alice", "bob", "carol", "dave"];
const SIDES: [Side; 2] = [Side::Inbox, Side::Sent];
const MESSAGE_BYTES_MAX: usize = 1_024;

// ---- steps ------------------------------------------------------------------------------------------------------------

/// A user and one of the others, as numbers to be counted round.
#[derive(Clone, Copy, Debug)]
struct Pair(usize, usize);

#[derive(Clone, Copy, Debug)]
struct Text {
    pair: Pair,
    id: Option<u8>,
    text: u8,
}

/// Numbers of seqs and devices are counted round, so that every step means something in every world.
#[derive(Clone, Debug)]
enum Step {
    /// In one batch.
    Send(Vec<Text>),
    Edit {
        pair: Pair,
        seq: usize,
        id: Option<u8>,
        text: u8,
    },
    Unsend {
        pair: Pair,
        seq: usize,
        id: Option<u8>,
    },
    Read(Pair, usize),
    Block(Pair, bool),
    Hide(Pair, usize),
    Connect(usize),
    Disconnect {
        device: usize,
        for_ever: bool,
    },
    Receive {
        device: usize,
        side: Side,
        entries: usize,
    },
    Acknowledge {
        device: usize,
        side: Side,
        entries: usize,
    },
    /// A device without a session receives what no other has had, and acknowledges some.
    Glance {
        user: usize,
        entries: usize,
    },
    Sync {
        device: usize,
        limit: usize,
    },
    History {
        pair: Pair,
        limit: usize,
    },
    Flush,
    /// With a batch on its way, of which nobody hears anything, after so many turns of the tasks.
    Crash {
        texts: Vec<Text>,
        turns: usize,
    },
}

fn pair() -> impl Strategy<Value = Pair> {
    (0..4usize, 0..3usize).prop_map(|(me, with)| Pair(me, with))
}

fn id() -> impl Strategy<Value = Option<u8>> {
    prop::option::of(0..4u8)
}

fn texts(count: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = Vec<Text>> {
    prop::collection::vec((pair(), id(), 0..4u8).prop_map(|(pair, id, text)| Text { pair, id, text }), count)
}

fn step() -> impl Strategy<Value = Step> {
    let side = || prop::sample::select(&SIDES);
    let seq = || 0..24usize;
    let device = || 0..12usize;
    let number = || 1..5usize;
    prop_oneof![
        8 => texts(1..4).prop_map(Step::Send),
        3 => (pair(), seq(), id(), 0..4u8).prop_map(|(pair, seq, id, text)| Step::Edit { pair, seq, id, text }),
        2 => (pair(), seq(), id()).prop_map(|(pair, seq, id)| Step::Unsend { pair, seq, id }),
        3 => (pair(), seq()).prop_map(|(pair, seq)| Step::Read(pair, seq)),
        2 => (pair(), any::<bool>()).prop_map(|(pair, blocks)| Step::Block(pair, blocks)),
        1 => (pair(), seq()).prop_map(|(pair, seq)| Step::Hide(pair, seq)),
        2 => device().prop_map(Step::Connect),
        1 => (device(), any::<bool>()).prop_map(|(device, for_ever)| Step::Disconnect { device, for_ever }),
        6 => (device(), side(), number()).prop_map(|(device, side, entries)| Step::Receive { device, side, entries }),
        5 => (device(), side(), number())
            .prop_map(|(device, side, entries)| Step::Acknowledge { device, side, entries }),
        1 => (0..4usize, number()).prop_map(|(user, entries)| Step::Glance { user, entries }),
        2 => (device(), number()).prop_map(|(device, limit)| Step::Sync { device, limit }),
        1 => (pair(), number()).prop_map(|(pair, limit)| Step::History { pair, limit }),
        1 => Just(Step::Flush),
        1 => (texts(0..3), 0..4usize).prop_map(|(texts, turns)| Step::Crash { texts, turns }),
    ]
}

// ---- the server -------------------------------------------------------------------------------------------------------

type Outcome = Result<ConversationHead, RequestError>;

/// All but the sockets.
struct Server {
    service: ChatService<MemoryLog>,
    sequencing: JoinHandle<()>,
}

/// The service, and what its sequencer needs.
fn service(
    log: &Arc<MemoryLog>,
    queue: mpsc::Sender<Vec<Submission>>,
) -> (ChatService<MemoryLog>, sequencer::Parts<MemoryLog>) {
    let metrics = Arc::new(Metrics::new());
    let announcer = Announcer::default();
    let blocks = Arc::new(Blocks::default());
    let presence = Arc::new(Presence::new(Arc::clone(log), announcer.clone(), Duration::from_secs(10), None));
    let parts = sequencer::Parts {
        log: Arc::clone(log),
        announcer: announcer.clone(),
        metrics: Arc::clone(&metrics),
        quotas: Quotas::NONE,
        new_conversations_per_hour: 0,
        blocks: Arc::clone(&blocks),
        presence: Arc::clone(&presence),
        head: watch::Sender::new(log.head()),
    };
    let receipts = Arc::new(Receipts::new(Arc::clone(log), announcer.clone()));
    let requests = Requests::new(Parts {
        log: Arc::clone(log),
        queue: queue.clone(),
        announcer: announcer.clone(),
        metrics: Arc::clone(&metrics),
        blocks,
        receipts: Arc::clone(&receipts),
        presence: Arc::clone(&presence),
        auth: Auth::development(),
        message_bytes_max: MESSAGE_BYTES_MAX,
    });
    let service = ChatService {
        log: Arc::clone(log),
        queue,
        announcer: announcer.clone(),
        metrics,
        message_bytes_max: MESSAGE_BYTES_MAX,
        requests,
        receipts,
        typing: Arc::new(TypingRelay::new(Arc::clone(log), announcer)),
        presence,
        sessions: Sessions::new(Arc::clone(log), 0),
        auth: Auth::development(),
    };
    (service, parts)
}

impl Server {
    fn start(log: &Arc<MemoryLog>) -> Self {
        let (queue, submissions) = mpsc::channel(sequencer::SUBMISSIONS_MAX);
        let (service, parts) = service(log, queue);
        let sequencing = tokio::spawn(sequencer::run(parts, submissions, std::future::pending()));
        Self { service, sequencing }
    }

    async fn submit(&self, sends: Vec<Send>) -> Vec<oneshot::Receiver<Outcome>> {
        let submissions = sends.into_iter().map(|send| {
            let (answer, answered) = oneshot::channel();
            (Submission { send, answer: Answer::Request(answer) }, answered)
        });
        let (submissions, answers): (Vec<Submission>, _) = submissions.unzip();
        self.service.queue.send(submissions).await.expect("the sequencer runs");
        answers
    }

    async fn ask<T: DeserializeOwned>(&self, me: &UserId, method: &str, members: Value) -> Result<T, ErrorCode> {
        let asked = Asked {
            me: me.clone(),
            method: method.to_owned(),
            payload: members.to_string().into(),
            answer_topic: Down::Res.topic(me).into(),
            correlation: Bytes::new(),
        };
        let mut answer: Value = serde_json::from_slice(&self.service.requests.ask(&asked).await).expect("JSON");
        match answer.get_mut("ok") {
            Some(ok) => Ok(serde_json::from_value(ok.take()).expect("an answer to this method")),
            None => Err(serde_json::from_value::<RequestError>(answer["error"].take()).expect("an error").code),
        }
    }

    async fn read(&self, me: &UserId, with: &UserId, seq: Seq) -> Result<(), ErrorCode> {
        let (done, outcome) = oneshot::channel();
        let room = self.service.requests.room(me).expect("nothing else is under way");
        room.read(me.clone(), with.clone(), seq, move |outcome| done.send(outcome).expect("somebody waits"));
        outcome.await.expect("an outcome").map_err(|error| error.code)
    }
}

// ---- the model --------------------------------------------------------------------------------------------------------

/// An entry, as its writer meant it.
#[derive(Clone, Debug)]
struct Written {
    position: u64,
    from: UserId,
    to: UserId,
    id: Option<MessageId>,
    body: Body,
    withheld: bool,
    /// Unsent, or the edit of something that was.
    erased: bool,
}

impl Written {
    fn is_withheld_from(&self, user: &UserId) -> bool {
        self.withheld && self.to == *user
    }

    fn is_text(&self) -> bool {
        matches!(self.body, Body::Text(_))
    }

    /// Whether a send under its id says the same, as far as anybody can still know.
    fn is_same(&self, body: &Body) -> bool {
        let shape = |body: &Body| (body.target(), body.text().len(), matches!(body, Body::Unsend { .. }));
        self.body == *body || (self.erased && shape(&self.body) == shape(body))
    }

    fn kind(&self) -> Kind {
        match &self.body {
            Body::Text(text) => Kind::Text(text.to_string()),
            Body::Edit { target, text } => Kind::Edit { target: *target, text: text.to_string() },
            Body::Unsend { target } => Kind::Unsend { target: *target },
            Body::Erased { .. } => unreachable!("nobody writes that"),
        }
    }
}

/// What has to come of the steps.
#[derive(Clone, Debug, Default)]
struct Model {
    /// The seq at nth is nth + 1.
    conversations: BTreeMap<ConversationId, Vec<Written>>,
    entries: u64,
    /// Who blocks whom.
    blocked: BTreeSet<(UserId, UserId)>,
    hidden: BTreeSet<(UserId, ConversationId, u64)>,
}

/// Texts as they stand, by seq; `None`: taken back.
type Texts = BTreeMap<u64, Option<String>>;

impl Model {
    fn of(&self, conversation: &ConversationId) -> &[Written] {
        self.conversations.get(conversation).map_or(&[], Vec::as_slice)
    }

    fn last_seq(&self, conversation: &ConversationId) -> u64 {
        self.of(conversation).len() as u64
    }

    fn store(&mut self, send: &Send) -> Result<u64, ErrorCode> {
        let conversation = self.conversations.entry(send.conversation.clone()).or_default();
        let same_id = |entry: &Written| send.id.is_some() && entry.id == send.id && entry.from == send.from;
        if let Some(nth) = conversation.iter().position(same_id) {
            let same = conversation[nth].is_same(&send.body);
            return if same { Ok(nth as u64 + 1) } else { Err(ErrorCode::IdConflict) };
        }
        self.entries += 1;
        if let Body::Unsend { target } = send.body {
            for (nth, entry) in conversation.iter_mut().enumerate() {
                let is_text = !matches!(entry.body, Body::Unsend { .. });
                let is_meant = nth as u64 + 1 == target.get() || entry.body.target() == Some(target);
                entry.erased |= is_text && is_meant;
            }
        }
        let blocked = self.blocked.contains(&(send.to.clone(), send.from.clone()));
        conversation.push(Written {
            position: self.entries,
            from: send.from.clone(),
            to: send.to.clone(),
            id: send.id.clone(),
            body: send.body.clone(),
            withheld: send.withheld || (blocked && !matches!(send.body, Body::Unsend { .. })),
            erased: false,
        });
        Ok(conversation.len() as u64)
    }

    /// An entry that a user can see.
    fn entry(&self, me: &UserId, conversation: &ConversationId, seq: u64) -> Result<&Written, ErrorCode> {
        let entries = self.of(conversation);
        if entries.is_empty() {
            return Err(ErrorCode::UnknownConversation);
        }
        let entry = usize::try_from(seq - 1).ok().and_then(|nth| entries.get(nth));
        entry.filter(|entry| !entry.is_withheld_from(me)).ok_or(ErrorCode::InvalidSeq)
    }

    /// An edit or an unsend.
    fn change(&mut self, mut send: Send) -> Result<u64, ErrorCode> {
        let target = send.body.target().expect("a change").get();
        let entry = self.entry(&send.from, &send.conversation, target)?;
        if entry.from != send.from {
            return Err(ErrorCode::NotAuthorized);
        }
        if !entry.is_text() {
            return Err(ErrorCode::InvalidSeq);
        }
        if entry.erased {
            let same_id = |entry: &&Written| send.id.is_some() && entry.id == send.id && entry.from == send.from;
            let is_resend = self.of(&send.conversation).iter().any(|entry| same_id(&entry));
            if !is_resend {
                return Err(ErrorCode::InvalidSeq);
            }
        }
        send.withheld = entry.withheld;
        self.store(&send)
    }

    /// The entries of a user's stream after a position, as conversation and seq.
    fn stream(&self, user: &UserId, side: Side, after: u64) -> Vec<(u64, ConversationId, u64)> {
        let mut entries = Vec::new();
        for (conversation, written) in &self.conversations {
            for (nth, entry) in written.iter().enumerate().filter(|(_, entry)| entry.position > after) {
                let is_in = match side {
                    Side::Inbox => entry.to == *user && !entry.withheld,
                    _ => entry.from == *user,
                };
                if is_in {
                    entries.push((entry.position, conversation.clone(), nth as u64 + 1));
                }
            }
        }
        entries.sort_unstable();
        entries
    }

    /// What a user's devices receive of a conversation.
    fn received(&self, me: &UserId, conversation: &ConversationId) -> BTreeMap<u64, Kind> {
        let entries = (1..).zip(self.of(conversation)).filter(|(_, entry)| !entry.is_withheld_from(me));
        entries.map(|(seq, entry)| (seq, entry.kind())).collect()
    }

    fn is_hidden(&self, me: &UserId, conversation: &ConversationId, seq: u64) -> bool {
        self.hidden.contains(&(me.clone(), conversation.clone(), seq))
    }

    /// What a user sees of a conversation.
    fn texts(&self, me: &UserId, conversation: &ConversationId) -> Texts {
        let mut texts = as_they_stand(&self.received(me, conversation));
        texts.retain(|seq, _| !self.is_hidden(me, conversation, *seq));
        texts
    }
}

/// What a device makes of the entries that it has.
fn as_they_stand(entries: &BTreeMap<u64, Kind>) -> Texts {
    let mut texts = Texts::new();
    for (seq, kind) in entries {
        match kind {
            Kind::Text(text) => drop(texts.insert(*seq, Some(text.clone()))),
            Kind::Edit { target, text } => {
                if let Some(Some(before)) = texts.get_mut(&target.get()) {
                    before.clone_from(text);
                }
            }
            Kind::Unsend { target } => drop(texts.insert(target.get(), None)),
            Kind::Erased => {}
            Kind::Other(kind) => panic!("the kind {kind} is not known"),
        }
    }
    texts
}

/// Notes an entry that a device gets, perhaps again.
fn note(entries: &mut BTreeMap<u64, Kind>, seq: u64, kind: Kind) {
    let before = entries.insert(seq, kind.clone());
    let is_same = before.as_ref().is_none_or(|before| *before == kind || kind == Kind::Erased);
    assert!(is_same, "entry {seq} was {before:?} and is {kind:?}");
}

// ---- the world --------------------------------------------------------------------------------------------------------

/// A connection's place in a stream.
#[derive(Debug)]
struct Place {
    acknowledged: u64,
    in_flight: Vec<u64>,
}

impl Place {
    fn received(&self) -> u64 {
        self.in_flight.last().copied().unwrap_or(self.acknowledged)
    }
}

/// What a device knows by `sync`.
#[derive(Debug, Default)]
struct Synced {
    since: Option<String>,
    entries: BTreeMap<ConversationId, BTreeMap<u64, Kind>>,
    deleted: BTreeSet<(ConversationId, u64)>,
    /// By peer: delivered, read, my read.
    cursors: BTreeMap<UserId, [u64; 3]>,
    blocked: BTreeSet<UserId>,
    /// Cursors that were told may have been lost since.
    crashed: bool,
}

#[derive(Debug)]
struct Phone {
    user: UserId,
    key: SessionKey,
    /// While it is connected, its places in [`SIDES`].
    places: Option<[Place; 2]>,
    /// What it received.
    entries: BTreeMap<ConversationId, BTreeMap<u64, Kind>>,
    synced: Synced,
}

/// Something that only advances.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cursor {
    /// What has reached a user, by name of the side.
    Reached(UserId, &'static str),
    /// A device's own, by its number.
    Device(usize, &'static str),
    /// What a user has read of a peer's.
    Read(UserId, UserId),
    /// What a user is told to have reached a peer.
    Told(UserId, UserId),
}

type Cursors = BTreeMap<Cursor, u64>;

fn name(side: Side) -> &'static str {
    if side == Side::Inbox { "inbox" } else { "sent" }
}

fn topic(user: &UserId, side: Side) -> String {
    if side == Side::Inbox { Down::Inbox.topic(user) } else { Down::Sent.topic(user) }
}

struct World {
    users: Vec<UserId>,
    phones: Vec<Phone>,
    log: Arc<MemoryLog>,
    server: Server,
    model: Model,
    /// As they have to be, but for [`Cursor::Told`], which is as it was told last.
    cursors: Cursors,
    /// As they were at the last flush.
    flushed: Cursors,
}

impl World {
    async fn new(devices: &[usize]) -> Self {
        let log = Arc::new(MemoryLog::new());
        let server = Server::start(&log);
        let users: Vec<UserId> = NAMES.iter().take(devices.len()).map(|name| UserId::parse(name).unwrap()).collect();
        let mut phones = Vec::new();
        for (user, count) in users.iter().zip(devices) {
            for nth in 0..*count {
                let key = SessionKey { user: user.as_arc(), client_id: format!("phone-{nth}").into() };
                let mut record = SessionRecord { expiry_s: u32::MAX, ..SessionRecord::default() };
                for side in SIDES {
                    let topic = topic(user, side);
                    let start = server.service.start(user.as_str(), &topic).await.unwrap();
                    record.cursors.push((topic.into(), start));
                }
                server.service.save_session(&key, record).await.unwrap();
                let (entries, synced) = (BTreeMap::new(), Synced::default());
                phones.push(Phone { user: user.clone(), key, places: None, entries, synced });
            }
        }
        let model = Model::default();
        Self { users, phones, log, server, model, cursors: Cursors::new(), flushed: Cursors::new() }
    }

    fn pair(&self, Pair(me, with): Pair) -> (UserId, UserId, ConversationId) {
        let count = self.users.len();
        let me = me % count;
        let with = (me + 1 + with % (count - 1)) % count;
        let (me, with) = (self.users[me].clone(), self.users[with].clone());
        let conversation = ConversationId::between(&me, &with).unwrap();
        (me, with, conversation)
    }

    /// An entry of a conversation, or the one after the last.
    fn seq(&self, conversation: &ConversationId, number: usize) -> Seq {
        Seq::new(number as u64 % (self.model.last_seq(conversation) + 1) + 1).unwrap()
    }

    fn sends(&self, texts: &[Text]) -> Vec<Send> {
        let send = |text: &Text| {
            let (from, to, conversation) = self.pair(text.pair);
            let body = words(text.text).into();
            Send { conversation, from, to, id: text.id.map(message_id), body, withheld: false, bridged: false }
        };
        texts.iter().map(send).collect()
    }

    async fn take(&mut self, step: &Step) {
        match step {
            Step::Send(texts) => {
                let sends = self.sends(texts);
                let expected: Vec<_> = sends.iter().map(|send| self.model.store(send)).collect();
                for (answer, expected) in self.server.submit(sends).await.into_iter().zip(expected) {
                    let outcome = answer.await.expect("an answer");
                    assert_eq!(outcome.map(|head| head.seq.get()).map_err(|error| error.code), expected);
                }
            }
            Step::Edit { pair, seq, id, text } => {
                let text = words(*text);
                self.change(*pair, *seq, *id, "edit", |target| Body::Edit { target, text: text.clone().into() }).await;
            }
            Step::Unsend { pair, seq, id } => {
                self.change(*pair, *seq, *id, "unsend", |target| Body::Unsend { target }).await;
            }
            Step::Read(pair, seq) => {
                let (me, with, conversation) = self.pair(*pair);
                self.read(&me, &with, self.seq(&conversation, *seq)).await;
            }
            Step::Block(pair, blocks) => {
                let (me, with, _) = self.pair(*pair);
                let method = if *blocks { "block" } else { "unblock" };
                let done: Result<DoneOk, _> = self.server.ask(&me, method, json!({ "with": with })).await;
                assert_eq!(done, Ok(DoneOk {}));
                if *blocks {
                    self.model.blocked.insert((me, with));
                } else {
                    self.model.blocked.remove(&(me, with));
                }
            }
            Step::Hide(pair, seq) => {
                let (me, with, conversation) = self.pair(*pair);
                let seq = self.seq(&conversation, *seq);
                let done: Result<DoneOk, _> = self.server.ask(&me, "delete", json!({ "with": with, "seq": seq })).await;
                let expected = self.model.entry(&me, &conversation, seq.get()).map(|_| DoneOk {});
                assert_eq!(done, expected);
                if done.is_ok() {
                    self.model.hidden.insert((me, conversation, seq.get()));
                }
            }
            Step::Connect(device) => self.connect(device % self.phones.len()).await,
            Step::Disconnect { device, for_ever } => {
                let nth = device % self.phones.len();
                let phone = &mut self.phones[nth];
                if phone.places.take().is_some() {
                    let expiry_s = if *for_ever { u32::MAX } else { 3_600 };
                    self.server.service.session_ended(&phone.key, expiry_s);
                }
            }
            Step::Receive { device, side, entries } => {
                self.receive(device % self.phones.len(), *side, *entries).await;
            }
            Step::Acknowledge { device, side, entries } => {
                self.acknowledge(device % self.phones.len(), *side, *entries);
            }
            Step::Glance { user, entries } => self.glance(user % self.users.len(), *entries).await,
            Step::Sync { device, limit } => {
                self.sync(device % self.phones.len(), *limit).await;
            }
            Step::History { pair, limit } => {
                let (me, with, conversation) = self.pair(*pair);
                self.check_history(&me, &with, &conversation, *limit).await;
            }
            Step::Flush => {
                self.log.flush().await.unwrap();
                self.flushed = self.cursors.clone();
            }
            Step::Crash { texts, turns } => self.crash(texts, *turns).await,
        }
    }

    async fn change(&mut self, pair: Pair, seq: usize, id: Option<u8>, method: &str, body: impl Fn(Seq) -> Body) {
        let (me, with, conversation) = self.pair(pair);
        let target = self.seq(&conversation, seq);
        let (id, body) = (id.map(message_id), body(target));
        let mut members = json!({ "with": with, "seq": target, "id": id });
        if method == "edit" {
            members["text"] = body.text().into();
        }
        let changed: Result<ChangedOk, _> = self.server.ask(&me, method, members).await;
        let send = Send { conversation, from: me, to: with, id, body, withheld: false, bridged: false };
        assert_eq!(changed.map(|changed| changed.seq.get()), self.model.change(send));
    }

    async fn read(&mut self, me: &UserId, with: &UserId, seq: Seq) {
        let conversation = ConversationId::between(me, with).unwrap();
        let expected = match self.model.last_seq(&conversation) {
            0 => Err(ErrorCode::UnknownConversation),
            last if seq.get() > last => Err(ErrorCode::InvalidSeq),
            _ => Ok(()),
        };
        assert_eq!(self.server.read(me, with, seq).await, expected);
        if expected.is_ok() {
            self.advance(Cursor::Read(me.clone(), with.clone()), seq.get());
        }
    }

    fn advance(&mut self, cursor: Cursor, to: u64) {
        let at = self.cursors.entry(cursor).or_default();
        *at = to.max(*at);
    }

    fn cursor(&self, cursor: &Cursor) -> u64 {
        self.cursors.get(cursor).copied().unwrap_or_default()
    }

    // ---- devices ------------------------------------------------------------------------------------------------------

    async fn connect(&mut self, nth: usize) {
        if self.phones[nth].places.is_some() {
            return;
        }
        let phone = &self.phones[nth];
        let record = self.server.service.load_session(&phone.key).await.unwrap().expect("its session");
        let place = |side| {
            let topic = topic(&phone.user, side);
            let (_, at) = record.cursors.iter().find(|(name, _)| **name == *topic).expect("a cursor");
            assert_eq!(at.0, self.cursor(&Cursor::Device(nth, name(side))));
            Place { acknowledged: at.0, in_flight: Vec::new() }
        };
        self.phones[nth].places = Some(SIDES.map(place));
    }

    /// Reads a page as a connection does. Whether there was something.
    async fn receive(&mut self, nth: usize, side: Side, entries: usize) -> bool {
        let phone = &mut self.phones[nth];
        let Some(places) = &mut phone.places else { return false };
        let place = &mut places[usize::from(side == Side::Sent)];
        let after = place.received();
        let received = page(&self.server, &self.model, &phone.user, side, after, entries).await;
        for (position, envelope) in &received {
            let known = phone.entries.entry(envelope.conversation.clone()).or_default();
            note(known, envelope.seq.get(), envelope.kind.clone());
            place.in_flight.push(*position);
        }
        !received.is_empty()
    }

    fn acknowledge(&mut self, nth: usize, side: Side, entries: usize) {
        let phone = &mut self.phones[nth];
        let Some(places) = &mut phone.places else { return };
        let place = &mut places[usize::from(side == Side::Sent)];
        let count = entries.min(place.in_flight.len());
        let Some(position) = place.in_flight.drain(..count).next_back() else { return };
        let after = std::mem::replace(&mut place.acknowledged, position);
        let topic = topic(&phone.user, side);
        self.server.service.acknowledged(&phone.key, true, &topic, Position(after), Position(position));
        let user = phone.user.clone();
        self.advance(Cursor::Reached(user, name(side)), position);
        self.advance(Cursor::Device(nth, name(side)), position);
    }

    async fn glance(&mut self, nth: usize, entries: usize) {
        let user = self.users[nth].clone();
        let topic = topic(&user, Side::Inbox);
        let start = self.server.service.start(user.as_str(), &topic).await.unwrap();
        assert_eq!(start.0, self.cursor(&Cursor::Reached(user.clone(), name(Side::Inbox))));
        let received = page(&self.server, &self.model, &user, Side::Inbox, start.0, entries).await;
        let Some((position, _)) = received.last() else { return };
        let key = SessionKey { user: user.as_arc(), client_id: "passing".into() };
        self.server.service.acknowledged(&key, false, &topic, start, Position(*position));
        self.advance(Cursor::Reached(user, name(Side::Inbox)), *position);
    }

    /// Asks once. Whether there is more.
    async fn sync(&mut self, nth: usize, limit: usize) -> bool {
        let phone = &mut self.phones[nth];
        let (me, synced) = (phone.user.clone(), &mut phone.synced);
        let members = json!({ "since": synced.since, "limit": limit });
        let answer: SyncOk = self.server.ask(&me, "sync", members).await.expect("a token of this server");
        synced.since = Some(answer.next);
        for entry in answer.entries {
            let known = synced.entries.entry(entry.conversation.clone()).or_default();
            note(known, entry.seq.get(), kind(&entry));
        }
        for conversation in answer.conversations {
            let standing = conversation.standing;
            let id = ConversationId::between(&me, &standing.with).unwrap();
            synced.deleted.extend(conversation.deleted.iter().map(|seq| (id.clone(), seq.get())));
            let cursors = synced.cursors.entry(standing.with.clone()).or_default();
            for (cursor, told) in cursors.iter_mut().zip([standing.delivered, standing.read, standing.my_read]) {
                *cursor = told.max(*cursor);
            }
            if standing.blocked {
                synced.blocked.insert(standing.with);
            } else {
                synced.blocked.remove(&standing.with);
            }
        }
        if !answer.more {
            self.check_synced(nth);
        }
        answer.more
    }

    // ---- crashes ------------------------------------------------------------------------------------------------------

    async fn crash(&mut self, texts: &[Text], turns: usize) {
        let sends = self.sends(texts);
        let mut stored = self.model.clone();
        for send in &sends {
            stored.store(send).unwrap_or_default();
        }
        drop(self.server.submit(sends).await);
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        self.server.sequencing.abort();
        self.log.crash();
        self.server = Server::start(&self.log);
        for phone in &mut self.phones {
            phone.places = None;
            phone.synced.crashed = true;
        }
        let head = self.log.head().0;
        if head == stored.entries {
            self.model = stored;
        }
        assert_eq!(head, self.model.entries, "a batch is stored whole or not at all");
        let left = self.look(true).await;
        for (cursor, at) in &self.flushed {
            let left = left.get(cursor).copied().unwrap_or_default();
            assert!(left >= *at, "{cursor:?} was {at} on disk, and is {left} after a crash");
        }
        for (cursor, at) in left.iter().filter(|(cursor, _)| !matches!(cursor, Cursor::Told(..))) {
            assert!(*at <= self.cursor(cursor), "{cursor:?} is {at} after a crash, and was less");
        }
        self.cursors = left;
    }

    // ---- checks -------------------------------------------------------------------------------------------------------

    /// Cursors as they are now, none of them 0.
    async fn look(&self, after_crash: bool) -> Cursors {
        let mut cursors = Cursors::new();
        for user in &self.users {
            for side in SIDES {
                let stream = Stream { user: user.clone(), side };
                let at = self.log.delivered(&stream).await.unwrap().position.0;
                cursors.insert(Cursor::Reached(user.clone(), name(side)), at);
            }
            for standing in self.check_conversations(user, after_crash).await {
                let (me, with) = (user.clone(), standing.with);
                cursors.insert(Cursor::Read(me.clone(), with.clone()), standing.my_read);
                cursors.insert(Cursor::Read(with.clone(), me.clone()), standing.read);
                cursors.insert(Cursor::Told(me, with), standing.delivered);
            }
        }
        for (nth, phone) in self.phones.iter().enumerate() {
            let device = Device { user: phone.user.clone(), client_id: Arc::clone(&phone.key.client_id) };
            let record = self.log.session(&device).await.unwrap().expect("its session");
            for side in SIDES {
                let at = record.cursors.of(side).expect("a cursor").0;
                cursors.insert(Cursor::Device(nth, name(side)), at);
            }
        }
        cursors.retain(|_, at| *at > 0);
        cursors
    }

    async fn check_cursors(&mut self) {
        let now = self.look(false).await;
        for (cursor, at) in &now {
            let before = self.cursor(cursor);
            let advances = if matches!(cursor, Cursor::Told(..)) { *at >= before } else { *at == before };
            assert!(advances, "{cursor:?} was {before} and is {at}");
        }
        for (cursor, before) in &self.cursors {
            assert!(now.contains_key(cursor), "{cursor:?} was {before} and is 0");
        }
        self.cursors = now;
    }

    /// The list of a user's conversations; how they stand.
    async fn check_conversations(&self, me: &UserId, after_crash: bool) -> Vec<Standing> {
        let (mut all, mut before) = (Vec::new(), None);
        loop {
            let members = json!({ "limit": 2, "before": before });
            let page: ConversationsOk = self.server.ask(me, "conversations", members).await.expect("a list");
            all.extend(page.conversations);
            before = page.next;
            if before.is_none() {
                break;
            }
        }
        let listed: BTreeSet<&UserId> = all.iter().map(|conversation| &conversation.standing.with).collect();
        let mine = self.model.conversations.iter().filter(|(id, entries)| id.has(me) && !entries.is_empty());
        assert_eq!(listed, mine.filter_map(|(id, _)| id.peer_of(me)).collect());
        assert_eq!(listed.len(), all.len(), "a conversation is listed once");
        for conversation in &all {
            let standing = &conversation.standing;
            let id = ConversationId::between(me, &standing.with).unwrap();
            self.check_standing(me, &id, standing, after_crash);
            let texts = self.model.texts(me, &id);
            let last = conversation.last.as_ref().map(|last| (last.seq.get(), last.text.clone()));
            assert_eq!(last, texts.last_key_value().map(|(seq, text)| (*seq, text.clone())));
            let seen = (1..).zip(self.model.of(&id)).filter(|(seq, entry)| {
                *seq > standing.my_read && !entry.is_withheld_from(me) && !self.model.is_hidden(me, &id, *seq)
            });
            let seen: Vec<&Written> = seen.map(|(_, entry)| entry).collect();
            let after_mine = seen.iter().rev().take_while(|entry| entry.from != *me);
            let unread = after_mine.filter(|entry| entry.is_text() && !entry.erased).count() as u64;
            assert_eq!(conversation.unread, unread, "unread of {id} for {me}");
        }
        all.into_iter().map(|conversation| conversation.standing).collect()
    }

    fn check_standing(&self, me: &UserId, id: &ConversationId, standing: &Standing, after_crash: bool) {
        let Standing { with, delivered, read, my_read, blocked } = standing;
        let last = self.model.last_seq(id);
        assert!(read <= delivered && *delivered <= last && *my_read <= last, "{id} for {me}: {standing:?}");
        assert_eq!(*blocked, self.model.blocked.contains(&(me.clone(), with.clone())), "{id} for {me}");
        let reached = self.cursor(&Cursor::Reached(with.clone(), name(Side::Inbox)));
        let mine = || (1..).zip(self.model.of(id)).filter(|(_, entry)| entry.from == *me);
        let last_told = mine().take_while(|(seq, _)| seq <= delivered).last();
        // No acknowledgement tells what is withheld.
        let is_told = delivered == read || last_told.is_none_or(|(_, entry)| !entry.withheld);
        assert!(is_told, "{id} for {me}: {standing:?} tells what is withheld");
        for (seq, entry) in mine().filter(|(_, entry)| !entry.withheld) {
            // After a crash the cursor is what is left of it.
            let has_it = entry.position <= reached && !after_crash;
            let may_have_it = seq <= *read || entry.position <= reached;
            assert!(seq <= *delivered || !has_it, "{id} for {me}: {standing:?} without {seq}");
            assert!(seq > *delivered || may_have_it, "{id} for {me}: {standing:?} with {seq}");
        }
    }

    async fn check_history(&self, me: &UserId, with: &UserId, id: &ConversationId, limit: usize) {
        let expected = self.model.texts(me, id);
        for (backwards, raw) in [(true, false), (false, false), (true, true), (false, true)] {
            let entries = match self.history(me, with, limit, backwards, raw).await {
                Ok(entries) => entries,
                Err(error) => {
                    assert_eq!((error, self.model.last_seq(id)), (ErrorCode::UnknownConversation, 0));
                    return;
                }
            };
            if raw {
                let seqs: Vec<u64> = entries.iter().map(|entry| entry.seq.get()).collect();
                let shown = self.model.received(me, id).into_keys().filter(|seq| !self.model.is_hidden(me, id, *seq));
                assert_eq!(seqs, shown.collect::<Vec<u64>>(), "{id} for {me}");
                continue;
            }
            assert!(entries.windows(2).all(|pair| pair[0].seq < pair[1].seq), "{id} for {me}");
            assert!(entries.iter().all(|entry| entry.unsent == entry.text.is_none()), "{id} for {me}");
            let texts: Texts = entries.into_iter().map(|entry| (entry.seq.get(), entry.text)).collect();
            assert_eq!(texts, expected, "history of {id} for {me}");
        }
    }

    /// All pages of a history, in the order of seq.
    async fn history(
        &self,
        me: &UserId,
        with: &UserId,
        limit: usize,
        backwards: bool,
        raw: bool,
    ) -> Result<Vec<AnsweredEntry>, ErrorCode> {
        let (mut all, mut from): (Vec<AnsweredEntry>, Option<Seq>) = (Vec::new(), None);
        loop {
            let mut members = json!({ "with": with, "limit": limit, "raw": raw });
            match (backwards, from) {
                (true, None) => {}
                (true, Some(before)) => members["before"] = json!(before),
                (false, after) => members["after"] = json!(after.map_or(0, Seq::get)),
            }
            let mut page: HistoryOk = self.server.ask(me, "history", members).await?;
            assert!(page.entries.len() <= limit);
            let more = page.more;
            if backwards {
                from = page.entries.first().map(|entry| entry.seq);
                page.entries.append(&mut all);
                all = page.entries;
            } else {
                from = page.entries.last().map(|entry| entry.seq);
                all.append(&mut page.entries);
            }
            if !more {
                return Ok(all);
            }
        }
    }

    /// A device that has synced to the end knows everything.
    fn check_synced(&self, nth: usize) {
        let Phone { user: me, synced, .. } = &self.phones[nth];
        for with in self.users.iter().filter(|user| *user != me) {
            let id = ConversationId::between(me, with).unwrap();
            let mut texts = synced.entries.get(&id).map(as_they_stand).unwrap_or_default();
            texts.retain(|seq, _| !synced.deleted.contains(&(id.clone(), *seq)));
            assert_eq!(texts, self.model.texts(me, &id), "{id} for {me}, synced");
            let blocks = self.model.blocked.contains(&(me.clone(), with.clone()));
            assert_eq!(synced.blocked.contains(with), blocks, "{with} for {me}, synced");
            let (there, back) = ((me.clone(), with.clone()), (with.clone(), me.clone()));
            let cursors = [
                Cursor::Told(there.0.clone(), there.1.clone()),
                Cursor::Read(back.0, back.1),
                Cursor::Read(there.0, there.1),
            ];
            let now = cursors.map(|cursor| self.cursor(&cursor));
            let told = synced.cursors.get(with).copied().unwrap_or_default();
            let is_right = |(told, now): (&u64, &u64)| told == now || (synced.crashed && told > now);
            assert!(told.iter().zip(&now).all(is_right), "{id} for {me}: {told:?} were synced, and are {now:?}");
        }
    }

    /// Everybody receives and reads what is left; then all agree.
    async fn check_convergence(&mut self) {
        for nth in 0..self.phones.len() {
            self.connect(nth).await;
            for side in SIDES {
                while self.receive(nth, side, 7).await {}
                self.acknowledge(nth, side, usize::MAX);
            }
            self.check_cursors().await;
        }
        for (id, last) in self.last_seqs() {
            self.read(id.first(), id.second(), last).await;
            self.read(id.second(), id.first(), last).await;
        }
        self.check_cursors().await;
        for nth in 0..self.phones.len() {
            while self.sync(nth, 5).await {}
            self.phones[nth].synced = Synced::default();
            while self.sync(nth, 200).await {}
            let Phone { user: me, entries, .. } = &self.phones[nth];
            for (id, _) in self.last_seqs().into_iter().filter(|(id, _)| id.has(me)) {
                let mut texts = entries.get(&id).map(as_they_stand).unwrap_or_default();
                texts.retain(|seq, _| !self.model.is_hidden(me, &id, *seq));
                assert_eq!(texts, self.model.texts(me, &id), "{id} on {:?}", self.phones[nth].key);
            }
        }
        for me in &self.users {
            for with in self.users.iter().filter(|with| *with != me) {
                let id = ConversationId::between(me, with).unwrap();
                self.check_history(me, with, &id, 200).await;
            }
        }
    }

    fn last_seqs(&self) -> Vec<(ConversationId, Seq)> {
        let last =
            |(id, entries): (&ConversationId, &Vec<Written>)| Some((id.clone(), Seq::new(entries.len() as u64)?));
        self.model.conversations.iter().filter_map(last).collect()
    }
}

/// A page of a stream, checked to be what comes next.
async fn page(
    server: &Server,
    model: &Model,
    user: &UserId,
    side: Side,
    after: u64,
    entries: usize,
) -> Vec<(u64, Envelope)> {
    let limit = ReadLimit { messages: entries, bytes: 100 };
    let page = server.service.read(user.as_str(), &topic(user, side), Position(after), limit).await.unwrap();
    let decode = |payload: &[u8]| Envelope::decode(payload).expect("an envelope");
    let received: Vec<(u64, Envelope)> =
        page.deliveries.iter().map(|delivery| (delivery.position.0, decode(&delivery.payload))).collect();
    let mut expected = model.stream(user, side, after);
    assert_eq!(page.end, received.len() == expected.len(), "{user}'s {} after {after}", name(side));
    assert!(page.end || !received.is_empty());
    expected.truncate(received.len());
    let told: Vec<_> = received.iter().map(|(at, entry)| (*at, entry.conversation.clone(), entry.seq.get())).collect();
    assert_eq!(told, expected, "{user}'s {} after {after}", name(side));
    received
}

fn kind(entry: &AnsweredEntry) -> Kind {
    let text = || entry.text.clone().expect("a text");
    let target = || entry.target.expect("a target");
    match entry.kind.as_str() {
        "text" => Kind::Text(text()),
        "edit" => Kind::Edit { target: target(), text: text() },
        "unsend" => Kind::Unsend { target: target() },
        "erased" => Kind::Erased,
        other => Kind::Other(other.to_owned()),
    }
}

fn message_id(number: u8) -> MessageId {
    MessageId::parse(&format!("m-{number}")).unwrap()
}

/// Few, and some of the same length, so that resends and conflicts are frequent.
fn words(number: u8) -> String {
    ["a", "b", "long", "longer"][usize::from(number)].to_owned()
}

/// Takes the steps, with so many devices for each user.
fn run(devices: &[usize], steps: &[Step]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut world = World::new(devices).await;
        for step in steps {
            world.take(step).await;
            world.check_cursors().await;
        }
        world.check_convergence().await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn devices_converge_and_cursors_only_advance(
        devices in prop::collection::vec(1..4usize, 2..5),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        run(&devices, &steps);
    }
}

#[test]
fn what_was_told_as_delivered_stays_so_when_more_is_withheld() {
    let send = |pair| Step::Send(vec![Text { pair, id: None, text: 0 }]);
    let (alice_bob, bob_alice, carol_alice) = (Pair(0, 0), Pair(1, 1), Pair(2, 0));
    let glance = || Step::Glance { user: 0, entries: 4 };
    run(
        &[1, 1, 1],
        &[
            send(alice_bob),
            send(carol_alice),
            glance(),
            Step::Block(alice_bob, true),
            send(bob_alice),
            send(carol_alice),
            glance(),
        ],
    );
}

#[test]
fn the_id_of_an_erased_text_is_no_other_message() {
    let (pair, id) = (Pair(0, 0), Some(0));
    let send = |id, text| Step::Send(vec![Text { pair, id, text }]);
    // The text of id 0 is unsent. Neither a longer text under that id nor an unsend of another text is a resend of it.
    let unsend = Step::Unsend { pair, seq: 0, id: None };
    run(&[1, 1], &[send(id, 0), unsend, send(id, 0), send(id, 3), send(None, 0), Step::Unsend { pair, seq: 2, id }]);
}

/// A place that is only announced goes from one who waits to the next for ever, once more wait than there are places.
#[tokio::test]
async fn more_may_wait_for_room_than_there_is_room_for() {
    const PLACES: usize = 2;
    const SENDERS: usize = 50;
    let log = Arc::new(MemoryLog::new());
    let (queue, mut taken) = mpsc::channel(PLACES);
    let (service, _parts) = service(&log, queue);
    let service = Arc::new(service);
    for sender in 0..SENDERS {
        let service = Arc::clone(&service);
        tokio::spawn(async move {
            let publish = BoundPublish {
                user: "alice".into(),
                roles: Roles(0),
                topic: "chat/alice/out/bob".to_owned(),
                payload: sender.to_string().into(),
                id_property: None,
                response_topic: None,
                correlation: Bytes::new(),
                can_answer: true,
                received_at: Instant::now(),
                reply: Reply::nobody(),
            };
            // As a connection does.
            let (mut publishes, mut place) = (vec![publish], None);
            while let Err(unsent) = service.submit(publishes, place) {
                publishes = unsent;
                place = service.place().await;
            }
        });
    }
    // All of them come before anything is taken.
    for _ in 0..SENDERS {
        tokio::task::yield_now().await;
    }
    let mut texts = Vec::new();
    let everything = async {
        while texts.len() < SENDERS {
            for submission in taken.recv().await.expect("senders") {
                let Body::Text(text) = submission.send.body else { panic!("a text") };
                texts.push(text);
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), everything).await.expect("nobody waits for ever");
    // Whoever waits keeps its turn.
    let expected: Vec<String> = (0..SENDERS).map(|sender| sender.to_string()).collect();
    assert_eq!(texts.iter().map(|text| text.to_string()).collect::<Vec<_>>(), expected);
}
