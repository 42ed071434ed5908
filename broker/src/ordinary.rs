//! Who gets an ordinary message: subscriptions by filter, groups that share one, and what a receiver may see.
//!
//! A message is handed out while the subscriptions are held still, so a session that moves from one connection to the next misses nothing
//! and gets nothing twice. Whether a receiver may see a topic is asked for each message: filters may match more than that.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use crate::filters::{FiltersFull, UserFilters};
use crate::mailbox::{Mailbox, Ordinary};
use crate::service::{Identity, Observation, Service, SubscriptionRecord};
use crate::topics::filter;
use crate::topics::message::Message;
use crate::topics::trie::SubscriptionTrie;

/// A session as ordinary messages see it, with a connection or without.
#[derive(Debug)]
pub(crate) struct Receiver {
    pub(crate) mailbox: Arc<Mailbox>,
    identity: RwLock<Arc<Identity>>,
    present: AtomicBool,
}

impl Receiver {
    pub(crate) fn new(mailbox: Arc<Mailbox>, identity: Arc<Identity>, present: bool) -> Arc<Self> {
        mailbox.belong_to(&identity.user);
        Arc::new(Self { mailbox, identity: RwLock::new(identity), present: AtomicBool::new(present) })
    }

    pub(crate) fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.identity.read())
    }

    pub(crate) fn set_identity(&self, identity: Arc<Identity>) {
        *self.identity.write() = identity;
    }

    /// Its connection has gone; the session goes on.
    pub(crate) fn set_absent(&self) {
        self.present.store(false, Ordering::Release);
    }

    fn is_present(&self) -> bool {
        self.present.load(Ordering::Acquire)
    }

    /// Whether it takes a message of this topic at this QoS: nothing waits at QoS 0 for who is not there.
    fn takes(&self, service: &impl Service, topic: &str, qos: u8) -> bool {
        (qos > 0 || self.is_present()) && service.may_receive(&self.identity.read(), topic)
    }
}

/// How one session subscribes to an ordinary filter.
#[derive(Clone, Debug)]
pub(crate) struct OrdinarySubscription {
    qos: u8,
    no_local: bool,
    retain_as_published: bool,
    identifier: Option<u32>,
    /// The last message that was taken before it: what is still on the bus then is not for it.
    after: u64,
    receiver: Arc<Receiver>,
}

impl OrdinarySubscription {
    pub(crate) fn new(record: &SubscriptionRecord, after: u64, receiver: &Arc<Receiver>) -> Self {
        Self {
            after,
            qos: record.qos,
            no_local: record.no_local,
            retain_as_published: record.retain_as_published,
            identifier: record.identifier,
            receiver: Arc::clone(receiver),
        }
    }
}

/// A shared subscription: each message goes to one of its members.
pub(crate) struct Group {
    /// The whole filter, with `$share` and the group's name.
    filter: Box<str>,
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    list: Vec<(u64, OrdinarySubscription)>,
    next: usize,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Members have mailboxes, and those have messages of this group.
        f.debug_struct("Group").finish_non_exhaustive()
    }
}

impl Group {
    /// To the next member in turn that has room; to one without a connection only if no other takes it.
    fn deliver(self: &Arc<Self>, message: &Arc<Message>, since: Instant, service: &impl Service) {
        self.hand_out(message, since, service, |subscription| message.number > subscription.after);
    }

    fn hand_out(
        self: &Arc<Self>,
        message: &Arc<Message>,
        since: Instant,
        service: &impl Service,
        wants: impl Fn(&OrdinarySubscription) -> bool,
    ) {
        let mut members = self.members.lock();
        let count = members.list.len();
        for present in [true, false] {
            for step in 0..count {
                let at = (members.next + step) % count;
                let (_, subscription) = &members.list[at];
                let receiver = &subscription.receiver;
                let qos = subscription.qos.min(message.qos);
                if receiver.is_present() != present
                    || !wants(subscription)
                    || !receiver.takes(service, &message.topic, qos)
                {
                    continue;
                }
                let taken = receiver.mailbox.push_ordinary(Ordinary {
                    message: Arc::clone(message),
                    qos,
                    retain: subscription.retain_as_published && message.retain,
                    identifiers: subscription.identifier.into_iter().collect(),
                    since,
                    share: Some(Arc::clone(self)),
                    charge: None,
                });
                if taken {
                    members.next = (at + 1) % count;
                    return;
                }
            }
        }
        if count > 0 && message.qos > 0 {
            service.observe(Observation::QueueFull);
        }
    }
}

/// All ordinary subscriptions, of sessions with a connection and without.
pub(crate) struct Subscriptions {
    tries: RwLock<Tries>,
    /// How many each user has.
    filters: UserFilters,
}

#[derive(Default)]
struct Tries {
    /// By the number of the connection that the session has or had last.
    plain: SubscriptionTrie<u64, OrdinarySubscription>,
    shared: SubscriptionTrie<u64, Arc<Group>>,
    /// By the whole filter, with `$share` and the group's name.
    groups: FxHashMap<Box<str>, (u64, Arc<Group>)>,
    next_group: u64,
}

impl Tries {
    /// `true` if it is new.
    fn subscribe(&mut self, filter: &str, number: u64, subscription: OrdinarySubscription) -> bool {
        let Some(shared) = filter::shared(filter) else {
            let replaced = self.plain.insert(filter, number, subscription.clone());
            if let Some(OrdinarySubscription { after, .. }) = replaced {
                self.plain.insert(filter, number, OrdinarySubscription { after, ..subscription });
            }
            return replaced.is_none();
        };
        let group = match self.groups.get(filter) {
            Some((_, group)) => Arc::clone(group),
            None => {
                let group = Arc::new(Group { filter: filter.into(), members: Mutex::default() });
                self.next_group += 1;
                self.groups.insert(filter.into(), (self.next_group, Arc::clone(&group)));
                self.shared.insert(shared.filter, self.next_group, Arc::clone(&group));
                group
            }
        };
        let mut members = group.members.lock();
        match members.list.iter_mut().find(|(other, _)| *other == number) {
            Some(member) => {
                member.1 = OrdinarySubscription { after: member.1.after, ..subscription };
                false
            }
            None => {
                // What was published to the group before is the group's, whoever is left of it when it is handed out.
                let earliest = members.list.iter().map(|(_, other)| other.after).min();
                let after = earliest.map_or(subscription.after, |earliest| earliest.min(subscription.after));
                members.list.push((number, OrdinarySubscription { after, ..subscription }));
                true
            }
        }
    }

    fn unsubscribe(&mut self, filter: &str, number: u64) -> Option<OrdinarySubscription> {
        let Some(shared) = filter::shared(filter) else { return self.plain.remove(filter, &number) };
        let (group_number, group) = self.groups.get(filter)?;
        let mut members = group.members.lock();
        let at = members.list.iter().position(|(other, _)| *other == number)?;
        let (_, removed) = members.list.remove(at);
        if members.list.is_empty() {
            drop(members);
            self.shared.remove(shared.filter, group_number);
            self.groups.remove(filter);
        }
        Some(removed)
    }
}

/// Who matched: the subscriber, and one of its subscriptions.
pub(crate) type Matched = Vec<(u64, OrdinarySubscription)>;

impl Subscriptions {
    /// Zero for no limit.
    pub(crate) fn new(filters_per_user: usize, subscriptions_per_user: usize) -> Self {
        Self { tries: RwLock::default(), filters: UserFilters::new(filters_per_user, subscriptions_per_user) }
    }

    /// `true` if the subscriber had none to this filter.
    pub(crate) fn subscribe(
        &self,
        filter: &str,
        number: u64,
        subscription: OrdinarySubscription,
    ) -> Result<bool, FiltersFull> {
        let user = Arc::clone(&subscription.receiver.identity.read().user);
        let mut tries = self.tries.write();
        let is_new = tries.subscribe(filter, number, subscription);
        if is_new && let Err(full) = self.filters.add(&user, filter) {
            tries.unsubscribe(filter, number);
            return Err(full);
        }
        Ok(is_new)
    }

    pub(crate) fn unsubscribe<'a>(&self, filters: impl IntoIterator<Item = &'a str>, number: u64) {
        let mut tries = self.tries.write();
        for filter in filters {
            self.end(&mut tries, filter, number);
        }
    }

    fn end(&self, tries: &mut Tries, filter: &str, number: u64) {
        if let Some(ended) = tries.unsubscribe(filter, number) {
            self.filters.remove(&ended.receiver.identity.read().user, filter);
        }
    }

    /// A session goes from one connection to the next: every message reaches one of them.
    pub(crate) fn replace<'a>(
        &self,
        old_filters: impl IntoIterator<Item = &'a str>,
        old: u64,
        new_records: impl IntoIterator<Item = &'a SubscriptionRecord>,
        new: u64,
        receiver: &Arc<Receiver>,
    ) {
        let mut tries = self.tries.write();
        for filter in old_filters {
            self.end(&mut tries, filter, old);
        }
        let user = &receiver.identity.read().user;
        for record in new_records {
            if tries.subscribe(&record.filter, new, OrdinarySubscription::new(record, 0, receiver)) {
                self.filters.restore(user, &record.filter);
            }
        }
    }

    /// A message that a member of this group was given and has not acknowledged when its session ended: to another. The group may have been
    /// left by all and begun anew since then.
    pub(crate) fn deliver_again(&self, group: &Group, message: &Arc<Message>, since: Instant, service: &impl Service) {
        let tries = self.tries.read();
        if let Some((_, group)) = tries.groups.get(&group.filter) {
            group.hand_out(message, since, service, |_| true);
        }
    }

    /// How many subscriptions are looked at for a message of this topic, about. Cheaper than looking at them.
    pub(crate) fn work(&self, topic: &str) -> usize {
        let tries = self.tries.read();
        let mut shared = tries.shared.work(topic);
        tries.shared.matching(topic, &mut |_: &u64, group: &Arc<Group>| shared += group.members.lock().list.len());
        tries.plain.work(topic) + shared
    }

    /// Hands a message to everybody who subscribes and may see it. `matched` is room to work in.
    pub(crate) fn deliver(&self, message: &Arc<Message>, service: &impl Service, matched: &mut Matched) {
        let since = Instant::now();
        let tries = self.tries.read();
        matched.clear();
        tries.plain.matching(&message.topic, &mut |number: &u64, subscription: &OrdinarySubscription| {
            if message.number > subscription.after && !(subscription.no_local && *number == message.publisher) {
                matched.push((*number, subscription.clone()));
            }
        });
        // Overlapping filters of one session deliver once, at the highest QoS and with every identifier [MQTT-3.3.4-2], [MQTT-3.3.4-5].
        matched.sort_unstable_by_key(|(number, subscription)| (*number, std::cmp::Reverse(subscription.qos)));
        for same in matched.chunk_by(|(one, _), (other, _)| one == other) {
            let [(_, first), ..] = same else { continue };
            let qos = first.qos.min(message.qos);
            if !first.receiver.takes(service, &message.topic, qos) {
                continue;
            }
            let delivered = first.receiver.mailbox.push_ordinary(Ordinary {
                message: Arc::clone(message),
                qos,
                retain: message.retain && same.iter().any(|(_, subscription)| subscription.retain_as_published),
                identifiers: same.iter().filter_map(|(_, subscription)| subscription.identifier).collect(),
                since,
                share: None,
                charge: None,
            });
            if !delivered {
                service.observe(Observation::QueueFull);
            }
        }
        matched.clear();
        tries.shared.matching(&message.topic, &mut |_: &u64, group: &Arc<Group>| {
            group.deliver(message, since, service);
        });
    }

    /// How many entries each map has.
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 4] {
        let tries = self.tries.read();
        [
            ("filters", tries.plain.len()),
            ("filter_levels", tries.plain.levels() + tries.shared.levels()),
            ("shared_filters", tries.groups.len()),
            ("user_filters", self.filters.len()),
        ]
    }
}
