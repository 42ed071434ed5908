//! Error codes, and the event that carries them where an acknowledgement cannot.

use serde::{Deserialize, Serialize};

/// Why something was refused. The names are the contract; sentences may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// No such topic.
    InvalidTopic,
    /// `{me}` is no user name.
    InvalidUser,
    /// `{peer}` is no user name.
    InvalidPeer,
    /// The id is outside its grammar.
    InvalidId,
    /// The server knows all users, and not this one.
    UnknownUser,
    /// Somebody else's branch.
    NotAuthorized,
    /// A text needs at least one byte.
    EmptyText,
    /// Longer than `limits.message_bytes`.
    TextTooLong,
    /// A text is UTF-8.
    NotUtf8,
    /// Nobody can write to themselves.
    SelfMessage,
    /// The id belongs to another text.
    IdConflict,
    /// A quota is full.
    QuotaExceeded,
    /// Published faster than is allowed: a little later it is taken.
    TooFast,
    /// No such conversation.
    UnknownConversation,
    /// There is no such entry, or it is not what it has to be.
    InvalidSeq,
    /// `read` takes a seq in decimal, `typing` takes `on` or `off`.
    InvalidPayload,
    /// There is no such method.
    UnknownMethod,
    /// A request's object has a member that is missing, unknown or wrong.
    InvalidRequest,
    /// The token is not one of this server's: start over without it.
    InvalidToken,
    /// This server version does not serve it.
    NotSupported,
    /// The server's disk is full.
    StorageFull,
    /// The server cannot answer now.
    Unavailable,
}

impl ErrorCode {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::InvalidTopic,
        Self::InvalidUser,
        Self::InvalidPeer,
        Self::InvalidId,
        Self::UnknownUser,
        Self::NotAuthorized,
        Self::EmptyText,
        Self::TextTooLong,
        Self::NotUtf8,
        Self::SelfMessage,
        Self::IdConflict,
        Self::QuotaExceeded,
        Self::TooFast,
        Self::UnknownConversation,
        Self::InvalidSeq,
        Self::InvalidPayload,
        Self::UnknownMethod,
        Self::InvalidRequest,
        Self::InvalidToken,
        Self::NotSupported,
        Self::StorageFull,
        Self::Unavailable,
    ];

    /// Its name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidTopic => "invalid_topic",
            Self::InvalidUser => "invalid_user",
            Self::InvalidPeer => "invalid_peer",
            Self::InvalidId => "invalid_id",
            Self::UnknownUser => "unknown_user",
            Self::NotAuthorized => "not_authorized",
            Self::EmptyText => "empty_text",
            Self::TextTooLong => "text_too_long",
            Self::NotUtf8 => "not_utf8",
            Self::SelfMessage => "self_message",
            Self::IdConflict => "id_conflict",
            Self::QuotaExceeded => "quota_exceeded",
            Self::TooFast => "too_fast",
            Self::UnknownConversation => "unknown_conversation",
            Self::InvalidSeq => "invalid_seq",
            Self::InvalidPayload => "invalid_payload",
            Self::UnknownMethod => "unknown_method",
            Self::InvalidRequest => "invalid_request",
            Self::InvalidToken => "invalid_token",
            Self::NotSupported => "not_supported",
            Self::StorageFull => "storage_full",
            Self::Unavailable => "unavailable",
        }
    }

    /// The MQTT 5 reason code of a PUBACK or PUBREC that carries it.
    pub fn reason_code(self) -> u8 {
        match self {
            Self::InvalidTopic
            | Self::InvalidUser
            | Self::InvalidPeer
            | Self::InvalidId
            | Self::UnknownUser
            | Self::SelfMessage => 0x90,
            Self::NotAuthorized => 0x87,
            Self::EmptyText | Self::NotUtf8 | Self::InvalidPayload | Self::InvalidRequest => 0x99,
            // 0x95 (packet too large) is not for PUBACK; 0x97 is MQTT's "an imposed limit has been exceeded".
            Self::TextTooLong | Self::QuotaExceeded | Self::TooFast | Self::StorageFull => 0x97,
            Self::IdConflict
            | Self::UnknownConversation
            | Self::InvalidSeq
            | Self::UnknownMethod
            | Self::InvalidToken
            | Self::NotSupported
            | Self::Unavailable => 0x83,
        }
    }
}

/// What arrives on `chat/{me}/event/error`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorEvent {
    /// Why.
    pub code: ErrorCode,
    /// The same as a sentence, with what would be right.
    pub message: String,
    /// The topic that was published to.
    pub topic: String,
    /// The message's id, if it had one.
    pub id: Option<String>,
}

impl ErrorEvent {
    /// As JSON.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings always encode")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_one_name() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_string(&code).expect("encodes"), format!("\"{}\"", code.as_str()));
        }
    }

    #[test]
    fn the_error_sample_decodes() {
        let sample = include_str!("../fixtures/error.json");
        let event: ErrorEvent = serde_json::from_str(sample).expect("decodes");
        assert_eq!((event.code, event.id.as_deref()), (ErrorCode::IdConflict, Some("m-001")));
        assert_eq!(String::from_utf8(event.encode()).expect("UTF-8"), sample.trim_end());
    }
}
