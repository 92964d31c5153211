//! The cost of Weir in front of servers, compared with nginx and haproxy that only pass bytes.
//!
//! One run on one machine, with interleaved rounds (every target once, then again) so that noise hits all alike. Per
//! round and target: a closed loop of 64 connections for throughput and CPU time, then open loops at fixed rates,
//! whose percentiles are compared with those of the same round without a proxy. Afterwards 1000 slow streams are held
//! open through each target, and 200 MB are streamed through it.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::load::{self, Connection, Outcome};
use crate::process::Process;
use crate::proxies::{Kind, Proxy};
use crate::redis_server::Redis;
use crate::report::{Report, Row, progress};
use crate::resources::{KEY, Resources};
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs};
use crate::stats::{median, spread};

/// Connections of the closed loop.
const CONNECTIONS: usize = 64;
/// Arrivals per second of the open loops, with the names of their columns.
const RATES: [(f64, [&str; 3]); 2] = [
    (500.0, ["added_p50_us_at_500_rps", "added_p99_us_at_500_rps", "failed_at_500_rps"]),
    (1000.0, ["added_p50_us_at_1000_rps", "added_p99_us_at_1000_rps", "failed_at_1000_rps"]),
];
/// The tokens of an answer: few, so that the proxies are measured and not the copying.
const TOKENS: u64 = 16;
/// Slow streams held open.
const STREAMS: usize = 1000;
/// The bytes of a token and the tokens of the large stream: 200 MB and the events around them.
const CHUNK_BYTES: usize = 64 << 10;
const CHUNKS: u64 = 200_000_000 / CHUNK_BYTES as u64;
/// The models, one per simulated server.
const MODELS: [&str; 3] = ["fast", "slow", "large"];

/// The arguments of `proxy`.
#[derive(Debug, Args)]
pub(crate) struct ProxyArgs {
    /// Rounds over all targets
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50), value_name = "N")]
    rounds: u32,
    /// Seconds of each load within a round
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60), value_name = "SECONDS")]
    seconds: u64,
}

/// One path to the simulated servers.
struct Target {
    name: &'static str,
    /// `None` for the path without a proxy.
    process: Option<Process>,
    /// Per model.
    addresses: [SocketAddr; 3],
    redis: Option<Redis>,
    rounds: Vec<Round>,
}

/// The results of one round.
#[derive(Debug)]
struct Round {
    closed: Outcome,
    cpu_s: Option<f64>,
    redis_cpu_s: Option<f64>,
    /// One per rate.
    open: Vec<Outcome>,
}

/// The results of the streams afterwards.
#[derive(Debug, Default)]
struct Streams {
    mib_per_1000: Option<f64>,
    large_s: f64,
    large_peak_mib: Option<f64>,
    large_added_mib: Option<f64>,
}

/// Runs the bench.
pub(crate) async fn run(args: &ProxyArgs) -> anyhow::Result<Report> {
    let directory = tempfile::tempdir().context("a temporary directory")?;
    let machine = crate::machine::describe();
    let mut notes = Vec::new();
    let mocks = mocks(directory.path()).await?;
    let servers: Vec<SocketAddr> = mocks.iter().map(|mock| mock.address).collect();
    let mut targets = targets(&servers, directory.path(), &mut notes).await?;

    let load = Duration::from_secs(args.seconds);
    let request = load::chat(KEY, MODELS[0], TOKENS, false);
    for target in &targets {
        load::closed(target.addresses[0], &request, CONNECTIONS, Duration::from_secs(1)).await;
    }
    for n in 1..=args.rounds {
        progress(&format!("proxy: round {n} of {}", args.rounds));
        for target in &mut targets {
            let round = round(target, &request, load).await?;
            target.rounds.push(round);
        }
    }
    let mut rows = Vec::new();
    let mut streams = Vec::new();
    for target in &targets {
        progress(&format!("proxy: {STREAMS} slow streams and 200 MB through {}", target.name));
        streams.push(open_streams(target, &mocks[1]).await?);
    }
    for (target, streams) in targets.iter().zip(&streams) {
        rows.push(row(target, &targets[0], streams));
        for round in &target.rounds {
            let outcomes = std::iter::once(&round.closed).chain(&round.open);
            if let Some(why) = outcomes.filter_map(|o| o.first_failure.as_ref()).next() {
                notes.push(format!("{}: a request failed: {why}", target.name));
                break;
            }
        }
    }
    notes.push(format!(
        "requests/s: closed loop, {CONNECTIONS} connections, unary answers of {TOKENS} tokens; median of {} rounds of \
         {} s. Load generator, simulated server and proxy share the cores, so the direct way is the ceiling.",
        args.rounds, args.seconds
    ));
    notes.push(
        "added latency: open loop, counted from when a request was due; median over the rounds of (target - direct). \
         noise us: how far direct's own percentile lies apart between rounds."
            .into(),
    );
    notes.push("CPU: of the proxy's processes alone; no target writes an access log.".into());
    Ok(Report { bench: "proxy", machine, rows, notes })
}

/// The models with where they are served.
fn models(servers: &[SocketAddr]) -> Vec<(&'static str, SocketAddr)> {
    MODELS.into_iter().zip(servers.iter().copied()).collect()
}

async fn mocks(directory: &Path) -> anyhow::Result<Vec<Mock>> {
    let [fast, slow, large] =
        MODELS.map(|model| MockArgs { model: model.into(), slots: 100_000, ..MockArgs::default() });
    let slow = MockArgs { decode_tokens_per_s: 2.0, jitter: 0.5, ..slow };
    let large = MockArgs { chunk_bytes: CHUNK_BYTES, ..large };
    let mut mocks = Vec::new();
    for args in [fast, slow, large] {
        mocks.push(Mock::start(&format!("mock-{}", args.model), &args, directory).await?);
    }
    Ok(mocks)
}

async fn targets(
    servers: &[SocketAddr],
    directory: &Path,
    notes: &mut Vec<String>,
) -> anyhow::Result<Vec<Target>> {
    let three = |addresses: &[SocketAddr]| -> anyhow::Result<[SocketAddr; 3]> {
        addresses.try_into().context("one address per model")
    };
    let target =
        |name, process, addresses| Target { name, process, addresses, redis: None, rounds: Vec::new() };
    let mut targets = vec![target("direct", None, three(servers)?)];
    for kind in [Kind::Nginx, Kind::Haproxy] {
        if !kind.installed() {
            notes.push(format!("{} is not installed on this machine and was left out", kind.program()));
            continue;
        }
        let proxy = Proxy::start(kind, servers, directory).await?;
        targets.push(target(kind.program(), Some(proxy.process), three(&proxy.addresses)?));
        notes.push(format!("{}: {}", kind.program(), kind.version().await));
    }
    let args = GatewayArgs { id: "weir-without-limits".into(), ..GatewayArgs::default() };
    let gateway = Gateway::start(&args, &Resources::wide(&models(servers), false), directory).await?;
    targets.push(target("weir", Some(gateway.process), [gateway.address; 3]));

    let redis = Redis::start(directory).await?;
    let args =
        GatewayArgs { id: "weir-with-limits".into(), redis: Some(redis.url()), ..GatewayArgs::default() };
    let gateway = Gateway::start(&args, &Resources::wide(&models(servers), true), directory).await?;
    let with_limits = target("weir_redis_limits", Some(gateway.process), [gateway.address; 3]);
    targets.push(Target { redis: Some(redis), ..with_limits });
    notes.push(
        "weir_redis_limits: requests and tokens per minute and concurrency of the tenant and of the model, requests \
         per minute of everything, and a slot at the backend: one script call to admit, one to settle"
            .into(),
    );
    Ok(targets)
}

async fn round(target: &Target, request: &Bytes, load: Duration) -> anyhow::Result<Round> {
    let cpu = || target.process.as_ref().map(|p| p.usage().cpu_s);
    let redis_cpu = || target.redis.as_ref().map(|r| r.usage().cpu_s);
    let (cpu_before, redis_before) = (cpu(), redis_cpu());
    let closed = load::closed(target.addresses[0], request, CONNECTIONS, load).await;
    let cpu_s = cpu().zip(cpu_before).map(|(after, before)| after - before);
    let redis_cpu_s = redis_cpu().zip(redis_before).map(|(after, before)| after - before);
    let mut open = Vec::new();
    for (per_second, _) in RATES {
        open.push(load::open(target.addresses[0], request, per_second, load).await?);
    }
    Ok(Round { closed, cpu_s, redis_cpu_s, open })
}

/// Holds many slow streams open, then streams much at once.
async fn open_streams(target: &Target, slow: &Mock) -> anyhow::Result<Streams> {
    let rss = || target.process.as_ref().map(|p| p.usage().rss_mib);
    let before = rss();
    let request = load::chat(KEY, MODELS[1], 1_000_000, true);
    let mut streams = JoinSet::new();
    let (opened, mut all_open) = tokio::sync::mpsc::channel::<u16>(STREAMS);
    for _ in 0..STREAMS {
        let (address, request, opened) = (target.addresses[1], request.clone(), opened.clone());
        streams.spawn(async move {
            let mut connection = Connection::open(address).await?;
            let status = connection.begin(&request).await?;
            // The receiver waits for one token of each stream.
            let _ = opened.send(status).await;
            connection.drain().await
        });
    }
    drop(opened);
    for n in 0..STREAMS {
        let status = tokio::time::timeout(Duration::from_secs(30), all_open.recv()).await;
        let status =
            status.ok().flatten().with_context(|| format!("{}: stream {n} did not begin", target.name))?;
        anyhow::ensure!(status == 200, "{}: a slow stream was answered {status}", target.name);
    }
    // Two more tokens each, so that every buffer of a stream exists.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mib_per_1000 = rss().zip(before).map(|(after, before)| (after - before) * 1000.0 / STREAMS as f64);
    streams.shutdown().await;
    wait_for_no_streams(slow)
        .await
        .with_context(|| format!("{}: streams after their clients left", target.name))?;

    let idle = rss();
    if let Some(process) = &target.process {
        process.forget_peak();
    }
    let request = load::chat(KEY, MODELS[2], CHUNKS, true);
    let started = Instant::now();
    let mut connection = Connection::open(target.addresses[2]).await?;
    let answer = connection.call(&request).await?;
    let large_s = started.elapsed().as_secs_f64();
    anyhow::ensure!(
        answer.status == 200 && answer.body_bytes >= 200_000_000,
        "{}: the large stream gave {} with {} bytes",
        target.name,
        answer.status,
        answer.body_bytes
    );
    let large_peak_mib = target.process.as_ref().map(|p| p.usage().peak_rss_mib);
    let large_added_mib = large_peak_mib.zip(idle).map(|(peak, idle)| peak - idle);
    Ok(Streams { mib_per_1000, large_s, large_peak_mib, large_added_mib })
}

/// The server must notice that a client left, through every proxy.
async fn wait_for_no_streams(slow: &Mock) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let in_flight = slow.stats().await?["in_flight"].as_u64().unwrap_or(0);
        if in_flight == 0 {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < deadline, "{in_flight} are still generated");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn row(target: &Target, direct: &Target, streams: &Streams) -> Row {
    let of_rounds =
        |figure: &dyn Fn(&Round) -> Option<f64>| median(target.rounds.iter().filter_map(figure).collect());
    let per_10k = |cpu: Option<f64>, round: &Round| Some(cpu? / round.closed.ok.max(1) as f64 * 10_000.0);
    let failed: u64 = target.rounds.iter().map(|r| r.closed.failed).sum();
    let mut row = Row::default()
        .text("target", target.name)
        .figure("requests_per_s", of_rounds(&|r| Some(r.closed.per_second())), 0)
        .count("failed", failed)
        .figure("cpu_s_per_10000_requests", of_rounds(&|r| per_10k(r.cpu_s, r)), 3)
        .figure("redis_cpu_s_per_10000_requests", of_rounds(&|r| per_10k(r.redis_cpu_s, r)), 3);
    for (i, (_, [p50, p99, failed])) in RATES.into_iter().enumerate() {
        let added = |percent: f64| {
            let pairs = target.rounds.iter().zip(&direct.rounds);
            median(
                pairs
                    .map(|(a, b)| a.open[i].percentile_us(percent) - b.open[i].percentile_us(percent))
                    .collect(),
            )
        };
        row = row.figure(p50, added(50.0), 0).figure(p99, added(99.0), 0);
        row = row.count(failed, target.rounds.iter().map(|r| r.open[i].failed).sum());
    }
    let last = RATES.len() - 1;
    let own =
        |percent: f64| target.rounds.iter().map(|r| r.open[last].percentile_us(percent)).collect::<Vec<_>>();
    row.figure("p50_us_at_1000_rps", median(own(50.0)), 0)
        .figure("p99_us_at_1000_rps", median(own(99.0)), 0)
        .figure("p99_spread_us_at_1000_rps", spread(&own(99.0)), 0)
        .figure("memory_mib_per_1000_streams", streams.mib_per_1000, 1)
        .figure("stream_200mb_s", streams.large_s, 2)
        .figure("stream_200mb_peak_rss_mib", streams.large_peak_mib, 1)
        .figure("stream_200mb_added_rss_mib", streams.large_added_mib, 1)
}
