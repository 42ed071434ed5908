//! Reads: each takes a snapshot of what is committed, and waits for nobody.
//!
//! The index says where entries are, the log what they are. What the index says of an entry is checked against the entry itself, so a
//! damaged index is an error and never another conversation's message.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use ::redb::{OwnedAccessGuard, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable};
use chat_protocol::{ConversationId, Seq, UserId};
use rustc_hash::FxHashMap;

use super::super::{
    Account, ConversationHead, Delivered, Device, Entry, IdKey, LogError, Page, PeerRecord, Position, ReadLimit,
    SessionRecord, Side, Stream,
};
use super::Shared;
use super::index::After;
use super::key::Key;
use super::notes::Notes;
use super::pending::Pending;
use super::record::{Broken, decode_head, decode_peer, decode_session};
use super::row;
use super::schema::{
    DELIVERED, HEADS, HIDDEN, PEERS, ROWS, SEEN, SESSIONS, delivered_key, device_of, hidden_key, peer_key, peers_key,
    session_key, sessions_key,
};
use super::writer::Layers;

/// Up to so many point lookups (measured at 1 to 2 µs each) are done where the caller stands; moving to another thread costs
/// some 10 µs.
const INLINE_LOOKUPS_MAX: usize = 8;
/// The same of neighbours in a table, which are faster.
pub(super) const INLINE_NEIGHBOURS_MAX: usize = 64;

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
storage_errors!(StorageError, TableError, TransactionError, SetDurabilityError, CommitError);

impl ReadError {
    /// There was no space.
    pub(super) fn is_full(&self) -> bool {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        let Self::Storage(error) = self else { return false };
        matches!(&**error, ::redb::Error::Io(error) if matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge))
    }
}

impl Shared {
    /// A few point lookups.
    pub(super) async fn lookup<T: Send + 'static>(
        self: &Arc<Self>,
        lookups: usize,
        what: String,
        read: impl FnOnce(&Shared) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, LogError> {
        if lookups <= INLINE_LOOKUPS_MAX {
            return read(self).map_err(|error| failed(what, &error));
        }
        self.page(what, read).await
    }

    /// Of one or two point lookups, where the caller stands.
    pub(super) fn read_now<T>(
        &self,
        what: impl FnOnce() -> String,
        read: impl FnOnce(&Shared) -> Result<T, ReadError>,
    ) -> Result<T, LogError> {
        read(self).map_err(|error| failed(what(), &error))
    }

    /// A longer read, on a thread that may block.
    pub(super) async fn page<T: Send + 'static>(
        self: &Arc<Self>,
        what: String,
        read: impl FnOnce(&Shared) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, LogError> {
        let shared = Arc::clone(self);
        let Ok(turn) = Arc::clone(&self.reading).acquire_owned().await else {
            return Err(failed(what, &self.closed()));
        };
        let reading = move || {
            let _turn = turn;
            read(&shared)
        };
        match tokio::task::spawn_blocking(reading).await {
            Ok(read) => read.map_err(|error| failed(what, &error)),
            Err(error) => Err(LogError { what, cause: error.to_string() }),
        }
    }

    fn snapshot<T>(&self, read: impl FnOnce(&ReadTransaction) -> Result<T, ReadError>) -> Result<T, ReadError> {
        read(&self.begin_read()?)
    }

    /// What only the journal has. To be asked after the index, and before the file.
    pub(super) fn pending(&self) -> Pending {
        self.pending.read().clone()
    }

    pub(super) fn begin_read(&self) -> Result<ReadTransaction, ReadError> {
        let database = self.database.read();
        Ok(database.as_ref().ok_or_else(|| self.closed())?.begin_read()?)
    }

    pub(super) fn closed(&self) -> ReadError {
        ReadError::Closed(self.failure().unwrap_or("the log ends").to_owned())
    }

    pub(super) fn delivered(&self, stream: &Stream) -> Result<Delivered, LogError> {
        let noted = self.queue.noted_delivered(stream);
        let stored = self.snapshot(|snapshot| {
            let delivered = snapshot.open_table(DELIVERED)?;
            let stored = delivered.get(delivered_key(stream).as_slice())?;
            Ok(stored.map_or(Delivered::default(), |stored| delivered_of(stored.value())))
        });
        let stored = stored.map_err(|error| failed(format!("reading what was delivered of {stream}"), &error))?;
        Ok(if noted.position > stored.position { noted } else { stored })
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

    pub(super) fn sessions(&self, user: Option<&UserId>) -> Result<Vec<(Device, SessionRecord)>, ReadError> {
        let is_wanted = |device: &Device| user.is_none_or(|user| device.user == *user);
        let noted_sessions = |notes: &Notes| {
            let wanted = notes.sessions.iter().filter(|(device, _)| is_wanted(device));
            wanted.map(|(device, note)| (device.clone(), note.clone())).collect::<Vec<_>>()
        };
        let database = self.database.read();
        let database = database.as_ref().ok_or_else(|| self.closed())?;
        let (noted, snapshot) = self.queue.noted(noted_sessions, || database.begin_read());
        let begin = user.map(sessions_key).unwrap_or_default();
        let mut sessions: FxHashMap<Device, Option<SessionRecord>> = FxHashMap::default();
        for stored in snapshot?.open_table(SESSIONS)?.range::<&[u8]>(begin.as_slice()..)? {
            let (key, record) = stored?;
            if !key.value().starts_with(&begin) {
                break;
            }
            let device = device_of(key.value());
            let device = device.ok_or_else(|| Broken::at("sessions", key.value(), "it names no device"))?;
            let record = decode_session(&device, record.value())?;
            sessions.insert(device, Some(record));
        }
        for (device, note) in noted.into_iter().flatten() {
            let session = sessions.entry(device).or_default();
            *session = note.apply(session.take());
        }
        Ok(sessions.into_iter().filter_map(|(device, session)| Some((device, session?))).collect())
    }
}

fn failed(what: String, error: &ReadError) -> LogError {
    LogError { what, cause: error.to_string() }
}

type Bytes = &'static [u8];

pub(super) fn delivered_of((position, moved): (u64, u64)) -> Delivered {
    Delivered { position: Position(position), moved: Position(moved) }
}

pub(super) fn stored_peer(
    peers: &impl ReadableTable<Bytes, Bytes>,
    user: &UserId,
    peer: &UserId,
) -> Result<Option<PeerRecord>, ReadError> {
    let key = peer_key(user, peer);
    let Some(record) = peers.get(key.as_slice())? else { return Ok(None) };
    Ok(Some(decode_peer(&key, record.value())?))
}

/// The name behind the beginning of a key.
fn peer_of(key: &[u8], begin: usize) -> Result<UserId, Broken> {
    let name = key.get(begin..).and_then(|name| std::str::from_utf8(name).ok());
    name.and_then(|name| UserId::parse(name).ok()).ok_or_else(|| Broken::at("peers", key, "it names no user"))
}

fn seq_of(key: &[u8]) -> Result<Seq, Broken> {
    let seq = key.last_chunk().copied().map(u64::from_be_bytes).and_then(Seq::new);
    seq.ok_or_else(|| Broken::at("hidden", key, "it names no seq"))
}

pub(super) fn stored_session(
    sessions: &impl ReadableTable<Bytes, Bytes>,
    device: &Device,
) -> Result<Option<SessionRecord>, ReadError> {
    let Some(record) = sessions.get(session_key(device).as_slice())? else { return Ok(None) };
    Ok(Some(decode_session(device, record.value())?))
}

impl Shared {
    pub(super) fn read_heads(
        &self,
        conversations: &[ConversationId],
    ) -> Result<Vec<Option<ConversationHead>>, ReadError> {
        let keys: Vec<_> = conversations.iter().map(|conversation| self.keys.conversation(conversation)).collect();
        let mut heads = self.index.heads(&keys)?;
        let missing = conversations.iter().zip(&mut heads).filter(|(_, head)| head.is_none());
        self.noted_heads(missing)?;
        Ok(heads)
    }

    /// Heads of conversations whose entries are all removed.
    pub(super) fn noted_heads<'a>(
        &self,
        missing: impl Iterator<Item = (&'a ConversationId, &'a mut Option<ConversationHead>)>,
    ) -> Result<(), ReadError> {
        // Asked after the index was: entries go from there only when their heads are noted.
        if self.first() == Position(1) {
            return Ok(());
        }
        let mut noted = None;
        for (conversation, head) in missing {
            let noted = match &mut noted {
                Some(noted) => noted,
                none => none.insert(self.begin_read()?.open_table(HEADS)?),
            };
            let key = conversation.to_string();
            if let Some(record) = noted.get(key.as_str())? {
                *head = Some(decode_head(key.as_bytes(), record.value())?);
            }
        }
        Ok(())
    }

    /// A user's peers, with what is noted and not written yet; `None` if more than `most` are stored.
    pub(super) fn peers(&self, user: &UserId, most: usize) -> Result<Option<Vec<(UserId, PeerRecord)>>, ReadError> {
        let begin = peers_key(user);
        // Behind every key that begins with it: names contain no byte as high.
        let end = [begin.as_slice(), &[0xff]].concat();
        let (noted, snapshot) = self.with_notes(|notes| notes.peers_of(user))?;
        let mut peers = BTreeMap::new();
        for found in snapshot.open_table(PEERS)?.range(begin.as_slice()..end.as_slice())? {
            let (key, record) = found?;
            if peers.len() == most {
                return Ok(None);
            }
            let record = decode_peer(key.value(), record.value())?;
            peers.insert(peer_of(key.value(), begin.len())?, record);
        }
        for (peer, note) in noted.into_iter().flatten() {
            let record = peers.entry(peer).or_default();
            *record = note.apply(*record);
        }
        Ok(Some(peers.into_iter().collect()))
    }

    pub(super) fn peer(&self, user: &UserId, peer: &UserId) -> Result<Option<PeerRecord>, ReadError> {
        let (noted, snapshot) = self.with_notes(|notes| notes.peer(user, peer))?;
        let stored = stored_peer(&snapshot.open_table(PEERS)?, user, peer)?;
        Ok(noted.into_iter().flatten().fold(stored, |record, note| Some(note.apply(record.unwrap_or_default()))))
    }

    pub(super) fn hidden(
        &self,
        user: &UserId,
        peer: &UserId,
        seqs: &RangeInclusive<Seq>,
    ) -> Result<Vec<(Seq, Position)>, ReadError> {
        let (noted, snapshot) = self.with_notes(|notes| notes.hidden_of(user, peer, seqs))?;
        let mut hidden: BTreeMap<Seq, Position> = noted.into_iter().rev().flatten().collect();
        let keys = hidden_key(user, peer, *seqs.start())..=hidden_key(user, peer, *seqs.end());
        let table = snapshot.open_table(HIDDEN)?;
        for found in table.range(keys.start().as_slice()..=keys.end().as_slice())? {
            let (key, head) = found?;
            hidden.insert(seq_of(key.value())?, Position(head.value()));
        }
        Ok(hidden.into_iter().collect())
    }

    pub(super) fn last_seen(&self, user: &UserId) -> Result<Option<u64>, ReadError> {
        let (noted, snapshot) = self.with_notes(|notes| notes.seen.get(user).copied())?;
        let stored = snapshot.open_table(SEEN)?.get(user.as_str())?.map(|seen| seen.value());
        Ok(noted.into_iter().flatten().chain(stored).max())
    }

    /// What is noted, the earlier first, and the log at the same moment.
    fn with_notes<T>(&self, read: impl Fn(&Notes) -> T) -> Result<(Layers<T>, ReadTransaction), ReadError> {
        let database = self.database.read();
        let database = database.as_ref().ok_or_else(|| self.closed())?;
        let (noted, snapshot) = self.queue.noted(read, || database.begin_read());
        Ok((noted, snapshot?))
    }

    pub(super) fn changes(&self, conversation: &ConversationId, targets: &[Seq]) -> Result<Vec<Vec<Entry>>, ReadError> {
        let changes = |target: &Seq| {
            let key = self.keys.change(conversation, *target);
            let is_meant = |_: Option<&Entry>, entry: &Entry| {
                entry.conversation == *conversation && entry.body.target() == Some(*target)
            };
            let limit = ReadLimit { entries: usize::MAX, bytes: usize::MAX };
            Ok(self.page_of(key, After::Position(0), usize::MAX, limit, is_meant)?.entries)
        };
        targets.iter().map(changes).collect()
    }

    pub(super) fn first_after(
        &self,
        conversation: &ConversationId,
        position: Position,
    ) -> Result<Option<Seq>, ReadError> {
        let key = self.keys.conversation(conversation);
        Ok(self.index.first_after(key, position, self.first())?.and_then(Seq::new))
    }

    pub(super) fn usage(&self, accounts: &[Account]) -> Result<Vec<u64>, ReadError> {
        if !self.index.counts_usage {
            return Err(ReadError::Closed("nothing is counted: it was opened without".to_owned()));
        }
        let key = |account: &Account| match account {
            Account::Conversation(conversation) => self.keys.conversation(conversation),
            Account::Sender(user) => self.keys.sent(user),
        };
        self.index.usage(&accounts.iter().map(key).collect::<Vec<_>>())
    }

    pub(super) fn find(&self, ids: &[IdKey]) -> Result<Vec<Option<Entry>>, ReadError> {
        let positions = |id: &IdKey| {
            let key = self.keys.id(&id.conversation, &id.from, &id.id);
            self.index.positions(key, After::Position(0), self.first(), usize::MAX)
        };
        // All before the first entry is read: what the index knows by now is in the log.
        let positions = ids.iter().map(positions).collect::<Result<Vec<_>, _>>()?;
        let mut entries = None;
        let find = |(id, positions): (&IdKey, Vec<u64>)| {
            for position in positions {
                let entries = match &mut entries {
                    Some(entries) => entries,
                    none => none.insert(Entries::of(self)?),
                };
                let entry = match entries.get(Position(position)) {
                    // Removed just now.
                    Err(_) if position < self.first().0 => continue,
                    entry => entry?,
                };
                if entry.id.as_ref() == Some(&id.id) && entry.from == id.from && entry.conversation == id.conversation {
                    return Ok(Some(entry));
                }
            }
            Ok(None)
        };
        ids.iter().zip(positions).map(find).collect()
    }

    pub(super) fn stream(&self, stream: &Stream, after: Position, limit: ReadLimit) -> Result<Page, ReadError> {
        let user = &stream.user;
        // A page has one at least; another says whether it is the end.
        let wanted = limit.entries.max(1).saturating_add(1);
        let after_position = After::Position(after.0);
        match stream.side {
            Side::Inbox => {
                self.page_of(self.keys.inbox(user), after_position, wanted, limit, |_, entry| entry.to == *user)
            }
            Side::Sent => {
                self.page_of(self.keys.sent(user), after_position, wanted, limit, |_, entry| entry.from == *user)
            }
            Side::EveryInbox => self.everything(after, limit, |entry| !entry.withheld),
            Side::EverySent => self.everything(after, limit, |_| true),
        }
    }

    /// The same where the caller stands, if that takes a few lookups; else `None`. Most who come have missed nothing, or little.
    pub(super) fn stream_at_hand(
        &self,
        stream: &Stream,
        after: Position,
        limit: ReadLimit,
    ) -> Option<Result<Page, ReadError>> {
        let user = &stream.user;
        let (key, is_meant): (Key, fn(&Entry, &UserId) -> bool) = match stream.side {
            Side::Inbox => (self.keys.inbox(user), |entry, user| entry.to == *user),
            Side::Sent => (self.keys.sent(user), |entry, user| entry.from == *user),
            Side::EveryInbox | Side::EverySent => {
                return (after >= self.head()).then(|| Ok(Page { entries: Vec::new(), end: true }));
            }
        };
        let first = self.first();
        let positions = self.index.positions_at_hand(key, After::Position(after.0), first, INLINE_LOOKUPS_MAX)?;
        match self.fill(&positions, limit, |_, entry| is_meant(entry, user)) {
            // Removed between the look at the index and the look at the log: once more, with patience.
            Err(_) if self.first() != first => None,
            page => Some(page),
        }
    }

    /// A page of all entries after a position, in the order of the log.
    fn everything(
        &self,
        after: Position,
        limit: ReadLimit,
        is_meant: impl Fn(&Entry) -> bool,
    ) -> Result<Page, ReadError> {
        let pending = self.pending();
        let snapshot = self.begin_read()?;
        let rows = snapshot.open_table(ROWS)?;
        let next = after.0.saturating_add(1);
        // The row that has it may begin before it.
        let begin = rows.range(..=next)?.next_back().transpose()?.map_or(next, |(first, _)| first.value());
        let mut page = Page { entries: Vec::new(), end: true };
        let mut bytes = 0;
        // Whether the page may take more.
        let mut add = |first: Position, row: &[u8]| -> Result<bool, ReadError> {
            for entry in row::entries(first, row) {
                let entry = entry?;
                if entry.position <= after || !is_meant(&entry) {
                    continue;
                }
                if !limit.has_room(page.entries.len(), bytes, entry.body.text().len()) {
                    page.end = false;
                    return Ok(false);
                }
                bytes += entry.body.text().len();
                page.entries.push(entry);
            }
            Ok(true)
        };
        let pending_from = pending.first().map_or(u64::MAX, |first| first.0);
        for found in rows.range(begin.min(pending_from)..pending_from)? {
            let (first, row) = found?;
            if !add(Position(first.value()), row.value())? {
                return Ok(page);
            }
        }
        for row in pending.rows_from(Position(next)) {
            if !add(row.first, &row.bytes)? {
                break;
            }
        }
        Ok(page)
    }

    pub(super) fn conversation(
        &self,
        conversation: &ConversationId,
        after: Option<Seq>,
        limit: ReadLimit,
    ) -> Result<Page, ReadError> {
        let key = self.keys.conversation(conversation);
        let after = after.map_or(0, Seq::get);
        // A page has one at least; another says whether it is the end.
        let wanted = limit.entries.max(1).saturating_add(1);
        let of = |before: Option<&Entry>, entry: &Entry| {
            let follows = match before {
                Some(before) => entry.seq == before.seq.next(),
                None if self.first() == Position(1) => Some(entry.seq.get()) == after.checked_add(1),
                // Those between are removed.
                None => entry.seq.get() > after,
            };
            entry.conversation == *conversation && follows
        };
        self.page_of(key, After::Seq(after), wanted, limit, of)
    }

    fn page_of(
        &self,
        key: Key,
        after: After,
        wanted: usize,
        limit: ReadLimit,
        is_meant: impl Fn(Option<&Entry>, &Entry) -> bool,
    ) -> Result<Page, ReadError> {
        loop {
            let first = self.first();
            let positions = self.index.positions(key, after, first, wanted)?;
            match self.fill(&positions, limit, &is_meant) {
                // Removed between the look at the index and the look at the log.
                Err(_) if self.first() != first => {}
                page => return page,
            }
        }
    }

    /// A page of the entries at these positions, which is the end if there is no more. Each has to be what the index says it is.
    fn fill(
        &self,
        positions: &[u64],
        limit: ReadLimit,
        is_meant: impl Fn(Option<&Entry>, &Entry) -> bool,
    ) -> Result<Page, ReadError> {
        if positions.is_empty() {
            return Ok(Page { entries: Vec::new(), end: true });
        }
        let mut page = Page { entries: Vec::with_capacity(positions.len().min(limit.entries)), end: true };
        let mut bytes = 0;
        let mut entries = Entries::of(self)?;
        for position in positions {
            let entry = entries.get(Position(*position))?;
            if !is_meant(page.entries.last(), &entry) {
                return Err(Broken::entry(entry.position, "the index takes it for another entry").into());
            }
            if !limit.has_room(page.entries.len(), bytes, entry.body.text().len()) {
                page.end = false;
                break;
            }
            bytes += entry.body.text().len();
            page.entries.push(entry);
        }
        Ok(page)
    }
}

/// Entries by their positions.
struct Entries {
    pending: Pending,
    rows: ReadOnlyTable<u64, Bytes>,
    /// Read last: what comes next is often in the same.
    row: Option<(u64, OwnedAccessGuard<Bytes>)>,
}

impl Entries {
    /// Of everything that is committed now.
    fn of(shared: &Shared) -> Result<Self, ReadError> {
        let pending = shared.pending();
        shared.snapshot(|snapshot| Ok(Self { pending, rows: snapshot.open_table(ROWS)?, row: None }))
    }

    /// The entry that the index says is there.
    fn get(&mut self, position: Position) -> Result<Entry, ReadError> {
        if let Some(row) = self.pending.row_of(position) {
            return Ok(row::entry(row.first, &row.bytes, position)?);
        }
        if let Some((first, row)) = &self.row
            && *first <= position.0
            && let Ok(entry) = row::entry(Position(*first), row.value(), position)
        {
            return Ok(entry);
        }
        let found = self.rows.range_owned::<u64>(..=position.0)?.next_back().transpose()?;
        let (first, row) = found.ok_or_else(|| Broken::entry(position, "there is none"))?;
        let first = first.value();
        let entry = row::entry(Position(first), row.value(), position)?;
        self.row = Some((first, row));
        Ok(entry)
    }
}
