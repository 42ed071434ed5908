//! Pairs of a sender and a receiver: how many messages a second a broker takes, delivers and has acknowledged, and how long each takes.

use anyhow::Result;

use crate::flow::{self, Ends, Flow};

/// Pairs of a sender and a receiver: throughput and latency.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    flow: Flow,
    #[arg(long, default_value_t = 500)]
    pairs: u32,
}

pub(crate) async fn run(options: Options) -> Result<()> {
    let Options { flow, pairs } = options;
    flow::run("pairs", flow, Ends { senders: pairs, receivers: pairs }).await
}
