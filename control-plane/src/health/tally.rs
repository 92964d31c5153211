//! Counting votes: who accuses, who dissents, and what that amounts to.

use std::collections::BTreeMap;

use super::evidence::{Moment, Outcome, Vantage, Vote};
use super::observer::Observers;
use super::params::{EXPIRY_INTERVALS, EXPIRY_MIN, QUORUM, VOTES_MAX};
use super::tier::Tier;
use weir_proto::resource::HealthProfile;

/// What the judge of one backend is told about the rest of the cluster.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    /// Who has a vote.
    pub(crate) observers: &'a Observers,
    /// Somebody is there who can ask for completions.
    pub(crate) ready_capable: bool,
}

/// The votes on one backend.
#[derive(Debug, Clone, Default)]
pub(crate) struct Votes {
    by: BTreeMap<(Tier, Vantage), Vote>,
    /// Those that reached it at least once, by any tier.
    reached: BTreeMap<Vantage, Moment>,
}

/// The votes at one tier since some moment, each vantage point once.
#[derive(Debug, Default)]
pub(crate) struct Tally<'a> {
    /// Failed often enough in a row.
    pub(crate) accusers: Vec<(&'a Vantage, &'a Vote)>,
    /// Failed, but not yet often enough.
    pub(crate) undecided: Vec<(&'a Vantage, &'a Vote)>,
    /// Saw it do its work.
    pub(crate) dissenters: Vec<&'a Vantage>,
}

impl Tally<'_> {
    pub(crate) fn voters(&self) -> usize {
        self.accusers.len() + self.undecided.len() + self.dissenters.len()
    }

    /// Enough vantage points agree, more than object, and fewer than a quorum object.
    pub(crate) fn condemns(&self) -> bool {
        self.condemns_whatever(0)
    }

    /// The same, even if so many more should object: they need not be waited for.
    pub(crate) fn condemns_whatever(&self, open: usize) -> bool {
        let (accusers, dissenters) = (self.accusers.len(), self.dissenters.len() + open);
        accusers >= QUORUM && accusers > dissenters && dissenters < QUORUM
    }
}

impl Votes {
    /// Takes one look in.
    pub(crate) fn cast(&mut self, tier: Tier, vantage: &Vantage, outcome: Outcome, detail: &str, at: Moment) {
        if outcome.is_good() {
            self.reached.insert(vantage.clone(), at);
        }
        let key = (tier, vantage.clone());
        let vote = Vote::after(self.by.get(&key), outcome, detail, at);
        if self.by.len() >= VOTES_MAX && !self.by.contains_key(&key) {
            let oldest = self.by.iter().min_by_key(|(_, vote)| vote.at).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                self.by.remove(&oldest);
            }
        }
        self.by.insert(key, vote);
    }

    /// Forgets votes that have expired, and with the last vote of a vantage point that it ever got through.
    pub(crate) fn expire(&mut self, profile: &HealthProfile, now: Moment) {
        self.by.retain(|(tier, _), vote| now.saturating_sub(vote.at) <= expiry(profile, *tier));
        let by = &self.by;
        self.reached.retain(|vantage, _| by.keys().any(|(_, voter)| voter == vantage));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by.is_empty()
    }

    /// Every vote, for explanations.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Tier, &Vantage, &Vote)> {
        self.by.iter().map(|((tier, vantage), vote)| (*tier, vantage, vote))
    }

    pub(crate) fn get(&self, tier: Tier, vantage: &Vantage) -> Option<&Vote> {
        self.by.get(&(tier, vantage.clone()))
    }

    /// Votes of one tier that count: of observers that are believed, and that can reach the backend if anybody can.
    /// A vantage point without a way to it (a firewall, another network) would otherwise accuse for ever.
    pub(crate) fn counted<'a>(
        &'a self,
        tier: Tier,
        context: &Context<'a>,
        now: Moment,
    ) -> impl Iterator<Item = (&'a Vantage, &'a Vote)> {
        let observers = context.observers;
        self.iter()
            .filter(move |(of, _, _)| *of == tier)
            .filter(move |(_, vantage, _)| !observers.is_isolated(vantage, now))
            .filter(move |(_, vantage, vote)| self.is_able(vantage, vote))
            .map(|(_, vantage, vote)| (vantage, vote))
    }

    /// Whether a vantage point can reach the backend, as far as anybody can.
    pub(crate) fn is_able(&self, vantage: &Vantage, vote: &Vote) -> bool {
        self.reached.is_empty() || vote.last.is_good() || self.reached.contains_key(vantage)
    }

    /// The votes cast since a moment.
    pub(crate) fn tally<'a>(
        &'a self,
        tier: Tier,
        since: Moment,
        needed: u32,
        context: &Context<'a>,
        now: Moment,
    ) -> Tally<'a> {
        let mut tally = Tally::default();
        for (vantage, vote) in self.counted(tier, context, now).filter(|(_, vote)| vote.at >= since) {
            if vote.last.is_good() {
                tally.dissenters.push(vantage);
            } else if vote.failures >= needed {
                tally.accusers.push((vantage, vote));
            } else {
                tally.undecided.push((vantage, vote));
            }
        }
        tally
    }
}

fn expiry(profile: &HealthProfile, tier: Tier) -> Moment {
    interval(profile, tier).saturating_mul(EXPIRY_INTERVALS).max(EXPIRY_MIN)
}

/// Between two looks of one vantage point.
pub(crate) const fn interval(profile: &HealthProfile, tier: Tier) -> std::time::Duration {
    match tier {
        Tier::Liveness => profile.liveness_interval,
        Tier::Readiness => profile.readiness_interval,
        Tier::Deep => profile.deep_interval,
    }
}
