//! The health of all backends: assigns observers, updates the record of each backend, isolates observers, applies the rules
//! of pools, and keeps events.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use weir_proto::resource::HealthProfile;

use super::assign::{Probers, Regions, rank};
use super::event::{Alarm, AlarmKind, Event, EventKind};
use super::evidence::{Observation, Observer, Passive, Timestamp, Vote};
use super::guard::{self, Member, MemberStatus, PoolDecision, Use};
use super::isolation::{IsolatedObservers, ObserverCounts};
use super::params::{
    CONFIRMERS, DEGRADED_FACTOR, EVENTS_MAX, FLIP_ALL_SHARE, FLIP_MIN, FLIP_POOL_SHARE, FLIP_WINDOW,
    FOLDED_WITHIN, OBSERVER_WINDOW, QUORUM, observers_wanted,
};
use super::record::{Action, HealthRecord};
use super::rule::State;
use super::tally::{Context, interval};
use super::tier::Tier;

/// A backend as configured.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Target {
    pub(crate) pool: String,
    /// The identity of the backend, such as its URL. A backend with a new identity starts with a new record.
    pub(crate) identity: String,
    /// Where requests go, as operators are told.
    pub(crate) endpoint: String,
    /// What else probes and requests rest on, such as the credential: after a change of it, failures from before say nothing.
    pub(crate) terms: String,
    pub(crate) weight: u32,
    /// Whether the operator's state is ACTIVE. A draining backend is probed, but does not count in its pool.
    pub(crate) active: bool,
    pub(crate) profile: HealthProfile,
    /// The pool's maximum of ejections, percent.
    pub(crate) max_ejected_percent: u32,
}

/// An order to probe now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Order {
    /// Rises with every order.
    pub(crate) serial: u64,
    pub(crate) backend: String,
    pub(crate) tier: Tier,
    pub(crate) observers: BTreeSet<Observer>,
}

/// The result of health for the weight of a backend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Weighting {
    /// The remaining share of the weight, without slow start. Zero: not used while other backends are usable.
    pub(crate) factor: f64,
    /// The pool uses the backend although its state says otherwise.
    pub(crate) overridden: bool,
}

/// The state machine of all backends.
#[derive(Debug, Default)]
pub(crate) struct Cluster {
    targets: BTreeMap<String, Target>,
    records: BTreeMap<String, HealthRecord>,
    gateways: Regions,
    probers: BTreeMap<String, Probers>,
    isolated: IsolatedObservers,
    weightings: BTreeMap<String, Weighting>,
    pools: BTreeMap<String, PoolDecision>,
    alarms: BTreeSet<Alarm>,
    ejections: VecDeque<(Timestamp, String)>,
    events: VecDeque<Event>,
    last_event: u64,
    orders: Vec<Order>,
    last_order: u64,
    assigned: u64,
    /// Rises when a verdict, an assignment, an order or an event is new.
    generation: u64,
    logged: u64,
}

impl Cluster {
    /// Replaces the configured backends.
    pub(crate) fn configure(&mut self, targets: BTreeMap<String, Target>, now: Timestamp) {
        let old = std::mem::replace(&mut self.targets, targets);
        self.records.retain(|name, record| {
            let (Some(old), Some(new)) = (old.get(name), self.targets.get(name)) else { return false };
            // What is in use stays so: its next probe tells.
            old.identity == new.identity && (old.terms == new.terms || record.is_usable())
        });
        for (name, target) in &self.targets {
            match self.records.get_mut(name) {
                Some(record) => record.profile = target.profile,
                None => {
                    self.records.insert(name.clone(), HealthRecord::new(target.profile, now));
                }
            }
        }
        self.assign();
        self.apply_pool_rules(now);
    }

    /// Restores the record of a backend after a restart.
    pub(crate) fn restore(&mut self, backend: &str, restore: impl FnOnce(&mut HealthRecord)) {
        if let Some(record) = self.records.get_mut(backend) {
            restore(record);
        }
    }

    /// Ends the restoration of records.
    pub(crate) fn restored(&mut self, now: Timestamp) {
        self.apply_pool_rules(now);
    }

    /// Whether any observer makes readiness probes of a backend. Without them, liveness decides alone.
    pub(crate) fn is_ready_capable(&self, record: &HealthRecord) -> bool {
        !self.gateways.is_empty() && record.profile.paid_probes_per_hour > 0
    }

    /// The gateways that carry out probes.
    pub(crate) fn gateways(&self) -> &Regions {
        &self.gateways
    }

    /// Sets the gateways that carry out probes.
    pub(crate) fn set_gateways(&mut self, gateways: Regions) {
        if gateways != self.gateways {
            self.gateways = gateways;
            self.assign();
        }
    }

    fn assign(&mut self) {
        let assigned: BTreeMap<String, Probers> =
            self.targets.keys().map(|name| (name.clone(), Probers::assign(name, &self.gateways))).collect();
        if assigned != self.probers {
            self.probers = assigned;
            self.assigned += 1;
            self.generation += 1;
        }
    }

    /// Rises when the assignments change.
    pub(crate) const fn assignment(&self) -> u64 {
        self.assigned
    }

    /// Records one observation.
    pub(crate) fn observe(&mut self, observer: &Observer, backend: &str, seen: &Observation, now: Timestamp) {
        let Some(record) = self.records.get_mut(backend) else { return };
        record.observe(observer, seen, now);
        self.judge(backend, now);
    }

    /// Records the results of a gateway's requests.
    pub(crate) fn requests(&mut self, observer: &Observer, backend: &str, passive: &Passive, now: Timestamp) {
        let Some(record) = self.records.get_mut(backend) else { return };
        record.requests(observer, passive, now);
        self.judge(backend, now);
    }

    /// Evaluates everything that depends on time.
    pub(crate) fn tick(&mut self, now: Timestamp) {
        let lost = self.weigh_observers(now);
        let names: Vec<String> = self.records.keys().cloned().collect();
        for name in names {
            self.judge(&name, now);
        }
        // Alarms end without a new observation.
        if lost || !self.alarms.is_empty() || !self.ejections.is_empty() {
            self.apply_pool_rules(now);
        }
    }

    /// When to tick next at the latest.
    pub(crate) fn next_tick(&self, now: Timestamp) -> Timestamp {
        let coarse = now + Duration::from_secs(1);
        self.records
            .values()
            .filter_map(|record| record.next(now))
            .min()
            .map_or(coarse, |next| next.min(coarse))
    }

    fn judge(&mut self, backend: &str, now: Timestamp) {
        let (Some(record), Some(target)) = (self.records.get_mut(backend), self.targets.get(backend)) else {
            return;
        };
        let of = |record: &HealthRecord| (record.state, record.rule, record.stale);
        let (before, reason) = (of(record), record.reason());
        let ready_capable = !self.gateways.is_empty() && record.profile.paid_probes_per_hour > 0;
        let context = Context {
            isolated: &self.isolated,
            ready_capable,
            gateways: self.gateways.len(),
            endpoint: &target.endpoint,
        };
        let actions = record.judge(now, &context);
        let fell = before.0 != State::Unhealthy && record.state == State::Unhealthy;
        let changed = before != of(record);
        self.generation += u64::from(reason != record.reason());
        for action in actions {
            match action {
                Action::Note { kind, message } => self.note(backend, kind, message, now),
                Action::Ask { tier, reporter } => self.ask(backend, tier, reporter),
            }
        }
        if fell {
            self.ejections.push_back((now, backend.to_owned()));
        }
        if changed {
            self.apply_pool_rules(now);
        }
    }

    /// Orders probes from the assigned observers and some more, because the assigned ones may share a broken network path.
    fn ask(&mut self, backend: &str, tier: Tier, reporter: Option<Observer>) {
        let without: BTreeSet<Observer> = reporter.into_iter().collect();
        let mut asked = rank(backend, tier, &self.gateways, &without);
        asked.truncate(CONFIRMERS);
        let few = asked.len() + without.len() < observers_wanted(tier);
        if tier == Tier::Liveness && few && !without.contains(&Observer::ControlPlane) {
            asked.push(Observer::ControlPlane);
        }
        if let Some(record) = self.records.get_mut(backend) {
            record.asked(tier, asked.iter().cloned());
        }
        if asked.is_empty() {
            return;
        }
        self.order(backend, tier, asked.into_iter().collect());
    }

    /// Orders probes from the assigned observers, whatever the state of the backend is. Returns the observers.
    pub(crate) fn probe_now(&mut self, backend: &str, tier: Tier) -> BTreeSet<Observer> {
        let observers: BTreeSet<Observer> = self
            .probers
            .get(backend)
            .map(|probers| probers.of(tier).iter().cloned().collect())
            .unwrap_or_default();
        if !observers.is_empty() {
            self.order(backend, tier, observers.clone());
        }
        observers
    }

    fn order(&mut self, backend: &str, tier: Tier, observers: BTreeSet<Observer>) {
        self.last_order += 1;
        self.generation += 1;
        self.orders.push(Order { serial: self.last_order, backend: backend.to_owned(), tier, observers });
    }

    /// Takes the vote from isolated observers. Returns whether one lost it.
    fn weigh_observers(&mut self, now: Timestamp) -> bool {
        let mut counts: BTreeMap<Observer, ObserverCounts> = BTreeMap::new();
        for record in self.records.values() {
            let fresh: Vec<(&Observer, &Vote, Duration)> = record
                .votes
                .iter()
                .filter(|(tier, _, _)| *tier == Tier::Liveness)
                .map(|(_, observer, vote)| (observer, vote, now.saturating_sub(vote.at)))
                .filter(|(_, _, age)| *age <= OBSERVER_WINDOW)
                .collect();
            // Whoever still probes has a pass that is no older.
            let pass_age_max = interval(&record.profile, Tier::Liveness) + record.profile.timeout;
            for (observer, vote, _) in &fresh {
                let count = counts.entry((*observer).clone()).or_default();
                count.seen += 1;
                if !vote.last.is_good() {
                    count.failed += 1;
                    // One that says that all is well outweighs nobody: it may lie, or probe something else.
                    let passes = fresh
                        .iter()
                        .filter(|(_, other, age)| *age <= pass_age_max && other.contradicts(vote));
                    count.contradicted += usize::from(passes.count() >= QUORUM);
                }
            }
        }
        let lost = self.isolated.weigh(&counts, now);
        for observer in &lost {
            let message = "sees most backends fail while others do not: its votes do not count for a while";
            self.note(&observer.to_string(), EventKind::Isolated, message.into(), now);
        }
        !lost.is_empty()
    }

    /// Decides for every pool which backends it uses, and updates the alarms.
    fn apply_pool_rules(&mut self, now: Timestamp) {
        let mut pools: BTreeMap<&str, (Vec<Member>, &Target)> = BTreeMap::new();
        let mut weightings = BTreeMap::new();
        for (name, target) in &self.targets {
            let Some(record) = self.records.get(name) else { continue };
            let status = match record.state {
                State::Unknown => MemberStatus::Unproven,
                State::Unhealthy => {
                    MemberStatus::Broken { ejected_at: record.ejected_at, refused: record.refused }
                }
                State::Healthy | State::Degraded | State::Recovering => MemberStatus::Usable,
            };
            let own = if record.state == State::Degraded { DEGRADED_FACTOR } else { 1.0 };
            weightings.insert(name.clone(), Weighting { factor: own, overridden: false });
            if target.active {
                let member = Member { name: name.clone(), weight: target.weight, status };
                pools.entry(&target.pool).or_insert_with(|| (Vec::new(), target)).0.push(member);
            } else if status != MemberStatus::Usable {
                weightings.insert(name.clone(), Weighting { factor: 0.0, overridden: false });
            }
        }
        self.ejections.retain(|(at, _)| now.saturating_sub(*at) < FLIP_WINDOW);
        let fallen: BTreeSet<&str> = self.ejections.iter().map(|(_, backend)| backend.as_str()).collect();
        let mut alarms: BTreeSet<Alarm> = BTreeSet::new();
        let flips =
            |fallen: usize, of: usize, share: f64| fallen >= FLIP_MIN && fallen as f64 > of as f64 * share;
        let mut ruled: BTreeMap<String, PoolDecision> = BTreeMap::new();
        for (pool, (members, target)) in pools {
            let decision = guard::decide(&members, target.max_ejected_percent, target.profile.panic_percent);
            for (member, r#use) in members.iter().zip(&decision.uses) {
                if let Some(weighting) = weightings.get_mut(&member.name) {
                    match r#use {
                        Use::Normal => {}
                        Use::Out => *weighting = Weighting { factor: 0.0, overridden: false },
                        Use::Overridden => *weighting = Weighting { factor: 1.0, overridden: true },
                    }
                }
            }
            let here = members.iter().filter(|m| fallen.contains(m.name.as_str())).count();
            let alarm = |kind| Alarm { kind, subject: pool.to_owned() };
            alarms.extend(decision.panic.then(|| alarm(AlarmKind::Panic)));
            alarms.extend((decision.over_budget > 0).then(|| alarm(AlarmKind::EjectionBudget)));
            alarms.extend(
                flips(here, members.len(), FLIP_POOL_SHARE).then(|| alarm(AlarmKind::CorrelatedFlip)),
            );
            ruled.insert(pool.to_owned(), decision);
        }
        let everywhere = flips(fallen.len(), self.records.len(), FLIP_ALL_SHARE) && fallen.len() > FLIP_MIN;
        alarms.extend(everywhere.then(|| Alarm { kind: AlarmKind::CorrelatedFlip, subject: String::new() }));
        let isolated = self.isolated.iter().filter(|(_, until)| now < *until);
        alarms.extend(isolated.map(|(v, _)| Alarm { kind: AlarmKind::Isolated, subject: v.to_string() }));
        (self.weightings, self.pools) = (weightings, ruled);
        self.generation += 1;
        let old = std::mem::replace(&mut self.alarms, alarms);
        let (raised, cleared): (Vec<Alarm>, Vec<Alarm>) = (
            self.alarms.difference(&old).cloned().collect(),
            old.difference(&self.alarms).cloned().collect(),
        );
        for (alarms, kind) in [(raised, EventKind::Alarm), (cleared, EventKind::AlarmCleared)] {
            for alarm in alarms {
                let message = format!("{}: {}", alarm.kind.as_str(), alarm.kind.explanation());
                self.note(&alarm.subject, kind, message, now);
            }
        }
    }

    fn note(&mut self, subject: &str, kind: EventKind, message: String, now: Timestamp) {
        self.last_event += 1;
        let same = self.events.iter().rposition(|event| {
            event.kind == kind
                && event.subject == subject
                && event.message == message
                && now.saturating_sub(event.at) <= FOLDED_WITHIN
        });
        let folded = same.and_then(|at| self.events.remove(at));
        if self.events.len() >= EVENTS_MAX {
            self.events.pop_front();
        }
        let (first, count) = folded.map_or((now, 1), |event| (event.first, event.count.saturating_add(1)));
        let subject = subject.to_owned();
        self.events.push_back(Event {
            number: self.last_event,
            at: now,
            first,
            count,
            subject,
            kind,
            message,
        });
        self.generation += 1;
    }

    /// Rises when a verdict, an assignment, an order or an event is new.
    pub(crate) const fn generation(&self) -> u64 {
        self.generation
    }

    /// The last event that was written to the log.
    pub(crate) const fn logged(&self) -> u64 {
        self.logged
    }

    /// Marks all events as written to the log.
    pub(crate) const fn mark_logged(&mut self) {
        self.logged = self.last_event;
    }

    /// The events after an event number, oldest first.
    pub(crate) fn events(&self, after: u64) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(move |event| event.number > after)
    }

    /// Takes the orders since the last call.
    pub(crate) fn take_orders(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.orders)
    }

    pub(crate) fn alarms(&self) -> &BTreeSet<Alarm> {
        &self.alarms
    }

    pub(crate) fn records(&self) -> impl Iterator<Item = (&String, &HealthRecord)> {
        self.records.iter()
    }

    pub(crate) fn record(&self, backend: &str) -> Option<&HealthRecord> {
        self.records.get(backend)
    }

    pub(crate) fn target(&self, backend: &str) -> Option<&Target> {
        self.targets.get(backend)
    }

    pub(crate) fn probers(&self, backend: &str) -> Option<&Probers> {
        self.probers.get(backend)
    }

    pub(crate) fn assignments(&self) -> impl Iterator<Item = (&String, &Probers)> {
        self.probers.iter()
    }

    /// The result of health for the weight of a backend.
    pub(crate) fn weighting(&self, backend: &str) -> Weighting {
        self.weightings.get(backend).copied().unwrap_or(Weighting { factor: 1.0, overridden: false })
    }

    pub(crate) fn isolated_observers(&self) -> &IsolatedObservers {
        &self.isolated
    }
}
