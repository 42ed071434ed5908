//! A real `chatd` process with a store of its own, on free ports of loopback.
//!
//! It signals no process that it did not start. Its log is kept, and its place printed, when the test that uses it fails.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use crate::wait::PATIENCE;

/// What a chatd is started with, besides ports and folders.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub arguments: Vec<String>,
    pub environment: Vec<(String, String)>,
}

impl Options {
    /// The key as in `config/chatd.toml`, e.g. `limits.window`.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        let variable = format!("CHATD__{}", key.to_uppercase().replace('.', "__"));
        self.environment.push((variable, value.to_string()));
        self
    }
}

impl Options {
    /// Without the limits on how fast clients may be: for tests that are faster than any decent client.
    #[must_use]
    pub fn as_fast_as_it_can(self) -> Self {
        let rates = [
            "publishes_per_s",
            "publish_bytes_per_s",
            "user_publishes_per_s",
            "user_publish_bytes_per_s",
            "new_conversations_per_hour",
        ];
        rates.into_iter().fold(self, |options, rate| options.set(&format!("limits.{rate}"), 0))
    }
}

/// A running chatd. Killed when dropped.
pub struct Chatd {
    options: Options,
    /// Folder for data and logs.
    folder: Option<TempDir>,
    child: Child,
    mqtt: SocketAddr,
    http: SocketAddr,
    greeting: Arc<Mutex<String>>,
}

impl Chatd {
    /// With default settings.
    pub async fn start() -> Result<Self> {
        Self::start_with(Options::default()).await
    }

    /// With these.
    pub async fn start_with(options: Options) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("chatd-test-").tempdir()?;
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let started = spawn(&options, folder.path(), any, any).await;
        let (child, mqtt, http, greeting) = match started {
            Ok(started) => started,
            Err(error) => {
                let folder = folder.keep();
                return Err(error.context(format!("chatd did not start; its log: {}", log_path(&folder).display())));
            }
        };
        Ok(Self { options, folder: Some(folder), child, mqtt, http, greeting })
    }

    /// Where it takes MQTT over TCP.
    pub fn mqtt_addr(&self) -> SocketAddr {
        self.mqtt
    }

    /// Where it takes HTTP and WebSocket.
    pub fn http_addr(&self) -> SocketAddr {
        self.http
    }

    /// What it has printed on stdout.
    pub fn greeting(&self) -> String {
        self.greeting.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The folder of its messages.
    pub fn data(&self) -> PathBuf {
        self.folder().join("data")
    }

    /// What it has logged so far.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(log_path(self.folder()))?)
    }

    fn folder(&self) -> &Path {
        self.folder.as_ref().expect("only a dropped chatd has no folder").path()
    }

    /// Its number, for who looks at it from outside.
    pub fn process_id(&self) -> Result<u32> {
        self.child.id().context("chatd has ended")
    }

    fn pid(&self) -> Result<Pid> {
        Pid::from_raw(self.process_id()?.try_into()?).context("its process id is 0")
    }

    /// Lets no file of its grow beyond so many bytes, as a full disk does; `None`: as far as the system lets it.
    pub fn limit_file_bytes(&self, bytes: Option<u64>) -> Result<()> {
        let unlimited = Rlimit { current: None, maximum: None };
        prlimit(Some(self.pid()?), Resource::Fsize, Rlimit { current: bytes, ..unlimited })?;
        Ok(())
    }

    /// Runs `chatd` with these arguments on the same data; its exit code, standard output and standard error.
    pub async fn tool(&self, arguments: &[&str]) -> Result<(Option<i32>, String, String)> {
        let output = command().await?.arg("--data").arg(self.data()).args(arguments).output();
        let output = timeout(PATIENCE, output).await.context("waiting for a tool")??;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((output.status.code(), text(output.stdout), text(output.stderr)))
    }

    /// SIGKILL. Returns when it is gone.
    pub async fn kill9(&mut self) -> Result<()> {
        ensure!(self.child.try_wait()?.is_none(), "chatd had ended by itself");
        self.child.start_kill()?;
        timeout(PATIENCE, self.child.wait()).await.context("waiting for the end of a killed chatd")??;
        Ok(())
    }

    /// SIGTERM, without waiting.
    pub fn signal_terminate(&self) -> Result<()> {
        Ok(kill_process(self.pid()?, Signal::TERM)?)
    }

    /// SIGHUP: read files again.
    pub fn signal_hangup(&self) -> Result<()> {
        Ok(kill_process(self.pid()?, Signal::HUP)?)
    }

    /// SIGSTOP: it does nothing until it is told to go on.
    pub fn signal_stop(&self) -> Result<()> {
        Ok(kill_process(self.pid()?, Signal::STOP)?)
    }

    /// SIGCONT.
    pub fn signal_continue(&self) -> Result<()> {
        Ok(kill_process(self.pid()?, Signal::CONT)?)
    }

    /// SIGINT, without waiting.
    pub fn signal_interrupt(&self) -> Result<()> {
        Ok(kill_process(self.pid()?, Signal::INT)?)
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> Result<ExitStatus> {
        Ok(timeout(PATIENCE, self.child.wait()).await.context("waiting for the end of chatd")??)
    }

    /// SIGTERM; returns how it ended.
    pub async fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal_terminate()?;
        self.ended().await
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Starts it again on the same data and other ports, after [`Chatd::kill9`] or [`Chatd::terminate`].
    pub async fn restart(&mut self) -> Result<()> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        self.restart_on(any, any).await
    }

    /// Starts it again on the same data and other ports with other settings.
    pub async fn restart_with(&mut self, options: Options) -> Result<()> {
        self.options = options;
        self.restart().await
    }

    /// Starts it again on the same data and the same ports, for programs that connect again by themselves.
    pub async fn restart_on_same_ports(&mut self) -> Result<()> {
        self.restart_on(self.mqtt, self.http).await
    }

    async fn restart_on(&mut self, mqtt: SocketAddr, http: SocketAddr) -> Result<()> {
        ensure!(self.child.try_wait()?.is_some(), "chatd still runs");
        let (child, mqtt, http, greeting) = spawn(&self.options, self.folder(), mqtt, http).await?;
        self.child = child;
        self.mqtt = mqtt;
        self.http = http;
        self.greeting = greeting;
        Ok(())
    }

    /// Memory of its own that is in RAM: what it allocated, without the files it maps.
    pub fn memory_kb(&self) -> Result<u64> {
        let rss = self.status_kb("RssAnon").or_else(|_| self.status_kb("VmRSS"));
        rss.context("no RssAnon and no VmRSS in /proc/…/status")
    }

    /// Memory that it has asked for, whether it was touched or not.
    pub fn reserved_kb(&self) -> Result<u64> {
        self.status_kb("VmData")
    }

    fn status_kb(&self, name: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?.as_raw_nonzero()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
        Ok(line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse()?)
    }

    /// Open file descriptors.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid()?.as_raw_nonzero()))?.count())
    }

    /// What is only there while clients are: connections, and the entries of the edge's maps, by name.
    pub async fn traces(&self) -> Result<BTreeMap<String, f64>> {
        let mut traces = self.metrics().await?;
        traces.retain(|name, _| name == "chatd_connections" || name.starts_with("chatd_edge_entries{"));
        // Some tasks and retained messages are the server's own, and begin a little later; and what is retained stays when its client goes.
        traces.retain(|name, _| !name.contains("\"tasks\"") && !name.contains("\"retained"));
        ensure!(traces.len() > 1, "no chatd_edge_entries in /metrics");
        Ok(traces)
    }

    /// Every series of `/metrics` under its full name, labels included.
    pub async fn metrics(&self) -> Result<BTreeMap<String, f64>> {
        let (status, body) = self.get("/metrics").await?;
        ensure!(status == 200, "/metrics answered {status}");
        let series = body.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Ok(series.collect())
    }

    /// The sum of the series of that name, whatever their labels.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let metrics = self.metrics().await?;
        let is_it =
            |series: &str| series.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'));
        Ok(metrics.iter().filter(|(series, _)| is_it(series)).map(|(_, value)| value).sum())
    }

    /// How often this limit bit.
    pub async fn limited(&self, limit: &str) -> Result<f64> {
        let series = format!("chatd_limited_total{{limit=\"{limit}\"}}");
        Ok(self.metrics().await?.get(&series).copied().unwrap_or_default())
    }

    /// Status and body of `/healthz`.
    pub async fn healthz(&self) -> Result<(u16, String)> {
        self.get("/healthz").await
    }

    /// GET of any path.
    pub async fn get(&self, path: &str) -> Result<(u16, String)> {
        let asking = async {
            let mut stream = TcpStream::connect(self.http).await?;
            let request = format!("GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.http);
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            let (head, body) = answer.split_once("\r\n\r\n").context("an HTTP answer without an end of its head")?;
            let status = head.split(' ').nth(1).context("an HTTP answer without status")?.parse()?;
            ensure!(!head.to_ascii_lowercase().contains("transfer-encoding"), "a chunked answer: read it properly");
            anyhow::Ok((status, body.to_owned()))
        };
        timeout(PATIENCE, asking).await.with_context(|| format!("GET {path}"))?
    }
}

impl Drop for Chatd {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(folder) = self.folder.take()
        {
            println!("chatd's log and data are kept: {}", log_path(&folder.keep()).display());
        }
    }
}

fn log_path(folder: &Path) -> PathBuf {
    folder.join("chatd.log")
}

async fn spawn(
    options: &Options,
    folder: &Path,
    mqtt: SocketAddr,
    http: SocketAddr,
) -> Result<(Child, SocketAddr, SocketAddr, Arc<Mutex<String>>)> {
    let log = std::fs::File::options().create(true).append(true).open(log_path(folder))?;
    let mut child = command()
        .await?
        .args(["--mqtt-listen", &mqtt.to_string(), "--http-listen", &http.to_string()])
        .args(log_format(options))
        .arg("--data")
        .arg(folder.join("data"))
        .args(&options.arguments)
        .envs(options.environment.iter().cloned())
        // No config/chatd.toml of the checkout.
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()?;
    let stdout = child.stdout.take().context("stdout is piped")?;
    let mut lines = BufReader::new(stdout).lines();
    let greeting = Arc::new(Mutex::new(String::new()));
    let keep = |greeting: &Mutex<String>, line: &str| {
        let mut text = greeting.lock().unwrap_or_else(PoisonError::into_inner);
        text.push_str(line);
        text.push('\n');
    };
    let learning = async {
        let (mut mqtt, mut http) = (None, None);
        loop {
            if let (Some(mqtt), Some(http)) = (mqtt, http) {
                return Ok((mqtt, http));
            }
            let Some(line) = lines.next_line().await? else {
                let written = std::fs::read_to_string(log_path(folder))?;
                let last: Vec<&str> = written.lines().rev().take(5).collect();
                bail!("chatd ended before it listened: {last:#?}");
            };
            keep(&greeting, &line);
            if let Some(address) = line.strip_prefix("mqtt listening on ") {
                mqtt = Some(address.trim().parse().context(line.clone())?);
            }
            if let Some(address) = line.strip_prefix("http listening on ") {
                http = Some(address.trim().parse().context(line.clone())?);
            }
        }
    };
    let (mqtt, http) = timeout(PATIENCE, learning).await.context("waiting for chatd to say where it listens")??;
    let rest = Arc::clone(&greeting);
    // Ends with the process, which owns the other end of the pipe.
    tokio::spawn(async move {
        while let Ok(Some(line)) = lines.next_line().await {
            keep(&rest, &line);
        }
    });
    Ok((child, mqtt, http, greeting))
}

/// JSON, which can be read again, unless a test wants to see what people see.
fn log_format(options: &Options) -> &'static [&'static str] {
    let is_set = options.environment.iter().any(|(variable, _)| variable == "CHATD__LOG__FORMAT");
    if is_set { &[] } else { &["--log-format", "json"] }
}

/// `chatd` with no arguments yet and none of our environment's settings; killed when dropped.
pub async fn command() -> Result<Command> {
    let mut command = Command::new(binary().await?);
    for (variable, _) in std::env::vars().filter(|(variable, _)| variable.starts_with("CHATD__")) {
        command.env_remove(variable);
    }
    command.kill_on_drop(true);
    Ok(command)
}

/// `CHATD_BIN`, or `chatd` beside the folder of the test executable; built once if it is not there or older than its sources.
async fn binary() -> Result<PathBuf> {
    static BINARY: OnceCell<PathBuf> = OnceCell::const_new();
    let sources = ["protocol/src", "broker/src", "chat-service/src", "config"];
    BINARY.get_or_try_init(|| find("chatd", "CHATD_BIN", &sources)).await.cloned()
}

/// `CHAT_BIN`, or `chat` beside the folder of the test executable, built like chatd.
pub(crate) async fn chat_binary() -> Result<PathBuf> {
    static BINARY: OnceCell<PathBuf> = OnceCell::const_new();
    let sources = ["protocol/src", "clients/rust/src", "clients/cli/src"];
    BINARY.get_or_try_init(|| find("chat", "CHAT_BIN", &sources)).await.cloned()
}

/// `chat-bench`, from `CHAT_BENCH_BIN` or built like chatd, with no arguments yet; killed when dropped.
pub async fn bench_command() -> Result<Command> {
    static BINARY: OnceCell<PathBuf> = OnceCell::const_new();
    let sources = ["protocol/src", "chat-service/src", "bench/src"];
    let path = BINARY.get_or_try_init(|| find("chat-bench", "CHAT_BENCH_BIN", &sources)).await?;
    let mut command = Command::new(path);
    command.kill_on_drop(true);
    Ok(command)
}

async fn find(name: &str, variable: &str, sources: &[&str]) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "{variable}={} is no file", path.display());
        return Ok(std::path::absolute(path)?);
    }
    let profile = profile()?;
    let path = profile.join(name);
    if path.metadata().and_then(|built| built.modified()).ok() < newest_source(sources)? {
        build(name, profile.ends_with("release")).await?;
        ensure!(path.is_file(), "cargo build made no {}", path.display());
    }
    Ok(path)
}

/// Where cargo puts what belongs to the test executable: `target/debug` of `target/debug/deps/end_to_end-0123`. The tests in documentation
/// lie in a folder of their own.
fn profile() -> Result<PathBuf> {
    let executable = std::env::current_exe()?;
    if let Some(folder) = executable.parent().filter(|folder| folder.ends_with("deps")) {
        return Ok(folder.parent().context("target/*/deps has a parent")?.to_owned());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().map(|root| root.join("target")), |path| Ok(path.into()))?;
    Ok(target.join("debug"))
}

fn root() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("tests/ lies in the repository")
}

/// When sources were changed last.
fn newest_source(sources: &[&str]) -> Result<Option<SystemTime>> {
    let root = root()?;
    let mut newest = None;
    let mut folders: Vec<PathBuf> = sources.iter().map(|path| root.join(path)).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            let about = entry.metadata()?;
            if about.is_dir() {
                folders.push(entry.path());
            } else {
                newest = newest.max(Some(about.modified()?));
            }
        }
    }
    Ok(newest)
}

async fn build(name: &str, release: bool) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let building = Command::new(cargo)
        // With the whole workspace's features, as the tests are built: else most of it would be built twice.
        .args(["build", "--workspace", "--bin", name])
        .args(release.then_some("--release"))
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .kill_on_drop(true)
        .status();
    let status = timeout(Duration::from_secs(1_200), building).await.with_context(|| format!("building {name}"))??;
    ensure!(status.success(), "building {name} failed");
    Ok(())
}
