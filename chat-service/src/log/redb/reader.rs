//! Reads: each takes a snapshot of what is committed, and waits for nobody.
//!
//! What one table says of an entry is checked against the entry itself, so a damaged index is an error and never another
//! conversation's message.

use std::sync::Arc;

use ::redb::{ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable};
use chat_protocol::{ConversationId, Seq, Timestamp};

use super::super::{
    ConversationHead, Device, Entry, IdKey, LogError, Page, Position, ReadLimit, SessionRecord, Side, Stream,
};
use super::Shared;
use super::record::{Broken, decode_entry, decode_session};
use super::schema::{
    BY_SEQ, CONVERSATIONS, DELIVERED, ENTRIES, IDS, SESSIONS, STREAMS, by_seq_key, conversation_key, delivered_key,
    id_key, session_key, stream_key, stream_position,
};

/// Up to so many point lookups (measured at 1 to 2 µs each) are done where the caller stands; moving to another thread costs
/// some 10 µs.
const INLINE_LOOKUPS_MAX: usize = 8;

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("{0}")]
    Storage(#[from] Box<::redb::Error>),
    #[error("the file is closed: {0}")]
    Closed(String),
}

/// redb has an error type for every kind of call; which it was does not matter here.
macro_rules! storage_errors {
    ($($error:ident),*) => {$(
        impl From<::redb::$error> for ReadError {
            fn from(error: ::redb::$error) -> Self {
                Self::Storage(Box::new(error.into()))
            }
        }
    )*};
}
storage_errors!(StorageError, TableError, TransactionError, SetDurabilityError);

impl Shared {
    /// A few point lookups.
    pub(super) async fn lookup<T: Send + 'static>(
        self: &Arc<Self>,
        lookups: usize,
        what: String,
        read: impl FnOnce(&ReadTransaction) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, LogError> {
        if lookups <= INLINE_LOOKUPS_MAX {
            return self.snapshot(read).map_err(|error| failed(what, &error));
        }
        self.page(what, read).await
    }

    /// A longer read, on a thread that may block.
    pub(super) async fn page<T: Send + 'static>(
        self: &Arc<Self>,
        what: String,
        read: impl FnOnce(&ReadTransaction) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, LogError> {
        let shared = Arc::clone(self);
        match tokio::task::spawn_blocking(move || shared.snapshot(read)).await {
            Ok(read) => read.map_err(|error| failed(what, &error)),
            Err(error) => Err(LogError { what, cause: error.to_string() }),
        }
    }

    fn snapshot<T>(&self, read: impl FnOnce(&ReadTransaction) -> Result<T, ReadError>) -> Result<T, ReadError> {
        let database = self.database.read();
        let snapshot = database.as_ref().ok_or_else(|| self.closed())?.begin_read()?;
        read(&snapshot)
    }

    pub(super) fn closed(&self) -> ReadError {
        ReadError::Closed(self.failure().unwrap_or("the log ends").to_owned())
    }

    pub(super) fn delivered(&self, stream: &Stream) -> Result<Position, LogError> {
        let noted = self.queue.noted_delivered(stream);
        let stored = self.snapshot(|snapshot| {
            let delivered = snapshot.open_table(DELIVERED)?;
            let stored = delivered.get(delivered_key(stream).as_slice())?;
            Ok(stored.map_or(Position::default(), |position| Position(position.value())))
        });
        let stored = stored.map_err(|error| failed(format!("reading what was delivered of {stream}"), &error))?;
        Ok(stored.max(noted))
    }

    pub(super) fn session(&self, device: &Device) -> Result<Option<SessionRecord>, LogError> {
        let read = || -> Result<Option<SessionRecord>, ReadError> {
            let database = self.database.read();
            let database = database.as_ref().ok_or_else(|| self.closed())?;
            // Notes and snapshot are of one moment, or a session that is being replaced could get its predecessor's cursors.
            let (notes, snapshot) = self.queue.noted_session(device, || database.begin_read());
            let stored = stored_session(&snapshot?.open_table(SESSIONS)?, device)?;
            Ok(notes.into_iter().flatten().fold(stored, |session, note| note.apply(session)))
        };
        read().map_err(|error| failed(format!("reading the session of {device}"), &error))
    }
}

fn failed(what: String, error: &ReadError) -> LogError {
    LogError { what, cause: error.to_string() }
}

type Bytes = &'static [u8];

pub(super) fn stored_session(
    sessions: &impl ReadableTable<Bytes, Bytes>,
    device: &Device,
) -> Result<Option<SessionRecord>, ReadError> {
    let Some(record) = sessions.get(session_key(device).as_slice())? else { return Ok(None) };
    Ok(Some(decode_session(device, record.value())?))
}

pub(super) fn stored_head(
    conversations: &impl ReadableTable<Bytes, (u64, u64)>,
    conversation: &ConversationId,
) -> Result<Option<ConversationHead>, ReadError> {
    let key = conversation_key(conversation);
    let Some(head) = conversations.get(key.as_slice())? else { return Ok(None) };
    let (seq, at) = head.value();
    let seq = Seq::new(seq).ok_or_else(|| Broken::at("conversations", &key, "its last seq is 0"))?;
    Ok(Some(ConversationHead { seq, at: Timestamp::from_ms(at) }))
}

pub(super) fn heads(
    snapshot: &ReadTransaction,
    conversations: &[ConversationId],
) -> Result<Vec<Option<ConversationHead>>, ReadError> {
    let table = snapshot.open_table(CONVERSATIONS)?;
    conversations.iter().map(|conversation| stored_head(&table, conversation)).collect()
}

pub(super) fn find(snapshot: &ReadTransaction, ids: &[IdKey]) -> Result<Vec<Option<Entry>>, ReadError> {
    let table = snapshot.open_table(IDS)?;
    let entries = Entries::of(snapshot)?;
    let find = |id: &IdKey| {
        let key = id_key(&id.conversation, &id.from, &id.id);
        let Some(found) = table.get(key.as_slice())? else { return Ok(None) };
        let entry = entries.get(Position(found.value().0))?;
        if entry.id.as_ref() == Some(&id.id) && entry.from == id.from && entry.conversation == id.conversation {
            Ok(Some(entry))
        } else {
            Err(Broken::at("ids", &key, format!("it names position {}, which has another id", entry.position.0)).into())
        }
    };
    ids.iter().map(find).collect()
}

pub(super) fn stream(
    snapshot: &ReadTransaction,
    stream: &Stream,
    after: Position,
    limit: ReadLimit,
) -> Result<Page, ReadError> {
    let Some(first) = after.0.checked_add(1) else { return Ok(Page { entries: Vec::new(), end: true }) };
    let streams = snapshot.open_table(STREAMS)?;
    let entries = Entries::of(snapshot)?;
    let first = stream_key(stream, Position(first));
    let last = stream_key(stream, Position(u64::MAX));
    let keys = streams.range(first.as_slice()..=last.as_slice())?.map(|key| {
        let (key, _) = key?;
        let key = key.value();
        let position = stream_position(key).ok_or_else(|| Broken::at("streams", key, "the key is cut short"))?;
        let entry = entries.get(position)?;
        let user = match stream.side {
            Side::Inbox => &entry.to,
            Side::Sent => &entry.from,
        };
        if *user == stream.user {
            Ok(entry)
        } else {
            Err(Broken::at("streams", key, "the entry there is another user's").into())
        }
    });
    fill(keys, limit)
}

pub(super) fn conversation(
    snapshot: &ReadTransaction,
    conversation: &ConversationId,
    after: Option<Seq>,
    limit: ReadLimit,
) -> Result<Page, ReadError> {
    let Some(first) = after.map_or(0, Seq::get).checked_add(1) else {
        return Ok(Page { entries: Vec::new(), end: true });
    };
    let by_seq = snapshot.open_table(BY_SEQ)?;
    let entries = Entries::of(snapshot)?;
    let first_key = by_seq_key(conversation, first);
    let last_key = by_seq_key(conversation, u64::MAX);
    let found = by_seq.range(first_key.as_slice()..=last_key.as_slice())?.zip(first..).map(|(found, seq)| {
        let (key, position) = found?;
        let entry = entries.get(Position(position.value()))?;
        if entry.conversation == *conversation && entry.seq.get() == seq {
            Ok(entry)
        } else {
            Err(Broken::at("by_seq", key.value(), format!("seq {seq} of the conversation is not there")).into())
        }
    });
    fill(found, limit)
}

/// A page of what comes, which is the end if there is no more.
fn fill(found: impl Iterator<Item = Result<Entry, ReadError>>, limit: ReadLimit) -> Result<Page, ReadError> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut bytes = 0;
    for entry in found {
        let entry = entry?;
        if !limit.has_room(entries.len(), bytes, entry.text.len()) {
            return Ok(Page { entries, end: false });
        }
        bytes += entry.text.len();
        entries.push(entry);
    }
    Ok(Page { entries, end: true })
}

/// Entries by their positions.
struct Entries(ReadOnlyTable<u64, Bytes>);

impl Entries {
    fn of(snapshot: &ReadTransaction) -> Result<Self, ReadError> {
        Ok(Self(snapshot.open_table(ENTRIES)?))
    }

    /// The entry that another table says is there.
    fn get(&self, position: Position) -> Result<Entry, ReadError> {
        let record = self.0.get(position.0)?.ok_or_else(|| Broken::entry(position, "there is none"))?;
        Ok(decode_entry(position, record.value())?)
    }
}
