//! A limit as its operator declared it. A bucket only knows its capacity, which is some periods' worth and not what anybody
//! wrote.

use weir_proto::resource::Period;
use weir_ratelimit::{Kind, LimitState, What};

use super::scope::ScopeEntry;

/// How much a limit allows in which time, and at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeclaredLimit {
    /// Units per period; without a period, units at the same time. Spend is in micro-dollars.
    pub amount: u64,
    /// "minute", "day", "week" or "month"; `None` for requests in flight.
    pub period: Option<&'static str>,
    /// The most that can be used at once.
    pub burst: u64,
}

/// What was declared for the limit of a scope that has this state.
pub fn declared(entry: &ScopeEntry, state: &LimitState) -> DeclaredLimit {
    declared_as(entry, state.what, state.limit)
}

/// What was declared for a limit whose bucket has this capacity.
pub fn declared_as(entry: &ScopeEntry, what: What, capacity: u64) -> DeclaredLimit {
    let at_once = DeclaredLimit { amount: capacity, period: None, burst: capacity };
    match what {
        What::Concurrency => at_once,
        What::Bucket(Kind::Spend) => {
            let period = entry.budget.as_ref().map(|budget| match budget.period {
                Period::Day => "day",
                Period::Week => "week",
                Period::Month => "month",
            });
            DeclaredLimit { period, ..at_once }
        }
        What::Bucket(kind) => match entry.limits.buckets[kind as usize] {
            Some(bucket) => DeclaredLimit { amount: bucket.rate, period: Some("minute"), burst: capacity },
            None => at_once,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use weir_proto::resource::Budget;
    use weir_ratelimit::{Bucket, Key, Mode, ScopeLimits, Verdict};

    use super::*;
    use crate::routing::scope::ScopeKind;

    #[test]
    fn a_rate_is_told_from_the_burst_and_money_has_its_period() {
        let mut buckets = [None; Kind::COUNT];
        buckets[Kind::Requests as usize] = Some(Bucket::per_minute(500, 5.0));
        let entry = ScopeEntry {
            limits: ScopeLimits {
                record: Key::global(),
                leases: Key::global(),
                buckets,
                concurrency: Some(10),
                mode: Mode::Enforce,
                without_store: Default::default(),
                prefetch: Default::default(),
            },
            kind: ScopeKind::Global,
            name: String::new(),
            max_wait: Duration::ZERO,
            budget: Some(Budget { micro_dollars: 7_000_000, period: Period::Week }),
            renews: None,
        };
        let of = |what, limit| {
            let (verdict, reset) = (Verdict::Fits, Duration::ZERO);
            let state = LimitState { scope: Key::global(), what, verdict, limit, remaining: limit, reset };
            let declared = declared(&entry, &state);
            (declared.amount, declared.period, declared.burst)
        };
        assert_eq!(of(What::Bucket(Kind::Requests), 2500), (500, Some("minute"), 2500));
        assert_eq!(of(What::Bucket(Kind::Spend), 7_000_000), (7_000_000, Some("week"), 7_000_000));
        assert_eq!(of(What::Concurrency, 10), (10, None, 10));
    }
}
