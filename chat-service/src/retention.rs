//! Retention: messages older than so many days leave the log.
//!
//! A task looks once a minute, and removes in small steps with pauses as long as the steps, so that it never has more than half of the log's
//! time. It may run late, and is never early.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use chat_protocol::Timestamp;

use crate::log::Log;
use crate::metrics::Metrics;

/// From one look to the next.
const INTERVAL: Duration = Duration::from_mins(1);

/// Removes what is older than `age`, now and then, until `shutdown`.
pub async fn run<L: Log>(log: Arc<L>, metrics: Arc<Metrics>, age: Duration, shutdown: impl Future<Output = ()>) {
    let removing = async {
        let mut interval = tokio::time::interval(INTERVAL);
        loop {
            interval.tick().await;
            remove_older(&*log, &metrics, age).await;
        }
    };
    tokio::select! {
        () = shutdown => {}
        () = removing => {}
    }
}

async fn remove_older<L: Log>(log: &L, metrics: &Metrics, age: Duration) {
    let mut all = 0;
    loop {
        let began = Instant::now();
        match log.remove_before(so_long_ago(age)).await {
            Ok(0) => break,
            Ok(removed) => {
                all += removed;
                metrics.messages_removed.inc_by(removed);
                tokio::time::sleep(began.elapsed()).await;
            }
            Err(error) => {
                tracing::warn!(%error, "old messages could not be removed: trying again in a minute");
                break;
            }
        }
    }
    if all > 0 {
        tracing::info!(messages = all, "removed messages older than storage.retention_days");
    }
}

fn so_long_ago(age: Duration) -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_ms(u64::try_from(since.saturating_sub(age).as_millis()).unwrap_or(u64::MAX))
}
