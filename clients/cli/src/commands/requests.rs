//! Commands that ask once and print the answer; and the way into the terminal chat.

use std::io::IsTerminal as _;

use chat_client::{Client, Closed, Range};

use super::connect_once;
use crate::arguments::{Command, Form};
use crate::failure::Failure;
use crate::login;
use crate::moment;
use crate::output::{Output, Printed};
use crate::settings::Settings;
use crate::terminal;

const PAGE: usize = 200;

pub(super) async fn run(settings: &mut Settings, command: Command) -> Result<(), Failure> {
    let (client, _events) = connect_once(settings).await?;
    match command {
        Command::Conversations { form } => conversations(&client, form).await?,
        Command::Whoami { form } => {
            let answer = client.whoami().await?;
            let text = if form.json {
                Output::object(&answer)
            } else {
                format!("{} at {} (chatd {})", answer.user, settings.server, crate::safe::line(&answer.version))
            };
            Output::new(form).print(text).await?;
        }
        Command::Read { peer, seq } => {
            let seq = match seq {
                Some(seq) => Some(seq),
                None => client.history(&peer, Range::Before(None), 1).await?.entries.pop().map(|entry| entry.seq),
            };
            if let Some(seq) = seq {
                client.mark_read(&peer, seq).await?;
            }
        }
        Command::Edit { peer, seq, text } => client.edit(&peer, seq, &text).await.map(|_| ())?,
        Command::Unsend { peer, seq } => client.unsend(&peer, seq).await.map(|_| ())?,
        Command::Delete { peer, seq } => client.delete(&peer, seq).await?,
        Command::Block { peer } => client.block(&peer).await?,
        Command::Unblock { peer } => client.unblock(&peer).await?,
        Command::Blocked { form } => {
            for blocked in client.blocked().await?.blocked {
                let text = if form.json { Output::object(&blocked) } else { blocked.user.to_string() };
                if Output::new(form).print(text).await? == Printed::Closed {
                    break;
                }
            }
        }
        Command::Send(_)
        | Command::Listen(_)
        | Command::Tail(_)
        | Command::History(_)
        | Command::Bot(_)
        | Command::Completions { .. }
        | Command::Man { .. } => unreachable!("these have functions of their own"),
    }
    client.close().await;
    Ok(())
}

async fn conversations(client: &Client, form: Form) -> Result<(), Failure> {
    let output = Output::new(form);
    let now = moment::now();
    let mut before = None;
    loop {
        let page = client.conversations(before.as_deref(), PAGE).await?;
        for conversation in &page.conversations {
            let text = if form.json {
                Output::object(conversation)
            } else {
                output.conversation(conversation, client.user(), &now)
            };
            if output.print(text).await? == Printed::Closed {
                return Ok(());
            }
        }
        before = page.next;
        if before.is_none() {
            return Ok(());
        }
    }
}

/// The chat in the terminal.
pub(super) async fn terminal(settings: &mut Settings) -> Result<(), Failure> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        return Err(Failure::usage(
            "chat alone opens the chat in the terminal, and this is none; chat --help has the commands",
        ));
    }
    let device = settings.device("chat-terminal");
    loop {
        let (options, outbox) = (settings.options(&device)?, settings.outbox(&device)?);
        let Err(error) = terminal::run(options, outbox, &settings.drafts(&device)?).await else { return Ok(()) };
        match error.downcast::<Closed>() {
            Ok(Closed::LoginRefused(_)) if login::can_ask(settings) => login::ask(settings).await?,
            Ok(closed) => return Err(closed.into()),
            Err(error) => return Err(Failure::refused(format!("{error:#}"))),
        }
    }
}
