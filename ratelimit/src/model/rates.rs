//! From what operators declare to what the limiter takes. The gateway and the limit service both come through here,
//! which is what makes them share buckets.

use std::time::Duration;

use weir_proto::resource::{self, Rates};

use crate::model::key::{Scope, scope_keys};
use crate::model::kind::{Bucket, Kind};
use crate::model::limits::{Mode, ScopeLimits, WithoutStore};

/// Two limits over one scope share its record, so they become one: of each kind the smaller capacity counts.
pub fn tightest(a: &ScopeLimits, mut b: ScopeLimits) -> ScopeLimits {
    let others = a.buckets.into_iter().zip(a.prefetch);
    for ((mine, aside), other) in b.buckets.iter_mut().zip(&mut b.prefetch).zip(others) {
        (*mine, *aside) = match (*mine, other) {
            (Some(x), (Some(y), aside)) if (y.capacity, y.rate) < (x.capacity, x.rate) => (Some(y), aside),
            (None, other) => other,
            (mine, _) => (mine, *aside),
        };
    }
    b.concurrency = match (a.concurrency, b.concurrency) {
        (Some(x), Some(y)) => Some(x.min(y)),
        (x, y) => x.or(y),
    };
    if a.mode == Mode::Enforce {
        b.mode = Mode::Enforce;
    }
    b
}

/// The limits of a scope with these rates.
pub fn scope_limits(scope: Scope<'_>, rates: &Rates) -> ScopeLimits {
    let (record, leases) = scope_keys(scope);
    let (mut buckets, mut prefetch) = ([None; Kind::COUNT], [0; Kind::COUNT]);
    let mode = if rates.shadow { Mode::Shadow } else { Mode::Enforce };
    for (kind, rate) in [
        (Kind::Requests, rates.requests_per_minute),
        (Kind::Tokens, rates.tokens_per_minute),
        (Kind::InputTokens, rates.input_tokens_per_minute),
        (Kind::OutputTokens, rates.output_tokens_per_minute),
    ] {
        let Some(mut bucket) = rate.map(|r| Bucket::per_minute(r, rates.burst_multiplier)) else { continue };
        let aside = bucket.capacity / 100 * u64::from(rates.prefetch_percent)
            + bucket.capacity % 100 * u64::from(rates.prefetch_percent) / 100;
        if mode == Mode::Enforce && aside > 1 {
            prefetch[kind as usize] = aside;
            bucket.capacity -= aside;
        }
        buckets[kind as usize] = Some(bucket);
    }
    let without_store = match rates.without_store {
        resource::WithoutStore::LocalShare => WithoutStore::LocalShare,
        resource::WithoutStore::Open => WithoutStore::Open,
        resource::WithoutStore::Closed => WithoutStore::Closed,
    };
    ScopeLimits { record, leases, buckets, concurrency: rates.concurrency, mode, without_store, prefetch }
}

/// How long a request may wait for a limit. What callers share and cannot plan for is waited for where the limit does
/// not say; what is a caller's own is refused at once, so that it learns of it.
pub fn max_wait(scope: Scope<'_>, rates: &Rates) -> Duration {
    rates.max_wait.unwrap_or(match scope {
        Scope::Global => Duration::from_secs(30),
        Scope::Model(_) | Scope::Account(_) | Scope::AccountModel { .. } => Duration::from_secs(10),
        Scope::Tenant(_) | Scope::ApiKey { .. } | Scope::TenantModel { .. } => Duration::ZERO,
    })
}
