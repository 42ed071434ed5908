//! A conversation as the chat knows it: how it stands, what is loaded, what is on its way, what is being written.
//!
//! Pure. Invariants: the peer's and the own cursor only advance; a message that was sent here is shown once: as on its way, or in the timeline.

use std::time::Instant;

use chat_client::{ConversationOk, MessageId, Seq, Timestamp, UserId};

use super::Now;
use super::compose::Editor;
use super::timeline::{Arrival, Entry, Timeline, Words};

/// Unread messages that are counted one by one.
const COUNTED_MAX: usize = 1_000;

/// What is shown in a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    Entry(Seq),
    /// By its key.
    Outgoing(u64),
}

/// Where the timeline stands on the screen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Scroll {
    /// The newest at the bottom, and so on.
    #[default]
    Bottom,
    /// The row of an item in which this byte of its text is, so many rows below the timeline's top; above it if negative.
    At { item: Item, byte: usize, row: isize },
}

/// An end of what is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Upper,
    Lower,
}

/// How a message is doing that is not stored yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Waiting,
    /// Why not.
    NotSent(String),
}

/// A message that is on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) key: u64,
    /// Known as soon as it is in the outbox.
    pub(super) id: Option<MessageId>,
    pub(super) text: String,
    pub(super) queued_at: Timestamp,
    pub(super) progress: Progress,
}

/// The last text, for the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Last {
    pub(super) seq: Seq,
    pub(super) is_mine: bool,
    pub(super) at: Timestamp,
    /// `None` if it was unsent.
    pub(super) text: Option<String>,
}

/// What the user has not read: as the server counted it up to some entry, and those that came since.
#[derive(Debug, Default)]
struct Unread {
    counted: u64,
    counted_to: u64,
    since: Vec<Seq>,
}

/// What is being written, and what for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Draft {
    pub(super) editor: Editor,
    /// The message that is given other words, and the draft that waits meanwhile.
    pub(super) editing: Option<(Seq, Editor)>,
}

#[derive(Debug)]
pub(super) struct Conversation {
    pub(super) peer: UserId,
    /// What has reached the peer, and what the peer has read.
    pub(super) delivered: u64,
    pub(super) read: u64,
    pub(super) my_read: u64,
    pub(super) is_blocked: bool,
    pub(super) last: Option<Last>,
    /// When anything last happened here.
    pub(super) active_ms: u64,
    unread: Unread,
    pub(super) timeline: Timeline,
    pub(super) outgoing: Vec<Outgoing>,
    /// The last that was on its way and is an entry now.
    pub(super) landed: Option<(Item, Item)>,
    pub(super) draft: Draft,
    pub(super) scroll: Scroll,
    /// The line that says what is new is above the first of the peer's after this seq.
    pub(super) unread_after: Option<u64>,
    /// The peer is typing, until then.
    pub(super) typing_until: Option<Instant>,
    /// A page is asked for, by this number, for this end.
    pub(super) page_asked: Option<(u64, End)>,
    /// The newest page is asked for.
    pub(super) newest_asked: Option<u64>,
    /// When it was shown last, in the order of showing.
    pub(super) shown: u64,
}

impl Conversation {
    pub(super) fn new(peer: UserId) -> Self {
        Self {
            peer,
            delivered: 0,
            read: 0,
            my_read: 0,
            is_blocked: false,
            last: None,
            active_ms: 0,
            unread: Unread::default(),
            timeline: Timeline::default(),
            outgoing: Vec::new(),
            landed: None,
            draft: Draft::default(),
            scroll: Scroll::Bottom,
            unread_after: None,
            typing_until: None,
            page_asked: None,
            newest_asked: None,
            shown: 0,
        }
    }

    pub(super) fn unread(&self) -> u64 {
        self.unread.counted + u64::try_from(self.unread.since.len()).unwrap_or(u64::MAX)
    }

    /// As the server says.
    pub(super) fn stand(&mut self, told: ConversationOk, me: &UserId) {
        let standing = told.standing;
        self.receipt(standing.delivered, standing.read);
        self.is_blocked = standing.blocked;
        self.my_read = self.my_read.max(standing.my_read);
        let told_to = told.last.as_ref().map_or(0, |last| last.seq.get());
        let my_read = self.my_read;
        self.unread.since.retain(|seq| seq.get() > told_to && seq.get() > my_read);
        // What was read here meanwhile is not unread because the answer is older.
        self.unread.counted = if standing.my_read < my_read && my_read >= told_to { 0 } else { told.unread };
        self.unread.counted_to = told_to;
        if let Some(entry) = told.last.and_then(|last| Entry::answered(last, me)) {
            self.active_ms = self.active_ms.max(entry.at.as_ms());
            self.note_last(&entry);
        }
    }

    pub(super) fn receipt(&mut self, delivered: u64, read: u64) {
        self.delivered = self.delivered.max(delivered).max(read);
        self.read = self.read.max(read);
    }

    /// The user has read up to here.
    pub(super) fn read_to(&mut self, seq: u64) {
        self.my_read = self.my_read.max(seq);
        let my_read = self.my_read;
        if my_read >= self.unread.counted_to {
            self.unread.counted = 0;
        }
        self.unread.since.retain(|seq| seq.get() > my_read);
    }

    /// Something has arrived, or was stored. Whether it is a new message of the peer.
    pub(super) fn arrive(&mut self, arrival: Arrival) -> bool {
        let mut is_news = false;
        match &arrival {
            Arrival::Text(entry) => {
                self.active_ms = self.active_ms.max(entry.at.as_ms());
                let seq = entry.seq.get();
                if entry.is_mine {
                    // Who answers has read.
                    if seq > self.unread.counted_to {
                        self.unread.counted = 0;
                    }
                    self.unread.since.retain(|unread| unread.get() > seq);
                    if let Some(id) = &entry.id {
                        self.land(id, entry.seq);
                    }
                } else {
                    self.typing_until = None;
                    let is_unread = seq > self.my_read && seq > self.unread.counted_to;
                    is_news = is_unread && !self.unread.since.contains(&entry.seq);
                    if is_news && self.unread.since.len() < COUNTED_MAX {
                        self.unread.since.push(entry.seq);
                    }
                }
                self.note_last(entry);
            }
            Arrival::Edit { target, text, .. } => {
                if let Some(last) = self.last.as_mut().filter(|last| last.seq == *target && last.text.is_some()) {
                    last.text = Some(text.clone());
                }
            }
            Arrival::Unsend { target: seq } | Arrival::Erased { seq } => {
                if let Some(last) = self.last.as_mut().filter(|last| last.seq == *seq) {
                    last.text = None;
                }
            }
        }
        self.timeline.arrive(arrival);
        is_news
    }

    fn note_last(&mut self, entry: &Entry) {
        let is_later = self.last.as_ref().is_none_or(|last| last.seq <= entry.seq);
        if is_later {
            let text = match &entry.words {
                Words::Text(text) => Some(beginning(text)),
                Words::Unsent => None,
            };
            self.last = Some(Last { seq: entry.seq, is_mine: entry.is_mine, at: entry.at, text });
        }
    }

    /// A message that was on its way is stored.
    pub(super) fn stored(&mut self, key: u64, id: MessageId, seq: Seq, at: Timestamp) {
        let Some(outgoing) = self.outgoing.iter_mut().find(|outgoing| outgoing.key == key) else { return };
        outgoing.id = Some(id.clone());
        let words = Words::Text(outgoing.text.clone());
        self.arrive(Arrival::Text(Entry { seq, is_mine: true, id: Some(id), at, words, edited_at: None }));
    }

    /// If this was on its way, it is an entry now; whoever looks at it goes on looking at it.
    fn land(&mut self, id: &MessageId, seq: Seq) {
        let Some(place) = self.outgoing.iter().position(|outgoing| outgoing.id.as_ref() == Some(id)) else { return };
        let (was, is) = (Item::Outgoing(self.outgoing.remove(place).key), Item::Entry(seq));
        self.landed = Some((was, is));
        if let Scroll::At { item, .. } = &mut self.scroll
            && *item == was
        {
            *item = is;
        }
    }

    /// A message is in the outbox, under this id. It may have been stored and delivered before this was said.
    pub(super) fn queued(&mut self, key: u64, id: MessageId) {
        let Some(outgoing) = self.outgoing.iter_mut().find(|outgoing| outgoing.key == key) else { return };
        outgoing.id = Some(id.clone());
        let known = self.timeline.entries().iter().rev().take(100).find(|entry| entry.id.as_ref() == Some(&id));
        if let Some(seq) = known.map(|entry| entry.seq) {
            self.land(&id, seq);
        }
    }

    /// Keeps so many entries around what is shown.
    pub(super) fn trim(&mut self, entries_max: usize) {
        let around = match self.scroll {
            Scroll::At { item: Item::Entry(seq), .. } => Some(seq),
            _ => None,
        };
        if self.timeline.trim(around, entries_max) {
            // A page that is under way would leave a hole.
            self.page_asked = None;
        }
    }

    /// Of the peer's messages that are loaded, the last.
    pub(super) fn last_of_peer(&self) -> Option<Seq> {
        self.timeline.entries().iter().rev().find(|entry| !entry.is_mine).map(|entry| entry.seq)
    }

    /// Of the own messages that are loaded, the last that has words.
    pub(super) fn last_of_mine(&self) -> Option<Seq> {
        self.timeline
            .entries()
            .iter()
            .rev()
            .find(|entry| entry.is_mine && entry.text().is_some())
            .map(|entry| entry.seq)
    }

    pub(super) fn is_typing(&self, now: Now) -> bool {
        self.typing_until.is_some_and(|until| now.instant < until)
    }

    /// The text of an item.
    pub(super) fn text_of(&self, item: Item) -> Option<&str> {
        match item {
            Item::Entry(seq) => self.timeline.get(seq).and_then(Entry::text),
            Item::Outgoing(key) => self.outgoing(key).map(|outgoing| outgoing.text.as_str()),
        }
    }

    pub(super) fn outgoing(&self, key: u64) -> Option<&Outgoing> {
        self.outgoing.iter().find(|outgoing| outgoing.key == key)
    }
}

/// Enough of a text for a row of the list.
fn beginning(text: &str) -> String {
    text[..text.floor_char_boundary(400)].to_owned()
}
