//! What both stores do with a call before they look at any state: judge its shape, and lay out its limits.

use std::time::Duration;

use smallvec::SmallVec;

use crate::model::call::{Acquire, Candidate, Charge, MAX_CANDIDATES, MAX_CHARGES, ORPHAN_SETS_MAX};
use crate::model::cost::Cost;
use crate::model::error::Error;
use crate::model::key::Key;
use crate::model::kind::{Bucket, Kind};
use crate::model::leaky_bucket::{self, FOREVER, Terms};
use crate::model::limits::{LimitState, MAX_SCOPES, ScopeLimits, Verdict, What};
use crate::model::usage::USAGE_RECORDS_MAX;

/// How long a reservation is remembered at least. Renewal refreshes it.
pub(crate) const RESERVATION_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long a settled id is recognised.
pub(crate) const TOMBSTONE_LIFE: Duration = Duration::from_secs(600);
/// Longest period of a bucket: a leap year. Keeps every product in `leaky_bucket` meaningful.
const PERIOD_MAX: Duration = Duration::from_secs(366 * 24 * 3600);
const LEASE_MAX: Duration = Duration::from_secs(24 * 3600);

/// One bucket of a scope with the amount this call brings to it, micro-units.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line {
    pub(crate) kind: Kind,
    pub(crate) terms: Terms,
    pub(crate) amount: f64,
}

/// The buckets of a scope, in record order.
pub(crate) fn lines(
    scope: &ScopeLimits,
    amount: impl Fn(Kind, &Bucket) -> f64,
) -> SmallVec<[Line; Kind::COUNT]> {
    let limited = Kind::ALL.into_iter().filter_map(|kind| scope.buckets[kind as usize].map(|b| (kind, b)));
    limited.map(|(kind, b)| Line { kind, terms: Terms::of(kind, &b), amount: amount(kind, &b) }).collect()
}

/// What an acquire reserves.
pub(crate) fn reserved(call: &Acquire) -> impl Fn(Kind, &Bucket) -> f64 {
    |kind, bucket| leaky_bucket::reserve(kind, call.cost.get(kind), call.estimated, bucket)
}

/// What a settlement charges in all.
pub(crate) fn spent(actual: &Cost) -> impl Fn(Kind, &Bucket) -> f64 {
    |kind, _| actual.amount(kind)
}

/// Every limit of these scopes in the order of [`crate::model::call::Decision::limits`], not yet judged.
pub(crate) fn blank_limits(scopes: &[ScopeLimits]) -> Vec<LimitState> {
    let mut limits = Vec::with_capacity(scopes.len() * 2);
    for of in scopes {
        let blank = |what, limit| LimitState {
            scope: of.record.clone(),
            what,
            verdict: Verdict::Fits,
            limit,
            remaining: 0,
            reset: Duration::ZERO,
        };
        for kind in Kind::ALL {
            if let Some(bucket) = of.buckets[kind as usize] {
                limits.push(blank(What::Bucket(kind), bucket.capacity));
            }
        }
        if let Some(limit) = of.concurrency {
            limits.push(blank(What::Concurrency, u64::from(limit)));
        }
    }
    limits
}

/// Microseconds rounded up, as a duration.
pub(crate) fn micros(us: f64) -> Duration {
    Duration::from_micros(us.max(0.0).ceil() as u64)
}

/// Until empty, where `None` is never.
pub(crate) fn reset(us: Option<f64>) -> Duration {
    us.map_or(FOREVER, micros)
}

pub(crate) fn check_acquire(call: &Acquire) -> Result<(), Error> {
    check_scopes(&call.scopes)?;
    check_candidates(&call.candidates)?;
    check_lease(call.lease_ttl)
}

pub(crate) fn check_scopes(scopes: &[ScopeLimits]) -> Result<(), Error> {
    if scopes.len() > MAX_SCOPES {
        return Err(Error::Invalid("too many scopes"));
    }
    for (n, scope) in scopes.iter().enumerate() {
        // A record judged twice in one call would be charged once.
        if scopes[..n].iter().any(|other| other.record == scope.record || other.leases == scope.leases) {
            return Err(Error::Invalid("two scopes share a record"));
        }
        for (kind, bucket) in Kind::ALL.iter().zip(&scope.buckets) {
            bucket.as_ref().map_or(Ok(()), |bucket| check_bucket(*kind, bucket))?;
        }
    }
    Ok(())
}

/// What must fit, micro-units.
pub(crate) fn needed(charge: &Charge) -> f64 {
    leaky_bucket::amount(charge.kind, charge.needed)
}

/// What is debited, or when negative given back, micro-units.
pub(crate) fn added(charge: &Charge) -> f64 {
    let amount = leaky_bucket::amount(charge.kind, charge.added.unsigned_abs());
    if charge.added < 0 { -amount } else { amount }
}

pub(crate) fn check_charges(charges: &[Charge]) -> Result<(), Error> {
    if charges.is_empty() || charges.len() > MAX_CHARGES {
        return Err(Error::Invalid("no charges or too many"));
    }
    charges.iter().try_for_each(|charge| check_bucket(charge.kind, &charge.bucket))
}

fn check_bucket(kind: Kind, bucket: &Bucket) -> Result<(), Error> {
    if bucket.capacity > leaky_bucket::capacity_max(kind) || bucket.rate > Bucket::MAX_UNITS {
        return Err(Error::Invalid("capacity or rate out of range"));
    }
    if bucket.period < Duration::from_millis(1) || bucket.period > PERIOD_MAX {
        return Err(Error::Invalid("period out of range"));
    }
    Ok(())
}

pub(crate) fn check_orphans(leases: &[Key]) -> Result<(), Error> {
    if leases.len() > ORPHAN_SETS_MAX {
        return Err(Error::Invalid("too many lease sets"));
    }
    Ok(())
}

pub(crate) fn check_usage(records: &[Key]) -> Result<(), Error> {
    if records.len() > USAGE_RECORDS_MAX {
        return Err(Error::Invalid("too many records"));
    }
    Ok(())
}

pub(crate) fn check_move(candidates: &[Candidate], lease_ttl: Duration) -> Result<(), Error> {
    check_candidates(candidates)?;
    check_lease(lease_ttl)
}

fn check_candidates(candidates: &[Candidate]) -> Result<(), Error> {
    if candidates.len() > MAX_CANDIDATES {
        return Err(Error::Invalid("too many candidates"));
    }
    Ok(())
}

pub(crate) fn check_lease(ttl: Duration) -> Result<(), Error> {
    if ttl < Duration::from_millis(1) || ttl > LEASE_MAX {
        return Err(Error::Invalid("lease time out of range"));
    }
    Ok(())
}
