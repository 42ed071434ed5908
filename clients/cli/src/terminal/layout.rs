//! What goes where: the parts of the screen, and the rows of a timeline.
//!
//! Pure; rows are made for what is on the screen and a little around it, never for all that is loaded. Invariant: a timeline that is scrolled up hangs on one row of
//! one message, its anchor: whatever is put on top or below, or becomes wider or narrower, that row stays where it is.

use std::collections::VecDeque;
use std::ops::Range;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use ratatui::layout::Rect;

use super::clock;
use super::compose::Place;
use super::conversation::{Conversation, Item, Scroll};
use super::timeline::{Entry, Words};
use super::wrap;
use crate::safe;

/// From so many columns on the list and the timeline are side by side.
const SIDE_BY_SIDE_COLUMNS: u16 = 72;
/// Smaller terminals show nothing but that they are too small.
const COLUMNS_MIN: u16 = 24;
const ROWS_MIN: u16 = 8;
/// Rows that the editor takes at most.
const COMPOSE_ROWS_MAX: usize = 6;
/// Left of a text: whose it is, and a space.
pub(super) const MARGIN: u16 = 2;
/// Right of a text: time and ticks.
pub(super) const GUTTER: u16 = 10;
/// Rows of a conversation in the list.
pub(super) const LIST_ITEM_ROWS: u16 = 2;
/// A pause after which the name is said again.
const PAUSE_MS: u64 = 10 * 60 * 1_000;
/// Behind a text that was edited.
const EDITED: &str = " (edited)";
/// In place of a text that was unsent.
const UNSENT: &str = "was unsent";

/// Which half is on a narrow screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    List,
    Timeline,
}

/// The parts of the screen; those that are not shown have no columns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Areas {
    pub(super) is_too_small: bool,
    pub(super) banner: Rect,
    pub(super) list_title: Rect,
    pub(super) list: Rect,
    /// Between list and timeline.
    pub(super) border: Rect,
    pub(super) title: Rect,
    pub(super) timeline: Rect,
    /// Who is typing, and what is to be said.
    pub(super) status: Rect,
    pub(super) compose: Rect,
    /// Help, in a few words.
    pub(super) keys: Rect,
}

/// Divides the screen.
pub(super) fn areas(columns: u16, rows: u16, has_banner: bool, half: Half, draft: &dyn Fn(usize) -> usize) -> Areas {
    if columns < COLUMNS_MIN || rows < ROWS_MIN {
        return Areas { is_too_small: true, ..Areas::default() };
    }
    let top = u16::from(has_banner);
    let banner = Rect::new(0, 0, columns, top);
    let keys = Rect::new(0, rows - 1, columns, 1);
    let height = rows - 1 - top;
    let list_columns = if columns >= SIDE_BY_SIDE_COLUMNS {
        (columns / 3).clamp(24, 36)
    } else if half == Half::List {
        columns
    } else {
        0
    };
    let list_title = Rect::new(0, top, list_columns, 1.min(list_columns));
    let list = Rect::new(0, top + 1, list_columns, height - 1);
    if list_columns == columns {
        return Areas { banner, list_title, list, keys, ..Areas::default() };
    }
    let border = Rect::new(list_columns, top, u16::from(list_columns > 0), height);
    let left = border.right();
    let width = columns - left;
    let compose_rows = draft(editor_room(width)).clamp(1, COMPOSE_ROWS_MAX).min(usize::from(height / 3).max(1));
    let compose_rows = u16::try_from(compose_rows).unwrap_or(1);
    let timeline_rows = height.saturating_sub(2 + compose_rows);
    let title = Rect::new(left, top, width, 1);
    let timeline = Rect::new(left, top + 1, width, timeline_rows);
    let status = Rect::new(left, timeline.bottom(), width, 1);
    let compose = Rect::new(left, status.bottom(), width, compose_rows);
    Areas { is_too_small: false, banner, list_title, list, border, title, timeline, status, compose, keys }
}

/// Columns that the editor's text has in an area: left of it is `> `, right of it room for the cursor.
pub(super) fn editor_room(width: u16) -> usize {
    usize::from(width.saturating_sub(MARGIN + 1)).max(1)
}

/// The first row of an editor that is on the screen, where so many are.
pub(super) fn editor_top(place: &Place, rows: usize) -> usize {
    place.row.saturating_sub(rows.saturating_sub(1))
}

/// Columns that texts have in a timeline.
pub(super) fn text_room(width: u16) -> usize {
    usize::from(width.saturating_sub(MARGIN + GUTTER)).max(1)
}

/// A row of a timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Row {
    /// There is nothing before.
    Beginning,
    Day(Date),
    /// What follows is new.
    Unread,
    Name {
        is_mine: bool,
    },
    /// Part of a text as it is shown: of the item in this place.
    Text {
        place: usize,
        range: Range<usize>,
        is_first: bool,
    },
    /// Why the item in this place was not sent.
    NotSent {
        place: usize,
    },
}

/// A text as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) text: String,
    /// Where the author's words end.
    pub(super) words_end: usize,
}

/// The rows of a conversation at some width, each made when it is asked for.
pub(super) struct Flow<'a> {
    conversation: &'a Conversation,
    zone: &'a TimeZone,
    room: usize,
    /// The item above which the new ones begin.
    unread_place: Option<usize>,
}

/// What of a timeline is on the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// Empty rows above, where all there is does not fill the screen.
    pub(super) blank: usize,
    pub(super) rows: Vec<Row>,
    /// Where it stands, in its simplest form.
    pub(super) scroll: Scroll,
    /// Places of the first and the last item that are on the screen.
    pub(super) first: usize,
    pub(super) last: usize,
}

impl<'a> Flow<'a> {
    pub(super) fn new(conversation: &'a Conversation, zone: &'a TimeZone, room: usize) -> Self {
        let entries = conversation.timeline.entries();
        let unread_place = conversation.unread_after.and_then(|after| {
            let begin = entries.partition_point(|entry| entry.seq.get() <= after);
            (begin..entries.len()).find(|at| entries.get(*at).is_some_and(|entry| !entry.is_mine))
        });
        // Above what is not loaded it would be in the wrong place.
        let unread_place = unread_place.filter(|place| *place > 0 || !conversation.timeline.has_earlier());
        Self { conversation, zone, room, unread_place }
    }

    /// How many items there are.
    pub(super) fn len(&self) -> usize {
        let entries = self.conversation.timeline.entries().len();
        // What is on its way stands behind the newest.
        if self.conversation.timeline.has_later() { entries } else { entries + self.conversation.outgoing.len() }
    }

    fn entry(&self, place: usize) -> Option<&'a Entry> {
        self.conversation.timeline.entries().get(place)
    }

    /// The item in a place.
    pub(super) fn item(&self, place: usize) -> Option<Item> {
        let entries = self.conversation.timeline.entries();
        match entries.get(place) {
            Some(entry) => Some(Item::Entry(entry.seq)),
            None => self.conversation.outgoing.get(place - entries.len()).map(|outgoing| Item::Outgoing(outgoing.key)),
        }
    }

    /// Where an item is.
    pub(super) fn place_of(&self, item: Item) -> Option<usize> {
        let place = match item {
            Item::Entry(seq) => self.conversation.timeline.position(seq),
            Item::Outgoing(key) => self
                .conversation
                .outgoing
                .iter()
                .position(|outgoing| outgoing.key == key)
                .map(|at| at + self.conversation.timeline.entries().len()),
        };
        place.filter(|place| *place < self.len())
    }

    /// An item's text, safe for a terminal.
    pub(super) fn shown(&self, place: usize) -> Shown {
        let entries = self.conversation.timeline.entries().len();
        let (text, is_edited) = match self.entry(place) {
            Some(Entry { words: Words::Text(text), edited_at, .. }) => (text.as_str(), edited_at.is_some()),
            Some(Entry { words: Words::Unsent, .. }) => (UNSENT, false),
            None => (self.conversation.outgoing.get(place - entries).map_or("", |outgoing| &outgoing.text), false),
        };
        let mut shown = String::with_capacity(text.len() + 16);
        for (number, line) in safe::lines(text).enumerate() {
            if number > 0 {
                shown.push('\n');
            }
            shown.push_str(&line);
        }
        let words_end = shown.len();
        if is_edited {
            shown.push_str(EDITED);
        }
        Shown { text: shown, words_end }
    }

    /// Whose an item is, and from when.
    fn author(&self, place: usize) -> (bool, u64) {
        match self.entry(place) {
            Some(entry) => (entry.is_mine, entry.at.as_ms()),
            None => {
                let at = place - self.conversation.timeline.entries().len();
                (true, self.conversation.outgoing.get(at).map_or(0, |outgoing| outgoing.queued_at.as_ms()))
            }
        }
    }

    /// The rows of an item, with those above it that depend on what is before it.
    fn rows(&self, place: usize) -> Vec<Row> {
        let mut rows = Vec::new();
        let (is_mine, at_ms) = self.author(place);
        let day = clock::day(at_ms, self.zone);
        let before = place.checked_sub(1).map(|before| self.author(before));
        if before.is_none() && !self.conversation.timeline.has_earlier() {
            rows.push(Row::Beginning);
        }
        let is_new_day = before.is_none_or(|(_, before_ms)| clock::day(before_ms, self.zone) != day);
        if is_new_day {
            rows.push(Row::Day(day));
        }
        let is_unread_place = self.unread_place == Some(place);
        if is_unread_place {
            rows.push(Row::Unread);
        }
        let goes_on = before
            .is_some_and(|(was_mine, before_ms)| was_mine == is_mine && at_ms.saturating_sub(before_ms) < PAUSE_MS);
        if is_new_day || is_unread_place || !goes_on {
            rows.push(Row::Name { is_mine });
        }
        let shown = self.shown(place);
        for (number, range) in wrap::wrap(&shown.text, self.room).into_iter().enumerate() {
            rows.push(Row::Text { place, range, is_first: number == 0 });
        }
        if let Some(outgoing) = place
            .checked_sub(self.conversation.timeline.entries().len())
            .and_then(|at| self.conversation.outgoing.get(at))
            && matches!(outgoing.progress, super::conversation::Progress::NotSent(_))
        {
            rows.push(Row::NotSent { place });
        }
        rows
    }

    /// What is on a screen of so many rows.
    pub(super) fn place(&self, scroll: Scroll, height: usize) -> Placement {
        let anchored = match scroll {
            Scroll::Bottom => None,
            Scroll::At { item, byte, row } => {
                self.anchor(item, byte).and_then(|(at, item, byte)| self.hung_on(at, item, byte, row, height))
            }
        };
        anchored.unwrap_or_else(|| {
            let placement = self.hung_below(height);
            // What is loaded ends here, but the conversation does not: what is put below must not push it up.
            let hung = if self.conversation.timeline.has_later() { self.topmost(&placement) } else { None };
            Placement { scroll: hung.unwrap_or(Scroll::Bottom), ..placement }
        })
    }

    /// An anchor's place; if it is gone, that of what followed it.
    fn anchor(&self, item: Item, byte: usize) -> Option<(usize, Item, usize)> {
        if let Some(at) = self.place_of(item) {
            return Some((at, item, byte));
        }
        let entries = self.conversation.timeline.entries();
        let at = match item {
            Item::Entry(seq) => entries.partition_point(|entry| entry.seq < seq),
            Item::Outgoing(_) => entries.len(),
        };
        let at = at.min(self.len().checked_sub(1)?);
        Some((at, self.item(at)?, 0))
    }

    fn hung_below(&self, height: usize) -> Placement {
        let mut rows = VecDeque::new();
        let end = self.len();
        let mut first = end;
        while rows.len() < height && first > 0 {
            first -= 1;
            for row in self.rows(first).into_iter().rev() {
                rows.push_front(row);
            }
        }
        let surplus = rows.len().saturating_sub(height);
        rows.drain(..surplus);
        let blank = height - rows.len();
        Placement { blank, rows: rows.into(), scroll: Scroll::Bottom, first, last: end.saturating_sub(1) }
    }

    /// `None` if the last row would not be at the bottom or below it.
    fn hung_on(&self, at: usize, item: Item, byte: usize, row: isize, height: usize) -> Option<Placement> {
        let own = self.rows(at);
        let is_anchor = |row: &Row| matches!(row, Row::Text { range, .. } if range.start <= byte);
        let anchor =
            own.iter().rposition(is_anchor).or_else(|| own.iter().position(|row| matches!(row, Row::Text { .. })))?;
        let mut rows: VecDeque<Row> = own.into();
        // The screen's row that the first of the rows is on.
        let mut top = row - isize::try_from(anchor).ok()?;
        let (mut first, mut last) = (at, at);
        while top > 0 && first > 0 {
            first -= 1;
            for row in self.rows(first).into_iter().rev() {
                rows.push_front(row);
                top -= 1;
            }
        }
        let mut row = row;
        if top > 0 {
            // There is nothing above: it moves up.
            row -= top;
            top = 0;
        }
        let hidden = usize::try_from(-top).ok()?;
        while rows.len() < hidden + height && last + 1 < self.len() {
            last += 1;
            rows.extend(self.rows(last));
        }
        let is_end = last + 1 >= self.len();
        let below = rows.len().checked_sub(hidden + height)?;
        if is_end && below == 0 && !self.conversation.timeline.has_later() {
            return None;
        }
        rows.truncate(hidden + height);
        rows.drain(..hidden);
        let scroll = Scroll::At { item, byte, row };
        Some(Placement { blank: 0, rows: rows.into(), scroll, first, last })
    }

    /// The same, moved by so many rows; up if positive.
    pub(super) fn scrolled(&self, scroll: Scroll, height: usize, rows: isize) -> Scroll {
        let placement = self.place(scroll, height);
        let hung = self.topmost(&placement).unwrap_or(placement.scroll);
        let Scroll::At { item, byte, row } = hung else { return Scroll::Bottom };
        let moved = self.place(Scroll::At { item, byte, row: row + rows }, height);
        match moved.scroll {
            Scroll::Bottom => Scroll::Bottom,
            // It hangs on what is on the screen.
            Scroll::At { .. } => self.topmost(&moved).unwrap_or(moved.scroll),
        }
    }

    /// The same, hung on the topmost row of a text.
    fn topmost(&self, placement: &Placement) -> Option<Scroll> {
        placement.rows.iter().enumerate().find_map(|(number, row)| {
            let Row::Text { place, range, .. } = row else { return None };
            let row = isize::try_from(number + placement.blank).ok()?;
            Some(Scroll::At { item: self.item(*place)?, byte: range.start, row })
        })
    }

    /// Moved just so far that an item is on the screen.
    pub(super) fn showing(&self, scroll: Scroll, height: usize, item: Item, byte: usize) -> Scroll {
        let placement = self.place(scroll, height);
        let is_there = placement.rows.iter().any(|row| {
            matches!(row, Row::Text { place, range, .. } if self.item(*place) == Some(item) && range.start <= byte && byte <= range.end)
        });
        if is_there {
            return scroll;
        }
        let row = isize::try_from(height / 3).unwrap_or(0);
        self.place(Scroll::At { item, byte, row }, height).scroll
    }
}

#[cfg(test)]
mod tests {
    use chat_client::{Seq, Timestamp, UserId};
    use proptest::prelude::*;

    use super::*;

    fn entry(number: u64) -> Entry {
        let text = format!("message {number} {}", "word ".repeat(usize::try_from(number % 13).unwrap()));
        Entry {
            seq: Seq::new(number).unwrap(),
            is_mine: number.is_multiple_of(3),
            id: None,
            at: Timestamp::from_ms(number * 3_600_000),
            words: Words::Text(text.trim_end().to_owned()),
            edited_at: None,
        }
    }

    fn conversation(range: std::ops::RangeInclusive<u64>) -> Conversation {
        let mut conversation = Conversation::new(UserId::parse("bob").unwrap());
        conversation.timeline.ask();
        let more = *range.start() > 1;
        conversation.timeline.newest(range.map(entry).collect(), more, false);
        conversation
    }

    fn flow(conversation: &Conversation, room: usize) -> Flow<'_> {
        static UTC: TimeZone = TimeZone::UTC;
        Flow::new(conversation, &UTC, room)
    }

    /// Seq and byte of the text row on each row of the screen.
    fn screen(flow: &Flow<'_>, scroll: Scroll, height: usize) -> Vec<Option<(Item, usize)>> {
        let placement = flow.place(scroll, height);
        let mut screen = vec![None; placement.blank];
        screen.extend(placement.rows.iter().map(|row| match row {
            Row::Text { place, range, .. } => Some((flow.item(*place).unwrap(), range.start)),
            _ => None,
        }));
        assert_eq!(screen.len(), height);
        screen
    }

    #[test]
    fn areas_at_all_sizes() {
        for columns in 0..150 {
            for rows in 0..60 {
                for half in [Half::List, Half::Timeline] {
                    let areas = areas(columns, rows, true, half, &|_| 9);
                    let parts = [
                        areas.list,
                        areas.title,
                        areas.timeline,
                        areas.status,
                        areas.compose,
                        areas.keys,
                        areas.border,
                    ];
                    for part in parts {
                        assert!(part.right() <= columns && part.bottom() <= rows, "{columns}x{rows} {areas:?}");
                    }
                    assert!(areas.timeline.intersection(areas.list).area() == 0);
                    if !areas.is_too_small {
                        assert_eq!(areas.list.width > 0, columns >= 72 || half == Half::List);
                        assert_eq!(areas.timeline.height > 0, columns >= 72 || half == Half::Timeline);
                    }
                }
            }
        }
    }

    #[test]
    fn few_rows_stand_at_the_bottom() {
        let conversation = conversation(1..=2);
        let flow = flow(&conversation, 40);
        let placement = flow.place(Scroll::Bottom, 20);
        assert!(placement.blank > 0);
        assert_eq!(placement.rows[0], Row::Beginning);
        assert_eq!(flow.scrolled(Scroll::Bottom, 20, 5), Scroll::Bottom);
        assert_eq!(flow.place(flow.scrolled(Scroll::Bottom, 20, 5), 20), placement);
    }

    #[test]
    fn a_page_on_top_moves_nothing() {
        let mut conversation = conversation(101..=200);
        let height = 20;
        let scroll = flow(&conversation, 30).scrolled(Scroll::Bottom, height, 10_000);
        let before = screen(&flow(&conversation, 30), scroll, height);
        assert!(
            before[0].is_none()
                && before.iter().flatten().any(|(item, _)| *item == Item::Entry(Seq::new(101).unwrap()))
        );
        conversation.timeline.earlier((51..=100).map(entry).collect(), true);
        let after = screen(&flow(&conversation, 30), scroll, height);
        let pairs = before.iter().zip(&after);
        for (row, (before, after)) in pairs.enumerate().filter(|(_, (before, _))| before.is_some()) {
            assert_eq!(before, after, "row {row}");
        }
    }

    #[test]
    fn what_arrives_moves_nothing_above() {
        let mut conversation = conversation(1..=100);
        let scroll = flow(&conversation, 30).scrolled(Scroll::Bottom, 20, 15);
        let before = screen(&flow(&conversation, 30), scroll, 20);
        conversation.arrive(super::super::timeline::Arrival::Text(entry(101)));
        assert_eq!(screen(&flow(&conversation, 30), scroll, 20), before);
        // At the bottom it follows.
        assert_eq!(flow(&conversation, 30).place(Scroll::Bottom, 20).last, 100);
    }

    #[test]
    fn narrower_and_back_is_as_it_was() {
        let conversation = conversation(1..=100);
        let scroll = flow(&conversation, 60).scrolled(Scroll::Bottom, 20, 50);
        let before = screen(&flow(&conversation, 60), scroll, 20);
        let narrow = flow(&conversation, 20).place(scroll, 12);
        assert!(matches!(narrow.rows[0], Row::Text { .. }) || matches!(narrow.rows[1], Row::Text { .. }));
        let back = flow(&conversation, 60).place(narrow.scroll, 20).scroll;
        assert_eq!(screen(&flow(&conversation, 60), back, 20), before);
    }

    #[test]
    fn days_names_and_what_is_new() {
        let mut conversation = conversation(22..=25);
        conversation.unread_after = Some(22);
        let rows = flow(&conversation, 200).place(Scroll::Bottom, 12).rows;
        let kinds: Vec<&str> = rows
            .iter()
            .map(|row| match row {
                Row::Beginning => "beginning",
                Row::Day(_) => "day",
                Row::Unread => "unread",
                Row::Name { .. } => "name",
                Row::Text { .. } => "text",
                Row::NotSent { .. } => "not sent",
            })
            .collect();
        assert_eq!(kinds, ["day", "name", "text", "unread", "name", "text", "day", "name", "text", "name", "text"]);
    }

    proptest! {
        #[test]
        fn always_a_full_screen(last in 1..60_u64, moves in proptest::collection::vec((-25..25_isize, 8..70_usize, 3..30_usize), 1..20)) {
            let conversation = conversation(1..=last);
            let mut scroll = Scroll::Bottom;
            for (rows, room, height) in moves {
                let flow = flow(&conversation, room);
                scroll = flow.scrolled(scroll, height, rows);
                let placement = flow.place(scroll, height);
                prop_assert_eq!(placement.blank + placement.rows.len(), height);
                prop_assert!(placement.blank == 0 || placement.first == 0);
                // One up and one down again is where it was, if there is room.
                let up = flow.scrolled(scroll, height, 1);
                if scroll != Scroll::Bottom && flow.place(up, height).rows != placement.rows {
                    prop_assert_eq!(flow.place(flow.scrolled(up, height, -1), height).rows, placement.rows);
                }
            }
        }
    }
}
