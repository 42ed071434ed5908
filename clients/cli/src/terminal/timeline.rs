//! The part of a conversation that is loaded.
//!
//! Pure. Invariants: it is one piece of the conversation, without holes: pages are put on either end, what arrives on the lower one; each seq is there once, in
//! order; nothing that is newer is overwritten by something older, in whichever order pages and arrivals come. What lies beyond it is known to
//! be there ([`Timeline::has_earlier`], [`Timeline::has_later`]) and can be asked for.

use std::collections::VecDeque;

use chat_client::{AnsweredEntry, Envelope, Kind, MessageId, Seq, Timestamp, UserId};

/// Entries that are loaded at once, around what is shown.
pub(super) const ENTRIES_MAX: usize = 2_000;
/// Entries that arrive while the newest page is asked for; of more, another page is asked for.
const ARRIVED_MAX: usize = 2_000;

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Words {
    Text(String),
    Unsent,
}

/// A text of the conversation, as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) seq: Seq,
    pub(super) is_mine: bool,
    pub(super) id: Option<MessageId>,
    pub(super) at: Timestamp,
    pub(super) words: Words,
    pub(super) edited_at: Option<Timestamp>,
}

impl Entry {
    /// From a page of the history; `None` for what is no text.
    pub(super) fn answered(entry: AnsweredEntry, me: &UserId) -> Option<Self> {
        let words = match (entry.kind.as_str(), entry.text, entry.unsent) {
            ("text" | "erased", _, true) | ("erased", _, false) => Words::Unsent,
            ("text", Some(text), false) => Words::Text(text),
            _ => return None,
        };
        let is_mine = entry.from == *me;
        Some(Self { seq: entry.seq, is_mine, id: entry.id, at: entry.at, words, edited_at: entry.edited_at })
    }

    /// The text, if it is still there.
    pub(super) fn text(&self) -> Option<&str> {
        match &self.words {
            Words::Text(text) => Some(text),
            Words::Unsent => None,
        }
    }
}

/// What arrives of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    Text(Entry),
    Edit { target: Seq, text: String, at: Timestamp },
    Unsend { target: Seq },
    Erased { seq: Seq },
}

impl Arrival {
    /// `None` for kinds of later versions.
    pub(super) fn new(message: Envelope, me: &UserId) -> Option<Self> {
        let Envelope { seq, from, id, at, kind, .. } = message;
        match kind {
            Kind::Text(text) => {
                let words = Words::Text(text);
                Some(Self::Text(Entry { seq, is_mine: from == *me, id, at, words, edited_at: None }))
            }
            Kind::Edit { target, text } => Some(Self::Edit { target, text, at }),
            Kind::Unsend { target } => Some(Self::Unsend { target }),
            Kind::Erased => Some(Self::Erased { seq }),
            Kind::Other(_) => None,
        }
    }
}

/// How much is known.
#[derive(Debug, Default, PartialEq, Eq)]
enum Knowledge {
    /// Nothing, or it may have holes at its end.
    #[default]
    Stale,
    /// The newest page is asked for; what arrives meanwhile, and whether there was too much of it.
    Asked { arrived: Vec<Arrival>, overflowed: bool },
    /// All between its ends.
    Whole,
}

/// What is to be done after the newest page has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Joined {
    /// It is whole.
    Whole,
    /// Ask for the newest page again.
    AskAgain,
}

#[derive(Debug, Default)]
pub(super) struct Timeline {
    entries: VecDeque<Entry>,
    has_earlier: bool,
    has_later: bool,
    knowledge: Knowledge,
    /// Up to here the server has told what there is: what is not among the entries was deleted.
    told_to: Option<Seq>,
}

impl Timeline {
    pub(super) fn entries(&self) -> &VecDeque<Entry> {
        &self.entries
    }

    pub(super) fn has_earlier(&self) -> bool {
        self.has_earlier
    }

    pub(super) fn has_later(&self) -> bool {
        self.has_later
    }

    pub(super) fn is_whole(&self) -> bool {
        self.knowledge == Knowledge::Whole
    }

    /// Where an entry is.
    pub(super) fn position(&self, seq: Seq) -> Option<usize> {
        self.entries.binary_search_by_key(&seq, |entry| entry.seq).ok()
    }

    pub(super) fn get(&self, seq: Seq) -> Option<&Entry> {
        self.position(seq).and_then(|at| self.entries.get(at))
    }

    fn get_mut(&mut self, seq: Seq) -> Option<&mut Entry> {
        self.position(seq).and_then(|at| self.entries.get_mut(at))
    }

    pub(super) fn first_seq(&self) -> Option<Seq> {
        self.entries.front().map(|entry| entry.seq)
    }

    pub(super) fn last_seq(&self) -> Option<Seq> {
        self.entries.back().map(|entry| entry.seq)
    }

    /// The newest page is asked for from now on.
    pub(super) fn ask(&mut self) {
        if !matches!(self.knowledge, Knowledge::Asked { .. }) {
            self.knowledge = Knowledge::Asked { arrived: Vec::new(), overflowed: false };
        }
    }

    /// The newest page did not come.
    pub(super) fn not_told(&mut self) {
        self.knowledge = Knowledge::Stale;
    }

    /// There may be a hole at its end: to be asked for before it is shown again.
    pub(super) fn doubt(&mut self) {
        if self.is_whole() {
            self.knowledge = Knowledge::Stale;
        }
    }

    /// Forgets everything.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// The newest page has come. If it does not reach back to what was there, that is forgotten; unless `keep`: then it is known that there is more below.
    pub(super) fn newest(&mut self, page: Vec<Entry>, more: bool, keep: bool) -> Joined {
        let reaches = match (page.first(), self.last_seq()) {
            (Some(first), Some(last)) => !more || first.seq <= last,
            _ => !more || self.entries.is_empty(),
        };
        if reaches || !keep {
            if let (Some(first), true) = (page.first().map(|entry| entry.seq), reaches && more) {
                // The page is as the server has it: what is missing in it was deleted.
                self.entries.retain(|entry| entry.seq < first);
                self.has_earlier |= self.entries.is_empty();
            } else {
                self.entries.clear();
                self.has_earlier = more;
            }
            self.told_to = page.last().map(|entry| entry.seq).max(self.told_to);
            self.entries.extend(page);
            self.has_later = false;
        } else {
            self.has_later = true;
        }
        let Knowledge::Asked { arrived, overflowed } = std::mem::replace(&mut self.knowledge, Knowledge::Whole) else {
            return Joined::Whole;
        };
        for arrival in arrived {
            self.apply(arrival);
        }
        if overflowed {
            self.knowledge = Knowledge::Stale;
            return Joined::AskAgain;
        }
        Joined::Whole
    }

    /// A page that was asked for with the first entry as its end.
    pub(super) fn earlier(&mut self, page: Vec<Entry>, more: bool) {
        let first = self.first_seq();
        for entry in page.into_iter().rev().filter(|entry| first.is_none_or(|first| entry.seq < first)) {
            self.entries.push_front(entry);
        }
        self.has_earlier = more;
    }

    /// A page that was asked for with the last entry as its beginning.
    pub(super) fn later(&mut self, page: Vec<Entry>, more: bool) {
        let last = self.last_seq();
        self.entries.extend(page.into_iter().filter(|entry| last.is_none_or(|last| entry.seq > last)));
        self.told_to = self.last_seq().max(self.told_to);
        if !more {
            // What arrived since the page was asked for was left out.
            self.has_later = false;
            self.knowledge = Knowledge::Stale;
        }
    }

    /// Something has arrived, or was stored.
    pub(super) fn arrive(&mut self, arrival: Arrival) {
        match &mut self.knowledge {
            Knowledge::Stale => {}
            Knowledge::Whole => self.apply(arrival),
            Knowledge::Asked { arrived, overflowed } => {
                if arrived.len() == ARRIVED_MAX {
                    arrived.clear();
                    *overflowed = true;
                }
                arrived.push(arrival);
            }
        }
    }

    fn apply(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Text(entry) => self.apply_text(entry),
            Arrival::Edit { target, text, at } => {
                if let Some(entry) = self.get_mut(target)
                    && entry.words != Words::Unsent
                    && entry.edited_at.is_none_or(|edited_at| edited_at <= at)
                {
                    entry.words = Words::Text(text);
                    entry.edited_at = Some(at);
                }
            }
            Arrival::Unsend { target: seq } | Arrival::Erased { seq } => {
                if let Some(entry) = self.get_mut(seq) {
                    entry.words = Words::Unsent;
                }
            }
        }
    }

    fn apply_text(&mut self, entry: Entry) {
        let is_after_all = self.last_seq().is_none_or(|last| last < entry.seq);
        if is_after_all {
            if !self.has_later {
                self.entries.push_back(entry);
            }
            return;
        }
        let is_inside = self.first_seq().is_some_and(|first| first < entry.seq);
        let is_deleted = self.told_to.is_some_and(|told_to| entry.seq <= told_to);
        if let Err(at) = self.entries.binary_search_by_key(&entry.seq, |known| known.seq)
            && (is_inside || !self.has_earlier)
            && !is_deleted
        {
            // Own messages are known as stored before what others wrote before them arrives.
            self.entries.insert(at, entry);
        }
    }

    /// It was deleted.
    pub(super) fn remove(&mut self, seq: Seq) {
        if let Some(at) = self.position(seq) {
            self.entries.remove(at);
            self.told_to = self.told_to.max(Some(seq));
        }
    }

    /// Keeps so many entries around one of them; around the last without one. Whether any had to go.
    pub(super) fn trim(&mut self, around: Option<Seq>, entries_max: usize) -> bool {
        let surplus = self.entries.len().saturating_sub(entries_max);
        if surplus == 0 {
            return false;
        }
        let center = around.and_then(|seq| self.position(seq)).unwrap_or(self.entries.len());
        let from_front = center.saturating_sub(entries_max / 2).min(surplus);
        let from_back = surplus - from_front;
        if from_front > 0 {
            self.entries.drain(..from_front);
            self.has_earlier = true;
        }
        if from_back > 0 {
            self.entries.truncate(self.entries.len() - from_back);
            self.has_later = true;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seq(number: u64) -> Seq {
        Seq::new(number).unwrap()
    }

    fn entry(number: u64) -> Entry {
        let words = Words::Text(format!("text {number}"));
        Entry { seq: seq(number), is_mine: false, id: None, at: Timestamp::from_ms(number), words, edited_at: None }
    }

    fn page(range: std::ops::RangeInclusive<u64>) -> Vec<Entry> {
        range.map(entry).collect()
    }

    fn seqs(timeline: &Timeline) -> Vec<u64> {
        timeline.entries().iter().map(|entry| entry.seq.get()).collect()
    }

    fn loaded(range: std::ops::RangeInclusive<u64>) -> Timeline {
        let mut timeline = Timeline::default();
        timeline.ask();
        let more = *range.start() > 1;
        assert_eq!(timeline.newest(page(range), more, false), Joined::Whole);
        timeline
    }

    #[test]
    fn what_arrives_while_the_page_is_asked_for() {
        let mut timeline = Timeline::default();
        timeline.arrive(Arrival::Text(entry(9)));
        timeline.ask();
        for number in [3, 4, 11, 12] {
            timeline.arrive(Arrival::Text(entry(number)));
        }
        timeline.arrive(Arrival::Edit { target: seq(11), text: "edited".into(), at: Timestamp::from_ms(20) });
        // Those below the page are not next to it: they come with an earlier one.
        assert_eq!(timeline.newest(page(8..=10), true, false), Joined::Whole);
        assert_eq!(seqs(&timeline), [8, 9, 10, 11, 12]);
        assert_eq!(timeline.get(seq(11)).unwrap().text(), Some("edited"));
        timeline.earlier(page(1..=7), false);
        assert_eq!(seqs(&timeline), (1..=12).collect::<Vec<_>>());
        assert!(!timeline.has_earlier() && !timeline.has_later());
    }

    #[test]
    fn after_a_reconnect_it_goes_on_or_begins_anew() {
        let mut timeline = loaded(5..=10);
        timeline.ask();
        timeline.newest(page(9..=14), true, false);
        assert_eq!(seqs(&timeline), (5..=14).collect::<Vec<_>>());
        timeline.ask();
        timeline.newest(page(40..=50), true, true);
        assert_eq!(seqs(&timeline), (5..=14).collect::<Vec<_>>());
        assert!(timeline.has_later(), "somebody reads up there");
        timeline.arrive(Arrival::Text(entry(51)));
        assert_eq!(timeline.last_seq(), Some(seq(14)));
        timeline.ask();
        timeline.newest(page(40..=50), true, false);
        assert_eq!(seqs(&timeline), (40..=50).collect::<Vec<_>>());
        assert!(timeline.has_earlier() && !timeline.has_later());
    }

    #[test]
    fn too_much_while_asking_is_asked_for_again() {
        let mut timeline = Timeline::default();
        timeline.ask();
        for number in 1..=2_500 {
            timeline.arrive(Arrival::Text(entry(number)));
        }
        assert_eq!(timeline.newest(Vec::new(), false, false), Joined::AskAgain);
    }

    #[test]
    fn own_messages_are_stored_before_others_arrive() {
        let mut timeline = loaded(1..=5);
        timeline.arrive(Arrival::Text(entry(7)));
        timeline.arrive(Arrival::Text(entry(6)));
        timeline.arrive(Arrival::Text(entry(7)));
        assert_eq!(seqs(&timeline), (1..=7).collect::<Vec<_>>());
    }

    #[test]
    fn what_was_deleted_stays_away() {
        let mut timeline = loaded(1..=5);
        timeline.remove(seq(3));
        timeline.arrive(Arrival::Text(entry(3)));
        assert_eq!(seqs(&timeline), [1, 2, 4, 5]);
        timeline.ask();
        timeline.newest(vec![entry(1), entry(4), entry(5)], false, false);
        assert_eq!(seqs(&timeline), [1, 4, 5]);
        timeline.arrive(Arrival::Text(entry(2)));
        assert_eq!(seqs(&timeline), [1, 4, 5]);
    }

    #[test]
    fn older_words_do_not_return() {
        let mut timeline = loaded(1..=3);
        let edit = |text: &str, at| Arrival::Edit { target: seq(2), text: text.into(), at: Timestamp::from_ms(at) };
        timeline.arrive(edit("newer", 30));
        timeline.arrive(edit("older", 20));
        assert_eq!(timeline.get(seq(2)).unwrap().text(), Some("newer"));
        timeline.arrive(Arrival::Unsend { target: seq(2) });
        timeline.arrive(edit("newest", 40));
        timeline.arrive(Arrival::Text(entry(2)));
        assert_eq!(timeline.get(seq(2)).unwrap().words, Words::Unsent);
    }

    #[test]
    fn it_is_bounded() {
        let mut timeline = loaded(1..=3_000);
        timeline.trim(Some(seq(100)), 1_000);
        assert_eq!((timeline.first_seq(), timeline.last_seq()), (Some(seq(1)), Some(seq(1_000))));
        assert!(!timeline.has_earlier() && timeline.has_later());
        timeline.later(page(1_001..=1_200), true);
        timeline.trim(Some(seq(1_150)), 1_000);
        assert_eq!((timeline.first_seq(), timeline.last_seq()), (Some(seq(201)), Some(seq(1_200))));
        let mut timeline = loaded(1..=3_000);
        timeline.trim(None, 1_000);
        assert_eq!((timeline.first_seq(), timeline.last_seq()), (Some(seq(2_001)), Some(seq(3_000))));
    }

    proptest! {
        // A server with a growing conversation; the client pages, misses and hears in any order it can.
        #[test]
        fn never_a_hole(steps in proptest::collection::vec((0..7_u8, 1..8_u64), 1..80)) {
            let mut timeline = Timeline::default();
            let mut stored = 20_u64;
            let mut asked: Option<u64> = None;
            for (step, number) in steps {
                match step {
                    0..=1 => {
                        stored += 1;
                        timeline.arrive(Arrival::Text(entry(stored)));
                    }
                    2 => { timeline.ask(); asked = Some(stored); }
                    3 => if let Some(end) = asked.take() {
                        let begin = end.saturating_sub(number) + 1;
                        timeline.newest(page(begin..=end), begin > 1, number % 2 == 0);
                    },
                    4 => if let Some(first) = timeline.first_seq().filter(|first| first.get() > 1) {
                        let begin = (first.get() - 1).saturating_sub(number) + 1;
                        timeline.earlier(page(begin..=first.get() - 1), begin > 1);
                    },
                    5 => if let Some(last) = timeline.last_seq().filter(|_| timeline.has_later() && asked.is_none()) {
                        let end = (last.get() + number).min(stored);
                        timeline.later(page(last.get() + 1..=end), end < stored);
                    },
                    _ => {
                        timeline.trim(timeline.entries().get(usize::try_from(number).unwrap()).map(|entry| entry.seq), 10);
                    }
                }
                let seqs = seqs(&timeline);
                prop_assert!(seqs.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{seqs:?}");
                if timeline.is_whole() && !timeline.has_later() && !seqs.is_empty() {
                    prop_assert_eq!(*seqs.last().unwrap(), stored);
                }
            }
        }
    }
}
