//! The journal: where entries are on disk before they are in `log.redb`, so that an acknowledgement waits for one write and one sync.
//!
//! A commit of the log's file costs several; the writer makes one now and then, for all that the journal has by then (see [`super::writer`]).
//! Meanwhile that is set aside, and new records go behind it or before it. A record has the new entries of some batches, as a row has them, and
//! what was noted before, at a multiple of [`SECTOR_BYTES`]. Its checksum is keyed with the log's secret, so nobody who chooses texts can make
//! a torn record look whole. Records are never believed because of where they stand: whoever opens the log takes those that go on where its
//! file ends, and leaves those that the file has already. Invariants: a record is synced before the next is written, so one that is not
//! whole is the newest; nothing is overwritten before the file has it.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

use ::redb::StorageBackend;

use super::super::Position;
use super::key::Keys;

/// Records begin at multiples of it; so no sector has two of them.
const SECTOR_BYTES: usize = 512;
/// The file grows by so much, so that few syncs have to write its length, too.
const GROWTH_BYTES: u64 = 256 * 1024;
/// It goes on in a part of its length at least, while what it has is written to the log's file.
const ROOM_PART: u64 = 4;
const MAGIC: &[u8; 8] = b"chat-jn2";
const CHECKSUM_BYTES: usize = 16;
/// Magic, the header's checksum, the record's, position of the first entry, bytes of entries, and bytes of notes.
const HEADER_BYTES: usize = MAGIC.len() + 2 * CHECKSUM_BYTES + 8 + 4 + 4;
/// What the record's checksum is of, and behind it, what the header's is of.
const CHECKED_FROM: usize = MAGIC.len() + 2 * CHECKSUM_BYTES;
const HEADER_CHECKED_FROM: usize = MAGIC.len() + CHECKSUM_BYTES;

/// The journal of a log that is open.
#[derive(Debug)]
pub(super) struct Journal {
    file: Box<dyn StorageBackend>,
    keys: Keys,
    /// Where the records begin that are not set aside.
    begin: u64,
    /// Where the next record goes.
    end: u64,
    /// What the log's file is about to get.
    set_aside: Option<Range<u64>>,
    /// Of the file.
    length: u64,
    /// Up to here there may be something that was not overwritten.
    used: u64,
    length_max: u64,
    buffer: Vec<u8>,
    /// The last write failed, and it was said.
    failing: bool,
}

/// What became of a record.
#[derive(Debug)]
pub(super) enum Recorded {
    /// It is on disk.
    Stored,
    /// It is not, and whoever reads the journal will not find it: the log's file has to take the entries itself.
    NoRoom,
}

/// Entries that the journal has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) first: Position,
    /// As in a row that begins with `first`.
    pub(super) entries: Vec<u8>,
    /// What was noted before (see [`super::notes`]).
    pub(super) notes: Vec<u8>,
}

impl Record {
    fn bytes(&self) -> usize {
        HEADER_BYTES + self.entries.len() + self.notes.len()
    }
}

impl Journal {
    /// `found`: where the records are that the log's file does not have. They are set aside.
    pub(super) fn new(
        file: Box<dyn StorageBackend>,
        keys: Keys,
        found: Range<u64>,
        length_max: u64,
    ) -> io::Result<Self> {
        let length = file.len()?;
        // Where there is more room.
        let begin = if length_max.saturating_sub(found.end) >= found.start { found.end } else { 0 };
        let set_aside = (!found.is_empty()).then_some(found);
        let buffer = Vec::new();
        Ok(Self { file, keys, begin, end: begin, set_aside, length, used: length, length_max, buffer, failing: false })
    }

    /// Puts on disk what a start has found: whoever wrote it may have been killed before the sync, or the sync may have failed; then it is only in the
    /// system's memory, and no sync would write it if it were not written again. The same bytes in the same place: a crash takes nothing.
    pub(super) fn make_durable(&self) -> io::Result<()> {
        let Some(Range { start, end }) = self.set_aside.clone() else { return Ok(()) };
        // The last record's padding may be cut off.
        let end = end.min(self.length);
        let mut chunk = vec![0; usize::try_from(GROWTH_BYTES.min(end - start)).unwrap_or(SECTOR_BYTES)];
        let mut at = start;
        while at < end {
            let bytes = usize::try_from(end - at).unwrap_or(usize::MAX).min(chunk.len());
            self.file.read(at, &mut chunk[..bytes])?;
            self.file.write(at, &chunk[..bytes])?;
            at += bytes as u64;
        }
        self.file.sync_data()
    }

    /// Writes a record and syncs it. An error says that nobody knows what is on disk.
    pub(super) fn append(&mut self, first: Position, entries: &[u8], notes: &[u8]) -> io::Result<Recorded> {
        let bytes = (HEADER_BYTES + entries.len() + notes.len()).next_multiple_of(SECTOR_BYTES);
        let (Ok(entries_bytes), Ok(notes_bytes)) = (u32::try_from(entries.len()), u32::try_from(notes.len())) else {
            return Ok(Recorded::NoRoom);
        };
        let end = self.end + bytes as u64;
        if end > self.limit() || !self.grow(end) {
            return Ok(Recorded::NoRoom);
        }
        self.buffer.clear();
        self.buffer.extend_from_slice(MAGIC);
        self.buffer.extend_from_slice(&[0; 2 * CHECKSUM_BYTES]);
        self.buffer.extend_from_slice(&first.0.to_le_bytes());
        self.buffer.extend_from_slice(&entries_bytes.to_le_bytes());
        self.buffer.extend_from_slice(&notes_bytes.to_le_bytes());
        self.buffer.extend_from_slice(entries);
        self.buffer.extend_from_slice(notes);
        let checksum = self.keys.record_checksum(&self.buffer[CHECKED_FROM..]);
        self.buffer[HEADER_CHECKED_FROM..CHECKED_FROM].copy_from_slice(&checksum);
        let checksum = self.keys.header_checksum(&self.buffer[HEADER_CHECKED_FROM..HEADER_BYTES]);
        self.buffer[MAGIC.len()..HEADER_CHECKED_FROM].copy_from_slice(&checksum);
        self.used = self.used.max(end);
        if let Err(error) = self.file.write(self.end, &self.buffer)
            && !self.is_there()?
        {
            // What is there is not whole: up to the next record nothing is written behind it.
            self.say(&error);
            return Ok(Recorded::NoRoom);
        }
        self.file.sync_data()?;
        self.end = end;
        self.failing = false;
        Ok(Recorded::Stored)
    }

    /// Whether the record is there, though it could not be written: what is missing may be as it was before, zeros behind zeros.
    fn is_there(&self) -> io::Result<bool> {
        let mut found = vec![0; self.buffer.len()];
        self.file.read(self.end, &mut found)?;
        Ok(found == self.buffer)
    }

    /// Makes the file at least so long; `false` if it cannot be. What is added is written, because a sync of what has no place on the disk
    /// yet takes longer.
    fn grow(&mut self, length: u64) -> bool {
        if length <= self.length {
            return true;
        }
        let target = length.next_multiple_of(GROWTH_BYTES).min(self.length_max);
        match zero(&*self.file, self.length, target) {
            Ok(()) => {
                self.length = target;
                true
            }
            Err(error) => {
                self.say(&error);
                false
            }
        }
    }

    fn say(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!(%error, "the journal cannot be written: messages go to the log's file at once, which takes longer");
        }
    }

    /// Where the next record has to end.
    fn limit(&self) -> u64 {
        match &self.set_aside {
            Some(aside) if !aside.is_empty() && self.begin <= aside.start => aside.start.min(self.length_max),
            _ => self.length_max,
        }
    }

    /// Whether it is time to let the log's file have what it has, because its room fills.
    pub(super) fn is_half_full(&self) -> bool {
        self.end - self.begin >= self.limit().saturating_sub(self.begin) / 2
    }

    /// Whether [`Journal::set_aside`] can be called: nothing else is set aside, and there is room beside it.
    pub(super) fn can_set_aside(&self) -> bool {
        self.set_aside.is_none() && self.begin.max(self.length_max.saturating_sub(self.end)) > 0
    }

    /// What it has is what the log's file is about to get; new records go elsewhere.
    pub(super) fn set_aside(&mut self) {
        debug_assert!(self.set_aside.is_none(), "one commit after the other");
        let (before, behind) = (self.begin, self.length_max.saturating_sub(self.end));
        self.set_aside = Some(self.begin..self.end);
        // The file stays short, if there is room for more than what came last: more may come now.
        let goes_before = before >= behind || before >= (self.end - self.begin).max(self.length_max / ROOM_PART);
        self.begin = if goes_before { 0 } else { self.end };
        self.end = self.begin;
    }

    /// The log's file has what was set aside, on disk.
    pub(super) fn forget_set_aside(&mut self) {
        self.set_aside = None;
    }

    /// The log's file has everything, on disk.
    pub(super) fn begin_anew(&mut self) {
        self.set_aside = None;
        self.begin = 0;
        self.end = 0;
    }

    /// Overwrites what it had, and syncs; only after [`Journal::begin_anew`].
    pub(super) fn wipe(&mut self) -> io::Result<()> {
        debug_assert!(self.end == 0 && self.set_aside.is_none(), "nothing that it has is needed");
        if self.used > 0 {
            zero(&*self.file, 0, self.used)?;
            self.file.sync_data()?;
            self.used = 0;
        }
        Ok(())
    }
}

fn zero(file: &dyn StorageBackend, begin: u64, end: u64) -> io::Result<()> {
    let zeros = vec![0; usize::try_from(GROWTH_BYTES.min(end.saturating_sub(begin))).unwrap_or(SECTOR_BYTES)];
    let mut at = begin;
    while at < end {
        let bytes = usize::try_from(end - at).unwrap_or(usize::MAX).min(zeros.len());
        file.write(at, &zeros[..bytes])?;
        at += bytes as u64;
    }
    Ok(())
}

/// The records that go on from a position, in their order, and where they are in the file. What the log's file has already, what another log
/// wrote, and the rest of a record that was never acknowledged are left out. Nothing if there is no journal.
pub(super) fn read(path: &Path, keys: Keys, last: Position) -> io::Result<(Vec<Record>, Range<u64>)> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), 0..0)),
        read => read?,
    };
    let (mut records, mut found, mut begin) = (Vec::new(), 0..0, 0);
    while begin < bytes.len() {
        let Some(record) = record(&bytes[begin..], keys) else {
            begin += SECTOR_BYTES;
            continue;
        };
        let began = begin;
        // No record begins inside of a whole one.
        begin = (begin + record.bytes()).next_multiple_of(SECTOR_BYTES);
        if record.first > last {
            let start = if records.is_empty() { began as u64 } else { found.start };
            found = start..begin as u64;
            records.push(record);
        }
    }
    records.sort_by_key(|record| record.first);
    Ok((records, found))
}

/// The record at the beginning of these bytes, if it is whole and this log's.
fn record(bytes: &[u8], keys: Keys) -> Option<Record> {
    let header = bytes.first_chunk::<HEADER_BYTES>().filter(|header| header.starts_with(MAGIC))?;
    // Texts may look like headers of records that are megabytes long, one behind the other: who would check those could be kept for minutes.
    if header[MAGIC.len()..HEADER_CHECKED_FROM] != keys.header_checksum(&header[HEADER_CHECKED_FROM..]) {
        return None;
    }
    let (first, sizes) = header[CHECKED_FROM..].split_first_chunk::<8>()?;
    let (entries_bytes, notes_bytes) = sizes.split_first_chunk::<4>()?;
    let [entries_bytes, notes_bytes] =
        [entries_bytes, notes_bytes.first_chunk::<4>()?].map(|bytes| usize::try_from(u32::from_le_bytes(*bytes)).ok());
    let (entries, behind) = bytes[HEADER_BYTES..].split_at_checked(entries_bytes?)?;
    let notes = behind.get(..notes_bytes?)?;
    let checked = &bytes[CHECKED_FROM..HEADER_BYTES + entries.len() + notes.len()];
    (keys.record_checksum(checked) == header[HEADER_CHECKED_FROM..CHECKED_FROM]).then(|| Record {
        first: Position(u64::from_le_bytes(*first)),
        entries: entries.to_vec(),
        notes: notes.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use ::redb::backends::FileBackend;

    use super::*;

    const KEYS: (u64, u64) = (3, 4);
    const LENGTH_MAX: u64 = 8 * 1024;
    const NOTED: &[u8] = b"noted";

    struct OnDisk {
        folder: tempfile::TempDir,
    }

    impl OnDisk {
        fn new() -> Self {
            Self { folder: tempfile::tempdir().unwrap() }
        }

        fn path(&self) -> std::path::PathBuf {
            self.folder.path().join("journal")
        }

        fn open(&self, found: Range<u64>) -> Journal {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(self.path());
            let file = FileBackend::new(file.unwrap()).unwrap();
            Journal::new(Box::new(file), Keys::new(KEYS), found, LENGTH_MAX).unwrap()
        }

        fn read(&self, last: u64) -> Vec<(u64, Vec<u8>)> {
            let (records, _) = read(&self.path(), Keys::new(KEYS), Position(last)).unwrap();
            let taken = |record: Record| {
                assert_eq!(record.notes, NOTED);
                (record.first.0, record.entries)
            };
            records.into_iter().map(taken).collect()
        }
    }

    fn stored(journal: &mut Journal, first: u64, entries: &[u8]) -> bool {
        matches!(journal.append(Position(first), entries, NOTED).unwrap(), Recorded::Stored)
    }

    #[test]
    fn what_is_behind_the_file_comes_back_in_order() {
        let disk = OnDisk::new();
        assert_eq!(disk.read(0), [], "no journal");
        let mut journal = disk.open(0..0);
        assert!(stored(&mut journal, 1, b"one"));
        assert!(stored(&mut journal, 2, &[7; 1_000]));
        let both = [(1, b"one".to_vec()), (2, vec![7; 1_000])];
        assert_eq!(disk.read(0), both);
        assert_eq!(disk.read(1), both[1..]);
        journal.begin_anew();
        assert!(stored(&mut journal, 3, b"three"));
        assert_eq!(disk.read(2), [(3, b"three".to_vec())], "what is older and stands behind it is not taken for newer");
        assert_eq!(read(&disk.path(), Keys::new((3, 5)), Position(0)).unwrap(), (vec![], 0..0), "another log's");
    }

    #[test]
    fn it_goes_on_behind_the_last_record() {
        let disk = OnDisk::new();
        assert!(stored(&mut disk.open(0..0), 1, &[1; 600]));
        let (_, found) = read(&disk.path(), Keys::new(KEYS), Position(0)).unwrap();
        assert_eq!(found, 0..1_024);
        assert!(stored(&mut disk.open(found.clone()), 2, b"two"));
        assert_eq!(disk.read(0), [(1, vec![1; 600]), (2, b"two".to_vec())]);
    }

    #[test]
    fn it_takes_no_more_than_it_has_room_for() {
        let disk = OnDisk::new();
        let mut journal = disk.open(0..0);
        let most = usize::try_from(LENGTH_MAX).unwrap() - HEADER_BYTES - NOTED.len();
        assert!(!stored(&mut journal, 1, &vec![1; most + 1]));
        assert!(stored(&mut journal, 1, &vec![1; most]));
        assert!(!stored(&mut journal, 2, b""));
        journal.begin_anew();
        assert!(stored(&mut journal, 2, b""));
        assert_eq!(fs::metadata(disk.path()).unwrap().len(), LENGTH_MAX);
    }

    #[test]
    fn nothing_is_overwritten_before_the_file_has_it() {
        let disk = OnDisk::new();
        let mut journal = disk.open(0..0);
        let (mut first, mut last_in_file) = (0, 0);
        let mut grew = 0;
        for round in 0..40 {
            // Records of one sector and of two, in segments of different lengths; one in three gets no room, and comes again.
            let mut segment_ends = 0;
            for _ in 0..=round % 5 {
                first += 1;
                if !stored(&mut journal, first, &vec![7; 300 + 300 * (round % 2)]) {
                    first -= 1;
                    break;
                }
                segment_ends = first;
            }
            assert!(segment_ends > 0 && journal.can_set_aside(), "{journal:?}");
            journal.set_aside();
            assert!(!journal.can_set_aside());
            // While the file gets them.
            let begun = first;
            for _ in 0..1 + round % 3 {
                first += 1;
                if !stored(&mut journal, first, b"more") {
                    first -= 1;
                    break;
                }
            }
            assert!(first > begun, "there is room beside what is set aside");
            let found: Vec<u64> = disk.read(last_in_file).into_iter().map(|(first, _)| first).collect();
            assert_eq!(found, (last_in_file + 1..=first).collect::<Vec<_>>());
            // Whoever opens it goes on elsewhere.
            let (_, extent) = read(&disk.path(), Keys::new(KEYS), Position(last_in_file)).unwrap();
            let copy = fs::read(disk.path()).unwrap();
            let mut opened = disk.open(extent);
            if stored(&mut opened, first + 1, b"after a start") {
                assert_eq!(disk.read(last_in_file).len(), found.len() + 1);
            }
            fs::write(disk.path(), copy).unwrap();
            journal.forget_set_aside();
            last_in_file = begun;
            grew = grew.max(fs::metadata(disk.path()).unwrap().len());
        }
        assert_eq!(grew, LENGTH_MAX);
    }

    #[test]
    fn a_record_that_is_not_whole_is_none() {
        let disk = OnDisk::new();
        let entries: Vec<u8> = (0..1_500_u32).map(|n| n.to_le_bytes()[0]).collect();
        assert!(stored(&mut disk.open(0..0), 1, &entries));
        let whole = fs::read(disk.path()).unwrap();
        let used = (HEADER_BYTES + entries.len() + NOTED.len()).next_multiple_of(SECTOR_BYTES);
        for sector in (0..used).step_by(SECTOR_BYTES) {
            let mut torn = whole.clone();
            torn[sector..sector + SECTOR_BYTES].fill(0);
            fs::write(disk.path(), torn).unwrap();
            assert_eq!(disk.read(0), [], "without the sector at {sector}");
        }
        for length in 0..HEADER_BYTES + entries.len() + NOTED.len() {
            fs::write(disk.path(), &whole[..length]).unwrap();
            assert_eq!(disk.read(0), [], "cut at {length}");
        }
    }

    #[test]
    fn what_was_found_is_written_again() {
        let disk = OnDisk::new();
        assert!(stored(&mut disk.open(0..0), 1, &[1; 600]));
        let whole = fs::read(disk.path()).unwrap();
        disk.open(0..1_024).make_durable().unwrap();
        assert_eq!(fs::read(disk.path()).unwrap(), whole);
        // Without the last record's padding.
        fs::write(disk.path(), &whole[..HEADER_BYTES + 600 + NOTED.len()]).unwrap();
        let (records, found) = read(&disk.path(), Keys::new(KEYS), Position(0)).unwrap();
        assert_eq!((records.len(), &found), (1, &(0..1_024)));
        disk.open(found.clone()).make_durable().unwrap();
        assert!(stored(&mut disk.open(found.clone()), 2, b"two"));
        assert_eq!(disk.read(0), [(1, vec![1; 600]), (2, b"two".to_vec())]);
    }

    #[test]
    fn a_text_that_looks_like_records_is_none() {
        let disk = OnDisk::new();
        let mut text = vec![b'x'; 3 * SECTOR_BYTES];
        for begin in (SECTOR_BYTES - HEADER_BYTES..text.len() - MAGIC.len()).step_by(SECTOR_BYTES) {
            text[begin..begin + MAGIC.len()].copy_from_slice(MAGIC);
        }
        let mut journal = disk.open(0..0);
        assert!(stored(&mut journal, 1, &text));
        assert!(stored(&mut journal, 2, b"two"));
        let after = [(2, b"two".to_vec())];
        assert_eq!((disk.read(0).len(), disk.read(1)), (2, after.to_vec()));
        // Nor is one in what is left of its record.
        journal.begin_anew();
        assert!(stored(&mut journal, 3, b"three"));
        assert_eq!(disk.read(1), [(2, b"two".to_vec()), (3, b"three".to_vec())]);
    }

    /// To check each as if it were a record would be to read the rest of the file as often.
    #[test]
    fn texts_that_look_like_headers_are_not_checked_as_records() {
        let disk = OnDisk::new();
        assert!(stored(&mut disk.open(0..0), 1, b"one"));
        let whole = fs::read(disk.path()).unwrap();
        // 16 MiB of headers, each of a record up to the file's end: 256 GiB to hash.
        let bytes = 16 * 1024 * 1024;
        let mut file = whole[..SECTOR_BYTES].to_vec();
        let mut header = [0; SECTOR_BYTES];
        header[..HEADER_BYTES].copy_from_slice(&whole[..HEADER_BYTES]);
        while file.len() < bytes {
            let rest = u32::try_from(bytes - file.len() - HEADER_BYTES).unwrap();
            header[HEADER_BYTES - 8..HEADER_BYTES - 4].copy_from_slice(&rest.to_le_bytes());
            header[HEADER_BYTES - 4..HEADER_BYTES].fill(0);
            file.extend_from_slice(&header);
        }
        fs::write(disk.path(), file).unwrap();
        let (done, found) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(disk.read(0)));
        let found = found.recv_timeout(std::time::Duration::from_secs(60)).expect("a start is not kept busy");
        assert_eq!(found, [(1, b"one".to_vec())]);
    }

    /// A file that may not be longer than this (`RLIMIT_FSIZE`), and once was.
    #[derive(Debug)]
    struct Limited(FileBackend, u64);

    impl StorageBackend for Limited {
        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.0.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.0.sync_data()
        }

        fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            let room = usize::try_from(self.1.saturating_sub(offset)).unwrap();
            self.0.write(offset, &bytes[..bytes.len().min(room)])?;
            if bytes.len() > room { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(()) }
        }
    }

    #[test]
    fn what_is_refused_is_not_found() {
        for limit in 0..600 {
            let disk = OnDisk::new();
            fs::write(disk.path(), vec![0; 1_024]).unwrap();
            let file = OpenOptions::new().read(true).write(true).open(disk.path()).unwrap();
            let file = Limited(FileBackend::new(file).unwrap(), limit);
            let mut journal = Journal::new(Box::new(file), Keys::new(KEYS), 0..0, LENGTH_MAX).unwrap();
            let is_stored = stored(&mut journal, 1, &[7; 500]);
            assert_eq!(disk.read(0).len(), usize::from(is_stored), "{limit}");
        }
    }

    /// What a write that fails leaves out may be there already: zeros behind zeros, or what was there before.
    #[test]
    fn what_is_refused_is_not_found_whatever_was_there_before() {
        let entries = [7; 400];
        for before in [0, 9] {
            for notes in [[0; 100], [9; 100]] {
                for limit in 0..600 {
                    let disk = OnDisk::new();
                    fs::write(disk.path(), vec![before; 1_024]).unwrap();
                    let file = OpenOptions::new().read(true).write(true).open(disk.path()).unwrap();
                    let file = Limited(FileBackend::new(file).unwrap(), limit);
                    let mut journal = Journal::new(Box::new(file), Keys::new(KEYS), 0..0, LENGTH_MAX).unwrap();
                    let is_stored = matches!(journal.append(Position(1), &entries, &notes).unwrap(), Recorded::Stored);
                    let (found, _) = read(&disk.path(), Keys::new(KEYS), Position(0)).unwrap();
                    assert_eq!(found.len(), usize::from(is_stored), "{limit}");
                }
            }
        }
    }

    /// A commit that has nothing of the journal's to write keeps no message waiting.
    #[test]
    fn there_is_room_beside_nothing() {
        let disk = OnDisk::new();
        let mut journal = disk.open(0..0);
        journal.set_aside();
        assert!(stored(&mut journal, 1, b"one"));
        journal.forget_set_aside();
        journal.set_aside();
        assert!(stored(&mut journal, 2, &[7; 2_000]), "and not only as much as was written before");
        assert_eq!(disk.read(0).len(), 2);
    }

    /// Wherever it goes on, it says in time that the file has to get what it has.
    #[test]
    fn it_is_half_full_before_it_is_full() {
        let disk = OnDisk::new();
        let mut journal = disk.open(0..0);
        let mut first = 0;
        for segment in 0..20 {
            let mut records = 0;
            while !journal.is_half_full() {
                first += 1;
                records += 1;
                assert!(stored(&mut journal, first, &[7; 1_100]), "segment {segment}, record {records}");
            }
            journal.set_aside();
            for _ in 0..2 {
                first += 1;
                assert!(
                    stored(&mut journal, first, b"meanwhile"),
                    "segment {segment}: there is room beside what is set aside"
                );
            }
            journal.forget_set_aside();
        }
    }

    #[test]
    fn nothing_is_left_of_what_was_wiped() {
        let disk = OnDisk::new();
        let mut journal = disk.open(0..0);
        assert!(stored(&mut journal, 1, b"a word that was taken back"));
        journal.begin_anew();
        journal.wipe().unwrap();
        assert!(fs::read(disk.path()).unwrap().iter().all(|byte| *byte == 0));
        assert!(stored(&mut journal, 2, b"on"));
        assert_eq!(disk.read(1), [(2, b"on".to_vec())]);
    }
}
