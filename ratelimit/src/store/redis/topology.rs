//! Addresses of the limit store: one server, a primary behind Sentinels, or a Cluster; with or without TLS.
//!
//! | address | what |
//! |---|---|
//! | `redis://[user:password@]host[:port][/db]` | one server |
//! | `redis+sentinel://[user:password@]host[:port],.../service[/db]` | the primary of a service, asked of these Sentinels |
//! | `redis+cluster://[user:password@]host[:port],...` | a Cluster, found through any of these nodes |
//!
//! `rediss`, `rediss+sentinel` and `rediss+cluster` are the same over TLS. User and password are for the data
//! servers; Sentinels get none.
//!
//! Decisions share a few multiplexed connections of the `redis` crate. A pool would give each call a connection of
//! its own, and calls could not be pipelined. Usage reports use a pool, because a reply may be a megabyte and
//! decisions must not wait behind it.

use std::sync::Arc;
use std::time::Duration;

use ::redis::aio::{ConnectionLike, MultiplexedConnection};
use ::redis::cluster::ClusterClient;
use ::redis::cluster_async::ClusterConnection;
use ::redis::sentinel::{SentinelClient, SentinelServerType};
use ::redis::{
    AsyncConnectionConfig, Client, Cmd, IntoConnectionInfo, Pipeline, RedisError, RedisFuture, Value,
};
use deadpool_redis::{HookError, Manager, Metrics, Pool, PoolError, sentinel};
use tokio::sync::Mutex;

use super::failures::classify_connect;
use crate::model::error::Error;

/// How often the Cluster's client follows MOVED and ASK or repeats after TRYAGAIN. The end of
/// the call's time ends it earlier.
const CLUSTER_RETRIES: u32 = 8;
/// The bounds of the client's pauses between repeats, milliseconds.
const CLUSTER_PAUSE_MS: (u64, u64) = (2, 16);
/// Usage reports in progress; more wait.
const REPORTS_MAX: usize = 4;
/// The longest time for which a report connection is used: a server that is no longer the primary would go on
/// answering.
const REPORT_CONNECTION_AGE_MAX: Duration = Duration::from_secs(30);

/// Makes connections.
#[derive(Clone)]
pub(super) enum Source {
    One { client: Box<Client>, config: Box<AsyncConnectionConfig>, reports: Pool },
    Sentinel { client: Arc<Mutex<SentinelClient>>, reports: sentinel::Pool },
    Cluster(Box<ClusterClient>),
}

/// A connection that any number of calls share.
#[derive(Clone)]
pub(super) enum Shared {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

/// A connection for one usage report.
pub(super) enum ReportConnection {
    One(deadpool_redis::Connection),
    Sentinel(sentinel::Connection),
}

/// Hides the library's message, which may contain the address with its password.
fn not_an_address(_: RedisError) -> Error {
    Error::Invalid("not a Redis address")
}

/// Splits an address into user and password, if there are any, and the rest.
fn split_login(address: &str) -> (&str, &str) {
    address.rsplit_once('@').unwrap_or(("", address))
}

/// The login as it is written before a host.
fn login_prefix(login: &str) -> String {
    if login.is_empty() { String::new() } else { format!("{login}@") }
}

impl Source {
    /// Parses an address of one of the forms in the table above.
    pub(super) fn parse(url: &str, connect: Duration) -> Result<Self, Error> {
        let (scheme, rest) = url.split_once("://").ok_or(Error::Invalid("not a Redis address"))?;
        if scheme.starts_with("rediss") {
            // Fails if the process has chosen a provider already.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        match scheme.split_once('+') {
            None => Self::one(url, connect),
            Some((plain @ ("redis" | "rediss"), "cluster")) => Self::cluster(plain, rest, connect),
            Some((plain @ ("redis" | "rediss"), "sentinel")) => Self::sentinel(plain, rest),
            Some(_) => Err(Error::Invalid(
                "a Redis address starts with redis, redis+sentinel, redis+cluster or rediss...",
            )),
        }
    }

    fn one(url: &str, connect: Duration) -> Result<Self, Error> {
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(Some(connect)).set_response_timeout(None);
        let client = Client::open(url).map_err(not_an_address)?;
        let manager = Manager::new_with_config(url, config.clone()).map_err(not_an_address)?;
        let reports = Pool::builder(manager)
            .max_size(REPORTS_MAX)
            .post_recycle(deadpool_redis::Hook::sync_fn(|_, metrics| young(metrics)))
            .build();
        let reports = reports.map_err(|_| Error::Invalid("not a Redis pool"))?;
        Ok(Source::One { client: Box::new(client), config: Box::new(config), reports })
    }

    fn cluster(plain: &str, rest: &str, connect: Duration) -> Result<Self, Error> {
        let (login, hosts) = split_login(rest.trim_end_matches('/'));
        let login = login_prefix(login);
        let nodes = hosts.trim_end_matches('/').split(',').map(|host| format!("{plain}://{login}{host}"));
        let client = ClusterClient::builder(nodes)
            .retries(CLUSTER_RETRIES)
            .min_retry_wait(CLUSTER_PAUSE_MS.0)
            .max_retry_wait(CLUSTER_PAUSE_MS.1)
            .connection_timeout(connect)
            .build();
        Ok(Source::Cluster(Box::new(client.map_err(not_an_address)?)))
    }

    fn sentinel(plain: &str, rest: &str) -> Result<Self, Error> {
        let form = Error::Invalid("a Sentinel address is redis+sentinel://host:port,.../service[/db]");
        let (login, rest) = split_login(rest);
        let (hosts, path) = rest.split_once('/').ok_or(form.clone())?;
        let (service, db) = path.split_once('/').unwrap_or((path, ""));
        if service.is_empty() {
            return Err(form);
        }
        // The part for data servers, parsed by the library that parses every other address.
        let data = format!("{plain}://{}localhost/{db}", login_prefix(login));
        let data = data.into_connection_info().map_err(not_an_address)?;
        let of = data.redis_settings();
        let node = sentinel::SentinelNodeConnectionInfo {
            tls_mode: (plain == "rediss").then_some(sentinel::TlsMode::Secure),
            redis_connection_info: Some(deadpool_redis::RedisConnectionInfo {
                db: of.db(),
                username: of.username().map(str::to_owned),
                password: of.password().map(str::to_owned),
                ..Default::default()
            }),
        };
        let with_port =
            |host: &str| if host.contains(':') { host.to_owned() } else { format!("{host}:26379") };
        let sentinels: Vec<String> =
            hosts.split(',').map(|host| format!("{plain}://{}", with_port(host))).collect();
        let client = SentinelClient::build(
            sentinels.clone(),
            service,
            Some(node.clone().into()),
            SentinelServerType::Master,
        );
        let client = Arc::new(Mutex::new(client.map_err(not_an_address)?));
        let primary = sentinel::SentinelServerType::Master;
        let manager = sentinel::Manager::new(sentinels, service.to_owned(), Some(node), primary);
        let reports = sentinel::Pool::builder(manager.map_err(not_an_address)?)
            .max_size(REPORTS_MAX)
            .post_recycle(sentinel::Hook::sync_fn(|_, metrics| young(metrics)))
            .build();
        let reports = reports.map_err(|_| Error::Invalid("not a Redis pool"))?;
        Ok(Source::Sentinel { client, reports })
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self, Source::Cluster(_))
    }

    /// A new connection for decisions.
    pub(super) async fn connect(&self) -> Result<Shared, Error> {
        let connected = match self {
            Source::One { client, config, .. } => {
                client.get_multiplexed_async_connection_with_config(config).await.map(Shared::One)
            }
            Source::Sentinel { client, .. } => {
                client.lock().await.get_async_connection().await.map(Shared::One)
            }
            Source::Cluster(client) => client.get_async_connection().await.map(Shared::Cluster),
        };
        connected.map_err(|error| classify_connect(&error))
    }

    /// A connection for one report; waits while too many reports are in progress. `None` for a Cluster, whose client
    /// shares connections to every node among all calls.
    pub(super) async fn report_connection(&self) -> Result<Option<ReportConnection>, Error> {
        let pooled = |error: PoolError| match &error {
            PoolError::Backend(error) => classify_connect(error),
            _ => Error::Unreachable("no connection".into()),
        };
        match self {
            Source::One { reports, .. } => {
                reports.get().await.map(|connection| Some(ReportConnection::One(connection))).map_err(pooled)
            }
            Source::Sentinel { reports, .. } => reports
                .get()
                .await
                .map(|connection| Some(ReportConnection::Sentinel(connection)))
                .map_err(pooled),
            Source::Cluster(_) => Ok(None),
        }
    }
}

/// Whether a pooled connection may be used again.
fn young(metrics: &Metrics) -> Result<(), HookError> {
    if metrics.age() < REPORT_CONNECTION_AGE_MAX { Ok(()) } else { Err(HookError::message("too old")) }
}

impl ConnectionLike for Shared {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Shared::One(connection) => connection.req_packed_command(cmd),
            Shared::Cluster(connection) => connection.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Shared::One(connection) => connection.req_packed_commands(pipeline, offset, count),
            Shared::Cluster(connection) => connection.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Shared::One(connection) => connection.get_db(),
            Shared::Cluster(connection) => connection.get_db(),
        }
    }
}

impl ConnectionLike for ReportConnection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            ReportConnection::One(connection) => connection.req_packed_command(cmd),
            ReportConnection::Sentinel(connection) => connection.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            ReportConnection::One(connection) => connection.req_packed_commands(pipeline, offset, count),
            ReportConnection::Sentinel(connection) => connection.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            ReportConnection::One(connection) => connection.get_db(),
            ReportConnection::Sentinel(connection) => connection.get_db(),
        }
    }
}
