//! The local share: the part of a limit that one gateway decides alone. Pure.

use crate::model::call::{Acquire, Bound, Candidate};
use crate::model::kind::Bucket;
use crate::model::limits::{Mode, ScopeLimits, WithoutStore};

/// The limit divided by the number of gateways. A share is at least one, so that a small limit works on every
/// gateway; so the shares exceed the limit by less than one unit per gateway.
pub(super) fn bucket(full: &Bucket, gateways: u32) -> Bucket {
    let least = u64::from(full.capacity > 0);
    Bucket {
        capacity: (full.capacity / u64::from(gateways)).max(least),
        rate: full.rate,
        // A bucket that never drains has no rate to divide; its period is the time for which it is remembered.
        period: if full.rate == 0 { full.period } else { full.period * gateways },
    }
}

/// Rounded down, so that a backend never gets more requests than it has slots, and at least one.
fn at_once(full: u32, gateways: u32) -> u32 {
    (full / gateways).max(u32::from(full > 0))
}

/// The requests that a gateway may have in flight during the first lease lifetime, given its own and the cluster's
/// when the store went away. A gateway with less than its share waits until those with more have come down to theirs;
/// until then it adds only its part of what was free. Of a limit below the number of gateways, every gateway gets
/// one.
pub(super) fn at_first(full: u32, gateways: u32, own: u32, in_flight: u32) -> u32 {
    let free = full.saturating_sub(in_flight) / gateways;
    let least = u32::from(full < gateways);
    own.saturating_add(free).max(least).min(at_once(full, gateways))
}

pub(super) fn scope(full: &ScopeLimits, gateways: u32) -> ScopeLimits {
    let mut share = full.clone();
    for bucket in share.buckets.iter_mut().flatten() {
        *bucket = self::bucket(bucket, gateways);
    }
    share.concurrency = full.concurrency.map(|most| at_once(most, gateways));
    if full.without_store == WithoutStore::Open {
        // Requests are counted although they are admitted: they are charged when the store is back.
        share.mode = Mode::Shadow;
    }
    share
}

pub(super) fn candidates(full: &[Candidate], gateways: u32) -> Vec<Candidate> {
    let share = |c: &Candidate| Candidate {
        leases: c.leases.clone(),
        max_concurrency: at_once(c.max_concurrency, gateways),
        bound: c.bound.map(|bound| Bound { estimate: bound.estimate.div_ceil(gateways), ..bound }),
    };
    full.iter().map(share).collect()
}

/// The local share of a call. A cost that fits the full limit but never the share is clamped to the share, like an
/// estimate: the call waits for an empty share, and its settlement leaves the debt.
pub(super) fn call(full: &Acquire, gateways: u32) -> Acquire {
    let never = full.scopes.iter().filter(|s| s.mode == Mode::Enforce).any(|scope| {
        let mut limited =
            crate::model::kind::Kind::ALL.into_iter().filter_map(|k| Some((k, scope.buckets[k as usize]?)));
        limited.any(|(kind, bucket)| full.cost.get(kind) > bucket.capacity)
    });
    Acquire {
        estimated: full.estimated || !never,
        scopes: full.scopes.iter().map(|s| scope(s, gateways)).collect(),
        candidates: candidates(&full.candidates, gateways),
        ..full.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::model::kind::Kind;
    use crate::model::leaky_bucket::Terms;

    proptest! {
        #[test]
        fn shares_of_what_is_in_flight_add_up_to_the_limit(most in 0u32..10_000, gateways in 1u32..50) {
            let together = at_once(most, gateways) * gateways;
            prop_assert!(together <= most.max(gateways) && (together > 0) == (most > 0));
        }

        /// Gateways never admit more than there is room for, however unevenly the requests in flight are spread.
        #[test]
        fn what_is_added_at_first_fits_beside_what_there_is(
            full in 1u32..1000, own in prop::collection::vec(0u32..50, 1..20)
        ) {
            let gateways = own.len() as u32;
            let in_flight: u32 = own.iter().sum();
            let after = own.iter().map(|own| (*own).max(at_first(full, gateways, *own, in_flight)));
            let idle = own.iter().filter(|own| **own == 0).count() as u32;
            let beside = if full < gateways { idle } else { 0 };
            prop_assert!(after.sum::<u32>() <= full.max(in_flight) + beside);
        }

        /// In any time, all gateways together admit what the full limit allows, and at most one unit each beyond it.
        #[test]
        fn shares_add_up_to_the_limit(
            capacity in 0u64..1_000_000, rate in 0u64..1_000_000, gateways in 1u32..50, us in 0u64..1 << 40
        ) {
            let full = Bucket { capacity, rate, period: Duration::from_secs(60) };
            let share = bucket(&full, gateways);
            let of = |b: &Bucket| Terms::of(Kind::Tokens, b).cap + Terms::of(Kind::Tokens, b).drained(us as f64);
            let together = of(&share) * f64::from(gateways);
            prop_assert!(together <= of(&full) + f64::from(gateways) * 1e6);
            prop_assert_eq!(share.capacity == 0, capacity == 0);
        }
    }
}
