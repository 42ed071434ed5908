//! Opening the file: its folder, its lock, its layout, and sentences for what can be wrong with them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ::redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError};

use super::super::Position;
use super::RedbOptions;
use super::schema::{BY_SEQ, CONVERSATIONS, DELIVERED, ENTRIES, FORMAT, FORMAT_KEY, IDS, META, SESSIONS, STREAMS};

const FILE_NAME: &str = "chat.redb";
/// Says which process opened the log last, for the one that finds it locked.
const HOLDER_FILE_NAME: &str = "chat.pid";

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
    /// It is not a log, or no longer.
    #[error("{} is damaged or no log of ours: {reason}; restore it from a backup, or move it away to begin anew", file.display())]
    Corrupt { file: PathBuf, reason: String },
    /// The disk or the system said no.
    #[error("{} cannot be opened: {reason}", file.display())]
    Io { file: PathBuf, reason: String },
}

/// Opens the file: at the start, and again after the disk was full.
#[derive(Debug)]
pub(super) struct Opener {
    folder: PathBuf,
    options: RedbOptions,
    /// Tests put a disk with faults here.
    #[cfg(test)]
    pub(super) disk: Option<std::sync::Arc<super::tests::FaultyDisk>>,
}

impl Opener {
    pub(super) fn new(folder: &Path, options: RedbOptions) -> Self {
        Self {
            folder: folder.to_owned(),
            options,
            #[cfg(test)]
            disk: None,
        }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    fn file(&self) -> PathBuf {
        self.folder.join(FILE_NAME)
    }

    pub(super) fn make_folder(&self) -> Result<(), OpenError> {
        let made = fs::create_dir_all(&self.folder);
        made.map_err(|source| OpenError::Folder { folder: self.folder.clone(), source })
    }

    pub(super) fn open(&self) -> Result<Database, OpenError> {
        let file = self.file();
        let mut builder = Database::builder();
        builder.set_cache_size(self.options.cache_bytes);
        let shown = file.clone();
        builder.set_repair_callback(move |session| {
            tracing::info!(file = %shown.display(), progress = session.progress(), "repairing the log");
        });
        #[cfg(test)]
        let opened = match &self.disk {
            Some(disk) => builder.create_with_backend(super::tests::FaultyFile::open(&file, disk)),
            None => builder.create(&file),
        };
        #[cfg(not(test))]
        let opened = builder.create(&file);
        opened.map_err(|error| self.refused(error))
    }

    fn refused(&self, error: DatabaseError) -> OpenError {
        let file = self.file();
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

    /// Makes the tables of a new file, refuses a newer format. Returns the position of the last entry.
    pub(super) fn prepare(&self, database: &Database) -> Result<Position, OpenError> {
        let known = self.format(database).map_err(|error| self.unreadable(&error))?;
        match known {
            Some(FORMAT) => {}
            Some(found) if found > FORMAT => {
                return Err(OpenError::NewerFormat { file: self.file(), found: found.to_string(), known: FORMAT });
            }
            Some(found) => {
                return Err(OpenError::Corrupt { file: self.file(), reason: format!("it has format version {found}") });
            }
            None => self.make_tables(database)?,
        }
        last_position(database).map_err(|error| self.unreadable(&error))
    }

    /// `None` in a new file.
    fn format(&self, database: &Database) -> Result<Option<u64>, ::redb::Error> {
        let reading = database.begin_read()?;
        match reading.open_table(META) {
            Ok(meta) => Ok(meta.get(FORMAT_KEY)?.map(|version| version.value())),
            Err(::redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn make_tables(&self, database: &Database) -> Result<(), OpenError> {
        let make = || -> Result<bool, ::redb::Error> {
            let mut writing = database.begin_write()?;
            writing.set_quick_repair(true);
            if writing.list_tables()?.next().is_some() {
                return Ok(false);
            }
            writing.open_table(META)?.insert(FORMAT_KEY, FORMAT)?;
            writing.open_table(ENTRIES)?;
            writing.open_table(CONVERSATIONS)?;
            writing.open_table(BY_SEQ)?;
            writing.open_table(STREAMS)?;
            writing.open_table(IDS)?;
            writing.open_table(DELIVERED)?;
            writing.open_table(SESSIONS)?;
            writing.commit()?;
            Ok(true)
        };
        if !make().map_err(|error| self.unreadable(&error))? {
            let reason = "it has tables but says no format version".to_owned();
            return Err(OpenError::Corrupt { file: self.file(), reason });
        }
        // A new file's name is on disk only once its folder is, and the folder's own name only once its parent is.
        for folder in [Some(self.folder.as_path()), self.folder.parent()].into_iter().flatten() {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
            synced.map_err(|error| OpenError::Io { file: self.file(), reason: error.to_string() })?;
        }
        Ok(())
    }

    fn unreadable(&self, error: &::redb::Error) -> OpenError {
        let reason = error.to_string();
        match error {
            ::redb::Error::Io(_) | ::redb::Error::PreviousIo | ::redb::Error::Backend(_) => {
                OpenError::Io { file: self.file(), reason }
            }
            _ => OpenError::Corrupt { file: self.file(), reason },
        }
    }

    /// Notes this process as the file's holder. Only a hint for people, so failing to is no failure.
    pub(super) fn say_who_holds_it(&self) {
        if let Err(error) = fs::write(self.folder.join(HOLDER_FILE_NAME), std::process::id().to_string()) {
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

/// The position of the last entry on disk.
pub(super) fn last_position(database: &Database) -> Result<Position, ::redb::Error> {
    let entries = database.begin_read()?.open_table(ENTRIES)?;
    Ok(entries.last()?.map_or(Position::default(), |(position, _)| Position(position.value())))
}
