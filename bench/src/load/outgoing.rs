//! What a client has published and not had acknowledged: which packet identifiers are in use. Pure.

/// Publishes under way; as many as there are slots.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// When what is under way was due, by packet identifier less one; [`FREE`] if nothing is.
    due_us: Box<[u64]>,
    next: usize,
    under_way: usize,
}

const FREE: u64 = u64::MAX;

impl Outgoing {
    /// At most so many under way, up to 65,535.
    pub(crate) fn new(slots: u16) -> Self {
        Self { due_us: vec![FREE; usize::from(slots.max(1))].into(), next: 0, under_way: 0 }
    }

    /// A packet identifier for a message; `None` while the next one is still in use.
    pub(crate) fn begin(&mut self, due_us: u64) -> Option<u16> {
        let slot = &mut self.due_us[self.next];
        if *slot != FREE {
            return None;
        }
        *slot = due_us.min(FREE - 1);
        self.next += 1;
        self.under_way += 1;
        let packet_id = u16::try_from(self.next).ok();
        self.next %= self.due_us.len();
        packet_id
    }

    /// When the message was due that is acknowledged; `None` if there is none under way with this packet identifier.
    pub(crate) fn acknowledged(&mut self, packet_id: u16) -> Option<u64> {
        let slot = self.due_us.get_mut(usize::from(packet_id).checked_sub(1)?)?;
        let due_us = std::mem::replace(slot, FREE);
        if due_us == FREE {
            return None;
        }
        self.under_way -= 1;
        Some(due_us)
    }

    pub(crate) fn under_way(&self) -> usize {
        self.under_way
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packet_identifiers_are_not_used_twice_at_a_time() {
        let mut outgoing = Outgoing::new(3);
        assert_eq!([1, 2, 3].map(|due_us| outgoing.begin(due_us)), [Some(1), Some(2), Some(3)]);
        assert_eq!(outgoing.begin(4), None);
        // The next in turn is still in use, though another is free.
        assert_eq!(outgoing.acknowledged(2), Some(2));
        assert_eq!(outgoing.begin(4), None);
        assert_eq!(outgoing.acknowledged(1), Some(1));
        assert_eq!(outgoing.begin(4), Some(1));
        assert_eq!(outgoing.under_way(), 2);
    }

    #[test]
    fn acknowledgements_of_nothing_are_seen() {
        let mut outgoing = Outgoing::new(3);
        assert_eq!([0, 1, 4].map(|packet_id| outgoing.acknowledged(packet_id)), [None; 3]);
        outgoing.begin(7);
        assert_eq!(outgoing.acknowledged(1), Some(7));
        assert_eq!(outgoing.acknowledged(1), None);
        assert_eq!(outgoing.under_way(), 0);
    }
}
