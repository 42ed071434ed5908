//! The indexer: the one thread that changes `index.redb`.
//!
//! It writes what was frozen as a run, merges runs of the same level into one of the next, and removes what was merged. A merge and a
//! removal go step by step, so that what is frozen never waits long. A merged run counts once it is listed; blocks of a run that is not
//! listed are rubbish. Nothing here is waited for by an acknowledgement: the log is already on disk.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ::redb::{
    Database, Durability, OwnedRange, ReadOnlyTable, ReadableDatabase, ReadableTable, Table, WriteTransaction,
};

use super::Shared;
use super::filter::Filter;
use super::index::{Discount, Index, Run};
use super::key::Key;
use super::open::{OpenError, Opener};
use super::posting::{
    BLOCK_KEY_BYTES, BlockKey, BlockReader, BlockWriter, END, LIST_POSITIONS_MAX, Last, List, ListRef, block_key,
    first_key, run_of,
};
use super::reader::ReadError;
use super::recent::Recent;
use super::record::{self, Broken, put_number};
use super::schema::{BLOCKS, FILTERS, META, RUNS, USAGE, USAGE_KEYS};

/// So many runs of a level become one of the next.
const MERGED_RUNS: usize = 8;
/// Blocks that one step of a merge writes: 4 MB, some 20 ms.
const STEP_BLOCKS: usize = 1_024;
/// Blocks that one step removes.
const SWEEP_BLOCKS: usize = 4_096;
/// Bytes of a row of a filter.
const FILTER_PART_BYTES: usize = 16 * 1024 - 32;
/// Between attempts to write to a full disk.
const FULL_RETRY: Duration = Duration::from_secs(1);
/// Ids are found for 7 days. A day more, for clocks that were set.
const ID_LIFETIME: Duration = Duration::from_hours(8 * 24);

type BlocksSnapshot = ReadOnlyTable<&'static [u8; BLOCK_KEY_BYTES], &'static [u8]>;
type BlocksTable<'a> = Table<'a, &'static [u8; BLOCK_KEY_BYTES], &'static [u8]>;

pub(super) struct Indexer {
    index: Arc<Index>,
    next_number: u32,
    merge: Option<Merge>,
    rubbish: Vec<u32>,
}

impl Indexer {
    pub(super) fn new(index: Arc<Index>, rubbish: Vec<u32>) -> Self {
        let listed = index.runs().iter().map(|run| run.number).max();
        let highest = listed.into_iter().chain(rubbish.iter().copied()).max();
        Self { index, next_number: highest.map_or(1, |highest| highest + 1), merge: None, rubbish }
    }

    /// Writes what is frozen, if there is something.
    pub(super) fn flush(&mut self) -> Result<bool, ReadError> {
        let Some(frozen) = self.index.frozen() else { return Ok(false) };
        let number = self.next_number;
        let counts_usage = self.index.counts_usage;
        let (transaction, run) = self.write(|transaction| {
            if counts_usage {
                count(transaction, &frozen)?;
            }
            write_run(transaction, number, &frozen)
        })?;
        transaction.commit()?;
        self.next_number += 1;
        self.index.flushed(run);
        Ok(true)
    }

    /// Takes off accounts what is about to be removed, if something is.
    fn discount(&mut self) -> Result<bool, ReadError> {
        let Some(discount) = self.index.to_discount() else { return Ok(false) };
        let (transaction, ()) = self.write(|transaction| take_off(transaction, &discount))?;
        transaction.commit()?;
        self.index.discounted();
        Ok(true)
    }

    /// Runs whose entries are all removed are no longer listed. The last stays: it says how far the index is.
    fn retire(&mut self) -> Result<(), ReadError> {
        let (runs, first) = (self.index.runs(), self.index.first());
        let retired: Vec<u32> =
            runs.iter().rev().skip(1).filter(|run| run.last < first).map(|run| run.number).collect();
        if retired.is_empty() {
            return Ok(());
        }
        let (transaction, ()) = self.write(|transaction| {
            let mut runs = transaction.open_table(RUNS)?;
            for number in &retired {
                runs.remove(number)?;
            }
            Ok(())
        })?;
        transaction.commit()?;
        self.index.retired(&retired);
        self.rubbish.extend(retired);
        Ok(())
    }

    /// One step of what can wait. `false` if there is nothing to do.
    fn tidy(&mut self) -> Result<bool, ReadError> {
        if self.merge.is_none() {
            self.retire()?;
            self.merge = self.plan()?;
        }
        if let Some(mut merge) = self.merge.take() {
            // If this fails, what it has written so far is rubbish.
            self.rubbish.push(merge.into.number);
            let (transaction, finished) = self.write(|transaction| merge.step(transaction))?;
            transaction.commit()?;
            self.rubbish.pop();
            match finished {
                Some(run) => {
                    self.index.merged(&merge.inputs, run);
                    self.rubbish.extend(merge.inputs.iter().map(|run| run.number));
                }
                None => self.merge = Some(merge),
            }
            return Ok(true);
        }
        let Some(number) = self.rubbish.last().copied() else { return Ok(false) };
        let (transaction, swept) = self.write(|transaction| sweep(transaction, number))?;
        transaction.commit()?;
        if swept {
            self.rubbish.pop();
        }
        Ok(true)
    }

    /// redb refuses everything after a failed write until the file is opened again.
    fn reopen(&mut self, opener: &Opener) -> Result<(), String> {
        // It reads from the file that is closed now.
        if let Some(merge) = self.merge.take() {
            self.rubbish.push(merge.into.number);
        }
        let mut database = self.index.database.write();
        if let Some(Err(error)) = database.take().map(Database::close) {
            tracing::debug!(%error, "the index was closed to be repaired");
        }
        let opened = opener.open_index_file().map_err(|error| error.to_string())?;
        // A commit that failed may have been made all the same.
        let runs = read_runs(&opened).map_err(|error| error.to_string())?;
        *database = Some(opened);
        drop(database);
        self.index.reloaded(runs.listed);
        self.rubbish = runs.rubbish;
        Ok(())
    }

    fn write<T>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<T, ReadError>,
    ) -> Result<(WriteTransaction, T), ReadError> {
        let database = self.index.database.read();
        let database = database.as_ref().ok_or_else(|| ReadError::Closed("the index is closed".to_owned()))?;
        let mut transaction = database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        transaction.set_quick_repair(true);
        let written = write(&transaction)?;
        Ok((transaction, written))
    }

    /// The oldest runs of the lowest level that has enough of them.
    fn plan(&mut self) -> Result<Option<Merge>, ReadError> {
        let runs = self.index.runs();
        let Some(level) = runs
            .iter()
            .map(|run| run.level)
            .filter(|level| runs.iter().filter(|run| run.level == *level).count() >= MERGED_RUNS)
            .min()
        else {
            return Ok(None);
        };
        let inputs = runs.iter().filter(|run| run.level == level).take(MERGED_RUNS).cloned().collect();
        let number = self.next_number;
        self.next_number += 1;
        let database = self.index.database.read();
        let database = database.as_ref().ok_or_else(|| ReadError::Closed("the index is closed".to_owned()))?;
        Merge::new(database, number, level + 1, inputs, self.index.first()).map(Some)
    }
}

/// Adds what entries count to their accounts.
fn count(transaction: &WriteTransaction, recent: &Recent) -> Result<(), ReadError> {
    let mut counted: Vec<(Key, u64)> = recent.counted().collect();
    counted.sort_unstable();
    let mut usage = transaction.open_table(USAGE)?;
    for (key, bytes) in counted {
        let key = key.to_bytes();
        let before = usage.get(&key)?.map_or(0, |before| before.value());
        usage.insert(&key, before + bytes)?;
    }
    transaction.open_table(META)?.insert(USAGE_KEYS[1], recent.range().1 + 1)?;
    Ok(())
}

fn take_off(transaction: &WriteTransaction, discount: &Discount) -> Result<(), ReadError> {
    let mut usage = transaction.open_table(USAGE)?;
    for (key, bytes) in &discount.bytes {
        let key = key.to_bytes();
        let before = usage.get(&key)?.map_or(0, |before| before.value());
        match before.saturating_sub(*bytes) {
            0 => drop(usage.remove(&key)?),
            left => drop(usage.insert(&key, left)?),
        }
    }
    transaction.open_table(META)?.insert(USAGE_KEYS[0], discount.end)?;
    Ok(())
}

fn write_run(transaction: &WriteTransaction, number: u32, recent: &Recent) -> Result<Run, ReadError> {
    let (first, last) = recent.range();
    let mut run = Run {
        number,
        level: 0,
        first,
        last,
        at_ms_max: recent.at_ms_max(),
        keys: recent.keys() as u64,
        filter: Filter::with_room_for(recent.keys() as u64),
    };
    let mut blocks = transaction.open_table(BLOCKS)?;
    let mut writer = BlockWriter::new(number, first);
    for list in recent.sorted() {
        run.filter.add(list.key);
        writer.push(list, |key, block| insert(&mut blocks, key, block))?;
    }
    writer.finish(|key, block| insert(&mut blocks, key, block))?;
    list_run(transaction, &run)?;
    Ok(run)
}

fn insert(blocks: &mut BlocksTable<'_>, key: &BlockKey, block: &[u8]) -> Result<(), ReadError> {
    if blocks.insert(key, block)?.is_some() {
        return Err(Broken::at("blocks", key, "the run's number was used before").into());
    }
    Ok(())
}

/// From now on the run counts.
fn list_run(transaction: &WriteTransaction, run: &Run) -> Result<(), ReadError> {
    let mut filters = transaction.open_table(FILTERS)?;
    for (part, bytes) in (0..).zip(run.filter.to_bytes().chunks(FILTER_PART_BYTES)) {
        filters.insert((run.number, part), bytes)?;
    }
    let mut record = Vec::new();
    record::begin(&mut record);
    for number in [u64::from(run.level), run.first, run.last, run.at_ms_max, run.keys] {
        put_number(&mut record, number);
    }
    // The filter is as good as random: it is checked whole.
    put_number(&mut record, u64::from(crc32fast::hash(&run.filter.to_bytes())));
    record::seal(&run.number.to_be_bytes(), &mut record);
    transaction.open_table(RUNS)?.insert(run.number, record.as_slice())?;
    Ok(())
}

/// What an index file has.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// Those that are listed, in the order of their positions.
    pub(super) listed: Vec<Run>,
    /// Numbers of those that are not, but have blocks.
    pub(super) rubbish: Vec<u32>,
}

pub(super) fn read_runs(database: &Database) -> Result<Runs, ReadError> {
    let snapshot = database.begin_read()?;
    let filters = snapshot.open_table(FILTERS)?;
    let mut runs = Vec::new();
    for found in snapshot.open_table(RUNS)?.iter()? {
        let (number, run) = found?;
        let number = number.value();
        let broken = |reason: String| Broken::at("runs", &number.to_be_bytes(), reason);
        let mut body = record::open(&number.to_be_bytes(), run.value()).map_err(broken)?;
        let mut next = || body.number().map_err(broken);
        let (level, first, last, at_ms_max, keys, sum) = (next()?, next()?, next()?, next()?, next()?, next()?);
        let mut bytes = Vec::new();
        for part in filters.range((number, 0)..=(number, u32::MAX))? {
            bytes.extend_from_slice(part?.1.value());
        }
        if u64::from(crc32fast::hash(&bytes)) != sum {
            return Err(broken("its filter is damaged".to_owned()).into());
        }
        let level = u32::try_from(level).map_err(|_| broken("its level is too high".to_owned()))?;
        runs.push(Run { number, level, first, last, at_ms_max, keys, filter: Filter::from_bytes(&bytes) });
    }
    runs.sort_by_key(|run| run.first);
    if let Some(gap) = runs.windows(2).find(|pair| pair[0].last + 1 != pair[1].first) {
        return Err(Broken::at("runs", &gap[1].number.to_be_bytes(), "it does not follow the run before").into());
    }
    let mut rubbish = Vec::new();
    let blocks = snapshot.open_table(BLOCKS)?;
    let mut number = 0;
    while let Some(found) = blocks.range::<&BlockKey>(&first_key(number)..)?.next() {
        let run = run_of(found?.0.value());
        if runs.iter().all(|listed| listed.number != run) {
            rubbish.push(run);
        }
        let Some(next) = run.checked_add(1) else { break };
        number = next;
    }
    Ok(Runs { listed: runs, rubbish })
}

/// Removes some of what is left of a run; `true` if it was the last.
fn sweep(transaction: &WriteTransaction, number: u32) -> Result<bool, ReadError> {
    let mut blocks = transaction.open_table(BLOCKS)?;
    let range = first_key(number)..=block_key(number, Key::MAX, u64::MAX);
    let mut left = SWEEP_BLOCKS;
    let mut removed =
        blocks.extract_from_if::<&BlockKey, _>(&range.start().clone()..=&range.end().clone(), |_, _| true)?;
    while left > 0 {
        match removed.next() {
            Some(block) => drop(block?),
            None => break,
        }
        left -= 1;
    }
    drop(removed);
    if left == 0 {
        return Ok(false);
    }
    transaction.open_table(FILTERS)?.retain_in((number, 0)..=(number, u32::MAX), |_, _| false)?;
    transaction.open_table(RUNS)?.remove(number)?;
    Ok(true)
}

/// Runs that become one, list by list.
struct Merge {
    inputs: Vec<Arc<Run>>,
    readers: Vec<RunReader>,
    into: Run,
    writer: Option<BlockWriter>,
    /// What was read last, while more of its key may come.
    list: Option<List>,
}

impl Merge {
    /// `first_entry`: what is before is removed and left out.
    fn new(
        database: &Database,
        number: u32,
        level: u32,
        inputs: Vec<Arc<Run>>,
        first_entry: u64,
    ) -> Result<Self, ReadError> {
        let horizon_ms = now_ms().saturating_sub(u64::try_from(ID_LIFETIME.as_millis()).unwrap_or(u64::MAX));
        let blocks = database.begin_read()?.open_table(BLOCKS)?;
        let readers = inputs
            .iter()
            .map(|run| RunReader::new(&blocks, run.number, run.at_ms_max < horizon_ms, first_entry))
            .collect::<Result<Vec<_>, _>>()?;
        let first = inputs.iter().map(|run| run.first).min().unwrap_or_default();
        let into = Run {
            number,
            level,
            first,
            last: inputs.iter().map(|run| run.last).max().unwrap_or_default(),
            at_ms_max: inputs.iter().map(|run| run.at_ms_max).max().unwrap_or_default(),
            keys: 0,
            filter: Filter::with_room_for(inputs.iter().map(|run| run.keys).sum()),
        };
        Ok(Self { inputs, readers, into, writer: Some(BlockWriter::new(number, first)), list: None })
    }

    /// Writes some blocks. The run, listed, once it is whole.
    fn step(&mut self, transaction: &WriteTransaction) -> Result<Option<Run>, ReadError> {
        let mut blocks = transaction.open_table(BLOCKS)?;
        let written = std::cell::Cell::new(0);
        let mut write = |key: &BlockKey, block: &[u8]| {
            written.set(written.get() + 1);
            insert(&mut blocks, key, block)
        };
        let mut writer = self.writer.take().ok_or_else(|| ReadError::Closed("the merge has failed".to_owned()))?;
        while written.get() < STEP_BLOCKS {
            // Of the runs that have the smallest key, the oldest.
            let next = self.readers.iter().enumerate().filter_map(|(nth, reader)| Some((reader.key()?, nth))).min();
            let Some((_, nth)) = next else {
                if let Some(list) = self.list.take() {
                    writer.push(list.as_ref(), &mut write)?;
                }
                writer.finish(&mut write)?;
                let into = Run { filter: std::mem::take(&mut self.into.filter), ..self.into };
                list_run(transaction, &into)?;
                let mut runs = transaction.open_table(RUNS)?;
                for run in &self.inputs {
                    runs.remove(run.number)?;
                }
                return Ok(Some(into));
            };
            if let Some(next) = self.readers[nth].list() {
                take(&mut self.list, &mut self.into, next, |list| writer.push(list, &mut write))?;
            }
            self.readers[nth].advance()?;
        }
        self.writer = Some(writer);
        Ok(None)
    }
}

/// Adds a list to the one before if it has the same key, as far as a list may be long.
fn take(
    before: &mut Option<List>,
    into: &mut Run,
    next: ListRef<'_>,
    push: impl FnOnce(ListRef<'_>) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    match before {
        Some(list) if list.key == next.key && list.positions.len() + next.positions.len() <= LIST_POSITIONS_MAX => {
            list.positions.extend_from_slice(next.positions);
            list.last = next.last;
        }
        Some(list) => {
            push(list.as_ref())?;
            if list.key != next.key {
                into.keys += 1;
                into.filter.add(next.key);
            }
            list.key = next.key;
            list.positions.clear();
            list.positions.extend_from_slice(next.positions);
            list.last = next.last;
        }
        None => {
            into.keys += 1;
            into.filter.add(next.key);
            *before = Some(List { key: next.key, positions: next.positions.to_vec(), last: next.last });
        }
    }
    Ok(())
}

/// Reads a run from its first list to its last.
pub(super) struct RunReader {
    range: OwnedRange<&'static [u8; BLOCK_KEY_BYTES], &'static [u8]>,
    /// The key of the block that has to come.
    next: BlockKey,
    /// Of one block.
    lists: Lists,
    at: usize,
    /// Its ids are older than they have to be.
    without_ids: bool,
    /// Entries before are removed.
    first_entry: u64,
}

#[derive(Default)]
struct Lists {
    lists: Vec<(Key, Last, std::ops::Range<usize>)>,
    positions: Vec<u64>,
}

impl RunReader {
    /// At the first list of a run.
    pub(super) fn new(
        blocks: &BlocksSnapshot,
        number: u32,
        without_ids: bool,
        first_entry: u64,
    ) -> Result<Self, ReadError> {
        let range = blocks.range_owned::<&BlockKey>(&first_key(number)..=&block_key(number, Key::MAX, u64::MAX))?;
        let (next, lists) = (first_key(number), Lists::default());
        let mut reader = Self { range, next, lists, at: 0, without_ids, first_entry };
        reader.settle()?;
        Ok(reader)
    }

    fn key(&self) -> Option<Key> {
        self.lists.lists.get(self.at).map(|(key, ..)| *key)
    }

    pub(super) fn list(&self) -> Option<ListRef<'_>> {
        let (key, last, positions) = self.lists.lists.get(self.at)?;
        let positions = &self.lists.positions[positions.clone()];
        let removed = positions.partition_point(|position| *position < self.first_entry);
        Some(ListRef { key: *key, positions: &positions[removed..], last: *last })
    }

    /// All entries of the list are removed.
    fn is_removed(&self) -> bool {
        self.list().is_some_and(|list| list.positions.is_empty())
    }

    pub(super) fn advance(&mut self) -> Result<(), ReadError> {
        self.at += 1;
        self.settle()
    }

    /// Stands at a list, or at the end.
    fn settle(&mut self) -> Result<(), ReadError> {
        loop {
            match self.key() {
                Some(key) if self.without_ids && key.is_id() => self.at += 1,
                Some(_) if self.is_removed() => self.at += 1,
                Some(_) => return Ok(()),
                None => {
                    let found = self.range.next().transpose()?;
                    if found.as_ref().map_or(END, |(key, _)| *key.value()) != self.next {
                        return Err(Broken::at("blocks", &self.next, "the block is missing").into());
                    }
                    let Some((key, block)) = found else { return Ok(()) };
                    self.next = self.lists.read(key.value(), block.value())?;
                    self.at = 0;
                }
            }
        }
    }
}

impl Lists {
    /// Takes a block's lists; the key of the block behind it.
    fn read(&mut self, key: &BlockKey, block: &[u8]) -> Result<BlockKey, Broken> {
        let broken = |reason: String| Broken::at("blocks", key, reason);
        self.lists.clear();
        self.positions.clear();
        let mut reader = BlockReader::new(key, block).map_err(broken)?;
        let next = reader.next_key();
        let mut positions = Vec::new();
        while let Some((key, last)) = reader.next(&mut positions).map_err(broken)? {
            let begin = self.positions.len();
            self.positions.extend_from_slice(&positions);
            self.lists.push((key, last, begin..self.positions.len()));
        }
        Ok(next)
    }
}

/// Starts the thread, which ends when the index is closed and what is in memory is on disk.
pub(super) fn start(shared: Arc<Shared>, indexer: Indexer, opener: Opener) -> Result<JoinHandle<()>, OpenError> {
    let folder = opener.folder().to_owned();
    let ending = Ending(Arc::clone(&shared));
    let run = move || {
        let _ending = ending;
        run(&shared, indexer, &opener);
    };
    let started = thread::Builder::new().name("log-indexer".to_owned()).spawn(run);
    started.map_err(|error| OpenError::Io { file: folder, reason: format!("no thread to index it: {error}") })
}

/// Nobody waits for an indexer that is gone.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail("the log's indexer panicked".to_owned());
        }
        self.0.index.close();
    }
}

fn run(shared: &Shared, mut indexer: Indexer, opener: &Opener) {
    let index = Arc::clone(&shared.index);
    let mut was_stuck = false;
    loop {
        let closed = index.is_closed();
        if closed {
            index.freeze_rest();
        }
        let done = indexer
            .discount()
            .and_then(|discounted| Ok(discounted || indexer.flush()? || (!closed && indexer.tidy()?)));
        if was_stuck && done.is_ok() {
            index.unstuck();
            was_stuck = false;
        }
        match done {
            Ok(true) => {}
            Ok(false) if closed => return,
            Ok(false) => index.wait_for_work(|index, signals| !signals.closed && !index.has_work(signals), None),
            Err(error) if closed => {
                tracing::warn!(%error, "the index was not written to its end: it will catch up");
                return;
            }
            Err(error) if error.is_full() => {
                tracing::warn!(%error, "no space left for the index");
                index.stuck(error.to_string());
                was_stuck = true;
                if let Err(error) = indexer.reopen(opener) {
                    shared.fail(format!("the index: {error}"));
                    return;
                }
                let until = Instant::now() + FULL_RETRY;
                index.wait_for_work(|_, signals| !signals.closed && Instant::now() < until, Some(FULL_RETRY));
            }
            Err(error) => {
                shared.fail(format!("the index: {error}"));
                return;
            }
        }
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
