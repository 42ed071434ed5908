//! What came from others, made safe to be shown on a terminal.
//!
//! Invariant: what comes out holds nothing that a terminal obeys (C0, DEL, C1), and nothing that moves its neighbours about (bidirectional overrides, isolates
//! and marks). It is shown as its number instead: `\u{1b}`. Everything else stays as it is, emoji and right-to-left words too.

use std::borrow::Cow;

/// What a tab becomes: a terminal would take as many columns as it likes.
const TAB: &str = "    ";
/// What a line break becomes where there is one line only.
const LINE_BREAK: &str = "↵";

/// All of it in one line.
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let text = text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text));
    let mut safe = String::with_capacity(text.len() + 16);
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\r' if characters.peek() == Some(&'\n') => {}
            '\n' => safe.push_str(LINE_BREAK),
            '\t' => safe.push_str(TAB),
            _ if is_unsafe(character) => safe.extend(character.escape_unicode()),
            _ => safe.push(character),
        }
    }
    Cow::Owned(safe)
}

/// Line by line, as its author broke it. An empty text has no lines.
pub(crate) fn lines(text: &str) -> impl Iterator<Item = Cow<'_, str>> {
    text.lines().map(line)
}

/// JSON on one line, with the same meaning. What JSON lets stand in strings and a terminal obeys is escaped; spaces take the place of line breaks between members.
pub(crate) fn json(json: &str) -> Cow<'_, str> {
    if !json.contains(is_unsafe) {
        return Cow::Borrowed(json);
    }
    let mut safe = String::with_capacity(json.len() + 16);
    for character in json.chars() {
        match character {
            // In a string they are escaped already.
            '\n' | '\r' | '\t' => safe.push(' '),
            _ if is_unsafe(character) => {
                safe.push_str("\\u");
                // None of them is beyond four digits.
                safe.push_str(&format!("{:04x}", u32::from(character)));
            }
            _ => safe.push(character),
        }
    }
    Cow::Owned(safe)
}

/// Whether a terminal must not get it from somebody else.
fn is_unsafe(character: char) -> bool {
    character.is_control() // C0, DEL, C1
        || matches!(character,
            '\u{061c}' | '\u{200e}' | '\u{200f}' // bidirectional marks
            | '\u{2028}' | '\u{2029}' // line and paragraph separator
            | '\u{202a}'..='\u{202e}' // embeddings and overrides
            | '\u{2066}'..='\u{206f}' // isolates, and formatting that is deprecated
            | '\u{fff9}'..='\u{fffb}' // annotations between lines
        )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_harmless_stays() {
        for text in ["", "hello", "grüß dich", "你好", "שלום", "👩\u{200d}👩\u{200d}👧", "e\u{301}", "C:\\new"]
        {
            assert!(matches!(line(text), Cow::Borrowed(same) if same == text), "{text}");
        }
    }

    #[test]
    fn what_a_terminal_obeys_is_shown() {
        for (text, safe) in [
            ("\u{1b}[2J", "\\u{1b}[2J"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("a\u{7f}\u{8}\0", "a\\u{7f}\\u{8}\\u{0}"),
            ("over\rwritten", "over\\u{d}written"),
            ("\u{202e}gpj.exe\u{2069}", "\\u{202e}gpj.exe\\u{2069}"),
            ("\u{200f}\u{61c}", "\\u{200f}\\u{61c}"),
            ("a\tb", "a    b"),
        ] {
            assert_eq!(line(text), safe);
        }
    }

    #[test]
    fn line_breaks() {
        assert_eq!(line("one\ntwo\r\nthree\n"), "one↵two↵three");
        assert_eq!(lines("one\n\ntwo\r\nthree\u{1b}\n").collect::<Vec<_>>(), ["one", "", "two", "three\\u{1b}"]);
        assert_eq!(lines("").count(), 0);
    }

    #[test]
    fn json_keeps_its_meaning() {
        for (given, expected) in [
            ("{\"a\":\"b\"}", "{\"a\":\"b\"}"),
            ("{\"a\":\n\t1}", "{\"a\":  1}"),
            ("\"\u{9b}\u{7f}\u{202e}\\u001b\"", "\"\\u009b\\u007f\\u202e\\u001b\""),
        ] {
            assert_eq!(json(given), expected);
        }
    }

    proptest! {
        #[test]
        fn any_text_survives_in_json(text in any::<String>()) {
            let written = serde_json::to_string(&text).unwrap();
            let safe = json(&written);
            prop_assert!(!safe.contains(is_unsafe));
            prop_assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), text);
        }

        #[test]
        fn nothing_passes(text in any::<String>(), bytes in any::<Vec<u8>>()) {
            for text in [text, String::from_utf8_lossy(&bytes).into_owned()] {
                prop_assert!(!line(&text).contains(is_unsafe));
                prop_assert!(lines(&text).all(|line| !line.contains(is_unsafe)));
            }
        }
    }
}
