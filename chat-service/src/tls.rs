//! TLS: certificate, key and the authorities of clients, from files, and read again when they change; or a certificate that `acme` gives.
//!
//! A handshake begins with what was read last. If new files are wrong the old ones stay in use, and the operator is told. Whoever accepts a
//! connection counts it first: a handshake has a deadline of its own, and the costly part of it takes its turn, so that a crowd at the door is
//! no burden for those inside.

use std::future::poll_fn;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::task::ready;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use broker::service::{Credential, ShownCertificate};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{Acceptor, ClientHello, ServerSessionMemoryCache, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::auth::authorities::Authorities;
use crate::settings::TlsSettings;

/// How often the files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// TLS sessions that can be resumed, for each listener: as many as rustls keeps by itself.
const SESSIONS_KEPT: usize = 256;
/// Nobody waits for ever.
const LIFETIME_MAX: Duration = Duration::from_secs(100 * 365 * 86_400);
/// What a client asks for that checks a challenge of ACME's [RFC 8737].
const ACME_ALPN: &[u8] = b"acme-tls/1";

/// Why TLS cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is not what it has to be.
    #[error("{key} ({}): {reason}", path.display())]
    File { key: &'static str, path: PathBuf, reason: String },
    /// The files do not fit together.
    #[error("tls.certificate and tls.key: {0}")]
    Pair(rustls::Error),
    /// The authorities of clients cannot be used.
    #[error("tls.client_ca: {0}")]
    ClientCa(String),
}

/// What is spoken over TLS. A client that asks for something else by ALPN is refused: no page can be talked into sending HTTP to MQTT's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken {
    Mqtt,
    Http,
}

impl Spoken {
    fn alpn(self) -> &'static [u8] {
        match self {
            Self::Mqtt => b"mqtt",
            Self::Http => b"http/1.1",
        }
    }
}

/// What handshakes begin with.
pub struct Tls {
    client_ca: Option<PathBuf>,
    /// Told who is in `client_ca` now.
    authorities: Arc<Authorities>,
    /// `None`: certificates are given.
    files: Option<PairFiles>,
    /// What was given last. Held until it is shown: two changes at a time do not undo each other.
    given: Mutex<Option<Pair>>,
    /// `None`: there is no certificate yet.
    configs: RwLock<Option<Configs>>,
    /// What answers an ACME challenge, by domain.
    challenges: RwLock<FxHashMap<String, Arc<ServerConfig>>>,
    timeout: Duration,
    /// For the costly part of a handshake. It is fair: first come, first served.
    turns: Semaphore,
}

#[derive(Clone)]
struct Configs {
    mqtt: Arc<ServerConfig>,
    http: Arc<ServerConfig>,
    /// Of those whose certificates they take.
    credential: Credential,
}

/// Paths.
#[derive(Clone, Debug)]
struct PairFiles {
    certificate: PathBuf,
    key: PathBuf,
}

/// A certificate with its chain, and its key.
pub struct Pair {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl Pair {
    fn copy(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

/// Those whose clients' certificates are taken.
struct ClientAuthorities {
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    certificates: Vec<CertificateDer<'static>>,
}

impl Tls {
    /// `None` if there is no certificate in the settings, and none `is_given` later. A handshake may take as long as `timeout`. Whose clients'
    /// certificates are taken is told to `authorities`.
    ///
    /// # Errors
    /// The first thing that is wrong with the files.
    pub fn new(
        settings: &TlsSettings,
        is_given: bool,
        timeout: Duration,
        authorities: Arc<Authorities>,
    ) -> Result<Option<Arc<Self>>, TlsError> {
        let files = match (settings.certificate.clone(), settings.key.clone()) {
            (Some(certificate), Some(key)) => Some(PairFiles { certificate, key }),
            _ if is_given => None,
            _ => return Ok(None),
        };
        // At least one core is left for everything else, if there is another.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let tls = Self {
            client_ca: settings.client_ca.clone(),
            authorities,
            files,
            given: Mutex::new(None),
            configs: RwLock::new(None),
            challenges: RwLock::default(),
            timeout,
            turns: Semaphore::new((cores / 2).max(1)),
        };
        tls.reload()?;
        Ok(Some(Arc::new(tls)))
    }

    /// Reads the files again. If one of them is wrong everything stays as it was. A certificate that was given stays too.
    ///
    /// # Errors
    /// The first thing that is wrong with the files.
    pub fn reload(&self) -> Result<(), TlsError> {
        let Some(files) = &self.files else {
            let given = self.given.lock();
            return match &*given {
                Some(pair) => self.show(pair.copy()),
                // Whatever is wrong with the authorities of clients is told now, and not when the first certificate comes.
                None => client_authorities(self.client_ca.as_deref()).map(drop),
            };
        };
        let chain = certificates("tls.certificate", &files.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| TlsError::File {
            key: "tls.key",
            path: files.key.clone(),
            reason: format!("there is no private key in it, in PEM: {error}"),
        })?;
        self.show(Pair { chain, key })
    }

    /// Shows this certificate from now on.
    ///
    /// # Errors
    /// Certificate and key do not fit together, or `tls.client_ca` cannot be used.
    pub fn give(&self, pair: Pair) -> Result<(), TlsError> {
        let mut given = self.given.lock();
        self.show(pair.copy())?;
        *given = Some(pair);
        Ok(())
    }

    fn show(&self, pair: Pair) -> Result<(), TlsError> {
        let clients = client_authorities(self.client_ca.as_deref())?;
        let [mqtt, http] = configs(clients.verifier, pair)?;
        // Before anybody begins a handshake with it. One that began with what was there before is judged by this when it is done.
        let credential = self.authorities.set(clients.certificates.iter().map(AsRef::as_ref));
        *self.configs.write() = Some(Configs { mqtt, http, credential });
        Ok(())
    }

    /// Answers those who check an ACME challenge for this domain with this certificate, until it is withdrawn.
    ///
    /// # Errors
    /// The key cannot be used.
    pub fn give_challenge(&self, domain: &str, pair: Pair) -> Result<(), TlsError> {
        let provider = provider();
        let key = provider.key_provider.load_private_key(pair.key).map_err(TlsError::Pair)?;
        // What says that it answers a challenge is critical in it, and unknown to those who look whether certificate and key fit together.
        let shown = SingleCertAndKey::from(CertifiedKey::new(pair.chain, key));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13, &TLS12])
            .map_err(TlsError::Pair)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(shown));
        config.alpn_protocols = vec![ACME_ALPN.to_vec()];
        self.challenges.write().insert(domain.to_owned(), Arc::new(config));
        Ok(())
    }

    /// No challenge for this domain is answered any longer.
    pub fn withdraw_challenge(&self, domain: &str) {
        self.challenges.write().remove(domain);
    }

    /// Reads the files again when they have changed, until `stop`, and calls `changed` then.
    pub async fn watch(self: Arc<Self>, changed: impl Fn(), mut stop: watch::Receiver<bool>) {
        let mut seen = self.changed();
        loop {
            tokio::select! {
                _ = stop.wait_for(|set| *set) => return,
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
            let tls = Arc::clone(&self);
            let before = seen.clone();
            let looked = tokio::task::spawn_blocking(move || {
                let now = tls.changed();
                let outcome = (now != before).then(|| tls.reload());
                (now, outcome)
            });
            let Ok((now, outcome)) = looked.await else { return };
            seen = now;
            match outcome {
                None => {}
                Some(Ok(())) => {
                    changed();
                    tracing::info!("read the certificate again");
                }
                Some(Err(error)) => tracing::error!(%error, "the certificate stays as it was"),
            }
        }
    }

    /// When the files were changed last, as far as that can be told.
    fn changed(&self) -> Vec<Option<SystemTime>> {
        let (certificate, key) = self.files.as_ref().map(|files| (&files.certificate, &files.key)).unzip();
        let changed = |path: &PathBuf| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        [certificate, key, self.client_ca.as_ref()].into_iter().flatten().map(changed).collect()
    }

    /// The server's side of a handshake. With the certificate that the client showed, if it showed one that says who it is.
    ///
    /// # Errors
    /// The client does not speak TLS, is too slow, or shows a certificate that is not taken; or there is no certificate to show it yet; or all it
    /// wanted was to check an ACME challenge.
    pub async fn accept<T>(&self, io: T, spoken: Spoken) -> io::Result<(TlsStream<T>, Option<ShownCertificate>)>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        match tokio::time::timeout(self.timeout, self.handshake(io, spoken)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long")),
        }
    }

    async fn handshake<T>(&self, io: T, spoken: Spoken) -> io::Result<(TlsStream<T>, Option<ShownCertificate>)>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        // Waiting for a client costs nobody a turn.
        let hello = LazyConfigAcceptor::new(Acceptor::default(), io).await?;
        if let Some(challenge) = self.challenge(&hello.client_hello()) {
            let mut stream = self.in_turns(async move { hello.into_stream(challenge).await }).await?;
            stream.shutdown().await?;
            return Err(io::Error::other("it was an ACME challenge, and is answered"));
        }
        let configs = self.configs.read().clone();
        let Some(configs) = configs else {
            return Err(io::Error::other("there is no certificate yet"));
        };
        let config = match spoken {
            Spoken::Mqtt => configs.mqtt,
            Spoken::Http => configs.http,
        };
        let mut stream = self.in_turns(async move { hello.into_stream(config).await }).await?;
        let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let shown = match leaf.map(|leaf| shown(leaf, configs.credential)).transpose() {
            Ok(shown) => shown.flatten(),
            Err(reason) => {
                stream.shutdown().await?;
                return Err(io::Error::other(reason));
            }
        };
        Ok((stream, shown))
    }

    /// Whatever is worked on is worked on in a turn: keys are agreed on and signatures are made or checked after the first hello, after a second one
    /// that the client was asked for, or when its certificate comes. Waiting for a client in between costs nobody a turn.
    async fn in_turns<F: Future>(&self, work: F) -> F::Output {
        let mut work = pin!(work);
        let mut turn = pin!(self.turns.acquire());
        poll_fn(|cx| {
            // Nobody closes the semaphore.
            let taken = ready!(turn.as_mut().poll(cx));
            let worked = work.as_mut().poll(cx);
            drop(taken);
            turn.set(self.turns.acquire());
            worked
        })
        .await
    }

    /// `None` if it is a client like any other.
    fn challenge(&self, hello: &ClientHello<'_>) -> Option<Arc<ServerConfig>> {
        let asks = hello.alpn()?.eq([ACME_ALPN]);
        let domain = hello.server_name().filter(|_| asks)?;
        self.challenges.read().get(&domain.to_ascii_lowercase()).cloned()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn client_authorities(client_ca: Option<&Path>) -> Result<ClientAuthorities, TlsError> {
    let Some(path) = client_ca else { return Ok(ClientAuthorities { verifier: None, certificates: Vec::new() }) };
    let certificates = certificates("tls.client_ca", path)?;
    let mut roots = RootCertStore::empty();
    for authority in &certificates {
        roots.add(authority.clone()).map_err(|error| TlsError::ClientCa(error.to_string()))?;
    }
    // Whoever shows none logs in some other way.
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| TlsError::ClientCa(error.to_string()))?;
    Ok(ClientAuthorities { verifier: Some(verifier), certificates })
}

/// For MQTT and for HTTP.
fn configs(verifier: Option<Arc<dyn ClientCertVerifier>>, pair: Pair) -> Result<[Arc<ServerConfig>; 2], TlsError> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(TlsError::Pair)?;
    let builder = match verifier {
        None => builder.with_no_client_auth(),
        Some(verifier) => builder.with_client_cert_verifier(verifier),
    };
    let config = builder.with_single_cert(pair.chain, pair.key).map_err(TlsError::Pair)?;
    let of = |spoken: Spoken| {
        let mut config = config.clone();
        config.alpn_protocols = vec![spoken.alpn().to_vec()];
        // Each has sessions of its own to resume.
        config.session_storage = ServerSessionMemoryCache::new(SESSIONS_KEPT);
        Arc::new(config)
    };
    Ok([of(Spoken::Mqtt), of(Spoken::Http)])
}

/// Every certificate of a PEM file; at least one.
pub fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let error = |reason: String| TlsError::File { key, path: path.to_owned(), reason };
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|cause| error(cause.to_string()))?.collect();
    let found = found.map_err(|cause| error(cause.to_string()))?;
    if found.is_empty() { Err(error("there is no certificate in it, in PEM".to_owned())) } else { Ok(found) }
}

/// Who a certificate says its owner is; `None` if it does not say that. `Err` if its time is over: a session that is resumed brings the
/// certificate of then, which nobody has looked at since.
fn shown(certificate: &CertificateDer<'_>, credential: Credential) -> Result<Option<ShownCertificate>, &'static str> {
    let (_, certificate) =
        X509Certificate::from_der(certificate).map_err(|_| "the client's certificate cannot be read")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // It is good until the end of that second.
    let until_s = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0).saturating_add(1);
    let left = Duration::from_secs(until_s).saturating_sub(now).min(LIFETIME_MAX);
    if left.is_zero() {
        return Err("the client's certificate has expired");
    }
    let mut names = certificate.subject().iter_common_name();
    let name = names.next().and_then(|name| name.as_str().ok());
    // Two names are none.
    let name = name.filter(|_| names.next().is_none());
    Ok(name.map(|name| ShownCertificate { name: name.into(), expires_at: Instant::now() + left, credential }))
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};
    use std::task::Poll;

    use rcgen::{CertificateParams, KeyPair};
    use rustls::crypto::{ActiveKeyExchange, SharedSecret, SupportedKxGroup};
    use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
    use rustls::{ClientConfig, ClientConnection, NamedGroup};
    use tokio::io::{AsyncReadExt, DuplexStream};

    use super::*;

    fn issued() -> (String, Pair) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
        let der = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        (certificate.pem(), Pair { chain: vec![certificate.der().clone()], key: der })
    }

    /// Also beside a certificate that is in no file.
    #[test]
    fn the_authorities_of_clients_are_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("authorities.pem");
        std::fs::write(&file, issued().0).unwrap();
        let settings = TlsSettings { certificate: None, key: None, client_ca: Some(file.clone()) };
        let authorities = Arc::new(Authorities::default());
        let tls = Tls::new(&settings, true, Duration::from_secs(1), Arc::clone(&authorities)).unwrap().unwrap();
        let credential = || tls.configs.read().as_ref().map(|configs| configs.credential);
        tls.reload().unwrap();
        assert_eq!(credential(), None, "there is no certificate yet");
        tls.give(issued().1).unwrap();
        let first = credential().unwrap();
        tls.reload().unwrap();
        assert_eq!(credential(), Some(first));
        assert!(authorities.takes(first));
        std::fs::write(&file, issued().0).unwrap();
        tls.reload().unwrap();
        assert!(!authorities.takes(first) && authorities.takes(credential().unwrap()));
        std::fs::write(&file, "nonsense").unwrap();
        tls.reload().unwrap_err();
        assert!(authorities.takes(credential().unwrap()), "a mistake changes nothing");
    }

    #[test]
    fn a_certificate_says_who_and_until_when() {
        let shown_of = |names: &[&str], left_s: i64| {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.distinguished_name = rcgen::DistinguishedName::new();
            if let [name] = names {
                params.distinguished_name.push(rcgen::DnType::CommonName, *name);
            }
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let until_s = i64::try_from(now.as_secs()).unwrap() + left_s;
            params.not_after = (UNIX_EPOCH + Duration::from_secs(until_s.try_into().unwrap())).into();
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            shown(certificate.der(), Credential(7))
        };
        let bob = shown_of(&["bob"], 60).unwrap().unwrap();
        let left = bob.expires_at.saturating_duration_since(Instant::now());
        assert_eq!((&*bob.name, bob.credential), ("bob", Credential(7)));
        assert!((55..=61).contains(&left.as_secs()), "{left:?}");
        assert_eq!(shown_of(&[], 60), Ok(None));
        for names in [&["bob"][..], &[]] {
            assert_eq!(shown_of(names, -2), Err("the client's certificate has expired"));
        }
    }

    /// A group that no server here has: whoever offers it first is asked for a second hello.
    #[derive(Debug)]
    struct Unknown;

    impl SupportedKxGroup for Unknown {
        fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, rustls::Error> {
            Ok(Box::new(Unknown))
        }

        fn name(&self) -> NamedGroup {
            NamedGroup::X448
        }
    }

    impl ActiveKeyExchange for Unknown {
        fn complete(self: Box<Self>, _: &[u8]) -> Result<SharedSecret, rustls::Error> {
            Err(rustls::Error::General("nobody has this group".to_owned()))
        }

        fn pub_key(&self) -> &[u8] {
            &[7; 56]
        }

        fn group(&self) -> NamedGroup {
            NamedGroup::X448
        }
    }

    /// A server with a certificate, and a client that believes it and asks for a second round of hellos.
    fn ends() -> (Arc<Tls>, ClientConnection) {
        let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der());
        let settings = TlsSettings { certificate: None, key: None, client_ca: None };
        let tls = Tls::new(&settings, true, Duration::from_secs(3_600), Arc::default()).unwrap().unwrap();
        tls.give(Pair { chain: vec![signed.cert.der().clone()], key: key.into() }).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(signed.cert.der().clone()).unwrap();
        let mut groups: Vec<&'static dyn SupportedKxGroup> = vec![&Unknown];
        groups.extend(&rustls::crypto::ring::default_provider().kx_groups);
        let provider = CryptoProvider { kx_groups: groups, ..rustls::crypto::ring::default_provider() };
        let config = ClientConfig::builder_with_provider(provider.into())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").unwrap();
        (tls, ClientConnection::new(config.into(), name).unwrap())
    }

    async fn send(client: &mut ClientConnection, socket: &mut DuplexStream) {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        socket.write_all(&bytes).await.unwrap();
    }

    /// `false` if the server says nothing though everybody has done what there was to do.
    async fn hear(client: &mut ClientConnection, socket: &mut DuplexStream) -> bool {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let mut bytes = [0; 4_096];
        let mut reading = pin!(socket.read(&mut bytes));
        let Poll::Ready(read) = poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx))).await else { return false };
        let mut bytes = Cursor::new(&bytes[..read.unwrap()]);
        while client.read_tls(&mut bytes).unwrap() > 0 {}
        client.process_new_packets().unwrap();
        true
    }

    #[tokio::test]
    async fn each_hello_waits_for_its_turn() {
        let (tls, mut client) = ends();
        let turns = u32::try_from(tls.turns.available_permits()).unwrap();
        let (mut socket, server) = tokio::io::duplex(1 << 16);
        let accepting = tokio::spawn({
            let tls = Arc::clone(&tls);
            async move { tls.accept(server, Spoken::Mqtt).await }
        });
        for hello in ["first", "second"] {
            let others = tls.turns.acquire_many(turns).await.unwrap();
            send(&mut client, &mut socket).await;
            assert!(!hear(&mut client, &mut socket).await, "the {hello} hello was worked on out of turn");
            drop(others);
            assert!(hear(&mut client, &mut socket).await, "the {hello} hello was not answered");
        }
        while client.is_handshaking() {
            assert!(hear(&mut client, &mut socket).await);
        }
        // Waiting for the client has no turn.
        assert_eq!(tls.turns.available_permits(), usize::try_from(turns).unwrap());
        client.writer().write_all(b"hello").unwrap();
        send(&mut client, &mut socket).await;
        let (mut stream, _) = accepting.await.unwrap().unwrap();
        let mut heard = [0; 5];
        stream.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello");
    }
}
