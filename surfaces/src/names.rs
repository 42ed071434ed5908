//! Topic names and topic filters, ordinary ones and those of chat.

use std::time::Instant;

use broker::topics::filter::{matches, shared, validate_topic_filter, validate_topic_name};
use broker::topics::retained::{Retained, RetainedLimits};
use broker::topics::trie::SubscriptionTrie;
use chat_protocol::topic::{Down, is_chat, is_response_topic, parse_filter, parse_observer_filter, parse_up};
use chat_protocol::{ConversationId, MessageId, UserId};

const LEVELS_MAX: usize = 16;

fn alice() -> UserId {
    UserId::parse("alice").expect("a name")
}

/// A topic name in every place that takes one.
pub(crate) fn topics(data: &[u8]) {
    let Ok(topic) = std::str::from_utf8(data) else { return };
    if let Ok(up) = parse_up(topic) {
        assert!(is_chat(topic), "{topic:?} means {up:?}");
        assert_eq!(validate_topic_name(topic, LEVELS_MAX), Ok(()), "{topic:?} means {up:?}");
    }
    if is_response_topic(&alice(), topic) {
        assert!(topic.starts_with("chat/alice/res/") && !topic[15..].contains('/'), "{topic:?}");
    }
    if let Ok(user) = UserId::parse(topic) {
        assert!(topic.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)), "{user:?}");
        for down in Down::ALL {
            assert_eq!(validate_topic_name(&down.topic(&user), LEVELS_MAX), Ok(()));
        }
    }
    if let Ok(id) = MessageId::parse(topic) {
        assert!(!topic.is_empty() && !topic.contains(['/', '+', '#', '\0']), "{id:?}");
    }
    if let Ok(conversation) = ConversationId::parse(topic) {
        assert!(conversation.first() < conversation.second());
    }
    if validate_topic_name(topic, LEVELS_MAX).is_ok() {
        assert!(matches(topic, topic), "{topic:?} does not match itself");
        assert_eq!(matches("#", topic), !topic.starts_with('$'), "{topic:?}");
        assert!(topic.split('/').count() <= LEVELS_MAX);
    }
}

/// Filters and a topic, a line each: the trie, the store of retained messages and the definition agree on what matches.
pub(crate) fn filters(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.split('\n');
    let topic = lines.next().unwrap_or_default();
    let is_topic = validate_topic_name(topic, LEVELS_MAX).is_ok();
    let mut trie = SubscriptionTrie::new();
    let limits = RetainedLimits { messages: 10, bytes: 10_000, user_messages: 10, user_bytes: 10_000 };
    let mut retained = Retained::new(limits);
    if is_topic {
        let message = broker::topics::message::Message {
            topic: topic.into(),
            payload: "x".into(),
            qos: 0,
            retain: true,
            publisher: 0,
            number: 0,
            properties: broker::topics::message::MessageProperties::default(),
        };
        assert_eq!(retained.set(message.into(), None, Instant::now()).is_ok(), topic.len() < 9_000);
    }
    let mut expected = Vec::new();
    let mut filters = Vec::new();
    for (number, filter) in lines.take(20).enumerate() {
        if let Ok(topics) = parse_filter(&alice(), filter) {
            assert!(!topics.is_empty() && filter.starts_with("chat/alice/"), "{filter:?} means {topics:?}");
        }
        if let Some(observed) = parse_observer_filter(filter) {
            assert!(is_chat(filter) && !observed.topics().is_empty(), "{filter:?} means {observed:?}");
        }
        let Ok(is_shared) = validate_topic_filter(filter, LEVELS_MAX) else { continue };
        assert_eq!(is_shared.is_some(), shared(filter).is_some(), "{filter:?}");
        let filter = is_shared.map_or(filter, |shared| shared.filter);
        if validate_topic_filter(filter, LEVELS_MAX) != Ok(None) {
            // What is shared is no shared filter itself; the broker looks at it as it is.
            continue;
        }
        trie.insert(filter, number, ());
        filters.push((number, filter));
        if is_topic && matches(filter, topic) {
            expected.push(number);
        }
        if is_topic && topic.len() < 9_000 {
            assert_eq!(
                !retained.matching(filter, Instant::now()).is_empty(),
                matches(filter, topic),
                "{filter:?} {topic:?}"
            );
        }
    }
    if is_topic {
        let mut found = Vec::new();
        trie.matching(topic, &mut |number: &usize, ()| found.push(*number));
        found.sort_unstable();
        assert_eq!(found, expected, "{topic:?} {filters:?}");
    }
    for (number, filter) in filters {
        assert!(trie.remove(filter, &number).is_some(), "{filter:?} was not there");
    }
    assert!(trie.is_empty());
}
