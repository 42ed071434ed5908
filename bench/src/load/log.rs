//! The log alone, without MQTT: what an append, a page and an opening cost, beside what the disk costs.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use chat_protocol::{ConversationId, MessageId, Seq, Timestamp, UserId};
use chat_service::log::{IdKey, Log, NewEntry, Position, ReadLimit, RedbLog, RedbOptions, Side, Stream};
use serde::Serialize;

use crate::measure::median;
use crate::{disk, process};

/// The log alone, without MQTT.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Messages to store.
    #[arg(long, default_value_t = 1_000_000)]
    messages: u64,
    /// Conversations that they are spread over at random; each has two users of its own.
    #[arg(long, default_value_t = 100_000)]
    conversations: u64,
    /// Messages in a batch.
    #[arg(long, default_value_t = 1_000)]
    batch: u64,
    /// Batches under way at once: with two, one gathers while the other is written.
    #[arg(long, default_value_t = 2)]
    under_way: usize,
    /// Bytes of a text.
    #[arg(long, default_value_t = 200)]
    bytes: usize,
    /// Gives every message an id, and looks each up before it is stored, as the server does.
    #[arg(long)]
    ids: bool,
    /// Counts what is stored for every conversation and sender, as quotas need it.
    #[arg(long)]
    counts_usage: bool,
    /// Removes old messages meanwhile, as retention does, so that about so many stay.
    #[arg(long)]
    keep: Option<u64>,
    /// Folder for the log, made if missing and kept; else a temporary one.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, Serialize)]
struct Report {
    fdatasync_us: f64,
    messages: u64,
    appended_per_s: f64,
    /// The same, from tenth to tenth of the messages.
    appended_per_s_by_tenth: Vec<f64>,
    slowest_batch_ms: f64,
    removed: u64,
    slowest_removal_ms: f64,
    cpu_us_per_message: f64,
    lone_append_us: f64,
    page_of_25_us: f64,
    history_page_of_50_us: f64,
    backlog_per_s: f64,
    open_ms: f64,
    rss_mb: f64,
    log_bytes_per_message: f64,
    index_bytes_per_message: f64,
    message_bytes: usize,
}

pub(crate) async fn run(options: Options) -> Result<()> {
    ensure!(options.conversations > 0 && options.batch > 0 && options.under_way > 0, "nothing to do");
    let temporary = tempfile::tempdir()?;
    let folder = options.folder.clone().unwrap_or_else(|| temporary.path().to_owned());
    std::fs::create_dir_all(&folder)?;
    let fdatasync_us = disk::fdatasync(&folder, 200)?.distribution().p50_us as f64;
    let mut report = Report { fdatasync_us, message_bytes: options.bytes, ..Report::default() };
    let redb = RedbOptions { counts_usage: options.counts_usage, ..RedbOptions::default() };
    let log = Arc::new(RedbLog::open(&folder, redb)?);
    ensure!(log.head() == Position(0), "the folder has a log already");

    let removed = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    let removing = options.keep.map(|keep| tokio::spawn(remove(Arc::clone(&log), keep, Arc::clone(&removed))));
    append(&log, &options, &mut report).await?;
    if let Some(removing) = removing {
        removing.abort();
        ensure!(removing.await.is_err_and(|error| error.is_cancelled()), "removing failed");
    }
    report.removed = removed.0.load(Ordering::Relaxed);
    report.slowest_removal_ms = removed.1.load(Ordering::Relaxed) as f64 / 1e3;
    read(&log, &options, &mut report).await?;
    drop(log);
    let size = |name: &str| -> Result<f64> {
        use std::os::unix::fs::MetadataExt;
        // Blocks on disk: the files are longer than what is in them.
        Ok(std::fs::metadata(folder.join(name))?.blocks() as f64 * 512.0 / report.messages as f64)
    };
    report.log_bytes_per_message = size("log.redb")?;
    report.index_bytes_per_message = size("index.redb")?;
    let began = Instant::now();
    let log = RedbLog::open(&folder, RedbOptions::default())?;
    report.open_ms = millis(began.elapsed());
    ensure!(log.head() == Position(report.messages + LONE_APPENDS), "the log has another end than it had");
    print(&report, options.json)
}

/// Messages are a millisecond apart.
fn written_at(nth: u64) -> Timestamp {
    Timestamp::from_ms(1_795_456_800_000 + nth)
}

/// Removes old messages, step by step, until it is aborted. How many, and how long the longest step took.
async fn remove(log: Arc<RedbLog>, keep: u64, removed: Arc<(AtomicU64, AtomicU64)>) -> Result<()> {
    loop {
        let began = Instant::now();
        let step = log.remove_before(written_at(log.head().0.saturating_sub(keep))).await?;
        removed.0.fetch_add(step, Ordering::Relaxed);
        if step > 0 {
            removed.1.fetch_max(u64::try_from(began.elapsed().as_micros())?, Ordering::Relaxed);
        }
        // As retention does it, and not idle too long.
        tokio::time::sleep(began.elapsed().max(Duration::from_millis(1))).await;
    }
}

/// Who writes what: conversations at random, each with its next seq.
struct Writer {
    seqs: Vec<u64>,
    random: u64,
    text: Arc<str>,
    ids: bool,
    written: u64,
}

impl Writer {
    fn next(&mut self) -> Result<NewEntry> {
        // xorshift: the same messages in every run.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let nth = self.random % self.seqs.len() as u64;
        let seq = &mut self.seqs[usize::try_from(nth)?];
        *seq += 1;
        self.written += 1;
        let (from, to) = (user("a", nth)?, user("b", nth)?);
        Ok(NewEntry {
            conversation: ConversationId::between(&from, &to)?,
            seq: Seq::new(*seq).context("seq 0")?,
            from,
            to,
            id: self.ids.then(|| MessageId::parse(&format!("m-{}", self.written))).transpose()?,
            at: written_at(self.written),
            body: Arc::clone(&self.text).into(),
            withheld: false,
        })
    }
}

fn user(side: &str, nth: u64) -> Result<UserId> {
    Ok(UserId::parse(&format!("{side}{nth}"))?)
}

async fn append(log: &Arc<RedbLog>, options: &Options, report: &mut Report) -> Result<()> {
    let mut writer = Writer {
        seqs: vec![0; usize::try_from(options.conversations)?],
        random: 0x9e37_79b9_7f4a_7c15,
        text: "x".repeat(options.bytes).into(),
        ids: options.ids,
        written: 0,
    };
    let cpu_before = process::cpu_seconds(std::process::id())?;
    let mut making = Duration::ZERO;
    let mut under_way: tokio::task::JoinSet<Result<Duration>> = tokio::task::JoinSet::new();
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    let (mut tenth, mut tenth_began) = (1, began);
    // A batch may not be sent before the one before is queued: seqs count.
    while report.messages < options.messages {
        let making_began = Instant::now();
        let batch = (0..options.batch).map(|_| writer.next()).collect::<Result<Vec<_>>>()?;
        making += making_began.elapsed();
        if options.ids {
            let ids = batch.iter().filter_map(|new| {
                Some(IdKey { conversation: new.conversation.clone(), from: new.from.clone(), id: new.id.clone()? })
            });
            ensure!(log.find(ids.collect()).await?.iter().all(Option::is_none), "an id was found before it was stored");
        }
        report.messages += options.batch;
        let log = Arc::clone(log);
        under_way.spawn(async move {
            let began = Instant::now();
            log.append(batch).await?;
            Ok(began.elapsed())
        });
        tokio::task::yield_now().await;
        while under_way.len() >= options.under_way {
            slowest = slowest.max(under_way.join_next().await.context("nothing under way")???);
        }
        if report.messages * 10 >= options.messages * tenth {
            let messages = options.messages as f64 / 10.0;
            report.appended_per_s_by_tenth.push(messages / tenth_began.elapsed().as_secs_f64());
            tenth_began = Instant::now();
            tenth += 1;
        }
    }
    while let Some(done) = under_way.join_next().await {
        slowest = slowest.max(done??);
    }
    let took = began.elapsed();
    report.appended_per_s = report.messages as f64 / took.as_secs_f64();
    report.slowest_batch_ms = millis(slowest);
    let cpu = process::cpu_seconds(std::process::id())? - cpu_before - making.as_secs_f64();
    report.cpu_us_per_message = cpu * 1e6 / report.messages as f64;
    report.rss_mb = process::memory(std::process::id())?.anonymous_bytes as f64 / 1e6;

    let mut lone = Vec::new();
    for _ in 0..LONE_APPENDS {
        let new = writer.next()?;
        let began = Instant::now();
        log.append(vec![new]).await?;
        lone.push(micros(began.elapsed()));
    }
    report.lone_append_us = median(lone).unwrap_or_default();
    Ok(())
}

/// Messages appended one by one.
const LONE_APPENDS: u64 = 500;

async fn read(log: &Arc<RedbLog>, options: &Options, report: &mut Report) -> Result<()> {
    let everybody = (0..options.conversations).step_by(usize::try_from((options.conversations / 500).max(1))?);
    let (mut pages, mut history) = (Vec::new(), Vec::new());
    for nth in everybody {
        let stream = Stream { user: user("b", nth)?, side: Side::Inbox };
        let began = Instant::now();
        log.read(&stream, Position(0), ReadLimit { entries: 25, bytes: usize::MAX }).await?;
        pages.push(micros(began.elapsed()));
        let conversation = ConversationId::between(&user("a", nth)?, &user("b", nth)?)?;
        let began = Instant::now();
        log.read_conversation(&conversation, None, ReadLimit { entries: 50, bytes: usize::MAX }).await?;
        history.push(micros(began.elapsed()));
    }
    report.page_of_25_us = median(pages).unwrap_or_default();
    report.history_page_of_50_us = median(history).unwrap_or_default();

    // A backlog: everything of the users who have most, page by page.
    let began = Instant::now();
    let mut entries = 0;
    for nth in 0..options.conversations.min(2_000) {
        let stream = Stream { user: user("b", nth)?, side: Side::Inbox };
        let mut after = Position(0);
        loop {
            let page = log.read(&stream, after, ReadLimit { entries: 64, bytes: 128 * 1024 }).await?;
            entries += page.entries.len();
            let Some(last) = page.entries.last() else { break };
            after = last.position;
            if page.end {
                break;
            }
        }
    }
    report.backlog_per_s = entries as f64 / began.elapsed().as_secs_f64();
    Ok(())
}

fn print(report: &Report, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    let per_sync = |us: f64| us / report.fdatasync_us;
    println!("one fdatasync of 4 KiB          {:9.0} us", report.fdatasync_us);
    println!("appended                        {:9.0} messages/s, {} in all", report.appended_per_s, report.messages);
    let tenths: Vec<String> = report.appended_per_s_by_tenth.iter().map(|rate| format!("{:.0}k", rate / 1e3)).collect();
    println!("  from tenth to tenth           {}", tenths.join(" "));
    println!("  the slowest batch             {:9.1} ms", report.slowest_batch_ms);
    if report.removed > 0 {
        println!(
            "  removed meanwhile             {:9} messages, the slowest step {:.1} ms",
            report.removed, report.slowest_removal_ms
        );
    }
    println!("  processor time                {:9.2} us a message", report.cpu_us_per_message);
    println!(
        "lone append                     {:9.0} us, {:.1} fdatasyncs",
        report.lone_append_us,
        per_sync(report.lone_append_us)
    );
    println!("page of 25 from an inbox        {:9.0} us", report.page_of_25_us);
    println!("page of 50 from a conversation  {:9.0} us", report.history_page_of_50_us);
    println!("backlogs of 2,000 users         {:9.0} messages/s", report.backlog_per_s);
    println!("opening after a clean stop      {:9.1} ms", report.open_ms);
    println!("memory                          {:9.1} MB", report.rss_mb);
    println!(
        "disk                            {:9.0} bytes a message of {}: log {:.0}, index {:.0}",
        report.log_bytes_per_message + report.index_bytes_per_message,
        report.message_bytes,
        report.log_bytes_per_message,
        report.index_bytes_per_message
    );
    Ok(())
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
