//! Two who talk at a fixed rate and have nothing to do with what happens to others.
//!
//! They have a thread of their own: what the generator does for the others must not count as the broker's delay.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::measure::Latencies;
use crate::mqtt::{self, Packet, Session};
use crate::outgoing::Outgoing;
use crate::pacer::Pacer;
use crate::target::{Run, Target};
use crate::verify::{Faults, Judged, Message, Received, Seqs, Stamp};

/// How long the last messages may take.
const DRAIN: Duration = Duration::from_secs(30);
/// No event is so far away that its end is not seen in time.
const LOOK: Duration = Duration::from_millis(50);

/// What they have seen.
pub(crate) struct Seen {
    /// Latencies of what was due before a storm, and since it began.
    pub(crate) calm: Latencies,
    pub(crate) stormy: Latencies,
    pub(crate) faults: Faults,
}

struct Signals {
    /// When a storm began, in microseconds; none yet if 0.
    storm_since_us: AtomicU64,
    ends: AtomicBool,
}

/// The two, as the rest sees them.
pub(crate) struct Innocent {
    signals: Arc<Signals>,
    thread: JoinHandle<Result<Seen>>,
}

impl Innocent {
    /// They begin; connections are numbered from `nth`, and times count from `began`.
    pub(crate) fn start(target: &Target, run: &Run, nth: u32, began: Instant, rate: f64) -> Result<Self> {
        let signals = Arc::new(Signals { storm_since_us: AtomicU64::new(0), ends: AtomicBool::new(false) });
        let (target, run, shared) = (target.clone(), run.clone(), Arc::clone(&signals));
        let thread = std::thread::Builder::new().name("innocent".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(talk(&target, &run, nth, began, rate, &shared))
        })?;
        Ok(Self { signals, thread })
    }

    pub(crate) fn storm_begins(&self, at_us: u64) {
        self.signals.storm_since_us.store(at_us, Ordering::Relaxed);
    }

    /// An error if their connection was not left alone.
    pub(crate) async fn end(self) -> Result<Seen> {
        self.signals.ends.store(true, Ordering::Relaxed);
        let ended = tokio::task::spawn_blocking(move || self.thread.join()).await?;
        ended.map_err(|_| anyhow!("their thread panicked"))?.context("two who have nothing to do with it")
    }
}

async fn talk(target: &Target, run: &Run, nth: u32, began: Instant, rate: f64, signals: &Signals) -> Result<Seen> {
    let dialer = target.dialer()?;
    let (from, to) = (run.name("teller", nth), run.name("innocent", nth));
    let (mut receiver, _) = target.receiver(&dialer, nth, &to, Session::Clean).await?;
    let mut sender = target.sender(&dialer, nth + 1, &from).await?;
    let topic = target.topic(&from, &to);
    let mut pacer = Pacer::new(began, rate)?;
    let mut outgoing = Outgoing::new(u16::MAX);
    let mut received = Received::new(Seqs::Consecutive);
    let mut seen = Seen { calm: Latencies::new()?, stormy: Latencies::new()?, faults: Faults::default() };
    let (mut sent, mut text, mut ends_by) = (0, Vec::new(), None);
    loop {
        let due = tokio::select! {
            due_us = pacer.due_us(), if ends_by.is_none() => Some(due_us?),
            polled = std::future::poll_fn(|cx| {
                let acknowledged = sender.poll_receive(cx, |packet, _| {
                    if let Packet::Puback { packet_id } = packet && outgoing.acknowledged(packet_id).is_none() {
                        seen.faults.stray_acknowledgements += 1;
                    }
                    Ok(())
                });
                let delivered = receiver.poll_receive(cx, |packet, out| {
                    let Packet::Publish { qos, again, packet_id, payload, .. } = packet else { return Ok(()) };
                    if qos > 0 {
                        mqtt::puback(out, packet_id);
                    }
                    match Message::read(payload, target.payload) {
                        Err(_) => seen.faults.unreadable += 1,
                        Ok(message) if message.stamp.stream != nth => seen.faults.strays += 1,
                        Ok(message) => {
                            if let Judged::New(stamp) = received.take(&message, again, &mut seen.faults) {
                                let now_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                                let since_us = signals.storm_since_us.load(Ordering::Relaxed);
                                let is_since = since_us > 0 && stamp.due_us >= since_us;
                                let latencies = if is_since { &mut seen.stormy } else { &mut seen.calm };
                                latencies.record(now_us.saturating_sub(stamp.due_us));
                            }
                        }
                    }
                    Ok(())
                });
                sender.poll_flush(cx)?;
                receiver.poll_flush(cx)?;
                match (acknowledged, delivered) {
                    (Poll::Ready(Err(error)), _) | (_, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
                    (Poll::Pending, Poll::Pending) => Poll::Pending,
                    _ => Poll::Ready(Ok(())),
                }
            }) => {
                polled?;
                None
            }
            () = tokio::time::sleep(LOOK) => None,
        };
        // What finds no packet identifier is not sent, and not missed: 65,535 are under way.
        if let Some((due_us, packet_id)) = due.and_then(|due_us| Some((due_us, outgoing.begin(due_us)?))) {
            sent += 1;
            Stamp { stream: nth, counter: sent, due_us }.write(&mut text, target.bytes);
            mqtt::publish(&mut sender.out, target.version, &topic, packet_id, &text)?;
            sender.flush()?;
        }
        if signals.ends.load(Ordering::Relaxed) {
            let by = *ends_by.get_or_insert_with(|| Instant::now() + DRAIN);
            let is_drained = received.last() == sent && outgoing.under_way() == 0;
            if is_drained || Instant::now() >= by {
                break;
            }
        }
    }
    seen.faults.lost += sent - received.last();
    seen.faults.unacknowledged += outgoing.under_way() as u64;
    Ok(seen)
}
