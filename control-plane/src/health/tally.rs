//! Counts votes: for which observers a backend fails, for which it passes, and whether the result ejects it.

use std::collections::BTreeMap;

use super::evidence::{Cause, Observer, Outcome, Timestamp, Vote};
use super::isolation::IsolatedObservers;
use super::params::{QUORUM, VOTES_MAX};
use super::tier::Tier;
use weir_proto::resource::HealthProfile;

/// The state of the cluster that the evaluation of one backend needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    /// The isolated observers.
    pub(crate) isolated: &'a IsolatedObservers,
    /// Whether any observer makes readiness probes.
    pub(crate) ready_capable: bool,
    /// The gateways that there are.
    pub(crate) gateways: usize,
    /// Where requests to the backend go.
    pub(crate) endpoint: &'a str,
}

/// The votes on one backend.
#[derive(Debug, Clone, Default)]
pub(crate) struct Votes {
    /// At most [`VOTES_MAX`]; the oldest makes room. Sorted, so that a verdict does not depend on the order in which votes came.
    by: BTreeMap<(Tier, Observer), Vote>,
    /// The observers that reached the backend at least once, at any tier.
    reached: BTreeMap<Observer, Timestamp>,
}

/// The votes at one tier since a time, one per observer.
#[derive(Debug, Default)]
pub(crate) struct Tally<'a> {
    /// Observers with enough consecutive failures.
    pub(crate) failing: Vec<(&'a Observer, &'a Vote)>,
    /// Observers with fewer consecutive failures.
    pub(crate) undecided: Vec<(&'a Observer, &'a Vote)>,
    /// Observers whose last probe passed.
    pub(crate) passing: Vec<&'a Observer>,
}

impl Tally<'_> {
    pub(crate) fn voters(&self) -> usize {
        self.failing.len() + self.undecided.len() + self.passing.len()
    }

    /// Whether the failing observers are a quorum and more than the passing ones, which are fewer than a quorum.
    pub(crate) fn ejects(&self) -> bool {
        self.ejects_despite(0)
    }

    /// Whether the tally ejects even if `open` more observers pass, so that their answers need not be waited for.
    pub(crate) fn ejects_despite(&self, open: usize) -> bool {
        let (failing, passing) = (self.failing.len(), self.passing.len() + open);
        failing >= QUORUM && failing > passing && passing < QUORUM
    }
}

impl Votes {
    /// Records the result of one probe.
    pub(crate) fn cast(
        &mut self,
        tier: Tier,
        observer: &Observer,
        outcome: Outcome,
        detail: &str,
        at: Timestamp,
    ) {
        if outcome.is_good() {
            self.reached.insert(observer.clone(), at);
        }
        let key = (tier, observer.clone());
        let vote = Vote::after(self.by.get(&key), outcome, detail, at);
        if self.by.len() >= VOTES_MAX && !self.by.contains_key(&key) {
            let oldest = self.by.iter().min_by_key(|(_, vote)| vote.at).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                self.by.remove(&oldest);
            }
        }
        self.by.insert(key, vote);
    }

    /// Removes expired votes. An observer without any vote also no longer counts as having reached the backend.
    pub(crate) fn expire(&mut self, profile: &HealthProfile, now: Timestamp) {
        self.by.retain(|(tier, _), vote| now.saturating_sub(vote.at) <= expiry(profile, *tier));
        let by = &self.by;
        self.reached.retain(|observer, _| by.keys().any(|(_, voter)| voter == observer));
    }

    /// Takes back the votes that a tier gave no answer: somebody was answered since.
    pub(crate) fn forgive_silence(&mut self, tier: Tier) {
        self.by.retain(|(of, _), vote| *of != tier || vote.last != Outcome::Failed(Cause::Timeout));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by.is_empty()
    }

    /// Every vote.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Tier, &Observer, &Vote)> {
        self.by.iter().map(|((tier, observer), vote)| (*tier, observer, vote))
    }

    pub(crate) fn get(&self, tier: Tier, observer: &Observer) -> Option<&Vote> {
        self.by.get(&(tier, observer.clone()))
    }

    /// The votes of one tier that count. Votes of isolated observers do not count, nor those of observers that never reached
    /// the backend while others did: an observer behind a firewall would otherwise vote against it for ever.
    pub(crate) fn counted<'a>(
        &'a self,
        tier: Tier,
        context: &Context<'a>,
        now: Timestamp,
    ) -> impl Iterator<Item = (&'a Observer, &'a Vote)> {
        let isolated = context.isolated;
        self.iter()
            .filter(move |(of, _, _)| *of == tier)
            .filter(move |(_, observer, _)| !isolated.contains(observer, now))
            .filter(move |(_, observer, vote)| self.is_able(observer, vote))
            .map(|(_, observer, vote)| (observer, vote))
    }

    /// Whether the observer has reached the backend, or no observer has.
    pub(crate) fn is_able(&self, observer: &Observer, vote: &Vote) -> bool {
        self.reached.is_empty() || vote.last.is_good() || self.reached.contains_key(observer)
    }

    /// The votes cast since a time.
    pub(crate) fn tally<'a>(
        &'a self,
        tier: Tier,
        since: Timestamp,
        needed: u32,
        context: &Context<'a>,
        now: Timestamp,
    ) -> Tally<'a> {
        let mut tally = Tally::default();
        for (observer, vote) in self.counted(tier, context, now).filter(|(_, vote)| vote.at >= since) {
            if vote.last.is_good() {
                tally.passing.push(observer);
            } else if vote.failures >= needed {
                tally.failing.push((observer, vote));
            } else {
                tally.undecided.push((observer, vote));
            }
        }
        tally
    }
}

fn expiry(profile: &HealthProfile, tier: Tier) -> Timestamp {
    weir_probe::expiry(interval(profile, tier))
}

/// The time between two probes of one observer.
pub(crate) const fn interval(profile: &HealthProfile, tier: Tier) -> std::time::Duration {
    match tier {
        Tier::Liveness => profile.liveness_interval,
        Tier::Readiness => profile.readiness_interval,
        Tier::Deep => profile.deep_interval,
    }
}
