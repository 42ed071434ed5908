//! Waiting for what has to happen.

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

/// How long a thing may take that takes milliseconds on an idle machine. Tests run side by side, on as little as two cores.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How often a predicate is asked.
const POLL_INTERVAL: Duration = Duration::from_millis(15);

/// Asks until the answer is yes; panics after the deadline, saying what did not happen.
pub async fn eventually<F, A>(what: &str, deadline: Duration, mut predicate: F)
where
    F: FnMut() -> A,
    A: Future<Output = bool>,
{
    let end = Instant::now() + deadline;
    while !predicate().await {
        assert!(Instant::now() < end, "did not happen within {deadline:?}: {what}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
