//! Days by their dates, in UTC.

use std::time::SystemTime;

/// Seconds of a day.
pub(crate) const DAY: u64 = 24 * 60 * 60;

/// The day of a moment: days since 1970.
pub(crate) fn day_of(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() / DAY
}

/// Year, month and day of the month of a day since 1970 (Howard Hinnant's algorithm, for days after 1970).
pub(crate) fn civil(day: u64) -> (u64, u64, u64) {
    let z = day + 719_468;
    let era = z / 146_097;
    let of_era = z % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day_of_month = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day_of_month)
}

/// A day as `2026-11-23`.
pub(crate) fn label(day: u64) -> String {
    let (year, month, day) = civil(day);
    format!("{year:04}-{month:02}-{day:02}")
}

/// The day of a label, from 1970 to 9999.
pub(crate) fn parse(label: &str) -> Option<u64> {
    let mut parts = label.splitn(3, '-').map(|part| part.parse::<u64>().ok());
    let (year, month, of_month) = (parts.next()??, parts.next()??, parts.next()??);
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&of_month) {
        return None;
    }
    // No month before it is shorter than 28 days, so the day is at most so far on.
    let least = (year - 1970) * 365 + (month - 1) * 28;
    (least..least + 2200).find(|day| civil(*day) == (year, month, of_month))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_their_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_780), (2026, 11, 23));
        assert_eq!((civil(20_453), civil(20_454)), ((2025, 12, 31), (2026, 1, 1)));
    }

    #[test]
    fn labels_are_read_back() {
        for day in [0, 58, 59, 11_016, 20_780, 50_000, 2_932_896] {
            assert_eq!(parse(&label(day)), Some(day), "{}", label(day));
        }
        for wrong in
            ["", "2026", "2026-11", "2026-02-29", "2026-13-01", "1969-12-31", "x-1-1", "2026-11-23-1"]
        {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
