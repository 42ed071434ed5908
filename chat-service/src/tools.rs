//! The commands that work on a log instead of serving from it: what they print, and their exit codes.

use std::io::{BufWriter, IsTerminal, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::admin;
use crate::cli::EXIT_FAILURE;
use crate::envelope;
use crate::log::tools::{self, ToolError};

/// From one line of progress to the next.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// What is to be done to a log.
#[derive(Clone, Debug, PartialEq, Eq, clap::Subcommand)]
pub enum Tool {
    /// Copy the log into a folder, while chatd serves from it or not.
    Backup {
        /// Made if it is missing; it must not have a log.
        dir: PathBuf,
    },
    /// Put a backup where there is no log yet, after verifying it.
    Restore {
        /// A folder that `backup` has made.
        dir: PathBuf,
    },
    /// Walk the whole log and its index; list what is wrong, and exit with code 1 if anything is.
    Verify,
    /// Print every message as a line of JSON, in the order in which they were stored.
    Export {
        /// A file instead of the standard output.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Give room that nothing uses back to the file system. chatd must not be running.
    Compact,
}

/// Does it, in this data folder.
pub fn run(tool: &Tool, folder: &Path) -> ExitCode {
    let done = match tool {
        Tool::Backup { dir } => backup(folder, dir),
        Tool::Restore { dir } => restore(dir, folder),
        Tool::Verify => return verify(folder),
        Tool::Export { output } => export(folder, output.as_deref()),
        Tool::Compact => compact(folder),
    };
    match done {
        Ok(sentence) => {
            eprintln!("{sentence}");
            ExitCode::SUCCESS
        }
        Err(sentence) => fail(&sentence),
    }
}

fn fail(sentence: &str) -> ExitCode {
    eprintln!("chatd: {sentence}");
    ExitCode::from(EXIT_FAILURE)
}

/// A line on the terminal that says how far it is; nothing where nobody looks.
struct Bar {
    what: &'static str,
    shown_at: Option<Instant>,
    terminal: bool,
}

impl Bar {
    fn new(what: &'static str) -> Self {
        Self { what, shown_at: None, terminal: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, done: u64, of: u64) -> ControlFlow<()> {
        if self.terminal && self.shown_at.is_none_or(|shown_at| shown_at.elapsed() >= PROGRESS_INTERVAL) {
            self.shown_at = Some(Instant::now());
            let percent = done.saturating_mul(100).checked_div(of).unwrap_or(100);
            eprint!("\r{} … {percent:3} % ({done} of {of})\x1b[K", self.what);
        }
        ControlFlow::Continue(())
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.shown_at.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

fn sentence(error: ToolError) -> String {
    error.to_string()
}

fn backup(folder: &Path, dir: &Path) -> Result<String, String> {
    let absolute = std::path::absolute(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let mut bar = Bar::new("copying");
    let request = admin::Request::Backup { folder: absolute.clone() };
    let asked = admin::ask(folder, &request, &mut |done, of| {
        // Over a socket nothing can be broken off but by leaving.
        let ControlFlow::Continue(()) = bar.show(done, of) else { return };
    });
    let entries = match asked {
        Some(answer) => answer?,
        None => tools::backup(folder, &absolute, &mut |done, of| bar.show(done, of)).map_err(sentence)?,
    };
    drop(bar);
    Ok(format!("{entries} messages copied to {}", dir.display()))
}

fn restore(dir: &Path, folder: &Path) -> Result<String, String> {
    let mut bar = Bar::new("restoring");
    let entries = tools::restore(dir, folder, &mut |done, of| bar.show(done, of)).map_err(sentence)?;
    drop(bar);
    Ok(format!("{entries} messages restored to {}", folder.display()))
}

fn verify(folder: &Path) -> ExitCode {
    let mut bar = Bar::new("verifying");
    let verified = tools::verify(folder, &mut |done, of| bar.show(done, of));
    drop(bar);
    let verified = match verified {
        Ok(verified) => verified,
        Err(error) => return fail(&sentence(error)),
    };
    for problem in &verified.problems {
        println!("{problem}");
    }
    let unlisted = verified.problems_in_all - verified.problems.len() as u64;
    if unlisted > 0 {
        println!("and {unlisted} more");
    }
    eprintln!(
        "{} messages in {} conversations, {} sessions; {} messages indexed; {} problems",
        verified.entries, verified.conversations, verified.sessions, verified.indexed, verified.problems_in_all
    );
    if verified.problems_in_all == 0 { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILURE) }
}

fn export(folder: &Path, output: Option<&Path>) -> Result<String, String> {
    let to: Box<dyn Write> = match output {
        Some(file) => {
            // What people wrote is for the owner alone.
            let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
            Box::new(made.map_err(|error| format!("{}: {error}", file.display()))?)
        }
        None => Box::new(std::io::stdout().lock()),
    };
    let mut to = BufWriter::new(to);
    let mut bar = Bar::new("exporting");
    let take = |entry: &crate::log::Entry| {
        to.write_all(&envelope::encode_stored(entry))?;
        to.write_all(b"\n")
    };
    let exported = tools::export(folder, take, &mut |done, of| bar.show(done, of));
    drop(bar);
    let entries = exported.map_err(sentence)?;
    to.flush().map_err(|error| format!("writing: {error}"))?;
    Ok(format!("{entries} messages exported"))
}

fn compact(folder: &Path) -> Result<String, String> {
    let mut bar = Bar::new("compacting");
    let bytes = tools::compact(folder, &mut |done, of| bar.show(done, of)).map_err(sentence)?;
    drop(bar);
    Ok(format!("{bytes} bytes given back"))
}
