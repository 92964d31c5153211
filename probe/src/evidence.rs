//! What probes of one observer prove together.

use std::time::Duration;

/// Consecutive failures before an observer's probes count against a backend: one failure may be a lost packet.
pub const FAILURES_IN_A_ROW: u32 = 2;

/// A result expires after this number of intervals, so that two probes may be lost.
const EXPIRY_INTERVALS: u32 = 3;
/// The shortest expiry: a result must outlive the probes that confirm it.
const EXPIRY_MIN: Duration = Duration::from_secs(15);

/// How long a result counts, where probes of one observer are so far apart.
pub fn expiry(interval: Duration) -> Duration {
    interval.saturating_mul(EXPIRY_INTERVALS).max(EXPIRY_MIN)
}
