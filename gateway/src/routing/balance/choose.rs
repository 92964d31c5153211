//! The choice: policies over views of the backends.
//!
//! Invariants:
//! - Never the best of shared, stale data: policies spread (round-robin) or sample (two choices), so that gateways
//!   with the same picture do not all turn to the same backend.
//! - Those of a lower rank (a nearer region, a higher priority) come first; the next rank takes the share that the
//!   first cannot serve, and what finds no slot there.
//! - Unhealthy backends come after all healthy ones, and only in a panic: once too little of the pool is healthy. Slots
//!   are hard limits, so healthy backends cannot be flooded: unhealthy ones get the requests that find no slot there.

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
    /// By chance; ignores weights.
    Random,
    /// The less loaded of two random choices; the first of them while both are idle.
    LeastRequest,
    /// By the beginning of the prompt, within a bound; weighted round-robin for a request that has none.
    PrefixAffinity {
        /// Times the mean load a backend may have for its prefixes.
        bound: f64,
    },
}

/// What a pool's operator decided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChooseConfig {
    /// How to pick.
    pub policy: Policy,
    /// Unhealthy backends are used when less than this share of the weight is healthy.
    pub panic: f64,
    /// A rank whose healthy share times this is below 1 leaves the rest to the next.
    pub overprovision: f64,
}

impl Default for ChooseConfig {
    fn default() -> Self {
        Self { policy: Policy::default(), panic: 0.5, overprovision: 1.4 }
    }
}

/// A backend in an order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Index of the view.
    pub index: usize,
    /// The most requests the cluster may have there for it to be taken.
    pub slots: u32,
    /// A bound besides, relative to what all candidates have.
    pub bound: Option<Bound>,
}

/// Candidates in order of preference. A backend can stand in it twice, first with a bound.
pub type Candidates = SmallVec<[Candidate; 8]>;

/// What is remembered between choices for one model.
#[derive(Debug, Default)]
pub struct Balancer {
    scheduler: Scheduler<u64>,
    cursor: Option<u64>,
    /// How fast the backends are.
    pub speeds: Speeds,
    /// How long they may be silent before another is tried as well.
    pub hedge_delays: HedgeDelays,
}

impl Balancer {
    /// All that may be tried, in order. `prefix` is the [`affinity::prefix_hash`] of the request; `uniform` gives
    /// random numbers of `[0, 1)`.
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

    /// `picked` had no free slot and `used` was used: shares follow what was used.
    pub fn reassign(&mut self, picked: u64, used: u64) {
        self.scheduler.reassign(&picked, &used);
    }

    /// An answer was good.
    pub fn add(&mut self, id: u64, sample: &Sample, now: Instant) {
        self.speeds.add(id, sample, now);
    }

    /// Forgets backends that are gone.
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
                // Load is in the score; in the draw as well it would favour one that is idle because it fails.
                let drawn = members.iter().map(|&i| views[i].capacity() * self.speeds.factor(views[i].id));
                let mut order = schedule::random(drawn, uniform);
                let score = |at: usize| {
                    let view = &views[members[at]];
                    let load = f64::from(view.local) + view.in_flight + 1.0;
                    let speed = self.speeds.factor(view.id);
                    load / (view.capacity() * speed).max(f64::MIN_POSITIVE)
                };
                // Where nothing is in flight nobody is less loaded, and by speed alone the slowest would never be chosen
                // nor seen to be faster again: the draw decides, which goes by speed already.
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
        // First within the bounds, which the limiter holds exactly; then wherever there is a slot.
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

/// Whether too little of the weight is healthy to leave the unhealthy ones out.
pub fn is_panic(config: &ChooseConfig, views: &[View]) -> bool {
    let all: f64 = views.iter().map(|view| view.weight).sum();
    let healthy: f64 = views.iter().filter(|v| v.usability == Usability::Healthy).map(|v| v.weight).sum();
    healthy < config.panic * all
        || (views.iter().all(|v| v.usability == Usability::Unhealthy) && !views.is_empty())
}

/// The rank that serves this request: the first, except for the share of requests that it has too little healthy
/// weight for.
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
    // What nobody is healthy enough for is spread as the rest is.
    let mut point = if shares[0] >= 1.0 { 0.0 } else { uniform() * (1.0 - left) };
    let picked = shares.iter().position(|share| {
        point -= share;
        point < 0.0
    });
    Some(ranks[picked.unwrap_or(0)])
}

#[cfg(test)]
mod tests;
