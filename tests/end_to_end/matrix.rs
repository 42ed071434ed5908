//! The access matrix: every way for one user to reach another's branch of chat, or ordinary topics that the access file closes to them, through
//! every door: MQTT 3.1.1 and 5, each over TCP, TLS, WebSocket, and WebSocket over TLS. Never a byte of what is not theirs, and no refusal is
//! silent.

use std::path::PathBuf;

use end_to_end::packet::{Packet, Properties, Publish, Value, Version, Will, id};
use end_to_end::{Chatd, Client, Connect, Options, PATIENCE, Trust, eventually};
use tempfile::TempDir;

use crate::auth::passwd;
use crate::chat::assert_well;
use crate::ordinary::{nothing_more, retained};
use end_to_end::tls::{Files, port};

const USERS: [&str; 3] = ["alice", "bob", "carol"];
/// What only bob may read.
const SECRET: &str = "for bob alone";
/// What nobody may be told in bob's name, or where alice may not write.
const FORGED: &str = "forged by alice";
const ACCESS: &str = "\
# Everybody has a home.
pattern readwrite home/%u/#
user alice
topic readwrite open/#
topic read shown/#
topic write dropped/#
user bob
topic readwrite open/#
topic readwrite bobs/#
topic readwrite shown/#
topic readwrite dropped/#
user carol
topic readwrite open/#
";

/// A way in.
#[derive(Clone, Copy, Debug)]
struct Door {
    version: Version,
    tls: bool,
    web_socket: bool,
}

fn doors() -> Vec<Door> {
    let mut doors = Vec::new();
    for version in [Version::V4, Version::V5] {
        for tls in [false, true] {
            for web_socket in [false, true] {
                doors.push(Door { version, tls, web_socket });
            }
        }
    }
    doors
}

/// A server with users, an access file and TLS.
struct House {
    chatd: Chatd,
    trust: Trust,
    /// Users and access.
    folder: TempDir,
    /// Certificates: gone with them.
    _files: Files,
}

impl House {
    async fn new() -> Self {
        let (files, folder) = Self::prepared().await;
        let options = Self::closed(&files, &folder);
        Self::opened(options, files, folder).await
    }

    /// Files for TLS, users and access.
    async fn prepared() -> (Files, TempDir) {
        let folder = tempfile::tempdir().unwrap();
        for user in USERS {
            let (code, said) = passwd(&["add", user], &folder.path().join("users"), &format!("{user}-pw\n")).await;
            assert_eq!(code, Some(0), "{said}");
        }
        std::fs::write(folder.path().join("access"), ACCESS).unwrap();
        (Files::new().unwrap(), folder)
    }

    /// Who comes in has to prove it, and the access file counts.
    fn closed(files: &Files, folder: &TempDir) -> Options {
        let path = |name: &str| folder.path().join(name);
        files
            .options()
            .set("auth.mode", "required")
            .set("auth.password_file", path("users").display())
            .set("auth.acl_file", path("access").display())
    }

    async fn opened(options: Options, files: Files, folder: TempDir) -> Self {
        let trust = Trust::in_authority(&std::fs::read_to_string(files.path("ca.pem")).unwrap()).unwrap();
        Self { chatd: Chatd::start_with(options).await.unwrap(), trust, folder, _files: files }
    }

    fn access_file(&self) -> PathBuf {
        self.folder.path().join("access")
    }

    fn connect(version: Version, user: &str, device: &str) -> Connect {
        Connect::new(version, user, device).password(format!("{user}-pw"))
    }

    /// Sends CONNECT through this door. The answer is still to be received.
    async fn knock(&self, door: Door, connect: &Connect) -> Client {
        let tls = door.tls.then_some(&self.trust);
        let listening = async |protocol: &str, clear| {
            if door.tls { format!("127.0.0.1:{}", port(&self.chatd, protocol).await).parse().unwrap() } else { clear }
        };
        let mut client = if door.web_socket {
            let address = listening("http", self.chatd.http_addr()).await;
            Client::web_socket_over(address, door.version, tls).await.unwrap()
        } else {
            let address = listening("mqtt", self.chatd.mqtt_addr()).await;
            Client::tcp_over(address, door.version, tls).await.unwrap()
        };
        client.send_bytes(&connect.bytes()).await.unwrap();
        client
    }

    /// Through this door, let in.
    async fn enter(&self, door: Door, connect: &Connect) -> Client {
        let mut client = self.knock(door, connect).await;
        client.connack().await.unwrap_or_else(|error| panic!("{door:?}: {error:#}"));
        client
    }

    /// Over TCP, with MQTT 5.
    async fn inside(&self, user: &str, device: &str) -> Client {
        Self::connect(Version::V5, user, device).to(&self.chatd).await.unwrap()
    }

    /// Everything of bob's happens, and then something that alice may see by chat and outside of it.
    async fn live(&self, bob: &mut Client, carol: &mut Client) {
        assert!(carol.say("carol", "bob", SECRET).await.unwrap().code < 0x80);
        assert!(bob.say("bob", "carol", SECRET).await.unwrap().code < 0x80);
        bob.publish(Publish::new("chat/bob/typing/carol", "on", 1)).await.unwrap();
        for topic in ["bobs/secret", "home/bob/x"] {
            assert!(bob.publish(Publish::new(topic, SECRET, 1)).await.unwrap().code < 0x80, "{topic}");
            assert!(bob.publish(retained(topic, SECRET, 2)).await.unwrap().code < 0x80, "{topic}");
        }
        assert!(carol.say("carol", "alice", "marker").await.unwrap().code < 0x80);
        assert!(bob.publish(Publish::new("open/marker", "marker", 1)).await.unwrap().code < 0x80);
    }
}

fn assert_nothing_of_bobs(message: &Publish, how: &str) {
    let topic = &message.topic;
    let his = ["chat/bob", "bobs", "home/bob"].iter().any(|begin| topic.starts_with(begin));
    let payload = String::from_utf8_lossy(&message.payload);
    assert!(!his && !payload.contains(SECRET), "{how}: {topic}: {payload}");
}

/// Reads what alice gets until both markers have come; nothing of it is bob's.
async fn assert_sees_the_markers_alone(alice: &mut Client, how: &str) {
    let (mut by_chat, mut outside) = (false, false);
    while !(by_chat && outside) {
        let message = alice.acked_message().await.unwrap_or_else(|error| panic!("{how}: {error:#}"));
        assert_nothing_of_bobs(&message, how);
        by_chat |= message.topic == "chat/alice/inbox";
        outside |= message.topic == "open/marker";
    }
    for packet in alice.ping().await.unwrap() {
        if let Packet::Publish(message) = packet {
            assert_nothing_of_bobs(&message, how);
            alice.acknowledge(&message).await.unwrap();
        }
    }
}

/// Filters that match nothing but what is bob's, or nobody's: refused.
const HIS: [&str; 27] = [
    "chat/bob/inbox",
    "chat/bob/sent",
    "chat/bob/res",
    "chat/bob/res/token",
    "chat/bob/event/error",
    "chat/bob/event/receipt",
    "chat/bob/event/+",
    "chat/bob/+",
    "chat/bob/#",
    "chat/bob/out/+",
    "chat/bob",
    "chat/+/inbox",
    "chat/+/+",
    "chat/+/#",
    "chat/#",
    "$share/g/chat/bob/inbox",
    "$share/g/chat/bob/#",
    "$share/g/chat/#",
    "bobs/secret",
    "bobs/+",
    "bobs/#",
    "$share/g/bobs/secret",
    "$share/g/bobs/#",
    "home/bob/x",
    "home/bob/#",
    "$share/g/home/bob/+",
    "closed/x",
];

/// Filters that match what alice may read besides what is bob's: what they let through is the server's to choose.
const WIDE: [&str; 17] = [
    "#",
    "+",
    "+/#",
    "+/+",
    "+/+/+",
    "+/secret",
    "+/bob/x",
    "+/bob/inbox",
    "+/bob/#",
    "+/+/inbox",
    "+/+/event/+",
    "home/#",
    "home/+/x",
    "$share/g/#",
    "$share/h/+/secret",
    "$share/g/home/+/x",
    "$share/h/+/bob/inbox",
];

#[tokio::test]
async fn no_subscription_reaches_what_is_anothers() {
    let house = House::new().await;
    let mut bob = house.inside("bob", "phone").await;
    let mut carol = house.inside("carol", "phone").await;
    // There is something retained from the beginning.
    house.live(&mut bob, &mut carol).await;
    for door in doors() {
        let mut alice = house.enter(door, &House::connect(door.version, "alice", "spy")).await;
        for filter in ["chat/alice/inbox", "open/marker"] {
            alice.subscribe(filter, 1).await.unwrap();
        }
        for filter in HIS {
            let (codes, properties) = alice.subscribe_codes(&[(filter, 2)]).await.unwrap();
            assert!(codes.len() == 1 && codes[0] >= 0x80, "{door:?}: {filter}: {codes:02x?}");
            assert!(door.version == Version::V4 || properties.reason().is_some(), "{door:?}: {filter}");
        }
        for filter in WIDE {
            let (codes, properties) = alice.subscribe_codes(&[(filter, 2)]).await.unwrap();
            let refused = codes[0] >= 0x80;
            assert!(!refused || door.version == Version::V4 || properties.reason().is_some(), "{door:?}: {filter}");
        }
        house.live(&mut bob, &mut carol).await;
        assert_sees_the_markers_alone(&mut alice, &format!("{door:?}")).await;
        // By each alone, too: what one filter hides another might show.
        for filter in WIDE {
            let mut alone = house.enter(door, &House::connect(door.version, "alice", "alone")).await;
            alone.subscribe_codes(&[(filter, 2)]).await.unwrap();
            for own in ["chat/alice/inbox", "open/marker"] {
                alone.subscribe(own, 1).await.unwrap();
            }
            for message in alone.ping().await.unwrap() {
                if let Packet::Publish(message) = message {
                    assert_nothing_of_bobs(&message, filter);
                }
            }
            alone.leave().await.unwrap();
        }
        alice.leave().await.unwrap();
    }
    assert_well(&house.chatd).await;
}

/// Topics that alice may not publish to, with a payload that would be taken from whoever may.
fn closed_topics() -> Vec<(&'static str, &'static str)> {
    vec![
        ("chat/bob/out/carol", FORGED),
        ("chat/bob/out/carol/m-1", FORGED),
        ("chat/bob/read/carol", "1"),
        ("chat/bob/typing/carol", "on"),
        ("chat/bob/req/whoami", "{}"),
        ("chat/bob/inbox", FORGED),
        ("chat/bob/sent", FORGED),
        ("chat/bob/event/error", FORGED),
        ("chat/bob/res", FORGED),
        ("chat/alice/inbox", FORGED),
        ("chat/alice/event/error", FORGED),
        ("bobs/secret", FORGED),
        ("bobs", FORGED),
        ("home/bob/x", FORGED),
        ("shown/x", FORGED),
        ("closed/x", FORGED),
        ("$SYS/broker/version", FORGED),
        ("$share/g/open/x", FORGED),
    ]
}

/// A refusal that MQTT 5 has no word for, and any of MQTT 3.1.1, is an event.
async fn assert_told(alice: &mut Client, topic: &str, how: &str) {
    let event = alice.acked_message_on("chat/alice/event/error").await.unwrap_or_else(|e| panic!("{how}: {e:#}"));
    assert_eq!(event.json()["topic"], topic, "{how}");
    assert!(event.json()["message"].as_str().is_some_and(|message| !message.is_empty()), "{how}");
}

/// Everything that bob and carol have got so far; nothing of it is forged.
async fn assert_nothing_forged(clients: [&mut Client; 2], how: &str) {
    for client in clients {
        client.publish(Publish::new("open/end", "end", 1)).await.unwrap();
        loop {
            let message = client.acked_message().await.unwrap();
            let payload = String::from_utf8_lossy(&message.payload).into_owned();
            assert!(!payload.contains("forged"), "{how}: {}: {payload}", message.topic);
            if message.topic == "open/end" {
                break;
            }
        }
        client.ping().await.unwrap();
    }
}

#[tokio::test]
async fn no_publish_reaches_where_its_sender_may_not_write() {
    let house = House::new().await;
    let mut bob = house.inside("bob", "phone").await;
    for filter in ["chat/bob/#", "bobs/#", "home/bob/#", "shown/#", "open/#"] {
        bob.subscribe(filter, 2).await.unwrap();
    }
    let mut carol = house.inside("carol", "phone").await;
    for filter in ["chat/carol/#", "open/#"] {
        carol.subscribe(filter, 2).await.unwrap();
    }
    for door in doors() {
        let v5 = door.version == Version::V5;
        let mut alice = house.enter(door, &House::connect(door.version, "alice", "phone")).await;
        alice.subscribe("chat/alice/event/error", 1).await.unwrap();
        for (topic, payload) in closed_topics() {
            for retain in [false, true] {
                for qos in 0..=2 {
                    let how = format!("{door:?}: {topic} retain {retain} QoS {qos}");
                    let ack = alice.publish(Publish { retain, ..Publish::new(topic, payload, qos) }).await.unwrap();
                    if v5 && qos > 0 {
                        assert!(ack.code >= 0x80 && ack.reason.is_some(), "{how}: {ack:?}");
                    } else {
                        assert_told(&mut alice, topic, &how).await;
                    }
                }
            }
        }
        nothing_more(&mut alice).await;
        if v5 {
            alias_and_response_topic(&mut alice, &format!("{door:?}")).await;
        }
        assert_nothing_forged([&mut bob, &mut carol], &format!("{door:?}")).await;
        alice.leave().await.unwrap();
    }
    // Nor is anything of it retained.
    let mut late = house.inside("bob", "late").await;
    for filter in ["bobs/#", "home/bob/#", "shown/#", "open/#", "chat/bob/inbox"] {
        late.subscribe(filter, 1).await.unwrap();
    }
    for packet in late.ping().await.unwrap() {
        let Packet::Publish(message) = packet else { panic!("{packet:?}") };
        assert!(!String::from_utf8_lossy(&message.payload).contains("forged"), "{message:?}");
    }
}

/// What MQTT 5 adds: an alias stands for the topic that it was set to, allowed or not, and a response topic is a topic too.
async fn alias_and_response_topic(alice: &mut Client, how: &str) {
    let aliased = |topic: &str, payload: &str, alias| Publish {
        properties: Properties::none().with(id::TOPIC_ALIAS, Value::U16(alias)),
        ..Publish::new(topic, payload, 1)
    };
    for (topic, payload) in [("bobs/secret", FORGED), ("chat/bob/out/carol", FORGED), ("closed/x", FORGED)] {
        assert!(alice.publish(aliased("open/x", "mine", 1)).await.unwrap().code < 0x80, "{how}");
        for topic in [topic, "", ""] {
            let ack = alice.publish(aliased(topic, payload, 1)).await.unwrap();
            assert!(ack.code >= 0x80 && ack.reason.is_some(), "{how}: alias for {topic:?}: {ack:?}");
        }
    }
    for topic in ["chat/bob/res", "chat/bob/inbox", "chat/bob/res/token", "chat/carol/res", "bobs/secret", "open/x"] {
        let asking = Publish {
            properties: Properties::none()
                .with(id::RESPONSE_TOPIC, Value::Text(topic.to_owned()))
                .with(id::CORRELATION_DATA, Value::Binary(FORGED.into())),
            ..Publish::new("chat/alice/req/whoami", "{}", 1)
        };
        let ack = alice.publish(asking).await.unwrap();
        assert!(ack.code >= 0x80 && ack.reason.is_some(), "{how}: {topic}: {ack:?}");
    }
}

#[tokio::test]
async fn no_will_reaches_where_its_owner_may_not_write() {
    let house = House::new().await;
    let mut bob = house.inside("bob", "phone").await;
    for filter in ["chat/bob/#", "bobs/#", "home/bob/#", "shown/#", "open/#"] {
        bob.subscribe(filter, 2).await.unwrap();
    }
    let mut carol = house.inside("carol", "phone").await;
    for filter in ["chat/carol/#", "open/#"] {
        carol.subscribe(filter, 2).await.unwrap();
    }
    for door in doors() {
        for (topic, payload) in closed_topics() {
            let how = format!("{door:?}: {topic}");
            let will = Will { topic: topic.into(), payload: payload.into(), qos: 1, retain: true, ..Will::default() };
            let mut alice = house.knock(door, &House::connect(door.version, "alice", "mortal").will(will)).await;
            match alice.receive().await.unwrap() {
                Some(Packet::Connack { code, properties, .. }) => match door.version {
                    Version::V4 => assert_eq!(code, 5, "{how}"),
                    Version::V5 => assert!(code >= 0x80 && properties.reason().is_some(), "{how}: {code:#x}"),
                },
                other => panic!("{how}: {other:?}"),
            }
            assert_eq!(alice.until_closed().await.unwrap(), [], "{how}");
        }
        // One that she may leave is published.
        let will = Will { topic: "open/will".into(), payload: b"gone".to_vec(), ..Will::default() };
        drop(house.enter(door, &House::connect(door.version, "alice", "mortal").will(will)).await);
        assert_eq!(bob.acked_message_on("open/will").await.unwrap().text(), "gone");
        assert_nothing_forged([&mut bob, &mut carol], &format!("{door:?}")).await;
    }
}

/// A session is of a user and a client identifier: whoever comes with another's identifier has a session of their own.
#[tokio::test]
async fn the_others_client_identifier_is_no_key_to_their_session() {
    let house = House::new().await;
    let mut carol = house.inside("carol", "phone").await;
    for door in doors() {
        let how = format!("{door:?}");
        let his = House::connect(door.version, "bob", "device").persistent();
        let mut bob = house.enter(door, &his).await;
        for filter in ["chat/bob/inbox", "bobs/#", "open/marker"] {
            bob.subscribe(filter, 1).await.unwrap();
        }
        let hers = House::connect(door.version, "alice", "device");
        // While he is there, and while he is away; taking a session up, and beginning one.
        for away in [false, true] {
            if away {
                bob.disconnect(0, &Properties::none()).await.unwrap();
                carol.say("carol", "bob", SECRET).await.unwrap();
            }
            for connect in [hers.clone(), hers.clone().persistent(), hers.clone().persistent().clean(), hers.clone()] {
                let mut alice = house.enter(door, &connect).await;
                assert!(connect.clean_start || !alice.session_present(), "{how}");
                let packets = alice.ping().await.unwrap();
                assert!(packets.is_empty(), "{how}: {packets:?}");
                alice.leave().await.unwrap();
            }
            if away {
                bob = house.enter(door, &his).await;
                assert!(bob.session_present(), "{how}");
                let got = bob.acked_message_on("chat/bob/inbox").await.unwrap();
                assert_eq!(got.json()["text"], SECRET, "{how}");
            } else {
                // He was not taken over.
                assert!(bob.ping().await.unwrap().is_empty(), "{how}");
            }
        }
        bob.disconnect(0, &Properties::none()).await.unwrap();
        drop(house.enter(door, &his.clean()).await);
    }
}

/// A session that was begun when everybody could be anybody, and everything was open, gets nothing by it later.
#[tokio::test]
async fn a_session_from_development_mode_has_no_rights_from_there() {
    let (files, folder) = House::prepared().await;
    let closed = House::closed(&files, &folder);
    let mut house = House::opened(files.options(), files, folder).await;
    let session = |door: Door| {
        let device = format!("old-{}-{}-{}", u8::from(door.version == Version::V5), door.tls, door.web_socket);
        House::connect(door.version, "alice", &device).persistent()
    };
    for door in doors() {
        let mut alice = house.enter(door, &session(door)).await;
        for filter in ["chat/alice/inbox", "open/marker", "bobs/#", "home/bob/x", "#", "+/secret"] {
            alice.subscribe(filter, 2).await.unwrap();
        }
        if door.version == Version::V5 {
            for filter in ["$share/g/bobs/#", "$share/g/#"] {
                alice.subscribe(filter, 2).await.unwrap();
            }
        }
        alice.leave().await.unwrap();
    }
    house.chatd.terminate().await.unwrap();
    house.chatd.restart_with(closed).await.unwrap();
    let mut bob = house.inside("bob", "phone").await;
    let mut carol = house.inside("carol", "phone").await;
    // While she is away, and while she is there.
    house.live(&mut bob, &mut carol).await;
    for door in doors() {
        let how = format!("{door:?}");
        let mut alice = house.enter(door, &session(door)).await;
        assert!(alice.session_present(), "{how}");
        house.live(&mut bob, &mut carol).await;
        for _ in 0..2 {
            assert_sees_the_markers_alone(&mut alice, &how).await;
            house.live(&mut bob, &mut carol).await;
        }
        assert_sees_the_markers_alone(&mut alice, &how).await;
        alice.leave().await.unwrap();
    }
}

/// Rights that are taken away are gone: for subscriptions and wills that live on, for what waits, and for what is retained.
#[tokio::test]
async fn rights_that_are_taken_away_are_gone() {
    let house = House::new().await;
    let mut bob = house.inside("bob", "phone").await;
    for filter in ["dropped/#", "shown/#"] {
        bob.subscribe(filter, 1).await.unwrap();
    }
    let absent = |door: Door| {
        let device = format!("absent-{}-{}-{}", u8::from(door.version == Version::V5), door.tls, door.web_socket);
        House::connect(door.version, "alice", &device).persistent()
    };
    let will = Will { topic: "dropped/x".into(), payload: FORGED.into(), qos: 1, retain: true, ..Will::default() };
    let mut watching = Vec::new();
    for door in doors() {
        for (connect, stays) in [
            (House::connect(door.version, "alice", &format!("live-{door:?}")).will(will.clone()), true),
            (absent(door), false),
        ] {
            let mut alice = house.enter(door, &connect).await;
            for filter in ["shown/#", "open/marker", "chat/alice/inbox"] {
                alice.subscribe(filter, 1).await.unwrap();
            }
            if stays {
                watching.push((door, alice));
            } else {
                alice.leave().await.unwrap();
            }
        }
    }
    // What she may still see comes, and waits.
    bob.publish(Publish::new("shown/x", "to be seen", 1)).await.unwrap();
    for (door, alice) in &mut watching {
        assert_eq!(alice.acked_message().await.unwrap().text(), "to be seen", "{door:?}");
    }
    bob.acked_message_on("shown/x").await.unwrap();
    let less: Vec<&str> = ACCESS.lines().filter(|line| !line.contains("shown") && !line.contains("dropped")).collect();
    let file = format!("{}\nuser bob\ntopic readwrite shown/#\ntopic readwrite dropped/#\n", less.join("\n"));
    std::fs::write(house.access_file(), file).unwrap();
    let before = house.chatd.log().unwrap().len();
    house.chatd.signal_hangup().unwrap();
    // Read, and looked at for every session: what she may not read any more does not come.
    eventually("it is read", PATIENCE, async || {
        let mut probe = house.inside("alice", "probe").await;
        let (codes, _) = probe.subscribe_codes(&[("shown/#", 1)]).await.unwrap();
        codes[0] >= 0x80
    })
    .await;
    assert!(house.chatd.log().unwrap().len() > before, "it is logged");

    bob.publish(retained("shown/x", SECRET, 1)).await.unwrap();
    bob.publish(Publish::new("open/marker", "marker", 1)).await.unwrap();
    bob.say("bob", "alice", "marker").await.unwrap();
    for (door, mut alice) in watching {
        assert_sees_the_markers_alone(&mut alice, &format!("{door:?}")).await;
        // Her will was to go where she may not write any more.
        drop(alice);
    }
    for door in doors() {
        let mut alice = house.enter(door, &absent(door)).await;
        assert!(alice.session_present(), "{door:?}");
        let how = format!("{door:?}, absent");
        let (mut by_chat, mut outside) = (false, false);
        while !(by_chat && outside) {
            let message = alice.acked_message().await.unwrap();
            // Not even what waited from before.
            assert!(!message.topic.starts_with("shown"), "{how}: {message:?}");
            by_chat |= message.topic == "chat/alice/inbox";
            outside |= message.topic == "open/marker";
        }
        nothing_more(&mut alice).await;
        alice.leave().await.unwrap();
    }
    bob.publish(Publish::new("dropped/end", "end", 1)).await.unwrap();
    loop {
        let message = bob.acked_message().await.unwrap();
        assert_ne!(message.text(), FORGED);
        if message.topic == "dropped/end" {
            break;
        }
    }
    assert_well(&house.chatd).await;
}
