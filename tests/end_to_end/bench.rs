//! The load generator against a real chatd: each mode, small, finds nothing wrong; and a broker that loses or repeats is caught.

use std::net::SocketAddr;
use std::process::Output;
use std::time::Duration;

use end_to_end::chatd::bench_command;
use end_to_end::proxy::{Lie, Proxy};
use end_to_end::tls::{self, Files};
use end_to_end::{Chatd, Options};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

async fn fast_chatd() -> Chatd {
    Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap()
}

async fn bench(arguments: &[&str]) -> Output {
    let mut command = bench_command().await.unwrap();
    let running = command.args(arguments).output();
    tokio::time::timeout(PATIENCE, running).await.expect("chat-bench ends").unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// A mode, as words, against this address, and what it says; it has to succeed, with no fault, and the broker's processor time measured.
async fn well(chatd: &Chatd, words: &str, addr: SocketAddr) -> Value {
    let (addr, pid) = (addr.to_string(), chatd.process_id().unwrap().to_string());
    let mut arguments: Vec<&str> = words.split_whitespace().collect();
    arguments.extend(["--addr", &addr, "--pid", &pid, "--json", "-", "--label", "chatd"]);
    let output = bench(&arguments).await;
    assert!(output.status.success(), "{words}: {output:?}");
    let outcome = json(&output);
    let faults = outcome["faults"].as_object().unwrap();
    assert!(faults.values().all(|count| count == 0), "{words}: {outcome}");
    assert_eq!((&outcome["label"], &outcome["mode"]), (&Value::from("chatd"), &Value::from(arguments[0])));
    outcome
}

fn figure(outcome: &Value, name: &str) -> f64 {
    outcome["figures"][name].as_f64().unwrap_or_else(|| panic!("no {name} in {outcome}"))
}

#[tokio::test]
async fn pairs_closed_and_open() {
    let chatd = fast_chatd().await;
    let addr = chatd.mqtt_addr();
    let closed = well(&chatd, "pairs --pairs 10 --window 4 --seconds 1 --warmup-seconds 0", addr).await;
    for name in ["delivered_per_s", "acknowledged_per_s", "generator_cpu_us_per_message", "server_cpu_us_per_message"] {
        assert!(figure(&closed, name) > 0.0, "{closed}");
    }
    let delivered = figure(&closed, "delivered_per_s") * figure(&closed, "seconds");
    let counts = closed["series"]["delivered"]["counts"].as_array().unwrap();
    let counted: f64 = counts.iter().filter_map(Value::as_f64).sum();
    assert!((counted - delivered).abs() < 1.0, "{counted} of {delivered}");

    let open = well(&chatd, "pairs --pairs 5 --rate 200 --seconds 2 --warmup-seconds 0 --version 5", addr).await;
    assert!((150.0..250.0).contains(&figure(&open, "delivered_per_s")), "{open}");
    let quantiles = open["latencies"]["delivery"]["quantiles"].as_array().unwrap();
    assert!(quantiles.len() > 5, "{open}");
}

#[tokio::test]
async fn fan_in_idle_and_backlog() {
    let chatd = fast_chatd().await;
    let addr = chatd.mqtt_addr();
    let fan_in = well(&chatd, "fan-in --senders 10 --window 4 --seconds 1 --warmup-seconds 0", addr).await;
    assert!(figure(&fan_in, "delivered_per_s") > 0.0, "{fan_in}");
    let idle = well(&chatd, "idle --connections 100 --seconds 0", addr).await;
    assert!(figure(&idle, "connected_per_s") > 0.0 && figure(&idle, "server_after_anonymous_bytes") > 0.0, "{idle}");
    let backlog = well(&chatd, "backlog --messages 500 --users 5", addr).await;
    assert!(figure(&backlog, "stored_per_s") > 0.0 && figure(&backlog, "handed_over_per_s") > 0.0, "{backlog}");
    assert_eq!(figure(&backlog, "messages"), 500.0);
}

#[tokio::test]
async fn a_storm() {
    let chatd = fast_chatd().await;
    let words = "storm --clients 200 --senders 4 --rate 400 --seconds 1";
    let storm = well(&chatd, words, chatd.mqtt_addr()).await;
    assert_eq!(storm["latencies"]["back"]["count"], 200);
    assert!(storm["latencies"]["innocent_storm"]["count"].as_u64().unwrap() > 10, "{storm}");
}

/// Very many come back at once, over TLS too, whose handshakes are expensive: two who were there before are served between.
#[tokio::test]
async fn two_others_hardly_notice_a_storm() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(files.options().as_fast_as_it_can()).await.unwrap();
    let (over_tls, ca) = (SocketAddr::from(([127, 0, 0, 1], tls::port(&chatd, "mqtt").await)), files.text("ca.pem"));
    let ways = [(2_000, "tcp", chatd.mqtt_addr()), (300, "tls", over_tls)];
    for (clients, transport, addr) in ways {
        let words =
            format!("storm --clients {clients} --senders 4 --rate 100 --seconds 1 --transport {transport} --ca {ca}");
        let storm = well(&chatd, &words, addr).await;
        assert_eq!(storm["latencies"]["back"]["count"], clients, "{transport}: {storm}");
        let p99_us = storm["latencies"]["innocent_storm"]["p99_us"].as_u64().unwrap();
        println!("{transport}: all are back after {} s, p99 of the two {p99_us} µs", figure(&storm, "all_back_s"));
        // Very generous: some tens of milliseconds, on a machine that does nothing else.
        assert!(p99_us < 1_500_000, "{transport}: {storm}");
    }
}

#[tokio::test]
async fn a_small_day() {
    let chatd = fast_chatd().await;
    let words = "mixed --users 30 --rate 200 --seconds 5 --there-s 1 --away-s 0.5";
    let day = well(&chatd, words, chatd.mqtt_addr()).await;
    for name in ["sent", "returns", "caught_up", "reads", "receipts"] {
        assert!(figure(&day, name) > 0.0, "{name}: {day}");
    }
}

#[tokio::test]
async fn every_way_in() {
    let files = Files::new().unwrap();
    let chatd = Chatd::start_with(files.options().as_fast_as_it_can()).await.unwrap();
    let over_tls = async |protocol| SocketAddr::from(([127, 0, 0, 1], tls::port(&chatd, protocol).await));
    let ca = files.text("ca.pem");
    let ways = [("tls", over_tls("mqtt").await), ("ws", chatd.http_addr()), ("wss", over_tls("http").await)];
    for (transport, addr) in ways {
        let words =
            format!("pairs --pairs 4 --window 4 --seconds 1 --warmup-seconds 0 --transport {transport} --ca {ca}");
        let outcome = well(&chatd, &words, addr).await;
        assert!(figure(&outcome, "delivered_per_s") > 0.0, "{outcome}");
        // More than fits a frame of the shortest kind, a record of TLS, and a read.
        let words =
            format!("pairs --pairs 2 --bytes 16000 --window 8 --seconds 1 --warmup-seconds 0 --transport {transport}");
        well(&chatd, &words, addr).await;
    }
}

#[tokio::test]
async fn a_broker_that_loses_or_repeats_is_caught() {
    let chatd = fast_chatd().await;
    for (lie, fault) in [(Lie::Lost, "gaps"), (Lie::Twice, "repeats")] {
        let proxy = Proxy::start_lying(chatd.mqtt_addr(), lie).await.unwrap();
        let addr = proxy.address().to_string();
        let words = "pairs --pairs 1 --window 8 --seconds 1 --warmup-seconds 0 --json - --addr";
        let arguments: Vec<&str> = words.split_whitespace().chain([addr.as_str()]).collect();
        let output = bench(&arguments).await;
        assert!(!output.status.success(), "{lie:?}: {output:?}");
        assert_eq!(json(&output)["faults"][fault], 1, "{lie:?}: {output:?}");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.contains(&format!("broke its word: 1 {fault}")), "{stderr}");
    }
}

#[tokio::test]
async fn results_become_a_page_and_a_document() {
    let chatd = fast_chatd().await;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let addr = chatd.mqtt_addr().to_string();
    for run in ["1.json", "2.json"] {
        let words = "pairs --pairs 2 --seconds 1 --warmup-seconds 0 --label chatd";
        let (json, html) = (path(run), path("page.html"));
        let mut arguments: Vec<&str> = words.split_whitespace().collect();
        arguments.extend(["--addr", &addr, "--json", &json, "--html", &html]);
        let output = bench(&arguments).await;
        assert!(output.status.success(), "{output:?}");
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("nothing lost, repeated or out of order"),
            "{output:?}"
        );
    }
    let page = std::fs::read_to_string(path("page.html")).unwrap();
    assert_eq!(page.matches("<svg ").count(), 2, "{page}");

    std::fs::write(
        path("in.md"),
        "{{table pairs | delivered_per_s as a second}}\n{{latencies pairs delivery | how long}}\n",
    )
    .unwrap();
    let (template, out, plots) = (path("in.md"), path("out.md"), path("plots"));
    let results = [path("1.json"), path("2.json")];
    let arguments = ["report", "--template", &template, "--out", &out, "--plots", &plots, &results[0], &results[1]];
    let output = bench(&arguments).await;
    assert!(output.status.success(), "{output:?}");
    let document = std::fs::read_to_string(&out).unwrap();
    assert!(
        document.contains("| chatd | ") && document.contains("![how long](plots/pairs-delivery-latencies.svg)"),
        "{document}"
    );
    assert!(std::fs::read_to_string(path("plots/pairs-delivery-latencies.svg")).unwrap().starts_with("<svg "));

    let bound = |least: &str| format!("pairs:chatd pairs:chatd delivered_per_s {least}");
    for (least, is_kept) in [("0.9", true), ("1.1", false)] {
        let bound = bound(least);
        let output = bench(&["check", &results[0], &results[1], "--at-least", &bound]).await;
        assert_eq!(output.status.success(), is_kept, "{output:?}");
    }
}
