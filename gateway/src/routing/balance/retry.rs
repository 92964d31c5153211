//! The retry budget: limits retries to a share of the requests, so that retries do not multiply the load of a failing pool.
//!
//! Hedges are paid from it too, but only from what requests have earned: a retry follows a failure, while a hedge repeats
//! a call that may well be answered, and of few requests a fixed number per second would be all.

use std::time::Duration;

use tokio::time::Instant;

/// The bounds of a [`RetryBudget`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryConfig {
    /// Retries allowed per hundred requests.
    pub percent: f64,
    /// Retries allowed per second independent of the number of requests; without them a pool with few requests could never
    /// retry. The amount of ten seconds is available at the start: a gateway whose first requests meet two broken backends
    /// of three has earned no retries yet, and the third backend works.
    pub min_per_second: f64,
    /// The most retries that can accumulate. Bounds the burst when a backend fails after a time without retries.
    pub burst: f64,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { percent: 10.0, min_per_second: 3.0, burst: 100.0 }
    }
}

/// The time whose amount of `min_per_second` is available at the start. Finagle and linkerd use the same window.
const RESERVE: Duration = Duration::from_secs(10);

/// A token bucket of retries.
#[derive(Debug)]
pub struct RetryBudget {
    config: RetryConfig,
    tokens: f64,
    /// Of these, what requests have earned; retries take the rest first.
    earned: f64,
    filled_at: Instant,
}

impl RetryBudget {
    /// Starts with the amount of `min_per_second` for ten seconds, at most the burst.
    pub fn new(config: RetryConfig, now: Instant) -> Self {
        let tokens = config.min_per_second * RESERVE.as_secs_f64();
        Self { config, tokens: tokens.min(config.burst), earned: 0.0, filled_at: now }
    }

    /// Changes the bounds. Accumulated retries remain, up to the new burst.
    pub fn set_config(&mut self, config: RetryConfig) {
        self.config = config;
        self.tokens = self.tokens.min(config.burst);
        self.earned = self.earned.min(self.tokens);
    }

    /// Counts a request; retries are not counted.
    pub fn deposit(&mut self) {
        let share = self.config.percent / 100.0;
        self.tokens = (self.tokens + share).min(self.config.burst);
        self.earned = (self.earned + share).min(self.tokens);
    }

    /// Takes one retry from the budget. Returns false if none is left.
    pub fn withdraw(&mut self, now: Instant) -> bool {
        self.refill(now);
        let granted = self.tokens >= 1.0;
        self.tokens -= f64::from(u8::from(granted));
        self.earned = self.earned.min(self.tokens);
        granted
    }

    /// Takes a hedge out of the budget, if requests have earned one.
    pub fn withdraw_hedge(&mut self, now: Instant) -> bool {
        self.refill(now);
        let granted = self.earned >= 1.0;
        let taken = f64::from(u8::from(granted));
        (self.tokens, self.earned) = (self.tokens - taken, self.earned - taken);
        granted
    }

    fn refill(&mut self, now: Instant) {
        let elapsed: Duration = now.saturating_duration_since(self.filled_at);
        self.filled_at = self.filled_at.max(now);
        self.tokens =
            (self.tokens + elapsed.as_secs_f64() * self.config.min_per_second).min(self.config.burst);
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

    #[test]
    fn hedges_are_a_share_of_the_requests_whatever_the_time() {
        let start = Instant::now();
        let mut budget = RetryBudget::new(RetryConfig::default(), start);
        let hour = |hours: u32| start + hours * Duration::from_secs(3600);
        assert!(!budget.withdraw_hedge(hour(1)), "no request has earned one");
        let hedges = (0..1000u32).filter(|i| {
            budget.deposit();
            budget.withdraw_hedge(hour(1 + i))
        });
        let hedges = hedges.count();
        assert!((99..=100).contains(&hedges), "{hedges}");
    }

    #[test]
    fn retries_take_what_is_free_before_what_hedges_could_use() {
        let start = Instant::now();
        let config = RetryConfig { percent: 100.0, min_per_second: 1.0, burst: 100.0 };
        let mut budget = RetryBudget::new(config, start);
        (0..5).for_each(|_| budget.deposit());
        assert_eq!(
            (0..12).filter(|_| budget.withdraw(start)).count(),
            12,
            "ten from the start, two of five earned"
        );
        assert_eq!((0..9).filter(|_| budget.withdraw_hedge(start)).count(), 3);
        assert!(!budget.withdraw(start), "both are one budget");
    }

    proptest::proptest! {
        #[test]
        fn hedges_and_retries_together_stay_within_the_bound_of_retries(
            steps in proptest::collection::vec((0..3u8, 0..2000u64), 1..400),
            percent in 1..100u32,
            min_per_second in 0..20u32,
        ) {
            let config = RetryConfig {
                percent: f64::from(percent),
                min_per_second: f64::from(min_per_second),
                burst: 100.0,
            };
            let start = Instant::now();
            let (mut budget, mut now) = (RetryBudget::new(config, start), start);
            let (mut requests, mut retries, mut hedges) = (0.0, 0.0, 0.0);
            for (step, millis) in steps {
                now += Duration::from_millis(millis);
                match step {
                    0 => {
                        budget.deposit();
                        requests += 1.0;
                    }
                    1 => retries += f64::from(u8::from(budget.withdraw(now))),
                    _ => hedges += f64::from(u8::from(budget.withdraw_hedge(now))),
                }
                let earned = requests * config.percent / 100.0;
                let seconds = (now - start).as_secs_f64() + RESERVE.as_secs_f64();
                proptest::prop_assert!(hedges <= earned + 1e-6);
                proptest::prop_assert!(hedges + retries <= earned + seconds * config.min_per_second + 1e-6);
            }
        }
    }
}
