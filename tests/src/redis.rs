//! A `redis-server` of a test's own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;
use weir_ratelimit::redis::RedisLimiter;
use weir_ratelimit::{Bucket, Key, Kind, Limiter, Mode, Scope, ScopeLimits, What, limit_keys, scope_keys};

/// A server that ends with the test.
#[derive(Debug)]
pub struct Redis {
    child: Child,
    port: u16,
    looking: OnceCell<RedisLimiter>,
}

/// The usage of a scope in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Requests that have not drained.
    pub requests: u64,
    /// Tokens that have not drained.
    pub tokens: u64,
    /// Requests in flight.
    pub leases: u64,
}

impl Redis {
    /// Starts a server and waits until it accepts connections.
    pub async fn start() -> Self {
        let free = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = free.local_addr().expect("an address").port();
        drop(free);
        let server = Self { child: spawn(port), port, looking: OnceCell::new() };
        server.listens().await;
        server
    }

    async fn listens(&self) {
        crate::eventually("redis-server listens", || async {
            TcpStream::connect(("127.0.0.1", self.port)).await.is_ok()
        })
        .await;
    }

    /// Starts it again, empty, after it was [killed](Self::kill).
    pub async fn restart(&mut self) {
        self.child = spawn(self.port);
        self.listens().await;
    }

    /// Its port.
    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Its process id, for signals.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// The usage of a tenant: requests and tokens that have not drained, and leases.
    pub async fn standing(&self, tenant: &str) -> Standing {
        let connect =
            || async { RedisLimiter::connect(&self.url(), Default::default()).await.expect("there") };
        let limiter = self.looking.get_or_init(connect).await;
        standing_of(limiter, Scope::Tenant(tenant)).await
    }

    /// The output of a redis-cli command.
    pub async fn cli(&self, args: &[&str]) -> String {
        let port = self.port.to_string();
        let done = Command::new("redis-cli").args(["-p", &port]).args(args).output().await;
        let done = done.expect("redis-cli comes with redis-server");
        String::from_utf8(done.stdout).expect("UTF-8")
    }

    /// The leases of a tenant: their ids and expiries, in microseconds of the server's clock.
    pub async fn leases(&self, tenant: &str) -> BTreeMap<String, u64> {
        let (_, leases) = scope_keys(Scope::Tenant(tenant));
        let printed = self.cli(&["ZRANGE", leases.as_str(), "0", "-1", "WITHSCORES"]).await;
        let lines: Vec<&str> = printed.lines().collect();
        lines.chunks_exact(2).map(|pair| (pair[0].to_owned(), pair[1].parse().expect("a score"))).collect()
    }

    /// The time of its clock, microseconds.
    pub async fn now(&self) -> u64 {
        let printed = self.cli(&["TIME"]).await;
        let mut parts = printed.lines().map(|part| part.parse::<u64>().expect("a number"));
        parts.next().expect("seconds") * 1_000_000 + parts.next().expect("microseconds")
    }

    /// Removes all of its data.
    pub async fn flush(&self) {
        let port = self.port.to_string();
        let done =
            Command::new("redis-cli").args(["-p", &port, "FLUSHALL"]).stdout(Stdio::null()).status().await;
        assert!(done.expect("redis-cli comes with redis-server").success());
    }

    /// Kills it.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("killed");
        tokio::time::timeout(Duration::from_secs(5), self.child.wait()).await.expect("ends").expect("ended");
    }
}

fn spawn(port: u16) -> Child {
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    // A replica that synchronises again at once is what tests of replicas need.
    command.args(["--repl-diskless-sync-delay", "0", "--enable-debug-command", "local"]);
    // A replica writes a dump into its directory; it works without one if the directory is not writable.
    command.args(["--repl-diskless-load", "swapdb", "--dbfilename", &format!("weir-test-{port}.rdb")]);
    let spawned = command.current_dir(std::env::temp_dir()).stdout(Stdio::null()).kill_on_drop(true).spawn();
    spawned.expect("redis-server is needed: run `make tools`, or apt-get install redis-server")
}

/// The usage of a scope's own limits: requests and tokens that have not drained, and leases.
pub async fn standing_of(limiter: &impl Limiter, scope: Scope<'_>) -> Standing {
    standing(limiter, scope_keys(scope)).await
}

/// The same of a limit resource over a scope.
pub async fn standing_of_limit(limiter: &impl Limiter, scope: Scope<'_>, limit: &str) -> Standing {
    standing(limiter, limit_keys(scope, limit)).await
}

async fn standing(limiter: &impl Limiter, (record, leases): (Key, Key)) -> Standing {
    // Limits that are never reached: the rest of them shows the usage. The rate is one per minute, because reading a
    // bucket drains it by the reader's rate.
    const UNITS: u64 = 1_000_000;
    const LEASES: u32 = 1_000_000;
    let mut buckets = [None; Kind::COUNT];
    for kind in [Kind::Requests, Kind::Tokens] {
        buckets[kind as usize] = Some(Bucket::per_minute(1, UNITS as f64));
    }
    let scope = ScopeLimits {
        record,
        leases,
        buckets,
        concurrency: Some(LEASES),
        mode: Mode::Enforce,
        without_store: weir_ratelimit::WithoutStore::LocalShare,
        prefetch: Default::default(),
    };
    let looked = async {
        loop {
            // On a busy machine an answer may take longer than a gateway would wait.
            match limiter.peek(std::slice::from_ref(&scope)).await {
                Ok(states) => return states,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let states = tokio::time::timeout(Duration::from_secs(10), looked).await.expect("peeks");
    let left = |what: What| states.iter().find(|s| s.what == what).expect("asked for").remaining;
    Standing {
        requests: UNITS - left(What::Bucket(Kind::Requests)),
        tokens: UNITS - left(What::Bucket(Kind::Tokens)),
        leases: u64::from(LEASES) - left(What::Concurrency),
    }
}
