//! The log: the truth about every conversation, behind one trait.
//!
//! A message exists when the log has it. The trait is shaped for more than one machine: appends are asynchronous, can fail with an
//! unknown outcome, and can lose against another writer (compare-and-set on a conversation's last seq). Whoever implements it
//! must pass [`conformance`]. Invariants: a conversation's seq is 1, 2, 3, … without gaps; positions grow in the order of
//! commits; what a read returned once, every later read returns; a batch is stored whole or not at all.

pub mod conformance;
mod memory;
mod redb;

use std::fmt;
use std::future::Future;
use std::ops::RangeInclusive;
use std::sync::Arc;

use chat_protocol::{ConversationId, MessageId, Seq, Timestamp, UserId};

pub use self::memory::MemoryLog;
pub use self::redb::{OpenError, RedbLog, RedbOptions, tools};

/// A place in the log. Grows with every entry; 0 is before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub u64);

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    Text(Arc<str>),
    /// The text of an earlier entry is now this.
    Edit {
        target: Seq,
        text: Arc<str>,
    },
    /// The text of an earlier entry is taken back.
    Unsend {
        target: Seq,
    },
    /// A text, or an edit of `target`, whose words were erased; so many bytes they had.
    Erased {
        bytes: u64,
        target: Option<Seq>,
    },
}

impl Body {
    /// Its words, which may be none.
    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Edit { text, .. } => text,
            Self::Unsend { .. } | Self::Erased { .. } => "",
        }
    }

    /// The same without its words; `None` if it has none.
    pub(crate) fn erased(&self) -> Option<Self> {
        match self {
            Self::Text(text) => Some(Self::Erased { bytes: text.len() as u64, target: None }),
            Self::Edit { target, text } => Some(Self::Erased { bytes: text.len() as u64, target: Some(*target) }),
            Self::Unsend { .. } | Self::Erased { .. } => None,
        }
    }

    /// The seq of the entry that it changes.
    pub fn target(&self) -> Option<Seq> {
        match self {
            Self::Edit { target, .. } | Self::Unsend { target } => Some(*target),
            Self::Erased { target, .. } => *target,
            Self::Text(_) => None,
        }
    }

    /// What it counts for the accounts of its entry, in bytes. Erasing changes nothing: the room stays taken until the entry is removed.
    pub fn counted_bytes(&self) -> u64 {
        let words = match self {
            Self::Erased { bytes, .. } => *bytes,
            _ => self.text().len() as u64,
        };
        words.saturating_add(MESSAGE_OVERHEAD_BYTES)
    }
}

impl<T: Into<Arc<str>>> From<T> for Body {
    fn from(text: T) -> Self {
        Self::Text(text.into())
    }
}

/// A message to append. Its `seq` says what the writer believes to be next: the log refuses the batch if it is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewEntry {
    pub conversation: ConversationId,
    pub seq: Seq,
    pub from: UserId,
    pub to: UserId,
    pub id: Option<MessageId>,
    pub at: Timestamp,
    pub body: Body,
    /// The receiver has blocked the sender: it is in the conversation, but never in the receiver's stream.
    pub withheld: bool,
}

/// A stored message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub position: Position,
    pub conversation: ConversationId,
    pub seq: Seq,
    pub from: UserId,
    pub to: UserId,
    pub id: Option<MessageId>,
    pub at: Timestamp,
    pub body: Body,
    /// The receiver has blocked the sender: it is in the conversation, but never in the receiver's stream.
    pub withheld: bool,
}

/// The last entry of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConversationHead {
    pub seq: Seq,
    pub at: Timestamp,
}

/// A sender's id in a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IdKey {
    pub conversation: ConversationId,
    pub from: UserId,
    pub id: MessageId,
}

/// One user's side of the log: what others sent them, what they sent, or what they observe.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Stream {
    pub user: UserId,
    pub side: Side,
}

/// Which side of a user's conversations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// Entries sent to the user.
    Inbox,
    /// Entries sent by the user.
    Sent,
    /// What is in anybody's inbox, as this user reads it: an observer.
    EveryInbox,
    /// What anybody sent, as this user reads it: every entry of the log.
    EverySent,
}

impl Side {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Inbox, Self::Sent, Self::EveryInbox, Self::EverySent];
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Inbox => "inbox",
            Side::Sent => "sent",
            Side::EveryInbox => "+/inbox",
            Side::EverySent => "+/sent",
        };
        write!(f, "{}/{side}", self.user)
    }
}

/// How much one read may return. At least one entry is returned if there is one.
#[derive(Clone, Copy, Debug)]
pub struct ReadLimit {
    pub entries: usize,
    /// Of text, roughly.
    pub bytes: usize,
}

impl ReadLimit {
    /// Whether a page with so many entries and bytes of text may take another text.
    fn has_room(&self, entries: usize, bytes: usize, text_bytes: usize) -> bool {
        entries == 0 || (entries < self.entries && bytes.saturating_add(text_bytes) <= self.bytes)
    }
}

/// Entries in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    pub entries: Vec<Entry>,
    /// Everything committed before the read began is in this page or before it.
    pub end: bool,
}

/// Who or what stored bytes are counted for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Account {
    /// What is in a conversation.
    Conversation(ConversationId),
    /// What a user sent, in all conversations.
    Sender(UserId),
}

/// What a message counts besides its text: names, id, time and the index.
pub const MESSAGE_OVERHEAD_BYTES: u64 = 64;

/// A device: a user and a client id.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    pub user: UserId,
    pub client_id: Arc<str>,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.user, self.client_id.escape_debug())
    }
}

/// A device's persistent session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionRecord {
    pub subscriptions: Vec<SubscriptionRecord>,
    /// Seconds that it outlives its last connection; `u32::MAX` for ever.
    pub expiry_s: u32,
    /// When its last connection ended, in milliseconds since the Unix epoch; `None` while one may be there.
    pub ended_at_ms: Option<u64>,
    /// Where the device stands.
    pub cursors: Cursors,
}

/// Where a device stands in each of its user's streams; `None` where it never subscribed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursors {
    pub inbox: Option<Position>,
    pub sent: Option<Position>,
    pub every_inbox: Option<Position>,
    pub every_sent: Option<Position>,
}

impl Cursors {
    /// The one in this stream.
    pub fn of(mut self, side: Side) -> Option<Position> {
        *self.of_mut(side)
    }

    /// The one in this stream, to be set.
    pub fn of_mut(&mut self, side: Side) -> &mut Option<Position> {
        match side {
            Side::Inbox => &mut self.inbox,
            Side::Sent => &mut self.sent,
            Side::EveryInbox => &mut self.every_inbox,
            Side::EverySent => &mut self.every_sent,
        }
    }
}

impl SessionRecord {
    /// Moves a cursor forward, if it is there and the position is later.
    fn advance(&mut self, side: Side, position: Position) {
        if let Some(cursor) = self.cursors.of_mut(side) {
            *cursor = position.max(*cursor);
        }
    }
}

/// A subscription of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscriptionRecord {
    pub filter: String,
    pub qos: u8,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub identifier: Option<u32>,
}

/// What a user has on record about a peer: there from the conversation's first entry on, or from the first thing noted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerRecord {
    /// The seq up to which the user has read their conversation; 0: nothing.
    pub read: u64,
    /// When the user blocked the peer, in milliseconds since the Unix epoch; `None` if not blocked.
    pub blocked_at_ms: Option<u64>,
    /// The head of the log when this changed last.
    pub changed: Position,
}

/// What has reached a user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// The highest position that any device has acknowledged.
    pub position: Position,
    /// The head of the log when that became so.
    pub moved: Position,
}

/// A cursor's new place. Cursors only advance: an older position than the stored one changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advance {
    pub stream: Stream,
    /// The device whose own cursor moves too (it must have a session with a cursor in that stream, else only the user's moves).
    pub device: Option<Device>,
    pub position: Position,
}

/// Why an append did not happen, or may not have.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Another writer was first: nothing was stored. Read the conversation's head again.
    #[error("conversation {conversation} has moved on: expected seq {expected} to be next")]
    Conflict { conversation: ConversationId, expected: Seq },
    /// No space: nothing was stored; later appends may succeed.
    #[error("no space left: {0}")]
    Full(String),
    /// Stored or not, nobody knows. Read before writing again; acknowledge nothing.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// The log takes no more appends until the process starts again.
    #[error("the log has failed: {0}")]
    Failed(String),
}

/// A read or a session write failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}")]
pub struct LogError {
    /// What was tried, e.g. `reading alice's inbox`.
    pub what: String,
    /// What the storage said.
    pub cause: String,
}

/// Where messages live. Cheap to share (`Arc`); every call may come from any task.
pub trait Log: Send + Sync + 'static {
    /// Stores a batch whole, durably, or not at all; positions in the batch's order. Returns only after the data is on disk. With a
    /// [`Body::Unsend`] the words of its target and of that one's edits, as far as they were stored before the batch, become
    /// [`Body::Erased`].
    fn append(
        &self,
        batch: impl Into<Arc<Vec<NewEntry>>> + Send,
    ) -> impl Future<Output = Result<Vec<Position>, AppendError>> + Send;

    /// The same, for a caller on a thread that may wait for the disk: that is faster than to have another thread wait.
    fn append_in_place(
        &self,
        batch: impl Into<Arc<Vec<NewEntry>>> + Send,
    ) -> impl Future<Output = Result<Vec<Position>, AppendError>> + Send {
        self.append(batch)
    }

    /// Heads of conversations, in the order asked; `None` for one without entries.
    fn heads(
        &self,
        conversations: Vec<ConversationId>,
    ) -> impl Future<Output = Result<Vec<Option<ConversationHead>>, LogError>> + Send;

    /// Entries by their senders' ids, in the order asked; found for at least 7 days, unless the entry is removed before.
    fn find(&self, ids: Vec<IdKey>) -> impl Future<Output = Result<Vec<Option<Entry>>, LogError>> + Send;

    /// Entries of one user's stream after a position. Never blocks the writer.
    fn read(
        &self,
        stream: &Stream,
        after: Position,
        limit: ReadLimit,
    ) -> impl Future<Output = Result<Page, LogError>> + Send;

    /// Entries of a conversation after a seq (`None`: from the first).
    fn read_conversation(
        &self,
        conversation: &ConversationId,
        after: Option<Seq>,
        limit: ReadLimit,
    ) -> impl Future<Output = Result<Page, LogError>> + Send;

    /// Position of the last committed entry, from memory.
    fn head(&self) -> Position;

    /// Position of the first entry that is still there, or of the next one if there is none; from memory.
    fn first(&self) -> Position;

    /// Removes entries from the beginning of the log: those up to the last that is older than this time, a bounded number at once. How many
    /// that were; 0 once none is left to remove. Heads stay, so that a conversation without entries goes on with its next seq.
    fn remove_before(&self, time: Timestamp) -> impl Future<Output = Result<u64, LogError>> + Send;

    /// What is stored for accounts ([`Body::counted_bytes`] of each entry that is there), in the order asked. An error if the log does not count.
    fn usage(&self, accounts: Vec<Account>) -> impl Future<Output = Result<Vec<u64>, LogError>> + Send;

    /// Moves cursors forward. Returns at once; on disk at most a second later (losing that may repeat a delivery, never skip one).
    /// Reads of sessions and cursors see it at once.
    fn advance(&self, advances: Vec<Advance>);

    /// What some device of the user has had in this stream.
    fn delivered(&self, stream: &Stream) -> impl Future<Output = Result<Delivered, LogError>> + Send;

    /// A number that this log has kept since it was made, and no other log has.
    fn identity(&self) -> u64;

    /// A device's session.
    fn session(&self, device: &Device) -> impl Future<Output = Result<Option<SessionRecord>, LogError>> + Send;

    /// The sessions of a user, or of all users, in no order.
    fn sessions(
        &self,
        user: Option<&UserId>,
    ) -> impl Future<Output = Result<Vec<(Device, SessionRecord)>, LogError>> + Send;

    /// Writes a session; on disk when it returns. Its cursors replace the stored ones.
    fn put_session(&self, device: &Device, record: SessionRecord) -> impl Future<Output = Result<(), LogError>> + Send;

    /// Notes that a device's last connection ended at this time (milliseconds since the Unix epoch), with this expiry.
    /// Returns at once, like [`Log::advance`]. Nothing happens if there is no such session.
    fn end_session(&self, device: &Device, ended_at_ms: u64, expiry_s: u32);

    /// Removes a session with its cursors.
    fn delete_session(&self, device: &Device) -> impl Future<Output = Result<(), LogError>> + Send;

    /// A user's peers, in the order of their names.
    fn peers(&self, user: &UserId) -> impl Future<Output = Result<Vec<(UserId, PeerRecord)>, LogError>> + Send;

    /// What a user has on record about one peer.
    fn peer(&self, user: &UserId, peer: &UserId) -> impl Future<Output = Result<Option<PeerRecord>, LogError>> + Send;

    /// The user has read the conversation with the peer up to a seq; only advances. Returns at once, like [`Log::advance`].
    fn advance_read(&self, user: &UserId, peer: &UserId, seq: Seq);

    /// The user blocks the peer, or no longer; on disk when it returns.
    fn set_blocked(
        &self,
        user: &UserId,
        peer: &UserId,
        at_ms: Option<u64>,
    ) -> impl Future<Output = Result<(), LogError>> + Send;

    /// The user does not want to see an entry of the conversation with the peer any more; on disk when it returns.
    fn hide(&self, user: &UserId, peer: &UserId, seq: Seq) -> impl Future<Output = Result<(), LogError>> + Send;

    /// Seqs that the user hid in the conversation with the peer, from one up to another, in their order, each with the head of the log
    /// at the time.
    fn hidden(
        &self,
        user: &UserId,
        peer: &UserId,
        seqs: RangeInclusive<Seq>,
    ) -> impl Future<Output = Result<Vec<(Seq, Position)>, LogError>> + Send;

    /// Notes when a user was last there, in milliseconds since the Unix epoch; only advances. Returns at once, like [`Log::advance`].
    fn note_seen(&self, user: &UserId, at_ms: u64);

    /// When a user was last there, as far as it was noted.
    fn last_seen(&self, user: &UserId) -> impl Future<Output = Result<Option<u64>, LogError>> + Send;

    /// Edits (also erased ones) and unsends of entries of a conversation, in the order asked, each in the order of seq.
    fn changes(
        &self,
        conversation: &ConversationId,
        targets: Vec<Seq>,
    ) -> impl Future<Output = Result<Vec<Vec<Entry>>, LogError>> + Send;

    /// The seq of a conversation's first entry after a position.
    fn first_after(
        &self,
        conversation: &ConversationId,
        position: Position,
    ) -> impl Future<Output = Result<Option<Seq>, LogError>> + Send;

    /// Writes what was only noted (cursors, ended sessions); on disk when it returns.
    fn flush(&self) -> impl Future<Output = Result<(), LogError>> + Send;

    /// `Err` with the reason once the log has failed and takes no more appends.
    fn health(&self) -> Result<(), String>;
}
