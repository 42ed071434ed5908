//! `chat`, the command, as somebody uses it on a machine of their own: with a home folder, and with settings from nowhere else.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Output, Stdio};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::chatd::{Chatd, chat_binary};
use crate::wait::PATIENCE;

/// Somebody with a machine.
pub struct Person {
    name: &'static str,
    server: SocketAddr,
    home: TempDir,
}

/// How a command ended.
#[derive(Debug)]
pub struct Done {
    /// `None`: by a signal.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Done {
    /// Each line of the standard output as JSON.
    pub fn json(&self) -> Vec<Value> {
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        self.out.lines().map(parse).collect()
    }

    /// The member of each line that is a number.
    pub fn numbers(&self, member: &str) -> Vec<u64> {
        self.json().iter().map(|line| line[member].as_u64().unwrap_or_else(|| panic!("{line}"))).collect()
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Person {
    /// Whose server this is.
    pub fn new(name: &'static str, chatd: &Chatd) -> Result<Self> {
        Ok(Self { name, server: chatd.mqtt_addr(), home: tempfile::Builder::new().prefix("home-").tempdir()? })
    }

    /// The home folder.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// A program on this machine, with `CHAT_SERVER` and `CHAT_USER` set.
    pub fn program(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("CHAT_") || variable.to_string_lossy().starts_with("XDG_") {
                command.env_remove(variable);
            }
        }
        command
            .env("HOME", self.home())
            .env("TZ", "UTC")
            .env("LC_ALL", "C.UTF-8")
            .env("CHAT_SERVER", format!("mqtt://{}", self.server))
            .env("CHAT_USER", self.name)
            .current_dir(self.home())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// `chat` with these arguments.
    pub async fn chat(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.program(chat_binary().await?);
        command.args(arguments);
        Ok(command)
    }

    /// A line for a shell, in which `$CHAT` is chat.
    pub async fn shell(&self, line: &str) -> Result<Command> {
        let mut command = self.program("sh");
        command.args(["-c", line]).env("CHAT", chat_binary().await?);
        Ok(command)
    }

    /// Runs `chat` to its end.
    pub async fn run(&self, arguments: &[&str]) -> Result<Done> {
        ended(self.chat(arguments).await?).await
    }

    /// The same with something on its standard input.
    pub async fn run_with(&self, arguments: &[&str], input: impl Into<Vec<u8>>) -> Result<Done> {
        let mut child = self.chat(arguments).await?.stdin(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("stdin is piped")?;
        let input = input.into();
        // It may end without reading all of it.
        let writing = tokio::spawn(async move { stdin.write_all(&input).await });
        let output = timeout(PATIENCE, child.wait_with_output()).await.with_context(|| format!("{arguments:?}"))??;
        drop(writing.await?);
        Ok(output.into())
    }

    /// Starts `chat`, and reads what it prints as it comes.
    pub async fn start(&self, arguments: &[&str]) -> Result<Running> {
        Running::new(self.chat(arguments).await?)
    }
}

/// Runs a command to its end.
pub async fn ended(mut command: Command) -> Result<Done> {
    let output = timeout(PATIENCE, command.output()).await.with_context(|| format!("{command:?}"))??;
    Ok(output.into())
}

/// A running command. Killed when dropped.
pub struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// Until it is closed.
    pub stdin: Option<ChildStdin>,
}

impl Running {
    /// Starts it.
    pub fn new(mut command: Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let stdin = child.stdin.take();
        Ok(Self { child, lines: BufReader::new(stdout).lines(), stdin })
    }

    /// The next line; `None` at the end.
    pub async fn line(&mut self) -> Result<Option<String>> {
        Ok(timeout(PATIENCE, self.lines.next_line()).await.context("a line in time")??)
    }

    /// The next line as JSON.
    pub async fn json(&mut self) -> Result<Option<Value>> {
        self.line().await?.map(|line| serde_json::from_str(&line).context(line)).transpose()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let number = self.child.id().context("it has ended")?;
        Ok(kill_process(Pid::from_raw(number.try_into()?).context("its process id is 0")?, signal)?)
    }

    /// Its exit code, when it has ended; `None`: by a signal. What it printed can still be read.
    pub async fn ended(&mut self) -> Result<Option<i32>> {
        Ok(timeout(PATIENCE, self.child.wait()).await.context("its end in time")??.code())
    }
}
