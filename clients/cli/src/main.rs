//! `chat`: a chatd server from a shell, and a chat in the terminal.

mod safe;
mod terminal;

/// Until the settings are there: `chat --server ADDRESS --user NAME [--device NAME]`.
#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str, default: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)).map_or(default.to_owned(), Clone::clone)
    };
    let (server, user) = (value("--server", "mqtt://127.0.0.1:1883"), value("--user", "alice"));
    let options = chat_client::Options::new(&server, &user, &value("--device", "chat-terminal"))?;
    let folder = std::path::PathBuf::from(std::env::var_os("XDG_STATE_HOME").unwrap_or_else(|| ".".into()));
    terminal::run(options, chat_client::FileOutbox::open(folder.join(user))?).await
}
