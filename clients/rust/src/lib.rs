//! A client of a chatd server.
//!
//! [`Client::connect`] logs a device of a user in; [`Client::send`] returns when a message is on the server's disk; [`Events`] brings what others send, and
//! what becomes of one's own messages.
//!
//! # What it promises
//!
//! - **Sent once.** A message gets its id before it is published, and keeps it in the [outbox](Outbox) until the server has stored it: it survives lost
//!   connections, and with a [`FileOutbox`] the program's own crashes and restarts, and is never stored twice.
//! - **Received once, in order.** Messages of a conversation come in the order of their numbers, what waited first. Each is acknowledged by the program
//!   ([`Delivery::acknowledge`]) after it has taken it: if the program crashes before that, the message comes again in the next run. While a
//!   program runs none comes twice, whatever happens to the connection.
//! - **Connected again.** A lost connection is made anew, after a random time that doubles; the server has kept the device's place.
//! - **Errors are typed.** A refusal carries the server's code and sentence.
//!
//! A device that has been used once has a place on the server for as long as the server keeps it: choose a name per program and machine, and use
//! it again.

/// Compiles what the page says.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/sdk.md")]
struct Page;

mod answer;
mod client;
mod deliveries;
mod driver;
mod error;
mod event;
mod events;
mod link;
mod options;
mod outbox;
mod sending;

pub use chat_protocol::event::{PresenceEvent, PresenceStatus, ReadEvent, ReceiptEvent, TypingEvent, TypingState};
pub use chat_protocol::request::{
    AnsweredEntry, BlockedOk, BlockedUser, ChangedOk, ConversationOk, ConversationsOk, HistoryOk, Range, Standing,
    SyncOk, SyncedConversation, WhoamiOk,
};
pub use chat_protocol::{ConversationId, ErrorCode, InvalidName, MessageId, Seq, Timestamp, UserId};
pub use chat_protocol::{Envelope, Kind};

pub use client::{Client, Queued};
pub use driver::REQUESTS_MAX;
pub use error::{Closed, ConnectError, InvalidOptions, OutboxError, Refusal, RequestError, SendError};
pub use event::{ConnectionState, Delivery, Event, Stored};
pub use events::Events;
pub use options::{Listen, Options, Session, TokenError};
pub use outbox::{Change, FileOutbox, MemoryOutbox, Outbox, Unsent};
