//! `chat-bench`: load for MQTT brokers, verified while it is measured, and a measure of the log alone.

mod client;
mod drain;
mod log;
mod mqtt;
mod pairs;
mod process;
mod verify;

use clap::Parser;

#[derive(Parser, Debug)]
#[command(version, about)]
enum Mode {
    /// Pairs of a sender and a receiver on any MQTT broker: throughput and latency.
    Pairs(pairs::Options),
    /// A backlog that one device of chatd's gets.
    Drain(drain::Options),
    /// The log alone, without MQTT.
    Log(log::Options),
}

// One thread: what one task begins first is queued first, and the server has the other processors.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    raise_file_limit();
    match Mode::parse() {
        Mode::Pairs(options) => pairs::run(options).await,
        Mode::Drain(options) => drain::run(options).await,
        Mode::Log(options) => log::run(options).await,
    }
}

/// Two sockets a pair are more than systems allow at first.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        eprintln!("the limit of open files stays at {:?}: {error}", limit.current);
    }
}
