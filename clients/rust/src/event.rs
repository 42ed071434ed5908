//! What a client is told without asking.

use std::time::Duration;

use chat_protocol::Envelope;
use chat_protocol::event::{PresenceEvent, ReadEvent, ReceiptEvent, TypingEvent};
use chat_protocol::{MessageId, Seq, Timestamp, UserId};

use crate::deliveries::Ticket;
use crate::error::{Closed, SendError};

/// Something happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// An entry of a conversation: of others, and your own as they are stored (from whichever of your devices). Acknowledge it.
    Message(Delivery),
    /// What has reached a peer, and what the peer has read. Both only advance.
    Receipt(ReceiptEvent),
    /// What you have read, on whichever of your devices.
    Read(ReadEvent),
    /// A peer is typing to you, or no longer.
    Typing(TypingEvent),
    /// A peer is online or offline. The states as they are come first after each connection.
    Presence(PresenceEvent),
    /// A message for whose outcome nobody waits any more (from an earlier run, or because the future was dropped) was not stored.
    NotSent {
        /// Its id.
        id: MessageId,
        /// To whom it was.
        to: UserId,
        /// What it said.
        text: String,
        /// Why.
        error: SendError,
    },
    /// The connection changed.
    Connection(ConnectionState),
    /// This many events (receipts, read, typing, presence) were dropped, because the program did not take them: ask
    /// [`conversations`](crate::Client::conversations). Messages are never dropped.
    Missed(u64),
}

/// How the connection stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectionState {
    /// Messages flow. What happened meanwhile comes now, but for receipts and read: ask [`conversations`](crate::Client::conversations).
    Connected {
        /// The server kept this device's place: everything since comes. Otherwise it is a new device to it.
        resumed: bool,
    },
    /// It is lost, and tried again.
    Lost {
        /// A sentence.
        reason: String,
        /// When.
        retry_in: Duration,
    },
    /// It is not tried again.
    Closed(Closed),
}

/// An entry of a conversation, on its way to the program.
///
/// The server counts it as delivered when it was acknowledged. If the program ends before that, it comes again to the same device: take the
/// message (store it, show it), then acknowledge. While a program runs, no entry comes twice. A delivery that is dropped without being
/// acknowledged comes again after the next reconnect.
#[derive(Debug)]
#[must_use = "a message that is not acknowledged comes again"]
pub struct Delivery {
    /// What it is.
    pub message: Envelope,
    /// It waited for this device, and is not live.
    pub waited: bool,
    pub(crate) payload: Vec<u8>,
    pub(crate) ticket: Ticket,
}

impl Delivery {
    /// The envelope as it came: JSON, with members that this version does not know too.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The program has taken it. Acknowledgements leave in the order of arrival.
    pub fn acknowledge(self) {
        self.ticket.acknowledge();
    }
}

/// A message is on the server's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its id.
    pub id: MessageId,
    /// Its number in the conversation.
    pub seq: Seq,
    /// The server's clock when it was stored.
    pub at: Timestamp,
    /// No device of the receiver was connected: it is waiting.
    pub receiver_away: bool,
}
