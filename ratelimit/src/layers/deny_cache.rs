//! The deny cache: refusals answered from memory.
//!
//! Without it, a tenant far above its limit costs the store a script call for each refusal. A bucket that refused one request
//! refuses every request of equal or larger cost until it has drained enough, unless something is given back. What this
//! process gives back is known at once ([`DenyCache::given_back`]). What other processes give back is not known, so a
//! refusal is kept for at most [`LIFE`]. A request may therefore be refused although it would fit into what *other*
//! processes gave back within the last 20 ms, but never because of an older refusal, and never after the time that
//! the store returned.
//!
//! Refusals because no lease or slot is free are not kept, because requests end at unknown times. A refusal is kept with its
//! limits, so that a changed limit is asked again.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;
use weir_runtime::RecentMap;

use crate::model::call::{Acquire, Decision, Outcome};
use crate::model::checks::{self, lines, reserved};
use crate::model::error::Error;
use crate::model::key::Key;
use crate::model::leaky_bucket::{FOREVER, Terms};
use crate::model::limiter::Limiter;
use crate::model::limits::{Mode, Scopes, Verdict, What};

/// The longest a refusal is kept.
pub const LIFE: Duration = Duration::from_millis(20);
/// Records with kept refusals.
const RECORDS_MAX: usize = 4_096;
/// Kept refusals of one record, which may be part of many combinations of scopes.
const PER_RECORD_MAX: usize = 16;
/// Stripes of the counts of releases.
const STRIPES: usize = 1_024;

/// The refusals that one process knows.
#[derive(Debug)]
pub struct DenyCache {
    records: Mutex<Records>,
    /// The number of records, which a call reads without the lock.
    len: AtomicUsize,
    /// Counts how often units were given back, by the hash of the record.
    given_back: Box<[AtomicU64]>,
    answered: AtomicU64,
}

/// The refusals of each record, kept for [`LIFE`] after the last one.
type Records = RecentMap<Key, SmallVec<[CachedRefusal; 1]>>;

/// The state before a call was sent; [`DenyCache::before`] takes it.
#[derive(Debug)]
pub struct Before(SmallVec<[u64; 6]>);

#[derive(Debug)]
struct CachedRefusal {
    scopes: Scopes,
    /// The cost of the call in every bucket of every scope, in order.
    amounts: Amounts,
    /// The bucket that refused: its position among these amounts, and among the limits of the decision.
    refusing: usize,
    limit: usize,
    decision: Decision,
    since: Instant,
    until: Instant,
}

type Amounts = SmallVec<[f64; 8]>;

impl Default for DenyCache {
    fn default() -> Self {
        Self {
            records: Mutex::new(RecentMap::new(RECORDS_MAX, LIFE)),
            len: AtomicUsize::new(0),
            given_back: (0..STRIPES).map(|_| AtomicU64::new(0)).collect(),
            answered: AtomicU64::new(0),
        }
    }
}

impl DenyCache {
    /// The refusal of a call if it is known without asking the store. The call's id must be new: only the store knows
    /// whether an id was granted before.
    pub fn answer(&self, call: &Acquire) -> Option<Decision> {
        if self.len.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let now = Instant::now();
        let records = self.records();
        let enforced = call.scopes.iter().filter(|scope| scope.mode == Mode::Enforce);
        let denial = enforced
            .filter_map(|scope| records.get(&scope.record, now))
            .flatten()
            .find(|denial| now < denial.until && denial.scopes == call.scopes && denial.covers(call))?;
        let decision = denial.decision_for(call, now);
        self.answered.fetch_add(1, Ordering::Relaxed);
        Some(decision)
    }

    /// Decides a call from memory if possible, else by `limiter`. Returns true if it was decided from memory. The
    /// call's id must be new, as for [`DenyCache::answer`].
    ///
    /// # Errors
    /// Those of the limiter.
    pub async fn acquire(&self, limiter: &impl Limiter, call: &Acquire) -> Result<(Decision, bool), Error> {
        if let Some(refusal) = self.answer(call) {
            return Ok((refusal, true));
        }
        let before = self.before(call);
        let decision = limiter.acquire(call).await?;
        self.note(call, &decision, &before);
        Ok((decision, false))
    }

    /// Refusals answered from memory.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Call it before the store is asked, and pass the result to [`DenyCache::note`] with the store's answer.
    pub fn before(&self, call: &Acquire) -> Before {
        Before(call.scopes.iter().map(|scope| self.stripe(&scope.record).load(Ordering::Acquire)).collect())
    }

    /// Keeps the store's decision if it is a refusal by a bucket.
    pub fn note(&self, call: &Acquire, decision: &Decision, before: &Before) {
        if !matches!(decision.outcome, Outcome::Limited { wait: Some(_) }) || decision.degraded {
            return;
        }
        let now = Instant::now();
        let Some((scope, denial)) = CachedRefusal::of(call, decision, now) else { return };
        let record = &call.scopes[scope].record;
        let mut records = self.records();
        // Units were given back while the store was asked, so the refusal may be older than that.
        if before.0.get(scope) != Some(&self.stripe(record).load(Ordering::Acquire)) {
            return;
        }
        records.touch(record, now);
        if let Some(denials) = records.get_or_insert_with(record.clone(), now, SmallVec::new) {
            denials.retain(|other| now < other.until && other.scopes != denial.scopes);
            if denials.len() < PER_RECORD_MAX {
                denials.push(denial);
            }
        }
        self.len.store(records.len(), Ordering::Relaxed);
    }

    /// Removes the refusals of records that have room again.
    pub fn given_back<'a>(&self, keys: impl IntoIterator<Item = &'a Key>) {
        for key in keys {
            self.stripe(key).fetch_add(1, Ordering::Release);
            if self.len.load(Ordering::Relaxed) > 0 {
                let mut records = self.records();
                records.remove(key);
                self.len.store(records.len(), Ordering::Relaxed);
            }
        }
    }

    fn stripe(&self, key: &Key) -> &AtomicU64 {
        &self.given_back[key.hash_known() as usize % STRIPES]
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn amounts(call: &Acquire) -> Amounts {
    call.scopes.iter().flat_map(|scope| lines(scope, reserved(call))).map(|line| line.amount).collect()
}

impl CachedRefusal {
    /// The refusal of a call, and the scope that refused for the longest time. `None` if a lease was missing and not
    /// a bucket full.
    fn of(call: &Acquire, decision: &Decision, now: Instant) -> Option<(usize, Self)> {
        let waits = decision.limits.iter().enumerate().filter_map(|(at, limit)| match limit.verdict {
            Verdict::Wait(wait) if limit.refuses(&call.scopes) => Some((at, limit, wait)),
            Verdict::Wait(_) | Verdict::Fits | Verdict::Never => None,
        });
        let (limit, refusing, wait) = waits.max_by_key(|(.., wait)| *wait)?;
        let What::Bucket(_) = refusing.what else { return None };
        let buckets_before = decision.limits[..limit].iter().filter(|l| matches!(l.what, What::Bucket(_)));
        let denial = Self {
            scopes: call.scopes.clone(),
            amounts: amounts(call),
            refusing: buckets_before.count(),
            limit,
            decision: decision.clone(),
            since: now,
            until: now + wait.min(LIFE),
        };
        Some((refusing.position_in(&call.scopes)?, denial))
    }

    /// Whether every limit would give this call the verdict it gave the refused one; the refusing limit may be asked
    /// for more.
    fn covers(&self, call: &Acquire) -> bool {
        let buckets = self.decision.limits.iter().filter(|limit| matches!(limit.what, What::Bucket(_)));
        let amounts = amounts(call);
        amounts.len() == self.amounts.len()
            && buckets.zip(amounts.iter().zip(&self.amounts)).enumerate().all(
                |(n, (limit, (asked, then)))| {
                    let What::Bucket(kind) = limit.what else { return false };
                    let unit = crate::model::leaky_bucket::unit(kind);
                    match limit.verdict {
                        _ if n == self.refusing => asked >= then && *asked <= limit.limit as f64 * unit,
                        Verdict::Fits => *asked <= then.max(limit.remaining as f64 * unit),
                        Verdict::Wait(_) | Verdict::Never => asked == then,
                    }
                },
            )
    }

    fn decision_for(&self, call: &Acquire, now: Instant) -> Decision {
        let passed = now.saturating_duration_since(self.since);
        let mut decision = self.decision.clone();
        decision.now_us = decision.now_us.saturating_add(passed.as_micros() as u64);
        let longer = self.longer(call);
        for (at, limit) in decision.limits.iter_mut().enumerate() {
            if limit.reset < FOREVER {
                limit.reset = limit.reset.saturating_sub(passed);
            }
            if let (Verdict::Wait(wait), What::Bucket(_)) = (&mut limit.verdict, limit.what) {
                if at == self.limit {
                    *wait = wait.saturating_add(longer);
                }
                *wait = wait.saturating_sub(passed).max(Duration::from_micros(1));
            }
        }
        let waits = decision.limits.iter().filter(|limit| limit.refuses(&call.scopes));
        let longest = waits.filter_map(|limit| match limit.verdict {
            Verdict::Wait(wait) => Some(wait),
            Verdict::Fits | Verdict::Never => None,
        });
        decision.outcome = Outcome::Limited { wait: longest.max() };
        decision
    }

    /// The additional wait of a call that costs more than the refused one.
    fn longer(&self, call: &Acquire) -> Duration {
        let more = amounts(call)[self.refusing] - self.amounts[self.refusing];
        let refusing = &self.decision.limits[self.limit];
        let What::Bucket(kind) = refusing.what else { return Duration::ZERO };
        let bucket = refusing.scope_in(&call.scopes).and_then(|scope| scope.buckets[kind as usize]);
        let Some(bucket) = bucket else { return Duration::ZERO };
        checks::micros(Terms::of(kind, &bucket).time_to_drain(more).unwrap_or(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::call::Settle;
    use crate::model::cost::Cost;
    use crate::model::id::ReservationId;
    use crate::model::key::{Scope, scope_keys};
    use crate::model::kind::{Bucket, Kind};
    use crate::model::limits::{ScopeLimits, WithoutStore};
    use crate::store::memory::MemoryLimiter;

    fn scope(name: Scope<'_>, buckets: &[(Kind, u64, u64)], concurrency: Option<u32>) -> ScopeLimits {
        let (record, leases) = scope_keys(name);
        let mut limits = ScopeLimits {
            record,
            leases,
            buckets: [None; Kind::COUNT],
            concurrency,
            mode: Mode::Enforce,
            without_store: WithoutStore::LocalShare,
            prefetch: Default::default(),
        };
        for (kind, capacity, rate) in buckets {
            let period = Duration::from_secs(60);
            limits.buckets[*kind as usize] = Some(Bucket { capacity: *capacity, rate: *rate, period });
        }
        limits
    }

    fn call(scopes: &Scopes, tokens: u64) -> Acquire {
        Acquire {
            id: ReservationId::now_v7(),
            cost: Cost::of_request(tokens, 0, 0),
            estimated: false,
            scopes: scopes.clone(),
            candidates: Vec::new(),
            lease_ttl: Duration::from_secs(15),
        }
    }

    async fn ask(store: &MemoryLimiter, denials: &DenyCache, call: &Acquire) -> Decision {
        let before = denials.before(call);
        let decision = store.acquire(call).await.expect("decided");
        denials.note(call, &decision, &before);
        decision
    }

    fn two() -> Scopes {
        [
            scope(Scope::Tenant("acme"), &[(Kind::Requests, 1000, 1000), (Kind::Tokens, 600, 600)], Some(9)),
            scope(Scope::Global, &[(Kind::Tokens, 10_000, 10_000)], None),
        ]
        .into_iter()
        .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_known_is_what_the_store_would_say() {
        let (store, denials, scopes) = (MemoryLimiter::new(), DenyCache::default(), two());
        assert!(denials.answer(&call(&scopes, 10)).is_none());
        ask(&store, &denials, &call(&scopes, 590)).await;
        assert!(denials.answer(&call(&scopes, 11)).is_none(), "granted calls are no refusals");
        ask(&store, &denials, &call(&scopes, 20)).await;
        for (tokens, later) in [(20, 0), (20, 7), (300, 5), (600, 3)] {
            tokio::time::advance(Duration::from_millis(later)).await;
            let known = denials.answer(&call(&scopes, tokens)).expect("known");
            let asked = store.acquire(&call(&scopes, tokens)).await.expect("decided");
            assert_eq!((known.outcome, known.now_us), (asked.outcome, asked.now_us), "{tokens} tokens");
            for (known, asked) in known.limits.iter().zip(&asked.limits) {
                assert_eq!((known.verdict, known.reset), (asked.verdict, asked.reset));
            }
        }
        assert!(denials.answer(&call(&scopes, 19)).is_none(), "less may fit");
        assert!(denials.answer(&call(&scopes, 601)).is_none(), "what never fits is another answer");
        tokio::time::advance(Duration::from_millis(6)).await;
        assert!(denials.answer(&call(&scopes, 20)).is_none(), "and not for long");
        assert_eq!(denials.answered(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_given_back_and_what_is_changed_is_asked_about() {
        let (store, denials, scopes) = (MemoryLimiter::new(), DenyCache::default(), two());
        let owner = call(&scopes, 600);
        ask(&store, &denials, &owner).await;
        ask(&store, &denials, &call(&scopes, 5)).await;
        assert!(denials.answer(&call(&scopes, 5)).is_some());
        let mut raised = scopes.clone();
        raised[0].buckets[Kind::Tokens as usize].as_mut().expect("limited").capacity = 700;
        assert!(denials.answer(&call(&raised, 5)).is_none(), "the limit was raised");
        denials.given_back([&scopes[1].record]);
        assert!(denials.answer(&call(&scopes, 5)).is_some(), "that was not what refused");
        // A refusal that was decided before the settlement and comes after it.
        let late = call(&scopes, 5);
        let before = denials.before(&late);
        let refused = store.acquire(&late).await.expect("decided");
        let actual = Cost::of_request(1, 0, 0);
        let end = Settle { id: owner.id, actual, scopes: scopes.clone(), slot: None, usage: None };
        assert!(store.settle(&end).await.expect("settled").applied);
        denials.given_back(end.scopes.iter().map(|scope| &scope.record));
        denials.note(&late, &refused, &before);
        assert!(denials.answer(&call(&scopes, 5)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn want_of_a_lease_is_always_asked_about() {
        let (store, denials) = (MemoryLimiter::new(), DenyCache::default());
        let scopes: Scopes =
            [scope(Scope::Tenant("acme"), &[(Kind::Tokens, 600, 600)], Some(1))].into_iter().collect();
        ask(&store, &denials, &call(&scopes, 1)).await;
        let refused = ask(&store, &denials, &call(&scopes, 1)).await;
        assert!(matches!(refused.outcome, Outcome::Limited { wait: Some(_) }));
        assert!(denials.answer(&call(&scopes, 1)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_bounded() {
        let (store, denials) = (MemoryLimiter::new(), DenyCache::default());
        for n in 0..RECORDS_MAX + 500 {
            let name = format!("t{n}");
            let scopes: Scopes =
                [scope(Scope::Tenant(&name), &[(Kind::Tokens, 10, 1)], None)].into_iter().collect();
            ask(&store, &denials, &call(&scopes, 10)).await;
            ask(&store, &denials, &call(&scopes, 10)).await;
        }
        assert_eq!(denials.records().len(), RECORDS_MAX);
        tokio::time::advance(LIFE).await;
        let scopes: Scopes =
            [scope(Scope::Tenant("late"), &[(Kind::Tokens, 10, 1)], None)].into_iter().collect();
        ask(&store, &denials, &call(&scopes, 10)).await;
        ask(&store, &denials, &call(&scopes, 10)).await;
        assert_eq!(denials.records().len(), 1, "what has expired makes room");
    }
}
