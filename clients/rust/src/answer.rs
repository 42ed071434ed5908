//! What an acknowledgement says.

use chat_protocol::{ErrorCode, Seq, Timestamp};

use crate::error::Refusal;

/// The server's answer to a publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A message is on disk.
    Stored { seq: Seq, at: Timestamp, receiver_away: bool },
    /// Whatever else was asked is done, or understood.
    Done,
    /// It was not done.
    Refused(Refusal),
}

impl Answer {
    /// From an acknowledgement's reason code, reason string and user properties.
    pub(crate) fn read(reason_code: u8, reason: Option<&str>, properties: &[(String, String)]) -> Self {
        if reason_code >= 0x80 {
            return Self::Refused(refusal(reason_code, reason));
        }
        let property = |name: &str| properties.iter().find_map(|(key, value)| (key == name).then_some(value.as_str()));
        let seq = property("seq").and_then(|seq| Seq::new(seq.parse().ok()?));
        let at = property("at").and_then(|at| Some(Timestamp::from_ms(at.parse().ok()?)));
        match (seq, at) {
            (Some(seq), Some(at)) => Self::Stored { seq, at, receiver_away: reason_code == 0x10 },
            _ => Self::Done,
        }
    }
}

fn refusal(reason_code: u8, reason: Option<&str>) -> Refusal {
    let code = reason.and_then(|reason| {
        let word = reason.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next()?;
        ErrorCode::ALL.into_iter().find(|code| code.as_str() == word)
    });
    let message = match reason {
        Some(reason) => reason.to_owned(),
        None => format!("the server refused it with reason code {reason_code:#04x}"),
    };
    Refusal { code, reason_code, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties() -> Vec<(String, String)> {
        vec![("seq".into(), "17".into()), ("at".into(), "1795456800123".into())]
    }

    #[test]
    fn stored() {
        let (seq, at) = (Seq::new(17).unwrap(), Timestamp::from_ms(1_795_456_800_123));
        assert_eq!(Answer::read(0, None, &properties()), Answer::Stored { seq, at, receiver_away: false });
        assert_eq!(Answer::read(0x10, None, &properties()), Answer::Stored { seq, at, receiver_away: true });
        assert_eq!(Answer::read(0, None, &[]), Answer::Done);
        assert_eq!(Answer::read(0, None, &[("seq".into(), "0".into()), ("at".into(), "1".into())]), Answer::Done);
    }

    #[test]
    fn refused() {
        let Answer::Refused(refusal) = Answer::read(0x97, Some("quota_exceeded: too much"), &properties()) else {
            panic!("a refusal");
        };
        assert_eq!((refusal.code, refusal.reason_code), (Some(ErrorCode::QuotaExceeded), 0x97));
        assert_eq!(refusal.to_string(), "quota_exceeded: too much");
        let Answer::Refused(refusal) = Answer::read(0x80, Some("something_new: of later"), &[]) else {
            panic!("a refusal");
        };
        assert_eq!((refusal.code, refusal.message.as_str()), (None, "something_new: of later"));
        let Answer::Refused(refusal) = Answer::read(0x87, None, &[]) else { panic!("a refusal") };
        assert!(refusal.message.contains("0x87"));
    }
}
