//! The server as a whole: opens the log, starts the sequencer, the broker and the listeners, and takes them down in the opposite order.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use broker::websocket::{Besides, Origins};
use broker::{Announcer, Broker};
use chat_protocol::UserId;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use crate::acme::Acme;
use crate::admin;
use crate::auth::authorities::Authorities;
use crate::auth::keys::KeyFetch;
use crate::auth::{Auth, AuthError};
use crate::core::Quotas;
use crate::docs;
use crate::erasure;
use crate::http::{self, Readiness};
use crate::log::{Log, Position, RedbLog, RedbOptions};
use crate::metrics::Metrics;
use crate::presence::Presence;
use crate::receipts::Receipts;
use crate::requests::{self, Blocks, Requests};
use crate::retention;
use crate::sequencer;
use crate::service::ChatService;
use crate::sessions::Sessions;
use crate::settings::{self, AuthMode, Settings};
use crate::sys;
use crate::tls::{Spoken, Tls};
use crate::typing::TypingRelay;
use crate::web;
use crate::webhooks::Webhooks;

/// A bus that was silent for so long is not well.
const HEARTBEAT_AGE_MAX: Duration = Duration::from_secs(10);
/// How often the health of the parts is looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

type Chat = ChatService<RedbLog>;

/// Those who tell what happens, each in a task of its own.
struct Telling {
    receipts: Arc<Receipts<RedbLog>>,
    typing: Arc<TypingRelay<RedbLog>>,
    presence: Arc<Presence<RedbLog>>,
}

impl Telling {
    /// They end at the stop by themselves: what they tell is not kept.
    fn start(self, stop: &watch::Sender<bool>) {
        drop(tokio::spawn(self.receipts.run(told(stop.subscribe()))));
        drop(tokio::spawn(self.typing.run(told(stop.subscribe()))));
        drop(tokio::spawn(self.presence.run(told(stop.subscribe()))));
    }
}

/// A server whose sockets are bound and whose log is open.
pub struct Server {
    log: Arc<RedbLog>,
    broker: Broker<Chat>,
    telling: Telling,
    webhooks: Webhooks<RedbLog>,
    committed: watch::Receiver<Position>,
    /// Says when it has ended.
    sequencing: oneshot::Receiver<()>,
    drain: watch::Sender<bool>,
    mqtt: TcpListener,
    http: TcpListener,
    mqtt_tls: Option<TcpListener>,
    http_tls: Option<TcpListener>,
    tls: Option<Arc<Tls>>,
    acme: Option<Acme>,
    routes: axum::Router,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    storage: PathBuf,
    /// Zero: for ever.
    retention: Duration,
    erase_interval: Duration,
    http_options: http::Options,
    shutdown_timeout: Duration,
    auth: Arc<Auth>,
    key_fetch: Option<KeyFetch>,
    hangup: Signal,
}

impl Server {
    /// Opens and binds everything, or says what could not be.
    pub async fn start(settings: &Settings) -> anyhow::Result<Self> {
        // Before anybody can know that we are there: a SIGHUP that nobody listens for is the end.
        let hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
        let limits = &settings.limits;
        let limit = |bytes| (bytes > 0).then_some(bytes);
        let quotas =
            Quotas { sender_bytes: limit(limits.user_bytes), conversation_bytes: limit(limits.conversation_bytes) };
        let log = {
            let path = settings.storage.path.clone();
            let options = RedbOptions { counts_usage: quotas != Quotas::NONE, ..RedbOptions::default() };
            let open = tokio::task::spawn_blocking(move || RedbLog::open(&path, options));
            Arc::new(open.await.context("opening the log")??)
        };
        let metrics = Arc::new(Metrics::new());
        let authorities = Arc::default();
        let auth = Arc::new(auth(settings, &authorities)?);
        let key_fetch = settings.auth.jwt_key_url.as_ref().map(|url| KeyFetch::new(url, settings.auth.jwt_key_refresh));
        let key_fetch =
            key_fetch.transpose().context("auth.jwt_key_url: the system's certificates, which https needs")?;
        let announcer = Announcer::default();
        let webhooks = {
            let announcer = announcer.clone();
            let is_connected = move |user: &UserId| announcer.is_connected(user.as_str());
            Webhooks::new(&settings.webhooks, &log, &metrics, is_connected)
                .context("webhooks.url: the system's certificates, which https needs")?
        };
        let (head, committed) = watch::channel(log.head());
        let blocks = Arc::new(Blocks::default());
        let presence =
            Arc::new(Presence::new(Arc::clone(&log), announcer.clone(), limits.presence_grace, webhooks.presence()));
        let (queue, submissions) = mpsc::channel(sequencer::SUBMISSIONS_MAX);
        let (drain, draining) = watch::channel(false);
        let parts = sequencer::Parts {
            log: Arc::clone(&log),
            announcer: announcer.clone(),
            metrics: Arc::clone(&metrics),
            quotas,
            new_conversations_per_hour: limits.new_conversations_per_hour,
            blocks: Arc::clone(&blocks),
            presence: Arc::clone(&presence),
            head,
        };
        let (ended, sequencing) = oneshot::channel();
        let runtime = tokio::runtime::Handle::current();
        let sequencer = std::thread::Builder::new().name("sequencer".to_owned());
        let sequence = move || {
            runtime.block_on(sequencer::run(parts, submissions, told(draining)));
            // Whoever does not wait any more does not need it.
            ended.send(()).unwrap_or(());
        };
        sequencer.spawn(sequence).context("no thread for the sequencer")?;
        let receipts = Arc::new(Receipts::new(Arc::clone(&log), announcer.clone()));
        let typing = Arc::new(TypingRelay::new(Arc::clone(&log), announcer.clone()));
        let requests = Requests::new(requests::Parts {
            log: Arc::clone(&log),
            queue: queue.clone(),
            announcer: announcer.clone(),
            metrics: Arc::clone(&metrics),
            blocks,
            receipts: Arc::clone(&receipts),
            presence: Arc::clone(&presence),
            auth: Arc::clone(&auth),
            message_bytes_max: limits.message_bytes,
        });
        let telling =
            Telling { receipts: Arc::clone(&receipts), typing: Arc::clone(&typing), presence: Arc::clone(&presence) };
        let service = Arc::new(ChatService {
            log: Arc::clone(&log),
            queue,
            announcer: announcer.clone(),
            metrics: Arc::clone(&metrics),
            message_bytes_max: limits.message_bytes,
            requests,
            receipts,
            typing,
            presence,
            sessions: Sessions::new(Arc::clone(&log), limits.sessions_per_user),
            auth: Arc::clone(&auth),
        });
        let edge_limits = broker_limits(limits);
        let websocket =
            broker::websocket::Options { packet_bytes_max: edge_limits.packet_bytes, origins: origins(settings) };
        let starting = {
            let announcer = announcer.clone();
            tokio::task::spawn_blocking(move || Broker::start(service, &announcer, edge_limits))
        };
        let broker = starting.await.context("starting the buses")?.context("starting the buses")?;

        broker.resume_sessions().await.context("taking up the sessions that are stored")?;

        let mqtt = bind("mqtt.listen", settings.mqtt.listen)?;
        let http = bind("http.listen", settings.http.listen)?;
        let mqtt_tls = bind_some("mqtt.tls_listen", settings.mqtt.tls_listen)?;
        let http_tls = bind_some("http.tls_listen", settings.http.tls_listen)?;
        let tls = Tls::new(&settings.tls, settings.acme.is_on(), limits.tls_timeout, authorities)?;
        let acme = match &tls {
            Some(tls) if settings.acme.is_on() => Some(Acme::new(&settings.acme, &settings.storage.path, tls)?),
            _ => None,
        };
        let readiness = Readiness::starting();
        let health = health(&log, &broker);
        let sizes: http::Sizes = {
            let broker = broker.clone();
            Arc::new(move || broker.sizes())
        };
        let routes = http::router(health, readiness.clone(), Arc::clone(&metrics), settings.http.metrics, sizes)
            .merge(docs::router())
            .merge(web::router(&settings.http.origins))
            .merge(broker::websocket::router(broker.clone(), websocket));
        let http_options = http::Options {
            connections: limits.connections,
            admission: broker.admission(),
            turns: broker.turns(),
            metrics: Arc::clone(&metrics),
            header_timeout: limits.websocket_timeout,
            answer_timeout: http::ANSWER_TIMEOUT,
            shutdown_timeout: limits.shutdown_timeout,
        };
        Ok(Self {
            log,
            broker,
            telling,
            webhooks,
            committed,
            sequencing,
            drain,
            mqtt,
            http,
            mqtt_tls,
            http_tls,
            tls,
            acme,
            routes,
            readiness,
            metrics,
            storage: settings.storage.path.clone(),
            retention: settings.storage.retention,
            erase_interval: settings.storage.erase_interval,
            http_options,
            shutdown_timeout: limits.shutdown_timeout,
            auth,
            key_fetch,
            hangup,
        })
    }

    /// What it listens on, where its data lies, and two lines to copy.
    pub fn greeting(&self) -> String {
        let (mqtt, http) = (local(&self.mqtt), local(&self.http));
        let storage = std::fs::canonicalize(&self.storage).unwrap_or_else(|_| self.storage.clone());
        let host = if mqtt.ip().is_loopback() && mqtt.is_ipv4() { String::new() } else { format!(" -h {}", mqtt.ip()) };
        let port = if mqtt.port() == 1883 { String::new() } else { format!(" -p {}", mqtt.port()) };
        let (mode, password) = if self.auth.is_open() {
            ("development mode: any user name, no password, this machine only", "")
        } else {
            ("authentication is required", " -P '…'")
        };
        // Of several addresses the one of this machine.
        let page =
            if http.ip().is_unspecified() { SocketAddr::new(Ipv4Addr::LOCALHOST.into(), http.port()) } else { http };
        let page = if web::is_there() { format!("in a browser:  http://{page}/\n") } else { String::new() };
        let mut over_tls = String::new();
        for (name, listener) in [("mqtt", &self.mqtt_tls), ("http", &self.http_tls)] {
            if let Some(listener) = listener {
                over_tls.push_str(&format!("{name} over TLS listening on {}\n", local(listener)));
            }
        }
        format!(
            "mqtt listening on {mqtt}\n\
             http listening on {http}\n{over_tls}\
             messages lie in {}\n\
             {mode}\n\
             \n{page}\
             bob listens:   mosquitto_sub{host}{port} -u bob{password} -i bob-phone -c -q 1 -t chat/bob/inbox\n\
             alice writes:  mosquitto_pub{host}{port} -u alice{password} -q 1 -t chat/alice/out/bob -m 'hello'\n",
            storage.display(),
        )
    }

    /// Serves until `shutdown`, then drains: no new clients, publishes under way are answered, clients are told, cursors are written.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let (stop, stopping) = watch::channel(false);
        let mqtt = tokio::spawn(broker::listener::run(self.mqtt, self.broker.clone(), told(stopping.clone())));
        let over_tls = self.tls.as_ref().map(|tls| {
            let broker = self.broker.clone();
            drop(tokio::spawn(Arc::clone(tls).watch(move || broker.rights_changed(), stopping.clone())));
            let mqtt = self.mqtt_tls.map(|listener| {
                let (tls, broker) = (Arc::clone(tls), self.broker.clone());
                let open = move |socket| {
                    let tls = Arc::clone(&tls);
                    async move { tls.accept(socket, Spoken::Mqtt).await }
                };
                tokio::spawn(broker::listener::run_opened(listener, broker, open, told(stopping.clone())))
            });
            let http = self.http_tls.map(|listener| {
                let (tls, routes, options) = (Some(Arc::clone(tls)), self.routes.clone(), self.http_options.clone());
                tokio::spawn(http::run(listener, tls, routes, options, told(stopping.clone())))
            });
            [mqtt, http]
        });
        let http = tokio::spawn(http::run(self.http, None, self.routes, self.http_options, told(stopping)));
        if let Some(acme) = self.acme {
            drop(tokio::spawn(acme.run(stop.subscribe())));
        }
        let admin = match admin::bind(&self.storage) {
            Ok(listener) => Some(tokio::spawn(admin::run(listener, Arc::clone(&self.log), stop.subscribe()))),
            Err(error) => {
                tracing::warn!(%error, "no admin socket: backups only while chatd is stopped");
                None
            }
        };
        self.telling.start(&stop);
        let telling = sys::run(self.broker.clone(), Arc::clone(&self.metrics), told(stop.subscribe()));
        drop(tokio::spawn(telling));
        self.webhooks.start(&self.log, &self.committed, &stop);
        drop(tokio::spawn(erasure::run(Arc::clone(&self.log), self.erase_interval, told(stop.subscribe()))));
        if !self.retention.is_zero() {
            let (log, metrics) = (Arc::clone(&self.log), Arc::clone(&self.metrics));
            let removing = retention::run(log, metrics, self.retention, told(stop.subscribe()));
            // It ends at the stop by itself, between two commits.
            drop(tokio::spawn(removing));
        }
        if let Some(fetch) = self.key_fetch {
            let (auth, metrics, broker) = (Arc::clone(&self.auth), Arc::clone(&self.metrics), self.broker.clone());
            let changed = move || broker.rights_changed();
            drop(tokio::spawn(fetch.run(auth, metrics, changed, told(stop.subscribe()))));
        }
        drop(tokio::spawn(reload(self.hangup, self.auth, self.tls, self.broker.clone(), stop.subscribe())));
        self.readiness.ready();
        tracing::info!("ready");

        let failure = tokio::select! {
            () = shutdown => None,
            reason = watch_parts(&self.log, &self.broker, &self.metrics) => Some(reason),
        };
        self.readiness.stopping();
        tracing::info!("stopping");
        stop.send_replace(true);
        if mqtt.await.is_err() {
            tracing::error!("the mqtt listener panicked");
        }
        if !self.broker.stop(self.shutdown_timeout).await {
            tracing::warn!("some clients were cut off at the deadline");
        }
        if http.await.is_err() {
            tracing::error!("the http listener panicked");
        }
        for listener in over_tls.into_iter().flatten().flatten() {
            if listener.await.is_err() {
                tracing::error!("a TLS listener panicked");
            }
        }
        if let Some(admin) = admin
            && admin.await.is_err()
        {
            tracing::error!("the admin socket's task panicked");
        }
        // Nobody is left who could submit: the sequencer writes what it has and ends.
        self.drain.send_replace(true);
        if tokio::time::timeout(self.shutdown_timeout, self.sequencing).await.is_err() {
            tracing::warn!("the sequencer did not end in time");
        }
        if failure.is_none() {
            self.log.flush().await.context("writing cursors at the end")?;
        }
        let log = Arc::clone(&self.log);
        if tokio::task::spawn_blocking(move || log.close()).await.is_err() {
            tracing::error!("closing the log panicked");
        }
        // A name without a server behind it only puzzles people.
        std::fs::remove_file(self.storage.join(admin::SOCKET_NAME)).unwrap_or(());
        match failure {
            None => Ok(()),
            Some(reason) => Err(anyhow::anyhow!("the log has failed, and nothing more is acknowledged: {reason}")),
        }
    }
}

/// Ends when `true` is sent, or when nobody is left to send it.
async fn told(mut flag: watch::Receiver<bool>) {
    drop(flag.wait_for(|set| *set).await);
}

/// Who may come in, from the files that the settings name.
///
/// # Errors
/// The first thing that is wrong with them.
pub fn auth(settings: &Settings, authorities: &Arc<Authorities>) -> Result<Auth, AuthError> {
    let uncounted = settings.limits.uncounted_addresses.clone();
    let counts_address = Box::new(move |address| !uncounted.iter().any(|network| network.contains(address)));
    let authorities = settings.tls.client_ca.is_some().then(|| Arc::clone(authorities));
    Auth::new(&settings.auth, authorities, counts_address)
}

/// On SIGHUP reads the files again that say who may come in, and who may do what.
async fn reload(
    mut hangup: Signal,
    auth: Arc<Auth>,
    tls: Option<Arc<Tls>>,
    broker: Broker<Chat>,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        tokio::select! {
            _ = stop.wait_for(|set| *set) => return,
            heard = hangup.recv() => {
                if heard.is_none() {
                    return;
                }
            }
        }
        if let Some(tls) = &tls {
            match tls.reload() {
                Ok(()) => {
                    // Whatever becomes of the other files.
                    broker.rights_changed();
                    tracing::info!("read the certificate again");
                }
                Err(error) => tracing::error!(%error, "the certificate stays as it was"),
            }
        }
        let reading = Arc::clone(&auth);
        match tokio::task::spawn_blocking(move || reading.reload()).await {
            Ok(Ok(())) => {
                broker.rights_changed();
                tracing::info!("read the users, keys and rights again");
            }
            Ok(Err(error)) => tracing::error!(%error, "the users, keys and rights stay as they were"),
            Err(error) => tracing::error!(%error, "reading the users, keys and rights panicked"),
        }
    }
}

fn bind(key: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    broker::listener::bind(address).with_context(|| format!("{key}: listening on {address}"))
}

fn bind_some(key: &str, address: Option<SocketAddr>) -> anyhow::Result<Option<TcpListener>> {
    match address {
        Some(address) => bind(key, address).map(Some),
        None => Ok(None),
    }
}

fn local(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("a bound socket has an address")
}

/// The edge's share of the limits.
pub(crate) fn broker_limits(limits: &settings::Limits) -> broker::Limits {
    broker::Limits {
        connections: limits.connections,
        connections_per_address: limits.connections_per_address,
        uncounted_addresses: limits.uncounted_addresses.clone(),
        connections_per_user: limits.connections_per_user,
        connect_timeout: limits.connect_timeout,
        connect_bytes: limits.connect_bytes,
        packet_bytes: limits.packet_bytes,
        receive_maximum: limits.receive_maximum,
        window: limits.window,
        user_properties: limits.user_properties,
        topic_bytes: limits.topic_bytes,
        topic_levels: limits.topic_levels,
        subscriptions_per_session: limits.subscriptions_per_session,
        filters_per_user: limits.filters_per_user,
        subscriptions_per_user: limits.subscriptions_per_user,
        session_expiry_max_s: limits.session_expiry_max_s,
        keep_alive_max_s: limits.keep_alive_max_s,
        publishes_per_s: limits.publishes_per_s,
        publish_bytes_per_s: limits.publish_bytes_per_s,
        user_publishes_per_s: limits.user_publishes_per_s,
        user_publish_bytes_per_s: limits.user_publish_bytes_per_s,
        queue_messages: limits.queue_messages,
        queue_bytes: limits.queue_bytes,
        user_queues_bytes: limits.user_queues_bytes,
        queues_bytes: limits.queues_bytes,
        retained_messages: limits.retained_messages,
        retained_bytes: limits.retained_bytes,
        user_retained_messages: limits.user_retained_messages,
        user_retained_bytes: limits.user_retained_bytes,
        idle_timeout: limits.idle_timeout,
    }
}

/// Whose pages may connect: where nobody needs a password, only this machine's.
fn origins(settings: &Settings) -> Origins {
    let besides = match settings.auth.mode {
        AuthMode::Development => Besides::Loopback,
        AuthMode::Required => Besides::SameOrigin,
    };
    Origins { listed: settings.http.origins.clone(), besides }
}

fn health(log: &Arc<RedbLog>, broker: &Broker<Chat>) -> http::Health {
    let (log, broker) = (Arc::clone(log), broker.clone());
    Arc::new(move || {
        let mut parts = vec![("log", log.health())];
        for bus in broker.buses() {
            let alive = if bus.heartbeat_age <= HEARTBEAT_AGE_MAX {
                Ok(())
            } else {
                Err(format!("no heartbeat for {} s", bus.heartbeat_age.as_secs()))
            };
            parts.push((if bus.name == "chat" { "chat bus" } else { "ordinary bus" }, alive));
        }
        parts
    })
}

/// Carries the buses' counters to the metrics; returns when the log has failed.
async fn watch_parts(log: &RedbLog, broker: &Broker<Chat>, metrics: &Metrics) -> String {
    let mut before = broker.buses();
    let mut interval = tokio::time::interval(WATCH_INTERVAL);
    loop {
        interval.tick().await;
        if let Err(reason) = log.health() {
            return reason;
        }
        let now = broker.buses();
        for (bus, earlier) in now.iter().zip(&before) {
            for _ in earlier.counters.gaps..bus.counters.gaps {
                metrics.bus_gap(bus.name);
            }
            for _ in earlier.counters.restarts..bus.counters.restarts {
                metrics.bus_restart(bus.name);
            }
        }
        before = now;
    }
}

/// SIGXFSZ, on every Linux and BSD: a file would grow beyond the limit of the process (`ulimit -f`).
const FILE_TOO_LARGE_SIGNAL: i32 = 25;

/// Ends at SIGTERM or SIGINT.
pub fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    // Listened for, it kills nobody: the write fails instead, and is treated as on a full disk.
    let too_large = signal(SignalKind::from_raw(FILE_TOO_LARGE_SIGNAL)).context("listening for SIGXFSZ")?;
    Ok(async move {
        let _too_large = too_large;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
