//! Where a client connects, as whom, and what it wants to hear.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use chat_protocol::UserId;
use http::Uri;
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::InvalidOptions;
use crate::outbox::{MemoryOutbox, Outbox};

/// A callback that failed.
pub type TokenError = Box<dyn std::error::Error + Send + Sync>;

type TokenFuture = Pin<Box<dyn Future<Output = Result<String, TokenError>> + Send>>;
type TokenCallback = Arc<dyn Fn() -> TokenFuture + Send + Sync>;

/// How a client proves who it is.
#[derive(Clone)]
pub(crate) enum Credential {
    None,
    Password(String),
    Token(TokenCallback),
}

/// What reaches the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Listen {
    /// Everything of this user: messages, receipts, typing, presence.
    #[default]
    Own,
    /// Nothing but answers: for programs that send and ask.
    Nothing,
    /// Every message of every conversation, each once: for users whom the server lets observe.
    Observe,
}

/// What the server keeps while the device is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Session {
    /// The device's place in all conversations, for as long as the server allows: whatever comes meanwhile is delivered later.
    #[default]
    Durable,
    /// Nothing. After a reconnect comes what has reached no device of the user, and then what is live.
    Temporary,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Tls,
    WebSocket,
    WebSocketTls,
}

impl Transport {
    pub(crate) fn is_tls(self) -> bool {
        matches!(self, Self::Tls | Self::WebSocketTls)
    }
}

/// How to connect. Everything but the server, the user and the device has a default.
///
/// ```
/// use chat_client::{FileOutbox, Options};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("outbox");
/// let options = Options::new("mqtts://chat.example.org", "alice", "alice-laptop")?
///     .password("correct horse")
///     .outbox(FileOutbox::open(path)?);
/// # Ok(())
/// # }
/// ```
pub struct Options {
    pub(crate) transport: Transport,
    pub(crate) host: String,
    pub(crate) port: u16,
    /// The whole address, for WebSocket.
    pub(crate) address: String,
    pub(crate) user: UserId,
    pub(crate) device: String,
    pub(crate) credential: Credential,
    pub(crate) listen: Listen,
    pub(crate) session: Session,
    pub(crate) roots: Option<Vec<CertificateDer<'static>>>,
    pub(crate) identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    pub(crate) keep_alive: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) request_timeout: Duration,
    pub(crate) retry_min: Duration,
    pub(crate) retry_max: Duration,
    pub(crate) outbox: Mutex<Box<dyn Outbox>>,
}

impl fmt::Debug for Options {
    /// Without secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("server", &self.address)
            .field("user", &self.user)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Options {
    /// `server` is `mqtt://host:port`, `mqtts://…`, `ws://host:port/mqtt` or `wss://…`; ports are 1883, 8883, 80 and 443 if left out. `device` is
    /// the name under which the server knows this program of the user (MQTT's client identifier): keep it from run to run, and never use
    /// it in two programs at once.
    ///
    /// # Errors
    /// If one of them is not what it has to be.
    pub fn new(server: &str, user: &str, device: &str) -> Result<Self, InvalidOptions> {
        let user = UserId::parse(user)?;
        if device.is_empty() || device.len() > 256 || device.chars().any(char::is_control) {
            return Err(InvalidOptions::Device);
        }
        let wrong = |problem: &str| InvalidOptions::Server { given: server.to_owned(), problem: problem.to_owned() };
        let uri: Uri = server.parse().map_err(|error: http::uri::InvalidUri| wrong(&error.to_string()))?;
        let (transport, default_port) = match uri.scheme_str() {
            Some("mqtt") => (Transport::Tcp, 1883),
            Some("mqtts") => (Transport::Tls, 8883),
            Some("ws") => (Transport::WebSocket, 80),
            Some("wss") => (Transport::WebSocketTls, 443),
            _ => return Err(wrong("no such scheme")),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| wrong("no host"))?;
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err(InvalidOptions::Server {
                given: format!("{}://…@{host}", uri.scheme_str().unwrap_or_default()),
                problem: "user and password do not belong in the address".to_owned(),
            });
        }
        let is_web_socket = matches!(transport, Transport::WebSocket | Transport::WebSocketTls);
        if !is_web_socket && uri.path_and_query().is_some_and(|path| path.as_str() != "/") {
            return Err(wrong("MQTT has no paths"));
        }
        let port = uri.port_u16().unwrap_or(default_port);
        let path = match uri.path_and_query().map(|path| path.as_str()) {
            None | Some("/" | "") if is_web_socket => "/mqtt",
            Some(path) if is_web_socket => path,
            _ => "",
        };
        let address = format!("{}://{host}:{port}{path}", uri.scheme_str().unwrap_or_default());
        if host.starts_with('[') && transport != Transport::Tcp {
            // See link.rs.
            return Err(wrong("IPv6 addresses go with mqtt:// alone, use a name"));
        }
        let host = host.to_owned();
        Ok(Self {
            transport,
            host,
            port,
            address,
            user,
            device: device.to_owned(),
            credential: Credential::None,
            listen: Listen::default(),
            session: Session::default(),
            roots: None,
            identity: None,
            keep_alive: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(15),
            request_timeout: Duration::from_secs(30),
            retry_min: Duration::from_millis(250),
            retry_max: Duration::from_secs(30),
            outbox: Mutex::new(Box::new(MemoryOutbox)),
        })
    }

    /// Logs in with a password.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.credential = Credential::Password(password.into());
        self
    }

    /// Logs in with a token (JWT), asked for before each connection: when one has expired the server closes the connection, and the next is
    /// made with a fresh one. Nothing is lost meanwhile. A callback that takes longer than [`connect_timeout`](Self::connect_timeout) has failed.
    #[must_use]
    pub fn token<F, R>(mut self, callback: F) -> Self
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = Result<String, TokenError>> + Send + 'static,
    {
        self.credential = Credential::Token(Arc::new(move || Box::pin(callback())));
        self
    }

    /// What reaches the program.
    #[must_use]
    pub fn listen(mut self, listen: Listen) -> Self {
        self.listen = listen;
        self
    }

    /// What the server keeps while the device is away.
    #[must_use]
    pub fn session(mut self, session: Session) -> Self {
        self.session = session;
        self
    }

    /// Where messages wait until they are stored; in memory if this is not called.
    #[must_use]
    pub fn outbox(self, outbox: impl Outbox) -> Self {
        *self.outbox.lock() = Box::new(outbox);
        self
    }

    /// Certificates (PEM) of those who may vouch for the server, in place of the system's.
    ///
    /// # Errors
    /// If there is none in it.
    pub fn roots(mut self, pem: &[u8]) -> Result<Self, InvalidOptions> {
        self.roots = Some(certificates(pem)?);
        Ok(self)
    }

    /// The certificate (PEM, with those that vouch for it) and key that the client shows.
    ///
    /// # Errors
    /// If either cannot be read.
    pub fn client_certificate(mut self, certificate: &[u8], key: &[u8]) -> Result<Self, InvalidOptions> {
        let key =
            PrivateKeyDer::from_pem_slice(key).map_err(|error| InvalidOptions::Tls(format!("the key: {error}")))?;
        self.identity = Some((certificates(certificate)?, key));
        Ok(self)
    }

    /// After so much silence the server is asked whether it is there, and after twice as much it is taken for gone. At least 5 s; 30 s if this
    /// is not called.
    #[must_use]
    pub fn keep_alive(mut self, keep_alive: Duration) -> Self {
        self.keep_alive = keep_alive.clamp(Duration::from_secs(5), Duration::from_secs(u64::from(u16::MAX)));
        self
    }

    /// How long an attempt to connect takes at most, from asking for a token until messages flow; 15 s if this is not called.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout.max(Duration::from_secs(1));
        self
    }

    /// How long requests wait for their answers, over reconnects too; 30 s if this is not called.
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// How long the client waits before it connects anew: at random up to `min` at first, up to twice as long each time, up to `max`. 250 ms and
    /// 30 s if this is not called.
    #[must_use]
    pub fn retry(mut self, min: Duration, max: Duration) -> Self {
        self.retry_min = min.max(Duration::from_millis(1));
        self.retry_max = max.max(self.retry_min);
        self
    }

    pub(crate) fn tls(&self) -> Result<Arc<rustls::ClientConfig>, InvalidOptions> {
        let failed = |error: &dyn fmt::Display| InvalidOptions::Tls(error.to_string());
        let mut roots = rustls::RootCertStore::empty();
        match &self.roots {
            Some(given) => {
                for certificate in given {
                    roots.add(certificate.clone()).map_err(|error| failed(&error))?;
                }
            }
            None => {
                let system = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(system.certs);
                if roots.is_empty() {
                    return Err(InvalidOptions::Tls("this system has no root certificates".to_owned()));
                }
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(&error))?
            .with_root_certificates(roots);
        let config = match &self.identity {
            Some((chain, key)) => {
                builder.with_client_auth_cert(chain.clone(), key.clone_key()).map_err(|error| failed(&error))?
            }
            None => builder.with_no_client_auth(),
        };
        Ok(Arc::new(config))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, InvalidOptions> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let certificates = certificates.map_err(|error| InvalidOptions::Tls(format!("the certificate: {error}")))?;
    if certificates.is_empty() {
        return Err(InvalidOptions::Tls("there is no certificate in the PEM".to_owned()));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(server: &str) -> Result<Options, InvalidOptions> {
        Options::new(server, "alice", "laptop")
    }

    #[test]
    fn addresses() {
        for (server, transport, host, port, address) in [
            ("mqtt://chat.example.org", Transport::Tcp, "chat.example.org", 1883, "mqtt://chat.example.org:1883"),
            ("mqtts://chat.example.org", Transport::Tls, "chat.example.org", 8883, "mqtts://chat.example.org:8883"),
            ("mqtt://127.0.0.1:1884/", Transport::Tcp, "127.0.0.1", 1884, "mqtt://127.0.0.1:1884"),
            ("mqtt://[::1]:1884", Transport::Tcp, "[::1]", 1884, "mqtt://[::1]:1884"),
            ("ws://localhost:8080", Transport::WebSocket, "localhost", 8080, "ws://localhost:8080/mqtt"),
            ("wss://a.example/x/y", Transport::WebSocketTls, "a.example", 443, "wss://a.example:443/x/y"),
        ] {
            let options = new(server).unwrap();
            assert_eq!(
                (options.transport, options.host.as_str(), options.port, options.address.as_str()),
                (transport, host, port, address)
            );
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (server, problem) in [
            ("localhost:1883", "no such scheme"),
            ("", "empty"),
            ("http://localhost", "no such scheme"),
            ("mqtt://localhost/path", "no paths"),
            ("mqtt://", "empty"),
            ("ws://[::1]:8080", "use a name"),
        ] {
            let error = new(server).unwrap_err().to_string();
            assert!(error.contains(problem) && error.contains("mqtts://"), "{server}: {error}");
        }
        let error = new("mqtt://alice:secret@localhost").unwrap_err().to_string();
        assert!(error.contains("do not belong") && !error.contains("secret"), "{error}");
        assert!(matches!(Options::new("mqtt://h", "Alice", "d"), Err(InvalidOptions::User(_))));
        for device in ["", "a\nb", &"d".repeat(257)] {
            assert_eq!(Options::new("mqtt://h", "alice", device).unwrap_err(), InvalidOptions::Device);
        }
        assert!(new("mqtt://h").unwrap().roots(b"no PEM").is_err());
        assert!(new("mqtt://h").unwrap().client_certificate(b"", b"").is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", new("mqtt://h").unwrap().password("secret"));
        assert!(shown.contains("alice") && !shown.contains("secret"), "{shown}");
    }
}
