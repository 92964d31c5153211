//! The first few of many backends are the first of the whole order, and the rest are all others.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::super::views::AGE_MAX;
use super::super::weight::tests::{idle, uniform};
use super::*;

fn with(policy: Policy) -> ChooseConfig {
    ChooseConfig { policy, ..ChooseConfig::default() }
}

const AFFINITY: Policy = Policy::PrefixAffinity { bound: 1.25 };

/// Backends that differ in everything that a choice looks at.
fn backends() -> impl Strategy<Value = Vec<View>> {
    let one = (0u32..5, 1u32..40, 0u32..40, 0u32..3, 0u32..10, 0u32..20);
    proptest::collection::vec(one, 9..120).prop_map(|all| {
        type One = (u32, u32, u32, u32, u32, u32);
        let view = |((weight, slots, in_flight, rank, usable, held_back), id): (One, u64)| View {
            weight: f64::from(weight) * 50.0,
            max_concurrency: slots,
            held_back: held_back.saturating_sub(15),
            in_flight: f64::from(in_flight),
            local: in_flight / 2,
            rank: u32::from(rank == 2),
            usability: if usable == 0 { Usability::Unhealthy } else { Usability::Healthy },
            ..idle(id)
        };
        all.into_iter().zip(1..).map(view).collect()
    })
}

fn few(
    balancer: &mut Balancer,
    config: &ChooseConfig,
    (views, all): (&mut Views, &[View]),
    prefix: Option<u64>,
    chance: impl FnMut() -> f64,
) -> Candidates {
    balancer.few(config, views, prefix, (all.len(), |index| all[index]), Instant::now(), chance)
}

/// How often each candidate is there, without the numbers of its bound.
fn counted(candidates: &[Candidate]) -> BTreeMap<(usize, u32, bool), u32> {
    let mut counts = BTreeMap::new();
    for candidate in candidates {
        *counts.entry((candidate.index, candidate.slots, candidate.bound.is_some())).or_default() += 1;
    }
    counts
}

proptest! {
    /// By policies that do not draw, those that were looked at for this choice are chosen as from the whole order.
    #[test]
    fn the_few_are_the_first_of_the_whole_order(all in backends(), seed in 1u64..1000, rounds in 1u64..20) {
        let all: Vec<View> = all.into_iter().map(|view| View { rank: 0, ..view }).collect();
        for policy in [Policy::WeightedRoundRobin, Policy::RoundRobin, AFFINITY] {
            let (config, now) = (with(policy), Instant::now());
            let (mut one, mut other) = (Balancer::default(), Balancer::default());
            let (mut chance, mut same_chance) = (uniform(seed), uniform(seed));
            for round in 0..rounds {
                let prefix = (policy == AFFINITY).then_some(round);
                let fresh = &mut Views::default();
                let few = few(&mut one, &config, (fresh, &all), prefix, &mut chance);
                let whole = other.order(&config, &all, prefix, now, &mut same_chance);
                prop_assert!(!few.is_empty() && few.len() <= FEW);
                for (few, whole) in few.iter().zip(&whole) {
                    let bound = few.bound.map(|bound| weir_ratelimit::Bound { elsewhere: 0, ..bound });
                    prop_assert_eq!(Candidate { bound, ..*few }, *whole);
                }
            }
        }
    }

    /// The few and the rest are together what the whole order is: nothing is asked twice and nothing is left out.
    #[test]
    fn the_few_and_the_rest_are_the_whole_order(all in backends(), seed in 1u64..1000, prefixed: bool) {
        let policies = [
            Policy::WeightedRoundRobin, Policy::RoundRobin, Policy::Random, Policy::LeastRequest, AFFINITY,
        ];
        for policy in policies {
            let (config, mut chance) = (with(policy), uniform(seed));
            let (mut balancer, mut views) = (Balancer::default(), Views::default());
            let prefix = prefixed.then_some(seed);
            let whole = Balancer::default().order(&config, &all, prefix, Instant::now(), uniform(seed));
            for _ in 0..5 {
                let mut candidates = few(&mut balancer, &config, (&mut views, &all), prefix, &mut chance);
                let rank = all[candidates[0].index].rank;
                prop_assert!(candidates.iter().all(|c| all[c.index].rank == rank));
                let rest = balancer.rest(&config, &all, prefix, &candidates, &mut chance);
                candidates.extend(rest);
                let open = |candidates: &[Candidate]| {
                    counted(&candidates.iter().copied().filter(|c| c.bound.is_none()).collect::<Vec<_>>())
                };
                prop_assert_eq!(open(&candidates), open(&whole), "{:?}", policy);
                let bounded = candidates.iter().filter(|c| c.bound.is_some()).map(|c| c.index);
                let mut bounded: Vec<usize> = bounded.collect();
                bounded.sort_unstable();
                let of_rank = |index: &usize| {
                    let view = &all[*index];
                    let healthy = all.iter().any(|view| view.usability == Usability::Healthy);
                    view.rank == rank && (!healthy || view.usability == Usability::Healthy)
                };
                let expected: Vec<usize> = match (policy, prefix) {
                    (AFFINITY, Some(_)) => (0..all.len()).filter(of_rank).collect(),
                    _ => Vec::new(),
                };
                prop_assert_eq!(bounded, expected);
            }
        }
    }

    /// A limiter that is asked about a few counts what the others have as if it were asked about all.
    #[test]
    fn the_bound_of_the_few_is_relative_to_all(all in backends(), prefix: u64) {
        let all: Vec<View> = all.into_iter().map(|view| View { rank: 0, ..view }).collect();
        let mut balancer = Balancer::default();
        let few = few(&mut balancer, &with(AFFINITY), (&mut Views::default(), &all), Some(prefix), uniform(1));
        let healthy = all.iter().filter(|view| view.usability == Usability::Healthy);
        let everywhere: f64 = healthy.map(|view| view.in_flight).sum();
        let here: f64 = few.iter().map(|candidate| all[candidate.index].in_flight).sum();
        for candidate in &few {
            let bound = candidate.bound.expect("by its prefix");
            prop_assert!((f64::from(bound.elsewhere) + here - everywhere).abs() < 1e-6);
        }
    }
}

#[test]
fn many_backends_get_their_weights_by_views_that_are_used_for_many_choices() {
    let weight = |id: u64| (id % 4 * 50) as f64;
    let all: Vec<View> = (1..=400).map(|id| View { weight: weight(id), ..idle(id) }).collect();
    let looks = Cell::new(0usize);
    let (mut balancer, mut views) = (Balancer::default(), Views::default());
    let (mut chance, config, now, rounds) = (uniform(5), ChooseConfig::default(), Instant::now(), 30_000);
    let mut counts = vec![0u32; all.len()];
    let look = |index: usize| {
        looks.set(looks.get() + 1);
        all[index]
    };
    for _ in 0..rounds {
        let few = balancer.few(&config, &mut views, None, (all.len(), look), now, &mut chance);
        counts[few[0].index] += 1;
    }
    let total: f64 = all.iter().map(|view| view.weight).sum();
    for (count, view) in counts.iter().zip(&all) {
        let due = f64::from(rounds) * view.weight / total;
        assert!((f64::from(*count) - due).abs() <= 2.0, "{}: {count} of {due}", view.id);
    }
    // Each of the few, and as many again for the arrangement.
    assert!(looks.get() as f64 / f64::from(rounds) < 2.1 * FEW as f64, "{}", looks.get());
}

#[test]
fn draws_of_many_follow_capacities_and_prefer_the_less_loaded() {
    let all: Vec<View> = (1..=40)
        .map(|id| View {
            weight: if id <= 20 { 100.0 } else { 300.0 },
            in_flight: if id % 2 == 0 { 0.0 } else { 10.0 },
            ..idle(id)
        })
        .collect();
    let (config, now) = (with(Policy::LeastRequest), Instant::now());
    let (mut balancer, mut views, mut chance) = (Balancer::default(), Views::default(), uniform(9));
    let mut shares = [[0.0; 2]; 2];
    for _ in 0..40_000 {
        let few = few(&mut balancer, &config, (&mut views, &all), None, &mut chance);
        let whole = balancer.order(&config, &all, None, now, &mut chance);
        for (of, first) in [few[0].index, whole[0].index].into_iter().enumerate() {
            shares[of][0] += f64::from(u8::from(all[first].weight > 200.0)) / 40_000.0;
            shares[of][1] += f64::from(u8::from(all[first].in_flight > 0.0)) / 40_000.0;
        }
    }
    let [few, whole] = shares;
    assert!((few[0] - whole[0]).abs() < 0.02 && (few[1] - whole[1]).abs() < 0.02, "{shares:?}");
    assert!(few[1] < 0.35, "the loaded half is chosen when both are of it: {few:?}");
}

#[test]
fn what_may_not_be_used_now_is_not_chosen_by_views_of_before() {
    let mut all: Vec<View> = (1..=200).map(idle).collect();
    for policy in
        [Policy::WeightedRoundRobin, Policy::Random, Policy::LeastRequest, Policy::RoundRobin, AFFINITY]
    {
        let (mut balancer, mut views) = (Balancer::default(), Views::default());
        let (config, mut chance) = (with(policy), uniform(11));
        for out in 0..150 {
            let prefix = (policy == AFFINITY).then_some(out);
            let before = few(&mut balancer, &config, (&mut views, &all), prefix, &mut chance);
            all[before[0].index].usability = Usability::Unhealthy;
            let after = few(&mut balancer, &config, (&mut views, &all), prefix, &mut chance);
            assert!(after.iter().all(|c| all[c.index].usability == Usability::Healthy), "{policy:?}");
        }
        all.iter_mut().for_each(|view| view.usability = Usability::Healthy);
    }
}

#[test]
fn views_serve_no_longer_than_their_time() {
    let mut all: Vec<View> = (1..=800).map(idle).collect();
    all[..700].iter_mut().for_each(|view| view.usability = Usability::Unhealthy);
    let (mut balancer, mut views) = (Balancer::default(), Views::default());
    let (config, mut chance, start) = (with(Policy::Random), uniform(3), Instant::now());
    let mut choose = |all: &[View], views: &mut Views, now| {
        balancer.few(&config, views, None, (all.len(), |index| all[index]), now, &mut chance)
    };
    choose(&all, &mut views, start);
    all[..700].iter_mut().for_each(|view| view.usability = Usability::Healthy);
    assert!(
        choose(&all, &mut views, start + AGE_MAX).iter().all(|c| c.index >= 700),
        "they are not looked at yet"
    );
    views.expire();
    assert!(choose(&all, &mut views, start).iter().any(|c| c.index < 700), "at once, if they are of no use");
    all[..700].iter_mut().for_each(|view| view.usability = Usability::Unhealthy);
    views.expire();
    choose(&all, &mut views, start);
    all[..700].iter_mut().for_each(|view| view.usability = Usability::Healthy);
    let later = start + AGE_MAX + Duration::from_millis(1);
    assert!(choose(&all, &mut views, later).iter().any(|c| c.index < 700), "they are back");
}
