//! Admission after an outage, while other gateways may still decide without the store.
//!
//! Gateways notice the return of the store one after the other. The first one would find the unused part of all others in
//! the store and use it, and the others would use it again. So for a grace time a request must fit the store's limit and the
//! local share. After that time every gateway asks the store.

use std::sync::atomic::Ordering;
use std::time::Duration;

use smallvec::SmallVec;

use super::breaker::Phase;
use super::inner::{Inner, leases_taken, lock, not_sent};
use crate::model::call::{Acquire, Candidate, Decision, Outcome};
use crate::model::error::{Error, Trouble};
use crate::model::id::ReservationId;
use crate::model::key::Key;
use crate::model::limiter::Limiter;
use crate::model::limits::WithoutStore;

/// A local grant about which the store is being asked. If the answer is not taken over, the grant is reported later.
struct Asking<'a, L: Limiter> {
    inner: &'a Inner<L>,
    id: ReservationId,
}

impl<L: Limiter> Drop for Asking<'_, L> {
    fn drop(&mut self) {
        lock(&self.inner.local).asked(self.id);
    }
}

impl<L: Limiter> Inner<L> {
    /// Whether this call must fit the local share as well. A closed limit is never decided locally, so it has no
    /// local share.
    pub(super) fn joins(&self, call: &Acquire) -> bool {
        self.is(Phase::Joining) && call.scopes.iter().all(|scope| scope.without_store != WithoutStore::Closed)
    }

    /// Decides by the local share and, if that grants, by the store.
    pub(super) async fn join(&self, call: &Acquire) -> Result<Decision, Error> {
        let (own, asked, at) = {
            let mut local = self.local();
            let own = self.decide_in(&mut local, call, &not_sent(lock(&self.reason).0.clone()), false)?;
            let Outcome::Granted { .. } = own.outcome else { return self.alone(own) };
            local.asking(call.id);
            let at = local.with_room(call.id, &call.candidates, self.sharing());
            let candidates = at.iter().filter_map(|at| call.candidates.get(*at)).map(unbound).collect();
            (own, Acquire { candidates, ..call.clone() }, at)
        };
        let lost_sets = self.lost_sets();
        let asking = Asking { inner: self, id: call.id };
        match self.ask(call.scopes.first(), || self.store.acquire(&asked)).await {
            // The answer is from a data set without the leases in flight.
            Ok(_) if self.lost_sets() != lost_sets => {
                drop(asking);
                self.hear_of_loss();
                self.alone(own)
            }
            Ok(mut decision) => {
                self.note(&asked, &decision);
                let mut local = self.local();
                match &mut decision.outcome {
                    Outcome::Granted { slot } => {
                        let leases = leases_taken(&asked, *slot);
                        local.adopted(call.id, &leases, self.sharing(), self.now_us());
                        *slot = slot.and_then(|slot| at.get(slot).copied());
                    }
                    Outcome::Limited { .. } | Outcome::NoSlot { .. } => local.undo(call, self.sharing()),
                }
                drop(local);
                drop(asking);
                Ok(decision)
            }
            Err(error) if error.trouble() == Trouble::Caller => {
                lock(&self.local).undo(call, self.sharing());
                Err(error)
            }
            Err(_) => {
                drop(asking);
                self.alone(own)
            }
        }
    }

    /// Counts a decision that stands without the store.
    fn alone(&self, decision: Decision) -> Result<Decision, Error> {
        self.local_decisions.fetch_add(1, Ordering::Relaxed);
        Ok(decision)
    }

    /// Takes a slot that the local share allows and the store grants.
    pub(super) async fn join_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        let at = self.local().take_slot(id, from, candidates, lease_ttl, self.sharing())?;
        let asked: SmallVec<[Candidate; 1]> =
            at.and_then(|at| candidates.get(at)).map(unbound).into_iter().collect();
        let moved = self.ask(None, || self.store.move_slot(id, from, &asked, lease_ttl)).await;
        if !matches!(moved, Ok(Some(_))) {
            asked.iter().for_each(|slot| lock(&self.local).release(id, std::slice::from_ref(&slot.leases)));
        }
        moved.map(|moved| moved.and(at))
    }
}

/// Removes a candidate's bound. It counts the slots of all candidates, and the store is asked about some of them; the
/// local share has checked it.
fn unbound(candidate: &Candidate) -> Candidate {
    Candidate { bound: None, ..candidate.clone() }
}
