//! How many full admissions one Redis core decides, the cost of each, and the latency that admission adds to a
//! request.
//!
//! A decision is everything that a request asks of the limiter: six buckets in three scopes (tenant, model, global),
//! a lease of the tenant and one of the backend at admission, then the settlement that corrects the tokens and frees
//! both. The limits are so wide that none refuses, because a refusal is cheaper. Redis is a real `redis-server`; its
//! CPU time is read from `/proc`, so the figure per decision holds however busy the machine is.
//!
//! Afterwards two gateways, one with these limits in Redis and one without limits, get the same requests in turn at
//! fixed rates. The difference of their latencies is what admission adds.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;
use weir_proto::v1::{self, resource::Spec};
use weir_ratelimit::deny_cache::DenyCache;
use weir_ratelimit::quota_prefetch::QuotaPrefetch;
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_ratelimit::{
    Acquire, AnyLimiter, Bucket, Candidate, Cost, Key, Kind, Limiter, Mode, Outcome, Scope, ScopeLimits,
    ServiceStack, Settle, Tally, Usage, scope_keys,
};

use crate::load;
use crate::redis_server::Redis;
use crate::report::{Report, Row, progress};
use crate::resources::{KEY, Resources};
use crate::rng::Rng;
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs};
use crate::stats::{median, spread};

/// Tenants and models of the spread load.
const TENANTS: u64 = 1000;
const MODELS: u64 = 10;
/// Concurrent callers where calls are pipelined.
const CALLERS: usize = 256;
/// The warm-up: scripts are loaded, and the demand is known.
const WARM_UP: Duration = Duration::from_millis(700);
/// The estimated and the actual cost of a request.
const RESERVED: Cost = Cost::of_request(200, 500, 0);
const ACTUAL: Cost = Cost::of_request(200, 300, 0);
const LEASE_TTL: Duration = Duration::from_secs(15);
const HOUR: Duration = Duration::from_secs(3600);
/// The arrival rates at the gateways, the names of their rows, and whether quota is prefetched.
const RATES: [(f64, &str, bool); 4] = [
    (100.0, "added_by_admission_at_100_rps", false),
    (1000.0, "added_by_admission_at_1000_rps", false),
    (1000.0, "added_with_prefetch_at_1000_rps", true),
    (5000.0, "added_by_admission_at_5000_rps", false),
];

/// The arguments of `limiter`.
#[derive(Debug, Args)]
pub(crate) struct LimiterArgs {
    /// Seconds of each mode and of each load at the gateways
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=60), value_name = "SECONDS")]
    seconds: u64,
    /// Rounds over the modes and over the gateways
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20), value_name = "N")]
    rounds: u32,
    /// Only the decisions, without the gateways
    #[arg(long)]
    decisions_only: bool,
}

/// The mode of the decisions.
#[derive(Debug, Clone, Copy)]
struct Asking {
    name: &'static str,
    callers: usize,
    connections: usize,
    tenants: u64,
    models: u64,
    /// Whether calls under the same limits are coalesced.
    coalesce: bool,
    /// Whether quota is prefetched.
    prefetch: bool,
    /// Whether the request is also under limits of concurrency, of a tenant and a backend.
    leases: bool,
    /// Whether settlements record usage, as those of gateways do.
    usage: bool,
    /// Whether the limits are used up, and refusals cached as gateways do.
    refused: bool,
}

/// Commands are sent one at a time.
const UNBATCHED: Asking = Asking {
    name: "unbatched",
    callers: 1,
    connections: 1,
    tenants: TENANTS,
    models: MODELS,
    coalesce: false,
    prefetch: false,
    leases: true,
    usage: false,
    refused: false,
};
/// Waiting calls are pipelined.
const PIPELINED: Asking = Asking { name: "pipelined", callers: CALLERS, connections: 2, ..UNBATCHED };
/// The same with all callers under the same limits: one tenant, one model.
const ONE_TENANT: Asking = Asking { name: "pipelined_one_tenant", tenants: 1, models: 1, ..PIPELINED };

const MODES: [Asking; 9] = [
    UNBATCHED,
    PIPELINED,
    Asking { name: "pipelined_noting_usage", usage: true, ..PIPELINED },
    ONE_TENANT,
    Asking { name: "coalesced", coalesce: true, ..ONE_TENANT },
    // Coalescing if few calls are under the same limits.
    Asking { name: "coalesced_many_tenants", coalesce: true, ..PIPELINED },
    // All six buckets prefetched; leases are always the store's.
    Asking { name: "prefetched_with_leases", coalesce: true, prefetch: true, ..ONE_TENANT },
    // Hot limits without concurrency: no call to the store per request.
    Asking { name: "prefetched", coalesce: true, prefetch: true, leases: false, ..ONE_TENANT },
    // A limit that is used up: most refusals need no call to the store.
    Asking { name: "refused_from_memory", coalesce: true, refused: true, ..ONE_TENANT },
];

/// The result of one round of a mode.
struct Measured {
    per_s: f64,
    redis_cpu_us: f64,
    latency_us: Histogram<u64>,
}

/// Runs the bench.
pub(crate) async fn run(args: &LimiterArgs) -> anyhow::Result<Report> {
    let directory = tempfile::tempdir().context("a temporary directory")?;
    let machine = crate::machine::describe();
    let redis = Redis::start(directory.path()).await?;
    let length = Duration::from_secs(args.seconds);
    let mut rounds: Vec<Vec<Measured>> = MODES.iter().map(|_| Vec::new()).collect();
    for n in 1..=args.rounds {
        progress(&format!("limiter: modes, round {n} of {}", args.rounds));
        for (mode, found) in MODES.iter().zip(&mut rounds) {
            found.push(measure(*mode, &redis, length).await.with_context(|| mode.name)?);
        }
    }
    let mut rows: Vec<Row> = MODES.iter().zip(&rounds).map(|(mode, found)| mode_row(mode, found)).collect();
    if !args.decisions_only {
        progress("limiter: what admission adds at the gateway");
        rows.extend(added(args, &redis, directory.path()).await?);
    }
    let notes = vec![
        "a decision: acquire with 6 buckets in 3 scopes, a tenant's lease and a backend's (not in prefetched), then \
         settle; p50 and p99 are of the acquire alone. pipelined_one_tenant and coalesced differ in coalescing alone, coalesced \
         and prefetched_with_leases in quota prefetch alone. In refused_from_memory a decision is one refusal"
            .into(),
        "decisions per redis core: 1 000 000 / redis_cpu_us_per_decision. decisions_per_s is what one client thread \
         and Redis reached together on this machine."
            .into(),
        format!(
            "added_by_admission: gateway with limits in Redis minus gateway without, open loop, in turn; median over \
             {} rounds of {} s. p99_noise_us: how far the p99 without limits lies apart between rounds.",
            args.rounds, args.seconds
        ),
    ];
    Ok(Report { bench: "limiter", machine, rows, notes })
}

fn mode_row(mode: &Asking, found: &[Measured]) -> Row {
    let mut latency = load::latencies();
    for one in found {
        // Both histograms have the same bounds, so nothing is lost.
        let _ = latency.add(&one.latency_us);
    }
    let cpu = median(found.iter().map(|m| m.redis_cpu_us).collect());
    Row::default()
        .text("mode", mode.name)
        .figure("decisions_per_s", median(found.iter().map(|m| m.per_s).collect()), 0)
        .figure("p50_us", latency.value_at_percentile(50.0) as f64, 0)
        .figure("p99_us", latency.value_at_percentile(99.0) as f64, 0)
        .figure("redis_cpu_us_per_decision", cpu, 1)
        .figure("decisions_per_redis_core_per_s", cpu.map(|us| 1e6 / us), 0)
        .count("callers", mode.callers as u64)
}

async fn measure(mode: Asking, redis: &Redis, length: Duration) -> anyhow::Result<Measured> {
    let options =
        RedisOptions { connections: mode.connections, coalesce: mode.coalesce, ..RedisOptions::default() };
    let store = RedisLimiter::connect(&redis.url(), options).await?;
    let limiter = ServiceStack::new(store.into()).limiter;
    let deny_cache = Arc::new(DenyCache::default());
    let started = Instant::now() + WARM_UP;
    let mut callers = JoinSet::new();
    for caller in 0..mode.callers {
        let (limiter, deny_cache, mut rng) =
            (limiter.clone(), deny_cache.clone(), Rng::new(7, caller as u64));
        callers.spawn(async move {
            let mut latency = load::latencies();
            while started.elapsed() < length {
                let call = call(rng.between(1, mode.tenants), rng.between(1, mode.models), &mode);
                let asked = match mode.refused {
                    true => refuse(&limiter, &deny_cache, &call).await?,
                    false => decide(&limiter, &call, mode.usage).await?,
                };
                if Instant::now() >= started {
                    latency.saturating_record(load::micros(asked));
                }
                // A decision from quota does not wait.
                tokio::task::yield_now().await;
            }
            anyhow::Ok(latency)
        });
    }
    tokio::time::sleep_until(started).await;
    let (cpu_before, since) = (redis.usage().cpu_s, Instant::now());
    let mut latency_us = load::latencies();
    while let Some(done) = callers.join_next().await {
        let _ = latency_us.add(done.context("a caller panicked")??);
    }
    let elapsed = since.elapsed().as_secs_f64();
    let cpu_us = (redis.usage().cpu_s - cpu_before) * 1e6;
    let decisions = latency_us.len().max(1) as f64;
    Ok(Measured { per_s: decisions / elapsed, redis_cpu_us: cpu_us / decisions, latency_us })
}

/// One refusal as gateways decide it. Returns its time.
async fn refuse(
    limiter: &QuotaPrefetch<AnyLimiter>,
    deny_cache: &DenyCache,
    call: &Acquire,
) -> anyhow::Result<Duration> {
    let asked = Instant::now();
    let (decision, _) = deny_cache.acquire(limiter, call).await?;
    let took = asked.elapsed();
    anyhow::ensure!(!matches!(decision.outcome, Outcome::NoSlot { .. }), "no slot");
    Ok(took)
}

/// One full decision. Returns the time of the admission.
async fn decide(
    limiter: &QuotaPrefetch<AnyLimiter>,
    call: &Acquire,
    usage: bool,
) -> anyhow::Result<Duration> {
    let asked = Instant::now();
    let decision = limiter.acquire(call).await?;
    let took = asked.elapsed();
    anyhow::ensure!(matches!(decision.outcome, Outcome::Granted { .. }), "refused: {:?}", decision.outcome);
    let slot = call.candidates.first().map(|c| c.leases.clone());
    let usage = usage.then(|| Usage {
        // Of the tenant, as gateways record it.
        record: Key::usage(call.scopes[0].record.as_str(), "2026-01-01"),
        model: "m".into(),
        tally: Tally::of(&ACTUAL),
    });
    let settle = Settle { id: call.id, actual: ACTUAL, scopes: call.scopes.clone(), slot, usage };
    limiter.settle(&settle).await?;
    Ok(took)
}

fn call(tenant: u64, model: u64, mode: &Asking) -> Acquire {
    let (tenant, model) = (format!("t{tenant}"), format!("m{model}"));
    let mut scopes = [
        scope(Scope::Tenant(&tenant), mode.leases.then_some(100_000), mode.prefetch),
        scope(Scope::Model(&model), None, mode.prefetch),
        scope(Scope::Global, None, mode.prefetch),
    ];
    if mode.refused {
        // A record of its own, which the first request fills for an hour.
        (scopes[0].record, scopes[0].leases) = scope_keys(Scope::Tenant("used-up"));
        scopes[0].buckets[Kind::Tokens as usize] = Some(Bucket { capacity: 700, rate: 700, period: HOUR });
    }
    let backend = Candidate { leases: Key::backend_slots(&model), max_concurrency: 100_000, bound: None };
    Acquire {
        id: Uuid::now_v7(),
        cost: RESERVED,
        estimated: false,
        scopes: scopes.into(),
        candidates: if mode.leases { vec![backend] } else { Vec::new() },
        lease_ttl: LEASE_TTL,
    }
}

/// Requests and tokens so wide that they never refuse; a tenth is set aside if quota is prefetched.
fn scope(scope: Scope<'_>, concurrency: Option<u32>, prefetches: bool) -> ScopeLimits {
    let (record, leases) = scope_keys(scope);
    let (mut buckets, mut prefetch) = ([None; Kind::COUNT], [0; Kind::COUNT]);
    let aside = if prefetches { Bucket::MAX_UNITS / 10 } else { 0 };
    for kind in [Kind::Requests, Kind::Tokens] {
        let whole = Bucket::per_minute(Bucket::MAX_UNITS, 1.0);
        buckets[kind as usize] = Some(Bucket { capacity: whole.capacity - aside, ..whole });
        prefetch[kind as usize] = aside;
    }
    ScopeLimits {
        record,
        leases,
        buckets,
        concurrency,
        mode: Mode::Enforce,
        without_store: weir_ratelimit::WithoutStore::Closed,
        prefetch,
    }
}

async fn added(args: &LimiterArgs, redis: &Redis, directory: &Path) -> anyhow::Result<Vec<Row>> {
    let mock = MockArgs { model: "fast".into(), slots: 100_000, ..MockArgs::default() };
    let mock = Mock::start("mock", &mock, directory).await?;
    let start = async |id: &str, redis: Option<String>, resources: &Resources| {
        let args = GatewayArgs { id: id.into(), redis, ..GatewayArgs::default() };
        Gateway::start(&args, resources, directory).await
    };
    let mut without = Resources::basic();
    without.model_at("fast", mock.address);
    let (mut with, mut prefetching) = (without.clone(), without.clone());
    limit(&mut with, 0);
    limit(&mut prefetching, 10);
    let without = start("without-limits", None, &without).await?;
    let with = start("with-limits", Some(redis.url()), &with).await?;
    let prefetching = start("with-prefetch", Some(redis.url()), &prefetching).await?;

    let request = load::chat(KEY, "fast", 16, false);
    let length = Duration::from_secs(args.seconds);
    let mut rows = Vec::new();
    for (per_second, name, prefetch) in RATES {
        let with = if prefetch { &prefetching } else { &with };
        let mut pairs = Vec::new();
        let mut failed = 0;
        for round in 0..=args.rounds {
            let plain = load::open(without.address, &request, per_second, length).await?;
            let limited = load::open(with.address, &request, per_second, length).await?;
            failed += plain.failed + limited.failed;
            // The first round is a warm-up.
            if round > 0 {
                pairs.push((plain, limited));
            }
        }
        let added = |percent: f64| {
            median(pairs.iter().map(|(a, b)| b.percentile_us(percent) - a.percentile_us(percent)).collect())
        };
        let plain_p99: Vec<f64> = pairs.iter().map(|(plain, _)| plain.percentile_us(99.0)).collect();
        rows.push(
            Row::default()
                .text("mode", name)
                .figure("decisions_per_s", median(pairs.iter().map(|(_, b)| b.per_second()).collect()), 0)
                .figure("p50_us", added(50.0), 0)
                .figure("p99_us", added(99.0), 0)
                .figure("p99_noise_us", spread(&plain_p99), 0)
                .count("failed", failed),
        );
    }
    Ok(rows)
}

fn limit(resources: &mut Resources, prefetch_percent: u32) {
    let wide = |concurrency| v1::Rates {
        requests_per_minute: Some(Bucket::MAX_UNITS),
        tokens_per_minute: Some(Bucket::MAX_UNITS),
        concurrency,
        burst_multiplier: Some(1.0),
        prefetch_percent: (prefetch_percent > 0).then_some(prefetch_percent),
        ..Default::default()
    };
    resources.tenant("acme", KEY, Some(wide(Some(100_000))));
    let model = v1::ModelSpec { pool: "fast".into(), limits: Some(wide(None)), ..Default::default() };
    resources.put("fast", Spec::Model(model));
    resources.put("everything", Spec::Limit(v1::LimitSpec { selector: None, rates: Some(wide(None)) }));
}
