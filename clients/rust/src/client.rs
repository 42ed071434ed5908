//! The handle: what a program asks of a client.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use chat_protocol::event::TypingState;
use chat_protocol::request::{
    BlockedOk, ChangedOk, ConversationsOk, DoneOk, HistoryOk, Method, Range, SyncOk, WhoamiOk,
};
use chat_protocol::{MessageId, Seq, UserId};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use crate::driver::{self, Command};
use crate::error::{Closed, ConnectError, RequestError, SendError};
use crate::event::Stored;
use crate::events::Events;
use crate::options::Options;

/// Commands that wait for the client's task; whoever gives another waits until there is room.
const COMMANDS_MAX: usize = 256;

/// A device of a user. Clones are the same device.
///
/// It keeps itself connected: when the connection is lost it makes a new one, later each time, and what was asked meanwhile is done then. It
/// ends when it is [closed](Self::close), when all clones are dropped, or for good reason ([`Closed`]).
#[derive(Clone, Debug)]
pub struct Client {
    user: UserId,
    commands: mpsc::Sender<Command>,
    closed: Arc<driver::ClosedSlot>,
}

impl Client {
    /// Connects, and returns when messages flow.
    ///
    /// ```
    /// use chat_client::{Client, Event, Options};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> anyhow::Result<()> {
    /// # let chatd = end_to_end::Chatd::start().await?;
    /// # let server = format!("mqtt://{}", chatd.mqtt_addr());
    /// // A server as of `chatd` on its own: let server = "mqtt://127.0.0.1:1883";
    /// let (alice, _) = Client::connect(Options::new(&server, "alice", "alice-laptop")?).await?;
    /// let (_bob, mut events) = Client::connect(Options::new(&server, "bob", "bob-phone")?).await?;
    ///
    /// let stored = alice.send(&"bob".parse()?, "hello").await?;
    /// println!("on the server's disk as number {}", stored.seq);
    ///
    /// while let Some(event) = events.next().await {
    ///     if let Event::Message(delivery) = event {
    ///         println!("{}: {:?}", delivery.message.from, delivery.message.kind);
    ///         delivery.acknowledge();
    ///         break;
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// If the first attempt fails, what waits in the outbox cannot be read, or the certificates do not fit. See [`start`](Self::start) for a program that begins offline.
    pub async fn connect(options: Options) -> Result<(Self, Events), ConnectError> {
        let (first, accepted) = oneshot::channel();
        let (client, events) = Self::begin(options, Some(first)).await?;
        match accepted.await {
            Ok(outcome) => outcome.map(|()| (client, events)),
            Err(_) => Err(ConnectError::Closed(Closed::ByUs)),
        }
    }

    /// Returns at once, and connects when the server can be reached; [`Event::Connection`](crate::Event::Connection) tells.
    ///
    /// # Errors
    /// If what waits in the outbox cannot be read, or the certificates do not fit.
    pub async fn start(options: Options) -> Result<(Self, Events), ConnectError> {
        Self::begin(options, None).await
    }

    async fn begin(
        options: Options,
        first: Option<oneshot::Sender<Result<(), ConnectError>>>,
    ) -> Result<(Self, Events), ConnectError> {
        let user = options.user.clone();
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let (events, closed) = driver::start(options, received, first).await?;
        Ok((Self { user, commands, closed }, events))
    }

    /// Who this is.
    pub fn user(&self) -> &UserId {
        &self.user
    }

    /// Sends a message, and returns when it is on the server's disk; offline, when the client is connected again. For a caller who does not
    /// want to wait there is [`queue`](Self::queue).
    ///
    /// # Errors
    /// If it was not stored; [`SendError`] says why, and whether it may still be sent.
    pub async fn send(&self, to: &UserId, text: impl Into<String>) -> Result<Stored, SendError> {
        self.queue(to, text).await?.await
    }

    /// Puts a message into the outbox, and returns when it is safe there. The [`Queued`] that comes back is a future that waits until it is stored.
    ///
    /// # Errors
    /// If the outbox does not take it: then it is not sent.
    pub async fn queue(&self, to: &UserId, text: impl Into<String>) -> Result<Queued, SendError> {
        self.queue_as(driver::new_id(), to, text).await
    }

    /// The same under an id of the caller's making: for as long as the server remembers it (seven days at least) the message is stored once,
    /// however often a program says so, in whichever run and on whichever device. Ids count within a conversation: messages to two users may have
    /// the same.
    ///
    /// # Errors
    /// As [`queue`](Self::queue), and [`SendError::SameId`] if a message of this id to the same user is in the outbox already.
    pub async fn queue_as(&self, id: MessageId, to: &UserId, text: impl Into<String>) -> Result<Queued, SendError> {
        let (reply, queued) = oneshot::channel();
        let command = Command::Queue { id, to: to.clone(), text: text.into(), reply };
        self.commands.send(command).await.map_err(|_| self.closed.get())?;
        let (id, outcome) = queued.await.map_err(|_| self.closed.get())??;
        Ok(Queued { id, outcome, closed: Arc::clone(&self.closed) })
    }

    /// This user has read the conversation with `with` up to `seq`. Offline it is said as soon as the client is connected again, whether somebody
    /// still waits for that or not.
    ///
    /// # Errors
    /// As every request.
    pub async fn mark_read(&self, with: &UserId, seq: Seq) -> Result<(), RequestError> {
        let (reply, done) = oneshot::channel();
        let command = Command::Read { with: with.clone(), seq, reply };
        self.commands.send(command).await.map_err(|_| self.closed.get())?;
        done.await.map_err(|_| self.closed.get())?
    }

    /// This user is typing to `to`, or no longer. Nothing comes of it while there is no connection.
    pub async fn typing(&self, to: &UserId, state: TypingState) {
        // Whoever closed the client does not care.
        drop(self.commands.send(Command::Typing { to: to.clone(), state }).await);
    }

    /// Entries of the conversation with `with`, in the order of seq: the last before a seq, or the first after one. At most 200.
    ///
    /// # Errors
    /// As every request.
    pub async fn history(&self, with: &UserId, range: Range, limit: usize) -> Result<HistoryOk, RequestError> {
        let mut members = json!({ "with": with, "limit": limit });
        match range {
            Range::Before(Some(seq)) => members["before"] = json!(seq),
            Range::Before(None) => {}
            Range::After(seq) => members["after"] = json!(seq.map_or(0, Seq::get)),
        }
        self.ask(Method::History, members).await
    }

    /// Conversations, the newest first, with what is unread; `before` is the `next` of the page before. At most 200.
    ///
    /// # Errors
    /// As every request.
    pub async fn conversations(&self, before: Option<&str>, limit: usize) -> Result<ConversationsOk, RequestError> {
        let mut members = json!({ "limit": limit });
        if let Some(before) = before {
            members["before"] = json!(before);
        }
        self.ask(Method::Conversations, members).await
    }

    /// What changed since a token, everything without one; ask with `next` from then on, at once if there is `more`. At most 200 entries.
    ///
    /// # Errors
    /// As every request; `invalid_token` says that one has to start over without a token.
    pub async fn sync(&self, since: Option<&str>, limit: usize) -> Result<SyncOk, RequestError> {
        let mut members = json!({ "limit": limit });
        if let Some(since) = since {
            members["since"] = json!(since);
        }
        self.ask(Method::Sync, members).await
    }

    /// Who the server takes this user for, its clock, version and limits.
    ///
    /// # Errors
    /// As every request.
    pub async fn whoami(&self) -> Result<WhoamiOk, RequestError> {
        self.ask(Method::Whoami, json!({})).await
    }

    /// From now on nothing that `with` sends is shown to this user; `with` is not told.
    ///
    /// # Errors
    /// As every request.
    pub async fn block(&self, with: &UserId) -> Result<(), RequestError> {
        self.ask::<DoneOk>(Method::Block, json!({ "with": with })).await.map(drop)
    }

    /// What `with` sends from now on is shown again.
    ///
    /// # Errors
    /// As every request.
    pub async fn unblock(&self, with: &UserId) -> Result<(), RequestError> {
        self.ask::<DoneOk>(Method::Unblock, json!({ "with": with })).await.map(drop)
    }

    /// Whom this user has blocked.
    ///
    /// # Errors
    /// As every request.
    pub async fn blocked(&self) -> Result<BlockedOk, RequestError> {
        self.ask(Method::Blocked, json!({})).await
    }

    /// Takes an entry out of this user's history; the peer's stays as it was.
    ///
    /// # Errors
    /// As every request.
    pub async fn delete(&self, with: &UserId, seq: Seq) -> Result<(), RequestError> {
        self.ask::<DoneOk>(Method::Delete, json!({ "with": with, "seq": seq })).await.map(drop)
    }

    /// Takes an own text back, for everybody.
    ///
    /// # Errors
    /// As every request.
    pub async fn unsend(&self, with: &UserId, seq: Seq) -> Result<ChangedOk, RequestError> {
        self.ask(Method::Unsend, json!({ "with": with, "seq": seq, "id": driver::new_id() })).await
    }

    /// Gives an own text other words.
    ///
    /// # Errors
    /// As every request.
    pub async fn edit(&self, with: &UserId, seq: Seq, text: &str) -> Result<ChangedOk, RequestError> {
        self.ask(Method::Edit, json!({ "with": with, "seq": seq, "text": text, "id": driver::new_id() })).await
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, members: Value) -> Result<T, RequestError> {
        let (reply, answered) = oneshot::channel();
        let command = Command::Ask { method, members, reply };
        self.commands.send(command).await.map_err(|_| self.closed.get())?;
        let answer = answered.await.map_err(|_| self.closed.get())??;
        serde_json::from_value(answer).map_err(|error| RequestError::Answer(error.to_string()))
    }

    /// Says goodbye: acknowledgements that were given leave first. A durable device keeps its place, and what waits in the outbox stays there.
    pub async fn close(self) {
        let (reply, closed) = oneshot::channel();
        if self.commands.send(Command::Close { reply }).await.is_ok() {
            // An error says the same: it is over.
            drop(closed.await);
        }
    }
}

/// A message that is safe in the outbox. As a future it waits until the server has stored it. To drop it changes nothing: if the message is
/// refused then, [`Event::NotSent`](crate::Event::NotSent) says so.
#[derive(Debug)]
pub struct Queued {
    id: MessageId,
    outcome: oneshot::Receiver<Result<Stored, SendError>>,
    closed: Arc<driver::ClosedSlot>,
}

impl Queued {
    /// Under which it will be stored.
    pub fn id(&self) -> &MessageId {
        &self.id
    }
}

impl Future for Queued {
    type Output = Result<Stored, SendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.outcome)
            .poll(cx)
            .map(|outcome| outcome.unwrap_or_else(|_| Err(SendError::Closed(self.closed.get()))))
    }
}
