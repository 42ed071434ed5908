//! Why a command failed, and the exit code that says so.

use std::fmt;

use chat_client::{Closed, ConnectError, InvalidOptions, OutboxError, RequestError, SendError};

/// The sentence is for people, the kind for scripts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    sentence: String,
}

/// What a script may do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// The server said no, or something on this machine failed: the same again fails again.
    Refused,
    /// The command line or the settings are wrong. Also clap's own code.
    Usage,
    /// The server cannot be reached, or did not answer in time: later it may work.
    Unreachable,
    /// The server does not let this user in.
    Login,
    /// Stopped by a signal before it was done.
    Interrupted,
}

impl FailureKind {
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Self::Refused => 1,
            Self::Usage => 2,
            Self::Unreachable => 3,
            Self::Login => 4,
            // What shells say of SIGINT.
            Self::Interrupted => 130,
        }
    }
}

impl Failure {
    pub(crate) fn refused(sentence: impl Into<String>) -> Self {
        Self { kind: FailureKind::Refused, sentence: sentence.into() }
    }

    pub(crate) fn usage(sentence: impl Into<String>) -> Self {
        Self { kind: FailureKind::Usage, sentence: sentence.into() }
    }

    pub(crate) fn unreachable(sentence: impl Into<String>) -> Self {
        Self { kind: FailureKind::Unreachable, sentence: sentence.into() }
    }

    pub(crate) fn interrupted(sentence: impl Into<String>) -> Self {
        Self { kind: FailureKind::Interrupted, sentence: sentence.into() }
    }

    /// Says of what it is.
    #[must_use]
    pub(crate) fn of(self, what: impl fmt::Display) -> Self {
        Self { sentence: format!("{what}: {}", self.sentence), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl From<Closed> for Failure {
    fn from(closed: Closed) -> Self {
        let kind = match closed {
            Closed::LoginRefused(_) => FailureKind::Login,
            _ => FailureKind::Refused,
        };
        let help = match closed {
            Closed::TakenOver => "; give one of them a name of its own: --device",
            _ => "",
        };
        Self { kind, sentence: format!("{closed}{help}") }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Unreachable(_) => Self::unreachable(error.to_string()),
            ConnectError::Closed(closed) => closed.into(),
            ConnectError::Outbox(error) => error.into(),
            ConnectError::Options(error) => error.into(),
        }
    }
}

impl From<OutboxError> for Failure {
    fn from(error: OutboxError) -> Self {
        let help = match error {
            OutboxError::InUse(_) => "; give one of them a name of its own: --device",
            _ => "",
        };
        Self::refused(format!("the outbox: {error}{help}"))
    }
}

impl From<InvalidOptions> for Failure {
    fn from(error: InvalidOptions) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::TimedOut => Self::unreachable(error.to_string()),
            RequestError::Closed(closed) => closed.into(),
            _ => Self::refused(error.to_string()),
        }
    }
}

impl From<SendError> for Failure {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Closed(closed) => closed.into(),
            SendError::Refused(refusal) => Self::refused(refusal.to_string()),
            _ => Self::refused(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_can_tell_them_apart() {
        let code = |failure: Failure| failure.kind.exit_code();
        assert_eq!(code(ConnectError::Unreachable("refused".into()).into()), 3);
        assert_eq!(code(RequestError::TimedOut.into()), 3);
        assert_eq!(code(SendError::Closed(Closed::LoginRefused("no".into())).into()), 4);
        assert_eq!(code(SendError::TooOld.into()), 1);
        assert_eq!(code(InvalidOptions::Device.into()), 2);
        let taken = Failure::from(Closed::TakenOver);
        assert!(taken.to_string().contains("--device"), "{taken}");
        assert_eq!(Failure::refused("no").of("line 3").to_string(), "line 3: no");
    }
}
