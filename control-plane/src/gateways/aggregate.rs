//! The aggregate of all gateways' reports. The latest report of a gateway counts until its stream ends.
//!
//! Loads are summed here. Probe results and results of requests go to the [`Verdicts`], figures for the page to the
//! [`Timeseries`]. The cost of a report must not depend on the number of gateways: with a thousand gateways, a thousand
//! reports arrive every second.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use weir_proto::v1;
use weir_proto::v1::explain_backend_response::GatewayFailure;

pub(crate) use super::departures::Departures;
use super::departures::Leaving;
use super::loads::{Loads, Traffic};
use super::membership::{Membership, OpenStream};
use super::registry::{Claim, Taken};
pub(crate) use super::speeds::LastSentSpeeds;
use super::speeds::{ReportedSpeeds, SpeedSums, Speeds};
use super::timeseries::Timeseries;
use crate::verdicts::{Verdicts, gateway};

/// The maximum of backends in one gateway's reports; more than any configuration has.
const BACKENDS_MAX: usize = 10_000;
/// The maximum of probe results in one report; a gateway has fewer probes in progress.
const RESULTS_MAX: usize = 10_000;
/// The number of gateways that free the leases of a dead gateway. More than one, because one of them may die too.
const CLEANERS: usize = 3;
/// The shortest interval between two publications of loads.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(100);
/// The shortest interval between two messages with new speeds and traffic.
const NEWS_INTERVAL: Duration = Duration::from_millis(250);
/// The time constant of the speeds that the page and `weir backends` show.
const PACE_TAU: Duration = Duration::from_secs(10);

/// The aggregate of all reports. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Aggregate {
    reports: Arc<Mutex<Reports>>,
    loads: watch::Sender<Arc<Loads>>,
    /// Notified when a load changed and is not published yet.
    changed: Arc<Notify>,
    departures: watch::Sender<Departures>,
    /// Changes when there are new speeds or traffic.
    served: watch::Sender<()>,
    verdicts: Verdicts,
    membership: Membership,
    timeseries: Timeseries,
}

#[derive(Debug, Default)]
struct Reports {
    by_gateway: BTreeMap<String, Report>,
    /// Requests in flight over all gateways, by backend; without entries of zero.
    in_flight: BTreeMap<String, u64>,
    streams: u64,
    leaving: Leaving,
    paces: BTreeMap<String, Pace>,
    speeds: SpeedSums,
    traffic: Traffic,
    /// When the report streams were last notified of new speeds and traffic.
    news_sent_at: Option<Instant>,
}

/// Failures of one backend that are shown.
const FAILURES_SHOWN: usize = 8;
/// The most that is kept of each text in a failure, characters: what a gateway sends is bounded there too, and not trusted.
const FAILURE_TEXT_MAX: usize = 512;

/// A failure with its texts cut, on one line each.
fn bounded(failure: &v1::AttemptFailure) -> v1::AttemptFailure {
    let cut = |text: &str| text.chars().filter(|c| !c.is_control()).take(FAILURE_TEXT_MAX).collect();
    v1::AttemptFailure {
        model: cut(&failure.model),
        outcome: cut(&failure.outcome),
        message: cut(&failure.message),
        ..*failure
    }
}

#[derive(Debug)]
struct Report {
    stream: u64,
    incarnation: String,
    sequence: u64,
    /// Backend -> in flight, ejected.
    backends: BTreeMap<String, (u32, bool)>,
    /// Backend -> the last failed attempt there.
    failures: BTreeMap<String, v1::AttemptFailure>,
    /// The speeds that the gateway measured.
    reported_speeds: ReportedSpeeds,
    /// The time of the last report.
    at: Instant,
}

/// The speed of a backend for requests of all gateways.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pace {
    first_byte: Average,
    tokens_per_second: Average,
}

impl Pace {
    /// Mean time to the first byte.
    pub(crate) fn first_byte(&self) -> Option<Duration> {
        self.first_byte.0.and_then(|(seconds, _)| Duration::try_from_secs_f64(seconds).ok())
    }

    /// Output tokens per second of one answer.
    pub(crate) fn tokens_per_second(&self) -> Option<f64> {
        self.tokens_per_second.0.map(|(rate, _)| rate)
    }
}

/// An average whose samples lose weight with time.
#[derive(Debug, Clone, Copy, Default)]
struct Average(Option<(f64, Instant)>);

impl Average {
    fn learn(&mut self, sample: f64) {
        let now = Instant::now();
        self.0 = Some(self.0.map_or((sample, now), |(value, at)| {
            let share = 1.0 - (-(now - at).as_secs_f64() / PACE_TAU.as_secs_f64()).exp();
            // Several gateways report at the same time, and each sample has weight.
            (value + share.max(0.05) * (sample - value), now)
        }));
    }
}

/// One report stream; dropping it removes its reports from the sums.
#[derive(Debug)]
pub(crate) struct Reporter {
    aggregate: Aggregate,
    gateway: String,
    stream: u64,
    _present: OpenStream,
}

impl Aggregate {
    pub(crate) fn new(verdicts: Verdicts, membership: Membership) -> Self {
        Self {
            reports: Arc::default(),
            loads: watch::Sender::default(),
            changed: Arc::default(),
            departures: watch::Sender::default(),
            served: watch::Sender::default(),
            verdicts,
            membership,
            timeseries: Timeseries::default(),
        }
    }

    fn publish(&self) {
        let reports = self.reports();
        let clamped =
            |(backend, n): (&String, &u64)| (backend.clone(), u32::try_from(*n).unwrap_or(u32::MAX));
        let loads: Loads = reports.in_flight.iter().map(clamped).collect();
        drop(reports);
        self.loads.send_if_modified(|old| {
            let changed = **old != loads;
            if changed {
                *old = Arc::new(loads);
            }
            changed
        });
    }

    fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time series of the last five minutes.
    pub(crate) const fn timeseries(&self) -> &Timeseries {
        &self.timeseries
    }

    /// Opens the stream of a gateway with its first report. It replaces an older stream of the same process, and that of
    /// another process only if the token is bound to this gateway.
    pub(crate) fn join(&self, first: &v1::StreamReportsRequest, claim: &Claim) -> Result<Reporter, Taken> {
        let mut reports = self.reports();
        let there = reports.by_gateway.get(&first.gateway_id);
        if there.is_some_and(|there| !claim.may_replace(&there.incarnation, &first.incarnation)) {
            return Err(Taken::ByAnother(first.gateway_id.clone()));
        }
        reports.streams += 1;
        let stream = reports.streams;
        let report = Report {
            stream,
            incarnation: first.incarnation.clone(),
            sequence: 0,
            backends: BTreeMap::new(),
            failures: BTreeMap::new(),
            reported_speeds: ReportedSpeeds::default(),
            at: Instant::now(),
        };
        let mut gone = reports.leaving.back(&first.gateway_id, &first.incarnation);
        if let Some(old) = reports.by_gateway.insert(first.gateway_id.clone(), report) {
            reports.forget(&old);
            gone.extend(Some(old.incarnation).filter(|old| *old != first.incarnation));
        }
        drop(reports);
        self.depart(gone);
        let (id, region) = (gateway(&first.gateway_id), first.region.clone());
        self.verdicts.set_gateway(id, first.can_probe.then_some(region));
        self.changed.notify_one();
        let present = self.membership.enter(&first.gateway_id);
        Ok(Reporter { aggregate: self.clone(), gateway: first.gateway_id.clone(), stream, _present: present })
    }

    /// The gateways that have ejected a backend locally.
    pub(crate) fn ejected_by(&self, backend: &str) -> Vec<String> {
        let reports = self.reports();
        let ejects = |report: &Report| report.backends.get(backend).is_some_and(|(_, ejected)| *ejected);
        reports.by_gateway.iter().filter(|(_, report)| ejects(report)).map(|(id, _)| id.clone()).collect()
    }

    /// The last failed attempt of each gateway at a backend, newest first, at most [`FAILURES_SHOWN`].
    pub(crate) fn failures_at(&self, backend: &str) -> Vec<GatewayFailure> {
        let reports = self.reports();
        let of = |(id, report): (&String, &Report)| {
            let failure = report.failures.get(backend)?.clone();
            Some(GatewayFailure { gateway_id: id.clone(), failure: Some(failure) })
        };
        let mut failures: Vec<GatewayFailure> = reports.by_gateway.iter().filter_map(of).collect();
        drop(reports);
        let time = |failure: &GatewayFailure| {
            failure.failure.as_ref().and_then(|failure| failure.time).map_or((0, 0), |t| (t.seconds, t.nanos))
        };
        failures.sort_by_key(|failure| std::cmp::Reverse(time(failure)));
        failures.truncate(FAILURES_SHOWN);
        failures
    }

    /// The requests in flight at a backend per gateway, with the time of the gateway's last report.
    pub(crate) fn in_flight_at(&self, backend: &str) -> BTreeMap<String, (u32, Instant)> {
        let reports = self.reports();
        let row = |report: &Report| (report.backends.get(backend).map_or(0, |(n, _)| *n), report.at);
        reports.by_gateway.iter().map(|(id, report)| (id.clone(), row(report))).collect()
    }

    /// The departures of gateways and their changes.
    pub(crate) fn departures(&self) -> watch::Receiver<Departures> {
        self.departures.subscribe()
    }

    /// Whether a gateway frees the leases of dead gateways.
    pub(crate) fn cleans_up(&self, gateway: &str) -> bool {
        self.reports().by_gateway.keys().take(CLEANERS).any(|id| id == gateway)
    }

    fn depart(&self, incarnations: Vec<String>) {
        if !incarnations.is_empty() {
            tracing::info!(?incarnations, "gateways are gone; others free what they held");
            self.departures.send_modify(|departures| departures.add(incarnations));
        }
    }

    /// Publishes loads and detects dead gateways, until `stop`. The first change after a time without changes is published
    /// at once. A gateway that is still `connected` with its configuration stream is not dead.
    pub(crate) async fn run(self, connected: impl Fn(&str) -> bool, stop: CancellationToken) {
        loop {
            let (gone, due) = {
                let mut reports = self.reports();
                let gone = reports.leaving.gone(&connected);
                (gone, reports.leaving.due())
            };
            self.depart(gone);
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.changed.notified() => {
                    self.publish();
                    sleep(PUBLISH_INTERVAL).await;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
        }
    }

    /// The speed of a backend.
    pub(crate) fn pace(&self, backend: &str) -> Pace {
        self.reports().paces.get(backend).copied().unwrap_or_default()
    }

    /// Changes when there are new speeds or traffic.
    pub(crate) fn served(&self) -> watch::Receiver<()> {
        self.served.subscribe()
    }

    /// The speeds of backends as all gateways but one measured them.
    pub(crate) fn speeds_without(&self, gateway: &str) -> Speeds {
        let mut reports = self.reports();
        let Reports { by_gateway, speeds, .. } = &mut *reports;
        speeds.refresh(by_gateway.values_mut().map(|report| &mut report.reported_speeds));
        by_gateway.get(gateway).map(|own| speeds.without(&own.reported_speeds)).unwrap_or_default()
    }

    /// The results of all gateways' requests to these backends.
    pub(crate) fn traffic_at(&self, backends: &BTreeSet<&str>) -> Traffic {
        let reports = self.reports();
        let known = backends.iter().filter_map(|name| reports.traffic.get_key_value(*name));
        known.map(|(name, traffic)| (name.clone(), traffic.clone())).collect()
    }

    /// Requests in flight per backend, and their changes.
    pub(crate) fn loads(&self) -> watch::Receiver<Arc<Loads>> {
        self.loads.subscribe()
    }
}

impl Reports {
    /// Sets the requests in flight of one gateway at a backend. Returns whether the sum changed.
    fn moved(&mut self, backend: &str, before: u32, now: u32) -> bool {
        if before == now {
            return false;
        }
        let sum = match self.in_flight.get_mut(backend) {
            Some(sum) => sum,
            None => self.in_flight.entry(backend.to_owned()).or_default(),
        };
        // The old value was added before, so the difference is not negative.
        *sum = (*sum + u64::from(now)).saturating_sub(before.into());
        if *sum == 0 {
            self.in_flight.remove(backend);
        }
        true
    }

    /// Removes the loads of a gateway from the sums.
    fn forget(&mut self, report: &Report) {
        for (backend, (in_flight, _)) in &report.backends {
            self.moved(backend, *in_flight, 0);
        }
    }

    /// Whether to notify the report streams of new speeds and traffic: once for many reports that arrive together.
    fn is_news_due(&mut self, report: &v1::StreamReportsRequest) -> bool {
        let now = Instant::now();
        let says =
            report.backends.iter().any(|b| b.successes > 0 || b.timed_answers > 0 || !b.speeds.is_empty());
        let due = says && self.news_sent_at.is_none_or(|at| now - at >= NEWS_INTERVAL);
        if due {
            self.news_sent_at = Some(now);
        }
        due
    }

    /// Counts the results of requests.
    fn count(&mut self, backend: &v1::BackendReport) {
        let failures = [backend.connect_failures, backend.server_errors, backend.timeouts, backend.busy];
        let failures = failures.into_iter().fold(0, u64::saturating_add);
        let silent = backend.successes == 0 && failures == 0 && backend.timed_answers == 0;
        if silent || (!self.traffic.contains_key(&backend.backend) && self.traffic.len() >= BACKENDS_MAX) {
            return;
        }
        let sum = self.traffic.entry(backend.backend.clone()).or_insert_with(|| v1::AggregateTraffic {
            backend: backend.backend.clone(),
            ..v1::AggregateTraffic::default()
        });
        let duration = |wire: Option<prost_types::Duration>| {
            wire.and_then(|wire| Duration::try_from(wire).ok()).unwrap_or_default()
        };
        let decode = duration(sum.decode_time).saturating_add(duration(backend.decode_time));
        sum.successes = sum.successes.saturating_add(backend.successes);
        sum.failures = sum.failures.saturating_add(failures);
        sum.timed_answers = sum.timed_answers.saturating_add(backend.timed_answers);
        sum.output_tokens = sum.output_tokens.saturating_add(backend.output_tokens);
        sum.decode_time = prost_types::Duration::try_from(decode).ok();
    }

    fn learn(&mut self, backend: &v1::BackendReport) {
        if !self.paces.contains_key(&backend.backend) && self.paces.len() >= BACKENDS_MAX {
            return;
        }
        let seconds = |wire: &Option<prost_types::Duration>| {
            wire.and_then(|wire| Duration::try_from(wire).ok()).map(|d| d.as_secs_f64())
        };
        let first_byte = seconds(&backend.first_byte_mean);
        let decode =
            seconds(&backend.decode_time).filter(|seconds| *seconds > 0.0 && backend.output_tokens > 0);
        if first_byte.is_none() && decode.is_none() {
            return;
        }
        let pace = self.paces.entry(backend.backend.clone()).or_default();
        if let Some(seconds) = first_byte {
            pace.first_byte.learn(seconds);
        }
        if let Some(seconds) = decode {
            pace.tokens_per_second.learn(backend.output_tokens as f64 / seconds);
        }
    }
}

impl Reporter {
    /// Applies a report. Returns false if it is older than the last one, is of another incarnation, or if the stream was
    /// replaced.
    pub(crate) fn report(&self, report: &v1::StreamReportsRequest) -> bool {
        let mut reports = self.aggregate.reports();
        let Some(own) = reports.by_gateway.get_mut(&self.gateway) else { return false };
        if own.stream != self.stream
            || own.incarnation != report.incarnation
            || report.gateway_id != self.gateway
            || report.sequence <= own.sequence
            || report.probe_results.len() > RESULTS_MAX
        {
            return false;
        }
        own.sequence = report.sequence;
        own.at = Instant::now();
        // Removed from the map while the sums are changed.
        let mut known = std::mem::take(&mut own.backends);
        let mut failures = std::mem::take(&mut own.failures);
        let mut changed = false;
        for backend in &report.backends {
            let now = (backend.in_flight, backend.ejected);
            let room = known.len() < BACKENDS_MAX;
            let before = match known.get_mut(&backend.backend) {
                Some(before) => std::mem::replace(before, now),
                None if room => known.insert(backend.backend.clone(), now).unwrap_or_default(),
                None => continue,
            };
            if let Some(failure) = &backend.last_failure {
                failures.insert(backend.backend.clone(), bounded(failure));
            }
            changed |= reports.moved(&backend.backend, before.0, now.0);
            reports.count(backend);
            reports.learn(backend);
        }
        if let Some(own) = reports.by_gateway.get_mut(&self.gateway) {
            own.backends = known;
            own.failures = failures;
            own.reported_speeds
                .report(report.backends.iter().map(|backend| (&backend.backend, &backend.speeds)));
        }
        let news = reports.is_news_due(report);
        drop(reports);
        if news {
            self.aggregate.served.send_replace(());
        }
        if changed {
            self.aggregate.changed.notify_one();
        }
        self.aggregate.timeseries.report(&self.gateway, report);
        self.aggregate.verdicts.report(&gateway(&self.gateway), report);
        true
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        let mut reports = self.aggregate.reports();
        if reports.by_gateway.get(&self.gateway).is_none_or(|own| own.stream != self.stream) {
            return;
        }
        if let Some(own) = reports.by_gateway.remove(&self.gateway) {
            reports.forget(&own);
            reports.leaving.left(&self.gateway, own.incarnation);
        }
        self.aggregate.timeseries.left(&self.gateway);
        drop(reports);
        self.aggregate.verdicts.set_gateway(gateway(&self.gateway), None);
        self.aggregate.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The aggregate of a leader.
    fn alone() -> crate::leader::Leads {
        watch::Sender::new(Some(1)).subscribe()
    }

    fn report(sequence: u64, in_flight: u32) -> v1::StreamReportsRequest {
        let backend = v1::BackendReport {
            backend: "b".into(),
            in_flight,
            successes: 4,
            connect_failures: 1,
            server_errors: 1,
            timeouts: 1,
            busy: 1,
            ..Default::default()
        };
        v1::StreamReportsRequest {
            gateway_id: "g".into(),
            incarnation: "i".into(),
            sequence,
            backends: vec![backend],
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn late_reports_are_dropped_and_data_goes_with_the_stream() {
        let aggregate = Aggregate::new(Verdicts::new(Arc::default(), None, alone()), Membership::default());
        let old = aggregate
            .join(&v1::StreamReportsRequest { incarnation: "h".into(), ..report(0, 0) }, &Claim::Own)
            .unwrap();
        let reporter = aggregate.join(&report(0, 0), &Claim::Own).unwrap();
        assert!(!old.report(&report(9, 9)), "a replaced stream");
        drop(old);
        assert!(reporter.report(&report(2, 5)));
        assert!(!reporter.report(&report(1, 7)), "an older sequence");
        assert!(!reporter.report(&v1::StreamReportsRequest { incarnation: "x".into(), ..report(3, 7) }));
        aggregate.publish();
        assert_eq!(aggregate.loads().borrow().get("b"), Some(&5));
        assert_eq!(
            aggregate
                .traffic_at(&["b", "c"].into())
                .values()
                .map(|t| (t.successes, t.failures))
                .collect::<Vec<_>>(),
            [(4, 4)]
        );
        drop(reporter);
        aggregate.publish();
        assert!(aggregate.loads().borrow().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_come_back_is_gone_and_who_does_is_not() {
        let aggregate = Aggregate::new(Verdicts::new(Arc::default(), None, alone()), Membership::default());
        let (stop, mut departures) = (CancellationToken::new(), aggregate.departures());
        let connected = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let held = connected.clone();
        let running = tokio::spawn(
            aggregate.clone().run(move |_| held.load(std::sync::atomic::Ordering::Relaxed), stop.clone()),
        );
        let of = |id: &str, incarnation: &str| v1::StreamReportsRequest {
            gateway_id: id.into(),
            incarnation: incarnation.into(),
            ..report(0, 0)
        };
        // Its stream breaks and it returns.
        drop(aggregate.join(&of("a", "a1"), &Claim::Own).unwrap());
        let stays = aggregate.join(&of("a", "a1"), &Claim::Own).unwrap();
        // Still there for its configuration.
        drop(aggregate.join(&of("b", "b1"), &Claim::Own).unwrap());
        tokio::time::sleep(crate::gateways::departures::GRACE * 10).await;
        assert_eq!(departures.borrow_and_update().last(), 0);
        connected.store(false, std::sync::atomic::Ordering::Relaxed);
        departures.changed().await.expect("open");
        assert_eq!(departures.borrow_and_update().after(0), ["b1"]);
        // Another process under the same name: at once, and the one before it is gone for good.
        let again = aggregate.join(&of("a", "a2"), &Claim::Own).unwrap();
        assert_eq!(departures.borrow_and_update().after(1), ["a1"]);
        drop((stays, again));
        let _third = aggregate.join(&of("a", "a3"), &Claim::Own).unwrap();
        assert_eq!(departures.borrow_and_update().after(1), ["a1", "a2"]);
        assert!(aggregate.cleans_up("a") && !aggregate.cleans_up("b"));
        stop.cancel();
        running.await.expect("ended");
    }

    #[tokio::test]
    async fn the_last_failures_are_shown_newest_first_and_bounded() {
        let aggregate = Aggregate::new(Verdicts::new(Arc::default(), None, alone()), Membership::default());
        let reporters: Vec<Reporter> = (0..FAILURES_SHOWN as i64 + 3)
            .map(|n| {
                let failure = v1::AttemptFailure {
                    time: Some(prost_types::Timestamp { seconds: n, nanos: 0 }),
                    status: 401,
                    message: format!("{}\n", "x".repeat(10_000)),
                    ..Default::default()
                };
                let backend = v1::BackendReport {
                    backend: "b".into(),
                    last_failure: Some(failure),
                    ..Default::default()
                };
                let report = v1::StreamReportsRequest {
                    gateway_id: format!("gw-{n}"),
                    incarnation: "i".into(),
                    sequence: 1,
                    backends: vec![backend],
                    ..Default::default()
                };
                let reporter = aggregate.join(&report, &Claim::Own).expect("a place");
                assert!(reporter.report(&report));
                reporter
            })
            .collect();
        let failures = aggregate.failures_at("b");
        assert_eq!((failures.len(), failures[0].gateway_id.as_str()), (FAILURES_SHOWN, "gw-10"));
        let failure = failures[0].failure.as_ref().expect("a failure");
        assert_eq!((failure.status, failure.message.len()), (401, FAILURE_TEXT_MAX));
        assert!(aggregate.failures_at("other").is_empty());
        drop(reporters);
        assert!(aggregate.failures_at("b").is_empty());
    }
}
