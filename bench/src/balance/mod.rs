//! Which policy keeps requests from waiting when there are many gateways, each of which sees its own part and a
//! report that is a second old.
//!
//! The gateway's own balancing code in a discrete-event model: gateways that get requests at random; eight engines
//! with 32 slots whose requests share their speed, two of them half as fast as their equal weights suggest; work from
//! a log-normal distribution; Poisson arrivals. Weir's policies are compared with the usual ones without a
//! cluster-wide view (round-robin, random, least-request on local counts; engines queue the excess) and with the
//! ideal of one queue that knows everything. Every policy gets the same arrivals from the same seeds.

mod backend;
mod sim;

use clap::Args;
use weir_gateway::routing::balance::Policy;

use self::backend::SLOTS;
use self::sim::{BOUND, Outcome, Scenario, Scheme};
use crate::report::{Report, Row, progress};

/// Loads of the comparison.
const LOADS: [f64; 2] = [0.8, 0.9];
/// Prefixes of the workload that shares them: five times what one engine remembers.
const PREFIXES: u64 = 200;
/// Load while an engine fails.
const FAILING_LOAD: f64 = 0.6;

/// What to simulate.
#[derive(Debug, Args)]
pub(crate) struct BalanceArgs {
    /// Gateways
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1000))]
    gateways: u16,
    /// Requests of each run
    #[arg(long, default_value_t = 60_000, value_parser = clap::value_parser!(u32).range(1000..=1_000_000))]
    requests: u32,
    /// Runs of each policy, each with arrivals of its own
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=100))]
    seeds: u16,
    /// Milliseconds between reports of what the cluster has in flight
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    report_ms: u32,
}

fn weir(policy: Policy) -> Scheme {
    Scheme::Weir { policy, slots: true }
}

fn queued(policy: Policy) -> Scheme {
    Scheme::Weir { policy, slots: false }
}

/// Runs every comparison.
pub(crate) fn run(args: &BalanceArgs, machine: serde_json::Value) -> Report {
    let affinity = Policy::PrefixAffinity { bound: BOUND };
    let policies = [
        ("weighted_round_robin", weir(Policy::WeightedRoundRobin)),
        ("least_request", weir(Policy::LeastRequest)),
        ("weighted_round_robin, engines queue", queued(Policy::WeightedRoundRobin)),
        ("least_request, engines queue", queued(Policy::LeastRequest)),
        ("round_robin, engines queue", queued(Policy::RoundRobin)),
        ("random, engines queue", queued(Policy::Random)),
        ("least_request on local counts, engines queue", Scheme::LeastRequestLocal),
        ("ideal", Scheme::Ideal),
    ];
    let base = Scenario {
        scheme: Scheme::Ideal,
        gateways: usize::from(args.gateways),
        load: 0.0,
        report_s: f64::from(args.report_ms) / 1e3,
        requests: args.requests as usize,
        seed: 0,
        prefixes: 0,
        failing: false,
        ejection: true,
    };
    let mut rows = Vec::new();
    for load in LOADS {
        for (name, scheme) in policies {
            rows.push(row(name, &Scenario { scheme, load, ..base }, args));
        }
    }
    for (name, scheme) in [
        ("prefix_affinity", weir(affinity)),
        ("weighted_round_robin", weir(Policy::WeightedRoundRobin)),
        ("round_robin, engines queue", queued(Policy::RoundRobin)),
    ] {
        rows.push(row(name, &Scenario { scheme, load: LOADS[0], prefixes: PREFIXES, ..base }, args));
    }
    for (name, policy, ejection) in [
        ("weighted_round_robin", Policy::WeightedRoundRobin, true),
        ("weighted_round_robin, no ejection", Policy::WeightedRoundRobin, false),
        ("least_request, no ejection", Policy::LeastRequest, false),
        ("prefix_affinity, no ejection", affinity, false),
    ] {
        let prefixes = if policy == affinity { PREFIXES } else { 0 };
        let scheme = weir(policy);
        let failing = Scenario { scheme, load: FAILING_LOAD, failing: true, ejection, prefixes, ..base };
        rows.push(row(name, &failing, args));
    }
    let notes = vec![
        format!("8 engines with {SLOTS} slots, two at half speed, all of the same weight; load is the share of what they can do together"),
        "wait: from a request's arrival to its slot. slowdown: its whole time over what it takes alone on a fast engine".into(),
        "the percentile of each seed's run, and of those the median".into(),
        format!("prefixes: requests begin with one of {PREFIXES}, an engine remembers 40, and a known one halves the work"),
        format!("over_bound_share: requests placed by their prefix that took their engine above {BOUND} times the mean as it was then, in whole requests"),
        "failing_share: tries drawn by one of 8 engines that fails every request within 5 ms; 2/B is 0.25".into(),
    ];
    Report { bench: "balance", machine, rows, notes }
}

fn row(name: &str, scenario: &Scenario, args: &BalanceArgs) -> Row {
    let mut outcomes: Vec<Outcome> =
        (1..=u64::from(args.seeds)).map(|seed| sim::run(&Scenario { seed, ..*scenario })).collect();
    let mut over = |of: fn(&mut Outcome) -> Option<f64>| {
        let figures: Option<Vec<f64>> = outcomes.iter_mut().map(of).collect();
        figures.and_then(crate::stats::median)
    };
    let wait = over(|o| percentile(&mut o.waits_s, 0.99)).map(|s| s * 1e3);
    let slowdown = over(|o| percentile(&mut o.slowdowns, 0.99));
    let hits = over(|o| (o.prefixed > 0).then(|| o.hits as f64 / o.prefixed as f64));
    let bound = over(|o| (o.affine > 0).then(|| o.over_bound as f64 / o.affine as f64));
    let failing = over(|o| Some(o.failing_share)).filter(|_| scenario.failing);
    let text = |figure: Option<f64>| figure.map_or("-".to_owned(), |f| format!("{f:.2}"));
    progress(&format!("{name} at {}: wait p99 {} ms", scenario.load, text(wait)));
    Row::default()
        .text("policy", name)
        .count("gateways", scenario.gateways as u64)
        .figure("load", scenario.load, 2)
        .figure("wait_p99_ms", wait, 1)
        .figure("slowdown_p99", slowdown, 2)
        .figure("cache_hit_ratio", hits, 3)
        .figure("over_bound_share", bound, 4)
        .figure("failing_share", failing, 3)
}

fn percentile(figures: &mut [f64], share: f64) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    figures.get((figures.len() as f64 * share) as usize).copied()
}

#[cfg(test)]
mod tests;
