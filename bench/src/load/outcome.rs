//! What a run found out, in one form for every mode: named figures, latencies and series. It goes out as a line, as JSON and as a page.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::html;
use crate::measure::{Distribution, Series};
use crate::process::Memory;
use crate::target::Target;
use crate::verify::Faults;

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "The result")]
pub(crate) struct Output {
    /// Which broker it is about.
    #[arg(long, default_value = "broker")]
    label: String,
    /// What was measured; without it the name of the mode.
    #[arg(long)]
    scenario: Option<String>,
    /// File for the result as JSON; - is standard output, in place of the line.
    #[arg(long)]
    json: Option<PathBuf>,
    /// File for a page with plots, which needs no other.
    #[arg(long)]
    html: Option<PathBuf>,
    /// Broken promises are in the result, and no failure.
    #[arg(long)]
    forgive: bool,
}

/// Units are the ends of names: `_per_s`, `_us`, `_ms`, `_s`, `_bytes`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) mode: String,
    pub(crate) scenario: String,
    pub(crate) label: String,
    /// The arguments that say what was done.
    pub(crate) command: Vec<String>,
    pub(crate) figures: BTreeMap<String, f64>,
    pub(crate) latencies: BTreeMap<String, Distribution>,
    pub(crate) series: BTreeMap<String, Series>,
    pub(crate) faults: Faults,
    /// What came again after a reconnect and said so: at least once is no fault.
    pub(crate) redelivered: u64,
}

impl Outcome {
    pub(crate) fn new(mode: &str) -> Self {
        Self {
            mode: mode.to_owned(),
            command: command(std::env::args().skip(1)),
            scenario: mode.to_owned(),
            ..Self::default()
        }
    }

    pub(crate) fn set(&mut self, name: &str, value: f64) {
        if value.is_finite() {
            self.figures.insert(name.to_owned(), value);
        }
    }

    pub(crate) fn figure(&self, name: &str) -> Option<f64> {
        self.figures.get(name).copied()
    }

    pub(crate) fn set_latencies(&mut self, name: &str, distribution: Distribution) {
        if distribution.count > 0 {
            self.set(&format!("{name}_p50_us"), distribution.p50_us as f64);
            self.set(&format!("{name}_p99_us"), distribution.p99_us as f64);
        }
        self.latencies.insert(name.to_owned(), distribution);
    }

    pub(crate) fn set_memory(&mut self, when: &str, memory: Option<Memory>) {
        if let Some(Memory { proportional_bytes, anonymous_bytes }) = memory {
            self.set(&format!("server_{when}_pss_bytes"), proportional_bytes as f64);
            self.set(&format!("server_{when}_anonymous_bytes"), anonymous_bytes as f64);
        }
    }

    /// Writes it wherever it is wanted; an error if the broker broke its word.
    pub(crate) fn write(mut self, output: &Output, summary: &str) -> Result<()> {
        self.label.clone_from(&output.label);
        if let Some(scenario) = &output.scenario {
            self.scenario.clone_from(scenario);
        }
        let mut line_is_wanted = true;
        if let Some(path) = &output.json {
            let json = serde_json::to_string(&self)?;
            if path.as_os_str() == "-" {
                println!("{json}");
                line_is_wanted = false;
            } else {
                std::fs::write(path, json + "\n").with_context(|| path.display().to_string())?;
            }
        }
        if let Some(path) = &output.html {
            std::fs::write(path, html::page(&self)).with_context(|| path.display().to_string())?;
        }
        if line_is_wanted {
            let again = if self.redelivered > 0 { format!("; {} came again", self.redelivered) } else { String::new() };
            println!("{} {}: {summary}; {}{again}", self.label, self.scenario, self.faults.sentence());
        }
        ensure!(output.forgive || self.faults.is_none(), "{} broke its word: {}", self.label, self.faults.sentence());
        Ok(())
    }

    pub(crate) fn read(path: &std::path::Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| format!("{} is no result of chat-bench", path.display()))
    }
}

/// Without what says where the result goes and which process it was.
fn command(arguments: impl Iterator<Item = String>) -> Vec<String> {
    const OF_NO_INTEREST: [&str; 8] =
        ["--pid", "--json", "--html", "--label", "--scenario", "--ca", "--addr", "--folder"];
    let mut kept = Vec::new();
    let mut arguments = arguments.peekable();
    while let Some(argument) = arguments.next() {
        let name = argument.split('=').next().unwrap_or_default();
        if !OF_NO_INTEREST.contains(&name) {
            kept.push(argument);
        } else if name == argument {
            arguments.next();
        }
    }
    kept
}

/// Processor time of the broker and of the generator itself, between two points of a run.
pub(crate) struct Work {
    broker_s: Option<f64>,
    own_s: f64,
}

impl Work {
    pub(crate) fn now(target: &Target) -> Result<Self> {
        let own_s = crate::process::cpu_seconds(std::process::id())?;
        Ok(Self { broker_s: target.cpu_seconds()?, own_s })
    }

    /// What a message has cost since.
    pub(crate) fn since(&self, target: &Target, messages: u64, outcome: &mut Outcome) -> Result<()> {
        let now = Self::now(target)?;
        let us_per_message = |seconds: f64| seconds * 1e6 / messages as f64;
        outcome.set("generator_cpu_us_per_message", us_per_message(now.own_s - self.own_s));
        if let Some((after, before)) = now.broker_s.zip(self.broker_s) {
            outcome.set("server_cpu_us_per_message", us_per_message(after - before));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_says_what_was_done_and_not_where() {
        let all = "pairs --pairs 500 --pid 17 --json=/x/y --rate=5 --label a --forgive --addr 127.0.0.1:1";
        let kept = command(all.split(' ').map(str::to_owned));
        assert_eq!(kept.join(" "), "pairs --pairs 500 --rate=5 --forgive");
    }

    #[test]
    fn an_outcome_comes_back_from_json() {
        let mut outcome = Outcome::new("pairs");
        outcome.set("delivered_per_s", 2.5);
        outcome.set("nothing", f64::NAN);
        outcome.series.insert("delivered".to_owned(), Series { step_ms: 100, counts: vec![1, 2] });
        let json = serde_json::to_string(&outcome).unwrap();
        let again: Outcome = serde_json::from_str(&json).unwrap();
        assert_eq!(again, outcome);
        assert_eq!((again.figure("delivered_per_s"), again.figure("nothing")), (Some(2.5), None));
    }
}
