//! Many clients: connecting them, so many at a time.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::task::JoinSet;

use crate::progress::Progress;

/// How long one client may take to connect.
const PATIENCE: Duration = Duration::from_secs(60);

/// Opens so many, at most `at_once` at a time; they are returned in order.
pub(crate) async fn open<T: 'static, F: Future<Output = Result<T>> + 'static>(
    what: &'static str,
    count: u32,
    at_once: usize,
    one: impl Fn(u32) -> F,
) -> Result<Vec<T>> {
    let progress = Progress::count(what, u64::from(count));
    let mut opened: Vec<Option<T>> = (0..count).map(|_| None).collect();
    let mut opening: JoinSet<Result<(u32, T)>> = JoinSet::new();
    let mut done = 0;
    for nth in 0..count {
        if opening.len() >= at_once.max(1) {
            keep(&mut opening, &mut opened).await?;
            done += 1;
            progress.set(done);
        }
        let one = one(nth);
        opening.spawn_local(async move {
            let opened = tokio::time::timeout(PATIENCE, one).await;
            let opened = opened.with_context(|| format!("client {nth} waits for {PATIENCE:?} to be let in"))?;
            Ok((nth, opened.with_context(|| format!("client {nth}"))?))
        });
    }
    while !opening.is_empty() {
        keep(&mut opening, &mut opened).await?;
    }
    Ok(opened.into_iter().flatten().collect())
}

async fn keep<T: 'static>(opening: &mut JoinSet<Result<(u32, T)>>, opened: &mut [Option<T>]) -> Result<()> {
    let (nth, one) = opening.join_next().await.context("nothing connects")???;
    opened[usize::try_from(nth)?] = Some(one);
    Ok(())
}
