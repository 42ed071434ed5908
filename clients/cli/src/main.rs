//! `chat`: a chatd server from a shell, and a chat in the terminal.

mod safe;
mod terminal;

/// Until the settings are there: `chat --server ADDRESS --user NAME [--device NAME] [--outbox FILE]`.
#[tokio::main]
async fn main() -> anyhow::Result<()> {
    use chat_client::Outbox;
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str, default: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)).map_or(default.to_owned(), Clone::clone)
    };
    let options = chat_client::Options::new(
        &value("--server", "mqtt://127.0.0.1:1883"),
        &value("--user", "alice"),
        &value("--device", "chat-terminal"),
    )?;
    let path = value("--outbox", "");
    if path.is_empty() {
        return terminal::run(options, Vec::new()).await;
    }
    let mut outbox = chat_client::FileOutbox::open(path)?;
    let waiting = outbox.load()?;
    terminal::run(options.outbox(outbox), waiting).await
}
