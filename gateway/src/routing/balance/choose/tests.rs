use std::time::Duration;

use proptest::prelude::*;

use super::super::Measure;
use super::super::weight::tests::{idle, uniform};
use super::*;

fn with(policy: Policy) -> ChooseConfig {
    ChooseConfig { policy, ..ChooseConfig::default() }
}

fn firsts(config: &ChooseConfig, views: &[View], n: usize) -> Vec<usize> {
    let (mut balancer, mut chance, now) = (Balancer::default(), uniform(7), Instant::now());
    let mut pick = |_| balancer.order(config, views, None, now, &mut chance)[0].index;
    (0..n).map(&mut pick).collect()
}

fn share(picks: &[usize], index: usize) -> f64 {
    picks.iter().filter(|&&p| p == index).count() as f64 / picks.len() as f64
}

#[test]
fn idle_backends_of_equal_speed_get_their_weights_over_three_gateways() {
    let mut views: Vec<View> =
        [100.0, 80.0, 70.0].iter().zip(1..).map(|(w, id)| View { weight: *w, ..idle(id) }).collect();
    let (mut now, mut chance) = (Instant::now(), uniform(3));
    let mut gateways: Vec<Balancer> = (0..3).map(|_| Balancer::default()).collect();
    let mut counts = [0u32; 3];
    let mut under_way = std::collections::VecDeque::new();
    for request in 0..30_000 {
        now += Duration::from_millis(20);
        let gateway = &mut gateways[request % 3];
        let first = gateway.order(&ChooseConfig::default(), &views, None, now, &mut chance)[0].index;
        counts[first] += 1;
        views[first].in_flight += 1.0;
        under_way.push_back((request % 3, first, Duration::from_secs_f64(-0.1 * (1.0 - chance()).ln())));
        if under_way.len() > 4 {
            let (gateway, index, took) = under_way.pop_front().unwrap();
            views[index].in_flight -= 1.0;
            let sample = Sample { measure: Measure::Unary, took, prompt_tokens: 10, output_tokens: 10 };
            gateways[gateway].add(views[index].id, &sample, now);
        }
    }
    for (count, due) in counts.into_iter().zip([12_000, 9_600, 8_400]) {
        assert!(count.abs_diff(due) <= 300, "{counts:?}: within 1 % of all requests");
    }
}

#[test]
fn a_full_backend_is_the_last_to_be_asked() {
    let full = View { in_flight: 50.0, ..idle(1) };
    for policy in [Policy::WeightedRoundRobin, Policy::LeastRequest] {
        let picks = firsts(&with(policy), &[full, idle(2), idle(3)], 200);
        assert_eq!(share(&picks, 0), 0.0, "{policy:?}");
    }
}

#[test]
fn least_request_takes_the_less_loaded_of_two_and_never_the_worst_of_three() {
    let loaded = |id, in_flight| View { in_flight, ..idle(id) };
    let picks = firsts(&with(Policy::LeastRequest), &[loaded(1, 1.0), loaded(2, 9.0), loaded(3, 30.0)], 3000);
    assert!((share(&picks, 0) - 2.0 / 3.0).abs() < 0.03);
    assert_eq!(share(&picks, 2), 0.0);
    assert!(share(&picks, 1) > 0.3, "a choice of two, not the best of all");
}

#[test]
fn least_request_leaves_no_idle_backend_without_requests_because_it_is_the_slowest() {
    let (mut balancer, mut chance, mut now) = (Balancer::default(), uniform(7), Instant::now());
    let views = [idle(1), idle(2), idle(3)];
    let mut learn = |balancer: &mut Balancer, id: u64, ms: u64| {
        now += Duration::from_millis(100);
        let took = Duration::from_millis(ms);
        let sample = Sample { measure: Measure::Unary, took, prompt_tokens: 10, output_tokens: 10 };
        balancer.add(id, &sample, now);
        now
    };
    for _ in 0..100 {
        for (id, ms) in [(1, 100), (2, 120), (3, 160)] {
            learn(&mut balancer, id, ms);
        }
    }
    let now = learn(&mut balancer, 1, 100);
    let picks: Vec<usize> = (0..3000)
        .map(|_| balancer.order(&with(Policy::LeastRequest), &views, None, now, &mut chance)[0].index)
        .collect();
    let shares = [0, 1, 2].map(|index| share(&picks, index));
    assert!(shares[0] > shares[1] && shares[1] > shares[2] && shares[2] > 0.2, "{shares:?}");
}

#[test]
fn baselines_ignore_weights() {
    let heavy = View { weight: 900.0, ..idle(1) };
    for policy in [Policy::RoundRobin, Policy::Random] {
        let picks = firsts(&with(policy), &[heavy, idle(2), idle(3)], 3000);
        assert!((share(&picks, 0) - 1.0 / 3.0).abs() < 0.04, "{policy:?}");
    }
}

#[test]
fn affinity_gives_the_same_answer_on_every_gateway_and_stays_within_its_bound() {
    let mut views: Vec<View> = (1..=8).map(|id| View { in_flight: 8.0, ..idle(id) }).collect();
    let config = with(Policy::PrefixAffinity { bound: 1.25 });
    let (mut one, mut two, now) = (Balancer::default(), Balancer::default(), Instant::now());
    let a = one.order(&config, &views, Some(42), now, uniform(1));
    // Another load, another phase: the same preference.
    views.iter_mut().for_each(|v| v.in_flight = 3.0);
    let b = two.order(&config, &views, Some(42), now, uniform(2));
    let preferred = |candidates: &Candidates| candidates[..8].iter().map(|p| p.index).collect::<Vec<_>>();
    assert_eq!(preferred(&a), preferred(&b));
    let bound = weir_ratelimit::Bound { millionths: 156_250, elsewhere: 0, estimate: 11 };
    assert!(a[..8].iter().all(|p| p.bound == Some(bound)), "1.25 / 8, and of 65: {a:?}");
    assert!(a[8..].iter().all(|p| p.bound.is_none()) && a.len() == 16 && a.iter().all(|p| p.slots == 50));
    let spread: std::collections::BTreeSet<usize> =
        (0..100).map(|p| one.order(&config, &views, Some(p), now, uniform(1))[0].index).collect();
    assert_eq!(spread.len(), 8);
}

#[test]
fn the_next_region_takes_what_the_first_is_too_ill_for() {
    let at = |id, rank, usability| View { rank, usability, ..idle(id) };
    let (ok, bad) = (Usability::Healthy, Usability::Unhealthy);
    let near = |usable: [Usability; 4]| -> Vec<View> {
        let near = usable.into_iter().zip(1..).map(|(trust, id)| at(id, 0, trust));
        near.chain([at(9, 1, ok)]).collect()
    };
    let far = |views: &[View]| share(&firsts(&ChooseConfig::default(), views, 4000), 4);
    assert_eq!(far(&near([ok, ok, ok, ok])), 0.0);
    assert_eq!(far(&near([ok, ok, ok, bad])), 0.0, "three of four carry it: 1.4 x 0.75 > 1");
    let half = far(&near([ok, ok, bad, bad]));
    assert!((half - 0.3).abs() < 0.03, "1 - 1.4 x 0.5: {half}");
    assert_eq!(far(&near([bad, bad, bad, bad])), 1.0);
}

#[test]
fn a_farther_region_stands_behind_for_when_the_first_has_no_slot() {
    let views = [View { rank: 1, ..idle(1) }, idle(2), View { rank: 2, ..idle(3) }, idle(4)];
    let candidates =
        Balancer::default().order(&ChooseConfig::default(), &views, None, Instant::now(), uniform(1));
    let mut order: Vec<usize> = candidates.iter().map(|p| p.index).collect();
    order[..2].sort_unstable();
    assert_eq!(order, [1, 3, 0, 2]);
}

#[test]
fn a_slow_start_holds_slots_back_only_from_who_finds_one_elsewhere() {
    let returning = |id| View { max_concurrency: 5, held_back: 45, health: 0.1, ..idle(id) };
    let order = |views: &[View]| -> Vec<(usize, u32)> {
        let candidates =
            Balancer::default().order(&ChooseConfig::default(), views, None, Instant::now(), uniform(1));
        candidates.iter().map(|candidate| (candidate.index, candidate.slots)).collect()
    };
    assert_eq!(order(&[returning(1)]), [(0, 5), (0, 50)], "the only one: all of its slots");
    let both = order(&[returning(1), idle(2)]);
    assert_eq!(both.last(), Some(&(0, 50)), "after all that others have free: {both:?}");
    assert_eq!(both.iter().filter(|(index, _)| *index == 1).count(), 1);
}

#[test]
fn unhealthy_backends_are_left_out_until_half_is_gone_and_then_come_last() {
    let unhealthy = |id| View { usability: Usability::Unhealthy, ..idle(id) };
    let order = |views: &[View]| -> Vec<usize> {
        let candidates =
            Balancer::default().order(&ChooseConfig::default(), views, None, Instant::now(), uniform(1));
        candidates.iter().map(|p| p.index).collect()
    };
    assert_eq!(order(&[unhealthy(1), idle(2), idle(3)]).len(), 2);
    let panic = order(&[unhealthy(1), unhealthy(2), idle(3)]);
    assert_eq!((panic[0], panic.len()), (2, 3), "healthy first, the rest for what it has no slots for");
    assert_eq!(
        order(&[unhealthy(1), unhealthy(2), unhealthy(3)]).len(),
        3,
        "nobody is healthy: all are used"
    );
    assert!(order(&[]).is_empty());
}

proptest! {
    /// Whatever the weights, loads and changes: everyone healthy is in the order, and over time the first candidates
    /// follow the effective weights.
    #[test]
    fn shares_follow_effective_weights_under_constant_change(
        weights in proptest::collection::vec(1u32..1000, 2..8),
        seed in 1u64..1000,
        keep in 1usize..40,
    ) {
        let full: Vec<View> =
            weights.iter().zip(1..).map(|(w, id)| View { weight: f64::from(*w), ..idle(id) }).collect();
        let (mut balancer, mut chance, now) = (Balancer::default(), uniform(seed), Instant::now());
        let total: u32 = weights.iter().sum();
        let rounds = 4000;
        let mut counts = vec![0u32; weights.len()];
        for round in 0..rounds {
            // Rebuilt and rescaled all the time.
            let scale = 1.0 + f64::from(round % 7);
            let views: Vec<View> = full.iter().map(|v| View { weight: v.weight * scale, ..*v }).collect();
            if (round as usize).is_multiple_of(keep) {
                balancer.retain(|_| true);
            }
            let candidates = balancer.order(&ChooseConfig::default(), &views, None, now, &mut chance);
            prop_assert_eq!(candidates.len(), views.len());
            counts[candidates[0].index] += 1;
        }
        for (count, weight) in counts.iter().zip(&weights) {
            let due = f64::from(rounds) * f64::from(*weight) / f64::from(total);
            prop_assert!((f64::from(*count) - due).abs() <= 4.0, "{counts:?} for {weights:?}");
        }
    }
}
