//! A slot of a backend without a request. A probe that asks for tokens takes one, so that the backend never has more
//! requests at once than slots.

use std::sync::Arc;
use std::time::Duration;

use smallvec::{SmallVec, smallvec};
use tokio::time::Instant;
use uuid::Uuid;
use weir_ratelimit::reservation::Reservation;
use weir_ratelimit::waiting::{Alternatives, Priority, QueueId, QueuePolicy, SlotQueue};
use weir_ratelimit::{Acquire, Candidate, Cost, Decision, Error, Key, Limiter, Outcome, Scopes};

use super::ledger::{Job, LEASE_TTL, Ledger};
use crate::routing::backend::BackendEntry;
use crate::routing::entries::ModelEntry;

/// The tenant name of probes in queues.
const PROBES: &str = "weir-probe";

/// A slot that the limiter gave to a reservation. Dropping it releases the slot, unless it was [kept](Self::keep).
#[derive(Debug)]
pub struct NewSlot {
    ledger: Arc<Ledger>,
    id: Uuid,
    leases: Option<Key>,
}

impl NewSlot {
    /// Keeps the slot, which then is released with the reservation.
    pub fn keep(mut self) -> Option<Key> {
        self.leases.take()
    }
}

impl Drop for NewSlot {
    fn drop(&mut self) {
        if let Some(leases) = self.leases.take() {
            // Without room in the queue the lease expires.
            let _ = self.ledger.hand_over(Job::Release(self.id, leases));
        }
    }
}

impl Ledger {
    /// Takes a slot for a reservation at the first candidate with a free one, in place of `from`. Returns the
    /// candidate's position. Cancel-safe: a slot that was taken for a caller that has left is released.
    ///
    /// # Errors
    /// Those of the limiter.
    pub async fn take_slot(
        self: &Arc<Self>,
        id: Uuid,
        from: Option<Key>,
        candidates: Vec<Candidate>,
    ) -> Result<Option<(usize, NewSlot)>, Error> {
        let ledger = self.clone();
        // A task of its own, because a call that was sent takes a slot even if its caller has left. It ends with the
        // limiter's answer, which has a deadline.
        let taking = tokio::spawn(async move {
            let taken = ledger.limiter.move_slot(id, from.as_ref(), &candidates, LEASE_TTL).await?;
            Ok(taken.and_then(|at| {
                let leases = Some(candidates.get(at)?.leases.clone());
                Some((at, NewSlot { ledger, id, leases }))
            }))
        });
        taking.await.unwrap_or_else(|_| Err(Error::Unreachable("the call did not come to its end".into())))
    }
}

/// A lease that is renewed until it is dropped, and then freed. Like the leases of requests it carries the owner id
/// of this process, so it is an orphan after the death of the process.
#[derive(Debug)]
pub struct SlotLease {
    ledger: Arc<Ledger>,
    held: Reservation,
    place: Candidate,
    slot: Option<NewSlot>,
}

impl SlotLease {
    fn of(ledger: &Arc<Ledger>, backend: &BackendEntry) -> Self {
        let place = Candidate {
            leases: backend.slots.clone(),
            max_concurrency: backend.spec.max_concurrency,
            bound: None,
        };
        Self { ledger: ledger.clone(), held: ledger.leases.open(ledger.holder.id()), place, slot: None }
    }

    async fn ask(&self) -> Result<Option<NewSlot>, Error> {
        let taken = self.ledger.take_slot(self.held.id(), None, vec![self.place.clone()]).await?;
        Ok(taken.map(|(_, slot)| slot))
    }

    fn holding(mut self, slot: Option<NewSlot>) -> Option<Self> {
        self.slot = Some(slot?);
        self.held.set_leases(smallvec![self.place.leases.clone()]);
        Some(self)
    }

    /// Takes one of the backend's slots in the whole cluster; `None` if none is free. Cancel-safe.
    ///
    /// # Errors
    /// Those of the limiter, which decides by the local share during a store outage.
    pub async fn take(ledger: &Arc<Ledger>, backend: &BackendEntry) -> Result<Option<Self>, Error> {
        let lease = Self::of(ledger, backend);
        let slot = lease.ask().await?;
        Ok(lease.holding(slot))
    }

    /// The same, with a wait of at most `max_wait` in the queue of `model`, before its requests. Cancel-safe.
    ///
    /// # Errors
    /// See [`SlotLease::take`].
    pub async fn wait(
        ledger: &Arc<Ledger>,
        backend: &BackendEntry,
        model: &ModelEntry,
        max_wait: Duration,
    ) -> Result<Option<Self>, Error> {
        let lease = Self::of(ledger, backend);
        let patience = QueuePolicy {
            tenant: PROBES.into(),
            priority: Priority::High,
            deadline: Instant::now() + max_wait,
            scopes: SmallVec::new(),
            slots: Some(SlotQueue {
                queue: model.queue.clone(),
                max_wait,
                bound: model.pool.spec.queue.max_waiting as usize,
                places: None,
            }),
            bytes: 0,
            alternatives: Alternatives::new(),
        };
        let call = Acquire {
            id: lease.held.id(),
            cost: Cost::default(),
            estimated: false,
            scopes: Scopes::new(),
            candidates: vec![lease.place.clone()],
            lease_ttl: LEASE_TTL,
        };
        let ask = |_: Option<&QueueId>| async {
            let slot = lease.ask().await?;
            let outcome = match slot {
                Some(_) => Outcome::Granted { slot: Some(0) },
                None => Outcome::NoSlot { wait: LEASE_TTL },
            };
            Ok::<_, Error>((Decision { outcome, limits: Vec::new(), now_us: 0, degraded: false }, slot))
        };
        let waited = ledger.waiting.acquire(&call, &patience, ask).await?;
        Ok(lease.holding(waited.with.flatten()))
    }
}
