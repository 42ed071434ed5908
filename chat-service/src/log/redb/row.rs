//! Rows of the log: entries packed one behind the other, under the position of the first.
//!
//! An entry is its length and its record (see [`super::record`]), so each has a checksum of its own. A row fills a page of redb as far
//! as entries allow; the last one, if it is less than the smallest page, is written anew with the entries that come next. Pure.

use super::super::{Entry, NewEntry, Position};
use super::record::{Broken, Fields, decode_entry, encode_entry, put_number};
use super::shredder::Shred;

/// Bytes of a row that fills a page of redb: 16, 8 or 4 KiB less what the page needs itself.
const ROW_BYTES: [usize; 3] = [16 * 1024 - PAGE_OVERHEAD, 8 * 1024 - PAGE_OVERHEAD, 4 * 1024 - PAGE_OVERHEAD];
/// Header, length and key, of a page with one row.
const PAGE_OVERHEAD: usize = 16;

/// The row at the end of the log, which may grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tail {
    first: u64,
    bytes: Vec<u8>,
}

impl Tail {
    /// Whether it is the row that begins here.
    pub(super) fn begins_at(&self, first: Position) -> bool {
        !self.bytes.is_empty() && self.first == first.0
    }

    /// The last row of a log, if it may grow.
    pub(super) fn of(first: Position, row: &[u8]) -> Self {
        if row.len() < ROW_BYTES[ROW_BYTES.len() - 1] {
            Self { first: first.0, bytes: row.to_vec() }
        } else {
            Self::default()
        }
    }
}

/// Entries on their way into rows.
#[derive(Debug)]
pub(super) struct Packer {
    first: u64,
    bytes: Vec<u8>,
    /// Bytes that are the tail's own entries.
    tail_bytes: usize,
    /// Where entries end in `bytes`; for a tail's own entries only the last.
    ends: Vec<usize>,
    /// Entries before the first of `ends`.
    before: u64,
    last: u64,
    record: Vec<u8>,
}

impl Packer {
    /// Begins with the tail of the log, whose last position is this.
    pub(super) fn new(tail: &Tail, last: Position) -> Self {
        let has_tail = !tail.bytes.is_empty();
        Self {
            first: if has_tail { tail.first } else { last.0 + 1 },
            bytes: tail.bytes.clone(),
            tail_bytes: tail.bytes.len(),
            ends: if has_tail { vec![tail.bytes.len()] } else { Vec::new() },
            before: if has_tail { last.0 - tail.first } else { 0 },
            last: last.0,
            record: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, new: &NewEntry) {
        self.last += 1;
        encode_entry(Position(self.last), new, &mut self.record);
        put_number(&mut self.bytes, self.record.len() as u64);
        self.bytes.extend_from_slice(&self.record);
        self.ends.push(self.bytes.len());
    }

    /// What was pushed, as in a row that begins with its first entry.
    pub(super) fn pushed(&self) -> &[u8] {
        &self.bytes[self.tail_bytes..]
    }

    /// Gives the rows to `write`, in their order; returns the new tail.
    pub(super) fn finish<E>(self, mut write: impl FnMut(Position, &[u8]) -> Result<(), E>) -> Result<Tail, E> {
        let mut begin = 0;
        // Entries in rows before: positions are counted from it.
        let mut written = 0;
        while written < self.ends.len() {
            let left = self.bytes.len() - begin;
            let smallest = ROW_BYTES[ROW_BYTES.len() - 1];
            let room = ROW_BYTES.into_iter().find(|room| left >= *room).unwrap_or(smallest);
            let fitting = self.ends[written..].partition_point(|end| end - begin <= room).max(1);
            let end = self.ends[written + fitting - 1];
            let first = if written == 0 { self.first } else { self.first + self.before + written as u64 };
            let row = &self.bytes[begin..end];
            write(Position(first), row)?;
            written += fitting;
            begin = end;
            if written == self.ends.len() {
                return Ok(Tail::of(Position(first), row));
            }
        }
        Ok(Tail::default())
    }
}

/// The entry at a position, of the row that begins at `first`.
pub(super) fn entry(first: Position, row: &[u8], position: Position) -> Result<Entry, Broken> {
    let record = records(first, row)
        .find_map(|record| match record {
            Ok((at, record)) if at == position => Some(Ok(record)),
            Ok(_) => None,
            Err(broken) => Some(Err(broken)),
        })
        .ok_or_else(|| Broken::entry(position, "there is none"))??;
    decode_entry(position, record)
}

/// All entries of a row.
pub(super) fn entries(first: Position, row: &[u8]) -> impl Iterator<Item = Result<Entry, Broken>> {
    records(first, row).map(|record| record.and_then(|(position, record)| decode_entry(position, record)))
}

/// Ends with the first that is cut short.
fn records(first: Position, row: &[u8]) -> impl Iterator<Item = Result<(Position, &[u8]), Broken>> {
    let mut rest = Some(Fields::new(row));
    let mut position = first.0;
    std::iter::from_fn(move || {
        let mut body = rest.take().filter(|body| !body.is_empty())?;
        let at = Position(position);
        position += 1;
        let record = body
            .number()
            .and_then(|length| body.bytes(usize::try_from(length).map_err(|_| "an entry is too long")?))
            .map_err(|reason| Broken::entry(at, format!("the row is damaged: {reason}")));
        if record.is_ok() {
            rest = Some(body);
        }
        Some(record.map(|record| (at, record)))
    })
}

/// The row without its entries before a position, which must be in it.
pub(super) fn rest(first: Position, row: &[u8], position: Position) -> Result<&[u8], Broken> {
    let mut body = Fields::new(row);
    for at in first.0..position.0 {
        body.number()
            .and_then(|length| body.bytes(usize::try_from(length).map_err(|_| "an entry is too long")?))
            .map_err(|reason| Broken::entry(Position(at), format!("the row is damaged: {reason}")))?;
    }
    if body.is_empty() { Err(Broken::entry(position, "there is none")) } else { Ok(body.rest()) }
}

/// The row with one entry's words erased, and the record that had them; `None` if the entry has none, or is not in the row.
pub(super) fn without_words(
    first: Position,
    row: &[u8],
    position: Position,
    is_meant: impl Fn(&Entry) -> bool,
) -> Result<Option<(Vec<u8>, Shred)>, Broken> {
    let mut rewritten = Vec::with_capacity(row.len());
    let mut erased = None;
    let mut record = Vec::new();
    for found in records(first, row) {
        let (at, bytes) = found?;
        let mut bytes = bytes;
        if at == position {
            let entry = decode_entry(position, bytes)?;
            let Some(body) = entry.body.erased().filter(|_| is_meant(&entry)) else { return Ok(None) };
            let Entry { conversation, seq, from, to, id, at, withheld, .. } = entry;
            let new = NewEntry { conversation, seq, from, to, id, at, body, withheld };
            encode_entry(position, &new, &mut record);
            erased = Some(Shred::of(position, bytes));
            bytes = &record;
        }
        put_number(&mut rewritten, bytes.len() as u64);
        rewritten.extend_from_slice(bytes);
    }
    Ok(erased.map(|shred| (rewritten, shred)))
}

/// Packs the entries of a row again.
pub(super) fn repack(first: Position, row: &[u8], packer: &mut Packer) -> Result<(), Broken> {
    for entry in entries(first, row) {
        let Entry { conversation, seq, from, to, id, at, body, withheld, .. } = entry?;
        packer.push(&NewEntry { conversation, seq, from, to, id, at, body, withheld });
    }
    Ok(())
}

/// The position of the last entry of a row.
pub(super) fn last(first: Position, row: &[u8]) -> Result<Position, Broken> {
    records(first, row).last().unwrap_or_else(|| Err(Broken::entry(first, "the row is empty"))).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    use chat_protocol::{ConversationId, Seq, Timestamp, UserId};
    use proptest::prelude::*;

    use super::*;

    fn message(position: u64, bytes: usize) -> NewEntry {
        NewEntry {
            conversation: ConversationId::parse("alice:bob").unwrap(),
            seq: Seq::new(position).unwrap(),
            from: UserId::parse("bob").unwrap(),
            to: UserId::parse("alice").unwrap(),
            id: None,
            at: Timestamp::from_ms(1),
            body: "x".repeat(bytes).into(),
            withheld: false,
        }
    }

    /// Sizes of texts, batch by batch.
    fn batches() -> impl Strategy<Value = Vec<Vec<usize>>> {
        let bytes = prop_oneof![20 => 0_usize..400, 2 => 3_900_usize..4_200, 1 => 8_000_usize..20_000];
        let batch = prop_oneof![prop::collection::vec(bytes.clone(), 1..4), prop::collection::vec(bytes, 1..120)];
        prop::collection::vec(batch, 1..12)
    }

    proptest! {
        #[test]
        fn entries_come_back_from_full_rows(batches in batches()) {
            let mut rows: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
            let mut tail = Tail::default();
            let mut last = 0;
            for batch in &batches {
                let mut packer = Packer::new(&tail, Position(last));
                for bytes in batch {
                    last += 1;
                    packer.push(&message(last, *bytes));
                }
                tail = packer
                    .finish(|first, row| {
                        rows.insert(first.0, row.to_vec());
                        Ok::<(), Infallible>(())
                    })
                    .unwrap();
                let (first, row) = rows.last_key_value().unwrap();
                prop_assert_eq!(&tail, &Tail::of(Position(*first), row), "as it is read when the log is opened");
                prop_assert_eq!(super::last(Position(*first), row).unwrap().0, last);
            }
            let mut position = 0;
            let mut texts = batches.iter().flatten();
            for (first, row) in &rows {
                prop_assert_eq!(*first, position + 1);
                for read in entries(Position(*first), row) {
                    position += 1;
                    let read = read.unwrap();
                    prop_assert_eq!(read.position.0, position);
                    prop_assert_eq!(&entry(Position(*first), row, Position(position)).unwrap(), &read);
                    prop_assert_eq!(Some(&read.body.text().len()), texts.next());
                }
            }
            prop_assert_eq!(position, last);
        }
    }

    #[test]
    fn small_batches_fill_rows_too() {
        let mut rows: BTreeMap<u64, usize> = BTreeMap::new();
        let mut tail = Tail::default();
        for position in 1..=1_000 {
            let mut packer = Packer::new(&tail, Position(position - 1));
            packer.push(&message(position, 200));
            let write = |first: Position, row: &[u8]| {
                rows.insert(first.0, row.len());
                Ok::<(), Infallible>(())
            };
            tail = packer.finish(write).unwrap();
        }
        let bytes: usize = rows.values().sum();
        assert!(rows.len() * 4_096 < bytes * 11 / 10, "{} rows for {bytes} bytes", rows.len());
    }

    #[test]
    fn a_row_that_is_cut_short_is_named() {
        let mut packer = Packer::new(&Tail::default(), Position(4));
        packer.push(&message(5, 10));
        packer.push(&message(6, 10));
        let mut row = Vec::new();
        packer
            .finish(|_, bytes| {
                row = bytes.to_vec();
                Ok::<(), Infallible>(())
            })
            .unwrap();
        let cut = &row[..row.len() - 1];
        assert_eq!(entry(Position(5), cut, Position(5)).unwrap().seq.get(), 5);
        let broken = entry(Position(5), cut, Position(6)).unwrap_err();
        assert_eq!((broken.table, broken.key.as_str()), ("rows", "6"));
        assert!(entry(Position(5), &row, Position(7)).is_err());
    }
}
