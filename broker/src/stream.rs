//! One session's place in one durable topic: what to send next, what is in flight, what was acknowledged.
//!
//! Pure: no clock, no socket. Messages come from the log (pages) and from the bus (live); either may be late, lost or seen twice.
//! Invariant: messages leave [`DurableStream::next`] with strictly growing positions and none left out, because live messages are only
//! believed while the stream has everything before them, and whatever is doubtful is read from the log again.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use crate::live::LiveMessage;
use crate::service::{Delivery, Page, Position};

/// Messages that may wait for the receiver's window; past that they are read from the log when there is room.
const READY_MESSAGES_MAX: usize = 64;
/// Payload bytes of them.
const READY_BYTES_MAX: usize = 128 * 1024;

/// A message that is ready to be sent.
#[derive(Clone, Debug)]
pub(crate) enum Ready {
    Stored(Delivery),
    Live(Arc<LiveMessage>),
}

impl Ready {
    pub(crate) fn position(&self) -> Position {
        match self {
            Ready::Stored(delivery) => delivery.position,
            Ready::Live(message) => message.position,
        }
    }

    pub(crate) fn payload(&self) -> &Bytes {
        match self {
            Ready::Stored(delivery) => &delivery.payload,
            Ready::Live(message) => &message.payload,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Everything up to `queued` is known to be complete: the next live message follows it.
    Live,
    /// The log has to be read after `queued`.
    Behind,
    /// A read is under way. `again`: something was missed meanwhile. `stale`: what it brings may have changed meanwhile.
    Reading { again: bool, stale: bool },
}

#[derive(Debug)]
pub(crate) struct DurableStream {
    mode: Mode,
    /// Last position that was put into `ready`.
    queued: Position,
    /// Last position that was sent.
    sent: Position,
    ready: VecDeque<Ready>,
    ready_bytes: usize,
    /// Live messages that came while a read was under way.
    held: Vec<Arc<LiveMessage>>,
    /// Sent and not yet acknowledged in order, oldest first; `true` once acknowledged out of order.
    in_flight: VecDeque<(Position, bool)>,
    /// Everything up to here was acknowledged.
    acknowledged: Position,
    /// What [`DurableStream::take_advance`] gave last.
    reported: Position,
    /// Messages up to here were waiting when the subscription began.
    backlog_end: Position,
    /// In [`Mode::Live`]: no message up to here is still to come. In [`Mode::Reading`]: where the log ended when that began.
    complete: Position,
}

impl DurableStream {
    pub(crate) fn new(after: Position, backlog_end: Position) -> Self {
        Self {
            mode: Mode::Behind,
            queued: after,
            sent: after,
            ready: VecDeque::new(),
            ready_bytes: 0,
            held: Vec::new(),
            in_flight: VecDeque::new(),
            acknowledged: after,
            reported: after,
            backlog_end,
            complete: after,
        }
    }

    /// The position of what comes next, if it is here.
    pub(crate) fn front(&self) -> Option<Position> {
        self.ready.front().map(Ready::position)
    }

    /// With nothing ready: whether nothing up to this position is still to come. `bus_seen` is the last position that the bus has brought
    /// this session, on any topic: it brings them in their order. If it is not known, the log will be read.
    pub(crate) fn is_complete_to(&mut self, position: Position, bus_seen: Position) -> bool {
        match self.mode {
            Mode::Live if self.complete.max(bus_seen) >= position => true,
            Mode::Live => {
                self.mode = Mode::Behind;
                false
            }
            Mode::Behind | Mode::Reading { .. } => false,
        }
    }

    /// Everything up to here was acknowledged.
    pub(crate) fn acknowledged(&self) -> Position {
        self.acknowledged
    }

    /// Whether a message was waiting when the subscription began (RETAIN=1).
    pub(crate) fn is_backlog(&self, position: Position) -> bool {
        position <= self.backlog_end
    }

    /// The position to read after, if a read should begin now, while the log ends at `head`. The caller has room in the window.
    pub(crate) fn begin_read(&mut self, head: Position) -> Option<Position> {
        if self.mode != Mode::Behind || !self.ready.is_empty() {
            return None;
        }
        self.mode = Mode::Reading { again: false, stale: false };
        self.complete = head;
        Some(self.queued)
    }

    /// The page that a read brought.
    pub(crate) fn on_page(&mut self, page: Page) {
        let Mode::Reading { again, stale } = self.mode else { return };
        if stale {
            self.held.clear();
            self.mode = Mode::Behind;
            return;
        }
        for delivery in page.deliveries {
            if delivery.position > self.queued {
                self.push(Ready::Stored(delivery));
            }
        }
        if page.end && !again {
            self.mode = Mode::Live;
            self.complete = self.queued.max(self.complete);
        } else {
            self.mode = Mode::Behind;
        }
        for message in std::mem::take(&mut self.held) {
            self.on_live(message);
        }
    }

    /// The read failed: it will be tried again.
    pub(crate) fn on_read_failed(&mut self) {
        self.held.clear();
        self.mode = Mode::Behind;
    }

    /// A live message, in the order of the log but perhaps old, repeated, or after a gap that [`DurableStream::on_missed`] told.
    pub(crate) fn on_live(&mut self, message: Arc<LiveMessage>) {
        if message.changes_earlier() {
            self.read_again();
        }
        match self.mode {
            Mode::Live if message.position <= self.queued => {}
            Mode::Live if self.is_full() => self.mode = Mode::Behind,
            Mode::Live => self.push(Ready::Live(message)),
            // The next read will see it: it was committed before it was announced.
            Mode::Behind => {}
            Mode::Reading { .. } if self.held.len() < READY_MESSAGES_MAX => self.held.push(message),
            Mode::Reading { stale, .. } => self.mode = Mode::Reading { again: true, stale },
        }
    }

    /// Live messages may have been lost, perhaps one that changes earlier ones.
    pub(crate) fn on_missed(&mut self) {
        self.read_again();
    }

    /// What was not sent yet is read from the log, as it is now.
    fn read_again(&mut self) {
        self.ready = VecDeque::new();
        self.ready_bytes = 0;
        self.queued = self.sent;
        match &mut self.mode {
            Mode::Live => self.mode = Mode::Behind,
            Mode::Behind => {}
            Mode::Reading { stale, .. } => *stale = true,
        }
    }

    /// Takes what comes next; it counts as in flight until [`DurableStream::on_acknowledged`].
    pub(crate) fn next(&mut self) -> Option<Ready> {
        let ready = self.ready.pop_front()?;
        self.ready_bytes -= ready.payload().len();
        if self.ready.is_empty() {
            self.ready.shrink_to(0);
        }
        self.sent = ready.position();
        self.in_flight.push_back((ready.position(), false));
        Some(ready)
    }

    /// The receiver has this message. `true` if the cursor moved: everything before it was acknowledged too.
    pub(crate) fn on_acknowledged(&mut self, position: Position) -> bool {
        let Some(at) = self.in_flight.iter().position(|(sent, _)| *sent == position) else { return false };
        self.in_flight[at].1 = true;
        let before = self.acknowledged;
        while let Some((sent, true)) = self.in_flight.front().copied() {
            self.acknowledged = sent;
            self.in_flight.pop_front();
        }
        if self.in_flight.is_empty() {
            self.in_flight.shrink_to(0);
        }
        self.acknowledged > before
    }

    /// Where the cursor was and where it is, if it has moved since the last call.
    pub(crate) fn take_advance(&mut self) -> Option<(Position, Position)> {
        (self.acknowledged > self.reported)
            .then(|| (std::mem::replace(&mut self.reported, self.acknowledged), self.acknowledged))
    }

    fn is_full(&self) -> bool {
        self.ready.len() >= READY_MESSAGES_MAX || self.ready_bytes >= READY_BYTES_MAX
    }

    fn push(&mut self, ready: Ready) {
        debug_assert!(ready.position() > self.queued, "a stream never goes back");
        self.queued = ready.position();
        self.ready_bytes += ready.payload().len();
        self.ready.push_back(ready);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn live(position: u64) -> Arc<LiveMessage> {
        let payload = Bytes::from(position.to_string());
        Arc::new(LiveMessage::new("chat/bob/inbox".into(), Position(position), 0, payload, &[]))
    }

    fn page(positions: impl IntoIterator<Item = u64>, end: bool) -> Page {
        let deliveries = positions
            .into_iter()
            .map(|position| Delivery {
                position: Position(position),
                topic: None,
                payload: Bytes::from(position.to_string()),
                properties: Arc::new([]),
            })
            .collect();
        Page { deliveries, end }
    }

    fn drain(stream: &mut DurableStream) -> Vec<u64> {
        std::iter::from_fn(|| stream.next()).map(|ready| ready.position().0).collect()
    }

    #[test]
    fn backlog_comes_first_and_live_follows_at_the_seam() {
        let mut stream = DurableStream::new(Position(0), Position(2));
        assert_eq!(stream.begin_read(Position(0)), Some(Position(0)));
        // Position 3 is committed and announced while the page is on its way; whether the page has it or not must not matter.
        stream.on_live(live(3));
        stream.on_page(page([1, 2], true));
        stream.on_live(live(3));
        stream.on_live(live(4));
        assert_eq!(drain(&mut stream), [1, 2, 3, 4]);
        assert!(stream.is_backlog(Position(2)) && !stream.is_backlog(Position(3)));
    }

    #[test]
    fn a_gap_is_read_from_the_log() {
        let mut stream = DurableStream::new(Position(0), Position(0));
        stream.begin_read(Position(0));
        stream.on_page(page([], true));
        stream.on_live(live(1));
        stream.on_missed();
        stream.on_live(live(3));
        assert!(
            drain(&mut stream).is_empty(),
            "what was to be sent may have changed, and what follows a gap waits for the log"
        );
        assert_eq!(stream.begin_read(Position(0)), Some(Position(0)));
        stream.on_page(page([1, 2, 3], true));
        assert_eq!(drain(&mut stream), [1, 2, 3]);
    }

    #[test]
    fn what_waits_is_read_again_when_it_has_changed() {
        let change = |position| Arc::new((*live(position)).clone().changing_earlier());
        let mut stream = DurableStream::new(Position(0), Position(0));
        stream.begin_read(Position(0));
        stream.on_page(page([], true));
        (1..=3).for_each(|position| stream.on_live(live(position)));
        assert_eq!(stream.next().map(|ready| ready.position()), Some(Position(1)));
        stream.on_live(change(4));
        assert!(stream.next().is_none());
        assert_eq!(stream.begin_read(Position(4)), Some(Position(1)));
        // The page may have been made before the next change.
        stream.on_live(change(5));
        stream.on_page(page([2, 3, 4], true));
        assert!(stream.next().is_none());
        assert_eq!(stream.begin_read(Position(5)), Some(Position(1)));
        stream.on_page(page([2, 3, 4, 5], true));
        assert_eq!(drain(&mut stream), [2, 3, 4, 5]);
    }

    #[test]
    fn the_cursor_waits_for_the_oldest_in_flight() {
        let mut stream = DurableStream::new(Position(0), Position(0));
        stream.begin_read(Position(0));
        stream.on_page(page([1, 2, 3], true));
        drain(&mut stream);
        assert!(!stream.on_acknowledged(Position(2)));
        assert_eq!(stream.take_advance(), None);
        assert!(stream.on_acknowledged(Position(1)));
        assert_eq!(stream.take_advance(), Some((Position(0), Position(2))));
        assert_eq!(stream.take_advance(), None);
        assert!(!stream.on_acknowledged(Position(9)), "an acknowledgement of nothing changes nothing");
    }

    #[test]
    fn a_slow_receiver_holds_a_bounded_number_of_messages() {
        let mut stream = DurableStream::new(Position(0), Position(0));
        stream.begin_read(Position(0));
        stream.on_page(page([], true));
        for position in 1..10_000 {
            stream.on_live(live(position));
        }
        assert!(stream.ready.len() <= READY_MESSAGES_MAX && stream.held.is_empty());
        let first = drain(&mut stream);
        assert_eq!(first, (1..=first.len() as u64).collect::<Vec<_>>());
        assert_eq!(stream.begin_read(Position(0)), Some(Position(first.len() as u64)));
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// Commit a message and announce it; `lost`: on its way the announcement is dropped and a gap told.
        Commit {
            lost: bool,
            changes: bool,
        },
        /// The announcement that waits longest arrives.
        Arrive,
        BeginRead,
        /// The page that was asked for arrives, with at most so many messages.
        PageArrives(usize),
        Send(usize),
        Acknowledge(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => any::<(bool, bool)>().prop_map(|(lost, changes)| Step::Commit { lost, changes }),
            4 => Just(Step::Arrive),
            2 => Just(Step::BeginRead),
            2 => (1usize..6).prop_map(Step::PageArrives),
            3 => (1usize..8).prop_map(Step::Send),
            2 => (0usize..8).prop_map(Step::Acknowledge),
        ];
        prop::collection::vec(step, 1..200)
    }

    proptest! {
        #[test]
        fn every_message_once_and_in_order(steps in steps(), before in 0u64..20) {
            // Positions 1..=log are committed; announcements are queued in order, as (position or gap).
            let mut log = before;
            let mut wire: VecDeque<Option<(u64, bool)>> = VecDeque::new();
            let mut stream = DurableStream::new(Position(0), Position(before));
            let mut read: Option<(u64, u64)> = None;
            let mut sent: Vec<u64> = Vec::new();
            let mut unacknowledged: Vec<u64> = Vec::new();
            let finish = [Step::Arrive, Step::BeginRead, Step::PageArrives(1_000), Step::Send(1_000)];
            let endless = std::iter::repeat_n(finish, 300).flatten();
            for step in steps.into_iter().chain(endless) {
                match step {
                    Step::Commit { lost, changes } => {
                        log += 1;
                        wire.push_back(if lost { None } else { Some((log, changes)) });
                    }
                    Step::Arrive => match wire.pop_front() {
                        Some(Some((position, false))) => stream.on_live(live(position)),
                        Some(Some((position, true))) => {
                            stream.on_live(Arc::new((*live(position)).clone().changing_earlier()));
                        }
                        Some(None) => stream.on_missed(),
                        None => {}
                    },
                    Step::BeginRead => {
                        if let Some(after) = stream.begin_read(Position(log)) {
                            // The read sees what was committed when it began.
                            read = Some((after.0, log));
                        }
                    }
                    Step::PageArrives(most) => {
                        if let Some((after, seen)) = read.take() {
                            let last = seen.min(after + most as u64);
                            stream.on_page(page(after + 1..=last, last == seen));
                        }
                    }
                    Step::Send(most) => {
                        for _ in 0..most {
                            let Some(ready) = stream.next() else { break };
                            sent.push(ready.position().0);
                            unacknowledged.push(ready.position().0);
                        }
                    }
                    Step::Acknowledge(index) => {
                        if index < unacknowledged.len() {
                            stream.on_acknowledged(Position(unacknowledged.remove(index)));
                            let oldest = unacknowledged.first().copied().unwrap_or(sent.len() as u64 + 1);
                            prop_assert_eq!(stream.acknowledged().0, oldest - 1);
                        }
                    }
                }
            }
            prop_assert_eq!(sent, (1..=log).collect::<Vec<_>>());
        }
    }
}
