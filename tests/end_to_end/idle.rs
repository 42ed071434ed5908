//! Thousands who hold a socket and say nothing, or a byte a second, on every listener: whoever wants to come in does not notice.

use std::time::{Duration, Instant};

use anyhow::Result;
use end_to_end::tls::{Files, port};
use end_to_end::{Chatd, Connect, Options, PATIENCE, chatd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

const IDLE: usize = 2_000;
/// Of them, on each listener, those who send a byte a second.
const DRIPPING: usize = 100;
const LOGINS: usize = 120;
/// Connections from one address of loopback.
const FROM_ONE_ADDRESS: usize = 200;
/// Handshakes under way at a time: more would only wait in the test.
const AT_A_TIME: usize = 50;

trait Socket: AsyncWrite + Send + Unpin {}
impl<T: AsyncWrite + Send + Unpin> Socket for T {}

/// Lets this process, and those that it starts, have so many sockets.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let needed = 4 * u64::try_from(IDLE).unwrap() + 1_000;
    assert!(limit.maximum.is_none_or(|most| most >= needed), "{needed} file descriptors are needed: {limit:?}");
}

async fn open(nth: usize, port: u16) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    let address = u8::try_from(nth / FROM_ONE_ADDRESS)? + 10;
    socket.bind(([127, 0, 0, address], 0).into())?;
    Ok(socket.connect(([127, 0, 0, 1], port).into()).await?)
}

/// An idle socket: every second one over TLS has done its handshake.
async fn idle(nth: usize, port: u16, tls: Option<TlsConnector>) -> Result<Box<dyn Socket>> {
    let socket = open(nth, port).await?;
    match tls {
        Some(tls) if nth.is_multiple_of(2) => Ok(Box::new(tls.connect("localhost".to_owned().try_into()?, socket).await?)),
        _ => Ok(Box::new(socket)),
    }
}

/// What would be the beginning of something, one byte a second.
async fn drip(mut sockets: Vec<(Box<dyn Socket>, Vec<u8>)>) {
    for nth in 0.. {
        for (socket, bytes) in &mut sockets {
            // All of it would be enough to be let in, or sent away.
            let byte = bytes[nth % (bytes.len() - 1)];
            if nth < bytes.len() - 1 && socket.write_all(&[byte]).await.is_ok() {
                socket.flush().await.unwrap_or_default();
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_idle_sockets_on_every_listener_delay_no_login() {
    raise_descriptor_limit();
    let files = Files::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let users = folder.path().join("users");
    let mut passwd = chatd::command().await.unwrap();
    passwd.args(["passwd", "add", "alice", "--file"]).arg(&users).stdin(std::process::Stdio::piped());
    let mut child = passwd.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"alice-pw\n").await.unwrap();
    assert!(child.wait().await.unwrap().success());

    let mut options: Options = files.options().set("auth.mode", "required").set("auth.password_file", users.display());
    for each in ["tls", "websocket", "connect"] {
        options = options.set(&format!("limits.{each}_timeout_ms"), 600_000);
    }
    let chatd = Chatd::start_with(options).await.unwrap();
    let tls = |alpn| Some(files.connector(&[alpn]).unwrap());
    let listeners = [
        (chatd.mqtt_addr().port(), None, Connect::v5("alice", "drip").bytes()),
        (chatd.http_addr().port(), None, b"GET /mqtt HTTP/1.1\r\nhost: localhost\r\nx-slow: yes\r\n".to_vec()),
        (port(&chatd, "mqtt").await, tls("mqtt"), Connect::v5("alice", "drip").bytes()),
        (port(&chatd, "http").await, tls("http/1.1"), b"GET /mqtt HTTP/1.1\r\nhost: localhost\r\n".to_vec()),
    ];
    let began = Instant::now();
    let (mut silent, mut dripping) = (Vec::new(), Vec::new());
    for (port, tls, bytes) in listeners {
        let mut opening = JoinSet::<Result<Box<dyn Socket>>>::new();
        let mut opened = Vec::new();
        for nth in 0..IDLE {
            if opening.len() == AT_A_TIME {
                opened.extend(opening.join_next().await.map(|socket| socket.unwrap().unwrap()));
            }
            opening.spawn(idle(nth, port, tls.clone()));
        }
        while let Some(socket) = opening.join_next().await {
            opened.push(socket.unwrap().unwrap());
        }
        dripping.extend(opened.drain(..DRIPPING).map(|socket| (socket, bytes.clone())));
        silent.extend(opened);
    }
    assert_eq!(silent.len() + dripping.len(), 4 * IDLE);
    println!("{} sockets after {:?}", silent.len() + dripping.len(), began.elapsed());
    let drips = tokio::spawn(drip(dripping));

    let mut took = Vec::new();
    for nth in 0..LOGINS {
        let began = Instant::now();
        let mut login = Connect::v5("alice", "phone").password("alice-pw");
        login.web_socket = nth % 4 == 3;
        let client = tokio::time::timeout(PATIENCE, login.to(&chatd)).await.expect("it answers").unwrap();
        took.push(began.elapsed());
        client.leave().await.unwrap();
    }
    assert!(!drips.is_finished());
    drips.abort();
    took.sort_unstable();
    let p99 = took[LOGINS * 99 / 100];
    println!("{LOGINS} logins: {:?} in the middle, {p99:?} at p99, {:?} at most", took[LOGINS / 2], took[LOGINS - 1]);
    assert!(p99 < Duration::from_secs(1), "{p99:?}");
    drop(silent);
}
