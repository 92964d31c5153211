//! How long until a broken backend is left alone, and what do clients notice?
//!
//! A control plane, gateways as processes of their own, three simulated backends that answer in 100 ms. One of them is
//! killed, stopped, black-holed, slowed or made to fail at once: under traffic, where each gateway must notice by
//! itself, and idle, where probes must. Clients ask for whole answers, so that every failure can still go elsewhere.

mod relay;
mod scene;

use std::path::Path;
use std::time::Duration;

use clap::Args;
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::scene::{Fault, MODEL, Scene, TOKENS};
use crate::load::{self, Outcome};
use crate::report::{Report, Row, progress};
use crate::resources::KEY;

/// Requests per second over all gateways.
const PER_SECOND: f64 = 200.0;
/// Traffic before the fault: what is usual must be known.
const WARM_UP: Duration = Duration::from_secs(4);
/// Between two looks at the gateways' metrics; the precision of every time here.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Traffic goes on for this long before the fault is switched on.
const LEAD: Duration = Duration::from_secs(1);
/// How long is watched for reactions under traffic.
const WATCH_TRAFFIC: Duration = Duration::from_secs(8);
/// And without.
const WATCH_IDLE: Duration = Duration::from_secs(20);
/// A mended backend must be used again within this to be timed.
const RETURN_MAX: Duration = Duration::from_secs(60);

/// What to break and how often.
#[derive(Debug, Args)]
pub(crate) struct FailoverArgs {
    /// Trials of each fault, with and without traffic
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000), value_name = "N")]
    trials: u16,
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

/// What one trial found.
#[derive(Debug, Default)]
struct Trial {
    /// From the fault until the last gateway kept away by itself.
    local: Option<Duration>,
    /// From the fault until the last gateway was told.
    cluster: Option<Duration>,
    /// From the mending until every gateway used it again.
    back: Option<Duration>,
    load: Option<Outcome>,
    attempts: u64,
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
            if args.traffic.as_ref().is_some_and(|only| only != traffic) {
                continue;
            }
            let mut trials = Vec::new();
            for number in 1..=args.trials {
                let found = trial(fault, traffic == "busy", args.gateways).await?;
                progress(&format!(
                    "{} {traffic} {number}: local {:?}, cluster {:?}, failed {}, back {:?}",
                    fault.name(),
                    found.local,
                    found.cluster,
                    found.load.as_ref().map_or(0, |l| l.failed),
                    found.back
                ));
                if let Some(why) = found.load.as_ref().and_then(|l| l.first_failure.as_ref()) {
                    progress(&format!("first failure: {why}"));
                }
                trials.push(found);
            }
            rows.push(row(fault, traffic, &trials));
        }
    }
    let notes = vec![
        format!("{} gateways, 3 backends that answer in 100 ms, whole answers; busy: {PER_SECOND} requests/s", args.gateways),
        "local: the last gateway keeps away on its own evidence; cluster: the last gateway was told the verdict; \
         both from the fault on, looked at every 20 ms; seen: in how many trials"
            .into(),
        "used again: from the mending until every gateway had a good answer from it (busy) or left no doubt (idle)"
            .into(),
        "black_hole: a relay that accepts nothing and passes nothing on; the kernel still completes handshakes for it"
            .into(),
    ];
    Ok(Report { bench: "failover", machine, rows, notes })
}

async fn trial(fault: Fault, busy: bool, gateways: u16) -> anyhow::Result<Trial> {
    let directory = tempfile::tempdir()?;
    let mut scene = Scene::start(gateways, directory.path()).await?;
    let mut trial = Trial::default();
    let mut loads = JoinSet::new();
    if busy {
        traffic(&scene, WARM_UP, &mut loads);
        while let Some(done) = loads.join_next().await {
            done??;
        }
        traffic(&scene, LEAD + WATCH_TRAFFIC, &mut loads);
        tokio::time::sleep(LEAD).await;
    }
    let attempts_before: u64 = scene.sights().await?.iter().map(|s| s.attempts).sum();
    let at = scene.inject(fault).await?;
    let watch = if busy { WATCH_TRAFFIC } else { WATCH_IDLE };
    let mut local = vec![None; scene.gateways.len()];
    let mut cluster = local.clone();
    while at.elapsed() < watch {
        tokio::time::sleep(LOOK_EVERY).await;
        let sights = scene.sights().await?;
        for (i, sight) in sights.iter().enumerate() {
            if sight.ejected {
                local[i].get_or_insert_with(|| at.elapsed());
            }
            if sight.unhealthy {
                cluster[i].get_or_insert_with(|| at.elapsed());
            }
        }
        // Nothing more to see, and no traffic to wait for.
        if !busy && cluster.iter().all(Option::is_some) {
            break;
        }
    }
    if busy {
        let mut sum = Outcome::new();
        while let Some(done) = loads.join_next().await {
            sum.add(done??);
        }
        trial.load = Some(sum);
    }
    let attempts: u64 = scene.sights().await?.iter().map(|s| s.attempts).sum();
    trial.attempts = attempts.saturating_sub(attempts_before);
    trial.local = last(&local);
    trial.cluster = last(&cluster);
    trial.back = used_again(&mut scene, fault, busy, directory.path()).await?;
    scene.end().await?;
    Ok(trial)
}

fn traffic(scene: &Scene, duration: Duration, loads: &mut JoinSet<std::io::Result<Outcome>>) {
    let per_second = PER_SECOND / scene.gateways.len() as f64;
    for gateway in &scene.gateways {
        let (address, request) = (gateway.address, load::chat(KEY, MODEL, TOKENS, false));
        loads.spawn(async move { load::open(address, &request, per_second, duration).await });
    }
}

/// The last of them, if none is missing.
fn last(times: &[Option<Duration>]) -> Option<Duration> {
    times.iter().copied().collect::<Option<Vec<_>>>()?.into_iter().max()
}

async fn used_again(
    scene: &mut Scene,
    fault: Fault,
    busy: bool,
    directory: &Path,
) -> anyhow::Result<Option<Duration>> {
    let before = scene.sights().await?;
    scene.heal(fault, directory).await?;
    let healed = Instant::now();
    while healed.elapsed() < RETURN_MAX {
        let mut loads = JoinSet::new();
        if busy {
            traffic(scene, Duration::from_millis(500), &mut loads);
        }
        while let Some(done) = loads.join_next().await {
            done??;
        }
        let now = scene.sights().await?;
        let back = now
            .iter()
            .zip(&before)
            .all(|(now, before)| !now.ejected && !now.unhealthy && (!busy || now.answers > before.answers));
        if back {
            return Ok(Some(healed.elapsed()));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(None)
}

fn row(fault: Fault, traffic: &str, trials: &[Trial]) -> Row {
    let times = |of: fn(&Trial) -> Option<Duration>| -> Vec<f64> {
        trials.iter().filter_map(of).map(|d| d.as_secs_f64() * 1e3).collect()
    };
    let most = |figures: &[f64]| figures.iter().copied().reduce(f64::max);
    let (local, cluster, back) = (times(|t| t.local), times(|t| t.cluster), times(|t| t.back));
    let loads: Vec<&Outcome> = trials.iter().filter_map(|t| t.load.as_ref()).collect();
    let requests: u64 = loads.iter().map(|l| l.ok + l.failed).sum();
    let slowest = loads.iter().map(|l| l.latency_us.max() as f64 / 1e3).reduce(f64::max);
    let attempts: u64 = trials.iter().map(|t| t.attempts).sum();
    // Attempts are counted from the fault on, requests from a little before.
    let since = WATCH_TRAFFIC.as_secs_f64() / (LEAD + WATCH_TRAFFIC).as_secs_f64();
    let per_request = (requests > 0).then(|| attempts as f64 / (requests as f64 * since));
    Row::default()
        .text("fault", fault.name())
        .text("traffic", traffic)
        .count("trials", trials.len() as u64)
        .figure("local_ejection_ms_max", most(&local), 0)
        .figure("local_ejection_ms_median", crate::stats::median(local.clone()), 0)
        .count("local_seen", local.len() as u64)
        .figure("cluster_ejection_ms_max", most(&cluster), 0)
        .figure("cluster_ejection_ms_median", crate::stats::median(cluster.clone()), 0)
        .count("cluster_seen", cluster.len() as u64)
        .count("failed_requests", loads.iter().map(|l| l.failed).sum())
        .count("requests", requests)
        .figure("slowest_ms_max", slowest, 0)
        .figure("attempts_per_request", per_request, 3)
        .figure("used_again_ms_median", crate::stats::median(back), 0)
}
