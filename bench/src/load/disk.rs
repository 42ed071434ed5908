//! The disk alone: what it costs to have 4 KiB on it for certain. Everything that promises as much costs at least that.

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;

use crate::measure::Latencies;
use crate::outcome::{Outcome, Output};
use crate::plot::time;

/// The disk alone: one fdatasync of 4 KiB.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    output: Output,
    /// Folder on the disk; else a temporary one.
    #[arg(long)]
    folder: Option<PathBuf>,
    #[arg(long, default_value_t = 2_000)]
    times: u32,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let folder = options.folder.as_deref().unwrap_or(temporary.path());
    let mut outcome = Outcome::new("disk");
    let latencies = fdatasync(folder, options.times)?.distribution();
    let (p50, p99) = (time(latencies.p50_us as f64), time(latencies.p99_us as f64));
    outcome.set_latencies("fdatasync", latencies);
    outcome.write(&options.output, &format!("one fdatasync of 4 KiB: p50 {p50}, p99 {p99}"))
}

/// How long it takes to write and sync 4 KiB, so many times one after the other.
pub(crate) fn fdatasync(folder: &Path, times: u32) -> Result<Latencies> {
    let path = folder.join("fdatasync");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(&path)?;
    file.write_all(&[0; 4096])?;
    file.sync_all()?;
    let mut latencies = Latencies::new()?;
    for nth in 0..times {
        let began = Instant::now();
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&[nth.to_le_bytes()[0]; 4096])?;
        file.sync_data()?;
        latencies.record(u64::try_from(began.elapsed().as_micros())?);
    }
    std::fs::remove_file(path)?;
    Ok(latencies)
}
