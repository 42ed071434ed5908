//! A backlog: how fast a device gets what waited for it, acknowledging each message.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::client::Client;
use crate::mqtt::{self, Packet, Version};
use crate::process;
use crate::verify::{Faults, Payload, Received, STAMP_BYTES, Stamp};

/// How long nothing may happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Measures how fast a device gets a backlog.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Address of chatd.
    #[arg(long, default_value = "127.0.0.1:1883")]
    addr: SocketAddr,
    /// Messages that wait.
    #[arg(long, default_value_t = 100_000)]
    messages: u64,
    /// Messages that the sender has under way; what the server gives as its Receive Maximum, or less.
    #[arg(long, default_value_t = 64)]
    window: u64,
    /// Bytes of a text.
    #[arg(long, default_value_t = 128)]
    bytes: usize,
    /// MQTT version, 4 (for 3.1.1) or 5.
    #[arg(long, default_value = "4")]
    version: Version,
    /// chatd's process, for its processor time and memory.
    #[arg(long)]
    pid: Option<u32>,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    messages: u64,
    bytes: usize,
    sent_per_s: f64,
    delivered_per_s: f64,
    first_ms: f64,
    server_cpu_us_per_message: Option<f64>,
    server_rss_mb: Option<f64>,
    faults: Faults,
}

pub(crate) async fn run(options: Options) -> Result<()> {
    ensure!(options.bytes >= STAMP_BYTES, "a text has at least {STAMP_BYTES} bytes: its number and its time");
    ensure!(options.messages > 0 && options.window > 0 && options.window < 1 << 15, "messages and window are positive");
    // Names of its own, so that it can run again on the same data.
    let run = std::process::id();
    let (from, to) = (format!("from-{run}"), format!("to-{run}"));
    let sending = Instant::now();
    send(&options, &from, &to).await?;
    let sent_per_s = options.messages as f64 / sending.elapsed().as_secs_f64();

    let cpu = |pid: Option<u32>| pid.map(process::cpu_seconds).transpose();
    let cpu_before = cpu(options.pid)?;
    let began = Instant::now();
    let mut faults = Faults::default();
    let mut received = Received::default();
    let mut delivered = 0;
    let mut first = None;
    let inbox = format!("chat/{to}/inbox");
    let mut device = Client::open(options.addr, options.version, &to, None).await?;
    // The first messages come with the SUBACK.
    mqtt::subscribe(&mut device.out, options.version, &inbox)?;
    device.flush()?;
    while delivered < options.messages {
        device.receive(|packet, out| {
            if let Packet::Publish { packet_id, payload, .. } = packet {
                mqtt::puback(out, packet_id);
                first.get_or_insert_with(|| began.elapsed());
                delivered += u64::from(received.take(payload, Payload::Envelope, &mut faults).is_some());
            }
            Ok(())
        })?;
        device.flush()?;
        if delivered < options.messages {
            let ready = tokio::time::timeout(PATIENCE, device.ready()).await;
            ready.with_context(|| format!("nothing more came after {delivered} messages"))??;
        }
    }
    let took = began.elapsed();
    let cpu_after = cpu(options.pid)?;
    device.close()?;
    let messages = options.messages as f64;
    let report = Report {
        messages: options.messages,
        bytes: options.bytes,
        sent_per_s,
        delivered_per_s: messages / took.as_secs_f64(),
        first_ms: first.unwrap_or_default().as_secs_f64() * 1e3,
        server_cpu_us_per_message: cpu_after.zip(cpu_before).map(|(after, before)| (after - before) * 1e6 / messages),
        server_rss_mb: options.pid.map(process::rss_bytes).transpose()?.map(|bytes| bytes as f64 / 1e6),
        faults,
    };
    print(&report, options.json)?;
    ensure!(report.faults.is_none(), "the server broke its word: {:?}", report.faults);
    Ok(())
}

async fn send(options: &Options, from: &str, to: &str) -> Result<()> {
    let mut sender = Client::open(options.addr, options.version, from, None).await?;
    let topic = format!("chat/{from}/out/{to}");
    let (mut sent, mut acknowledged) = (0, 0);
    let mut text = Vec::new();
    while acknowledged < options.messages {
        while sent < options.messages && sent - acknowledged < options.window {
            sent += 1;
            Stamp { counter: sent, due_us: 0 }.write(&mut text, options.bytes);
            let packet_id = u16::try_from(sent % (1 << 15) + 1)?;
            mqtt::publish(&mut sender.out, options.version, &topic, packet_id, &text)?;
        }
        sender.flush()?;
        tokio::time::timeout(PATIENCE, sender.ready()).await.context("no acknowledgement")??;
        sender.receive(|packet, _| {
            acknowledged += u64::from(matches!(packet, Packet::Puback { .. }));
            Ok(())
        })?;
    }
    sender.close()
}

fn print(report: &Report, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    println!("backlog of {} messages of {} bytes", report.messages, report.bytes);
    println!("  sent                 {:.0} messages/s, by one sender", report.sent_per_s);
    println!(
        "  delivered            {:.0} messages/s, the first after {:.1} ms",
        report.delivered_per_s, report.first_ms
    );
    if let Some((cpu, rss)) = report.server_cpu_us_per_message.zip(report.server_rss_mb) {
        println!("  server               {cpu:.1} us of processor a message, {rss:.0} MB");
    }
    Ok(())
}
