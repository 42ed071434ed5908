//! The chat in a real terminal: keys are sent, the screen is read.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chat_client::{Client, Events, Options as ClientOptions, Range, UserId};
use end_to_end::proxy::Proxy;
use end_to_end::terminal::{Screen, Terminal};
use end_to_end::{Chatd, Options, PATIENCE, eventually};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::auth;

fn home() -> TempDir {
    tempfile::Builder::new().prefix("chat-home-").tempdir().unwrap()
}

fn user(name: &str) -> UserId {
    name.parse().unwrap()
}

async fn chat(chatd: &Chatd, name: &str, home: &TempDir) -> Terminal {
    Terminal::chat(chatd.mqtt_addr(), name, home.path(), 80, 24).await.unwrap()
}

/// The same through something that stays when the server goes.
async fn chat_through(proxy: &Proxy, name: &str, home: &TempDir) -> Terminal {
    Terminal::chat(proxy.address(), name, home.path(), 80, 24).await.unwrap()
}

async fn proxy(chatd: &Chatd) -> Proxy {
    let proxy = Proxy::start(chatd.mqtt_addr(), 1).await.unwrap();
    proxy.calm_down();
    proxy
}

async fn client(chatd: &Chatd, name: &str) -> (Client, Events) {
    let server = format!("mqtt://{}", chatd.mqtt_addr());
    Client::connect(ClientOptions::new(&server, name, "sdk").unwrap()).await.unwrap()
}

/// Opens a conversation by its name.
async fn begin(terminal: &Terminal, peer: &str) {
    terminal.press(&["C-n"]).await.unwrap();
    terminal.shows_text("Begin a conversation with:").await;
    terminal.text(peer).await.unwrap();
    terminal.press(&["Enter"]).await.unwrap();
    terminal.shows("an editor", |screen| screen.has("Write a message") && !screen.has("Begin a conversation")).await;
}

/// Writes a message and sends it.
async fn say(terminal: &Terminal, text: &str) {
    terminal.text(text).await.unwrap();
    terminal.shows(text, |screen| screen.rows[22].contains(text) || screen.rows[22].contains("> ")).await;
    terminal.press(&["Enter"]).await.unwrap();
    terminal.shows_text("Write a message").await;
}

/// The row of the timeline with a text.
fn line<'a>(screen: &'a Screen, text: &str) -> Option<&'a str> {
    // Left of it may be the list, with the same words.
    screen.rows.iter().map(|row| row.rsplit('│').next().unwrap_or(row)).find(|row| row.contains(text))
}

/// The timeline's part of each row.
fn timeline(screen: &Screen) -> impl Iterator<Item = &str> {
    screen.rows.iter().filter_map(|row| row.rsplit('│').next())
}

#[tokio::test]
async fn two_terminals() {
    let chatd = Chatd::start().await.unwrap();
    let (home_a, home_b) = (home(), home());
    let alice = chat(&chatd, "alice", &home_a).await;
    alice.shows_text("No conversations yet").await;
    begin(&alice, "bob").await;
    say(&alice, "are you there?").await;
    // Stored, and not delivered: bob is away.
    let screen =
        alice.shows("one tick", |screen| line(screen, "are you there?").is_some_and(|row| row.contains('✓'))).await;
    assert!(!line(&screen, "are you there?").unwrap().contains("✓✓"), "{screen}");

    let bob = chat(&chatd, "bob", &home_b).await;
    bob.shows("an unread message", |screen| screen.has("○ alice") || screen.has("● alice")).await;
    bob.shows("one unread", |screen| screen.line("are you there?").is_some_and(|row| row.contains(" 1 "))).await;
    // Delivered, and not read: nobody has opened it.
    let grey = |screen: &Screen| line(screen, "are you there?").is_some_and(|row| row.contains("38;5;8m✓✓"));
    alice.shows_coloured("two grey ticks", grey).await;
    bob.press(&["Enter"]).await.unwrap();
    let screen = bob.shows("the timeline", |screen| line(screen, "are you there?").is_some()).await;
    assert!(line(&screen, " new ").is_some() && line(&screen, "Today").is_some(), "{screen}");
    let cyan = |screen: &Screen| {
        line(screen, "are you there?").is_some_and(|row| row.contains("38;5;6m✓✓") || row.contains("36m✓✓"))
    };
    alice.shows_coloured("two coloured ticks", cyan).await;

    // Bob writes: alice sees that, and then what.
    bob.text("yes, ").await.unwrap();
    alice.shows_text("bob is typing…").await;
    bob.text("here I am").await.unwrap();
    bob.press(&["Enter"]).await.unwrap();
    alice.shows("the answer", |screen| line(screen, "yes, here I am").is_some() && !screen.has("is typing")).await;
    // Alice has her conversation open: it is read at once.
    bob.shows_coloured("read", |screen| {
        line(screen, "here I am").is_some_and(|row| row.contains("38;5;6m✓✓") || row.contains("36m✓✓"))
    })
    .await;
    bob.text("a").await.unwrap();
    alice.shows_text("bob is typing…").await;
    bob.press(&["BSpace"]).await.unwrap();
    alice.shows("typing is over", |screen| !screen.has("is typing")).await;
}

#[tokio::test]
async fn edit_unsend_delete_reply() {
    let chatd = Chatd::start().await.unwrap();
    let (home_a, home_b) = (home(), home());
    let (alice, bob) = (chat(&chatd, "alice", &home_a).await, chat(&chatd, "bob", &home_b).await);
    begin(&alice, "bob").await;
    say(&alice, "helo").await;
    begin(&bob, "alice").await;
    bob.shows("the message", |screen| line(screen, "helo").is_some()).await;
    alice.shows("it is stored", |screen| line(screen, "helo").is_some_and(|row| row.contains('✓'))).await;
    alice.press(&["Up"]).await.unwrap();
    alice.shows_text("Editing").await;
    alice.press(&["BSpace"]).await.unwrap();
    alice.text("lo").await.unwrap();
    alice.press(&["Enter"]).await.unwrap();
    for terminal in [&alice, &bob] {
        terminal.shows("the edit", |screen| line(screen, "hello (edited)").is_some()).await;
    }
    // Bob replies by quoting.
    bob.press(&["M-Up"]).await.unwrap();
    bob.shows_text("r reply").await;
    bob.press(&["r"]).await.unwrap();
    bob.shows("the quotation", |screen| screen.has("> > hello")).await;
    bob.text("hi").await.unwrap();
    bob.press(&["Enter"]).await.unwrap();
    let screen =
        alice.shows("the reply", |screen| line(screen, "> hello").is_some() && line(screen, "  hi").is_some()).await;
    let quoted = screen.rows.iter().position(|row| row.ends_with("✓✓") && row.contains("hello")).unwrap();
    let below: Vec<&str> =
        screen.rows[quoted + 1..quoted + 4].iter().filter_map(|row| row.split("│  ").nth(1)).collect();
    assert!(below[0] == "bob" && below[1].starts_with("> hello") && below[2] == "hi", "{screen}");
    // It cannot be edited or unsent by alice, but deleted for her alone.
    alice.press(&["M-Up"]).await.unwrap();
    alice.shows_text("r reply").await;
    alice.press(&["u"]).await.unwrap();
    alice.shows_text("only your own").await;
    alice.press(&["d"]).await.unwrap();
    alice.shows_text("for you alone?").await;
    alice.press(&["y"]).await.unwrap();
    alice.shows("it is gone", |screen| line(screen, "> hello").is_none() && line(screen, "hello").is_some()).await;
    // Unsent for both.
    alice.press(&["M-Up"]).await.unwrap();
    alice.shows_text("r reply").await;
    alice.press(&["u"]).await.unwrap();
    alice.shows_text("for everybody?").await;
    alice.press(&["y"]).await.unwrap();
    for terminal in [&alice, &bob] {
        terminal
            .shows("it is unsent", |screen| {
                line(screen, "was unsent").is_some() && line(screen, "hello (edited)").is_none()
            })
            .await;
    }
    bob.shows("the reply", |screen| line(screen, "> hello").is_some()).await;
}

/// Numbers of the messages on the screen, and their rows.
fn numbers(screen: &Screen) -> Vec<(usize, u64)> {
    let rows = screen.rows.iter().enumerate();
    rows.filter_map(|(row, text)| {
        let text = text.rsplit('│').next()?;
        let number = text.split_once("message number ")?.1.split(' ').next()?;
        Some((row, number.parse().ok()?))
    })
    .collect()
}

async fn fill(chatd: &Chatd, count: u64) {
    let (alice, _events) = client(chatd, "alice").await;
    let bob = user("bob");
    let mut waiting = Vec::new();
    for number in 1..=count {
        let words = "and some more words ".repeat(usize::try_from(number % 4).unwrap());
        waiting.push(alice.queue(&bob, format!("message number {number} {words}")).await.unwrap());
    }
    for queued in waiting {
        queued.await.unwrap();
    }
    alice.close().await;
}

#[tokio::test]
async fn history_without_a_jump() {
    let chatd = Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap();
    fill(&chatd, 500).await;
    let home = home();
    let bob = chat(&chatd, "bob", &home).await;
    bob.shows_text("● alice").await;
    bob.press(&["Enter"]).await.unwrap();
    bob.shows("the newest", |screen| numbers(screen).last().is_some_and(|(_, number)| *number == 500)).await;
    bob.shows("a page above", |screen| !screen.has("loading")).await;
    let mut pages = 0;
    loop {
        // Whatever is asked for now comes later.
        chatd.signal_stop().unwrap();
        let top = numbers(&bob.screen().await.unwrap())[0].1;
        let mut last = None;
        for _ in 0..40 {
            bob.press(&["PPage"]).await.unwrap();
            let screen = bob.shows("scrolled", |_| true).await;
            if last.as_ref() == Some(&screen) && screen.has("loading") {
                break;
            }
            last = Some(screen);
        }
        let mut before = bob.screen().await.unwrap();
        // The keys that are under way still.
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let again = bob.screen().await.unwrap();
            if again == before {
                break;
            }
            before = again;
        }
        chatd.signal_continue().unwrap();
        let after = bob.shows("the page", |screen| !screen.has("loading")).await;
        let (before, after) = (numbers(&before), numbers(&after));
        assert!(before.iter().all(|anchored| after.contains(anchored)), "{before:?}\n{after:?}");
        pages += 1;
        if after[0].1 == 1 {
            break;
        }
        assert!(before[0].1 < top || after[0].1 < before[0].1, "it does not go on");
        assert!(pages < 20);
    }
    assert!(pages >= 4, "{pages}");
    let screen = bob.shows_text("the beginning").await;
    assert!(numbers(&screen).windows(2).all(|pair| pair[0].1 + 1 == pair[1].1), "{screen}");
    // What arrives now moves nothing; one key goes there.
    let (alice, _events) = client(&chatd, "alice").await;
    alice.send(&user("bob"), "message number 501").await.unwrap();
    let with_news = bob.shows_text("1 new below").await;
    assert_eq!(numbers(&with_news), numbers(&screen));
    bob.press(&["C-End"]).await.unwrap();
    bob.shows("the newest", |screen| numbers(screen).last().is_some_and(|(_, number)| *number == 501)).await;
    // The wheel, too.
    let before = numbers(&bob.screen().await.unwrap());
    bob.mouse(64, 60, 10).await.unwrap();
    bob.shows("three rows up", |screen| numbers(screen).first() != before.first()).await;
    bob.mouse(65, 60, 10).await.unwrap();
    bob.shows("three rows down", |screen| numbers(screen) == before).await;
}

#[tokio::test]
async fn narrower_and_wider() {
    let chatd = Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap();
    fill(&chatd, 60).await;
    let home = home();
    let bob = Terminal::chat(chatd.mqtt_addr(), "bob", home.path(), 120, 24).await.unwrap();
    bob.shows_text("● alice").await;
    // A click opens it.
    bob.mouse(0, 5, 1).await.unwrap();
    bob.shows("the newest", |screen| numbers(screen).last().is_some_and(|(_, number)| *number == 60)).await;
    bob.press(&["PPage"]).await.unwrap();
    let wide = bob.shows("a page up", |screen| numbers(screen).last().is_some_and(|(_, number)| *number < 60)).await;
    let anchor = numbers(&wide)[0];
    bob.resize(60, 24).await.unwrap();
    let narrow = bob.shows("the timeline alone", |screen| !screen.has("│") && !numbers(screen).is_empty()).await;
    assert_eq!(numbers(&narrow)[0], anchor, "{narrow}");
    assert!(!narrow.has("● alice            "), "{narrow}");
    bob.press(&["Tab"]).await.unwrap();
    bob.shows("the list alone", |screen| screen.rows[1].contains("alice") && numbers(screen).len() <= 1).await;
    bob.press(&["Tab"]).await.unwrap();
    bob.shows("the timeline again", |screen| numbers(screen) == numbers(&narrow)).await;
    bob.resize(80, 24).await.unwrap();
    let middle = bob.shows("both", |screen| screen.has("│") && !numbers(screen).is_empty()).await;
    assert_eq!(numbers(&middle)[0], anchor, "{middle}");
    bob.resize(20, 6).await.unwrap();
    bob.shows_text("too small").await;
    bob.resize(120, 24).await.unwrap();
    bob.shows("as it was", |screen| numbers(screen) == numbers(&wide)).await;
    bob.text("still here").await.unwrap();
    bob.press(&["Enter"]).await.unwrap();
    bob.shows("the own message", |screen| line(screen, "still here").is_some_and(|row| row.contains('✓'))).await;
}

async fn texts(chatd: &Chatd, me: &str, with: &str) -> Vec<String> {
    let (client, _events) = client(chatd, me).await;
    let page = client.history(&user(with), Range::Before(None), 200).await.unwrap();
    client.close().await;
    page.entries.into_iter().filter_map(|entry| entry.text).collect()
}

#[tokio::test]
async fn a_lost_connection() {
    let mut chatd = Chatd::start().await.unwrap();
    let proxy = proxy(&chatd).await;
    let home = home();
    let alice = chat_through(&proxy, "alice", &home).await;
    begin(&alice, "bob").await;
    say(&alice, "before").await;
    alice.shows("it is stored", |screen| line(screen, "before").is_some_and(|row| row.contains('✓'))).await;
    chatd.kill9().await.unwrap();
    alice.shows("a banner", |screen| screen.rows[0].contains("Not connected")).await;
    say(&alice, "meanwhile").await;
    alice.shows("it waits", |screen| line(screen, "meanwhile").is_some_and(|row| row.contains('◷'))).await;
    alice.shows_text("1 message waits").await;
    alice.shows("a countdown", |screen| screen.rows[0].contains("Trying again in ")).await;
    chatd.restart().await.unwrap();
    proxy.lead_to(chatd.mqtt_addr());
    alice.shows("no banner", |screen| !screen.has("Not connected")).await;
    alice.shows("it is stored", |screen| line(screen, "meanwhile").is_some_and(|row| row.contains('✓'))).await;
    assert_eq!(texts(&chatd, "alice", "bob").await, ["before", "meanwhile"]);
    let screen = alice.screen().await.unwrap();
    assert_eq!(
        screen.rows.iter().filter_map(|row| row.rsplit('│').next()).filter(|row| row.contains("meanwhile")).count(),
        1,
        "{screen}"
    );
}

#[tokio::test]
async fn begun_offline_and_left_offline() {
    let mut chatd = Chatd::start().await.unwrap();
    let proxy = proxy(&chatd).await;
    chatd.kill9().await.unwrap();
    let home = home();
    let alice = chat_through(&proxy, "alice", &home).await;
    alice.shows("a banner", |screen| screen.rows[0].contains("Not connected")).await;
    begin(&alice, "bob").await;
    say(&alice, "for later").await;
    alice.shows("it waits", |screen| line(screen, "for later").is_some_and(|row| row.contains('◷'))).await;
    alice.press(&["C-c"]).await.unwrap();
    alice.ended().await.unwrap();
    drop(alice);
    // The next run still has it.
    let alice = chat_through(&proxy, "alice", &home).await;
    alice.shows("it waits", |screen| screen.has("◷ for later") && screen.has("1 message waits")).await;
    chatd.restart().await.unwrap();
    proxy.lead_to(chatd.mqtt_addr());
    alice.shows("it is stored", |screen| screen.has("✓ for later") && !screen.has("Not connected")).await;
    assert_eq!(texts(&chatd, "alice", "bob").await, ["for later"]);
}

/// A network that swallows everything: nobody has to wait to see that.
#[tokio::test]
async fn begun_where_nobody_answers() {
    let silence = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let home = home();
    let began = Instant::now();
    let alice = Terminal::chat(silence.local_addr().unwrap(), "alice", home.path(), 80, 24).await.unwrap();
    alice.shows_text("Connecting…").await;
    begin(&alice, "bob").await;
    say(&alice, "for later").await;
    alice.shows_text("1 message waits").await;
    // Far less than it takes to give up.
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    alice.press(&["C-c"]).await.unwrap();
    alice.ended().await.unwrap();
}

/// The server wants a password, and nobody gave one: it is asked for when the server says so, be it later.
#[tokio::test]
async fn a_password_is_asked_for() {
    let (_folder, users) = auth::users().await;
    let mut chatd = Chatd::start_with(auth::required().set("auth.password_file", users.display())).await.unwrap();
    let proxy = proxy(&chatd).await;
    let home = home();
    let alice = chat_through(&proxy, "alice", &home).await;
    alice.shows("a question, and nothing of the chat", |screen| screen.has("Password of") && !screen.has("F1")).await;
    alice.text("alice-pw\n").await.unwrap();
    alice.shows_text("No conversations yet").await;
    alice.press(&["C-c"]).await.unwrap();
    alice.ended().await.unwrap();
    drop(alice);

    chatd.kill9().await.unwrap();
    let alice = chat_through(&proxy, "alice", &home).await;
    begin(&alice, "bob").await;
    say(&alice, "for later").await;
    alice.text("a draft").await.unwrap();
    alice.shows("it waits", |screen| screen.has("1 message waits") && screen.has("> a draft")).await;
    chatd.restart().await.unwrap();
    proxy.lead_to(chatd.mqtt_addr());
    alice.shows("a question", |screen| screen.has("Password of") && !screen.has("F1")).await;
    alice.text("alice-pw\n").await.unwrap();
    alice.shows("what was written", |screen| screen.has("draft: a draft") && !screen.has("waits")).await;
    begin_again(&alice, "bob", "a draft").await;
    alice.shows("it is stored", |screen| line(screen, "for later").is_some_and(|row| row.contains('✓'))).await;
}

/// The server has stored a message, and the chat was killed before it could note that.
#[tokio::test]
async fn stored_and_not_noted() {
    let mut chatd = Chatd::start().await.unwrap();
    let proxy = proxy(&chatd).await;
    chatd.kill9().await.unwrap();
    let home = home();
    let alice = chat_through(&proxy, "alice", &home).await;
    begin(&alice, "bob").await;
    say(&alice, "only once").await;
    alice.shows("it waits", |screen| line(screen, "only once").is_some_and(|row| row.contains('◷'))).await;
    let outbox = find(&home.path().join("chat/outbox"), "terminal").expect("an outbox");
    eventually("it is in the outbox", PATIENCE, || async {
        std::fs::read_to_string(&outbox).unwrap().contains("only once")
    })
    .await;
    let before = std::fs::read(&outbox).unwrap();
    chatd.restart().await.unwrap();
    proxy.lead_to(chatd.mqtt_addr());
    alice.shows("it is stored", |screen| line(screen, "only once").is_some_and(|row| row.contains('✓'))).await;
    begin(&alice, "carol").await;
    alice.press(&["C-c"]).await.unwrap();
    alice.ended().await.unwrap();
    drop(alice);
    std::fs::write(&outbox, before).unwrap();
    let alice = chat_through(&proxy, "alice", &home).await;
    alice.shows("it is stored", |screen| screen.has("✓ only once") && !screen.has("◷")).await;
    begin(&alice, "bob").await;
    alice.shows("once", |screen| timeline(screen).filter(|row| row.contains("only once")).count() == 1).await;
    assert_eq!(texts(&chatd, "alice", "bob").await, ["only once"]);
}

/// The file of this name, somewhere in a folder.
fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.ends_with(name) {
                return Some(path);
            }
        }
    }
    None
}

#[tokio::test]
async fn hostile_texts() {
    let chatd = Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap();
    let home = home();
    let (bob, _events) = client(&chatd, "bob").await;
    let alice = chat(&chatd, "alice", &home).await;
    begin(&alice, "bob").await;
    let to = user("alice");
    let family = "👨\u{200d}👩\u{200d}👧\u{200d}👦";
    let hostile = [
        "\u{1b}[2J\u{1b}[1;1Hgone\u{1b}]0;owned\u{7}\u{1b}[?1049l\u{1b}c".to_owned(),
        "\u{9b}31mred\u{90}dcs\u{9c}".to_owned(),
        "\u{202e}desrever\u{2066}\u{200f}\u{61c} over\rwritten\u{8}\u{8}\u{8}".to_owned(),
        "שלום עולם ".repeat(30),
        format!("مرحبا {}", "بالعالم ".repeat(20)),
        family.repeat(60),
        "你好世界".repeat(40),
        format!("z{}o", "\u{336}\u{489}".repeat(2_000)),
        "❤\u{fe0f}🇩🇪👍🏽1\u{fe0f}\u{20e3}".repeat(30),
        "\u{200b}\u{feff}\u{ad}".repeat(100),
        "ｶﾞ".repeat(60),
        "क्ष्म".repeat(40),
        "x".repeat(16 * 1024 - 16),
        "\n".repeat(200),
        "tab\tseparated\tvalues\t".repeat(30),
    ];
    for (number, text) in hostile.iter().enumerate() {
        bob.send(&to, format!("begin {number}\n{text}")).await.unwrap();
        bob.send(&to, format!("end {number}")).await.unwrap();
        alice.shows("the end of it", |screen| line(screen, &format!("end {number}")).is_some()).await;
        intact(&alice).await;
        if number > 3 {
            // And what is above the end, when there is enough of it.
            alice.press(&["PPage"]).await.unwrap();
            alice.shows("a page up", |screen| screen.has("Ctrl-End: newest")).await;
            intact(&alice).await;
            alice.press(&["C-End"]).await.unwrap();
            alice.shows("the end again", |screen| !screen.has("Ctrl-End: newest")).await;
        }
    }
    assert!(!alice.about("pane_title").await.unwrap().contains("owned"));
    let screen = alice.screen().await.unwrap();
    // What a terminal would have obeyed can be read.
    for _ in 0..40 {
        alice.press(&["PPage"]).await.unwrap();
    }
    alice.press(&["C-Home"]).await.unwrap();
    alice.shows_text("\\u{1b}[2J").await;
    intact(&alice).await;
    assert!(screen.has("end 14"), "{screen}");
    // On every screen of a narrow terminal, too.
    alice.press(&["C-End"]).await.unwrap();
    alice.resize(60, 24).await.unwrap();
    alice.shows("the timeline alone", |screen| !screen.has("│") && screen.has("end 14")).await;
    say_at(&alice, "still alive").await;
}

async fn say_at(terminal: &Terminal, text: &str) {
    terminal.text(text).await.unwrap();
    terminal.press(&["Enter"]).await.unwrap();
    terminal.shows("it is stored", |screen| screen.line(text).is_some_and(|row| row.contains('✓'))).await;
}

/// The border between list and timeline is where it was, on each row, and times are where times are.
async fn intact(terminal: &Terminal) {
    let is_intact = |screen: &Screen| {
        let cell = |row, column| screen.cell(row, column).map(bare).unwrap_or_default();
        let timed = |row: &usize| {
            screen.rows[*row].rsplit('│').next().is_some_and(|row| row.contains("end ") && row.contains(':'))
        };
        screen.rows.len() == 24
            && (0..23).all(|row| cell(row, 26) == "│")
            && (0..22).filter(timed).all(|row| cell(row, 73) == ":")
            && screen.rows[23].contains("F1 help")
    };
    terminal.shows("a layout that is whole", is_intact).await;
}

/// Without what isolates right-to-left words.
fn bare(cell: &str) -> String {
    cell.chars().filter(|character| !matches!(character, '\u{2068}' | '\u{2069}')).collect()
}

#[tokio::test]
async fn the_terminal_is_given_back() {
    let chatd = Chatd::start().await.unwrap();
    let home = home();
    let terminal = Terminal::shell(&chatd, "alice", home.path(), 80, 24).await.unwrap();
    terminal.shows_text("ready$").await;
    terminal.text("stty -g > before; echo first\n").await.unwrap();
    terminal.shows("the shell answers", |screen| screen.rows.iter().any(|row| row == "first")).await;
    for way in ["key", "signal"] {
        terminal.text("chat; echo ended-$?\n").await.unwrap();
        terminal.shows_text("Ctrl-C quit").await;
        assert_eq!(terminal.about("alternate_on").await.unwrap(), "1");
        assert_eq!(terminal.about("mouse_any_flag").await.unwrap(), "1");
        if way == "key" {
            terminal.press(&["C-q"]).await.unwrap();
        } else {
            let shell: i32 = terminal.about("pane_pid").await.unwrap().parse().unwrap();
            kill_process(child_of(shell), Signal::TERM).unwrap();
        }
        terminal
            .shows("the shell again", |screen| {
                screen.has("ended-0") && screen.has("first") && !screen.has("Ctrl-C quit")
            })
            .await;
        assert_eq!(terminal.about("alternate_on").await.unwrap(), "0");
        assert_eq!(terminal.about("mouse_any_flag").await.unwrap(), "0");
        terminal.text("stty -g | cmp - before && echo same-$((1+1))\n").await.unwrap();
        terminal.shows_text("same-2").await;
        terminal.text("clear; echo first\n").await.unwrap();
        terminal.shows("a clear screen", |screen| !screen.has("same-2") && screen.has("first")).await;
    }
}

#[tokio::test]
async fn stopped_and_brought_back() {
    let chatd = Chatd::start().await.unwrap();
    let home = home();
    let terminal = Terminal::shell(&chatd, "alice", home.path(), 80, 24).await.unwrap();
    terminal.shows_text("ready$").await;
    terminal.text("chat\n").await.unwrap();
    begin(&terminal, "bob").await;
    terminal.text("a draft").await.unwrap();
    terminal.shows_text("> a draft").await;
    for _ in 0..2 {
        terminal.press(&["C-z"]).await.unwrap();
        let asks = |screen: &Screen| screen.rows.iter().rfind(|row| !row.is_empty()).is_some_and(|row| row == "ready$");
        terminal.shows("the shell", asks).await;
        assert_eq!(terminal.about("alternate_on").await.unwrap(), "0");
        assert_eq!(terminal.about("mouse_any_flag").await.unwrap(), "0");
        terminal.text("clear; echo in the shell\n").await.unwrap();
        terminal.shows("its answer", |screen| screen.rows[0] == "in the shell").await;
        terminal.text("fg\n").await.unwrap();
        terminal.shows("the chat", |screen| screen.has("> a draft") && !screen.has("in the shell")).await;
        assert_eq!(terminal.about("mouse_any_flag").await.unwrap(), "1");
    }
    terminal.press(&["C-u"]).await.unwrap();
    say(&terminal, "hello").await;
    terminal.shows("it is stored", |screen| line(screen, "hello").is_some_and(|row| row.contains('✓'))).await;
    terminal.press(&["C-c"]).await.unwrap();
    terminal.shows("the shell", |screen| screen.rows[0] == "in the shell" && !screen.has("F1 help")).await;
}

/// Where no shell could bring it back, it stays.
#[tokio::test]
async fn without_a_shell_nothing_stops() {
    let chatd = Chatd::start().await.unwrap();
    let home = home();
    let alice = chat(&chatd, "alice", &home).await;
    begin(&alice, "bob").await;
    alice.press(&["C-z"]).await.unwrap();
    say(&alice, "hello").await;
    alice.shows("it is stored", |screen| line(screen, "hello").is_some_and(|row| row.contains('✓'))).await;
}

/// The process that a shell runs.
fn child_of(shell: i32) -> Pid {
    let children = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).unwrap();
    let child = children.split_whitespace().next().expect("the shell runs something");
    Pid::from_raw(child.parse().unwrap()).unwrap()
}

#[tokio::test]
async fn pasted_written_and_searched() {
    let chatd = Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap();
    fill(&chatd, 90).await;
    let home = home();
    let bob = chat(&chatd, "bob", &home).await;
    bob.shows_text("● alice").await;
    bob.press(&["Enter"]).await.unwrap();
    bob.shows("the newest", |screen| numbers(screen).last().is_some_and(|(_, number)| *number == 90)).await;
    // Several lines are one message, and none is sent before Enter.
    bob.paste("one\ntwo\n\u{1b}[31mthree").await.unwrap();
    bob.shows("three lines", |screen| screen.rows[22].contains("[31mthree")).await;
    bob.press(&["M-Enter"]).await.unwrap();
    bob.text("four").await.unwrap();
    bob.press(&["Enter"]).await.unwrap();
    bob.shows("it is stored", |screen| screen.rows.iter().any(|row| row.contains("one") && row.contains('✓'))).await;
    assert_eq!(texts(&chatd, "bob", "alice").await.last().unwrap(), "one\ntwo\n[31mthree\nfour");
    // A draft waits for its conversation.
    bob.text("a draft for alice").await.unwrap();
    begin(&bob, "carol").await;
    bob.shows_text("draft: a draft for").await;
    begin_again(&bob, "alice", "a draft for alice").await;
    // The next run has it, too, even if this one is killed.
    let drafts = home.path().join("chat/drafts");
    eventually("it is kept", PATIENCE, || async { find(&drafts, "terminal").is_some() }).await;
    let pid: i32 = bob.about("pane_pid").await.unwrap().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    drop(bob);
    let bob = chat(&chatd, "bob", &home).await;
    bob.shows_text("draft: a draft for").await;
    begin_again(&bob, "alice", "a draft for alice").await;
    bob.press(&["C-c"]).await.unwrap();
    bob.ended().await.unwrap();
    drop(bob);
    let bob = chat(&chatd, "bob", &home).await;
    begin_again(&bob, "alice", "a draft for alice").await;
    bob.shows("the newest", |screen| line(screen, "four").is_some()).await;
    // Searching goes to what is above the screen.
    bob.press(&["C-f"]).await.unwrap();
    bob.shows_text("Search:").await;
    bob.text("NUMBER 7").await.unwrap();
    bob.press(&["Enter"]).await.unwrap();
    bob.shows("the newest match", |screen| numbers(screen).iter().any(|(_, number)| *number == 79)).await;
    for _ in 0..10 {
        bob.press(&["n"]).await.unwrap();
    }
    bob.shows("the oldest match", |screen| numbers(screen).iter().any(|(_, number)| *number == 7)).await;
    bob.press(&["Escape"]).await.unwrap();
    bob.shows("the draft", |screen| screen.rows[22].contains("a draft for alice") && screen.has("F1 help")).await;
    bob.press(&["F1"]).await.unwrap();
    bob.shows_text("reply by quoting it").await;
    bob.press(&["F1"]).await.unwrap();
    bob.shows("no help", |screen| !screen.has("reply by quoting it")).await;
}

async fn begin_again(terminal: &Terminal, peer: &str, draft: &str) {
    terminal.press(&["C-n"]).await.unwrap();
    terminal.shows_text("Begin a conversation with:").await;
    terminal.text(peer).await.unwrap();
    terminal.press(&["Enter"]).await.unwrap();
    terminal.shows("the draft", |screen| screen.rows[22].contains(draft)).await;
}

#[tokio::test]
async fn what_is_refused_says_why() {
    let chatd = Chatd::start_with(Options::default().set("limits.message_bytes", 20)).await.unwrap();
    let home = home();
    let alice = chat(&chatd, "alice", &home).await;
    begin(&alice, "bob").await;
    alice.text("this is longer than twenty bytes").await.unwrap();
    alice.press(&["Enter"]).await.unwrap();
    // The chat says so, or the server if the chat does not know the limit yet.
    alice
        .shows("why", |screen| {
            screen.has("too long: 32 bytes, and a message has at most 20") || screen.has("✗ not sent: text_too_long")
        })
        .await;
    alice.press(&["C-u"]).await.unwrap();
    say(&alice, "short").await;
    alice.shows("it is stored", |screen| line(screen, "short").is_some_and(|row| row.contains('✓'))).await;
    // Nobody can write to themselves, and names have a grammar.
    alice.press(&["C-n"]).await.unwrap();
    alice.text("alice").await.unwrap();
    alice.press(&["Enter"]).await.unwrap();
    alice.shows_text("nobody can write to themselves").await;
    alice.press(&["C-u"]).await.unwrap();
    alice.text("Not A Name").await.unwrap();
    alice.press(&["Enter"]).await.unwrap();
    alice.shows_text("[a-z0-9]").await;
    alice.press(&["Escape"]).await.unwrap();
    alice.shows("no prompt", |screen| !screen.has("Begin a conversation")).await;
}

/// What a device acknowledges is delivered, and it is acknowledged when the chat has it: killing the chat loses nothing.
#[tokio::test]
async fn a_killed_chat_loses_nothing() {
    let chatd = Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap();
    let home = home();
    let bob = chat(&chatd, "bob", &home).await;
    bob.shows_text("No conversations yet").await;
    let (alice, _events) = client(&chatd, "alice").await;
    let pid: i32 = bob.about("pane_pid").await.unwrap().parse().unwrap();
    for number in 1..=20 {
        alice.queue(&user("bob"), format!("message number {number}")).await.unwrap();
    }
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    let last = alice.send(&user("bob"), "message number 21").await.unwrap();
    assert_eq!(last.seq.get(), 21);
    drop(bob);
    let bob = chat(&chatd, "bob", &home).await;
    bob.shows("all are unread", |screen| screen.line("message number 21").is_some_and(|row| row.contains(" 21 ")))
        .await;
    bob.press(&["Enter"]).await.unwrap();
    bob.shows("all", |screen| numbers(screen).last().is_some_and(|(_, number)| *number == 21)).await;
    eventually("the last is read", PATIENCE, || async {
        let conversations = alice.conversations(None, 1).await.unwrap();
        conversations.conversations.first().is_some_and(|told| told.standing.read == 21)
    })
    .await;
}
