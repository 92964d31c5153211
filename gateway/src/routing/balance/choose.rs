//! Orders the backends of a pool for one request, by the pool's policy.
//!
//! Invariants:
//! - No policy picks the best backend by shared data that may be stale. Policies spread (round-robin) or sample (two
//!   choices), so that gateways with the same data do not all choose the same backend.
//! - Backends of a lower rank (a nearer region, a higher priority) come first. The next rank serves the share of requests
//!   that the first rank cannot serve, and the requests that find no free slot there.
//! - A slow start holds slots back from requests that find one elsewhere, and from no others.
//! - Unhealthy backends come after all healthy ones, and only in panic mode: when too little of the pool is healthy. Slots
//!   are hard limits, so healthy backends are not flooded: unhealthy backends get the requests that find no free slot.

use smallvec::SmallVec;
use tokio::time::Instant;
use weir_ratelimit::Bound;

use super::hedge_delay::HedgeDelays;
use super::schedule::Scheduler;
use super::speed::{Sample, Speeds};
use super::weight::{Effective, Usability, View};
use super::{affinity, schedule};

/// How to pick among backends of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Policy {
    /// Smooth weighted round-robin over effective weights.
    #[default]
    WeightedRoundRobin,
    /// In turn; ignores weights.
    RoundRobin,
    /// Random; ignores weights.
    Random,
    /// The less loaded of two random choices; the first one if both are idle.
    LeastRequest,
    /// By the prefix of the prompt, within a bound; weighted round-robin for a request without a prompt.
    PrefixAffinity {
        /// The maximum load of a backend because of prefixes, as a multiple of the mean load.
        bound: f64,
    },
}

/// The balancing settings of a pool.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChooseConfig {
    /// How to pick.
    pub policy: Policy,
    /// Panic threshold: unhealthy backends are used if less than this share of the weight is healthy.
    pub panic: f64,
    /// If the healthy share of a rank times this factor is below 1, the next rank serves the rest.
    pub overprovision: f64,
}

impl Default for ChooseConfig {
    fn default() -> Self {
        Self { policy: Policy::default(), panic: 0.5, overprovision: 1.4 }
    }
}

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
        let (healthy, unhealthy): (Indices, Indices) =
            (0..views.len()).partition(|&i| views[i].usability == Usability::Healthy);
        if healthy.is_empty() {
            return self.by_rank(config, views, &unhealthy, prefix, &mut uniform);
        }
        let mut candidates = self.by_rank(config, views, &healthy, prefix, &mut uniform);
        let held_back = healthy.iter().filter(|&&i| views[i].held_back > 0);
        candidates.extend(held_back.map(|&index| Candidate {
            index,
            slots: views[index].max_concurrency.saturating_add(views[index].held_back),
            bound: None,
        }));
        if is_panic(config, views) {
            let mut rest = by_weight(views, &unhealthy, &mut uniform);
            rest.sort_by_key(|&i| views[i].rank);
            candidates.extend(rest.into_iter().map(|i| all_slots(views, i)));
        }
        candidates
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

    fn by_rank(
        &mut self,
        config: &ChooseConfig,
        views: &[View],
        members: &[usize],
        prefix: Option<u64>,
        uniform: &mut impl FnMut() -> f64,
    ) -> Candidates {
        let mut ranks: SmallVec<[u32; 4]> = members.iter().map(|&i| views[i].rank).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let first = pick_rank(config, views, members, &ranks, uniform);
        let of = |rank: u32| members.iter().copied().filter(move |&i| views[i].rank == rank);
        let Some(first) = first else { return Candidates::new() };
        let near: Indices = of(first).collect();
        let mut candidates = self.by_policy(config, views, &near, prefix, uniform);
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
        config: &ChooseConfig,
        views: &[View],
        members: &[usize],
        prefix: Option<u64>,
        uniform: &mut impl FnMut() -> f64,
    ) -> Candidates {
        let effective = |i: &usize| views[*i].effective(self.speeds.factor(views[*i].id)).value();
        let order = match config.policy {
            Policy::RoundRobin => {
                let start = || (uniform() * f64::from(u32::MAX)) as u64;
                let cursor = self.cursor.map_or_else(start, |cursor| cursor.wrapping_add(1));
                self.cursor = Some(cursor);
                schedule::round_robin(members.len(), cursor)
            }
            Policy::Random => schedule::random(members.iter().map(|_| 1.0), uniform),
            Policy::LeastRequest => {
                // The score contains the load. With load in the draw too, a backend that is idle because it fails would win.
                let drawn = members.iter().map(|&i| views[i].capacity() * self.speeds.factor(views[i].id));
                let mut order = schedule::random(drawn, uniform);
                let score = |at: usize| {
                    let view = &views[members[at]];
                    let load = f64::from(view.local) + view.in_flight + 1.0;
                    let speed = self.speeds.factor(view.id);
                    load / (view.capacity() * speed).max(f64::MIN_POSITIVE)
                };
                // With nothing in flight no backend is less loaded. A choice by speed alone would never choose the slowest
                // backend, nor notice that it became faster. So the draw decides, whose weights include the speed.
                let busy = |at: usize| views[members[at]].local > 0 || views[members[at]].in_flight > 0.0;
                let loaded = order.iter().take(2).any(|at| busy(*at));
                if order.len() > 1 && loaded && score(order[1]) < score(order[0]) {
                    order.swap(0, 1);
                }
                order
            }
            Policy::WeightedRoundRobin | Policy::PrefixAffinity { .. } => {
                let entries: SmallVec<[(u64, f64); 8]> =
                    members.iter().map(|i| (views[*i].id, effective(i))).collect();
                self.scheduler.order(&entries, &mut *uniform)
            }
        };
        let open = order.into_iter().map(|at| all_slots(views, members[at]));
        let (Policy::PrefixAffinity { bound }, Some(prefix)) = (config.policy, prefix) else {
            return open.collect();
        };
        let near: SmallVec<[View; 8]> = members.iter().map(|&i| views[i]).collect();
        let bounds = affinity::bounds(&near, bound);
        let preferred = affinity::rendezvous(prefix, &near);
        // First every backend within its bound, which the limiter enforces exactly; then every backend with a free slot.
        let bound = preferred.into_iter().map(|at| {
            let open = all_slots(views, members[at]);
            Candidate { bound: Some(bounds[at]), ..open }
        });
        bound.chain(open).collect()
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

/// The rank that serves this request: the first one, except for the share of requests that exceeds its healthy weight.
fn pick_rank(
    config: &ChooseConfig,
    views: &[View],
    members: &[usize],
    ranks: &[u32],
    uniform: &mut impl FnMut() -> f64,
) -> Option<u32> {
    if ranks.len() < 2 {
        return ranks.first().copied();
    }
    let share = |rank: u32| {
        let of = || views.iter().filter(move |view| view.rank == rank);
        let healthy: f64 =
            members.iter().map(|&i| &views[i]).filter(|v| v.rank == rank).map(View::capacity).sum();
        let all: f64 = of().map(|view| view.weight).sum();
        if all > 0.0 { (config.overprovision * healthy / all).min(1.0) } else { 0.0 }
    };
    let mut left = 1.0;
    let mut shares: SmallVec<[f64; 4]> = SmallVec::new();
    for &rank in ranks {
        let taken = share(rank).min(left);
        left -= taken;
        shares.push(taken);
    }
    // The share that exceeds the healthy weight of all ranks is spread like the rest.
    let mut point = if shares[0] >= 1.0 { 0.0 } else { uniform() * (1.0 - left) };
    let picked = shares.iter().position(|share| {
        point -= share;
        point < 0.0
    });
    Some(ranks[picked.unwrap_or(0)])
}

#[cfg(test)]
mod tests;
