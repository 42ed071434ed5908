//! `chat listen` and `chat tail`: messages as they come.
//!
//! Invariant: a message is acknowledged after it was written to the standard output and flushed, or if nobody wants it printed. Whatever ends this, what was
//! not printed comes again in the next run of the same device.

use chat_client::{Client, ConnectionState, Delivery, Event, Events, Listen, Options, Session, UserId};

use super::note;
use crate::arguments;
use crate::failure::Failure;
use crate::login;
use crate::moment;
use crate::output::{Names, Output, Printed};
use crate::settings::Settings;
use crate::signals::Signals;

pub(super) async fn listen(settings: &mut Settings, listen: arguments::Listen) -> Result<(), Failure> {
    let arguments::Listen { from, sent, limit, form } = listen;
    // Who listens to one peer alone has a place for that alone, also where a name was given: there nothing of others is lost.
    let device = match (&from, settings.named_device()) {
        (Some(peer), Some(name)) => format!("{name}-from-{peer}"),
        (Some(peer), None) => settings.device(&format!("chat-from-{peer}")),
        (None, _) => settings.device("chat"),
    };
    let me = settings.user.clone();
    let wanted = Wanted { me, from, own: if sent { Own::Shown } else { Own::Hidden } };
    let names = if sent { Names::FromAndTo } else { Names::From };
    follow(settings, |settings| settings.options(&device), &wanted, names, limit, Output::new(form)).await
}

pub(super) async fn tail(settings: &mut Settings, tail: arguments::Tail) -> Result<(), Failure> {
    let options = |settings: &Settings| -> Result<Options, Failure> {
        let options = match settings.named_device() {
            Some(device) => settings.options(device)?.session(Session::Durable),
            None => settings.temporary()?,
        };
        Ok(options.listen(Listen::Observe))
    };
    let wanted = Wanted { me: settings.user.clone(), from: None, own: Own::Shown };
    follow(settings, options, &wanted, Names::FromAndTo, tail.limit, Output::new(tail.form)).await
}

/// Whether a user's own messages are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Own {
    Shown,
    Hidden,
}

/// What is printed.
struct Wanted {
    me: UserId,
    from: Option<UserId>,
    own: Own,
}

impl Wanted {
    fn wants(&self, delivery: &Delivery) -> bool {
        let from = &delivery.message.from;
        if *from == self.me { self.own == Own::Shown } else { self.from.as_ref().is_none_or(|peer| peer == from) }
    }
}

async fn follow(
    settings: &mut Settings,
    options: impl Fn(&Settings) -> Result<Options, Failure>,
    wanted: &Wanted,
    names: Names,
    limit: Option<u64>,
    output: Output,
) -> Result<(), Failure> {
    let (client, mut events) = login::connect(settings, options).await?;
    let mut signals = Signals::new()?;
    let outcome = print(&client, &mut events, &mut signals, wanted, names, limit, output).await;
    // Acknowledgements that were given leave first.
    client.close().await;
    outcome
}

async fn print(
    client: &Client,
    events: &mut Events,
    signals: &mut Signals,
    wanted: &Wanted,
    names: Names,
    limit: Option<u64>,
    output: Output,
) -> Result<(), Failure> {
    let mut printed = 0;
    let mut connections = Connections::default();
    loop {
        let event = tokio::select! {
            biased;
            () = signals.next() => return Ok(()),
            event = events.next() => event,
        };
        match event {
            Some(Event::Message(delivery)) if !wanted.wants(&delivery) => delivery.acknowledge(),
            Some(Event::Message(delivery)) => {
                let text = if output.json {
                    Output::wire(delivery.payload())
                } else {
                    output.message(&delivery.message, names, &moment::now())
                };
                let written = tokio::select! {
                    biased;
                    written = output.print(text) => written?,
                    // Nobody reads, and it is not known how much of it is written: it comes again.
                    () = signals.next() => return Ok(()),
                };
                if written == Printed::Closed {
                    return Ok(());
                }
                delivery.acknowledge();
                printed += 1;
                if Some(printed) == limit {
                    return Ok(());
                }
            }
            Some(Event::Connection(state)) => connections.changed(state)?,
            Some(_) => {}
            None => return Err(Failure::refused(format!("{} is connected no more", client.user()))),
        }
    }
}

/// Says when the connection is lost and made again.
#[derive(Debug, Default)]
pub(super) struct Connections {
    is_lost: bool,
}

impl Connections {
    /// # Errors
    /// If there will be none any more.
    pub(super) fn changed(&mut self, state: ConnectionState) -> Result<(), Failure> {
        match state {
            ConnectionState::Connected { .. } if self.is_lost => {
                self.is_lost = false;
                note("connected again");
            }
            ConnectionState::Connected { .. } => {}
            ConnectionState::Lost { reason, .. } => {
                if !self.is_lost {
                    note(format!("the connection is lost ({reason}); it is made again"));
                }
                self.is_lost = true;
            }
            ConnectionState::Closed(closed) => return Err(closed.into()),
        }
        Ok(())
    }
}
