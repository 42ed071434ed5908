//! How entries and sessions are written: a version byte, a CRC-32 of key, version and body, and the body.
//!
//! The checksum covers the key, so a record under another's key is found out as surely as a flipped bit. Decoding never panics:
//! what cannot be read is a [`Broken`] that names table and key. Lengths and numbers are LEB128: short where they are small.

use chat_protocol::{ConversationId, MessageId, Seq, Timestamp, UserId};

use super::super::{
    Body, ConversationHead, Cursors, Device, Entry, NewEntry, PeerRecord, Position, SessionRecord, SubscriptionRecord,
};
use super::schema;

/// The version of most records.
const VERSION: u8 = 1;
/// The version of entries that are not plain texts.
const VERSION_OF_ANY_BODY: u8 = 2;
pub(super) const HEADER_BYTES: usize = 5;

/// Something in the file is not what was written there.
#[derive(Debug, thiserror::Error)]
#[error("table {table}, key {key}: {reason}")]
pub(super) struct Broken {
    pub(super) table: &'static str,
    pub(super) key: String,
    pub(super) reason: String,
}

impl Broken {
    /// For a key made of bytes.
    pub(super) fn at(table: &'static str, key: &[u8], reason: impl Into<String>) -> Self {
        Self { table, key: key.escape_ascii().to_string(), reason: reason.into() }
    }

    /// For an entry, whose key is its position.
    pub(super) fn entry(position: Position, reason: impl Into<String>) -> Self {
        Self { table: "rows", key: position.0.to_string(), reason: reason.into() }
    }
}

const KIND_MASK: u64 = 0xf;
const KIND_TEXT: u64 = 0;
const KIND_EDIT: u64 = 1;
const KIND_UNSEND: u64 = 2;
const KIND_ERASED: u64 = 3;
const WITHHELD: u64 = 0x10;

/// Writes an entry's record into `record`, whose old content is lost. The conversation is the one of its two users.
pub(super) fn encode_entry(position: Position, entry: &NewEntry, record: &mut Vec<u8>) {
    begin(record);
    let plain = matches!(entry.body, Body::Text(_)) && !entry.withheld;
    if !plain {
        record[0] = VERSION_OF_ANY_BODY;
    }
    put_number(record, entry.seq.get());
    put_number(record, entry.at.as_ms());
    put_text(record, entry.from.as_str());
    put_text(record, entry.to.as_str());
    // No id has no characters.
    put_text(record, entry.id.as_ref().map_or("", |id| id.as_str()));
    if !plain {
        let kind = match &entry.body {
            Body::Text(_) => KIND_TEXT,
            Body::Edit { .. } => KIND_EDIT,
            Body::Unsend { .. } => KIND_UNSEND,
            Body::Erased { .. } => KIND_ERASED,
        };
        put_number(record, kind | if entry.withheld { WITHHELD } else { 0 });
        // No target is 0.
        put_number(record, entry.body.target().map_or(0, Seq::get));
        if let Body::Erased { bytes, .. } = &entry.body {
            put_number(record, *bytes);
        }
    }
    put_text(record, entry.body.text());
    seal(&position.0.to_be_bytes(), record);
}

pub(super) fn decode_entry(position: Position, record: &[u8]) -> Result<Entry, Broken> {
    let broken = |reason: String| Broken::entry(position, reason);
    let (version, mut body) = open_any(&position.0.to_be_bytes(), record).map_err(broken)?;
    let mut entry = || -> Result<Entry, String> {
        let seq = body.number()?;
        let at = body.number()?;
        let from = UserId::parse(body.text()?).map_err(|error| error.to_string())?;
        let to = UserId::parse(body.text()?).map_err(|error| error.to_string())?;
        let id = body.text()?;
        let (flags, target) =
            if version == VERSION { (KIND_TEXT, None) } else { (body.number()?, Seq::new(body.number()?)) };
        let kind = flags & KIND_MASK;
        let bytes = if kind == KIND_ERASED { body.number()? } else { 0 };
        let wanted = || target.ok_or("target 0");
        let text = body.text()?;
        body.finish()?;
        let entry_body = match kind {
            KIND_TEXT => Body::Text(text.into()),
            KIND_EDIT => Body::Edit { target: wanted()?, text: text.into() },
            KIND_UNSEND => Body::Unsend { target: wanted()? },
            KIND_ERASED => Body::Erased { bytes, target },
            _ => return Err(format!("kind {kind} is not known here")),
        };
        Ok(Entry {
            position,
            conversation: ConversationId::between(&from, &to).map_err(|error| error.to_string())?,
            seq: Seq::new(seq).ok_or("seq 0")?,
            from,
            to,
            id: match id {
                "" => None,
                id => Some(MessageId::parse(id).map_err(|error| error.to_string())?),
            },
            at: Timestamp::from_ms(at),
            body: entry_body,
            withheld: flags & WITHHELD != 0,
        })
    };
    entry().map_err(broken)
}

/// A conversation's head, ready to be stored under its name.
pub(super) fn encode_head(key: &[u8], head: ConversationHead) -> Vec<u8> {
    let mut record = Vec::new();
    begin(&mut record);
    put_number(&mut record, head.seq.get());
    put_number(&mut record, head.at.as_ms());
    seal(key, &mut record);
    record
}

pub(super) fn decode_head(key: &[u8], record: &[u8]) -> Result<ConversationHead, Broken> {
    let broken = |reason: String| Broken::at("heads", key, reason);
    let mut body = open(key, record).map_err(broken)?;
    let mut head = || -> Result<ConversationHead, String> {
        let (seq, at) = (body.number()?, body.number()?);
        body.finish()?;
        Ok(ConversationHead { seq: Seq::new(seq).ok_or("seq 0")?, at: Timestamp::from_ms(at) })
    };
    head().map_err(broken)
}

/// A user's record about a peer, ready to be stored under [`schema::peer_key`].
pub(super) fn encode_peer(key: &[u8], peer: &PeerRecord) -> Vec<u8> {
    let mut record = Vec::new();
    begin(&mut record);
    put_number(&mut record, peer.read);
    put_number(&mut record, peer.changed.0);
    put_number(&mut record, u64::from(peer.blocked_at_ms.is_some()));
    if let Some(at_ms) = peer.blocked_at_ms {
        put_number(&mut record, at_ms);
    }
    seal(key, &mut record);
    record
}

pub(super) fn decode_peer(key: &[u8], record: &[u8]) -> Result<PeerRecord, Broken> {
    let broken = |reason: String| Broken::at("peers", key, reason);
    let mut fields = open(key, record).map_err(broken)?;
    let mut peer = || -> Result<PeerRecord, String> {
        let (read, changed) = (fields.number()?, Position(fields.number()?));
        let blocked_at_ms = if fields.number()? == 0 { None } else { Some(fields.number()?) };
        fields.finish()?;
        Ok(PeerRecord { read, blocked_at_ms, changed })
    };
    peer().map_err(broken)
}

const HAS_ENDED: u64 = 1;
const HAS_INBOX: u64 = 2;
const HAS_SENT: u64 = 4;
const HAS_EVERY_INBOX: u64 = 8;
const HAS_EVERY_SENT: u64 = 16;

const NO_LOCAL: u64 = 4;
const RETAIN_AS_PUBLISHED: u64 = 8;
const HAS_IDENTIFIER: u64 = 16;
const QOS_MASK: u64 = 3;

/// A session's record, ready to be stored under [`schema::session_key`].
pub(super) fn encode_session(key: &[u8], session: &SessionRecord) -> Vec<u8> {
    let mut record = Vec::new();
    begin(&mut record);
    let optional = [
        (HAS_ENDED, session.ended_at_ms),
        (HAS_INBOX, session.cursors.inbox.map(|position| position.0)),
        (HAS_SENT, session.cursors.sent.map(|position| position.0)),
        (HAS_EVERY_INBOX, session.cursors.every_inbox.map(|position| position.0)),
        (HAS_EVERY_SENT, session.cursors.every_sent.map(|position| position.0)),
    ];
    put_number(&mut record, u64::from(session.expiry_s));
    put_number(&mut record, optional.iter().filter(|(_, value)| value.is_some()).map(|(flag, _)| flag).sum());
    for value in optional.iter().filter_map(|(_, value)| *value) {
        put_number(&mut record, value);
    }
    put_number(&mut record, session.subscriptions.len() as u64);
    for subscription in &session.subscriptions {
        let mut options = u64::from(subscription.qos) & QOS_MASK;
        if subscription.no_local {
            options |= NO_LOCAL;
        }
        if subscription.retain_as_published {
            options |= RETAIN_AS_PUBLISHED;
        }
        if subscription.identifier.is_some() {
            options |= HAS_IDENTIFIER;
        }
        put_number(&mut record, options);
        if let Some(identifier) = subscription.identifier {
            put_number(&mut record, u64::from(identifier));
        }
        put_text(&mut record, &subscription.filter);
    }
    seal(key, &mut record);
    record
}

pub(super) fn decode_session(device: &Device, record: &[u8]) -> Result<SessionRecord, Broken> {
    let key = schema::session_key(device);
    let broken = |reason: String| Broken::at("sessions", &key, reason);
    let mut body = open(&key, record).map_err(broken)?;
    let mut session = || -> Result<SessionRecord, String> {
        let expiry_s = u32::try_from(body.number()?).map_err(|_| "the expiry is too large")?;
        let present = body.number()?;
        let mut optional = |flag| if present & flag == 0 { Ok(None) } else { body.number().map(Some) };
        let ended_at_ms = optional(HAS_ENDED)?;
        let mut cursor = |flag| Ok::<_, String>(optional(flag)?.map(Position));
        let cursors = Cursors {
            inbox: cursor(HAS_INBOX)?,
            sent: cursor(HAS_SENT)?,
            every_inbox: cursor(HAS_EVERY_INBOX)?,
            every_sent: cursor(HAS_EVERY_SENT)?,
        };
        let count = body.number()?;
        let mut subscriptions = Vec::new();
        for _ in 0..count {
            let options = body.number()?;
            let identifier = if options & HAS_IDENTIFIER == 0 { None } else { Some(body.number()?) };
            let identifier = identifier.map(u32::try_from).transpose().map_err(|_| "an identifier that cannot be")?;
            subscriptions.push(SubscriptionRecord {
                filter: body.text()?.to_owned(),
                qos: u8::try_from(options & QOS_MASK).map_err(|_| "a QoS that cannot be")?,
                no_local: options & NO_LOCAL != 0,
                retain_as_published: options & RETAIN_AS_PUBLISHED != 0,
                identifier,
            });
        }
        body.finish()?;
        Ok(SessionRecord { subscriptions, expiry_s, ended_at_ms, cursors })
    };
    session().map_err(broken)
}

pub(super) fn begin(record: &mut Vec<u8>) {
    record.clear();
    record.push(VERSION);
    record.extend_from_slice(&[0; HEADER_BYTES - 1]);
}

pub(super) fn seal(key: &[u8], record: &mut [u8]) {
    let (header, body) = record.split_at_mut(HEADER_BYTES);
    let sum = checksum(key, header[0], body);
    header[1..].copy_from_slice(&sum.to_le_bytes());
}

pub(super) fn open<'a>(key: &[u8], record: &'a [u8]) -> Result<Fields<'a>, String> {
    match open_any(key, record)? {
        (VERSION, body) => Ok(body),
        (version, _) => Err(format!("record version {version} is not known here")),
    }
}

/// Whether bytes are a record that was sealed under this key.
pub(super) fn is_record(key: &[u8], record: &[u8]) -> bool {
    open_any(key, record).is_ok()
}

/// A record of any version that is known here, with that.
fn open_any<'a>(key: &[u8], record: &'a [u8]) -> Result<(u8, Fields<'a>), String> {
    let (header, body) = record.split_first_chunk::<HEADER_BYTES>().ok_or("the record is cut short")?;
    let [version, sum @ ..] = *header;
    if checksum(key, version, body) != u32::from_le_bytes(sum) {
        return Err("the checksum does not match".to_owned());
    }
    if ![VERSION, VERSION_OF_ANY_BODY].contains(&version) {
        return Err(format!("record version {version} is not known here"));
    }
    Ok((version, Fields(body)))
}

fn checksum(key: &[u8], version: u8, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key);
    hasher.update(&[version]);
    hasher.update(body);
    hasher.finalize()
}

pub(super) fn put_number(record: &mut Vec<u8>, mut number: u64) {
    loop {
        let low = number.to_le_bytes()[0] & 0x7f;
        number >>= 7;
        if number == 0 {
            record.push(low);
            return;
        }
        record.push(low | 0x80);
    }
}

pub(super) fn put_text(record: &mut Vec<u8>, text: &str) {
    put_number(record, text.len() as u64);
    record.extend_from_slice(text.as_bytes());
}

/// What of a record's body has not been read yet.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.0
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (bytes, rest) = self.0.split_at_checked(length).ok_or("the record ends within its bytes")?;
        self.0 = rest;
        Ok(bytes)
    }

    pub(super) fn number(&mut self) -> Result<u64, String> {
        let mut number = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or("the record ends within a number")?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("a number is too long".to_owned())
    }

    pub(super) fn text(&mut self) -> Result<&'a str, String> {
        let length = usize::try_from(self.number()?).map_err(|_| "a text is too long")?;
        let text = self.bytes(length)?;
        str::from_utf8(text).map_err(|_| "a text is not UTF-8".to_owned())
    }

    pub(super) fn finish(&self) -> Result<(), String> {
        if self.0.is_empty() { Ok(()) } else { Err(format!("{} bytes too many", self.0.len())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> NewEntry {
        NewEntry {
            conversation: ConversationId::parse("alice:bob").unwrap(),
            seq: Seq::new(300).unwrap(),
            from: UserId::parse("bob").unwrap(),
            to: UserId::parse("alice").unwrap(),
            id: Some(MessageId::parse("m-1").unwrap()),
            at: Timestamp::from_ms(1_795_456_800_123),
            body: "héllo \0 🦀".into(),
            withheld: false,
        }
    }

    #[test]
    fn entries_come_back() {
        let target = Seq::new(299).unwrap();
        let bodies = [
            "".into(),
            Body::Edit { target, text: "now".into() },
            Body::Unsend { target },
            Body::Erased { bytes: 9, target: None },
            Body::Erased { bytes: 9, target: Some(target) },
        ];
        let others = bodies.into_iter().flat_map(|body| {
            [false, true].map(|withheld| NewEntry { id: None, body: body.clone(), withheld, ..entry() })
        });
        for new in others.chain([entry()]) {
            let mut record = b"old content".to_vec();
            encode_entry(Position(7), &new, &mut record);
            let read = decode_entry(Position(7), &record).unwrap();
            let NewEntry { conversation, seq, from, to, id, at, body, withheld } = new;
            assert_eq!(read, Entry { position: Position(7), conversation, seq, from, to, id, at, body, withheld });
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let mut record = Vec::new();
        encode_entry(Position(7), &entry(), &mut record);
        for bit in 0..record.len() * 8 {
            let mut flipped = record.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            decode_entry(Position(7), &flipped).unwrap_err();
        }
        for length in 0..record.len() {
            decode_entry(Position(7), &record[..length]).unwrap_err();
        }
        let elsewhere = decode_entry(Position(8), &record).unwrap_err();
        assert_eq!(elsewhere.to_string(), "table rows, key 8: the checksum does not match");
    }

    #[test]
    fn sessions_come_back() {
        let device = Device { user: UserId::parse("bob").unwrap(), client_id: "a\0/é".into() };
        let full = SessionRecord {
            subscriptions: vec![
                SubscriptionRecord {
                    filter: "chat/bob/inbox".to_owned(),
                    qos: 2,
                    no_local: false,
                    retain_as_published: true,
                    identifier: Some(268_435_455),
                },
                SubscriptionRecord {
                    filter: "#".to_owned(),
                    qos: 1,
                    no_local: true,
                    retain_as_published: false,
                    identifier: None,
                },
            ],
            expiry_s: u32::MAX,
            ended_at_ms: Some(u64::MAX),
            cursors: Cursors {
                inbox: Some(Position(0)),
                sent: Some(Position(u64::MAX)),
                every_inbox: Some(Position(1)),
                every_sent: Some(Position(2)),
            },
        };
        let half = SessionRecord {
            ended_at_ms: None,
            cursors: Cursors { inbox: None, every_sent: None, ..full.cursors },
            ..full.clone()
        };
        for session in [SessionRecord::default(), full, half] {
            let record = encode_session(&schema::session_key(&device), &session);
            assert_eq!(decode_session(&device, &record).unwrap(), session);
        }
    }

    #[test]
    fn a_newer_record_version_is_named() {
        let mut record = Vec::new();
        encode_entry(Position(7), &entry(), &mut record);
        record[0] = 9;
        seal(&7_u64.to_be_bytes(), &mut record);
        let newer = decode_entry(Position(7), &record).unwrap_err();
        assert_eq!(newer.reason, "record version 9 is not known here");
    }
}
