//! Many senders to one receiver: what one connection, and one user's inbox, can take.

use anyhow::Result;

use crate::flow::{self, Ends, Flow};

/// Many senders to one receiver: throughput and latency.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    flow: Flow,
    #[arg(long, default_value_t = 100)]
    senders: u32,
}

pub(crate) async fn run(options: Options) -> Result<()> {
    let Options { flow, senders } = options;
    flow::run("fan-in", flow, Ends { senders, receivers: 1 }).await
}
