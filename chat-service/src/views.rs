//! What a user sees of conversations: read from the log, with edits, unsends, blocks and deletions laid over it.
//!
//! Nothing that can change is kept here: an answer is true for the moment of its reads. Pages go by seq or by log position, which never change, so nothing is
//! skipped or repeated while messages arrive.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use chat_protocol::request::{
    AnsweredEntry, ConversationOk, ConversationsOk, HistoryOk, Range, RequestError, Standing, SyncOk,
    SyncedConversation, place_of,
};
use chat_protocol::{ConversationId, ErrorCode, Seq, Timestamp, UserId};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::log::{Body, ConversationHead, Entry, Log, LogError, PeerRecord, Position, ReadLimit, Side, Stream};

/// Entries that are looked at together.
const WINDOW: u64 = 256;
/// Bytes of text in an answer, as JSON has them; one entry is there in any case.
const ANSWER_BYTES_MAX: usize = 256 * 1024;
/// Entries that are looked at to count what is unread.
const UNREAD_MAX: u64 = 1_000;
/// Entries that are looked at for the last text of a conversation.
const LAST_TEXT_WINDOWS: usize = 4;
/// Conversations that an answer to `sync` has.
const SYNCED_CONVERSATIONS_MAX: usize = 500;
/// After a conversation with so many deletions an answer to `sync` has no further one.
const SYNCED_DELETIONS_MAX: usize = 10_000;

/// Of those that are longer than a window.
const WITHHELD_RUNS_MAX: usize = 4_096;

/// Why something cannot be shown.
#[derive(Debug)]
pub enum ViewError {
    /// The request cannot be answered.
    Refused(RequestError),
    /// The log cannot be read.
    Log(LogError),
}

impl From<LogError> for ViewError {
    fn from(error: LogError) -> Self {
        Self::Log(error)
    }
}

fn refused(code: ErrorCode, message: impl Into<String>) -> ViewError {
    ViewError::Refused(RequestError::new(code, message))
}

/// The conversations of users, as they see them.
pub struct Views<L> {
    log: Arc<L>,
    withheld: Arc<Mutex<WithheldRuns>>,
}

/// Of conversations and senders: how far their last entries were looked through, and what is before those that were withheld, if any. That only grows,
/// so nothing is looked through twice, however much a blocked user writes.
type WithheldRuns = FxHashMap<(ConversationId, UserId), WithheldRun>;

#[derive(Clone, Copy, Debug)]
struct WithheldRun {
    looked_to: u64,
    before: u64,
}

impl<L> Clone for Views<L> {
    fn clone(&self) -> Self {
        Self { log: Arc::clone(&self.log), withheld: Arc::clone(&self.withheld) }
    }
}

/// A conversation, seen by one of its two.
struct Conversation<'a> {
    me: &'a UserId,
    with: &'a UserId,
    id: ConversationId,
    head: ConversationHead,
}

impl<L: Log> Views<L> {
    pub fn new(log: Arc<L>) -> Self {
        Self { log, withheld: Arc::default() }
    }

    async fn head(&self, conversation: &ConversationId) -> Result<Option<ConversationHead>, LogError> {
        Ok(self.log.heads(vec![conversation.clone()]).await?.pop().flatten())
    }

    async fn conversation<'a>(&self, me: &'a UserId, with: &'a UserId) -> Result<Conversation<'a>, ViewError> {
        let id = ConversationId::between(me, with)
            .map_err(|error| refused(ErrorCode::SelfMessage, format!("`with`: {error}")))?;
        match self.head(&id).await? {
            Some(head) => Ok(Conversation { me, with, id, head }),
            None => {
                Err(refused(ErrorCode::UnknownConversation, format!("`with`: you have no conversation with {with}")))
            }
        }
    }

    // ---- cursors ------------------------------------------------------------------------------------------------------

    /// The seq up to which a conversation has reached a user's devices. What was withheld from the user has not.
    pub async fn delivered(&self, from: &UserId, to: &UserId) -> Result<u64, LogError> {
        let Ok(id) = ConversationId::between(from, to) else { return Ok(0) };
        let Some(head) = self.head(&id).await? else { return Ok(0) };
        let inbox = Stream { user: to.clone(), side: Side::Inbox };
        let reached = self.log.delivered(&inbox).await?.position;
        let last = match self.log.first_after(&id, reached).await? {
            Some(next) => next.get() - 1,
            None => head.seq.get(),
        };
        let read = self.log.peer(to, from).await?.map_or(0, |record| record.read);
        let delivered = self.not_withheld(&id, from, last).await?;
        Ok(delivered.max(read))
    }

    /// `last`, or what is before the sender's entries that were withheld, if the last of them up to there were. As `last` grows it never
    /// goes back.
    async fn not_withheld(&self, id: &ConversationId, from: &UserId, last: u64) -> Result<u64, LogError> {
        let key = (id.clone(), from.clone());
        let known = self.withheld.lock().get(&key).copied().filter(|known| known.looked_to <= last);
        let looked_to = known.map_or(0, |known| known.looked_to);
        let (mut end, mut told) = (last, last);
        let mut found = false;
        while end > looked_to && !found {
            let begin = end.saturating_sub(if end < last { WINDOW } else { 4 }).max(looked_to);
            let limit = ReadLimit { entries: usize::try_from(end - begin).unwrap_or(1), bytes: usize::MAX };
            let entries = self.log.read_conversation(id, Seq::new(begin), limit).await?.entries;
            for entry in entries.iter().rev().filter(|entry| entry.from == *from && entry.seq.get() <= end) {
                found = !entry.withheld;
                if found {
                    break;
                }
                told = entry.seq.get() - 1;
            }
            end = begin;
        }
        if let Some(known) = known.filter(|known| !found && known.before < known.looked_to) {
            told = known.before;
        }
        if last - end > WINDOW {
            let mut withheld = self.withheld.lock();
            if withheld.len() >= WITHHELD_RUNS_MAX {
                withheld.clear();
            }
            withheld.insert(key, WithheldRun { looked_to: last, before: told });
        }
        Ok(told)
    }

    /// How the conversation with a peer stands for a user.
    pub async fn standing(&self, me: &UserId, with: &UserId, record: PeerRecord) -> Result<Standing, LogError> {
        let read = self.log.peer(with, me).await?.map_or(0, |record| record.read);
        Ok(Standing {
            with: with.clone(),
            delivered: self.delivered(me, with).await?,
            read,
            my_read: record.read,
            blocked: record.blocked_at_ms.is_some(),
        })
    }

    // ---- history ------------------------------------------------------------------------------------------------------

    /// Part of a conversation: texts as they stand now, or the entries.
    pub async fn history(
        &self,
        me: &UserId,
        with: &UserId,
        range: Range,
        limit: usize,
        raw: bool,
    ) -> Result<HistoryOk, ViewError> {
        let conversation = self.conversation(me, with).await?;
        let head = conversation.head.seq.get();
        let mut entries: Vec<AnsweredEntry> = Vec::new();
        let mut bytes = 0;
        // One more than wanted says whether there are more.
        let mut more = false;
        let mut take = |entry: AnsweredEntry| {
            bytes += entry.text.as_deref().map_or(0, json_bytes);
            more = entries.len() == limit || (bytes > ANSWER_BYTES_MAX && !entries.is_empty());
            if !more {
                entries.push(entry);
            }
            !more
        };
        match range {
            Range::Before(before) => {
                let mut end = before.map_or(head, |before| before.get() - 1).min(head);
                'windows: while end > 0 {
                    let begin = end.saturating_sub(WINDOW);
                    for entry in self.window(&conversation, begin, end, raw).await?.into_iter().rev() {
                        if !take(entry) {
                            break 'windows;
                        }
                    }
                    end = begin;
                }
                entries.reverse();
            }
            Range::After(after) => {
                let mut begin = after.map_or(0, Seq::get);
                'windows: while begin < head {
                    let end = begin.saturating_add(WINDOW).min(head);
                    for entry in self.window(&conversation, begin, end, raw).await? {
                        if !take(entry) {
                            break 'windows;
                        }
                    }
                    begin = end;
                }
            }
        }
        Ok(HistoryOk { with: with.clone(), entries, more })
    }

    /// What a user sees of the entries after `begin` up to `end`, in the order of seq.
    async fn window(
        &self,
        conversation: &Conversation<'_>,
        begin: u64,
        end: u64,
        raw: bool,
    ) -> Result<Vec<AnsweredEntry>, LogError> {
        let Conversation { me, with, id, .. } = conversation;
        let (Some(first), Some(last)) = (Seq::new(begin + 1), Seq::new(end)) else { return Ok(Vec::new()) };
        let limit = ReadLimit { entries: usize::try_from(end - begin).unwrap_or(1), bytes: usize::MAX };
        let page = self.log.read_conversation(id, Seq::new(begin), limit).await?;
        let hidden = self.log.hidden(me, with, first..=last).await?;
        let is_shown = |entry: &Entry| {
            // The beginning of a conversation may be removed: then the page goes on where it is not.
            entry.seq <= last
                && !is_withheld_from(entry, me)
                && hidden.binary_search_by_key(&entry.seq, |(seq, _)| *seq).is_err()
        };
        let mut entries: Vec<Entry> = page.entries.into_iter().filter(is_shown).collect();
        if raw {
            return Ok(entries.into_iter().map(answered).collect());
        }
        entries.retain(is_text);
        let targets = entries.iter().map(|entry| entry.seq).collect();
        let changes = self.log.changes(id, targets).await?;
        Ok(entries.into_iter().zip(changes).map(|(entry, changes)| as_it_stands(entry, &changes, me)).collect())
    }

    // ---- conversations ------------------------------------------------------------------------------------------------

    /// A user's conversations, the newest first.
    pub async fn conversations(
        &self,
        me: &UserId,
        limit: usize,
        before: Option<(Timestamp, UserId)>,
    ) -> Result<ConversationsOk, ViewError> {
        // Before anything is read: what is stored meanwhile is in the list or behind the token, or both.
        let head = self.log.head();
        let begin_of_sync = Token::Entries { origin: head, after: head }.encode(self.log.identity());
        let sync = before.is_none().then_some(begin_of_sync);
        let peers = self.log.peers(me).await?;
        let ids: Vec<Option<ConversationId>> =
            peers.iter().map(|(peer, _)| ConversationId::between(me, peer).ok()).collect();
        let heads = self.log.heads(ids.iter().flatten().cloned().collect()).await?;
        let mut heads = heads.into_iter();
        let mut all: Vec<((Reverse<Timestamp>, UserId), PeerRecord, ConversationHead)> = Vec::new();
        for ((peer, record), id) in peers.into_iter().zip(ids) {
            // Whoever is only blocked has no conversation.
            if id.is_some()
                && let Some(Some(head)) = heads.next()
            {
                all.push(((Reverse(head.at), peer), record, head));
            }
        }
        all.sort_unstable_by(|(a, ..), (b, ..)| a.cmp(b));
        let before = before.map(|(at, peer)| (Reverse(at), peer));
        let begin = before.map_or(0, |before| all.partition_point(|(place, ..)| *place <= before));
        let mut answer = ConversationsOk { conversations: Vec::new(), next: None, sync };
        let (mut place, mut bytes) = (None, 0);
        for ((at, with), record, head) in all.split_off(begin) {
            let Ok(id) = ConversationId::between(me, &with) else { continue };
            if answer.conversations.len() == limit || bytes > ANSWER_BYTES_MAX {
                answer.next = place;
                break;
            }
            place = Some(place_of(at.0, &with));
            let conversation = Conversation { me, with: &with, id, head };
            let last = self.last_text(&conversation).await?;
            bytes += last.as_ref().and_then(|last| last.text.as_deref()).map_or(0, json_bytes);
            answer.conversations.push(ConversationOk {
                standing: self.standing(me, &with, record).await?,
                last,
                unread: self.unread(&conversation, record.read).await?,
            });
        }
        Ok(answer)
    }

    async fn last_text(&self, conversation: &Conversation<'_>) -> Result<Option<AnsweredEntry>, LogError> {
        let mut end = conversation.head.seq.get();
        // Small at first: it is nearly always the last.
        for window in [4, WINDOW].into_iter().chain([WINDOW; LAST_TEXT_WINDOWS]) {
            let begin = end.saturating_sub(window);
            if let Some(last) = self.window(conversation, begin, end, false).await?.pop() {
                return Ok(Some(last));
            }
            end = begin;
        }
        Ok(None)
    }

    /// The peer's texts after what the user has read, and after what the user wrote last.
    async fn unread(&self, conversation: &Conversation<'_>, read: u64) -> Result<u64, LogError> {
        let Conversation { me, head, .. } = conversation;
        let stop = read.max(head.seq.get().saturating_sub(UNREAD_MAX));
        let (mut end, mut unread) = (head.seq.get(), 0);
        while end > stop {
            let begin = end.saturating_sub(WINDOW).max(stop);
            for entry in self.window(conversation, begin, end, true).await?.iter().rev() {
                if entry.from == **me {
                    return Ok(unread);
                }
                unread += u64::from(entry.kind == "text");
            }
            end = begin;
        }
        Ok(unread)
    }

    // ---- sync ---------------------------------------------------------------------------------------------------------

    /// What changed since a token: entries, then how conversations stand. Without a token, everything.
    pub async fn sync(&self, me: &UserId, since: Option<&str>, limit: usize) -> Result<SyncOk, ViewError> {
        let identity = self.log.identity();
        let head = self.log.head();
        let token = match since {
            None => Token::Entries { origin: Position(0), after: Position(0) },
            Some(token) => Token::parse(token, identity, head).ok_or_else(|| {
                refused(
                    ErrorCode::InvalidToken,
                    "`since`: it is not a token of this server as it is now; start over: sync without `since`",
                )
            })?,
        };
        let mut answer = SyncOk { entries: Vec::new(), conversations: Vec::new(), next: String::new(), more: true };
        let (origin, head, peer) = match token {
            Token::Entries { origin, after } => {
                let (entries, end) = self.entries_after(me, after, limit).await?;
                let last = entries.last().map_or(after, |entry| entry.position);
                answer.entries = entries.into_iter().map(answered).collect();
                if !end {
                    answer.next = Token::Entries { origin, after: last }.encode(identity);
                    return Ok(answer);
                }
                // What was stored before the look is in it, or in an answer before.
                (origin, head.max(last), None)
            }
            Token::Conversations { origin, head, peer } => (origin, head, Some(peer)),
        };
        let next = self.changed_since(me, origin, peer, &mut answer).await?;
        answer.more = next.is_some();
        let token = match next {
            Some(peer) => Token::Conversations { origin, head, peer },
            None => Token::Entries { origin: head, after: head },
        };
        answer.next = token.encode(identity);
        Ok(answer)
    }

    /// Entries that others sent to a user and the user sent to others, in the order of the log; and whether there are no more.
    async fn entries_after(&self, me: &UserId, after: Position, limit: usize) -> Result<(Vec<Entry>, bool), LogError> {
        let limits = ReadLimit { entries: limit + 1, bytes: ANSWER_BYTES_MAX };
        let inbox = self.log.read(&Stream { user: me.clone(), side: Side::Inbox }, after, limits).await?;
        let sent = self.log.read(&Stream { user: me.clone(), side: Side::Sent }, after, limits).await?;
        // Behind the end of a page that has more, the other's entries are not next.
        let reach = [&inbox, &sent]
            .into_iter()
            .filter(|page| !page.end)
            .filter_map(|page| page.entries.last().map(|entry| entry.position))
            .min();
        let mut end = reach.is_none();
        let mut entries: Vec<Entry> = inbox.entries.into_iter().chain(sent.entries).collect();
        entries.sort_unstable_by_key(|entry| entry.position);
        entries.retain(|entry| reach.is_none_or(|reach| entry.position <= reach));
        let mut bytes = 0;
        let fitting = entries
            .iter()
            .take(limit)
            .take_while(|entry| {
                let first = bytes == 0;
                bytes += json_bytes(entry.body.text()).max(1);
                first || bytes <= ANSWER_BYTES_MAX
            })
            .count();
        if fitting < entries.len() {
            entries.truncate(fitting);
            end = false;
        }
        Ok((entries, end))
    }

    /// Adds conversations that changed since a position, behind a peer; where to go on, if there are more.
    async fn changed_since(
        &self,
        me: &UserId,
        origin: Position,
        behind: Option<UserId>,
        answer: &mut SyncOk,
    ) -> Result<Option<UserId>, LogError> {
        let mut last = None;
        let mut deletions = 0;
        for (with, record) in self.log.peers(me).await? {
            if behind.as_ref().is_some_and(|behind| with <= *behind) {
                continue;
            }
            if answer.conversations.len() == SYNCED_CONVERSATIONS_MAX || deletions > SYNCED_DELETIONS_MAX {
                return Ok(last);
            }
            let deleted: Vec<Seq> = self.deleted_since(me, &with, origin).await?;
            if deleted.is_empty() && record.changed < origin && !self.has_moved(me, &with, origin).await? {
                continue;
            }
            deletions += deleted.len();
            let standing = self.standing(me, &with, record).await?;
            answer.conversations.push(SyncedConversation { standing, deleted });
            last = Some(with);
        }
        Ok(None)
    }

    /// Whether what reached the peer, or what the peer has read, may have changed.
    async fn has_moved(&self, me: &UserId, with: &UserId, origin: Position) -> Result<bool, LogError> {
        let inbox = Stream { user: with.clone(), side: Side::Inbox };
        if self.log.delivered(&inbox).await?.moved >= origin {
            return Ok(true);
        }
        Ok(self.log.peer(with, me).await?.is_some_and(|record| record.changed >= origin))
    }

    async fn deleted_since(&self, me: &UserId, with: &UserId, origin: Position) -> Result<Vec<Seq>, LogError> {
        let all = Seq::FIRST..=Seq::new(u64::MAX).unwrap_or(Seq::FIRST);
        let hidden = self.log.hidden(me, with, all).await?;
        Ok(hidden.into_iter().filter(|(_, at)| *at >= origin).map(|(seq, _)| seq).collect())
    }

    // ---- single entries -----------------------------------------------------------------------------------------------

    /// An entry of a conversation that a user can see.
    pub async fn entry(&self, me: &UserId, with: &UserId, seq: Seq) -> Result<Entry, ViewError> {
        let conversation = self.conversation(me, with).await?;
        let limit = ReadLimit { entries: 1, bytes: usize::MAX };
        let page = self.log.read_conversation(&conversation.id, Seq::new(seq.get() - 1), limit).await?;
        let entry = page.entries.into_iter().next().filter(|entry| entry.seq == seq && !is_withheld_from(entry, me));
        entry.ok_or_else(|| {
            let head = conversation.head.seq;
            refused(ErrorCode::InvalidSeq, format!("`seq`: there is no entry {seq}; the last one is {head}"))
        })
    }

    /// The last seq of a conversation that a user is in.
    pub async fn last_seq(&self, me: &UserId, with: &UserId) -> Result<Seq, ViewError> {
        Ok(self.conversation(me, with).await?.head.seq)
    }

    /// Whom a user shares a conversation with, and has not blocked.
    pub async fn peers(&self, me: &UserId) -> Result<Vec<UserId>, LogError> {
        let peers = self.log.peers(me).await?.into_iter();
        let (peers, ids): (Vec<UserId>, Vec<ConversationId>) = peers
            .filter(|(_, record)| record.blocked_at_ms.is_none())
            .filter_map(|(peer, _)| ConversationId::between(me, &peer).ok().map(|id| (peer, id)))
            .unzip();
        // There is a record of whom a user once blocked, too, without any conversation.
        let heads = self.log.heads(ids).await?;
        Ok(peers.into_iter().zip(heads).filter_map(|(peer, head)| head.map(|_| peer)).collect())
    }

    pub async fn share_a_conversation(&self, one: &UserId, other: &UserId) -> Result<bool, LogError> {
        let Ok(id) = ConversationId::between(one, other) else { return Ok(false) };
        Ok(self.log.heads(vec![id]).await?.into_iter().flatten().next().is_some())
    }

    /// Whether a user has blocked another.
    pub async fn blocks(&self, user: &UserId, other: &UserId) -> Result<bool, LogError> {
        Ok(self.log.peer(user, other).await?.is_some_and(|record| record.blocked_at_ms.is_some()))
    }
}

/// How long a text is as JSON.
fn json_bytes(text: &str) -> usize {
    let length = |byte: u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        _ => 1,
    };
    text.bytes().map(length).sum()
}

fn is_withheld_from(entry: &Entry, me: &UserId) -> bool {
    entry.withheld && entry.to == *me
}

/// A text, erased or not, and nothing that changes one.
fn is_text(entry: &Entry) -> bool {
    matches!(entry.body, Body::Text(_) | Body::Erased { target: None, .. })
}

/// An entry as it is stored.
fn answered(entry: Entry) -> AnsweredEntry {
    let (kind, text) = match &entry.body {
        Body::Text(text) => ("text", Some(text)),
        Body::Edit { text, .. } => ("edit", Some(text)),
        Body::Unsend { .. } => ("unsend", None),
        Body::Erased { .. } => ("erased", None),
    };
    let target = if matches!(entry.body, Body::Erased { .. }) { None } else { entry.body.target() };
    AnsweredEntry {
        v: 1,
        kind: kind.to_owned(),
        text: text.map(|text| text.to_string()),
        target,
        conversation: entry.conversation,
        seq: entry.seq,
        from: entry.from,
        to: entry.to,
        id: entry.id,
        at: entry.at,
        edited_at: None,
        unsent: false,
    }
}

/// A text with its edits, or without words if it was taken back.
fn as_it_stands(entry: Entry, changes: &[Entry], me: &UserId) -> AnsweredEntry {
    let unsent = matches!(entry.body, Body::Erased { .. });
    let mut answered = AnsweredEntry { kind: "text".to_owned(), unsent, ..answered(entry) };
    for change in changes.iter().filter(|change| !unsent && !is_withheld_from(change, me)) {
        if let Body::Edit { text, .. } = &change.body {
            answered.text = Some(text.to_string());
            answered.edited_at = Some(change.at);
        }
    }
    answered
}

/// How far a sync is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    /// Entries come next; conversations since `origin` after them.
    Entries { origin: Position, after: Position },
    /// Entries up to `head` have come; conversations behind `peer` come next.
    Conversations { origin: Position, head: Position, peer: UserId },
}

impl Token {
    fn encode(&self, identity: u64) -> String {
        match self {
            Self::Entries { origin, after } => format!("1.{identity:x}.{:x}.{:x}", origin.0, after.0),
            Self::Conversations { origin, head, peer } => {
                format!("1.{identity:x}.{:x}.{:x}.{peer}", origin.0, head.0)
            }
        }
    }

    /// `None` if it is another log's, or from after its head.
    fn parse(token: &str, identity: u64, head: Position) -> Option<Self> {
        let parts: BTreeMap<usize, &str> = token.splitn(6, '.').enumerate().collect();
        let number = |nth: usize| u64::from_str_radix(parts.get(&nth)?, 16).ok();
        if parts.get(&0) != Some(&"1") || number(1) != Some(identity) {
            return None;
        }
        let (origin, at) = (Position(number(2)?), Position(number(3)?));
        if origin > at || at > head {
            return None;
        }
        match parts.len() {
            4 => Some(Self::Entries { origin, after: at }),
            5 => Some(Self::Conversations { origin, head: at, peer: UserId::parse(parts[&4]).ok()? }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{MemoryLog, NewEntry};

    /// What is before the last entries that were withheld is found however many they are, and they are looked through once.
    #[tokio::test]
    async fn a_long_run_of_withheld_entries() {
        let name = |name: &str| UserId::parse(name).unwrap();
        let (eve, bob) = (name("eve"), name("bob"));
        let id = ConversationId::between(&eve, &bob).unwrap();
        let log = Arc::new(MemoryLog::new());
        let views = Views::new(Arc::clone(&log));
        let mut seq = 0;
        let mut expected = 0;
        // How many, by whom, and whether they are withheld.
        for (count, from, withheld) in [
            (3, &eve, false),
            (700, &eve, true),
            (400, &bob, false),
            (900, &eve, true),
            (1, &eve, false),
            (600, &eve, true),
        ] {
            let to = if *from == eve { &bob } else { &eve };
            for _ in 0..count {
                seq += 1;
                let entry = NewEntry {
                    conversation: id.clone(),
                    seq: Seq::new(seq).unwrap(),
                    from: from.clone(),
                    to: to.clone(),
                    id: None,
                    at: Timestamp::from_ms(seq),
                    body: "x".to_owned().into(),
                    withheld,
                };
                log.append(vec![entry]).await.unwrap();
                // Looked at now and then, as it grows.
                if !withheld && *from == eve {
                    expected = seq;
                }
                let anew = Views::new(Arc::clone(&log));
                if seq % 97 == 0 || seq % 301 == 0 {
                    assert_eq!(views.not_withheld(&id, &eve, seq).await.unwrap(), expected, "{seq}");
                    assert_eq!(anew.not_withheld(&id, &eve, seq).await.unwrap(), expected, "{seq}");
                }
            }
            assert_eq!(views.not_withheld(&id, &eve, seq).await.unwrap(), expected);
        }
        let known = views.withheld.lock()[&(id.clone(), eve.clone())];
        assert!(
            known.looked_to + 2 * WINDOW > seq && known.before == expected,
            "the next look begins there: {known:?}"
        );
        // What was before is still what it was.
        assert_eq!(views.not_withheld(&id, &eve, 650).await.unwrap(), 3);
    }

    /// Whoever has the list goes on from there, and gets nothing of what was before, and all that came since.
    #[tokio::test]
    async fn the_list_tells_where_sync_begins() {
        let name = |name: &str| UserId::parse(name).unwrap();
        let me = name("bob");
        let log = Arc::new(MemoryLog::new());
        let views = Views::new(Arc::clone(&log));
        let append = async |peer: &str, seq: u64| {
            let entry = NewEntry {
                conversation: ConversationId::between(&name(peer), &me).unwrap(),
                seq: Seq::new(seq).unwrap(),
                from: name(peer),
                to: me.clone(),
                id: None,
                at: Timestamp::from_ms(seq),
                body: "x".to_owned().into(),
                withheld: false,
            };
            log.append(vec![entry]).await.unwrap();
        };
        assert!(views.conversations(&me, 1, None).await.unwrap().sync.is_some(), "an empty list has a place, too");
        for seq in 1..=300 {
            append("alice", seq).await;
        }
        append("eve", 1).await;
        let first = views.conversations(&me, 1, None).await.unwrap();
        let second = views.conversations(&me, 1, Some((Timestamp::from_ms(300), name("alice")))).await.unwrap();
        assert_eq!((first.conversations.len(), second.conversations.len()), (1, 1));
        assert_eq!(second.sync, None, "what changed since the first page is not behind the second");

        append("eve", 2).await;
        append("alice", 301).await;
        let synced = views.sync(&me, first.sync.as_deref(), 50).await.unwrap();
        let came: Vec<(&str, u64)> =
            synced.entries.iter().map(|entry| (entry.from.as_str(), entry.seq.get())).collect();
        assert_eq!((came, synced.more), (vec![("eve", 2), ("alice", 301)], false));
        let again = views.sync(&me, Some(&synced.next), 50).await.unwrap();
        assert!(again.entries.is_empty(), "{again:?}");
    }

    #[test]
    fn the_length_of_a_text_is_that_of_its_json() {
        let all: String = (0..0x300).filter_map(char::from_u32).collect();
        for text in ["", "hello", "\"\\", "\u{1}\u{1f}\n", &all] {
            let json = serde_json::to_string(text).unwrap();
            assert_eq!(json_bytes(text) + 2, json.len(), "{text:?}");
        }
    }

    #[test]
    fn tokens_come_back_and_others_are_refused() {
        let peer = UserId::parse("bob").unwrap();
        for token in [
            Token::Entries { origin: Position(3), after: Position(255) },
            Token::Conversations { origin: Position(0), head: Position(7), peer },
        ] {
            let text = token.encode(77);
            assert_eq!(Token::parse(&text, 77, Position(255)), Some(token));
            assert_eq!(Token::parse(&text, 78, Position(255)), None, "another log's");
            assert_eq!(Token::parse(&text, 77, Position(6)), None, "from the future");
        }
        for text in ["", "1", "1.4d.1.2.bob.x", "2.4d.1.2", "1.4d.3.2", "1.4d.x.2", "1.4d.1.2.Bob"] {
            assert_eq!(Token::parse(text, 77, Position(99)), None, "{text}");
        }
    }
}
