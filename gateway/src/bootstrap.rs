//! Builds a gateway from its settings and runs its tasks. All tasks are tracked and end with one cancellation token.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::from_fn_with_state;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weir_discovery::{Disk, Identity, Link, Subscriber, not_configured};
use weir_proto::resource::Name;
use weir_proto::v1::SubscriberRole;
use weir_ratelimit::fallback::LiveGateways;
use weir_ratelimit::fallback::Phase;
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_ratelimit::{AnyLimiter, Kind, OwnerId};
use weir_runtime::edge::{self, Edge, EdgeMetrics};
use weir_runtime::{AllowedHosts, EgressPolicy, OpsToken, Readiness, ServerTls, guard_ops_page};

use crate::config::Config;
use crate::control::credentials::Credentials;
use crate::control::live_config::LiveConfig;
use crate::control::probe_channel::ProbeChannel;
use crate::control::report::Reporter;
use crate::control::subscription::Publisher;
use crate::control::traffic_report::TrafficCounter;
use crate::http::authentication::Failures;
use crate::http::cors::Cors;
use crate::http::gateway::Gateway;
use crate::http::request_body::BodyMemory;
use crate::http::server::Server;
use crate::limits::ledger::Ledger;
use crate::limits::orphan_reaper::OrphanReaper;
use crate::metrics::{KindLabels, Metrics};
use crate::ops::answers::Answers;
use crate::ops::budget_metrics::BudgetMetrics;
use crate::ops::weight_metrics::WeightMetrics;
use crate::ops::{explain, usage};
use crate::probe::Prober;
use crate::routing::upstream::Resolver;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Why a gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting is invalid; the text names it.
    #[error("{0}")]
    Config(String),
    /// An address cannot be used.
    #[error("cannot listen on {address}: {source}; choose another with {flag}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
        /// The reason.
        source: std::io::Error,
    },
}

/// A running gateway.
#[derive(Debug)]
pub struct Handle {
    /// The address for clients.
    pub address: SocketAddr,
    /// The address of the operations port.
    pub ops_address: SocketAddr,
    /// The configuration in force.
    pub live: Arc<LiveConfig>,
    tasks: TaskTracker,
    serving: CancellationToken,
    server: JoinHandle<Result<(), StartError>>,
}

impl Handle {
    /// Returns when clients are served, which needs a configuration. Until then connections are refused, so that a load
    /// balancer uses another gateway.
    pub async fn serving(&self) {
        self.serving.cancelled().await;
    }

    /// Returns when everything has ended: after the shutdown token was cancelled, or because it could not serve.
    pub async fn ended(self) -> Result<(), StartError> {
        self.tasks.wait().await;
        // A panic is logged by the task itself.
        self.server.await.unwrap_or(Ok(()))
    }
}

/// A gateway that is being started. Boxed, so that the gateway is compiled with this crate and not again with each binary that
/// starts one.
pub type Starting = Pin<Box<dyn Future<Output = Result<Handle, StartError>> + Send>>;

/// Starts a gateway. `limiter` is shared inside a process; `None` creates the limiter of the settings.
pub fn start(
    config: Config,
    limiter: Option<AnyLimiter>,
    shutdown: CancellationToken,
    force: CancellationToken,
) -> Starting {
    start_resolving(config, limiter, Resolver::system(), shutdown, force)
}

/// Starts a gateway with another resolver for hosts of backends.
pub fn start_resolving(
    config: Config,
    limiter: Option<AnyLimiter>,
    resolver: Resolver,
    shutdown: CancellationToken,
    force: CancellationToken,
) -> Starting {
    Box::pin(begin(config, limiter, resolver, shutdown, force))
}

async fn begin(
    config: Config,
    limiter: Option<AnyLimiter>,
    resolver: Resolver,
    shutdown: CancellationToken,
    force: CancellationToken,
) -> Result<Handle, StartError> {
    let settings = Settings::of(&config)?;
    let (clients, address) = reserve(config.listen, "--listen")?;
    let (ops, ops_address) = listen(config.ops_listen, "--ops-listen").await?;
    let limiter = limiter_of(&config, limiter).await?;
    let (traffic, probes) = (Arc::<TrafficCounter>::default(), Arc::<ProbeChannel>::default());
    let (registry, metrics, listeners, live) = counted(settings.egress, resolver, &traffic);
    let holder = OwnerId::of(&settings.identity.incarnation);
    let (ledger, worker) =
        Ledger::new(limiter, holder, live_gateways(&live), metrics.clone(), traffic.clone());
    let (gone, reaper) = OrphanReaper::new(live.clone(), ledger.clone(), metrics.clone(), holder);
    let gateway = Gateway {
        live: live.clone(),
        ledger: ledger.clone(),
        failures: Failures::new(&metrics),
        bodies: BodyMemory::new(config.body_memory_mib << 20, metrics.body_bytes.clone()),
        answer_max: config.answer_max_mib << 20,
        body_bytes_max: settings.body_bytes_max,
        cors: settings.cors,
        metrics: metrics.clone(),
        traffic: traffic.clone(),
        probes: probes.clone(),
    };
    let (identity, links, credentials) = (settings.identity, settings.control_planes, settings.credentials);
    let publisher = Publisher::new(live.clone(), credentials.clone());
    let subscriber = Subscriber::new(publisher, identity.clone(), links.clone(), settings.disk);
    let prober = Prober::new(live.clone(), probes.clone(), ledger.clone(), metrics.clone());
    let (questions, answers) = Answers::new(live.clone(), ledger.clone());
    let reporter =
        Reporter { live: live.clone(), metrics: metrics.clone(), traffic, probes, gone, questions, identity };
    let readiness = Readiness::not_ready("no configuration yet");

    // The settlement worker and the operations port end after the streams.
    let (tasks, serving, drained) = (TaskTracker::new(), CancellationToken::new(), CancellationToken::new());
    tasks.spawn(credentials.run(metrics.credentials_unreadable.clone(), drained.clone()));
    tasks.spawn(subscriber.run(drained.clone()));
    tasks.spawn(prober.run(drained.clone()));
    tasks.spawn(reporter.run(links, drained.clone()));
    tasks.spawn(answers.run(drained.clone()));
    tasks.spawn(reaper.run(drained.clone()));
    tasks.spawn(worker.run(drained.clone()));
    tasks.spawn(weir_runtime::serve_ops_with(
        Edge::new("ops", ops, edge::Bounds::operations(), listeners.clone()),
        settings.ops_hosts,
        readiness.clone(),
        Arc::new(registry),
        pages(&live, &ledger, settings.ops_token),
        drained.clone(),
    ));
    let status = Status { live: live.clone(), ledger, readiness, metrics };
    tasks.spawn(status.run(serving.clone(), shutdown.clone(), drained.clone()));
    let server = Server { tls: settings.tls, gateway: Arc::new(gateway), bounds: config.bounds(), listeners };
    let clients = Clients {
        socket: clients,
        address,
        ops_address,
        server,
        live: live.clone(),
        serving: serving.clone(),
    };
    let server = tasks.spawn(clients.serve(shutdown, force, drained));
    tasks.close();
    Ok(Handle { address, ops_address, live, tasks, serving, server })
}

/// The configuration, which is empty yet, and the metrics of all parts.
fn counted(
    egress: EgressPolicy,
    resolver: Resolver,
    traffic: &Arc<TrafficCounter>,
) -> (Registry, Arc<Metrics>, EdgeMetrics, Arc<LiveConfig>) {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    weir_runtime::register(&mut registry);
    let listeners = EdgeMetrics::new(&mut registry);
    resolver.register(&mut registry);
    let live = Arc::new(LiveConfig::new(egress, resolver));
    registry.register_collector(Box::new(WeightMetrics(live.clone())));
    registry.register_collector(Box::new(BudgetMetrics(traffic.clone())));
    (registry, metrics, listeners, live)
}

/// The number of gateways, for the local share of limits.
fn live_gateways(live: &Arc<LiveConfig>) -> LiveGateways {
    let live = live.clone();
    Arc::new(move || live.live_gateways())
}

/// The pages of the operations port that only its token opens.
fn pages(live: &Arc<LiveConfig>, ledger: &Arc<Ledger>, token: OpsToken) -> Router {
    let pages = explain::page(live.clone(), ledger.clone()).merge(usage::page(live.clone(), ledger.clone()));
    // The token is required for these pages only; unknown paths are 404.
    pages.route_layer(from_fn_with_state(token, guard_ops_page))
}

/// The validated settings, before anything is started.
struct Settings {
    ops_token: OpsToken,
    ops_hosts: AllowedHosts,
    control_planes: Vec<Link>,
    tls: Option<ServerTls>,
    credentials: Arc<Credentials>,
    disk: Option<Disk>,
    identity: Identity,
    egress: EgressPolicy,
    body_bytes_max: usize,
    cors: Cors,
}

impl Settings {
    fn of(config: &Config) -> Result<Self, StartError> {
        let wrong = |flag: &'static str| move |error: String| StartError::Config(format!("{flag}: {error}"));
        let client_cert = config.control_plane_cert.clone().zip(config.control_plane_key.clone());
        let tls = match (&config.tls_cert, &config.tls_key) {
            (Some(certificate), Some(key)) => Some(
                ServerTls::open(certificate, key, &[b"h2", b"http/1.1"])
                    .map_err(|e| wrong("--tls-cert, --tls-key")(e.to_string()))?,
            ),
            _ => None,
        };
        let disk = config.data_dir.as_deref().map(Disk::new).transpose();
        let incarnation = uuid::Uuid::now_v7().to_string();
        Ok(Self {
            ops_token: config.ops_token().map_err(wrong("--ops-token-file"))?,
            ops_hosts: AllowedHosts::new(&config.ops_allowed_hosts).map_err(wrong("--ops-allowed-host"))?,
            control_planes: Link::all(&config.control_plane, config.control_plane_ca.clone(), client_cert)
                .map_err(wrong("--control-plane"))?,
            tls,
            credentials: Credentials::new(&config.credentials, config.own_secrets())
                .map_err(StartError::Config)?,
            disk: disk.map_err(|e| wrong("--data-dir")(e.to_string()))?,
            identity: Identity {
                id: config.id.clone().unwrap_or_else(|| format!("gateway-{}", &incarnation[24..])),
                incarnation,
                role: SubscriberRole::Gateway,
                region: config.region.clone(),
                token: config.token().map_err(StartError::Config)?,
            },
            egress: EgressPolicy::allowing(&config.common.allow_backend_cidr).map_err(StartError::Config)?,
            body_bytes_max: config.body_bytes_max().map_err(wrong("--max-body-mib"))?,
            cors: config.cors().map_err(wrong("--cors-allowed-origin"))?,
        })
    }
}

/// The shared limiter of the process, or the limiter of the settings.
async fn limiter_of(config: &Config, shared: Option<AnyLimiter>) -> Result<AnyLimiter, StartError> {
    if let Some(shared) = shared {
        return Ok(shared);
    }
    let Some(url) = &config.redis else { return Ok(AnyLimiter::from(MemoryLimiter::for_callers_here())) };
    // A short wait for Redis, so that a gateway shares the limits from its first request on. During a store outage it starts
    // with the local share of the limits.
    let options = RedisOptions { cold_start: config.cold_start, ..RedisOptions::default() };
    match RedisLimiter::connect(url, options).await {
        Ok(redis) => Ok(redis.into()),
        Err(error) => {
            tracing::warn!(%error, "redis not reachable; starting with the local share of the limits");
            let redis = RedisLimiter::open(url, options);
            redis.map(AnyLimiter::from).map_err(|e| StartError::Config(format!("--redis: {e}")))
        }
    }
}

async fn listen(address: SocketAddr, flag: &'static str) -> Result<(TcpListener, SocketAddr), StartError> {
    let wrong = |source| StartError::Listen { address, flag, source };
    let listener = TcpListener::bind(address).await.map_err(wrong)?;
    let address = listener.local_addr().map_err(wrong)?;
    Ok((listener, address))
}

/// Binds the address without serving it.
fn reserve(address: SocketAddr, flag: &'static str) -> Result<(TcpSocket, SocketAddr), StartError> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let address = socket.local_addr()?;
        Ok((socket, address))
    };
    bind().map_err(|source| StartError::Listen { address, flag, source })
}

/// The port for clients, bound and not served before there is a configuration.
struct Clients {
    socket: TcpSocket,
    address: SocketAddr,
    ops_address: SocketAddr,
    server: Server,
    live: Arc<LiveConfig>,
    /// Cancelled once clients are served.
    serving: CancellationToken,
}

impl Clients {
    /// Serves until `shutdown` and the drain after it, and cancels `drained` then.
    async fn serve(
        self,
        shutdown: CancellationToken,
        force: CancellationToken,
        drained: CancellationToken,
    ) -> Result<(), StartError> {
        tokio::select! {
            () = self.live.configured() => {}
            () = shutdown.cancelled() => {}
        }
        let done = match self.socket.listen(BACKLOG) {
            Ok(listener) => {
                self.serving.cancel();
                tracing::info!(clients = %self.address, ops = %self.ops_address, "serving");
                self.server.serve(listener, shutdown, force).await;
                Ok(())
            }
            Err(source) => {
                shutdown.cancel();
                Err(StartError::Listen { address: self.address, flag: "--listen", source })
            }
        };
        drained.cancel();
        done
    }
}

/// Updates readiness and gauges.
struct Status {
    live: Arc<LiveConfig>,
    ledger: Arc<Ledger>,
    readiness: Readiness,
    metrics: Arc<Metrics>,
}

impl Status {
    async fn run(self, serving: CancellationToken, shutdown: CancellationToken, drained: CancellationToken) {
        let mut revisions = self.live.revisions();
        let (mut outages, mut lost) = (0, 0);
        let mut known = None;
        loop {
            self.readiness.set(readiness(&self.live, &serving, &shutdown));
            self.show_configuration(&mut known);
            self.show_prefetched();
            let store = self.ledger.limiter.status();
            self.metrics.limit_store_unavailable.set(i64::from(store.phase != Phase::Closed));
            self.metrics.limit_store_pending_records.set(gauge(store.pending));
            self.metrics.limit_store_outages.inc_by(store.opened - outages);
            self.metrics.limit_store_lost_records.inc_by(store.lost - lost);
            (outages, lost) = (store.opened, store.lost);
            self.metrics.waiting.set(gauge(self.ledger.waiting.len()));
            tokio::select! {
                changed = revisions.changed() => if changed.is_err() { return },
                () = serving.cancelled(), if !serving.is_cancelled() => {}
                () = shutdown.cancelled(), if !shutdown.is_cancelled() => {}
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = drained.cancelled() => return,
            }
        }
    }

    /// Updates the metrics of the configuration. `known` is the revision whose backends already have their series.
    fn show_configuration(&self, known: &mut Option<u64>) {
        let (live, metrics) = (&self.live, &self.metrics);
        let snapshot = live.snapshot();
        // A counter that appears with its first event shows no increase, so an alert would miss the event.
        if known.replace(snapshot.revision) != Some(snapshot.revision) {
            metrics.know_backends(snapshot.backends.keys().map(Name::as_str));
        }
        metrics.revision.set(gauge(snapshot.revision));
        metrics.config_age.set(gauge(live.published_for().as_secs()));
        metrics.config_refused.set(gauge(live.config_refused()));
        metrics.control_plane_connected.set(i64::from(live.is_connected()));
    }

    fn show_prefetched(&self) {
        let (store, metrics) = (self.ledger.limiter.store(), &self.metrics);
        metrics.coalesced.set(gauge(store.store().coalesced_calls()));
        let quota = store.status();
        metrics.prefetched_decisions.set(gauge(quota.decided));
        for (kind, held) in Kind::ALL.into_iter().zip(quota.held) {
            metrics.prefetched_units.get_or_create(&KindLabels { kind: kind.name() }).set(gauge(held));
        }
    }
}

/// A count as a gauge, which stays at its largest value.
fn gauge(count: impl TryInto<i64>) -> i64 {
    count.try_into().unwrap_or(i64::MAX)
}

/// Whether clients are served, or why not. Without a control plane they are served from the last configuration.
fn readiness(
    live: &LiveConfig,
    serving: &CancellationToken,
    shutdown: &CancellationToken,
) -> Result<Option<String>, String> {
    let problem = live.problem();
    if shutdown.is_cancelled() {
        Err("draining".to_owned())
    } else if serving.is_cancelled() {
        Ok(problem.map(|problem| problem.to_string()))
    } else {
        Err(not_configured(problem.as_deref().map(String::as_str)))
    }
}
