//! Wiring: settings -> parts -> running tasks, all tracked and all ended by one token.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::middleware::from_fn_with_state;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weir_discovery::{Disk, Identity, Link, Subscriber};
use weir_proto::resource::Name;
use weir_proto::v1::SubscriberRole;
use weir_ratelimit::breaker::Phase;
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_ratelimit::{AnyLimiter, Holder, Kind};
use weir_runtime::edge::{self, Edge, EdgeMetrics};
use weir_runtime::{AllowedHosts, EgressPolicy, Readiness, ServerTls, guard_ops_page};

use crate::config::Config;
use crate::control::credentials::Credentials;
use crate::control::live_config::LiveConfig;
use crate::control::probe_channel::ProbeChannel;
use crate::control::report::Reporter;
use crate::control::subscription::Publisher;
use crate::control::traffic_report::TrafficCounter;
use crate::http::authentication::Failures;
use crate::http::pipeline::Gateway;
use crate::http::request_body::BodyMemory;
use crate::http::server;
use crate::limits::ledger::Ledger;
use crate::limits::orphan_reaper::Reaper;
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
pub struct Running {
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

impl Running {
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

/// Starts a gateway. `limiter` is the one to share inside a process; `None` makes what the settings ask for.
pub async fn start(
    config: Config,
    limiter: Option<AnyLimiter>,
    shutdown: CancellationToken,
    hurry: CancellationToken,
) -> Result<Running, StartError> {
    start_resolving(config, limiter, Resolver::system(), shutdown, hurry).await
}

/// The same, with hosts of backends looked up by `resolver`.
pub async fn start_resolving(
    config: Config,
    limiter: Option<AnyLimiter>,
    resolver: Resolver,
    shutdown: CancellationToken,
    hurry: CancellationToken,
) -> Result<Running, StartError> {
    let ops_token = config.ops_token().map_err(|e| StartError::Config(format!("--ops-token-file: {e}")))?;
    let ops_hosts = AllowedHosts::new(&config.ops_allowed_hosts)
        .map_err(|e| StartError::Config(format!("--ops-allowed-host: {e}")))?;
    let (clients, address) = reserve(config.listen, "--listen")?;
    let (ops, ops_address) = listen(config.ops_listen, "--ops-listen").await?;
    let own = config.control_plane_cert.clone().zip(config.control_plane_key.clone());
    let control_planes = Link::all(&config.control_plane, config.control_plane_ca.clone(), own)
        .map_err(|e| StartError::Config(format!("--control-plane: {e}")))?;
    let tls = match (&config.tls_cert, &config.tls_key) {
        (Some(certificate), Some(key)) => Some(
            ServerTls::open(certificate, key, &[b"h2", b"http/1.1"])
                .map_err(|e| StartError::Config(format!("--tls-cert, --tls-key: {e}")))?,
        ),
        _ => None,
    };
    let credentials =
        Credentials::new(&config.credentials, config.own_secrets()).map_err(StartError::Config)?;
    let disk = config.data_dir.as_deref().map(Disk::new).transpose();
    let disk = disk.map_err(|e| StartError::Config(format!("--data-dir: {e}")))?;
    let limiter = match (limiter, &config.redis) {
        (Some(limiter), _) => limiter,
        (None, None) => AnyLimiter::from(MemoryLimiter::new()),
        (None, Some(url)) => {
            // Waited for a little, so that a gateway counts with the others from its first request; not for long,
            // since one that starts while Redis is away serves its share of the limits.
            let options = RedisOptions { cold_start: config.cold_start, ..RedisOptions::default() };
            AnyLimiter::from(match RedisLimiter::connect(url, options).await {
                Ok(redis) => redis,
                Err(error) => {
                    tracing::warn!(%error, "redis is away; this gateway starts with its share of the limits");
                    RedisLimiter::open(url, options)
                        .map_err(|e| StartError::Config(format!("--redis: {e}")))?
                }
            })
        }
    };
    let incarnation = uuid::Uuid::now_v7().to_string();
    let identity = Identity {
        id: config.id.clone().unwrap_or_else(|| format!("gateway-{}", &incarnation[24..])),
        incarnation,
        role: SubscriberRole::Gateway,
        region: config.region.clone(),
        token: config.token().map_err(StartError::Config)?,
    };
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    weir_runtime::register(&mut registry);
    let listeners = EdgeMetrics::new(&mut registry);
    let egress = EgressPolicy::allowing(&config.allow_backend_cidr).map_err(StartError::Config)?;
    resolver.register(&mut registry);
    let live = Arc::new(LiveConfig::new(egress, resolver));
    registry.register_collector(Box::new(WeightMetrics(live.clone())));
    let gateways = {
        let live = live.clone();
        Arc::new(move || live.live_gateways())
    };
    let holder = Holder::of(&identity.incarnation);
    let (traffic, probes) = (Arc::<TrafficCounter>::default(), Arc::<ProbeChannel>::default());
    let (ledger, worker) = Ledger::new(limiter, holder, gateways, metrics.clone());
    let (gone, reaper) = Reaper::new(live.clone(), ledger.clone(), metrics.clone(), holder);
    let bodies = BodyMemory::new(config.body_memory_mib << 20, metrics.body_bytes.clone());
    let gateway = Arc::new(Gateway {
        live: live.clone(),
        ledger: ledger.clone(),
        failures: Failures::default(),
        bodies,
        metrics: metrics.clone(),
        traffic: traffic.clone(),
    });
    let readiness = Readiness::not_ready("no configuration yet");
    let publisher = Publisher::new(live.clone(), credentials.clone());
    let subscriber = Subscriber::new(publisher, identity.clone(), control_planes.clone(), disk);

    let (tasks, serving) = (TaskTracker::new(), CancellationToken::new());
    // What serves requests ends last: the settlement worker and the operations port outlive the streams.
    let drained = CancellationToken::new();
    tasks.spawn(credentials.run(metrics.credentials_unreadable.clone(), drained.clone()));
    tasks.spawn(subscriber.run(drained.clone()));
    tasks.spawn(
        Prober::new(live.clone(), probes.clone(), ledger.clone(), metrics.clone()).run(drained.clone()),
    );
    let reporter = Reporter { live: live.clone(), metrics: metrics.clone(), traffic, probes, gone, identity };
    tasks.spawn(reporter.run(control_planes, drained.clone()));
    tasks.spawn(reaper.run(drained.clone()));
    tasks.spawn(worker.run(drained.clone()));
    tasks.spawn(watch(
        live.clone(),
        ledger.clone(),
        readiness.clone(),
        metrics,
        serving.clone(),
        shutdown.clone(),
        drained.clone(),
    ));
    let pages = explain::page(live.clone(), ledger.clone()).merge(usage::page(live.clone(), ledger));
    // Around these pages alone: what is not there is 404.
    let pages = pages.route_layer(from_fn_with_state(ops_token, guard_ops_page));
    let ops = Edge::new("ops", ops, edge::Bounds::operations(), listeners.clone());
    let ops =
        weir_runtime::serve_ops_with(ops, ops_hosts, readiness, Arc::new(registry), pages, drained.clone());
    tasks.spawn(ops);
    let bounds = config.bounds();
    let server = {
        let (serving, configured) = (serving.clone(), live.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = configured.configured() => {}
                () = shutdown.cancelled() => {}
            }
            let done = match clients.listen(BACKLOG) {
                Ok(listener) => {
                    serving.cancel();
                    tracing::info!(clients = %address, ops = %ops_address, "serving");
                    server::serve(listener, tls, gateway, (bounds, listeners), shutdown, hurry).await;
                    Ok(())
                }
                Err(source) => {
                    shutdown.cancel();
                    Err(StartError::Listen { address, flag: "--listen", source })
                }
            };
            drained.cancel();
            done
        })
    };
    tasks.close();
    Ok(Running { address, ops_address, live, tasks, serving, server })
}

/// Keeps readiness and the gauges true.
async fn watch(
    live: Arc<LiveConfig>,
    ledger: Arc<Ledger>,
    readiness: Readiness,
    metrics: Metrics,
    serving: CancellationToken,
    shutdown: CancellationToken,
    drained: CancellationToken,
) {
    let mut revisions = live.revisions();
    let (mut outages, mut lost) = (0, 0);
    let mut counted = None;
    loop {
        // A counter that begins with its first event has no increase that an alert could see.
        let snapshot = live.snapshot();
        if counted.replace(snapshot.revision) != Some(snapshot.revision) {
            metrics.know_backends(snapshot.backends.keys().map(Name::as_str));
        }
        let state = if shutdown.is_cancelled() {
            Err("draining".to_owned())
        } else if serving.is_cancelled() {
            Ok(())
        } else {
            Err("no configuration: the control plane has not been reached and there is no copy on disk"
                .to_owned())
        };
        readiness.set(state);
        metrics.revision.set(live.snapshot().revision.try_into().unwrap_or(i64::MAX));
        metrics.config_age.set(live.published_for().as_secs().try_into().unwrap_or(i64::MAX));
        metrics.config_refused.set(live.config_refused().try_into().unwrap_or(i64::MAX));
        metrics.control_plane_connected.set(i64::from(live.is_connected()));
        metrics.merged.set(ledger.limiter.store().merged_calls().try_into().unwrap_or(i64::MAX));
        let ahead = ledger.limiter.store().ahead();
        metrics.from_quota.set(ahead.decided.try_into().unwrap_or(i64::MAX));
        for (kind, held) in Kind::ALL.into_iter().zip(ahead.held) {
            let of_kind = metrics.ahead.get_or_create(&KindLabels { kind: kind.name() });
            of_kind.set(held.try_into().unwrap_or(i64::MAX));
        }
        let store = ledger.limiter.status();
        metrics.limit_store_away.set(i64::from(store.phase != Phase::Closed));
        metrics.limit_store_untold.set(store.pending.try_into().unwrap_or(i64::MAX));
        metrics.limit_store_outages.inc_by(store.opened - outages);
        metrics.limit_store_lost.inc_by(store.lost - lost);
        (outages, lost) = (store.opened, store.lost);
        metrics.waiting.set(ledger.waiting.len().try_into().unwrap_or(i64::MAX));
        tokio::select! {
            changed = revisions.changed() => if changed.is_err() { return },
            () = serving.cancelled(), if !serving.is_cancelled() => {}
            () = shutdown.cancelled(), if !shutdown.is_cancelled() => {}
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            () = drained.cancelled() => return,
        }
    }
}
