//! Whether backends get what they are configured for: their share, their slots, no needless probes.
//!
//! - `split`: three gateways, three idle backends of equal speed and unequal weights; requests are counted.
//! - `slots`: four gateways, one backend with 16 slots, four clients per slot; the backend counts its maximum of
//!   concurrent requests.
//! - `probes`: three gateways, one backend; probes that were made and skipped, with and without traffic.

use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use prost_types::Duration as Wire;
use tokio::task::JoinSet;
use weir_proto::v1::{self, resource::Spec};

use crate::fleet::ControlPlane;
use crate::load::{self, Outcome};
use crate::redis_server::Redis;
use crate::report::{Report, Row, progress};
use crate::resources::{KEY, Resources, backend};
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs, fetch};

const MODEL: &str = "gpt-4.1";
/// Weights of the split: those of the guide's three regions.
const WEIGHTS: [u32; 3] = [100, 80, 70];
/// Clients of each gateway: few, so that backends are not busy.
const CLIENTS: usize = 2;
/// The slots of the overloaded backend, and the clients per slot.
const SLOTS: u32 = 16;
const OVERLOAD: usize = 4;
/// The time of the overload.
const OVERLOADED_FOR: Duration = Duration::from_secs(15);
/// The time for which probes are counted, with and without traffic.
const PROBED_FOR: Duration = Duration::from_secs(30);
/// All backends must be healthy within this time.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);

/// How much to send.
#[derive(Debug, Args)]
pub(crate) struct SharesArgs {
    /// Requests of the split
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(1000..=1_000_000))]
    requests: u32,
    /// Only this
    #[arg(long, value_enum)]
    only: Option<Case>,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Case {
    /// Shares by weight
    Split,
    /// Hard slots under overload
    Slots,
    /// Probes made and left out
    Probes,
}

/// Gateways in front of backends.
struct Scene {
    gateways: Vec<Gateway>,
    mocks: Vec<Mock>,
    control_plane: ControlPlane,
    _redis: Redis,
    _directory: tempfile::TempDir,
}

impl Scene {
    /// Starts this number of gateways, and a backend with its weight and slots for each of the others.
    async fn start(
        gateways: usize,
        backends: &[(u32, u32)],
        health: v1::HealthProfile,
        mock: &MockArgs,
    ) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let redis = Redis::start(directory.path()).await?;
        let mut resources = Resources::basic();
        resources.put(MODEL, Spec::Pool(v1::PoolSpec { health: Some(health), ..Default::default() }));
        let mut mocks = Vec::new();
        for (i, (weight, slots)) in backends.iter().enumerate() {
            let mock = Mock::start(&format!("b{i}"), mock, directory.path()).await?;
            let spec =
                v1::BackendSpec { weight: Some(*weight), ..backend(MODEL, MODEL, mock.address, *slots) };
            resources.put(&format!("b{i}"), Spec::Backend(spec));
            mocks.push(mock);
        }
        resources.put(MODEL, Spec::Model(v1::ModelSpec { pool: MODEL.into(), ..Default::default() }));
        let control_plane = ControlPlane::start(&resources).await?;
        let mut started = Vec::new();
        for i in 0..gateways {
            let args = GatewayArgs {
                id: format!("g{i}"),
                redis: Some(format!("redis://127.0.0.1:{}", redis.port)),
                control_plane: Some(control_plane.access()),
                ..GatewayArgs::default()
            };
            started.push(Gateway::start(&args, &resources, directory.path()).await?);
        }
        let scene = Self { gateways: started, mocks, control_plane, _redis: redis, _directory: directory };
        let settled = async {
            let healthy = "state=\"healthy\"";
            while scene.sum(|line| line.starts_with("weir_backend_state") && line.contains(healthy)).await?
                < (gateways * backends.len()) as f64
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(SETTLE_TIMEOUT, settled)
            .await
            .context("the backends were not found healthy")??;
        Ok(scene)
    }

    /// The sum of the matching samples over all gateways.
    async fn sum(&self, wanted: impl Fn(&str) -> bool) -> anyhow::Result<f64> {
        let mut sum = 0.0;
        for gateway in &self.gateways {
            let page = fetch(gateway.ops, "/metrics").await?;
            let values = page.lines().filter(|line| wanted(line)).filter_map(|line| line.rsplit_once(' '));
            sum += values.filter_map(|(_, value)| value.parse::<f64>().ok()).sum::<f64>();
        }
        Ok(sum)
    }

    /// Good answers from each backend.
    async fn answers(&self) -> anyhow::Result<Vec<f64>> {
        let mut answers = Vec::new();
        for i in 0..self.mocks.len() {
            let backend = format!("backend=\"b{i}\"");
            let of = |line: &str| {
                line.starts_with("weir_backend_attempts_total")
                    && line.contains(&backend)
                    && line.contains("outcome=\"ok\"")
            };
            answers.push(self.sum(of).await?);
        }
        Ok(answers)
    }

    /// Loads every gateway with this number of clients.
    async fn load(
        &self,
        clients: usize,
        (tokens, stream): (u64, bool),
        duration: Duration,
    ) -> anyhow::Result<Outcome> {
        let mut loads = JoinSet::new();
        for gateway in &self.gateways {
            let (address, request) = (gateway.address, load::chat(KEY, MODEL, tokens, stream));
            loads.spawn(async move { load::closed(address, &request, clients, duration).await });
        }
        let mut sum = Outcome::new();
        while let Some(done) = loads.join_next().await {
            sum.add(done?);
        }
        Ok(sum)
    }

    async fn end(self) -> anyhow::Result<()> {
        drop((self.gateways, self.mocks));
        self.control_plane.end().await
    }
}

/// Runs the bench.
pub(crate) async fn run(args: &SharesArgs) -> anyhow::Result<Report> {
    let machine = crate::machine::describe();
    let wanted = |case| args.only.is_none_or(|only| only == case);
    let mut rows = Vec::new();
    if wanted(Case::Split) {
        rows.extend(split(args.requests).await?);
    }
    if wanted(Case::Slots) {
        rows.push(slots().await?);
    }
    if wanted(Case::Probes) {
        for busy in [true, false] {
            rows.push(probes(busy).await?);
        }
    }
    let notes = vec![
        format!("split: 3 gateways, {CLIENTS} clients each; off_percent is relative to the configured share"),
        format!("slots: 4 gateways, {} clients for {SLOTS} slots in Redis; most_at_once is counted by the backend", SLOTS as usize * OVERLOAD),
        "probes: of one backend by all of 3 gateways in 30 s, with liveness and readiness each second and deep each 5 s; \
         saved: left out since requests said as much"
            .into(),
    ];
    Ok(Report { bench: "shares", machine, rows, notes })
}

async fn split(requests: u32) -> anyhow::Result<Vec<Row>> {
    // About 2 ms per answer, so that only the weights differ.
    let mock =
        MockArgs { model: MODEL.into(), slots: 1000, decode_tokens_per_s: 500.0, ..MockArgs::default() };
    let scene = Scene::start(3, &WEIGHTS.map(|w| (w, 1000)), v1::HealthProfile::default(), &mock).await?;
    let before = scene.answers().await?;
    let mut failed = 0;
    let seen = loop {
        let load = scene.load(CLIENTS, (1, false), Duration::from_secs(2)).await?;
        failed += load.failed;
        let now = scene.answers().await?;
        let seen: Vec<f64> = now.iter().zip(&before).map(|(now, before)| now - before).collect();
        let sum = seen.iter().sum::<f64>();
        progress(&format!("split: {sum} requests"));
        if sum >= f64::from(requests) {
            break seen;
        }
        anyhow::ensure!(load.ok > 0, "nothing is answered: {:?}", load.first_failure);
    };
    scene.end().await?;
    let (all, weights) = (seen.iter().sum::<f64>(), WEIGHTS.iter().sum::<u32>());
    let row = |(weight, seen): (&u32, &f64)| {
        let (configured, share) = (f64::from(*weight) / f64::from(weights), seen / all);
        Row::default()
            .text("case", format!("split, weight {weight}"))
            .count("requests", *seen as u64)
            .count("failed_requests", failed)
            .figure("configured_percent", configured * 100.0, 2)
            .figure("share_percent", share * 100.0, 2)
            .figure("off_percent", (share / configured - 1.0) * 100.0, 2)
    };
    Ok(WEIGHTS.iter().zip(&seen).map(row).collect())
}

async fn slots() -> anyhow::Result<Row> {
    let mock =
        MockArgs { model: MODEL.into(), slots: 1000, decode_tokens_per_s: 100.0, ..MockArgs::default() };
    // At a short interval, so that probes coincide with requests.
    let seconds = |seconds| Some(Wire { seconds, nanos: 0 });
    let health = v1::HealthProfile {
        readiness_interval: seconds(1),
        deep_interval: seconds(5),
        paid_probes_per_hour: Some(100_000),
        ..Default::default()
    };
    let scene = Scene::start(4, &[(100, SLOTS)], health, &mock).await?;
    let clients = SLOTS as usize * OVERLOAD / 4;
    progress("slots");
    let load = scene.load(clients, (10, false), OVERLOADED_FOR).await?;
    let stats = scene.mocks[0].stats().await?;
    let paid =
        scene.sum(|line| line.starts_with("weir_gateway_probes_total") && !line.contains("liveness")).await?;
    scene.end().await?;
    if let Some(why) = &load.first_failure {
        progress(&format!("first failure: {why}"));
    }
    Ok(Row::default()
        .text("case", format!("slots, {OVERLOAD} x overload"))
        .count("requests", load.ok + load.failed)
        .count("failed_requests", load.failed)
        .text("failures", load.failures_line())
        .figure("slowest_ms_max", load.latency_us.max() as f64 / 1e3, 0)
        .count("paid_probes", paid as u64)
        .count("max_concurrency", u64::from(SLOTS))
        .count("most_at_once", stats["max_in_flight"].as_u64().context("max_in_flight of a mock")?))
}

async fn probes(busy: bool) -> anyhow::Result<Row> {
    let mock =
        MockArgs { model: MODEL.into(), slots: 1000, decode_tokens_per_s: 500.0, ..MockArgs::default() };
    let seconds = |seconds| Some(Wire { seconds, nanos: 0 });
    let health = v1::HealthProfile {
        liveness_interval: seconds(1),
        readiness_interval: seconds(1),
        deep_interval: seconds(5),
        paid_probes_per_hour: Some(100_000),
        ..Default::default()
    };
    let scene = Scene::start(3, &[(100, 1000)], health, &mock).await?;
    let name = if busy { "probes, under traffic" } else { "probes, idle" };
    progress(name);
    if busy {
        // The first round after the traffic began still probes.
        scene.load(CLIENTS, (10, true), Duration::from_secs(3)).await?;
    }
    let before = counts(&scene).await?;
    if busy {
        scene.load(CLIENTS, (10, true), PROBED_FOR).await?;
    } else {
        tokio::time::sleep(PROBED_FOR).await;
    }
    let now = counts(&scene).await?;
    scene.end().await?;
    let row = now.into_iter().zip(before);
    Ok(row.fold(Row::default().text("case", name), |row, ((name, now), (_, before))| {
        row.count(name, (now - before).max(0.0) as u64)
    }))
}

/// With every set of labels.
const ANY: &str = "";

/// Probes that were made and skipped, and their cost.
async fn counts(scene: &Scene) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let mut counts = Vec::new();
    for (name, metric, tier) in [
        ("liveness_probes", "weir_gateway_probes_total", "tier=\"liveness\""),
        ("readiness_probes", "weir_gateway_probes_total", "tier=\"readiness\""),
        ("readiness_saved", "weir_probes_needless_total", "tier=\"readiness\""),
        ("deep_probes", "weir_gateway_probes_total", "tier=\"deep\""),
        ("deep_saved", "weir_probes_needless_total", "tier=\"deep\""),
        ("probe_tokens", "weir_probe_tokens_total", ANY),
    ] {
        let of = |line: &str| line.starts_with(metric) && line.contains(tier);
        counts.push((name, scene.sum(of).await?));
    }
    Ok(counts)
}
