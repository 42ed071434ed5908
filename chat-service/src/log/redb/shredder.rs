//! Words that were erased, on the disk itself.
//!
//! Erasing writes a row anew; the page that had it before is free, and keeps its bytes until it is used again. So whoever erases notes the
//! record that went (position, checksum, length), and the shredder looks for such records in the file and overwrites them. What it finds
//! cannot be in use: a record in use has another checksum. It writes only while nobody else can, and after two more commits, when not even the
//! commits before refer to those pages; and it does nothing while a backup reads an older state.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::redb::ReadableTable;
use rustc_hash::FxHashMap;

use super::super::Position;
use super::Shared;
use super::reader::ReadError;
use super::record::{self, HEADER_BYTES};
use super::schema::SHREDS;

/// Bytes of the file that are looked at together.
const CHUNK_BYTES: usize = 1 << 20;

/// A record that was replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shred {
    pub(super) position: Position,
    pub(super) checksum: u32,
    pub(super) length: u32,
}

impl Shred {
    /// Of a record as it stands in a row.
    pub(super) fn of(position: Position, record: &[u8]) -> Self {
        let checksum = record.get(1..HEADER_BYTES).and_then(|sum| sum.try_into().ok()).map_or(0, u32::from_le_bytes);
        Self { position, checksum, length: u32::try_from(record.len()).unwrap_or(u32::MAX) }
    }

    /// Whether these bytes are it.
    fn is(&self, bytes: &[u8]) -> bool {
        record::is_record(&self.position.0.to_be_bytes(), bytes)
    }
}

impl Shared {
    /// Overwrites what was erased. How many records were noted; 0 if there were none, or if it cannot be done now.
    pub(super) async fn shred(self: &Arc<Self>, file: &Path) -> Result<u64, String> {
        let shreds = self.noted_shreds().map_err(|error| error.to_string())?;
        if shreds.is_empty() {
            return Ok(0);
        }
        self.commit().await?;
        self.commit().await?;
        let (shared, path, wanted) = (Arc::clone(self), file.to_owned(), shreds.clone());
        let shredded = tokio::task::spawn_blocking(move || shared.overwrite(&path, &wanted)).await;
        if !shredded.map_err(|error| error.to_string())?? {
            return Ok(0);
        }
        self.forget_shreds(shreds.iter().map(|shred| shred.position).collect()).await?;
        Ok(shreds.len() as u64)
    }

    fn noted_shreds(&self) -> Result<Vec<Shred>, ReadError> {
        let mut shreds = Vec::new();
        for found in self.begin_read()?.open_table(SHREDS)?.iter()? {
            let (position, shred) = found?;
            let (checksum, length) = shred.value();
            shreds.push(Shred { position: Position(position.value()), checksum, length });
        }
        Ok(shreds)
    }

    /// `false` while a backup is made.
    fn overwrite(&self, path: &Path, shreds: &[Shred]) -> Result<bool, String> {
        let Some(_alone) = self.snapshots.try_write() else { return Ok(false) };
        let failed = |error: io::Error| format!("{}: {error}", path.display());
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let found = search(&file, shreds).map_err(failed)?;
        if found.is_empty() {
            return Ok(true);
        }
        let database = self.database.read();
        let database = database.as_ref().ok_or("the log is closed")?;
        // While it is there nobody else writes, so what is free stays free. It changes nothing itself.
        let excluding = database.begin_write().map_err(|error| error.to_string())?;
        for (offset, shred) in found {
            let mut bytes = vec![0; usize::try_from(shred.length).unwrap_or(usize::MAX)];
            file.read_exact_at(&mut bytes, offset).map_err(failed)?;
            // It may have been used again since it was found.
            if shred.is(&bytes) {
                bytes.fill(0);
                file.write_all_at(&bytes, offset).map_err(failed)?;
            }
        }
        file.sync_data().map_err(failed)?;
        excluding.abort().map_err(|error| error.to_string())?;
        Ok(true)
    }
}

/// Where the file has these records.
fn search(file: &File, shreds: &[Shred]) -> io::Result<Vec<(u64, Shred)>> {
    let wanted: FxHashMap<u32, Vec<Shred>> = shreds.iter().fold(FxHashMap::default(), |mut wanted, shred| {
        wanted.entry(shred.checksum).or_insert_with(Vec::new).push(*shred);
        wanted
    });
    let length = file.metadata()?.len();
    let mut chunk = vec![0; CHUNK_BYTES + HEADER_BYTES - 1];
    let mut record = Vec::new();
    let mut found = Vec::new();
    let mut begin = 0;
    while begin < length {
        let began = Instant::now();
        let bytes = usize::try_from(length - begin).unwrap_or(usize::MAX).min(chunk.len());
        let chunk = &mut chunk[..bytes];
        file.read_exact_at(chunk, begin)?;
        for (at, header) in chunk.windows(HEADER_BYTES).enumerate() {
            let checksum = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
            let Some(candidates) = wanted.get(&checksum) else { continue };
            let offset = begin + at as u64;
            for shred in candidates.iter().filter(|shred| offset + u64::from(shred.length) <= length) {
                record.resize(usize::try_from(shred.length).unwrap_or(usize::MAX), 0);
                file.read_exact_at(&mut record, offset)?;
                if shred.is(&record) {
                    found.push((offset, *shred));
                }
            }
        }
        begin += CHUNK_BYTES as u64;
        // Half of the disk's time is for others.
        std::thread::park_timeout(began.elapsed().min(Duration::from_millis(100)));
    }
    Ok(found)
}
