//! The commands, a file for each that is more than a request and its answer.

mod bot;
mod follow;
mod history;
mod pages;
mod requests;
mod send;

use std::io::Write as _;

use chat_client::{Client, Events, Listen};
use clap::CommandFactory as _;

use crate::arguments::{Arguments, Bot, Command};
use crate::failure::Failure;
use crate::login;
use crate::output::StandardError;
use crate::safe;
use crate::settings::Settings;

/// Does what the command line says.
pub(crate) async fn run(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { flags, command } = arguments;
    match &command {
        Some(Command::Completions { shell }) => return pages::completions(&mut Arguments::command(), *shell).await,
        Some(Command::Man { dir }) => return pages::manual(Arguments::command(), dir.as_deref()).await,
        _ => {}
    }
    let mut settings = Settings::load(&flags)?;
    for warning in &settings.warnings {
        note(warning);
    }
    match command {
        None => requests::terminal(&mut settings).await,
        Some(Command::Send(send)) => send::run(&mut settings, send).await,
        Some(Command::Listen(listen)) => follow::listen(&mut settings, listen).await,
        Some(Command::Tail(tail)) => follow::tail(&mut settings, tail).await,
        Some(Command::History(history)) => until_interrupted(history::run(&mut settings, history)).await,
        Some(Command::Bot(Bot::Echo)) => bot::echo(&mut settings).await,
        Some(command) => until_interrupted(requests::run(&mut settings, command)).await,
    }
}

/// For what has nothing to finish.
async fn until_interrupted(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::select! {
        biased;
        outcome = work => outcome,
        interrupted = login::interrupted() => Err(interrupted),
    }
}

/// For people, on the standard error.
pub(crate) fn note(sentence: impl std::fmt::Display) {
    // It may quote what others wrote.
    let line = format!("chat: {}\n", safe::line(&sentence.to_string()));
    StandardError.write_all(line.as_bytes()).ok();
}

/// Connects to send and to ask, without a place of its own.
async fn connect_once(settings: &mut Settings) -> Result<(Client, Events), Failure> {
    login::connect(settings, |settings| Ok(settings.temporary()?.listen(Listen::Nothing))).await
}
