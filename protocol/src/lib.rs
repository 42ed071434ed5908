//! Every topic, envelope, id and error code of MQTT Chat on the wire.
//!
//! No IO and no clock: types that cannot be wrong, and the functions that read and write them. `docs/protocol.md` says the same in prose, and
//! a test holds the two together; the samples in `fixtures/` are decoded by the tests of every language that has a client here.

mod envelope;
mod error;
pub mod event;
mod name;
mod number;
pub mod request;
pub mod topic;

pub use envelope::{EntryRef, Envelope, InvalidEnvelope, Kind, KindRef, encode, encode_into};
pub use error::{ErrorCode, ErrorEvent};
pub use name::{ConversationId, InvalidName, MessageId, SameUser, UserId};
pub use number::{Seq, Timestamp};
