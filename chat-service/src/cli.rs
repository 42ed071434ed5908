//! The command line of `chatd`: what may be written there, and its exit codes.
//!
//! Values are not judged here but with all other settings in [`crate::settings`], so that a flag, an environment variable and a
//! file are refused with the same sentence.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};

use crate::auth::command::Passwd;
use crate::server;
use crate::settings::Settings;
use crate::tls::Tls;
use crate::tools::Tool;

/// Something failed while running: a port in use, a damaged log.
pub const EXIT_FAILURE: u8 = 1;
/// The command line or the settings are wrong; trying again will not help. Also clap's own code.
pub const EXIT_USAGE: u8 = 2;

const EXAMPLES: &str = "\
Examples:
  chatd                                      listen on 127.0.0.1:1883 (MQTT) and 127.0.0.1:8080 (HTTP, WebSocket)
  chatd --data /var/lib/chatd                keep messages there
  chatd --mqtt-listen 127.0.0.1:0            take a free port and print it
  CHATD__LIMITS__MESSAGE_BYTES=4096 chatd    any key of config/chatd.toml, from the environment
  chatd --config chatd.toml check-config     are these settings right, and what do they amount to?
  chatd --data /var/lib/chatd backup DIR     copy all messages, while chatd runs
  chatd --data /var/lib/chatd verify         is every message there, whole and in its place?
  chatd passwd add alice --file users        give alice a password, or another one

Exit codes: 0 stopped as asked, 1 failure, 2 wrong usage or settings.";

/// A self-hosted chat server over plain MQTT.
#[derive(Debug, Parser)]
#[command(name = "chatd", version, after_help = EXAMPLES)]
struct CommandLine {
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print the effective settings as TOML and exit; if they or a file that they name are wrong, say why and exit with code 2.
    CheckConfig,
    /// Users and their passwords.
    #[command(subcommand)]
    Passwd(Passwd),
    #[command(flatten)]
    Tool(Tool),
}

/// The flags, as written: the last and strongest source of settings.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Settings file [default: config/chatd.toml, if there is one]
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// Address and port for MQTT [mqtt.listen]
    #[arg(long, value_name = "ADDR", global = true)]
    pub mqtt_listen: Option<String>,
    /// Address and port for HTTP and WebSocket [http.listen]
    #[arg(long, value_name = "ADDR", global = true)]
    pub http_listen: Option<String>,
    /// Folder for messages and sessions [storage.path]
    #[arg(long, value_name = "DIR", global = true)]
    pub data: Option<String>,
    /// error, warn, info, debug, trace, or EnvFilter directives [log.level]
    #[arg(long, value_name = "L", global = true)]
    pub log_level: Option<String>,
    /// auto, pretty or json [log.format]
    #[arg(long, value_name = "F", global = true)]
    pub log_format: Option<String>,
}

/// A flag that sets a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Override<'a> {
    /// As it is written, e.g. `--mqtt-listen`.
    pub flag: &'static str,
    /// The key that it sets, e.g. `mqtt.listen`.
    pub key: &'static str,
    /// Its value, unjudged.
    pub value: &'a str,
}

impl Flags {
    /// The keys that were set by flags.
    pub fn overrides(&self) -> impl Iterator<Item = Override<'_>> {
        [
            ("--mqtt-listen", "mqtt.listen", &self.mqtt_listen),
            ("--http-listen", "http.listen", &self.http_listen),
            ("--data", "storage.path", &self.data),
            ("--log-level", "log.level", &self.log_level),
            ("--log-format", "log.format", &self.log_format),
        ]
        .into_iter()
        .filter_map(|(flag, key, value)| value.as_deref().map(|value| Override { flag, key, value }))
    }
}

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve until stopped.
    Run(Flags),
    /// Judge the settings and print them.
    CheckConfig(Flags),
    /// Work on the password file.
    Passwd(Flags, Passwd),
    /// Work on the log instead of serving from it.
    Tool(Flags, Tool),
}

impl From<CommandLine> for Command {
    fn from(line: CommandLine) -> Self {
        match line.action {
            None => Self::Run(line.flags),
            Some(Action::CheckConfig) => Self::CheckConfig(line.flags),
            Some(Action::Passwd(passwd)) => Self::Passwd(line.flags, passwd),
            Some(Action::Tool(tool)) => Self::Tool(line.flags, tool),
        }
    }
}

/// Reads the process's own command line. On `--help`, `--version` and mistakes it prints and exits (0, 0 and [`EXIT_USAGE`]).
pub fn parse() -> Command {
    CommandLine::parse().into()
}

/// `chatd check-config`: what it prints is itself a settings file.
pub fn check_config(flags: &Flags) -> ExitCode {
    let checked = Settings::load(flags).map_err(|error| error.to_string()).and_then(|settings| {
        check_files(&settings)?;
        Ok(settings)
    });
    match checked {
        Ok(settings) => {
            let text = format!("# ok: the effective settings\n{}", settings.to_toml());
            match std::io::stdout().write_all(text.as_bytes()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("chatd: writing the settings: {error}");
                    ExitCode::from(EXIT_FAILURE)
                }
            }
        }
        Err(error) => {
            eprintln!("chatd: {error}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

/// The files that the settings name: users, keys, rights, certificates.
fn check_files(settings: &Settings) -> Result<(), String> {
    let authorities = Arc::default();
    server::auth(settings, &authorities).map_err(|error| error.to_string())?;
    Tls::new(&settings.tls, settings.acme.is_on(), settings.limits.tls_timeout, authorities)
        .map_err(|error| error.to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn command(line: &str) -> Result<Command, clap::Error> {
        CommandLine::try_parse_from(line.split_whitespace()).map(Command::from)
    }

    #[test]
    fn the_definition_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn nothing_means_run() {
        assert_eq!(command("chatd").unwrap(), Command::Run(Flags::default()));
    }

    #[test]
    fn flags_become_overrides_of_keys() {
        let line = "chatd --config a.toml --mqtt-listen 127.0.0.1:0 --http-listen [::1]:1 --data d --log-level debug --log-format json";
        let Command::Run(flags) = command(line).unwrap() else { panic!("no subcommand was given") };
        assert_eq!(flags.config, Some("a.toml".into()));
        let overrides: Vec<_> = flags.overrides().map(|o| (o.flag, o.key, o.value)).collect();
        assert_eq!(
            overrides,
            [
                ("--mqtt-listen", "mqtt.listen", "127.0.0.1:0"),
                ("--http-listen", "http.listen", "[::1]:1"),
                ("--data", "storage.path", "d"),
                ("--log-level", "log.level", "debug"),
                ("--log-format", "log.format", "json"),
            ]
        );
    }

    #[test]
    fn check_config_takes_flags_on_either_side() {
        let expected = Command::CheckConfig(Flags { config: Some("a.toml".into()), ..Flags::default() });
        assert_eq!(command("chatd --config a.toml check-config").unwrap(), expected);
        assert_eq!(command("chatd check-config --config a.toml").unwrap(), expected);
    }

    #[test]
    fn tools_take_flags_on_either_side() {
        let flags = Flags { data: Some("d".to_owned()), ..Flags::default() };
        let backup = Command::Tool(flags.clone(), Tool::Backup { dir: "copy".into() });
        assert_eq!(command("chatd --data d backup copy").unwrap(), backup);
        assert_eq!(command("chatd backup copy --data d").unwrap(), backup);
        assert_eq!(command("chatd --data d verify").unwrap(), Command::Tool(flags, Tool::Verify));
    }

    #[test]
    fn mistakes_are_usage() {
        for line in [
            "chatd --port 1883",
            "chatd serve",
            "chatd --config",
            "chatd extra words",
            "chatd backup",
            "chatd verify DIR",
        ] {
            assert_eq!(command(line).unwrap_err().exit_code(), i32::from(EXIT_USAGE), "{line}");
        }
    }

    #[test]
    fn help_shows_examples_and_exit_codes() {
        let help = command("chatd --help").unwrap_err();
        assert_eq!((help.kind(), help.exit_code()), (ErrorKind::DisplayHelp, 0));
        let text = help.to_string();
        for part in ["check-config", "Examples:", "Exit codes:", "--mqtt-listen <ADDR>"] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
        let version = command("chatd --version").unwrap_err();
        assert_eq!((version.kind(), version.exit_code()), (ErrorKind::DisplayVersion, 0));
    }
}
