//! Opening the files: their folder, their locks, their layouts, and sentences for what can be wrong with them.
//!
//! The log must be what it was. The index is made anew from the log if it is missing, damaged or of another format.

use std::collections::BTreeSet;
use std::collections::hash_map::RandomState;
use std::convert::Infallible;
use std::fs;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::redb::backends::FileBackend;
use ::redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, StorageBackend, StorageError, WriteTransaction,
};

use super::super::{PeerRecord, Position};
use super::RedbOptions;
use super::index::{Index, Run};
use super::indexer::{Indexer, Runs, read_runs};
use super::journal::{self, Journal};
use super::key::Keys;
use super::notes::Notes;
use super::pending::{Pending, Row};
use super::reader::ReadError;
use super::recent::Posted;
use super::record::{Broken, encode_peer};
use super::row::{self, Packer, Tail};
use super::schema::{
    BLOCKS, DELIVERED, DELIVERED_OF_FORMAT_2, FILTERS, FIRST_KEY, FORMAT_KEY, HEADS, HIDDEN, INDEX_FORMAT, LOG_FORMAT,
    META, PEERS, ROWS, RUNS, SECRET_KEYS, SEEN, SESSIONS, SHREDS, USAGE, USAGE_KEYS, peer_key,
};
use super::writer::write_notes;

const LOG_FILE_NAME: &str = "log.redb";
const JOURNAL_FILE_NAME: &str = "log.journal";
const INDEX_FILE_NAME: &str = "index.redb";
const FORMAT_1_FILE_NAME: &str = "chat.redb";
/// Says which process opened the log last, for the one that finds it locked.
const HOLDER_FILE_NAME: &str = "chat.pid";
/// A log of this version lacks the tables of heads, peers and what is about them.
const FORMAT_WITHOUT_PEERS: u64 = 2;
/// From one line about catching up to the next.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);

/// Why the log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder is not there and cannot be made.
    #[error("the folder {} cannot be created: {source}", folder.display())]
    Folder { folder: PathBuf, source: io::Error },
    /// Somebody else has it open.
    #[error("{} is in use by {holder}: only one process at a time may open it", file.display())]
    Locked { file: PathBuf, holder: String },
    /// A newer program wrote it.
    #[error("{} has format version {found}, this program knows up to {known}: use a newer version of it", file.display())]
    NewerFormat { file: PathBuf, found: String, known: u64 },
    /// A program before the first release wrote it.
    #[error("{} has format version 1, which no release had and this program cannot read: move it away to begin anew", file.display())]
    Format1 { file: PathBuf },
    /// The log ends before what the index or the journal has of it.
    #[error(
        "{} ends at {last} but had {had} messages once: its end is lost, or an older copy was put back; if that was meant, remove {}",
        log.display(),
        other.display()
    )]
    Behind { log: PathBuf, other: PathBuf, last: u64, had: u64 },
    /// It is not a log, or no longer.
    #[error("{} is damaged or no log of ours: {reason}; restore it from a backup, or move it away to begin anew", file.display())]
    Corrupt { file: PathBuf, reason: String },
    /// The disk or the system said no.
    #[error("{} cannot be opened: {reason}", file.display())]
    Io { file: PathBuf, reason: String },
}

/// Opens the files: at the start, and again after the disk was full.
#[derive(Clone, Debug)]
pub(super) struct Opener {
    folder: PathBuf,
    options: RedbOptions,
    /// Tests put a disk with faults here.
    #[cfg(test)]
    pub(super) disk: Disk,
    #[cfg(test)]
    pub(super) index_disk: Disk,
}

impl Opener {
    pub(super) fn new(folder: &Path, options: RedbOptions) -> Self {
        Self {
            folder: folder.to_owned(),
            options,
            #[cfg(test)]
            disk: None,
            #[cfg(test)]
            index_disk: None,
        }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn log_file(&self) -> PathBuf {
        self.folder.join(LOG_FILE_NAME)
    }

    pub(super) fn journal_file(&self) -> PathBuf {
        self.folder.join(JOURNAL_FILE_NAME)
    }

    pub(super) fn index_file(&self) -> PathBuf {
        self.folder.join(INDEX_FILE_NAME)
    }

    pub(super) fn make_folder(&self) -> Result<(), OpenError> {
        let made = make_private_folder(&self.folder);
        made.map_err(|source| OpenError::Folder { folder: self.folder.clone(), source })
    }

    pub(super) fn open_log_file(&self) -> Result<Database, OpenError> {
        let of_format_1 = self.folder.join(FORMAT_1_FILE_NAME);
        if of_format_1.exists() && !self.log_file().exists() {
            return Err(OpenError::Format1 { file: of_format_1 });
        }
        self.open_file(
            &self.log_file(),
            self.options.log_cache_bytes,
            #[cfg(test)]
            &self.disk,
        )
    }

    pub(super) fn open_index_file(&self) -> Result<Database, OpenError> {
        self.open_file(
            &self.index_file(),
            self.options.index_cache_bytes,
            #[cfg(test)]
            &self.index_disk,
        )
    }

    fn open_file(&self, file: &Path, cache_bytes: usize, #[cfg(test)] disk: &Disk) -> Result<Database, OpenError> {
        let mut builder = Database::builder();
        builder.set_cache_size(cache_bytes);
        let shown = file.to_owned();
        builder.set_repair_callback(move |session| {
            tracing::info!(file = %shown.display(), progress = session.progress(), "repairing");
        });
        make_private_file(file).map_err(|error| OpenError::Io { file: file.to_owned(), reason: error.to_string() })?;
        #[cfg(test)]
        let opened = match disk {
            Some(disk) => builder.create_with_backend(super::disk::File::open(file, disk)),
            None => builder.create(file),
        };
        #[cfg(not(test))]
        let opened = builder.create(file);
        opened.map_err(|error| self.refused(file, error))
    }

    fn refused(&self, file: &Path, error: DatabaseError) -> OpenError {
        let file = file.to_owned();
        let reason = error.to_string();
        match error {
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
                OpenError::Locked { file, holder: self.holder() }
            }
            DatabaseError::UpgradeRequired(version) => {
                OpenError::Corrupt { file, reason: format!("redb file format {version} is not read here") }
            }
            DatabaseError::Storage(StorageError::Corrupted(reason)) => OpenError::Corrupt { file, reason },
            DatabaseError::Storage(StorageError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                OpenError::Corrupt { file, reason: error.to_string() }
            }
            DatabaseError::Storage(StorageError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                OpenError::Corrupt { file, reason: format!("it is cut short ({error})") }
            }
            _ => OpenError::Io { file, reason },
        }
    }

    /// Makes the tables of a new log, refuses a newer format; finds what only the journal has.
    pub(super) fn prepare_log(&self, log: &Database) -> Result<Prepared, OpenError> {
        let file = self.log_file();
        match format(log).map_err(|error| unreadable(&file, error))? {
            Some(LOG_FORMAT) => {}
            Some(FORMAT_WITHOUT_PEERS) => {
                tracing::info!(file = %file.display(), from = FORMAT_WITHOUT_PEERS, to = LOG_FORMAT, "bringing the log to this format");
                add_peers(log).map_err(|error| unreadable(&file, error))?;
            }
            Some(found) if found > LOG_FORMAT => {
                return Err(OpenError::NewerFormat { file, found: found.to_string(), known: LOG_FORMAT });
            }
            Some(found) => return Err(OpenError::Corrupt { file, reason: format!("it has format version {found}") }),
            None => self.make_log_tables(log)?,
        }
        let mut prepared = read_prepared(log).map_err(|error| unreadable(&file, error))?;
        self.add_journal(&mut prepared)?;
        Ok(prepared)
    }

    /// The same, and what only the journal has is the file's, too: for whoever works with the file alone.
    pub(super) fn prepare_whole_log(&self, log: &Database) -> Result<Prepared, OpenError> {
        let prepared = self.prepare_log(log)?;
        let take_over = || -> Result<(), ReadError> {
            let mut writing = log.begin_write()?;
            writing.set_quick_repair(true);
            insert_pending(&writing, &prepared.pending)?;
            write_notes(&writing, &prepared.notes)?;
            Ok(writing.commit()?)
        };
        if prepared.pending.is_empty() {
            return Ok(prepared);
        }
        take_over().map_err(|error| unreadable(&self.log_file(), error))?;
        Ok(Prepared { stored: prepared.last, pending: Pending::default(), notes: Notes::default(), ..prepared })
    }

    /// Adds what the journal has and the file has not.
    fn add_journal(&self, prepared: &mut Prepared) -> Result<(), OpenError> {
        let file = self.journal_file();
        let read = journal::read(&file, prepared.keys, prepared.last);
        let (records, found) = read.map_err(|error| OpenError::Io { file: file.clone(), reason: error.to_string() })?;
        let Some(newest) = records.last() else { return Ok(()) };
        let broken = |error: Broken| OpenError::Corrupt { file: file.clone(), reason: error.to_string() };
        let newest = row::last(newest.first, &newest.entries).map_err(broken)?;
        for record in &records {
            if record.first.0 != prepared.last.0 + 1 {
                // Nothing was written there before what is missing was on disk.
                return Err(OpenError::Behind {
                    log: self.log_file(),
                    other: file,
                    last: prepared.last.0,
                    had: newest.0,
                });
            }
            let mut packer = Packer::new(&prepared.tail, prepared.last);
            row::repack(record.first, &record.entries, &mut packer).map_err(broken)?;
            let pending = &mut prepared.pending;
            let Ok(tail) = packer.finish(|first, row| {
                pending.put(Row { first, bytes: row.into() });
                Ok::<(), Infallible>(())
            });
            prepared.tail = tail;
            prepared.last = row::last(record.first, &record.entries).map_err(broken)?;
            let notes = Notes::decode(&record.notes);
            let damaged = |reason: String| OpenError::Corrupt { file: file.clone(), reason };
            prepared.notes.fold(notes.map_err(damaged)?);
        }
        prepared.in_journal = found;
        tracing::info!(messages = prepared.last.0 - prepared.stored.0, "taken from the journal");
        Ok(())
    }

    /// The journal, to be written; what was found in it is on disk for certain then. Made if it is missing.
    pub(super) fn open_journal(&self, prepared: &Prepared) -> Result<Journal, OpenError> {
        let path = self.journal_file();
        let failed = |error: io::Error| OpenError::Io { file: path.clone(), reason: error.to_string() };
        make_private_file(&path).map_err(failed)?;
        // Also if it is there: whoever made it may have been killed before this.
        self.sync_folder()?;
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
        let file = FileBackend::new(file).map_err(|error| self.refused(&path, error))?;
        let file: Box<dyn StorageBackend> = Box::new(file);
        #[cfg(test)]
        let file = match &self.disk {
            Some(disk) => Box::new(super::disk::File::open(&path, disk)),
            None => file,
        };
        let journal = Journal::new(file, prepared.keys, prepared.in_journal.clone(), self.options.journal_bytes);
        let journal = journal.map_err(failed)?;
        journal.make_durable().map_err(failed)?;
        Ok(journal)
    }

    fn make_log_tables(&self, log: &Database) -> Result<(), OpenError> {
        let file = self.log_file();
        let make = || -> Result<bool, ReadError> {
            let mut writing = log.begin_write()?;
            writing.set_quick_repair(true);
            if writing.list_tables()?.next().is_some() {
                return Ok(false);
            }
            let mut meta = writing.open_table(META)?;
            meta.insert(FORMAT_KEY, LOG_FORMAT)?;
            for key in SECRET_KEYS {
                meta.insert(key, random_number())?;
            }
            drop(meta);
            writing.open_table(ROWS)?;
            make_tables_about_users(&writing)?;
            writing.open_table(DELIVERED)?;
            writing.open_table(SESSIONS)?;
            writing.commit()?;
            Ok(true)
        };
        if !make().map_err(|error| unreadable(&file, error))? {
            let reason = "it has tables but says no format version".to_owned();
            return Err(OpenError::Corrupt { file, reason });
        }
        self.sync_folder()
    }

    /// A new file's name is on disk only once its folder is, and the folder's own name only once its parent is.
    pub(super) fn sync_folder(&self) -> Result<(), OpenError> {
        for folder in [Some(self.folder.as_path()), self.folder.parent()].into_iter().flatten() {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(|error| OpenError::Io { file: self.log_file(), reason: error.to_string() })?;
        }
        Ok(())
    }

    /// The index as it is, with its runs; `None` if it is not this log's.
    pub(super) fn read_index_file(&self, prepared: &Prepared) -> Result<Option<(Database, Vec<Run>)>, OpenError> {
        let index = self.open_index_file()?;
        let runs = read_index(&index, prepared, None).map_err(|error| unreadable(&self.index_file(), error))?;
        Ok(runs.map(|runs| (index, runs.listed)))
    }

    /// Opens the index and brings it up to the end of the log. One that does not fit the log is made anew.
    pub(super) fn open_index(&self, log: &Database, prepared: &Prepared) -> Result<(Arc<Index>, Indexer), OpenError> {
        let file = self.index_file();
        let opened = self.open_index_file().and_then(|index| {
            let runs = self.read_index(&index, prepared).map_err(|error| unreadable(&file, error))?;
            Ok((index, runs))
        });
        let (index, runs) = match opened {
            Ok((index, Some(runs))) => (index, runs),
            Ok((index, None)) => {
                tracing::warn!(file = %file.display(), "the index is not this log's, of another format, or without counts that are wanted: making it anew");
                drop(index);
                self.make_index_anew(prepared)?
            }
            Err(OpenError::Corrupt { file, reason }) => {
                tracing::warn!(file = %file.display(), %reason, "the index is damaged: making it anew");
                self.make_index_anew(prepared)?
            }
            Err(error) => return Err(error),
        };
        if let Some(run) = runs.listed.last().filter(|run| run.last > prepared.last.0) {
            return Err(OpenError::Behind { log: self.log_file(), other: file, last: prepared.last.0, had: run.last });
        }
        let index = Arc::new(Index::new(index, runs.listed, prepared.first, &self.options));
        let mut indexer = Indexer::new(Arc::clone(&index), runs.rubbish);
        catch_up(log, &index, &mut indexer, prepared).map_err(|error| unreadable(&self.log_file(), error))?;
        Ok((index, indexer))
    }

    fn read_index(&self, index: &Database, prepared: &Prepared) -> Result<Option<Runs>, ReadError> {
        read_index(index, prepared, Some(self.options.counts_usage))
    }

    fn make_index_anew(&self, prepared: &Prepared) -> Result<(Database, Runs), OpenError> {
        let file = self.index_file();
        fs::remove_file(&file).map_err(|error| OpenError::Io { file: file.clone(), reason: error.to_string() })?;
        let index = self.open_index_file()?;
        let runs = self.read_index(&index, prepared).map_err(|error| unreadable(&file, error))?;
        Ok((index, runs.unwrap_or_default()))
    }

    /// Notes this process as the file's holder. Only a hint for people, so failing to is no failure.
    pub(super) fn say_who_holds_it(&self) {
        let file = self.folder.join(HOLDER_FILE_NAME);
        let said = make_private_file(&file).and_then(|()| fs::write(&file, std::process::id().to_string()));
        if let Err(error) = said {
            tracing::warn!(%error, "the log's holder could not be noted");
        }
    }

    fn holder(&self) -> String {
        let noted = fs::read_to_string(self.folder.join(HOLDER_FILE_NAME)).unwrap_or_default();
        match noted.trim().parse::<u32>() {
            Ok(pid) if pid == std::process::id() => format!("this very process ({pid})"),
            Ok(pid) => format!("process {pid}"),
            Err(_) => "another process".to_owned(),
        }
    }
}

/// Makes a folder for the owner alone, if there is none. Those above it are like any others.
fn make_private_folder(folder: &Path) -> io::Result<()> {
    if let Some(above) = folder.parent() {
        fs::create_dir_all(above)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => Ok(()),
        made => made,
    }
}

/// Makes an empty file for the owner alone, if there is none: redb would make one for everybody to read.
pub(super) fn make_private_file(file: &Path) -> io::Result<()> {
    match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
type Disk = Option<Arc<dyn super::disk::Disk>>;

/// A log that was opened.
#[derive(Debug)]
pub(super) struct Prepared {
    /// Position of the last entry.
    pub(super) last: Position,
    /// Position of the last entry that the file has.
    pub(super) stored: Position,
    /// What only the journal has.
    pub(super) pending: Pending,
    /// What was noted, and only the journal has.
    pub(super) notes: Notes,
    /// Where that is in the journal.
    in_journal: Range<u64>,
    /// Position of the first entry that is not removed; the next one if all are.
    pub(super) first: Position,
    pub(super) tail: Tail,
    pub(super) keys: Keys,
    secret: [u64; 2],
}

/// What the log's file says.
pub(super) fn read_prepared(log: &Database) -> Result<Prepared, ReadError> {
    let reading = log.begin_read()?;
    let meta = reading.open_table(META)?;
    let mut secret = [0; 2];
    for (number, key) in secret.iter_mut().zip(SECRET_KEYS) {
        let found = meta.get(key)?;
        let missing = || Broken::at("meta", key.as_bytes(), "it is missing");
        *number = found.ok_or_else(missing)?.value();
    }
    // 0 is no position, and would be damage.
    let first = Position(meta.get(FIRST_KEY)?.map_or(1, |first| first.value()).max(1));
    let (last, tail) = match reading.open_table(ROWS)?.last()? {
        None => (Position(first.0 - 1), Tail::default()),
        Some((first, row)) => {
            let first = Position(first.value());
            (row::last(first, row.value())?, Tail::of(first, row.value()))
        }
    };
    let keys = Keys::new((secret[0], secret[1]));
    Ok(Prepared {
        last,
        stored: last,
        pending: Pending::default(),
        notes: Notes::default(),
        in_journal: 0..0,
        first,
        tail,
        keys,
        secret,
    })
}

/// Puts into the file what only the journal has.
pub(super) fn insert_pending(writing: &WriteTransaction, pending: &Pending) -> Result<(), ReadError> {
    if pending.is_empty() {
        return Ok(());
    }
    let mut rows = writing.open_table(ROWS)?;
    for row in pending.rows() {
        rows.insert(row.first.0, &*row.bytes)?;
    }
    Ok(())
}

/// `None` in a new file.
fn format(database: &Database) -> Result<Option<u64>, ReadError> {
    let reading = database.begin_read()?;
    match reading.open_table(META) {
        Ok(meta) => Ok(meta.get(FORMAT_KEY)?.map(|version| version.value())),
        Err(::redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Brings a log of format 2 to the one after: every conversation is one of both users'.
fn add_peers(log: &Database) -> Result<(), ReadError> {
    let mut writing = log.begin_write()?;
    writing.set_quick_repair(true);
    make_tables_about_users(&writing)?;
    let mut conversations = BTreeSet::new();
    for found in writing.open_table(ROWS)?.iter()? {
        let (first, row) = found?;
        for entry in row::entries(Position(first.value()), row.value()) {
            conversations.insert(entry?.conversation);
        }
    }
    let mut peers = writing.open_table(PEERS)?;
    for conversation in conversations {
        let (one, other) = (conversation.first(), conversation.second());
        for key in [peer_key(one, other), peer_key(other, one)] {
            peers.insert(key.as_slice(), encode_peer(&key, &PeerRecord::default()).as_slice())?;
        }
    }
    drop(peers);
    let last = writing.open_table(ROWS)?.last()?.map(|(first, row)| row::last(Position(first.value()), row.value()));
    let last = last.transpose()?.unwrap_or_default();
    let mut delivered = writing.open_table(DELIVERED)?;
    for found in writing.open_table(DELIVERED_OF_FORMAT_2)?.iter()? {
        let (key, position) = found?;
        delivered.insert(key.value(), (position.value(), last.0))?;
    }
    drop(delivered);
    writing.delete_table(DELIVERED_OF_FORMAT_2)?;
    writing.open_table(META)?.insert(FORMAT_KEY, LOG_FORMAT)?;
    writing.commit()?;
    Ok(())
}

fn make_tables_about_users(writing: &WriteTransaction) -> Result<(), ReadError> {
    writing.open_table(HEADS)?;
    writing.open_table(PEERS)?;
    writing.open_table(HIDDEN)?;
    writing.open_table(SEEN)?;
    writing.open_table(SHREDS)?;
    Ok(())
}

/// The runs of an index, whose tables are made if it is new; `None` if it is another log's, has another format, or does not count what is
/// to be counted (`None`: as it is).
fn read_index(index: &Database, prepared: &Prepared, counts_usage: Option<bool>) -> Result<Option<Runs>, ReadError> {
    let known =
        [(FORMAT_KEY, INDEX_FORMAT), (SECRET_KEYS[0], prepared.secret[0]), (SECRET_KEYS[1], prepared.secret[1])];
    if format(index)?.is_none() {
        let mut writing = index.begin_write()?;
        writing.set_quick_repair(true);
        if writing.list_tables()?.next().is_some() {
            return Ok(None);
        }
        let mut meta = writing.open_table(META)?;
        for (key, value) in known {
            meta.insert(key, value)?;
        }
        drop(meta);
        writing.open_table(RUNS)?;
        writing.open_table(BLOCKS)?;
        writing.open_table(FILTERS)?;
        writing.open_table(USAGE)?;
        if counts_usage == Some(true) {
            let mut meta = writing.open_table(META)?;
            for key in USAGE_KEYS {
                meta.insert(key, prepared.first.0)?;
            }
        }
        writing.commit()?;
    }
    let meta = index.begin_read()?.open_table(META)?;
    for (key, value) in known {
        if meta.get(key)?.map(|found| found.value()) != Some(value) {
            return Ok(None);
        }
    }
    let counts = meta.get(USAGE_KEYS[0])?.is_some();
    match counts_usage {
        Some(true) if !counts => return Ok(None),
        Some(false) if counts => {
            // Nobody keeps it up: it must not be believed later.
            let mut writing = index.begin_write()?;
            writing.set_quick_repair(true);
            let mut meta = writing.open_table(META)?;
            for key in USAGE_KEYS {
                meta.remove(key)?;
            }
            drop(meta);
            writing.open_table(USAGE)?.retain(|_, _| false)?;
            writing.commit()?;
        }
        _ => {}
    }
    let runs = read_runs(index)?;
    if let Some(run) = runs.listed.first().filter(|run| run.first > prepared.first.0) {
        return Err(Broken::at("runs", &run.number.to_be_bytes(), "there is none before it").into());
    }
    Ok(Some(runs))
}

/// Indexes what the log has and the index has not.
fn catch_up(log: &Database, index: &Index, indexer: &mut Indexer, prepared: &Prepared) -> Result<(), ReadError> {
    let indexed = index.indexed();
    if indexed == prepared.last {
        return Ok(());
    }
    let rows = log.begin_read()?.open_table(ROWS)?;
    let begin = rows.range(..=indexed.0 + 1)?.next_back().transpose()?.map_or(0, |(first, _)| first.value());
    let mut told_at = Instant::now();
    let mut posted = Vec::new();
    let mut expected = None;
    let mut add = |first: Position, row: &[u8]| -> Result<(), ReadError> {
        if expected.is_some_and(|expected| expected != first.0) {
            return Err(Broken::entry(first, "there is no row before it").into());
        }
        expected = Some(row::last(first, row)?.0 + 1);
        posted.clear();
        for entry in row::entries(first, row) {
            let entry = entry?;
            if entry.position > indexed {
                posted.push(Posted::of(&prepared.keys, &entry));
            }
        }
        index.add(&posted);
        indexer.flush()?;
        if told_at.elapsed() >= PROGRESS_INTERVAL {
            told_at = Instant::now();
            tracing::info!(position = first.0, of = prepared.last.0, "indexing the log");
        }
        Ok(())
    };
    let pending_from = prepared.pending.first().map_or(u64::MAX, |first| first.0);
    for found in rows.range(begin..pending_from)? {
        let (first, row) = found?;
        add(Position(first.value()), row.value())?;
    }
    prepared.pending.rows().iter().try_for_each(|row| add(row.first, &row.bytes))
}

fn unreadable(file: &Path, error: ReadError) -> OpenError {
    let file = file.to_owned();
    let reason = error.to_string();
    match error {
        ReadError::Storage(error)
            if matches!(*error, ::redb::Error::Io(_) | ::redb::Error::PreviousIo | ::redb::Error::Backend(_)) =>
        {
            OpenError::Io { file, reason }
        }
        _ => OpenError::Corrupt { file, reason },
    }
}

/// From the system's randomness, which seeds the standard library's hash maps.
pub(super) fn random_number() -> u64 {
    RandomState::new().build_hasher().finish()
}
