//! What a process takes: processor time and memory, from `/proc`.

use anyhow::{Context, Result};

/// Processor seconds that a process has used, in user and system mode.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // The name, in parentheses, may contain anything.
    let (_, rest) = stat.rsplit_once(')').context("/proc/…/stat has no name")?;
    let ticks = |nth: usize| -> Result<f64> {
        Ok(rest.split_whitespace().nth(nth).context("/proc/…/stat is short")?.parse()?)
    };
    let per_second = rustix::param::clock_ticks_per_second();
    Ok((ticks(11)? + ticks(12)?) / per_second as f64)
}

/// Resident memory of a process in bytes, without what is mapped from files.
pub(crate) fn rss_bytes(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon in /proc/…/status")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}
