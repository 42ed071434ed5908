//! What every log must do, as tests that run against any [`Log`].
//!
//! Each case starts from an empty [`Store`] and panics where the log breaks a promise of the trait.
//! [`log_conformance_tests!`](crate::log_conformance_tests) makes one test of every case; [`run`] runs them in one go.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;

use chat_protocol::{ConversationId, MessageId, Seq, Timestamp, UserId};
use tokio::task::JoinSet;

use super::{
    Account, Advance, AppendError, Body, ConversationHead, Cursors, Device, Entry, IdKey, Log, MESSAGE_OVERHEAD_BYTES,
    NewEntry, Page, PeerRecord, Position, ReadLimit, SessionRecord, Side, Stream, SubscriptionRecord,
};

/// A place for a log, empty at first.
pub trait Store {
    type Log: Log;

    /// Opens the log there, with what earlier logs of this store wrote. One is open at a time.
    fn open(&self) -> impl Future<Output = Self::Log>;
}

/// The cases, by name. Calls another macro with them: `$then! { ($with) case case … }`.
#[doc(hidden)]
#[macro_export]
macro_rules! for_each_log_case {
    ($then:path, ($($with:tt)*)) => {
        $then! {
            ($($with)*)
            an_empty_log_has_nothing
            positions_grow_and_entries_come_back_as_they_were
            an_empty_batch_is_nothing
            a_seq_that_is_not_next_is_refused
            a_refused_batch_leaves_nothing
            a_conversation_may_grow_within_a_batch
            heads_come_in_the_order_asked
            ids_find_their_entries
            an_id_names_its_first_entry
            streams_hold_a_users_side_only
            streams_of_similar_names_do_not_mix
            pages_keep_their_limits
            the_end_is_told_exactly
            an_observer_reads_everything
            conversations_are_read_by_seq
            a_read_sees_what_was_committed_before_it
            appends_to_many_conversations_at_once
            appends_to_one_conversation_at_once
            cursors_only_advance
            a_device_without_a_session_moves_the_users_cursor_only
            a_session_without_a_cursor_gets_none
            sessions_are_replaced_and_removed
            sessions_are_listed
            sessions_end
            client_ids_may_be_anything
            noted_changes_are_made_in_their_order
            old_entries_are_removed_from_the_beginning
            a_conversation_without_entries_goes_on
            entries_are_removed_while_others_are_appended
            what_is_removed_stays_removed
            usage_counts_what_is_stored
            a_conversation_is_one_of_both_users
            records_about_peers_are_kept
            what_is_withheld_is_in_the_conversation_only
            changes_are_found_by_their_target
            unsent_words_are_gone_and_the_entry_stays
            the_first_entry_after_a_position_is_found
            entries_survive
            cursors_and_sessions_survive
        }
    };
}

/// One `#[tokio::test]` per case, each with a store of its own from the expression.
#[macro_export]
macro_rules! log_conformance_tests {
    ($store:expr) => {
        $crate::for_each_log_case!($crate::log_conformance_test_each, ($store));
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! log_conformance_test_each {
    (($store:expr) $($case:ident)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $case() {
            $crate::log::conformance::$case(&$store).await;
        }
    )*};
}

macro_rules! run_each {
    (($store:ident) $($case:ident)*) => {$(
        $case(&$store()).await;
    )*};
}

/// Runs every case, each in a new store.
pub async fn run<S: Store>(new_store: impl Fn() -> S) {
    crate::for_each_log_case!(run_each, (new_store));
}

const EVERYTHING: ReadLimit = ReadLimit { entries: usize::MAX, bytes: usize::MAX };
/// Of each of the tasks that append at the same time.
const APPENDS_EACH: u64 = 20;
const APPENDING_TASKS: u64 = 8;

pub async fn an_empty_log_has_nothing(store: &impl Store) {
    let log = store.open().await;
    assert_eq!(log.head(), Position(0));
    assert_eq!(log.health(), Ok(()));
    assert_eq!(heads(&log, &["alice:bob"]).await, [None]);
    let nothing = Page { entries: Vec::new(), end: true };
    assert_eq!(log.read(&inbox("bob"), Position(0), EVERYTHING).await.expect("a page"), nothing);
    assert_eq!(log.read_conversation(&conversation("alice:bob"), None, EVERYTHING).await.expect("a page"), nothing);
    assert_eq!(delivered(&log, &inbox("bob")).await, Position(0));
    assert_eq!(session(&log, &device("bob", "phone")).await, None);
    assert!(log.heads(Vec::new()).await.expect("heads").is_empty());
    assert!(log.find(Vec::new()).await.expect("entries").is_empty());
    log.flush().await.expect("nothing to write");
}

pub async fn positions_grow_and_entries_come_back_as_they_were(store: &impl Store) {
    let log = store.open().await;
    let batch = vec![
        NewEntry { id: Some(id("m-1")), ..message("alice", "bob", 1, "hello") },
        message("bob", "alice", 2, ""),
        message("alice", "eve", 1, "línea\0\n🦀"),
        NewEntry { at: Timestamp::from_ms(0), ..message("eve", "alice", 2, &"x".repeat(100_000)) },
    ];
    let positions = append(&log, &batch).await;
    assert_eq!(positions.len(), batch.len());
    assert!(positions[0] > Position(0));
    assert!(positions.is_sorted_by(|a, b| a < b), "{positions:?}");
    assert_eq!(log.head(), positions[3]);
    let more = append(&log, &[message("alice", "bob", 3, "again")]).await;
    assert!(more[0] > positions[3]);
    assert_eq!(log.head(), more[0]);
    let stored: Vec<Entry> = batch.iter().zip(&positions).map(|(new, position)| stored(new, *position)).collect();
    let inbox_of_alice = read(&log, &inbox("alice"), Position(0)).await;
    assert_eq!(inbox_of_alice, [stored[1].clone(), stored[3].clone()]);
    let sent_to_eve = log.read_conversation(&conversation("alice:eve"), None, EVERYTHING).await.expect("a page");
    assert_eq!(sent_to_eve, Page { entries: vec![stored[2].clone(), stored[3].clone()], end: true });
}

pub async fn an_empty_batch_is_nothing(store: &impl Store) {
    let log = store.open().await;
    assert_eq!(append(&log, &[]).await, []);
    assert_eq!(log.head(), Position(0));
}

pub async fn a_seq_that_is_not_next_is_refused(store: &impl Store) {
    let log = store.open().await;
    refused(&log, &[message("alice", "bob", 2, "no first")], 2).await;
    append(&log, &[message("alice", "bob", 1, "first")]).await;
    for wrong in [1, 3, u64::MAX] {
        refused(&log, &[message("bob", "alice", wrong, "wrong")], wrong).await;
    }
    append(&log, &[message("bob", "alice", 2, "second")]).await;
    assert_eq!(texts(&log, "alice:bob").await, ["first", "second"]);
}

pub async fn a_refused_batch_leaves_nothing(store: &impl Store) {
    let log = store.open().await;
    append(&log, &[message("alice", "bob", 1, "first")]).await;
    let head = log.head();
    let with_id = NewEntry { id: Some(id("m-1")), ..message("alice", "eve", 1, "to eve") };
    refused(&log, &[with_id.clone(), message("alice", "bob", 2, "good"), message("bob", "alice", 2, "twice")], 2).await;
    refused(&log, &[with_id.clone(), message("alice", "bob", 2, "good"), message("bob", "alice", 4, "gap")], 4).await;
    assert_eq!(log.head(), head);
    assert_eq!(texts(&log, "alice:bob").await, ["first"]);
    assert_eq!(heads(&log, &["alice:eve"]).await, [None]);
    assert_eq!(read(&log, &inbox("eve"), Position(0)).await, []);
    assert_eq!(read(&log, &sent("alice"), Position(0)).await.len(), 1);
    assert_eq!(find(&log, &[("alice:eve", "alice", "m-1")]).await, [None]);
    let positions = append(&log, &[with_id]).await;
    assert!(positions[0] > head);
    assert_eq!(texts(&log, "alice:eve").await, ["to eve"]);
}

pub async fn a_conversation_may_grow_within_a_batch(store: &impl Store) {
    let log = store.open().await;
    let batch: Vec<_> = (1..=50).map(|seq| message("alice", "bob", seq, &seq.to_string())).collect();
    append(&log, &batch).await;
    let expected: Vec<String> = (1..=50).map(|seq| seq.to_string()).collect();
    assert_eq!(texts(&log, "alice:bob").await, expected);
}

pub async fn heads_come_in_the_order_asked(store: &impl Store) {
    let log = store.open().await;
    let at = |at, entry| NewEntry { at: Timestamp::from_ms(at), ..entry };
    append(&log, &[at(5, message("alice", "bob", 1, "a")), at(7, message("alice", "eve", 1, "b"))]).await;
    append(&log, &[at(9, message("bob", "alice", 2, "c"))]).await;
    let head = |seq: u64, at: u64| Some(ConversationHead { seq: number(seq), at: Timestamp::from_ms(at) });
    let found = heads(&log, &["alice:eve", "bob:eve", "alice:bob", "alice:eve"]).await;
    assert_eq!(found, [head(1, 7), None, head(2, 9), head(1, 7)]);
    let many = vec!["alice:bob"; 1_000];
    assert_eq!(heads(&log, &many).await, vec![head(2, 9); 1_000]);
}

pub async fn ids_find_their_entries(store: &impl Store) {
    let log = store.open().await;
    let with_id = |name: &str, entry| NewEntry { id: Some(id(name)), ..entry };
    let batch = [
        with_id("m-1", message("alice", "bob", 1, "alice's")),
        with_id("m-1", message("bob", "alice", 2, "bob's")),
        with_id("m-1", message("alice", "eve", 1, "to eve")),
        with_id("m-10", message("alice", "bob", 3, "longer id")),
        message("alice", "bob", 4, "no id"),
    ];
    let positions = append(&log, &batch).await;
    let entry = |index: usize| Some(stored(&batch[index], positions[index]));
    let asked = [
        ("alice:bob", "alice", "m-10"),
        ("alice:bob", "bob", "m-1"),
        ("alice:bob", "alice", "m-1"),
        ("alice:bob", "alice", "m"),
        ("alice:bob", "bob", "m-10"),
        ("alice:eve", "alice", "m-1"),
        ("alice:eve", "eve", "m-1"),
        ("bob:eve", "bob", "m-1"),
    ];
    let expected = [entry(3), entry(1), entry(0), None, None, entry(2), None, None];
    assert_eq!(find(&log, &asked).await, expected);
    let many: Vec<_> = std::iter::repeat_n(asked, 30).flatten().collect();
    let all: Vec<_> = std::iter::repeat_n(expected, 30).flatten().collect();
    assert_eq!(find(&log, &many).await, all);
}

pub async fn an_id_names_its_first_entry(store: &impl Store) {
    let log = store.open().await;
    let with_id = |seq| NewEntry { id: Some(id("m-1")), ..message("alice", "bob", seq, &seq.to_string()) };
    append(&log, &[with_id(1), with_id(2)]).await;
    append(&log, &[with_id(3)]).await;
    let found = find(&log, &[("alice:bob", "alice", "m-1")]).await;
    assert_eq!(found[0].as_ref().map(|entry| entry.seq), Some(number(1)));
}

pub async fn streams_hold_a_users_side_only(store: &impl Store) {
    let log = store.open().await;
    let batch = [
        message("alice", "bob", 1, "0"),
        message("bob", "alice", 2, "1"),
        message("eve", "bob", 1, "2"),
        message("alice", "eve", 1, "3"),
    ];
    let positions = append(&log, &batch).await;
    let expected = [
        (inbox("bob"), vec!["0", "2"]),
        (sent("bob"), vec!["1"]),
        (inbox("alice"), vec!["1"]),
        (sent("alice"), vec!["0", "3"]),
        (inbox("eve"), vec!["3"]),
        (sent("eve"), vec!["2"]),
    ];
    for (stream, texts) in expected {
        let entries = read(&log, &stream, Position(0)).await;
        let read: Vec<&str> = entries.iter().map(|entry| entry.body.text()).collect();
        assert_eq!(read, texts, "{stream}");
        assert!(entries.is_sorted_by_key(|entry| entry.position));
    }
    assert_eq!(read(&log, &inbox("bob"), positions[0]).await.len(), 1);
    assert_eq!(read(&log, &inbox("bob"), positions[1]).await.len(), 1);
    assert_eq!(read(&log, &inbox("bob"), positions[2]).await, []);
    assert_eq!(read(&log, &inbox("bob"), Position(u64::MAX)).await, []);
}

pub async fn streams_of_similar_names_do_not_mix(store: &impl Store) {
    let log = store.open().await;
    let names = ["a", "a-", "a0", "a_", "aa", "a-a"];
    for name in names {
        append(&log, &[message("zoe", name, 1, name), message(name, "zoe", 2, "back")]).await;
    }
    for name in names {
        let entries = read(&log, &inbox(name), Position(0)).await;
        assert_eq!(entries.iter().map(|entry| entry.body.text()).collect::<Vec<_>>(), [name]);
        let conversation = ConversationId::between(&user("zoe"), &user(name)).expect("two users");
        assert_eq!(texts(&log, &conversation.to_string()).await, [name, "back"]);
    }
}

pub async fn pages_keep_their_limits(store: &impl Store) {
    let log = store.open().await;
    let text = "x".repeat(100);
    let batch: Vec<_> = (1..=10).map(|seq| message("alice", "bob", seq, &text)).collect();
    append(&log, &batch).await;
    let cases = [
        (ReadLimit { entries: 3, bytes: usize::MAX }, 3..=3),
        (ReadLimit { entries: 1, bytes: usize::MAX }, 1..=1),
        (ReadLimit { entries: usize::MAX, bytes: 0 }, 1..=1),
        (ReadLimit { entries: usize::MAX, bytes: 1 }, 1..=1),
        (ReadLimit { entries: 0, bytes: 0 }, 1..=1),
        // "Roughly": one more or less is as good.
        (ReadLimit { entries: usize::MAX, bytes: 450 }, 3..=5),
        (ReadLimit { entries: 20, bytes: 100_000 }, 10..=10),
    ];
    for (limit, expected) in cases {
        let page = log.read(&inbox("bob"), Position(0), limit).await.expect("a page");
        assert!(expected.contains(&page.entries.len()), "{limit:?}: {} entries", page.entries.len());
        assert_eq!(page.end, page.entries.len() == 10, "{limit:?}");
        let page = log.read_conversation(&conversation("alice:bob"), None, limit).await.expect("a page");
        assert!(expected.contains(&page.entries.len()), "{limit:?}: {} entries", page.entries.len());
        assert_eq!(page.end, page.entries.len() == 10, "{limit:?}");
    }
}

pub async fn the_end_is_told_exactly(store: &impl Store) {
    let log = store.open().await;
    for seq in 1..=6 {
        // Other streams' entries between and after are no part of bob's.
        append(&log, &[message("alice", "bob", seq, "to bob"), message("alice", "eve", seq, "to eve")]).await;
    }
    let mut after = Position(0);
    for expected in [false, false, true] {
        let limit = ReadLimit { entries: 2, bytes: usize::MAX };
        let page = log.read(&inbox("bob"), after, limit).await.expect("a page");
        assert_eq!((page.entries.len(), page.end), (2, expected));
        after = page.entries[1].position;
    }
    let page = log.read(&inbox("bob"), after, EVERYTHING).await.expect("a page");
    assert_eq!(page, Page { entries: Vec::new(), end: true });
}

pub async fn an_observer_reads_everything(store: &impl Store) {
    let log = store.open().await;
    let of = |side| Stream { user: user("eve"), side };
    let (inboxes, sents) = (of(Side::EveryInbox), of(Side::EverySent));
    let page = log.read(&sents, Position(0), EVERYTHING).await.expect("a page");
    assert_eq!(page, Page { entries: Vec::new(), end: true });
    let mut positions = Vec::new();
    for seq in 1..=30 {
        let withheld = NewEntry { withheld: seq % 3 == 0, ..message("alice", "bob", seq, &"x".repeat(500)) };
        positions.extend(append(&log, &[withheld, message("carol", "dave", seq, "y")]).await);
    }
    for (stream, leaves_out) in [(&sents, false), (&inboxes, true)] {
        for entries in [1, 2, 7, 100] {
            let mut read = Vec::new();
            let limit = ReadLimit { entries, bytes: usize::MAX };
            loop {
                let after = read.last().map_or(Position(0), |entry: &Entry| entry.position);
                let page = log.read(stream, after, limit).await.expect("a page");
                assert!(page.end || page.entries.len() == entries, "a page is full unless it is the end");
                read.extend(page.entries);
                if page.end {
                    break;
                }
            }
            let expected: Vec<_> = log_of(&log, &["alice:bob", "carol:dave"]).await;
            let expected: Vec<_> = expected.into_iter().filter(|entry| !(leaves_out && entry.withheld)).collect();
            assert_eq!(read, expected, "{stream}, {entries} at once");
        }
    }
    let page = log.read(&sents, *positions.last().expect("entries"), EVERYTHING).await.expect("a page");
    assert_eq!(page, Page { entries: Vec::new(), end: true });
    // Its cursors are its own, also where it has a stream of the usual kind.
    let tail = Device { user: user("eve"), client_id: "tail".into() };
    let cursors = Cursors { every_inbox: Some(Position(0)), every_sent: Some(Position(4)), ..in_inbox(1) };
    log.put_session(&tail, SessionRecord { cursors, ..a_session() }).await.expect("a session");
    log.advance(vec![Advance { stream: inboxes.clone(), device: Some(tail.clone()), position: Position(9) }]);
    log.flush().await.expect("flushed");
    drop(log);
    let log = store.open().await;
    let cursors = log.session(&tail).await.expect("a session").expect("a session").cursors;
    assert_eq!(cursors, Cursors { every_inbox: Some(Position(9)), every_sent: Some(Position(4)), ..in_inbox(1) });
    assert_eq!(log.delivered(&of(Side::Inbox)).await.expect("a cursor").position, Position(0));
}

/// The entries of these conversations in the order of the log.
async fn log_of(log: &impl Log, conversations: &[&str]) -> Vec<Entry> {
    let mut all = Vec::new();
    for name in conversations {
        all.extend(log.read_conversation(&conversation(name), None, EVERYTHING).await.expect("a page").entries);
    }
    all.sort_by_key(|entry| entry.position);
    all
}

pub async fn conversations_are_read_by_seq(store: &impl Store) {
    let log = store.open().await;
    for seq in 1..=300 {
        let entry = if seq % 2 == 0 { message("bob", "alice", seq, "b") } else { message("alice", "bob", seq, "a") };
        append(&log, &[entry, message("alice", "bobby", seq, "other")]).await;
        if seq == 40 {
            // Numbers past a byte are tried with fewer commits.
            let rest: Vec<_> = (41..=300).map(|seq| message("alice", "bob", seq, "a")).collect();
            append(&log, &rest).await;
            break;
        }
    }
    let all = log.read_conversation(&conversation("alice:bob"), None, EVERYTHING).await.expect("a page");
    assert!(all.end);
    assert_eq!(all.entries.iter().map(|entry| entry.seq.get()).collect::<Vec<_>>(), (1..=300).collect::<Vec<_>>());
    for after in [1, 39, 254, 255, 256, 299] {
        let limit = ReadLimit { entries: 1, bytes: usize::MAX };
        let page = log.read_conversation(&conversation("alice:bob"), Some(number(after)), limit).await.expect("a page");
        assert_eq!(page.entries.iter().map(|entry| entry.seq.get()).collect::<Vec<_>>(), [after + 1]);
        assert_eq!(page.end, after == 299);
    }
    for after in [300, 301, u64::MAX] {
        let page = log.read_conversation(&conversation("alice:bob"), Some(number(after)), EVERYTHING).await;
        assert_eq!(page.expect("a page"), Page { entries: Vec::new(), end: true });
    }
}

pub async fn a_read_sees_what_was_committed_before_it<S: Store>(store: &S) {
    let log = Arc::new(store.open().await);
    let mut tasks = JoinSet::new();
    for writer in 0..APPENDING_TASKS {
        let log = Arc::clone(&log);
        tasks.spawn(async move {
            let from = format!("writer-{writer}");
            for seq in 1..=APPENDS_EACH {
                let position = append(&*log, &[message(&from, "bob", seq, &from)]).await[0];
                assert!(log.head() >= position, "the head is behind an answered append");
                let page = read(&*log, &inbox("bob"), Position(position.0 - 1)).await;
                assert_eq!(
                    page.first().map(|entry| (entry.position, entry.body.text())),
                    Some((position, from.as_str()))
                );
                let head = log.head();
                let all = read(&*log, &inbox("bob"), Position(0)).await;
                assert!(all.last().expect("entries").position >= head, "a read does not reach the head");
                let mut seqs: BTreeMap<&str, u64> = BTreeMap::new();
                for entry in &all {
                    let seq = seqs.entry(entry.from.as_str()).or_default();
                    *seq += 1;
                    assert_eq!(entry.seq.get(), *seq, "a read has a hole");
                }
            }
        });
    }
    finish(tasks).await;
}

pub async fn appends_to_many_conversations_at_once<S: Store>(store: &S) {
    let log = Arc::new(store.open().await);
    let mut tasks = JoinSet::new();
    for writer in 0..APPENDING_TASKS {
        let log = Arc::clone(&log);
        tasks.spawn(async move {
            let from = format!("writer-{writer}");
            for seq in 1..=APPENDS_EACH {
                append(&*log, &[message(&from, "bob", 2 * seq - 1, "a"), message("bob", &from, 2 * seq, "b")]).await;
            }
        });
    }
    finish(tasks).await;
    for writer in 0..APPENDING_TASKS {
        assert_eq!(texts(&*log, &format!("bob:writer-{writer}")).await, ["a", "b"].repeat(20));
    }
    let all = read(&*log, &inbox("bob"), Position(0)).await;
    assert_eq!(all.len() as u64, APPENDING_TASKS * APPENDS_EACH);
    assert!(all.is_sorted_by(|a, b| a.position < b.position));
}

pub async fn appends_to_one_conversation_at_once<S: Store>(store: &S) {
    let log = Arc::new(store.open().await);
    let mut tasks = JoinSet::new();
    for writer in 0..APPENDING_TASKS {
        let log = Arc::clone(&log);
        tasks.spawn(async move {
            for turn in 0..APPENDS_EACH {
                // Another writer may be first; then the head has moved.
                loop {
                    let head = heads(&*log, &["alice:bob"]).await[0].map_or(0, |head| head.seq.get());
                    let text = format!("{writer}.{turn}");
                    match log.append(vec![message("alice", "bob", head + 1, &text)]).await {
                        Ok(_) => break,
                        Err(AppendError::Conflict { .. }) => {
                            let now = heads(&*log, &["alice:bob"]).await[0].map_or(0, |head| head.seq.get());
                            assert!(now > head, "a conflict, but the head is where it was");
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        });
    }
    finish(tasks).await;
    let all = log.read_conversation(&conversation("alice:bob"), None, EVERYTHING).await.expect("a page").entries;
    let count = APPENDING_TASKS * APPENDS_EACH;
    assert_eq!(all.iter().map(|entry| entry.seq.get()).collect::<Vec<_>>(), (1..=count).collect::<Vec<_>>());
    assert!(all.is_sorted_by(|a, b| a.position < b.position));
    assert_eq!(all.iter().map(|entry| entry.body.text()).collect::<BTreeSet<_>>().len() as u64, count);
}

pub async fn cursors_only_advance(store: &impl Store) {
    let log = store.open().await;
    let phone = device("bob", "phone");
    let record =
        SessionRecord { cursors: Cursors { sent: Some(Position(0)), ..in_inbox(3) }, ..SessionRecord::default() };
    log.put_session(&phone, record).await.expect("a session");
    for (to, expected) in [(5, 5), (4, 5), (0, 5), (6, 6)] {
        log.advance(vec![advance(&inbox("bob"), Some(&phone), to)]);
        assert_eq!(delivered(&log, &inbox("bob")).await, Position(expected));
        assert_eq!(session(&log, &phone).await.expect("a session").cursors.inbox, Some(Position(expected)));
        if to == 4 {
            log.flush().await.expect("cursors on disk");
        }
    }
    log.advance(vec![
        advance(&inbox("bob"), None, 9),
        advance(&inbox("bob"), None, 8),
        advance(&sent("bob"), Some(&phone), 2),
        advance(&inbox("eve"), None, 1),
    ]);
    assert_eq!(delivered(&log, &inbox("bob")).await, Position(9));
    assert_eq!(delivered(&log, &sent("bob")).await, Position(2));
    assert_eq!(delivered(&log, &inbox("eve")).await, Position(1));
    assert_eq!(delivered(&log, &sent("eve")).await, Position(0));
    let record = session(&log, &phone).await.expect("a session");
    assert_eq!((record.cursors.inbox, record.cursors.sent), (Some(Position(6)), Some(Position(2))));
    log.advance(Vec::new());
}

pub async fn a_device_without_a_session_moves_the_users_cursor_only(store: &impl Store) {
    let log = store.open().await;
    let phone = device("bob", "phone");
    log.advance(vec![advance(&inbox("bob"), Some(&phone), 5)]);
    assert_eq!(delivered(&log, &inbox("bob")).await, Position(5));
    assert_eq!(session(&log, &phone).await, None);
    log.flush().await.expect("cursors on disk");
    assert_eq!(session(&log, &phone).await, None);
    // A session made later stands where it says.
    let record = SessionRecord { cursors: in_inbox(2), ..SessionRecord::default() };
    log.put_session(&phone, record.clone()).await.expect("a session");
    assert_eq!(session(&log, &phone).await, Some(record));
}

pub async fn a_session_without_a_cursor_gets_none(store: &impl Store) {
    let log = store.open().await;
    let phone = device("bob", "phone");
    let record = SessionRecord { cursors: in_inbox(0), ..SessionRecord::default() };
    log.put_session(&phone, record).await.expect("a session");
    for _ in 0..2 {
        log.advance(vec![advance(&sent("bob"), Some(&phone), 5), advance(&inbox("bob"), Some(&phone), 4)]);
        let record = session(&log, &phone).await.expect("a session");
        assert_eq!((record.cursors.inbox, record.cursors.sent), (Some(Position(4)), None));
        assert_eq!(delivered(&log, &sent("bob")).await, Position(5));
        log.flush().await.expect("cursors on disk");
    }
}

pub async fn sessions_are_replaced_and_removed(store: &impl Store) {
    let log = store.open().await;
    let (phone, laptop) = (device("bob", "phone"), device("bob", "laptop"));
    let first = SessionRecord { cursors: in_inbox(8), expiry_s: 60, ..a_session() };
    log.put_session(&phone, first.clone()).await.expect("a session");
    log.put_session(&laptop, a_session()).await.expect("a session");
    assert_eq!(session(&log, &phone).await, Some(first));
    // Cursors are replaced too, backwards as well.
    log.advance(vec![advance(&inbox("bob"), Some(&phone), 20)]);
    let second = SessionRecord { cursors: in_inbox(1), ..SessionRecord::default() };
    log.put_session(&phone, second.clone()).await.expect("a session");
    assert_eq!(session(&log, &phone).await, Some(second.clone()));
    log.flush().await.expect("cursors on disk");
    assert_eq!(session(&log, &phone).await, Some(second.clone()));
    log.delete_session(&phone).await.expect("removed");
    assert_eq!(session(&log, &phone).await, None);
    log.delete_session(&phone).await.expect("removing nothing is no failure");
    log.advance(vec![advance(&inbox("bob"), Some(&phone), 30)]);
    log.end_session(&phone, 1, 1);
    log.flush().await.expect("cursors on disk");
    assert_eq!(session(&log, &phone).await, None);
    assert_eq!(session(&log, &laptop).await, Some(a_session()));
    log.put_session(&phone, second.clone()).await.expect("a session");
    assert_eq!(session(&log, &phone).await, Some(second));
}

pub async fn sessions_are_listed(store: &impl Store) {
    let log = store.open().await;
    let list = async |user: Option<&str>| {
        let user = user.map(self::user);
        let mut found = log.sessions(user.as_ref()).await.expect("a list");
        found.sort_by_key(|(device, _)| device.to_string());
        found.into_iter().map(|(device, record)| (device.to_string(), record.expiry_s)).collect::<Vec<_>>()
    };
    assert_eq!(list(None).await, []);
    let with_expiry = |expiry_s| SessionRecord { expiry_s, ..a_session() };
    for (user, client_id, expiry_s) in [("bob", "phone", 1), ("bob", "laptop", 2), ("bobby", "phone", 3), ("b", "", 4)]
    {
        log.put_session(&device(user, client_id), with_expiry(expiry_s)).await.expect("a session");
    }
    assert_eq!(list(Some("bob")).await, [("bob/laptop".to_owned(), 2), ("bob/phone".to_owned(), 1)]);
    // What is only noted counts as well.
    log.end_session(&device("bob", "phone"), 1_000, 5);
    log.delete_session(&device("bob", "laptop")).await.expect("removed");
    log.end_session(&device("b", ""), 1_000, 6);
    assert_eq!(list(Some("bob")).await, [("bob/phone".to_owned(), 5)]);
    assert_eq!(list(None).await, [("b/".to_owned(), 6), ("bob/phone".to_owned(), 5), ("bobby/phone".to_owned(), 3)]);
}

pub async fn sessions_end(store: &impl Store) {
    let log = store.open().await;
    let phone = device("bob", "phone");
    log.end_session(&phone, 1_000, 60);
    assert_eq!(session(&log, &phone).await, None);
    log.put_session(&phone, a_session()).await.expect("a session");
    log.end_session(&phone, 2_000, 120);
    let ended = SessionRecord { ended_at_ms: Some(2_000), expiry_s: 120, ..a_session() };
    assert_eq!(session(&log, &phone).await, Some(ended.clone()));
    log.flush().await.expect("noted sessions on disk");
    assert_eq!(session(&log, &phone).await, Some(ended));
    log.end_session(&phone, 1_500, u32::MAX);
    let again = SessionRecord { ended_at_ms: Some(1_500), expiry_s: u32::MAX, ..a_session() };
    assert_eq!(session(&log, &phone).await, Some(again));
}

pub async fn client_ids_may_be_anything(store: &impl Store) {
    let devices = [
        device("bob", ""),
        device("bob", "\0"),
        device("bob", "\0\0"),
        device("bob", "phone"),
        device("bob", "phone\0"),
        device("bob", "phone/2"),
        device("bob", "phon"),
        device("bob", "bob\0phone"),
        device("bob", "📱 de Bob: +#"),
        device("bob", &"x".repeat(65_535)),
        device("bobby", ""),
        device("b", "ob"),
    ];
    let record = |index: usize| SessionRecord { cursors: in_inbox(index as u64), ..a_session() };
    {
        let log = store.open().await;
        for (index, device) in devices.iter().enumerate() {
            assert_eq!(session(&log, device).await, None, "{device}");
            log.put_session(device, record(index)).await.expect("a session");
        }
        for (index, device) in devices.iter().enumerate() {
            assert_eq!(session(&log, device).await, Some(record(index)), "{device}");
        }
        log.delete_session(&devices[3]).await.expect("removed");
    }
    let log = store.open().await;
    for (index, device) in devices.iter().enumerate() {
        assert_eq!(session(&log, device).await, (index != 3).then(|| record(index)), "{device}");
    }
}

pub async fn noted_changes_are_made_in_their_order(store: &impl Store) {
    let log = store.open().await;
    let phone = device("bob", "phone");
    for round in 1..=20 {
        log.put_session(&phone, SessionRecord { cursors: in_inbox(round), ..SessionRecord::default() })
            .await
            .expect("a session");
        log.advance(vec![advance(&inbox("bob"), Some(&phone), 100)]);
        log.end_session(&phone, round, 9);
        let record = session(&log, &phone).await.expect("a session");
        assert_eq!((record.cursors.inbox, record.ended_at_ms, record.expiry_s), (Some(Position(100)), Some(round), 9));
        log.put_session(&phone, SessionRecord { cursors: in_inbox(0), ..SessionRecord::default() })
            .await
            .expect("a session");
        let record = session(&log, &phone).await.expect("a session");
        assert_eq!((record.cursors.inbox, record.ended_at_ms), (Some(Position(0)), None));
    }
}

pub async fn entries_survive(store: &impl Store) {
    let mut positions = Vec::new();
    for round in 0..3 {
        let log = store.open().await;
        assert_eq!(log.head(), positions.last().copied().unwrap_or_default());
        let head = heads(&log, &["alice:bob"]).await[0].map_or(0, |head| head.seq.get());
        assert_eq!(head, round * 2);
        refused(&log, &[message("alice", "bob", head + 2, "gap")], head + 2).await;
        let with_id = NewEntry { id: Some(id(&format!("m-{round}"))), ..message("alice", "bob", head + 1, "a") };
        positions.extend(append(&log, &[with_id, message("bob", "alice", head + 2, "b")]).await);
        assert!(positions.is_sorted_by(|a, b| a < b), "{positions:?}");
    }
    let log = store.open().await;
    assert_eq!(texts(&log, "alice:bob").await, ["a", "b"].repeat(3));
    let found = find(&log, &[("alice:bob", "alice", "m-1"), ("alice:bob", "alice", "m-3")]).await;
    assert_eq!(found[0].as_ref().map(|entry| entry.position), Some(positions[2]));
    assert_eq!(found[1], None);
    let read: Vec<Position> = read(&log, &inbox("bob"), Position(0)).await.iter().map(|entry| entry.position).collect();
    assert_eq!(read, [positions[0], positions[2], positions[4]]);
}

pub async fn cursors_and_sessions_survive(store: &impl Store) {
    let (phone, laptop, gone) = (device("bob", "phone"), device("bob", "laptop"), device("bob", "gone"));
    {
        let log = store.open().await;
        log.put_session(&phone, a_session()).await.expect("a session");
        log.put_session(&laptop, a_session()).await.expect("a session");
        log.put_session(&gone, a_session()).await.expect("a session");
        log.delete_session(&gone).await.expect("removed");
        log.advance(vec![advance(&inbox("bob"), Some(&phone), 50), advance(&sent("bob"), None, 60)]);
        log.end_session(&laptop, 5_000, 30);
        log.flush().await.expect("noted changes on disk");
    }
    let log = store.open().await;
    let moved = SessionRecord { cursors: in_inbox(50), ..a_session() };
    assert_eq!(session(&log, &phone).await, Some(moved));
    let ended = SessionRecord { ended_at_ms: Some(5_000), expiry_s: 30, ..a_session() };
    assert_eq!(session(&log, &laptop).await, Some(ended));
    assert_eq!(session(&log, &gone).await, None);
    assert_eq!(delivered(&log, &inbox("bob")).await, Position(50));
    assert_eq!(delivered(&log, &sent("bob")).await, Position(60));
    log.advance(vec![advance(&inbox("bob"), Some(&phone), 40)]);
    assert_eq!(delivered(&log, &inbox("bob")).await, Position(50));
}

/// A message of this day.
fn dated(from: &str, to: &str, seq: u64, day: u64) -> NewEntry {
    let id = Some(id(&format!("{from}-{seq}")));
    NewEntry { at: day_begins(day), id, ..message(from, to, seq, &format!("{from} {seq}")) }
}

/// So late that no id is too old to be found.
fn day_begins(day: u64) -> Timestamp {
    Timestamp::from_ms(4_000_000_000_000 + day * 86_400_000)
}

/// Removes all that is older; how many entries.
async fn remove_before(log: &impl Log, time: Timestamp) -> u64 {
    let mut removed = 0;
    loop {
        match log.remove_before(time).await.expect("removed") {
            0 => return removed,
            some => removed += some,
        }
    }
}

async fn usage(log: &impl Log, conversations: &[&str], senders: &[&str]) -> Vec<u64> {
    let conversations = conversations.iter().map(|name| Account::Conversation(conversation(name)));
    let senders = senders.iter().map(|name| Account::Sender(user(name)));
    log.usage(conversations.chain(senders).collect()).await.expect("counts")
}

pub async fn old_entries_are_removed_from_the_beginning(store: &impl Store) {
    let log = store.open().await;
    assert_eq!((log.first(), remove_before(&log, day_begins(9)).await), (Position(1), 0));
    let positions = append(
        &log,
        &[
            dated("alice", "bob", 1, 1),
            dated("alice", "eve", 1, 1),
            dated("bob", "alice", 2, 2),
            // The clock was wrong: what comes after is older, so this is, too.
            dated("eve", "bob", 1, 7),
            dated("alice", "bob", 3, 3),
            dated("alice", "bob", 4, 4),
            dated("eve", "alice", 2, 4),
        ],
    )
    .await;
    assert_eq!(remove_before(&log, day_begins(1)).await, 0);
    assert_eq!(remove_before(&log, day_begins(4)).await, 5);
    assert_eq!((log.first(), log.head()), (positions[5], positions[6]));
    assert_eq!(texts(&log, "alice:bob").await, ["alice 4"]);
    assert_eq!(texts(&log, "alice:eve").await, ["eve 2"]);
    assert_eq!(texts(&log, "bob:eve").await, [""; 0]);
    assert_eq!(read(&log, &inbox("bob"), Position(0)).await.len(), 1);
    assert_eq!(read(&log, &sent("alice"), Position(0)).await.len(), 1);
    assert_eq!(read(&log, &sent("bob"), Position(0)).await, []);
    let limit = ReadLimit { entries: 1, bytes: usize::MAX };
    let page = log.read(&inbox("alice"), Position(0), limit).await.expect("a page");
    assert_eq!((page.entries.len(), page.end), (1, true));
    let found = find(&log, &[("alice:bob", "alice", "alice-3"), ("alice:bob", "alice", "alice-4")]).await;
    assert_eq!(found.iter().map(Option::is_some).collect::<Vec<_>>(), [false, true]);
    for after in 0..4 {
        let after = Seq::new(after);
        let page = log.read_conversation(&conversation("alice:bob"), after, EVERYTHING).await.expect("a page");
        assert_eq!(page.entries.iter().map(|entry| entry.seq.get()).collect::<Vec<_>>(), [4]);
    }
    assert_eq!(remove_before(&log, day_begins(4)).await, 0);
    assert_eq!(remove_before(&log, day_begins(5)).await, 2);
    assert_eq!((log.first(), log.head()), (Position(positions[6].0 + 1), positions[6]));
}

pub async fn a_conversation_without_entries_goes_on(store: &impl Store) {
    let log = store.open().await;
    append(&log, &[dated("alice", "bob", 1, 1), dated("alice", "bob", 2, 1), dated("alice", "eve", 1, 3)]).await;
    remove_before(&log, day_begins(2)).await;
    let head = Some(ConversationHead { seq: number(2), at: day_begins(1) });
    assert_eq!(heads(&log, &["alice:bob", "bob:eve"]).await, [head, None]);
    refused(&log, &[dated("bob", "alice", 1, 3)], 1).await;
    // Everything, and then again.
    for round in 2..5 {
        append(&log, &[dated("bob", "alice", round + 1, round)]).await;
        remove_before(&log, day_begins(round + 1)).await;
        let head = Some(ConversationHead { seq: number(round + 1), at: day_begins(round) });
        assert_eq!(heads(&log, &["alice:bob"]).await, [head]);
        assert_eq!(texts(&log, "alice:bob").await, [""; 0]);
    }
}

pub async fn entries_are_removed_while_others_are_appended<S: Store>(store: &S) {
    let log = Arc::new(store.open().await);
    let mut tasks = JoinSet::new();
    for writer in 0..APPENDING_TASKS {
        let log = Arc::clone(&log);
        tasks.spawn(async move {
            let from = format!("writer-{writer}");
            for seq in 1..=APPENDS_EACH {
                let position = append(&*log, &[dated(&from, "bob", seq, seq)]).await[0];
                if seq % 4 == writer % 4 {
                    remove_before(&*log, day_begins(seq)).await;
                }
                let page = read(&*log, &inbox("bob"), Position(0)).await;
                assert!(page.last().is_none_or(|last| last.position >= position) || log.first() > position);
                assert!(page.is_sorted_by(|a, b| a.position < b.position));
                let name = format!("bob:{from}");
                let rest = log.read_conversation(&conversation(&name), None, EVERYTHING).await.expect("a page");
                let seqs: Vec<u64> = rest.entries.iter().map(|entry| entry.seq.get()).collect();
                let expected: Vec<u64> = (seq + 1 - seqs.len() as u64..=seq).collect();
                assert_eq!(seqs, expected, "a read has a hole");
            }
        });
    }
    finish(tasks).await;
    remove_before(&*log, day_begins(APPENDS_EACH + 1)).await;
    assert_eq!(read(&*log, &inbox("bob"), Position(0)).await, []);
    for writer in 0..APPENDING_TASKS {
        let head = heads(&*log, &[&format!("bob:writer-{writer}")]).await[0];
        assert_eq!(head.map(|head| head.seq.get()), Some(APPENDS_EACH));
    }
}

pub async fn what_is_removed_stays_removed(store: &impl Store) {
    let last = {
        let log = store.open().await;
        append(&log, &[dated("alice", "bob", 1, 1), dated("alice", "eve", 1, 1), dated("alice", "eve", 2, 3)]).await;
        assert_eq!(remove_before(&log, day_begins(2)).await, 2);
        log.head()
    };
    {
        let log = store.open().await;
        assert_eq!((log.first(), log.head()), (last, last));
        assert_eq!(heads(&log, &["alice:bob"]).await[0].map(|head| head.seq.get()), Some(1));
        assert_eq!(texts(&log, "alice:eve").await, ["alice 2"]);
        assert_eq!(remove_before(&log, day_begins(4)).await, 1);
    }
    let log = store.open().await;
    assert_eq!((log.first(), log.head()), (Position(last.0 + 1), last));
    assert_eq!(heads(&log, &["alice:eve"]).await[0].map(|head| head.seq.get()), Some(2));
    let next = append(&log, &[dated("alice", "eve", 3, 5), dated("alice", "bob", 2, 5)]).await;
    assert_eq!(next[0], Position(last.0 + 1));
    assert_eq!(read(&log, &sent("alice"), Position(0)).await.len(), 2);
}

pub async fn usage_counts_what_is_stored(store: &impl Store) {
    let message =
        |from, to, seq, day, text: &str| NewEntry { body: text.into(), withheld: false, ..dated(from, to, seq, day) };
    let bytes = |texts: &[&str]| texts.iter().map(|text| Body::from(*text).counted_bytes()).sum::<u64>();
    {
        let log = store.open().await;
        assert_eq!(usage(&log, &["alice:bob"], &["alice"]).await, [0, 0]);
        append(&log, &[message("alice", "bob", 1, 1, "one"), message("bob", "alice", 2, 2, "")]).await;
        append(&log, &[message("alice", "eve", 1, 2, "three"), message("alice", "bob", 3, 3, "four")]).await;
        assert_eq!(usage(&log, &["alice:bob"], &[]).await, [bytes(&["one", "", "four"])]);
        assert_eq!(
            usage(&log, &["alice:eve", "bob:eve"], &["alice", "bob", "eve"]).await,
            [bytes(&["three"]), 0, bytes(&["one", "three", "four"]), bytes(&[""]), 0]
        );
        remove_before(&log, day_begins(2)).await;
        assert_eq!(usage(&log, &["alice:bob"], &["alice"]).await, [bytes(&["", "four"]), bytes(&["three", "four"])]);
    }
    let log = store.open().await;
    assert_eq!(usage(&log, &["alice:bob"], &["alice"]).await, [bytes(&["", "four"]), bytes(&["three", "four"])]);
    append(&log, &[message("bob", "alice", 4, 4, "five")]).await;
    assert_eq!(usage(&log, &["alice:bob"], &["bob"]).await, [bytes(&["", "four", "five"]), bytes(&["", "five"])]);
    remove_before(&log, day_begins(5)).await;
    assert_eq!(usage(&log, &["alice:bob", "alice:eve"], &["alice", "bob"]).await, [0; 4]);
}

async fn peers(log: &impl Log, name: &str) -> Vec<(String, PeerRecord)> {
    let peers = log.peers(&user(name)).await.expect("peers");
    peers.into_iter().map(|(peer, record)| (peer.as_str().to_owned(), record)).collect()
}

pub async fn a_conversation_is_one_of_both_users(store: &impl Store) {
    let since = |position| PeerRecord { changed: Position(position), ..PeerRecord::default() };
    {
        let log = store.open().await;
        assert_eq!(peers(&log, "alice").await, []);
        append(&log, &[message("alice", "bob", 1, "a"), message("eve", "alice", 1, "b")]).await;
        append(&log, &[message("al", "bob", 1, "c"), message("bob", "alice", 2, "d")]).await;
        assert_eq!(peers(&log, "alice").await, [("bob".to_owned(), since(1)), ("eve".to_owned(), since(2))]);
    }
    let log = store.open().await;
    assert_eq!(peers(&log, "bob").await, [("al".to_owned(), since(3)), ("alice".to_owned(), since(1))]);
    assert_eq!(peers(&log, "al").await, [("bob".to_owned(), since(3))]);
    assert_eq!(log.peer(&user("eve"), &user("alice")).await.expect("a record"), Some(since(2)));
    assert_eq!(log.peer(&user("eve"), &user("bob")).await.expect("none"), None);
    remove_before(&log, Timestamp::from_ms(u64::MAX)).await;
    assert_eq!(peers(&log, "al").await, [("bob".to_owned(), since(3))], "also without entries");
}

pub async fn records_about_peers_are_kept(store: &impl Store) {
    let (alice, bob, eve) = (user("alice"), user("bob"), user("eve"));
    let of_alice;
    {
        let log = store.open().await;
        append(&log, &[message("alice", "bob", 1, "a"), message("alice", "bob", 2, "b")]).await;
        let head = log.head();
        log.advance_read(&bob, &alice, number(2));
        of_alice = PeerRecord { read: 2, blocked_at_ms: None, changed: head };
        assert_eq!(log.peer(&bob, &alice).await.expect("a record"), Some(of_alice));
        append(&log, &[message("alice", "bob", 3, "c")]).await;
        log.advance_read(&bob, &alice, number(1));
        assert_eq!(log.peer(&bob, &alice).await.expect("a record"), Some(of_alice), "only advances");
        let of_bob = PeerRecord { changed: Position(1), ..PeerRecord::default() };
        assert_eq!(log.peer(&alice, &bob).await.expect("a record"), Some(of_bob), "is bob's alone");
        log.set_blocked(&bob, &eve, Some(77)).await.expect("blocked");
        log.note_seen(&bob, 5_000);
        log.note_seen(&bob, 4_000);
        for seq in [2, 3, 2, 300] {
            log.hide(&bob, &alice, number(seq)).await.expect("hidden");
        }
        log.flush().await.expect("on disk");
    }
    let log = store.open().await;
    let blocked = PeerRecord { read: 0, blocked_at_ms: Some(77), changed: log.head() };
    assert_eq!(peers(&log, "bob").await, [("alice".to_owned(), of_alice), ("eve".to_owned(), blocked)]);
    assert_eq!(log.last_seen(&bob).await.expect("a time"), Some(5_000));
    assert_eq!(log.last_seen(&alice).await.expect("none"), None);
    let hidden = async |from, to| {
        let hidden = log.hidden(&bob, &alice, number(from)..=number(to)).await.expect("hidden");
        hidden.into_iter().map(|(seq, _)| seq.get()).collect::<Vec<_>>()
    };
    assert_eq!((hidden(1, 3).await, hidden(3, 1_000).await, hidden(4, 5).await), (vec![2, 3], vec![3, 300], vec![]));
    assert_eq!(log.hidden(&alice, &bob, number(1)..=number(9)).await.expect("hidden"), []);
    log.set_blocked(&bob, &eve, None).await.expect("no longer blocked");
    log.advance_read(&bob, &eve, number(9));
    let read = PeerRecord { read: 9, blocked_at_ms: None, changed: log.head() };
    assert_eq!(log.peer(&bob, &eve).await.expect("a record"), Some(read));
    let begun = append(&log, &[message("eve", "bob", 1, "a")]).await[0];
    let read = PeerRecord { changed: begun, ..read };
    assert_eq!(log.peer(&bob, &eve).await.expect("a record"), Some(read), "what is on record stays");
}

pub async fn what_is_withheld_is_in_the_conversation_only(store: &impl Store) {
    let log = store.open().await;
    let withheld = NewEntry { withheld: true, ..message("alice", "bob", 2, "b") };
    append(&log, &[message("alice", "bob", 1, "a"), withheld, message("alice", "bob", 3, "c")]).await;
    let seqs = |entries: &[Entry]| entries.iter().map(|entry| entry.seq.get()).collect::<Vec<_>>();
    assert_eq!(seqs(&read(&log, &inbox("bob"), Position(0)).await), [1, 3]);
    assert_eq!(seqs(&read(&log, &sent("alice"), Position(0)).await), [1, 2, 3]);
    let page = log.read_conversation(&conversation("alice:bob"), None, EVERYTHING).await.expect("a page");
    assert_eq!(page.entries.iter().map(|entry| entry.withheld).collect::<Vec<_>>(), [false, true, false]);
}

fn change(from: &str, to: &str, seq: u64, body: Body) -> NewEntry {
    NewEntry { body, ..message(from, to, seq, "") }
}

pub async fn changes_are_found_by_their_target(store: &impl Store) {
    let edit = |target, text: &str| Body::Edit { target: number(target), text: text.into() };
    {
        let log = store.open().await;
        append(&log, &[message("alice", "bob", 1, "a"), message("alice", "bob", 2, "b")]).await;
        append(&log, &[change("alice", "bob", 3, edit(1, "a2")), change("alice", "bob", 4, edit(2, "b2"))]).await;
        append(&log, &[message("alice", "eve", 1, "c"), change("alice", "eve", 2, edit(1, "c2"))]).await;
    }
    let log = store.open().await;
    append(&log, &[change("alice", "bob", 5, edit(1, "a3"))]).await;
    let targets = vec![number(1), number(2), number(3)];
    let changes = log.changes(&conversation("alice:bob"), targets).await.expect("changes");
    let bodies: Vec<Vec<Body>> =
        changes.into_iter().map(|changes| changes.into_iter().map(|entry| entry.body).collect()).collect();
    assert_eq!(bodies, [vec![edit(1, "a2"), edit(1, "a3")], vec![edit(2, "b2")], vec![]]);
}

pub async fn unsent_words_are_gone_and_the_entry_stays(store: &impl Store) {
    let long = "words that go ".repeat(100);
    let before;
    {
        let log = store.open().await;
        // Over several rows.
        let texts: Vec<NewEntry> = (1..=40).map(|seq| message("alice", "bob", seq, &long)).collect();
        append(&log, &texts).await;
        append(&log, &[message("alice", "eve", 1, "another 3"), message("alice", "eve", 2, "another")]).await;
        let edit = Body::Edit { target: number(3), text: "edited".into() };
        append(&log, &[change("alice", "bob", 41, edit)]).await;
        before = usage(&log, &["alice:bob"], &["alice"]).await;
        append(&log, &[change("alice", "bob", 42, Body::Unsend { target: number(3) })]).await;
        append(&log, &[change("alice", "bob", 43, Body::Unsend { target: number(40) })]).await;
        // There is nothing to take back; that is for others to refuse.
        append(&log, &[change("alice", "eve", 3, Body::Unsend { target: number(300) })]).await;
    }
    let log = store.open().await;
    let page = log.read_conversation(&conversation("alice:bob"), None, EVERYTHING).await.expect("a page");
    assert_eq!(page.entries.iter().map(|entry| entry.seq.get()).collect::<Vec<_>>(), (1..=43).collect::<Vec<_>>());
    for entry in &page.entries {
        let expected = match entry.seq.get() {
            3 | 40 => Body::Erased { bytes: long.len() as u64, target: None },
            41 => Body::Erased { bytes: 6, target: Some(number(3)) },
            42 => Body::Unsend { target: number(3) },
            43 => Body::Unsend { target: number(40) },
            _ => long.as_str().into(),
        };
        assert_eq!(entry.body, expected, "seq {}", entry.seq);
    }
    assert_eq!(texts(&log, "alice:eve").await, ["another 3", "another", ""]);
    let now = usage(&log, &["alice:bob"], &["alice"]).await;
    let added = MESSAGE_OVERHEAD_BYTES;
    assert_eq!(now, [before[0] + 2 * added, before[1] + 3 * added], "the room is still taken");
    let changes = log.changes(&conversation("alice:bob"), vec![number(3)]).await.expect("changes");
    assert_eq!(changes[0].iter().map(|entry| entry.seq.get()).collect::<Vec<_>>(), [41, 42]);
}

pub async fn the_first_entry_after_a_position_is_found(store: &impl Store) {
    let log = store.open().await;
    let mut positions = Vec::new();
    for seq in 1..=10 {
        positions.extend(append(&log, &[message("alice", "bob", seq, "a"), message("eve", "bob", seq, "b")]).await);
    }
    let first_after =
        async |name: &str, position| log.first_after(&conversation(name), position).await.expect("a seq").map(Seq::get);
    assert_eq!(first_after("alice:bob", Position(0)).await, Some(1));
    for (nth, position) in positions.iter().enumerate() {
        // Every other is alice's.
        let next = Some(nth as u64 / 2 + 2).filter(|seq| *seq <= 10);
        assert_eq!(first_after("alice:bob", *position).await, next, "after {position:?}");
    }
    assert_eq!(first_after("alice:eve", Position(0)).await, None);
}

fn user(name: &str) -> UserId {
    UserId::parse(name).expect("a user name")
}

fn id(id: &str) -> MessageId {
    MessageId::parse(id).expect("a message id")
}

fn number(seq: u64) -> Seq {
    Seq::new(seq).expect("a seq")
}

fn conversation(conversation: &str) -> ConversationId {
    ConversationId::parse(conversation).expect("a conversation")
}

fn inbox(name: &str) -> Stream {
    Stream { user: user(name), side: Side::Inbox }
}

fn sent(name: &str) -> Stream {
    Stream { user: user(name), side: Side::Sent }
}

fn device(name: &str, client_id: &str) -> Device {
    Device { user: user(name), client_id: client_id.into() }
}

/// Only a cursor in the inbox.
fn in_inbox(position: u64) -> Cursors {
    Cursors { inbox: Some(Position(position)), ..Cursors::default() }
}

fn a_session() -> SessionRecord {
    SessionRecord {
        subscriptions: vec![
            SubscriptionRecord {
                filter: "chat/bob/inbox".to_owned(),
                qos: 1,
                no_local: false,
                retain_as_published: true,
                identifier: Some(7),
            },
            SubscriptionRecord {
                filter: "x/#".to_owned(),
                qos: 2,
                no_local: true,
                retain_as_published: false,
                identifier: None,
            },
        ],
        expiry_s: u32::MAX,
        ended_at_ms: None,
        cursors: in_inbox(7),
    }
}

fn message(from: &str, to: &str, seq: u64, text: &str) -> NewEntry {
    let (from, to) = (user(from), user(to));
    NewEntry {
        conversation: ConversationId::between(&from, &to).expect("two users"),
        seq: number(seq),
        from,
        to,
        id: None,
        at: Timestamp::from_ms(1_795_456_800_000 + seq % 1_000),
        body: text.into(),
        withheld: false,
    }
}

fn stored(new: &NewEntry, position: Position) -> Entry {
    let NewEntry { conversation, seq, from, to, id, at, body, withheld } = new.clone();
    Entry { position, conversation, seq, from, to, id, at, body, withheld }
}

fn advance(stream: &Stream, device: Option<&Device>, to: u64) -> Advance {
    Advance { stream: stream.clone(), device: device.cloned(), position: Position(to) }
}

async fn append(log: &impl Log, batch: &[NewEntry]) -> Vec<Position> {
    log.append(batch.to_vec()).await.expect("stored")
}

async fn refused(log: &impl Log, batch: &[NewEntry], seq: u64) {
    match log.append(batch.to_vec()).await {
        Err(AppendError::Conflict { expected, .. }) => assert_eq!(expected, number(seq)),
        other => panic!("expected a conflict at seq {seq}, got {other:?}"),
    }
}

async fn heads(log: &impl Log, conversations: &[&str]) -> Vec<Option<ConversationHead>> {
    log.heads(conversations.iter().map(|name| conversation(name)).collect()).await.expect("heads")
}

async fn find(log: &impl Log, ids: &[(&str, &str, &str)]) -> Vec<Option<Entry>> {
    let key = |&(name, from, chosen): &(&str, &str, &str)| IdKey {
        conversation: conversation(name),
        from: user(from),
        id: id(chosen),
    };
    log.find(ids.iter().map(key).collect()).await.expect("entries")
}

async fn read(log: &impl Log, stream: &Stream, after: Position) -> Vec<Entry> {
    let page = log.read(stream, after, EVERYTHING).await.expect("a page");
    assert!(page.end, "an unlimited page is not the end");
    page.entries
}

async fn texts(log: &impl Log, name: &str) -> Vec<String> {
    let page = log.read_conversation(&conversation(name), None, EVERYTHING).await.expect("a page");
    page.entries.iter().map(|entry| entry.body.text().to_owned()).collect()
}

async fn delivered(log: &impl Log, stream: &Stream) -> Position {
    log.delivered(stream).await.expect("a cursor").position
}

async fn session(log: &impl Log, device: &Device) -> Option<SessionRecord> {
    log.session(device).await.expect("a session or none")
}

async fn finish(mut tasks: JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        ended.expect("no panic");
    }
}
