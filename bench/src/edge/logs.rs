//! Processes under load with a log that cannot be written.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::services::{Open, Service};
use super::{EdgeArgs, SLOTS, metric};
use crate::load::{self, Outcome, Pacer, micros};
use crate::process::{Log, Process};
use crate::report::{Row, progress};
use crate::resources::{KEY, Resources};
use crate::roles::{ControlPlaneProcess, Gateway, GatewayArgs, LimitService, Logging, Mock, MockArgs, fetch};

/// Requests per second.
const RATE: f64 = 200.0;
/// The interval of readiness checks, and the time in which each must be answered.
const READY_EVERY: Duration = Duration::from_millis(100);
const READY_TIMEOUT: Duration = Duration::from_secs(5);
/// Lines that fill a pipe and the queue before it within the first seconds: of a gateway, and of the gRPC services,
/// which log more.
const GATEWAY_FILTER: &str = "trace";
const FILTER: &str = "debug";

const LOGS: [(Log, &str); 4] = [
    (Log::File, "a file"),
    (Log::DiskFull, "disk full"),
    (Log::ReaderStopped, "reader stopped"),
    (Log::ReaderGone, "reader gone"),
];

const PROCESSES: [&str; 3] = ["gateway", "control plane", "limit service"];

/// A process and the requests to it.
struct Target {
    service: Service,
    ops: SocketAddr,
    /// What the process ends with.
    _processes: Vec<Process>,
}

/// Runs every process with every log.
pub(super) async fn run(args: &EdgeArgs, notes: &mut Vec<String>) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for process in PROCESSES.into_iter().filter(|name| name.contains(&args.only)) {
        let mut good_p99 = None;
        for (log, name) in LOGS {
            progress(&format!("edge: logs: {process}: {name}"));
            let directory = tempfile::tempdir()?;
            let target = start(process, log, directory.path()).await?;
            let (row, p99) = measure(process, name, &target, args.logs_s, good_p99, notes).await?;
            good_p99 = good_p99.or(Some(p99));
            rows.push(row);
        }
    }
    notes.push(format!(
        "logs: {RATE} requests a second (chat; ListResources; ShouldRateLimit), --log {GATEWAY_FILTER} of a gateway, else {FILTER}; beside a_file: p99 over that \
         of the same process with a log in a file; /readyz each {READY_EVERY:?}"
    ));
    Ok(rows)
}

async fn start(process: &str, log: Log, directory: &Path) -> anyhow::Result<Target> {
    let filter = if process == "gateway" { GATEWAY_FILTER } else { FILTER };
    let log = Logging { filter, to: log };
    Ok(match process {
        "gateway" => {
            let mock = MockArgs { model: "quick".into(), slots: SLOTS, ..MockArgs::default() };
            let quick = Mock::start("quick", &mock, directory).await?;
            let mut resources = Resources::basic();
            resources.model_at("quick", quick.address);
            let args = GatewayArgs { id: "gateway".into(), log, ..GatewayArgs::default() };
            let gateway = Gateway::start(&args, &resources, directory).await?;
            Target {
                service: Service::Http(gateway.address, load::chat(KEY, "quick", 2, false)),
                ops: gateway.ops,
                _processes: vec![gateway.process, quick.process],
            }
        }
        "control plane" => {
            let plane = ControlPlaneProcess::start_logging(None, directory, &log).await?;
            Target {
                service: Service::List(plane.grpc, plane.token),
                ops: plane.http,
                _processes: vec![plane.process],
            }
        }
        _ => {
            let limits = LimitService::start(directory, &log).await?;
            Target { service: Service::Limit(limits.grpc), ops: limits.ops, _processes: vec![limits.process] }
        }
    })
}

async fn measure(
    process: &str,
    log: &str,
    target: &Target,
    seconds: u64,
    good_p99: Option<f64>,
    notes: &mut Vec<String>,
) -> anyhow::Result<(Row, f64)> {
    let length = Duration::from_secs(seconds);
    // The first requests find connections that are not open yet.
    for _ in 0..20 {
        let _ = target.service.ask().await;
    }
    let load = async {
        match (&target.service, target.service.open()) {
            (Service::Http(address, request), _) => load::open(*address, request, RATE, length).await,
            (_, Some(open)) => paced(open, length).await,
            (_, None) => Err(std::io::Error::other("not asked for here")),
        }
    };
    let (outcome, (asked, unready)) = tokio::join!(load, ready(target.ops, length));
    let outcome = outcome?;
    if let Some(why) = &outcome.first_failure {
        notes.push(format!("{process}, {log}: {why}"));
    }
    let lost = metric(target.ops, "weir_log_lines_lost_total").await?;
    let of = |percent| outcome.percentile_us(percent) / 1000.0;
    let p99 = of(99.0);
    let row = Row::default()
        .text("process", process)
        .text("log", log)
        .count("answered", outcome.ok)
        .count("failed", outcome.failed)
        .figure("p50_ms", of(50.0), 2)
        .figure("p99_ms", p99, 2)
        .figure("beside_a_file", good_p99.map(|good| p99 / good), 2)
        .figure("slowest_ms", of(100.0), 1)
        .count("readyz_asked", asked)
        .count("readyz_failed", unready)
        .figure("lines_lost", lost, 0);
    Ok((row, p99))
}

/// Sends requests at a fixed rate. Latency counts from when a request was due.
async fn paced(open: Open, length: Duration) -> std::io::Result<Outcome> {
    let mut outcome = Outcome::new();
    let mut pacer = Pacer::start(RATE)?;
    let started = Instant::now();
    let mut asking = JoinSet::new();
    loop {
        let due = pacer.next().await?;
        if due > started + length {
            break;
        }
        let open = open.clone();
        asking.spawn(async move { (open.ask().await, due.elapsed()) });
    }
    while let Some(asked) = asking.join_next().await {
        match asked {
            Ok((Ok(()), took)) => {
                outcome.ok += 1;
                outcome.latency_us.saturating_record(micros(took));
            }
            Ok((Err(error), _)) => {
                outcome.failed += 1;
                outcome.first_failure.get_or_insert(error);
            }
            Err(_) => outcome.failed += 1,
        }
    }
    outcome.elapsed = started.elapsed();
    Ok(outcome)
}

/// Checks readiness. Returns the number of checks, and of those that failed.
async fn ready(ops: SocketAddr, length: Duration) -> (u64, u64) {
    let (mut asked, mut unready) = (0, 0);
    let until = Instant::now() + length;
    while Instant::now() < until {
        asked += 1;
        if !matches!(timeout(READY_TIMEOUT, fetch(ops, "/readyz")).await, Ok(Ok(_))) {
            unready += 1;
        }
        tokio::time::sleep(READY_EVERY).await;
    }
    (asked, unready)
}
