//! The claims of the bench, on a smaller scale.

use super::*;

fn scenario(scheme: Scheme, load: f64) -> Scenario {
    Scenario {
        scheme,
        gateways: 64,
        load,
        report_s: 1.0,
        requests: 12_000,
        seed: 1,
        prefixes: 0,
        failing: false,
        ejection: true,
    }
}

fn wait_p99(scheme: Scheme, load: f64) -> f64 {
    percentile(&mut sim::run(&scenario(scheme, load)).waits_s, 0.99).unwrap()
}

#[test]
fn the_default_waits_a_tenth_of_what_local_counts_and_round_robin_wait() {
    let ours = wait_p99(weir(Policy::WeightedRoundRobin), 0.9);
    let local = wait_p99(Scheme::LeastRequestLocal, 0.9);
    let turns = wait_p99(queued(Policy::RoundRobin), 0.9);
    assert!(10.0 * ours <= local && 10.0 * ours <= turns, "{ours} {local} {turns}");
}

#[test]
fn the_default_is_near_the_ideal_queue() {
    let ours = wait_p99(weir(Policy::WeightedRoundRobin), 0.8);
    let ideal = wait_p99(Scheme::Ideal, 0.8);
    assert!(ours <= 2.0 * ideal + 0.05, "{ours} {ideal}");
}

#[test]
fn affinity_doubles_cache_hits_within_its_bound() {
    let run = |policy| sim::run(&Scenario { prefixes: PREFIXES, ..scenario(weir(policy), 0.8) });
    let ratio = |outcome: &Outcome| outcome.hits as f64 / outcome.prefixed as f64;
    let affinity = run(Policy::PrefixAffinity { bound: 1.25 });
    let spread = run(Policy::WeightedRoundRobin);
    assert!(ratio(&affinity) >= 2.0 * ratio(&spread), "{} {}", ratio(&affinity), ratio(&spread));
}

#[test]
fn an_engine_that_fails_at_once_never_draws_more_than_two_shares() {
    let share = |policy, ejection| {
        sim::run(&Scenario { failing: true, ejection, ..scenario(weir(policy), 0.6) }).failing_share
    };
    for policy in [Policy::WeightedRoundRobin, Policy::LeastRequest] {
        let share = share(policy, true);
        assert!(share <= 1.0 / 8.0, "{policy:?}: {share}");
    }
    let alone = share(Policy::WeightedRoundRobin, false);
    assert!(alone <= 2.0 / 8.0, "also without ejection: {alone}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let once = || sim::run(&scenario(weir(Policy::WeightedRoundRobin), 0.8)).waits_s;
    assert_eq!(once(), once());
}
