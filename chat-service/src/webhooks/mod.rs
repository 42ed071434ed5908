//! Webhooks: what happens in the chat, posted to a URL.
//!
//! Stored messages are read from the log, each kind of event from a durable place of its own, so nothing that happens to the receiver or
//! to chatd loses one, and nothing that is slow there slows a sender here. Who is there is in no log: it is posted as long as chatd
//! runs, and every start says that it began anew.

mod feed;
mod post;
mod presence;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chat_protocol::UserId;
use tokio::sync::watch;

pub use self::post::{Poster, SECRET_BYTES_MIN, Secret, WebhookUrl};
pub use self::presence::PresenceFeed;
use crate::log::{Log, Position};
use crate::metrics::Metrics;
use crate::settings::{WebhookEvent, WebhookSettings};

/// Posts under way at a time, for each kind of event.
const IN_FLIGHT_MAX: usize = 16;
/// After so many failures in a row posts are tried one at a time, until one succeeds.
const FAILURES_MAX: u32 = 16;

/// What takes a post. One attempt: `Err` says why it has to be tried again.
pub trait Post: Send + Sync + 'static {
    fn post(&self, id: String, body: bytes::Bytes) -> impl Future<Output = Result<(), String>> + Send;
}

/// All feeds of a server, before they run.
pub struct Webhooks<L> {
    feeds: Vec<feed::Feed<L, Poster>>,
    presence: Option<(Arc<PresenceFeed>, Arc<Poster>)>,
    metrics: Arc<Metrics>,
}

impl<L: Log> Webhooks<L> {
    /// `is_connected`: whether a device of the user is there.
    ///
    /// # Errors
    /// The certificates of the system cannot be read, and the URL needs them.
    pub fn new(
        settings: &WebhookSettings,
        log: &Arc<L>,
        metrics: &Arc<Metrics>,
        is_connected: impl Fn(&UserId) -> bool + Send + Sync + Clone + 'static,
    ) -> std::io::Result<Self> {
        let mut webhooks = Self { feeds: Vec::new(), presence: None, metrics: Arc::clone(metrics) };
        let Some(url) = &settings.url else { return Ok(webhooks) };
        let poster = Arc::new(Poster::new(url, &settings.secret, settings.timeout)?);
        for event in &settings.events {
            let of = match event {
                WebhookEvent::MessageStored => feed::Of::Stored,
                WebhookEvent::MessageWaiting => feed::Of::Waiting,
                WebhookEvent::Presence => {
                    let presence = Arc::new(PresenceFeed::new(log.identity(), now_ms(), Pace::USUAL));
                    webhooks.presence = Some((presence, Arc::clone(&poster)));
                    continue;
                }
            };
            webhooks.feeds.push(feed::Feed {
                of,
                log: Arc::clone(log),
                poster: Arc::clone(&poster),
                is_connected: Box::new(is_connected.clone()),
                metrics: Arc::clone(metrics),
                pace: Pace::USUAL,
            });
        }
        Ok(webhooks)
    }

    /// Where presence is told, if it is posted.
    pub fn presence(&self) -> Option<Arc<PresenceFeed>> {
        self.presence.as_ref().map(|(presence, _)| Arc::clone(presence))
    }

    /// Posts until `stop`. `committed` says how far the log goes.
    pub fn start(self, log: &Arc<L>, committed: &watch::Receiver<Position>, stop: &watch::Sender<bool>) {
        let on: Vec<feed::Of> = self.feeds.iter().map(|feed| feed.of).collect();
        for of in feed::Of::ALL.into_iter().filter(|of| !on.contains(of)) {
            let log = Arc::clone(log);
            drop(tokio::spawn(async move { feed::forget(&*log, of).await }));
        }
        for feed in self.feeds {
            let stopped = stopped(stop.subscribe());
            drop(tokio::spawn(feed.run(committed.clone(), stopped)));
        }
        if let Some((presence, poster)) = self.presence {
            let stopped = stopped(stop.subscribe());
            drop(tokio::spawn(presence.run(poster, self.metrics, stopped)));
        }
    }
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    drop(stop.wait_for(|set| *set).await);
}

/// How fast things are tried again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// The first wait after a failure.
    first_wait: Duration,
    /// How often something is looked at that may change by itself.
    look_interval: Duration,
}

impl Pace {
    pub(crate) const USUAL: Self = Self { first_wait: Duration::from_secs(1), look_interval: Duration::from_secs(1) };

    /// How long to wait after so many failures: doubling to 60 times the first wait, of which a random part of a half is left out.
    pub(crate) fn back_off(self, failures: u32) -> Duration {
        let times = (1_u32 << failures.clamp(1, 7).saturating_sub(1)).min(60);
        (self.first_wait * times).mul_f64(1.0 - fastrand::f64() / 2.0)
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_a_minute() {
        for (failures, longest_s) in [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (8, 60), (u32::MAX, 60)] {
            let longest = Duration::from_secs(longest_s);
            for _ in 0..50 {
                let wait = Pace::USUAL.back_off(failures);
                assert!(wait <= longest && wait >= longest / 2, "{failures}: {wait:?}");
            }
        }
    }
}
