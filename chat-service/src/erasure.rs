//! Erasure: what an unsent text said is overwritten on the disk too.
//!
//! The log erases the words with the commit of the unsend; what is left of them in free room of its file goes here, now and then, because it
//! takes a look at the whole file.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::log::RedbLog;

/// Overwrites at the start, and then every so often, until `shutdown`.
pub async fn run(log: Arc<RedbLog>, interval: Duration, shutdown: impl Future<Output = ()>) {
    let erasing = async {
        let mut interval = tokio::time::interval(interval);
        loop {
            interval.tick().await;
            match log.shred().await {
                Ok(0) => {}
                Ok(texts) => tracing::info!(texts, "overwrote what unsent texts said"),
                Err(error) => tracing::warn!(%error, "what unsent texts said is still on the disk: trying again later"),
            }
        }
    };
    tokio::select! {
        () = shutdown => {}
        () = erasing => {}
    }
}
