//! `chat`: a chatd server from a shell, and a chat in the terminal.
//!
//! The way of a command: [`arguments`] say what is wanted, [`settings`] where and as whom, [`login`] connects, [`commands`] do it, [`output`] prints it, and
//! [`failure`] says what went wrong. [`terminal`] is the chat in the terminal. What others wrote passes through [`safe`] before a terminal gets it.

mod arguments;
mod commands;
mod failure;
mod login;
mod moment;
mod output;
mod safe;
mod settings;
mod signals;
mod terminal;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

use crate::arguments::Arguments;
use crate::failure::{Failure, FailureKind};
use crate::output::StandardError;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.command.is_some() {
        log();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return end(&Failure::refused(format!("starting: {error}"))),
    };
    let outcome = runtime.block_on(Box::pin(commands::run(arguments)));
    // A thread may still wait for somebody to read or to write.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => end(&failure),
    }
}

/// What the library has to say goes to the standard error, as much as `CHAT_LOG` asks for. The chat in the terminal has no place for it.
fn log() {
    let filter = EnvFilter::try_from_env("CHAT_LOG").unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(|| StandardError).init();
}

fn end(failure: &Failure) -> ExitCode {
    commands::note(failure);
    if failure.kind == FailureKind::Usage {
        StandardError.write_all(b"See chat --help.\n").ok();
    }
    ExitCode::from(failure.kind.exit_code())
}
