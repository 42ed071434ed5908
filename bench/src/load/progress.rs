//! How far a run is, on standard error, if somebody sits before it.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// A bar that is gone when it is dropped.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// So many of something.
    pub(crate) fn count(what: &'static str, length: u64) -> Self {
        Self::new(what, length, "{msg:24} {wide_bar} {pos}/{len}")
    }

    fn new(what: &'static str, length: u64, template: &str) -> Self {
        // Draws nothing where standard error is no terminal.
        let bar = ProgressBar::new(length).with_message(what);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self(bar)
    }

    pub(crate) fn set(&self, position: u64) {
        self.0.set_position(position);
    }

    /// Waits, and shows how much of it is over.
    pub(crate) async fn wait(what: &'static str, time: Duration) {
        let began = Instant::now();
        let length = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let progress = Self::new(what, length, "{msg:24} {wide_bar} {elapsed}");
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        while began.elapsed() < time {
            let rest = time.saturating_sub(began.elapsed());
            tokio::select! {
                _ = ticks.tick() => {}
                () = tokio::time::sleep(rest) => {}
            }
            progress.set(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
