//! The log on disks that fail, and after the power was cut.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::disk::{Disk, FaultyDisk, Operation, Recorder};
use super::tests::{
    EVERYTHING, Reopened, SMALL, append, at, compare, inbox, message, phone, sent_at, steps, user, verified,
};
use super::*;
use crate::log::Side;

/// Random numbers that a seed repeats.
struct Dice(u64);

impl Dice {
    /// Says its seed, so that a failure can be repeated: `LOG_TEST_SEED` sets it.
    fn new() -> Self {
        let seed = std::env::var("LOG_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 0x9e37);
        println!("LOG_TEST_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % bound
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
}

const FILES: [&str; 3] = ["log.redb", "log.journal", "index.redb"];

/// In memory, where it is to be had: what a sync means is up to the test.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn open_on(folder: &Path, log: Option<Arc<dyn Disk>>, index: Option<Arc<dyn Disk>>) -> Result<RedbLog, OpenError> {
    let mut opener = Opener::new(folder, SMALL);
    opener.disk = log;
    opener.index_disk = index;
    RedbLog::start(opener)
}

/// What was promised at some moment.
#[derive(Clone, Copy, Debug, Default)]
struct Promise {
    /// So many operations were done.
    operations: usize,
    /// This position was acknowledged.
    acknowledged: u64,
    /// Bob's phone has a session with this cursor or a later one.
    cursor: Option<u64>,
    /// So many entries are removed, or more.
    removed: u64,
}

/// Texts of different lengths, so that rows fill, grow and overflow.
fn text(position: u64) -> String {
    format!("{position} ")
        .repeat(1 + usize::try_from(position * 7 % 13).unwrap() * if position.is_multiple_of(11) { 200 } else { 10 })
}

const MESSAGES: u64 = 60;
/// The last so many stay when old ones are removed.
const KEPT: u64 = 10;

/// Messages from alice to bob, by one, two and three, and a session of bob's; old ones are removed; what was promised after each step.
async fn script(log: &RedbLog, recorder: &Recorder, removes: bool) -> Vec<Promise> {
    let mut promises = vec![Promise::default()];
    let mut promise = Promise::default();
    while promise.acknowledged < MESSAGES {
        let from = promise.acknowledged + 1;
        let to = (from + promise.acknowledged % 3).min(MESSAGES);
        let batch: Vec<_> = (from..=to).map(|seq| message("alice", "bob", seq, &text(seq))).collect();
        if to % 4 < 2 {
            // While the file gets what the journal has.
            let (flushed, appended) = tokio::join!(log.flush(), append(log, batch));
            flushed.unwrap();
            appended.unwrap();
        } else {
            append(log, batch).await.unwrap();
        }
        promise = Promise { operations: recorder.len(), acknowledged: to, ..promise };
        promises.push(promise);
        if to % 5 == 0 {
            log.put_session(&phone(), at(to)).await.unwrap();
            promise = Promise { operations: recorder.len(), cursor: Some(to), ..promise };
            promises.push(promise);
        }
        if removes && to > KEPT && to % 4 == 0 {
            log.remove_before(sent_at(to - KEPT + 1)).await.unwrap();
            promise = Promise { operations: recorder.len(), removed: to - KEPT, ..promise };
            promises.push(promise);
        }
    }
    promises
}

/// What is on the disk if the power goes after so many operations: everything that was synced, and of the rest what chance would have.
fn image(
    operations: &[(PathBuf, Operation)],
    dice: &mut Dice,
    all_or_nothing: Option<bool>,
) -> BTreeMap<PathBuf, Vec<u8>> {
    const SECTOR: usize = 512;
    let mut synced: HashMap<&Path, usize> = HashMap::new();
    for (nth, (path, operation)) in operations.iter().enumerate() {
        if matches!(operation, Operation::Sync) {
            synced.insert(path, nth);
        }
    }
    let mut files: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    for (nth, (path, operation)) in operations.iter().enumerate() {
        let certain = synced.get(path.as_path()).is_some_and(|sync| nth < *sync);
        let file = files.entry(path.clone()).or_default();
        let happens = |dice: &mut Dice| certain || all_or_nothing.unwrap_or_else(|| dice.coin());
        match operation {
            Operation::Sync => {}
            Operation::SetLen(len) => {
                if happens(dice) {
                    file.resize(usize::try_from(*len).unwrap(), 0);
                }
            }
            Operation::Write { offset, bytes } => {
                // Torn: each sector for itself.
                for (sector, bytes) in bytes.chunks(SECTOR).enumerate() {
                    if happens(dice) {
                        let begin = usize::try_from(*offset).unwrap() + sector * SECTOR;
                        if file.len() < begin + bytes.len() {
                            file.resize(begin + bytes.len(), 0);
                        }
                        file[begin..begin + bytes.len()].copy_from_slice(bytes);
                    }
                }
            }
        }
    }
    files
}

fn put(files: &BTreeMap<PathBuf, Vec<u8>>, folder: &Path) {
    for name in FILES {
        fs::remove_file(folder.join(name)).unwrap_or(());
    }
    for (path, bytes) in files {
        fs::write(folder.join(path.file_name().unwrap()), bytes).unwrap();
    }
}

/// Everything promised is there, in order, and nothing that was never sent.
async fn check(log: &RedbLog, promise: Promise, what: &str) -> u64 {
    let head = log.head().0;
    assert!((promise.acknowledged..=MESSAGES).contains(&head), "{what}: {promise:?}, head {head}");
    let removed = log.first().0 - 1;
    assert!(removed >= promise.removed, "{what}: {promise:?}, {removed} removed");
    assert!(removed == 0 || head - removed >= KEPT, "{what}: {removed} removed of {head}");
    for side in [(user("bob"), Side::Inbox), (user("alice"), Side::Sent)] {
        let stream = Stream { user: side.0, side: side.1 };
        let page = log.read(&stream, Position(0), EVERYTHING).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(page.entries.len() as u64, head - removed, "{what}: {stream}");
        for (entry, seq) in page.entries.iter().zip(removed + 1..) {
            assert_eq!((entry.position.0, entry.seq.get(), entry.body.text()), (seq, seq, &*text(seq)), "{what}");
        }
    }
    let conversation = ConversationId::parse("alice:bob").unwrap();
    let page = log.read_conversation(&conversation, None, EVERYTHING).await.unwrap();
    assert_eq!(page.entries.len() as u64, head - removed, "{what}");
    let session = log.session(&phone()).await.unwrap();
    assert!(session.and_then(|session| session.cursors.inbox) >= promise.cursor.map(Position), "{what}");
    head
}

async fn check_image(
    operations: &[(PathBuf, Operation)],
    promises: &[Promise],
    dice: &mut Dice,
    all_or_nothing: Option<bool>,
) {
    let folder = folder();
    let cut = operations.len();
    let promise = promises.iter().rfind(|promise| promise.operations <= cut).copied().unwrap_or_default();
    let what = format!("power cut after {cut} operations, {all_or_nothing:?}");
    put(&image(operations, dice, all_or_nothing), folder.path());
    // Again while it recovers, and then for good.
    let recovery = Arc::new(Recorder::default());
    let before: Vec<(PathBuf, Operation)> = FILES
        .into_iter()
        .filter_map(|name| {
            let bytes = fs::read(folder.path().join(name)).ok()?;
            Some((folder.path().join(name), bytes))
        })
        .flat_map(|(path, bytes)| [(path.clone(), Operation::Write { offset: 0, bytes }), (path, Operation::Sync)])
        .collect();
    match open_on(folder.path(), Some(recovery.clone()), Some(recovery.clone())) {
        Ok(log) => drop(log),
        // Before the log was made there was no log.
        Err(error) => {
            assert!(promise.operations == 0, "{what}: {error}");
            return;
        }
    }
    let recovered = recovery.operations();
    let cut_again = dice.below(recovered.len() + 1);
    let operations: Vec<_> = before.into_iter().chain(recovered.into_iter().take(cut_again)).collect();
    put(&image(&operations, dice, None), folder.path());
    let what = format!("{what}, and again after {cut_again} more");
    let log = open_on(folder.path(), None, None).unwrap_or_else(|error| panic!("{what}: {error}"));
    let head = check(&log, promise, &what).await;
    log.append(vec![message("alice", "bob", head + 1, "goes on")]).await.unwrap();
    log.remove_before(sent_at(head)).await.unwrap();
    drop(log);
    assert_eq!(verified(folder.path()).problems, [""; 0], "{what}");
}

/// 1,000 power cuts at random moments, with random parts of what was not synced; and one at every sync, with all of it and nothing of it.
#[tokio::test]
async fn nothing_acknowledged_is_lost_in_a_power_cut() {
    let mut dice = Dice::new();
    let folder = folder();
    let recorder = Arc::new(Recorder::default());
    let log = open_on(folder.path(), Some(recorder.clone()), Some(recorder.clone())).unwrap();
    let promises = script(&log, &recorder, true).await;
    drop(log);
    let operations = recorder.operations();
    let begun = promises[1].operations;
    println!("{} operations", operations.len());
    for (cut, (_, operation)) in operations.iter().enumerate() {
        if matches!(operation, Operation::Sync) && cut + 1 >= begun {
            for all_or_nothing in [false, true] {
                check_image(&operations[..cut], &promises, &mut dice, Some(all_or_nothing)).await;
            }
        }
    }
    for _ in 0..1_000 {
        let cut = begun + dice.below(operations.len() + 1 - begun);
        check_image(&operations[..cut], &promises, &mut dice, None).await;
    }
}

/// The disk fails for good at each write and sync in turn, of the log or of the index.
#[tokio::test]
async fn a_disk_that_fails_at_any_moment_loses_nothing_acknowledged() {
    for fails in ["log", "index"] {
        let mut failed_at_all = 0;
        for succeed in 0..400 {
            let folder = folder();
            let faulty = Arc::new(FaultyDisk::default());
            let working = Arc::new(FaultyDisk::default());
            let (on_log, on_index) = if fails == "log" { (&faulty, &working) } else { (&working, &faulty) };
            drop(open_on(folder.path(), None, None).unwrap());
            let Ok(log) = open_on(folder.path(), Some(on_log.clone()), Some(on_index.clone())) else { continue };
            faulty.succeed.store(succeed, Ordering::SeqCst);
            let mut promise = Promise::default();
            let mut failed = None;
            for seq in 1..=20 {
                match append(&log, vec![message("alice", "bob", seq, &text(seq))]).await {
                    Ok(positions) => {
                        assert_eq!(failed, None, "an append after a failure");
                        assert_eq!(positions, [Position(seq)]);
                        promise.acknowledged = seq;
                    }
                    Err(AppendError::Unknown(_) | AppendError::Failed(_)) => failed = failed.or(Some(seq)),
                    Err(error) => panic!("{fails} after {succeed}: {error}"),
                }
            }
            if failed.is_some() {
                failed_at_all += 1;
                assert!(log.health().is_err());
            }
            drop(log);
            let log = open_on(folder.path(), None, None).unwrap();
            check(&log, promise, &format!("{fails} failed after {succeed}")).await;
            if fails == "log" && failed.is_none() {
                break;
            }
        }
        assert!(failed_at_all > 10, "{fails} failed {failed_at_all} times");
    }
}

/// The files as they are in the system's memory when the process is killed after so many operations.
fn killed(operations: &[(PathBuf, Operation)]) -> BTreeMap<PathBuf, Vec<u8>> {
    image(operations, &mut Dice(1), Some(true))
}

/// Killed between write and sync, or after a sync that failed: the next process finds a record in the system's memory that no later sync
/// writes. Nobody may see it before it is on disk: then the power goes.
#[tokio::test]
async fn what_a_start_finds_in_the_journal_is_on_disk_before_it_is_seen() {
    for goes_on in [false, true] {
        let folder = folder();
        let recorder = Arc::new(Recorder::default());
        let log = open_on(folder.path(), Some(recorder.clone()), Some(recorder.clone())).unwrap();
        // Of these three, the journal has two.
        for seq in 1..=3 {
            log.append(vec![message("alice", "bob", seq, &text(seq))]).await.unwrap();
        }
        let operations = recorder.operations();
        drop(log);
        let journal = folder.path().join("log.journal");
        let is_of_journal =
            |(path, operation): &(PathBuf, Operation)| *path == journal && matches!(operation, Operation::Write { .. });
        let written = operations.iter().rposition(is_of_journal).unwrap();
        put(&killed(&operations[..=written]), folder.path());
        // The disk has all but the last record.
        let recorder = Arc::new(Recorder::default());
        for (path, bytes) in killed(&operations[..written]) {
            recorder.begin_with(&path, bytes);
        }
        let log = open_on(folder.path(), Some(recorder.clone()), Some(recorder.clone())).unwrap();
        let mut seen = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap().entries.len() as u64;
        assert_eq!(seen, 3, "what was written is there");
        if goes_on {
            log.append(vec![message("alice", "bob", 4, &text(4))]).await.unwrap();
            seen = 4;
        }
        let operations = recorder.operations();
        drop(log);
        put(&image(&operations, &mut Dice(1), Some(false)), folder.path());
        let log = open_on(folder.path(), None, None).unwrap();
        check(&log, Promise { acknowledged: seen, ..Promise::default() }, "after a kill and a power cut").await;
    }
}

/// The disk fails, or is full, at each write and sync of a start that finds messages in the journal: the next start has them all.
#[tokio::test]
async fn a_disk_that_fails_while_the_log_is_opened_loses_nothing() {
    // Where the machine is slow, the file may get them too early.
    let files = loop {
        let first = folder();
        let recorder = Arc::new(Recorder::default());
        let log = open_on(first.path(), Some(recorder.clone()), Some(recorder.clone())).unwrap();
        for seq in 1..=6 {
            append(&log, vec![message("alice", "bob", seq, &text(seq))]).await.unwrap();
        }
        let files = killed(&recorder.operations());
        if !log.shared.pending().is_empty() {
            break files;
        }
    };
    for is_full in [false, true] {
        let mut failed = 0;
        for nth in 0..100 {
            let folder = folder();
            put(&files, folder.path());
            let disk = Arc::new(FaultyDisk::default());
            if is_full {
                disk.leave_free(Some(usize::try_from(nth).unwrap()));
            } else {
                disk.succeed.store(nth, Ordering::SeqCst);
            }
            let opened = open_on(folder.path(), Some(disk.clone()), Some(disk.clone()));
            failed += u64::from(opened.is_err());
            drop(opened);
            let log = open_on(folder.path(), None, None).unwrap();
            check(&log, Promise { acknowledged: 6, ..Promise::default() }, &format!("{nth}, full: {is_full}")).await;
            drop(log);
            assert_eq!(verified(folder.path()).problems, [""; 0]);
        }
        // How much a start writes depends on how far the index had come.
        assert!(failed > 1, "{failed}");
    }
}

/// Rows that just fill a page of redb or just do not, taken from the journal and then from the file, after a kill at each moment; once the journal is
/// smaller than what is in it.
#[tokio::test]
async fn rows_at_the_edge_of_a_page_come_back_from_the_journal() {
    for page in [4_096_usize, 8_192, 16_384] {
        let folder = folder();
        let recorder = Arc::new(Recorder::default());
        let options = RedbOptions { journal_bytes: 1 << 20, ..SMALL };
        let open = |options: &RedbOptions, disk: Option<Arc<dyn Disk>>| {
            let mut opener = Opener::new(folder.path(), options.clone());
            opener.disk = disk.clone();
            opener.index_disk = disk;
            RedbLog::start(opener).unwrap()
        };
        let log = open(&options, Some(recorder.clone()));
        let mut texts = vec!["first".to_owned()];
        texts.extend((page - 90..page + 10).step_by(3).flat_map(|bytes| ["x".repeat(bytes), "short".to_owned()]));
        texts.extend((0..40).map(|nth| "y".repeat(page / 3 + nth)));
        let mut moments = Vec::new();
        for (seq, text) in (1..).zip(&texts) {
            append(&log, vec![message("alice", "bob", seq, text)]).await.unwrap();
            moments.push((seq, recorder.len()));
        }
        let operations = recorder.operations();
        drop(log);
        for (last, moment) in moments.into_iter().step_by(7) {
            put(&killed(&operations[..moment]), folder.path());
            let smaller = RedbOptions { journal_bytes: 512 * (last % 3), ..options.clone() };
            for options in [&options, &smaller] {
                let log = open(options, None);
                assert!(log.head() >= Position(last));
                let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
                assert!(
                    page.entries
                        .iter()
                        .map(|entry| entry.body.text())
                        .eq(texts.iter().map(String::as_str).take(page.entries.len()))
                );
                assert_eq!(page.entries.len() as u64, log.head().0);
                drop(log);
                put(&killed(&operations[..moment]), folder.path());
            }
            let log = open(&smaller, None);
            let head = log.head().0;
            for seq in head + 1..head + 4 {
                log.append(vec![message("alice", "bob", seq, "goes on")]).await.unwrap();
            }
            drop(log);
            let found = verified(folder.path());
            assert_eq!((found.entries, found.problems), (head + 3, Vec::new()));
        }
    }
}

/// While the disk does not answer nothing is acknowledged, whatever is asked; then everything is.
#[tokio::test]
async fn nothing_is_acknowledged_while_a_sync_stalls() {
    // redb lets nobody read while a file that grows is synced. Whether it grows here depends on how appends fall together: then again.
    for _ in 0..20 {
        if stalls_and_goes_on().await {
            return;
        }
    }
    panic!("the file grew every time");
}

/// `false` if the file grew while the sync stalled.
async fn stalls_and_goes_on() -> bool {
    let folder = folder();
    let disk = Arc::new(FaultyDisk::default());
    let log = Arc::new(open_on(folder.path(), Some(disk.clone()), None).unwrap());
    log.append((1..=50).map(|seq| message("alice", "bob", seq, &text(seq))).collect::<Vec<_>>()).await.unwrap();
    let length = || fs::metadata(folder.path().join("log.redb")).unwrap().len();
    let before = length();
    disk.stall(true);
    let mut appends = tokio::task::JoinSet::new();
    for seq in 51..=MESSAGES {
        let log = Arc::clone(&log);
        appends.spawn(async move { log.append(vec![message("alice", "bob", seq, &text(seq))]).await });
        tokio::task::yield_now().await;
    }
    let waited = tokio::time::timeout(std::time::Duration::from_secs(2), appends.join_next()).await;
    assert!(waited.is_err(), "{waited:?}");
    assert_eq!(log.head(), Position(50));
    let grew = length() != before;
    if !grew {
        let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
        assert_eq!(page.entries.len(), 50, "reads go on, and show nothing that is not stored");
    }
    disk.stall(false);
    while let Some(appended) = appends.join_next().await {
        appended.unwrap().unwrap();
    }
    check(&log, Promise { acknowledged: MESSAGES, ..Promise::default() }, "after the stall").await;
    !grew
}

/// Bits flipped and files cut at 500 random places: an error, or everything; never fewer messages.
#[tokio::test]
async fn damage_is_found_and_never_hides_a_message() {
    let mut dice = Dice::new();
    let original = folder();
    let log = open_on(original.path(), None, None).unwrap();
    script(&log, &Recorder::default(), false).await;
    drop(log);
    let files = ["log.redb", "index.redb"].map(|name| (name, fs::read(original.path().join(name)).unwrap()));
    let (mut refused, mut found, mut harmless) = (0, 0, 0);
    for nth in 0..500 {
        let folder = folder();
        for (name, bytes) in &files {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let (name, bytes) = &files[nth % 2];
        let mut bytes = bytes.clone();
        // Where something is: most of a file is room.
        let place = loop {
            let place = dice.below(bytes.len());
            if bytes[place] != 0 {
                break place;
            }
        };
        if dice.below(10) == 0 {
            bytes.truncate(place);
        } else {
            bytes[place] ^= 1 << dice.below(8);
        }
        fs::write(folder.path().join(name), bytes).unwrap();
        let what = format!("{name} damaged at {place}");
        let path = folder.path().to_owned();
        // A panic in redb counts as found: it ends the process, which says where.
        let opened = tokio::task::spawn_blocking(move || open_on(&path, None, None)).await;
        let Ok(Ok(log)) = opened else {
            refused += 1;
            continue;
        };
        let log = Arc::new(log);
        let reader = Arc::clone(&log);
        let reading = tokio::spawn(async move {
            let bob = reader.read(&inbox("bob"), Position(0), EVERYTHING).await?;
            let conversation = ConversationId::parse("alice:bob").unwrap();
            let both = reader.read_conversation(&conversation, None, EVERYTHING).await?;
            Ok::<_, LogError>((bob, both))
        });
        let read = reading.await;
        // So does a panic in redb when a damaged file is closed; here, because one panic while another unwinds ends the process at once.
        let closed = tokio::task::spawn_blocking(move || drop(log)).await;
        if closed.is_err() {
            println!("{what}: found when it was closed");
        }
        match read {
            Ok(Ok((bob, both))) => {
                harmless += 1;
                for page in [bob, both] {
                    assert_eq!(page.entries.len() as u64, MESSAGES, "{what}");
                    for (entry, seq) in page.entries.iter().zip(1..) {
                        assert_eq!((entry.seq.get(), entry.body.text()), (seq, &*text(seq)), "{what}");
                    }
                }
            }
            Ok(Err(_)) | Err(_) => found += 1,
        }
    }
    println!("{refused} refused, {found} found by a read, {harmless} harmless");
    assert!(refused + found > 50, "{refused} refused, {found} found");
}

/// A log whose disk remembers what was written, so that a crash can be made of it.
struct Crashing {
    folder: tempfile::TempDir,
    recorder: Arc<Recorder>,
}

impl Crashing {
    fn new() -> Self {
        Self { folder: folder(), recorder: Arc::default() }
    }
}

impl Reopened for Crashing {
    fn open(&mut self) -> RedbLog {
        open_on(self.folder.path(), Some(self.recorder.clone()), Some(self.recorder.clone())).unwrap()
    }

    fn crash(&mut self, log: RedbLog) -> RedbLog {
        // Everything that was written is in the page cache, synced or not; what the threads do from now on never happened.
        let operations = self.recorder.operations();
        drop(log);
        let mut dice = Dice(1);
        let written = image(&operations, &mut dice, Some(true));
        // The recorder begins anew, with the files as they are.
        self.recorder = Arc::default();
        put(&written, self.folder.path());
        for (path, bytes) in written {
            self.recorder.begin_with(&path, bytes);
        }
        self.open()
    }
}

/// Cases of each of the two, which run side by side.
const CASES: u32 = 5_000;

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, ..ProptestConfig::default() })]

    #[test]
    fn it_does_what_the_log_in_memory_does(steps in steps()) {
        compare(&steps, Crashing::new());
    }

    #[test]
    fn it_does_what_the_log_in_memory_does_in_other_cases(steps in steps()) {
        compare(&steps, Crashing::new());
    }
}
