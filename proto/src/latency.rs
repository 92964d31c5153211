//! The intervals in which both ends of the report stream count latencies: four to each doubling, from 1 ms to 2^14 ms, so
//! that a quantile read from them is off by a tenth at most.
//!
//! Two other histograms have intervals of their own. The gateway's hedge delay looks at the 99th percentile up to 20
//! minutes, in steps of 15 %: these end at 16 s, and their steps of 19 % would change when it hedges. Prometheus' buckets
//! end at round numbers of seconds, which dashboards and alerts name.

use std::time::Duration;

/// Intervals to each doubling.
const PER_OCTAVE: f64 = 4.0;
/// How many intervals there are. The last one holds everything above 16 s.
pub const INTERVALS: usize = 58;

/// The interval that a latency falls into.
pub fn interval(latency: Duration) -> usize {
    let ms = latency.as_secs_f64() * 1e3;
    if ms < 1.0 {
        return 0;
    }
    // At least zero and small: the cast cannot go wrong.
    (1 + (ms.log2() * PER_OCTAVE) as usize).min(INTERVALS - 1)
}

/// Where an interval begins and ends, milliseconds; the last one is taken to be as wide as the others.
fn bounds(interval: usize) -> (f64, f64) {
    let edge = |n: usize| (n as f64 / PER_OCTAVE).exp2();
    match interval {
        0 => (0.0, 1.0),
        n => (edge(n - 1), edge(n)),
    }
}

/// The latency below which a share `q` (0 to 1) of what was counted lies, milliseconds; `None` when nothing was.
pub fn quantile_ms(counts: &[f64; INTERVALS], q: f64) -> Option<f64> {
    let all: f64 = counts.iter().sum();
    if all <= 0.0 {
        return None;
    }
    let (wanted, mut below) = (q.clamp(0.0, 1.0) * all, 0.0);
    for (interval, count) in counts.iter().enumerate() {
        if *count > 0.0 && below + count >= wanted {
            let (from, to) = bounds(interval);
            return Some(from + (to - from) * ((wanted - below) / count).clamp(0.0, 1.0));
        }
        below += count;
    }
    counts.iter().rposition(|count| *count > 0.0).map(|last| bounds(last).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_within_an_interval_of_the_truth() {
        assert_eq!(quantile_ms(&[0.0; INTERVALS], 0.5), None);
        let mut counts = [0.0; INTERVALS];
        for ms in 1..=1000_u64 {
            counts[interval(Duration::from_millis(ms))] += 1.0;
        }
        for (q, truth) in [(0.5, 500.0), (0.9, 900.0), (0.99, 990.0), (1.0, 1000.0)] {
            let read = quantile_ms(&counts, q).expect("something was counted");
            assert!((read / truth - 1.0).abs() < 0.1, "{q}: {read} for {truth}");
        }
    }

    #[test]
    fn every_latency_has_an_interval_and_they_rise() {
        let mut last = 0;
        for us in (0..60_000_000).step_by(997) {
            let at = interval(Duration::from_micros(us));
            assert!((last..INTERVALS).contains(&at));
            last = at;
        }
        assert_eq!(interval(Duration::MAX), INTERVALS - 1);
    }
}
