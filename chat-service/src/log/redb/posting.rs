//! Posting lists: for a conversation, a user's side or a message id, the positions of its entries; and the blocks that hold them on disk.
//!
//! A run is a sorted sequence of lists, packed into blocks of about a page. Long lists are cut, so that reading one begins near where it is
//! wanted. A block carries a version, a checksum over its key and its content, and the key of the block behind it: one that is missing is noticed.
//! Pure: no file, lock or clock.

use super::key::{KEY_BYTES, Key};
use super::record::{self, Fields, put_number};

/// Bytes of a block's value: with its key it fills one page of redb (4 KiB) and no more.
const BLOCK_BYTES_MAX: usize = 4096 - 8 - BLOCK_KEY_BYTES;
/// Positions in one list of a block.
pub(super) const LIST_POSITIONS_MAX: usize = 256;
/// A run's number, a key, and the list's place in its order.
pub(super) const BLOCK_KEY_BYTES: usize = 4 + KEY_BYTES + 8;

pub(super) type BlockKey = [u8; BLOCK_KEY_BYTES];

/// The key of the block that begins with this list.
pub(super) fn block_key(run: u32, key: Key, order: u64) -> BlockKey {
    let mut block_key = [0; BLOCK_KEY_BYTES];
    block_key[..4].copy_from_slice(&run.to_be_bytes());
    block_key[4..4 + KEY_BYTES].copy_from_slice(&key.to_bytes());
    block_key[4 + KEY_BYTES..].copy_from_slice(&order.to_be_bytes());
    block_key
}

/// The key of a run's first block, whatever is in it.
pub(super) fn first_key(run: u32) -> BlockKey {
    block_key(run, Key::MIN, 0)
}

/// The run that a block belongs to.
pub(super) fn run_of(block_key: &BlockKey) -> u32 {
    u32::from_be_bytes([block_key[0], block_key[1], block_key[2], block_key[3]])
}

/// The last of a conversation's entries in a list; nothing for other kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Last {
    pub(super) seq: u64,
    pub(super) at_ms: u64,
}

/// Positions of one key, growing, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ListRef<'a> {
    pub(super) key: Key,
    pub(super) positions: &'a [u64],
    pub(super) last: Last,
}

/// Positions of one key, growing, never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct List {
    pub(super) key: Key,
    pub(super) positions: Vec<u64>,
    pub(super) last: Last,
}

impl<'a> ListRef<'a> {
    /// The first seq of a conversation's list, whose seqs have no gaps.
    pub(super) fn first_seq(&self) -> u64 {
        self.last.seq.saturating_sub(self.positions.len() as u64 - 1)
    }

    /// What lists of one key are sorted by.
    fn order(&self) -> u64 {
        if self.key.is_conversation() { self.first_seq() } else { self.positions[0] }
    }

    /// In pieces that a block takes.
    fn pieces(self) -> impl Iterator<Item = ListRef<'a>> {
        let mut behind = self.positions.len() as u64;
        self.positions.chunks(LIST_POSITIONS_MAX).map(move |positions| {
            behind -= positions.len() as u64;
            let last = Last { seq: self.last.seq.saturating_sub(behind), ..self.last };
            ListRef { key: self.key, positions, last }
        })
    }
}

impl List {
    pub(super) fn as_ref(&self) -> ListRef<'_> {
        ListRef { key: self.key, positions: &self.positions, last: self.last }
    }
}

/// Packs lists, given in their order, into blocks of one run.
pub(super) struct BlockWriter {
    run: u32,
    /// Smaller than every position of the run.
    base: u64,
    key: BlockKey,
    previous: [u8; KEY_BYTES],
    block: Vec<u8>,
    list: Vec<u8>,
}

/// Behind the last block of a run.
pub(super) const END: [u8; BLOCK_KEY_BYTES] = [0xff; BLOCK_KEY_BYTES];
/// Where a block says which is behind it.
const NEXT_AT: std::ops::Range<usize> = record::HEADER_BYTES..record::HEADER_BYTES + BLOCK_KEY_BYTES;

impl BlockWriter {
    pub(super) fn new(run: u32, base: u64) -> Self {
        let key = first_key(run);
        let mut writer = Self { run, base, key, previous: [0; KEY_BYTES], block: Vec::new(), list: Vec::new() };
        writer.begin(key);
        writer
    }

    fn begin(&mut self, key: BlockKey) {
        self.key = key;
        self.previous = [0; KEY_BYTES];
        record::begin(&mut self.block);
        self.block.extend_from_slice(&END);
        put_number(&mut self.block, self.base);
    }

    /// Adds a list; gives every block that is full to `write`.
    pub(super) fn push<E>(
        &mut self,
        list: ListRef<'_>,
        mut write: impl FnMut(&BlockKey, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for piece in list.pieces() {
            self.encode(&piece);
            if self.block.len() + self.list.len() > BLOCK_BYTES_MAX {
                let next = block_key(self.run, piece.key, piece.order());
                self.block[NEXT_AT].copy_from_slice(&next);
                self.seal(&mut write)?;
                self.begin(next);
                self.encode(&piece);
            }
            self.block.extend_from_slice(&self.list);
            self.previous = piece.key.to_bytes();
        }
        Ok(())
    }

    /// Gives the last block to `write`.
    pub(super) fn finish<E>(mut self, mut write: impl FnMut(&BlockKey, &[u8]) -> Result<(), E>) -> Result<(), E> {
        self.seal(&mut write)
    }

    fn seal<E>(&mut self, write: &mut impl FnMut(&BlockKey, &[u8]) -> Result<(), E>) -> Result<(), E> {
        record::seal(&self.key, &mut self.block);
        write(&self.key, &self.block)
    }

    /// Key (as far as it differs from the one before), count, last seq and time of a conversation, positions.
    fn encode(&mut self, piece: &ListRef<'_>) {
        self.list.clear();
        let key = piece.key.to_bytes();
        let shared = key.iter().zip(&self.previous).take_while(|(a, b)| a == b).count();
        put_number(&mut self.list, shared as u64);
        self.list.extend_from_slice(&key[shared..]);
        put_number(&mut self.list, piece.positions.len() as u64);
        if piece.key.is_conversation() {
            put_number(&mut self.list, piece.last.seq);
            put_number(&mut self.list, piece.last.at_ms);
        }
        let mut before = self.base;
        for position in piece.positions {
            put_number(&mut self.list, position - before);
            before = *position;
        }
    }
}

/// The lists of a block, one by one.
pub(super) struct BlockReader<'a> {
    /// The key of the block behind it.
    next: &'a [u8],
    body: Fields<'a>,
    base: u64,
    key: [u8; KEY_BYTES],
}

impl<'a> BlockReader<'a> {
    /// Checks the block first.
    pub(super) fn new(key: &BlockKey, block: &'a [u8]) -> Result<Self, String> {
        let mut body = record::open(key, block)?;
        let next = body.bytes(BLOCK_KEY_BYTES)?;
        let base = body.number()?;
        Ok(Self { next, body, base, key: [0; KEY_BYTES] })
    }

    /// The block with this key, and not one that is missing, would have what has this key.
    pub(super) fn covers(&self, wanted: &BlockKey) -> Result<(), String> {
        if wanted[..] < *self.next { Ok(()) } else { Err("the block behind it is missing".to_owned()) }
    }

    /// The key of the block behind it; [`END`] if there is none.
    pub(super) fn next_key(&self) -> BlockKey {
        let mut next = END;
        next.copy_from_slice(self.next);
        next
    }

    /// Reads the next list into `positions`, whose old content is lost. `None` at the end.
    pub(super) fn next(&mut self, positions: &mut Vec<u64>) -> Result<Option<(Key, Last)>, String> {
        if self.body.is_empty() {
            return Ok(None);
        }
        let shared = usize::try_from(self.body.number()?).unwrap_or(usize::MAX);
        let rest = self.key.get_mut(shared..).ok_or("a key shares more than it has")?;
        rest.copy_from_slice(self.body.bytes(KEY_BYTES - shared)?);
        let key = Key::from_bytes(self.key);
        let count = self.body.number()?;
        let last = if key.is_conversation() {
            Last { seq: self.body.number()?, at_ms: self.body.number()? }
        } else {
            Last::default()
        };
        if count == 0 || count > LIST_POSITIONS_MAX as u64 {
            return Err(format!("a list of {count} positions"));
        }
        positions.clear();
        let mut position = self.base;
        for _ in 0..count {
            position = position.checked_add(self.body.number()?).ok_or("a position is too large")?;
            positions.push(position);
        }
        Ok(Some((key, last)))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use chat_protocol::{ConversationId, UserId};
    use proptest::prelude::*;

    use super::super::key::Keys;
    use super::*;

    /// Lists in their order: some conversations and some inboxes, with gaps of all sizes between positions.
    fn lists() -> impl Strategy<Value = Vec<List>> {
        let steps = prop_oneof![
            8 => prop::collection::vec(1_u64..300, 1..4),
            1 => prop::collection::vec(1_u64..3, 200..900),
            1 => prop::collection::vec(1_u64..u64::MAX / 1_000, 1..5),
        ];
        prop::collection::btree_map((any::<bool>(), 0_u32..500), (steps, 0_u64..1_000, any::<u32>()), 0..200).prop_map(
            |lists| {
                let keys = Keys::new((3, 4));
                let mut lists: Vec<List> = lists
                    .into_iter()
                    .map(|((is_conversation, number), (steps, before, at_ms))| {
                        let user = UserId::parse(&format!("u{number}")).unwrap();
                        let conversation = ConversationId::between(&user, &UserId::parse("bob").unwrap()).unwrap();
                        let positions: Vec<u64> = steps
                            .iter()
                            .scan(100, |position, step| {
                                *position += step;
                                Some(*position)
                            })
                            .collect();
                        let last = Last { seq: before + positions.len() as u64, at_ms: u64::from(at_ms) };
                        if is_conversation {
                            List { key: keys.conversation(&conversation), positions, last }
                        } else {
                            List { key: keys.inbox(&user), positions, last: Last::default() }
                        }
                    })
                    .collect();
                lists.sort_by_key(|list| list.key);
                lists
            },
        )
    }

    fn blocks(lists: &[List]) -> Vec<(BlockKey, Vec<u8>)> {
        let mut blocks = Vec::new();
        let mut writer = BlockWriter::new(7, 100);
        let mut write = |key: &BlockKey, block: &[u8]| {
            blocks.push((*key, block.to_vec()));
            Ok::<(), Infallible>(())
        };
        for list in lists {
            writer.push(list.as_ref(), &mut write).unwrap();
        }
        writer.finish(&mut write).unwrap();
        blocks
    }

    proptest! {
        #[test]
        fn lists_come_back_from_blocks_of_a_page(lists in lists()) {
            let blocks = blocks(&lists);
            prop_assert!(blocks.is_sorted_by(|(a, _), (b, _)| a < b));
            let mut read: Vec<List> = Vec::new();
            prop_assert_eq!(blocks[0].0, first_key(7));
            for (nth, (key, block)) in blocks.iter().enumerate() {
                prop_assert!(block.len() <= BLOCK_BYTES_MAX, "{} bytes", block.len());
                prop_assert_eq!(run_of(key), 7);
                let mut reader = BlockReader::new(key, block).unwrap();
                prop_assert_eq!(reader.next_key(), blocks.get(nth + 1).map_or(END, |(key, _)| *key));
                prop_assert!(reader.covers(key).is_ok());
                let mut positions = Vec::new();
                let mut first = nth > 0;
                while let Some((list, last)) = reader.next(&mut positions).unwrap() {
                    let piece = ListRef { key: list, positions: &positions, last };
                    if first {
                        prop_assert_eq!(*key, block_key(7, list, piece.order()));
                        first = false;
                    }
                    match read.last_mut() {
                        Some(before) if before.key == list => {
                            if list.is_conversation() {
                                prop_assert_eq!(piece.first_seq(), before.last.seq + 1);
                            }
                            before.positions.extend_from_slice(&positions);
                            before.last = last;
                        }
                        _ => read.push(List { key: list, positions: positions.clone(), last }),
                    }
                }
            }
            prop_assert_eq!(read, lists);
        }
    }

    #[test]
    fn every_flipped_bit_of_a_block_is_noticed() {
        let keys = Keys::new((3, 4));
        let list =
            List { key: keys.sent(&UserId::parse("bob").unwrap()), positions: vec![101, 105], last: Last::default() };
        let (key, block) = blocks(&[list]).remove(0);
        for bit in 0..block.len() * 8 {
            let mut flipped = block.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(BlockReader::new(&key, &flipped).is_err(), "bit {bit}");
        }
        assert!(BlockReader::new(&block_key(8, Key::MAX, 0), &block).is_err(), "under another key");
    }
}
