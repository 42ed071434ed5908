//! Requests on `chat/{me}/req/{method}`, and their answers.
//!
//! A request is a JSON object, or nothing where nothing is needed. An answer carries the request's `ref`, if it had one, and either `ok` or
//! `error`. Reading a request names the member that is wrong.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{ConversationId, ErrorCode, MessageId, Seq, Timestamp, UserId};

/// Entries, or conversations, that a page has at most.
pub const PAGE_MAX: usize = 200;
/// The same if the request does not say.
pub const PAGE_DEFAULT: usize = 50;
/// Bytes of a `ref`.
const REF_BYTES_MAX: usize = 128;

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    Whoami,
    Conversations,
    History,
    Sync,
    Block,
    Unblock,
    Blocked,
    Delete,
    Unsend,
    Edit,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Whoami,
        Self::Conversations,
        Self::History,
        Self::Sync,
        Self::Block,
        Self::Unblock,
        Self::Blocked,
        Self::Delete,
        Self::Unsend,
        Self::Edit,
    ];

    /// Its name in the topic.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Whoami => "whoami",
            Self::Conversations => "conversations",
            Self::History => "history",
            Self::Sync => "sync",
            Self::Block => "block",
            Self::Unblock => "unblock",
            Self::Blocked => "blocked",
            Self::Delete => "delete",
            Self::Unsend => "unsend",
            Self::Edit => "edit",
        }
    }

    /// The method with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.as_str() == name)
    }
}

/// Why a request is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestError {
    pub code: ErrorCode,
    /// What was wrong and what would be right.
    pub message: String,
}

impl RequestError {
    /// With a sentence.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Which part of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// The last entries before this one; `None`: the last of all.
    Before(Option<Seq>),
    /// The first entries after this one; `None`: the first of all.
    After(Option<Seq>),
}

/// A request, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Whoami,
    /// Newest first.
    Conversations {
        limit: usize,
        before: Option<(Timestamp, UserId)>,
    },
    History {
        with: UserId,
        range: Range,
        limit: usize,
        raw: bool,
    },
    Sync {
        since: Option<String>,
        limit: usize,
    },
    Block {
        with: UserId,
    },
    Unblock {
        with: UserId,
    },
    Blocked,
    Delete {
        with: UserId,
        seq: Seq,
    },
    Unsend {
        with: UserId,
        seq: Seq,
        id: Option<MessageId>,
    },
    Edit {
        with: UserId,
        seq: Seq,
        text: String,
        id: Option<MessageId>,
    },
}

impl Call {
    /// The other user whom it is about.
    pub fn with(&self) -> Option<&UserId> {
        match self {
            Self::History { with, .. }
            | Self::Block { with }
            | Self::Unblock { with }
            | Self::Delete { with, .. }
            | Self::Unsend { with, .. }
            | Self::Edit { with, .. } => Some(with),
            Self::Whoami | Self::Conversations { .. } | Self::Sync { .. } | Self::Blocked => None,
        }
    }
}

/// What came on `chat/{me}/req/{method}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The member `ref`, a string or a number, to be given back.
    pub reference: Option<Value>,
    pub call: Result<Call, RequestError>,
}

impl Request {
    /// Reads a request.
    pub fn parse(method: &str, payload: &[u8]) -> Self {
        let wrong = |message: String| RequestError::new(ErrorCode::InvalidRequest, message);
        let object = if payload.is_empty() { Ok(Map::new()) } else { serde_json::from_slice(payload) };
        let object = match object {
            Ok(object) => object,
            Err(error) => {
                let call = Err(wrong(format!("the payload is a JSON object: {error}")));
                return Self { reference: None, call };
            }
        };
        let mut members = Members(object);
        match members.reference() {
            Ok(reference) => Self { reference, call: members.call(method) },
            Err(error) => Self { reference: None, call: Err(error) },
        }
    }
}

/// The members of a request that are not read yet.
struct Members(Map<String, Value>);

impl Members {
    fn call(&mut self, method: &str) -> Result<Call, RequestError> {
        let Some(method) = Method::parse(method) else {
            let known: Vec<&str> = Method::ALL.into_iter().map(Method::as_str).collect();
            let message = format!("there is no method {method:?}; there are {}", known.join(", "));
            return Err(RequestError::new(ErrorCode::UnknownMethod, message));
        };
        let call = match method {
            Method::Whoami => Call::Whoami,
            Method::Conversations => Call::Conversations { limit: self.limit()?, before: self.place()? },
            Method::History => {
                Call::History { with: self.with()?, range: self.range()?, limit: self.limit()?, raw: self.flag("raw")? }
            }
            Method::Sync => Call::Sync { since: self.optional_string("since")?, limit: self.limit()? },
            Method::Block => Call::Block { with: self.with()? },
            Method::Unblock => Call::Unblock { with: self.with()? },
            Method::Blocked => Call::Blocked,
            Method::Delete => Call::Delete { with: self.with()?, seq: self.seq()? },
            Method::Unsend => Call::Unsend { with: self.with()?, seq: self.seq()?, id: self.id()? },
            Method::Edit => {
                Call::Edit { with: self.with()?, seq: self.seq()?, text: self.string("text")?, id: self.id()? }
            }
        };
        match self.0.keys().next() {
            None => Ok(call),
            Some(unknown) => Err(wrong(unknown, &format!("{} knows no such member", method.as_str()))),
        }
    }

    fn reference(&mut self) -> Result<Option<Value>, RequestError> {
        match self.0.remove("ref") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.len() <= REF_BYTES_MAX => Ok(Some(Value::String(text))),
            Some(Value::Number(number)) => Ok(Some(Value::Number(number))),
            Some(_) => Err(wrong("ref", &format!("it is a number, or a string of at most {REF_BYTES_MAX} bytes"))),
        }
    }

    fn optional_string(&mut self, name: &str) -> Result<Option<String>, RequestError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong(name, "it is a string")),
        }
    }

    fn string(&mut self, name: &str) -> Result<String, RequestError> {
        self.optional_string(name)?.ok_or_else(|| wrong(name, "it is missing"))
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, RequestError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| wrong(name, "it is a whole number, 0 or more")),
        }
    }

    fn flag(&mut self, name: &str) -> Result<bool, RequestError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(wrong(name, "it is true or false")),
        }
    }

    fn with(&mut self) -> Result<UserId, RequestError> {
        let name = self.string("with")?;
        UserId::parse(&name).map_err(|error| RequestError::new(ErrorCode::InvalidPeer, format!("`with`: {error}")))
    }

    fn id(&mut self) -> Result<Option<MessageId>, RequestError> {
        let Some(id) = self.optional_string("id")? else { return Ok(None) };
        let id = MessageId::parse(&id);
        id.map(Some).map_err(|error| RequestError::new(ErrorCode::InvalidId, format!("`id`: {error}")))
    }

    fn seq(&mut self) -> Result<Seq, RequestError> {
        let seq = self.number("seq")?.ok_or_else(|| wrong("seq", "it is missing"))?;
        Seq::new(seq).ok_or_else(|| wrong("seq", "the first is 1"))
    }

    fn limit(&mut self) -> Result<usize, RequestError> {
        match self.number("limit")? {
            None => Ok(PAGE_DEFAULT),
            Some(limit) => usize::try_from(limit)
                .ok()
                .filter(|limit| (1..=PAGE_MAX).contains(limit))
                .ok_or_else(|| wrong("limit", &format!("it is between 1 and {PAGE_MAX}"))),
        }
    }

    fn range(&mut self) -> Result<Range, RequestError> {
        match (self.number("before")?, self.number("after")?) {
            (Some(_), Some(_)) => Err(wrong("before", "there is `after` too, and only one can be")),
            (None, Some(after)) => Ok(Range::After(Seq::new(after))),
            (Some(0), None) => Err(wrong("before", "the first entry is 1")),
            (before, None) => Ok(Range::Before(before.and_then(Seq::new))),
        }
    }

    /// Where a list of conversations goes on.
    fn place(&mut self) -> Result<Option<(Timestamp, UserId)>, RequestError> {
        let Some(place) = self.optional_string("before")? else { return Ok(None) };
        let read = || {
            let (at, peer) = place.split_once('.')?;
            Some((Timestamp::from_ms(at.parse().ok()?), UserId::parse(peer).ok()?))
        };
        read().map(Some).ok_or_else(|| wrong("before", "it is the `next` of an answer"))
    }
}

fn wrong(member: &str, what: &str) -> RequestError {
    RequestError::new(ErrorCode::InvalidRequest, format!("`{member}`: {what}"))
}

/// What goes on at [`Call::Conversations`]' `before`.
pub fn place_of(at: Timestamp, peer: &UserId) -> String {
    format!("{}.{peer}", at.as_ms())
}

/// An entry in an answer: as it is stored, or a text as it stands now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnsweredEntry {
    pub v: u8,
    pub kind: String,
    pub conversation: ConversationId,
    pub seq: Seq,
    pub from: UserId,
    pub to: UserId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<MessageId>,
    pub at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Seq>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// When it was edited last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edited_at: Option<Timestamp>,
    /// It was taken back; then it has no text.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unsent: bool,
}

/// Answer to [`Call::Whoami`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhoamiOk {
    pub user: UserId,
    /// The server's clock.
    pub at: Timestamp,
    /// The server's version.
    pub version: String,
    /// Longest text.
    pub message_bytes: usize,
}

/// How a conversation stands for a user. Cursors are seqs; 0: nothing yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    pub with: UserId,
    /// What has reached the peer, and what the peer has read.
    pub delivered: u64,
    pub read: u64,
    /// What the user has read.
    pub my_read: u64,
    /// The user has blocked the peer.
    pub blocked: bool,
}

/// One of [`ConversationsOk`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConversationOk {
    #[serde(flatten)]
    pub standing: Standing,
    /// The last text, as it stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<AnsweredEntry>,
    /// The peer's texts after what the user has read, and after what the user wrote last; not counted beyond a thousand.
    pub unread: u64,
}

/// Answer to [`Call::Conversations`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConversationsOk {
    pub conversations: Vec<ConversationOk>,
    /// `before` of the next page, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// With the first page: `since` of a [`Call::Sync`] that gives what changes after this list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sync: Option<String>,
}

/// Answer to [`Call::History`]. Entries in the order of seq.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryOk {
    pub with: UserId,
    pub entries: Vec<AnsweredEntry>,
    /// There are more in the direction that was asked for.
    pub more: bool,
}

/// One of [`SyncOk`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncedConversation {
    #[serde(flatten)]
    pub standing: Standing,
    /// Entries that the user deleted for themselves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deleted: Vec<Seq>,
}

/// Answer to [`Call::Sync`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncOk {
    /// As they are stored, in the order in which they were.
    pub entries: Vec<AnsweredEntry>,
    /// Those that changed, or may have.
    pub conversations: Vec<SyncedConversation>,
    /// `since` of the next request.
    pub next: String,
    /// There is more: ask again at once.
    pub more: bool,
}

/// One of [`BlockedOk`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockedUser {
    pub user: UserId,
    pub at: Timestamp,
}

/// Answer to [`Call::Blocked`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockedOk {
    pub blocked: Vec<BlockedUser>,
}

/// Answer to [`Call::Unsend`] and [`Call::Edit`]: the entry that says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedOk {
    pub seq: Seq,
    pub at: Timestamp,
}

/// Answer to what has nothing to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoneOk {}

#[derive(Serialize)]
struct Answer<'a, T> {
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    reference: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ok: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a RequestError>,
}

/// The bytes of an answer.
pub fn encode_answer<T: Serialize>(reference: Option<&Value>, outcome: &Result<T, RequestError>) -> Vec<u8> {
    let answer = Answer { reference, ok: outcome.as_ref().ok(), error: outcome.as_ref().err() };
    serde_json::to_vec(&answer).expect("strings and numbers always encode")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn user(name: &str) -> UserId {
        UserId::parse(name).expect("valid")
    }

    fn seq(seq: u64) -> Seq {
        Seq::new(seq).expect("not 0")
    }

    #[test]
    fn requests_are_read() {
        let call = |method: &str, payload: &str| Request::parse(method, payload.as_bytes()).call;
        assert_eq!(call("whoami", ""), Ok(Call::Whoami));
        assert_eq!(call("whoami", "{}"), Ok(Call::Whoami));
        let before = Some((Timestamp::from_ms(17), user("bob")));
        assert_eq!(
            call("conversations", r#"{"limit":3,"before":"17.bob"}"#),
            Ok(Call::Conversations { limit: 3, before })
        );
        let history = |range, limit, raw| Ok(Call::History { with: user("bob"), range, limit, raw });
        assert_eq!(call("history", r#"{"with":"bob"}"#), history(Range::Before(None), PAGE_DEFAULT, false));
        assert_eq!(
            call("history", r#"{"with":"bob","before":5,"limit":200,"raw":true}"#),
            history(Range::Before(Some(seq(5))), 200, true)
        );
        assert_eq!(call("history", r#"{"with":"bob","after":0}"#), history(Range::After(None), PAGE_DEFAULT, false));
        let edit = Call::Edit { with: user("bob"), seq: seq(7), text: "new".into(), id: None };
        assert_eq!(call("edit", r#"{"with":"bob","seq":7,"text":"new"}"#), Ok(edit));
        let with_ref = Request::parse("blocked", br#"{"ref":"r-1"}"#);
        assert_eq!(with_ref, Request { reference: Some("r-1".into()), call: Ok(Call::Blocked) });
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (method, payload, code, sentence) in [
            ("nonsense", "{}", ErrorCode::UnknownMethod, "there is no method \"nonsense\""),
            ("whoami", "[]", ErrorCode::InvalidRequest, "JSON object"),
            ("whoami", "{", ErrorCode::InvalidRequest, "JSON object"),
            ("whoami", r#"{"x":1}"#, ErrorCode::InvalidRequest, "`x`"),
            ("whoami", r#"{"ref":[]}"#, ErrorCode::InvalidRequest, "`ref`"),
            ("history", "{}", ErrorCode::InvalidRequest, "`with`"),
            ("history", r#"{"with":"Bob"}"#, ErrorCode::InvalidPeer, "`with`"),
            ("history", r#"{"with":"bob","limit":0}"#, ErrorCode::InvalidRequest, "`limit`"),
            ("history", r#"{"with":"bob","limit":201}"#, ErrorCode::InvalidRequest, "`limit`"),
            ("history", r#"{"with":"bob","before":-1}"#, ErrorCode::InvalidRequest, "`before`"),
            ("history", r#"{"with":"bob","before":0}"#, ErrorCode::InvalidRequest, "`before`"),
            ("history", r#"{"with":"bob","before":1,"after":1}"#, ErrorCode::InvalidRequest, "`before`"),
            ("conversations", r#"{"before":"bob"}"#, ErrorCode::InvalidRequest, "`before`"),
            ("delete", r#"{"with":"bob"}"#, ErrorCode::InvalidRequest, "`seq`"),
            ("delete", r#"{"with":"bob","seq":0}"#, ErrorCode::InvalidRequest, "`seq`"),
            ("edit", r#"{"with":"bob","seq":1}"#, ErrorCode::InvalidRequest, "`text`"),
            ("unsend", r#"{"with":"bob","seq":1,"id":"a b"}"#, ErrorCode::InvalidId, "`id`"),
        ] {
            let error = Request::parse(method, payload.as_bytes()).call.expect_err(payload);
            assert_eq!(error.code, code, "{method} {payload}: {error:?}");
            assert!(error.message.contains(sentence), "{method} {payload}: {error:?}");
        }
    }

    #[test]
    fn answers_carry_the_reference() {
        let answer = encode_answer(Some(&"r-1".into()), &Ok(DoneOk {}));
        assert_eq!(answer, br#"{"ref":"r-1","ok":{}}"#);
        let error = RequestError::new(ErrorCode::InvalidRequest, "no");
        let answer = encode_answer::<DoneOk>(None, &Err(error));
        assert_eq!(answer, br#"{"error":{"code":"invalid_request","message":"no"}}"#);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(nth in 0..Method::ALL.len(), payload in any::<Vec<u8>>(), json in r#"\{("(with|seq|ref|before|limit)":("bob"|1|null|\[\]),?)*\}"#) {
            let method = Method::ALL[nth].as_str();
            drop(Request::parse(method, &payload));
            drop(Request::parse(method, json.as_bytes()));
        }
    }
}
