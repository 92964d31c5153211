//! Redis fails in every way while gateways are under traffic: no request fails because of it, admissions stay within
//! one limit per primary, and everything recovers.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_ratelimit::{Scope, scope_keys};
use weir_tests::client::Client;
use weir_tests::cluster::{Resources, mock};
use weir_tests::eventually;
use weir_tests::line::Line;
use weir_tests::process::signal;
use weir_tests::redis::Redis;
use weir_tests::sentinel::Sentinel;

use crate::fleet::{Counts, Fleet, Traffic, ask, plenty, requests, roomy};

/// The tenant's limit of requests.
const LIMIT: u32 = 100;
/// Requests that a gateway may decide alone before it detects the outage: five consecutive timeouts, and the calls of
/// other workers in flight with them.
const BLIP: u64 = 5 + WORKERS as u64;
/// Concurrent requests of a flood at each gateway.
const WORKERS: usize = 4;
const PAUSE: Duration = Duration::from_millis(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_flushed_emptied_and_killed_under_traffic_costs_no_request() {
    let mocks = [mock(roomy(), &CancellationToken::new()).await];
    let mut redis = Redis::start().await;
    let url = redis.url();
    let resources = Resources::limited(&mocks, 10_000, plenty());
    let fleet = Fleet::start(2, &resources, |_, config| config.redis = Some(url.clone())).await;
    let traffic = Traffic::start(&fleet.clients(), 8, PAUSE);
    traffic.more(50).await;
    for command in [["SCRIPT", "FLUSH"], ["FLUSHALL", "SYNC"]] {
        for _ in 0..3 {
            redis.cli(&command).await;
            traffic.more(50).await;
        }
    }
    redis.kill().await;
    traffic.more(200).await;
    redis.restart().await;
    fleet.uses_redis().await;
    traffic.more(100).await;
    // Back at once: whether a gateway detects an outage depends on the number of calls in it.
    redis.kill().await;
    redis.restart().await;
    traffic.more(100).await;
    fleet.uses_redis().await;
    traffic.more(100).await;
    let counts = traffic.end().await;
    counts.only(&[200], "Redis came and went");
    eventually("every lease is given back", || async { redis.standing("acme").await.leases == 0 }).await;
}

/// A command that makes Redis refuse, and one that undoes it.
struct Refusal {
    name: &'static str,
    wrong: &'static [&'static str],
    undo: &'static [&'static str],
}

const REFUSALS: &[Refusal] = &[
    Refusal {
        name: "oom",
        wrong: &["CONFIG", "SET", "maxmemory", "1"],
        undo: &["CONFIG", "SET", "maxmemory", "0"],
    },
    Refusal { name: "read_only", wrong: &["REPLICAOF", "127.0.0.1", "1"], undo: &["REPLICAOF", "NO", "ONE"] },
    Refusal {
        name: "no_replicas",
        wrong: &["CONFIG", "SET", "min-replicas-to-write", "1"],
        undo: &["CONFIG", "SET", "min-replicas-to-write", "0"],
    },
    Refusal {
        name: "denied",
        wrong: &["ACL", "SETUSER", "default", "-evalsha", "-eval"],
        undo: &["ACL", "SETUSER", "default", "+@all"],
    },
    // Redis answers nobody until the time is over, not even a command that would end it.
    Refusal { name: "paused", wrong: &["CLIENT", "PAUSE", "4000", "ALL"], undo: &["PING"] },
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_redis_refuses_is_no_error_for_clients_and_heals() {
    let mocks = [mock(roomy(), &CancellationToken::new()).await];
    let redis = Redis::start().await;
    let url = redis.url();
    let resources = Resources::limited(&mocks, 10_000, plenty());
    let fleet = Fleet::start(1, &resources, |_, config| config.redis = Some(url.clone())).await;
    let gateway = &fleet.gateways[0];
    let traffic = Traffic::start(&fleet.clients(), 4, PAUSE);
    traffic.more(50).await;
    for refusal in REFUSALS {
        redis.cli(refusal.wrong).await;
        eventually(refusal.name, || async {
            gateway.metric("weir_limit_store_unavailable", "").await == 1.0
        })
        .await;
        traffic.more(50).await;
        redis.cli(refusal.undo).await;
        fleet.uses_redis().await;
        let counts = traffic.counts();
        counts.only(&[200], refusal.name);
    }
    // One record of a wrong type: its limit cannot be decided, and all others can.
    let (record, leases) = scope_keys(Scope::Tenant("acme"));
    for key in [record.as_str(), leases.as_str()] {
        redis.cli(&["DEL", key]).await;
        redis.cli(&["SET", key, "not what it was"]).await;
        traffic.more(50).await;
        redis.cli(&["DEL", key]).await;
    }
    fleet.uses_redis().await;
    // An endless script: Redis answers BUSY until it is killed.
    redis.cli(&["CONFIG", "SET", "busy-reply-threshold", "10"]).await;
    let (_, ()) = tokio::join!(redis.cli(&["EVAL", "while true do end", "0"]), async {
        eventually("busy", || async { gateway.metric("weir_limit_store_unavailable", "").await == 1.0 })
            .await;
        traffic.more(50).await;
        redis.cli(&["SCRIPT", "KILL"]).await;
    });
    fleet.uses_redis().await;
    traffic.more(50).await;
    traffic.end().await.only(&[200], "each refusal was undone");
}

/// A primary and its replica, and the answers of two Sentinels.
struct Replicated {
    old: Redis,
    new: Redis,
}

impl Replicated {
    async fn start() -> Self {
        let (old, new) = (Redis::start().await, Redis::start().await);
        let this = Self { old, new };
        this.follow(&this.new, &this.old).await;
        this
    }

    /// Makes one server a replica of the other. Returns when it has the other's data.
    async fn follow(&self, replica: &Redis, primary: &Redis) {
        replica.cli(&["REPLICAOF", "127.0.0.1", &primary.address().port().to_string()]).await;
        eventually("the replica follows", || async {
            replica.cli(&["INFO", "replication"]).await.contains("master_link_status:up")
        })
        .await;
    }

    /// Returns when the new server has all data of the old one.
    async fn caught_up(&self) {
        let offset = async |redis: &Redis| {
            let page = redis.cli(&["INFO", "replication"]).await;
            let line = page.lines().find_map(|line| line.strip_prefix("master_repl_offset:"));
            line.expect("an offset").trim().parse::<u64>().expect("a number")
        };
        let wanted = offset(&self.old).await;
        eventually("the replica has everything", || async { offset(&self.new).await >= wanted }).await;
    }

    async fn promote(&self) {
        self.new.cli(&["REPLICAOF", "NO", "ONE"]).await;
    }
}

/// Far more requests than the limit allows, with wrong keys among them.
async fn flood(clients: &[Client], each: usize) -> Counts {
    let counts = std::sync::Arc::new(std::sync::Mutex::new(Counts::default()));
    let mut all = tokio::task::JoinSet::new();
    for client in clients {
        for worker in 0..WORKERS {
            let (client, counts) = (client.clone(), counts.clone());
            let wrong = client.with_key("weir_wrong");
            all.spawn(async move {
                for _ in 0..each / WORKERS {
                    ask(&client, crate::fleet::CHAT, &counts).await;
                    if worker == 0 {
                        ask(&wrong, crate::fleet::CHAT, &counts).await;
                    }
                }
            });
        }
    }
    while let Some(ended) = all.join_next().await {
        ended.expect("no panic");
    }
    let counts = counts.lock().expect("whole").clone();
    counts.only(&[200, 401, 429], "nothing but limits refuses");
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_hangs_is_left_for_the_promoted_replica_within_the_limit() {
    let end = CancellationToken::new();
    let mocks = [mock(roomy(), &end).await];
    let mut redis = Replicated::start().await;
    let sentinel = Sentinel::start(redis.old.address(), &end).await;
    let resources = Resources::limited(&mocks, 10_000, requests(LIMIT));
    let fleet = Fleet::start(3, &resources, |_, config| config.redis = Some(sentinel.url())).await;
    let mut admitted = 0;
    for n in 0..30 {
        admitted += u64::from(fleet.gateways[n % 3].client.chat(crate::fleet::CHAT).await.status == 200);
    }
    redis.caught_up().await;
    let before = fleet.outages().await;
    signal(redis.old.child(), "-STOP").await;
    // Sentinel does not answer at first either: it needs its time.
    sentinel.silence();
    admitted += flood(&fleet.clients(), 40).await.of(200);
    redis.promote().await;
    sentinel.say(redis.new.address());
    let promoted = Instant::now();
    fleet.was_away(&before, 0..3).await;
    eprintln!("the promoted replica decides after {:?}", promoted.elapsed());
    admitted += flood(&fleet.clients(), 200).await.of(200);
    // During the outage each gateway has its local share, rounded down, at least the slots that it held.
    let most = u64::from(LIMIT) + 3;
    assert!((u64::from(LIMIT) - 3..=most).contains(&admitted), "{admitted} of {LIMIT}");
    // The old primary returns and still believes that it is the primary: no gateway asks it.
    signal(redis.old.child(), "-CONT").await;
    let refused = flood(&fleet.clients(), 40).await;
    assert!(refused.of(200) <= 1, "{refused:?}");
    redis.follow(&redis.old, &redis.new).await;
    assert!(flood(&fleet.clients(), 40).await.of(200) <= 1);
    // A second failover, back to it, with the primary killed.
    redis.new.kill().await;
    redis.old.cli(&["REPLICAOF", "NO", "ONE"]).await;
    sentinel.say(redis.old.address());
    let meanwhile = flood(&fleet.clients(), 40).await.of(200);
    fleet.uses_redis().await;
    assert!(flood(&fleet.clients(), 40).await.of(200) <= 1, "what was used counts on");
    assert!(meanwhile <= 3 * BLIP, "{meanwhile} were admitted while nobody decided");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_split_brain_admits_one_limit_for_each_primary_and_heals() {
    let end = CancellationToken::new();
    let mocks = [mock(roomy(), &end).await];
    let redis = Replicated::start().await;
    // Each side has its own connection to the old primary, and its own Sentinel.
    let ways = [Line::to(redis.old.address(), &end).await, Line::to(redis.old.address(), &end).await];
    let mut sentinels = Vec::new();
    for way in &ways {
        sentinels.push(Sentinel::start(way.address, &end).await);
    }
    let resources = Resources::limited(&mocks, 10_000, requests(LIMIT));
    let fleet = Fleet::start(4, &resources, |k, config| config.redis = Some(sentinels[k / 2].url())).await;
    let clients = fleet.clients();
    let mut before = 0;
    for client in clients.iter().cycle().take(40) {
        before += u64::from(client.chat(crate::fleet::CHAT).await.status == 200);
    }
    assert_eq!(before, 40);
    redis.caught_up().await;
    // The other side loses the primary and promotes the replica; the first side notices nothing.
    ways[1].cut();
    redis.promote().await;
    sentinels[1].say(redis.new.address());
    let (first, other) = (&clients[..2], &clients[2..]);
    let (a, b) = tokio::join!(flood(first, 300), flood(other, 300));
    fleet.uses_redis().await;
    let (c, d) = tokio::join!(flood(first, 100), flood(other, 100));
    let (old_side, new_side) = (a.of(200) + c.of(200), b.of(200) + d.of(200));
    let left = u64::from(LIMIT) - before;
    eprintln!("of {left} left, {old_side} were admitted at the old primary and {new_side} at the new one");
    assert!(old_side <= left && new_side <= left + 2 * BLIP, "{old_side} and {new_side} of {left}");
    // The partition ends: the old primary becomes a replica, and both Sentinels report it.
    sentinels[0].say(redis.new.address());
    redis.follow(&redis.old, &redis.new).await;
    let healed = Instant::now();
    fleet.uses_redis().await;
    eventually("nobody is connected to the old primary but its own", || async {
        flood(&clients, 4).await.of(200) == 0
            && !redis.old.cli(&["CLIENT", "LIST", "TYPE", "normal"]).await.contains("cmd=evalsha")
    })
    .await;
    eprintln!("healed after {:?}", healed.elapsed());
    assert!(flood(&clients, 40).await.of(200) <= 1, "one limit again, and it is used up");
}

/// A Sentinel accepts connections and never answers: gateways start, serve, and find the primary when it answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_sentinel_delays_nobody_and_is_asked_again() {
    let end = CancellationToken::new();
    let mocks = [mock(roomy(), &end).await];
    let redis = Redis::start().await;
    let sentinel = Sentinel::start(redis.address(), &end).await;
    sentinel.silence();
    let resources = Resources::limited(&mocks, 10_000, plenty());
    let fleet = Fleet::start(1, &resources, |_, config| config.redis = Some(sentinel.url())).await;
    let traffic = Traffic::start(&fleet.clients(), 4, PAUSE);
    traffic.more(100).await;
    sentinel.say(redis.address());
    fleet.uses_redis().await;
    traffic.more(100).await;
    traffic.end().await.only(&[200], "with a silent Sentinel");
}
