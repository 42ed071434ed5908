//! What is printed: the forms for people and for programs, and the standard output and error themselves.
//!
//! Invariant: whatever others wrote goes through [`safe`]. A text of several lines is indented from the second on, so that none can look
//! like a message of its own.

use std::io::{self, IsTerminal as _, Write};

use chat_client::{AnsweredEntry, ConversationOk, Envelope, Kind, UserId};
use jiff::ZonedDateTime;
use serde::Serialize;

use crate::arguments::Form;
use crate::failure::Failure;
use crate::moment;
use crate::safe;

/// Before each line of a text but the first.
const INDENT: &str = "    ";

/// What became of something that was to be printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Printed {
    /// It is written, and nothing of it waits in this process.
    Yes,
    /// Nobody reads any more.
    Closed,
}

/// The standard output.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
    paint: Paint,
}

/// Whether words are coloured.
#[derive(Clone, Copy, Debug)]
enum Paint {
    Colours,
    Plain,
}

impl Output {
    pub(crate) fn new(form: Form) -> Self {
        let wants = |name: &str| std::env::var_os(name).is_none_or(|value| value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let colours = !form.json && io::stdout().is_terminal() && wants("NO_COLOR") && !is_dumb;
        Self { json: form.json, paint: if colours { Paint::Colours } else { Paint::Plain } }
    }

    /// Writes a text, with a line break behind it.
    pub(crate) async fn print(&self, mut text: String) -> Result<Printed, Failure> {
        text.push('\n');
        // Who reads may be slow, and signals are heard meanwhile.
        let written = tokio::task::spawn_blocking(move || {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
        });
        let failed =
            |error: &dyn std::fmt::Display| Failure::refused(format!("writing to the standard output: {error}"));
        match written.await.map_err(|error| failed(&error))? {
            Ok(()) => Ok(Printed::Yes),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Printed::Closed),
            Err(error) => Err(failed(&error)),
        }
    }

    /// An object on a line.
    pub(crate) fn object(value: &impl Serialize) -> String {
        let json = serde_json::to_string(value).expect("strings and numbers always encode");
        safe::json(&json).into_owned()
    }

    /// A message as it came, for programs.
    pub(crate) fn wire(payload: &[u8]) -> String {
        safe::json(&String::from_utf8_lossy(payload)).into_owned()
    }

    /// A message, for people.
    pub(crate) fn message(&self, message: &Envelope, names: Names, now: &ZonedDateTime) -> String {
        let who = match names {
            Names::From => self.name(message.from.as_str()),
            Names::FromAndTo => self.name(&format!("{} → {}", message.from, message.to)),
        };
        let at = self.faint(&moment::shown(message.at, now));
        match &message.kind {
            Kind::Text(text) => format!("{at} {who}: {}", paragraph(text)),
            Kind::Edit { target, text } => format!("{at} {who}, number {target} now: {}", paragraph(text)),
            Kind::Unsend { target } => format!("{at} {who} took number {target} back"),
            Kind::Erased => format!("{at} {who}: {}", self.faint("(taken back)")),
            Kind::Other(kind) => {
                format!("{at} {who}: {}", self.faint(&format!("({}: this version does not know it)", safe::line(kind))))
            }
        }
    }

    /// An entry of a history, for people.
    pub(crate) fn entry(&self, entry: &AnsweredEntry, now: &ZonedDateTime) -> String {
        let number = self.faint(&format!("#{}", entry.seq));
        let at = self.faint(&moment::shown(entry.at, now));
        let who = self.name(entry.from.as_str());
        match &entry.text {
            Some(text) if entry.edited_at.is_some() => {
                format!("{number} {at} {who}: {} {}", paragraph(text), self.faint("(edited)"))
            }
            Some(text) => format!("{number} {at} {who}: {}", paragraph(text)),
            None => format!("{number} {at} {who}: {}", self.faint("(taken back)")),
        }
    }

    /// A conversation, for people.
    pub(crate) fn conversation(&self, conversation: &ConversationOk, me: &UserId, now: &ZonedDateTime) -> String {
        let mut line = self.name(conversation.standing.with.as_str());
        if conversation.standing.blocked {
            line.push_str(" (blocked)");
        }
        if conversation.unread > 0 {
            line.push_str(&format!(" ({} unread)", conversation.unread));
        }
        if let Some(last) = &conversation.last {
            let text = last.text.as_deref().map_or("(taken back)".into(), safe::line);
            let whose = if last.from == *me { "you: " } else { "" };
            line.push_str(&format!("  {} {whose}{text}", self.faint(&moment::shown(last.at, now))));
        }
        line
    }

    fn name(&self, text: &str) -> String {
        self.painted("1;36", text)
    }

    fn faint(&self, text: &str) -> String {
        self.painted("2", text)
    }

    fn painted(&self, colour: &str, text: &str) -> String {
        match self.paint {
            Paint::Colours => format!("\u{1b}[{colour}m{text}\u{1b}[0m"),
            Paint::Plain => text.to_owned(),
        }
    }
}

/// The standard error. Whole lines are written to it, and made safe: they may quote what others wrote.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StandardError;

impl Write for StandardError {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let mut safe = String::with_capacity(lines.len());
        for line in safe::lines(&String::from_utf8_lossy(lines)) {
            safe.push_str(&line);
            safe.push('\n');
        }
        // Nobody has to read it: that is no reason to end.
        io::stderr().write_all(safe.as_bytes()).ok();
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whose names stand before a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    From,
    FromAndTo,
}

fn paragraph(text: &str) -> String {
    safe::lines(text).collect::<Vec<_>>().join(&format!("\n{INDENT}"))
}

#[cfg(test)]
mod tests {
    use chat_client::Timestamp;

    use super::*;

    const PLAIN: Output = Output { json: false, paint: Paint::Plain };

    fn now() -> ZonedDateTime {
        "2026-11-26T12:30[UTC]".parse().unwrap()
    }

    fn message(kind: Kind) -> Envelope {
        let at: jiff::Timestamp = "2026-11-26T12:03:00Z".parse().unwrap();
        Envelope {
            conversation: chat_client::ConversationId::parse("alice:bob").unwrap(),
            seq: "7".parse().ok().and_then(chat_client::Seq::new).unwrap(),
            from: "bob".parse().unwrap(),
            to: "alice".parse().unwrap(),
            id: None,
            at: Timestamp::from_ms(at.as_millisecond().try_into().unwrap()),
            kind,
        }
    }

    #[test]
    fn messages_for_people() {
        let target = chat_client::Seq::FIRST;
        for (kind, line) in [
            (Kind::Text("hi".into()), "12:03 bob: hi"),
            (Kind::Text("hi\n12:04 carol: no\u{1b}[2J".into()), "12:03 bob: hi\n    12:04 carol: no\\u{1b}[2J"),
            (Kind::Edit { target, text: "ho".into() }, "12:03 bob, number 1 now: ho"),
            (Kind::Unsend { target }, "12:03 bob took number 1 back"),
            (Kind::Erased, "12:03 bob: (taken back)"),
            (Kind::Other("a\u{7}".into()), "12:03 bob: (a\\u{7}: this version does not know it)"),
        ] {
            assert_eq!(PLAIN.message(&message(kind), Names::From, &now()), line);
        }
        let both = PLAIN.message(&message(Kind::Text("hi".into())), Names::FromAndTo, &now());
        assert_eq!(both, "12:03 bob → alice: hi");
        let painted = Output { json: false, paint: Paint::Colours };
        let painted = painted.message(&message(Kind::Text("hi".into())), Names::From, &now());
        assert_eq!(painted, "\u{1b}[2m12:03\u{1b}[0m \u{1b}[1;36mbob\u{1b}[0m: hi");
    }

    #[test]
    fn conversations_for_people() {
        let conversation: ConversationOk = serde_json::from_value(serde_json::json!({
            "with": "bob", "delivered": 0, "read": 0, "my_read": 0, "blocked": true, "unread": 3,
            "last": { "v": 1, "kind": "text", "conversation": "alice:bob", "seq": 9, "from": "alice", "to": "bob", "at": 0, "text": "a\nb" },
        }))
        .unwrap();
        let line = PLAIN.conversation(&conversation, &"alice".parse().unwrap(), &now());
        assert_eq!(line, "bob (blocked) (3 unread)  1970-01-01 00:00 you: a↵b");
    }

    #[test]
    fn objects_are_one_harmless_line() {
        assert_eq!(Output::wire(b"{\"text\":\n\"\xc2\x9b\"}"), "{\"text\": \"\\u009b\"}");
        assert_eq!(Output::object(&serde_json::json!({ "text": "\n\u{202e}" })), "{\"text\":\"\\n\\u202e\"}");
    }
}
