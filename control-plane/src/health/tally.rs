//! Counting votes: which observers see a backend fail, which see it pass, and whether that ejects it.

use std::collections::BTreeMap;

use super::evidence::{Observer, Outcome, Timestamp, Vote};
use super::isolation::IsolatedObservers;
use super::params::{EXPIRY_INTERVALS, EXPIRY_MIN, QUORUM, VOTES_MAX};
use super::tier::Tier;
use weir_proto::resource::HealthProfile;

/// What is known of the cluster when one backend is judged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    /// The observers without a vote.
    pub(crate) isolated: &'a IsolatedObservers,
    /// Whether any observer can ask for completions.
    pub(crate) ready_capable: bool,
}

/// The votes on one backend.
#[derive(Debug, Clone, Default)]
pub(crate) struct Votes {
    by: BTreeMap<(Tier, Observer), Vote>,
    /// Those that reached it at least once, by any tier.
    reached: BTreeMap<Observer, Timestamp>,
}

/// The votes at one tier since some time, each observer once.
#[derive(Debug, Default)]
pub(crate) struct Tally<'a> {
    /// Failed often enough in a row.
    pub(crate) failing: Vec<(&'a Observer, &'a Vote)>,
    /// Failed, but not yet often enough.
    pub(crate) undecided: Vec<(&'a Observer, &'a Vote)>,
    /// Passed.
    pub(crate) passing: Vec<&'a Observer>,
}

impl Tally<'_> {
    pub(crate) fn voters(&self) -> usize {
        self.failing.len() + self.undecided.len() + self.passing.len()
    }

    /// Enough observers agree, more than object, and fewer than a quorum object.
    pub(crate) fn ejects(&self) -> bool {
        self.ejects_despite(0)
    }

    /// The same, even if so many more should object: they need not be waited for.
    pub(crate) fn ejects_despite(&self, open: usize) -> bool {
        let (failing, passing) = (self.failing.len(), self.passing.len() + open);
        failing >= QUORUM && failing > passing && passing < QUORUM
    }
}

impl Votes {
    /// Counts one probe.
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

    /// Forgets votes that have expired, and with the last vote of an observer that it ever got through.
    pub(crate) fn expire(&mut self, profile: &HealthProfile, now: Timestamp) {
        self.by.retain(|(tier, _), vote| now.saturating_sub(vote.at) <= expiry(profile, *tier));
        let by = &self.by;
        self.reached.retain(|observer, _| by.keys().any(|(_, voter)| voter == observer));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by.is_empty()
    }

    /// Every vote, for explanations.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Tier, &Observer, &Vote)> {
        self.by.iter().map(|((tier, observer), vote)| (*tier, observer, vote))
    }

    pub(crate) fn get(&self, tier: Tier, observer: &Observer) -> Option<&Vote> {
        self.by.get(&(tier, observer.clone()))
    }

    /// Votes of one tier that count: of observers that are believed, and that can reach the backend if anybody can.
    /// An observer without a way to it (a firewall, another network) would otherwise vote against it for ever.
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

    /// Whether an observer can reach the backend, as far as anybody can.
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
    interval(profile, tier).saturating_mul(EXPIRY_INTERVALS).max(EXPIRY_MIN)
}

/// The time between two probes of one observer.
pub(crate) const fn interval(profile: &HealthProfile, tier: Tier) -> std::time::Duration {
    match tier {
        Tier::Liveness => profile.liveness_interval,
        Tier::Readiness => profile.readiness_interval,
        Tier::Deep => profile.deep_interval,
    }
}
