//! `chat-bench`: load for MQTT brokers, verified while it is measured, and a measure of the log alone.
//!
//! The reading order: what is measured and how its clients come (`target`, `wire`, `websocket`, `mqtt`, `client`, `crowd`), what they do
//! (`pairs` and `fan_in` by `flow`, `idle`, `backlog`, `storm` with `innocent`, `mixed`; `log` and `disk` without a broker), what is kept of it (`outgoing`,
//! `verify`, `measure`, `process`), and how it is told (`outcome`, `html`, `plot`, and `report` of many runs).

mod backlog;
mod client;
mod crowd;
mod disk;
mod fan_in;
mod flow;
mod html;
mod idle;
mod innocent;
mod log;
mod measure;
mod mixed;
mod mqtt;
mod outcome;
mod outgoing;
mod pacer;
mod pairs;
mod plot;
mod process;
mod progress;
mod report;
mod storm;
mod target;
mod verify;
mod websocket;
mod wire;

use std::process::ExitCode;

use clap::Parser;
use tokio::task::LocalSet;

#[derive(Parser, Debug)]
#[command(version, about)]
enum Mode {
    Pairs(pairs::Options),
    FanIn(fan_in::Options),
    Idle(idle::Options),
    Backlog(backlog::Options),
    Storm(storm::Options),
    Mixed(mixed::Options),
    Log(log::Options),
    Disk(disk::Options),
    Report(report::Options),
    Check(report::Check),
}

// One thread: what one task begins first is queued first, and the server has the other processors.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    raise_file_limit();
    if let Err(error) = run().await {
        eprintln!("chat-bench: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

async fn run() -> anyhow::Result<()> {
    let tasks = LocalSet::new();
    match Mode::parse() {
        Mode::Pairs(options) => tasks.run_until(pairs::run(options)).await,
        Mode::FanIn(options) => tasks.run_until(fan_in::run(options)).await,
        Mode::Idle(options) => tasks.run_until(idle::run(options)).await,
        Mode::Backlog(options) => tasks.run_until(backlog::run(options)).await,
        Mode::Storm(options) => tasks.run_until(storm::run(options)).await,
        Mode::Mixed(options) => tasks.run_until(mixed::run(options)).await,
        Mode::Log(options) => log::run(options).await,
        Mode::Disk(options) => disk::run(&options),
        Mode::Report(options) => report::run(&options),
        Mode::Check(options) => report::check(&options),
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
