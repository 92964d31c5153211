//! Who holds which leases in this process, from before the limiter is asked until the last one is given back.
//!
//! A [`Reservation`] is the only way to have an entry in the [`LeaseBook`]: dropping it removes the entry, so that no
//! lease is renewed for a request that has ended. Giving leases back and settling takes calls, which `Drop` cannot make:
//! whoever owns the reservation does that, and asks it what there is to give back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;

use crate::layers::deny_cache::DenyCache;
use crate::model::call::{Acquire, Decision, Renewal};
use crate::model::error::Error;
use crate::model::id::ReservationId;
use crate::model::key::{Key, KeyMap};
use crate::model::limiter::Limiter;

/// The lease sets of one reservation.
pub type Leases = SmallVec<[Key; 4]>;

/// The leases of every reservation of this process, and how many there are of each set. Clones are the same book.
#[derive(Debug, Clone, Default)]
pub struct LeaseBook(Arc<Mutex<Entries>>);

#[derive(Debug, Default)]
struct Entries {
    by_id: HashMap<ReservationId, Leases>,
    counts: KeyMap<u32>,
}

impl LeaseBook {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reservation that holds nothing yet.
    pub fn open(&self, id: ReservationId) -> Reservation {
        Reservation { book: self.clone(), id, unanswered: Vec::new() }
    }

    /// Reservations with leases.
    pub fn len(&self) -> usize {
        self.entries().by_id.len()
    }

    /// Whether nobody holds a lease.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many leases of this set are held.
    pub fn count(&self, leases: &Key) -> u32 {
        self.entries().counts.get(leases).copied().unwrap_or(0)
    }

    /// What a reservation holds; `None` when it has ended or holds nothing.
    pub fn leases_of(&self, id: ReservationId) -> Option<Leases> {
        self.entries().by_id.get(&id).cloned()
    }

    /// Everything that is to be renewed.
    pub fn renewals(&self) -> Vec<Renewal> {
        let entries = self.entries();
        entries.by_id.iter().map(|(id, leases)| Renewal { id: *id, leases: leases.clone() }).collect()
    }
}

impl Entries {
    fn set(&mut self, id: ReservationId, leases: Leases) {
        for key in &leases {
            *self.counts.entry(key.clone()).or_default() += 1;
        }
        let before = if leases.is_empty() { self.by_id.remove(&id) } else { self.by_id.insert(id, leases) };
        for key in before.into_iter().flatten() {
            if let Some(count) = self.counts.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(&key);
                }
            }
        }
    }
}

/// The leases of one request, probe or attempt. Dropping it ends their renewal.
#[derive(Debug)]
pub struct Reservation {
    book: LeaseBook,
    id: ReservationId,
    /// Slots of which a call without an answer may have taken one.
    unanswered: Vec<Key>,
}

/// The limiter is being asked. Dropped before the answer, as with a client that goes away, it leaves behind what the call
/// may have taken.
struct Asking<'a> {
    reservation: &'a mut Reservation,
    call: &'a Acquire,
    answered: bool,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if !self.answered {
            let slots = self.call.candidates.iter().map(|candidate| candidate.leases.clone());
            self.reservation.unanswered = slots.collect();
        }
    }
}

impl Reservation {
    /// Its id.
    pub fn id(&self) -> ReservationId {
        self.id
    }

    /// Asks for a call under this id: the deny cache first, then the limiter. True when the deny cache answered. Dropped
    /// or failed, the call may have taken a slot: see [`Reservation::take_unanswered`].
    ///
    /// # Errors
    /// Those of the limiter.
    pub async fn ask(
        &mut self,
        deny_cache: &DenyCache,
        limiter: &impl Limiter,
        call: &Acquire,
    ) -> Result<(Decision, bool), Error> {
        let mut asking = Asking { reservation: self, call, answered: false };
        let decided = deny_cache.acquire(limiter, call).await;
        asking.answered = decided.is_ok();
        decided
    }

    /// Slots that are to be freed because a call without an answer may have taken one of them.
    pub fn take_unanswered(&mut self) -> Vec<Key> {
        std::mem::take(&mut self.unanswered)
    }

    /// These are all the leases that it holds now.
    pub fn set_leases(&self, leases: Leases) {
        self.book.entries().set(self.id, leases);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.set_leases(Leases::new());
    }
}

#[cfg(test)]
mod tests {
    use smallvec::smallvec;

    use super::*;

    #[test]
    fn what_is_held_of_each_set_is_counted_and_forgotten_with_the_last() {
        let (a, b) = (Key::backend_slots("a"), Key::backend_slots("b"));
        let book = LeaseBook::default();
        let (one, two) = (book.open(ReservationId::from_u128(1)), book.open(ReservationId::from_u128(2)));
        one.set_leases(smallvec![a.clone()]);
        two.set_leases(smallvec![a.clone(), b.clone()]);
        assert_eq!((book.count(&a), book.count(&b), book.len()), (2, 1, 2));
        one.set_leases(smallvec![b.clone()]);
        one.set_leases(smallvec![b.clone()]);
        assert_eq!((book.count(&a), book.count(&b), book.len()), (1, 2, 2));
        two.set_leases(Leases::new());
        drop((two, one));
        assert_eq!((book.count(&a), book.count(&b), book.len()), (0, 0, 0));
        assert!(book.entries().counts.is_empty());
    }
}
