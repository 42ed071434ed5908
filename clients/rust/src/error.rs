//! What can go wrong, by whom it is heard: who connects, who sends, who asks.

use chat_protocol::{ErrorCode, MessageId};

/// The options make no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOptions {
    /// Not an address of a server.
    #[error(
        "the server {given:?}: {problem}. It is like mqtt://host:1883, mqtts://host:8883, ws://host:8080/mqtt or wss://host:8443/mqtt"
    )]
    Server {
        /// As it was given.
        given: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Not a user name.
    #[error("the user: {0}")]
    User(#[from] chat_protocol::InvalidName),
    /// Client identifiers have 1 to 256 bytes and no control characters.
    #[error("a device has a name of 1 to 256 bytes, without control characters")]
    Device,
    /// Certificates or keys that cannot be read, or do not fit.
    #[error("TLS: {0}")]
    Tls(String),
}

/// Why there is no connection any more, and will be none: [`Client`](crate::Client) does not try again by itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Closed {
    /// [`Client::close`](crate::Client::close) was called, or every handle dropped.
    #[error("closed")]
    ByUs,
    /// Another connection uses this user's device name. Two programs need two device names.
    #[error("another program connected as the same device of this user")]
    TakenOver,
    /// The server does not know this user, or not this password or token.
    #[error("the server refused the login: {0}")]
    LoginRefused(String),
    /// The server refuses what the options say.
    #[error("the server refused the connection: {0}")]
    Refused(String),
    /// The outbox is lost: nothing more can be promised.
    #[error("the outbox: {0}")]
    Outbox(String),
}

/// Why [`Client::connect`](crate::Client::connect) gave up.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// The first attempt did not reach a server, or found something else in its place.
    #[error("cannot reach the server: {0}")]
    Unreachable(String),
    /// It would not get better by trying again.
    #[error(transparent)]
    Closed(#[from] Closed),
    /// Unsent messages of earlier could not be read.
    #[error("the outbox: {0}")]
    Outbox(#[from] OutboxError),
    /// The certificates that the options name make no sense.
    #[error(transparent)]
    Options(#[from] InvalidOptions),
}

/// The server said no: nothing was stored or changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Which rule; `None` if this library does not know the server's word for it.
    pub code: Option<ErrorCode>,
    /// MQTT 5 reason code of the acknowledgement, 0x80 and above; 0x95 for a packet too large for the server, which is not sent at all.
    pub reason_code: u8,
    /// The server's sentence, which begins with the code.
    pub message: String,
}

/// Why a message was not stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The server refused it, and will refuse it again.
    #[error("not sent: {0}")]
    Refused(#[from] Refusal),
    /// It was published, or may have been in an earlier run, and was not answered for longer than servers remember ids: it may have been stored or
    /// not. Look at the history before sending it anew.
    #[error("not sent again: it is older than the server's memory of ids, and may have been stored already")]
    TooOld,
    /// A message of this id to the same user waits already.
    #[error("not sent: a message with the id {0} waits already")]
    SameId(MessageId),
    /// There is no connection, and will be none. The message is still in the outbox.
    #[error("not sent yet: {0}")]
    Closed(#[from] Closed),
    /// The outbox did not take it: it was not sent.
    #[error("not sent, the outbox: {0}")]
    Outbox(String),
}

/// Why a request was not answered as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The server refused it.
    #[error("{message}")]
    Refused {
        /// Which rule; `None` if this library does not know the server's word for it.
        code: Option<ErrorCode>,
        /// The server's sentence; it names the member at fault.
        message: String,
    },
    /// No answer within [`Options::request_timeout`](crate::Options::request_timeout). It may have been carried out.
    #[error("no answer from the server in time")]
    TimedOut,
    /// The answer is not what this version of the library understands.
    #[error("the answer makes no sense: {0}")]
    Answer(String),
    /// So many requests wait already ([`REQUESTS_MAX`](crate::REQUESTS_MAX)).
    #[error("too many requests wait for an answer")]
    TooMany,
    /// There is no connection, and will be none.
    #[error("no answer: {0}")]
    Closed(#[from] Closed),
}

/// An outbox that cannot be read or written.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutboxError {
    /// Another process has it open.
    #[error("{0} is in use by another process")]
    InUse(String),
    /// A file that cannot be read or written.
    #[error("{path}: {problem}")]
    File {
        /// Which file.
        path: String,
        /// What the system said.
        problem: String,
    },
    /// What was in it is not what was put in.
    #[error("{path}, line {line}: {problem}")]
    Damaged {
        /// Which file.
        path: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A message of this id waits already.
    #[error("a message with the id {0} waits already")]
    SameId(MessageId),
    /// One of your own making says so.
    #[error("{0}")]
    Other(String),
}
