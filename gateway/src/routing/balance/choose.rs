//! Orders the backends of a pool for one request, by the pool's policy.
//!
//! Invariants:
//! - No policy picks the best backend by shared data that may be stale. Policies spread (round-robin) or sample (two
//!   choices), so that gateways with the same data do not all choose the same backend.
//! - Backends of a lower rank (a nearer region, a higher priority) come first. The next rank serves the share of requests
//!   that the first rank cannot serve, and the requests that find no free slot there.
//! - Most requests need few candidates ([`Balancer::few`]): the first of the order, by arranged views. The others
//!   ([`Balancer::rest`]) are for requests that find no free slot at these.
//! - A slow start holds slots back from requests that find one elsewhere, and from no others.
//! - Unhealthy backends come after all healthy ones, and only in panic mode: when too little of the pool is healthy. Slots
//!   are hard limits, so healthy backends are not flooded: unhealthy backends get the requests that find no free slot.

use smallvec::SmallVec;
use tokio::time::Instant;
use weir_ratelimit::Bound;

use super::hedge_delay::HedgeDelays;
use super::policy::{ChooseConfig, FEW, Policy, served};
use super::schedule::Scheduler;
use super::speed::{Sample, Speeds};
use super::views::{Rank, Views};
use super::weight::{Effective, Usability, View};
use super::{affinity, schedule};

/// A backend in the order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Index of the view.
    pub index: usize,
    /// The backend's slots in the whole cluster.
    pub slots: u32,
    /// An additional bound, relative to the load of all candidates.
    pub bound: Option<Bound>,
}

/// Candidates in order of preference. A backend can occur more than once, first with fewer slots or a bound.
pub type Candidates = SmallVec<[Candidate; 8]>;

/// The balancing state of one model.
#[derive(Debug, Default)]
pub struct Balancer {
    scheduler: Scheduler<u64>,
    cursor: Option<u64>,
    /// The speeds of the backends.
    pub speeds: Speeds,
    /// The hedge delays of the backends.
    pub hedge_delays: HedgeDelays,
}

impl Balancer {
    /// The candidates in order. `prefix` is the [`affinity::prefix_hash`] of the request; `uniform` returns random numbers
    /// of `[0, 1)`.
    pub fn order(
        &mut self,
        config: &ChooseConfig,
        views: &[View],
        prefix: Option<u64>,
        now: Instant,
        mut uniform: impl FnMut() -> f64,
    ) -> Candidates {
        self.speeds.refresh(now);
        let choice = Choice { config, views, prefix, after: None };
        self.whole(&choice, &mut uniform)
    }

    /// The first candidates of the order, [`FEW`] at most, and of one rank: all that most requests need. `look` is the view of
    /// a backend as of now. `views` are arranged anew from `look` if they are too old; there are `len` of them.
    pub fn few(
        &mut self,
        config: &ChooseConfig,
        views: &mut Views,
        prefix: Option<u64>,
        (len, look): (usize, impl Fn(usize) -> View),
        now: Instant,
        mut uniform: impl FnMut() -> f64,
    ) -> Candidates {
        self.speeds.refresh(now);
        if views.take(config, now)
            && let Some(candidates) = self.first(config, views, prefix, &look, &mut uniform)
        {
            return candidates;
        }
        let state = (&mut self.scheduler, &self.speeds);
        views.arrange(config, (0..len).map(&look), state, now, &mut uniform);
        self.first(config, views, prefix, &look, &mut uniform).unwrap_or_default()
    }

    /// The candidates after these first `few`, which have no free slot.
    pub fn rest(
        &mut self,
        config: &ChooseConfig,
        views: &[View],
        prefix: Option<u64>,
        few: &[Candidate],
        mut uniform: impl FnMut() -> f64,
    ) -> Candidates {
        let mut rest = self.whole(&Choice { config, views, prefix, after: Some(few) }, &mut uniform);
        rest.retain(|candidate| {
            !few.iter().any(|known| {
                known.index == candidate.index
                    && known.bound.is_some() == candidate.bound.is_some()
                    && known.slots >= candidate.slots
            })
        });
        rest
    }

    /// The effective weights behind the choice.
    pub fn effective(&self, view: &View) -> Effective {
        view.effective(self.speeds.factor(view.id))
    }

    /// Charges `used` instead of `picked`, which had no free slot, so that the shares follow the real use.
    pub fn reassign(&mut self, picked: u64, used: u64) {
        self.scheduler.reassign(&picked, &used);
    }

    /// Adds the measured speed of a successful answer.
    pub fn add(&mut self, id: u64, sample: &Sample, now: Instant) {
        self.speeds.add(id, sample, now);
    }

    /// Removes deleted backends.
    pub fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        self.scheduler.retain(|id| keep(*id));
        self.speeds.retain(&keep);
        self.hedge_delays.retain(&keep);
    }

    fn whole(&mut self, choice: &Choice<'_>, uniform: &mut impl FnMut() -> f64) -> Candidates {
        let Choice { config, views, .. } = *choice;
        let (healthy, unhealthy): (Indices, Indices) =
            (0..views.len()).partition(|&i| views[i].usability == Usability::Healthy);
        if healthy.is_empty() {
            return self.by_rank(choice, &unhealthy, uniform);
        }
        let mut candidates = self.by_rank(choice, &healthy, uniform);
        let held_back = healthy.iter().filter(|&&i| views[i].held_back > 0);
        candidates.extend(held_back.map(|&index| Candidate {
            index,
            slots: views[index].max_concurrency.saturating_add(views[index].held_back),
            bound: None,
        }));
        if is_panic(config, views) {
            let mut rest = by_weight(views, &unhealthy, uniform);
            rest.sort_by_key(|&i| views[i].rank);
            candidates.extend(rest.into_iter().map(|i| all_slots(views, i)));
        }
        candidates
    }

    fn by_rank(
        &mut self,
        choice: &Choice<'_>,
        members: &[usize],
        uniform: &mut impl FnMut() -> f64,
    ) -> Candidates {
        let views = choice.views;
        let mut ranks: SmallVec<[u32; 4]> = members.iter().map(|&i| views[i].rank).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let of = |rank: u32| members.iter().copied().filter(move |&i| views[i].rank == rank);
        let first = choice.rank().filter(|rank| ranks.contains(rank)).or_else(|| {
            let capacity = |rank: u32| (rank, of(rank).map(|i| views[i].capacity()).sum());
            let capacities: SmallVec<[(u32, f64); 4]> = ranks.iter().map(|rank| capacity(*rank)).collect();
            let shares: SmallVec<[f64; 4]> = served(choice.config, views, &capacities).collect();
            ranks.get(draw_rank(&shares, uniform)).copied()
        });
        let Some(first) = first else { return Candidates::new() };
        let near: Indices = of(first).collect();
        let mut candidates = self.by_policy(choice, &near, uniform);
        for rank in ranks.into_iter().filter(|rank| *rank != first) {
            let far: Indices = of(rank).collect();
            let far = by_weight(views, &far, uniform);
            candidates.extend(far.into_iter().map(|i| all_slots(views, i)));
        }
        candidates
    }

    /// Orders backends of one rank.
    fn by_policy(
        &mut self,
        choice: &Choice<'_>,
        members: &[usize],
        uniform: &mut impl FnMut() -> f64,
    ) -> Candidates {
        let Choice { config, views, prefix, after } = *choice;
        let order = match config.policy {
            Policy::RoundRobin => {
                schedule::round_robin(members.len(), self.cursor(after.is_none(), uniform)).collect()
            }
            Policy::Random => schedule::random(members.iter().map(|_| 1.0), uniform),
            Policy::LeastRequest => {
                // The score contains the load. With load in the draw too, a backend that is idle because it fails would win.
                let drawn = members.iter().map(|&i| views[i].capacity() * self.speeds.factor(views[i].id));
                let mut order = schedule::random(drawn, uniform);
                self.less_loaded_first(&mut order, |at| views[members[at]]);
                order
            }
            Policy::WeightedRoundRobin | Policy::PrefixAffinity { .. } => {
                let effective = |view: &View| (view.id, self.effective(view).value());
                let entries: SmallVec<[(u64, f64); 8]> =
                    members.iter().map(|i| effective(&views[*i])).collect();
                match after {
                    None => self.scheduler.order(&entries, uniform),
                    Some(_) => self.scheduler.peek(&entries),
                }
            }
        };
        let open = order.into_iter().map(|at| all_slots(views, members[at]));
        let (Policy::PrefixAffinity { bound }, Some(prefix)) = (config.policy, prefix) else {
            return open.collect();
        };
        let near: SmallVec<[View; 8]> = members.iter().map(|&i| views[i]).collect();
        let loads = affinity::Loads::of(&near);
        let preferred = affinity::rendezvous(prefix, &near);
        // First every backend within its bound, which the limiter enforces exactly; then every backend with a free slot.
        let bound = preferred.into_iter().map(|at| {
            let open = all_slots(views, members[at]);
            Candidate { bound: Some(loads.bound(&near[at], bound)), ..open }
        });
        bound.chain(open).collect()
    }

    /// The first candidates by arranged views; `None` if these are not true any more.
    fn first(
        &mut self,
        config: &ChooseConfig,
        views: &Views,
        prefix: Option<u64>,
        look: &impl Fn(usize) -> View,
        uniform: &mut impl FnMut() -> f64,
    ) -> Option<Candidates> {
        let rank = match &views.ranks[..] {
            [] => return Some(Candidates::new()),
            [only] => only,
            ranks => {
                let shares: SmallVec<[f64; 4]> = ranks.iter().map(|rank| rank.served).collect();
                &ranks[draw_rank(&shares, uniform)]
            }
        };
        let most = FEW.min(rank.members.len());
        let (order, bound) = match (config.policy, prefix) {
            (Policy::PrefixAffinity { bound }, Some(prefix)) => {
                (affinity::first_rendezvous(prefix, rank.keys.iter().copied(), most), Some(bound))
            }
            _ => (self.first_of(config, rank, look, uniform)?, None),
        };
        let elsewhere =
            bound.map_or(0, |_| rank.loads.except(order.iter().map(|at| &views.all[rank.members[*at]])));
        let candidate = |at: usize| {
            let index = rank.members[at];
            let now = look(index);
            let bound = bound.map(|bound| Bound { elsewhere, ..rank.loads.bound(&now, bound) });
            let known = now.usability == views.all[index].usability;
            known.then_some(Candidate { index, slots: now.max_concurrency, bound })
        };
        order.into_iter().map(candidate).collect()
    }

    /// The first of a rank by the policy, without a prefix.
    fn first_of(
        &mut self,
        config: &ChooseConfig,
        rank: &Rank,
        look: &impl Fn(usize) -> View,
        uniform: &mut impl FnMut() -> f64,
    ) -> Option<schedule::Order> {
        let most = FEW.min(rank.members.len());
        match config.policy {
            Policy::RoundRobin => {
                let cursor = self.cursor(true, uniform);
                Some(schedule::round_robin(rank.members.len(), cursor).take(most).collect())
            }
            Policy::Random => Some(rank.urn.draw(most, uniform)),
            Policy::LeastRequest => {
                let mut order = rank.urn.draw(most, uniform);
                self.less_loaded_first(&mut order, |at| look(rank.members[at]));
                Some(order)
            }
            Policy::WeightedRoundRobin | Policy::PrefixAffinity { .. } => {
                self.scheduler.first(&rank.entries, most)
            }
        }
    }

    /// The count of picks in turn, with this one if it is one.
    fn cursor(&mut self, pick: bool, uniform: &mut impl FnMut() -> f64) -> u64 {
        let start = || (uniform() * f64::from(u32::MAX)) as u64;
        let cursor = self.cursor.map_or_else(start, |cursor| cursor.wrapping_add(u64::from(pick)));
        self.cursor = Some(cursor);
        cursor
    }

    /// Puts the less loaded of the first two first.
    fn less_loaded_first(&self, order: &mut [usize], view: impl Fn(usize) -> View) {
        let [first, second, ..] = order else { return };
        let (one, two) = (view(*first), view(*second));
        let score = |view: &View| {
            let load = f64::from(view.local) + view.in_flight + 1.0;
            let speed = self.speeds.factor(view.id);
            load / (view.capacity() * speed).max(f64::MIN_POSITIVE)
        };
        // With nothing in flight no backend is less loaded. A choice by speed alone would never choose the slowest
        // backend, nor notice that it became faster. So the draw decides, whose weights include the speed.
        let busy = |view: &View| view.local > 0 || view.in_flight > 0.0;
        if (busy(&one) || busy(&two)) && score(&two) < score(&one) {
            std::mem::swap(first, second);
        }
    }
}

/// What an order is made of.
struct Choice<'a> {
    config: &'a ChooseConfig,
    views: &'a [View],
    prefix: Option<u64>,
    /// The candidates that were chosen first, if the order is what comes after them: then it is no further pick.
    after: Option<&'a [Candidate]>,
}

impl Choice<'_> {
    /// The rank that was chosen.
    fn rank(&self) -> Option<u32> {
        self.after?.first().map(|first| self.views[first.index].rank)
    }
}

type Indices = SmallVec<[usize; 8]>;

fn all_slots(views: &[View], index: usize) -> Candidate {
    Candidate { index, slots: views[index].max_concurrency, bound: None }
}

fn by_weight(views: &[View], members: &[usize], uniform: &mut impl FnMut() -> f64) -> Indices {
    let weights = members.iter().map(|&i| views[i].capacity() * views[i].load_factor());
    schedule::random(weights, uniform).into_iter().map(|at| members[at]).collect()
}

/// Panic mode: too little of the weight is healthy to leave out unhealthy backends.
pub fn is_panic(config: &ChooseConfig, views: &[View]) -> bool {
    let all: f64 = views.iter().map(|view| view.weight).sum();
    let healthy: f64 = views.iter().filter(|v| v.usability == Usability::Healthy).map(|v| v.weight).sum();
    healthy < config.panic * all
        || (views.iter().all(|v| v.usability == Usability::Unhealthy) && !views.is_empty())
}

/// The position of the rank that serves this request, given their shares.
fn draw_rank(shares: &[f64], uniform: &mut impl FnMut() -> f64) -> usize {
    if shares.len() < 2 {
        return 0;
    }
    // The share that exceeds the healthy weight of all ranks is spread like the rest.
    let mut point = if shares[0] >= 1.0 { 0.0 } else { uniform() * shares.iter().sum::<f64>() };
    let picked = shares.iter().position(|share| {
        point -= share;
        point < 0.0
    });
    picked.unwrap_or(0)
}

#[cfg(test)]
mod few_tests;
#[cfg(test)]
mod tests;
