//! Gateways in front of simulated backends, configured by the copy on disk as after the loss of a control plane.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use mock_llm::{Config as MockConfig, Handle, Server};
use prost::Message;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use weir_discovery::{ConfigState, Disk};
use weir_gateway::Handle as GatewayHandle;
use weir_gateway::config::Config;
use weir_gateway::routing::upstream::Resolver;
use weir_proto::v1::{self, ResourceKind, resource::Spec};
use weir_ratelimit::AnyLimiter;
use weir_runtime::Secret;

use crate::client::Client;

/// The API key that every cluster accepts.
pub const KEY: &str = "weir_test_key";

/// The operations token of every gateway.
pub const OPS_TOKEN: &str = "operations-token-of-the-tests";

/// The digest of a key, by which gateways know it.
pub fn digest(key: &str) -> Vec<u8> {
    Sha256::digest(key).to_vec()
}

/// A simulated backend.
#[derive(Debug)]
pub struct Mock {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its faults and counters.
    pub handle: Handle,
}

/// Starts a simulated backend that ends with `shutdown`.
pub async fn mock(config: MockConfig, shutdown: &CancellationToken) -> Mock {
    let server = Server::bind("127.0.0.1:0", config).await.expect("a mock");
    let (address, handle) = (server.local_addr(), server.handle());
    tokio::spawn(server.run(shutdown.clone()));
    Mock { address, handle }
}

/// A set of resources, by kind and name.
#[derive(Debug, Clone, Default)]
pub struct Resources(BTreeMap<(i32, String), v1::Resource>);

impl Resources {
    /// Adds or replaces one.
    pub fn put(&mut self, name: &str, spec: Spec) -> &mut Self {
        let resource = v1::Resource { name: name.into(), spec: Some(spec), ..Default::default() };
        let kind = weir_proto::resource::kind_of(&resource) as i32;
        self.0.insert((kind, name.into()), resource);
        self
    }

    /// Changes the spec of the resource of this name, which must exist.
    pub fn rebuild(&mut self, name: &str, change: impl FnOnce(&mut Spec)) {
        let found = self.0.iter_mut().find(|((_, known), _)| known == name);
        let (_, resource) = found.unwrap_or_else(|| panic!("no {name}"));
        change(resource.spec.as_mut().expect("a spec"));
    }

    /// Removes the resources of this name.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.0.retain(|(_, known), _| known != name);
        self
    }

    /// A pool `chat`, a model `gpt-4.1` and one backend per mock, a tenant `acme` and its key.
    pub fn in_front_of(mocks: &[Mock]) -> Self {
        Self::at(&mocks.iter().map(|mock| mock.address).collect::<Vec<_>>())
    }

    /// The same in front of the servers at these addresses.
    pub fn at(backends: &[SocketAddr]) -> Self {
        let mut resources = Self::default();
        resources.put("chat", Spec::Pool(v1::PoolSpec::default()));
        for (i, address) in backends.iter().enumerate() {
            let backend = v1::BackendSpec {
                pool: "chat".into(),
                url: format!("http://{address}"),
                models: [("gpt-4.1".to_owned(), String::new())].into(),
                ..Default::default()
            };
            resources.put(&format!("b{i}"), Spec::Backend(backend));
        }
        resources.put("gpt-4.1", Spec::Model(v1::ModelSpec { pool: "chat".into(), ..Default::default() }));
        resources.put("acme", Spec::Tenant(v1::TenantSpec::default()));
        let digest = v1::KeyDigest { sha256: digest(KEY), prefix: "weir_test".into(), expire_time: None };
        let key = v1::ApiKeySpec { tenant: "acme".into(), digests: vec![digest], ..Default::default() };
        resources.put("acme-key", Spec::ApiKey(key));
        resources
    }

    /// The same with limits of the tenant and a number of slots per backend. No probe asks a backend for tokens, so
    /// that every request at a backend is one of the test.
    pub fn limited(mocks: &[Mock], slots: u32, limits: v1::Rates) -> Self {
        let mut resources = Self::in_front_of(mocks);
        let health = v1::HealthProfile { paid_probes_per_hour: Some(0), ..Default::default() };
        resources.put("chat", Spec::Pool(v1::PoolSpec { health: Some(health), ..Default::default() }));
        for i in 0..mocks.len() {
            resources.rebuild(&format!("b{i}"), |spec| {
                let Spec::Backend(spec) = spec else { panic!("a backend") };
                spec.max_concurrency = Some(slots);
            });
        }
        resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
        resources
    }

    /// All resources.
    pub fn all(&self) -> Vec<v1::Resource> {
        self.0.values().cloned().collect()
    }

    /// Writes them as the copy that a gateway with this data directory serves without a control plane.
    pub fn save(&self, directory: &Path) {
        let mut held = ConfigState::new("test", 1);
        for ((kind, name), resource) in &self.0 {
            held.insert(*kind, name, "1", &resource.encode_to_vec());
        }
        assert!(self.0.keys().any(|(kind, _)| *kind == ResourceKind::Pool as i32));
        Disk::new(directory).and_then(|disk| disk.save(&held)).expect("saved");
    }
}

/// The settings of a gateway whose control plane is away.
pub fn gateway_config(data: &Path) -> Config {
    Config {
        listen: ([127, 0, 0, 1], 0).into(),
        ops_listen: ([127, 0, 0, 1], 0).into(),
        ops_token_file: None,
        ops_token: Some(Secret::new(OPS_TOKEN.to_owned())),
        ops_allowed_hosts: Vec::new(),
        // The discard port: nothing listens there.
        control_plane: "http://127.0.0.1:9".into(),
        control_plane_ca: None,
        control_plane_cert: None,
        control_plane_key: None,
        gateway_token_file: None,
        gateway_token: None,
        redis: None,
        cold_start: Default::default(),
        data_dir: Some(data.to_owned()),
        credentials: Default::default(),
        id: None,
        region: String::new(),
        common: Default::default(),
        max_connections: 10_000,
        max_connections_per_address: None,
        body_memory_mib: 1024,
        answer_max_mib: 64,
        tls_cert: None,
        tls_key: None,
        pre_stop: Duration::ZERO,
        drain: Duration::from_secs(30),
        log: "info".into(),
    }
}

/// A gateway in this process.
#[derive(Debug)]
pub struct Gateway {
    /// A client of the gateway.
    pub client: Client,
    /// The gateway.
    pub running: GatewayHandle,
    /// Stops it gracefully.
    pub shutdown: CancellationToken,
    _data: TempDir,
}

/// Starts a gateway that serves these resources from its disk copy.
pub async fn gateway(resources: &Resources, redis: Option<String>) -> Gateway {
    gateway_with(resources, |config| config.redis = redis).await
}

/// The same with settings of the test's own.
pub async fn gateway_with(resources: &Resources, change: impl FnOnce(&mut Config)) -> Gateway {
    start(resources, None, change).await
}

/// The same over a limiter of the test's own.
pub async fn gateway_over(resources: &Resources, limiter: AnyLimiter) -> Gateway {
    start(resources, Some(limiter), |_| {}).await
}

/// The same with a resolver of the test's own for hosts of backends.
pub async fn gateway_resolving(resources: &Resources, resolver: Resolver) -> Gateway {
    start_resolving(resources, None, resolver, |_| {}).await
}

async fn start(
    resources: &Resources,
    limiter: Option<AnyLimiter>,
    change: impl FnOnce(&mut Config),
) -> Gateway {
    start_resolving(resources, limiter, Resolver::system(), change).await
}

async fn start_resolving(
    resources: &Resources,
    limiter: Option<AnyLimiter>,
    resolver: Resolver,
    change: impl FnOnce(&mut Config),
) -> Gateway {
    let data = tempfile::tempdir().expect("a directory");
    resources.save(data.path());
    let shutdown = CancellationToken::new();
    let mut config = gateway_config(data.path());
    change(&mut config);
    let force = CancellationToken::new();
    let running = weir_gateway::start_resolving(config, limiter, resolver, shutdown.clone(), force);
    let running = running.await.expect("starts");
    running.serving().await;
    Gateway { client: Client::new(running.address, KEY), running, shutdown, _data: data }
}
