//! What one pool remembers: balancers, ejections, the retry budget.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;
use weir_proto::resource::{BalancingPolicy, Name, Pool};
use weir_proto::v1::HealthState;

use super::backend::{BackendEntry, ModelBackend};
use super::backend_state::AttemptOutcome;
use super::balance::{
    Balancer, Candidate, Candidates, ChooseConfig, Effective, EjectConfig, EjectionStatus, Ejector, FEW,
    HedgeDelayConfig, Measure, Pace, Policy, RetryBudget, RetryConfig, Sample, Usability, View, claim_probe,
    is_panic, leave_probation,
};
use super::roster::Roster;

/// How long a busy backend without a Retry-After is left out.
const BUSY_DEFAULT: Duration = Duration::from_secs(1);

/// How long a backend is left alone at first that refuses the gateway's credential, or whose account has no quota left.
/// Minutes, not seconds: people mend it. A request in that time is lost on it.
const REFUSED_BASE: Duration = Duration::from_secs(30);

/// A pool's balancers, ejections and retry budget; outlives a change of its spec.
#[derive(Debug)]
pub struct PoolState {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    choose: ChooseConfig,
    /// Whether backends are ranked by their own priority before their region.
    by_priority: bool,
    /// `None`: a silent backend is waited for alone.
    hedge_delay: Option<HedgeDelayConfig>,
    /// One per model, since models of a pool may be served by different backends, at different speeds.
    balancers: BTreeMap<Name, Balancer>,
    ejector: Ejector<Name>,
    retries: RetryBudget,
    size: usize,
}

/// Among which backends to choose, and for what.
#[derive(Debug, Clone, Copy)]
pub struct Selection<'a> {
    /// The model.
    pub model: &'a Name,
    /// Its backends.
    pub backends: &'a [ModelBackend],
    /// What the model keeps for choices.
    pub roster: &'a Roster,
    /// How many gateways there are.
    pub gateways: u32,
    /// The hash of how the request begins.
    pub prefix: Option<u64>,
}

/// The weight of one backend for one model, and what it was made of.
#[derive(Debug, Clone)]
pub struct BackendWeight {
    /// The backend.
    pub backend: Name,
    /// The factors.
    pub effective: Effective,
    /// What the cluster has there.
    pub fleet_in_flight: f64,
    /// Whether it may be used.
    pub healthy: bool,
}

impl PoolState {
    /// The state of a new pool.
    pub fn new(spec: &Pool) -> Self {
        let inner = Inner {
            choose: choose_config(spec),
            by_priority: spec.balancing_policy == BalancingPolicy::Priority,
            hedge_delay: hedge_delay_config(spec),
            balancers: BTreeMap::new(),
            ejector: Ejector::new(eject_config(spec)),
            retries: RetryBudget::new(retry_config(spec), Instant::now()),
            size: 0,
        };
        Self { inner: Mutex::new(inner) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over a changed spec; what is known of backends stays.
    pub fn configure(&self, spec: &Pool) {
        let mut inner = self.inner();
        inner.choose = choose_config(spec);
        inner.by_priority = spec.balancing_policy == BalancingPolicy::Priority;
        inner.hedge_delay = hedge_delay_config(spec);
        inner.ejector.set_config(eject_config(spec));
        inner.retries.set_config(retry_config(spec));
    }

    /// Forgets how a backend failed, since it is asked in another way from now on.
    pub fn forget_failures(&self, backend: &Name) {
        self.inner().ejector.retain(|name| name != backend);
    }

    /// Forgets backends that are gone.
    pub fn retain(&self, members: &BTreeSet<Name>) {
        let mut inner = self.inner();
        inner.size = members.len();
        inner.ejector.retain(|name| members.contains(name));
        let ids: BTreeSet<u64> =
            members.iter().map(|name| super::balance::stable_hash(name.as_str().as_bytes())).collect();
        for balancer in inner.balancers.values_mut() {
            balancer.retain(|id| ids.contains(&id));
        }
    }

    /// The model's backends in the order in which to try them, at first: all of few backends (see [`Balancer::order`]), the
    /// first few of many (see [`Balancer::few`]). What the operator does not want used is never among them, whatever else
    /// fails. With the number of its probe if the first of them is on probation.
    pub fn order(&self, choice: &Selection<'_>) -> (Candidates, Option<u64>) {
        let mut inner = self.inner();
        let now = Instant::now();
        let Inner { choose, by_priority, balancers, ejector, .. } = &mut *inner;
        let Selection { backends, roster, gateways, prefix, .. } = *choice;
        let active = roster.active(backends);
        let look = |at: usize| view(&backends[active[at]].entry, ejector, *by_priority, gateways, now);
        let balancer = balancers.entry(choice.model.clone()).or_default();
        let (mut candidates, panic) = if active.len() <= FEW {
            let views: SmallVec<[View; FEW]> = (0..active.len()).map(look).collect();
            let candidates = balancer.order(choose, &views, prefix, now, weir_runtime::random_unit);
            (candidates, is_panic(choose, &views))
        } else {
            let (views, looked) = (&mut roster.views(), (active.len(), look));
            // In a panic those on probation come after all others, which are not here.
            (balancer.few(choose, views, prefix, looked, now, weir_runtime::random_unit), false)
        };
        candidates.iter_mut().for_each(|candidate| candidate.index = active[candidate.index]);
        let name = |index: usize| &backends[index].entry.name;
        let probe = claim_probe(ejector, &mut candidates, name, panic, now);
        (candidates, probe)
    }

    /// The backends after these first `few`, which have no free slot; none of a model with few backends.
    pub fn rest(&self, choice: &Selection<'_>, few: &[Candidate]) -> Candidates {
        let Selection { backends, roster, gateways, prefix, .. } = *choice;
        let active = roster.active(backends);
        if active.len() <= FEW {
            return Candidates::new();
        }
        let mut inner = self.inner();
        let now = Instant::now();
        roster.views().expire();
        let Inner { choose, by_priority, balancers, ejector, .. } = &mut *inner;
        let views: Vec<View> = active
            .iter()
            .map(|&index| view(&backends[index].entry, ejector, *by_priority, gateways, now))
            .collect();
        let place = |c: &Candidate| Some(Candidate { index: active.binary_search(&c.index).ok()?, ..*c });
        let few: Candidates = few.iter().filter_map(place).collect();
        let balancer = balancers.entry(choice.model.clone()).or_default();
        let mut rest = balancer.rest(choose, &views, prefix, &few, weir_runtime::random_unit);
        let first = few.first().map(|first| first.index);
        leave_probation(&mut rest, is_panic(choose, &views), |at| {
            let status = || ejector.status(&backends[active[at]].entry.name, now);
            first != Some(at) && status() == EjectionStatus::Probe
        });
        rest.iter_mut().for_each(|candidate| candidate.index = active[candidate.index]);
        rest
    }

    /// The pick had no free slot and another was used: the shares follow what was used.
    pub fn reassign(&self, model: &Name, picked: &BackendEntry, used: &BackendEntry) {
        if let Some(balancer) = self.inner().balancers.get_mut(model) {
            balancer.reassign(picked.id, used.id);
        }
    }

    /// The probe of this number proved nothing; see [`Ejector::abandon_probe`].
    pub fn abandon_probe(&self, backend: &Name, number: u64) {
        self.inner().ejector.abandon_probe(backend, number);
    }

    /// Records a failed attempt for the next choices. `sample` has its time.
    pub fn failed(
        &self,
        model: &Name,
        backend: &BackendEntry,
        outcome: AttemptOutcome,
        sample: &Sample,
        retry_after: Option<Duration>,
    ) {
        let mut inner = self.inner();
        let (now, size, name) = (Instant::now(), inner.size, &backend.name);
        let until = match outcome {
            AttemptOutcome::Success => return,
            AttemptOutcome::Busy => {
                inner.ejector.busy(name, retry_after.unwrap_or(BUSY_DEFAULT), now);
                return;
            }
            AttemptOutcome::CredentialRefused => Some(inner.ejector.refused(name, REFUSED_BASE, now)),
            AttemptOutcome::QuotaUsedUp => {
                Some(inner.ejector.refused(name, retry_after.unwrap_or_default().max(REFUSED_BASE), now))
            }
            AttemptOutcome::ConnectFailure
            | AttemptOutcome::ServerError
            | AttemptOutcome::InvalidAnswer
            | AttemptOutcome::NoModel
            | AttemptOutcome::Timeout => inner.ejector.failed(name, size, now),
            AttemptOutcome::Overtaken => inner.ejector.overtaken(name, size, now),
        };
        inner.balancers.entry(model.clone()).or_default().speeds.add_failure(backend.id, sample, now);
        drop(inner);
        if let Some(until) = until {
            let seconds = until.saturating_duration_since(now).as_secs_f64();
            tracing::warn!(backend = %name, last = outcome.label(), seconds, "ejected locally");
        }
    }

    /// Records a complete answer that is not the backend's fault.
    pub fn succeeded(&self, model: &Name, backend: &BackendEntry, sample: Option<&Sample>) {
        let (mut inner, now) = (self.inner(), Instant::now());
        inner.ejector.succeeded(&backend.name, now);
        if let Some(sample) = sample {
            inner.balancers.entry(model.clone()).or_default().add(backend.id, sample, now);
        }
    }

    /// The first byte of an answer came, after `sample.took`.
    pub fn began(&self, model: &Name, backend: &BackendEntry, stream: bool, sample: &Sample) {
        let (mut inner, now) = (self.inner(), Instant::now());
        inner.ejector.began(&backend.name);
        let balancer = inner.balancers.entry(model.clone()).or_default();
        balancer.hedge_delays.add(backend.id, stream, sample.prompt_tokens, sample.took);
        if stream {
            balancer.add(backend.id, sample, now);
        }
    }

    /// Records a first-byte timeout.
    pub fn first_byte_timed_out(&self, model: &Name, backend: u64, stream: bool) {
        self.inner().balancers.entry(model.clone()).or_default().hedge_delays.timed_out(backend, stream);
    }

    /// How long to wait for the first byte before another backend is tried as well; `None` is until it times out, because
    /// the pool wants no hedge or too little is known.
    pub fn hedge_delay(
        &self,
        model: &Name,
        backend: u64,
        stream: bool,
        prompt_tokens: u64,
    ) -> Option<Duration> {
        let inner = self.inner();
        let config = inner.hedge_delay?;
        inner.balancers.get(model)?.hedge_delays.delay(backend, stream, prompt_tokens, &config)
    }

    /// A liveness probe of this gateway failed: as telling as a request that could not connect.
    pub fn probe_failed(&self, backend: &Name) {
        let mut inner = self.inner();
        let (now, size) = (Instant::now(), inner.size);
        let until = inner.ejector.failed(backend, size, now);
        drop(inner);
        if let Some(until) = until {
            let seconds = until.saturating_duration_since(now).as_secs_f64();
            tracing::warn!(%backend, last = "probe", seconds, "ejected locally");
        }
    }

    /// How fast backends serve, as this gateway saw, by backend id, with the model's name.
    pub fn paces(&self) -> Vec<(Name, u64, Measure, Pace)> {
        let (inner, now) = (self.inner(), Instant::now());
        let of = |(model, balancer): (&Name, &Balancer)| {
            let paces = balancer.speeds.paces(now);
            paces.map(|(id, measure, pace)| (model.clone(), id, measure, pace)).collect::<Vec<_>>()
        };
        inner.balancers.iter().flat_map(of).collect()
    }

    /// Takes over how fast all other gateways saw a backend serve a model.
    pub fn set_others(&self, model: &Name, backend: u64, measure: Measure, pace: Pace) {
        let (mut inner, now) = (self.inner(), Instant::now());
        inner.balancers.entry(model.clone()).or_default().speeds.set_others(backend, measure, pace, now);
    }

    /// Forgets the speeds that other gateways reported, after the report stream is lost.
    pub fn forget_others(&self) {
        self.inner().balancers.values_mut().for_each(|balancer| balancer.speeds.forget_others());
    }

    /// Whether this gateway keeps away from a backend.
    pub fn is_ejected(&self, backend: &Name) -> bool {
        matches!(self.inner().ejector.status(backend, Instant::now()), EjectionStatus::Ejected(_))
    }

    /// A request was admitted: retries are a share of these.
    pub fn count_request(&self) {
        self.inner().retries.deposit();
    }

    /// Takes a retry out of the budget, if one is left.
    pub fn may_retry(&self) -> bool {
        self.inner().retries.withdraw(Instant::now())
    }

    /// Takes a hedge out of the budget, if requests have earned one.
    pub fn may_hedge(&self) -> bool {
        self.inner().retries.withdraw_hedge(Instant::now())
    }

    /// The effective weights of a model's backends now, and whether the pool is in panic for it.
    pub fn weights(&self, choice: &Selection<'_>) -> (Vec<BackendWeight>, bool) {
        let (mut inner, now) = (self.inner(), Instant::now());
        let Inner { choose, by_priority, balancers, ejector, .. } = &mut *inner;
        let Selection { backends, roster, gateways, .. } = *choice;
        let active = roster.active(backends);
        let look = |index: &usize| view(&backends[*index].entry, ejector, *by_priority, gateways, now);
        let views: Vec<View> = active.iter().map(look).collect();
        let panic = is_panic(choose, &views);
        let balancer = balancers.entry(choice.model.clone()).or_default();
        balancer.speeds.refresh(now);
        let weight = |(view, &index): (&View, &usize)| BackendWeight {
            backend: backends[index].entry.name.clone(),
            effective: balancer.effective(view),
            fleet_in_flight: view.in_flight,
            healthy: view.usability == Usability::Healthy,
        };
        (views.iter().zip(active).map(weight).collect(), panic)
    }
}

/// A backend as of now.
fn view(
    backend: &BackendEntry,
    ejector: &Ejector<Name>,
    by_priority: bool,
    gateways: u32,
    now: Instant,
) -> View {
    let usable = backend.state.health() != HealthState::Unhealthy
        && matches!(ejector.status(&backend.name, now), EjectionStatus::Open | EjectionStatus::Probe);
    let health = backend.state.health_factor(now);
    let slots = ramped(backend.spec.max_concurrency, backend.state.health(), health);
    let region = u32::try_from(backend.region_rank).unwrap_or(u32::MAX).min(1 << 16);
    View {
        id: backend.id,
        weight: f64::from(backend.spec.weight),
        max_concurrency: slots,
        held_back: backend.spec.max_concurrency.saturating_sub(slots),
        in_flight: backend.state.fleet_in_flight(gateways),
        local: backend.state.in_flight(),
        health,
        rank: if by_priority { backend.spec.priority << 17 | region } else { region },
        usability: if usable { Usability::Healthy } else { Usability::Unhealthy },
    }
}

/// The slots of a backend that comes back grow as its weight does.
fn ramped(slots: u32, state: HealthState, health: f64) -> u32 {
    match state {
        HealthState::Recovering => ((f64::from(slots) * health).ceil() as u32).clamp(1, slots.max(1)),
        _ => slots,
    }
}

fn choose_config(spec: &Pool) -> ChooseConfig {
    let policy = match spec.balancing_policy {
        BalancingPolicy::WeightedRoundRobin | BalancingPolicy::Priority => Policy::WeightedRoundRobin,
        BalancingPolicy::RoundRobin => Policy::RoundRobin,
        BalancingPolicy::Random => Policy::Random,
        BalancingPolicy::LeastRequest => Policy::LeastRequest,
        BalancingPolicy::PrefixAffinity => {
            Policy::PrefixAffinity { bound: f64::from(spec.affinity.load_percent) / 100.0 }
        }
    };
    ChooseConfig { policy, ..ChooseConfig::default() }
}

fn hedge_delay_config(spec: &Pool) -> Option<HedgeDelayConfig> {
    let hedging = spec.hedging;
    hedging.enabled.then_some(HedgeDelayConfig { floor: hedging.floor, unary: hedging.unary })
}

fn eject_config(spec: &Pool) -> EjectConfig {
    EjectConfig {
        consecutive_failures: spec.ejection.consecutive_failures,
        base: spec.ejection.base_duration,
        max: spec.ejection.max_duration,
        max_ejected_percent: spec.ejection.max_ejected_percent,
        failure_percent: spec.ejection.failure_percent,
        failure_min_requests: spec.ejection.failure_min_requests,
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
