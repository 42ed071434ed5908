//! A bridge to a shell command: what is said to the bot goes to the command's standard input, and what the command prints is the answer.
//!
//! ```text
//! cargo run -p chat-client --example bridge -- mqtt://127.0.0.1:1883 calculator bc -l
//! mosquitto_pub -u alice -q 1 -t chat/alice/out/calculator -m '6 * 7'
//! ```
//!
//! Everybody who can write to the bot can write to the command. One message is worked on at a time; the next waits on the server.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use chat_client::{Client, Event, FileOutbox, Kind, Options};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

const ANSWER_BYTES_MAX: usize = 16 * 1024;
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [server, user, command, command_arguments @ ..] = arguments.as_slice() else {
        bail!("bridge SERVER USER COMMAND [ARGUMENT …]");
    };
    let outbox = FileOutbox::open(format!("{user}-outbox"))?;
    let (client, mut events) = Client::connect(Options::new(server, user, "bridge")?.outbox(outbox)).await?;
    while let Some(event) = events.next().await {
        let Event::Message(delivery) = event else { continue };
        if let Kind::Text(text) = &delivery.message.kind
            && delivery.message.from != *client.user()
        {
            let answer = match run(command, command_arguments, text).await {
                Ok(output) if output.is_empty() => "(no output)".to_owned(),
                Ok(output) => output,
                Err(error) => format!("{command} failed: {error:#}"),
            };
            // In the outbox it is safe: only then the question is done with.
            drop(client.queue(&delivery.message.from, answer).await?);
        }
        delivery.acknowledge();
    }
    Ok(())
}

/// What it prints, as far as it fits into a message.
async fn run(command: &str, arguments: &[String], input: &str) -> anyhow::Result<String> {
    let mut child = Command::new(command)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut stdin = child.stdin.take().context("its standard input")?;
    let ended = async {
        // It may end without reading all of it.
        stdin.write_all(format!("{input}\n").as_bytes()).await.ok();
        drop(stdin);
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(COMMAND_TIMEOUT, ended).await.context("it takes too long")??;
    let printed = if output.status.success() { output.stdout } else { output.stderr };
    let mut text = String::from_utf8_lossy(&printed).trim_end().to_owned();
    text.truncate(text.floor_char_boundary(ANSWER_BYTES_MAX));
    Ok(text)
}
