//! What a request costs with few and with many backends in its pool.
//!
//! One gateway and one Redis per size of the pool, all under the same limits, in interleaved rounds so that noise hits all
//! alike: a closed loop of 64 connections each. All backends are one simulated server under many names, so that only their
//! number differs.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use weir_proto::v1::{self, resource::Spec};

use crate::load::{self, Outcome};
use crate::process::Process;
use crate::redis_server::Redis;
use crate::report::{Report, Row, progress};
use crate::resources::{KEY, Resources, backend};
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs};
use crate::stats::median;

const MODEL: &str = "gpt-4.1";
/// Connections of the closed loop.
const CONNECTIONS: usize = 64;
/// The tokens of an answer: few, so that the choice is measured and not the copying.
const TOKENS: u64 = 16;
/// The slots of a backend: more than there are connections, so that none is ever full.
const SLOTS: u32 = 100_000;

/// The arguments of `pools`.
#[derive(Debug, Args)]
pub(crate) struct PoolsArgs {
    /// Rounds over all pools
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=50), value_name = "N")]
    rounds: u32,
    /// Seconds of load within a round
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60), value_name = "SECONDS")]
    seconds: u64,
    /// Backends of each pool; the first is compared with the others
    #[arg(long, value_delimiter = ',', default_values_t = [3, 30, 100, 400], value_name = "N,N,...")]
    backends: Vec<u32>,
    /// How the pools choose
    #[arg(long, value_enum, default_value = "weighted-round-robin")]
    policy: Policy,
}

/// The policies that differ in how they choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Policy {
    /// Smooth weighted round-robin
    WeightedRoundRobin,
    /// The less loaded of two
    LeastRequest,
    /// By the prefix of the prompt
    PrefixAffinity,
}

/// A gateway in front of one pool.
struct Target {
    backends: u32,
    gateway: Process,
    address: std::net::SocketAddr,
    redis: Redis,
    rounds: Vec<Round>,
}

/// The results of one round.
struct Round {
    load: Outcome,
    cpu_s: f64,
    redis_cpu_s: f64,
}

/// Runs the bench.
pub(crate) async fn run(args: &PoolsArgs) -> anyhow::Result<Report> {
    let directory = tempfile::tempdir().context("a temporary directory")?;
    let machine = crate::machine::describe();
    let mock = MockArgs { model: MODEL.into(), slots: SLOTS as usize, ..MockArgs::default() };
    let mock = Mock::start("mock", &mock, directory.path()).await?;
    let mut targets = Vec::new();
    for backends in &args.backends {
        targets.push(target(*backends, args.policy, &mock, directory.path()).await?);
    }
    let request = load::chat(KEY, MODEL, TOKENS, false);
    for target in &targets {
        load::closed(target.address, &request, CONNECTIONS, Duration::from_secs(1)).await;
    }
    for n in 1..=args.rounds {
        progress(&format!("pools: round {n} of {}", args.rounds));
        for target in &mut targets {
            let (cpu_s, redis_cpu_s) = (target.gateway.usage().cpu_s, target.redis.usage().cpu_s);
            let load =
                load::closed(target.address, &request, CONNECTIONS, Duration::from_secs(args.seconds)).await;
            let cpu_s = target.gateway.usage().cpu_s - cpu_s;
            let redis_cpu_s = target.redis.usage().cpu_s - redis_cpu_s;
            target.rounds.push(Round { load, cpu_s, redis_cpu_s });
        }
    }
    let few = targets.first().context("no pool")?;
    let rows = targets.iter().map(|target| row(target, few)).collect();
    let mut notes = vec![
        format!(
            "closed loop, {CONNECTIONS} connections, unary answers of {TOKENS} tokens; median of {} rounds of {} s. Load \
             generator, simulated server, gateway and Redis share the cores.",
            args.rounds, args.seconds
        ),
        "limits: requests and tokens per minute and concurrency of the tenant and of the model, requests per minute of \
         everything, and a slot at the backend; cpu: of the gateway and of Redis alone; times: relative to the first pool"
            .into(),
    ];
    let failures = targets.iter().flat_map(|t| t.rounds.iter().filter_map(|r| r.load.first_failure.as_ref()));
    notes.extend(failures.take(1).map(|why| format!("a request failed: {why}")));
    Ok(Report { bench: "pools", machine, rows, notes })
}

async fn target(backends: u32, policy: Policy, mock: &Mock, directory: &Path) -> anyhow::Result<Target> {
    let redis = Redis::start(directory).await?;
    let id = format!("weir-{backends}-backends");
    let args = GatewayArgs { id, redis: Some(redis.url()), ..GatewayArgs::default() };
    let gateway = Gateway::start(&args, &resources(backends, policy, mock), directory).await?;
    Ok(Target { backends, address: gateway.address, gateway: gateway.process, redis, rounds: Vec::new() })
}

/// One pool of so many backends, under limits so wide that none refuses.
fn resources(backends: u32, policy: Policy, mock: &Mock) -> Resources {
    let wide = || v1::Rates {
        requests_per_minute: Some(1_000_000_000),
        tokens_per_minute: Some(9_000_000_000),
        concurrency: Some(100_000),
        burst_multiplier: Some(1.0),
        ..Default::default()
    };
    let balancing_policy = match policy {
        Policy::WeightedRoundRobin => v1::BalancingPolicy::WeightedRoundRobin,
        Policy::LeastRequest => v1::BalancingPolicy::LeastRequest,
        Policy::PrefixAffinity => v1::BalancingPolicy::PrefixAffinity,
    };
    let mut resources = Resources::default();
    resources.tenant("acme", KEY, Some(wide()));
    let pool = v1::PoolSpec { balancing_policy: balancing_policy.into(), ..Default::default() };
    resources.put(MODEL, Spec::Pool(pool));
    for n in 0..backends {
        resources.put(&format!("b{n:04}"), Spec::Backend(backend(MODEL, MODEL, mock.address, SLOTS)));
    }
    let spec = v1::ModelSpec { pool: MODEL.into(), limits: Some(wide()), ..Default::default() };
    resources.put(MODEL, Spec::Model(spec));
    let rates = v1::Rates {
        requests_per_minute: Some(1_000_000_000),
        burst_multiplier: Some(1.0),
        ..Default::default()
    };
    resources.put("everything", Spec::Limit(v1::LimitSpec { selector: None, rates: Some(rates) }));
    resources
}

fn row(target: &Target, few: &Target) -> Row {
    let of = |target: &Target, figure: &dyn Fn(&Round) -> f64| {
        median(target.rounds.iter().filter(|round| round.load.ok > 0).map(figure).collect())
    };
    let per_10k = |cpu_s: f64, round: &Round| cpu_s / round.load.ok.max(1) as f64 * 10_000.0;
    let cpu = |target: &Target| of(target, &|round| per_10k(round.cpu_s, round));
    let redis_cpu = |target: &Target| of(target, &|round| per_10k(round.redis_cpu_s, round));
    let times = |figure: Option<f64>, few: Option<f64>| figure.zip(few).map(|(figure, few)| figure / few);
    Row::default()
        .count("backends", u64::from(target.backends))
        .figure("requests_per_s", of(target, &|round| round.load.per_second()), 0)
        .count("failed", target.rounds.iter().map(|round| round.load.failed).sum())
        .figure("cpu_s_per_10000_requests", cpu(target), 3)
        .figure("cpu_times", times(cpu(target), cpu(few)), 2)
        .figure("redis_cpu_s_per_10000_requests", redis_cpu(target), 3)
        .figure("redis_cpu_times", times(redis_cpu(target), redis_cpu(few)), 2)
        .figure("p50_ms", of(target, &|round| round.load.percentile_us(50.0) / 1000.0), 2)
        .figure("p99_ms", of(target, &|round| round.load.percentile_us(99.0) / 1000.0), 2)
}
