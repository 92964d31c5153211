//! Spend limits: money per calendar period.
//!
//! A spend limit is a bucket that does not drain, with a record of its own for each period, so a new period begins
//! with an empty bucket. The wall clock decides which period it is, in UTC. Gateways whose clocks differ disagree
//! around midnight for as long as the clocks differ. A request belongs to the period in which it was admitted.

use std::time::{Duration, SystemTime};

use jiff::civil::{Date, date};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};
use weir_proto::resource::{Budget, Period};
use weir_ratelimit::{Bucket, Key, Kind, ScopeLimits};

use super::scope::ScopeEntry;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// A clock before this day is wrong. No record is older.
pub(crate) const FIRST_DAY: Date = date(1970, 1, 1);

/// The day of a time, in UTC.
pub(crate) fn day_of(time: SystemTime) -> Date {
    let time = Timestamp::try_from(time).unwrap_or(Timestamp::MAX);
    TimeZone::UTC.to_datetime(time).date().max(FIRST_DAY)
}

/// The day of a time, in UTC, and its end.
pub(crate) fn today(time: SystemTime) -> (Date, SystemTime) {
    let day = day_of(time);
    let end = TimeZone::UTC.to_timestamp(day.saturating_add(1.day()).to_datetime(Default::default()));
    // Without an end, a day that is wrong is looked at again each time.
    (day, end.map_or(time, Into::into))
}

/// Parses a day such as `2026-11-23`, from 1970 to 9999.
pub(crate) fn parse_day(text: &str) -> Option<Date> {
    let mut parts = text.splitn(3, '-');
    let year = parts.next()?.parse().ok()?;
    let (month, day) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Date::new(year, month, day).ok().filter(|day| *day >= FIRST_DAY)
}

/// The days of one period; `end` is the first day after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Days {
    first: Date,
    end: Date,
}

impl Days {
    fn of(period: Period, day: Date) -> Self {
        let (first, length) = match period {
            Period::Day => (day, 1.day()),
            Period::Week => {
                let since_monday = i64::from(day.weekday().to_monday_zero_offset());
                (day.saturating_sub(since_monday.days()), 7.days())
            }
            Period::Month => (day.first_of_month(), i64::from(day.days_in_month()).days()),
        };
        Self { first, end: first.saturating_add(length) }
    }

    fn length(self) -> Duration {
        DAY * u32::try_from((self.end - self.first).get_days()).unwrap_or(1)
    }
}

/// The spend limits among `entries`, each as a scope of its own for the period at `now`.
pub(crate) fn scopes(entries: &[&ScopeEntry], now: SystemTime) -> Vec<ScopeEntry> {
    entries.iter().filter_map(|entry| Some(scope(entry, entry.budget.as_ref()?, now))).collect()
}

fn scope(entry: &ScopeEntry, budget: &Budget, now: SystemTime) -> ScopeEntry {
    let days = Days::of(budget.period, day_of(now));
    let letter = match budget.period {
        Period::Day => 'd',
        Period::Week => 'w',
        Period::Month => 'm',
    };
    let label = format!("{letter}{}", days.first);
    let mut buckets = [None; Kind::COUNT];
    // A bucket that never drains. Its period is the time for which the record is kept after the last write.
    buckets[Kind::Spend as usize] =
        Some(Bucket { capacity: budget.micro_dollars, rate: 0, period: days.length() });
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
        budget: Some(*budget),
        renews: TimeZone::UTC.to_timestamp(days.end.to_datetime(Default::default())).ok().map(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_begin_at_midnight_on_mondays_and_on_the_first() {
        let monday = date(2026, 11, 23);
        let of = |period, day| {
            let days = Days::of(period, day);
            (days.first, days.length().as_secs() / DAY.as_secs())
        };
        assert_eq!(of(Period::Day, monday), (monday, 1));
        assert_eq!(of(Period::Week, monday), (monday, 7));
        assert_eq!(of(Period::Week, date(2026, 11, 22)), (date(2026, 11, 16), 7));
        assert_eq!(of(Period::Month, monday), (date(2026, 11, 1), 30));
        assert_eq!(of(Period::Month, date(2000, 2, 29)), (date(2000, 2, 1), 29));
        assert_eq!(of(Period::Month, date(2025, 12, 31)), (date(2025, 12, 1), 31));
    }

    #[test]
    fn days_change_at_midnight_utc() {
        let at = |seconds| day_of(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let midnight = 20_780 * DAY.as_secs();
        assert_eq!((at(midnight), at(midnight - 1)), (date(2026, 11, 23), date(2026, 11, 22)));
        assert_eq!(at(0), FIRST_DAY);
        assert_eq!(day_of(SystemTime::UNIX_EPOCH - DAY), FIRST_DAY, "a clock that is wrong");
    }

    #[test]
    fn days_are_read_back_as_they_are_written() {
        for day in [FIRST_DAY, date(2000, 2, 29), date(2026, 11, 23), date(9999, 12, 31)] {
            assert_eq!(parse_day(&day.to_string()), Some(day), "{day}");
        }
        assert_eq!(FIRST_DAY.to_string(), "1970-01-01");
        for wrong in
            ["", "2026", "2026-11", "2026-02-29", "2026-13-01", "1969-12-31", "x-1-1", "2026-11-23-1"]
        {
            assert_eq!(parse_day(wrong), None, "{wrong}");
        }
    }
}
