//! Keys that are fetched: a set of public keys by URL, again and again, so that whoever signs tokens can change theirs.
//!
//! What a token says never decides what is fetched or from where, only that it may be time to: at most so often. A set that came takes the place
//! of the last one, also if it has no key that can be used: whoever signs tokens has taken them back. When a fetch fails the last one stays.

use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, StatusCode, Uri};
use tokio::time::Instant;

use super::Auth;
use super::tokens::Keys;
use crate::metrics::Metrics;
use crate::outgoing::{self, HttpClient, causes};
use crate::webhooks::Pace;

/// Time for one fetch, from the first byte to the last.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest set, in bytes.
const SET_BYTES_MAX: usize = 1024 * 1024;
/// A token that names an unknown key makes it fetch early, so long after the last attempt at the earliest.
const EARLY_INTERVAL: Duration = Duration::from_secs(30);

/// Where keys are: `https://…`, or `http://…` on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyUrl(Uri);

impl FromStr for KeyUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let example = "such as https://id.example.com/keys.json";
        let uri: Uri = url.parse().map_err(|error| format!("it is no URL ({error}); write one {example}"))?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(format!("it does not begin with https:// and a host; write a URL {example}"));
        };
        if authority.as_str().contains('@') {
            return Err("it names a user: public keys need none".to_owned());
        }
        match scheme {
            "https" => Ok(Self(uri)),
            "http" if is_this_machine(authority.host()) => Ok(Self(uri)),
            "http" => Err("over http anybody on the way could put keys of their own: use https".to_owned()),
            _ => Err(format!("it does not begin with https://; write a URL {example}")),
        }
    }
}

impl fmt::Display for KeyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn is_this_machine(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.to_canonical().is_loopback())
}

/// Fetches a set of keys.
pub struct KeyFetch {
    url: Uri,
    client: HttpClient,
    refresh: Duration,
}

impl KeyFetch {
    /// # Errors
    /// The certificates of the system cannot be read, and the URL needs them.
    pub fn new(url: &KeyUrl, refresh: Duration) -> std::io::Result<Self> {
        Ok(Self { client: outgoing::client(&url.0)?, url: url.0.clone(), refresh })
    }

    /// For the log: without the query, which may be a secret.
    fn shown(&self) -> String {
        let (scheme, authority) = (self.url.scheme_str().unwrap_or_default(), self.url.authority());
        format!("{scheme}://{}{}", authority.map_or("", |authority| authority.as_str()), self.url.path())
    }

    async fn fetch(&self) -> Result<Keys, String> {
        let request = Request::get(self.url.clone())
            .header("accept", "application/jwk-set+json, application/json")
            .header("user-agent", outgoing::USER_AGENT)
            .body(Full::<Bytes>::default())
            .map_err(|error| error.to_string())?;
        let answer = self.client.request(request).await.map_err(|error| causes(&error))?;
        if answer.status() != StatusCode::OK {
            return Err(format!("the answer was {}", answer.status()));
        }
        let body = Limited::new(answer.into_body(), SET_BYTES_MAX).collect().await;
        let body = body.map_err(|error| format!("the answer's body: {error}"))?.to_bytes();
        Keys::parse_public_set(std::str::from_utf8(&body).map_err(|_| "the answer is not UTF-8".to_owned())?)
    }

    /// Fetches until `stop`. `changed` is called after other keys were taken.
    pub async fn run(self, auth: Arc<Auth>, metrics: Arc<Metrics>, changed: impl Fn(), stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        let mut failures = 0;
        loop {
            let fetched = tokio::select! {
                () = &mut stop => return,
                fetched = tokio::time::timeout(FETCH_TIMEOUT, self.fetch()) => fetched,
            };
            metrics.jwt_key_fetches.inc();
            let wait = match fetched.unwrap_or_else(|_| Err(format!("no answer within {} s", FETCH_TIMEOUT.as_secs())))
            {
                Ok(keys) => {
                    failures = 0;
                    let is_empty = keys.is_empty();
                    if auth.take_keys(keys) {
                        if is_empty {
                            let url = self.shown();
                            tracing::error!(
                                url,
                                "auth.jwt_key_url: the set has no public key for RS256, ES256 or EdDSA; what other keys have signed is not taken any more"
                            );
                        } else {
                            tracing::info!("fetched the keys that sign tokens");
                        }
                        changed();
                    }
                    self.refresh
                }
                Err(reason) => {
                    failures += 1;
                    metrics.jwt_key_fetch_failures.inc();
                    let wait = Pace::USUAL.back_off(failures);
                    let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                    tracing::warn!(
                        url = self.shown(),
                        ?reason,
                        wait_ms,
                        "auth.jwt_key_url: no keys; those from before stay"
                    );
                    wait
                }
            };
            let earliest = Instant::now() + EARLY_INTERVAL;
            let wanted = async {
                auth.keys_wanted().await;
                tokio::time::sleep_until(earliest).await;
            };
            tokio::select! {
                () = &mut stop => return,
                () = tokio::time::sleep(wait) => {}
                () = wanted => {}
            }
        }
    }
}
