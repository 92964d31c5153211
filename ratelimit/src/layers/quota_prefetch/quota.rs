//! The quota of one scope in this process: units that were debited in the store and are not used yet. Pure: the time
//! is an argument.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::call::{Charge, ChargeRule};
use crate::model::key::Key;
use crate::model::kind::{Bucket, Kind};
use crate::model::leaky_bucket::{FOREVER, Terms};
use crate::model::limits::{LimitState, ScopeLimits, Verdict, What};

/// The time for which a chunk may be used.
pub const VALID: Duration = Duration::from_secs(1);
/// Whole units by kind.
pub(super) type Units = [u64; Kind::COUNT];

/// The admissions per second from which on quota is prefetched for a scope.
const HOT_PER_S: f64 = 50.0;
/// A chunk covers the demand of this time.
const HORIZON: Duration = Duration::from_millis(100);
/// The time constant of the average demand.
const WINDOW: Duration = Duration::from_millis(500);
/// The pause after the store has refused a chunk.
const BACKOFF: Duration = Duration::from_millis(50);
/// If less than this fraction of the capacity is left (one in `KEEP_FREE`), nothing is prefetched, so that the store
/// decides every request near the limit.
const KEEP_FREE: u64 = 4;
/// A scope without calls for this time is forgotten.
const IDLE: Duration = Duration::from_secs(60);

/// Units that were debited together.
#[derive(Debug)]
struct Chunk {
    left: Units,
    until: Instant,
}

/// The quota of one scope in this process.
#[derive(Debug)]
pub(super) struct Quota {
    limits: ScopeLimits,
    chunks: Vec<Chunk>,
    /// Admissions and units per second, at the last measurement.
    demand: [f64; Kind::COUNT + 1],
    /// Admissions and units asked for since then.
    asked: [u64; Kind::COUNT + 1],
    measured: Instant,
    taking: bool,
    not_before: Instant,
    /// Usage that is not reported to the store: more, or if negative less, than the store knows.
    owed: [i64; Kind::COUNT],
    /// The last state of each kind that the store returned, and when.
    seen: [Option<(LimitState, Instant)>; Kind::COUNT],
    used: Instant,
}

impl Quota {
    pub(super) fn new(limits: &ScopeLimits, now: Instant) -> Self {
        Self {
            limits: ScopeLimits { concurrency: None, ..limits.clone() },
            chunks: Vec::new(),
            demand: [0.0; Kind::COUNT + 1],
            asked: [0; Kind::COUNT + 1],
            measured: now,
            taking: false,
            not_before: now,
            owed: [0; Kind::COUNT],
            seen: Default::default(),
            used: now,
        }
    }

    /// Takes over the limit of the latest call. Quota of a different limit is given back.
    pub(super) fn follow(&mut self, limits: &ScopeLimits) {
        if self.limits.buckets != limits.buckets || self.limits.prefetch != limits.prefetch {
            self.limits = ScopeLimits { concurrency: None, ..limits.clone() };
            for chunk in std::mem::take(&mut self.chunks) {
                self.return_to_store(&chunk.left);
            }
            self.seen = Default::default();
        }
    }

    /// Uses units of every limited kind, all or none. Returns until when they are valid, so that they can be put
    /// back.
    pub(super) fn take(&mut self, units: &Units, now: Instant) -> Option<Instant> {
        self.used = now;
        self.asked[Kind::COUNT] += 1;
        (0..Kind::COUNT).for_each(|k| self.asked[k] = self.asked[k].saturating_add(units[k]));
        self.expire(now);
        let enough = |k: usize| self.chunks.iter().map(|chunk| chunk.left[k]).sum::<u64>() >= units[k];
        let limited = |k: usize| self.limits.buckets[k].is_some();
        if self.chunks.is_empty() || !(0..Kind::COUNT).filter(|k| limited(*k)).all(enough) {
            return None;
        }
        let mut until = now + VALID;
        for k in (0..Kind::COUNT).filter(|k| self.limits.buckets[*k].is_some()) {
            let mut missing = units[k];
            for chunk in self.chunks.iter_mut().filter(|chunk| chunk.left[k] > 0) {
                if missing == 0 {
                    break;
                }
                let from_here = missing.min(chunk.left[k]);
                chunk.left[k] -= from_here;
                missing -= from_here;
                until = until.min(chunk.until);
            }
        }
        Some(until)
    }

    /// Puts back units that were not used.
    pub(super) fn put_back(&mut self, units: &Units, until: Instant) {
        self.chunks.insert(0, Chunk { left: *units, until });
    }

    /// Settles a request that used `used` instead of `took`.
    pub(super) fn settle(&mut self, took: &Units, used: &Units) {
        for k in (0..Kind::COUNT).filter(|k| self.limits.buckets[*k].is_some()) {
            let more = i64::try_from(used[k]).unwrap_or(i64::MAX);
            let less = i64::try_from(took[k]).unwrap_or(i64::MAX);
            self.owed[k] = self.owed[k].saturating_add(more.saturating_sub(less));
        }
    }

    /// Gives back expired chunks.
    fn expire(&mut self, now: Instant) {
        let old: Vec<Chunk> = self.chunks.extract_if(.., |chunk| now >= chunk.until).collect();
        old.iter().for_each(|chunk| self.return_to_store(&chunk.left));
        self.chunks.retain(|chunk| chunk.left.iter().any(|left| *left > 0));
    }

    fn return_to_store(&mut self, left: &Units) {
        self.settle(left, &[0; Kind::COUNT]);
    }

    /// Units held now.
    pub(super) fn held(&self, now: Instant) -> Units {
        let good = self.chunks.iter().filter(|chunk| now < chunk.until);
        good.fold([0; Kind::COUNT], |sum, chunk| {
            std::array::from_fn(|k| sum[k].saturating_add(chunk.left[k]))
        })
    }

    /// Whether nothing would be lost if the quota were forgotten.
    pub(super) fn is_idle(&self, now: Instant) -> bool {
        !self.taking
            && self.chunks.is_empty()
            && self.owed == [0; Kind::COUNT]
            && now.saturating_duration_since(self.used) > IDLE
    }

    /// The charges for a chunk and its units, if it is time for one. [`Quota::taken`] must follow.
    ///
    /// Each charge is at most half of the set-aside part. The second bucket bounds what all processes take within
    /// [`VALID`].
    pub(super) fn want(&mut self, now: Instant) -> Option<(Vec<Charge>, Units)> {
        self.measure(now);
        self.expire(now);
        if self.taking || now < self.not_before || self.demand[Kind::COUNT] < HOT_PER_S {
            return None;
        }
        let held = self.held(now);
        let mut units = [0; Kind::COUNT];
        let mut low = false;
        let mut charges = Vec::new();
        for kind in Kind::ALL {
            let k = kind as usize;
            let Some(bucket) = self.limits.buckets[k] else { continue };
            let aside = set_aside(self.limits.prefetch[k]);
            let wanted = (self.demand[k] * HORIZON.as_secs_f64()).ceil() as u64;
            // No process takes all of the set-aside part.
            units[k] = wanted.max(1).min(aside.capacity.div_ceil(4));
            low |= held[k] < units[k] / 2 + 1;
            let of_one = (self.demand[k] / self.demand[Kind::COUNT]).ceil() as u64;
            if units[k] == 0 || units[k] < of_one {
                return None;
            }
            let count = i64::try_from(units[k]).ok()?;
            let charge = |record: Key, bucket: Bucket, free: u64| Charge {
                record,
                kind,
                bucket,
                needed: units[k].saturating_add(free),
                added: count,
                rule: ChargeRule::AllOrNothing,
            };
            charges.push(charge(self.limits.record.clone(), bucket, bucket.capacity / KEEP_FREE));
            charges.push(charge(Key::prefetch(&self.limits.record), aside, 0));
        }
        if !low || charges.is_empty() {
            return None;
        }
        self.taking = true;
        Some((charges, units))
    }

    /// Records whether a chunk that was asked for at `sent` was granted.
    pub(super) fn taken(
        &mut self,
        units: Option<&Units>,
        limits: &[LimitState],
        sent: Instant,
        now: Instant,
    ) {
        self.taking = false;
        match units {
            Some(units) => self.chunks.push(Chunk { left: *units, until: sent + VALID }),
            None => self.not_before = now + BACKOFF,
        }
        // Each kind has two charges: of the limit and of the set-aside part.
        for limit in limits.iter().step_by(2) {
            if let What::Bucket(kind) = limit.what {
                self.seen[kind as usize] = Some((limit.clone(), now));
            }
        }
    }

    /// Records a chunk of unknown outcome. If the store granted it, it stays charged and is not used.
    pub(super) fn lost(&mut self, now: Instant) {
        self.taking = false;
        self.not_before = now + BACKOFF;
    }

    /// The state of a limit of this scope, as far as it is known here.
    pub(super) fn limit_state(&self, kind: Kind, now: Instant) -> Option<LimitState> {
        let bucket = self.limits.buckets[kind as usize]?;
        let held = self.held(now)[kind as usize];
        let (remaining, reset) = match &self.seen[kind as usize] {
            Some((seen, at)) => {
                let passed = now.saturating_duration_since(*at);
                let reset = if seen.reset < FOREVER { seen.reset.saturating_sub(passed) } else { seen.reset };
                let terms = Terms::of(kind, &bucket);
                let drained = (terms.drained(passed.as_micros() as f64) / terms.unit).floor() as u64;
                (seen.remaining.saturating_add(drained).saturating_add(held).min(bucket.capacity), reset)
            }
            None => (bucket.capacity, Duration::ZERO),
        };
        let (scope, what) = (self.limits.record.clone(), What::Bucket(kind));
        Some(LimitState { scope, what, verdict: Verdict::Fits, limit: bucket.capacity, remaining, reset })
    }

    /// The charges to report to the store.
    pub(super) fn owed(&mut self, now: Instant) -> Vec<Charge> {
        self.expire(now);
        let mut charges = Vec::new();
        for kind in Kind::ALL {
            let owed = std::mem::take(&mut self.owed[kind as usize]);
            let Some(bucket) = self.limits.buckets[kind as usize].filter(|_| owed != 0) else { continue };
            let record = self.limits.record.clone();
            charges.push(Charge { record, kind, bucket, needed: 0, added: owed, rule: ChargeRule::Note });
        }
        charges
    }

    /// Records that a report failed or that its outcome is unknown. A debit is reported again; a credit is made once
    /// or not at all.
    pub(super) fn not_reported(&mut self, charge: &Charge, unknown: bool) {
        if charge.added > 0 || !unknown {
            let owed = &mut self.owed[charge.kind as usize];
            *owed = owed.saturating_add(charge.added);
        }
    }

    fn measure(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.measured);
        if passed < Duration::from_millis(10) {
            return;
        }
        let weight = 1.0 - (-passed.as_secs_f64() / WINDOW.as_secs_f64()).exp();
        for (demand, asked) in self.demand.iter_mut().zip(&mut self.asked) {
            let rate = std::mem::take(asked) as f64 / passed.as_secs_f64();
            *demand += (rate - *demand) * weight;
        }
        self.measured = now;
    }
}

/// The bucket that bounds the quota of all processes. What they take within [`VALID`] is at most its capacity and
/// what drains meanwhile, together twice its capacity: the set-aside part.
pub(super) fn set_aside(units: u64) -> Bucket {
    Bucket { capacity: units / 2, rate: units / 2, period: VALID }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Chunks granted within the life of a chunk never exceed the set-aside part.
        #[test]
        fn what_is_held_is_never_more_than_what_is_set_aside(
            aside in 2u64..100_000, takes in prop::collection::vec((0u64..400_000, 1u64..50_000), 1..60)
        ) {
            let bucket = set_aside(aside);
            let terms = Terms::of(Kind::Tokens, &bucket);
            let mut bucket_state = crate::model::leaky_bucket::BucketState::default();
            let (mut now, mut granted) = (0u64, Vec::new());
            for (pause, units) in takes {
                now += pause;
                let units = units.min(bucket.capacity);
                let cost = units as f64 * terms.unit;
                if bucket_state.judge(&terms, cost, now as f64) == crate::model::leaky_bucket::Fit::Now {
                    bucket_state = bucket_state.apply(&terms, cost, now as f64);
                    granted.push((now, units));
                }
                let valid = VALID.as_micros() as u64;
                let held: u64 = granted.iter().filter(|(at, _)| now - at < valid).map(|(_, units)| units).sum();
                prop_assert!(held <= aside, "{held} of {aside}");
            }
        }
    }
}
