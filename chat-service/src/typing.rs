//! Typing: told live, never stored, over by itself.
//!
//! A peer hears `on` at most once in a while for each writer, and `off` when the writer says so, sends, or was silent for long enough. To somebody
//! who blocked the writer nothing is told.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use broker::Announcer;
use broker::live::LiveMessage;
use chat_protocol::UserId;
use chat_protocol::event::{TypingEvent, TypingState, encode_event};
use chat_protocol::topic::Down;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::time::Instant;

use crate::log::Log;
use crate::views::Views;

/// Without a further `on` it is over.
const LASTS: Duration = Duration::from_secs(6);
/// From one `on` that is told to the next.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often it is looked whether somebody's is over.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Who types to whom at a time; of more nothing is told.
const TYPING_MAX: usize = 100_000;

#[derive(Clone, Copy, Debug)]
struct Typing {
    said_at: Instant,
    told_at: Instant,
}

/// Who types to whom.
pub struct TypingRelay<L> {
    views: Views<L>,
    announcer: Announcer,
    typing: Mutex<FxHashMap<(UserId, UserId), Typing>>,
}

impl<L: Log> TypingRelay<L> {
    pub fn new(log: Arc<L>, announcer: Announcer) -> Self {
        Self { views: Views::new(log), announcer, typing: Mutex::default() }
    }

    /// A user says that they type to a peer, or no longer.
    pub fn say(self: &Arc<Self>, from: UserId, to: UserId, state: TypingState) {
        if !self.announcer.has_subscribers(&Down::Typing.topic(&to)) {
            return;
        }
        let now = Instant::now();
        let mut typing = self.typing.lock();
        let pair = (from, to);
        let has_room = typing.len() < TYPING_MAX;
        let tells = match (state, typing.get_mut(&pair)) {
            (TypingState::On, Some(before)) => {
                before.said_at = now;
                let due = now >= before.told_at + INTERVAL;
                if due {
                    before.told_at = now;
                }
                due
            }
            (TypingState::On, None) if has_room => {
                typing.insert(pair.clone(), Typing { said_at: now, told_at: now });
                true
            }
            (TypingState::On, None) => false,
            (TypingState::Off, _) => typing.remove(&pair).is_some(),
        };
        drop(typing);
        if tells {
            let relay = Arc::clone(self);
            tokio::spawn(async move { relay.tell(pair.0, pair.1, state).await });
        }
    }

    async fn tell(&self, from: UserId, to: UserId, state: TypingState) {
        match self.views.blocks(&to, &from).await {
            Ok(false) => {
                let event = encode_event(&TypingEvent { from, state });
                let message = LiveMessage::event(Down::Typing.topic(&to).into(), event).at_most_once();
                self.announcer.announce(vec![message]);
            }
            Ok(true) => {}
            Err(error) => tracing::error!(%error, "typing could not be told"),
        }
    }

    /// Ends what nobody renews, until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: impl Future<Output = ()>) {
        let looking = async {
            let mut interval = tokio::time::interval(LOOK_INTERVAL);
            loop {
                interval.tick().await;
                let now = Instant::now();
                let over: Vec<(UserId, UserId)> = self
                    .typing
                    .lock()
                    .extract_if(|_, typing| now >= typing.said_at + LASTS)
                    .map(|(pair, _)| pair)
                    .collect();
                for (from, to) in over {
                    self.tell(from, to, TypingState::Off).await;
                }
            }
        };
        tokio::select! {
            () = shutdown => {}
            () = looking => {}
        }
    }
}
