//! Between the prober and the report lane: assignments and orders come down, results go up.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use weir_proto::v1::{ProbeAssignments, ProbeOrder, ProbeResult, ProbeTier};

/// Results that wait for a report; the oldest goes first. Far more than a second's worth of a large gateway.
const RESULTS_MAX: usize = 4096;
/// Orders that wait for the prober: one per backend and tier of a large configuration.
const ORDERS_MAX: usize = 4096;

/// What the lane last brought.
#[derive(Debug, Clone)]
pub struct Orders {
    /// All that is assigned; `None` until something ever was.
    pub assignments: Option<Arc<ProbeAssignments>>,
    /// Since when the lane is away; `None` while it is there.
    pub away_since: Option<Instant>,
}

/// Shared by the report lane and the prober.
#[derive(Debug)]
pub struct ProbeLane {
    orders: watch::Sender<Orders>,
    /// Backend and tier; of two orders for the same, one is enough.
    urgent: Mutex<BTreeMap<(String, i32), ProbeOrder>>,
    ordered: Notify,
    results: Mutex<VecDeque<ProbeResult>>,
    /// Told of results that must not wait for the next report.
    hurry: Notify,
}

impl Default for ProbeLane {
    fn default() -> Self {
        Self {
            orders: watch::Sender::new(Orders { assignments: None, away_since: Some(Instant::now()) }),
            urgent: Mutex::default(),
            ordered: Notify::new(),
            results: Mutex::default(),
            hurry: Notify::new(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProbeLane {
    /// The lane is heard.
    pub fn heard(&self) {
        self.orders.send_if_modified(|orders| orders.away_since.take().is_some());
    }

    /// The lane is away.
    pub fn away(&self) {
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

    /// Takes over what is to be looked at now.
    pub fn order(&self, order: ProbeOrder) {
        let mut urgent = lock(&self.urgent);
        if urgent.len() < ORDERS_MAX {
            urgent.insert((order.backend.clone(), order.tier), order);
        }
        drop(urgent);
        self.ordered.notify_one();
    }

    /// What is assigned, and every change of it.
    pub fn orders(&self) -> watch::Receiver<Orders> {
        self.orders.subscribe()
    }

    /// What is to be looked at now; returns when there is something. Cancel-safe.
    pub async fn ordered(&self) -> Vec<(String, ProbeTier)> {
        loop {
            let taken = std::mem::take(&mut *lock(&self.urgent));
            if !taken.is_empty() {
                return taken.into_values().map(|order| (order.backend.clone(), order.tier())).collect();
            }
            self.ordered.notified().await;
        }
    }

    /// Has a result reported; at once when it is news.
    pub fn report(&self, result: ProbeResult, news: bool) {
        let mut results = lock(&self.results);
        if results.len() >= RESULTS_MAX {
            results.pop_front();
        }
        results.push_back(result);
        drop(results);
        if news {
            self.hurry.notify_one();
        }
    }

    /// The results that no report has taken yet.
    pub fn take_results(&self) -> Vec<ProbeResult> {
        std::mem::take(&mut *lock(&self.results)).into()
    }

    /// Returns when there is a result that must not wait. Cancel-safe.
    pub async fn hurry(&self) {
        self.hurry.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn orders_for_the_same_are_one_and_results_are_bounded() {
        let lane = ProbeLane::default();
        for _ in 0..3 {
            lane.order(ProbeOrder { backend: "b".into(), tier: ProbeTier::Liveness.into() });
        }
        assert_eq!(lane.ordered().await, [("b".to_owned(), ProbeTier::Liveness)]);
        for i in 0..RESULTS_MAX + 5 {
            lane.report(ProbeResult { backend: i.to_string(), ..Default::default() }, false);
        }
        let results = lane.take_results();
        assert_eq!((results.len(), results[0].backend.as_str()), (RESULTS_MAX, "5"), "the oldest go");
        assert!(lane.take_results().is_empty());
    }
}
