//! The reports of all gateways, summed. The latest report of a gateway counts, and is taken off when its stream ends.
//!
//! Loads are summed here. Probe results and the outcomes of requests go on to the [`Verdicts`], figures for people to the
//! [`Timeseries`]. The cost of a report depends on that report alone: with a thousand gateways, a thousand reports come
//! every second.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use weir_proto::v1;

pub(crate) use super::departures::Departures;
use super::departures::Leaving;
use super::loads::{Loads, Traffic};
use super::membership::{Membership, OpenStream};
use super::registry::{Claim, Taken};
pub(crate) use super::speeds::LastSentSpeeds;
use super::speeds::{ReportedSpeeds, SpeedSums, Speeds};
use super::timeseries::Timeseries;
use crate::verdicts::{Verdicts, gateway};

/// Most backends one gateway may report on; more than any configuration has.
const BACKENDS_MAX: usize = 10_000;
/// Most probe results taken from one report; a gateway has fewer probes under way.
const RESULTS_MAX: usize = 10_000;
/// Gateways that clean up after one that is gone: more than one, since a cleaner may go too.
const CLEANERS: usize = 3;
/// Loads are published this often at most.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(100);
/// Gateways are sent new speeds and traffic at most this often.
const NEWS_INTERVAL: Duration = Duration::from_millis(250);
/// The time constant of the paces shown to people.
const PACE_TAU: Duration = Duration::from_secs(10);

/// The sums over all reports. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Aggregate {
    reports: Arc<Mutex<Reports>>,
    loads: watch::Sender<Arc<Loads>>,
    /// Notified when a load has changed and is not published yet.
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
    /// In flight over all gateways, by backend; nothing where that is nothing.
    in_flight: BTreeMap<String, u64>,
    streams: u64,
    leaving: Leaving,
    paces: BTreeMap<String, Pace>,
    speeds: SpeedSums,
    traffic: Traffic,
    /// When gateways were last woken for new speeds and traffic.
    news_sent_at: Option<Instant>,
}

#[derive(Debug)]
struct Report {
    stream: u64,
    incarnation: String,
    sequence: u64,
    /// Backend -> in flight, ejected.
    backends: BTreeMap<String, (u32, bool)>,
    /// How fast it saw backends serve.
    reported_speeds: ReportedSpeeds,
    /// When the last report came.
    at: Instant,
}

/// How fast a backend serves real requests, over all gateways.
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

/// An average that forgets with time.
#[derive(Debug, Clone, Copy, Default)]
struct Average(Option<(f64, Instant)>);

impl Average {
    fn learn(&mut self, sample: f64) {
        let now = Instant::now();
        self.0 = Some(self.0.map_or((sample, now), |(value, at)| {
            let share = 1.0 - (-(now - at).as_secs_f64() / PACE_TAU.as_secs_f64()).exp();
            // Several gateways report at once: each counts for something.
            (value + share.max(0.05) * (sample - value), now)
        }));
    }
}

/// One report stream; dropping it takes its reports off the sums.
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

    /// The last minutes in figures.
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
        self.verdicts.set_gateway(id, first.probes.then_some(region));
        self.changed.notify_one();
        let present = self.membership.enter(&first.gateway_id);
        Ok(Reporter { aggregate: self.clone(), gateway: first.gateway_id.clone(), stream, _present: present })
    }

    /// The gateways that have ejected a backend by themselves.
    pub(crate) fn ejected_by(&self, backend: &str) -> Vec<String> {
        let reports = self.reports();
        let ejects = |report: &Report| report.backends.get(backend).is_some_and(|(_, ejected)| *ejected);
        reports.by_gateway.iter().filter(|(_, report)| ejects(report)).map(|(id, _)| id.clone()).collect()
    }

    /// What each reporting gateway has in flight at a backend, and when it last reported.
    pub(crate) fn in_flight_at(&self, backend: &str) -> BTreeMap<String, (u32, Instant)> {
        let reports = self.reports();
        let row = |report: &Report| (report.backends.get(backend).map_or(0, |(n, _)| *n), report.at);
        reports.by_gateway.iter().map(|(id, report)| (id.clone(), row(report))).collect()
    }

    /// The gateways that are gone, and every change.
    pub(crate) fn departures(&self) -> watch::Receiver<Departures> {
        self.departures.subscribe()
    }

    /// Whether a gateway is among those that clean up the leases of gateways that are gone.
    pub(crate) fn cleans_up(&self, gateway: &str) -> bool {
        self.reports().by_gateway.keys().take(CLEANERS).any(|id| id == gateway)
    }

    fn depart(&self, incarnations: Vec<String>) {
        if !incarnations.is_empty() {
            tracing::info!(?incarnations, "gateways are gone; others free what they held");
            self.departures.send_modify(|departures| departures.add(incarnations));
        }
    }

    /// Publishes loads, and finds out which gateways do not come back, until `stop`. The first change after a silence is
    /// published at once. One that is
    /// still `connected` for its configuration is not gone.
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

    /// How fast a backend serves.
    pub(crate) fn pace(&self, backend: &str) -> Pace {
        self.reports().paces.get(backend).copied().unwrap_or_default()
    }

    /// Changes when there are new speeds or traffic.
    pub(crate) fn served(&self) -> watch::Receiver<()> {
        self.served.subscribe()
    }

    /// How fast all gateways but one saw backends serve.
    pub(crate) fn speeds_without(&self, gateway: &str) -> Speeds {
        let mut reports = self.reports();
        let Reports { by_gateway, speeds, .. } = &mut *reports;
        speeds.refresh(by_gateway.values_mut().map(|report| &mut report.reported_speeds));
        by_gateway.get(gateway).map(|own| speeds.without(&own.reported_speeds)).unwrap_or_default()
    }

    /// How the requests of all gateways ended at these backends.
    pub(crate) fn traffic_at(&self, backends: &BTreeSet<&str>) -> Traffic {
        let reports = self.reports();
        let known = backends.iter().filter_map(|name| reports.traffic.get_key_value(*name));
        known.map(|(name, traffic)| (name.clone(), traffic.clone())).collect()
    }

    /// In flight per backend, and every change of it.
    pub(crate) fn loads(&self) -> watch::Receiver<Arc<Loads>> {
        self.loads.subscribe()
    }
}

impl Reports {
    /// Changes what one gateway has in flight at a backend. Returns whether that changes the sum.
    fn moved(&mut self, backend: &str, before: u32, now: u32) -> bool {
        if before == now {
            return false;
        }
        let sum = match self.in_flight.get_mut(backend) {
            Some(sum) => sum,
            None => self.in_flight.entry(backend.to_owned()).or_default(),
        };
        // What is taken away was added before.
        *sum = (*sum + u64::from(now)).saturating_sub(before.into());
        if *sum == 0 {
            self.in_flight.remove(backend);
        }
        true
    }

    /// Takes the loads of a gateway off the sums.
    fn forget(&mut self, report: &Report) {
        for (backend, (in_flight, _)) in &report.backends {
            self.moved(backend, *in_flight, 0);
        }
    }

    /// Whether to wake the report streams for new speeds and traffic: once for many reports that come together.
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

    /// Counts how requests ended.
    fn count(&mut self, backend: &v1::BackendReport) {
        let bad = [backend.connect_failures, backend.server_errors, backend.timeouts, backend.busy];
        let bad = bad.into_iter().fold(0, u64::saturating_add);
        let silent = backend.successes == 0 && bad == 0 && backend.timed_answers == 0;
        if silent || (!self.traffic.contains_key(&backend.backend) && self.traffic.len() >= BACKENDS_MAX) {
            return;
        }
        let sum = self.traffic.entry(backend.backend.clone()).or_insert_with(|| v1::FleetTraffic {
            backend: backend.backend.clone(),
            ..v1::FleetTraffic::default()
        });
        let duration = |wire: Option<prost_types::Duration>| {
            wire.and_then(|wire| Duration::try_from(wire).ok()).unwrap_or_default()
        };
        let decode = duration(sum.decode_time).saturating_add(duration(backend.decode_time));
        sum.good = sum.good.saturating_add(backend.successes);
        sum.bad = sum.bad.saturating_add(bad);
        sum.answers = sum.answers.saturating_add(backend.timed_answers);
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
    /// Takes a report over. False: it was older than the last one, or of another incarnation, or the stream has
    /// been replaced.
    pub(crate) fn report(&self, report: &v1::StreamReportsRequest) -> bool {
        let mut reports = self.aggregate.reports();
        let Some(own) = reports.by_gateway.get_mut(&self.gateway) else { return false };
        if own.stream != self.stream
            || own.incarnation != report.incarnation
            || report.gateway_id != self.gateway
            || report.sequence <= own.sequence
            || report.results.len() > RESULTS_MAX
        {
            return false;
        }
        own.sequence = report.sequence;
        own.at = Instant::now();
        // Taken out for as long as the sums are changed beside it.
        let mut known = std::mem::take(&mut own.backends);
        let mut changed = false;
        for backend in &report.backends {
            let now = (backend.in_flight, backend.ejected);
            let room = known.len() < BACKENDS_MAX;
            let before = match known.get_mut(&backend.backend) {
                Some(before) => std::mem::replace(before, now),
                None if room => known.insert(backend.backend.clone(), now).unwrap_or_default(),
                None => continue,
            };
            changed |= reports.moved(&backend.backend, before.0, now.0);
            reports.count(backend);
            reports.learn(backend);
        }
        if let Some(own) = reports.by_gateway.get_mut(&self.gateway) {
            own.backends = known;
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

    /// One that leads.
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
            aggregate.traffic_at(&["b", "c"].into()).values().map(|t| (t.good, t.bad)).collect::<Vec<_>>(),
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
}
