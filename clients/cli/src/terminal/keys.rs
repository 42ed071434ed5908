//! What keys and the mouse do.
//!
//! A prompt takes the keys first, then a search, then whoever has the focus. `HELP` below is what the help shows: whoever changes a key changes it
//! there, and in docs/terminal.md.

use chat_client::{Seq, UserId};
use crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers, MouseButton, MouseEvent, MouseEventKind};
use ratatui::layout::Position;

use super::compose::Editor;
use super::conversation::{Item, Progress, Scroll};
use super::layout::{self, Row};
use super::model::{App, Focus, Prompt, Search};

/// Rows that a turn of the wheel moves.
const WHEEL_ROWS: isize = 3;

/// Keys and what they do.
pub(super) const HELP: &[(&str, &str)] = &[
    ("Tab", "from the list to the timeline and back"),
    ("↑ ↓ Enter", "in the list: choose a conversation, open it"),
    ("Ctrl-N", "begin a conversation with anyone"),
    ("Enter", "send"),
    ("Alt-Enter, Ctrl-J", "a new line"),
    ("PgUp PgDn, wheel", "through the history"),
    ("Ctrl-End", "to the newest"),
    ("↑", "with nothing written: edit your last message"),
    ("Alt-↑ Alt-↓, click", "choose a message, then:"),
    ("   r", "reply by quoting it"),
    ("   e", "edit it, if it is yours or was not sent"),
    ("   u", "unsend it for everybody, if it is yours"),
    ("   d", "delete it for you alone"),
    ("Ctrl-R", "send again what was not sent"),
    ("Ctrl-F", "search in what is loaded; n older, N newer"),
    ("Esc", "leave what you are in"),
    ("F1", "this help"),
    ("Ctrl-Z", "to the shell; fg comes back"),
    ("Ctrl-C, Ctrl-Q", "quit"),
    ("", ""),
    ("◷ ✓ ✓✓", "on its way, stored, delivered; in colour: read"),
];

impl App {
    pub(super) fn terminal(&mut self, event: &Event) {
        match event {
            Event::Key(key) if key.kind != KeyEventKind::Release => self.key(*key),
            Event::Key(_) => {}
            Event::Paste(text) => self.paste(text),
            Event::Mouse(mouse) => self.mouse(*mouse),
            Event::Resize(columns, rows) => self.size = (*columns, *rows),
            Event::FocusGained => self.set_focus(true),
            Event::FocusLost => self.set_focus(false),
        }
    }

    fn key(&mut self, key: KeyEvent) {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c' | 'q') if control => self.quit(),
            KeyCode::F(1) => self.has_help = !self.has_help,
            _ if self.has_help => self.has_help = false,
            _ if self.prompt.is_some() => self.prompt_key(key),
            KeyCode::Char('n') if control => {
                self.prompt = Some(Prompt::Begin { name: Editor::default(), problem: None });
            }
            KeyCode::Char('f') if control => self.begin_search(),
            KeyCode::Char('r') if control => self.send_again(None),
            KeyCode::Tab | KeyCode::BackTab => self.switch(),
            KeyCode::Home if control => self.scroll(isize::MAX / 4),
            KeyCode::End if control => self.go_to_newest(),
            _ if self.search.is_some() => self.search_key(key),
            KeyCode::PageUp if self.focus != Focus::List => self.scroll(self.page_rows()),
            KeyCode::PageDown if self.focus != Focus::List => self.scroll(-self.page_rows()),
            _ => match self.focus {
                Focus::List => self.list_key(key),
                Focus::Compose => self.compose_key(key),
                Focus::Messages(item) => self.message_key(key, item),
            },
        }
    }

    /// A screen of the timeline, but for what keeps the eye.
    fn page_rows(&self) -> isize {
        isize::try_from(self.areas().timeline.height.saturating_sub(2).max(1)).unwrap_or(1)
    }

    fn switch(&mut self) {
        self.search = None;
        self.focus = match self.focus {
            Focus::List if self.open.is_some() => Focus::Compose,
            _ => Focus::List,
        };
    }

    fn begin_search(&mut self) {
        if self.open.is_none() {
            return;
        }
        let needle = self.search.take().map_or_else(Editor::default, |search| Editor::new(&search.needle));
        self.focus = Focus::Compose;
        self.prompt = Some(Prompt::Search { needle });
    }

    // ---- prompts -------------------------------------------------------------------------------------------------------

    fn prompt_key(&mut self, key: KeyEvent) {
        let Some(mut prompt) = self.prompt.take() else { return };
        if key.code == KeyCode::Esc {
            return;
        }
        match &mut prompt {
            Prompt::Begin { name, problem } => {
                if key.code == KeyCode::Enter {
                    match self.begin(name.text()) {
                        Ok(()) => return,
                        Err(sentence) => *problem = Some(sentence),
                    }
                } else {
                    edit_line(name, key);
                    *problem = None;
                }
            }
            Prompt::Search { needle } => {
                if key.code == KeyCode::Enter {
                    if !needle.is_empty() {
                        self.search = Some(Search { needle: needle.text().to_owned(), found: None });
                        self.search_next(false);
                    }
                    return;
                }
                edit_line(needle, key);
            }
            Prompt::Unsend { seq } => {
                if key.code == KeyCode::Char('y') {
                    self.unsend(*seq);
                }
                return;
            }
            Prompt::Delete { seq } => {
                if key.code == KeyCode::Char('y') {
                    self.delete(*seq);
                }
                return;
            }
        }
        self.prompt = Some(prompt);
    }

    /// Opens a conversation with whomever is named.
    fn begin(&mut self, name: &str) -> Result<(), String> {
        let name = name.trim();
        if name.is_empty() {
            return Err("a name, please".to_owned());
        }
        let peer = UserId::parse(name).map_err(|error| error.to_string())?;
        if peer == self.me {
            return Err("nobody can write to themselves".to_owned());
        }
        self.open(&peer);
        if let Some(conversation) = self.conversations.get(&peer)
            && conversation.active_ms == 0
        {
            self.touch(&peer);
        }
        Ok(())
    }

    // ---- the list ------------------------------------------------------------------------------------------------------

    fn list_key(&mut self, key: KeyEvent) {
        let rows = usize::from((self.areas().list.height / layout::LIST_ITEM_ROWS).max(1));
        let at = self.place_of_chosen().unwrap_or(0);
        let at = match key.code {
            KeyCode::Up => at.saturating_sub(1),
            KeyCode::Down => at + 1,
            KeyCode::PageUp => at.saturating_sub(rows),
            KeyCode::PageDown => at + rows,
            KeyCode::Home => 0,
            KeyCode::End => usize::MAX,
            KeyCode::Enter | KeyCode::Right => {
                if let Some(peer) = self.chosen.clone() {
                    self.open(&peer);
                }
                return;
            }
            KeyCode::Esc if self.open.is_some() => {
                self.focus = Focus::Compose;
                return;
            }
            _ => return,
        };
        let at = at.min(self.order.len().saturating_sub(1));
        self.chosen = self.order.get(at).cloned();
        self.list_top = self.list_top.clamp(at.saturating_sub(rows - 1), at);
    }

    // ---- writing -------------------------------------------------------------------------------------------------------

    fn compose_key(&mut self, key: KeyEvent) {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        let alt = key.modifiers.contains(KeyModifiers::ALT);
        let room = layout::editor_room(self.areas().compose.width);
        let Some(conversation) = self.opened_mut() else { return };
        let editor = &mut conversation.draft.editor;
        match key.code {
            KeyCode::Enter if alt || key.modifiers.contains(KeyModifiers::SHIFT) => editor.insert("\n"),
            KeyCode::Char('j') if control => editor.insert("\n"),
            KeyCode::Enter => return self.send(),
            KeyCode::Up if alt || control => return self.choose(false),
            KeyCode::Down if alt || control => return,
            KeyCode::Up => {
                if editor.is_empty() {
                    self.edit_last();
                } else {
                    editor.up(room);
                }
                return;
            }
            KeyCode::Down => {
                editor.down(room);
                return;
            }
            KeyCode::Esc => {
                if !self.stop_editing()
                    && let Some(conversation) = self.opened_mut()
                {
                    conversation.unread_after = None;
                }
                return;
            }
            _ => {
                if !edit_line(editor, key) {
                    return;
                }
            }
        }
        self.wrote();
    }

    fn paste(&mut self, text: &str) {
        match &mut self.prompt {
            Some(Prompt::Begin { name: editor, .. } | Prompt::Search { needle: editor }) => {
                editor.insert(&text.replace(['\r', '\n'], " "));
            }
            Some(_) => {}
            None if self.focus == Focus::List => {}
            None => {
                self.focus = Focus::Compose;
                if let Some(conversation) = self.opened_mut() {
                    conversation.draft.editor.insert(text);
                    self.wrote();
                }
            }
        }
    }

    // ---- a chosen message ----------------------------------------------------------------------------------------------

    fn message_key(&mut self, key: KeyEvent, item: Item) {
        match key.code {
            KeyCode::Up | KeyCode::Char('k') => self.choose(false),
            KeyCode::Down | KeyCode::Char('j') => self.choose(true),
            KeyCode::Esc | KeyCode::Enter => self.focus = Focus::Compose,
            KeyCode::Char('r') => self.reply(item),
            KeyCode::Char('e') => match item {
                Item::Entry(seq) => self.edit(seq),
                Item::Outgoing(key) => self.take_back(key),
            },
            KeyCode::Char('u') => match item {
                Item::Entry(seq) if self.is_own_text(seq) => self.prompt = Some(Prompt::Unsend { seq }),
                Item::Entry(_) => self.notify("only your own messages can be unsent"),
                Item::Outgoing(_) => self.notify("it is not stored yet"),
            },
            KeyCode::Char('d') => match item {
                Item::Entry(seq) => self.prompt = Some(Prompt::Delete { seq }),
                Item::Outgoing(key) => self.discard(key),
            },
            KeyCode::Char('s') => {
                if let Item::Outgoing(key) = item {
                    self.send_again(Some(key));
                }
            }
            _ => {}
        }
    }

    fn is_own_text(&self, seq: Seq) -> bool {
        let entry = self.opened().and_then(|conversation| conversation.timeline.get(seq));
        entry.is_some_and(|entry| entry.is_mine && entry.text().is_some())
    }

    fn reply(&mut self, item: Item) {
        let Some(conversation) = self.opened_mut() else { return };
        if let Some(text) = conversation.text_of(item).map(str::to_owned) {
            conversation.draft.editor.quote(&text);
            self.focus = Focus::Compose;
        }
    }

    /// Forgets a message that was not sent.
    fn discard(&mut self, key: u64) {
        let Some(conversation) = self.opened_mut() else { return };
        let is_waiting = conversation.outgoing(key).is_some_and(|outgoing| outgoing.progress == Progress::Waiting);
        if is_waiting {
            self.notify("it is on its way and cannot be called back");
            return;
        }
        conversation.outgoing.retain(|outgoing| outgoing.key != key);
        self.focus = Focus::Compose;
    }

    // ---- searching -----------------------------------------------------------------------------------------------------

    fn search_key(&mut self, key: KeyEvent) {
        match key.code {
            KeyCode::Char('n') | KeyCode::Up => self.search_next(false),
            KeyCode::Char('N') | KeyCode::Down => self.search_next(true),
            KeyCode::PageUp => self.scroll(self.page_rows()),
            KeyCode::PageDown => self.scroll(-self.page_rows()),
            KeyCode::Esc | KeyCode::Enter => self.search = None,
            _ => {}
        }
    }

    // ---- the mouse -----------------------------------------------------------------------------------------------------

    fn mouse(&mut self, mouse: MouseEvent) {
        let areas = self.areas();
        let at = Position::new(mouse.column, mouse.row);
        if self.has_help || self.prompt.is_some() {
            if mouse.kind == MouseEventKind::Down(MouseButton::Left) {
                self.has_help = false;
                self.prompt = None;
            }
            return;
        }
        match mouse.kind {
            MouseEventKind::ScrollUp if areas.list.contains(at) => self.list_top = self.list_top.saturating_sub(1),
            MouseEventKind::ScrollDown if areas.list.contains(at) => self.list_top += 1,
            MouseEventKind::ScrollUp => self.scroll(WHEEL_ROWS),
            MouseEventKind::ScrollDown => self.scroll(-WHEEL_ROWS),
            MouseEventKind::Down(MouseButton::Left) if areas.list.contains(at) => {
                let row = usize::from((at.y - areas.list.y) / layout::LIST_ITEM_ROWS);
                if let Some(peer) = self.order.get(self.list_top + row).cloned() {
                    self.open(&peer);
                }
            }
            MouseEventKind::Down(MouseButton::Left) if areas.timeline.contains(at) => {
                self.click_timeline(usize::from(at.y - areas.timeline.y));
            }
            MouseEventKind::Down(MouseButton::Left) if areas.compose.contains(at) => {
                self.focus = Focus::Compose;
                let room = layout::editor_room(areas.compose.width);
                let (row, column) = (at.y - areas.compose.y, at.x.saturating_sub(areas.compose.x + layout::MARGIN));
                let rows = usize::from(areas.compose.height);
                if let Some(conversation) = self.opened_mut() {
                    let editor = &mut conversation.draft.editor;
                    let top = layout::editor_top(&editor.place(room), rows);
                    editor.point(room, top + usize::from(row), usize::from(column));
                }
            }
            _ => {}
        }
    }

    fn click_timeline(&mut self, row: usize) {
        let areas = self.areas();
        let Some((flow, placement)) = self.placement(&areas) else { return };
        let item = row.checked_sub(placement.blank).and_then(|row| placement.rows.get(row)).and_then(|row| match row {
            Row::Text { place, .. } | Row::NotSent { place } => flow.item(*place),
            _ => None,
        });
        self.focus = match item {
            Some(item) if self.focus != Focus::Messages(item) => Focus::Messages(item),
            _ => Focus::Compose,
        };
    }

    /// The open conversation is scrolled up.
    pub(super) fn is_scrolled_up(&self) -> bool {
        self.opened().is_some_and(|conversation| conversation.scroll != Scroll::Bottom)
    }
}

/// Keys that every editor knows. Whether this changed the text.
fn edit_line(editor: &mut Editor, key: KeyEvent) -> bool {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let alt = key.modifiers.contains(KeyModifiers::ALT);
    match key.code {
        KeyCode::Left if control || alt => editor.word_left(),
        KeyCode::Right if control || alt => editor.word_right(),
        KeyCode::Char('b') if alt => editor.word_left(),
        KeyCode::Char('f') if alt => editor.word_right(),
        KeyCode::Left => editor.left(),
        KeyCode::Right => editor.right(),
        KeyCode::Home => editor.home(),
        KeyCode::End => editor.end(),
        KeyCode::Char('a') if control => editor.home(),
        KeyCode::Char('e') if control => editor.end(),
        _ => {
            match key.code {
                KeyCode::Backspace if alt || control => editor.delete_word(),
                KeyCode::Backspace => editor.backspace(),
                KeyCode::Delete => editor.delete(),
                KeyCode::Char('h') if control => editor.backspace(),
                KeyCode::Char('d') if control => editor.delete(),
                KeyCode::Char('w') if control => editor.delete_word(),
                KeyCode::Char('u') if control => editor.delete_to_line_start(),
                KeyCode::Char('k') if control => editor.delete_to_line_end(),
                KeyCode::Char(character) if !control && !alt => editor.insert(character.encode_utf8(&mut [0; 4])),
                _ => return false,
            }
            return true;
        }
    }
    false
}
