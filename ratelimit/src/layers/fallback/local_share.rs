//! The local share: the part of a limit that one gateway decides alone. Pure.

use std::time::Duration;

use crate::model::call::{Acquire, Bound, Candidate};
use crate::model::kind::Bucket;
use crate::model::limits::{Mode, ScopeLimits, WithoutStore};

/// Among whom a limit is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sharing {
    /// The gateways that share the limits, this one included; at least one.
    pub(super) gateways: u32,
    /// When a share may be one although the limit is smaller than the number of gateways; zero when it may. Until then
    /// others may ask the store for all of it.
    pub(super) one_in: Duration,
}

impl Sharing {
    /// Whether a share may exceed what the division gives.
    const fn one_at_least(self) -> bool {
        self.one_in.is_zero()
    }
}

/// The limit divided by the number of gateways. The capacity is at least one, since what a gateway may use in the
/// long run is a part of the rate; see [`is_burst_withheld`].
pub(super) fn bucket(full: &Bucket, gateways: u32) -> Bucket {
    let least = u64::from(full.capacity > 0);
    Bucket {
        capacity: (full.capacity / u64::from(gateways)).max(least),
        rate: full.rate,
        // A bucket that never drains has no rate to divide; its period is the time for which it is remembered.
        period: if full.rate == 0 { full.period } else { full.period * gateways },
    }
}

/// Whether there is less than one unit for each gateway, so that a share starts used up and its first unit comes with
/// time.
pub(super) fn is_burst_withheld(full: &Bucket, gateways: u32) -> bool {
    full.capacity < u64::from(gateways)
}

/// Rounded down, so that a backend never gets more requests than it has slots. At least one, once everybody knows that
/// the store is away.
fn at_once(full: u32, sharing: Sharing) -> u32 {
    (full / sharing.gateways).max(u32::from(full > 0 && sharing.one_at_least()))
}

/// The requests that a gateway may have in flight during the first lease lifetime, given its own and the cluster's
/// when the store went away. A gateway with less than its share waits until those with more have come down to theirs;
/// until then it adds only its part of what was free. Of a limit below the number of gateways, every gateway gets
/// one, once everybody knows that the store is away.
pub(super) fn at_first(full: u32, sharing: Sharing, own: u32, in_flight: u32) -> u32 {
    let free = full.saturating_sub(in_flight) / sharing.gateways;
    let least = u32::from(full < sharing.gateways && sharing.one_at_least());
    own.saturating_add(free).max(least).min(at_once(full, sharing))
}

pub(super) fn scope(full: &ScopeLimits, sharing: Sharing) -> ScopeLimits {
    let mut share = full.clone();
    for bucket in share.buckets.iter_mut().flatten() {
        *bucket = self::bucket(bucket, sharing.gateways);
    }
    share.concurrency = full.concurrency.map(|most| at_once(most, sharing));
    if full.without_store == WithoutStore::Open {
        // Requests are counted although they are admitted: they are charged when the store is back.
        share.mode = Mode::Shadow;
    }
    share
}

pub(super) fn candidates(full: &[Candidate], sharing: Sharing) -> Vec<Candidate> {
    let share = |c: &Candidate| Candidate {
        leases: c.leases.clone(),
        max_concurrency: at_once(c.max_concurrency, sharing),
        bound: c.bound.map(|bound| Bound {
            elsewhere: bound.elsewhere / sharing.gateways,
            estimate: bound.estimate.div_ceil(sharing.gateways),
            ..bound
        }),
    };
    full.iter().map(share).collect()
}

/// The local share of a call. Once everybody knows that the store is away, a cost that fits the full limit but never
/// the share is clamped to the share, like an estimate: the call waits for an empty share, and its settlement leaves
/// the debt. Until then it does not fit.
pub(super) fn call(full: &Acquire, sharing: Sharing) -> Acquire {
    let never = full.scopes.iter().filter(|s| s.mode == Mode::Enforce).any(|scope| {
        let mut limited =
            crate::model::kind::Kind::ALL.into_iter().filter_map(|k| Some((k, scope.buckets[k as usize]?)));
        limited.any(|(kind, bucket)| full.cost.get(kind) > bucket.capacity)
    });
    Acquire {
        estimated: sharing.one_at_least() && (full.estimated || !never),
        scopes: full.scopes.iter().map(|s| scope(s, sharing)).collect(),
        candidates: candidates(&full.candidates, sharing),
        ..full.clone()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::kind::Kind;
    use crate::model::leaky_bucket::Terms;

    fn sharing(gateways: u32, everybody_knows: bool) -> Sharing {
        let one_in = if everybody_knows { Duration::ZERO } else { Duration::from_secs(1) };
        Sharing { gateways, one_in }
    }

    proptest! {
        #[test]
        fn shares_of_what_is_in_flight_add_up_to_the_limit(
            most in 0u32..10_000, gateways in 1u32..50, known: bool
        ) {
            let together = at_once(most, sharing(gateways, known)) * gateways;
            let allowed = if known { most.max(gateways) } else { most };
            prop_assert!(together <= allowed);
            prop_assert!(!known || (together > 0) == (most > 0));
        }

        /// Gateways never admit more than there is room for, however unevenly the requests in flight are spread.
        #[test]
        fn what_is_added_at_first_fits_beside_what_there_is(
            full in 1u32..1000, own in prop::collection::vec(0u32..50, 1..20), known: bool
        ) {
            let gateways = own.len() as u32;
            let in_flight: u32 = own.iter().sum();
            let share = |own: &u32| at_first(full, sharing(gateways, known), *own, in_flight);
            let after = own.iter().map(|own| (*own).max(share(own)));
            let idle = own.iter().filter(|own| **own == 0).count() as u32;
            let beside = if full < gateways && known { idle } else { 0 };
            prop_assert!(after.sum::<u32>() <= full.max(in_flight) + beside);
        }

        /// In any time, all gateways together admit what the full limit allows.
        #[test]
        fn shares_add_up_to_the_limit(
            capacity in 0u64..1_000_000, rate in 0u64..1_000_000, gateways in 1u32..50, us in 0u64..1 << 40
        ) {
            let full = Bucket { capacity, rate, period: Duration::from_secs(60) };
            let share = bucket(&full, gateways);
            let of = |b: &Bucket| Terms::of(Kind::Tokens, b).cap + Terms::of(Kind::Tokens, b).drained(us as f64);
            let withheld = is_burst_withheld(&full, gateways);
            let used_up = if withheld { Terms::of(Kind::Tokens, &share).cap } else { 0.0 };
            let together = (of(&share) - used_up) * f64::from(gateways);
            prop_assert!(together <= of(&full) + 1e-3 * f64::from(gateways));
            prop_assert_eq!(share.capacity == 0, capacity == 0);
        }
    }
}
