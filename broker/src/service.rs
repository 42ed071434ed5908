//! What a service behind the broker has to answer, in MQTT's words.
//!
//! The broker knows sockets, packets, sessions and windows. It asks its [`Service`] who may connect, publish and subscribe,
//! hands it every publish to a *bound topic* (a topic that the service, not the bus, gives meaning to), and reads from it
//! what a *bound subscription* has to deliver. A bound topic is `Durable` (a log stands behind it: entries have growing
//! positions, and a session keeps a cursor there) or `Live` (delivered to whoever is connected, or not at all).

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::completion::Reply;
use crate::live::LiveMessage;
use crate::mailbox::Mailbox;

/// A place in a durable topic's log. Grows with every entry; 0 is before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub u64);

/// A session's name: client ids live inside their user, so no user can take over another's session.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionKey {
    /// The authenticated user.
    pub user: Arc<str>,
    /// The MQTT client identifier.
    pub client_id: Arc<str>,
}

/// What a connection may do besides what every user may. The broker carries it; what it means is the service's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles(pub u32);

/// What a connection proved itself with, as the service tells them apart. The broker carries it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Credential(pub u64);

/// Who a connection is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The authenticated user.
    pub user: Arc<str>,
    /// The client identifier of its session.
    pub client_id: Arc<str>,
    /// What it may do.
    pub roles: Roles,
    /// What it proved itself with.
    pub credential: Credential,
    /// When it has to prove again who it is (see [`Service::authenticate_again`]), or is disconnected.
    pub expires_at: Option<Instant>,
}

/// Where a connection comes from.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Its address, if it has one.
    pub address: Option<SocketAddr>,
    /// The certificate that it showed and proved to own.
    pub certificate: Option<ShownCertificate>,
}

/// A client's certificate, as far as it says who that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownCertificate {
    /// Its common name.
    pub name: Arc<str>,
    /// It proves nothing from then on.
    pub expires_at: Instant,
    /// By whom it was taken: those who were trusted in the handshake.
    pub credential: Credential,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => address.fmt(f),
            None => f.write_str("an unknown address"),
        }
    }
}

/// MQTT 5 extended authentication, as CONNECT and AUTH carry it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Authentication {
    /// Authentication method.
    pub method: String,
    /// Authentication data; empty if there is none.
    pub data: Vec<u8>,
}

/// What a CONNECT asks for.
#[derive(Debug)]
pub struct ConnectRequest<'a> {
    /// Where it comes from.
    pub peer: &'a Peer,
    /// The client identifier; never empty (an assigned one is filled in before).
    pub client_id: &'a str,
    /// Whether the server made the client identifier up.
    pub client_id_assigned: bool,
    /// The MQTT user name, if one was sent.
    pub user_name: Option<&'a str>,
    /// The password, if one was sent.
    pub password: Option<&'a [u8]>,
    /// MQTT 5 extended authentication, if it was asked for.
    pub authentication: Option<&'a Authentication>,
}

/// Why a CONNECT was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct ConnectRefusal {
    /// The code for CONNACK.
    pub code: ConnectRefusalCode,
    /// A sentence for the client (MQTT 5 reason string) and the log.
    pub reason: String,
}

/// The kinds of refused CONNECT, by their names in MQTT 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectRefusalCode {
    /// 0x85, or return code 2 in MQTT 3.1.1.
    ClientIdentifierNotValid,
    /// 0x86, or return code 4.
    BadUserNameOrPassword,
    /// 0x87, or return code 5.
    NotAuthorized,
    /// 0x88, or return code 3.
    ServerUnavailable,
    /// 0x8C; MQTT 5 only.
    BadAuthenticationMethod,
    /// 0x9F, or return code 3.
    ConnectionRateExceeded,
    /// 0x97, or return code 3.
    QuotaExceeded,
}

/// A refusal with the code that MQTT 5 carries and a sentence that helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Reason code, from MQTT 5's list.
    pub code: RefusalCode,
    /// What was wrong and what would be right.
    pub reason: String,
}

/// The reason codes with which a publish or a subscription is refused while its connection lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// 0x80.
    Unspecified,
    /// 0x83.
    ImplementationSpecific,
    /// 0x87.
    NotAuthorized,
    /// 0x8F, for subscriptions.
    TopicFilterInvalid,
    /// 0x90.
    TopicNameInvalid,
    /// 0x97: there is too much of something.
    QuotaExceeded,
    /// 0x97: too much at once, which passes.
    TooFast,
    /// 0x99.
    PayloadFormatInvalid,
    /// 0x9E, for subscriptions.
    SharedSubscriptionsNotSupported,
}

/// Where a publish goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublishRoute {
    /// To the service: [`Service::submit`].
    Bound,
    /// To everyone whose filter matches.
    Ordinary,
    /// Nowhere.
    Refused(Refusal),
}

/// What a topic filter subscribes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SubscribeRoute {
    /// To exactly these bound topics.
    Bound(Vec<BoundTopic>),
    /// To ordinary topics.
    Ordinary,
    /// To nothing.
    Refused(Refusal),
}

/// A topic that belongs to the service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundTopic {
    /// Its topic name, or a filter if it gathers the messages of many topics; each of those is announced on its own topic.
    pub name: Arc<str>,
    /// Whether a log stands behind it.
    pub keeping: Keeping,
}

/// Whether a bound topic's messages are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// Read from [`Service::read`]; sessions have cursors there.
    Durable,
    /// Live only.
    Live,
}

/// A publish to a bound topic.
#[derive(Debug)]
pub struct BoundPublish {
    /// The authenticated sender.
    pub user: Arc<str>,
    /// What it may do.
    pub roles: Roles,
    /// Topic name, aliases already resolved.
    pub topic: String,
    /// The application message.
    pub payload: Bytes,
    /// The MQTT 5 user property `id`, if there was exactly one or the first of several.
    pub id_property: Option<String>,
    /// MQTT 5 response topic.
    pub response_topic: Option<String>,
    /// MQTT 5 correlation data; empty if there is none.
    pub correlation: Bytes,
    /// Whether the acknowledgement can carry a refusal (MQTT 5, QoS 1 or 2); otherwise the edge calls [`Service::refused`].
    pub can_answer: bool,
    /// When the packet was read from the socket.
    pub received_at: Instant,
    /// Where the outcome goes. Dropping it unanswered closes the connection without an acknowledgement.
    pub reply: Reply,
}

/// What became of a publish to a bound topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublishOutcome {
    /// On disk. The acknowledgement may leave.
    Stored {
        /// Whether anybody is there to receive it (reason 0x00, else 0x10).
        subscribers: bool,
        /// MQTT 5 user properties for the acknowledgement.
        properties: Vec<(&'static str, String)>,
    },
    /// Not taken.
    Refused(Refusal),
    /// Nobody knows whether it was stored: no acknowledgement; the connection is closed so that the client sends it again.
    Unknown,
}

/// One message of a durable bound topic.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Where it stands in the log.
    pub position: Position,
    /// The topic for subscribers, if it is another than the bound topic's name.
    pub topic: Option<Arc<str>>,
    /// The application message for subscribers.
    pub payload: Bytes,
    /// MQTT 5 user properties for subscribers.
    pub properties: Arc<[(&'static str, String)]>,
}

/// How much one read may return.
#[derive(Clone, Copy, Debug)]
pub struct ReadLimit {
    /// At most so many messages.
    pub messages: usize,
    /// Stop after so many payload bytes (at least one message is returned if there is one).
    pub bytes: usize,
}

/// Part of a durable topic, in order.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Messages with growing positions.
    pub deliveries: Vec<Delivery>,
    /// Whether the end of the log was reached: everything committed when the read began is in this page or before it.
    pub end: bool,
}

/// A persistent session as it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionRecord {
    /// Its subscriptions.
    pub subscriptions: Vec<SubscriptionRecord>,
    /// How long it outlives its last connection, in seconds; `u32::MAX` for ever.
    pub expiry_s: u32,
    /// Where it stands in each durable topic: everything up to there was acknowledged.
    pub cursors: Vec<(Arc<str>, Position)>,
}

/// A stored session whose client is not connected.
#[derive(Clone, Debug)]
pub struct StoredSession {
    /// Whose it is, as far as that is known without a connection.
    pub identity: Identity,
    /// What is stored.
    pub record: SessionRecord,
    /// How long it has left; `None`: for ever.
    pub expires_in: Option<Duration>,
}

/// A subscription of a stored session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscriptionRecord {
    /// The topic filter as the client sent it.
    pub filter: String,
    /// Granted QoS, 0 to 2.
    pub qos: u8,
    /// MQTT 5 no local.
    pub no_local: bool,
    /// MQTT 5 retain as published.
    pub retain_as_published: bool,
    /// MQTT 5 subscription identifier.
    pub identifier: Option<u32>,
}

impl SubscriptionRecord {
    /// About what it takes where it is stored.
    pub(crate) fn bytes(&self) -> usize {
        self.filter.len() + 8
    }
}

/// The service cannot answer now; the sentence is for the log.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ServiceError(pub String);

/// Why a new session was not stored.
#[derive(Debug, thiserror::Error)]
pub enum NotCreated {
    /// The user has too many; the sentence is for the client.
    #[error("{0}")]
    TooMany(String),
    /// The service cannot answer now.
    #[error(transparent)]
    Unavailable(#[from] ServiceError),
}

/// What the edge counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// A CONNECT was accepted.
    Connected,
    /// An accepted connection has ended.
    Disconnected,
    /// A CONNECT was refused.
    ConnectRefused,
    /// A PUBLISH came from a client that is connected.
    MessageReceived,
    /// PUBLISH packets were written to a client's buffer.
    MessagesSent(u64),
    /// Messages of bound topics were acknowledged by their receiver (QoS 0: written to its socket).
    Delivered(u64),
    /// From reading the sender's PUBLISH to writing it to a receiver's buffer, live messages only.
    PublishToDelivery(Duration),
    /// From reading a PUBLISH to writing its acknowledgement to the buffer.
    PublishToPuback(Duration),
    /// A publish or a subscription was refused by the edge itself.
    Refused(RefusalCode),
    /// A limit did what it is there for: the setting's name below `[limits]`.
    Limited(&'static str),
    /// An ordinary message was dropped because its receiver's queue was full.
    QueueFull,
    /// A connection's task panicked: a bug, contained.
    Panicked,
}

/// The way to one connection.
#[derive(Clone, Debug)]
pub struct Subscriber {
    pub(crate) mailbox: Arc<Mailbox>,
}

impl Subscriber {
    /// Hands it a message of a live topic that it subscribes to. Dropped if too many wait there already.
    pub fn send(&self, message: LiveMessage) {
        self.mailbox.push_live(&[Arc::new(message)]);
    }

    /// Whether both are the way to one connection.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.mailbox, &other.mailbox)
    }

    /// Whether the connection has ended.
    pub fn is_gone(&self) -> bool {
        self.mailbox.is_settled()
    }
}

/// What stands behind the broker. All calls may come from many tasks at once.
pub trait Service: Send + Sync + 'static {
    /// Room for one [`Service::submit`]. Whoever drops it leaves it to others.
    type Place: Send + 'static;

    /// Who is this? An identity, or a refusal.
    fn connect(&self, request: ConnectRequest<'_>) -> impl Future<Output = Result<Identity, ConnectRefusal>> + Send;

    /// A client whose CONNECT asked for extended authentication proves again who it is: the identity that it has from now on, of the same user.
    fn authenticate_again(
        &self,
        peer: &Peer,
        identity: &Identity,
        authentication: &Authentication,
    ) -> impl Future<Output = Result<Identity, ConnectRefusal>> + Send;

    /// Where does a publish to `topic` (a valid topic name, no wildcards) go?
    fn route_publish(&self, who: &Identity, topic: &str) -> PublishRoute;

    /// What does `filter` (a valid topic filter, not shared) mean for this client?
    fn route_subscribe(&self, who: &Identity, filter: &str) -> SubscribeRoute;

    /// May a client that connects leave this will? Asked once more, as a publish, when it is published.
    fn judge_will(&self, who: &Identity, will: &BoundPublish) -> Result<(), Refusal> {
        match self.route_publish(who, &will.topic) {
            PublishRoute::Refused(refusal) => Err(refusal),
            PublishRoute::Bound | PublishRoute::Ordinary => Ok(()),
        }
    }

    /// May it receive an ordinary message of this topic now? Asked for every delivery, because a filter may match more than its subscriber may see.
    fn may_receive(&self, _who: &Identity, _topic: &str) -> bool {
        true
    }

    /// May a message that this client published stay retained under this topic, and be delivered?
    fn may_stand(&self, who: &Identity, topic: &str) -> bool {
        !matches!(self.route_publish(who, topic), PublishRoute::Refused(_))
    }

    /// The MQTT 5 response information, for a client that asks for it.
    fn response_information(&self, _who: &Identity) -> Option<String> {
        None
    }

    /// Rights have changed: who is this now? `None` if nobody any more, who is disconnected then.
    fn recheck(&self, who: &Identity) -> Option<Identity> {
        Some(who.clone())
    }

    /// Takes publishes to bound topics, in their order; every one is answered through its `reply`. Gives them back while the
    /// service is full: wait for a [`Service::place`] and try again with it, which succeeds.
    fn submit(&self, publishes: Vec<BoundPublish>, place: Option<Self::Place>) -> Result<(), Vec<BoundPublish>>;

    /// Waits until there is room for one [`Service::submit`], first come, first served. `None` if that will not be: [`Service::submit`] says
    /// then what it means. The room is kept as long as the place lives: were it only announced, and whoever hears of it had to find it free,
    /// thousands who wait could hand it on to each other for ever.
    fn place(&self) -> impl Future<Output = Option<Self::Place>> + Send;

    /// The reason string of a refusal that the broker made itself, from a sentence.
    fn reason(&self, code: RefusalCode, sentence: &str) -> String;

    /// Tells a refused publish to a client whose acknowledgement cannot say it (MQTT 3.1.1, or QoS 0).
    fn refused(&self, user: &str, topic: &str, refusal: &Refusal);

    /// Messages of a durable topic after a position. Must see everything that was committed before the call.
    fn read(
        &self,
        user: &str,
        topic: &str,
        after: Position,
        limit: ReadLimit,
    ) -> impl Future<Output = Result<Page, ServiceError>> + Send;

    /// Where a new subscription to a durable topic begins.
    fn start(&self, user: &str, topic: &str) -> impl Future<Output = Result<Position, ServiceError>> + Send;

    /// The last committed position of the whole log: what is above it is live.
    fn head(&self) -> Position;

    /// The receiver has acknowledged everything in `topic` up to `position`, of that before `after` told earlier. Returns at once; written behind, at most a second later.
    /// With `persistent` the session's own cursor moves too, not only the user's.
    fn acknowledged(&self, session: &SessionKey, persistent: bool, topic: &str, after: Position, position: Position);

    /// The stored session, unless it has expired.
    fn load_session(
        &self,
        session: &SessionKey,
    ) -> impl Future<Output = Result<Option<SessionRecord>, ServiceError>> + Send;

    /// All stored sessions that have not expired. Asked once, before clients are let in.
    fn stored_sessions(&self) -> impl Future<Output = Result<Vec<StoredSession>, ServiceError>> + Send {
        std::future::ready(Ok(Vec::new()))
    }

    /// Removes a session if it has expired.
    fn forget_expired(&self, session: &SessionKey) -> impl Future<Output = Result<(), ServiceError>> + Send;

    /// Stores subscriptions, expiry and cursors; on disk when it returns.
    fn save_session(
        &self,
        session: &SessionKey,
        record: SessionRecord,
    ) -> impl Future<Output = Result<(), ServiceError>> + Send;

    /// Stores a session that was not stored before, unless its user has too many; otherwise like [`Service::save_session`].
    fn create_session(
        &self,
        session: &SessionKey,
        record: SessionRecord,
    ) -> impl Future<Output = Result<(), NotCreated>> + Send;

    /// Forgets a session.
    fn delete_session(&self, session: &SessionKey) -> impl Future<Output = Result<(), ServiceError>> + Send;

    /// A session's connection has ended: its expiry starts to run. `expiry_s` as in [`SessionRecord`].
    fn session_ended(&self, session: &SessionKey, expiry_s: u32);

    /// A device of this user is there, and perhaps others were before.
    fn arrived(&self, _user: &Arc<str>) {}

    /// A device of this user has gone; others may still be there.
    fn left(&self, _user: &Arc<str>) {}

    /// A connection subscribes from now on to a live topic that it did not subscribe to before: what it should know first goes to it alone.
    fn subscribed(&self, _user: &Arc<str>, _topic: &Arc<str>, _subscriber: Subscriber) {}

    /// Something happened that is worth counting.
    fn observe(&self, _observation: Observation) {}
}
