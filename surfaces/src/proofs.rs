//! Files and words that say who somebody is: password files, tokens and the keys for them.

use std::sync::LazyLock;

use chat_protocol::UserId;
use chat_service::auth::passwords::PasswordFile;
use chat_service::auth::tokens::{Claims, Tokens};

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

/// A secret that no test data is signed with.
const SECRET: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY-not-in-any-corpus";

static KEYS: LazyLock<Tokens> = LazyLock::new(|| read_keys(SECRET.as_bytes()).expect("a secret is a key"));

fn read_keys(bytes: &[u8]) -> Result<Tokens, String> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), bytes).expect("it can be written");
    Tokens::read(file.path(), Claims::default()).map_err(|error| error.to_string())
}

/// Bytes as a token, and as a file of keys: neither is taken for what it is not.
pub(crate) fn tokens(data: &[u8]) {
    Tokens::is_token(data);
    if let Ok(proof) = KEYS.check(data) {
        panic!("{proof:?} is proved by what nobody signed");
    }
    if let Err(reason) = read_keys(data) {
        assert!(!reason.is_empty(), "refused without a reason");
    }
}
