//! What gateways see, gathered: the latest value wins, and what a gateway said goes when its stream ends.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;
use weir_proto::v1;

/// The verdicts, by backend.
pub(crate) type Healths = BTreeMap<String, v1::BackendHealth>;
/// In flight over all gateways, by backend.
pub(crate) type Loads = BTreeMap<String, u32>;

/// Most backends one gateway may report on; more than any configuration has.
const BACKENDS_MAX: usize = 10_000;

/// The gathered picture. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fleet {
    reports: Arc<Mutex<Reports>>,
    loads: watch::Sender<Arc<Loads>>,
    healths: watch::Sender<Arc<Healths>>,
}

#[derive(Debug, Default)]
struct Reports {
    by_gateway: BTreeMap<String, Report>,
    streams: u64,
}

#[derive(Debug)]
struct Report {
    stream: u64,
    incarnation: String,
    sequence: u64,
    /// Backend -> in flight, ejected.
    backends: BTreeMap<String, (u32, bool)>,
    /// When the last report came.
    at: Instant,
}

/// The place of one report stream; dropping it takes away what came over it.
#[derive(Debug)]
pub(crate) struct Reporter {
    fleet: Fleet,
    gateway: String,
    stream: u64,
}

impl Fleet {
    fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A gateway's stream begins with its first report; an older stream of the same gateway has no say any more.
    pub(crate) fn join(&self, gateway: &str, incarnation: &str) -> Reporter {
        let mut reports = self.reports();
        reports.streams += 1;
        let stream = reports.streams;
        let report = Report {
            stream,
            incarnation: incarnation.to_owned(),
            sequence: 0,
            backends: BTreeMap::new(),
            at: Instant::now(),
        };
        reports.by_gateway.insert(gateway.to_owned(), report);
        drop(reports);
        // Wakes those who count gateways.
        self.loads.send_modify(|_| {});
        Reporter { fleet: self.clone(), gateway: gateway.to_owned(), stream }
    }

    /// The ids of those that report.
    pub(crate) fn reporting(&self) -> BTreeSet<String> {
        self.reports().by_gateway.keys().cloned().collect()
    }

    /// The gateways that keep away from a backend.
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

    /// In flight per backend, and every change of it.
    pub(crate) fn loads(&self) -> watch::Receiver<Arc<Loads>> {
        self.loads.subscribe()
    }

    /// The verdicts, and every change of them.
    pub(crate) fn healths(&self) -> watch::Receiver<Arc<Healths>> {
        self.healths.subscribe()
    }

    /// Sets a verdict.
    pub(crate) fn judge(&self, health: v1::BackendHealth) {
        self.healths.send_modify(|all| {
            Arc::make_mut(all).insert(health.backend.clone(), health);
        });
    }

    /// Takes back the verdict on a backend that is not watched any more.
    pub(crate) fn forget(&self, backend: &str) {
        self.healths.send_if_modified(|all| {
            all.contains_key(backend) && Arc::make_mut(all).remove(backend).is_some()
        });
    }

    fn sum(&self, reports: &Reports) {
        let mut loads = Loads::new();
        for (backend, (in_flight, _)) in reports.by_gateway.values().flat_map(|report| &report.backends) {
            let sum = loads.entry(backend.clone()).or_default();
            *sum = sum.saturating_add(*in_flight);
        }
        self.loads.send_if_modified(|old| {
            let changed = **old != loads;
            if changed {
                *old = Arc::new(loads);
            }
            changed
        });
    }
}

impl Reporter {
    /// Takes a report over. False: it was older than the last one, or of another incarnation, or the stream has
    /// been replaced.
    pub(crate) fn report(&self, report: &v1::StreamReportsRequest) -> bool {
        let mut reports = self.fleet.reports();
        let Some(own) = reports.by_gateway.get_mut(&self.gateway) else { return false };
        if own.stream != self.stream
            || own.incarnation != report.incarnation
            || report.gateway_id != self.gateway
            || report.sequence <= own.sequence
        {
            return false;
        }
        own.sequence = report.sequence;
        own.at = Instant::now();
        for backend in &report.backends {
            if own.backends.len() < BACKENDS_MAX || own.backends.contains_key(&backend.backend) {
                own.backends.insert(backend.backend.clone(), (backend.in_flight, backend.ejected));
            }
        }
        self.fleet.sum(&reports);
        true
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        let mut reports = self.fleet.reports();
        if reports.by_gateway.get(&self.gateway).is_some_and(|own| own.stream == self.stream) {
            reports.by_gateway.remove(&self.gateway);
            self.fleet.sum(&reports);
            self.fleet.loads.send_modify(|_| {});
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(sequence: u64, in_flight: u32) -> v1::StreamReportsRequest {
        let backend = v1::BackendReport { backend: "b".into(), in_flight, ..Default::default() };
        v1::StreamReportsRequest {
            gateway_id: "g".into(),
            incarnation: "i".into(),
            sequence,
            backends: vec![backend],
        }
    }

    #[test]
    fn late_reports_are_dropped_and_data_goes_with_the_stream() {
        let fleet = Fleet::default();
        let old = fleet.join("g", "h");
        let reporter = fleet.join("g", "i");
        assert!(!old.report(&report(9, 9)), "a replaced stream");
        drop(old);
        assert!(reporter.report(&report(2, 5)));
        assert!(!reporter.report(&report(1, 7)), "an older sequence");
        assert!(!reporter.report(&v1::StreamReportsRequest { incarnation: "x".into(), ..report(3, 7) }));
        assert_eq!(fleet.loads().borrow().get("b"), Some(&5));
        drop(reporter);
        assert!(fleet.loads().borrow().is_empty());
    }
}
