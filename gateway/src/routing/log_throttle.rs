//! Log lines about what others do, at a rate that they cannot choose.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Between two lines about the same thing.
const INTERVAL: Duration = Duration::from_secs(60);

#[expect(clippy::disallowed_methods, reason = "one start for all runtimes of a process, paused or not")]
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Lets one line in a minute pass and counts those it holds back. Never waits.
#[derive(Debug, Default)]
pub(crate) struct LogThrottle {
    /// Milliseconds from the start of the process until the next line may be written; zero is now.
    next: AtomicU64,
    held: AtomicU64,
}

impl LogThrottle {
    /// Whether to write a line now, and how many were held back since the last one.
    pub(crate) fn pass(&self) -> Option<u64> {
        self.pass_at(START.elapsed())
    }

    fn pass_at(&self, now: Duration) -> Option<u64> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let next = self.next.load(Ordering::Relaxed);
        let after = millis(now.saturating_add(INTERVAL));
        let due = next <= millis(now);
        // Of several at once one writes.
        if due && self.next.compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Some(self.held.swap(0, Ordering::Relaxed));
        }
        self.held.fetch_add(1, Ordering::Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_minute_passes_and_says_how_many_did_not() {
        let (throttle, second) = (LogThrottle::default(), Duration::from_secs(1));
        assert_eq!(throttle.pass_at(second), Some(0));
        assert!((2..61).all(|at| throttle.pass_at(second * at).is_none()));
        assert_eq!(throttle.pass_at(second * 61), Some(59));
        assert_eq!(throttle.pass_at(second * 200), Some(0));
    }
}
