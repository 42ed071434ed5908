//! Draws the chat as it stands. Decides nothing, changes nothing.
//!
//! Invariant: whatever a text holds, nothing is drawn outside its row's part of the screen, and no neighbour is moved: control characters are made visible (`safe`),
//! widths are measured by grapheme, and words that go from right to left are isolated from what stands beside them.

use std::ops::Range;

use chat_client::PresenceStatus;
use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Position, Rect};
use ratatui::style::{Color, Modifier, Style};
use unicode_segmentation::UnicodeSegmentation;

use super::clock;
use super::conversation::{Conversation, Item, Progress};
use super::keys::HELP;
use super::layout::{self, Areas, Flow, GUTTER, LIST_ITEM_ROWS, MARGIN, Row, Shown};
use super::model::{App, Focus, Link, Prompt};
use super::search;
use super::timeline::Words;
use super::wrap;
use crate::safe;

/// Around words that go from right to left: a terminal that turns them around turns nothing else.
const ISOLATE: char = '\u{2068}';
const END_OF_ISOLATE: char = '\u{2069}';

const PLAIN: Style = Style::new();
const QUIET: Style = Style::new().fg(Color::DarkGray);
const STRONG: Style = Style::new().add_modifier(Modifier::BOLD);
const MINE: Style = Style::new().fg(Color::Green).add_modifier(Modifier::BOLD);
const THEIRS: Style = Style::new().fg(Color::Blue).add_modifier(Modifier::BOLD);
const READ: Style = Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD);
const ALARM: Style = Style::new().fg(Color::Red);
const NEW: Style = Style::new().fg(Color::Magenta).add_modifier(Modifier::BOLD);
const ONLINE: Style = Style::new().fg(Color::Green);
const CHOSEN: Style = Style::new().fg(Color::Yellow).add_modifier(Modifier::BOLD);
const FOUND: Style = Style::new().fg(Color::Black).bg(Color::Yellow);
const BANNER: Style = Style::new().fg(Color::Black).bg(Color::Yellow);

pub(super) fn draw(frame: &mut Frame<'_>, app: &App) {
    let areas = app.areas();
    let buffer = frame.buffer_mut();
    let screen = *buffer.area();
    if areas.is_too_small {
        put(buffer, screen.x, screen.y, "too small", screen.width, PLAIN);
        return;
    }
    if let Some(banner) = app.banner() {
        buffer.set_style(areas.banner, BANNER);
        put_cut(buffer, areas.banner.x + 1, areas.banner.y, &safe::line(&banner), areas.banner.width - 1, BANNER);
    }
    if areas.list.width > 0 {
        list_title(buffer, app, areas.list_title);
        list(buffer, app, areas.list);
    }
    for y in areas.border.rows().map(|row| row.y).filter(|_| areas.border.width > 0) {
        put(buffer, areas.border.x, y, "│", 1, QUIET);
    }
    let mut cursor = None;
    if areas.timeline.width > 0 {
        match app.opened() {
            Some(conversation) => {
                title(buffer, app, conversation, areas.title);
                timeline(buffer, app, conversation, &areas);
                status(buffer, app, conversation, areas.status);
                cursor = compose(buffer, app, conversation, areas.compose);
            }
            None => {
                let hint = "Choose a conversation, or begin one with Ctrl-N";
                let y = areas.timeline.y + areas.timeline.height / 2;
                put_cut(buffer, areas.timeline.x + 2, y, hint, areas.timeline.width.saturating_sub(2), QUIET);
            }
        }
    }
    if let Some(at) = keys(buffer, app, areas.keys) {
        cursor = Some(at);
    }
    if app.has_help {
        help(buffer, screen);
        cursor = None;
    }
    if let Some(cursor) = cursor {
        frame.set_cursor_position(cursor);
    }
}

// ---- the list ----------------------------------------------------------------------------------------------------------

fn list_title(buffer: &mut Buffer, app: &App, area: Rect) {
    let style = if app.focus == Focus::List { STRONG.add_modifier(Modifier::UNDERLINED) } else { STRONG };
    put_cut(buffer, area.x + 1, area.y, app.me.as_str(), area.width - 1, style);
}

fn list(buffer: &mut Buffer, app: &App, area: Rect) {
    if app.order.is_empty() {
        let hint = if app.link == Link::Connected { "No conversations yet" } else { "Nothing loaded yet" };
        put_cut(buffer, area.x + 1, area.y, hint, area.width - 1, QUIET);
    }
    let shown = usize::from(area.height / LIST_ITEM_ROWS);
    let peers = app.order.iter().skip(app.list_top).take(shown);
    let today = clock::day(app.now.wall_ms, &app.zone);
    let mut y = area.y;
    for conversation in peers.filter_map(|peer| app.conversations.get(peer)) {
        let is_chosen = app.focus == Focus::List && app.chosen.as_ref() == Some(&conversation.peer);
        let is_open = app.open.as_ref() == Some(&conversation.peer);
        if is_chosen {
            put(buffer, area.x, y, "▌", 1, CHOSEN);
            put(buffer, area.x, y + 1, "▌", 1, CHOSEN);
        }
        list_item(buffer, app, conversation, Rect::new(area.x + 1, y, area.width - 2, LIST_ITEM_ROWS), is_open, today);
        y += LIST_ITEM_ROWS;
    }
}

fn list_item(
    buffer: &mut Buffer,
    app: &App,
    conversation: &Conversation,
    area: Rect,
    is_open: bool,
    today: jiff::civil::Date,
) {
    let time = if conversation.active_ms == 0 {
        String::new()
    } else {
        clock::short(conversation.active_ms, today, &app.zone)
    };
    let time_columns = narrow(wrap::columns(&time));
    put(buffer, area.right() - time_columns, area.y, &time, time_columns, QUIET);
    let (dot, dot_style) = if app.is_online(&conversation.peer) { ("●", ONLINE) } else { ("○", QUIET) };
    put(buffer, area.x, area.y, dot, 1, dot_style);
    let unread = conversation.unread();
    let name_style = match (is_open, unread > 0) {
        (true, _) => STRONG.add_modifier(Modifier::REVERSED),
        (false, true) => STRONG,
        (false, false) => PLAIN,
    };
    let name_room = area.width.saturating_sub(time_columns + 3);
    put_cut(buffer, area.x + 2, area.y, conversation.peer.as_str(), name_room, name_style);
    let mut room = area.width - 2;
    if unread > 0 {
        let badge = if unread > 999 { " 999+ ".to_owned() } else { format!(" {unread} ") };
        let columns = narrow(badge.len());
        put(buffer, area.right() - columns, area.y + 1, &badge, columns, NEW.add_modifier(Modifier::REVERSED));
        room = room.saturating_sub(columns + 1);
    }
    let (preview, style) = preview(app, conversation, is_open);
    put_cut(buffer, area.x + 2, area.y + 1, &preview, room, style);
}

/// What the list says of a conversation.
fn preview(app: &App, conversation: &Conversation, is_open: bool) -> (String, Style) {
    if conversation.is_typing(app.now) {
        return ("typing…".to_owned(), ONLINE);
    }
    let draft = &conversation.draft;
    if !is_open && !draft.editor.is_blank() {
        return (format!("draft: {}", safe::line(draft.editor.text())), QUIET.add_modifier(Modifier::ITALIC));
    }
    if let Some(outgoing) = conversation.outgoing.last() {
        return match outgoing.progress {
            Progress::Waiting => (format!("◷ {}", safe::line(&outgoing.text)), QUIET),
            Progress::NotSent(_) => (format!("✗ {}", safe::line(&outgoing.text)), ALARM),
        };
    }
    let Some(last) = &conversation.last else { return (String::new(), PLAIN) };
    let tick = if last.is_mine { format!("{} ", tick(conversation, last.seq.get()).0) } else { String::new() };
    match &last.text {
        Some(text) => (format!("{tick}{}", safe::line(text)), QUIET),
        None => ("was unsent".to_owned(), QUIET.add_modifier(Modifier::ITALIC)),
    }
}

/// How far an own message has come.
fn tick(conversation: &Conversation, seq: u64) -> (&'static str, Style) {
    if conversation.read >= seq {
        ("✓✓", READ)
    } else if conversation.delivered >= seq {
        ("✓✓", QUIET)
    } else {
        ("✓", QUIET)
    }
}

// ---- the timeline ------------------------------------------------------------------------------------------------------

fn title(buffer: &mut Buffer, app: &App, conversation: &Conversation, area: Rect) {
    let today = clock::day(app.now.wall_ms, &app.zone);
    let (dot, dot_style) = if app.is_online(&conversation.peer) { ("●", ONLINE) } else { ("○", QUIET) };
    put(buffer, area.x + 1, area.y, dot, 1, dot_style);
    let right = if conversation.page_asked.is_some() || conversation.newest_asked.is_some() {
        "loading…"
    } else if app.is_scrolled_up() {
        "Ctrl-End: newest"
    } else {
        ""
    };
    let right_columns = narrow(wrap::columns(right));
    put(buffer, area.right() - right_columns - 1, area.y, right, right_columns, QUIET);
    let end = area.right() - right_columns - 2;
    let x = put_cut(buffer, area.x + 3, area.y, conversation.peer.as_str(), end.saturating_sub(area.x + 3), STRONG);
    let presence = match app.presence(&conversation.peer) {
        Some(presence) if presence.status == PresenceStatus::Online => "online".to_owned(),
        Some(presence) => presence
            .last_seen
            .map_or_else(String::new, |at| format!("last seen {}", clock::short(at.as_ms(), today, &app.zone))),
        None => String::new(),
    };
    let presence = if conversation.is_blocked { format!("{presence} · blocked") } else { presence };
    put_cut(buffer, x + 2, area.y, &presence, end.saturating_sub(x + 2), QUIET);
}

fn timeline(buffer: &mut Buffer, app: &App, conversation: &Conversation, areas: &Areas) {
    let area = areas.timeline;
    let Some((flow, placement)) = app.placement(areas) else { return };
    if flow.len() == 0 {
        let hint = if conversation.timeline.is_whole() {
            "No messages yet"
        } else if app.link == Link::Connected {
            "Loading…"
        } else {
            "Not loaded: there is no connection"
        };
        put_cut(buffer, area.x + MARGIN, area.bottom().saturating_sub(1), hint, area.width - MARGIN, QUIET);
    }
    let today = clock::day(app.now.wall_ms, &app.zone);
    let mut text: Option<Text> = None;
    for (number, row) in placement.rows.iter().enumerate() {
        let y = area.y + narrow(placement.blank + number);
        match row {
            Row::Beginning => line(buffer, area, y, "the beginning", QUIET),
            Row::Day(day) => line(buffer, area, y, &clock::day_name(*day, today), QUIET),
            Row::Unread => line(buffer, area, y, "new", NEW),
            Row::Name { is_mine } => {
                let (name, style) = if *is_mine { (&app.me, MINE) } else { (&conversation.peer, THEIRS) };
                put_cut(buffer, area.x + MARGIN, y, name.as_str(), area.width - MARGIN, style);
            }
            Row::Text { place, range, is_first } => {
                let at = Rect::new(area.x, y, area.width, 1);
                // Rows of a text follow each other, and it may be long.
                let same = text.take().filter(|text| text.place == *place);
                let text = text.insert(same.unwrap_or_else(|| Text::new(app, conversation, &flow, *place)));
                text_row(buffer, app, text, range, at);
                if *is_first && let Some(item) = flow.item(*place) {
                    gutter(buffer, app, conversation, item, at);
                }
            }
            Row::NotSent { place } => {
                if let Some(Item::Outgoing(key)) = flow.item(*place)
                    && let Some(Progress::NotSent(reason)) =
                        conversation.outgoing(key).map(|outgoing| &outgoing.progress)
                {
                    let reason = format!("✗ {} · Ctrl-R sends it again", safe::line(reason));
                    put_cut(buffer, area.x + MARGIN, y, &reason, area.width - MARGIN, ALARM);
                }
            }
        }
    }
}

/// A word in the middle of a line.
fn line(buffer: &mut Buffer, area: Rect, y: u16, word: &str, style: Style) {
    for x in area.x + MARGIN..area.right().saturating_sub(1) {
        put(buffer, x, y, "─", 1, style);
    }
    let word = format!(" {word} ");
    let columns = narrow(wrap::columns(&word));
    let x = area.x + MARGIN + area.width.saturating_sub(MARGIN + 1 + columns) / 2;
    put(buffer, x, y, &word, columns.min(area.width), style);
}

/// A text of which rows are drawn.
struct Text {
    place: usize,
    item: Option<Item>,
    shown: Shown,
    is_unsent: bool,
    /// Where in it is what is searched for.
    found: Vec<Range<usize>>,
}

impl Text {
    fn new(app: &App, conversation: &Conversation, flow: &Flow<'_>, place: usize) -> Self {
        let (item, shown) = (flow.item(place), flow.shown(place));
        let is_unsent = matches!(item, Some(Item::Entry(seq)) if conversation.timeline.get(seq).is_some_and(|entry| entry.words == Words::Unsent));
        let found = app.search.as_ref().map_or_else(Vec::new, |search| search::find(&shown.text, &search.needle));
        Self { place, item, shown, is_unsent, found }
    }

    fn is_found(&self, at: usize) -> bool {
        let place = self.found.partition_point(|place| place.end <= at);
        self.found.get(place).is_some_and(|place| place.start <= at)
    }
}

fn text_row(buffer: &mut Buffer, app: &App, text: &Text, range: &Range<usize>, area: Rect) {
    let shown = &text.shown;
    if text.item.is_some_and(|item| app.focus == Focus::Messages(item)) {
        put(buffer, area.x, area.y, "▌", 1, CHOSEN);
    }
    let line_start = shown.text[..range.start].rfind('\n').map_or(0, |at| at + 1);
    let base = if text.is_unsent {
        QUIET.add_modifier(Modifier::ITALIC)
    } else if shown.text[line_start..].starts_with("> ") {
        QUIET
    } else {
        PLAIN
    };
    let room = narrow(layout::text_room(area.width));
    put_styled(buffer, area.x + MARGIN, area.y, &shown.text[range.clone()], room, |at| {
        let at = range.start + at;
        if at >= shown.words_end {
            QUIET
        } else if text.is_found(at) {
            FOUND
        } else {
            base
        }
    });
}

/// Right of a message: when it was, and how far it has come.
fn gutter(buffer: &mut Buffer, app: &App, conversation: &Conversation, item: Item, area: Rect) {
    let x = area.right().saturating_sub(GUTTER);
    let (at_ms, (tick, style)) = match item {
        Item::Entry(seq) => {
            let Some(entry) = conversation.timeline.get(seq) else { return };
            let tick = if entry.is_mine { tick(conversation, seq.get()) } else { ("", PLAIN) };
            (entry.at.as_ms(), tick)
        }
        Item::Outgoing(key) => {
            let Some(outgoing) = conversation.outgoing(key) else { return };
            let tick = match outgoing.progress {
                Progress::Waiting => ("◷", QUIET),
                Progress::NotSent(_) => ("✗", ALARM),
            };
            (outgoing.queued_at.as_ms(), tick)
        }
    };
    put(buffer, x + 1, area.y, &clock::time_of_day(at_ms, &app.zone), 5, QUIET);
    put(buffer, x + 7, area.y, tick, 2, style);
}

// ---- below the timeline ------------------------------------------------------------------------------------------------

fn status(buffer: &mut Buffer, app: &App, conversation: &Conversation, area: Rect) {
    for x in area.x..area.right() {
        put(buffer, x, area.y, "─", 1, QUIET);
    }
    let (text, style) = if let Focus::Messages(_) = app.focus {
        (" r reply · e edit · u unsend · d delete · Esc ".to_owned(), CHOSEN)
    } else if conversation.draft.editing.is_some() {
        (" Editing · Enter keeps it · Esc gives up ".to_owned(), CHOSEN)
    } else if conversation.is_typing(app.now) {
        (format!(" {} is typing… ", conversation.peer), ONLINE)
    } else if app.is_scrolled_up() && conversation.unread() > 0 {
        (format!(" {} new below ", conversation.unread()), NEW)
    } else {
        return;
    };
    put_cut(buffer, area.x + 1, area.y, &text, area.width - 1, style);
}

/// Where the cursor is, if this is where one writes.
fn compose(buffer: &mut Buffer, app: &App, conversation: &Conversation, area: Rect) -> Option<Position> {
    let editor = &conversation.draft.editor;
    let prompt = if conversation.draft.editing.is_some() { "✎" } else { ">" };
    put(buffer, area.x, area.y, prompt, 1, if app.focus == Focus::Compose { STRONG } else { QUIET });
    let room = layout::editor_room(area.width);
    let place = editor.place(room);
    let rows = usize::from(area.height);
    let top = layout::editor_top(&place, rows);
    for (number, range) in place.rows.iter().enumerate().skip(top).take(rows) {
        let y = area.y + narrow(number - top);
        put(buffer, area.x + MARGIN, y, &editor.text()[range.clone()], narrow(room), PLAIN);
    }
    if editor.is_empty() && app.focus == Focus::Compose {
        put_cut(buffer, area.x + MARGIN, area.y, "Write a message", area.width - MARGIN, QUIET);
    }
    let is_here = app.focus == Focus::Compose && app.prompt.is_none();
    is_here.then(|| Position::new(area.x + MARGIN + narrow(place.column), area.y + narrow(place.row - top)))
}

/// Where the cursor is, if something is asked here.
fn keys(buffer: &mut Buffer, app: &App, area: Rect) -> Option<Position> {
    let room = area.width - 1;
    let (x, y) = (area.x + 1, area.y);
    let (question, answer) = match &app.prompt {
        Some(Prompt::Begin { name, problem }) => {
            if let Some(problem) = problem {
                let columns = narrow(wrap::columns(problem)).min(room / 2);
                put_cut(buffer, area.right() - columns, y, problem, columns, ALARM);
            }
            ("Begin a conversation with: ", Some(name))
        }
        Some(Prompt::Search { needle }) => ("Search: ", Some(needle)),
        Some(Prompt::Unsend { .. }) => ("Unsend this message for everybody? y: yes, any other key: no", None),
        Some(Prompt::Delete { .. }) => ("Delete this message for you alone? y: yes, any other key: no", None),
        None => {
            if let Some(notice) = app.notice() {
                put_cut(buffer, x, y, &safe::line(notice), room, ALARM);
            } else if let Some(searched) = &app.search {
                let hint = format!("“{}” · n older · N newer · Esc", safe::line(&searched.needle));
                put_cut(buffer, x, y, &hint, room, CHOSEN);
            } else {
                let hint = match app.focus {
                    Focus::List => "F1 help · ↑ ↓ Enter open · Ctrl-N new · Ctrl-C quit",
                    _ => "F1 help · Tab list · Ctrl-F search · Ctrl-N new · Ctrl-C quit",
                };
                put_cut(buffer, x, y, hint, room, QUIET);
            }
            return None;
        }
    };
    let after = put_cut(buffer, x, y, question, room, CHOSEN);
    let editor = answer?;
    let room = usize::from(area.right().saturating_sub(after + 1));
    // Only the row with the cursor; it is one line.
    let place = editor.place(room.max(1));
    if let Some(range) = place.rows.get(place.row) {
        put(buffer, after, y, &editor.text()[range.clone()], narrow(room), PLAIN);
    }
    Some(Position::new((after + narrow(place.column)).min(area.right() - 1), y))
}

fn help(buffer: &mut Buffer, screen: Rect) {
    let keys_columns = narrow(HELP.iter().map(|(keys, _)| wrap::columns(keys)).max().unwrap_or(0));
    let text_columns = narrow(HELP.iter().map(|(_, text)| wrap::columns(text)).max().unwrap_or(0));
    let width = (keys_columns + text_columns + 6).min(screen.width);
    let height = narrow(HELP.len() + 2).min(screen.height);
    let area = Rect::new((screen.width - width) / 2, (screen.height - height) / 2, width, height);
    for y in area.top()..area.bottom() {
        for x in area.left()..area.right() {
            buffer[(x, y)].reset();
            buffer[(x, y)].set_style(Style::new().add_modifier(Modifier::REVERSED));
        }
    }
    let style = Style::new().add_modifier(Modifier::REVERSED);
    let rows = (area.top() + 1)..area.bottom().saturating_sub(1);
    for (y, (keys, text)) in rows.zip(HELP) {
        put_cut(
            buffer,
            area.x + 2,
            y,
            keys,
            keys_columns.min(width.saturating_sub(3)),
            style.add_modifier(Modifier::BOLD),
        );
        let x = area.x + keys_columns + 4;
        put_cut(buffer, x, y, text, area.right().saturating_sub(x + 1), style);
    }
}

// ---- cells -------------------------------------------------------------------------------------------------------------

fn narrow(number: usize) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

/// A text, with `…` if it does not fit. Where it ends.
fn put_cut(buffer: &mut Buffer, x: u16, y: u16, text: &str, room: u16, style: Style) -> u16 {
    put(buffer, x, y, &wrap::cut(text, usize::from(room)), room, style)
}

/// As much of a text as fits. Where it ends.
fn put(buffer: &mut Buffer, x: u16, y: u16, text: &str, room: u16, style: Style) -> u16 {
    put_styled(buffer, x, y, text, room, |_| style)
}

/// The same, each grapheme in a style of its own.
fn put_styled(buffer: &mut Buffer, x: u16, y: u16, text: &str, room: u16, style: impl Fn(usize) -> Style) -> u16 {
    let end = x.saturating_add(room).min(buffer.area().right());
    if y >= buffer.area().bottom() {
        return x;
    }
    let (mut at, mut last) = (x, None);
    for (byte, grapheme) in text.grapheme_indices(true) {
        let columns = narrow(wrap::grapheme_columns(grapheme));
        if columns == 0 {
            continue;
        }
        if at + columns > end {
            break;
        }
        buffer[(at, y)].set_symbol(wrap::drawn(grapheme)).set_style(style(byte));
        for covered in at + 1..at + columns {
            buffer[(covered, y)].reset();
        }
        last = Some(at);
        at += columns;
    }
    if let Some(last) = last
        && x > 0
        && wrap::is_right_to_left(text)
    {
        // They have no width: a terminal keeps each with the cell before it.
        join(buffer, x - 1, y, ISOLATE);
        join(buffer, last, y, END_OF_ISOLATE);
    }
    at
}

fn join(buffer: &mut Buffer, x: u16, y: u16, mark: char) {
    let cell = &mut buffer[(x, y)];
    let mut symbol = cell.symbol().to_owned();
    symbol.push(mark);
    cell.set_symbol(&symbol);
}
