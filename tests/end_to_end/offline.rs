//! Nothing is lost by being offline: cursors, backlogs, the seam between backlog and live, several devices, takeovers.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use end_to_end::packet::{Packet, Publish, Version};
use end_to_end::programs::Subscriber;
use end_to_end::{Chatd, Client, Connect, Dice};

use crate::chat::{Bystanders, assert_well, listener, number, numbered, sends, seqs, without_presence};

async fn alice_sends(chatd: &Chatd, numbers: std::ops::RangeInclusive<u64>) {
    let mut alice = Connect::v5("alice", "alice-phone").to(chatd).await.unwrap();
    let expected: Vec<Option<u64>> = numbers.clone().map(Some).collect();
    let acks = alice.publish_all(sends("alice", "bob", numbered("text", numbers))).await.unwrap();
    assert!(acks.iter().all(|ack| ack.code < 0x80), "{acks:?}");
    assert_eq!(acks.iter().map(|ack| ack.seq).collect::<Vec<_>>(), expected);
    alice.leave().await.unwrap();
}

/// `RETAIN envelope` as mosquitto_sub prints it with `-F '%r %p'`.
fn assert_printed(line: &str, retain: u8, seq: u64) {
    let (flag, envelope) = line.split_once(' ').expect(line);
    let envelope: serde_json::Value = serde_json::from_str(envelope).expect(line);
    assert_eq!((flag, number(&envelope, "seq")), (retain.to_string().as_str(), seq), "{line}");
    assert_eq!(envelope["text"], format!("text {seq}"));
}

const BOB: [&str; 12] = ["-u", "bob", "-i", "bob-phone", "-c", "-q", "1", "-t", "chat/bob/inbox", "-F", "%r %p", "-d"];

#[tokio::test]
async fn a_thousand_messages_survive_kill_9_and_arrive_once_in_order() {
    let mut chatd = Chatd::start().await.unwrap();
    let mut bob = Subscriber::mosquitto(&chatd, &BOB).unwrap();
    bob.subscribed().await.unwrap();
    bob.kill().await.unwrap();
    alice_sends(&chatd, 1..=1_000).await;
    chatd.kill9().await.unwrap();
    chatd.restart().await.unwrap();

    let mut bob = Subscriber::mosquitto(&chatd, &BOB).unwrap();
    for seq in 1..=1_000 {
        assert_printed(&bob.line().await.unwrap(), 1, seq);
    }
    for seq in 1_001..=1_003 {
        alice_sends(&chatd, seq..=seq).await;
        assert_printed(&bob.line().await.unwrap(), 0, seq);
    }
}

/// The program connects again by itself, as it does for people.
#[tokio::test]
async fn mosquitto_sub_goes_on_after_a_restart_under_it() {
    let mut chatd = Chatd::start().await.unwrap();
    let mut bob = Subscriber::mosquitto(&chatd, &BOB).unwrap();
    bob.subscribed().await.unwrap();
    alice_sends(&chatd, 1..=1).await;
    assert_printed(&bob.line().await.unwrap(), 0, 1);
    // Its acknowledgement was taken in: after the restart the message does not come again.
    crate::chat::until_delivered(&chatd, 1).await;
    assert!(chatd.terminate().await.unwrap().success());
    chatd.restart_on_same_ports().await.unwrap();
    alice_sends(&chatd, 2..=2).await;
    let (_, envelope) = bob.line().await.unwrap().split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    assert_eq!(number(&serde_json::from_str(&envelope).unwrap(), "seq"), 2);
}

#[tokio::test]
async fn a_device_that_never_was_there_gets_what_nobody_had() {
    let mut chatd = Chatd::start().await.unwrap();
    alice_sends(&chatd, 1..=5).await;
    chatd.kill9().await.unwrap();
    chatd.restart().await.unwrap();
    let mut bob = listener(&chatd, Connect::v4("bob", "bob-phone").persistent()).await.unwrap();
    let got = bob.acked_messages(5).await.unwrap();
    assert_eq!(seqs(&got), [1, 2, 3, 4, 5]);
    assert!(got.iter().all(|message| message.retain));
}

async fn partial_acknowledgements(version: Version, restart: bool) {
    let mut chatd = Chatd::start().await.unwrap();
    let connect = Connect::new(version, "bob", "bob-phone").persistent();
    listener(&chatd, connect.clone()).await.unwrap().leave().await.unwrap();
    alice_sends(&chatd, 1..=30).await;
    let mut acknowledged = 0;
    // He takes 7 more each time, sees 3 further ones that he does not acknowledge, and his connection breaks.
    while acknowledged < 28 {
        let mut bob = connect.to(&chatd).await.unwrap();
        assert!(bob.session_present());
        let mut expected = acknowledged + 1;
        for _ in 0..7.min(30 - acknowledged) {
            let got = bob.acked_message().await.unwrap();
            assert_eq!(number(&got.json(), "seq"), expected);
            assert!(got.retain);
            expected += 1;
        }
        acknowledged = expected - 1;
        for _ in 0..3.min(30 - acknowledged) {
            assert_eq!(number(&bob.message().await.unwrap().json(), "seq"), expected);
            expected += 1;
        }
        // The answer shows that the acknowledgements were taken in.
        bob.ping().await.unwrap();
        if restart {
            bob.leave().await.unwrap();
            assert!(chatd.terminate().await.unwrap().success());
            chatd.restart().await.unwrap();
        } else {
            drop(bob);
        }
    }
    let mut bob = connect.to(&chatd).await.unwrap();
    let rest = bob.acked_messages(usize::try_from(30 - acknowledged).unwrap()).await.unwrap();
    assert_eq!(seqs(&rest), (acknowledged + 1..=30).collect::<Vec<_>>());
    assert_eq!(bob.ping().await.unwrap(), [], "and nothing else");
    bob.leave().await.unwrap();

    let mut bob = connect.to(&chatd).await.unwrap();
    assert_eq!(bob.ping().await.unwrap(), [], "what was acknowledged does not come again");
    alice_sends(&chatd, 31..=31).await;
    let live = bob.acked_message().await.unwrap();
    assert_eq!((number(&live.json(), "seq"), live.retain), (31, false));
}

#[tokio::test]
async fn it_goes_on_after_the_last_puback_in_mqtt_3_1_1() {
    partial_acknowledgements(Version::V4, false).await;
}

#[tokio::test]
async fn it_goes_on_after_the_last_puback_in_mqtt_5() {
    partial_acknowledgements(Version::V5, false).await;
}

#[tokio::test]
async fn it_goes_on_after_the_last_puback_across_restarts() {
    partial_acknowledgements(Version::V5, true).await;
}

/// An acknowledgement with a hole before it moves nothing: what is in the hole comes again.
#[tokio::test]
async fn acknowledgements_out_of_order_lose_nothing() {
    let mut chatd = Chatd::start().await.unwrap();
    let connect = Connect::v5("bob", "bob-phone").persistent();
    let mut bob = listener(&chatd, connect.clone()).await.unwrap();
    alice_sends(&chatd, 1..=6).await;
    let mut got = Vec::new();
    for _ in 0..6 {
        got.push(bob.message().await.unwrap());
    }
    for index in [5, 1, 3, 0] {
        bob.acknowledge(&got[index]).await.unwrap();
    }
    bob.ping().await.unwrap();
    bob.leave().await.unwrap();
    assert!(chatd.terminate().await.unwrap().success());
    chatd.restart().await.unwrap();
    let mut bob = connect.to(&chatd).await.unwrap();
    alice_sends(&chatd, 7..=7).await;
    let mut again = Vec::new();
    while again.last() != Some(&7) {
        again.push(number(&bob.acked_message().await.unwrap().json(), "seq"));
    }
    assert!(again.is_sorted_by(|a, b| a < b), "{again:?}");
    assert!(again[0] == 3 && again.contains(&5), "3 and 5 were never acknowledged: {again:?}");
}

/// MQTT 5 and 3.1.1 [MQTT-4.4.0-1]: what was not acknowledged is sent again with DUP and its packet identifier when the session goes on.
#[tokio::test]
async fn what_was_under_way_comes_again_with_dup() {
    let chatd = Chatd::start().await.unwrap();
    for version in [Version::V4, Version::V5] {
        let connect = Connect::new(version, "bob", "bob-phone").persistent();
        let mut bob = listener(&chatd, connect.clone()).await.unwrap();
        Connect::v4("alice", "alice-phone").to(&chatd).await.unwrap().say("alice", "bob", "hello").await.unwrap();
        let first = bob.message().await.unwrap();
        assert!(!first.dup);
        drop(bob);
        let mut bob = connect.to(&chatd).await.unwrap();
        let again = bob.acked_message().await.unwrap();
        assert_eq!((again.dup, again.packet_id, again.payload), (true, first.packet_id, first.payload));
        bob.leave().await.unwrap();
    }
}

#[tokio::test]
async fn two_devices_of_one_user_each_get_everything() {
    let mut chatd = Chatd::start().await.unwrap();
    let phone = Connect::v5("bob", "bob-phone").persistent();
    let laptop = Connect::v4("bob", "bob-laptop").persistent();
    for device in [&phone, &laptop] {
        listener(&chatd, device.clone()).await.unwrap().leave().await.unwrap();
    }
    alice_sends(&chatd, 1..=10).await;
    let mut on_phone = phone.to(&chatd).await.unwrap();
    assert_eq!(seqs(&on_phone.acked_messages(10).await.unwrap()), (1..=10).collect::<Vec<_>>());
    alice_sends(&chatd, 11..=20).await;
    assert_eq!(seqs(&on_phone.acked_messages(10).await.unwrap()), (11..=20).collect::<Vec<_>>());
    on_phone.leave().await.unwrap();
    chatd.kill9().await.unwrap();
    chatd.restart().await.unwrap();
    let mut on_laptop = laptop.to(&chatd).await.unwrap();
    assert_eq!(seqs(&on_laptop.acked_messages(20).await.unwrap()), (1..=20).collect::<Vec<_>>());
}

#[tokio::test]
async fn two_devices_at_once_both_see_live_messages() {
    let chatd = Chatd::start().await.unwrap();
    let mut phone = listener(&chatd, Connect::v5("bob", "bob-phone").persistent()).await.unwrap();
    let mut laptop = listener(&chatd, Connect::v4("bob", "bob-laptop").over_web_socket()).await.unwrap();
    alice_sends(&chatd, 1..=200).await;
    for device in [&mut phone, &mut laptop] {
        assert_eq!(seqs(&device.acked_messages(200).await.unwrap()), (1..=200).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_clean_session_begins_with_what_no_device_has_had() {
    let mut chatd = Chatd::start().await.unwrap();
    let phone = Connect::v5("bob", "bob-phone").persistent();
    let mut bob = listener(&chatd, phone).await.unwrap();
    alice_sends(&chatd, 1..=10).await;
    let first = bob.acked_messages(6).await.unwrap();
    assert_eq!(seqs(&first), [1, 2, 3, 4, 5, 6]);
    bob.ping().await.unwrap();
    drop(bob);
    for restart in [false, true] {
        if restart {
            assert!(chatd.terminate().await.unwrap().success());
            chatd.restart().await.unwrap();
        }
        // It acknowledges nothing, so the next one begins there, too.
        let mut laptop = listener(&chatd, Connect::v4("bob", "bob-laptop")).await.unwrap();
        for seq in 7..=10 {
            assert_eq!(number(&laptop.message().await.unwrap().json(), "seq"), seq);
        }
        assert_eq!(laptop.ping().await.unwrap(), []);
        laptop.leave().await.unwrap();
    }
    let mut laptop = listener(&chatd, Connect::v4("bob", "bob-laptop")).await.unwrap();
    assert_eq!(seqs(&laptop.acked_messages(4).await.unwrap()), [7, 8, 9, 10]);
    laptop.leave().await.unwrap();
    let mut laptop = listener(&chatd, Connect::v4("bob", "bob-laptop")).await.unwrap();
    assert_eq!(laptop.ping().await.unwrap(), [], "now some device has had everything");
}

#[tokio::test]
async fn qos_0_counts_as_delivered_when_written() {
    let chatd = Chatd::start().await.unwrap();
    let connect = Connect::v5("bob", "bob-phone").persistent();
    let mut bob = connect.to(&chatd).await.unwrap();
    bob.subscribe("chat/bob/inbox", 0).await.unwrap();
    bob.leave().await.unwrap();
    alice_sends(&chatd, 1..=100).await;
    let mut bob = connect.to(&chatd).await.unwrap();
    let got = bob.acked_messages(100).await.unwrap();
    assert_eq!(seqs(&got), (1..=100).collect::<Vec<_>>());
    assert!(got.iter().all(|message| message.qos == 0 && message.retain));
    bob.leave().await.unwrap();
    let mut bob = connect.to(&chatd).await.unwrap();
    assert_eq!(bob.ping().await.unwrap(), []);
}

/// What was acknowledged before the last thing that was stored does not come again, whatever happens to the server.
#[tokio::test]
async fn a_crash_brings_nothing_back_that_was_acknowledged_before() {
    let mut chatd = Chatd::start().await.unwrap();
    let connect = Connect::v5("bob", "bob-phone").persistent();
    let mut bob = listener(&chatd, connect.clone()).await.unwrap();
    let mut seq = 0;
    for _ in 0..5 {
        alice_sends(&chatd, seq + 1..=seq + 20).await;
        bob.acked_messages(20).await.unwrap();
        bob.ping().await.unwrap();
        drop(bob);
        alice_sends(&chatd, seq + 21..=seq + 21).await;
        chatd.kill9().await.unwrap();
        chatd.restart().await.unwrap();
        bob = connect.to(&chatd).await.unwrap();
        assert_eq!(number(&bob.acked_message().await.unwrap().json(), "seq"), seq + 21);
        seq += 21;
    }
}

/// A device that watches what its user sends from others catches up on it, too.
#[tokio::test]
async fn sent_messages_wait_for_an_absent_device() {
    let mut chatd = Chatd::start().await.unwrap();
    let connect = Connect::v4("alice", "alice-laptop").persistent();
    let mut laptop = connect.to(&chatd).await.unwrap();
    laptop.subscribe("chat/alice/#", 1).await.unwrap();
    laptop.leave().await.unwrap();
    alice_sends(&chatd, 1..=20).await;
    let mut bob = Connect::v5("bob", "bob-phone").to(&chatd).await.unwrap();
    bob.say("bob", "alice", "an answer").await.unwrap();
    chatd.kill9().await.unwrap();
    chatd.restart().await.unwrap();
    let mut laptop = connect.to(&chatd).await.unwrap();
    let mut sent = Vec::new();
    for _ in 0..20 {
        let got = laptop.acked_message_on("chat/alice/sent").await.unwrap();
        assert!(got.retain);
        sent.push(got);
    }
    assert_eq!(seqs(&sent), (1..=20).collect::<Vec<_>>());
    assert_eq!(seqs(&[laptop.acked_message_on("chat/alice/inbox").await.unwrap()]), [21]);
    assert_eq!(without_presence(laptop.ping().await.unwrap()), []);
}

/// Texts of full length, of which few fit into a page.
#[tokio::test]
async fn a_backlog_of_long_texts() {
    let chatd = Chatd::start().await.unwrap();
    let mut alice = Connect::v4("alice", "alice-phone").to(&chatd).await.unwrap();
    let long = "ü".repeat(8 * 1024);
    alice.publish_all((0..300).map(|_| Publish::new("chat/alice/out/bob", long.as_str(), 1))).await.unwrap();
    for qos in [1, 0] {
        let mut bob = Connect::v5("bob", "bob-phone").to(&chatd).await.unwrap();
        bob.subscribe("chat/bob/inbox", qos).await.unwrap();
        for seq in 1..=300 {
            let got = bob.message().await.unwrap().json();
            assert_eq!((number(&got, "seq"), got["text"].as_str()), (seq, Some(long.as_str())));
            // The first time he leaves in the middle of it without having acknowledged anything.
            if qos == 1 && seq == 16 {
                break;
            }
        }
        bob.leave().await.unwrap();
    }
}

#[tokio::test]
async fn session_present_says_what_is_kept() {
    let mut chatd = Chatd::start().await.unwrap();
    for version in [Version::V4, Version::V5] {
        let device = format!("bob-{version:?}");
        let clean = Connect::new(version, "bob", &device);
        let persistent = clean.clone().persistent();
        assert!(!clean.to(&chatd).await.unwrap().session_present());
        let first = persistent.to(&chatd).await.unwrap();
        assert!(!first.session_present(), "a clean session left nothing");
        first.leave().await.unwrap();
        assert!(persistent.to(&chatd).await.unwrap().session_present());
        chatd.kill9().await.unwrap();
        chatd.restart().await.unwrap();
        assert!(persistent.to(&chatd).await.unwrap().session_present());
        assert!(!clean.to(&chatd).await.unwrap().session_present());
        let again = persistent.to(&chatd).await.unwrap();
        assert!(!again.session_present(), "a clean start ends the session that was kept");
    }
}

#[tokio::test]
async fn a_clean_start_begins_anew_without_losing_messages() {
    let chatd = Chatd::start().await.unwrap();
    let persistent = Connect::v5("bob", "bob-phone").persistent();
    listener(&chatd, persistent.clone()).await.unwrap().leave().await.unwrap();
    alice_sends(&chatd, 1..=3).await;
    let clean_start = Connect { clean_start: true, ..persistent };
    let mut bob = clean_start.to(&chatd).await.unwrap();
    assert_eq!(bob.ping().await.unwrap(), [], "its subscriptions are gone");
    bob.subscribe("chat/bob/inbox", 1).await.unwrap();
    assert_eq!(seqs(&bob.acked_messages(3).await.unwrap()), [1, 2, 3]);
}

/// The seam: while messages keep arriving, a device with a backlog connects.
#[tokio::test]
async fn nothing_is_lost_repeated_or_reordered_at_the_seam() {
    const BACKLOG: u64 = 60;
    const LIVE: u64 = 240;
    let mut dice = Dice::thrown("seam");
    let chatd = Chatd::start().await.unwrap();
    let mut seq = 0;
    for round in 0..20 {
        let mut alice = Connect::v5("alice", "alice-phone").to(&chatd).await.unwrap();
        alice.publish_all(sends("alice", "bob", numbered("text", seq + 1..=seq + BACKLOG))).await.unwrap();
        let version = if dice.below(2) == 0 { Version::V4 } else { Version::V5 };
        let mut connect = Connect::new(version, "bob", ["bob-phone", "bob-clean"][round % 2]);
        if round % 2 == 0 {
            connect = connect.persistent();
        }
        if dice.below(2) == 0 {
            connect = connect.over_web_socket();
        }
        let first_live = seq + BACKLOG + 1;
        let last = seq + BACKLOG + LIVE;
        let burst = 1 + dice.below(40);
        let sending = tokio::spawn(async move {
            // In bursts, so that live messages come while the backlog is read and after.
            let texts: Vec<String> = numbered("text", first_live..=last).collect();
            for texts in texts.chunks(burst) {
                alice.publish_all(sends("alice", "bob", texts.iter().cloned())).await?;
                tokio::task::yield_now().await;
            }
            alice.leave().await
        });
        // The persistent device has had nothing of the clean one's rounds.
        let mut expected = match round {
            0 | 1 => seq + 1,
            _ if round % 2 == 0 => seq + 1 - (BACKLOG + LIVE),
            _ => seq + 1,
        };
        let mut bob = listener(&chatd, connect).await.unwrap();
        let mut live = false;
        while expected <= last {
            let got = bob.acked_message().await.with_context(|| format!("round {round}, seq {expected}")).unwrap();
            assert_eq!(number(&got.json(), "seq"), expected, "round {round}");
            assert!(!(live && got.retain), "round {round}, seq {expected}: backlog after live");
            live = !got.retain;
            expected += 1;
        }
        assert_eq!(bob.ping().await.unwrap(), [], "round {round}");
        bob.leave().await.unwrap();
        sending.await.unwrap().unwrap();
        seq = last;
    }
}

#[tokio::test]
async fn a_second_connection_of_a_device_takes_over() {
    let chatd = Chatd::start().await.unwrap();
    let mut namesake = listener(&chatd, Connect::v5("carol", "phone")).await.unwrap();
    let mut first = listener(&chatd, Connect::v5("bob", "phone").persistent()).await.unwrap();
    let mut second = Connect::v4("bob", "phone").persistent().to(&chatd).await.unwrap();
    assert!(second.session_present());
    let last_words = first.until_closed().await.unwrap();
    assert!(
        matches!(&last_words[..], [Packet::Disconnect { code: 0x8e, .. }]),
        "session taken over, and nothing else: {last_words:?}"
    );
    alice_sends(&chatd, 1..=2).await;
    assert_eq!(seqs(&second.acked_messages(2).await.unwrap()), [1, 2]);
    let mut third = Connect::v5("bob", "phone").to(&chatd).await.unwrap();
    assert_eq!(second.until_closed().await.unwrap(), [], "MQTT 3.1.1 has no packet for it");
    assert_eq!(third.ping().await.unwrap(), []);

    // Somebody else who chose the same client identifier notices nothing.
    assert_eq!(namesake.ping().await.unwrap(), []);
    let mut alice = Connect::v5("alice", "phone").to(&chatd).await.unwrap();
    alice.say("alice", "carol", "still there?").await.unwrap();
    assert_eq!(seqs(&[namesake.acked_message().await.unwrap()]), [1]);
}

/// One after the other as fast as they can, and four at a time that fight for it.
#[tokio::test]
async fn three_thousand_takeovers_disturb_nobody() {
    let chatd = std::sync::Arc::new(Chatd::start().await.unwrap());
    let bystanders = Bystanders::of(&chatd).await.unwrap();
    let mut namesake = listener(&chatd, Connect::v5("carol", "phone")).await.unwrap();

    let mut before: Option<Client> = None;
    for round in 0..1_000 {
        let version = if round % 3 == 0 { Version::V4 } else { Version::V5 };
        let connect = Connect::new(version, "bob", "phone").persistent();
        let client = listener(&chatd, connect).await.with_context(|| format!("takeover {round}")).unwrap();
        if let Some(mut before) = before.replace(client) {
            let last_words = before.until_closed().await.unwrap();
            assert!(
                last_words.iter().all(|packet| matches!(packet, Packet::Disconnect { code: 0x8e, .. })),
                "takeover {round}: {last_words:?}"
            );
        }
    }
    let fights = (0..4).map(|_| {
        let chatd = std::sync::Arc::clone(&chatd);
        tokio::spawn(async move {
            let connect = Connect::v5("bob", "phone").persistent();
            for _ in 0..500 {
                // Whoever is taken over before the CONNACK is told so instead (0x88), or sees a closed connection, with or without a reason.
                let mut client = connect.open(&chatd).await?;
                match client.receive().await? {
                    Some(Packet::Connack { code: 0 | 0x88, .. } | Packet::Disconnect { code: 0x8e, .. }) | None => {}
                    other => anyhow::bail!("instead of CONNACK: {other:?}"),
                }
            }
            anyhow::Ok(())
        })
    });
    for fight in fights.collect::<Vec<_>>() {
        fight.await.unwrap().unwrap();
    }

    let rounds = bystanders.were_not_disturbed().await.unwrap();
    assert!(rounds > 1);
    assert_eq!(namesake.ping().await.unwrap(), []);
    alice_sends(&chatd, 1..=3).await;
    let mut bob = Connect::v5("bob", "phone").persistent().to(&chatd).await.unwrap();
    assert!(bob.session_present());
    assert_eq!(seqs(&bob.acked_messages(3).await.unwrap()), [1, 2, 3]);
    assert_well(&chatd).await;
}

/// A device that connects again and again in the middle of its backlog gets each message at least once, in order on each connection, and
/// nothing that it had acknowledged.
#[tokio::test]
async fn a_bad_line_loses_nothing() {
    const MESSAGES: u64 = 400;
    let mut dice = Dice::thrown("bad line");
    let chatd = Chatd::start().await.unwrap();
    let connect = Connect::v5("bob", "bob-phone").persistent();
    listener(&chatd, connect.clone()).await.unwrap().leave().await.unwrap();
    alice_sends(&chatd, 1..=MESSAGES).await;
    let mut acknowledged = BTreeSet::new();
    while !acknowledged.contains(&MESSAGES) {
        bad_connection(&chatd, &connect, &mut dice, &mut acknowledged, MESSAGES).await.unwrap();
    }
    assert_eq!(acknowledged.len(), usize::try_from(MESSAGES).unwrap());
}

async fn bad_connection(
    chatd: &Chatd,
    connect: &Connect,
    dice: &mut Dice,
    acknowledged: &mut BTreeSet<u64>,
    last: u64,
) -> Result<()> {
    let mut bob = connect.to(chatd).await?;
    let mut before = 0;
    for _ in 0..dice.below(60) {
        let got: Publish = bob.message().await?;
        let seq = number(&got.json(), "seq");
        let expected = if before == 0 { acknowledged.last().copied().unwrap_or(0) + 1 } else { before + 1 };
        ensure!(seq == expected, "{seq} instead of {expected}, having acknowledged up to {:?}", acknowledged.last());
        before = seq;
        bob.acknowledge(&got).await?;
        acknowledged.insert(seq);
        if seq == last {
            break;
        }
    }
    bob.ping().await?;
    Ok(())
}
