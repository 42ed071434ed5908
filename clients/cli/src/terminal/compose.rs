//! The editor of what is being written: several lines, moved through by what a reader takes for characters.
//!
//! Invariant: the cursor is on the border of a grapheme, and the text holds no control characters but line breaks, wherever it was pasted from.

use std::ops::Range;

use unicode_segmentation::UnicodeSegmentation;

use super::wrap;
use crate::safe;

/// Longest draft; the server takes far less. What is pasted beyond is cut off.
const DRAFT_BYTES_MAX: usize = 256 * 1024;
/// Lines of a message that a reply quotes, and columns of each.
const QUOTED_LINES_MAX: usize = 5;
const QUOTED_COLUMNS_MAX: usize = 200;

/// A text that is being written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Editor {
    text: String,
    cursor: usize,
}

impl Editor {
    /// With a text, behind its end.
    pub(super) fn new(text: &str) -> Self {
        let mut editor = Self::default();
        editor.insert(text);
        editor
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    #[cfg(test)]
    fn cursor(&self) -> usize {
        self.cursor
    }

    /// Nothing but white space.
    pub(super) fn is_blank(&self) -> bool {
        self.text.trim().is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// Puts text in at the cursor. A tab becomes spaces, other control characters are left out.
    pub(super) fn insert(&mut self, text: &str) {
        let text = text.replace("\r\n", "\n").replace('\r', "\n").replace('\t', "    ");
        let room = DRAFT_BYTES_MAX.saturating_sub(self.text.len());
        let text: String = text.chars().filter(|&character| character == '\n' || is_safe(character)).collect();
        let text = &text[..text.floor_char_boundary(room)];
        self.text.insert_str(self.cursor, text);
        // What was put in may have joined with what follows.
        self.cursor = self.border_at_or_after(self.cursor + text.len());
    }

    /// Puts a quotation on top, and the cursor behind what was written already.
    pub(super) fn quote(&mut self, text: &str) {
        let mut quoted = String::new();
        for (number, line) in text.lines().enumerate() {
            if number == QUOTED_LINES_MAX {
                quoted.push_str("> …\n");
                break;
            }
            quoted.push_str("> ");
            quoted.push_str(&wrap::cut(line, QUOTED_COLUMNS_MAX));
            quoted.push('\n');
        }
        self.cursor = 0;
        self.insert(&quoted);
        self.cursor = self.text.len();
    }

    fn border_at_or_after(&self, at: usize) -> usize {
        self.text
            .grapheme_indices(true)
            .map(|(border, _)| border)
            .find(|border| *border >= at)
            .unwrap_or(self.text.len())
    }

    fn previous(&self) -> usize {
        self.text[..self.cursor].grapheme_indices(true).next_back().map_or(0, |(at, _)| at)
    }

    fn next(&self) -> usize {
        self.text[self.cursor..].graphemes(true).next().map_or(self.cursor, |grapheme| self.cursor + grapheme.len())
    }

    fn previous_word(&self) -> usize {
        let before = self.text[..self.cursor].trim_end();
        before.rfind(char::is_whitespace).map_or(0, |at| self.border_at_or_after(at + 1))
    }

    fn next_word(&self) -> usize {
        let after = &self.text[self.cursor..];
        let word = after.find(|character: char| !character.is_whitespace()).unwrap_or(after.len());
        let end = after[word..].find(char::is_whitespace).unwrap_or(after.len() - word);
        self.border_at_or_after(self.cursor + word + end)
    }

    fn line_start(&self) -> usize {
        self.text[..self.cursor].rfind('\n').map_or(0, |at| at + 1)
    }

    fn line_end(&self) -> usize {
        self.text[self.cursor..].find('\n').map_or(self.text.len(), |at| self.cursor + at)
    }

    fn remove(&mut self, range: Range<usize>) {
        self.cursor = range.start;
        self.text.replace_range(range, "");
        self.cursor = self.border_at_or_after(self.cursor);
    }

    pub(super) fn left(&mut self) {
        self.cursor = self.previous();
    }

    pub(super) fn right(&mut self) {
        self.cursor = self.next();
    }

    pub(super) fn word_left(&mut self) {
        self.cursor = self.previous_word();
    }

    pub(super) fn word_right(&mut self) {
        self.cursor = self.next_word();
    }

    pub(super) fn home(&mut self) {
        self.cursor = self.line_start();
    }

    pub(super) fn end(&mut self) {
        self.cursor = self.line_end();
    }

    pub(super) fn backspace(&mut self) {
        self.remove(self.previous()..self.cursor);
    }

    pub(super) fn delete(&mut self) {
        self.remove(self.cursor..self.next());
    }

    pub(super) fn delete_word(&mut self) {
        self.remove(self.previous_word()..self.cursor);
    }

    pub(super) fn delete_to_line_start(&mut self) {
        self.remove(self.line_start()..self.cursor);
    }

    pub(super) fn delete_to_line_end(&mut self) {
        self.remove(self.cursor..self.line_end());
    }

    /// Where the cursor is when the text is broken into rows of so many columns.
    pub(super) fn place(&self, room: usize) -> Place {
        let rows = wrap::wrap(&self.text, room);
        let row = rows.iter().rposition(|row| row.start <= self.cursor).unwrap_or(0);
        let column =
            rows.get(row).map_or(0, |range| wrap::columns(&self.text[range.start..self.cursor.min(range.end)]));
        Place { rows, row, column: column.min(room) }
    }

    /// One row up. Whether there was one.
    pub(super) fn up(&mut self, room: usize) -> bool {
        let place = self.place(room);
        place.row.checked_sub(1).is_some_and(|row| self.go_to(&place, row))
    }

    /// One row down. Whether there was one.
    pub(super) fn down(&mut self, room: usize) -> bool {
        let place = self.place(room);
        place.row + 1 < place.rows.len() && self.go_to(&place, place.row + 1)
    }

    fn go_to(&mut self, place: &Place, row: usize) -> bool {
        let Some(range) = place.rows.get(row) else { return false };
        self.cursor = column_in(&self.text, range, place.column);
        true
    }

    /// Puts the cursor where somebody pointed to.
    pub(super) fn point(&mut self, room: usize, row: usize, column: usize) {
        let place = self.place(room);
        if let Some(range) = place.rows.get(row.min(place.rows.len() - 1)) {
            self.cursor = column_in(&self.text, range, column);
        }
    }
}

/// Whether it is shown as it is.
fn is_safe(character: char) -> bool {
    let mut bytes = [0; 4];
    let text: &str = character.encode_utf8(&mut bytes);
    safe::line(text) == text
}

/// The border of a grapheme at a column of a row, or before it.
fn column_in(text: &str, row: &Range<usize>, column: usize) -> usize {
    let mut used = 0;
    for (at, grapheme) in text[row.clone()].grapheme_indices(true) {
        used += wrap::grapheme_columns(grapheme);
        if used > column {
            return row.start + at;
        }
    }
    // Behind the last one would be the next row, unless a line ends there.
    let is_line_end = text[row.end..].is_empty() || text[row.end..].starts_with('\n');
    if is_line_end {
        row.end
    } else {
        text[..row.end].grapheme_indices(true).next_back().map_or(row.start, |(at, _)| at)
    }
}

/// Rows of an editor's text, and where its cursor is in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) rows: Vec<Range<usize>>,
    pub(super) row: usize,
    pub(super) column: usize,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn graphemes_are_characters() {
        let mut editor = Editor::new("a👨\u{200d}👩\u{200d}👧e\u{301}");
        editor.left();
        assert_eq!(&editor.text()[editor.cursor()..], "e\u{301}");
        editor.backspace();
        assert_eq!(editor.text(), "ae\u{301}");
        editor.delete();
        assert_eq!(editor.text(), "a");
    }

    #[test]
    fn words_and_lines() {
        let mut editor = Editor::new("one two\nthree  four");
        editor.delete_word();
        assert_eq!(editor.text(), "one two\nthree  ");
        editor.word_left();
        assert_eq!(editor.cursor(), 8);
        editor.word_left();
        assert_eq!(editor.cursor(), 4);
        editor.word_right();
        assert_eq!(editor.cursor(), 7);
        editor.delete_to_line_start();
        assert_eq!(editor.text(), "\nthree  ");
        editor.right();
        editor.delete_to_line_end();
        assert_eq!(editor.text(), "\n");
    }

    #[test]
    fn rows() {
        let mut editor = Editor::new("the quick brown\nfox");
        assert_eq!((editor.place(10).row, editor.place(10).column), (2, 3));
        assert!(editor.up(10));
        assert_eq!(&editor.text()[editor.cursor()..], "wn\nfox");
        assert!(editor.up(10) && !editor.up(10));
        assert_eq!(&editor.text()[..editor.cursor()], "the");
        assert!(editor.down(10) && editor.down(10) && !editor.down(10));
        editor.point(10, 0, 99);
        assert_eq!(&editor.text()[..editor.cursor()], "the quick");
    }

    #[test]
    fn what_is_pasted_is_harmless() {
        let editor = Editor::new("a\r\nb\rc\td\u{1b}[31m\u{202e}");
        assert_eq!(editor.text(), "a\nb\nc    d[31m");
        assert_eq!(Editor::new(&"x".repeat(300_000)).text().len(), DRAFT_BYTES_MAX);
    }

    #[test]
    fn replies_quote() {
        let mut editor = Editor::new("yes");
        editor.quote("are you\nthere?");
        assert_eq!((editor.text(), editor.cursor()), ("> are you\n> there?\nyes", 22));
        let mut editor = Editor::default();
        editor.quote("1\n2\n3\n4\n5\n6");
        assert!(editor.text().ends_with("> 5\n> …\n"));
        let mut editor = Editor::default();
        editor.quote(&"long ".repeat(10_000));
        assert!(editor.text().len() < 300 && editor.text().ends_with("…\n"));
    }

    proptest! {
        #[test]
        fn the_cursor_is_on_a_border(keys in proptest::collection::vec((0..14_u8, "(\\PC|👩\u{200d}|\u{301}|\n| ){0,3}"), 0..60)) {
            let mut editor = Editor::default();
            for (key, text) in keys {
                match key {
                    0 => editor.left(),
                    1 => editor.right(),
                    2 => editor.word_left(),
                    3 => editor.word_right(),
                    4 => editor.home(),
                    5 => editor.end(),
                    6 => editor.backspace(),
                    7 => editor.delete(),
                    8 => editor.delete_word(),
                    9 => { editor.up(7); }
                    10 => { editor.down(7); }
                    11 => editor.point(7, text.len(), 3),
                    _ => editor.insert(&text),
                }
                let at = editor.cursor();
                prop_assert!(at == editor.text().len() || editor.text().grapheme_indices(true).any(|(border, _)| border == at));
                let place = editor.place(7);
                prop_assert!(place.row < place.rows.len() && place.column <= 7);
            }
        }
    }
}
