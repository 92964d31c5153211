//! Which observers probe which backends: rendezvous hashing of (backend, tier, observer), spread over regions.
//!
//! The number of probers per backend and tier does not depend on the number of gateways, so the cost of probing does not
//! grow with replicas. A gateway that joins or leaves moves only its own probes. The control plane probes only if there are
//! too few gateways, and only at liveness, because it has no credentials.

use std::collections::{BTreeMap, BTreeSet};

use super::evidence::Observer;
use super::params::observers_wanted;
use super::tier::Tier;

/// Observers with their regions.
pub(crate) type Regions = BTreeMap<Observer, String>;

/// The observers of one backend, by tier, in the order of their probes within an interval.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Probers {
    by_tier: [Vec<Observer>; 3],
}

impl Probers {
    pub(crate) fn of(&self, tier: Tier) -> &[Observer] {
        &self.by_tier[tier as usize]
    }

    /// The assignments of one backend.
    pub(crate) fn assign(backend: &str, gateways: &Regions) -> Self {
        let choose = |tier: Tier| {
            let wanted = observers_wanted(tier);
            let mut chosen = rank(backend, tier, gateways, &BTreeSet::new());
            chosen.truncate(wanted);
            if tier == Tier::Liveness && chosen.len() < wanted {
                chosen.push(Observer::ControlPlane);
            }
            chosen
        };
        Self { by_tier: Tier::ALL.map(choose) }
    }
}

/// Observers in order of preference for a backend, by their hash. Observers of regions that are not chosen yet come first,
/// because network faults often affect a whole region.
pub(crate) fn rank(
    backend: &str,
    tier: Tier,
    gateways: &Regions,
    without: &BTreeSet<Observer>,
) -> Vec<Observer> {
    let mut scored: Vec<(u64, &Observer, &str)> = gateways
        .iter()
        .filter(|(observer, _)| !without.contains(observer))
        .map(|(observer, region)| (score(backend, tier, observer), observer, region.as_str()))
        .collect();
    scored.sort_unstable_by(|a, b| b.cmp(a));
    // The first observer of each region, then the second of each, and so on.
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut rounds: Vec<(usize, usize, &Observer)> = Vec::with_capacity(scored.len());
    for (place, (_, observer, region)) in scored.into_iter().enumerate() {
        let round = seen.entry(region).or_default();
        rounds.push((*round, place, observer));
        *round += 1;
    }
    rounds.sort_unstable();
    rounds.into_iter().map(|(_, _, observer)| observer.clone()).collect()
}

/// FNV-1a with a finalizer: the same on every replica and after every restart, unlike the standard hasher.
fn score(backend: &str, tier: Tier, observer: &Observer) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let text = observer.to_string();
    for byte in backend.bytes().chain([0, tier as u8, 0]).chain(text.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gateways(n: usize, regions: usize) -> Regions {
        (0..n)
            .map(|i| (Observer::Gateway(format!("gateway-{i}").into()), format!("r{}", i % regions)))
            .collect()
    }

    fn all(backends: usize, gateways: &Regions) -> Vec<Probers> {
        (0..backends).map(|b| Probers::assign(&format!("b{b}"), gateways)).collect()
    }

    /// Probes of one backend in an hour at the default intervals, over all gateways.
    fn per_hour(probers: &Probers) -> usize {
        probers.of(Tier::Liveness).len() * (3600 / 5)
            + probers.of(Tier::Readiness).len() * (3600 / 30)
            + probers.of(Tier::Deep).len() * (3600 / 300)
    }

    #[test]
    fn probes_per_backend_and_hour_do_not_grow_with_gateways() {
        for n in [3, 30, 300] {
            let gateways = gateways(n, 3);
            let counted: BTreeSet<usize> = all(100, &gateways).iter().map(per_hour).collect();
            // 3 x 720 liveness, 2 x 120 readiness, 1 x 12 deep.
            assert_eq!(counted, [2412].into(), "{n} gateways");
        }
    }

    #[test]
    fn with_too_few_gateways_the_control_plane_makes_liveness_probes_and_only_then() {
        let liveness = |n| Probers::assign("b", &gateways(n, 1)).of(Tier::Liveness).to_vec();
        assert_eq!(liveness(0), [Observer::ControlPlane]);
        for n in 1..=5 {
            let chosen = liveness(n);
            assert_eq!(chosen.len(), (n + 1).min(3));
            assert_eq!(chosen.contains(&Observer::ControlPlane), n < 3);
        }
        assert_eq!(Probers::assign("b", &gateways(0, 1)).of(Tier::Readiness), []);
    }

    #[test]
    fn a_gateway_that_comes_or_goes_moves_only_its_own_share() {
        let (before, after) = (all(1000, &gateways(30, 1)), all(1000, &gateways(31, 1)));
        let newcomer = Observer::Gateway("gateway-30".into());
        let mut moved = 0;
        for (old, new) in before.iter().zip(&after) {
            for tier in Tier::ALL {
                for observer in new.of(tier).iter().filter(|v| !old.of(tier).contains(v)) {
                    assert_eq!(*observer, newcomer, "nobody but the newcomer takes anything over");
                    moved += 1;
                }
            }
        }
        // Of 6000 assignments a fair share is 6000 / 31 = 194.
        assert!((100..300).contains(&moved), "{moved}");
    }

    #[test]
    fn probers_are_of_different_regions_and_the_load_is_even() {
        let gateways = gateways(30, 3);
        let mut load: BTreeMap<Observer, usize> = BTreeMap::new();
        for probers in all(1000, &gateways) {
            let chosen = probers.of(Tier::Liveness);
            let regions: BTreeSet<&String> = chosen.iter().map(|v| &gateways[v]).collect();
            assert_eq!(regions.len(), 3);
            for observer in chosen {
                *load.entry(observer.clone()).or_default() += 1;
            }
        }
        let (least, most) = (load.values().min().unwrap(), load.values().max().unwrap());
        assert!(load.len() == 30 && *least > 60 && *most < 150, "{least} {most}");
    }
}
