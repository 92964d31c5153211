//! Gateways that probe as they are assigned and ordered, and backends that answer as a test says.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use weir_proto::resource::HealthProfile;

use crate::health::assign::Probers;
use crate::health::cluster::Weighting;
use crate::health::evidence::{Cause, Observation, Observer, Outcome, Reading, Timestamp};
use crate::health::record::HealthRecord;
use crate::health::{Cluster, Order, State, Target, Tier};

pub(super) const REFUSED: Outcome = Outcome::Failed(Cause::Refused);
pub(super) const SILENT: Outcome = Outcome::Failed(Cause::Timeout);
pub(super) const BROKEN: Outcome = Outcome::Failed(Cause::Status);

const AGAIN: Duration = Duration::from_millis(500);

pub(super) fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub(super) fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

pub(super) fn gateway(n: usize) -> Observer {
    Observer::Gateway(format!("gateway-{n}").into())
}

/// What a look sees: `None` is an observer that says nothing.
pub(super) type Behaviour = Box<dyn Fn(&Observer, &str, Tier, Timestamp) -> Option<Outcome>>;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Look { observer: Observer, backend: String, tier: Tier, left: u32, regular: bool },
    Seen { observer: Observer, backend: String, tier: Tier, left: u32, regular: bool, at: Timestamp },
}

pub(super) struct World {
    pub(super) cluster: Cluster,
    pub(super) now: Timestamp,
    pub(super) behave: Behaviour,
    pub(super) profile: HealthProfile,
    steps: BinaryHeap<Reverse<(Timestamp, u64, Step)>>,
    number: u64,
    failing: BTreeMap<(Observer, String, Tier), u32>,
    /// Looks made, by tier.
    pub(super) looks: BTreeMap<Tier, usize>,
    /// Every state each backend was in, since when.
    pub(super) history: BTreeMap<String, Vec<(Timestamp, State)>>,
}

impl World {
    /// So many gateways and backends, all well, started long enough ago that all is known.
    pub(super) fn new(gateways: usize, backends: usize) -> Self {
        Self::with(gateways, backends, HealthProfile::default(), Box::new(|_, _, _, _| Some(Outcome::Pass)))
    }

    pub(super) fn with(gateways: usize, backends: usize, profile: HealthProfile, behave: Behaviour) -> Self {
        Self::uneven(gateways, backends, profile, behave, Duration::ZERO)
    }

    /// The same, in which every second observer is so late in each of its turns.
    pub(super) fn uneven(
        gateways: usize,
        backends: usize,
        profile: HealthProfile,
        behave: Behaviour,
        late: Duration,
    ) -> Self {
        let mut world = Self {
            cluster: Cluster::default(),
            now: Duration::ZERO,
            behave,
            profile,
            steps: BinaryHeap::new(),
            number: 0,
            failing: BTreeMap::new(),
            looks: BTreeMap::new(),
            history: BTreeMap::new(),
        };
        let targets = (0..backends).map(|b| {
            let target = Target {
                pool: "p".into(),
                identity: format!("http://b{b}"),
                endpoint: format!("http://b{b}/v1/chat/completions"),
                terms: String::new(),
                weight: 100,
                active: true,
                profile,
                max_ejected_percent: 50,
            };
            (format!("b{b}"), target)
        });
        world.cluster.configure(targets.collect(), world.now);
        let regions = (0..gateways).map(|g| (gateway(g), String::new())).collect();
        world.cluster.set_gateways(regions);
        let assigned: Vec<(String, Probers)> =
            world.cluster.assignments().map(|(name, probers)| (name.clone(), probers.clone())).collect();
        for (backend, probers) in assigned {
            for tier in Tier::ALL {
                let turns = probers.of(tier).len() as u32;
                for (turn, observer) in probers.of(tier).iter().enumerate() {
                    let phase = world.interval(tier) * turn as u32 / turns + late * (turn as u32 % 2);
                    let (observer, backend) = (observer.clone(), backend.clone());
                    let look = Step::Look { observer, backend, tier, left: 1, regular: true };
                    // Whatever is newly assigned is looked at at once, then in its turn.
                    if let Step::Look { observer, backend, .. } = &look {
                        let first = Step::Look {
                            observer: observer.clone(),
                            backend: backend.clone(),
                            tier,
                            left: 1,
                            regular: false,
                        };
                        world.push(ms(10), first);
                    }
                    world.push(ms(100) + phase, look);
                }
            }
        }
        world
    }

    fn interval(&self, tier: Tier) -> Duration {
        crate::health::tally::interval(&self.profile, tier)
    }

    fn push(&mut self, at: Timestamp, step: Step) {
        self.number += 1;
        self.steps.push(Reverse((at, self.number, step)));
    }

    /// Lets time pass up to a moment.
    pub(super) fn run_until(&mut self, end: Timestamp) {
        self.run_while(end, |_| true);
    }

    /// Lets time pass until something is so, or a moment is reached; says when it was so.
    pub(super) fn run_to(&mut self, end: Timestamp, wanted: impl Fn(&Self) -> bool) -> Option<Timestamp> {
        self.run_while(end, |world| !wanted(world));
        wanted(self).then_some(self.now)
    }

    fn run_while(&mut self, end: Timestamp, go_on: impl Fn(&Self) -> bool) {
        while go_on(self) {
            let tick = self.cluster.next_tick(self.now);
            let step = self.steps.peek().map(|Reverse((at, _, _))| *at);
            let next = step.map_or(tick, |step| step.min(tick));
            if next > end {
                self.now = end;
                return;
            }
            self.now = next;
            if step == Some(next)
                && let Some(Reverse((_, _, step))) = self.steps.pop()
            {
                self.step(step);
            } else {
                self.cluster.tick(self.now);
            }
            self.obey();
            self.record();
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Look { observer, backend, tier, left, regular } => {
                if regular {
                    let again = Step::Look {
                        observer: observer.clone(),
                        backend: backend.clone(),
                        tier,
                        left: 1,
                        regular: true,
                    };
                    self.push(self.now + self.interval(tier), again);
                }
                *self.looks.entry(tier).or_default() += 1;
                let latency = match (self.behave)(&observer, &backend, tier, self.now) {
                    None => return,
                    Some(SILENT) => self.profile.timeout,
                    Some(_) => ms(1),
                };
                let at = self.now;
                if left > 1 {
                    let (observer, backend) = (observer.clone(), backend.clone());
                    let more = Step::Look { observer, backend, tier, left: left - 1, regular: false };
                    self.push(self.now + AGAIN, more);
                }
                self.push(self.now + latency, Step::Seen { observer, backend, tier, left, regular, at });
            }
            Step::Seen { observer, backend, tier, left, at, .. } => {
                let Some(outcome) = (self.behave)(&observer, &backend, tier, at) else { return };
                let key = (observer.clone(), backend.clone(), tier);
                let failing = self.failing.entry(key).or_default();
                *failing = if outcome.is_good() { 0 } else { *failing + 1 };
                if *failing == 1 && left == 1 && tier != Tier::Deep && outcome != Outcome::Loading {
                    let (observer, backend) = (observer.clone(), backend.clone());
                    let again = Step::Look { observer, backend, tier, left: 2, regular: false };
                    self.push(self.now + AGAIN, again);
                }
                let seen = Observation {
                    tier,
                    outcome,
                    detail: outcome.name().to_owned(),
                    latency: outcome.is_good().then_some(ms(1)),
                    reading: Reading::default(),
                };
                self.cluster.observe(&observer, &backend, &seen, self.now);
            }
        }
    }

    fn obey(&mut self) {
        for Order { backend, tier, observers, .. } in self.cluster.take_orders() {
            let left = if tier == Tier::Liveness { 2 } else { 1 };
            for observer in observers {
                let look = Step::Look { observer, backend: backend.clone(), tier, left, regular: false };
                // On its way there.
                self.push(self.now + ms(10), look);
            }
        }
    }

    fn record(&mut self) {
        for (name, record) in self.cluster.records() {
            let states = self.history.entry(name.clone()).or_default();
            if states.last().is_none_or(|(_, state)| *state != record.state) {
                states.push((self.now, record.state));
            }
        }
    }

    /// An observer says the same of every backend, without having probed.
    pub(super) fn say(&mut self, observer: &Observer, outcome: Outcome) {
        let backends: Vec<String> = self.cluster.records().map(|(name, _)| name.clone()).collect();
        let detail = outcome.name().to_owned();
        let seen =
            Observation { tier: Tier::Liveness, outcome, detail, latency: None, reading: Reading::default() };
        for backend in backends {
            self.cluster.observe(observer, &backend, &seen, self.now);
        }
        self.obey();
        self.record();
    }

    /// The backend is asked with another credential, say, from now on.
    pub(super) fn change_terms(&mut self, backend: &str) {
        let mut targets: BTreeMap<String, Target> = BTreeMap::new();
        let names: Vec<String> = self.cluster.records().map(|(name, _)| name.clone()).collect();
        for name in names {
            let mut target = self.cluster.target(&name).expect("configured").clone();
            if name == backend {
                target.terms.push('+');
            }
            targets.insert(name, target);
        }
        self.cluster.configure(targets, self.now);
        self.record();
    }

    /// A gateway makes a readiness probe that passes.
    pub(super) fn look(&mut self, observer: &Observer, backend: &str) {
        let detail = Outcome::Pass.name().to_owned();
        let (tier, outcome) = (Tier::Readiness, Outcome::Pass);
        let seen = Observation { tier, outcome, detail, latency: None, reading: Reading::default() };
        self.cluster.observe(observer, backend, &seen, self.now);
        self.obey();
        self.record();
    }

    pub(super) fn all_are(&self, state: State) -> bool {
        self.cluster.records().all(|(_, record)| record.state == state)
    }

    pub(super) fn health_record(&self, backend: &str) -> &HealthRecord {
        self.cluster.record(backend).expect("configured")
    }

    pub(super) fn state(&self, backend: &str) -> State {
        self.health_record(backend).state
    }

    pub(super) fn weighting(&self, backend: &str) -> Weighting {
        self.cluster.weighting(backend)
    }

    /// How often a backend fell.
    pub(super) fn ejections(&self, backend: &str) -> usize {
        let states = self.history.get(backend).map(Vec::as_slice).unwrap_or_default();
        states.iter().filter(|(_, state)| *state == State::Unhealthy).count()
    }

    pub(super) fn alarms(&self) -> BTreeSet<&'static str> {
        self.cluster.alarms().iter().map(|alarm| alarm.kind.as_str()).collect()
    }
}
