//! The policies of choosing, and the settings of a choice.

use super::weight::View;

/// How many candidates are chosen at first: enough that one of them nearly always has a free slot, and few beside the rest of
/// a limiter call.
pub const FEW: usize = 8;

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

/// The share of requests that each of these ranks serves, given its healthy weight: the first one all of them, except for
/// the share that exceeds its weight.
pub(super) fn served(
    config: &ChooseConfig,
    views: &[View],
    ranks: &[(u32, f64)],
) -> impl Iterator<Item = f64> {
    let mut left = 1.0;
    ranks.iter().map(move |(rank, healthy)| {
        let all: f64 = views.iter().filter(|view| view.rank == *rank).map(|view| view.weight).sum();
        let share = if all > 0.0 { (config.overprovision * healthy / all).min(1.0) } else { 0.0 };
        let taken = share.min(left);
        left -= taken;
        taken
    })
}
