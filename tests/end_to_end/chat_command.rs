//! `chat`, the command, in scripts: what it prints, how it ends, and that killing either end loses nothing.

use std::cell::Cell;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use end_to_end::command::{self, Done, Person, Running};
use end_to_end::packet::{self, Publish, Version};
use end_to_end::programs;
use end_to_end::tls::{self, Files};
use end_to_end::{Chatd, Dice, Options, PATIENCE, eventually};
use rustix::process::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::auth;

async fn two(chatd: &Chatd) -> (Person, Person) {
    (Person::new("alice", chatd).unwrap(), Person::new("bob", chatd).unwrap())
}

async fn fast() -> Chatd {
    Chatd::start_with(Options::default().as_fast_as_it_can()).await.unwrap()
}

fn lines(count: usize) -> String {
    (1..=count).map(|number| format!("{number}\n")).collect()
}

async fn ok(person: &Person, arguments: &[&str]) -> Done {
    let done = person.run(arguments).await.unwrap();
    assert_eq!(done.code, Some(0), "{arguments:?}: {done:?}");
    done
}

fn seq(message: &Value) -> u64 {
    message["seq"].as_u64().unwrap_or_else(|| panic!("{message}"))
}

#[tokio::test]
async fn send_and_listen() {
    let chatd = Chatd::start().await.unwrap();
    let (alice, bob) = two(&chatd).await;
    let done = ok(&alice, &["send", "bob", "hi"]).await;
    assert_eq!((done.out.as_str(), done.err.as_str()), ("", ""), "who says nothing said yes");
    let done = alice.run_with(&["send", "bob", "--json"], "two\n\nthree\r\n").await.unwrap();
    assert_eq!((done.code, done.numbers("seq")), (Some(0), vec![2, 3]));
    assert!(
        done.json().iter().all(|line| line["receiver_away"] == true && line["at"].is_u64() && line["id"].is_string())
    );

    // As on the wire, and nothing else.
    let heard = ok(&bob, &["listen", "--json", "-n", "3"]).await.json();
    let texts: Vec<&str> = heard.iter().map(|message| message["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["hi", "two", "three"]);
    let members: Vec<&String> = heard[0].as_object().unwrap().keys().collect();
    assert_eq!(members, ["at", "conversation", "from", "id", "kind", "seq", "text", "to", "v"]);

    // For people, without colours when nobody sees them, and what others write is no command to the terminal.
    ok(&alice, &["send", "bob", "first\n12:00 carol: second\u{1b}[2J\u{202e}"]).await;
    ok(&bob, &["send", "alice", "my own"]).await;
    let heard = ok(&bob, &["listen", "-n", "1"]).await.out;
    let (time, rest) = heard.split_once(' ').unwrap();
    assert!(time.len() == 5 && time.as_bytes()[2] == b':', "{heard}");
    assert_eq!(rest, "alice: first\n    12:00 carol: second\\u{1b}[2J\\u{202e}\n");

    // What was printed does not come again. Live now: other words, and taken back.
    let mut listening = bob.start(&["listen"]).await.unwrap();
    ok(&alice, &["edit", "bob", "2", "2"]).await;
    assert!(listening.line().await.unwrap().unwrap().ends_with("alice, number 2 now: 2"));
    ok(&alice, &["unsend", "bob", "3"]).await;
    assert!(listening.line().await.unwrap().unwrap().ends_with("alice took number 3 back"));
    listening.signal(Signal::INT).unwrap();
    assert_eq!(listening.ended().await.unwrap(), Some(0), "stopped as asked");

    // Who listens to somebody alone takes nothing from who listens to all; one's own are there if they are wanted.
    let carol = Person::new("carol", &chatd).unwrap();
    let mut from_carol = bob.start(&["listen", "--from", "carol", "--json"]).await.unwrap();
    let mut all = bob.start(&["listen", "--sent", "--json"]).await.unwrap();
    ok(&bob, &["send", "carol", "here?"]).await;
    ok(&alice, &["send", "bob", "from alice"]).await;
    ok(&carol, &["send", "bob", "from carol"]).await;
    assert_eq!(from_carol.json().await.unwrap().unwrap()["text"], "from carol");
    let mut texts = Vec::new();
    while texts.last().is_none_or(|text| text != "from carol") {
        // What was printed when it was stopped may come again: an unsend has no text.
        texts.push(all.json().await.unwrap().unwrap()["text"].as_str().unwrap_or_default().to_owned());
    }
    assert_eq!(texts[texts.len() - 3..], ["here?", "from alice", "from carol"]);

    // So it is where the device has a name, as in a profile.
    let mut all = bob.start(&["listen", "--device", "desk", "--json"]).await.unwrap();
    while tokio::time::timeout(Duration::from_millis(300), all.json()).await.is_err() {
        ok(&alice, &["send", "bob", "is the desk there?"]).await;
    }
    all.signal(Signal::INT).unwrap();
    assert_eq!(all.ended().await.unwrap(), Some(0));
    let mut from_carol = bob.start(&["listen", "--from", "carol", "--device", "desk", "--json"]).await.unwrap();
    ok(&alice, &["send", "bob", "alice again"]).await;
    ok(&carol, &["send", "bob", "carol again"]).await;
    while from_carol.json().await.unwrap().unwrap()["text"] != "carol again" {}
    from_carol.signal(Signal::INT).unwrap();
    assert_eq!(from_carol.ended().await.unwrap(), Some(0));
    let mut all = bob.start(&["listen", "--device", "desk", "--json"]).await.unwrap();
    while all.json().await.unwrap().unwrap()["text"] != "alice again" {}
}

#[tokio::test]
async fn exit_codes() {
    let (folder, users) = auth::users().await;
    let chatd = Chatd::start_with(auth::required().set("auth.password_file", users.display())).await.unwrap();
    let alice = Person::new("alice", &chatd).unwrap();
    let run = async |password: &str, arguments: &[&str]| {
        let mut command = alice.chat(arguments).await.unwrap();
        command.env("CHAT_PASSWORD", password);
        command::ended(command).await.unwrap()
    };
    let nobody = TcpListener::bind(("127.0.0.1", 0)).await.unwrap().local_addr().unwrap();
    let nowhere = format!("mqtt://{nobody}");
    for (password, arguments, code, sentence) in [
        ("alice-pw", &["send", "bob", "hi"][..], 0, ""),
        ("alice-pw", &["send", "carol", "hi"], 1, "unknown_user"),
        ("alice-pw", &["send", "alice", "hi"], 1, "self_message"),
        ("alice-pw", &["send", "bob", ""], 1, "empty_text"),
        ("alice-pw", &["history", "eve"], 1, "eve"),
        ("alice-pw", &["tail", "--observer"], 1, "not_authorized"),
        ("alice-pw", &["send", "Bob", "hi"], 2, "must match"),
        ("alice-pw", &["whoami", "--server", "http://localhost"], 2, "no such scheme"),
        ("alice-pw", &["whoami", "--profile", "gone"], 2, "gone"),
        ("alice-pw", &["listen", "--loud"], 2, "--loud"),
        ("alice-pw", &[], 2, "in the terminal"),
        ("alice-pw", &["listen", "--server", &nowhere], 3, "cannot reach"),
        ("alice-pw", &["send", "bob", "hi", "--server", &nowhere], 3, &nowhere),
        ("wrong", &["send", "bob", "hi"], 4, "login"),
        ("wrong", &["listen"], 4, "login"),
        ("", &["whoami"], 4, "login"),
    ] {
        let done = run(password, arguments).await;
        assert_eq!(done.code, Some(code), "{arguments:?}: {done:?}");
        assert!(done.err.contains(sentence) && done.out.is_empty(), "{arguments:?}: {done:?}");
        assert!(!done.err.contains("alice-pw"), "{done:?}");
    }
    let mut command = alice.chat(&["whoami"]).await.unwrap();
    command.env("CHAT_TOKEN", "nonsense");
    let done = command::ended(command).await.unwrap();
    assert!(done.code == Some(4) && done.err.contains("login"), "{done:?}");
    drop(folder);
}

#[tokio::test]
async fn a_refused_line_is_named_and_the_next_is_sent() {
    let chatd = Chatd::start().await.unwrap();
    let (alice, bob) = two(&chatd).await;
    let mut input = b"one\n".to_vec();
    input.extend("x".repeat(16 * 1024 + 1).bytes());
    input.extend(b"\nthree\n");
    input.extend(vec![b'x'; 3 * 1024 * 1024]);
    input.extend(b"\n\xff\xfe\nsix");
    let done = alice.run_with(&["send", "bob", "--json"], input).await.unwrap();
    assert_eq!((done.code, done.numbers("seq")), (Some(1), vec![1, 2, 3]), "{}", done.err);
    let said: Vec<&str> = done.err.lines().collect();
    assert_eq!(said.len(), 4, "{said:?}");
    for (said, what) in
        said.iter().zip(["line 2: text_too_long", "line 4: text_too_long", "line 5: not_utf8", "3 of 6"])
    {
        assert!(said.contains(what), "{said}");
    }
    let heard = ok(&bob, &["history", "alice", "--json"]).await.json();
    assert_eq!(heard.iter().map(|entry| entry["text"].as_str().unwrap()).collect::<Vec<_>>(), ["one", "three", "six"]);
}

/// The same again, as after an exit code 3, stores nothing twice.
#[tokio::test]
async fn sent_again_under_an_id() {
    let chatd = Chatd::start().await.unwrap();
    let (alice, bob) = two(&chatd).await;
    for _ in 0..2 {
        ok(&alice, &["send", "bob", "hi", "--id", "greeting"]).await;
        let done = alice.run_with(&["send", "bob", "--id", "report", "--json"], "one\n\nthree\n").await.unwrap();
        assert_eq!((done.code, done.numbers("seq")), (Some(0), vec![2, 3]));
        assert_eq!(
            done.json().iter().map(|line| line["id"].as_str().unwrap()).collect::<Vec<_>>(),
            ["report-1", "report-3"]
        );
    }
    let done = alice.run(&["send", "bob", "other words", "--id", "greeting"]).await.unwrap();
    assert!(done.code == Some(1) && done.err.contains("id_conflict"), "{done:?}");
    assert_eq!(ok(&bob, &["history", "alice", "--json"]).await.numbers("seq"), [1, 2, 3]);
}

/// A user may send so many a second, and three programs of that user want to send more: what is put off keeps its place.
#[tokio::test]
async fn too_fast_is_not_out_of_order() {
    let chatd = Chatd::start_with(Options::default().set("limits.user_publishes_per_s", 40)).await.unwrap();
    let (alice, _bob) = two(&chatd).await;
    let send = async |peer: &str| alice.run_with(&["send", peer], lines(40)).await.unwrap();
    let (bob, carol, dave) = tokio::join!(send("bob"), send("carol"), send("dave"));
    for (peer, done) in [("bob", bob), ("carol", carol), ("dave", dave)] {
        assert_eq!((done.code, done.err.as_str()), (Some(0), ""), "{peer}");
        let history = ok(&alice, &["history", peer, "--json"]).await.json();
        let texts: String = history.iter().map(|entry| format!("{}\n", entry["text"].as_str().unwrap())).collect();
        assert_eq!(texts, lines(40), "{peer}");
    }
    assert!(chatd.limited("user_publishes_per_s").await.unwrap() > 0.0, "nothing was put off");
}

/// Whoever pipes lines into it can stop it, and hears what is stored.
#[tokio::test]
async fn interrupted() {
    let chatd = fast().await;
    let (alice, bob) = two(&chatd).await;
    let mut sending = alice.start(&["send", "bob", "--json"]).await.unwrap();
    sending.stdin.as_mut().unwrap().write_all(b"one\n").await.unwrap();
    assert_eq!(seq(&sending.json().await.unwrap().unwrap()), 1);
    sending.signal(Signal::INT).unwrap();
    assert_eq!(sending.ended().await.unwrap(), Some(130));

    // Nobody reads what it prints, and the pipe is full: it is stopped all the same.
    let line = "head -c 65536 /dev/zero; exec $CHAT send bob two --json";
    let mut sending = Running::new(alice.shell(line).await.unwrap()).unwrap();
    let stored = async || ok(&bob, &["history", "alice", "--json"]).await.json().len() == 2;
    eventually("it is stored", PATIENCE, stored).await;
    sending.signal(Signal::TERM).unwrap();
    assert_eq!(sending.ended().await.unwrap(), Some(130));

    // Nor does the listener's reader, and what was not written comes again.
    let long = format!("{}\n", "x".repeat(2_000)).repeat(100);
    assert_eq!(alice.run_with(&["send", "bob"], long).await.unwrap().code, Some(0));
    let mut listening = bob.start(&["listen", "--json"]).await.unwrap();
    let mut last = seq(&listening.json().await.unwrap().unwrap());
    listening.signal(Signal::TERM).unwrap();
    assert_eq!(listening.ended().await.unwrap(), Some(0));
    while let Ok(Some(message)) = listening.json().await {
        last = seq(&message);
    }
    assert!(last < 101, "a pipe does not hold so much");
    let mut listening = bob.start(&["listen", "--json"]).await.unwrap();
    let next = seq(&listening.json().await.unwrap().unwrap());
    assert!(next <= last + 1, "{next} after {last}");
}

/// A bot that waits for a server's answer can be stopped all the same.
#[tokio::test]
async fn an_interrupted_bot() {
    let chatd = Chatd::start().await.unwrap();
    let carol = Person::new("carol", &chatd).unwrap();
    let server = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = format!("mqtt://{}", server.local_addr().unwrap());
    let mut bot = carol.start(&["bot", "echo", "--server", &address]).await.unwrap();
    // It takes the connection and the subscriptions, delivers a message, and is silent from then on.
    let message =
        r#"{"v":1,"kind":"text","conversation":"alice:carol","seq":1,"from":"alice","to":"carol","at":1,"text":"hi"}"#;
    let publish = Publish { packet_id: 1, ..Publish::new("chat/carol/inbox", message, 1) };
    let said = [&[0x20, 3, 0, 0, 0][..], &[0x90, 4, 0, 1, 0, 1], &packet::publish(Version::V5, &publish)].concat();
    let mut heard = Vec::new();
    // Where there is a terminal, it asks first whether a password is wanted.
    while !String::from_utf8_lossy(&heard).contains("chat/carol/read/alice") {
        let mut connection = server.accept().await.unwrap().0;
        connection.write_all(&said).await.unwrap();
        heard.clear();
        while connection.read_buf(&mut heard).await.unwrap() > 0 {
            if String::from_utf8_lossy(&heard).contains("chat/carol/read/alice") {
                bot.signal(Signal::INT).unwrap();
            }
        }
    }
    assert_eq!(bot.ended().await.unwrap(), Some(0));
}

/// `chat listen` is killed again and again while messages come.
#[tokio::test]
async fn a_killed_listener_loses_nothing() {
    const MESSAGES: u64 = 300;
    let mut dice = Dice::thrown("a_killed_listener_loses_nothing");
    let chatd = fast().await;
    let (alice, bob) = two(&chatd).await;
    // It has a place on the server from now on.
    ok(&alice, &["send", "bob", "1"]).await;
    ok(&bob, &["listen", "-n", "1"]).await;
    let sending = tokio::spawn(async move {
        // So long that a pipe does not hold many.
        let input: String = (2..=MESSAGES).map(|number| format!("{number:0>1500}\n")).collect();
        let done = alice.run_with(&["send", "bob"], input).await.unwrap();
        assert_eq!(done.code, Some(0), "{done:?}");
    });
    let (mut last, mut runs) = (1, 0);
    while last < MESSAGES {
        let mut listening = bob.start(&["listen", "--json"]).await.unwrap();
        runs += 1;
        let mut before = None;
        let (mut wanted, mut killed) = (1 + dice.below(40), false);
        // What it had written when it was killed is in the pipe.
        while let Ok(Some(line)) = listening.line().await {
            let Ok(message) = serde_json::from_str::<Value>(&line) else {
                assert!(killed, "{line}");
                break;
            };
            let seq = seq(&message);
            match before {
                None => assert!(seq <= last + 1, "{seq} after {last}"),
                Some(before) => assert_eq!(seq, before + 1, "none twice in a run"),
            }
            before = Some(seq);
            last = last.max(seq);
            wanted = wanted.saturating_sub(1);
            if (wanted == 0 || last == MESSAGES) && !killed {
                listening.signal(Signal::KILL).unwrap();
                killed = true;
            }
        }
    }
    sending.await.unwrap();
    assert!(runs >= 3, "{runs}");
}

/// The server is killed while one sends and the other listens: both go on by themselves.
#[tokio::test]
async fn a_killed_server_loses_nothing() {
    const MESSAGES: u64 = 400;
    let mut chatd = fast().await;
    let (alice, bob) = two(&chatd).await;
    let mut listening = bob.start(&["listen", "--json"]).await.unwrap();
    let mut sending = alice.start(&["send", "bob", "--json"]).await.unwrap();
    let mut stdin = sending.stdin.take().unwrap();
    let mut written = 0;
    for kill in [true, true, false] {
        let until = if kill { written + MESSAGES / 4 } else { MESSAGES };
        while written < until {
            written += 1;
            stdin.write_all(format!("{written}\n").as_bytes()).await.unwrap();
        }
        if kill {
            seq(&listening.json().await.unwrap().unwrap());
            chatd.kill9().await.unwrap();
            chatd.restart_on_same_ports().await.unwrap();
        }
    }
    drop(stdin);
    let mut stored = Vec::new();
    while let Some(line) = sending.json().await.unwrap() {
        stored.push(seq(&line));
    }
    assert_eq!(sending.ended().await.unwrap(), Some(0));
    assert_eq!(stored, (1..=MESSAGES).collect::<Vec<_>>(), "in the order of the lines, each once");
    // Two were read above.
    for number in 3..=MESSAGES {
        let message = listening.json().await.unwrap().unwrap();
        assert_eq!((seq(&message), message["text"].as_str().unwrap()), (number, number.to_string().as_str()));
    }
}

/// `chat listen | head -n 3`.
#[tokio::test]
async fn who_reads_may_go() {
    let chatd = fast().await;
    let (alice, bob) = two(&chatd).await;
    assert_eq!(alice.run_with(&["send", "bob"], lines(10)).await.unwrap().code, Some(0));
    let line = "{ $CHAT listen --json; echo $? > code; } | head -n 3; until [ -s code ]; do sleep 0.02; done";
    let mut reading = Running::new(bob.shell(line).await.unwrap()).unwrap();
    for number in 1..=3 {
        assert_eq!(seq(&reading.json().await.unwrap().unwrap()), number);
    }
    // It finds out when it writes the next time.
    let code = bob.home().join("code");
    let more = Cell::new(0);
    eventually("it ends", PATIENCE, || async {
        ok(&alice, &["send", "bob", "more"]).await;
        more.set(more.get() + 1);
        std::fs::read_to_string(&code).is_ok_and(|code| code.ends_with('\n'))
    })
    .await;
    assert_eq!(std::fs::read_to_string(&code).unwrap(), "0\n");
    assert_eq!(reading.ended().await.unwrap(), Some(0));
    ok(&alice, &["send", "bob", "last"]).await;
    let sent = 10 + more.get() + 1;
    // What it could not write comes now, and then the rest.
    let mut listening = bob.start(&["listen", "--json"]).await.unwrap();
    let first = seq(&listening.json().await.unwrap().unwrap());
    assert!(first > 3 && first < sent, "{first} of {sent}");
    for number in first + 1..=sent {
        assert_eq!(seq(&listening.json().await.unwrap().unwrap()), number);
    }

    // Other commands end as well.
    let line = "$CHAT history alice --all --json | head -n 1";
    let done = command::ended(bob.shell(line).await.unwrap()).await.unwrap();
    assert_eq!((done.code, done.err.as_str()), (Some(0), ""));
}

/// Nobody can read what it says: it does what it was asked to all the same.
#[tokio::test]
async fn who_hears_may_be_nobody() {
    let chatd = Chatd::start().await.unwrap();
    let (alice, _bob) = two(&chatd).await;
    for (line, code) in [
        ("printf '\\377\\nsent\\n' | $CHAT send bob 2>/dev/full", 1),
        ("$CHAT send Alice hi 2>/dev/full", 2),
        ("$CHAT whoami --profile gone 2>/dev/full", 2),
        ("$CHAT history bob >/dev/full", 1),
    ] {
        let done = command::ended(alice.shell(line).await.unwrap()).await.unwrap();
        assert_eq!(done.code, Some(code), "{line}: {done:?}");
    }
    assert_eq!(ok(&alice, &["history", "bob", "--json"]).await.json()[0]["text"], "sent");
}

/// What the library says may quote what a server said, and is no command to a terminal either.
#[tokio::test]
async fn the_log_is_harmless() {
    let chatd = Chatd::start().await.unwrap();
    let bob = Person::new("bob", &chatd).unwrap();
    let server = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = format!("mqtt://{}", server.local_addr().unwrap());
    let mut command = bob.chat(&["listen", "--server", &address, "-n", "1", "--json"]).await.unwrap();
    command.env("CHAT_LOG", "debug");
    let talking = async {
        let mut connection = server.accept().await.unwrap().0;
        let event = Publish::new("chat/bob/event/\u{1b}[2J\u{9b}31m\u{202e}", "", 0);
        let message =
            r#"{"v":1,"kind":"text","conversation":"alice:bob","seq":1,"from":"alice","to":"bob","at":1,"text":"hi"}"#;
        let message = Publish { packet_id: 1, ..Publish::new("chat/bob/inbox", message, 1) };
        let [event, message] = [event, message].map(|publish| packet::publish(Version::V5, &publish));
        let said = [&[0x20, 3, 0, 0, 0][..], &[0x90, 4, 0, 1, 0, 1], &event, &message].concat();
        connection.write_all(&said).await.unwrap();
        // Until it has said goodbye.
        while connection.read_buf(&mut Vec::new()).await.unwrap() > 0 {}
    };
    let (done, ()) = tokio::join!(command::ended(command), talking);
    let done = done.unwrap();
    assert!(done.code == Some(0) && done.err.contains("chat/bob/event/\\u{1b}[2J\\u{9b}31m\\u{202e}"), "{done:?}");
    assert!(!done.err.contains('\u{1b}'), "{done:?}");
}

#[tokio::test]
async fn history() {
    let chatd = fast().await;
    let (alice, bob) = two(&chatd).await;
    assert_eq!(alice.run_with(&["send", "bob"], lines(450)).await.unwrap().code, Some(0));
    let numbers = async |arguments: &[&str]| {
        let arguments: Vec<&str> =
            ["history", "alice", "--json"].into_iter().chain(arguments.iter().copied()).collect();
        ok(&bob, &arguments).await.numbers("seq")
    };
    let range = |from, to| (from..=to).collect::<Vec<u64>>();
    assert_eq!(numbers(&[]).await, range(401, 450));
    assert_eq!(numbers(&["--all"]).await, range(1, 450));
    assert_eq!(numbers(&["--all", "--before", "201"]).await, range(1, 200));
    assert_eq!(numbers(&["--limit", "230"]).await, range(221, 450));
    assert_eq!(numbers(&["--limit", "3", "--before", "10"]).await, range(7, 9));
    assert_eq!(numbers(&["--since", "1h"]).await, range(1, 450));
    assert_eq!(numbers(&["--since", "1h", "--limit", "2"]).await, range(449, 450));
    assert_eq!(numbers(&["--since", "2100-01-01"]).await, range(1, 0));

    // From some moment in between.
    let all = ok(&bob, &["history", "alice", "--json", "--all"]).await;
    let times = all.numbers("at");
    let middle = (200..450).find(|at| times[*at] > times[at - 1]).expect("they were not all stored in one millisecond");
    let at = times[middle];
    let date = programs::shell(&format!("date -u -d @{}.{:03} +%FT%T.%3NZ", at / 1_000, at % 1_000)).await.unwrap();
    let moment = String::from_utf8(date.stdout).unwrap();
    let since = u64::try_from(middle).unwrap() + 1;
    assert_eq!(numbers(&["--since", moment.trim()]).await, range(since, 450));
    assert_eq!(numbers(&["--since", moment.trim(), "--limit", "400"]).await, range(since, 450));

    ok(&alice, &["edit", "bob", "449", "other\nwords"]).await;
    ok(&alice, &["unsend", "bob", "448"]).await;
    ok(&bob, &["delete", "alice", "447"]).await;
    let shown = ok(&bob, &["history", "alice", "--limit", "4"]).await.out;
    let shown: Vec<&str> = shown.lines().collect();
    let times: Vec<&str> = shown.iter().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(times, ["#446", "#448", "#449", "", "#450"]);
    assert!(shown[1].ends_with(" alice: (taken back)"), "{shown:?}");
    assert!(shown[2].ends_with(" alice: other") && shown[3] == "    words (edited)", "{shown:?}");
}

#[tokio::test]
async fn what_else_can_be_asked() {
    let chatd = Chatd::start().await.unwrap();
    let (alice, bob) = two(&chatd).await;
    assert_eq!(alice.run_with(&["send", "bob"], "one\ntwo\u{9b}\n").await.unwrap().code, Some(0));
    let said = ok(&bob, &["conversations"]).await.out;
    assert!(said.starts_with("alice (2 unread)  ") && said.ends_with(" two\\u{9b}\n"), "{said}");
    let listed = ok(&bob, &["conversations", "--json"]).await;
    assert!(listed.out.contains("two\\u009b"), "{listed:?}");
    assert_eq!((listed.json()[0]["with"].as_str(), listed.numbers("unread")), (Some("alice"), vec![2]));
    ok(&bob, &["read", "alice", "1"]).await;
    assert_eq!(ok(&bob, &["conversations", "--json"]).await.numbers("my_read"), [1]);
    ok(&bob, &["read", "alice"]).await;
    assert_eq!(ok(&bob, &["conversations", "--json"]).await.numbers("unread"), [0]);
    assert_eq!(ok(&alice, &["conversations", "--json"]).await.numbers("read"), [2]);
    assert!(ok(&alice, &["conversations"]).await.out.contains("you: two"));

    assert!(ok(&bob, &["whoami"]).await.out.starts_with("bob at mqtt://127.0.0.1:"));
    assert_eq!(ok(&bob, &["whoami", "--json"]).await.json()[0]["user"], "bob");
    ok(&bob, &["block", "alice"]).await;
    assert_eq!(ok(&bob, &["blocked"]).await.out, "alice\n");
    assert_eq!(ok(&bob, &["blocked", "--json"]).await.json()[0]["user"], "alice");
    ok(&bob, &["unblock", "alice"]).await;
    assert_eq!(ok(&bob, &["blocked"]).await.out, "");
}

#[tokio::test]
async fn an_observer_sees_all() {
    let chatd = Chatd::start_with(Options::default().set("auth.observers", "eve")).await.unwrap();
    let (alice, bob) = two(&chatd).await;
    let eve = Person::new("eve", &chatd).unwrap();
    let archive = ["tail", "--observer", "--json", "--device", "archive"];
    let mut live = eve.start(&["tail", "--observer"]).await.unwrap();
    let mut kept = eve.start(&archive).await.unwrap();
    // Until both are there.
    eventually("both observe", PATIENCE, async || chatd.metric("chatd_connections").await.unwrap() >= 2.0).await;
    // What was sent before it observed is not its own.
    let number = loop {
        ok(&alice, &["send", "bob", "secret"]).await;
        if let Ok(first) = tokio::time::timeout(Duration::from_millis(300), kept.json()).await {
            break seq(&first.unwrap().unwrap());
        }
    };
    assert!(live.line().await.unwrap().unwrap().ends_with(" alice → bob: secret"));
    kept.signal(Signal::KILL).unwrap();
    kept.ended().await.unwrap();
    let done = bob.run_with(&["send", "alice"], "a\nb\n").await.unwrap();
    assert_eq!(done.code, Some(0), "{done:?}");
    let mut kept = eve.start(&archive).await.unwrap();
    let mut seen = Vec::new();
    while seen.last().is_none_or(|(text, _)| text != "b") {
        let message = kept.json().await.unwrap().unwrap();
        seen.push((message["text"].as_str().unwrap().to_owned(), seq(&message)));
    }
    let texts: Vec<&str> = seen.iter().rev().take(2).map(|(text, _)| text.as_str()).collect();
    assert_eq!(texts, ["b", "a"]);
    assert!(seen.windows(2).all(|two| two[0].1 + 1 == two[1].1) && seen[0].1 <= number + 1, "{seen:?} after {number}");
}

/// Every text gets one echo, however often the bot is killed.
#[tokio::test]
async fn an_echo_for_each() {
    const MESSAGES: usize = 60;
    let mut dice = Dice::thrown("an_echo_for_each");
    let chatd = fast().await;
    let (alice, carol) = (Person::new("alice", &chatd).unwrap(), Person::new("carol", &chatd).unwrap());
    let mut bot = carol.start(&["bot", "echo"]).await.unwrap();
    let mut sending = alice.start(&["send", "carol", "--json"]).await.unwrap();
    let mut stdin = sending.stdin.take().unwrap();
    for number in 1..=MESSAGES {
        stdin.write_all(format!("text {number}\n").as_bytes()).await.unwrap();
        seq(&sending.json().await.unwrap().unwrap());
        if dice.below(12) == 0 {
            bot.signal(Signal::KILL).unwrap();
            bot.ended().await.unwrap();
            bot = carol.start(&["bot", "echo"]).await.unwrap();
        }
    }
    drop(stdin);
    assert_eq!(sending.ended().await.unwrap(), Some(0));
    let entries = async || ok(&alice, &["history", "carol", "--all", "--json"]).await.json();
    eventually("all are answered", PATIENCE, async || entries().await.len() >= 2 * MESSAGES).await;
    // Two bots do not talk to each other for ever.
    ok(&alice, &["send", "carol", "mine", "--id", "echo-of-mine"]).await;
    bot.signal(Signal::INT).unwrap();
    assert_eq!(bot.ended().await.unwrap(), Some(0));
    let mut texts: Vec<String> = Vec::new();
    for entry in entries().await.iter().filter(|entry| entry["from"] == "carol") {
        texts.push(entry["text"].as_str().unwrap().to_owned());
    }
    texts.sort();
    let mut expected: Vec<String> = (1..=MESSAGES).map(|number| format!("text {number}")).collect();
    expected.sort();
    assert_eq!(texts, expected);
}

fn write(path: &Path, text: &str, mode: u32) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Over TLS and WebSocket over TLS, to a server that only an authority of the profile's vouches for, and with a certificate in place of a password.
#[tokio::test]
async fn over_tls() {
    let (files, strangers) = (Files::new().unwrap(), Files::new().unwrap());
    files.issue("alice", "alice").unwrap();
    let options = files.options().set("tls.client_ca", files.text("ca.pem")).set("auth.mode", "required");
    let chatd = Chatd::start_with(options).await.unwrap();
    let (mqtt, http) = (tls::port(&chatd, "mqtt").await, tls::port(&chatd, "http").await);
    let alice = Person::new("alice", &chatd).unwrap();
    let profile = |name: &str, server: String, ca: &Files| {
        format!(
            "[profiles.{name}]\nserver = \"{server}\"\nuser = \"alice\"\nca_file = \"{}\"\n\
             client_certificate = \"{}\"\nclient_key = \"{}\"\n",
            ca.text("ca.pem"),
            files.text("alice.pem"),
            files.text("alice.key")
        )
    };
    let file = [
        profile("tcp", format!("mqtts://localhost:{mqtt}"), &files),
        profile("web", format!("wss://localhost:{http}/mqtt"), &files),
        profile("stranger", format!("mqtts://localhost:{mqtt}"), &strangers),
    ];
    write(&alice.home().join(".config/chat/config.toml"), &file.concat(), 0o600);
    let run = async |arguments: &[&str]| {
        let mut command = alice.chat(arguments).await.unwrap();
        command.env_remove("CHAT_SERVER").env_remove("CHAT_USER");
        command::ended(command).await.unwrap()
    };
    for (seq, over) in [(1, "tcp"), (2, "web")] {
        let done = run(&["send", "bob", "in secret", "--json", "--profile", over]).await;
        assert_eq!((done.code, done.numbers("seq")), (Some(0), vec![seq]), "{over}: {done:?}");
    }
    let done = run(&["send", "bob", "hello", "--timeout", "10", "--profile", "stranger"]).await;
    assert_eq!(done.code, Some(3), "{done:?}");
    assert!(done.err.contains("certificate"), "{done:?}");
    let done = run(&["history", "bob", "--json", "--profile", "web"]).await;
    assert_eq!(done.numbers("seq"), [1, 2], "nothing was said to a server that nobody vouches for: {done:?}");
}

#[tokio::test]
async fn settings_from_all_sides() {
    let (_folder, users) = auth::users().await;
    let key = users.with_file_name("key");
    write(&key, auth::SECRET, 0o600);
    let options = auth::required().set("auth.password_file", users.display()).set("auth.jwt_key_file", key.display());
    let chatd = Chatd::start_with(options).await.unwrap();
    let alice = Person::new("alice", &chatd).unwrap();
    let config = alice.home().join(".config/chat/config.toml");
    let server = format!("mqtt://{}", chatd.mqtt_addr());
    let file = format!(
        "default_profile = \"me\"\n\
         [profiles.me]\nserver = \"{server}\"\nuser = \"alice\"\npassword = \"alice-pw\"\n\
         [profiles.bob]\nserver = \"{server}\"\nuser = \"bob\"\npassword_command = \"echo bob-pw; echo more\"\n\
         [profiles.token]\nserver = \"{server}\"\nuser = \"alice\"\ntoken_command = \"cat token\"\n"
    );
    write(&config, &file, 0o600);
    let run = async |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut command = alice.chat(arguments).await.unwrap();
        command.env_remove("CHAT_SERVER").env_remove("CHAT_USER").envs(environment.iter().copied());
        command::ended(command).await.unwrap()
    };
    let done = run(&["whoami"], &[]).await;
    assert!(done.out.starts_with("alice at ") && done.err.is_empty(), "{done:?}");
    assert!(run(&["whoami", "--profile", "bob"], &[]).await.out.starts_with("bob at "));
    assert!(run(&["whoami"], &[("CHAT_PROFILE", "bob")]).await.out.starts_with("bob at "));
    let done = run(&["whoami", "--user", "bob"], &[("CHAT_PASSWORD", "bob-pw"), ("CHAT_USER", "alice")]).await;
    assert!(done.out.starts_with("bob at "), "{done:?}");
    // Alice's password is not tried for bob.
    assert_eq!(run(&["whoami", "--user", "bob"], &[]).await.code, Some(4));

    let until = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 600;
    let token = jsonwebtoken::encode(
        &jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256),
        &serde_json::json!({ "sub": "alice", "exp": until }),
        &jsonwebtoken::EncodingKey::from_secret(auth::SECRET.as_bytes()),
    )
    .unwrap();
    write(&alice.home().join("token"), &token, 0o600);
    let done = run(&["whoami", "--profile", "token"], &[]).await;
    assert!(done.out.starts_with("alice at "), "{done:?}");
    let done =
        run(&["whoami", "--server", &server, "--user", "alice", "--profile", "bob"], &[("CHAT_TOKEN", &token)]).await;
    assert!(done.out.starts_with("alice at "), "{done:?}");

    write(&config, &file, 0o644);
    let done = run(&["whoami"], &[]).await;
    assert!(done.code == Some(0) && done.err.contains("chmod 600"), "{done:?}");
    let other = alice.home().join("other.toml");
    write(&other, "[profiles.me]\nuser = \"alice\"\npasswort = \"alice-pw\"\n", 0o600);
    let done = run(&["whoami", "--config", other.to_str().unwrap()], &[]).await;
    assert!(
        done.code == Some(2) && done.err.contains("other.toml, line 3") && done.err.contains("passwort"),
        "{done:?}"
    );
    assert!(!done.err.contains("alice-pw"), "{done:?}");
    // A certificate that is none.
    let pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    write(&alice.home().join("ca.pem"), pem, 0o600);
    let file = "default_profile = \"me\"\n[profiles.me]\nserver = \"mqtts://localhost:1\"\nuser = \"alice\"\nca_file = \"ca.pem\"\n";
    write(&other, file, 0o600);
    let done = run(&["whoami", "--config", other.to_str().unwrap()], &[]).await;
    assert!(done.code == Some(2) && done.err.contains("TLS"), "{done:?}");
}

/// Nobody gave a password, the server wants one, and somebody sits at the terminal.
#[tokio::test]
async fn a_password_is_asked_for() {
    let (_folder, users) = auth::users().await;
    let chatd = Chatd::start_with(auth::required().set("auth.password_file", users.display())).await.unwrap();
    let alice = Person::new("alice", &chatd).unwrap();
    for (typed, code, last) in [("alice-pw\r", 0, "alice at"), ("wrong\r", 4, "login"), ("\u{3}", 130, "nobody gave")] {
        // A terminal of its own.
        let mut command = alice.program("script");
        let chat = alice.chat(&["whoami"]).await.unwrap();
        let line = format!("{} whoami", chat.as_std().get_program().display());
        command.args(["-qe", "-c", &line, "/dev/null"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut shown = Vec::new();
        let mut is_asked = false;
        let reading = async {
            while stdout.read_buf(&mut shown).await.unwrap() > 0 {
                let text = String::from_utf8_lossy(&shown);
                if text.contains("Password of alice at mqtt://") && text.ends_with(": ") && !is_asked {
                    is_asked = true;
                    stdin.write_all(typed.as_bytes()).await.unwrap();
                }
            }
        };
        tokio::time::timeout(PATIENCE, reading).await.expect("it ends in time");
        let shown = String::from_utf8_lossy(&shown).into_owned();
        let ended = child.wait().await.unwrap().code();
        assert_eq!((ended, is_asked), (Some(code), true), "{shown}");
        assert!(shown.contains(last) && !shown.contains(typed.trim()), "{shown}");
    }
}

/// Everything at once, shown to nobody; nothing of it is left.
#[tokio::test]
async fn the_demo() {
    let chatd = Chatd::start().await.unwrap();
    let alice = Person::new("alice", &chatd).unwrap();
    let temporary = alice.home().join("temporary");
    std::fs::create_dir(&temporary).unwrap();
    let mut demo = alice.program(concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/demo"));
    let chatd_binary = end_to_end::chatd::command().await.unwrap();
    let chat_binary = alice.chat(&[]).await.unwrap();
    demo.arg("--check")
        .env("CHATD_BIN", chatd_binary.as_std().get_program())
        .env("CHAT_BIN", chat_binary.as_std().get_program())
        .env("TMPDIR", &temporary);
    // It starts six programs.
    let output = tokio::time::timeout(3 * PATIENCE, demo.output()).await.expect("it ends in time").unwrap();
    let done = Done::from(output);
    assert!(done.code == Some(0) && done.err.ends_with("both are there\n"), "{done:?}");
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0);
}

#[tokio::test]
async fn completions_and_manual() {
    let chatd = Chatd::start().await.unwrap();
    let alice = Person::new("alice", &chatd).unwrap();
    for (shell, part) in [("bash", "complete -F"), ("zsh", "#compdef chat"), ("fish", "complete -c chat")] {
        let script = ok(&alice, &["completions", shell]).await.out;
        assert!(script.contains(part) && script.contains("conversations"), "{shell}: {script}");
    }
    let script = ok(&alice, &["completions", "bash"]).await.out;
    write(&alice.home().join("completions"), &script, 0o600);
    let line = ". ./completions; COMP_WORDS=(chat hi); COMP_CWORD=1; _chat chat hi chat; echo \"${COMPREPLY[@]}\"";
    let mut bash = alice.program("bash");
    bash.args(["-c", line]);
    assert_eq!(command::ended(bash).await.unwrap().out, "history\n");

    let page = ok(&alice, &["man"]).await.out;
    assert!(page.contains(".TH chat 1") && page.contains("Exit codes"), "{page}");
    ok(&alice, &["man", "--dir", "pages/man1"]).await;
    let pages = alice.home().join("pages/man1");
    for (name, part) in [("chat.1", "listen"), ("chat-send.1", "standard input"), ("chat-bot-echo.1", "echo")] {
        let page = std::fs::read_to_string(pages.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(page.contains(part), "{name}: {page}");
    }
}
