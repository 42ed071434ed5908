//! `chat send`: a message, or one for each line of the standard input.
//!
//! Invariant: when it ends with 0, every message is on the server's disk, in the order of the lines.

use std::io::{BufRead, Read as _};
use std::time::Duration;

use chat_client::{Client, Event, Events, MessageId, Queued, SendError, Seq, Stored, Timestamp, UserId};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::follow::Connections;
use super::{connect_once, note};
use crate::arguments::Send;
use crate::failure::{Failure, FailureKind};
use crate::output::{Output, Printed};
use crate::settings::Settings;
use crate::signals::Signals;

/// Lines that are read and not yet sent.
const LINES_MAX: usize = 64;
/// Messages that are sent and not yet stored.
const IN_FLIGHT_MAX: usize = 64;
/// A line that is longer is refused without being kept.
const LINE_BYTES_MAX: usize = 1024 * 1024;
/// Shorter texts are taken by every server.
const SHORT_BYTES: usize = 256;

pub(super) async fn run(settings: &mut Settings, send: Send) -> Result<(), Failure> {
    let Send { peer, text, id, form } = send;
    let (client, events) = connect_once(settings).await?;
    let (lines, source) = match text {
        Some(text) => (one(text).await, Source::Argument),
        None => (standard_input()?, Source::Lines),
    };
    let mut sender = Sender {
        timeout: settings.timeout(),
        client,
        peer,
        id,
        source,
        output: Output::new(form),
        text_bytes_max: None,
        unknown: 0,
        stored: 0,
        refused: 0,
        first_refusal: None,
    };
    let mut signals = Signals::new()?;
    let outcome = tokio::select! {
        biased;
        () = signals.next() => None,
        outcome = sender.run(lines, events) => Some(outcome),
    };
    let outcome = outcome.unwrap_or_else(|| Err(Failure::interrupted(format!("interrupted: {}", sender.so_far()))));
    sender.client.clone().close().await;
    outcome
}

/// Where messages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Argument,
    Lines,
}

/// A line, or why it is none.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    /// Counted from 1.
    number: u64,
    text: Result<String, String>,
}

struct Sender {
    client: Client,
    timeout: Duration,
    peer: UserId,
    id: Option<MessageId>,
    source: Source,
    output: Output,
    /// The longest text that the server takes, once it was asked.
    text_bytes_max: Option<usize>,
    /// Sent, and not answered yet.
    unknown: u64,
    stored: u64,
    refused: u64,
    first_refusal: Option<Failure>,
}

impl Sender {
    async fn run(&mut self, mut lines: mpsc::Receiver<Line>, mut events: Events) -> Result<(), Failure> {
        let mut connections = Connections::default();
        let mut in_flight = FuturesOrdered::new();
        let mut is_reading = true;
        let mut answer_by = Instant::now() + self.timeout;
        while is_reading || !in_flight.is_empty() {
            tokio::select! {
                biased;
                Some((number, outcome)) = in_flight.next() => {
                    answer_by = Instant::now() + self.timeout;
                    self.outcome(number, outcome).await?;
                }
                line = lines.recv(), if is_reading && in_flight.len() < IN_FLIGHT_MAX => match line {
                    Some(line) => {
                        let number = line.number;
                        if let Some(queued) = self.queue(line).await? {
                            if in_flight.is_empty() {
                                answer_by = Instant::now() + self.timeout;
                            }
                            in_flight.push_back(async move { (number, queued.await) });
                        }
                    }
                    None => is_reading = false,
                },
                () = tokio::time::sleep_until(answer_by), if !in_flight.is_empty() => {
                    let sentence = format!("no answer from the server in time: {}", self.so_far());
                    return Err(Failure::unreachable(sentence));
                }
                Some(event) = events.next() => {
                    if let Event::Connection(state) = event {
                        connections.changed(state)?;
                    }
                }
            }
        }
        match self.first_refusal.take() {
            None => Ok(()),
            // Each was said when it happened.
            Some(first) if self.source == Source::Argument => Err(first),
            Some(_) => {
                Err(Failure::refused(format!("{} of {} lines refused", self.refused, self.refused + self.stored)))
            }
        }
    }

    /// Sends a line, if it can be a message.
    async fn queue(&mut self, line: Line) -> Result<Option<Queued>, Failure> {
        let Line { number, text } = line;
        let text = match text {
            Ok(text) => text,
            Err(why) => {
                self.refuse(number, Failure::refused(why));
                return Ok(None);
            }
        };
        if text.len() > SHORT_BYTES && text.len() > self.text_bytes_max().await? {
            // Much longer ones would end the connection.
            self.refuse(number, Failure::refused(format!("text_too_long: it has {} bytes", text.len())));
            return Ok(None);
        }
        let queued = match self.id_of(number) {
            Ok(Some(id)) => self.client.queue_as(id, &self.peer, text).await,
            Ok(None) => self.client.queue(&self.peer, text).await,
            Err(failure) => {
                self.refuse(number, failure);
                return Ok(None);
            }
        };
        match queued {
            Ok(queued) => {
                self.unknown += 1;
                Ok(Some(queued))
            }
            Err(error) => {
                self.not_sent(number, error)?;
                Ok(None)
            }
        }
    }

    fn so_far(&self) -> String {
        format!("{} stored, of {} it is not known", self.stored, self.unknown)
    }

    fn id_of(&self, number: u64) -> Result<Option<MessageId>, Failure> {
        let Some(id) = &self.id else { return Ok(None) };
        match self.source {
            Source::Argument => Ok(Some(id.clone())),
            Source::Lines => {
                let id = MessageId::parse(&format!("{id}-{number}"));
                id.map(Some).map_err(|error| Failure::refused(format!("the id with a number behind it: {error}")))
            }
        }
    }

    async fn text_bytes_max(&mut self) -> Result<usize, Failure> {
        match self.text_bytes_max {
            Some(bytes) => Ok(bytes),
            None => Ok(*self.text_bytes_max.insert(self.client.whoami().await?.message_bytes)),
        }
    }

    async fn outcome(&mut self, number: u64, outcome: Result<Stored, SendError>) -> Result<(), Failure> {
        self.unknown -= 1;
        let stored = match outcome {
            Ok(stored) => stored,
            Err(error) => return self.not_sent(number, error),
        };
        self.stored += 1;
        if self.output.json && self.output.print(Output::object(&StoredLine::from(&stored))).await? == Printed::Closed {
            // What is sent is sent; nobody wants to know.
            self.output.json = false;
        }
        Ok(())
    }

    fn not_sent(&mut self, number: u64, error: SendError) -> Result<(), Failure> {
        let is_over = matches!(error, SendError::Closed(_));
        let failure = Failure::from(error);
        if is_over || failure.kind != FailureKind::Refused {
            return Err(failure);
        }
        self.refuse(number, failure);
        Ok(())
    }

    fn refuse(&mut self, number: u64, failure: Failure) {
        self.refused += 1;
        if self.source == Source::Lines {
            note(failure.clone().of(format!("line {number}")));
        }
        self.first_refusal.get_or_insert(failure);
    }
}

/// What `--json` prints of a message.
#[derive(Serialize)]
struct StoredLine<'a> {
    seq: Seq,
    id: &'a MessageId,
    at: Timestamp,
    receiver_away: bool,
}

impl<'a> From<&'a Stored> for StoredLine<'a> {
    fn from(stored: &'a Stored) -> Self {
        let Stored { id, seq, at, receiver_away } = stored;
        Self { seq: *seq, id, at: *at, receiver_away: *receiver_away }
    }
}

async fn one(text: String) -> mpsc::Receiver<Line> {
    let (sender, lines) = mpsc::channel(1);
    // There is room for it.
    sender.send(Line { number: 1, text: Ok(text) }).await.ok();
    lines
}

/// Lines as they come. The thread that reads them ends with the process: nothing else wakes it.
fn standard_input() -> Result<mpsc::Receiver<Line>, Failure> {
    let (sender, lines) = mpsc::channel(LINES_MAX);
    let read = move || {
        let mut input = std::io::stdin().lock();
        let mut number = 0;
        while let Some(line) = next_line(&mut input, &mut number) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("standard input".to_owned()).spawn(read);
    thread.map_err(|error| Failure::refused(format!("reading the standard input: {error}")))?;
    Ok(lines)
}

/// The next that is not empty.
fn next_line(input: &mut impl BufRead, number: &mut u64) -> Option<Line> {
    loop {
        *number += 1;
        let line = |text| Some(Line { number: *number, text });
        let mut bytes = Vec::new();
        match input.by_ref().take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut bytes) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) => {
                // There is no next one then.
                return (*number != u64::MAX).then(|| {
                    let failed = Line { number: *number, text: Err(format!("reading it: {error}")) };
                    *number = u64::MAX - 1;
                    failed
                });
            }
        }
        if bytes.len() == LINE_BYTES_MAX && !bytes.ends_with(b"\n") {
            // What fails here fails again with the next line.
            input.skip_until(b'\n').ok();
            return line(Err(format!("text_too_long: it has more than {LINE_BYTES_MAX} bytes")));
        }
        while bytes.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
            bytes.pop();
        }
        if bytes.is_empty() {
            continue;
        }
        return line(String::from_utf8(bytes).map_err(|_| "not_utf8: it is not UTF-8".to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(input: &[u8]) -> Vec<(u64, Result<String, String>)> {
        let (mut input, mut number) = (input, 0);
        std::iter::from_fn(|| next_line(&mut input, &mut number)).map(|line| (line.number, line.text)).collect()
    }

    #[test]
    fn lines_keep_their_numbers() {
        let ok = |number, text: &str| (number, Ok(text.to_owned()));
        assert_eq!(lines(b"one\n\n \r\n\r\nthree\r\nlast"), [ok(1, "one"), ok(3, " "), ok(5, "three"), ok(6, "last")]);
        assert_eq!(lines(b""), []);
        assert_eq!(lines(b"\n\n"), []);
    }

    #[test]
    fn what_can_be_no_message_is_said() {
        let mut input = vec![b'x'; LINE_BYTES_MAX + 10];
        input.extend(b"\nb\xff\nc\n");
        let lines = lines(&input);
        assert!(lines[0].1.as_ref().unwrap_err().starts_with("text_too_long"));
        assert!(lines[1].1.as_ref().unwrap_err().starts_with("not_utf8"));
        assert_eq!(lines[2], (3, Ok("c".to_owned())));
    }
}
