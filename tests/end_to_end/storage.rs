//! The disk under a real chatd, and the tools for what lies on it.

use end_to_end::packet::{Packet, Publish};
use end_to_end::{Chatd, Connect, Options};

use crate::chat::{assert_well, listener, seqs};

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
    // Nothing behind the damage is delivered in its place.
    assert_eq!(bob.ping().await.unwrap(), []);
    let log = chatd.log().unwrap();
    assert!(log.contains("table rows, key 7: the checksum does not match"), "{log}");
}
