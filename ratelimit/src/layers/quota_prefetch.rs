//! Quota taken ahead for hot limits.
//!
//! A limit that everybody is under costs the store a decision per request. Where its operator sets a part of its
//! capacity aside ([`ScopeLimits::prefetch`]), a process debits a chunk of units there before it needs them and
//! admits from it without asking; what it does not use within a second it gives back.
//!
//! **Nothing is admitted beyond the limit.** What is set aside is no part of the capacity that requests, or chunks, are
//! decided by: that is `capacity - aside`. Chunks come from the same bucket state as everything else, and are good for
//! [`VALID`]; a second bucket state in the store, of half of what is set aside per `VALID` and with that much room, lets
//! all processes together take at most `aside` in any such time. So at any moment `u` at most `aside` units are held
//! that were debited before, and what is used in `[u, v]` is at most those and what is debited in `[u, v]`:
//! `aside + (capacity - aside) + rate x (v - u)`, the envelope. It holds for any number of processes, and whatever of a
//! chunk is lost with its process was debited and not used.
//!
//! **Little is refused.** While less than a quarter of its capacity is left nothing is taken ahead, so near the limit
//! the store decides each request; and the set-aside part can never be used at once: that is the price.
//!
//! Settlements of what was admitted here are summed up and reported to the store every [`REPORT_EVERY`].

mod quota;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub use self::quota::VALID;
use self::quota::{Quota, Units};
use crate::model::call::{
    Acquire, Candidate, Charge, Decision, MAX_CHARGES, Outcome, Renewal, Settle, Settled,
};
use crate::model::checks::{self, reserved, spent};
use crate::model::data_set::DataSetsLost;
use crate::model::error::{Error, Trouble};
use crate::model::id::{OwnerId, ReservationId};
use crate::model::key::Key;
use crate::model::kind::Kind;
use crate::model::leaky_bucket;
use crate::model::limiter::Limiter;
use crate::model::limits::{LimitState, Mode, ScopeLimits, Scopes};
use crate::model::usage::UsageLines;

/// How often settlements are reported to the store.
pub const REPORT_EVERY: Duration = Duration::from_millis(50);
/// Admissions from quota that are not settled; past that the store is asked.
const OPEN_MAX: usize = 262_144;
/// Settled ones that are recognised, where the store knows nothing of them.
const ENDED_MAX: usize = 65_536;
/// Scopes with quota; past that the store is asked.
const SCOPES_MAX: usize = 1_024;

/// A limiter that takes quota ahead from the one inside. Clones share what is held. Dropping the last one stops the
/// background task; what is held then stands as used.
pub struct QuotaPrefetch<L> {
    inner: Arc<Inner<L>>,
    /// `None` when nothing is taken ahead.
    worker: Option<Arc<Worker>>,
}

/// The background task; ends with its owner.
struct Worker(JoinHandle<()>);

/// What is taken ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status {
    /// Units held now, by kind.
    pub held: [u64; Kind::COUNT],
    /// Scopes of calls so far that were decided from quota.
    pub decided: u64,
}

struct Inner<L> {
    store: L,
    state: Mutex<State>,
    decided: AtomicU64,
}

#[derive(Default)]
struct State {
    quotas: HashMap<Key, Quota>,
    open: HashMap<ReservationId, Prefetched>,
    ended: VecDeque<ReservationId>,
    /// The store's time, and when it was that, for decisions the store is not asked about.
    clock: Option<(u64, Instant)>,
}

/// An admission of which a part came from quota.
#[derive(Debug, Clone)]
struct Prefetched {
    took: SmallVec<[Taken; 2]>,
    stage: Stage,
}

#[derive(Debug, Clone)]
struct Taken {
    record: Key,
    units: Units,
    until: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Open,
    /// The part of the quota is settled.
    Settled,
}

impl State {
    /// The store's time, as far as it is known.
    fn clock(&self, now: Instant) -> u64 {
        self.clock.map_or(0, |(us, at)| us + now.saturating_duration_since(at).as_micros() as u64)
    }

    /// `used` was used in place of what was taken.
    fn settle(&mut self, took: &Taken, scope: Option<&ScopeLimits>, used: &Units) {
        if let Some(quota) = self.quotas.get_mut(&took.record) {
            quota.settle(&took.units, used);
        } else if let Some(scope) = scope {
            // Forgotten by now, since nobody else was under this limit for long.
            let mut quota = Quota::new(scope, Instant::now());
            quota.settle(&took.units, used);
            self.quotas.insert(took.record.clone(), quota);
        }
    }

    /// Recognises a second settlement, for a while.
    fn remember_ended(&mut self, id: ReservationId) {
        self.ended.push_back(id);
        if self.ended.len() > ENDED_MAX
            && let Some(oldest) = self.ended.pop_front()
        {
            self.open.remove(&oldest);
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

    /// Asks the limiter inside for every decision.
    pub fn off(store: L) -> Self {
        let inner = Arc::new(Inner { store, state: Mutex::default(), decided: AtomicU64::new(0) });
        Self { inner, worker: None }
    }

    /// The limiter inside.
    pub fn store(&self) -> &L {
        &self.inner.store
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        let now = Instant::now();
        let state = self.inner.state();
        let held = state.quotas.values().map(|quota| quota.held(now));
        let held = held.fold([0; Kind::COUNT], |sum: Units, held| {
            std::array::from_fn(|k| sum[k].saturating_add(held[k]))
        });
        Status { held, decided: self.inner.decided.load(Ordering::Relaxed) }
    }

    /// Reports to the store what was settled so far; for the end of a process.
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

/// The scope without its buckets, if anything is left of it.
fn rest_of(scope: &ScopeLimits) -> Option<ScopeLimits> {
    scope.concurrency?;
    Some(ScopeLimits { buckets: [None; Kind::COUNT], ..scope.clone() })
}

/// What is asked of the store for a call of which these records' buckets are decided here.
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

    /// Takes from quota what can be; the scopes that want more chunks are seen to in the background.
    fn draw(self: &Arc<Self>, call: &Acquire) -> Option<Prefetched> {
        let now = Instant::now();
        let mut state = self.state();
        if let Some(known) = state.open.get(&call.id) {
            return Some(known.clone());
        }
        let room = state.open.len() < OPEN_MAX;
        let mut took: SmallVec<[Taken; 2]> = SmallVec::new();
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
                // Bounded: one per scope, and each by the store's deadline.
                tokio::spawn(self.clone().fetch(scope.record.clone(), charges, units));
            }
        }
        if took.is_empty() {
            return None;
        }
        let prefetched = Prefetched { took, stage: Stage::Open };
        state.open.insert(call.id, prefetched.clone());
        Some(prefetched)
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

    /// Nothing of this admission was or will be used.
    fn put_back(&self, id: ReservationId) {
        let mut state = self.state();
        let Some(prefetched) = state.open.remove(&id) else { return };
        for took in &prefetched.took {
            if let Some(quota) = state.quotas.get_mut(&took.record) {
                quota.put_back(&took.units, took.until);
            }
        }
    }

    /// The whole answer, of what the store said about the rest of the call.
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

    /// Settles the part of a reservation that came from quota: what it took, and whether this is its first settlement.
    /// `None` when all of it is the store's.
    fn settle_quota(&self, call: &Settle) -> Option<(SmallVec<[Taken; 2]>, bool)> {
        let mut state = self.state();
        let prefetched = state.open.get_mut(&call.id)?;
        let first = std::mem::replace(&mut prefetched.stage, Stage::Settled) == Stage::Open;
        let took = prefetched.took.clone();
        for took in took.iter().filter(|_| first) {
            let scope = call.scopes.iter().find(|scope| scope.record == took.record);
            let used = scope.map_or(took.units, |scope| units(scope, spent(&call.actual)));
            state.settle(took, scope, &used);
        }
        Some((took, first))
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

/// Every limit in its place: of the store where it was asked, of quota where that decided.
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
        let Some(prefetched) = inner.draw(call) else { return inner.store.acquire(call).await };
        inner.decided.fetch_add(prefetched.took.len() as u64, Ordering::Relaxed);
        let scopes = rest(&call.scopes, &prefetched.took);
        if scopes.is_empty() && call.candidates.is_empty() {
            return Ok(inner.full(call, &prefetched.took, None));
        }
        // On the heap: futures that hold a call each would grow with every layer.
        let part = Box::new(Acquire { scopes, ..call.clone() });
        match inner.store.acquire(&part).await {
            Ok(decision) => {
                let full = inner.full(call, &prefetched.took, Some(decision));
                if !matches!(full.outcome, Outcome::Granted { .. }) {
                    inner.put_back(call.id);
                }
                Ok(full)
            }
            Err(error) => {
                // Of unknown outcome: its caller settles it, or asks again, under the same id.
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
        // Usage is the store's also where nothing else is: it recognises the id.
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
        // What the store knows nothing of is remembered here, so that a second settlement is recognised.
        match (alone, first) {
            (true, true) => state.remember_ended(call.id),
            (true, false) => {}
            (false, _) => drop(state.open.remove(&call.id)),
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
