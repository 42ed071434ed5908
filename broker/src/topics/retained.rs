//! Retained messages: the last one of each topic, handed out in topic order.
//!
//! Bounded in number and bytes, in all and for each user who published them; what does not fit is refused and what stands there stays. What has
//! expired takes no room from what comes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use super::filter;
use super::message::{Expiry, Message};
use crate::service::Identity;

/// What one retained message costs beside its content, for the bound on bytes.
const OVERHEAD_BYTES: usize = 256;
/// A part of what a filter matches ends with so many bytes of payload.
const PART_BYTES: usize = 256 * 1024;

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
    /// Too many of this user's.
    #[error("the server keeps at most {max} retained messages of one user")]
    UserMessages {
        /// The limit.
        max: usize,
    },
    /// Too large, all of this user's together.
    #[error("the server keeps at most {max} bytes of one user's retained messages")]
    UserBytes {
        /// The limit.
        max: usize,
    },
}

impl RetainedFull {
    /// The setting that says so.
    pub(crate) fn limit(self) -> &'static str {
        match self {
            Self::Messages { .. } => "retained_messages",
            Self::Bytes { .. } => "retained_bytes",
            Self::UserMessages { .. } => "user_retained_messages",
            Self::UserBytes { .. } => "user_retained_bytes",
        }
    }
}

/// How many retained messages clients may have, and how large.
#[derive(Clone, Copy, Debug)]
pub struct RetainedLimits {
    /// In all.
    pub messages: usize,
    /// Topics, payloads, properties and 256 bytes for each message.
    pub bytes: usize,
    /// Of one user.
    pub user_messages: usize,
    /// Bytes of them.
    pub user_bytes: usize,
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

impl RetainedMessage {
    /// What it takes of the bound on bytes, and from whom. The server's own are bounded by what it publishes.
    fn counted(&self) -> Option<(&Arc<str>, usize)> {
        let Self { message, source, .. } = self;
        let bytes = OVERHEAD_BYTES + message.topic.len() + message.payload.len() + message.properties.bytes();
        source.as_ref().map(|source| (&source.user, bytes))
    }

    fn expires_at(&self) -> Option<Instant> {
        let interval_s = self.message.properties.message_expiry_interval_s?;
        self.since.checked_add(Duration::from_secs(u64::from(interval_s)))
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    messages: usize,
    bytes: usize,
}

impl Count {
    fn add(&mut self, bytes: usize) {
        self.messages += 1;
        self.bytes += bytes;
    }

    fn remove(&mut self, bytes: usize) {
        self.messages -= 1;
        self.bytes -= bytes;
    }
}

/// The retained messages by topic.
#[derive(Clone, Debug)]
pub struct Retained {
    messages: BTreeMap<Arc<str>, RetainedMessage>,
    /// Those that expire, by when they do.
    expiring: BTreeSet<(Instant, Arc<str>)>,
    /// Of clients.
    counted: Count,
    of_user: FxHashMap<Arc<str>, Count>,
    limits: RetainedLimits,
}

impl Retained {
    /// None yet.
    pub fn new(limits: RetainedLimits) -> Self {
        Self {
            messages: BTreeMap::new(),
            expiring: BTreeSet::new(),
            counted: Count::default(),
            of_user: FxHashMap::default(),
            limits,
        }
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
        self.counted.bytes
    }

    /// Retains a message in place of its topic's last one, or clears the topic if the payload is empty [MQTT-3.3.1-6]. An error changes
    /// nothing but that what has expired is gone.
    pub fn set(
        &mut self,
        message: Arc<Message>,
        source: Option<Arc<Identity>>,
        since: Instant,
    ) -> Result<(), RetainedFull> {
        self.clear_expired(since);
        if message.payload.is_empty() {
            self.clear(&message.topic);
            return Ok(());
        }
        let retained = RetainedMessage { message, source, since };
        self.judge(&retained)?;
        self.clear(&retained.message.topic);
        if let Some((user, bytes)) = retained.counted() {
            self.counted.add(bytes);
            self.of_user.entry(Arc::clone(user)).or_default().add(bytes);
        }
        let topic = Arc::clone(&retained.message.topic);
        if let Some(at) = retained.expires_at() {
            self.expiring.insert((at, Arc::clone(&topic)));
        }
        self.messages.insert(topic, retained);
        Ok(())
    }

    /// Whether it has room in place of its topic's last one.
    fn judge(&self, retained: &RetainedMessage) -> Result<(), RetainedFull> {
        let Some((user, bytes)) = retained.counted() else { return Ok(()) };
        let replaced = self.messages.get(&retained.message.topic).and_then(RetainedMessage::counted);
        let of_user = self.of_user.get(user).copied().unwrap_or_default();
        let own = replaced.filter(|(other, _)| *other == user);
        let after = |mut count: Count, replaced: Option<(&Arc<str>, usize)>| {
            replaced.inspect(|(_, bytes)| count.remove(*bytes));
            count.add(bytes);
            count
        };
        let (all, of_user) = (after(self.counted, replaced), after(of_user, own));
        let RetainedLimits { messages, bytes, user_messages, user_bytes } = self.limits;
        if own.is_none() && of_user.messages > user_messages {
            return Err(RetainedFull::UserMessages { max: user_messages });
        }
        if of_user.bytes > user_bytes {
            return Err(RetainedFull::UserBytes { max: user_bytes });
        }
        if replaced.is_none() && all.messages > messages {
            return Err(RetainedFull::Messages { max: messages });
        }
        if all.bytes > bytes {
            return Err(RetainedFull::Bytes { max: bytes });
        }
        Ok(())
    }

    fn clear(&mut self, topic: &str) {
        let Some(cleared) = self.messages.remove(topic) else { return };
        if let Some((user, bytes)) = cleared.counted() {
            self.counted.remove(bytes);
            if let Some(of_user) = self.of_user.get_mut(user) {
                of_user.remove(bytes);
                if of_user.messages == 0 {
                    self.of_user.remove(user);
                }
            }
        }
        if let Some(at) = cleared.expires_at() {
            self.expiring.remove(&(at, Arc::clone(&cleared.message.topic)));
        }
    }

    fn clear_expired(&mut self, now: Instant) {
        while let Some((at, topic)) = self.expiring.first()
            && *at <= now
        {
            let topic = Arc::clone(topic);
            self.clear(&topic);
        }
    }

    /// Those that a valid, unshared filter matches, in the byte order of their topics.
    pub fn matching(&mut self, filter: &str, now: Instant) -> Vec<RetainedMessage> {
        let (mut all, mut after) = self.matching_after(filter, None, usize::MAX, now);
        while let Some(behind) = after {
            let (found, next) = self.matching_after(filter, Some(&behind), usize::MAX, now);
            all.extend(found);
            after = next;
        }
        all
    }

    /// The same part by part: looks at `looks_max` topics behind `after`, or at fewer that are large, and says behind which topic to look on;
    /// `None`: that was all. Only topics that begin like the filter does before its first wildcard are looked at.
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
        let mut bytes = found.iter().map(|found| found.message.payload.len()).sum::<usize>();
        for (topic, message) in below.take_while(|(topic, _)| topic.starts_with(prefix)) {
            if filter::matches(filter, topic) {
                bytes += message.message.payload.len();
                found.push(message.clone());
            }
            looks += 1;
            if looks >= looks_max || bytes >= PART_BYTES {
                return (found, Some(Arc::clone(topic)));
            }
        }
        (found, None)
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

    fn retained(messages: usize, bytes: usize) -> Retained {
        Retained::new(RetainedLimits { messages, bytes, user_messages: usize::MAX, user_bytes: usize::MAX })
    }

    fn publisher() -> Arc<Identity> {
        of("bob")
    }

    fn of(user: &str) -> Arc<Identity> {
        let (roles, credential) = (Default::default(), Default::default());
        Arc::new(Identity { user: user.into(), client_id: "phone".into(), roles, credential, expires_at: None })
    }

    fn set(retained: &mut Retained, message: Arc<Message>) -> Result<(), RetainedFull> {
        retained.set(message, Some(publisher()), Instant::now())
    }

    fn found(retained: &mut Retained, filter: &str) -> Vec<Arc<Message>> {
        retained.matching(filter, Instant::now()).into_iter().map(|found| found.message).collect()
    }

    #[test]
    fn what_has_expired_is_gone() {
        let (mut retained, begin) = (retained(10, 10_000), Instant::now());
        let properties = MessageProperties { message_expiry_interval_s: Some(5), ..MessageProperties::default() };
        let expiring = Arc::new(Message { properties, ..(*message("a", "x")).clone() });
        assert_eq!(retained.set(expiring, Some(publisher()), begin), Ok(()));
        assert_eq!(set(&mut retained, message("b", "x")), Ok(()));
        assert_eq!(retained.matching("#", begin + Duration::from_millis(4_999)).len(), 2);
        assert_eq!(retained.matching("#", begin + Duration::from_secs(5)).len(), 1);
        assert_eq!((retained.len(), retained.bytes()), (1, OVERHEAD_BYTES + 2));
    }

    #[test]
    fn what_has_expired_takes_no_room() {
        let (mut retained, begin) = (retained(2, 10_000), Instant::now());
        let expiring = |topic: &str, interval_s| {
            let properties =
                MessageProperties { message_expiry_interval_s: Some(interval_s), ..MessageProperties::default() };
            Arc::new(Message { properties, ..(*message(topic, "x")).clone() })
        };
        let after = |seconds| begin + Duration::from_secs(seconds);
        let mut set = |message, at| retained.set(message, Some(publisher()), at);
        assert_eq!(set(expiring("a", 5), begin), Ok(()));
        assert_eq!(set(expiring("b", 9), begin), Ok(()));
        assert_eq!(set(message("c", "x"), after(4)), Err(RetainedFull::Messages { max: 2 }));
        // Set again, and it expires later.
        assert_eq!(set(expiring("a", 5), after(4)), Ok(()));
        assert_eq!(set(message("c", "x"), after(8)), Err(RetainedFull::Messages { max: 2 }));
        assert_eq!(set(message("c", "x"), after(9)), Ok(()));
        assert_eq!(set(expiring("d", u32::MAX), after(9)), Ok(()));
        assert_eq!(set(message("d", ""), after(9)), Ok(()));
        assert_eq!((retained.len(), retained.expiring.len()), (1, 0));
    }

    #[test]
    fn each_user_has_a_share() {
        let limits =
            RetainedLimits { messages: 4, bytes: 10_000, user_messages: 2, user_bytes: 2 * OVERHEAD_BYTES + 10 };
        let mut retained = Retained::new(limits);
        let mut set =
            |user: &str, topic: &str, text: &str| retained.set(message(topic, text), Some(of(user)), Instant::now());
        assert_eq!(set("alice", "a", "1"), Ok(()));
        assert_eq!(set("alice", "b", "1"), Ok(()));
        assert_eq!(set("alice", "c", "1"), Err(RetainedFull::UserMessages { max: 2 }));
        assert_eq!(set("alice", "b", "1234567890"), Err(RetainedFull::UserBytes { max: 2 * OVERHEAD_BYTES + 10 }));
        assert_eq!(set("bob", "c", "1"), Ok(()));
        assert_eq!(set("alice", "c", "1"), Err(RetainedFull::UserMessages { max: 2 }), "it is not hers that goes");
        assert_eq!(set("bob", "b", "2"), Ok(()), "whoever published last has it");
        assert_eq!(set("alice", "d", "1"), Ok(()));
        assert_eq!(set("bob", "e", "1"), Err(RetainedFull::UserMessages { max: 2 }));
        for topic in ["a", "b", "c", "d"] {
            assert_eq!(set("carol", topic, ""), Ok(()));
        }
        assert!(retained.is_empty() && retained.of_user.is_empty() && retained.counted == Count::default());
    }

    #[test]
    fn large_ones_come_in_small_parts() {
        let mut retained = retained(100, 100 * PART_BYTES);
        for topic in ["a/1", "a/2", "a/3"] {
            assert_eq!(set(&mut retained, message(topic, &"x".repeat(PART_BYTES / 2))), Ok(()));
        }
        let (found, after) = retained.matching_after("a/#", None, 100, Instant::now());
        assert_eq!((found.len(), after.as_deref()), (2, Some("a/2")));
        let (found, after) = retained.matching_after("a/#", after.as_deref(), 100, Instant::now());
        assert_eq!((found.len(), after), (1, None));
        assert_eq!(topics(&mut retained, "a/+"), ["a/1", "a/2", "a/3"]);
    }

    #[test]
    fn the_servers_own_take_no_room_from_clients() {
        let mut retained = retained(1, 10_000);
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
        let mut retained = retained(10, 10_000);
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
        let mut retained = retained(100, 100_000);
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
        let mut retained = retained(2, 2 * OVERHEAD_BYTES + 10);
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
            let mut retained = retained(100, 100_000);
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
