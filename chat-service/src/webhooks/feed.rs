//! The messages of the log on their way to the receiver, for one kind of event.
//!
//! A feed has a window of entries: read from the log, not all posted. A conversation's entries are posted one after the other,
//! conversations side by side. Durable is the place before the window's first entry that is not done: after a crash everything behind it is
//! posted again, under the same ids. A post that is refused is tried again for ever; when the window is full of such, reading waits.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chat_protocol::{ConversationId, Seq, UserId};
use rustc_hash::FxHashMap;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{FAILURES_MAX, IN_FLIGHT_MAX, Pace, Post, now_ms};
use crate::envelope;
use crate::log::{
    Advance, Body, Cursors, Device, Entry, Log, LogError, Position, ReadLimit, SessionRecord, Side, Stream,
};
use crate::metrics::Metrics;

/// Entries in the window, and bytes of their texts.
const WINDOW_ENTRIES: usize = 16_384;
const WINDOW_BYTES: usize = 8 * 1024 * 1024;
/// Read from the log at once.
const PAGE: ReadLimit = ReadLimit { entries: 256, bytes: 256 * 1024 };
/// How long a failed read of the log waits before the next.
const READ_RETRY: Duration = Duration::from_secs(1);
/// A receiver who is connected may take so long to acknowledge a message before it counts as waiting.
const ACKNOWLEDGE_TIMEOUT_MS: u64 = 30_000;

/// Whose places are kept: a client identifier begins with a NUL, which none in MQTT has.
const KEEPER: &str = "webhooks";

/// What a feed posts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    /// Every entry.
    Stored,
    /// Texts whose receiver has no device there that takes them.
    Waiting,
}

impl Of {
    pub(super) const ALL: [Self; 2] = [Self::Stored, Self::Waiting];

    fn event(self) -> &'static str {
        match self {
            Self::Stored => "message.stored",
            Self::Waiting => "message.waiting",
        }
    }

    fn device(self) -> Device {
        let user = UserId::parse(KEEPER).expect("a name of letters");
        Device { user, client_id: format!("\0{}", self.event()).into() }
    }
}

pub(super) struct Feed<L, P> {
    pub(super) of: Of,
    pub(super) log: Arc<L>,
    pub(super) poster: Arc<P>,
    pub(super) is_connected: Box<dyn Fn(&UserId) -> bool + Send + Sync>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) pace: Pace,
}

/// Forgets how far a feed was that does not run any more: should it run again, it begins with what is stored then.
pub(super) async fn forget<L: Log>(log: &L, of: Of) {
    let device = of.device();
    let forgotten =
        async { if log.session(&device).await?.is_some() { log.delete_session(&device).await } else { Ok(()) } };
    if let Err(error) = forgotten.await {
        tracing::error!(%error, event = of.event(), "where the webhook was could not be forgotten");
    }
}

/// Entries between the durable place and the last that was read.
#[derive(Debug)]
struct Window {
    /// In their order; `true` once done.
    entries: VecDeque<(Position, bool)>,
    bytes: usize,
    read_to: Position,
    done_to: Position,
}

impl Window {
    fn new(from: Position) -> Self {
        Self { entries: VecDeque::new(), bytes: 0, read_to: from, done_to: from }
    }

    fn has_room(&self) -> bool {
        self.entries.len() < WINDOW_ENTRIES && self.bytes < WINDOW_BYTES
    }

    fn push(&mut self, entry: &Entry) {
        self.read_to = entry.position;
        self.bytes += entry.body.text().len();
        self.entries.push_back((entry.position, false));
    }

    fn done(&mut self, entry: &Entry) {
        if let Ok(at) = self.entries.binary_search_by_key(&entry.position, |(position, _)| *position) {
            self.entries[at].1 = true;
            self.bytes -= entry.body.text().len();
        }
        while let Some((position, true)) = self.entries.front() {
            self.done_to = *position;
            self.entries.pop_front();
        }
    }
}

/// A conversation's entries in the window that are not done.
#[derive(Debug, Default)]
struct Queue {
    entries: VecDeque<Entry>,
    failures: u32,
}

/// What to do with the first entry of a conversation.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Post,
    /// Nothing: it is not of this kind.
    Skip,
    /// Look again later.
    Hold,
}

type Posted = (ConversationId, Result<(), String>);

/// What a feed works on.
struct Work {
    window: Window,
    queues: FxHashMap<ConversationId, Queue>,
    /// Conversations whose first entry is to be looked at.
    due: VecDeque<ConversationId>,
    /// Conversations to be looked at later.
    later: BinaryHeap<Reverse<(Instant, ConversationId)>>,
    posts: JoinSet<Posted>,
    /// Failures in a row, of any conversation.
    failures: u32,
}

impl<L: Log, P: Post> Feed<L, P> {
    /// Posts until `stopped`. `committed` tells how far the log goes.
    pub(super) async fn run(self, committed: watch::Receiver<Position>, stopped: impl Future<Output = ()>) {
        tokio::select! {
            () = stopped => {}
            () = self.serve(committed) => {}
        }
    }

    async fn serve(&self, mut committed: watch::Receiver<Position>) {
        let from = loop {
            match self.begin().await {
                Ok(from) => break from,
                Err(error) => {
                    tracing::error!(%error, event = self.of.event(), "a webhook cannot begin; trying again");
                    tokio::time::sleep(READ_RETRY).await;
                }
            }
        };
        let mut work = Work {
            window: Window::new(from),
            queues: FxHashMap::default(),
            due: VecDeque::new(),
            later: BinaryHeap::new(),
            posts: JoinSet::new(),
            failures: 0,
        };
        let mut durable = from;
        loop {
            let head = *committed.borrow_and_update();
            let read = match self.fill(&mut work).await {
                Ok(()) => self.look(&mut work).await,
                Err(error) => Err(error),
            };
            let retry = read.is_err();
            if let Err(error) = read {
                tracing::error!(%error, event = self.of.event(), "the log could not be read; trying again");
            }
            if work.window.done_to > durable {
                durable = work.window.done_to;
                self.keep(durable);
            }
            self.metrics.webhook_lag(self.of.event(), head.0.saturating_sub(durable.0));
            let wake_at = work.later.peek().map(|Reverse((at, _))| *at);
            let wake_at = if retry { Some(Instant::now() + READ_RETRY) } else { wake_at };
            tokio::select! {
                Some(posted) = work.posts.join_next() => self.on_posted(&mut work, posted.ok()),
                changed = committed.changed(), if work.window.has_room() && !retry => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = sleep_until(wake_at) => work.wake(),
            }
        }
    }

    /// Where to begin: where it was, or at the end of the log if it never ran.
    async fn begin(&self) -> Result<Position, LogError> {
        let device = self.of.device();
        if let Some(position) = self.log.session(&device).await?.and_then(|session| session.cursors.every_sent) {
            return Ok(position);
        }
        let head = self.log.head();
        let cursors = Cursors { every_sent: Some(head), ..Cursors::default() };
        let session = SessionRecord { cursors, expiry_s: u32::MAX, ..SessionRecord::default() };
        self.log.put_session(&device, session).await?;
        Ok(head)
    }

    /// Written behind: at most a second of posts is made again after a crash.
    fn keep(&self, position: Position) {
        let device = self.of.device();
        let stream = Stream { user: device.user.clone(), side: Side::EverySent };
        self.log.advance(vec![Advance { stream, device: Some(device), position }]);
    }

    async fn fill(&self, work: &mut Work) -> Result<(), LogError> {
        let stream = Stream { user: self.of.device().user, side: Side::EverySent };
        while work.window.has_room() {
            let page = self.log.read(&stream, work.window.read_to, PAGE).await?;
            for entry in page.entries {
                work.window.push(&entry);
                let queue = work.queues.entry(entry.conversation.clone()).or_default();
                if queue.entries.is_empty() {
                    work.due.push_back(entry.conversation.clone());
                }
                queue.entries.push_back(entry);
            }
            if page.end {
                break;
            }
        }
        Ok(())
    }

    /// Looks at the conversations that are due, as long as there is room for posts.
    async fn look(&self, work: &mut Work) -> Result<(), LogError> {
        let limit = if work.failures < FAILURES_MAX { IN_FLIGHT_MAX } else { 1 };
        while work.posts.len() < limit
            && let Some(conversation) = work.due.front().cloned()
        {
            let Some(first) = work.queues.get(&conversation).and_then(|queue| queue.entries.front()) else {
                work.queues.remove(&conversation);
                work.due.pop_front();
                continue;
            };
            let entry = self.as_it_is_now(first).await?;
            let decision = match &entry {
                Some(entry) => self.decide(entry).await?,
                None => Decision::Skip,
            };
            work.due.pop_front();
            match (decision, entry) {
                (Decision::Skip, _) | (_, None) => work.first_is_done(&conversation),
                (Decision::Hold, _) => {
                    work.later.push(Reverse((Instant::now() + self.pace.look_interval, conversation)))
                }
                (Decision::Post, Some(entry)) => {
                    let (id, body) = (self.id(&entry), self.body(&entry));
                    let poster = Arc::clone(&self.poster);
                    work.posts.spawn(async move { (conversation, poster.post(id, body).await) });
                }
            }
        }
        Ok(())
    }

    /// The entry as the log has it now: it may have waited here for long, and been taken back or removed.
    async fn as_it_is_now(&self, entry: &Entry) -> Result<Option<Entry>, LogError> {
        let before = Seq::new(entry.seq.get() - 1);
        let limit = ReadLimit { entries: 1, bytes: usize::MAX };
        let page = self.log.read_conversation(&entry.conversation, before, limit).await?;
        Ok(page.entries.into_iter().next().filter(|now| now.seq == entry.seq))
    }

    async fn decide(&self, entry: &Entry) -> Result<Decision, LogError> {
        if self.of == Of::Stored {
            return Ok(Decision::Post);
        }
        // Who blocked the sender does not wait for it, and a text that was taken back is none any more.
        if entry.withheld || !matches!(entry.body, Body::Text(_)) {
            return Ok(Decision::Skip);
        }
        let inbox = Stream { user: entry.to.clone(), side: Side::Inbox };
        if self.log.delivered(&inbox).await?.position >= entry.position {
            return Ok(Decision::Skip);
        }
        let is_fresh = now_ms() < entry.at.as_ms().saturating_add(ACKNOWLEDGE_TIMEOUT_MS);
        Ok(if is_fresh && (self.is_connected)(&entry.to) { Decision::Hold } else { Decision::Post })
    }

    /// The same for every attempt, also after a restart.
    fn id(&self, entry: &Entry) -> String {
        format!("{}-{:x}-{}", self.of.event(), self.log.identity(), entry.position.0)
    }

    fn body(&self, entry: &Entry) -> Bytes {
        let envelope = envelope::encode_stored(entry);
        [br#"{"type":""#, self.of.event().as_bytes(), br#"","data":"#, &envelope, b"}"].concat().into()
    }

    /// `None`: the post's task panicked, which no post does; it is lost until the next start.
    fn on_posted(&self, work: &mut Work, posted: Option<Posted>) {
        let Some((conversation, outcome)) = posted else { return };
        let event = self.of.event();
        match outcome {
            Ok(()) => {
                self.metrics.webhook_posted(event);
                work.failures = 0;
                work.first_is_done(&conversation);
            }
            Err(reason) => {
                self.metrics.webhook_failed(event);
                work.failures = work.failures.saturating_add(1);
                let Some(queue) = work.queues.get_mut(&conversation) else { return };
                queue.failures = queue.failures.saturating_add(1);
                let wait = self.pace.back_off(queue.failures);
                let (failures, wait_ms) = (queue.failures, wait.as_millis());
                tracing::warn!(event, %conversation, %reason, failures, wait_ms, "a webhook was not taken");
                work.later.push(Reverse((Instant::now() + wait, conversation)));
            }
        }
    }
}

impl Work {
    /// The first entry of a conversation needs nothing more: the next one is due.
    fn first_is_done(&mut self, conversation: &ConversationId) {
        let Some(queue) = self.queues.get_mut(conversation) else { return };
        queue.failures = 0;
        if let Some(entry) = queue.entries.pop_front() {
            self.window.done(&entry);
        }
        if queue.entries.is_empty() {
            self.queues.remove(conversation);
        } else {
            self.due.push_back(conversation.clone());
        }
    }

    /// Moves what is due now to its place.
    fn wake(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((at, _))) = self.later.peek()
            && *at <= now
            && let Some(Reverse((_, conversation))) = self.later.pop()
        {
            self.due.push_back(conversation);
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chat_protocol::Timestamp;
    use parking_lot::Mutex;
    use tokio::sync::Notify;

    use super::*;
    use crate::log::{MemoryLog, NewEntry};

    const FAST: Pace = Pace { first_wait: Duration::from_micros(100), look_interval: Duration::from_millis(1) };

    /// Takes posts, with failures thrown in; checks that a conversation's come one at a time.
    #[derive(Default)]
    struct Receiver {
        taken: Mutex<Vec<(String, serde_json::Value)>>,
        under_way: Mutex<BTreeMap<String, usize>>,
        attempts: Mutex<u64>,
        /// Every so manieth attempt succeeds.
        succeeds_each: u64,
        got: Notify,
    }

    impl Post for Receiver {
        async fn post(&self, id: String, body: Bytes) -> Result<(), String> {
            let event: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
            let conversation = event["data"]["conversation"].as_str().expect("an envelope").to_owned();
            let before = self.under_way.lock().insert(conversation.clone(), 1);
            assert_eq!(before, None, "two posts of a conversation at a time");
            tokio::task::yield_now().await;
            self.under_way.lock().remove(&conversation);
            *self.attempts.lock() += 1;
            if !self.attempts.lock().is_multiple_of(self.succeeds_each) {
                return Err("not now".to_owned());
            }
            self.taken.lock().push((id, event));
            self.got.notify_one();
            Ok(())
        }
    }

    fn user(name: &str) -> UserId {
        UserId::parse(name).expect("a name")
    }

    fn text(from: &str, to: &str, seq: u64) -> NewEntry {
        let (from, to) = (user(from), user(to));
        NewEntry {
            conversation: ConversationId::between(&from, &to).expect("two users"),
            seq: Seq::new(seq).expect("not 0"),
            from,
            to,
            id: None,
            at: Timestamp::from_ms(now_ms()),
            body: "hello".into(),
            withheld: false,
        }
    }

    struct Setup {
        log: Arc<MemoryLog>,
        receiver: Arc<Receiver>,
        committed: watch::Sender<Position>,
        connected: Arc<Mutex<Vec<UserId>>>,
        /// How often somebody asked who is connected.
        looks: Arc<Mutex<u64>>,
    }

    impl Setup {
        fn new(succeeds_each: u64) -> Self {
            let receiver = Receiver { succeeds_each, ..Receiver::default() };
            Self {
                log: Arc::new(MemoryLog::new()),
                receiver: Arc::new(receiver),
                committed: watch::Sender::new(Position(0)),
                connected: Arc::default(),
                looks: Arc::default(),
            }
        }

        fn feed(&self, of: Of) -> Feed<MemoryLog, Receiver> {
            let (connected, looks) = (Arc::clone(&self.connected), Arc::clone(&self.looks));
            Feed {
                of,
                log: Arc::clone(&self.log),
                poster: Arc::clone(&self.receiver),
                is_connected: Box::new(move |user| {
                    *looks.lock() += 1;
                    connected.lock().contains(user)
                }),
                metrics: Arc::new(Metrics::new()),
                pace: FAST,
            }
        }

        async fn append(&self, entries: Vec<NewEntry>) {
            let positions = self.log.append(entries).await.expect("memory");
            self.committed.send_replace(*positions.last().expect("entries"));
        }

        /// Runs the feed until so many posts were taken.
        async fn run(&self, of: Of, taken: usize) {
            let running = tokio::spawn(self.feed(of).run(self.committed.subscribe(), std::future::pending()));
            while self.receiver.taken.lock().len() < taken {
                self.receiver.got.notified().await;
            }
            running.abort();
        }

        fn seqs(&self, conversation: &str) -> Vec<u64> {
            let taken = self.receiver.taken.lock();
            let of = taken.iter().filter(|(_, event)| event["data"]["conversation"] == conversation);
            of.map(|(_, event)| event["data"]["seq"].as_u64().expect("a seq")).collect()
        }
    }

    #[tokio::test]
    async fn every_entry_is_posted_in_the_order_of_its_conversation() {
        let setup = Setup::new(3);
        setup.feed(Of::Stored).begin().await.expect("memory");
        for seq in 1..=100 {
            setup.append(vec![text("alice", "bob", seq), text("carol", "dave", seq)]).await;
        }
        setup.run(Of::Stored, 200).await;
        for conversation in ["alice:bob", "carol:dave"] {
            assert_eq!(setup.seqs(conversation), (1..=100).collect::<Vec<_>>());
        }
    }

    #[tokio::test]
    async fn a_new_feed_begins_at_the_end_and_an_old_one_where_it_was() {
        let setup = Setup::new(1);
        setup.append(vec![text("alice", "bob", 1)]).await;
        setup.feed(Of::Stored).begin().await.expect("memory");
        setup.append((2..=30).map(|seq| text("alice", "bob", seq)).collect()).await;
        setup.run(Of::Stored, 10).await;
        setup.run(Of::Stored, 30).await;
        let seqs = setup.seqs("alice:bob");
        // What was under way when it stopped comes again, nothing is left out.
        let mut once = seqs.clone();
        once.dedup();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once, (2..=30).collect::<Vec<_>>());
        assert!(seqs.len() <= 31, "{seqs:?}");
        forget(&*setup.log, Of::Stored).await;
        assert_eq!(setup.feed(Of::Stored).begin().await.expect("memory"), Position(30));
    }

    #[tokio::test]
    async fn a_text_that_is_taken_back_while_its_post_fails_is_not_told() {
        #[derive(Default)]
        struct Down {
            bodies: Mutex<Vec<String>>,
            got: Notify,
        }
        impl Post for Down {
            async fn post(&self, _id: String, body: Bytes) -> Result<(), String> {
                self.bodies.lock().push(String::from_utf8_lossy(&body).into_owned());
                self.got.notify_one();
                Err("not now".to_owned())
            }
        }
        let setup = Setup::new(1);
        let poster = Arc::new(Down::default());
        let Feed { of, log, is_connected, metrics, pace, .. } = setup.feed(Of::Stored);
        let feed = Feed { of, log, poster: Arc::clone(&poster), is_connected, metrics, pace };
        feed.begin().await.expect("memory");
        setup.append(vec![text("alice", "bob", 1)]).await;
        let running = tokio::spawn(feed.run(setup.committed.subscribe(), std::future::pending()));
        poster.got.notified().await;
        let target = Seq::FIRST;
        setup.append(vec![NewEntry { body: Body::Unsend { target }, ..text("alice", "bob", 2) }]).await;
        // One may have been on its way.
        let attempts = poster.bodies.lock().len() + 1;
        while poster.bodies.lock().len() < attempts + 3 {
            poster.got.notified().await;
        }
        running.abort();
        let bodies = poster.bodies.lock();
        assert!(bodies[0].contains("hello"), "{bodies:?}");
        assert!(bodies[attempts..].iter().all(|body| !body.contains("hello")), "{bodies:?}");
    }

    #[tokio::test]
    async fn one_conversation_that_is_refused_holds_up_no_other() {
        #[derive(Default)]
        struct Picky {
            taken: Mutex<usize>,
            got: Notify,
        }
        impl Post for Picky {
            async fn post(&self, _id: String, body: Bytes) -> Result<(), String> {
                if body.windows(9).any(|part| part == b"alice:bob") {
                    return Err("never".to_owned());
                }
                *self.taken.lock() += 1;
                self.got.notify_one();
                Ok(())
            }
        }
        let setup = Setup::new(1);
        let poster = Arc::new(Picky::default());
        let Feed { of, log, is_connected, metrics, pace, .. } = setup.feed(Of::Stored);
        let feed = Feed { of, log, poster: Arc::clone(&poster), is_connected, metrics, pace };
        feed.begin().await.expect("memory");
        setup.append(vec![text("alice", "bob", 1)]).await;
        setup.append((1..=500).map(|seq| text("carol", "dave", seq)).collect()).await;
        let running = tokio::spawn(feed.run(setup.committed.subscribe(), std::future::pending()));
        while *poster.taken.lock() < 500 {
            poster.got.notified().await;
        }
        running.abort();
        let kept = setup.log.session(&Of::Stored.device()).await.expect("memory").expect("a session");
        assert_eq!(kept.cursors.every_sent, Some(Position(0)), "what was refused is not passed over");
    }

    #[tokio::test]
    async fn only_what_waits_is_told_as_waiting() {
        let setup = Setup::new(1);
        let feed = setup.feed(Of::Waiting);
        let decide = |entry: NewEntry| {
            let (setup, feed) = (&setup, &feed);
            async move {
                setup.append(vec![entry]).await;
                let stream = Stream { user: user("eve"), side: Side::EverySent };
                let page = setup.log.read(&stream, Position(setup.log.head().0 - 1), PAGE).await.expect("memory");
                feed.decide(&page.entries[0]).await.expect("memory")
            }
        };
        assert_eq!(decide(text("alice", "bob", 1)).await, Decision::Post, "nobody is there");
        setup.connected.lock().push(user("bob"));
        assert_eq!(decide(text("alice", "bob", 2)).await, Decision::Hold, "bob is there and may take it");
        let old = NewEntry { at: Timestamp::from_ms(now_ms() - 60_000), ..text("alice", "bob", 3) };
        assert_eq!(decide(old).await, Decision::Post, "bob's device does not take it");
        let inbox = Stream { user: user("bob"), side: Side::Inbox };
        setup.log.advance(vec![Advance { stream: inbox, device: None, position: Position(4) }]);
        setup.connected.lock().clear();
        assert_eq!(decide(text("alice", "bob", 4)).await, Decision::Skip, "bob has it");
        let withheld = NewEntry { withheld: true, ..text("alice", "bob", 5) };
        assert_eq!(decide(withheld).await, Decision::Skip, "bob does not want it");
        let target = Seq::FIRST;
        let edit = NewEntry { body: Body::Edit { target, text: "x".into() }, ..text("alice", "bob", 6) };
        assert_eq!(decide(edit).await, Decision::Skip);
    }

    #[tokio::test]
    async fn who_leaves_without_taking_it_is_waited_for_no_more() {
        let setup = Setup::new(1);
        setup.feed(Of::Waiting).begin().await.expect("memory");
        setup.connected.lock().push(user("bob"));
        setup.append(vec![text("alice", "bob", 1)]).await;
        let running = tokio::spawn(setup.feed(Of::Waiting).run(setup.committed.subscribe(), std::future::pending()));
        // Looked at several times.
        while *setup.looks.lock() < 5 {
            tokio::task::yield_now().await;
        }
        assert!(setup.receiver.taken.lock().is_empty());
        setup.connected.lock().clear();
        setup.receiver.got.notified().await;
        running.abort();
        assert_eq!(setup.seqs("alice:bob"), [1]);
    }

    #[test]
    fn a_window_is_done_up_to_its_first_gap() {
        let mut window = Window::new(Position(10));
        let entry = |position: u64| Entry {
            position: Position(position),
            conversation: ConversationId::parse("alice:bob").expect("valid"),
            seq: Seq::FIRST,
            from: user("alice"),
            to: user("bob"),
            id: None,
            at: Timestamp::from_ms(1),
            body: "hello".into(),
            withheld: false,
        };
        let entries: Vec<Entry> = [11, 12, 15].map(entry).into();
        entries.iter().for_each(|entry| window.push(entry));
        window.done(&entries[1]);
        assert_eq!(window.done_to, Position(10));
        window.done(&entries[0]);
        assert_eq!(window.done_to, Position(12));
        window.done(&entries[2]);
        assert_eq!((window.done_to, window.bytes, window.entries.len()), (Position(15), 0, 0));
    }
}
