//! The limit store of a bench: one `redis-server`, a primary that a Sentinel watches, or a Cluster.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};
use weir_ratelimit::Key;

use crate::process::free_port;
use crate::redis_server::Redis;

/// Primaries of a Cluster.
const NODES: usize = 3;
/// Slots of any Cluster.
const SLOTS: usize = 16_384;
/// The time that servers have to find each other.
const MEET_TIMEOUT: Duration = Duration::from_secs(30);
/// The name by which a Sentinel knows the primary.
const SERVICE: &str = "weir";
/// The silence after which a Sentinel takes a primary for dead.
const DOWN_AFTER: Duration = Duration::from_millis(300);
/// Keys that are moved in one step.
const MOVED_AT_ONCE: &str = "100";

/// The servers of one data set.
#[derive(Debug)]
pub(crate) enum Store {
    /// One server.
    One(Box<Redis>),
    /// A primary, its replica, and the Sentinel that promotes the replica.
    Sentinel(Box<Failover>),
    /// Primaries with a third of the hash slots each.
    Cluster(Vec<Redis>),
}

/// See [`Store::Sentinel`].
#[derive(Debug)]
pub(crate) struct Failover {
    primary: Redis,
    replica: Redis,
    sentinel: Redis,
}

/// The kind of store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Topology {
    /// One server.
    One,
    /// One server that writes its data to disk when it ends.
    Durable,
    /// A primary and a replica.
    Sentinel,
    /// Three primaries.
    Cluster,
}

impl Store {
    /// Starts the servers and waits until they know each other.
    pub(crate) async fn start(topology: Topology, directory: &Path) -> anyhow::Result<Self> {
        match topology {
            Topology::One => Ok(Self::One(Box::new(Redis::start(directory).await?))),
            Topology::Durable => Ok(Self::One(Box::new(durable(free_port()?, directory).await?))),
            Topology::Sentinel => watched(directory).await,
            Topology::Cluster => cluster(directory).await,
        }
    }

    /// The address for gateways.
    pub(crate) fn url(&self) -> String {
        match self {
            Self::One(redis) => redis.url(),
            Self::Sentinel(all) => format!("redis+sentinel://{}/{SERVICE}", all.sentinel.host()),
            Self::Cluster(nodes) => {
                let hosts: Vec<String> = nodes.iter().map(Redis::host).collect();
                format!("redis+cluster://{}", hosts.join(","))
            }
        }
    }

    /// The server that is asked, stopped and killed first.
    pub(crate) fn first(&self) -> &Redis {
        match self {
            Self::One(redis) => redis,
            Self::Sentinel(all) => &all.primary,
            Self::Cluster(nodes) => &nodes[0],
        }
    }

    /// Kills the first server.
    pub(crate) async fn crash(&mut self) -> anyhow::Result<()> {
        match self {
            Self::One(redis) => redis.process.kill().await,
            Self::Sentinel(all) => all.primary.process.kill().await,
            Self::Cluster(nodes) => nodes[0].process.kill().await,
        }
    }

    /// Ends the one server in order, and returns when it has ended.
    pub(crate) async fn shut_down(&mut self) -> anyhow::Result<()> {
        let Self::One(redis) = self else { bail!("only a single server is shut down") };
        redis.process.signal(Signal::TERM)?;
        redis.process.ended().await
    }

    /// A new server in place of the one server, with the data that it wrote to disk, or empty.
    pub(crate) async fn restart(&mut self, topology: Topology, directory: &Path) -> anyhow::Result<()> {
        let Self::One(redis) = self else { bail!("only a single server is started again") };
        **redis = match topology {
            Topology::Durable => durable(redis.port, directory).await?,
            _ => Redis::start_on(redis.port, directory).await?,
        };
        Ok(())
    }

    /// Returns when the replica is the primary.
    pub(crate) async fn failed_over(&self) -> anyhow::Result<()> {
        let Self::Sentinel(all) = self else { bail!("nothing fails over here") };
        let Failover { replica, sentinel, .. } = &**all;
        let port = replica.port.to_string();
        within("the replica is the primary", async || {
            let primary: Vec<String> =
                sentinel.ask(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE]).await?;
            let role: String = replica.ask(&["INFO", "replication"]).await?;
            Ok(primary.get(1) == Some(&port) && role.contains("role:master"))
        })
        .await
    }

    /// Moves the hash slot of a key to the next node with all of its keys, as an operator's tool would.
    pub(crate) async fn migrate(&self, key: &Key) -> anyhow::Result<()> {
        let Self::Cluster(nodes) = self else { bail!("no slot moves here") };
        let slot: usize = nodes[0].ask(&["CLUSTER", "KEYSLOT", key.as_str()]).await?;
        let mut ids: Vec<String> = Vec::new();
        for node in nodes {
            ids.push(node.ask(&["CLUSTER", "MYID"]).await?);
        }
        let from = (0..NODES).find(|n| range(*n).contains(&slot)).context("a slot has an owner")?;
        let to = (from + 1) % NODES;
        let (source, target, number, slot) = (&nodes[from], &nodes[to], slot, slot.to_string());
        target.tell(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &ids[from]]).await?;
        source.tell(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &ids[to]]).await?;
        loop {
            let keys: Vec<String> = source.ask(&["CLUSTER", "GETKEYSINSLOT", &slot, MOVED_AT_ONCE]).await?;
            if keys.is_empty() {
                break;
            }
            let port = target.port.to_string();
            let mut migrate = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
            migrate.extend(keys.iter().map(String::as_str));
            source.tell(&migrate).await?;
        }
        // The owner announces it first. A late message of an earlier move may take the slot from a node again; then
        // it belongs to no node, as after a real tool's move, until it is announced once more.
        within("every node knows where a slot went", async || {
            let mut agreed = true;
            for node in [target, source].into_iter().chain(nodes) {
                let known: String = node.ask(&["CLUSTER", "NODES"]).await?;
                if owner(&known, number) != Some(ids[to].as_str()) {
                    node.tell(&["CLUSTER", "SETSLOT", &slot, "NODE", &ids[to]]).await?;
                    agreed = false;
                }
            }
            Ok(agreed)
        })
        .await
    }
}

/// The owner of a hash slot, by `CLUSTER NODES`: a line per node, with its slots from the ninth word on.
fn owner(nodes: &str, slot: usize) -> Option<&str> {
    let has = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse::<usize>().ok()? <= slot && slot <= last.parse::<usize>().ok()?)
    };
    nodes.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let id = words.next()?;
        words.skip(7).any(|range| has(range) == Some(true)).then_some(id)
    })
}

/// Its data is on disk after it has ended in order.
async fn durable(port: u16, directory: &Path) -> anyhow::Result<Redis> {
    let path = directory.to_str().context("a path in UTF-8")?;
    Redis::start_with(port, directory, &["--dir", path, "--save", "3600 1"]).await
}

async fn watched(directory: &Path) -> anyhow::Result<Store> {
    let (first, second) = (directory.join("primary"), directory.join("replica"));
    for path in [&first, &second] {
        std::fs::create_dir(path)?;
    }
    let dir = |path: &Path| path.to_str().map(str::to_owned).context("a path in UTF-8");
    let (first, second) = (dir(&first)?, dir(&second)?);
    // The replica copies at once; by default the primary waits five seconds for more replicas.
    let settings = ["--repl-diskless-sync-delay", "0", "--dir", &first];
    let primary = Redis::start_with(free_port()?, directory, &settings).await?;
    let port = primary.port.to_string();
    let settings = ["--repl-diskless-sync-delay", "0", "--dir", &second, "--replicaof", "127.0.0.1", &port];
    let replica = Redis::start_with(free_port()?, directory, &settings).await?;
    let file = directory.join("sentinel.conf");
    let configuration = format!(
        "sentinel monitor {SERVICE} 127.0.0.1 {port} 1\nsentinel down-after-milliseconds {SERVICE} {}\n\
         sentinel failover-timeout {SERVICE} 3000\n",
        DOWN_AFTER.as_millis()
    );
    std::fs::write(&file, configuration)?;
    let sentinel = Redis::start_sentinel(&file, directory).await?;
    within("the replica follows, and the Sentinel knows it", async || {
        let linked: String = replica.ask(&["INFO", "replication"]).await?;
        let known: String = sentinel.ask(&["INFO", "sentinel"]).await?;
        Ok(linked.contains("master_link_status:up")
            && known.contains("status=ok,")
            && known.contains("slaves=1"))
    })
    .await?;
    Ok(Store::Sentinel(Box::new(Failover { primary, replica, sentinel })))
}

fn range(node: usize) -> std::ops::Range<usize> {
    node * SLOTS / NODES..(node + 1) * SLOTS / NODES
}

async fn cluster(directory: &Path) -> anyhow::Result<Store> {
    let mut nodes: Vec<(Redis, String)> = Vec::new();
    for n in 0..NODES {
        let own = directory.join(format!("node-{n}"));
        std::fs::create_dir(&own)?;
        // By default the bus port is the port plus 10000, which may not exist.
        let bus = free_port()?.to_string();
        let dir = own.to_str().context("a path in UTF-8")?;
        let settings = ["--cluster-enabled", "yes", "--cluster-port", &bus, "--dir", dir];
        nodes.push((Redis::start_with(free_port()?, directory, &settings).await?, bus));
    }
    for (n, (node, _)) in nodes.iter().enumerate() {
        let (from, to) = (range(n).start.to_string(), (range(n).end - 1).to_string());
        node.tell(&["CLUSTER", "ADDSLOTSRANGE", &from, &to]).await?;
        for (other, bus) in &nodes[..n] {
            node.tell(&["CLUSTER", "MEET", "127.0.0.1", &other.port.to_string(), bus]).await?;
        }
    }
    let nodes: Vec<Redis> = nodes.into_iter().map(|(node, _)| node).collect();
    for node in &nodes {
        within("the nodes are a cluster", async || {
            let info: String = node.ask(&["CLUSTER", "INFO"]).await?;
            let all = format!("cluster_known_nodes:{NODES}");
            Ok(info.contains("cluster_state:ok") && info.contains(&all))
        })
        .await?;
    }
    Ok(Store::Cluster(nodes))
}

async fn within(what: &str, holds: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let since = Instant::now();
    while !holds().await.unwrap_or(false) {
        if since.elapsed() > MEET_TIMEOUT {
            bail!("not within {MEET_TIMEOUT:?}: {what}");
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
