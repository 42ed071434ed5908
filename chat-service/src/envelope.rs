//! Entries as receivers see them: the JSON envelope and the MQTT 5 user properties beside it.

use bytes::Bytes;
use chat_protocol::{MessageId, Seq, TextEntry, UserId};

use crate::log::{Entry, NewEntry};

/// The envelope of an entry that was just stored.
pub fn encode(entry: &NewEntry) -> Bytes {
    chat_protocol::encode_text(&TextEntry {
        conversation: &entry.conversation,
        seq: entry.seq,
        from: &entry.from,
        to: &entry.to,
        id: entry.id.as_ref(),
        at: entry.at,
        text: &entry.text,
    })
    .into()
}

/// The envelope of an entry read from the log: the same bytes.
pub fn encode_stored(entry: &Entry) -> Bytes {
    chat_protocol::encode_text(&TextEntry {
        conversation: &entry.conversation,
        seq: entry.seq,
        from: &entry.from,
        to: &entry.to,
        id: entry.id.as_ref(),
        at: entry.at,
        text: &entry.text,
    })
    .into()
}

/// The user properties beside it.
pub fn properties(seq: Seq, from: &UserId, id: Option<&MessageId>) -> Vec<(&'static str, String)> {
    let mut properties =
        vec![("kind", "text".to_owned()), ("seq", seq.to_string()), ("from", from.as_str().to_owned())];
    properties.extend(id.map(|id| ("id", id.as_str().to_owned())));
    properties
}
