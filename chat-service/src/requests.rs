//! Requests: what a client asks on `chat/{me}/req/{method}`, carried out and answered.
//!
//! Each runs in a task of its own, at most so many at a time; a publish beyond that is refused, not queued, and so is one while many answers
//! wait for whoever asks: an answer is never lost for want of room. What changes a message goes
//! through the sequencer like a message, and two changes of one conversation never overlap: the second sees what the first did.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use broker::Announcer;
use broker::live::LiveMessage;
use bytes::Bytes;
use chat_protocol::request::{
    BlockedOk, BlockedUser, Call, ChangedOk, DoneOk, Request, RequestError, WhoamiOk, encode_answer,
};
use chat_protocol::{ConversationId, ErrorCode, MessageId, Seq, Timestamp, UserId};
use parking_lot::RwLock;
use rustc_hash::FxHashMap;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::auth::Auth;
use crate::core::Send as ChatSend;
use crate::log::{Body, ConversationHead, Log, PeerRecord};
use crate::metrics::Metrics;
use crate::presence::Presence;
use crate::receipts::Receipts;
use crate::sequencer::{Answer, Submission};
use crate::views::{ViewError, Views};

/// Requests that are being carried out: of all users, and of one.
const UNDER_WAY_MAX: usize = 4_096;
const UNDER_WAY_OF_USER_MAX: usize = 64;
/// Users that one user may have blocked.
const BLOCKED_MAX: usize = 5_000;
/// How often the bus is asked for room, and how long at most for one answer.
const BUS_RETRY: Duration = Duration::from_millis(2);
const BUS_WAIT_MAX: Duration = Duration::from_secs(1);
/// Locks that conversations share.
const CHANGE_LOCKS: usize = 256;

/// Changes of who blocked whom that are remembered, before everything that was read before them is forgotten.
const CHANGED_BLOCKS_MAX: usize = 10_000;

/// Who blocked whom, as far as it changed since what the log says of it was read.
#[derive(Debug, Default)]
pub struct Blocks {
    /// By who blocks and who is blocked.
    changed: RwLock<FxHashMap<(UserId, UserId), bool>>,
}

impl Blocks {
    /// Whether a user blocks another, if that changed.
    pub fn changed(&self, user: &UserId, other: &UserId) -> Option<bool> {
        let changed = self.changed.read();
        if changed.is_empty() { None } else { changed.get(&(user.clone(), other.clone())).copied() }
    }

    /// Forgets the changes if they are many. If so, what the log says has to be read again: it has them all.
    pub fn forget_many(&self) -> bool {
        if self.changed.read().len() < CHANGED_BLOCKS_MAX {
            return false;
        }
        *self.changed.write() = FxHashMap::default();
        true
    }

    /// The log has it already.
    fn set(&self, user: UserId, other: UserId, blocks: bool) {
        self.changed.write().insert((user, other), blocks);
    }
}

/// A request that was published.
#[derive(Debug)]
pub struct Asked {
    pub me: UserId,
    pub method: String,
    pub payload: Bytes,
    /// Where the answer goes.
    pub answer_topic: Arc<str>,
    /// MQTT 5 correlation data.
    pub correlation: Bytes,
}

/// Carries out requests.
pub struct Requests<L> {
    shared: Arc<Shared<L>>,
    permits: Arc<Semaphore>,
    under_way: Arc<UnderWay>,
}

/// Requests that are being carried out, of each user.
#[derive(Debug, Default)]
struct UnderWay(parking_lot::Mutex<FxHashMap<UserId, usize>>);

/// Leave to carry out one. Given back when it is dropped.
struct Permit {
    _of_all: OwnedSemaphorePermit,
    under_way: Arc<UnderWay>,
    user: UserId,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut users = self.under_way.0.lock();
        if let Some(count) = users.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                users.remove(&self.user);
            }
        }
    }
}

struct Shared<L> {
    log: Arc<L>,
    views: Views<L>,
    queue: mpsc::Sender<Vec<Submission>>,
    announcer: Announcer,
    metrics: Arc<Metrics>,
    blocks: Arc<Blocks>,
    receipts: Arc<Receipts<L>>,
    presence: Arc<Presence<L>>,
    auth: Arc<Auth>,
    message_bytes_max: usize,
    /// Answers leave one after another.
    leaving: Mutex<()>,
    change_locks: Vec<Mutex<()>>,
    hasher: RandomState,
}

/// What [`Requests`] are made of.
pub struct Parts<L> {
    pub log: Arc<L>,
    pub queue: mpsc::Sender<Vec<Submission>>,
    pub announcer: Announcer,
    pub metrics: Arc<Metrics>,
    pub blocks: Arc<Blocks>,
    pub receipts: Arc<Receipts<L>>,
    /// Told who unblocks whom.
    pub presence: Arc<Presence<L>>,
    /// Knows who is no user.
    pub auth: Arc<Auth>,
    /// Longest text, in bytes.
    pub message_bytes_max: usize,
}

impl<L: Log> Requests<L> {
    pub fn new(parts: Parts<L>) -> Self {
        let Parts { log, queue, announcer, metrics, blocks, receipts, presence, auth, message_bytes_max } = parts;
        let shared = Shared {
            views: Views::new(Arc::clone(&log)),
            log,
            queue,
            announcer,
            metrics,
            blocks,
            receipts,
            presence,
            auth,
            message_bytes_max,
            leaving: Mutex::new(()),
            change_locks: (0..CHANGE_LOCKS).map(|_| Mutex::new(())).collect(),
            hasher: RandomState::new(),
        };
        let permits = Arc::new(Semaphore::new(UNDER_WAY_MAX));
        Self { shared: Arc::new(shared), permits, under_way: Arc::default() }
    }

    /// `None` if too many are under way, of this user or in all.
    fn permit(&self, user: &UserId) -> Option<Permit> {
        let of_all = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        {
            let mut users = self.under_way.0.lock();
            let count = users.entry(user.clone()).or_default();
            if *count >= UNDER_WAY_OF_USER_MAX {
                return None;
            }
            *count += 1;
        }
        Some(Permit { _of_all: of_all, under_way: Arc::clone(&self.under_way), user: user.clone() })
    }

    /// Begins to carry out a request; `false` if too many are under way, or their answers wait to be taken.
    pub fn begin(&self, asked: Asked) -> bool {
        if !self.shared.announcer.takes_answers(&asked.answer_topic) {
            return false;
        }
        let Some(permit) = self.permit(&asked.me) else { return false };
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let answer = shared.answer(&asked).await;
            let message =
                LiveMessage::event(asked.answer_topic, answer).with_correlation(asked.correlation).answering();
            shared.let_leave(message).await;
            drop(permit);
        });
        true
    }
}

type Outcome<T> = Result<T, ViewError>;

fn refused<T>(code: ErrorCode, message: impl Into<String>) -> Outcome<T> {
    Err(ViewError::Refused(RequestError::new(code, message)))
}

impl<L: Log> Shared<L> {
    /// Announces an answer when the bus has room for it: it is large, many come at once, and what the bus has no room for is lost.
    async fn let_leave(&self, answer: LiveMessage) {
        let turn = self.leaving.lock().await;
        let waited_for = async {
            while !self.announcer.has_room(answer.payload.len()) {
                tokio::time::sleep(BUS_RETRY).await;
            }
        };
        if tokio::time::timeout(BUS_WAIT_MAX, waited_for).await.is_err() {
            tracing::warn!("the bus has no room for an answer");
        }
        self.announcer.announce(vec![answer]);
        drop(turn);
    }

    async fn answer(&self, asked: &Asked) -> Vec<u8> {
        let Request { reference, call } = Request::parse(&asked.method, &asked.payload);
        let reference = reference.as_ref();
        let call = match call {
            Ok(call) => call,
            Err(error) => return self.encode::<DoneOk>(reference, Err(ViewError::Refused(error))),
        };
        // What was said with somebody who has been removed since is still there to be read.
        if let Some(with) = call.with()
            && !self.auth.may_exist(with)
            && matches!(self.log.peer(&asked.me, with).await, Ok(None))
        {
            let sentence = format!("`with`: there is no user {with}");
            return self.encode::<DoneOk>(reference, refused(ErrorCode::UnknownUser, sentence));
        }
        let me = &asked.me;
        match call {
            Call::Whoami => {
                let version = env!("CARGO_PKG_VERSION").to_owned();
                let (user, message_bytes) = (me.clone(), self.message_bytes_max);
                self.encode(reference, Ok(WhoamiOk { user, at: now(), version, message_bytes }))
            }
            Call::Conversations { limit, before } => {
                self.encode(reference, self.views.conversations(me, limit, before).await)
            }
            Call::History { with, range, limit, raw } => {
                self.encode(reference, self.views.history(me, &with, range, limit, raw).await)
            }
            Call::Sync { since, limit } => self.encode(reference, self.views.sync(me, since.as_deref(), limit).await),
            Call::Block { with } => self.encode(reference, self.block(me, with, true).await),
            Call::Unblock { with } => self.encode(reference, self.block(me, with, false).await),
            Call::Blocked => self.encode(reference, self.blocked(me).await),
            Call::Delete { with, seq } => self.encode(reference, self.delete(me, &with, seq).await),
            Call::Unsend { with, seq, id } => {
                self.encode(reference, self.change(me, &with, seq, Body::Unsend { target: seq }, id).await)
            }
            Call::Edit { with, seq, text, id } => {
                let edited = match self.check_text(&text) {
                    Ok(()) => self.change(me, &with, seq, Body::Edit { target: seq, text: text.into() }, id).await,
                    Err(error) => Err(error),
                };
                self.encode(reference, edited)
            }
        }
    }

    fn encode<T: Serialize>(&self, reference: Option<&Value>, outcome: Outcome<T>) -> Vec<u8> {
        let outcome = outcome.map_err(|error| match error {
            ViewError::Refused(error) => error,
            ViewError::Log(error) => {
                tracing::error!(%error, "a request could not be answered");
                RequestError::new(ErrorCode::Unavailable, "the log cannot be read now: ask again")
            }
        });
        if let Err(error) = &outcome {
            self.metrics.refused(error.code.as_str());
        }
        encode_answer(reference, &outcome)
    }

    fn check_text(&self, text: &str) -> Outcome<()> {
        if text.is_empty() {
            return refused(ErrorCode::EmptyText, "`text`: it is empty; to take a text back there is unsend");
        }
        if text.len() > self.message_bytes_max {
            let (bytes, max) = (text.len(), self.message_bytes_max);
            return refused(
                ErrorCode::TextTooLong,
                format!("`text`: it has {bytes} bytes; limits.message_bytes is {max}"),
            );
        }
        Ok(())
    }

    async fn block(&self, me: &UserId, with: UserId, blocks: bool) -> Outcome<DoneOk> {
        if *me == with {
            return refused(ErrorCode::SelfMessage, "`with`: nobody can block themselves");
        }
        let peers = self.log.peers(me).await?;
        let is_blocked = |record: &PeerRecord| record.blocked_at_ms.is_some();
        let was_blocked = peers.iter().any(|(user, record)| *user == with && is_blocked(record));
        if was_blocked == blocks {
            return Ok(DoneOk {});
        }
        if blocks && peers.iter().filter(|(_, record)| is_blocked(record)).count() >= BLOCKED_MAX {
            return refused(
                ErrorCode::QuotaExceeded,
                format!("you have blocked {BLOCKED_MAX} users, and more cannot be"),
            );
        }
        self.log.set_blocked(me, &with, blocks.then(|| now().as_ms())).await?;
        self.blocks.set(me.clone(), with.clone(), blocks);
        if !blocks {
            self.presence.met(me, &with);
        }
        Ok(DoneOk {})
    }

    async fn blocked(&self, me: &UserId) -> Outcome<BlockedOk> {
        let peers = self.log.peers(me).await?.into_iter();
        let blocked = peers
            .filter_map(|(user, record)| Some(BlockedUser { user, at: Timestamp::from_ms(record.blocked_at_ms?) }))
            .collect();
        Ok(BlockedOk { blocked })
    }

    async fn delete(&self, me: &UserId, with: &UserId, seq: Seq) -> Outcome<DoneOk> {
        self.views.entry(me, with, seq).await?;
        self.log.hide(me, with, seq).await?;
        Ok(DoneOk {})
    }

    /// Stores an edit or an unsend of a user's own text.
    async fn change(
        &self,
        me: &UserId,
        with: &UserId,
        seq: Seq,
        body: Body,
        id: Option<MessageId>,
    ) -> Outcome<ChangedOk> {
        let Ok(conversation) = ConversationId::between(me, with) else {
            return refused(ErrorCode::SelfMessage, "`with`: nobody can write to themselves");
        };
        let nth = usize::try_from(self.hasher.hash_one(&conversation) % CHANGE_LOCKS as u64).unwrap_or(0);
        let _alone = self.change_locks[nth].lock().await;
        let target = self.views.entry(me, with, seq).await?;
        if target.from != *me {
            return refused(ErrorCode::NotAuthorized, format!("`seq`: entry {seq} is {with}'s"));
        }
        match (&target.body, &body) {
            (Body::Text(_), _) => {}
            // A resend of what was done.
            (Body::Erased { target: None, .. }, _) if id.is_some() => {}
            (Body::Erased { target: None, .. }, _) => {
                return refused(ErrorCode::InvalidSeq, format!("`seq`: entry {seq} is unsent"));
            }
            _ => return refused(ErrorCode::InvalidSeq, format!("`seq`: entry {seq} is no text")),
        }
        if matches!(target.body, Body::Erased { .. }) && !self.is_stored(&conversation, me, id.as_ref()).await? {
            return refused(ErrorCode::InvalidSeq, format!("`seq`: entry {seq} is unsent"));
        }
        let (from, to, withheld) = (me.clone(), with.clone(), target.withheld);
        let send = ChatSend { conversation, from, to, id, body, withheld, bridged: false };
        let (answer, answered) = oneshot::channel();
        let unavailable =
            || refused(ErrorCode::Unavailable, "it is not known whether it was stored: ask again, with an `id`");
        if self.queue.send(vec![Submission { send, answer: Answer::Request(answer) }]).await.is_err() {
            return unavailable();
        }
        match answered.await {
            Ok(Ok(ConversationHead { seq, at })) => Ok(ChangedOk { seq, at }),
            Ok(Err(error)) => Err(ViewError::Refused(error)),
            Err(_) => unavailable(),
        }
    }

    async fn is_stored(&self, conversation: &ConversationId, from: &UserId, id: Option<&MessageId>) -> Outcome<bool> {
        let Some(id) = id else { return Ok(false) };
        let key = crate::log::IdKey { conversation: conversation.clone(), from: from.clone(), id: id.clone() };
        Ok(self.log.find(vec![key]).await?.iter().any(Option::is_some))
    }

    /// A user has read a conversation up to a seq. `Err`: why not.
    async fn read(&self, me: &UserId, with: &UserId, seq: Seq) -> Outcome<()> {
        let last = self.views.last_seq(me, with).await?;
        if seq > last {
            return refused(ErrorCode::InvalidSeq, format!("the last entry is {last}, and you have read {seq}"));
        }
        self.log.advance_read(me, with, seq);
        self.receipts.read(me, with);
        Ok(())
    }
}

impl<L: Log> Requests<L> {
    /// Carries out a request and gives back what would be published.
    #[cfg(test)]
    pub(crate) async fn ask(&self, asked: &Asked) -> Vec<u8> {
        self.shared.answer(asked).await
    }

    /// Room for one more; `None` if too many are under way.
    pub fn room(&self, user: &UserId) -> Option<Room<L>> {
        let permit = self.permit(user)?;
        Some(Room { shared: Arc::clone(&self.shared), permit })
    }
}

/// Room for something that takes its time.
pub struct Room<L> {
    shared: Arc<Shared<L>>,
    permit: Permit,
}

impl<L: Log> Room<L> {
    /// Notes that a user has read a conversation; the outcome goes to `done`.
    pub fn read(
        self,
        me: UserId,
        with: UserId,
        seq: Seq,
        done: impl FnOnce(Result<(), RequestError>) + Send + 'static,
    ) {
        let Self { shared, permit } = self;
        tokio::spawn(async move {
            let outcome = shared.read(&me, &with, seq).await;
            done(outcome.map_err(|error| match error {
                ViewError::Refused(error) => error,
                ViewError::Log(error) => {
                    tracing::error!(%error, "what was read could not be noted");
                    RequestError::new(ErrorCode::Unavailable, "the log cannot be read now: send it again")
                }
            }));
            drop(permit);
        });
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_ms(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_remembered_until_they_are_many() {
        let blocks = Blocks::default();
        let name = |name: &str| UserId::parse(name).unwrap();
        for other in 0..CHANGED_BLOCKS_MAX {
            assert!(!blocks.forget_many());
            blocks.set(name("alice"), name(&format!("user-{other}")), other % 2 == 0);
        }
        assert_eq!(blocks.changed(&name("alice"), &name("user-7")), Some(false));
        assert!(blocks.forget_many());
        assert_eq!(blocks.changed(&name("alice"), &name("user-7")), None);
        assert!(!blocks.forget_many());
    }
}
