//! Whoever takes webhooks: an HTTP server that answers as a test wants, and remembers what it was sent.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::Value;
use sha2::Sha256;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::chatd::Options;
use crate::contract;
use crate::wait::PATIENCE;

/// What posts are signed with.
const SECRET: &str = "correct horse battery staple";

/// Events that may wait for the test.
const EVENTS_MAX: usize = 10_000;

/// A post that was answered with 200.
#[derive(Clone, Debug)]
pub struct Event {
    pub id: String,
    pub body: Value,
}

impl Event {
    /// `type`.
    pub fn kind(&self) -> &str {
        self.body["type"].as_str().expect("a type")
    }

    /// A member of the envelope, as a number.
    pub fn seq(&self) -> u64 {
        self.body["data"]["seq"].as_u64().expect("a seq")
    }
}

/// What to do with a post: given how many times this event has come, from 1.
pub type Answer = dyn Fn(u32) -> Reply + Send + Sync;

/// An answer to a post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    Status(u16),
    /// None, for as long as the sender waits.
    Nothing,
    /// 200, and a body that never ends.
    Endless,
}

struct Shared {
    answer: Box<Answer>,
    attempts: parking_lot::Mutex<BTreeMap<String, u32>>,
    events: mpsc::Sender<Result<Event>>,
}

/// A running receiver. Ends when dropped.
pub struct Receiver {
    address: SocketAddr,
    shared: Arc<Shared>,
    events: mpsc::Receiver<Result<Event>>,
    serving: JoinHandle<()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Receiver {
    /// On a free port.
    pub async fn start(answer: impl Fn(u32) -> Reply + Send + Sync + 'static) -> Result<Self> {
        let (events, received) = mpsc::channel(EVENTS_MAX);
        let shared = Arc::new(Shared { answer: Box::new(answer), attempts: Default::default(), events });
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let routes = Router::new().route("/hook", post(take)).with_state(Arc::clone(&shared));
        let serving = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                eprintln!("the receiver ended: {error}");
            }
        });
        Ok(Self { address, shared, events: received, serving })
    }

    /// A chatd that posts here.
    pub fn options(&self, events: &str) -> Options {
        Options::default()
            .set("webhooks.url", format!("http://{}/hook", self.address))
            .set("webhooks.secret", SECRET)
            .set("webhooks.events", events)
            .set("webhooks.timeout_ms", 1_000)
    }

    /// The next event that was taken.
    pub async fn event(&mut self) -> Result<Event> {
        timeout(PATIENCE, self.events.recv()).await.context("no webhook came")?.context("the receiver ended")?
    }

    /// So many of them.
    pub async fn events(&mut self, n: usize) -> Result<Vec<Event>> {
        let mut events = Vec::with_capacity(n);
        while events.len() < n {
            events.push(self.event().await?);
        }
        Ok(events)
    }

    /// Posts so far, also those that were refused.
    pub fn attempts(&self) -> u32 {
        self.shared.attempts.lock().values().sum()
    }
}

async fn take(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    let event = checked(&headers, &body);
    let id = event.as_ref().map_or(String::new(), |event| event.id.clone());
    let attempt = {
        let mut attempts = shared.attempts.lock();
        let attempt = attempts.entry(id).or_default();
        *attempt += 1;
        *attempt
    };
    let reply = (shared.answer)(attempt);
    let status = match reply {
        Reply::Nothing => std::future::pending().await,
        Reply::Endless => StatusCode::OK,
        Reply::Status(status) => StatusCode::from_u16(status).expect("a status"),
    };
    if status.is_success() || event.is_err() {
        // Nobody may be left who asks.
        drop(shared.events.send(event).await);
    }
    match reply {
        Reply::Endless => Body::from_stream(futures_util::stream::pending::<std::io::Result<Bytes>>()).into_response(),
        Reply::Status(_) | Reply::Nothing => status.into_response(),
    }
}

/// A post whose headers are right.
fn checked(headers: &HeaderMap, body: &[u8]) -> Result<Event> {
    let header = |name: &str| -> Result<&str> { Ok(headers.get(name).context(name.to_owned())?.to_str()?) };
    ensure!(header("content-type")? == "application/json");
    let (id, timestamp) = (header("webhook-id")?, header("webhook-timestamp")?);
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    ensure!(timestamp.parse::<u64>()?.abs_diff(now) < 60, "{timestamp} is not now");
    let mut mac = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes())?;
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(body);
    let signature = format!("v1,{}", BASE64.encode(mac.finalize().into_bytes()));
    ensure!(header("webhook-signature")? == signature, "the signature is wrong");
    let body: Value = serde_json::from_slice(body)?;
    contract::check(&format!("webhook-{}", body["type"].as_str().context("a type")?), &body)?;
    Ok(Event { id: id.to_owned(), body })
}
