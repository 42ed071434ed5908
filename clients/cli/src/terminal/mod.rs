//! The chat in the terminal.

/// Opens it.
pub(crate) async fn run(_options: chat_client::Options) -> anyhow::Result<()> {
    anyhow::bail!("not yet")
}
