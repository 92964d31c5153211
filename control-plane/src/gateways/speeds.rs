//! The speeds of backends over all gateways: each gateway receives the averages of all others.
//!
//! Gateways report all their averages, whose samples lose weight with time. The latest report of each connected gateway is
//! part of the sum. A gateway receives the sum without its own report, because its own samples are newer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use weir_proto::v1::{AggregateSpeed, ModelSpeed, SpeedMeasure};

/// Backend, model, measure.
pub(crate) type SpeedKey = (String, String, i32);
/// The averages of one report or message.
pub(crate) type Speeds = BTreeMap<SpeedKey, Average>;

/// The maximum of averages of one gateway; more than any configuration has.
const SPEEDS_MAX: usize = 30_000;
/// The time constant of the averages, as in the gateways.
const TAU: Duration = Duration::from_secs(10);
/// The maximum age of the sums, which is about the interval of reports.
const REFRESH: Duration = Duration::from_secs(1);
/// Averages of fewer measurements are not sent.
const COUNT_MIN: f64 = 0.1;
/// An average that has changed by less than this share is not sent again.
const NEWS: f64 = 0.02;
/// The same for the weight of an average, which only affects its random variation.
const NEWS_COUNT: f64 = 0.25;

/// An average in which the weight of a sample falls with its age.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Average {
    count: f64,
    mean: f64,
    variance: f64,
}

impl Average {
    /// Whether the average differs enough from `before`, sent that long ago, to be sent again.
    fn is_news(&self, before: Option<(Self, Duration)>) -> bool {
        let far = |now: f64, old: f64, share: f64| (now - old).abs() > share * old.abs();
        before.is_none_or(|(old, age)| {
            far(self.mean, old.mean, NEWS)
                || far(self.variance.sqrt(), old.variance.sqrt(), NEWS_COUNT)
                || far(self.count, Sum::of(&old, age).count, NEWS_COUNT)
        })
    }

    /// The protocol message.
    fn wire(&self, (backend, model, measure): &SpeedKey) -> AggregateSpeed {
        let Self { count, mean, variance } = *self;
        let speed = ModelSpeed { model: model.clone(), measure: *measure, count, mean, variance };
        AggregateSpeed { backend: backend.clone(), speed: Some(speed) }
    }
}

/// The averages that a gateway was last sent, with their times.
#[derive(Debug, Default)]
pub(crate) struct LastSentSpeeds(BTreeMap<SpeedKey, (Average, Instant)>);

impl LastSentSpeeds {
    /// Takes the averages to send, and records them as sent. Removed averages lose their weight at the gateway without a
    /// message.
    pub(crate) fn news(&mut self, speeds: &Speeds) -> Vec<AggregateSpeed> {
        let now = Instant::now();
        self.0.retain(|key, _| speeds.contains_key(key));
        let mut news = Vec::new();
        for (key, speed) in speeds {
            if speed.is_news(self.0.get(key).map(|(old, at)| (*old, now - *at))) {
                news.push(speed.wire(key));
                self.0.insert(key.clone(), (*speed, now));
            }
        }
        news
    }
}

/// Sums of weights, weighted values and weighted squares, which can be added and subtracted.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    count: f64,
    values: f64,
    squares: f64,
}

impl Sum {
    fn of(average: &Average, age: Duration) -> Self {
        let count = average.count * (-age.as_secs_f64() / TAU.as_secs_f64()).exp();
        let squares = count * (average.variance + average.mean * average.mean);
        Self { count, values: count * average.mean, squares }
    }

    fn plus(self, other: Self, sign: f64) -> Self {
        Self {
            count: self.count + sign * other.count,
            values: self.values + sign * other.values,
            squares: self.squares + sign * other.squares,
        }
    }

    fn average(&self) -> Option<Average> {
        if self.count < COUNT_MIN {
            return None;
        }
        let mean = self.values / self.count;
        // Rounding can make the difference slightly negative.
        Some(Average {
            count: self.count,
            mean,
            variance: (self.squares / self.count - mean * mean).max(0.0),
        })
    }
}

/// The last report of one gateway, and its part in the sums.
#[derive(Debug, Clone, Default)]
pub(super) struct ReportedSpeeds {
    speeds: Arc<Speeds>,
    at: Option<Instant>,
    counted: BTreeMap<SpeedKey, Sum>,
}

impl ReportedSpeeds {
    /// A gateway's report.
    pub(super) fn report<'a>(&mut self, backends: impl Iterator<Item = (&'a String, &'a Vec<ModelSpeed>)>) {
        let speeds = backends.flat_map(|(backend, speeds)| speeds.iter().map(move |speed| (backend, speed)));
        let sane = |speed: &ModelSpeed| {
            [speed.count, speed.mean, speed.variance].iter().all(|n| n.is_finite() && *n >= 0.0)
        };
        let known =
            speeds.filter(|(_, s)| s.measure() != SpeedMeasure::Unspecified && sane(s)).take(SPEEDS_MAX);
        let average = |s: &ModelSpeed| Average { count: s.count, mean: s.mean, variance: s.variance };
        let speeds: Speeds =
            known.map(|(backend, s)| ((backend.clone(), s.model.clone(), s.measure), average(s))).collect();
        (self.speeds, self.at) = (Arc::new(speeds), Some(Instant::now()));
    }
}

/// The sums over all gateways.
#[derive(Debug, Default)]
pub(super) struct SpeedSums {
    sums: BTreeMap<SpeedKey, Sum>,
    at: Option<Instant>,
}

impl SpeedSums {
    /// Sums the reports of all gateways, unless the sums are recent.
    pub(super) fn refresh<'a>(&mut self, gateways: impl Iterator<Item = &'a mut ReportedSpeeds>) {
        let now = Instant::now();
        if self.at.is_some_and(|at| now - at < REFRESH) {
            return;
        }
        self.at = Some(now);
        self.sums.clear();
        for seen in gateways {
            let age = seen.at.map_or(Duration::ZERO, |at| now - at);
            seen.counted = seen.speeds.iter().map(|(key, own)| (key.clone(), Sum::of(own, age))).collect();
            for (key, own) in &seen.counted {
                let sum = self.sums.entry(key.clone()).or_default();
                *sum = sum.plus(*own, 1.0);
            }
        }
    }

    /// The averages over all gateways but one.
    pub(super) fn without(&self, own: &ReportedSpeeds) -> Speeds {
        let others = self.sums.iter().filter_map(|(key, sum)| {
            let sum = own.counted.get(key).map_or(*sum, |own| sum.plus(*own, -1.0));
            Some((key.clone(), sum.average()?))
        });
        others.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(count: f64, mean: f64, variance: f64) -> ReportedSpeeds {
        let speed =
            ModelSpeed { model: "m".into(), measure: SpeedMeasure::Unary.into(), count, mean, variance };
        let mut seen = ReportedSpeeds::default();
        seen.report([(&"b".to_owned(), &vec![speed])].into_iter());
        seen
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[tokio::test(start_paused = true)]
    async fn each_is_told_what_all_others_saw() {
        let mut all = [seen(10.0, 1.0, 0.0), seen(30.0, 2.0, 0.5), seen(f64::NAN, 1.0, 0.0)];
        let mut paces = SpeedSums::default();
        paces.refresh(all.iter_mut());
        let sent_to = |paces: &SpeedSums, to: &ReportedSpeeds| paces.without(to).into_values().next();
        let Average { count, mean, variance } = sent_to(&paces, &all[2]).unwrap();
        assert!(close(count, 40.0) && close(mean, 1.75) && close(variance, 0.5625), "{mean} {variance}");
        let first = sent_to(&paces, &all[0]).unwrap();
        assert!(
            close(first.count, 30.0) && close(first.mean, 2.0) && close(first.variance, 0.5),
            "{first:?}"
        );
        // Nothing new comes: what was seen fades, and its mean stays.
        tokio::time::advance(TAU).await;
        paces.refresh(all.iter_mut());
        let faded = sent_to(&paces, &all[0]).unwrap();
        assert!(close(faded.count, 30.0 / std::f64::consts::E) && close(faded.mean, 2.0), "{faded:?}");
        let mut last_sent = LastSentSpeeds::default();
        assert_eq!(last_sent.news(&paces.without(&all[0])).len(), 1);
        assert_eq!(last_sent.news(&paces.without(&all[0])).len(), 0, "it was sent just now");
        tokio::time::advance(TAU / 2).await;
        let as_before = paces.without(&all[0]);
        assert_eq!(last_sent.news(&as_before).len(), 1, "there it has faded, here it was seen again");
        tokio::time::advance(10 * TAU).await;
        paces.refresh(all.iter_mut());
        assert_eq!(sent_to(&paces, &all[0]), None, "next to nothing is nothing");
    }
}
