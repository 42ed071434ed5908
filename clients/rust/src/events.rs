//! Events between the client's task and the program.
//!
//! Bounded: of live events the latest are dropped when [`LIVE_EVENTS_MAX`] wait, and counted. Messages are bounded by the receive
//! maximum and never dropped.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::event::{ConnectionState, Event};

/// Receipts, read, typing and presence that wait for the program.
const LIVE_EVENTS_MAX: usize = 8_192;

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Event>,
    missed: u64,
    /// A connection that did not resume the session was told and not heard of.
    is_place_lost: bool,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Notify,
    ended: AtomicBool,
}

/// What happens, in order. If it is dropped, messages wait on the server until the next run.
#[derive(Debug)]
pub struct Events {
    shared: Arc<Shared>,
}

impl Events {
    /// Waits for the next; `None` once the client is closed and everything was taken. Cancelling it loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            let ended = self.shared.ended.load(Ordering::Acquire);
            if let Some(event) = self.try_next() {
                return Some(event);
            }
            if ended {
                return None;
            }
            // One who is told before this waits is remembered.
            self.shared.changed.notified().await;
        }
    }

    /// The next, if there is one already.
    pub fn try_next(&mut self) -> Option<Event> {
        let mut waiting = self.shared.waiting.lock();
        if waiting.missed > 0 && waiting.events.is_empty() {
            return Some(Event::Missed(std::mem::take(&mut waiting.missed)));
        }
        waiting.events.pop_front()
    }
}

/// The other end.
#[derive(Debug)]
pub(crate) struct Teller {
    shared: Arc<Shared>,
}

impl Teller {
    pub(crate) fn tell(&self, mut event: Event) {
        let mut waiting = self.shared.waiting.lock();
        let is_live = matches!(event, Event::Receipt(_) | Event::Read(_) | Event::Typing(_) | Event::Presence(_));
        if is_live && waiting.events.len() >= LIVE_EVENTS_MAX {
            waiting.missed += 1;
            return;
        }
        if let Event::Connection(state) = &mut event {
            if let Some(Event::Connection(before)) = waiting.events.back() {
                // How it stands is what counts: a program that does not look is not told of every attempt.
                waiting.is_place_lost |= matches!(before, ConnectionState::Connected { resumed: false });
                waiting.events.pop_back();
            }
            if let ConnectionState::Connected { resumed } = state {
                *resumed &= !std::mem::take(&mut waiting.is_place_lost);
            }
        }
        waiting.events.push_back(event);
        drop(waiting);
        self.shared.changed.notify_one();
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        self.shared.changed.notify_one();
    }
}

pub(crate) fn events() -> (Teller, Events) {
    let shared = Arc::new(Shared::default());
    (Teller { shared: Arc::clone(&shared) }, Events { shared })
}

#[cfg(test)]
mod tests {
    use chat_protocol::UserId;
    use chat_protocol::event::{TypingEvent, TypingState};

    use super::*;

    fn typing() -> Event {
        Event::Typing(TypingEvent { from: UserId::parse("bob").unwrap(), state: TypingState::On })
    }

    #[tokio::test]
    async fn in_order_until_the_end() {
        let (teller, mut events) = events();
        teller.tell(typing());
        teller.tell(Event::Connection(ConnectionState::Connected { resumed: true }));
        let waits = tokio::spawn(async move {
            let mut kinds = Vec::new();
            while let Some(event) = events.next().await {
                kinds.push(matches!(event, Event::Typing(_)));
            }
            kinds
        });
        tokio::task::yield_now().await;
        teller.tell(typing());
        drop(teller);
        assert_eq!(waits.await.unwrap(), [true, false, true]);
    }

    #[test]
    fn how_the_connection_stands_is_told_once() {
        let (teller, mut events) = events();
        let connected = |resumed| Event::Connection(ConnectionState::Connected { resumed });
        let lost = || {
            let (reason, retry_in) = ("it broke".to_owned(), std::time::Duration::ZERO);
            Event::Connection(ConnectionState::Lost { reason, retry_in })
        };
        let mut next = |told: [Event; 3]| {
            told.into_iter().for_each(|event| teller.tell(event));
            let Some(Event::Connection(state)) = events.try_next() else { panic!("a connection") };
            assert!(events.try_next().is_none());
            state
        };
        assert_eq!(next([connected(true), lost(), connected(true)]), ConnectionState::Connected { resumed: true });
        let anew = next([connected(false), lost(), connected(true)]);
        assert_eq!(anew, ConnectionState::Connected { resumed: false }, "the place was lost meanwhile");
        assert_eq!(next([lost(), lost(), connected(true)]), ConnectionState::Connected { resumed: true });
    }

    #[tokio::test]
    async fn what_is_missed_is_counted() {
        let (teller, mut events) = events();
        for _ in 0..LIVE_EVENTS_MAX + 3 {
            teller.tell(typing());
        }
        teller.tell(Event::Connection(ConnectionState::Connected { resumed: true }));
        for _ in 0..LIVE_EVENTS_MAX {
            assert!(matches!(events.next().await, Some(Event::Typing(_))));
        }
        assert!(matches!(events.next().await, Some(Event::Connection(_))));
        assert!(matches!(events.next().await, Some(Event::Missed(3))));
        assert!(events.try_next().is_none());
    }
}
