//! The gain of each step of load balancing: one endpoint, round-robin over three, weights, active health checks,
//! concurrency control. The table of the guide that this project grew from, measured.
//!
//! Every row is the real gateway in front of the same three simulated backends, under the same load with the same
//! seed. Only the resources differ, and each row names its own. The backends differ in speed and in slots, and queue
//! what exceeds their slots, as engines do. In the middle of each run one backend (always the one of the first row)
//! freezes: its process is stopped, so that it still accepts connections and does not answer, health checks included;
//! later it continues.
//!
//! The load is a closed loop: a number of clients with one request at a time, whose length is drawn from its seed.
//! After an error a client waits half a second, as the SDKs do before they retry.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use prost_types::Duration as Wire;
use rustix::process::Signal;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use weir_proto::v1::{self, BalancingPolicy, resource::Spec};

use crate::fleet::ControlPlane;
use crate::load::{self, Connection, Outcome};
use crate::report::{Report, Row, progress};
use crate::resources::{KEY, Resources, backend};
use crate::rng::Rng;
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs};

const MODEL: &str = "gpt-4.1";
/// gpt-4.1, micro-dollars per million tokens.
const PRICE_INPUT: f64 = 2e6;
const PRICE_OUTPUT: f64 = 8e6;
/// Tokens of an answer, both included; 40 on average.
const TOKENS: (u64, u64) = (20, 60);
/// The pause of a client after an error.
const BACK_OFF: Duration = Duration::from_millis(500);
/// The silence after which a backend has failed, in every row. Only streams have this timeout.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// When the backend freezes and for how long, as parts of the run.
const FREEZE: (f64, f64) = (0.4, 0.25);

/// A simulated backend: name, slots, tokens per second of each.
struct Region {
    name: &'static str,
    slots: usize,
    tokens_per_s: f64,
}

/// 240, 150 and 110 requests per second of 40 tokens.
const REGIONS: [Region; 3] = [
    Region { name: "sgp", slots: 24, tokens_per_s: 400.0 },
    Region { name: "fra", slots: 18, tokens_per_s: 333.0 },
    Region { name: "vir", slots: 16, tokens_per_s: 275.0 },
];
/// The backend that freezes, and the only one of the first row.
const FROZEN: usize = 1;

impl Region {
    /// Its capacity, requests per second.
    fn capacity(&self) -> f64 {
        self.slots as f64 * self.tokens_per_s * 2.0 / (TOKENS.0 + TOKENS.1) as f64
    }
}

/// One row: the features that are on, and the guide's figures.
struct Step {
    name: &'static str,
    has: &'static str,
    guide: Guide,
    only_one: bool,
    weights: bool,
    health: bool,
    concurrency: bool,
}

struct Guide {
    requests_per_s: f64,
    p99_ms: f64,
    error_percent: f64,
}

const STEPS: [Step; 5] = [
    Step {
        name: "one_endpoint",
        has: "one backend",
        guide: Guide { requests_per_s: 145.0, p99_ms: 890.0, error_percent: 2.3 },
        only_one: true,
        weights: false,
        health: false,
        concurrency: false,
    },
    Step {
        name: "round_robin",
        has: "three backends in turn",
        guide: Guide { requests_per_s: 312.0, p99_ms: 520.0, error_percent: 0.8 },
        only_one: false,
        weights: false,
        health: false,
        concurrency: false,
    },
    Step {
        name: "weighted_round_robin",
        has: "weights by capacity",
        guide: Guide { requests_per_s: 487.0, p99_ms: 295.0, error_percent: 0.1 },
        only_one: false,
        weights: true,
        health: false,
        concurrency: false,
    },
    Step {
        name: "active_health_checks",
        has: "weights; liveness probes each 0.5 s; local ejection; retry elsewhere within the budget",
        guide: Guide { requests_per_s: 492.0, p99_ms: 287.0, error_percent: 0.02 },
        only_one: false,
        weights: true,
        health: true,
        concurrency: false,
    },
    Step {
        name: "concurrency_control",
        has: "all of that; max_concurrency = the backend's slots, the rest waits in the gateway's queue",
        guide: Guide { requests_per_s: 465.0, p99_ms: 178.0, error_percent: 0.0 },
        only_one: false,
        weights: true,
        health: true,
        concurrency: true,
    },
];

/// The arguments of `guide-table`.
#[derive(Debug, Args)]
pub(crate) struct GuideTableArgs {
    /// Seconds of each row
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(4..=300), value_name = "SECONDS")]
    seconds: u64,
    /// Clients of the closed loop
    #[arg(long, default_value_t = 96, value_parser = clap::value_parser!(u32).range(1..=2000), value_name = "N")]
    clients: u32,
    /// Seed of the lengths of answers and of the backends' jitter
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
}

/// The results of one row.
struct Measured {
    outcome: Outcome,
    usd_per_1000: f64,
}

/// Runs the bench.
pub(crate) async fn run(args: &GuideTableArgs) -> anyhow::Result<Report> {
    let machine = crate::machine::describe();
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    let mut measured = Vec::new();
    for step in &STEPS {
        progress(&format!("guide-table: {}, {} s", step.name, args.seconds));
        let done = measure(step, args).await.with_context(|| step.name)?;
        if let Some(why) = &done.outcome.first_failure {
            notes.push(format!("{}: {} failed, the first with: {why}", step.name, done.outcome.failed));
        }
        rows.push(row(step, &done));
        measured.push(done);
    }
    let (first, last) = (&measured[0].outcome, &measured[STEPS.len() - 1].outcome);
    notes.push(format!(
        "first row to last: throughput x {:.2} (guide: x 3.21), p99 {:+.0} % (guide: -80 %), {} failed requests in \
         the last row",
        last.per_second() / first.per_second(),
        (last.percentile_us(99.0) / first.percentile_us(99.0) - 1.0) * 100.0,
        last.failed
    ));
    let regions =
        REGIONS.iter().map(|r| format!("{} {} slots at {} tokens/s", r.name, r.slots, r.tokens_per_s));
    notes.push(format!(
        "simulated backends: {}; {} is frozen from {:.0} % to {:.0} % of each run",
        regions.collect::<Vec<_>>().join(", "),
        REGIONS[FROZEN].name,
        FREEZE.0 * 100.0,
        (FREEZE.0 + FREEZE.1) * 100.0,
    ));
    notes.push(format!(
        "load: {} clients in a closed loop, {} to {} tokens, seed {}; a client waits 0.5 s after an error",
        args.clients, TOKENS.0, TOKENS.1, args.seed
    ));
    notes.push(
        "p50 and p99: of all requests, failed ones included, from sending to the last byte or the error. cost: what \
         the backends counted (also for answers nobody got) at $2 and $8 per million tokens, over the answered requests"
            .into(),
    );
    Ok(Report { bench: "guide-table", machine, rows, notes })
}

async fn measure(step: &Step, args: &GuideTableArgs) -> anyhow::Result<Measured> {
    let directory = tempfile::tempdir().context("a temporary directory")?;
    let mut mocks = Vec::new();
    for (i, region) in REGIONS.iter().enumerate() {
        let mock = MockArgs {
            model: MODEL.into(),
            slots: region.slots,
            decode_tokens_per_s: region.tokens_per_s,
            jitter: 0.1,
            seed: args.seed + i as u64,
            ..MockArgs::default()
        };
        mocks.push(Mock::start(region.name, &mock, directory.path()).await?);
    }
    let addresses: Vec<SocketAddr> = mocks.iter().map(|mock| mock.address).collect();
    let resources = resources(step, &addresses)?;
    let outcome = {
        let control_plane = ControlPlane::start(&resources).await?;
        let gateway = gateway(&control_plane, &resources, directory.path()).await?;
        let length = Duration::from_secs(args.seconds);
        let (outcome, frozen) =
            tokio::join!(load(gateway.address, args, length), freeze(&mocks[FROZEN], length));
        frozen?;
        control_plane.end().await?;
        outcome
    };
    let mut usd = 0.0;
    for mock in &mocks {
        let stats = mock.stats().await?;
        let tokens = |name: &str| stats[name].as_f64().unwrap_or(0.0);
        usd +=
            tokens("prompt_tokens") * PRICE_INPUT / 1e12 + tokens("generation_tokens") * PRICE_OUTPUT / 1e12;
    }
    let usd_per_1000 = usd / outcome.ok.max(1) as f64 * 1000.0;
    Ok(Measured { outcome, usd_per_1000 })
}

async fn gateway(plane: &ControlPlane, resources: &Resources, directory: &Path) -> anyhow::Result<Gateway> {
    let args =
        GatewayArgs { id: "gateway".into(), control_plane: Some(plane.access()), ..GatewayArgs::default() };
    Gateway::start(&args, resources, directory).await
}

fn resources(step: &Step, addresses: &[SocketAddr]) -> anyhow::Result<Resources> {
    let wire = |d: Duration| Wire::try_from(d).context("a duration");
    let off = wire(Duration::from_secs(24 * 60 * 60))?;
    let policy = if step.weights { BalancingPolicy::WeightedRoundRobin } else { BalancingPolicy::RoundRobin };
    let mut pool = v1::PoolSpec {
        balancing_policy: policy.into(),
        timeouts: Some(v1::Timeouts {
            first_byte: Some(wire(SILENCE_MAX)?),
            idle: Some(wire(SILENCE_MAX)?),
            ..Default::default()
        }),
        ..Default::default()
    };
    if step.health {
        pool.health = Some(v1::HealthProfile {
            liveness_interval: Some(wire(Duration::from_millis(500))?),
            timeout: Some(wire(Duration::from_millis(500))?),
            ..Default::default()
        });
    } else {
        pool.health = Some(v1::HealthProfile {
            liveness_interval: Some(off),
            paid_probes_per_hour: Some(0),
            ..Default::default()
        });
        pool.ejection = Some(v1::Ejection { consecutive_failures: 1000, ..Default::default() });
        pool.retry_budget = Some(v1::RetryBudget { max_attempts: 1, ..Default::default() });
    }
    let mut resources = Resources::basic();
    resources.put("chat", Spec::Pool(pool));
    resources.put(MODEL, Spec::Model(v1::ModelSpec { pool: "chat".into(), ..Default::default() }));
    for (i, (region, address)) in REGIONS.iter().zip(addresses).enumerate() {
        if step.only_one && i != FROZEN {
            continue;
        }
        let slots = if step.concurrency { u32::try_from(region.slots)? } else { 100_000 };
        let mut spec = backend("chat", MODEL, *address, slots);
        spec.region = region.name.into();
        spec.weight = step.weights.then_some(region.capacity().round() as u32);
        resources.put(region.name, Spec::Backend(spec));
    }
    Ok(resources)
}

/// Stops the backend's process in the middle of the run and lets it continue.
async fn freeze(mock: &Mock, length: Duration) -> anyhow::Result<()> {
    let started = Instant::now();
    sleep_until(started + length.mul_f64(FREEZE.0)).await;
    mock.process.signal(Signal::STOP)?;
    sleep_until(started + length.mul_f64(FREEZE.0 + FREEZE.1)).await;
    mock.process.signal(Signal::CONT)
}

async fn load(address: SocketAddr, args: &GuideTableArgs, length: Duration) -> Outcome {
    let started = Instant::now();
    let mut clients = JoinSet::new();
    for client in 0..args.clients {
        let rng = Rng::new(args.seed, u64::from(client));
        clients.spawn(self::client(address, rng, started + length));
    }
    let mut sum = Outcome::new();
    while let Some(done) = clients.join_next().await {
        if let Ok(outcome) = done {
            sum.add(outcome);
        }
    }
    sum.elapsed = started.elapsed();
    sum
}

async fn client(address: SocketAddr, mut rng: Rng, until: Instant) -> Outcome {
    let mut outcome = Outcome::new();
    let mut connection: Option<Connection> = None;
    while Instant::now() < until {
        let tokens = rng.between(TOKENS.0, TOKENS.1);
        let request = load::chat(KEY, MODEL, tokens, true);
        let sent = Instant::now();
        let result = load::call(&mut connection, address, &request).await;
        outcome.count(sent.elapsed(), &result);
        if !result.is_ok_and(|answer| answer.is_ok()) {
            outcome.latency_us.saturating_record(load::micros(sent.elapsed()));
            tokio::time::sleep(BACK_OFF).await;
        }
    }
    outcome
}

fn row(step: &Step, measured: &Measured) -> Row {
    let outcome = &measured.outcome;
    let all = (outcome.ok + outcome.failed).max(1) as f64;
    Row::default()
        .text("configuration", step.name)
        .figure("requests_per_s", outcome.per_second(), 0)
        .figure("guide_requests_per_s", step.guide.requests_per_s, 0)
        .figure("p50_ms", outcome.percentile_us(50.0) / 1e3, 0)
        .figure("p99_ms", outcome.percentile_us(99.0) / 1e3, 0)
        .figure("guide_p99_ms", step.guide.p99_ms, 0)
        .figure("error_percent", outcome.failed as f64 / all * 100.0, 2)
        .figure("guide_error_percent", step.guide.error_percent, 2)
        .figure("cost_usd_per_1000_requests", measured.usd_per_1000, 3)
        .text("has", step.has)
}
