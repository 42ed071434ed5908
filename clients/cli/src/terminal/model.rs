//! What the chat knows, and what it decides.
//!
//! Pure: [`App::handle`] takes in what happened and when, and says what is to be done; it never waits, draws or sends. Invariants: what is loaded is bounded,
//! for each conversation and over all; a request is asked for once at a time; a message is marked as read only if it was on the screen of a terminal that
//! somebody looks at.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use chat_client::{
    ConnectionState, ConversationsOk, Envelope, ErrorCode, Event, HistoryOk, MessageId, PresenceEvent, PresenceStatus,
    Range, RequestError, Seq, Stored, Timestamp, TypingState, Unsent, UserId, WhoamiOk,
};
use jiff::tz::TimeZone;

use super::Now;
use super::compose::Editor;
use super::conversation::{Conversation, Draft, End, Item, Outgoing, Progress, Scroll};
use super::drafts::Drafts;
use super::layout::{self, Areas, Flow, Half, Placement};
use super::search;
use super::timeline::{Arrival, ENTRIES_MAX, Entry, Joined};

/// Entries that are asked for at once.
const PAGE: usize = 100;
/// Another page is asked for when so few entries are left beyond the screen.
const AHEAD: usize = 40;
/// Conversations that are asked for at once.
const LIST_PAGE: usize = 100;
/// Pages of the list that are looked through for the open conversation.
const LIST_PAGES_MAX: usize = 20;
/// Conversations that are known at once; of more, those are forgotten in which nothing happened for longest.
const CONVERSATIONS_MAX: usize = 5_000;
/// Conversations whose timelines stay loaded, and the entries of those that are not open.
const TIMELINES_MAX: usize = 16;
const RESTING_ENTRIES_MAX: usize = 200;
/// Messages that wait to be stored, in all conversations.
pub(super) const OUTGOING_MAX: usize = 1_000;
/// What a message may have until the server has said so.
const MESSAGE_BYTES: usize = 16 * 1024;
/// What could not be asked for is asked for again after so long.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// The server forgets `on` after six seconds; it is said again in time.
const TYPING_SAID_AGAIN: Duration = Duration::from_secs(3);
/// Nobody types who has not for so long.
const TYPING_IDLE: Duration = Duration::from_secs(5);
/// If the server's `off` is missed.
const TYPING_SHOWN: Duration = Duration::from_secs(8);
/// Drafts are kept so long after a key was pressed.
const DRAFTS_KEPT: Duration = Duration::from_secs(2);
/// How long a notice is shown.
const NOTICE: Duration = Duration::from_secs(8);

/// Something happened.
#[derive(Debug)]
pub(super) enum Input {
    /// At the terminal.
    Terminal(crossterm::event::Event),
    /// An entry was delivered.
    Message(Envelope),
    /// Any other event of the client.
    Client(Event),
    /// A message is in the outbox.
    Queued {
        to: UserId,
        key: u64,
        id: MessageId,
    },
    /// A message is on the server's disk.
    Stored {
        to: UserId,
        key: u64,
        stored: Stored,
    },
    /// What waited since an earlier run waits no longer: it is stored, and comes as all that is stored does, or refused, which is said too.
    Left(MessageId),
    /// A message was not stored, and will not be.
    NotStored {
        to: UserId,
        key: u64,
        reason: String,
    },
    History {
        with: UserId,
        ticket: u64,
        outcome: Result<HistoryOk, RequestError>,
    },
    Conversations {
        ticket: u64,
        outcome: Result<ConversationsOk, RequestError>,
    },
    Whoami(Result<WhoamiOk, RequestError>),
    Edited {
        with: UserId,
        seq: Seq,
        text: String,
        outcome: Result<Timestamp, RequestError>,
    },
    Unsent {
        with: UserId,
        seq: Seq,
        outcome: Result<(), RequestError>,
    },
    Deleted {
        with: UserId,
        seq: Seq,
        outcome: Result<(), RequestError>,
    },
    /// Drafts could not be kept for the next run.
    NotKept(String),
    /// Time has passed.
    Tick,
}

/// Something is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// In the order in which they are given.
    Send {
        to: UserId,
        key: u64,
        text: String,
    },
    Typing {
        to: UserId,
        state: TypingState,
    },
    MarkRead {
        with: UserId,
        seq: Seq,
    },
    History {
        with: UserId,
        ticket: u64,
        range: Range,
        limit: usize,
    },
    Conversations {
        ticket: u64,
        before: Option<String>,
        limit: usize,
    },
    Whoami,
    Edit {
        with: UserId,
        seq: Seq,
        text: String,
    },
    Unsend {
        with: UserId,
        seq: Seq,
    },
    Delete {
        with: UserId,
        seq: Seq,
    },
    KeepDrafts(Drafts),
    Quit,
}

/// How the connection stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Connecting,
    Connected,
    Lost { reason: String, retry_at: Instant },
    Closed { reason: String },
}

/// Whom the keys reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Focus {
    List,
    Compose,
    /// A message is chosen.
    Messages(Item),
}

/// What is asked at the bottom of the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Prompt {
    /// With whom to begin a conversation, and what is wrong with it.
    Begin {
        name: Editor,
        problem: Option<String>,
    },
    /// What to search for.
    Search {
        needle: Editor,
    },
    Unsend {
        seq: Seq,
    },
    Delete {
        seq: Seq,
    },
}

/// A search that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Search {
    pub(super) needle: String,
    /// Where it stands, if it found anything.
    pub(super) found: Option<Seq>,
}

/// The list is asked for anew.
#[derive(Debug)]
struct Listing {
    ticket: u64,
    pages: usize,
    told: usize,
    /// So many were there.
    wanted: usize,
    has_open: bool,
}

/// What others have been told of typing.
#[derive(Debug)]
struct Typing {
    to: UserId,
    told_at: Instant,
    last_key: Instant,
}

pub(super) struct App {
    pub(super) me: UserId,
    pub(super) zone: TimeZone,
    pub(super) now: Now,
    pub(super) size: (u16, u16),
    /// Somebody looks at the terminal. One that cannot tell is always looked at.
    has_focus: bool,
    pub(super) link: Link,
    pub(super) conversations: HashMap<UserId, Conversation>,
    /// Their order in the list.
    pub(super) order: Vec<UserId>,
    order_is_stale: bool,
    pub(super) open: Option<UserId>,
    pub(super) chosen: Option<UserId>,
    /// The list's first row.
    pub(super) list_top: usize,
    listing: Option<Listing>,
    next_list_page: Option<String>,
    list_asked_again_at: Option<Instant>,
    pub(super) focus: Focus,
    pub(super) prompt: Option<Prompt>,
    pub(super) search: Option<Search>,
    pub(super) has_help: bool,
    notice: Option<(String, Instant)>,
    presence: HashMap<UserId, PresenceEvent>,
    typing: Option<Typing>,
    message_bytes: usize,
    asked_again_at: Option<Instant>,
    drafts_due_at: Option<Instant>,
    next_number: u64,
    effects: Vec<Effect>,
}

impl App {
    /// With what an earlier run left: what waits in the outbox, and drafts.
    pub(super) fn new(
        me: UserId,
        zone: TimeZone,
        size: (u16, u16),
        waiting: Vec<Unsent>,
        drafts: &Drafts,
        now: Now,
    ) -> Self {
        let mut app = Self {
            me,
            zone,
            now,
            size,
            has_focus: true,
            link: Link::Connecting,
            conversations: HashMap::new(),
            order: Vec::new(),
            order_is_stale: true,
            open: None,
            chosen: None,
            list_top: 0,
            listing: None,
            next_list_page: None,
            list_asked_again_at: None,
            focus: Focus::List,
            prompt: None,
            search: None,
            has_help: false,
            notice: None,
            presence: HashMap::new(),
            typing: None,
            message_bytes: MESSAGE_BYTES,
            asked_again_at: None,
            drafts_due_at: None,
            next_number: 0,
            effects: Vec::new(),
        };
        for Unsent { id, to, text, queued_at } in waiting {
            let key = app.number();
            let outgoing = Outgoing { key, id: Some(id), text, queued_at, progress: Progress::Waiting };
            let conversation = app.conversation(&to);
            conversation.active_ms = conversation.active_ms.max(queued_at.as_ms());
            conversation.outgoing.push(outgoing);
        }
        for (peer, text) in drafts {
            app.conversation(peer).draft.editor = Editor::new(text);
        }
        app.settle();
        app
    }

    /// Takes in what happened; what is to be done comes back.
    pub(super) fn handle(&mut self, input: Input, now: Now) -> Vec<Effect> {
        self.now = now;
        match input {
            Input::Terminal(event) => {
                self.terminal(&event);
                self.drafts_due_at.get_or_insert(now.instant + DRAFTS_KEPT);
            }
            Input::Message(message) => self.message(message),
            Input::Client(event) => self.client(event),
            Input::Queued { to, key, id } => self.conversation(&to).queued(key, id),
            Input::Stored { to, key, stored } => {
                self.conversation(&to).stored(key, stored.id, stored.seq, stored.at);
                self.order_is_stale = true;
            }
            Input::Left(id) => {
                let is_it = |outgoing: &Outgoing| outgoing.id.as_ref() == Some(&id);
                for conversation in self.conversations.values_mut() {
                    conversation.outgoing.retain(|outgoing| !is_it(outgoing) || outgoing.progress != Progress::Waiting);
                }
            }
            Input::NotStored { to, key, reason } => {
                let conversation = self.conversation(&to);
                if let Some(outgoing) = conversation.outgoing.iter_mut().find(|outgoing| outgoing.key == key) {
                    outgoing.progress = Progress::NotSent(reason);
                }
            }
            Input::History { with, ticket, outcome } => self.history(&with, ticket, outcome),
            Input::Conversations { ticket, outcome } => self.listed(ticket, outcome),
            Input::Whoami(outcome) => {
                if let Ok(whoami) = outcome {
                    self.message_bytes = whoami.message_bytes;
                }
            }
            Input::Edited { with, seq, text, outcome } => self.edited(&with, seq, text, outcome),
            Input::Unsent { with, seq, outcome } => match outcome {
                Ok(()) => {
                    self.conversation(&with).arrive(Arrival::Unsend { target: seq });
                }
                Err(error) => self.notify(format!("not unsent: {error}")),
            },
            Input::Deleted { with, seq, outcome } => match outcome {
                Ok(()) => self.conversation(&with).timeline.remove(seq),
                Err(error) => self.notify(format!("not deleted: {error}")),
            },
            Input::NotKept(reason) => self.notify(format!("drafts are not kept: {reason}")),
            Input::Tick => {}
        }
        self.settle();
        std::mem::take(&mut self.effects)
    }

    /// When something changes though nothing happens.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let now = self.now.instant;
        let typing = self.typing.as_ref().map(|typing| typing.last_key + TYPING_IDLE);
        let notice = self.notice.as_ref().map(|(_, until)| *until);
        let shown = self.conversations.values().filter_map(|conversation| conversation.typing_until).min();
        let countdown = match self.link {
            Link::Lost { retry_at, .. } if retry_at > now => Some((now + Duration::from_secs(1)).min(retry_at)),
            _ => None,
        };
        let due = [self.asked_again_at, self.list_asked_again_at, self.drafts_due_at];
        [typing, notice, shown, countdown].into_iter().chain(due).flatten().min()
    }

    /// What is being written and not sent. The words that a message is being given instead are not among them.
    pub(super) fn drafts(&self) -> Drafts {
        let drafts = self.conversations.values().filter_map(|conversation| {
            let Draft { editor, editing } = &conversation.draft;
            let editor = editing.as_ref().map_or(editor, |(_, stashed)| stashed);
            (!editor.is_blank()).then(|| (conversation.peer.clone(), editor.text().to_owned()))
        });
        drafts.collect()
    }

    // ---- what is shown -------------------------------------------------------------------------------------------------

    pub(super) fn half(&self) -> Half {
        if self.focus == Focus::List { Half::List } else { Half::Timeline }
    }

    pub(super) fn areas(&self) -> Areas {
        let (columns, rows) = self.size;
        let draft = |room| self.opened().map_or(1, |open| open.draft.editor.place(room).rows.len());
        layout::areas(columns, rows, self.banner().is_some(), self.half(), &draft)
    }

    pub(super) fn opened(&self) -> Option<&Conversation> {
        self.open.as_ref().and_then(|peer| self.conversations.get(peer))
    }

    pub(super) fn opened_mut(&mut self) -> Option<&mut Conversation> {
        self.open.as_ref().and_then(|peer| self.conversations.get_mut(peer))
    }

    /// The open timeline's rows on the screen.
    pub(super) fn placement(&self, areas: &Areas) -> Option<(Flow<'_>, Placement)> {
        let conversation = self.opened()?;
        let flow = Flow::new(conversation, &self.zone, layout::text_room(areas.timeline.width));
        let placement = flow.place(conversation.scroll, usize::from(areas.timeline.height));
        Some((flow, placement))
    }

    /// What is above everything while there is no connection.
    pub(super) fn banner(&self) -> Option<String> {
        let (state, reason) = match &self.link {
            Link::Connected => return None,
            Link::Connecting => ("Connecting…".to_owned(), ""),
            Link::Lost { reason, retry_at } => {
                let left = retry_at.saturating_duration_since(self.now.instant).as_millis().div_ceil(1_000);
                let again = if left == 0 { "Trying again…".to_owned() } else { format!("Trying again in {left} s") };
                (format!("Not connected · {again}"), reason.as_str())
            }
            Link::Closed { reason } => ("Not connected · Ctrl-C quits".to_owned(), reason.as_str()),
        };
        let outgoing = self.conversations.values().flat_map(|conversation| &conversation.outgoing);
        let waiting = match outgoing.filter(|outgoing| outgoing.progress == Progress::Waiting).count() {
            0 => String::new(),
            1 => "1 message waits".to_owned(),
            waiting => format!("{waiting} messages wait"),
        };
        let parts: Vec<&str> = [&state, &waiting, reason].into_iter().filter(|part| !part.is_empty()).collect();
        Some(parts.join(" · "))
    }

    pub(super) fn is_closed(&self) -> bool {
        matches!(self.link, Link::Closed { .. })
    }

    pub(super) fn notice(&self) -> Option<&str> {
        self.notice.as_ref().filter(|(_, until)| self.now.instant < *until).map(|(notice, _)| notice.as_str())
    }

    pub(super) fn presence(&self, user: &UserId) -> Option<&PresenceEvent> {
        self.presence.get(user)
    }

    pub(super) fn is_online(&self, user: &UserId) -> bool {
        self.presence(user).is_some_and(|presence| presence.status == PresenceStatus::Online)
    }

    pub(super) fn notify(&mut self, notice: impl Into<String>) {
        self.notice = Some((notice.into(), self.now.instant + NOTICE));
    }

    // ---- what the client says ------------------------------------------------------------------------------------------

    fn conversation(&mut self, peer: &UserId) -> &mut Conversation {
        if !self.conversations.contains_key(peer) {
            self.order_is_stale = true;
        }
        self.conversations.entry(peer.clone()).or_insert_with(|| Conversation::new(peer.clone()))
    }

    fn message(&mut self, message: Envelope) {
        let Some(peer) = message.conversation.peer_of(&self.me).cloned() else { return };
        let Some(arrival) = Arrival::new(message, &self.me) else { return };
        let is_watched = self.is_watching(&peer);
        let is_open = self.open.as_ref() == Some(&peer);
        let conversation = self.conversation(&peer);
        let my_read = conversation.my_read;
        if conversation.arrive(arrival) && is_open && !is_watched && conversation.unread_after.is_none() {
            conversation.unread_after = Some(my_read);
        }
        if !is_open {
            conversation.trim(ENTRIES_MAX);
        }
        self.order_is_stale = true;
    }

    fn client(&mut self, event: Event) {
        match event {
            // With its acknowledgement it is the other input.
            Event::Message(delivery) => self.message(delivery.message.clone()),
            Event::Receipt(receipt) => self.conversation(&receipt.with).receipt(receipt.delivered, receipt.read),
            Event::Read(read) => self.conversation(&read.with).read_to(read.read),
            Event::Typing(typing) => {
                let until = (typing.state == TypingState::On).then_some(self.now.instant + TYPING_SHOWN);
                // Strangers may type as they like: the list is for those who have written.
                if let Some(conversation) = self.conversations.get_mut(&typing.from) {
                    conversation.typing_until = until;
                }
            }
            Event::Presence(presence)
                if self.presence.len() < CONVERSATIONS_MAX || self.presence.contains_key(&presence.user) =>
            {
                self.presence.insert(presence.user.clone(), presence);
            }
            Event::NotSent { id, to, text, error } => {
                let (key, queued_at) = (self.number(), Timestamp::from_ms(self.now.wall_ms));
                let progress = Progress::NotSent(error.to_string());
                let conversation = self.conversation(&to);
                match conversation.outgoing.iter_mut().find(|outgoing| outgoing.id.as_ref() == Some(&id)) {
                    Some(outgoing) => outgoing.progress = progress,
                    None => conversation.outgoing.push(Outgoing { key, id: Some(id), text, queued_at, progress }),
                }
            }
            Event::Connection(state) => self.connection(state),
            Event::Missed(_) => self.list_anew(),
            _ => {}
        }
    }

    fn connection(&mut self, state: ConnectionState) {
        match state {
            ConnectionState::Connected { resumed } => {
                self.link = Link::Connected;
                self.effects.push(Effect::Whoami);
                self.list_anew();
                for conversation in self.conversations.values_mut() {
                    conversation.page_asked = None;
                    conversation.newest_asked = None;
                    let is_open = self.open.as_ref() == Some(&conversation.peer);
                    if is_open || !resumed {
                        // What was missed comes by itself to a device that the server knows; what changed in between is in the newest page.
                        conversation.timeline.doubt();
                    }
                }
                self.asked_again_at = None;
            }
            ConnectionState::Lost { reason, retry_in } => {
                self.link = Link::Lost { reason, retry_at: self.now.instant + retry_in };
                self.disconnected();
            }
            ConnectionState::Closed(closed) => {
                self.link = Link::Closed { reason: closed.to_string() };
                self.disconnected();
            }
        }
    }

    fn disconnected(&mut self) {
        self.presence.clear();
        self.typing = None;
        for conversation in self.conversations.values_mut() {
            conversation.typing_until = None;
        }
    }

    // ---- answers -------------------------------------------------------------------------------------------------------

    fn history(&mut self, with: &UserId, ticket: u64, outcome: Result<HistoryOk, RequestError>) {
        let me = self.me.clone();
        let Some(conversation) = self.conversations.get_mut(with) else { return };
        let is_newest = conversation.newest_asked == Some(ticket);
        let end = conversation.page_asked.filter(|(asked, _)| *asked == ticket).map(|(_, end)| end);
        if !is_newest && end.is_none() {
            return;
        }
        let none_yet =
            matches!(&outcome, Err(RequestError::Refused { code: Some(ErrorCode::UnknownConversation), .. }));
        let (entries, more) = match outcome {
            Ok(page) => (page.entries, page.more),
            Err(_) if none_yet => (Vec::new(), false),
            Err(error) => {
                if is_newest {
                    conversation.newest_asked = None;
                    conversation.timeline.not_told();
                } else {
                    conversation.page_asked = None;
                }
                self.asked_again_at = Some(self.now.instant + ASK_AGAIN);
                self.notify(format!("the history did not come: {error}"));
                return;
            }
        };
        let entries: Vec<Entry> = entries.into_iter().filter_map(|entry| Entry::answered(entry, &me)).collect();
        if is_newest {
            conversation.newest_asked = None;
            let keep = conversation.scroll != Scroll::Bottom;
            if conversation.timeline.newest(entries, more, keep) == Joined::AskAgain {
                conversation.timeline.doubt();
            }
        } else {
            conversation.page_asked = None;
            match end {
                Some(End::Lower) => conversation.timeline.later(entries, more),
                _ => conversation.timeline.earlier(entries, more),
            }
        }
    }

    /// Asks for the list from its beginning.
    fn list_anew(&mut self) {
        let ticket = self.number();
        let wanted = self.listing.as_ref().map_or(self.conversations.len(), |listing| listing.wanted);
        self.listing = Some(Listing { ticket, pages: 0, told: 0, wanted, has_open: self.open.is_none() });
        self.list_asked_again_at = None;
        self.effects.push(Effect::Conversations { ticket, before: None, limit: LIST_PAGE });
    }

    fn listed(&mut self, ticket: u64, outcome: Result<ConversationsOk, RequestError>) {
        let Some(mut listing) = self.listing.take_if(|listing| listing.ticket == ticket) else { return };
        let page = match outcome {
            Ok(page) => page,
            Err(error) => {
                self.list_asked_again_at = Some(self.now.instant + ASK_AGAIN);
                self.notify(format!("the list of conversations did not come: {error}"));
                return;
            }
        };
        let me = self.me.clone();
        listing.pages += 1;
        for told in page.conversations {
            listing.told += 1;
            let peer = told.standing.with.clone();
            let is_open = self.open.as_ref() == Some(&peer);
            listing.has_open |= is_open;
            let is_watched = self.is_watching(&peer);
            let conversation = self.conversation(&peer);
            conversation.stand(told, &me);
            if is_open && !is_watched && conversation.unread() > 0 && conversation.unread_after.is_none() {
                conversation.unread_after = Some(conversation.my_read);
            }
        }
        self.order_is_stale = true;
        self.next_list_page = page.next;
        let is_enough = (listing.told >= listing.wanted && listing.has_open) || listing.pages >= LIST_PAGES_MAX;
        if !is_enough && self.next_list_page.is_some() {
            self.listing = Some(listing);
            self.ask_next_list_page();
        }
    }

    fn ask_next_list_page(&mut self) {
        let Some(before) = self.next_list_page.take() else { return };
        let ticket = self.number();
        let listing = self.listing.take();
        let (pages, told, wanted, has_open) =
            listing.map_or((0, 0, 0, true), |listing| (listing.pages, listing.told, listing.wanted, listing.has_open));
        self.listing = Some(Listing { ticket, pages, told, wanted, has_open });
        self.effects.push(Effect::Conversations { ticket, before: Some(before), limit: LIST_PAGE });
    }

    fn edited(&mut self, with: &UserId, seq: Seq, text: String, outcome: Result<Timestamp, RequestError>) {
        match outcome {
            Ok(at) => {
                self.conversation(with).arrive(Arrival::Edit { target: seq, text, at });
            }
            Err(error) => {
                let draft = &mut self.conversation(with).draft;
                if draft.editing.is_none() && draft.editor.is_empty() {
                    // The words are not lost.
                    *draft = Draft { editor: Editor::new(&text), editing: Some((seq, Editor::default())) };
                }
                self.notify(format!("not edited: {error}"));
            }
        }
    }

    // ---- what the user does --------------------------------------------------------------------------------------------

    pub(super) fn open(&mut self, peer: &UserId) {
        self.search = None;
        self.focus = Focus::Compose;
        self.chosen = Some(peer.clone());
        if self.open.as_ref() == Some(peer) {
            return;
        }
        self.leave();
        self.open = Some(peer.clone());
        let shown = self.number();
        let conversation = self.conversation(peer);
        conversation.shown = shown;
        conversation.unread_after = (conversation.unread() > 0).then_some(conversation.my_read);
        self.forget_timelines();
    }

    /// Something happens in a conversation now.
    pub(super) fn touch(&mut self, peer: &UserId) {
        let now_ms = self.now.wall_ms;
        let conversation = self.conversation(peer);
        conversation.active_ms = conversation.active_ms.max(now_ms);
        self.order_is_stale = true;
    }

    /// The open conversation is not looked at any more.
    fn leave(&mut self) {
        self.stop_typing();
        if let Some(conversation) = self.opened_mut() {
            conversation.unread_after = None;
            conversation.trim(RESTING_ENTRIES_MAX);
        }
    }

    fn forget_timelines(&mut self) {
        let mut loaded: Vec<(u64, UserId)> = self
            .conversations
            .values()
            .filter(|conversation| !conversation.timeline.entries().is_empty())
            .map(|conversation| (conversation.shown, conversation.peer.clone()))
            .collect();
        loaded.sort_by_key(|(shown, _)| *shown);
        // The open one is about to be loaded.
        let surplus = loaded.len().saturating_sub(TIMELINES_MAX - 1);
        for (_, peer) in loaded.into_iter().take(surplus) {
            if let Some(conversation) = self.conversations.get_mut(&peer)
                && self.open.as_ref() != Some(&peer)
            {
                conversation.timeline.forget();
                conversation.scroll = Scroll::Bottom;
            }
        }
    }

    /// Goes to the newest of the open conversation.
    pub(super) fn go_to_newest(&mut self) {
        let Some(conversation) = self.opened_mut() else { return };
        conversation.scroll = Scroll::Bottom;
        if conversation.timeline.has_later() {
            conversation.timeline.forget();
            conversation.page_asked = None;
            conversation.newest_asked = None;
        }
    }

    /// Sends what is written, or gives a message other words.
    pub(super) fn send(&mut self) {
        let (message_bytes, queued_at) = (self.message_bytes, Timestamp::from_ms(self.now.wall_ms));
        let Some(conversation) = self.opened() else { return };
        let text = conversation.draft.editor.text().trim_end().trim_start_matches('\n').to_owned();
        if text.trim().is_empty() {
            return;
        }
        if text.len() > message_bytes {
            self.notify(format!("too long: {} bytes, and a message has at most {message_bytes}", text.len()));
            return;
        }
        if self.is_closed() {
            self.notify("there is no connection, and there will be none: what you wrote stays here");
            return;
        }
        let to = conversation.peer.clone();
        let outgoing: usize = self.conversations.values().map(|conversation| conversation.outgoing.len()).sum();
        if outgoing >= OUTGOING_MAX {
            self.notify(format!("{OUTGOING_MAX} messages wait already: this one has to wait here"));
            return;
        }
        self.stop_typing();
        let key = self.number();
        let Some(conversation) = self.opened_mut() else { return };
        let draft = std::mem::take(&mut conversation.draft);
        if let Some((seq, stashed)) = draft.editing {
            conversation.draft.editor = stashed;
            if conversation.timeline.get(seq).and_then(Entry::text) != Some(&text) {
                self.effects.push(Effect::Edit { with: to, seq, text });
            }
            return;
        }
        conversation.unread_after = None;
        let progress = Progress::Waiting;
        conversation.outgoing.push(Outgoing { key, id: None, text: text.clone(), queued_at, progress });
        self.touch(&to);
        self.effects.push(Effect::Send { to, key, text });
        self.go_to_newest();
    }

    /// Sends again what was not sent; one message, or all of the open conversation.
    pub(super) fn send_again(&mut self, one: Option<u64>) {
        if self.is_closed() {
            self.notify("there is no connection, and there will be none");
            return;
        }
        let queued_at = Timestamp::from_ms(self.now.wall_ms);
        let Some(conversation) = self.opened_mut() else { return };
        let is_it = |outgoing: &mut Outgoing| {
            matches!(outgoing.progress, Progress::NotSent(_)) && one.is_none_or(|key| key == outgoing.key)
        };
        let to = conversation.peer.clone();
        let again: Vec<Outgoing> = conversation.outgoing.extract_if(.., is_it).collect();
        for Outgoing { text, .. } in again {
            let key = self.number();
            let outgoing = Outgoing { key, id: None, text: text.clone(), queued_at, progress: Progress::Waiting };
            self.effects.push(Effect::Send { to: to.clone(), key, text });
            self.conversation(&to).outgoing.push(outgoing);
        }
        self.focus = Focus::Compose;
        self.go_to_newest();
    }

    /// Begins to give the last own message other words.
    pub(super) fn edit_last(&mut self) {
        let Some(conversation) = self.opened() else { return };
        match (conversation.outgoing.last(), conversation.last_of_mine()) {
            (Some(outgoing), _) => self.take_back(outgoing.key),
            (None, Some(seq)) => self.edit(seq),
            (None, None) => {}
        }
    }

    /// Takes a message that was not sent back into the editor.
    pub(super) fn take_back(&mut self, key: u64) {
        let Some(conversation) = self.opened_mut() else { return };
        let draft = &mut conversation.draft;
        let is_it = |outgoing: &Outgoing| outgoing.key == key && outgoing.progress != Progress::Waiting;
        if draft.editing.is_some() || !draft.editor.is_blank() {
            self.notify("something else is being written");
        } else if let Some(place) = conversation.outgoing.iter().position(is_it) {
            draft.editor = Editor::new(&conversation.outgoing.remove(place).text);
            self.focus = Focus::Compose;
        } else {
            self.notify("it is on its way: it can be edited when it is stored");
        }
    }

    /// Begins to give a message other words.
    pub(super) fn edit(&mut self, seq: Seq) {
        let Some(conversation) = self.opened_mut() else { return };
        let Some(entry) = conversation.timeline.get(seq).filter(|entry| entry.is_mine) else {
            self.notify("only your own messages can be edited");
            return;
        };
        let Some(text) = entry.text() else { return };
        let editor = Editor::new(text);
        let stashed = std::mem::replace(&mut conversation.draft.editor, editor);
        let stashed = conversation.draft.editing.take().map_or(stashed, |(_, stashed)| stashed);
        conversation.draft.editing = Some((seq, stashed));
        self.focus = Focus::Compose;
    }

    /// Leaves a message as it is.
    pub(super) fn stop_editing(&mut self) -> bool {
        let Some(conversation) = self.opened_mut() else { return false };
        let Some((_, stashed)) = conversation.draft.editing.take() else { return false };
        conversation.draft.editor = stashed;
        true
    }

    pub(super) fn unsend(&mut self, seq: Seq) {
        if let Some(with) = self.open.clone() {
            self.effects.push(Effect::Unsend { with, seq });
        }
    }

    pub(super) fn delete(&mut self, seq: Seq) {
        if let Some(with) = self.open.clone() {
            self.effects.push(Effect::Delete { with, seq });
        }
    }

    pub(super) fn quit(&mut self) {
        self.stop_typing();
        self.effects.push(Effect::Quit);
    }

    pub(super) fn scroll(&mut self, rows: isize) {
        let areas = self.areas();
        let Some((flow, _)) = self.placement(&areas) else { return };
        let height = usize::from(areas.timeline.height);
        let Some(conversation) = self.opened() else { return };
        let scroll = flow.scrolled(conversation.scroll, height, rows);
        if let Some(conversation) = self.opened_mut() {
            conversation.scroll = scroll;
        }
    }

    /// Makes an item visible.
    pub(super) fn show(&mut self, item: Item, byte: usize) {
        let areas = self.areas();
        let Some((flow, _)) = self.placement(&areas) else { return };
        let height = usize::from(areas.timeline.height);
        let Some(conversation) = self.opened() else { return };
        let scroll = flow.showing(conversation.scroll, height, item, byte);
        if let Some(conversation) = self.opened_mut() {
            conversation.scroll = scroll;
        }
    }

    /// Chooses the message above or below the chosen one; the last one if none is.
    pub(super) fn choose(&mut self, down: bool) {
        let areas = self.areas();
        let Some((flow, placement)) = self.placement(&areas) else { return };
        let chosen = match self.focus {
            Focus::Messages(item) => flow.place_of(item),
            _ => None,
        };
        let place = match chosen {
            None if flow.len() == 0 => return,
            None => placement.last.min(flow.len() - 1),
            Some(place) if down && place + 1 < flow.len() => place + 1,
            Some(_) if down => {
                self.focus = Focus::Compose;
                return;
            }
            Some(place) => place.saturating_sub(1),
        };
        if let Some(item) = flow.item(place) {
            self.focus = Focus::Messages(item);
            self.show(item, 0);
        }
    }

    /// The next match in what is loaded, above or below the one that was found; from the newest on if none was.
    pub(super) fn search_next(&mut self, down: bool) {
        let Some(Search { needle, found }) = self.search.clone() else { return };
        let areas = self.areas();
        let Some((flow, _)) = self.placement(&areas) else { return };
        let entries = self.opened().map_or(0, |conversation| conversation.timeline.entries().len());
        let from = found.and_then(|seq| flow.place_of(Item::Entry(seq)));
        let mut places: Box<dyn Iterator<Item = usize>> = match (from, down) {
            (Some(from), true) => Box::new(from + 1..entries),
            (Some(from), false) => Box::new((0..from).rev()),
            (None, _) => Box::new((0..entries).rev()),
        };
        let next = places.find_map(|place| {
            let at = search::find(&flow.shown(place).text, &needle).first()?.start;
            match flow.item(place) {
                Some(Item::Entry(seq)) => Some((seq, at)),
                _ => None,
            }
        });
        drop(places);
        match next {
            Some((seq, at)) => {
                self.search = Some(Search { needle, found: Some(seq) });
                self.show(Item::Entry(seq), at);
            }
            None if found.is_none() => self.notify("not in what is loaded"),
            None if down => self.notify("nothing more below"),
            None => self.notify("nothing more above in what is loaded"),
        }
    }

    /// Something was written: the peer is told, and told again while it goes on.
    pub(super) fn wrote(&mut self) {
        let now = self.now.instant;
        let Some(conversation) = self.opened() else { return };
        if conversation.draft.editor.is_blank() || conversation.draft.editing.is_some() {
            self.stop_typing();
            return;
        }
        let to = conversation.peer.clone();
        match &mut self.typing {
            Some(typing) if typing.to == to && now < typing.told_at + TYPING_SAID_AGAIN => typing.last_key = now,
            _ if self.link == Link::Connected => {
                self.typing = Some(Typing { to: to.clone(), told_at: now, last_key: now });
                self.effects.push(Effect::Typing { to, state: TypingState::On });
            }
            _ => {}
        }
    }

    fn stop_typing(&mut self) {
        if let Some(Typing { to, .. }) = self.typing.take() {
            self.effects.push(Effect::Typing { to, state: TypingState::Off });
        }
    }

    pub(super) fn set_focus(&mut self, has_focus: bool) {
        self.has_focus = has_focus;
    }

    // ---- what follows from all of it -----------------------------------------------------------------------------------

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// The newest of this conversation is on the screen, and somebody looks at it.
    fn is_watching(&self, peer: &UserId) -> bool {
        self.has_focus
            && self.open.as_ref() == Some(peer)
            && self.areas().timeline.height > 0
            && !self.has_help
            && self.opened().is_some_and(|open| {
                open.scroll == Scroll::Bottom && open.timeline.is_whole() && !open.timeline.has_later()
            })
    }

    fn settle(&mut self) {
        let now = self.now.instant;
        if self.typing.as_ref().is_some_and(|typing| now >= typing.last_key + TYPING_IDLE) {
            self.stop_typing();
        }
        self.notice.take_if(|(_, until)| now >= *until);
        for conversation in self.conversations.values_mut() {
            conversation.typing_until.take_if(|until| now >= *until);
        }
        self.asked_again_at.take_if(|at| now >= *at);
        if self.drafts_due_at.take_if(|at| now >= *at).is_some() {
            self.effects.push(Effect::KeepDrafts(self.drafts()));
        }
        self.settle_list();
        self.settle_timeline();
    }

    fn settle_list(&mut self) {
        if self.list_asked_again_at.take_if(|at| self.now.instant >= *at).is_some() && self.link == Link::Connected {
            self.list_anew();
        }
        let rows = usize::from(self.areas().list.height / layout::LIST_ITEM_ROWS);
        if self.order_is_stale {
            self.order_is_stale = false;
            let shown = self.list_top..self.list_top + rows;
            let is_shown = |place| self.focus == Focus::List && shown.contains(&place);
            let was_shown = self.place_of_chosen().is_some_and(is_shown);
            let mut order: Vec<&Conversation> = self.conversations.values().collect();
            order.sort_by(|one, other| other.active_ms.cmp(&one.active_ms).then_with(|| one.peer.cmp(&other.peer)));
            self.order = order.into_iter().map(|conversation| conversation.peer.clone()).collect();
            for peer in self.order.split_off(self.order.len().min(CONVERSATIONS_MAX)) {
                let is_needed = |conversation: &Conversation| {
                    !conversation.outgoing.is_empty() || !conversation.draft.editor.is_empty()
                };
                if self.open.as_ref() != Some(&peer) && !self.conversations.get(&peer).is_some_and(is_needed) {
                    self.conversations.remove(&peer);
                }
            }
            if was_shown && let Some(place) = self.place_of_chosen() {
                self.list_top = self.list_top.clamp(place.saturating_sub(rows - 1), place);
            }
        }
        if self.chosen.is_none() {
            self.chosen = self.order.first().cloned();
        }
        self.list_top = self.list_top.min(self.order.len().saturating_sub(rows));
        let is_near_end = self.list_top + rows + 10 >= self.order.len();
        if is_near_end && self.listing.is_none() && self.link == Link::Connected {
            self.ask_next_list_page();
        }
    }

    /// Where in the list the chosen conversation is.
    pub(super) fn place_of_chosen(&self) -> Option<usize> {
        self.chosen.as_ref().and_then(|chosen| self.order.iter().position(|peer| peer == chosen))
    }

    fn settle_timeline(&mut self) {
        let (is_connected, may_ask) = (self.link == Link::Connected, self.asked_again_at.is_none());
        let areas = self.areas();
        let height = usize::from(areas.timeline.height);
        let room = layout::text_room(areas.timeline.width);
        let is_shown = height > 0;
        let (first_number, second_number) = (self.number(), self.number());
        let Some(peer) = self.open.clone() else { return };
        let Some(conversation) = self.conversations.get_mut(&peer) else { return };
        let (mut first, mut last) = (0, 0);
        if is_shown {
            let placement = Flow::new(conversation, &self.zone, room).place(conversation.scroll, height);
            conversation.scroll = placement.scroll;
            (first, last) = (placement.first, placement.last);
        }
        let before = conversation.timeline.entries().len();
        conversation.trim(ENTRIES_MAX);
        if conversation.timeline.entries().len() < before {
            first = first.min(AHEAD + 1);
        }
        if is_connected && may_ask {
            if !conversation.timeline.is_whole() && conversation.newest_asked.is_none() {
                conversation.timeline.ask();
                conversation.newest_asked = Some(first_number);
                conversation.page_asked = None;
                let range = Range::Before(None);
                self.effects.push(Effect::History { with: peer.clone(), ticket: first_number, range, limit: PAGE });
            } else if is_shown && conversation.timeline.is_whole() && conversation.page_asked.is_none() {
                let entries = conversation.timeline.entries().len();
                let asked = if conversation.timeline.has_earlier() && first < AHEAD {
                    Some((End::Upper, Range::Before(conversation.timeline.first_seq())))
                } else if conversation.timeline.has_later() && last + AHEAD > entries {
                    Some((End::Lower, Range::After(conversation.timeline.last_seq())))
                } else {
                    None
                };
                if let Some((end, range)) = asked {
                    conversation.page_asked = Some((second_number, end));
                    self.effects.push(Effect::History {
                        with: peer.clone(),
                        ticket: second_number,
                        range,
                        limit: PAGE,
                    });
                }
            }
        }
        if let (Focus::Messages(item), Some((was, is))) = (&mut self.focus, conversation.landed)
            && *item == was
        {
            *item = is;
        }
        if let Focus::Messages(item) = self.focus
            && Flow::new(conversation, &self.zone, room).place_of(item).is_none()
        {
            self.focus = Focus::Compose;
        }
        // Own messages that wait may fill the screen.
        let is_seen = conversation.last_of_peer().and_then(|seq| conversation.timeline.position(seq)) >= Some(first);
        if is_connected && is_seen && self.is_watching(&peer) {
            self.mark_read(&peer);
        }
    }

    fn mark_read(&mut self, peer: &UserId) {
        let Some(conversation) = self.conversations.get_mut(peer) else { return };
        let Some(seq) = conversation.last_of_peer().filter(|seq| seq.get() > conversation.my_read) else { return };
        conversation.read_to(seq.get());
        self.effects.push(Effect::MarkRead { with: peer.clone(), seq });
    }
}
