//! Connects [`crate::health`] to its surroundings: passes observations and the time to it, and publishes its verdicts.
//!
//! The state machine is behind a lock that is held for one report or one observation, never across an await. Verdicts are
//! published at once in watch channels, which the report streams of the gateways read.

mod checkpoint;
pub(crate) mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, broadcast, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use weir_proto::resource::{AdminState, Spec};
use weir_proto::v1::{self, ResourceKind};

use crate::health::event::EventKind;
use crate::health::{self, Cluster, Observation, Observer, Order, Regions, Target, Tier, Timestamp};
use crate::leader::Leads;
use crate::metrics::Metrics;
use crate::model::{Key, State};

/// The verdicts, by backend.
pub(crate) type Healths = BTreeMap<String, v1::BackendHealth>;

/// Gateways that connect or leave within this time are assigned together: after a restart all of them connect at once.
const GATHER: Duration = Duration::from_millis(50);
/// The shortest interval between two checkpoints.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);

/// Observations kept for callers of [`Verdicts::probe_now`]; a slower caller misses some.
const OBSERVATIONS_KEPT: usize = 1024;

/// An observation with its observer.
#[derive(Debug, Clone)]
pub(crate) struct Observed {
    pub(crate) observer: Observer,
    pub(crate) backend: String,
    pub(crate) seen: Observation,
}

/// Probe assignments and probe orders of all observers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Duties {
    /// The assignments by observer. The `Arc` is the same while the assignments of the observer are the same.
    pub(crate) assignments: BTreeMap<Observer, Arc<v1::ProbeAssignments>>,
    /// The newest order per backend and tier; a newer order replaces an older one.
    pub(crate) orders: BTreeMap<(String, Tier), Order>,
}

impl Duties {
    /// The orders after a serial for one observer.
    pub(crate) fn orders_after<'a>(
        &'a self,
        serial: u64,
        observer: &'a Observer,
    ) -> impl Iterator<Item = &'a Order> {
        self.orders.values().filter(move |o| o.serial > serial && o.observers.contains(observer))
    }

    /// The highest serial.
    pub(crate) fn serial(&self) -> u64 {
        self.orders.values().map(|order| order.serial).max().unwrap_or_default()
    }
}

/// The verdicts. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Verdicts {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    machine: Mutex<Machine>,
    origin: Instant,
    origin_wall: SystemTime,
    healths: watch::Sender<Arc<Healths>>,
    duties: watch::Sender<Arc<Duties>>,
    /// Every observation, for callers of [`Verdicts::probe_now`].
    observations: broadcast::Sender<Arc<Observed>>,
    /// Notified when the next tick may be due earlier than planned.
    wake: Notify,
    metrics: Arc<Metrics>,
    /// Whether this control plane is the leader; only the leader logs events at info level.
    leads: Leads,
    /// The file that keeps the states over a restart.
    checkpoint: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct Machine {
    cluster: Cluster,
    /// The generation that was published last.
    generation: u64,
    assignment: u64,
    /// The checkpoint read at the start; applied with the first configuration.
    saved: checkpoint::Saved,
    /// New gateways that are not assigned yet, and when they will be.
    gathered: Option<(Regions, Timestamp)>,
}

impl Verdicts {
    /// Starts from the checkpoint, if there is one.
    pub(crate) fn new(metrics: Arc<Metrics>, checkpoint: Option<PathBuf>, leads: Leads) -> Self {
        let saved = checkpoint.as_deref().map(checkpoint::read).unwrap_or_default();
        let machine = Machine { saved, ..Machine::default() };
        let inner = Inner {
            machine: Mutex::new(machine),
            origin: Instant::now(),
            origin_wall: weir_runtime::wall_clock(),
            healths: watch::Sender::default(),
            duties: watch::Sender::default(),
            observations: broadcast::Sender::new(OBSERVATIONS_KEPT),
            wake: Notify::new(),
            metrics,
            leads,
            checkpoint,
        };
        Self { inner: Arc::new(inner) }
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.inner.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Timestamp {
        self.inner.origin.elapsed()
    }

    fn wall(&self, at: Timestamp) -> prost_types::Timestamp {
        (self.inner.origin_wall + at).into()
    }

    /// Changes the state machine and publishes the result.
    fn with<T>(&self, change: impl FnOnce(&mut Machine, Timestamp) -> T) -> T {
        let now = self.now();
        let mut machine = self.machine();
        let before = machine.cluster.generation();
        let done = change(&mut machine, now);
        if machine.cluster.generation() != before || machine.generation == 0 {
            self.publish(&mut machine);
            drop(machine);
            self.inner.wake.notify_one();
        }
        done
    }

    fn publish(&self, machine: &mut Machine) {
        machine.generation = machine.cluster.generation().max(1);
        let healths: Healths = machine
            .cluster
            .records()
            .map(|(name, record)| (name.clone(), self.health(&machine.cluster, name, record)))
            .collect();
        for event in machine.cluster.events(machine.cluster.logged()) {
            let (subject, kind, message) = (&event.subject, event.kind.as_str(), &event.message);
            self.inner.metrics.health_event(event.kind);
            // A recovery is logged at info level, an ejection at warn level.
            let state = machine.cluster.record(subject).map(|record| record.state);
            let leads = self.inner.leads.borrow().is_some();
            match event.kind {
                _ if !leads => {
                    tracing::debug!(
                        subject,
                        kind,
                        message,
                        "health event, not published: this control plane is not the leader"
                    )
                }
                EventKind::State
                    if matches!(state, Some(health::State::Healthy | health::State::Recovering)) =>
                {
                    tracing::info!(subject, kind, message, "health");
                }
                EventKind::State | EventKind::Alarm | EventKind::Isolated => {
                    tracing::warn!(subject, kind, message, "health")
                }
                _ => tracing::info!(subject, kind, message, "health"),
            }
        }
        machine.cluster.mark_logged();
        self.inner.metrics.health(&healths, machine.cluster.alarms());
        self.inner.healths.send_if_modified(|old| {
            let changed = **old != healths;
            if changed {
                *old = Arc::new(healths);
            }
            changed
        });
        let orders = machine.cluster.take_orders();
        let assigned = machine.assignment != machine.cluster.assignment();
        if orders.is_empty() && !assigned {
            return;
        }
        self.inner.duties.send_modify(|duties| {
            let duties = Arc::make_mut(duties);
            for order in orders {
                duties.orders.insert((order.backend.clone(), order.tier), order);
            }
            if assigned {
                let cluster = &machine.cluster;
                duties.orders.retain(|(backend, _), _| cluster.record(backend).is_some());
                let mut next = view::assignments(cluster);
                for (observer, assignments) in &mut next {
                    if let Some(same) = duties.assignments.get(observer).filter(|old| *old == assignments) {
                        *assignments = Arc::clone(same);
                    }
                }
                duties.assignments = next;
            }
        });
        machine.assignment = machine.cluster.assignment();
    }

    /// Applies the configured backends.
    pub(crate) fn configure(&self, state: &State) {
        let targets = targets(state);
        self.with(|machine, now| {
            for (gone, _) in machine.cluster.records().filter(|(name, _)| !targets.contains_key(*name)) {
                self.inner.metrics.forget_backend(gone);
            }
            machine.cluster.configure(targets, now);
            let saved = std::mem::take(&mut machine.saved);
            saved.restore(&mut machine.cluster, now);
        });
    }

    /// Sets the region of a gateway that carries out probes. `None`: the gateway does not probe, or is gone.
    pub(crate) fn set_gateway(&self, observer: Observer, region: Option<String>) {
        let now = self.now();
        let mut machine = self.machine();
        let Machine { cluster, gathered, .. } = &mut *machine;
        let (gateways, _) = gathered.get_or_insert_with(|| (cluster.gateways().clone(), now + GATHER));
        match region {
            Some(region) => gateways.insert(observer, region),
            None => gateways.remove(&observer),
        };
        drop(machine);
        self.inner.wake.notify_one();
    }

    /// When the next tick is due.
    fn due(&self) -> Instant {
        let now = self.now();
        let machine = self.machine();
        let gathered = machine.gathered.as_ref().map(|(_, due)| *due);
        let tick = machine.cluster.next_tick(now);
        self.inner.origin + gathered.map_or(tick, |due| due.min(tick))
    }

    /// Evaluates everything that depends on time.
    fn pass(&self) {
        self.with(|machine, now| {
            if let Some((gateways, _)) = machine.gathered.take_if(|(_, due)| *due <= now) {
                machine.cluster.set_gateways(gateways);
            }
            machine.cluster.tick(now);
        });
    }

    /// Records one observation.
    pub(crate) fn observe(&self, observer: &Observer, backend: &str, seen: &Observation) {
        tracing::debug!(%observer, backend, tier = seen.tier.name(), outcome = seen.outcome.name(), "observation");
        let known = self.with(|machine, now| {
            // Only of configured backends, because the name comes from the gateway.
            let known = machine.cluster.record(backend).is_some();
            if known {
                self.inner.metrics.probed(backend, seen.tier, seen.outcome);
                machine.cluster.observe(observer, backend, seen, now);
            }
            known
        });
        // Sent after the verdict is published, so that a caller that receives the observation sees its verdict.
        if known && self.inner.observations.receiver_count() > 0 {
            let (observer, backend) = (observer.clone(), backend.to_owned());
            // Without a receiver the observation is not needed.
            let _ =
                self.inner.observations.send(Arc::new(Observed { observer, backend, seen: seen.clone() }));
        }
    }

    /// Orders probes of a backend now. Returns the observers and a receiver of all observations from now on; `None` for a
    /// backend that is not probed.
    pub(crate) fn probe_now(
        &self,
        backend: &str,
        tier: Tier,
    ) -> Option<(BTreeSet<Observer>, broadcast::Receiver<Arc<Observed>>)> {
        let observations = self.inner.observations.subscribe();
        let asked = self.with(|machine, _| {
            machine.cluster.record(backend).is_some().then(|| machine.cluster.probe_now(backend, tier))
        })?;
        Some((asked, observations))
    }

    /// Records a report: its probe results, then the results of requests.
    pub(crate) fn report(&self, observer: &Observer, report: &v1::StreamReportsRequest) {
        let observations =
            report.probe_results.iter().filter_map(|result| view::observation(result).map(|o| (result, o)));
        for (result, seen) in observations {
            self.observe(observer, &result.backend, &seen);
        }
        let news = report.backends.iter().filter(|backend| view::is_news(backend));
        for backend in news {
            let passive = view::passive(backend);
            self.with(|machine, now| machine.cluster.requests(observer, &backend.backend, &passive, now));
        }
    }

    /// The verdicts and their changes.
    pub(crate) fn healths(&self) -> watch::Receiver<Arc<Healths>> {
        self.inner.healths.subscribe()
    }

    /// The assignments and orders and their changes.
    pub(crate) fn duties(&self) -> watch::Receiver<Arc<Duties>> {
        self.inner.duties.subscribe()
    }

    /// Ticks and writes checkpoints until `stop`.
    pub(crate) async fn run(self, mut state: watch::Receiver<Arc<State>>, stop: CancellationToken) {
        let (mut saved, mut save_at) = (0, Instant::now() + CHECKPOINT_INTERVAL);
        self.configure(&state.borrow_and_update().clone());
        loop {
            let next = self.due();
            tokio::select! {
                () = stop.cancelled() => break,
                changed = state.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let now = state.borrow_and_update().clone();
                    self.configure(&now);
                }
                () = self.inner.wake.notified() => {}
                () = sleep_until(next) => self.pass(),
            }
            if Instant::now() >= save_at {
                saved = self.save(saved).await;
                save_at = Instant::now() + CHECKPOINT_INTERVAL;
            }
        }
        self.save(saved).await;
    }

    /// Writes the checkpoint if the state changed since `generation`. Returns the generation that is written.
    async fn save(&self, saved: u64) -> u64 {
        let Some(path) = self.inner.checkpoint.clone() else { return saved };
        let (generation, text) = {
            let machine = self.machine();
            let generation = machine.cluster.generation();
            if generation == saved {
                return saved;
            }
            (generation, checkpoint::text(&machine.cluster))
        };
        let written = tokio::task::spawn_blocking(move || checkpoint::write(&path, &text)).await;
        match written.map_err(std::io::Error::other).flatten() {
            Ok(()) => generation,
            Err(error) => {
                tracing::warn!(%error, "health checkpoint not written; a restart would use an older one");
                saved
            }
        }
    }
}

/// The configured backends as targets. A disabled backend is neither used nor probed.
fn targets(state: &State) -> BTreeMap<String, Target> {
    let mut targets = BTreeMap::new();
    for stored in state.of_kind(ResourceKind::Backend) {
        let Spec::Backend(backend) = &stored.checked.spec else { continue };
        if backend.admin_state == AdminState::Disabled {
            continue;
        }
        let pool = state.get(&Key::new(ResourceKind::Pool, backend.pool.as_str()));
        let Some(Spec::Pool(pool)) = pool.map(|pool| &pool.checked.spec) else { continue };
        let target = Target {
            pool: backend.pool.to_string(),
            identity: format!("{}{} {}", backend.url, backend.health_path, backend.api_base_path),
            endpoint: format!(
                "{}{}",
                backend.url.to_string().trim_end_matches('/'),
                backend.api_path("/chat/completions")
            ),
            terms: format!("{:?} {:?} {:?}", backend.credential, backend.models, backend.dialect),
            weight: backend.weight,
            active: backend.admin_state == AdminState::Active,
            profile: pool.health,
            max_ejected_percent: pool.ejection.max_ejected_percent,
        };
        targets.insert(stored.wire.name.clone(), target);
    }
    targets
}

/// The observer of a gateway.
pub(crate) fn gateway(id: &str) -> Observer {
    Observer::Gateway(id.into())
}
