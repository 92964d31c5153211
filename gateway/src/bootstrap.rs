//! Wiring: settings -> parts -> running tasks, all tracked and all ended by one token.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::from_fn_with_state;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weir_discovery::{Disk, Identity, Link, Subscriber};
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
use crate::http::gateway::Gateway;
use crate::http::request_body::BodyMemory;
use crate::http::server::Server;
use crate::limits::ledger::Ledger;
use crate::limits::orphan_reaper::OrphanReaper;
use crate::metrics::{KindLabels, Metrics};
use crate::ops::weight_metrics::WeightMetrics;
use crate::ops::{explain, usage};
use crate::probe::Prober;
use crate::routing::upstream::Resolver;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Why a gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting is wrong; says which.
    #[error("{0}")]
    Config(String),
    /// An address cannot be used.
    #[error("cannot listen on {address}: {source}; choose another with {flag}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

/// A gateway that runs.
#[derive(Debug)]
pub struct Handle {
    /// Where clients are served.
    pub address: SocketAddr,
    /// Where operations are served.
    pub ops_address: SocketAddr,
    /// The configuration in force.
    pub live: Arc<LiveConfig>,
    tasks: TaskTracker,
    serving: CancellationToken,
    server: JoinHandle<Result<(), StartError>>,
}

impl Handle {
    /// Returns once clients are served, which takes a configuration. Until then their connections are refused, so
    /// that a load balancer takes another gateway instead of an answer that nobody can use.
    pub async fn serving(&self) {
        self.serving.cancelled().await;
    }

    /// Returns when everything has ended: after the shutdown token was cancelled, or because it could not serve.
    pub async fn ended(self) -> Result<(), StartError> {
        self.tasks.wait().await;
        // A task that panicked has said so itself.
        self.server.await.unwrap_or(Ok(()))
    }
}

/// Starts a gateway. `limiter` is the one to share inside a process; `None` makes what the settings ask for.
pub async fn start(
    config: Config,
    limiter: Option<AnyLimiter>,
    shutdown: CancellationToken,
    force: CancellationToken,
) -> Result<Handle, StartError> {
    start_resolving(config, limiter, Resolver::system(), shutdown, force).await
}

/// The same, with hosts of backends looked up by `resolver`.
pub async fn start_resolving(
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
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    weir_runtime::register(&mut registry);
    let listeners = EdgeMetrics::new(&mut registry);
    resolver.register(&mut registry);
    let live = Arc::new(LiveConfig::new(settings.egress, resolver));
    registry.register_collector(Box::new(WeightMetrics(live.clone())));
    let holder = OwnerId::of(&settings.identity.incarnation);
    let (ledger, worker) = Ledger::new(limiter, holder, live_gateways(&live), metrics.clone());
    let (gone, reaper) = OrphanReaper::new(live.clone(), ledger.clone(), metrics.clone(), holder);
    let (traffic, probes) = (Arc::<TrafficCounter>::default(), Arc::<ProbeChannel>::default());
    let gateway = Gateway {
        live: live.clone(),
        ledger: ledger.clone(),
        failures: Failures::new(&metrics),
        bodies: BodyMemory::new(config.body_memory_mib << 20, metrics.body_bytes.clone()),
        metrics: metrics.clone(),
        traffic: traffic.clone(),
    };
    let (identity, links, credentials) = (settings.identity, settings.control_planes, settings.credentials);
    let publisher = Publisher::new(live.clone(), credentials.clone());
    let subscriber = Subscriber::new(publisher, identity.clone(), links.clone(), settings.disk);
    let prober = Prober::new(live.clone(), probes.clone(), ledger.clone(), metrics.clone());
    let reporter = Reporter { live: live.clone(), metrics: metrics.clone(), traffic, probes, gone, identity };
    let readiness = Readiness::not_ready("no configuration yet");
    let pages = pages(&live, &ledger, settings.ops_token);
    let ops = Edge::new("ops", ops, edge::Bounds::operations(), listeners.clone());

    // What serves requests ends last: the settlement worker and the operations port outlive the streams.
    let (tasks, serving, drained) = (TaskTracker::new(), CancellationToken::new(), CancellationToken::new());
    tasks.spawn(credentials.run(metrics.credentials_unreadable.clone(), drained.clone()));
    tasks.spawn(subscriber.run(drained.clone()));
    tasks.spawn(prober.run(drained.clone()));
    tasks.spawn(reporter.run(links, drained.clone()));
    tasks.spawn(reaper.run(drained.clone()));
    tasks.spawn(worker.run(drained.clone()));
    tasks.spawn(weir_runtime::serve_ops_with(
        ops,
        settings.ops_hosts,
        readiness.clone(),
        Arc::new(registry),
        pages,
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

/// How many gateways there are, as the limits that are shared among them ask.
fn live_gateways(live: &Arc<LiveConfig>) -> LiveGateways {
    let live = live.clone();
    Arc::new(move || live.live_gateways())
}

/// The pages of the operations port that only its token opens.
fn pages(live: &Arc<LiveConfig>, ledger: &Arc<Ledger>, token: OpsToken) -> Router {
    let pages = explain::page(live.clone(), ledger.clone()).merge(usage::page(live.clone(), ledger.clone()));
    // Around these pages alone: what is not there is 404.
    pages.route_layer(from_fn_with_state(token, guard_ops_page))
}

/// What the settings come to, checked before anything is started.
struct Settings {
    ops_token: OpsToken,
    ops_hosts: AllowedHosts,
    control_planes: Vec<Link>,
    tls: Option<ServerTls>,
    credentials: Arc<Credentials>,
    disk: Option<Disk>,
    identity: Identity,
    egress: EgressPolicy,
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
            egress: EgressPolicy::allowing(&config.allow_backend_cidr).map_err(StartError::Config)?,
        })
    }
}

/// The limiter that is shared inside the process, or else the one that the settings ask for.
async fn limiter_of(config: &Config, shared: Option<AnyLimiter>) -> Result<AnyLimiter, StartError> {
    if let Some(shared) = shared {
        return Ok(shared);
    }
    let Some(url) = &config.redis else { return Ok(AnyLimiter::from(MemoryLimiter::new())) };
    // Waited for a little, so that a gateway counts with the others from its first request; not for long, since one
    // that starts while Redis is away serves its share of the limits.
    let options = RedisOptions { cold_start: config.cold_start, ..RedisOptions::default() };
    match RedisLimiter::connect(url, options).await {
        Ok(redis) => Ok(redis.into()),
        Err(error) => {
            tracing::warn!(%error, "redis is away; this gateway starts with its share of the limits");
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

/// Takes the address without serving it yet.
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

/// The port for clients, taken and not served before there is a configuration.
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

/// Keeps readiness and the gauges true.
struct Status {
    live: Arc<LiveConfig>,
    ledger: Arc<Ledger>,
    readiness: Readiness,
    metrics: Metrics,
}

impl Status {
    async fn run(self, serving: CancellationToken, shutdown: CancellationToken, drained: CancellationToken) {
        let mut revisions = self.live.revisions();
        let (mut outages, mut lost) = (0, 0);
        let mut known = None;
        loop {
            self.readiness.set(readiness(&serving, &shutdown));
            self.show_configuration(&mut known);
            self.show_prefetched();
            let store = self.ledger.limiter.status();
            self.metrics.limit_store_away.set(i64::from(store.phase != Phase::Closed));
            self.metrics.limit_store_untold.set(gauge(store.pending));
            self.metrics.limit_store_outages.inc_by(store.opened - outages);
            self.metrics.limit_store_lost.inc_by(store.lost - lost);
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

    /// `known` is the revision whose backends have their series.
    fn show_configuration(&self, known: &mut Option<u64>) {
        let (live, metrics) = (&self.live, &self.metrics);
        let snapshot = live.snapshot();
        // A counter that begins with its first event has no increase that an alert could see.
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
        metrics.merged.set(gauge(store.store().merged_calls()));
        let ahead = store.status();
        metrics.from_quota.set(gauge(ahead.decided));
        for (kind, held) in Kind::ALL.into_iter().zip(ahead.held) {
            metrics.ahead.get_or_create(&KindLabels { kind: kind.name() }).set(gauge(held));
        }
    }
}

/// A count as a gauge, which stays at its largest value.
fn gauge(count: impl TryInto<i64>) -> i64 {
    count.try_into().unwrap_or(i64::MAX)
}

fn readiness(serving: &CancellationToken, shutdown: &CancellationToken) -> Result<(), String> {
    if shutdown.is_cancelled() {
        Err("draining".to_owned())
    } else if serving.is_cancelled() {
        Ok(())
    } else {
        Err("no configuration: the control plane has not been reached and there is no copy on disk"
            .to_owned())
    }
}
