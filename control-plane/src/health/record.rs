//! The health record of one backend: from probe results to a verdict. Pure; time is an argument.
//!
//! A first failure makes the backend *suspect*: it stays in use while other observers are told to probe it now. A quorum of
//! failures since then ejects the backend; if only one observer sees failures, the suspect mark is cleared (see
//! [`Tally::ejects`]). Liveness (the server can be reached) and readiness (the model answers) are evaluated separately.
//!
//! Requests outweigh probes, see [`Requests`]: a probe that gets no answer behind requests that are answered is a pass, and a
//! backend whose every request fails is ejected although probes pass. It then returns on trial: the first request tells.
//!
//! [`Tally::ejects`]: super::tally::Tally::ejects

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use weir_probe::FAILURES_IN_A_ROW;
use weir_proto::resource::HealthProfile;

use super::degrade::Signs;
use super::event::EventKind;
use super::evidence::{Cause, Observation, Observer, Outcome, Passive, Timestamp, cut};
use super::params::{
    CLEARED_FOR, CONFIRM_SLACK, HOLD_DECAY, HOLD_FIRST, HOLD_MAX, HOLD_REQUESTS, PASSIVE_FAILURES, QUORUM,
    RAMP_FLOOR, RECHECK,
};
use super::requests::{Failing, Requests};
use super::rule::{Rule, State};
use super::tally::{Context, Tally, Votes};
use super::tier::Tier;

/// The tiers that can eject.
const JUDGING: [Tier; 2] = [Tier::Liveness, Tier::Readiness];

/// An action that the owner of a record carries out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Order probes from the assigned observers and some more, except `reporter`, which probes again on its own.
    Ask { tier: Tier, reporter: Option<Observer> },
    /// Record a health event.
    Note { kind: EventKind, message: String },
}

/// Why a backend is suspect at one tier, until the asked observers have answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Suspect {
    pub(crate) since: Timestamp,
    pub(crate) reporter: Observer,
    /// What it saw.
    pub(crate) why: String,
    /// The observers that were told to probe; filled in by [`HealthRecord::asked`].
    pub(crate) asked: BTreeSet<Observer>,
    /// When the decision is made without the observers that have not answered.
    pub(crate) deadline: Timestamp,
}

/// The health record of one backend.
#[derive(Debug, Clone)]
pub(crate) struct HealthRecord {
    pub(crate) profile: HealthProfile,
    pub(crate) state: State,
    pub(crate) rule: Rule,
    pub(crate) detail: String,
    pub(crate) since: Timestamp,
    pub(crate) votes: Votes,
    pub(crate) signs: Signs,
    requests: Requests,
    /// The gateways that there were at the last evaluation.
    gateways: usize,
    /// It was ejected because of its requests, and none has succeeded since.
    on_trial: bool,
    /// By [`JUDGING`].
    pub(crate) suspects: [Option<Suspect>; 2],
    /// Observers that were outvoted, and until when their failures do not make the backend suspect.
    cleared: BTreeMap<(Tier, Observer), Timestamp>,
    /// A gateway whose requests fail; by [`JUDGING`].
    passive_reporters: [Option<Observer>; 2],
    /// Until when failing requests do not make the backend suspect, because others have just looked; by [`JUDGING`].
    passive_quiet: [Timestamp; 2],
    /// Steps of damping, and the start of the time after which one is removed.
    damping: u32,
    damping_since: Timestamp,
    pub(crate) hold_until: Timestamp,
    pub(crate) ejected_at: Timestamp,
    /// The backend was ejected because it refused connections.
    pub(crate) refused: bool,
    rechecked: [Option<Timestamp>; 2],
    loading_since: Option<Timestamp>,
    has_served: bool,
    pub(crate) stale: bool,
    last_seen: Timestamp,
}

impl HealthRecord {
    /// A record without observations.
    pub(crate) fn new(profile: HealthProfile, now: Timestamp) -> Self {
        Self {
            profile,
            state: State::Unknown,
            rule: Rule::NotProbed,
            detail: "not probed yet".into(),
            since: now,
            votes: Votes::default(),
            signs: Signs::default(),
            requests: Requests::default(),
            gateways: 0,
            on_trial: false,
            suspects: [None, None],
            cleared: BTreeMap::new(),
            passive_reporters: [None, None],
            passive_quiet: [Timestamp::ZERO; 2],
            damping: 0,
            damping_since: now,
            hold_until: Timestamp::ZERO,
            ejected_at: Timestamp::ZERO,
            refused: false,
            rechecked: [None, None],
            loading_since: None,
            has_served: false,
            stale: false,
            last_seen: now,
        }
    }

    /// Restores the state from before a restart of the control plane. The record is stale until the first probe.
    pub(crate) fn restore(&mut self, state: State, rule: Rule, detail: &str, damping: u32, now: Timestamp) {
        (self.state, self.rule, self.detail, self.since) = (state, rule, cut(detail).to_owned(), now);
        self.damping = damping;
        self.on_trial = rule == Rule::RequestsFail && state == State::Unhealthy;
        self.has_served = state != State::Unknown;
        self.stale = true;
    }

    pub(crate) const fn damping(&self) -> u32 {
        self.damping
    }

    /// Records one observation.
    pub(crate) fn observe(&mut self, observer: &Observer, seen: &Observation, now: Timestamp) {
        self.last_seen = now;
        self.signs.observe(seen, now);
        match (seen.tier, seen.outcome) {
            // The loading timeout starts with the first answer that says so.
            (_, Outcome::Loading) => {
                self.loading_since.get_or_insert(now);
            }
            (Tier::Readiness, outcome) if outcome.is_good() => self.loading_since = None,
            _ => {}
        }
        if seen.tier != Tier::Deep {
            let waits = seen.outcome == Outcome::Failed(Cause::Timeout)
                && self.requests.are_answered(seen.tier, self.gateways, now);
            let (outcome, detail) = match waits {
                true => (Outcome::Pass, format!("{}, behind requests that are answered", seen.detail)),
                false => (seen.outcome, seen.detail.clone()),
            };
            self.votes.cast(seen.tier, observer, outcome, &detail, now);
            if outcome.is_good() {
                self.cleared.remove(&(seen.tier, observer.clone()));
            }
        }
    }

    /// Records the results of a gateway's requests.
    pub(crate) fn requests(&mut self, observer: &Observer, passive: &Passive, now: Timestamp) {
        self.signs.requests(passive, now);
        self.requests.report(observer, passive, now);
        self.on_trial &= passive.successes == 0;
        let failures = passive.failures();
        if failures == 0 && passive.is_answered() {
            // A request that is answered proves more than a probe.
            self.last_seen = now;
            for tier in JUDGING {
                self.votes.cast(tier, observer, Outcome::Pass, "requests are answered", now);
                self.cleared.remove(&(tier, observer.clone()));
                if self.requests.are_answered(tier, self.gateways, now) {
                    self.votes.forgive_silence(tier);
                }
            }
            self.loading_since = None;
        }
        let broken = failures >= PASSIVE_FAILURES && passive.successes == 0;
        if broken || passive.ejected || (failures > 0 && self.signs.is_failing(now)) {
            // Whether the server can be reached is asked only where it did not answer, and whether the model answers unless
            // connections are the problem.
            let reached = passive.connect_failures * 2 <= failures;
            let answered = passive.server_errors * 2 > failures;
            self.passive_reporters =
                [(!answered).then(|| observer.clone()), reached.then(|| observer.clone())];
        }
    }

    /// Notes which observers were asked to probe.
    pub(crate) fn asked(&mut self, tier: Tier, observers: impl IntoIterator<Item = Observer>) {
        if let Some(suspect) = index(tier).and_then(|i| self.suspects[i].as_mut()) {
            suspect.asked.extend(observers);
        }
    }

    /// Evaluates all observations and returns the actions that follow.
    pub(crate) fn judge(&mut self, now: Timestamp, context: &Context<'_>) -> Vec<Action> {
        let mut actions = Vec::new();
        self.gateways = context.gateways;
        self.votes.expire(&self.profile, now);
        self.cleared.retain(|_, until| now < *until);
        self.decay_damping(now);
        if self.state == State::Unhealthy {
            self.suspects = [None, None];
            self.passive_reporters = [None, None];
            self.recover(now, context, &mut actions);
        } else {
            let failing = self.judge_requests(now, context, &mut actions);
            for (i, tier) in JUDGING.into_iter().enumerate() {
                if self.state != State::Unhealthy {
                    self.judge_suspect(i, tier, now, context, &mut actions);
                }
            }
            self.settle(failing, now, context, &mut actions);
        }
        let stale = self.votes.is_empty() && self.state != State::Unknown;
        if stale && !self.stale {
            actions.push(Action::Note {
                kind: EventKind::Stale,
                message: "no observer reports on the backend any more".into(),
            });
        }
        self.stale = stale;
        actions
    }

    /// Why it is in its present state, or suspect.
    pub(crate) fn reason(&self) -> String {
        let suspects = JUDGING.iter().zip(&self.suspects);
        let suspect = suspects.filter_map(|(tier, suspect)| Some((tier, suspect.as_ref()?))).next();
        match suspect {
            Some((tier, suspect)) => suspicion(*tier, &suspect.reporter, &suspect.why),
            None => self.detail.clone(),
        }
    }

    /// Whether the backend is healthy, degraded or in slow start.
    pub(crate) const fn is_usable(&self) -> bool {
        matches!(self.state, State::Healthy | State::Degraded | State::Recovering)
    }

    /// The share of the weight during a slow start, 0.1 to 1; 1 without one.
    pub(crate) fn ramp(&self, now: Timestamp) -> f64 {
        if self.state != State::Recovering {
            return 1.0;
        }
        let elapsed = now.saturating_sub(self.since).as_secs_f64();
        (elapsed / self.profile.slow_start.as_secs_f64()).clamp(RAMP_FLOOR, 1.0)
    }

    /// The earliest time of a recovery; `None` unless the backend is unhealthy.
    pub(crate) fn may_return(&self, now: Timestamp) -> Option<Timestamp> {
        (self.state == State::Unhealthy).then(|| self.hold_until.max(now))
    }

    /// Whether the observer was outvoted recently.
    pub(crate) fn is_cleared(&self, tier: Tier, observer: &Observer) -> bool {
        self.cleared.contains_key(&(tier, observer.clone()))
    }

    /// The conditions of the next change of the state, for people.
    pub(crate) fn conditions(&self, now: Timestamp, ready_capable: bool) -> Vec<String> {
        let mut conditions = Vec::new();
        match self.state {
            State::Unhealthy => {
                let hold = self.hold_until.saturating_sub(now);
                if !hold.is_zero() {
                    let text = format!(
                        "ejected {} times lately, so recovery is held back for {} s more",
                        self.damping,
                        hold.as_secs() + 1
                    );
                    conditions.push(text);
                }
                conditions.push(format!(
                    "{} consecutive liveness passes from {QUORUM} observers (or from the only one that reaches it)",
                    self.profile.healthy_threshold
                ));
                if ready_capable {
                    conditions.push("one readiness pass".into());
                }
            }
            State::Recovering => {
                let left = self.profile.slow_start.saturating_sub(now.saturating_sub(self.since));
                if self.on_trial {
                    conditions.push("one request that succeeds".into());
                    conditions.push("one that fails ejects the backend again".into());
                }
                if !left.is_zero() {
                    conditions.push(format!("slow start takes {} s more", left.as_secs() + 1));
                }
                conditions.push(format!("one failure at {QUORUM} observers ejects the backend again"));
            }
            State::Unknown if ready_capable => conditions.push("one readiness pass".into()),
            State::Unknown => conditions.push("one liveness pass".into()),
            State::Healthy | State::Degraded => {
                conditions.push(format!(
                    "{QUORUM} observers with {FAILURES_IN_A_ROW} failures each eject the backend, unless {QUORUM} others reach it"
                ));
            }
        }
        for (tier, suspect) in JUDGING.iter().zip(&self.suspects) {
            if let Some(suspect) = suspect {
                conditions.push(format!(
                    "suspect at {} because of {}; {} other observers were asked",
                    tier.name(),
                    suspect.reporter,
                    suspect.asked.len()
                ));
            }
        }
        conditions
    }

    /// When to evaluate again without a new observation.
    pub(crate) fn next(&self, now: Timestamp) -> Option<Timestamp> {
        let deadlines = self.suspects.iter().flatten().map(|s| s.deadline);
        let hold = (self.state == State::Unhealthy).then_some(self.hold_until);
        let ramp = (self.state == State::Recovering).then(|| self.since + self.profile.slow_start);
        deadlines.chain(hold).chain(ramp).filter(|at| *at > now).min()
    }

    fn become_(
        &mut self,
        state: State,
        rule: Rule,
        detail: String,
        now: Timestamp,
        actions: &mut Vec<Action>,
    ) {
        let detail = cut(&detail).to_owned();
        if state != self.state {
            let message = format!("{} -> {} by {}: {detail}", self.state.name(), state.name(), rule.name());
            actions.push(Action::Note { kind: EventKind::State, message });
            self.since = now;
            self.damping_since = now;
        }
        (self.state, self.rule, self.detail) = (state, rule, detail);
        self.has_served |= self.is_usable();
    }

    /// Ejects the backend.
    fn eject(
        &mut self,
        rule: Rule,
        detail: String,
        refused: bool,
        now: Timestamp,
        actions: &mut Vec<Action>,
    ) {
        let relapse = self.state == State::Recovering;
        self.on_trial |= rule == Rule::RequestsFail;
        let hold = match self.damping {
            n if self.on_trial => HOLD_REQUESTS.saturating_mul(1 << n.min(16)).min(HOLD_MAX),
            0 => Duration::ZERO,
            n => HOLD_FIRST.saturating_mul(1 << (n - 1).min(16)).min(HOLD_MAX),
        };
        self.damping = self.damping.saturating_add(1).min(16);
        (self.hold_until, self.ejected_at, self.refused) = (now + hold, now, refused);
        self.suspects = [None, None];
        self.passive_reporters = [None, None];
        self.rechecked = [None, None];
        let rule = if relapse { Rule::Relapse } else { rule };
        self.become_(State::Unhealthy, rule, detail, now, actions);
    }

    fn decay_damping(&mut self, now: Timestamp) {
        if self.is_usable()
            && !self.on_trial
            && self.damping > 0
            && now.saturating_sub(self.damping_since) >= HOLD_DECAY
        {
            self.damping -= 1;
            self.damping_since = now;
        }
    }

    /// Ejects the backend if every request fails. Gives what is known where that is too little to eject it.
    fn judge_requests(
        &mut self,
        now: Timestamp,
        context: &Context<'_>,
        actions: &mut Vec<Action>,
    ) -> Option<Failing> {
        let on_trial = self.on_trial && self.state == State::Recovering;
        let failing = match on_trial {
            true => self.requests.fail(1, 1, context, now)?,
            false => self.requests.fail(PASSIVE_FAILURES, QUORUM.min(context.gateways), context, now)?,
        };
        if self.is_usable() && failing.is_proven {
            self.eject(Rule::RequestsFail, failing.detail, false, now, actions);
            return None;
        }
        Some(failing)
    }

    /// Makes the backend suspect at one tier, ejects it, or clears it.
    fn judge_suspect(
        &mut self,
        i: usize,
        tier: Tier,
        now: Timestamp,
        context: &Context<'_>,
        actions: &mut Vec<Action>,
    ) {
        if self.suspects[i].is_none() {
            let Some((reporter, since, why)) = self.ground(tier, now, context) else { return };
            // An observer whose requests failed has not probed yet.
            let probes = self.votes.get(tier, &reporter).is_some_and(|vote| vote.failures > 0);
            let deadline = now + self.profile.timeout + CONFIRM_SLACK;
            let message = suspicion(tier, &reporter, &why);
            actions.push(Action::Note { kind: EventKind::Suspect, message });
            actions.push(Action::Ask { tier, reporter: probes.then(|| reporter.clone()) });
            let asked = if probes { BTreeSet::new() } else { [reporter.clone()].into() };
            self.suspects[i] = Some(Suspect { since, reporter, why, asked, deadline });
            // Evaluated when the answers arrive. Without any asked observer, all would seem to have answered.
            return;
        }
        let Some(suspect) = self.suspects[i].clone() else { return };
        let tally = self.votes.tally(tier, suspect.since, self.needed(), context, now);
        let answered = |observer: &Observer| {
            let vote = self.votes.get(tier, observer).filter(|vote| vote.at >= suspect.since);
            vote.is_some_and(|vote| vote.last.is_good() || vote.failures >= FAILURES_IN_A_ROW)
        };
        let late = now >= suspect.deadline;
        // Open votes: observers that have not answered, and observers that failed once and may still pass.
        let asked = &suspect.asked;
        let undecided = tally.undecided.iter().filter(|(observer, _)| !asked.contains(*observer)).count();
        let open = asked.iter().filter(|observer| !answered(observer)).count() + undecided;
        let settled = late || asked.iter().all(answered) || tally.ejects_despite(open);
        if settled && let Some(decision) = self.decide(tier, &tally) {
            match decision {
                Decision::Loading(detail) => {
                    self.suspects[i] = None;
                    self.become_(State::Unknown, Rule::Loading, detail, now, actions);
                }
                Decision::Unhealthy { rule, detail, refused } => {
                    self.eject(rule, detail, refused, now, actions);
                }
            }
        } else if settled && !tally.passing.is_empty() {
            let outvoted: Vec<Observer> =
                tally.failing.iter().chain(&tally.undecided).map(|(v, _)| (*v).clone()).collect();
            let others = tally.passing.len();
            self.suspects[i] = None;
            self.passive_quiet[i] = now + CLEARED_FOR;
            for observer in &outvoted {
                let message =
                    format!("{} fails for {observer} alone and passes for {others} others", tier.name());
                actions.push(Action::Note { kind: EventKind::SuspectCleared, message });
                self.cleared.insert((tier, observer.clone()), now + CLEARED_FOR);
            }
        } else if late && tally.voters() == 0 {
            // Without any vote there is no evidence.
            self.suspects[i] = None;
        } else if late {
            let deadline = now + self.profile.timeout + CONFIRM_SLACK;
            if let Some(suspect) = &mut self.suspects[i] {
                suspect.deadline = deadline;
            }
            actions.push(Action::Ask { tier, reporter: None });
        }
    }

    /// A reason to suspect the backend: the observer, the time and the detail.
    fn ground(
        &mut self,
        tier: Tier,
        now: Timestamp,
        context: &Context<'_>,
    ) -> Option<(Observer, Timestamp, String)> {
        // While a backend loads, a loading answer does not make it suspect again.
        let quiet = self.rule == Rule::Loading && !self.loading_too_long(now);
        let failing = self
            .votes
            .counted(tier, context, now)
            .filter(|(_, vote)| !(vote.last.is_good() || quiet && vote.last == Outcome::Loading))
            .find(|(observer, _)| !self.cleared.contains_key(&(tier, (*observer).clone())))
            .map(|(observer, vote)| (observer.clone(), vote.at, vote.detail.clone()));
        let passive_reporters = index(tier).and_then(|i| self.passive_reporters[i].take());
        failing.or_else(|| {
            let observer = passive_reporters?;
            // Where requests are judged themselves, probes would tell nothing.
            if self.rule == Rule::RequestsFail
                || index(tier).is_some_and(|i| now < self.passive_quiet[i])
                || context.isolated.contains(&observer, now)
                || self.cleared.contains_key(&(tier, observer.clone()))
            {
                return None;
            }
            Some((observer, now, "its requests fail".into()))
        })
    }

    /// Consecutive failures that count against the backend; one is enough during a slow start.
    const fn needed(&self) -> u32 {
        if matches!(self.state, State::Recovering) { 1 } else { FAILURES_IN_A_ROW }
    }

    fn loading_too_long(&self, now: Timestamp) -> bool {
        self.loading_since.is_some_and(|at| now.saturating_sub(at) >= self.profile.loading_timeout)
    }

    fn decide(&self, tier: Tier, tally: &Tally<'_>) -> Option<Decision> {
        let wrong =
            |cause| move |(_, vote): &&(_, &super::evidence::Vote)| vote.last == Outcome::Failed(cause);
        let failing = || tally.failing.iter().chain(&tally.undecided);
        let quota = failing().filter(|f| wrong(Cause::QuotaUsedUp)(f)).count();
        // The server itself says that the model is missing or the account is empty, so one failure per observer is enough.
        let told = failing().filter(|f| wrong(Cause::WrongModel)(f)).count() + quota;
        let told = told >= QUORUM && told > tally.passing.len() && tally.passing.len() < QUORUM;
        let alone = tally.voters() == 1
            && failing()
                .any(|(_, vote)| vote.failures >= self.profile.unhealthy_threshold.max(self.needed()));
        if !(tally.ejects() || told || alone) {
            return None;
        }
        let details: Vec<String> =
            failing().take(3).map(|(v, vote)| format!("{v}: {}", short(&vote.detail))).collect();
        let detail = details.join("; ");
        let loading =
            failing().filter(|(_, vote)| vote.last == Outcome::Loading).count() * 2 > failing().count();
        let newest = failing().map(|(_, vote)| vote.at).max().unwrap_or_default();
        let too_long = self.loading_too_long(newest);
        if loading && !too_long {
            return Some(Decision::Loading(detail));
        }
        let rule = match (tier, alone) {
            _ if loading => Rule::LoadingTooLong,
            _ if quota * 2 > failing().count() => Rule::QuotaUsedUp,
            (Tier::Liveness, false) => Rule::LivenessQuorum,
            (Tier::Liveness, true) => Rule::LivenessAlone,
            (_, false) => Rule::ReadinessQuorum,
            (_, true) => Rule::ReadinessAlone,
        };
        let refused = failing().all(|f| wrong(Cause::Refused)(&f));
        Some(Decision::Unhealthy { rule, detail, refused })
    }

    /// Changes of the state without an ejection: first passes, the end of a slow start, degradations.
    fn settle(
        &mut self,
        failing: Option<Failing>,
        now: Timestamp,
        context: &Context<'_>,
        actions: &mut Vec<Action>,
    ) {
        match self.state {
            State::Unknown => {
                let tier = if context.ready_capable { Tier::Readiness } else { Tier::Liveness };
                // Probes from before the state became unknown do not count.
                let since = self.since;
                let pass = self
                    .votes
                    .counted(tier, context, now)
                    .find(|(_, vote)| vote.last.is_good() && vote.at >= since);
                if let Some((observer, _)) = pass {
                    let detail = format!("{} passed for {observer}", tier.name());
                    if self.has_served {
                        self.become_(State::Recovering, Rule::Recovery, detail, now, actions);
                    } else {
                        self.become_(State::Healthy, Rule::FirstPass, detail, now, actions);
                    }
                } else if self.rule == Rule::NotProbed && self.loading_since.is_some() {
                    (self.rule, self.detail) = (Rule::Loading, "the backend says that it is loading".into());
                }
            }
            State::Recovering if now.saturating_sub(self.since) >= self.profile.slow_start => {
                if self.on_trial {
                    self.detail = "the slow start is over, and no request has told yet".into();
                    return;
                }
                self.become_(
                    State::Healthy,
                    Rule::SlowStartDone,
                    "the slow start is over".into(),
                    now,
                    actions,
                );
            }
            State::Healthy | State::Degraded => match failing
                .map(|failing| (Rule::RequestsFail, failing.detail))
                .or_else(|| self.signs.degrade(now))
            {
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

    /// Recovery: a quorum of observers (or all of them, if fewer) reaches the backend, one readiness probe passes, and the
    /// hold-down time is over.
    fn recover(&mut self, now: Timestamp, context: &Context<'_>, actions: &mut Vec<Action>) {
        let fell = self.ejected_at;
        let live: Vec<(&Observer, u32)> = self
            .votes
            .counted(Tier::Liveness, context, now)
            .filter(|(_, vote)| vote.at > fell && vote.last.is_good())
            .map(|(observer, vote)| (observer, vote.passes))
            .collect();
        let able = self.votes.counted(Tier::Liveness, context, now).count();
        let enough = live.iter().filter(|(_, passes)| *passes >= self.profile.healthy_threshold).count();
        let reached = enough >= QUORUM.min(able).max(1);
        let ready = !context.ready_capable
            || self
                .votes
                .counted(Tier::Readiness, context, now)
                .any(|(_, vote)| vote.at > fell && vote.last.is_good());
        let (reached_once, by_liveness) =
            (!live.is_empty(), matches!(self.rule, Rule::LivenessQuorum | Rule::LivenessAlone));
        self.detail_of_now(context, now);
        if now < self.hold_until {
            return;
        }
        if reached && ready {
            let detail = match self.on_trial {
                true => format!("tried again after {}", self.detail),
                false => format!("{enough} observers reach the backend and it answers again"),
            };
            self.requests.begin_anew();
            self.become_(State::Recovering, Rule::Recovery, detail, now, actions);
            return;
        }
        // Observers that have not probed since are told to probe now, to save an interval. A backend that was ejected by
        // readiness waits for its regular probe, which costs tokens.
        let due = |at: Option<Timestamp>| at.is_none_or(|at| now.saturating_sub(at) >= RECHECK);
        if reached_once && !reached && due(self.rechecked[0]) {
            self.rechecked[0] = Some(now);
            actions.push(Action::Ask { tier: Tier::Liveness, reporter: None });
        }
        let soon = by_liveness || self.rule == Rule::Relapse && !self.on_trial;
        if reached && !ready && soon && due(self.rechecked[1]) {
            self.rechecked[1] = Some(now);
            actions.push(Action::Ask { tier: Tier::Readiness, reporter: None });
        }
    }

    /// What keeps an unhealthy backend out may become another thing than what ejected it.
    fn detail_of_now(&mut self, context: &Context<'_>, now: Timestamp) {
        let fell = self.ejected_at;
        let failing = JUDGING.into_iter().find_map(|tier| {
            let votes = self.votes.counted(tier, context, now);
            let failing = votes.filter(|(_, vote)| vote.at > fell && !vote.last.is_good());
            let said: Vec<String> = failing
                .take(3)
                .map(|(observer, vote)| format!("{observer}: {}", short(&vote.detail)))
                .collect();
            (!said.is_empty()).then(|| format!("{} fails: {}", tier.name(), said.join("; ")))
        });
        if let Some(failing) = failing {
            self.detail = cut(&failing).to_owned();
        }
    }
}

/// Why a backend is suspect.
fn suspicion(tier: Tier, reporter: &Observer, why: &str) -> String {
    format!("{} fails for {reporter}: {why}; others are asked", tier.name())
}

/// The result of a tally.
enum Decision {
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
