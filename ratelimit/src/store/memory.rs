//! The limiter inside one process: for a single node, for tests, and for the local share when Redis is away.
//!
//! One short lock guards the whole state, so every call is atomic. Time is tokio's clock, which tests can pause.
//! Expired entries count as absent at once and are removed a few per call, so that no call pays for all of them.

mod charge;
mod leases;
mod state;
mod store;
mod usage;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use self::store::State;
use crate::model::call::{Acquire, Candidate, Charge, Decision, Renewal, Settle, Settled};
use crate::model::checks;
use crate::model::error::Error;
use crate::model::id::{OwnerId, ReservationId};
use crate::model::key::Key;
use crate::model::kind::Kind;
use crate::model::leaky_bucket::BucketState;
use crate::model::limiter::Limiter;
use crate::model::limits::{LimitState, ScopeLimits};
use crate::model::usage::UsageLines;

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
    /// Creates a limiter whose buckets are empty and whose time starts at zero.
    pub fn new() -> Self {
        Self { epoch: Instant::now(), state: Mutex::default() }
    }

    /// Creates a limiter whose callers are in this process: with no network in between it need not remember for minutes what
    /// was settled.
    pub fn for_callers_here() -> Self {
        Self { state: Mutex::new(State::here()), ..Self::new() }
    }

    /// Locks the state, removes a few expired entries and returns the time of the call. The time is read under the
    /// lock, so it never runs backwards.
    fn enter(&self) -> (MutexGuard<'_, State>, u64) {
        // Every change is complete before anything can panic, so a poisoned lock guards a consistent state.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = u64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(u64::MAX);
        state.sweep(now);
        (state, now)
    }
}

/// The calls without futures. The local share makes them under a lock of its own.
impl MemoryLimiter {
    /// Like [`MemoryLimiter::new`], with time counted from `epoch`.
    pub(crate) fn since(epoch: Instant) -> Self {
        Self { epoch, state: Mutex::default() }
    }

    pub(crate) fn decide(&self, call: &Acquire) -> Result<Decision, Error> {
        checks::check_acquire(call)?;
        let (mut state, now) = self.enter();
        Ok(state.acquire(call, now))
    }

    pub(crate) fn place(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        checks::check_move(candidates, lease_ttl)?;
        let (mut state, now) = self.enter();
        Ok(state.move_slot(id, from, candidates, lease_ttl, now))
    }

    pub(crate) fn end(&self, call: &Settle) -> Result<Settled, Error> {
        checks::check_scopes(&call.scopes)?;
        let (mut state, now) = self.enter();
        Ok(state.settle(call, now))
    }

    /// Undoes a grant as if the call had been refused. The id may be decided again.
    pub(crate) fn take_back(&self, call: &Settle) {
        let (mut state, now) = self.enter();
        state.settle(call, now);
        state.forget_reservation(call.id);
    }

    /// Returns false if a lease was lost.
    pub(crate) fn extend(&self, renewal: &Renewal, lease_ttl: Duration) -> bool {
        let (mut state, now) = self.enter();
        state.renew(renewal, lease_ttl, now)
    }

    pub(crate) fn free(&self, id: ReservationId, leases: &[Key]) {
        self.enter().0.release(id, leases);
    }

    pub(crate) fn debit(&self, charges: &[Charge]) -> Result<Decision, Error> {
        checks::check_charges(charges)?;
        let (mut state, now) = self.enter();
        Ok(state.charge(charges, now))
    }

    pub(crate) fn look(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        checks::check_scopes(scopes)?;
        let (mut state, now) = self.enter();
        Ok(state.peek(scopes, now))
    }

    /// The bucket states of a record as stored.
    pub(crate) fn bucket_states(&self, record: &Key) -> [BucketState; Kind::COUNT] {
        let (state, now) = self.enter();
        state.bucket_states(record, now)
    }

    /// Replaces the bucket states of a record.
    pub(crate) fn put_bucket_states(&self, scope: &ScopeLimits, bucket_states: [BucketState; Kind::COUNT]) {
        let (mut state, now) = self.enter();
        state.write_record(&scope.record, &checks::lines(scope, |_, _| 0.0), bucket_states, now);
    }

    /// Whether a candidate has room for a lease of `id`. A bound over several candidates is ignored, because the
    /// others are unknown here.
    pub(crate) fn has_room(&self, id: ReservationId, candidate: &Candidate) -> bool {
        let (mut state, now) = self.enter();
        let unbound = Candidate { bound: None, ..candidate.clone() };
        state.free_slot(std::slice::from_ref(&unbound), Some(id), now).is_some()
    }

    /// Takes leases that are held elsewhere already, even above the maximum.
    pub(crate) fn hold(&self, id: ReservationId, leases: &[Key], life: Duration) {
        let (mut state, now) = self.enter();
        for key in leases {
            state.take_lease(key, id, store::later(now, life));
        }
    }

    /// The charges of a reservation, in micro-units by record.
    pub(crate) fn charged(&self, id: ReservationId) -> Vec<(Key, [f64; Kind::COUNT])> {
        let (mut state, now) = self.enter();
        let held = state.reservation(id, now);
        held.map(|held| held.reserved.clone()).unwrap_or_default()
    }
}

impl Limiter for MemoryLimiter {
    async fn acquire(&self, call: &Acquire) -> Result<Decision, Error> {
        self.decide(call)
    }

    async fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        self.place(id, from, candidates, lease_ttl)
    }

    async fn settle(&self, call: &Settle) -> Result<Settled, Error> {
        self.end(call)
    }

    async fn renew(&self, renewals: &[Renewal], lease_ttl: Duration) -> Result<Vec<ReservationId>, Error> {
        checks::check_lease(lease_ttl)?;
        let lost = renewals.iter().filter(|renewal| !self.extend(renewal, lease_ttl));
        Ok(lost.map(|renewal| renewal.id).collect())
    }

    async fn release(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        self.free(id, leases);
        Ok(())
    }

    async fn free_orphans(&self, owner: OwnerId, leases: &[Key]) -> Result<Option<u64>, Error> {
        checks::check_orphans(leases)?;
        let (mut state, now) = self.enter();
        Ok(state.free_orphans(owner, leases, now))
    }

    async fn charge(&self, charges: &[Charge]) -> Result<Decision, Error> {
        self.debit(charges)
    }

    async fn peek(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        self.look(scopes)
    }

    async fn usage(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        checks::check_usage(records)?;
        let (state, now) = self.enter();
        Ok(records.iter().map(|record| state.usage_lines(record, now)).collect())
    }
}
