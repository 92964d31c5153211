//! Quota prefetch for hot limits.
//!
//! A limit of all requests costs the store a decision per request. If an operator sets a part of the capacity aside
//! ([`ScopeLimits::prefetch`]), a process debits a chunk of units before it needs them and admits requests from the chunk
//! without asking the store. Units that are not used within a second are given back.
//!
//! **Nothing is admitted beyond the limit.** Requests, and chunks, are decided by the capacity without the set-aside
//! part: `capacity - aside`. Chunks are debited in the same bucket state as everything else and are valid for
//! [`VALID`]. A second bucket state in the store, with half of the set-aside part as capacity and as rate per
//! `VALID`, lets all processes together take at most `aside` within `VALID`. So at any time `u` at most `aside` units
//! are held that were debited before. Usage in `[u, v]` is at most those units and what is debited in `[u, v]`:
//! `aside + (capacity - aside) + rate x (v - u)`, the envelope. This holds for any number of processes. A chunk that
//! is lost with its process was debited and not used.
//!
//! **Few requests are refused too early.** While less than a quarter of the capacity is left, nothing is prefetched,
//! so the store decides each request near the limit. The cost is that the set-aside part can never be used at once.
//!
//! Settlements of admissions from quota are summed up and reported to the store every [`REPORT_EVERY`].

mod quota;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use weir_runtime::RecentMap;

pub use self::quota::VALID;
use self::quota::{Quota, Units};
use crate::model::call::{
    Acquire, Candidate, Charge, Decision, MAX_CHARGES, Outcome, Renewal, Settle, Settled,
};
use crate::model::checks::{self, reserved, spent};
use crate::model::data_set::DataSetsLost;
use crate::model::error::{Error, Trouble};
use crate::model::id::{OwnerId, ReservationId};
use crate::model::key::{Key, KeyMap};
use crate::model::kind::Kind;
use crate::model::leaky_bucket;
use crate::model::limiter::Limiter;
use crate::model::limits::{LimitState, Mode, ScopeLimits, Scopes};
use crate::model::usage::UsageLines;

/// How often settlements are reported to the store.
pub const REPORT_EVERY: Duration = Duration::from_millis(50);
/// Unsettled admissions from quota. Beyond it the store is asked.
const OPEN_MAX: usize = 262_144;
/// Settled ones that are recognised when they are settled again.
const ENDED_MAX: usize = 65_536;
/// Scopes with quota. Beyond it the store is asked.
const SCOPES_MAX: usize = 1_024;

/// A limiter that prefetches quota from the limiter inside. Clones share the quota. Dropping the last one stops the
/// background task; the quota that it holds counts as used.
pub struct QuotaPrefetch<L> {
    inner: Arc<Inner<L>>,
    /// `None` if nothing is prefetched.
    worker: Option<Arc<Worker>>,
}

/// The background task. Dropping it stops the task.
struct Worker(JoinHandle<()>);

/// The prefetched quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status {
    /// Units held now, by kind.
    pub held: [u64; Kind::COUNT],
    /// Scopes of calls that were decided from quota.
    pub decided: u64,
}

struct Inner<L> {
    store: L,
    state: Mutex<State>,
    decided: AtomicU64,
}

/// The parts of an admission that came from quota.
type Prefetched = SmallVec<[Taken; 2]>;

struct State {
    quotas: KeyMap<Quota>,
    /// Admissions of which a part came from quota that is not settled.
    open: HashMap<ReservationId, Prefetched>,
    /// The same after the settlement of that part, so that a second settlement is recognised.
    ended: RecentMap<ReservationId, Prefetched>,
    /// The store's time and when it was read, for decisions without the store.
    clock: Option<(u64, Instant)>,
}

#[derive(Debug, Clone)]
struct Taken {
    record: Key,
    units: Units,
    until: Instant,
}

impl Default for State {
    fn default() -> Self {
        let ended = RecentMap::new(ENDED_MAX, Duration::MAX);
        Self { quotas: KeyMap::default(), open: HashMap::new(), ended, clock: None }
    }
}

impl State {
    /// The store's time as far as it is known.
    fn clock(&self, now: Instant) -> u64 {
        self.clock.map_or(0, |(us, at)| us + now.saturating_duration_since(at).as_micros() as u64)
    }

    /// Settles a part of an admission: `used` units replace those that were taken.
    fn settle(&mut self, took: &Taken, scope: Option<&ScopeLimits>, used: &Units) {
        if let Some(quota) = self.quotas.get_mut(&took.record) {
            quota.settle(&took.units, used);
        } else if let Some(scope) = scope {
            // The quota was forgotten, because nobody asked for this limit for long.
            let mut quota = Quota::new(scope, Instant::now());
            quota.settle(&took.units, used);
            self.quotas.insert(took.record.clone(), quota);
        }
    }
}

impl<L: Limiter + 'static> QuotaPrefetch<L> {
    /// Starts the background task; needs a tokio runtime.
    pub fn new(store: L) -> Self {
        let mut prefetch = Self::off(store);
        let background = prefetch.inner.clone();
        let worker = tokio::spawn(async move {
            loop {
                tokio::time::sleep(REPORT_EVERY).await;
                background.report().await;
            }
        });
        prefetch.worker = Some(Arc::new(Worker(worker)));
        prefetch
    }

    /// A layer that asks the limiter inside for every decision.
    pub fn off(store: L) -> Self {
        let inner = Arc::new(Inner { store, state: Mutex::default(), decided: AtomicU64::new(0) });
        Self { inner, worker: None }
    }

    /// The limiter inside this layer.
    pub fn store(&self) -> &L {
        &self.inner.store
    }

    /// The quota held now.
    pub fn status(&self) -> Status {
        let now = Instant::now();
        let state = self.inner.state();
        let held = state.quotas.values().map(|quota| quota.held(now));
        let held = held.fold([0; Kind::COUNT], |sum: Units, held| {
            std::array::from_fn(|k| sum[k].saturating_add(held[k]))
        });
        Status { held, decided: self.inner.decided.load(Ordering::Relaxed) }
    }

    /// Reports all settlements to the store, at the end of a process.
    pub async fn flush(&self) {
        self.inner.report().await;
    }
}

impl<L> Clone for QuotaPrefetch<L> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), worker: self.worker.clone() }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<L: fmt::Debug> fmt::Debug for QuotaPrefetch<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuotaPrefetch").field("store", &self.inner.store).finish_non_exhaustive()
    }
}

fn has_quota(scope: &ScopeLimits) -> bool {
    scope.mode == Mode::Enforce
        && scope.buckets.iter().zip(scope.prefetch).all(|(bucket, aside)| bucket.is_none() || aside > 1)
        && scope.buckets.iter().any(Option::is_some)
}

/// The scope without its buckets; `None` if it has no other limit.
fn rest_of(scope: &ScopeLimits) -> Option<ScopeLimits> {
    scope.concurrency?;
    Some(ScopeLimits { buckets: [None; Kind::COUNT], ..scope.clone() })
}

/// The scopes that the store is asked about. Buckets of the given records are decided from quota.
fn rest(scopes: &[ScopeLimits], took: &[Taken]) -> Scopes {
    let here = |scope: &ScopeLimits| took.iter().any(|took| took.record == scope.record);
    scopes.iter().filter_map(|scope| if here(scope) { rest_of(scope) } else { Some(scope.clone()) }).collect()
}

fn units(scope: &ScopeLimits, amount: impl Fn(Kind, &crate::model::kind::Bucket) -> f64) -> Units {
    let mut units = [0; Kind::COUNT];
    for kind in Kind::ALL {
        if let Some(bucket) = &scope.buckets[kind as usize] {
            units[kind as usize] = (amount(kind, bucket) / leaky_bucket::unit(kind)) as u64;
        }
    }
    units
}

impl<L: Limiter + 'static> Inner<L> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes quota for a call where there is enough. Scopes that need more chunks are fetched in the background.
    fn draw(self: &Arc<Self>, call: &Acquire) -> Option<Prefetched> {
        let now = Instant::now();
        let mut state = self.state();
        if let Some(known) = state.open.get(&call.id).or_else(|| state.ended.get(&call.id, now)) {
            return Some(known.clone());
        }
        let room = state.open.len() < OPEN_MAX;
        let mut took = Prefetched::new();
        for scope in call.scopes.iter().filter(|scope| has_quota(scope)) {
            if !state.quotas.contains_key(&scope.record) {
                if state.quotas.len() >= SCOPES_MAX {
                    continue;
                }
                state.quotas.insert(scope.record.clone(), Quota::new(scope, now));
            }
            let Some(quota) = state.quotas.get_mut(&scope.record) else { continue };
            quota.follow(scope);
            let units = units(scope, reserved(call));
            if room && let Some(until) = quota.take(&units, now) {
                took.push(Taken { record: scope.record.clone(), units, until });
            }
            if let Some((charges, units)) = quota.want(now) {
                // Bounded: one task per scope, each with the deadline of the store.
                tokio::spawn(self.clone().fetch(scope.record.clone(), charges, units));
            }
        }
        if took.is_empty() {
            return None;
        }
        state.open.insert(call.id, took.clone());
        Some(took)
    }

    async fn fetch(self: Arc<Self>, record: Key, charges: Vec<Charge>, units: Units) {
        let sent = Instant::now();
        let decided = self.store.charge(&charges).await;
        let now = Instant::now();
        let mut state = self.state();
        if let Ok(decision) = &decided {
            state.clock = Some((decision.now_us, now));
        }
        let Some(quota) = state.quotas.get_mut(&record) else { return };
        match decided {
            Ok(decision) => {
                let granted = matches!(decision.outcome, Outcome::Granted { .. });
                quota.taken(granted.then_some(&units), &decision.limits, sent, now);
            }
            Err(_) => quota.lost(now),
        }
    }

    /// Puts back the quota of an admission that will not use it.
    fn put_back(&self, id: ReservationId) {
        let mut state = self.state();
        let Some(all_taken) = state.open.remove(&id) else { return };
        for took in &all_taken {
            if let Some(quota) = state.quotas.get_mut(&took.record) {
                quota.put_back(&took.units, took.until);
            }
        }
    }

    /// The full answer, from the store's decision on the rest of the call.
    fn full(&self, call: &Acquire, took: &[Taken], of_rest: Option<Decision>) -> Decision {
        let now = Instant::now();
        let state = self.state();
        let mut decision = of_rest.unwrap_or(Decision {
            outcome: Outcome::Granted { slot: None },
            limits: Vec::new(),
            now_us: state.clock(now),
            degraded: false,
        });
        decision.limits = full_limits(&state, &call.scopes, took, &decision.limits, now);
        decision
    }

    /// Settles the part of a reservation that came from quota. Returns that part, and whether this is its first
    /// settlement; `None` if no part came from quota.
    fn settle_quota(&self, call: &Settle) -> Option<(Prefetched, bool)> {
        let (mut state, now) = (self.state(), Instant::now());
        let Some(all_taken) = state.open.remove(&call.id) else {
            return state.ended.get(&call.id, now).map(|all_taken| (all_taken.clone(), false));
        };
        for took in &all_taken {
            let scope = call.scopes.iter().find(|scope| scope.record == took.record);
            let used = scope.map_or(took.units, |scope| units(scope, spent(&call.actual)));
            state.settle(took, scope, &used);
        }
        state.ended.insert(call.id, all_taken.clone(), now);
        Some((all_taken, true))
    }

    async fn report(&self) {
        let now = Instant::now();
        let owed: Vec<Charge> = {
            let mut state = self.state();
            let owed = state.quotas.values_mut().flat_map(|quota| quota.owed(now)).collect();
            state.quotas.retain(|_, quota| !quota.is_idle(now));
            owed
        };
        for charges in owed.chunks(MAX_CHARGES) {
            let Err(error) = self.store.charge(charges).await else { continue };
            let mut state = self.state();
            for charge in charges {
                if let Some(quota) = state.quotas.get_mut(&charge.record) {
                    quota.not_reported(charge, error.trouble() == Trouble::Unknown);
                }
            }
        }
    }
}

/// All limits in order: from the store if it was asked, else from quota.
fn full_limits(
    state: &State,
    scopes: &[ScopeLimits],
    took: &[Taken],
    of_rest: &[LimitState],
    now: Instant,
) -> Vec<LimitState> {
    let mut limits = Vec::with_capacity(of_rest.len() + 2 * took.len());
    for scope in scopes {
        let here = took.iter().any(|took| took.record == scope.record);
        if here && let Some(quota) = state.quotas.get(&scope.record) {
            limits.extend(Kind::ALL.into_iter().filter_map(|kind| quota.limit_state(kind, now)));
        }
        limits.extend(of_rest.iter().filter(|limit| limit.scope == scope.record).cloned());
    }
    limits
}

impl<L: Limiter + 'static> Limiter for QuotaPrefetch<L> {
    fn data_sets_lost(&self) -> Option<DataSetsLost> {
        self.inner.store.data_sets_lost()
    }

    async fn acquire(&self, call: &Acquire) -> Result<Decision, Error> {
        let inner = &self.inner;
        if self.worker.is_none() || !call.scopes.iter().any(has_quota) {
            return inner.store.acquire(call).await;
        }
        checks::check_acquire(call)?;
        let Some(took) = inner.draw(call) else { return inner.store.acquire(call).await };
        inner.decided.fetch_add(took.len() as u64, Ordering::Relaxed);
        let scopes = rest(&call.scopes, &took);
        if scopes.is_empty() && call.candidates.is_empty() {
            return Ok(inner.full(call, &took, None));
        }
        // On the heap, because the futures of all layers would hold a call each.
        let part = Box::new(Acquire { scopes, ..call.clone() });
        match inner.store.acquire(&part).await {
            Ok(decision) => {
                let full = inner.full(call, &took, Some(decision));
                if !matches!(full.outcome, Outcome::Granted { .. }) {
                    inner.put_back(call.id);
                }
                Ok(full)
            }
            Err(error) => {
                // Of an unknown outcome the caller settles the id or asks again under it.
                if error.trouble() != Trouble::Unknown {
                    inner.put_back(call.id);
                }
                Err(error)
            }
        }
    }

    async fn settle(&self, call: &Settle) -> Result<Settled, Error> {
        let inner = &self.inner;
        let Some((took, first)) = inner.settle_quota(call) else { return inner.store.settle(call).await };
        let scopes = rest(&call.scopes, &took);
        let alone = scopes.is_empty() && call.slot.is_none();
        let mut settled = Settled { applied: first, limits: Vec::new(), now_us: 0 };
        // Usage is always the store's, which recognises the id.
        if !alone || call.usage.is_some() {
            let part = Box::new(Settle { scopes, ..call.clone() });
            let of_rest = inner.store.settle(&part).await?;
            settled.applied = of_rest.applied || (alone && first);
            settled.limits = of_rest.limits;
            settled.now_us = of_rest.now_us;
        }
        let mut state = inner.state();
        if settled.now_us == 0 {
            settled.now_us = state.clock(Instant::now());
        }
        settled.limits = full_limits(&state, &call.scopes, &took, &settled.limits, Instant::now());
        // If the store settles a part, it recognises a second settlement.
        if !alone {
            state.ended.remove(&call.id);
        }
        Ok(settled)
    }

    async fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        self.inner.store.move_slot(id, from, candidates, lease_ttl).await
    }

    async fn renew(&self, renewals: &[Renewal], lease_ttl: Duration) -> Result<Vec<ReservationId>, Error> {
        self.inner.store.renew(renewals, lease_ttl).await
    }

    async fn release(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        self.inner.store.release(id, leases).await
    }

    async fn free_orphans(&self, owner: OwnerId, leases: &[Key]) -> Result<Option<u64>, Error> {
        self.inner.store.free_orphans(owner, leases).await
    }

    async fn charge(&self, charges: &[Charge]) -> Result<Decision, Error> {
        self.inner.store.charge(charges).await
    }

    async fn peek(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        self.inner.store.peek(scopes).await
    }

    async fn usage(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        self.inner.store.usage(records).await
    }
}
