//! Who may come in, with what, and until when.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use end_to_end::packet::{self, Packet, Properties, Publish, Value as Property, Version, id};
use end_to_end::programs::{self, Subscriber};
use end_to_end::{Chatd, Client, Connect, Options, PATIENCE, chatd, eventually};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// `chatd passwd …` with something on its standard input; its exit code and what it said.
pub(crate) async fn passwd(arguments: &[&str], file: &Path, input: &str) -> (Option<i32>, String) {
    let mut command = chatd::command().await.unwrap();
    let command = command.arg("passwd").args(arguments).arg("--file").arg(file);
    let command = command.stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    // It may have ended without reading: then its exit code says why.
    drop(child.stdin.take().unwrap().write_all(input.as_bytes()).await);
    let output = child.wait_with_output().await.unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A folder with users alice, bob, and eve, who observes; each with their name and `-pw` as password.
async fn users() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("users");
    for (name, role) in [("alice", None), ("bob", None), ("eve", Some("observer"))] {
        let mut arguments = vec!["add", name];
        arguments.extend(role.into_iter().flat_map(|role| ["--role", role]));
        let (code, said) = passwd(&arguments, &file, &format!("{name}-pw\n")).await;
        assert_eq!(code, Some(0), "{said}");
    }
    (folder, file)
}

fn required() -> Options {
    Options::default().set("auth.mode", "required")
}

/// The code of the CONNACK.
async fn refused(chatd: &Chatd, connect: Connect) -> (u8, Properties) {
    let mut client = connect.open(chatd).await.unwrap();
    match client.receive().await.unwrap() {
        Some(Packet::Connack { code, properties, .. }) if code != 0 => {
            assert_eq!(client.until_closed().await.unwrap(), [], "a refused CONNECT is the end");
            (code, properties)
        }
        other => panic!("{connect:?}: {other:?}"),
    }
}

fn alice(version: Version) -> Connect {
    Connect::new(version, "alice", "phone")
}

#[tokio::test]
async fn a_password_lets_its_user_in_and_nobody_else() {
    let (_folder, file) = users().await;
    let chatd = Chatd::start_with(required().set("auth.password_file", file.display())).await.unwrap();
    eventually("it says how", PATIENCE, async || chatd.greeting().contains("authentication is required")).await;
    for (version, wrong) in [(Version::V4, 4), (Version::V5, 0x86)] {
        let mut client = alice(version).password("alice-pw").to(&chatd).await.unwrap();
        assert_eq!(client.say("alice", "bob", "hello").await.unwrap().code, 0x10 * u8::from(version == Version::V5));
        client.leave().await.unwrap();
        let unnamed = Connect { user_name: None, ..alice(version) };
        for connect in [
            alice(version),
            alice(version).password(""),
            alice(version).password("bob-pw"),
            alice(version).password([0xff, 0]),
            Connect::new(version, "nobody", "phone").password("alice-pw"),
            Connect::new(version, "Alice+#", "phone").password("alice-pw"),
            Connect::new(version, "", "alice").password("alice-pw"),
            unnamed,
        ] {
            let (code, properties) = refused(&chatd, connect.clone()).await;
            assert_eq!(code, wrong, "{connect:?}");
            assert!(!properties.reason().is_some_and(|reason| reason.contains("alice")), "{properties:?}");
        }
    }
}

#[tokio::test]
async fn programs_log_in_with_a_password() {
    let (_folder, file) = users().await;
    let chatd = Chatd::start_with(required().set("auth.password_file", file.display())).await.unwrap();
    let bob = ["-u", "bob", "-P", "bob-pw", "-i", "phone", "-q", "1", "-t", "chat/bob/inbox", "-d"];
    let mut bob = Subscriber::mosquitto(&chatd, &bob).unwrap();
    bob.subscribed().await.unwrap();
    let alice = ["-u", "alice", "-P", "alice-pw", "-q", "1", "-t", "chat/alice/out/bob", "-m", "hello"];
    programs::mosquitto_pub(&chatd, &alice).await.unwrap();
    assert!(bob.line().await.unwrap().contains("hello"));
}

#[tokio::test]
async fn roles_and_users_come_from_the_file_and_are_read_again() {
    let (_folder, file) = users().await;
    let chatd = Chatd::start_with(required().set("auth.password_file", file.display())).await.unwrap();
    let mut eve = Connect::v5("eve", "tail").password("eve-pw").to(&chatd).await.unwrap();
    eve.subscribe("chat/+/inbox", 1).await.unwrap();
    let mut alice = alice(Version::V5).password("alice-pw").to(&chatd).await.unwrap();
    assert_eq!(alice.subscribe_codes(&[("chat/+/inbox", 1)]).await.unwrap().0, [0x87]);
    alice.say("alice", "bob", "hello").await.unwrap();
    assert_eq!(eve.acked_message().await.unwrap().topic, "chat/bob/inbox");

    // Whoever is not on file cannot be written to.
    let ack = alice.say("alice", "carol", "hello").await.unwrap();
    assert_eq!(ack.code, 0x90);
    let (code, said) = passwd(&["add", "carol"], &file, "carol-pw").await;
    assert_eq!(code, Some(0), "{said}");
    chatd.signal_hangup().unwrap();
    eventually("it is read", PATIENCE, async || chatd.log().unwrap().contains("read the users")).await;
    assert_eq!(alice.say("alice", "carol", "hello").await.unwrap().code, 0x10);
    let mut carol = Connect::v4("carol", "phone").password("carol-pw").to(&chatd).await.unwrap();
    carol.subscribe("chat/carol/inbox", 1).await.unwrap();
    assert_eq!(carol.acked_message().await.unwrap().json()["text"], "hello");

    // A file that is wrong changes nothing.
    let right = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{right}mallory:secret\n")).unwrap();
    chatd.signal_hangup().unwrap();
    eventually("it is told", PATIENCE, async || chatd.log().unwrap().contains("line 5")).await;
    Connect::v5("alice", "laptop").password("alice-pw").to(&chatd).await.unwrap();
}

#[tokio::test]
async fn passwd_adds_checks_and_removes() {
    let (_folder, file) = users().await;
    assert_eq!(passwd(&["check", "bob"], &file, "bob-pw\n").await.0, Some(0));
    assert_eq!(passwd(&["check", "bob"], &file, "alice-pw\n").await.0, Some(1));
    assert_eq!(passwd(&["check", "nobody"], &file, "x").await.0, Some(1));
    assert_eq!(passwd(&["add", "bob"], &file, "").await.0, Some(1));
    assert_eq!(passwd(&["add", "Bob"], &file, "x").await.0, Some(2));
    assert_eq!(passwd(&["add", "bob", "--role", "king"], &file, "x").await.0, Some(2));
    assert_eq!(passwd(&["add", "bob"], &file, "new\r\n").await.0, Some(0));
    assert_eq!(passwd(&["check", "bob"], &file, "new").await.0, Some(0));
    assert_eq!(passwd(&["remove", "bob"], &file, "").await.0, Some(0));
    assert_eq!(passwd(&["remove", "bob"], &file, "").await.0, Some(1));
    assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 2);
}

/// Whoever guesses waits; whoever knows their password does not, even while others guess as fast as they can.
#[tokio::test]
async fn guessing_costs_the_guesser_only() {
    let (_folder, file) = users().await;
    let chatd = Chatd::start_with(required().set("auth.password_file", file.display())).await.unwrap();
    let guess = |nth: usize| {
        let connect = alice(Version::V5).password(format!("guess {nth}"));
        let chatd = &chatd;
        async move { refused(chatd, connect).await.0 }
    };
    let began = Instant::now();
    let guesses = futures_util::future::join_all((0..10).map(guess));
    let bob = async {
        let began = Instant::now();
        Connect::v5("bob", "phone").password("bob-pw").to(&chatd).await.unwrap();
        began.elapsed()
    };
    let (codes, bob_took) = futures_util::future::join(guesses, bob).await;
    assert_eq!(codes, [0x86; 10]);
    assert!(began.elapsed() >= Duration::from_secs(1), "a failed login is answered late");
    assert!(bob_took < PATIENCE, "{bob_took:?}");
    // Now nothing is looked at, not even the right password.
    let began = Instant::now();
    let (code, properties) = refused(&chatd, alice(Version::V5).password("alice-pw")).await;
    assert_eq!(code, 0x9f, "{properties:?}");
    assert!(properties.reason().unwrap().contains("try again in"), "{properties:?}");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    Connect::v5("bob", "laptop").password("bob-pw").to(&chatd).await.unwrap();
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn token(members: Value) -> String {
    encode(&Header::new(Algorithm::HS256), &members, &EncodingKey::from_secret(SECRET.as_bytes())).unwrap()
}

async fn taking_tokens() -> (TempDir, Chatd) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    std::fs::write(&file, format!("{SECRET}\n")).unwrap();
    let chatd = Chatd::start_with(required().set("auth.jwt_key_file", file.display())).await.unwrap();
    (folder, chatd)
}

#[tokio::test]
async fn a_token_lets_its_subject_in() {
    let (_folder, chatd) = taking_tokens().await;
    let right = token(json!({"sub": "alice", "exp": now_s() + 600, "roles": ["observer"]}));
    let unnamed = Connect { user_name: Some(String::new()), ..alice(Version::V5) };
    for connect in [alice(Version::V4), alice(Version::V5).over_web_socket(), unnamed] {
        let mut client = connect.password(right.clone()).to(&chatd).await.unwrap();
        client.say("alice", "bob", "hello").await.unwrap();
        client.subscribe("chat/#", 1).await.unwrap();
        client.leave().await.unwrap();
    }
    for wrong in [
        token(json!({"sub": "bob", "exp": now_s() + 600})),
        token(json!({"sub": "alice", "exp": now_s() - 600})),
        token(json!({"sub": "alice"})),
        format!("{}x", token(json!({"sub": "alice", "exp": now_s() + 600}))),
        "alice-pw".to_owned(),
    ] {
        assert_eq!(refused(&chatd, alice(Version::V5).password(wrong.clone())).await.0, 0x86, "{wrong}");
    }
}

/// Waits for a DISCONNECT; its code.
async fn disconnected(client: &mut Client) -> u8 {
    let packets = client.until_closed().await.unwrap();
    match packets.last() {
        Some(Packet::Disconnect { code, .. }) => *code,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_connection_ends_with_its_token_unless_it_is_renewed() {
    let (_folder, chatd) = taking_tokens().await;
    // Clocks may differ by 5 s, so this one has a second left.
    let short = || token(json!({"sub": "alice", "exp": now_s() - 4}));
    let mut client = alice(Version::V5).password(short()).to(&chatd).await.unwrap();
    assert_eq!(disconnected(&mut client).await, 0x87);

    let with = |method: &str, data: String| {
        let properties = Properties::none().with(id::AUTHENTICATION_METHOD, Property::Text(method.to_owned()));
        let properties = properties.with(id::AUTHENTICATION_DATA, Property::Binary(data.into_bytes()));
        Connect { user_name: None, properties, ..alice(Version::V5) }
    };
    assert_eq!(refused(&chatd, with("SCRAM-SHA-1", short())).await.0, 0x8c);
    assert_eq!(refused(&chatd, with("JWT", "x".to_owned())).await.0, 0x86);
    let mut client = with("JWT", token(json!({"sub": "alice", "exp": now_s() - 2}))).to(&chatd).await.unwrap();
    let told = client.connack_properties().get(id::AUTHENTICATION_METHOD).cloned();
    assert_eq!(told, Some(Property::Text("JWT".to_owned())));
    let longer = token(json!({"sub": "alice", "exp": now_s() + 600}));
    client.send_bytes(&packet::authenticate_again("JWT", longer.as_bytes())).await.unwrap();
    assert!(matches!(client.receive().await.unwrap(), Some(Packet::Auth { code: 0, .. })));
    let until = Instant::now() + Duration::from_secs(4);
    // Past the first token's end it still publishes.
    eventually("the first token's time is over", PATIENCE, async || Instant::now() > until).await;
    assert_eq!(client.say("alice", "bob", "still here").await.unwrap().code, 0x10);

    // Nobody becomes somebody else.
    let other = token(json!({"sub": "bob", "exp": now_s() + 600}));
    client.send_bytes(&packet::authenticate_again("JWT", other.as_bytes())).await.unwrap();
    assert_eq!(disconnected(&mut client).await, 0x87);
    let mut plain = alice(Version::V5).password(longer.clone()).to(&chatd).await.unwrap();
    plain.send_bytes(&packet::authenticate_again("JWT", longer.as_bytes())).await.unwrap();
    assert_eq!(disconnected(&mut plain).await, 0x82, "no method was agreed on");
}

#[tokio::test]
async fn a_bridge_writes_for_others() {
    let (_folder, chatd) = taking_tokens().await;
    let bridge = token(json!({"sub": "matrix", "exp": now_s() + 600, "roles": "bridge"}));
    let mut bridge = Connect::v5("matrix", "1").password(bridge).to(&chatd).await.unwrap();
    assert_eq!(bridge.say("alice", "bob", "from elsewhere").await.unwrap().code, 0x10);
    let ask = Publish::new("chat/alice/req/history", r#"{"with":"bob"}"#, 1);
    assert_eq!(bridge.publish(ask).await.unwrap().code, 0x87);
    let mut bob = Connect::v5("bob", "1").password(token(json!({"sub": "bob", "exp": now_s() + 600})));
    bob.user_name = Some(String::new());
    let mut bob = bob.to(&chatd).await.unwrap();
    assert_eq!(bob.say("alice", "carol", "not me").await.unwrap().code, 0x87);
    bob.subscribe("chat/bob/inbox", 1).await.unwrap();
    assert_eq!(bob.acked_message().await.unwrap().json()["from"], "alice");
}

#[tokio::test]
async fn topics_outside_chat_are_closed() {
    let (_folder, chatd) = taking_tokens().await;
    let token = token(json!({"sub": "alice", "exp": now_s() + 600}));
    let mut client = alice(Version::V5).password(token.clone()).to(&chatd).await.unwrap();
    for filter in ["#", "+/+", "home/lamp", "$SYS/#"] {
        assert_eq!(client.subscribe_codes(&[(filter, 1)]).await.unwrap().0, [0x87], "{filter}");
    }
    assert_eq!(client.publish(Publish::new("home/lamp", "on", 1)).await.unwrap().code, 0x87);
    let will = packet::Will { topic: "home/lamp".to_owned(), ..packet::Will::default() };
    assert_eq!(refused(&chatd, alice(Version::V5).password(token).will(will)).await.0, 0x87);
}
