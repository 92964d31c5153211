//! The last five minutes in figures, for people: what requests came to, how busy and how fast backends were, how full
//! limits are. Everything has a fixed size per backend, gateway and limit, and nothing of it is kept over a restart.

mod series;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weir_proto::latency::{INTERVALS, quantile_ms};
use weir_proto::v1;

pub(crate) use self::series::{Line, Rate};
use super::loads::Loads;

/// How often loads are sampled.
pub(crate) const SAMPLE: Duration = Duration::from_secs(1);
/// Samples to one point of a line...
pub(crate) const SAMPLES: u32 = 5;
/// ...and points to a line.
pub(crate) const POINTS: usize = 60;
/// The time constant of the latencies shown.
const LATENCY_TAU_S: f64 = 30.0;
/// Backends and gateways followed at most; more than any configuration has.
const NAMES_MAX: usize = 10_000;
/// Limits followed at once.
const LIMITS_MAX: usize = 512;
/// A limit that no gateway reports for so long is not shown any more.
const LIMIT_KNOWN_FOR: Duration = Duration::from_secs(60);

/// The figures. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Timeseries(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    samples: u32,
    /// Points closed so far.
    closed: u64,
    traffic: Traffic,
    latency: Latency,
    lines: TotalLines,
    gateways: BTreeMap<String, Traffic>,
    backends: BTreeMap<String, Backend>,
    limits: BTreeMap<LimitKey, Limit>,
    origin: Option<Instant>,
}

/// Kind of scope, its name, what is limited.
pub(crate) type LimitKey = (String, String, String);

/// How requests ended lately.
#[derive(Debug, Clone, Default)]
pub(crate) struct Traffic {
    pub(crate) requests: Rate,
    pub(crate) refused: Rate,
    pub(crate) failed: Rate,
    pub(crate) output_tokens: Rate,
    pub(crate) in_flight: u32,
}

#[derive(Debug, Default)]
pub(crate) struct TotalLines {
    pub(crate) requests: Line,
    pub(crate) refused: Line,
    pub(crate) failed: Line,
    pub(crate) in_flight: Line,
    pub(crate) p50: Line,
    pub(crate) p99: Line,
    sum: PointSums,
}

/// What the point that is being made has so far.
#[derive(Debug, Default)]
struct PointSums {
    requests: u64,
    refused: u64,
    failed: u64,
    in_flight: f64,
}

/// Latencies counted: those of the point being made, and those before, fading.
#[derive(Debug)]
struct Latency {
    fresh: [f64; INTERVALS],
    faded: [f64; INTERVALS],
}

#[derive(Debug, Default)]
pub(crate) struct Backend {
    latency: Latency,
    load_sum: f64,
    pub(crate) load: Line,
    pub(crate) p50: Line,
}

/// The state of a limit.
#[derive(Debug, Clone)]
pub(crate) struct Limit {
    pub(crate) limit: u64,
    pub(crate) used: Option<u64>,
    pub(crate) refusals: Rate,
    pub(crate) shadow: bool,
    at: Instant,
}

impl Default for Latency {
    fn default() -> Self {
        Self { fresh: [0.0; INTERVALS], faded: [0.0; INTERVALS] }
    }
}

impl Latency {
    fn add(&mut self, counts: &[u32]) {
        self.fresh.iter_mut().zip(counts).for_each(|(sum, count)| *sum += f64::from(*count));
    }

    /// Of the last half minute or so.
    fn quantile(&self, q: f64) -> Option<f64> {
        let all: [f64; INTERVALS] = std::array::from_fn(|i| self.fresh[i] + self.faded[i]);
        // What has faded away to less than one request says nothing any more.
        quantile_ms(&all, q).filter(|_| all.iter().sum::<f64>() >= 0.5)
    }

    /// The point is made: its median and 99th percentile.
    fn close(&mut self) -> (Option<f64>, Option<f64>) {
        let of = |q| quantile_ms(&self.fresh, q);
        let closed = (of(0.5), of(0.99));
        let keep = (-(SAMPLE * SAMPLES).as_secs_f64() / LATENCY_TAU_S).exp();
        for (faded, fresh) in self.faded.iter_mut().zip(&mut self.fresh) {
            *faded = (*faded + std::mem::take(fresh)) * keep;
        }
        closed
    }
}

impl Traffic {
    fn add(&mut self, second: u64, report: &v1::TrafficReport) -> u64 {
        let counts = [report.succeeded, report.refused, report.rejected, report.failed, report.abandoned];
        let requests = counts.into_iter().fold(0, u64::saturating_add);
        self.requests.add(second, requests);
        self.refused.add(second, report.refused);
        self.failed.add(second, report.failed);
        self.output_tokens.add(second, report.output_tokens);
        self.in_flight = report.in_flight;
        requests
    }
}

impl Timeseries {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a report.
    pub(crate) fn report(&self, gateway: &str, report: &v1::StreamReportsRequest) {
        let mut inner = self.inner();
        let inner = &mut *inner;
        let second = second(&mut inner.origin);
        if let Some(traffic) = &report.traffic {
            let mut flying = inner.traffic.in_flight;
            let requests = inner.traffic.add(second, traffic);
            // A gateway may send any number; none of them makes a sum overflow.
            let sum = &mut inner.lines.sum;
            sum.requests = sum.requests.saturating_add(requests);
            sum.refused = sum.refused.saturating_add(traffic.refused);
            sum.failed = sum.failed.saturating_add(traffic.failed);
            if let Some(own) = entry(&mut inner.gateways, gateway) {
                // What all have is changed by what this one has, not summed anew: reports come from a thousand.
                let others = flying.saturating_sub(own.in_flight);
                own.add(second, traffic);
                flying = others.saturating_add(own.in_flight);
            }
            inner.traffic.in_flight = flying;
        }
        for backend in report.backends.iter().filter(|backend| !backend.first_byte_counts.is_empty()) {
            inner.latency.add(&backend.first_byte_counts);
            if let Some(own) = entry(&mut inner.backends, &backend.backend) {
                own.latency.add(&backend.first_byte_counts);
            }
        }
        for limit in &report.limits {
            inner.limit(second, limit);
        }
    }

    /// A gateway's stream has ended.
    pub(crate) fn left(&self, gateway: &str) {
        let mut inner = self.inner();
        if let Some(gone) = inner.gateways.remove(gateway) {
            inner.traffic.in_flight = inner.traffic.in_flight.saturating_sub(gone.in_flight);
        }
    }

    /// To be called once per [`SAMPLE`]: these loads, and these backends and no others.
    pub(crate) fn sample<'a>(&self, loads: &Loads, backends: impl Iterator<Item = &'a str>) {
        let mut inner = self.inner();
        let names: std::collections::BTreeSet<&str> = backends.collect();
        inner.backends.retain(|name, _| names.contains(name.as_str()));
        for name in names {
            let load = loads.get(name).copied().unwrap_or_default();
            if let Some(own) = entry(&mut inner.backends, name) {
                own.load_sum += f64::from(load);
            }
        }
        inner.lines.sum.in_flight += f64::from(inner.traffic.in_flight);
        inner.samples += 1;
        if inner.samples == SAMPLES {
            inner.samples = 0;
            inner.close();
        }
    }

    /// Reads the figures; short, since reports wait meanwhile.
    pub(crate) fn read<T>(&self, read: impl FnOnce(Reader<'_>) -> T) -> T {
        let mut inner = self.inner();
        let second = second(&mut inner.origin);
        read(Reader { inner: &inner, second })
    }
}

/// The figures as they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    inner: &'a Inner,
    /// The second that rates are asked for.
    pub(crate) second: u64,
}

impl<'a> Reader<'a> {
    /// Points closed so far: rises by one with each.
    pub(crate) fn closed(self) -> u64 {
        self.inner.closed
    }

    pub(crate) fn traffic(self) -> &'a Traffic {
        &self.inner.traffic
    }

    pub(crate) fn gateway(self, id: &str) -> Option<&'a Traffic> {
        self.inner.gateways.get(id)
    }

    pub(crate) fn lines(self) -> &'a TotalLines {
        &self.inner.lines
    }

    pub(crate) fn backends(self) -> impl Iterator<Item = (&'a String, &'a Backend)> {
        self.inner.backends.iter()
    }

    /// Time to the first byte over all backends, milliseconds.
    pub(crate) fn latency(self, q: f64) -> Option<f64> {
        self.inner.latency.quantile(q)
    }

    /// Time to the first byte of one backend, milliseconds.
    pub(crate) fn latency_of(self, backend: &str, q: f64) -> Option<f64> {
        self.inner.backends.get(backend)?.latency.quantile(q)
    }

    pub(crate) fn limits(self) -> impl Iterator<Item = (&'a LimitKey, &'a Limit)> {
        self.inner.limits.iter()
    }
}

impl Inner {
    fn limit(&mut self, second: u64, report: &v1::LimitReport) {
        let key = (report.scope_kind.clone(), report.scope.clone(), report.what.clone());
        if !self.limits.contains_key(&key) && self.limits.len() >= LIMITS_MAX {
            return;
        }
        let now = Instant::now();
        let limit = self.limits.entry(key).or_insert_with(|| Limit {
            limit: 0,
            used: None,
            refusals: Rate::default(),
            shadow: false,
            at: now,
        });
        limit.refusals.add(second, report.refusals);
        // A gateway that has not asked the store lately does not know how full the limit is.
        if report.used.is_some() {
            (limit.limit, limit.used, limit.shadow, limit.at) =
                (report.limit, report.used, report.shadow, now);
        }
    }

    fn close(&mut self) {
        self.closed += 1;
        let sum = std::mem::take(&mut self.lines.sum);
        let seconds = (SAMPLE * SAMPLES).as_secs_f64();
        let rate = |count: u64| Some(count as f64 / seconds);
        self.lines.requests.push(rate(sum.requests));
        self.lines.refused.push(rate(sum.refused));
        self.lines.failed.push(rate(sum.failed));
        self.lines.in_flight.push(Some(sum.in_flight / f64::from(SAMPLES)));
        let (p50, p99) = self.latency.close();
        self.lines.p50.push(p50);
        self.lines.p99.push(p99);
        for backend in self.backends.values_mut() {
            let load = std::mem::take(&mut backend.load_sum) / f64::from(SAMPLES);
            backend.load.push(Some(load));
            let (p50, _) = backend.latency.close();
            backend.p50.push(p50);
        }
        self.limits.retain(|_, limit| limit.at.elapsed() < LIMIT_KNOWN_FOR);
    }
}

/// Seconds since the first call.
fn second(origin: &mut Option<Instant>) -> u64 {
    origin.get_or_insert_with(Instant::now).elapsed().as_secs()
}

/// The entry of a name; `None` when there are too many.
fn entry<'a, T: Default>(all: &'a mut BTreeMap<String, T>, name: &str) -> Option<&'a mut T> {
    if !all.contains_key(name) {
        if all.len() >= NAMES_MAX {
            return None;
        }
        all.insert(name.to_owned(), T::default());
    }
    all.get_mut(name)
}

#[cfg(test)]
mod tests {
    use weir_proto::latency::interval;

    use super::*;

    fn report(succeeded: u64, failed: u64) -> v1::StreamReportsRequest {
        let mut first_byte_counts = vec![0; INTERVALS];
        first_byte_counts[interval(Duration::from_millis(100))] = 10;
        v1::StreamReportsRequest {
            traffic: Some(v1::TrafficReport { succeeded, failed, in_flight: 3, ..Default::default() }),
            backends: vec![v1::BackendReport {
                backend: "b".into(),
                first_byte_counts,
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn rates_and_lines_follow_what_gateways_say() {
        let timeseries = Timeseries::default();
        let loads: Loads = [("b".to_owned(), 4)].into();
        for _ in 0..5 {
            timeseries.report("g", &report(18, 2));
            timeseries.report("h", &report(10, 0));
            tokio::time::advance(SAMPLE).await;
            timeseries.sample(&loads, ["b"].into_iter());
        }
        assert_eq!(timeseries.read(|figures| figures.closed()), 1);
        timeseries.read(|figures| {
            assert_eq!(figures.traffic().requests.per_second(figures.second), 30.0);
            assert_eq!(figures.traffic().failed.per_second(figures.second), 2.0);
            assert_eq!(figures.traffic().in_flight, 6);
            let (_, backend) = figures.backends().next().expect("b");
            assert_eq!(backend.load.values().collect::<Vec<_>>(), [Some(4.0)]);
            let p50 = figures.latency_of("b", 0.5).expect("known");
            assert!((80.0..130.0).contains(&p50), "{p50}");
            assert_eq!(figures.lines().requests.values().last(), Some(Some(30.0)));
        });
        timeseries.left("g");
        timeseries.left("h");
        for _ in 0..POINTS as u32 * SAMPLES * 2 {
            tokio::time::advance(SAMPLE).await;
            timeseries.sample(&Loads::new(), ["b"].into_iter());
        }
        timeseries.read(|figures| {
            assert_eq!(figures.traffic().requests.per_second(figures.second), 0.0);
            assert_eq!(figures.lines().requests.values().count(), POINTS, "a line has a bound");
            assert_eq!(figures.latency_of("b", 0.5), None, "what faded away says nothing");
        });
        timeseries.sample(&Loads::new(), [].into_iter());
        assert_eq!(
            timeseries.read(|figures| figures.backends().count()),
            0,
            "a backend that is gone leaves nothing"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn no_number_of_a_gateway_makes_a_sum_begin_again() {
        let timeseries = Timeseries::default();
        let absurd = v1::TrafficReport {
            succeeded: u64::MAX,
            refused: u64::MAX,
            rejected: u64::MAX,
            failed: u64::MAX,
            abandoned: u64::MAX,
            in_flight: u32::MAX,
            input_tokens: u64::MAX,
            output_tokens: u64::MAX,
        };
        let report = v1::StreamReportsRequest { traffic: Some(absurd), ..Default::default() };
        for gateway in ["a", "b", "a"] {
            timeseries.report(gateway, &report);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        timeseries.sample(&Loads::default(), std::iter::empty());
        assert_eq!(timeseries.inner().lines.sum.requests, u64::MAX);
        let rate = timeseries.read(|figures| figures.traffic().output_tokens.per_second(figures.second));
        assert!(rate > 1e18, "{rate}");
    }

    #[tokio::test(start_paused = true)]
    async fn limits_are_bounded_and_forgotten() {
        let timeseries = Timeseries::default();
        let limits = (0..LIMITS_MAX + 10).map(|i| v1::LimitReport {
            scope_kind: "tenant".into(),
            scope: i.to_string(),
            what: "requests".into(),
            limit: 10,
            used: Some(5),
            refusals: 5,
            ..Default::default()
        });
        timeseries.report("g", &v1::StreamReportsRequest { limits: limits.collect(), ..Default::default() });
        assert_eq!(timeseries.read(|figures| figures.limits().count()), LIMITS_MAX);
        tokio::time::advance(LIMIT_KNOWN_FOR).await;
        (0..SAMPLES).for_each(|_| timeseries.sample(&Loads::new(), [].into_iter()));
        assert_eq!(timeseries.read(|figures| figures.limits().count()), 0);
    }
}
