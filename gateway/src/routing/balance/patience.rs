//! How long a backend may stay silent before another is tried as well.
//!
//! The time is learned: twice the 99th percentile of the time to the first byte, per unit of prompt, of the backend
//! itself, or of the model while the backend is too little known. Only answers teach it. Once it was waited for in vain
//! there is twice as much patience until the next answer, so that one that has become slower shows how slow; never more,
//! since each request it is tried with waits that long: one that is stuck must not cost its callers ever longer.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use super::speed::prompt_work;

/// Times the usual 99th percentile.
const MARGIN: f64 = 2.0;
/// Times that, after it was waited for in vain.
const STRAINED: f64 = 2.0;
/// Requests (weighted by age) after which a percentile is believed.
const SAMPLES_MIN: f64 = 10.0;
/// Half of what was seen is forgotten after this.
const HALF_LIFE: Duration = Duration::from_secs(60);
/// Buckets of the histogram: each is 15 % wider than the one before, from 1 ms to 20 minutes.
const BUCKETS: usize = 100;
const FIRST_BUCKET_S: f64 = 0.001;
const GROWTH: f64 = 1.15;

/// The bounds of patience.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PatienceConfig {
    /// While nothing is known of a model.
    pub initial: Duration,
    /// Never less than this, however fast the backend usually is.
    pub floor: Duration,
}

impl Default for PatienceConfig {
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

/// The patience with a model's backends, for streams and for whole answers apart.
#[derive(Debug, Default)]
pub struct Patience {
    by_id: HashMap<(u64, bool), Histogram>,
    /// Those last waited for in vain.
    strained: HashSet<(u64, bool)>,
    all: [Option<Histogram>; 2],
}

impl Patience {
    /// The first byte was there after `took`.
    pub fn add(&mut self, id: u64, stream: bool, prompt_tokens: u64, took: Duration, now: Instant) {
        self.strained.remove(&(id, stream));
        let seconds = took.as_secs_f64() / prompt_work(prompt_tokens);
        self.by_id.entry((id, stream)).or_insert_with(|| Histogram::new(now)).add(seconds, now);
        self.all[usize::from(stream)].get_or_insert_with(|| Histogram::new(now)).add(seconds, now);
    }

    /// It was waited for a first byte in vain.
    pub fn waited(&mut self, id: u64, stream: bool) {
        self.strained.insert((id, stream));
    }

    /// Forgets backends that are gone.
    pub fn retain(&mut self, mut keep: impl FnMut(u64) -> bool) {
        self.by_id.retain(|(id, _), _| keep(*id));
        self.strained.retain(|(id, _)| keep(*id));
    }

    /// How long to wait for the first byte of `id` before another backend is tried as well.
    pub fn with(&self, id: u64, stream: bool, prompt_tokens: u64, config: &PatienceConfig) -> Duration {
        let own = self.by_id.get(&(id, stream)).and_then(Histogram::p99);
        let usual = own.or_else(|| self.all[usize::from(stream)].as_ref().and_then(Histogram::p99));
        let learned = usual.map(|p99| Duration::from_secs_f64(MARGIN * p99 * prompt_work(prompt_tokens)));
        let patience = learned.unwrap_or(config.initial).max(config.floor);
        if self.strained.contains(&(id, stream)) { patience.mul_f64(STRAINED) } else { patience }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const CONFIG: PatienceConfig =
        PatienceConfig { initial: Duration::from_secs(5), floor: Duration::from_millis(50) };

    #[test]
    fn nothing_known_is_the_pools_own_word() {
        let (mut patience, now) = (Patience::default(), Instant::now());
        assert_eq!(patience.with(1, false, 0, &CONFIG), CONFIG.initial);
        for _ in 0..9 {
            patience.add(1, false, 0, 100 * MS, now);
        }
        assert_eq!(patience.with(1, false, 0, &CONFIG), CONFIG.initial, "nine are too few");
        patience.add(2, false, 0, 100 * MS, now);
        let learned = patience.with(1, false, 0, &CONFIG);
        assert!((200 * MS..240 * MS).contains(&learned), "{learned:?}: the model's, from both");
        assert_eq!(patience.with(1, true, 0, &CONFIG), CONFIG.initial, "streams are another matter");
    }

    #[test]
    fn it_is_well_above_the_usual_and_grows_with_the_prompt() {
        let (mut patience, now) = (Patience::default(), Instant::now());
        for i in 0..1000 {
            patience.add(1, true, 256, (if i % 100 < 98 { 100 } else { 400 }) * MS, now);
        }
        let usual = patience.with(1, true, 256, &CONFIG);
        assert!((800 * MS..940 * MS).contains(&usual), "{usual:?}");
        let long = patience.with(1, true, 256 * 19, &CONFIG);
        assert!((10 * usual).abs_diff(long) < MS, "{long:?}");
        assert_eq!(patience.with(1, true, 0, &PatienceConfig { floor: 3000 * MS, ..CONFIG }), 3000 * MS);
    }

    #[test]
    fn one_that_is_stuck_is_given_twice_the_time_and_never_more() {
        let (mut patience, now) = (Patience::default(), Instant::now());
        for _ in 0..100 {
            patience.add(1, false, 0, 100 * MS, now);
        }
        let usual = patience.with(1, false, 0, &CONFIG);
        for _ in 0..100 {
            patience.waited(1, false);
            assert_eq!(patience.with(1, false, 0, &CONFIG), 2 * usual);
        }
        patience.add(1, false, 0, 100 * MS, now);
        assert_eq!(patience.with(1, false, 0, &CONFIG), usual, "it answered");
    }

    #[test]
    fn one_that_has_become_slow_is_learned_and_the_past_forgotten() {
        let (mut patience, mut now) = (Patience::default(), Instant::now());
        for _ in 0..1000 {
            patience.add(1, false, 0, 100 * MS, now);
        }
        for _ in 0..20 {
            patience.add(1, false, 0, 1000 * MS, now);
        }
        assert!(patience.with(1, false, 0, &CONFIG) > 2000 * MS);
        for _ in 0..600 {
            now += Duration::from_secs(1);
            patience.add(1, false, 0, 100 * MS, now);
        }
        assert!(patience.with(1, false, 0, &CONFIG) < 240 * MS);
    }
}
