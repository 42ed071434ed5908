//! What files and disks can do to the log, and the log beside its model in memory.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ::redb::{Database, ReadableDatabase, ReadableTable};
use chat_protocol::{ConversationId, MessageId, Seq, Timestamp, UserId};
use proptest::prelude::*;
use tempfile::TempDir;

use super::super::Cursors;
use super::super::conformance::Store;
use super::super::{Body, Log, MemoryLog, Side, SubscriptionRecord};
use super::disk::FaultyDisk;
use super::*;

struct OnDisk(TempDir);

impl OnDisk {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
}

impl Store for OnDisk {
    type Log = RedbLog;

    async fn open(&self) -> RedbLog {
        open(self.0.path())
    }
}

crate::log_conformance_tests!(OnDisk::new());

pub(super) const EVERYTHING: ReadLimit = ReadLimit { entries: usize::MAX, bytes: usize::MAX };

/// So few entries in memory that a handful of messages makes runs and merges, and so little journal that they fill it.
pub(super) const SMALL: RedbOptions =
    RedbOptions { flush_entries: 3, counts_usage: true, journal_bytes: 6 * 1024, ..RedbOptions::DEFAULT };

fn open(folder: &Path) -> RedbLog {
    RedbLog::open(folder, RedbOptions { counts_usage: true, ..RedbOptions::default() }).unwrap()
}

pub(super) fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

/// So late that no id is too old to be kept.
const LATE_MS: u64 = 4_000_000_000_000;

/// The time of a message with this seq.
pub(super) fn sent_at(seq: u64) -> Timestamp {
    Timestamp::from_ms(LATE_MS + seq)
}

pub(super) fn message(from: &str, to: &str, seq: u64, text: &str) -> NewEntry {
    let (from, to) = (user(from), user(to));
    NewEntry {
        conversation: ConversationId::between(&from, &to).unwrap(),
        seq: Seq::new(seq).unwrap(),
        from,
        to,
        id: Some(MessageId::parse(&format!("m-{seq}")).unwrap()),
        at: sent_at(seq),
        body: text.into(),
        withheld: false,
    }
}

pub(super) fn inbox(name: &str) -> Stream {
    Stream { user: user(name), side: Side::Inbox }
}

pub(super) fn phone() -> Device {
    Device { user: user("bob"), client_id: "phone".into() }
}

/// Only a cursor in the inbox.
fn in_inbox(position: u64) -> Cursors {
    Cursors { inbox: Some(Position(position)), ..Cursors::default() }
}

pub(super) fn at(position: u64) -> SessionRecord {
    SessionRecord { cursors: in_inbox(position), ..SessionRecord::default() }
}

fn advance(position: u64) -> Vec<Advance> {
    vec![Advance { stream: inbox("bob"), device: Some(phone()), position: Position(position) }]
}

/// Changes the file behind the log's back.
fn change(folder: &Path, change: impl FnOnce(&::redb::WriteTransaction)) {
    let database = Database::open(folder.join("log.redb")).unwrap();
    let writing = database.begin_write().unwrap();
    change(&writing);
    writing.commit().unwrap();
}

#[test]
fn a_newer_format_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()));
    change(folder.path(), |writing| {
        writing.open_table(schema::META).unwrap().insert(schema::FORMAT_KEY, schema::LOG_FORMAT + 1).unwrap();
    });
    let error = RedbLog::open(folder.path(), RedbOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::NewerFormat { .. }), "{error:?}");
    let sentence = error.to_string();
    assert!(sentence.contains("log.redb has format version 4, this program knows up to 3"), "{sentence}");
}

/// Written by the program that had it: 20 messages from alice, one a commit, then 20 from eve, and a session that stands at 9.
const LOG_OF_FORMAT_2: &[u8] = include_bytes!("testdata/format-2.redb");

#[tokio::test]
async fn a_log_of_format_2_is_brought_to_this_one() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("log.redb"), LOG_OF_FORMAT_2).unwrap();
    for _ in 0..2 {
        let log = open(folder.path());
        let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
        assert_eq!(page.entries.len(), 40);
        assert_eq!((page.entries[19].body.text(), page.entries[19].seq.get()), ("text 20", 20));
        assert_eq!((page.entries[39].from.as_str(), page.entries[39].seq.get()), ("eve", 20));
        assert_eq!(log.session(&phone()).await.unwrap().unwrap().cursors.inbox, Some(Position(9)));
    }
    assert_eq!(verified(folder.path()).problems, [""; 0]);
    let log = open(folder.path());
    assert_eq!(log.remove_before(sent_at(21)).await.unwrap(), 40);
    assert_eq!(log.append(vec![message("alice", "bob", 21, "on")]).await.unwrap(), [Position(41)]);
}

#[test]
fn a_log_of_format_1_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("chat.redb"), b"whatever it was").unwrap();
    let error = RedbLog::open(folder.path(), RedbOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Format1 { .. }), "{error:?}");
    assert!(!folder.path().join("log.redb").exists());
}

#[test]
fn a_second_open_is_refused_and_told_who_was_first() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path());
    let error = RedbLog::open(folder.path(), RedbOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Locked { .. }), "{error:?}");
    let expected = format!("log.redb is in use by this very process ({})", std::process::id());
    assert!(error.to_string().contains(&expected), "{error}");
    fs::write(folder.path().join("chat.pid"), "1").unwrap();
    let error = RedbLog::open(folder.path(), RedbOptions::default()).unwrap_err();
    assert!(error.to_string().contains("is in use by process 1:"), "{error}");
    drop(first);
    drop(open(folder.path()));
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    let error = RedbLog::open(folder.path().join("file/log"), RedbOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Folder { .. }), "{error:?}");
    assert!(error.to_string().contains("file/log cannot be created: "), "{error}");
}

#[test]
fn what_is_no_log_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("log.redb");
    for content in [b"not a log".to_vec(), vec![7; 100_000]] {
        fs::write(&file, &content).unwrap();
        let error = RedbLog::open(folder.path(), RedbOptions::default()).unwrap_err();
        assert!(matches!(error, OpenError::Corrupt { .. }), "{error:?}");
        assert_eq!(fs::read(&file).unwrap(), content);
    }
}

#[test]
fn a_log_that_is_cut_short_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()));
    let file = OpenOptions::new().write(true).open(folder.path().join("log.redb")).unwrap();
    file.set_len(5_000).unwrap();
    let error = RedbLog::open(folder.path(), RedbOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error:?}");
}

#[test]
fn a_database_of_somebody_elses_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    {
        let database = Database::create(folder.path().join("log.redb")).unwrap();
        let writing = database.begin_write().unwrap();
        let table = ::redb::TableDefinition::<u64, u64>::new("theirs");
        drop(writing.open_table(table).unwrap());
        writing.commit().unwrap();
    }
    let error = RedbLog::open(folder.path(), RedbOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error:?}");
}

#[tokio::test]
async fn a_flipped_byte_in_an_entry_is_found_and_named() {
    let folder = tempfile::tempdir().unwrap();
    {
        let log = open(folder.path());
        append(&log, vec![message("alice", "bob", 1, "good"), message("alice", "bob", 2, "bad")]).await.unwrap();
    }
    change(folder.path(), |writing| {
        let mut rows = writing.open_table(schema::ROWS).unwrap();
        let mut row = rows.get(1).unwrap().unwrap().value().to_vec();
        *row.last_mut().unwrap() ^= 1;
        rows.insert(1, row.as_slice()).unwrap();
    });
    let log = open(folder.path());
    let error = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap_err();
    assert_eq!(error.to_string(), "reading bob/inbox: table rows, key 2: the checksum does not match");
    // What is not damaged is still read, and written.
    let limit = ReadLimit { entries: 1, bytes: 1 };
    log.read(&inbox("bob"), Position(0), limit).await.unwrap_err();
    let key = |id: &str| IdKey {
        conversation: ConversationId::parse("alice:bob").unwrap(),
        from: user("alice"),
        id: MessageId::parse(id).unwrap(),
    };
    assert_eq!(log.find(vec![key("m-1")]).await.unwrap()[0].as_ref().unwrap().body.text(), "good");
    log.find(vec![key("m-2")]).await.unwrap_err();
    log.append(vec![message("alice", "bob", 3, "after")]).await.unwrap();
    assert_eq!(log.read(&inbox("bob"), Position(2), EVERYTHING).await.unwrap().entries.len(), 1);
}

#[tokio::test]
async fn a_damaged_session_is_named_and_stops_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let laptop = Device { user: user("bob"), client_id: "laptop".into() };
    {
        let log = open(folder.path());
        log.put_session(&phone(), at(1)).await.unwrap();
        log.put_session(&laptop, at(1)).await.unwrap();
    }
    change(folder.path(), |writing| {
        let mut sessions = writing.open_table(schema::SESSIONS).unwrap();
        sessions.insert(schema::session_key(&phone()).as_slice(), b"\x01broken".as_slice()).unwrap();
    });
    let log = open(folder.path());
    let error = log.session(&phone()).await.unwrap_err();
    let expected = r"reading the session of bob/phone: table sessions, key bob\x00phone: the checksum does not match";
    assert_eq!(error.to_string(), expected);
    log.advance(advance(5));
    log.advance(vec![Advance { stream: inbox("bob"), device: Some(laptop.clone()), position: Position(6) }]);
    log.flush().await.unwrap();
    assert_eq!(log.session(&laptop).await.unwrap(), Some(at(6)));
    log.put_session(&phone(), at(2)).await.unwrap();
    assert_eq!(log.session(&phone()).await.unwrap(), Some(at(2)));
}

#[tokio::test]
async fn a_wrong_index_never_shows_somebody_elses_message() {
    let folder = tempfile::tempdir().unwrap();
    let entries = [message("alice", "eve", 1, "secret"), message("alice", "bob", 1, "to bob")];
    open(folder.path()).append(entries.to_vec()).await.unwrap();
    change(folder.path(), |writing| {
        let mut packer = row::Packer::new(&row::Tail::default(), Position(0));
        entries.iter().rev().for_each(|new| packer.push(new));
        let mut rows = writing.open_table(schema::ROWS).unwrap();
        packer.finish(|first, row| rows.insert(first.0, row).map(drop)).unwrap();
    });
    let log = open(folder.path());
    let error = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap_err();
    assert_eq!(error.cause, "table rows, key 2: the index takes it for another entry");
    let conversation = ConversationId::parse("alice:bob").unwrap();
    let error = log.read_conversation(&conversation, None, EVERYTHING).await.unwrap_err();
    assert_eq!(error.cause, "table rows, key 2: the index takes it for another entry");
    let id = MessageId::parse("m-1").unwrap();
    assert_eq!(log.find(vec![IdKey { conversation, from: user("alice"), id }]).await.unwrap(), [None]);
}

/// A few conversations, in batches, with so few entries in memory that there are runs of several levels.
async fn fill(folder: &Path, messages: u64) -> Vec<String> {
    let log = RedbLog::open(folder, SMALL).unwrap();
    for seq in 1..=messages {
        let batch = vec![message("alice", "bob", seq, "a"), message("alice", "eve", seq, "b")];
        append(&log, batch).await.unwrap();
    }
    everything_of(&log, &["alice", "bob", "eve"]).await
}

/// One line for each way to read, short enough to be shown.
async fn everything_of(log: &RedbLog, users: &[&str]) -> Vec<String> {
    let in_full = everything_in_full(log, users).await;
    in_full.into_iter().map(|read| format!("{} bytes, {:08x}", read.len(), crc32fast::hash(read.as_bytes()))).collect()
}

async fn everything_in_full(log: &RedbLog, users: &[&str]) -> Vec<String> {
    let mut read = Vec::new();
    for name in users {
        for side in [Side::Inbox, Side::Sent] {
            let stream = Stream { user: user(name), side };
            for after in [0, 7, 100] {
                read.push(format!("{:?}", log.read(&stream, Position(after), EVERYTHING).await.unwrap()));
            }
        }
        if *name != "alice" {
            let conversation = ConversationId::between(&user("alice"), &user(name)).unwrap();
            read.push(format!("{:?}", log.heads(vec![conversation.clone()]).await.unwrap()));
            for after in [None, Seq::new(1), Seq::new(30)] {
                let page = log.read_conversation(&conversation, after, EVERYTHING).await.unwrap();
                read.push(format!("{page:?}"));
            }
            for id in ["m-1", "m-60", "m-1000"] {
                let id = MessageId::parse(id).unwrap();
                let key = IdKey { conversation: conversation.clone(), from: user("alice"), id };
                read.push(format!("{:?}", log.find(vec![key]).await.unwrap()));
            }
        }
    }
    read
}

fn index_of(folder: &Path) -> std::path::PathBuf {
    folder.join("index.redb")
}

/// Waits until merges and removals are done.
async fn settled(log: &RedbLog) -> Vec<u32> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    loop {
        let levels: Vec<u32> = log.shared.index.runs().iter().map(|run| run.level).collect();
        let crowded = levels.iter().any(|level| levels.iter().filter(|other| *other == level).count() >= 8);
        if !crowded {
            return levels;
        }
        assert!(tokio::time::Instant::now() < deadline, "never merged: {levels:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_index_is_merged_and_says_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let filled = fill(folder.path(), 300).await;
    let log = RedbLog::open(folder.path(), SMALL).unwrap();
    let levels = settled(&log).await;
    // How many runs there were depends on how fast the disk is: twice as many as this needs, where others have it too.
    assert!(levels.iter().any(|level| *level >= 2), "{levels:?}");
    assert!(levels.is_sorted_by(|a, b| a >= b), "the oldest are merged most: {levels:?}");
    assert_eq!(everything_of(&log, &["alice", "bob", "eve"]).await, filled);
    drop(log);
    // What was merged is removed when the log is open long enough, and not listed in any case.
    assert_eq!(everything_of(&open(folder.path()), &["alice", "bob", "eve"]).await, filled);
}

#[tokio::test]
async fn ids_are_forgotten_in_time_and_not_before() {
    let folder = tempfile::tempdir().unwrap();
    let log = RedbLog::open(folder.path(), SMALL).unwrap();
    let now_ms = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    let now_ms = u64::try_from(now_ms).unwrap();
    let day_ms = 24 * 3_600 * 1_000;
    let mut seq = 0;
    for (id, at) in [("old", now_ms - 9 * day_ms), ("kept", now_ms - 7 * day_ms), ("new", now_ms)] {
        for nth in 0..24 {
            seq += 1;
            let id = Some(MessageId::parse(&format!("{id}-{nth}")).unwrap());
            let at = Timestamp::from_ms(at);
            log.append(vec![NewEntry { id, at, ..message("alice", "bob", seq, "x") }]).await.unwrap();
            // As slowly as the file is written, so that the index has runs to merge.
            log.flush().await.unwrap();
        }
    }
    settled(&log).await;
    let conversation = ConversationId::parse("alice:bob").unwrap();
    for (id, kept) in [("old", false), ("kept", true), ("new", true)] {
        for nth in 0..24 {
            let id = MessageId::parse(&format!("{id}-{nth}")).unwrap();
            let key = IdKey { conversation: conversation.clone(), from: user("alice"), id: id.clone() };
            assert_eq!(log.find(vec![key]).await.unwrap()[0].is_some(), kept, "{id}");
        }
    }
    assert_eq!(log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap().entries.len(), 72);
}

#[tokio::test]
async fn an_index_that_is_lost_damaged_or_anothers_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let filled = fill(folder.path(), 60).await;
    let other = tempfile::tempdir().unwrap();
    fill(other.path(), 3).await;
    let early = tempfile::tempdir().unwrap();
    fs::copy(folder.path().join("log.redb"), early.path().join("log.redb")).unwrap();

    fs::remove_file(index_of(folder.path())).unwrap();
    assert_eq!(everything_of(&open(folder.path()), &["alice", "bob", "eve"]).await, filled, "lost");
    fs::write(index_of(folder.path()), b"nonsense").unwrap();
    assert_eq!(everything_of(&open(folder.path()), &["alice", "bob", "eve"]).await, filled, "damaged");
    let index = OpenOptions::new().write(true).open(index_of(folder.path())).unwrap();
    index.set_len(9_000).unwrap();
    assert_eq!(everything_of(&open(folder.path()), &["alice", "bob", "eve"]).await, filled, "cut");
    fs::copy(index_of(other.path()), index_of(folder.path())).unwrap();
    assert_eq!(everything_of(&open(folder.path()), &["alice", "bob", "eve"]).await, filled, "another log's");
    open(folder.path()).append(vec![message("alice", "bob", 61, "later")]).await.unwrap();
    fs::copy(index_of(folder.path()), index_of(early.path())).unwrap();
    let error = RedbLog::open(early.path(), RedbOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Behind { last: 120, had: 121, .. }), "{error:?}");
    fs::remove_file(index_of(early.path())).unwrap();
    assert_eq!(everything_of(&open(early.path()), &["alice", "bob", "eve"]).await, filled, "of an older copy");
}

#[tokio::test]
async fn a_damaged_block_of_the_index_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), 10).await;
    {
        let database = Database::open(index_of(folder.path())).unwrap();
        let writing = database.begin_write().unwrap();
        let mut blocks = writing.open_table(schema::BLOCKS).unwrap();
        let keys: Vec<posting::BlockKey> = blocks.iter().unwrap().map(|block| *block.unwrap().0.value()).collect();
        for key in keys {
            let mut block = blocks.get(&key).unwrap().unwrap().value().to_vec();
            *block.last_mut().unwrap() ^= 1;
            blocks.insert(&key, block.as_slice()).unwrap();
        }
        drop(blocks);
        writing.commit().unwrap();
    }
    let log = open(folder.path());
    let error = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap_err();
    assert!(error.cause.starts_with("table blocks, key "), "{error}");
    let error = log.append(vec![message("alice", "bob", 11, "which seq is next?")]).await.unwrap_err();
    assert!(matches!(error, AppendError::Failed(_)), "{error:?}");
}

#[tokio::test]
async fn cursors_reach_the_disk_without_being_asked_to() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path());
    log.advance(advance(7));
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let on_disk = || {
        let stored = |snapshot: &::redb::ReadTransaction| {
            let stored =
                snapshot.open_table(schema::DELIVERED).unwrap().get(schema::delivered_key(&inbox("bob")).as_slice());
            stored.unwrap().map(|position| position.value())
        };
        stored(&log.shared.database.read().as_ref().unwrap().begin_read().unwrap())
    };
    assert_eq!(on_disk(), None);
    while on_disk().map(|(position, _)| position) != Some(7) {
        assert!(tokio::time::Instant::now() < deadline, "the cursor is not on disk");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    log.advance(advance(9));
    // Dropping the log writes the rest.
    drop(log);
    assert_eq!(open(folder.path()).delivered(&inbox("bob")).await.unwrap().position, Position(9));
}

#[tokio::test]
async fn what_was_not_waited_for_is_written_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    {
        let log = open(folder.path());
        for seq in 1..=20 {
            let append = log.append(vec![message("alice", "bob", seq, "x")]);
            // Polled once, then dropped: the batch is in the queue.
            let left = tokio::time::timeout(Duration::ZERO, append).await;
            assert!(!matches!(left, Ok(Err(_))), "{left:?}");
        }
    }
    let log = open(folder.path());
    assert_eq!(log.head(), Position(20));
}

fn open_on(folder: &Path, disk: &Arc<FaultyDisk>) -> RedbLog {
    let mut opener = Opener::new(folder, RedbOptions::default());
    opener.disk = Some(disk.clone());
    RedbLog::start(opener).unwrap()
}

/// The disk fills up at every point of a commit in turn: each time nothing of it is there, and the log goes on.
#[tokio::test]
async fn a_full_disk_refuses_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(FaultyDisk::default());
    let log = open_on(folder.path(), &disk);
    log.append(vec![message("alice", "bob", 1, "before")]).await.unwrap();
    log.put_session(&phone(), at(0)).await.unwrap();
    let text = "x".repeat(30_000);
    let mut seq = 1;
    let mut refused = 0;
    for free in 0..40 {
        let head = log.head();
        let cursor = Position(seq);
        log.advance(advance(seq));
        disk.leave_free(Some(free));
        let outcome = append(&log, vec![message("alice", "bob", seq + 1, &text)]).await;
        disk.leave_free(None);
        match outcome {
            Ok(_) => seq += 1,
            Err(AppendError::Full(_)) => {
                refused += 1;
                assert_eq!(log.head(), head);
            }
            Err(error) => panic!("with {free} blocks free: {error}"),
        }
        assert_eq!(log.health(), Ok(()));
        assert_eq!(log.session(&phone()).await.unwrap().unwrap().cursors.inbox, Some(cursor));
        let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
        assert_eq!(page.entries.len() as u64, seq, "with {free} blocks free");
    }
    assert!(refused > 3, "the disk was never full");
    assert!(seq > 1, "the disk was never large enough");
    log.append(vec![message("alice", "bob", seq + 1, "after")]).await.unwrap();
    drop(log);
    let log = open(folder.path());
    assert_eq!(log.head(), Position(seq + 1));
    assert!(log.delivered(&inbox("bob")).await.unwrap().position >= Position(1));
}

/// Half of them in place, where the caller's thread waits for the disk.
pub(super) async fn append<L: Log>(log: &L, batch: Vec<NewEntry>) -> Result<Vec<Position>, AppendError> {
    let is_in_place = batch.first().is_some_and(|new| new.seq.get().is_multiple_of(2));
    if is_in_place { log.append_in_place(batch).await } else { log.append(batch).await }
}

/// The file has had the first entry, the journal alone has some more.
async fn with_journal(log: &RedbLog) -> u64 {
    log.append(vec![message("alice", "bob", 1, "in the file")]).await.unwrap();
    log.flush().await.unwrap();
    for seq in 2..=9 {
        append(log, vec![message("alice", "bob", seq, "in the journal")]).await.unwrap();
    }
    9
}

#[tokio::test]
async fn a_full_disk_keeps_what_only_the_journal_has() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(FaultyDisk::default());
    let log = open_on(folder.path(), &disk);
    let last = with_journal(&log).await;
    disk.leave_free(Some(0));
    let mut seq = last;
    // The journal may have room for some more; then it is refused, and nothing that was taken is lost.
    let refused = loop {
        match append(&log, vec![message("alice", "bob", seq + 1, &"x".repeat(30_000))]).await {
            Ok(_) => seq += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, AppendError::Full(_)), "{refused:?}");
    let all = async |log: &RedbLog| {
        let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
        page.entries.len() as u64
    };
    assert_eq!((log.head(), all(&log).await, log.health()), (Position(seq), seq, Ok(())));
    drop(log);
    // A start does not need room either.
    let log = open_on(folder.path(), &disk);
    assert_eq!((log.head(), all(&log).await), (Position(seq), seq));
    let refused = append(&log, vec![message("alice", "bob", seq + 1, &"x".repeat(300_000))]).await.unwrap_err();
    assert!(matches!(refused, AppendError::Full(_)), "{refused:?}");
    disk.leave_free(None);
    log.append(vec![message("alice", "bob", seq + 1, "there is room again")]).await.unwrap();
    drop(log);
    assert_eq!(verified(folder.path()).problems, [""; 0]);
    fs::remove_file(folder.path().join("log.journal")).unwrap();
    assert_eq!(all(&open(folder.path())).await, seq + 1, "the file has everything once it is closed");
}

/// The files as a crash leaves them: the log is open.
fn crashed(folder: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["log.redb", "log.journal"] {
        fs::copy(folder.join(name), copy.path().join(name)).unwrap();
    }
    copy
}

#[tokio::test]
async fn tools_find_what_only_the_journal_has() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path());
    let last = with_journal(&log).await;
    let copy = crashed(folder.path());
    let backup = tempfile::tempdir().unwrap();
    let copied = log.backup(&backup.path().join("log"), &mut |_, _| std::ops::ControlFlow::Continue(()));
    assert_eq!(copied.unwrap(), last);
    assert_eq!(log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap().entries.len() as u64, last);
    for folder in [copy.path(), &backup.path().join("log")] {
        let verified = verified(folder);
        assert_eq!((verified.entries, verified.problems), (last, Vec::new()));
        assert_eq!(open(folder).head(), Position(last));
    }
}

/// A backup that looks at the journal's messages, and then at a file that has them and more, and no longer the first of them.
#[tokio::test]
async fn a_backup_beside_a_commit_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path());
    let last = with_journal(&log).await;
    let pending = log.shared.pending();
    let at_last = sent_at(last + 1);
    let new = NewEntry { at: at_last, ..message("alice", "eve", 1, "another conversation is the file's at once") };
    log.append(vec![new]).await.unwrap();
    log.advance(advance(last + 1));
    log.put_session(&phone(), at(last + 1)).await.unwrap();
    assert_eq!(log.remove_before(sent_at(4)).await.unwrap(), 3);
    let snapshot = log.shared.begin_read().unwrap();
    let backup = tempfile::tempdir().unwrap();
    let go_on = &mut |_, _| std::ops::ControlFlow::Continue(());
    let copied = tools::copy(&snapshot, &pending, backup.path(), tools::Copied::Backup, go_on);
    assert_eq!(copied.unwrap(), last + 1);
    let verified = verified(backup.path());
    assert_eq!((verified.entries, verified.problems), (last - 2, Vec::new()));
    // What another copy left there is none of its own.
    fs::remove_file(backup.path().join("log.redb")).unwrap();
    fs::write(backup.path().join("log.journal"), b"").unwrap();
    let error = log.backup(backup.path(), go_on).unwrap_err();
    assert!(matches!(error, tools::ToolError::LogThere { .. }), "{error:?}");
}

#[tokio::test]
async fn a_journal_that_cannot_be_overwritten_keeps_the_words_noted() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(FaultyDisk::default());
    let log = open_on(folder.path(), &disk);
    let last = with_journal(&log).await;
    let unsend = Body::Unsend { target: Seq::new(5).unwrap() };
    log.append(vec![NewEntry { body: unsend, ..message("alice", "bob", last + 1, "") }]).await.unwrap();
    let journal = folder.path().join("log.journal");
    let words = "in the journal";
    let before = occurrences(&journal, words);
    assert!(before > 0);
    disk.broken_file.lock().replace(journal.clone());
    let error = log.shred().await.unwrap_err();
    assert!(error.to_string().contains("log.journal"), "{error}");
    assert_eq!((log.health(), occurrences(&journal, words)), (Ok(()), before));
    disk.broken_file.lock().take();
    assert_eq!(log.shred().await.unwrap(), 1);
    assert_eq!(occurrences(&journal, words), 0);
}

#[test]
fn a_journal_that_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("log.journal")).unwrap();
    let error = RedbLog::open(folder.path(), RedbOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Io { .. }), "{error:?}");
    assert!(error.to_string().contains("log.journal cannot be opened"), "{error}");
}

/// Commits to the journal and the file, removal, backups and reads, all at once: a read sees everything from before it began, without a gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn reads_beside_the_journal_have_no_gaps() {
    let folder = tempfile::tempdir().unwrap();
    let log = Arc::new(RedbLog::open(folder.path(), SMALL).unwrap());
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut readers = tokio::task::JoinSet::new();
    for nth in 0..3 {
        let (log, done) = (Arc::clone(&log), Arc::clone(&done));
        readers.spawn(async move {
            let everything = Stream { user: user("bob"), side: Side::EverySent };
            let conversation = ConversationId::parse("alice:bob").unwrap();
            let mut reads = 0;
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                let (head, after) = (log.head().0, log.first().0 + reads % 50);
                let limit = ReadLimit { entries: 200, bytes: usize::MAX };
                let page = match nth {
                    0 => log.read(&everything, Position(after), limit).await.unwrap(),
                    1 => log.read(&inbox("bob"), Position(after), limit).await.unwrap(),
                    _ => log.read_conversation(&conversation, Seq::new(after), limit).await.unwrap(),
                };
                let found: Vec<u64> = page.entries.iter().map(|entry| entry.position.0).collect();
                assert!(found.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{nth}: {found:?}");
                assert!(page.entries.iter().all(|entry| entry.seq.get() == entry.position.0), "{nth}");
                let seen = found.last().copied().unwrap_or(after);
                assert!(seen >= head || !page.end, "{nth}: {seen} of {head}");
                // Removal may take the beginning, and nothing else.
                assert!(
                    found.first().is_none_or(|found| *found == after + 1 || *found <= log.first().0),
                    "{nth}: {found:?}"
                );
                reads += 1;
            }
            reads
        });
    }
    let removing = {
        let (log, done) = (Arc::clone(&log), Arc::clone(&done));
        tokio::spawn(async move {
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                let head = log.head().0;
                log.remove_before(sent_at(head.saturating_sub(100))).await.unwrap();
                let backup = tempfile::tempdir().unwrap();
                let (of, to) = (Arc::clone(&log), backup.path().to_owned());
                let copied = tokio::task::spawn_blocking(move || {
                    of.backup(&to, &mut |_, _| std::ops::ControlFlow::Continue(()))
                });
                assert!(copied.await.unwrap().unwrap() >= head);
                assert_eq!(verified(backup.path()).problems, [""; 0]);
            }
        })
    };
    // Every session is the file's at once: it is written most of the time.
    let sessions = {
        let (log, done) = (Arc::clone(&log), Arc::clone(&done));
        let laptop = Device { user: user("alice"), ..phone() };
        tokio::spawn(async move {
            for to in 0.. {
                log.put_session(&laptop, at(to)).await.unwrap();
                assert_eq!(log.session(&laptop).await.unwrap(), Some(at(to)));
                if done.load(std::sync::atomic::Ordering::SeqCst) {
                    return to;
                }
            }
            0
        })
    };
    for seq in 1..=1_500 {
        append(
            &*log,
            vec![message("alice", "bob", seq, &"some words ".repeat(1 + usize::try_from(seq % 30).unwrap()))],
        )
        .await
        .unwrap();
        if seq % 3 == 0 {
            log.advance(advance(seq));
        }
    }
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    while let Some(reads) = readers.join_next().await {
        assert!(reads.unwrap() > 0);
    }
    assert!(sessions.await.unwrap() > 10);
    removing.await.unwrap();
}

/// Bits that the disk loses: an error, unless it is the last record, which may as well be one that was never acknowledged.
#[tokio::test]
async fn a_hole_in_the_journal_is_found() {
    // Where the machine is slow, the file may get some of it too early.
    let (folder, log, last, copy) = loop {
        let folder = tempfile::tempdir().unwrap();
        let log = open(folder.path());
        let last = with_journal(&log).await;
        let copy = crashed(folder.path());
        let stored = Database::open(copy.path().join("log.redb")).unwrap();
        if open::read_prepared(&stored).unwrap().stored == Position(1) {
            break (folder, log, last, copy);
        }
    };
    let journal = fs::read(copy.path().join("log.journal")).unwrap();
    for nth in 0..8 {
        for byte in [0, 10, 30, 36, 60] {
            // Of the copy: while the log is open, its file gets what the journal has.
            let copy = crashed(copy.path());
            let mut damaged = journal.clone();
            damaged[nth * 512 + byte] ^= 1;
            fs::write(copy.path().join("log.journal"), damaged).unwrap();
            match RedbLog::open(copy.path(), RedbOptions::default()) {
                Ok(log) => assert_eq!((nth, log.head()), (7, Position(last - 1))),
                Err(error) => {
                    assert!(matches!(error, OpenError::Behind { .. }), "{error:?}");
                    assert!(error.to_string().ends_with("log.journal"), "{error}");
                    assert!(nth < 7, "{error}");
                }
            }
        }
    }
    // An older log.redb beside it is found, too, once something that it lacks is overwritten.
    drop(log);
    let log = RedbLog::open(folder.path(), RedbOptions { journal_bytes: 8 * 1024, ..RedbOptions::default() }).unwrap();
    let older = crashed(folder.path());
    for seq in last + 1..last + 9 {
        append(&log, vec![message("alice", "bob", seq, "later")]).await.unwrap();
        log.flush().await.unwrap();
    }
    log.append(vec![message("alice", "bob", last + 9, "in the journal")]).await.unwrap();
    fs::copy(folder.path().join("log.journal"), older.path().join("log.journal")).unwrap();
    let error = RedbLog::open(older.path(), RedbOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Behind { last: 9, had: 18, .. }), "{error:?}");
}

#[tokio::test]
async fn a_full_disk_keeps_cursors_until_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(FaultyDisk::default());
    let log = open_on(folder.path(), &disk);
    log.put_session(&phone(), at(0)).await.unwrap();
    log.advance(advance(5));
    disk.leave_free(Some(0));
    let filter = SubscriptionRecord {
        filter: "x".repeat(100_000),
        qos: 0,
        no_local: false,
        retain_as_published: false,
        identifier: None,
    };
    let large = SessionRecord { subscriptions: vec![filter], ..at(0) };
    let laptop = Device { user: user("bob"), client_id: "laptop".into() };
    log.put_session(&laptop, large).await.unwrap_err();
    let error = log.flush().await.unwrap_err();
    assert!(error.to_string().starts_with("writing cursors: "), "{error}");
    log.advance(advance(6));
    assert_eq!(log.session(&phone()).await.unwrap(), Some(at(6)));
    disk.leave_free(None);
    log.flush().await.unwrap();
    drop(log);
    assert_eq!(open(folder.path()).session(&phone()).await.unwrap(), Some(at(6)));
}

#[tokio::test]
async fn a_failed_sync_ends_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(FaultyDisk::default());
    let log = open_on(folder.path(), &disk);
    log.append(vec![message("alice", "bob", 1, "before")]).await.unwrap();
    disk.sync_fails.store(true, Ordering::SeqCst);
    let outcome = log.append(vec![message("alice", "bob", 2, "unknown")]).await;
    assert!(matches!(outcome, Err(AppendError::Unknown(_))), "{outcome:?}");
    assert_eq!(log.head(), Position(1));
    assert!(log.health().unwrap_err().contains("does not sync"));
    disk.sync_fails.store(false, Ordering::SeqCst);
    let outcome = log.append(vec![message("alice", "bob", 3, "after")]).await;
    assert!(matches!(outcome, Err(AppendError::Failed(_))), "{outcome:?}");
    log.put_session(&phone(), at(0)).await.unwrap_err();
    drop(log);
    // Before or with the second message, but whole.
    let log = open(folder.path());
    let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
    let texts: Vec<&str> = page.entries.iter().map(|entry| entry.body.text()).collect();
    assert!(texts == ["before"] || texts == ["before", "unknown"], "{texts:?}");
}

#[tokio::test]
async fn a_disk_that_is_gone_ends_the_log_and_dropping_it_does_not_hang() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(FaultyDisk::default());
    let log = open_on(folder.path(), &disk);
    log.advance(advance(5));
    disk.broken.store(true, Ordering::SeqCst);
    let outcome = log.append(vec![message("alice", "bob", 1, "lost")]).await;
    assert!(matches!(outcome, Err(AppendError::Unknown(_) | AppendError::Failed(_))), "{outcome:?}");
    assert!(log.health().is_err());
    log.advance(advance(6));
    drop(log);
}

/// What may be done to a log.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Between two users, with a seq that is off by so much.
    Append(Vec<(u8, u8, u64)>),
    Advance(u8, bool, u64),
    Put(u8, Option<u64>),
    End(u8, u64),
    Delete(u8),
    /// One that edits or unsends an earlier one, or is withheld.
    Change(u8, u8, u8, u64),
    /// A user reads, blocks, hides or is seen.
    Peer(u8, u8, u8, u64),
    /// What is older than so many ms after the first.
    Remove(u64),
    Flush,
    Reopen,
    Crash,
}

pub(super) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let off = prop_oneof![9 => Just(0_u64), 1 => Just(1_u64)];
    let entry = (0..4_u8, 1..4_u8, off).prop_map(|(from, by, off)| (from, (from + by) % 4, off));
    let step = prop_oneof![
        6 => prop::collection::vec(entry, 1..6).prop_map(Step::Append),
        4 => (0..4_u8, any::<bool>(), 0..40_u64).prop_map(|(user, inbox, to)| Step::Advance(user, inbox, to)),
        2 => (0..4_u8, prop::option::of(0..40_u64)).prop_map(|(user, inbox)| Step::Put(user, inbox)),
        1 => (0..4_u8, 0..40_u64).prop_map(|(user, at_ms)| Step::End(user, at_ms)),
        1 => (0..4_u8).prop_map(Step::Delete),
        2 => (0..4_u8, 1..4_u8, 0..3_u8, 1..4_u64)
            .prop_map(|(from, by, what, target)| Step::Change(from, (from + by) % 4, what, target)),
        2 => (0..4_u8, 1..4_u8, 0..5_u8, 1..5_u64)
            .prop_map(|(user, by, what, seq)| Step::Peer(user, (user + by) % 4, what, seq)),
        1 => (0..6_u64).prop_map(Step::Remove),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..24)
}

fn nth_user(nth: u8) -> UserId {
    user(["a", "a-", "ab", "b"][usize::from(nth)])
}

fn nth_device(nth: u8) -> Device {
    Device { user: nth_user(nth), client_id: "\0".into() }
}

async fn step<L: Log>(log: &L, step: &Step) -> String {
    match step {
        Step::Append(entries) => {
            let mut heads: std::collections::BTreeMap<ConversationId, u64> = std::collections::BTreeMap::new();
            let mut batch = Vec::new();
            for (from, to, off) in entries {
                let (from, to) = (nth_user(*from), nth_user(*to));
                let conversation = ConversationId::between(&from, &to).unwrap();
                let before = match heads.get(&conversation) {
                    Some(seq) => *seq,
                    None => log.heads(vec![conversation.clone()]).await.unwrap()[0].map_or(0, |head| head.seq.get()),
                };
                heads.insert(conversation, before + 1);
                batch.push(message(from.as_str(), to.as_str(), before + 1 + off, "text"));
            }
            // The sentence tells kind and place of a conflict.
            append(log, batch).await.map_err(|error| error.to_string()).err().unwrap_or_default()
        }
        Step::Advance(nth, inbox, to) => {
            let side = if *inbox { Side::Inbox } else { Side::Sent };
            let stream = Stream { user: nth_user(*nth), side };
            log.advance(vec![Advance { stream, device: Some(nth_device(*nth)), position: Position(*to) }]);
            String::new()
        }
        Step::Put(nth, inbox) => {
            let filter = SubscriptionRecord {
                filter: format!("chat/{}/inbox", nth_user(*nth)),
                qos: 1,
                no_local: true,
                retain_as_published: false,
                identifier: None,
            };
            let inbox = inbox.map(Position);
            let record = SessionRecord {
                subscriptions: vec![filter],
                cursors: Cursors { inbox, ..Cursors::default() },
                ..SessionRecord::default()
            };
            log.put_session(&nth_device(*nth), record).await.unwrap();
            String::new()
        }
        Step::End(nth, at_ms) => {
            log.end_session(&nth_device(*nth), *at_ms, 3);
            String::new()
        }
        Step::Delete(nth) => {
            log.delete_session(&nth_device(*nth)).await.unwrap();
            String::new()
        }
        Step::Change(from, to, what, target) => {
            let (from, to) = (nth_user(*from), nth_user(*to));
            let conversation = ConversationId::between(&from, &to).unwrap();
            let next = log.heads(vec![conversation]).await.unwrap()[0].map_or(1, |head| head.seq.get() + 1);
            let target = Seq::new(*target).unwrap();
            let new = message(from.as_str(), to.as_str(), next, "withheld");
            let new = match what {
                0 => NewEntry { body: Body::Edit { target, text: "edited".into() }, ..new },
                1 => NewEntry { body: Body::Unsend { target }, ..new },
                _ => NewEntry { withheld: true, ..new },
            };
            format!("{:?}", append(log, vec![new]).await.unwrap())
        }
        Step::Peer(user, peer, what, seq) => {
            let (user, peer, seq) = (nth_user(*user), nth_user(*peer), Seq::new(*seq).unwrap());
            match what {
                0 => log.advance_read(&user, &peer, seq),
                1 => log.set_blocked(&user, &peer, Some(seq.get())).await.unwrap(),
                2 => log.set_blocked(&user, &peer, None).await.unwrap(),
                3 => log.hide(&user, &peer, seq).await.unwrap(),
                _ => log.note_seen(&user, seq.get()),
            }
            String::new()
        }
        Step::Remove(after) => log.remove_before(sent_at(*after)).await.unwrap().to_string(),
        Step::Flush | Step::Reopen | Step::Crash => {
            log.flush().await.unwrap();
            String::new()
        }
    }
}

/// All that can be read.
async fn everything<L: Log>(log: &L) -> Vec<String> {
    let mut read = vec![format!("{:?} {:?}", log.first(), log.head())];
    for nth in 0..4 {
        read.push(format!("{:?}", log.session(&nth_device(nth)).await.unwrap()));
        read.push(format!("{:?}", log.peers(&nth_user(nth)).await.unwrap()));
        read.push(format!("{:?}", log.last_seen(&nth_user(nth)).await.unwrap()));
        for side in [Side::Inbox, Side::Sent] {
            let stream = Stream { user: nth_user(nth), side };
            read.push(format!("{:?}", log.delivered(&stream).await.unwrap()));
            for after in [0, 3] {
                let limit = ReadLimit { entries: 4, bytes: 1_000 };
                read.push(format!("{:?}", log.read(&stream, Position(after), limit).await.unwrap()));
            }
        }
        for other in nth + 1..4 {
            let conversation = ConversationId::between(&nth_user(nth), &nth_user(other)).unwrap();
            read.push(format!("{:?}", log.heads(vec![conversation.clone()]).await.unwrap()));
            let targets = [1, 2, 3].map(|seq| Seq::new(seq).unwrap());
            read.push(format!("{:?}", log.changes(&conversation, targets.to_vec()).await.unwrap()));
            read.push(format!("{:?}", log.first_after(&conversation, Position(4)).await.unwrap()));
            let (one, two) = (nth_user(nth), nth_user(other));
            read.push(format!("{:?}", log.hidden(&one, &two, targets[0]..=targets[2]).await.unwrap()));
            read.push(format!("{:?}", log.peer(&two, &one).await.unwrap()));
            let accounts = vec![Account::Conversation(conversation.clone()), Account::Sender(nth_user(nth))];
            read.push(format!("{:?}", log.usage(accounts).await.unwrap()));
            read.push(format!("{:?}", log.read_conversation(&conversation, Seq::new(2), EVERYTHING).await.unwrap()));
            for from in [nth_user(nth), nth_user(other)] {
                let id = MessageId::parse("m-2").unwrap();
                let key = IdKey { conversation: conversation.clone(), from, id };
                read.push(format!("{:?}", log.find(vec![key]).await.unwrap()));
            }
        }
    }
    read
}

/// What can be opened again, after a stop or a crash.
pub(super) trait Reopened {
    fn open(&mut self) -> RedbLog;
    /// The process is killed, at a moment when nothing is under way; opened again.
    fn crash(&mut self, log: RedbLog) -> RedbLog;
}

/// Does the same to a log on disk and to the one in memory, and compares everything after each step.
pub(super) fn compare(steps: &[Step], mut on_disk: impl Reopened) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let model = MemoryLog::new();
        let mut log = Some(on_disk.open());
        for one in steps {
            match one {
                Step::Reopen => {
                    drop(log.take());
                    log = Some(on_disk.open());
                }
                Step::Crash => {
                    let before = log.take().expect("opened again");
                    before.flush().await.unwrap();
                    log = Some(on_disk.crash(before));
                }
                _ => {}
            }
            let log = log.as_ref().expect("opened again");
            assert_eq!(step(log, one).await, step(&model, one).await, "{one:?}");
            assert_eq!(everything(log).await, everything(&model).await, "{one:?}");
        }
    });
}

/// What the tools say of a log, as they print it.
pub(super) fn verified(folder: &Path) -> tools::Verified {
    tools::verify(folder, &mut |_, _| std::ops::ControlFlow::Continue(())).unwrap()
}

#[tokio::test]
async fn a_log_is_verified_and_what_is_wrong_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), 50).await;
    let sound = verified(folder.path());
    assert_eq!((sound.entries, sound.conversations, sound.indexed), (100, 2, 100));
    assert_eq!(sound.problems, Vec::<String>::new());
    change(folder.path(), |writing| {
        let mut rows = writing.open_table(schema::ROWS).unwrap();
        let (first, row) = {
            let last = rows.last().unwrap().unwrap();
            (last.0.value(), last.1.value().to_vec())
        };
        let mut damaged = row;
        *damaged.last_mut().unwrap() ^= 1;
        rows.insert(first, damaged.as_slice()).unwrap();
        let mut sessions = writing.open_table(schema::SESSIONS).unwrap();
        let key = schema::session_key(&phone());
        sessions.insert(key.as_slice(), record::encode_session(&key, &at(999)).as_slice()).unwrap();
    });
    let damaged = verified(folder.path());
    let said = damaged.problems.join("\n");
    for part in [
        "log.redb, table rows, key 100: the checksum does not match",
        "session of bob/phone: its cursor 999 is behind the end",
    ] {
        assert!(said.contains(part), "{part} is missing in:\n{said}");
    }
}

#[tokio::test]
async fn an_index_that_says_something_else_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), 20).await;
    // The log of another history, with the same secret: as long, but not the same.
    let secrets: Vec<u64> = {
        let database = Database::open(folder.path().join("log.redb")).unwrap();
        let meta = database.begin_read().unwrap().open_table(schema::META).unwrap();
        schema::SECRET_KEYS.iter().map(|key| meta.get(key).unwrap().unwrap().value()).collect()
    };
    let other = tempfile::tempdir().unwrap();
    drop(open(other.path()));
    change(other.path(), |writing| {
        let mut meta = writing.open_table(schema::META).unwrap();
        for (key, secret) in schema::SECRET_KEYS.iter().zip(&secrets) {
            meta.insert(key, secret).unwrap();
        }
    });
    fs::remove_file(index_of(other.path())).unwrap();
    let log = open(other.path());
    log.append((1..=40).map(|seq| message("eve", "bob", seq, "x")).collect::<Vec<_>>()).await.unwrap();
    drop(log);
    fs::copy(index_of(folder.path()), index_of(other.path())).unwrap();
    let said = verified(other.path()).problems.join("\n");
    assert!(said.contains("index.redb: what it says of entries 1 to "), "{said}");
}

#[tokio::test]
async fn a_backup_of_a_log_in_use_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (copy, restored) = (folder.path().join("copy"), folder.path().join("restored"));
    let log = Arc::new(RedbLog::open(folder.path().join("log"), SMALL).unwrap());
    log.put_session(&phone(), at(0)).await.unwrap();
    let writing = {
        let log = Arc::clone(&log);
        tokio::spawn(async move {
            for seq in 1..=300 {
                append(&*log, vec![message("alice", "bob", seq, &"x".repeat(2_000))]).await.unwrap();
            }
        })
    };
    let acknowledged = loop {
        let head = log.head().0;
        if head >= 50 {
            break head;
        }
        tokio::task::yield_now().await;
    };
    let copied = {
        let (log, copy) = (Arc::clone(&log), copy.clone());
        let go_on = |_, _| std::ops::ControlFlow::Continue(());
        tokio::task::spawn_blocking(move || log.backup(&copy, &mut { go_on })).await.unwrap().unwrap()
    };
    writing.await.unwrap();
    assert!((acknowledged..=300).contains(&copied), "{copied}");
    let again = log.backup(&copy, &mut |_, _| std::ops::ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(again, tools::ToolError::LogThere { .. }), "{again:?}");
    let identity = log.identity();
    drop(log);

    tools::restore(&copy, &restored, &mut |_, _| std::ops::ControlFlow::Continue(())).unwrap();
    let log = open(&restored);
    assert_eq!(log.head(), Position(copied));
    assert_ne!(log.identity(), identity, "nobody goes on here from where they were there");
    let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
    assert_eq!(page.entries.len() as u64, copied);
    assert!(log.session(&phone()).await.unwrap().is_some());
    let mut exported = 0;
    drop(log);
    let take = |entry: &Entry| {
        exported += 1;
        assert_eq!(entry.seq.get(), exported);
        Ok(())
    };
    tools::export(&restored, take, &mut |_, _| std::ops::ControlFlow::Continue(())).unwrap();
    assert_eq!(exported, copied);
    assert_eq!(open(&restored).shred().await.unwrap(), 0, "it has every table");
}

#[tokio::test]
async fn a_backup_that_is_broken_off_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let log = RedbLog::open(folder.path().join("log"), SMALL).unwrap();
    log.append(vec![message("alice", "bob", 1, "x")]).await.unwrap();
    let copy = folder.path().join("copy");
    let error = log.backup(&copy, &mut |_, _| std::ops::ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, tools::ToolError::Interrupted), "{error:?}");
    assert_eq!(fs::read_dir(&copy).unwrap().count(), 0);
}

#[tokio::test]
async fn compacting_gives_room_back_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let filled = fill(folder.path(), 100).await;
    let size = |name: &str| fs::metadata(folder.path().join(name)).unwrap().len();
    let before = size("log.redb") + size("index.redb");
    let bytes = tools::compact(folder.path(), &mut |_, _| std::ops::ControlFlow::Continue(())).unwrap();
    let after = size("log.redb") + size("index.redb");
    assert!(bytes > 0 && after < before, "{before} to {after}, {bytes} given back");
    assert_eq!(everything_of(&open(folder.path()), &["alice", "bob", "eve"]).await, filled);
    assert_eq!(verified(folder.path()).problems, Vec::<String>::new());
}

fn occurrences(file: &Path, words: &str) -> usize {
    fs::read(file).unwrap().windows(words.len()).filter(|window| *window == words.as_bytes()).count()
}

#[tokio::test]
async fn unsent_words_are_not_on_the_disk_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let files = ["log.redb", "log.journal"].map(|name| folder.path().join(name));
    let occurrences = |words: &str| -> usize { files.iter().map(|file| occurrences(file, words)).sum() };
    let words = "the words that must go";
    let log = open(folder.path());
    let mut seq = 0;
    let mut say = async |log: &RedbLog, body: Body| {
        seq += 1;
        log.append(vec![NewEntry { body, ..message("alice", "bob", seq, "") }]).await.unwrap();
        // Some come to the file one by one, some together.
        if seq % 4 < 2 {
            log.flush().await.unwrap();
        }
    };
    // Rows that were written anew with each further message leave copies behind.
    for nth in 0..60 {
        say(&log, if nth % 20 == 7 { format!("{words} {nth}").into() } else { "filler ".repeat(8).into() }).await;
    }
    say(&log, Body::Edit { target: Seq::new(28).unwrap(), text: format!("edited: {words}").into() }).await;
    assert!(files.iter().all(|file| super::tests::occurrences(file, words) > 0));
    assert!(occurrences(words) >= 4, "{}", occurrences(words));
    assert_eq!(log.shred().await.unwrap(), 0, "nothing is erased");
    for target in [8, 28] {
        say(&log, Body::Unsend { target: Seq::new(target).unwrap() }).await;
    }
    // A crash does not keep them, and neither does a backup that is being made.
    drop(log);
    let log = open(folder.path());
    let making = std::sync::mpsc::channel::<()>();
    let backup = {
        let shared = Arc::clone(&log.shared);
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let backup = std::thread::spawn(move || {
            let _kept = shared.snapshots.read();
            begun.send(()).unwrap();
            making.1.recv().unwrap();
        });
        has_begun.await.unwrap();
        backup
    };
    assert_eq!(log.shred().await.unwrap(), 0);
    making.0.send(()).unwrap();
    backup.join().unwrap();
    assert_eq!(log.shred().await.unwrap(), 3);
    assert_eq!(log.shred().await.unwrap(), 0);
    let rest = occurrences(words);
    let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
    assert_eq!(page.entries.iter().filter(|entry| entry.body.text().contains(words)).count(), 1);
    assert_eq!(occurrences(&format!("{words} 47")), rest, "only what nobody took back is left");
    assert_eq!(occurrences("edited: "), 0);
    log.append(vec![message("alice", "bob", 64, "on")]).await.unwrap();
    drop(log);
    assert_eq!(verified(folder.path()).problems, [""; 0]);
}

#[tokio::test]
async fn room_of_removed_entries_is_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let log = RedbLog::open(folder.path(), RedbOptions { flush_entries: 100, ..RedbOptions::default() }).unwrap();
    let size = || -> u64 {
        ["log.redb", "index.redb"].map(|name| fs::metadata(folder.path().join(name)).unwrap().len()).iter().sum()
    };
    let text = "x".repeat(1_000);
    let mut sizes = Vec::new();
    // Each round stores 2 MB and removes the 2 MB before.
    for round in 0..30 {
        for hundred in 0..20 {
            let first = round * 2_000 + hundred * 100 + 1;
            log.append((first..first + 100).map(|seq| message("alice", "bob", seq, &text)).collect::<Vec<_>>())
                .await
                .unwrap();
        }
        // Where rows begin depends on how many came together, and a file on where rows begin.
        log.flush().await.unwrap();
        while log.remove_before(sent_at((round * 2_000).saturating_sub(1))).await.unwrap() > 0 {}
        sizes.push(size());
    }
    // 44 MB were stored since.
    assert!(sizes[29] <= sizes[7] + (5 << 20), "{sizes:?}");
    assert!(sizes[29] < 24 << 20, "{sizes:?}");
    drop(log);
    assert_eq!(verified(folder.path()).problems, [""; 0]);
}

#[tokio::test]
async fn what_was_counted_is_right_after_counting_was_off() {
    let folder = tempfile::tempdir().unwrap();
    let accounts = || vec![Account::Sender(user("alice")), Account::Sender(user("bob"))];
    let usage = async |counts_usage| {
        let log = RedbLog::open(folder.path(), RedbOptions { flush_entries: 3, counts_usage, ..RedbOptions::DEFAULT });
        let log = log.unwrap();
        let head = log.heads(vec![ConversationId::parse("alice:bob").unwrap()]).await.unwrap()[0];
        let next = head.map_or(1, |head| head.seq.get() + 1);
        log.append((next..next + 10).map(|seq| message("alice", "bob", seq, "text")).collect::<Vec<_>>())
            .await
            .unwrap();
        log.remove_before(sent_at(next - next.min(3))).await.unwrap();
        log.usage(accounts()).await.map_err(|error| error.to_string())
    };
    let one = 4 + crate::log::MESSAGE_OVERHEAD_BYTES;
    assert_eq!(usage(true).await, Ok(vec![10 * one, 0]));
    let error = usage(false).await.unwrap_err();
    assert!(error.contains("looking up what is stored for 2 accounts"), "{error}");
    // 8 to 17 of the 20 before, and 10 more.
    assert_eq!(usage(true).await, Ok(vec![(30 - 17) * one, 0]));
    assert_eq!(verified(folder.path()).problems, [""; 0]);
}

/// While the file is written the journal takes more, and a reader finds it; a crash meanwhile loses nothing.
#[tokio::test(flavor = "multi_thread")]
async fn the_journal_goes_on_while_the_file_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(FaultyDisk::default());
    let log = Arc::new(open_on(folder.path(), &disk));
    let mut last = with_journal(&log).await;
    let length = || fs::metadata(folder.path().join("log.redb")).unwrap().len();
    let mut reads = 0;
    for round in 0..20_u64 {
        let before = length();
        disk.stall_file(Some(folder.path().join("log.redb")));
        log.advance(advance(last));
        let flushing = {
            let log = Arc::clone(&log);
            tokio::spawn(async move { log.flush().await })
        };
        disk.wait_for_a_stall();
        for _ in 0..20 + round {
            last += 1;
            log.append_in_place(vec![message("alice", "bob", last, "meanwhile")]).await.unwrap();
        }
        log.advance(advance(last));
        assert!(!flushing.is_finished());
        assert_eq!(log.head(), Position(last));
        // redb lets nobody read while a file that grows is synced.
        if length() == before {
            reads += 1;
            let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
            assert_eq!(page.entries.len() as u64, last);
            assert_eq!(log.delivered(&inbox("bob")).await.unwrap().position, Position(last));
        }
        let copy = crashed(folder.path());
        assert_eq!(open(copy.path()).head(), Position(last));
        disk.stall_file(None);
        flushing.await.unwrap().unwrap();
        let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
        assert_eq!(page.entries.len() as u64, last);
        assert_eq!(log.delivered(&inbox("bob")).await.unwrap().position, Position(last));
        let copy = crashed(folder.path());
        assert_eq!(open(copy.path()).head(), Position(last));
    }
    assert!(reads > 0);
    drop(log);
    assert_eq!(verified(folder.path()).problems, [""; 0]);
    fs::remove_file(folder.path().join("log.journal")).unwrap();
    assert_eq!(open(folder.path()).head(), Position(last));
}

/// The file cannot be written while the journal goes on: what the journal took is there, and the file gets it when it can be.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_full_beside_a_journal_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(FaultyDisk::default());
    let log = Arc::new(open_on(folder.path(), &disk));
    let mut last = with_journal(&log).await;
    // Room in the journal, and none in the file.
    for _ in 0..40 {
        last += 1;
        log.append_in_place(vec![message("alice", "bob", last, &"x".repeat(5_000))]).await.unwrap();
    }
    log.flush().await.unwrap();
    for _ in 0..20 {
        last += 1;
        log.append_in_place(vec![message("alice", "bob", last, &"x".repeat(5_000))]).await.unwrap();
    }
    log.advance(advance(last));
    disk.stall_file(Some(folder.path().join("log.redb")));
    let flushing = {
        let log = Arc::clone(&log);
        tokio::spawn(async move { log.flush().await })
    };
    disk.wait_for_a_stall();
    last += 1;
    log.append_in_place(vec![message("alice", "bob", last, "meanwhile")]).await.unwrap();
    log.advance(advance(last));
    disk.fail_stalled();
    disk.stall_file(None);
    assert!(flushing.await.unwrap().is_err());
    let refused = log.append_in_place(vec![message("alice", "bob", last + 1, "later")]).await;
    assert!(refused.is_err(), "{refused:?}: nobody knows what the file has");
    drop(log);
    let log = open(folder.path());
    assert_eq!(log.head(), Position(last));
    let page = log.read(&inbox("bob"), Position(0), EVERYTHING).await.unwrap();
    assert_eq!(page.entries.len() as u64, last);
    drop(log);
    assert_eq!(verified(folder.path()).problems, [""; 0]);
}

/// A log whose file is being written; what was noted before is on its way there.
async fn beside_a_commit(folder: &Path, note: impl FnOnce(&RedbLog)) -> (Arc<RedbLog>, Arc<FaultyDisk>, u64) {
    let disk = Arc::new(FaultyDisk::default());
    let log = Arc::new(open_on(folder, &disk));
    let last = with_journal(&log).await;
    log.put_session(&phone(), at(1)).await.unwrap();
    disk.stall_file(Some(folder.join("log.redb")));
    note(&log);
    let flushing = Arc::clone(&log);
    tokio::spawn(async move { flushing.flush().await });
    disk.wait_for_a_stall();
    (log, disk, last)
}

/// What was acknowledged before a message was stored does not come again after a crash, also if it is on its way to the file meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn what_goes_to_the_file_goes_along_with_a_message_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let (log, disk, last) = beside_a_commit(folder.path(), |log| {
        log.advance(advance(9));
        log.advance_read(&user("bob"), &user("alice"), Seq::new(5).unwrap());
        log.note_seen(&user("bob"), 7);
        log.end_session(&phone(), 8, 100);
    })
    .await;
    log.append_in_place(vec![message("alice", "bob", last + 1, "beside")]).await.unwrap();
    let copy = crashed(folder.path());
    disk.stall_file(None);
    drop(log);
    let log = open(copy.path());
    assert_eq!(log.head(), Position(last + 1));
    assert_eq!(log.delivered(&inbox("bob")).await.unwrap().position, Position(9));
    let session = log.session(&phone()).await.unwrap().unwrap();
    assert_eq!((session.cursors, session.ended_at_ms, session.expiry_s), (in_inbox(9), Some(8), 100));
    assert_eq!(log.peer(&user("bob"), &user("alice")).await.unwrap().unwrap().read, 5);
    assert_eq!(log.last_seen(&user("bob")).await.unwrap(), Some(7));
}

/// Nor if somebody waits for something that only the file can have.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_the_file_keeps_nothing_else_from_going_along() {
    let folder = tempfile::tempdir().unwrap();
    let (log, disk, last) = beside_a_commit(folder.path(), |log| log.note_seen(&user("bob"), 7)).await;
    let (alice, bob) = (user("alice"), user("bob"));
    let laptop = Device { user: bob.clone(), client_id: "laptop".into() };
    let waiting = async {
        tokio::join!(
            log.set_blocked(&bob, &alice, Some(3)),
            log.put_session(&laptop, at(2)),
            log.hide(&bob, &alice, Seq::FIRST)
        )
    };
    tokio::select! {
        biased;
        _ = waiting => panic!("the file is not written"),
        () = std::future::ready(()) => {}
    }
    log.advance(advance(9));
    log.advance_read(&bob, &alice, Seq::new(5).unwrap());
    log.append_in_place(vec![message("alice", "bob", last + 1, "beside")]).await.unwrap();
    let copy = crashed(folder.path());
    disk.stall_file(None);
    log.flush().await.unwrap();
    let whole = crashed(folder.path());
    drop(log);
    for (copy, blocked, session, hidden) in [(copy, None, None, 0), (whole, Some(3), Some(at(2)), 1)] {
        let log = open(copy.path());
        assert_eq!(log.head(), Position(last + 1));
        assert_eq!(log.delivered(&inbox("bob")).await.unwrap().position, Position(9));
        assert_eq!(log.session(&phone()).await.unwrap(), Some(at(9)));
        assert_eq!(log.session(&laptop).await.unwrap(), session);
        let peer = log.peer(&bob, &alice).await.unwrap().unwrap();
        assert_eq!((peer.read, peer.blocked_at_ms), (5, blocked));
        assert_eq!(log.hidden(&bob, &alice, Seq::FIRST..=Seq::FIRST).await.unwrap().len(), hidden);
    }
}

/// Whoever writes while the log is closed is refused, or finds everything again.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_closed_while_somebody_writes_keeps_what_it_took() {
    for _ in 0..100 {
        let folder = tempfile::tempdir().unwrap();
        let log = Arc::new(open(folder.path()));
        let mut last = with_journal(&log).await;
        let writing = {
            let (log, runtime) = (Arc::clone(&log), tokio::runtime::Handle::current());
            std::thread::spawn(move || {
                let (mut noted, mut kept) = (0, 0);
                loop {
                    if last % 16 == 0 {
                        log.advance(advance(last));
                        noted = last;
                    }
                    let appended = log.append_in_place(vec![message("alice", "bob", last + 1, "still")]);
                    if runtime.block_on(appended).is_err() {
                        return (last, kept);
                    }
                    last += 1;
                    kept = noted;
                }
            })
        };
        tokio::time::sleep(Duration::from_millis(3)).await;
        log.close();
        let (last, kept) = writing.join().unwrap();
        drop(log);
        let log = open(folder.path());
        assert_eq!(log.head(), Position(last));
        assert!(log.delivered(&inbox("bob")).await.unwrap().position >= Position(kept));
    }
}

/// redb lets nobody begin to read while a file that grows is synced. Whoever reads waits for that; who writes to the journal does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_read_that_waits_for_the_file_keeps_nobody_else_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(FaultyDisk::default());
    let log = Arc::new(open_on(folder.path(), &disk));
    let mut last = with_journal(&log).await;
    let length = || fs::metadata(folder.path().join("log.redb")).unwrap().len();
    let before = length();
    loop {
        for _ in 0..80 {
            last += 1;
            log.append_in_place(vec![message("alice", "bob", last, &"x".repeat(30_000))]).await.unwrap();
        }
        disk.stall_file(Some(folder.path().join("log.redb")));
        log.note_seen(&user("bob"), last);
        let flushing = Arc::clone(&log);
        tokio::spawn(async move { flushing.flush().await });
        disk.wait_for_a_stall();
        if length() > before {
            break;
        }
        disk.stall_file(None);
        log.flush().await.unwrap();
    }
    let reading = {
        let log = Arc::clone(&log);
        tokio::spawn(async move { log.peer(&user("bob"), &user("alice")).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    let appending = {
        let log = Arc::clone(&log);
        tokio::spawn(async move {
            log.note_seen(&user("bob"), last + 1);
            log.append_in_place(vec![message("alice", "bob", last + 1, "meanwhile")]).await
        })
    };
    let appended = tokio::time::timeout(Duration::from_secs(10), appending).await;
    disk.stall_file(None);
    appended.expect("it does not wait").unwrap().unwrap();
    assert!(reading.await.unwrap().unwrap().is_some());
    assert_eq!(log.last_seen(&user("bob")).await.unwrap(), Some(last + 1));
}
