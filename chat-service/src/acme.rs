//! A certificate that the server gets for itself, by ACME (RFC 8555), and renews before a third of its lifetime is left.
//!
//! Whoever issues it checks the domains by TLS-ALPN-01 (RFC 8737) on the very TLS listeners: that needs no other port, and answers nobody but
//! those who ask for it. Account and certificate lie in `acme` below `storage.path`, for the owner alone, each replaced as a whole. What is in
//! use stays in use whatever fails; nothing here ever ends the server.

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::Limited;
use hyper::{Request, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, BodyWrapper, BytesResponse, ChallengeType, HttpClient,
    Identifier, NewAccount, NewOrder, Order, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize, Serializer};
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::settings::AcmeSettings;
use crate::tls::{self, Pair, Tls, TlsError};

/// Folder below that of the messages.
const FOLDER: &str = "acme";
const ACCOUNT_FILE: &str = "account.json";
const CERTIFICATE_FILE: &str = "certificate.json";
/// The longest that one request to the directory may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest that everything for one certificate may take.
const ORDER_TIMEOUT: Duration = Duration::from_secs(300);
/// How long the directory may take to check the domains, and to issue.
const POLL_TIMEOUT: Duration = Duration::from_secs(90);
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Pause after a failure, doubled after each further one. Let's Encrypt wants no more than five failures an hour.
const RETRY_MIN: Duration = Duration::from_secs(120);
const RETRY_MAX: Duration = Duration::from_secs(3_600);
/// The clock is looked at so often: it may be set anew while the server sleeps.
const LOOK_MAX: Duration = Duration::from_secs(3_600);

/// A domain that a certificate can be for: names only, no wildcards, which TLS-ALPN-01 cannot check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainName(String);

impl FromStr for DomainName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let last_is_number = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
        if name.len() > 253 || last_is_number || !name.split('.').all(is_label) {
            return Err("it is no domain name, such as chat.example.org; wildcards and addresses are none".to_owned());
        }
        Ok(Self(name.to_ascii_lowercase()))
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where an ACME directory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryUrl(String);

impl FromStr for DirectoryUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|error| format!("{url:?} is no URL: {error}"))?;
        match (uri.scheme_str(), uri.host()) {
            (Some("https"), Some(_)) => Ok(Self(url.to_owned())),
            _ => Err(format!("{url:?} does not begin with https:// and a host")),
        }
    }
}

impl Serialize for DirectoryUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum AcmeError {
    /// A file or folder of ours cannot be read or written.
    #[error("{}: {cause}", path.display())]
    File { path: PathBuf, cause: io::Error },
    /// The system's authorities, or those in `acme.directory_ca`, cannot be used.
    #[error("acme.directory_ca: {0}")]
    DirectoryCa(String),
    /// The directory cannot be reached, or refuses.
    #[error("the ACME directory: {0}")]
    Directory(#[from] instant_acme::Error),
    /// The directory could not check a domain.
    #[error("{domain}: {reason}")]
    Domain { domain: String, reason: String },
    /// What the directory answered is not what it should be.
    #[error("{0}")]
    Answer(String),
    /// Keys or requests could not be made.
    #[error("making a key or a request: {0}")]
    Making(#[from] rcgen::Error),
    /// The certificate cannot be shown.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// It took longer than it should.
    #[error("it was not done within {} s", ORDER_TIMEOUT.as_secs())]
    Timeout,
}

/// An account at one directory.
#[derive(Serialize, Deserialize)]
struct KeptAccount {
    directory: String,
    credentials: AccountCredentials,
}

/// A certificate, and what was asked for.
#[derive(Serialize, Deserialize)]
struct KeptCertificate {
    directory: String,
    domains: Vec<DomainName>,
    chain: String,
    key: String,
}

/// When a certificate is valid, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Validity {
    from_s: i64,
    until_s: i64,
}

impl Validity {
    /// When the last third of its lifetime begins.
    fn renew_at_s(self) -> i64 {
        self.until_s - self.until_s.saturating_sub(self.from_s) / 3
    }
}

/// Gets the certificate, and gets it again.
pub struct Acme {
    settings: AcmeSettings,
    folder: PathBuf,
    tls: Arc<Tls>,
    client: DirectoryClient,
}

impl Acme {
    /// With the certificate that was issued before, if there is one for these domains.
    ///
    /// # Errors
    /// The folder cannot be made, or the authority that vouches for the directory cannot be read.
    pub fn new(settings: &AcmeSettings, storage: &Path, tls: &Arc<Tls>) -> Result<Self, AcmeError> {
        let folder = storage.join(FOLDER);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|cause| AcmeError::File { path: folder.clone(), cause })?;
        let client = DirectoryClient::new(settings)?;
        Ok(Self { settings: settings.clone(), folder, tls: Arc::clone(tls), client })
    }

    /// Until `stop`.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut validity = match self.take_kept() {
            Ok(validity) => validity,
            Err(error) => {
                tracing::error!(%error, "the certificate of before cannot be used");
                None
            }
        };
        let mut pause = RETRY_MIN;
        loop {
            let wait = match validity {
                Some(validity) if now_s() < validity.renew_at_s() => {
                    let left_s = u64::try_from(validity.renew_at_s() - now_s()).unwrap_or(0);
                    Duration::from_secs(left_s).min(LOOK_MAX)
                }
                _ => {
                    let failure = tokio::select! {
                        _ = stop.wait_for(|set| *set) => return,
                        outcome = self.renew() => match outcome {
                            Ok(renewed) => {
                                validity = Some(renewed);
                                pause = RETRY_MIN;
                                // A clock that is wrong must not ask for one certificate after the other.
                                (now_s() >= renewed.renew_at_s()).then(|| "the new certificate is about to expire already".to_owned())
                            }
                            Err(error) => Some(error.to_string()),
                        },
                    };
                    match failure {
                        None => Duration::ZERO,
                        Some(reason) => {
                            let retry = pause;
                            tracing::error!(
                                reason,
                                retry_s = retry.as_secs(),
                                "no new certificate; the one in use, if any, stays"
                            );
                            pause = (pause * 2).min(RETRY_MAX);
                            retry
                        }
                    }
                }
            };
            tokio::select! {
                _ = stop.wait_for(|set| *set) => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Shows the certificate of before.
    fn take_kept(&self) -> Result<Option<Validity>, AcmeError> {
        let Some(kept) = self.read::<KeptCertificate>(CERTIFICATE_FILE)? else { return Ok(None) };
        if kept.directory != self.settings.directory.0 || kept.domains != self.settings.domains {
            tracing::info!("the certificate of before is of another directory, or for other domains");
            return Ok(None);
        }
        let (pair, validity) = parse(&kept.chain, &kept.key)?;
        self.tls.give(pair)?;
        Ok(Some(validity))
    }

    /// Gets a new one, and shows it.
    async fn renew(&self) -> Result<Validity, AcmeError> {
        let domains = self.settings.domains.iter().map(DomainName::to_string).collect::<Vec<_>>();
        tracing::info!(?domains, directory = self.settings.directory.0, "asking for a certificate");
        let ordered = tokio::time::timeout(ORDER_TIMEOUT, self.order(&domains)).await;
        for domain in &domains {
            self.tls.withdraw_challenge(domain);
        }
        let (chain, key) = ordered.map_err(|_| AcmeError::Timeout)??;
        let (pair, validity) = parse(&chain, &key)?;
        self.tls.give(pair)?;
        let kept = KeptCertificate {
            directory: self.settings.directory.0.clone(),
            domains: self.settings.domains.clone(),
            chain,
            key,
        };
        // It is shown all the same; the next start will ask for another.
        if let Err(error) = self.write(CERTIFICATE_FILE, &kept) {
            tracing::error!(%error, "the new certificate could not be kept");
        }
        tracing::info!(?domains, valid_until_s = validity.until_s, "a certificate was issued");
        Ok(validity)
    }

    /// Chain and key of a new certificate.
    async fn order(&self, domains: &[String]) -> Result<(String, String), AcmeError> {
        let account = self.account().await?;
        let identifiers: Vec<_> = domains.iter().cloned().map(Identifier::Dns).collect();
        let mut order = account.new_order(&NewOrder::new(&identifiers)).await?;
        self.answer_challenges(&mut order).await?;
        let policy = RetryPolicy::default().timeout(POLL_TIMEOUT);
        if order.poll_ready(&policy).await? != OrderStatus::Ready {
            return Err(why_not(&mut order).await);
        }
        let mut params = CertificateParams::new(domains)?;
        params.distinguished_name = DistinguishedName::new();
        let key = KeyPair::generate()?;
        order.finalize_csr(params.serialize_request(&key)?.der()).await?;
        let chain = order.poll_certificate(&policy).await?;
        Ok((chain, key.serialize_pem()))
    }

    async fn answer_challenges(&self, order: &mut Order) -> Result<(), AcmeError> {
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization?;
            if authorization.status == AuthorizationStatus::Valid {
                continue;
            }
            let Identifier::Dns(domain) = authorization.identifier().identifier.clone() else {
                return Err(AcmeError::Answer("the directory wants to check what was not asked for".to_owned()));
            };
            let Some(mut challenge) = authorization.challenge(ChallengeType::TlsAlpn01) else {
                let reason = "the directory does not offer to check it by TLS-ALPN-01".to_owned();
                return Err(AcmeError::Domain { domain, reason });
            };
            let mut params = CertificateParams::new([domain.clone()])?;
            let digest = challenge.key_authorization().digest();
            params.custom_extensions.push(CustomExtension::new_acme_identifier(digest.as_ref()));
            let key = KeyPair::generate()?;
            let certificate = params.self_signed(&key)?;
            let pair = Pair {
                chain: vec![certificate.der().clone()],
                key: PrivateKeyDer::try_from(key.serialize_der())
                    .map_err(|error| AcmeError::Answer(error.to_owned()))?,
            };
            self.tls.give_challenge(&domain, pair)?;
            challenge
                .set_ready()
                .await
                .map_err(|error| AcmeError::Domain { domain: domain.clone(), reason: error.to_string() })?;
        }
        Ok(())
    }

    /// The account of before, if it is at this directory; else a new one.
    async fn account(&self) -> Result<Account, AcmeError> {
        let builder = Account::builder_with_http(Box::new(self.client.clone()));
        let directory = &self.settings.directory.0;
        if let Some(kept) = self.read::<KeptAccount>(ACCOUNT_FILE)?
            && kept.directory == *directory
        {
            return Ok(builder.from_credentials(kept.credentials).await?);
        }
        let contact = match self.settings.contact.as_str() {
            "" => None,
            address if address.contains(':') => Some(address.to_owned()),
            address => Some(format!("mailto:{address}")),
        };
        let new = NewAccount {
            contact: &contact.as_deref().into_iter().collect::<Vec<_>>(),
            // Settings without that were refused.
            terms_of_service_agreed: self.settings.accept_terms,
            only_return_existing: false,
        };
        let (account, credentials) = builder.create(&new, directory.clone(), None).await?;
        self.write(ACCOUNT_FILE, &KeptAccount { directory: directory.clone(), credentials })?;
        Ok(account)
    }

    /// `None` if there is no such file.
    fn read<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Result<Option<T>, AcmeError> {
        let path = self.folder.join(name);
        let failed = |cause| AcmeError::File { path: path.clone(), cause };
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(error.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    /// Replaces the file as a whole: it is the old one or the new one, whenever the power fails. Only the owner may read it.
    fn write<T: Serialize>(&self, name: &str, content: &T) -> Result<(), AcmeError> {
        let path = self.folder.join(name);
        let new = self.folder.join(format!("{name}.new"));
        let write = || {
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(content)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        write().map_err(|cause| AcmeError::File { path: path.clone(), cause })
    }
}

/// What the directory found wrong.
async fn why_not(order: &mut Order) -> AcmeError {
    let of_the_order = order.state().error.as_ref().map(ToString::to_string);
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        let Ok(state) = authorization.refresh().await else { continue };
        let problem = state.challenges.iter().find_map(|challenge| challenge.error.as_ref());
        if let Some(problem) = problem {
            return AcmeError::Domain { domain: state.identifier().to_string(), reason: problem.to_string() };
        }
    }
    AcmeError::Answer(of_the_order.unwrap_or_else(|| "the directory did not say why it refused".to_owned()))
}

fn parse(chain: &str, key: &str) -> Result<(Pair, Validity), AcmeError> {
    let wrong = |reason: String| AcmeError::Answer(format!("the certificate: {reason}"));
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(error.to_string()))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| wrong(error.to_string()))?;
    let first = chain.first().ok_or_else(|| wrong("there is none".to_owned()))?;
    let (_, certificate) = X509Certificate::from_der(first).map_err(|error| wrong(error.to_string()))?;
    let validity = certificate.validity();
    let validity = Validity { from_s: validity.not_before.timestamp(), until_s: validity.not_after.timestamp() };
    Ok((Pair { chain, key }, validity))
}

fn now_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Asks the directory over HTTPS, and nobody else over anything else.
#[derive(Clone)]
struct DirectoryClient(Client<HttpsConnector<HttpConnector>, BodyWrapper<Bytes>>);

impl DirectoryClient {
    fn new(settings: &AcmeSettings) -> Result<Self, AcmeError> {
        let provider = rustls::crypto::ring::default_provider();
        let wrong = |reason: &dyn fmt::Display| AcmeError::DirectoryCa(reason.to_string());
        let builder = match &settings.directory_ca {
            None => {
                let builder = HttpsConnectorBuilder::new().with_provider_and_native_roots(provider);
                builder.map_err(|error| wrong(&error))?
            }
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for authority in tls::certificates("acme.directory_ca", path)? {
                    roots.add(authority).map_err(|error| wrong(&error))?;
                }
                let config = rustls::ClientConfig::builder_with_provider(provider.into())
                    .with_safe_default_protocol_versions()
                    .map_err(|error| wrong(&error))?
                    .with_root_certificates(roots)
                    .with_no_client_auth();
                HttpsConnectorBuilder::new().with_tls_config(config)
            }
        };
        let connector = builder.https_only().enable_http1().build();
        Ok(Self(Client::builder(TokioExecutor::new()).build(connector)))
    }
}

impl HttpClient for DirectoryClient {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, instant_acme::Error>> + Send>> {
        let asking = tokio::time::timeout(REQUEST_TIMEOUT, self.0.request(request));
        Box::pin(async move {
            let answer = asking.await.map_err(|error| instant_acme::Error::Other(error.into()))?;
            let answer = answer.map_err(|error| instant_acme::Error::Other(causes(&error).into()))?;
            Ok(answer.map(|body| Limited::new(body, ANSWER_BYTES_MAX)).into())
        })
    }
}

/// An error and what caused it.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domains_are_names() {
        for (name, written) in [
            ("chat.example.org", "chat.example.org"),
            ("Chat.Example.ORG", "chat.example.org"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ] {
            assert_eq!(name.parse::<DomainName>().unwrap().to_string(), written);
        }
        for wrong in [
            "",
            ".",
            "example..org",
            "*.example.org",
            "a b",
            "-a.org",
            "a-.org",
            "127.0.0.1",
            "[::1]",
            "büch.org",
            "a/b",
            &"a".repeat(64),
        ] {
            assert!(wrong.parse::<DomainName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_directory_is_asked_over_https_only() {
        assert!("https://ca.example.org/directory".parse::<DirectoryUrl>().is_ok());
        for wrong in ["", "http://ca.example.org/directory", "ca.example.org", "https://", "ftp://ca.example.org"] {
            assert!(wrong.parse::<DirectoryUrl>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_certificate_is_renewed_when_a_third_is_left() {
        assert_eq!(Validity { from_s: 1_000, until_s: 1_090 }.renew_at_s(), 1_060);
        assert_eq!(Validity { from_s: 0, until_s: 90 * 86_400 }.renew_at_s(), 60 * 86_400);
        // One that was never valid is not kept for long.
        assert!(Validity { from_s: 1_000, until_s: 900 }.renew_at_s() <= 1_000);
    }
}
