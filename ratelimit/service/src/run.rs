//! Wiring: settings -> parts -> running tasks, all tracked and all ended by one token.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use weir_proto::envoy::service::ratelimit::v3::rate_limit_service_server::RateLimitServiceServer;
use weir_proto::v1::limit_service_server::LimitServiceServer;
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_ratelimit::{AnyLimiter, ServiceStack};
use weir_runtime::edge::{self, BusyLayer, Edge, EdgeMetrics};
use weir_runtime::grpc::{HEADER_LIST_BYTES_MAX, Permits};
use weir_runtime::{AllowedHosts, Readiness, serve_ops};

use crate::auth::Guard;
use crate::config::Config;
use crate::configuration;
use crate::envoy::Envoy;
use crate::error::StartError;
use crate::gate::gated;
use crate::metrics::Metrics;
use crate::native::Native;
use crate::store::Watcher;

/// Largest request: as gRPC's default everywhere else, so that no proxy sends more. A stranger's headers may stand in it
/// several times over, and what is too large would be an error, which is an admission.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Calls at once on one connection; more wait at the caller. A proxy has one connection for all its requests, and a call
/// may wait for a minute.
const STREAMS_MAX: u32 = 1024;
/// A check of health names a service.
const CHECK_BYTES_MAX: usize = 1 << 10;
/// A caller that is gone without a word is noticed after so long, and as long again.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A limit service that runs.
#[derive(Debug)]
pub struct Running {
    /// Where the gRPC services are.
    pub address: SocketAddr,
    /// Where operations are served.
    pub ops_address: SocketAddr,
    tasks: TaskTracker,
}

impl Running {
    /// Returns when everything has ended, after the shutdown token was cancelled.
    pub async fn ended(self) {
        self.tasks.wait().await;
    }
}

async fn listen(address: SocketAddr, flag: &'static str) -> Result<(TcpListener, SocketAddr), StartError> {
    let wrong = |source| StartError::Listen { address, flag, source };
    let listener = TcpListener::bind(address).await.map_err(wrong)?;
    let address = listener.local_addr().map_err(wrong)?;
    Ok((listener, address))
}

/// Starts a limit service. `store` is the one to share inside a process; `None` makes what the settings ask for.
/// `shutdown` begins the drain, `force` cuts it short.
pub async fn start(
    config: Config,
    store: Option<AnyLimiter>,
    shutdown: CancellationToken,
    force: CancellationToken,
) -> Result<Running, StartError> {
    let token = config.checked_token().map_err(StartError::Config)?;
    let ops_hosts = AllowedHosts::new(&config.ops_allowed_hosts)
        .map_err(|e| StartError::Config(format!("--ops-allowed-host: {e}")))?;
    let stack = Arc::new(ServiceStack::new(store.map_or_else(|| open(&config), Ok)?));
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let listeners = EdgeMetrics::new(&mut registry);
    weir_runtime::register(&mut registry);
    let (configuration, subscriber) = configuration::open(&config, &metrics)?;
    let (grpc, address) = listen(config.listen, "--listen").await?;
    let (ops, ops_address) = listen(config.ops_listen, "--ops-listen").await?;

    let readiness = Readiness::not_ready("starting");
    let (health, health_service) = tonic_health::server::health_reporter();
    let health_service = health_service.max_decoding_message_size(CHECK_BYTES_MAX);
    let (guard, permits) = (Guard::new(token.as_ref()), Permits::default());
    let wrong = |e: tonic_reflection::server::Error| StartError::Config(format!("reflection: {e}"));
    // Most tools still ask by the older name alone.
    let (new, old) = (described().build_v1().map_err(wrong)?, described().build_v1alpha().map_err(wrong)?);
    let (shared, rules) = (stack.clone(), Arc::clone(&configuration.rules));
    let envoy =
        Envoy { stack: shared, rules, metrics: metrics.clone(), strict_zero_hits: config.strict_zero_hits };
    let native = Native { stack: stack.clone(), metrics: metrics.clone() };
    let envoy = RateLimitServiceServer::new(envoy).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let native = LimitServiceServer::new(native).max_decoding_message_size(MESSAGE_BYTES_MAX);

    // The operations port outlives the calls.
    let (tasks, drained) = (TaskTracker::new(), CancellationToken::new());
    if let Some(subscriber) = subscriber {
        tasks.spawn(subscriber.run(drained.clone()));
    }
    let watcher = Watcher {
        stack,
        known: configuration.known,
        problem: configuration.problem,
        readiness: readiness.clone(),
        health,
        store_up: metrics.store_up,
    };
    tasks.spawn(watcher.run(shutdown.clone()));
    let ops = Edge::new("ops", ops, edge::Bounds::operations(), listeners.clone());
    tasks.spawn(serve_ops(ops, ops_hosts, readiness, Arc::new(registry), drained.clone()));
    let refuse = CancellationToken::new();
    let grpc = Edge::new("grpc", grpc, edge::Bounds::grpc(), listeners);
    let incoming = ReceiverStream::new(edge::incoming(grpc, None, &tasks, refuse.clone()));
    let server = Server::builder()
        .layer(BusyLayer)
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_header_list_size(HEADER_LIST_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_service(gated(health_service, guard.clone(), permits.clone()))
        .add_service(gated(new, guard.clone(), permits.clone()))
        .add_service(gated(old, guard.clone(), permits.clone()))
        .add_service(gated(native, guard.clone(), permits.clone()))
        .add_service(gated(envoy, guard, permits))
        .serve_with_incoming_shutdown(incoming, refuse.clone().cancelled_owned());
    let ended = drain((config.pre_stop, config.drain), shutdown, refuse, force);
    tasks.spawn(async move {
        serve(server, ended).await;
        drained.cancel();
    });
    tasks.close();
    Ok(Running { address, ops_address, tasks })
}

/// The protocol, for tools that ask for it.
fn described() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(weir_proto::FILE_DESCRIPTOR_SET)
}

/// Serves calls until there are none after a shutdown, or until `ended`.
async fn serve(
    server: impl Future<Output = Result<(), tonic::transport::Error>>,
    ended: impl Future<Output = ()>,
) {
    tokio::select! {
        served = server => if let Err(error) = served {
            tracing::error!(%error, "the gRPC port ended");
        },
        () = ended => tracing::warn!("calls still under way were cut"),
    }
}

/// Returns when calls have had their time after `shutdown`, or at once with `force`. Not ready, but served, until balancers have
/// noticed, which takes `pre_stop`; then `refuse`, and calls under way have `time_for_calls`.
async fn drain(
    (pre_stop, time_for_calls): (Duration, Duration),
    shutdown: CancellationToken,
    refuse: CancellationToken,
    force: CancellationToken,
) {
    let pause = async |phase| {
        tokio::select! {
            () = tokio::time::sleep(phase) => {}
            () = force.cancelled() => {}
        }
    };
    shutdown.cancelled().await;
    pause(pre_stop).await;
    refuse.cancel();
    pause(time_for_calls).await;
}

/// The store of the settings. It connects in the background: a service that starts before its Redis becomes ready
/// with it.
fn open(config: &Config) -> Result<AnyLimiter, StartError> {
    let Some(url) = &config.redis else {
        tracing::warn!("without --redis, limits hold for this process alone");
        return Ok(MemoryLimiter::new().into());
    };
    let options = RedisOptions { cold_start: config.cold_start, ..RedisOptions::default() };
    let redis = RedisLimiter::open(url, options).map_err(|e| StartError::Config(format!("--redis: {e}")))?;
    Ok(redis.into())
}
