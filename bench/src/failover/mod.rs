//! How long until a broken backend is not used any more, and what clients notice.
//!
//! A control plane, gateways as processes, three simulated backends that answer in 100 ms. One of them is killed,
//! stopped, black-holed, slowed or made to fail at once: under traffic, where each gateway must notice by itself, and
//! without traffic, where probes must. Clients ask for unary answers, so that every failed attempt can be repeated
//! elsewhere.

mod relay;
mod scene;
mod trial;

use std::time::Duration;

use clap::Args;
use tokio::task::JoinSet;

pub(crate) use self::relay::Relay;
use self::scene::Fault;
use self::trial::{PER_SECOND, Plan, Trial};
use crate::load::Outcome;
use crate::report::{Report, Row, progress};

/// The default interval of a gateway's liveness probes.
const LIVENESS_INTERVAL: Duration = Duration::from_secs(5);
/// The promised time from a verdict's decision until it is in force, milliseconds.
const PUSH_MS: f64 = 10.0;

/// What to break and how often.
#[derive(Debug, Args)]
pub(crate) struct FailoverArgs {
    /// Trials of each fault, with and without traffic
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000), value_name = "N")]
    trials: u16,
    /// In so many of them the backend is mended and its return timed, in the first one up to its full weight
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(0..=1000), value_name = "N")]
    returns: u16,
    /// Trials without traffic at the same time; those with traffic are one after the other
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=20), value_name = "N")]
    idle_at_once: u16,
    /// Gateways
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=20), value_name = "N")]
    gateways: u16,
    /// Only these faults, by name; all without it
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    only: Vec<String>,
    /// Only under traffic (`busy`) or only without (`idle`); both without it
    #[arg(long, value_name = "TRAFFIC", value_parser = ["busy", "idle"])]
    traffic: Option<String>,
}

/// Runs the bench.
pub(crate) async fn run(args: &FailoverArgs) -> anyhow::Result<Report> {
    for name in &args.only {
        let known = Fault::ALL.map(Fault::name);
        anyhow::ensure!(known.contains(&name.as_str()), "--only {name}: it is one of {}", known.join(", "));
    }
    let machine = crate::machine::describe();
    let mut rows = Vec::new();
    for fault in Fault::ALL {
        if !args.only.is_empty() && !args.only.iter().any(|name| name == fault.name()) {
            continue;
        }
        for traffic in ["busy", "idle"] {
            if args.traffic.as_ref().is_none_or(|only| only == traffic) {
                rows.push(row(fault, traffic, &trials(fault, traffic == "busy", args).await?));
            }
        }
    }
    let notes = vec![
        format!(
            "{} gateways, 3 backends that answer in 100 ms, whole answers (hedging.unary is on); busy: {PER_SECOND} requests/s",
            args.gateways
        ),
        "local: the last gateway keeps away on its own evidence; cluster: the last gateway was told the verdict; \
         both from the fault on, looked at every 20 ms (idle: 50 ms); seen: in how many trials"
            .into(),
        "idle: every gateway had reached every backend by then, and faults are spread over the interval of the probes".into(),
        "requests: from a second before the fault until everybody kept away and a second more, 8 s at most".into(),
        "used_again: from the mending until every gateway had a good answer from it (busy) or left no doubt (idle); \
         full_return: until it had its full weight at every gateway, slow start included"
            .into(),
        "verdicts: told to a gateway during the trials, and how many of them were in force there within 10 ms of the \
         decision; verdict_push_ms_max: the bucket the slowest of them fell in"
            .into(),
        "black_hole: a relay that accepts nothing and passes nothing on; the kernel still completes handshakes for it"
            .into(),
    ];
    Ok(Report { bench: "failover", machine, rows, notes })
}

/// All trials of a row; one after the other if they load the machine.
async fn trials(fault: Fault, busy: bool, args: &FailoverArgs) -> anyhow::Result<Vec<Trial>> {
    let at_once = if busy { 1 } else { usize::from(args.idle_at_once) };
    let mut running = JoinSet::new();
    let mut found = Vec::new();
    let mut numbers = 1..=args.trials;
    loop {
        while running.len() < at_once
            && let Some(number) = numbers.next()
        {
            let plan = Plan {
                fault,
                busy,
                gateways: args.gateways,
                pause: if busy { Duration::ZERO } else { phase(number) },
                returns: number <= args.returns,
                full_return: number == 1 && args.returns > 0,
            };
            running.spawn(async move { (number, trial::run(plan).await) });
        }
        let Some(done) = running.join_next().await else { return Ok(found) };
        let (number, trial) = done?;
        let trial = trial?;
        progress(&format!(
            "{} {} {number}: {}",
            fault.name(),
            if busy { "busy" } else { "idle" },
            trial.line()
        ));
        found.push(trial);
    }
}

/// Spreads the trials evenly over the interval of liveness probes.
fn phase(trial: u16) -> Duration {
    LIVENESS_INTERVAL.mul_f64((f64::from(trial) * 0.618_034).fract())
}

fn row(fault: Fault, traffic: &str, trials: &[Trial]) -> Row {
    let times = |of: fn(&Trial) -> Option<Duration>| -> Vec<f64> {
        trials.iter().filter_map(of).map(|d| d.as_secs_f64() * 1e3).collect()
    };
    let most = |figures: &[f64]| figures.iter().copied().reduce(f64::max);
    let median = |figures: &[f64]| crate::stats::median(figures.to_vec());
    let (local, cluster) = (times(|t| t.local), times(|t| t.cluster));
    let (back, full) = (times(|t| t.back), times(|t| t.full));
    let loads: Vec<&Outcome> = trials.iter().filter_map(|t| t.load.as_ref()).collect();
    let requests: u64 = loads.iter().map(|l| l.ok + l.failed).sum();
    let slowest = loads.iter().map(|l| l.latency_us.max() as f64 / 1e3).reduce(f64::max);
    let attempts: u64 = trials.iter().map(|t| t.attempts).sum();
    let per_request = (requests > 0).then(|| attempts as f64 / requests as f64);
    let pushes = || trials.iter().map(|t| &t.pushes);
    let pushed: u64 = pushes().map(|p| p.count).sum();
    Row::default()
        .text("fault", fault.name())
        .text("traffic", traffic)
        .count("trials", trials.len() as u64)
        .figure("local_ejection_ms_max", most(&local), 0)
        .figure("local_ejection_ms_median", median(&local), 0)
        .count("local_seen", local.len() as u64)
        .figure("cluster_ejection_ms_max", most(&cluster), 0)
        .figure("cluster_ejection_ms_median", median(&cluster), 0)
        .count("cluster_seen", cluster.len() as u64)
        .count("failed_requests", loads.iter().map(|l| l.failed).sum())
        .count("requests", requests)
        .figure("slowest_ms_max", slowest, 0)
        .figure("attempts_per_request", per_request, 3)
        .figure("used_again_ms_median", median(&back), 0)
        .figure("used_again_ms_max", most(&back), 0)
        .figure("full_return_ms", median(&full), 0)
        .count("verdicts", pushed)
        .count("verdicts_within_10_ms", pushes().map(|p| p.within(PUSH_MS / 1e3)).sum())
        .figure(
            "verdict_push_ms_max",
            (pushed > 0).then(|| pushes().map(|p| p.slowest_ms()).fold(0.0, f64::max)),
            1,
        )
}
