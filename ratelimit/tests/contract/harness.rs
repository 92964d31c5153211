//! Both stores behind one handle, and short names for building calls.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ::redis::aio::MultiplexedConnection;
use uuid::Uuid;
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::quota_prefetch::QuotaPrefetch;
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_ratelimit::*;

pub(crate) const LEASE: Duration = Duration::from_secs(30);

pub(crate) struct World {
    pub(crate) limiter: QuotaPrefetch<AnyLimiter>,
    server: Option<Server>,
    cluster: Option<std::sync::Arc<Cluster>>,
}

impl World {
    pub(crate) fn memory() -> Self {
        Self { limiter: ServiceStack::new(MemoryLimiter::new().into()).limiter, server: None, cluster: None }
    }

    pub(crate) async fn redis() -> Self {
        let server = Server::start().await;
        Self {
            limiter: ServiceStack::new(server.limiter().await.into()).limiter,
            server: Some(server),
            cluster: None,
        }
    }

    /// On an emptied Cluster that tests use one after the other.
    pub(crate) async fn cluster(cluster: &std::sync::Arc<Cluster>) -> Self {
        cluster.flush().await;
        Self {
            limiter: ServiceStack::new(cluster.limiter().await.into()).limiter,
            server: None,
            cluster: Some(cluster.clone()),
        }
    }

    pub(crate) fn has_server(&self) -> bool {
        self.server.is_some()
    }

    pub(crate) fn is_memory(&self) -> bool {
        self.server.is_none() && self.cluster.is_none()
    }

    /// Candidates lie in different slots, and no call sees all of them.
    pub(crate) fn is_split(&self) -> bool {
        self.cluster.is_some()
    }

    pub(crate) fn server(&self) -> &Server {
        self.server.as_ref().expect("a case for Redis")
    }

    pub(crate) async fn acquire(&self, call: &Acquire) -> Decision {
        self.limiter.acquire(call).await.expect("acquire")
    }

    pub(crate) async fn settle(&self, of: &Acquire, actual: Cost, slot: Option<&Key>) -> Settled {
        let call = Settle { id: of.id, actual, scopes: of.scopes.clone(), slot: slot.cloned(), usage: None };
        self.limiter.settle(&call).await.expect("settle")
    }

    pub(crate) async fn peek(&self, scopes: &[ScopeLimits]) -> Vec<LimitState> {
        self.limiter.peek(scopes).await.expect("peek")
    }

    /// The store's time, microseconds.
    pub(crate) async fn now(&self) -> u64 {
        let probe = Acquire { cost: Cost::default(), ..call(Scopes::new()) };
        let now = self.acquire(&probe).await.now_us;
        self.limiter
            .settle(&Settle {
                id: probe.id,
                actual: Cost::default(),
                scopes: [].into(),
                slot: None,
                usage: None,
            })
            .await
            .expect("settle");
        now
    }

    /// Returns once the store's time is at least `us`.
    pub(crate) async fn until(&self, us: u64) {
        loop {
            let now = self.now().await;
            if now >= us {
                return;
            }
            let left = Duration::from_micros(us - now);
            match (&self.server, &self.cluster) {
                (None, None) => tokio::time::advance(left).await,
                _ => tokio::time::sleep(left).await,
            }
        }
    }

    /// Lets so much of the store's time pass.
    pub(crate) async fn pass(&self, time: Duration) {
        let now = self.now().await;
        self.until(now + time.as_micros() as u64).await;
    }

    /// Brings about that the reservation's record has expired.
    pub(crate) async fn expire_reservation(&self, of: &Acquire) {
        match (&self.server, &self.cluster) {
            (_, Some(cluster)) => cluster.delete(&Key::reservation_of(&of.scopes, of.id)).await,
            (None, None) => tokio::time::advance(Duration::from_secs(25 * 3600)).await,
            (Some(server), None) => {
                let key = Key::reservation_of(&of.scopes, of.id);
                let gone = ::redis::cmd("DEL").arg(key.as_str()).query_async(&mut server.raw().await).await;
                assert_eq!(gone, Ok(1));
            }
        }
    }

    /// Forgets everything.
    pub(crate) async fn flush(&self) {
        let mut raw = self.server().raw().await;
        ::redis::cmd("FLUSHALL").exec_async(&mut raw).await.expect("flush");
    }

    /// Every key but the harness's own probes and the mark of the data set, as the store would dump it; empty for memory.
    pub(crate) async fn dump(&self) -> BTreeMap<String, Vec<u8>> {
        let mut all = BTreeMap::new();
        if let Some(server) = &self.server {
            let mut raw = server.raw().await;
            let keys: Vec<String> = ::redis::cmd("KEYS").arg("*").query_async(&mut raw).await.expect("keys");
            let own = |key: &String| key == Key::birth().as_str() || key.starts_with("weir:{g}:r:");
            for key in keys.into_iter().filter(|key| !own(key)) {
                let dump: Option<Vec<u8>> =
                    ::redis::cmd("DUMP").arg(&key).query_async(&mut raw).await.expect("dump");
                all.insert(key, dump.unwrap_or_default());
            }
        }
        all
    }
}

/// A Redis of the test's own, gone with it.
pub(crate) struct Server {
    child: Child,
    pub(crate) url: String,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// With settings besides the port.
    pub(crate) async fn start_with(settings: &[&str]) -> Self {
        // The port may be taken between choosing and binding: then the server exits, and another is chosen.
        for _ in 0..20 {
            let port = std::net::TcpListener::bind("127.0.0.1:0")
                .and_then(|l| l.local_addr())
                .expect("a port")
                .port();
            let child = spawn(&port.to_string(), settings);
            let mut server = Server { child, url: format!("redis://127.0.0.1:{port}/") };
            if server.answers().await {
                return server;
            }
        }
        panic!("redis-server did not start");
    }

    pub(crate) async fn start_sentinel(configuration: &str) -> Self {
        for _ in 0..20 {
            let port = std::net::TcpListener::bind("127.0.0.1:0")
                .and_then(|l| l.local_addr())
                .expect("a port")
                .port();
            let child = Command::new("redis-server")
                .args([configuration, "--sentinel", "--port", &port.to_string(), "--bind", "127.0.0.1"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("redis-server");
            let mut server = Server { child, url: format!("redis://127.0.0.1:{port}/") };
            if server.answers().await {
                return server;
            }
        }
        panic!("the sentinel did not start");
    }

    async fn answers(&mut self) -> bool {
        let client = ::redis::Client::open(self.url.as_str()).expect("client");
        for _ in 0..1000 {
            if self.child.try_wait().expect("child").is_some() {
                return false;
            }
            if let Ok(mut raw) = client.get_multiplexed_async_connection().await
                && ::redis::cmd("PING").query_async::<String>(&mut raw).await.is_ok()
            {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }

    pub(crate) async fn limiter(&self) -> RedisLimiter {
        limiter_of(&self.url).await
    }

    pub(crate) fn port(&self) -> &str {
        self.url.trim_end_matches('/').rsplit(':').next().expect("port")
    }

    pub(crate) async fn raw(&self) -> MultiplexedConnection {
        let client = ::redis::Client::open(self.url.as_str()).expect("client");
        client.get_multiplexed_async_connection().await.expect("connection")
    }

    /// An empty server where the killed one was.
    pub(crate) async fn restart(&mut self) {
        self.restart_unready(&[]);
        assert!(self.answers().await, "redis-server did not come back");
    }

    /// Started again and not waited for.
    pub(crate) fn restart_unready(&mut self, settings: &[&str]) {
        let port = self.url.trim_end_matches('/').rsplit(':').next().expect("port").to_owned();
        self.child = spawn(&port, settings);
    }

    /// Sends the process a signal by name, such as STOP.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(sent.expect("kill").success());
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn limiter_of(url: &str) -> RedisLimiter {
    let options =
        RedisOptions { silence: Duration::from_secs(10), connections: 2, ..RedisOptions::default() };
    RedisLimiter::connect(url, options).await.expect("connect")
}

/// Three primaries of the test's own, each with a third of the slots.
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Server>,
    _dirs: Vec<tempfile::TempDir>,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let (mut nodes, mut dirs) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let dir = tempfile::tempdir().expect("dir");
            // Redis itself looks for a free bus port above its own; the default is 10000 higher, which may not exist.
            let bus = std::net::TcpListener::bind("127.0.0.1:0")
                .and_then(|l| l.local_addr())
                .expect("a port")
                .port();
            let path = dir.path().to_str().expect("path");
            let settings = ["--cluster-enabled", "yes", "--cluster-port", &bus.to_string(), "--dir", path];
            nodes.push((Server::start_with(&settings).await, bus));
            dirs.push(dir);
        }
        for (n, (node, _)) in nodes.iter().enumerate() {
            let mut raw = node.raw().await;
            let (from, to) = (n * 16384 / 3, (n + 1) * 16384 / 3 - 1);
            let mut range = ::redis::cmd("CLUSTER");
            range.arg("ADDSLOTSRANGE").arg(from).arg(to).exec_async(&mut raw).await.expect("slots");
            for (other, bus) in &nodes[..n] {
                let mut meet = ::redis::cmd("CLUSTER");
                meet.arg("MEET").arg("127.0.0.1").arg(other.port()).arg(bus);
                meet.exec_async(&mut raw).await.expect("meet");
            }
        }
        let nodes: Vec<Server> = nodes.into_iter().map(|(node, _)| node).collect();
        for node in &nodes {
            let mut raw = node.raw().await;
            for attempt in 0.. {
                let info: String =
                    ::redis::cmd("CLUSTER").arg("INFO").query_async(&mut raw).await.expect("info");
                if info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3") {
                    break;
                }
                assert!(attempt < 3000, "no cluster: {info}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        Self { nodes, _dirs: dirs }
    }

    pub(crate) fn url(&self) -> String {
        let hosts: Vec<String> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        format!("redis+cluster://{}", hosts.join(","))
    }

    pub(crate) async fn limiter(&self) -> RedisLimiter {
        limiter_of(&self.url()).await
    }

    pub(crate) async fn flush(&self) {
        for node in &self.nodes {
            ::redis::cmd("FLUSHALL").exec_async(&mut node.raw().await).await.expect("flush");
        }
    }

    /// Wherever it is.
    async fn delete(&self, key: &Key) {
        let mut gone = 0;
        for node in &self.nodes {
            let deleted =
                ::redis::cmd("DEL").arg(key.as_str()).query_async::<i64>(&mut node.raw().await).await;
            gone += deleted.unwrap_or(0);
        }
        assert_eq!(gone, 1);
    }
}

fn spawn(port: &str, settings: &[&str]) -> Child {
    Command::new("redis-server")
        .args(["--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--enable-debug-command", "local"])
        .args(settings)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("these tests need a Redis server: apt-get install redis-server")
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn bucket(capacity: u64, rate: u64, period: Duration) -> Option<Bucket> {
    Some(Bucket { capacity, rate, period })
}

/// A scope of a tenant without limits.
pub(crate) fn scope(tenant: &str) -> ScopeLimits {
    let (record, leases) = scope_keys(Scope::Tenant(tenant));
    ScopeLimits {
        record,
        leases,
        buckets: [None; Kind::COUNT],
        concurrency: None,
        mode: Mode::Enforce,
        without_store: WithoutStore::LocalShare,
        prefetch: Default::default(),
    }
}

/// A scope with one limit.
pub(crate) fn limited(tenant: &str, kind: Kind, limit: Option<Bucket>) -> ScopeLimits {
    let mut scope = scope(tenant);
    scope.buckets[kind as usize] = limit;
    scope
}

/// One request under these scopes, with a fresh id.
pub(crate) fn call(scopes: impl Into<Scopes>) -> Acquire {
    Acquire {
        id: Uuid::now_v7(),
        cost: Cost::of_request(0, 0, 0),
        estimated: false,
        scopes: scopes.into(),
        candidates: Vec::new(),
        lease_ttl: LEASE,
    }
}

/// So many tokens under these scopes.
pub(crate) fn tokens(scopes: impl Into<Scopes>, tokens: u64) -> Acquire {
    Acquire { cost: Cost::of_request(tokens, 0, 0), ..call(scopes) }
}

pub(crate) fn candidate(name: &str, max_concurrency: u32) -> Candidate {
    Candidate { leases: Key::backend_slots(name), max_concurrency, bound: None }
}

pub(crate) fn granted(decision: &Decision) -> bool {
    matches!(decision.outcome, Outcome::Granted { .. })
}
