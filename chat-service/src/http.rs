//! The HTTP listener: health, readiness, metrics, a first page, and whatever routes are merged in (MQTT over WebSocket).
//!
//! Each connection has its own task and permit from the moment it is accepted, and a deadline for a request's headers: a client that
//! sends nothing costs a task until the deadline, and delays nobody; nor does one that does not read its answer. A connection that was upgraded leaves with its upgrade: its
//! permit returns, and whoever took it over bounds it.

use std::fmt::Write;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Extension, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use broker::admission::Admission;
use broker::service::Peer;
use broker::sparing::CLOSED;
use broker::turns::Turns;
use broker::websocket::Scheme;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};

use crate::metrics::{self, Metrics};
use crate::settings::MetricsFor;
use crate::tls::{Spoken, Tls};

/// Pause after a failed accept (no file descriptors left): connections that end meanwhile free some.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Headers of a request, together. A client holds so much memory before anybody knows it.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// For [`Options::answer_timeout`]: no answer is large, but networks can be slow.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How the listener treats its connections.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections at a time, those that were upgraded not counted. Further ones are closed at once.
    pub connections: usize,
    /// Who may connect. The sockets hold their places, also when they are upgraded.
    pub admission: Admission,
    /// Who comes over TLS waits for one with each step of the handshake.
    pub turns: Turns,
    /// Where it is counted that a limit bit.
    pub metrics: Arc<Metrics>,
    /// Time to send a request's headers, and time between requests.
    pub header_timeout: Duration,
    /// Time to make an answer and to read it.
    pub answer_timeout: Duration,
    /// Time to finish requests under way after the shutdown began; then they are cut off.
    pub shutdown_timeout: Duration,
}

/// The parts of the process by name, each alive or not for a reason. Asked on every probe, so it must answer from memory.
pub type Health = Arc<dyn Fn() -> Vec<(&'static str, Result<(), String>)> + Send + Sync>;

/// The edge's maps by name, and how many entries each has now. Asked for every `/metrics`.
pub type Sizes = Arc<dyn Fn() -> Vec<(&'static str, usize)> + Send + Sync>;

/// Whether clients should be sent here.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<AtomicU8>);

impl Readiness {
    const STARTING: u8 = 0;
    const READY: u8 = 1;
    const STOPPING: u8 = 2;

    /// Not yet: the process starts.
    pub fn starting() -> Self {
        Self(Arc::new(AtomicU8::new(Self::STARTING)))
    }

    /// All listeners accept clients.
    pub fn ready(&self) {
        self.0.store(Self::READY, Ordering::Relaxed);
    }

    /// No more: the process stops.
    pub fn stopping(&self) {
        self.0.store(Self::STOPPING, Ordering::Relaxed);
    }

    fn part(&self) -> (&'static str, Result<(), String>) {
        let outcome = match self.0.load(Ordering::Relaxed) {
            Self::READY => Ok(()),
            Self::STOPPING => Err("stopping".to_owned()),
            _ => Err("starting".to_owned()),
        };
        ("server", outcome)
    }
}

#[derive(Clone)]
struct Probes {
    health: Health,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    metrics_for: MetricsFor,
    sizes: Sizes,
}

/// `/`, `/healthz`, `/readyz`, `/metrics`, and 404 for all else.
pub fn router(
    health: Health,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    metrics_for: MetricsFor,
    sizes: Sizes,
) -> Router {
    Router::new()
        .route("/healthz", get(async |State(probes): State<Probes>| verdict(&(probes.health)())))
        .route("/readyz", get(ready))
        .route("/metrics", get(exposition))
        .fallback(async || nothing())
        .with_state(Probes { health, readiness, metrics, metrics_for, sizes })
}

async fn ready(State(probes): State<Probes>) -> Response {
    let mut parts = (probes.health)();
    parts.push(probes.readiness.part());
    verdict(&parts)
}

fn nothing() -> Response {
    (StatusCode::NOT_FOUND, "there is nothing here; try /\n").into_response()
}

async fn exposition(State(probes): State<Probes>, Extension(peer): Extension<Peer>) -> Response {
    let is_loopback = peer.address.is_some_and(|address| address.ip().to_canonical().is_loopback());
    match probes.metrics_for {
        MetricsFor::Off => return nothing(),
        MetricsFor::Loopback if !is_loopback => {
            let sentence = "metrics are for this machine alone: see http.metrics in the settings\n";
            return (StatusCode::FORBIDDEN, sentence).into_response();
        }
        MetricsFor::Loopback | MetricsFor::Everybody => {}
    }
    (probes.sizes)().into_iter().for_each(|(map, entries)| probes.metrics.edge_entries(map, entries));
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], probes.metrics.encode()).into_response()
}

/// 200 if every part is well, else 503; a line for each part.
fn verdict(parts: &[(&'static str, Result<(), String>)]) -> Response {
    let mut body = String::new();
    for (name, outcome) in parts {
        match outcome {
            Ok(()) => writeln!(body, "{name}: ok"),
            Err(reason) => writeln!(body, "{name}: {reason}"),
        }
        .expect("writing to a string does not fail");
    }
    let well = parts.iter().all(|(_, outcome)| outcome.is_ok());
    let status = if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, [(header::CACHE_CONTROL, "no-store")], body).into_response()
}

/// Serves until `shutdown`, then lets requests under way finish, for `options.shutdown_timeout` at most.
/// With `tls` over that.
pub async fn run(
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    router: Router,
    options: Options,
    shutdown: impl Future<Output = ()>,
) {
    let permits = Arc::new(Semaphore::new(options.connections));
    let (stopping, _) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let socket = tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => {
                report(ended);
                continue;
            }
            accepted = accept(&listener) => accepted,
        };
        let (socket, address) = socket;
        let Ok(place) = options.admission.admit(address.ip()) else {
            options.metrics.limited("connections_per_address");
            tracing::debug!(peer = %address, "http connection closed: limits.connections_per_address is reached");
            continue;
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            options.metrics.limited("connections");
            if CLOSED.may_say() {
                tracing::warn!(limit = options.connections, "http connection closed: limits.connections is reached");
            }
            continue;
        };
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "http connection is gone already");
            continue;
        }
        let (router, options, stopping) = (router.clone(), options.clone(), stopping.subscribe());
        let tls = tls.clone();
        let connection = async move {
            let peer = Peer { address: Some(address), certificate: None };
            let Some(tls) = tls else {
                return serve(place.hold(socket), (peer, Scheme::Http), router, options, stopping).await;
            };
            match options.turns.take(Box::pin(tls.accept(socket, Spoken::Http))).await {
                Ok((stream, certificate)) => {
                    let peer = Peer { certificate, ..peer };
                    serve(place.hold(stream), (peer, Scheme::Https), router, options, stopping).await;
                }
                Err(error) => {
                    if error.kind() == io::ErrorKind::TimedOut {
                        options.metrics.limited("tls_timeout_ms");
                    }
                    tracing::debug!(%peer, %error, "no TLS");
                }
            }
        };
        connections.spawn(async move {
            connection.await;
            drop(permit);
        });
    }
    drop(listener);
    drop(stopping);
    let drained = timeout(options.shutdown_timeout, async {
        while let Some(ended) = connections.join_next().await {
            report(ended);
        }
    });
    if drained.await.is_err() {
        tracing::warn!(connections = connections.len(), "http connections cut off: they did not finish in time");
        connections.shutdown().await;
    }
}

/// The next connection. Errors are those of a connection that is gone already, or of a process out of file descriptors: both pass.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "http connection not accepted");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// One connection, until it ends, is upgraded, or `stopping` closes and the request under way is answered.
async fn serve<T>(
    io: T,
    (peer, scheme): (Peer, Scheme),
    router: Router,
    options: Options,
    mut stopping: watch::Receiver<()>,
) where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let router = TowerToHyperService::new(router);
    let from = peer.clone();
    // Whoever is upgraded has to be known by the address, and pages by how they came.
    let began = Arc::new(Mutex::new(Instant::now()));
    let last_began = Arc::clone(&began);
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        request.extensions_mut().insert(scheme);
        *began.lock() = Instant::now();
        router.call(request)
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(options.header_timeout)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades()
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        // The sender never sends: this resolves when it is dropped.
        _ = stopping.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        // Between requests it would have been closed before.
        () = too_long_ago(&last_began, options.header_timeout + options.answer_timeout) => {
            tracing::debug!(%from, "http connection closed: an answer was not read in time");
            return;
        }
    };
    if let Err(error) = ended {
        if error.is_timeout() {
            options.metrics.limited("websocket_timeout_ms");
        }
        tracing::debug!(%error, "http connection ended");
    }
}

/// Ends when that was so long ago.
async fn too_long_ago(when: &Mutex<Instant>, limit: Duration) {
    loop {
        let left = limit.saturating_sub(when.lock().elapsed());
        if left.is_zero() {
            return;
        }
        sleep(left).await;
    }
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "http connection task panicked");
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::atomic::AtomicBool;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;

    use super::*;

    /// Longer than any test should take.
    const DEADLINE: Duration = Duration::from_secs(20);

    struct Server {
        address: SocketAddr,
        readiness: Readiness,
        log_fails: Arc<AtomicBool>,
        stop: oneshot::Sender<()>,
        running: JoinHandle<()>,
    }

    impl Server {
        async fn start(options: Options) -> Self {
            Self::start_with(options, Router::new()).await
        }

        async fn start_with(options: Options, more: Router) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let log_fails = Arc::new(AtomicBool::new(false));
            let readiness = Readiness::starting();
            let fails = Arc::clone(&log_fails);
            let health: Health = Arc::new(move || {
                let log = if fails.load(Ordering::Relaxed) { Err("disk is full".to_owned()) } else { Ok(()) };
                vec![("bus", Ok(())), ("log", log)]
            });
            let sizes: Sizes = Arc::new(|| vec![("sessions", 3)]);
            let router =
                router(health, readiness.clone(), Arc::new(Metrics::new()), MetricsFor::Loopback, sizes).merge(more);
            let (stop, stopped) = oneshot::channel();
            let shutdown = async { stopped.await.unwrap_or(()) };
            let running = tokio::spawn(run(listener, None, router, options, shutdown));
            Self { address, readiness, log_fails, stop, running }
        }

        async fn stop(self) {
            drop(self.stop);
            timeout(DEADLINE, self.running).await.expect("stops in time").unwrap();
        }

        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }

        /// Status line, headers and body.
        async fn get(&self, path: &str) -> String {
            let mut socket = self.connect().await;
            let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
            socket.write_all(request.as_bytes()).await.unwrap();
            rest(socket).await
        }
    }

    /// What is left to read until the server closes.
    async fn rest(mut socket: TcpStream) -> String {
        let mut text = String::new();
        timeout(DEADLINE, socket.read_to_string(&mut text)).await.expect("closed in time").unwrap();
        text
    }

    fn options() -> Options {
        Options {
            connections: 10_000,
            admission: Admission::new(0, Vec::new()),
            turns: Turns::default(),
            metrics: Arc::new(Metrics::new()),
            header_timeout: DEADLINE,
            answer_timeout: DEADLINE,
            shutdown_timeout: DEADLINE,
        }
    }

    #[tokio::test]
    async fn routes_answer() {
        let server = Server::start(options()).await;
        let metrics = server.get("/metrics").await;
        assert!(metrics.contains(metrics::CONTENT_TYPE) && metrics.contains("chatd_connections 0"), "{metrics}");
        assert!(metrics.contains("chatd_edge_entries{map=\"sessions\"} 3"), "{metrics}");
        assert!(server.get("/nothing").await.starts_with("HTTP/1.1 404"));
        server.stop().await;
    }

    #[tokio::test]
    async fn metrics_are_for_those_who_may_read_them() {
        let status = async |metrics_for: MetricsFor, from: &str| {
            let (health, sizes): (Health, Sizes) = (Arc::new(Vec::new), Arc::new(Vec::new));
            let router = router(health, Readiness::starting(), Arc::new(Metrics::new()), metrics_for, sizes);
            let address = SocketAddr::new(from.parse().unwrap(), 1);
            let request = axum::extract::Request::get("/metrics");
            let request = request.extension(Peer { address: Some(address), certificate: None });
            let request = request.body(axum::body::Body::empty()).unwrap();
            hyper::service::Service::call(&TowerToHyperService::new(router), request).await.unwrap().status().as_u16()
        };
        for (metrics_for, here, elsewhere) in
            [(MetricsFor::Loopback, 200, 403), (MetricsFor::Everybody, 200, 200), (MetricsFor::Off, 404, 404)]
        {
            for address in ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"] {
                assert_eq!(status(metrics_for, address).await, here, "{metrics_for:?}: {address}");
            }
            for address in ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"] {
                assert_eq!(status(metrics_for, address).await, elsewhere, "{metrics_for:?}: {address}");
            }
        }
    }

    #[tokio::test]
    async fn health_says_what_fails() {
        let server = Server::start(options()).await;
        let well = server.get("/healthz").await;
        assert!(well.starts_with("HTTP/1.1 200") && well.contains("log: ok"), "{well}");
        server.log_fails.store(true, Ordering::Relaxed);
        let ill = server.get("/healthz").await;
        assert!(ill.starts_with("HTTP/1.1 503") && ill.contains("bus: ok\nlog: disk is full\n"), "{ill}");
        server.stop().await;
    }

    #[tokio::test]
    async fn readiness_follows_start_stop_and_health() {
        let server = Server::start(options()).await;
        let starting = server.get("/readyz").await;
        assert!(starting.starts_with("HTTP/1.1 503") && starting.contains("server: starting"), "{starting}");
        server.readiness.ready();
        assert!(server.get("/readyz").await.starts_with("HTTP/1.1 200"));
        server.log_fails.store(true, Ordering::Relaxed);
        assert!(server.get("/readyz").await.starts_with("HTTP/1.1 503"));
        server.log_fails.store(false, Ordering::Relaxed);
        server.readiness.stopping();
        let stopping = server.get("/readyz").await;
        assert!(stopping.starts_with("HTTP/1.1 503") && stopping.contains("server: stopping"), "{stopping}");
        server.stop().await;
    }

    #[tokio::test]
    async fn clients_that_send_nothing_delay_nobody() {
        let server = Server::start(options()).await;
        let mut idle = Vec::new();
        // Both ends of each are in this process, whose file descriptors may be limited to 1,024.
        for n in 0..300 {
            let mut socket = server.connect().await;
            if n % 2 == 0 {
                socket.write_all(b"GET /mqtt HTTP/1.1\r\nupgrade: webso").await.unwrap();
            }
            idle.push(socket);
        }
        let before = Instant::now();
        assert!(server.get("/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(before.elapsed() < Duration::from_secs(2), "{:?}", before.elapsed());
        drop(idle);
        server.stop().await;
    }

    #[tokio::test]
    async fn clients_that_send_nothing_are_closed_in_time() {
        let server = Server::start(Options { header_timeout: Duration::from_millis(50), ..options() }).await;
        let silent = server.connect().await;
        let mut half = server.connect().await;
        half.write_all(b"GET /healthz HTTP/1.1\r\nho").await.unwrap();
        let mut kept_alive = server.connect().await;
        kept_alive.write_all(b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
        assert_eq!(rest(silent).await, "");
        rest(half).await;
        assert!(rest(kept_alive).await.starts_with("HTTP/1.1 200"));
        server.stop().await;
    }

    #[tokio::test]
    async fn clients_that_do_not_read_are_closed_in_time() {
        let short = Duration::from_millis(200);
        let server = Server::start(Options { header_timeout: short, answer_timeout: short, ..options() }).await;
        let mut deaf = server.connect().await;
        let requests = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n".repeat(1_000);
        let until_closed = async { while deaf.write_all(&requests).await.is_ok() {} };
        timeout(DEADLINE, until_closed).await.expect("closed in time");
        server.stop().await;
    }

    #[tokio::test]
    async fn connections_over_the_limit_are_closed_and_room_returns() {
        let server = Server::start(Options { connections: 1, ..options() }).await;
        let mut first = server.connect().await;
        first.write_all(b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
        first.read_exact(&mut [0; 12]).await.unwrap();
        assert_eq!(rest(server.connect().await).await, "");
        drop(first);
        let room_again = async {
            loop {
                let mut socket = server.connect().await;
                let request = b"GET /healthz HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
                let mut text = String::new();
                if socket.write_all(request).await.is_ok()
                    && socket.read_to_string(&mut text).await.is_ok_and(|n| n > 0)
                {
                    break text;
                }
            }
        };
        assert!(timeout(DEADLINE, room_again).await.expect("room in time").starts_with("HTTP/1.1 200"));
        server.stop().await;
    }

    #[tokio::test]
    async fn a_request_under_way_is_answered_before_the_stop() {
        let (begun, begins) = oneshot::channel();
        let (finish, finishes) = oneshot::channel::<()>();
        let once = Arc::new(parking_lot::Mutex::new(Some((begun, finishes))));
        let slow = Router::new().route(
            "/slow",
            get(async move || {
                let (begun, finishes) = once.lock().take().expect("one request");
                begun.send(()).expect("the test waits");
                finishes.await.expect("the test answers");
                "done"
            }),
        );
        let server = Server::start_with(options(), slow).await;
        let idle = server.connect().await;
        let mut socket = server.connect().await;
        socket.write_all(b"GET /slow HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
        begins.await.unwrap();
        let stopping = tokio::spawn(server.stop());
        assert_eq!(rest(idle).await, "", "an idle connection is closed at once");
        assert!(!stopping.is_finished());
        finish.send(()).unwrap();
        assert!(rest(socket).await.ends_with("done"));
        stopping.await.unwrap();
    }

    #[tokio::test]
    async fn a_request_that_never_ends_is_cut_off() {
        let (begun, begins) = oneshot::channel();
        let once = Arc::new(parking_lot::Mutex::new(Some(begun)));
        let stuck = Router::new().route(
            "/stuck",
            get(async move || {
                once.lock().take().expect("one request").send(()).expect("the test waits");
                std::future::pending::<&str>().await
            }),
        );
        let server =
            Server::start_with(Options { shutdown_timeout: Duration::from_millis(50), ..options() }, stuck).await;
        let mut socket = server.connect().await;
        socket.write_all(b"GET /stuck HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
        begins.await.unwrap();
        server.stop().await;
        assert_eq!(rest(socket).await, "");
    }
}
