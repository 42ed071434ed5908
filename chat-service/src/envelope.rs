//! Entries as receivers see them: the JSON envelope and the MQTT 5 user properties beside it.

use bytes::Bytes;
use chat_protocol::{EntryRef, KindRef, MessageId, Seq, UserId};

use crate::log::{Body, Entry, NewEntry};

/// The envelope of an entry that was just stored.
pub fn encode(entry: &NewEntry) -> Bytes {
    chat_protocol::encode(&EntryRef {
        conversation: &entry.conversation,
        seq: entry.seq,
        from: &entry.from,
        to: &entry.to,
        id: entry.id.as_ref(),
        at: entry.at,
        kind: kind(&entry.body),
    })
    .into()
}

/// The envelope of an entry read from the log: the same bytes.
pub fn encode_stored(entry: &Entry) -> Bytes {
    chat_protocol::encode(&EntryRef {
        conversation: &entry.conversation,
        seq: entry.seq,
        from: &entry.from,
        to: &entry.to,
        id: entry.id.as_ref(),
        at: entry.at,
        kind: kind(&entry.body),
    })
    .into()
}

fn kind(body: &Body) -> KindRef<'_> {
    match body {
        Body::Text(text) => KindRef::Text(text),
        Body::Edit { target, text } => KindRef::Edit { target: *target, text },
        Body::Unsend { target } => KindRef::Unsend { target: *target },
        Body::Erased { .. } => KindRef::Erased,
    }
}

/// The user properties beside it.
pub fn properties(body: &Body, seq: Seq, from: &UserId, id: Option<&MessageId>) -> Vec<(&'static str, String)> {
    let mut properties =
        vec![("kind", kind(body).name().to_owned()), ("seq", seq.to_string()), ("from", from.as_str().to_owned())];
    properties.extend(id.map(|id| ("id", id.as_str().to_owned())));
    properties
}
