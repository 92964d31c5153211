//! Between the prober, the report stream and requests: assignments and orders come down, results go up, and requests that
//! wait in silence ask for probes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use weir_proto::resource::Name;
use weir_proto::v1::{ProbeAssignments, ProbeOrder, ProbeResult, ProbeTier};

/// Results that wait for a report; the oldest goes first. Far more than a second's worth of a large gateway.
const RESULTS_MAX: usize = 4096;
/// Orders that wait for the prober: one per backend and tier of a large configuration.
const ORDERS_MAX: usize = 4096;

/// What the report stream last brought.
#[derive(Debug, Clone)]
pub struct Orders {
    /// All that is assigned; `None` until something ever was.
    pub assignments: Option<Arc<ProbeAssignments>>,
    /// Since when there is no report stream; `None` while there is one.
    pub away_since: Option<Instant>,
}

/// Shared by the report stream and the prober.
#[derive(Debug)]
pub struct ProbeChannel {
    orders: watch::Sender<Orders>,
    /// Backend and tier; of two orders for the same, one is enough.
    orders_now: Mutex<BTreeMap<(String, i32), ProbeOrder>>,
    ordered: Notify,
    /// Backends whose liveness requests of this gateway ask for.
    wanted_now: Mutex<BTreeSet<Name>>,
    wanted: Notify,
    results: Mutex<VecDeque<ProbeResult>>,
    /// Notified of results that must not wait for the next report.
    urgent_results: Notify,
}

impl Default for ProbeChannel {
    fn default() -> Self {
        Self {
            orders: watch::Sender::new(Orders { assignments: None, away_since: Some(Instant::now()) }),
            orders_now: Mutex::default(),
            ordered: Notify::new(),
            wanted_now: Mutex::default(),
            wanted: Notify::new(),
            results: Mutex::default(),
            urgent_results: Notify::new(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProbeChannel {
    /// There is a report stream.
    pub fn connected(&self) {
        self.orders.send_if_modified(|orders| orders.away_since.take().is_some());
    }

    /// There is no report stream any more.
    pub fn disconnected(&self) {
        self.orders.send_if_modified(|orders| {
            let since = orders.away_since.is_none();
            orders.away_since.get_or_insert_with(Instant::now);
            since
        });
    }

    /// Takes over what is assigned.
    pub fn assign(&self, assignments: ProbeAssignments) {
        self.orders.send_modify(|orders| orders.assignments = Some(Arc::new(assignments)));
    }

    /// Takes over what is to be probed now.
    pub fn order(&self, order: ProbeOrder) {
        let mut orders = lock(&self.orders_now);
        if orders.len() < ORDERS_MAX {
            orders.insert((order.backend.clone(), order.tier), order);
        }
        drop(orders);
        self.ordered.notify_one();
    }

    /// What is assigned, and every change of it.
    pub fn orders(&self) -> watch::Receiver<Orders> {
        self.orders.subscribe()
    }

    /// What is to be probed now; returns when there is something. Cancel-safe.
    pub async fn ordered(&self) -> Vec<(String, ProbeTier)> {
        loop {
            let taken = std::mem::take(&mut *lock(&self.orders_now));
            if !taken.is_empty() {
                return taken.into_values().map(|order| (order.backend.clone(), order.tier())).collect();
            }
            self.ordered.notified().await;
        }
    }

    /// Asks for a liveness probe of this gateway's own, now.
    pub fn want(&self, backend: &Name) {
        let mut wanted = lock(&self.wanted_now);
        if wanted.len() < ORDERS_MAX {
            wanted.insert(backend.clone());
        }
        drop(wanted);
        self.wanted.notify_one();
    }

    /// The backends that were asked for; returns when there is one. Cancel-safe.
    pub async fn wanted(&self) -> BTreeSet<Name> {
        loop {
            let taken = std::mem::take(&mut *lock(&self.wanted_now));
            if !taken.is_empty() {
                return taken;
            }
            self.wanted.notified().await;
        }
    }

    /// Has a result reported; at once when it is urgent.
    pub fn report(&self, result: ProbeResult, urgent: bool) {
        let mut results = lock(&self.results);
        if results.len() >= RESULTS_MAX {
            results.pop_front();
        }
        results.push_back(result);
        drop(results);
        if urgent {
            self.urgent_results.notify_one();
        }
    }

    /// The results that no report has taken yet.
    pub fn take_results(&self) -> Vec<ProbeResult> {
        std::mem::take(&mut *lock(&self.results)).into()
    }

    /// Returns when there is a result that must not wait. Cancel-safe.
    pub async fn urgent_result(&self) {
        self.urgent_results.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn orders_for_the_same_are_one_and_results_are_bounded() {
        let channel = ProbeChannel::default();
        for _ in 0..3 {
            channel.order(ProbeOrder { backend: "b".into(), tier: ProbeTier::Liveness.into() });
        }
        assert_eq!(channel.ordered().await, [("b".to_owned(), ProbeTier::Liveness)]);
        for i in 0..RESULTS_MAX + 5 {
            channel.report(ProbeResult { backend: i.to_string(), ..Default::default() }, false);
        }
        let results = channel.take_results();
        assert_eq!((results.len(), results[0].backend.as_str()), (RESULTS_MAX, "5"), "the oldest go");
        assert!(channel.take_results().is_empty());
    }

    #[tokio::test]
    async fn requests_that_want_the_same_probe_want_one() {
        let (channel, name) = (ProbeChannel::default(), |name| Name::parse(name).expect("a name"));
        for backend in ["b", "a", "b"] {
            channel.want(&name(backend));
        }
        assert_eq!(channel.wanted().await.into_iter().collect::<Vec<_>>(), [name("a"), name("b")]);
    }
}
