//! Pairs of a sender and a receiver: how many messages a second a broker takes, delivers and has acknowledged, and how long each takes.
//!
//! Closed: each pair keeps so many messages under way, and sends the next when one was acknowledged to the sender and delivered. Open:
//! messages are due at fixed times, whatever the broker does, and a latency counts from when its message was due.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::task::{JoinSet, LocalSet};

use crate::client::Client;
use crate::mqtt::{self, Packet, Version};
use crate::process;
use crate::verify::{Faults, Payload, Received, STAMP_BYTES, Stamp};

/// How long what is under way may take to arrive once nothing more is sent.
const DRAIN: Duration = Duration::from_secs(30);
/// Clients that connect at once.
const CONNECTING: usize = 50;

/// Measures pairs of a sender and a receiver.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Address of the broker.
    #[arg(long, default_value = "127.0.0.1:1883")]
    addr: SocketAddr,
    #[arg(long, default_value_t = 500)]
    pairs: u32,
    /// Messages under way in a pair.
    #[arg(long, default_value_t = 16)]
    window: u64,
    /// Messages a second over all pairs, due at fixed times; without it as many as the window allows.
    #[arg(long)]
    rate: Option<f64>,
    /// Bytes of a text.
    #[arg(long, default_value_t = 128)]
    bytes: usize,
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    #[arg(long, default_value_t = 2)]
    warmup_seconds: u64,
    /// MQTT version, 4 (for 3.1.1) or 5.
    #[arg(long, default_value = "4")]
    version: Version,
    /// What senders publish to.
    #[arg(long, default_value = "chat/{from}/out/{to}")]
    send_topic: String,
    /// What receivers subscribe to.
    #[arg(long, default_value = "chat/{to}/inbox")]
    receive_filter: String,
    /// What receivers are handed.
    #[arg(long, value_enum, default_value_t = Payload::Envelope)]
    payload: Payload,
    /// The broker's process, for its processor time and memory.
    #[arg(long)]
    pid: Option<u32>,
    /// What the result is called.
    #[arg(long, default_value = "pairs")]
    label: String,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Latency {
    p50_us: u64,
    p90_us: u64,
    p99_us: u64,
    p999_us: u64,
    max_us: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    label: String,
    pairs: u32,
    window: u64,
    rate: Option<f64>,
    bytes: usize,
    seconds: f64,
    acknowledged_per_s: f64,
    delivered_per_s: f64,
    publish_to_puback: Latency,
    publish_to_delivery: Latency,
    broker_cpu_us_per_message: Option<f64>,
    broker_rss_mb: Option<f64>,
    generator_cpu_us_per_message: f64,
    faults: Faults,
}

/// What all pairs add to.
struct Shared {
    began: Instant,
    sending: Cell<bool>,
    measuring: Cell<bool>,
    acknowledged: Cell<u64>,
    delivered: Cell<u64>,
    faults: RefCell<Faults>,
    to_puback: RefCell<Histogram<u64>>,
    to_delivery: RefCell<Histogram<u64>>,
}

impl Shared {
    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn count(&self, counter: &Cell<u64>, latencies: &RefCell<Histogram<u64>>, due_us: u64, now_us: u64) {
        if self.measuring.get() {
            counter.set(counter.get() + 1);
            // It grows with what it is given, and takes any number.
            latencies.borrow_mut().record(now_us.saturating_sub(due_us)).unwrap_or(());
        }
    }
}

pub(crate) async fn run(options: Options) -> Result<()> {
    ensure!(options.bytes >= STAMP_BYTES, "a text has at least {STAMP_BYTES} bytes: its number and its time");
    ensure!(options.pairs > 0 && options.window > 0 && options.window < 1 << 15, "pairs and window are positive");
    LocalSet::new().run_until(measure(options)).await
}

async fn measure(options: Options) -> Result<()> {
    let histogram = || Ok::<_, anyhow::Error>(RefCell::new(Histogram::new(3)?));
    let shared = Rc::new(Shared {
        began: Instant::now(),
        sending: Cell::new(true),
        measuring: Cell::new(false),
        acknowledged: Cell::new(0),
        delivered: Cell::new(0),
        faults: RefCell::default(),
        to_puback: histogram()?,
        to_delivery: histogram()?,
    });
    let options = Rc::new(options);
    let pairs = connect(&options).await?;
    let mut running = JoinSet::new();
    for pair in pairs {
        running.spawn_local(pair.run(Rc::clone(&options), Rc::clone(&shared)));
    }
    tokio::time::sleep(Duration::from_secs(options.warmup_seconds)).await;
    let cpu = |pid: Option<u32>| pid.map(process::cpu_seconds).transpose();
    let generator = std::process::id();
    let (broker_before, own_before) = (cpu(options.pid)?, process::cpu_seconds(generator)?);
    let began = Instant::now();
    shared.measuring.set(true);
    let stop = tokio::time::sleep(Duration::from_secs(options.seconds));
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            // Pairs end when sending does: before that, one has failed.
            Some(ended) = running.join_next() => ended??,
        }
    }
    shared.measuring.set(false);
    let seconds = began.elapsed().as_secs_f64();
    let (broker_after, own_after) = (cpu(options.pid)?, process::cpu_seconds(generator)?);
    let rss = options.pid.map(process::rss_bytes).transpose()?;
    shared.sending.set(false);
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    let delivered = shared.delivered.get() as f64;
    let report = Report {
        label: options.label.clone(),
        pairs: options.pairs,
        window: options.window,
        rate: options.rate,
        bytes: options.bytes,
        seconds,
        acknowledged_per_s: shared.acknowledged.get() as f64 / seconds,
        delivered_per_s: delivered / seconds,
        publish_to_puback: latency(&shared.to_puback.borrow()),
        publish_to_delivery: latency(&shared.to_delivery.borrow()),
        broker_cpu_us_per_message: broker_after
            .zip(broker_before)
            .map(|(after, before)| (after - before) * 1e6 / delivered),
        broker_rss_mb: rss.map(|bytes| bytes as f64 / 1e6),
        generator_cpu_us_per_message: (own_after - own_before) * 1e6 / delivered,
        faults: *shared.faults.borrow(),
    };
    print(&report, options.json)?;
    ensure!(report.faults.is_none(), "the broker broke its word: {:?}", report.faults);
    Ok(())
}

fn latency(latencies: &Histogram<u64>) -> Latency {
    Latency {
        p50_us: latencies.value_at_quantile(0.5),
        p90_us: latencies.value_at_quantile(0.9),
        p99_us: latencies.value_at_quantile(0.99),
        p999_us: latencies.value_at_quantile(0.999),
        max_us: latencies.max(),
    }
}

async fn connect(options: &Rc<Options>) -> Result<Vec<Pair>> {
    // Names of their own in every run: a store remembers.
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let run = format!("{:x}", since.as_millis());
    let mut pairs = Vec::new();
    let mut connecting = JoinSet::new();
    for nth in 0..options.pairs {
        if connecting.len() == CONNECTING {
            pairs.push(connecting.join_next().await.context("nothing connects")???);
        }
        let (from, to) = (format!("s{nth}-{run}"), format!("r{nth}-{run}"));
        let fill = |template: &str| template.replace("{from}", &from).replace("{to}", &to);
        let (topic, filter) = (fill(&options.send_topic), fill(&options.receive_filter));
        let options = Rc::clone(options);
        connecting.spawn_local(async move {
            let receiver = Client::open(options.addr, options.version, &to, Some(&filter)).await?;
            let sender = Client::open(options.addr, options.version, &from, None).await?;
            anyhow::Ok(Pair { nth, topic, sender, receiver })
        });
    }
    while let Some(pair) = connecting.join_next().await {
        pairs.push(pair??);
    }
    Ok(pairs)
}

struct Pair {
    nth: u32,
    topic: String,
    sender: Client,
    receiver: Client,
}

/// How far a pair is. Counters of messages.
#[derive(Default)]
struct Progress {
    sent: u64,
    acknowledged: u64,
    delivered: u64,
    /// When each message under way to its acknowledgement was due, by its number modulo the length.
    due_us: Vec<u64>,
}

impl Pair {
    async fn run(mut self, options: Rc<Options>, shared: Rc<Shared>) -> Result<()> {
        let mut progress = Progress { due_us: vec![0; 1 << 15], ..Progress::default() };
        let mut received = Received::default();
        let mut text = Vec::new();
        let interval_us = options.rate.map(|rate| f64::from(options.pairs) * 1e6 / rate);
        let first_us =
            shared.now_us() as f64 + interval_us.unwrap_or_default() * f64::from(self.nth) / f64::from(options.pairs);
        let mut drained_by: Option<tokio::time::Instant> = None;
        loop {
            let now_us = shared.now_us();
            let mut next_due_us = None;
            while shared.sending.get() {
                let under_way = progress.sent - progress.acknowledged.min(progress.delivered);
                let due_us = match interval_us {
                    None if under_way >= options.window => break,
                    None => now_us,
                    Some(interval_us) => {
                        let due_us = whole(first_us + interval_us * progress.sent as f64);
                        next_due_us = Some(due_us);
                        // An open rate has no window but that of packet identifiers.
                        if due_us > now_us || under_way >= 30_000 {
                            break;
                        }
                        due_us
                    }
                };
                progress.sent += 1;
                self.send(&options, &mut progress, due_us, &mut text)?;
            }
            self.sender.flush()?;
            self.receiver.flush()?;
            let done = progress.sent == progress.acknowledged && progress.sent == progress.delivered;
            if !shared.sending.get() {
                let by = *drained_by.get_or_insert_with(|| tokio::time::Instant::now() + DRAIN);
                if done || tokio::time::Instant::now() >= by {
                    break;
                }
            }
            let wake_us = match next_due_us {
                Some(due_us) => due_us.saturating_sub(now_us),
                None => 100_000,
            };
            tokio::select! {
                ready = self.sender.ready() => ready?,
                ready = self.receiver.ready() => ready?,
                () = tokio::time::sleep(Duration::from_micros(wake_us)) => {}
            }
            self.receive(&options, &shared, &mut progress, &mut received)?;
        }
        let mut faults = shared.faults.borrow_mut();
        faults.lost += progress.sent - progress.delivered;
        faults.unacknowledged += progress.sent - progress.acknowledged;
        drop(faults);
        self.sender.close()?;
        self.receiver.close()
    }

    fn send(&mut self, options: &Options, progress: &mut Progress, due_us: u64, text: &mut Vec<u8>) -> Result<()> {
        let slots = progress.due_us.len() as u64;
        let slot = progress.sent % slots;
        progress.due_us[usize::try_from(slot)?] = due_us;
        Stamp { counter: progress.sent, due_us }.write(text, options.bytes);
        // From 1 on, and never twice under way.
        let packet_id = u16::try_from(slot + 1)?;
        mqtt::publish(&mut self.sender.out, options.version, &self.topic, packet_id, text)
    }

    fn receive(
        &mut self,
        options: &Options,
        shared: &Shared,
        progress: &mut Progress,
        received: &mut Received,
    ) -> Result<()> {
        let now_us = shared.now_us();
        self.sender.receive(|packet, _| {
            if let Packet::Puback { packet_id } = packet {
                progress.acknowledged += 1;
                let due_us = progress.due_us[usize::from(packet_id) - 1];
                shared.count(&shared.acknowledged, &shared.to_puback, due_us, now_us);
            }
            Ok(())
        })?;
        let faults = &mut *shared.faults.borrow_mut();
        self.receiver.receive(|packet, out| {
            if let Packet::Publish { qos, packet_id, payload } = packet {
                if qos > 0 {
                    mqtt::puback(out, packet_id);
                }
                if let Some(stamp) = received.take(payload, options.payload, faults) {
                    progress.delivered += 1;
                    shared.count(&shared.delivered, &shared.to_delivery, stamp.due_us, now_us);
                }
            }
            Ok(())
        })
    }
}

/// Microseconds, without their fraction.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a time in a run is far from the limits")]
fn whole(us: f64) -> u64 {
    us as u64
}

fn print(report: &Report, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    let Latency { p50_us, p90_us, p99_us, p999_us, max_us } = report.publish_to_delivery;
    println!(
        "{}: {:.0} delivered/s, {:.0} acknowledged/s; {} pairs, {} bytes, {:.1} s",
        report.label, report.delivered_per_s, report.acknowledged_per_s, report.pairs, report.bytes, report.seconds
    );
    println!("  publish to delivery  p50 {p50_us} us, p90 {p90_us}, p99 {p99_us}, p99.9 {p999_us}, max {max_us}");
    let Latency { p50_us, p90_us, p99_us, p999_us, max_us } = report.publish_to_puback;
    println!("  publish to PUBACK    p50 {p50_us} us, p90 {p90_us}, p99 {p99_us}, p99.9 {p999_us}, max {max_us}");
    if let Some((cpu, rss)) = report.broker_cpu_us_per_message.zip(report.broker_rss_mb) {
        println!("  broker               {cpu:.1} us of processor a message, {rss:.0} MB");
    }
    println!("  generator            {:.1} us of processor a message", report.generator_cpu_us_per_message);
    Ok(())
}
