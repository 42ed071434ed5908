//! Decisions about messages: which seq, which time, and whether a message was sent before.
//!
//! Pure: no clock, no log, no task. The sequencer loads what [`plan`] needs and carries out what it says. Invariants: seq counts 1, 2, 3, … in
//! a conversation; `at` never runs backwards in it; a resend (same sender, conversation and id) is the same message.

use std::sync::Arc;

use chat_protocol::{ConversationId, MessageId, Seq, Timestamp, UserId};
use rustc_hash::FxHashMap;

use crate::beginnings::Beginnings;
use crate::log::{Account, Body, ConversationHead, Entry, IdKey, NewEntry};

/// A message that a user sends, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Send {
    pub conversation: ConversationId,
    pub from: UserId,
    pub to: UserId,
    pub id: Option<MessageId>,
    pub body: Body,
    /// The receiver has blocked the sender, or did when what this changes was sent.
    pub withheld: bool,
    /// A bridge brings it from another network: it may begin any number of conversations.
    pub bridged: bool,
}

impl Send {
    /// The key under which a resend is recognised; `None` without an id.
    pub fn id_key(&self) -> Option<IdKey> {
        Some(IdKey { conversation: self.conversation.clone(), from: self.from.clone(), id: self.id.clone()? })
    }
}

/// What becomes of one message of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is the batch's entry with this index.
    Append(usize),
    /// It is the same as the batch's entry with this index.
    SameAsNew(usize),
    /// It was stored before, as this.
    Stored(ConversationHead),
    /// Its id belongs to another text.
    IdConflict,
    /// The sender's quota is full.
    SenderFull,
    /// The conversation's quota is full.
    ConversationFull,
    /// It would begin a conversation, and the sender began too many lately.
    TooManyBegun,
}

/// How many bytes may be stored, as [`Body::counted_bytes`] counts them; `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quotas {
    /// Of what one user sent.
    pub sender_bytes: Option<u64>,
    pub conversation_bytes: Option<u64>,
}

impl Quotas {
    /// Nothing is limited.
    pub const NONE: Self = Self { sender_bytes: None, conversation_bytes: None };

    /// Accounts of a message that have a limit, with it, and what is decided where it is exceeded.
    fn of(&self, send: &Send) -> impl Iterator<Item = (Account, u64, Decision)> {
        let sender = self.sender_bytes.map(|max| (Account::Sender(send.from.clone()), max, Decision::SenderFull));
        let conversation = self
            .conversation_bytes
            .map(|max| (Account::Conversation(send.conversation.clone()), max, Decision::ConversationFull));
        sender.into_iter().chain(conversation)
    }

    /// Accounts whose usage decides over a message.
    pub fn accounts(&self, send: &Send) -> impl Iterator<Item = Account> {
        self.of(send).map(|(account, ..)| account)
    }
}

/// A batch, decided.
#[derive(Debug, Default)]
pub struct Plan {
    /// What to append, in order. Shared with the log that writes it.
    pub entries: Arc<Vec<NewEntry>>,
    /// One for every message, in order.
    pub decisions: Vec<Decision>,
    /// Who begins a conversation in it that counts, once for each.
    pub begun: Vec<UserId>,
}

/// Decides a batch. `heads` are the last entries of every conversation in it (absent: none yet); `stored` the entries that already have an
/// id of the batch; `usage` what is stored for the accounts that have a limit (absent: nothing); `beginnings` who began how many conversations.
pub fn plan(
    batch: &[Send],
    heads: &FxHashMap<ConversationId, ConversationHead>,
    stored: &FxHashMap<IdKey, Entry>,
    quotas: Quotas,
    usage: &FxHashMap<Account, u64>,
    beginnings: &Beginnings,
    now: Timestamp,
) -> Plan {
    let mut used: FxHashMap<Account, u64> = FxHashMap::default();
    let mut plan = Plan { decisions: Vec::with_capacity(batch.len()), ..Plan::default() };
    let mut entries: Vec<NewEntry> = Vec::with_capacity(batch.len());
    let mut begun: FxHashMap<&UserId, u32> = FxHashMap::default();
    let mut moved: FxHashMap<&ConversationId, ConversationHead> = FxHashMap::default();
    let mut new_ids: FxHashMap<IdKey, usize> = FxHashMap::default();
    for send in batch {
        let key = send.id_key();
        if let Some(key) = &key {
            if let Some(&index) = new_ids.get(key) {
                let same = entries[index].body == send.body;
                plan.decisions.push(if same { Decision::SameAsNew(index) } else { Decision::IdConflict });
                continue;
            }
            if let Some(entry) = stored.get(key) {
                let head = ConversationHead { seq: entry.seq, at: entry.at };
                // Of erased words only their number is known.
                let same = entry.body == send.body || send.body.erased().is_some_and(|erased| entry.body == erased);
                plan.decisions.push(if same { Decision::Stored(head) } else { Decision::IdConflict });
                continue;
            }
        }
        let before = moved.get(&send.conversation).or_else(|| heads.get(&send.conversation)).copied();
        let begins = before.is_none() && !send.bridged;
        if begins && begun.get(&send.from).copied().unwrap_or_default() >= beginnings.room(&send.from, now) {
            plan.decisions.push(Decision::TooManyBegun);
            continue;
        }
        if let Some(full) = take(send, quotas, usage, &mut used) {
            plan.decisions.push(full);
            continue;
        }
        if begins {
            *begun.entry(&send.from).or_default() += 1;
            plan.begun.push(send.from.clone());
        }
        let head = match before {
            Some(head) => ConversationHead { seq: head.seq.next(), at: head.at.max(now) },
            None => ConversationHead { seq: Seq::FIRST, at: now },
        };
        moved.insert(&send.conversation, head);
        let index = entries.len();
        if let Some(key) = key {
            new_ids.insert(key, index);
        }
        entries.push(NewEntry {
            conversation: send.conversation.clone(),
            seq: head.seq,
            from: send.from.clone(),
            to: send.to.clone(),
            id: send.id.clone(),
            at: head.at,
            body: send.body.clone(),
            withheld: send.withheld,
        });
        plan.decisions.push(Decision::Append(index));
    }
    plan.entries = Arc::new(entries);
    plan
}

/// Counts a message, or says which quota is full for it.
fn take(
    send: &Send,
    quotas: Quotas,
    usage: &FxHashMap<Account, u64>,
    used: &mut FxHashMap<Account, u64>,
) -> Option<Decision> {
    let bytes = send.body.counted_bytes();
    let total = |account: &Account, used: &FxHashMap<Account, u64>| {
        let before = used.get(account).or_else(|| usage.get(account)).copied().unwrap_or_default();
        before.saturating_add(bytes)
    };
    let full = quotas.of(send).find(|(account, max, _)| total(account, used) > *max);
    if let Some((.., decision)) = full {
        return Some(decision);
    }
    for account in quotas.accounts(send) {
        let total = total(&account, used);
        used.insert(account, total);
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::log::Position;

    fn user(name: &str) -> UserId {
        UserId::parse(name).expect("a valid name")
    }

    fn send(from: &str, to: &str, id: Option<&str>, text: &str) -> Send {
        let (from, to) = (user(from), user(to));
        Send {
            conversation: ConversationId::between(&from, &to).expect("two users"),
            from,
            to,
            id: id.map(|id| MessageId::parse(id).expect("a valid id")),
            body: text.into(),
            withheld: false,
            bridged: false,
        }
    }

    fn plan_unlimited(
        batch: &[Send],
        heads: &FxHashMap<ConversationId, ConversationHead>,
        stored: &FxHashMap<IdKey, Entry>,
        now: Timestamp,
    ) -> Plan {
        plan(batch, heads, stored, Quotas::NONE, &FxHashMap::default(), &Beginnings::default(), now)
    }

    #[test]
    fn a_full_quota_refuses_and_a_smaller_message_may_still_fit() {
        let texts = ["x".repeat(30), "y".repeat(31), "z".repeat(30)];
        let batch = [
            send("alice", "bob", None, &texts[0]),
            send("alice", "bob", None, &texts[1]),
            send("alice", "eve", None, &texts[2]),
            // The quota is alice's, not the conversation's.
            send("bob", "alice", None, &texts[1]),
        ];
        let decide = |quotas, usage: &[(Account, u64)]| {
            let usage = usage.iter().cloned().collect();
            let unlimited = Beginnings::default();
            plan(&batch, &FxHashMap::default(), &FxHashMap::default(), quotas, &usage, &unlimited, at(5)).decisions
        };
        let (alice, both) = (Account::Sender(user("alice")), Account::Conversation(batch[0].conversation.clone()));
        let room_for_two = 2 * Body::from(texts[0].as_str()).counted_bytes();
        let sender = Quotas { sender_bytes: Some(room_for_two), ..Quotas::NONE };
        let stored = [Decision::Append(0), Decision::SenderFull, Decision::Append(1), Decision::Append(2)];
        assert_eq!(decide(sender, &[]), stored);
        let stored = [Decision::SenderFull, Decision::SenderFull, Decision::SenderFull, Decision::Append(0)];
        assert_eq!(decide(sender, &[(alice, room_for_two)]), stored);
        let conversation = Quotas { conversation_bytes: Some(room_for_two), ..Quotas::NONE };
        let stored = [Decision::Append(0), Decision::ConversationFull, Decision::Append(1), Decision::ConversationFull];
        assert_eq!(decide(conversation, &[]), stored);
        let stored =
            [Decision::ConversationFull, Decision::ConversationFull, Decision::Append(0), Decision::ConversationFull];
        assert_eq!(decide(conversation, &[(both, u64::MAX)]), stored);
    }

    #[test]
    fn who_begins_too_many_conversations_is_refused_and_nobody_else() {
        let none = FxHashMap::default();
        let mut beginnings = Beginnings::new(2);
        beginnings.note(&user("alice"), at(5));
        let batch = [
            send("alice", "bob", Some("a"), "the second of alice's"),
            send("alice", "bob", Some("a"), "the second of alice's"),
            send("alice", "bob", None, "it goes on"),
            send("alice", "carol", None, "the third"),
            send("carol", "alice", None, "carol's first, so it is begun after all"),
            send("alice", "carol", None, "a reply never counts"),
            send("bob", "alice", None, "nor does bob's"),
            Send { bridged: true, ..send("alice", "dave", None, "from another network") },
            send("alice", "eve", None, "still too many"),
        ];
        let plan = plan(&batch, &none, &FxHashMap::default(), Quotas::NONE, &FxHashMap::default(), &beginnings, at(5));
        let decisions = [
            Decision::Append(0),
            Decision::SameAsNew(0),
            Decision::Append(1),
            Decision::TooManyBegun,
            Decision::Append(2),
            Decision::Append(3),
            Decision::Append(4),
            Decision::Append(5),
            Decision::TooManyBegun,
        ];
        assert_eq!(plan.decisions, decisions);
        assert_eq!(plan.begun, [user("alice"), user("carol")]);
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_ms(ms)
    }

    #[test]
    fn both_directions_share_one_count() {
        let batch = [send("alice", "bob", None, "a"), send("bob", "alice", None, "b"), send("alice", "eve", None, "c")];
        let plan = plan_unlimited(&batch, &FxHashMap::default(), &FxHashMap::default(), at(5));
        assert_eq!(plan.entries.iter().map(|e| e.seq.get()).collect::<Vec<_>>(), [1, 2, 1]);
    }

    #[test]
    fn a_clock_set_back_does_not_turn_time_back() {
        let batch = [send("alice", "bob", None, "a")];
        let head = ConversationHead { seq: Seq::FIRST, at: at(1_000) };
        let heads = [(batch[0].conversation.clone(), head)].into_iter().collect();
        let plan = plan_unlimited(&batch, &heads, &FxHashMap::default(), at(10));
        assert_eq!((plan.entries[0].seq.get(), plan.entries[0].at), (2, at(1_000)));
    }

    #[test]
    fn an_id_is_one_message() {
        let first = send("alice", "bob", Some("m"), "a");
        let entry = Entry {
            position: Position(9),
            conversation: first.conversation.clone(),
            seq: Seq::FIRST,
            from: first.from.clone(),
            to: first.to.clone(),
            id: first.id.clone(),
            at: at(1),
            body: "a".into(),
            withheld: false,
        };
        let stored = [(first.id_key().expect("has an id"), entry)].into_iter().collect();
        let batch = [
            first,
            send("alice", "bob", Some("m"), "other"),
            send("bob", "alice", Some("m"), "the peer's ids are the peer's"),
            send("alice", "bob", Some("n"), "new"),
            send("alice", "bob", Some("n"), "new"),
            send("alice", "bob", Some("n"), "not the same"),
        ];
        let plan = plan_unlimited(&batch, &FxHashMap::default(), &stored, at(5));
        assert_eq!(
            plan.decisions,
            [
                Decision::Stored(ConversationHead { seq: Seq::FIRST, at: at(1) }),
                Decision::IdConflict,
                Decision::Append(0),
                Decision::Append(1),
                Decision::SameAsNew(1),
                Decision::IdConflict,
            ]
        );
    }

    proptest! {
        #[test]
        fn seq_is_gapless_and_at_monotonic(
            sends in prop::collection::vec((0usize..4, 0usize..4, prop::option::of(0u8..20), 0u8..3), 1..80),
            clocks in prop::collection::vec(0u64..50, 1..10),
        ) {
            let names = ["alice", "bob", "carol", "dave"];
            let mut heads: FxHashMap<ConversationId, ConversationHead> = FxHashMap::default();
            let mut stored: FxHashMap<IdKey, Entry> = FxHashMap::default();
            let mut seen: FxHashMap<ConversationId, Vec<(u64, Timestamp)>> = FxHashMap::default();
            let batch: Vec<Send> = sends
                .iter()
                .filter(|(from, to, ..)| from != to)
                .map(|(from, to, id, text)| {
                    send(names[*from], names[*to], id.map(|id| format!("i{id}")).as_deref(), &format!("t{text}"))
                })
                .collect();
            for (chunk, clock) in batch.chunks(9).zip(clocks.iter().cycle()) {
                let plan = plan_unlimited(chunk, &heads, &stored, at(*clock));
                prop_assert_eq!(plan.decisions.len(), chunk.len());
                for entry in plan.entries.iter().cloned() {
                    seen.entry(entry.conversation.clone()).or_default().push((entry.seq.get(), entry.at));
                    heads.insert(entry.conversation.clone(), ConversationHead { seq: entry.seq, at: entry.at });
                    if let Some(id) = &entry.id {
                        let key = IdKey { conversation: entry.conversation.clone(), from: entry.from.clone(), id: id.clone() };
                        let entry = Entry {
                            position: Position(0), conversation: entry.conversation, seq: entry.seq, from: entry.from,
                            to: entry.to, id: entry.id, at: entry.at, body: entry.body, withheld: entry.withheld,
                        };
                        prop_assert!(stored.insert(key, entry).is_none(), "an id was stored twice");
                    }
                }
            }
            for entries in seen.values() {
                for (index, (seq, _)) in entries.iter().enumerate() {
                    prop_assert_eq!(*seq, index as u64 + 1);
                }
                prop_assert!(entries.windows(2).all(|pair| pair[0].1 <= pair[1].1));
            }
        }
    }
}
