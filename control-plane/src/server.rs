//! Starts and stops a control plane: load, bind, serve, stop.

mod by_size;
mod config;

use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use weir_proto::v1;
use weir_proto::v1::admin_service_server::AdminServiceServer;
use weir_proto::v1::discovery_service_server::DiscoveryServiceServer;
use weir_proto::v1::report_service_server::ReportServiceServer;
use weir_runtime::edge::{self, BusyLayer, Edge, EdgeMetrics};
use weir_runtime::grpc::{HEADER_LIST_BYTES_MAX, Permits, STREAMS_PER_CONNECTION};
use weir_runtime::{AllowedHosts, EgressPolicy, Readiness, Secret, ServerTls, serve_ops_with};

use crate::auth::{Authority, Caller, GatewayTokens, Reach, gated};
use crate::catalog::Catalog;
use crate::gateways::aggregate::Aggregate;
use crate::gateways::membership::Membership;
use crate::gateways::questions::Questions;
use crate::gateways::registry::Registry;
use crate::leader::Candidate;
use crate::metrics::Metrics;
use crate::model::{BOOTSTRAP_SET, Edit, plan};
use crate::page::{self, Feed};
use crate::probe::Prober;
use crate::publish::{Differences, publish};
use crate::services::Shared;
use crate::services::admin::{self, Admin};
use crate::services::discovery::Discovery;
use crate::services::report::Reports;
use crate::store::{EtcdStore, FileStore, MemoryStore, Store};
use crate::tls::TlsConfig;
use crate::verdicts::Verdicts;
use by_size::BySize;
pub use config::{Config, Error, StoreConfig};

/// A whole configuration in one apply, and in one answer.
const APPLY_BYTES_MAX: usize = 64 << 20;
/// Any other call of an operator: one resource, or a few names.
const CALL_BYTES_MAX: usize = 4 << 20;
/// What a gateway holds, by kind, name and version: some 50 to 100 bytes for each of a million resources.
const HELLO_BYTES_MAX: usize = 100 << 20;
/// One report of a gateway: at most 10 000 backends and as many probe results.
const REPORT_BYTES_MAX: usize = 4 << 20;
/// A check of health names a service.
const CHECK_BYTES_MAX: usize = 1 << 10;
/// A gateway that is gone without a word is noticed after so long, and as long again.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Calls still open that long after the stop signal are cut.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that wait to be accepted: every gateway of a large fleet may come back in the same moment.
const BACKLOG: u32 = 4096;
/// Gauges are this fresh.
const MEASURE_INTERVAL: Duration = Duration::from_millis(100);
/// Probes on demand at once.
const PROBES_MAX: usize = 16;
/// What the health service knows: the whole, and each service.
const HEALTH_NAMES: [&str; 4] =
    ["", "weir.v1.AdminService", "weir.v1.DiscoveryService", "weir.v1.ReportService"];

/// The control plane.
#[derive(Debug)]
pub struct ControlPlane;

/// A control plane that serves: where it listens, and when it has ended.
#[derive(Debug)]
pub struct Handle {
    /// Where admin, discovery and report services listen.
    pub grpc_addr: SocketAddr,
    /// Where the live page is, and `/livez`, `/readyz` and `/metrics`.
    pub http_addr: SocketAddr,
    /// The admin token given, or the one made.
    pub admin_token: Secret,
    /// Ends when everything has stopped, after the shutdown signal or on an error.
    pub join: JoinHandle<Result<(), Error>>,
}

impl ControlPlane {
    /// Loads the store, binds and serves until `shutdown`. Returns when it serves. Boxed, so that it is compiled with this crate
    /// and not again with each binary that starts one.
    pub fn start(
        config: Config,
        shutdown: CancellationToken,
    ) -> Pin<Box<dyn Future<Output = Result<Handle, Error>> + Send>> {
        Box::pin(Self::begin(config, shutdown))
    }

    async fn begin(config: Config, shutdown: CancellationToken) -> Result<Handle, Error> {
        let admin_token = config.check()?;
        let egress = EgressPolicy::allowing(&config.allow_backend_cidr).map_err(Error::Config)?;
        let hosts = AllowedHosts::new(&config.ops_allowed_hosts)
            .map_err(|e| Error::Config(format!("ops-allowed-host: {e}")))?;
        let store = open(&config.store).await?;
        let catalog = Arc::new(Catalog::load(Arc::clone(&store)).await?);
        let follow_stop = CancellationToken::new();
        // On any way out but the last, the store is let go of.
        let undo = follow_stop.clone().drop_guard();
        let tasks = TaskTracker::new();
        {
            let (catalog, stop) = (Arc::clone(&catalog), follow_stop.clone());
            tasks.spawn(async move { catalog.follow(stop).await });
        }
        bootstrap(&catalog, &config.bootstrap).await?;
        let tls = config.tls.as_ref().map(TlsConfig::open).transpose();
        let tls = tls.map_err(|e| Error::Config(format!("tls: {e}")))?;
        let (grpc, grpc_addr) = bind("listen", config.listen)?;
        let (http, http_addr) = bind("http-listen", config.http_listen)?;
        let snapshots = watch::Sender::new(catalog.state());
        let authority = authority(&config, &catalog, &admin_token, &tasks, &follow_stop)?;
        let metrics: Arc<Metrics> = Arc::default();
        let name = format!("control-plane-{}", uuid::Uuid::new_v4().simple());
        let mut candidate = Candidate::new(store, name, Arc::clone(&metrics));
        let leads = candidate.leads();
        let verdicts = Verdicts::new(Arc::clone(&metrics), config.store.beside("health.json"), leads.clone());
        let membership = Membership::default();
        let shared = Shared {
            catalog: Arc::clone(&catalog),
            snapshots: snapshots.subscribe(),
            differences: Differences::default(),
            registry: Registry::default(),
            aggregate: Aggregate::new(verdicts.clone(), membership.clone()),
            questions: Questions::default(),
            membership,
            verdicts: verdicts.clone(),
            leads,
            metrics,
            authority,
            initial_syncs: Arc::new(Semaphore::new(initial_syncs())),
            probes: Arc::new(Semaphore::new(PROBES_MAX)),
            tasks,
            stop: shutdown.clone(),
        };
        let revision = catalog.state().revision;
        tracing::info!(grpc = %grpc_addr, http = %http_addr, revision, "control plane serves");
        shared.tasks.spawn(publish(catalog.subscribe(), snapshots, follow_stop.clone()));
        // Before the listener accepts, so that the state from before a restart is used from the start.
        verdicts.configure(&catalog.state());
        // Without other control planes, this one is the leader before the first message is sent.
        candidate.ask().await;
        shared.tasks.spawn(candidate.run(follow_stop.clone()));
        let prober = Prober::new(verdicts.clone(), egress);
        shared.tasks.spawn(verdicts.run(catalog.subscribe(), follow_stop.clone()));
        let registry = shared.registry.clone();
        let connected = move |id: &str| registry.is_connected(id);
        shared.tasks.spawn(shared.aggregate.clone().run(connected, follow_stop.clone()));
        shared.tasks.spawn(prober.run(catalog.subscribe(), follow_stop.clone()));
        shared.tasks.spawn(measure(shared.clone(), follow_stop.clone()));
        let feed: Arc<Feed> = Arc::default();
        shared.tasks.spawn(feed.clone().run(shared.clone(), follow_stop.clone()));
        undo.disarm();
        let loopback = grpc_addr.ip().is_loopback();
        let serving = Serving { shared, feed, tls, loopback, grpc, http, hosts, follow_stop };
        Ok(Handle { grpc_addr, http_addr, admin_token, join: tokio::spawn(serving.run()) })
    }
}

async fn open(config: &StoreConfig) -> Result<Arc<dyn Store>, Error> {
    match config {
        StoreConfig::Memory => Ok(Arc::new(MemoryStore::default())),
        StoreConfig::File(path) => {
            let path = path.clone();
            let opened = tokio::task::spawn_blocking(move || FileStore::open(Path::new(&path))).await;
            Ok(Arc::new(opened.map_err(|e| Error::Failed(e.to_string()))??))
        }
        StoreConfig::Etcd { etcd, .. } => Ok(Arc::new(EtcdStore::open(etcd.clone()).await?)),
    }
}

fn bind(name: &'static str, addr: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let bound = || {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        let listener = socket.listen(BACKLOG)?;
        let local = listener.local_addr()?;
        Ok((listener, local))
    };
    bound().map_err(Error::bind(name, addr))
}

/// The authority over callers: tokens set at the start, tokens of the store, and the directory of gateway tokens.
fn authority(
    config: &Config,
    catalog: &Arc<Catalog>,
    admin_token: &Secret,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> Result<Authority, Error> {
    let bound = GatewayTokens::open(config.gateway_tokens.as_deref())
        .map_err(|e| Error::Config(format!("gateway-tokens-dir: {e}")))?;
    if let Some(directory) = config.gateway_tokens.clone() {
        tasks.spawn(bound.clone().follow(directory, stop.clone()));
    }
    Ok(Authority::new(Arc::clone(catalog), admin_token, config.gateway_token.as_ref(), bound))
}

/// Gateways that may take everything at once: enough to be quick, few enough that those already in sync do not wait.
fn initial_syncs() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    (15 + 5 * cores).min(100)
}

/// The first resources go into a store that has never held any.
async fn bootstrap(catalog: &Catalog, resources: &[v1::Resource]) -> Result<(), Error> {
    if resources.is_empty() {
        return Ok(());
    }
    let revision = catalog.state().head;
    if revision != 0 {
        tracing::info!(revision, "store is not empty; the resources to start with are ignored");
        return Ok(());
    }
    let actor = admin::actor(&Caller::bootstrap(), "Bootstrap");
    let call =
        crate::catalog::Call { request_id: String::new(), digest: [0; 32], validate_only: false, actor };
    let put = |resource: &v1::Resource| {
        Edit::Put(Box::new(v1::Resource { apply_set: BOOTSTRAP_SET.into(), ..resource.clone() }))
    };
    let made = catalog
        .commit(
            &call,
            |state| plan(state, resources.iter().map(put).collect(), admin::options(false, true)),
            |_, state| v1::ApplyResponse { changes: Vec::new(), revision: state.revision },
        )
        .await;
    match made {
        Ok(committed) => {
            if let Some((plan, revision)) = &committed.done {
                admin::log(&call, plan, *revision);
            }
            Ok(())
        }
        Err(crate::catalog::Error::Store(e)) => Err(e.into()),
        Err(e) => Err(Error::Config(format!("bootstrap: {e}"))),
    }
}

/// Keeps the gauges in step.
async fn measure(shared: Shared, stop: CancellationToken) {
    let (mut states, mut gateways) = (shared.catalog.subscribe(), shared.registry.watch());
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    loop {
        let revision = states.borrow_and_update().revision;
        gateways.borrow_and_update();
        let (connected, furthest_behind) = shared.registry.connected();
        let lag = furthest_behind.map(|applied| revision.saturating_sub(applied));
        shared.metrics.revision.set(number(revision));
        shared.metrics.gateways.set(number(connected as u64));
        shared.metrics.applied_lag.set(number(lag.unwrap_or_default()));
        // A thousand acknowledgements of one change cause one update.
        tokio::time::sleep(MEASURE_INTERVAL).await;
        tokio::select! {
            () = stop.cancelled() => return,
            changed = states.changed() => if changed.is_err() { return },
            changed = gateways.changed() => if changed.is_err() { return },
        }
    }
}

/// What is served, and where.
struct Serving {
    shared: Shared,
    feed: Arc<Feed>,
    tls: Option<ServerTls>,
    /// Whether only processes of this machine can connect to gRPC.
    loopback: bool,
    grpc: TcpListener,
    http: TcpListener,
    hosts: AllowedHosts,
    /// Ends what follows the store, once all streams have ended.
    follow_stop: CancellationToken,
}

impl Serving {
    async fn run(self) -> Result<(), Error> {
        let (routes, health) = routes(&self.shared, self.loopback).await?;
        let Self { shared, feed, tls, grpc, http, hosts, follow_stop, .. } = self;
        let (tasks, shutdown) = (shared.tasks.clone(), shared.stop.clone());
        let readiness = Readiness::not_ready("starting");
        let mut registry = prometheus_client::registry::Registry::default();
        shared.metrics.register(&mut registry);
        weir_runtime::register(&mut registry);
        let listeners = EdgeMetrics::new(&mut registry);
        let grpc = Edge::new("grpc", grpc, edge::Bounds::grpc(), listeners.clone());
        let incoming = ReceiverStream::new(edge::incoming(grpc, tls, &tasks, shutdown.clone()));
        let stopping = {
            let (shutdown, readiness) = (shutdown.clone(), readiness.clone());
            async move {
                shutdown.cancelled().await;
                readiness.set(Err("stopping".into()));
                for name in HEALTH_NAMES {
                    health.set_service_status(name, ServingStatus::NotServing).await;
                }
            }
        };
        let server = Server::builder()
            .layer(BusyLayer)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .max_concurrent_streams(STREAMS_PER_CONNECTION)
            .http2_max_header_list_size(HEADER_LIST_BYTES_MAX)
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, stopping);
        let http = Edge::new("http", http, edge::Bounds::operations(), listeners);
        let pages = page::routes(shared, feed);
        let ops = serve_ops_with(http, hosts, readiness.clone(), Arc::new(registry), pages, shutdown.clone());
        readiness.set(Ok(None));
        let ended = {
            let both = async { tokio::join!(server, ops) };
            let cut = async {
                shutdown.cancelled().await;
                tokio::time::sleep(STOP_TIMEOUT).await;
            };
            tokio::select! {
                (server, ()) = both => server.map_err(|e| Error::Failed(e.to_string())),
                () = cut => Ok(()),
            }
        };
        // Streams watch the same signal; what they hold of the store goes with them.
        shutdown.cancel();
        follow_stop.cancel();
        tasks.close();
        tasks.wait().await;
        tracing::info!("control plane stopped");
        ended
    }
}

/// The gRPC services, each behind the gate, and what says whether they serve.
async fn routes(shared: &Shared, loopback: bool) -> Result<(Routes, HealthReporter), Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let health_service = health_service.max_decoding_message_size(CHECK_BYTES_MAX);
    // The store is loaded before the listener accepts, so that no answer is from a partly loaded store.
    for name in HEALTH_NAMES {
        health.set_service_status(name, ServingStatus::Serving).await;
    }
    let described = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(weir_proto::FILE_DESCRIPTOR_SET)
    };
    let wrong = |e: tonic_reflection::server::Error| Error::Failed(e.to_string());
    // Most tools still ask by the older name alone.
    let reflections = (described().build_v1().map_err(wrong)?, described().build_v1alpha().map_err(wrong)?);
    let reflection_reach = if loopback { Reach::Everybody } else { Reach::Authorised };
    let admin = |most| {
        AdminServiceServer::new(Admin::new(shared.clone()))
            .max_decoding_message_size(most)
            .max_encoding_message_size(APPLY_BYTES_MAX)
    };
    let admin = BySize { apply: admin(APPLY_BYTES_MAX), other: admin(CALL_BYTES_MAX) };
    let discovery = DiscoveryServiceServer::new(Discovery(shared.clone()))
        .max_decoding_message_size(HELLO_BYTES_MAX)
        .max_encoding_message_size(APPLY_BYTES_MAX);
    let reports =
        ReportServiceServer::new(Reports(shared.clone())).max_decoding_message_size(REPORT_BYTES_MAX);
    let (authority, permits) = (&shared.authority, Permits::default());
    let routes = Routes::new(gated(health_service, authority.clone(), Reach::Probes, permits.clone()))
        .add_service(gated(reflections.0, authority.clone(), reflection_reach, permits.clone()))
        .add_service(gated(reflections.1, authority.clone(), reflection_reach, permits.clone()))
        .add_service(gated(admin, authority.clone(), Reach::Authorised, permits.clone()))
        .add_service(gated(discovery, authority.clone(), Reach::Authorised, permits.clone()))
        .add_service(gated(reports, authority.clone(), Reach::Authorised, permits));
    Ok((routes, health))
}

#[cfg(test)]
mod tests;
