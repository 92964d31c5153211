//! What outlives a change of configuration: schedulers, ejections, retry budgets, counts.
//!
//! Each lock is held for the few operations of one decision and never across an await.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weir_proto::resource::{AdminState, BalancingPolicy, Name, Pool};
use weir_proto::v1::HealthState;

use crate::balance::{
    EjectConfig, Ejector, RetryBudget, RetryConfig, Scheduler, Standing, random, round_robin,
};
use crate::snapshot::{BackendEntry, ModelEntry};

/// How long a backend that says it is busy, but not for how long, is left alone.
const BUSY_DEFAULT: Duration = Duration::from_secs(1);

/// Counts of one backend since the last report; taken by the report lane.
#[derive(Debug, Default)]
pub struct BackendRuntime {
    in_flight: AtomicU32,
    health: AtomicU8,
    successes: AtomicU64,
    connect_failures: AtomicU64,
    server_errors: AtomicU64,
    timeouts: AtomicU64,
    busy: AtomicU64,
}

/// What an attempt came to, as far as the backend is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// It answered.
    Success,
    /// Refused, reset, or no connection in time.
    ConnectFailure,
    /// 5xx, or an answer that is no answer.
    ServerError,
    /// No first byte, or silence in a stream.
    Timeout,
    /// 429 or 503 with Retry-After: busy, not broken.
    Busy,
}

impl Attempt {
    /// The metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Success => "ok",
            Self::ConnectFailure => "connect_failure",
            Self::ServerError => "server_error",
            Self::Timeout => "timeout",
            Self::Busy => "busy",
        }
    }
}

/// Counts since the last report.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// See [`Attempt::Success`].
    pub successes: u64,
    /// See [`Attempt::ConnectFailure`].
    pub connect_failures: u64,
    /// See [`Attempt::ServerError`].
    pub server_errors: u64,
    /// See [`Attempt::Timeout`].
    pub timeouts: u64,
    /// See [`Attempt::Busy`].
    pub busy: u64,
}

impl BackendRuntime {
    /// Counts one attempt.
    pub fn count(&self, attempt: Attempt) {
        let counter = match attempt {
            Attempt::Success => &self.successes,
            Attempt::ConnectFailure => &self.connect_failures,
            Attempt::ServerError => &self.server_errors,
            Attempt::Timeout => &self.timeouts,
            Attempt::Busy => &self.busy,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the counts since the last call.
    pub fn take_counts(&self) -> Counts {
        Counts {
            successes: self.successes.swap(0, Ordering::Relaxed),
            connect_failures: self.connect_failures.swap(0, Ordering::Relaxed),
            server_errors: self.server_errors.swap(0, Ordering::Relaxed),
            timeouts: self.timeouts.swap(0, Ordering::Relaxed),
            busy: self.busy.swap(0, Ordering::Relaxed),
        }
    }

    /// Requests of this gateway there now.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The cluster's verdict.
    pub fn health(&self) -> HealthState {
        HealthState::try_from(i32::from(self.health.load(Ordering::Relaxed))).unwrap_or_default()
    }

    /// Takes over the cluster's verdict.
    pub fn set_health(&self, state: HealthState) {
        self.health.store(state as i32 as u8, Ordering::Relaxed);
    }
}

/// Counts a request at a backend for as long as it lives.
#[derive(Debug)]
pub struct InFlight(Arc<BackendRuntime>);

impl InFlight {
    /// One more.
    pub fn enter(backend: &Arc<BackendRuntime>) -> Self {
        backend.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(backend.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A pool's schedulers, ejections and retry budget.
#[derive(Debug)]
pub struct PoolRuntime {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    policy: BalancingPolicy,
    /// One per model, since models of a pool may be served by different backends.
    schedulers: BTreeMap<Name, Scheduler<Name>>,
    cursor: u64,
    ejector: Ejector<Name>,
    retries: RetryBudget,
    size: usize,
}

impl PoolRuntime {
    /// The runtime of a new pool.
    pub fn new(spec: &Pool) -> Self {
        Self {
            inner: Mutex::new(Inner {
                policy: spec.balancing_policy,
                schedulers: BTreeMap::new(),
                cursor: (crate::random_unit() * 1e6) as u64,
                ejector: Ejector::new(eject_config(spec)),
                retries: RetryBudget::new(retry_config(spec), Instant::now()),
                size: 0,
            }),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over a changed spec; what is known of backends stays.
    pub fn configure(&self, spec: &Pool) {
        let mut inner = self.inner();
        inner.policy = spec.balancing_policy;
        inner.ejector.set_config(eject_config(spec));
        inner.retries.set_config(retry_config(spec));
    }

    /// Forgets backends that are gone.
    pub fn retain(&self, members: &BTreeSet<Name>) {
        let mut inner = self.inner();
        inner.size = members.len();
        inner.ejector.retain(|name| members.contains(name));
        for scheduler in inner.schedulers.values_mut() {
            scheduler.retain(|name| members.contains(name));
        }
    }

    /// The model's backends in the order in which to try them: those that may be used, the preferred region first,
    /// the policy's order within a region. When none may be used for what was observed of them, all that the
    /// operator has left active are: observed health can be overridden, an operator's word never.
    pub fn order(&self, model: &ModelEntry) -> Vec<usize> {
        let mut inner = self.inner();
        let now = Instant::now();
        let active = |b: &BackendEntry| b.spec.admin_state == AdminState::Active;
        let usable: Vec<usize> = (0..model.backends.len())
            .filter(|&i| {
                let backend = &model.backends[i].0;
                active(backend)
                    && backend.runtime.health() != HealthState::Unhealthy
                    && matches!(inner.ejector.standing(&backend.name, now), Standing::Open | Standing::Probe)
            })
            .collect();
        let usable = if usable.is_empty() {
            (0..model.backends.len()).filter(|&i| active(&model.backends[i].0)).collect()
        } else {
            usable
        };
        let mut order = inner.by_policy(model, &usable);
        order.sort_by_key(|&i| model.backends[i].0.region_rank);
        if let Some(&first) = order.first() {
            inner.ejector.begin_probe(&model.backends[first].0.name, now);
        }
        order
    }

    /// The pick had no free slot and another was used: the shares follow what was used.
    pub fn reassign(&self, model: &ModelEntry, picked: usize, used: usize) {
        let (picked, used) = (&model.backends[picked].0, &model.backends[used].0);
        if let Some(scheduler) = self.inner().schedulers.get_mut(&model.name) {
            scheduler.reassign(&picked.name, &used.name);
        }
    }

    /// Lets an attempt bear on the next choice.
    pub fn record(&self, backend: &Name, attempt: Attempt, retry_after: Option<Duration>) {
        let mut inner = self.inner();
        let (now, size) = (Instant::now(), inner.size);
        match attempt {
            Attempt::Success => inner.ejector.succeeded(backend, now),
            Attempt::Busy => {
                inner.ejector.busy(backend, retry_after.unwrap_or(BUSY_DEFAULT), now);
            }
            Attempt::ConnectFailure | Attempt::ServerError | Attempt::Timeout => {
                if let Some(until) = inner.ejector.failed(backend, size, now) {
                    let seconds = until.saturating_duration_since(now).as_secs_f64();
                    drop(inner);
                    tracing::warn!(%backend, last = attempt.label(), seconds, "ejected locally");
                }
            }
        }
    }

    /// Whether this gateway keeps away from a backend.
    pub fn is_ejected(&self, backend: &Name) -> bool {
        matches!(self.inner().ejector.standing(backend, Instant::now()), Standing::Ejected(_))
    }

    /// A request was admitted: retries are a share of these.
    pub fn count_request(&self) {
        self.inner().retries.deposit();
    }

    /// Takes a retry out of the budget, if one is left.
    pub fn may_retry(&self) -> bool {
        self.inner().retries.withdraw(Instant::now())
    }
}

impl Inner {
    fn by_policy(&mut self, model: &ModelEntry, usable: &[usize]) -> Vec<usize> {
        let entry = |&i: &usize| {
            let backend = &model.backends[i].0;
            let health = match backend.runtime.health() {
                HealthState::Degraded | HealthState::Recovering => 0.5,
                _ => 1.0,
            };
            (backend.name.clone(), f64::from(backend.spec.weight) * health)
        };
        let order = match self.policy {
            BalancingPolicy::WeightedRoundRobin => {
                // Only the best region takes part in the pick, or picks of the others would be charged for nothing.
                let best = usable.iter().map(|&i| model.backends[i].0.region_rank).min();
                let (near, far): (Vec<usize>, Vec<usize>) =
                    usable.iter().partition(|&&i| Some(model.backends[i].0.region_rank) == best);
                let entries: Vec<(Name, f64)> = near.iter().map(entry).collect();
                let scheduler = self.schedulers.entry(model.name.clone()).or_default();
                let order = scheduler.order(&entries, crate::random_unit);
                return order.into_iter().map(|i| near[i]).chain(far).collect();
            }
            BalancingPolicy::RoundRobin => {
                self.cursor = self.cursor.wrapping_add(1);
                round_robin(usable.len(), self.cursor)
            }
            BalancingPolicy::Random => random(usable.iter().map(|_| 1.0), crate::random_unit),
        };
        order.into_iter().map(|i| usable[i]).collect()
    }
}

fn eject_config(spec: &Pool) -> EjectConfig {
    EjectConfig {
        consecutive_failures: spec.ejection.consecutive_failures,
        base: spec.ejection.base_duration,
        max: spec.ejection.max_duration,
        max_ejected_percent: spec.ejection.max_ejected_percent,
        ..EjectConfig::default()
    }
}

fn retry_config(spec: &Pool) -> RetryConfig {
    RetryConfig {
        percent: f64::from(spec.retry_budget.percent),
        min_per_second: f64::from(spec.retry_budget.min_per_second),
        ..RetryConfig::default()
    }
}
