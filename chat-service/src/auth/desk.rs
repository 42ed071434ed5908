//! Where logins wait for work that costs the processor: so many are worked on at a time, so many wait, and of those so many of one guest.
//!
//! Whoever finds no place is told to come again. So no number of guesses takes more of the machine than is set aside for them, and nobody can
//! fill all the places alone: not from one address, and not under many names from an address that many share. A quarter of the places is kept for
//! those who have not failed before, of each address few, and those there take turns with all others: however many guess, they do not wait long.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::guesses::Guesser;

/// How much there is to share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Worked on at a time.
    pub(super) at_a_time: usize,
    /// Worked on and waiting.
    pub(super) places: usize,
}

/// Of the places a quarter is kept for those who have not failed.
const KEPT: usize = 4;

/// How much of a part may be had: one in so many.
#[derive(Clone, Copy, Debug)]
struct Shares {
    of_one: usize,
    /// By all guests of a shared address together.
    of_shared: usize,
}

const OPEN_SHARES: Shares = Shares { of_one: 4, of_shared: 2 };
/// Whoever has not failed yet may still be about to: nobody has much of it.
const KEPT_SHARES: Shares = Shares { of_one: 16, of_shared: 4 };

/// Who wants a place.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    pub(super) who: Guesser,
    /// Their address, if many share it.
    pub(super) shared: Option<Guesser>,
    /// Whether they have failed before.
    pub(super) standing: Standing,
}

/// What is known of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Good,
    Suspect,
}

/// Where they wait, in each part in the order in which they came.
#[derive(Debug)]
pub(super) struct Desk {
    workers: Arc<Workers>,
    /// For everybody.
    open: Arc<Part>,
    /// For those who have not failed.
    kept: Arc<Part>,
}

/// Those who work, and those who wait for them.
#[derive(Debug)]
struct Workers(Mutex<Waiting>);

#[derive(Debug)]
struct Waiting {
    free: usize,
    open: VecDeque<oneshot::Sender<Permit>>,
    kept: VecDeque<oneshot::Sender<Permit>>,
    /// Whose turn it is next, if both wait.
    next: Lane,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Open,
    Kept,
}

/// That one is worked for, until it is dropped.
#[derive(Debug)]
struct Permit(Arc<Workers>);

impl Drop for Permit {
    fn drop(&mut self) {
        let next = self.0.0.lock().give_back();
        if let Some(waiting) = next {
            // Whoever has given up drops it, and so gives it to the next.
            drop(waiting.send(Self(Arc::clone(&self.0))));
        }
    }
}

impl Waiting {
    /// Who has it next; `None` if nobody waits.
    fn give_back(&mut self) -> Option<oneshot::Sender<Permit>> {
        let (first, other) = match self.next {
            Lane::Open => (&mut self.open, &mut self.kept),
            Lane::Kept => (&mut self.kept, &mut self.open),
        };
        let next = first.pop_front().or_else(|| other.pop_front());
        self.next = if self.next == Lane::Open { Lane::Kept } else { Lane::Open };
        if next.is_none() {
            self.free += 1;
        }
        next
    }
}

impl Workers {
    async fn permit(self: &Arc<Self>, lane: Lane) -> Option<Permit> {
        let given = {
            let mut waiting = self.0.lock();
            if waiting.free > 0 {
                waiting.free -= 1;
                return Some(Permit(Arc::clone(self)));
            }
            let (give, given) = oneshot::channel();
            let lane = match lane {
                Lane::Open => &mut waiting.open,
                Lane::Kept => &mut waiting.kept,
            };
            // Whoever has given up has no place any more either: no more wait than there are places.
            lane.retain(|other| !other.is_closed());
            lane.push_back(give);
            given
        };
        given.await.ok()
    }
}

/// Some of the places.
#[derive(Debug)]
struct Part {
    places: usize,
    shares: Shares,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    of: FxHashMap<Guesser, usize>,
}

/// A place, until it is dropped.
#[derive(Debug)]
struct Place {
    part: Arc<Part>,
    /// The guest, and the address that they share.
    holders: Vec<Guesser>,
}

impl Part {
    fn new(places: usize, shares: Shares) -> Arc<Self> {
        Arc::new(Self { places, shares, taken: Mutex::default() })
    }

    fn place(self: &Arc<Self>, guest: &Guest) -> Option<Place> {
        let mut taken = self.taken.lock();
        let of = |who: &Guesser| taken.of.get(who).copied().unwrap_or_default();
        let has_room = |who: &Guesser, share: usize| of(who) < self.places.div_ceil(share);
        if taken.all >= self.places
            || !has_room(&guest.who, self.shares.of_one)
            || !guest.shared.as_ref().is_none_or(|address| has_room(address, self.shares.of_shared))
        {
            return None;
        }
        taken.all += 1;
        let holders: Vec<Guesser> = std::iter::once(&guest.who).chain(&guest.shared).cloned().collect();
        for holder in &holders {
            *taken.of.entry(holder.clone()).or_default() += 1;
        }
        Some(Place { part: Arc::clone(self), holders })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.part.taken.lock();
        taken.all -= 1;
        for holder in &self.holders {
            if let Some(count) = taken.of.get_mut(holder) {
                *count -= 1;
                if *count == 0 {
                    taken.of.remove(holder);
                }
            }
        }
    }
}

/// One's turn, until it is dropped. It goes with the work, not with whoever waits for its end: who hangs up has not made room.
#[derive(Debug)]
pub(super) struct Turn {
    _place: Place,
    _permit: Permit,
}

impl Desk {
    pub(super) fn new(room: Room) -> Self {
        let kept = room.places / KEPT;
        let waiting = Waiting { free: room.at_a_time, open: VecDeque::new(), kept: VecDeque::new(), next: Lane::Kept };
        Self {
            workers: Arc::new(Workers(Mutex::new(waiting))),
            open: Part::new(room.places - kept, OPEN_SHARES),
            kept: Part::new(kept, KEPT_SHARES),
        }
    }

    fn place(&self, guest: &Guest) -> Option<(Place, Lane)> {
        let kept = if guest.standing == Standing::Good { self.kept.place(guest) } else { None };
        let kept = kept.map(|place| (place, Lane::Kept));
        kept.or_else(|| Some((self.open.place(guest)?, Lane::Open)))
    }

    /// Waits for one's turn; `None` if there is no place to wait.
    pub(super) async fn turn(&self, guest: &Guest) -> Option<Turn> {
        let (place, lane) = self.place(guest)?;
        let permit = self.workers.permit(lane).await?;
        Some(Turn { _place: place, _permit: permit })
    }
}

/// Where those take turns who have failed too often from an address that many share: of each name one at a time.
#[derive(Debug, Default)]
pub(super) struct Turnstile(Arc<Mutex<FxHashMap<Guesser, Queue>>>);

#[derive(Debug)]
struct Queue {
    /// With the one whose turn it is.
    length: usize,
    turn: Arc<Semaphore>,
}

/// A place in such a queue, until it is dropped.
#[derive(Debug)]
struct Queued {
    queues: Arc<Mutex<FxHashMap<Guesser, Queue>>>,
    who: Guesser,
}

impl Drop for Queued {
    fn drop(&mut self) {
        let mut queues = self.queues.lock();
        if let Some(queue) = queues.get_mut(&self.who) {
            queue.length -= 1;
            if queue.length == 0 {
                queues.remove(&self.who);
            }
        }
    }
}

/// One's turn to try, until it is dropped.
#[derive(Debug)]
pub(super) struct Try {
    _queued: Queued,
    _permit: OwnedSemaphorePermit,
}

impl Turnstile {
    /// Waits until it is their turn, `None` if `length_max` are there already.
    pub(super) async fn turn(&self, who: Guesser, length_max: usize) -> Option<Try> {
        let (queued, turn) = {
            let mut queues = self.0.lock();
            let new = || Queue { length: 0, turn: Arc::new(Semaphore::new(1)) };
            let queue = queues.entry(who.clone()).or_insert_with(new);
            if queue.length >= length_max {
                return None;
            }
            queue.length += 1;
            (Queued { queues: Arc::clone(&self.0), who }, Arc::clone(&queue.turn))
        };
        let permit = turn.acquire_owned().await.ok()?;
        Some(Try { _queued: queued, _permit: permit })
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::net::{IpAddr, Ipv4Addr};
    use std::pin::Pin;
    use std::task::Poll;

    use super::*;

    fn address(nth: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, nth))
    }

    fn guest(nth: u8) -> Guest {
        Guest { who: Guesser::of_address(address(nth)), shared: None, standing: Standing::Good }
    }

    fn suspect(nth: u8) -> Guest {
        Guest { standing: Standing::Suspect, ..guest(nth) }
    }

    /// One of many behind a proxy.
    fn proxied(name: &str) -> Guest {
        let proxy = address(0);
        let shared = Some(Guesser::of_address(proxy));
        Guest { who: Guesser::of_user(proxy, &name.into()), shared, standing: Standing::Good }
    }

    /// Polled once.
    async fn waits<T>(turn: &mut (impl Future<Output = Option<T>> + Unpin)) -> bool {
        poll_fn(|context| Poll::Ready(Pin::new(&mut *turn).poll(context).is_pending())).await
    }

    fn assert_nothing_is_left(desk: &Desk) {
        for part in [&desk.open, &desk.kept] {
            let taken = part.taken.lock();
            assert_eq!((taken.all, taken.of.len()), (0, 0), "nothing is left");
        }
    }

    #[tokio::test]
    async fn who_came_first_is_next_and_who_gives_up_makes_room() {
        let desk = Desk::new(Room { at_a_time: 1, places: 64 });
        let guests = [1, 2, 3, 4].map(suspect);
        let first = desk.turn(&guests[0]).await.unwrap();
        let mut second = Box::pin(desk.turn(&guests[1]));
        let mut third = Box::pin(desk.turn(&guests[2]));
        let mut fourth = Box::pin(desk.turn(&guests[3]));
        assert!(waits(&mut second).await && waits(&mut third).await && waits(&mut fourth).await);
        drop(second);
        drop(first);
        assert!(waits(&mut fourth).await);
        let third = third.await.expect("it is next");
        drop(third);
        drop(fourth.await);
        assert_nothing_is_left(&desk);
        // Nobody is worked for: the next one does not wait.
        assert!(desk.turn(&guests[0]).await.is_some());
    }

    #[test]
    fn one_guest_has_a_quarter_of_the_places() {
        let desk = Desk::new(Room { at_a_time: 1, places: 64 });
        let mut places: Vec<_> = (0..13).map(|_| desk.place(&guest(1)).expect("a place")).collect();
        assert!(desk.place(&guest(1)).is_none());
        assert!(desk.place(&guest(2)).is_some(), "others still find a place");
        places.clear();
        assert_nothing_is_left(&desk);
    }

    /// However many addresses guess: who has not failed finds a place.
    #[test]
    fn some_places_are_kept_for_those_who_have_not_failed() {
        let desk = Desk::new(Room { at_a_time: 1, places: 64 });
        // The first time nobody has.
        let mut places: Vec<_> =
            (1..=8).flat_map(|nth| std::iter::repeat_n(nth, 64)).filter_map(|nth| desk.place(&guest(nth))).collect();
        assert_eq!(places.len(), 48 + 8);
        places.push(desk.place(&guest(200)).expect("a place that is kept"));
        places.clear();
        places.extend((1..=100).filter_map(|nth| desk.place(&suspect(nth))));
        assert_eq!(places.len(), 48);
        places.push(desk.place(&guest(200)).expect("a place that is kept"));
        assert!(desk.place(&suspect(201)).is_none());
        places.clear();
        assert_nothing_is_left(&desk);
    }

    /// Names cost nothing to make up.
    #[test]
    fn a_shared_address_has_less_than_half_of_the_places_under_whatever_names() {
        let desk = Desk::new(Room { at_a_time: 1, places: 64 });
        let mut places: Vec<_> = (0..100).filter_map(|nth| desk.place(&proxied(&format!("name-{nth}")))).collect();
        assert_eq!(places.len(), 4 + 24);
        // And with others who guess beside it.
        places.extend((1..=100).filter_map(|nth| desk.place(&suspect(nth))));
        assert_eq!(places.len(), 4 + 48);
        places.push(desk.place(&guest(200)).expect("a place that is kept"));
        places.clear();
        assert_nothing_is_left(&desk);
    }

    /// Whoever has not failed waits for one of the others at most, and those are not forgotten for them.
    #[tokio::test]
    async fn those_who_have_not_failed_take_turns_with_the_others() {
        let desk = Desk::new(Room { at_a_time: 1, places: 64 });
        let (suspects, good) = ([1, 2, 3].map(suspect), [11, 12].map(guest));
        let first = desk.turn(&suspects[0]).await.unwrap();
        let mut others = [Box::pin(desk.turn(&suspects[1])), Box::pin(desk.turn(&suspects[2]))];
        let mut kept = [Box::pin(desk.turn(&good[0])), Box::pin(desk.turn(&good[1]))];
        for waiting in others.iter_mut().chain(&mut kept) {
            assert!(waits(waiting).await);
        }
        drop(first);
        let [other, last] = others;
        let [next, after] = kept;
        let mut expected = [next, other, after, last].into_iter();
        while let Some(turn) = expected.next() {
            let turn = turn.await.expect("it is next");
            for later in expected.as_mut_slice() {
                assert!(waits(later).await);
            }
            drop(turn);
        }
        assert_nothing_is_left(&desk);
    }

    #[tokio::test]
    async fn never_are_more_worked_on_than_may_be() {
        let desk = Desk::new(Room { at_a_time: 2, places: 100 });
        let (one, two) = (desk.turn(&guest(1)).await.unwrap(), desk.turn(&guest(2)).await.unwrap());
        let three = guest(3);
        let mut next = Box::pin(desk.turn(&three));
        assert!(waits(&mut next).await);
        drop(one);
        assert!(next.await.is_some());
        drop(two);
    }

    #[tokio::test]
    async fn of_one_name_one_at_a_time_tries() {
        let turnstile = Turnstile::default();
        let turn = |name: &str| Box::pin(turnstile.turn(proxied(name).who, 3));
        let first = turn("bob").await.unwrap();
        let (mut second, mut third) = (turn("bob"), turn("bob"));
        assert!(waits(&mut second).await && waits(&mut third).await);
        assert!(turn("bob").await.is_none(), "too many wait");
        assert!(turn("alice").await.is_some(), "others do not");
        drop(first);
        assert!(waits(&mut third).await);
        drop(second.await.expect("it is next"));
        drop(third);
        assert!(turnstile.0.lock().is_empty(), "nothing is left");
    }
}
