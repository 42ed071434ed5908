//! Events below `chat/{me}/event/`: what changed, for whoever is there.

use serde::{Deserialize, Serialize};

use crate::{Timestamp, UserId};

/// `event/receipt`: what has reached a peer, and what the peer has read. Seqs, cumulative; 0: nothing yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptEvent {
    pub with: UserId,
    pub delivered: u64,
    pub read: u64,
}

/// `event/read`: what the user has read of the conversation with a peer, on whichever device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadEvent {
    pub with: UserId,
    pub read: u64,
}

/// Whether somebody is typing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TypingState {
    On,
    Off,
}

impl TypingState {
    /// From what a client publishes.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        match payload {
            b"on" => Some(Self::On),
            b"off" => Some(Self::Off),
            _ => None,
        }
    }
}

/// `event/typing`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TypingEvent {
    pub from: UserId,
    pub state: TypingState,
}

/// Whether a user has a device connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PresenceStatus {
    Online,
    Offline,
}

/// `event/presence`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresenceEvent {
    pub user: UserId,
    pub status: PresenceStatus,
    /// When the last device went, if none is there and it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<Timestamp>,
}

/// The bytes of an event.
pub fn encode_event<T: Serialize>(event: &T) -> Vec<u8> {
    serde_json::to_vec(event).expect("strings and numbers always encode")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_samples_are_written_to_the_byte() {
        let bob = UserId::parse("bob").expect("valid");
        let receipt = encode_event(&ReceiptEvent { with: bob.clone(), delivered: 17, read: 12 });
        assert_eq!(receipt, include_str!("../fixtures/receipt.json").trim_end().as_bytes());
        let read = encode_event(&ReadEvent { with: bob.clone(), read: 12 });
        assert_eq!(read, include_str!("../fixtures/read.json").trim_end().as_bytes());
        let typing = encode_event(&TypingEvent { from: bob.clone(), state: TypingState::On });
        assert_eq!(typing, include_str!("../fixtures/typing.json").trim_end().as_bytes());
        let last_seen = Some(Timestamp::from_ms(1_795_456_800_123));
        let presence = encode_event(&PresenceEvent { user: bob, status: PresenceStatus::Offline, last_seen });
        assert_eq!(presence, include_str!("../fixtures/presence.json").trim_end().as_bytes());
    }
}
