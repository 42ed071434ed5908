//! What a process takes: processor time and memory, from `/proc`.

use std::iter::Sum;

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

/// Memory that is in RAM. What the kernel keeps for sockets is in neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Its part of everything that it maps, files included.
    pub(crate) proportional_bytes: u64,
    /// What it allocated.
    pub(crate) anonymous_bytes: u64,
}

impl Sum for Memory {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            proportional_bytes: sum.proportional_bytes + one.proportional_bytes,
            anonymous_bytes: sum.anonymous_bytes + one.anonymous_bytes,
        })
    }
}

pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let rollup =
        std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).with_context(|| format!("process {pid}"))?;
    let bytes = |name: &str| -> Result<u64> {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let line = line.with_context(|| format!("no {name} in /proc/…/smaps_rollup"))?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kib * 1024)
    };
    Ok(Memory { proportional_bytes: bytes("Pss")?, anonymous_bytes: bytes("Anonymous")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_has_worked() {
        let pid = std::process::id();
        let before = memory(pid).unwrap();
        assert!(before.anonymous_bytes > 0 && before.proportional_bytes > 0, "{before:?}");
        let more = vec![1_u8; 64 << 20];
        let after = memory(pid).unwrap();
        assert!(after.anonymous_bytes >= before.anonymous_bytes + (60 << 20), "{before:?} {after:?} {}", more.len());
        assert!(cpu_seconds(pid).is_ok());
    }
}
