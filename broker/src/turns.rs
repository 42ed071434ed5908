//! Turns: what many clients want at the same moment is done for a few at a time, so that those who are there already are served between.
//!
//! Whatever is ready waits in one queue for a processor. When thousands connect at once, each with some work, everybody else would stand behind
//! all of them. So those who come and go wait here instead, in their order, and only a few of them stand in that queue; the next few are let in
//! when everything else that was ready has been done, or a few dozen other things. A turn is held while work is done and never while it waits:
//! whoever waits for a slow login, or for a slow client, holds up nobody.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// Turns at a time: some tenths of a millisecond's work for a processor.
const TURNS: usize = 8;

/// Hands out turns, first come, first served; clones are the same.
#[derive(Clone, Debug)]
pub struct Turns {
    desk: Arc<Desk>,
}

#[derive(Debug)]
struct Desk {
    free: Arc<Semaphore>,
    /// Turns that are over and not free yet.
    over: AtomicUsize,
}

impl Desk {
    fn free(&self) {
        self.free.add_permits(self.over.swap(0, Ordering::AcqRel));
    }
}

type Waiting = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// Somebody's turn: not asked for, waited for, or there.
#[derive(Default)]
pub(crate) enum Turn {
    #[default]
    None,
    Waiting(Waiting),
    Held {
        /// Whose turns it is one of, for when it is over.
        _held: Held,
    },
}

#[derive(Debug)]
pub(crate) struct Held(Arc<Desk>);

impl Held {
    fn new(desk: &Arc<Desk>, permit: OwnedSemaphorePermit) -> Self {
        permit.forget();
        Self(Arc::clone(desk))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.0.over.fetch_add(1, Ordering::AcqRel) > 0 {
            // Whoever was first frees this one, too.
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            self.0.free();
            return;
        };
        let desk = Arc::clone(&self.0);
        drop(runtime.spawn(async move {
            // Goes on when the thread has nothing else to do, or has done a few dozen other things and looked what the sockets have.
            tokio::task::yield_now().await;
            desk.free();
        }));
    }
}

impl Turn {
    /// Ready when it is there.
    pub(crate) fn poll(&mut self, turns: &Turns, cx: &mut Context<'_>) -> Poll<()> {
        let desk = &turns.desk;
        loop {
            let permit = match self {
                Self::Held { .. } => return Poll::Ready(()),
                Self::Waiting(waiting) => ready!(waiting.as_mut().poll(cx)).expect("nobody closes it"),
                Self::None => match Arc::clone(&desk.free).try_acquire_owned() {
                    Ok(permit) => permit,
                    Err(_) => {
                        *self = Self::Waiting(Box::pin(Arc::clone(&desk.free).acquire_owned()));
                        continue;
                    }
                },
            };
            *self = Self::Held { _held: Held::new(desk, permit) };
        }
    }
}

impl Default for Turns {
    fn default() -> Self {
        Self { desk: Arc::new(Desk { free: Arc::new(Semaphore::new(TURNS)), over: AtomicUsize::new(0) }) }
    }
}

impl Turns {
    /// Does this work in turns: each time that it can go on, it waits for one.
    pub async fn take<F: Future>(&self, work: F) -> F::Output {
        self.clone().work(Turn::None, work).await.0
    }

    /// The same for work that begins in `turn`; the last one is given back, for what comes next.
    pub(crate) async fn work<F: Future>(self, mut turn: Turn, work: F) -> (F::Output, Turn) {
        let mut work = pin!(work);
        let done = std::future::poll_fn(|cx| {
            ready!(turn.poll(&self, cx));
            let polled = work.as_mut().poll(cx);
            if polled.is_pending() {
                turn = Turn::None;
            }
            polled
        })
        .await;
        (done, turn)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use tokio::sync::{Notify, mpsc, oneshot};
    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);
    /// More than a thread's own queue has places for.
    const CROWD: usize = 3_000;

    /// Two who were there before hand something to and fro while a crowd comes: what of the crowd's work was done between, at most.
    async fn most_between(turns: Turns, in_turns: bool) -> usize {
        let done = Arc::new(AtomicUsize::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let (there, back) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let echo = tokio::spawn({
            let (there, back) = (Arc::clone(&there), Arc::clone(&back));
            async move {
                loop {
                    there.notified().await;
                    back.notify_one();
                }
            }
        });
        let most = tokio::spawn({
            let (done, over) = (Arc::clone(&done), Arc::clone(&over));
            async move {
                let mut most = 0;
                while !over.load(Ordering::Acquire) {
                    let before = done.load(Ordering::Acquire);
                    there.notify_one();
                    back.notified().await;
                    most = most.max(done.load(Ordering::Acquire) - before);
                }
                most
            }
        });
        let crowd: Vec<_> = (0..CROWD)
            .map(|_| {
                let (turns, done) = (turns.clone(), Arc::clone(&done));
                let work = async move {
                    for _ in 0..3 {
                        done.fetch_add(1, Ordering::AcqRel);
                        // Something that is there at once, when it is asked for again.
                        let mut asked = false;
                        std::future::poll_fn(|cx| {
                            cx.waker().wake_by_ref();
                            if std::mem::replace(&mut asked, true) { Poll::Ready(()) } else { Poll::Pending }
                        })
                        .await;
                    }
                };
                tokio::spawn(async move {
                    if in_turns {
                        turns.take(work).await;
                    } else {
                        work.await;
                    }
                })
            })
            .collect();
        for one in crowd {
            timeout(PATIENCE, one).await.expect("everybody gets a turn").unwrap();
        }
        assert_eq!(done.load(Ordering::Acquire), CROWD * 3);
        over.store(true, Ordering::Release);
        let most = timeout(PATIENCE, most).await.expect("it is served").unwrap();
        echo.abort();
        most
    }

    #[tokio::test]
    async fn those_who_are_there_are_served_between() {
        let alone = most_between(Turns::default(), false).await;
        assert!(alone >= CROWD, "without turns they wait for the whole crowd, or this test shows nothing: {alone}");
        let most = most_between(Turns::default(), true).await;
        assert!(most <= 4 * TURNS, "{most} of the crowd's works before they were served");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn everybody_gets_a_turn_with_several_threads() {
        most_between(Turns::default(), true).await;
    }

    #[tokio::test]
    async fn whoever_waits_has_no_turn() {
        let turns = Turns::default();
        let (mut tell, mut slow) = (Vec::new(), Vec::new());
        for _ in 0..TURNS * 2 {
            let (told, waits) = oneshot::channel::<()>();
            tell.push(told);
            let turns = turns.clone();
            slow.push(tokio::spawn(async move { turns.take(waits).await }));
        }
        for nth in 0..TURNS * 2 {
            let quick = timeout(PATIENCE, turns.take(async { nth })).await;
            assert_eq!(quick.expect("those who wait hold nobody up"), nth);
        }
        tell.into_iter().for_each(|told| told.send(()).expect("it still waits"));
        for one in slow {
            timeout(PATIENCE, one).await.expect("it goes on").unwrap().expect("it was told");
        }
    }

    #[tokio::test]
    async fn first_come_first_served_and_whoever_leaves_takes_no_turn_along() {
        let turns = Turns::default();
        let (said, mut order) = mpsc::channel(TURNS * 4);
        let mut held = Vec::new();
        for _ in 0..TURNS {
            held.push(turns.clone().work(Turn::None, async {}).await.1);
        }
        let mut waiting = Vec::new();
        for nth in 0..TURNS * 3 {
            let (turns, said) = (turns.clone(), said.clone());
            waiting.push(tokio::spawn(async move { turns.take(said.send(nth)).await }));
            // So that they ask in this order.
            tokio::task::yield_now().await;
        }
        assert!(order.try_recv().is_err(), "there is no turn for anybody");
        waiting[0].abort();
        drop(held);
        for nth in 1..TURNS * 3 {
            assert_eq!(timeout(PATIENCE, order.recv()).await.expect("one is served"), Some(nth));
        }
    }
}
