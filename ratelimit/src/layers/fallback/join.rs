//! Asking a store that is back while others may still decide without it.
//!
//! Gateways find the store one after the other. Who may ask it first would find the room of all the others there and
//! use it, and they would use it once more; so for a grace time a request must fit the store's limit and this process's
//! share. When that time is over every other gateway asks the store too, which then knows of everything at once.

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

/// A grant of this process that the store is being asked about. However that ends, it is reported later, unless the
/// answer was taken over before.
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
    /// Whether this call must fit the share as well. What nobody admits without the store has no shares.
    pub(super) fn joins(&self, call: &Acquire) -> bool {
        self.is(Phase::Joining) && call.scopes.iter().all(|scope| scope.without_store != WithoutStore::Closed)
    }

    /// Decided by this process's share and, where that grants, by the store.
    pub(super) async fn join(&self, call: &Acquire) -> Result<Decision, Error> {
        let (own, asked, at) = {
            let mut local = self.local();
            let own = self.decide_in(&mut local, call, &not_sent(lock(&self.reason).0.clone()), false)?;
            let Outcome::Granted { .. } = own.outcome else { return self.alone(own) };
            local.asking(call.id);
            let at = local.with_room(call.id, &call.candidates, self.gateways());
            let candidates = at.iter().filter_map(|at| call.candidates.get(*at)).map(unbound).collect();
            (own, Acquire { candidates, ..call.clone() }, at)
        };
        let lost_sets = self.lost_sets();
        let asking = Asking { inner: self, id: call.id };
        match self.ask(&asked).await {
            // By a data set that knows nothing of what is in flight.
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
                        local.adopted(call.id, &leases, self.gateways(), self.now_us());
                        *slot = slot.and_then(|slot| at.get(slot).copied());
                    }
                    Outcome::Limited { .. } | Outcome::NoSlot { .. } => local.undo(call, self.gateways()),
                }
                drop(local);
                drop(asking);
                Ok(decision)
            }
            Err(error) if error.trouble() == Trouble::Caller => {
                lock(&self.local).undo(call, self.gateways());
                Err(error)
            }
            Err(error) => {
                drop(asking);
                self.failed(&error, call.scopes.first());
                self.alone(own)
            }
        }
    }

    /// Stands without the store.
    fn alone(&self, decision: Decision) -> Result<Decision, Error> {
        self.local_decisions.fetch_add(1, Ordering::Relaxed);
        Ok(decision)
    }

    /// A slot that the share has and the store grants.
    pub(super) async fn join_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        let at = self.local().take_slot(id, from, candidates, lease_ttl, self.gateways())?;
        let asked: SmallVec<[Candidate; 1]> =
            at.and_then(|at| candidates.get(at)).map(unbound).into_iter().collect();
        let moved = self.store.move_slot(id, from, &asked, lease_ttl).await;
        if !matches!(moved, Ok(Some(_))) {
            asked.iter().for_each(|slot| lock(&self.local).release(id, std::slice::from_ref(&slot.leases)));
        }
        moved.map(|moved| moved.and(at))
    }
}

/// A bound is a part of what all candidates have, and the store is not asked about all of them; the share has seen to it.
fn unbound(candidate: &Candidate) -> Candidate {
    Candidate { bound: None, ..candidate.clone() }
}
