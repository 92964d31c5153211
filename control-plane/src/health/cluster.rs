//! All backends together: assigns who looks, feeds each case, judges observers and pools, remembers what happened.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use weir_proto::resource::HealthProfile;

use super::assign::{Probers, Regions, rank};
use super::case::{Action, Case};
use super::evidence::{Moment, Observation, Passive, Vantage};
use super::guard::{self, Member, Ruling, Standing, Use};
use super::observer::{Observers, Sight};
use super::params::{
    CONFIRMERS, DEGRADED_FACTOR, EVENTS_MAX, FLIP_ALL_SHARE, FLIP_MIN, FLIP_POOL_SHARE, FLIP_WINDOW,
    OBSERVER_WINDOW, QUORUM, vantages,
};
use super::rule::State;
use super::tally::Context;
use super::tier::Tier;

/// A backend as it is declared.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Target {
    pub(crate) pool: String,
    /// What makes it this backend: one that moved is looked at anew.
    pub(crate) identity: String,
    pub(crate) weight: u32,
    /// ACTIVE: it takes part in its pool. One that drains is looked at, but not counted.
    pub(crate) active: bool,
    pub(crate) profile: HealthProfile,
    /// The pool's bound on ejections.
    pub(crate) max_ejected_percent: u32,
}

/// Something that happened, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// Rises by one with every event.
    pub(crate) number: u64,
    pub(crate) at: Moment,
    /// A backend, a pool or a gateway.
    pub(crate) subject: String,
    pub(crate) kind: &'static str,
    pub(crate) message: String,
}

/// Look now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Order {
    /// Rises with every order.
    pub(crate) serial: u64,
    pub(crate) backend: String,
    pub(crate) tier: Tier,
    pub(crate) vantages: BTreeSet<Vantage>,
}

/// How much something is to be used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Standard {
    /// What is left of its weight, slow start aside; zero: only when nothing else is left.
    pub(crate) factor: f64,
    /// Its pool uses it against its state.
    pub(crate) overridden: bool,
}

/// An alarm that is on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Alarm {
    pub(crate) kind: &'static str,
    /// A pool or a vantage point; empty: all of it.
    pub(crate) subject: String,
}

/// The machine.
#[derive(Debug, Default)]
pub(crate) struct Cluster {
    targets: BTreeMap<String, Target>,
    cases: BTreeMap<String, Case>,
    gateways: Regions,
    probers: BTreeMap<String, Probers>,
    observers: Observers,
    rulings: BTreeMap<String, Standard>,
    pools: BTreeMap<String, Ruling>,
    alarms: BTreeSet<Alarm>,
    falls: VecDeque<(Moment, String)>,
    events: VecDeque<Event>,
    last_event: u64,
    orders: Vec<Order>,
    last_order: u64,
    assigned: u64,
    /// Rises with everything that anybody could see.
    generation: u64,
    logged: u64,
}

impl Cluster {
    /// Takes up what is declared.
    pub(crate) fn configure(&mut self, targets: BTreeMap<String, Target>, now: Moment) {
        let old = std::mem::replace(&mut self.targets, targets);
        self.cases.retain(|name, _| {
            let identity = |all: &BTreeMap<String, Target>| all.get(name).map(|t| t.identity.clone());
            identity(&self.targets).is_some_and(|new| identity(&old) == Some(new))
        });
        for (name, target) in &self.targets {
            match self.cases.get_mut(name) {
                Some(case) => case.profile = target.profile,
                None => {
                    self.cases.insert(name.clone(), Case::new(target.profile, now));
                }
            }
        }
        self.assign();
        self.rule(now);
    }

    /// Goes on from what was known of a backend before a restart.
    pub(crate) fn restore(&mut self, backend: &str, restore: impl FnOnce(&mut Case)) {
        if let Some(case) = self.cases.get_mut(backend) {
            restore(case);
        }
    }

    /// Everything that was known has been put back.
    pub(crate) fn restored(&mut self, now: Moment) {
        self.rule(now);
    }

    /// Whether anybody asks a backend for completions; where nobody does, liveness has to do.
    pub(crate) fn is_ready_capable(&self, case: &Case) -> bool {
        !self.gateways.is_empty() && case.profile.paid_probes_per_hour > 0
    }

    /// Takes over which gateways probe.
    pub(crate) fn gateways(&self) -> &Regions {
        &self.gateways
    }

    /// See [`Self::gateways`].
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

    /// Takes in one look.
    pub(crate) fn observe(&mut self, vantage: &Vantage, backend: &str, seen: &Observation, now: Moment) {
        let Some(case) = self.cases.get_mut(backend) else { return };
        case.observe(vantage, seen, now);
        self.judge(backend, now);
    }

    /// Takes in what a gateway's requests came to.
    pub(crate) fn requests(&mut self, vantage: &Vantage, backend: &str, passive: &Passive, now: Moment) {
        let Some(case) = self.cases.get_mut(backend) else { return };
        case.requests(vantage, passive, now);
        self.judge(backend, now);
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Moment) {
        let lost = self.weigh_observers(now);
        let names: Vec<String> = self.cases.keys().cloned().collect();
        for name in names {
            self.judge(&name, now);
        }
        // Alarms end by themselves.
        if lost || !self.alarms.is_empty() || !self.falls.is_empty() {
            self.rule(now);
        }
    }

    /// When to tick next at the latest.
    pub(crate) fn next_tick(&self, now: Moment) -> Moment {
        let coarse = now + Duration::from_secs(1);
        self.cases.values().filter_map(|case| case.next(now)).min().map_or(coarse, |next| next.min(coarse))
    }

    fn judge(&mut self, backend: &str, now: Moment) {
        let Some(case) = self.cases.get_mut(backend) else { return };
        let before = (case.state, case.rule, case.stale);
        let ready_capable = !self.gateways.is_empty() && case.profile.paid_probes_per_hour > 0;
        let context = Context { observers: &self.observers, ready_capable };
        let actions = case.judge(now, &context);
        let fell = before.0 != State::Unhealthy && case.state == State::Unhealthy;
        let changed = before != (case.state, case.rule, case.stale);
        for action in actions {
            match action {
                Action::Note { kind, message } => self.note(backend, kind, message, now),
                Action::Ask { tier, reporter } => self.ask(backend, tier, reporter),
            }
        }
        if fell {
            self.falls.push_back((now, backend.to_owned()));
        }
        if changed {
            self.rule(now);
        }
    }

    /// Has the assigned vantage points look now, and some more: those assigned may share a broken path.
    fn ask(&mut self, backend: &str, tier: Tier, reporter: Option<Vantage>) {
        let without: BTreeSet<Vantage> = reporter.into_iter().collect();
        let mut asked = rank(backend, tier, &self.gateways, &without);
        asked.truncate(CONFIRMERS);
        let few = asked.len() + without.len() < vantages(tier);
        if tier == Tier::Liveness && few && !without.contains(&Vantage::ControlPlane) {
            asked.push(Vantage::ControlPlane);
        }
        if let Some(case) = self.cases.get_mut(backend) {
            case.asked(tier, asked.iter().cloned());
        }
        if asked.is_empty() {
            return;
        }
        self.order(backend, tier, asked.into_iter().collect());
    }

    /// Has those who look at a backend anyway look now, whatever is thought of it; says who they are.
    pub(crate) fn look(&mut self, backend: &str, tier: Tier) -> BTreeSet<Vantage> {
        let vantages: BTreeSet<Vantage> = self
            .probers
            .get(backend)
            .map(|probers| probers.of(tier).iter().cloned().collect())
            .unwrap_or_default();
        if !vantages.is_empty() {
            self.order(backend, tier, vantages.clone());
        }
        vantages
    }

    fn order(&mut self, backend: &str, tier: Tier, vantages: BTreeSet<Vantage>) {
        self.last_order += 1;
        self.generation += 1;
        self.orders.push(Order { serial: self.last_order, backend: backend.to_owned(), tier, vantages });
    }

    /// Whether anybody lost its vote.
    fn weigh_observers(&mut self, now: Moment) -> bool {
        let mut sights: BTreeMap<Vantage, Sight> = BTreeMap::new();
        for case in self.cases.values() {
            let fresh: Vec<(&Vantage, bool)> = case
                .votes
                .iter()
                .filter(|(tier, _, vote)| {
                    *tier == Tier::Liveness && now.saturating_sub(vote.at) <= OBSERVER_WINDOW
                })
                .map(|(_, vantage, vote)| (vantage, vote.last.is_good()))
                .collect();
            let well = fresh.iter().filter(|(_, good)| *good).count();
            for (vantage, good) in &fresh {
                let sight = sights.entry((*vantage).clone()).or_default();
                sight.seen += 1;
                if !good {
                    sight.failed += 1;
                    // One that says that all is well does not outweigh two that say it is not: it may lie, or look at
                    // something else.
                    sight.contradicted += usize::from(well >= QUORUM || well > fresh.len() - well);
                }
            }
        }
        let lost = self.observers.weigh(&sights, now);
        for vantage in &lost {
            let message = "sees most backends fail while others do not: its votes do not count for a while";
            self.note(&vantage.to_string(), "isolated", message.into(), now);
        }
        !lost.is_empty()
    }

    /// Rules on every pool, and keeps the alarms true.
    fn rule(&mut self, now: Moment) {
        let mut pools: BTreeMap<&str, (Vec<Member>, &Target)> = BTreeMap::new();
        let mut rulings = BTreeMap::new();
        for (name, target) in &self.targets {
            let Some(case) = self.cases.get(name) else { continue };
            let standing = match case.state {
                State::Unknown => Standing::Unproven,
                State::Unhealthy => Standing::Broken { fell_at: case.fell_at, refused: case.refused },
                State::Healthy | State::Degraded | State::Recovering => Standing::Usable,
            };
            let own = if case.state == State::Degraded { DEGRADED_FACTOR } else { 1.0 };
            rulings.insert(name.clone(), Standard { factor: own, overridden: false });
            if target.active {
                let member = Member { name: name.clone(), weight: target.weight, standing };
                pools.entry(&target.pool).or_insert_with(|| (Vec::new(), target)).0.push(member);
            } else if standing != Standing::Usable {
                rulings.insert(name.clone(), Standard { factor: 0.0, overridden: false });
            }
        }
        self.falls.retain(|(at, _)| now.saturating_sub(*at) < FLIP_WINDOW);
        let fallen: BTreeSet<&str> = self.falls.iter().map(|(_, backend)| backend.as_str()).collect();
        let mut alarms: BTreeSet<Alarm> = BTreeSet::new();
        let flips =
            |fallen: usize, of: usize, share: f64| fallen >= FLIP_MIN && fallen as f64 > of as f64 * share;
        let mut ruled: BTreeMap<String, Ruling> = BTreeMap::new();
        for (pool, (members, target)) in pools {
            let ruling = guard::rule(&members, target.max_ejected_percent, target.profile.panic_percent);
            for (member, r#use) in members.iter().zip(&ruling.uses) {
                if let Some(standard) = rulings.get_mut(&member.name) {
                    match r#use {
                        Use::Normal => {}
                        Use::Out => *standard = Standard { factor: 0.0, overridden: false },
                        Use::Overridden => *standard = Standard { factor: 1.0, overridden: true },
                    }
                }
            }
            let here = members.iter().filter(|m| fallen.contains(m.name.as_str())).count();
            let alarm = |kind| Alarm { kind, subject: pool.to_owned() };
            alarms.extend(ruling.panic.then(|| alarm("panic")));
            alarms.extend((ruling.over_budget > 0).then(|| alarm("ejection_budget")));
            alarms.extend(flips(here, members.len(), FLIP_POOL_SHARE).then(|| alarm("correlated_flip")));
            ruled.insert(pool.to_owned(), ruling);
        }
        let everywhere = flips(fallen.len(), self.cases.len(), FLIP_ALL_SHARE) && fallen.len() > FLIP_MIN;
        alarms.extend(everywhere.then(|| Alarm { kind: "correlated_flip", subject: String::new() }));
        let isolated = self.observers.isolated().filter(|(_, until)| now < *until);
        alarms.extend(isolated.map(|(v, _)| Alarm { kind: "isolated", subject: v.to_string() }));
        (self.rulings, self.pools) = (rulings, ruled);
        self.generation += 1;
        let old = std::mem::replace(&mut self.alarms, alarms);
        let (raised, cleared): (Vec<Alarm>, Vec<Alarm>) = (
            self.alarms.difference(&old).cloned().collect(),
            old.difference(&self.alarms).cloned().collect(),
        );
        for (alarms, kind) in [(raised, "alarm"), (cleared, "alarm_over")] {
            for alarm in alarms {
                let message = format!("{}: {}", alarm.kind, alarm_text(alarm.kind));
                self.note(&alarm.subject, kind, message, now);
            }
        }
    }

    fn note(&mut self, subject: &str, kind: &'static str, message: String, now: Moment) {
        self.last_event += 1;
        if self.events.len() >= EVENTS_MAX {
            self.events.pop_front();
        }
        let event = Event { number: self.last_event, at: now, subject: subject.to_owned(), kind, message };
        self.events.push_back(event);
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

    /// All events so far are in the log.
    pub(crate) const fn mark_logged(&mut self) {
        self.logged = self.last_event;
    }

    /// What happened after an event, oldest first.
    pub(crate) fn events(&self, after: u64) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(move |event| event.number > after)
    }

    /// The orders given since this was last asked.
    pub(crate) fn take_orders(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.orders)
    }

    pub(crate) fn alarms(&self) -> &BTreeSet<Alarm> {
        &self.alarms
    }

    pub(crate) fn cases(&self) -> impl Iterator<Item = (&String, &Case)> {
        self.cases.iter()
    }

    pub(crate) fn case(&self, backend: &str) -> Option<&Case> {
        self.cases.get(backend)
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

    /// How much a backend is to be used.
    pub(crate) fn standard(&self, backend: &str) -> Standard {
        self.rulings.get(backend).copied().unwrap_or(Standard { factor: 1.0, overridden: false })
    }

    pub(crate) fn observers(&self) -> &Observers {
        &self.observers
    }
}

const fn alarm_text(kind: &str) -> &'static str {
    match kind.as_bytes() {
        b"panic" => "too little of the pool is well; every active backend that can be connected to is used",
        b"ejection_budget" => "more backends are unhealthy than may be left out; the rest stays in use",
        b"correlated_flip" => "many backends fell at once: look at what they share before you look at each",
        b"isolated" => "it sees most backends fail while others do not",
        _ => "",
    }
}
