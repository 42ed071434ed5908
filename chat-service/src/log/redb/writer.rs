//! The writer, which changes the file and the journal; its thread, and the queue to it.
//!
//! Whatever waits when a commit begins shares it. Batches of new entries go to the journal; the file gets them, with the notes that lie in
//! memory, after [`FILE_DELAY_MAX`], or sooner with something that has to be the file's at once. For that, what the journal has is set
//! aside, and the journal goes on while the file is written. Whoever may wait for the disk writes to the journal itself
//! ([`Shared::append_in_place`]); others leave it to the thread. A batch is checked against the committed heads and the batches
//! before it, before anything is written, so a refused batch leaves nothing behind. Invariants: who writes holds the writer, but for what
//! the file gets of what was set aside, and that is the thread's; answers are sent after the journal or the file is on disk, and the position
//! of the last entry moves before them; nothing in the journal is overwritten before the file has it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ::redb::{Database, Durability, ReadableTable, WriteTransaction};
use chat_protocol::{ConversationId, Seq};
use parking_lot::{Condvar, Mutex};
use rustc_hash::FxHashMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::super::{
    AppendError, Body, ConversationHead, Delivered, Device, Entry, LogError, NewEntry, PeerRecord, Position, Stream,
};
use super::Shared;
use super::index::After;
use super::journal::{Journal, Recorded};
use super::key::Key;
use super::notes::{Notes, SessionNote};
use super::open::{OpenError, Opener, insert_pending, read_prepared};
use super::pending::{Pending, Row};
use super::reader::{ReadError, delivered_of, stored_peer, stored_session};
use super::recent::Posted;
use super::record::{decode_peer, encode_head, encode_peer, encode_session};
use super::remover::Removal;
use super::row::{self, Packer, Tail};
use super::schema::{
    DELIVERED, FIRST_KEY, HEADS, HIDDEN, META, PEERS, ROWS, SEEN, SESSIONS, SHREDS, delivered_key, hidden_key,
    peer_key, session_key,
};

/// Text, and a little per entry, that may wait for the writer; past that callers wait for room.
const QUEUED_BYTES_MAX: u32 = 64 << 20;
/// What an entry takes of the queue's room besides its text; a command without entries takes as much.
const QUEUED_ENTRY_BYTES: usize = 256;
/// A commit takes no further batch once it has so many entries.
const COMMIT_ENTRIES_MAX: usize = 16_384;
/// Notes are on disk so long after they were made, and entries in the file, at most; sooner if something else is written to it.
const FILE_DELAY_MAX: Duration = Duration::from_millis(500);
/// Conversations whose head the writer keeps.
const HEADS_MAX: usize = 200_000;
/// Between attempts to write to a full disk, when nothing new is to be written.
const RETRY_DELAY: Duration = Duration::from_secs(5);

/// The way to the writer.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    room: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Waiting {
    commands: VecDeque<Command>,
    /// On their way to the file, while others go to the journal.
    filing: Arc<Notes>,
    /// What of these the journal does not have: it goes along with the next record there, or a crash meanwhile would take it.
    goes_along: Notes,
    /// In the journal, and not in the file.
    journaled: Notes,
    /// Being written by whoever holds the writer.
    writing: Arc<Notes>,
    /// Made since that began.
    notes: Notes,
    /// How often notes were taken for the file.
    taken: u64,
    /// When the file is to get the notes, or what only the journal has.
    file_due: Option<Instant>,
    closed: bool,
}

#[derive(Debug)]
enum Command {
    Append {
        batch: Arc<Vec<NewEntry>>,
        answer: oneshot::Sender<Result<Vec<Position>, AppendError>>,
        room: OwnedSemaphorePermit,
    },
    /// The file is committed to in any case, and the journal overwritten; of these positions it is not noted any more that words were erased.
    Commit {
        shredded: Vec<Position>,
        answer: oneshot::Sender<Result<(), String>>,
        room: OwnedSemaphorePermit,
    },
    Sync {
        answer: oneshot::Sender<Result<(), String>>,
        room: OwnedSemaphorePermit,
    },
    Remove {
        removal: Removal,
        answer: oneshot::Sender<Result<(), String>>,
        room: OwnedSemaphorePermit,
    },
}

/// What one commit writes.
struct Work {
    commands: Vec<Command>,
    notes: Arc<Notes>,
    to: Target,
}

/// Where a commit goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    /// To the journal, if it has room.
    Journal,
    File,
    /// To the file, which gets what the journal has; nothing else does, so the journal goes on meanwhile.
    FileBesideJournal,
}

/// What is noted and perhaps not in the file, the earlier first.
pub(super) type Layers<T> = [T; 4];

impl Queue {
    /// `journaled`: what was noted, and only the journal has.
    pub(super) fn new(journaled: Notes) -> Self {
        let room = usize::try_from(QUEUED_BYTES_MAX).expect("a usize has 32 bits");
        let waiting = Waiting { journaled, ..Waiting::default() };
        Self { waiting: Mutex::new(waiting), wake: Condvar::new(), room: Arc::new(Semaphore::new(room)) }
    }

    /// Notes something for the next commit.
    pub(super) fn note(&self, add: impl FnOnce(&mut Notes)) {
        let mut waiting = self.waiting.lock();
        add(&mut waiting.notes);
        if !waiting.notes.is_empty() && waiting.be_due_in(FILE_DELAY_MAX) {
            self.wake.notify_one();
        }
    }

    /// The highest position that is noted and perhaps not committed.
    pub(super) fn noted_delivered(&self, stream: &Stream) -> Delivered {
        let waiting = self.waiting.lock();
        let noted = waiting.layers().map(|notes| notes.delivered.get(stream).copied());
        // Of two with the same position the earlier: only that moved anything.
        noted.into_iter().rev().flatten().max_by_key(|delivered| delivered.position).unwrap_or_default()
    }

    /// What is noted about a session, the earlier first, and what `at_once` returns at the same moment.
    pub(super) fn noted_session<T>(
        &self,
        device: &Device,
        at_once: impl Fn() -> T,
    ) -> (Layers<Option<SessionNote>>, T) {
        self.noted(|notes| notes.sessions.get(device).cloned(), at_once)
    }

    /// What is in the notes, the earlier first, and what `at_once` returns at the same moment: the file got no others in between. Nobody waits
    /// for it, because it may wait for the disk.
    pub(super) fn noted<T, U>(&self, read: impl Fn(&Notes) -> T, at_once: impl Fn() -> U) -> (Layers<T>, U) {
        loop {
            let waiting = self.waiting.lock();
            let (noted, taken) = (waiting.layers().map(&read), waiting.taken);
            drop(waiting);
            let read = at_once();
            if self.waiting.lock().taken == taken {
                return (noted, read);
            }
        }
    }

    /// The writer writes what is there, and ends.
    pub(super) fn close(&self) {
        self.waiting.lock().closed = true;
        self.room.close();
        self.wake.notify_one();
    }

    fn is_closed(&self) -> bool {
        self.waiting.lock().closed
    }

    /// `None` once closed.
    async fn room(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(QUEUED_BYTES_MAX);
        Arc::clone(&self.room).acquire_many_owned(bytes).await.ok()
    }

    /// Once closed, the command is dropped and with it the hope for an answer.
    fn push(&self, command: Command) {
        let mut waiting = self.waiting.lock();
        if !waiting.closed {
            waiting.commands.push_back(command);
            self.wake.notify_one();
        }
    }

    /// Waits for work, or for the end.
    fn wait(&self, has_failed: bool) {
        let mut waiting = self.waiting.lock();
        loop {
            let due = waiting.file_due.filter(|_| !has_failed);
            if waiting.closed || !waiting.commands.is_empty() || due.is_some_and(|due| due <= Instant::now()) {
                return;
            }
            match due {
                Some(due) => {
                    // Whether it was the deadline is asked above.
                    self.wake.wait_until(&mut waiting, due);
                }
                None => self.wake.wait(&mut waiting),
            }
        }
    }

    /// What there is to do; `None` once closed and there is nothing left. `goes_on_beside`: whether the journal can, while the file is written.
    fn take(&self, writes: Writes, goes_on_beside: bool) -> Option<Work> {
        let mut waiting = self.waiting.lock();
        let is_due = waiting.file_due.is_some_and(|due| due <= Instant::now());
        let mut entries = 0;
        let mut commands = Vec::new();
        while entries < COMMIT_ENTRIES_MAX
            && let Some(command) = waiting.commands.pop_front()
        {
            if let Command::Append { batch, .. } = &command {
                entries += batch.len();
            }
            commands.push(command);
        }
        let to = if writes != Writes::Journal {
            Target::File
        } else if commands.iter().all(|command| matches!(command, Command::Sync { .. })) {
            if goes_on_beside { Target::FileBesideJournal } else { Target::File }
        } else if !is_due
            && commands.iter().all(Command::may_go_to_the_journal)
            && waiting.notes.may_go_to_the_journal()
        {
            Target::Journal
        } else {
            Target::File
        };
        let notes = match to {
            _ if writes == Writes::Nothing => Arc::default(),
            Target::Journal => {
                waiting.writing = Arc::new(std::mem::take(&mut waiting.notes));
                Arc::clone(&waiting.writing)
            }
            Target::File | Target::FileBesideJournal => {
                waiting.file_due = None;
                waiting.taken += 1;
                if to == Target::FileBesideJournal {
                    waiting.goes_along = waiting.notes.clone().take_for_the_journal();
                }
                let mut all = std::mem::take(&mut waiting.journaled);
                all.fold(std::mem::take(&mut waiting.notes));
                let layer = if to == Target::File { &mut waiting.writing } else { &mut waiting.filing };
                *layer = Arc::new(all);
                Arc::clone(layer)
            }
        };
        let done = waiting.closed && commands.is_empty() && notes.is_empty();
        (!done).then_some(Work { commands, notes, to })
    }

    /// For a record of the journal: what can be written with new entries.
    fn take_notes(&self) -> Arc<Notes> {
        let mut waiting = self.waiting.lock();
        let mut notes = std::mem::take(&mut waiting.goes_along);
        notes.fold(waiting.notes.take_for_the_journal());
        waiting.writing = Arc::new(notes);
        Arc::clone(&waiting.writing)
    }

    /// The file is to get what only the journal has, after a delay or before.
    fn file_is_due_in(&self, delay: Duration) {
        if self.waiting.lock().be_due_in(delay) {
            self.wake.notify_one();
        }
    }

    /// The notes of a [`Work`] that was for the journal, and those that only the journal has: for the file, which gets all of it now.
    fn notes_for_the_file(&self) -> Arc<Notes> {
        let mut waiting = self.waiting.lock();
        waiting.taken += 1;
        let mut all = std::mem::take(&mut waiting.journaled);
        all.fold(Arc::unwrap_or_clone(std::mem::take(&mut waiting.writing)));
        waiting.writing = Arc::new(all);
        Arc::clone(&waiting.writing)
    }

    /// The file has the notes that were on their way to it beside the journal.
    fn filed(&self) {
        let mut waiting = self.waiting.lock();
        let filed = (std::mem::take(&mut waiting.filing), std::mem::take(&mut waiting.goes_along));
        drop(waiting);
        drop(filed);
    }

    /// Where the notes are that the holder of the writer had.
    fn written(&self, notes: Noted) {
        let mut waiting = self.waiting.lock();
        let written = std::mem::take(&mut waiting.writing);
        match notes {
            Noted::InFile => {
                drop(waiting);
                drop(written);
            }
            Noted::InJournal => waiting.journaled.fold(Arc::unwrap_or_clone(written)),
            Noted::Nowhere => {
                let mut notes = Arc::unwrap_or_clone(written);
                notes.fold(std::mem::take(&mut waiting.notes));
                waiting.notes = notes;
            }
        }
    }

    /// The notes of the last [`Work`] are to be written again, some time.
    fn not_written(&self) {
        self.written(Noted::Nowhere);
        let mut waiting = self.waiting.lock();
        // It is among those.
        waiting.goes_along = Notes::default();
        let mut notes = Arc::unwrap_or_clone(std::mem::take(&mut waiting.filing));
        notes.fold(std::mem::take(&mut waiting.journaled));
        waiting.journaled = notes;
        waiting.file_due = Some(Instant::now() + RETRY_DELAY);
    }
}

/// Where notes are.
#[derive(Clone, Copy)]
enum Noted {
    InFile,
    InJournal,
    Nowhere,
}

impl Waiting {
    /// What is not in the file, the earlier first.
    fn layers(&self) -> Layers<&Notes> {
        [&self.filing, &self.journaled, &self.writing, &self.notes]
    }

    /// Whether that is sooner than it was.
    fn be_due_in(&mut self, delay: Duration) -> bool {
        // What is not urgent does not come before the next attempt at a full disk either.
        if delay == FILE_DELAY_MAX && self.file_due.is_some() {
            return false;
        }
        let due = Instant::now() + delay;
        let is_sooner = self.file_due.is_none_or(|earlier| due < earlier);
        if is_sooner {
            self.file_due = Some(due);
        }
        is_sooner
    }
}

impl Command {
    /// Whether it is about new entries alone, none of which changes what the file has.
    fn may_go_to_the_journal(&self) -> bool {
        matches!(self, Self::Append { batch, .. } if only_adds(batch))
    }
}

/// Whether these change nothing of what the file has.
fn only_adds(batch: &[NewEntry]) -> bool {
    batch.iter().all(|new| new.seq != Seq::FIRST && !matches!(new.body, Body::Unsend { .. }))
}

/// What the writer can do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writes {
    Journal,
    /// Not the journal, before the file has what is in it.
    File,
    /// The log has failed.
    Nothing,
}

impl Shared {
    /// A caller that no longer waits for the answer changes nothing: what is queued is written.
    pub(super) async fn append(&self, batch: Arc<Vec<NewEntry>>) -> Result<Vec<Position>, AppendError> {
        if let Some(reason) = self.failure() {
            return Err(AppendError::Failed(reason.to_owned()));
        }
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let fits =
            |new: &NewEntry| new.conversation.has(&new.from) && new.conversation.has(&new.to) && new.from != new.to;
        assert!(batch.iter().all(fits), "an entry goes from one of its conversation's users to the other");
        let bytes = batch.iter().map(|new| new.body.text().len() + QUEUED_ENTRY_BYTES).sum();
        let Some(room) = self.queue.room(bytes).await else {
            return Err(AppendError::Failed(self.failure().unwrap_or("the log is closed").to_owned()));
        };
        let (answer, answered) = oneshot::channel();
        self.queue.push(Command::Append { batch, answer, room });
        answered.await.unwrap_or_else(|_| Err(AppendError::Unknown("the log's writer has ended".to_owned())))
    }

    /// The same; the caller's thread waits for the disk.
    pub(super) async fn append_in_place(&self, batch: Arc<Vec<NewEntry>>) -> Result<Vec<Position>, AppendError> {
        match self.append_to_journal(&batch) {
            Some(appended) => appended,
            None => self.append(batch).await,
        }
    }

    /// `None` if it is not certain that the journal can take them: nothing was done.
    fn append_to_journal(&self, batch: &[NewEntry]) -> Option<Result<Vec<Position>, AppendError>> {
        if batch.is_empty() || !only_adds(batch) {
            return None;
        }
        let mut writer = self.writer.lock();
        let writer = writer.as_mut()?;
        let _failing = Failing(self);
        // Closed: the file is about to get the last that is noted.
        if self.queue.is_closed() || writer.writes() != Writes::Journal || !self.index.has_room() {
            return None;
        }
        let staged = writer.check(std::iter::once(batch)).ok()?;
        let notes = self.queue.take_notes();
        let written = writer.write_to_journal(staged, &notes);
        // The queue's own notes are then the only ones.
        drop(notes);
        match written {
            Ok(Ok(outcomes)) => {
                self.queue.written(outcomes.noted);
                let appended = outcomes.batches.into_iter().next();
                appended.map(|appended| appended.map(|positions| positions.map(Position).collect()))
            }
            Ok(Err(_no_room)) => {
                self.queue.written(Noted::Nowhere);
                None
            }
            Err(fault) => {
                self.queue.written(Noted::Nowhere);
                self.fail(fault.reason.clone());
                Some(Err(fault.append_error()))
            }
        }
    }

    /// Returns when everything noted before is on disk.
    pub(super) async fn sync(&self, what: String) -> Result<(), LogError> {
        self.written_to_the_file().await.map_err(|cause| LogError { what, cause })
    }

    /// Returns when the entries are gone.
    pub(super) async fn remove(&self, removal: Removal) -> Result<(), String> {
        self.command(|answer, room| Command::Remove { removal, answer, room }).await
    }

    /// Returns when the file has everything that was committed before.
    pub(super) async fn written_to_the_file(&self) -> Result<(), String> {
        self.command(|answer, room| Command::Sync { answer, room }).await
    }

    /// Returns after a commit to the file, when nothing of what was committed before is left in the journal.
    pub(super) async fn commit(&self) -> Result<(), String> {
        self.forget_shreds(Vec::new()).await
    }

    /// Returns when it is not noted any more that words were erased.
    pub(super) async fn forget_shreds(&self, shredded: Vec<Position>) -> Result<(), String> {
        self.command(|answer, room| Command::Commit { shredded, answer, room }).await
    }

    async fn command(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<(), String>>, OwnedSemaphorePermit) -> Command,
    ) -> Result<(), String> {
        let Some(room) = self.queue.room(QUEUED_ENTRY_BYTES).await else {
            return Err(self.failure().unwrap_or("the log is closed").to_owned());
        };
        let (answer, answered) = oneshot::channel();
        self.queue.push(make(answer, room));
        answered.await.unwrap_or_else(|_| Err("the log's writer has ended".to_owned()))
    }
}

/// Why a commit did not happen, or may not have.
struct Fault {
    reason: String,
    full: bool,
    stored: Stored,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stored {
    Nothing,
    Unknown,
}

impl Fault {
    fn before_commit(error: &ReadError) -> Self {
        Self { reason: error.to_string(), full: error.is_full(), stored: Stored::Nothing }
    }

    fn in_journal(error: &io::Error) -> Self {
        Self { reason: format!("log.journal: {error}"), full: false, stored: Stored::Unknown }
    }

    fn in_commit(error: ::redb::CommitError) -> Self {
        // A poisoned transaction is rolled back; of anything else redb says that it may have become durable.
        let stored = match error {
            ::redb::CommitError::TransactionPoisoned => Stored::Nothing,
            _ => Stored::Unknown,
        };
        let error = ReadError::from(error);
        Self { reason: error.to_string(), full: error.is_full(), stored }
    }

    fn append_error(&self) -> AppendError {
        let reason = self.reason.clone();
        match (self.stored, self.full) {
            (Stored::Unknown, _) => AppendError::Unknown(reason),
            (Stored::Nothing, true) => AppendError::Full(reason),
            (Stored::Nothing, false) => AppendError::Failed(reason),
        }
    }
}

pub(super) fn start(
    shared: &Arc<Shared>,
    opener: Opener,
    journal: Journal,
    stored: Position,
    tail: Tail,
) -> Result<JoinHandle<()>, OpenError> {
    let ending = Ending(Arc::clone(shared));
    let folder = opener.folder().to_owned();
    let heads = FxHashMap::default();
    let writer = Writer {
        shared: Arc::clone(shared),
        opener,
        journal,
        noted: Vec::new(),
        stored,
        tail,
        heads,
        is_file_first: false,
    };
    *shared.writer.lock() = Some(writer);
    let run = move || {
        // Owned by the thread, so that it is dropped when the thread ends, by a panic too.
        let ending = ending;
        run(&ending.0);
    };
    let started = thread::Builder::new().name("log-writer".to_owned()).spawn(run);
    started.map_err(|error| OpenError::Io { file: folder, reason: format!("no thread to write it: {error}") })
}

/// Nobody waits for a writer that is gone.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        drop(Failing(&self.0));
        self.0.queue.close();
        // It has the log itself.
        drop(self.0.writer.lock().take());
        self.0.queue.waiting.lock().commands.clear();
    }
}

/// A log whose writer panicked takes nothing more.
struct Failing<'a>(&'a Shared);

impl Drop for Failing<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail("the log's writer panicked".to_owned());
        }
    }
}

/// What it takes to write. There is one, and who holds it writes.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    opener: Opener,
    journal: Journal,
    /// For notes on their way to the journal.
    noted: Vec<u8>,
    /// Position of the last entry that the file has.
    stored: Position,
    /// The file could not be written: nothing goes to the journal before that has succeeded.
    is_file_first: bool,
    /// The last row, as long as it may grow.
    tail: Tail,
    /// Conversations whose head is known. Forgotten when there are too many.
    heads: FxHashMap<Key, ConversationHead>,
}

/// What of the journal the file is about to get.
struct SetAside {
    pending: Pending,
    /// Position of the last entry.
    last: Position,
}

/// What the writer's thread does.
fn run(shared: &Shared) {
    shared.queue.file_is_due_in(FILE_DELAY_MAX);
    loop {
        shared.queue.wait(shared.failure().is_some());
        let mut held = shared.writer.lock();
        let Some(writer) = held.as_mut() else { return };
        let Some(work) = shared.queue.take(writer.writes(), writer.journal.can_set_aside()) else { break };
        if let Some(reason) = shared.failure() {
            refuse(work.commands, &Fault { reason: reason.to_owned(), full: false, stored: Stored::Nothing });
            continue;
        }
        let written = if work.to == Target::FileBesideJournal {
            let aside = writer.set_aside();
            drop(held);
            let written = shared.write_beside_the_journal(&aside, &work.notes);
            held = shared.writer.lock();
            let Some(writer) = held.as_mut() else { return };
            written.map(|()| writer.filed(&aside))
        } else {
            writer.write(&work)
        };
        let Some(writer) = held.as_mut() else { return };
        let Work { commands, notes, to } = work;
        // The queue's own notes are then the only ones.
        drop(notes);
        match written {
            Ok(outcomes) => {
                if to == Target::FileBesideJournal {
                    shared.queue.filed();
                } else {
                    shared.queue.written(outcomes.noted);
                }
                answer(commands, outcomes);
            }
            Err(fault) => {
                shared.queue.not_written();
                refuse(commands, &writer.settle(fault));
                if shared.queue.is_closed() {
                    return;
                }
            }
        }
    }
    let mut held = shared.writer.lock();
    if let Some(writer) = held.as_mut()
        && writer.writes() != Writes::Nothing
        && let Err(fault) = writer.write_to_file(&[], &Notes::default(), Staged::none(shared.head()))
    {
        tracing::warn!(reason = %fault.reason, "the journal keeps messages for the next start: the log's file could not be written");
    }
}

impl Shared {
    /// Gives the file what was set aside, and notes.
    fn write_beside_the_journal(&self, aside: &SetAside, notes: &Notes) -> Result<(), Fault> {
        if aside.pending.is_empty() && notes.is_empty() {
            return Ok(());
        }
        let write = || -> Result<WriteTransaction, ReadError> {
            let transaction = self.begin_write()?;
            insert_pending(&transaction, &aside.pending)?;
            write_notes(&transaction, notes)?;
            Ok(transaction)
        };
        let transaction = write().map_err(|error| Fault::before_commit(&error))?;
        transaction.commit().map_err(Fault::in_commit)
    }

    fn begin_write(&self) -> Result<WriteTransaction, ReadError> {
        let database = self.database.read();
        let mut transaction = database.as_ref().ok_or_else(|| self.closed())?.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        transaction.set_quick_repair(true);
        Ok(transaction)
    }
}

impl Writer {
    fn set_aside(&mut self) -> SetAside {
        self.journal.set_aside();
        SetAside { pending: self.shared.pending(), last: self.shared.head() }
    }

    /// The file has it.
    fn filed(&mut self, aside: &SetAside) -> Outcomes {
        self.stored = aside.last;
        self.shared.pending.write().remove(&aside.pending);
        self.journal.forget_set_aside();
        Outcomes { batches: Vec::new(), noted: Noted::InFile, wiped: Ok(()) }
    }

    fn writes(&self) -> Writes {
        match self.shared.failure() {
            Some(_) => Writes::Nothing,
            None if self.is_file_first => Writes::File,
            None => Writes::Journal,
        }
    }

    /// One commit.
    fn write(&mut self, work: &Work) -> Result<Outcomes, Fault> {
        self.shared.index.wait_for_room().map_err(|reason| Fault { reason, full: true, stored: Stored::Nothing })?;
        let batches = work.commands.iter().filter_map(|command| match command {
            Command::Append { batch, .. } => Some(batch.as_slice()),
            Command::Sync { .. } | Command::Remove { .. } | Command::Commit { .. } => None,
        });
        let staged = self.check(batches).map_err(|error| Fault::before_commit(&error))?;
        let staged = match work.to {
            Target::Journal => match self.write_to_journal(staged, &work.notes)? {
                Ok(outcomes) => return Ok(outcomes),
                Err(staged) => staged,
            },
            Target::File | Target::FileBesideJournal => {
                return self.write_to_file(&work.commands, &work.notes, staged);
            }
        };
        let notes = self.shared.queue.notes_for_the_file();
        self.write_to_file(&work.commands, &notes, staged)
    }

    /// Gives the batches back if the journal has no room for them.
    fn write_to_journal<'a>(
        &mut self,
        staged: Staged<'a>,
        notes: &Notes,
    ) -> Result<Result<Outcomes, Staged<'a>>, Fault> {
        if staged.entries.is_empty() {
            return Ok(Ok(Outcomes { batches: staged.outcomes, noted: Noted::Nowhere, wiped: Ok(()) }));
        }
        let head = self.shared.head();
        let mut packer = Packer::new(&self.tail, head);
        staged.entries.iter().for_each(|new| packer.push(new));
        let first = Position(head.0 + 1);
        self.noted.clear();
        notes.encode(&mut self.noted);
        let recorded = self.journal.append(first, packer.pushed(), &self.noted);
        match recorded.map_err(|error| Fault::in_journal(&error))? {
            Recorded::NoRoom => return Ok(Err(staged)),
            Recorded::Stored => {}
        }
        {
            let mut pending = self.shared.pending.write();
            let Ok(tail) = packer.finish(|first, row| {
                pending.put(Row { first, bytes: row.into() });
                Ok::<(), Infallible>(())
            });
            self.tail = tail;
        }
        let delay = if self.journal.is_half_full() { Duration::ZERO } else { FILE_DELAY_MAX };
        self.shared.queue.file_is_due_in(delay);
        Ok(Ok(Outcomes { batches: self.stored(staged), noted: Noted::InJournal, wiped: Ok(()) }))
    }

    /// The file gets everything: what only the journal has, and this.
    fn write_to_file(&mut self, commands: &[Command], notes: &Notes, staged: Staged<'_>) -> Result<Outcomes, Fault> {
        let before_commit = |error: ReadError| Fault::before_commit(&error);
        let mut removals = commands.iter().filter_map(|command| match command {
            Command::Remove { removal, .. } => Some(removal),
            Command::Append { .. } | Command::Sync { .. } | Command::Commit { .. } => None,
        });
        let shredded = commands.iter().filter_map(|command| match command {
            Command::Commit { shredded, .. } => Some(shredded),
            Command::Append { .. } | Command::Sync { .. } | Command::Remove { .. } => None,
        });
        let wipes = shredded.clone().next().is_some();
        let others = removals.clone().next().is_some() || wipes;
        let pending = self.shared.pending();
        if staged.entries.is_empty() && notes.is_empty() && pending.is_empty() && !others {
            return Ok(Outcomes { batches: staged.outcomes, noted: Noted::InFile, wiped: Ok(()) });
        }
        let transaction = self.shared.begin_write().map_err(before_commit)?;
        forget(&transaction, shredded.flatten()).map_err(before_commit)?;
        insert_pending(&transaction, &pending).map_err(before_commit)?;
        let mut tail = self.tail.clone();
        for removal in removals.clone() {
            self.remove(&transaction, &mut tail, removal).map_err(before_commit)?;
        }
        self.erase_unsent(&transaction, &mut tail, &staged).map_err(before_commit)?;
        self.insert(&transaction, &mut tail, &staged).map_err(before_commit)?;
        write_notes(&transaction, notes).map_err(before_commit)?;
        note_new_conversations(&transaction, &staged).map_err(before_commit)?;
        transaction.commit().map_err(Fault::in_commit)?;
        self.tail = tail;
        self.stored = staged.last;
        self.is_file_first = false;
        *self.shared.pending.write() = Pending::default();
        self.journal.begin_anew();
        let batches = self.stored(staged);
        if let Some(removal) = removals.next_back() {
            self.shared.index.removed_before(removal.first);
        }
        let wiped = if wipes { self.journal.wipe().map_err(|error| format!("log.journal: {error}")) } else { Ok(()) };
        Ok(Outcomes { batches, noted: Noted::InFile, wiped })
    }

    /// Entries are on disk: reads may find them.
    fn stored(&mut self, staged: Staged<'_>) -> Vec<Result<Range<u64>, AppendError>> {
        self.heads.extend(staged.heads);
        self.shared.index.add(&staged.posted);
        self.shared.committed_up_to(staged.last);
        staged.outcomes
    }

    /// After a fault: goes on if the disk was full and it is certain that nothing was stored, else the log has failed.
    fn settle(&mut self, fault: Fault) -> Fault {
        if !fault.full {
            self.shared.fail(fault.reason.clone());
            return fault;
        }
        self.is_file_first = true;
        // redb refuses everything after a failed write until the file is opened again. Then the file says whether the commit was made.
        match self.reopen() {
            Ok(last) if last == self.stored => {
                tracing::warn!(reason = %fault.reason, "no space left for the log: nothing was stored");
                Fault { stored: Stored::Nothing, ..fault }
            }
            Ok(last) => {
                let reason = format!("{}; the log now ends at {}", fault.reason, last.0);
                self.shared.fail(reason.clone());
                Fault { reason, stored: Stored::Unknown, ..fault }
            }
            Err(error) => {
                let reason = format!("{}; then {error}", fault.reason);
                self.shared.fail(reason.clone());
                Fault { reason, ..fault }
            }
        }
    }

    /// Waits for the reads in progress; reads that come meanwhile wait.
    fn reopen(&mut self) -> Result<Position, String> {
        let mut database = self.shared.database.write();
        if let Some(Err(error)) = database.take().map(Database::close) {
            tracing::debug!(%error, "the log was closed to be repaired");
        }
        let opened = self.opener.open_log_file().map_err(|error| error.to_string())?;
        let prepared = read_prepared(&opened).map_err(|error| error.to_string())?;
        *database = Some(opened);
        Ok(prepared.stored)
    }
}

/// What became of a commit's commands.
struct Outcomes {
    /// Of the batches, in their order.
    batches: Vec<Result<Range<u64>, AppendError>>,
    noted: Noted,
    /// Whether nothing is left in the journal, if that was asked for.
    wiped: Result<(), String>,
}

fn answer(commands: Vec<Command>, outcomes: Outcomes) {
    let Outcomes { batches, wiped, .. } = outcomes;
    let mut batches = batches.into_iter();
    for command in commands {
        // A caller that went away needs no answer.
        match command {
            Command::Append { answer, room, .. } => {
                drop(room);
                let outcome = batches.next().expect("every batch has an outcome");
                answer.send(outcome.map(|positions| positions.map(Position).collect())).unwrap_or(());
            }
            Command::Sync { answer, room } | Command::Remove { answer, room, .. } => {
                drop(room);
                answer.send(Ok(())).unwrap_or(());
            }
            Command::Commit { answer, room, .. } => {
                drop(room);
                answer.send(wiped.clone()).unwrap_or(());
            }
        }
    }
}

fn refuse(commands: Vec<Command>, fault: &Fault) {
    for command in commands {
        match command {
            Command::Append { answer, .. } => drop(answer.send(Err(fault.append_error()))),
            Command::Sync { answer, .. } | Command::Remove { answer, .. } | Command::Commit { answer, .. } => {
                drop(answer.send(Err(fault.reason.clone())));
            }
        }
    }
}

/// Batches that a commit can take.
struct Staged<'a> {
    entries: Vec<&'a NewEntry>,
    posted: Vec<Posted>,
    /// The conversations' heads after them.
    heads: FxHashMap<Key, ConversationHead>,
    outcomes: Vec<Result<Range<u64>, AppendError>>,
    last: Position,
}

impl Staged<'_> {
    fn none(last: Position) -> Self {
        Self { entries: Vec::new(), posted: Vec::new(), heads: FxHashMap::default(), outcomes: Vec::new(), last }
    }
}

impl Writer {
    /// Checks that every entry is next in its conversation. A batch with one that is not is left out whole.
    fn check<'a>(&mut self, batches: impl Iterator<Item = &'a [NewEntry]> + Clone) -> Result<Staged<'a>, ReadError> {
        let keys: Vec<Key> =
            batches.clone().flatten().map(|new| self.shared.keys.conversation(&new.conversation)).collect();
        self.know_heads(batches.clone().flatten().map(|new| &new.conversation), &keys)?;
        let mut staged = Staged::none(self.shared.head());
        staged.entries.reserve(keys.len());
        staged.posted.reserve(keys.len());
        let mut keys = keys.as_slice();
        for batch in batches {
            let (batch_keys, rest) = keys.split_at(batch.len());
            keys = rest;
            let outcome = self.check_batch(batch, batch_keys, &mut staged);
            staged.outcomes.push(outcome);
        }
        Ok(staged)
    }

    /// Looks up the heads that are not known yet.
    fn know_heads<'a>(
        &mut self,
        conversations: impl Iterator<Item = &'a ConversationId> + Clone,
        keys: &[Key],
    ) -> Result<(), ReadError> {
        let unknown = |heads: &FxHashMap<Key, ConversationHead>| -> Vec<(&'a ConversationId, Key)> {
            let all = conversations.clone().zip(keys.iter().copied());
            all.filter(|(_, key)| !heads.contains_key(key)).collect()
        };
        let mut missing = unknown(&self.heads);
        if missing.is_empty() {
            return Ok(());
        }
        if self.heads.len() + missing.len() > HEADS_MAX {
            self.heads.clear();
            missing = unknown(&self.heads);
        }
        let (conversations, keys): (Vec<&ConversationId>, Vec<Key>) = missing.into_iter().unzip();
        let mut found = self.shared.index.heads(&keys)?;
        let emptied = conversations.into_iter().zip(&mut found).filter(|(_, head)| head.is_none());
        self.shared.noted_heads(emptied)?;
        self.heads.extend(keys.into_iter().zip(found).filter_map(|(key, head)| Some((key, head?))));
        Ok(())
    }

    fn check_batch<'a>(
        &self,
        batch: &'a [NewEntry],
        keys: &[Key],
        staged: &mut Staged<'a>,
    ) -> Result<Range<u64>, AppendError> {
        let mut moved: FxHashMap<Key, ConversationHead> = FxHashMap::default();
        for (new, key) in batch.iter().zip(keys) {
            let head = moved.get(key).or_else(|| staged.heads.get(key)).or_else(|| self.heads.get(key));
            if head.map_or(0, |head| head.seq.get()).checked_add(1) != Some(new.seq.get()) {
                return Err(AppendError::Conflict { conversation: new.conversation.clone(), expected: new.seq });
            }
            moved.insert(*key, ConversationHead { seq: new.seq, at: new.at });
        }
        let first = staged.last.0 + 1;
        for ((position, new), key) in (first..).zip(batch).zip(keys) {
            staged.posted.push(Posted::new(&self.shared.keys, Position(position), *key, new));
            staged.entries.push(new);
        }
        staged.last = Position(staged.last.0 + batch.len() as u64);
        staged.heads.extend(moved);
        Ok(first..staged.last.0 + 1)
    }

    /// Removes rows from the beginning of the log.
    fn remove(&self, transaction: &WriteTransaction, tail: &mut Tail, removal: &Removal) -> Result<(), ReadError> {
        let mut heads = transaction.open_table(HEADS)?;
        for (conversation, head) in &removal.heads {
            let key = conversation.to_string();
            heads.insert(key.as_str(), encode_head(key.as_bytes(), *head).as_slice())?;
        }
        let first = removal.first;
        transaction.open_table(META)?.insert(FIRST_KEY, first.0)?;
        let mut rows = transaction.open_table(ROWS)?;
        // The row that the first entry is in keeps that and what is behind it.
        let cut = match rows.range(..first.0)?.next_back().transpose()? {
            Some((begin, row)) if row::last(Position(begin.value()), row.value())? >= first => {
                Some((Position(begin.value()), row::rest(Position(begin.value()), row.value(), first)?.to_vec()))
            }
            _ => None,
        };
        rows.retain_in(..first.0, |_, _| false)?;
        match cut {
            Some((begin, rest)) => {
                rows.insert(first.0, rest.as_slice())?;
                if tail.begins_at(begin) {
                    *tail = Tail::of(first, &rest);
                }
            }
            None if first > self.shared.head() => *tail = Tail::default(),
            None => {}
        }
        Ok(())
    }

    /// The words that new entries take back are not kept.
    fn erase_unsent(
        &self,
        transaction: &WriteTransaction,
        tail: &mut Tail,
        staged: &Staged<'_>,
    ) -> Result<(), ReadError> {
        let unsends = staged.entries.iter().filter_map(|new| match new.body {
            Body::Unsend { target } => Some((&new.conversation, target)),
            _ => None,
        });
        for (conversation, target) in unsends {
            let shared = &self.shared;
            let key = shared.keys.conversation(conversation);
            let of_target = shared.index.positions(key, After::Seq(target.get() - 1), shared.first(), 1)?;
            let key = shared.keys.change(conversation, target);
            let of_edits = shared.index.positions(key, After::Position(0), shared.first(), usize::MAX)?;
            let is_meant = |entry: &Entry| {
                entry.conversation == *conversation && (entry.seq == target || entry.body.target() == Some(target))
            };
            for position in of_target.into_iter().chain(of_edits) {
                erase(transaction, tail, Position(position), is_meant)?;
            }
        }
        Ok(())
    }

    /// Adds rows to the end of the log.
    fn insert(&self, transaction: &WriteTransaction, tail: &mut Tail, staged: &Staged<'_>) -> Result<(), ReadError> {
        if staged.entries.is_empty() {
            return Ok(());
        }
        let mut packer = Packer::new(tail, self.shared.head());
        staged.entries.iter().for_each(|new| packer.push(new));
        let mut rows = transaction.open_table(ROWS)?;
        *tail = packer.finish(|first, row| {
            rows.insert(first.0, row)?;
            Ok::<(), ReadError>(())
        })?;
        Ok(())
    }
}

/// Nothing is left of what was erased there.
fn forget<'a>(
    transaction: &WriteTransaction,
    mut shredded: impl Iterator<Item = &'a Position>,
) -> Result<(), ReadError> {
    let Some(first) = shredded.next() else { return Ok(()) };
    let mut shreds = transaction.open_table(SHREDS)?;
    for position in std::iter::once(first).chain(shredded) {
        shreds.remove(position.0)?;
    }
    Ok(())
}

/// Writes an entry's row anew, without its words. What is not there any more, or is not meant, stays as it is.
fn erase(
    transaction: &WriteTransaction,
    tail: &mut Tail,
    position: Position,
    is_meant: impl Fn(&Entry) -> bool,
) -> Result<(), ReadError> {
    let mut rows = transaction.open_table(ROWS)?;
    let found = match rows.range(..=position.0)?.next_back().transpose()? {
        Some((begin, row)) => {
            let begin = Position(begin.value());
            row::without_words(begin, row.value(), position, is_meant)?.map(|(row, shred)| (begin, row, shred))
        }
        None => None,
    };
    if let Some((begin, row, shred)) = found {
        rows.insert(begin.0, row.as_slice())?;
        transaction.open_table(SHREDS)?.insert(position.0, (shred.checksum, shred.length))?;
        if tail.begins_at(begin) {
            *tail = Tail::of(begin, &row);
        }
    }
    Ok(())
}

/// From its first entry on, a conversation is one of both users'.
fn note_new_conversations(transaction: &WriteTransaction, staged: &Staged<'_>) -> Result<(), ReadError> {
    let first = staged.last.0 + 1 - staged.entries.len() as u64;
    let mut new = (first..).zip(&staged.entries).filter(|(_, entry)| entry.seq == Seq::FIRST).peekable();
    if new.peek().is_none() {
        return Ok(());
    }
    let pairs = new.flat_map(|(position, NewEntry { from, to, .. })| {
        [(peer_key(from, to), position), (peer_key(to, from), position)]
    });
    let mut peers = transaction.open_table(PEERS)?;
    for (key, position) in sorted(pairs) {
        let record = match peers.get(key.as_slice())? {
            Some(record) => decode_peer(&key, record.value())?,
            None => PeerRecord::default(),
        };
        let record = PeerRecord { changed: record.changed.max(Position(position)), ..record };
        peers.insert(key.as_slice(), encode_peer(&key, &record).as_slice())?;
    }
    Ok(())
}

/// In the order of the keys; what has the same key stays in its order.
fn sorted<K: Ord, V>(rows: impl Iterator<Item = (K, V)>) -> Vec<(K, V)> {
    let mut rows: Vec<(K, V)> = rows.collect();
    rows.sort_by(|(a, _), (b, _)| a.cmp(b));
    rows
}

pub(super) fn write_notes(transaction: &WriteTransaction, notes: &Notes) -> Result<(), ReadError> {
    if notes.is_empty() {
        return Ok(());
    }
    let mut delivered = transaction.open_table(DELIVERED)?;
    for (key, noted) in sorted(notes.delivered.iter().map(|(stream, noted)| (delivered_key(stream), *noted))) {
        let stored = delivered.get(key.as_slice())?.map(|stored| delivered_of(stored.value()));
        if stored.is_none_or(|stored| stored.position < noted.position) {
            delivered.insert(key.as_slice(), (noted.position.0, noted.moved.0))?;
        }
    }
    let mut sessions = transaction.open_table(SESSIONS)?;
    for (key, (device, note)) in sorted(notes.sessions.iter().map(|of| (session_key(of.0), of))) {
        let stored = if note.needs_stored() { stored_session(&sessions, device) } else { Ok(None) };
        let stored = match stored {
            Ok(stored) => stored,
            Err(ReadError::Broken(broken)) => {
                // Whoever reads the session is told; the other sessions and the messages go on.
                tracing::error!(%broken, "a session's cursors were not written");
                continue;
            }
            Err(error) => return Err(error),
        };
        match note.apply(stored) {
            Some(session) => drop(sessions.insert(key.as_slice(), encode_session(&key, &session).as_slice())?),
            None => drop(sessions.remove(key.as_slice())?),
        }
    }
    drop(sessions);
    write_notes_about_peers(transaction, notes)
}

fn write_notes_about_peers(transaction: &WriteTransaction, notes: &Notes) -> Result<(), ReadError> {
    if !notes.peers.is_empty() {
        let mut peers = transaction.open_table(PEERS)?;
        let noted = notes.peers.iter().map(|((user, peer), note)| (peer_key(user, peer), (user, peer, note)));
        for (key, (user, peer, note)) in sorted(noted) {
            let stored = stored_peer(&peers, user, peer)?.unwrap_or_default();
            peers.insert(key.as_slice(), encode_peer(&key, &note.apply(stored)).as_slice())?;
        }
    }
    if !notes.hidden.is_empty() {
        let mut hidden = transaction.open_table(HIDDEN)?;
        let noted = notes.hidden.iter().map(|((user, peer, seq), head)| (hidden_key(user, peer, *seq), *head));
        for (key, head) in sorted(noted) {
            if hidden.get(key.as_slice())?.is_none() {
                hidden.insert(key.as_slice(), head.0)?;
            }
        }
    }
    if !notes.seen.is_empty() {
        let mut seen = transaction.open_table(SEEN)?;
        for (user, at_ms) in sorted(notes.seen.iter().map(|(user, at_ms)| (user.as_str(), *at_ms))) {
            let stored = seen.get(user)?.map_or(0, |stored| stored.value());
            seen.insert(user, stored.max(at_ms))?;
        }
    }
    Ok(())
}
