//! A log in memory, for tests: the trait's meaning in its simplest form.
//!
//! It keeps every promise of [`Log`] but one: nothing is on disk. A clone is another handle to the same log, which is how tests
//! "open it again", and [`MemoryLog::crash`] forgets what a disk might not have had. One lock guards everything and is never held across an await.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use chat_protocol::{ConversationId, Seq, Timestamp, UserId};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use super::{
    Account, Advance, AppendError, Body, ConversationHead, Delivered, Device, Entry, IdKey, Log, LogError, NewEntry,
    Page, PeerRecord, Position, ReadLimit, SessionRecord, Side, Stream,
};

/// A log without a disk.
#[derive(Clone, Debug, Default)]
pub struct MemoryLog {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// The entry at position p is at index p - 1, removed or not.
    entries: Vec<Entry>,
    /// So many at the beginning are removed.
    removed: usize,
    conversations: FxHashMap<ConversationId, Vec<Position>>,
    streams: FxHashMap<Stream, Vec<Position>>,
    ids: FxHashMap<IdKey, Vec<Position>>,
    hidden: BTreeMap<(UserId, UserId, Seq), Position>,
    records: Records,
    /// What a crash leaves of the records.
    written: Records,
}

/// What may be noted first and written later.
#[derive(Clone, Debug, Default)]
struct Records {
    delivered: FxHashMap<Stream, Delivered>,
    sessions: FxHashMap<Device, SessionRecord>,
    peers: BTreeMap<(UserId, UserId), PeerRecord>,
    seen: FxHashMap<UserId, u64>,
}

impl Records {
    /// A user's record about a peer, to be changed now.
    fn peer(&mut self, user: &UserId, peer: &UserId, head: Position) -> &mut PeerRecord {
        let record = self.peers.entry((user.clone(), peer.clone())).or_default();
        record.changed = head;
        record
    }
}

impl MemoryLog {
    /// An empty log.
    pub fn new() -> Self {
        Self::default()
    }

    /// Loses what was noted since the last [`Log::flush`], and nothing that was on disk when its call returned.
    pub fn crash(&self) {
        let mut state = self.state.lock();
        state.records = state.written.clone();
    }
}

impl State {
    /// `Err` with the entry that is not next in its conversation.
    fn check(&self, batch: &[NewEntry]) -> Result<(), AppendError> {
        let mut heads: FxHashMap<&ConversationId, u64> = FxHashMap::default();
        for new in batch {
            let head = heads
                .entry(&new.conversation)
                .or_insert_with(|| self.conversations.get(&new.conversation).map_or(0, |all| all.len() as u64));
            if new.seq.get() != *head + 1 {
                return Err(AppendError::Conflict { conversation: new.conversation.clone(), expected: new.seq });
            }
            *head += 1;
        }
        Ok(())
    }

    fn store(&mut self, new: NewEntry) -> Position {
        let position = Position(self.entries.len() as u64 + 1);
        let NewEntry { conversation, seq, from, to, id, at, body, withheld } = new;
        self.conversations.entry(conversation.clone()).or_default().push(position);
        if seq == Seq::FIRST {
            for pair in [(from.clone(), to.clone()), (to.clone(), from.clone())] {
                for records in [&mut self.records, &mut self.written] {
                    records.peers.entry(pair.clone()).or_default().changed = position;
                }
            }
        }
        let inbox = (!withheld).then_some((&to, Side::Inbox));
        for (user, side) in inbox.into_iter().chain([(&from, Side::Sent)]) {
            self.streams.entry(Stream { user: user.clone(), side }).or_default().push(position);
        }
        if let Some(id) = &id {
            let key = IdKey { conversation: conversation.clone(), from: from.clone(), id: id.clone() };
            self.ids.entry(key).or_default().push(position);
        }
        if let Body::Unsend { target } = body {
            for entry in self.entries.iter_mut().filter(|entry| entry.conversation == conversation) {
                if (entry.seq == target || entry.body.target() == Some(target))
                    && let Some(erased) = entry.body.erased()
                {
                    entry.body = erased;
                }
            }
        }
        self.entries.push(Entry { position, conversation, seq, from, to, id, at, body, withheld });
        position
    }

    fn entry(&self, position: Position) -> &Entry {
        let index = usize::try_from(position.0 - 1).expect("a position of ours counts entries in memory");
        &self.entries[index]
    }

    fn is_there(&self, position: Position) -> bool {
        position.0 > self.removed as u64
    }

    fn head(&self) -> Position {
        Position(self.entries.len() as u64)
    }

    /// `positions` are those still to be read.
    fn page(&self, positions: &[Position], limit: ReadLimit) -> Page {
        let mut page = Page { entries: Vec::new(), end: true };
        let mut bytes = 0;
        for position in positions.iter().filter(|position| self.is_there(**position)) {
            let entry = self.entry(*position);
            if !limit.has_room(page.entries.len(), bytes, entry.body.text().len()) {
                page.end = false;
                break;
            }
            bytes += entry.body.text().len();
            page.entries.push(entry.clone());
        }
        page
    }
}

impl Log for MemoryLog {
    async fn append(&self, batch: impl Into<Arc<Vec<NewEntry>>> + Send) -> Result<Vec<Position>, AppendError> {
        let batch = batch.into();
        let mut state = self.state.lock();
        state.check(&batch)?;
        Ok(batch.iter().map(|new| state.store(new.clone())).collect())
    }

    async fn heads(&self, conversations: Vec<ConversationId>) -> Result<Vec<Option<ConversationHead>>, LogError> {
        let state = self.state.lock();
        let head = |conversation: &ConversationId| {
            let entry = state.entry(*state.conversations.get(conversation)?.last()?);
            Some(ConversationHead { seq: entry.seq, at: entry.at })
        };
        Ok(conversations.iter().map(head).collect())
    }

    async fn find(&self, ids: Vec<IdKey>) -> Result<Vec<Option<Entry>>, LogError> {
        let state = self.state.lock();
        let find = |key: &IdKey| {
            let position = state.ids.get(key)?.iter().find(|position| state.is_there(**position))?;
            Some(state.entry(*position).clone())
        };
        Ok(ids.iter().map(find).collect())
    }

    async fn read(&self, stream: &Stream, after: Position, limit: ReadLimit) -> Result<Page, LogError> {
        let state = self.state.lock();
        let every;
        let positions = match stream.side {
            Side::Inbox | Side::Sent => state.streams.get(stream).map_or(&[][..], Vec::as_slice),
            Side::EveryInbox | Side::EverySent => {
                let meant = |entry: &&Entry| stream.side == Side::EverySent || !entry.withheld;
                every = state.entries.iter().filter(meant).map(|entry| entry.position).collect::<Vec<_>>();
                &every
            }
        };
        let rest = &positions[positions.partition_point(|position| *position <= after)..];
        Ok(state.page(rest, limit))
    }

    async fn read_conversation(
        &self,
        conversation: &ConversationId,
        after: Option<Seq>,
        limit: ReadLimit,
    ) -> Result<Page, LogError> {
        let state = self.state.lock();
        let positions = state.conversations.get(conversation).map_or(&[][..], Vec::as_slice);
        // Seqs have no gaps, so as many entries are to be skipped as the seq says.
        let skip = after.map_or(0, |seq| usize::try_from(seq.get()).unwrap_or(usize::MAX));
        Ok(state.page(&positions[skip.min(positions.len())..], limit))
    }

    fn head(&self) -> Position {
        self.state.lock().head()
    }

    fn first(&self) -> Position {
        Position(self.state.lock().removed as u64 + 1)
    }

    async fn remove_before(&self, time: Timestamp) -> Result<u64, LogError> {
        let mut state = self.state.lock();
        let there = state.removed;
        let old = state.entries[there..].iter().rposition(|entry| entry.at < time).map_or(0, |last| last + 1);
        state.removed += old;
        Ok(old as u64)
    }

    async fn usage(&self, accounts: Vec<Account>) -> Result<Vec<u64>, LogError> {
        let state = self.state.lock();
        let usage = |account: &Account| {
            let counts = |entry: &&Entry| match account {
                Account::Conversation(conversation) => entry.conversation == *conversation,
                Account::Sender(user) => entry.from == *user,
            };
            state.entries[state.removed..].iter().filter(counts).map(|entry| entry.body.counted_bytes()).sum()
        };
        Ok(accounts.iter().map(usage).collect())
    }

    fn advance(&self, advances: Vec<Advance>) {
        let mut state = self.state.lock();
        let moved = state.head();
        for Advance { stream, device, position } in advances {
            if let Some(session) = device.and_then(|device| state.records.sessions.get_mut(&device)) {
                session.advance(stream.side, position);
            }
            let delivered = state.records.delivered.entry(stream).or_default();
            if position > delivered.position {
                *delivered = Delivered { position, moved };
            }
        }
    }

    fn identity(&self) -> u64 {
        0
    }

    async fn delivered(&self, stream: &Stream) -> Result<Delivered, LogError> {
        Ok(self.state.lock().records.delivered.get(stream).copied().unwrap_or_default())
    }

    async fn session(&self, device: &Device) -> Result<Option<SessionRecord>, LogError> {
        Ok(self.state.lock().records.sessions.get(device).cloned())
    }

    async fn sessions(&self, user: Option<&UserId>) -> Result<Vec<(Device, SessionRecord)>, LogError> {
        let state = self.state.lock();
        let of_user = |(device, _): &(&Device, &SessionRecord)| user.is_none_or(|user| device.user == *user);
        let found = state.records.sessions.iter().filter(of_user);
        Ok(found.map(|(device, record)| (device.clone(), record.clone())).collect())
    }

    async fn put_session(&self, device: &Device, record: SessionRecord) -> Result<(), LogError> {
        let mut state = self.state.lock();
        state.written.sessions.insert(device.clone(), record.clone());
        state.records.sessions.insert(device.clone(), record);
        Ok(())
    }

    fn end_session(&self, device: &Device, ended_at_ms: u64, expiry_s: u32) {
        if let Some(session) = self.state.lock().records.sessions.get_mut(device) {
            session.ended_at_ms = Some(ended_at_ms);
            session.expiry_s = expiry_s;
        }
    }

    async fn delete_session(&self, device: &Device) -> Result<(), LogError> {
        let mut state = self.state.lock();
        state.written.sessions.remove(device);
        state.records.sessions.remove(device);
        Ok(())
    }

    async fn peers(&self, user: &UserId) -> Result<Vec<(UserId, PeerRecord)>, LogError> {
        let state = self.state.lock();
        let of_user = state.records.peers.iter().filter(|((me, _), _)| me == user);
        Ok(of_user.map(|((_, peer), record)| (peer.clone(), *record)).collect())
    }

    async fn peer(&self, user: &UserId, peer: &UserId) -> Result<Option<PeerRecord>, LogError> {
        Ok(self.state.lock().records.peers.get(&(user.clone(), peer.clone())).copied())
    }

    fn advance_read(&self, user: &UserId, peer: &UserId, seq: Seq) {
        let mut state = self.state.lock();
        let head = state.head();
        let before = state.records.peers.get(&(user.clone(), peer.clone())).map_or(0, |record| record.read);
        if seq.get() > before {
            state.records.peer(user, peer, head).read = seq.get();
        }
    }

    async fn set_blocked(&self, user: &UserId, peer: &UserId, at_ms: Option<u64>) -> Result<(), LogError> {
        let mut state = self.state.lock();
        let head = state.head();
        state.written.peer(user, peer, head).blocked_at_ms = at_ms;
        state.records.peer(user, peer, head).blocked_at_ms = at_ms;
        Ok(())
    }

    async fn hide(&self, user: &UserId, peer: &UserId, seq: Seq) -> Result<(), LogError> {
        let mut state = self.state.lock();
        let head = state.head();
        state.hidden.entry((user.clone(), peer.clone(), seq)).or_insert(head);
        Ok(())
    }

    async fn hidden(
        &self,
        user: &UserId,
        peer: &UserId,
        seqs: RangeInclusive<Seq>,
    ) -> Result<Vec<(Seq, Position)>, LogError> {
        let state = self.state.lock();
        let key = |seq: &Seq| (user.clone(), peer.clone(), *seq);
        let hidden = state.hidden.range(key(seqs.start())..=key(seqs.end()));
        Ok(hidden.map(|((.., seq), position)| (*seq, *position)).collect())
    }

    fn note_seen(&self, user: &UserId, at_ms: u64) {
        let mut state = self.state.lock();
        let seen = state.records.seen.entry(user.clone()).or_default();
        *seen = at_ms.max(*seen);
    }

    async fn last_seen(&self, user: &UserId) -> Result<Option<u64>, LogError> {
        Ok(self.state.lock().records.seen.get(user).copied())
    }

    async fn changes(&self, conversation: &ConversationId, targets: Vec<Seq>) -> Result<Vec<Vec<Entry>>, LogError> {
        let state = self.state.lock();
        let of = |target: &Seq| {
            let there = &state.entries[state.removed..];
            let changes = |entry: &&Entry| entry.conversation == *conversation && entry.body.target() == Some(*target);
            there.iter().filter(changes).cloned().collect()
        };
        Ok(targets.iter().map(of).collect())
    }

    async fn first_after(&self, conversation: &ConversationId, position: Position) -> Result<Option<Seq>, LogError> {
        let state = self.state.lock();
        let mut there = state.entries[state.removed..].iter();
        let first = there.find(|entry| entry.conversation == *conversation && entry.position > position);
        Ok(first.map(|entry| entry.seq))
    }

    async fn flush(&self) -> Result<(), LogError> {
        let mut state = self.state.lock();
        state.written = state.records.clone();
        Ok(())
    }

    fn health(&self) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::MemoryLog;
    use crate::log::conformance::Store;

    struct InMemory(MemoryLog);

    impl Store for InMemory {
        type Log = MemoryLog;

        async fn open(&self) -> MemoryLog {
            self.0.clone()
        }
    }

    crate::log_conformance_tests!(InMemory(MemoryLog::new()));
}
