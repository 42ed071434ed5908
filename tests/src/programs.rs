//! The programs that people use: mosquitto_sub, mosquitto_pub, Node. A program that is missing fails the test and says what to install.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use crate::chatd::Chatd;
use crate::wait::PATIENCE;

const MOSQUITTO: &str = "apt-get install mosquitto-clients";
/// How long `npm ci` may take.
const INSTALL_PATIENCE: Duration = Duration::from_secs(300);

fn find(name: &str, install: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is missing; install it: {install}"))
}

fn program(name: &str, install: &str) -> Result<Command> {
    let mut command = Command::new(find(name, install)?);
    command.kill_on_drop(true).stdin(Stdio::null());
    Ok(command)
}

/// Runs `mosquitto_pub`; fails unless it succeeds.
pub async fn mosquitto_pub(chatd: &Chatd, arguments: &[&str]) -> Result<()> {
    let mut command = program("mosquitto_pub", MOSQUITTO)?;
    command.args(["-p", &chatd.mqtt_addr().port().to_string()]).args(arguments);
    let output = timeout(PATIENCE, command.output()).await.context("mosquitto_pub")??;
    ensure!(output.status.success(), "mosquitto_pub {arguments:?}: {output:?}");
    Ok(())
}

/// Runs a line as the server prints it, `'…'` understood as a shell does; returns what it wrote.
pub async fn shell(line: &str) -> Result<Output> {
    let mut command = program("sh", "a POSIX shell")?;
    Ok(timeout(PATIENCE, command.args(["-c", line]).output()).await.context(line.to_owned())??)
}

/// A running `mosquitto_sub`, or anything else that prints lines. Killed when dropped.
pub struct Subscriber {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    kept: VecDeque<String>,
}

impl Subscriber {
    /// Starts `mosquitto_sub`.
    pub fn mosquitto(chatd: &Chatd, arguments: &[&str]) -> Result<Self> {
        // It writes a message at once, but keeps what it says about itself (-d) until its buffer is full: that is not waited for.
        let mut command = program("stdbuf", "apt-get install coreutils")?;
        command.arg("-oL").arg(find("mosquitto_sub", MOSQUITTO)?);
        command.args(["-p", &chatd.mqtt_addr().port().to_string()]).args(arguments);
        Self::spawn(command)
    }

    /// Starts a line as the server prints it.
    pub fn shell(line: &str) -> Result<Self> {
        let mut command = program("sh", "a POSIX shell")?;
        // `exec`: the child is the program and not a shell around it, which would leave the program behind when it is killed.
        command.args(["-c", &format!("exec {line}")]);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Result<Self> {
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        Ok(Self { child, lines: BufReader::new(stdout).lines(), kept: VecDeque::new() })
    }

    /// With `-d`: waits until the server has granted the subscription. Messages that came before are kept.
    pub async fn subscribed(&mut self) -> Result<()> {
        loop {
            let line = self.read().await?.context("mosquitto_sub ended before it was subscribed")?;
            if line.starts_with("Subscribed ") {
                return Ok(());
            }
            if !is_debug(&line) {
                self.kept.push_back(line);
            }
        }
    }

    /// The next line that is no debug line.
    pub async fn line(&mut self) -> Result<String> {
        if let Some(line) = self.kept.pop_front() {
            return Ok(line);
        }
        loop {
            let line = self.read().await?.context("mosquitto_sub ended")?;
            if !is_debug(&line) {
                return Ok(line);
            }
        }
    }

    async fn read(&mut self) -> Result<Option<String>> {
        match timeout(PATIENCE, self.lines.next_line()).await {
            Ok(line) => Ok(line?),
            Err(_) => bail!("nothing was printed within {PATIENCE:?}"),
        }
    }

    /// Kills it and returns when it is gone.
    pub async fn kill(mut self) -> Result<()> {
        self.child.start_kill()?;
        timeout(PATIENCE, self.child.wait()).await.context("waiting for the end of a killed program")??;
        Ok(())
    }
}

/// What `mosquitto_sub -d` prints about itself.
fn is_debug(line: &str) -> bool {
    line.starts_with("Client ") || line.starts_with("Subscribed ")
}

/// Runs a script of `tests/web` in Node, its packages installed; fails with its output unless it succeeds.
pub async fn node(script: &str, arguments: &[&str]) -> Result<String> {
    node_within(PATIENCE * 2, script, arguments).await
}

/// The same, for one that takes longer.
pub async fn node_within(patience: Duration, script: &str, arguments: &[&str]) -> Result<String> {
    let folder = web().await?;
    let mut command = program("node", "apt-get install nodejs")?;
    let running = command.arg(folder.join(script)).args(arguments).current_dir(&folder).output();
    let output = timeout(patience, running).await.with_context(|| format!("node {script} {arguments:?}"))??;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "node {script} {arguments:?}: {}\n{stdout}\n{stderr}", output.status);
    Ok(stdout)
}

/// A Chromium to be run by playwright-core.
pub fn chromium() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let names = ["chromium", "chromium-browser", "google-chrome"];
    std::env::split_paths(&path)
        .flat_map(|folder| names.map(|name| folder.join(name)))
        .find(|path| path.is_file())
        .context("chromium is missing; install it: apt-get install chromium")
}

/// `tests/web` with the packages of its lock file.
async fn web() -> Result<PathBuf> {
    static INSTALLED: OnceCell<()> = OnceCell::const_new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("web");
    let install = || async {
        let modified = |path: &str| std::fs::metadata(folder.join(path)).and_then(|found| found.modified());
        // npm leaves its own copy of the lock file behind: as long as that is the newer one, there is nothing to install.
        if let (Ok(wanted), Ok(installed)) =
            (modified("package-lock.json"), modified("node_modules/.package-lock.json"))
            && installed > wanted
        {
            return Ok(());
        }
        let mut command = program("npm", "apt-get install npm")?;
        command
            .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"])
            .env("PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD", "1");
        let output = timeout(INSTALL_PATIENCE, command.current_dir(&folder).output()).await.context("npm ci")??;
        ensure!(output.status.success(), "npm ci in tests/web: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    INSTALLED.get_or_try_init(install).await?;
    Ok(folder)
}

/// A program that is talked to by lines. Killed when dropped.
pub struct Dialogue {
    name: &'static str,
    child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    /// What it has said so far.
    said: Vec<String>,
}

impl Dialogue {
    /// Starts `docs/examples/messenger.py`.
    pub async fn python(arguments: &[&str]) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples/messenger.py");
        let mut command = python().await?;
        command.arg(script).args(arguments);
        Self::spawn("messenger.py", command)
    }

    /// Starts `docs/examples/messenger.mjs`, with the packages of `tests/web`, where there is a link to it.
    pub async fn node(arguments: &[&str]) -> Result<Self> {
        let folder = web().await?;
        let mut command = program("node", "apt-get install nodejs")?;
        command.args(["--preserve-symlinks", "--preserve-symlinks-main"]);
        command.arg(folder.join("messenger.mjs")).args(arguments).current_dir(&folder);
        Self::spawn("messenger.mjs", command)
    }

    /// Starts a scenario of `tests/web/app`.
    pub async fn scenario(name: &'static str, arguments: &[&str]) -> Result<Self> {
        let folder = web().await?;
        let mut command = program("node", "apt-get install nodejs")?;
        command.arg(folder.join(format!("app/{name}.mjs"))).args(arguments).current_dir(&folder);
        Self::spawn(name, command)
    }

    fn spawn(name: &'static str, mut command: Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().context("stdin is piped")?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        Ok(Self { name, child, input, lines: BufReader::new(stdout).lines(), said: Vec::new() })
    }

    /// Writes a line to it.
    pub async fn tell(&mut self, line: &str) -> Result<()> {
        self.input.write_all(format!("{line}\n").as_bytes()).await?;
        Ok(self.input.flush().await?)
    }

    /// What it says next.
    pub async fn next_line(&mut self) -> Result<String> {
        match timeout(PATIENCE * 2, self.lines.next_line()).await {
            Ok(Ok(Some(line))) => Ok(line),
            _ => bail!("{} says nothing more", self.name),
        }
    }

    /// Waits until it has said this line, now or before.
    pub async fn says(&mut self, wanted: &str) -> Result<()> {
        while !self.said.iter().any(|line| line == wanted) {
            match timeout(PATIENCE, self.lines.next_line()).await {
                Ok(Ok(Some(line))) => self.said.push(line),
                _ => bail!("{} does not say {wanted:?}, but {:?}", self.name, self.said),
            }
        }
        Ok(())
    }

    /// Ends its input, and waits until it ends.
    pub async fn quit(mut self) -> Result<()> {
        // It may have ended by itself.
        drop(self.tell("/quit").await);
        let status = timeout(PATIENCE, self.child.wait()).await.context("waiting for the end of a program")??;
        ensure!(status.success(), "{}: {status}", self.name);
        Ok(())
    }
}

/// A Python that has paho-mqtt.
async fn python() -> Result<Command> {
    const INSTALL: &str = "apt-get install python3-paho-mqtt";
    for python in ["python3", "/usr/bin/python3"] {
        let has_paho = Command::new(python).args(["-c", "import paho.mqtt.client"]).stderr(Stdio::null()).status();
        if has_paho.await.is_ok_and(|status| status.success()) {
            let mut command = Command::new(python);
            command.kill_on_drop(true);
            return Ok(command);
        }
    }
    bail!("there is no python3 with paho-mqtt; install it: {INSTALL}")
}
