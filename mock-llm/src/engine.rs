//! Slots and time: which request may generate, and how long each step takes.
//!
//! Invariant: an [`Active`] holds exactly one slot. However it ends (done, cut, or dropped because the client left),
//! the slot and the gauges are given back once, the gauges before the slot.

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::config::Config;
use crate::error::ApiError;
use crate::handle::Shared;
use crate::metrics::ModelMetrics;
use crate::rng::Rng;

/// The longest single delay, which bounds the delay of a tiny rate and a huge prompt.
const DELAY_MAX_S: f64 = 3600.0;

/// The model of a request and its number of tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Index in [`Config::models`].
    pub(crate) model: usize,
    pub(crate) prompt_tokens: u64,
    pub(crate) output_tokens: u64,
}

/// How an answer ended. `Open` at its drop means that the client left.
#[derive(Debug)]
enum End {
    Open,
    Done,
    Cut,
}

/// A request that holds a slot.
#[derive(Debug)]
pub(crate) struct Active {
    shared: Arc<Shared>,
    load: Load,
    arrived: Instant,
    first_token_seen: bool,
    end: End,
    _slot: OwnedSemaphorePermit,
}

impl Active {
    /// Waits for a slot, first come first served. Cancel-safe: a dropped wait leaves the queue and counts as
    /// cancelled.
    pub(crate) async fn acquire(
        shared: &Arc<Shared>,
        load: Load,
        arrived: Instant,
    ) -> Result<Self, ApiError> {
        let slots = Arc::clone(&shared.slots);
        let slot = match Arc::clone(&slots).try_acquire_owned() {
            Ok(slot) => slot,
            Err(_) => {
                let mut waiting = Waiting::enter(shared, load.model)?;
                // The semaphore is never closed; if it were, there would be no room.
                let slot = slots.acquire_owned().await.map_err(|_| ApiError::QueueFull)?;
                waiting.admitted = true;
                slot
            }
        };
        let metrics = &shared.metrics;
        let in_flight = metrics.in_flight.fetch_add(1, AcqRel) + 1;
        metrics.max_in_flight.fetch_max(in_flight, AcqRel);
        metrics.kv_tokens.fetch_add(load.prompt_tokens + load.output_tokens, Relaxed);
        let active = Self {
            shared: Arc::clone(shared),
            load,
            arrived,
            first_token_seen: false,
            end: End::Open,
            _slot: slot,
        };
        if let Some(model) = active.model() {
            model.running.fetch_add(1, Relaxed);
            model.prompt_tokens.fetch_add(load.prompt_tokens, Relaxed);
        }
        Ok(active)
    }

    fn model(&self) -> Option<&ModelMetrics> {
        self.shared.metrics.models.get(self.load.model)
    }

    /// Counts tokens that were handed to the connection.
    pub(crate) fn sent(&mut self, tokens: u64) {
        let Some(model) = self.shared.metrics.models.get(self.load.model) else { return };
        if !self.first_token_seen {
            self.first_token_seen = true;
            model.observe_first_token(self.arrived.elapsed());
        }
        model.generation_tokens.fetch_add(tokens, Relaxed);
    }

    /// Records that the whole answer was handed to the connection.
    pub(crate) fn done(mut self) {
        self.end = End::Done;
    }

    /// Records that a fault of this server ended the answer.
    pub(crate) fn cut(mut self) {
        self.end = End::Cut;
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let metrics = &self.shared.metrics;
        match self.end {
            End::Open => metrics.cancelled.fetch_add(1, Relaxed),
            End::Done => metrics.completed.fetch_add(1, Relaxed),
            End::Cut => metrics.cut.fetch_add(1, Relaxed),
        };
        if let Some(model) = self.model() {
            model.running.fetch_sub(1, Relaxed);
            if matches!(self.end, End::Done) {
                model.observe_done(self.arrived.elapsed());
            }
        }
        metrics.kv_tokens.fetch_sub(self.load.prompt_tokens + self.load.output_tokens, Relaxed);
        metrics.in_flight.fetch_sub(1, AcqRel);
    }
}

/// One place in the queue.
struct Waiting {
    shared: Arc<Shared>,
    model: usize,
    admitted: bool,
}

impl Waiting {
    fn enter(shared: &Arc<Shared>, model: usize) -> Result<Self, ApiError> {
        let queue = shared.config.queue;
        let waiting = &shared.metrics.waiting;
        if waiting.fetch_update(AcqRel, Relaxed, |waiting| (waiting < queue).then_some(waiting + 1)).is_err()
        {
            shared.metrics.rejected.fetch_add(1, Relaxed);
            return Err(ApiError::QueueFull);
        }
        if let Some(metrics) = shared.metrics.models.get(model) {
            metrics.waiting.fetch_add(1, Relaxed);
        }
        Ok(Self { shared: Arc::clone(shared), model, admitted: false })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let metrics = &self.shared.metrics;
        metrics.waiting.fetch_sub(1, AcqRel);
        if let Some(model) = metrics.models.get(self.model) {
            model.waiting.fetch_sub(1, Relaxed);
        }
        if !self.admitted {
            metrics.cancelled.fetch_add(1, Relaxed);
        }
    }
}

/// The times of one answer.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    prefill_s: f64,
    token_s: f64,
    jitter: f64,
    rng: Rng,
}

impl Pace {
    /// The `choices` answers of one request share the batch, so token events come that much sooner.
    pub(crate) fn new(config: &Config, prompt_tokens: u64, choices: u32, slow_factor: f64, rng: Rng) -> Self {
        let per_token = |rate: f64| if rate > 0.0 { slow_factor / rate } else { 0.0 };
        Self {
            prefill_s: prompt_tokens as f64 * per_token(config.prefill_tokens_per_s),
            token_s: per_token(config.decode_tokens_per_s) / f64::from(choices.max(1)),
            jitter: config.jitter,
            rng,
        }
    }

    /// Whether there are no delays.
    pub(crate) fn instant() -> Self {
        Self { prefill_s: 0.0, token_s: 0.0, jitter: 0.0, rng: Rng::new(0, 0) }
    }

    pub(crate) fn prefill(&self) -> Duration {
        seconds(self.prefill_s)
    }

    pub(crate) fn has_token_delay(&self) -> bool {
        self.token_s > 0.0
    }

    pub(crate) fn next_token(&mut self) -> Duration {
        let spread = self.jitter * (2.0 * self.rng.unit() - 1.0);
        seconds(self.token_s * (1.0 + spread))
    }

    /// The time of a whole answer. Jitter is drawn once, so the cost does not grow with the tokens.
    pub(crate) fn whole(&mut self, tokens: u64) -> Duration {
        let decode = self.next_token().as_secs_f64() * tokens as f64;
        seconds(self.prefill_s + decode)
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, DELAY_MAX_S))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pace_follows_rates_factor_and_jitter() {
        let config = Config { prefill_tokens_per_s: 100.0, decode_tokens_per_s: 10.0, ..Config::default() };
        let mut pace = Pace::new(&config, 50, 1, 2.0, Rng::new(0, 0));
        assert_eq!(pace.prefill(), Duration::from_secs(1));
        assert_eq!(pace.next_token(), Duration::from_millis(200));
        assert_eq!(pace.whole(5), Duration::from_secs(2));
        let config = Config { jitter: 0.5, ..config };
        let mut pace = Pace::new(&config, 50, 1, 1.0, Rng::new(0, 0));
        let delays: Vec<_> = (0..100).map(|_| pace.next_token().as_millis()).collect();
        assert!(delays.iter().all(|delay| (50..=150).contains(delay)), "{delays:?}");
        assert!(
            delays.iter().any(|delay| *delay < 80) && delays.iter().any(|delay| *delay > 120),
            "{delays:?}"
        );
    }

    #[test]
    fn absurd_rates_are_bounded_and_zero_means_no_delay() {
        let config = Config {
            prefill_tokens_per_s: f64::MIN_POSITIVE,
            decode_tokens_per_s: 1e-300,
            ..Config::default()
        };
        let mut pace = Pace::new(&config, u64::MAX, 1, 10_000.0, Rng::new(0, 0));
        assert_eq!(pace.prefill(), Duration::from_secs(3600));
        assert_eq!(pace.whole(u64::MAX), Duration::from_secs(3600));
        let mut pace = Pace::new(&Config::default(), 1000, 1, 100.0, Rng::new(0, 0));
        assert!(!pace.has_token_delay() && pace.whole(1000).is_zero());
    }

    #[tokio::test(start_paused = true)]
    async fn queue_is_first_come_first_served_and_bounded() {
        let shared = Arc::new(Shared::new(Config { slots: 1, queue: 2, ..Config::default() }));
        let load = Load { model: 0, prompt_tokens: 1, output_tokens: 1 };
        let first = Active::acquire(&shared, load, Instant::now()).await.unwrap();
        let mut second = std::pin::pin!(Active::acquire(&shared, load, Instant::now()));
        let mut third = Box::pin(Active::acquire(&shared, load, Instant::now()));
        let poll = |f: std::pin::Pin<&mut dyn Future<Output = Result<Active, ApiError>>>| {
            f.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
        };
        assert!(poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
        let refused = Active::acquire(&shared, load, Instant::now()).await;
        assert!(matches!(refused, Err(ApiError::QueueFull)));
        first.done();
        assert!(poll(third.as_mut()).is_pending(), "the second came first");
        let second = second.await.unwrap();
        drop(third);
        assert_eq!(shared.metrics.waiting.load(Relaxed), 0);
        assert_eq!(shared.metrics.cancelled.load(Relaxed), 1);
        second.cut();
        assert_eq!(shared.metrics.in_flight.load(Relaxed), 0);
        assert_eq!(shared.metrics.max_in_flight.load(Relaxed), 1);
        assert_eq!((shared.metrics.cut.load(Relaxed), shared.metrics.completed.load(Relaxed)), (1, 1));
    }
}
