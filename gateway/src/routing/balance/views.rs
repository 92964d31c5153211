//! The backends of a model as they were at one time, arranged so that a choice does not look at all of them again.
//!
//! A pool of many backends is looked at once for many choices: after as many choices as it takes for the work of a look to be
//! spread over them, and after [`AGE_MAX`] at the latest. What is arranged is shares, and these may be that old. What decides
//! whether a backend may be used is asked of each chosen backend at the time of the choice.

use std::time::Duration;

use tokio::time::Instant;

use super::affinity::Loads;
use super::policy::{ChooseConfig, FEW, Policy, served};
use super::schedule::{Entries, Scheduler, Urn};
use super::speed::Speeds;
use super::weight::{Usability, View};

/// Views are not used for longer. Short beside the time between two reports of what other gateways have in flight, and as
/// long as that between two computations of speeds.
pub(super) const AGE_MAX: Duration = Duration::from_millis(100);

/// The views of a model's backends, arranged for choices.
#[derive(Debug, Default)]
pub struct Views {
    pub(super) all: Vec<View>,
    pub(super) ranks: Vec<Rank>,
    /// For what they are arranged; `None` before that.
    made: Option<(ChooseConfig, Instant)>,
    /// The choices that may still be made with them.
    left: usize,
    entries: Vec<(u64, f64)>,
}

/// Backends of one rank that may be chosen.
#[derive(Debug, Default)]
pub(super) struct Rank {
    /// Indices into the views.
    pub(super) members: Vec<usize>,
    /// The share of requests that it serves. See [`served`].
    pub(super) served: f64,
    pub(super) entries: Entries,
    pub(super) urn: Urn,
    pub(super) loads: Loads,
    /// Ids and weights.
    pub(super) keys: Vec<(u64, f64)>,
}

impl Views {
    /// Takes one choice out of them, if they are still good for one under this configuration.
    pub(super) fn take(&mut self, config: &ChooseConfig, now: Instant) -> bool {
        let fresh = self.made.is_some_and(|(of, made)| {
            of == *config && now.saturating_duration_since(made) <= AGE_MAX && self.left > 0
        });
        self.left = if fresh { self.left - 1 } else { 0 };
        fresh
    }

    /// They are not used again: what was chosen by them was full.
    pub fn expire(&mut self) {
        self.left = 0;
    }

    /// Arranges these views.
    pub(super) fn arrange(
        &mut self,
        config: &ChooseConfig,
        views: impl IntoIterator<Item = View>,
        (scheduler, speeds): (&mut Scheduler<u64>, &Speeds),
        now: Instant,
        mut uniform: impl FnMut() -> f64,
    ) {
        self.all.clear();
        self.all.extend(views);
        self.made = Some((*config, now));
        self.left = (self.all.len() / FEW).max(1);
        let healthy = self.all.iter().any(|view| view.usability == Usability::Healthy);
        let may_be_used = |view: &View| !healthy || view.usability == Usability::Healthy;
        let mut ranks: Vec<u32> = self.all.iter().filter(|v| may_be_used(v)).map(|view| view.rank).collect();
        ranks.sort_unstable();
        ranks.dedup();
        self.ranks.resize_with(ranks.len(), Rank::default);
        for (number, rank) in ranks.iter().zip(&mut self.ranks) {
            rank.members.clear();
            let of = |(_, view): &(usize, &View)| view.rank == *number && may_be_used(view);
            rank.members.extend(self.all.iter().enumerate().filter(of).map(|(index, _)| index));
            let members = || rank.members.iter().map(|&index| &self.all[index]);
            match config.policy {
                Policy::RoundRobin => {}
                Policy::Random => rank.urn.refill(members().map(|_| 1.0)),
                Policy::LeastRequest => {
                    rank.urn.refill(members().map(|view| view.capacity() * speeds.factor(view.id)));
                }
                Policy::WeightedRoundRobin | Policy::PrefixAffinity { .. } => {
                    self.entries.clear();
                    let effective = |view: &View| (view.id, view.effective(speeds.factor(view.id)).value());
                    self.entries.extend(members().map(effective));
                    scheduler.prepare(&self.entries, &mut rank.entries, &mut uniform);
                }
            }
            if let Policy::PrefixAffinity { .. } = config.policy {
                rank.loads = Loads::of(members());
                rank.keys.clear();
                rank.keys.extend(rank.members.iter().map(|&i| (self.all[i].id, self.all[i].weight)));
            }
        }
        let members = |rank: &Rank| rank.members.iter().map(|&i| self.all[i].capacity()).sum::<f64>();
        let capacities: Vec<(u32, f64)> =
            ranks.iter().zip(&self.ranks).map(|(number, rank)| (*number, members(rank))).collect();
        for (rank, share) in self.ranks.iter_mut().zip(served(config, &self.all, &capacities)) {
            rank.served = share;
        }
    }
}
