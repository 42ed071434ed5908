//! The sequencer: the one thread that numbers messages and writes them to the log.
//!
//! While one batch is being written the next one gathers in the queue: a lone message commits at once, and under load batches grow by
//! themselves. What is committed goes to the announcer, which answers the senders and puts the messages on the bus while the next batch is
//! already on its way to the disk; a few messages are announced in place, because another task is reached later. Invariants: nothing is
//! answered as stored, and nothing is announced, before the log has it on disk; batches are announced in the order of the log.

use std::fmt::Write;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use broker::Announcer;
use broker::bus::Frame;
use broker::completion::{Reply, complete};
use broker::live;
use broker::service::PublishOutcome;
use chat_protocol::request::RequestError;
use chat_protocol::topic::Down;
use chat_protocol::{ConversationId, ErrorCode, Seq, Timestamp, UserId};
use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::{mpsc, oneshot, watch};

use crate::beginnings::Beginnings;
use crate::core::{self, Decision, Plan, Quotas, Send};
use crate::envelope;
use crate::log::{
    Account, AppendError, Body, ConversationHead, Entry, IdKey, Log, LogError, NewEntry, PeerRecord, Position,
};
use crate::metrics::Metrics;
use crate::presence::Presence;
use crate::refusal;
use crate::requests::Blocks;

/// Submissions that may wait; past that publishers wait, and their PUBACKs come later.
pub const SUBMISSIONS_MAX: usize = 4_096;
/// Messages in one commit.
const BATCH_MESSAGES_MAX: usize = 4_096;
/// Committed batches that may wait for the announcer.
const COMMITTED_BATCHES_MAX: usize = 4;
/// Messages that are announced before the next batch is taken, if no other batch waits for it.
const ANNOUNCED_IN_PLACE_MAX: usize = 16;
/// Conversations whose last entry is kept in memory; when it is full all are forgotten and read again.
const HEADS_MAX: usize = 200_000;
/// Accounts whose usage is kept in memory; when it is full all are forgotten and asked again.
const ACCOUNTS_MAX: usize = 200_000;
/// Of the buffer for envelopes.
const ENVELOPE_KEPT_BYTES: usize = 64 * 1024;
/// Attempts after another writer was first.
const CONFLICT_RETRIES: usize = 16;

/// A checked message on its way to the log.
pub struct Submission {
    pub send: Send,
    pub answer: Answer,
}

impl Submission {
    /// Whether it was published to this topic, which then names no id.
    pub fn has_topic(&self, published_to: &str) -> bool {
        self.send.id.is_none() && matches!(&self.answer, Answer::Publish { topic, .. } if *topic == published_to)
    }
}

/// Who is told what became of it.
pub enum Answer {
    /// The sender of a publish.
    Publish { reply: Reply, can_answer: bool, topic: String, received_at: Instant },
    /// A request that waits for it.
    Request(oneshot::Sender<Result<ConversationHead, RequestError>>),
}

impl Answer {
    /// When the publish was read; `None` for a request.
    fn received_at(&self) -> Option<Instant> {
        match self {
            Self::Publish { received_at, .. } => Some(*received_at),
            Self::Request(_) => None,
        }
    }
}

struct Committed {
    sends: Vec<Send>,
    answers: Vec<Answer>,
    plan: Plan,
    positions: Vec<Position>,
}

/// What the sequencer works with.
pub struct Parts<L> {
    pub log: Arc<L>,
    pub announcer: Announcer,
    pub metrics: Arc<Metrics>,
    pub quotas: Quotas,
    /// Conversations that one user may begin in an hour; 0: no limit.
    pub new_conversations_per_hour: u32,
    pub blocks: Arc<Blocks>,
    /// Told who begins a conversation.
    pub presence: Arc<Presence<L>>,
    /// Told how far the log goes.
    pub head: watch::Sender<Position>,
}

/// Numbers and writes until `shutdown`, and then what the queue still holds. For a thread of its own: it waits for the disk.
pub async fn run<L: Log>(
    parts: Parts<L>,
    mut queue: mpsc::Receiver<Vec<Submission>>,
    shutdown: impl Future<Output = ()> + std::marker::Send,
) {
    let Parts { log, announcer, metrics, quotas, new_conversations_per_hour, blocks, presence, head } = parts;
    let mut shutdown = std::pin::pin!(shutdown);
    let mut open = true;
    let (committed, to_announce) = mpsc::channel(COMMITTED_BATCHES_MAX);
    let under_way = Arc::new(AtomicUsize::new(0));
    let announcing = || Announcing {
        announcer: announcer.clone(),
        metrics: Arc::clone(&metrics),
        presence: Arc::clone(&presence),
        head: head.clone(),
        every: [Down::Inbox.filter(), Down::Sent.filter()],
        live: Live::default(),
    };
    let mut in_place = announcing();
    let announcing = tokio::spawn(announce(to_announce, announcing(), Arc::clone(&under_way)));
    let beginnings = Beginnings::new(new_conversations_per_hour);
    let mut known = Known { quotas, blocks, beginnings, ..Known::default() };
    let mut gathered: Vec<Vec<Submission>> = Vec::new();
    loop {
        let received = tokio::select! {
            biased;
            () = &mut shutdown, if open => {
                open = false;
                queue.close();
                continue;
            }
            received = queue.recv_many(&mut gathered, BATCH_MESSAGES_MAX) => received,
        };
        if received == 0 {
            break;
        }
        let mut rest = gathered.drain(..).flatten();
        loop {
            let batch: Vec<Submission> = rest.by_ref().take(BATCH_MESSAGES_MAX).collect();
            if batch.is_empty() {
                break;
            }
            let Some(done) = write(&*log, &mut known, batch, &announcer, &metrics).await else { continue };
            if done.answers.len() <= ANNOUNCED_IN_PLACE_MAX && under_way.load(Ordering::Acquire) == 0 {
                in_place.announce(done);
                continue;
            }
            under_way.fetch_add(1, Ordering::Relaxed);
            if committed.send(done).await.is_err() {
                tracing::error!("the announcer has ended");
                return;
            }
        }
    }
    drop(committed);
    if announcing.await.is_err() {
        tracing::error!("the announcer panicked");
    }
}

/// What of the log is kept in memory.
#[derive(Default)]
struct Known {
    heads: FxHashMap<ConversationId, ConversationHead>,
    /// Of the same conversations, those where one blocked the other: whether the first did, and the second.
    blocked: FxHashMap<ConversationId, [bool; 2]>,
    blocks: Arc<Blocks>,
    quotas: Quotas,
    /// Who began how many conversations.
    beginnings: Beginnings,
    /// What is stored for accounts with a limit, as long as nothing is removed.
    usage: FxHashMap<Account, u64>,
    /// The log's first position when the usage was asked.
    usage_since: Position,
}

async fn write<L: Log>(
    log: &L,
    known: &mut Known,
    batch: Vec<Submission>,
    announcer: &Announcer,
    metrics: &Metrics,
) -> Option<Committed> {
    let (mut sends, answers): (Vec<Send>, Vec<Answer>) = batch.into_iter().map(|one| (one.send, one.answer)).unzip();
    for _ in 0..CONFLICT_RETRIES {
        let plan = match prepare(log, known, &mut sends).await {
            Ok(plan) => plan,
            Err(error) => {
                tracing::error!(%error, "a batch could not be prepared");
                refuse_all(
                    &sends,
                    answers,
                    ErrorCode::Unavailable,
                    "the log cannot be read now: send it again",
                    announcer,
                    metrics,
                );
                return None;
            }
        };
        if plan.entries.is_empty() {
            return Some(Committed { sends, answers, plan, positions: Vec::new() });
        }
        let began = Instant::now();
        match log.append_in_place(Arc::clone(&plan.entries)).await {
            Ok(positions) => {
                metrics.commit_seconds.observe(began.elapsed().as_secs_f64());
                metrics.commit_messages.observe(f64::from(u32::try_from(positions.len()).unwrap_or(u32::MAX)));
                metrics.messages_accepted.inc_by(positions.len() as u64);
                known.remember(&plan.entries);
                let began_at = now();
                plan.begun.iter().for_each(|user| known.beginnings.note(user, began_at));
                return Some(Committed { sends, answers, plan, positions });
            }
            Err(AppendError::Conflict { conversation, .. }) => {
                tracing::debug!(%conversation, "another writer was first");
                known.heads.remove(&conversation);
                known.usage.clear();
            }
            Err(AppendError::Full(reason)) => {
                tracing::warn!(%reason, "the disk is full: senders are refused");
                let sentence = "the server has no space left";
                refuse_all(&sends, answers, ErrorCode::StorageFull, sentence, announcer, metrics);
                return None;
            }
            Err(error @ (AppendError::Unknown(_) | AppendError::Failed(_))) => {
                tracing::error!(%error, "a batch was not written");
                known.forget_conversations();
                known.usage.clear();
                // Dropping the replies closes the senders' connections without an acknowledgement.
                return None;
            }
        }
    }
    tracing::error!("gave up after {CONFLICT_RETRIES} conflicts");
    None
}

async fn prepare<L: Log>(log: &L, known: &mut Known, sends: &mut [Send]) -> Result<Plan, LogError> {
    if known.blocks.forget_many() {
        known.forget_conversations();
    }
    known.load_usage(log, sends).await?;
    let heads = &known.heads;
    // Messages of one conversation often come one behind the other.
    let conversations =
        sends.chunk_by(|one, next| one.conversation == next.conversation).map(|run| &run[0].conversation);
    let mut unknown: Vec<ConversationId> =
        conversations.filter(|conversation| !heads.contains_key(conversation)).cloned().collect();
    if !unknown.is_empty() {
        unknown.sort_unstable();
        unknown.dedup();
        if heads.len() + unknown.len() > HEADS_MAX {
            known.forget_conversations();
            unknown = sends.iter().map(|send| send.conversation.clone()).collect();
        }
        known.load_blocked(log, &unknown).await?;
        let found = log.heads(unknown.clone()).await?;
        known
            .heads
            .extend(unknown.into_iter().zip(found).filter_map(|(conversation, head)| Some((conversation, head?))));
    }
    for send in &mut *sends {
        // What changes a message is withheld with it. A text that somebody has is taken back in any case.
        send.withheld |= !matches!(send.body, Body::Unsend { .. }) && known.is_withheld(send);
    }
    let heads = &known.heads;
    // A conversation without entries has no ids either.
    let keys: Vec<IdKey> =
        sends.iter().filter(|send| heads.contains_key(&send.conversation)).filter_map(Send::id_key).collect();
    let stored: FxHashMap<IdKey, Entry> = if keys.is_empty() {
        FxHashMap::default()
    } else {
        let found = log.find(keys.clone()).await?;
        keys.into_iter().zip(found).filter_map(|(key, entry)| Some((key, entry?))).collect()
    };
    Ok(core::plan(sends, heads, &stored, known.quotas, &known.usage, &known.beginnings, now()))
}

impl Known {
    fn forget_conversations(&mut self) {
        self.heads.clear();
        self.blocked.clear();
    }

    /// Asks who blocked whom in these conversations.
    async fn load_blocked<L: Log>(&mut self, log: &L, conversations: &[ConversationId]) -> Result<(), LogError> {
        for conversation in conversations {
            let (first, second) = (conversation.first(), conversation.second());
            let blocks = |record: Option<PeerRecord>| record.is_some_and(|record| record.blocked_at_ms.is_some());
            let blocked = [blocks(log.peer(first, second).await?), blocks(log.peer(second, first).await?)];
            if blocked != [false; 2] {
                self.blocked.insert(conversation.clone(), blocked);
            }
        }
        Ok(())
    }

    /// Whether the receiver has blocked the sender.
    fn is_withheld(&self, send: &Send) -> bool {
        self.blocks.changed(&send.to, &send.from).unwrap_or_else(|| {
            let blocked = self.blocked.get(&send.conversation);
            blocked.is_some_and(|[first, second]| if send.to == *send.conversation.first() { *first } else { *second })
        })
    }

    /// Asks what is stored for the accounts of these messages, as far as they have a limit.
    async fn load_usage<L: Log>(&mut self, log: &L, sends: &[Send]) -> Result<(), LogError> {
        if self.quotas == Quotas::NONE {
            return Ok(());
        }
        let first = log.first();
        if first != self.usage_since || self.usage.len() > ACCOUNTS_MAX {
            self.usage.clear();
            self.usage_since = first;
        }
        let accounts: FxHashSet<Account> = sends
            .iter()
            .flat_map(|send| self.quotas.accounts(send))
            .filter(|account| !self.usage.contains_key(account))
            .collect();
        if accounts.is_empty() {
            return Ok(());
        }
        let accounts: Vec<Account> = accounts.into_iter().collect();
        let stored = log.usage(accounts.clone()).await?;
        self.usage.extend(accounts.into_iter().zip(stored));
        Ok(())
    }

    fn remember(&mut self, entries: &[NewEntry]) {
        for run in entries.chunk_by(|one, next| one.conversation == next.conversation) {
            let Some(last) = run.last() else { continue };
            let head = ConversationHead { seq: last.seq, at: last.at };
            match self.heads.get_mut(&last.conversation) {
                Some(known) => *known = head,
                None => {
                    self.heads.insert(last.conversation.clone(), head);
                }
            }
        }
        if self.quotas == Quotas::NONE {
            return;
        }
        for entry in entries {
            for account in [Account::Conversation(entry.conversation.clone()), Account::Sender(entry.from.clone())] {
                if let Some(usage) = self.usage.get_mut(&account) {
                    *usage += entry.body.counted_bytes();
                }
            }
        }
    }
}

/// Refuses what cannot be stored now.
fn refuse_all(
    sends: &[Send],
    answers: Vec<Answer>,
    code: ErrorCode,
    reason: &str,
    announcer: &Announcer,
    metrics: &Metrics,
) {
    let outcomes = sends
        .iter()
        .zip(answers)
        .filter_map(|(send, answer)| {
            let (reply, can_answer, topic) = match answer {
                Answer::Publish { reply, can_answer, topic, .. } => (reply, can_answer, topic),
                Answer::Request(answer) => {
                    // Whoever does not wait any more needs no answer.
                    answer.send(Err(RequestError::new(code, reason))).unwrap_or(());
                    return None;
                }
            };
            let told = !can_answer;
            let id = send.id.as_ref().map(|id| id.as_str());
            refusal::count_and_tell(announcer, metrics, send.from.as_str(), told, code, reason, &topic, id);
            // It may succeed later, and a PUBACK that cannot say so would be taken for success: better none, and a resend.
            let outcome =
                if told { PublishOutcome::Unknown } else { PublishOutcome::Refused(refusal::refusal(code, reason)) };
            Some((reply, outcome))
        })
        .collect();
    complete(outcomes);
}

/// What it takes to announce.
struct Announcing<L> {
    announcer: Announcer,
    metrics: Arc<Metrics>,
    presence: Arc<Presence<L>>,
    head: watch::Sender<Position>,
    /// Every inbox, and what everybody sends.
    every: [String; 2],
    live: Live,
}

/// Announces batch after batch, in their order. `under_way`: so many are not announced yet.
async fn announce<L: Log>(
    mut committed: mpsc::Receiver<Committed>,
    mut announcing: Announcing<L>,
    under_way: Arc<AtomicUsize>,
) {
    while let Some(batch) = committed.recv().await {
        announcing.announce(batch);
        under_way.fetch_sub(1, Ordering::Release);
    }
}

impl<L: Log> Announcing<L> {
    /// Answers senders and puts messages on the bus.
    fn announce(&mut self, committed: Committed) {
        let Self { announcer, metrics, presence, head: log_head, every, live } = self;
        let Committed { sends, answers, plan, positions } = committed;
        let observed = [&every[0], &every[1]].map(|filter| announcer.has_subscribers(filter));
        let mut messages = Vec::with_capacity(positions.len());
        let mut outcomes = Vec::with_capacity(answers.len());
        live.users = None;
        for ((send, answer), decision) in sends.iter().zip(answers).zip(&plan.decisions) {
            let head = match decision {
                Decision::Append(index) => {
                    let entry = &plan.entries[*index];
                    live.push(&mut messages, announcer, &observed, entry, positions[*index], answer.received_at());
                    ConversationHead { seq: entry.seq, at: entry.at }
                }
                Decision::SameAsNew(index) => {
                    metrics.messages_duplicate.inc();
                    let entry = &plan.entries[*index];
                    ConversationHead { seq: entry.seq, at: entry.at }
                }
                Decision::Stored(head) => {
                    metrics.messages_duplicate.inc();
                    *head
                }
                Decision::IdConflict | Decision::SenderFull | Decision::ConversationFull | Decision::TooManyBegun => {
                    let (code, reason, limit) = refused(*decision);
                    if let Some(limit) = limit {
                        metrics.limited(limit);
                    }
                    let (reply, can_answer, topic) = match answer {
                        Answer::Publish { reply, can_answer, topic, .. } => (reply, can_answer, topic),
                        Answer::Request(answer) => {
                            // Whoever does not wait any more needs no answer.
                            answer.send(Err(RequestError::new(code, reason))).unwrap_or(());
                            continue;
                        }
                    };
                    let id = send.id.as_ref().map(|id| id.as_str());
                    refusal::count_and_tell(
                        announcer,
                        metrics,
                        send.from.as_str(),
                        !can_answer,
                        code,
                        reason,
                        &topic,
                        id,
                    );
                    outcomes.push((reply, PublishOutcome::Refused(refusal::refusal(code, reason))));
                    continue;
                }
            };
            let (reply, can_answer) = match answer {
                Answer::Publish { reply, can_answer, .. } => (reply, can_answer),
                Answer::Request(answer) => {
                    answer.send(Ok(head)).unwrap_or(());
                    continue;
                }
            };
            outcomes.push((
                reply,
                if can_answer {
                    PublishOutcome::Stored {
                        subscribers: announcer.is_connected(send.to.as_str()),
                        properties: vec![("seq", head.seq.to_string()), ("at", head.at.as_ms().to_string())],
                    }
                } else {
                    // MQTT 3.1.1 can be told nothing of it.
                    PublishOutcome::Stored { subscribers: true, properties: Vec::new() }
                },
            ));
        }
        if !messages.is_empty() {
            announcer.announce_encoded(messages);
        }
        complete(outcomes);
        for entry in plan.entries.iter().filter(|entry| entry.seq == Seq::FIRST) {
            presence.met(&entry.from, &entry.to);
        }
        if let Some(last) = positions.last() {
            log_head.send_replace(*last);
        }
    }
}

/// Code and sentence, and the limit that is to blame.
fn refused(decision: Decision) -> (ErrorCode, &'static str, Option<&'static str>) {
    match decision {
        Decision::SenderFull => {
            (ErrorCode::QuotaExceeded, "you have as much stored as one user may", Some("user_bytes"))
        }
        Decision::ConversationFull => {
            let sentence = "this conversation has as much stored as one may";
            (ErrorCode::QuotaExceeded, sentence, Some("conversation_bytes"))
        }
        Decision::TooManyBegun => {
            let sentence = "you began too many conversations in the last hour: answer, or begin this one later";
            (ErrorCode::QuotaExceeded, sentence, Some("new_conversations_per_hour"))
        }
        _ => (ErrorCode::IdConflict, "this id was used for another text in this conversation", None),
    }
}

/// Writes messages for the bus. What it finds and writes on the way is kept from one to the next: they often have the same two users.
#[derive(Default)]
struct Live {
    users: Option<(UserId, UserId)>,
    inbox: String,
    sent: String,
    /// Whether somebody listens there. Whoever begins to listen later reads from the log what is in this batch: it is written.
    listened: [bool; 2],
    envelope: Vec<u8>,
    seq: String,
}

impl Live {
    /// `observed`: whether somebody reads every inbox, and what everybody sends.
    fn push(
        &mut self,
        messages: &mut Vec<Frame>,
        announcer: &Announcer,
        observed: &[bool; 2],
        entry: &NewEntry,
        position: Position,
        received_at: Option<Instant>,
    ) {
        if self.users.as_ref().is_none_or(|(from, to)| *from != entry.from || *to != entry.to) {
            self.users = Some((entry.from.clone(), entry.to.clone()));
            Down::Inbox.write_topic(&entry.to, &mut self.inbox);
            Down::Sent.write_topic(&entry.from, &mut self.sent);
            self.listened = [&self.inbox, &self.sent].map(|topic| announcer.has_subscribers(topic));
        }
        let to_inbox = !entry.withheld && (observed[0] || self.listened[0]);
        let to_sent = observed[1] || self.listened[1];
        if !to_inbox && !to_sent {
            return;
        }
        envelope::encode_into(entry, &mut self.envelope);
        self.seq.clear();
        // A string takes whatever is written.
        write!(self.seq, "{}", entry.seq).unwrap_or(());
        let mut properties = [("", ""); 4];
        let properties = envelope::properties_of(entry, &self.seq, &mut properties);
        let position = broker::service::Position(position.0);
        let received_us = received_at.map_or(0, |received_at| announcer.micros(received_at));
        let erases = matches!(entry.body, Body::Unsend { .. });
        for (topic, wanted) in [(&self.inbox, to_inbox), (&self.sent, to_sent)] {
            if wanted {
                messages.push(live::encode(topic, position, received_us, &self.envelope, properties, erases));
            }
        }
        // One long text is no reason to keep so much for ever.
        self.envelope.shrink_to(ENVELOPE_KEPT_BYTES);
    }
}

/// The server's clock.
fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_ms(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
