//! Where in a text something is, whichever case it is written in.

use std::ops::Range;

/// Every place of a needle in a text, as bytes of the text; none for an empty needle.
pub(super) fn find(text: &str, needle: &str) -> Vec<Range<usize>> {
    let needle: String = needle.chars().flat_map(char::to_lowercase).collect();
    if needle.is_empty() {
        return Vec::new();
    }
    // A character in lower case may be longer or shorter: for each of its bytes, where the character is in the text.
    let mut folded = String::with_capacity(text.len());
    let mut origins: Vec<Range<usize>> = Vec::with_capacity(text.len());
    for (at, character) in text.char_indices() {
        folded.extend(character.to_lowercase());
        origins.resize(folded.len(), at..at + character.len_utf8());
    }
    let places = folded.match_indices(&needle);
    places.filter_map(|(at, found)| Some(origins.get(at)?.start..origins.get(at + found.len() - 1)?.end)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn whatever_the_case() {
        assert_eq!(find("Hello hello HELLO", "hello"), [0..5, 6..11, 12..17]);
        assert_eq!(find("İstanbul ist IST", "IST"), [10..13, 14..17]);
        assert_eq!(find("GRÜSSE grüße", "grü"), [0..4, 8..12]);
        assert_eq!(find("hello", ""), [0..0; 0]);
        assert_eq!(find("", "x"), [0..0; 0]);
    }

    proptest! {
        #[test]
        fn always_in_the_text(text in "\\PC{0,20}", needle in "\\PC{0,3}") {
            for place in find(&text, &needle) {
                prop_assert!(text.get(place).is_some());
            }
        }
    }
}
