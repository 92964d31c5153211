//! The retry budget: retries are a share of the requests, so that a failing pool is not hit several times as hard.

use std::time::Duration;

use tokio::time::Instant;

/// The bounds of a [`RetryBudget`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryConfig {
    /// Retries allowed per hundred requests.
    pub percent: f64,
    /// Retries allowed per second however few requests there are, or a quiet pool could never retry. The first ten seconds'
    /// worth is there from the start: a gateway that finds two of three backends broken with its first requests has
    /// earned nothing yet, and the third works.
    pub min_per_second: f64,
    /// Retries that may be saved up; bounds the burst when a backend dies after a calm time.
    pub burst: f64,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { percent: 10.0, min_per_second: 3.0, burst: 100.0 }
    }
}

/// What a budget begins with: what it would have earned without requests in this time. As in Finagle and linkerd, whose
/// budgets look back so far.
const RESERVE: Duration = Duration::from_secs(10);

/// A token bucket of retries.
#[derive(Debug)]
pub struct RetryBudget {
    config: RetryConfig,
    tokens: f64,
    filled_at: Instant,
}

impl RetryBudget {
    /// Starts with what `min_per_second` gives in ten seconds, and at most with the burst.
    pub fn new(config: RetryConfig, now: Instant) -> Self {
        let tokens = config.min_per_second * RESERVE.as_secs_f64();
        Self { config, tokens: tokens.min(config.burst), filled_at: now }
    }

    /// Changes the bounds; what is saved up stays, within the new bound.
    pub fn set_config(&mut self, config: RetryConfig) {
        self.config = config;
        self.tokens = self.tokens.min(config.burst);
    }

    /// Counts a request, its retries not included.
    pub fn deposit(&mut self) {
        self.tokens = (self.tokens + self.config.percent / 100.0).min(self.config.burst);
    }

    /// Takes a retry out of the budget, if there is one.
    pub fn withdraw(&mut self, now: Instant) -> bool {
        let elapsed: Duration = now.saturating_duration_since(self.filled_at);
        self.filled_at = self.filled_at.max(now);
        self.tokens =
            (self.tokens + elapsed.as_secs_f64() * self.config.min_per_second).min(self.config.burst);
        let granted = self.tokens >= 1.0;
        self.tokens -= f64::from(u8::from(granted));
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_share_of_the_requests() {
        let start = Instant::now();
        let config = RetryConfig { percent: 10.0, min_per_second: 0.0, burst: 100.0 };
        let mut budget = RetryBudget::new(config, start);
        let granted = (0..10_000).filter(|_| {
            budget.deposit();
            budget.withdraw(start)
        });
        let granted = granted.count();
        assert!((999..=1000).contains(&granted), "{granted}");
    }

    #[test]
    fn a_quiet_pool_may_still_retry_and_a_calm_one_saves_up_no_flood() {
        let start = Instant::now();
        let mut budget = RetryBudget::new(RetryConfig::default(), start);
        let burst = |budget: &mut RetryBudget, now| {
            std::iter::repeat_with(|| budget.withdraw(now)).take_while(|&ok| ok).count()
        };
        assert_eq!(burst(&mut budget, start), 30, "ten seconds' worth from the start");
        assert_eq!(burst(&mut budget, start + Duration::from_secs(1)), 3);
        assert_eq!(burst(&mut budget, start + Duration::from_secs(3600)), 100);
        assert!(!budget.withdraw(start), "time that runs backwards gives nothing");
    }
}
