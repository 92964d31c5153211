//! Where the store is: one server, a primary that Sentinels know, or a Cluster; with or without TLS.
//!
//! | address | what |
//! |---|---|
//! | `redis://[user:password@]host[:port][/db]` | one server |
//! | `redis+sentinel://[user:password@]host[:port],.../service[/db]` | the primary of a service, asked of these Sentinels |
//! | `redis+cluster://[user:password@]host[:port],...` | a Cluster, found through any of these nodes |
//!
//! `rediss`, `rediss+sentinel` and `rediss+cluster` are the same over TLS. User and password are those of the data
//! servers; Sentinels are asked without.

use std::time::Duration;

use ::redis::aio::{ConnectionLike, MultiplexedConnection};
use ::redis::cluster::ClusterClient;
use ::redis::cluster_async::ClusterConnection;
use ::redis::{Cmd, IntoConnectionInfo, Pipeline, RedisError, RedisFuture, Value};
use deadpool_redis::{Manager, Pool, PoolError, sentinel};

use crate::Error;

/// Times the Cluster's client follows MOVED and ASK or repeats TRYAGAIN; the call's deadline is shorter.
const CLUSTER_RETRIES: u32 = 8;
/// Bounds of its pauses between repeats, milliseconds.
const CLUSTER_PAUSE_MS: (u64, u64) = (2, 16);

/// Makes connections.
#[derive(Clone)]
pub(super) enum Source {
    One(Pool),
    Sentinel(sentinel::Pool),
    Cluster(Box<ClusterClient>),
}

/// A connection, shared by any number of calls.
#[derive(Clone)]
pub(super) enum Shared {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Source {
    /// By the address; see the module. `lanes` is how many connections there will be.
    pub(super) fn parse(url: &str, lanes: usize, connect: Duration) -> Result<Self, Error> {
        // The library's messages may quote the address, password included.
        let wrong = |_: RedisError| Error::Invalid("not a Redis address");
        let (scheme, rest) = url.split_once("://").ok_or(Error::Invalid("not a Redis address"))?;
        if scheme.starts_with("rediss") {
            // Fails when the process has chosen a provider already.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        match scheme.split_once('+') {
            None => {
                let config = ::redis::AsyncConnectionConfig::new()
                    .set_connection_timeout(Some(connect))
                    .set_response_timeout(None);
                let manager = Manager::new_with_config(url, config).map_err(wrong)?;
                let pool = Pool::builder(manager).max_size(lanes).build();
                Ok(Source::One(pool.map_err(|_| Error::Invalid("not a Redis pool"))?))
            }
            Some((plain @ ("redis" | "rediss"), "cluster")) => {
                let (login, hosts) =
                    rest.trim_end_matches('/').rsplit_once('@').map_or(("", rest), |(l, h)| (l, h));
                let at = if login.is_empty() { "" } else { "@" };
                let nodes =
                    hosts.trim_end_matches('/').split(',').map(|host| format!("{plain}://{login}{at}{host}"));
                let client = ClusterClient::builder(nodes)
                    .retries(CLUSTER_RETRIES)
                    .min_retry_wait(CLUSTER_PAUSE_MS.0)
                    .max_retry_wait(CLUSTER_PAUSE_MS.1)
                    .connection_timeout(connect)
                    .build();
                Ok(Source::Cluster(Box::new(client.map_err(wrong)?)))
            }
            Some((plain @ ("redis" | "rediss"), "sentinel")) => {
                let form =
                    Error::Invalid("a Sentinel address is redis+sentinel://host:port,.../service[/db]");
                let (login, rest) = rest.rsplit_once('@').map_or(("", rest), |(l, r)| (l, r));
                let (hosts, path) = rest.split_once('/').ok_or(form.clone())?;
                let (service, db) = path.split_once('/').unwrap_or((path, ""));
                if service.is_empty() {
                    return Err(form);
                }
                // The data servers' part, read by the library that reads every other address.
                let at = if login.is_empty() { "" } else { "@" };
                let data =
                    format!("{plain}://{login}{at}localhost/{db}").into_connection_info().map_err(wrong)?;
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
                let sentinels = hosts.split(',').map(|host| {
                    format!(
                        "{plain}://{}",
                        if host.contains(':') { host.to_owned() } else { format!("{host}:26379") }
                    )
                });
                let primary = sentinel::SentinelServerType::Master;
                let manager =
                    sentinel::Manager::new(sentinels.collect(), service.to_owned(), Some(node), primary)
                        .map_err(wrong)?;
                let pool = sentinel::Pool::builder(manager).max_size(lanes).build();
                Ok(Source::Sentinel(pool.map_err(|_| Error::Invalid("not a Redis pool"))?))
            }
            Some(_) => Err(Error::Invalid(
                "a Redis address starts with redis, redis+sentinel, redis+cluster or rediss...",
            )),
        }
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self, Source::Cluster(_))
    }

    /// A new connection; the pool keeps none of it, so that a broken one is never handed out again.
    pub(super) async fn connect(&self) -> Result<Shared, Error> {
        let pooled = |error: PoolError| match &error {
            PoolError::Backend(error) => super::classify_connect(error),
            _ => Error::Unreachable("no connection".into()),
        };
        match self {
            Source::One(pool) => {
                let connection = pool.get().await.map_err(pooled)?;
                Ok(Shared::One(deadpool_redis::Connection::take(connection)))
            }
            Source::Sentinel(pool) => {
                let connection = pool.get().await.map_err(pooled)?;
                Ok(Shared::One(sentinel::Connection::take(connection)))
            }
            Source::Cluster(client) => {
                let connection = client.get_async_connection().await;
                connection.map(Shared::Cluster).map_err(|error| super::classify_connect(&error))
            }
        }
    }
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
