//! The disk under a real chatd, and the tools for what lies on it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use end_to_end::packet::{Packet, Publish};
use end_to_end::{Chatd, Connect, Options, PATIENCE, eventually};

use crate::chat::{Told, assert_well, listener, put_messages, seqs, texts};

/// Longer than what one message takes of the files' reserve, so that the disk is soon full.
fn long(number: u64) -> String {
    format!("{number} {}", "x".repeat(15_000))
}

/// The disk is full: senders are refused with a reason, receivers go on; there is room: sending goes on, without a restart.
#[tokio::test]
async fn a_full_disk_refuses_senders_and_nobody_else() {
    let mut chatd = Chatd::start().await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone").persistent()).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    for number in 1..=20 {
        assert!(alice.say("alice", "bob", &long(number)).await.unwrap().code < 0x80);
    }
    let size = std::fs::metadata(chatd.data().join("log.redb")).unwrap().len();
    chatd.limit_file_bytes(Some(size)).unwrap();
    // What the file has room for inside is still taken.
    let mut stored = 20;
    let refused = loop {
        let ack = alice.say("alice", "bob", &long(stored + 1)).await.unwrap();
        if ack.code >= 0x80 {
            break ack;
        }
        stored += 1;
        assert!(stored < 10_000, "the disk was never full");
    };
    assert_eq!(refused.code, 0x97);
    assert!(refused.reason.as_deref().unwrap_or_default().starts_with("storage_full: "), "{refused:?}");
    // A PUBACK of MQTT 3.1.1 cannot say it: there is none, and the client sends it again when it comes back.
    let mut old = Connect::v4("eve", "eve-phone").to(&chatd).await.unwrap();
    old.start_publish(Publish::new("chat/eve/out/bob/m-1", long(0), 1)).await.unwrap();
    let answers = old.until_closed().await.unwrap();
    assert!(!answers.iter().any(|packet| matches!(packet, Packet::Puback { .. })), "{answers:?}");

    let got = bob.acked_messages(usize::try_from(stored).unwrap()).await.unwrap();
    assert_eq!(seqs(&got), (1..=stored).collect::<Vec<_>>(), "receivers go on");
    let mut laptop = listener(&chatd, Connect::v4("bob", "bob-laptop")).await.unwrap();
    assert_eq!(chatd.get("/readyz").await.unwrap().0, 200);

    chatd.limit_file_bytes(None).unwrap();
    assert_eq!(alice.say("alice", "bob", "again").await.unwrap().seq, Some(stored + 1));
    for device in [&mut bob, &mut laptop] {
        assert_eq!(seqs(&[device.acked_message().await.unwrap()]), [stored + 1]);
    }
    assert_well(&chatd).await;
    chatd.kill9().await.unwrap();
    let (code, problems, said) = chatd.tool(&["verify"]).await.unwrap();
    assert_eq!((code, problems.as_str()), (Some(0), ""), "{said}");
}

#[tokio::test]
async fn a_backup_is_made_while_people_chat_and_put_back() {
    let mut chatd = Chatd::start().await.unwrap();
    let mut bob = listener(&chatd, Connect::v4("bob", "bob-phone").persistent()).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    for number in 1..=50 {
        alice.say("alice", "bob", &format!("text {number}")).await.unwrap();
    }
    bob.acked_messages(30).await.unwrap();
    bob.leave().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("monday");
    let (code, _, said) = chatd.tool(&["backup", copy.to_str().unwrap()]).await.unwrap();
    assert_eq!((code, said.as_str()), (Some(0), format!("50 messages copied to {}\n", copy.display()).as_str()));
    let (code, _, said) = chatd.tool(&["backup", copy.to_str().unwrap()]).await.unwrap();
    assert_eq!(code, Some(1));
    assert!(said.contains("there is a log in"), "{said}");
    assert_eq!(alice.say("alice", "bob", "after the backup").await.unwrap().seq, Some(51));
    for tool in [&["verify"][..], &["export"], &["compact"]] {
        let (code, _, said) = chatd.tool(tool).await.unwrap();
        assert_eq!(code, Some(1), "{tool:?}");
        assert!(said.contains("log.redb is in use by process "), "{tool:?}: {said}");
    }
    assert!(chatd.terminate().await.unwrap().success());

    let (code, exported, said) = chatd.tool(&["export"]).await.unwrap();
    assert_eq!((code, said.as_str()), (Some(0), "51 messages exported\n"));
    let lines: Vec<serde_json::Value> = exported.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 51);
    assert_eq!(lines[50]["text"], "after the backup");
    let (code, _, said) = chatd.tool(&["restore", copy.to_str().unwrap()]).await.unwrap();
    assert_eq!(code, Some(1), "over a log that is there");
    assert!(said.contains("there is a log in"), "{said}");
    std::fs::remove_dir_all(chatd.data()).unwrap();
    let (code, _, said) = chatd.tool(&["restore", copy.to_str().unwrap()]).await.unwrap();
    assert_eq!(code, Some(0), "{said}");
    chatd.restart().await.unwrap();
    let mut bob = Connect::v4("bob", "bob-phone").persistent().to(&chatd).await.unwrap();
    assert!(bob.session_present());
    let got = bob.acked_messages(20).await.unwrap();
    assert_eq!(seqs(&got), (31..=50).collect::<Vec<_>>(), "the session is in the backup, with its cursor");
}

/// What people wrote is for whoever runs chatd, on a machine with others too.
#[tokio::test]
async fn nobody_else_on_the_machine_reads_what_is_stored() {
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let assert_private = |folder: &Path| {
        assert_eq!(mode(folder), 0o700, "{}", folder.display());
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
        let files: Vec<PathBuf> = files.collect();
        assert!(files.iter().any(|file| file.ends_with("log.redb")), "{files:?}");
        for file in files {
            assert_eq!(mode(&file), 0o600, "{}", file.display());
        }
    };
    let mut chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.say("alice", "bob", "hello").await.unwrap();
    assert_private(&chatd.data());
    let folder = tempfile::tempdir().unwrap();
    let (copy, export) = (folder.path().join("above/copy"), folder.path().join("export"));
    let backup = chatd.tool(&["backup", copy.to_str().unwrap()]).await.unwrap();
    assert_eq!(backup.0, Some(0), "{backup:?}");
    assert_private(&copy);
    assert_ne!(mode(&folder.path().join("above")), 0o700, "only the folder itself");
    assert!(chatd.terminate().await.unwrap().success());
    let exported = chatd.tool(&["export", "--output", export.to_str().unwrap()]).await.unwrap();
    assert_eq!(exported.0, Some(0), "{exported:?}");
    assert_eq!(mode(&export), 0o600);
    // A folder that was there keeps the rights that it was given.
    std::fs::set_permissions(chatd.data(), std::fs::Permissions::from_mode(0o750)).unwrap();
    chatd.restart().await.unwrap();
    assert_eq!(mode(&chatd.data()), 0o750);
}

#[tokio::test]
async fn what_is_damaged_is_named_and_verify_says_no() {
    let mut chatd = Chatd::start_with(Options::default()).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    for number in 1..=20 {
        alice.say("alice", "bob", &format!("a text that can be found again {number}")).await.unwrap();
    }
    assert!(chatd.terminate().await.unwrap().success());
    let file = chatd.data().join("log.redb");
    let mut bytes = std::fs::read(&file).unwrap();
    let wanted = b"found again 7";
    let places: Vec<usize> =
        bytes.windows(wanted.len()).enumerate().filter(|(_, at)| at == wanted).map(|(place, _)| place).collect();
    assert!(!places.is_empty());
    for place in places {
        bytes[place] ^= 1;
    }
    std::fs::write(&file, bytes).unwrap();
    let (code, problems, said) = chatd.tool(&["verify"]).await.unwrap();
    assert_eq!(code, Some(1), "{said}");
    assert!(problems.contains("log.redb"), "{problems}");
    chatd.restart().await.unwrap();
    let mut bob = listener(&chatd, Connect::v4("bob", "bob-phone")).await.unwrap();
    eventually("the damage is named", PATIENCE, async || {
        chatd.log().is_ok_and(|log| log.contains("table rows, key 7: the checksum does not match"))
    })
    .await;
    // Nothing behind the damage is delivered in its place.
    assert_eq!(bob.ping().await.unwrap(), []);
}

/// What a message counts besides its text, as config/chatd.toml says.
const MESSAGE_BYTES: usize = 64;

#[tokio::test]
async fn a_full_quota_refuses_the_sender() {
    let text = "x".repeat(1_000 - MESSAGE_BYTES);
    let options = Options::default().set("limits.user_bytes", 5_000).set("limits.conversation_bytes", 3_000);
    let mut chatd = Chatd::start_with(options).await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    for number in 1..=3 {
        assert_eq!(alice.say_as("alice", "bob", &format!("m-{number}"), &text).await.unwrap().seq, Some(number));
    }
    // Full to the last byte: not even the shortest fits, from neither side; what is stored is still known.
    for _ in 0..2 {
        let ack = alice.say("alice", "bob", "y").await.unwrap();
        assert_eq!((ack.code, ack.seq), (0x97, None));
        let reason = ack.reason.unwrap_or_default();
        assert!(reason.starts_with("quota_exceeded: this conversation "), "{reason}");
        assert_eq!(bob.say("bob", "alice", "y").await.unwrap().code, 0x97);
        assert_eq!(alice.say_as("alice", "bob", "m-3", &text).await.unwrap().seq, Some(3));
        // Other conversations go on, up to the sender's own quota.
        assert_eq!(bob.say("bob", "carol", "y").await.unwrap().code, 0x10);
        chatd.kill9().await.unwrap();
        chatd.restart().await.unwrap();
        bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
        alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    }
    for number in 1..=2 {
        assert_eq!(alice.say("alice", "carol", &text).await.unwrap().seq, Some(number));
    }
    let reason = alice.say("alice", "dave", "y").await.unwrap().reason.unwrap_or_default();
    assert!(reason.starts_with("quota_exceeded: you "), "{reason}");
    // MQTT 3.1.1 is told by the event.
    let mut old = Connect::v4("alice", "alice-laptop").to(&chatd).await.unwrap();
    old.subscribe("chat/alice/event/error", 1).await.unwrap();
    old.publish(Publish::new("chat/alice/out/dave/m-9", "y", 1)).await.unwrap();
    let event = old.acked_message_on("chat/alice/event/error").await.unwrap().json();
    assert_eq!((&event["code"], &event["id"]), (&"quota_exceeded".into(), &"m-9".into()));
    assert_well(&chatd).await;
}

#[tokio::test]
async fn senders_in_one_write_share_their_quota() {
    let options = Options::default().set("limits.conversation_bytes", 100 * (MESSAGE_BYTES + 4));
    let chatd = Chatd::start_with(options).await.unwrap();
    let mut bob = listener(&chatd, Connect::v5("bob", "bob-phone")).await.unwrap();
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    let acks = alice.publish_all((0..150).map(|_| Publish::new("chat/alice/out/bob", "four", 1))).await.unwrap();
    assert_eq!(acks.iter().filter(|ack| ack.seq.is_some()).count(), 100);
    assert_eq!(acks.iter().filter(|ack| ack.code == 0x97).count(), 50);
    assert_eq!(seqs(&bob.acked_messages(100).await.unwrap()), (1..=100).collect::<Vec<_>>());
}

#[tokio::test]
async fn messages_older_than_the_retention_are_removed() {
    let mut chatd = Chatd::start_with(Options::default().set("storage.retention_days", 7)).await.unwrap();
    let bob = Connect::v5("bob", "bob-phone").persistent();
    listener(&chatd, bob.clone()).await.unwrap().leave().await.unwrap();
    assert!(chatd.terminate().await.unwrap().success());
    let old = [30, 9, 8, 6, 1].map(|days_ago| Told {
        from: "alice".to_owned(),
        to: "bob".to_owned(),
        text: format!("{days_ago} days ago"),
        days_ago,
    });
    put_messages(&chatd.data(), old).await;
    chatd.restart().await.unwrap();
    eventually("three messages are removed", PATIENCE, async || {
        chatd.metric("chatd_messages_removed_total").await.is_ok_and(|removed| removed > 2.5)
    })
    .await;
    let mut bob = bob.to(&chatd).await.unwrap();
    let got = bob.acked_messages(2).await.unwrap();
    assert_eq!((texts(&got), seqs(&got)), (vec!["6 days ago".to_owned(), "1 days ago".to_owned()], vec![4, 5]));
    let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
    assert_eq!(alice.say("alice", "bob", "now").await.unwrap().seq, Some(6));
    assert_eq!(seqs(&[bob.acked_message().await.unwrap()]), [6]);
    assert!(chatd.terminate().await.unwrap().success());
    let (code, problems, said) = chatd.tool(&["verify"]).await.unwrap();
    assert_eq!((code, problems.as_str()), (Some(0), ""), "{said}");
    let (_, exported, _) = chatd.tool(&["export"]).await.unwrap();
    assert_eq!(exported.lines().count(), 3);
}
