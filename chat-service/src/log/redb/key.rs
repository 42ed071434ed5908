//! Keys of the index: what a posting list is about, in 13 bytes.
//!
//! A byte for the kind and 96 bits of a keyed hash of the names. The secret is chosen when a log is made, so nobody outside can choose
//! names that collide; that two names collide by chance is less likely than that the disk lies (10^-15 with ten million names of a kind).
//! Whoever follows a posting to an entry still checks that the entry is the one meant.

use std::hash::Hasher as _;

use chat_protocol::{ConversationId, MessageId, Seq, UserId};
use siphasher::sip128::{Hasher128 as _, SipHasher13};

/// Bytes of a [`Key`] on disk.
pub(super) const KEY_BYTES: usize = 13;
const HASH_BITS: u32 = 96;

/// What a posting list is about. Sorts by kind, then by hash; the lower 96 bits are as good as random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key(u128);

#[derive(Clone, Copy)]
enum Kind {
    Conversation = 1,
    Inbox = 2,
    Sent = 3,
    Id = 4,
    /// Edits and unsends of one entry.
    Change = 5,
    /// The log itself.
    Log = 6,
    /// A record of the journal.
    Record = 7,
    /// What it begins with.
    RecordHeader = 8,
}

impl Key {
    pub(super) const MIN: Self = Self(0);
    pub(super) const MAX: Self = Self((1 << (8 * KEY_BYTES)) - 1);

    pub(super) fn is_conversation(self) -> bool {
        self.0 >> HASH_BITS == Kind::Conversation as u128
    }

    pub(super) fn is_id(self) -> bool {
        self.0 >> HASH_BITS == Kind::Id as u128
    }

    pub(super) fn to_bytes(self) -> [u8; KEY_BYTES] {
        let bytes = self.0.to_be_bytes();
        let mut key = [0; KEY_BYTES];
        key.copy_from_slice(&bytes[bytes.len() - KEY_BYTES..]);
        key
    }

    pub(super) fn from_bytes(key: [u8; KEY_BYTES]) -> Self {
        let mut bytes = [0; 16];
        let begin = bytes.len() - KEY_BYTES;
        bytes[begin..].copy_from_slice(&key);
        Self(u128::from_be_bytes(bytes))
    }

    /// 64 random bits of it, and others.
    pub(super) fn random_bits(self) -> (u64, u64) {
        let bytes = self.0.to_le_bytes();
        let (low, high) = bytes.split_at(8);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        (number(low), number(high))
    }
}

/// Makes keys. The same names give the same key as long as the log lives.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    secret: (u64, u64),
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(..)")
    }
}

impl Keys {
    pub(super) fn new(secret: (u64, u64)) -> Self {
        Self { secret }
    }

    pub(super) fn conversation(&self, conversation: &ConversationId) -> Key {
        self.key(Kind::Conversation, |hasher| write_conversation(hasher, conversation))
    }

    /// Of what was sent to a user.
    pub(super) fn inbox(&self, user: &UserId) -> Key {
        self.key(Kind::Inbox, |hasher| hasher.write(user.as_str().as_bytes()))
    }

    /// Of what a user sent.
    pub(super) fn sent(&self, user: &UserId) -> Key {
        self.key(Kind::Sent, |hasher| hasher.write(user.as_str().as_bytes()))
    }

    pub(super) fn id(&self, conversation: &ConversationId, from: &UserId, id: &MessageId) -> Key {
        self.key(Kind::Id, |hasher| {
            write_conversation(hasher, conversation);
            // Names and ids contain no NUL.
            hasher.write(&[0]);
            hasher.write(from.as_str().as_bytes());
            hasher.write(&[0]);
            hasher.write(id.as_str().as_bytes());
        })
    }

    /// What changes an entry of a conversation.
    pub(super) fn change(&self, conversation: &ConversationId, target: Seq) -> Key {
        self.key(Kind::Change, |hasher| {
            write_conversation(hasher, conversation);
            hasher.write(&[0]);
            hasher.write(&target.get().to_be_bytes());
        })
    }

    /// Tells the log from others, and nothing about its secret.
    pub(super) fn identity(&self) -> u64 {
        self.key(Kind::Log, |_| ()).random_bits().0
    }

    /// Of a record of the journal: nobody can make bytes that have the same, who does not know the secret.
    pub(super) fn record_checksum(&self, record: &[u8]) -> [u8; 16] {
        self.checksum(Kind::Record, record)
    }

    /// Of a record's header alone, likewise.
    pub(super) fn header_checksum(&self, header: &[u8]) -> [u8; 16] {
        self.checksum(Kind::RecordHeader, header)
    }

    fn checksum(&self, kind: Kind, bytes: &[u8]) -> [u8; 16] {
        let mut hasher = SipHasher13::new_with_keys(self.secret.0, self.secret.1);
        hasher.write(&[kind as u8]);
        hasher.write(bytes);
        hasher.finish128().as_bytes()
    }

    fn key(&self, kind: Kind, write: impl FnOnce(&mut SipHasher13)) -> Key {
        let mut hasher = SipHasher13::new_with_keys(self.secret.0, self.secret.1);
        hasher.write(&[kind as u8]);
        write(&mut hasher);
        let hash = hasher.finish128().as_u128() & ((1 << HASH_BITS) - 1);
        Key((kind as u128) << HASH_BITS | hash)
    }
}

fn write_conversation(hasher: &mut SipHasher13, conversation: &ConversationId) {
    hasher.write(conversation.first().as_str().as_bytes());
    hasher.write(b":");
    hasher.write(conversation.second().as_str().as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_things_have_different_keys_and_bytes_keep_them() {
        let keys = Keys::new((1, 2));
        let user = |name: &str| UserId::parse(name).unwrap();
        let conversation = ConversationId::parse("alice:bob").unwrap();
        let id = MessageId::parse("m").unwrap();
        let all = [
            keys.conversation(&conversation),
            keys.inbox(&user("alice")),
            keys.sent(&user("alice")),
            keys.inbox(&user("bob")),
            keys.id(&conversation, &user("alice"), &id),
            keys.id(&conversation, &user("bob"), &id),
            keys.change(&conversation, Seq::FIRST),
            Keys::new((1, 3)).conversation(&conversation),
        ];
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), all.len());
        for key in all {
            assert_eq!(Key::from_bytes(key.to_bytes()), key);
            assert!(key < Key::MAX);
        }
        assert!(all[0].is_conversation() && !all[1].is_conversation() && all[4].is_id() && !all[0].is_id());
        assert!(
            all.windows(2).take(5).all(|pair| pair[0].to_bytes().cmp(&pair[1].to_bytes()) == pair[0].cmp(&pair[1]))
        );
    }

    #[test]
    fn keys_stay_what_they_were() {
        // What is on disk depends on it.
        let key = Keys::new((7, 9)).inbox(&UserId::parse("alice").unwrap());
        assert_eq!(key.to_bytes().escape_ascii().to_string(), KNOWN);
    }

    const KNOWN: &str = r"\x02\xe7\xf2h8\xb0\xe8)\x83\x055\xbdE";
}
