//! One attempt to post: signed as [Standard Webhooks](https://www.standardwebhooks.com) say, and judged by its status.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, Uri};
use sha2::Sha256;

use super::{Post, now_ms};
use crate::outgoing::{self, HttpClient, causes};

/// A shorter secret is guessed too easily.
pub const SECRET_BYTES_MIN: usize = 16;
/// So much of an answer's body is read, and for so long, to use the connection again; nobody looks at it.
const BODY_TIMEOUT: Duration = Duration::from_millis(500);
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Base64 follows.
const SECRET_PREFIX: &str = "whsec_";

/// Where posts go: `http://…` or `https://…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookUrl(Uri);

impl FromStr for WebhookUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let example = "such as https://example.com/hooks/chat";
        let uri: Uri = url.parse().map_err(|error| format!("it is no URL ({error}); write one {example}"))?;
        match (uri.scheme_str(), uri.authority()) {
            (Some("http" | "https"), Some(authority)) if authority.as_str().contains('@') => {
                Err("it names a user: what proves that a post comes from here is its signature".to_owned())
            }
            (Some("http" | "https"), Some(_)) => Ok(Self(uri)),
            _ => Err(format!("it does not begin with http:// or https:// and a host; write a URL {example}")),
        }
    }
}

impl fmt::Display for WebhookUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What signatures are made with. Never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Bytes of it.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromStr for Secret {
    type Err = String;

    fn from_str(secret: &str) -> Result<Self, String> {
        match secret.strip_prefix(SECRET_PREFIX) {
            Some(encoded) => {
                BASE64.decode(encoded).map(Self).map_err(|_| format!("what follows {SECRET_PREFIX} is not base64"))
            }
            None => Ok(Self(secret.as_bytes().to_vec())),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "no secret" } else { "a secret" })
    }
}

/// The `webhook-signature` of a post.
fn signature(secret: &Secret, id: &str, timestamp_s: u64, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(&secret.0).expect("a key of any length will do");
    for part in [id.as_bytes(), b".", timestamp_s.to_string().as_bytes(), b".", body] {
        mac.update(part);
    }
    format!("v1,{}", BASE64.encode(mac.finalize().into_bytes()))
}

/// Posts to one URL.
pub struct Poster {
    client: HttpClient,
    url: Uri,
    secret: Secret,
    timeout: Duration,
}

impl Poster {
    /// # Errors
    /// The certificates of the system cannot be read, and the URL needs them.
    pub fn new(url: &WebhookUrl, secret: &Secret, timeout: Duration) -> std::io::Result<Self> {
        let client = outgoing::client(&url.0)?;
        Ok(Self { client, url: url.0.clone(), secret: secret.clone(), timeout })
    }

    async fn attempt(&self, id: &str, body: Bytes) -> Result<(), String> {
        let timestamp_s = now_ms() / 1_000;
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.url.clone())
            .header("content-type", "application/json")
            .header("user-agent", outgoing::USER_AGENT)
            .header("webhook-id", id)
            .header("webhook-timestamp", timestamp_s)
            .header("webhook-signature", signature(&self.secret, id, timestamp_s, &body))
            .body(Full::new(body))
            .map_err(|error| error.to_string())?;
        let answer = match tokio::time::timeout(self.timeout, self.client.request(request)).await {
            Ok(answer) => answer.map_err(|error| causes(&error))?,
            Err(_) => return Err(format!("no answer within {} ms", self.timeout.as_millis())),
        };
        let status = answer.status();
        // The status has said it all; a body that cannot be read costs a new connection and nothing else.
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect();
        drop(tokio::time::timeout(BODY_TIMEOUT, body).await);
        match status {
            status if status.is_success() => Ok(()),
            // The receiver does not want this one, now or ever.
            StatusCode::GONE => Ok(()),
            status => Err(format!("the answer was {status}")),
        }
    }
}

impl Post for Poster {
    async fn post(&self, id: String, body: Bytes) -> Result<(), String> {
        self.attempt(&id, body).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_that_of_other_implementations() {
        // Computed with Python's hmac module.
        let secret: Secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse().expect("base64");
        let signed = signature(&secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        let plain: Secret = "correct horse battery staple".parse().expect("any text");
        assert_eq!(plain.len(), 28);
    }

    #[test]
    fn urls_are_judged() {
        for good in ["http://127.0.0.1:8081/hook", "https://example.com/a?b=c"] {
            assert_eq!(good.parse::<WebhookUrl>().expect("a URL").to_string(), good);
        }
        for bad in ["", "example.com", "/hook", "ftp://example.com", "http://user:pw@example.com/", "http://", "a b"] {
            assert!(bad.parse::<WebhookUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_secret_is_not_shown() {
        let secret: Secret = "correct horse battery staple".parse().expect("any text");
        assert!(!format!("{secret:?}").contains("horse"));
        assert!("whsec_?".parse::<Secret>().is_err_and(|error| !error.contains('?')));
    }
}
