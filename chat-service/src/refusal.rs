//! How a refusal reaches the client: a reason code where MQTT 5 can carry it, else `chat/{me}/event/error`. Never silence.

use broker::Announcer;
use broker::live::LiveMessage;
use broker::service::{Position, Refusal, RefusalCode};
use chat_protocol::topic::Down;
use chat_protocol::{ErrorCode, ErrorEvent, UserId};

use crate::metrics::Metrics;

/// The refusal that the edge puts into an acknowledgement.
pub(crate) fn refusal(code: ErrorCode, reason: &str) -> Refusal {
    let mqtt = match code.reason_code() {
        0x87 => RefusalCode::NotAuthorized,
        0x90 => RefusalCode::TopicNameInvalid,
        0x97 => RefusalCode::QuotaExceeded,
        0x99 => RefusalCode::PayloadFormatInvalid,
        0x80 => RefusalCode::Unspecified,
        _ => RefusalCode::ImplementationSpecific,
    };
    Refusal { code: mqtt, reason: self::reason(code, reason) }
}

/// The error code for a refusal that the edge made itself.
pub(crate) fn code_of(code: RefusalCode) -> ErrorCode {
    match code {
        RefusalCode::NotAuthorized => ErrorCode::NotAuthorized,
        RefusalCode::TopicNameInvalid | RefusalCode::TopicFilterInvalid => ErrorCode::InvalidTopic,
        RefusalCode::QuotaExceeded => ErrorCode::QuotaExceeded,
        RefusalCode::TooFast => ErrorCode::TooFast,
        RefusalCode::PayloadFormatInvalid => ErrorCode::NotUtf8,
        RefusalCode::Unspecified
        | RefusalCode::ImplementationSpecific
        | RefusalCode::SharedSubscriptionsNotSupported => ErrorCode::NotSupported,
    }
}

/// How an acknowledgement says it.
pub(crate) fn reason(code: ErrorCode, sentence: &str) -> String {
    format!("{}: {sentence}", code.as_str())
}

/// Counts a refused publish and, if its acknowledgement cannot say why, tells the user's devices.
#[expect(clippy::too_many_arguments, reason = "the parts of one event")]
pub(crate) fn count_and_tell(
    announcer: &Announcer,
    metrics: &Metrics,
    user: &str,
    tell: bool,
    code: ErrorCode,
    message: &str,
    topic: &str,
    id: Option<&str>,
) {
    metrics.refused(code.as_str());
    if !tell {
        return;
    }
    let Ok(user) = UserId::parse(user) else { return };
    let event = ErrorEvent { code, message: message.to_owned(), topic: topic.to_owned(), id: id.map(str::to_owned) };
    announcer.announce(vec![LiveMessage::new(
        Down::Error.topic(&user).into(),
        Position(0),
        0,
        event.encode().into(),
        &[],
    )]);
}
