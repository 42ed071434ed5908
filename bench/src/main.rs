//! `chat-bench`: load for MQTT brokers, verified while it is measured, and a measure of the log alone.

mod log;
mod process;

use clap::Parser;

#[derive(Parser, Debug)]
#[command(version, about)]
enum Mode {
    /// The log alone, without MQTT.
    Log(log::Options),
}

// One thread: what one task begins first is queued first, and the server has the other processors.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Mode::parse() {
        Mode::Log(options) => log::run(options).await,
    }
}
