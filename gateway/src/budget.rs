//! Budgets: money per period of the calendar.
//!
//! A budget is a bucket that does not drain, in a record of its own for each period: a new period begins with an empty
//! one. Which period it is, the wall clock says, in UTC; gateways whose clocks differ disagree for as long as they
//! differ, around midnight. A request belongs to the period in which it was admitted.

use std::time::{Duration, SystemTime};

use weir_proto::resource::{Budget, Period};
use weir_ratelimit::{Bucket, Key, Kind, ScopeLimits};

use crate::calendar::{self, DAY, civil};
use crate::routing::scope::ScopeEntry;

/// 1 January 1970 was a Thursday: so many days after a Monday.
const EPOCH_AFTER_MONDAY: u64 = 3;

/// The stretch of time a moment belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    /// Days since 1970.
    first_day: u64,
    days: u64,
}

impl Span {
    fn of(period: Period, unix_seconds: u64) -> Self {
        let day = unix_seconds / DAY;
        match period {
            Period::Day => Self { first_day: day, days: 1 },
            Period::Week => Self { first_day: day - (day + EPOCH_AFTER_MONDAY) % 7, days: 7 },
            Period::Month => {
                let (year, month, of_month) = civil(day);
                let (next_year, next_month) = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
                let first_day = day - (of_month - 1);
                // The next month's first day lies 28 to 31 days on.
                let days = (28..=31).find(|n| civil(first_day + n) == (next_year, next_month, 1));
                Self { first_day, days: days.unwrap_or(31) }
            }
        }
    }
}

/// The budget of a scope as a scope of its own, as it is at that time.
pub fn scope(entry: &ScopeEntry, budget: &Budget, now: SystemTime) -> ScopeEntry {
    let unix = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let span = Span::of(budget.period, unix);
    let letter = match budget.period {
        Period::Day => 'd',
        Period::Week => 'w',
        Period::Month => 'm',
    };
    let label = format!("{letter}{}", calendar::label(span.first_day));
    let mut buckets = [None; Kind::COUNT];
    // It never drains; the period says how long its record is kept after the last write.
    let period = Duration::from_secs(span.days * DAY);
    buckets[Kind::Spend as usize] = Some(Bucket { capacity: budget.micro_dollars, rate: 0, period });
    let limits = ScopeLimits {
        record: Key::budget(&entry.limits.record, &label),
        leases: Key::budget(&entry.limits.leases, &label),
        buckets,
        concurrency: None,
        mode: entry.limits.mode,
        without_store: entry.limits.without_store,
        prefetch: Default::default(),
    };
    ScopeEntry {
        limits,
        kind: entry.kind,
        name: entry.name.clone(),
        max_wait: Duration::ZERO,
        budget: None,
        renews: Some(SystemTime::UNIX_EPOCH + Duration::from_secs((span.first_day + span.days) * DAY)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-23, a Monday, at half past one.
    const MONDAY: u64 = 20_780 * DAY + 5400;

    #[test]
    fn periods_begin_at_midnight_on_mondays_and_on_the_first() {
        let of = |period, at| Span::of(period, at);
        assert_eq!(of(Period::Day, MONDAY), Span { first_day: 20_780, days: 1 });
        assert_eq!(of(Period::Week, MONDAY), Span { first_day: 20_780, days: 7 });
        assert_eq!(of(Period::Week, MONDAY - DAY), Span { first_day: 20_773, days: 7 });
        assert_eq!(of(Period::Month, MONDAY), Span { first_day: 20_758, days: 30 });
        assert_eq!(of(Period::Month, 11_016 * DAY), Span { first_day: 10_988, days: 29 });
        assert_eq!(of(Period::Month, 20_453 * DAY), Span { first_day: 20_423, days: 31 });
    }
}
