//! The chat without a terminal and without a server: keys, events and answers in, effects and a drawn screen out.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use chat_client::{
    AnsweredEntry, Closed, ConnectionState, ConversationId, ConversationOk, ConversationsOk, Envelope, ErrorCode,
    Event, HistoryOk, Kind, MessageId, PresenceEvent, PresenceStatus, Range, ReadEvent, ReceiptEvent, Refusal,
    RequestError, SendError, Seq, Standing, Stored, Timestamp, TypingEvent, TypingState, Unsent, UserId,
};
use crossterm::event::{Event as TerminalEvent, KeyCode, KeyEvent, KeyModifiers};
use jiff::tz::TimeZone;
use proptest::prelude::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::{Buffer, CellWidth as _};
use unicode_segmentation::UnicodeSegmentation as _;

use super::conversation::{Item, Progress, Scroll};
use super::drafts::Drafts;
use super::model::{App, Effect, Focus, Input};
use super::{Now, view, wrap};

/// 4 May 2027, 14:30.
const WALL_MS: u64 = 1_809_441_000_000;

fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

fn seq(number: u64) -> Seq {
    Seq::new(number).unwrap()
}

fn id(id: &str) -> MessageId {
    MessageId::parse(id).unwrap()
}

/// The chat of alice, a clock that a test moves, and what was asked of the outside and not taken yet.
struct Chat {
    app: App,
    now: Now,
    effects: VecDeque<Effect>,
    size: (u16, u16),
}

impl Chat {
    fn new(columns: u16, rows: u16) -> Self {
        let now = Now { instant: Instant::now(), wall_ms: WALL_MS };
        let app = App::new(user("alice"), TimeZone::UTC, (columns, rows), Vec::new(), &Drafts::new(), now);
        Self { app, now, effects: VecDeque::new(), size: (columns, rows) }
    }

    /// Connected, and the list told.
    fn connected(columns: u16, rows: u16, list: Vec<ConversationOk>) -> Self {
        let mut chat = Self::new(columns, rows);
        chat.connect();
        chat.list(list);
        chat
    }

    fn handle(&mut self, input: Input) {
        self.effects.extend(self.app.handle(input, self.now));
    }

    fn connect(&mut self) {
        self.handle(Input::Client(Event::Connection(ConnectionState::Connected { resumed: true })));
        assert_eq!(self.take(|effect| matches!(effect, Effect::Whoami)).len(), 1);
    }

    fn lose(&mut self) {
        let state = ConnectionState::Lost { reason: "gone".into(), retry_in: Duration::from_secs(4) };
        self.handle(Input::Client(Event::Connection(state)));
    }

    /// Effects of a kind; others stay.
    fn take(&mut self, is_it: impl Fn(&Effect) -> bool) -> Vec<Effect> {
        let (taken, left) = self.effects.drain(..).partition(|effect| is_it(effect));
        self.effects = left;
        taken.into_iter().collect()
    }

    /// Answers that the list is this.
    fn list(&mut self, conversations: Vec<ConversationOk>) {
        let asked = self.take(|effect| matches!(effect, Effect::Conversations { .. }));
        let Some(Effect::Conversations { ticket, .. }) = asked.last() else {
            panic!("nobody asked: {:?}", self.effects)
        };
        let ticket = *ticket;
        self.handle(Input::Conversations {
            ticket,
            outcome: Ok(ConversationsOk { conversations, next: None, sync: None }),
        });
    }

    /// Answers what was asked of the history, from a conversation that has so many texts.
    fn histories(&mut self, count: u64) {
        while let Some(Effect::History { with, ticket, range, limit }) =
            self.take(|effect| matches!(effect, Effect::History { .. })).pop()
        {
            let limit = u64::try_from(limit).unwrap();
            let (begin, end, more) = match range {
                Range::Before(before) => {
                    let end = before.map_or(count, |before| before.get() - 1);
                    let begin = end.saturating_sub(limit) + 1;
                    (begin, end, begin > 1)
                }
                Range::After(after) => {
                    let begin = after.map_or(1, |after| after.get() + 1);
                    let end = (begin + limit - 1).min(count);
                    (begin, end, end < count)
                }
            };
            let entries = (begin..=end).map(answered).collect();
            self.handle(Input::History { with: with.clone(), ticket, outcome: Ok(HistoryOk { with, entries, more }) });
        }
    }

    fn press(&mut self, code: KeyCode, modifiers: KeyModifiers) {
        self.handle(Input::Terminal(TerminalEvent::Key(KeyEvent::new(code, modifiers))));
    }

    fn key(&mut self, code: KeyCode) {
        self.press(code, KeyModifiers::NONE);
    }

    fn control(&mut self, key: char) {
        self.press(KeyCode::Char(key), KeyModifiers::CONTROL);
    }

    fn text(&mut self, text: &str) {
        for character in text.chars() {
            self.key(KeyCode::Char(character));
        }
    }

    fn begin(&mut self, peer: &str) {
        self.control('n');
        self.text(peer);
        self.key(KeyCode::Enter);
    }

    fn say(&mut self, text: &str) -> u64 {
        self.text(text);
        self.key(KeyCode::Enter);
        match self.take(|effect| matches!(effect, Effect::Send { .. })).as_slice() {
            [Effect::Send { key, text: sent, .. }] if sent == text => *key,
            other => panic!("{other:?}"),
        }
    }

    fn arrive(&mut self, from: &str, number: u64, message_id: Option<&str>, kind: Kind) {
        let to = if from == "alice" { "bob" } else { "alice" };
        self.handle(Input::Message(Envelope {
            conversation: ConversationId::between(&user("alice"), &user("bob")).unwrap(),
            seq: seq(number),
            from: user(from),
            to: user(to),
            id: message_id.map(id),
            at: Timestamp::from_ms(WALL_MS),
            kind,
        }));
    }

    fn stored(&mut self, key: u64, message_id: &str, number: u64) {
        let stored =
            Stored { id: id(message_id), seq: seq(number), at: Timestamp::from_ms(WALL_MS), receiver_away: false };
        self.handle(Input::Stored { to: user("bob"), key, stored });
    }

    fn pass(&mut self, time: Duration) {
        self.now.instant += time;
        self.now.wall_ms += u64::try_from(time.as_millis()).unwrap();
        self.handle(Input::Tick);
    }

    fn resize(&mut self, columns: u16, rows: u16) {
        self.size = (columns, rows);
        self.handle(Input::Terminal(TerminalEvent::Resize(columns, rows)));
    }

    fn buffer(&self) -> Buffer {
        let mut terminal = Terminal::new(TestBackend::new(self.size.0, self.size.1)).unwrap();
        terminal.draw(|frame| view::draw(frame, &self.app)).unwrap();
        terminal.backend().buffer().clone()
    }

    fn screen(&self) -> Vec<String> {
        let buffer = self.buffer();
        let row = |y| {
            let mut row = String::new();
            let mut x = 0;
            while x < buffer.area.width {
                let symbol = buffer[(x, y)].symbol();
                row.push_str(symbol);
                x += symbol.cell_width().max(1);
            }
            row.trim_end().to_owned()
        };
        (0..buffer.area.height).map(row).collect()
    }

    fn shows(&self, text: &str) -> bool {
        self.screen().iter().any(|row| row.contains(text))
    }
}

/// Odd ones are bob's.
fn answered(number: u64) -> AnsweredEntry {
    let (from, to) = if number % 2 == 1 { ("bob", "alice") } else { ("alice", "bob") };
    AnsweredEntry {
        v: 1,
        kind: "text".into(),
        conversation: ConversationId::between(&user("alice"), &user("bob")).unwrap(),
        seq: seq(number),
        from: user(from),
        to: user(to),
        id: None,
        at: Timestamp::from_ms(WALL_MS - 600_000 + number),
        target: None,
        text: Some(format!("text {number}")),
        edited_at: None,
        unsent: false,
    }
}

fn told(with: &str, last: u64, unread: u64, my_read: u64) -> ConversationOk {
    let standing = Standing { with: user(with), delivered: 0, read: 0, my_read, blocked: false };
    ConversationOk { standing, last: Some(answered(last)), unread }
}

fn text(text: &str) -> Kind {
    Kind::Text(text.into())
}

#[test]
fn a_message_is_shown_once_whichever_answer_comes_first() {
    // 0: it is in the outbox, 1: it is stored, 2: it is delivered to this device as its sender's.
    for order in [[0, 1, 2], [0, 2, 1], [2, 0, 1]] {
        let mut chat = Chat::connected(80, 24, Vec::new());
        chat.begin("bob");
        chat.histories(0);
        let key = chat.say("hello");
        assert!(chat.shows("hello") && chat.shows("◷"));
        for step in order {
            match step {
                0 => chat.handle(Input::Queued { to: user("bob"), key, id: id("m-1") }),
                1 => chat.stored(key, "m-1", 1),
                _ => chat.arrive("alice", 1, Some("m-1"), text("hello")),
            }
        }
        let timeline =
            chat.screen().iter().filter(|row| row.split('│').nth(1).is_some_and(|row| row.contains("hello"))).count();
        assert_eq!(timeline, 1, "{order:?} {:#?}", chat.screen());
        assert!(chat.shows("✓") && !chat.shows("✓✓") && !chat.shows("◷"));
        assert!(chat.app.opened().unwrap().outgoing.is_empty());
    }
}

#[test]
fn ticks() {
    let mut chat = Chat::connected(80, 24, Vec::new());
    chat.begin("bob");
    chat.histories(0);
    let key = chat.say("hello");
    chat.stored(key, "m-1", 1);
    let receipt = |delivered, read| Input::Client(Event::Receipt(ReceiptEvent { with: user("bob"), delivered, read }));
    chat.handle(receipt(1, 0));
    let colour = |chat: &Chat| {
        let buffer = chat.buffer();
        let row = (0..24).find(|y| buffer[(77, *y)].symbol() == "✓").expect("two ticks");
        assert_eq!(buffer[(78, row)].symbol(), "✓");
        buffer[(77, row)].fg
    };
    assert_eq!(colour(&chat), ratatui::style::Color::DarkGray);
    chat.handle(receipt(1, 1));
    assert_eq!(colour(&chat), ratatui::style::Color::Cyan);
    // They only advance.
    chat.handle(receipt(0, 0));
    assert_eq!(colour(&chat), ratatui::style::Color::Cyan);
}

#[test]
fn what_is_not_sent_says_why_and_is_sent_again() {
    let mut chat = Chat::connected(80, 24, Vec::new());
    chat.begin("bob");
    chat.histories(0);
    let key = chat.say("hello");
    chat.handle(Input::NotStored { to: user("bob"), key, reason: "quota_exceeded: no\u{1b}[2J more".into() });
    assert!(chat.shows("quota_exceeded: no\\u{1b}[2J more"), "{:#?}", chat.screen());
    chat.control('r');
    let again = chat.take(|effect| matches!(effect, Effect::Send { .. }));
    assert!(matches!(again.as_slice(), [Effect::Send { text, key: again, .. }] if text == "hello" && *again != key));
    assert!(!chat.shows("quota_exceeded") && chat.shows("◷"));
    // One that an earlier run left.
    let refusal = Refusal { code: Some(ErrorCode::UnknownUser), reason_code: 0x90, message: "unknown_user".into() };
    let error = SendError::Refused(refusal);
    chat.handle(Input::Client(Event::NotSent { id: id("old"), to: user("carol"), text: "old one".into(), error }));
    assert!(chat.shows("✗ old one"));
    let carol = &chat.app.conversations[&user("carol")];
    assert!(matches!(&carol.outgoing[0].progress, Progress::NotSent(reason) if reason.contains("unknown_user")));
}

#[test]
fn what_waits_since_an_earlier_run_is_there() {
    let now = Now { instant: Instant::now(), wall_ms: WALL_MS };
    let waiting =
        Unsent { id: id("m-1"), to: user("bob"), text: "later".into(), queued_at: Timestamp::from_ms(WALL_MS) };
    let app = App::new(user("alice"), TimeZone::UTC, (80, 24), vec![waiting], &Drafts::new(), now);
    let mut chat = Chat { app, now, effects: VecDeque::new(), size: (80, 24) };
    assert!(chat.shows("◷ later") && chat.shows("1 message waits"));
    chat.connect();
    chat.list(Vec::new());
    chat.key(KeyCode::Enter);
    chat.histories(0);
    chat.arrive("alice", 1, Some("m-1"), text("later"));
    assert!(!chat.shows("◷") && chat.shows("✓"));
}

/// It was stored by the earlier run, which could not say so any more: nobody sends it to this device again.
#[test]
fn what_was_stored_by_an_earlier_run_is_shown_once() {
    let now = Now { instant: Instant::now(), wall_ms: WALL_MS };
    let waiting = ["m-1", "m-2"].map(|name| {
        let (text, queued_at) = (format!("text of {name}"), Timestamp::from_ms(WALL_MS));
        Unsent { id: id(name), to: user("bob"), text, queued_at }
    });
    let app = App::new(user("alice"), TimeZone::UTC, (80, 24), waiting.to_vec(), &Drafts::new(), now);
    let mut chat = Chat { app, now, effects: VecDeque::new(), size: (80, 24) };
    chat.connect();
    chat.handle(Input::Left(id("m-1")));
    let outgoing = &chat.app.conversations[&user("bob")].outgoing;
    assert!(outgoing.len() == 1 && outgoing[0].id == Some(id("m-2")));
    // Refused is something else, in whichever order it is told.
    let refusal = Refusal { code: Some(ErrorCode::UnknownUser), reason_code: 0x90, message: "unknown_user".into() };
    let error = SendError::Refused(refusal);
    chat.handle(Input::Client(Event::NotSent { id: id("m-2"), to: user("bob"), text: "text of m-2".into(), error }));
    chat.handle(Input::Left(id("m-2")));
    assert!(chat.shows("✗ text of m-2"));
}

#[test]
fn read_is_what_somebody_saw() {
    let is_read = |chat: &mut Chat| {
        let marked = chat.take(|effect| matches!(effect, Effect::MarkRead { .. }));
        marked
            .iter()
            .map(|effect| if let Effect::MarkRead { seq, .. } = effect { seq.get() } else { 0 })
            .collect::<Vec<_>>()
    };
    let mut chat = Chat::connected(80, 24, vec![told("bob", 99, 5, 90)]);
    assert!(chat.shows(" 5 ") && is_read(&mut chat).is_empty());
    chat.key(KeyCode::Enter);
    assert!(is_read(&mut chat).is_empty(), "nothing is loaded yet");
    chat.histories(99);
    assert_eq!(is_read(&mut chat), [99]);
    assert!(!chat.shows(" 5 ") && chat.shows(" new "));
    // Nobody looks.
    chat.handle(Input::Terminal(TerminalEvent::FocusLost));
    chat.arrive("bob", 101, None, text("are you there?"));
    assert!(is_read(&mut chat).is_empty() && chat.shows(" 1 "));
    chat.handle(Input::Terminal(TerminalEvent::FocusGained));
    assert_eq!(is_read(&mut chat), [101]);
    // It is below the screen.
    chat.key(KeyCode::PageUp);
    chat.arrive("bob", 103, None, text("hello?"));
    assert!(is_read(&mut chat).is_empty() && chat.shows("1 new below"));
    chat.press(KeyCode::End, KeyModifiers::CONTROL);
    assert_eq!(is_read(&mut chat), [103]);
    // On a narrow screen with the list.
    chat.resize(60, 24);
    chat.key(KeyCode::Tab);
    chat.arrive("bob", 105, None, text("hello??"));
    assert!(is_read(&mut chat).is_empty());
    chat.key(KeyCode::Tab);
    assert_eq!(is_read(&mut chat), [105]);
    // Another device has read more.
    chat.handle(Input::Terminal(TerminalEvent::FocusLost));
    chat.arrive("bob", 107, None, text("hello???"));
    assert_eq!(chat.app.opened().unwrap().unread(), 1);
    chat.handle(Input::Client(Event::Read(ReadEvent { with: user("bob"), read: 107 })));
    assert_eq!(chat.app.opened().unwrap().unread(), 0);
}

#[test]
fn unread_is_counted_once() {
    let mut chat = Chat::connected(80, 24, vec![told("bob", 9, 3, 4)]);
    let unread = |chat: &Chat| chat.app.conversations[&user("bob")].unread();
    // What waited for this device is in the server's count already.
    for number in [5, 7, 9] {
        chat.arrive("bob", number, None, text("x"));
    }
    assert_eq!(unread(&chat), 3);
    chat.arrive("bob", 11, None, text("x"));
    chat.arrive("bob", 11, None, text("x"));
    assert_eq!(unread(&chat), 4);
    // An answer that is older than what has arrived.
    chat.connect();
    chat.list(vec![told("bob", 9, 3, 4)]);
    assert_eq!(unread(&chat), 4);
    // Who answers has read.
    chat.arrive("alice", 12, None, text("x"));
    assert_eq!(unread(&chat), 0);
}

#[test]
fn typing_is_told() {
    let states = |chat: &mut Chat| {
        let told = chat.take(|effect| matches!(effect, Effect::Typing { .. }));
        told.iter()
            .filter_map(|effect| if let Effect::Typing { state, .. } = effect { Some(*state) } else { None })
            .collect::<Vec<_>>()
    };
    let mut chat = Chat::connected(80, 24, Vec::new());
    chat.begin("bob");
    chat.histories(0);
    assert_eq!(states(&mut chat), []);
    chat.text("hel");
    assert_eq!(states(&mut chat), [TypingState::On]);
    chat.pass(Duration::from_millis(3_500));
    chat.text("lo");
    assert_eq!(states(&mut chat), [TypingState::On], "said again, while it goes on");
    assert!(chat.app.wake_at().is_some());
    chat.pass(Duration::from_secs(5));
    assert_eq!(states(&mut chat), [TypingState::Off], "idle");
    chat.text("!");
    chat.key(KeyCode::Enter);
    assert_eq!(states(&mut chat), [TypingState::On, TypingState::Off]);
    chat.text("x");
    chat.key(KeyCode::Backspace);
    assert_eq!(states(&mut chat), [TypingState::On, TypingState::Off]);
    chat.text("x");
    chat.begin("carol");
    assert_eq!(states(&mut chat), [TypingState::On, TypingState::Off]);
    // And heard; it ends by itself if its end is missed.
    chat.begin("bob");
    chat.handle(Input::Client(Event::Typing(TypingEvent { from: user("bob"), state: TypingState::On })));
    assert!(chat.shows("bob is typing…"));
    chat.pass(Duration::from_secs(9));
    assert!(!chat.shows("bob is typing…"));
    // With whom there is no conversation, there is none yet.
    chat.handle(Input::Client(Event::Typing(TypingEvent { from: user("mallory"), state: TypingState::On })));
    assert!(!chat.shows("mallory"));
}

#[test]
fn editing_keeps_what_was_being_written() {
    let mut chat = Chat::connected(80, 24, vec![told("bob", 10, 0, 9)]);
    chat.key(KeyCode::Enter);
    chat.histories(10);
    chat.key(KeyCode::Up);
    assert!(chat.shows("Editing") && chat.shows("✎ text 10"));
    chat.key(KeyCode::Esc);
    assert!(chat.shows("> Write a message"));
    chat.text("a draft");
    chat.press(KeyCode::Up, KeyModifiers::ALT);
    assert!(chat.shows("r reply"));
    chat.key(KeyCode::Char('e'));
    chat.text("!");
    chat.key(KeyCode::Enter);
    assert!(chat.shows("> a draft"));
    let edits = chat.take(|effect| matches!(effect, Effect::Edit { .. }));
    let [Effect::Edit { with, seq: target, text: words }] = edits.as_slice() else { panic!("{edits:?}") };
    assert_eq!((target.get(), words.as_str()), (10, "text 10!"));
    let answer = |outcome| Input::Edited { with: with.clone(), seq: *target, text: words.clone(), outcome };
    chat.handle(answer(Ok(Timestamp::from_ms(WALL_MS))));
    assert!(chat.shows("text 10! (edited)"));
    // If it fails and nothing else is being written, the words come back.
    chat.control('u');
    chat.handle(answer(Err(RequestError::TimedOut)));
    assert!(chat.shows("✎ text 10!") && chat.shows("not edited: no answer"));
    // Only own ones.
    chat.key(KeyCode::Esc);
    chat.press(KeyCode::Up, KeyModifiers::ALT);
    chat.key(KeyCode::Up);
    chat.key(KeyCode::Char('e'));
    assert!(chat.shows("only your own"));
}

#[test]
fn what_did_not_come_is_asked_for_again_but_not_at_once() {
    let mut chat = Chat::connected(80, 24, vec![told("bob", 10, 0, 9)]);
    chat.key(KeyCode::Enter);
    let asked = |chat: &mut Chat| chat.take(|effect| matches!(effect, Effect::History { .. }));
    let Some(Effect::History { with, ticket, .. }) = asked(&mut chat).pop() else { panic!("not asked") };
    chat.handle(Input::History { with: with.clone(), ticket, outcome: Err(RequestError::TimedOut) });
    assert!(asked(&mut chat).is_empty() && chat.shows("the history did not come"));
    chat.pass(Duration::from_secs(1));
    assert!(asked(&mut chat).is_empty());
    chat.pass(Duration::from_secs(5));
    let Some(Effect::History { ticket: second, .. }) = asked(&mut chat).pop() else { panic!("not asked again") };
    // The late answer to the first counts for nothing.
    let entries = vec![answered(3)];
    chat.handle(Input::History {
        with: with.clone(),
        ticket,
        outcome: Ok(HistoryOk { with: with.clone(), entries, more: false }),
    });
    assert!(!chat.shows("text 3"));
    let entries = vec![answered(10)];
    chat.handle(Input::History {
        with: with.clone(),
        ticket: second,
        outcome: Ok(HistoryOk { with, entries, more: false }),
    });
    assert!(chat.shows("text 10") && asked(&mut chat).is_empty());
}

#[test]
fn a_long_history_is_paged_up_and_down_and_bounded() {
    let count = 5_000;
    let mut chat = Chat::connected(80, 24, vec![told("bob", count, 0, count)]);
    chat.key(KeyCode::Enter);
    chat.histories(count);
    let mut seen = 0;
    while !chat.shows("the beginning") {
        chat.key(KeyCode::PageUp);
        chat.histories(count);
        let loaded = chat.app.opened().unwrap().timeline.entries().len();
        assert!(loaded <= 2_000);
        seen += 1;
        assert!(seen < 1_000);
    }
    assert!(chat.app.opened().unwrap().timeline.has_later());
    // What arrives does not belong here.
    chat.arrive("bob", count + 1, None, text("far below"));
    let mut last = Vec::new();
    while chat.app.is_scrolled_up() {
        chat.key(KeyCode::PageDown);
        chat.histories(count);
        let screen = chat.screen();
        assert_ne!(screen, last, "it goes on");
        last = screen;
    }
    assert!(chat.shows("text 5000"), "{:#?}", chat.screen());
    assert!(!chat.app.opened().unwrap().timeline.has_later());
}

#[test]
fn a_lost_connection_is_told_and_counted_down() {
    let mut chat = Chat::new(80, 24);
    assert!(chat.shows("Connecting…"));
    chat.connect();
    chat.list(Vec::new());
    let online = PresenceEvent { user: user("bob"), status: PresenceStatus::Online, last_seen: None };
    chat.begin("bob");
    chat.histories(0);
    chat.handle(Input::Client(Event::Presence(online)));
    assert!(chat.shows("● bob  online") && !chat.shows("Not connected"));
    chat.lose();
    assert!(chat.shows("Not connected · Trying again in 4 s · gone") && !chat.shows("●"), "{:#?}", chat.screen());
    chat.pass(Duration::from_secs(1));
    assert!(chat.shows("in 3 s"));
    chat.say("meanwhile");
    assert!(chat.shows("1 message waits"));
    chat.pass(Duration::from_secs(10));
    assert!(chat.shows("Trying again…"));
    assert!(chat.take(|effect| matches!(effect, Effect::History { .. } | Effect::Typing { .. })).is_empty());
    chat.connect();
    assert!(!chat.shows("Not connected"));
    assert_eq!(chat.take(|effect| matches!(effect, Effect::History { .. })).len(), 1, "what was missed");
}

#[test]
fn sixty_columns() {
    let mut chat = Chat::connected(60, 14, vec![told("bob", 3, 2, 0)]);
    let list = chat.screen();
    assert_eq!(list[0], " alice");
    assert_eq!(list[1], "▌○ bob                                                14:20", "{list:#?}");
    assert_eq!(list[2], "▌  text 3                                                2", "{list:#?}");
    chat.key(KeyCode::Enter);
    chat.histories(3);
    let timeline = chat.screen();
    let expected = [
        " ○ bob",
        "",
        "  ───────────────────── the beginning ─────────────────────",
        "  ───────────────────────── Today ─────────────────────────",
        "  ────────────────────────── new ──────────────────────────",
        "  bob",
        "  text 1                                           14:20",
        "  alice",
        "  text 2                                           14:20 ✓",
        "  bob",
        "  text 3                                           14:20",
        "────────────────────────────────────────────────────────────",
        "> Write a message",
        " F1 help · Tab list · Ctrl-F search · Ctrl-N new · Ctrl-C q…",
    ];
    assert_eq!(timeline, expected, "{timeline:#?}");
}

#[test]
fn eighty_columns() {
    let mut chat = Chat::connected(80, 12, vec![told("bob", 3, 0, 3)]);
    chat.key(KeyCode::Enter);
    chat.histories(3);
    let screen = chat.screen();
    assert_eq!(screen[0], " alice                    │ ○ bob", "{screen:#?}");
    assert_eq!(
        screen[1], " ○ bob              14:20 │  ───────────────── the beginning ──────────────────",
        "{screen:#?}"
    );
    assert_eq!(screen[5], "                          │  alice", "{screen:#?}");
    assert_eq!(
        screen[6], "                          │  text 2                                    14:20 ✓",
        "{screen:#?}"
    );
    chat.say("a text that is longer than a row of a timeline beside a list, and so goes on");
    let screen = chat.screen();
    assert_eq!(
        screen[7], "                          │  a text that is longer than a row of a     14:30 ◷",
        "{screen:#?}"
    );
    assert_eq!(screen[8], "                          │  timeline beside a list, and so goes on", "{screen:#?}");
}

#[test]
fn a_hundred_and_twenty_columns() {
    let mut chat = Chat::connected(120, 12, vec![told("bob", 3, 0, 3)]);
    chat.key(KeyCode::Enter);
    chat.histories(3);
    let screen = chat.screen();
    assert_eq!(screen[0].chars().position(|c| c == '│'), Some(36), "{screen:#?}");
    assert!(screen[6].starts_with(&format!("{:36}│  text 2", "")) && screen[6].ends_with("14:20 ✓"), "{screen:#?}");
    chat.key(KeyCode::F(1));
    assert!(chat.shows("reply by quoting it"));
}

#[test]
fn what_goes_does_not_move_what_stays() {
    let mut chat = Chat::connected(80, 24, vec![told("bob", 90, 0, 90)]);
    chat.key(KeyCode::Enter);
    chat.histories(90);
    chat.key(KeyCode::PageUp);
    let Scroll::At { item: Item::Entry(top), .. } = chat.app.opened().unwrap().scroll else { panic!("not scrolled") };
    let row = |chat: &Chat, number: u64| chat.screen().iter().position(|row| row.contains(&format!("text {number} ")));
    let before = row(&chat, top.get() + 4).expect("on the screen");
    chat.handle(Input::Deleted { with: user("bob"), seq: top, outcome: Ok(()) });
    assert_eq!(row(&chat, top.get()), None);
    let after = row(&chat, top.get() + 4).expect("still on the screen");
    assert!(chat.app.is_scrolled_up() && before.abs_diff(after) <= 2, "{before} {after}");
}

#[test]
fn what_was_on_its_way_stays_where_it_is_when_it_is_stored() {
    let mut chat = Chat::connected(80, 24, vec![told("bob", 9, 0, 9)]);
    chat.key(KeyCode::Enter);
    chat.histories(9);
    let keys: Vec<u64> = (0..50).map(|number| chat.say(&format!("written {number}."))).collect();
    chat.key(KeyCode::PageUp);
    chat.press(KeyCode::Up, KeyModifiers::ALT);
    // Without the list, and without ticks.
    let texts = |chat: &Chat| {
        let row = |row: &String| row.split('│').nth(1).unwrap_or_default().split("  14:").next().unwrap().to_owned();
        chat.screen().iter().map(row).collect::<Vec<_>>()
    };
    let before = texts(&chat);
    let Focus::Messages(Item::Outgoing(chosen)) = chat.app.focus else { panic!("{:?}", chat.app.focus) };
    for (number, key) in (10..).zip(&keys) {
        chat.stored(*key, &format!("m-{number}"), number);
        assert_eq!(texts(&chat)[2..20], before[2..20], "{number}");
    }
    let seq = seq(10 + u64::try_from(keys.iter().position(|key| *key == chosen).unwrap()).unwrap());
    assert_eq!(chat.app.focus, Focus::Messages(Item::Entry(seq)));
}

#[test]
fn what_was_not_sent_can_be_written_anew() {
    let mut chat = Chat::connected(80, 24, vec![told("bob", 10, 0, 10)]);
    chat.key(KeyCode::Enter);
    chat.histories(10);
    let key = chat.say("far too long");
    // It may be on the server's disk already: not even the message before it is meant.
    chat.key(KeyCode::Up);
    assert!(chat.shows("on its way") && chat.shows("> Write a message"));
    chat.handle(Input::NotStored { to: user("bob"), key, reason: "text_too_long".into() });
    chat.key(KeyCode::Up);
    assert!(chat.shows("> far too long") && !chat.shows("✗") && !chat.shows("Editing"));
    chat.control('u');
    let key = chat.say("short");
    chat.handle(Input::NotStored { to: user("bob"), key, reason: "too_fast".into() });
    chat.text("something else");
    chat.press(KeyCode::Up, KeyModifiers::ALT);
    chat.key(KeyCode::Char('e'));
    assert!(chat.shows("✗ too_fast") && chat.shows("> something else"));
}

#[test]
fn where_nothing_can_be_sent_words_stay_in_the_editor() {
    let mut chat = Chat::connected(80, 24, Vec::new());
    chat.begin("bob");
    chat.histories(0);
    chat.handle(Input::Client(Event::Connection(ConnectionState::Closed(Closed::TakenOver))));
    chat.text("hello");
    chat.key(KeyCode::Enter);
    assert!(chat.shows("> hello") && chat.shows("stays here"), "{:#?}", chat.screen());
    assert!(chat.take(|effect| matches!(effect, Effect::Send { .. })).is_empty());
    assert_eq!(chat.app.drafts()[&user("bob")], "hello");
}

#[test]
fn what_own_messages_push_off_the_screen_is_not_read() {
    let mut chat = Chat::connected(80, 24, vec![told("bob", 9, 0, 9)]);
    chat.key(KeyCode::Enter);
    chat.histories(9);
    chat.lose();
    for number in 0..30 {
        chat.say(&format!("written {number}"));
    }
    chat.connect();
    chat.list(vec![told("bob", 11, 1, 9)]);
    chat.histories(11);
    assert!(!chat.shows("text 11") && chat.take(|effect| matches!(effect, Effect::MarkRead { .. })).is_empty());
}

#[test]
fn drafts_last() {
    let mut chat = Chat::connected(80, 24, vec![told("bob", 2, 0, 2)]);
    chat.key(KeyCode::Enter);
    chat.histories(2);
    chat.text("for bob");
    chat.begin("carol");
    chat.histories(0);
    chat.text("for carol");
    let kept = |chat: &mut Chat| chat.take(|effect| matches!(effect, Effect::KeepDrafts(_))).pop();
    assert_eq!(kept(&mut chat), None);
    assert!(chat.app.wake_at().is_some());
    chat.pass(Duration::from_secs(2));
    let drafts = Drafts::from([(user("bob"), "for bob".to_owned()), (user("carol"), "for carol".to_owned())]);
    assert_eq!(kept(&mut chat), Some(Effect::KeepDrafts(drafts.clone())));
    chat.pass(Duration::from_secs(9));
    assert_eq!(kept(&mut chat), None, "no key was pressed");
    // What is being edited is no draft, but what waits meanwhile is.
    chat.begin("bob");
    chat.press(KeyCode::Up, KeyModifiers::ALT);
    chat.key(KeyCode::Char('e'));
    chat.text("!");
    assert_eq!(chat.app.drafts(), drafts);
    let app = App::new(user("alice"), TimeZone::UTC, (80, 24), Vec::new(), &drafts, chat.now);
    let chat = Chat { app, now: chat.now, effects: VecDeque::new(), size: (80, 24) };
    assert!(chat.shows("draft: for bob") && chat.shows("draft: for carol"));
}

#[test]
fn the_chosen_conversation_stays_on_the_screen() {
    let peers = (0..30).map(|number| told(&format!("peer-{number:02}"), 1, 0, 1)).collect();
    let mut chat = Chat::connected(80, 24, peers);
    assert!(chat.shows("▌○ peer-00"));
    for number in (0..30).rev() {
        let envelope = Envelope {
            conversation: ConversationId::between(&user("alice"), &user(&format!("peer-{number:02}"))).unwrap(),
            seq: seq(3),
            from: user(&format!("peer-{number:02}")),
            to: user("alice"),
            id: None,
            at: Timestamp::from_ms(WALL_MS + 100 - number),
            kind: text("hello"),
        };
        chat.handle(Input::Message(envelope));
        assert!(chat.shows("▌○ peer-00"), "{number} {:#?}", chat.screen());
    }
}

#[test]
fn right_to_left_words_are_isolated() {
    let mut chat = Chat::connected(80, 24, Vec::new());
    chat.begin("bob");
    chat.histories(0);
    chat.arrive("bob", 1, None, text("שלום עולם"));
    let screen = chat.screen();
    let row = screen.iter().filter_map(|row| row.split('│').nth(1)).find(|row| row.contains('ש')).unwrap().to_owned();
    assert!(row.starts_with("  \u{2068}שלום עולם\u{2069} "), "{row:?}");
    assert!(row.ends_with("14:30"), "{row:?}");
}

#[test]
fn searching() {
    let mut chat = Chat::connected(80, 24, vec![told("bob", 90, 0, 90)]);
    chat.key(KeyCode::Enter);
    chat.histories(90);
    let highlighted = |chat: &Chat| {
        let buffer = chat.buffer();
        let cells = buffer.content().iter().filter(|cell| cell.bg == ratatui::style::Color::Yellow);
        cells.map(|cell| cell.symbol()).collect::<String>()
    };
    chat.control('f');
    chat.text("TEXT 1");
    chat.key(KeyCode::Enter);
    assert!(chat.shows("text 19 ") && highlighted(&chat).contains("text 1"), "{:#?}", chat.screen());
    for _ in 0..20 {
        chat.key(KeyCode::Char('n'));
    }
    assert!(chat.shows("text 1 ") && chat.shows("nothing more above"));
    chat.key(KeyCode::Char('N'));
    assert!(chat.app.search.as_ref().is_some_and(|search| search.found == Some(seq(10))));
    chat.key(KeyCode::Esc);
    assert_eq!(highlighted(&chat), "");
    chat.text("n");
    assert!(chat.shows("> n"), "keys write again");
    chat.control('f');
    chat.text("nowhere");
    chat.key(KeyCode::Enter);
    assert!(chat.shows("not in what is loaded"));
}

#[test]
fn resting_timelines_are_bounded() {
    let mut chat = Chat::connected(80, 24, Vec::new());
    for number in 0..30 {
        chat.begin(&format!("peer-{number}"));
        chat.histories(300);
    }
    let loaded = chat.app.conversations.values().map(|conversation| conversation.timeline.entries().len());
    let loaded: Vec<usize> = loaded.filter(|entries| *entries > 0).collect();
    assert!(loaded.len() <= 16 && loaded.iter().all(|entries| *entries <= 300), "{loaded:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    // Whatever is written, on whatever terminal: nothing panics, the border stays, and no cell is wider than what is left of its row.
    #[test]
    fn nothing_breaks_the_layout(
        texts in proptest::collection::vec("(\\PC|[\u{0}-\u{9f}]|\u{202e}|\u{2066}|👩\u{200d}👧|\u{336}|ש|你|\n){0,40}", 1..8),
        columns in 10..140_u16,
        rows in 3..40_u16,
        keys in proptest::collection::vec(0..9_u8, 0..12),
    ) {
        let mut chat = Chat::connected(columns, rows, Vec::new());
        chat.begin("bob");
        chat.histories(0);
        for (number, words) in (1..).zip(&texts) {
            chat.arrive(if number % 2 == 0 { "alice" } else { "bob" }, number, None, text(words));
        }
        for key in keys {
            match key {
                0 => chat.key(KeyCode::PageUp),
                1 => chat.press(KeyCode::Up, KeyModifiers::ALT),
                2 => chat.key(KeyCode::Char('r')),
                3 => chat.key(KeyCode::Tab),
                4 => chat.handle(Input::Terminal(TerminalEvent::Paste(texts.concat()))),
                5 => chat.key(KeyCode::Up),
                6 => chat.resize(columns / 2 + 40, rows),
                7 => chat.lose(),
                _ => chat.key(KeyCode::F(1)),
            }
            let buffer = chat.buffer();
            for y in 0..buffer.area.height {
                let mut x = 0;
                while x < buffer.area.width {
                    let symbol = buffer[(x, y)].symbol();
                    prop_assert!(!symbol.contains(char::is_control));
                    x += symbol.cell_width().max(1);
                }
                prop_assert_eq!(x, buffer.area.width, "row {}", y);
            }
            let areas = chat.app.areas();
            if !chat.app.has_help && !areas.is_too_small && areas.border.width > 0 {
                for y in areas.border.top()..areas.border.bottom() {
                    let bare = buffer[(areas.border.x, y)].symbol().trim_end_matches(['\u{2068}', '\u{2069}']).to_owned();
                    prop_assert_eq!(bare, "│");
                }
            }
        }
    }

    #[test]
    fn widths_are_ratatuis(text in "(\\PC|👩\u{200d}👧|e\u{301}|ｶﾞ|❤\u{fe0f}){0,20}") {
        for grapheme in text.graphemes(true).map(wrap::drawn) {
            prop_assert_eq!(wrap::grapheme_columns(grapheme), usize::from(grapheme.cell_width()), "{:?}", grapheme);
        }
    }
}
