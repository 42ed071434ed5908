//! Files and words that say who somebody is and what they may: password files, tokens and the keys for them, access rules.

use std::sync::LazyLock;

use broker::topics::filter::{self, validate_topic_filter, validate_topic_name};
use chat_protocol::UserId;
use chat_service::auth::acl::{self, Wanted};
use chat_service::auth::passwords::PasswordFile;
use chat_service::auth::tokens::{Claims, Keys, Tokens};

const LEVELS_MAX: usize = 16;

/// A password file is refused with its line, or lets in only those whom a line of it names.
pub(crate) fn passwords(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match PasswordFile::parse(text) {
        Ok(file) => {
            for name in ["alice", "bob"].map(|name| UserId::parse(name).expect("a name")) {
                let is_named =
                    text.lines().any(|line| line.strip_prefix(name.as_str()).is_some_and(|l| l.starts_with(':')));
                assert!(is_named || !file.has(&name), "{name} is let in by {text:?}");
            }
        }
        Err((line, reason)) => {
            assert!((1..=text.lines().count()).contains(&line) && !reason.is_empty(), "line {line}: {reason}");
        }
    }
}

/// A secret that no input is signed with.
const SECRET: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY-not-in-any-corpus";

static TOKENS: LazyLock<Tokens> = LazyLock::new(|| {
    let keys = Keys::parse(SECRET.as_bytes()).expect("a secret is a key");
    Tokens::new([keys], Claims::default())
});

/// Bytes as a token, and as a file of keys: neither is taken for what it is not.
pub(crate) fn tokens(data: &[u8]) {
    Tokens::is_token(data);
    Tokens::claimed_user(data);
    if let Ok(proof) = TOKENS.check(data) {
        panic!("{proof:?} is proved by what nobody signed");
    }
    if let Err(reason) = Keys::parse(data) {
        assert!(!reason.is_empty(), "refused without a reason");
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Err(reason) = Keys::parse_public_set(text)
    {
        assert!(!reason.is_empty(), "refused without a reason");
    }
}

/// A filter, a topic and a client identifier, a line each, and then rules: what may be read may be subscribed to, whoever nobody names is granted
/// nothing, and a client identifier that is a wildcard widens nothing.
pub(crate) fn rules(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.splitn(4, '\n');
    let mut line = || lines.next().unwrap_or_default();
    let (filter, topic, client_id, rules) = (line(), line(), line(), line());
    let acl = match acl::parse(rules) {
        Ok(acl) => acl,
        Err((line, reason)) => {
            assert!((1..=rules.lines().count()).contains(&line) && !reason.is_empty(), "line {line}: {reason}");
            return;
        }
    };
    let is_topic = validate_topic_name(topic, LEVELS_MAX).is_ok();
    let is_filter = validate_topic_filter(filter, LEVELS_MAX) == Ok(None);
    for user in ["alice", "bob"] {
        let client = acl::Client { user, client_id };
        let could_read = is_filter && acl.could_read(client, filter);
        if !is_topic {
            continue;
        }
        let may_read = acl.allows(client, topic, Wanted::Read);
        let may_write = acl.allows(client, topic, Wanted::Write);
        if is_filter && may_read && filter::matches(filter, topic) && !filter.starts_with('$') {
            assert!(could_read, "{user} may read {topic:?} and cannot subscribe to {filter:?}");
        }
        if may_read || may_write {
            let is_rule = |line: &str| line.trim_start_matches(' ').starts_with("topic") || line.contains("pattern");
            assert!(rules.lines().any(is_rule), "{user} is granted {topic:?} by no rule");
        }
        let wild = acl::Client { user, client_id: "#" };
        let tame = acl::Client { user, client_id: "no-such-client" };
        if acl.allows(wild, topic, Wanted::Read) && !topic.contains("no-such-client") && !rules.contains("deny") {
            assert!(acl.allows(tame, topic, Wanted::Read), "# as client identifier widens {topic:?}");
        }
    }
}
