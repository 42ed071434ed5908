//! A bot that says back whatever is said to it.
//!
//! ```text
//! scripts/run                                                     # a server
//! cargo run -p chat-client --example echo                         # the bot
//! mosquitto_pub -u alice -q 1 -t chat/alice/out/echo -m 'hello'
//! ```
//!
//! A message is acknowledged when its echo is safe in the outbox: whatever crashes, nobody is left without an answer.

use chat_client::{Client, Event, FileOutbox, Kind, Options};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let server = arguments.next().unwrap_or_else(|| "mqtt://127.0.0.1:1883".to_owned());
    let outbox = FileOutbox::open(arguments.next().unwrap_or_else(|| "echo-outbox".to_owned()))?;
    let (client, mut events) = Client::connect(Options::new(&server, "echo", "echo-bot")?.outbox(outbox)).await?;
    eprintln!("say something to echo");
    while let Some(event) = events.next().await {
        match event {
            Event::Message(delivery) => {
                let message = &delivery.message;
                if let Kind::Text(text) = &message.kind
                    && message.from != *client.user()
                {
                    // Dropped: we do not wait until it is stored.
                    drop(client.queue(&message.from, text.clone()).await?);
                    client.mark_read(&message.from, message.seq).await?;
                }
                delivery.acknowledge();
            }
            Event::Connection(state) => eprintln!("{state:?}"),
            _ => {}
        }
    }
    Ok(())
}
