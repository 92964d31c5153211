//! Signs that degrade a backend: busy answers, errors, slow answers, a full cache. A degraded backend has less weight; it is
//! never ejected because of these signs.

use std::time::Duration;

use super::evidence::{Observation, Outcome, Passive, Timestamp};
use super::params::{
    BASELINE_TAU, BUSY_FOR, CACHE_FULL, ERRORS_DEGRADE, ERRORS_HALF_WINDOW, ERRORS_MIN_REQUESTS,
    ERRORS_SUSPECT, READINGS, SLOW_FLOOR, SLOW_RATIO, TOKENS_RATIO,
};
use super::rule::Rule;
use super::tier::Tier;

/// An average whose samples lose weight with time.
#[derive(Debug, Clone, Copy, Default)]
struct Baseline(Option<(f64, Timestamp)>);

impl Baseline {
    fn value(&self) -> Option<f64> {
        self.0.map(|(value, _)| value)
    }

    fn learn(&mut self, sample: f64, now: Timestamp) {
        self.0 = Some(match self.0 {
            None => (sample, now),
            Some((value, at)) => {
                let dt = now.saturating_sub(at).as_secs_f64();
                let share = 1.0 - (-dt / BASELINE_TAU.as_secs_f64()).exp();
                (value + share * (sample - value), now)
            }
        });
    }
}

/// Counts requests over the last one to two half windows.
#[derive(Debug, Clone, Copy, Default)]
struct Window {
    began: Timestamp,
    current: (u64, u64),
    previous: (u64, u64),
}

impl Window {
    fn turn(&mut self, now: Timestamp) {
        let age = now.saturating_sub(self.began);
        if age >= ERRORS_HALF_WINDOW * 2 {
            (self.previous, self.current, self.began) = ((0, 0), (0, 0), now);
        } else if age >= ERRORS_HALF_WINDOW {
            (self.previous, self.current) = (self.current, (0, 0));
            self.began += ERRORS_HALF_WINDOW;
        }
    }

    fn count(&mut self, requests: u64, failures: u64, now: Timestamp) {
        self.turn(now);
        self.current.0 = self.current.0.saturating_add(requests);
        self.current.1 = self.current.1.saturating_add(failures);
    }

    /// The share of failures; `None` with too few requests.
    fn rate(&self) -> Option<f64> {
        let requests = self.current.0.saturating_add(self.previous.0);
        let failures = self.current.1.saturating_add(self.previous.1);
        (requests >= ERRORS_MIN_REQUESTS).then(|| failures as f64 / requests as f64)
    }
}

/// The signs of degradation of one backend.
#[derive(Debug, Clone, Default)]
pub(crate) struct Signs {
    busy_at: Option<Timestamp>,
    errors: Window,
    slow: u32,
    latency: Baseline,
    slow_tokens: u32,
    tokens: Baseline,
    last_tokens: Option<f64>,
    full: u32,
    cache: Option<f64>,
    queue: Option<u64>,
    missing: bool,
}

impl Signs {
    pub(crate) fn observe(&mut self, seen: &Observation, now: Timestamp) {
        if seen.outcome == Outcome::Busy {
            self.busy_at = Some(now);
        }
        match (seen.tier, seen.outcome, seen.latency) {
            (Tier::Readiness, Outcome::Pass, Some(latency)) => self.answered(latency, now),
            (Tier::Deep, Outcome::Pass, _) => {
                self.missing = false;
                self.read(seen, now);
            }
            (Tier::Deep, Outcome::Failed(super::evidence::Cause::WrongModel), _) => {
                self.missing = true;
                self.read(seen, now);
            }
            _ => {}
        }
    }

    fn answered(&mut self, latency: Duration, now: Timestamp) {
        let usual = self.latency.value();
        let slow = latency > SLOW_FLOOR && usual.is_some_and(|u| latency.as_secs_f64() > SLOW_RATIO * u);
        self.slow = if slow { self.slow.saturating_add(1) } else { 0 };
        // Slow answers change the baseline too, so that a lasting change becomes usual within an hour.
        self.latency.learn(latency.as_secs_f64(), now);
    }

    fn read(&mut self, seen: &Observation, now: Timestamp) {
        if let Some(tokens) = seen.reading.tokens_per_second.filter(|t| t.is_finite() && *t > 0.0) {
            let slow = self.tokens.value().is_some_and(|usual| tokens < TOKENS_RATIO * usual);
            self.slow_tokens = if slow { self.slow_tokens.saturating_add(1) } else { 0 };
            self.tokens.learn(tokens, now);
            self.last_tokens = Some(tokens);
        }
        self.queue = seen.reading.queue;
        self.cache = seen.reading.cache_used.filter(|used| used.is_finite());
        let full = self.cache.is_some_and(|used| used > CACHE_FULL);
        self.full = if full { self.full.saturating_add(1) } else { 0 };
    }

    pub(crate) fn requests(&mut self, passive: &Passive, now: Timestamp) {
        if passive.busy > 0 {
            self.busy_at = Some(now);
        }
        let failures = passive.failures();
        self.errors.count(passive.successes.saturating_add(failures), failures, now);
    }

    /// Whether so many requests fail that the backend becomes suspect.
    pub(crate) fn is_failing(&mut self, now: Timestamp) -> bool {
        self.errors.turn(now);
        self.errors.rate().is_some_and(|rate| rate >= ERRORS_SUSPECT)
    }

    /// The first rule that degrades the backend now, with a description for people.
    pub(crate) fn degrade(&mut self, now: Timestamp) -> Option<(Rule, String)> {
        self.errors.turn(now);
        if self.busy_at.is_some_and(|at| now.saturating_sub(at) < BUSY_FOR) {
            return Some((Rule::Busy, "answered that it is busy (429, or 503 with Retry-After)".into()));
        }
        if let Some(rate) = self.errors.rate().filter(|rate| *rate >= ERRORS_DEGRADE) {
            return Some((Rule::ErrorRate, format!("{:.0} % of recent requests failed", rate * 100.0)));
        }
        if self.missing {
            return Some((
                Rule::ModelMissing,
                "a model that the backend should serve is missing from its list".into(),
            ));
        }
        if self.slow >= READINGS {
            let usual = self.latency.value().unwrap_or_default();
            let text =
                format!("the last {} probes took over {SLOW_RATIO} x the usual {usual:.2} s", self.slow);
            return Some((Rule::SlowAnswers, text));
        }
        if let Some(tokens) = self.last_tokens.filter(|_| self.slow_tokens >= READINGS) {
            let usual = self.tokens.value().unwrap_or_default();
            return Some((Rule::SlowTokens, format!("{tokens:.0} tokens/s, usually {usual:.0}")));
        }
        if let Some(used) = self.cache.filter(|_| self.full >= READINGS) {
            return Some((Rule::CacheFull, format!("{:.0} % of its KV cache is in use", used * 100.0)));
        }
        None
    }

    pub(crate) const fn tokens_per_second(&self) -> Option<f64> {
        self.last_tokens
    }

    pub(crate) const fn cache_used(&self) -> Option<f64> {
        self.cache
    }

    pub(crate) const fn queue(&self) -> Option<u64> {
        self.queue
    }
}
