//! The message envelope: one JSON object per entry of a conversation.
//!
//! Writers write exactly the members below, in this order. Readers ignore members they do not know and take kinds they do not know as
//! [`Kind::Other`]: later versions add both.

use std::io::Write;

use serde::Deserialize;

use crate::{ConversationId, MessageId, Seq, Timestamp, UserId};

/// An entry, borrowed, to be encoded.
#[derive(Clone, Copy, Debug)]
pub struct EntryRef<'a> {
    pub conversation: &'a ConversationId,
    pub seq: Seq,
    pub from: &'a UserId,
    pub to: &'a UserId,
    /// Absent where the sender chose none.
    pub id: Option<&'a MessageId>,
    pub at: Timestamp,
    pub kind: KindRef<'a>,
}

/// What kind of entry it is, borrowed.
#[derive(Clone, Copy, Debug)]
pub enum KindRef<'a> {
    /// A text.
    Text(&'a str),
    /// The text of entry `target` is now another.
    Edit { target: Seq, text: &'a str },
    /// The text of entry `target` is gone.
    Unsend { target: Seq },
    /// Was a text or an edit; its words are erased.
    Erased,
}

impl KindRef<'_> {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Edit { .. } => "edit",
            Self::Unsend { .. } => "unsend",
            Self::Erased => "erased",
        }
    }
}

/// The bytes of an entry's envelope.
pub fn encode(entry: &EntryRef<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_into(entry, &mut bytes);
    bytes
}

/// The same behind what is in `bytes`.
///
/// Written by hand, because it is done once for every message: names and ids need no escapes (their grammars allow nothing that does), and
/// neither do most texts.
pub fn encode_into(entry: &EntryRef<'_>, bytes: &mut Vec<u8>) {
    let EntryRef { conversation, seq, from, to, id, at, kind } = entry;
    let (target, text) = match kind {
        KindRef::Text(text) => (None, Some(text)),
        KindRef::Edit { target, text } => (Some(target), Some(text)),
        KindRef::Unsend { target } => (Some(target), None),
        KindRef::Erased => (None, None),
    };
    // The members without the text take at most about 480 bytes; most texts need no escapes.
    bytes.reserve(192 + text.map_or(0, |text| text.len()));
    let put = |bytes: &mut Vec<u8>, parts: &[&str]| {
        for part in parts {
            bytes.extend_from_slice(part.as_bytes());
        }
    };
    let (first, second) = (conversation.first().as_str(), conversation.second().as_str());
    put(bytes, &[r#"{"v":1,"kind":""#, kind.name(), r#"","conversation":""#, first, ":", second, r#"","seq":"#]);
    put_number(bytes, seq.get());
    put(bytes, &[r#","from":""#, from.as_str(), r#"","to":""#, to.as_str()]);
    if let Some(id) = id {
        put(bytes, &[r#"","id":""#, id.as_str()]);
    }
    put(bytes, &[r#"","at":"#]);
    put_number(bytes, at.as_ms());
    if let Some(target) = target {
        put(bytes, &[r#","target":"#]);
        put_number(bytes, target.get());
    }
    if let Some(text) = text {
        put(bytes, &[r#","text":"#]);
        put_text(bytes, text);
    }
    bytes.push(b'}');
}

fn put_number(bytes: &mut Vec<u8>, number: u64) {
    write!(bytes, "{number}").expect("a vector takes all bytes");
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    let needs_escape = |byte: u8| byte < 0x20 || byte == b'"' || byte == b'\\';
    // All bytes are looked at, without an early end: so several are looked at in one instruction.
    if text.bytes().fold(false, |found, byte| found | needs_escape(byte)) {
        serde_json::to_writer(bytes, text).expect("a string always encodes, and a vector takes all bytes");
    } else {
        bytes.push(b'"');
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(b'"');
    }
}

/// What kind of entry it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A text.
    Text(String),
    /// The text of entry `target` is now another.
    Edit { target: Seq, text: String },
    /// The text of entry `target` is gone.
    Unsend { target: Seq },
    /// Was a text or an edit; its words are erased.
    Erased,
    /// A kind that this version does not know.
    Other(String),
}

/// An entry as readers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    pub conversation: ConversationId,
    pub seq: Seq,
    pub from: UserId,
    pub to: UserId,
    pub id: Option<MessageId>,
    pub at: Timestamp,
    pub kind: Kind,
}

/// The bytes are no envelope of version 1; the sentence says why.
#[derive(Debug, thiserror::Error)]
#[error("not a message envelope: {0}")]
pub struct InvalidEnvelope(String);

#[derive(Deserialize)]
struct AnyEnvelope {
    v: u64,
    kind: String,
    conversation: ConversationId,
    seq: Seq,
    from: UserId,
    to: UserId,
    id: Option<MessageId>,
    at: Timestamp,
    text: Option<String>,
    target: Option<Seq>,
}

impl Envelope {
    /// Reads an envelope.
    pub fn decode(bytes: &[u8]) -> Result<Self, InvalidEnvelope> {
        let any: AnyEnvelope = serde_json::from_slice(bytes).map_err(|error| InvalidEnvelope(error.to_string()))?;
        if any.v != 1 {
            return Err(InvalidEnvelope(format!("version {} is not 1", any.v)));
        }
        let without = |member: &str| InvalidEnvelope(format!("a {} has a member `{member}`", any.kind));
        let text = || any.text.clone().ok_or_else(|| without("text"));
        let target = || any.target.ok_or_else(|| without("target"));
        let kind = match any.kind.as_str() {
            "text" => Kind::Text(text()?),
            "edit" => Kind::Edit { target: target()?, text: text()? },
            "unsend" => Kind::Unsend { target: target()? },
            "erased" => Kind::Erased,
            other => Kind::Other(other.to_owned()),
        };
        Ok(Self {
            conversation: any.conversation,
            seq: any.seq,
            from: any.from,
            to: any.to,
            id: any.id,
            at: any.at,
            kind,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Serialize;

    use super::*;

    /// The envelope as its members say it, for serde to encode.
    #[derive(Serialize)]
    struct Members<'a> {
        v: u8,
        kind: &'static str,
        conversation: &'a ConversationId,
        seq: Seq,
        from: &'a UserId,
        to: &'a UserId,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<&'a MessageId>,
        at: Timestamp,
        #[serde(skip_serializing_if = "Option::is_none")]
        target: Option<Seq>,
        #[serde(skip_serializing_if = "Option::is_none")]
        text: Option<&'a str>,
    }

    proptest! {
        #[test]
        fn the_encoder_writes_what_serde_would(
            (from, to) in ("[a-z0-9][a-z0-9_-]{0,63}", "[a-z0-9][a-z0-9_-]{0,63}"), id in prop::option::of("[A-Za-z0-9_-]{1,64}"),
            seq in 1_u64.., at in any::<u64>(), target in 1_u64.., text in prop_oneof!["\\PC{0,80}", any::<String>(), "[ -~]{0,200}", "[\\x00-\\x7f]{0,9}"],
            which in 0..4,
        ) {
            prop_assume!(from != to);
            let (from, to) = (UserId::parse(&from).expect("valid"), UserId::parse(&to).expect("valid"));
            let conversation = ConversationId::between(&from, &to).expect("two users");
            let id = id.map(|id| MessageId::parse(&id).expect("valid"));
            let target = Seq::new(target).expect("not 0");
            let kind = match which {
                0 => KindRef::Text(&text),
                1 => KindRef::Edit { target, text: &text },
                2 => KindRef::Unsend { target },
                _ => KindRef::Erased,
            };
            let (seq, at) = (Seq::new(seq).expect("not 0"), Timestamp::from_ms(at));
            let entry = EntryRef { conversation: &conversation, seq, from: &from, to: &to, id: id.as_ref(), at, kind };
            let members = Members {
                v: 1,
                kind: kind.name(),
                conversation: &conversation,
                seq,
                from: &from,
                to: &to,
                id: id.as_ref(),
                at,
                target: (which == 1 || which == 2).then_some(target),
                text: (which < 2).then_some(&text),
            };
            let mut encoded = b"before".to_vec();
            encode_into(&entry, &mut encoded);
            let expected = format!("before{}", serde_json::to_string(&members).expect("JSON"));
            prop_assert_eq!(String::from_utf8(encoded).expect("JSON is UTF-8"), expected);
        }
    }

    fn decode_fixture(name: &str) -> Envelope {
        let path = format!("{}/fixtures/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        Envelope::decode(&bytes).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    #[test]
    fn the_wire_samples_decode() {
        assert_eq!(decode_fixture("text").kind, Kind::Text("hello".to_owned()));
        assert_eq!(decode_fixture("text").id.expect("has an id").as_str(), "m-001");
        assert_eq!(decode_fixture("text-without-id").id, None);
        let seventeen = Seq::new(17).expect("not 0");
        assert_eq!(decode_fixture("edit").kind, Kind::Edit { target: seventeen, text: "hello!".to_owned() });
        assert_eq!(decode_fixture("unsend").kind, Kind::Unsend { target: seventeen });
        assert_eq!(decode_fixture("erased").kind, Kind::Erased);
        assert_eq!(decode_fixture("unknown-kind").kind, Kind::Other("reaction".to_owned()));
        assert_eq!(decode_fixture("unknown-member").kind, Kind::Text("hello".to_owned()));
    }

    #[test]
    fn the_encoder_writes_the_sample_to_the_byte() {
        let (alice, bob) = (UserId::parse("alice").expect("valid"), UserId::parse("bob").expect("valid"));
        let entry = EntryRef {
            conversation: &ConversationId::between(&alice, &bob).expect("two users"),
            seq: Seq::new(17).expect("not 0"),
            from: &alice,
            to: &bob,
            id: Some(&MessageId::parse("m-001").expect("valid")),
            at: Timestamp::from_ms(1_795_456_800_123),
            kind: KindRef::Text("hello"),
        };
        let sample = include_str!("../fixtures/text.json");
        assert_eq!(String::from_utf8(encode(&entry)).expect("JSON is UTF-8"), sample.trim_end());
        let sample = include_str!("../fixtures/text-without-id.json");
        let entry = EntryRef { id: None, ..entry };
        assert_eq!(String::from_utf8(encode(&entry)).expect("JSON is UTF-8"), sample.trim_end());
        let target = Seq::new(17).expect("not 0");
        for (seq, id, at, kind, sample) in [
            (
                18,
                "m-002",
                1_795_456_860_001,
                KindRef::Edit { target, text: "hello!" },
                include_str!("../fixtures/edit.json"),
            ),
            (19, "m-003", 1_795_456_890_001, KindRef::Unsend { target }, include_str!("../fixtures/unsend.json")),
            (17, "m-001", 1_795_456_800_123, KindRef::Erased, include_str!("../fixtures/erased.json")),
        ] {
            let id = MessageId::parse(id).expect("valid");
            let (seq, at) = (Seq::new(seq).expect("not 0"), Timestamp::from_ms(at));
            let entry = EntryRef { id: Some(&id), seq, at, kind, ..entry };
            assert_eq!(String::from_utf8(encode(&entry)).expect("JSON is UTF-8"), sample.trim_end());
        }
    }

    proptest! {
        #[test]
        fn every_text_survives(text in any::<String>(), seq in 1u64.., at in any::<u64>()) {
            let (alice, bob) = (UserId::parse("alice").expect("valid"), UserId::parse("bob").expect("valid"));
            let conversation = ConversationId::between(&alice, &bob).expect("two users");
            let seq = Seq::new(seq).expect("not 0");
            let kind = KindRef::Text(&text);
            let entry = EntryRef { conversation: &conversation, seq, from: &bob, to: &alice, id: None, at: Timestamp::from_ms(at), kind };
            let decoded = Envelope::decode(&encode(&entry)).expect("own encoding");
            prop_assert_eq!(decoded.kind, Kind::Text(text));
            prop_assert_eq!((decoded.seq, decoded.at.as_ms()), (seq, at));
        }

        #[test]
        fn no_bytes_panic(bytes in any::<Vec<u8>>()) {
            prop_assert!(Envelope::decode(&bytes).is_err());
        }
    }
}
