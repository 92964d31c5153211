//! The hedge delay: how long a backend may stay silent before another is tried as well.
//!
//! The delay is learned: twice the 99th percentile of the time to the first byte, per unit of prompt, of the latest
//! answers of the backend itself. Before enough of them are known there is none: a call that is made twice is billed
//! twice, and that is never done on a guess. Only answers teach it, and only answers make it forget, so that a model that
//! is asked once a minute is learned as well as a busy one. After a first-byte timeout the delay is twice as long until
//! the next answer, so that one that has become slower shows how slow; never longer, since each request that is tried
//! with it waits that long: one that is stuck must not cost its callers ever more time.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::speed::prompt_work;

/// Times the usual 99th percentile.
const MARGIN: f64 = 2.0;
/// Times that, after a first-byte timeout.
const STRAINED: f64 = 2.0;
/// Answers after which a percentile is believed. Of so few it is the slowest one: of lognormal times (sigma 1) about
/// one answer in a hundred takes twice as long as that.
const SAMPLES_MIN: usize = 20;
/// The latest answers that are remembered.
const SAMPLES_MAX: usize = 200;
/// Buckets of the histogram: each is 15 % wider than the one before, from 1 ms to 20 minutes.
const BUCKETS: usize = 100;
const FIRST_BUCKET_S: f64 = 0.001;
const GROWTH: f64 = 1.15;

/// The bounds of the delay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HedgeDelayConfig {
    /// Never less than this, however fast the backend usually is.
    pub floor: Duration,
    /// Whether answers that are not streamed have a delay.
    pub unary: bool,
}

impl Default for HedgeDelayConfig {
    fn default() -> Self {
        Self { floor: Duration::from_millis(250), unary: false }
    }
}

/// A histogram of the latest [`SAMPLES_MAX`] samples.
#[derive(Debug)]
struct Histogram {
    buckets: Box<[u16; BUCKETS]>,
    /// The bucket of each sample; from the oldest on it is overwritten once it is full.
    latest: Vec<u8>,
    oldest: usize,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: Box::new([0; BUCKETS]), latest: Vec::new(), oldest: 0 }
    }
}

impl Histogram {
    fn add(&mut self, seconds: f64) {
        let bucket = (seconds / FIRST_BUCKET_S).max(1.0).log(GROWTH).ceil() as usize;
        let bucket = bucket.min(BUCKETS - 1);
        self.buckets[bucket] += 1;
        match self.latest.len() < SAMPLES_MAX {
            true => self.latest.push(bucket as u8),
            false => {
                let forgotten = std::mem::replace(&mut self.latest[self.oldest], bucket as u8);
                self.buckets[usize::from(forgotten)] -= 1;
                self.oldest = (self.oldest + 1) % SAMPLES_MAX;
            }
        }
    }

    /// The upper edge of the bucket in which the 99th percentile lies, once enough is known.
    fn p99(&self) -> Option<f64> {
        let samples = self.latest.len();
        if samples < SAMPLES_MIN {
            return None;
        }
        let mut slower = samples / 100;
        let at = self.buckets.iter().rposition(|count| {
            let here = usize::from(*count);
            let reached = here > slower;
            slower = slower.saturating_sub(here);
            reached
        })?;
        Some(FIRST_BUCKET_S * GROWTH.powi(at as i32))
    }
}

/// The hedge delays of a model's backends, for streams and for unary answers apart.
#[derive(Debug, Default)]
pub struct HedgeDelays {
    by_id: HashMap<(u64, bool), Histogram>,
    /// Those whose last request had a first-byte timeout.
    strained: HashSet<(u64, bool)>,
}

impl HedgeDelays {
    /// The first byte was there after `took`.
    pub fn add(&mut self, id: u64, stream: bool, prompt_tokens: u64, took: Duration) {
        self.strained.remove(&(id, stream));
        let seconds = took.as_secs_f64() / prompt_work(prompt_tokens);
        self.by_id.entry((id, stream)).or_default().add(seconds);
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

    /// How long to wait for the first byte of `id` before another backend is tried as well; `None` is until it times out,
    /// because too little is known of it.
    pub fn delay(
        &self,
        id: u64,
        stream: bool,
        prompt_tokens: u64,
        config: &HedgeDelayConfig,
    ) -> Option<Duration> {
        if !stream && !config.unary {
            return None;
        }
        let p99 = self.by_id.get(&(id, stream))?.p99()?;
        let learned = Duration::from_secs_f64(MARGIN * p99 * prompt_work(prompt_tokens));
        let strain = if self.strained.contains(&(id, stream)) { STRAINED } else { 1.0 };
        Some(learned.max(config.floor).mul_f64(strain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const CONFIG: HedgeDelayConfig = HedgeDelayConfig { floor: Duration::from_millis(50), unary: true };

    fn learn(delays: &mut HedgeDelays, id: u64, times: usize, took: Duration) {
        (0..times).for_each(|_| delays.add(id, true, 0, took));
    }

    fn delay(delays: &HedgeDelays, id: u64) -> Option<Duration> {
        delays.delay(id, true, 0, &CONFIG)
    }

    #[test]
    fn nothing_is_asked_for_twice_before_the_backend_itself_is_known() {
        let mut delays = HedgeDelays::default();
        assert_eq!(delay(&delays, 1), None);
        learn(&mut delays, 1, SAMPLES_MIN - 1, 100 * MS);
        learn(&mut delays, 2, 1000, 100 * MS);
        assert_eq!(delay(&delays, 1), None, "others do not count");
        learn(&mut delays, 1, 1, 100 * MS);
        let learned = delay(&delays, 1).expect("known");
        assert!((200 * MS..240 * MS).contains(&learned), "{learned:?}");
        assert_eq!(delays.delay(1, false, 0, &CONFIG), None, "unary answers are another matter");
    }

    #[test]
    fn unary_answers_have_a_delay_only_where_that_is_asked_for() {
        let mut delays = HedgeDelays::default();
        (0..SAMPLES_MIN).for_each(|_| delays.add(1, false, 0, 100 * MS));
        assert!(delays.delay(1, false, 0, &CONFIG).is_some());
        assert_eq!(delays.delay(1, false, 0, &HedgeDelayConfig::default()), None);
    }

    #[test]
    fn it_is_well_above_the_usual_and_grows_with_the_prompt() {
        let mut delays = HedgeDelays::default();
        for i in 0..1000 {
            delays.add(1, true, 256, (if i % 100 < 98 { 100 } else { 400 }) * MS);
        }
        let usual = delays.delay(1, true, 256, &CONFIG).expect("known");
        assert!((800 * MS..940 * MS).contains(&usual), "{usual:?}");
        let long = delays.delay(1, true, 256 * 19, &CONFIG).expect("known");
        assert!((10 * usual).abs_diff(long) < MS, "{long:?}");
        let floor = HedgeDelayConfig { floor: 3000 * MS, ..CONFIG };
        assert_eq!(delays.delay(1, true, 0, &floor), Some(3000 * MS));
    }

    #[test]
    fn one_that_is_stuck_is_given_twice_the_time_and_never_more() {
        let mut delays = HedgeDelays::default();
        learn(&mut delays, 1, 100, 100 * MS);
        let usual = delay(&delays, 1).expect("known");
        for _ in 0..100 {
            delays.timed_out(1, true);
            assert_eq!(delay(&delays, 1), Some(2 * usual));
        }
        learn(&mut delays, 1, 1, 100 * MS);
        assert_eq!(delay(&delays, 1), Some(usual), "it answered");
    }

    #[test]
    fn one_that_has_become_slow_is_learned_and_the_past_forgotten_answer_by_answer() {
        let mut delays = HedgeDelays::default();
        learn(&mut delays, 1, 1000, 100 * MS);
        learn(&mut delays, 1, 3, 1000 * MS);
        assert!(delay(&delays, 1) > Some(2000 * MS));
        learn(&mut delays, 1, SAMPLES_MAX, 100 * MS);
        assert!(delay(&delays, 1) < Some(240 * MS));
    }

    proptest::proptest! {
        #[test]
        fn the_percentile_is_that_of_the_latest_samples(
            times in proptest::collection::vec(0.0_f64..3000.0, 0..600),
        ) {
            let mut histogram = Histogram::default();
            times.iter().for_each(|seconds| histogram.add(*seconds));
            let mut latest: Vec<f64> = times.iter().rev().take(SAMPLES_MAX).copied().collect();
            latest.sort_by(f64::total_cmp);
            let held: usize = histogram.buckets.iter().map(|count| usize::from(*count)).sum();
            proptest::prop_assert_eq!(held, latest.len());
            let Some(p99) = histogram.p99() else {
                proptest::prop_assert!(latest.len() < SAMPLES_MIN);
                return Ok(());
            };
            let exact = latest[latest.len() - 1 - latest.len() / 100];
            // The upper edge of its bucket, of which the last one has none.
            let last = FIRST_BUCKET_S * GROWTH.powi(BUCKETS as i32 - 1);
            let exact = exact.clamp(FIRST_BUCKET_S, last);
            proptest::prop_assert!(p99 >= exact * 0.999 && p99 <= exact * GROWTH * 1.001, "{p99} {exact}");
        }
    }
}
