//! The index: where a conversation's, a stream's and an id's entries are.
//!
//! The newest postings lie in memory ([`Recent`]): `active` grows with every commit, `frozen` is on its way to the disk. Everything before
//! is in runs in `index.redb`: each has the postings of entries that follow each other, sorted by key, packed into blocks, with a filter
//! that says which keys it has not. The [`super::indexer`] makes runs and merges them. Invariants: runs, frozen and active follow each
//! other without a gap; whoever looks takes all of them, and a snapshot of the file, at one moment. The index is a cache: it says where to
//! look, never what is there.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ::redb::{AccessGuard, Database, ReadOnlyTable, ReadTransaction, ReadableDatabase};
use chat_protocol::{Seq, Timestamp};
use parking_lot::{Condvar, Mutex, RwLock};

use super::super::{ConversationHead, Position};
use super::RedbOptions;
use super::filter::Filter;
use super::key::Key;
use super::posting::{BLOCK_KEY_BYTES, BlockKey, BlockReader, Last, ListRef, block_key, first_key};
use super::reader::ReadError;
use super::recent::{Posted, Recent};
use super::record::Broken;
use super::schema::{BLOCKS, META, USAGE, USAGE_KEYS};

/// The writer waits while the index on disk is so many flushes behind: with the default, at some 64 MB of postings.
const FLUSHES_BEHIND_MAX: usize = 4;

/// Between two looks at whether the indexer has done what was asked for.
const ASK_INTERVAL: Duration = Duration::from_millis(50);

/// A run of postings on disk.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) number: u32,
    /// How often its postings were merged.
    pub(super) level: u32,
    /// Positions of its first and last entry.
    pub(super) first: u64,
    pub(super) last: u64,
    /// The latest time of its entries, in milliseconds since the Unix epoch.
    pub(super) at_ms_max: u64,
    pub(super) keys: u64,
    pub(super) filter: Filter,
}

#[derive(Debug)]
struct State {
    active: Recent,
    frozen: Option<Arc<Recent>>,
    /// In the order of their positions.
    runs: Arc<[Arc<Run>]>,
}

impl State {
    /// Freezes what is active if it is enough and the place is free; `true` if so.
    fn freeze(&mut self, entries_min: usize) -> bool {
        let freezes = self.frozen.is_none() && self.active.entries() >= entries_min;
        if freezes {
            self.frozen = Some(Arc::new(std::mem::take(&mut self.active)));
        }
        freezes
    }
}

/// What the writer, the indexer and the remover tell each other.
#[derive(Debug, Default)]
pub(super) struct Signals {
    pub(super) closed: bool,
    /// Why the index cannot be written now.
    stuck: Option<String>,
    /// To be done by the indexer, which takes it away when it is.
    discount: Option<Arc<Discount>>,
}

/// Entries that are about to be removed: accounts and what to take off them, sorted.
#[derive(Debug)]
pub(super) struct Discount {
    pub(super) bytes: Vec<(Key, u64)>,
    /// Position of the first entry behind them.
    pub(super) end: u64,
}

#[derive(Debug)]
pub(super) struct Index {
    /// `None` once closed.
    pub(super) database: RwLock<Option<Database>>,
    state: RwLock<State>,
    signals: Mutex<Signals>,
    to_indexer: Condvar,
    to_writer: Condvar,
    /// Postings in memory go to the disk once they are of so many entries.
    flush_entries: usize,
    /// Position of the log's first entry: what is before is removed for certain.
    first: AtomicU64,
    pub(super) counts_usage: bool,
}

/// Where in a list to begin.
#[derive(Clone, Copy, Debug)]
pub(super) enum After {
    Position(u64),
    /// For conversations.
    Seq(u64),
}

impl After {
    /// Positions of entries that are not removed.
    fn rest<'a>(&self, list: &ListRef<'a>, first: u64) -> &'a [u64] {
        let rest = self.behind(list);
        &rest[rest.partition_point(|position| *position < first)..]
    }

    fn behind<'a>(&self, list: &ListRef<'a>) -> &'a [u64] {
        let had = match self {
            Self::Position(after) => list.positions.partition_point(|position| position <= after),
            Self::Seq(after) => {
                let had = after.saturating_add(1).saturating_sub(list.first_seq());
                usize::try_from(had).unwrap_or(usize::MAX).min(list.positions.len())
            }
        };
        &list.positions[had..]
    }

    /// No later list has what comes next.
    fn order(&self) -> u64 {
        match self {
            Self::Position(after) | Self::Seq(after) => after.saturating_add(1),
        }
    }

    fn may_be_in(&self, run: &Run, first: u64) -> bool {
        let may_be = match self {
            Self::Position(after) => run.last > *after,
            Self::Seq(_) => true,
        };
        may_be && run.last >= first
    }
}

pub(super) fn head(last: Last) -> Option<ConversationHead> {
    Some(ConversationHead { seq: Seq::new(last.seq)?, at: Timestamp::from_ms(last.at_ms) })
}

impl Index {
    /// `first`: position of the log's first entry.
    pub(super) fn new(database: Database, runs: Vec<Run>, first: Position, options: &RedbOptions) -> Self {
        Self {
            database: RwLock::new(Some(database)),
            state: RwLock::new(State {
                active: Recent::default(),
                frozen: None,
                runs: runs.into_iter().map(Arc::new).collect(),
            }),
            signals: Mutex::default(),
            to_indexer: Condvar::new(),
            to_writer: Condvar::new(),
            flush_entries: options.flush_entries,
            first: AtomicU64::new(first.0),
            counts_usage: options.counts_usage,
        }
    }

    // ---- looking ------------------------------------------------------------------------------------------------------

    /// Heads of conversations.
    pub(super) fn heads(&self, keys: &[Key]) -> Result<Vec<Option<ConversationHead>>, ReadError> {
        let state = self.state.read();
        let mut heads: Vec<Option<ConversationHead>> = keys
            .iter()
            .map(|key| state.active.head(*key).or_else(|| state.frozen.as_ref().and_then(|frozen| frozen.head(*key))))
            .collect();
        let wanted = |key: Key| state.runs.iter().any(|run| run.filter.may_have(key));
        if !keys.iter().zip(&heads).any(|(key, head)| head.is_none() && wanted(*key)) {
            return Ok(heads);
        }
        let (runs, blocks) = (Arc::clone(&state.runs), self.blocks()?);
        drop(state);
        for (key, head) in keys.iter().zip(&mut heads).filter(|(_, head)| head.is_none()) {
            for run in runs.iter().rev().filter(|run| run.filter.may_have(*key)) {
                if let Some(found) = blocks.head(run.number, *key)? {
                    *head = Some(found);
                    break;
                }
            }
        }
        Ok(heads)
    }

    /// Positions of a key from `first` on, in their order: as many as wanted, or all there are.
    pub(super) fn positions(
        &self,
        key: Key,
        after: After,
        first: Position,
        wanted: usize,
    ) -> Result<Vec<u64>, ReadError> {
        let first = first.0;
        let state = self.state.read();
        let newest: Vec<u64> = state
            .active
            .get(key)
            .map_or(&[][..], |list| after.rest(&list, first))
            .iter()
            .copied()
            .take(wanted)
            .collect();
        let frozen = state.frozen.clone();
        let runs: Vec<Arc<Run>> =
            state.runs.iter().filter(|run| after.may_be_in(run, first) && run.filter.may_have(key)).cloned().collect();
        let blocks = if runs.is_empty() { None } else { Some(self.blocks()?) };
        drop(state);

        let mut found = Vec::new();
        if let Some(blocks) = blocks {
            for run in runs {
                blocks.lists(run.number, key, after.order(), |list| {
                    found.extend_from_slice(after.rest(&list, first));
                    if found.len() < wanted { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                })?;
                if found.len() >= wanted {
                    break;
                }
            }
        }
        if let Some(list) = frozen.as_ref().and_then(|frozen| frozen.get(key)) {
            found.extend_from_slice(after.rest(&list, first));
        }
        found.extend(newest);
        found.truncate(wanted);
        Ok(found)
    }

    /// The positions if memory alone knows them all, and there are no more than `most`; else `None`.
    pub(super) fn positions_at_hand(&self, key: Key, after: After, first: Position, most: usize) -> Option<Vec<u64>> {
        let first = first.0;
        let state = self.state.read();
        if state.runs.iter().any(|run| after.may_be_in(run, first) && run.filter.may_have(key)) {
            return None;
        }
        let frozen = state.frozen.as_ref().and_then(|frozen| frozen.get(key));
        let lists = [frozen, state.active.get(key)];
        let found = || lists.iter().flatten().flat_map(|list| after.rest(list, first)).copied();
        (found().count() <= most).then(|| found().collect())
    }

    /// The seq of a conversation's first entry after a position.
    pub(super) fn first_after(&self, key: Key, after: Position, first: Position) -> Result<Option<u64>, ReadError> {
        let after = after.0.max(first.0 - 1);
        let seq = |list: &ListRef<'_>| {
            let had = list.positions.partition_point(|position| *position <= after);
            (had < list.positions.len()).then(|| list.first_seq() + had as u64)
        };
        let state = self.state.read();
        let newest = state.active.get(key).and_then(|list| seq(&list));
        let frozen = state.frozen.clone();
        let runs: Vec<Arc<Run>> =
            state.runs.iter().filter(|run| run.last > after && run.filter.may_have(key)).cloned().collect();
        let blocks = if runs.is_empty() { None } else { Some(self.blocks()?) };
        drop(state);
        for run in runs {
            let mut found = None;
            if let Some(blocks) = &blocks {
                blocks.lists(run.number, key, 0, |list| {
                    found = seq(&list);
                    if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })?;
            }
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(frozen.and_then(|frozen| seq(&frozen.get(key)?)).or(newest))
    }

    /// What is stored for accounts, by their keys.
    pub(super) fn usage(&self, keys: &[Key]) -> Result<Vec<u64>, ReadError> {
        let state = self.state.read();
        let active: Vec<u64> = keys.iter().map(|key| state.active.bytes(*key)).collect();
        let frozen = state.frozen.clone();
        let snapshot = self.snapshot()?;
        drop(state);
        // What is frozen may be on disk already.
        let end = snapshot.open_table(META)?.get(USAGE_KEYS[1])?.map(|end| end.value());
        let end = end.ok_or_else(|| Broken::at("meta", USAGE_KEYS[1].as_bytes(), "it is missing"))?;
        let frozen = frozen.filter(|frozen| frozen.range().1 >= end);
        let usage = snapshot.open_table(USAGE)?;
        let add = |(key, active): (&Key, u64)| {
            let stored = usage.get(&key.to_bytes())?.map_or(0, |bytes| bytes.value());
            Ok(stored + frozen.as_ref().map_or(0, |frozen| frozen.bytes(*key)) + active)
        };
        keys.iter().zip(active).map(add).collect()
    }

    /// Reads of the blocks as they are now. Whoever holds the state knows that its runs are there.
    fn blocks(&self) -> Result<Blocks, ReadError> {
        Ok(Blocks(self.snapshot()?.open_table(BLOCKS)?))
    }

    pub(super) fn snapshot(&self) -> Result<ReadTransaction, ReadError> {
        let database = self.database.read();
        let database = database.as_ref().ok_or_else(|| ReadError::Closed("the index is closed".to_owned()))?;
        Ok(database.begin_read()?)
    }

    // ---- the writer's side --------------------------------------------------------------------------------------------

    /// Takes entries that were committed. Wakes the indexer once there are enough of them.
    pub(super) fn add(&self, posted: &[Posted]) {
        let mut state = self.state.write();
        posted.iter().for_each(|posted| state.active.add(posted));
        let frozen = state.freeze(self.flush_entries);
        drop(state);
        self.wake_indexer(frozen);
    }

    /// Signals are never locked while the state is: who waits looks at the state with the signals locked.
    fn wake_indexer(&self, frozen: bool) {
        if frozen {
            let signals = self.signals.lock();
            self.to_indexer.notify_one();
            drop(signals);
        }
    }

    /// Waits until the index has caught up far enough. `Err` with the reason if it cannot be written now.
    pub(super) fn wait_for_room(&self) -> Result<(), String> {
        if self.has_room() {
            return Ok(());
        }
        let mut signals = self.signals.lock();
        loop {
            if let Some(reason) = &signals.stuck {
                return Err(reason.clone());
            }
            if signals.closed || self.has_room() {
                return Ok(());
            }
            self.to_writer.wait(&mut signals);
        }
    }

    /// Whether [`Index::wait_for_room`] would not wait.
    pub(super) fn has_room(&self) -> bool {
        // Another flush is frozen.
        self.state.read().active.entries() < self.flush_entries * (FLUSHES_BEHIND_MAX - 1)
    }

    // ---- the remover's side -------------------------------------------------------------------------------------------

    /// Waits until everything up to a position is on disk. `Err` with the reason if that cannot be now.
    pub(super) fn wait_until_indexed(&self, position: Position) -> Result<(), String> {
        self.wait_until(|index, _| {
            let indexed = index.indexed() >= position;
            if !indexed {
                index.state.write().freeze(1);
            }
            indexed
        })
    }

    /// Waits until it is on disk that the accounts have less. `Err` with the reason if that cannot be now.
    pub(super) fn discount(&self, discount: Discount) -> Result<(), String> {
        let discount = Arc::new(discount);
        self.signals.lock().discount = Some(Arc::clone(&discount));
        let done = self
            .wait_until(|_, signals| signals.discount.as_ref().is_none_or(|current| !Arc::ptr_eq(current, &discount)));
        if done.is_err() {
            self.signals.lock().discount = None;
        }
        done
    }

    fn wait_until(&self, is_done: impl Fn(&Self, &Signals) -> bool) -> Result<(), String> {
        let mut signals = self.signals.lock();
        loop {
            if is_done(self, &signals) {
                return Ok(());
            }
            if signals.closed {
                return Err("the log is closed".to_owned());
            }
            if let Some(reason) = &signals.stuck {
                return Err(reason.clone());
            }
            self.to_indexer.notify_one();
            // What was asked for may have to be asked for again.
            self.to_writer.wait_for(&mut signals, ASK_INTERVAL);
        }
    }

    /// Everything before this position is removed from the log.
    pub(super) fn removed_before(&self, first: Position) {
        self.first.store(first.0, Ordering::Release);
    }

    pub(super) fn first(&self) -> u64 {
        self.first.load(Ordering::Acquire)
    }

    // ---- the indexer's side -------------------------------------------------------------------------------------------

    pub(super) fn frozen(&self) -> Option<Arc<Recent>> {
        self.state.read().frozen.clone()
    }

    pub(super) fn runs(&self) -> Arc<[Arc<Run>]> {
        Arc::clone(&self.state.read().runs)
    }

    /// Whatever is in memory is to go to the disk.
    pub(super) fn freeze_rest(&self) {
        let frozen = self.state.write().freeze(1);
        self.wake_indexer(frozen);
    }

    /// What was frozen is on disk, as this run.
    pub(super) fn flushed(&self, run: Run) {
        let mut state = self.state.write();
        state.runs = state.runs.iter().cloned().chain([Arc::new(run)]).collect();
        state.frozen = None;
        // The indexer is who calls: it looks again before it waits.
        state.freeze(self.flush_entries);
        drop(state);
        self.unstuck();
    }

    /// The index can be written again.
    pub(super) fn unstuck(&self) {
        self.signals.lock().stuck = None;
        self.to_writer.notify_all();
    }

    pub(super) fn to_discount(&self) -> Option<Arc<Discount>> {
        self.signals.lock().discount.clone()
    }

    pub(super) fn discounted(&self) {
        self.signals.lock().discount = None;
        self.to_writer.notify_all();
    }

    /// Whether the indexer has something to do at once.
    pub(super) fn has_work(&self, signals: &Signals) -> bool {
        signals.discount.is_some() || self.frozen().is_some()
    }

    /// These runs are gone.
    pub(super) fn retired(&self, numbers: &[u32]) {
        let mut state = self.state.write();
        state.runs = state.runs.iter().filter(|run| !numbers.contains(&run.number)).cloned().collect();
    }

    /// Runs were merged into this one, which is on disk.
    pub(super) fn merged(&self, merged: &[Arc<Run>], into: Run) {
        let mut state = self.state.write();
        let mut into = Some(Arc::new(into));
        state.runs = state
            .runs
            .iter()
            .filter_map(|run| {
                if merged.iter().any(|merged| merged.number == run.number) {
                    into.take()
                } else {
                    Some(Arc::clone(run))
                }
            })
            .collect();
    }

    /// The file was opened again, with these runs.
    pub(super) fn reloaded(&self, runs: Vec<Run>) {
        let mut state = self.state.write();
        let indexed = runs.last().map_or(0, |run| run.last);
        state.runs = runs.into_iter().map(Arc::new).collect();
        if state.frozen.as_ref().is_some_and(|frozen| frozen.range().1 <= indexed) {
            state.frozen = None;
        }
    }

    /// The index cannot be written now; the writer refuses rather than waits.
    pub(super) fn stuck(&self, reason: String) {
        self.signals.lock().stuck = Some(reason);
        self.to_writer.notify_all();
    }

    /// Waits while `idle` says so, or until told, or so long.
    pub(super) fn wait_for_work(&self, idle: impl Fn(&Self, &Signals) -> bool, timeout: Option<std::time::Duration>) {
        let mut signals = self.signals.lock();
        let until = timeout.map(|timeout| std::time::Instant::now() + timeout);
        while idle(self, &signals) {
            match until {
                Some(until) => {
                    if self.to_indexer.wait_until(&mut signals, until).timed_out() {
                        return;
                    }
                }
                None => self.to_indexer.wait(&mut signals),
            }
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.signals.lock().closed
    }

    pub(super) fn close(&self) {
        self.signals.lock().closed = true;
        self.to_indexer.notify_all();
        self.to_writer.notify_all();
    }

    /// Position of the last entry in runs on disk.
    pub(super) fn indexed(&self) -> Position {
        Position(self.state.read().runs.last().map_or(0, |run| run.last))
    }
}

/// A snapshot of the blocks.
struct Blocks(ReadOnlyTable<&'static [u8; BLOCK_KEY_BYTES], &'static [u8]>);

impl Blocks {
    /// The head of a conversation, if the run has any of it.
    fn head(&self, run: u32, key: Key) -> Result<Option<ConversationHead>, ReadError> {
        let wanted = block_key(run, key, u64::MAX);
        let (block_key, block) = self.covering(run, &wanted)?;
        let mut newest = None;
        let visited = each_list(block_key.value(), block.value(), |list| {
            if list.key == key {
                newest = head(list.last);
            }
            if list.key <= key { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        visited.map(|_| newest).map_err(ReadError::from)
    }

    /// Visits the lists of a key in their order, from the last with this order or a smaller one on, and perhaps some before.
    fn lists(
        &self,
        run: u32,
        key: Key,
        order: u64,
        mut visit: impl FnMut(ListRef<'_>) -> ControlFlow<()>,
    ) -> Result<(), ReadError> {
        let (begin, _) = self.covering(run, &block_key(run, key, order))?;
        let mut before: Option<(AccessGuard<'_, &BlockKey>, AccessGuard<'_, &[u8]>)> = None;
        for found in self.0.range::<&BlockKey>(begin.value()..=&block_key(run, key, u64::MAX))? {
            let (block_key, block) = found?;
            if let Some((before, block)) = &before
                && open(before.value(), block.value())?.next_key() != *block_key.value()
            {
                return Err(Broken::at("blocks", before.value(), "the block behind it is missing").into());
            }
            let flow = each_list(block_key.value(), block.value(), |list| match list.key.cmp(&key) {
                std::cmp::Ordering::Less => ControlFlow::Continue(()),
                std::cmp::Ordering::Equal => visit(list),
                std::cmp::Ordering::Greater => ControlFlow::Break(()),
            })?;
            if flow.is_break() {
                return Ok(());
            }
            before = Some((block_key, block));
        }
        let Some((last, block)) = before else { return Ok(()) };
        let covered = open(last.value(), block.value())?.covers(&block_key(run, key, u64::MAX));
        covered.map_err(|reason| Broken::at("blocks", last.value(), reason).into())
    }

    /// The block that has this list, if the run has it.
    fn covering(
        &self,
        run: u32,
        wanted: &BlockKey,
    ) -> Result<(AccessGuard<'_, &'static BlockKey>, AccessGuard<'_, &'static [u8]>), ReadError> {
        let first = first_key(run);
        let found = self.0.range::<&BlockKey>(&first..=wanted)?.next_back();
        let (key, block) = found.ok_or_else(|| Broken::at("blocks", &first, "the run's first block is missing"))??;
        let covered = open(key.value(), block.value())?.covers(wanted);
        covered.map_err(|reason| Broken::at("blocks", key.value(), reason))?;
        Ok((key, block))
    }
}

fn open<'a>(key: &BlockKey, block: &'a [u8]) -> Result<BlockReader<'a>, Broken> {
    BlockReader::new(key, block).map_err(|reason| Broken::at("blocks", key, reason))
}

fn each_list(
    block_key: &BlockKey,
    block: &[u8],
    mut visit: impl FnMut(ListRef<'_>) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, Broken> {
    let broken = |reason: String| Broken::at("blocks", block_key, reason);
    let mut reader = open(block_key, block)?;
    let mut positions = Vec::new();
    while let Some((key, last)) = reader.next(&mut positions).map_err(broken)? {
        if visit(ListRef { key, positions: &positions, last }).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
