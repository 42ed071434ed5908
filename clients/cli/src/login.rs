//! Connecting; and asking for a password where the server wants one, nobody gave one, and somebody sits at the terminal.

use std::fs::File;
use std::io::IsTerminal as _;

use chat_client::{Client, Closed, ConnectError, Events, Listen, Options};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use tokio::sync::SetOnce;

use crate::commands::note;
use crate::failure::Failure;
use crate::safe;
use crate::settings::{self, Credential, Settings};
use crate::signals::Signals;

/// Whether a password was asked for.
static ASKED: SetOnce<()> = SetOnce::const_new();

/// Connects with these options.
pub(crate) async fn connect(
    settings: &mut Settings,
    options: impl Fn(&Settings) -> Result<Options, Failure>,
) -> Result<(Client, Events), Failure> {
    match Client::connect(options(settings)?).await {
        Err(ConnectError::Closed(Closed::LoginRefused(_))) if can_ask(settings) => {
            ask(settings).await?;
            tokio::select! {
                connected = Client::connect(options(settings)?) => Ok(connected?),
                interrupted = interrupted() => Err(interrupted),
            }
        }
        outcome => outcome.map_err(|error| of(settings, error)),
    }
}

/// A server that cannot be reached is named.
pub(crate) fn of(settings: &Settings, error: ConnectError) -> Failure {
    let is_elsewhere = matches!(error, ConnectError::Unreachable(_));
    let failure = Failure::from(error);
    if is_elsewhere { failure.of(&settings.server) } else { failure }
}

/// Asks for a password if the server will want one. If it cannot be reached, nothing is asked: that shows later.
pub(crate) async fn prepare(settings: &mut Settings) -> Result<(), Failure> {
    if !can_ask(settings) {
        return Ok(());
    }
    match Client::connect(settings.temporary()?.listen(Listen::Nothing)).await {
        Ok((client, _)) => client.close().await,
        Err(ConnectError::Closed(Closed::LoginRefused(_))) => ask(settings).await?,
        Err(_) => {}
    }
    Ok(())
}

/// Waits for a signal once a password was asked for: since then none ends this process by itself.
pub(crate) async fn interrupted() -> Failure {
    ASKED.wait().await;
    match Signals::new() {
        Ok(mut signals) => {
            signals.next().await;
            Failure::interrupted("interrupted")
        }
        Err(failure) => failure,
    }
}

/// Whether a password may help, and somebody is there to give one.
pub(crate) fn can_ask(settings: &Settings) -> bool {
    settings.credential == Credential::None && std::io::stderr().is_terminal() && File::open("/dev/tty").is_ok()
}

/// Asks for a password, for the next connection.
pub(crate) async fn ask(settings: &mut Settings) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::usage(format!("asking for a password: {error}"));
    let prompt = format!("Password of {} at {}: ", settings.user, safe::line(&settings.server));
    if let Some(warning) = settings::unencrypted(&settings.server) {
        note(warning);
    }
    let terminal = File::open("/dev/tty").map_err(|error| failed(&error))?;
    let before = tcgetattr(&terminal).map_err(|error| failed(&error))?;
    // From here on a signal does not end us while nothing that is typed can be seen.
    let mut signals = Signals::new()?;
    // Before the question is there: who types ahead is not to be read by others either.
    let mut hidden = before.clone();
    hidden.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&terminal, OptionalActions::Now, &hidden).map_err(|error| failed(&error))?;
    let answer = tokio::task::spawn_blocking(move || rpassword::prompt_password(prompt));
    let answer = tokio::select! {
        answer = answer => answer.map_err(|error| failed(&error)),
        () = signals.next() => Ok(Err(std::io::ErrorKind::Interrupted.into())),
    };
    tcsetattr(&terminal, OptionalActions::Now, &before).map_err(|error| failed(&error))?;
    let password = answer?.map_err(|error| match error.kind() {
        // Ctrl-C, or a signal.
        std::io::ErrorKind::Interrupted => Failure::interrupted("nobody gave a password"),
        _ => failed(&error),
    })?;
    settings.credential = Credential::Password(password);
    // Twice is no more than once.
    ASKED.set(()).ok();
    Ok(())
}
