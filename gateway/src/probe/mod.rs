//! Probes backends as the control plane assigns: one of few gateways that do, with the connections and credentials
//! that requests use.
//!
//! - `weir_probe` has the schedule and the liveness probe; `probe_rate` bounds the cost. `tiers` sends the requests, `judge`
//!   evaluates the answers.
//! - A probe that costs tokens holds one of the backend's slots, like a request: see `Readiness`.
//! - [`ProbeChannel`]: assignments and orders from the report stream, and results to it. Requests that wait in silence at a
//!   backend ask for liveness probes, whether this gateway is assigned or not.
//!
//! Without the control plane the last assignments continue for a minute. Then the gateway makes liveness probes of all
//! backends at half the rate, and uses its own verdicts.

mod counted;
mod engine;
#[doc(hidden)]
pub mod fuzzing;
mod judge;
mod plan;
mod probe_rate;
mod tiers;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use weir_probe::{End, Finding, InFlight, Key, Now, Schedule};
use weir_proto::resource::{AdminState, HealthProfile};
use weir_proto::v1::{HealthState, ProbeOutcome, ProbeResult, ProbeTier};

use self::counted::Counted;
use self::plan::{Deep, How, Plan, Readiness};
use self::probe_rate::ProbeRate;
use self::tiers::{Ask, DEEP_REQUESTS, Depth, KnownModel, Probed};
use crate::control::live_config::LiveConfig;
use crate::control::probe_channel::{Orders, ProbeChannel};
use crate::limits::ledger::Ledger;
use crate::metrics::{Metrics, NeedlessProbeLabels, PaidProbeLabels, ProbeLabels};
use crate::routing::backend::BackendEntry;
use crate::routing::entries::ModelEntry;
use crate::routing::snapshot::Snapshot;

/// Concurrent probes of a gateway.
const AT_ONCE: usize = 64;
/// How long the last assignments continue without the control plane.
const ALONE_AFTER: Duration = Duration::from_secs(60);
/// How long a gateway without any assignment waits for the control plane.
const ALONE_AT_START: Duration = Duration::from_secs(5);
/// The factor of the intervals without the control plane, because every gateway then probes every backend.
const ALONE_SLOWER: u32 = 2;
/// Successful requests of all gateways since the last readiness probe that make another one needless...
const PROOF: u64 = 3;
/// ...unless more than one of this many failed: a backend with 5 % failures is degraded, and probed.
const FAULTS_OF_GOOD: u64 = 20;
/// Answers since the last deep probe that are enough to know the speed of a backend.
const RATE_ANSWERS: u64 = 20;
/// The share of used slots above which a backend's speed is not measured, because the probe would measure and add contention.
const IDLE_SHARE: f64 = 0.3;
/// The shortest timeout of a probe that costs tokens, unless its model has a `health_timeout`.
const PAID_TIMEOUT_MIN: Duration = Duration::from_secs(5);

/// The task; ends with `shutdown`.
#[derive(Debug)]
pub struct Prober {
    live: Arc<LiveConfig>,
    channel: Arc<ProbeChannel>,
    ledger: Arc<Ledger>,
    metrics: Arc<Metrics>,
    schedule: Schedule,
    rate: ProbeRate,
    /// (Backend, what it knows the model by) -> what was found out about that.
    known: BTreeMap<(String, String), KnownModel>,
    /// The results of requests at the last probe of a tier.
    before: BTreeMap<Key, Counted>,
    /// The index of the next model to probe; a failed model is probed again.
    turns: BTreeMap<String, usize>,
    /// The backends as they were probed last.
    asked: BTreeMap<String, Arc<BackendEntry>>,
    /// Consecutive failures and passes, without the control plane.
    alone: Option<BTreeMap<String, (u32, u32)>>,
}

/// A probe that ended.
struct Done {
    entry: Arc<BackendEntry>,
    model: Option<String>,
    how: How,
}

impl Prober {
    /// For the backends of `live`, as `channel` assigns them, with slots of `ledger`.
    pub fn new(
        live: Arc<LiveConfig>,
        channel: Arc<ProbeChannel>,
        ledger: Arc<Ledger>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            live,
            channel,
            ledger,
            metrics,
            schedule: Schedule::default(),
            rate: ProbeRate::default(),
            known: BTreeMap::new(),
            before: BTreeMap::new(),
            turns: BTreeMap::new(),
            asked: BTreeMap::new(),
            alone: None,
        }
    }

    /// Probes until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let channel = Arc::clone(&self.channel);
        let (mut orders, mut revisions) = (channel.orders(), self.live.revisions());
        let mut probes = InFlight::default();
        loop {
            let now = Instant::now();
            let alone_at = self.follow(&orders.borrow_and_update().clone(), now);
            revisions.borrow_and_update();
            self.start_due(&mut probes, now);
            // With all permits taken, the next thing to happen is the end of a probe.
            let next = self.schedule.next().filter(|_| probes.len() < AT_ONCE);
            let next = next.into_iter().chain(alone_at).min();
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = orders.changed() => if changed.is_err() { return },
                changed = revisions.changed() => if changed.is_err() { return },
                ordered = channel.ordered() => {
                    let now = Instant::now();
                    ordered.into_iter().for_each(|key| self.schedule.order(key, now));
                }
                wanted = channel.wanted() => {
                    let now = Instant::now();
                    let keys = wanted.iter().map(|backend| (backend.to_string(), ProbeTier::Liveness));
                    keys.for_each(|key| self.schedule.want(key, now));
                }
                (key, done) = probes.next() => match done {
                    Some(done) => self.finished(&key, done),
                    // The probe panicked and has no result; it is repeated after a second.
                    None => {
                        self.schedule_next(&key, End::NotMade, &HealthProfile::default());
                    }
                },
                () = sleep_until(next.unwrap_or(now)), if next.is_some() => {}
            }
        }
    }

    /// Applies assignments and backends. Returns when the gateway starts to probe without the control plane, if nothing
    /// changes.
    fn follow(&mut self, orders: &Orders, now: Instant) -> Option<Instant> {
        let snapshot = self.live.snapshot();
        let patience = if orders.assignments.is_some() { ALONE_AFTER } else { ALONE_AT_START };
        let alone_at = orders.away_since.map(|since| since + patience);
        let alone = alone_at.is_some_and(|at| at <= now);
        if alone != self.alone.is_some() {
            self.alone = alone.then(BTreeMap::new);
            let said = if alone { "on its own" } else { "as the control plane assigns" };
            tracing::info!("probing backends {said}");
        }
        let enabled = |name: &str| {
            snapshot.backends.get(name).is_some_and(|b| b.spec.admin_state != AdminState::Disabled)
        };
        let assigned: BTreeMap<Key, (u32, u32)> = if alone {
            let all = snapshot.backends.keys().map(|name| name.to_string()).filter(|name| enabled(name));
            all.map(|name| ((name, ProbeTier::Liveness), (0, 1))).collect()
        } else {
            let assignments = orders.assignments.iter().flat_map(|all| &all.assignments);
            let known = assignments.filter(|a| a.tier() != ProbeTier::Unspecified && enabled(&a.backend));
            known.map(|a| ((a.backend.clone(), a.tier()), (a.prober_index, a.prober_count))).collect()
        };
        let slower = if alone { ALONE_SLOWER } else { 1 };
        let interval = |key: &Key| {
            let pool = snapshot.backends.get(key.0.as_str()).and_then(|b| snapshot.pools.get(&b.spec.pool));
            weir_probe::interval(&pool.map(|pool| pool.spec.health).unwrap_or_default(), key.1) * slower
        };
        self.schedule.assign(&assigned, interval, Now { instant: now, ..Now::read() });
        self.renew(&snapshot, now);
        let names: BTreeSet<String> = snapshot.backends.keys().map(ToString::to_string).collect();
        self.schedule.retain(&names);
        self.rate.retain(|name| names.contains(name));
        self.known.retain(|(name, _), _| names.contains(name));
        self.before.retain(|(name, _), _| names.contains(name));
        self.turns.retain(|name, _| names.contains(name));
        alone_at.filter(|at| *at > now)
    }

    /// Has what is asked in another way than before probed anew.
    fn renew(&mut self, snapshot: &Snapshot, now: Instant) {
        self.asked.retain(|name, _| snapshot.backends.contains_key(name.as_str()));
        for (name, entry) in &snapshot.backends {
            if self.asked.get(name.as_str()).is_some_and(|before| Arc::ptr_eq(before, entry)) {
                continue;
            }
            let before = self.asked.insert(name.to_string(), entry.clone());
            if before.is_some_and(|before| !before.is_asked_like(entry)) {
                self.schedule.renew(name.as_str(), now);
                self.known.retain(|(of, _), _| of != name.as_str());
            }
        }
    }

    fn start_due(&mut self, probes: &mut InFlight<Key, Done>, now: Instant) {
        let snapshot = self.live.snapshot();
        for key in self.schedule.take_due(now, AT_ONCE.saturating_sub(probes.len())) {
            let Some(entry) = snapshot.backends.get(key.0.as_str()).cloned() else {
                self.schedule.finished(&key, End::Good, &HealthProfile::default(), Now::read(), 0.0);
                continue;
            };
            let (plan, ledger) = (self.plan(&snapshot, &key, &entry, now), self.ledger.clone());
            match plan {
                Plan::Known(probed) => {
                    self.finished(&key, Done { entry, model: None, how: How::Traffic(*probed) });
                }
                Plan::Skip => {
                    let profile = self.profile(&snapshot, &entry);
                    self.schedule_next(&key, End::Good, &profile);
                }
                Plan::Liveness(limit) => probes.spawn(key, async move {
                    let probed = tiers::liveness(entry.clone(), limit).await;
                    Done { entry, model: None, how: How::Asked(probed) }
                }),
                Plan::Readiness(readiness) => probes.spawn(key, async move {
                    let (how, model) = readiness.probe(&ledger, &entry).await;
                    Done { entry, model, how }
                }),
                Plan::Deep(deep) => probes.spawn(key, async move {
                    let how = deep.probe(&ledger, &entry).await;
                    Done { entry, model: None, how }
                }),
            }
        }
    }

    /// Records the end of a probe. Returns whether the result is to be reported at once.
    fn schedule_next(&mut self, key: &Key, end: End, profile: &HealthProfile) -> bool {
        self.schedule.finished(key, end, profile, Now::read(), weir_runtime::random_unit())
    }

    fn plan(&mut self, snapshot: &Snapshot, key: &Key, entry: &Arc<BackendEntry>, now: Instant) -> Plan {
        let profile = self.profile(snapshot, entry);
        let counted = Counted::now(entry);
        let before = self.before.insert(key.clone(), counted);
        let since = counted.since(before);
        if key.1 == ProbeTier::Liveness {
            return Plan::Liveness(profile.timeout);
        }
        let models = served(snapshot, entry);
        let turn = self.turns.entry(key.0.clone()).or_default();
        let Some((model, name)) = models.get(*turn % models.len().max(1)) else { return Plan::Skip };
        let limit = model.spec.health_timeout.unwrap_or(PAID_TIMEOUT_MIN.max(profile.timeout));
        if key.1 == ProbeTier::Readiness {
            // It would wait behind requests for its turn, and hold a slot meanwhile that a request may want.
            let behind = entry.state.fleet_in_flight(self.live.live_gateways()) > 0.0
                && entry.state.is_at_work_within(profile.readiness_interval);
            let proven = since.successes >= PROOF || behind;
            if proven && since.failures * FAULTS_OF_GOOD <= since.successes {
                self.needless(key);
                let found = Finding::new(ProbeOutcome::Pass, "requests are answered");
                return Plan::Known(Box::new(found.into()));
            }
            if !self.rate.take(&key.0, 1, profile.paid_probes_per_hour, now) {
                self.over_budget(&key.0);
                return Plan::Skip;
            }
            let known = self.known.get(&(key.0.clone(), name.clone())).cloned().unwrap_or_default();
            let proven = since.successes > 0 && since.failures * FAULTS_OF_GOOD <= since.successes;
            let (model, name) = (model.clone(), name.clone());
            return Plan::Readiness(Box::new(Readiness { model, name, known, limit, proven, before }));
        }
        let seconds = since.decode_us as f64 / 1e6;
        let known_rate =
            (since.timed_answers >= RATE_ANSWERS && seconds > 0.0).then(|| since.tokens as f64 / seconds);
        if known_rate.is_some() {
            self.needless(key);
        }
        let in_flight = entry.state.fleet_in_flight(self.live.live_gateways());
        let busy = in_flight > IDLE_SHARE * f64::from(entry.spec.max_concurrency);
        let well = entry.state.health() != HealthState::Unhealthy;
        let ask = self.known.get(&(key.0.clone(), name.clone())).and_then(|known| known.ask);
        let measure = known_rate.is_none() && !busy && well && ask != Some(Ask::Embedding);
        let paid = measure && self.rate.take(&key.0, DEEP_REQUESTS, profile.paid_probes_per_hour, now);
        if measure && !paid {
            self.over_budget(&key.0);
        }
        let names = models.iter().map(|(_, name)| name.clone()).collect();
        let depth = Depth { known_rate, models: names, limit };
        Plan::Deep(Box::new(Deep { depth, measure: paid.then(|| name.clone()) }))
    }

    fn needless(&self, key: &Key) {
        let labels = NeedlessProbeLabels { backend: key.0.clone(), tier: tier_name(key.1) };
        self.metrics.probes_needless.get_or_create(&labels).inc();
    }

    /// So many requests of a probe were not made, since no slot was free.
    fn without_slot(&mut self, key: &Key, requests: u32) {
        self.rate.give_back(&key.0, requests);
        let labels = NeedlessProbeLabels { backend: key.0.clone(), tier: tier_name(key.1) };
        self.metrics.probes_without_slot.get_or_create(&labels).inc();
    }

    fn over_budget(&self, backend: &str) {
        let labels = PaidProbeLabels { backend: backend.to_owned() };
        self.metrics.probes_over_rate.get_or_create(&labels).inc();
    }

    /// The profile of a backend's pool; alone, slower.
    fn profile(&self, snapshot: &Snapshot, entry: &BackendEntry) -> HealthProfile {
        let mut profile =
            snapshot.pools.get(&entry.spec.pool).map(|pool| pool.spec.health).unwrap_or_default();
        if self.alone.is_some() {
            profile.liveness_interval = profile.liveness_interval.saturating_mul(ALONE_SLOWER);
        }
        profile
    }

    fn finished(&mut self, key: &Key, done: Done) {
        let Done { entry, model, how } = done;
        let snapshot = self.live.snapshot();
        let profile = self.profile(&snapshot, &entry);
        let (probed, made) = match how {
            How::Asked(probed) => (probed, true),
            How::Traffic(probed) => (probed, false),
            How::Full(probed) => {
                self.rate.give_back(&key.0, 1);
                self.needless(key);
                (probed, false)
            }
            How::NotMeasured(probed) => {
                self.without_slot(key, DEEP_REQUESTS);
                (probed, true)
            }
            How::NoSlot { before } => {
                self.without_slot(key, 1);
                // Requests since the last probe still count.
                match before {
                    Some(before) => self.before.insert(key.clone(), before),
                    None => self.before.remove(key),
                };
                self.schedule_next(key, End::NotMade, &profile);
                return;
            }
        };
        let end = End::of(&probed.found);
        let news = self.schedule_next(key, end, &profile);
        // The result is ignored if the backend was deleted or is asked in another way now.
        let current = snapshot.backends.get(key.0.as_str());
        if !current.is_some_and(|now| Arc::ptr_eq(&now.state, &entry.state) && now.is_asked_like(&entry)) {
            return;
        }
        self.count(key, &probed, made);
        if let Some(model) = model {
            if end == End::Good {
                *self.turns.entry(key.0.clone()).or_default() += 1;
            }
            let known = self.known.entry((key.0.clone(), model)).or_default();
            known.named = probed.named.clone().or(known.named.take());
            known.ask = probed.ask.or(known.ask);
        }
        if key.1 == ProbeTier::Liveness {
            self.judge_here(&snapshot, &entry, &probed.found, &profile);
        }
        self.judge_alone(key, &entry, end, &profile);
        // What a gateway without a turn asked for itself is reported if it is news: of many gateways with silent requests,
        // the passes would be more than the control plane keeps.
        if news || self.schedule.is_assigned(key) {
            self.channel.report(result(key, probed), news);
        }
    }

    /// What a liveness probe says to the requests of this gateway alone, whatever the verdict of the cluster: a failure
    /// ejects the backend locally, and no answer several times in a row frees the requests that wait there.
    fn judge_here(
        &self,
        snapshot: &Snapshot,
        entry: &BackendEntry,
        found: &Finding,
        profile: &HealthProfile,
    ) {
        let (interval, timeout) = (profile.liveness_interval, profile.timeout);
        // Where requests are answered, a probe without an answer waits behind them.
        let waits = found.outcome == ProbeOutcome::Timeout && entry.state.answered_within(timeout);
        if End::of(found) == End::Bad
            && !waits
            && let Some(pool) = snapshot.pools.get(&entry.spec.pool)
        {
            pool.state.probe_failed(&entry.name);
        }
        // A bad answer is one: the server may still be at work for those that wait.
        let answered = waits
            || !matches!(found.outcome, ProbeOutcome::Refused | ProbeOutcome::Timeout | ProbeOutcome::Broken);
        entry.state.record_own_probe(answered, interval);
    }

    /// Counts a probe that was made, and the tokens that it cost.
    fn count(&self, key: &Key, probed: &Probed, made: bool) {
        if made {
            let (tier, outcome) = (tier_name(key.1), outcome_name(probed.found.outcome));
            let labels = ProbeLabels { backend: key.0.clone(), tier, outcome };
            self.metrics.probes.get_or_create(&labels).inc();
        }
        if probed.tokens > 0 {
            let labels = PaidProbeLabels { backend: key.0.clone() };
            self.metrics.probe_tokens.get_or_create(&labels).inc_by(probed.tokens);
        }
    }

    /// Sets the verdict of this gateway, without the control plane.
    fn judge_alone(&mut self, key: &Key, entry: &BackendEntry, end: End, profile: &HealthProfile) {
        let Some(streaks) = &mut self.alone else { return };
        if key.1 != ProbeTier::Liveness {
            return;
        }
        let (failures, passes) = streaks.entry(key.0.clone()).or_default();
        (*failures, *passes) = match end {
            End::Good => (0, passes.saturating_add(1)),
            End::Bad | End::Loading => (failures.saturating_add(1), 0),
            End::NotMade => return,
        };
        let unhealthy = entry.state.health() == HealthState::Unhealthy;
        let state = if !unhealthy && *failures >= profile.unhealthy_threshold {
            HealthState::Unhealthy
        } else if unhealthy && *passes >= profile.healthy_threshold {
            HealthState::Recovering
        } else {
            return;
        };
        tracing::warn!(backend = %entry.name, state = state.as_str_name(), "verdict of this gateway without a control plane");
        entry.state.set_health(state);
    }
}

/// The models a backend serves, with the name it knows each by.
fn served(snapshot: &Snapshot, entry: &BackendEntry) -> Vec<(Arc<ModelEntry>, String)> {
    let models = entry.spec.models.iter().filter_map(|(model, upstream)| {
        let model = snapshot.models_by_name.get(model)?;
        let name = if upstream.is_empty() { &model.spec.client_name } else { upstream };
        Some((model.clone(), name.clone()))
    });
    models.collect()
}

fn result(key: &Key, probed: Probed) -> ProbeResult {
    ProbeResult {
        backend: key.0.clone(),
        tier: key.1.into(),
        outcome: probed.found.outcome.into(),
        detail: probed.found.detail,
        latency: probed.latency.and_then(|latency| prost_types::Duration::try_from(latency).ok()),
        tokens_per_second: probed.reading.tokens_per_second,
        cache_used: probed.reading.cache_used,
        queue: probed.reading.queue,
    }
}

const fn tier_name(tier: ProbeTier) -> &'static str {
    match tier {
        ProbeTier::Unspecified => "unspecified",
        ProbeTier::Liveness => "liveness",
        ProbeTier::Readiness => "readiness",
        ProbeTier::Deep => "deep",
    }
}

const fn outcome_name(outcome: ProbeOutcome) -> &'static str {
    match outcome {
        ProbeOutcome::Unspecified => "unspecified",
        ProbeOutcome::Pass => "pass",
        ProbeOutcome::Busy => "busy",
        ProbeOutcome::Loading => "loading",
        ProbeOutcome::Refused => "refused",
        ProbeOutcome::Timeout => "timeout",
        ProbeOutcome::Broken => "broken",
        ProbeOutcome::Status => "status",
        ProbeOutcome::WrongModel => "wrong_model",
        ProbeOutcome::BadAnswer => "bad_answer",
        ProbeOutcome::QuotaUsedUp => "quota_used_up",
    }
}
