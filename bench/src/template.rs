//! Topics by template: `{from}` and `{to}` stand for the names of a pair.

use anyhow::{Result, bail, ensure};

use crate::mqtt::STRING_BYTES_MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template(Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    From,
    To,
}

impl Template {
    pub(crate) fn fill(&self, from: &str, to: &str) -> String {
        self.0
            .iter()
            .map(|piece| match piece {
                Piece::Text(text) => text.as_str(),
                Piece::From => from,
                Piece::To => to,
            })
            .collect()
    }
}

impl std::str::FromStr for Template {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        ensure!(!text.is_empty(), "a topic has at least one character");
        // Names put in are longer than their places: leave room.
        ensure!(text.len() < STRING_BYTES_MAX / 64, "a topic of {} bytes", text.len());
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, place)) = rest.split_once('{') {
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            let Some((name, after)) = place.split_once('}') else { bail!("`{text}` has a {{ without its }}") };
            pieces.push(match name {
                "from" => Piece::From,
                "to" => Piece::To,
                other => bail!("`{text}`: there is {{from}} and {{to}}, but no {{{other}}}"),
            });
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self(pieces))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(template: &str) -> String {
        template.parse::<Template>().unwrap().fill("s1", "r1")
    }

    #[test]
    fn names_are_put_in_their_places() {
        assert_eq!(fill("chat/{from}/out/{to}"), "chat/s1/out/r1");
        assert_eq!(fill("bench/+/{to}"), "bench/+/r1");
        assert_eq!(fill("{to}{to}/{from}"), "r1r1/s1");
        assert_eq!(fill("plain"), "plain");
    }

    #[test]
    fn what_is_no_template_is_refused() {
        for wrong in ["", "a/{from", "a/{form}", "a/{}"] {
            assert!(wrong.parse::<Template>().is_err(), "{wrong}");
        }
    }
}
