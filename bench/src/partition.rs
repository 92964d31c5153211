//! A backend that one gateway cannot reach stays in use for all others, and no client notices.
//!
//! Five gateways as processes, three backends that answer in 100 ms, and a request rate over all gateways. A relay in
//! front of one backend knows gateways by the credential they send and goes dark for some of them: for one of five,
//! and for three of five, while the others still reach it. The backend is healthy all the time, so every verdict
//! against it is false.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use prost_types::Duration as Wire;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};

use crate::failover::Relay;
use crate::fleet::ControlPlane;
use crate::load::{self, Outcome};
use crate::report::{Report, Row, progress};
use crate::resources::{KEY, Resources, backend};
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs, fetch};

const MODEL: &str = "gpt-4.1";
const GATEWAYS: usize = 5;
const BACKENDS: usize = 3;
/// The backend that some cannot reach.
const VICTIM: &str = "b0";
const PER_SECOND: f64 = 100.0;
const TOKENS: u64 = 10;
const TOKENS_PER_S: f64 = 100.0;
/// The variable with the credential by which the relay knows a gateway.
const CREDENTIAL: &str = "PARTITION_CREDENTIAL";
/// Traffic before the first cut, so that usual latencies are known.
const WARM_UP: Duration = Duration::from_secs(3);
/// The time of a cut: several rounds of probes and their confirmation.
const CUT: Duration = Duration::from_secs(6);
/// The time between two cuts.
const REST: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);

/// What to cut and how often.
#[derive(Debug, Args)]
pub(crate) struct PartitionArgs {
    /// Cuts of each kind
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000), value_name = "N")]
    trials: u16,
}

/// The results of one kind of cut.
#[derive(Debug)]
struct Found {
    /// Trials in which a gateway got the verdict that the backend is unhealthy.
    ejections: u64,
    /// Cut-off gateways that ejected it by themselves, over all trials.
    kept_away: u64,
    load: Outcome,
}

/// Runs the bench.
pub(crate) async fn run(args: &PartitionArgs) -> anyhow::Result<Report> {
    let machine = crate::machine::describe();
    let mut rows = Vec::new();
    for cut_off in [1, 3] {
        let found = cuts(cut_off, args.trials).await?;
        rows.push(
            Row::default()
                .text("case", format!("{cut_off} of {GATEWAYS} gateways cut off from a backend that is well"))
                .count("trials", u64::from(args.trials))
                .count("cluster_ejections", found.ejections)
                .count("kept_away_locally", found.kept_away)
                .count("of_cut_off", u64::from(args.trials) * cut_off as u64)
                .count("requests", found.load.ok + found.load.failed)
                .count("failed_requests", found.load.failed)
                .text("failures", found.load.failures_line())
                .figure("slowest_ms_max", found.load.latency_us.max() as f64 / 1e3, 0),
        );
    }
    let notes = vec![
        format!(
            "{GATEWAYS} gateways, {BACKENDS} backends that answer in 100 ms, {PER_SECOND} requests/s; a cut lasts {} s and passes nothing",
            CUT.as_secs()
        ),
        "liveness is probed each second instead of each five, so that a cut sees several rounds".into(),
        "the gateways that are cut off are others in each trial".into(),
    ];
    Ok(Report { bench: "partition", machine, rows, notes })
}

fn id(gateway: usize) -> String {
    format!("g{gateway}")
}

/// Gateways in front of backends, one of which is behind a relay.
struct Scene {
    control_plane: ControlPlane,
    gateways: Vec<Gateway>,
    relay: Relay,
    _mocks: Vec<Mock>,
    _directory: tempfile::TempDir,
}

impl Scene {
    async fn start() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let args = MockArgs {
            model: MODEL.into(),
            slots: 1000,
            decode_tokens_per_s: TOKENS_PER_S,
            ..MockArgs::default()
        };
        let mut mocks = Vec::new();
        for i in 0..BACKENDS {
            mocks.push(Mock::start(&format!("b{i}"), &args, directory.path()).await?);
        }
        let relay = Relay::start(mocks[0].address).await?;
        let resources = resources(&mocks, &relay);
        let control_plane = ControlPlane::start(&resources).await?;
        let mut gateways = Vec::new();
        for i in 0..GATEWAYS {
            let args = GatewayArgs {
                id: id(i),
                control_plane: Some(control_plane.access()),
                env: vec![(CREDENTIAL.into(), id(i))],
                ..GatewayArgs::default()
            };
            gateways.push(Gateway::start(&args, &resources, directory.path()).await?);
        }
        Ok(Self { control_plane, gateways, relay, _mocks: mocks, _directory: directory })
    }

    /// Waits until every gateway finds the backend healthy.
    async fn settle(&self) -> anyhow::Result<()> {
        let settled = async {
            while states(&self.gateways).await?.iter().any(|(state, _)| state != "healthy") {
                tokio::time::sleep(POLL_INTERVAL).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(SETTLE_TIMEOUT, settled).await.context("the backend was not found healthy")?
    }

    /// Cuts gateways off for a while. Returns whether the cluster ejected the backend, and the cut-off gateways that
    /// ejected it by themselves.
    async fn cut(&self, cut: &BTreeSet<String>) -> anyhow::Result<(bool, BTreeSet<usize>)> {
        self.relay.cut_off(cut.clone());
        let at = Instant::now();
        let (mut ejected_by_cluster, mut away) = (false, BTreeSet::new());
        while at.elapsed() < CUT {
            tokio::time::sleep(POLL_INTERVAL).await;
            for (i, (state, ejected)) in states(&self.gateways).await?.into_iter().enumerate() {
                ejected_by_cluster |= state == "unhealthy";
                if ejected && cut.contains(&id(i)) {
                    away.insert(i);
                }
            }
        }
        self.relay.cut_off(BTreeSet::new());
        let rest = Instant::now();
        while rest.elapsed() < REST {
            tokio::time::sleep(POLL_INTERVAL).await;
            ejected_by_cluster |= states(&self.gateways).await?.iter().any(|(state, _)| state == "unhealthy");
        }
        Ok((ejected_by_cluster, away))
    }
}

fn resources(mocks: &[Mock], relay: &Relay) -> Resources {
    let second = Some(Wire { seconds: 1, nanos: 0 });
    let health = v1::HealthProfile { liveness_interval: second, timeout: second, ..Default::default() };
    let mut resources = Resources::basic();
    let hedging = Some(v1::Hedging { unary: true, ..Default::default() });
    resources.put(MODEL, Spec::Pool(v1::PoolSpec { health: Some(health), hedging, ..Default::default() }));
    for (i, mock) in mocks.iter().enumerate() {
        let address = if i == 0 { relay.address } else { mock.address };
        let spec = v1::BackendSpec {
            credential: format!("env:{CREDENTIAL}"),
            ..backend(MODEL, MODEL, address, 1000)
        };
        resources.put(&format!("b{i}"), Spec::Backend(spec));
    }
    resources.put(MODEL, Spec::Model(v1::ModelSpec { pool: MODEL.into(), ..Default::default() }));
    resources
}

async fn cuts(cut_off: usize, trials: u16) -> anyhow::Result<Found> {
    let scene = Scene::start().await?;
    scene.settle().await?;
    let (enough, mut loads) = (CancellationToken::new(), JoinSet::new());
    let most = WARM_UP + (CUT + REST) * u32::from(trials) * 2;
    for gateway in &scene.gateways {
        let (address, request) = (gateway.address, load::chat(KEY, MODEL, TOKENS, false));
        let enough = enough.clone();
        let each = PER_SECOND / GATEWAYS as f64;
        loads.spawn(async move { load::open_until(address, &request, each, most, &enough).await });
    }
    tokio::time::sleep(WARM_UP).await;
    let (mut ejections, mut kept_away) = (0, 0);
    for trial in 0..usize::from(trials) {
        let cut: BTreeSet<String> = (0..cut_off).map(|k| id((trial + k) % GATEWAYS)).collect();
        let (ejected, away) = scene.cut(&cut).await?;
        progress(&format!(
            "{cut_off} of {GATEWAYS}, {}: ejected by the cluster: {ejected}, kept away: {away:?}",
            trial + 1
        ));
        ejections += u64::from(ejected);
        kept_away += away.len() as u64;
    }
    enough.cancel();
    let mut load = Outcome::new();
    while let Some(done) = loads.join_next().await {
        load.add(done??);
    }
    if let Some(why) = &load.first_failure {
        progress(&format!("first failure: {why}"));
    }
    let Scene { control_plane, gateways, .. } = scene;
    drop(gateways);
    control_plane.end().await?;
    Ok(Found { ejections, kept_away, load })
}

/// The verdict that each gateway has, and whether it ejects the backend by itself.
async fn states(gateways: &[Gateway]) -> anyhow::Result<Vec<(String, bool)>> {
    let mut states = Vec::new();
    for gateway in gateways {
        states.push(state(&fetch(gateway.ops, "/metrics").await?));
    }
    Ok(states)
}

fn state(page: &str) -> (String, bool) {
    let victim = format!("backend=\"{VICTIM}\"");
    let of = |name: &str| page.lines().filter(move |l| l.starts_with(name)).find(|l| l.contains(&victim));
    let told = of("weir_backend_state").and_then(|line| line.split("state=\"").nth(1)?.split('"').next());
    let ejected = of("weir_backend_ejected").is_some_and(|line| !line.ends_with(" 0.0"));
    (told.unwrap_or_default().to_owned(), ejected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_says_what_a_gateway_was_told_and_does() {
        let page = "weir_backend_ejected{backend=\"b0\"} 1.0\n\
            weir_backend_ejected{backend=\"b1\"} 0.0\n\
            weir_backend_state{backend=\"b1\",state=\"unhealthy\"} 1.0\n\
            weir_backend_state{backend=\"b0\",state=\"healthy\"} 1.0\n";
        assert_eq!(state(page), ("healthy".to_owned(), true));
    }
}
