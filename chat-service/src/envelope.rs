//! Entries as receivers see them: the JSON envelope and the MQTT 5 user properties beside it.

use bytes::Bytes;
use chat_protocol::{EntryRef, KindRef, MessageId, Seq, UserId};

use crate::log::{Body, Entry, NewEntry};

/// The envelope of an entry that was just stored, in place of what was in `bytes`.
pub fn encode_into(entry: &NewEntry, bytes: &mut Vec<u8>) {
    bytes.clear();
    chat_protocol::encode_into(
        &EntryRef {
            conversation: &entry.conversation,
            seq: entry.seq,
            from: &entry.from,
            to: &entry.to,
            id: entry.id.as_ref(),
            at: entry.at,
            kind: kind(&entry.body),
        },
        bytes,
    );
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

/// The same for an entry that was just stored, whose seq is written already.
pub fn properties_of<'a>(
    entry: &'a NewEntry,
    seq: &'a str,
    place: &'a mut [(&'a str, &'a str); 4],
) -> &'a [(&'a str, &'a str)] {
    let id = entry.id.as_ref().map(MessageId::as_str);
    *place = [
        ("kind", kind(&entry.body).name()),
        ("seq", seq),
        ("from", entry.from.as_str()),
        ("id", id.unwrap_or_default()),
    ];
    &place[..if id.is_some() { 4 } else { 3 }]
}
