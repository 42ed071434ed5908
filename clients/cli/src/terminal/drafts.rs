//! Drafts between two runs: a file of JSON, readable by its owner alone.
//!
//! Invariant: the file is whole whenever this ends; a crash costs what was written since it was kept last.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use chat_client::UserId;

/// What is being written, by whom it is for.
pub(super) type Drafts = BTreeMap<UserId, String>;

/// Where drafts are kept. One process at a time; the outbox of the same device sees to that.
#[derive(Debug)]
pub(super) struct DraftsFile {
    path: PathBuf,
    kept: Drafts,
}

impl DraftsFile {
    /// With what an earlier run kept; without a file that is nothing.
    pub(super) fn open(path: &Path) -> std::io::Result<Self> {
        let kept = match std::fs::read(path) {
            Ok(json) => serde_json::from_slice(&json)?,
            Err(error) if error.kind() == ErrorKind::NotFound => Drafts::new(),
            Err(error) => return Err(error),
        };
        Ok(Self { path: path.to_owned(), kept })
    }

    pub(super) fn kept(&self) -> &Drafts {
        &self.kept
    }

    /// Keeps these and no others.
    pub(super) fn keep(&mut self, drafts: Drafts) -> std::io::Result<()> {
        if drafts == self.kept {
            return Ok(());
        }
        if let Some(folder) = self.path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        // The new file takes the old one's place when it is complete.
        let new_path = self.path.with_added_extension("new");
        let mut new = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new_path)?;
        new.write_all(&serde_json::to_vec(&drafts)?)?;
        new.sync_data()?;
        std::fs::rename(&new_path, &self.path)?;
        self.kept = drafts;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn drafts_survive() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made/drafts");
        let mut file = DraftsFile::open(&path).unwrap();
        file.keep(Drafts::new()).unwrap();
        assert!(!path.exists(), "nothing to keep");
        let drafts = Drafts::from([(UserId::parse("bob").unwrap(), "one\n\"two\"".to_owned())]);
        file.keep(drafts.clone()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut file = DraftsFile::open(&path).unwrap();
        assert_eq!(*file.kept(), drafts);
        file.keep(Drafts::new()).unwrap();
        assert!(DraftsFile::open(&path).unwrap().kept().is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("drafts");
        std::fs::write(&path, "no JSON").unwrap();
        assert!(DraftsFile::open(&path).is_err());
    }
}
