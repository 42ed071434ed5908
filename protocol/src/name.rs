//! Names that cannot be wrong: users, messages, conversations.
//!
//! A value of these types obeys its grammar; nothing else in the house carries a bare string for them. None holds a `/`, a wildcard or a
//! NUL, so they can stand in topics and keys as they are.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A string outside its grammar; the sentence names the grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} must match {grammar}")]
pub struct InvalidName {
    what: &'static str,
    grammar: &'static str,
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $grammar:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The grammar, as a regular expression.
            pub const GRAMMAR: &str = $grammar;

            /// Checks the grammar.
            pub fn parse(name: &str) -> Result<Self, InvalidName> {
                let valid: fn(&[u8]) -> bool = $valid;
                if valid(name.as_bytes()) {
                    Ok(Self(name.into()))
                } else {
                    Err(InvalidName { what: $what, grammar: $grammar })
                }
            }

            /// As text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// As shared text, without a copy.
            pub fn as_arc(&self) -> Arc<str> {
                Arc::clone(&self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidName;

            fn from_str(name: &str) -> Result<Self, InvalidName> {
                Self::parse(name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let name = String::deserialize(deserializer)?;
                Self::parse(&name).map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(
    /// A user's name.
    UserId,
    "a user name",
    "[a-z0-9][a-z0-9_-]{0,63}",
    |name| {
        name.len() <= 64
            && name.first().is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
            && name.iter().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'_' | b'-'))
    }
);

name!(
    /// A message's id, chosen by its sender. A resend under the same id is the same message.
    MessageId,
    "a message id",
    "[A-Za-z0-9_-]{1,64}",
    |name| {
        (1..=64).contains(&name.len()) && name.iter().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-'))
    }
);

/// Two ends of a conversation are one user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a conversation needs two users: nobody can write to themselves")]
pub struct SameUser;

/// A conversation between two users, whoever began it: `alice:bob`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConversationId {
    first: UserId,
    second: UserId,
}

impl ConversationId {
    /// The grammar, as a regular expression; besides, the names differ and are in order.
    pub const GRAMMAR: &str = "[a-z0-9][a-z0-9_-]{0,63}:[a-z0-9][a-z0-9_-]{0,63}";

    /// The conversation of two users, in any order.
    pub fn between(one: &UserId, other: &UserId) -> Result<Self, SameUser> {
        match one.cmp(other) {
            std::cmp::Ordering::Less => Ok(Self { first: one.clone(), second: other.clone() }),
            std::cmp::Ordering::Equal => Err(SameUser),
            std::cmp::Ordering::Greater => Ok(Self { first: other.clone(), second: one.clone() }),
        }
    }

    /// Reads `alice:bob`; the names must be in order.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let invalid =
            InvalidName { what: "a conversation", grammar: "two different user names in order, joined by `:`" };
        let (first, second) = text.split_once(':').ok_or(invalid.clone())?;
        let (first, second) = (UserId::parse(first)?, UserId::parse(second)?);
        if first < second { Ok(Self { first, second }) } else { Err(invalid) }
    }

    /// The user whose name sorts first.
    pub fn first(&self) -> &UserId {
        &self.first
    }

    /// The other user.
    pub fn second(&self) -> &UserId {
        &self.second
    }

    /// Whether this user takes part.
    pub fn has(&self, user: &UserId) -> bool {
        self.first == *user || self.second == *user
    }

    /// Whom this user talks to here.
    pub fn peer_of(&self, user: &UserId) -> Option<&UserId> {
        if self.first == *user {
            Some(&self.second)
        } else if self.second == *user {
            Some(&self.first)
        } else {
            None
        }
    }
}

impl fmt::Display for ConversationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.first, self.second)
    }
}

impl fmt::Debug for ConversationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl Serialize for ConversationId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ConversationId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn user_names_keep_to_their_grammar() {
        let longest = "a".repeat(64);
        for good in ["a", "0", "alice", "a-b_c", "9lives", longest.as_str()] {
            assert_eq!(UserId::parse(good).expect("valid").as_str(), good);
        }
        let too_long = "a".repeat(65);
        for bad in ["", "-a", "_a", "Alice", "a b", "a/b", "a+", "a#", "ä", "a\0", "a:b", too_long.as_str()] {
            assert!(UserId::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_conversation_has_one_name() {
        let (alice, bob) = (UserId::parse("alice").expect("valid"), UserId::parse("bob").expect("valid"));
        let id = ConversationId::between(&bob, &alice).expect("two users");
        assert_eq!(id.to_string(), "alice:bob");
        assert_eq!(ConversationId::parse("alice:bob").expect("in order"), id);
        assert_eq!(id.peer_of(&alice), Some(&bob));
        assert!(ConversationId::between(&bob, &bob).is_err());
        for bad in ["bob:alice", "bob:bob", "alice", "alice:", ":", "alice:bob:eve"] {
            assert!(ConversationId::parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_string_panics(text in any::<String>()) {
            for parsed in [UserId::parse(&text).map(|name| name.to_string()), MessageId::parse(&text).map(|name| name.to_string()),
                ConversationId::parse(&text).map(|name| name.to_string())].into_iter().flatten() {
                prop_assert_eq!(&parsed, &text);
            }
        }

        #[test]
        fn grammars_and_parsers_agree(user in "[a-z0-9][a-z0-9_-]{0,63}", id in "[A-Za-z0-9_-]{1,64}") {
            prop_assert!(UserId::parse(&user).is_ok());
            prop_assert!(MessageId::parse(&id).is_ok());
        }
    }
}
