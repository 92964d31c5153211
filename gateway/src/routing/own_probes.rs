//! What this gateway's own liveness probes say of a backend.
//!
//! The cluster's verdict needs several observers, so a backend that one gateway alone cannot reach stays in use. The requests
//! of that gateway must not wait there until their deadline: its own probes find the backend *unreachable* for them.
//!
//! - A failure is a probe without an answer. A finding needs as many in a row as an observer's vote, and comes again with
//!   each further one. A request waits for the first finding after it was sent, so that an old one holds and frees nobody.
//! - Failures that are further apart than results of probes count are no row.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weir_probe::{FAILURES_IN_A_ROW, expiry};

/// The liveness probes of one backend by this gateway.
#[derive(Debug, Default)]
pub struct OwnProbes {
    row: Mutex<Row>,
    /// Rises with every finding; wraps.
    findings: AtomicU32,
}

#[derive(Debug, Default)]
struct Row {
    /// Failures in a row.
    failures: u32,
    /// When the last probe ended, or was asked for.
    last: Option<Instant>,
    /// How long the last result counts.
    expiry: Duration,
}

impl Row {
    fn is_over(&self, now: Instant) -> bool {
        self.last.is_none_or(|last| now.saturating_duration_since(last) > self.expiry)
    }
}

impl OwnProbes {
    fn row(&self) -> MutexGuard<'_, Row> {
        self.row.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a probe of a backend that is probed at this interval: whether there was an answer. Says whether the backend is
    /// unreachable by it.
    pub fn record(&self, answered: bool, interval: Duration) -> bool {
        let (mut row, now) = (self.row(), Instant::now());
        let before = if row.is_over(now) { 0 } else { row.failures };
        let failures = if answered { 0 } else { before.saturating_add(1) };
        *row = Row { failures, last: Some(now), expiry: expiry(interval) };
        let unreachable = failures >= FAILURES_IN_A_ROW;
        if unreachable {
            self.findings.fetch_add(1, Ordering::Relaxed);
        }
        unreachable
    }

    /// How many findings there were.
    pub fn findings(&self) -> u32 {
        self.findings.load(Ordering::Relaxed)
    }

    /// Whether the backend is unreachable by the last probes.
    pub fn is_unreachable(&self) -> bool {
        let row = self.row();
        row.failures >= FAILURES_IN_A_ROW && !row.is_over(Instant::now())
    }

    /// Whether a probe is to be made now, since none ended or was asked for within `interval`. Whoever is told so asks.
    pub fn is_due(&self, interval: Duration) -> bool {
        let (mut row, now) = (self.row(), Instant::now());
        let due = row.last.is_none_or(|last| now.saturating_duration_since(last) >= interval);
        if due {
            if row.is_over(now) {
                row.failures = 0;
            }
            row.last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn two_failures_in_a_row_are_a_finding_and_so_is_each_after_them() {
        let probes = OwnProbes::default();
        let mut found = Vec::new();
        for passed in [false, true, false, false, false, true, false] {
            found.push(probes.record(passed, INTERVAL));
            tokio::time::advance(INTERVAL).await;
        }
        assert_eq!(found, [false, false, false, true, true, false, false]);
        assert_eq!(probes.findings(), 2);
        assert!(!probes.is_unreachable());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_far_apart_are_no_row_and_an_old_finding_expires() {
        let probes = OwnProbes::default();
        assert!(!probes.record(false, INTERVAL));
        tokio::time::advance(expiry(INTERVAL) + Duration::from_secs(1)).await;
        assert!(!probes.record(false, INTERVAL), "the one before is too old");
        assert!(probes.record(false, INTERVAL) && probes.is_unreachable());
        tokio::time::advance(expiry(INTERVAL) + Duration::from_secs(1)).await;
        assert!(!probes.is_unreachable(), "nobody has said it since");
        assert!(probes.is_due(INTERVAL));
        assert!(!probes.is_unreachable(), "to ask is no result");
        assert!(!probes.record(false, INTERVAL), "nor does it make old failures new");
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_is_due_once_an_interval_whoever_asks_and_not_after_one_that_was_made() {
        let probes = OwnProbes::default();
        assert!(probes.is_due(INTERVAL) && !probes.is_due(INTERVAL));
        tokio::time::advance(INTERVAL - Duration::from_secs(1)).await;
        probes.record(true, INTERVAL);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!probes.is_due(INTERVAL));
        tokio::time::advance(INTERVAL).await;
        assert!(probes.is_due(INTERVAL) && !probes.is_due(INTERVAL));
    }
}
