//! Starting, stopping, settings, metrics, deadlines.

use std::process::Output;
use std::time::{Duration, Instant};

use end_to_end::chatd::command;
use end_to_end::packet::{Packet, Publish, Version};
use end_to_end::{Chatd, Connect, Options, PATIENCE, eventually};
use tempfile::TempDir;

use crate::chat::{listener, numbered, sends, seqs};

/// Runs chatd to its end in an empty folder.
async fn run(folder: &TempDir, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut chatd = command().await.unwrap();
    chatd.args(arguments).envs(environment.iter().copied()).current_dir(folder.path());
    tokio::time::timeout(PATIENCE, chatd.output()).await.expect("it ends").unwrap()
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

#[tokio::test]
async fn sigterm_says_goodbye_and_ends_in_time() {
    let mut chatd = Chatd::start().await.unwrap();
    let mut v5 = listener(&chatd, Connect::v5("bob", "bob-phone").persistent()).await.unwrap();
    let mut v5_web = listener(&chatd, Connect::v5("bob", "bob-web").over_web_socket()).await.unwrap();
    let mut v4 = listener(&chatd, Connect::v4("bob", "bob-laptop")).await.unwrap();
    // Neither an unfinished handshake nor an idle HTTP connection holds it up.
    let idle = [
        tokio::net::TcpStream::connect(chatd.mqtt_addr()).await.unwrap(),
        tokio::net::TcpStream::connect(chatd.http_addr()).await.unwrap(),
    ];
    let began = Instant::now();
    let status = chatd.terminate().await.unwrap();
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(began.elapsed() < Duration::from_secs(15), "it took {:?}", began.elapsed());
    for client in [&mut v5, &mut v5_web] {
        let last_words = client.until_closed().await.unwrap();
        assert!(matches!(last_words[..], [Packet::Disconnect { code: 0x8b, .. }]), "{last_words:?}");
    }
    assert_eq!(v4.until_closed().await.unwrap(), []);
    drop(idle);
}

#[tokio::test]
async fn sigint_is_as_good() {
    let mut chatd = Chatd::start().await.unwrap();
    chatd.signal_interrupt().unwrap();
    assert_eq!(chatd.ended().await.unwrap().code(), Some(0));
}

/// Under load: every PUBACK that was sent before the end is true, and what was not acknowledged may be sent again.
#[tokio::test]
async fn sigterm_under_load_loses_nothing() {
    let mut chatd = Chatd::start().await.unwrap();
    let mut acknowledged = 0;
    for round in 0..5 {
        let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
        let sending = tokio::spawn(async move {
            let mut acknowledged = 0;
            loop {
                let publish = Publish::new("chat/alice/out/bob", format!("round {round}"), 1);
                match alice.publish(publish).await {
                    Ok(ack) => acknowledged = ack.seq.unwrap(),
                    Err(_) => return acknowledged,
                }
            }
        });
        eventually("some were accepted", PATIENCE, async || {
            chatd.metric("chatd_messages_accepted_total").await.unwrap() > 20.0
        })
        .await;
        assert!(chatd.terminate().await.unwrap().success());
        acknowledged = sending.await.unwrap().max(acknowledged);
        chatd.restart().await.unwrap();
    }
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    let last = alice.say("alice", "bob", "the end").await.unwrap().seq.unwrap();
    assert!(last > acknowledged);
    let mut bob = listener(&chatd, Connect::v4("bob", "bob-phone")).await.unwrap();
    let got = bob.acked_messages(usize::try_from(last).unwrap()).await.unwrap();
    assert_eq!(seqs(&got), (1..=last).collect::<Vec<_>>());
}

/// A client that does not read cannot hold up the end for longer than the deadline.
#[tokio::test]
async fn sigterm_does_not_wait_for_a_client_that_never_reads() {
    let options = Options::default().set("limits.shutdown_timeout_ms", 1_000);
    let mut chatd = Chatd::start_with(options).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    let text = "x".repeat(16_000);
    alice.publish_all((0..500).map(|_| Publish::new("chat/alice/out/bob", text.as_str(), 1))).await.unwrap();
    let mut bob = Connect::v5("bob", "bob-phone").to(&chatd).await.unwrap();
    bob.subscribe("chat/bob/inbox", 0).await.unwrap();
    let began = Instant::now();
    assert_eq!(chatd.terminate().await.unwrap().code(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(8), "it took {:?}", began.elapsed());
}

#[tokio::test]
async fn help_and_version() {
    let help = run(&folder(), &["--help"], &[]).await;
    assert_eq!(help.status.code(), Some(0));
    for word in ["--mqtt-listen", "--http-listen", "--data", "--config", "check-config"] {
        assert!(stdout(&help).contains(word), "{word} in\n{}", stdout(&help));
    }
    let version = run(&folder(), &["--version"], &[]).await;
    assert_eq!(version.status.code(), Some(0));
    let wrong = run(&folder(), &["--no-such-flag"], &[]).await;
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("--no-such-flag"));
}

#[tokio::test]
async fn check_config_prints_what_results() {
    let folder = folder();
    let plain = run(&folder, &["check-config"], &[]).await;
    assert_eq!(plain.status.code(), Some(0), "{plain:?}");
    assert!(stdout(&plain).contains("listen = \"127.0.0.1:1883\""));

    // Later sources win: file, environment, flags.
    let file = folder.path().join("my.toml");
    std::fs::write(&file, "[limits]\nwindow = 7\nmessage_bytes = 1000\n[mqtt]\nlisten = \"127.0.0.1:1\"\n").unwrap();
    let arguments = ["--config", file.to_str().unwrap(), "--mqtt-listen", "127.0.0.1:3", "check-config"];
    let environment = [("CHATD__LIMITS__WINDOW", "8"), ("CHATD__MQTT__LISTEN", "127.0.0.1:2")];
    let layered = run(&folder, &arguments, &environment).await;
    assert_eq!(layered.status.code(), Some(0), "{layered:?}");
    for line in ["window = 8", "message_bytes = 1000", "listen = \"127.0.0.1:3\""] {
        assert!(stdout(&layered).lines().any(|found| found == line), "{line} in\n{}", stdout(&layered));
    }
    // What it prints is a settings file that gives the same again.
    std::fs::write(&file, stdout(&layered)).unwrap();
    let again = run(&folder, &["--config", file.to_str().unwrap(), "check-config"], &[]).await;
    assert_eq!(stdout(&again), stdout(&layered));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing was made");
}

#[tokio::test]
async fn wrong_settings_are_refused_with_source_key_and_reason() {
    let folder = folder();
    let path = folder.path().join("wrong.toml");
    let file = path.to_str().unwrap();
    let files = [
        ("[limits]\nwindwo = 3\n", "windwo"),
        ("[limit]\nwindow = 3\n", "limit"),
        ("[limits]\nwindow = 0\n", "limits.window"),
        ("[limits]\nwindow = \"three\"\n", "limits.window"),
        ("[mqtt]\nlisten = \"nowhere\"\n", "mqtt.listen"),
        ("[mqtt]\nlisten = 1883\n", "mqtt.listen"),
        ("[log]\nformat = \"xml\"\n", "log.format"),
        ("[auth]\nmode = \"maybe\"\n", "auth.mode"),
        ("[limits]\nwindow = = 3\n", "wrong.toml"),
    ];
    for (text, key) in files {
        std::fs::write(file, text).unwrap();
        // The same sentence, whether it is only asked or about to run.
        for arguments in [&["--config", file, "check-config"][..], &["--config", file]] {
            let output = run(&folder, arguments, &[]).await;
            assert_eq!(output.status.code(), Some(2), "{text}: {output:?}");
            assert!(stderr(&output).contains(key) && stderr(&output).contains(file), "{text}: {}", stderr(&output));
        }
    }
    let missing = run(&folder, &["--config", "is-not-there.toml", "check-config"], &[]).await;
    assert_eq!(missing.status.code(), Some(2));
    assert!(stderr(&missing).contains("is-not-there.toml"));
    for (variable, value) in [("CHATD__LIMITS__WINDWO", "3"), ("CHATD__LIMITS__WINDOW", "many")] {
        let output = run(&folder, &["check-config"], &[(variable, value)]).await;
        assert_eq!(output.status.code(), Some(2), "{variable}: {output:?}");
        assert!(stderr(&output).contains(variable), "{}", stderr(&output));
    }
    let flag = run(&folder, &["--mqtt-listen", "here", "check-config"], &[]).await;
    assert_eq!(flag.status.code(), Some(2));
    assert!(stderr(&flag).contains("--mqtt-listen"), "{}", stderr(&flag));
}

#[tokio::test]
async fn development_mode_stays_on_loopback() {
    let folder = folder();
    for arguments in [
        ["--mqtt-listen", "0.0.0.0:0", "--http-listen", "127.0.0.1:0"],
        ["--mqtt-listen", "127.0.0.1:0", "--http-listen", "0.0.0.0:0"],
        ["--mqtt-listen", "[::]:0", "--http-listen", "127.0.0.1:0"],
        ["--mqtt-listen", "192.0.2.1:1883", "--http-listen", "127.0.0.1:0"],
    ] {
        let output = run(&folder, &arguments, &[]).await;
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let sentence = stderr(&output);
        assert!(sentence.contains("loopback") && sentence.contains("127.0.0.1"), "what to do: {sentence}");
        assert!(!stdout(&output).contains("listening"), "{output:?}");
    }
}

#[tokio::test]
async fn what_cannot_start_fails_with_1_and_says_why() {
    let folder = folder();
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run(&folder, &["--mqtt-listen", &address, "--http-listen", "127.0.0.1:0"], &[]).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains(&address) && stderr(&output).contains("mqtt.listen"), "{}", stderr(&output));

    let file = folder.path().join("a-file");
    std::fs::write(&file, "").unwrap();
    let arguments = ["--mqtt-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--data", file.to_str().unwrap()];
    let output = run(&folder, &arguments, &[]).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("a-file"), "{}", stderr(&output));
}

#[tokio::test]
async fn health_readiness_and_metrics() {
    let chatd = Chatd::start().await.unwrap();
    let (status, body) = chatd.healthz().await.unwrap();
    assert_eq!(status, 200, "{body}");
    eventually("ready", PATIENCE, async || chatd.get("/readyz").await.unwrap().0 == 200).await;
    assert_eq!(chatd.get("/nothing/here").await.unwrap().0, 404);

    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let mut alice = Connect::v4("alice", "alice-phone").to(&chatd).await.unwrap();
    alice.publish_all(sends("alice", "bob", numbered("text", 1..=10))).await.unwrap();
    alice.say("alice", "bob", "").await.unwrap();
    bob.acked_messages(10).await.unwrap();
    crate::chat::until_delivered(&chatd, 10).await;
    let metrics = chatd.metrics().await.unwrap();
    for (name, value) in [
        ("chatd_connections", 2.0),
        ("chatd_messages_accepted_total", 10.0),
        ("chatd_messages_delivered_total", 10.0),
        ("chatd_refused_total{reason=\"empty_text\"}", 1.0),
    ] {
        assert_eq!(metrics.get(name), Some(&value), "{name}");
    }
    for histogram in ["chatd_commit_seconds", "chatd_publish_to_puback_seconds", "chatd_publish_to_delivery_seconds"] {
        let of = |suffix: &str| metrics.get(&format!("{histogram}{suffix}")).copied().unwrap_or(-1.0);
        assert!(of("_count") >= 1.0, "{histogram}: {metrics:#?}");
        assert!(of("_sum") > 0.0 && of("_sum") < 60.0, "{histogram} in seconds");
        assert_eq!(of("_bucket{le=\"+Inf\"}"), of("_count"), "{histogram}");
    }
    assert_eq!(metrics.get("chatd_publish_to_puback_seconds_count"), Some(&10.0));
    assert_eq!(metrics.get("chatd_publish_to_delivery_seconds_count"), Some(&10.0));
}

#[tokio::test]
async fn metrics_are_not_there_when_they_are_off() {
    let chatd = Chatd::start_with(Options::default().set("http.metrics", "off")).await.unwrap();
    assert_eq!(chatd.get("/metrics").await.unwrap().0, 404);
    assert_eq!(chatd.get("/healthz").await.unwrap().0, 200);
}

#[tokio::test]
async fn a_keep_alive_that_is_not_kept_ends_the_connection() {
    let chatd = Chatd::start().await.unwrap();
    for version in [Version::V4, Version::V5] {
        let mut silent = Connect::new(version, "bob", "silent").keep_alive(1).to(&chatd).await.unwrap();
        let began = Instant::now();
        let last_words = silent.until_closed().await.unwrap();
        // One and a half times the keep alive [MQTT-3.1.2-22].
        assert!(began.elapsed() >= Duration::from_millis(1_400), "after {:?}", began.elapsed());
        match version {
            Version::V4 => assert_eq!(last_words, []),
            Version::V5 => assert!(matches!(last_words[..], [Packet::Disconnect { code: 0x8d, .. }]), "{last_words:?}"),
        }
    }
}

#[tokio::test]
async fn a_ping_keeps_a_connection_alive() {
    let chatd = Chatd::start().await.unwrap();
    let mut alive = Connect::v5("bob", "alive").keep_alive(1).to(&chatd).await.unwrap();
    // The time that passes is what is looked at: three times what a silent client gets.
    let mut interval = tokio::time::interval(Duration::from_millis(500));
    for _ in 0..10 {
        interval.tick().await;
        assert_eq!(alive.ping().await.unwrap(), []);
    }
}

#[tokio::test]
async fn logs_are_json_lines_when_asked() {
    let mut chatd = Chatd::start().await.unwrap();
    assert!(chatd.terminate().await.unwrap().success());
    let log = chatd.log().unwrap();
    assert!(!log.is_empty());
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        assert!(line["message"].is_string(), "{line}");
    }
}

/// A session expires when its time is over, and not before.
#[tokio::test]
async fn a_session_expires() {
    let chatd = Chatd::start().await.unwrap();
    let expiring = |seconds| Connect { clean_start: false, ..Connect::v5("bob", "bob-phone") }.session_expiry(seconds);
    listener(&chatd, expiring(1)).await.unwrap().leave().await.unwrap();
    eventually("the session expires", PATIENCE, async || {
        // The time that passes is what is looked at. A connection that finds the session would make it live on.
        tokio::time::sleep(Duration::from_millis(1_300)).await;
        let client = expiring(1).to(&chatd).await.unwrap();
        let present = client.session_present();
        client.leave().await.unwrap();
        !present
    })
    .await;
    listener(&chatd, expiring(600)).await.unwrap().leave().await.unwrap();
    assert!(expiring(600).to(&chatd).await.unwrap().session_present());
}
