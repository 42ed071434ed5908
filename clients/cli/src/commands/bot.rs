//! `chat bot echo`: somebody to talk to.
//!
//! Invariant: every text is answered once, whatever crashes. A text is acknowledged when its echo is safe in the outbox, and the echo's id is made of the text's
//! number: an echo that is made again is stored once.

use chat_client::{Client, Delivery, Event, Kind, MessageId, RequestError, SendError};

use super::follow::Connections;
use super::note;
use crate::failure::Failure;
use crate::login;
use crate::settings::Settings;
use crate::signals::Signals;

/// Before the number; what has it is not answered, or two echoes would never stop.
const ID_PREFIX: &str = "echo-";

pub(super) async fn echo(settings: &mut Settings) -> Result<(), Failure> {
    login::prepare(settings).await?;
    let device = settings.device("chat-bot");
    let options = settings.options(&device)?.outbox(settings.outbox(&device)?);
    let (client, mut events) = Client::connect(options).await.map_err(|error| login::of(settings, error))?;
    note(format!("{} says back what is said to it, until interrupted", client.user()));
    let mut signals = Signals::new()?;
    let mut connections = Connections::default();
    let outcome = loop {
        let event = tokio::select! {
            biased;
            () = signals.next() => break Ok(()),
            event = events.next() => event,
        };
        let done = match event {
            Some(Event::Message(delivery)) => tokio::select! {
                biased;
                answered = answer(&client, delivery) => answered,
                // It comes again, and so does its echo, which is stored once.
                () = signals.next() => break Ok(()),
            },
            Some(Event::NotSent { to, error, .. }) => {
                note(format!("an echo to {to}: {error}"));
                Ok(())
            }
            Some(Event::Connection(state)) => connections.changed(state),
            Some(_) => Ok(()),
            None => Err(Failure::refused("it is connected no more")),
        };
        if done.is_err() {
            break done;
        }
    };
    client.close().await;
    outcome
}

async fn answer(client: &Client, delivery: Delivery) -> Result<(), Failure> {
    let message = &delivery.message;
    let is_echo = message.id.as_ref().is_some_and(|id| id.as_str().starts_with(ID_PREFIX));
    if let Kind::Text(text) = &message.kind
        && message.from != *client.user()
        && !is_echo
    {
        let id = MessageId::parse(&format!("{ID_PREFIX}{}", message.seq)).expect("letters, a hyphen and a number");
        match client.queue_as(id, &message.from, text.clone()).await {
            // Nobody waits until it is stored. If it is in the outbox already, it is from before a crash.
            Ok(_) | Err(SendError::SameId(_)) => {}
            Err(error) => return Err(error.into()),
        }
        match client.mark_read(&message.from, message.seq).await {
            Err(RequestError::Closed(closed)) => return Err(closed.into()),
            Err(error) => note(format!("reading what {} wrote: {error}", message.from)),
            Ok(()) => {}
        }
    }
    delivery.acknowledge();
    Ok(())
}
