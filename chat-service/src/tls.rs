//! TLS: certificate, key and the authorities of clients, from files, and read again when they change.
//!
//! A handshake begins with what was read last. If new files are wrong the old ones stay in use, and the operator is told.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::settings::TlsSettings;

/// How often the files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

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

/// What handshakes begin with.
pub struct Tls {
    settings: Files,
    config: RwLock<Arc<ServerConfig>>,
}

/// Paths.
#[derive(Clone, Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

impl Files {
    /// When they were changed last, as far as that can be told.
    fn changed(&self) -> Vec<Option<SystemTime>> {
        let paths = [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref()];
        let changed = |path: &PathBuf| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        paths.into_iter().flatten().map(changed).collect()
    }
}

impl Tls {
    /// `None` if there is no certificate in the settings.
    ///
    /// # Errors
    /// The first thing that is wrong with the files.
    pub fn new(settings: &TlsSettings) -> Result<Option<Arc<Self>>, TlsError> {
        let (Some(certificate), Some(key)) = (settings.certificate.clone(), settings.key.clone()) else {
            return Ok(None);
        };
        let settings = Files { certificate, key, client_ca: settings.client_ca.clone() };
        let config = RwLock::new(Arc::new(config(&settings)?));
        Ok(Some(Arc::new(Self { settings, config })))
    }

    /// Reads the files again. If one of them is wrong everything stays as it was.
    ///
    /// # Errors
    /// The first thing that is wrong with the files.
    pub fn reload(&self) -> Result<(), TlsError> {
        *self.config.write() = Arc::new(config(&self.settings)?);
        Ok(())
    }

    /// Reads the files again when they have changed, until `stop`.
    pub async fn watch(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut seen = self.settings.changed();
        loop {
            tokio::select! {
                _ = stop.wait_for(|set| *set) => return,
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
            let tls = Arc::clone(&self);
            let before = seen.clone();
            let looked = tokio::task::spawn_blocking(move || {
                let now = tls.settings.changed();
                let outcome = (now != before).then(|| tls.reload());
                (now, outcome)
            });
            let Ok((now, outcome)) = looked.await else { return };
            seen = now;
            match outcome {
                None => {}
                Some(Ok(())) => tracing::info!("read the certificate again"),
                Some(Err(error)) => tracing::error!(%error, "the certificate stays as it was"),
            }
        }
    }

    /// The server's side of a handshake. With the common name of the certificate that the client showed, if it showed one.
    ///
    /// # Errors
    /// The client does not speak TLS, or shows a certificate that is not taken.
    pub async fn accept<T>(&self, io: T) -> io::Result<(TlsStream<T>, Option<Arc<str>>)>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let config = Arc::clone(&self.config.read());
        let stream = TlsAcceptor::from(config).accept(io).await?;
        let name = stream.get_ref().1.peer_certificates().and_then(|chain| common_name(chain.first()?));
        Ok((stream, name))
    }
}

fn config(files: &Files) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Pair)?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates("tls.client_ca", path)? {
                roots.add(authority).map_err(|error| TlsError::ClientCa(error.to_string()))?;
            }
            // Whoever shows none logs in some other way.
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .allow_unauthenticated()
                .build()
                .map_err(|error| TlsError::ClientCa(error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let chain = certificates("tls.certificate", &files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| TlsError::File {
        key: "tls.key",
        path: files.key.clone(),
        reason: format!("there is no private key in it, in PEM: {error}"),
    })?;
    builder.with_single_cert(chain, key).map_err(TlsError::Pair)
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let error = |reason: String| TlsError::File { key, path: path.to_owned(), reason };
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|cause| error(cause.to_string()))?.collect();
    let found = found.map_err(|cause| error(cause.to_string()))?;
    if found.is_empty() { Err(error("there is no certificate in it, in PEM".to_owned())) } else { Ok(found) }
}

fn common_name(certificate: &CertificateDer<'_>) -> Option<Arc<str>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let mut names = certificate.subject().iter_common_name();
    let name = names.next()?.as_str().ok()?.into();
    // Two names are none.
    names.next().is_none().then_some(name)
}
