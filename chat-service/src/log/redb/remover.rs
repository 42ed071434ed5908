//! Removing entries from the beginning of the log, step by step.
//!
//! A step looks at the first rows, notes the heads of conversations that it empties and takes the entries off their accounts in the index; then
//! the writer removes the rows, in a commit that it may share with appends. It does nothing slower than that, so appends never wait long.
//! What is about to be removed is hidden from reads first. A crash between index and log is made up for: what was taken off once is not again.

use std::collections::BTreeMap;
use std::sync::Arc;

use ::redb::ReadableTable;
use chat_protocol::{ConversationId, Timestamp};

use super::super::{ConversationHead, Entry, Position};
use super::Shared;
use super::index::Discount;
use super::key::Key;
use super::reader::ReadError;
use super::recent::Posted;
use super::row;
use super::schema::{META, ROWS, USAGE_KEYS};

/// Bytes of rows and entries that one step looks at: what the writer removes in some ms, and in 20 if each was of a conversation of its own.
const STEP_BYTES: usize = 2 * 1024 * 1024;
const STEP_ENTRIES: usize = 8_192;

/// What the writer is to remove.
#[derive(Debug)]
pub(super) struct Removal {
    /// Position of the first entry that stays.
    pub(super) first: Position,
    /// Conversations that have no entries then.
    pub(super) heads: Vec<(ConversationId, ConversationHead)>,
}

impl Shared {
    /// One step. How many entries it removed; 0 if there is none to remove.
    pub(super) async fn remove_before(self: &Arc<Self>, time: Timestamp) -> Result<u64, String> {
        // A second one would remove the same.
        let _alone = self.removing.lock().await;
        // What is looked at is the file.
        if !self.pending().is_empty() {
            self.written_to_the_file().await?;
        }
        let shared = Arc::clone(self);
        let planned = tokio::task::spawn_blocking(move || shared.plan_removal(time)).await;
        let Some(removal) = planned.map_err(|error| error.to_string())?? else { return Ok(0) };
        let before = self.first();
        let first = removal.first;
        // Reads that find something gone find it hidden, too.
        self.hide_before(first);
        match self.remove(removal).await {
            Ok(()) => Ok(first.0 - before.0),
            Err(reason) => {
                self.hide_before(before);
                Err(reason)
            }
        }
    }

    fn plan_removal(&self, time: Timestamp) -> Result<Option<Removal>, String> {
        let old = self.old_entries(time).map_err(|error| error.to_string())?;
        let Some(last) = old.last() else { return Ok(None) };
        let first = Position(last.position.0 + 1);
        // Whatever is removed is indexed, so the index follows the log without a gap, and accounts have what is taken off them.
        self.index.wait_until_indexed(last.position)?;
        let heads = self.emptied(&old).map_err(|error| error.to_string())?;
        if self.index.counts_usage {
            let discount = self.discount(&old, first).map_err(|error| error.to_string())?;
            self.index.discount(discount)?;
        }
        Ok(Some(Removal { first, heads }))
    }

    /// Of the first rows, the entries up to the last old one. What is committed after something old is not older, whatever its time says.
    fn old_entries(&self, time: Timestamp) -> Result<Vec<Entry>, ReadError> {
        let rows = self.begin_read()?.open_table(ROWS)?;
        let mut entries = Vec::new();
        let (mut old, mut bytes) = (0, 0);
        for found in rows.iter()? {
            let (first, row) = found?;
            for entry in row::entries(Position(first.value()), row.value()) {
                let entry = entry?;
                let is_old = entry.at < time;
                entries.push(entry);
                if is_old {
                    old = entries.len();
                }
            }
            bytes += row.value().len();
            if bytes >= STEP_BYTES || entries.len() >= STEP_ENTRIES {
                break;
            }
        }
        entries.truncate(old);
        Ok(entries)
    }

    /// Conversations whose last entry is among these, with their heads. If one gets another meanwhile, its noted head is merely behind.
    fn emptied(&self, old: &[Entry]) -> Result<Vec<(ConversationId, ConversationHead)>, ReadError> {
        let mut last: BTreeMap<&ConversationId, ConversationHead> = BTreeMap::new();
        for entry in old {
            last.insert(&entry.conversation, ConversationHead { seq: entry.seq, at: entry.at });
        }
        let keys: Vec<Key> = last.keys().map(|conversation| self.keys.conversation(conversation)).collect();
        let heads = self.index.heads(&keys)?;
        let emptied = last.into_iter().zip(heads).filter(|((_, last), head)| head.is_none_or(|head| head == *last));
        Ok(emptied.map(|((conversation, last), _)| (conversation.clone(), last)).collect())
    }

    fn discount(&self, old: &[Entry], first: Position) -> Result<Discount, ReadError> {
        let meta = self.index.snapshot()?.open_table(META)?;
        let counted_from = meta.get(USAGE_KEYS[0])?.map_or(0, |first| first.value());
        let mut bytes: BTreeMap<Key, u64> = BTreeMap::new();
        for entry in old.iter().filter(|entry| entry.position.0 >= counted_from) {
            for (key, counted) in Posted::of(&self.keys, entry).counted() {
                *bytes.entry(key).or_default() += counted;
            }
        }
        Ok(Discount { bytes: bytes.into_iter().collect(), end: first.0.max(counted_from) })
    }
}
