//! What was noted but is not on disk yet: cursors and sessions.
//!
//! Reads lay the notes over what the disk says, so they see them at once. Notes about one thing are folded into one, so there are
//! at most as many as cursors and sessions. Pure: no lock, clock or disk.

use std::ops::RangeInclusive;

use chat_protocol::{Seq, UserId};
use rustc_hash::FxHashMap;

use super::super::{Advance, Cursors, Delivered, Device, PeerRecord, Position, SessionRecord, Side, Stream};
use super::record::{Fields, put_number, put_text};

/// Notes since some moment, folded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Notes {
    pub(super) delivered: FxHashMap<Stream, Delivered>,
    pub(super) sessions: FxHashMap<Device, SessionNote>,
    /// By user and peer.
    pub(super) peers: FxHashMap<(UserId, UserId), PeerNote>,
    /// By user, peer and seq: the head of the log.
    pub(super) hidden: FxHashMap<(UserId, UserId, Seq), Position>,
    /// In milliseconds since the Unix epoch.
    pub(super) seen: FxHashMap<UserId, u64>,
}

/// What happened to a user's record about a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PeerNote {
    /// Read up to here; with the head of the log at the time, which counts only if it is news.
    pub(super) read: u64,
    pub(super) read_at: Position,
    /// Blocked at this time, or no longer; with the head of the log.
    pub(super) blocked: Option<(Option<u64>, Position)>,
}

impl PeerNote {
    fn fold(&mut self, later: Self) {
        if later.read > self.read {
            (self.read, self.read_at) = (later.read, later.read_at);
        }
        self.blocked = later.blocked.or(self.blocked);
    }

    /// The record as it is now, from the one stored before the note.
    pub(super) fn apply(&self, mut record: PeerRecord) -> PeerRecord {
        if self.read > record.read {
            record.read = self.read;
            record.changed = record.changed.max(self.read_at);
        }
        if let Some((blocked_at_ms, at)) = self.blocked {
            record.blocked_at_ms = blocked_at_ms;
            record.changed = record.changed.max(at);
        }
        record
    }
}

/// Notes in a record of the journal.
impl Notes {
    /// Whether they say only how far somebody has come, and who went: what happens all the time.
    pub(super) fn may_go_to_the_journal(&self) -> bool {
        self.hidden.is_empty()
            && self.sessions.values().all(|note| note.replaced.is_none())
            && self.peers.values().all(|note| note.blocked.is_none())
    }

    /// Takes out what may go there; the rest stays.
    pub(super) fn take_for_the_journal(&mut self) -> Self {
        let mut taken = std::mem::take(self);
        if taken.may_go_to_the_journal() {
            return taken;
        }
        self.hidden = std::mem::take(&mut taken.hidden);
        self.sessions = taken.sessions.extract_if(|_, note| note.replaced.is_some()).collect();
        for (key, note) in &mut taken.peers {
            if note.blocked.is_some() {
                self.peers.insert(key.clone(), PeerNote { blocked: note.blocked.take(), ..PeerNote::default() });
            }
        }
        taken
    }

    /// Adds them to bytes; only what [`Notes::may_go_to_the_journal`].
    pub(super) fn encode(&self, bytes: &mut Vec<u8>) {
        put_number(bytes, self.delivered.len() as u64);
        for (Stream { user, side }, Delivered { position, moved }) in &self.delivered {
            put_text(bytes, user.as_str());
            put_number(bytes, Side::ALL.iter().position(|other| other == side).unwrap_or_default() as u64);
            put_number(bytes, position.0);
            put_number(bytes, moved.0);
        }
        put_number(bytes, self.sessions.len() as u64);
        for (Device { user, client_id }, note) in &self.sessions {
            put_text(bytes, user.as_str());
            put_text(bytes, client_id);
            for side in Side::ALL {
                // 0 is none.
                put_number(bytes, note.cursors.of(side).map_or(0, |position| position.0.saturating_add(1)));
            }
            put_number(bytes, u64::from(note.ended.is_some()));
            if let Some(End { at_ms, expiry_s }) = note.ended {
                put_number(bytes, at_ms);
                put_number(bytes, u64::from(expiry_s));
            }
        }
        put_number(bytes, self.peers.len() as u64);
        for ((user, peer), note) in &self.peers {
            put_text(bytes, user.as_str());
            put_text(bytes, peer.as_str());
            put_number(bytes, note.read);
            put_number(bytes, note.read_at.0);
        }
        put_number(bytes, self.seen.len() as u64);
        for (user, at_ms) in &self.seen {
            put_text(bytes, user.as_str());
            put_number(bytes, *at_ms);
        }
    }

    /// What [`Notes::encode`] wrote.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut fields = Fields::new(bytes);
        let user = |fields: &mut Fields<'_>| UserId::parse(fields.text()?).map_err(|error| error.to_string());
        let mut notes = Self::default();
        for _ in 0..fields.number()? {
            let user = user(&mut fields)?;
            let side =
                usize::try_from(fields.number()?).ok().and_then(|side| Side::ALL.get(side)).ok_or("no such side")?;
            let delivered = Delivered { position: Position(fields.number()?), moved: Position(fields.number()?) };
            notes.delivered.insert(Stream { user, side: *side }, delivered);
        }
        for _ in 0..fields.number()? {
            let device = Device { user: user(&mut fields)?, client_id: fields.text()?.into() };
            let mut note = SessionNote::default();
            for side in Side::ALL {
                *note.cursors.of_mut(side) = fields.number()?.checked_sub(1).map(Position);
            }
            if fields.number()? > 0 {
                let at_ms = fields.number()?;
                let expiry_s = u32::try_from(fields.number()?).map_err(|_| "an expiry is too long")?;
                note.ended = Some(End { at_ms, expiry_s });
            }
            notes.sessions.insert(device, note);
        }
        for _ in 0..fields.number()? {
            let key = (user(&mut fields)?, user(&mut fields)?);
            let note = PeerNote { read: fields.number()?, read_at: Position(fields.number()?), blocked: None };
            notes.peers.insert(key, note);
        }
        for _ in 0..fields.number()? {
            let user = user(&mut fields)?;
            notes.seen.insert(user, fields.number()?);
        }
        fields.finish()?;
        Ok(notes)
    }
}

/// What happened to a session, in this order: replaced, then its cursors advanced and it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SessionNote {
    replaced: Option<Replacement>,
    cursors: Cursors,
    ended: Option<End>,
}

/// What a session was replaced with: `None` if it was deleted.
type Replacement = Option<SessionRecord>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct End {
    at_ms: u64,
    expiry_s: u32,
}

impl Notes {
    pub(super) fn is_empty(&self) -> bool {
        self.delivered.is_empty()
            && self.sessions.is_empty()
            && self.peers.is_empty()
            && self.hidden.is_empty()
            && self.seen.is_empty()
    }

    pub(super) fn peer(&self, user: &UserId, peer: &UserId) -> Option<PeerNote> {
        if self.peers.is_empty() { None } else { self.peers.get(&(user.clone(), peer.clone())).copied() }
    }

    pub(super) fn peers_of(&self, user: &UserId) -> Vec<(UserId, PeerNote)> {
        let of_user = self.peers.iter().filter(|((me, _), _)| me == user);
        of_user.map(|((_, peer), note)| (peer.clone(), *note)).collect()
    }

    pub(super) fn hidden_of(&self, user: &UserId, peer: &UserId, seqs: &RangeInclusive<Seq>) -> Vec<(Seq, Position)> {
        let meant = |me: &UserId, with: &UserId, seq: &Seq| me == user && with == peer && seqs.contains(seq);
        let hidden = self.hidden.iter().filter(|((me, with, seq), _)| meant(me, with, seq));
        hidden.map(|((.., seq), head)| (*seq, *head)).collect()
    }

    pub(super) fn note_peer(&mut self, user: &UserId, peer: &UserId, note: PeerNote) {
        self.peers.entry((user.clone(), peer.clone())).or_default().fold(note);
    }

    pub(super) fn hide(&mut self, user: &UserId, peer: &UserId, seq: Seq, head: Position) {
        self.hidden.entry((user.clone(), peer.clone(), seq)).or_insert(head);
    }

    pub(super) fn saw(&mut self, user: &UserId, at_ms: u64) {
        let seen = self.seen.entry(user.clone()).or_default();
        *seen = at_ms.max(*seen);
    }

    /// `head`: of the log, now.
    pub(super) fn advance(&mut self, advance: Advance, head: Position) {
        let Advance { stream, device, position } = advance;
        if let Some(device) = device {
            let note = self.sessions.entry(device).or_default();
            let cursor = note.cursors.of_mut(stream.side);
            *cursor = (*cursor).max(Some(position));
        }
        self.delivered_up_to(stream, Delivered { position, moved: head });
    }

    fn delivered_up_to(&mut self, stream: Stream, delivered: Delivered) {
        let noted = self.delivered.entry(stream).or_default();
        if delivered.position > noted.position {
            *noted = delivered;
        }
    }

    /// Earlier notes about the session are void.
    pub(super) fn replace(&mut self, device: Device, record: Option<SessionRecord>) {
        self.sessions.insert(device, SessionNote { replaced: Some(record), ..SessionNote::default() });
    }

    pub(super) fn end(&mut self, device: Device, at_ms: u64, expiry_s: u32) {
        self.sessions.entry(device).or_default().ended = Some(End { at_ms, expiry_s });
    }

    /// Adds notes made after these.
    pub(super) fn fold(&mut self, later: Self) {
        for (stream, delivered) in later.delivered {
            self.delivered_up_to(stream, delivered);
        }
        for (device, note) in later.sessions {
            self.sessions.entry(device).or_default().fold(note);
        }
        for ((user, peer), note) in later.peers {
            self.note_peer(&user, &peer, note);
        }
        for ((user, peer, seq), head) in later.hidden {
            self.hide(&user, &peer, seq, head);
        }
        for (user, at_ms) in later.seen {
            self.saw(&user, at_ms);
        }
    }
}

impl SessionNote {
    fn fold(&mut self, later: Self) {
        if later.replaced.is_some() {
            *self = later;
            return;
        }
        for side in Side::ALL {
            let cursor = self.cursors.of_mut(side);
            *cursor = (*cursor).max(later.cursors.of(side));
        }
        self.ended = later.ended.or(self.ended);
    }

    /// Whether the stored session matters for what the session is now.
    pub(super) fn needs_stored(&self) -> bool {
        self.replaced.is_none()
    }

    /// The session as it is now, from the one stored before the note.
    pub(super) fn apply(&self, stored: Option<SessionRecord>) -> Option<SessionRecord> {
        let mut session = self.replaced.clone().unwrap_or(stored)?;
        for side in Side::ALL {
            if let Some(position) = self.cursors.of(side) {
                session.advance(side, position);
            }
        }
        if let Some(End { at_ms, expiry_s }) = self.ended {
            session.ended_at_ms = Some(at_ms);
            session.expiry_s = expiry_s;
        }
        Some(session)
    }
}

#[cfg(test)]
mod tests {
    use chat_protocol::UserId;
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Advance(Side, u64),
        Put(Option<u64>, Option<u64>),
        Delete,
        End(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let side = prop_oneof![Just(Side::Inbox), Just(Side::Sent), Just(Side::EveryInbox)];
        let step = prop_oneof![
            (side, 0_u64..20).prop_map(|(side, position)| Step::Advance(side, position)),
            (any::<Option<bool>>(), any::<Option<bool>>())
                .prop_map(|(inbox, sent)| Step::Put(inbox.map(u64::from), sent.map(|sent| 9 * u64::from(sent)))),
            Just(Step::Delete),
            (0_u64..20).prop_map(Step::End),
        ];
        prop::collection::vec(step, 0..12)
    }

    fn device() -> Device {
        Device { user: UserId::parse("bob").unwrap(), client_id: "phone".into() }
    }

    fn note(notes: &mut Notes, step: &Step) {
        match *step {
            Step::Advance(side, position) => {
                let stream = Stream { user: device().user, side };
                let advance = Advance { stream, device: Some(device()), position: Position(position) };
                notes.advance(advance, Position(99));
            }
            Step::Put(inbox, sent) => notes.replace(device(), Some(record(inbox, sent))),
            Step::Delete => notes.replace(device(), None),
            Step::End(at_ms) => notes.end(device(), at_ms, 7),
        }
    }

    fn record(inbox: Option<u64>, sent: Option<u64>) -> SessionRecord {
        let cursors = Cursors { inbox: inbox.map(Position), sent: sent.map(Position), ..Cursors::default() };
        SessionRecord { cursors, ..SessionRecord::default() }
    }

    /// What the steps do to a session one by one.
    fn done_at_once(session: Option<SessionRecord>, steps: &[Step]) -> Option<SessionRecord> {
        steps.iter().fold(session, |session, step| match *step {
            Step::Put(inbox, sent) => Some(record(inbox, sent)),
            Step::Delete => None,
            Step::Advance(side, position) => session.map(|mut session| {
                session.advance(side, Position(position));
                session
            }),
            Step::End(at_ms) => {
                session.map(|session| SessionRecord { ended_at_ms: Some(at_ms), expiry_s: 7, ..session })
            }
        })
    }

    proptest! {
        #[test]
        fn notes_come_back_from_the_journal(steps in steps(), read in 0_u64..9, seen in 0_u64..9) {
            let mut notes = Notes::default();
            steps.iter().filter(|step| matches!(step, Step::Advance(..) | Step::End(_))).for_each(|step| note(&mut notes, step));
            if read > 0 {
                let peer = UserId::parse("alice").unwrap();
                notes.note_peer(&device().user, &peer, PeerNote { read, read_at: Position(7), blocked: None });
            }
            if seen > 0 {
                notes.saw(&device().user, seen);
            }
            prop_assert!(notes.may_go_to_the_journal());
            let mut bytes = Vec::new();
            notes.encode(&mut bytes);
            let decoded = Notes::decode(&bytes);
            prop_assert_eq!(decoded.as_ref(), Ok(&notes));
            for end in 0..bytes.len() {
                prop_assert!(Notes::decode(&bytes[..end]).is_err());
            }
            steps.iter().for_each(|step| note(&mut notes, step));
            let replaced = steps.iter().any(|step| matches!(step, Step::Put(..) | Step::Delete));
            prop_assert_eq!(notes.may_go_to_the_journal(), !replaced);
        }

        #[test]
        fn what_goes_to_the_journal_and_the_rest_are_all(steps in steps(), read in 0_u64..3, blocked in any::<bool>(), hidden in any::<bool>()) {
            let mut notes = Notes::default();
            steps.iter().for_each(|step| note(&mut notes, step));
            let (me, peer) = (device().user, UserId::parse("alice").unwrap());
            let blocked = blocked.then_some((Some(3), Position(8)));
            notes.note_peer(&me, &peer, PeerNote { read, read_at: Position(7 * read.min(1)), blocked });
            if hidden {
                notes.hide(&me, &peer, Seq::FIRST, Position(9));
            }
            let mut rest = notes.clone();
            let mut both = rest.take_for_the_journal();
            prop_assert!(both.may_go_to_the_journal());
            prop_assert!(rest.delivered.is_empty() && rest.seen.is_empty());
            prop_assert_eq!(notes.may_go_to_the_journal(), rest.is_empty());
            both.fold(rest);
            prop_assert_eq!(both, notes);
        }

        #[test]
        fn folded_notes_mean_what_the_steps_did(stored in any::<bool>(), before in steps(), after in steps()) {
            let stored = stored.then(|| record(Some(5), None));
            let (mut earlier, mut later) = (Notes::default(), Notes::default());
            before.iter().for_each(|step| note(&mut earlier, step));
            after.iter().for_each(|step| note(&mut later, step));
            let all: Vec<Step> = [before, after].concat();
            earlier.fold(later);
            let read = match earlier.sessions.get(&device()) {
                Some(note) => note.apply(stored.clone()),
                None => stored.clone(),
            };
            prop_assert_eq!(read, done_at_once(stored, &all));
        }
    }
}
