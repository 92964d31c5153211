//! What this process last saw of the cluster's bucket states and of its requests in flight.
//!
//! Without the store a gateway starts its share from there and not from empty: a limit that was used up when the
//! store went away is used up for everybody.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::model::key::Key;
use crate::model::kind::Kind;
use crate::model::leaky_bucket::{BucketState, FOREVER, Terms};
use crate::model::limits::{LimitState, ScopeLimits, What};

/// What drains in so long is taken for used by others: of a limit that is used up it was, and their requests show here
/// only with the next answer. Microseconds.
const FRESH_US: f64 = 1e6;
/// Records remembered; past that the empty ones are forgotten, and new ones are not taken in.
const RECORDS_MAX: usize = 65_536;

#[derive(Debug, Clone, Copy)]
struct SeenBucket {
    bucket_state: BucketState,
    terms: Terms,
}

#[derive(Debug, Default)]
pub(super) struct LastSeen(Mutex<SeenState>);

#[derive(Debug, Default)]
struct SeenState {
    records: HashMap<Key, [Option<SeenBucket>; Kind::COUNT]>,
    /// Requests in flight by the key of their leases.
    in_flight: HashMap<Key, u32>,
}

impl LastSeen {
    /// What an answer of the store says about its scopes at `now`, microseconds of this process.
    pub(super) fn note(&self, scopes: &[ScopeLimits], limits: &[LimitState], now: f64) {
        let mut seen_state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let SeenState { records: seen, in_flight } = &mut *seen_state;
        for limit in limits {
            let Some(scope) = limit.scope_in(scopes) else { continue };
            let What::Bucket(kind) = limit.what else {
                let live = limit.limit.saturating_sub(limit.remaining);
                note_in_flight(in_flight, &scope.leases, u32::try_from(live).unwrap_or(u32::MAX));
                continue;
            };
            let Some(bucket) = scope.buckets[kind as usize] else { continue };
            let terms = Terms::of(kind, &bucket);
            let mut level = limit.limit.saturating_sub(limit.remaining) as f64 * terms.unit;
            if limit.remaining == 0 && limit.reset < FOREVER {
                // Debt shows only in the time it takes to drain.
                level = level.max(terms.drained(limit.reset.as_micros() as f64).min(terms.ceiling()));
            }
            let seen_bucket = SeenBucket { bucket_state: BucketState { level, ts: now }, terms };
            if let Some(record) = seen.get_mut(&scope.record) {
                record[kind as usize] = Some(seen_bucket);
                continue;
            }
            if seen.len() >= RECORDS_MAX {
                let full = |s: &SeenBucket| s.bucket_state.level_at(&s.terms, now) > 0.0;
                seen.retain(|_, record| record.iter().flatten().any(full));
            }
            if seen.len() < RECORDS_MAX {
                seen.entry(scope.record.clone()).or_default()[kind as usize] = Some(seen_bucket);
            }
        }
    }

    /// The level of a bucket state at `now` at the most, micro-units; zero when it was never seen.
    pub(super) fn level(&self, record: &Key, kind: Kind, now: f64) -> f64 {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seen_bucket = seen.records.get(record).and_then(|kinds| kinds[kind as usize]);
        seen_bucket.map_or(0.0, |SeenBucket { bucket_state, terms }| {
            let level = bucket_state.level_at(&terms, now);
            level.max((level + terms.drained(FRESH_US)).min(terms.cap))
        })
    }

    /// How many requests the whole cluster had in flight; `None` when that was never seen.
    pub(super) fn in_flight(&self, leases: &Key) -> Option<u32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).in_flight.get(leases).copied()
    }
}

fn note_in_flight(seen: &mut HashMap<Key, u32>, leases: &Key, live: u32) {
    if let Some(known) = seen.get_mut(leases) {
        *known = live;
        return;
    }
    if seen.len() >= RECORDS_MAX {
        seen.retain(|_, live| *live > 0);
    }
    if seen.len() < RECORDS_MAX {
        seen.insert(leases.clone(), live);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::key::{Scope, scope_keys};
    use crate::model::kind::Bucket;
    use crate::model::limits::{Mode, Verdict, WithoutStore};

    #[test]
    fn what_drains_in_a_second_is_taken_for_used_by_others() {
        let (record, leases) = scope_keys(Scope::Global);
        let mut buckets = [None; Kind::COUNT];
        buckets[0] = Some(Bucket { capacity: 60, rate: 60, period: Duration::from_secs(60) });
        let scope = ScopeLimits {
            record: record.clone(),
            leases,
            buckets,
            concurrency: None,
            mode: Mode::Enforce,
            without_store: WithoutStore::LocalShare,
            prefetch: Default::default(),
        };
        let used_up = LimitState {
            scope: record.clone(),
            what: What::Bucket(Kind::Requests),
            verdict: Verdict::Fits,
            limit: 60,
            remaining: 0,
            reset: Duration::from_secs(60),
        };
        let seen = LastSeen::default();
        seen.note(std::slice::from_ref(&scope), std::slice::from_ref(&used_up), 5e6);
        let level = |now| seen.level(&record, Kind::Requests, now) / 1e6;
        assert_eq!((level(5e6), level(6e6), level(9e6)), (60.0, 60.0, 57.0));
        let nearly = LimitState { remaining: 10, reset: Duration::from_secs(50), ..used_up };
        seen.note(std::slice::from_ref(&scope), &[nearly], 9e6);
        assert_eq!((level(9e6), level(11e6)), (51.0, 49.0), "others may have used one since");
    }
}
