//! How long until every gateway of a large fleet has a change, and what that costs the control plane.
//!
//! The control plane is a process with a file store. The gateways are streams of this process that speak the whole
//! protocol without serving clients: each holds what it receives, acknowledges it, reports its load every second, and
//! answers its probe assignments. Times count from before the operator's call, or from the verdict's own time, until
//! a gateway has taken the change. Both sides share the machine, so the figures include the clients' load.

mod subscriber;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Args;
use tokio::time::Instant;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};
use weir_proto::v1::admin_service_client::AdminServiceClient;
use weir_proto::v1::{self, resource::Spec};

use self::subscriber::Fleet;
use crate::report::{Report, Row, progress};
use crate::resources::{Resources, backend};
use crate::roles::{ControlPlaneProcess, Mock, MockArgs};

const MODEL: &str = "gpt-4.1";
/// Backends in one pool.
const POOL: usize = 5;
/// The pause between two changes: longer than changes are merged, so that each is sent alone.
const PAUSE: Duration = Duration::from_millis(300);
/// Every gateway must have a change, or be connected, within this time.
const PATIENCE: Duration = Duration::from_secs(60);
/// One in this number of gateways stops reading.
const STALLED_ONE_IN: usize = 20;

/// How large the fleet is and how often it is told something.
#[derive(Debug, Args)]
pub(crate) struct FanoutArgs {
    /// Sizes of the fleet
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000, 4000], value_name = "N",
          value_parser = clap::value_parser!(u32).range(2..=9000))]
    gateways: Vec<u32>,
    /// Backends they are told of
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(5..=5000), value_name = "N")]
    backends: u16,
    /// Changes of each kind
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000), value_name = "N")]
    changes: u16,
}

/// Runs it.
pub(crate) async fn run(args: &FanoutArgs) -> anyhow::Result<Report> {
    let machine = crate::machine::describe();
    let mut rows = Vec::new();
    for gateways in &args.gateways {
        let directory = tempfile::tempdir()?;
        let scene = Scene::start(*gateways as usize, args.backends, directory.path()).await?;
        rows.extend(scene.measure(args.changes, directory.path()).await?);
    }
    Ok(Report {
        bench: "fanout",
        machine,
        rows,
        notes: vec![
            "times: from before the operator's call (config), from the verdict (health), from the control plane's first \
             line after kill -9 (restart), until a gateway has it"
                .into(),
            "bytes_resent: bodies of resources sent; cpu_ms: of the control plane, per change; rss: of the control plane"
                .into(),
            format!(
                "{} backends; every gateway reports the load of 10 of them each second and is told the fleet's load",
                args.backends
            ),
        ],
    })
}

struct Scene {
    /// The address of every backend.
    _mock: Mock,
    control_plane: ControlPlaneProcess,
    admin: AdminServiceClient<Channel>,
    fleet: Fleet,
    backends: BTreeMap<String, v1::BackendSpec>,
    /// The store's revision after the last change.
    revision: u64,
    /// Resident memory before the first connection, MiB.
    rss_idle_mib: f64,
    connected_in: Duration,
}

/// The figures of a row.
struct Measured {
    change: &'static str,
    delays: Vec<Duration>,
    bytes: u64,
    cpu_s: f64,
    changes: u32,
}

impl Scene {
    async fn start(gateways: usize, backends: u16, directory: &Path) -> anyhow::Result<Self> {
        progress(&format!("{gateways} gateways, {backends} backends"));
        // Before gateways connect, the control plane probes itself. The probe results of the simulated gateways are
        // invented.
        let mock = Mock::start(
            "mock",
            &MockArgs { model: MODEL.into(), slots: 100, ..MockArgs::default() },
            directory,
        )
        .await?;
        let mut resources = Resources::basic();
        let mut specs = BTreeMap::new();
        for i in 0..usize::from(backends) {
            let pool = format!("pool-{}", i / POOL);
            resources.put(&pool, Spec::Pool(v1::PoolSpec::default()));
            let name = format!("backend-{i}");
            let spec = backend(&pool, MODEL, mock.address, 100);
            resources.put(&name, Spec::Backend(spec.clone()));
            specs.insert(name, spec);
        }
        resources.put(MODEL, Spec::Model(v1::ModelSpec { pool: "pool-0".into(), ..Default::default() }));
        let control_plane = ControlPlaneProcess::start(None, directory).await?;
        let channel = Endpoint::from_shared(format!("http://{}", control_plane.grpc))?.connect_lazy();
        let mut scene = Self {
            _mock: mock,
            fleet: Fleet::new(control_plane.grpc, &control_plane.token, gateways, usize::from(backends)),
            admin: AdminServiceClient::new(channel),
            control_plane,
            backends: specs,
            revision: 0,
            rss_idle_mib: 0.0,
            connected_in: Duration::ZERO,
        };
        scene.apply(resources.list()).await?;
        scene.rss_idle_mib = scene.control_plane.process.usage().rss_mib;
        let start = Instant::now();
        scene.fleet.start();
        scene.connected(start).await?;
        scene.connected_in = start.elapsed();
        // The first probe results are in, so every backend is known to work.
        tokio::time::timeout(PATIENCE, scene.fleet.everything_healthy())
            .await
            .context("not every backend was found healthy")?;
        Ok(scene)
    }

    async fn measure(mut self, changes: u16, directory: &Path) -> anyhow::Result<Vec<Row>> {
        let rss_mib = self.control_plane.process.usage().rss_mib;
        let kib = (rss_mib - self.rss_idle_mib) * 1024.0 / self.fleet.len() as f64;
        let mut all = vec![self.first_sync()];
        all.push(self.config("config", changes, 1).await?);
        all.push(self.config("config_all_backends", changes, self.backends.len()).await?);
        all.push(self.health(changes).await?);
        self.fleet.stall(self.fleet.len().div_ceil(STALLED_ONE_IN));
        let before = self.control_plane.process.usage().rss_mib;
        all.push(self.config("config_5_percent_stalled", changes, self.backends.len()).await?);
        let stalled_mib = self.control_plane.process.usage().rss_mib - before;
        self.fleet.stall(0);
        self.everybody_has(self.revision).await?;
        all.push(self.restart(directory).await?);
        // A gateway that had missed a change would hold something else now.
        self.everybody_has(self.revision).await?;
        self.fleet.check_held(self.revision)?;
        let gateways = self.fleet.len() as u64;
        let rows = all.into_iter().map(|measured| {
            let stalled = measured.change == "config_5_percent_stalled";
            measured.row(gateways).figure("rss_mib", rss_mib, 0).figure("rss_kib_per_gateway", kib, 0).figure(
                "rss_growth_mib",
                stalled.then_some(stalled_mib),
                1,
            )
        });
        Ok(rows.collect())
    }

    fn first_sync(&self) -> Measured {
        Measured {
            change: "first_sync",
            delays: self.fleet.delays_to(self.revision, self.fleet.started()),
            bytes: self.fleet.body_bytes(),
            cpu_s: self.control_plane.process.usage().cpu_s,
            changes: 1,
        }
    }

    /// Changes the weight of this number of backends at once, several times.
    async fn config(&mut self, change: &'static str, changes: u16, width: usize) -> anyhow::Result<Measured> {
        progress(&format!("{} gateways: {change}", self.fleet.len()));
        let (bytes, cpu) = (self.fleet.body_bytes(), self.control_plane.process.usage().cpu_s);
        let mut delays = Vec::new();
        for i in 0..usize::from(changes) {
            tokio::time::sleep(PAUSE).await;
            let names: Vec<String> = self.backends.keys().cloned().collect();
            let mut changed = Vec::new();
            for name in names.iter().cycle().skip(i * width).take(width) {
                let spec = self.backends.get_mut(name).context("a backend")?;
                spec.weight = Some(spec.weight.unwrap_or(100) % 900 + 1);
                let spec = Some(Spec::Backend(spec.clone()));
                changed.push(v1::Resource { name: name.clone(), spec, ..Default::default() });
            }
            let start = Instant::now();
            self.apply(changed).await?;
            self.everybody_has(self.revision).await?;
            delays.extend(self.fleet.delays_to(self.revision, start));
        }
        Ok(Measured {
            change,
            delays,
            bytes: self.fleet.body_bytes() - bytes,
            cpu_s: self.control_plane.process.usage().cpu_s - cpu,
            changes: changes.into(),
        })
    }

    /// Breaks one backend after the other.
    async fn health(&mut self, changes: u16) -> anyhow::Result<Measured> {
        progress(&format!("{} gateways: health", self.fleet.len()));
        let (bytes, cpu) = (self.fleet.body_bytes(), self.control_plane.process.usage().cpu_s);
        let mut delays = Vec::new();
        let names: Vec<String> = self.backends.keys().cloned().collect();
        for i in 0..usize::from(changes) {
            tokio::time::sleep(PAUSE).await;
            // In another pool each time, because a pool keeps most of its backends whatever the probes say.
            let name = &names[(i * POOL + i / (names.len() / POOL).max(1)) % names.len()];
            self.fleet.break_backend(Some(name.clone()));
            let told = tokio::time::timeout(PATIENCE, self.fleet.everybody_told(name));
            delays.extend(told.await.with_context(|| format!("{name} was not found unhealthy by all"))?);
            self.fleet.break_backend(None);
        }
        Ok(Measured {
            change: "health",
            delays,
            bytes: self.fleet.body_bytes() - bytes,
            cpu_s: self.control_plane.process.usage().cpu_s - cpu,
            changes: changes.into(),
        })
    }

    /// Kills the control plane and starts it again unchanged: every gateway reconnects at once.
    async fn restart(&mut self, directory: &Path) -> anyhow::Result<Measured> {
        progress(&format!("{} gateways: restart", self.fleet.len()));
        let bytes = self.fleet.body_bytes();
        self.control_plane.process.kill().await?;
        self.fleet.nobody_connected().await;
        let addresses = (self.control_plane.grpc, self.control_plane.http);
        self.control_plane = ControlPlaneProcess::start(Some(addresses), directory).await?;
        let start = Instant::now();
        self.connected(start).await?;
        Ok(Measured {
            change: "restart",
            delays: self.fleet.delays_to_connect(start),
            bytes: self.fleet.body_bytes() - bytes,
            cpu_s: self.control_plane.process.usage().cpu_s,
            changes: 1,
        })
    }

    /// Waits until the control plane counts every gateway as being at the newest revision.
    async fn connected(&mut self, start: Instant) -> anyhow::Result<()> {
        let all = u32::try_from(self.fleet.len())?;
        loop {
            let request = v1::WaitAppliedRequest { revision: self.revision, timeout: Some(seconds(1)) };
            let applied = self.admin.wait_applied(self.fleet.authorized(request)).await;
            match applied.map(tonic::Response::into_inner) {
                Ok(applied) if applied.applied == all => return Ok(()),
                Ok(applied) if start.elapsed() > PATIENCE => {
                    anyhow::bail!(
                        "{} of {all} gateways are there after {PATIENCE:?}; streams ended: {:?}",
                        applied.applied,
                        self.fleet.errors()
                    )
                }
                Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(status) if start.elapsed() > PATIENCE => anyhow::bail!("wait applied: {status}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn everybody_has(&self, revision: u64) -> anyhow::Result<()> {
        let all = tokio::time::timeout(PATIENCE, self.fleet.everybody_has(revision)).await;
        all.with_context(|| format!("not every gateway had revision {revision} within {PATIENCE:?}"))
    }

    async fn apply(&mut self, resources: Vec<v1::Resource>) -> anyhow::Result<()> {
        let request = v1::ApplyRequest { resources, ..Default::default() };
        let answer = self.admin.apply(self.fleet.authorized(request)).await.context("apply")?.into_inner();
        ensure!(answer.revision > self.revision, "an apply changed nothing");
        self.revision = answer.revision;
        Ok(())
    }
}

impl Measured {
    fn row(mut self, gateways: u64) -> Row {
        self.delays.sort_unstable();
        let ms = |delay: Option<&Duration>| delay.map(|d| d.as_secs_f64() * 1e3);
        let at = |share: f64| {
            let rank = (self.delays.len() as f64 * share).ceil() as usize;
            ms(self.delays.get(rank.saturating_sub(1)))
        };
        Row::default()
            .count("gateways", gateways)
            .text("change", self.change)
            .figure("p50_ms", at(0.50), 1)
            .figure("p99_ms", at(0.99), 1)
            .figure("max_ms", ms(self.delays.last()), 1)
            .count("bytes_resent", self.bytes)
            .figure("cpu_ms", self.cpu_s * 1e3 / f64::from(self.changes), 1)
    }
}

fn seconds(seconds: i64) -> prost_types::Duration {
    prost_types::Duration { seconds, nanos: 0 }
}

/// A request with the bearer token.
fn authorized<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    // A base64url token is a valid header value.
    if let Ok(value) = format!("Bearer {token}").parse() {
        request.metadata_mut().insert("authorization", value);
    }
    request
}
