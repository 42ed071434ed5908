//! The command line of `chat`: what may be written there. Nothing is decided here.

use std::path::PathBuf;
use std::time::Duration;

use chat_client::{MessageId, Seq, UserId};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueHint};

use crate::moment::Since;

const EXAMPLES: &str = "\
Examples:
  chat --user alice                     the chat in the terminal, as alice
  chat --user alice send bob 'hello'    send a message
  make 2>&1 | chat send bob             a message for each line
  chat listen --json | jq .text         what others write, as it comes, each acknowledged when it is written
  chat history bob --since 2h           what was said in the last two hours
  chat bot echo                         somebody to talk to

Settings come from ~/.config/chat/config.toml, then from CHAT_SERVER, CHAT_USER, CHAT_PASSWORD, CHAT_TOKEN, CHAT_PROFILE and CHAT_DEVICE,
then from flags; the later wins.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage or settings, 3 the server cannot be reached, 4 the server refuses the login,
130 interrupted before it was done.";

/// A chatd server from a shell, and a chat in the terminal.
///
/// Without a command it opens the chat in the terminal.
#[derive(Debug, Parser)]
#[command(name = "chat", version, after_help = EXAMPLES, max_term_width = 120)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) flags: Flags,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// The strongest source of settings.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Flags {
    /// Where: `mqtt://HOST:PORT`, `mqtts://`, `ws://` or `wss://` [default: mqtt://127.0.0.1:1883]
    #[arg(long, value_name = "ADDRESS", global = true)]
    pub(crate) server: Option<String>,
    /// As whom
    #[arg(long, value_name = "NAME", global = true)]
    pub(crate) user: Option<String>,
    /// Which profile of the settings file [default: its default_profile]
    #[arg(long, value_name = "NAME", global = true)]
    pub(crate) profile: Option<String>,
    /// Under which name the server knows this program of the user; no two programs may share one [default: made from this machine's name]
    #[arg(long, value_name = "NAME", global = true)]
    pub(crate) device: Option<String>,
    /// Settings file [default: ~/.config/chat/config.toml, if there is one]
    #[arg(long, value_name = "FILE", global = true, value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,
    /// How long to wait for the server's answer
    #[arg(long, value_name = "SECONDS", global = true, default_value = "30", value_parser = seconds)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Send a message, or each line of the standard input as one
    ///
    /// Ends when all of it is on the server's disk. Lines that are empty are left out. A line that is refused is named on the standard error,
    /// the next ones are sent all the same, and the exit code is 1.
    Send(Send),
    /// Print what others write, until interrupted
    ///
    /// A message is acknowledged when it is printed: what was not printed comes again in the next run. It is a device of its own, and what
    /// comes while it does not run waits for it on the server.
    Listen(Listen),
    /// Print a conversation, its last 50 messages if nothing else is said
    History(History),
    /// List the conversations, the latest first
    Conversations {
        #[command(flatten)]
        form: Form,
    },
    /// Say who the server takes you for
    Whoami {
        #[command(flatten)]
        form: Form,
    },
    /// Say that you have read a conversation
    Read {
        /// With whom
        peer: UserId,
        /// Up to which number [default: the last]
        #[arg(value_parser = seq)]
        seq: Option<Seq>,
    },
    /// Give a message of yours other words
    Edit {
        /// To whom it was
        peer: UserId,
        /// Its number
        #[arg(value_parser = seq)]
        seq: Seq,
        /// The other words
        text: String,
    },
    /// Take a message of yours back, for everybody
    Unsend {
        /// To whom it was
        peer: UserId,
        /// Its number
        #[arg(value_parser = seq)]
        seq: Seq,
    },
    /// Take a message out of your history alone
    Delete {
        /// With whom
        peer: UserId,
        /// Its number
        #[arg(value_parser = seq)]
        seq: Seq,
    },
    /// Show nothing any more of what somebody sends
    Block {
        /// Who it is
        peer: UserId,
    },
    /// Show again what somebody sends from now on
    Unblock {
        /// Who it is
        peer: UserId,
    },
    /// List whom you have blocked
    Blocked {
        #[command(flatten)]
        form: Form,
    },
    /// Print what everybody writes, as an observer
    ///
    /// From now on; with --device it is a device of its own, and what comes while it does not run waits for it on the server.
    Tail(Tail),
    /// Run a bot
    #[command(subcommand)]
    Bot(Bot),
    /// Print a script that completes commands in a shell
    ///
    /// For instance: chat completions bash > ~/.local/share/bash-completion/completions/chat
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man {
        /// Write the pages of all commands into this folder instead
        #[arg(long, value_hint = ValueHint::DirPath)]
        dir: Option<PathBuf>,
    },
}

/// How it is printed.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Form {
    /// JSON, an object a line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Send {
    /// To whom
    pub(crate) peer: UserId,
    /// What [default: each line of the standard input]
    pub(crate) text: Option<String>,
    /// An id: the same again under it is not stored again. Lines have -1, -2, … behind it
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<MessageId>,
    #[command(flatten)]
    pub(crate) form: Form,
}

#[derive(Args, Debug)]
pub(crate) struct Listen {
    /// What this user writes alone; what others write waits for those who listen to them
    #[arg(long, value_name = "PEER")]
    pub(crate) from: Option<UserId>,
    /// Your own messages too, from whichever device
    #[arg(long, conflicts_with = "from")]
    pub(crate) sent: bool,
    /// End after so many
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    #[command(flatten)]
    pub(crate) form: Form,
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("amount"))]
pub(crate) struct History {
    /// With whom
    pub(crate) peer: UserId,
    /// Nothing older: 90m, 2h, 3d, 10:30 (today), 2026-11-25, 2026-11-25T10:30, 2026-11-25T10:30Z
    #[arg(long, value_name = "TIME", value_parser = Since::parse)]
    pub(crate) since: Option<Since>,
    /// Nothing from this number on
    #[arg(long, value_name = "SEQ", value_parser = seq)]
    pub(crate) before: Option<Seq>,
    /// The last N [default: 50, or all with --since]
    #[arg(long, value_name = "N", group = "amount", value_parser = limit)]
    pub(crate) limit: Option<usize>,
    /// From the first
    #[arg(long, group = "amount")]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) form: Form,
}

#[derive(Args, Debug)]
pub(crate) struct Tail {
    /// Everybody's messages: the server has to let you (auth.observers)
    #[arg(long, required = true)]
    pub(crate) observer: bool,
    /// End after so many
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    #[command(flatten)]
    pub(crate) form: Form,
}

#[derive(Clone, Copy, Debug, Subcommand)]
pub(crate) enum Bot {
    /// Says back whatever is said to it, once
    Echo,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| *seconds > 0.0);
    let timeout = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    timeout.filter(|timeout| *timeout <= Duration::from_secs(86_400)).ok_or("seconds, up to a day".to_owned())
}

fn seq(text: &str) -> Result<Seq, String> {
    text.parse().ok().and_then(Seq::new).ok_or("the number of a message: 1, 2, 3, …".to_owned())
}

fn limit(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|limit| *limit > 0).ok_or("a number, 1 or more".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn flags_stand_on_either_side() {
        for line in ["chat --user alice send bob hi", "chat send --user alice bob hi", "chat send bob hi --user alice"]
        {
            let arguments = parse(line).unwrap();
            assert_eq!(arguments.flags.user.as_deref(), Some("alice"));
            let Some(Command::Send(send)) = arguments.command else { panic!("{line}") };
            assert_eq!((send.peer.as_str(), send.text.as_deref()), ("bob", Some("hi")));
        }
        assert!(parse("chat").unwrap().command.is_none());
    }

    #[test]
    fn mistakes_are_usage() {
        for line in [
            "chat shout",
            "chat send",
            "chat send Bob hi",
            "chat send bob two words",
            "chat send bob hi --id a/b",
            "chat send bob hi --password secret",
            "chat send bob hi --timeout 0",
            "chat listen -n 0",
            "chat history bob --limit 3 --all",
            "chat history bob --before 0",
            "chat history bob --since yesteryear",
            "chat tail",
            "chat edit bob 1",
            "chat bot",
            "chat completions csh",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn help_shows_examples_and_exit_codes() {
        let help = parse("chat --help").unwrap_err();
        assert_eq!((help.kind(), help.exit_code()), (ErrorKind::DisplayHelp, 0));
        for part in ["Examples:", "Exit codes:", "CHAT_PASSWORD", "--server <ADDRESS>", "listen"] {
            assert!(help.to_string().contains(part), "{part} is missing in {help}");
        }
    }
}
