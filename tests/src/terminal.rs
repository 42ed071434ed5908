//! A real terminal, without anybody in front of it: tmux, with a server of its own for each. Keys go in, what is on the screen comes out.
//!
//! Time zone, language and folders are the test's own, so that what is shown does not depend on the machine.

use std::future::Future;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::{Instant, timeout};
use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthStr;

use crate::chatd::{Chatd, chat_binary};
use crate::wait::PATIENCE;

/// How often the screen is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// A terminal in which something runs. What runs in it ends when it is dropped.
pub struct Terminal {
    folder: TempDir,
}

impl Terminal {
    /// The chat of a user. What it keeps lies in `home`.
    pub async fn chat(chatd: &Chatd, user: &str, home: &Path, columns: u16, rows: u16) -> Result<Self> {
        let server = format!("mqtt://{}", chatd.mqtt_addr());
        let binary = chat_binary().await?;
        let binary = binary.to_str().context("the path of chat")?;
        Self::start(&[binary, "--server", &server, "--user", user, "--device", "terminal"], home, columns, rows).await
    }

    /// A shell that says `ready$ `, and in which `chat` is the chat of a user.
    pub async fn shell(chatd: &Chatd, user: &str, home: &Path, columns: u16, rows: u16) -> Result<Self> {
        let binary = chat_binary().await?;
        let chat = format!("chat() {{ {} --server mqtt://{} --user {user}; }}", binary.display(), chatd.mqtt_addr());
        std::fs::write(home.join("rc"), format!("{chat}\nPS1='ready$ '\n"))?;
        let rc = home.join("rc");
        let rc = rc.to_str().context("the path of the shell's file")?;
        Self::start(&["env", &format!("ENV={rc}"), "sh", "-i"], home, columns, rows).await
    }

    async fn start(command: &[&str], home: &Path, columns: u16, rows: u16) -> Result<Self> {
        let terminal = Self { folder: tempfile::Builder::new().prefix("terminal-").tempdir()? };
        let mut tmux = terminal.command();
        tmux.args(["-u", "-f", "/dev/null", "new-session", "-d", "-x", &columns.to_string(), "-y", &rows.to_string()]);
        let home = home.to_str().context("the folder's path")?;
        for folder in ["HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME"] {
            tmux.args(["-e", &format!("{folder}={home}")]);
        }
        // What runs in it sees how it ended, and the screen stays.
        tmux.args(["-c", home, "-e", "TZ=UTC", "-e", "LC_ALL=C.UTF-8", "--"]).args(command);
        tmux.args([";", "set-option", "-g", "remain-on-exit", "on", ";", "set-option", "-g", "status", "off"]);
        terminal.run(tmux).await?;
        // Without the status line there is a row more.
        terminal.resize(columns, rows).await?;
        Ok(terminal)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(self.folder.path().join("tmux")).stdin(Stdio::null()).kill_on_drop(true);
        command.env_remove("TMUX");
        // Nobody's settings but the test's.
        for (variable, _) in std::env::vars_os().filter(|(variable, _)| variable.to_string_lossy().starts_with("CHAT_"))
        {
            command.env_remove(variable);
        }
        command
    }

    async fn run(&self, mut command: Command) -> Result<Output> {
        let output = timeout(PATIENCE, command.output()).await.context("tmux")?;
        let output = output.context("tmux is missing; install it: apt-get install tmux")?;
        ensure!(output.status.success(), "tmux: {}", String::from_utf8_lossy(&output.stderr));
        Ok(output)
    }

    async fn tmux(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command();
        command.args(arguments);
        Ok(String::from_utf8_lossy(&self.run(command).await?.stdout).into_owned())
    }

    /// Presses keys, by tmux's names: `Enter`, `C-n`, `M-Up`, `PPage`.
    pub async fn press(&self, keys: &[&str]) -> Result<()> {
        self.tmux(&[&["send-keys"], keys].concat()).await.map(drop)
    }

    /// Types a text.
    pub async fn text(&self, text: &str) -> Result<()> {
        self.tmux(&["send-keys", "-l", "--", text]).await.map(drop)
    }

    /// Pastes a text as terminals do where programs want to know (bracketed).
    pub async fn paste(&self, text: &str) -> Result<()> {
        self.tmux(&["set-buffer", "--", text]).await?;
        self.tmux(&["paste-buffer", "-p"]).await.map(drop)
    }

    /// A mouse's button, 0 for the left one and 64 and 65 for the wheel, at a column and row that are counted from 0.
    pub async fn mouse(&self, button: u8, column: usize, row: usize) -> Result<()> {
        let bytes = format!("\x1b[<{button};{};{}M", column + 1, row + 1);
        let bytes: Vec<String> = bytes.bytes().map(|byte| format!("{byte:02x}")).collect();
        let bytes: Vec<&str> = bytes.iter().map(String::as_str).collect();
        self.tmux(&[&["send-keys", "-H"], bytes.as_slice()].concat()).await.map(drop)
    }

    /// Makes it wider or narrower.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        self.tmux(&["resize-window", "-x", &columns.to_string(), "-y", &rows.to_string()]).await.map(drop)
    }

    /// What is on the screen.
    pub async fn screen(&self) -> Result<Screen> {
        Ok(Screen::new(&self.tmux(&["capture-pane", "-p"]).await?))
    }

    /// The same, with the sequences that make colours.
    pub async fn coloured(&self) -> Result<Screen> {
        Ok(Screen::new(&self.tmux(&["capture-pane", "-p", "-e"]).await?))
    }

    /// A variable of tmux's, as `pane_pid`.
    pub async fn about(&self, variable: &str) -> Result<String> {
        Ok(self.tmux(&["display-message", "-p", &format!("#{{{variable}}}")]).await?.trim().to_owned())
    }

    /// Waits for the end of what runs in it: its exit code.
    pub async fn ended(&self) -> Result<i32> {
        let end = Instant::now() + PATIENCE;
        loop {
            if self.about("pane_dead").await? == "1" {
                return Ok(self.about("pane_dead_status").await?.parse()?);
            }
            ensure!(
                Instant::now() < end,
                "it has not ended within {PATIENCE:?}; on the screen is\n{}",
                self.screen().await?
            );
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Waits until the screen is as it has to be; panics with what is there instead.
    pub async fn shows(&self, what: &str, predicate: impl Fn(&Screen) -> bool) -> Screen {
        self.look(what, || self.screen(), predicate).await
    }

    /// The same, with the sequences that make colours.
    pub async fn shows_coloured(&self, what: &str, predicate: impl Fn(&Screen) -> bool) -> Screen {
        self.look(what, || self.coloured(), predicate).await
    }

    /// Waits until a text is on the screen.
    pub async fn shows_text(&self, text: &str) -> Screen {
        self.shows(text, |screen| screen.has(text)).await
    }

    async fn look<F>(&self, what: &str, look: impl Fn() -> F, predicate: impl Fn(&Screen) -> bool) -> Screen
    where
        F: Future<Output = Result<Screen>>,
    {
        let end = Instant::now() + PATIENCE;
        loop {
            let screen = look().await.expect("tmux shows the screen");
            if predicate(&screen) {
                return screen;
            }
            assert!(Instant::now() < end, "not on the screen within {PATIENCE:?}: {what}\n{screen}");
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let mut command = std::process::Command::new("tmux");
        command.arg("-S").arg(self.folder.path().join("tmux")).arg("kill-server");
        // If it is gone already, all is well.
        drop(command.env_remove("TMUX").stdin(Stdio::null()).stderr(Stdio::null()).status());
    }
}

/// A screen as it was at some moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Screen {
    pub rows: Vec<String>,
}

impl Screen {
    fn new(text: &str) -> Self {
        Self { rows: text.lines().map(str::to_owned).collect() }
    }

    /// Whether a text is in one of its rows.
    pub fn has(&self, text: &str) -> bool {
        self.row_of(text).is_some()
    }

    /// The first row that has a text.
    pub fn row_of(&self, text: &str) -> Option<usize> {
        self.rows.iter().position(|row| row.contains(text))
    }

    /// That row's text.
    pub fn line(&self, text: &str) -> Option<&str> {
        self.rows.iter().map(String::as_str).find(|row| row.contains(text))
    }

    /// What is in a column of a row.
    pub fn cell(&self, row: usize, column: usize) -> Option<&str> {
        let mut at = 0;
        self.rows.get(row)?.graphemes(true).find(|grapheme| {
            let is_it = at <= column && column < at + grapheme.width();
            at += grapheme.width();
            is_it
        })
    }
}

impl std::fmt::Display for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.rows.iter().try_for_each(|row| writeln!(f, "|{row}"))
    }
}
