//! TLS from the client's side: an authority of the tests, certificates by it, and connections that trust it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion, crypto::ring};

use crate::chatd::{Chatd, Options};
use crate::wait::{PATIENCE, eventually};

type Authority = CertifiedIssuer<'static, KeyPair>;

/// An authority and what it has issued, in a folder.
pub struct Files {
    folder: TempDir,
    authority: Authority,
}

impl Files {
    /// An authority, and a certificate for this machine: `ca.pem`, `server.pem`, `server.key`.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "an authority of the tests");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let files = Self { folder: tempfile::tempdir()?, authority };
        std::fs::write(files.path("ca.pem"), files.authority.pem())?;
        files.issue("server", "chatd")?;
        Ok(files)
    }

    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// `{file}.pem` and `{file}.key`, of this common name.
    pub fn issue(&self, file: &str, common_name: &str) -> Result<()> {
        self.issue_for(file, common_name, None)
    }

    /// The same, until then.
    pub fn issue_for(&self, file: &str, common_name: &str, until: Option<SystemTime>) -> Result<()> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, common_name);
        if let Some(until) = until {
            params.not_after = until.into();
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.authority)?;
        std::fs::write(self.path(&format!("{file}.key")), key.serialize_pem())?;
        std::fs::write(self.path(&format!("{file}.pem")), certificate.pem())?;
        Ok(())
    }

    /// A chatd that shows its certificate on two more ports.
    pub fn options(&self) -> Options {
        Options::default()
            .set("tls.certificate", self.text("server.pem"))
            .set("tls.key", self.text("server.key"))
            .set("mqtt.tls_listen", "127.0.0.1:0")
            .set("http.tls_listen", "127.0.0.1:0")
    }

    /// What trusts the authority and shows this certificate, in the given version of TLS.
    pub fn connector_showing(&self, file: &str, version: &'static SupportedProtocolVersion) -> Result<TlsConnector> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.der().clone())?;
        let config = ClientConfig::builder_with_provider(ring::default_provider().into())
            .with_protocol_versions(&[version])?
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(self.path(&format!("{file}.pem")))?],
                PrivateKeyDer::from_pem_file(self.path(&format!("{file}.key")))?,
            )?;
        Ok(TlsConnector::from(Arc::new(config)))
    }

    /// What trusts the authority, and asks for this by ALPN.
    pub fn connector(&self, alpn: &[&str]) -> Result<TlsConnector> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.der().clone())?;
        let mut config = ClientConfig::builder_with_provider(ring::default_provider().into())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}

/// A handshake with this machine, under this name.
pub async fn connect(connector: &TlsConnector, port: u16, name: &str) -> Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from(name.to_owned())?;
    let shaking = async {
        let socket = TcpStream::connect(("127.0.0.1", port)).await?;
        socket.set_nodelay(true)?;
        connector.connect(name, socket).await
    };
    Ok(timeout(PATIENCE, shaking).await.context("a TLS handshake")??)
}

/// The port that chatd says it listens on for this protocol over TLS.
pub async fn port(chatd: &Chatd, protocol: &str) -> u16 {
    let begin = format!("{protocol} over TLS listening on 127.0.0.1:");
    let find = || chatd.greeting().lines().find_map(|line| line.strip_prefix(&begin)?.parse().ok());
    eventually("it says where it listens", PATIENCE, async || find().is_some()).await;
    find().unwrap_or_default()
}
