//! The speeds of a model's backends per unit of work, and the latency factor that follows from the comparison.
//!
//! Invariants:
//! - Speeds are time per unit of work, so that a backend with long prompts or answers does not count as slow.
//! - Averages decay with time, not with the count. An unused backend returns to the average and is tried again.
//! - Only the part of a difference that exceeds random variation counts: equal backends keep their configured shares.
//! - A failure counts as slow, never as fast.
//! - Measurements of other gateways count like own ones, because one of many gateways measures too little.

use std::collections::HashMap;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

/// The time constant of the averages.
const TAU: Duration = Duration::from_secs(10);
/// The bounds of the latency factor.
const FACTOR_MIN: f64 = 0.2;
const FACTOR_MAX: f64 = 2.0;
/// Smaller relative differences are ignored.
const BAND: f64 = 0.05;
/// Standard errors that count as random variation.
const ERRORS: f64 = 2.0;
/// The weight of samples that an average needs before it is compared.
const SAMPLES_MIN: f64 = 3.0;
/// An average with less weight is not reported.
const COUNT_MIN: f64 = 0.1;
/// A failure counts as at least this multiple of the pool's median: the inverse of the lowest factor.
const FAILURE: f64 = 1.0 / FACTOR_MIN;
/// Prompt tokens that take about as long as the fixed part of a request.
const PROMPT_UNIT: f64 = 256.0;
/// Output tokens that take about as long as one unit of prompt.
const OUTPUT_UNIT: f64 = 8.0;
/// The interval between two computations of the factors.
const REFRESH: Duration = Duration::from_millis(100);

/// What a sample measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// From sending the request to the first byte of a stream.
    FirstByte,
    /// From the first byte of a stream to the last.
    Decode,
    /// From sending the request to the end of a unary answer.
    Unary,
}

impl Measure {
    /// All measures in order.
    pub const ALL: [Self; 3] = [Self::FirstByte, Self::Decode, Self::Unary];
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// The measure.
    pub measure: Measure,
    /// The measured time.
    pub took: Duration,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Output tokens.
    pub output_tokens: u64,
}

/// Units of work before the first byte.
pub(super) fn prompt_work(prompt_tokens: u64) -> f64 {
    1.0 + prompt_tokens as f64 / PROMPT_UNIT
}

/// An average as gateways report it. The weight of a measurement falls with its age.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// The sum of the weights.
    pub count: f64,
    /// Seconds per unit of work.
    pub mean: f64,
    /// The variance of single measurements.
    pub variance: f64,
}

impl Sample {
    /// Seconds per unit of work; `None` for a stream without a token.
    fn per_work(&self) -> Option<f64> {
        let output = self.output_tokens as f64 / OUTPUT_UNIT;
        let work = match self.measure {
            Measure::FirstByte => prompt_work(self.prompt_tokens),
            Measure::Decode => output,
            Measure::Unary => prompt_work(self.prompt_tokens) + output,
        };
        (work > 0.0).then(|| self.took.as_secs_f64() / work)
    }
}

/// An average and its variance. The weight of a sample falls with its age.
#[derive(Debug, Clone, Copy, Default)]
struct Average {
    mean: f64,
    variance: f64,
    count: f64,
    at: Option<Instant>,
}

impl Average {
    fn count(&self, now: Instant) -> f64 {
        let age = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.count * (-age.as_secs_f64() / TAU.as_secs_f64()).exp()
    }

    fn add(&mut self, value: f64, now: Instant) {
        self.count = self.count(now) + 1.0;
        self.at = Some(self.at.map_or(now, |at| at.max(now)));
        let (share, off) = (1.0 / self.count, value - self.mean);
        self.mean += off * share;
        self.variance = (1.0 - share) * (self.variance + off * off * share);
    }

    /// The average now; `None` if its weight is below the minimum of a report.
    fn pace(&self, now: Instant) -> Option<Pace> {
        let pace = Pace { count: self.count(now), mean: self.mean, variance: self.variance };
        (pace.count >= COUNT_MIN).then_some(pace)
    }

    /// The average of the samples of both.
    fn with(&self, other: &Self, now: Instant) -> Self {
        let (own, others) = (self.count(now), other.count(now));
        let count = own + others;
        if count <= 0.0 {
            return *self;
        }
        let mean = (self.mean * own + other.mean * others) / count;
        let off = |average: &Self| average.variance + (average.mean - mean).powi(2);
        let variance = (off(self) * own + off(other) * others) / count;
        Self { mean, variance, count, at: Some(now) }
    }

    /// Standard error of the mean, relative to it.
    fn error(&self, now: Instant) -> f64 {
        let count = self.count(now).max(f64::MIN_POSITIVE);
        (self.variance / count).sqrt() / self.mean.max(f64::MIN_POSITIVE)
    }
}

#[derive(Debug, Default)]
struct Speed {
    /// The samples of this gateway.
    averages: [Average; 3],
    /// The samples of all other gateways, as last received.
    others: [Average; 3],
    factor: Option<f64>,
}

impl Speed {
    /// The average of one measure over all gateways.
    fn known(&self, measure: usize, now: Instant) -> Average {
        self.averages[measure].with(&self.others[measure], now)
    }
}

/// The speeds of a model's backends.
#[derive(Debug, Default)]
pub struct Speeds {
    by_id: HashMap<u64, Speed>,
    medians: [Option<f64>; 3],
    computed: Option<Instant>,
}

impl Speeds {
    /// Adds the sample of a successful answer.
    pub fn add(&mut self, id: u64, sample: &Sample, now: Instant) {
        if let Some(value) = sample.per_work() {
            self.by_id.entry(id).or_default().averages[sample.measure as usize].add(value, now);
        }
    }

    /// Adds a failed or timed-out request: with its time, or with the time that leads to the lowest factor if that is
    /// longer.
    pub fn add_failure(&mut self, id: u64, sample: &Sample, now: Instant) {
        self.refresh(now);
        let Some(value) = sample.per_work() else { return };
        // Without a median there is no backend to compare with.
        let Some(median) = self.medians[sample.measure as usize] else { return };
        let average = &mut self.by_id.entry(id).or_default().averages[sample.measure as usize];
        average.add(value.max(median * FAILURE), now);
    }

    /// The averages of this gateway, for the report.
    pub fn paces(&self, now: Instant) -> impl Iterator<Item = (u64, Measure, Pace)> {
        self.by_id.iter().flat_map(move |(id, speed)| {
            let paces = Measure::ALL.into_iter().zip(&speed.averages);
            paces.filter_map(move |(measure, average)| Some((*id, measure, average.pace(now)?)))
        })
    }

    /// Replaces the averages of all other gateways.
    pub fn set_others(&mut self, id: u64, measure: Measure, pace: Pace, now: Instant) {
        let sane = [pace.count, pace.mean, pace.variance].iter().all(|n| n.is_finite() && *n >= 0.0);
        if sane {
            let Pace { count, mean, variance } = pace;
            let of = &mut self.by_id.entry(id).or_default().others[measure as usize];
            *of = Average { mean, variance, count, at: Some(now) };
        }
    }

    /// Forgets the speeds that other gateways reported, after the report stream is lost.
    pub fn forget_others(&mut self) {
        self.by_id.values_mut().for_each(|speed| speed.others = Default::default());
    }

    /// Removes deleted backends.
    pub fn retain(&mut self, mut keep: impl FnMut(u64) -> bool) {
        self.by_id.retain(|id, _| keep(*id));
    }

    /// Computes the factors again if they are due.
    pub fn refresh(&mut self, now: Instant) {
        if self.computed.is_some_and(|at| now.saturating_duration_since(at) < REFRESH) {
            return;
        }
        self.computed = Some(now);
        for measure in 0..self.medians.len() {
            let mut means: SmallVec<[f64; 16]> = SmallVec::new();
            let averages = self.by_id.values().map(|speed| speed.known(measure, now));
            means.extend(averages.filter(|a| a.count(now) >= SAMPLES_MIN).map(|a| a.mean));
            means.sort_by(f64::total_cmp);
            let middle = means.len() / 2;
            self.medians[measure] = match means.len() {
                0 => None,
                n if n % 2 == 1 => Some(means[middle]),
                _ => Some((means[middle - 1] + means[middle]) / 2.0),
            };
        }
        let medians = self.medians;
        for speed in self.by_id.values_mut() {
            let known = [0, 1, 2].map(|measure| speed.known(measure, now));
            let slowness = medians.iter().zip(&known).filter_map(|(median, average)| {
                let known = average.count(now) >= SAMPLES_MIN;
                let band = BAND + ERRORS * average.error(now);
                median.filter(|m| known && *m > 0.0).map(|median| shrink(average.mean / median, band))
            });
            let worst = slowness.reduce(f64::max);
            speed.factor = worst.map(|slowness| (1.0 / slowness).clamp(FACTOR_MIN, FACTOR_MAX));
        }
    }

    /// The speed relative to the pool's median, `FACTOR_MIN` to `FACTOR_MAX`; 1 without samples. As of the last
    /// [`Self::refresh`].
    pub fn factor(&self, id: u64) -> f64 {
        self.by_id.get(&id).and_then(|speed| speed.factor).unwrap_or(1.0)
    }
}

/// Moves a ratio towards 1 by the random variation.
fn shrink(ratio: f64, band: f64) -> f64 {
    if ratio >= 1.0 { (ratio - band).max(1.0) } else { (ratio * (1.0 + band)).min(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unary(ms: u64, output_tokens: u64) -> Sample {
        Sample { measure: Measure::Unary, took: Duration::from_millis(ms), prompt_tokens: 0, output_tokens }
    }

    fn factors(speeds: &mut Speeds, now: Instant) -> [f64; 3] {
        speeds.computed = None;
        speeds.refresh(now);
        [1, 2, 3].map(|id| speeds.factor(id))
    }

    #[test]
    fn a_backend_half_as_fast_gets_half_and_long_answers_do_not_look_slow() {
        let (mut speeds, mut now) = (Speeds::default(), Instant::now());
        for round in 0..200 {
            now += Duration::from_millis(100);
            speeds.add(1, &unary(100 + round % 3, 0), now);
            speeds.add(2, &unary(1_100, 80), now);
            speeds.add(3, &unary(200 + round % 3, 0), now);
        }
        let [first, long, slow] = factors(&mut speeds, now);
        assert_eq!(first, 1.0);
        assert_eq!(long, 1.0);
        assert!((slow - 0.5).abs() < 0.03, "{slow}");
    }

    #[test]
    fn equal_backends_are_equal_however_noisy() {
        let (mut speeds, mut now) = (Speeds::default(), Instant::now());
        let mut state = 1u64;
        let mut off = 0;
        for _ in 0..3000 {
            now += Duration::from_millis(50);
            for id in 1..=3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let ms = (-(((state >> 33) as f64 + 1.0) / 2f64.powi(31)).ln() * 100.0) as u64;
                speeds.add(id, &unary(ms, 0), now);
            }
            off += factors(&mut speeds, now).iter().filter(|f| (**f - 1.0).abs() > 0.1).count();
        }
        assert!(off < 9000 / 50, "{off} of 9000 factors were off by chance");
    }

    #[test]
    fn a_failure_is_slow_however_fast_it_was() {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        for _ in 0..50 {
            for id in 1..=3 {
                speeds.add(id, &unary(100, 0), now);
            }
        }
        factors(&mut speeds, now);
        for _ in 0..50 {
            speeds.add_failure(3, &unary(1, 0), now);
        }
        let [good, _, failing] = factors(&mut speeds, now);
        assert_eq!(good, 1.0);
        assert!(failing < 0.5, "{failing}");
    }

    #[test]
    fn what_other_gateways_saw_counts_as_if_it_had_been_seen_here() {
        let now = Instant::now();
        let (mut alone, mut others, mut both) = (Speeds::default(), Speeds::default(), Speeds::default());
        for i in 0..12 {
            for (id, ms) in [(1, 100), (2, 100), (3, 300)] {
                let sample = unary(ms + i % 4, 0);
                both.add(id, &sample, now);
                // One sample per backend at this gateway is too little.
                (if i == 0 { &mut alone } else { &mut others }).add(id, &sample, now);
            }
        }
        assert_eq!(factors(&mut alone, now), [1.0; 3]);
        for (id, measure, pace) in others.paces(now) {
            alone.set_others(id, measure, pace, now);
        }
        let (merged, seen) = (factors(&mut alone, now), factors(&mut both, now));
        assert!(merged.iter().zip(seen).all(|(a, b)| (a - b).abs() < 1e-9), "{merged:?} {seen:?}");
        assert!(merged[2] < 0.5);
        alone.set_others(1, Measure::Unary, Pace { count: f64::NAN, mean: 1.0, variance: 0.0 }, now);
        assert_eq!(factors(&mut alone, now), merged, "nonsense is not taken in");
        alone.forget_others();
        assert_eq!(factors(&mut alone, now), [1.0; 3]);
        assert!(others.paces(now + 10 * TAU).next().is_none(), "what is long past is not told");
    }

    #[test]
    fn what_was_seen_is_forgotten_by_time() {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        for _ in 0..50 {
            speeds.add(1, &unary(100, 0), now);
            speeds.add(2, &unary(100, 0), now);
            speeds.add(3, &unary(5_000, 0), now);
        }
        assert_eq!(factors(&mut speeds, now)[2], 0.2);
        let [_, _, slow] = factors(&mut speeds, now + Duration::from_secs(60));
        assert_eq!(slow, 1.0, "nothing recent speaks against it");
    }

    #[test]
    fn one_backend_alone_is_average() {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        for _ in 0..10 {
            speeds.add(1, &unary(5_000, 0), now);
        }
        assert_eq!(factors(&mut speeds, now), [1.0; 3]);
    }
}
