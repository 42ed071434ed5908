//! Retained messages: the last one of each topic that asked for it.
//!
//! Kept in memory, bounded in number and bytes; when full, a new topic is refused to its publisher rather than an old one dropped.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::topics::filter;
use crate::topics::message::Message;

/// The store is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server retains as many messages as it may; clear one with an empty retained message")]
pub struct RetainedFull;

/// All retained messages, by topic.
#[derive(Debug)]
pub struct Retained {
    messages: BTreeMap<Arc<str>, Arc<Message>>,
    bytes: usize,
    messages_max: usize,
    bytes_max: usize,
}

impl Retained {
    /// At most so many messages and bytes (payloads and topics).
    pub fn new(messages_max: usize, bytes_max: usize) -> Self {
        Self { messages: BTreeMap::new(), bytes: 0, messages_max, bytes_max }
    }

    /// Retains a message in place of its topic's last one; an empty one clears.
    pub fn set(&mut self, message: Arc<Message>) -> Result<(), RetainedFull> {
        let before = self.messages.get(&message.topic).map_or(0, |old| size(old));
        if message.payload.is_empty() {
            self.messages.remove(&message.topic);
            self.bytes -= before;
            return Ok(());
        }
        let bytes = self.bytes - before + size(&message);
        if bytes > self.bytes_max || (before == 0 && self.messages.len() >= self.messages_max) {
            return Err(RetainedFull);
        }
        self.bytes = bytes;
        self.messages.insert(Arc::clone(&message.topic), message);
        Ok(())
    }

    /// What a new subscription to a valid filter gets, in the order of topics.
    pub fn matching(&self, filter: &str) -> Vec<Arc<Message>> {
        // Only topics that begin like the filter does before its first wildcard can match.
        let fixed = filter.split(['+', '#']).next().unwrap_or_default();
        let first = fixed.strip_suffix('/').unwrap_or(fixed);
        self.messages
            .range::<str, _>((std::ops::Bound::Included(first), std::ops::Bound::Unbounded))
            .take_while(|(topic, _)| topic.starts_with(first))
            .filter(|(topic, _)| filter::matches(filter, topic))
            .map(|(_, message)| Arc::clone(message))
            .collect()
    }
}

fn size(message: &Message) -> usize {
    message.payload.len() + message.topic.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(topic: &str, payload: &str) -> Arc<Message> {
        Arc::new(Message {
            topic: topic.into(),
            payload: payload.to_owned().into(),
            qos: 0,
            retain: true,
            publisher: 0,
            properties: Default::default(),
        })
    }

    fn topics(retained: &Retained, filter: &str) -> Vec<String> {
        retained.matching(filter).iter().map(|message| message.topic.to_string()).collect()
    }

    #[test]
    fn filters_find_and_empty_messages_clear() {
        let mut retained = Retained::new(10, 1_000);
        for topic in ["b", "a", "a/b", "ab", "a/c/d", "$x/a"] {
            retained.set(message(topic, "1")).expect("room");
        }
        assert_eq!(topics(&retained, "a/#"), ["a", "a/b", "a/c/d"]);
        assert_eq!(topics(&retained, "#"), ["a", "a/b", "a/c/d", "ab", "b"]);
        assert_eq!(topics(&retained, "+"), ["a", "ab", "b"]);
        assert_eq!(topics(&retained, "a/+"), ["a/b"]);
        assert_eq!(topics(&retained, "$x/+"), ["$x/a"]);
        retained.set(message("a/b", "")).expect("clearing needs no room");
        assert_eq!(topics(&retained, "a/+"), [""; 0]);
    }

    #[test]
    fn a_full_store_refuses_and_keeps() {
        let mut retained = Retained::new(2, 20);
        retained.set(message("a", "12345")).expect("room");
        retained.set(message("b", "12345")).expect("room");
        assert_eq!(retained.set(message("c", "1")), Err(RetainedFull));
        assert_eq!(retained.set(message("a", "123456789012345")), Err(RetainedFull));
        assert_eq!(&retained.matching("a")[0].payload[..], b"12345");
        retained.set(message("a", "")).expect("clearing needs no room");
        retained.set(message("c", "123456789")).expect("room again");
    }
}
