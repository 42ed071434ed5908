//! Disks for tests: one that fails as disks do, and one that remembers what was written when, for power cuts.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use ::redb::backends::FileBackend;
use ::redb::{BackendError, StorageBackend};
use parking_lot::{Condvar, Mutex};

/// What happens on the way to a real file.
pub(super) trait Disk: Send + Sync + std::fmt::Debug {
    fn write(&self, path: &Path, offset: u64, bytes: &[u8], write: &dyn Fn() -> io::Result<()>) -> io::Result<()>;
    fn set_len(&self, path: &Path, len: u64, set_len: &dyn Fn() -> io::Result<()>) -> io::Result<()>;
    fn sync(&self, path: &Path, sync: &dyn Fn() -> io::Result<()>) -> io::Result<()>;
}

/// A real file behind a [`Disk`].
#[derive(Debug)]
pub(super) struct File {
    file: FileBackend,
    path: PathBuf,
    disk: Arc<dyn Disk>,
}

impl File {
    pub(super) fn open(path: &Path, disk: &Arc<dyn Disk>) -> Self {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        Self { file: FileBackend::new(file).unwrap(), path: path.to_owned(), disk: Arc::clone(disk) }
    }
}

impl StorageBackend for File {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.set_len(&self.path, len, &|| self.file.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.disk.sync(&self.path, &|| self.file.sync_data())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk.write(&self.path, offset, bytes, &|| self.file.write(offset, bytes))
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }
}

/// A disk for some files. As on a real one, what was written once can be written over when the disk is full.
#[derive(Debug)]
pub(super) struct FaultyDisk {
    blocks: Mutex<Blocks>,
    pub(super) sync_fails: AtomicBool,
    pub(super) broken: AtomicBool,
    /// Writes to this one fail.
    pub(super) broken_file: Mutex<Option<PathBuf>>,
    /// Writes and syncs that still succeed; all later ones fail.
    pub(super) succeed: AtomicI64,
    stalled: Mutex<Stalled>,
    /// Of what is stalled, or waits.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Stalled {
    all: bool,
    file: Option<PathBuf>,
    waiting: usize,
    fails: bool,
}

#[derive(Debug, Default)]
struct Blocks {
    used: HashSet<(PathBuf, u64)>,
    /// `None` is no limit.
    free: Option<usize>,
}

const BLOCK_BYTES: u64 = 4_096;

impl Default for FaultyDisk {
    fn default() -> Self {
        Self {
            blocks: Mutex::default(),
            sync_fails: AtomicBool::default(),
            broken: AtomicBool::default(),
            broken_file: Mutex::default(),
            succeed: AtomicI64::new(i64::MAX),
            stalled: Mutex::default(),
            changed: Condvar::new(),
        }
    }
}

impl FaultyDisk {
    pub(super) fn leave_free(&self, blocks: Option<usize>) {
        self.blocks.lock().free = blocks;
    }

    /// From now on syncs wait, or wait no longer.
    pub(super) fn stall(&self, stalled: bool) {
        self.stalled.lock().all = stalled;
        self.changed.notify_all();
    }

    /// From now on syncs of this file wait, or none does.
    pub(super) fn stall_file(&self, file: Option<PathBuf>) {
        self.stalled.lock().file = file;
        self.changed.notify_all();
    }

    /// Returns when a sync waits.
    pub(super) fn wait_for_a_stall(&self) {
        self.changed.wait_while(&mut self.stalled.lock(), |stalled| stalled.waiting == 0);
    }

    /// What waits now finds that the disk has failed.
    pub(super) fn fail_stalled(&self) {
        self.stalled.lock().fails = true;
    }

    fn count(&self) -> io::Result<()> {
        if self.succeed.fetch_sub(1, Ordering::SeqCst) <= 0 {
            return Err(io::Error::other("the disk has failed"));
        }
        Ok(())
    }
}

impl Disk for FaultyDisk {
    fn write(&self, path: &Path, offset: u64, bytes: &[u8], write: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        let is_broken = self.broken_file.lock().as_deref() == Some(path);
        if is_broken || self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("the disk is gone"));
        }
        self.count()?;
        let mut blocks = self.blocks.lock();
        for block in offset / BLOCK_BYTES..(offset + bytes.len() as u64).div_ceil(BLOCK_BYTES) {
            let block = (path.to_owned(), block);
            if blocks.used.contains(&block) {
                continue;
            }
            blocks.free = match blocks.free {
                Some(0) => return Err(io::ErrorKind::StorageFull.into()),
                free => free.map(|free| free - 1),
            };
            blocks.used.insert(block);
        }
        drop(blocks);
        write()
    }

    fn set_len(&self, _: &Path, _: u64, set_len: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        set_len()
    }

    fn sync(&self, path: &Path, sync: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        if self.sync_fails.load(Ordering::SeqCst) {
            return Err(io::Error::other("the disk does not sync"));
        }
        self.count()?;
        let mut stalled = self.stalled.lock();
        let waits = |stalled: &mut Stalled| stalled.all || stalled.file.as_deref() == Some(path);
        if waits(&mut stalled) {
            stalled.waiting += 1;
            self.changed.notify_all();
            self.changed.wait_while(&mut stalled, waits);
            stalled.waiting -= 1;
            if stalled.fails {
                return Err(io::Error::other("the disk has failed"));
            }
        }
        drop(stalled);
        sync()
    }
}

/// What was done to a file.
#[derive(Clone, Debug)]
pub(super) enum Operation {
    Write { offset: u64, bytes: Vec<u8> },
    SetLen(u64),
    Sync,
}

/// A disk that works, and remembers everything in its order, over all files.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    operations: Mutex<Vec<(PathBuf, Operation)>>,
}

impl Recorder {
    /// Operations so far.
    pub(super) fn len(&self) -> usize {
        self.operations.lock().len()
    }

    pub(super) fn operations(&self) -> Vec<(PathBuf, Operation)> {
        self.operations.lock().clone()
    }

    /// A file that is there already.
    pub(super) fn begin_with(&self, path: &Path, bytes: Vec<u8>) {
        let len = bytes.len() as u64;
        let whole = [Operation::SetLen(len), Operation::Write { offset: 0, bytes }, Operation::Sync];
        self.operations.lock().extend(whole.into_iter().map(|operation| (path.to_owned(), operation)));
    }

    fn remember(&self, path: &Path, operation: Operation, operate: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        let mut operations = self.operations.lock();
        operate()?;
        operations.push((path.to_owned(), operation));
        Ok(())
    }
}

impl Disk for Recorder {
    fn write(&self, path: &Path, offset: u64, bytes: &[u8], write: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        self.remember(path, Operation::Write { offset, bytes: bytes.to_vec() }, write)
    }

    fn set_len(&self, path: &Path, len: u64, set_len: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        self.remember(path, Operation::SetLen(len), set_len)
    }

    fn sync(&self, path: &Path, _: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        // What a sync means is decided when the power is cut.
        self.remember(path, Operation::Sync, &|| Ok(()))
    }
}
