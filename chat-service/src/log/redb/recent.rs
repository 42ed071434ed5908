//! The newest entries' postings, in memory: what the index on disk does not have yet.
//!
//! Entries are added in the order of their positions, after they were committed. Pure: whoever shares it brings the lock.

use rustc_hash::FxHashMap;

use super::super::{ConversationHead, Entry, NewEntry, Position};
use super::key::{Key, Keys};
use super::posting::{Last, ListRef};

/// Postings of entries that follow each other.
#[derive(Debug, Default)]
pub(super) struct Recent {
    lists: FxHashMap<Key, RecentList>,
    entries: usize,
    first: u64,
    last: u64,
    at_ms_max: u64,
}

#[derive(Debug)]
struct RecentList {
    positions: Positions,
    last: Last,
    /// What the entries count; 0 where nobody asks.
    bytes: u64,
}

/// Most lists are short: one position needs no memory of its own.
#[derive(Debug)]
enum Positions {
    One(u64),
    Many(Vec<u64>),
}

impl Positions {
    fn as_slice(&self) -> &[u64] {
        match self {
            Self::One(position) => std::slice::from_ref(position),
            Self::Many(positions) => positions,
        }
    }

    fn push(&mut self, position: u64) {
        match self {
            Self::One(first) => *self = Self::Many(vec![*first, position]),
            Self::Many(positions) => positions.push(position),
        }
    }
}

/// An entry's keys and what its conversation's list says of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Posted {
    position: u64,
    conversation: Key,
    /// Unless it is withheld.
    inbox: Option<Key>,
    sent: Key,
    id: Option<Key>,
    /// Of what it changes.
    change: Option<Key>,
    last: Last,
    bytes: u64,
}

impl Posted {
    pub(super) fn new(keys: &Keys, position: Position, conversation: Key, new: &NewEntry) -> Self {
        Self {
            position: position.0,
            conversation,
            inbox: (!new.withheld).then(|| keys.inbox(&new.to)),
            sent: keys.sent(&new.from),
            id: new.id.as_ref().map(|id| keys.id(&new.conversation, &new.from, id)),
            change: new.body.target().map(|target| keys.change(&new.conversation, target)),
            last: Last { seq: new.seq.get(), at_ms: new.at.as_ms() },
            bytes: new.body.counted_bytes(),
        }
    }

    pub(super) fn of(keys: &Keys, entry: &Entry) -> Self {
        Self {
            position: entry.position.0,
            conversation: keys.conversation(&entry.conversation),
            inbox: (!entry.withheld).then(|| keys.inbox(&entry.to)),
            sent: keys.sent(&entry.from),
            id: entry.id.as_ref().map(|id| keys.id(&entry.conversation, &entry.from, id)),
            change: entry.body.target().map(|target| keys.change(&entry.conversation, target)),
            last: Last { seq: entry.seq.get(), at_ms: entry.at.as_ms() },
            bytes: entry.body.counted_bytes(),
        }
    }

    /// Keys of the accounts that the entry counts for, and what it counts.
    pub(super) fn counted(&self) -> [(Key, u64); 2] {
        [(self.conversation, self.bytes), (self.sent, self.bytes)]
    }
}

impl Recent {
    pub(super) fn add(&mut self, posted: &Posted) {
        debug_assert!(self.last < posted.position, "positions grow");
        if self.entries == 0 {
            self.first = posted.position;
        }
        self.entries += 1;
        self.last = posted.position;
        self.at_ms_max = self.at_ms_max.max(posted.last.at_ms);
        self.push(posted.conversation, posted.position, posted.last, posted.bytes);
        self.push(posted.sent, posted.position, Last::default(), posted.bytes);
        for key in [posted.inbox, posted.id, posted.change].into_iter().flatten() {
            self.push(key, posted.position, Last::default(), 0);
        }
    }

    fn push(&mut self, key: Key, position: u64, last: Last, bytes: u64) {
        match self.lists.entry(key) {
            std::collections::hash_map::Entry::Occupied(list) => {
                let list = list.into_mut();
                list.positions.push(position);
                list.last = last;
                list.bytes += bytes;
            }
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(RecentList { positions: Positions::One(position), last, bytes });
            }
        }
    }

    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    pub(super) fn keys(&self) -> usize {
        self.lists.len()
    }

    /// First and last position; meaningless if there are no entries.
    pub(super) fn range(&self) -> (u64, u64) {
        (self.first, self.last)
    }

    pub(super) fn at_ms_max(&self) -> u64 {
        self.at_ms_max
    }

    pub(super) fn get(&self, key: Key) -> Option<ListRef<'_>> {
        let list = self.lists.get(&key)?;
        Some(ListRef { key, positions: list.positions.as_slice(), last: list.last })
    }

    pub(super) fn head(&self, key: Key) -> Option<ConversationHead> {
        super::index::head(self.get(key)?.last)
    }

    /// What a conversation's or a sender's entries count, in bytes.
    pub(super) fn bytes(&self, key: Key) -> u64 {
        self.lists.get(&key).map_or(0, |list| list.bytes)
    }

    /// The same for all that count something.
    pub(super) fn counted(&self) -> impl Iterator<Item = (Key, u64)> {
        self.lists.iter().filter(|(_, list)| list.bytes > 0).map(|(key, list)| (*key, list.bytes))
    }

    /// All lists, in the order of their keys.
    pub(super) fn sorted(&self) -> Vec<ListRef<'_>> {
        let mut lists: Vec<ListRef<'_>> = self
            .lists
            .iter()
            .map(|(key, list)| ListRef { key: *key, positions: list.positions.as_slice(), last: list.last })
            .collect();
        lists.sort_unstable_by_key(|list| list.key);
        lists
    }
}
