//! What an operator asks of a running server, over a Unix socket in the data folder.
//!
//! Whoever may write to the folder may ask; nobody else can reach the socket. A request is a line of JSON, and so is each answer: how far it
//! is, as often as there is room to say so, and at the end what came of it. A client that leaves has had enough: what was begun is undone.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::log::{Log, RedbLog};

/// The socket's name in the data folder.
pub const SOCKET_NAME: &str = "admin.sock";
/// Clients at once; more wait.
const CLIENTS_MAX: usize = 4;
/// The longest request.
const REQUEST_BYTES_MAX: u64 = 64 * 1024;
/// Progress that may wait for a client; what does not fit is not said.
const PROGRESS_WAITING_MAX: usize = 4;

/// What may be asked.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Copy the log into this folder, an absolute path on the server's machine.
    Backup { folder: PathBuf },
}

/// What is answered.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// So far, of so many.
    Progress { done: u64, of: u64 },
    /// It is done, for so many entries.
    Done { entries: u64 },
    /// It is not, and why.
    Error(String),
}

/// Makes the socket, in place of one that a killed server left behind.
///
/// # Errors
/// If the folder cannot be written, or the path is too long for a socket (some 100 bytes).
pub fn bind(folder: &Path) -> std::io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join(SOCKET_NAME);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers until told to stop; what is under way is then undone.
pub async fn run(listener: UnixListener, log: Arc<RedbLog>, stopping: watch::Receiver<bool>) {
    let mut clients = JoinSet::new();
    let mut stopped = std::pin::pin!(stopped(stopping.clone()));
    loop {
        tokio::select! {
            () = &mut stopped => break,
            accepted = listener.accept(), if clients.len() < CLIENTS_MAX => match accepted {
                Ok((stream, _)) => {
                    clients.spawn(serve(stream, Arc::clone(&log), stopping.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "the admin socket does not accept");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
            Some(ended) = clients.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "an admin request panicked");
                }
            }
        }
    }
    clients.join_all().await;
}

async fn stopped(mut stopping: watch::Receiver<bool>) {
    drop(stopping.wait_for(|stop| *stop).await);
}

async fn serve(stream: UnixStream, log: Arc<RedbLog>, stopping: watch::Receiver<bool>) {
    let (reading, mut writing) = stream.into_split();
    let mut reading = BufReader::new(reading.take(REQUEST_BYTES_MAX));
    let mut line = String::new();
    let request = match reading.read_line(&mut line).await {
        Ok(0) => return,
        Ok(_) => serde_json::from_str(&line).map_err(|error| format!("the request is not understood: {error}")),
        Err(error) => Err(format!("the request cannot be read: {error}")),
    };
    let Request::Backup { folder } = match request {
        Ok(request) => request,
        Err(reason) => return say(&mut writing, &Answer::Error(reason)).await,
    };
    tracing::info!(folder = %folder.display(), "backup begun");
    let enough = Arc::new(AtomicBool::new(false));
    let (tell, mut told) = mpsc::channel(PROGRESS_WAITING_MAX);
    let mut copying = tokio::spawn(backup(log, folder.clone(), Arc::clone(&enough), tell));
    let mut gone = false;
    let mut stopped = std::pin::pin!(stopped(stopping));
    let answer = loop {
        let mut byte = [0; 1];
        tokio::select! {
            copied = &mut copying => break copied.unwrap_or_else(|error| Answer::Error(error.to_string())),
            Some(progress) = told.recv(), if !gone => say(&mut writing, &progress).await,
            // Nothing more is expected from the client: it leaves, or breaks the rules.
            _ = reading.read(&mut byte), if !gone => {
                gone = true;
                enough.store(true, Ordering::Relaxed);
            }
            () = &mut stopped, if !gone => {
                gone = true;
                enough.store(true, Ordering::Relaxed);
            }
        }
    };
    tracing::info!(folder = %folder.display(), ?answer, "backup ended");
    say(&mut writing, &answer).await;
}

async fn backup(log: Arc<RedbLog>, folder: PathBuf, enough: Arc<AtomicBool>, tell: mpsc::Sender<Answer>) -> Answer {
    if !folder.is_absolute() {
        return Answer::Error(format!("{} is no absolute path", folder.display()));
    }
    // Cursors too, as they are now.
    if let Err(error) = log.flush().await {
        return Answer::Error(error.to_string());
    }
    let copying = tokio::task::spawn_blocking(move || {
        log.backup(&folder, &mut |done, of| {
            // A client that is slow to read is told less often.
            drop(tell.try_send(Answer::Progress { done, of }));
            if enough.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    });
    match copying.await {
        Ok(Ok(entries)) => Answer::Done { entries },
        Ok(Err(error)) => Answer::Error(error.to_string()),
        Err(error) => Answer::Error(error.to_string()),
    }
}

async fn say(writing: &mut (impl AsyncWriteExt + Unpin), answer: &Answer) {
    let mut line = serde_json::to_vec(answer).expect("an answer is JSON");
    line.push(b'\n');
    // A client that left is noticed where it is read from.
    drop(writing.write_all(&line).await);
}

/// Asks the server of a data folder; `None` if none answers there. Progress goes to `progress`.
///
/// # Errors
/// What the server says, or that it went away.
pub fn ask(folder: &Path, request: &Request, progress: &mut dyn FnMut(u64, u64)) -> Option<Result<u64, String>> {
    use std::io::{BufRead, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(folder.join(SOCKET_NAME)).ok()?;
    let mut ask = || -> Result<u64, String> {
        let mut line = serde_json::to_vec(request).map_err(|error| error.to_string())?;
        line.push(b'\n');
        stream.write_all(&line).map_err(|error| format!("asking the server: {error}"))?;
        for answer in std::io::BufReader::new(&stream).lines() {
            let answer = answer.map_err(|error| format!("the server's answer: {error}"))?;
            match serde_json::from_str(&answer).map_err(|error| format!("the server's answer: {error}"))? {
                Answer::Progress { done, of } => progress(done, of),
                Answer::Done { entries } => return Ok(entries),
                Answer::Error(reason) => return Err(reason),
            }
        }
        Err("the server went away before it was done".to_owned())
    };
    Some(ask())
}
