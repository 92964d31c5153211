//! A slot of a backend without a request: what a probe that asks for tokens takes, so that the backend never has more
//! at once than its slots.

use std::sync::Arc;
use std::time::Duration;

use smallvec::{SmallVec, smallvec};
use tokio::time::Instant;
use uuid::Uuid;
use weir_ratelimit::waiting::{Alternatives, Patience, Priority, QueueId, SlotPatience};
use weir_ratelimit::{Acquire, Candidate, Cost, Decision, Error, Limiter, Outcome, Scopes};

use super::{Job, Ledger};
use crate::snapshot::{BackendEntry, LEASE_TTL, ModelEntry};

/// Whose turn a probe takes when it waits.
const PROBES: &str = "weir-probe";

/// A lease that is renewed until it is dropped, and freed then. Like those of requests it bears the mark of this process
/// and ends with it.
#[derive(Debug)]
pub struct SlotLease {
    ledger: Arc<Ledger>,
    id: Uuid,
    place: Candidate,
    taken: bool,
}

impl SlotLease {
    fn of(ledger: &Arc<Ledger>, backend: &BackendEntry) -> Self {
        let place = Candidate {
            leases: backend.slots.clone(),
            max_concurrency: backend.spec.max_concurrency,
            bound: None,
        };
        // Said to be taken from before the limiter is asked: whoever is cut off meanwhile leaves nothing behind.
        Self { ledger: ledger.clone(), id: ledger.holder.id(), place, taken: true }
    }

    async fn ask(&self) -> Result<bool, Error> {
        let place = std::slice::from_ref(&self.place);
        let taken = self.ledger.limiter.move_slot(self.id, None, place, LEASE_TTL).await?.is_some();
        if taken {
            self.ledger.leases().insert(self.id, smallvec![self.place.leases.clone()]);
        }
        Ok(taken)
    }

    /// Takes one of the backend's slots of the whole cluster; `None` when there is none. Cancel-safe.
    ///
    /// # Errors
    /// Those of the limiter, which decides by this gateway's share while its store is away.
    pub async fn take(ledger: &Arc<Ledger>, backend: &BackendEntry) -> Result<Option<Self>, Error> {
        let mut lease = Self::of(ledger, backend);
        lease.taken = lease.ask().await?;
        Ok(lease.taken.then_some(lease))
    }

    /// The same, waiting for at most `max_wait` where requests for `model` wait, and before them. Cancel-safe.
    ///
    /// # Errors
    /// See [`SlotLease::take`].
    pub async fn wait(
        ledger: &Arc<Ledger>,
        backend: &BackendEntry,
        model: &ModelEntry,
        max_wait: Duration,
    ) -> Result<Option<Self>, Error> {
        let mut lease = Self::of(ledger, backend);
        let patience = Patience {
            tenant: PROBES.into(),
            priority: Priority::High,
            deadline: Instant::now() + max_wait,
            scopes: SmallVec::new(),
            slots: Some(SlotPatience {
                queue: model.queue.clone(),
                max_wait,
                bound: model.pool.spec.queue.max_waiting as usize,
            }),
            bytes: 0,
            alternatives: Alternatives::new(),
        };
        let call = Acquire {
            id: lease.id,
            cost: Cost::default(),
            estimated: false,
            scopes: Scopes::new(),
            candidates: vec![lease.place.clone()],
            lease_ttl: LEASE_TTL,
        };
        let ask = |_: Option<&QueueId>| async {
            let outcome = match lease.ask().await? {
                true => Outcome::Granted { slot: Some(0) },
                false => Outcome::NoSlot { wait: LEASE_TTL },
            };
            Ok::<_, Error>((Decision { outcome, limits: Vec::new(), now_us: 0, degraded: false }, ()))
        };
        let waited = ledger.waiting.acquire(&call, &patience, ask).await?;
        lease.taken = matches!(waited.decision.outcome, Outcome::Granted { .. });
        Ok(lease.taken.then_some(lease))
    }
}

impl Drop for SlotLease {
    fn drop(&mut self) {
        if self.taken {
            self.ledger.leases().remove(self.id);
            // Without room in the queue it runs out.
            let _ = self.ledger.queue.try_send(Job::Release(self.id, self.place.leases.clone()));
        }
    }
}
