//! What a change costs with many API keys declared: nothing but itself, if all goes well.
//!
//! The control plane and three gateways are processes, with a file store and copies on disk. Keys are applied in batches, then
//! one backend's weight is changed several times and a thousand keys are added. A change counts as in force when every gateway
//! has acknowledged it, its copy on disk included. At the end one gateway is killed and started without a control plane.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Args;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};
use weir_proto::v1::admin_service_client::AdminServiceClient;
use weir_proto::v1::{self, resource::Spec};

use crate::process::Process;
use crate::report::{Report, Row, progress};
use crate::resources::{Resources, backend};
use crate::roles::{ControlPlaneProcess, Gateway, GatewayArgs, Mock, MockArgs};

const MODEL: &str = "gpt-4.1";
const GATEWAYS: usize = 3;
const BACKENDS: usize = 9;
/// Keys of one tenant.
const KEYS_PER_TENANT: usize = 100;
/// Resources in one apply while keys are loaded.
const BATCH: usize = 5000;
/// Keys that are added at once.
const ADDED: usize = 1000;
/// How often keys are added.
const ADDITIONS: usize = 3;
/// The pause between two changes: longer than changes are merged, so that each is sent alone.
const PAUSE: Duration = Duration::from_millis(300);
/// How long the processes are watched doing nothing, to know what they cost anyway.
const IDLE: Duration = Duration::from_secs(3);
/// Every gateway must have a change within this time.
const PATIENCE: Duration = Duration::from_secs(120);

/// How much is declared and how often it is changed.
#[derive(Debug, Args)]
pub(crate) struct ScaleArgs {
    /// Numbers of API keys declared
    #[arg(long, value_delimiter = ',', default_values_t = [1000, 10_000, 100_000], value_name = "N",
          value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    keys: Vec<u32>,
    /// Changes of one weight
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000), value_name = "N")]
    changes: u16,
}

/// Runs it.
pub(crate) async fn run(args: &ScaleArgs) -> anyhow::Result<Report> {
    let machine = crate::machine::describe();
    let mut rows = Vec::new();
    for keys in &args.keys {
        let directory = tempfile::tempdir()?;
        let mut scene = Scene::start(directory.path()).await?;
        rows.push(scene.measure(*keys as usize, args.changes, directory.path()).await?);
    }
    Ok(Report {
        bench: "scale",
        machine,
        rows,
        notes: vec![
            format!("{GATEWAYS} gateways, {BACKENDS} backends, {KEYS_PER_TENANT} keys per tenant"),
            "weight: one backend's weight; added: a thousand new keys in one apply; from before the operator's call until every \
             gateway has acknowledged it, with its copy on disk"
                .into(),
            "cpu_ms: per change of one weight, less what the processes cost without one; of the gateways together".into(),
            "bytes_per_key: resident memory above that without keys; of a gateway, the mean".into(),
            "start_s: of a gateway from its copy on disk without a control plane, until it is ready".into(),
        ],
    })
}

struct Scene {
    /// The address of every backend.
    mock: Mock,
    control_plane: ControlPlaneProcess,
    gateways: Vec<Gateway>,
    admin: AdminServiceClient<Channel>,
    weight: u32,
    /// The store's revision after the last change.
    revision: u64,
}

/// What the processes used.
#[derive(Debug, Clone, Copy)]
struct Cost {
    control_plane_cpu_s: f64,
    gateways_cpu_s: f64,
    control_plane_mib: f64,
    /// Mean of the gateways.
    gateway_mib: f64,
}

impl Scene {
    async fn start(directory: &Path) -> anyhow::Result<Self> {
        let mock = Mock::start(
            "mock",
            &MockArgs { model: MODEL.into(), slots: 100, ..MockArgs::default() },
            directory,
        )
        .await?;
        let control_plane = ControlPlaneProcess::start(None, directory).await?;
        let channel = Endpoint::from_shared(format!("http://{}", control_plane.grpc))?.connect_lazy();
        let admin = AdminServiceClient::new(channel).max_decoding_message_size(64 << 20);
        let mut scene = Self { mock, control_plane, gateways: Vec::new(), admin, weight: 100, revision: 0 };
        let mut resources = Resources::basic();
        resources.put("pool", Spec::Pool(v1::PoolSpec::default()));
        resources.put(MODEL, Spec::Model(v1::ModelSpec { pool: "pool".into(), ..Default::default() }));
        for n in 0..BACKENDS {
            resources.put(&format!("backend-{n}"), Spec::Backend(scene.backend()));
        }
        scene.apply(resources.list()).await?;
        for n in 0..GATEWAYS {
            let args = scene.gateway_args(n);
            scene.gateways.push(Gateway::start(&args, &Resources::default(), directory).await?);
        }
        scene.everywhere().await?;
        Ok(scene)
    }

    fn gateway_args(&self, n: usize) -> GatewayArgs {
        GatewayArgs {
            id: format!("gateway-{n}"),
            control_plane: Some((self.control_plane.grpc, self.control_plane.token.clone())),
            ..GatewayArgs::default()
        }
    }

    fn backend(&self) -> v1::BackendSpec {
        backend("pool", MODEL, self.mock.address, 100)
    }

    async fn measure(&mut self, keys: usize, changes: u16, directory: &Path) -> anyhow::Result<Row> {
        let empty = self.cost();
        let load = Instant::now();
        self.load(keys).await?;
        let load = load.elapsed();
        progress(&format!("{keys} keys: loaded in {load:.1?}"));
        tokio::time::sleep(IDLE).await;
        let before = self.cost();
        tokio::time::sleep(IDLE).await;
        let idle = self.cost().since(before).per(IDLE);
        let full = self.cost();
        let (start, before) = (Instant::now(), self.cost());
        let mut weights = Vec::new();
        for _ in 0..changes {
            tokio::time::sleep(PAUSE).await;
            weights.push(self.change_weight().await?);
        }
        let (elapsed, cost) = (start.elapsed(), self.cost().since(before));
        progress(&format!("{keys} keys: weight changed {changes} times"));
        let mut added = Vec::new();
        for round in 0..ADDITIONS {
            tokio::time::sleep(PAUSE).await;
            let new = (0..ADDED).map(|n| key(keys + round * ADDED + n, keys));
            let (new, start) = (new.collect(), Instant::now());
            self.apply(new).await?;
            self.everywhere().await?;
            added.push(start.elapsed());
        }
        let start = self.start_from_disk(directory).await?;
        let per_change = |cpu_s: f64, idle: f64| {
            (cpu_s - idle * elapsed.as_secs_f64()).max(0.0) * 1e3 / f64::from(changes)
        };
        let bytes = |mib: f64| mib * 1_048_576.0 / keys as f64;
        let (weight_p50, weight_max) = p50_and_max(weights);
        let (added_p50, added_max) = p50_and_max(added);
        Ok(Row::default()
            .count("keys", keys as u64)
            .figure("load_s", load.as_secs_f64(), 1)
            .figure("weight_p50_ms", weight_p50, 1)
            .figure("weight_max_ms", weight_max, 1)
            .figure("added_p50_ms", added_p50, 0)
            .figure("added_max_ms", added_max, 0)
            .figure("control_plane_cpu_ms", per_change(cost.control_plane_cpu_s, idle.control_plane_cpu_s), 1)
            .figure("gateways_cpu_ms", per_change(cost.gateways_cpu_s, idle.gateways_cpu_s), 1)
            .figure("control_plane_bytes_per_key", bytes(full.control_plane_mib - empty.control_plane_mib), 0)
            .figure("gateway_bytes_per_key", bytes(full.gateway_mib - empty.gateway_mib), 0)
            .figure("start_s", start.as_secs_f64(), 2))
    }

    /// Applies tenants and their keys.
    async fn load(&mut self, keys: usize) -> anyhow::Result<()> {
        let tenants: Vec<v1::Resource> = (0..keys.div_ceil(KEYS_PER_TENANT)).map(tenant).collect();
        for batch in tenants.chunks(BATCH) {
            self.apply(batch.to_vec()).await?;
        }
        for first in (0..keys).step_by(BATCH) {
            self.apply((first..keys.min(first + BATCH)).map(|n| key(n, keys)).collect()).await?;
            if first % 100_000 == 0 {
                progress(&format!("{keys} keys: {first} loaded"));
            }
        }
        self.everywhere().await
    }

    async fn change_weight(&mut self) -> anyhow::Result<Duration> {
        self.weight = self.weight % 900 + 1;
        let spec = v1::BackendSpec { weight: Some(self.weight), ..self.backend() };
        let resource =
            v1::Resource { name: "backend-0".into(), spec: Some(Spec::Backend(spec)), ..Default::default() };
        let start = Instant::now();
        self.apply(vec![resource]).await?;
        self.everywhere().await?;
        Ok(start.elapsed())
    }

    /// Kills a gateway and starts it where no control plane is.
    async fn start_from_disk(&mut self, directory: &Path) -> anyhow::Result<Duration> {
        let mut gateway = self.gateways.remove(0);
        gateway.process.kill().await?;
        let nowhere = ([127, 0, 0, 1], 9).into();
        let args = GatewayArgs { control_plane: Some((nowhere, String::new())), ..self.gateway_args(0) };
        let start = Instant::now();
        let gateway = Gateway::start(&args, &Resources::default(), directory).await?;
        let took = start.elapsed();
        self.gateways.push(gateway);
        Ok(took)
    }

    async fn apply(&mut self, resources: Vec<v1::Resource>) -> anyhow::Result<()> {
        let request = self.authorized(v1::ApplyRequest { resources, ..Default::default() });
        let answer = tokio::time::timeout(PATIENCE, self.admin.apply(request)).await.context("apply")?;
        let revision = answer.context("apply")?.into_inner().revision;
        ensure!(revision > self.revision, "an apply changed nothing");
        self.revision = revision;
        Ok(())
    }

    /// Waits until every gateway has acknowledged the newest revision.
    async fn everywhere(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            let timeout = Some(prost_types::Duration { seconds: 5, nanos: 0 });
            let request = self.authorized(v1::WaitAppliedRequest { revision: self.revision, timeout });
            let applied = self.admin.wait_applied(request).await.context("wait applied")?.into_inner();
            if applied.applied as usize == GATEWAYS {
                return Ok(());
            }
            ensure!(applied.refused.is_empty(), "a gateway refuses a part of the configuration: {applied:?}");
            ensure!(start.elapsed() < PATIENCE, "not every gateway has it after {PATIENCE:?}: {applied:?}");
        }
    }

    fn authorized<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        // A base64url token is a valid header value.
        if let Ok(value) = format!("Bearer {}", self.control_plane.token).parse() {
            request.metadata_mut().insert("authorization", value);
        }
        request
    }

    fn cost(&self) -> Cost {
        let usages: Vec<_> = self.gateways.iter().map(|gateway| gateway.process.usage()).collect();
        let control_plane = Process::usage(&self.control_plane.process);
        Cost {
            control_plane_cpu_s: control_plane.cpu_s,
            gateways_cpu_s: usages.iter().map(|usage| usage.cpu_s).sum(),
            control_plane_mib: control_plane.rss_mib,
            gateway_mib: usages.iter().map(|usage| usage.rss_mib).sum::<f64>() / usages.len().max(1) as f64,
        }
    }
}

impl Cost {
    fn since(self, before: Self) -> Self {
        Self {
            control_plane_cpu_s: self.control_plane_cpu_s - before.control_plane_cpu_s,
            gateways_cpu_s: self.gateways_cpu_s - before.gateways_cpu_s,
            ..self
        }
    }

    /// CPU seconds per second.
    fn per(self, time: Duration) -> Self {
        Self {
            control_plane_cpu_s: self.control_plane_cpu_s / time.as_secs_f64(),
            gateways_cpu_s: self.gateways_cpu_s / time.as_secs_f64(),
            ..self
        }
    }
}

/// In milliseconds.
fn p50_and_max(mut times: Vec<Duration>) -> (Option<f64>, Option<f64>) {
    times.sort_unstable();
    let ms = |time: Option<&Duration>| time.map(|time| time.as_secs_f64() * 1e3);
    (ms(times.get(times.len() / 2)), ms(times.last()))
}

fn tenant(n: usize) -> v1::Resource {
    let spec = Some(Spec::Tenant(v1::TenantSpec::default()));
    v1::Resource { name: format!("tenant-{n}"), spec, ..Default::default() }
}

/// A key of one of the tenants that there are with this number of keys.
fn key(n: usize, keys: usize) -> v1::Resource {
    let name = format!("key-{n}");
    let digest = v1::KeyDigest {
        sha256: Sha256::digest(&name).to_vec(),
        prefix: "weir_bench".into(),
        expire_time: None,
    };
    let tenant = format!("tenant-{}", n % keys.div_ceil(KEYS_PER_TENANT));
    let spec = v1::ApiKeySpec { tenant, digests: vec![digest], ..Default::default() };
    v1::Resource { name, spec: Some(Spec::ApiKey(spec)), ..Default::default() }
}
