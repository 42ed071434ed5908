//! The tables of `chat.redb` and their keys.
//!
//! A key is a user or a conversation, a NUL, and the rest: neither name contains a NUL, so no name's keys begin another's, and all
//! keys of one name lie together. Numbers in keys are big-endian, so that bytes sort as numbers do. Whoever changes a key or a
//! table raises [`FORMAT`]; a record has a version of its own (see [`super::record`]).

use ::redb::TableDefinition;
use chat_protocol::{ConversationId, MessageId, UserId};

use super::super::{Device, Position, Side, Stream};

/// The version of the file's layout that this code reads and writes.
pub(super) const FORMAT: u64 = 1;
/// The key in [`META`] of the version of the file's layout.
pub(super) const FORMAT_KEY: &str = "format";

type Bytes = &'static [u8];

/// What the file is.
pub(super) const META: TableDefinition<'static, &'static str, u64> = TableDefinition::new("meta");
/// Position → entry record.
pub(super) const ENTRIES: TableDefinition<'static, u64, Bytes> = TableDefinition::new("entries");
/// Conversation → its last seq, and that entry's time in milliseconds.
pub(super) const CONVERSATIONS: TableDefinition<'static, Bytes, (u64, u64)> = TableDefinition::new("conversations");
/// Conversation and seq → position.
pub(super) const BY_SEQ: TableDefinition<'static, Bytes, u64> = TableDefinition::new("by_seq");
/// User, side and position: the streams.
pub(super) const STREAMS: TableDefinition<'static, Bytes, ()> = TableDefinition::new("streams");
/// Conversation, sender and sender's id → position of the first entry with it, and its time in milliseconds, by which a purge
/// could choose. Nothing is purged yet, so the promised 7 days are for ever.
pub(super) const IDS: TableDefinition<'static, Bytes, (u64, u64)> = TableDefinition::new("ids");
/// User and side → the highest acknowledged position.
pub(super) const DELIVERED: TableDefinition<'static, Bytes, u64> = TableDefinition::new("delivered");
/// User and client id → session record.
pub(super) const SESSIONS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("sessions");

const SEPARATOR: u8 = 0;

pub(super) fn conversation_key(conversation: &ConversationId) -> Vec<u8> {
    key(&names(conversation), &[])
}

pub(super) fn by_seq_key(conversation: &ConversationId, seq: u64) -> Vec<u8> {
    let [first, colon, second] = names(conversation);
    key(&[first, colon, second, &[SEPARATOR]], &seq.to_be_bytes())
}

pub(super) fn stream_key(stream: &Stream, position: Position) -> Vec<u8> {
    stream_key_of(&stream.user, stream.side, position)
}

pub(super) fn stream_key_of(user: &UserId, side: Side, position: Position) -> Vec<u8> {
    key(&[user.as_str().as_bytes(), &[SEPARATOR, side_byte(side)]], &position.0.to_be_bytes())
}

/// The position at the end of a key of [`STREAMS`], unless the key is too short to have one.
pub(super) fn stream_position(key: &[u8]) -> Option<Position> {
    key.last_chunk().map(|bytes| Position(u64::from_be_bytes(*bytes)))
}

pub(super) fn id_key(conversation: &ConversationId, from: &UserId, id: &MessageId) -> Vec<u8> {
    let [first, colon, second] = names(conversation);
    let from = from.as_str().as_bytes();
    key(&[first, colon, second, &[SEPARATOR], from, &[SEPARATOR]], id.as_str().as_bytes())
}

pub(super) fn delivered_key(stream: &Stream) -> Vec<u8> {
    key(&[stream.user.as_str().as_bytes()], &[SEPARATOR, side_byte(stream.side)])
}

/// The client id may contain anything, a NUL too: it comes last.
pub(super) fn session_key(device: &Device) -> Vec<u8> {
    key(&[device.user.as_str().as_bytes(), &[SEPARATOR]], device.client_id.as_bytes())
}

const fn side_byte(side: Side) -> u8 {
    match side {
        Side::Inbox => 0,
        Side::Sent => 1,
    }
}

fn names(conversation: &ConversationId) -> [&[u8]; 3] {
    [conversation.first().as_str().as_bytes(), b":", conversation.second().as_str().as_bytes()]
}

fn key(begin: &[&[u8]], end: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(begin.iter().map(|part| part.len()).sum::<usize>() + end.len());
    begin.iter().for_each(|part| key.extend_from_slice(part));
    key.extend_from_slice(end);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_sort_by_user_side_and_position_and_do_not_mix() {
        let key = |user: &str, side, position| stream_key_of(&UserId::parse(user).unwrap(), side, Position(position));
        let sorted = [
            key("al", Side::Inbox, 1),
            key("al", Side::Inbox, 255),
            key("al", Side::Inbox, 256),
            key("al", Side::Inbox, u64::MAX),
            key("al", Side::Sent, 0),
            key("al", Side::Sent, u64::MAX),
            key("al-ice", Side::Inbox, 0),
            key("alice", Side::Inbox, 0),
        ];
        assert!(sorted.is_sorted_by(|a, b| a < b), "{sorted:?}");
        assert_eq!(stream_position(&sorted[2]), Some(Position(256)));
        assert_eq!(stream_position(b"short"), None);
    }

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
    }
}
