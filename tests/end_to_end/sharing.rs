//! Shared subscriptions: `$share/{group}/{filter}` (MQTT 5, section 4.8).

use std::collections::BTreeMap;

use end_to_end::packet::{self, Packet, Properties, Publish, Version};
use end_to_end::{Chatd, Client, Connect};

use crate::chat::assert_well;
use crate::ordinary::{assert_next, connected, nothing_more, retained};

async fn five(chatd: &Chatd, name: &str) -> Client {
    connected(chatd, Version::V5, name).await
}

fn lasting(name: &str) -> Connect {
    Connect::v5(name, name).persistent()
}

/// Everything that has come to a client, acknowledged; a message that it publishes to itself says that nothing else is under way.
async fn gathered(client: &mut Client, name: &str) -> Vec<String> {
    let end = format!("end/{name}");
    client.subscribe(&end, 1).await.unwrap();
    client.publish(Publish::new(end.as_str(), "end", 1)).await.unwrap();
    let mut texts = Vec::new();
    loop {
        let message = client.acked_message().await.unwrap();
        if message.topic == end {
            return texts;
        }
        texts.push(message.text().to_owned());
    }
}

fn sorted(mut texts: Vec<String>) -> Vec<String> {
    texts.sort();
    texts
}

fn numbers(n: usize) -> Vec<String> {
    sorted((0..n).map(|n| format!("{n:03}")).collect())
}

async fn publish_numbers(publisher: &mut Client, topic: &str, n: usize, qos: u8) {
    for text in numbers(n) {
        publisher.publish(Publish::new(topic, text, qos)).await.unwrap();
    }
}

/// 4.8.2: each message goes to one of a group, and to each group, and to whoever subscribes by themselves; the work is shared out.
#[tokio::test]
async fn one_of_each_group_gets_each_message() {
    const MESSAGES: usize = 60;
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    for qos in 0..=2 {
        let mut members = BTreeMap::new();
        for group in ["red", "blue"] {
            for n in 0..3 {
                let name = format!("{group}-{n}");
                let mut member = five(&chatd, &name).await;
                member.subscribe(&format!("$share/{group}/jobs/+"), qos).await.unwrap();
                members.insert((group, name), member);
            }
        }
        let mut plain = five(&chatd, "plain").await;
        plain.subscribe("jobs/#", qos).await.unwrap();
        publish_numbers(&mut publisher, "jobs/x", MESSAGES, 2).await;
        assert_eq!(gathered(&mut plain, "plain").await, numbers(MESSAGES));
        let mut of_group: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for ((group, name), member) in &mut members {
            let texts = gathered(member, name).await;
            assert!(texts.len() >= MESSAGES / 6, "{name} got {} of {MESSAGES}", texts.len());
            of_group.entry(group).or_default().extend(texts);
        }
        for (group, texts) in of_group {
            assert_eq!(sorted(texts), numbers(MESSAGES), "{group}");
        }
    }
    assert_well(&chatd).await;
}

/// A group is its name and its filter; [MQTT-4.8.2-3]: the QoS is the one that was granted to whoever gets it.
#[tokio::test]
async fn a_group_is_a_name_and_a_filter() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let mut by_name = five(&chatd, "by-name").await;
    by_name.subscribe("$share/g/a/b", 1).await.unwrap();
    let mut by_wildcard = five(&chatd, "by-wildcard").await;
    by_wildcard.subscribe("$share/g/a/+", 0).await.unwrap();
    for n in 0..5 {
        let text = n.to_string();
        publisher.publish(Publish::new("a/b", text.as_str(), 2)).await.unwrap();
        assert_next(&mut by_name, "a/b", &text, 1, false).await;
        assert_next(&mut by_wildcard, "a/b", &text, 0, false).await;
    }
    // A member that subscribes again stays one member.
    by_name.subscribe("$share/g/a/b", 2).await.unwrap();
    publisher.publish(Publish::new("a/b", "again", 2)).await.unwrap();
    assert_next(&mut by_name, "a/b", "again", 2, false).await;
    nothing_more(&mut by_name).await;
}

/// 4.8.2: members may be granted different QoS, and a client may be in a group and subscribe by itself.
#[tokio::test]
async fn members_have_their_own_qos_and_identifiers() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let mut members: Vec<Client> = Vec::new();
    for qos in 0..=2 {
        let mut member = five(&chatd, &format!("member-{qos}")).await;
        member.subscribe_identified("$share/g/jobs", qos, 40 + u32::from(qos)).await.unwrap();
        members.push(member);
    }
    publish_numbers(&mut publisher, "jobs", 30, 2).await;
    let mut all = Vec::new();
    for (qos, member) in (0..=2).zip(&mut members) {
        member.subscribe("end", 1).await.unwrap();
        member.publish(Publish::new("end", "end", 1)).await.unwrap();
        loop {
            let message = member.acked_message().await.unwrap();
            if message.topic == "end" {
                break;
            }
            assert_eq!(message.qos, qos);
            assert_eq!(message.properties.subscription_identifiers(), [40 + u32::from(qos)]);
            all.push(message.text().to_owned());
        }
        member.unsubscribe("end").await.unwrap();
    }
    assert_eq!(sorted(all), numbers(30));
}

/// 3.8.3.1 and 4.8.2: no retained messages for a shared subscription, whatever the retain handling.
#[tokio::test]
async fn no_retained_messages_are_shared() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    publisher.publish(retained("kept/x", "kept", 1)).await.unwrap();
    let mut member = five(&chatd, "member").await;
    for handling in [0x00, 0x10, 0x20] {
        let (codes, _) = member.subscribe_codes(&[("$share/g/kept/+", 1 | handling)]).await.unwrap();
        assert_eq!(codes, [1]);
        nothing_more(&mut member).await;
    }
    // One that comes now is a message like another.
    publisher.publish(retained("kept/x", "now", 1)).await.unwrap();
    assert_next(&mut member, "kept/x", "now", 1, false).await;
}

/// [MQTT-3.8.3-4]: no-local on a shared subscription is a protocol error.
#[tokio::test]
async fn no_local_on_a_shared_subscription_is_a_protocol_error() {
    let chatd = Chatd::start().await.unwrap();
    let mut client = five(&chatd, "client").await;
    let filters = [("$share/g/a", 1 | 0x04)];
    client.send_bytes(&packet::subscribe(Version::V5, 9, &Properties::none(), &filters)).await.unwrap();
    let last = client.until_closed().await.unwrap();
    assert!(matches!(last[..], [Packet::Disconnect { code: 0x82, .. }]), "{last:?}");
}

/// 3.10: a member that unsubscribes is out of the group; the last one ends it.
#[tokio::test]
async fn a_member_unsubscribes() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let mut one = five(&chatd, "one").await;
    let mut two = five(&chatd, "two").await;
    for member in [&mut one, &mut two] {
        member.subscribe("$share/g/jobs", 1).await.unwrap();
    }
    assert_eq!(one.unsubscribe("jobs").await.unwrap(), 0x11, "the group's is another filter");
    assert_eq!(one.unsubscribe("$share/other/jobs").await.unwrap(), 0x11);
    assert_eq!(one.unsubscribe("$share/g/jobs").await.unwrap(), 0);
    publish_numbers(&mut publisher, "jobs", 10, 1).await;
    assert_eq!(gathered(&mut two, "two").await, numbers(10));
    assert_eq!(gathered(&mut one, "one").await, Vec::<String>::new());
    assert_eq!(two.unsubscribe("$share/g/jobs").await.unwrap(), 0);
    publish_numbers(&mut publisher, "jobs", 3, 1).await;
    assert_eq!(gathered(&mut two, "two").await, Vec::<String>::new());
}

/// 4.8.2: what a member has not acknowledged when its session ends goes to another, at QoS 1.
#[tokio::test]
async fn what_a_member_leaves_unacknowledged_goes_to_another() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let mut leaving = five(&chatd, "leaving").await;
    leaving.subscribe("$share/g/jobs", 1).await.unwrap();
    // More than can be in flight: also what waits in its queue goes to another.
    publish_numbers(&mut publisher, "jobs", 50, 1).await;
    leaving.message().await.unwrap();
    let mut staying = five(&chatd, "staying").await;
    staying.subscribe("$share/g/jobs", 1).await.unwrap();
    drop(leaving);
    let mut texts = Vec::new();
    for message in staying.acked_messages(50).await.unwrap() {
        texts.push(message.text().to_owned());
    }
    assert_eq!(sorted(texts), numbers(50));
    nothing_more(&mut staying).await;
}

/// [MQTT-4.8.2-4], [MQTT-4.8.2-5]: a QoS 2 delivery that was begun is completed with that client when it comes back, and is nobody else's if it
/// never does.
#[tokio::test]
async fn a_qos_2_delivery_that_was_begun_stays_with_its_member() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let connect = lasting("first");
    let mut first = connect.to(&chatd).await.unwrap();
    first.subscribe("$share/g/jobs", 2).await.unwrap();
    publisher.publish(Publish::new("jobs", "one", 2)).await.unwrap();
    let one = first.message().await.unwrap();
    let mut second = five(&chatd, "second").await;
    second.subscribe("$share/g/jobs", 2).await.unwrap();
    drop(first);
    let mut first = connect.to(&chatd).await.unwrap();
    let again = first.message().await.unwrap();
    assert_eq!((again.text(), again.packet_id, again.dup), ("one", one.packet_id, true));
    nothing_more(&mut second).await;
    // Its session ends: the message with it.
    drop(first);
    drop(connect.clean().to(&chatd).await.unwrap());
    assert_eq!(gathered(&mut second, "second").await, Vec::<String>::new());
}

/// [MQTT-4.8.2-6]: what a member refuses with an error is discarded, and offered to no other.
#[tokio::test]
async fn what_a_member_refuses_is_offered_to_no_other() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let mut refusing = five(&chatd, "refusing").await;
    refusing.subscribe("$share/g/jobs", 2).await.unwrap();
    publisher.publish(Publish::new("jobs", "one", 1)).await.unwrap();
    publisher.publish(Publish::new("jobs", "two", 2)).await.unwrap();
    let (one, two) = (refusing.message().await.unwrap(), refusing.message().await.unwrap());
    let mut other = five(&chatd, "other").await;
    other.subscribe("$share/g/jobs", 2).await.unwrap();
    refusing.send_bytes(&packet::puback_with(one.packet_id, 0x80)).await.unwrap();
    refusing.send_bytes(&packet::pubrec_with(two.packet_id, 0x80)).await.unwrap();
    nothing_more(&mut refusing).await;
    drop(refusing);
    assert_eq!(gathered(&mut other, "other").await, Vec::<String>::new());
}

/// 4.8.2 leaves to the server who of a group gets a message. Here it is somebody who is there, if anybody is; if not it waits for one of
/// those who are away.
#[tokio::test]
async fn absent_members() {
    let chatd = Chatd::start().await.unwrap();
    let mut publisher = five(&chatd, "publisher").await;
    let connects = [lasting("one"), lasting("two")];
    for connect in &connects {
        let mut member = connect.to(&chatd).await.unwrap();
        member.subscribe("$share/g/jobs", 1).await.unwrap();
        member.leave().await.unwrap();
    }
    let mut one = connects[0].to(&chatd).await.unwrap();
    publish_numbers(&mut publisher, "jobs", 10, 1).await;
    assert_eq!(gathered(&mut one, "one").await, numbers(10), "whoever is there does the work");
    one.leave().await.unwrap();

    publish_numbers(&mut publisher, "jobs", 10, 1).await;
    let mut texts = Vec::new();
    for connect in &connects {
        let mut member = connect.to(&chatd).await.unwrap();
        assert!(member.session_present());
        texts.extend(gathered(&mut member, &connect.client_id).await);
        member.leave().await.unwrap();
    }
    assert_eq!(sorted(texts), numbers(10), "each once");
}

/// A session keeps its shared subscriptions, over a restart too.
#[tokio::test]
async fn a_session_keeps_its_place_in_the_group() {
    let mut chatd = Chatd::start().await.unwrap();
    let connect = lasting("member");
    let mut member = connect.to(&chatd).await.unwrap();
    member.subscribe_identified("$share/g/jobs", 1, 6).await.unwrap();
    member.leave().await.unwrap();
    for restart in [false, true] {
        if restart {
            chatd.kill9().await.unwrap();
            chatd.restart().await.unwrap();
        }
        let mut publisher = five(&chatd, "publisher").await;
        publisher.publish(Publish::new("jobs", "waiting", 1)).await.unwrap();
        let mut member = connect.to(&chatd).await.unwrap();
        assert!(member.session_present());
        publisher.publish(Publish::new("jobs", "live", 1)).await.unwrap();
        for text in ["waiting", "live"] {
            let got = member.acked_message().await.unwrap();
            assert_eq!((got.text(), got.properties.subscription_identifiers()), (text, vec![6]));
        }
        nothing_more(&mut member).await;
        member.leave().await.unwrap();
    }
}

/// Chat has an order for every device, and is not shared; nor do a group's wildcards see it.
#[tokio::test]
async fn chat_is_not_shared() {
    let chatd = Chatd::start().await.unwrap();
    let mut bob = five(&chatd, "bob").await;
    for filter in [
        "$share/g/chat/bob/inbox",
        "$share/g/chat/bob/#",
        "$share/g/chat/bob/+",
        "$share/g/chat/bob/res",
        "$share/g/chat/alice/inbox",
        "$share/g/chat/#",
        "$share/g/chat",
    ] {
        let (codes, properties) = bob.subscribe_codes(&[(filter, 1)]).await.unwrap();
        assert!(codes.len() == 1 && codes[0] >= 0x80, "{filter}: {codes:02x?}");
        assert!(properties.reason().is_some(), "{filter}");
    }
    for filter in ["$share/g/#", "$share/g/+/#", "$share/g/+/bob/inbox", "$share/g/+/+/out/+"] {
        bob.subscribe(filter, 1).await.unwrap();
    }
    let mut alice = five(&chatd, "alice").await;
    alice.say("alice", "bob", "psst").await.unwrap();
    alice.publish(Publish::new("ordinary/inbox/x", "marker", 1)).await.unwrap();
    for _ in 0..2 {
        // By two of the groups' filters.
        assert_eq!(bob.acked_message().await.unwrap().topic, "ordinary/inbox/x");
    }
    nothing_more(&mut bob).await;
}
