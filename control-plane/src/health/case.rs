//! The case of one backend: from looks to a verdict. Pure; time is an argument.
//!
//! A first failure makes it *suspect*: it stays in use while others are asked to look now. Only what a quorum sees
//! since the suspicion began condemns it; what one vantage point alone sees acquits it (see [`Tally::condemns`]).
//! Two ways of failing are judged apart: it cannot be reached (liveness), or it gives no completion (readiness).
//!
//! [`Tally::condemns`]: super::tally::Tally::condemns

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use weir_proto::resource::HealthProfile;

use super::degrade::Signs;
use super::evidence::{Cause, Moment, Observation, Outcome, Passive, Vantage, cut};
use super::params::{
    ACCUSATIONS, ACQUITTAL, CONFIRM_SLACK, HOLD_DECAY, HOLD_FIRST, HOLD_MAX, PASSIVE_FAILURES, QUORUM,
    RAMP_FLOOR, RECHECK,
};
use super::rule::{Rule, State};
use super::tally::{Context, Tally, Votes};
use super::tier::Tier;

/// The tiers that can condemn.
const JUDGING: [Tier; 2] = [Tier::Liveness, Tier::Readiness];

/// What a case asks of whoever runs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Have vantage points look now: those assigned and some more, but not `reporter`, who does on its own.
    Ask { tier: Tier, reporter: Option<Vantage> },
    /// Something happened that people want to know.
    Note { kind: &'static str, message: String },
}

/// A suspicion that is being looked into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Suspicion {
    pub(crate) since: Moment,
    pub(crate) reporter: Vantage,
    /// Who was asked; filled in by whoever asks.
    pub(crate) asked: BTreeSet<Vantage>,
    /// Whoever has not answered by then is not waited for.
    pub(crate) deadline: Moment,
}

/// One backend.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) profile: HealthProfile,
    pub(crate) state: State,
    pub(crate) rule: Rule,
    pub(crate) detail: String,
    pub(crate) since: Moment,
    pub(crate) votes: Votes,
    pub(crate) signs: Signs,
    /// By [`JUDGING`].
    pub(crate) suspicions: [Option<Suspicion>; 2],
    /// Who was outvoted, and until when its failures open no new suspicion.
    acquitted: BTreeMap<(Tier, Vantage), Moment>,
    /// A gateway's own requests fail; by [`JUDGING`].
    alleged: [Option<Vantage>; 2],
    /// Steps of damping, and since when the last one is being forgiven.
    damping: u32,
    forgiving_since: Moment,
    pub(crate) hold_until: Moment,
    pub(crate) fell_at: Moment,
    /// It fell since nobody could connect.
    pub(crate) refused: bool,
    rechecked: [Option<Moment>; 2],
    loading_since: Option<Moment>,
    has_served: bool,
    pub(crate) stale: bool,
    last_seen: Moment,
}

impl Case {
    /// Nothing is known yet.
    pub(crate) fn new(profile: HealthProfile, now: Moment) -> Self {
        Self {
            profile,
            state: State::Unknown,
            rule: Rule::NotProbed,
            detail: "not probed yet".into(),
            since: now,
            votes: Votes::default(),
            signs: Signs::default(),
            suspicions: [None, None],
            acquitted: BTreeMap::new(),
            alleged: [None, None],
            damping: 0,
            forgiving_since: now,
            hold_until: Moment::ZERO,
            fell_at: Moment::ZERO,
            refused: false,
            rechecked: [None, None],
            loading_since: None,
            has_served: false,
            stale: false,
            last_seen: now,
        }
    }

    /// Goes on from what was known before a restart; nothing is seen yet, so it is stale until somebody looks.
    pub(crate) fn restore(&mut self, state: State, rule: Rule, detail: &str, damping: u32, now: Moment) {
        (self.state, self.rule, self.detail, self.since) = (state, rule, cut(detail).to_owned(), now);
        self.damping = damping;
        self.has_served = state != State::Unknown;
        self.stale = true;
    }

    pub(crate) const fn damping(&self) -> u32 {
        self.damping
    }

    /// Takes in one look.
    pub(crate) fn observe(&mut self, vantage: &Vantage, seen: &Observation, now: Moment) {
        self.last_seen = now;
        self.signs.observe(seen, now);
        match (seen.tier, seen.outcome) {
            // Loading is said by the server itself; how long that may go on is counted from the first time.
            (_, Outcome::Loading) => {
                self.loading_since.get_or_insert(now);
            }
            (Tier::Readiness, outcome) if outcome.is_good() => self.loading_since = None,
            _ => {}
        }
        if seen.tier != Tier::Deep {
            self.votes.cast(seen.tier, vantage, seen.outcome, &seen.detail, now);
            if seen.outcome.is_good() {
                self.acquitted.remove(&(seen.tier, vantage.clone()));
            }
        }
    }

    /// Takes in what a gateway's requests came to.
    pub(crate) fn requests(&mut self, vantage: &Vantage, passive: &Passive, now: Moment) {
        self.signs.requests(passive, now);
        let failures = passive.failures();
        if failures == 0 && passive.successes > 0 {
            // Real traffic proves more than any probe.
            self.last_seen = now;
            for tier in JUDGING {
                self.votes.cast(tier, vantage, Outcome::Pass, "requests succeed", now);
                self.acquitted.remove(&(tier, vantage.clone()));
            }
            self.loading_since = None;
        }
        let broken = failures >= PASSIVE_FAILURES && passive.successes == 0;
        if broken || passive.ejected || (failures > 0 && self.signs.is_failing(now)) {
            // Liveness costs nothing and tells soonest; a completion is asked for where connections are not the trouble.
            let reached = passive.connect_failures * 2 <= failures;
            self.alleged = [Some(vantage.clone()), reached.then(|| vantage.clone())];
        }
    }

    /// Notes who was asked to look.
    pub(crate) fn asked(&mut self, tier: Tier, vantages: impl IntoIterator<Item = Vantage>) {
        if let Some(suspicion) = index(tier).and_then(|i| self.suspicions[i].as_mut()) {
            suspicion.asked.extend(vantages);
        }
    }

    /// Draws the conclusions of everything seen by now.
    pub(crate) fn judge(&mut self, now: Moment, context: &Context<'_>) -> Vec<Action> {
        let mut actions = Vec::new();
        self.votes.expire(&self.profile, now);
        self.acquitted.retain(|_, until| now < *until);
        self.forgive(now);
        if self.state == State::Unhealthy {
            self.suspicions = [None, None];
            self.alleged = [None, None];
            self.recover(now, context, &mut actions);
        } else {
            for (i, tier) in JUDGING.into_iter().enumerate() {
                self.suspect(i, tier, now, context, &mut actions);
                if self.state == State::Unhealthy {
                    break;
                }
            }
            self.settle(now, context, &mut actions);
        }
        let stale = self.votes.is_empty() && self.state != State::Unknown;
        if stale && !self.stale {
            actions.push(Action::Note { kind: "stale", message: "nobody reports on it any more".into() });
        }
        self.stale = stale;
        actions
    }

    /// The share of its weight that its state leaves it, slow start aside.
    pub(crate) const fn is_usable(&self) -> bool {
        matches!(self.state, State::Healthy | State::Degraded | State::Recovering)
    }

    /// How far a slow start has come, 0.1 to 1.
    pub(crate) fn ramp(&self, now: Moment) -> f64 {
        if self.state != State::Recovering {
            return 1.0;
        }
        let elapsed = now.saturating_sub(self.since).as_secs_f64();
        (elapsed / self.profile.slow_start.as_secs_f64()).clamp(RAMP_FLOOR, 1.0)
    }

    /// When its state may next change for the better without anything new being asked of anybody.
    pub(crate) fn may_return(&self, now: Moment) -> Option<Moment> {
        (self.state == State::Unhealthy).then(|| self.hold_until.max(now))
    }

    /// Whether a vantage point was outvoted lately.
    pub(crate) fn acquitted(&self, tier: Tier, vantage: &Vantage) -> bool {
        self.acquitted.contains_key(&(tier, vantage.clone()))
    }

    /// What the next change waits for, for people.
    pub(crate) fn conditions(&self, now: Moment, ready_capable: bool) -> Vec<String> {
        let mut conditions = Vec::new();
        match self.state {
            State::Unhealthy => {
                let hold = self.hold_until.saturating_sub(now);
                if !hold.is_zero() {
                    let text = format!(
                        "it fell {} times lately, so it is held back for {} s more",
                        self.damping,
                        hold.as_secs() + 1
                    );
                    conditions.push(text);
                }
                conditions.push(format!(
                    "{} liveness passes in a row from {QUORUM} vantage points (or the only one that reaches it)",
                    self.profile.healthy_threshold
                ));
                if ready_capable {
                    conditions.push("one readiness pass".into());
                }
            }
            State::Recovering => {
                let left = self.profile.slow_start.saturating_sub(now.saturating_sub(self.since));
                conditions.push(format!("its slow start takes {} s more", left.as_secs() + 1));
                conditions.push(format!("one failure at {QUORUM} vantage points would send it back"));
            }
            State::Unknown if ready_capable => conditions.push("one readiness pass".into()),
            State::Unknown => conditions.push("one liveness pass".into()),
            State::Healthy | State::Degraded => {
                conditions.push(format!(
                    "{QUORUM} vantage points with {ACCUSATIONS} failures each would take it out, unless {QUORUM} others reach it"
                ));
            }
        }
        for (tier, suspicion) in JUDGING.iter().zip(&self.suspicions) {
            if let Some(suspicion) = suspicion {
                conditions.push(format!(
                    "suspected at {} by {}; {} others were asked",
                    tier.name(),
                    suspicion.reporter,
                    suspicion.asked.len()
                ));
            }
        }
        conditions
    }

    /// When to judge again, though nothing new was seen.
    pub(crate) fn next(&self, now: Moment) -> Option<Moment> {
        let deadlines = self.suspicions.iter().flatten().map(|s| s.deadline);
        let hold = (self.state == State::Unhealthy).then_some(self.hold_until);
        let ramp = (self.state == State::Recovering).then(|| self.since + self.profile.slow_start);
        deadlines.chain(hold).chain(ramp).filter(|at| *at > now).min()
    }

    fn become_(&mut self, state: State, rule: Rule, detail: String, now: Moment, actions: &mut Vec<Action>) {
        let detail = cut(&detail).to_owned();
        if state != self.state {
            let message = format!("{} -> {} by {}: {detail}", self.state.name(), state.name(), rule.name());
            actions.push(Action::Note { kind: "state", message });
            self.since = now;
            self.forgiving_since = now;
        }
        (self.state, self.rule, self.detail) = (state, rule, detail);
        self.has_served |= self.is_usable();
    }

    /// A quorum, or the only one there is, says that it is broken.
    fn fall(&mut self, rule: Rule, detail: String, refused: bool, now: Moment, actions: &mut Vec<Action>) {
        let relapse = self.state == State::Recovering;
        let hold = match self.damping {
            0 => Duration::ZERO,
            n => HOLD_FIRST.saturating_mul(1 << (n - 1).min(16)).min(HOLD_MAX),
        };
        self.damping = self.damping.saturating_add(1).min(16);
        (self.hold_until, self.fell_at, self.refused) = (now + hold, now, refused);
        self.suspicions = [None, None];
        self.alleged = [None, None];
        self.rechecked = [None, None];
        let rule = if relapse { Rule::Relapse } else { rule };
        self.become_(State::Unhealthy, rule, detail, now, actions);
    }

    fn forgive(&mut self, now: Moment) {
        if self.is_usable() && self.damping > 0 && now.saturating_sub(self.forgiving_since) >= HOLD_DECAY {
            self.damping -= 1;
            self.forgiving_since = now;
        }
    }

    /// Opens, judges or drops the suspicion at one tier.
    fn suspect(
        &mut self,
        i: usize,
        tier: Tier,
        now: Moment,
        context: &Context<'_>,
        actions: &mut Vec<Action>,
    ) {
        if self.suspicions[i].is_none() {
            let Some((reporter, since, why)) = self.ground(tier, now, context) else { return };
            // Who reported from its own requests has not probed yet.
            let probes = self.votes.get(tier, &reporter).is_some_and(|vote| vote.failures > 0);
            let deadline = now + self.profile.timeout + CONFIRM_SLACK;
            let message = format!("{} fails for {reporter}: {why}; others are asked", tier.name());
            actions.push(Action::Note { kind: "suspect", message });
            actions.push(Action::Ask { tier, reporter: probes.then(|| reporter.clone()) });
            let asked = if probes { BTreeSet::new() } else { [reporter.clone()].into() };
            self.suspicions[i] = Some(Suspicion { since, reporter, asked, deadline });
            // Judged when the answers come: with nobody asked yet it would look as if all had answered.
            return;
        }
        let Some(suspicion) = self.suspicions[i].clone() else { return };
        let tally = self.votes.tally(tier, suspicion.since, self.needed(), context, now);
        let answered = |vantage: &Vantage| {
            let vote = self.votes.get(tier, vantage).filter(|vote| vote.at >= suspicion.since);
            vote.is_some_and(|vote| vote.last.is_good() || vote.failures >= ACCUSATIONS)
        };
        let late = now >= suspicion.deadline;
        // Who was asked and has not answered, and who failed once and may yet pass.
        let asked = &suspicion.asked;
        let undecided = tally.undecided.iter().filter(|(vantage, _)| !asked.contains(*vantage)).count();
        let open = asked.iter().filter(|vantage| !answered(vantage)).count() + undecided;
        let settled = late || asked.iter().all(answered) || tally.condemns_whatever(open);
        if settled && let Some(sentence) = self.sentence(tier, &tally) {
            match sentence {
                Sentence::Loading(detail) => {
                    self.suspicions[i] = None;
                    self.become_(State::Unknown, Rule::Loading, detail, now, actions);
                }
                Sentence::Unhealthy { rule, detail, refused } => {
                    self.fall(rule, detail, refused, now, actions);
                }
            }
        } else if settled && !tally.dissenters.is_empty() {
            let outvoted: Vec<Vantage> =
                tally.accusers.iter().chain(&tally.undecided).map(|(v, _)| (*v).clone()).collect();
            let others = tally.dissenters.len();
            self.suspicions[i] = None;
            for vantage in &outvoted {
                let message = format!("{} fails for {vantage} alone, {others} others are well", tier.name());
                actions.push(Action::Note { kind: "acquitted", message });
                self.acquitted.insert((tier, vantage.clone()), now + ACQUITTAL);
            }
        } else if late && tally.voters() == 0 {
            // Nobody says anything: silence is no evidence.
            self.suspicions[i] = None;
        } else if late {
            let deadline = now + self.profile.timeout + CONFIRM_SLACK;
            if let Some(suspicion) = &mut self.suspicions[i] {
                suspicion.deadline = deadline;
            }
            actions.push(Action::Ask { tier, reporter: None });
        }
    }

    /// A reason for suspicion: who reports it, since when, and what.
    fn ground(
        &mut self,
        tier: Tier,
        now: Moment,
        context: &Context<'_>,
    ) -> Option<(Vantage, Moment, String)> {
        // At birth and while it loads, that it does not answer is no news; only a sentence is.
        let quiet = self.rule == Rule::Loading && !self.loading_too_long(now);
        let failing = self
            .votes
            .counted(tier, context, now)
            .filter(|(_, vote)| !(vote.last.is_good() || quiet && vote.last == Outcome::Loading))
            .find(|(vantage, _)| !self.acquitted.contains_key(&(tier, (*vantage).clone())))
            .map(|(vantage, vote)| (vantage.clone(), vote.at, vote.detail.clone()));
        let alleged = index(tier).and_then(|i| self.alleged[i].take());
        failing.or_else(|| {
            let vantage = alleged?;
            if context.observers.is_isolated(&vantage, now)
                || self.acquitted.contains_key(&(tier, vantage.clone()))
            {
                return None;
            }
            Some((vantage, now, "its requests fail".into()))
        })
    }

    /// Failures in a row that make an accuser: in a slow start the benefit of the doubt is used up.
    const fn needed(&self) -> u32 {
        if matches!(self.state, State::Recovering) { 1 } else { ACCUSATIONS }
    }

    fn loading_too_long(&self, now: Moment) -> bool {
        self.loading_since.is_some_and(|at| now.saturating_sub(at) >= self.profile.loading_patience)
    }

    fn sentence(&self, tier: Tier, tally: &Tally<'_>) -> Option<Sentence> {
        let wrong =
            |cause| move |(_, vote): &&(_, &super::evidence::Vote)| vote.last == Outcome::Failed(cause);
        let failing = || tally.accusers.iter().chain(&tally.undecided);
        // That the model is not there is said by the server itself: once each is enough.
        let missing = failing().filter(|f| wrong(Cause::WrongModel)(f)).count();
        let missing =
            missing >= QUORUM && missing > tally.dissenters.len() && tally.dissenters.len() < QUORUM;
        let alone = tally.voters() == 1
            && failing()
                .any(|(_, vote)| vote.failures >= self.profile.unhealthy_threshold.max(self.needed()));
        if !(tally.condemns() || missing || alone) {
            return None;
        }
        let said: Vec<String> =
            failing().take(3).map(|(v, vote)| format!("{v}: {}", short(&vote.detail))).collect();
        let detail = said.join("; ");
        let loading =
            failing().filter(|(_, vote)| vote.last == Outcome::Loading).count() * 2 > failing().count();
        let newest = failing().map(|(_, vote)| vote.at).max().unwrap_or_default();
        let too_long = self.loading_too_long(newest);
        if loading && !too_long {
            return Some(Sentence::Loading(detail));
        }
        let rule = match (tier, alone) {
            _ if loading => Rule::LoadingTooLong,
            (Tier::Liveness, false) => Rule::LivenessQuorum,
            (Tier::Liveness, true) => Rule::LivenessAlone,
            (_, false) => Rule::ReadinessQuorum,
            (_, true) => Rule::ReadinessAlone,
        };
        let refused = failing().all(|f| wrong(Cause::Refused)(&f));
        Some(Sentence::Unhealthy { rule, detail, refused })
    }

    /// While it is in use: first passes, the end of a slow start, degradations.
    fn settle(&mut self, now: Moment, context: &Context<'_>, actions: &mut Vec<Action>) {
        match self.state {
            State::Unknown => {
                let tier = if context.ready_capable { Tier::Readiness } else { Tier::Liveness };
                // What was seen before it became unknown again says nothing of now.
                let since = self.since;
                let pass = self
                    .votes
                    .counted(tier, context, now)
                    .find(|(_, vote)| vote.last.is_good() && vote.at >= since);
                if let Some((vantage, _)) = pass {
                    let detail = format!("{} passed for {vantage}", tier.name());
                    if self.has_served {
                        self.become_(State::Recovering, Rule::Recovery, detail, now, actions);
                    } else {
                        self.become_(State::Healthy, Rule::FirstPass, detail, now, actions);
                    }
                } else if self.rule == Rule::NotProbed && self.loading_since.is_some() {
                    (self.rule, self.detail) = (Rule::Loading, "it says that it is loading".into());
                }
            }
            State::Recovering if now.saturating_sub(self.since) >= self.profile.slow_start => {
                self.become_(State::Healthy, Rule::RampDone, "its slow start is over".into(), now, actions);
            }
            State::Healthy | State::Degraded => match self.signs.degrade(now) {
                Some((rule, detail)) => self.become_(State::Degraded, rule, detail, now, actions),
                None if self.state == State::Degraded => {
                    let detail = format!("no longer {}", self.rule.name());
                    self.become_(State::Healthy, Rule::DegradationOver, detail, now, actions);
                }
                None => {}
            },
            State::Recovering | State::Unhealthy => {}
        }
    }

    /// The way back: reached from a quorum (or all there are), one completion, and the hold-down over.
    fn recover(&mut self, now: Moment, context: &Context<'_>, actions: &mut Vec<Action>) {
        let fell = self.fell_at;
        let live: Vec<(&Vantage, u32)> = self
            .votes
            .counted(Tier::Liveness, context, now)
            .filter(|(_, vote)| vote.at > fell && vote.last.is_good())
            .map(|(vantage, vote)| (vantage, vote.passes))
            .collect();
        let able = self.votes.counted(Tier::Liveness, context, now).count();
        let enough = live.iter().filter(|(_, passes)| *passes >= self.profile.healthy_threshold).count();
        let reached = enough >= QUORUM.min(able).max(1);
        let ready = !context.ready_capable
            || self
                .votes
                .counted(Tier::Readiness, context, now)
                .any(|(_, vote)| vote.at > fell && vote.last.is_good());
        let (glimpsed, by_liveness) =
            (!live.is_empty(), matches!(self.rule, Rule::LivenessQuorum | Rule::LivenessAlone));
        if now < self.hold_until {
            return;
        }
        if reached && ready {
            let detail = format!("{enough} vantage points reach it and it answers again");
            self.become_(State::Recovering, Rule::Recovery, detail, now, actions);
            return;
        }
        // Not to wait for the next round: those who have not looked since are asked. One that fell for its answers
        // waits for its regular probe, which costs tokens.
        let due = |at: Option<Moment>| at.is_none_or(|at| now.saturating_sub(at) >= RECHECK);
        if glimpsed && !reached && due(self.rechecked[0]) {
            self.rechecked[0] = Some(now);
            actions.push(Action::Ask { tier: Tier::Liveness, reporter: None });
        }
        if reached && !ready && (by_liveness || self.rule == Rule::Relapse) && due(self.rechecked[1]) {
            self.rechecked[1] = Some(now);
            actions.push(Action::Ask { tier: Tier::Readiness, reporter: None });
        }
    }
}

/// What a tally amounts to.
enum Sentence {
    Loading(String),
    Unhealthy { rule: Rule, detail: String, refused: bool },
}

fn index(tier: Tier) -> Option<usize> {
    JUDGING.iter().position(|judging| *judging == tier)
}

fn short(text: &str) -> &str {
    let end = text.char_indices().nth(60).map_or(text.len(), |(at, _)| at);
    &text[..end]
}
