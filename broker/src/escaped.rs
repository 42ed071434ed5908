//! What clients send, as it may stand in a log line: on one line, without control characters, and not too long.

use std::fmt::{self, Write};

/// Characters that are shown; the rest is cut off.
const SHOWN_MAX: usize = 256;

/// Shows text from a client.
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a>(pub &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, shown) in self.0.chars().enumerate() {
            if nth == SHOWN_MAX {
                return f.write_char('…');
            }
            if is_safe(shown) {
                f.write_char(shown)?;
            } else {
                write!(f, "{}", shown.escape_default())?;
            }
        }
        Ok(())
    }
}

/// Neither ends a line, nor changes how a terminal shows what is around it.
fn is_safe(shown: char) -> bool {
    let turns_text_around =
        matches!(shown, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let ends_a_line = matches!(shown, '\u{2028}' | '\u{2029}');
    !shown.is_control() && !turns_text_around && !ends_a_line && shown != '\\'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_would_forge_a_line_is_escaped() {
        let shown = Escaped("a\nb\r\u{1b}[31m\u{0}\u{85}\u{9b}\u{202e}\u{61c}\u{2028}\\ é").to_string();
        assert_eq!(shown, "a\\nb\\r\\u{1b}[31m\\u{0}\\u{85}\\u{9b}\\u{202e}\\u{61c}\\u{2028}\\\\ é");
        let long = Escaped(&"x".repeat(100_000)).to_string();
        assert_eq!(long.chars().count(), SHOWN_MAX + 1);
    }

    proptest! {
        #[test]
        fn nothing_that_is_shown_is_a_control_character(text in "(\\PC|\\p{Cc}|\\p{Cf}){0,600}") {
            let shown = Escaped(&text).to_string();
            prop_assert!(shown.chars().all(|one| !one.is_control()), "{shown:?}");
            prop_assert!(shown.len() <= SHOWN_MAX * 12 + 3);
        }
    }
}
