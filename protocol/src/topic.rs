//! Topics: what a client publishes to, what it subscribes to, and who may.

use std::fmt;

use crate::{ErrorCode, InvalidName, MessageId, UserId};

/// The first level of every chat topic.
pub const ROOT: &str = "chat";

/// A topic that a client publishes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Up {
    /// `chat/{me}/out/{peer}` or `chat/{me}/out/{peer}/{id}`: send a text.
    Out { me: UserId, peer: UserId, id: Option<MessageId> },
    /// `chat/{me}/read/{peer}`: I have read up to here.
    Read { me: UserId, peer: UserId },
    /// `chat/{me}/typing/{peer}`.
    Typing { me: UserId, peer: UserId },
    /// `chat/{me}/req/{method}`: a request.
    Req { me: UserId, method: String },
}

impl Up {
    /// The patterns, as the documentation writes them.
    pub const PATTERNS: [&str; 5] = [
        "chat/{me}/out/{peer}",
        "chat/{me}/out/{peer}/{id}",
        "chat/{me}/read/{peer}",
        "chat/{me}/typing/{peer}",
        "chat/{me}/req/{method}",
    ];
}

/// A topic that no client can publish to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// No such shape.
    #[error("no such topic; publish to chat/{{me}}/out/{{peer}} or chat/{{me}}/out/{{peer}}/{{id}}")]
    Unknown,
    /// `{me}`.
    #[error("{{me}}: {0}")]
    Me(InvalidName),
    /// `{peer}`.
    #[error("{{peer}}: {0}")]
    Peer(InvalidName),
    /// `{id}`.
    #[error("{{id}}: {0}")]
    Id(InvalidName),
}

impl TopicError {
    /// The code for the client.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Unknown => ErrorCode::InvalidTopic,
            Self::Me(_) => ErrorCode::InvalidUser,
            Self::Peer(_) => ErrorCode::InvalidPeer,
            Self::Id(_) => ErrorCode::InvalidId,
        }
    }
}

/// Reads a topic that a client publishes to.
pub fn parse_up(topic: &str) -> Result<Up, TopicError> {
    let mut levels = topic.split('/');
    // At most five levels are looked at, however many there are.
    let found: [Option<&str>; 6] = std::array::from_fn(|_| levels.next());
    let me = |me| UserId::parse(me).map_err(TopicError::Me);
    let peer = |peer| UserId::parse(peer).map_err(TopicError::Peer);
    match found {
        [Some(ROOT), Some(m), Some("out"), Some(p), None, None] => Ok(Up::Out { me: me(m)?, peer: peer(p)?, id: None }),
        [Some(ROOT), Some(m), Some("out"), Some(p), Some(i), None] => {
            let (me, peer) = (me(m)?, peer(p)?);
            Ok(Up::Out { me, peer, id: Some(MessageId::parse(i).map_err(TopicError::Id)?) })
        }
        [Some(ROOT), Some(m), Some("read"), Some(p), None, None] => Ok(Up::Read { me: me(m)?, peer: peer(p)? }),
        [Some(ROOT), Some(m), Some("typing"), Some(p), None, None] => Ok(Up::Typing { me: me(m)?, peer: peer(p)? }),
        [Some(ROOT), Some(m), Some("req"), Some(method), None, None] if is_method(method) => {
            Ok(Up::Req { me: me(m)?, method: method.to_owned() })
        }
        _ => Err(TopicError::Unknown),
    }
}

/// Whether a level could be a request's method. Which there are is not for the topic to say.
fn is_method(level: &str) -> bool {
    !level.is_empty() && !level.contains(['\0', '+', '#'])
}

/// A topic that the service publishes to, below `chat/{me}/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Down {
    /// What others sent me.
    Inbox,
    /// My own messages as stored.
    Sent,
    /// The peer's cursors.
    Receipt,
    /// My own read cursor.
    Read,
    /// The peer is typing.
    Typing,
    /// Who is there.
    Presence,
    /// Why a publish was refused.
    Error,
    /// Answers to requests.
    Res,
}

impl Down {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Inbox, Self::Sent, Self::Receipt, Self::Read, Self::Typing, Self::Presence, Self::Error, Self::Res];

    /// What follows `chat/{me}/`.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Inbox => "inbox",
            Self::Sent => "sent",
            Self::Receipt => "event/receipt",
            Self::Read => "event/read",
            Self::Typing => "event/typing",
            Self::Presence => "event/presence",
            Self::Error => "event/error",
            Self::Res => "res",
        }
    }

    /// This topic of a user.
    pub fn topic(self, user: &UserId) -> String {
        self.below(user.as_str())
    }

    /// The same in place of what was in `topic`.
    pub fn write_topic(self, user: &UserId, topic: &mut String) {
        topic.clear();
        self.put_below(user.as_str(), topic);
    }

    /// The filter for this topic of every user.
    pub fn filter(self) -> String {
        self.below("+")
    }

    fn below(self, user: &str) -> String {
        let mut topic = String::new();
        self.put_below(user, &mut topic);
        topic
    }

    fn put_below(self, user: &str, topic: &mut String) {
        let suffix = self.suffix();
        topic.reserve(ROOT.len() + user.len() + suffix.len() + 2);
        for part in [ROOT, "/", user, "/", suffix] {
            topic.push_str(part);
        }
    }

    fn is_event(self) -> bool {
        self.suffix().starts_with("event/")
    }
}

/// Why a filter below `chat/` was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterRefusal {
    me: UserId,
}

impl fmt::Display for FilterRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "you may subscribe to chat/{me}/inbox, chat/{me}/sent, chat/{me}/res, chat/{me}/event/+ and chat/{me}/#",
            me = self.me
        )
    }
}

impl std::error::Error for FilterRefusal {}

/// What a filter below `chat/` means for a user: exactly these topics.
pub fn parse_filter(me: &UserId, filter: &str) -> Result<Vec<Down>, FilterRefusal> {
    let rest = filter
        .strip_prefix(ROOT)
        .and_then(|rest| rest.strip_prefix('/'))
        .and_then(|rest| rest.strip_prefix(me.as_str()))
        .and_then(|rest| rest.strip_prefix('/'));
    let topics: Vec<Down> = match rest {
        Some("#") => Down::ALL.to_vec(),
        Some("+") => Down::ALL.into_iter().filter(|down| !down.is_event()).collect(),
        Some("event/+" | "event/#") => Down::ALL.into_iter().filter(|down| down.is_event()).collect(),
        Some(exact) => Down::ALL.into_iter().filter(|down| down.suffix() == exact).collect(),
        None => Vec::new(),
    };
    if topics.is_empty() { Err(FilterRefusal { me: me.clone() }) } else { Ok(topics) }
}

/// What an observer subscribes to besides its own topics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// `chat/#`: everything but answers to requests.
    Everything,
    /// `chat/+/…`: this topic of every user.
    Each(Down),
    /// `chat/+/event/+`: all events of every user.
    Events,
}

impl Observed {
    /// The filters, as the documentation writes them.
    pub const FILTERS: [&str; 5] = ["chat/#", "chat/+/inbox", "chat/+/sent", "chat/+/event/+", "chat/+/event/{event}"];

    /// The topics that it means.
    pub fn topics(self) -> Vec<Down> {
        let all = Down::ALL.into_iter();
        match self {
            Self::Everything => all.filter(|down| *down != Down::Res).collect(),
            Self::Each(down) => vec![down],
            Self::Events => all.filter(|down| down.is_event()).collect(),
        }
    }
}

/// What a filter means for an observer; `None` if nothing.
pub fn parse_observer_filter(filter: &str) -> Option<Observed> {
    match filter.strip_prefix(ROOT)?.strip_prefix('/')? {
        "#" => Some(Observed::Everything),
        "+/event/+" | "+/event/#" => Some(Observed::Events),
        rest => {
            let suffix = rest.strip_prefix("+/")?;
            Observed::Everything.topics().into_iter().find(|down| down.suffix() == suffix).map(Observed::Each)
        }
    }
}

/// Whether a topic is `chat/{me}/res/{token}`: one of a user's own, for answers to requests that name it. A token is as a message id.
pub fn is_response_topic(me: &UserId, topic: &str) -> bool {
    let token = topic.strip_prefix(&Down::Res.topic(me)).and_then(|rest| rest.strip_prefix('/'));
    token.is_some_and(|token| MessageId::parse(token).is_ok())
}

/// Whether a topic name or filter lies below `chat/`: its first level is exactly `chat`.
pub fn is_chat(topic: &str) -> bool {
    topic.split('/').next() == Some(ROOT)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn user(name: &str) -> UserId {
        UserId::parse(name).expect("valid")
    }

    #[test]
    fn up_topics() {
        let id = Some(MessageId::parse("m-1").expect("valid"));
        assert_eq!(parse_up("chat/alice/out/bob/m-1"), Ok(Up::Out { me: user("alice"), peer: user("bob"), id }));
        assert_eq!(parse_up("chat/alice/read/bob"), Ok(Up::Read { me: user("alice"), peer: user("bob") }));
        for (topic, code) in [
            ("chat/alice/out", ErrorCode::InvalidTopic),
            ("chat/alice/out/bob/m-1/x", ErrorCode::InvalidTopic),
            ("chat/alice/in/bob", ErrorCode::InvalidTopic),
            ("chat", ErrorCode::InvalidTopic),
            ("chat/alice/req/", ErrorCode::InvalidTopic),
            ("chat/alice/req/who\0ami", ErrorCode::InvalidTopic),
            ("chat/alice/req/+", ErrorCode::InvalidTopic),
            ("chat//out/bob", ErrorCode::InvalidUser),
            ("chat/alice/out/", ErrorCode::InvalidPeer),
            ("chat/alice/out/Bob", ErrorCode::InvalidPeer),
            ("chat/alice/out/bob/", ErrorCode::InvalidId),
            ("chat/alice/out/bob/ä", ErrorCode::InvalidId),
        ] {
            assert_eq!(parse_up(topic).map_err(|error| error.code()), Err(code), "{topic}");
        }
    }

    #[test]
    fn filters_mean_exactly_ones_own_topics() {
        let bob = user("bob");
        assert_eq!(parse_filter(&bob, "chat/bob/#").map(|topics| topics.len()), Ok(8));
        assert_eq!(parse_filter(&bob, "chat/bob/+"), Ok(vec![Down::Inbox, Down::Sent, Down::Res]));
        assert_eq!(parse_filter(&bob, "chat/bob/event/+").map(|topics| topics.len()), Ok(5));
        assert_eq!(parse_filter(&bob, "chat/bob/inbox"), Ok(vec![Down::Inbox]));
        assert!(is_response_topic(&bob, "chat/bob/res/r-1"));
        for other in ["chat/bob/res", "chat/bob/res/", "chat/bob/res/+", "chat/bob/res/a/b", "chat/bobby/res/a"] {
            assert!(!is_response_topic(&bob, other), "{other}");
        }
        for refused in
            ["chat/#", "chat/+/inbox", "chat/bobby/inbox", "chat/bo/inbox", "chat/bob", "chat/bob/out/alice", "chat"]
        {
            assert!(parse_filter(&bob, refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn an_observer_sees_everything_but_answers() {
        for (filter, expected) in [
            ("chat/#", Some(Observed::Everything)),
            ("chat/+/inbox", Some(Observed::Each(Down::Inbox))),
            ("chat/+/event/typing", Some(Observed::Each(Down::Typing))),
            ("chat/+/event/+", Some(Observed::Events)),
            ("chat/+/res", None),
            ("chat/+/res/1", None),
            ("chat/+/out/bob", None),
            ("chat/+/#", None),
            ("chat/+", None),
            ("chat", None),
            ("#", None),
        ] {
            assert_eq!(parse_observer_filter(filter), expected, "{filter}");
        }
        assert!(!Observed::Everything.topics().contains(&Down::Res));
        assert_eq!(Down::Typing.filter(), "chat/+/event/typing");
    }

    proptest! {
        #[test]
        fn no_string_panics(text in any::<String>(), prefix in prop_oneof![Just(""), Just("chat/"), Just("chat/bob/")]) {
            let topic = format!("{prefix}{text}");
            let parsed = parse_up(&topic);
            prop_assert!(parsed.is_err() || is_chat(&topic));
            let filter = parse_filter(&user("bob"), &topic);
            prop_assert!(filter.is_err() || topic.starts_with("chat/bob/"));
        }
    }
}
