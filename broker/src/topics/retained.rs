//! Retained messages: the last one of each topic, handed out in topic order.
//!
//! Bounded in number and bytes; what does not fit is refused and what stands there stays. What has expired is removed when it is come across.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use super::filter;
use super::message::{Expiry, Message};
use crate::service::Identity;

/// What one retained message costs beside its content, for the bound on bytes.
const OVERHEAD_BYTES: usize = 256;

/// There is no room for another retained message: quota exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RetainedFull {
    /// Too many of them.
    #[error("the server keeps at most {max} retained messages")]
    Messages {
        /// The limit.
        max: usize,
    },
    /// Too large, all together.
    #[error("the server keeps at most {max} bytes of retained messages")]
    Bytes {
        /// The limit.
        max: usize,
    },
}

/// A retained message.
#[derive(Clone, Debug)]
pub struct RetainedMessage {
    /// As published.
    pub message: Arc<Message>,
    /// Who published it; `None`: the server.
    pub source: Option<Arc<Identity>>,
    /// When.
    pub since: Instant,
}

/// The retained messages by topic.
#[derive(Clone, Debug)]
pub struct Retained {
    messages: BTreeMap<Arc<str>, RetainedMessage>,
    /// Of clients: the server's own are bounded by what it publishes.
    counted: usize,
    bytes: usize,
    messages_max: usize,
    bytes_max: usize,
}

impl Retained {
    /// None yet. `bytes_max` counts topics, payloads, properties and 256 bytes for each message.
    pub fn new(messages_max: usize, bytes_max: usize) -> Self {
        Self { messages: BTreeMap::new(), counted: 0, bytes: 0, messages_max, bytes_max }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// What those of clients take of the bound on bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Retains a message in place of its topic's last one, or clears the topic if the payload is empty [MQTT-3.3.1-6]. An error changes
    /// nothing.
    pub fn set(
        &mut self,
        message: Arc<Message>,
        source: Option<Arc<Identity>>,
        since: Instant,
    ) -> Result<(), RetainedFull> {
        if message.payload.is_empty() {
            self.clear(&message.topic);
            return Ok(());
        }
        let retained = RetainedMessage { message, source, since };
        let (replaced, replaced_bytes) = self.messages.get(&retained.message.topic).map_or((0, 0), counted);
        let (new, new_bytes) = counted(&retained);
        let (messages, bytes) = (self.counted - replaced + new, self.bytes - replaced_bytes + new_bytes);
        if new > replaced && messages > self.messages_max {
            return Err(RetainedFull::Messages { max: self.messages_max });
        }
        if new > 0 && bytes > self.bytes_max {
            return Err(RetainedFull::Bytes { max: self.bytes_max });
        }
        (self.counted, self.bytes) = (messages, bytes);
        self.messages.insert(Arc::clone(&retained.message.topic), retained);
        Ok(())
    }

    fn clear(&mut self, topic: &str) {
        if let Some(cleared) = self.messages.remove(topic) {
            let (messages, bytes) = counted(&cleared);
            self.counted -= messages;
            self.bytes -= bytes;
        }
    }

    /// Those that a valid, unshared filter matches, in the byte order of their topics.
    pub fn matching(&mut self, filter: &str, now: Instant) -> Vec<RetainedMessage> {
        self.matching_after(filter, None, usize::MAX, now).0
    }

    /// The same part by part: looks at `looks_max` topics behind `after`, and says behind which topic to look on; `None`: that was all. Only
    /// topics that begin like the filter does before its first wildcard are looked at.
    pub fn matching_after(
        &mut self,
        filter: &str,
        after: Option<&str>,
        looks_max: usize,
        now: Instant,
    ) -> (Vec<RetainedMessage>, Option<Arc<str>>) {
        let (all, after) = self.all_matching(filter, after, looks_max);
        let (expired, found): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|retained| retained.message.expiry(retained.since, now) == Expiry::Over);
        for retained in expired {
            self.clear(&retained.message.topic);
        }
        (found, after)
    }

    fn all_matching(
        &self,
        filter: &str,
        after: Option<&str>,
        looks_max: usize,
    ) -> (Vec<RetainedMessage>, Option<Arc<str>>) {
        let Some(wildcard) = filter.find(['+', '#']) else {
            return (self.messages.get(filter).cloned().into_iter().collect(), None);
        };
        let mut found = Vec::new();
        if after.is_none() {
            // `a/#` matches `a` too, the one match that does not begin with `a/`.
            let parent = filter[wildcard..].starts_with('#').then(|| filter[..wildcard].strip_suffix('/')).flatten();
            found.extend(parent.and_then(|parent| self.messages.get(parent)).cloned());
        }
        let prefix = &filter[..wildcard];
        let begin = after.map_or(Bound::Included(prefix), Bound::Excluded);
        let below = self.messages.range::<str, _>((begin, Bound::Unbounded));
        let mut looks = 0;
        for (topic, message) in below.take_while(|(topic, _)| topic.starts_with(prefix)) {
            if filter::matches(filter, topic) {
                found.push(message.clone());
            }
            looks += 1;
            if looks >= looks_max {
                return (found, Some(Arc::clone(topic)));
            }
        }
        (found, None)
    }
}

/// As how many it counts, and as how many bytes.
fn counted(retained: &RetainedMessage) -> (usize, usize) {
    let RetainedMessage { message, source, .. } = retained;
    match source {
        Some(_) => (1, OVERHEAD_BYTES + message.topic.len() + message.payload.len() + message.properties.bytes()),
        None => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::super::message::MessageProperties;
    use super::*;

    fn message(topic: &str, payload: &str) -> Arc<Message> {
        Arc::new(Message {
            topic: topic.into(),
            payload: Bytes::copy_from_slice(payload.as_bytes()),
            qos: 0,
            retain: true,
            publisher: 1,
            number: 1,
            properties: MessageProperties::default(),
        })
    }

    fn topics(retained: &mut Retained, filter: &str) -> Vec<String> {
        retained.matching(filter, Instant::now()).iter().map(|found| found.message.topic.to_string()).collect()
    }

    fn publisher() -> Arc<Identity> {
        let (roles, credential) = (Default::default(), Default::default());
        Arc::new(Identity { user: "bob".into(), client_id: "phone".into(), roles, credential, expires_at: None })
    }

    fn set(retained: &mut Retained, message: Arc<Message>) -> Result<(), RetainedFull> {
        retained.set(message, Some(publisher()), Instant::now())
    }

    fn found(retained: &mut Retained, filter: &str) -> Vec<Arc<Message>> {
        retained.matching(filter, Instant::now()).into_iter().map(|found| found.message).collect()
    }

    #[test]
    fn what_has_expired_is_gone() {
        let (mut retained, begin) = (Retained::new(10, 10_000), Instant::now());
        let properties = MessageProperties { message_expiry_interval_s: Some(5), ..MessageProperties::default() };
        let expiring = Arc::new(Message { properties, ..(*message("a", "x")).clone() });
        assert_eq!(retained.set(expiring, Some(publisher()), begin), Ok(()));
        assert_eq!(set(&mut retained, message("b", "x")), Ok(()));
        assert_eq!(retained.matching("#", begin + Duration::from_millis(4_999)).len(), 2);
        assert_eq!(retained.matching("#", begin + Duration::from_secs(5)).len(), 1);
        assert_eq!((retained.len(), retained.bytes()), (1, OVERHEAD_BYTES + 2));
    }

    #[test]
    fn the_servers_own_take_no_room_from_clients() {
        let mut retained = Retained::new(1, 10_000);
        assert_eq!(set(&mut retained, message("a", "x")), Ok(()));
        for payload in ["1", "2"] {
            assert_eq!(retained.set(message("$SYS/a", payload), None, Instant::now()), Ok(()));
        }
        assert_eq!((retained.len(), retained.bytes()), (2, OVERHEAD_BYTES + 2));
        assert_eq!(set(&mut retained, message("b", "x")), Err(RetainedFull::Messages { max: 1 }));
        assert_eq!(retained.set(message("$SYS/a", ""), None, Instant::now()), Ok(()));
        assert_eq!(set(&mut retained, message("a", "")), Ok(()));
        assert_eq!((retained.len(), retained.bytes()), (0, 0));
        assert_eq!(set(&mut retained, message("b", "x")), Ok(()));
    }

    #[test]
    fn the_last_one_stands_until_it_is_cleared() {
        let mut retained = Retained::new(10, 10_000);
        assert_eq!(set(&mut retained, message("a", "1")), Ok(()));
        assert_eq!(set(&mut retained, message("a", "22")), Ok(()));
        assert_eq!(found(&mut retained, "a"), [message("a", "22")]);
        assert_eq!(retained.bytes(), OVERHEAD_BYTES + 3);
        assert_eq!(set(&mut retained, message("a", "")), Ok(()));
        assert_eq!(set(&mut retained, message("a", "")), Ok(()));
        assert_eq!((retained.len(), retained.bytes()), (0, 0));
        assert!(retained.is_empty());
    }

    #[test]
    fn they_come_in_the_order_of_their_topics() {
        let mut retained = Retained::new(100, 100_000);
        for topic in ["b", "a/b/c", "a", "a!", "a/", "a/b", "ab", "$a/b", "ä/b", "/"] {
            assert_eq!(set(&mut retained, message(topic, "x")), Ok(()));
        }
        assert_eq!(topics(&mut retained, "#"), ["/", "a", "a!", "a/", "a/b", "a/b/c", "ab", "b", "ä/b"]);
        assert_eq!(topics(&mut retained, "a/#"), ["a", "a/", "a/b", "a/b/c"]);
        assert_eq!(topics(&mut retained, "+/b"), ["a/b", "ä/b"]);
        assert_eq!(topics(&mut retained, "ä/+"), ["ä/b"]);
        assert_eq!(topics(&mut retained, "+/+/#"), ["/", "a/", "a/b", "a/b/c", "ä/b"]);
        assert_eq!(topics(&mut retained, "$a/#"), ["$a/b"]);
        assert_eq!(topics(&mut retained, "/#"), ["/"]);
        assert_eq!(topics(&mut retained, "missing"), [""; 0]);
    }

    #[test]
    fn a_full_store_refuses_what_is_new_and_keeps_what_it_has() {
        let mut retained = Retained::new(2, 2 * OVERHEAD_BYTES + 10);
        assert_eq!(set(&mut retained, message("a", "1")), Ok(()));
        assert_eq!(set(&mut retained, message("b", "1")), Ok(()));
        assert_eq!(set(&mut retained, message("c", "1")), Err(RetainedFull::Messages { max: 2 }));
        assert_eq!(
            set(&mut retained, message("b", "1234567890")),
            Err(RetainedFull::Bytes { max: 2 * OVERHEAD_BYTES + 10 })
        );
        assert_eq!(found(&mut retained, "b"), [message("b", "1")]);
        assert_eq!(set(&mut retained, message("b", "1234567")), Ok(()));
        assert_eq!(set(&mut retained, message("a", "")), Ok(()));
        assert_eq!(set(&mut retained, message("c", "1")), Ok(()));
    }

    proptest! {
        #[test]
        fn a_filter_finds_what_it_matches(
            names in prop::collection::btree_set("[ab$ü/!]{1,5}", 0..30),
            filter in "(([ab$ü]|[+])/){0,3}([ab]|[+]|#)",
            looks_max in 1_usize..5,
        ) {
            let mut retained = Retained::new(100, 100_000);
            for name in &names {
                prop_assert_eq!(set(&mut retained, message(name, "x")), Ok(()));
            }
            let expected: Vec<String> = names.into_iter().filter(|name| filter::matches(&filter, name)).collect();
            prop_assert_eq!(topics(&mut retained, &filter), &*expected);
            // The same part by part.
            let (mut parts, mut after): (Vec<String>, Option<Arc<str>>) = (Vec::new(), None);
            loop {
                let (found, next) = retained.matching_after(&filter, after.as_deref(), looks_max, Instant::now());
                prop_assert!(found.len() <= looks_max + 1);
                parts.extend(found.iter().map(|found| found.message.topic.to_string()));
                after = next;
                if after.is_none() {
                    break;
                }
            }
            prop_assert_eq!(parts, expected);
        }
    }
}
