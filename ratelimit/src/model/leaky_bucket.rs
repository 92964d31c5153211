//! The arithmetic of bucket states: no clock, no I/O.
//!
//! Levels and costs are whole micro-units (1 unit = 1e6) held in IEEE doubles, because that is what a script
//! inside Redis computes with. Every function here has a twin in `scripts/leaky_bucket.lua` with the same operations
//! in the same order, so both sides give the same bits. Everything stays below 2^53, where doubles are exact
//! integers; where a product could leave that range, the result errs on the strict side: less drained, never
//! more.

use std::time::Duration;

use crate::model::kind::{Bucket, Kind};

/// Micro-units per unit.
pub const MICRO: f64 = 1e6;
/// What one unit of a kind is in the arithmetic: a million, so that slow rates drain in small steps. Money comes in
/// millionths already, and would not fit otherwise: budgets may be larger than 2^53 / 1e6 micro-dollars.
pub const fn unit(kind: Kind) -> f64 {
    match kind {
        Kind::Spend => 1.0,
        Kind::Requests | Kind::Tokens | Kind::InputTokens | Kind::OutputTokens => MICRO,
    }
}

/// No level is ever above this, debt included.
pub const LEVEL_MAX: f64 = Bucket::MAX_UNITS as f64 * MICRO;
/// Stands for "never" where a duration is wanted: 285 years, which can still be added to a clock.
pub const FOREVER: Duration = Duration::from_micros(FOREVER_US as u64);

const FOREVER_US: f64 = 9_007_199_254_740_991.0;
/// Products above this may have been rounded.
const EXACT: f64 = 4_503_599_627_370_496.0;

/// A bucket in the form the arithmetic wants: it drains `num / den` micro-units per microsecond.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// Capacity, micro-units.
    pub cap: f64,
    /// Numerator of the reduced drain rate; zero never drains.
    pub num: f64,
    /// Denominator of the reduced drain rate; of a bucket that never drains its period, microseconds.
    pub den: f64,
    /// One unit, see `unit()`.
    pub unit: f64,
}

/// What is stored per kind: how much was used and had not drained at a timestamp, in microseconds.
///
/// Each kind has its own timestamp. With one timestamp per record, a slow kind would lose its fraction of a
/// micro-unit each time a busy kind beside it is written, and could stop draining altogether.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BucketState {
    /// Used and not yet drained at `ts`, micro-units.
    pub level: f64,
    /// Microseconds of the store's clock.
    pub ts: f64,
}

/// What a bucket state says about a cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fit {
    /// Fits now.
    Now,
    /// Fits after so many microseconds, exactly.
    After(f64),
    /// Above capacity, or too full in a bucket that does not drain.
    Never,
}

impl Terms {
    /// The terms of a bucket that counts that kind.
    pub fn of(kind: Kind, bucket: &Bucket) -> Self {
        let unit = unit(kind);
        let num = u128::from(bucket.rate) * unit as u128;
        let den = bucket.period.as_micros().max(1);
        let divisor = if num == 0 { 1 } else { gcd(num, den) };
        Terms {
            cap: bucket.capacity as f64 * unit,
            num: (num / divisor) as f64,
            den: (den / divisor) as f64,
            unit,
        }
    }

    /// How long a record with this bucket state is kept from `now`, microseconds: until it is empty; a bucket state that never will
    /// be, for its period.
    pub fn kept(&self, bucket_state: &BucketState, now: f64) -> f64 {
        bucket_state.reset(self, now).unwrap_or(self.den)
    }

    /// The most a debit may raise the level to: one capacity of debt.
    pub fn ceiling(&self) -> f64 {
        (2.0 * self.cap).min(LEVEL_MAX)
    }

    /// Whole micro-units drained in so many microseconds, rounded down.
    pub fn drained(&self, elapsed: f64) -> f64 {
        if self.num == 0.0 || elapsed <= 0.0 {
            return 0.0;
        }
        let rest = elapsed % self.den;
        let whole = (elapsed - rest) / self.den * self.num;
        let product = rest * self.num;
        let mut part = (product - product % self.den) / self.den;
        if product > EXACT {
            part = (part - 4.0).max(0.0);
        }
        whole + part
    }

    /// The shortest time in microseconds that drains `need` micro-units; `None` when no time does.
    pub fn time_to_drain(&self, need: f64) -> Option<f64> {
        if need <= 0.0 {
            return Some(0.0);
        }
        if self.num == 0.0 {
            return None;
        }
        let rest = need % self.num;
        let product = rest * self.den;
        let over = product % self.num;
        let mut time = (need - rest) / self.num * self.den + (product - over) / self.num;
        if over > 0.0 {
            time += 1.0;
        }
        // Only where a product was rounded: enough time for the micro-units that rounding held back.
        if self.drained(time) < need {
            time += (8.0 * self.den / self.num).ceil() + 1.0;
        }
        Some(time.min(FOREVER_US))
    }
}

impl BucketState {
    /// The level at `now`. A time before the record's own timestamp counts as that timestamp.
    pub fn level_at(&self, terms: &Terms, now: f64) -> f64 {
        (self.level - terms.drained(now - self.ts)).max(0.0)
    }

    /// Whether `cost` fits at `now`, and if not, when. A retry exactly then fits, if nobody wrote meanwhile.
    pub fn judge(&self, terms: &Terms, cost: f64, now: f64) -> Fit {
        if cost > terms.cap {
            return Fit::Never;
        }
        let room = terms.cap - cost;
        if self.level_at(terms, now) <= room {
            return Fit::Now;
        }
        match terms.time_to_drain(self.level - room) {
            Some(time) => Fit::After((self.ts + time - now).clamp(1.0, FOREVER_US)),
            None => Fit::Never,
        }
    }

    /// Adds `delta` micro-units. A debit stops at the ceiling (or where the level already was), a credit at
    /// zero. A delta of zero leaves even the timestamp alone, so nothing is lost to rounding.
    pub fn apply(&self, terms: &Terms, delta: f64, now: f64) -> BucketState {
        if delta == 0.0 {
            return *self;
        }
        let level = self.level_at(terms, now);
        let next = if delta > 0.0 {
            (level + delta).min(terms.ceiling().max(level))
        } else {
            (level + delta).max(0.0)
        };
        BucketState { level: next, ts: self.ts.max(now) }
    }

    /// Whole units left at `now`, rounded down.
    pub fn remaining(&self, terms: &Terms, now: f64) -> u64 {
        ((terms.cap - self.level_at(terms, now)).max(0.0) / terms.unit).floor() as u64
    }

    /// Microseconds until the bucket state is empty; `None` when it never will be.
    pub fn reset(&self, terms: &Terms, now: f64) -> Option<f64> {
        if self.level_at(terms, now) == 0.0 {
            return Some(0.0);
        }
        let time = terms.time_to_drain(self.level)?;
        Some((self.ts + time - now).clamp(0.0, FOREVER_US))
    }
}

/// What a cost comes to in one bucket, micro-units. An estimate of tokens or money never exceeds the bucket:
/// what was guessed must not lock a small bucket out for ever. Scopes of different size may therefore reserve
/// different amounts, which the reservation records.
pub fn reserve(kind: Kind, units: u64, estimated: bool, bucket: &Bucket) -> f64 {
    let units = if estimated && kind != Kind::Requests { units.min(bucket.capacity) } else { units };
    amount(kind, units)
}

/// Units of a kind in the arithmetic. Amounts beyond the largest capacity count as just beyond it, which keeps them
/// exact.
pub fn amount(kind: Kind, units: u64) -> f64 {
    units.min(capacity_max(kind) + 1) as f64 * unit(kind)
}

/// The largest capacity and rate of a kind, units.
pub const fn capacity_max(kind: Kind) -> u64 {
    match kind {
        Kind::Spend => LEVEL_MAX as u64,
        Kind::Requests | Kind::Tokens | Kind::InputTokens | Kind::OutputTokens => Bucket::MAX_UNITS,
    }
}

fn gcd(a: u128, b: u128) -> u128 {
    // Nearly always both are small, and dividing them costs a tenth.
    if let (Ok(mut a), Ok(mut b)) = (u64::try_from(a), u64::try_from(b)) {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        return u128::from(a.max(1));
    }
    let (mut a, mut b) = (a, b);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(capacity: u64, rate: u64, period_us: u64) -> Bucket {
        Bucket { capacity, rate, period: Duration::from_micros(period_us) }
    }

    #[test]
    fn a_slow_meter_drains_beside_a_busy_one() {
        let terms = Terms::of(Kind::Tokens, &bucket(10, 1, 86_400_000_000));
        let mut bucket_state = BucketState::default().apply(&terms, 1e6, 0.0);
        for step in 0..1000 {
            bucket_state = bucket_state.apply(&terms, 0.0, f64::from(step) * 10_000.0);
        }
        assert_eq!(bucket_state.level_at(&terms, 86_400_000_000.0), 0.0);
    }

    #[test]
    fn rate_zero_never_drains() {
        let terms = Terms::of(Kind::Tokens, &bucket(1, 0, 60_000_000));
        let full = BucketState::default().apply(&terms, 1e6, 5.0);
        assert_eq!(full.level_at(&terms, 1e15), 1e6);
        assert_eq!(full.judge(&terms, 1e6, 1e15), Fit::Never);
        assert_eq!(full.reset(&terms, 1e15), None);
    }

    #[test]
    fn money_is_exact_far_beyond_what_tokens_can_count() {
        let terms = Terms::of(Kind::Spend, &bucket(1_000_000_000_000_000, 0, 86_400_000_000));
        let spent = BucketState::default().apply(&terms, amount(Kind::Spend, 999_999_999_999_999), 5.0);
        assert_eq!(spent.remaining(&terms, 6.0), 1);
        assert_eq!(spent.judge(&terms, 1.0, 6.0), Fit::Now);
        assert_eq!(spent.judge(&terms, 2.0, 6.0), Fit::Never);
        assert_eq!(terms.kept(&spent, 6.0), 86_400_000_000.0, "a budget is remembered for its period");
    }

    #[test]
    fn time_running_backwards_drains_nothing_and_is_waited_for() {
        let terms = Terms::of(Kind::Tokens, &bucket(1, 1, 1_000_000));
        let full = BucketState::default().apply(&terms, 1e6, 1_000.0);
        assert_eq!(full.level_at(&terms, 0.0), 1e6);
        assert_eq!(full.judge(&terms, 1e6, 0.0), Fit::After(1_001_000.0));
        assert_eq!(full.apply(&terms, -1.0, 0.0).ts, 1_000.0);
    }

    proptest! {
        #[test]
        fn never_drains_more_than_the_rate(
            rate in 0..=Bucket::MAX_UNITS, period in 1_000u64..=1 << 48, elapsed in 0u64..1 << 53
        ) {
            let terms = Terms::of(Kind::Tokens, &bucket(1, rate, period));
            let exact = u128::from(elapsed) * u128::from(rate) * 1_000_000 / u128::from(period);
            let got = terms.drained(elapsed as f64);
            // Past the largest level everything is empty, whatever the last bits say.
            prop_assert!(got >= LEVEL_MAX || got as u128 <= exact, "{got} > {exact}");
            prop_assert!(got >= LEVEL_MAX || exact - got as u128 <= 8);
        }

        #[test]
        fn a_wait_is_enough_and_where_exact_the_least(
            capacity in 1..=Bucket::MAX_UNITS, rate in 1..=Bucket::MAX_UNITS, seconds in 1u64..=40_000_000,
            used in 0f64..=2.0, cost in 0f64..=1.0, now in 0u64..1 << 50
        ) {
            let terms = Terms::of(Kind::Tokens, &bucket(capacity, rate, seconds * 1_000_000));
            let bucket_state = BucketState { level: (terms.ceiling() * used / 2.0).floor(), ts: 7.0 };
            let cost = (terms.cap * cost).floor();
            let now = now as f64;
            if let Fit::After(wait) = bucket_state.judge(&terms, cost, now) && wait < FOREVER_US / 2.0 {
                prop_assert_eq!(bucket_state.judge(&terms, cost, now + wait), Fit::Now);
                if terms.num * terms.den < EXACT {
                    prop_assert_ne!(bucket_state.judge(&terms, cost, now + wait - 1.0), Fit::Now);
                }
            }
        }
    }
}
