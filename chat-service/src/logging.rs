//! Log lines on stderr: for people on a terminal, one JSON object a line on request.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::settings::{LogFormat, LogLevel, LogSettings};

/// What third parties may say, unless the settings name them too. rumqttd opens an ERROR span for every publish, which costs more than the publish
/// itself (measured: 3 µs instead of 1.3); what matters of it, `broker::bus` logs.
const QUIET: &str = "rumqttd=off,hyper=warn,mqtt_protocol_core=warn";

/// Logging could not begin.
#[derive(Debug, thiserror::Error)]
#[error("logging cannot begin: {0}")]
pub struct LoggingError(String);

/// Begins logging, once per process.
///
/// # Errors
/// If something in this process logs already.
pub fn init(settings: &LogSettings) -> Result<(), LoggingError> {
    let terminal = std::io::stderr().is_terminal();
    let colour_refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let lines = tracing_subscriber::fmt().with_env_filter(filter(&settings.level)).with_writer(std::io::stderr);
    match settings.format {
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).try_init(),
        LogFormat::Pretty => lines.with_ansi(!colour_refused).try_init(),
        LogFormat::Auto => lines.with_ansi(terminal && !colour_refused).try_init(),
    }
    .map_err(|error| LoggingError(error.to_string()))
}

fn filter(level: &LogLevel) -> EnvFilter {
    // Later directives win over earlier ones for the same target.
    EnvFilter::new(format!("{QUIET},{}", level.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directives(level: &str) -> String {
        filter(&level.parse().unwrap()).to_string()
    }

    #[test]
    fn third_parties_are_quiet_unless_named() {
        assert!(directives("debug").contains("rumqttd=off"));
        let named = directives("info,rumqttd=debug");
        assert!(named.contains("rumqttd=debug") && !named.contains("rumqttd=off"), "{named}");
    }
}
