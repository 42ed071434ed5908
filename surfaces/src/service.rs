//! The smallest service that makes a broker do all it can: one durable topic, one live one, one that is closed, and outcomes of every kind.
//!
//! It keeps everything in memory, and answers at once, so that what a connection does depends on its bytes alone as far as it can.

use std::collections::BTreeMap;
use std::sync::Arc;

use broker::Announcer;
use broker::completion::{Reply, complete};
use broker::live::LiveMessage;
use broker::service::{
    Authentication, BoundPublish, BoundTopic, ConnectRefusal, ConnectRefusalCode, ConnectRequest, Credential, Delivery,
    Identity, Keeping, NotCreated, Observation, Page, Peer, Position, PublishOutcome, PublishRoute, ReadLimit, Refusal,
    RefusalCode, Roles, Service, ServiceError, SessionKey, SessionRecord, SubscribeRoute,
};
use bytes::Bytes;
use parking_lot::Mutex;

/// Clients publish to it and to the live one, and subscribe to both.
pub(crate) const DURABLE: &str = "bound/log";
pub(crate) const LIVE: &str = "bound/live";
/// Nobody may.
const CLOSED: &str = "closed";
/// Messages of the durable topic that are kept.
const LOG_MAX: usize = 200;
/// Sessions that are kept.
const SESSIONS_MAX: usize = 50;

#[derive(Default)]
struct State {
    /// Payloads by position.
    log: BTreeMap<u64, Bytes>,
    head: u64,
    sessions: Vec<(SessionKey, SessionRecord)>,
}

pub(crate) struct Toy {
    announcer: Announcer,
    state: Mutex<State>,
}

impl Toy {
    pub(crate) fn new(announcer: Announcer) -> Self {
        Self { announcer, state: Mutex::default() }
    }

    fn outcome(&self, publish: &BoundPublish) -> Option<PublishOutcome> {
        match publish.payload.first() {
            Some(b'r') => Some(PublishOutcome::Refused(refusal(RefusalCode::QuotaExceeded))),
            Some(b'u') => Some(PublishOutcome::Unknown),
            Some(b'd') => None,
            _ => {
                let properties = vec![("seq", "1".to_owned())];
                Some(PublishOutcome::Stored { subscribers: publish.roles.0 == 0, properties })
            }
        }
    }

    fn append(&self, publish: &BoundPublish) {
        let message = {
            let mut state = self.state.lock();
            state.head += 1;
            let position = state.head;
            state.log.insert(position, publish.payload.clone());
            if state.log.len() > LOG_MAX {
                state.log.pop_first();
            }
            LiveMessage::new(DURABLE.into(), Position(position), 0, publish.payload.clone(), &[])
        };
        let event = LiveMessage::event(LIVE.into(), publish.payload.clone());
        self.announcer.announce(vec![message, event]);
    }
}

fn refusal(code: RefusalCode) -> Refusal {
    Refusal { code, reason: "not here".to_owned() }
}

impl Service for Toy {
    type Place = ();

    async fn connect(&self, request: ConnectRequest<'_>) -> Result<Identity, ConnectRefusal> {
        if request.user_name == Some("refused") {
            let code = ConnectRefusalCode::BadUserNameOrPassword;
            return Err(ConnectRefusal { code, reason: "not here".to_owned() });
        }
        Ok(Identity {
            user: "user".into(),
            client_id: request.client_id.into(),
            roles: Roles(u32::from(request.password.is_some())),
            expires_at: None,
            credential: Credential::default(),
        })
    }

    async fn authenticate_again(
        &self,
        _peer: &Peer,
        identity: &Identity,
        authentication: &Authentication,
    ) -> Result<Identity, ConnectRefusal> {
        match authentication.data.first() {
            Some(b'x') => {
                let code = ConnectRefusalCode::NotAuthorized;
                Err(ConnectRefusal { code, reason: "not here".to_owned() })
            }
            _ => Ok(identity.clone()),
        }
    }

    fn route_publish(&self, _who: &Identity, topic: &str) -> PublishRoute {
        match topic {
            DURABLE | LIVE => PublishRoute::Bound,
            CLOSED => PublishRoute::Refused(refusal(RefusalCode::NotAuthorized)),
            _ => PublishRoute::Ordinary,
        }
    }

    fn route_subscribe(&self, _who: &Identity, filter: &str) -> SubscribeRoute {
        let bound = |name: &str, keeping| BoundTopic { name: name.into(), keeping };
        match filter {
            DURABLE => SubscribeRoute::Bound(vec![bound(DURABLE, Keeping::Durable)]),
            LIVE => SubscribeRoute::Bound(vec![bound(LIVE, Keeping::Live)]),
            "bound/#" => SubscribeRoute::Bound(vec![bound(DURABLE, Keeping::Durable), bound(LIVE, Keeping::Live)]),
            CLOSED => SubscribeRoute::Refused(refusal(RefusalCode::NotAuthorized)),
            _ => SubscribeRoute::Ordinary,
        }
    }

    fn submit(&self, publishes: Vec<BoundPublish>, _place: Option<()>) -> Result<(), Vec<BoundPublish>> {
        let mut outcomes: Vec<(Reply, PublishOutcome)> = Vec::new();
        for publish in publishes {
            let Some(outcome) = self.outcome(&publish) else { continue };
            if matches!(outcome, PublishOutcome::Stored { .. }) {
                self.append(&publish);
            }
            outcomes.push((publish.reply, outcome));
        }
        complete(outcomes);
        Ok(())
    }

    async fn place(&self) -> Option<()> {
        Some(())
    }

    fn reason(&self, _code: RefusalCode, sentence: &str) -> String {
        sentence.to_owned()
    }

    fn refused(&self, _user: &str, topic: &str, _refusal: &Refusal) {
        assert!(!topic.is_empty(), "nothing is published without a topic");
    }

    async fn read(&self, _user: &str, _topic: &str, after: Position, limit: ReadLimit) -> Result<Page, ServiceError> {
        let state = self.state.lock();
        let mut rest = state.log.range(after.0 + 1..);
        let delivery = |(position, payload): (&u64, &Bytes)| Delivery {
            position: Position(*position),
            topic: None,
            payload: payload.clone(),
            properties: Arc::new([]),
        };
        let deliveries = rest.by_ref().take(limit.messages).map(delivery).collect();
        Ok(Page { deliveries, end: rest.next().is_none() })
    }

    async fn start(&self, _user: &str, _topic: &str) -> Result<Position, ServiceError> {
        Ok(Position(self.state.lock().head.saturating_sub(3)))
    }

    fn head(&self) -> Position {
        Position(self.state.lock().head)
    }

    fn acknowledged(&self, _session: &SessionKey, _persistent: bool, topic: &str, after: Position, position: Position) {
        assert!(topic == DURABLE && after < position && position <= self.head(), "{topic} {after:?} {position:?}");
    }

    async fn load_session(&self, session: &SessionKey) -> Result<Option<SessionRecord>, ServiceError> {
        let state = self.state.lock();
        Ok(state.sessions.iter().find(|(key, _)| key == session).map(|(_, record)| record.clone()))
    }

    async fn forget_expired(&self, session: &SessionKey) -> Result<(), ServiceError> {
        self.delete_session(session).await
    }

    async fn create_session(&self, session: &SessionKey, record: SessionRecord) -> Result<(), NotCreated> {
        self.save_session(session, record).await.map_err(NotCreated::from)
    }

    async fn save_session(&self, session: &SessionKey, record: SessionRecord) -> Result<(), ServiceError> {
        let mut state = self.state.lock();
        state.sessions.retain(|(key, _)| key != session);
        state.sessions.push((session.clone(), record));
        if state.sessions.len() > SESSIONS_MAX {
            state.sessions.remove(0);
        }
        Ok(())
    }

    async fn delete_session(&self, session: &SessionKey) -> Result<(), ServiceError> {
        self.state.lock().sessions.retain(|(key, _)| key != session);
        Ok(())
    }

    fn session_ended(&self, _session: &SessionKey, _expiry_s: u32) {}

    fn observe(&self, observation: Observation) {
        assert!(observation != Observation::Panicked, "a connection's task panicked");
    }
}
