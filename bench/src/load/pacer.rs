//! Messages that are due at fixed times, whatever the broker does.
//!
//! The runtime's own timers are a millisecond coarse: this one is the kernel's.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const MESSAGES_AT_ONCE: u64 = 32;

/// One who waits until a time, to some microseconds.
pub(crate) struct Alarm {
    timer: AsyncFd<OwnedFd>,
    began: Instant,
}

impl Alarm {
    /// Times count from `began`.
    pub(crate) fn new(began: Instant) -> Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        #[expect(
            deprecated,
            reason = "what replaces it is unsafe code; this descriptor is ours alone for as long as it is registered"
        )]
        let timer = AsyncFd::with_interest(timer, Interest::READABLE)?;
        Ok(Self { timer, began })
    }

    pub(crate) async fn at_us(&self, at_us: u64) -> Result<()> {
        loop {
            let remaining = Duration::from_micros(at_us).saturating_sub(self.began.elapsed());
            if remaining.is_zero() {
                return Ok(());
            }
            let value =
                Timespec { tv_sec: i64::try_from(remaining.as_secs())?, tv_nsec: i64::from(remaining.subsec_nanos()) };
            let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
            let timer = Itimerspec { it_interval: zero, it_value: value };
            rustix::time::timerfd_settime(self.timer.get_ref(), TimerfdTimerFlags::empty(), &timer)?;
            let mut expired = self.timer.readable().await?;
            let mut count = [0; 8];
            // Nothing to read: it was told of an earlier time. The error clears what was told.
            drop(expired.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut count)?)));
        }
    }
}

pub(crate) struct Pacer {
    alarm: Alarm,
    interval_us: f64,
    /// The message that is due next, from 0.
    next: u64,
}

impl Pacer {
    /// So many a second, evenly, from now on. Times count from `began`.
    pub(crate) fn new(began: Instant, per_s: f64) -> Result<Self> {
        ensure!(per_s > 0.0 && per_s <= 1e6, "a rate is more than 0 and at most 1,000,000 messages a second");
        let interval_us = 1e6 / per_s;
        let next = whole((micros(began.elapsed()) / interval_us).ceil());
        Ok(Self { alarm: Alarm::new(began)?, interval_us, next })
    }

    /// Waits until a message is due; when it was, in microseconds. Whoever no longer waits for it misses none.
    pub(crate) async fn due_us(&mut self) -> Result<u64> {
        // Whoever is behind lets others read what has come meanwhile.
        if self.next.is_multiple_of(MESSAGES_AT_ONCE) {
            tokio::task::yield_now().await;
        }
        let due_us = whole(self.next as f64 * self.interval_us);
        self.alarm.at_us(due_us).await?;
        self.next += 1;
        Ok(due_us)
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Microseconds, without their fraction.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a time in a run is far from the limits")]
fn whole(us: f64) -> u64 {
    us as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_are_due_evenly_and_never_early() {
        let began = Instant::now();
        let mut pacer = Pacer::new(began, 10_000.0).unwrap();
        let first = pacer.due_us().await.unwrap();
        for nth in 1..200 {
            assert_eq!(pacer.due_us().await.unwrap(), first + nth * 100);
            assert!(micros(began.elapsed()) >= (first + nth * 100) as f64);
        }
        assert!(Pacer::new(began, 0.0).is_err());
    }
}
