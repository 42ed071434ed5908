//! A certificate that chatd gets for itself, from an ACME directory of the tests that really checks: every signature and nonce of the client's,
//! the challenge on chatd's own port, and the request for the certificate.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use end_to_end::tls::{Files, connect, port};
use end_to_end::{Chatd, Options, PATIENCE, eventually};
use jsonwebtoken::{Algorithm, DecodingKey};
use parking_lot::Mutex;
use rcgen::{CertificateSigningRequestParams, SanType};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{self, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, DigitallySignedStruct, Error, ServerConfig, SignatureScheme};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

const DOMAIN: &str = "chat.example.org";
const SECOND_DOMAIN: &str = "mqtt.example.org";
/// The extension that carries the digest [RFC 8737, 3].
const ACME_IDENTIFIER: &str = "1.3.6.1.5.5.7.1.31";

struct Order {
    domains: Vec<String>,
    valid: HashSet<String>,
    refused: Option<String>,
    chain: Option<String>,
}

/// What the directory knows.
struct Directory {
    /// The directory's own certificate is of this authority, and those it issues.
    files: Files,
    address: SocketAddr,
    /// Where chatd is to be checked.
    chatd_port: Mutex<Option<u16>>,
    nonces: Mutex<HashSet<String>>,
    next: AtomicUsize,
    /// The account's key, by the URL of the account.
    accounts: Mutex<HashMap<String, Value>>,
    orders: Mutex<HashMap<usize, Order>>,
    /// What is issued is valid since so many seconds, and for so many from now on.
    lifetime_s: Mutex<(u64, u64)>,
    is_down: AtomicBool,
}

type Directories = State<Arc<Directory>>;

/// Its listener: HTTP over TLS.
struct OverTls(TcpListener, TlsAcceptor);

impl axum::serve::Listener for OverTls {
    type Io = tokio_rustls::server::TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            if let Ok((socket, address)) = self.0.accept().await
                && let Ok(stream) = self.1.accept(socket).await
            {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

impl Directory {
    async fn start() -> Arc<Self> {
        let files = Files::new().unwrap();
        let chain = CertificateDer::pem_file_iter(files.path("server.pem")).unwrap().map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(files.path("server.key")).unwrap();
        let config = ServerConfig::builder_with_provider(ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let directory = Arc::new(Self {
            files,
            address: listener.local_addr().unwrap(),
            chatd_port: Mutex::new(None),
            nonces: Mutex::default(),
            next: AtomicUsize::new(1),
            accounts: Mutex::default(),
            orders: Mutex::default(),
            lifetime_s: Mutex::new((60, 90 * 86_400)),
            is_down: AtomicBool::new(false),
        });
        let router = Router::new()
            .route("/directory", get(index))
            .route("/nonce", get(nonce))
            .route("/{kind}", post(asked))
            .route("/{kind}/{order}", post(asked))
            .route("/{kind}/{order}/{domain}", post(asked))
            .with_state(Arc::clone(&directory));
        // Ends with the test's runtime.
        let serving = axum::serve(OverTls(listener, TlsAcceptor::from(Arc::new(config))), router);
        drop(tokio::spawn(async move { serving.await.unwrap() }));
        directory
    }

    fn url(&self, path: &str) -> String {
        format!("https://127.0.0.1:{}/{path}", self.address.port())
    }

    fn options(&self) -> Options {
        Options::default()
            .set("mqtt.tls_listen", "127.0.0.1:0")
            .set("http.tls_listen", "127.0.0.1:0")
            .set("acme.domains", format!("{DOMAIN},{SECOND_DOMAIN}"))
            .set("acme.contact", "admin@example.org")
            .set("acme.directory", self.url("directory"))
            .set("acme.directory_ca", self.files.text("ca.pem"))
            .set("acme.accept_terms", true)
    }

    /// Starts chatd, whose domains are checked on the port of this protocol.
    async fn chatd(&self, checked_on: &str) -> Chatd {
        let chatd = Chatd::start_with(self.options()).await.unwrap();
        *self.chatd_port.lock() = Some(port(&chatd, checked_on).await);
        chatd
    }

    fn issued(&self) -> usize {
        self.orders.lock().values().filter(|order| order.chain.is_some()).count()
    }

    fn new_nonce(&self) -> String {
        let nonce = format!("nonce-{}", self.next.fetch_add(1, Ordering::Relaxed));
        self.nonces.lock().insert(nonce.clone());
        nonce
    }

    /// The payload of a request, if its nonce is fresh and its signature right; and who has signed it.
    fn opened(&self, path: &str, body: &[u8]) -> Result<(Value, String, Value)> {
        let body: Value = serde_json::from_slice(body)?;
        let part = |name: &str| body[name].as_str().context("a part of a JWS is missing");
        let (protected, payload) = (part("protected")?, part("payload")?);
        let decode = |text: &str| -> Result<Vec<u8>> { Ok(BASE64URL.decode(text)?) };
        let head: Value = serde_json::from_slice(&decode(protected)?)?;
        ensure!(head["alg"] == "ES256" && head["url"] == self.url(path), "{head}");
        ensure!(self.nonces.lock().remove(head["nonce"].as_str().unwrap_or_default()), "a nonce of before");
        let account = head["kid"].as_str().unwrap_or_default().to_owned();
        let key = if path == "account" {
            head["jwk"].clone()
        } else {
            self.accounts.lock().get(&account).cloned().context("nobody's account")?
        };
        let coordinate = |name: &str| key[name].as_str().unwrap_or_default();
        let verifies = DecodingKey::from_ec_components(coordinate("x"), coordinate("y"))?;
        let signed = format!("{protected}.{payload}");
        let right = jsonwebtoken::crypto::verify(part("signature")?, signed.as_bytes(), &verifies, Algorithm::ES256)?;
        ensure!(right, "the signature is wrong");
        let payload = decode(payload)?;
        Ok((if payload.is_empty() { Value::Null } else { serde_json::from_slice(&payload)? }, account, key))
    }

    fn order_body(&self, number: usize, order: &Order) -> Value {
        let status = if order.refused.is_some() {
            "invalid"
        } else if order.chain.is_some() {
            "valid"
        } else if order.valid.len() == order.domains.len() {
            "ready"
        } else {
            "pending"
        };
        let mut body = json!({
            "status": status,
            "identifiers": order.domains.iter().map(|name| json!({"type": "dns", "value": name})).collect::<Vec<_>>(),
            "authorizations":
                order.domains.iter().map(|name| self.url(&format!("authz/{number}/{name}"))).collect::<Vec<_>>(),
            "finalize": self.url(&format!("finalize/{number}")),
        });
        if order.chain.is_some() {
            body["certificate"] = json!(self.url(&format!("certificate/{number}")));
        }
        body
    }

    fn authorization_body(&self, number: usize, domain: &str, order: &Order) -> Value {
        let is_valid = order.valid.contains(domain);
        let status = match &order.refused {
            Some(_) if !is_valid => "invalid",
            _ if is_valid => "valid",
            _ => "pending",
        };
        let mut challenge = json!({
            "type": "tls-alpn-01",
            "url": self.url(&format!("challenge/{number}/{domain}")),
            "token": token(number, domain),
            "status": status,
        });
        if let Some(reason) = &order.refused {
            challenge["error"] = json!({"type": "urn:ietf:params:acme:error:unauthorized", "detail": reason});
        }
        let other = json!({"type": "http-01", "url": self.url("none"), "token": "none", "status": "pending"});
        json!({"status": status, "identifier": {"type": "dns", "value": domain}, "challenges": [other, challenge]})
    }

    /// Signs what was asked for, if it is what the order is for.
    fn issue(&self, order: &mut Order, csr: &str) -> Result<()> {
        let der = BASE64URL.decode(csr)?;
        let mut request = CertificateSigningRequestParams::from_der(&der.into())?;
        let mut names = Vec::new();
        for name in &request.params.subject_alt_names {
            match name {
                SanType::DnsName(name) => names.push(name.as_str().to_owned()),
                other => anyhow::bail!("{other:?} was not ordered"),
            }
        }
        ensure!(names == order.domains && order.valid.len() == names.len(), "{names:?} was not ordered");
        let (since_s, until_s) = *self.lifetime_s.lock();
        let now = SystemTime::now();
        request.params.not_before = (now - Duration::from_secs(since_s)).into();
        request.params.not_after = (now + Duration::from_secs(until_s)).into();
        let certificate = request.signed_by(self.files.authority())?;
        order.chain = Some(format!("{}{}", certificate.pem(), self.files.authority().pem()));
        Ok(())
    }

    /// TLS-ALPN-01, as whoever issues certificates does it [RFC 8737].
    async fn check(&self, domain: &str, expected: &[u8]) -> Result<()> {
        eventually("the test says where chatd is", PATIENCE, async || self.chatd_port.lock().is_some()).await;
        let port = self.chatd_port.lock().context("it was there")?;
        let shown = shown_by(port, domain, &["acme-tls/1"]).await?;
        let (_, certificate) = X509Certificate::from_der(&shown)?;
        let names = certificate.subject_alternative_name()?.context("no names")?;
        ensure!(names.value.general_names == [GeneralName::DNSName(domain)], "{names:?}");
        let extension = certificate.extensions().iter().find(|each| each.oid.to_id_string() == ACME_IDENTIFIER);
        let extension = extension.context("no acmeIdentifier")?;
        ensure!(extension.critical, "acmeIdentifier is not critical");
        ensure!(matches!(extension.parsed_extension(), ParsedExtension::UnsupportedExtension { .. }), "{extension:?}");
        // An OCTET STRING of 32 bytes.
        ensure!(extension.value == [&[4, 32], expected].concat(), "another digest: {:02x?}", extension.value);
        Ok(())
    }
}

fn token(number: usize, domain: &str) -> String {
    BASE64URL.encode(format!("token of {domain} for order {number}"))
}

/// The thumbprint of an elliptic key [RFC 7638].
fn thumbprint(key: &Value) -> String {
    let member = |name: &str| key[name].as_str().unwrap_or_default();
    let canonical = format!(
        r#"{{"crv":"{}","kty":"{}","x":"{}","y":"{}"}}"#,
        member("crv"),
        member("kty"),
        member("x"),
        member("y")
    );
    BASE64URL.encode(Sha256::digest(canonical))
}

async fn index(State(directory): Directories) -> Response {
    if directory.is_down.load(Ordering::Relaxed) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let body = json!({
        "newNonce": directory.url("nonce"),
        "newAccount": directory.url("account"),
        "newOrder": directory.url("order"),
    });
    body.to_string().into_response()
}

async fn nonce(State(directory): Directories) -> Response {
    [("replay-nonce", directory.new_nonce())].into_response()
}

async fn asked(
    State(directory): Directories,
    Path(path): Path<HashMap<String, String>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let parts = ["kind", "order", "domain"].into_iter().filter_map(|name| path.get(name).cloned()).collect::<Vec<_>>();
    let typed = headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/jose+json");
    let answered = match directory.opened(&parts.join("/"), &body) {
        Ok((payload, account, key)) if typed => answer(&directory, &parts, &payload, &account, &key).await,
        Ok(_) => Err(anyhow::anyhow!("a request of another type")),
        Err(error) => Err(error),
    };
    let nonce = [("replay-nonce", directory.new_nonce())];
    match answered {
        Ok(answer) => (nonce, answer).into_response(),
        Err(error) => {
            let problem = json!({"type": "urn:ietf:params:acme:error:malformed", "detail": format!("{error:#}")});
            (StatusCode::FORBIDDEN, nonce, problem.to_string()).into_response()
        }
    }
}

async fn answer(
    directory: &Directory,
    parts: &[String],
    payload: &Value,
    account: &str,
    key: &Value,
) -> Result<Response> {
    let kind = parts[0].as_str();
    if kind == "account" {
        ensure!(payload["termsOfServiceAgreed"] == true, "the terms were not agreed to");
        ensure!(payload["contact"] == json!(["mailto:admin@example.org"]), "{payload}");
        let url = directory.url(&format!("account/{}", directory.next.fetch_add(1, Ordering::Relaxed)));
        directory.accounts.lock().insert(url.clone(), key.clone());
        return Ok((StatusCode::CREATED, [("location", url)], json!({"status": "valid"}).to_string()).into_response());
    }
    if kind == "order" && parts.len() == 1 {
        let identifiers = payload["identifiers"].as_array().context("no identifiers")?;
        let domains = identifiers.iter().filter_map(|each| each["value"].as_str().map(str::to_owned)).collect();
        let order = Order { domains, valid: HashSet::new(), refused: None, chain: None };
        let number = directory.next.fetch_add(1, Ordering::Relaxed);
        let body = directory.order_body(number, &order).to_string();
        directory.orders.lock().insert(number, order);
        let url = directory.url(&format!("order/{number}"));
        return Ok((StatusCode::CREATED, [("location", url)], body).into_response());
    }
    let number = parts.get(1).context("no order")?.parse()?;
    let domain = parts.get(2).map(String::as_str).unwrap_or_default();
    ensure!(directory.accounts.lock().contains_key(account), "nobody's account");
    if kind == "challenge" {
        let authorization = format!("{}.{}", token(number, domain), thumbprint(key));
        let checked = directory.check(domain, &Sha256::digest(authorization)).await;
        let mut orders = directory.orders.lock();
        let order = orders.get_mut(&number).context("no such order")?;
        match checked {
            Ok(()) => drop(order.valid.insert(domain.to_owned())),
            Err(error) => order.refused = Some(format!("{error:#}")),
        }
        // What came of it is told by the authorization.
        let mut body = directory.authorization_body(number, domain, order)["challenges"][1].clone();
        body["status"] = json!("processing");
        if let Some(body) = body.as_object_mut() {
            body.remove("error");
        }
        return Ok(body.to_string().into_response());
    }
    let mut orders = directory.orders.lock();
    let order = orders.get_mut(&number).context("no such order")?;
    Ok(match kind {
        "authz" => directory.authorization_body(number, domain, order).to_string().into_response(),
        "finalize" => {
            directory.issue(order, payload["csr"].as_str().context("no request")?)?;
            directory.order_body(number, order).to_string().into_response()
        }
        "certificate" => order.chain.clone().context("not issued")?.into_response(),
        "order" => directory.order_body(number, order).to_string().into_response(),
        other => anyhow::bail!("no {other} here"),
    })
}

/// Takes any certificate, as whoever looks at it afterwards does; that its key is there is checked.
#[derive(Debug)]
struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 was asked for".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let (_, certificate) =
            X509Certificate::from_der(certificate).map_err(|error| Error::General(error.to_string()))?;
        let key = certificate.public_key().raw.into();
        let known = ring::default_provider().signature_verification_algorithms;
        // A certificate as such would be refused: that it answers a challenge is critical, and not known there.
        crypto::verify_tls13_signature_with_raw_key(message, &key, signed, &known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// The certificate that is shown on this port for this name.
async fn shown_by(port: u16, name: &str, alpn: &[&str]) -> Result<CertificateDer<'static>> {
    let mut config = ClientConfig::builder_with_provider(ring::default_provider().into())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate))
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = connect(&TlsConnector::from(Arc::new(config)), port, name).await?;
    let (_, connection) = stream.get_ref();
    ensure!(connection.alpn_protocol() == alpn.first().map(|name| name.as_bytes()), "another protocol");
    let first = connection.peer_certificates().and_then(<[_]>::first).context("no certificate")?;
    Ok(first.clone().into_owned())
}

/// What chatd shows everybody, once it has something that the authority vouches for.
async fn shown(directory: &Directory, chatd: &Chatd) -> CertificateDer<'static> {
    let trusting = directory.files.connector(&[]).unwrap();
    for (protocol, domain) in [("mqtt", DOMAIN), ("http", SECOND_DOMAIN)] {
        let port = port(chatd, protocol).await;
        let connects = async || connect(&trusting, port, domain).await.is_ok();
        eventually("it shows a certificate that is trusted", PATIENCE, connects).await;
    }
    shown_by(port(chatd, "http").await, DOMAIN, &[]).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_issued_and_kept() {
    let directory = Directory::start().await;
    let mut chatd = directory.chatd("http").await;
    let first = shown(&directory, &chatd).await;
    assert_eq!((directory.issued(), directory.accounts.lock().len()), (1, 1));
    // The challenges are over.
    assert!(shown_by(port(&chatd, "http").await, DOMAIN, &["acme-tls/1"]).await.is_err());
    let folder = chatd.data().join("acme");
    eventually("it is kept", PATIENCE, async || folder.join("certificate.json").exists()).await;
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    for name in ["account.json", "certificate.json"] {
        assert_eq!(mode(&folder.join(name)), 0o600, "{name}");
    }

    // With it, and without the directory, after a restart.
    directory.is_down.store(true, Ordering::Relaxed);
    assert!(chatd.terminate().await.unwrap().success());
    chatd.restart().await.unwrap();
    assert_eq!(shown(&directory, &chatd).await, first);
    let log = chatd.log().unwrap();
    assert_eq!(log.matches("asking for a certificate").count(), 1, "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_is_about_to_expire_is_renewed() {
    let directory = Directory::start().await;
    // A third of its lifetime is left four seconds after it was issued.
    *directory.lifetime_s.lock() = (232, 124);
    let chatd = directory.chatd("mqtt").await;
    let first = shown(&directory, &chatd).await;
    *directory.lifetime_s.lock() = (60, 90 * 86_400);
    eventually("it shows another", PATIENCE, async || shown(&directory, &chatd).await != first).await;
    assert_eq!((directory.issued(), directory.accounts.lock().len()), (2, 1), "the account stays");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_certificate_stays_while_the_directory_is_down() {
    let directory = Directory::start().await;
    *directory.lifetime_s.lock() = (232, 124);
    let chatd = directory.chatd("http").await;
    let first = shown(&directory, &chatd).await;
    directory.is_down.store(true, Ordering::Relaxed);
    let tells = async || chatd.log().unwrap().contains("no new certificate; the one in use, if any, stays");
    eventually("it tells that it failed", PATIENCE, tells).await;
    assert_eq!(shown(&directory, &chatd).await, first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_domain_that_leads_elsewhere_gets_no_certificate() {
    let directory = Directory::start().await;
    let chatd = Chatd::start_with(directory.options()).await.unwrap();
    // Port 443 of the domain leads to another server.
    *directory.chatd_port.lock() = Some(directory.address.port());
    let told = format!("{DOMAIN}: ");
    let tells =
        async || chatd.log().unwrap().lines().any(|line| line.contains("no new certificate") && line.contains(&told));
    eventually("it tells which domain, and why", PATIENCE, tells).await;
    assert_eq!(directory.issued(), 0);
    // It serves on all the same, where no certificate is needed.
    assert_eq!(chatd.healthz().await.unwrap().0, 200);
}
