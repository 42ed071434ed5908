//! Topics outside `chat/`: who may read and write them, by the access file; and `$SYS`, for admins.

use std::path::{Path, PathBuf};

use end_to_end::packet::{self, Packet, Publish, Version, Will};
use end_to_end::{Chatd, Client, Connect, Options, PATIENCE, chatd, eventually};
use serde_json::json;
use tempfile::TempDir;

use crate::auth::{SECRET, disconnected, now_s, refused, required, token};

const RULES: &str = "\
# Everybody has a topic of their own, by device, and reads the news.
pattern readwrite own/%u/%c/#
pattern read news/#

user alice
topic write home/lamp
topic read home/+/temperature
topic readwrite living room/tv
topic deny news/secret

user bob
topic read home/#
topic write home/kitchen/temperature
topic write news/#
";

/// A folder with a key for tokens and an access file.
struct Files(TempDir);

impl Files {
    fn new(rules: &str) -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        std::fs::write(files.path("key"), SECRET).unwrap();
        files.set(rules);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn set(&self, rules: &str) {
        std::fs::write(self.path("acl"), rules).unwrap();
    }

    fn options(&self) -> Options {
        let key = self.path("key");
        required().set("auth.jwt_key_file", key.display()).set("auth.acl_file", self.path("acl").display())
    }

    async fn chatd(&self) -> Chatd {
        Chatd::start_with(self.options()).await.unwrap()
    }
}

fn user(version: Version, name: &str, device: &str) -> Connect {
    with_roles(version, name, device, "")
}

fn with_roles(version: Version, name: &str, device: &str, roles: &str) -> Connect {
    let token = token(json!({"sub": name, "exp": now_s() + 600, "roles": roles}));
    Connect::new(version, name, device).password(token)
}

/// Publishes, and whether it was taken: by the acknowledgement, or in MQTT 3.1.1 by the event that tells a refusal.
async fn is_taken(client: &mut Client, version: Version, me: &str, topic: &str) -> bool {
    let code = client.publish(Publish::new(topic, "on", 1)).await.unwrap().code;
    if version == Version::V5 {
        assert!(matches!(code, 0 | 0x10 | 0x87), "{topic}: {code:02x}");
        return code != 0x87;
    }
    // Events come in order: what is told before this one's refusal is told of what was published before it.
    const NOBODYS: &str = "nobody/may/this";
    client.publish(Publish::new(NOBODYS, "on", 1)).await.unwrap();
    let mut taken = true;
    loop {
        let event = client.acked_message_on(&format!("chat/{me}/event/error")).await.unwrap().json();
        assert_eq!(event["code"], "not_authorized");
        if event["topic"] == NOBODYS {
            return taken;
        }
        assert_eq!(event["topic"], topic);
        taken = false;
    }
}

#[tokio::test]
async fn topics_are_opened_by_the_access_file() {
    let files = Files::new(RULES);
    let chatd = files.chatd().await;
    for version in [Version::V4, Version::V5] {
        let refused = if version == Version::V5 { 0x87 } else { 0x80 };
        let mut alice = user(version, "alice", "phone").to(&chatd).await.unwrap();
        alice.subscribe("chat/alice/event/error", 0).await.unwrap();
        for (topic, taken) in [
            ("home/lamp", true),
            ("living room/tv", true),
            ("own/alice/phone/x", true),
            ("own/alice/laptop/x", false),
            ("own/bob/phone/x", false),
            ("home/kitchen/temperature", false),
            ("news/today", false),
            ("other", false),
        ] {
            assert_eq!(is_taken(&mut alice, version, "alice", topic).await, taken, "{version:?}: {topic}");
        }
        for (filter, code) in [
            ("home/kitchen/temperature", 1),
            ("home/+/temperature", 1),
            ("home/#", 1),
            ("#", 1),
            ("living room/tv", 1),
            ("own/alice/phone/#", 1),
            ("home/lamp", refused),
            ("own/alice/laptop/#", refused),
            ("own/bob/#", refused),
            ("news/secret", refused),
            ("other/#", refused),
            ("$SYS/#", refused),
        ] {
            assert_eq!(alice.subscribe_codes(&[(filter, 1)]).await.unwrap().0, [code], "{version:?}: {filter}");
        }
        alice.leave().await.unwrap();
        let will = Will { topic: "home/door".to_owned(), payload: b"gone".to_vec(), ..Will::default() };
        let with_will = user(version, "alice", "phone").will(will);
        assert_eq!(crate::auth::refused(&chatd, with_will).await.0, if version == Version::V5 { 0x87 } else { 5 });
        let will = Will { topic: "home/lamp".to_owned(), payload: b"gone".to_vec(), ..Will::default() };
        user(version, "alice", "phone").will(will).to(&chatd).await.unwrap().leave().await.unwrap();
    }
}

/// A filter may match more than its subscriber may see: live, retained, and what waited.
#[tokio::test]
async fn a_wide_subscription_brings_only_what_may_be_read() {
    let files = Files::new(RULES);
    let chatd = files.chatd().await;
    let mut bob = user(Version::V5, "bob", "phone").to(&chatd).await.unwrap();
    let retained = |topic: &str| Publish { retain: true, ..Publish::new(topic, "retained", 1) };
    for topic in ["news/secret", "news/today", "home/kitchen/temperature"] {
        assert!(bob.publish(retained(topic)).await.unwrap().code < 0x80, "{topic}");
    }
    let received = async |client: &mut Client| {
        let packets = client.ping().await.unwrap();
        let mut topics: Vec<String> = Vec::new();
        for packet in packets {
            if let Packet::Publish(publish) = packet {
                client.acknowledge(&publish).await.unwrap();
                topics.push(publish.topic);
            }
        }
        topics.sort();
        topics
    };
    for version in [Version::V4, Version::V5] {
        let mut alice = user(version, "alice", "phone").persistent().to(&chatd).await.unwrap();
        for filter in ["#", "news/+", "+/#"] {
            alice.subscribe(filter, 1).await.unwrap();
            // What was retained comes behind the SUBACK, and before what is published now.
            for topic in ["news/secret", "news/live"] {
                bob.publish(Publish::new(topic, "live", 1)).await.unwrap();
            }
            let mut last = alice.acked_message_on("news/live").await.unwrap();
            while last.text() != "live" {
                last = alice.acked_message_on("news/live").await.unwrap();
            }
            let topics = received(&mut alice).await;
            assert!(
                topics.iter().all(|topic| topic == "news/today" || topic == "home/kitchen/temperature"),
                "{topics:?}"
            );
            alice.unsubscribe(filter).await.unwrap();
        }
        alice.leave().await.unwrap();
    }
}

/// CVE-2017-7650: a client identifier is the client's own choice.
#[tokio::test]
async fn a_client_identifier_with_wildcards_opens_nothing() {
    let files = Files::new("pattern readwrite devices/%c/#\n");
    let chatd = files.chatd().await;
    for device in ["#", "+", "phone/x", "+/#"] {
        for version in [Version::V4, Version::V5] {
            let refused = if version == Version::V5 { 0x87 } else { 0x80 };
            let mut client = user(version, "alice", device).to(&chatd).await.unwrap();
            client.subscribe("chat/alice/event/error", 0).await.unwrap();
            for filter in ["devices/#", "devices/+/x", "devices/phone/x", "#"] {
                assert_eq!(client.subscribe_codes(&[(filter, 1)]).await.unwrap().0, [refused], "{device}: {filter}");
            }
            assert!(!is_taken(&mut client, version, "alice", "devices/phone/x").await, "{device}");
        }
    }
    let mut phone = user(Version::V5, "alice", "phone").to(&chatd).await.unwrap();
    phone.subscribe("devices/#", 1).await.unwrap();
    assert!(is_taken(&mut phone, Version::V5, "alice", "devices/phone/x").await);
    assert_eq!(phone.acked_message().await.unwrap().topic, "devices/phone/x");
}

#[tokio::test]
async fn the_access_file_holds_in_development_mode_too() {
    let files = Files::new("user alice\ntopic a/#\n");
    let options = Options::default().set("auth.acl_file", files.path("acl").display());
    let chatd = Chatd::start_with(options).await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.subscribe("#", 1).await.unwrap();
    assert!(is_taken(&mut alice, Version::V5, "alice", "a/b").await);
    assert!(!is_taken(&mut alice, Version::V5, "alice", "b").await);
    let mut bob = Connect::v5("bob", "phone").to(&chatd).await.unwrap();
    assert_eq!(bob.subscribe_codes(&[("#", 1), ("a/b", 0)]).await.unwrap().0, [0x87, 0x87]);
    assert!(!is_taken(&mut bob, Version::V5, "bob", "a/b").await);
    assert_eq!(bob.say("bob", "alice", "chat has rules of its own").await.unwrap().code, 0);
}

async fn check_config(file: &Path) -> (Option<i32>, String) {
    let mut command = chatd::command().await.unwrap();
    let output = command.arg("check-config").env("CHATD__AUTH__ACL_FILE", file).output().await.unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test]
async fn a_file_that_is_wrong_is_refused_whole() {
    let files = Files::new(RULES);
    assert_eq!(check_config(&files.path("acl")).await.0, Some(0));
    for (line, part) in [("topic read chat/#", "chat/"), ("topic read $SYS/#", "$SYS"), ("topics x", "\"topics\"")] {
        files.set(&format!("user alice\ntopic x\n{line}\n"));
        let (code, said) = check_config(&files.path("acl")).await;
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("auth.acl_file") && said.contains("line 3") && said.contains(part), "{said}");
    }
    let error = Chatd::start_with(files.options()).await.err().unwrap();
    assert!(format!("{error:#}").contains("line 3"), "{error:#}");
    assert_eq!(check_config(&files.path("none")).await.0, Some(2));

    files.set("topic read x\nuser alice\ntopic y\n");
    let chatd = files.chatd().await;
    let log = chatd.log().unwrap();
    assert!(log.contains("grant nothing") && log.contains("\"line\":1"), "{log}");
    let mut alice = user(Version::V5, "alice", "phone").to(&chatd).await.unwrap();
    assert_eq!(alice.subscribe_codes(&[("x", 1), ("y", 1)]).await.unwrap().0, [0x87, 1]);
}

/// CVE-2021-34434: what was allowed once is asked again when the rules have changed.
#[tokio::test]
async fn rights_that_are_taken_away_are_gone() {
    let files = Files::new("user alice\ntopic a/#\ntopic b\nuser bob\ntopic write a/#\ntopic write b\n");
    let chatd = files.chatd().await;
    let mut alice = user(Version::V5, "alice", "phone").to(&chatd).await.unwrap();
    alice.subscribe("a/#", 1).await.unwrap();
    alice.subscribe("b", 1).await.unwrap();
    let mut bob = user(Version::V5, "bob", "phone").to(&chatd).await.unwrap();
    assert!(is_taken(&mut bob, Version::V5, "bob", "a/1").await);
    assert_eq!(alice.acked_message().await.unwrap().topic, "a/1");

    let reads = || chatd.log().unwrap().matches("read the users").count();
    // A file that is wrong changes nothing.
    files.set("user alice\ntopic b\nuser Bob\n");
    chatd.signal_hangup().unwrap();
    eventually("it is told", PATIENCE, async || chatd.log().unwrap().contains("line 3")).await;
    assert!(is_taken(&mut bob, Version::V5, "bob", "a/2").await);
    assert_eq!(alice.acked_message().await.unwrap().topic, "a/2");

    files.set("user alice\ntopic read b\nuser bob\ntopic write a/#\ntopic write b\n");
    chatd.signal_hangup().unwrap();
    eventually("it is read", PATIENCE, async || reads() == 1).await;
    assert!(!is_taken(&mut alice, Version::V5, "alice", "a/3").await);
    assert_eq!(alice.subscribe_codes(&[("a/#", 1)]).await.unwrap().0, [0x87]);
    for topic in ["a/4", "b"] {
        assert!(is_taken(&mut bob, Version::V5, "bob", topic).await);
    }
    assert_eq!(alice.acked_message().await.unwrap().topic, "b", "and nothing of a/#");
}

#[tokio::test]
async fn a_key_that_is_taken_away_ends_its_connections() {
    let files = Files::new(RULES);
    let chatd = files.chatd().await;
    let mut alice = user(Version::V5, "alice", "phone").to(&chatd).await.unwrap();
    std::fs::write(files.path("key"), "another_secret_of_32_bytes_or_more").unwrap();
    chatd.signal_hangup().unwrap();
    assert_eq!(disconnected(&mut alice).await, 0x87);
    assert_eq!(refused(&chatd, user(Version::V5, "alice", "phone")).await.0, 0x86);
}

#[tokio::test]
async fn admins_see_how_the_server_is() {
    let files = Files::new(RULES);
    let chatd = files.chatd().await;
    let mut admin = with_roles(Version::V5, "root", "console", "admin").to(&chatd).await.unwrap();
    let mut alice = user(Version::V5, "alice", "phone").to(&chatd).await.unwrap();
    alice.say("alice", "bob", "one").await.unwrap();
    admin.subscribe("$SYS/#", 1).await.unwrap();
    let mut seen = std::collections::BTreeMap::new();
    while seen.len() < 7 {
        let message = admin.acked_message().await.unwrap();
        assert!(message.topic.starts_with("$SYS/broker/"), "{}", message.topic);
        seen.insert(message.topic.clone(), message.text().to_owned());
    }
    assert!(seen["$SYS/broker/version"].starts_with("chatd "), "{seen:?}");
    assert!(seen["$SYS/broker/uptime"].ends_with(" seconds"), "{seen:?}");
    // What was retained may be a little old; then it is told anew, and else not again.
    let mut told = async |topic: &str, wanted: &str| {
        while seen[topic] != wanted {
            let message = admin.acked_message_on(topic).await.unwrap();
            seen.insert(topic.to_owned(), message.text().to_owned());
        }
    };
    told("$SYS/broker/clients/connected", "2").await;
    told("$SYS/broker/messages/stored", "1").await;
    // And nobody else does, whatever they subscribe to.
    for roles in ["", "observer bridge"] {
        let mut other = with_roles(Version::V5, "mallory", "phone", roles).to(&chatd).await.unwrap();
        for filter in ["$SYS/#", "$SYS/broker/version", "$SYS", "$SYS/+/+"] {
            assert_eq!(other.subscribe_codes(&[(filter, 1)]).await.unwrap().0, [0x87], "{roles}: {filter}");
        }
        let publish = Publish { retain: true, ..Publish::new("$SYS/broker/version", "mine", 1) };
        assert_eq!(other.publish(publish).await.unwrap().code, 0x87);
    }
    let publish = packet::publish(Version::V5, &Publish::new("$SYS/broker/version", "mine", 0));
    admin.send_bytes(&publish).await.unwrap();
    admin.ping().await.unwrap();
}

/// [MQTT-4.7.2-1]: a filter that begins with a wildcard matches no topic that begins with `$`, whoever may read those by name.
#[tokio::test]
async fn no_leading_wildcard_sees_server_topics() {
    let files = Files::new(RULES);
    let chatd = files.chatd().await;
    for version in [Version::V4, Version::V5] {
        let admin = |device: &str| with_roles(version, "root", device, "admin");
        let mut wide = admin("wide").to(&chatd).await.unwrap();
        for filter in [
            "#",
            "+/#",
            "+/broker/#",
            "+/broker/messages/stored",
            "+/+/+/+",
            "$share/group/#",
            "$share/group/+/broker/#",
        ] {
            wide.subscribe(filter, 1).await.unwrap();
        }
        // What is retained would have come by now; and it is told anew while they listen.
        let mut named = admin("named").to(&chatd).await.unwrap();
        named.subscribe("$SYS/broker/messages/stored", 1).await.unwrap();
        let before = named.acked_message().await.unwrap().text().to_owned();
        let mut alice = user(Version::V5, "alice", "phone").to(&chatd).await.unwrap();
        alice.say("alice", "bob", "one more").await.unwrap();
        while named.acked_message().await.unwrap().text() == before {}
        // They do hear what is theirs.
        let mut bob = user(Version::V5, "bob", "phone").to(&chatd).await.unwrap();
        bob.publish(Publish::new("news/today", "heard", 1)).await.unwrap();
        let mut heard = vec![wide.message().await.unwrap().topic];
        for packet in wide.ping().await.unwrap() {
            let Packet::Publish(publish) = packet else { panic!("{packet:?}") };
            heard.push(publish.topic);
        }
        heard.dedup();
        assert_eq!(heard, ["news/today"], "{version:?}");
    }
}

#[tokio::test]
async fn in_development_mode_everybody_sees_how_the_server_is() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = Connect::v4("bob", "phone").to(&chatd).await.unwrap();
    bob.subscribe("$SYS/broker/version", 0).await.unwrap();
    assert!(bob.message().await.unwrap().text().starts_with("chatd "));
    // Wildcards in the first level do not match it.
    let mut wide = Connect::v4("bob", "laptop").to(&chatd).await.unwrap();
    wide.subscribe("#", 0).await.unwrap();
    let packets = wide.ping().await.unwrap();
    assert!(!packets.iter().any(|packet| matches!(packet, Packet::Publish(publish) if publish.topic.starts_with('$'))));
}
