//! Where messages wait until they are stored on the server, so that a crash or a restart loses none.
//!
//! A message goes in, with the id that it keeps, before it is published for the first time, and comes out when the server has stored or refused
//! it. Whatever is in an outbox when a client starts is published again under the same ids: the server stores each once.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use chat_protocol::{MessageId, Timestamp, UserId};
use serde::{Deserialize, Serialize};

use crate::error::OutboxError;

/// Lines of messages that are gone before the file is written anew.
const GONE_LINES_MAX: usize = 1_000;

/// A message that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsent {
    /// Its id, for ever.
    pub id: MessageId,
    /// To whom it is.
    pub to: UserId,
    /// What it says.
    pub text: String,
    /// When it was put in, by this machine's clock.
    pub queued_at: Timestamp,
}

/// An unsent message's name: ids count within a conversation, as on the server.
pub(crate) type Key = (UserId, MessageId);

impl Unsent {
    pub(crate) fn key(&self) -> Key {
        (self.to.clone(), self.id.clone())
    }
}

/// What changes in an outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// This waits, behind all others.
    Add(Unsent),
    /// The message to `to` that has this id does not wait any more. Forgetting it costs a needless resend and nothing else.
    Remove {
        /// To whom it was: others may be sent messages of the same id.
        to: UserId,
        /// Its id.
        id: MessageId,
    },
}

/// Keeps messages until they are stored on the server. Called from a thread that may block, never by two at once.
pub trait Outbox: Send + 'static {
    /// All that waits, in the order in which it was added. Called once, before anything else.
    ///
    /// # Errors
    /// If it cannot be read: the client does not start then.
    fn load(&mut self) -> Result<Vec<Unsent>, OutboxError>;

    /// Carries out changes, in their order. What was added is safe when this returns.
    ///
    /// # Errors
    /// If it cannot be written: then none of what was to be added is sent.
    fn apply(&mut self, changes: &[Change]) -> Result<(), OutboxError>;
}

/// Forgets everything when the program ends. The default.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryOutbox;

impl Outbox for MemoryOutbox {
    fn load(&mut self) -> Result<Vec<Unsent>, OutboxError> {
        Ok(Vec::new())
    }

    fn apply(&mut self, _: &[Change]) -> Result<(), OutboxError> {
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
enum Line {
    Add(Unsent),
    Remove { to: UserId, id: MessageId },
}

/// A file of JSON lines, readable by its owner alone. One process at a time: a second one is refused.
#[derive(Debug)]
pub struct FileOutbox {
    path: PathBuf,
    file: File,
    /// Held as long as this is.
    lock: File,
    waiting: Vec<Unsent>,
    gone_lines: usize,
}

impl FileOutbox {
    /// Opens a file, or makes it with its folders. A last line that was cut off by a crash is taken away: its message was never promised to
    /// anybody.
    ///
    /// # Errors
    /// [`OutboxError::InUse`] if another process has it open; [`OutboxError::Damaged`] if it is something else than an outbox.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, OutboxError> {
        let path = path.into();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
        }
        let lock_path = path.with_added_extension("lock");
        let lock = private(OpenOptions::new().create(true).truncate(false).write(true))
            .open(&lock_path)
            .map_err(|error| failed(&lock_path, &error))?;
        lock.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => OutboxError::InUse(path.display().to_string()),
            std::fs::TryLockError::Error(error) => failed(&lock_path, &error),
        })?;
        let file = private(OpenOptions::new().create(true).read(true).append(true))
            .open(&path)
            .map_err(|error| failed(&path, &error))?;
        // A file that a crash takes out of its folder keeps nothing.
        sync_folder(&path);
        let mut outbox = Self { path, file, lock, waiting: Vec::new(), gone_lines: 0 };
        outbox.read()?;
        Ok(outbox)
    }

    fn read(&mut self) -> Result<(), OutboxError> {
        let mut reader = BufReader::new(&self.file);
        let (mut whole_bytes, mut number) = (0, 0);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(|error| failed(&self.path, &error))?;
            if line.last() != Some(&b'\n') {
                break;
            }
            number += 1;
            whole_bytes += read as u64;
            let damaged =
                |problem: String| OutboxError::Damaged { path: self.path.display().to_string(), line: number, problem };
            match serde_json::from_slice(&line).map_err(|error| damaged(error.to_string()))? {
                Line::Add(unsent) => self.waiting.push(unsent),
                Line::Remove { to, id } => {
                    self.waiting.retain(|unsent| unsent.to != to || unsent.id != id);
                    self.gone_lines += 2;
                }
            }
        }
        self.file.set_len(whole_bytes).map_err(|error| failed(&self.path, &error))
    }

    fn write(&mut self, changes: &[Change]) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        let mut adds = false;
        for change in changes {
            let line = match change {
                Change::Add(unsent) => {
                    adds = true;
                    Line::Add(unsent.clone())
                }
                Change::Remove { to, id } => Line::Remove { to: to.clone(), id: id.clone() },
            };
            serde_json::to_writer(&mut bytes, &line)?;
            bytes.push(b'\n');
        }
        let before = self.file.metadata()?.len();
        let written = self.file.write_all(&bytes).and_then(|()| if adds { self.file.sync_data() } else { Ok(()) });
        if written.is_err() {
            // Half of a line would swallow the next one.
            self.file.set_len(before)?;
        }
        written
    }

    /// Only what waits, in a new file that takes the old one's place when it is safe. Until then the old one is as good.
    fn write_anew(&mut self) -> std::io::Result<()> {
        let new_path = self.path.with_added_extension("new");
        let mut bytes = Vec::new();
        for unsent in &self.waiting {
            serde_json::to_writer(&mut bytes, &Line::Add(unsent.clone()))?;
            bytes.push(b'\n');
        }
        let mut file = private(OpenOptions::new().create(true).read(true).append(true)).open(&new_path)?;
        // Of a time before.
        file.set_len(0)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&new_path, &self.path)?;
        self.file = file;
        sync_folder(&self.path);
        Ok(())
    }
}

impl Drop for FileOutbox {
    /// Closing it would do, if no process that this one is just starting had it open for a moment longer.
    fn drop(&mut self) {
        self.lock.unlock().ok();
    }
}

impl Outbox for FileOutbox {
    fn load(&mut self) -> Result<Vec<Unsent>, OutboxError> {
        Ok(self.waiting.clone())
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), OutboxError> {
        self.write(changes).map_err(|error| failed(&self.path, &error))?;
        let mut gone = HashSet::new();
        for change in changes {
            match change {
                Change::Add(unsent) => self.waiting.push(unsent.clone()),
                Change::Remove { to, id } => {
                    gone.insert((to, id));
                    self.gone_lines += 2;
                }
            }
        }
        self.waiting.retain(|unsent| !gone.contains(&(&unsent.to, &unsent.id)));
        if self.gone_lines > GONE_LINES_MAX && self.gone_lines > self.waiting.len() {
            // All is safe where it is: what fails here is room, and is tried again after as many lines more.
            if let Err(error) = self.write_anew() {
                tracing::warn!(path = %self.path.display(), %error, "the outbox could not be written anew");
            }
            self.gone_lines = 0;
        }
        Ok(())
    }
}

/// Makes the name of a file safe in its folder. Where the file system cannot, there is nothing better.
fn sync_folder(path: &Path) {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).ok();
}

fn failed(path: &Path, error: &std::io::Error) -> OutboxError {
    OutboxError::File { path: path.display().to_string(), problem: error.to_string() }
}

/// What others on this machine must not read.
fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unsent(id: &str) -> Unsent {
        Unsent {
            id: MessageId::parse(id).unwrap(),
            to: UserId::parse("bob").unwrap(),
            text: format!("line one\nof {id}"),
            queued_at: Timestamp::from_ms(1),
        }
    }

    fn add(id: &str) -> Change {
        Change::Add(unsent(id))
    }

    fn remove(id: &str) -> Change {
        Change::Remove { to: UserId::parse("bob").unwrap(), id: MessageId::parse(id).unwrap() }
    }

    fn ids(outbox: &mut FileOutbox) -> Vec<String> {
        outbox.load().unwrap().into_iter().map(|unsent| unsent.id.to_string()).collect()
    }

    #[test]
    fn what_waits_survives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made/outbox");
        let mut outbox = FileOutbox::open(&path).unwrap();
        outbox.apply(&[add("a"), add("b")]).unwrap();
        outbox.apply(&[remove("a"), add("c")]).unwrap();
        drop(outbox);
        let mut outbox = FileOutbox::open(&path).unwrap();
        assert_eq!(ids(&mut outbox), ["b", "c"]);
        assert_eq!(outbox.load().unwrap()[0], unsent("b"));
    }

    /// A bot answers two people under the same number.
    #[test]
    fn ids_count_within_a_conversation() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outbox");
        let to_carol = Unsent { to: UserId::parse("carol").unwrap(), ..unsent("a") };
        let mut outbox = FileOutbox::open(&path).unwrap();
        outbox.apply(&[add("a"), Change::Add(to_carol.clone())]).unwrap();
        outbox.apply(&[remove("a")]).unwrap();
        let rest = vec![to_carol];
        assert_eq!(outbox.load().unwrap(), rest);
        drop(outbox);
        assert_eq!(FileOutbox::open(&path).unwrap().load().unwrap(), rest);
    }

    #[test]
    fn a_line_that_was_cut_off_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outbox");
        FileOutbox::open(&path).unwrap().apply(&[add("a"), add("b")]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let whole = bytes[..length].iter().filter(|byte| **byte == b'\n').count();
            let mut outbox = FileOutbox::open(&path).unwrap();
            assert_eq!(ids(&mut outbox), ["a", "b"][..whole]);
            outbox.apply(&[add("c")]).unwrap();
            drop(outbox);
            assert_eq!(ids(&mut FileOutbox::open(&path).unwrap()).last().unwrap(), "c");
        }
    }

    #[test]
    fn damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outbox");
        FileOutbox::open(&path).unwrap().apply(&[add("a")]).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend(b"not json\n");
        std::fs::write(&path, &bytes).unwrap();
        let error = FileOutbox::open(&path).unwrap_err();
        assert!(matches!(error, OutboxError::Damaged { line: 2, .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn a_second_process_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outbox");
        let _first = FileOutbox::open(&path).unwrap();
        assert!(matches!(FileOutbox::open(&path), Err(OutboxError::InUse(_))));
    }

    #[test]
    fn room_is_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outbox");
        let mut outbox = FileOutbox::open(&path).unwrap();
        outbox.apply(&[add("first")]).unwrap();
        for number in 0..3_000 {
            outbox.apply(&[add(&format!("m-{number}")), remove(&format!("m-{number}"))]).unwrap();
        }
        assert!(std::fs::metadata(&path).unwrap().len() < 400_000);
        outbox.apply(&[add("last")]).unwrap();
        drop(outbox);
        assert_eq!(ids(&mut FileOutbox::open(&path).unwrap()), ["first", "last"]);
    }

    /// What cannot be written anew, for want of room or of a right, is still what it was.
    #[test]
    fn no_room_for_a_new_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outbox");
        // In its place nothing can be written.
        std::fs::create_dir(folder.path().join("outbox.new")).unwrap();
        let mut outbox = FileOutbox::open(&path).unwrap();
        for number in 0..600 {
            outbox.apply(&[add(&format!("m-{number}")), remove(&format!("m-{number}"))]).unwrap();
        }
        outbox.apply(&[add("last")]).unwrap();
        drop(outbox);
        assert_eq!(ids(&mut FileOutbox::open(&path).unwrap()), ["last"]);
    }

    #[cfg(unix)]
    #[test]
    fn others_cannot_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outbox");
        let mut outbox = FileOutbox::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        outbox.write_anew().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
