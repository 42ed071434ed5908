//! What the server has delivered and the program has not taken yet.
//!
//! Pure but for the list through which a program gives its deliveries back. Invariants: an entry is handed to the program once, whatever the
//! connection does; acknowledgements leave in the order of arrival on the connection by which the packet came; nothing is acknowledged
//! that the program did not take. What is kept is bounded by the receive maximum, and one number for each conversation.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use chat_protocol::{ConversationId, Seq, Timestamp};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// An entry's name. The time tells it from the entry that had its number before the server began anew, or from an older backup: within a
/// conversation the server's clock never runs backwards.
pub(crate) type Key = (ConversationId, Seq, Timestamp);

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The program has it.
    Taken,
    /// The program dropped it.
    Dropped,
}

/// What programs give back, until the client's task looks.
#[derive(Debug, Default)]
pub(crate) struct Returns {
    fates: Mutex<Vec<(Key, Fate)>>,
    pub(crate) changed: Notify,
}

impl Returns {
    pub(crate) fn take(&self) -> Vec<(Key, Fate)> {
        std::mem::take(&mut self.fates.lock())
    }
}

/// Goes with a delivery.
#[derive(Debug)]
pub(crate) struct Ticket {
    key: Option<Key>,
    returns: Arc<Returns>,
}

impl Ticket {
    pub(crate) fn new(key: Key, returns: &Arc<Returns>) -> Self {
        Self { key: Some(key), returns: Arc::clone(returns) }
    }

    pub(crate) fn acknowledge(mut self) {
        self.give_back(Fate::Taken);
    }

    fn give_back(&mut self, fate: Fate) {
        if let Some(key) = self.key.take() {
            self.returns.fates.lock().push((key, fate));
            self.returns.changed.notify_one();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.give_back(Fate::Dropped);
    }
}

/// Whether the program is to have what came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// Hand it over.
    New,
    /// The program has it, or had it.
    Known,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    ByProgram,
    ByNobody,
}

/// `P` is what a packet is acknowledged by.
#[derive(Debug)]
pub(crate) struct Deliveries<P> {
    /// The last entry of each conversation that came.
    last: HashMap<ConversationId, (Seq, Timestamp)>,
    /// Not taken yet.
    held: HashMap<Key, Held>,
    /// Packets of this connection that are not acknowledged, in the order of arrival.
    packets: VecDeque<(P, Option<Key>)>,
}

impl<P> Default for Deliveries<P> {
    fn default() -> Self {
        Self { last: HashMap::new(), held: HashMap::new(), packets: VecDeque::new() }
    }
}

impl<P> Deliveries<P> {
    pub(crate) fn arrived(&mut self, key: Key, packet: P) -> Arrived {
        let (conversation, seq, at) = &key;
        let is_new = self.last.get(conversation).is_none_or(|(last, last_at)| last < seq || last_at < at);
        let arrived = match self.held.entry(key.clone()) {
            Entry::Occupied(held) if *held.get() == Held::ByProgram => Arrived::Known,
            Entry::Occupied(mut held) => {
                held.insert(Held::ByProgram);
                Arrived::New
            }
            Entry::Vacant(held) if is_new => {
                held.insert(Held::ByProgram);
                self.last.insert(conversation.clone(), (*seq, *at));
                Arrived::New
            }
            Entry::Vacant(_) => Arrived::Known,
        };
        self.packets.push_back((packet, Some(key)));
        arrived
    }

    /// Something that is nothing for the program.
    pub(crate) fn passed(&mut self, packet: P) {
        self.packets.push_back((packet, None));
    }

    pub(crate) fn returned(&mut self, key: &Key, fate: Fate) {
        match fate {
            Fate::Taken => {
                self.held.remove(key);
            }
            Fate::Dropped => {
                if let Some(held) = self.held.get_mut(key) {
                    *held = Held::ByNobody;
                }
            }
        }
    }

    /// The next packet that may be acknowledged.
    pub(crate) fn next_acknowledged(&mut self) -> Option<P> {
        let (_, key) = self.packets.front()?;
        if key.as_ref().is_some_and(|key| self.held.contains_key(key)) {
            return None;
        }
        self.packets.pop_front().map(|(packet, _)| packet)
    }

    /// The server sends what was not acknowledged again.
    pub(crate) fn disconnected(&mut self) {
        self.packets.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(seq: u64) -> Key {
        key_at(seq, seq)
    }

    fn key_at(seq: u64, at: u64) -> Key {
        (ConversationId::parse("alice:bob").unwrap(), Seq::new(seq).unwrap(), Timestamp::from_ms(at))
    }

    fn acknowledged(deliveries: &mut Deliveries<u16>) -> Vec<u16> {
        std::iter::from_fn(|| deliveries.next_acknowledged()).collect()
    }

    #[test]
    fn acknowledgements_keep_their_order() {
        let mut deliveries = Deliveries::default();
        for seq in 1..=3_u16 {
            assert_eq!(deliveries.arrived(key(seq.into()), seq), Arrived::New);
        }
        deliveries.returned(&key(2), Fate::Taken);
        assert_eq!(acknowledged(&mut deliveries), [0_u16; 0]);
        deliveries.returned(&key(1), Fate::Taken);
        assert_eq!(acknowledged(&mut deliveries), [1, 2]);
        deliveries.returned(&key(3), Fate::Taken);
        assert_eq!(acknowledged(&mut deliveries), [3]);
    }

    #[test]
    fn what_comes_again_is_known() {
        let mut deliveries = Deliveries::default();
        assert_eq!(deliveries.arrived(key(1), 1), Arrived::New);
        assert_eq!(deliveries.arrived(key(2), 2), Arrived::New);
        deliveries.returned(&key(1), Fate::Taken);
        deliveries.disconnected();
        assert_eq!(acknowledged(&mut deliveries), [0_u16; 0]);
        assert_eq!(deliveries.arrived(key(1), 11), Arrived::Known, "taken");
        assert_eq!(deliveries.arrived(key(2), 12), Arrived::Known, "with the program");
        assert_eq!(acknowledged(&mut deliveries), [11]);
        deliveries.returned(&key(2), Fate::Taken);
        assert_eq!(acknowledged(&mut deliveries), [12]);
    }

    #[test]
    fn what_was_dropped_comes_again() {
        let mut deliveries = Deliveries::default();
        assert_eq!(deliveries.arrived(key(1), 1), Arrived::New);
        assert_eq!(deliveries.arrived(key(2), 2), Arrived::New);
        deliveries.returned(&key(1), Fate::Dropped);
        deliveries.returned(&key(2), Fate::Taken);
        assert_eq!(acknowledged(&mut deliveries), [0_u16; 0]);
        deliveries.disconnected();
        assert_eq!(deliveries.arrived(key(1), 11), Arrived::New);
        assert_eq!(deliveries.arrived(key(2), 12), Arrived::Known);
        deliveries.returned(&key(1), Fate::Taken);
        assert_eq!(acknowledged(&mut deliveries), [11, 12]);
    }

    /// After an older backup was put back, or everything was lost, the server gives the same numbers again.
    #[test]
    fn a_server_may_begin_anew() {
        let mut deliveries = Deliveries::default();
        for seq in 1..=5_u16 {
            assert_eq!(deliveries.arrived(key(seq.into()), seq), Arrived::New);
        }
        for seq in 1..=4 {
            deliveries.returned(&key(seq), Fate::Taken);
        }
        deliveries.disconnected();
        assert_eq!(deliveries.arrived(key(3), 13), Arrived::Known, "it was in the backup");
        assert_eq!(deliveries.arrived(key_at(4, 100), 14), Arrived::New);
        assert_eq!(deliveries.arrived(key_at(5, 100), 15), Arrived::New, "though the program holds another number 5");
        deliveries.returned(&key(5), Fate::Taken);
        assert_eq!(acknowledged(&mut deliveries), [13]);
        deliveries.returned(&key_at(4, 100), Fate::Taken);
        deliveries.returned(&key_at(5, 100), Fate::Taken);
        assert_eq!(acknowledged(&mut deliveries), [14, 15]);
    }

    #[test]
    fn a_delivery_says_what_becomes_of_it() {
        let returns = Arc::new(Returns::default());
        Ticket::new(key(1), &returns).acknowledge();
        drop(Ticket::new(key(2), &returns));
        assert_eq!(returns.take(), [(key(1), Fate::Taken), (key(2), Fate::Dropped)]);
        assert_eq!(returns.take(), []);
    }

    proptest! {
        /// The server sends from its cursor after every reconnect; the program takes what it has in any order.
        #[test]
        fn each_once_and_in_order(steps in proptest::collection::vec(0..6_u8, 1..200)) {
            let mut deliveries = Deliveries::default();
            let (mut cursor, mut next, mut handed, mut with_program) = (0_u64, 1_u64, Vec::new(), Vec::new());
            for (at, step) in steps.into_iter().enumerate() {
                match step {
                    0..=2 => {
                        if deliveries.arrived(key(next), next) == Arrived::New {
                            handed.push(next);
                            with_program.push(next);
                        }
                        next += 1;
                    }
                    3 | 4 if !with_program.is_empty() => {
                        let taken = with_program.swap_remove(at % with_program.len());
                        deliveries.returned(&key(taken), Fate::Taken);
                    }
                    5 => {
                        deliveries.disconnected();
                        next = cursor + 1;
                    }
                    _ => {}
                }
                while let Some(packet) = deliveries.next_acknowledged() {
                    prop_assert_eq!(packet, cursor + 1);
                    prop_assert!(!with_program.contains(&packet));
                    cursor = packet;
                }
            }
            let once: Vec<u64> = (1..=handed.len() as u64).collect();
            prop_assert_eq!(handed, once);
        }
    }
}
