//! Who may come in, with what, and until when.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use end_to_end::packet::{self, Packet, Properties, Publish, Value as Property, Version, id};
use end_to_end::programs::{self, Subscriber};
use end_to_end::{Chatd, Client, Connect, Options, PATIENCE, chatd, eventually};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

pub(crate) const SECRET: &str = "0123456789abcdef0123456789abcdef";

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
pub(crate) async fn users() -> (TempDir, PathBuf) {
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

pub(crate) fn required() -> Options {
    Options::default().set("auth.mode", "required")
}

/// The code of the CONNACK.
pub(crate) async fn refused(chatd: &Chatd, connect: Connect) -> (u8, Properties) {
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

/// Whoever types a password takes their time; what is done meanwhile stays.
#[tokio::test]
async fn passwd_add_undoes_nothing_that_was_done_while_it_asked() {
    let (_folder, file) = users().await;
    let mut command = chatd::command().await.unwrap();
    let command = command.args(["passwd", "add", "carol", "--file"]).arg(&file);
    let command = command.stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut asking = command.spawn().unwrap();
    let stat = format!("/proc/{}/stat", asking.id().unwrap());
    // It sleeps when it waits for the password. Where that cannot be seen there is less to see here.
    let waits = async || std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") S "));
    if cfg!(target_os = "linux") {
        eventually("it waits for the password", PATIENCE, waits).await;
    }
    assert_eq!(passwd(&["remove", "bob"], &file, "").await.0, Some(0));
    asking.stdin.take().unwrap().write_all(b"carol-pw\n").await.unwrap();
    assert!(asking.wait_with_output().await.unwrap().status.success());
    let users = std::fs::read_to_string(&file).unwrap();
    assert!(users.contains("carol:") && !users.contains("bob:"), "{users}");
}

#[tokio::test]
async fn passwd_keeps_rights_and_links_and_says_what_is_wrong() {
    let (folder, file) = users().await;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let chatd = chatd::command().await.unwrap().as_std().get_program().to_owned();
    let run = async |line: &str| {
        let mut shell = tokio::process::Command::new("sh");
        shell.args(["-c", line]).arg(&chatd).arg(&link).current_dir(folder.path()).output().await.unwrap()
    };
    let output = run("umask 077; exec \"$0\" passwd remove bob --file \"$1\"").await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 2);
    // Without --file the settings name the file: what is wrong with them is told.
    let output = run("CHATD__LIMITS__WINDOW=x exec \"$0\" passwd remove eve").await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("limits.window"), "{output:?}");
    let output = run("CHATD__LIMITS__WINDOW=x exec \"$0\" passwd remove eve --file \"$1\"").await;
    assert!(output.status.success(), "{output:?}");
}

/// Whoever guesses waits; whoever knows their password does not, even while others guess as fast as they can.
#[tokio::test]
async fn guessing_costs_the_guesser_only() {
    let (_folder, file) = users().await;
    let options = required().set("auth.password_file", file.display()).set("limits.uncounted_addresses", "10.0.0.0/8");
    let chatd = Chatd::start_with(options).await.unwrap();
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

/// Behind a proxy everybody has its address: whoever guesses there makes others slow, and locks nobody out.
#[tokio::test]
async fn guesses_from_a_shared_address_lock_nobody_out() {
    let (_folder, file) = users().await;
    let chatd = Chatd::start_with(required().set("auth.password_file", file.display())).await.unwrap();
    let guess = |nth: usize| {
        let connect = alice(Version::V5).password(format!("guess {nth}"));
        let chatd = &chatd;
        async move { refused(chatd, connect).await.0 }
    };
    assert_eq!(futures_util::future::join_all((0..10).map(guess)).await, [0x86; 10]);
    let began = Instant::now();
    assert_eq!(futures_util::future::join_all((0..3).map(guess)).await, [0x86; 3]);
    assert!(began.elapsed() >= Duration::from_secs(3), "one after the other: {:?}", began.elapsed());
    alice(Version::V5).password("alice-pw").to(&chatd).await.unwrap();
}

/// Names cost nothing to make up: those who come from one address do not fill the room for others.
#[tokio::test]
async fn a_crowd_of_names_from_one_address_leaves_room_for_others() {
    let (_folder, file) = users().await;
    let options = required().set("auth.password_file", file.display()).set("limits.uncounted_addresses", "127.0.0.1");
    let chatd = Arc::new(Chatd::start_with(options).await.unwrap());
    let turned_away = Arc::new(AtomicUsize::new(0));
    let mut crowd = JoinSet::new();
    for nth in 0..100 {
        let (chatd, turned_away) = (Arc::clone(&chatd), Arc::clone(&turned_away));
        crowd.spawn(async move {
            for name in 0.. {
                let connect = Connect::v4(&format!("n-{nth}-{name}"), "phone").password("guess");
                let packets = connect.open(&chatd).await.unwrap().until_closed().await.unwrap();
                // 3: the server is unavailable.
                if matches!(packets.first(), Some(Packet::Connack { code: 3, .. })) {
                    turned_away.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    eventually("they have all the room that they get", PATIENCE, async || turned_away.load(Ordering::Relaxed) > 0)
        .await;
    for nth in 0..5 {
        let before = turned_away.load(Ordering::Relaxed);
        let connect = Connect::v5("alice", &format!("phone-{nth}")).password("alice-pw").coming_from("127.0.0.2");
        connect.to(&chatd).await.unwrap();
        let still = async || turned_away.load(Ordering::Relaxed) > before;
        eventually("the crowd is still there", PATIENCE, still).await;
    }
    crowd.shutdown().await;
}

/// Whoever guesses at many users, a little at each, is stopped as well: by the address, with passwords and tokens together.
#[tokio::test]
async fn a_hundred_failures_lock_an_address() {
    const GUESSES: usize = 100;
    let (folder, file) = users().await;
    let key = folder.path().join("key");
    std::fs::write(&key, SECRET).unwrap();
    // Those of loopback do not count at first.
    let options = required()
        .set("auth.password_file", file.display())
        .set("auth.jwt_key_file", key.display())
        .set("limits.uncounted_addresses", "192.0.2.1");
    let chatd = Chatd::start_with(options).await.unwrap();
    let guess = |nth: usize| {
        let claims = json!({"sub": format!("user-{nth}"), "exp": now_s() + 600});
        let forged = encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(&[b'x'; 32])).unwrap();
        let connect = Connect::v5(&format!("user-{nth}"), "phone").password(forged).coming_from("127.0.0.2");
        let chatd = &chatd;
        async move { refused(chatd, connect).await.0 }
    };
    let bob = |from: &str| Connect::v5("bob", "phone").password("bob-pw").coming_from(from);
    let codes = futures_util::future::join_all((1..GUESSES).map(guess)).await;
    assert_eq!(codes, [0x86; GUESSES - 1]);
    // One less is not too many; and a right password forgives nothing of it.
    bob("127.0.0.2").to(&chatd).await.unwrap().leave().await.unwrap();
    let (code, _) = refused(&chatd, alice(Version::V5).password("guess").coming_from("127.0.0.2")).await;
    assert_eq!(code, 0x86);
    let token = token(json!({"sub": "alice", "exp": now_s() + 600}));
    for right in [bob("127.0.0.2"), alice(Version::V5).password(token).coming_from("127.0.0.2")] {
        let (code, properties) = refused(&chatd, right).await;
        assert_eq!(code, 0x9f);
        assert!(properties.reason().unwrap().contains("try again in"), "{properties:?}");
    }
    bob("127.0.0.3").to(&chatd).await.unwrap();
}

pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

pub(crate) fn token(members: Value) -> String {
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
pub(crate) async fn disconnected(client: &mut Client) -> u8 {
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

/// What MQTT 5 forbids in extended authentication [3.1.2.11.10, 3.15.2.1].
#[tokio::test]
async fn authentication_out_of_place_is_a_protocol_error() {
    let (_folder, chatd) = taking_tokens().await;
    let token = token(json!({"sub": "alice", "exp": now_s() + 600}));
    let data = Property::Binary(token.clone().into_bytes());
    let without_method = alice(Version::V5).password(token.clone()).with(id::AUTHENTICATION_DATA, data.clone());
    assert_eq!(refused(&chatd, without_method).await.0, 0x82);
    let method = || alice(Version::V5).with(id::AUTHENTICATION_METHOD, Property::Text("JWT".to_owned()));
    let connect = Connect { user_name: None, ..method().with(id::AUTHENTICATION_DATA, data.clone()) };
    for reason in [0x00, 0x18] {
        let mut client = connect.to(&chatd).await.unwrap();
        let mut again = packet::authenticate_again("JWT", b"x");
        assert_eq!(again[2], 0x19);
        again[2] = reason;
        client.send_bytes(&again).await.unwrap();
        assert_eq!(disconnected(&mut client).await, 0x82, "{reason:#x}");
    }
    let anothers = Connect { user_name: Some("bob".to_owned()), ..method().with(id::AUTHENTICATION_DATA, data) };
    assert_eq!(refused(&chatd, anothers).await.0, 0x86, "the token is alice's");
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

/// Where the server knows all its users, others are nobody: not to write to, not to ask about.
#[tokio::test]
async fn names_that_are_not_on_file_are_refused_everywhere() {
    let (_folder, file) = users().await;
    let chatd = Chatd::start_with(required().set("auth.password_file", file.display())).await.unwrap();
    let mut alice = alice(Version::V5).password("alice-pw").to(&chatd).await.unwrap();
    alice.subscribe("chat/alice/res", 1).await.unwrap();
    for (topic, payload) in
        [("out/nobody", "hello"), ("out/nobody/m-1", "hello"), ("read/nobody", "1"), ("typing/nobody", "on")]
    {
        let ack = alice.publish(Publish::new(format!("chat/alice/{topic}"), payload, 1)).await.unwrap();
        assert_eq!(ack.code, 0x90, "{topic}");
        assert!(ack.reason.as_deref().unwrap().starts_with("unknown_user: "), "{ack:?}");
    }
    let mut ask = async |method: &str, with: &str| {
        let more = match method {
            "delete" | "unsend" => json!({"with": with, "seq": 1}),
            "edit" => json!({"with": with, "seq": 1, "text": "x"}),
            _ => json!({"with": with}),
        };
        let publish = Publish::new(format!("chat/alice/req/{method}"), more.to_string(), 1);
        assert!(alice.publish(publish).await.unwrap().code < 0x80);
        alice.acked_message_on("chat/alice/res").await.unwrap().json()
    };
    for method in ["history", "block", "unblock", "delete", "unsend", "edit"] {
        assert_eq!(ask(method, "nobody").await["error"]["code"], "unknown_user", "{method}");
        assert_ne!(ask(method, "bob").await["error"]["code"], "unknown_user", "{method}");
    }
    // With tokens beside the file nobody knows all users.
    let key = file.with_file_name("key");
    std::fs::write(&key, SECRET).unwrap();
    let options = required().set("auth.password_file", file.display()).set("auth.jwt_key_file", key.display());
    let chatd = Chatd::start_with(options).await.unwrap();
    let mut alice = self::alice(Version::V5).password("alice-pw").to(&chatd).await.unwrap();
    assert_eq!(alice.say("alice", "nobody", "hello").await.unwrap().code, 0x10);
}

#[tokio::test]
async fn another_password_ends_the_sessions_of_the_old_one() {
    let (_folder, file) = users().await;
    let chatd = Chatd::start_with(required().set("auth.password_file", file.display())).await.unwrap();
    let mut alice = alice(Version::V5).password("alice-pw").to(&chatd).await.unwrap();
    let mut bob = Connect::v4("bob", "phone").password("bob-pw").to(&chatd).await.unwrap();
    let mut eve = Connect::v5("eve", "tail").password("eve-pw").to(&chatd).await.unwrap();
    assert_eq!(alice.say("alice", "bob", "before").await.unwrap().code, 0);
    eve.subscribe("chat/+/inbox", 1).await.unwrap();
    assert_eq!(passwd(&["add", "alice"], &file, "new").await.0, Some(0));
    assert_eq!(passwd(&["remove", "bob"], &file, "").await.0, Some(0));
    // Eve keeps her password, and observes no more.
    let without = std::fs::read_to_string(&file).unwrap().replace(":observer", "");
    std::fs::write(&file, without).unwrap();
    chatd.signal_hangup().unwrap();
    assert_eq!(disconnected(&mut alice).await, 0x87);
    assert_eq!(bob.until_closed().await.unwrap(), []);
    assert_eq!(eve.subscribe_codes(&[("chat/+/inbox", 1)]).await.unwrap().0, [0x87]);
    let mut alice = self::alice(Version::V5).password("new").to(&chatd).await.unwrap();
    assert_eq!(alice.say("alice", "eve", "for her alone").await.unwrap().code, 0);
    assert!(eve.ping().await.unwrap().is_empty(), "she does not read it as an observer");
    // Bob can be written to no more; what was said with him is still there.
    assert_eq!(alice.say("alice", "bob", "after").await.unwrap().code, 0x90);
    alice.subscribe("chat/alice/res", 1).await.unwrap();
    let history = Publish::new("chat/alice/req/history", json!({"with": "bob"}).to_string(), 1);
    assert!(alice.publish(history).await.unwrap().code < 0x80);
    let answer = alice.acked_message_on("chat/alice/res").await.unwrap().json();
    assert_eq!(answer["ok"]["entries"][0]["text"], "before", "{answer}");
}

/// Who was let in by the old rules and has not arrived yet is not let in any more.
#[tokio::test]
async fn a_login_under_way_ends_with_the_right_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    std::fs::write(&file, SECRET).unwrap();
    // Ten connects a second: of 20 at a time half wait for their turn, up to a second, after their token was checked.
    let options = required().set("auth.jwt_key_file", file.display()).set("limits.user_publishes_per_s", 100);
    let chatd = Chatd::start_with(options).await.unwrap();
    let token = token(json!({"sub": "eve", "exp": now_s() + 600}));
    let connects = (0..20).map(|nth| {
        let connect = Connect::v5("eve", &format!("phone-{nth}")).password(token.clone());
        let chatd = &chatd;
        async move { connect.open(chatd).await.unwrap() }
    });
    let clients = futures_util::future::join_all(connects).await;
    let waiting = async || chatd.limited("user_publishes_per_s").await.unwrap() >= 5.0;
    eventually("some wait for their turn", PATIENCE, waiting).await;
    std::fs::write(&file, "another_secret_of_32_bytes_or_more").unwrap();
    chatd.signal_hangup().unwrap();
    for mut client in clients {
        let packets = client.until_closed().await.expect("nobody stays");
        let told = match packets.last() {
            Some(Packet::Connack { code, .. } | Packet::Disconnect { code, .. }) => *code,
            other => panic!("{other:?}"),
        };
        assert!([0x86, 0x87].contains(&told), "{packets:?}");
    }
    eventually("they leave no trace", PATIENCE, async || chatd.metric("chatd_connections").await.unwrap() == 0.0).await;
}

/// Whether a user exists is not to be learned from how long a refusal takes: median against median, over many logins.
#[tokio::test]
async fn a_refusal_takes_as_long_for_users_who_are_there() {
    let (_folder, file) = users().await;
    // Somebody whose hash costs half of what the others' do.
    let dear = "dora:$argon2id$v=19$m=9728,t=2,p=1$c29tZXNhbHRzYWx0$W0J9Fj1pvQxPTx0gT1VJoU1qZ0kPl0b5sSkS3KZ1nZk\n";
    let before = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{before}{dear}")).unwrap();
    let chatd = Chatd::start_with(required().set("auth.password_file", file.display())).await.unwrap();
    let mut took: [Vec<Duration>; 3] = Default::default();
    // At most 10 failures of a user, or nothing is looked at any more.
    for round in 0..9 {
        for (nth, name) in ["alice", "nobody", "dora"].into_iter().enumerate() {
            let began = Instant::now();
            let connect = Connect::v5(name, "phone").password(format!("guess {round}"));
            assert_eq!(refused(&chatd, connect).await.0, 0x86);
            took[nth].push(began.elapsed());
        }
    }
    let medians = took.map(|mut of| {
        of.sort();
        of[of.len() / 2].as_secs_f64()
    });
    for median in medians {
        let ratio = median / medians[0];
        assert!((0.8..1.25).contains(&ratio), "{medians:?}");
    }
}

/// Whoever has keys, and gives them to those who ask. Ends when dropped.
struct Keys {
    address: std::net::SocketAddr,
    body: std::sync::Arc<parking_lot::Mutex<Option<String>>>,
    asked: std::sync::Arc<std::sync::atomic::AtomicUsize>,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Keys {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Keys {
    /// `None`: it answers with an error.
    async fn start(body: Option<String>) -> Self {
        use axum::http::StatusCode;
        let body = std::sync::Arc::new(parking_lot::Mutex::new(body));
        let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let (given, counted) = (body.clone(), asked.clone());
        let answer = move || {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let body = given.lock().clone();
            async move { body.map_or((StatusCode::INTERNAL_SERVER_ERROR, String::new()), |body| (StatusCode::OK, body)) }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let routes = axum::Router::new().route("/keys", axum::routing::get(answer));
        let serving = tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self { address, body, asked, serving }
    }

    fn set(&self, body: Option<String>) {
        *self.body.lock() = body;
    }

    fn options(&self) -> Options {
        required().set("auth.jwt_key_url", format!("http://{}/keys?key=hidden", self.address))
    }

    fn asked(&self) -> usize {
        self.asked.load(std::sync::atomic::Ordering::Relaxed)
    }
}

const KEY_SET: &str = include_str!("../../chat-service/fixtures/ed25519-public.jwks");
const KEY_OF_SET: &[u8] = include_bytes!("../../chat-service/fixtures/ed25519-private.pem");

/// Signed with the key of the set.
fn signed(kid: Option<&str>) -> String {
    let header = Header { kid: kid.map(str::to_owned), ..Header::new(Algorithm::EdDSA) };
    let body = json!({"sub": "alice", "exp": now_s() + 600});
    encode(&header, &body, &EncodingKey::from_ed_pem(KEY_OF_SET).unwrap()).unwrap()
}

#[tokio::test]
async fn keys_are_fetched_again_until_they_are_there() {
    let keys = Keys::start(None).await;
    let chatd = Chatd::start_with(keys.options()).await.unwrap();
    let connect = alice(Version::V5).password(signed(Some("2026")));
    let (code, properties) = refused(&chatd, connect.clone()).await;
    assert_eq!(code, 0x88, "{properties:?}");
    assert!(properties.reason().unwrap().contains("keys are not there yet"), "{properties:?}");
    eventually("it asks again", PATIENCE, async || keys.asked() >= 2).await;
    keys.set(Some(KEY_SET.to_owned()));
    eventually("it has them", PATIENCE, async || chatd.log().unwrap().contains("fetched the keys")).await;
    connect.to(&chatd).await.unwrap();
    let metrics = chatd.metrics().await.unwrap();
    assert!(metrics["chatd_jwt_key_fetch_failures_total"] >= 2.0);
    assert!(metrics["chatd_jwt_key_fetches_total"] > metrics["chatd_jwt_key_fetch_failures_total"]);

    // A key that the set does not have is looked for, but not each time that somebody names one; and nothing that a token says is fetched.
    let asked = keys.asked();
    let header = Header {
        kid: Some("../../../etc/passwd".to_owned()),
        jku: Some(format!("http://{}/keys?stolen", keys.address)),
        x5u: Some(format!("http://{}/keys?stolen", keys.address)),
        ..Header::new(Algorithm::EdDSA)
    };
    let body = json!({"sub": "alice", "exp": now_s() + 600});
    let stranger = encode(&header, &body, &EncodingKey::from_ed_pem(KEY_OF_SET).unwrap()).unwrap();
    let attempts = (0..20).map(|_| refused(&chatd, alice(Version::V5).password(stranger.clone())));
    for (code, _) in futures_util::future::join_all(attempts).await {
        assert_eq!(code, 0x86);
    }
    assert!(keys.asked() <= asked + 1, "{} after {asked}", keys.asked());
    // Whoever names a key that is not there guesses nothing: alice is not locked out.
    connect.to(&chatd).await.unwrap();
}

#[tokio::test]
async fn keys_that_cannot_be_fetched_again_stay() {
    let keys = Keys::start(Some(KEY_SET.to_owned())).await;
    let chatd = Chatd::start_with(keys.options().set("auth.jwt_key_refresh_s", 30)).await.unwrap();
    eventually("it has them", PATIENCE, async || chatd.log().unwrap().contains("fetched the keys")).await;
    let mut client = alice(Version::V5).password(signed(None)).to(&chatd).await.unwrap();
    let failures = || async { chatd.metric("chatd_jwt_key_fetch_failures_total").await.unwrap() };
    let long = Duration::from_secs(60);
    keys.set(None);
    eventually("a fetch fails", long, async || failures().await >= 1.0).await;
    Connect::v5("alice", "laptop").password(signed(Some("2026"))).to(&chatd).await.unwrap();
    for bad in ["{}", "nonsense"] {
        let before = failures().await;
        keys.set(Some(bad.to_owned()));
        eventually("it is refused", long, async || failures().await > before).await;
        assert_eq!(client.say("alice", "bob", "still here").await.unwrap().code, 0x10);
    }
    // A set that is too long is not read to its end.
    let before = failures().await;
    keys.set(Some(format!("{}{KEY_SET}", " ".repeat(1024 * 1024))));
    eventually("it is refused", long, async || failures().await > before).await;

    // And when the key is taken back, so is what it opened.
    keys.set(Some(
        r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"new","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#
            .to_owned(),
    ));
    client.set_patience(long);
    assert_eq!(disconnected(&mut client).await, 0x87);
    assert_eq!(refused(&chatd, alice(Version::V5).password(signed(None))).await.0, 0x86);
    assert!(!chatd.log().unwrap().contains("hidden"), "the query may be a secret");
}

/// A set without a key that can be used is an answer too: whoever signs tokens has taken their keys back.
#[tokio::test]
async fn keys_that_are_all_taken_back_open_nothing() {
    let keys = Keys::start(Some(KEY_SET.to_owned())).await;
    let chatd = Chatd::start_with(keys.options().set("auth.jwt_key_refresh_s", 30)).await.unwrap();
    eventually("it has them", PATIENCE, async || chatd.log().unwrap().contains("fetched the keys")).await;
    let mut client = alice(Version::V5).password(signed(None)).to(&chatd).await.unwrap();
    keys.set(Some(r#"{"keys":[{"kty":"oct","k":"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"}]}"#.to_owned()));
    client.set_patience(Duration::from_secs(60));
    assert_eq!(disconnected(&mut client).await, 0x87);
    for kid in [None, Some("2026")] {
        assert_eq!(refused(&chatd, alice(Version::V5).password(signed(kid))).await.0, 0x86, "{kid:?}");
    }
    let log = chatd.log().unwrap();
    assert!(log.contains("no public key") && !log.contains("hidden"), "{log}");
}

#[tokio::test]
async fn a_new_token_with_fewer_roles_ends_what_they_allowed() {
    let (_folder, chatd) = taking_tokens().await;
    let with_roles = |roles: &str| token(json!({"sub": "eve", "exp": now_s() + 600, "roles": roles}));
    let properties = Properties::none().with(id::AUTHENTICATION_METHOD, Property::Text("JWT".to_owned()));
    let data = Property::Binary(with_roles("observer").into_bytes());
    let properties = properties.with(id::AUTHENTICATION_DATA, data);
    let connect = Connect { user_name: None, properties, ..Connect::v5("eve", "tail") };
    let mut eve = connect.to(&chatd).await.unwrap();
    eve.subscribe("chat/+/inbox", 1).await.unwrap();
    let alices = token(json!({"sub": "alice", "exp": now_s() + 600}));
    let mut alice = alice(Version::V5).password(alices).to(&chatd).await.unwrap();
    alice.say("alice", "bob", "seen").await.unwrap();
    assert_eq!(eve.acked_message().await.unwrap().json()["text"], "seen");
    eve.send_bytes(&packet::authenticate_again("JWT", with_roles("").as_bytes())).await.unwrap();
    eve.take("AUTH", |packet| matches!(packet, Packet::Auth { code: 0, .. }).then_some(())).await.unwrap();
    alice.say("alice", "bob", "unseen").await.unwrap();
    let packets = eve.ping().await.unwrap();
    assert!(!packets.iter().any(|packet| matches!(packet, Packet::Publish(_))), "{packets:?}");
}

/// Nothing that a client sends may begin a line of the log, or reach the terminal of whoever reads it.
#[tokio::test]
async fn nothing_that_clients_send_breaks_a_line_of_the_log() {
    const EVIL: &str = "a\n2026-01-01T00:00:00Z ERROR forged\r\u{1b}[31m\u{7}\u{9b}\u{202e}\u{85}";
    let (_folder, file) = users().await;
    let key = file.with_file_name("key");
    std::fs::write(&key, SECRET).unwrap();
    let options = required()
        .set("auth.password_file", file.display())
        .set("auth.jwt_key_file", key.display())
        .set("log.format", "auto")
        .set("log.level", "debug");
    let chatd = Chatd::start_with(options).await.unwrap();
    let long = EVIL.repeat(300);
    for version in [Version::V4, Version::V5] {
        let alice = || alice(version).password("alice-pw");
        for text in [EVIL, &long] {
            let evil_token = token(json!({"sub": text, "exp": now_s() + 600}));
            let evil_header = Header { kid: Some(text.to_owned()), ..Header::new(Algorithm::HS256) };
            let key = EncodingKey::from_secret(SECRET.as_bytes());
            let evil_kid = encode(&evil_header, &json!({"sub": "alice", "exp": text}), &key).unwrap();
            let will = packet::Will { topic: text.to_owned(), payload: text.into(), ..packet::Will::default() };
            let attempts = [
                Connect::new(version, text, "phone").password("x"),
                Connect::new(version, text, text),
                Connect::new(version, "bob", "phone").password(text),
                Connect::new(version, "", "phone").password(evil_token),
                Connect::new(version, "", "phone").password(evil_kid),
                alice().will(will),
            ];
            let attempts = attempts.into_iter().map(|connect| {
                let chatd = &chatd;
                async move { connect.open(chatd).await.unwrap().until_closed().await.unwrap() }
            });
            for packets in futures_util::future::join_all(attempts).await {
                assert!(matches!(packets.first(), Some(Packet::Connack { code: 1.., .. }) | None), "{packets:?}");
            }
            let client_id = Connect { client_id: text.chars().take(50).collect(), ..alice() };
            let mut client = client_id.to(&chatd).await.unwrap();
            for topic in [
                text.to_owned(),
                format!("chat/alice/out/{text}"),
                format!("chat/{text}/out/bob"),
                format!("chat/alice/req/{text}"),
            ] {
                client.publish(Publish::new(topic, text, 1)).await.unwrap();
            }
            client.subscribe_codes(&[(text, 1), (&format!("chat/{text}"), 1)]).await.unwrap();
        }
    }
    if let Ok(mut socket) = tokio::net::TcpStream::connect(chatd.http_addr()).await {
        let request =
            "GET /mqtt HTTP/1.1\r\nhost: x\r\norigin: http://a\u{1b}[31m\r\nsec-websocket-protocol: \u{9b}\r\n\r\n";
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        drop(tokio::io::AsyncReadExt::read_to_end(&mut socket, &mut answer).await);
    }
    let log = chatd.log().unwrap();
    assert!(log.contains("refused a connect"), "{log}");
    for line in log.lines() {
        let begins = line.get(..11).is_some_and(|date| {
            date.starts_with("20") && date.ends_with('T') && !line.starts_with("2026-01-01T00:00:00Z ERROR forged")
        });
        assert!(begins, "{line:?}");
        assert!(line.len() < 4_096, "{} bytes: {line:?}", line.len());
        assert!(line.chars().all(|one| !one.is_control() && !('\u{202a}'..='\u{202e}').contains(&one)), "{line:?}");
    }
}
