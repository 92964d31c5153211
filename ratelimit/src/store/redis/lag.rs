//! Detects that this process gets too little CPU.
//!
//! After a timeout it is not known which side was slow. In a starved process answers lie unread in the sockets while
//! timers expire. If such timeouts counted against the limit store, the gateway would decide without it and admit
//! what it refuses. So a task that wants to run every ten milliseconds measures how late it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The interval at which the monitor wants to run.
const TICK: Duration = Duration::from_millis(10);
/// The delay from which on the process counts as starved; well below the deadlines that it is compared with.
const LATE: Duration = Duration::from_millis(15);
/// The time after a late run for which the process still counts as starved.
const MEMORY: Duration = Duration::from_millis(250);

/// The monitor. Reading it costs one atomic load.
#[derive(Debug)]
pub(super) struct Lag {
    born: Instant,
    /// When the monitor last ran, in microseconds after `born`.
    last_tick: AtomicU64,
    /// When it was last late, in microseconds after `born`.
    last_late: AtomicU64,
}

impl Default for Lag {
    fn default() -> Self {
        Self { born: Instant::now(), last_tick: AtomicU64::new(0), last_late: AtomicU64::new(u64::MAX) }
    }
}

impl Lag {
    fn now(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Measures for ever.
    pub(super) async fn run(&self) {
        loop {
            let since = self.now();
            self.last_tick.store(since, Ordering::Relaxed);
            tokio::time::sleep(TICK).await;
            let now = self.now();
            if now.saturating_sub(since) > (TICK + LATE).as_micros() as u64 {
                self.last_late.store(now, Ordering::Relaxed);
            }
        }
    }

    /// Whether the monitor is late now or was shortly before.
    pub(super) fn starved(&self) -> bool {
        let now = self.now();
        let late_now =
            now.saturating_sub(self.last_tick.load(Ordering::Relaxed)) > (TICK + LATE).as_micros() as u64;
        let last_late = self.last_late.load(Ordering::Relaxed);
        late_now || (last_late != u64::MAX && now.saturating_sub(last_late) < MEMORY.as_micros() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_process_that_runs_in_time_is_not_starved_and_one_that_does_not_is_for_a_while() {
        let lag = std::sync::Arc::new(Lag::default());
        let task = tokio::spawn({
            let lag = lag.clone();
            async move { lag.run().await }
        });
        for _ in 0..20 {
            tokio::time::sleep(TICK).await;
            assert!(!lag.starved());
        }
        tokio::time::advance(Duration::from_millis(80)).await;
        assert!(lag.starved(), "late right now");
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(lag.starved(), "was late a moment ago");
        tokio::time::sleep(MEMORY).await;
        assert!(!lag.starved());
        task.abort();
    }
}
