//! The limiter inside one process: for a single node, for tests, and for the local share when Redis is away.
//!
//! One short lock guards everything, which makes every call atomic. Time is tokio's, so tests can pause it.
//! What has expired is seen as absent at once and removed a few entries per call, so no call pays for a crowd.

mod leases;
mod state;
mod store;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use self::store::State;
use crate::{
    Acquire, Candidate, Decision, Error, Key, LimitState, Limiter, Renewal, ReservationId, ScopeLimits,
    Settle, Settled, call,
};

/// Limits of one process.
#[derive(Debug)]
pub struct MemoryLimiter {
    epoch: Instant,
    state: Mutex<State>,
}

impl Default for MemoryLimiter {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryLimiter {
    /// Every meter empty. Its time starts at zero now.
    pub fn new() -> Self {
        Self { epoch: Instant::now(), state: Mutex::default() }
    }

    /// The state, swept a little, and the time of the call: taken under the lock, so it never runs backwards.
    fn enter(&self) -> (MutexGuard<'_, State>, u64) {
        // Every change is complete before anything can panic, so a poisoned lock still guards a whole state.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = u64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(u64::MAX);
        state.sweep(now);
        (state, now)
    }
}

impl Limiter for MemoryLimiter {
    async fn acquire(&self, call: &Acquire) -> Result<Decision, Error> {
        call::check_acquire(call)?;
        let (mut state, now) = self.enter();
        Ok(state.acquire(call, now))
    }

    async fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        call::check_candidates(candidates)?;
        call::check_lease(lease_ttl)?;
        let (mut state, now) = self.enter();
        Ok(state.move_slot(id, from, candidates, lease_ttl, now))
    }

    async fn settle(&self, call: &Settle) -> Result<Settled, Error> {
        call::check_scopes(&call.scopes)?;
        let (mut state, now) = self.enter();
        Ok(state.settle(call, now))
    }

    async fn renew(&self, renewals: &[Renewal], lease_ttl: Duration) -> Result<Vec<ReservationId>, Error> {
        call::check_lease(lease_ttl)?;
        let (mut state, now) = self.enter();
        let lost = renewals.iter().filter(|renewal| !state.renew(renewal, lease_ttl, now));
        Ok(lost.map(|renewal| renewal.id).collect())
    }

    async fn release(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        let (mut state, _) = self.enter();
        state.release(id, leases);
        Ok(())
    }

    async fn peek(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        call::check_scopes(scopes)?;
        let (mut state, now) = self.enter();
        Ok(state.peek(scopes, now))
    }
}
