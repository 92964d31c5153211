//! A store of either kind, chosen when the process starts.

use std::sync::Arc;
use std::time::Duration;

use crate::model::call::{Acquire, Candidate, Charge, Decision, Renewal, Settle, Settled};
use crate::model::data_set::DataSetsLost;
use crate::model::error::Error;
use crate::model::id::{OwnerId, ReservationId};
use crate::model::key::Key;
use crate::model::limiter::Limiter;
use crate::model::limits::{LimitState, ScopeLimits};
use crate::model::usage::UsageLines;
use crate::store::memory::MemoryLimiter;
use crate::store::redis::RedisLimiter;

/// A store whose kind is known at run time. Clones share it.
#[derive(Debug, Clone)]
pub enum AnyLimiter {
    /// Memory of this process.
    Memory(Arc<MemoryLimiter>),
    /// Redis.
    Redis(Arc<RedisLimiter>),
}

impl AnyLimiter {
    /// Whether it answers at once, since no network is in between.
    pub const fn is_here(&self) -> bool {
        matches!(self, AnyLimiter::Memory(_))
    }

    /// Admissions and settlements that shared a script call with others.
    pub fn coalesced_calls(&self) -> u64 {
        match self {
            AnyLimiter::Memory(_) => 0,
            AnyLimiter::Redis(limiter) => limiter.coalesced_calls(),
        }
    }
}

impl From<MemoryLimiter> for AnyLimiter {
    fn from(limiter: MemoryLimiter) -> Self {
        AnyLimiter::Memory(Arc::new(limiter))
    }
}

impl From<RedisLimiter> for AnyLimiter {
    fn from(limiter: RedisLimiter) -> Self {
        AnyLimiter::Redis(Arc::new(limiter))
    }
}

impl Limiter for AnyLimiter {
    fn data_sets_lost(&self) -> Option<DataSetsLost> {
        match self {
            AnyLimiter::Memory(limiter) => limiter.data_sets_lost(),
            AnyLimiter::Redis(limiter) => limiter.data_sets_lost(),
        }
    }

    async fn acquire(&self, call: &Acquire) -> Result<Decision, Error> {
        match self {
            AnyLimiter::Memory(limiter) => limiter.acquire(call).await,
            AnyLimiter::Redis(limiter) => limiter.acquire(call).await,
        }
    }

    async fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        match self {
            AnyLimiter::Memory(limiter) => limiter.move_slot(id, from, candidates, lease_ttl).await,
            AnyLimiter::Redis(limiter) => limiter.move_slot(id, from, candidates, lease_ttl).await,
        }
    }

    async fn settle(&self, call: &Settle) -> Result<Settled, Error> {
        match self {
            AnyLimiter::Memory(limiter) => limiter.settle(call).await,
            AnyLimiter::Redis(limiter) => limiter.settle(call).await,
        }
    }

    async fn renew(&self, renewals: &[Renewal], lease_ttl: Duration) -> Result<Vec<ReservationId>, Error> {
        match self {
            AnyLimiter::Memory(limiter) => limiter.renew(renewals, lease_ttl).await,
            AnyLimiter::Redis(limiter) => limiter.renew(renewals, lease_ttl).await,
        }
    }

    async fn release(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        match self {
            AnyLimiter::Memory(limiter) => limiter.release(id, leases).await,
            AnyLimiter::Redis(limiter) => limiter.release(id, leases).await,
        }
    }

    async fn free_orphans(&self, owner: OwnerId, leases: &[Key]) -> Result<Option<u64>, Error> {
        match self {
            AnyLimiter::Memory(limiter) => limiter.free_orphans(owner, leases).await,
            AnyLimiter::Redis(limiter) => limiter.free_orphans(owner, leases).await,
        }
    }

    async fn charge(&self, charges: &[Charge]) -> Result<Decision, Error> {
        match self {
            AnyLimiter::Memory(limiter) => limiter.charge(charges).await,
            AnyLimiter::Redis(limiter) => limiter.charge(charges).await,
        }
    }

    async fn peek(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        match self {
            AnyLimiter::Memory(limiter) => limiter.peek(scopes).await,
            AnyLimiter::Redis(limiter) => limiter.peek(scopes).await,
        }
    }

    async fn usage(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        match self {
            AnyLimiter::Memory(limiter) => limiter.usage(records).await,
            AnyLimiter::Redis(limiter) => limiter.usage(records).await,
        }
    }
}
