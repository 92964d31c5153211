//! The hedge delay: how long a backend may stay silent before another is tried as well.
//!
//! The delay is learned: twice the 99th percentile of the time to the first byte, per unit of prompt, of the backend
//! itself, or of the model while the backend is too little known. Only answers teach it. After a first-byte timeout
//! the delay is twice as long until the next answer, so that one that has become slower shows how slow; never longer, since
//! each request that is tried with it waits that long: one that is stuck must not cost its callers ever more time.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use super::speed::prompt_work;

/// Times the usual 99th percentile.
const MARGIN: f64 = 2.0;
/// Times that, after a first-byte timeout.
const STRAINED: f64 = 2.0;
/// Requests (weighted by age) after which a percentile is believed.
const SAMPLES_MIN: f64 = 10.0;
/// Half of what was seen is forgotten after this.
const HALF_LIFE: Duration = Duration::from_secs(60);
/// Buckets of the histogram: each is 15 % wider than the one before, from 1 ms to 20 minutes.
const BUCKETS: usize = 100;
const FIRST_BUCKET_S: f64 = 0.001;
const GROWTH: f64 = 1.15;

/// The bounds of the delay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HedgeDelayConfig {
    /// While nothing is known of a model.
    pub initial: Duration,
    /// Never less than this, however fast the backend usually is.
    pub floor: Duration,
}

impl Default for HedgeDelayConfig {
    fn default() -> Self {
        Self { initial: Duration::from_secs(5), floor: Duration::from_millis(250) }
    }
}

/// A histogram that forgets.
#[derive(Debug)]
struct Histogram {
    buckets: Box<[f32; BUCKETS]>,
    forgotten_at: Instant,
}

impl Histogram {
    fn new(now: Instant) -> Self {
        Self { buckets: Box::new([0.0; BUCKETS]), forgotten_at: now }
    }

    fn add(&mut self, seconds: f64, now: Instant) {
        let age = now.saturating_duration_since(self.forgotten_at);
        // In steps of a second: one pass over the buckets is too much for each request.
        if age >= Duration::from_secs(1) {
            let keep = (-age.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2() as f32;
            self.buckets.iter_mut().for_each(|count| *count *= keep);
            self.forgotten_at = now;
        }
        let bucket = (seconds / FIRST_BUCKET_S).max(1.0).log(GROWTH).ceil() as usize;
        self.buckets[bucket.min(BUCKETS - 1)] += 1.0;
    }

    /// The upper edge of the bucket in which the 99th percentile lies.
    fn p99(&self) -> Option<f64> {
        let total: f64 = self.buckets.iter().map(|c| f64::from(*c)).sum();
        let mut left = total * 0.01;
        let slowest = self.buckets.iter().rposition(|count| {
            left -= f64::from(*count);
            left < 0.0
        })?;
        (total >= SAMPLES_MIN).then(|| FIRST_BUCKET_S * GROWTH.powi(slowest as i32))
    }
}

/// The hedge delays of a model's backends, for streams and for unary answers apart.
#[derive(Debug, Default)]
pub struct HedgeDelays {
    by_id: HashMap<(u64, bool), Histogram>,
    /// Those whose last request had a first-byte timeout.
    strained: HashSet<(u64, bool)>,
    all: [Option<Histogram>; 2],
}

impl HedgeDelays {
    /// The first byte was there after `took`.
    pub fn add(&mut self, id: u64, stream: bool, prompt_tokens: u64, took: Duration, now: Instant) {
        self.strained.remove(&(id, stream));
        let seconds = took.as_secs_f64() / prompt_work(prompt_tokens);
        self.by_id.entry((id, stream)).or_insert_with(|| Histogram::new(now)).add(seconds, now);
        self.all[usize::from(stream)].get_or_insert_with(|| Histogram::new(now)).add(seconds, now);
    }

    /// Records a first-byte timeout.
    pub fn timed_out(&mut self, id: u64, stream: bool) {
        self.strained.insert((id, stream));
    }

    /// Forgets backends that are gone.
    pub fn retain(&mut self, mut keep: impl FnMut(u64) -> bool) {
        self.by_id.retain(|(id, _), _| keep(*id));
        self.strained.retain(|(id, _)| keep(*id));
    }

    /// How long to wait for the first byte of `id` before another backend is tried as well.
    pub fn delay(&self, id: u64, stream: bool, prompt_tokens: u64, config: &HedgeDelayConfig) -> Duration {
        let own = self.by_id.get(&(id, stream)).and_then(Histogram::p99);
        let usual = own.or_else(|| self.all[usize::from(stream)].as_ref().and_then(Histogram::p99));
        let learned = usual.map(|p99| Duration::from_secs_f64(MARGIN * p99 * prompt_work(prompt_tokens)));
        let delay = learned.unwrap_or(config.initial).max(config.floor);
        if self.strained.contains(&(id, stream)) { delay.mul_f64(STRAINED) } else { delay }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const CONFIG: HedgeDelayConfig =
        HedgeDelayConfig { initial: Duration::from_secs(5), floor: Duration::from_millis(50) };

    #[test]
    fn nothing_known_is_the_pools_own_word() {
        let (mut delays, now) = (HedgeDelays::default(), Instant::now());
        assert_eq!(delays.delay(1, false, 0, &CONFIG), CONFIG.initial);
        for _ in 0..9 {
            delays.add(1, false, 0, 100 * MS, now);
        }
        assert_eq!(delays.delay(1, false, 0, &CONFIG), CONFIG.initial, "nine are too few");
        delays.add(2, false, 0, 100 * MS, now);
        let learned = delays.delay(1, false, 0, &CONFIG);
        assert!((200 * MS..240 * MS).contains(&learned), "{learned:?}: the model's, from both");
        assert_eq!(delays.delay(1, true, 0, &CONFIG), CONFIG.initial, "streams are another matter");
    }

    #[test]
    fn it_is_well_above_the_usual_and_grows_with_the_prompt() {
        let (mut delays, now) = (HedgeDelays::default(), Instant::now());
        for i in 0..1000 {
            delays.add(1, true, 256, (if i % 100 < 98 { 100 } else { 400 }) * MS, now);
        }
        let usual = delays.delay(1, true, 256, &CONFIG);
        assert!((800 * MS..940 * MS).contains(&usual), "{usual:?}");
        let long = delays.delay(1, true, 256 * 19, &CONFIG);
        assert!((10 * usual).abs_diff(long) < MS, "{long:?}");
        assert_eq!(delays.delay(1, true, 0, &HedgeDelayConfig { floor: 3000 * MS, ..CONFIG }), 3000 * MS);
    }

    #[test]
    fn one_that_is_stuck_is_given_twice_the_time_and_never_more() {
        let (mut delays, now) = (HedgeDelays::default(), Instant::now());
        for _ in 0..100 {
            delays.add(1, false, 0, 100 * MS, now);
        }
        let usual = delays.delay(1, false, 0, &CONFIG);
        for _ in 0..100 {
            delays.timed_out(1, false);
            assert_eq!(delays.delay(1, false, 0, &CONFIG), 2 * usual);
        }
        delays.add(1, false, 0, 100 * MS, now);
        assert_eq!(delays.delay(1, false, 0, &CONFIG), usual, "it answered");
    }

    #[test]
    fn one_that_has_become_slow_is_learned_and_the_past_forgotten() {
        let (mut delays, mut now) = (HedgeDelays::default(), Instant::now());
        for _ in 0..1000 {
            delays.add(1, false, 0, 100 * MS, now);
        }
        for _ in 0..20 {
            delays.add(1, false, 0, 1000 * MS, now);
        }
        assert!(delays.delay(1, false, 0, &CONFIG) > 2000 * MS);
        for _ in 0..600 {
            now += Duration::from_secs(1);
            delays.add(1, false, 0, 100 * MS, now);
        }
        assert!(delays.delay(1, false, 0, &CONFIG) < 240 * MS);
    }
}
