//! The chat service: what the broker asks about topics, messages and sessions, answered from the protocol and the log.
//!
//! Everything that a client sends is parsed here into types that cannot be wrong, and refused here if it cannot be; the sequencer sees only
//! messages that may be stored.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use broker::Announcer;
use broker::completion::{Reply, complete};
use broker::service::{
    Authentication, BoundPublish, BoundTopic, ConnectRefusal, ConnectRefusalCode, ConnectRequest, Delivery, Identity,
    Keeping, NotCreated, Observation, Page, Peer, Position, PublishOutcome, PublishRoute, ReadLimit, Refusal,
    RefusalCode, Service, ServiceError, SessionKey, SessionRecord, StoredSession, SubscribeRoute, Subscriber,
    SubscriptionRecord,
};
use chat_protocol::event::TypingState;
use chat_protocol::request::RequestError;
use chat_protocol::topic::{self, Down, Observed, Up};
use chat_protocol::{ConversationId, ErrorCode, MessageId, Seq, UserId};
use tokio::sync::mpsc;

use crate::auth::{Auth, Role};
use crate::core::Send as ChatSend;
use crate::envelope;
use crate::log::{self, Advance, Body, Cursors, Device, Log, LogError, Side, Stream};
use crate::metrics::Metrics;
use crate::presence::Presence;
use crate::receipts::Receipts;
use crate::refusal;
use crate::requests::{Asked, Requests};
use crate::sequencer::{Answer, Submission};
use crate::sessions::{Sessions, has_expired};
use crate::typing::TypingRelay;

/// Longest client identifier, in bytes.
const CLIENT_ID_BYTES_MAX: usize = 256;

/// Chat behind the broker.
pub struct ChatService<L> {
    pub log: Arc<L>,
    pub queue: mpsc::Sender<Vec<Submission>>,
    pub announcer: Announcer,
    pub metrics: Arc<Metrics>,
    /// Longest text, in bytes.
    pub message_bytes_max: usize,
    pub requests: Requests<L>,
    pub receipts: Arc<Receipts<L>>,
    pub typing: Arc<TypingRelay<L>>,
    pub presence: Arc<Presence<L>>,
    pub sessions: Sessions<L>,
    pub auth: Arc<Auth>,
}

/// What a publish wants.
enum Wanted {
    Send(ChatSend),
    Read { me: UserId, peer: UserId, seq: Seq },
    Typing { me: UserId, peer: UserId, state: TypingState },
    Request { me: UserId, method: String, answer_topic: Arc<str> },
}

/// Code, sentence, and the id that it is about.
type Refused = (ErrorCode, String, Option<String>);

impl<L: Log> ChatService<L> {
    /// Checks a publish: what it wants, or why it cannot be.
    fn parse(&self, publish: &BoundPublish) -> Result<Wanted, Refused> {
        let up = topic::parse_up(&publish.topic).map_err(|error| (error.code(), error.to_string(), None))?;
        let me = match &up {
            Up::Out { me, .. } | Up::Read { me, .. } | Up::Typing { me, .. } | Up::Req { me, .. } => me,
        };
        // A bridge writes, reads and types for others; answers to requests would go to them.
        let acts_for_others = Role::Bridge.is_in(publish.roles) && !matches!(up, Up::Req { .. });
        if me.as_str() != &*publish.user && !acts_for_others {
            let sentence = format!("you are {}: publish below chat/{}/", publish.user, publish.user);
            return Err((ErrorCode::NotAuthorized, sentence, None));
        }
        // Of a message `parse_send` says it, which knows the id.
        if let Up::Read { peer, .. } | Up::Typing { peer, .. } = &up
            && !self.auth.may_exist(peer)
        {
            return Err((ErrorCode::UnknownUser, no_such_user(peer), None));
        }
        let payload = |sentence: &str| (ErrorCode::InvalidPayload, sentence.to_owned(), None);
        match up {
            Up::Out { me, peer, id } => self.parse_send(publish, me, peer, id).map(Wanted::Send),
            Up::Read { me, peer } => {
                let seq = std::str::from_utf8(&publish.payload).ok().and_then(|text| text.parse().ok());
                let seq = seq.and_then(Seq::new).ok_or_else(|| payload("the payload is a seq in decimal"))?;
                Ok(Wanted::Read { me, peer, seq })
            }
            Up::Typing { me, peer } => {
                let state = TypingState::parse(&publish.payload).ok_or_else(|| payload("the payload is on or off"))?;
                Ok(Wanted::Typing { me, peer, state })
            }
            Up::Req { me, method } => {
                let answer_topic = answer_topic(&me, publish.response_topic.as_deref())?;
                Ok(Wanted::Request { me, method, answer_topic })
            }
        }
    }

    fn parse_send(
        &self,
        publish: &BoundPublish,
        from: UserId,
        to: UserId,
        id: Option<MessageId>,
    ) -> Result<ChatSend, Refused> {
        let id = match id {
            Some(id) => Some(id),
            None => id_property(publish)?,
        };
        let told_id = || id.as_ref().map(|id| id.as_str().to_owned());
        if !self.auth.may_exist(&to) {
            return Err((ErrorCode::UnknownUser, no_such_user(&to), told_id()));
        }
        let conversation = ConversationId::between(&from, &to)
            .map_err(|error| (ErrorCode::SelfMessage, error.to_string(), told_id()))?;
        let body = self.parse_text(publish, told_id)?;
        let bridged = Role::Bridge.is_in(publish.roles);
        Ok(ChatSend { conversation, from, to, id, body, withheld: false, bridged })
    }

    /// A message to the same topic as the one before, which names no id: who and to whom was checked a moment ago.
    fn parse_again(&self, publish: &BoundPublish, before: &ChatSend) -> Result<ChatSend, Refused> {
        let id = id_property(publish)?;
        let body = self.parse_text(publish, || id.as_ref().map(|id| id.as_str().to_owned()))?;
        let (conversation, from, to) = (before.conversation.clone(), before.from.clone(), before.to.clone());
        Ok(ChatSend { conversation, from, to, id, body, withheld: false, bridged: before.bridged })
    }

    fn parse_text(&self, publish: &BoundPublish, told_id: impl Fn() -> Option<String>) -> Result<Body, Refused> {
        if publish.payload.is_empty() {
            return Err((ErrorCode::EmptyText, "the payload is the text, and it is empty".to_owned(), told_id()));
        }
        if publish.payload.len() > self.message_bytes_max {
            self.metrics.limited("message_bytes");
            let sentence = format!(
                "the text has {} bytes; limits.message_bytes is {}",
                publish.payload.len(),
                self.message_bytes_max
            );
            return Err((ErrorCode::TextTooLong, sentence, told_id()));
        }
        let text = std::str::from_utf8(&publish.payload)
            .map_err(|error| (ErrorCode::NotUtf8, format!("the payload is not UTF-8 text: {error}"), told_id()))?;
        Ok(text.into())
    }

    fn refuse(&self, publish: BoundPublish, (code, sentence, id): Refused) -> (Reply, PublishOutcome) {
        refusal::count_and_tell(
            &self.announcer,
            &self.metrics,
            &publish.user,
            !publish.can_answer,
            code,
            &sentence,
            &publish.topic,
            id.as_deref(),
        );
        (publish.reply, outcome(code, &sentence, publish.can_answer))
    }

    /// Carries out what is no message. `None` if the answer comes later.
    fn carry_out(&self, wanted: Wanted, publish: BoundPublish) -> Option<(Reply, PublishOutcome)> {
        let busy = || {
            (
                ErrorCode::Unavailable,
                "too many requests are under way, or their answers not acknowledged: send it again".to_owned(),
                None,
            )
        };
        match wanted {
            Wanted::Send(_) => None,
            Wanted::Typing { me, peer, state } => {
                self.typing.say(me, peer, state);
                Some((publish.reply, TAKEN))
            }
            Wanted::Request { me, method, answer_topic } => {
                let (payload, correlation) = (publish.payload.clone(), publish.correlation.clone());
                let begun = self.requests.begin(Asked { me, method, payload, answer_topic, correlation });
                if begun { Some((publish.reply, TAKEN)) } else { Some(self.refuse(publish, busy())) }
            }
            Wanted::Read { me, peer, seq } => {
                let Some(begin) = self.requests.room(&me) else { return Some(self.refuse(publish, busy())) };
                let (announcer, metrics) = (self.announcer.clone(), Arc::clone(&self.metrics));
                let BoundPublish { user, topic, can_answer, reply, .. } = publish;
                begin.read(me, peer, seq, move |answer| {
                    let answer = match answer {
                        Ok(()) => TAKEN,
                        Err(RequestError { code, message }) => {
                            let told = !can_answer;
                            refusal::count_and_tell(&announcer, &metrics, &user, told, code, &message, &topic, None);
                            outcome(code, &message, can_answer)
                        }
                    };
                    complete(vec![(reply, answer)]);
                });
                None
            }
        }
    }

    /// What a durable topic means for its reader.
    fn stream(reader: &str, topic: &str) -> Result<Stream, ServiceError> {
        let side = match topic.strip_prefix("chat/").and_then(|rest| rest.split_once('/')) {
            Some(("+", "inbox")) => Side::EveryInbox,
            Some(("+", "sent")) => Side::EverySent,
            Some((user, "inbox")) if user == reader => Side::Inbox,
            Some((user, "sent")) if user == reader => Side::Sent,
            _ => return Err(ServiceError(format!("{topic} is no durable topic of {reader}"))),
        };
        Ok(Stream { user: UserId::parse(reader).map_err(|error| ServiceError(error.to_string()))?, side })
    }

    fn bound(name: String, down: Down) -> BoundTopic {
        let keeping = match down {
            Down::Inbox | Down::Sent => Keeping::Durable,
            Down::Receipt | Down::Read | Down::Typing | Down::Presence | Down::Error | Down::Res => Keeping::Live,
        };
        BoundTopic { name: name.into(), keeping }
    }

    fn device(session: &SessionKey) -> Result<Device, ServiceError> {
        let user = UserId::parse(&session.user).map_err(|error| ServiceError(error.to_string()))?;
        Ok(Device { user, client_id: Arc::clone(&session.client_id) })
    }
}

/// The id that a user property names.
fn id_property(publish: &BoundPublish) -> Result<Option<MessageId>, Refused> {
    let Some(property) = &publish.id_property else { return Ok(None) };
    let id = MessageId::parse(property);
    id.map(Some).map_err(|error| (ErrorCode::InvalidId, error.to_string(), Some(property.clone())))
}

/// Why a topic outside `chat/` is refused.
const CLOSED: &str = "not_authorized: this topic is closed to you";

fn no_such_user(user: &UserId) -> String {
    format!("there is no user {user}")
}

/// Taken, with nothing to tell about it.
const TAKEN: PublishOutcome = PublishOutcome::Stored { subscribers: true, properties: Vec::new() };

/// A refusal; none where it would be taken for success, if a resend may succeed.
fn outcome(code: ErrorCode, sentence: &str, can_answer: bool) -> PublishOutcome {
    if code == ErrorCode::Unavailable && !can_answer {
        PublishOutcome::Unknown
    } else {
        PublishOutcome::Refused(refusal::refusal(code, sentence))
    }
}

/// Where the answer to a request goes: to the response topic, which has to be the user's own, or else to `chat/{me}/res`.
fn answer_topic(me: &UserId, response_topic: Option<&str>) -> Result<Arc<str>, Refused> {
    let own = Down::Res.topic(me);
    match response_topic {
        None => Ok(own.into()),
        Some(topic) if topic == own || topic::is_response_topic(me, topic) => Ok(topic.into()),
        Some(topic) => {
            let sentence = format!("the response topic is {own} or {own}/{{token}}, and not {topic}");
            Err((ErrorCode::NotAuthorized, sentence, None))
        }
    }
}

impl<L: Log> Service for ChatService<L> {
    type Place = mpsc::OwnedPermit<Vec<Submission>>;

    async fn connect(&self, request: ConnectRequest<'_>) -> Result<Identity, ConnectRefusal> {
        if request.client_id.len() > CLIENT_ID_BYTES_MAX {
            let reason = format!("the client identifier is longer than {CLIENT_ID_BYTES_MAX} bytes");
            return Err(ConnectRefusal { code: ConnectRefusalCode::ClientIdentifierNotValid, reason });
        }
        self.auth.connect(&request).await
    }

    async fn authenticate_again(
        &self,
        peer: &Peer,
        identity: &Identity,
        authentication: &Authentication,
    ) -> Result<Identity, ConnectRefusal> {
        self.auth.authenticate_again(peer, identity, authentication).await
    }

    fn route_publish(&self, who: &Identity, topic: &str) -> PublishRoute {
        // What is wrong with a chat topic is told by `submit`, which knows the codes of the protocol.
        if topic::is_chat(topic) {
            PublishRoute::Bound
        } else if self.auth.may_publish(who, topic) {
            PublishRoute::Ordinary
        } else {
            PublishRoute::Refused(Refusal { code: RefusalCode::NotAuthorized, reason: CLOSED.to_owned() })
        }
    }

    fn may_receive(&self, who: &Identity, topic: &str) -> bool {
        !topic::is_chat(topic) && self.auth.may_receive(who, topic)
    }

    fn recheck(&self, who: &Identity) -> Option<Identity> {
        self.auth.recheck(who)
    }

    fn route_subscribe(&self, who: &Identity, filter: &str) -> SubscribeRoute {
        let refuse = |code, reason: String| SubscribeRoute::Refused(Refusal { code, reason });
        if !topic::is_chat(filter) {
            return if self.auth.may_subscribe(who, filter) {
                SubscribeRoute::Ordinary
            } else {
                refuse(RefusalCode::NotAuthorized, CLOSED.to_owned())
            };
        }
        let me = match UserId::parse(&who.user) {
            Ok(me) => me,
            Err(error) => return refuse(RefusalCode::NotAuthorized, error.to_string()),
        };
        if topic::is_response_topic(&me, filter) {
            return SubscribeRoute::Bound(vec![BoundTopic { name: filter.into(), keeping: Keeping::Live }]);
        }
        match topic::parse_filter(&me, filter) {
            Ok(topics) => {
                SubscribeRoute::Bound(topics.into_iter().map(|down| Self::bound(down.topic(&me), down)).collect())
            }
            Err(error) if Role::Observer.is_in(who.roles) => match topic::parse_observer_filter(filter) {
                Some(observed) => {
                    let topics = observed.topics().into_iter();
                    SubscribeRoute::Bound(topics.map(|down| Self::bound(down.filter(), down)).collect())
                }
                None => {
                    let filters = Observed::FILTERS.join(", ");
                    refuse(
                        RefusalCode::NotAuthorized,
                        format!("not_authorized: {error}; as an observer also to {filters}"),
                    )
                }
            },
            Err(error) => refuse(RefusalCode::NotAuthorized, format!("not_authorized: {error}")),
        }
    }

    fn judge_will(&self, who: &Identity, will: &BoundPublish) -> Result<(), Refusal> {
        match self.route_publish(who, &will.topic) {
            PublishRoute::Refused(refusal) => Err(refusal),
            PublishRoute::Ordinary => Ok(()),
            PublishRoute::Bound => match self.parse(will) {
                Ok(_) => Ok(()),
                Err((code, sentence, _)) => Err(refusal::refusal(code, &sentence)),
            },
        }
    }

    fn response_information(&self, who: &Identity) -> Option<String> {
        Some(Down::Res.topic(&UserId::parse(&who.user).ok()?))
    }

    fn submit(&self, publishes: Vec<BoundPublish>, place: Option<Self::Place>) -> Result<(), Vec<BoundPublish>> {
        // A place first: once taken apart, publishes cannot be given back.
        let free = match &place {
            Some(_) => None,
            None => match self.queue.try_reserve() {
                Ok(free) => Some(free),
                Err(mpsc::error::TrySendError::Full(())) => return Err(publishes),
                // The server stops: dropping the replies closes the connections without an acknowledgement.
                Err(mpsc::error::TrySendError::Closed(())) => return Ok(()),
            },
        };
        let mut submissions: Vec<Submission> = Vec::with_capacity(publishes.len());
        let mut done = Vec::new();
        for publish in publishes {
            let parsed = match submissions.last().filter(|before| before.has_topic(&publish.topic)) {
                // Where one message goes to, so does the next.
                Some(Submission { send, .. }) => self.parse_again(&publish, send).map(Wanted::Send),
                None => self.parse(&publish),
            };
            match parsed {
                Ok(Wanted::Send(send)) => submissions.push(Submission {
                    send,
                    answer: Answer::Publish {
                        reply: publish.reply,
                        can_answer: publish.can_answer,
                        topic: publish.topic,
                        received_at: publish.received_at,
                    },
                }),
                Ok(wanted) => done.extend(self.carry_out(wanted, publish)),
                Err(refused) => done.push(self.refuse(publish, refused)),
            }
        }
        if !submissions.is_empty() {
            if let Some(place) = place {
                place.send(submissions);
            } else if let Some(free) = free {
                free.send(submissions);
            }
        }
        complete(done);
        Ok(())
    }

    async fn place(&self) -> Option<Self::Place> {
        self.queue.clone().reserve_owned().await.ok()
    }

    fn reason(&self, code: RefusalCode, sentence: &str) -> String {
        refusal::reason(refusal::code_of(code), sentence)
    }

    fn refused(&self, user: &str, topic: &str, refused: &Refusal) {
        let code = refusal::code_of(refused.code);
        // The event has the code in a member of its own.
        let sentence = refused.reason.strip_prefix(code.as_str()).and_then(|rest| rest.strip_prefix(": "));
        let sentence = sentence.unwrap_or(&refused.reason);
        refusal::count_and_tell(&self.announcer, &self.metrics, user, true, code, sentence, topic, None);
    }

    async fn read(&self, user: &str, topic: &str, after: Position, limit: ReadLimit) -> Result<Page, ServiceError> {
        let stream = Self::stream(user, topic)?;
        let limit = log::ReadLimit { entries: limit.messages, bytes: limit.bytes };
        let page = self.log.read(&stream, log::Position(after.0), limit).await.map_err(service_error)?;
        let deliveries = page
            .entries
            .iter()
            .map(|entry| Delivery {
                position: Position(entry.position.0),
                topic: match stream.side {
                    Side::Inbox | Side::Sent => None,
                    Side::EveryInbox => Some(Down::Inbox.topic(&entry.to).into()),
                    Side::EverySent => Some(Down::Sent.topic(&entry.from).into()),
                },
                payload: envelope::encode_stored(entry),
                properties: envelope::properties(&entry.body, entry.seq, &entry.from, entry.id.as_ref()).into(),
            })
            .collect();
        Ok(Page { deliveries, end: page.end })
    }

    async fn start(&self, user: &str, topic: &str) -> Result<Position, ServiceError> {
        let stream = Self::stream(user, topic)?;
        match stream.side {
            // What no device of the user has had.
            Side::Inbox => Ok(Position(self.log.delivered(&stream).await.map_err(service_error)?.position.0)),
            // The user's own messages came from a device of theirs: a new one sees what is sent from now on.
            // An observer as well: what was before is in the export.
            Side::Sent | Side::EveryInbox | Side::EverySent => Ok(self.head()),
        }
    }

    fn head(&self) -> Position {
        Position(self.log.head().0)
    }

    fn acknowledged(&self, session: &SessionKey, persistent: bool, topic: &str, after: Position, position: Position) {
        let (Ok(stream), Ok(device)) = (Self::stream(&session.user, topic), Self::device(session)) else { return };
        let inbox_of = (stream.side == Side::Inbox).then(|| stream.user.clone());
        self.log.advance(vec![Advance {
            stream,
            device: persistent.then_some(device),
            position: log::Position(position.0),
        }]);
        if let Some(user) = inbox_of {
            self.receipts.delivered(&user, log::Position(after.0), log::Position(position.0));
        }
    }

    async fn load_session(&self, session: &SessionKey) -> Result<Option<SessionRecord>, ServiceError> {
        let device = Self::device(session)?;
        let Some(record) = self.log.session(&device).await.map_err(service_error)? else { return Ok(None) };
        if has_expired(&record, now_ms()) {
            self.sessions.delete(&device).await.map_err(service_error)?;
            return Ok(None);
        }
        if record.ended_at_ms.is_some() && record.expiry_s != u32::MAX {
            // It lives again: should the process die now, its expiry must not be counted from the last end.
            let alive = log::SessionRecord { ended_at_ms: None, ..record.clone() };
            self.log.put_session(&device, alive).await.map_err(service_error)?;
        }
        Ok(Some(session_record(&device.user, record)))
    }

    async fn stored_sessions(&self) -> Result<Vec<StoredSession>, ServiceError> {
        let now_ms = now_ms();
        let mut sessions = Vec::new();
        for (device, record) in self.log.sessions(None).await.map_err(service_error)? {
            if has_expired(&record, now_ms) {
                self.log.delete_session(&device).await.map_err(service_error)?;
                continue;
            }
            let ended_at_ms = record.ended_at_ms.unwrap_or(now_ms);
            if record.ended_at_ms.is_none() && record.expiry_s != u32::MAX {
                // Its connection ended with the process before this one.
                self.log.end_session(&device, now_ms, record.expiry_s);
            }
            let expires_in = (record.expiry_s != u32::MAX).then(|| {
                let at_ms = ended_at_ms.saturating_add(u64::from(record.expiry_s) * 1_000);
                Duration::from_millis(at_ms.saturating_sub(now_ms))
            });
            let Some(identity) = self.auth.identity_of(&device.user, &device.client_id) else { continue };
            sessions.push(StoredSession { identity, record: session_record(&device.user, record), expires_in });
        }
        Ok(sessions)
    }

    async fn forget_expired(&self, session: &SessionKey) -> Result<(), ServiceError> {
        let device = Self::device(session)?;
        match self.log.session(&device).await.map_err(service_error)? {
            Some(record) if has_expired(&record, now_ms()) => {
                self.sessions.delete(&device).await.map_err(service_error)
            }
            _ => Ok(()),
        }
    }

    async fn save_session(&self, session: &SessionKey, record: SessionRecord) -> Result<(), ServiceError> {
        let device = Self::device(session)?;
        self.log.put_session(&device, stored_session(&device.user, record)).await.map_err(service_error)
    }

    async fn create_session(&self, session: &SessionKey, record: SessionRecord) -> Result<(), NotCreated> {
        let device = Self::device(session)?;
        self.sessions.create(&device, stored_session(&device.user, record), now_ms()).await
    }

    async fn delete_session(&self, session: &SessionKey) -> Result<(), ServiceError> {
        self.sessions.delete(&Self::device(session)?).await.map_err(service_error)
    }

    fn session_ended(&self, session: &SessionKey, expiry_s: u32) {
        if let Ok(device) = Self::device(session) {
            self.log.end_session(&device, now_ms(), expiry_s);
        }
    }

    fn arrived(&self, user: &Arc<str>) {
        if let Ok(user) = UserId::parse(user) {
            self.presence.arrived(&user);
        }
    }

    fn left(&self, user: &Arc<str>) {
        if let Ok(user) = UserId::parse(user) {
            self.presence.left(&user);
        }
    }

    fn subscribed(&self, user: &Arc<str>, topic: &Arc<str>, subscriber: Subscriber) {
        let Ok(user) = UserId::parse(user) else { return };
        if **topic == *Down::Receipt.topic(&user) {
            self.receipts.listens(&user);
        } else if **topic == *Down::Presence.topic(&user) {
            self.presence.listens(user, subscriber);
        }
    }

    fn observe(&self, observation: Observation) {
        match observation {
            Observation::Connected => {
                self.metrics.connects.inc();
                self.metrics.connections.inc();
            }
            Observation::Disconnected => {
                self.metrics.connections.dec();
            }
            Observation::ConnectRefused => self.metrics.refused("connect"),
            Observation::MessageReceived => {
                self.metrics.mqtt_messages_received.inc();
            }
            Observation::MessagesSent(count) => {
                self.metrics.mqtt_messages_sent.inc_by(count);
            }
            Observation::Delivered(count) => {
                self.metrics.messages_delivered.inc_by(count);
            }
            Observation::PublishToDelivery(age) => {
                self.metrics.publish_to_delivery_seconds.observe(age.as_secs_f64());
            }
            Observation::PublishToPuback(age) => self.metrics.publish_to_puback_seconds.observe(age.as_secs_f64()),
            Observation::Refused(RefusalCode::SharedSubscriptionsNotSupported) => {
                self.metrics.refused("shared_subscription");
            }
            Observation::Refused(_) => self.metrics.refused("edge"),
            Observation::QueueFull => {
                self.metrics.refused("queue_full");
                self.metrics.limited("queue_messages");
            }
            Observation::Limited(limit) => self.metrics.limited(limit),
            Observation::Panicked => self.metrics.refused("panic"),
        }
    }
}

/// A session as the edge knows it.
fn session_record(user: &UserId, record: log::SessionRecord) -> SessionRecord {
    let cursors = Side::ALL.into_iter().filter_map(|side| {
        let position = record.cursors.of(side)?;
        Some((durable_topic(side, user).into(), Position(position.0)))
    });
    let cursors = cursors.collect();
    let subscriptions = record.subscriptions.into_iter().map(|subscription| SubscriptionRecord {
        filter: subscription.filter,
        qos: subscription.qos,
        no_local: subscription.no_local,
        retain_as_published: subscription.retain_as_published,
        identifier: subscription.identifier,
    });
    SessionRecord { subscriptions: subscriptions.collect(), expiry_s: record.expiry_s, cursors }
}

/// A session as the log keeps it.
fn stored_session(user: &UserId, record: SessionRecord) -> log::SessionRecord {
    let mut cursors = Cursors::default();
    for side in Side::ALL {
        let topic = durable_topic(side, user);
        let found = record.cursors.iter().find(|(name, _)| **name == *topic);
        *cursors.of_mut(side) = found.map(|(_, position)| log::Position(position.0));
    }
    let subscriptions = record.subscriptions.into_iter().map(|subscription| log::SubscriptionRecord {
        filter: subscription.filter,
        qos: subscription.qos,
        no_local: subscription.no_local,
        retain_as_published: subscription.retain_as_published,
        identifier: subscription.identifier,
    });
    log::SessionRecord { cursors, expiry_s: record.expiry_s, ended_at_ms: None, subscriptions: subscriptions.collect() }
}

/// The bound topic behind which a stream of the user's stands.
fn durable_topic(side: Side, user: &UserId) -> String {
    match side {
        Side::Inbox => Down::Inbox.topic(user),
        Side::Sent => Down::Sent.topic(user),
        Side::EveryInbox => Down::Inbox.filter(),
        Side::EverySent => Down::Sent.filter(),
    }
}

fn service_error(error: LogError) -> ServiceError {
    ServiceError(error.to_string())
}

fn now_ms() -> u64 {
    let since: Duration = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
