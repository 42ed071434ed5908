//! The log on one machine's disk: `log.redb` has the messages, with cursors and sessions; `log.journal` has the newest messages until they are
//! there; `index.redb` says where they are and can be made again.
//!
//! One thread owns every write of the log and its journal ([`writer`]), another every write of the index ([`indexer`]), for which nobody waits; reads take
//! snapshots and never wait for either ([`reader`]). Callers reach the writer
//! through a queue of bounded size; what was only noted (cursors, ended sessions) lies in memory until the next commit and is laid
//! over what reads find on disk, and so are the rows that only the journal has ([`pending`]). Invariants: an append is answered after it is on
//! disk, and [`Log::head`] moves only then; once it is unknown what is on disk the log has failed and writes nothing more.

mod filter;
mod index;
mod indexer;
mod journal;
mod key;
mod notes;
mod open;
mod pending;
mod posting;
mod reader;
mod recent;
mod record;
mod remover;
mod row;
mod schema;
mod shredder;
pub mod tools;
mod writer;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use ::redb::Database;
use chat_protocol::{ConversationId, Seq, Timestamp, UserId};
use parking_lot::{Mutex, RwLock};

use self::index::Index;
use self::key::Keys;
use self::notes::PeerNote;
pub use self::open::OpenError;
use self::open::Opener;
use self::pending::Pending;
use self::reader::INLINE_NEIGHBOURS_MAX;
use self::writer::{Queue, Writer};
use super::{
    Account, Advance, AppendError, ConversationHead, Delivered, Device, Entry, IdKey, Log, LogError, NewEntry, Page,
    PeerRecord, Position, ReadLimit, SessionRecord, Stream,
};

/// How to open a [`RedbLog`].
#[derive(Clone, Debug)]
pub struct RedbOptions {
    /// Memory for pages of the log, in bytes.
    pub log_cache_bytes: usize,
    /// Memory for pages of the index, in bytes.
    pub index_cache_bytes: usize,
    /// Entries whose postings gather in memory before they go to the index on disk. Past four times as many, appends wait.
    pub flush_entries: usize,
    /// Whether [`Log::usage`] can be asked. Counting costs the index some µs an entry.
    pub counts_usage: bool,
    /// Bytes of the journal. Once it is half full, or after half a second, the log's file gets what is in it. 0: there is none, and every commit is the file's.
    pub journal_bytes: u64,
}

impl RedbOptions {
    /// What [`RedbOptions::default`] gives.
    pub const DEFAULT: Self = Self {
        log_cache_bytes: 32 << 20,
        index_cache_bytes: 32 << 20,
        flush_entries: 32_768,
        counts_usage: false,
        journal_bytes: 8 << 20,
    };
}

impl Default for RedbOptions {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// The log in a folder. Dropping it writes what was noted, ends its threads and releases the files; that blocks for some commits.
#[derive(Debug)]
pub struct RedbLog {
    shared: Arc<Shared>,
    file: PathBuf,
    writer: Mutex<Option<JoinHandle<()>>>,
    indexer: Mutex<Option<JoinHandle<()>>>,
}

/// Reads at a time that may block their thread.
const READS_MAX: usize = 64;

/// What callers, reads and the writer share.
#[derive(Debug)]
struct Shared {
    /// Reads hold it while they read; the writer takes it for itself only to open the file again after the disk was full.
    /// `None` once closed.
    database: RwLock<Option<Database>>,
    /// What only the journal has.
    pending: RwLock<Pending>,
    index: Arc<Index>,
    keys: Keys,
    queue: Queue,
    /// `None` before the start and after the end.
    writer: Mutex<Option<Writer>>,
    head: AtomicU64,
    /// Position of the first entry that reads may find.
    first: AtomicU64,
    /// For reads on threads that may block, first come, first served: they leave most of those threads to others.
    reading: Arc<tokio::sync::Semaphore>,
    removing: tokio::sync::Mutex<()>,
    /// Held by those who read an old state for long.
    snapshots: RwLock<()>,
    failure: OnceLock<String>,
}

impl RedbLog {
    /// Opens the log in a folder, which is made if it is missing. Blocks: on the disk, and on a repair after a crash (milliseconds).
    pub fn open(folder: impl AsRef<Path>, options: RedbOptions) -> Result<Self, OpenError> {
        Self::start(Opener::new(folder.as_ref(), options))
    }

    fn start(opener: Opener) -> Result<Self, OpenError> {
        opener.make_folder()?;
        let database = opener.open_log_file()?;
        let prepared = opener.prepare_log(&database)?;
        opener.say_who_holds_it();
        // Before the index has any of it, and before anybody sees it.
        let journal = opener.open_journal(&prepared)?;
        let (index, indexer) = opener.open_index(&database, &prepared)?;
        let shared = Arc::new(Shared {
            database: RwLock::new(Some(database)),
            pending: RwLock::new(prepared.pending),
            index,
            keys: prepared.keys,
            queue: Queue::new(prepared.notes),
            writer: Mutex::default(),
            head: AtomicU64::new(prepared.last.0),
            first: AtomicU64::new(prepared.first.0),
            reading: Arc::new(tokio::sync::Semaphore::new(READS_MAX)),
            removing: tokio::sync::Mutex::default(),
            snapshots: RwLock::default(),
            failure: OnceLock::new(),
        });
        let indexer = indexer::start(Arc::clone(&shared), indexer, opener.clone())?;
        let file = opener.log_file();
        let log = Self { shared, file, writer: Mutex::default(), indexer: Mutex::new(Some(indexer)) };
        let writer = writer::start(&log.shared, opener, journal, prepared.stored, prepared.tail)?;
        *log.writer.lock() = Some(writer);
        Ok(log)
    }
}

impl Shared {
    fn head(&self) -> Position {
        Position(self.head.load(Ordering::Acquire))
    }

    fn first(&self) -> Position {
        Position(self.first.load(Ordering::Acquire))
    }

    /// Reads find nothing before this position.
    fn hide_before(&self, first: Position) {
        self.first.store(first.0, Ordering::Release);
    }

    /// Only the writer calls it, after a commit.
    fn committed_up_to(&self, head: Position) {
        self.head.store(head.0, Ordering::Release);
    }

    /// The log takes no more appends. The first reason stays.
    fn fail(&self, reason: String) {
        tracing::error!(%reason, "the log has failed");
        // A failure after the first tells nothing new.
        self.failure.set(reason).unwrap_or(());
    }

    fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }
}

impl RedbLog {
    /// Overwrites on the disk what unsent texts said; reads the whole file if there are any, at half its speed. How many there were; 0 if none,
    /// or while a backup is made. The error says why it could not be done now.
    pub async fn shred(&self) -> Result<u64, LogError> {
        let shredded = self.shared.shred(&self.file).await;
        shredded.map_err(|cause| LogError { what: "overwriting unsent words".to_owned(), cause })
    }

    /// Writes what was noted and what is not indexed, ends the threads and releases the files; blocks for some commits. Whoever comes later is
    /// told that the log is closed. Dropping the log does the same.
    pub fn close(&self) {
        self.shared.queue.close();
        join("writer", &self.writer);
        self.shared.index.close();
        join("indexer", &self.indexer);
        for database in [&self.shared.database, &self.shared.index.database] {
            if let Some(Err(error)) = database.write().take().map(Database::close) {
                tracing::warn!(%error, "the log was not closed cleanly: it will be repaired when it is opened again");
            }
        }
    }
}

fn join(name: &str, thread: &Mutex<Option<JoinHandle<()>>>) {
    let ended = thread.lock().take().map(JoinHandle::join);
    if ended.is_some_and(|ended| ended.is_err()) {
        tracing::error!("the log's {name} panicked");
    }
}

impl Drop for RedbLog {
    fn drop(&mut self) {
        self.close();
    }
}

impl Log for RedbLog {
    async fn append(&self, batch: impl Into<Arc<Vec<NewEntry>>> + Send) -> Result<Vec<Position>, AppendError> {
        self.shared.append(batch.into()).await
    }

    async fn append_in_place(&self, batch: impl Into<Arc<Vec<NewEntry>>> + Send) -> Result<Vec<Position>, AppendError> {
        self.shared.append_in_place(batch.into()).await
    }

    async fn heads(&self, conversations: Vec<ConversationId>) -> Result<Vec<Option<ConversationHead>>, LogError> {
        let lookups = conversations.len();
        let what = format!("looking up the heads of {lookups} conversations");
        self.shared.lookup(lookups, what, move |shared| shared.read_heads(&conversations)).await
    }

    async fn find(&self, ids: Vec<IdKey>) -> Result<Vec<Option<Entry>>, LogError> {
        let lookups = ids.len();
        let what = format!("looking up {lookups} message ids");
        self.shared.lookup(lookups, what, move |shared| shared.find(&ids)).await
    }

    async fn read(&self, stream: &Stream, after: Position, limit: ReadLimit) -> Result<Page, LogError> {
        let what = || format!("reading {stream}");
        if let Some(read) = self.shared.stream_at_hand(stream, after, limit) {
            return self.shared.read_now(what, |_| read);
        }
        let (what, stream) = (what(), stream.clone());
        self.shared.page(what, move |shared| shared.stream(&stream, after, limit)).await
    }

    async fn read_conversation(
        &self,
        conversation: &ConversationId,
        after: Option<Seq>,
        limit: ReadLimit,
    ) -> Result<Page, LogError> {
        let what = format!("reading conversation {conversation}");
        let conversation = conversation.clone();
        self.shared.page(what, move |shared| shared.conversation(&conversation, after, limit)).await
    }

    fn head(&self) -> Position {
        self.shared.head()
    }

    fn first(&self) -> Position {
        self.shared.first()
    }

    async fn remove_before(&self, time: Timestamp) -> Result<u64, LogError> {
        let removed = self.shared.remove_before(time).await;
        removed.map_err(|cause| LogError { what: "removing old entries".to_owned(), cause })
    }

    async fn usage(&self, accounts: Vec<Account>) -> Result<Vec<u64>, LogError> {
        let lookups = accounts.len();
        let what = format!("looking up what is stored for {lookups} accounts");
        self.shared.lookup(lookups, what, move |shared| shared.usage(&accounts)).await
    }

    fn advance(&self, advances: Vec<Advance>) {
        let head = self.head();
        self.shared.queue.note(|notes| advances.into_iter().for_each(|advance| notes.advance(advance, head)));
    }

    fn identity(&self) -> u64 {
        self.shared.keys.identity()
    }

    async fn delivered(&self, stream: &Stream) -> Result<Delivered, LogError> {
        self.shared.delivered(stream)
    }

    async fn session(&self, device: &Device) -> Result<Option<SessionRecord>, LogError> {
        self.shared.session(device)
    }

    async fn sessions(&self, user: Option<&UserId>) -> Result<Vec<(Device, SessionRecord)>, LogError> {
        let user = user.cloned();
        let read = move |shared: &Shared| shared.sessions(user.as_ref());
        self.shared.page("reading sessions".to_owned(), read).await
    }

    async fn put_session(&self, device: &Device, record: SessionRecord) -> Result<(), LogError> {
        self.shared.queue.note(|notes| notes.replace(device.clone(), Some(record)));
        self.shared.sync(format!("writing the session of {device}")).await
    }

    fn end_session(&self, device: &Device, ended_at_ms: u64, expiry_s: u32) {
        self.shared.queue.note(|notes| notes.end(device.clone(), ended_at_ms, expiry_s));
    }

    async fn delete_session(&self, device: &Device) -> Result<(), LogError> {
        self.shared.queue.note(|notes| notes.replace(device.clone(), None));
        self.shared.sync(format!("removing the session of {device}")).await
    }

    async fn peers(&self, user: &UserId) -> Result<Vec<(UserId, PeerRecord)>, LogError> {
        let what = || format!("reading the peers of {user}");
        if let Some(few) = self.shared.read_now(what, |shared| shared.peers(user, INLINE_NEIGHBOURS_MAX))? {
            return Ok(few);
        }
        let (what, user) = (what(), user.clone());
        let all = self.shared.page(what, move |shared| shared.peers(&user, usize::MAX)).await?;
        Ok(all.unwrap_or_default())
    }

    async fn peer(&self, user: &UserId, peer: &UserId) -> Result<Option<PeerRecord>, LogError> {
        self.shared
            .read_now(|| format!("reading what {user} has on record about {peer}"), |shared| shared.peer(user, peer))
    }

    fn advance_read(&self, user: &UserId, peer: &UserId, seq: Seq) {
        let note = PeerNote { read: seq.get(), read_at: self.head(), blocked: None };
        self.shared.queue.note(|notes| notes.note_peer(user, peer, note));
    }

    async fn set_blocked(&self, user: &UserId, peer: &UserId, at_ms: Option<u64>) -> Result<(), LogError> {
        let note = PeerNote { blocked: Some((at_ms, self.head())), ..PeerNote::default() };
        self.shared.queue.note(|notes| notes.note_peer(user, peer, note));
        self.shared.sync(format!("writing whether {user} blocks {peer}")).await
    }

    async fn hide(&self, user: &UserId, peer: &UserId, seq: Seq) -> Result<(), LogError> {
        let head = self.head();
        self.shared.queue.note(|notes| notes.hide(user, peer, seq, head));
        self.shared.sync(format!("hiding an entry from {user}")).await
    }

    async fn hidden(
        &self,
        user: &UserId,
        peer: &UserId,
        seqs: RangeInclusive<Seq>,
    ) -> Result<Vec<(Seq, Position)>, LogError> {
        let what = format!("reading what {user} hid in the conversation with {peer}");
        let (user, peer) = (user.clone(), peer.clone());
        self.shared.page(what, move |shared| shared.hidden(&user, &peer, &seqs)).await
    }

    fn note_seen(&self, user: &UserId, at_ms: u64) {
        self.shared.queue.note(|notes| notes.saw(user, at_ms));
    }

    async fn last_seen(&self, user: &UserId) -> Result<Option<u64>, LogError> {
        self.shared.read_now(|| format!("reading when {user} was last seen"), |shared| shared.last_seen(user))
    }

    async fn changes(&self, conversation: &ConversationId, targets: Vec<Seq>) -> Result<Vec<Vec<Entry>>, LogError> {
        let what = format!("reading changes in conversation {conversation}");
        let conversation = conversation.clone();
        self.shared.page(what, move |shared| shared.changes(&conversation, &targets)).await
    }

    async fn first_after(&self, conversation: &ConversationId, position: Position) -> Result<Option<Seq>, LogError> {
        let what = || format!("looking into conversation {conversation}");
        self.shared.read_now(what, |shared| shared.first_after(conversation, position))
    }

    async fn flush(&self) -> Result<(), LogError> {
        self.shared.sync("writing cursors".to_owned()).await
    }

    fn health(&self) -> Result<(), String> {
        self.shared.failure().map_or(Ok(()), |reason| Err(reason.to_owned()))
    }
}

#[cfg(test)]
mod disk;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod tests;
