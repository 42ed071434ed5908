//! The web chat, in Chromium, as this chatd serves it: the scenarios of `tests/web/app`.

use std::path::Path;
use std::time::Duration;

use end_to_end::programs::{self, Dialogue, mosquitto_pub};
use end_to_end::terminal::Terminal;
use end_to_end::{Chatd, Options, PATIENCE, eventually};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::auth::passwd;
use crate::chat::assert_well;

/// Several browsers and a long history, on a machine that does other things as well.
const LONG: Duration = Duration::from_secs(240);

/// With the web chat in it.
async fn chatd(options: Options) -> Chatd {
    let chatd = Chatd::start_with(options).await.unwrap();
    let (_, page) = chatd.get("/").await.unwrap();
    assert!(page.contains("/assets/"), "this chatd was built without the web chat: run scripts/web, then cargo build");
    chatd
}

fn address(chatd: &Chatd) -> String {
    format!("http://{}/", chatd.http_addr())
}

async fn plays(chatd: &Chatd, scenario: &str, more: &[&str]) {
    let (chromium, address) = (programs::chromium().unwrap(), address(chatd));
    let arguments = [&[chromium.to_str().unwrap(), &address], more].concat();
    let said = programs::node_within(LONG, &format!("app/{scenario}.mjs"), &arguments).await.unwrap();
    assert!(said.ends_with("all is as it has to be\n"), "{said}");
    println!("{said}");
    assert_well(chatd).await;
}

async fn dialogue(chatd: &Chatd, scenario: &'static str, more: &[&str]) -> Dialogue {
    let (chromium, address) = (programs::chromium().unwrap(), address(chatd));
    let arguments = [&[chromium.to_str().unwrap(), &address], more].concat();
    Dialogue::scenario(scenario, &arguments).await.unwrap()
}

#[tokio::test]
async fn alice_and_bob_chat() {
    plays(&chatd(Options::default()).await, "converse", &[]).await;
}

#[tokio::test]
async fn a_long_history_is_scrolled_to_the_top() {
    plays(&chatd(Options::default().as_fast_as_it_can()).await, "history", &["5000"]).await;
}

#[tokio::test]
async fn a_cut_connection_and_a_reload_without_a_server() {
    plays(&chatd(Options::default()).await, "offline", &[]).await;
}

#[tokio::test]
async fn tabs_and_devices_are_in_step() {
    plays(&chatd(Options::default()).await, "tabs", &[]).await;
}

#[tokio::test]
async fn hostile_text_is_harmless() {
    plays(&chatd(Options::default()).await, "hostile", &[]).await;
}

#[tokio::test]
async fn what_nobody_has_seen_is_not_read() {
    plays(&chatd(Options::default()).await, "away", &[]).await;
}

#[tokio::test]
async fn a_browser_that_keeps_nothing_and_one_that_is_left() {
    plays(&chatd(Options::default()).await, "traces", &[]).await;
}

#[tokio::test]
async fn axe_finds_nothing() {
    plays(&chatd(Options::default()).await, "axe", &[]).await;
}

#[tokio::test]
async fn everything_can_be_done_with_keys() {
    plays(&chatd(Options::default()).await, "keyboard", &[]).await;
}

#[tokio::test]
async fn a_chat_on_another_page() {
    plays(&chatd(Options::default()).await, "embed", &[]).await;
}

/// `SCREENSHOTS=docs/images scripts/test web_chat::pictures` makes those of the README.
#[tokio::test]
async fn pictures_are_taken() {
    let made = TempDir::new().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folder = std::env::var_os("SCREENSHOTS").map_or_else(|| made.path().to_owned(), |folder| root.join(folder));
    plays(&chatd(Options::default()).await, "screenshots", &[folder.to_str().unwrap()]).await;
    let pictures = std::fs::read_dir(&folder).unwrap().count();
    assert!(pictures >= 4, "{pictures} pictures: a phone and a wide screen, dark and light");
}

/// A closed list of users, with passwords.
#[tokio::test]
async fn a_refused_message_is_shown() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("passwords");
    assert_eq!(passwd(&["add", "alice"], &file, "alice-pw\n").await.0, Some(0));
    let options = Options::default().set("auth.mode", "required").set("auth.password_file", file.display());
    plays(&chatd(options).await, "refused", &["alice", "alice-pw", "nobody"]).await;
}

/// A server that knows its users, alice and bob.
async fn chatd_with_passwords(folder: &TempDir) -> Chatd {
    let file = folder.path().join("passwords");
    for user in ["alice", "bob"] {
        assert_eq!(passwd(&["add", user], &file, &format!("{user}-pw\n")).await.0, Some(0));
    }
    chatd(Options::default().set("auth.mode", "required").set("auth.password_file", file.display())).await
}

#[tokio::test]
async fn a_log_out_is_one_in_all_tabs() {
    let folder = TempDir::new().unwrap();
    plays(&chatd_with_passwords(&folder).await, "logout", &["alice", "alice-pw", "bob"]).await;
}

#[tokio::test]
async fn a_page_is_told_that_its_user_is_not_let_in() {
    let folder = TempDir::new().unwrap();
    plays(&chatd_with_passwords(&folder).await, "unwelcome", &["alice", "alice-pw", "bob"]).await;
}

#[tokio::test]
async fn whoever_is_not_there_is_told_once() {
    plays(&chatd(Options::default()).await, "notify", &[]).await;
}

#[tokio::test]
async fn from_right_to_left() {
    plays(&chatd(Options::default()).await, "rtl", &[]).await;
}

#[tokio::test]
async fn a_killed_server_loses_nothing() {
    let mut chatd = chatd(Options::default()).await;
    let mut browsers = dialogue(&chatd, "restart", &["3"]).await;
    loop {
        match browsers.next_line().await.unwrap().as_str() {
            "kill the server" => {
                chatd.kill9().await.unwrap();
                browsers.tell("killed").await.unwrap();
            }
            "start the server" => {
                chatd.restart_on_same_ports().await.unwrap();
                browsers.tell("started").await.unwrap();
            }
            "all is as it has to be" => break,
            line => println!("{line}"),
        }
    }
    browsers.quit().await.unwrap();
    assert_well(&chatd).await;
}

/// Numbers are given again, and what has them now is neither hidden behind what had them before, nor read.
#[tokio::test]
async fn a_server_goes_back_in_time() {
    let mut chatd = chatd(Options::default()).await;
    let mut browsers = dialogue(&chatd, "restored", &[]).await;
    let folder = TempDir::new().unwrap();
    let backup = folder.path().join("backup");
    loop {
        match browsers.next_line().await.unwrap().as_str() {
            "make a backup" => {
                let (code, _, said) = chatd.tool(&["backup", backup.to_str().unwrap()]).await.unwrap();
                assert_eq!(code, Some(0), "{said}");
                browsers.tell("made").await.unwrap();
            }
            "put the backup back" => {
                chatd.kill9().await.unwrap();
                std::fs::remove_dir_all(chatd.data()).unwrap();
                let (code, _, said) = chatd.tool(&["restore", backup.to_str().unwrap()]).await.unwrap();
                assert_eq!(code, Some(0), "{said}");
                chatd.restart_on_same_ports().await.unwrap();
                browsers.tell("put back").await.unwrap();
            }
            "all is as it has to be" => break,
            line => println!("{line}"),
        }
    }
    browsers.quit().await.unwrap();
    assert_well(&chatd).await;
}

/// A shell, a terminal and a browser: one protocol.
#[tokio::test]
async fn mosquitto_the_terminal_and_the_browser_talk_to_each_other() {
    let chatd = chatd(Options::default()).await;
    let mut bob = dialogue(&chatd, "hands", &["bob"]).await;
    let does = async |bob: &mut Dialogue, what: &str| {
        bob.tell(what).await.unwrap();
        assert_eq!(bob.next_line().await.unwrap(), "done", "{what}");
    };
    assert_eq!(bob.next_line().await.unwrap(), "done", "logs in");
    let home = TempDir::new().unwrap();
    mosquitto_pub(&chatd, &["-u", "alice", "-q", "1", "-t", "chat/alice/out/bob", "-m", "from a shell"]).await.unwrap();
    does(&mut bob, "open alice").await;
    does(&mut bob, "sees from a shell").await;
    let alice = Terminal::chat(chatd.mqtt_addr(), "alice", home.path(), 80, 24).await.unwrap();
    alice.shows_text("from a shell").await;
    alice.press(&["Enter"]).await.unwrap();
    alice.shows_text("Write a message").await;
    does(&mut bob, "write from a browser").await;
    alice.shows_text("from a browser").await;
    does(&mut bob, "ticks read from a browser").await;
    alice.text("from a terminal").await.unwrap();
    alice.press(&["Enter"]).await.unwrap();
    does(&mut bob, "sees from a terminal").await;
    alice
        .shows("read in the browser", |screen| screen.line("from a terminal").is_some_and(|row| row.contains("✓✓")))
        .await;
    bob.quit().await.unwrap();
    assert_well(&chatd).await;
}

/// The head of an answer, its names in lower case, and its body.
async fn answer(chatd: &Chatd, path: &str, headers: &str) -> (String, Vec<u8>) {
    let asking = async {
        let mut stream = TcpStream::connect(chatd.http_addr()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
        let body = answer.split_off(end);
        (String::from_utf8(answer).unwrap().to_ascii_lowercase(), body)
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap()
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// How the pages are served: what they may do, how long they are kept, whose frames they may be in.
#[tokio::test]
async fn pages_come_with_their_rules() {
    let chatd = chatd(Options::default().set("http.origins", "https://shop.example.org")).await;
    let told = format!("in a browser:  {}\n", address(&chatd));
    eventually("it says where the page is", PATIENCE, async || chatd.greeting().contains(&told)).await;
    let (head, page) = answer(&chatd, "/", "").await;
    assert!(head.starts_with("http/1.1 200"), "{head}");
    let policy = header(&head, "content-security-policy").unwrap();
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
    assert_eq!(header(&head, "x-content-type-options"), Some("nosniff"));
    assert_eq!(header(&head, "cache-control"), Some("no-cache"));
    let (again, nothing) = answer(&chatd, "/", &format!("if-none-match: {}\r\n", header(&head, "etag").unwrap())).await;
    assert!(again.starts_with("http/1.1 304") && nothing.is_empty(), "{again}");

    let page = String::from_utf8(page).unwrap();
    assert!(!page.contains("<style") && !page.contains("onload"), "nothing is written into the page: {page}");
    let script = page.split("src=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    let (plain, source) = answer(&chatd, script, "").await;
    let (packed, bytes) = answer(&chatd, script, "accept-encoding: gzip, br\r\n").await;
    assert_ne!(header(&plain, "etag"), header(&packed, "etag"), "other bytes under one name");
    assert_eq!(header(&plain, "content-encoding"), None);
    assert_eq!(header(&packed, "content-encoding"), Some("gzip"));
    assert!(bytes.len() < source.len() && bytes.starts_with(&[0x1f, 0x8b]), "{} of {}", bytes.len(), source.len());
    assert_eq!(header(&plain, "cache-control"), Some("public, max-age=31536000, immutable"));
    assert_eq!(header(&plain, "content-type"), Some("text/javascript; charset=utf-8"));

    let (head, _) = answer(&chatd, "/embed.html", "").await;
    let policy = header(&head, "content-security-policy").unwrap();
    assert!(policy.ends_with("frame-ancestors 'self' https://shop.example.org"), "{policy}");
    assert!(answer(&chatd, "/assets/../../etc/passwd", "").await.0.starts_with("http/1.1 404"));
    assert!(answer(&chatd, &format!("{script}.gz"), "").await.0.starts_with("http/1.1 404"));
}
