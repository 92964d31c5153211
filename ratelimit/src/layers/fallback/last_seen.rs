//! The last seen bucket states and requests in flight of the cluster.
//!
//! During an outage the local share starts with these values instead of empty buckets, so that a limit that was used up
//! before stays used up. A record is removed when its buckets have drained, however old it is: a record that is removed
//! earlier would lift a limit that is used up. So where all records count, new ones are not taken in.

use std::sync::{Mutex, PoisonError};

use crate::model::key::{Key, KeyMap};
use crate::model::kind::Kind;
use crate::model::leaky_bucket::{BucketState, FOREVER, Terms};
use crate::model::limits::{LimitState, ScopeLimits, What};

/// What drains within this time counts as used by others, in microseconds. A limit that is used up stays so because
/// of other gateways' requests, which are only seen with the next answer of the store.
const FRESH_US: f64 = 1e6;
/// Records that are kept. Beyond it, drained records are removed, and new ones are not added while all others count.
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
    records: KeyMap<[Option<SeenBucket>; Kind::COUNT]>,
    /// Requests in flight, by the key of the lease set.
    in_flight: KeyMap<u32>,
}

impl LastSeen {
    /// Records what an answer of the store says about its scopes. `now` is in microseconds of this process.
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
                // A debt beyond the capacity can only be seen in the time until the bucket is empty.
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

    /// The highest level that a bucket can have at `now`, in micro-units; zero if it was never seen.
    pub(super) fn level(&self, record: &Key, kind: Kind, now: f64) -> f64 {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seen_bucket = seen.records.get(record).and_then(|kinds| kinds[kind as usize]);
        seen_bucket.map_or(0.0, |SeenBucket { bucket_state, terms }| {
            let level = bucket_state.level_at(&terms, now);
            level.max((level + terms.drained(FRESH_US)).min(terms.cap))
        })
    }

    /// The requests in flight of the whole cluster; `None` if they were never seen.
    pub(super) fn in_flight(&self, leases: &Key) -> Option<u32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).in_flight.get(leases).copied()
    }
}

fn note_in_flight(seen: &mut KeyMap<u32>, leases: &Key, live: u32) {
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
