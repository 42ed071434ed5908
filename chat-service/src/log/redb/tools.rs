//! What an operator does to a log besides serving from it: verify, export, copy, compact.
//!
//! All but copying want the log for themselves. Each goes through the log from its first position to its last and tells how far it is;
//! the one that is told may say that it is enough, and then nothing is left half done.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ::redb::{CompactionError, Database, Durability, ReadTransaction, ReadableDatabase, ReadableTable};
use chat_protocol::{ConversationId, UserId};
use rustc_hash::FxHashMap;

use super::super::{Device, Entry, Position, Side};
use super::index::Run;
use super::indexer::RunReader;
use super::key::{Key, Keys};
use super::open::{OpenError, Opener, Prepared, insert_pending, make_private_file, random_number};
use super::pending::Pending;
use super::posting::{Last, ListRef};
use super::reader::ReadError;
use super::recent::Posted;
use super::record::{decode_head, decode_session};
use super::row;
use super::schema::{
    BLOCKS, DELIVERED, FIRST_KEY, HEADS, HIDDEN, META, PEERS, ROWS, SECRET_KEYS, SEEN, SESSIONS, SHREDS, USAGE,
    USAGE_KEYS,
};
use super::{RedbLog, RedbOptions};

/// Rows that one transaction of a copy writes: 4 MB.
const COPY_ROWS: usize = 256;
/// Problems that are listed; of more there is only the number.
const PROBLEMS_LISTED_MAX: usize = 1_000;

/// How far a tool is: positions done, and positions in all. To break is to stop.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("there is no log in {}", folder.display())]
    NoLog { folder: PathBuf },
    #[error("there is a log in {} already", folder.display())]
    LogThere { folder: PathBuf },
    #[error("reading the log: {0}")]
    Read(String),
    #[error("{what}: {cause}")]
    Write { what: String, cause: String },
    /// The one that was told the progress had enough; nothing was changed.
    #[error("interrupted")]
    Interrupted,
}

impl From<ReadError> for ToolError {
    fn from(error: ReadError) -> Self {
        Self::Read(error.to_string())
    }
}

/// What [`verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    pub entries: u64,
    pub conversations: u64,
    pub sessions: u64,
    /// Entries that the index has.
    pub indexed: u64,
    /// Sentences that say what is wrong and where, at most a thousand.
    pub problems: Vec<String>,
    /// How many there are.
    pub problems_in_all: u64,
}

impl Verified {
    fn problem(&mut self, problem: impl Into<String>) {
        self.problems_in_all += 1;
        if self.problems.len() < PROBLEMS_LISTED_MAX {
            self.problems.push(problem.into());
        }
    }
}

fn existing(folder: &Path) -> Result<Opener, ToolError> {
    let opener = Opener::new(folder, RedbOptions::default());
    if opener.log_file().is_file() { Ok(opener) } else { Err(ToolError::NoLog { folder: folder.to_owned() }) }
}

/// Walks the whole log: pages, checksums, seqs without gaps, times that do not run backwards, cursors in range; and the index beside it.
/// Memory grows with the number of conversations, some 50 bytes each.
pub fn verify(folder: &Path, progress: Progress<'_>) -> Result<Verified, ToolError> {
    let opener = existing(folder)?;
    let mut found = Verified::default();
    let mut log = opener.open_log_file()?;
    match log.check_integrity() {
        Ok(true) => {}
        Ok(false) => found.problem("log.redb: pages were damaged and could be repaired"),
        Err(error) => {
            found.problem(format!("log.redb: {error}"));
            return Ok(found);
        }
    }
    let prepared = opener.prepare_whole_log(&log)?;
    opener.say_who_holds_it();
    let index = index_of(&opener, &prepared, &mut found);
    let snapshot = log.begin_read().map_err(ReadError::from)?;
    verify_entries(&snapshot, &prepared, index.as_ref(), &mut found, progress)?;
    verify_cursors(&snapshot, prepared.last, &mut found)?;
    Ok(found)
}

/// The index and its runs, if it is there and can be read.
fn index_of(opener: &Opener, prepared: &Prepared, found: &mut Verified) -> Option<(Database, Vec<Run>)> {
    if !opener.index_file().is_file() {
        return None;
    }
    match opener.read_index_file(prepared) {
        Ok(Some((index, runs))) => {
            if let Some(run) = runs.last().filter(|run| run.last > prepared.last.0) {
                found.problem(format!(
                    "the log ends at {}, but the index has entries up to {}: the log has lost its end",
                    prepared.last.0, run.last
                ));
            }
            Some((index, runs))
        }
        Ok(None) => {
            found.problem("index.redb: it is another log's, or of another format; it is made anew when chatd starts");
            None
        }
        Err(error) => {
            found.problem(format!("{error}; the index is made anew when chatd starts"));
            None
        }
    }
}

/// Postings, added up: the same in the log and in the index, in whatever order they come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    count: u64,
    sum: u64,
}

impl Sum {
    fn add(&mut self, key: Key, position: u64, seq: u64) {
        // As splitmix64 does it.
        let mut mixed = key.random_bits().0 ^ position.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seq.rotate_left(32);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.count += 1;
        self.sum = self.sum.wrapping_add(mixed ^ (mixed >> 31));
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    /// Of conversations and streams.
    always: Sum,
    /// Of ids, which an index may have dropped.
    ids: Sum,
}

impl Sums {
    fn add_entry(&mut self, keys: &Keys, entry: &Entry) {
        let position = entry.position.0;
        self.always.add(keys.conversation(&entry.conversation), position, entry.seq.get());
        if !entry.withheld {
            self.always.add(keys.inbox(&entry.to), position, 0);
        }
        if let Some(target) = entry.body.target() {
            self.always.add(keys.change(&entry.conversation, target), position, 0);
        }
        self.always.add(keys.sent(&entry.from), position, 0);
        if let Some(id) = &entry.id {
            self.ids.add(keys.id(&entry.conversation, &entry.from, id), position, 0);
        }
    }

    fn add_list(&mut self, list: &ListRef<'_>) {
        let sum = if list.key.is_id() { &mut self.ids } else { &mut self.always };
        for (position, seq) in list.positions.iter().zip(list.first_seq()..) {
            sum.add(list.key, *position, if list.key.is_conversation() { seq } else { 0 });
        }
    }
}

fn verify_entries(
    snapshot: &ReadTransaction,
    prepared: &Prepared,
    index: Option<&(Database, Vec<Run>)>,
    found: &mut Verified,
    progress: Progress<'_>,
) -> Result<(), ToolError> {
    let mut heads: FxHashMap<Key, Last> = FxHashMap::default();
    let mut runs = index.map(|(_, runs)| runs.iter()).into_iter().flatten().peekable();
    let mut sums = Sums::default();
    let begin = prepared.first.0;
    // Only what is removed.
    while runs.next_if(|run| run.last < begin).is_some() {}
    let noted = noted_heads(snapshot, &prepared.keys, found)?;
    let mut usage = index.map(|(index, _)| Usage::of(index)).transpose()?.flatten();
    let mut expected = begin;
    let rows = snapshot.open_table(ROWS).map_err(ReadError::from)?;
    for row in rows.iter().map_err(ReadError::from)? {
        let (first, row) = row.map_err(ReadError::from)?;
        let first = Position(first.value());
        if first.0 != expected {
            found.problem(format!(
                "log.redb, table rows: entries {expected} to {} are missing",
                first.0.wrapping_sub(1)
            ));
        }
        expected = row::last(first, row.value()).map_or(first.0, |last| last.0) + 1;
        for entry in row::entries(first, row.value()) {
            let entry = match entry {
                Ok(entry) => entry,
                Err(broken) => {
                    found.problem(format!("log.redb, {broken}"));
                    continue;
                }
            };
            found.entries += 1;
            let key = prepared.keys.conversation(&entry.conversation);
            let head = heads.entry(key).or_insert_with(|| {
                // Of a conversation that goes on the beginning may be removed, but no more.
                let noted = noted.get(&key).copied().unwrap_or_default();
                let before = if begin > 1 { entry.seq.get().saturating_sub(1).max(noted.seq) } else { 0 };
                Last { seq: before, at_ms: noted.at_ms }
            });
            if entry.seq.get() != head.seq + 1 {
                found.problem(format!(
                    "conversation {}: seq {} at position {} follows {}",
                    entry.conversation, entry.seq, entry.position.0, head.seq
                ));
            }
            if entry.at.as_ms() < head.at_ms {
                found.problem(format!(
                    "conversation {}: the time of seq {} runs backwards",
                    entry.conversation, entry.seq
                ));
            }
            *head = Last { seq: entry.seq.get(), at_ms: entry.at.as_ms() };
            sums.add_entry(&prepared.keys, &entry);
            if let Some(usage) = &mut usage {
                usage.add(&prepared.keys, &entry);
            }
            if let Some((database, _)) = index
                && let Some(run) = runs.next_if(|run| run.last <= entry.position.0)
            {
                match sums_of(database, run, begin) {
                    Ok(indexed) if indexed.always == sums.always && indexed.ids.count <= sums.ids.count => {
                        found.indexed += run.last - run.first.max(begin) + 1;
                    }
                    Ok(_) => found.problem(format!(
                        "index.redb: what it says of entries {} to {} is not what the log has",
                        run.first, run.last
                    )),
                    Err(error) => found.problem(format!("index.redb, {error}")),
                }
                sums = Sums::default();
            }
        }
        if progress(expected - 1, prepared.last.0).is_break() {
            return Err(ToolError::Interrupted);
        }
    }
    found.conversations = heads.keys().chain(noted.keys().filter(|key| !heads.contains_key(key))).count() as u64;
    if let (Some(usage), Some((index, _))) = (usage, index) {
        usage.compare(index, found)?;
    }
    Ok(())
}

/// Heads of conversations whose entries were all removed.
fn noted_heads(
    snapshot: &ReadTransaction,
    keys: &Keys,
    found: &mut Verified,
) -> Result<FxHashMap<Key, Last>, ToolError> {
    let mut heads = FxHashMap::default();
    let noted = snapshot.open_table(HEADS).map_err(ReadError::from)?;
    for head in noted.iter().map_err(ReadError::from)? {
        let (conversation, record) = head.map_err(ReadError::from)?;
        let conversation = conversation.value();
        match (ConversationId::parse(conversation), decode_head(conversation.as_bytes(), record.value())) {
            (Ok(id), Ok(head)) => {
                heads.insert(keys.conversation(&id), Last { seq: head.seq.get(), at_ms: head.at.as_ms() });
            }
            (Err(error), _) => found.problem(format!("log.redb, table heads, key {conversation}: {error}")),
            (_, Err(broken)) => found.problem(format!("log.redb, {broken}")),
        }
    }
    Ok(heads)
}

/// What is stored for accounts, added up from the log.
struct Usage {
    /// Positions that the index counts.
    counted: std::ops::Range<u64>,
    bytes: FxHashMap<Key, u64>,
}

impl Usage {
    /// `None` if the index does not count.
    fn of(index: &Database) -> Result<Option<Self>, ReadError> {
        let meta = index.begin_read()?.open_table(META)?;
        let [Some(first), Some(end)] = [meta.get(USAGE_KEYS[0])?, meta.get(USAGE_KEYS[1])?] else { return Ok(None) };
        Ok(Some(Self { counted: first.value()..end.value(), bytes: FxHashMap::default() }))
    }

    fn add(&mut self, keys: &Keys, entry: &Entry) {
        if self.counted.contains(&entry.position.0) {
            for (key, bytes) in Posted::of(keys, entry).counted() {
                *self.bytes.entry(key).or_default() += bytes;
            }
        }
    }

    fn compare(mut self, index: &Database, found: &mut Verified) -> Result<(), ReadError> {
        let stored = index.begin_read()?.open_table(USAGE)?;
        for account in stored.iter()? {
            let (key, bytes) = account?;
            let expected = self.bytes.remove(&Key::from_bytes(*key.value())).unwrap_or_default();
            if expected != bytes.value() {
                let key = key.value().escape_ascii();
                found.problem(format!(
                    "index.redb, table usage, key {key}: it says {} bytes, the log has {expected}",
                    bytes.value()
                ));
            }
        }
        for key in self.bytes.keys() {
            let key = key.to_bytes();
            found.problem(format!("index.redb, table usage, key {}: it is missing", key.escape_ascii()));
        }
        Ok(())
    }
}

/// `first`: position of the log's first entry.
fn sums_of(index: &Database, run: &Run, first: u64) -> Result<Sums, ReadError> {
    let blocks = index.begin_read()?.open_table(BLOCKS)?;
    let mut reader = RunReader::new(&blocks, run.number, false, first)?;
    let mut sums = Sums::default();
    while let Some(list) = reader.list() {
        sums.add_list(&list);
        reader.advance()?;
    }
    Ok(sums)
}

fn verify_cursors(snapshot: &ReadTransaction, last: Position, found: &mut Verified) -> Result<(), ToolError> {
    let sessions = snapshot.open_table(SESSIONS).map_err(ReadError::from)?;
    for session in sessions.iter().map_err(ReadError::from)? {
        let (key, record) = session.map_err(ReadError::from)?;
        let key = key.value();
        found.sessions += 1;
        let device = key.iter().position(|byte| *byte == 0).and_then(|at| {
            let user = UserId::parse(std::str::from_utf8(&key[..at]).ok()?).ok()?;
            Some(Device { user, client_id: std::str::from_utf8(&key[at + 1..]).ok()?.into() })
        });
        let Some(device) = device else {
            found.problem(format!("log.redb, table sessions, key {}: it is no device", key.escape_ascii()));
            continue;
        };
        match decode_session(&device, record.value()) {
            Ok(session) => {
                let cursors = Side::ALL.into_iter().filter_map(|side| session.cursors.of(side));
                for cursor in cursors.filter(|cursor| *cursor > last) {
                    found.problem(format!("session of {device}: its cursor {} is behind the end", cursor.0));
                }
            }
            Err(broken) => found.problem(format!("log.redb, {broken}")),
        }
    }
    let delivered = snapshot.open_table(DELIVERED).map_err(ReadError::from)?;
    for cursor in delivered.iter().map_err(ReadError::from)? {
        let (key, position) = cursor.map_err(ReadError::from)?;
        let (position, _) = position.value();
        if position > last.0 {
            let key = key.value().escape_ascii();
            found.problem(format!("log.redb, table acknowledged, key {key}: {position} is behind the end"));
        }
    }
    Ok(())
}

/// Gives every entry to `take`, in the order of the log.
pub fn export(
    folder: &Path,
    mut take: impl FnMut(&Entry) -> std::io::Result<()>,
    progress: Progress<'_>,
) -> Result<u64, ToolError> {
    let opener = existing(folder)?;
    let log = opener.open_log_file()?;
    let prepared = opener.prepare_whole_log(&log)?;
    opener.say_who_holds_it();
    let rows = log.begin_read().map_err(ReadError::from)?.open_table(ROWS).map_err(ReadError::from)?;
    let mut entries = 0;
    for row in rows.iter().map_err(ReadError::from)? {
        let (first, row) = row.map_err(ReadError::from)?;
        for entry in row::entries(Position(first.value()), row.value()) {
            let entry = entry.map_err(ReadError::from)?;
            let written = take(&entry);
            written.map_err(|error| ToolError::Write { what: "writing".to_owned(), cause: error.to_string() })?;
            entries += 1;
        }
        if progress(entries, prepared.last.0).is_break() {
            return Err(ToolError::Interrupted);
        }
    }
    Ok(entries)
}

/// Gives room that nothing uses back to the file system. How many bytes that were.
pub fn compact(folder: &Path, progress: Progress<'_>) -> Result<u64, ToolError> {
    let opener = existing(folder)?;
    let log = opener.open_log_file()?;
    opener.prepare_whole_log(&log)?;
    opener.say_who_holds_it();
    let mut given_back = 0;
    let mut files = vec![(opener.log_file(), log)];
    if opener.index_file().is_file() {
        files.push((opener.index_file(), opener.open_index_file()?));
    }
    let count = files.len() as u64;
    for (nth, (file, mut database)) in (0..).zip(files) {
        let failed = |cause: String| ToolError::Write { what: format!("compacting {}", file.display()), cause };
        let size = || fs::metadata(&file).map(|metadata| metadata.len()).map_err(|error| failed(error.to_string()));
        let before = size()?;
        // Each round moves some pages, and is a commit of its own: to stop between two is safe.
        loop {
            if progress(nth, count).is_break() {
                return Err(ToolError::Interrupted);
            }
            match database.compact() {
                Ok(true) => {}
                Ok(false) => break,
                Err(CompactionError::Storage(error)) => return Err(failed(error.to_string())),
                Err(error) => return Err(failed(error.to_string())),
            }
        }
        drop(database);
        given_back += before.saturating_sub(size()?);
    }
    Ok(given_back)
}

impl RedbLog {
    /// Copies the log as it is now into another folder, while it is served from. What is copied is on disk and whole when this
    /// returns; the index is not copied, and made when the copy is opened. Returns the position of its last entry.
    pub fn backup(&self, folder: &Path, progress: Progress<'_>) -> Result<u64, ToolError> {
        let _kept = self.shared.snapshots.read();
        let pending = self.shared.pending();
        let snapshot = self.shared.begin_read()?;
        copy(&snapshot, &pending, folder, Copied::Backup, progress)
    }
}

/// The same for a log that nobody serves from.
pub fn backup(folder: &Path, to: &Path, progress: Progress<'_>) -> Result<u64, ToolError> {
    let opener = existing(folder)?;
    let log = opener.open_log_file()?;
    opener.prepare_whole_log(&log)?;
    opener.say_who_holds_it();
    copy(&log.begin_read().map_err(ReadError::from)?, &Pending::default(), to, Copied::Backup, progress)
}

/// Puts a backup into a folder that has no log. The backup is verified first. What is restored is another log: the positions that it gives
/// from now on may have been given before, to other entries, so nobody may go on from a token of then.
pub fn restore(from: &Path, folder: &Path, progress: Progress<'_>) -> Result<u64, ToolError> {
    let target = Opener::new(folder, RedbOptions::default());
    if target.log_file().exists() || target.index_file().exists() {
        return Err(ToolError::LogThere { folder: folder.to_owned() });
    }
    let verified = verify(from, progress)?;
    if let Some(problem) = verified.problems.first() {
        return Err(ToolError::Read(format!("{}: {problem}", from.display())));
    }
    let opener = existing(from)?;
    let log = opener.open_log_file()?;
    opener.prepare_whole_log(&log)?;
    copy(&log.begin_read().map_err(ReadError::from)?, &Pending::default(), folder, Copied::Restored, progress)
}

/// What a copy is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Copied {
    Backup,
    Restored,
}

/// `pending`: what only the journal had, taken before the snapshot.
pub(super) fn copy(
    snapshot: &ReadTransaction,
    pending: &Pending,
    folder: &Path,
    copied: Copied,
    progress: Progress<'_>,
) -> Result<u64, ToolError> {
    let opener = Opener::new(folder, RedbOptions::default());
    opener.make_folder()?;
    let file = opener.log_file();
    // A backup has the secret of its log, so a journal that is left of another copy of it would be taken for its own.
    if file.exists() || copied == Copied::Backup && opener.journal_file().exists() {
        return Err(ToolError::LogThere { folder: folder.to_owned() });
    }
    let part = file.with_extension("redb.part");
    let failed = |cause: &dyn std::fmt::Display| ToolError::Write {
        what: format!("writing {}", part.display()),
        cause: cause.to_string(),
    };
    let copied = copy_tables(snapshot, pending, &part, copied, progress, &failed).and_then(|last| {
        fs::rename(&part, &file).map_err(|error| failed(&error))?;
        opener.sync_folder()?;
        Ok(last)
    });
    if copied.is_err() {
        // What is left of it is of no use; that it cannot be removed is not what went wrong.
        fs::remove_file(&part).unwrap_or(());
    }
    copied
}

/// Position of the first entry that is not removed.
fn first_of(snapshot: &ReadTransaction) -> Result<u64, ReadError> {
    Ok(snapshot.open_table(META)?.get(FIRST_KEY)?.map_or(1, |first| first.value()))
}

fn copy_tables(
    snapshot: &ReadTransaction,
    pending: &Pending,
    part: &Path,
    copied: Copied,
    progress: Progress<'_>,
    failed: &dyn Fn(&dyn std::fmt::Display) -> ToolError,
) -> Result<u64, ToolError> {
    fs::remove_file(part).unwrap_or(());
    make_private_file(part).map_err(|error| failed(&error))?;
    let copy = Database::create(part).map_err(|error| failed(&error))?;
    let begin = || {
        let mut writing = copy.begin_write().map_err(|error| failed(&error))?;
        writing.set_durability(Durability::Immediate).map_err(|error| failed(&error))?;
        writing.set_quick_repair(true);
        Ok::<_, ToolError>(writing)
    };
    // One macro for tables of different types: copies what is in one, as it is.
    macro_rules! copy_table {
        ($writing:expr, $table:expr) => {{
            let mut target = $writing.open_table($table).map_err(|error| failed(&error))?;
            let source = snapshot.open_table($table).map_err(ReadError::from)?;
            for found in source.iter().map_err(ReadError::from)? {
                let (key, value) = found.map_err(ReadError::from)?;
                target.insert(key.value(), value.value()).map_err(|error| failed(&error))?;
            }
        }};
    }
    let writing = begin()?;
    copy_table!(writing, META);
    if copied == Copied::Restored {
        let mut meta = writing.open_table(META).map_err(|error| failed(&error))?;
        for key in SECRET_KEYS {
            meta.insert(key, random_number()).map_err(|error| failed(&error))?;
        }
    }
    copy_table!(writing, DELIVERED);
    copy_table!(writing, SESSIONS);
    copy_table!(writing, HEADS);
    copy_table!(writing, PEERS);
    copy_table!(writing, HIDDEN);
    copy_table!(writing, SEEN);
    // A copy has no free pages with words that were erased.
    writing.open_table(SHREDS).map_err(|error| failed(&error))?;
    writing.open_table(ROWS).map_err(|error| failed(&error))?;
    writing.commit().map_err(|error| failed(&error))?;

    let source = snapshot.open_table(ROWS).map_err(ReadError::from)?;
    let stored = match source.last().map_err(ReadError::from)? {
        Some((first, row)) => row::last(Position(first.value()), row.value()).map_err(ReadError::from)?.0,
        None => first_of(snapshot)? - 1,
    };
    let newest =
        pending.rows().last().map(|row| row::last(row.first, &row.bytes)).transpose().map_err(ReadError::from)?;
    // If the file got it between the two looks, it has all of it, has cursors behind it perhaps, and may not have the first of it any more.
    let (pending, last) = match newest {
        Some(newest) if newest.0 > stored => (pending, newest.0),
        _ => (&Pending::default(), stored),
    };
    let pending_from = pending.first().map_or(u64::MAX, |first| first.0);
    let mut rows = source.range(..pending_from).map_err(ReadError::from)?;
    loop {
        let writing = begin()?;
        let mut copied = 0;
        {
            let mut target = writing.open_table(ROWS).map_err(|error| failed(&error))?;
            for found in rows.by_ref().take(COPY_ROWS) {
                let (first, row) = found.map_err(ReadError::from)?;
                // A copy of something damaged would be no backup.
                for entry in row::entries(Position(first.value()), row.value()) {
                    entry.map_err(ReadError::from)?;
                }
                target.insert(first.value(), row.value()).map_err(|error| failed(&error))?;
                copied = first.value();
            }
        }
        if copied == 0 {
            insert_pending(&writing, pending).map_err(|error| failed(&error))?;
        }
        writing.commit().map_err(|error| failed(&error))?;
        if copied == 0 {
            return Ok(last);
        }
        if progress(copied, last).is_break() {
            return Err(ToolError::Interrupted);
        }
    }
}
