//! TLS: the same over an encrypted socket, with certificates that are read again, and clients that show their own.

use std::path::PathBuf;
use std::process::Stdio;

use end_to_end::programs::{self, Subscriber};
use end_to_end::{Chatd, Connect, Options, PATIENCE, eventually};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

type Authority = CertifiedIssuer<'static, KeyPair>;

pub(crate) struct Files {
    folder: TempDir,
    authority: Authority,
}

impl Files {
    /// An authority and a certificate for this machine.
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "an authority of the tests");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let files = Self { folder: tempfile::tempdir().unwrap(), authority };
        std::fs::write(files.path("ca.pem"), files.authority.pem()).unwrap();
        files.issue("server", "chatd");
        files
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// `{file}.pem` and `{file}.key`, of this common name.
    fn issue(&self, file: &str, common_name: &str) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        std::fs::write(self.path(&format!("{file}.key")), key.serialize_pem()).unwrap();
        std::fs::write(self.path(&format!("{file}.pem")), certificate.pem()).unwrap();
    }

    pub(crate) fn options(&self) -> Options {
        Options::default()
            .set("tls.certificate", self.text("server.pem"))
            .set("tls.key", self.text("server.key"))
            .set("mqtt.tls_listen", "127.0.0.1:0")
            .set("http.tls_listen", "127.0.0.1:0")
    }
}

/// The port that it says it listens on for this, over TLS.
pub(crate) async fn port(chatd: &Chatd, protocol: &str) -> String {
    let find = || {
        let begin = format!("{protocol} over TLS listening on 127.0.0.1:");
        chatd.greeting().lines().find_map(|line| line.strip_prefix(&begin).map(str::to_owned))
    };
    eventually("it says where it listens", PATIENCE, async || find().is_some()).await;
    find().unwrap()
}

#[tokio::test]
async fn mosquitto_chats_over_tls() {
    let files = Files::new();
    let chatd = Chatd::start_with(files.options()).await.unwrap();
    let port = port(&chatd, "mqtt").await;
    let ca = files.text("ca.pem");
    let over_tls = format!("-h localhost -p {port} --cafile {ca}");
    let mut bob =
        Subscriber::shell(&format!("stdbuf -oL mosquitto_sub {over_tls} -u bob -i phone -q 1 -t chat/bob/inbox -d"))
            .unwrap();
    bob.subscribed().await.unwrap();
    let line = format!("mosquitto_pub {over_tls} -u alice -q 1 -t chat/alice/out/bob -m 'in secret'");
    assert!(programs::shell(&line).await.unwrap().status.success());
    assert!(bob.line().await.unwrap().contains("in secret"));

    for version in ["tlsv1.2", "tlsv1.3"] {
        let line = format!("mosquitto_pub {over_tls} --tls-version {version} -u alice -t chat/alice/out/bob -q 1 -m x");
        assert!(programs::shell(&line).await.unwrap().status.success(), "{version}");
    }
}

#[tokio::test]
async fn the_certificate_is_read_again() {
    let files = Files::new();
    let chatd = Chatd::start_with(files.options()).await.unwrap();
    let url = format!("https://localhost:{}/healthz", port(&chatd, "http").await);
    let curl = format!("curl -sf --cacert {} {url}", files.text("ca.pem"));
    assert!(programs::shell(&curl).await.unwrap().status.success());

    // New files of another authority: clients that trust the first one trust it no more.
    let others = Files::new();
    std::fs::copy(others.path("server.pem"), files.path("server.pem")).unwrap();
    chatd.signal_hangup().unwrap();
    eventually("a pair that does not fit is refused", PATIENCE, async || {
        chatd.log().unwrap().contains("the certificate stays as it was")
    })
    .await;
    assert!(programs::shell(&curl).await.unwrap().status.success());
    std::fs::copy(others.path("server.key"), files.path("server.key")).unwrap();
    chatd.signal_hangup().unwrap();
    let other = format!("curl -sf --cacert {} {url}", others.text("ca.pem"));
    eventually("the new one is shown", PATIENCE, async || programs::shell(&other).await.unwrap().status.success())
        .await;
    assert!(!programs::shell(&curl).await.unwrap().status.success());
}

#[tokio::test]
async fn a_certificate_is_who_one_is() {
    let files = Files::new();
    files.issue("bob", "bob");
    files.issue("nobody", "No Body");
    let strangers = Files::new();
    strangers.issue("bob", "bob");
    let options = files.options().set("tls.client_ca", files.text("ca.pem")).set("auth.mode", "required");
    let chatd = Chatd::start_with(options).await.unwrap();
    let port = port(&chatd, "mqtt").await;
    let publish = |shown: String, user: &str| {
        let ca = files.text("ca.pem");
        let topic = "chat/bob/out/alice";
        format!("mosquitto_pub -h localhost -p {port} --cafile {ca} {shown} {user} -i phone -q 1 -t {topic} -m hello")
    };
    let shows = |files: &Files, name: &str| {
        format!("--cert {} --key {}", files.text(&format!("{name}.pem")), files.text(&format!("{name}.key")))
    };
    for (shown, user, works) in [
        (shows(&files, "bob"), "", true),
        (shows(&files, "bob"), "-u bob", true),
        (shows(&files, "bob"), "-u alice", false),
        (shows(&files, "nobody"), "", false),
        (shows(&strangers, "bob"), "", false),
        (String::new(), "-u bob", false),
    ] {
        let line = publish(shown, user);
        let output = programs::shell(&line).await.unwrap();
        assert_eq!(output.status.success(), works, "{line}: {output:?}");
    }
    // Whoever comes in clear text shows no certificate.
    assert!(Connect::v5("bob", "phone").to(&chatd).await.is_err());
}

/// A client that says nothing costs its place for as long as there is for CONNECT, and delays nobody.
#[tokio::test]
async fn silence_in_the_handshake_ends_at_its_deadline() {
    let files = Files::new();
    let chatd = Chatd::start_with(files.options().set("limits.connect_timeout_ms", 500)).await.unwrap();
    for protocol in ["mqtt", "http"] {
        let port = port(&chatd, protocol).await;
        let mut silent = Vec::new();
        for nth in 0..50 {
            let mut socket = TcpStream::connect(format!("127.0.0.1:{port}")).await.unwrap();
            if nth % 2 == 0 {
                // The first bytes of a ClientHello, and no more.
                tokio::io::AsyncWriteExt::write_all(&mut socket, &[22, 3, 1, 2, 0, 1]).await.unwrap();
            }
            silent.push(socket);
        }
        for mut socket in silent {
            let mut rest = Vec::new();
            let end = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut rest)).await.expect("it is closed");
            // Closed, or reset: what was said was not read.
            end.unwrap_or_default();
        }
    }
}

#[tokio::test]
async fn settings_that_do_not_fit_are_told() {
    let files = Files::new();
    let key = files.text("server.key");
    for (options, part) in [
        (Options::default().set("tls.key", &key), "tls.certificate"),
        (Options::default().set("mqtt.tls_listen", "127.0.0.1:0"), "tls.certificate"),
        (files.options().set("tls.certificate", &key), "no certificate"),
        (files.options().set("tls.key", files.text("server.pem")), "no private key"),
        (files.options().set("tls.certificate", files.text("ca.pem")), "tls.key"),
        (files.options().set("tls.certificate", "/does/not/exist"), "/does/not/exist"),
        (files.options().set("mqtt.tls_listen", "0.0.0.0:0"), "loopback"),
    ] {
        let mut command = end_to_end::chatd::command().await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        command.args(["--mqtt-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--data"]).arg(folder.path());
        command.envs(options.environment.clone()).stdout(Stdio::null());
        let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends").unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(part), "{part}: {said}");
    }
}
