//! What clients publish to chat's topics, and envelopes as clients of another version may have written them.

use chat_protocol::event::TypingState;
use chat_protocol::request::Request;
use chat_protocol::{EntryRef, Envelope, Kind, KindRef, encode};

const METHODS: [&str; 10] =
    ["whoami", "conversations", "history", "sync", "block", "unblock", "blocked", "delete", "unsend", "edit"];

/// An envelope survives being written and read; a request is understood or refused in a sentence.
pub(crate) fn envelopes(data: &[u8]) {
    if let Ok(envelope) = Envelope::decode(data) {
        let kind = match &envelope.kind {
            Kind::Text(text) => Some(KindRef::Text(text)),
            Kind::Edit { target, text } => Some(KindRef::Edit { target: *target, text }),
            _ => None,
        };
        if let Some(kind) = kind {
            let written = encode(&EntryRef {
                conversation: &envelope.conversation,
                seq: envelope.seq,
                from: &envelope.from,
                to: &envelope.to,
                id: envelope.id.as_ref(),
                at: envelope.at,
                kind,
            });
            assert_eq!(Envelope::decode(&written).ok().as_ref(), Some(&envelope));
        }
    }
    TypingState::parse(data);
    for method in METHODS.into_iter().chain(["", "nothing"]) {
        if let Err(error) = Request::parse(method, data).call {
            assert!(!error.message.is_empty(), "{method} is refused without a sentence");
        }
    }
}
