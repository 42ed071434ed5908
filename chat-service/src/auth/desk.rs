//! Where logins wait for work that costs the processor: so many are worked on at a time, so many wait, and of those so many of one guest.
//!
//! Whoever finds no place is told to come again. So no number of guesses takes more of the machine than is set aside for them, and nobody can
//! fill all the places alone.

use std::sync::Arc;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::guesses::Guesser;

/// How much there is to share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Worked on at a time.
    pub(super) at_a_time: usize,
    /// Worked on and waiting.
    pub(super) places: usize,
    /// Of those, of one guest.
    pub(super) places_of_one: usize,
}

/// Where they wait, in the order in which they came.
#[derive(Debug)]
pub(super) struct Desk {
    room: Room,
    working: Arc<Semaphore>,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    of: FxHashMap<Guesser, usize>,
}

/// A place, until it is dropped.
#[derive(Debug)]
struct Place {
    taken: Arc<Mutex<Taken>>,
    guest: Guesser,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
        taken.all -= 1;
        if let Some(count) = taken.of.get_mut(&self.guest) {
            *count -= 1;
            if *count == 0 {
                taken.of.remove(&self.guest);
            }
        }
    }
}

/// One's turn, until it is dropped. It goes with the work, not with whoever waits for its end: who hangs up has not made room.
#[derive(Debug)]
pub(super) struct Turn {
    _place: Place,
    _permit: OwnedSemaphorePermit,
}

impl Desk {
    pub(super) fn new(room: Room) -> Self {
        Self { room, working: Arc::new(Semaphore::new(room.at_a_time)), taken: Arc::default() }
    }

    fn place(&self, guest: Guesser) -> Option<Place> {
        let mut taken = self.taken.lock();
        let of_guest = taken.of.get(&guest).copied().unwrap_or_default();
        if taken.all >= self.room.places || of_guest >= self.room.places_of_one {
            return None;
        }
        taken.all += 1;
        taken.of.insert(guest.clone(), of_guest + 1);
        Some(Place { taken: Arc::clone(&self.taken), guest })
    }

    /// Waits for one's turn; `None` if there is no place to wait.
    pub(super) async fn turn(&self, guest: Guesser) -> Option<Turn> {
        let place = self.place(guest)?;
        let permit = Arc::clone(&self.working).acquire_owned().await.ok()?;
        Some(Turn { _place: place, _permit: permit })
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::net::{IpAddr, Ipv4Addr};
    use std::pin::Pin;
    use std::task::Poll;

    use super::*;

    fn guest(nth: u8) -> Guesser {
        Guesser::of_address(IpAddr::V4(Ipv4Addr::new(192, 0, 2, nth)))
    }

    /// Polled once.
    async fn waits(turn: &mut (impl Future<Output = Option<Turn>> + Unpin)) -> bool {
        poll_fn(|context| Poll::Ready(Pin::new(&mut *turn).poll(context).is_pending())).await
    }

    #[tokio::test]
    async fn one_guest_cannot_take_all_places() {
        let desk = Desk::new(Room { at_a_time: 1, places: 6, places_of_one: 3 });
        let first = desk.turn(guest(1)).await.unwrap();
        let mut second = Box::pin(desk.turn(guest(1)));
        let mut third = Box::pin(desk.turn(guest(1)));
        assert!(waits(&mut second).await && waits(&mut third).await);
        assert!(desk.turn(guest(1)).await.is_none(), "a fourth of the same guest");
        let mut others: Vec<_> = [2, 3, 4].map(|nth| Box::pin(desk.turn(guest(nth)))).into();
        for other in &mut others {
            assert!(waits(other).await, "others still find a place");
        }
        assert!(desk.turn(guest(5)).await.is_none(), "now it is full");
        // Who gives up makes room, and who came first is next.
        drop((second, third));
        assert!(desk.place(guest(5)).is_some());
        drop(first);
        assert!(waits(&mut others[1]).await);
        assert!(others.remove(0).await.is_some());
        drop(others);
        let taken = desk.taken.lock();
        assert_eq!((taken.all, taken.of.len()), (0, 0), "nothing is left");
    }

    #[tokio::test]
    async fn never_are_more_worked_on_than_may_be() {
        let desk = Desk::new(Room { at_a_time: 2, places: 100, places_of_one: 100 });
        let (one, two) = (desk.turn(guest(1)).await.unwrap(), desk.turn(guest(2)).await.unwrap());
        let mut next = Box::pin(desk.turn(guest(3)));
        assert!(waits(&mut next).await);
        drop(one);
        assert!(next.await.is_some());
        drop(two);
    }
}
