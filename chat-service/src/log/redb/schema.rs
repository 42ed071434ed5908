//! The tables of `log.redb` and `index.redb`, and their keys.
//!
//! The log has the entries, the cursors and the sessions. The index has what is found in entries, and can be made again from them.
//! A key of the log is a user, a NUL, and the rest: a name contains no NUL, so no name's keys begin another's. Whoever changes a key or
//! a table raises [`LOG_FORMAT`] or [`INDEX_FORMAT`]; a record has a version of its own (see [`super::record`]).

use ::redb::TableDefinition;
use chat_protocol::{Seq, UserId};

use super::super::{Device, Side, Stream};
use super::key::KEY_BYTES;
use super::posting::BLOCK_KEY_BYTES;

/// The version of the log's layout that this code reads and writes. Version 2 had no [`HEADS`], [`PEERS`], [`HIDDEN`], [`SEEN`], [`SHREDS`] and [`FIRST_KEY`],
/// and is brought up to this one; version 1 was `chat.redb`, a file with an index of its own.
pub(super) const LOG_FORMAT: u64 = 3;
/// The version of the index's layout that this code reads and writes. Another one is made anew.
pub(super) const INDEX_FORMAT: u64 = 1;
/// The key in [`META`] of the version of the file's layout.
pub(super) const FORMAT_KEY: &str = "format";
/// The keys in [`META`] of the log's secret, from which the index's keys are made. An index belongs to the log with the same.
pub(super) const SECRET_KEYS: [&str; 2] = ["secret_0", "secret_1"];
/// The log's key in [`META`] of the position of its first entry; everything before is removed.
pub(super) const FIRST_KEY: &str = "first";
/// The index's key in [`META`] of the first position that [`USAGE`] counts, and of the first that it does not count any more. There if it counts.
pub(super) const USAGE_KEYS: [&str; 2] = ["usage_first", "usage_end"];

type Bytes = &'static [u8];

/// Both files: what the file is.
pub(super) const META: TableDefinition<'static, &'static str, u64> = TableDefinition::new("meta");

/// Log: position of its first entry → row of entries.
pub(super) const ROWS: TableDefinition<'static, u64, Bytes> = TableDefinition::new("rows");
/// Log: user and side → the highest acknowledged position, and the head of the log when it became that.
pub(super) const DELIVERED: TableDefinition<'static, Bytes, (u64, u64)> = TableDefinition::new("acknowledged");
/// Of format 2: user and side → the highest acknowledged position.
pub(super) const DELIVERED_OF_FORMAT_2: TableDefinition<'static, Bytes, u64> = TableDefinition::new("delivered");
/// Log: user and client id → session record.
pub(super) const SESSIONS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("sessions");
/// Log: conversation → head, for those whose entries are removed; behind what the entries say if there are any again.
pub(super) const HEADS: TableDefinition<'static, &'static str, Bytes> = TableDefinition::new("heads");

/// Log: user and peer → what the user has on record about the peer.
pub(super) const PEERS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("peers");
/// Log: user, peer and seq → head of the log when the user hid that entry.
pub(super) const HIDDEN: TableDefinition<'static, Bytes, u64> = TableDefinition::new("hidden");
/// Log: user → when they were last there, in milliseconds since the Unix epoch.
pub(super) const SEEN: TableDefinition<'static, &'static str, u64> = TableDefinition::new("seen");

/// Log: position → checksum and length of a record whose words were erased, until no byte of it is on the disk.
pub(super) const SHREDS: TableDefinition<'static, u64, (u32, u32)> = TableDefinition::new("shreds");

/// Index: number of a run → what it is.
pub(super) const RUNS: TableDefinition<'static, u32, Bytes> = TableDefinition::new("runs");
/// Index: run, key and order of the first list → block of lists.
pub(super) const BLOCKS: TableDefinition<'static, &'static [u8; BLOCK_KEY_BYTES], Bytes> =
    TableDefinition::new("blocks");
/// Index: run and number of the part → part of the run's filter.
pub(super) const FILTERS: TableDefinition<'static, (u32, u32), Bytes> = TableDefinition::new("filters");
/// Index: key of a conversation or a sender → bytes that are stored for it.
pub(super) const USAGE: TableDefinition<'static, &'static [u8; KEY_BYTES], u64> = TableDefinition::new("usage");

const SEPARATOR: u8 = 0;

pub(super) fn delivered_key(stream: &Stream) -> Vec<u8> {
    key(&[stream.user.as_str().as_bytes()], &[SEPARATOR, side_byte(stream.side)])
}

/// The client id may contain anything, a NUL too: it comes last.
pub(super) fn session_key(device: &Device) -> Vec<u8> {
    key(&[device.user.as_str().as_bytes(), &[SEPARATOR]], device.client_id.as_bytes())
}

/// Begins the keys of all of a user's sessions.
pub(super) fn sessions_key(user: &UserId) -> Vec<u8> {
    key(&[user.as_str().as_bytes()], &[SEPARATOR])
}

/// The device that a session's key names.
pub(super) fn device_of(session_key: &[u8]) -> Option<Device> {
    let (user, client_id) = std::str::from_utf8(session_key).ok()?.split_once(char::from(SEPARATOR))?;
    Some(Device { user: UserId::parse(user).ok()?, client_id: client_id.into() })
}

/// Begins the keys of all of a user's peers.
pub(super) fn peers_key(user: &UserId) -> Vec<u8> {
    key(&[user.as_str().as_bytes()], &[SEPARATOR])
}

pub(super) fn peer_key(user: &UserId, peer: &UserId) -> Vec<u8> {
    key(&[user.as_str().as_bytes(), &[SEPARATOR]], peer.as_str().as_bytes())
}

pub(super) fn hidden_key(user: &UserId, peer: &UserId, seq: Seq) -> Vec<u8> {
    key(&[user.as_str().as_bytes(), &[SEPARATOR], peer.as_str().as_bytes(), &[SEPARATOR]], &seq.get().to_be_bytes())
}

const fn side_byte(side: Side) -> u8 {
    match side {
        Side::Inbox => 0,
        Side::Sent => 1,
        Side::EveryInbox => 2,
        Side::EverySent => 3,
    }
}

fn key(begin: &[&[u8]], end: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(begin.iter().map(|part| part.len()).sum::<usize>() + end.len());
    begin.iter().for_each(|part| key.extend_from_slice(part));
    key.extend_from_slice(end);
    key
}

#[cfg(test)]
mod tests {
    use chat_protocol::UserId;

    use super::*;

    #[test]
    fn client_ids_that_begin_each_other_are_different_keys() {
        let key = |user: &str, client_id: &str| {
            session_key(&Device { user: UserId::parse(user).unwrap(), client_id: client_id.into() })
        };
        let keys = [
            key("al", ""),
            key("al", "\0"),
            key("al", "ice"),
            key("al", "ice\0"),
            key("alice", ""),
            key("alice", "\0ice"),
        ];
        let distinct: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        let device = Device { user: UserId::parse("al").unwrap(), client_id: "ice\0".into() };
        assert_eq!(device_of(&session_key(&device)), Some(device));
    }
}
