//! How wide text is on a terminal, and where it is broken into rows.
//!
//! Everything goes by grapheme clusters: a family of emoji or a letter with its marks is one thing, never cut in two. Invariant: no row is wider than it may be,
//! but for spaces at its end, which are not drawn there, and a single grapheme that is wider than all there is.

use std::borrow::Cow;
use std::ops::Range;

use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthStr;

/// Longest grapheme that is drawn whole; a letter may carry any number of marks. A family of four with their skin tones has 41.
const GRAPHEME_BYTES_MAX: usize = 48;

/// What is drawn of a grapheme. A joiner at its end would make terminals join it with its neighbour.
pub(super) fn drawn(grapheme: &str) -> &str {
    grapheme[..grapheme.floor_char_boundary(GRAPHEME_BYTES_MAX)].trim_end_matches('\u{200d}')
}

/// Columns of one grapheme.
pub(super) fn grapheme_columns(grapheme: &str) -> usize {
    let grapheme = drawn(grapheme);
    // Terminals give these marks a column of their own, and so does ratatui.
    let sound_marks = grapheme.chars().filter(|character| matches!(character, '\u{ff9e}' | '\u{ff9f}')).count();
    if grapheme.len() == 1 { 1 } else { grapheme.width() + sound_marks }
}

/// Columns of a text without line breaks.
pub(super) fn columns(text: &str) -> usize {
    text.graphemes(true).map(grapheme_columns).sum()
}

/// As much of the text's beginning as fits, with `…` if it is not all.
pub(super) fn cut(text: &str, room: usize) -> Cow<'_, str> {
    let mut used = 0;
    let mut fits = 0;
    for (at, grapheme) in text.grapheme_indices(true) {
        used += grapheme_columns(grapheme);
        if used > room {
            return if room == 0 { Cow::Borrowed("") } else { Cow::Owned(format!("{}…", &text[..fits])) };
        }
        if used < room {
            fits = at + grapheme.len();
        }
    }
    Cow::Borrowed(text)
}

/// The rows of a text: between words where that is possible. Rows follow each other; only line breaks lie between them.
pub(super) fn wrap(text: &str, room: usize) -> Vec<Range<usize>> {
    let room = room.max(1);
    let mut rows = Vec::new();
    let mut begin = 0;
    for line in text.split('\n') {
        wrap_line(line, begin, room, &mut rows);
        begin += line.len() + 1;
    }
    rows
}

fn wrap_line(line: &str, begin: usize, room: usize, rows: &mut Vec<Range<usize>>) {
    let (mut start, mut used) = (0, 0);
    // Behind the last place where the row may end, and what is used up to there.
    let mut end: Option<(usize, usize)> = None;
    for (at, grapheme) in line.grapheme_indices(true) {
        let columns = grapheme_columns(grapheme);
        let after = at + grapheme.len();
        if grapheme == " " {
            // It hangs over the end if need be.
            used += columns;
            end = Some((after, used));
            continue;
        }
        if used + columns > room && at > start {
            if let Some((word, before)) = end.take() {
                rows.push(begin + start..begin + word);
                (start, used) = (word, used - before);
            }
            if used + columns > room && at > start {
                rows.push(begin + start..begin + at);
                (start, used) = (at, 0);
            }
        }
        used += columns;
        if columns > 1 {
            // Ideographs and emoji are words of their own.
            end = Some((after, used));
        }
    }
    rows.push(begin + start..begin + line.len());
}

/// Whether a terminal might draw it from right to left.
pub(super) fn is_right_to_left(text: &str) -> bool {
    text.chars().any(|character| {
        matches!(u32::from(character), 0x590..=0x8ff | 0xfb1d..=0xfdff | 0xfe70..=0xfeff | 0x1_0800..=0x1_0fff | 0x1_e800..=0x1_efff)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(text: &str, room: usize) -> Vec<&str> {
        wrap(text, room).into_iter().map(|row| &text[row]).collect()
    }

    #[test]
    fn words_stay_whole() {
        assert_eq!(rows("the quick brown fox", 10), ["the quick ", "brown fox"]);
        assert_eq!(rows("the quick brown fox", 9), ["the quick ", "brown fox"]);
        assert_eq!(rows("", 5), [""]);
        assert_eq!(rows("a\n\nb\n", 5), ["a", "", "b", ""]);
        assert_eq!(rows("incomprehensible", 6), ["incomp", "rehens", "ible"]);
        assert_eq!(rows("so incomprehensible", 6), ["so ", "incomp", "rehens", "ible"]);
        assert_eq!(rows("  indented", 20), ["  indented"]);
        assert_eq!(rows("wide      gap", 6), ["wide      ", "gap"]);
    }

    #[test]
    fn wide_characters() {
        assert_eq!(rows("你好世界", 5), ["你好", "世界"]);
        assert_eq!(rows("a你好", 3), ["a你", "好"]);
        let family = "👨\u{200d}👩\u{200d}👧\u{200d}👦";
        assert_eq!(columns(family), 2);
        assert_eq!(rows(&family.repeat(3), 5), [family.repeat(2), family.to_owned()]);
        assert_eq!(columns("e\u{301}"), 1);
        assert_eq!(rows("e\u{301}e\u{301}e\u{301}", 2), ["e\u{301}e\u{301}", "e\u{301}"]);
    }

    #[test]
    fn marks_without_end() {
        let text = format!("z{}", "\u{336}".repeat(8_000));
        assert_eq!(columns(&text), 1);
        assert!(drawn(&text).len() <= GRAPHEME_BYTES_MAX);
    }

    #[test]
    fn joiners_with_nothing_to_join() {
        let text = "a\u{200d}👧";
        assert_eq!(text.graphemes(true).map(drawn).collect::<Vec<_>>(), ["a", "👧"]);
        assert_eq!((drawn("\u{200d}"), grapheme_columns("\u{200d}")), ("", 0));
    }

    #[test]
    fn what_does_not_fit_is_cut() {
        assert_eq!(cut("hello", 5), "hello");
        assert_eq!(cut("hello", 4), "hel…");
        assert_eq!(cut("你好", 3), "你…");
        assert_eq!(cut("你好", 2), "…");
        assert_eq!(cut("hello", 0), "");
        assert_eq!(cut("", 0), "");
    }

    #[test]
    fn right_to_left() {
        assert!(is_right_to_left("say שלום") && is_right_to_left("مرحبا") && !is_right_to_left("grüß 你好"));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_too_wide(text in r"(\PC|[a-c ]|\n|你|👩‍👧|e\u{301}|שלום){0,60}", room in 4..30_usize) {
            let mut at = 0;
            for row in wrap(&text, room) {
                prop_assert!(text[at..row.start].chars().all(|between| between == '\n') && row.start - at <= 1);
                let drawn = text[row.clone()].trim_end_matches(' ');
                prop_assert!(columns(drawn) <= room || drawn.graphemes(true).count() == 1, "{drawn:?}");
                at = row.end;
            }
            prop_assert_eq!(at, text.len());
            prop_assert!(columns(&cut(&text.replace('\n', ""), room)) <= room);
        }
    }
}
