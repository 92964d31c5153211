//! From what operators declare to what the limiter takes. The gateway and the limit service both come through here,
//! which is what makes them share buckets.

use std::time::Duration;

use weir_proto::resource::{self, Rates};

use crate::{Bucket, Kind, Mode, Scope, ScopeLimits, WithoutStore, scope_keys};

/// Two limits over one scope share its record, so they become one: of each kind the smaller capacity counts.
pub fn tightest(a: &ScopeLimits, mut b: ScopeLimits) -> ScopeLimits {
    for (mine, other) in b.buckets.iter_mut().zip(a.buckets) {
        *mine = match (*mine, other) {
            (Some(x), Some(y)) if (y.capacity, y.rate) < (x.capacity, x.rate) => Some(y),
            (None, other) => other,
            (mine, _) => mine,
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
    let mut buckets = [None; Kind::COUNT];
    for (kind, rate) in [
        (Kind::Requests, rates.requests_per_minute),
        (Kind::Tokens, rates.tokens_per_minute),
        (Kind::InputTokens, rates.input_tokens_per_minute),
        (Kind::OutputTokens, rates.output_tokens_per_minute),
    ] {
        buckets[kind as usize] = rate.map(|r| Bucket::per_minute(r, rates.burst_multiplier));
    }
    let mode = if rates.shadow { Mode::Shadow } else { Mode::Enforce };
    let without_store = match rates.without_store {
        resource::WithoutStore::LocalShare => WithoutStore::LocalShare,
        resource::WithoutStore::Open => WithoutStore::Open,
        resource::WithoutStore::Closed => WithoutStore::Closed,
    };
    ScopeLimits { record, leases, buckets, concurrency: rates.concurrency, mode, without_store }
}

/// How long a request may wait for a limit. What callers share and cannot plan for is waited for where the limit does
/// not say; what is a caller's own is refused at once, so that it learns of it.
pub fn max_wait(scope: Scope<'_>, rates: &Rates) -> Duration {
    rates.max_wait.unwrap_or(match scope {
        Scope::Global => Duration::from_secs(30),
        Scope::Model(_) => Duration::from_secs(10),
        Scope::Tenant(_) | Scope::ApiKey { .. } | Scope::TenantModel { .. } => Duration::ZERO,
    })
}
