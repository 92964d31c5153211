//! Time series of the last five minutes for the page: results of requests, load and latency of backends, and levels of
//! limits. The size per backend, gateway and limit is fixed. Nothing is kept over a restart.

mod series;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weir_proto::latency::{INTERVALS, quantile_ms};
use weir_proto::v1;
use weir_runtime::RecentMap;

pub(crate) use self::series::{Line, Minute, Rate};
use super::loads::Loads;

/// The interval between two samples of loads.
pub(crate) const SAMPLE: Duration = Duration::from_secs(1);
/// Samples per point of a line...
pub(crate) const SAMPLES: u32 = 5;
/// ...and points per line.
pub(crate) const POINTS: usize = 60;
/// The time constant of the latencies shown.
const LATENCY_TAU_S: f64 = 30.0;
/// The maximum of backends and of gateways; more than any configuration has.
const NAMES_MAX: usize = 10_000;
/// The maximum of limits.
const LIMITS_MAX: usize = 512;
/// The period of limits of which the use of the last minute can be compared with what was declared.
const PER_MINUTE: &str = "minute";
/// The periods of limits.
const PERIODS: [&str; 4] = [PER_MINUTE, "day", "week", "month"];
/// A limit without a report for this time is not shown any more.
const LIMIT_KNOWN_FOR: Duration = Duration::from_secs(60);

/// The time series. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Timeseries(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    samples: u32,
    /// Points closed so far.
    closed: u64,
    traffic: Traffic,
    latency: Latency,
    lines: TotalLines,
    gateways: BTreeMap<String, Traffic>,
    backends: BTreeMap<String, Backend>,
    /// Limits whose level was reported lately.
    limits: RecentMap<LimitKey, Limit>,
    origin: Option<Instant>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            samples: 0,
            closed: 0,
            traffic: Traffic::default(),
            latency: Latency::default(),
            lines: TotalLines::default(),
            gateways: BTreeMap::new(),
            backends: BTreeMap::new(),
            limits: RecentMap::new(LIMITS_MAX, LIMIT_KNOWN_FOR),
            origin: None,
        }
    }
}

/// The kind of the scope, its name, and the kind of the limit.
pub(crate) type LimitKey = (String, String, String);

/// The recent results of requests.
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

/// The sums of the open point.
#[derive(Debug, Default)]
struct PointSums {
    requests: u64,
    refused: u64,
    failed: u64,
    in_flight: f64,
}

/// Histograms of latencies: of the open point, and of earlier points with falling weight.
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
#[derive(Debug, Clone, Default)]
pub(crate) struct Limit {
    /// What was declared, per period.
    pub(crate) declared: u64,
    /// The period of what was declared; empty for requests in flight.
    pub(crate) period: String,
    /// The capacity of its bucket.
    pub(crate) limit: u64,
    /// The level of its bucket.
    pub(crate) used: Option<u64>,
    /// What requests that ended used of it.
    pub(crate) consumed: Minute,
    pub(crate) refusals: Rate,
    pub(crate) shadow: bool,
}

impl Limit {
    /// What requests that ended in the minute before this second used of a limit that is per minute.
    pub(crate) fn last_minute(&self, second: u64) -> Option<u64> {
        (self.period == PER_MINUTE).then(|| self.consumed.sum(second))
    }

    /// The part of the limit that is used: of its bucket, or of its rate if that is more. A bucket may drain faster than it
    /// fills.
    pub(crate) fn fill(&self, second: u64) -> f64 {
        let part = |used: u64, of: u64| used as f64 / of.max(1) as f64;
        let of_rate = self.last_minute(second).map_or(0.0, |used| part(used, self.declared));
        part(self.used.unwrap_or(0), self.limit).max(of_rate)
    }
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

    /// A quantile over about the last half minute.
    fn quantile(&self, q: f64) -> Option<f64> {
        let all: [f64; INTERVALS] = std::array::from_fn(|i| self.fresh[i] + self.faded[i]);
        // With a weight of less than one request the quantile is unknown.
        quantile_ms(&all, q).filter(|_| all.iter().sum::<f64>() >= 0.5)
    }

    /// Closes the point and returns its median and 99th percentile.
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
        let counts = [
            report.succeeded,
            report.rate_limited,
            report.client_errors,
            report.server_errors,
            report.cancelled,
        ];
        let requests = counts.into_iter().fold(0, u64::saturating_add);
        self.requests.add(second, requests);
        self.refused.add(second, report.rate_limited);
        self.failed.add(second, report.server_errors);
        self.output_tokens.add(second, report.output_tokens);
        self.in_flight = report.in_flight;
        requests
    }
}

impl Timeseries {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a report.
    pub(crate) fn report(&self, gateway: &str, report: &v1::StreamReportsRequest) {
        let mut inner = self.inner();
        let inner = &mut *inner;
        let second = second(&mut inner.origin);
        if let Some(traffic) = &report.traffic {
            let mut flying = inner.traffic.in_flight;
            let requests = inner.traffic.add(second, traffic);
            // A gateway may send any number, so the sums saturate.
            let sum = &mut inner.lines.sum;
            sum.requests = sum.requests.saturating_add(requests);
            sum.refused = sum.refused.saturating_add(traffic.rate_limited);
            sum.failed = sum.failed.saturating_add(traffic.server_errors);
            if let Some(own) = entry(&mut inner.gateways, gateway) {
                // Only this gateway's part of the sum changes, because a thousand gateways report each second.
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

    /// Removes a gateway whose stream ended.
    pub(crate) fn left(&self, gateway: &str) {
        let mut inner = self.inner();
        if let Some(gone) = inner.gateways.remove(gateway) {
            inner.traffic.in_flight = inner.traffic.in_flight.saturating_sub(gone.in_flight);
        }
    }

    /// Adds a sample of loads; to be called once per [`SAMPLE`]. Backends that are not in `backends` are removed.
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

    /// Reads the time series. `read` must be short, because reports wait for the lock.
    pub(crate) fn read<T>(&self, read: impl FnOnce(Reader<'_>) -> T) -> T {
        let mut inner = self.inner();
        let second = second(&mut inner.origin);
        read(Reader { inner: &inner, second, now: Instant::now() })
    }
}

/// Read access to the time series.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    inner: &'a Inner,
    /// The second that rates are asked for.
    pub(crate) second: u64,
    now: Instant,
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
        self.inner.limits.iter(self.now)
    }

    /// What requests that ended in the last minute used of each limit that is per minute.
    pub(crate) fn last_minute(self) -> BTreeMap<&'a LimitKey, u64> {
        let known = self.limits().filter_map(|(key, limit)| Some((key, limit.last_minute(self.second)?)));
        known.collect()
    }
}

impl Inner {
    fn limit(&mut self, second: u64, report: &v1::LimitReport) {
        let key = (report.scope_kind.clone(), report.scope.clone(), report.kind.clone());
        let now = Instant::now();
        // A report without `used` does not know the level of the limit.
        if report.used.is_some() {
            self.limits.touch(&key, now);
        }
        let Some(limit) = self.limits.get_or_insert_with(key, now, Limit::default) else { return };
        limit.refusals.add(second, report.refusals);
        limit.consumed.add(second, report.consumed);
        if report.used.is_some() {
            (limit.limit, limit.used, limit.shadow) = (report.limit, report.used, report.shadow);
            // The words of a gateway are shown on the page, so only those that are meant are kept.
            limit.period =
                PERIODS.iter().find(|period| **period == report.period).copied().unwrap_or("").into();
            limit.declared = if limit.period.is_empty() { report.limit } else { report.declared };
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
        self.limits.expire(Instant::now());
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

    fn report(succeeded: u64, server_errors: u64) -> v1::StreamReportsRequest {
        let mut first_byte_counts = vec![0; INTERVALS];
        first_byte_counts[interval(Duration::from_millis(100))] = 10;
        v1::StreamReportsRequest {
            traffic: Some(v1::TrafficReport { succeeded, server_errors, in_flight: 3, ..Default::default() }),
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
            rate_limited: u64::MAX,
            client_errors: u64::MAX,
            server_errors: u64::MAX,
            cancelled: u64::MAX,
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
    async fn the_use_of_the_last_minute_is_that_of_all_gateways() {
        let timeseries = Timeseries::default();
        let limit = v1::LimitReport {
            scope_kind: "global".into(),
            kind: "requests".into(),
            limit: 10_000,
            used: Some(2),
            declared: 2000,
            period: "minute".into(),
            consumed: 4,
            ..Default::default()
        };
        let report = v1::StreamReportsRequest { limits: vec![limit], ..Default::default() };
        for _ in 0..90 {
            timeseries.report("g", &report);
            timeseries.report("h", &report);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        timeseries.read(|figures| {
            let (_, limit) = figures.limits().next().expect("known");
            assert_eq!((limit.declared, limit.limit), (2000, 10_000));
            assert_eq!(limit.last_minute(figures.second), Some(480));
            assert!(
                (limit.fill(figures.second) - 0.24).abs() < 1e-9,
                "of its rate, its bucket is all but empty"
            );
            assert_eq!(figures.last_minute().into_values().collect::<Vec<_>>(), [480]);
        });
    }

    #[tokio::test(start_paused = true)]
    async fn limits_are_bounded_and_forgotten() {
        let timeseries = Timeseries::default();
        let limits = (0..LIMITS_MAX + 10).map(|i| v1::LimitReport {
            scope_kind: "tenant".into(),
            scope: i.to_string(),
            kind: "requests".into(),
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
